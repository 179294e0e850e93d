"""SPC commands: sense, LUNs, names, time, buffers, media that come and go; and the log pages."""

import errno

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.control import BUFFER_BYTES
from protocol.scsi.device import LogicalUnit
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import CheckCondition, Sense
from storage.memory import Memory
from storage.wrap import Faulty
from tests.scsi.support import (
    BLOCK,
    BLOCKS,
    Disk,
    HeldLane,
    Keeper,
    SynchronousLane,
    make_config,
    make_nexus,
    pointer_of,
    sense_of,
)

GOOD = ScsiStatus.GOOD
INVALID_FIELD_IN_CDB = (5, 0x24, 0x00)
LOGICAL_UNIT_NOT_SUPPORTED = (5, 0x25, 0x00)
COMMAND_SEQUENCE_ERROR = (5, 0x2C, 0x00)
MEDIUM_NOT_PRESENT = (2, 0x3A, 0x00)
MEDIUM_REMOVAL_PREVENTED = (5, 0x53, 0x02)
MEDIUM_MAY_HAVE_CHANGED = (6, 0x28, 0x00)
POWER_ON_RESET = (6, 0x29, 0x00)
SANITIZE_IN_PROGRESS = (2, 0x04, 0x1B)
DEVICE_IDENTIFIER_CHANGED = (6, 0x3F, 0x05)
REPORTED_LUNS_DATA_CHANGED = (6, 0x3F, 0x0E)

TEST_UNIT_READY = "000000000000"


# -- REQUEST SENSE (SPC-4 §6.39) --


def test_request_sense_takes_the_pending_attention() -> None:
    disk = Disk()
    nexus = make_nexus(2)
    disk.target.attach(nexus)
    data = disk.read("0300 0000 FC00", nexus=nexus)
    assert (data[2] & 0x0F, data[12], data[13]) == POWER_ON_RESET
    assert len(data) == 18
    assert disk.run(TEST_UNIT_READY, nexus=nexus).status == GOOD


@pytest.mark.parametrize(("desc", "code", "length"), [(0, 0x70, 18), (1, 0x72, 8)])
def test_request_sense_has_the_format_that_desc_asks_for(desc: int, code: int, length: int) -> None:
    data = Disk().read(bytes((0x03, desc, 0, 0, 0xFC, 0)))
    assert (data[0], len(data)) == (code, length)
    assert not any(data[1:7])


def test_request_sense_tells_the_progress_of_what_locks_the_unit() -> None:
    disk = Disk()
    disk.unit.lock(lambda: CheckCondition(Sense.SANITIZE_IN_PROGRESS, progress=0x4000))
    data = disk.read("0300 0000 FC00")
    assert (data[2] & 0x0F, data[12], data[13]) == SANITIZE_IN_PROGRESS
    assert data[15:18] == b"\x80\x40\x00"
    for cdb in (TEST_UNIT_READY, "1B0000000100", "2800 00000000 00 0001 00"):
        assert sense_of(disk.run(cdb)) == SANITIZE_IN_PROGRESS
    for cdb in ("1200 00 0024 00", "A000 0000 0000 0000 0100 0000", "1A08 0A00 FF00"):
        assert disk.run(cdb).status == GOOD
    disk.unit.unlock()
    assert disk.run(TEST_UNIT_READY).status == GOOD


# -- SEND DIAGNOSTIC --


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [
        ("1D0400000000", (4, 0x3E, 0x03)),  # the default self-test finds it
        ("1D0000000000", (0, 0, 0)),  # nothing to do
        ("1D2000000000", (5, 0x24, 0x00)),  # a background test
        ("1D1000000400", (5, 0x24, 0x00)),  # a page
    ],
)
def test_the_self_test_looks_at_the_medium(cdb: str, expected: tuple[int, int, int]) -> None:
    """SPC-4 §6.42: LOGICAL UNIT FAILED SELF-TEST, with HARDWARE ERROR."""
    backend = Faulty(Memory(BLOCK * BLOCKS))
    disk = Disk(backend=backend)
    assert sense_of(disk.run("1D0400000000")) == (0, 0, 0)
    backend.fail(errno.EIO, "read")
    assert sense_of(disk.run(cdb)) == expected


# -- REPORT LUNS (SPC-4 §6.33) --


def another_unit(serial: str = "2") -> LogicalUnit:
    from storage.memory import Memory

    return LogicalUnit(
        make_config(name="other", serial=serial, naa="0x6589cfc0000000000000000000000002"),
        Memory(BLOCK * BLOCKS),
        SynchronousLane(),
        reservations=Reservations(),
        now=lambda: 0.0,
    )


LUNS_7_300 = "00000010000000000007000000000000412c000000000000"


@pytest.mark.parametrize(("select", "expected"), [(0, LUNS_7_300), (2, LUNS_7_300), (1, "00" * 8)])
def test_report_luns_lists_the_units_of_the_target(select: int, expected: str) -> None:
    """Peripheral addressing below 256, flat above (SAM-5 §4.7); well known units: none. Without LUN 0 too."""
    disk = Disk()
    disk.target.replace_luns({7: disk.unit, 300: another_unit()})
    cdb = bytes((0xA0, 0, select, 0, 0, 0, 0, 0, 0x02, 0, 0, 0))
    request = disk.request(cdb)
    absent = disk.target.unit_for(bytes(8))
    assert absent.absent
    assert absent.admit(request) is None
    outcome = absent.submit(request)
    assert outcome is not None
    assert bytes(outcome.data_in).hex() == expected


def test_report_luns_is_cut_and_its_list_length_is_not() -> None:
    disk = Disk()
    assert disk.read("A000 0000 0000 0000 000C 0000").hex() == "000000080000000000000000"


def test_reporting_luns_clears_their_attention_on_every_unit() -> None:
    """SPC-4 §6.33."""
    disk = Disk()
    other = another_unit()
    disk.target.replace_luns({0: disk.unit, 1: other})
    disk.target.replace_luns({0: disk.unit, 1: other, 2: another_unit()})
    disk.read("A000 0000 0000 0000 0100 0000")
    assert disk.run(TEST_UNIT_READY).status == GOOD
    assert Sense.REPORTED_LUNS_DATA_CHANGED not in other.attentions.pending.get(disk.nexus, [])


# -- REPORT TARGET PORT GROUPS (SPC-4 §6.37) --

ONE_GROUP = "0000001000010001000000020000000100000003"
EXTENDED = "000000141000000000010001000000020000000100000003"


@pytest.mark.parametrize(("form", "expected"), [(0x00, ONE_GROUP), (0x20, EXTENDED)])
def test_all_ports_are_active_in_one_group(form: int, expected: str) -> None:
    disk = Disk()
    disk.target.ports = (1, 3)
    whole = bytes.fromhex(expected)
    for allocation in (*range(len(whole) + 1), 255):
        cdb = bytes((0xA3, 0x0A | form, 0, 0, 0, 0, 0, 0, 0, allocation, 0, 0))
        assert disk.read(cdb) == whole[:allocation]


def test_supported_task_management_functions_are_those_of_rfc_7143_and_7144() -> None:
    """SPC-4 §6.36."""
    disk = Disk()
    assert disk.read("A30D 0000 0000 0000 00FF 0000").hex() == "de070000"
    assert disk.read("A30D 8000 0000 0000 00FF 0000").hex() == "de07000c" + "00" * 12


def test_the_timestamp_is_the_hosts_in_milliseconds() -> None:
    """SPC-4 §5.2, §6.38."""
    data = Disk().read("A30F 0000 0000 0000 00FF 0000")
    assert data[:3] == b"\x00\x0a\x03"
    assert int.from_bytes(data[4:10], "big") == 1_700_000_000_500


# -- identifying information (SPC-4 §5.5) --


def set_information(kind: int, length: int) -> bytes:
    return bytes((0xA4, 0x06, 0, 0, 0, 0)) + length.to_bytes(4, "big") + bytes((kind << 1, 0))


def information(kind: int) -> bytes:
    return bytes((0xA3, 0x05, 0, 0, 0, 0, 0, 0, 0x04, 0, kind << 1, 0))


def test_identifying_information_is_stored_and_others_are_told() -> None:
    keeper = Keeper()
    disk = Disk(keep=keeper)
    other = make_nexus(2)
    disk.login(other)
    assert disk.run(set_information(0, 3), b"abc").status == GOOD
    assert disk.read(information(0)) == b"\0\0\0\x03abc"
    assert sense_of(disk.run(TEST_UNIT_READY, nexus=other)) == DEVICE_IDENTIFIER_CHANGED
    assert disk.run(TEST_UNIT_READY).status == GOOD
    assert Disk(keep=keeper, kept=keeper.values).read(information(0)) == b"\0\0\0\x03abc"
    assert disk.read(information(0x7F)).hex() == "000000080000020004000100"


@pytest.mark.parametrize(
    ("cdb", "data", "expected"),
    [
        (set_information(0, 513), bytes(513), INVALID_FIELD_IN_CDB),
        (set_information(1, 1), b"a", INVALID_FIELD_IN_CDB),
        (set_information(0, 4), b"abc", (5, 0x1A, 0x00)),
        (set_information(2, 3), b"abc", (5, 0x26, 0x00)),  # a text ends with a null
        (information(1), b"", INVALID_FIELD_IN_CDB),
    ],
)
def test_bad_identifying_information_is_refused(
    cdb: bytes, data: bytes, expected: tuple[int, int, int]
) -> None:
    keeper = Keeper()
    assert sense_of(Disk(keep=keeper).run(cdb, data)) == expected
    assert not keeper.values


def test_information_that_could_not_be_stored_is_not_there() -> None:
    keeper = Keeper()
    keeper.error = OSError(errno.ENOSPC, "x")
    disk = Disk(keep=keeper)
    assert disk.run(set_information(0, 3), b"abc").status == ScsiStatus.CHECK_CONDITION
    assert disk.read(information(0)) == bytes(4)


# -- READ BUFFER, WRITE BUFFER (SPC-4 §6.23, §6.49) --

READ_ECHO = "3C0A 0000 0000 0010 0000"


def test_the_echo_buffer_is_each_nexus_its_own() -> None:
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    assert sense_of(disk.run(READ_ECHO)) == COMMAND_SEQUENCE_ERROR
    assert disk.run("3B0A 0000 0000 0000 0400", b"echo").status == GOOD
    assert disk.read(READ_ECHO) == b"echo"
    assert sense_of(disk.run(READ_ECHO, nexus=other)) == COMMAND_SEQUENCE_ERROR
    assert disk.read("3C0B 0000 0000 0000 0400").hex() == "00001000"
    disk.target.detach(disk.nexus)
    assert not disk.unit.echo


@pytest.mark.parametrize(
    "cdb",
    [
        "3B0A 0000 0000 0010 0100",  # 4097 bytes
        "3B0A 0000 0000 FFFF FF00",
        "3B00 0000 0000 0000 0400",  # header and data
        "3B05 0000 0000 0000 0400",  # microcode
        "3C00 0000 0000 0000 0400",
        "3B02 0100 0000 0000 0400",
        "3B02 0001 0000 0000 0400",  # an offset at the end of the buffer, and one beyond it
        "3B02 0001 0001 0000 0000",
        "3B02 0000 0000 0100 0100",
        "3B02 0000 FFFF 0000 0400",
        "3C02 0100 0000 0000 0400",
        "3C02 0001 0001 0000 0400",
    ],
)
def test_other_buffers_ids_and_offsets_are_refused_by_header(cdb: str) -> None:
    disk = Disk()
    outcome = disk.run(cdb, b"echo")
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert not disk.unit.echo


def test_the_data_buffer_is_one_for_all_and_its_descriptor_says_how_large() -> None:
    """SPC-4 §6.23.4, §6.23.5, §6.49.4: modes 02h and 03h."""
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    size = int.from_bytes(disk.read("3C03 0000 0000 0000 0400"), "big")
    assert size == BUFFER_BYTES  # OFFSET BOUNDARY 0: any byte
    assert disk.read("3C03 0100 0000 0000 0400") == bytes(4)
    assert disk.read("3C02 0000 0000 0100 0000") == bytes(size)
    pattern = bytes(range(251)) * 20
    at = size - len(pattern)
    cdb = bytes((0x3B, 2, 0)) + at.to_bytes(3, "big") + len(pattern).to_bytes(3, "big") + b"\0"
    assert not disk.run(cdb, pattern).status
    assert disk.read("3C02 0000 0000 0100 0000", nexus=other) == bytes(at) + pattern
    assert disk.read(bytes((0x3C, 2, 0)) + (at + 7).to_bytes(3, "big") + b"\0\0\x05\0") == pattern[7:12]
    assert disk.read(bytes((0x3C, 2, 0)) + (at + 7).to_bytes(3, "big") + b"\xff\0\0\0") == pattern[7:]
    disk.unit.reset(None)
    while disk.unit.attentions.take(other):
        pass
    assert disk.read("3C02 0000 0000 0100 0000", nexus=other) == bytes(size)


def test_the_echo_buffer_has_neither_id_nor_offset() -> None:
    """They are ignored in this mode (SPC-4 §6.49.9)."""
    disk = Disk()
    assert not disk.run("3B0A 0100 0001 0000 0400", b"echo").status
    assert disk.read("3C0A 0000 0000 0000 0400") == b"echo"


@pytest.mark.parametrize("lun", range(8))
@pytest.mark.parametrize("opcode", [0x00, 0x03, 0x12])
def test_the_lun_field_of_scsi_2_is_let_pass_where_initiators_know_no_better(opcode: int, lun: int) -> None:
    disk = Disk()
    assert not disk.run(bytes((opcode, lun << 5, 0, 0, 18 if opcode else 0, 0))).status


@pytest.mark.parametrize("flags", [0x14, 0x10, 0x17])
def test_a_self_test_may_say_that_its_pages_would_be_those_of_the_standard(flags: int) -> None:
    """PF, as sg3-utils and Solaris send it."""
    disk = Disk()
    assert not disk.run(bytes((0x1D, flags, 0, 0, 0, 0))).status
    for wrong in (bytes((0x1D, flags, 0, 0, 4, 0)), bytes((0x1D, flags | 0x20, 0, 0, 0, 0))):
        assert sense_of(disk.run(wrong, bytes(4))) == INVALID_FIELD_IN_CDB


# -- media that come and go (SBC-3 §5.25, SPC-4 §6.22) --

EJECT, LOAD, STOP, START = "1B0000000200", "1B0000000300", "1B0000000000", "1B0000000100"
PREVENT, ALLOW = "1E0000000100", "1E0000000000"
ON_THE_MEDIUM = [
    TEST_UNIT_READY,
    "2800 00000000 00 0001 00",
    "2500 0000 0000 0000 0000",
    "9E10 0000 0000 0000 0000 0000 0020 0000",
    "9E12 0000 0000 0000 0000 0000 0020 0000",
    "3500 0000 0000 0000 0000",
    "3506 0000 0000 0000 0000",  # SYNC_NV, IMMED
    "3400 0000 0000 0000 0100",
    "4200 0000 0000 0000 0000",
    "4100 00000000 00 0001 00",
    "8900 0000 0000 0000 0000 0000 0001 0000",
    "8B00 0000 0000 0000 0000 0000 0001 0000",
]


@pytest.mark.parametrize("cdb", ON_THE_MEDIUM)
def test_without_a_medium_its_commands_are_not_ready(cdb: str) -> None:
    """SBC-3 §4.4: NOT READY, MEDIUM NOT PRESENT; ejected, or the backing store is missing."""
    disk = Disk(removable=True)
    assert disk.run(EJECT).status == GOOD
    assert sense_of(disk.run(cdb, bytes(BLOCK))) == MEDIUM_NOT_PRESENT
    missing = Disk(backend=None, thin=True)
    assert sense_of(missing.run("1A08 0A00 FF00")) == (0, 0, 0)
    if not cdb.startswith("42"):  # UNMAP is offered where the medium can
        assert sense_of(missing.run(cdb, bytes(BLOCK))) == MEDIUM_NOT_PRESENT


def test_eject_and_load() -> None:
    disk = Disk(removable=True)
    other = make_nexus(2)
    disk.login(other)
    assert [disk.run(cdb).status for cdb in (EJECT, EJECT, LOAD)] == [GOOD] * 3
    assert disk.run(TEST_UNIT_READY).status == GOOD  # it knows
    assert sense_of(disk.run(TEST_UNIT_READY, nexus=other)) == MEDIUM_MAY_HAVE_CHANGED
    assert disk.run(TEST_UNIT_READY, nexus=other).status == GOOD


@pytest.mark.parametrize("cdb", [STOP, START, *(f"1B000000{power:X}000" for power in range(1, 16))])
def test_stopping_and_power_conditions_leave_the_unit_ready(cdb: str) -> None:
    """conformance: LOEJ=0 or POWER CONDITION 1-15: GOOD and still ready."""
    disk = Disk(removable=True)
    assert disk.run(cdb).status == GOOD
    assert disk.run(TEST_UNIT_READY).status == GOOD


def test_a_fixed_medium_cannot_be_ejected() -> None:
    outcome = Disk().run(EJECT)
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome) == (4, 1, True)


@pytest.mark.parametrize("cdb", [EJECT, LOAD])
def test_prevented_removal_holds_for_every_nexus(cdb: str) -> None:
    disk = Disk(removable=True)
    other = make_nexus(2)
    disk.login(other)
    disk.run(PREVENT)
    for nexus in (disk.nexus, other):
        assert sense_of(disk.run(cdb, nexus=nexus)) == MEDIUM_REMOVAL_PREVENTED
    disk.run(ALLOW, nexus=other)  # it is not the other's to allow
    assert sense_of(disk.run(cdb)) == MEDIUM_REMOVAL_PREVENTED
    disk.run(ALLOW)
    assert disk.run(cdb).status == GOOD


@pytest.mark.parametrize("end", ["reset", "nexus_lost", "detach"])
def test_prevention_ends_with_a_reset_or_its_nexus(end: str) -> None:
    """SPC-4 §6.22: power on, hard reset, logical unit reset, I_T nexus loss."""
    disk = Disk(removable=True)
    disk.run(PREVENT)
    getattr(disk.unit, end)(disk.nexus)
    assert not disk.unit.prevented_by


def test_an_eject_first_flushes() -> None:
    lane = HeldLane()
    disk = Disk(removable=True, lane=lane)
    request = disk.start(EJECT)
    assert disk.unit.loaded
    lane.release()
    assert disk.delivered[request].status == GOOD
    assert not disk.unit.loaded


def test_removal_prevented_during_the_flush_is_prevented() -> None:
    lane = HeldLane()
    disk = Disk(removable=True, lane=lane)
    request = disk.start(EJECT)
    disk.unit.prevented_by[make_nexus(2)] = None
    lane.release()
    assert sense_of(disk.delivered[request]) == MEDIUM_REMOVAL_PREVENTED
    assert disk.unit.loaded


def test_units_over_one_medium_eject_and_prevent_it_together() -> None:
    """There is one medium, in however many ways two targets show it."""
    one = Disk(removable=True)
    two = Disk(removable=True, backend=one.backend, serial="2")
    two.unit.share_medium(one.unit)
    two.run(PREVENT)
    assert sense_of(one.run(EJECT)) == MEDIUM_REMOVAL_PREVENTED
    two.run(ALLOW)
    assert one.run(EJECT).status == GOOD
    assert sense_of(two.run(TEST_UNIT_READY)) == MEDIUM_NOT_PRESENT
    assert two.run(LOAD).status == GOOD
    assert sense_of(one.run(TEST_UNIT_READY)) == MEDIUM_MAY_HAVE_CHANGED


def test_a_medium_that_is_no_longer_removable_is_back() -> None:
    """The operator's choice, live: SPC-4 §5.14, 28h/00h and 3Fh/03h."""
    disk = Disk(removable=True)
    disk.run(EJECT)
    disk.run(PREVENT)
    disk.unit.reconfigure(make_config(), disk.unit.backend)
    told = [sense_of(disk.run(TEST_UNIT_READY)) for _ in range(2)]
    assert told == [MEDIUM_MAY_HAVE_CHANGED, (6, 0x3F, 0x03)]
    assert disk.run(TEST_UNIT_READY).status == GOOD
    assert not disk.unit.prevented_by


# -- LOG SENSE (SPC-4 §6.6, §7.3) --


def log_page(disk: Disk, code: int, subpage: int = 0, pointer: int = 0) -> bytes:
    return disk.read(bytes((0x4D, 0, 0x40 | code, subpage, 0)) + pointer.to_bytes(2, "big") + b"\x04\0\0")


def parameters(page: bytes) -> dict[int, bytes]:
    assert int.from_bytes(page[2:4], "big") == len(page) - 4
    found, at = {}, 4
    while at < len(page):
        length = page[at + 3]
        found[int.from_bytes(page[at : at + 2], "big")] = page[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def test_supported_log_pages_can_all_be_read() -> None:
    disk = Disk()
    codes = list(log_page(disk, 0)[4:])
    assert codes == [0x00, 0x02, 0x03, 0x0C, 0x0D, 0x0E, 0x19]
    for code in codes:
        assert log_page(disk, code)[0] == code
    both = log_page(disk, 0, 0xFF)
    assert both[:2] == b"\x40\xff"
    assert [both[at] for at in range(4, len(both), 2) if both[at + 1] == 0] == codes


def test_counters_count() -> None:
    disk = Disk()
    disk.run("2A00 00000000 00 0004 00", bytes(4 * BLOCK))
    disk.run("2800 00000000 00 0002 00")
    disk.run("2800 FFFFFFFF 00 0001 00")
    assert int.from_bytes(parameters(log_page(disk, 0x02))[5], "big") == 4 * BLOCK
    assert int.from_bytes(parameters(log_page(disk, 0x03))[5], "big") == 2 * BLOCK
    general = parameters(log_page(disk, 0x19))[1]
    assert [int.from_bytes(general[at : at + 8], "big") for at in range(0, 32, 8)] == [1, 1, 4, 2]
    assert disk.unit.failures[0x28, ScsiStatus.CHECK_CONDITION] == 1


def test_provisioning_tells_the_space_in_threshold_sets() -> None:
    """SBC-3 §6.4.4."""
    disk = Disk()
    disk.run("2A00 00000000 00 0800 00", bytes(2048 * BLOCK))
    found = parameters(log_page(disk, 0x0C))
    assert int.from_bytes(found[2][:4], "big") == 1  # 1 MiB
    assert int.from_bytes(found[1][:4], "big") >= 1


@pytest.mark.parametrize(
    ("cdb", "byte"),
    [
        ("4D00 4500 0000 0000 FF00", 2),  # no such page
        ("4D00 4201 0000 0000 FF00", 3),  # no such subpage
        ("4D00 0200 0000 0000 FF00", 2),  # PC: thresholds
        ("4D00 4200 0000 0700 FF00", 5),  # PARAMETER POINTER beyond the last
        ("4D01 4200 0000 0000 FF00", 1),  # SP
    ],
)
def test_bad_log_requests_are_invalid_fields(cdb: str, byte: int) -> None:
    outcome = Disk().run(cdb)
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome)[0] == byte


def test_the_parameter_pointer_skips() -> None:
    assert list(parameters(log_page(Disk(), 0x02, pointer=5))) == [5, 6]
