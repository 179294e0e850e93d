"""The task set of a logical unit: what may run beside what, and how a task ends early. Knows no command.

Rules:

* What may not run together waits (``_blocker``): by task attribute as SAM-5 §8.6 has it, and by range
  where a command is ``exclusive`` or an aborted writer is still at work: it must not land after
  a later command. As long as there is nothing of the kind, the cost is one attribute test.
* What waits, waits for one thing at a time, and is looked at again when that is no more where it was
  (``_Medium.watchers``). So what a command costs that arrives, begins or ends does not depend on how many
  others wait, but on how many it lets go (``python -m bench.waiting``).
* Where the operator has set I/O limits (``limit``), commands that move data wait for their share as well;
  others do not.
* A command that changes ranges it learns of late, maybe of other media, as a third-party copy does, claims
  them (``claim``): what is exclusive and such a copy never run on the same blocks.
* Someone outside may ask for a moment in which nothing writes (``hold_still``), to take a snapshot.
* An abort never waits for the medium: the task is gone at once, its thread is left to end.
* A task that waited is run and delivered in its order, maybe within the call that let it go.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count
from typing import Protocol
from weakref import WeakSet

from protocol.enums import ScsiStatus, TaskAttribute
from protocol.scsi.commands import Command
from protocol.scsi.ranges import Ranges
from protocol.scsi.request import Nexus, Outcome, Request
from protocol.scsi.sense import Sense

__all__ = ["PLAIN", "Claims", "Pause", "TaskSet", "Throttle"]

TASK_ABORTED = Outcome(ScsiStatus.TASK_ABORTED)

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
_next_number = count(1).__next__
"""Numbers in the order in which tasks are admitted, and claims and barriers made."""
_LAST = 1 << 63
"""Beyond all of them."""


class Throttle(Protocol):
    """I/O limits, shared by all units of an extent."""

    def take(self, length: int) -> bool:
        """Take the share of a command that moves so many bytes; False: it must wait, and ``TaskSet.proceed``
        of all units is called when that may have changed."""

    @property
    def exhausted(self) -> bool:
        """Whether ``take`` would say False to anybody now."""

    @property
    def piece_bytes(self) -> int:
        """How much is to be moved at a time at most by what ``spend``s; 0: as much as one likes."""

    def spend(self, length: int, stopped: Callable[[], bool]) -> bool:
        """On a worker: wait until the share of what moves so many bytes may be taken, and take it; False:
        ``stopped`` said so meanwhile."""


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
        if self.begun is None:
            return
        for claim in self.ranges:
            medium = claim.unit._medium
            barrier = medium.barriers.find(claim.offset, claim.length, _LAST)
            if barrier is not None:
                medium.watch(barrier, self, _next_number(), claim.unit)
                return
        self.begin_at_once()

    def begin_at_once(self) -> None:
        """Whatever is there: its command was aborted, and it will change nothing."""
        begun, self.begun = self.begun, None
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


_Barrier = Request | Pause | _Claim
_Waiter = Request | Claims


class _Medium:
    """What the units that show one medium have in common."""

    def __init__(self) -> None:
        self.running: dict[Request | _Claim, None] = {}
        self.plain: dict[Request | _Claim, None] = {}
        """Those of them that began without being barriers."""
        self.barriers: Ranges[_Barrier] = Ranges()
        self.pauses: dict[Pause, None] = {}
        self.units: WeakSet[TaskSet] = WeakSet()
        self.watchers: dict[object, dict[_Waiter, tuple[int, TaskSet]]] = {}
        """What is waited for → who does, with its number and unit."""
        self._ready: list[tuple[int, TaskSet, _Waiter]] = []
        """A heap: who may be let go, the oldest first."""
        self._advancing = False

    def watch(self, blocker: object, waiter: _Waiter, number: int, unit: "TaskSet") -> None:
        """Look at ``waiter`` again when ``blocker`` is no more where it was."""
        self.watchers.setdefault(blocker, {})[waiter] = number, unit

    def wake(self, blocker: object) -> None:
        """It waits, runs or bars no more, or has ended; ``advance`` is to be called when all is said."""
        woken = self.watchers.pop(blocker, None)
        if woken is not None:
            for waiter, (number, unit) in woken.items():
                heappush(self._ready, (number, unit, waiter))

    def ready(self, waiter: Request, number: int, unit: "TaskSet") -> None:
        """Look at it when its turn comes."""
        heappush(self._ready, (number, unit, waiter))

    def advance(self) -> None:
        """Look at all who may go, oldest first: within one call however deep."""
        if self._advancing:
            return
        self._advancing = True
        ready = self._ready
        try:
            while ready:
                _, unit, waiter = heappop(ready)
                if isinstance(waiter, Claims):
                    waiter.begin()
                else:
                    unit._retry(waiter)
                    unit._settle()
        finally:
            self._advancing = False

    def bar(self, what: _Barrier) -> None:
        """Nothing passes it."""
        if what.length:
            self.barriers.add(what, what.offset, what.length, _next_number())
            for unit in self.units:
                unit._crowded = True

    def unbar(self, what: _Barrier) -> None:
        """It is no barrier (any more)."""
        if self.barriers.discard(what) and not self.barriers:
            for unit in self.units:
                unit._settle()

    def begin_pauses(self) -> None:
        """Those that waited until nothing writes."""
        for pause in list(self.pauses):
            if pause.begun is not None and not any(map(_writes, self.running)):
                begun, pause.begun = pause.begun, None
                begun()


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
        self.tasks: dict[Request, int] = {}
        """Oldest first, with their numbers."""
        self._medium = _Medium()
        self._medium.units.add(self)
        self._running = self._medium.running
        self._barriers = self._medium.barriers
        self._waiting: dict[Request, object] = {}
        """With what each waits for; None: for its share."""
        self._queue: Ranges[Request] = Ranges()
        """The same, by range."""
        self._throttled: dict[Request, None] = {}
        """Those that wait for their share."""
        self._claims: dict[Request, Claims] = {}
        """Those of this unit's commands, wherever their ranges are."""
        self._lingering = 0  # tasks that were aborted and that a worker still has
        self._ordering: list[tuple[int, Request]] = []
        """Tasks in the set that are ORDERED or HEAD OF QUEUE, oldest first."""
        self._throttle: Throttle | None = None
        self._crowded = False  # waiting, barriers, ordering or throttle: any of these

    def share_medium(self, other: "TaskSet") -> None:
        """Work on the same bytes as ``other``: exclusive ranges hold across both, and all theirs.

        For an extent that two targets show in two ways. To be called before the first task.
        """
        self._medium = other._medium
        self._medium.units.add(self)
        self._running = self._medium.running
        self._barriers = self._medium.barriers
        self._settle()

    def leave_medium(self) -> None:
        """This unit shows its medium no more. Work of its that was aborted and has not ended still bars the
        others from its range until it has."""
        self._medium.units.discard(self)

    def begin_anew(self, beside: "TaskSet | None") -> None:
        """Another medium has come, and there is no task. What was aborted and may still be at work on the one
        before, which perhaps will never answer, holds nobody up on this one.

        Args:
            beside: another unit that shows it, and has begun anew.
        """
        self._lingering = 0
        self._medium = _Medium()
        if beside is not None:
            self._medium = beside._medium
        self._medium.units.add(self)
        self._running = self._medium.running
        self._barriers = self._medium.barriers
        self._settle()

    def limit(self, throttle: Throttle | None) -> None:
        """Set or lift I/O limits; what waits for them goes by the new ones."""
        self._throttle = throttle
        self._crowded = True
        self.proceed()
        self._settle()

    @property
    def throttle(self) -> Throttle | None:
        """The I/O limits, while there are any."""
        return self._throttle

    def proceed(self) -> None:
        """What waited for its share may go on."""
        for request in list(self._throttled):
            if self._throttle is not None and self._throttle.exhausted:
                break
            self._retry(request)
        self._settle()
        self._medium.advance()

    def _settle(self) -> None:
        """See whether there is still anything to look out for."""
        self._crowded = bool(self._waiting or self._barriers or self._ordering or self._throttle is not None)

    def hold_still(self, begun: Callable[[], None]) -> Pause:
        """Let nothing that has not begun touch the medium, through this unit or one beside it, until
        ``go_on``. ``begun`` is called, now or later, when no write is under way any more; reads may be."""
        pause = Pause(begun)
        medium = self._medium
        medium.pauses[pause] = None
        medium.bar(pause)
        medium.begin_pauses()
        return pause

    @property
    def writing(self) -> bool:
        """Something of this unit, or of one beside it, may be changing the medium now."""
        return any(map(_writes, self._running))

    def go_on(self, pause: Pause) -> None:
        """End what ``hold_still`` began, or give it up."""
        pause.begun = None
        medium = self._medium
        medium.pauses.pop(pause, None)
        medium.unbar(pause)
        medium.wake(pause)
        medium.advance()

    def claim(
        self, request: Request, ranges: "Iterable[tuple[TaskSet, int, int]]", begun: Callable[[], None]
    ) -> None:
        """For a command of this unit that is under way, claim what it will change: (unit, offset, length).

        ``begun`` is called, now or later, when it may begin; from now on what is exclusive waits for it.
        """
        claims = self._claims[request] = Claims(request.nexus, ranges, begun)
        for claim in claims.ranges:
            claim.unit._running[claim] = claim.unit._medium.plain[claim] = None
        claims.begin()

    def release(self, request: Request) -> None:
        """What ``claim`` began has ended, well or badly."""
        for claim in self._claims.pop(request).ranges:
            medium = claim.unit._medium
            medium.running.pop(claim, None)
            medium.plain.pop(claim, None)
            medium.unbar(claim)
            medium.wake(claim)
            medium.begin_pauses()
            medium.advance()

    @abstractmethod
    def _start(self, request: Request, row: Command) -> Outcome | None:
        """Run it here if it can be run here; None: it is under way."""

    @abstractmethod
    def _finish(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Take the task out of the set and count it."""

    @abstractmethod
    def _finish_aborted(self, request: Request, row: Command, outcome: Outcome) -> None:
        """An aborted task has ended at last."""

    def _join(self, request: Request) -> None:
        """It is admitted: a task of the set from now on."""
        self.tasks[request] = _next_number()
        if request.attribute > PLAIN:
            self._order(request)

    def _order(self, request: Request) -> None:
        """A task with an attribute beyond PLAIN has joined."""
        if _CLASS.get(request.attribute, _SIMPLE) != _SIMPLE:
            self._ordering.append((self.tasks[request], request))
            self._crowded = True

    def _leave(self, request: Request) -> None:
        """It is over, however it ended."""
        number = self.tasks.pop(request)
        if self._ordering:
            at = bisect_left(self._ordering, (number,))
            if at < len(self._ordering) and self._ordering[at][0] == number:
                del self._ordering[at]
                self._settle()

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
                if self._medium.watchers:
                    self._wake(request)
            return outcome
        number = self.tasks[request]
        self._waiting[request] = None
        self._queue.add(request, request.offset, request.length, number)
        self._crowded = True
        self._medium.ready(request, number, self)
        self._medium.advance()
        if request in self._waiting:
            request.hold()
        return None

    def _wake(self, request: Request) -> None:
        self._medium.wake(request)
        self._medium.advance()

    def _withdraw(self, request: Request) -> None:
        """Take out a task that was not submitted; those it held back go on."""
        self._leave(request)
        self._wake(request)

    def complete(self, request: Request, outcome: Outcome) -> None:
        """End a request whose INLINE body answered None. On the event loop."""
        self._done(request, outcome)

    def _done(self, request: Request, outcome: Outcome) -> None:
        """A task that was under way has ended."""
        medium = self._medium
        known = medium.running.pop(request, medium) is None  # else it was for a medium before this one
        medium.plain.pop(request, None)
        if medium.barriers:
            medium.unbar(request)
        row = request.command
        assert row is not None
        if request.aborted:
            self._lingering -= known
            self._finish_aborted(request, row, outcome)
        else:
            self._finish(request, row, outcome)
            self.deliver(request, outcome)
        if medium.pauses:
            medium.begin_pauses()
        if medium.watchers:
            self._wake(request)

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

    def _bar(self, what: Request | _Claim) -> None:
        self._medium.bar(what)

    def _begin(self, request: Request, row: Command) -> None:
        """It is under way from now on."""
        self._running[request] = None
        if row.exclusive:
            self._medium.bar(request)
        else:
            self._medium.plain[request] = None

    def _blocker(self, request: Request, number: int) -> object | None:
        """What in the unit this task may not run beside or overtake, if anything."""
        own = _CLASS.get(request.attribute, _SIMPLE)
        if self._ordering and own != _HEAD:
            # SAM-5 §8.6: SIMPLE waits for what is older and not SIMPLE, ORDERED for all that is older
            at = bisect_left(self._ordering, (number,))
            if at:
                return self._ordering[at - 1][1]
            first = next(iter(self.tasks))
            if own == _ORDERED and first is not request:
                return first
        offset, length = request.offset, request.length
        if not length:
            return None
        # Older ones only, so nothing can wait in a circle.
        found: object | None = self._queue.find(offset, length, number)
        if found is None:
            found = self._barriers.find(offset, length, _LAST)
        if found is None and request.command is not None and request.command.exclusive:
            found = next((other for other in self._medium.plain if _overlap(other, request)), None)
        return found

    def _retry(self, request: Request) -> None:
        """Start a task that waits, if it may run now, and deliver what ends at once."""
        if request not in self._waiting:
            return
        number = self.tasks[request]
        throttle = self._throttle
        # the cheap question first: hundreds may wait for their share
        share = _moved(request) if throttle is not None else -1
        if share >= 0 and throttle is not None and throttle.exhausted:
            self._throttled[request] = None
            return
        blocker = self._blocker(request, number)
        if blocker is not None:
            self._throttled.pop(request, None)
            self._waiting[request] = blocker
            self._medium.watch(blocker, request, number, self)
            return
        if share >= 0 and throttle is not None and not throttle.take(share):
            self._waiting[request] = None
            self._throttled[request] = None
            return
        self._stop_waiting(request)
        row = request.command
        assert row is not None
        outcome = self._start(request, row)
        if outcome is not None:
            self._finish(request, row, outcome)
            self._medium.wake(request)
            self.deliver(request, outcome)

    def _stop_waiting(self, request: Request) -> bool:
        """Whether it did. Those that waited for it to begin are looked at again."""
        blocker = self._waiting.pop(request, self)
        if blocker is self:
            return False
        medium = self._medium
        self._throttled.pop(request, None)
        self._queue.discard(request)
        watchers = medium.watchers.get(blocker)
        if watchers is not None and watchers.pop(request, None) is not None and not watchers:
            del medium.watchers[blocker]
        medium.wake(request)
        return True

    def abort(self, request: Request) -> bool:
        """ABORT TASK: it is gone from the task set; no outcome will be delivered.

        Returns:
            False when it was not in the task set (any more).
        """
        if request not in self.tasks:
            return False
        self._drop(request)
        self._medium.advance()
        return True

    def _drop(self, request: Request) -> None:
        request.aborted = True
        self._leave(request)
        row = request.command
        medium = self._medium
        if request in self._claims:
            self._abandon(self._claims[request])
        if not self._stop_waiting(request) and request in medium.running:
            self._lingering += 1
            if row is not None and row.changes:
                medium.bar(request)  # its thread may still write: nobody may pass it there
            elif row is not None and row.exclusive:
                medium.unbar(request)
                medium.plain[request] = None
        medium.wake(request)
        self._settle()

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
        self._medium.advance()
        return requests


def _overlap(one: Request | Pause | _Claim, other: Request | _Claim) -> bool:
    """Where neither is nowhere."""
    return (
        one.length > 0 < other.length
        and one.offset < other.offset + other.length
        and other.offset < one.offset + one.length
    )


def _writes(running: Request | _Claim) -> bool:
    """It may be changing the medium now."""
    if isinstance(running, _Claim):
        return running.owner.begun is None
    return running.command is None or running.command.changes


def _moved(request: Request) -> int:
    """Bytes that the medium moves for a command, as I/O limits count them, or 0 where its body takes its
    shares by itself; -1: they do not concern it."""
    row = request.command
    if row is None or not row.counted:
        return -1
    return row.moves * request.length
