"""SBC commands against a real memory medium, by CDB. Clauses are of SBC-3 r36 unless said otherwise."""

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.limits import (
    MAXIMUM_ATOMIC_BLOCKS,
    MAXIMUM_TRANSFER_BYTES,
    MAXIMUM_UNMAP_BLOCKS,
    MAXIMUM_UNMAP_DESCRIPTORS,
    MAXIMUM_WRITE_SAME_BLOCKS,
    pieces,
)
from protocol.scsi.request import Outcome
from protocol.scsi.sense import Sense
from storage.base import Buffer
from storage.memory import Memory
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, describe, pointer_of, sense_of, triple

GOOD = ScsiStatus.GOOD
LBA_OUT_OF_RANGE = triple(Sense.LBA_OUT_OF_RANGE)
INVALID_FIELD_IN_CDB = triple(Sense.INVALID_FIELD_IN_CDB)
INVALID_FIELD_IN_PARAMETER_LIST = triple(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
MISCOMPARE = triple(Sense.MISCOMPARE_DURING_VERIFY)
INVALID_INFORMATION_UNIT = triple(Sense.INVALID_INFORMATION_UNIT)
PARAMETER_LIST_LENGTH_ERROR = triple(Sense.PARAMETER_LIST_LENGTH_ERROR)

A = b"\xa5" * BLOCK
B = b"\x5a" * BLOCK


def cdb10(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return bytes((opcode, flags)) + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def cdb12(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return bytes((opcode, flags)) + lba.to_bytes(4, "big") + blocks.to_bytes(4, "big") + b"\0\0"


def cdb16(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return bytes((opcode, flags)) + lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + b"\0\0"


def cdb6(opcode: int, lba: int, blocks: int) -> bytes:
    return bytes((opcode,)) + lba.to_bytes(3, "big") + bytes((blocks & 0xFF, 0))


def compare_and_write(lba: int, blocks: int, flags: int = 0) -> bytes:
    return bytes((0x89, flags)) + lba.to_bytes(8, "big") + bytes((0, 0, 0, blocks, 0, 0))


def write_atomic(lba: int, blocks: int, boundary: int = 0) -> bytes:
    tail = boundary.to_bytes(2, "big") + blocks.to_bytes(2, "big") + b"\0\0"
    return b"\x9c\0" + lba.to_bytes(8, "big") + tail


def unmap(*ranges: tuple[int, int], cut: int | None = None) -> tuple[bytes, bytes]:
    """An UNMAP and its parameter list."""
    body = b"".join(lba.to_bytes(8, "big") + n.to_bytes(4, "big") + bytes(4) for lba, n in ranges)
    data = (len(body) + 6).to_bytes(2, "big") + len(body).to_bytes(2, "big") + bytes(4) + body
    data = data[:cut]
    return b"\x42" + bytes(6) + len(data).to_bytes(2, "big") + b"\0", data


def check(outcome: Outcome, expected: tuple[int, int, int] | int) -> None:
    if isinstance(expected, int):
        assert outcome.status == expected, describe(outcome)
    else:
        assert outcome.status == ScsiStatus.CHECK_CONDITION
        assert sense_of(outcome) == expected


def put(disk: Disk, lba: int, data: bytes) -> None:
    disk.backend.write(lba * BLOCK, data)  # type: ignore[union-attr]


def stored(disk: Disk, lba: int, length: int) -> bytes:
    return bytes(disk.backend.read(lba * BLOCK, length))  # type: ignore[union-attr]


@pytest.fixture
def disk() -> Disk:
    return Disk()


READS = [
    pytest.param(cdb6, 0x08, id="READ(6)"),
    pytest.param(cdb10, 0x28, id="READ(10)"),
    pytest.param(cdb12, 0xA8, id="READ(12)"),
    pytest.param(cdb16, 0x88, id="READ(16)"),
]
WRITES = [
    pytest.param(cdb6, 0x0A, id="WRITE(6)"),
    pytest.param(cdb10, 0x2A, id="WRITE(10)"),
    pytest.param(cdb12, 0xAA, id="WRITE(12)"),
    pytest.param(cdb16, 0x8A, id="WRITE(16)"),
    pytest.param(cdb10, 0x2E, id="WRITE AND VERIFY(10)"),
    pytest.param(cdb12, 0xAE, id="WRITE AND VERIFY(12)"),
    pytest.param(cdb16, 0x8E, id="WRITE AND VERIFY(16)"),
]


@pytest.mark.parametrize(("cdb", "opcode"), READS)
@pytest.mark.parametrize("lba", [0, 7, BLOCKS - 3])
def test_read_returns_the_blocks_asked_for(disk: Disk, cdb, opcode: int, lba: int) -> None:
    """§5.11 to 5.14."""
    put(disk, lba, A + B + A)
    assert disk.read(cdb(opcode, lba, 3)) == A + B + A


@pytest.mark.parametrize(("cdb", "opcode"), WRITES)
@pytest.mark.parametrize("lba", [0, 7, BLOCKS - 2])
def test_write_changes_its_blocks_and_no_others(disk: Disk, cdb, opcode: int, lba: int) -> None:
    """§5.32 to 5.38."""
    check(disk.run(cdb(opcode, lba, 2), A + B), GOOD)
    assert stored(disk, lba, 2 * BLOCK) == A + B
    rest = bytes(disk.backend.read(0, BLOCKS * BLOCK))  # type: ignore[union-attr]
    assert rest.count(b"\0") == (BLOCKS - 2) * BLOCK


@pytest.mark.parametrize(("opcode", "data"), [(0x08, b""), (0x0A, A * 256)])
def test_transfer_length_0_of_the_6_byte_commands_is_256_blocks(disk: Disk, opcode: int, data: bytes) -> None:
    """§5.11, §5.32."""
    request = disk.start(cdb6(opcode, 8, 0), data)
    assert request.length == 256 * BLOCK
    check(disk.delivered[request], GOOD)


BY_LENGTH = {10: (cdb10, (1 << 32) - 1), 12: (cdb12, (1 << 32) - 1), 16: (cdb16, (1 << 64) - 1)}
# opcode, CDB length, flags, byte 0 of the Data-Out; what takes an LBA range
RANGED = [
    (0x28, 10), (0xA8, 12), (0x88, 16), (0x2A, 10), (0xAA, 12), (0x8A, 16), (0x2E, 10), (0xAE, 12),
    (0x8E, 16), (0x2F, 10), (0xAF, 12), (0x8F, 16), (0x34, 10), (0x90, 16), (0x35, 10), (0x91, 16),
    (0x8B, 16), (0x41, 10), (0x93, 16),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "size"), RANGED)
def test_ranges_beyond_the_last_block_are_refused_whatever_their_arithmetic(
    disk: Disk, opcode: int, size: int
) -> None:
    """LBA OUT OF RANGE, also where LBA plus length leaves 32 or 64 bits (§4.6)."""
    cdb, highest = BY_LENGTH[size]
    data = A if opcode in (0x41, 0x93) else b""
    candidates = [BLOCKS, BLOCKS + 1, 1 << 31, highest, (1 << 63) - 9, 1 << 63, (1 << 64) - 9]
    for lba in (lba for lba in candidates if lba <= highest):
        outcome = disk.run(cdb(opcode, lba, 1), data, expected_out=len(data))
        check(outcome, LBA_OUT_OF_RANGE)
        assert pointer_of(outcome) == (2, None, True)
    check(disk.run(cdb(opcode, BLOCKS - 1, 2), data, expected_out=len(data)), LBA_OUT_OF_RANGE)


@pytest.mark.parametrize(("opcode", "size"), RANGED)
def test_zero_blocks_is_no_error_up_to_the_block_after_the_last(disk: Disk, opcode: int, size: int) -> None:
    """A length of zero "shall not be considered an error", but the LBA counts."""
    cdb, highest = BY_LENGTH[size]
    same = opcode in (0x41, 0x93)
    prefetch = opcode in (0x34, 0x90)
    for lba in (0, BLOCKS):
        outcome = disk.run(cdb(opcode, lba, 0), A if same else b"")
        check(outcome, ScsiStatus.CONDITION_MET if prefetch else GOOD)
    for lba in (BLOCKS + 1, 1 << 31, highest):
        check(disk.run(cdb(opcode, lba, 0), A if same else b""), LBA_OUT_OF_RANGE)


@pytest.mark.parametrize(
    ("cdb", "at"),
    [
        (cdb12(0xA8, 0, MAXIMUM_TRANSFER_BYTES // BLOCK + 1), 6),
        (cdb16(0x88, 0, MAXIMUM_TRANSFER_BYTES // BLOCK + 1), 10),
        (cdb16(0x8A, 0, MAXIMUM_TRANSFER_BYTES // BLOCK + 1), 10),
        (cdb16(0x8E, 0, MAXIMUM_TRANSFER_BYTES // BLOCK + 1), 10),
        (cdb16(0x8F, 0, MAXIMUM_TRANSFER_BYTES // BLOCK + 1, 0x02), 10),
        (cdb16(0x93, 0, MAXIMUM_WRITE_SAME_BLOCKS + 1, 0x01), 10),
        (compare_and_write(0, 2), 13),
        (write_atomic(0, MAXIMUM_ATOMIC_BLOCKS + 1), 12),
        (write_atomic(0, 8, boundary=4), 10),
        (write_atomic(0, 9), 12),  # the granularity is the physical block
        (write_atomic(1, 8), 2),  # and the alignment
    ],
)
def test_lengths_beyond_a_limit_of_vpd_b0_are_refused_with_a_pointer(cdb: bytes, at: int) -> None:
    """§6.6.3: the limits of the Block Limits page."""
    outcome = Disk(backend=Memory(64 << 20)).run(cdb, expected_out=0)
    check(outcome, INVALID_FIELD_IN_CDB)
    assert pointer_of(outcome)[0] == at


@pytest.mark.parametrize(("cdb", "opcode"), WRITES)
@pytest.mark.parametrize("sent", [0, 200, 512, 700, 1024, 10000])
def test_a_write_stores_exactly_what_was_sent_up_to_its_length(
    disk: Disk, cdb, opcode: int, sent: int
) -> None:
    """EDTL below or above the transfer length (RFC 7143 §11.4.5.2): bytes, not blocks, are counted."""
    put(disk, 0, b"\xff" * 4096)
    check(disk.run(cdb(opcode, 1, 2), b"\x11" * sent), GOOD)
    written = min(sent, 2 * BLOCK)
    expected = b"\xff" * 512 + b"\x11" * written
    assert stored(disk, 0, 4096) == expected.ljust(4096, b"\xff")


class Durability(Memory):
    """Notes what was asked to be durable."""

    def __init__(self) -> None:
        super().__init__(BLOCKS * BLOCK)
        self.durable: list[bool] = []
        self.flushed: list[tuple[int, int]] = []
        self.nowait = 0

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.nowait += 1
        return super().write_nowait(offset, data)

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        self.durable.append(durable)
        super().write(offset, data, durable=durable)

    def flush(self, offset: int = 0, length: int = 0) -> None:
        self.flushed.append((offset, length))


@pytest.mark.parametrize(
    ("cdb", "write_cache", "durable"),
    [
        (cdb10(0x2A, 0, 1), True, False),
        (cdb10(0x2A, 0, 1, 0x08), True, True),
        (cdb10(0x2A, 0, 1), False, True),
        (cdb16(0x8A, 0, 1, 0x18), True, True),
        (cdb6(0x0A, 0, 1), True, False),
        (cdb10(0x2E, 0, 1), True, True),
        (cdb16(0x8B, 0, 1), True, False),
        (cdb16(0x8B, 0, 1, 0x08), True, True),
        (write_atomic(0, 8), True, True),
    ],
)
def test_fua_and_wce_off_make_a_write_durable_before_it_is_answered(
    cdb: bytes, write_cache: bool, durable: bool
) -> None:
    """§4.15, §5.33 FUA; WRITE(6) has no FUA: its bit 3 of byte 1 belongs to the LBA."""
    backend = Durability()
    disk = Disk(backend=backend, write_cache=write_cache)
    check(disk.run(cdb, A * (8 if cdb[0] == 0x9C else 1)), GOOD)
    assert backend.durable[-1] is durable


def test_bit_3_of_a_6_byte_write_is_lba() -> None:
    """§5.32: LBA 80000h, not FUA."""
    backend = Durability()
    backend.resize(1 << 30)
    disk = Disk(backend=backend)
    check(disk.run(cdb6(0x0A, 0x080000, 1), A), GOOD)
    assert backend.nowait == 1
    assert bytes(backend.read(0x080000 * BLOCK, BLOCK)) == A


@pytest.mark.parametrize(
    "command", [cdb10(0x41, 0, 8), cdb16(0x93, 0, 8, 0x08), unmap((0, 8))], ids=["10", "16", "UNMAP"]
)
def test_wce_off_flushes_after_commands_that_have_no_fua(command: bytes | tuple[bytes, bytes]) -> None:
    """§6.5.5: WCE=0, status only after the medium has it."""
    backend = Durability()
    disk = Disk(backend=backend, write_cache=False)
    cdb, data = command if isinstance(command, tuple) else (command, A)
    check(disk.run(cdb, data), GOOD)
    assert backend.flushed


# -- VERIFY -------------------------------------------------------------------------------------------

BYTCHK_1, BYTCHK_2, BYTCHK_3 = 0x02, 0x04, 0x06


@pytest.mark.parametrize(
    ("flags", "data", "expected"),
    [
        (0, b"", GOOD),
        (0, b"not compared" * 100, GOOD),
        (BYTCHK_1, A + A, GOOD),
        (BYTCHK_1, A + B, MISCOMPARE),
        (BYTCHK_3, A, GOOD),
        (BYTCHK_3, B, MISCOMPARE),
        (BYTCHK_2, A, INVALID_FIELD_IN_CDB),
    ],
)
@pytest.mark.parametrize(("cdb", "opcode"), [(cdb10, 0x2F), (cdb12, 0xAF), (cdb16, 0x8F)])
def test_verify_compares_as_bytchk_says(
    disk: Disk, cdb, opcode: int, flags: int, data: bytes, expected
) -> None:
    """§5.29 table 108."""
    put(disk, 4, A + A)
    check(disk.run(cdb(opcode, 4, 2, flags), data), expected)


def test_verify_without_data_out_takes_none(disk: Disk) -> None:
    """BYTCHK 00b: "no data-out buffer transfer shall take place", whatever EDTL says."""
    assert disk.start(cdb10(0x2F, 0, 2), A).transfer_length == 0
    assert disk.start(cdb10(0x2F, 0, 2, BYTCHK_1), A + A).transfer_length == 2 * BLOCK
    assert disk.start(cdb10(0x2F, 0, 2, BYTCHK_3), A).transfer_length == BLOCK


# -- COMPARE AND WRITE, ORWRITE, WRITE ATOMIC ----------------------------------------------------------


def test_compare_and_write_writes_only_what_it_expected_to_replace(disk: Disk) -> None:
    """§5.2; the INFORMATION is the offset of the first byte that differs."""
    put(disk, 5, A)
    check(disk.run(compare_and_write(5, 1), A + B), GOOD)
    assert stored(disk, 5, BLOCK) == B
    for at in (0, 1, 255, 256, 511):
        wrong = bytearray(B)
        wrong[at] ^= 1
        outcome = disk.run(compare_and_write(5, 1), bytes(wrong) + A)
        check(outcome, MISCOMPARE)
        assert outcome.sense[0] & 0x80
        assert int.from_bytes(outcome.sense[3:7], "big") == at
    assert stored(disk, 5, BLOCK) == B


@pytest.mark.parametrize("flags", [0, 0x08])
def test_compare_and_write_waits_for_the_medium_where_it_must(flags: int) -> None:
    """A medium that cannot answer at once, or FUA, gives the same result by a worker."""

    class Cold(Memory):
        def copy_nowait(self, offset: int, length: int) -> Buffer | None:
            return None

    disk = Disk(backend=Cold(BLOCKS * BLOCK))
    check(disk.run(compare_and_write(5, 1, flags), bytes(BLOCK) + B), GOOD)
    check(disk.run(compare_and_write(5, 1, flags), bytes(BLOCK) + A), MISCOMPARE)
    assert stored(disk, 5, BLOCK) == B


@pytest.mark.parametrize("sent", [0, BLOCK, 2 * BLOCK - 1, 4 * BLOCK])
def test_compare_and_write_refuses_data_out_of_another_size(disk: Disk, sent: int) -> None:
    """Half of a compare is no compare."""
    check(disk.run(compare_and_write(0, 1), bytes(sent)), INVALID_FIELD_IN_CDB)


def test_orwrite_sets_bits_and_clears_none(disk: Disk) -> None:
    """§5.7."""
    put(disk, 0, b"\x0f" * BLOCK)
    check(disk.run(cdb16(0x8B, 0, 1), b"\x35" * BLOCK), GOOD)
    assert stored(disk, 0, BLOCK) == b"\x3f" * BLOCK


def test_write_atomic_writes_all_or_nothing(disk: Disk) -> None:
    """SBC-4 §5.48."""
    data = (A + B) * 4
    check(disk.run(write_atomic(8, 8), data), GOOD)
    assert stored(disk, 8, 8 * BLOCK) == data
    check(disk.run(write_atomic(8, 8), B), INVALID_INFORMATION_UNIT)
    assert stored(disk, 8, 8 * BLOCK) == data
    check(disk.run(write_atomic(BLOCKS - 1, MAXIMUM_ATOMIC_BLOCKS + 1), b""), LBA_OUT_OF_RANGE)


# -- WRITE SAME, UNMAP --------------------------------------------------------------------------------

UNMAP_BIT, NDOB = 0x08, 0x01


@pytest.mark.parametrize(("cdb", "opcode"), [(cdb10, 0x41), (cdb16, 0x93)])
@pytest.mark.parametrize("blocks", [1, 255, 256, 3000])
def test_write_same_repeats_its_block(disk: Disk, cdb, opcode: int, blocks: int) -> None:
    """§5.40, §5.41."""
    check(disk.run(cdb(opcode, 9, blocks), A), GOOD)
    assert stored(disk, 9, blocks * BLOCK) == A * blocks
    assert stored(disk, 8, BLOCK) == stored(disk, 9 + blocks, BLOCK) == bytes(BLOCK)


def test_write_same_of_zero_blocks_goes_to_the_end(disk: Disk) -> None:
    """WSNZ=0."""
    check(disk.run(cdb10(0x41, BLOCKS - 3, 0), A), GOOD)
    assert stored(disk, BLOCKS - 4, 4 * BLOCK) == bytes(BLOCK) + 3 * A


@pytest.mark.parametrize("cdb", [cdb10, cdb16])
def test_write_same_to_an_end_that_is_too_far_is_refused(cdb) -> None:
    """MAXIMUM WRITE SAME LENGTH counts the blocks, however they are said."""
    blocks = MAXIMUM_WRITE_SAME_BLOCKS + 10
    disk = Disk(backend=Memory(blocks * BLOCK))
    opcode = 0x41 if cdb is cdb10 else 0x93
    check(disk.run(cdb(opcode, 9, 0), A), INVALID_FIELD_IN_CDB)
    check(disk.run(cdb(opcode, 10, 0), A), GOOD)


def mapped(disk: Disk) -> list[tuple[int, int]]:
    runs = disk.backend.runs(0, BLOCKS * BLOCK)  # type: ignore[union-attr]
    return [(run.offset // BLOCK, run.length // BLOCK) for run in runs if run.mapped]


@pytest.mark.parametrize(
    ("flags", "data", "reads", "remains"),
    [
        (UNMAP_BIT, bytes(BLOCK), bytes(BLOCK), [(0, 8), (24, 8)]),
        (UNMAP_BIT | NDOB, b"", bytes(BLOCK), [(0, 8), (24, 8)]),
        (NDOB, b"", bytes(BLOCK), None),
        (0, bytes(BLOCK), bytes(BLOCK), None),
        (UNMAP_BIT, B, bytes(BLOCK), [(0, 8), (24, 8)]),
    ],
)
def test_write_same_gives_blocks_back_when_told_to_unmap(
    disk: Disk, flags: int, data: bytes, reads: bytes, remains: list[tuple[int, int]] | None
) -> None:
    """§5.41; the Data-Out does not matter with UNMAP, as with other targets."""
    put(disk, 0, A * 32)
    check(disk.run(cdb16(0x93, 8, 16, flags), data), GOOD)
    assert stored(disk, 7, 18 * BLOCK) == A + reads * 16 + A
    if remains is not None:
        assert mapped(disk) == remains


@pytest.mark.parametrize("sent", [0, BLOCK // 2, 2 * BLOCK])
@pytest.mark.parametrize("cdb", [cdb10(0x41, 0, 8), cdb16(0x93, 0, 8)])
def test_write_same_refuses_data_out_that_is_not_one_block(disk: Disk, cdb: bytes, sent: int) -> None:
    """Nothing is written then."""
    check(disk.run(cdb, b"x" * sent), INVALID_INFORMATION_UNIT)
    assert mapped(disk) == []


@pytest.mark.parametrize("flags", [0x10, 0x18])
def test_write_same_has_no_anchored_state(disk: Disk, flags: int) -> None:
    """ANC_SUP=0 (§6.6.4): ANCHOR is refused with and without UNMAP."""
    check(disk.run(cdb16(0x93, 0, 8, flags), bytes(BLOCK)), INVALID_FIELD_IN_CDB)


def test_write_same_cannot_unmap_what_is_not_thin() -> None:
    """LBPWS=0."""
    outcome = Disk(thin=False).run(cdb16(0x93, 0, 8, UNMAP_BIT), bytes(BLOCK))
    check(outcome, INVALID_FIELD_IN_CDB)
    assert pointer_of(outcome) == (1, 3, True)


@pytest.mark.parametrize(
    ("ranges", "zeroed", "remains"),
    [
        ([(8, 8)], [(8, 8)], [(0, 8), (16, 48)]),
        ([(3, 1)], [(3, 1)], [(0, 64)]),
        ([(3, 20)], [(3, 20)], [(0, 8), (16, 48)]),
        ([(8, 8), (8, 8), (12, 8)], [(8, 12)], [(0, 8), (16, 48)]),
        ([(lba, 1) for lba in range(15, 7, -1)], [(8, 8)], [(0, 8), (16, 48)]),
        ([(0, 0), (BLOCKS, 0)], [], [(0, 64)]),
        ([], [], [(0, 64)]),
    ],
    ids=["aligned", "too small", "ragged", "overlapping", "neighbours", "no blocks", "no descriptors"],
)
def test_unmap_zeroes_all_and_gives_back_whole_granules(
    disk: Disk, ranges: list[tuple[int, int]], zeroed: list[tuple[int, int]], remains: list[tuple[int, int]]
) -> None:
    """§5.28 with LBPRZ=1: every block named reads as zeros at once, single ones too."""
    put(disk, 0, A * 64)
    check(disk.run(*unmap(*ranges)), GOOD)
    expected = [A] * 64
    for lba, blocks in zeroed:
        expected[lba : lba + blocks] = [bytes(BLOCK)] * blocks
    assert stored(disk, 0, 64 * BLOCK) == b"".join(expected)
    assert mapped(disk) == remains


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (unmap((0, 8), (BLOCKS - 1, 2)), LBA_OUT_OF_RANGE),
        (unmap((0, 8), ((1 << 64) - 1, 0)), LBA_OUT_OF_RANGE),
        (unmap(*[(0, 1)] * (MAXIMUM_UNMAP_DESCRIPTORS + 1)), INVALID_FIELD_IN_PARAMETER_LIST),
        (unmap(*[(0, 1)] * MAXIMUM_UNMAP_DESCRIPTORS), GOOD),
        (unmap(*[(0, BLOCKS)] * (MAXIMUM_UNMAP_BLOCKS // BLOCKS + 1)), INVALID_FIELD_IN_PARAMETER_LIST),
        (unmap((0, 8), cut=7), PARAMETER_LIST_LENGTH_ERROR),
        (unmap((0, 8), cut=0), GOOD),
        (unmap((16, 8), (0, 8), cut=39), GOOD),
    ],
    ids=["beyond", "far", "descriptors", "most", "blocks", "header", "nothing", "truncated"],
)
def test_unmap_checks_its_whole_list_before_it_acts(
    disk: Disk, command: tuple[bytes, bytes], expected
) -> None:
    """§5.28.2; a truncated descriptor is ignored, the rest is done."""
    put(disk, 0, A * 64)
    check(disk.run(*command), expected)
    if expected != GOOD:
        assert mapped(disk) == [(0, 64)]


# -- caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cdb", "opcode"), [(cdb10, 0x35), (cdb16, 0x91)])
def test_synchronize_cache_ends_when_the_medium_has_it_or_at_once_with_immed(cdb, opcode: int) -> None:
    """§5.26: IMMED returns status when the CDB has been validated."""
    backend, lane = Durability(), HeldLane()
    disk = Disk(backend=backend, lane=lane)
    waits = disk.start(cdb(opcode, 8, 8))
    assert waits not in disk.delivered
    check(disk.run(cdb(opcode, 0, 0, 0x02)), GOOD)
    lane.release()
    check(disk.delivered[waits], GOOD)
    assert backend.flushed == [(8 * BLOCK, 8 * BLOCK), (0, BLOCKS * BLOCK)]


@pytest.mark.parametrize("flags", [0, 0x02])
def test_prefetch_says_condition_met_only_if_all_of_it_is_there(flags: int) -> None:
    """§5.8."""
    disk = Disk(backend=Memory(64 << 20))
    check(disk.run(cdb10(0x34, 0, 256, flags)), ScsiStatus.CONDITION_MET)
    check(disk.run(cdb10(0x34, 0, 0, flags)), GOOD)


# -- what the medium is like --------------------------------------------------------------------------


def lba_status(disk: Disk, lba: int, allocation: int = 512) -> list[tuple[int, int, int]]:
    cdb = b"\x9e\x12" + lba.to_bytes(8, "big") + allocation.to_bytes(4, "big") + b"\0\0"
    data = disk.read(cdb)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    return [
        (
            int.from_bytes(data[at : at + 8], "big"),
            int.from_bytes(data[at + 8 : at + 12], "big"),
            data[at + 12],
        )
        for at in range(8, len(data), 16)
    ]


def test_get_lba_status_reports_coalesced_runs_from_the_lba_asked_for(disk: Disk) -> None:
    """§5.5: 0 mapped, 1 deallocated."""
    put(disk, 8, A * 8)
    put(disk, 16, A * 8)
    assert lba_status(disk, 0) == [(0, 8, 1), (8, 16, 0), (24, BLOCKS - 24, 1)]
    assert lba_status(disk, 13) == [(13, 11, 0), (24, BLOCKS - 24, 1)]
    assert lba_status(disk, BLOCKS - 1) == [(BLOCKS - 1, 1, 1)]
    assert lba_status(disk, 0, allocation=24) == [(0, 8, 1)]
    assert lba_status(disk, 0, allocation=40) == [(0, 8, 1), (8, 16, 0)]


def test_get_lba_status_takes_a_block_for_mapped_if_any_of_it_is() -> None:
    """Blocks larger than the granularity of the medium."""
    disk = Disk(backend=Memory(1 << 20), block_size=8192)
    disk.backend.write(4096 * 5, b"x")  # type: ignore[union-attr]
    assert lba_status(disk, 0) == [(0, 2, 1), (2, 1, 0), (3, 125, 1)]


def test_get_lba_status_of_a_thick_unit_is_all_mapped() -> None:
    """§4.7.2."""
    assert lba_status(Disk(thin=False), 0) == [(0, BLOCKS, 0)]


@pytest.mark.parametrize("lba", [BLOCKS, BLOCKS + 1, 1 << 63, (1 << 64) - 1])
def test_get_lba_status_begins_at_a_block_that_exists(disk: Disk, lba: int) -> None:
    """§5.5.1."""
    check(disk.run(b"\x9e\x12" + lba.to_bytes(8, "big") + b"\0\0\0\xff\0\0"), LBA_OUT_OF_RANGE)


def test_get_lba_status_splits_runs_beyond_32_bits() -> None:
    """NUMBER OF LOGICAL BLOCKS is 32 bits."""
    blocks = (1 << 33) + 5
    disk = Disk(backend=Memory(blocks * BLOCK))
    most = 0xFFFFFFFF
    assert lba_status(disk, 0) == [(0, most, 1), (most, most, 1), (2 * most, blocks - 2 * most, 1)]


@pytest.mark.parametrize(
    ("blocks", "last10"), [(BLOCKS, BLOCKS - 1), (1 << 32, 0xFFFFFFFF), (1 << 33, 0xFFFFFFFF)]
)
def test_read_capacity_tells_the_last_block(blocks: int, last10: int) -> None:
    """§5.15: FFFFFFFFh sends the initiator to READ CAPACITY(16)."""
    disk = Disk(backend=Memory(blocks * BLOCK))
    assert disk.read("25" + "00" * 9) == last10.to_bytes(4, "big") + BLOCK.to_bytes(4, "big")
    data = disk.read("9e10" + "00" * 8 + "00000020" + "0000")
    assert data[:12] == (blocks - 1).to_bytes(8, "big") + BLOCK.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "0003c000"), ({"thin": False}, "00030000"), ({"physical_block_exponent": 0}, "0000c000")],
)
def test_read_capacity_16_reports_provisioning_and_physical_blocks(config: dict, expected: str) -> None:
    """§5.16.2: no protection; LBPPBE; LBPME and LBPRZ."""
    assert Disk(**config).read("9e10" + "00" * 8 + "00000020" + "0000")[12:16].hex() == expected


@pytest.mark.parametrize("allocation", range(34))
def test_read_capacity_16_is_cut_to_its_allocation_length(disk: Disk, allocation: int) -> None:
    """SPC-4 §4.2.5.6."""
    data = disk.read(bytes.fromhex("9e10" + "00" * 8) + allocation.to_bytes(4, "big") + b"\0\0")
    assert len(data) == min(32, allocation)


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [("37001800000000002000", "00180000"), ("b71800000000000000200000", "0018" + "00" * 6)],
)
def test_read_defect_data_has_empty_lists(disk: Disk, cdb: str, expected: str) -> None:
    """§5.17, §5.18."""
    assert disk.read(cdb).hex() == expected


@pytest.mark.parametrize("read", [cdb6(0x08, 0, 1), cdb10(0x28, 0, 1), cdb16(0x88, 0, 1)])
def test_a_read_that_would_wait_goes_to_a_worker(read: bytes) -> None:
    """A slow medium never holds the event loop."""

    class Cold(Memory):
        def read_nowait(self, offset: int, length: int) -> Buffer | None:
            return None

    lane = HeldLane()
    disk = Disk(backend=Cold(BLOCKS * BLOCK), lane=lane)
    put(disk, 0, A)
    request = disk.start(read)
    assert request not in disk.delivered
    lane.release()
    assert bytes(disk.delivered[request].data_in) == A


def test_a_medium_that_went_away_is_not_ready() -> None:
    """Admitted while it was there, run when it is gone: 3Ah/00h."""
    lane = HeldLane()
    disk = Disk(lane=lane)
    request = disk.start(cdb10(0x2F, 0, 1))
    disk.unit.backend = None
    lane.release()
    check(disk.delivered[request], triple(Sense.MEDIUM_NOT_PRESENT))


@pytest.mark.parametrize(
    ("offset", "length", "chunk", "expected"),
    [
        (0, 0, 8, []),
        (3, 2, 8, [(3, 2)]),
        (3, 13, 8, [(3, 5), (8, 8)]),
        (8, 17, 8, [(8, 8), (16, 8), (24, 1)]),
    ],
)
def test_pieces_are_cut_at_multiples(offset: int, length: int, chunk: int, expected: list) -> None:
    """So that aligned granules stay whole."""
    assert list(pieces(offset, length, chunk)) == expected
