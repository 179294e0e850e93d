"""The application: what is served, and what stands before it.

A request passes, from outside in: headers common to all answers, the audit, the translation of errors, the
check for requests that a page of another site makes, the login, the router. So an answer of any kind has the
headers, and nothing is told to who is not logged in.
"""

import logging
from collections.abc import Iterable
from typing import Final, Protocol

from aiohttp import web

from api.audit import audit, audited
from api.auth import Authenticator, require_login
from api.bodies import DEFAULT_LIMIT, MAX_BODY_BYTES, PAGE_SIZE
from api.errors import Handler, translate_errors
from api.keys import KeyRing, KeysResource
from api.metrics import MetricsResource
from api.openapi import Documents
from api.origin import refuse_other_sites
from api.resources.authcredential import AuthCredentialResource
from api.resources.authorizedinitiator import AuthorizedInitiatorResource
from api.resources.config import ConfigResource
from api.resources.diagnosis import DiagnosisResource
from api.resources.events import EventsResource
from api.resources.extent import ExtentResource
from api.resources.globalconfiguration import GlobalConfigurationResource
from api.resources.portal import PortalResource
from api.resources.service import ServiceResource
from api.resources.session import SessionResource
from api.resources.system import HEALTH_PATH, SystemResource
from api.resources.target import TargetResource
from api.resources.targetgroup import TargetGroupResource
from api.resources.targettoextent import TargetToExtentResource
from api.routing import Router
from api.v2.app import TrueNas, truenas_resources
from api.v2.rpc import is_rpc_path
from targetd.interface import Engine

__all__ = ["make_app"]

log = logging.getLogger("api")


COLLECTIONS: Final = (
    ExtentResource,
    AuthorizedInitiatorResource,
    AuthCredentialResource,
    TargetResource,
    PortalResource,
    TargetToExtentResource,
    TargetGroupResource,
)


class Registrable(Protocol):
    """Something with places of its own."""

    def register(self, router: Router) -> None:
        """Add them."""


def make_app(
    engine: Engine,
    authenticator: Authenticator,
    *,
    version: str,
    resources: Iterable[Registrable] = (),
    keys: KeyRing | None = None,
    truenas: TrueNas | None = None,
    page_size: int = DEFAULT_LIMIT,
) -> web.Application:
    """The API over an engine.

    Args:
        engine: carries out what is asked for.
        authenticator: knows who may.
        version: of the daemon, for the documents.
        resources: further ones, behind the same login.
        keys: API keys that log in with ``Authorization: Bearer``.
        page_size: objects in a list unless the client says; 0: all.
        truenas: what TrueNAS' API needs beside the engine; None: it is not served.

    Returns:
        An application for ``api.server.ApiRunner``.
    """
    router = Router()
    app = web.Application(
        client_max_size=MAX_BODY_BYTES,
        middlewares=[
            common_headers,
            audit,
            translate_errors,
            refuse_other_sites,
            require_login(authenticator, _is_public, keys),
        ],
    )
    engine = audited(engine)
    app[PAGE_SIZE] = page_size
    events = EventsResource(engine)
    app.on_shutdown.append(events.close)
    collections = [collection(engine) for collection in COLLECTIONS]
    every: list[Registrable] = [
        GlobalConfigurationResource(engine),
        *collections,
        ConfigResource(engine, collections),
        SessionResource(engine),
        DiagnosisResource(engine),
        events,
        ServiceResource(engine),
        SystemResource(version, truenas.version if truenas else ""),
        MetricsResource(engine),
        *resources,
        Documents(router, version),
    ]
    if keys is not None:
        every.append(KeysResource(keys))
        if truenas is not None:
            rest, rpc = truenas_resources(engine, authenticator, keys, truenas, version)
            app.on_shutdown.append(rpc.close)
            every += [rest, rpc]
    for resource in every:
        resource.register(router)
    app.router.add_route("*", "/{path:.*}", router.dispatch)
    return app


def _is_public(path: str) -> bool:
    """Whether a path needs no login: the health check, and WebSockets, which log in by a method."""
    return path == HEALTH_PATH or is_rpc_path(path)


@web.middleware
async def common_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What every answer carries; one line for every write.

    Bodies hold CHAP secrets: nobody on the way may keep them.
    """
    response = await handler(request)
    if not response.prepared:
        response.headers["Vary"] = "Accept"
        response.headers["Server"] = "iscsi-targetd"
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
    if request.method not in ("GET", "HEAD", "OPTIONS"):
        log.info("%s %.200r from %s: %d", request.method, request.path, request.remote, response.status)
    return response
