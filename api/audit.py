"""Who changed what: one record on logger ``audit`` for every write that was asked for, refused ones too.

A record is one JSON object: who, from where, the request, its status, and for each object that changed what
it was before and what it is now, secrets masked. It is the message of the log line, and the member ``audit``
of a line in JSON. What a request did is gathered in its own context: writers at one time are told apart.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from api.auth import READING, USER
from api.errors import Handler
from api.schema import MASK
from targetd.config import GLOBALS, Configuration, diff, objects, rules
from targetd.interface import Edit, Engine

__all__ = ["MASK", "audit", "audited", "note", "recorded"]

log = logging.getLogger("audit")


_TRAIL: ContextVar[list[dict[str, Any]]] = ContextVar("trail")


def note(kind: str, name: object, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
    """Something that this request changed; None: it was not there, or is gone. No secrets, please."""
    trail = _TRAIL.get(None)
    if trail is not None:
        trail.append({"kind": kind, "id": name, "before": before, "after": after})


@web.middleware
async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The middleware; stands outside of the login, so that it hears of those it refuses."""
    if request.method in READING:
        return await handler(request)
    with recorded(None, request.remote, request.path, request.method) as outcome:
        response = await handler(request)
        account = request.get(USER)
        outcome.user = account.name if account is not None else None
        outcome.status = response.status
    return response


@dataclass(slots=True)
class Outcome:
    """Who asked, and what became of it; filled in on the way."""

    user: str | None
    status: int = 0


@contextmanager
def recorded(user: str | None, address: str | None, path: str, method: str = "CALL") -> Iterator[Outcome]:
    """Write one audit record of what is done inside.

    Args:
        user: name of the account; None: not known yet.
        address: of the peer.
        path: of the request, or the name of the method that is called.
        method: of HTTP; ``CALL`` for a call that came otherwise.
    """
    trail: list[dict[str, Any]] = []
    token = _TRAIL.set(trail)
    outcome = Outcome(user)
    try:
        yield outcome
    finally:
        _TRAIL.reset(token)
        record = {
            "user": outcome.user,
            "address": address,
            "method": method,
            "path": path[:500],
            "status": outcome.status,
            "changes": trail,
        }
        log.info("%s", json.dumps(record), extra={"audit": record})


class _Audited:
    """An engine that notes what each edit did."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def apply(self, edit: Edit, **options: Any) -> Configuration:
        """See ``Engine.apply``."""
        found: list[Configuration] = []

        def noted(config: Configuration) -> Configuration:
            found.append(config)
            return edit(config)

        after = await self._engine.apply(noted, **options)
        for kind, id, was, now in _differences(found[-1], after):
            note(kind, id, was, now)
        return after


def audited(engine: Engine) -> Engine:
    """The engine, noting what each request does to its configuration."""
    return cast(Engine, _Audited(engine))  # everything else is handed through


def _differences(
    before: Configuration, after: Configuration
) -> Iterator[tuple[str, int | None, dict[str, Any] | None, dict[str, Any] | None]]:
    """(collection, id, before, after): of a changed object only what changed in it."""
    if before.globals != after.globals:
        yield GLOBALS, None, *_changed(before.globals, after.globals)
    if before.service_enabled != after.service_enabled:
        yield "service", None, {"enabled": before.service_enabled}, {"enabled": after.service_enabled}
    for collection, change in diff(before, after).items():
        there = objects(before, collection)
        for id, now in change.written.items():
            was = there.get(id)
            if was is None:
                yield collection, id, None, _plain(now)
            else:
                yield collection, id, *_changed(was, now)
        for id in change.removed:
            yield collection, id, _plain(there[id]), None


def _plain(record: Any) -> dict[str, Any]:
    return {name: _masked(record, name) for name in rules(type(record))}


def _changed(was: Any, now: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [name for name in rules(type(was)) if getattr(was, name) != getattr(now, name)]
    return {name: _masked(was, name) for name in names}, {name: _masked(now, name) for name in names}


def _masked(record: Any, name: str) -> Any:
    value = getattr(record, name)
    return MASK if value and rules(type(record))[name].secret else value
