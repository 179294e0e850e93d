"""Every thread of the daemon is started here, and nowhere else (ruff: TID251 in pyproject.toml).

One place, because three promises hang on it:

* *The end does not wait.* Threads are daemons: none is joined at exit, and one that is stuck in a hung disk
  or a suspended pool does not hold the daemon's end. So ``asyncio.to_thread`` and ``concurrent.futures`` are
  not used: their threads are joined.
* *A moment without threads passes.* The kernel may refuse one (pids.max of a cgroup, TasksMax= of the unit,
  RLIMIT_NPROC, no memory for its stack). What wanted one waits and tries again; it neither fails at once
  nor forgets.
* *One hung disk stops its own users only.* Each logical unit has a lane with threads of its own, beside the
  event loop, and what is no command has a thread for itself. A lane's queue needs no bound: what can be in
  it is bounded by the command windows of the sessions.

The one thread that is not from here is aiosqlite's: one for each open store, a daemon as well (SQLAlchemy's
dialect sees to that), and ``Store.close`` is given up after a time limit when its disk hangs.

Results come back to the event loop in batches: the first result of a batch schedules one call there,
the ones that arrive before it runs ride along (a ``call_soon_threadsafe`` costs a system call).
"""

import asyncio
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

__all__ = ["Completions", "Deadline", "ThreadLimit", "WorkerThreads", "run_in_thread", "start_thread"]

log = logging.getLogger("targetd.threads")

_T = TypeVar("_T")

WIDTH = 4
"""Threads of one lane at most. A disk gains little from more; a thousand stuck lanes still fit."""

LONG_WIDTH = 2
"""Threads of one lane that do what takes long, beside those for everything else: two keep a disk busy, and
however many such commands there are, short ones find a thread."""

IDLE_S = 10.0
"""A thread without work for so long ends, so that idle units cost no memory."""

RETRY_S = 0.1
"""Before a thread is asked for again that could not be started."""

PATIENCE_S = 5.0
"""How long ``run_in_thread`` asks again. Commands of a unit wait for as long as it takes: their initiator has
a time limit of its own."""

TOLD_EVERY_S = 5.0
"""A shortage is told once in so long."""

_told = 0.0


def start_thread(work: Callable[..., object], name: str, *arguments: object) -> bool:
    """Run ``work(*arguments)`` on a new daemon thread.

    Returns:
        False: the system gives us no thread now (EAGAIN, no memory); it was told in the log.
    """
    global _told
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        now = time.monotonic()
        if now - _told >= TOLD_EVERY_S:
            _told = now
            log.error(
                "no thread can be started (%s); %s waits for one. Look at TasksMax= of the unit, pids.max of "
                "the cgroup, ulimit -u and the free memory",
                error or type(error).__name__,
                name,
            )
        return False
    return True


async def run_in_thread(work: Callable[..., _T], *arguments: Any) -> _T:
    """``work(*arguments)`` on a thread of its own, for what may wait for a medium outside of any command.

    Raises:
        OSError: EAGAIN: no thread could be started within ``PATIENCE_S``.
        Exception: whatever ``work`` raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
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

    until = loop.time() + PATIENCE_S
    while not start_thread(run, getattr(work, "__name__", "work")):
        if loop.time() >= until:
            raise OSError(errno.EAGAIN, "no thread could be started; the process may have no more now")
        await asyncio.sleep(RETRY_S)
    return await future


class ThreadLimit:
    """``run_in_thread`` for costly work: so many at a time, so many more that wait, no more than that."""

    def __init__(self, width: int, waiting: int) -> None:
        self._turns = asyncio.Semaphore(width)
        self._most = width + waiting
        self._present = 0

    def enter(self) -> None:
        """Take a place in the line; ``run`` must follow, once.

        Raises:
            OverflowError: as many are there already as may.
        """
        if self._present >= self._most:
            raise OverflowError(f"{self._most} are at work or wait already")
        self._present += 1

    async def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """``work(*arguments)`` when it is the turn of the place that was taken; gives it back."""
        try:
            async with self._turns:
                return await run_in_thread(work, *arguments)
        finally:
            self._present -= 1


class Deadline:
    """Ends the process when its orderly end takes too long, whatever hangs: a thread that waits, as the event
    loop may hang too. The thread is there from the start: at the end there may be none to be had."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begun = threading.Event()
        self._over = threading.Event()
        start_thread(self._watch, "deadline")

    def begin(self) -> None:
        """From now on there are so many seconds."""
        self._begun.set()

    def met(self) -> None:
        """The end is there; this thread ends too."""
        self._over.set()
        self._begun.set()

    def _watch(self) -> None:
        self._begun.wait()
        if self._over.wait(self._limit_s):
            return
        hang = sorted({thread.name for thread in threading.enumerate()} - {"MainThread", "deadline"})
        log.critical(
            "the end took longer than %g s: exit now, what is under way stays undone. Waiting threads: %s",
            self._limit_s,
            ", ".join(hang) or "none",
        )
        os._exit(1)


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
            self._schedule(self._drain)

    def _schedule(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: the daemon has gone on without this result
            self.closed = True

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """From any thread: ``call()`` on the loop in so long."""
        self._schedule(self._loop.call_later, delay_s, call)

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
        self._lacking = False
        """A thread could not be started; another attempt is scheduled."""
        self._long: WorkerThreads | None = None
        self._flushes: WorkerThreads | None = None

    @property
    def depth(self) -> int:
        """Work that has not begun."""
        return self._queue.qsize() + sum(
            part.depth for part in (self._long, self._flushes) if part is not None
        )

    @property
    def long(self) -> "WorkerThreads":
        """For work that moves much: threads of its own."""
        if self._long is None:
            self._long = WorkerThreads(self._completions, f"{self._name}-long", LONG_WIDTH)
        return self._long

    @property
    def flushes(self) -> "WorkerThreads":
        """For flushes: a thread of its own, since one covers all that came before it."""
        if self._flushes is None:
            self._flushes = WorkerThreads(self._completions, f"{self._name}-flush", 1)
        return self._flushes

    def run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do ``work`` on a worker thread, then ``done(its result)`` on the event loop."""
        self._queue.put((work, done))
        with self._lock:
            self._reinforce()

    def _reinforce(self) -> None:
        """Start another thread if there is work for one. Under the lock."""
        if self._waiting >= self._queue.qsize() or self._threads >= self._width:
            return
        if start_thread(self._serve, self._name):
            self._threads += 1
        elif not self._lacking:
            self._lacking = True
            self._completions.later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        """There was no thread to be had a moment ago."""
        with self._lock:
            self._lacking = False
            self._reinforce()

    def close(self) -> None:
        """Threads end when they have done what is queued."""
        with self._lock:
            for _ in range(self._threads):
                self._queue.put(None)
        for part in (self._long, self._flushes):
            if part is not None:
                part.close()

    def _serve(self) -> None:
        queue, post = self._queue, self._completions.post
        while True:
            try:
                item = queue.get_nowait()  # the accounts of waiting cost as much as a short work
            except Empty:
                item = self._wait()
            if item is not None:
                work, done = item
                try:
                    post(done, work())
                except BaseException:  # a thread that ends unheard would be missing for good
                    log.exception("work of lane %s failed in a way that nobody foresaw", self._name)
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
