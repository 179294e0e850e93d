"""When the interpreter may look for garbage that refers to itself, which holds everything up meanwhile.

A complete look costs 0.6 µs an object: 0.25 s with 4000 extents, in which no command is answered. CPython
takes one whenever a quarter has been added to what lives, so in the middle of an operator's work. Here it
does not by itself (its short looks at what is new go on as ever), but:

1. what lives when the daemon is ready is set aside (``gc.freeze``);
2. once ``DUE`` objects have come since, a complete look is taken in a moment in which nobody moves data;
3. where there is no such moment, ``LATE`` objects get a look of their own, and are set aside with the rest;
4. what is set aside so may become garbage too, as sessions do: the next quiet moment brings a complete look,
   and after ``AT_MOST`` without one it is taken anyway.
"""

import gc
from collections.abc import Callable

__all__ = ["GcScheduler"]

DUE = 20_000
"""Objects that have outlived the short looks. What comes and goes, as with a large answer of the API, is none
of these."""
LATE = 50_000
"""A look at so many takes some 30 ms."""
AT_MOST = 20
QUIET_TICKS = 3
"""In so many in a row, about a second each, no data was moved and nothing much was made."""

_NEVER = 2**31 - 1


class GcScheduler:
    """The collector of this process, from ``settle`` on. On the event loop."""

    def __init__(self, moved: Callable[[], int]) -> None:
        """``moved``: bytes that were read and written so far; asked while a look is due."""
        self._moved = moved
        self._settled = False
        self._looks = 0
        """Short looks that had let something grow old when ``_old`` was counted."""
        self._old = 0
        """Objects that are old and not set aside."""
        self._partial = 0
        """Looks since the last complete one."""
        self._quiet = 0
        self._seen = (0, 0)

    def settle(self) -> None:
        """What lives now lives for good: set it aside, and look by the rules above from now on."""
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        self._complete()
        self._settled = True
        gc.enable()

    def tick(self) -> None:
        """A second has passed."""
        looks = gc.get_count()[2]
        if self._settled and looks != self._looks:
            self._looks = looks
            self._old = len(gc.get_objects(generation=2))  # 5 ns each
        if self._old < DUE and not self._partial:
            return
        seen = looks, self._moved()
        self._quiet = self._quiet + 1 if seen == self._seen else 0
        self._seen = seen
        if self._quiet >= QUIET_TICKS or (self._old >= LATE and self._partial >= AT_MOST):
            self._complete()
        elif self._old >= LATE:
            self._partial += 1
            self._look()

    def _complete(self) -> None:
        gc.unfreeze()
        self._look()
        self._partial = self._quiet = 0

    def _look(self) -> None:
        gc.collect()
        gc.freeze()
        self._looks = self._old = 0
