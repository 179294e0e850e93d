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
from api.bodies import MAX_BODY_BYTES
from api.errors import Handler, translate_errors
from api.metrics import MetricsResource
from api.openapi import Documents
from api.origin import refuse_other_sites
from api.resources.authcredential import AuthCredentialResource
from api.resources.authorizedinitiator import AuthorizedInitiatorResource
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
) -> web.Application:
    """The API over an engine.

    Args:
        engine: carries out what is asked for.
        authenticator: knows who may.
        version: of the daemon, for the documents.
        resources: further ones, behind the same login.

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
            require_login(authenticator, frozenset({HEALTH_PATH})),
        ],
    )
    engine = audited(engine)
    events = EventsResource(engine)
    app.on_shutdown.append(events.close)
    every: list[Registrable] = [
        GlobalConfigurationResource(engine),
        *(collection(engine) for collection in COLLECTIONS),
        SessionResource(engine),
        DiagnosisResource(engine),
        events,
        ServiceResource(engine),
        SystemResource(version),
        MetricsResource(engine),
        *resources,
        Documents(router, version),
    ]
    for resource in every:
        resource.register(router)
    app.router.add_route("*", "/{path:.*}", router.dispatch)
    return app


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
