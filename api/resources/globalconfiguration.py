"""``globalconfiguration``: what holds for every target; one object (api-semantics §5.1)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from api.bodies import read_object, strict
from api.errors import FieldsError, answer
from api.fields import GLOBAL_CONFIGURATION
from api.resources.collection import PREFIX, refuse_unknown
from api.routing import Operation, Router
from targetd.config import ConfigError, Configuration, GlobalConfiguration, validate
from targetd.interface import Engine

__all__ = ["GlobalConfigurationResource"]

PATH = f"{PREFIX}services/iscsi/globalconfiguration/"


class GlobalConfigurationResource:
    """The singleton."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def register(self, router: Router) -> None:
        """Add its two places."""
        title = GLOBAL_CONFIGURATION.title
        failures: dict[int, str | None] = {400: "Error", 401: None, 409: "FieldErrors"}
        for path in (PATH, f"{PATH}1/"):
            router.add(
                "globalconfiguration",
                path,
                {
                    "GET": Operation(self.get, "Show.", {200: title, 401: None}),
                    "PUT": Operation(
                        self.put,
                        "Change what the body names.",
                        {202: title, **failures},
                        f"{title}Update",
                        ("strict",),
                    ),
                },
            )

    def show(self, settings: GlobalConfiguration) -> dict[str, Any]:
        """The body."""
        columns = GLOBAL_CONFIGURATION.columns
        return {"id": 1, **{column.wire: getattr(settings, column.attribute) for column in columns}}

    async def get(self, request: web.Request) -> web.StreamResponse:
        """GET."""
        return answer(200, self.show(self.engine.configuration.globals))

    async def put(self, request: web.Request) -> web.StreamResponse:
        """PUT: change what the body names. Parameters of a login apply to new sessions."""
        body = await read_object(request)
        if strict(request):
            refuse_unknown(body, GLOBAL_CONFIGURATION)
        return answer(202, self.show(await self.write(body)))

    async def write(self, body: Mapping[str, Any]) -> GlobalConfiguration:
        """Change what a body by wire names says; the settings as they are then.

        Raises:
            FieldsError: with all that is wrong; nothing has changed.
        """
        values, errors = GLOBAL_CONFIGURATION.read(body, creating=False)

        def edit(config: Configuration) -> Configuration:
            changed = replace(config.globals, **values)
            return config if changed == config.globals else replace(config, globals=changed)

        try:
            if errors:
                before = self.engine.configuration
                validate(edit(before), since=before)
            else:
                config = await self.engine.apply(edit)
        except ConfigError as error:
            raise FieldsError({**GLOBAL_CONFIGURATION.wire_errors(error.problems), **errors}) from None
        if errors:
            raise FieldsError(errors)
        return config.globals
