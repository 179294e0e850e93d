"""Looks at media that ought to answer at once and may hang: on one thread, and one more for each that hangs.

A thread for each extent would cost thousands of them, and one for all would stop at the first disk that does
not answer. So the jobs stand in one line; a thread that has been at its job for ``HANG_S`` is counted out,
another takes over the line, and the late one ends when its disk lets it.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from targetd.system.threads import Completions, start_thread

__all__ = ["HANG_S", "MediaProbe"]

HANG_S = 1.0
"""A job that takes longer hangs: stat(2), open(2) and a few ioctls take microseconds; from a disk that has to
spin up, seconds, and it is no harm to have another thread meanwhile."""

Job = tuple[Callable[[], Any], Callable[[Any], None]]
"""(work, on a thread; done, on the event loop with what work has returned)"""


class MediaProbe:
    """The line of jobs. Every method on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, completions: Completions) -> None:
        self._loop = loop
        self._completions = completions
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._leader: object | None = None
        """The thread that takes the next job; the others are stuck in theirs."""
        self._begun = 0
        """Jobs that have been taken out of the line."""
        self._seen = -1
        self._timer: asyncio.TimerHandle | None = None

    def add(self, jobs: Iterable[Job]) -> None:
        """Stand them at the end of the line."""
        with self._lock:
            self._jobs.extend(jobs)
            waiting = bool(self._jobs)
        if waiting and self._leader is None:
            self._lead()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._jobs)

    def _lead(self) -> None:
        self._leader = leader = object()
        if not start_thread(self._serve, "patrol", leader):
            self._leader = None  # the timer asks again
        if self._timer is None:
            self._timer = self._loop.call_later(HANG_S, self._look)

    def _look(self) -> None:
        """Has the line moved?"""
        self._timer = None
        with self._lock:
            stuck = bool(self._jobs) and self._begun == self._seen
            self._seen = self._begun
            if not self._jobs and self._leader is None:
                return
        if stuck:
            self._lead()
        elif self._timer is None:
            self._timer = self._loop.call_later(HANG_S, self._look)

    def _serve(self, me: object) -> None:
        while True:
            with self._lock:
                if self._leader is not me:
                    return
                if not self._jobs:
                    self._leader = None
                    return
                work, done = self._jobs.popleft()
                self._begun += 1
            self._completions.post(done, work())
