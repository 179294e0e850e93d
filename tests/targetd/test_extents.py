"""Extents as live logical units: how full their medium is, and who hears of it (SBC-3 §4.7.3.7)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocol.scsi.device import LogicalUnit, UnitConfig
from protocol.scsi.request import Nexus
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import Sense
from storage.base import Space
from storage.memory import Memory
from targetd.config import Extent
from targetd.engine.extents import SPACE_ARMED_S, SPACE_IDLE_S, Appearance, LiveExtent

MIB = 1 << 20


class Shelf(Memory):
    """On a medium of 100 MiB that others use too."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.left = 100 * MIB
        self.asked = 0

    def space(self) -> Space:
        self.asked += 1
        return Space(used=0, available=self.left, total=100 * MIB)


class NotYet:
    """A lane whose work the test ends."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.jobs.append((work, done))

    def work(self) -> None:
        jobs, self.jobs = self.jobs, []
        for work, done in jobs:
            done(work())


def make(own: int | None, default: int | None) -> tuple[LiveExtent, LogicalUnit, Shelf, NotYet, Nexus]:
    extent = Extent(id=1, name="e", type="File", path="/e", naa="0x" + "6" * 32, avail_threshold=own)
    lane, shelf = NotYet(), Shelf()

    def make_unit(live: LiveExtent, config: UnitConfig) -> LogicalUnit:
        return LogicalUnit(config, live.backend, live.lane, reservations=live.reservations, now=lambda: 0.0)

    live = LiveExtent(extent, shelf, lane, Reservations(), make_unit, default)  # type: ignore[arg-type]
    unit = live.unit(1, Appearance(512, "1", False))
    nexus = Nexus("iqn.2003-01.org.example:i", bytes(6), "iqn.2003-01.org.example:t", 1)
    unit.attach(nexus)
    unit.take_attention(nexus)
    return live, unit, shelf, lane, nexus


@pytest.mark.parametrize(
    ("own", "default", "effective"), [(20, None, 20), (None, 20, 20), (20, 50, 20), (50, 20, 50)]
)
def test_the_threshold_is_the_extents_own_or_else_the_global_one(
    own: int | None, default: int | None, effective: int
) -> None:
    live, unit, shelf, lane, nexus = make(own, default)
    now = 0.0
    for left in (effective + 1, effective):
        shelf.left = left * MIB
        live.measure_space(now)
        lane.work()
        now += SPACE_ARMED_S
    assert unit.take_attention(nexus) is Sense.THIN_PROVISIONING_SOFT_THRESHOLD
    assert unit.take_attention(nexus) is None


@pytest.mark.parametrize(
    ("rpm", "rotational", "rate"),
    [
        ("SSD", True, 1),
        ("7200", False, 7200),
        ("Unknown", None, 0),
        ("Unknown", True, 0),
        ("Unknown", False, 1),
    ],
)
def test_the_kernel_says_whether_it_turns_where_the_operator_does_not(
    rpm: str, rotational: bool | None, rate: int
) -> None:
    """MEDIUM ROTATION RATE of VPD page B1h (SBC-3 §6.6.2); how fast, nobody knows then."""
    live, _, shelf, _, _ = make(None, None)
    shelf.geometry = replace(shelf.geometry, rotational=rotational)
    live.extent = replace(live.extent, rpm=rpm)
    live.unit(1, Appearance(512, "1", False))
    assert live.units[1].config.rotation_rate == rate


def test_without_a_threshold_space_is_looked_at_seldom_and_never_without_a_session() -> None:
    live, unit, shelf, lane, nexus = make(None, None)
    for now in range(int(SPACE_IDLE_S)):
        live.measure_space(float(now))
        lane.work()
    assert shelf.asked == 1
    unit.detach(nexus)
    for now in range(60, 200):
        live.measure_space(float(now))
        lane.work()
    assert shelf.asked == 1


def test_a_medium_that_does_not_answer_is_not_asked_again() -> None:
    live, _, _, lane, _ = make(20, None)
    for now in range(100):
        live.measure_space(float(now))
    assert len(lane.jobs) == 1
