"""Why may an initiator not log in? The last refusals, and the answer ahead of time. Not in FreeNAS."""

import dataclasses
import ipaddress
from typing import Any, Final

from aiohttp import web

from api.bodies import content_range, page
from api.encoding import answer_long
from api.errors import BadRequestError
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from targetd.config import MAX_NAME_BYTES
from targetd.interface import (
    LATENCY_BOUNDS_S,
    Engine,
    Latency,
    PortalStatistics,
    SessionStatistics,
    UnitStatistics,
)
from targetd.system.pieces import gathered

__all__ = ["DiagnosisResource"]

FAILURES_PATH: Final = f"{PREFIX}services/iscsi/loginfailure/"
STATISTICS_PATH: Final = f"{PREFIX}services/iscsi/statistics/"
WORK_PATH: Final = f"{PREFIX}services/iscsi/work/"
EXPLAIN_PATH: Final = f"{PREFIX}services/iscsi/explain/"

QUANTILES: Final = {"p50": 0.5, "p99": 0.99}


def _counters(counted: UnitStatistics | SessionStatistics | PortalStatistics) -> dict[str, Any]:
    shown = {
        item.name: getattr(counted, item.name)
        for item in dataclasses.fields(counted)
        if item.name not in ("latency", "luns", "failures")
    }
    return {**shown, "latency_s": {name: quantile(counted.latency, q) for name, q in QUANTILES.items()}}


def _unit(unit: UnitStatistics) -> dict[str, Any]:
    return {
        **_counters(unit),
        "luns": [{"target": target, "lun": lun} for target, lun in unit.luns],
        "failures": [
            {"command": command, "status": status, "count": count}
            for (command, status), count in unit.failures.items()
        ],
    }


def quantile(latency: Latency, q: float) -> float | None:
    """The bound that a share ``q`` of the commands stayed below, seconds; None: there were none, or it is
    beyond all bounds."""
    wanted = q * sum(latency.buckets)
    total = 0
    for bound, count in zip(LATENCY_BOUNDS_S, latency.buckets, strict=False):
        total += count
        if total and total >= wanted:
            return bound
    return None


class DiagnosisResource:
    """Its places."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def register(self, router: Router) -> None:
        """Add them."""
        router.add(
            "diagnosis",
            FAILURES_PATH,
            {
                "GET": Operation(
                    self.get_failures,
                    "The last refused logins, newest first, with the rule that refused them.",
                    {200: "LoginFailure[]", 400: "Error", 401: None},
                    parameters=LIST_PARAMETERS,
                )
            },
        )
        router.add(
            "diagnosis",
            STATISTICS_PATH,
            {
                "GET": Operation(
                    self.get_statistics,
                    "Counters of logical units, sessions and portals since the start.",
                    {200: "Statistics", 401: None},
                )
            },
        )
        router.add(
            "diagnosis",
            WORK_PATH,
            {
                "GET": Operation(
                    self.get_work,
                    "Work under way that takes its time: space being taken, SANITIZE, third-party copies.",
                    {200: "Work[]", 400: "Error", 401: None},
                    parameters=LIST_PARAMETERS,
                )
            },
        )
        router.add(
            "diagnosis",
            EXPLAIN_PATH,
            {
                "GET": Operation(
                    self.explain,
                    "May this initiator from this address log in to this target, and what would it see?",
                    {200: "Explanation[]", 400: "Error", 401: None},
                    parameters=("initiator", "address", "target", "portal"),
                )
            },
        )

    async def get_failures(self, request: web.Request) -> web.StreamResponse:
        """GET of the refusals."""
        failures = await self.engine.login_failures()
        offset, chosen = page(request, failures)
        headers = content_range(offset, len(chosen), len(failures))
        return await answer_long(await gathered(map(dataclasses.asdict, chosen)), headers)

    async def get_statistics(self, request: web.Request) -> web.StreamResponse:
        """GET of the counters; of latencies the quantiles, in seconds."""
        statistics = await self.engine.statistics()
        shown = {
            **dataclasses.asdict(dataclasses.replace(statistics, units=(), sessions=(), portals=(), work=())),
            "units": await gathered(map(_unit, statistics.units)),
            "sessions": await gathered(map(_counters, statistics.sessions)),
            "portals": await gathered(map(_counters, statistics.portals)),
            "work": await gathered(map(dataclasses.asdict, statistics.work)),
        }
        return await answer_long(shown)

    async def get_work(self, request: web.Request) -> web.StreamResponse:
        """GET of what is under way; bytes done and bytes in all."""
        work = (await self.engine.statistics()).work
        offset, chosen = page(request, work)
        headers = content_range(offset, len(chosen), len(work))
        return await answer_long(await gathered(map(dataclasses.asdict, chosen)), headers)

    async def explain(self, request: web.Request) -> web.StreamResponse:
        """GET of what would come of a login: one answer for each portal and target that was asked for."""
        query = request.query
        initiator, address = query.get("initiator", "").strip(), query.get("address", "").strip()
        target, portal = query.get("target", "").strip(), query.get("portal", "").strip()
        if not initiator or len(initiator.encode(errors="replace")) > MAX_NAME_BYTES:
            raise BadRequestError("Say which initiator: initiator=iqn.…, of at most 223 bytes.")
        try:
            peer = ipaddress.ip_address(address.partition("%")[0].strip("[]"))
        except ValueError:
            raise BadRequestError("Say where it comes from: address=, an IPv4 or IPv6 address.") from None
        config = self.engine.configuration
        portal_id = None
        if portal:
            known = portal.isascii() and portal.isdecimal() and len(portal) < 10
            portal_id = int(portal) if known else 0
            if portal_id not in config.portals:
                raise BadRequestError(f"There is no portal {portal[:40]}.")
        found = await self.engine.explain(initiator, str(peer), target, portal_id)
        if target and not found and config.portals:
            raise BadRequestError(f"There is no target {target[:MAX_NAME_BYTES]}.")
        return await answer_long(await gathered(map(dataclasses.asdict, found)))
