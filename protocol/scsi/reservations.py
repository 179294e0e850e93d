"""Reservations of one extent, whatever units show it: persistent ones, and RESERVE of SPC-2.

``registrations.py`` says what a PERSISTENT RESERVE OUT changes; here it is made to happen, in the order
*compute, keep, swap, tell*: with APTPL the new state is durable before it takes effect and before the command
answers GOOD, and if it cannot be kept nothing has changed. While one change is being kept, the next waits its
turn. All of this runs on the event loop and never waits.

A RESERVE(6/10) belongs to a session and ends with it.

Which command conflicts with what is the table ``CONFLICTS``; who is excepted is ``State.excludes``.

Source: SPC-4 r37 §5.13, §6.15, §6.16; SPC-2 r20 §5.5 for RESERVE and RELEASE.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING
from weakref import WeakSet

from protocol.enums import ScsiStatus
from protocol.scsi.commands import Access, Command
from protocol.scsi.registrations import (
    EXCLUSIVE_ACCESS_TYPES,
    Change,
    Ports,
    State,
    Type,
)
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "CONFLICTS",
    "KEPT_AS",
    "Reservations",
    "Verdict",
]

log = logging.getLogger(__name__)

KEPT_AS = "reservations"
"""Under what name ``LogicalUnit.keep`` stores the state for APTPL."""


# -- the conflict table -----------------------------------------------------------------------------


class Verdict(IntEnum):
    """What becomes of a command from a nexus that the reservation excludes."""

    ALLOWED = 0
    CONFLICT = 1
    DEPENDS = 2
    """On the CDB: ``_GENTLE`` has the question."""


_OK, _NO, _IF = Verdict.ALLOWED, Verdict.CONFLICT, Verdict.DEPENDS

CONFLICTS: Mapping[Access, tuple[Verdict, Verdict, Verdict]] = {
    # (write exclusive types, exclusive access types, RESERVE(6/10) of another nexus)
    Access.READ: (_OK, _NO, _NO),
    Access.WRITE: (_NO, _NO, _NO),
    Access.ALLOWED: (_OK, _OK, _NO),
    Access.EXEMPT: (_OK, _OK, _OK),
    Access.PERSISTENT_IN: (_OK, _OK, _NO),
    Access.PERSISTENT_OUT: (_OK, _OK, _NO),  # its service actions know the rules (SPC-4 table 55)
    Access.RESERVE: (_OK, _OK, _NO),  # against registrations the body judges: CRH
    Access.RELEASE: (_OK, _OK, _OK),  # of another's reservation: done, without effect
    Access.PREVENT: (_IF, _IF, _IF),
    Access.START_STOP: (_IF, _IF, _IF),
}
"""SPC-4 table 54 and SBC-3 table 13 for persistent reservations, SPC-2 table 10 and SBC-2 for RESERVE."""

_WRITE_EXCLUSIVE_COLUMN, _EXCLUSIVE_ACCESS_COLUMN, _RESERVE_COLUMN = range(3)

_GENTLE: Mapping[Access, Callable[[bytes], bool]] = {
    Access.PREVENT: lambda cdb: cdb[4] & 0x03 == 0,  # allows removal
    Access.START_STOP: lambda cdb: cdb[4] & 0xF3 == 0x01,  # START=1, LOEJ=0, POWER CONDITION 0
}


# -- the unit's reservations ------------------------------------------------------------------------


class Reservations:
    """What one extent has in the way of reservations; its logical units share it."""

    def __init__(self, stored: bytes | None = None) -> None:
        """
        Args:
            stored: what ``LogicalUnit.keep`` was last given under ``KEPT_AS``.

        Raises:
            ValueError: it cannot be read.
        """
        self.state = State.restore(stored or b"")
        self.generation = 0
        """PRGENERATION: counts from 0 at each start (SPC-4 §6.15.2)."""
        self.units: WeakSet[LogicalUnit] = WeakSet()
        """All logical units that show this extent: whoever makes one adds it; who asks is added too."""
        self.reserved_by: Nexus | None = None
        """Who holds a RESERVE(6/10)."""
        self.target_port_groups: Callable[[Nexus], Collection[int]] | None = None
        """Portal group tags through which the nexus's target can be reached, for ALL_TG_PT and REGISTER AND
        MOVE; None: those through which somebody is logged in."""
        self.held = False
        self._excluded: dict[Nexus, bool] = {}  # of those who asked since the state changed
        self._turns: deque[Callable[[], None]] = deque()
        self._keeping = False
        self._changed()

    def _changed(self) -> None:
        self._excluded.clear()
        self.held = self.state.type != Type.NONE or self.reserved_by is not None

    # -- for dispatch -------------------------------------------------------------------------

    def check(self, request: Request, command: Command) -> None:
        """Raises ``ReservationConflict`` when the nexus may not do this now."""
        nexus = request.nexus
        if self.reserved_by is not None:
            # PERSISTENT RESERVE conflicts even with one's own RESERVE (SPC-2 §5.5.1).
            persistent = command.access in (Access.PERSISTENT_IN, Access.PERSISTENT_OUT)
            if persistent or self.reserved_by is not nexus:
                _judge(command.access, _RESERVE_COLUMN, request.cdb)
        excluded = self._excluded.get(nexus)
        if excluded is None:
            excluded = self._excluded[nexus] = self.state.excludes(self.state.ports_of(nexus))
        if excluded:
            exclusive = self.state.type in EXCLUSIVE_ACCESS_TYPES
            column = _EXCLUSIVE_ACCESS_COLUMN if exclusive else _WRITE_EXCLUSIVE_COLUMN
            _judge(command.access, column, request.cdb)

    def reserve(self, nexus: Nexus) -> None:
        """RESERVE(6/10) by this nexus, for the whole unit."""
        self.reserved_by = nexus
        self._changed()

    def reset(self) -> None:
        """A hard or logical unit reset: RESERVE(6/10) ends; persistent reservations stay."""
        self.reserved_by = None
        self._changed()

    def take_over(self, state: State) -> None:
        """Begin with what was in force where the extent lived before; nobody has asked for anything yet."""
        self.state = state
        self._changed()

    def rename_targets(self, names: Mapping[str, str], keep: Callable[[bytes], None]) -> None:
        """Registrations go on under other names of their targets (by old ones), kept ones too.

        Args:
            keep: stores what a power loss must not take, if that has changed.
        """

        def turn() -> None:
            before = self.state
            self.state = before.with_names(names)
            self._changed()
            if self.state != before and self.state.aptpl:
                keep(self.state.export())

        if self._keeping:
            self._turns.append(turn)
        else:
            turn()

    def nexus_lost(self, nexus: Nexus) -> None:
        """The nexus is gone: its RESERVE(6/10) ends; persistent reservations stay."""
        if self.reserved_by is nexus:
            self.reserved_by = None
            self._changed()
        self._excluded.pop(nexus, None)

    # -- changes, one at a time ---------------------------------------------------------------

    def in_turn(
        self, unit: "LogicalUnit", request: Request, step: Callable[[], Outcome | None]
    ) -> Outcome | None:
        """Do ``step`` now, or after what is being kept; None: its outcome comes by ``complete``."""
        if not self._keeping:
            return step()

        def turn() -> None:
            outcome = None if request.aborted else _guarded(unit, step)
            if request.aborted:
                unit.complete(request, _ABORTED)
            elif outcome is not None:
                unit.complete(request, outcome)

        self._turns.append(turn)
        return None

    def change(self, unit: "LogicalUnit", request: Request, change: Change) -> Outcome | None:
        """Make a change: at once, or when it has been kept if APTPL is or was on."""
        before = self.state
        lasting = change.state.aptpl or before.aptpl
        if not lasting or unit.keep is None or change.state == before:
            self._swap(unit, request, change)
            return GOOD
        self._keeping = True
        answered: list[Outcome] = []  # ``keep`` may call back before it returns
        inside = True

        def kept(error: Exception | None) -> None:
            outcome = self._kept(unit, request, change, error)
            if inside:
                answered.append(outcome)
            else:
                unit.complete(request, outcome)
                self._next()

        unit.keep(KEPT_AS, change.state.export(), kept)
        inside = False
        return answered[0] if answered else None

    def _kept(
        self, unit: "LogicalUnit", request: Request, change: Change, error: Exception | None
    ) -> Outcome:
        self._keeping = False
        if error is not None:
            log.error(
                "%s: reservations could not be stored, and stay as they were: %s", unit.config.name, error
            )
            return unit.check(CheckCondition(Sense.INSUFFICIENT_REGISTRATION_RESOURCES))
        self._swap(unit, request, change)
        return GOOD

    def _next(self) -> None:
        while self._turns and not self._keeping:
            self._turns.popleft()()

    def _swap(self, unit: "LogicalUnit", request: Request, change: Change) -> None:
        self.state = change.state
        if change.counts:
            self.generation = (self.generation + 1) & 0xFFFFFFFF
        self._changed()
        for ports, sense in change.attentions:
            for shown, nexus in self._attached(ports):
                shown.raise_attention(sense, only=nexus)
        for ports in change.abort:
            for shown, nexus in self._attached(ports):
                if nexus is not request.nexus:
                    shown.preempt(nexus, request.nexus)
                else:  # it preempted itself: everything but this command
                    for task in [task for task in shown.tasks if task.nexus is nexus and task is not request]:
                        shown.abort(task)
                        shown.aborted(task)

    def _attached(self, ports: Ports) -> list[tuple["LogicalUnit", Nexus]]:
        """The sessions of that name, with the unit through which each sees the extent."""
        return [
            (unit, nexus)
            for unit in list(self.units)
            for nexus in unit.nexuses
            if self.state.ports_of(nexus) == ports
        ]


def _judge(access: Access, column: int, cdb: bytes) -> None:
    verdict = CONFLICTS[access][column]
    if verdict == Verdict.CONFLICT or (verdict == Verdict.DEPENDS and not _GENTLE[access](cdb)):
        raise ReservationConflict


def _guarded(unit: "LogicalUnit", step: Callable[[], Outcome | None]) -> Outcome | None:
    """A step whose turn came late: its exceptions become outcomes here, dispatch being over."""
    try:
        return step()
    except CheckCondition as condition:
        return unit.check(condition)
    except ReservationConflict:
        return _CONFLICT


_CONFLICT = Outcome(ScsiStatus.RESERVATION_CONFLICT)
_ABORTED = Outcome(ScsiStatus.TASK_ABORTED)
