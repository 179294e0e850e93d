"""``services/iscsi/events/``: what happens, as server-sent events. Not in FreeNAS.

Each event has its kind as ``event`` and a JSON object as ``data``. A comment every few seconds keeps proxies
from closing the stream and finds out readers that are gone. Who reads too slowly loses events rather than
making anybody wait; there is no history.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from api.resources.collection import PREFIX
from api.routing import Operation, Router
from targetd.interface import Engine, Event

__all__ = ["EventsResource"]

PATH: Final = f"{PREFIX}services/iscsi/events/"
KEEPALIVE_S: Final = 15.0
MAX_READERS: Final = 64
"""Each holds a connection and a queue for as long as it likes. One more ends the oldest of the address that
has the most."""
MAX_OF_ONE: Final = 16
"""Of one address: one more ends its oldest."""
SLOW_S: Final = 30.0
"""A reader that does not take an event within this time is gone."""


class EventsResource:
    """The stream."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._readers: dict[asyncio.Event, str] = {}
        """What tells a stream to end → the address of who reads it; the oldest first."""

    def register(self, router: Router) -> None:
        """Add its place."""
        router.add(
            "events",
            PATH,
            {
                "GET": Operation(
                    self.stream,
                    "Sessions, refused logins and changes as they happen (text/event-stream).",
                    {200: None, 401: None},
                    streams=True,
                )
            },
        )

    async def close(self, app: web.Application) -> None:
        """End all streams: the server is about to stop."""
        for over in self._readers:
            over.set()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """GET: for as long as the reader stays."""
        if request.method == "HEAD":
            return web.Response(content_type="text/event-stream")
        self._make_room(request.remote or "")
        over = asyncio.Event()
        self._readers[over] = request.remote or ""
        events = self.engine.events()
        try:
            return await self._tell(request, events, over)
        finally:
            self._readers.pop(over, None)
            await events.aclose()  # type: ignore[attr-defined]  # an asynchronous generator, though not by name

    def _make_room(self, address: str) -> None:
        """Streams can be had again: the newcomer is served, and the oldest of who has too many ends."""
        have = Counter(self._readers.values())
        if have[address] >= MAX_OF_ONE:
            most = address
        elif len(self._readers) >= MAX_READERS:
            most = max(have, key=lambda each: have[each])
        else:
            return
        oldest = next(over for over, of in self._readers.items() if of == most)
        del self._readers[oldest]
        oldest.set()

    async def _tell(
        self, request: web.Request, events: AsyncIterator[Event], over: asyncio.Event
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        stopped = asyncio.ensure_future(over.wait())
        coming = asyncio.ensure_future(anext(events))
        try:
            await asyncio.sleep(0)  # what happens from here on is heard
            await response.prepare(request)
            await self._write(response, ": from now on\n\n")
            while not stopped.done():
                await asyncio.wait(
                    (coming, stopped), timeout=KEEPALIVE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    event = coming.result()
                    coming = asyncio.ensure_future(anext(events))
                    await self._write(response, _shown(event))
                elif not stopped.done():
                    await self._write(response, ":\n\n")
        except (ConnectionError, TimeoutError):
            pass  # the reader is gone
        finally:
            stopped.cancel()
            coming.cancel()
            await asyncio.wait((coming,))
        return response

    async def _write(self, response: web.StreamResponse, text: str) -> None:
        async with asyncio.timeout(SLOW_S):
            await response.write(text.encode())


def _shown(event: Event) -> str:
    """One event; JSON has no line ends of its own, so it is one line."""
    return f"event: {event.kind}\ndata: {json.dumps({'at': event.at, **event.data})}\n\n"
