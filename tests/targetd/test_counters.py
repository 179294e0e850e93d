"""Counters beside those of sessions and units: buckets, sums over portals, names of which there are few."""

import gc
from types import SimpleNamespace
from typing import cast

import pytest

from protocol.scsi.device import LogicalUnit
from protocol.session import Session
from targetd.interface import LATENCY_BOUNDS_S
from targetd.net.counters import Counters, LatencyCounter, command_name, login_status_name


@pytest.mark.parametrize(
    ("elapsed_s", "bucket"),
    [(0.0, 0), (0.9e-6, 0), (1.1e-6, 1), (16.5e-6, 5), (1.0, 20), (33.0, 25), (34.0, 26), (1e9, 26)],
)
def test_a_latency_falls_between_the_bounds_of_its_bucket(elapsed_s: float, bucket: int) -> None:
    counter = LatencyCounter()
    counter.add(elapsed_s, 3)
    assert counter.frozen().buckets[bucket] == sum(counter.buckets) == 3
    assert counter.sum_s == pytest.approx(3 * elapsed_s)
    bounds = (0.0, *LATENCY_BOUNDS_S, float("inf"))
    assert bounds[bucket] <= elapsed_s < bounds[bucket + 1]


class Unit:
    """Stands for a logical unit: counters hold it weakly and ask it nothing."""


def session(portal_id: int, commands: int = 0) -> Session:
    grant = SimpleNamespace(target_portal_group_tag=portal_id, target_name="iqn.t")
    made = SimpleNamespace(
        id=1, ended="", grant=grant, commands=commands, bytes_read=7, bytes_written=5, tasks={}
    )
    made.initiator_name = "iqn.i"
    return cast(Session, _Hashable(made.__dict__))


class _Hashable(SimpleNamespace):
    def __init__(self, values: dict[str, object]) -> None:
        super().__init__(**values)

    __hash__ = object.__hash__


def test_what_a_session_counted_stays_with_its_portal_when_it_ends() -> None:
    counters = Counters()
    unit = cast(LogicalUnit, Unit())
    first, second = session(1, commands=10), session(1, commands=3)
    counters.took(unit, first, 1e-3)
    counters.took(unit, second, 1e-3, 16)
    before = counters.of_portal(1, 2, [first, second])
    assert (before.commands, before.bytes_read, before.sessions) == (13, 14, 2)
    first.ended = "logout"
    counters.session_ended(first)
    after = counters.of_portal(1, 1, [second])
    assert (after.commands, after.bytes_read, after.sessions) == (13, 14, 1)
    assert before.latency == after.latency
    assert sum(after.latency.buckets) == 17
    assert not counters.sessions.keys() & {first}


def test_a_late_command_does_not_bring_its_session_back() -> None:
    counters, gone = Counters(), session(1)
    gone.ended = "logout"
    counters.took(cast(LogicalUnit, Unit()), gone, 1.0)
    assert not counters.sessions


def test_units_are_forgotten_with_what_was_counted_for_them() -> None:
    counters, unit = Counters(), cast(LogicalUnit, Unit())
    counters.took(unit, None, 1e-3)
    assert len(counters.units) == 1
    del unit
    gc.collect()
    assert not len(counters.units)


@pytest.mark.parametrize(
    ("opcode", "name"), [(0x28, "READ(10)"), (0x00, "TEST UNIT READY"), (0x9E, "9Eh"), (0xFF, "unsupported")]
)
def test_commands_go_by_few_names(opcode: int, name: str) -> None:
    assert command_name(opcode) == name


def test_a_login_status_has_its_name() -> None:
    assert login_status_name(0x0201) == "authentication_failure"
    assert login_status_name(0xFFFF) == "other"
