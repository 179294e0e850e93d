"""SANITIZE: make everything on the medium unreadable, in the background, to the end.

An operation is a small record that is kept before it starts and forgotten when it is done, so it survives
resets, lost sessions and restarts of the daemon: ``resume`` begins it again. While it runs, or after it has
failed, every unit that shows the extent is locked, and the lock is the ``Operation`` itself.

Nothing encrypts here, so CRYPTOGRAPHIC ERASE erases blocks: what it promises, that nothing written before
can be read back, holds. BLOCK ERASE unmaps, or zeroes what keeps its space; only OVERWRITE writes every
block in place. What a host file system does underneath (snapshots, copy on write) no target can undo.

Source: SBC-3 r36 §4.11, §5.24.
"""

import base64
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from threading import Event
from typing import TYPE_CHECKING

from protocol.scsi.block import medium, set_range
from protocol.scsi.limits import COPY_CHUNK_BYTES, LIMITED_SPACE_CHUNK_BYTES, SPACE_CHUNK_BYTES, pieces
from protocol.scsi.provisioning import allocated
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import CheckCondition, Sense
from protocol.scsi.taskset import Throttle
from storage.base import Backend

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "KEPT_AS",
    "Action",
    "Operation",
    "Plan",
    "begin",
    "check_idle",
    "exit_failure_mode",
    "prepare_sanitize",
    "resume",
    "sanitize",
    "stop",
]

log = logging.getLogger(__name__)

KEPT_AS = "sanitize"
"""Under what name ``LogicalUnit.keep`` stores an operation that has not ended."""

OVERWRITE_SECONDS = 8.0
"""An OVERWRITE lasts at least this long in all. Operators, and libiscsi's suite, look for one in progress:
one that is over before they look is taken for one that never ran."""

_STEPS = 64
"""An OVERWRITE pauses after each of so many parts of its work."""


class Action(IntEnum):
    """Service actions of SANITIZE (SBC-3 table 96), and FORMAT UNIT, which works in the same way."""

    FORMAT = 0x00
    OVERWRITE = 0x01
    BLOCK_ERASE = 0x02
    CRYPTOGRAPHIC_ERASE = 0x03
    EXIT_FAILURE_MODE = 0x1F


_IMMED, _AUSE = 0x80, 0x20
_INVERT = 0x80
_HEADER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done: all that must survive a restart."""

    action: int
    unrestricted: bool
    """AUSE: a failure may be left by EXIT FAILURE MODE."""
    pattern: bytes = b""
    """OVERWRITE: what fills each block. FORMAT: the same, or nothing, and the blocks are given back."""
    passes: int = 1
    invert: bool = False
    failed: bool = False

    def export(self) -> bytes:
        """For ``restore`` after a restart."""
        return json.dumps(
            {
                "action": self.action,
                "unrestricted": self.unrestricted,
                "pattern": base64.b64encode(self.pattern).decode(),
                "passes": self.passes,
                "invert": self.invert,
                "failed": self.failed,
            }
        ).encode()

    @classmethod
    def restore(cls, stored: bytes) -> "Plan":
        """What ``export`` gave.

        Raises:
            ValueError: it is not that.
        """
        try:
            data = json.loads(stored)
            return cls(
                Action(data["action"]),
                bool(data["unrestricted"]),
                base64.b64decode(data["pattern"]),
                int(data["passes"]),
                bool(data["invert"]),
                bool(data["failed"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the stored SANITIZE cannot be read: {error!r}") from error


class Operation:
    """One SANITIZE, under way or failed. It is what the unit is locked with."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.least_s = 0.0 if plan.action == Action.FORMAT else OVERWRITE_SECONDS
        self.throttle: Callable[[], Throttle | None] = lambda: None
        """The I/O limits of the extent now."""
        self.total = 1
        self.done = 0
        """Of ``total`` bytes; written by the worker, read by everybody."""
        self.stopped = Event()
        """The daemon is closing: give up; the kept record begins again at the next start."""

    def __call__(self) -> CheckCondition:
        """Why the unit refuses a command: it is IN PROGRESS, with how far it is, or it has failed."""
        if self.plan.failed:
            return CheckCondition(self.failure)
        under_way = Sense.FORMAT_IN_PROGRESS if self.formats else Sense.SANITIZE_IN_PROGRESS
        return CheckCondition(under_way, progress=self.done * 0xFFFF // self.total)

    @property
    def formats(self) -> bool:
        """It is a FORMAT UNIT."""
        return self.plan.action == Action.FORMAT

    @property
    def name(self) -> str:
        """For the log."""
        return "FORMAT UNIT" if self.formats else "SANITIZE"

    @property
    def failure(self) -> Sense:
        """What the unit answers after it has failed."""
        return Sense.MEDIUM_FORMAT_CORRUPTED if self.formats else Sense.SANITIZE_COMMAND_FAILED

    def _may_move(self, length: int) -> bool:
        """Wait for the share of I/O limits; False: stopped."""
        throttle = self.throttle()
        return throttle is None or throttle.spend(length, self.stopped.is_set)

    def work(self, backend: Backend, size_bytes: int, block_size: int, thin: bool) -> bool:
        """Do it, on a worker; False: stopped before the end. ``thin``: what is erased may be given back.

        Raises:
            OSError: the medium failed.
        """
        if self.plan.action == Action.OVERWRITE or (self.formats and any(self.plan.pattern)):
            finished = self._overwrite(backend, size_bytes, block_size)
        else:
            finished = self._erase(backend, size_bytes, thin)
        if finished:
            backend.flush()
        return finished

    def _erase(self, backend: Backend, size_bytes: int, thin: bool) -> bool:
        able = backend.capabilities
        clear = backend.unmap if thin and able.unmap and able.unmap_reads_zero else backend.write_zeroes
        self.total = max(1, size_bytes)
        limited = self.throttle() is not None
        for offset, length in pieces(
            0, size_bytes, LIMITED_SPACE_CHUNK_BYTES if limited else SPACE_CHUNK_BYTES
        ):
            if self.stopped.is_set() or (limited and not self._may_move(allocated(backend, offset, length))):
                return False
            clear(offset, length)
            self.done = offset + length
        return True

    def _overwrite(self, backend: Backend, size_bytes: int, block_size: int) -> bool:
        """The pattern fills each block, cut at its end; INVERT turns it over after each pass."""
        plan = self.plan
        self.total = max(1, size_bytes * plan.passes)
        step = max(block_size, self.total // _STEPS)
        paused = 0
        piece = min(COPY_CHUNK_BYTES, step) // block_size * block_size
        block = (plan.pattern * -(-block_size // len(plan.pattern)))[:block_size]
        for number in range(plan.passes):
            current = bytes(byte ^ 0xFF for byte in block) if plan.invert and number % 2 else block
            data = memoryview(current * (piece // block_size))
            for offset, length in pieces(0, size_bytes, len(data)):
                if self.stopped.is_set() or not self._may_move(length):
                    return False
                backend.write(offset, data[:length])
                self.done += length
                if self.done - paused >= step:
                    pause_s = self.least_s * (self.done - paused) / self.total
                    paused = self.done
                    if self.stopped.wait(pause_s):
                        return False
            backend.flush()
        return True


# -- the commands -------------------------------------------------------------------------------------


def prepare_sanitize(unit: "LogicalUnit", request: Request) -> None:
    """PARAMETER LIST LENGTH: for OVERWRITE a header and a pattern of a block at most, else none."""
    length = int.from_bytes(request.cdb[7:9], "big")
    action = request.cdb[1] & 0x1F
    if action != Action.EXIT_FAILURE_MODE:
        check_idle(unit)
        set_range(unit, request, 0, unit.blocks)
    if action == Action.OVERWRITE:
        if not _HEADER_BYTES < length <= _HEADER_BYTES + unit.block_size:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=7)
    elif length:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=7)
    request.transfer_length = length


def check_idle(unit: "LogicalUnit") -> None:
    """Nothing has the unit locked, unless it is an operation that failed."""
    under_way = unit.locked
    if under_way is not None and not (isinstance(under_way, Operation) and under_way.plan.failed):
        raise under_way()


def _plan(unit: "LogicalUnit", request: Request) -> Plan:
    cdb = request.cdb
    action = Action(cdb[1] & 0x1F)
    unrestricted = bool(cdb[1] & _AUSE)
    if action is not Action.OVERWRITE:
        return Plan(action, unrestricted)
    data = bytes(request.data_out[: request.transfer_length])
    if len(data) < request.transfer_length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    passes = data[0] & 0x1F
    if not passes:
        raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=0, bit=4, in_parameters=True)
    size = int.from_bytes(data[2:4], "big")
    if not 0 < size <= unit.block_size or _HEADER_BYTES + size > len(data):
        raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=2, in_parameters=True)
    pattern = data[_HEADER_BYTES : _HEADER_BYTES + size]
    return Plan(action, unrestricted, pattern, passes, bool(data[0] & _INVERT))


def sanitize(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """OVERWRITE, BLOCK ERASE, CRYPTOGRAPHIC ERASE. With IMMED it is answered when it has been kept, else when
    it is done; either way nothing that happens to the command or its session stops it."""
    check_idle(unit)  # another may have begun since this one was let in
    medium(unit, request)
    immediate = bool(request.cdb[1] & _IMMED)

    def begun(error: Exception | None) -> None:
        if error is not None:
            unit.complete(request, unit.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE)))
        elif immediate:
            unit.complete(request, GOOD)

    def ended(outcome: Outcome) -> None:
        if not immediate:
            unit.complete(request, outcome)

    begin(unit, _plan(unit, request), begun, ended)
    return None


def begin(
    unit: "LogicalUnit",
    plan: Plan,
    begun: Callable[[Exception | None], None],
    ended: Callable[[Outcome], None],
) -> None:
    """Lock the units of the extent, keep the plan, and carry it out.

    Nothing else has the unit locked, except an operation that failed, and its medium is there.

    Args:
        begun: hears that it is kept and under way, or why it is not; nothing is locked then.
        ended: hears the outcome; not if the daemon closes before.
    """
    operation = Operation(plan)
    _lock(unit, operation)  # from here on nothing is let in

    def kept(error: Exception | None) -> None:
        if error is not None:
            log.error(
                "%s: %s could not be stored, and is not begun: %s", unit.config.name, operation.name, error
            )
            _lock(unit, None)
        else:
            _start(unit, operation, ended)
        begun(error)

    _keep(unit, plan, kept)


def exit_failure_mode(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """EXIT FAILURE MODE: leave a failed operation behind, if AUSE allowed that; without one it is GOOD."""
    operation = unit.locked
    if operation is None:
        return GOOD
    if not isinstance(operation, Operation) or not operation.plan.failed:
        raise operation()
    if operation.formats:
        raise operation()  # only another format, or a SANITIZE, ends that
    if not operation.plan.unrestricted:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=4)

    def kept(error: Exception | None) -> None:
        if error is not None:
            unit.complete(request, unit.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE)))
            return
        _lock(unit, None)
        unit.complete(request, GOOD)

    _keep(unit, None, kept)
    return None


def resume(unit: "LogicalUnit") -> None:
    """Begin again what the end of the daemon has interrupted.

    To be called for each unit when it is made, with its medium, after it was added to ``Reservations.units``.

    Raises:
        ValueError: what was kept cannot be read.
    """
    for shown in _units(unit):
        if isinstance(shown.locked, Operation):
            unit.lock(shown.locked)
            return
    stored = unit.kept.get(KEPT_AS)
    if not stored or unit.backend is None:
        return
    operation = Operation(Plan.restore(stored))
    _lock(unit, operation)
    if not operation.plan.failed:
        _start(unit, operation, None)


def stop(unit: "LogicalUnit") -> None:
    """The daemon is closing: end the work soon, and leave the record for ``resume``."""
    if isinstance(unit.locked, Operation):
        unit.locked.stopped.set()


def _units(unit: "LogicalUnit") -> "set[LogicalUnit]":
    """All units that show the same extent."""
    reservations = unit.reservations
    return {unit, *reservations.units} if isinstance(reservations, Reservations) else {unit}


def _lock(unit: "LogicalUnit", operation: Operation | None) -> None:
    for shown in _units(unit):
        if operation is None:
            shown.unlock()
        else:
            shown.lock(operation)


def _keep(unit: "LogicalUnit", plan: Plan | None, done: Callable[[Exception | None], None]) -> None:
    value = plan.export() if plan is not None else b""

    def kept(error: Exception | None) -> None:
        if error is None:
            unit.kept[KEPT_AS] = value
        done(error)

    if unit.keep is None:
        done(None)
    else:
        unit.keep(KEPT_AS, value, kept)


def _start(unit: "LogicalUnit", operation: Operation, ended: Callable[[Outcome], None] | None) -> None:
    """Begin the work; ``ended`` hears its outcome."""
    backend = unit.backend
    assert backend is not None
    size_bytes = unit.blocks * unit.block_size
    block_size = unit.block_size
    thin = unit.config.thin
    operation.throttle = lambda: unit.throttle

    def work() -> Outcome:
        try:
            finished = operation.work(backend, size_bytes, block_size, thin)
        except OSError as error:
            log.error("%s: %s failed: %s", unit.config.name, operation.name, error)
            operation.plan = replace(operation.plan, failed=True)
            return unit.check(
                CheckCondition(Sense.FORMAT_COMMAND_FAILED if operation.formats else operation.failure)
            )
        return GOOD if finished else unit.check(operation())

    def done(outcome: Outcome) -> None:
        failed = operation.plan.failed
        if operation.stopped.is_set() and not failed:
            return  # the record stays, and the next start begins again

        def kept(error: Exception | None) -> None:
            if error is not None:
                log.error(
                    "%s: the end of %s could not be stored: %s", unit.config.name, operation.name, error
                )
            if not failed:
                _lock(unit, None)
            if ended is not None:
                ended(outcome)

        _keep(unit, operation.plan if failed else None, kept)

    unit.lane.long.run(work, done)
