"""A worker process: an ordinary ``Runtime`` over its share of the targets, steered through a ``Link``.

It has no store, no API and no portals. What its logical units want to have kept goes to the front, and so
does a change when it is prepared; connections come from there. Signals are the front's affair: this process
does not heed those that a terminal or a service manager sends to all; it ends when it is told to, when the
front is gone (the link ends), and, should it be stuck at that moment, by the kernel (PR_SET_PDEATHSIG).
"""

import asyncio
import ctypes
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from protocol.scsi.registrations import State
from targetd.config import ConfigError, Configuration
from targetd.engine.media import OwnFiles
from targetd.engine.runtime import Runtime
from targetd.interface import Statistics
from targetd.net.admission import Admission, ConnectionLimiter, Limits
from targetd.net.loop import Loop
from targetd.net.server import LoginSnapshot
from targetd.persistence.interface import UNITS, StoreError
from targetd.system import logs
from targetd.workers.link import Link
from targetd.workers.messages import (
    Adopt,
    Answer,
    Ask,
    ConnectionClosed,
    Decide,
    Delta,
    EventRaised,
    LoggedIn,
    Persist,
    Persisted,
    Prepared,
    Start,
)
from targetd.workers.process_stats import measure
from targetd.workers.quota import SessionQuota, SharedSessions

__all__ = ["SERVICES", "serve"]

log = logging.getLogger("targetd.workers")

PR_SET_PDEATHSIG = 1
"""prctl(2)."""


class _AbandonedError(Exception):
    """The change is not to be: another process, or the store, could not prepare it."""


class _Visitor(Admission):
    """A connection as the front knows it."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        super().__init__("")
        self.number = number


class _Doorkeeper(ConnectionLimiter):
    """Tells the front's doorkeeper, who let the connections in."""

    def __init__(self, link: Link) -> None:
        super().__init__(Limits())
        self._link = link

    def logged_in(self, visitor: Admission) -> None:
        assert isinstance(visitor, _Visitor)
        if visitor.half_open:
            visitor.half_open = False
            self._link.send(LoggedIn(visitor.number))

    def leave(self, visitor: Admission) -> None:
        assert isinstance(visitor, _Visitor)
        self._link.send(ConnectionClosed(visitor.number))


class _Front:
    """``Persistence`` by way of the front."""

    def __init__(self, loop: Loop, link: Link) -> None:
        self._loop = loop
        self._link = link
        self._decision: asyncio.Future[bool] | None = None
        self._keeping: dict[int, asyncio.Future[str]] = {}
        self._last = 0

    def begin_change(self) -> None:
        """A change begins; what becomes of it may be known before it is prepared."""
        self._decision = self._loop.create_future()

    async def save(self, old: Configuration, new: Configuration) -> None:
        """All here is prepared: what of the others, and the store?"""
        assert self._decision is not None
        self._link.send(Prepared())
        if not await self._decision:
            raise _AbandonedError

    def decided(self, commit: bool) -> None:
        """The answer to that."""
        if self._decision is not None and not self._decision.done():
            self._decision.set_result(commit)

    async def put(self, namespace: str, key: str, value: bytes | None) -> None:
        assert namespace == UNITS and value is not None
        self._last += 1
        kept = self._keeping[self._last] = self._loop.create_future()
        self._link.send(Persist(self._last, key, value))
        error = await kept
        if error:
            raise StoreError(error)

    def kept(self, message: Persisted) -> None:
        """The answer to a ``Persist``."""
        self._keeping.pop(message.number).set_result(message.error)

    async def items(self, namespace: str) -> dict[str, bytes]:
        """They come along with the extents."""
        return {}


class _Worker:
    """The process, once it knows what it is."""

    def __init__(self, loop: Loop, link: Link, start: Start, seats: int, stop: asyncio.Event) -> None:
        self._loop = loop
        self._link = link
        self._stop = stop
        self._start = start
        self.front = _Front(loop, link)
        self.runtime = Runtime(
            self.front,
            [Path(root) for root in start.extent_roots],
            loop,
            {name: Path(directory) for name, directory in start.pools.items()},
            listens=False,
            sessions=SharedSessions(SessionQuota(seats, start.workers, start.index)),
            io_engine=start.io_engine,
            data_memory=start.data_memory,
            own_files=_own_files(start.own_files),
        )
        self.runtime.server.connection_limiter = _Doorkeeper(link)
        self._under_way: set[asyncio.Task[None]] = set()
        self._run(self._tell_events())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _tell_events(self) -> None:
        async for event in self.runtime.events():
            self._link.send(EventRaised(event))

    def received(self, message: object, descriptor: int) -> None:
        """A message of the front."""
        if isinstance(message, Ask):
            if message.what == "change":
                self.front.begin_change()
            self._run(self._answer(message))
        elif isinstance(message, Adopt):
            self._adopt(message, descriptor)
        elif isinstance(message, Decide):
            self.front.decided(message.commit)
        elif isinstance(message, Persisted):
            self.front.kept(message)
        else:
            raise TypeError(f"{message!r} is nothing that a worker is told")

    async def _answer(self, ask: Ask) -> None:
        try:
            value = await SERVICES[ask.what](self, *ask.arguments)
        except ConfigError as error:
            answer = Answer(ask.number, problems=error.problems)
        except _AbandonedError:
            answer = Answer(ask.number, failure="abandoned")
        except Exception as error:
            log.exception("%s failed", ask.what)
            answer = Answer(ask.number, failure=type(error).__name__)
        else:
            answer = Answer(ask.number, value)
        self._link.send(answer)

    def _adopt(self, adopt: Adopt, descriptor: int) -> None:
        begun = LoginSnapshot(adopt.since, adopt.received, adopt.answered)
        sock = socket.socket(fileno=descriptor)
        visitor = _Visitor(adopt.number)
        self.runtime.server.adopt(sock, adopt.peer, adopt.local, adopt.portal_id, visitor, begun)

    # -- services -----------------------------------------------------------------------------

    async def change(
        self, delta: Delta, discard_files: frozenset[int], clone_of: int | None, force: bool
    ) -> None:
        await self.runtime.carry_out(self._changed(delta), discard_files, clone_of, force)

    async def hand_on(self, delta: Delta) -> dict[int, State]:
        return await self.runtime.hand_on(self._changed(delta))

    async def take_over(
        self, delta: Delta, kept: Mapping[str, bytes], states: Mapping[int, State], for_good: bool
    ) -> None:
        await self.runtime.take_over(self._changed(delta), kept, states)
        if for_good:
            self.runtime.settle()

    def _changed(self, delta: Delta) -> Configuration:
        return delta.applied_to(self.runtime.configuration)

    async def statistics(self) -> Statistics:
        counted = await self.runtime.statistics()
        return measure(counted, str(self._start.index))

    async def absent(self, addresses: Mapping[str, str]) -> None:
        """Portals' addresses that are not listened on, and why."""
        known = self.runtime.portals.absent
        known.clear()
        known.update(addresses)

    async def alive(self) -> None:
        """The answer is the sign."""

    async def logs(self, level: str, style: str) -> None:
        logs.set_up(level, style, worker=self._start.index)

    async def extent_roots(self, roots: tuple[str, ...]) -> None:
        self.runtime.extent_roots = tuple(map(Path, roots))

    async def own_files(self, files: tuple[str, ...]) -> None:
        self.runtime.own_files = _own_files(files)

    async def tell_io_engine(self) -> None:
        self.runtime.tell_io_engine()

    async def stop(self) -> None:
        await self.runtime.stop()
        self._stop.set()


def _own_files(paths: tuple[str, ...]) -> OwnFiles:
    """The state directory, then files."""
    return OwnFiles(Path(paths[0]), [Path(path) for path in paths[1:]]) if paths else OwnFiles()


def _of_runtime(name: str) -> Callable[..., Awaitable[Any]]:
    return lambda worker, *arguments: getattr(worker.runtime, name)(*arguments)


SERVICES: dict[str, Callable[..., Awaitable[Any]]] = {
    "absent": _Worker.absent,
    "alive": _Worker.alive,
    "change": _Worker.change,
    "hand_on": _Worker.hand_on,
    "extent_roots": _Worker.extent_roots,
    "logs": _Worker.logs,
    "own_files": _Worker.own_files,
    "statistics": _Worker.statistics,
    "stop": _Worker.stop,
    "take_over": _Worker.take_over,
    "tell_io_engine": _Worker.tell_io_engine,
    **{
        name: _of_runtime(name)
        for name in (
            "adopt_medium",
            "drop",
            "explain",
            "extent_statuses",
            "load_lun",
            "look_again",
            "luns",
            "media_found",
            "negotiate",
            "reset_lun",
            "rivals",
            "sanitize",
            "sessions",
            "withhold",
            "stand_still",
        )
    },
}
"""What the front may ask for."""


async def _main(loop: Loop, link_descriptor: int, seats: int) -> None:
    stop = asyncio.Event()
    worker: _Worker | None = None

    def received(message: object, descriptor: int) -> None:
        nonlocal worker
        if worker is not None:
            worker.received(message, descriptor)
        elif isinstance(message, Start):
            logs.set_up(message.log_level, message.log_format, worker=message.index)
            worker = _Worker(loop, link, message, seats, stop)

    def lost() -> None:
        if not stop.is_set():
            # The front is gone: what initiators were told of is in the kernel's hands, as with any end.
            os._exit(1)

    link = Link(loop, socket.socket(fileno=link_descriptor), received, lost)
    await stop.wait()


def serve(link: int, seats: int, front: int) -> int:
    """Serve until told to stop; the exit code.

    Args:
        link, seats: descriptors.
        front: process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != front:
        return 1  # it was gone before that
    loop = Loop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_main(loop, link, seats))
    return 0
