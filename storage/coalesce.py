"""One slow action for many callers: flushes that overlap share the next run.

A caller is covered by any run that *starts* after its call; one already under way may have passed its
data by. So callers that arrive during a run all wait for the same next one, and a hundred flushes at
once cost two.
"""

import threading
from collections.abc import Callable
from functools import partial

__all__ = ["Coalescer"]

Hear = Callable[[OSError | None], None]
"""Called on the event loop when a run that covers the caller has ended; with its error, if it failed."""

Start = Callable[[Hear], None]
"""Begins the action, on the event loop; what it is given is called there when that has ended."""

Post = Callable[[Callable[[], None]], None]
"""Has something called on the event loop, from any thread; RuntimeError: there is none any more."""


class _Round:
    """One run of the action, past or to come."""

    __slots__ = ("done", "error", "hearers", "post", "start")

    def __init__(self) -> None:
        self.done = False
        self.error: OSError | None = None
        self.hearers: list[Hear] = []
        self.start: Start | None = None
        """How to begin it, if anyone on the event loop waits for it; and ``post``."""
        self.post: Post | None = None


class Coalescer:
    """Runs an action so that each caller is covered, as seldom as that allows. Callers are threads that wait
    (``run``) or have an end told to them (``begin``); both share the same runs."""

    def __init__(self, action: Callable[[], None]) -> None:
        """``action``: as a thread does it."""
        self._action = action
        self._changed = threading.Condition()
        self._next = _Round()
        self._running = False

    def run(self) -> None:
        """Return after a run of the action that started after this call.

        Raises:
            OSError: that run failed. Everyone it covered gets the error: the kernel tells of a
                write-back error once, and each of them may have lost data to it.
        """
        with self._changed:
            mine = self._next
            while self._running and not mine.done:
                self._changed.wait()
            leader = not mine.done
            if leader:
                self._lead()
        if leader:
            try:
                self._action()
            except OSError as error:
                # Without its traceback, whose frames hold ``mine`` and what the action used: a cycle that
                # would keep a closed medium's descriptor until somebody looks for garbage.
                mine.error = OSError(error.errno, error.strerror, error.filename)
                raise
            finally:
                following = self._follow(mine)
                if mine.hearers:
                    self._post(mine, partial(_tell, mine))
                if following is not None:
                    self._post(following, partial(self._start, following))
        elif mine.error is not None:
            # A fresh one for each thread: raising one object in several mixes their tracebacks.
            raise OSError(mine.error.errno, mine.error.strerror, mine.error.filename)

    def begin(self, start: Start, post: Post, hear: Hear) -> None:
        """Call ``hear`` after a run that started after this call. On the event loop; never from within."""
        with self._changed:
            mine = self._next
            mine.hearers.append(hear)
            mine.start, mine.post = start, post
            leader = not self._running
            if leader:
                self._lead()
        if leader:
            self._start(mine)

    def _lead(self) -> None:
        """The next round begins. The caller holds the lock."""
        self._running = True
        self._next = _Round()

    def _start(self, mine: _Round) -> None:
        """On the event loop."""
        assert mine.start is not None
        mine.start(partial(self._ended, mine))

    def _ended(self, mine: _Round, error: OSError | None) -> None:
        """On the event loop."""
        mine.error = error
        following = self._follow(mine)
        _tell(mine)
        if following is not None:
            self._start(following)

    def _follow(self, mine: _Round) -> _Round | None:
        """A round has ended. Returns the next, if it is to begin at once, on the event loop; where only
        threads wait for it one of them begins it."""
        with self._changed:
            mine.done = True
            following = self._next if self._next.hearers else None
            if following is not None:
                self._lead()
            else:
                self._running = False
            self._changed.notify_all()
        return following

    def _post(self, mine: _Round, call: Callable[[], None]) -> None:
        assert mine.post is not None
        try:
            mine.post(call)
        except RuntimeError:  # the daemon has ended; whoever flushes now is a thread
            with self._changed:
                self._running = False
                self._changed.notify_all()


def _tell(ended: _Round) -> None:
    for hear in ended.hearers:
        hear(ended.error)
