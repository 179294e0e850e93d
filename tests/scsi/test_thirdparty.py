"""EXTENDED COPY, ODX tokens and what can be asked about them (SPC-4 r37 §6.4 to 6.23, SBC-3 r36 §5.10)."""

from dataclasses import replace
from typing import Any

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi import copymanager
from protocol.scsi.device import LogicalUnit, Target
from protocol.scsi.odx import MAXIMUM_RANGES, TOKEN_BYTES
from protocol.scsi.request import Outcome, Request
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import Sense, SenseKey
from protocol.scsi.thirdparty import (
    MAXIMUM_CSCD_DESCRIPTORS,
    MAXIMUM_DESCRIPTOR_LIST_BYTES,
    MAXIMUM_SEGMENT_BYTES,
    MAXIMUM_SEGMENT_DESCRIPTORS,
)
from storage.base import Backend
from storage.memory import Memory
from tests.scsi.support import (
    BLOCK,
    BLOCKS,
    TARGET,
    Disk,
    HeldLane,
    describe,
    make_config,
    make_nexus,
    pointer_of,
    sense_of,
    triple,
)

GOOD = ScsiStatus.GOOD
A, B = b"\xa5" * BLOCK, b"\x5a" * BLOCK
NAA_1, NAA_2, NAA_3 = (f"0x6589cfc00000{n:020x}" for n in (1, 2, 3))
LENGTH_ERROR = triple(Sense.PARAMETER_LIST_LENGTH_ERROR)
INVALID_FIELD = triple(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
UNREACHABLE = triple(Sense.UNREACHABLE_COPY_TARGET)


class Pair(Disk):
    """Two units of one target, a third in another; time that a test can move."""

    def __init__(self, **second: Any) -> None:
        super().__init__(naa=NAA_1, lane=second.pop("lane", None))
        self.time = 1000.0
        self.unit.now = lambda: self.time
        self.other = self.make(NAA_2, **second)
        self.foreign = self.make(NAA_3)
        self.target.replace_luns({0: self.unit, 1: self.other})
        Target("iqn.other", {0: self.foreign}, lane=self.lane, now=self.unit.now)  # type: ignore[arg-type]
        self.other.attentions.forget(self.nexus)
        self.unit.attentions.forget(self.nexus)

    def make(self, naa: str, **config: Any) -> LogicalUnit:
        unit = LogicalUnit(
            make_config(naa=naa, **config),
            Memory(BLOCKS * BLOCK),
            self.lane,  # type: ignore[arg-type]
            reservations=Reservations(),
            now=self.unit.now,
        )
        unit.deliver = self.delivered.__setitem__
        return unit

    def run_other(self, cdb: bytes | str, data: bytes = b"") -> Outcome:
        """A command to the second unit."""
        request = self.request(cdb, data)
        outcome = self.other.admit(request) or self.other.submit(request)
        return outcome if outcome is not None else self.delivered[request]


def medium(unit: LogicalUnit) -> Backend:
    assert unit.backend is not None
    return unit.backend


# -- EXTENDED COPY ------------------------------------------------------------------------------------


def cscd(naa: str, *, kind: int = 0xE4, second: int = 0) -> bytes:
    designator = bytes.fromhex(naa[2:])
    body = bytes((1, 3, 0, len(designator))) + designator.ljust(20, b"\0")
    return bytes((kind, second, 0, 0)) + body + b"\0" + BLOCK.to_bytes(3, "big")


def blocks(source: int, destination: int, count: int, from_lba: int, to_lba: int, flags: int = 0) -> bytes:
    """Segment descriptor 02h."""
    head = bytes((0x02, flags, 0, 0x18)) + source.to_bytes(2, "big") + destination.to_bytes(2, "big")
    return head + b"\0\0" + count.to_bytes(2, "big") + from_lba.to_bytes(8, "big") + to_lba.to_bytes(8, "big")


def offset_bytes(
    source: int, destination: int, count: int, at: tuple[int, int], to: tuple[int, int]
) -> bytes:
    """Segment descriptor 0Ah; ``at`` and ``to`` are (LBA, byte)."""
    head = bytes((0x0A, 0, 0, 0x1C)) + source.to_bytes(2, "big") + destination.to_bytes(2, "big")
    lbas = at[0].to_bytes(8, "big") + to[0].to_bytes(8, "big")
    return head + count.to_bytes(4, "big") + lbas + at[1].to_bytes(2, "big") + to[1].to_bytes(2, "big")


def copy(
    cscds: list[bytes],
    segments: list[bytes],
    *,
    list_id: int = 1,
    usage: int = 0,
    inline: int = 0,
    cut: int | None = None,
) -> tuple[bytes, bytes]:
    targets, parts = b"".join(cscds), b"".join(segments)
    data = bytes((list_id, usage << 3)) + len(targets).to_bytes(2, "big") + bytes(4)
    data += len(parts).to_bytes(4, "big") + inline.to_bytes(4, "big") + targets + parts
    data = data[:cut]
    return bytes((0x83, 0)) + bytes(8) + len(data).to_bytes(4, "big") + bytes(2), data


def test_blocks_are_copied_within_a_unit_and_to_another_one_that_the_nexus_sees() -> None:
    """Segment 02h (§6.6.6.3)."""
    pair = Pair()
    medium(pair.unit).write(4 * BLOCK, A + B)
    segments = [blocks(0, 0, 2, 4, 100), blocks(0, 1, 2, 4, 7)]
    assert pair.run(*copy([cscd(NAA_1), cscd(NAA_2)], segments)).status == GOOD
    assert medium(pair.unit).read(100 * BLOCK, 2 * BLOCK) == A + B
    assert medium(pair.other).read(7 * BLOCK, 2 * BLOCK) == A + B


def test_the_commanded_unit_need_be_neither_source_nor_destination() -> None:
    """The copy manager of any unit copies between those it reaches."""
    pair = Pair()
    medium(pair.other).write(0, A)
    assert pair.run(*copy([cscd(NAA_2)], [blocks(0, 0, 1, 0, 1)])).status == GOOD
    assert medium(pair.other).read(BLOCK, BLOCK) == A


@pytest.mark.parametrize(("flags", "copied"), [(0, 2 * BLOCK), (0x02, 2 * 4096)])
def test_dc_says_whose_blocks_are_counted(flags: int, copied: int) -> None:
    """§6.6.6.3."""
    pair = Pair(block_size=4096)
    medium(pair.unit).write(0, A * 64)
    assert pair.run(*copy([cscd(NAA_1), cscd(NAA_2)], [blocks(0, 1, 2, 0, 0, flags)])).status == GOOD
    assert medium(pair.other).read(0, 8 * 4096) == (A * 64)[:copied].ljust(8 * 4096, b"\0")


def test_bytes_are_copied_from_and_to_the_middle_of_blocks() -> None:
    """Segment 0Ah (§6.6.6.12)."""
    pair = Pair()
    medium(pair.unit).write(BLOCK, bytes(range(256)) * 4)
    segment = offset_bytes(0, 1, 700, (1, 10), (2, 3))
    assert pair.run(*copy([cscd(NAA_1), cscd(NAA_2)], [segment])).status == GOOD
    assert medium(pair.other).read(2 * BLOCK, 1024) == bytes(3) + (bytes(range(256)) * 4)[10:710] + bytes(321)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (copy([cscd(NAA_1)], [], cut=0), (0, 0, 0)),
        (copy([cscd(NAA_1)], [], cut=15), LENGTH_ERROR),
        (copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1)], cut=16), LENGTH_ERROR),
        (copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1)], cut=-1), LENGTH_ERROR),
        (copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1)[:27]]), LENGTH_ERROR),
        (copy([cscd(NAA_1)[:31]], []), LENGTH_ERROR),
        (copy([cscd(NAA_1)], [], inline=4), triple(Sense.INLINE_DATA_LENGTH_EXCEEDED)),
        (
            copy([cscd(NAA_1)] * (MAXIMUM_CSCD_DESCRIPTORS + 1), [blocks(0, 0, 1, 0, 1)]),
            triple(Sense.TOO_MANY_TARGET_DESCRIPTORS),
        ),
        (
            copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1)] * (MAXIMUM_SEGMENT_DESCRIPTORS + 1)),
            triple(Sense.TOO_MANY_SEGMENT_DESCRIPTORS),
        ),
        (
            copy(
                [cscd(NAA_1)] * (MAXIMUM_CSCD_DESCRIPTORS + 1),
                [blocks(0, 0, 1, 0, 1)] * (MAXIMUM_SEGMENT_DESCRIPTORS + 1),
            ),
            LENGTH_ERROR,
        ),
        (copy([cscd(NAA_1, kind=0xE0)], []), triple(Sense.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE)),
        (copy([cscd(NAA_1)], [b"\x03" + bytes(27)]), triple(Sense.UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE)),
        (copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1)[:3] + b"\x17" + bytes(24)]), INVALID_FIELD),
        (copy([cscd(NAA_1)], [offset_bytes(0, 0, MAXIMUM_SEGMENT_BYTES + 1, (0, 0), (0, 0))]), INVALID_FIELD),
        (copy([cscd(NAA_1)], [blocks(0, 1, 1, 0, 1)]), UNREACHABLE),
        (copy([cscd(NAA_1)], [blocks(7, 0, 1, 0, 1)]), UNREACHABLE),
        (copy([cscd(NAA_3)], [blocks(0, 0, 1, 0, 1)]), UNREACHABLE),
        (
            copy([cscd(NAA_1, second=0x20)], [blocks(0, 0, 1, 0, 1)]),
            triple(Sense.COPY_TARGET_DEVICE_NOT_REACHABLE),
        ),
        (
            copy([cscd(NAA_1, second=0x01)], [blocks(0, 0, 1, 0, 1)]),
            triple(Sense.INCORRECT_COPY_TARGET_DEVICE_TYPE),
        ),
        (
            copy([cscd(NAA_1)], [blocks(0, 0, 2, BLOCKS - 1, 0)]),
            triple(Sense.COPY_ABORTED_NO_ADDITIONAL_SENSE),
        ),
        (
            copy([cscd(NAA_1)], [blocks(0, 0, 2, 0, (1 << 64) - 1)]),
            triple(Sense.COPY_ABORTED_NO_ADDITIONAL_SENSE),
        ),
        (copy([cscd(NAA_1, second=0xC0)], [blocks(0, 0, 1, 0, 1)]), (0, 0, 0)),
    ],
    ids=[
        "no list", "part of a header", "header only", "one byte short", "segment cut", "cscd cut", "inline",
        "cscds", "segments", "list", "cscd type", "segment type", "segment length", "segment size",
        "destination index", "source index", "not seen", "null", "tape", "source end", "destination end",
        "lu id type 3",
    ],
)  # fmt: skip
def test_parameter_lists_are_judged_before_a_byte_moves(
    command: tuple[bytes, bytes], expected: tuple[int, int, int]
) -> None:
    """§6.4.3; unit 3 belongs to another target, so it is not there for this nexus."""
    pair = Pair()
    medium(pair.unit).write(0, A)
    outcome = pair.run(*command)
    assert sense_of(outcome) == expected, describe(outcome)
    if expected != (0, 0, 0):
        assert medium(pair.unit).read(BLOCK, BLOCKS * BLOCK - BLOCK) == bytes(BLOCKS * BLOCK - BLOCK)


def test_a_bad_segment_behind_good_ones_stops_them_all() -> None:
    pair = Pair()
    medium(pair.unit).write(0, A)
    outcome = pair.run(*copy([cscd(NAA_1)], [blocks(0, 0, 1, 0, 1), blocks(0, 0, 1, BLOCKS, 2)]))
    assert sense_of(outcome)[0] == SenseKey.COPY_ABORTED
    assert pointer_of(outcome)[0] == 12
    assert medium(pair.unit).read(BLOCK, BLOCK) == bytes(BLOCK)


def test_reservations_and_write_protection_of_the_destination_hold() -> None:
    """§5.17.4: as if the nexus wrote there by itself."""
    pair = Pair(read_only=True)
    command = copy([cscd(NAA_1), cscd(NAA_2)], [blocks(0, 1, 1, 0, 0)])
    assert sense_of(pair.run(*command)) == triple(Sense.WRITE_PROTECTED)
    pair = Pair()
    holder = make_nexus(2)
    pair.target.attach(holder)
    pair.other.attentions.forget(holder)
    reserve = pair.request("160000000000", nexus=holder)
    assert pair.other.admit(reserve) is None
    pair.other.submit(reserve)
    assert pair.run(*command).status == ScsiStatus.RESERVATION_CONFLICT
    assert pair.run(*command).status == ScsiStatus.RESERVATION_CONFLICT, "its list identifier is free again"
    pair.target.detach(holder)
    assert pair.run(*command).status == GOOD


def test_a_failing_medium_ends_the_copy_with_its_own_sense() -> None:
    pair = Pair()

    class Full(Memory):
        def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

    pair.other.backend = Full(BLOCKS * BLOCK)
    outcome = pair.run(*copy([cscd(NAA_1), cscd(NAA_2)], [blocks(0, 1, 1, 0, 0)]))
    assert sense_of(outcome) == triple(Sense.SPACE_ALLOCATION_FAILED)


# -- a copy is a writer of its destination ------------------------------------------------------------

COMPARE_AND_WRITE = "89 00 0000000000000005 000000 01 00 00"


def by_extended_copy(pair: Pair) -> tuple[bytes, bytes]:
    """Blocks 0 to 7 of the first unit to the same place of the second, by the first."""
    return copy([cscd(NAA_1), cscd(NAA_2)], [blocks(0, 1, 8, 0, 0)])


def start_other(pair: Pair, cdb: bytes | str, data: bytes = b"") -> Request:
    """A command to the second unit, to its end if that comes."""
    request = pair.request(cdb, data)
    outcome = pair.other.admit(request) or pair.other.submit(request)
    if outcome is not None:
        pair.delivered[request] = outcome
    return request


def test_what_a_copy_wrote_its_destination_can_lose() -> None:
    """SPC-4 §4.5.7: a deferred error, as for a WRITE; the source has lost nothing."""
    pair = Pair()
    assert pair.run(*by_extended_copy(pair)).status == GOOD
    for unit in (pair.unit, pair.other):
        medium(unit).lost_writes += 1
        unit.note_lost_writes()
    assert sense_of(pair.run_other("00" * 6)) == triple(Sense.WRITE_ERROR)
    assert pair.run("00" * 6).status == GOOD


@pytest.fixture
def held() -> tuple[Pair, HeldLane]:
    """A pair whose copies have not begun when a command to copy has."""
    lane = HeldLane()
    pair = Pair(lane=lane)
    medium(pair.unit).write(0, A * 8)
    medium(pair.other).write(0, B * 8)
    pair.other.set_mode(replace(pair.other.mode, write_cache=False))  # so that what it does goes to the lane
    return pair, lane


def test_a_later_write_cannot_be_overwritten_by_an_aborted_copy(held: tuple[Pair, HeldLane]) -> None:
    """The abort is done at once; the thread may be in the middle of a piece, and nobody may pass it there."""
    pair, lane = held
    request = pair.start(*by_extended_copy(pair))
    assert pair.unit.abort(request)
    later = start_other(pair, "2A 00 00000005 00 0001 00", B)
    elsewhere = start_other(pair, "2A 00 00000009 00 0001 00", B)
    assert len(lane.jobs) == 2, "the copy and elsewhere"
    lane.release(1)
    assert later not in pair.delivered
    lane.release()
    assert pair.delivered[later].status == pair.delivered[elsewhere].status == GOOD
    assert medium(pair.other).read(5 * BLOCK, BLOCK) == B
    assert not pair.unit.tasks and not pair.other.tasks
    assert pair.other.write_at_once(0x2A, 0, 1, A, pair.nexus) is False, "WCE is off"
    pair.other.set_mode(replace(pair.other.mode, write_cache=True))
    assert pair.other.write_at_once(0x2A, 0, 1, A, pair.nexus), "nothing is left of it"


@pytest.mark.parametrize("first", ["copy", "compare and write"])
def test_a_copy_and_a_compare_and_write_never_meet_on_a_block(
    held: tuple[Pair, HeldLane], first: str
) -> None:
    """SBC-3 §5.2: what is compared is what is replaced, whoever writes; commands elsewhere go on."""
    pair, lane = held
    if first == "copy":
        copying = pair.start(*by_extended_copy(pair))
        exclusive = start_other(pair, COMPARE_AND_WRITE, A + bytes(BLOCK))
    else:
        exclusive = start_other(pair, COMPARE_AND_WRITE, B + bytes(BLOCK))
        copying = pair.start(*by_extended_copy(pair))
    start_other(pair, "2A 00 00000009 00 0001 00", B)
    assert len(lane.jobs) == 2, "the first and the one elsewhere"
    lane.release(1)
    lane.release()
    lane.release()
    assert pair.delivered[copying].status == pair.delivered[exclusive].status == GOOD
    assert medium(pair.other).read(5 * BLOCK, BLOCK) == (bytes(BLOCK) if first == "copy" else A)


def test_a_copy_that_waits_can_be_aborted(held: tuple[Pair, HeldLane]) -> None:
    pair, lane = held
    exclusive = start_other(pair, COMPARE_AND_WRITE, B + A)
    copying = pair.start(*by_extended_copy(pair))
    assert pair.unit.abort(copying)
    second = start_other(pair, COMPARE_AND_WRITE, A + B)
    lane.release(1)
    lane.release()
    lane.release()
    assert pair.delivered[exclusive].status == pair.delivered[second].status == GOOD
    assert copying not in pair.delivered
    assert medium(pair.other).read(0, 8 * BLOCK) == B * 8


def test_a_medium_is_not_sanitized_under_a_copy_to_it(held: tuple[Pair, HeldLane]) -> None:
    """SBC-3 §4.11.2: nothing that was on it before is on it afterwards."""
    pair, lane = held
    pair.start(*by_extended_copy(pair))
    erase = start_other(pair, "4802 0000000000 0000 00")
    assert len(lane.jobs) == 1, "the copy"
    while lane.jobs:
        lane.release(1)
    assert pair.delivered[erase].status == GOOD
    assert medium(pair.other).read(0, 8 * BLOCK) == bytes(8 * BLOCK)


def test_a_snapshot_waits_for_a_copy_to_it(held: tuple[Pair, HeldLane]) -> None:
    pair, lane = held
    pair.start(*by_extended_copy(pair))
    begun: list[bool] = []
    pause = pair.other.hold_still(lambda: begun.append(True))
    second = pair.start(*copy([cscd(NAA_1), cscd(NAA_2)], [blocks(0, 1, 1, 0, 100)], list_id=2))
    assert not begun
    lane.release()
    assert begun == [True]
    assert second not in pair.delivered
    pair.other.go_on(pause)
    lane.release()
    assert pair.delivered[second].status == GOOD


def test_an_immediate_token_copy_is_a_writer_although_its_command_has_ended(
    held: tuple[Pair, HeldLane],
) -> None:
    pair, lane = held
    token = make_token(pair, (0, 8))
    assert pair.delivered[start_other(pair, *write_using(token, (0, 8), flags=0x01))].status == GOOD
    exclusive = start_other(pair, COMPARE_AND_WRITE, A + bytes(BLOCK))
    assert len(lane.jobs) == 1
    lane.release()
    lane.release()
    assert pair.delivered[exclusive].status == GOOD


@pytest.mark.parametrize(("source", "destination"), [(0, 3), (3, 0), (0, 0)])
def test_ranges_that_overlap_are_copied_as_if_read_first(
    monkeypatch: pytest.MonkeyPatch, source: int, destination: int
) -> None:
    """Also where they are farther apart than what is copied between two looks for an abort."""
    monkeypatch.setattr(copymanager, "CHUNK_BYTES", 2 * BLOCK)
    pair = Pair()
    image = b"".join(bytes((n,)) * BLOCK for n in range(1, 16))
    medium(pair.unit).write(0, image)
    command = copy([cscd(NAA_1)], [blocks(0, 0, 9, source, destination)])
    assert pair.run(*command).status == GOOD
    found = medium(pair.unit).read(destination * BLOCK, 9 * BLOCK)
    assert found == image[source * BLOCK : (source + 9) * BLOCK]


# -- RECEIVE COPY RESULTS -----------------------------------------------------------------------------


def results(action: int, list_id: int = 0, allocation: int = 1024) -> bytes:
    return bytes((0x84, action, list_id)) + bytes(7) + allocation.to_bytes(4, "big") + bytes(2)


def test_copy_status_tells_of_a_copy_by_its_list_identifier() -> None:
    """§6.18: 0 under way, 1 done, 2 done with errors; an unknown identifier is INVALID FIELD IN CDB."""
    lane = HeldLane()
    pair = Pair(lane=lane)
    assert sense_of(pair.run(results(0, 1))) == triple(Sense.INVALID_FIELD_IN_CDB)
    pair.start(*copy([cscd(NAA_1)], [blocks(0, 0, 8, 0, 8)], list_id=1))
    assert pair.read(results(0, 1))[4] == 0
    again = pair.run(*copy([cscd(NAA_1)], [blocks(0, 0, 8, 0, 8)], list_id=1))
    assert sense_of(again) == triple(Sense.LIST_IDENTIFIER_IN_USE)
    lane.release()
    data = pair.read(results(0, 1))
    assert data == bytes((0, 0, 0, 8, 1, 0, 1, 0)) + (8 * BLOCK).to_bytes(4, "big")
    pair.run(*copy([cscd(NAA_1)], [blocks(0, 5, 8, 0, 8)], list_id=2))
    assert pair.read(results(0, 2))[4] == 2
    pair.start(*copy([cscd(NAA_1)], [blocks(0, 0, 8, 0, 8)], list_id=9, usage=3))
    lane.release()
    assert sense_of(pair.run(results(0, 9))) == triple(Sense.INVALID_FIELD_IN_CDB)


def test_copies_of_one_size_end_in_any_order() -> None:
    """Each is an account of its own, also while they have come equally far."""
    lane = HeldLane()
    pair = Pair(lane=lane)
    copies = [
        pair.start(*copy([cscd(NAA_1)], [blocks(0, 0, 8, 0, 8 * number)], list_id=number))
        for number in (1, 2)
    ]
    ended = [(done, work()) for work, done in lane.jobs]
    for done, outcome in reversed(ended):
        done(outcome)
    assert [pair.delivered[request].status for request in copies] == [GOOD, GOOD]
    assert [pair.read(results(0, number))[4] for number in (1, 2)] == [1, 1]


def test_operating_parameters_name_the_limits_that_are_checked() -> None:
    """§6.19."""
    data = Pair().read(results(3))
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert int.from_bytes(data[8:10], "big") == MAXIMUM_CSCD_DESCRIPTORS
    assert int.from_bytes(data[10:12], "big") == MAXIMUM_SEGMENT_DESCRIPTORS
    assert int.from_bytes(data[12:16], "big") == MAXIMUM_DESCRIPTOR_LIST_BYTES
    assert int.from_bytes(data[16:20], "big") == MAXIMUM_SEGMENT_BYTES
    assert data[43] == 3
    assert data[44:] == b"\x02\x0a\xe4"


def test_the_limits_can_be_told_from_one_another() -> None:
    """One list over its maximum fits beside one of the other; both over do not."""
    targets, segments = MAXIMUM_CSCD_DESCRIPTORS, MAXIMUM_SEGMENT_DESCRIPTORS
    assert (targets + 1) * 32 + 28 < MAXIMUM_DESCRIPTOR_LIST_BYTES
    assert 32 + (segments + 1) * 28 < MAXIMUM_DESCRIPTOR_LIST_BYTES
    assert (targets + 1) * 32 + (segments + 1) * 28 > MAXIMUM_DESCRIPTOR_LIST_BYTES


def test_vpd_8f_lists_what_there_is() -> None:
    """§7.8.17: descriptors of even length, commands with their service actions."""
    data = Pair().read("12018f100000")
    assert int.from_bytes(data[2:4], "big") == len(data) - 4
    found, at = {}, 4
    while at < len(data):
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        assert size % 4 == 0
        found[int.from_bytes(data[at : at + 2], "big")] = data[at + 4 : at + 4 + size]
        at += 4 + size
    assert list(found) == [0x0000, 0x0001, 0x0004, 0x0008, 0x0106, 0x0108, 0x8001]
    assert found[0x0001].startswith(bytes.fromhex("0a8303001011840300 0307"))
    assert found[0x0008].startswith(b"\x03\x02\x0a\xe4")
    assert len(found[0x0000]) == len(found[0x8001]) == 0x20


# -- tokens -------------------------------------------------------------------------------------------


def ranges(*of: tuple[int, int]) -> bytes:
    body = b"".join(lba.to_bytes(8, "big") + count.to_bytes(4, "big") + bytes(4) for lba, count in of)
    return len(body).to_bytes(2, "big") + body


def token_command(action: int, data: bytes, list_id: int) -> tuple[bytes, bytes]:
    data = (len(data)).to_bytes(2, "big") + data
    cdb = bytes((0x83, action, 0, 0, 0, 0)) + list_id.to_bytes(4, "big") + len(data).to_bytes(4, "big")
    return cdb + bytes(2), data


def populate(*of: tuple[int, int], timeout: int = 0, kind: int | None = None, list_id: int = 1):
    head = bytes((0x02 if kind is not None else 0, 0)) + timeout.to_bytes(4, "big")
    return token_command(0x10, head + (kind or 0).to_bytes(4, "big") + bytes(2) + ranges(*of), list_id)


def write_using(token: bytes, *of: tuple[int, int], offset: int = 0, flags: int = 0, list_id: int = 2):
    head = bytes((flags,)) + bytes(5) + offset.to_bytes(8, "big") + token + bytes(6)
    return token_command(0x11, head + ranges(*of), list_id)


def information(pair: Pair, list_id: int = 1, unit: LogicalUnit | None = None) -> bytes:
    cdb = bytes((0x84, 0x07)) + list_id.to_bytes(4, "big") + bytes(4) + (2048).to_bytes(4, "big") + bytes(2)
    outcome = pair.run_other(cdb) if unit is pair.other else pair.run(cdb)
    assert outcome.status == GOOD, describe(outcome)
    data = bytes(outcome.data_in)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    return data


def make_token(pair: Pair, *of: tuple[int, int], **more: int) -> bytes:
    outcome = pair.run(*populate(*of, **more))
    assert outcome.status == GOOD, describe(outcome)
    data = information(pair)
    assert data[4:6] == b"\x10\x01"
    at = 32 + data[13]
    assert int.from_bytes(data[at : at + 4], "big") == TOKEN_BYTES + 2
    return data[at + 6 :]


def test_a_token_carries_ranges_to_another_unit() -> None:
    """SBC-3 §5.10, §5.47; the ranges need not be cut alike."""
    pair = Pair()
    medium(pair.unit).write(10 * BLOCK, A * 3)
    medium(pair.unit).write(50 * BLOCK, B * 2)
    token = make_token(pair, (10, 3), (50, 2))
    assert len(token) == TOKEN_BYTES
    assert int.from_bytes(token[48:64], "big") == 5 * BLOCK
    assert pair.run_other(*write_using(token, (0, 1), (100, 4))).status == GOOD
    assert medium(pair.other).read(0, BLOCK) == A
    assert medium(pair.other).read(100 * BLOCK, 4 * BLOCK) == A * 2 + B * 2
    data = information(pair, 2, pair.other)
    assert data[4:6] == b"\x11\x01"
    assert data[15] == 0xF1
    assert int.from_bytes(data[16:24], "big") == 5


def test_a_token_is_used_from_an_offset_on() -> None:
    pair = Pair()
    medium(pair.unit).write(0, A + B)
    token = make_token(pair, (0, 2))
    assert pair.run(*write_using(token, (9, 1), offset=1)).status == GOOD
    assert medium(pair.unit).read(9 * BLOCK, BLOCK) == B
    assert sense_of(pair.run(*write_using(token, (9, 2), offset=1))) == INVALID_FIELD


def test_a_token_gives_what_is_there_when_it_is_used_and_says_so() -> None:
    """ROD type: access upon reference (SPC-4 table 106)."""
    pair = Pair()
    token = make_token(pair, (0, 1))
    assert token[:4] == bytes((0, 1, 0, 0))
    medium(pair.unit).write(0, B)
    assert pair.run_other(*write_using(token, (0, 1))).status == GOOD
    assert medium(pair.other).read(0, BLOCK) == B


def test_the_zero_token_needs_no_source() -> None:
    """SBC-3 §4.28.4."""
    pair = Pair()
    medium(pair.unit).write(0, A * 4)
    token = bytes.fromhex("ffff0001000001f8").ljust(TOKEN_BYTES, b"\0")
    assert pair.run(*write_using(token, (1, 2))).status == GOOD
    assert medium(pair.unit).read(0, 4 * BLOCK) == A + bytes(2 * BLOCK) + A


def test_tokens_end() -> None:
    """By time without use, by DEL_TKN, by another medium; use renews them."""
    pair = Pair()
    token = make_token(pair, (0, 1), timeout=10)
    for _ in range(3):
        pair.time += 9
        assert pair.run(*write_using(token, (9, 1))).status == GOOD
    pair.time += 10
    assert sense_of(pair.run(*write_using(token, (9, 1)))) == triple(Sense.TOKEN_EXPIRED)
    assert sense_of(pair.run(*write_using(token, (9, 1)))) == triple(Sense.TOKEN_UNKNOWN)
    token = make_token(pair, (0, 1))
    assert pair.run(*write_using(token, (9, 1), flags=0x02)).status == GOOD
    assert sense_of(pair.run(*write_using(token, (9, 1)))) == triple(Sense.TOKEN_UNKNOWN)
    token = make_token(pair, (0, 1))
    pair.unit.backend = Memory(BLOCKS * BLOCK)
    assert sense_of(pair.run_other(*write_using(token, (9, 1)))) == triple(Sense.TOKEN_REVOKED)


@pytest.mark.parametrize("at", [0x30, 128, 140, 159, 511])
def test_a_token_that_differs_in_a_byte_is_worth_nothing(at: int) -> None:
    pair = Pair()
    token = bytearray(make_token(pair, (0, 1)))
    token[at] ^= 1
    assert sense_of(pair.run(*write_using(bytes(token), (9, 1)))) == triple(Sense.TOKEN_CORRUPT)


def test_a_token_is_good_only_where_its_unit_is_seen() -> None:
    """A token that leaked opens no other target's data."""
    pair = Pair()
    token = make_token(pair, (0, 1))
    stranger = Pair()
    outcome = stranger.run(*write_using(token, (0, 1)))
    assert sense_of(outcome) == triple(Sense.TOKEN_UNKNOWN)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (populate((BLOCKS, 1)), triple(Sense.LBA_OUT_OF_RANGE)),
        (populate((0, 2), (1, 1)), INVALID_FIELD),
        (populate(), INVALID_FIELD),
        (populate(*((n, 1) for n in range(MAXIMUM_RANGES + 1))), INVALID_FIELD),
        (populate((0, 1), timeout=1 << 30), INVALID_FIELD),
        (populate((0, 1), kind=0x00800000), triple(Sense.INVALID_TOKEN_OPERATION_UNSUPPORTED_TOKEN_TYPE)),
        (populate((0, 1), kind=0x00010000), (0, 0, 0)),
        ((bytes((0x83, 0x10)) + bytes(14), b""), (0, 0, 0)),
        ((bytes((0x83, 0x10)) + bytes(11) + b"\x0f\0\0", bytes(15)), LENGTH_ERROR),
        ((bytes((0x83, 0x11)) + bytes(10) + b"\x02\x17\0\0", bytes(535)), LENGTH_ERROR),
    ],
)
def test_token_parameter_lists_are_checked(
    command: tuple[bytes, bytes], expected: tuple[int, int, int]
) -> None:
    outcome = Pair().run(*command)
    assert sense_of(outcome) == expected, describe(outcome)


def test_an_immediate_write_using_token_is_asked_about_afterwards() -> None:
    """IMMED: GOOD at once; RECEIVE ROD TOKEN INFORMATION says 11h while it runs, 01h when it is done."""
    lane = HeldLane()
    pair = Pair(lane=lane)
    token = make_token(pair, (0, 4))
    assert pair.run(*write_using(token, (9, 4), flags=0x01)).status == GOOD
    assert information(pair, 2)[5] == 0x11
    lane.release()
    data = information(pair, 2)
    assert data[5] == 0x01
    assert int.from_bytes(data[16:24], "big") == 4


def test_rod_token_information_is_kept_by_nexus_and_list_identifier() -> None:
    pair = Pair()
    make_token(pair, (0, 1))
    cdb = bytes.fromhex("8407000000010000000000000200 0000")
    stranger = make_nexus(2, TARGET)
    pair.login(stranger)
    assert sense_of(pair.run(cdb, nexus=stranger)) == triple(Sense.INVALID_FIELD_IN_CDB)
