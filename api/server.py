"""The HTTP server below the application: its limits, and three things that aiohttp does otherwise.

*Connections.* They are counted from when they are accepted, before TLS and before any request
(``api.admission``), and one that sends no whole request within ``FIRST_REQUEST_S`` is closed.

*Folded headers.* Perl's base64 encoder breaks a long token into lines, which its HTTP library sends as a
folded ``Authorization`` header (RFC 9112 §5.2 lets a server replace each fold by blanks; aiohttp refuses).
The folds of that one header are replaced before the parser sees them, one byte for one byte.

*Malformed requests.* aiohttp quotes them in its answer and, with a traceback, in the log; a password could
be in there. Here the answer is JSON like every other, and the log has the kind of mistake and the address.
"""

import asyncio
import logging
import re
import socket
import ssl
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from api.admission import Guest, GuestList
from api.errors import answer

__all__ = ["RUNNER_OPTIONS", "ApiRunner", "ApiSite"]

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

FIRST_REQUEST_S: Final = 15.0
"""From connect to the end of the first request's headers; for TLS as long again before."""
BACKLOG: Final = 128
ACCEPT_AT_ONCE: Final = 8
PAUSE_S: Final = 1.0
"""How long nothing is accepted when there are no descriptors left."""

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

    __slots__ = ("_first", "_guest", "_guests")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._guest = Guest("", lambda: None)
        self._guests: GuestList | None = None

    def attend(self, guest: Guest, guests: GuestList) -> None:
        """It is one of these, and says so itself when it goes."""
        self._guest, self._guests = guest, guests
        guest.busy = self._is_busy

    def _is_busy(self) -> bool:
        return self._current_request is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._first = self._loop.call_later(FIRST_REQUEST_S, self._look)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._first.cancel()
        if self._guests is not None:
            self._guests.leave(self._guest)
        super().connection_lost(exc)

    def _look(self) -> None:
        """It has had the time of a first request."""
        if not self._guest.served and not self._is_busy() and self.transport is not None:
            log.info("%s sent no request within %g s", self._guest.address, FIRST_REQUEST_S)
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(unfold(data))
        if self._messages:
            self._guest.served = True

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
    """``web.AppRunner`` with the above. ``ApiSite`` is the only kind of site for it."""

    __slots__ = ("guests",)

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **{**RUNNER_OPTIONS, **options})
        self.guests = GuestList()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # the application builds its own kind and takes no other
        return server


class ApiSite(web.BaseSite):
    """A listening socket of the API, which accepts by itself: only so are connections counted before they
    have said a word."""

    __slots__ = ("_listener", "_loop", "_tasks")

    def __init__(
        self, runner: ApiRunner, listener: socket.socket, *, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context)
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        host, port, *_ = self._listener.getsockname()
        return f"{'https' if self._ssl_context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def port(self) -> int:
        """As bound."""
        port: int = self._listener.getsockname()[1]
        return port

    async def start(self) -> None:
        """Begin to accept."""
        self._runner._reg_site(self)
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    async def stop(self) -> None:
        """Accept no more. Connections are the runner's."""
        self._runner._check_site(self)
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        self._runner._unreg_site(self)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors, or no memory: those that are connected come first
                log.error("the API accepts nothing for a second: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_S, self._resume)
                return
            task = self._loop.create_task(self._serve(sock, str(peer[0])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    async def _serve(self, sock: socket.socket, address: str) -> None:
        """Make a connection of it, by TLS where that is wanted."""
        runner, task = self._runner, asyncio.current_task()
        assert isinstance(runner, ApiRunner) and runner.server is not None and task is not None
        handler = runner.server()
        assert isinstance(handler, _Connection)

        def evict() -> None:
            if handler.transport is not None:
                handler.transport.abort()
            else:
                task.cancel()

        guest = Guest(address, evict)
        if not runner.guests.enter(guest):
            sock.close()
            return
        handler.attend(guest, runner.guests)
        try:
            sock.setblocking(False)
            await self._loop.connect_accepted_socket(
                lambda: handler,
                sock,
                ssl=self._ssl_context,
                ssl_handshake_timeout=FIRST_REQUEST_S if self._ssl_context else None,
            )
        except (OSError, asyncio.CancelledError) as error:
            if not isinstance(error, asyncio.CancelledError):
                log.info("%s: no TLS connection: %s", address, error)
            sock.close()
        finally:
            if handler.transport is None:
                runner.guests.leave(guest)
