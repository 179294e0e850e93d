"""How many normal sessions there are over all workers: iscsi_maxsesh is one number for the whole daemon, and
so is the share that one address or one initiator may have of it.

A login is admitted in the middle of a PDU, where nothing can be waited for. So each worker's counts are in a
file in memory that all have open, and who wants one more adds up all counts while it holds a record lock
(fcntl(2); it goes with the process). The lock is held for a few system calls; it is tried, not waited for.

A worker's row is its count of sessions, and ``BUCKETS`` more for those of addresses and initiators, by a hash
of their names: two that have one bucket have one share together, which is rare, and errs towards refusing.
"""

import fcntl
import os
import zlib
from collections.abc import Iterable
from struct import Struct

from protocol.connection import Connection
from protocol.events import End
from protocol.session import Holder, Session, SessionTable, all_taken, holders, share, share_taken

__all__ = ["SessionQuota", "SharedSessions", "make_file"]

BUCKETS = 4095
_COUNT = Struct("=I")
_ROW = _COUNT.size * (BUCKETS + 1)
TRIES = 1000
"""To get the lock: some milliseconds. Who still has it then was stopped by somebody in the middle of it."""


def make_file(workers: int) -> int:
    """The file of all counts; its descriptor."""
    descriptor = os.memfd_create("iscsi-targetd-sessions")
    os.ftruncate(descriptor, _ROW * workers)
    return descriptor


class SessionQuota:
    """The counts, as one worker uses them, or the front."""

    def __init__(self, descriptor: int, workers: int, index: int = 0) -> None:
        """``index`` is from 1 up; the front has none."""
        self._descriptor = descriptor
        self._workers = workers
        self._index = index

    def put(self, count: int, buckets: Iterable[tuple[int, int]] = ()) -> None:
        """So many sessions are ours, and so many of those in these buckets."""
        self._write(0, count)
        for bucket, own in buckets:
            self._write(bucket, own)

    def _write(self, column: int, count: int) -> None:
        os.pwrite(self._descriptor, _COUNT.pack(count), _ROW * (self._index - 1) + _COUNT.size * column)

    def forget(self, index: int) -> None:
        """A worker is gone, and its sessions with it."""
        os.pwrite(self._descriptor, bytes(_ROW), _ROW * (index - 1))

    def _others(self, column: int) -> int:
        """The sum over all other workers."""
        return sum(
            _COUNT.unpack(os.pread(self._descriptor, _COUNT.size, _ROW * (index - 1) + _COUNT.size * column))[
                0
            ]
            for index in range(1, self._workers + 1)
            if index != self._index
        )

    def take(
        self, count: int, most: int, counts: Iterable[tuple[Holder, int]] = (), *, asking: bool = False
    ) -> str:
        """One more than the ``count`` that are ours, if all together are fewer than ``most``, and those of
        each holder (with our part of them) fewer than its share; else why not. ``asking``: take none."""
        for _ in range(TRIES):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                os.sched_yield()
        else:
            return "the number of sessions could not be found out; try again"
        try:
            if count + self._others(0) >= most:
                return all_taken(most)
            counts = list(counts)
            for holder, own in counts:
                if own + self._others(bucket(holder)) >= share(most):
                    return share_taken(holder, most)
            if not asking:
                self.put(count + 1, [(bucket(holder), own + 1) for holder, own in counts])
            return ""
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def bucket(holder: Holder) -> int:
    """Its column; the same in every process."""
    return 1 + zlib.crc32("\0".join(holder).encode(errors="replace")) % BUCKETS


class SharedSessions(SessionTable):
    """The sessions of one worker. Ids are the numbers that the front gave the connections."""

    def __init__(self, seats: SessionQuota) -> None:
        super().__init__()
        self._seats = seats

    def new_id(self, connection: Connection) -> int:
        number: int = connection.owner.visitor.number
        return number

    def key(self, holder: Holder) -> int:
        return bucket(holder)

    def full(self, origin: str, initiator_name: str, *, asking: bool = False) -> str:
        counts = [(holder, self.counts[bucket(holder)]) for holder in holders(origin, initiator_name)]
        return self._seats.take(self.normal_count(), self.max_sessions, counts, asking=asking)

    def end(self, session: Session, reason: End, *, notice: bool = False) -> None:
        super().end(session, reason, notice=notice)
        ours = map(bucket, holders(session.origin, session.initiator_name))
        self._seats.put(self.normal_count(), [(each, self.counts[each]) for each in ours])
