"""MODE SENSE and MODE SELECT, and that a change is one (SPC-4 §6.11 to §6.14, §7.5; SBC-3 §6.5)."""

import errno

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.sense import Sense
from storage.base import Space
from storage.memory import Memory
from tests.scsi.support import (
    BLOCK,
    BLOCKS,
    Disk,
    HeldLane,
    Keeper,
    make_config,
    make_nexus,
    pointer_of,
    sense_of,
)

INVALID_FIELD_IN_CDB = (5, 0x24, 0x00)
INVALID_FIELD_IN_PARAMETER_LIST = (5, 0x26, 0x00)
PARAMETER_LIST_LENGTH_ERROR = (5, 0x1A, 0x00)
SAVING_NOT_SUPPORTED = (5, 0x39, 0x00)
SOFTWARE_WRITE_PROTECTED = (7, 0x27, 0x02)
WRITE_PROTECTED = (7, 0x27, 0x00)
MODE_PARAMETERS_CHANGED = (6, 0x2A, 0x01)

CURRENT, CHANGEABLE, DEFAULT, SAVED = 0x00, 0x40, 0x80, 0xC0
SWP, D_SENSE, WCE = "swp", "d_sense", "wce"


def sense6(disk: Disk, code: int, control: int = CURRENT, subpage: int = 0, dbd: int = 8) -> bytes:
    return disk.read(bytes((0x1A, dbd, control | code, subpage, 0xFF, 0)))


def control_page(disk: Disk, *, swp: bool = False, d_sense: bool = False) -> bytes:
    body = bytearray(sense6(disk, 0x0A)[4:])
    body[0] &= 0x7F
    body[2] = body[2] & ~0x04 | (0x04 if d_sense else 0)
    body[4] = body[4] & ~0x08 | (0x08 if swp else 0)
    return bytes(body)


def caching_page(disk: Disk, wce: bool) -> bytes:
    body = bytearray(sense6(disk, 0x08)[4:])
    body[0] &= 0x7F
    body[2] = 0x04 if wce else 0
    return bytes(body)


def select6(disk: Disk, pages: bytes, *, sp: bool = False, header: bytes = bytes(4), **more: object):  # type: ignore[no-untyped-def]
    data = header + pages
    return disk.run(bytes((0x15, 0x11 if sp else 0x10, 0, 0, len(data), 0)), data, **more)


WRITE_ONE = "2A00 00000000 00 0001 00"


def test_all_pages_fit_255_bytes_and_are_those_asked_for_one_by_one() -> None:
    """conformance MODE: same directly and via 3Fh."""
    disk = Disk()
    data = sense6(disk, 0x3F, dbd=0)
    assert data[0] == len(data) - 1 < 255
    assert data[3] == 8
    at, seen = 12, []
    while at < len(data):
        code, length = data[at] & 0x3F, data[at + 1] + 2
        assert sense6(disk, code)[4:] == data[at : at + length]
        seen.append(code)
        at += length
    assert seen == [0x01, 0x08, 0x0A, 0x1C]


def test_subpages_are_listed_with_ffh_only() -> None:
    """SPC-4 table 160."""
    disk = Disk()
    both = sense6(disk, 0x0A, subpage=0xFF)[4:]
    extension = sense6(disk, 0x0A, subpage=0x01)[4:]
    assert extension[0] & 0x7F == 0x4A and extension[1:4] == b"\x01\x00\x1c" and len(extension) == 32
    assert both == sense6(disk, 0x0A)[4:] + extension
    assert sense6(disk, 0x3F, subpage=0xFF)[4:].count(extension) == 1


@pytest.mark.parametrize(("code", "subpage", "byte"), [(0x05, 0, 2), (0x08, 1, 3), (0x3F, 1, 3)])
def test_a_page_that_is_not_there_is_an_invalid_field(code: int, subpage: int, byte: int) -> None:
    outcome = Disk().run(bytes((0x1A, 8, code, subpage, 0xFF, 0)))
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome)[0] == byte


@pytest.mark.parametrize(
    ("cdb", "descriptor"),
    [
        ("1A00 0A00 FF00", "0000100000000200"),
        ("5A00 0A00 0000 00 00FF 00", "0000100000000200"),
        ("5A10 0A00 0000 00 00FF 00", "00000000000010000000000000000200"),  # LLBAA
    ],
)
def test_the_block_descriptor_tells_capacity_and_block_length(cdb: str, descriptor: str) -> None:
    """SBC-3 §6.5.2."""
    data = Disk().read(cdb)
    head = 4 if cdb.startswith("1A") else 8
    length = data[3] if head == 4 else int.from_bytes(data[6:8], "big")
    assert data[head : head + length].hex() == descriptor
    total = data[0] + 1 if head == 4 else int.from_bytes(data[0:2], "big") + 2
    assert total == len(data)


def test_the_header_tells_write_protection_and_dpofua() -> None:
    """SBC-3 §6.5.1: WP 80h, DPOFUA 10h."""
    assert sense6(Disk(), 0x0A)[2] == 0x10
    assert sense6(Disk(read_only=True), 0x0A)[2] == 0x90
    assert sense6(Disk(backend=Memory(BLOCK * BLOCKS, read_only=True)), 0x0A)[2] == 0x90


def test_the_changeable_mask_is_what_can_be_changed() -> None:
    disk = Disk()
    assert sense6(disk, 0x0A, CHANGEABLE)[4:] == bytes((0x0A, 10, 0x04, 0, 0x08, 0, 0, 0, 0, 0, 0, 0))
    assert sense6(disk, 0x08, CHANGEABLE)[4:] == bytes((0x08, 18, 0x04)) + bytes(17)
    assert not any(sense6(disk, 0x1C, CHANGEABLE)[6:])


def test_swp_protects_from_writes_until_it_is_cleared_or_the_unit_is_reset() -> None:
    """SPC-4 §7.5.8: SOFTWARE WRITE PROTECT; SAM-5 §6.3.3: a reset brings back the saved pages."""
    disk = Disk()
    assert select6(disk, control_page(disk, swp=True)).status == ScsiStatus.GOOD
    assert sense6(disk, 0x0A)[2] & 0x80
    assert sense_of(disk.run(WRITE_ONE, bytes(BLOCK))) == SOFTWARE_WRITE_PROTECTED
    assert disk.run("2800 00000000 00 0001 00").status == ScsiStatus.GOOD
    assert select6(disk, control_page(disk, swp=False)).status == ScsiStatus.GOOD
    assert disk.run(WRITE_ONE, bytes(BLOCK)).status == ScsiStatus.GOOD
    select6(disk, control_page(disk, swp=True))
    disk.unit.reset(None)
    disk.run("000000000000")
    assert disk.run(WRITE_ONE, bytes(BLOCK)).status == ScsiStatus.GOOD


def test_a_read_only_unit_stays_write_protected() -> None:
    assert sense_of(Disk(read_only=True).run(WRITE_ONE, bytes(BLOCK))) == WRITE_PROTECTED


def test_d_sense_changes_the_format_of_sense_data() -> None:
    """SPC-4 §4.5.1."""
    disk = Disk()
    assert disk.run("2800 FFFFFFFF 00 0001 00").sense[0] == 0x70
    select6(disk, control_page(disk, d_sense=True))
    assert disk.run("2800 FFFFFFFF 00 0001 00").sense[0] == 0x72


class Flushes(Memory):
    """Counts what must be durable."""

    def __init__(self) -> None:
        super().__init__(BLOCK * BLOCKS)
        self.flushes = 0
        self.durable_writes = 0

    def flush(self, offset: int = 0, length: int = 0) -> None:
        self.flushes += 1

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:  # type: ignore[override]
        self.durable_writes += durable
        super().write(offset, data, durable=durable)


def test_clearing_wce_flushes_and_makes_every_write_durable() -> None:
    """SBC-3 §6.5.5."""
    backend = Flushes()
    disk = Disk(backend=backend)
    disk.run(WRITE_ONE, bytes(BLOCK))
    assert (backend.flushes, backend.durable_writes) == (0, 0)
    assert select6(disk, caching_page(disk, wce=False)).status == ScsiStatus.GOOD
    assert backend.flushes == 1
    assert sense6(disk, 0x08)[6] & 0x04 == 0
    disk.run(WRITE_ONE, bytes(BLOCK))
    assert backend.durable_writes == 1
    select6(disk, caching_page(disk, wce=True))
    disk.run(WRITE_ONE, bytes(BLOCK))
    assert backend.durable_writes == 1


def test_wce_stays_when_the_flush_fails() -> None:
    class Failing(Memory):
        def flush(self, offset: int = 0, length: int = 0) -> None:
            raise OSError(errno.EIO, "x")

    disk = Disk(backend=Failing(BLOCK * BLOCKS))
    outcome = select6(disk, caching_page(disk, wce=False))
    assert outcome.status == ScsiStatus.CHECK_CONDITION
    assert disk.unit.write_cache


def test_clearing_wce_does_not_answer_before_the_flush_is_done() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane)
    page = bytes(4) + caching_page(disk, wce=False)
    request = disk.start(bytes((0x15, 0x10, 0, 0, len(page), 0)), page)
    assert request not in disk.delivered
    assert disk.unit.write_cache
    lane.release()
    assert disk.delivered[request].status == ScsiStatus.GOOD
    assert not disk.unit.write_cache


def test_a_change_is_an_attention_to_the_other_nexuses_only() -> None:
    """SPC-4 §6.11: MODE PARAMETERS CHANGED for all others; a change to what is already is none."""
    disk = Disk()
    other = make_nexus(2)
    disk.login(other)
    select6(disk, control_page(disk, d_sense=False))
    assert disk.run("000000000000", nexus=other).status == ScsiStatus.GOOD
    select6(disk, control_page(disk, swp=True))
    assert disk.run("000000000000").status == ScsiStatus.GOOD
    assert sense_of(disk.run("000000000000", nexus=other)) == MODE_PARAMETERS_CHANGED
    assert disk.run("000000000000", nexus=other).status == ScsiStatus.GOOD


GOOD_CONTROL = "0A0A 0010 0000 0000 FFFF 0000"
BAD_LISTS = [
    # (header and descriptor, pages, expected, pointer byte)
    ("00000000", "0A0A 0010 0000 0000 FFFF", PARAMETER_LIST_LENGTH_ERROR, None),
    ("00000000", "0A", PARAMETER_LIST_LENGTH_ERROR, None),
    ("000000", "", PARAMETER_LIST_LENGTH_ERROR, None),
    ("00010000", GOOD_CONTROL, INVALID_FIELD_IN_PARAMETER_LIST, 1),
    ("00000004 00000000", GOOD_CONTROL, INVALID_FIELD_IN_PARAMETER_LIST, 3),
    ("00000008 00000000 00000400", GOOD_CONTROL, INVALID_FIELD_IN_PARAMETER_LIST, 9),
    ("00000008 00000001 00000200", GOOD_CONTROL, INVALID_FIELD_IN_PARAMETER_LIST, 4),
    ("00000000", "0A0B 0010 0000 0000 FFFF 0000 00", INVALID_FIELD_IN_PARAMETER_LIST, 5),
    ("00000000", "0A0A 2010 0000 0000 FFFF 0000", INVALID_FIELD_IN_PARAMETER_LIST, 6),
    ("00000000", "050A 0010 0000 0000 FFFF 0000", INVALID_FIELD_IN_PARAMETER_LIST, 4),
    # the first page is fine, the second is not: neither counts
    ("00000000", "0A0A 0010 0800 0000 FFFF 0000 080A", INVALID_FIELD_IN_PARAMETER_LIST, 17),
]


@pytest.mark.parametrize(("header", "pages", "expected", "byte"), BAD_LISTS)
def test_a_bad_parameter_list_changes_nothing(
    header: str, pages: str, expected: tuple[int, int, int], byte: int | None
) -> None:
    disk = Disk()
    before = disk.unit.mode
    outcome = select6(disk, bytes.fromhex(pages), header=bytes.fromhex(header))
    assert sense_of(outcome) == expected
    if byte is not None:
        assert pointer_of(outcome)[0] == byte
        assert not pointer_of(outcome)[2]
    assert disk.unit.mode == before


@pytest.mark.parametrize(
    "cdb", ["1510 0000 0000", "5510 0000 0000 00 0000 00"], ids=["MODE SELECT(6)", "MODE SELECT(10)"]
)
def test_an_empty_parameter_list_is_no_error(cdb: str) -> None:
    """SPC-4 §6.11: a length of zero shall not be considered as an error."""
    assert Disk().run(cdb).status == ScsiStatus.GOOD


def test_mode_select_10_takes_a_long_block_descriptor() -> None:
    disk = Disk()
    pages = bytes.fromhex("0A0A 0410 0000 0000 FFFF 0000")
    data = (
        bytes.fromhex("0000 0000 0100 0010") + BLOCKS.to_bytes(8, "big") + bytes(4) + BLOCK.to_bytes(4, "big")
    )
    data += pages
    assert disk.run(bytes((0x55, 0x10, 0, 0, 0, 0, 0, 0, len(data), 0)), data).status == ScsiStatus.GOOD
    assert disk.unit.descriptor_sense


def test_less_data_than_the_parameter_list_length_is_an_error() -> None:
    disk = Disk()
    assert sense_of(disk.run("1510 0000 1000", bytes(4))) == PARAMETER_LIST_LENGTH_ERROR


def test_pages_without_a_keeper_cannot_be_saved() -> None:
    """SPC-4 §6.13.1.4: SAVING PARAMETERS NOT SUPPORTED; PS is zero."""
    disk = Disk()
    assert sense_of(disk.run("1A08 CA00 FF00")) == SAVING_NOT_SUPPORTED
    assert sense6(disk, 0x0A)[4] & 0x80 == 0
    outcome = select6(disk, caching_page(disk, wce=False), sp=True)
    assert sense_of(outcome) == INVALID_FIELD_IN_CDB
    assert pointer_of(outcome) == (1, 0, True)


def test_saved_pages_outlive_reset_and_restart() -> None:
    keeper = Keeper()
    disk = Disk(keep=keeper)
    assert sense6(disk, 0x08)[4] & 0x80  # PS
    assert select6(disk, caching_page(disk, wce=False), sp=True).status == ScsiStatus.GOOD
    assert sense6(disk, 0x08, SAVED)[6] & 0x04 == 0
    assert sense6(disk, 0x08, DEFAULT)[6] & 0x04 == 0x04
    disk.unit.reset(None)
    assert not disk.unit.write_cache
    again = Disk(keep=keeper, kept=keeper.values)
    assert not again.unit.write_cache


def test_pages_that_could_not_be_stored_are_not_changed() -> None:
    keeper = Keeper()
    keeper.error = OSError(errno.ENOSPC, "x")
    disk = Disk(keep=keeper)
    outcome = select6(disk, caching_page(disk, wce=False), sp=True)
    assert outcome.status == ScsiStatus.CHECK_CONDITION
    assert disk.unit.write_cache
    assert not disk.unit.tasks


def test_attention_for_the_threshold_comes_once_per_crossing() -> None:
    """SBC-3 §4.7.3.7: THIN PROVISIONING SOFT THRESHOLD REACHED."""
    disk = Disk(threshold=20)
    raised = []
    for left in (21, 20, 15, 21, 19, 30, 10):
        disk.unit.note_space(Space(used=1 << 20, available=left << 20, total=100 << 20))
        raised.append(disk.unit.take_attention(disk.nexus))
    reached = Sense.THIN_PROVISIONING_SOFT_THRESHOLD
    assert raised == [None, reached, None, None, None, None, reached]
    page = sense6(disk, 0x1C, subpage=0x02)[4:]
    assert page[16:] == bytes((0x82, 0x01, 0, 0, 0, 0, 0, 20))


def test_a_medium_that_has_all_it_can_take_is_not_running_out() -> None:
    """A device, or a file that is full to its end: nothing more will be asked of the host."""
    disk = Disk(threshold=20)
    assert disk.unit.geometry is not None
    disk.unit.note_space(Space(used=disk.unit.geometry.size_bytes, available=0))
    assert disk.unit.take_attention(disk.nexus) is None


def test_a_threshold_that_changes_is_told_and_looked_at_anew() -> None:
    """SPC-4 §5.14: mode parameters changed, inquiry data changed (THRESHOLD PERCENTAGE of VPD page B2h)."""
    disk = Disk(threshold=20)
    disk.unit.note_space(Space(used=90 << 20, available=10 << 20))
    disk.unit.take_attention(disk.nexus)
    disk.unit.reconfigure(make_config(threshold=30), disk.unit.backend)
    disk.unit.note_space(Space(used=90 << 20, available=10 << 20))
    told = [disk.unit.take_attention(disk.nexus) for _ in range(4)]
    assert told == [
        Sense.MODE_PARAMETERS_CHANGED,
        Sense.INQUIRY_DATA_CHANGED,
        Sense.THIN_PROVISIONING_SOFT_THRESHOLD,
        None,
    ]


def test_units_over_one_medium_share_their_mode_parameters_and_what_is_saved() -> None:
    """WCE decides what becomes of the medium's data, whoever writes it; who did not change it is told."""
    keeper = Keeper()
    backend = Memory(BLOCKS * BLOCK)
    one, two = Disk(backend=backend, keep=keeper), Disk(backend=backend, keep=keeper, serial="2")
    two.unit.share_medium(one.unit)
    assert select6(one, caching_page(one, wce=False), sp=True).status == ScsiStatus.GOOD
    assert not two.unit.write_cache
    assert one.unit.take_attention(one.nexus) is None
    assert two.unit.take_attention(two.nexus) is Sense.MODE_PARAMETERS_CHANGED
    late = Disk(backend=backend, keep=keeper, serial="3")
    late.unit.share_medium(two.unit)
    assert not late.unit.write_cache
    select6(one, caching_page(one, wce=True))
    two.unit.reset(two.nexus)  # back to what was saved, for all
    assert not one.unit.write_cache
    assert one.unit.take_attention(one.nexus) is Sense.BUS_DEVICE_RESET, "they are one logical unit"
