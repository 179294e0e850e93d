"""SANITIZE: refused, run, watched, interrupted (SBC-3 r36 §4.11, §5.24)."""

import json
from itertools import accumulate

import pytest

from protocol.enums import ScsiStatus
from protocol.scsi import sanitize
from protocol.scsi.device import LogicalUnit, Reset
from protocol.scsi.sanitize import Action, Operation, Plan, resume, stop
from protocol.scsi.sense import Sense
from storage.base import Buffer
from storage.memory import Memory
from tests.scsi.support import BLOCK, BLOCKS, Disk, HeldLane, Keeper, describe, make_config, sense_of, triple

GOOD = ScsiStatus.GOOD
INVALID_FIELD_IN_CDB = triple(Sense.INVALID_FIELD_IN_CDB)
INVALID_FIELD_IN_PARAMETER_LIST = triple(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
IN_PROGRESS = triple(Sense.SANITIZE_IN_PROGRESS)
FAILED = triple(Sense.SANITIZE_COMMAND_FAILED)

IMMED, AUSE = 0x80, 0x20
TUR = "000000000000"
READ10 = "28000000000000000100"
START = "1b0000000100"
INQUIRY = "12000000ff00"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OVERWRITE without its pauses; what they are for is not a matter of a unit test."""
    monkeypatch.setattr(sanitize, "OVERWRITE_SECONDS", 0.0)


def cdb(action: int, length: int = 0, flags: int = 0) -> bytes:
    return bytes((0x48, action | flags, 0, 0, 0, 0, 0)) + length.to_bytes(2, "big") + b"\0"


def overwrite(pattern: bytes, passes: int = 1, flags: int = 0, byte0: int = 0) -> tuple[bytes, bytes]:
    data = bytes((passes | byte0, 0)) + len(pattern).to_bytes(2, "big") + pattern
    return cdb(Action.OVERWRITE, len(data), flags), data


def fill(disk: Disk) -> None:
    disk.backend.write(0, b"secret!!" * (BLOCKS * BLOCK // 8))  # type: ignore[union-attr]


def contents(disk: Disk) -> bytes:
    return bytes(disk.backend.read(0, BLOCKS * BLOCK))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pattern", "passes", "byte0", "block"),
    [
        (b"\xaa" * BLOCK, 1, 0, b"\xaa" * BLOCK),
        (b"\xaa" * (BLOCK // 2), 1, 0, b"\xaa" * BLOCK),
        (b"abc", 1, 0, (b"abc" * 171)[:BLOCK]),
        (b"\x0f", 2, 0x80, b"\xf0" * BLOCK),
        (b"\x0f", 3, 0x80, b"\x0f" * BLOCK),
        (b"\x0f", 2, 0, b"\x0f" * BLOCK),
    ],
    ids=["block", "half", "ragged", "inverted twice", "inverted thrice", "twice"],
)
def test_overwrite_fills_every_block_with_its_pattern(
    pattern: bytes, passes: int, byte0: int, block: bytes
) -> None:
    """§5.24.2.2; the pattern is cut at the end of each block; INVERT turns it over after each pass."""
    disk = Disk()
    fill(disk)
    assert disk.run(*overwrite(pattern, passes, byte0=byte0)).status == GOOD
    assert contents(disk) == block * BLOCKS
    assert disk.run(TUR).status == GOOD


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("blocks", [1, 7, 64, 100, 2048, 5 * 2048 + 1])
def test_an_overwrite_of_any_size_can_be_seen_under_way(
    monkeypatch: pytest.MonkeyPatch, blocks: int, passes: int
) -> None:
    """It takes OVERWRITE_SECONDS, in pauses that divide it evenly."""
    monkeypatch.setattr(sanitize, "OVERWRITE_SECONDS", 8.0)
    operation = Operation(Plan(Action.OVERWRITE, False, b"\xaa", passes))
    pauses: list[tuple[float, float]] = []

    def wait(timeout: float | None = None) -> bool:
        assert timeout is not None
        pauses.append((operation.done / operation.total, timeout))
        return False

    monkeypatch.setattr(operation.stopped, "wait", wait)
    assert operation.work(Memory(blocks * BLOCK), blocks * BLOCK, BLOCK, False)
    waited = list(accumulate(pause for _, pause in pauses))
    assert waited == pytest.approx([8.0 * done for done, _ in pauses])
    assert 7.5 <= waited[-1] <= 8.0 + 1e-9
    assert len(pauses) >= min(blocks * passes, 32)


@pytest.mark.parametrize("action", [Action.BLOCK_ERASE, Action.CRYPTOGRAPHIC_ERASE])
def test_erased_blocks_read_as_zeros_and_are_all_deallocated(action: Action) -> None:
    disk = Disk()
    fill(disk)
    assert disk.run(cdb(action)).status == GOOD
    assert contents(disk) == bytes(BLOCKS * BLOCK)
    status = disk.read("9e12" + "00" * 8 + "00000100" + "0000")
    assert status[8:] == bytes(8) + BLOCKS.to_bytes(4, "big") + b"\x01\0\0\0"


def test_a_medium_that_cannot_unmap_is_zeroed() -> None:
    class Thick(Memory):
        def __init__(self) -> None:
            super().__init__(BLOCKS * BLOCK)
            from dataclasses import replace

            self.capabilities = replace(self.capabilities, unmap=False)

        def unmap(self, offset: int, length: int) -> None:
            raise AssertionError("it cannot")

    disk = Disk(backend=Thick())
    fill(disk)
    assert disk.run(cdb(Action.BLOCK_ERASE)).status == GOOD
    assert contents(disk) == bytes(BLOCKS * BLOCK)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        *(((cdb(Action.OVERWRITE, n), bytes(n)), INVALID_FIELD_IN_CDB) for n in range(5)),
        ((cdb(Action.OVERWRITE, BLOCK + 5), bytes(BLOCK + 5)), INVALID_FIELD_IN_CDB),
        ((cdb(Action.BLOCK_ERASE, 8), bytes(8)), INVALID_FIELD_IN_CDB),
        ((cdb(Action.CRYPTOGRAPHIC_ERASE, 8), bytes(8)), INVALID_FIELD_IN_CDB),
        ((cdb(Action.EXIT_FAILURE_MODE, 8), bytes(8)), INVALID_FIELD_IN_CDB),
        ((cdb(0x04), b""), INVALID_FIELD_IN_CDB),
        ((cdb(Action.BLOCK_ERASE, flags=0x40), b""), INVALID_FIELD_IN_CDB),
        (("48020001000000000000", b""), INVALID_FIELD_IN_CDB),
        (overwrite(b"\xaa" * BLOCK, passes=0), INVALID_FIELD_IN_PARAMETER_LIST),
        ((cdb(Action.OVERWRITE, 8), bytes((1, 0, 0, 0, 1, 2, 3, 4))), INVALID_FIELD_IN_PARAMETER_LIST),
        ((cdb(Action.OVERWRITE, 8), bytes((1, 0, 0, 5, 1, 2, 3, 4))), INVALID_FIELD_IN_PARAMETER_LIST),
        ((cdb(Action.OVERWRITE, 8), bytes((1, 0, 2, 4, 1, 2, 3, 4))), INVALID_FIELD_IN_PARAMETER_LIST),
    ],
)
def test_malformed_requests_are_refused_and_erase_nothing(
    command: tuple[bytes | str, bytes], expected: tuple[int, int, int]
) -> None:
    """§5.24.2."""
    disk = Disk()
    fill(disk)
    before = contents(disk)
    outcome = disk.run(*command)
    assert sense_of(outcome) == expected, describe(outcome)
    assert contents(disk) == before
    assert disk.run(TUR).status == GOOD


def test_a_write_protected_unit_is_not_sanitized() -> None:
    assert sense_of(Disk(read_only=True).run(cdb(Action.BLOCK_ERASE))) == triple(Sense.WRITE_PROTECTED)


def test_while_it_runs_only_what_needs_no_medium_is_let_in() -> None:
    """§4.11.3: NOT READY, SANITIZE IN PROGRESS, with progress; INQUIRY works."""
    lane = HeldLane()
    disk = Disk(lane=lane)
    task = disk.start(cdb(Action.BLOCK_ERASE))
    for command in (TUR, READ10, START):
        assert sense_of(disk.run(command)) == IN_PROGRESS
    assert sense_of(disk.run(cdb(Action.BLOCK_ERASE))) == IN_PROGRESS
    assert sense_of(disk.run(cdb(Action.EXIT_FAILURE_MODE))) == IN_PROGRESS
    assert disk.run(INQUIRY).status == GOOD
    assert disk.read("030000001200")[12:14] == bytes((0x04, 0x1B))
    lane.release()
    assert disk.delivered[task].status == GOOD
    assert disk.run(TUR).status == GOOD


def test_with_immed_it_is_answered_before_it_is_done() -> None:
    lane = HeldLane()
    disk = Disk(lane=lane)
    assert disk.run(cdb(Action.BLOCK_ERASE, flags=IMMED)).status == GOOD
    assert sense_of(disk.run(TUR)) == IN_PROGRESS
    lane.release()
    assert disk.run(TUR).status == GOOD


@pytest.mark.parametrize(
    "interrupt",
    [
        lambda disk, task: disk.unit.abort(task),
        lambda disk, task: disk.unit.abort_task_set(disk.nexus),
        lambda disk, task: disk.unit.reset(None, Reset.LOGICAL_UNIT),
        lambda disk, task: disk.target.reset(None, Reset.TARGET_COLD),
        lambda disk, task: (disk.target.detach(disk.nexus), disk.login(disk.nexus)),
    ],
    ids=["abort", "abort set", "lun reset", "cold reset", "logout"],
)
def test_nothing_that_happens_to_the_command_stops_it(interrupt) -> None:
    """§4.11.2."""
    lane = HeldLane()
    disk = Disk(lane=lane)
    fill(disk)
    task = disk.start(cdb(Action.BLOCK_ERASE))
    interrupt(disk, task)
    disk.unit.attentions.forget(disk.nexus)
    assert sense_of(disk.run(TUR)) == IN_PROGRESS
    lane.release()
    assert contents(disk) == bytes(BLOCKS * BLOCK)
    assert disk.run(TUR).status == GOOD
    assert task not in disk.delivered


def test_it_waits_for_writes_that_are_under_way() -> None:
    """What is still on its way to the medium must not land behind it."""

    class Cold(Memory):
        def write_nowait(self, offset: int, data: Buffer) -> bool:
            return False

    lane = HeldLane()
    disk = Disk(lane=lane, backend=Cold(BLOCKS * BLOCK))
    write = disk.start("2a000000000000000100", b"x" * BLOCK)
    task = disk.start(cdb(Action.BLOCK_ERASE))
    lane.release()
    assert disk.delivered[write].status == GOOD
    assert task not in disk.delivered
    lane.release()
    assert disk.delivered[task].status == GOOD
    assert contents(disk) == bytes(BLOCKS * BLOCK)


def test_it_is_kept_before_it_starts_and_begins_again_after_a_restart() -> None:
    """§4.11.2: power loss does not end it."""
    keeper, lane = Keeper(), HeldLane()
    disk = Disk(lane=lane, keep=keeper)
    disk.start(*overwrite(b"\x5a", flags=IMMED))
    assert keeper.values["sanitize"]
    stop(disk.unit)
    lane.release()
    assert keeper.values["sanitize"], "the record outlives a stop"

    again = Disk(lane=lane, keep=keeper, kept=keeper.values)
    resume(again.unit)
    assert sense_of(again.run(TUR)) == IN_PROGRESS
    lane.release()
    assert contents(again) == b"\x5a" * (BLOCKS * BLOCK)
    assert again.run(TUR).status == GOOD
    assert keeper.values["sanitize"] == b""
    resume(again.unit)
    assert again.unit.locked is None


def test_what_cannot_be_kept_is_not_begun() -> None:
    keeper = Keeper()
    keeper.error = OSError(28, "No space left on device")
    disk = Disk(keep=keeper)
    fill(disk)
    before = contents(disk)
    assert disk.run(cdb(Action.BLOCK_ERASE)).status == ScsiStatus.CHECK_CONDITION
    assert contents(disk) == before
    assert disk.run(TUR).status == GOOD


class Broken(Memory):
    """Fails until mended."""

    mended = False

    def unmap(self, offset: int, length: int) -> None:
        if not self.mended:
            raise OSError(5, "Input/output error")
        super().unmap(offset, length)


@pytest.mark.parametrize("flags", [0, AUSE])
def test_a_failure_locks_the_unit_until_ause_lets_it_go_or_another_succeeds(flags: int) -> None:
    """§4.11.4: restricted and unrestricted completion mode."""
    backend = Broken(BLOCKS * BLOCK)
    keeper = Keeper()
    disk = Disk(backend=backend, keep=keeper)
    assert sense_of(disk.run(cdb(Action.BLOCK_ERASE, flags=flags))) == FAILED
    assert sense_of(disk.run(READ10)) == FAILED
    assert json.loads(keeper.values["sanitize"])["failed"]
    if flags:
        assert disk.run(cdb(Action.EXIT_FAILURE_MODE)).status == GOOD
        assert keeper.values["sanitize"] == b""
    else:
        assert sense_of(disk.run(cdb(Action.EXIT_FAILURE_MODE))) == INVALID_FIELD_IN_CDB
        backend.mended = True
        assert disk.run(cdb(Action.BLOCK_ERASE)).status == GOOD
    assert disk.run(READ10).status == GOOD


def test_exit_failure_mode_without_a_failure_is_good() -> None:
    assert Disk().run(cdb(Action.EXIT_FAILURE_MODE)).status == GOOD


def test_every_unit_that_shows_the_extent_is_locked() -> None:
    """Two block sizes, one medium."""
    lane = HeldLane()
    disk = Disk(lane=lane)
    other = LogicalUnit(
        make_config(block_size=4096),
        disk.unit.backend,
        lane,
        reservations=disk.unit.reservations,
        now=disk.unit.now,
    )
    disk.unit.reservations.units.add(other)  # type: ignore[attr-defined]
    disk.start(cdb(Action.BLOCK_ERASE))
    assert isinstance(other.locked, Operation)
    lane.release()
    assert other.locked is None


@pytest.mark.parametrize("stored", [b"{", b"[]", b"{}", b'{"action": 99}'])
def test_a_record_that_cannot_be_read_is_an_error(stored: bytes) -> None:
    with pytest.raises(ValueError, match="stored SANITIZE"):
        Plan.restore(stored)


def test_a_record_comes_back_as_it_was() -> None:
    plan = Plan(Action.OVERWRITE, True, b"\x00\xff", 3, True, True)
    assert Plan.restore(plan.export()) == plan
