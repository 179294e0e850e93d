"""The logical unit: what a command meets between its header and its medium. Knows no iSCSI.

A request passes twice. ``admit`` judges it when its header has arrived: unit attention, reservation,
opcode, reserved bits, medium, write protection, fields and range (SAM-5 §5.3.3 gives the order). Then
the transport collects the Data-Out, and ``submit`` runs it: on the event loop where that cannot wait,
else on the unit's lane of workers, whose result comes back by ``deliver``.

Rules:

* Everything here runs on the event loop, except bodies that run on a worker. These touch the backend
  and their request and nothing else; what they change in the unit is done by the row's ``after``.
* What may not run together waits (``_must_wait``): by task attribute as SAM-5 §8.6 has it, and by range
  where a command is ``exclusive`` or an aborted writer is still at work: it must not land after
  a later command. As long as there is nothing of the kind, the cost is one attribute test.
* An abort never waits for the medium: the task is gone at once, its thread is left to end.
* Anything but ``CheckCondition``, ``ReservationConflict`` and ``OSError`` out of a body is a bug of
  ours: logged with its traceback, and INTERNAL TARGET FAILURE for that task alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from protocol.enums import ScsiStatus, TaskAttribute
from protocol.scsi.attention import Attentions
from protocol.scsi.commands import Access, Command, Needs, Row, service_action_field
from protocol.scsi.lun import decode_lun, encode_lun, flat_lun
from protocol.scsi.mode import ModeState
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense, from_os_error
from protocol.scsi.table import table_for
from storage.base import Backend, Geometry, Space

__all__ = [
    "Keep",
    "Lane",
    "LogicalUnit",
    "Reservations",
    "Reset",
    "Target",
    "UnitConfig",
    "decode_lun",
    "encode_lun",
]

log = logging.getLogger(__name__)

TASK_ABORTED = Outcome(ScsiStatus.TASK_ABORTED)
RESERVATION_CONFLICT = Outcome(ScsiStatus.RESERVATION_CONFLICT)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitConfig:
    """What an operator decides about a logical unit."""

    name: str
    """For the log."""
    serial: str
    naa: str
    """``0x`` and 16 or 32 hexadecimal digits."""
    vendor: str = "TARGETD"
    product: str = "iSCSI Disk"
    revision: str = "0123"
    eui64: bytes = b""
    """8, 12 or 16 bytes, or none."""
    block_size: int = 512
    """Logical block, bytes."""
    physical_block_exponent: int = 3
    """log2 of logical blocks per physical block; 0 = not reported."""
    read_only: bool = False
    rotation_rate: int = 1
    """MEDIUM ROTATION RATE (SBC-3 §6.6.2): 0 not reported, 1 non-rotating, else rpm."""
    removable: bool = False
    thin: bool = True
    """Report logical block provisioning where the backend can ``unmap``."""
    write_cache: bool = True
    """Default of WCE."""
    xen: bool = False
    """Do not pad the T10 vendor identification with blanks."""
    insecure_tpc: bool = True
    """Third-party copy may name this unit from any target of the host."""
    threshold: int | None = None
    """Percent of the medium's space in use that raises the soft threshold attention."""


class Lane(Protocol):
    """Workers of one medium, bounded, so that a stuck medium holds no other."""

    def run(self, work: Callable[[], Outcome], done: Callable[[Outcome], None]) -> None:
        """Call ``work`` on a worker thread, then ``done`` with its result on the event loop."""


class Reservations(Protocol):
    """Reservations of one unit, as dispatch sees them."""

    held: bool
    """Some command of somebody might conflict; kept up to date, since every command looks at it."""

    def check(self, request: Request, command: Command) -> None:
        """Raises ``ReservationConflict`` when the nexus may not do this now."""

    def reset(self) -> None:
        """A hard or logical unit reset: RESERVE(6/10) ends; persistent reservations stay."""

    def nexus_lost(self, nexus: Nexus) -> None:
        """The nexus is gone: its RESERVE(6/10) ends; persistent reservations stay."""


Keep = Callable[[str, bytes, Callable[[Exception | None], None]], None]
"""Stores a value that must outlive the daemon: (what, value, done); ``done`` is called on the event
loop when it is durable, or with the error."""


class Reset(Enum):
    """Kinds of reset, and the unit attention each leaves behind (SAM-5 §6.3, SPC-4 table 61)."""

    LOGICAL_UNIT = Sense.BUS_DEVICE_RESET
    TARGET_WARM = Sense.SCSI_BUS_RESET
    TARGET_COLD = Sense.POWER_ON_OCCURRED


# Does a task wait for an older one in the task set? By (older, younger) attribute (SAM-5 §8.6).
_SIMPLE, _ORDERED, _HEAD = range(3)
_CLASS: dict[int, int] = {
    TaskAttribute.UNTAGGED: _SIMPLE,
    TaskAttribute.SIMPLE: _SIMPLE,
    TaskAttribute.ORDERED: _ORDERED,
    TaskAttribute.HEAD_OF_QUEUE: _HEAD,
    TaskAttribute.ACA: _SIMPLE,  # without NormACA there is no ACA condition to belong to
}
_PLAIN = int(TaskAttribute.SIMPLE)
"""Attributes up to this one, SIMPLE and UNTAGGED, order nothing."""
_WAITS = {
    (_SIMPLE, _SIMPLE): False,
    (_SIMPLE, _ORDERED): True,
    (_SIMPLE, _HEAD): False,
    (_ORDERED, _SIMPLE): True,
    (_ORDERED, _ORDERED): True,
    (_ORDERED, _HEAD): False,
    (_HEAD, _SIMPLE): True,
    (_HEAD, _ORDERED): True,
    (_HEAD, _HEAD): False,
}


def _ignore(request: Request) -> None:
    """Nobody asked to hear of it."""


def _nobody(request: Request, outcome: Outcome) -> None:
    raise RuntimeError("LogicalUnit.deliver is not set")


class LogicalUnit:
    """One logical unit with its task set."""

    def __init__(
        self,
        config: UnitConfig,
        backend: Backend | None,
        lane: Lane,
        *,
        reservations: Reservations,
        now: Callable[[], float],
        keep: Keep | None = None,
        kept: Mapping[str, bytes] | None = None,
        absent: bool = False,
    ) -> None:
        """
        Args:
            backend: None: the medium is missing; the unit is there and not ready.
            now: seconds since the epoch.
            keep: where MODE SELECT with SP and SET IDENTIFYING INFORMATION store; None: they cannot.
            kept: what ``keep`` stored earlier.
            absent: the stand-in for a LUN that has no unit.
        """
        self.config = config
        self.backend = backend
        self.lane = lane
        self.reservations = reservations
        self.now = now
        self.keep = keep
        self.kept: dict[str, bytes] = dict(kept or {})
        self.absent = absent
        self.table: Sequence[Row]
        """The commands of this unit by opcode."""
        self.deliver: Callable[[Request, Outcome], None] = _nobody
        """Takes the outcome of a request for which ``submit`` answered None. May be called before that
        ``submit`` returns."""
        self.aborted: Callable[[Request], None] = _ignore
        """Told of each task that another nexus, a reset or a preemption ended: it has no outcome."""

        self.nexuses: dict[Nexus, Target | None] = {}
        """The sessions attached, with the target that each came through."""
        self.attentions = Attentions()
        self.tasks: dict[Request, None] = {}
        """The task set, oldest first."""
        self._running: dict[Request, None] = {}
        self._waiting: dict[Request, None] = {}
        self._barriers: dict[Request, None] = {}
        self._ordering = 0  # tasks in the set that are ORDERED or HEAD OF QUEUE
        self._crowded = False  # any of the three above
        self._advancing = False

        self.loaded = True
        """Removable media: not ejected."""
        self.prevented_by: dict[Nexus, None] = {}
        """Nexuses that hold PREVENT ALLOW MEDIUM REMOVAL."""
        self.locked: Callable[[], CheckCondition] | None = None
        """Set by ``lock``: why commands that need READY are refused now."""
        self.geometry: Geometry | None = None
        self.block_size = config.block_size
        self.blocks = 0
        """Capacity in logical blocks; 0 without a medium."""
        self.saved_mode = ModeState.restore(self.kept.get("mode"), ModeState(write_cache=config.write_cache))
        self.write_cache = True
        """WCE: a write need not be durable when it is answered."""
        self.descriptor_sense = False
        self.set_mode(self.saved_mode)

        self.space: Space | None = None
        self._above_threshold = False
        self.echo: dict[Nexus, bytes] = {}
        """Echo buffer of each nexus (WRITE BUFFER)."""
        self.load_cycles = 0
        """Times the medium was loaded by START STOP UNIT."""
        self.commands = [0] * 256
        """Commands admitted or refused, by opcode."""
        self.failures: dict[tuple[int, int], int] = {}
        """(opcode, status) → commands that did not end GOOD."""
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.read_errors = 0
        self.write_errors = 0
        self._look()

    # -- what is lacking ----------------------------------------------------------------------

    def _look(self) -> None:
        """Take over the geometry of the medium and recompute what commands are refused for."""
        config = self.config
        self.block_size = config.block_size
        backend = self.backend
        self.geometry = backend.geometry if backend is not None else None
        self.blocks = self.geometry.size_bytes // config.block_size if self.geometry else 0
        self.table = table_for(self)
        self._relack()

    def _relack(self) -> None:
        lacking = Needs.NOTHING
        if not self.medium_present:
            lacking |= Needs.MEDIUM
        if self.write_protected:
            lacking |= Needs.WRITABLE
        if self.locked is not None:
            lacking |= Needs.READY
        self._lacking = int(lacking)

    @property
    def medium_present(self) -> bool:
        """There is a medium, and it is loaded."""
        return self.backend is not None and self.loaded

    @property
    def read_only(self) -> bool:
        """Nothing an initiator can do makes it writable."""
        backend = self.backend
        return self.config.read_only or (backend is not None and not backend.capabilities.writable)

    @property
    def write_protected(self) -> bool:
        """WP of the mode parameter header (SBC-3 §6.5.1)."""
        return self.read_only or self.mode.software_write_protect

    @property
    def thin(self) -> bool:
        """LBPME: logical block provisioning is offered, and true."""
        return self.config.thin and self.backend is not None and self.backend.capabilities.unmap

    def lock(self, why: Callable[[], CheckCondition]) -> None:
        """Refuse every command that needs READY with ``why()``, as during SANITIZE."""
        self.locked = why
        self._relack()

    def unlock(self) -> None:
        """End what ``lock`` began."""
        self.locked = None
        self._relack()

    def load(self, loaded: bool) -> None:
        """Load or eject the medium of a removable unit; the rest of the nexuses learn of a load."""
        if loaded and not self.loaded:
            self.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED)
            self.load_cycles += 1
        self.loaded = loaded
        self._relack()

    def set_mode(self, state: ModeState) -> None:
        """Make these the current mode parameters."""
        self.mode = state
        self.write_cache = state.write_cache
        self.descriptor_sense = state.descriptor_sense
        self._relack()

    def _why_not(self, row: Command) -> CheckCondition:
        lacks = row.required & self._lacking
        if self.locked is not None and lacks & Needs.READY:
            return self.locked()
        if lacks & Needs.MEDIUM:
            return CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        software = self.mode.software_write_protect and not self.read_only
        return CheckCondition(Sense.SOFTWARE_WRITE_PROTECTED if software else Sense.WRITE_PROTECTED)

    # -- the way of a command -----------------------------------------------------------------

    def admit(self, request: Request) -> Outcome | None:
        """Judge a request by its CDB; it joins the task set unless an outcome comes back.

        Sets ``command``, ``transfer_length``, ``offset`` and ``length`` of the request.
        """
        cdb = request.cdb
        opcode = cdb[0]
        self.commands[opcode] += 1
        try:
            if self.attentions.pending:
                self._attend(request)
            row = self.table[opcode]
            if row.__class__ is not Command:
                row = self._select(request, row)
            request.command = row
            if self.reservations.held:
                self.reservations.check(request, row)
            if int.from_bytes(cdb[: row.length], "big") & row.reserved:
                raise _reserved_bit(cdb, row)
            if row.required & self._lacking:
                raise self._why_not(row)
            if row.prepare is not None:
                row.prepare(self, request)
        except Exception as error:
            return self._refused(request, error)
        self.tasks[request] = None
        if request.attribute > _PLAIN and _CLASS.get(request.attribute, _SIMPLE) != _SIMPLE:
            self._ordering += 1
            self._crowded = True
        return None

    def submit(self, request: Request) -> Outcome | None:
        """Run an admitted request, whose Data-Out is all there.

        Returns:
            The outcome, or None: it comes by ``deliver``, now or later, unless the request is aborted.
        """
        if request.aborted:
            return TASK_ABORTED
        row = request.command
        assert row is not None  # admit() has set it
        if not self._crowded and not row.exclusive:
            outcome = self._start(request, row)
            if outcome is not None:
                self._finish(request, row, outcome)
            return outcome
        self._waiting[request] = None
        self._crowded = True
        self._advance()
        return None

    def complete(self, request: Request, outcome: Outcome) -> None:
        """End a request whose INLINE body answered None. On the event loop."""
        self._done(request, outcome)

    def _start(self, request: Request, row: Command) -> Outcome | None:
        """Run it here if it can be run here; None: it is under way."""
        try:
            if row.inline:
                outcome = row.body(self, request)
                if outcome is None and request in self.tasks:  # it may have ended meanwhile
                    self._running[request] = None
                    if row.exclusive:
                        self._bar(request)
                return outcome
            if row.nowait is not None:
                outcome = row.nowait(self, request)
                if outcome is not None:
                    return outcome
        except Exception as error:
            return self.failed(request, error)
        self._running[request] = None
        if row.exclusive:
            self._bar(request)
        self.lane.run(partial(self._work, request, row), partial(self._done, request))
        return None

    def _work(self, request: Request, row: Command) -> Outcome:
        """On a worker thread."""
        try:
            outcome = row.body(self, request)
            if outcome is None:
                raise TypeError(f"the body of {row.name} ended without an outcome")
            return outcome
        except Exception as error:
            return self.failed(request, error)

    def _done(self, request: Request, outcome: Outcome) -> None:
        """A task that was under way has ended."""
        self._running.pop(request, None)
        self._barriers.pop(request, None)
        row = request.command
        assert row is not None
        if request.aborted:  # nobody waits for it, but what it did to the unit was done
            if row.after is not None:
                row.after(self, request, outcome)
        else:
            self._finish(request, row, outcome)
            self.deliver(request, outcome)
        if self._crowded:
            self._advance()

    def _finish(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Take the task out of the set and count it."""
        del self.tasks[request]
        if not outcome.status or outcome.status == ScsiStatus.CONDITION_MET:
            if row.reads:
                self.reads += 1
                self.bytes_read += request.length
            elif row.writes:
                self.writes += 1
                self.bytes_written += request.length
        else:
            self._count_failure(row.opcode, outcome.status)
            if outcome.sense and outcome.sense[1 if outcome.sense[0] & 0x02 else 2] & 0x0F == 0x03:
                if row.writes:
                    self.write_errors += 1
                else:
                    self.read_errors += 1
        if self._crowded and request.attribute > _PLAIN:
            self._unorder(request)
        if row.after is not None:
            row.after(self, request, outcome)

    def _count_failure(self, opcode: int, status: int) -> None:
        key = (opcode, status)
        self.failures[key] = self.failures.get(key, 0) + 1

    def flush_then(self, request: Request, then: Callable[[], Outcome | None]) -> None:
        """For an INLINE body that answers None: flush the medium on a worker, then go on with ``then`` on
        the event loop; its outcome, or that of a failed flush, ends the request. None: it will end itself."""
        backend = self.backend

        def flush() -> Outcome:
            try:
                if backend is not None:
                    backend.flush()
            except OSError as error:
                return self.failed(request, error)
            return GOOD

        def flushed(outcome: Outcome) -> None:
            ended = then() if outcome is GOOD else outcome
            if ended is not None:
                self.complete(request, ended)

        self.lane.run(flush, flushed)

    # -- failures -----------------------------------------------------------------------------

    def check(self, condition: CheckCondition) -> Outcome:
        """CHECK CONDITION with this sense, in the format of D_SENSE (SPC-4 §4.5.1)."""
        return Outcome(ScsiStatus.CHECK_CONDITION, sense=condition.build(self.descriptor_sense))

    def _refused(self, request: Request, error: Exception) -> Outcome:
        outcome = self.failed(request, error)
        self._count_failure(request.cdb[0], outcome.status)
        return outcome

    def failed(self, request: Request, error: Exception) -> Outcome:
        """The one place where an exception becomes a status."""
        if isinstance(error, CheckCondition):
            return self.check(error)
        if isinstance(error, ReservationConflict):
            return RESERVATION_CONFLICT
        row = request.command
        name = row.name if row is not None else f"opcode {request.cdb[0]:02X}h"
        if isinstance(error, OSError):
            log.warning("%s: %s at byte %d: %s", self.config.name, name, request.offset, error)
            write = row is not None and row.access is Access.WRITE
            lba = request.offset // self.block_size
            return self.check(from_os_error(error, write=write, lba=lba))
        log.error(
            "%s: %s from %s failed by a fault of ours",
            self.config.name,
            name,
            request.nexus.initiator_name,
            exc_info=error,
        )
        return self.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE))

    def _select(self, request: Request, row: Row) -> Command:
        """The row of a service action; raises for what is not in the table."""
        cdb = request.cdb
        if row is None:
            raise CheckCondition(Sense.LOGICAL_UNIT_NOT_SUPPORTED if self.absent else Sense.INVALID_OPCODE)
        if isinstance(row, Command):
            return row
        at, mask = service_action_field(cdb[0])
        action = int.from_bytes(cdb[8:10], "big") if at == 8 else cdb[at] & mask
        command = row.get(action)
        if command is None:
            raise CheckCondition(
                Sense.INVALID_FIELD_IN_CDB, field=at, bit=mask.bit_length() - 1 if at != 8 else 7
            )
        return command

    # -- unit attentions ----------------------------------------------------------------------

    def raise_attention(
        self, sense: Sense, *, only: Nexus | None = None, except_nexus: Nexus | None = None
    ) -> None:
        """Queue a unit attention for one nexus, or for all that are attached but ``except_nexus``."""
        for nexus in self.nexuses if only is None else (only,):
            if nexus is not except_nexus and nexus in self.nexuses:
                self.attentions.add(nexus, sense)

    def _attend(self, request: Request) -> None:
        """Report a pending unit attention instead of running the command (SAM-5 §5.14).

        INQUIRY and REPORT LUNS are done regardless and leave it pending; REQUEST SENSE returns it as
        its parameter data.
        """
        if request.cdb[0] not in _UNATTENDED:
            sense = self.take_attention(request.nexus)
            if sense is not None:
                raise CheckCondition(sense)

    def take_attention(self, nexus: Nexus) -> Sense | None:
        """The unit attention to report to this nexus now, if any; it is then no longer pending."""
        sense = self.attentions.take(nexus)
        if sense is Sense.REPORTED_LUNS_DATA_CHANGED:
            self.luns_reported(nexus)
        return sense

    def luns_reported(self, nexus: Nexus) -> None:
        """This nexus knows that the LUNs changed: no other unit need say it again (LUICLR, VPD page 86h)."""
        target = self.nexuses.get(nexus)
        if target is not None:
            for unit in target.luns.values():
                unit.attentions.clear(nexus, Sense.REPORTED_LUNS_DATA_CHANGED)

    # -- what must wait -----------------------------------------------------------------------

    def _bar(self, request: Request) -> None:
        if request.length:
            self._barriers[request] = None
            self._crowded = True

    def _unorder(self, request: Request) -> None:
        if _CLASS.get(request.attribute, _SIMPLE) != _SIMPLE:
            self._ordering -= 1

    def _must_wait(self, request: Request) -> bool:
        """Is there anything in the unit that this task may not run beside or overtake?"""
        row = request.command
        if self._ordering:
            own = _CLASS.get(request.attribute, _SIMPLE)
            for older in self.tasks:
                if older is request:
                    break
                if _WAITS[_CLASS.get(older.attribute, _SIMPLE), own]:
                    return True
        if not request.length:
            return False
        at, end = request.offset, request.offset + request.length
        beside = self._running if row is not None and row.exclusive else self._barriers
        for other in beside:
            if other.offset < end and at < other.offset + other.length:
                return True
        if beside is self._running:  # an aborted writer is in both; a barrier need not be running
            for other in self._barriers:
                if other.offset < end and at < other.offset + other.length:
                    return True
        for older in self._waiting:
            if older is request:
                break
            if older.offset < end and at < older.offset + older.length:
                return True
        return False

    def _advance(self) -> None:
        """Start every waiting task that may run now, in order, and deliver what ends at once."""
        if self._advancing:
            return
        self._advancing = True
        try:
            moved = True
            while moved:
                moved = False
                for request in list(self._waiting):
                    if request not in self._waiting or self._must_wait(request):
                        continue
                    del self._waiting[request]
                    moved = True
                    row = request.command
                    assert row is not None
                    outcome = self._start(request, row)
                    if outcome is not None:
                        self._finish(request, row, outcome)
                        self.deliver(request, outcome)
        finally:
            self._advancing = False
            self._crowded = bool(self._waiting or self._barriers or self._ordering)

    # -- task management (SAM-5 §7) -----------------------------------------------------------

    def abort(self, request: Request) -> bool:
        """ABORT TASK: it is gone from the task set; no outcome will be delivered.

        Returns:
            False when it was not in the task set (any more).
        """
        if request not in self.tasks:
            return False
        self._drop(request)
        self._advance()
        return True

    def _drop(self, request: Request) -> None:
        request.aborted = True
        del self.tasks[request]
        self._unorder(request)
        row = request.command
        if self._waiting.pop(request, self) is self and request in self._running:
            if row is not None and row.changes:
                self._bar(request)  # its thread may still write: nobody may pass it there
            elif row is not None and row.exclusive:
                self._barriers.pop(request, None)

    def abort_task_set(self, nexus: Nexus) -> list[Request]:
        """ABORT TASK SET: all tasks of the nexus; returns them."""
        return self._drop_all([request for request in self.tasks if request.nexus is nexus])

    def _drop_all(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            self._drop(request)
        if requests:
            self._advance()
        return requests

    def clear_task_set(self, nexus: Nexus) -> list[Request]:
        """CLEAR TASK SET: all tasks of every nexus. TST is 000b and TAS zero (SPC-4 §7.5.8).

        The other nexuses' tasks are told to ``aborted`` and their initiators learn it by a unit
        attention. Returns the tasks of the caller.
        """
        dropped = self._drop_all(list(self.tasks))
        losers = {request.nexus: None for request in dropped if request.nexus is not nexus}
        for loser in losers:
            self.raise_attention(Sense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR, only=loser)
        return self._tell(dropped, nexus)

    def preempt(self, victim: Nexus, by: Nexus) -> None:
        """End all tasks of ``victim``, as PREEMPT AND ABORT does (SPC-4 §5.13.11.5)."""
        dropped = self.abort_task_set(victim)
        if dropped and victim is not by:
            self.raise_attention(Sense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR, only=victim)
        self._tell(dropped, None)

    def _tell(self, dropped: list[Request], origin: Nexus | None) -> list[Request]:
        own: list[Request] = []
        for request in dropped:
            if request.nexus is origin:
                own.append(request)
            else:
                self.aborted(request)
        return own

    def reset(self, origin: Nexus | None, kind: Reset = Reset.LOGICAL_UNIT) -> list[Request]:
        """LOGICAL UNIT RESET, or this unit's share of a target reset (SAM-5 §6.3.3).

        Ends all tasks, RESERVE(6/10) and PREVENT; mode parameters go back to the saved ones; every
        nexus gets a unit attention, the origin's too. Returns the tasks of the origin; the others'
        are told to ``aborted``.
        """
        dropped = self._drop_all(list(self.tasks))
        self.reservations.reset()
        self.prevented_by.clear()
        self.set_mode(self.saved_mode)
        self.raise_attention(kind.value)
        return self._tell(dropped, origin)

    # -- sessions -----------------------------------------------------------------------------

    def attach(self, nexus: Nexus, target: "Target | None" = None) -> None:
        """A session came: its first command will meet POWER ON, RESET, OR BUS DEVICE RESET."""
        if nexus not in self.nexuses:
            self.nexuses[nexus] = target
            self.attentions.add(nexus, Sense.POWER_ON_RESET)

    def detach(self, nexus: Nexus) -> list[Request]:
        """A session went (SAM-5 §6.3.4): its tasks, RESERVE(6/10) and PREVENT end. Returns the tasks."""
        dropped = self._lose(nexus)
        self.nexuses.pop(nexus, None)
        self.attentions.forget(nexus)
        return dropped

    def nexus_lost(self, nexus: Nexus) -> list[Request]:
        """I_T NEXUS RESET: as ``detach``, but the session goes on and learns it by unit attention."""
        dropped = self._lose(nexus)
        self.raise_attention(Sense.I_T_NEXUS_LOSS, only=nexus)
        return dropped

    def _lose(self, nexus: Nexus) -> list[Request]:
        self.reservations.nexus_lost(nexus)
        self.prevented_by.pop(nexus, None)
        self.echo.pop(nexus, None)
        return self.abort_task_set(nexus)

    # -- the operator -------------------------------------------------------------------------

    def reconfigure(self, config: UnitConfig, backend: Backend | None) -> None:
        """Take over new settings, a new medium, or a medium whose size has changed, live.

        Initiators learn it by unit attention: capacity (SBC-3 §4.7), mode parameters, inquiry data,
        and a medium that came.
        """
        before = (self.blocks, self.block_size, self.config.physical_block_exponent)
        protected = self.read_only
        had_medium = self.backend is not None
        offered = (self.config, self.thin)
        self.config = config
        self.backend = backend
        self._look()
        if backend is None:
            return
        if not had_medium:
            self.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED)
        after = (self.blocks, self.block_size, config.physical_block_exponent)
        if after != before and had_medium:
            self.raise_attention(Sense.CAPACITY_DATA_CHANGED)
        if self.read_only != protected:
            self.raise_attention(Sense.MODE_PARAMETERS_CHANGED)
        if _inquired(*offered) != _inquired(config, self.thin):
            self.raise_attention(Sense.INQUIRY_DATA_CHANGED)

    def note_space(self, space: Space) -> None:
        """Take over how full the medium is; crossing the threshold upwards is a unit attention.

        THIN PROVISIONING SOFT THRESHOLD REACHED (SBC-3 §4.7.3.7) is reported once per crossing; two
        percent of leeway keep a level that hovers from reporting again and again.
        """
        self.space = space
        threshold = self.config.threshold
        total = space.used + space.available
        if threshold is None or not total:
            self._above_threshold = False
            return
        percent = 100 * space.used / total
        if percent >= threshold and not self._above_threshold:
            self._above_threshold = True
            self.raise_attention(Sense.THIN_PROVISIONING_SOFT_THRESHOLD)
        elif percent < threshold - 2:
            self._above_threshold = False


_UNATTENDED = frozenset((0x12, 0xA0, 0x03))
"""INQUIRY, REPORT LUNS, REQUEST SENSE (SAM-5 §5.14.2)."""


def _inquired(config: UnitConfig, thin: bool) -> tuple[object, ...]:
    """What INQUIRY says of a configuration."""
    return (
        config.vendor,
        config.product,
        config.revision,
        config.serial,
        config.naa,
        config.eui64,
        config.rotation_rate,
        config.removable,
        config.xen,
        config.insecure_tpc,
        thin,
    )


def _reserved_bit(cdb: bytes, row: Command) -> CheckCondition:
    """INVALID FIELD IN CDB that points at the first bit set outside the usage mask."""
    wrong = int.from_bytes(cdb[: row.length], "big") & row.reserved
    position = 8 * row.length - wrong.bit_length()
    return CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=position // 8, bit=7 - position % 8)


# -- the target -------------------------------------------------------------------------------------


class _NoReservations:
    """Reservations of the stand-in: none."""

    held = False

    def check(self, request: Request, command: Command) -> None:
        """Nothing conflicts."""

    def reset(self) -> None:
        """Nothing to end."""

    def nexus_lost(self, nexus: Nexus) -> None:
        """Nothing to end."""


class Target:
    """A target device as initiators see it: its logical units by LUN, and who is logged in.

    The units may be replaced while sessions are open. A LUN without a unit is answered by a stand-in,
    so that there is one way for all commands.
    """

    def __init__(
        self, name: str, luns: Mapping[int, LogicalUnit], *, lane: Lane, now: Callable[[], float]
    ) -> None:
        self.name = name
        self.ports: tuple[int, ...] = ()
        """Relative target port identifiers: the tags of its portal groups (RFC 7143 §3.4.1)."""
        self.luns: dict[int, LogicalUnit] = {}
        self.nexuses: dict[Nexus, None] = {}
        config = UnitConfig(name=f"{name} (no such LUN)", serial="", naa="", thin=False)
        self.absent = LogicalUnit(config, None, lane, reservations=_NoReservations(), now=now, absent=True)
        self._by_field: dict[bytes, LogicalUnit] = {}
        self._set(luns)

    def _set(self, luns: Mapping[int, LogicalUnit]) -> None:
        self.luns = dict(sorted(luns.items()))
        fields: dict[bytes, LogicalUnit] = {}
        for lun, unit in self.luns.items():
            fields[encode_lun(lun)] = unit
            fields[flat_lun(lun)] = unit
        self._by_field = fields

    def unit_for(self, field: bytes) -> LogicalUnit:
        """The unit of an 8-byte LUN field, or the stand-in."""
        return self._by_field.get(field, self.absent)

    def attach(self, nexus: Nexus) -> None:
        """A session came."""
        self.nexuses[nexus] = None
        self.absent.nexuses[nexus] = self  # without a unit attention: there is no unit
        for unit in self.luns.values():
            unit.attach(nexus, self)

    def detach(self, nexus: Nexus) -> list[Request]:
        """A session went: returns the tasks it leaves behind, all ended."""
        self.nexuses.pop(nexus, None)
        dropped: list[Request] = []
        for unit in (*self.luns.values(), self.absent):
            dropped += unit.detach(nexus)
        return dropped

    def nexus_lost(self, nexus: Nexus) -> list[Request]:
        """I_T NEXUS RESET: returns the tasks of the nexus, all ended."""
        return [request for unit in self.luns.values() for request in unit.nexus_lost(nexus)]

    def reset(self, origin: Nexus | None, kind: Reset) -> list[Request]:
        """TARGET WARM RESET and TARGET COLD RESET: every unit; returns the tasks of the origin."""
        return [request for unit in self.luns.values() for request in unit.reset(origin, kind)]

    def replace_luns(self, luns: Mapping[int, LogicalUnit]) -> list[Request]:
        """Make ``luns`` the units, live. Returns the tasks of the units that went, all ended.

        A unit that stays, on whatever LUN, keeps its tasks and reservations. When the inventory has
        changed every nexus learns it from the units that stay (SPC-4 §6.33, 3Fh/0Eh); new units greet it with
        their own unit attention.
        """
        before = self.luns
        if dict(luns) == before:
            return []
        stay = dict.fromkeys(luns.values())
        had = dict.fromkeys(before.values())
        dropped: list[Request] = []
        for unit in had:
            if unit not in stay:
                for nexus in self.nexuses:
                    dropped += unit.detach(nexus)
        self._set(luns)
        for unit in stay:
            for nexus in self.nexuses:
                if unit in had:
                    unit.raise_attention(Sense.REPORTED_LUNS_DATA_CHANGED, only=nexus)
                else:
                    unit.attach(nexus, self)
        return dropped
