"""JSON of answers of any length, written in pieces between which the event loop serves others.

``json.dumps`` keeps the interpreter from its first to its last byte, on a thread as well: 4,000 extents are
tens of milliseconds (estimated) in which no other thread runs.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import web

from targetd.system.pieces import PIECE

__all__ = ["answer_long", "encoded"]

TURN = 32 * 1024
"""Characters after which others have their turn: about half a millisecond of work."""


async def encoded(value: Any) -> bytes:
    """A value as JSON, just as ``json.dumps`` writes it; keys are strings."""
    parts: list[str] = []
    size = 0
    for part in _parts(value):
        parts.append(part)
        size += len(part)
        if size >= TURN:
            size = 0
            await asyncio.sleep(0)
    return "".join(parts).encode()


async def answer_long(body: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    """200 with a JSON body that may have thousands of objects."""
    text = await encoded(body)
    return web.Response(body=text, content_type="application/json", headers=headers)


def _is_long(value: Any) -> bool:
    """Whether it is written in several parts."""
    if isinstance(value, (list, tuple)):
        return len(value) > PIECE or any(map(_is_long, value))
    return isinstance(value, dict) and any(map(_is_long, value.values()))


def _parts(value: Any) -> Iterator[str]:
    """The text in parts, each of at most ``PIECE`` objects of an array."""
    if isinstance(value, dict) and _is_long(value):
        opening = "{"
        for key, member in value.items():
            yield f"{opening}{json.dumps(key)}: "
            yield from _parts(member)
            opening = ", "
        yield "}"
    elif isinstance(value, (list, tuple)) and _is_long(value):
        opening = "["
        for at in range(0, len(value), PIECE):
            piece = value[at : at + PIECE]
            yield opening
            if any(map(_is_long, piece)):
                for number, item in enumerate(piece):
                    yield ", " if number else ""
                    yield from _parts(item)
            else:
                yield json.dumps(piece)[1:-1]
            opening = ", "
        yield "]"
    else:
        yield json.dumps(value)
