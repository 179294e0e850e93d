"""How reads and writes that wait for a medium are carried out: by io_uring, or by worker threads.

Decided once, when the process starts, by a probe or as the operator says. The log has which it is, and why.
"""

import logging
from collections.abc import Callable

from storage.uring import Ring
from targetd.net.loop import Loop, Turn

__all__ = ["IoEngine", "available"]

log = logging.getLogger("targetd.io")


def available() -> OSError | None:
    """Why io_uring cannot be used here; None: it can."""
    try:
        Ring(_nothing_for, _nothing_for).close()
    except OSError as error:
        return error
    return None


class IoEngine:
    """Of one process."""

    def __init__(self, loop: Loop, choice: str, after: Callable[[], None]) -> None:
        """
        Args:
            choice: ``threads``; or ``auto`` or ``uring``, both of which take io_uring where it can be had:
                who insists on it asks ``available`` before.
            after: called on the loop behind every batch of what has ended.
        """
        self._loop = loop
        self._after = after
        self.ring: Ring | None = None
        """What a backend is served by; None: worker threads."""
        self.reason = "as --io-engine says"
        """Why it is not io_uring."""
        if choice == "threads":
            return
        try:
            self.ring = Ring(loop.call_before_waiting, self._post)
        except OSError as error:
            self.reason = error.strerror or str(error)
            return
        self.reason = ""
        loop.serve(self.ring.fd, self._reap, _nothing)
        loop.promote(self.ring.fd)

    @property
    def name(self) -> str:
        """``uring`` or ``threads``."""
        return "threads" if self.ring is None else "uring"

    @property
    def under_way(self) -> int:
        """Operations that the kernel has in hand."""
        return 0 if self.ring is None else self.ring.under_way

    def tell(self) -> None:
        """Say in the log which it is."""
        if self.ring is None:
            log.info("reads and writes that wait for a medium: by worker threads (%s)", self.reason)
        else:
            log.info("reads and writes that wait for a medium: by io_uring")

    def _reap(self) -> Turn:
        """Something has ended. If that was all, its initiator is likely to be heard again."""
        ring = self.ring
        assert ring is not None
        try:
            ended = ring.reap()
            self._after()
        except Exception:  # the ring goes on: all units hang on it
            log.exception("what has ended could not be told")
            return Turn.OVER
        return Turn.SOON if ended == 1 and not ring.under_way else Turn.OVER

    def _post(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(self._posted, call)

    def _posted(self, call: Callable[[], None]) -> None:
        call()
        self._after()

    def close(self) -> None:
        """No more of it; what waits for a medium still is not waited for."""
        if self.ring is not None:
            self._loop.forget(self.ring.fd)
            self.ring.close()
            self.ring = None


def _nothing_for(call: Callable[[], None]) -> None:
    """Has nothing called."""


def _nothing() -> None:
    """It is never written to."""
