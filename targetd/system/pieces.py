"""Long work on the event loop, in pieces: who makes a list of thousands does not keep connections waiting.

A thread would not help with what takes the interpreter for itself, as ``json.dumps`` of one large value does,
and costs more than it brings where each object takes microseconds.
"""

import asyncio
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["PIECE", "gathered"]

_T = TypeVar("_T")

PIECE = 50
"""Objects that are made in one go: some 10 to 100 µs each, so a few ms."""


async def gathered(items: Iterable[_T]) -> list[_T]:
    """``list(items)``, made in pieces of ``PIECE`` objects; the event loop has a turn behind each.

    What ``items`` reads must be a copy, or immutable: others change what is live between two pieces.
    """
    made: list[_T] = []
    for item in items:
        made.append(item)
        if len(made) % PIECE == 0:
            await asyncio.sleep(0)
    return made
