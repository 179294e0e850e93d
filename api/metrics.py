"""``/metrics``: the engine's counters for Prometheus. Reads at the scrape, keeps nothing.

The numbers are taken at one moment on the event loop and written out on a worker. Cardinality is bounded:
labels come from the configuration and from fixed lists, and of logical units and sessions only the busiest
``MOST`` have series of their own; ``iscsi_…_untold`` says how many are left out. Sums over everything are
the portals'.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from api.routing import Operation, Router
from targetd.interface import (
    LATENCY_BOUNDS_S,
    Engine,
    Latency,
    PortalStatistics,
    SessionStatistics,
    Statistics,
    UnitStatistics,
)
from targetd.system.threads import run_in_thread

__all__ = ["METRICS_PATH", "MetricsResource"]

METRICS_PATH: Final = "/metrics"
MOST: Final = 250
"""Logical units, and sessions, with series of their own: some 10 000 lines, a scrape of 0.2 s."""
SHOWN: Final = (*range(4, 15), 16, 18, 20, 22, 24)
"""Which of the latency bounds are told, by index: 16 µs to 16 ms each, then every second one to 17 s."""

Value = Callable[[Any], float]


class _Family:
    """One metric with one value an object."""

    def __init__(self, kind: type[Metric], name: str, text: str, value: Value) -> None:
        self.kind = kind
        self.name = name
        self.text = text
        self.value = value


def _counter(name: str, text: str, value: Value) -> _Family:
    return _Family(CounterMetricFamily, name, text, value)


def _gauge(name: str, text: str, value: Value) -> _Family:
    return _Family(GaugeMetricFamily, name, text, value)


_UNIT: Final[Sequence[_Family]] = (
    _counter("iscsi_lun_reads", "Commands that read and ended GOOD.", lambda u: u.reads),
    _counter("iscsi_lun_writes", "Commands that wrote and ended GOOD.", lambda u: u.writes),
    _counter("iscsi_lun_read_bytes", "Bytes read from the medium.", lambda u: u.bytes_read),
    _counter("iscsi_lun_written_bytes", "Bytes written to the medium.", lambda u: u.bytes_written),
    _counter("iscsi_lun_read_errors", "Reads that the medium failed.", lambda u: u.read_errors),
    _counter("iscsi_lun_write_errors", "Writes that the medium failed.", lambda u: u.write_errors),
    _gauge("iscsi_lun_in_flight", "Commands in the task set.", lambda u: u.in_flight),
    _gauge("iscsi_lun_queued", "Work of the extent that waits for a worker.", lambda u: u.queued),
    _gauge("iscsi_lun_ready", "1: the medium is there.", lambda u: u.ready),
)

_SESSION: Final[Sequence[_Family]] = (
    _counter("iscsi_session_commands", "Commands received.", lambda s: s.commands),
    _counter("iscsi_session_read_bytes", "Bytes of Data-In sent.", lambda s: s.bytes_read),
    _counter("iscsi_session_written_bytes", "Bytes of Data-Out taken.", lambda s: s.bytes_written),
    _gauge("iscsi_session_in_flight", "Commands under way.", lambda s: s.in_flight),
)

_PORTAL: Final[Sequence[_Family]] = (
    _counter("iscsi_portal_accepted", "TCP connections accepted.", lambda p: p.connections_accepted),
    _gauge("iscsi_portal_connections", "TCP connections open.", lambda p: p.connections),
    _gauge("iscsi_portal_sessions", "Sessions open, discovery ones too.", lambda p: p.sessions),
    _counter("iscsi_portal_commands", "Commands received.", lambda p: p.commands),
    _counter("iscsi_portal_read_bytes", "Bytes of Data-In sent.", lambda p: p.bytes_read),
    _counter("iscsi_portal_written_bytes", "Bytes of Data-Out taken.", lambda p: p.bytes_written),
    _gauge("iscsi_portal_in_flight", "Commands under way.", lambda p: p.in_flight),
    _gauge(
        "iscsi_portal_addresses_absent",
        "Addresses that this host has not got, or whose port is taken.",
        lambda p: p.addresses_absent,
    ),
)

_WHOLE: Final[Sequence[_Family]] = (
    _gauge("iscsi_luns", "Logical units.", lambda s: len(s.units)),
    _gauge("iscsi_sessions", "Sessions open, discovery ones too.", lambda s: len(s.sessions)),
    _gauge("iscsi_luns_untold", "Logical units without series.", lambda s: max(0, len(s.units) - MOST)),
    _gauge("iscsi_sessions_untold", "Sessions without series.", lambda s: max(0, len(s.sessions) - MOST)),
    _counter("iscsi_configuration_changes", "Changes that were saved.", lambda s: s.changes),
    _counter(
        "iscsi_configuration_failures", "Changes that failed after validation.", lambda s: s.changes_failed
    ),
    _counter("iscsi_store_save_seconds", "Time spent saving changes.", lambda s: s.save_s),
    _gauge("iscsi_store_save_longest_seconds", "The longest of them.", lambda s: s.save_longest_s),
    _gauge("iscsi_loop_lag_seconds", "How late the event loop was last.", lambda s: s.loop_lag_s),
    _gauge("iscsi_loop_lag_longest_seconds", "The most it ever was.", lambda s: s.loop_lag_longest_s),
    _gauge(
        "iscsi_io_uring",
        "1: the kernel does what waits for a disk (io_uring); 0: worker threads.",
        lambda s: s.io_engine == "uring",
    ),
    _gauge("iscsi_io_uring_in_flight", "Operations that the kernel has in hand.", lambda s: s.io_under_way),
    _counter("iscsi_events_lost", "Events that slow readers of the stream missed.", lambda s: s.events_lost),
)


_PROCESS: Final[Sequence[_Family]] = (
    _gauge("iscsi_worker_up", "1: the worker process is there.", lambda p: p.pid > 0),
    _counter("iscsi_worker_restarts", "Times it was started again.", lambda p: p.restarts),
    _counter("iscsi_worker_cpu_seconds", "User and system time of this process.", lambda p: p.cpu_s),
    _gauge("iscsi_worker_resident_memory_bytes", "Resident memory.", lambda p: p.resident_bytes),
    _gauge("iscsi_worker_open_fds", "File descriptors open.", lambda p: p.descriptors),
    _gauge("iscsi_worker_told_seconds", "Age of its figures; 0: it answers.", lambda p: p.told_s),
    _gauge("iscsi_worker_loop_lag_seconds", "How late its event loop was last.", lambda p: p.loop_lag_s),
)


def _unit_labels(unit: UnitStatistics) -> tuple[str, ...]:
    target, lun = unit.luns[0] if unit.luns else ("", "")
    return str(unit.extent_id), unit.extent, target, str(lun)


def _session_labels(session: SessionStatistics) -> tuple[str, ...]:
    return str(session.id), session.initiator_name, session.target_name


def _portal_labels(portal: PortalStatistics) -> tuple[str, ...]:
    return (str(portal.id),)


_UNIT_LABELS: Final = ("extent_id", "extent", "target", "lun")
_SESSION_LABELS: Final = ("session", "initiator", "target")
_PORTAL_LABELS: Final = ("portal",)


def _simple(
    families: Sequence[_Family], names: Sequence[str], objects: Sequence[tuple[tuple[str, ...], Any]]
) -> Iterator[Metric]:
    for family in families:
        metric = family.kind(family.name, family.text, labels=names)  # type: ignore[call-arg]  # every kind has them
        for labels, thing in objects:
            metric.add_metric(labels, float(family.value(thing)))  # type: ignore[attr-defined]
        yield metric


def _counted(
    name: str,
    text: str,
    names: Sequence[str],
    rows: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    metric = CounterMetricFamily(name, text, labels=names)
    for labels, value in rows:
        metric.add_metric(labels, value)
    return metric


def _latencies(name: str, names: Sequence[str], rows: Iterable[tuple[tuple[str, ...], Latency]]) -> Metric:
    text = "Seconds from a whole command to its answer; commands that end at once are sampled."
    metric = HistogramMetricFamily(name, text, labels=names)
    for labels, latency in rows:
        metric.add_metric(labels, _cumulative(latency), latency.sum_s)
    return metric


def _cumulative(latency: Latency) -> list[tuple[str, float]]:
    """(bound, commands up to it), the last without a bound."""
    shown = []
    total, at = 0, 0
    for index in SHOWN:
        total += sum(latency.buckets[at : index + 1])
        at = index + 1
        shown.append((repr(LATENCY_BOUNDS_S[index]), float(total)))
    return [*shown, ("+Inf", float(sum(latency.buckets)))]


class _Snapshot(Collector):
    """One moment, as metrics."""

    def __init__(self, statistics: Statistics, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        statistics = self._statistics
        units = [
            (_unit_labels(unit), unit)
            for unit in heapq.nlargest(MOST, statistics.units, key=lambda unit: unit.reads + unit.writes)
        ]
        sessions = [
            (_session_labels(session), session)
            for session in heapq.nlargest(MOST, statistics.sessions, key=lambda session: session.commands)
        ]
        portals = [(_portal_labels(portal), portal) for portal in statistics.portals]
        yield from _simple(_WHOLE, (), [((), statistics)])
        limit = GaugeMetricFamily(
            "iscsi_sessions_limit",
            "Normal sessions that there may be (iscsi_maxsesh); one address or initiator has three quarters. "
            'Refusals are iscsi_portal_login_failures_total{status="out_of_resources"}.',
        )
        limit.add_metric((), self._max_sessions)
        yield limit
        if statistics.processes:
            yield from _simple(_PROCESS, ("worker",), [((p.name,), p) for p in statistics.processes])
        yield from _simple(_UNIT, _UNIT_LABELS, units)
        yield _counted(
            "iscsi_lun_commands",
            "Commands received, by name.",
            (*_UNIT_LABELS, "command"),
            (((*labels, name), count) for labels, unit in units for name, count in unit.commands.items()),
        )
        yield _counted(
            "iscsi_lun_failures",
            "Commands that did not end GOOD, by name and SCSI status.",
            (*_UNIT_LABELS, "command", "status"),
            (((*labels, *key), count) for labels, unit in units for key, count in unit.failures.items()),
        )
        yield _latencies(
            "iscsi_lun_latency_seconds", _UNIT_LABELS, ((labels, unit.latency) for labels, unit in units)
        )
        yield from _simple(_SESSION, _SESSION_LABELS, sessions)
        yield _latencies(
            "iscsi_session_latency_seconds",
            _SESSION_LABELS,
            ((labels, session.latency) for labels, session in sessions),
        )
        yield from _simple(_PORTAL, _PORTAL_LABELS, portals)
        yield _counted(
            "iscsi_portal_login_failures",
            "Logins refused, by login status.",
            (*_PORTAL_LABELS, "status"),
            (
                ((*labels, status), count)
                for labels, portal in portals
                for status, count in portal.login_failures.items()
            ),
        )
        yield _counted(
            "iscsi_portal_drops",
            "Connections that ended, by kind of reason.",
            (*_PORTAL_LABELS, "reason"),
            (((*labels, kind), count) for labels, portal in portals for kind, count in portal.drops.items()),
        )
        yield _latencies(
            "iscsi_portal_latency_seconds",
            _PORTAL_LABELS,
            ((labels, portal.latency) for labels, portal in portals),
        )


class MetricsResource:
    """Serves them, in Prometheus' text format or OpenMetrics, whichever the scraper prefers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)

    def register(self, router: Router) -> None:
        """Add the place."""
        router.add(
            "system",
            METRICS_PATH,
            {"GET": Operation(self.get, "Counters for Prometheus.", {200: None, 401: None})},
        )

    async def get(self, request: web.Request) -> web.StreamResponse:
        """GET of all."""
        statistics = await self._engine.statistics()
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = await run_in_thread(self._write, encode, statistics)
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _write(self, encode: Callable[[Any], bytes], statistics: Statistics) -> bytes:
        """On a worker."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(statistics, self._engine.configuration.globals.max_sessions))
        registry.register(_Both(self._process))
        return encode(registry)


class _Both(Collector):
    """What another registry has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        yield from self._registry.collect()

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time."""
        return iter(())
