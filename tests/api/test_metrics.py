"""``/metrics`` as Prometheus' own parser reads it."""

from prometheus_client.parser import text_string_to_metric_families

from api.metrics import MOST
from targetd.interface import (
    LATENCY_BOUNDS_S,
    Latency,
    PortalStatistics,
    SessionStatistics,
    Statistics,
    UnitStatistics,
)
from tests.api.conftest import Api


def latency(**buckets: int) -> Latency:
    made = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for index, count in buckets.items():
        made[int(index[1:])] = count
    return Latency(tuple(made), 0.5)


def unit(number: int, reads: int = 1) -> UnitStatistics:
    return UnitStatistics(
        extent_id=number,
        extent=f'disk "{number}"',
        luns=(("iqn.t", 3),),
        commands={"READ(10)": reads + 1},
        failures={("READ(10)", "check_condition"): 1},
        reads=reads,
        writes=0,
        bytes_read=4096 * reads,
        bytes_written=0,
        read_errors=1,
        write_errors=0,
        in_flight=2,
        queued=0,
        ready=True,
        latency=latency(b3=5, b5=7, b15=1, b26=2),
    )


SESSION = SessionStatistics(9, "iqn.i", "iqn.t", 1, 100, 4096, 512, 1, Latency())
PORTAL = PortalStatistics(
    1, 5, 2, 1, 100, 4096, 512, 1, {"authentication_failure": 3}, {"logout": 2}, Latency()
)


async def scrape(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await api.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.raw.decode())
        for sample in family.samples
    }


async def test_every_kind_of_object_has_its_series(api: Api) -> None:
    api.engine.counted = Statistics(units=(unit(1),), sessions=(SESSION,), portals=(PORTAL,), changes=4)
    found = await scrape(api)
    lun = frozenset({"extent_id": "1", "extent": 'disk "1"', "target": "iqn.t", "lun": "3"}.items())
    command = lun | {("command", "READ(10)")}
    session = frozenset({"session": "9", "initiator": "iqn.i", "target": "iqn.t"}.items())
    portal = frozenset({("portal", "1")})
    expected = {
        ("iscsi_lun_reads_total", lun): 1,
        ("iscsi_lun_read_bytes_total", lun): 4096,
        ("iscsi_lun_in_flight", lun): 2,
        ("iscsi_lun_commands_total", command): 2,
        ("iscsi_lun_failures_total", command | {("status", "check_condition")}): 1,
        ("iscsi_session_commands_total", session): 100,
        ("iscsi_portal_login_failures_total", portal | {("status", "authentication_failure")}): 3,
        ("iscsi_portal_drops_total", portal | {("reason", "logout")}): 2,
        ("iscsi_configuration_changes_total", frozenset()): 4,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


async def test_buckets_are_cumulative_and_lose_nothing(api: Api) -> None:
    api.engine.counted = Statistics(units=(unit(1),))
    found = await scrape(api)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in found.items()
        if name == "iscsi_lun_latency_seconds_bucket"
    }
    assert buckets[16e-6] == 5
    assert buckets[32e-6] == 12
    assert buckets[16384e-6] == 12
    assert buckets[65536e-6] == 13
    assert buckets[float("inf")] == 15
    assert list(buckets.values()) == sorted(buckets.values())


async def test_only_the_busiest_have_series_of_their_own(api: Api) -> None:
    """Cardinality is bounded, however many there are."""
    api.engine.counted = Statistics(units=tuple(unit(number, number) for number in range(1, MOST + 101)))
    found = await scrape(api)
    told = {int(dict(labels)["extent_id"]) for (name, labels) in found if name == "iscsi_lun_reads_total"}
    assert told == set(range(101, MOST + 101))
    assert found[("iscsi_luns", frozenset())] == MOST + 100
    assert found[("iscsi_luns_untold", frozenset())] == 100


async def test_openmetrics_is_served_to_who_asks_for_it(api: Api) -> None:
    answer = await api.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.raw.endswith(b"# EOF\n")


async def test_metrics_stand_behind_the_login(api: Api) -> None:
    api.authorization = None
    assert (await api.get("/metrics")).status == 401
