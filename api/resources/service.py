"""``services/services/``: the one service there is, by name or id (api-semantics §9.1)."""

from dataclasses import replace
from typing import Any

from aiohttp import web

from api.bodies import content_range, page, read_object
from api.errors import FieldsError, NotFoundError, OperationFailedError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from api.schema import coerce
from targetd.config import REQUIRED, ConfigError, Configuration
from targetd.interface import Engine

__all__ = ["SERVICE_ID", "SERVICE_NAME", "ServiceResource"]

PATH = f"{PREFIX}services/services/"
SERVICE_NAME = "iscsitarget"
SERVICE_ID = 1


class ServiceResource:
    """Whether the portals listen. The enable flag is stored; switching it off ends all sessions."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def register(self, router: Router) -> None:
        """Add its two places."""
        router.add(
            "services",
            PATH,
            {
                "GET": Operation(
                    self.get_list,
                    "List.",
                    {200: "Service[]", 400: "Error", 401: None},
                    parameters=LIST_PARAMETERS,
                )
            },
        )
        changed: dict[int, str | None] = {
            200: "Service",
            400: "Error",
            401: None,
            404: None,
            409: "FieldErrors",
        }
        router.add(
            "services",
            f"{PATH}{{name}}/",
            {
                "GET": Operation(self.detail, "Show, by name or id.", {200: "Service", 401: None, 404: None}),
                "PUT": Operation(self.put, "Start or stop the portals.", changed, "ServiceUpdate"),
                "PATCH": Operation(self.put, "The same as PUT.", changed, "ServiceUpdate"),
            },
        )

    def _show(self) -> dict[str, Any]:
        state = self.engine.service_state()
        return {
            "id": SERVICE_ID,
            "srv_service": SERVICE_NAME,
            "srv_enable": state.enabled,
            "srv_state": "RUNNING" if state.running else "STOPPED",
        }

    def _check(self, name: str) -> None:
        if name not in (SERVICE_NAME, str(SERVICE_ID)):
            raise NotFoundError

    async def get_list(self, request: web.Request) -> web.StreamResponse:
        """GET of all."""
        services = [self._show()]
        offset, shown = page(request, services)
        return answer(200, list(shown), content_range(offset, len(shown), len(services)))

    async def detail(self, request: web.Request, name: str) -> web.StreamResponse:
        """GET of one."""
        self._check(name)
        return answer(200, self._show())

    async def put(self, request: web.Request, name: str) -> web.StreamResponse:
        """PUT: ``{"srv_enable": bool}``; answers what has become of it."""
        self._check(name)
        wanted = (await read_object(request)).get("srv_enable")
        if wanted is None:
            raise FieldsError({"srv_enable": [REQUIRED]})
        try:
            enabled = coerce(bool, wanted)
        except ValueError as error:
            raise FieldsError({"srv_enable": [str(error)]}) from None

        def edit(config: Configuration) -> Configuration:
            return config if config.service_enabled == enabled else replace(config, service_enabled=enabled)

        try:
            await self.engine.apply(edit)
        except ConfigError as error:
            raise OperationFailedError("; ".join(problem.message for problem in error.problems)) from None
        return answer(200, self._show())
