"""What a command meets before its body, and what becomes of its errors; LUNs and live changes."""

import errno
import logging
from dataclasses import replace

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.device import LogicalUnit, Reset, decode_lun, encode_lun
from protocol.scsi.limits import MAX_LINGERING_TASKS
from protocol.scsi.request import Request
from protocol.scsi.sense import Sense
from storage.base import Buffer
from storage.memory import Memory
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, make_config, make_nexus, sense_of, triple
from tests.scsi.test_control import another_unit

GOOD = ScsiStatus.GOOD
TEST_UNIT_READY = "000000000000"
INQUIRY = "1200 00 0024 00"
REPORT_LUNS = "A000 0000 0000 0000 0100 0000"
READ = "2800 00000000 00 0001 00"
WRITE = "2A00 00000000 00 0001 00"
RESERVE, RELEASE = "160000000000", "170000000000"

POWER_ON_RESET = triple(Sense.POWER_ON_RESET)
LOGICAL_UNIT_NOT_SUPPORTED = (5, 0x25, 0x00)
INTERNAL_TARGET_FAILURE = (4, 0x44, 0x00)


def attentions(disk: Disk, nexus: object = None) -> list[tuple[int, int, int]]:
    """Those that commands of the nexus report until one ends GOOD."""
    found = []
    while (outcome := disk.run(TEST_UNIT_READY, nexus=nexus)).status != GOOD:
        found.append(sense_of(outcome))
    return found


# -- unit attentions (SAM-5 §5.14) ----------------------------------------------------------------------


def test_a_new_nexus_meets_power_on_once() -> None:
    disk = Disk()
    nexus = make_nexus(2)
    disk.target.attach(nexus)
    assert disk.run(INQUIRY, nexus=nexus).status == GOOD
    assert disk.run(REPORT_LUNS, nexus=nexus).status == GOOD
    assert attentions(disk, nexus) == [POWER_ON_RESET]
    assert attentions(disk) == []


def test_attentions_queue_once_each_resets_first() -> None:
    """SAM-5 §5.14.4: precedence; a reset takes the place of a lesser one."""
    disk = Disk()
    for sense in (
        Sense.CAPACITY_DATA_CHANGED,
        Sense.I_T_NEXUS_LOSS,
        Sense.MODE_PARAMETERS_CHANGED,
        Sense.CAPACITY_DATA_CHANGED,
        Sense.BUS_DEVICE_RESET,
        Sense.I_T_NEXUS_LOSS,
    ):
        disk.unit.raise_attention(sense)
    expected = [Sense.BUS_DEVICE_RESET, Sense.CAPACITY_DATA_CHANGED, Sense.MODE_PARAMETERS_CHANGED]
    assert attentions(disk) == [triple(sense) for sense in expected]


def test_an_attention_goes_before_a_reservation_conflict() -> None:
    """SAM-5 §5.3.3: status precedence."""
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    disk.run(RESERVE)
    disk.unit.raise_attention(Sense.MODE_PARAMETERS_CHANGED)
    assert sense_of(disk.run(READ, nexus=other)) == triple(Sense.MODE_PARAMETERS_CHANGED)
    assert disk.run(READ, nexus=other).status == ScsiStatus.RESERVATION_CONFLICT
    assert disk.run("2800 FFFFFFFF 00 0001 00", nexus=other).status == ScsiStatus.RESERVATION_CONFLICT


RESETS = [
    (Reset.LOGICAL_UNIT, Sense.BUS_DEVICE_RESET),
    (Reset.TARGET_WARM, Sense.SCSI_BUS_RESET),
    (Reset.TARGET_COLD, Sense.POWER_ON_OCCURRED),
]


@pytest.mark.parametrize(("kind", "sense"), RESETS)
def test_a_reset_is_an_attention_to_all_and_ends_a_reserve(kind: Reset, sense: Sense) -> None:
    """conformance: LUN RESET gives a UA to all sessions, the sender's too."""
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    disk.run(RESERVE)
    disk.unit.reset(disk.nexus, kind)
    assert attentions(disk) == [triple(sense)]
    assert attentions(disk, other) == [triple(sense)]
    assert disk.run(WRITE, bytes(BLOCK), nexus=other).status == GOOD


@pytest.mark.parametrize("end", ["detach", "nexus_lost"])
def test_a_reserve_ends_with_its_nexus(end: str) -> None:
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    disk.run(RESERVE)
    assert disk.run(READ, nexus=other).status == ScsiStatus.RESERVATION_CONFLICT
    assert disk.run(RELEASE, nexus=other).status == GOOD
    getattr(disk.target, end)(disk.nexus)
    assert disk.run(READ, nexus=other).status == GOOD


# -- live changes ----------------------------------------------------------------------------------------

CHANGES = [
    # (changed setting, attentions)
    ({}, []),
    ({"name": "renamed"}, []),
    ({"block_size": 1024}, [Sense.CAPACITY_DATA_CHANGED]),
    ({"physical_block_exponent": 0}, [Sense.CAPACITY_DATA_CHANGED]),
    ({"read_only": True}, [Sense.MODE_PARAMETERS_CHANGED]),
    ({"serial": "77"}, [Sense.INQUIRY_DATA_CHANGED]),
    ({"rotation_rate": 7200}, [Sense.INQUIRY_DATA_CHANGED]),
    ({"thin": False}, [Sense.INQUIRY_DATA_CHANGED]),
    (
        {"block_size": 4096, "read_only": True, "vendor": "X"},
        [Sense.CAPACITY_DATA_CHANGED, Sense.MODE_PARAMETERS_CHANGED, Sense.INQUIRY_DATA_CHANGED],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), CHANGES)
def test_a_live_change_is_told_by_its_attention(changes: dict[str, object], expected: list[Sense]) -> None:
    disk = Disk()
    disk.unit.reconfigure(replace(disk.unit.config, **changes), disk.unit.backend)  # type: ignore[arg-type]
    assert attentions(disk) == [triple(sense) for sense in expected]


def test_growth_of_the_medium_is_a_change_of_capacity() -> None:
    """SBC-3 §4.7: CAPACITY DATA HAS CHANGED, and the new blocks are there."""
    disk = Disk()
    beyond = "2800 00001000 00 0001 00"
    assert sense_of(disk.run(beyond)) == triple(Sense.LBA_OUT_OF_RANGE)
    assert disk.unit.backend is not None
    disk.unit.backend.resize(2 * BLOCKS * BLOCK)
    disk.unit.reconfigure(disk.unit.config, disk.unit.backend)
    assert attentions(disk) == [triple(Sense.CAPACITY_DATA_CHANGED)]
    assert disk.run(beyond).status == GOOD


def test_a_medium_that_was_missing_comes_back_without_a_login() -> None:
    disk = Disk(backend=None)
    assert sense_of(disk.run(TEST_UNIT_READY)) == triple(Sense.MEDIUM_NOT_PRESENT)
    disk.unit.reconfigure(disk.unit.config, Memory(BLOCK * BLOCKS))
    assert attentions(disk)[0] == triple(Sense.MEDIUM_MAY_HAVE_CHANGED)
    assert disk.run(READ).status == GOOD
    disk.unit.reconfigure(disk.unit.config, None)
    assert sense_of(disk.run(TEST_UNIT_READY)) == triple(Sense.MEDIUM_NOT_PRESENT)


# -- errors ----------------------------------------------------------------------------------------------


class Broken(Memory):
    """Fails with whatever it is told."""

    error: Exception = OSError(errno.EIO, "x")

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        raise self.error

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        raise self.error


FAILURES = [
    (OSError(errno.EIO, "x"), (3, 0x11, 0), (3, 0x0C, 0)),
    (OSError(errno.ENOSPC, "x"), (7, 0x27, 7), (7, 0x27, 7)),
    (OSError(errno.ENODEV, "x"), (2, 0x3A, 0), (2, 0x3A, 0)),
    (ZeroDivisionError(), INTERNAL_TARGET_FAILURE, INTERNAL_TARGET_FAILURE),
]


@pytest.mark.parametrize(("error", "reading", "writing"), FAILURES)
def test_a_failure_ends_that_task_alone(
    error: Exception,
    reading: tuple[int, int, int],
    writing: tuple[int, int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Broken(BLOCK * BLOCKS)
    backend.error = error
    disk = Disk(backend=backend)
    with caplog.at_level(logging.WARNING):
        outcome = disk.run("2800 00000009 00 0001 00")
        assert sense_of(outcome) == reading
        assert sense_of(disk.run(WRITE, bytes(BLOCK))) == writing
    assert len(caplog.records) == 2
    assert all(bool(record.exc_info) == isinstance(error, ZeroDivisionError) for record in caplog.records)
    if reading[0] == 3:
        assert outcome.sense[0] & 0x80 and outcome.sense[3:7] == b"\0\0\0\x09"
        assert (disk.unit.read_errors, disk.unit.write_errors) == (1, 1)
    assert not disk.unit.tasks
    assert disk.run(TEST_UNIT_READY).status == GOOD


@pytest.mark.parametrize(("cdb", "data"), [(READ, b""), (WRITE, bytes(BLOCK))])
def test_a_backend_that_was_closed_under_a_command_is_tried_again(cdb: str, data: bytes) -> None:
    """An edit of the extent or the end of the daemon says nothing about the medium: BUSY (SAM-5 §5.3.1)."""
    backend = Broken(BLOCK * BLOCKS)
    backend.error = OSError(errno.EBADF, "the extent has been closed")
    disk = Disk(backend=backend)
    outcome = disk.run(cdb, data)
    assert (outcome.status, outcome.sense) == (ScsiStatus.BUSY, b"")
    assert (disk.unit.read_errors, disk.unit.write_errors) == (0, 0)


# -- LUNs (SAM-5 §4.7) -----------------------------------------------------------------------------------

LUN_FIELDS = [
    ("0000000000000000", 0),
    ("00ff000000000000", 255),
    ("4000000000000000", 0),
    ("4100000000000000", 256),
    ("7fff000000000000", 16383),
    ("0100000000000000", None),  # bus 1
    ("8000000000000000", None),  # logical unit addressing
    ("c101000000000000", None),  # well known
    ("0000000100000000", None),  # a second level
]


@pytest.mark.parametrize(("field", "lun"), LUN_FIELDS)
def test_lun_fields(field: str, lun: int | None) -> None:
    raw = bytes.fromhex(field)
    assert decode_lun(raw) == lun
    if lun is not None:
        assert decode_lun(encode_lun(lun)) == lun
    disk = Disk()
    disk.target.replace_luns({} if lun is None else {lun: disk.unit})
    found = disk.target.unit_for(raw)
    assert found.absent if lun is None else found is disk.unit


def test_a_lun_without_a_unit_says_so() -> None:
    """SPC-4 §6.4.2: qualifier 011b, type 1Fh; SAM-5 §4.7.2: LOGICAL UNIT NOT SUPPORTED."""
    disk = Disk()
    absent = disk.target.unit_for(bytes.fromhex("0005000000000000"))

    def run(cdb: str) -> tuple[int, bytes, tuple[int, int, int]]:
        request = disk.request(cdb, bytes(BLOCK))
        outcome = absent.admit(request) or absent.submit(request)
        assert outcome is not None
        return outcome.status, bytes(outcome.data_in), sense_of(outcome)

    assert run(INQUIRY)[1][0] == 0x7F
    assert run(REPORT_LUNS)[1] == bytes.fromhex("00000008000000000000000000000000")
    status, data, _ = run("0300 0000 FC00")
    assert status == GOOD and (data[2] & 0x0F, data[12], data[13]) == LOGICAL_UNIT_NOT_SUPPORTED
    for cdb in (TEST_UNIT_READY, READ, WRITE, "A30C 0000 0000 0000 0100 0000", "FF0000000000"):
        assert run(cdb)[2] == LOGICAL_UNIT_NOT_SUPPORTED


def test_a_changed_inventory_is_told_once_per_nexus() -> None:
    """SPC-4 §6.33 and LUICLR of VPD page 86h."""
    disk = Disk()
    second, third = another_unit(), another_unit()
    disk.target.replace_luns({0: disk.unit, 1: second})
    assert attentions(disk) == [triple(Sense.REPORTED_LUNS_DATA_CHANGED)]
    assert second.take_attention(disk.nexus) is Sense.POWER_ON_RESET
    disk.target.replace_luns({0: disk.unit, 1: second})
    assert attentions(disk) == []
    disk.target.replace_luns({0: disk.unit, 1: second, 2: third})
    assert attentions(disk) == [triple(Sense.REPORTED_LUNS_DATA_CHANGED)]
    assert second.take_attention(disk.nexus) is None


def test_a_unit_that_goes_ends_its_tasks_and_the_others_do_not_notice() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane, backend=Broken(BLOCK * BLOCKS))
    stuck = disk.start(WRITE, bytes(BLOCK))
    other = another_unit()
    assert disk.target.replace_luns({1: other}) == [stuck]
    assert not disk.unit.nexuses and not disk.unit.tasks
    lane.release()
    assert stuck not in disk.delivered
    assert disk.target.unit_for(encode_lun(0)).absent
    assert disk.target.unit_for(encode_lun(1)) is other


OTHER_UNIT = [
    Sense.POWER_ON_RESET,
    Sense.REPORTED_LUNS_DATA_CHANGED,
    Sense.MEDIUM_MAY_HAVE_CHANGED,
    Sense.INQUIRY_DATA_CHANGED,
]


def pending(disk: Disk, unit: LogicalUnit) -> list[Sense]:
    return list(unit.attentions.pending.get(disk.nexus, []))


def test_another_unit_at_a_lun_that_was_known_says_so_itself() -> None:
    """Also after a time without any, and where another unit has told that the inventory changed (LUICLR)."""
    disk = Disk()
    other, second, third = another_unit(), another_unit("3"), another_unit("4")
    disk.target.replace_luns({0: other})
    assert pending(disk, other) == OTHER_UNIT
    disk.target.replace_luns({})
    disk.target.replace_luns({0: second})
    assert pending(disk, second) == OTHER_UNIT
    disk.target.replace_luns({0: second, 1: third})
    assert pending(disk, third) == OTHER_UNIT[:2], "nobody knew another there"
    newcomer = make_nexus(7)
    disk.target.attach(newcomer)
    assert second.attentions.pending[newcomer] == OTHER_UNIT[:1]


def test_units_that_change_places_say_so() -> None:
    disk = Disk()
    other = another_unit()
    disk.target.replace_luns({0: disk.unit, 1: other})
    other.attentions.forget(disk.nexus)
    disk.unit.attentions.forget(disk.nexus)
    disk.target.replace_luns({0: other, 1: disk.unit})
    assert pending(disk, disk.unit) == pending(disk, other) == OTHER_UNIT[1:]


def test_the_same_unit_back_at_its_lun_is_no_other() -> None:
    disk = Disk()
    disk.target.replace_luns({})
    disk.target.replace_luns({0: disk.unit})
    assert pending(disk, disk.unit) == OTHER_UNIT[:2]


def test_another_medium_ends_what_was_meant_for_the_first() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane, backend=Broken(BLOCK * BLOCKS))
    stuck = disk.start(WRITE, bytes(BLOCK))
    ended: dict[Request, Sense] = {}
    disk.unit.concluded = ended.__setitem__
    disk.unit.replace_medium()
    assert ended == {stuck: Sense.MEDIUM_NOT_PRESENT}
    assert pending(disk, disk.unit) == [Sense.MEDIUM_MAY_HAVE_CHANGED]
    lane.release()
    assert stuck not in disk.delivered


class Slow(Memory):
    """Writes wait for it, on a worker."""

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False


def test_what_hangs_in_a_medium_does_not_hold_up_another_that_comes_in_its_place() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane, backend=Slow(BLOCK * BLOCKS))
    beside = Disk(lane=lane, backend=disk.backend, serial="2")
    beside.unit.share_medium(disk.unit)
    hung = [disk.start(WRITE, b"\x5a" * BLOCK) for _ in range(MAX_LINGERING_TASKS)]
    for unit in (disk.unit, beside.unit):
        unit.replace_medium()
    disk.unit.begin_anew(None)
    beside.unit.begin_anew(disk.unit)
    new = Slow(BLOCK * BLOCKS)
    for each in (disk, beside):
        each.unit.reconfigure(each.unit.config, new)
        each.unit.attentions.forget(each.nexus)
        later = each.start(WRITE, b"\xa5" * BLOCK)
        assert len(lane.jobs) > MAX_LINGERING_TASKS, "it has begun"
        work, done = lane.jobs.pop()
        done(work())
        assert each.delivered[later].status == GOOD
    lane.release()
    assert new.read(0, BLOCK) == b"\xa5" * BLOCK, "what was queued for the first is done to neither"
    assert not set(hung) & disk.delivered.keys()


@pytest.mark.parametrize(
    ("change", "ended"),
    [({"block_size": 4096}, [0, 1]), ({}, [1])],
    ids=["another block size", "a smaller medium"],
)
def test_commands_whose_blocks_are_gone_are_answered(change: dict[str, object], ended: list[int]) -> None:
    """SBC-3 §4.7: the capacity has changed; an LBA that was read before means another place, or none."""
    lane = HeldLane()
    disk = Disk(lane=lane, backend=Broken(BLOCK * BLOCKS))
    under_way = [disk.start(f"2A00 {lba:08X} 00 0001 00", bytes(BLOCK)) for lba in (0, BLOCKS - 1)]
    told: dict[Request, Sense] = {}
    disk.unit.concluded = told.__setitem__
    smaller = Broken(BLOCK * BLOCKS if change else BLOCK * BLOCKS // 2)
    disk.unit.reconfigure(make_config(**change), smaller)
    assert told == {under_way[number]: Sense.LBA_OUT_OF_RANGE for number in ended}
    assert pending(disk, disk.unit) == [Sense.CAPACITY_DATA_CHANGED]


def test_units_over_one_medium_are_reset_and_cleared_together() -> None:
    """Two targets show it, by one name (NAA): what ends a task set ends that of both."""
    lane = HeldLane()
    one = Disk(lane=lane, backend=Broken(BLOCK * BLOCKS))
    two = Disk(lane=lane, backend=one.backend, serial="2")
    two.unit.share_medium(one.unit)
    first = one.start(WRITE, bytes(BLOCK))
    assert two.unit.clear_task_set(two.nexus) == []
    assert one.ended + two.ended == [first]
    assert attentions(one) == [triple(Sense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR)]
    second = one.start(WRITE, bytes(BLOCK))
    two.unit.reset(two.nexus)
    assert one.ended + two.ended == [first, second]
    assert attentions(one) == attentions(two) == [triple(Sense.BUS_DEVICE_RESET)]
    one.unit.leave_medium()
    two.unit.reset(two.nexus)
    assert attentions(one) == []


def test_a_unit_in_two_targets_is_one_task_set() -> None:
    from protocol.scsi.device import Target

    disk = Disk()
    second = Target("iqn.2011-03.org.example.istgt:two", {3: disk.unit}, lane=disk.lane, now=disk.unit.now)  # type: ignore[arg-type]
    nexus = make_nexus(5, target=second.name)
    second.attach(nexus)
    disk.unit.take_attention(nexus)
    data = disk.read(REPORT_LUNS, nexus=nexus)
    assert data[8:].hex() == "0003000000000000"
    assert second.name.encode() in disk.read("1201 83 0400 00", nexus=nexus)


def test_the_naa_may_have_eight_bytes() -> None:
    disk = Disk()
    disk.unit.reconfigure(make_config(naa="0x3123456789abcdef"), disk.unit.backend)
    attentions(disk)
    assert bytes.fromhex("0103000831234567 89abcdef") in disk.read("1201 83 0400 00")
