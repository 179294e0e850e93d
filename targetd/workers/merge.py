"""The statistics of several processes as those of one."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from targetd.interface import Latency, PortalStatistics, ProcessStatistics, Statistics
from targetd.workers.handle import WorkerHandle

__all__ = ["Counted", "merged", "with_base"]


class Counted(NamedTuple):
    """What one worker has told."""

    member: WorkerHandle
    statistics: Statistics
    age_s: float
    """How long ago; 0: just now."""


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    if isinstance(one, Latency):
        buckets = tuple(a + b for a, b in zip(one.buckets, other.buckets, strict=True))
        return Latency(buckets, one.sum_s + other.sum_s)
    return one + other


def _added(one: PortalStatistics, other: PortalStatistics) -> PortalStatistics:
    """Both together."""
    names = (item.name for item in fields(PortalStatistics) if item.name != "id")
    return replace(one, **{name: _sum(getattr(one, name), getattr(other, name)) for name in names})


def with_base(portal: PortalStatistics, base: PortalStatistics | None) -> PortalStatistics:
    """What a worker that has ended had counted, with what those before it had: counters never fall. What it
    had open is no more."""
    portal = replace(portal, connections=0, sessions=0, in_flight=0)
    return portal if base is None else _added(base, portal)


def merged(
    front: Statistics,
    counted: Sequence[Counted],
    base: Iterable[PortalStatistics],
    members: Iterable[WorkerHandle],
) -> Statistics:
    """The front's and the workers', as one. Of the loops the worst is told."""
    portals = {portal.id: portal for portal in front.portals}
    told = [each.statistics for each in counted]
    for portal in (*(portal for each in told for portal in each.portals), *base):
        if portal.id in portals:
            portals[portal.id] = _added(portals[portal.id], portal)
    processes = {
        each.member.index: replace(each.statistics.processes[0], told_s=each.age_s) for each in counted
    }
    return replace(
        front,
        units=tuple(unit for each in told for unit in each.units),
        sessions=(*front.sessions, *(session for each in told for session in each.sessions)),
        portals=tuple(portals.values()),
        work=(*front.work, *(work for each in told for work in each.work)),
        io_engine=told[0].io_engine if told else front.io_engine,
        io_engine_reason=told[0].io_engine_reason if told else front.io_engine_reason,
        io_under_way=sum(each.io_under_way for each in told),
        loop_lag_s=max(each.loop_lag_s for each in (front, *told)),
        loop_lag_longest_s=max(each.loop_lag_longest_s for each in (front, *told)),
        processes=tuple(
            replace(
                processes.get(member.index, ProcessStatistics(str(member.index), 0)),
                restarts=member.starts - 1,
            )
            for member in members
        ),
    )
