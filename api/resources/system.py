"""``system/version/``, ``/healthz``, and the index (api-semantics §9.1).

Clients take the version apart to choose their dialect. 9.2.1.9 is the last release whose resources are
those of the specification; it makes every known client speak v1.0.
"""

from typing import Final

from aiohttp import web

from api.errors import answer
from api.resources.collection import PREFIX
from api.routing import Operation, Router

__all__ = ["HEALTH_PATH", "SystemResource"]

HEALTH_PATH: Final = "/healthz"
EMULATED_VERSION: Final = "9.2.1.9"


class SystemResource:
    """What is asked before anything else."""

    def __init__(self, version: str, emulated: str = "") -> None:
        """
        Args:
            version: ours.
            emulated: what to tell instead of 9.2.1.9, if it is a FreeNAS version: ``FreeNAS-11.2-U8``.
        """
        self.version = version
        name, _, number = emulated.partition("-")
        self.emulated = number if name == "FreeNAS" else EMULATED_VERSION
        self.full = emulated if name == "FreeNAS" else f"FreeNAS-{EMULATED_VERSION}-RELEASE"

    def register(self, router: Router) -> None:
        """Add the places."""
        router.add(
            "system",
            f"{PREFIX}system/version/",
            {"GET": Operation(self.get_version, "Which API this is.", {200: "Version", 401: None})},
        )
        router.add(
            "system",
            HEALTH_PATH,
            {"GET": Operation(self.health, "The daemon answers. No login needed.", {200: "Health"})},
        )

    async def get_version(self, request: web.Request) -> web.StreamResponse:
        """GET of the version."""
        return answer(
            200,
            {
                "fullversion": f"{self.full} (iscsi-targetd {self.version})",
                "name": "FreeNAS",
                "version": self.emulated,
            },
        )

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET: 200 as long as the event loop turns."""
        return answer(200, {"status": "ok"})
