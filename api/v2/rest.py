"""REST v2.0: the methods that have a place below ``/api/v2.0``.

``GET`` of a collection takes filters as ``field=value`` or ``field__in=…`` and options as ``limit``,
``offset``, ``sort``, ``count``, ``extra.NAME``. A body is the one argument that a method has beside ``{id}``,
or an object with one member for each. Success is 200.

    arguments are wrong     422  {"<argument>.<field>": [{"message", "errno"}]}
    it cannot be done       422  {"message", "errno"}
    there is no such thing  404  {"message", "errno"}
"""

import codecs
import errno
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from api.auth import USER, Account
from api.encoding import encoded
from api.errors import MethodNotAllowedError, answer
from api.routing import Operation, Router
from api.v2.errors import ENOTAUTHENTICATED, ArgumentsError, CallError
from api.v2.methods import Method, Parameter, Table
from api.v2.openapi import document
from api.v2.query import PARAMETERS
from targetd.system.threads import run_in_thread

__all__ = ["REST_PATH", "RestResource"]

REST_PATH: Final = "/api/v2.0"
_STATUS: Final = {errno.EACCES: 403, ENOTAUTHENTICATED: 401}
_JOINED: Final = {"in", "nin"}
"""Operators whose value is a list, separated by commas."""
_SUFFIXES: Final[Mapping[str, str]] = {
    "in": "in", "nin": "nin", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "ne": "!=",
    "startswith": "^", "endswith": "$", "regex": "~",
}  # fmt: skip


class RestCaller:
    """One request."""

    def __init__(self, account: Account, address: str) -> None:
        self.account: Account | None = account
        self.address = address

    def subscribe(self, collection: str) -> str:
        raise CallError("events are sent over WebSocket only", errno.EINVAL)

    def unsubscribe(self, id: str) -> None:
        return


class RestResource:
    """All of ``/api/v2.0/``: one place of the router, as this API has its own rules for paths and errors."""

    def __init__(self, table: Table, version: str) -> None:
        self.table = table
        self.version = version
        self._document = b""
        self._places: dict[tuple[str, ...], dict[str, Method]] = {}
        for method in table:
            if method.rest is not None:
                verb, path = method.rest
                segments = tuple(part for part in path.split("/") if part)
                self._places.setdefault(segments, {})[verb] = method

    def register(self, router: Router) -> None:
        """Register the one place."""
        operations = {
            verb: Operation(
                self.dispatch, "TrueNAS REST v2.0: see /api/v2.0/openapi.json.", {200: None}, streams=True
            )
            for verb in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")
        }
        router.add("v2.0", f"{REST_PATH}/{{rest*}}", operations)

    def _find(self, path: Sequence[str]) -> tuple[dict[str, Method], list[str]] | None:
        found = self._places.get(tuple(path))
        if found is not None:
            return found, []
        for pattern, methods in self._places.items():
            if len(pattern) == len(path) and all(
                wanted in ("{id}", given) for wanted, given in zip(pattern, path, strict=True)
            ):
                return methods, [
                    given for wanted, given in zip(pattern, path, strict=True) if wanted == "{id}"
                ]
        return None

    async def dispatch(self, request: web.Request, rest: str) -> web.StreamResponse:
        """Answer a request."""
        raw = request.rel_url.raw_path.removeprefix("/").partition("api/v2.0")[2]
        path = [unquote(part) for part in raw.split("/") if part]
        if path == ["openapi.json"] and request.method == "GET":
            if not self._document:
                # pydantic needs a tenth of a second for it: not on the event loop
                made = await run_in_thread(document, self.table, self.version)
                self._document = await encoded(made)
            return web.Response(body=self._document, content_type="application/json")
        found = self._find(path)
        if found is None:
            return answer(404, {"message": f"there is no /{'/'.join(path)[:200]}", "errno": errno.ENOENT})
        methods, ids = found
        allowed = {*methods, "OPTIONS", *(("HEAD",) if "GET" in methods else ())}
        if request.method == "OPTIONS":
            return answer(200, None, {"Allow": ", ".join(sorted(allowed))})
        method = methods.get("GET" if request.method == "HEAD" else request.method)
        if method is None:
            raise MethodNotAllowedError(", ".join(sorted(allowed)))
        caller = RestCaller(request[USER], request.remote or "")
        try:
            given = await _arguments(request, method, ids)
            result = await self.table.call(caller, method, given)
            return web.Response(body=await encoded(result), content_type="application/json")
        except ArgumentsError as error:
            return answer(422, _by_field(error))
        except CallError as error:
            status = method.absent_status if error.number == errno.ENOENT else _STATUS.get(error.number, 422)
            return answer(status, {"message": error.message, "errno": error.number})


def _by_field(error: ArgumentsError) -> dict[str, list[dict[str, Any]]]:
    fields: dict[str, list[dict[str, Any]]] = {}
    for field, message, number in error.errors:
        fields.setdefault(field, []).append({"message": message, "errno": number})
    return fields


async def _arguments(request: web.Request, method: Method, ids: list[str]) -> list[Any]:
    """Positional arguments of a request.

    Raises:
        CallError: the body is no JSON; ArgumentsError: it names what the method does not take.
    """
    given: list[Any] = [*ids]
    rest = method.parameters[len(ids) :]
    if request.method in ("GET", "HEAD"):
        if rest == PARAMETERS:
            given += _query(request)
        elif rest == PARAMETERS[1:]:
            given.append({"extra": _extra(request.query)})
        return given
    raw = (await request.read()).removeprefix(codecs.BOM_UTF8).strip()
    if not raw:
        return given
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise CallError("the request body is not valid JSON", errno.EINVAL) from None
    if not rest:
        if body not in (None, {}, [], True):
            raise CallError(f"{method.name} takes no body", errno.EINVAL)
        return given
    return given + _spread(method, rest, body)


def _spread(method: Method, rest: Sequence[Parameter], body: Any) -> list[Any]:
    names = [parameter.name for parameter in rest]
    if len(rest) == 1:
        alone = isinstance(body, dict) and list(body) == names
        return [body[names[0]] if alone else body]
    if not isinstance(body, dict):
        return [body]
    unknown = sorted(body.keys() - set(names))
    if unknown:
        raise ArgumentsError(
            [(name, f"{method.name} has no such argument", errno.EINVAL) for name in unknown]
        )
    found = []
    for parameter in rest:
        if parameter.name in body:
            found.append(body[parameter.name])
        elif callable(parameter.default):
            found.append(parameter.default())
        else:
            found.append(parameter.default)
    while found and rest[len(found) - 1].name not in body:
        found.pop()  # an argument that is not given is the method's own affair
    return found


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise ArgumentsError([(name, f"{text[:40]!r} is no whole number", errno.EINVAL)])
    return int(text)


def _extra(query: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix("extra."): _json(value)
        for name, value in query.items()
        if name.startswith("extra.")
    }


def _json(text: str) -> Any:
    """What a value in a URL is: a number, true, a list, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _query(request: web.Request) -> list[Any]:
    filters: list[Any] = []
    options: dict[str, Any] = {"extra": _extra(request.query)}
    for name, text in request.query.items():
        if name in ("limit", "offset"):
            options[name] = _number(text, name)
        elif name == "sort":
            options["order_by"] = [part for part in text.split(",") if part]
        elif name == "count":
            options["count"] = text.lower() not in ("", "0", "false")
        elif not name.startswith("extra."):
            field, _, suffix = name.partition("__")
            operator = _SUFFIXES.get(suffix, "=")
            if operator in _JOINED:
                filters.append([field, operator, [_json(part) for part in text.split(",")]])
            else:
                filters.append([field, operator, _json(text)])
    return [filters, options]
