"""JSON-RPC 2.0 over WebSocket (``/api/current``, ``/api/v25.04…``), and older clients' DDP (``/websocket``).

A connection logs in with ``auth.…`` and then calls methods, several at a time; answers come as they are
ready. Errors of a call have code -32001, those of its arguments -32602; ``data`` says what REST has in its
body.
"""

import asyncio
import errno
import json
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import WSMsgType, web

from api.audit import recorded
from api.auth import Account
from api.encoding import encoded
from api.routing import Operation, Router
from api.v2.errors import ArgumentsError, CallError, errname
from api.v2.jobs import COLLECTION, Jobs
from api.v2.methods import Table

__all__ = ["RpcResource", "is_rpc_path"]

log = logging.getLogger("api")

MAX_MESSAGE: Final = 1 << 20
"""Bytes of one message; the largest valid one is a ``core.bulk``."""
CONCURRENT: Final = 20
"""Calls of one connection under way, as TrueNAS has it."""
HEARTBEAT_S: Final = 30.0
LOGIN_S: Final = 60.0
"""How long a connection may stay without a login."""

PARSE_ERROR, INVALID_REQUEST, UNKNOWN_METHOD = -32700, -32600, -32601
INVALID_PARAMS, TOO_MANY_CALLS, CALL_ERROR = -32602, -32000, -32001

_PATHS: Final = re.compile(r"/+(?:api/+(?:current|v2[5-9]\.[0-9]{2}(?:\.[0-9]+){0,2})|websocket)/*")


def is_rpc_path(path: str) -> bool:
    """Whether connections to a path log in by themselves, with a method."""
    return _PATHS.fullmatch(path) is not None


def _call_data(error: CallError) -> dict[str, Any]:
    extra = [list(one) for one in error.errors] if isinstance(error, ArgumentsError) else None
    return {
        "error": error.number,
        "errname": errname(error.number),
        "reason": error.reason,
        "extra": extra,
        "trace": None,
    }


class Connection:
    """One WebSocket: a caller."""

    def __init__(self, resource: "RpcResource", socket: web.WebSocketResponse, address: str) -> None:
        self.account: Account | None = None
        self.address = address
        self._resource = resource
        self._socket = socket
        self._subscriptions: dict[str, str] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._ddp = False

    # -- events -----------------------------------------------------------------------------------

    def subscribe(self, collection: str) -> str:
        id = secrets.token_hex(8)
        self._subscriptions[id] = collection
        return id

    def unsubscribe(self, id: str) -> None:
        self._subscriptions.pop(id, None)

    async def job_event(self, what: str, job: dict[str, Any]) -> None:
        """Send news of a job, where that is wanted."""
        if self.account is None or COLLECTION not in self._subscriptions.values():
            return
        fields = {"msg": what, "collection": COLLECTION, "id": job["id"], "fields": job}
        if self._ddp:
            await self._send(fields)
        else:
            await self._send({"jsonrpc": "2.0", "method": "collection_update", "params": fields})

    # -- messages ---------------------------------------------------------------------------------

    async def _send(self, message: Mapping[str, Any]) -> None:
        try:
            await self._socket.send_str((await encoded(message)).decode())
        except (ConnectionError, RuntimeError):
            pass  # it is being closed; the reader ends with it

    async def serve(self, ddp: bool) -> None:
        """Read messages until the peer goes."""
        self._ddp = ddp
        loop = asyncio.get_running_loop()
        end = loop.call_later(LOGIN_S, self._too_late)
        try:
            async for message in self._socket:
                if message.type is not WSMsgType.TEXT:
                    break
                await (self._ddp_message if ddp else self._rpc_message)(message.data)
        finally:
            end.cancel()
            for call in self._calls:
                call.cancel()

    def _too_late(self) -> None:
        if self.account is None:
            asyncio.get_running_loop().create_task(
                self._socket.close(code=1008, message=b"log in within 60 s")
            )

    def _begin(self, id: Any, name: str, given: list[Any]) -> None:
        task = asyncio.get_running_loop().create_task(self._call(id, name, given))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _rpc_message(self, text: str) -> None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            await self._error(None, PARSE_ERROR, "Parse error", None)
            return
        match message:
            case {"jsonrpc": "2.0", "method": str(name), **rest}:
                given = rest.get("params", [])
                id = rest.get("id")
            case _:
                id = message.get("id") if isinstance(message, dict) else None
                await self._error(id, INVALID_REQUEST, "Invalid Request", None)
                return
        if not isinstance(given, list) or isinstance(id, dict | list | bool):
            await self._error(None, INVALID_REQUEST, "Invalid Request: params must be a list", None)
        elif len(self._calls) >= CONCURRENT:
            await self._error(
                id, TOO_MANY_CALLS, f"Maximum number of concurrent calls ({CONCURRENT}) exceeded", None
            )
        else:
            self._begin(id, name, given)

    async def _ddp_message(self, text: str) -> None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        match message:
            case {"msg": "connect"}:
                await self._send({"msg": "connected", "session": secrets.token_hex(8)})
            case {"msg": "ping", **rest}:
                await self._send({"msg": "pong", **({"id": rest["id"]} if "id" in rest else {})})
            case {"msg": "method", "id": id, "method": str(name), **rest} if isinstance(_params(rest), list):
                if len(self._calls) < CONCURRENT:
                    self._begin(id, name, _params(rest))
                else:
                    await self._error(id, TOO_MANY_CALLS, "too many calls at once", None)
            case {"msg": "sub", "id": str(id), "name": str(name)} if self.account is not None:
                self._subscriptions[id] = name
                await self._send({"msg": "ready", "subs": [id]})
            case {"msg": "unsub", "id": str(id)}:
                self.unsubscribe(id)
            case _:
                await self._send({"msg": "error", "error": "not understood"})

    async def _call(self, id: Any, name: str, given: list[Any]) -> None:
        resource = self._resource
        method = resource.table.find(name)
        if method is None:
            data = {"error": errno.ENOENT, "errname": "ENOENT", "reason": f"{name[:200]}: no such method"}
            await self._error(
                id, UNKNOWN_METHOD, "Method does not exist", {**data, "extra": None, "trace": None}
            )
            return
        try:
            if method.writes:
                with recorded(self.account.name if self.account else None, self.address, name) as outcome:
                    outcome.status = 422
                    result = await resource.table.call(self, method, given)
                    outcome.status = 200
            else:
                result = await resource.table.call(self, method, given)
        except ArgumentsError as error:
            await self._error(id, INVALID_PARAMS, "Invalid params", _call_data(error))
        except CallError as error:
            await self._error(id, CALL_ERROR, "Method call error", _call_data(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s failed", name)
            text = "Sorry, this request could not be processed. Please try again later."
            await self._error(id, CALL_ERROR, "Method call error", _call_data(CallError(text, errno.EFAULT)))
        else:
            if self._ddp:
                await self._send({"id": id, "msg": "result", "result": result})
            elif id is not None:
                await self._send({"jsonrpc": "2.0", "id": id, "result": result})

    async def _error(self, id: Any, code: int, message: str, data: Mapping[str, Any] | None) -> None:
        if self._ddp:
            error = data or {"error": errno.EINVAL, "errname": "EINVAL", "reason": message, "extra": None}
            kind = "VALIDATION" if code == INVALID_PARAMS else None
            await self._send({"id": id, "msg": "result", "error": {"type": kind, **error}})
            return
        error = {"code": code, "message": message, **({"data": data} if data else {})}
        await self._send({"jsonrpc": "2.0", "id": id, "error": error})


def _params(message: Mapping[Any, Any]) -> Any:
    return message.get("params", [])


class RpcResource:
    """The WebSocket places."""

    def __init__(self, table: Table, jobs: Jobs) -> None:
        self.table = table
        self.jobs = jobs
        self._sockets: set[web.WebSocketResponse] = set()

    def register(self, router: Router) -> None:
        """Register the places."""
        for path, handler in (
            ("/api/current/", self.rpc),
            ("/api/{version}/", self.versioned),
            ("/websocket/", self.ddp),
        ):
            router.add("v2.0", path, {"GET": Operation(handler, "WebSocket.", {200: None}, streams=True)})

    async def close(self, app: web.Application) -> None:
        """End every connection: the daemon stops."""
        await self.jobs.close()
        for socket in list(self._sockets):
            await socket.close(code=1001, message=b"the daemon stops")

    async def versioned(self, request: web.Request, version: str) -> web.StreamResponse:
        """``/api/v25.04.2`` and the like."""
        if not is_rpc_path(request.path):
            return web.Response(status=404)
        return await self._serve(request, ddp=False)

    async def rpc(self, request: web.Request) -> web.StreamResponse:
        """JSON-RPC 2.0."""
        return await self._serve(request, ddp=False)

    async def ddp(self, request: web.Request) -> web.StreamResponse:
        """DDP."""
        return await self._serve(request, ddp=True)

    async def _serve(self, request: web.Request, *, ddp: bool) -> web.StreamResponse:
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MAX_MESSAGE)
        if not socket.can_prepare(request).ok:
            return web.json_response(
                {"error": "connect with WebSocket"}, status=426, headers={"Upgrade": "websocket"}
            )
        await socket.prepare(request)
        connection = Connection(self, socket, request.remote or "")
        self._sockets.add(socket)
        self.jobs.listeners.add(connection.job_event)
        try:
            await connection.serve(ddp)
        finally:
            self.jobs.listeners.discard(connection.job_event)
            self._sockets.discard(socket)
        return socket
