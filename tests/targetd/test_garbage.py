"""When the interpreter looks for garbage: not in the middle of somebody's I/O."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from targetd.system import gc_schedule as garbage
from targetd.system.gc_schedule import GcScheduler


class Knot:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


class Traffic:
    def __init__(self) -> None:
        self.bytes = 0

    def moved(self) -> int:
        return self.bytes


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def collector(traffic: Traffic) -> Iterator[GcScheduler]:
    thresholds, enabled = gc.get_threshold(), gc.isenabled()
    collector = GcScheduler(traffic.moved)
    collector.settle()
    yield collector
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    if not enabled:
        gc.disable()


def old_knot() -> "weakref.ref[Knot]":
    """Garbage of which short looks know nothing: it lived through one."""
    knot = Knot()
    gc.collect(1)
    return weakref.ref(knot)


def grow(objects: int) -> list[list[int]]:
    return [[] for _ in range(objects)]


def test_growth_alone_brings_no_complete_look(collector: GcScheduler) -> None:
    knot = old_knot()
    kept = grow(4 * garbage.LATE)
    assert knot() is not None, f"collected while {len(kept)} objects were made"


def test_a_quiet_moment_is_used(collector: GcScheduler) -> None:
    knot = old_knot()
    kept = grow(2 * garbage.DUE)
    for _ in range(garbage.QUIET_TICKS + 1):
        collector.tick()
    assert kept and knot() is None


def test_little_growth_is_not_worth_a_look(collector: GcScheduler) -> None:
    knot = old_knot()
    kept = grow(garbage.DUE // 10)
    for _ in range(garbage.QUIET_TICKS + 1):
        collector.tick()
    assert kept and knot() is not None


def test_what_comes_and_goes_is_no_growth(collector: GcScheduler) -> None:
    """A large answer of the API, say."""
    knot = old_knot()
    for _ in range(10):
        grow(garbage.LATE)
        collector.tick()
    for _ in range(garbage.QUIET_TICKS + 1):
        collector.tick()
    assert knot() is not None


def test_no_look_while_data_is_moved(collector: GcScheduler, traffic: Traffic) -> None:
    knot = old_knot()
    kept = grow(garbage.DUE + garbage.DUE // 2)
    for _ in range(3 * garbage.QUIET_TICKS):
        traffic.bytes += 4096
        collector.tick()
    assert kept and knot() is not None


def test_what_is_late_is_looked_at_while_data_is_moved(collector: GcScheduler, traffic: Traffic) -> None:
    knot = old_knot()
    kept = grow(2 * garbage.LATE)
    traffic.bytes += 4096
    collector.tick()
    assert kept and knot() is None


def test_what_was_set_aside_is_looked_at_in_a_quiet_moment(collector: GcScheduler, traffic: Traffic) -> None:
    knot = Knot()
    gone = weakref.ref(knot)
    kept = grow(2 * garbage.LATE)
    traffic.bytes += 4096
    collector.tick()
    del knot
    gc.collect()
    assert gone() is not None
    for _ in range(garbage.QUIET_TICKS + 1):
        collector.tick()
    assert kept and gone() is None


def test_what_was_set_aside_does_not_pile_up_where_no_moment_is_quiet(
    collector: GcScheduler, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "AT_MOST", 2)
    knot = Knot()
    gone = weakref.ref(knot)
    kept = []
    for look in range(3):
        kept.append(grow(2 * garbage.LATE))
        traffic.bytes += 4096
        if look == 1:
            del knot
        assert gone() is not None
        collector.tick()
    assert gone() is None


def test_before_it_is_settled_the_interpreter_goes_by_its_own_rules(traffic: Traffic) -> None:
    thresholds = gc.get_threshold()
    collector = GcScheduler(traffic.moved)
    kept = grow(2 * garbage.LATE)
    for _ in range(garbage.QUIET_TICKS + 1):
        collector.tick()
    assert kept and gc.get_threshold() == thresholds
    assert not gc.get_freeze_count()
