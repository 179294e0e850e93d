"""How many normal sessions there are over all workers: iscsi_maxsesh is one number for the whole daemon.

A login is admitted in the middle of a PDU, where nothing can be waited for. So each worker's count is in a
file in memory that all have open, and who wants one more adds up all counts while it holds a record lock
(fcntl(2); it goes with the process). The lock is held for two system calls; it is tried, not waited for.
"""

import fcntl
import os
from struct import Struct

from protocol.connection import Connection
from protocol.events import End
from protocol.session import Session, SessionTable

__all__ = ["SessionQuota", "SharedSessions", "make_file"]

_COUNT = Struct("=I")
TRIES = 1000
"""To get the lock: some milliseconds. Who still has it then was stopped by somebody in the middle of it."""


def make_file(workers: int) -> int:
    """The file of all counts; its descriptor."""
    descriptor = os.memfd_create("iscsi-targetd-sessions")
    os.ftruncate(descriptor, _COUNT.size * workers)
    return descriptor


class SessionQuota:
    """The counts, as one worker uses them, or the front."""

    def __init__(self, descriptor: int, workers: int, index: int = 0) -> None:
        """``index`` is from 1 up; the front has none."""
        self._descriptor = descriptor
        self._size = _COUNT.size * workers
        self._at = _COUNT.size * (index - 1)

    def put(self, count: int) -> None:
        """So many are ours."""
        os.pwrite(self._descriptor, _COUNT.pack(count), self._at)

    def forget(self, index: int) -> None:
        """A worker is gone, and its sessions with it."""
        os.pwrite(self._descriptor, _COUNT.pack(0), _COUNT.size * (index - 1))

    def take(self, count: int, most: int) -> bool:
        """One more than the ``count`` that are ours, if all together are fewer than ``most``."""
        for _ in range(TRIES):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                os.sched_yield()
        else:
            return False
        try:
            counts = [each for (each,) in _COUNT.iter_unpack(os.pread(self._descriptor, self._size, 0))]
            counts[self._at // _COUNT.size] = count
            if sum(counts) >= most:
                return False
            self.put(count + 1)
            return True
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class SharedSessions(SessionTable):
    """The sessions of one worker. Ids are the numbers that the front gave the connections."""

    def __init__(self, seats: SessionQuota) -> None:
        super().__init__()
        self._seats = seats

    def new_id(self, connection: Connection) -> int:
        number: int = connection.owner.visitor.number
        return number

    def has_room(self) -> bool:
        return self._seats.take(self.normal_count(), self.max_sessions)

    def end(self, session: Session, reason: End, *, notice: bool = False) -> None:
        super().end(session, reason, notice=notice)
        self._seats.put(self.normal_count())
