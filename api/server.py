"""The HTTP server below the application: its limits, and two things that aiohttp does otherwise.

*Folded headers.* Perl's base64 encoder breaks a long token into lines, which its HTTP library sends as a
folded ``Authorization`` header (RFC 9112 §5.2 lets a server replace each fold by blanks; aiohttp refuses).
The folds of that one header are replaced before the parser sees them, one byte for one byte.

*Malformed requests.* aiohttp quotes them in its answer and, with a traceback, in the log; a password could
be in there. Here the answer is JSON like every other, and the log has the kind of mistake and the address.
"""

import logging
import re
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from api.errors import answer

__all__ = ["RUNNER_OPTIONS", "ApiRunner"]

log = logging.getLogger("api")

RUNNER_OPTIONS: Final[dict[str, Any]] = {
    "max_line_size": 8190,
    "max_field_size": 8190,
    "keepalive_timeout": 75.0,
    "lingering_time": 2.0,
    "access_log": None,
}
"""Bytes of the request line and of one header, as Apache has them; how long, in seconds, an idle
connection is kept, and the rest of a refused body is read. The application logs for itself."""

_FOLDED: Final = re.compile(rb"\r\n[Aa]uthorization:[^\r\n]*(?:\r\n[ \t][^\r\n]*)+")


def unfold(data: bytes) -> bytes:
    """The bytes with the folds of an Authorization header replaced by blanks; as many bytes as before.

    JSON has no such line, and bodies are not touched otherwise. A header that arrives in two pieces, cut
    within the few bytes of the fold, is left to the parser.
    """
    if b"\r\n " not in data and b"\r\n\t" not in data:
        return data
    return _FOLDED.sub(lambda match: b"\r\n" + match[0][2:].replace(b"\r\n", b"  "), data)


class _Connection(RequestHandler):
    """One HTTP connection."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        super().data_received(unfold(data))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("a request from %s failed", request.remote, exc_info=exc)
        else:
            log.info("malformed request from %s: %s", request.remote, type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        response = answer(status, {"error": HTTPStatus(status).phrase})
        response.force_close()
        return response


class _Server(web.Server):
    """Makes our connections."""

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class ApiRunner(web.AppRunner):
    """``web.AppRunner`` with the above. Sites are added to it as to any."""

    __slots__ = ()

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **{**RUNNER_OPTIONS, **options})

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # the application builds its own kind and takes no other
        return server
