"""What waits for what in a unit's task set, against the rules written down as a search over everything."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.enums import TaskAttribute
from protocol.scsi.ranges import LOOKED_AT, Ranges
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.taskset import Pause, TaskSet

NEXUS = Nexus("iqn.2026-11.example:host", bytes(6), "iqn.2026-11.example:disk", 1)
SIMPLE, ORDERED, HEAD = TaskAttribute.SIMPLE, TaskAttribute.ORDERED, TaskAttribute.HEAD_OF_QUEUE


@dataclass
class Row:
    """As much of a ``Command`` as a task set looks at."""

    exclusive: bool
    changes: bool
    at_once: bool
    reads: bool = False
    writes: bool = True
    counted: bool = True
    moves: int = 1


class Share:
    """I/O limits in commands."""

    def __init__(self, left: int) -> None:
        self.left = left

    @property
    def exhausted(self) -> bool:
        return self.left <= 0

    def take(self, length: int) -> bool:
        if self.left <= 0:
            return False
        self.left -= 1
        return True


@dataclass(eq=False)
class Unit:
    """A task set whose commands end at once or when a test says so, and what has happened in it."""

    log: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        unit = self

        class Set(TaskSet):
            def _start(self, request: Request, row: Any) -> Outcome | None:
                unit.judge_start(request)
                unit.log.append(request)
                if row.at_once:
                    return GOOD
                self._begin(request, row)
                return None

            def _finish(self, request: Request, row: Any, outcome: Outcome) -> None:
                self._leave(request)

            def _finish_aborted(self, request: Request, row: Any, outcome: Outcome) -> None:
                pass

        self.set = Set()
        self.delivered: list[Request] = []
        self.set.deliver = lambda request, outcome: self.delivered.append(request)
        self.submitted: dict[Request, None] = {}
        """Those that were, and have neither begun nor gone."""
        self.barriers: Callable[[], list[Any]] = list
        self.running: Callable[[], list[Request]] = list

    def admit(self, row: Row, offset: int, length: int, attribute: int = SIMPLE) -> Request:
        request = Request(NEXUS, bytes(16), attribute=attribute, expected_out=512)
        request.offset, request.length = offset, length
        request.command = row  # type: ignore[assignment]
        self.set._join(request)
        return request

    def must_wait(self, request: Request) -> bool:
        """The rules, one after the other."""
        for older in self.set.tasks:
            if older is request:
                break
            if request.attribute == ORDERED or (request.attribute == SIMPLE and older.attribute != SIMPLE):
                return True
            if older in self.submitted and _overlap(older, request):
                return True
        row: Any = request.command
        return any(_overlap(other, request) for other in self.barriers()) or (
            row.exclusive and any(_overlap(other, request) for other in self.running())
        )

    def judge_start(self, request: Request) -> None:
        self.submitted.pop(request, None)
        assert not self.must_wait(request)


def _overlap(one: Any, other: Any) -> bool:
    return bool(one.length and other.length) and (
        one.offset < other.offset + other.length and other.offset < one.offset + one.length
    )


ROWS = st.builds(Row, exclusive=st.booleans(), changes=st.booleans(), at_once=st.booleans())


class TaskSets(RuleBasedStateMachine):
    """Two units of one medium; what has begun and not ended is in ``running``."""

    def __init__(self) -> None:
        super().__init__()
        self.units = [Unit(), Unit()]
        self.units[1].set.share_medium(self.units[0].set)
        self.admitted: list[tuple[Unit, Request]] = []
        self.lingering: list[tuple[Unit, Request]] = []
        self.pauses: dict[Pause, bool] = {}
        self.share: Share | None = None
        for unit in self.units:
            unit.barriers = self.barriers
            unit.running = self.running

    def running(self) -> list[Request]:
        return [request for unit in self.units for request in unit.log if request in unit.set._running]

    def barriers(self) -> list[Any]:
        exclusive: list[Any] = [request for request in self.running() if request.command.exclusive]  # type: ignore[union-attr]
        exclusive = [request for request in exclusive if not request.aborted or request.command.changes]
        aborted = [request for _, request in self.lingering if request.command.changes]  # type: ignore[union-attr]
        return [*exclusive, *aborted, *self.pauses]

    @rule(
        which=st.sampled_from([0, 1]),
        row=ROWS,
        block=st.integers(0, 12),
        blocks=st.sampled_from([0, 1, 1, 2, 8, 100]),
        attribute=st.sampled_from([SIMPLE, SIMPLE, SIMPLE, SIMPLE, ORDERED, HEAD]),
    )
    def admit(self, which: int, row: Row, block: int, blocks: int, attribute: int) -> None:
        unit = self.units[which]
        self.admitted.append((unit, unit.admit(row, block * 4096, blocks * 4096, attribute)))

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        unit, request = self.admitted.pop(data.draw(st.integers(0, len(self.admitted) - 1)))
        unit.submitted[request] = None
        outcome = unit.set.submit(request)
        assert outcome is None or request not in unit.set.tasks

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(self.running())))

    def finish(self, request: Request) -> None:
        unit = next(unit for unit in self.units if request in unit.log)
        self.lingering = [each for each in self.lingering if each[1] is not request]
        unit.set.complete(request, GOOD)

    @precondition(lambda self: any(unit.set.tasks for unit in self.units))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        unit, request = data.draw(
            st.sampled_from([(unit, request) for unit in self.units for request in unit.set.tasks])
        )
        unit.submitted.pop(request, None)
        self.admitted = [each for each in self.admitted if each[1] is not request]
        if request in unit.set._running:
            self.lingering.append((unit, request))
        assert unit.set.abort(request)

    @rule()
    def pause(self) -> None:
        if len(self.pauses) < 2:
            held: list[bool] = []
            pause = self.units[0].set.hold_still(lambda: held.append(True))
            self.pauses[pause] = True

    @precondition(lambda self: self.pauses)
    @rule()
    def go_on(self) -> None:
        pause = next(iter(self.pauses))
        del self.pauses[pause]
        self.units[0].set.go_on(pause)

    @rule(left=st.sampled_from([None, 0, 1, 3]))
    def limit(self, left: int | None) -> None:
        self.share = None if left is None else Share(left)
        for unit in self.units:
            unit.set.limit(self.share)

    @invariant()
    def nothing_waits_without_a_reason(self) -> None:
        for unit in self.units:
            for request in unit.submitted:
                if request not in unit.set._waiting:
                    continue
                assert unit.must_wait(request) or (self.share is not None and self.share.exhausted)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        for unit in self.units:
            assert set(unit.submitted) == set(unit.set._waiting)

    def teardown(self) -> None:
        self.limit(None)
        while self.pauses:
            self.go_on()
        while self.admitted:
            unit, request = self.admitted.pop(0)
            unit.submitted[request] = None
            unit.set.submit(request)
            for other in self.running():
                self.finish(other)
        while running := self.running():
            self.finish(running[0])
        for unit in self.units:
            assert not (unit.set.tasks or unit.set._waiting or unit.set._crowded)
        medium = self.units[0].set._medium
        assert not (medium.running or medium.plain or medium.barriers or medium.watchers)


TestTaskSets = TaskSets.TestCase
TestTaskSets.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("count", [50, 400])
def test_what_a_command_costs_does_not_depend_on_how_many_wait(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are the looks at a waiting task: three for each, whether 50 wait or 400."""
    unit = Unit()
    looks: list[Request] = []
    blocker = unit.set._blocker

    def counted(request: Request, number: int) -> object:
        looks.append(request)
        return blocker(request, number)

    monkeypatch.setattr(unit.set, "_blocker", counted)
    exclusive = unit.admit(Row(exclusive=True, changes=True, at_once=False), 0, 1 << 25)
    unit.set.submit(exclusive)
    for number in range(count):
        row = Row(exclusive=False, changes=True, at_once=True)
        request = unit.admit(row, number % (count // 2) * 512, 512)
        unit.submitted[request] = None
        assert unit.set.submit(request) is None
    assert not unit.delivered
    unit.set.complete(exclusive, GOOD)
    assert len(unit.delivered) == count + 1
    assert len(looks) <= 3 * (count + 1)


# -- Ranges -----------------------------------------------------------------------------------------

LENGTHS = (1, 512, 4096, 5000, 1 << 15, 1 << 16, 1 << 19, 1 << 64)
RANGE = st.tuples(st.integers(0, 1 << 20), st.sampled_from(LENGTHS))


@given(st.lists(RANGE, max_size=LOOKED_AT - 1), RANGE, st.data())
def test_a_range_finds_what_overlaps_it(
    places: list[tuple[int, int]], wanted: tuple[int, int], choices: st.DataObject
) -> None:
    ranges: Ranges[int] = Ranges()
    for number, (offset, length) in enumerate(places):
        ranges.add(number, offset, length, number)
    gone = choices.draw(st.sets(st.integers(0, len(places))))
    for number in gone:
        assert ranges.discard(number) == (number < len(places))
    before = choices.draw(st.integers(0, len(places)))
    hits = {
        number
        for number, (offset, length) in enumerate(places[:before])
        if number not in gone and offset < sum(wanted) and wanted[0] < offset + length
    }
    found = ranges.find(*wanted, before)
    assert found in hits if hits else found is None
    assert len(ranges) == len(places) - len(gone - {len(places)})


def test_where_many_are_near_one_of_them_is_named() -> None:
    ranges: Ranges[int] = Ranges()
    for number in range(100):
        ranges.add(number, 0, 1, number)
    assert ranges.find(10, 1, 1000) == 99 - LOOKED_AT
    assert ranges.find(10, 1, LOOKED_AT) is None
    assert ranges.find(1 << 30, 1, 1000) is None
