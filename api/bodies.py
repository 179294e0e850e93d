"""Reading requests: JSON bodies, paging, sorting, filters. Knows no resource (api-semantics §2)."""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from aiohttp import web

from api.errors import BadRequestError, UnsupportedFormatError
from api.schema import coerce

__all__ = [
    "DEFAULT_LIMIT",
    "JSON_TYPES",
    "MAX_BODY_BYTES",
    "PAGE_SIZE",
    "content_range",
    "content_type",
    "filters",
    "flagged",
    "forced",
    "matches",
    "page",
    "read_object",
    "sorting",
    "strict",
]

MAX_BODY_BYTES: Final = 1 << 20
"""The largest valid body is a list of addresses, some tens of KiB."""
DEFAULT_LIMIT: Final = 30
"""Objects in a list if the client does not say, as the specification has it."""
PAGE_SIZE: Final[web.AppKey[int]] = web.AppKey("page_size", int)
"""The same of one application; 0: all."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_TRAILING_COMMA: Final = re.compile(r'("(?:[^"\\]|\\.)*+"?)|,(?=\s*+[}\]])', re.DOTALL)
"""A string, which ends with its quote or with the text, so that no character is read twice; or the comma."""
_LONGEST_MENDED: Final = 1 << 15
"""Characters of a body in which commas are looked for: people write shorter ones, and a long one takes longer
than the loop may be held."""

CHARSETS: Final = frozenset(
    (
        *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"),
        *("ascii", "iso8859-1", "iso8859-15", "cp1252"),
    )
)
"""What a body may be written in, as Python calls it. Not all that Python knows is decoded in linear time."""


def _parse(text: str) -> Any:
    """JSON, also with a comma after the last member: the specification's own examples have one."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError:
        if len(text) > _LONGEST_MENDED:
            raise
        mended = _TRAILING_COMMA.sub(lambda match: match[1] or "", text)
        if mended == text:
            raise
        return json.loads(mended, parse_constant=_no_constant)


def _charset(name: str) -> str:
    """Python's name of it."""
    known = codecs.lookup(name[:40]).name
    if known not in CHARSETS:
        raise LookupError(name)
    return known


JSON_TYPES: Final = frozenset(("application/json", "text/json", "application/x-json"))
"""What a body may say that it is."""


def content_type(request: web.Request) -> str:
    """What the body says that it is, without parameters, in lower case; empty if it does not say."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in a request's body. A missing Content-Type counts as JSON.

    Raises:
        BadRequestError: it is no JSON, or no object.
        UnsupportedFormatError: it says that it is something else.
    """
    kind = content_type(request)
    if kind and kind not in JSON_TYPES:
        raise UnsupportedFormatError(
            f"The format indicated '{kind[:80]}' had no available deserialization method; use JSON."
        )
    raw = await request.read()
    try:
        text = raw.decode(_charset(request.charset or "utf-8"))
        # .NET writes a byte order mark
        body = _parse(text.removeprefix("\ufeff"))
    except (ValueError, LookupError, RecursionError) as error:
        # the text of a JSON error names a position; it never repeats the body, which may hold secrets
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise BadRequestError(f"The request body is not valid JSON: {reason}") from None
    if not isinstance(body, dict):
        raise BadRequestError("The request body must be a JSON object.")
    return body


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return f"byte {error.start} is not {error.encoding}"
        case LookupError():
            return f"its charset is none of {', '.join(sorted(CHARSETS))}"
        case _:
            return "a number in it is out of range"


def _number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    # 99999 stands for "all" with some clients, and larger ones with others; int() has its own limit
    if not (text.isascii() and text.isdecimal() and len(text) <= 100):
        raise BadRequestError(f"Invalid {name} '{text[:40]}' provided. Please provide a positive integer.")
    return int(text)


def flagged(request: web.Request, name: str) -> bool:
    """Whether a query key says yes (``?force=1``).

    Raises:
        BadRequestError: it says neither yes nor no.
    """
    text = request.query.get(name, "0")
    try:
        return bool(coerce(bool, text))
    except ValueError:
        raise BadRequestError(f"Invalid {name} '{text[:40]}' provided. Use 1 or 0.") from None


def strict(request: web.Request) -> bool:
    """Whether to refuse unknown fields: ``?strict=1``, or ``Prefer: handling=strict`` (RFC 7240 §4.4).

    Raises:
        BadRequestError: ``strict`` says neither yes nor no.
    """
    if "strict" in request.query:
        return flagged(request, "strict")
    preferences = ",".join(request.headers.getall("Prefer", ())).lower().split(",")
    wanted = [part.partition(";")[0].replace(" ", "").replace('"', "") for part in preferences]
    return "handling=strict" in wanted


def forced(request: web.Request) -> bool:
    """Whether a change is to be made though initiators rely on what there is.

    Raises:
        BadRequestError: it says neither yes nor no.
    """
    return flagged(request, "force")


_RANGE: Final = re.compile(r"items=([0-9]{1,18})-([0-9]{1,18})")


def page(request: web.Request, items: Sequence[Any]) -> tuple[int, Sequence[Any]]:
    """The part of a list that was asked for, and its offset; ``limit=0`` is all of it.

    Raises:
        BadRequestError: limit or offset is no number.
    """
    query = request.query
    limit, offset = _number(query, "limit"), _number(query, "offset")
    if limit is None and offset is None:
        asked = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
        if asked and int(asked[1]) <= int(asked[2]):
            offset, limit = int(asked[1]), int(asked[2]) - int(asked[1]) + 1
    offset = offset or 0
    if limit is None:
        limit = request.app.get(PAGE_SIZE, DEFAULT_LIMIT)
    return offset, items[offset : offset + limit] if limit else items[offset:]


def content_range(offset: int, length: int, total: int) -> dict[str, str]:
    """The header; an empty list at 0 is ``items 0--1/0``."""
    return {"Content-Range": f"items {offset}-{offset + length - 1}/{total}"}


_SORT: Final = re.compile(r"sort\(([^()]*)\)")


def sorting(request: web.Request, known: Callable[[str], bool]) -> list[tuple[str, bool]]:
    """Wire name and whether descending, in order of weight, from query keys ``sort(a,-b)``.

    Raises:
        BadRequestError: there is no such field.
    """
    wanted = []
    for key in request.query:
        match = _SORT.fullmatch(key.strip())
        if not match:
            continue
        for part in match[1].split(","):
            # a plus arrives as a blank
            name = part.strip().lstrip("+-")
            if not known(name):
                raise BadRequestError(f"No matching '{name[:80]}' field for ordering on.")
            wanted.append((name, part.strip().startswith("-")))
    return wanted


def filters(request: web.Request, known: Callable[[str], bool]) -> dict[str, str]:
    """Wire name → the exact value wanted; query keys that are no fields mean nothing."""
    return {name: value for name, value in request.query.items() if known(name)}


def matches(value: object, wanted: str) -> bool:
    """Whether a value on the wire is what a filter asks for."""
    if value is None:
        return wanted in ("", "null", "None")
    if isinstance(value, bool):
        return str(value).lower() == wanted.lower()
    return str(value) == wanted
