"""Worker lanes: where work that may wait for a medium runs. Knows no SCSI and no sockets.

One lane a logical unit, each with threads of its own, so that a unit whose disk hangs holds up nobody
else: not another unit, not the event loop, not the shutdown (the threads are daemons). A lane's queue
needs no bound of its own: what can be in it is bounded by the command windows of the sessions.

Results come back to the event loop in batches: the first result of a batch schedules one call there,
the ones that arrive before it runs ride along (a ``call_soon_threadsafe`` costs a system call).
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

__all__ = ["Completions", "WorkerThreads", "run_in_thread"]

_T = TypeVar("_T")

WIDTH = 4
"""Threads of one lane at most. A disk gains little from more; a thousand stuck lanes still fit."""

IDLE_S = 10.0
"""A thread without work for so long ends, so that idle units cost no memory."""


async def run_in_thread(work: Callable[..., _T], *arguments: Any) -> _T:
    """``work(*arguments)`` on a thread of its own, for what may wait for a medium outside of any command.

    Not ``asyncio.to_thread``: its threads are joined at exit, and one that is stuck in a hung disk would
    hold the daemon's end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only if _T allows it

    def run() -> None:
        result: _T | None = None
        failure: BaseException | None = None
        try:
            result = work(*arguments)
        except BaseException as error:  # it belongs to who awaits
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:  # the loop is closed: nobody awaits any more
            pass

    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return await future


class Completions:
    """The way back: runs ``done(result)`` on the event loop for work that ended elsewhere."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after: Callable[[], None]) -> None:
        """``after`` runs on the loop once behind every batch."""
        self._loop = loop
        self._after = after
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._scheduled = False
        self.closed = False

    def post(self, done: Callable[[Any], None], result: Any) -> None:
        """From any thread."""
        self._results.append((done, result))
        if not self._scheduled:
            # Two threads may both get here; the second call then finds an empty queue.
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: the daemon has gone on without this result
                self.closed = True

    def _drain(self) -> None:
        self._scheduled = False
        results = self._results
        while results:
            done, result = results.popleft()
            done(result)
        self._after()


class WorkerThreads:
    """The workers of one logical unit; a ``protocol.scsi.interfaces.Lane``."""

    def __init__(self, completions: Completions, name: str, width: int = WIDTH) -> None:
        self._completions = completions
        self._name = name
        self._width = width
        self._queue: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = SimpleQueue()
        self._threads = 0
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        """Work that has not begun."""
        return self._queue.qsize()

    def run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do ``work`` on a worker thread, then ``done(its result)`` on the event loop."""
        self._queue.put((work, done))
        with self._lock:
            if self._waiting < self._queue.qsize() and self._threads < self._width:
                self._threads += 1
                threading.Thread(target=self._serve, name=self._name, daemon=True).start()

    def close(self) -> None:
        """Threads end when they have done what is queued."""
        with self._lock:
            for _ in range(self._threads):
                self._queue.put(None)

    def _serve(self) -> None:
        queue, post = self._queue, self._completions.post
        while True:
            try:
                item = queue.get_nowait()  # the accounts of waiting cost as much as a short work
            except Empty:
                item = self._wait()
            if item is not None:
                work, done = item
                post(done, work())
                del item, work, done  # while it waits it would keep a command, and the data of a WRITE
                continue
            with self._lock:
                if queue.empty():
                    self._threads -= 1
                    return

    def _wait(self) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
        with self._lock:
            self._waiting += 1
        try:
            return self._queue.get(timeout=IDLE_S)
        except Empty:
            return None
        finally:
            with self._lock:
                self._waiting -= 1
