"""The logical unit between its commands: its medium, its settings, its sessions, and what they are told.

What commands ask of it is kept ready for them: ``_lacking`` and ``table`` change when the unit does, not when
somebody asks. All of this runs on the event loop.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from protocol.scsi.attention import Attentions
from protocol.scsi.commands import Needs, Row
from protocol.scsi.interfaces import Keep, Lane, Reservations, Reset, UnitConfig
from protocol.scsi.mode import ModeState
from protocol.scsi.request import Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense
from protocol.scsi.taskset import TaskSet
from storage.base import Backend, Geometry, Space

if TYPE_CHECKING:
    from protocol.scsi.device import Target

__all__ = ["UnitState"]


class UnitState(TaskSet):
    """All of a logical unit but how it does commands."""

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

        self.unflushed: set[Nexus] = set()
        """Those that may have written what no flush of the whole unit has covered yet."""
        self._lost_writes = backend.lost_writes if backend is not None else 0
        self._last_backend = backend
        """That ``_lost_writes`` is about; stays while the medium is away."""
        self._flushing: dict[Request, tuple[bool, int]] = {}
        """SYNCHRONIZE CACHE under way → as it began: was its nexus ``unflushed``, and ``_lost_writes``."""
        self._next_flush: list[Request] | None = None
        """Those that share the next flush, until it begins."""
        self.space: Space | None = None
        self._scarce = False
        self.echo: dict[Nexus, bytes] = {}
        """Echo buffer of each nexus (WRITE BUFFER)."""
        self.buffer = bytearray()
        """Data buffer of the unit (WRITE BUFFER); empty until somebody writes to it, then whole."""
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
        self.table = self._offer()
        self._relack()

    @abstractmethod
    def _offer(self) -> Sequence[Row]:
        """The commands that a unit like this has, by opcode."""

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
        """There is a medium with at least one block, and it is loaded."""
        return self.backend is not None and self.loaded and self.blocks > 0

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
        if isinstance(other, UnitState):
            self.kept = other.kept
            self.saved_mode = other.saved_mode
            self.loaded = other.loaded
            self.set_mode(other.mode)

    @property
    def showing(self) -> "list[UnitState]":
        """All units that show this medium, this one among them."""
        return [unit for unit in self._medium.units if isinstance(unit, UnitState)]

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

    # -- unit attentions ----------------------------------------------------------------------

    def raise_attention(
        self, sense: Sense, *, only: Nexus | None = None, except_nexus: Nexus | None = None
    ) -> None:
        """Queue a unit attention for one nexus, or for all that are attached but ``except_nexus``."""
        for nexus in self.nexuses if only is None else (only,):
            if nexus is not except_nexus and nexus in self.nexuses:
                self.attentions.add(nexus, sense)

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
        nexus = request.nexus
        self._flushing[request] = nexus in self.unflushed, self._lost_writes
        if not self._changing(nexus):  # what is still under way it may pass by
            self.unflushed.discard(nexus)

    def end_flush(self, request: Request, outcome: Outcome) -> None:
        """It has ended. A loss that its own sense data tells need not be told again; one that another was
        told while this was under way may be of this nexus too, even if the flush itself ended well."""
        self.note_lost_writes()
        began = self._flushing.pop(request, None)
        if began is None:
            return
        had_written, lost_writes = began
        if not outcome.status:
            return
        if had_written:
            self.note_written(request.nexus)
        if lost_writes != self._lost_writes:
            self.attentions.clear(request.nexus, Sense.WRITE_ERROR)

    def note_written(self, nexus: Nexus) -> None:
        """It may be changing the medium, or have done so. What takes time says so when it begins, for a loss
        that is met meanwhile may be its own."""
        if nexus in self.nexuses:
            self.unflushed.add(nexus)

    def note_lost_writes(self) -> None:
        """If the medium has lost writes that it had taken, every nexus that wrote since its last successful
        flush is owed one deferred error, through whichever unit of the medium it wrote."""
        backend = self.backend
        if backend is None or backend.lost_writes == self._lost_writes:
            return
        for unit in self._medium.units:
            if isinstance(unit, UnitState):
                unit._owe(backend.lost_writes)

    def _owe(self, lost_writes: int) -> None:
        if self._lost_writes != lost_writes:
            self._lost_writes = lost_writes
            self._tell_of_loss()

    def _tell_of_loss(self) -> None:
        covered = {request.nexus for request, (had_written, _) in self._flushing.items() if had_written}
        for nexus in self.unflushed | covered:
            self.raise_attention(Sense.WRITE_ERROR, only=nexus)

    def lost_behind(self) -> None:
        """An opening of the medium that has been replaced could not be flushed at its end: what was written
        through it may be lost, and the one that took its place will not hear of it."""
        for unit in self._medium.units:
            if isinstance(unit, UnitState):
                unit._tell_of_loss()

    # -- task management (SAM-5 §7) -----------------------------------------------------------

    def clear_task_set(self, nexus: Nexus) -> list[Request]:
        """CLEAR TASK SET: all tasks of every nexus. TST is 000b and TAS zero (SPC-4 §7.5.8).

        The other nexuses' tasks are told to ``aborted`` and their initiators learn it by a unit
        attention. Returns the tasks of the caller.
        """
        dropped: list[Request] = []
        for unit in self.showing:
            ended = unit._drop_all(list(unit.tasks))
            for loser in {request.nexus: None for request in ended if request.nexus is not nexus}:
                unit.raise_attention(Sense.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR, only=loser)
            dropped += ended
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
        nexus gets a unit attention, the origin's too, through whichever target it sees the medium: they
        are one logical unit by all that it says of itself. Returns the tasks of the origin; the others'
        are told to ``aborted``.
        """
        dropped: list[Request] = []
        self.reservations.reset()
        for unit in self.showing:
            dropped += unit._drop_all(list(unit.tasks))
            unit.prevented_by.clear()
            unit.buffer = bytearray()
            unit.set_mode(self.saved_mode)
            unit.raise_attention(kind.value)
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
        self.unflushed.discard(nexus)
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

    def replace_medium(self) -> None:
        """Another medium comes in place of this one, by ``reconfigure``: what was meant for the one must not
        be done to the other."""
        self.conclude(list(self.tasks), Sense.MEDIUM_NOT_PRESENT)
        self.unflushed.clear()
        self.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED)

    def reconfigure(self, config: UnitConfig, backend: Backend | None) -> None:
        """Take over new settings, a new medium, or a medium whose size has changed, live.

        Initiators learn it by unit attention: capacity (SBC-3 §4.7), mode parameters, inquiry data,
        and a medium that came. Commands under way whose blocks are not there any more end.
        """
        before = (self.blocks, self.block_size, self.config.physical_block_exponent)
        protected = self.read_only
        had_medium = self.backend is not None
        offered = (self.config, self.thin)
        self.config = config
        self.note_lost_writes()  # of the medium that may go now
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
            size = self.blocks * self.block_size
            lost = [
                request
                for request in self.tasks
                if self.block_size != before[1] or request.offset + request.length > size
            ]
            self.conclude(lost, Sense.LBA_OUT_OF_RANGE)
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
