"""Commands that move much: in bounded pieces, within I/O limits, and no more than there is to do."""

from collections.abc import Callable

import pytest

from protocol.scsi.compare import equal, first_difference
from protocol.scsi.limits import MAXIMUM_TRANSFER_BYTES
from protocol.scsi.sense import Sense
from storage.memory import Memory, Null
from storage.wrap import Wrapper
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, make_nexus, sense_of, triple
from tests.scsi.test_block import cdb16, compare_and_write, unmap

MIB = 1 << 20
FLUSH = "35 00 00000000 00 0000 00"
DATA = bytes(range(256)) * (BLOCK // 256)


class Counting:
    """I/O limits that never hold anybody up, and keep account."""

    def __init__(self, piece_bytes: int = 0) -> None:
        self.exhausted = False
        self.piece_bytes = piece_bytes
        self.taken: list[int] = []
        self.spent: list[int] = []

    def take(self, length: int) -> bool:
        self.taken.append(length)
        return True

    def spend(self, length: int, stopped: Callable[[], bool]) -> bool:
        self.spent.append(length)
        return True


class Reads(Wrapper):
    """Counts what is read on a worker; what is ``cached`` can be had without."""

    def __init__(self, inner: Memory) -> None:
        super().__init__(inner)
        self.cached = False
        self.read_bytes = 0

    def _concerned(self, operation: str, offset: int, length: int) -> bool:
        return not self.cached

    def _before(self, operation: str, offset: int, length: int) -> None:
        if operation == "read":
            self.read_bytes += length


def limited(disk: Disk, piece_bytes: int = 0) -> Counting:
    throttle = Counting(piece_bytes)
    disk.unit.limit(throttle)
    return throttle


# -- I/O limits count what the medium moves ------------------------------------------------------------


@pytest.mark.parametrize(
    ("cdb", "data", "moved"),
    [
        (cdb16(0x88, 0, 8), b"", 8),
        (cdb16(0x8A, 0, 8), DATA * 8, 8),
        (cdb16(0x8E, 0, 8, 0x02), DATA * 8, 16),  # WRITE AND VERIFY
        (cdb16(0x8B, 0, 8), DATA * 8, 16),  # ORWRITE
        (compare_and_write(0, 1), bytes(BLOCK) + DATA, 2),
        (cdb16(0x8F, 0, 8), b"", 8),  # VERIFY: of what is allocated
        (cdb16(0x8F, 0, 8, 0x02), bytes(8 * BLOCK), 8),
        (cdb16(0x8F, 0, 8, 0x06), bytes(BLOCK), 8),
        (cdb16(0x90, 0, 8), b"", 8),  # PRE-FETCH
        (cdb16(0x93, 0, 8), DATA, 8),  # WRITE SAME
        (cdb16(0x93, 0, 8, 0x01), b"", 8),  # zeros over what is allocated
        (cdb16(0x93, 0, 8, 0x08), DATA, 8),  # given back
        (*unmap((0, 8)), 8),
        ("04 00 00 0000 00", b"", 8),  # FORMAT UNIT
        ("48 02 00000000 00 0000 00", b"", 8),  # SANITIZE, BLOCK ERASE
    ],
)
def test_what_the_medium_moves_counts(cdb: bytes, data: bytes, moved: int) -> None:
    disk = Disk()
    assert not disk.run(cdb16(0x8A, 0, 8), bytes(8 * BLOCK)).status
    throttle = limited(disk)
    outcome = disk.run(cdb, data)
    assert outcome.status in (0, 4), outcome
    assert sum(throttle.taken) + sum(throttle.spent) == moved * BLOCK
    assert len(throttle.taken) == 1, "and it is one command"


def test_what_was_never_allocated_costs_nothing_to_give_back() -> None:
    disk = Disk()
    throttle = limited(disk)
    assert not disk.run(*unmap((0, BLOCKS))).status
    assert sum(throttle.taken) + sum(throttle.spent) == 0


def test_the_initiators_expected_length_makes_nothing_cheaper() -> None:
    disk = Disk()
    throttle = limited(disk)
    assert not disk.run(cdb16(0x88, 0, 64), expected_in=0).status
    assert throttle.taken == [64 * BLOCK]


def test_under_limits_the_pieces_are_small() -> None:
    disk = Disk()
    throttle = limited(disk, 65536)
    assert not disk.run(cdb16(0x93, 0, BLOCKS), DATA).status
    assert throttle.spent == [65536] * (BLOCKS * BLOCK // 65536)
    assert disk.backend.read(0, BLOCKS * BLOCK) == DATA * BLOCKS  # type: ignore[union-attr]


# -- VERIFY ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 0x02, 0x06])
def test_a_verify_asks_for_no_more_than_the_maximum_transfer_length(flags: int) -> None:
    """VPD page B0h tells it; a range without bound would keep the medium at work for hours."""
    disk = Disk(backend=Null(1 << 42))
    most = int.from_bytes(disk.read("12 01 B0 00FF 00")[8:12], "big")
    assert most == MAXIMUM_TRANSFER_BYTES // BLOCK
    data = bytes(BLOCK) if flags == 0x06 else b""
    if flags != 0x02:
        assert not disk.run(cdb16(0x8F, 0, most, flags), data).status
    for blocks in (most + 1, 0xFFFFFFFF):
        refused = disk.run(cdb16(0x8F, 0, blocks, flags), data)
        assert sense_of(refused) == triple(Sense.INVALID_FIELD_IN_CDB)


def test_a_verify_without_compare_reads_only_what_might_not_be_there() -> None:
    backend = Reads(Memory(64 * MIB))
    disk = Disk(backend=backend)
    backend.write(20 * MIB, bytes(4 * MIB))
    verify = cdb16(0x8F, 0, MAXIMUM_TRANSFER_BYTES // BLOCK)
    assert not disk.run(verify).status
    assert backend.read_bytes == 4 * MIB, "holes are known"
    backend.read_bytes, backend.cached = 0, True
    assert not disk.run(verify).status
    assert backend.read_bytes == 0, "what is in memory is known"


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, MIB])
def test_buffers_are_compared_to_the_last_byte(size: int) -> None:
    one = bytes(range(251)) * (size // 251 + 1)
    one = one[:size]
    assert equal(memoryview(one), bytearray(one))
    assert first_difference(one, bytearray(one)) is None
    for at in {0, size // 2, size - 1} if size else ():
        other = bytearray(one)
        other[at] ^= 1
        assert not equal(one, memoryview(other))
        assert first_difference(one, other) == at
    assert not equal(one, one + b"x")


# -- room for short commands -----------------------------------------------------------------------------


class Lanes(HeldLane):
    """With long work and flushes on lanes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.others = (HeldLane(), HeldLane())

    @property
    def long(self) -> HeldLane:  # type: ignore[override]
        return self.others[0]

    @property
    def flushes(self) -> HeldLane:  # type: ignore[override]
        return self.others[1]


@pytest.mark.parametrize(
    ("cdb", "data"),
    [
        (cdb16(0x8F, 0, BLOCKS), b""),
        (cdb16(0x93, 0, BLOCKS), DATA),
        (cdb16(0x90, 0, BLOCKS), b""),
        (unmap((0, 4096))[0], unmap((0, 4096))[1]),
        ("04 00 00 0000 00", b""),
        ("48 02 00000000 00 0000 00", b""),
        (cdb16(0x8B, 0, 8192), bytes(8192 * BLOCK)),
    ],
)
def test_what_takes_long_has_workers_of_its_own(cdb: bytes, data: bytes) -> None:
    lane = Lanes()
    disk = Disk(lane=lane, backend=Memory(16 * MIB))
    disk.start(cdb, data)
    assert (len(lane.jobs), len(lane.long.jobs)) == (0, 1)


def test_flushes_that_wait_at_the_same_time_are_one() -> None:
    lane = Lanes()
    disk = Disk(lane=lane)
    other = make_nexus(2)
    disk.login(other)
    first = [disk.start(FLUSH) for _ in range(20)]
    assert len(lane.flushes.jobs) == 1
    (work, done), lane.flushes.jobs[:] = lane.flushes.jobs[0], []
    result = work()
    late = disk.start(FLUSH, nexus=other)  # that one may have passed its writes by
    assert len(lane.flushes.jobs) == 1
    done(result)
    assert all(not disk.delivered[request].status for request in first)
    assert late not in disk.delivered
    lane.flushes.release()
    assert not disk.delivered[late].status
    assert not lane.jobs
