"""The logical unit: what a command meets between its header and its medium. Knows no iSCSI.

A request passes twice. ``admit`` judges it when its header has arrived: unit attention, reservation,
opcode, reserved bits, medium, write protection, fields and range (SAM-5 §5.3.3 gives the order). Then
the transport collects the Data-Out, and ``submit`` runs it: on the event loop where that cannot wait,
else on the unit's lane of workers, whose result comes back by ``deliver``.

Rules:

* Everything here runs on the event loop, except bodies that run on a worker. These touch the backend
  and their request and nothing else; what they change in the unit is done by the row's ``after``.
* Anything but ``CheckCondition``, ``ReservationConflict`` and ``OSError`` out of a body is a bug of
  ours: logged with its traceback, and INTERNAL TARGET FAILURE for that task alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from protocol.enums import ScsiStatus
from protocol.scsi.attention import Attentions, condition
from protocol.scsi.commands import Access, Command, Needs, Row, service_action_field
from protocol.scsi.interfaces import Keep, Lane, Reservations, Reset, UnitConfig
from protocol.scsi.limits import MAXIMUM_TRANSFER_BYTES
from protocol.scsi.mode import ModeState
from protocol.scsi.request import GOOD, Buffer, Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense, from_os_error
from protocol.scsi.table import table_for
from protocol.scsi.taskset import PLAIN, TaskSet
from storage.base import Backend, Geometry, Space

if TYPE_CHECKING:
    from protocol.scsi.device import Target

__all__ = ["LogicalUnit"]

log = logging.getLogger(__name__)

RESERVATION_CONFLICT = Outcome(ScsiStatus.RESERVATION_CONFLICT)

_READ_NEEDS = int(Needs.READY | Needs.MEDIUM)
_WRITE_NEEDS = int(Needs.READY | Needs.MEDIUM | Needs.WRITABLE)
"""Of the rows of READ(10/16) and WRITE(10/16), for ``read_at_once`` and ``write_at_once``."""


class LogicalUnit(TaskSet):
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
        super().__init__()
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
        self.nexuses: dict[Nexus, Target | None] = {}
        """The sessions attached, with the target that each came through."""
        self.attentions = Attentions()

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

        self.written_by: Callable[[Nexus], int] = lambda nexus: self.bytes_written
        """Bytes that a nexus has written so far, at least those to this unit."""
        self._lost_writes = backend.lost_writes if backend is not None else 0
        self._last_backend = backend
        """That ``_lost_writes`` is about; stays while the medium is away."""
        self._flushing: dict[Request, tuple[int, int]] = {}
        """SYNCHRONIZE CACHE under way → ``written_by`` its nexus and ``_lost_writes`` when it began."""
        self._flushed: dict[Nexus, int] = {}
        """``written_by`` a nexus when its last successful flush of the whole unit began."""
        self.space: Space | None = None
        self._scarce = False
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
        """LBPME: logical block provisioning is offered, and true. A medium that is open for reading alone is
        as thin as it was made: its holes can be told, and UNMAP meets the write protection."""
        if self.backend is None or not self.config.thin:
            return False
        able = self.backend.capabilities
        return able.unmap or (not able.writable and able.map_query)

    # -- what units over one medium share -----------------------------------------------------

    def share_medium(self, other: TaskSet) -> None:
        """Show the same medium as ``other``: besides exclusive ranges they share whether it is loaded, the
        mode parameters, which decide what becomes of its data, and what is kept."""
        super().share_medium(other)
        if isinstance(other, LogicalUnit):
            self.kept = other.kept
            self.saved_mode = other.saved_mode
            self.loaded = other.loaded
            self.set_mode(other.mode)

    @property
    def showing(self) -> "list[LogicalUnit]":
        """All units that show this medium, this one among them."""
        return [unit for unit in self._beside if isinstance(unit, LogicalUnit)]

    @property
    def removal_prevented(self) -> bool:
        """Some nexus of some unit holds PREVENT ALLOW MEDIUM REMOVAL."""
        return any(unit.prevented_by for unit in self.showing)

    def change_mode(self, state: ModeState, by: Nexus | None, *, save: bool = False) -> None:
        """Make these the current mode parameters of the medium; all nexuses but ``by`` are told."""
        for unit in self.showing:
            if save:
                unit.saved_mode = state
            if state != unit.mode:
                unit.set_mode(state)
                unit.raise_attention(Sense.MODE_PARAMETERS_CHANGED, except_nexus=by)

    def lock(self, why: Callable[[], CheckCondition]) -> None:
        """Refuse every command that needs READY with ``why()``, as during SANITIZE."""
        self.locked = why
        self._relack()

    def unlock(self) -> None:
        """End what ``lock`` began."""
        self.locked = None
        self._relack()

    def load(self, loaded: bool, by: Nexus | None) -> None:
        """Load or eject the medium of a removable unit; all nexuses but the one that loaded it are told.

        Args:
            by: None: an operator did.
        """
        for unit in self.showing:
            if loaded and not unit.loaded:
                unit.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED, except_nexus=by)
                unit.load_cycles += 1
            unit.loaded = loaded
            unit._relack()

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
        if request.attribute > PLAIN:
            self._order(request)
        return None

    def read_at_once(self, opcode: int, lba: int, blocks: int, length: int, touched: bool) -> Buffer | None:
        """READ(10/16) of ``length`` bytes without a request, when nothing stands in its way and the bytes are
        in memory; None: go by ``admit`` and ``submit``, nothing has happened yet.

        ``touched``: as ``Request.touched``; the bytes are a copy then.

        The same tests as theirs in one place, for ``protocol.fastpath``: attentions, reservations, what the
        unit lacks, what must wait, the range.
        """
        backend = self.backend
        if (
            self._crowded
            or self._lacking & _READ_NEEDS
            or self.attentions.pending
            or self.reservations.held
            or lba + blocks > self.blocks
            or blocks * self.block_size != length
            or backend is None
        ):
            return None
        if touched:
            data = backend.copy_nowait(lba * self.block_size, length)
        else:
            data = backend.read_nowait(lba * self.block_size, length)
        if data is not None:
            self.commands[opcode] += 1
            self.reads += 1
            self.bytes_read += length
        return data

    def write_at_once(self, opcode: int, lba: int, blocks: int, data: Buffer) -> bool:
        """WRITE(10/16) of exactly ``data`` into the cache, like ``read_at_once``; False: nothing was done, or
        it failed and is to be done again by the way that reports failures."""
        backend = self.backend
        length = len(data)
        if (
            self._crowded
            or self._lacking & _WRITE_NEEDS
            or self.attentions.pending
            or self.reservations.held
            or not self.write_cache
            or lba + blocks > self.blocks
            or blocks * self.block_size != length
            or length > MAXIMUM_TRANSFER_BYTES
            or backend is None
        ):
            return False
        try:
            if not backend.write_nowait(lba * self.block_size, data):
                return False
        except OSError:
            return False
        self.commands[opcode] += 1
        self.writes += 1
        self.bytes_written += length
        return True

    def _order(self, request: Request) -> None:
        """In the stand-in nothing waits for anything: what it can do is done at once."""
        if self.absent:
            request.attribute = PLAIN
        else:
            super()._order(request)

    def _start(self, request: Request, row: Command) -> Outcome | None:
        """Run it here if it can be run here; None: it is under way."""
        try:
            if row.inline:
                if row.takes_parameters:
                    request.hold()  # the body may answer later, and look at its list again then
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
        request.hold()
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
            self.note_lost_writes()
            if outcome.sense and outcome.sense[1 if outcome.sense[0] & 0x02 else 2] & 0x0F == 0x03:
                if row.writes:
                    self.write_errors += 1
                else:
                    self.read_errors += 1
        if request.attribute > PLAIN:
            self._unorder(request)
        if row.after is not None:
            row.after(self, request, outcome)

    def _finish_aborted(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Nobody waits for it, but what it did to the unit was done."""
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

    def give_up(self, request: Request, condition: CheckCondition) -> Outcome:
        """End an admitted task that will not be submitted: its Data-Out cannot be had."""
        outcome = self.check(condition)
        if request in self.tasks:
            self._withdraw(request)
            self._count_failure(request.cdb[0], outcome.status)
        return outcome

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
                raise condition(sense)

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

    # -- data that was lost after GOOD (SPC-4 §4.5.7) ----------------------------------------

    def begin_flush(self, request: Request) -> None:
        """A SYNCHRONIZE CACHE of the whole unit begins: it covers what its nexus has written so far."""
        self._flushing[request] = self.written_by(request.nexus), self._lost_writes

    def end_flush(self, request: Request, outcome: Outcome) -> None:
        """It has ended. A loss that its own sense data tells need not be told again."""
        began = self._flushing.pop(request, None)
        if began is None:
            return
        covered, lost_writes = began
        if not outcome.status:
            if request.nexus in self.nexuses:
                self._flushed[request.nexus] = covered
        elif lost_writes != self._lost_writes:
            self.attentions.clear(request.nexus, Sense.WRITE_ERROR)

    def note_lost_writes(self) -> None:
        """If the medium has lost writes that it had taken, every nexus that wrote since its last successful
        flush is owed one deferred error, through whichever unit of the medium it wrote."""
        backend = self.backend
        if backend is None or backend.lost_writes == self._lost_writes:
            return
        for unit in self._beside:
            if isinstance(unit, LogicalUnit):
                unit._owe(backend.lost_writes)

    def _owe(self, lost_writes: int) -> None:
        if self._lost_writes != lost_writes:
            self._lost_writes = lost_writes
            for nexus in self.nexuses:
                if self.written_by(nexus) != self._flushed.get(nexus, 0):
                    self.raise_attention(Sense.WRITE_ERROR, only=nexus)

    # -- task management (SAM-5 §7) -----------------------------------------------------------

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
        self.change_mode(self.saved_mode, None)  # of the other units of the medium, which were not reset
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
        self._flushed.pop(nexus, None)
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
        if backend is not None and backend is not self._last_backend:
            self._last_backend = backend
            self._lost_writes = backend.lost_writes
        self.backend = backend
        self._look()
        if not config.removable:
            self.prevented_by.clear()
            if not self.loaded:
                self.load(True, None)
        if backend is None:
            return
        if not had_medium:
            self.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED)
        after = (self.blocks, self.block_size, config.physical_block_exponent)
        if after != before and had_medium:
            self.raise_attention(Sense.CAPACITY_DATA_CHANGED)
        rearmed = offered[0].threshold != config.threshold
        if rearmed:
            self._scarce = False
        if self.read_only != protected or (rearmed and self.thin):
            self.raise_attention(Sense.MODE_PARAMETERS_CHANGED)
        if _inquired(*offered) != _inquired(config, self.thin):
            self.raise_attention(Sense.INQUIRY_DATA_CHANGED)

    def note_space(self, space: Space) -> None:
        """Take over how full the medium is; reaching the threshold is a unit attention.

        THIN PROVISIONING SOFT THRESHOLD REACHED (SBC-3 §4.7.3.7) is reported once each time it gets scarce;
        two percent of leeway keep a level that hovers from reporting again and again. A medium that has
        all it can ever take is not running out.
        """
        self.space = space
        threshold = self.config.threshold
        total = space.total or space.used + space.available
        provisioned = self.geometry is not None and space.used >= self.geometry.size_bytes
        if threshold is None or not total or not self.thin or (provisioned and not space.available):
            self._scarce = False
            return
        percent_left = 100 * space.available / total
        if percent_left <= threshold and not self._scarce:
            self._scarce = True
            self.raise_attention(Sense.THIN_PROVISIONING_SOFT_THRESHOLD)
        elif percent_left > threshold + 2:
            self._scarce = False


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
        thin,
        thin and config.threshold,
    )


def _reserved_bit(cdb: bytes, row: Command) -> CheckCondition:
    """INVALID FIELD IN CDB that points at the first bit set outside the usage mask."""
    wrong = int.from_bytes(cdb[: row.length], "big") & row.reserved
    position = 8 * row.length - wrong.bit_length()
    return CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=position // 8, bit=7 - position % 8)


# -- the target -------------------------------------------------------------------------------------
