"""One slow action for many callers: flushes that overlap share the next run.

A caller is covered by any run that *starts* after its call; one already under way may have passed its
data by. So callers that arrive during a run all wait for the same next one, and a hundred flushes at
once cost two.
"""

import threading
from collections.abc import Callable

__all__ = ["Coalescer"]


class _Round:
    """One run of the action, past or to come."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: OSError | None = None


class Coalescer:
    """Runs ``action`` so that each caller of ``run`` is covered, as seldom as that allows."""

    def __init__(self, action: Callable[[], None]) -> None:
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
                self._running = True
                self._next = _Round()
        if leader:
            try:
                self._action()
            except OSError as error:
                # Without its traceback, whose frames hold ``mine`` and what the action used: a cycle that
                # would keep a closed medium's descriptor until somebody looks for garbage.
                mine.error = OSError(error.errno, error.strerror, error.filename)
                raise
            finally:
                with self._changed:
                    mine.done = True
                    self._running = False
                    self._changed.notify_all()
        elif mine.error is not None:
            # A fresh one for each thread: raising one object in several mixes their tracebacks.
            raise OSError(mine.error.errno, mine.error.strerror, mine.error.filename)
