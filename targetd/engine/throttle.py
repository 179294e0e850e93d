"""I/O limits of an extent: a bucket for commands and one for bytes, filled by time. Knows no command.

A bucket holds at most ``BURST_S`` seconds' worth, so an extent that was idle may go that far ahead. A command
may start while there is anything in every bucket, and then takes its whole share, below zero if need be: a
command larger than the bucket is late, never stuck, and the average holds. Nothing on the event loop sleeps:
what must wait stays in its unit's task set, and one timer for each extent says when to look again.

What moves more than an initiator sends or gets (copies, WRITE SAME, VERIFY, UNMAP …) takes its share on its
worker, piece by piece, and there it waits: the lane has threads of its own for such work.
"""

import asyncio
import threading
import time
from collections.abc import Callable

__all__ = ["BURST_S", "Throttle"]

BURST_S = 2.0
"""Seconds of the limit that may be used at once after a pause. Long enough for the flush of a database or a
boot's reads to pass unhindered, short enough that a minute's average is within a few per cent."""

PIECE_S = 0.25
"""Seconds of the limit that a piece of long work takes at once, so that short commands pass between two."""

PIECE_UNIT = 64 << 10
"""Bytes: a piece is a multiple of it, and at least one."""

LOOK_S = 0.05
"""How often work that waits for its share looks whether it is still wanted, or the limits are others."""

LEAST_WAIT_S = 0.001
"""Of a timer; what comes due meanwhile starts together."""


class _Bucket:
    """Fills with ``rate`` a second; 0: bottomless."""

    __slots__ = ("level", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.level = rate * BURST_S

    def fill(self, elapsed_s: float) -> None:
        self.level = min(self.level + self.rate * elapsed_s, self.rate * BURST_S)

    def change(self, rate: int) -> None:
        """What is left or owed is carried over, in seconds."""
        self.level = self.level / self.rate * rate if self.rate else rate * BURST_S
        self.rate = rate

    @property
    def wait_s(self) -> float:
        """Until there is something in it; 0: there is."""
        return 0.0 if not self.rate or self.level > 0 else -self.level / self.rate + LEAST_WAIT_S


class Throttle:
    """A ``protocol.scsi.taskset.Throttle``. On the event loop only, but for ``piece_bytes`` and ``spend``."""

    def __init__(
        self,
        iops: int,
        bytes_per_s: int,
        released: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """
        Args:
            iops: commands that move data, a second; 0: no limit.
            bytes_per_s: what they move; 0: no limit.
            released: called when some of what had to wait may go on.
        """
        self._commands = _Bucket(iops)
        self._bytes = _Bucket(bytes_per_s)
        self._released = released
        self._loop = loop
        self._filled_at = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        """Held to change buckets."""

    @property
    def limits(self) -> tuple[int, int]:
        """Commands a second, bytes a second."""
        return self._commands.rate, self._bytes.rate

    def change(self, iops: int, bytes_per_s: int) -> None:
        """Other limits from now on."""
        with self._lock:
            self._fill()
            self._commands.change(iops)
            self._bytes.change(bytes_per_s)
        self.close()

    def _fill(self) -> None:
        now = self._loop.time()
        elapsed_s, self._filled_at = now - self._filled_at, now
        self._commands.fill(elapsed_s)
        self._bytes.fill(elapsed_s)

    @property
    def exhausted(self) -> bool:
        with self._lock:
            self._fill()
            wait_s = max(self._commands.wait_s, self._bytes.wait_s)
        if wait_s and self._timer is None:
            self._timer = self._loop.call_later(max(wait_s, LEAST_WAIT_S), self._due)
        return wait_s > 0

    def take(self, length: int) -> bool:
        if self.exhausted:
            return False
        with self._lock:
            self._commands.level -= 1
            self._bytes.level -= length
        return True

    @property
    def piece_bytes(self) -> int:
        rate = self._bytes.rate
        return max(1, int(rate * PIECE_S) // PIECE_UNIT) * PIECE_UNIT if rate else 0

    def spend(self, length: int, stopped: Callable[[], bool]) -> bool:
        while True:
            with self._lock:
                self._fill()
                wait_s = self._bytes.wait_s
                if not wait_s:
                    self._bytes.level -= length
                    return True
            if stopped():
                return False
            time.sleep(min(wait_s, LOOK_S))

    def _due(self) -> None:
        self._timer = None
        self._released()

    def close(self) -> None:
        """No timer any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
