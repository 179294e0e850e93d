"""``services/iscsi/session/``: who is logged in, and how to end it. Not in FreeNAS."""

import dataclasses
from typing import Any

from aiohttp import web

from api.audit import note
from api.bodies import content_range, page
from api.encoding import answer_long
from api.errors import NotFoundError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from targetd.interface import Engine, SessionStatus
from targetd.system.pieces import gathered

__all__ = ["SessionResource"]

PATH = f"{PREFIX}services/iscsi/session/"


class SessionResource:
    """Sessions, discovery ones too, oldest first."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def register(self, router: Router) -> None:
        """Add its places."""
        router.add(
            "session",
            PATH,
            {
                "GET": Operation(
                    self.get_list,
                    "List.",
                    {200: "Session[]", 400: "Error", 401: None},
                    parameters=LIST_PARAMETERS,
                )
            },
        )
        router.add(
            "session",
            f"{PATH}{{id}}/",
            {
                "GET": Operation(self.detail, "Show.", {200: "Session", 401: None, 404: None}),
                "DELETE": Operation(
                    self.delete,
                    "Ask the initiator to log out, then end the session.",
                    {204: None, 401: None, 404: None},
                ),
            },
        )

        router.add(
            "session",
            f"{PATH}{{id}}/negotiate/",
            {
                "POST": Operation(
                    self.negotiate,
                    "Ask the initiator to negotiate anew, so that a changed MaxRecvDataSegmentLength or alias"
                    " holds without a new login. Linux's initiator answers by logging in again; one that does"
                    " nothing loses the connection.",
                    {202: None, 401: None, 404: None},
                )
            },
        )

    async def get_list(self, request: web.Request) -> web.StreamResponse:
        """GET of all."""
        sessions = sorted(await self.engine.sessions(), key=lambda session: session.id)
        offset, chosen = page(request, sessions)
        headers = content_range(offset, len(chosen), len(sessions))
        return await answer_long(await gathered(map(_show, chosen)), headers)

    async def detail(self, request: web.Request, id: int) -> web.StreamResponse:
        """GET of one."""
        for session in await self.engine.sessions():
            if session.id == id:
                return answer(200, _show(session))
        raise NotFoundError

    async def delete(self, request: web.Request, id: int) -> web.StreamResponse:
        """DELETE: end it."""
        if not await self.engine.drop(id, "ended by an administrator"):
            raise NotFoundError
        note("sessions", id, {}, None)
        return answer(204)

    async def negotiate(self, request: web.Request, id: int) -> web.StreamResponse:
        """POST: ask for it; whether the initiator does is seen in the session."""
        if not await self.engine.negotiate(id):
            raise NotFoundError
        return answer(202)


def _show(session: SessionStatus) -> dict[str, Any]:
    return dataclasses.asdict(session)
