"""FORMAT UNIT: refused, run, watched, interrupted (SBC-3 r36 §5.3)."""

import errno

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi.sanitize import Action, Plan, resume, stop
from protocol.scsi.sense import Sense
from storage.memory import Memory
from storage.wrap import Faulty
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, Keeper, make_nexus, sense_of, triple

GOOD = ScsiStatus.GOOD
FORMAT = "04 00 00 0000 00"
WITH_DATA, LONG = 0x10, 0x20
FOV, DPRY, DCRT, STPF, IP, IMMED = 0x80, 0x40, 0x20, 0x10, 0x08, 0x02
TUR = "000000000000"
IN_PROGRESS = triple(Sense.FORMAT_IN_PROGRESS)
CORRUPTED = triple(Sense.MEDIUM_FORMAT_CORRUPTED)


def cdb(flags: int) -> bytes:
    return bytes((0x04, flags, 0, 0, 0, 0))


def fill(disk: Disk) -> None:
    disk.backend.write(0, b"precious" * (BLOCKS * BLOCK // 8))  # type: ignore[union-attr]


def contents(disk: Disk) -> bytes:
    return bytes(disk.backend.read(0, BLOCKS * BLOCK))  # type: ignore[union-attr]


def mapped(disk: Disk) -> int:
    return sum(run.length for run in disk.backend.runs(0, BLOCKS * BLOCK) if run.mapped)  # type: ignore[union-attr]


def pattern(kind: int, data: bytes, flags: int = 0) -> bytes:
    return bytes((flags, kind)) + len(data).to_bytes(2, "big") + data


@pytest.mark.parametrize("thin", [True, False])
def test_all_blocks_read_as_zeros_and_a_thin_medium_gets_its_space_back(thin: bool) -> None:
    disk = Disk(thin=thin)
    fill(disk)
    assert disk.run(FORMAT).status == GOOD
    assert contents(disk) == bytes(BLOCKS * BLOCK)
    assert disk.run(TUR).status == GOOD
    assert (mapped(disk) == 0) == thin


@pytest.mark.parametrize(
    ("flags", "header"),
    [
        (WITH_DATA, bytes(4)),
        (WITH_DATA, bytes((0, FOV | DPRY | DCRT | STPF, 0, 0))),
        (WITH_DATA | 0x08 | 0x05, bytes((0, FOV, 0, 0))),  # CMPLST, a format for the defects that are none
        (WITH_DATA | LONG, bytes((0, IMMED, 0, 0, 0, 0, 0, 0))),
    ],
)
def test_parameter_lists_that_ask_for_no_more_than_a_format(flags: int, header: bytes) -> None:
    disk = Disk()
    fill(disk)
    assert disk.run(cdb(flags), header).status == GOOD
    assert contents(disk) == bytes(BLOCKS * BLOCK)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("descriptor", "block"),
    [
        (pattern(0, b""), bytes(BLOCK)),
        (pattern(1, b"\xa5"), b"\xa5" * BLOCK),
        (pattern(1, b"abc"), (b"abc" * 171)[:BLOCK]),
        (pattern(1, bytes(range(256)) * 2), bytes(range(256)) * 2),
    ],
)
def test_an_initialization_pattern_fills_every_block(descriptor: bytes, block: bytes, long: bool) -> None:
    disk = Disk()
    header = bytes((0, FOV | IP)) + bytes(6 if long else 2)
    assert disk.run(cdb(WITH_DATA | (LONG if long else 0)), header + descriptor).status == GOOD
    assert contents(disk) == block * BLOCKS


REFUSED_CDBS = [
    (cdb(0x08), b""),
    (cdb(LONG), b""),
    (cdb(0x05), b""),
    (cdb(0x80), b""),  # FMTPINFO: protection information
    (cdb(0x40 | WITH_DATA), bytes(4)),
    (bytes((0x04, 0, 1, 0, 0, 0)), b""),
]


@pytest.mark.parametrize(("refused", "data"), REFUSED_CDBS)
def test_fields_of_the_cdb_that_mean_what_is_not_there(refused: bytes, data: bytes) -> None:
    disk = Disk()
    fill(disk)
    assert sense_of(disk.run(refused, data)) == triple(Sense.INVALID_FIELD_IN_CDB)
    assert contents(disk)[:8] == b"precious"


REFUSED_LISTS = [
    (WITH_DATA, bytes((1, 0, 0, 0))),  # PROTECTION FIELD USAGE
    (WITH_DATA, bytes((0, DPRY, 0, 0))),  # without FOV
    (WITH_DATA, bytes((0, IP, 0, 0)) + pattern(0, b"")),
    (WITH_DATA, bytes((0, 0, 0, 8)) + bytes(8)),  # a defect list
    (WITH_DATA | LONG, bytes((0, 0, 0, 0x10, 0, 0, 0, 0))),
    (WITH_DATA | LONG, bytes((0, 0, 0, 0, 0, 0, 0, 4)) + bytes(4)),
    (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + pattern(1, b"x", 0x20)),  # SI
    (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + pattern(1, b"x", 0x40)),  # IP MODIFIER
    (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + pattern(2, b"x")),
    (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + pattern(1, b"")),
    (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + pattern(0, b"x")),
]


@pytest.mark.parametrize(("flags", "data"), REFUSED_LISTS)
def test_parameter_lists_that_ask_for_what_cannot_be(flags: int, data: bytes) -> None:
    disk = Disk()
    fill(disk)
    assert sense_of(disk.run(cdb(flags), data)) == triple(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
    assert contents(disk)[:8] == b"precious"
    assert disk.run(TUR).status == GOOD


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        (WITH_DATA, b""),
        (WITH_DATA, bytes(3)),
        (WITH_DATA | LONG, bytes(7)),
        (WITH_DATA, bytes(9 + BLOCK)),
        (WITH_DATA, bytes((0, FOV | IP, 0, 0, 0, 1))),
        (WITH_DATA, bytes((0, FOV | IP, 0, 0)) + bytes((0, 1, 0, 9)) + b"short"),
    ],
)
def test_parameter_lists_that_are_too_short_or_too_long(flags: int, data: bytes) -> None:
    disk = Disk()
    fill(disk)
    assert sense_of(disk.run(cdb(flags), data)) == triple(Sense.PARAMETER_LIST_LENGTH_ERROR)
    assert contents(disk)[:8] == b"precious"


def test_with_immed_it_is_watched_by_request_sense_and_by_every_command() -> None:
    lane, keeper = HeldLane(), Keeper()
    disk = Disk(lane=lane, keep=keeper)
    other = make_nexus(2)
    disk.login(other)
    assert disk.run(cdb(WITH_DATA), bytes((0, IMMED, 0, 0))).status == GOOD
    assert keeper.values["sanitize"]
    for nexus in (disk.nexus, other):
        assert sense_of(disk.run(TUR, nexus=nexus)) == IN_PROGRESS
        asked = disk.read("03 00 0000 FC 00", nexus=nexus)
        assert (asked[2] & 0x0F, asked[12], asked[13], asked[15]) == (2, 4, 4, 0x80)
        assert disk.run("12 00 00 00FF 00", nexus=nexus).status == GOOD
    assert sense_of(disk.run(FORMAT)) == IN_PROGRESS
    assert sense_of(disk.run("48 82 00000000 00 0000 00")) == IN_PROGRESS
    lane.release()
    assert disk.run(TUR).status == GOOD
    assert not keeper.values["sanitize"]


def test_one_that_fails_leaves_the_medium_corrupted_until_another_succeeds() -> None:
    backend = Faulty(Memory(BLOCKS * BLOCK))
    disk = Disk(backend=backend)
    backend.fail(errno.EIO, "unmap", times=1)
    assert sense_of(disk.run(FORMAT)) == triple(Sense.FORMAT_COMMAND_FAILED)
    assert sense_of(disk.run(TUR)) == CORRUPTED
    assert sense_of(disk.run("48 9F 00000000 00 0000 00")) == CORRUPTED  # EXIT FAILURE MODE is not for it
    assert disk.run(FORMAT).status == GOOD
    assert disk.run(TUR).status == GOOD


def test_it_goes_on_after_a_restart() -> None:
    lane = HeldLane()
    kept = {"sanitize": Plan(Action.FORMAT, unrestricted=False).export()}
    disk = Disk(lane=lane, keep=Keeper(), kept=kept)
    fill(disk)
    resume(disk.unit)
    assert sense_of(disk.run(TUR)) == IN_PROGRESS
    stop(disk.unit)
    lane.release()
    again = Disk(backend=disk.backend, keep=Keeper(), kept=disk.unit.kept)  # type: ignore[arg-type]
    resume(again.unit)
    assert contents(again) == bytes(BLOCKS * BLOCK)
    assert again.run(TUR).status == GOOD


@pytest.mark.parametrize("config", [{"read_only": True}])
def test_a_write_protected_medium_is_not_formatted(config: dict[str, bool]) -> None:
    disk = Disk(**config)
    fill(disk)
    assert sense_of(disk.run(FORMAT)) == triple(Sense.WRITE_PROTECTED)
    assert contents(disk)[:8] == b"precious"


@pytest.mark.parametrize("opcode", ["28", "2A", "A8", "AA", "88", "8A"])
def test_fua_nv_is_as_durable_as_fua(opcode: str) -> None:
    """NV_SUP is 0, so there is no cache but the volatile one to pass by."""
    disk = Disk(lane=HeldLane())
    raw = bytearray(bytes.fromhex(opcode).ljust(16, b"\0"))
    raw[1] = 0x02
    raw[{0x2: 8, 0xA: 9, 0x8: 13}[raw[0] >> 4]] = 1
    request = disk.start(bytes(raw), bytes(BLOCK) if raw[0] & 0x02 else b"")
    waits = request not in disk.delivered
    assert waits == bool(raw[0] & 0x02), "a durable write waits for the medium"
