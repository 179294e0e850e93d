"""The task set of a logical unit: what may run beside what, and how a task ends early. Knows no command.

Rules:

* What may not run together waits (``_must_wait``): by task attribute as SAM-5 §8.6 has it, and by range
  where a command is ``exclusive`` or an aborted writer is still at work: it must not land after
  a later command. As long as there is nothing of the kind, the cost is one attribute test.
* Where the operator has set I/O limits (``limit``), commands that move data wait for their share as well;
  others do not.
* A command that changes ranges it learns of late, maybe of other media, as a third-party copy does, claims
  them (``claim``): what is exclusive and such a copy never run on the same blocks.
* Someone outside may ask for a moment in which nothing writes (``hold_still``), to take a snapshot.
* An abort never waits for the medium: the task is gone at once, its thread is left to end.
* A task that waited is run and delivered in its order, maybe within the call that let it go.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import WeakSet

from protocol.enums import ScsiStatus, TaskAttribute
from protocol.scsi.commands import Command
from protocol.scsi.request import Nexus, Outcome, Request
from protocol.scsi.sense import Sense

__all__ = ["PLAIN", "Claims", "Pause", "TaskSet", "Throttle"]

TASK_ABORTED = Outcome(ScsiStatus.TASK_ABORTED)

# Does a task wait for an older one in the task set? By (older, younger) attribute (SAM-5 §8.6).
_SIMPLE, _ORDERED, _HEAD = range(3)
_CLASS: dict[int, int] = {
    TaskAttribute.UNTAGGED: _SIMPLE,
    TaskAttribute.SIMPLE: _SIMPLE,
    TaskAttribute.ORDERED: _ORDERED,
    TaskAttribute.HEAD_OF_QUEUE: _HEAD,
    TaskAttribute.ACA: _SIMPLE,  # without NormACA there is no ACA condition to belong to
}
PLAIN = int(TaskAttribute.SIMPLE)
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


class Throttle(Protocol):
    """I/O limits, shared by all units of an extent."""

    def take(self, length: int) -> bool:
        """Take the share of a command that moves so many bytes; False: it must wait, and ``TaskSet.proceed``
        of all units is called when that may have changed."""

    @property
    def exhausted(self) -> bool:
        """Whether ``take`` would say False to anybody now."""


class Pause:
    """A moment in which nothing writes; it bars the whole medium like a command that is exclusive."""

    offset = 0
    length = 1 << 64

    def __init__(self, begun: Callable[[], None]) -> None:
        self.begun: Callable[[], None] | None = begun


class Claims:
    """The ranges that one command has claimed; it begins when nothing exclusive is at any of them."""

    __slots__ = ("begun", "nexus", "ranges")

    def __init__(
        self, nexus: Nexus, ranges: "Iterable[tuple[TaskSet, int, int]]", begun: Callable[[], None]
    ) -> None:
        self.nexus = nexus
        self.begun: Callable[[], None] | None = begun
        """Still to be called."""
        self.ranges = [_Claim(self, *each) for each in ranges if each[2]]

    def begin(self) -> None:
        """Let it begin, if it may and has not."""
        if self.begun is not None and not any(claim.barred for claim in self.ranges):
            self.begin_at_once()

    def begin_at_once(self) -> None:
        """Whatever is there: its command was aborted, and it will change nothing."""
        begun, self.begun = self.begun, None
        for claim in self.ranges:
            claim.unit._claiming.pop(self, None)
        if begun is not None:
            begun()


class _Claim:
    """One of them: a write under way, to all others."""

    __slots__ = ("length", "offset", "owner", "unit")

    def __init__(self, owner: Claims, unit: "TaskSet", offset: int, length: int) -> None:
        self.owner = owner
        self.unit = unit
        self.offset = offset
        self.length = length

    @property
    def barred(self) -> bool:
        return any(_overlap(other, self) for other in self.unit._barriers)


def _ignore(request: Request) -> None:
    """Nobody asked to hear of it."""


def _left_silent(request: Request, sense: Sense) -> None:
    """Nobody asked to hear of it."""


def _nobody(request: Request, outcome: Outcome) -> None:
    raise RuntimeError("LogicalUnit.deliver is not set")


class TaskSet(ABC):
    """The tasks of one unit, from admission to their end."""

    def __init__(self) -> None:
        self.deliver: Callable[[Request, Outcome], None] = _nobody
        """Takes the outcome of a request for which ``submit`` answered None. May be called before that
        ``submit`` returns."""
        self.aborted: Callable[[Request], None] = _ignore
        """Told of each task that another nexus, a reset or a preemption ended: it has no outcome."""
        self.concluded: Callable[[Request, Sense], None] = _left_silent
        """Told of each task that an edit has ended, and with which sense: nobody's task management did it, so
        its initiator waits for an answer."""
        self.tasks: dict[Request, None] = {}
        """Oldest first."""
        self._running: dict[Request | _Claim, None] = {}
        self._waiting: dict[Request, None] = {}
        self._barriers: dict[Request | Pause | _Claim, None] = {}
        self._claims: dict[Request, Claims] = {}
        """Those of this unit's commands, wherever their ranges are."""
        self._claiming: dict[Claims, None] = {}
        """Those that wait to begin and have ranges on this medium."""
        self._beside: WeakSet[TaskSet] = WeakSet((self,))  # all that have the same medium
        self._lingering = 0  # tasks that were aborted and that a worker still has
        self._ordering = 0  # tasks in the set that are ORDERED or HEAD OF QUEUE
        self._throttle: Throttle | None = None
        self._crowded = False  # waiting, barriers, ordering or throttle: any of these
        self._advancing = False

    def share_medium(self, other: "TaskSet") -> None:
        """Work on the same bytes as ``other``: exclusive ranges hold across both, and all theirs.

        For an extent that two targets show in two ways. To be called before the first task.
        """
        self._running = other._running
        self._barriers = other._barriers
        self._claiming = other._claiming
        self._beside = other._beside
        self._beside.add(self)
        self._crowded = bool(self._barriers or self._throttle)

    def leave_medium(self) -> None:
        """This unit shows its medium no more. Work of its that was aborted and has not ended still bars the
        others from its range until it has."""
        self._beside.discard(self)

    def limit(self, throttle: Throttle | None) -> None:
        """Set or lift I/O limits; what waits for them goes by the new ones."""
        self._throttle = throttle
        self._crowded = True
        self._advance()

    def proceed(self) -> None:
        """What waited for its share may go on."""
        if self._crowded:
            self._advance()

    def hold_still(self, begun: Callable[[], None]) -> Pause:
        """Let nothing that has not begun touch the medium, through this unit or one beside it, until
        ``go_on``. ``begun`` is called, now or later, when no write is under way any more; reads may be."""
        pause = Pause(begun)
        self._barriers[pause] = None
        for unit in self._beside:
            unit._crowded = True
        self._begin_pauses()
        return pause

    @property
    def writing(self) -> bool:
        """Something of this unit, or of one beside it, may be changing the medium now."""
        return any(map(_writes, self._running))

    def go_on(self, pause: Pause) -> None:
        """End what ``hold_still`` began, or give it up."""
        pause.begun = None
        self._barriers.pop(pause, None)
        self._advance_beside()

    def _begin_pauses(self) -> None:
        for pause in list(self._barriers):
            if isinstance(pause, Pause) and pause.begun is not None and not any(map(_writes, self._running)):
                begun, pause.begun = pause.begun, None
                begun()

    def claim(
        self, request: Request, ranges: "Iterable[tuple[TaskSet, int, int]]", begun: Callable[[], None]
    ) -> None:
        """For a command of this unit that is under way, claim what it will change: (unit, offset, length).

        ``begun`` is called, now or later, when it may begin; from now on what is exclusive waits for it.
        """
        claims = self._claims[request] = Claims(request.nexus, ranges, begun)
        for claim in claims.ranges:
            claim.unit._running[claim] = None
            claim.unit._claiming[claims] = None
        claims.begin()

    def release(self, request: Request) -> None:
        """What ``claim`` began has ended, well or badly."""
        for claim in self._claims.pop(request).ranges:
            unit = claim.unit
            unit._running.pop(claim, None)
            unit._barriers.pop(claim, None)
            unit._begin_pauses()
            unit._advance_beside()

    @abstractmethod
    def _start(self, request: Request, row: Command) -> Outcome | None:
        """Run it here if it can be run here; None: it is under way."""

    @abstractmethod
    def _finish(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Take the task out of the set and count it."""

    @abstractmethod
    def _finish_aborted(self, request: Request, row: Command, outcome: Outcome) -> None:
        """An aborted task has ended at last."""

    def _order(self, request: Request) -> None:
        """A task with an attribute beyond PLAIN has joined."""
        if _CLASS.get(request.attribute, _SIMPLE) != _SIMPLE:
            self._ordering += 1
            self._crowded = True

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
        if request in self._waiting:
            request.hold()
        return None

    def _withdraw(self, request: Request) -> None:
        """Take out a task that was not submitted; those it held back go on."""
        del self.tasks[request]
        self._unorder(request)
        if self._crowded:
            self._advance()

    def complete(self, request: Request, outcome: Outcome) -> None:
        """End a request whose INLINE body answered None. On the event loop."""
        self._done(request, outcome)

    def _done(self, request: Request, outcome: Outcome) -> None:
        """A task that was under way has ended."""
        self._running.pop(request, None)
        self._barriers.pop(request, None)
        row = request.command
        assert row is not None
        if request.aborted:
            self._lingering -= 1
            self._finish_aborted(request, row, outcome)
        else:
            self._finish(request, row, outcome)
            self.deliver(request, outcome)
        if self._barriers:
            self._begin_pauses()
        self._advance_beside()

    def has_in_hand(self, request: Request) -> bool:
        """Whether it has not ended, or was aborted while it was under way, and still is."""
        return request in self.tasks or request in self._running

    # -- what must wait -----------------------------------------------------------------------

    def _changing(self, nexus: Nexus) -> bool:
        """Something of this nexus may be changing the medium now."""
        return any(
            (one.owner if isinstance(one, _Claim) else one).nexus is nexus and _writes(one)
            for one in self._running
        )

    def _bar(self, what: "Request | _Claim") -> None:
        if what.length:
            self._barriers[what] = None
            for unit in self._beside:
                unit._crowded = True

    def _unorder(self, request: Request) -> None:
        if _CLASS.get(request.attribute, _SIMPLE) != _SIMPLE:
            self._ordering -= 1

    def _must_wait(self, request: Request) -> bool:
        """Is there anything in the unit that this task may not run beside or overtake?"""
        row = request.command
        own = _CLASS.get(request.attribute, _SIMPLE)
        waiting = self._waiting
        for older in self.tasks:  # in the order of admission: so nothing can wait in a circle
            if older is request:
                break
            if _WAITS[_CLASS.get(older.attribute, _SIMPLE), own]:
                return True
            if older in waiting and _overlap(older, request):
                return True
        if any(_overlap(other, request) for other in self._barriers):
            return True
        return row is not None and row.exclusive and any(_overlap(other, request) for other in self._running)

    def _advance_beside(self) -> None:
        for claims in list(self._claiming):
            claims.begin()
        for unit in self._beside:
            if unit._crowded:
                unit._advance()

    def _advance(self) -> None:
        """Start every waiting task that may run now, in order, and deliver what ends at once."""
        if self._advancing:
            return
        self._advancing = True
        throttle = self._throttle
        try:
            moved = True
            while moved:
                moved = False
                for request in list(self._waiting):
                    # the cheap question first: hundreds may wait for their share
                    share = _moved(request) if throttle is not None else -1
                    if share >= 0 and throttle is not None and throttle.exhausted:
                        continue
                    if request not in self._waiting or self._must_wait(request):
                        continue
                    if share >= 0 and throttle is not None and not throttle.take(share):
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
            self._crowded = bool(
                self._waiting or self._barriers or self._ordering or self._throttle is not None
            )

    def abort(self, request: Request) -> bool:
        """ABORT TASK: it is gone from the task set; no outcome will be delivered.

        Returns:
            False when it was not in the task set (any more).
        """
        if request not in self.tasks:
            return False
        self._drop(request)
        self._advance_beside()
        return True

    def _drop(self, request: Request) -> None:
        request.aborted = True
        del self.tasks[request]
        self._unorder(request)
        row = request.command
        if request in self._claims:
            self._abandon(self._claims[request])
        if self._waiting.pop(request, self) is self and request in self._running:
            self._lingering += 1
            if row is not None and row.changes:
                self._bar(request)  # its thread may still write: nobody may pass it there
            elif row is not None and row.exclusive:
                self._barriers.pop(request, None)

    def _abandon(self, claims: Claims) -> None:
        if claims.begun is not None:
            claims.begin_at_once()
        else:
            for claim in claims.ranges:
                claim.unit._bar(claim)

    def abort_task_set(self, nexus: Nexus) -> list[Request]:
        """ABORT TASK SET: all tasks of the nexus; returns them."""
        return self._drop_all([request for request in self.tasks if request.nexus is nexus])

    def conclude(self, requests: list[Request], sense: Sense) -> None:
        """End tasks that an edit leaves without what they were for."""
        for request in self._drop_all(requests):
            self.concluded(request, sense)

    def _drop_all(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            self._drop(request)
        if requests:
            self._advance_beside()
        return requests


def _overlap(one: Request | Pause | _Claim, other: Request | _Claim) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


def _writes(running: Request | _Claim) -> bool:
    """It may be changing the medium now."""
    if isinstance(running, _Claim):
        return running.owner.begun is None
    return running.command is None or running.command.changes


def _moved(request: Request) -> int:
    """Bytes that a command moves between initiator and medium, as I/O limits count them; -1: it is none."""
    row = request.command
    if row is None or not (row.reads or row.writes):
        return -1
    return request.expected_in if row.reads else request.expected_out
