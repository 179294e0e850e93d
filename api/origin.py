"""Requests that a page of another site makes its reader's browser send (cross-site request forgery, CWE-352).

A browser adds the credentials it remembers for the API to whatever any page asks of it, so a page anywhere
could change the configuration. Browsers say where a request comes from, in headers that no page can set or
leave out: ``Origin`` with every request that may change something (Fetch standard §3.1), ``Sec-Fetch-Site``
with every request (Fetch Metadata §2.3). Other clients send neither, and are not concerned.

* ``Sec-Fetch-Site: cross-site``, or an Origin that is not this API: 403, before the login and all else.
* A body from a browser must say that it is JSON: a page can send other types, and none, without asking first.
"""

from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from api.bodies import JSON_TYPES, content_type
from api.errors import ForbiddenError, Handler, UnsupportedFormatError

__all__ = ["refuse_other_sites"]

DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def _place(url: str) -> tuple[str, int | None] | None:
    """(host, port) of an origin or of ``//`` and a Host header; the port of none given is the scheme's."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname:
        return None
    return parts.hostname.rstrip("."), port or DEFAULT_PORTS.get(parts.scheme)


def is_foreign(origin: str, scheme: str, host: str) -> bool:
    """Whether an Origin is another than that of the API, which was asked for by ``scheme`` and ``host``.

    Behind a proxy that ends TLS the API is asked by http for what the browser has by https; the other way
    round, a page that came in clear over the network is foreign to an API that has TLS.
    """
    its_scheme = origin.partition(":")[0].lower()
    if its_scheme not in DEFAULT_PORTS or (scheme == "https" and its_scheme == "http"):
        return True  # "null" among them: a sandboxed frame, a local file
    place = _place(origin)
    return place is None or place not in (_place(f"{scheme}://{host}"), _place(f"{its_scheme}://{host}"))


@web.middleware
async def refuse_other_sites(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The middleware.

    Raises:
        ForbiddenError: another site is behind the request.
        UnsupportedFormatError: a browser sends a body that it does not call JSON.
    """
    origins = request.headers.getall("Origin", [])
    sites = request.headers.getall("Sec-Fetch-Site", [])
    if any(site.strip().lower() == "cross-site" for site in sites) or any(
        is_foreign(origin.strip(), request.scheme, request.headers.get("Host", "")) for origin in origins
    ):
        raise ForbiddenError("A page of another site is behind this request (Origin, Sec-Fetch-Site).")
    if origins and request.body_exists and content_type(request) not in JSON_TYPES:
        raise UnsupportedFormatError("A browser has to send bodies as Content-Type: application/json.")
    return await handler(request)
