"""From a URL to a handler, as forgiving as the real API's front end was (api-semantics §2).

Empty path segments do not count: ``//api/v1.0/services/iscsi/target``, ``…/target//`` and ``…/target/``
are the same place for every method. A table of our own does this, because aiohttp's redirects to the one
true form would turn a POST into a GET in half of the clients.

Routes are also the source of the OpenAPI document: each carries what the document says about it.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from api.errors import MethodNotAllowedError, NotFoundError, answer

__all__ = ["Operation", "Place", "Router"]

RouteHandler = Callable[..., Awaitable[web.StreamResponse]]
"""Takes the request and what stands in the place of the path's parameters: ``{id}`` an int, others str."""

MAX_ID_DIGITS: Final = 18
"""More than any id has, and within the store's 63 bits."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one place."""

    handler: RouteHandler
    summary: str
    responses: Mapping[int, str | None] = field(default_factory=dict)
    """Status → name of a schema, None for an empty body. ``Name[]``: an array of them."""
    request_schema: str | None = None
    parameters: tuple[str, ...] = ()
    """Names of shared query parameters."""
    streams: bool = False
    """Its answer has no end; OpenAPI has no words for that, and its tools would wait for one."""


@dataclass(frozen=True, slots=True)
class Place:
    """One path, ``/api/v1.0/…/{id}/``, and what can be done there."""

    path: str
    operations: Mapping[str, Operation]
    group: str

    @property
    def allow(self) -> str:
        """The Allow header."""
        methods = set(self.operations) | {"OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))


class Router:
    """The table."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._plain: dict[tuple[str, ...], Place] = {}
        self._trees: list[tuple[tuple[str, ...], Place]] = []
        self._patterns: dict[int, list[tuple[tuple[str, ...], Place]]] = {}

    def add(self, group: str, path: str, operations: Mapping[str, Operation]) -> None:
        """Add a place; parameters are whole segments in braces, ``{name*}`` all the rest of the path."""
        place = Place(path, operations, group)
        self.places.append(place)
        segments = tuple(part for part in path.split("/") if part)
        if segments[-1].endswith("*}"):
            self._trees.append((segments, place))
        elif "{" in path:
            self._patterns.setdefault(len(segments), []).append((segments, place))
        else:
            self._plain[segments] = place

    def find(self, raw_path: str) -> tuple[Place, tuple[int | str, ...]]:
        """The place of a path that is still percent-encoded, and its parameters.

        Raises:
            NotFoundError: there is none.
        """
        segments = tuple(unquote(part) for part in raw_path.split("/") if part)
        place = self._plain.get(segments)
        if place is not None:
            return place, ()
        for pattern, place in self._patterns.get(len(segments), ()):
            parameters = _parameters(pattern, segments)
            if parameters is not None:
                return place, parameters
        for pattern, place in self._trees:
            if len(segments) >= len(pattern):
                depth = len(pattern) - 1
                parameters = _parameters(pattern, (*segments[:depth], "/".join(segments[depth:])))
                if parameters is not None:
                    return place, parameters
        raise NotFoundError

    async def dispatch(self, request: web.Request) -> web.StreamResponse:
        """Answer a request.

        Raises:
            NotFoundError: no such place.
            MethodNotAllowedError: not there.
        """
        place, parameters = self.find(request.rel_url.raw_path)
        method = request.method
        if method == "OPTIONS" and method not in place.operations:
            return answer(200, None, {"Allow": place.allow})
        operation = place.operations.get("GET" if method == "HEAD" else method)
        if operation is None:
            raise MethodNotAllowedError(place.allow)
        return await operation.handler(request, *parameters)

    def documented(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Path and path item object of the OpenAPI document, in order of addition."""
        for place in self.places:
            if any(operation.streams for operation in place.operations.values()):
                continue
            item: dict[str, Any] = {}
            for name in _names(place.path):
                kind = {"type": "integer", "minimum": 1} if name == "id" else {"type": "string"}
                item.setdefault("parameters", []).append(
                    {"name": name, "in": "path", "required": True, "schema": kind}
                )
            for method, operation in place.operations.items():
                item[method.lower()] = _documented(place, method, operation)
            yield place.path.replace("*}", "}"), item


def _parameters(pattern: tuple[str, ...], segments: tuple[str, ...]) -> tuple[int | str, ...] | None:
    found: list[int | str] = []
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted == "{id}":
            if not (segment.isascii() and segment.isdecimal() and len(segment) <= MAX_ID_DIGITS):
                return None
            found.append(int(segment))
        elif wanted[0] == "{":
            found.append(segment)
        elif wanted != segment:
            return None
    return tuple(found)


def _names(path: str) -> list[str]:
    return [part[1:-1].rstrip("*") for part in path.split("/") if part.startswith("{")]


_STATUS_TEXTS: Final = {
    200: "As it is.",
    201: "Created and in force.",
    202: "Changed and in force.",
    204: "Gone.",
    400: "Not understood.",
    401: "No credentials, or wrong ones.",
    403: "This user may only read.",
    404: "There is no such object.",
    413: "The body is too large.",
    503: "Too many at once.",
    429: "Too many failed logins from this address.",
    409: "Fields are wrong: messages by field.",
}


def _documented(place: Place, method: str, operation: Operation) -> dict[str, Any]:
    parts = (part.strip("{}") for part in place.path.removeprefix("/api/v1.0").split("/"))
    name = "_".join(part.replace(".", "_") for part in parts if part)
    documented: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": operation.summary,
        "tags": [place.group],
        "responses": {},
    }
    if operation.parameters:
        documented["parameters"] = [
            {"$ref": f"#/components/parameters/{name}"} for name in operation.parameters
        ]
    if operation.request_schema:
        documented["requestBody"] = {
            "required": method != "DELETE",
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{operation.request_schema}"}}
            },
        }
    common: dict[int, str | None] = {429: "Error"} if 401 in operation.responses else {}
    if method != "GET" and common:
        common |= {403: "Error", 413: "Error"}
    for status, schema in sorted({**operation.responses, **common}.items()):
        documented["responses"][str(status)] = _response(status, schema)
    return documented


def _response(status: int, schema: str | None) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _STATUS_TEXTS.get(status, "Failed.")}
    if schema is not None:
        reference = {"$ref": f"#/components/schemas/{schema.removesuffix('[]')}"}
        body = {"type": "array", "items": reference} if schema.endswith("[]") else reference
        response["content"] = {"application/json": {"schema": body}}
    return response
