"""What files and block devices have in common: both are read and written through the page cache.

**Reading.** What is in memory goes out straight from a mapping (``mapping.py`` has the rules); what is
not is read by a worker with ``pread``, which also brings it into memory for the next time. Where nothing
can be mapped (no address space left, an odd file system) ``preadv`` with RWF_NOWAIT takes its place.

**Writing.** Small writes to what is dirty already go through the mapping, by system call
(``mapped_writes.py``). Any other buffered write to a local file system is a copy into the page cache and
some bookkeeping: cheaper than a hop to a worker and back (30–60 µs) up to ``INLINE_WRITE_LIMIT``. Three
things can make it wait, and each has its rule: a partial page that is not in memory must be read in first
(such writes go to a worker); file systems behind a network or another process wait for that (``_inline`` is
false for them); and the kernel holds up writers when too much is dirty (a governor sends writes to workers
for a while after one that slept for long; a thread that only lost its processor to others has waited for no
medium).

**Faults.** A medium that is known to be cut off, deleted or gone serves nothing: silent zeros and writes
into a file without a name are lies. ``_examine`` finds out, for one system call; ``tick`` asks it for
media in use, and every failure does. A fault that ``_examine`` can see past clears itself; one that
concerns the path (``_lose``) lasts until ``refresh`` has found the medium again.
"""

import errno
import os
import resource
import threading
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from storage.base import Backend, Buffer, Done
from storage.coalesce import Coalescer
from storage.handle import CLOSED, Handle
from storage.mapping import PAGE, STORE_LIMIT, UNMAPPED, Mapping, may_ask
from storage.transfer import short_io
from storage.uring import Slots

__all__ = ["INLINE_WRITE_LIMIT", "Paged"]

INLINE_WRITE_LIMIT = 256 * 1024
"""Bytes. Copying this much into the page cache takes 10–60 µs, up to what a worker hop costs: above it a
worker is no dearer, and the loop stays free."""

SLOW_WRITE_S = 0.010
"""An inline write that takes longer has waited for more than a copy. Twice the interpreter's switch
interval, because waiting for the GIL after the call counts here too and says nothing of the medium."""

SLOW_WRITE_PAUSE = 20
"""For how many times as long as a slow one took the next writes go to workers: so the event loop waits for
this medium a twentieth of its time at most, and a short wait (a page under write-back, a journal's commit)
does not send a thousand writes after it the dear way. The kernel's pauses for a writer are up to 0.2 s."""

WATCHED_WRITES = 64
"""How many inline writes after one that took long are watched: whether the thread slept in the next such."""

SLOTS = 128
"""Operations that a medium with a queue of its own may have under way in the ring: what a session may send at
once; a disk gains little from more."""

FLUSHED_TOGETHER = 1 << 20
"""Bytes that have been written and not flushed, up to which a durable write is a buffered one and a flush
that it may share with others; where more waits to be flushed, it is written through by itself."""

FEW_SLOTS = 8
"""The same where each takes a thread of the kernel's until it ends."""

_PARTIAL = PAGE - 1

_REFUSALS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPERM, errno.ENOMEM))
"""What a local file system may say of a write before it takes any of it."""

_NOT_WRITE_BACK = frozenset((errno.EINTR, errno.EINVAL, errno.EBADF, errno.EFAULT))
"""What no write-back ends with: a fault of the call itself."""

_NOT_TRIED = frozenset((errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.EOPNOTSUPP, errno.EINVAL))
"""What the ring says of an operation that nothing is wrong with: a worker does it, or names what is."""


def _sleeps() -> int:
    """How often this thread has given up its processor to wait for something (getrusage(2)).

    0.7 µs at best and 5 on a busy machine, so it is asked only about writes that are watched.
    """
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Paged(Backend):
    """A medium behind the page cache. Subclasses open it and know its special operations."""

    _local = True
    """Asking the kernel about the medium never waits (false for network file systems and FUSE)."""
    _in_memory = False
    """The file system has no medium (tmpfs): every read and write is a copy."""
    _inline_medium = False
    """Buffered writes never wait for anything but dirty throttling."""
    _tells_late = False
    """A plain write may be told the error of an earlier one's write-back (NFS)."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._handle: Handle = CLOSED
        self._mapping: Mapping = UNMAPPED
        """Of the whole exported size."""
        self._window: Mapping = UNMAPPED
        """``_mapping``, or nothing while there is a fault."""
        self._inline = False
        self._inline_again = 0.0
        """``perf_counter`` reading before which no write is made inline."""
        self._watched = 0
        """Inline writes that are still to be watched."""
        self._touched = False
        """Written, or read from the medium, since the last tick."""
        self._missed: tuple[int, int] | None = None
        """Offset and length of the read that was not in memory last."""
        self._nowait_reads = True
        """RWF_NOWAIT has not failed yet."""
        self._fault: OSError | None = None
        self._lost = False
        """The fault lasts until ``refresh``."""
        self._closed = False
        self._write_back_error = ""
        self._change = threading.RLock()
        """Held to change handle, mapping, geometry or fault; readers take what they find."""
        self._flusher = Coalescer(self._sync)
        self._engine: Any = None
        """The process' ring, if it has one."""
        self._slots: Slots | None = None
        """Of that."""
        self._unflushed = 0
        """Bytes written since the last flush began, more or less."""
        self._counting = threading.Lock()
        """Held to count lost writes, and for nothing that may wait."""

    @abstractmethod
    def _examine(self, handle: Handle) -> OSError | None:
        """What is wrong with the medium behind the descriptor; never waits where ``_local``."""

    # -- never wait -------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self._window.read(offset, length) or self._read_unknown(offset, length)

    def _read_unknown(self, offset: int, length: int) -> Buffer | None:
        if not length:
            return b""
        window = self._window
        if self._missed == (offset, length):
            # The fast path has just asked; the command comes again by the general one.
            self._missed = None
            return None
        if window.look(offset, length):
            return window.view[offset : offset + length]
        if self._in_memory or not window.mapped:
            return self._read_cached(offset, length)
        self._missed = (offset, length)
        self._touched = True
        return None

    def _read_cached(self, offset: int, length: int) -> Buffer | None:
        if self._fault is not None:
            return None
        handle = self._handle
        try:
            if self._in_memory:
                data = os.pread(handle.fd, length, offset)
                return data if len(data) == length else None
            if not self._nowait_reads:
                return None
            buffer = bytearray(length)
            count = os.preadv(handle.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait_reads = False
            return None  # EAGAIN: not in memory. Anything else: a worker's read names it.
        return buffer if count == length else None

    def copy_nowait(self, offset: int, length: int) -> Buffer | None:
        window = self._window
        # Ask mincore first: RWF_NOWAIT alone may start reading ahead, and look up extents to do so.
        if window.mapped and not self._in_memory and length and not window.look(offset, length):
            return None
        return self._read_cached(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if not self._inline or length > INLINE_WRITE_LIMIT:
            return False
        begin = perf_counter()
        if begin < self._inline_again:
            return False
        self._touched = True
        self._unflushed += length
        sleeps = _sleeps() if self._watched else -1
        window = self._window
        if 0 < length <= STORE_LIMIT and window.store(offset, data):
            self._judge_pace(perf_counter() - begin, sleeps)
            return True
        if (offset | length) & _PARTIAL and not self._edges_in_memory(offset, length):
            return False
        handle = self._handle
        try:
            written = os.pwrite(handle.fd, data, offset)
            self._judge_pace(perf_counter() - begin, sleeps)
            if written != length:
                self._write_all(handle, offset, data, written, 0)
            elif length:
                window.wrote(offset, length)
        except OSError as error:
            self.last_error = self._bare(error)
            raise
        return True

    def _judge_pace(self, took_s: float, sleeps: int) -> None:
        """An inline write has ended: shall workers take the next?

        On a busy machine a thread waits for its processor longer than many a write for its disk. The first
        long one is let pass and the next are watched; one in which the thread slept has met a slow medium.

        Args:
            sleeps: ``_sleeps`` before it; -1 = not watched.
        """
        if took_s > SLOW_WRITE_S:
            if 0 <= sleeps < _sleeps():
                self._inline_again = perf_counter() + SLOW_WRITE_PAUSE * took_s
            self._watched = WATCHED_WRITES
        elif self._watched:
            self._watched -= 1

    def _edges_in_memory(self, offset: int, length: int) -> bool:
        """Whether the pages that the range covers only in part are in memory."""
        if self._in_memory or not length:
            return True
        window = self._window
        if window.read(offset, length):
            return True
        end = offset + length
        if offset & _PARTIAL and not window.look(offset, 1):
            return False
        return not end & _PARTIAL or window.look(end - 1, 1)

    def tick(self) -> None:
        window = self._window
        if not (window.asked or self._touched or self._fault is not None):
            return  # thousands of idle units cost nothing
        self._touched = False
        window.expire()
        if self._local and self._change.acquire(blocking=False):
            try:
                self._judge()
            finally:
                self._change.release()

    # -- begin now, end later ---------------------------------------------------------------------

    def serve_by(self, engine: Any) -> None:
        self._engine = engine
        if not engine:
            self._slots = None
        elif self._inline_medium:
            self._slots = engine.slots(SLOTS)
        else:
            self._slots = engine.slots(FEW_SLOTS, by_threads=True)

    def begin_read(self, offset: int, length: int, done: Done) -> bool:
        slots = self._slots
        if slots is None or self._fault is not None or not length:
            return False
        data = bytes(length)

        def ended(count: int) -> None:
            # Anything but all of it: a worker's read finds the rest, or names the error.
            done(data if count == length else lambda: self.read(offset, length))

        slots.read(self._handle, offset, data, ended)
        return True

    def begin_write(self, offset: int, data: Buffer, done: Done, *, durable: bool = False) -> bool:
        slots = self._slots
        if slots is None or self._fault is not None or not self.writable or not len(data):
            return False
        if durable and self._unflushed <= FLUSHED_TOGETHER:
            try:
                if self.write_nowait(offset, data):
                    return self.begin_flush(done)
            except OSError:
                return False  # a worker does it again, and names what is wrong
        mapping, handle = self._mapping, self._handle

        def ended(count: int) -> None:
            if count == len(data):
                if not durable:
                    mapping.wrote(offset, count)
                done(None)
            elif count >= 0 or -count in _NOT_TRIED:
                done(lambda: self.write(offset, data, durable=durable))
            else:
                error = OSError(-count, os.strerror(-count), self.path)
                done(lambda: self._write_failed(error, handle, offset, data, durable=durable))

        if not durable:
            self._touched = True
            self._unflushed += len(data)
        slots.write(handle, offset, data, os.RWF_DSYNC if durable else 0, ended)
        return True

    def begin_flush(self, done: Done) -> bool:
        slots = self._slots
        if slots is None or self._fault is not None or not self.writable:
            return False

        def heard(error: OSError | None) -> None:
            if error is None:
                done(None)
            elif error.errno in _NOT_TRIED:
                done(self.flush)
            else:
                done(lambda: self._raise_failed(error))

        self._flusher.begin(partial(self._begin_sync, slots), slots.post, heard)
        return True

    def _begin_sync(self, slots: Slots, ended: Callable[[OSError | None], None]) -> None:
        """``_sync`` by the ring."""
        mapping = self._mapping
        self._unflushed = 0

        def synced(result: int) -> None:
            if not result:
                mapping.cleaned()
                ended(None)
                return
            error = OSError(-result, os.strerror(-result), self.path)
            if -result not in _NOT_TRIED:
                self._lost_write(error)
            ended(error)

        slots.flush(self._handle, synced)

    def _raise_failed(self, error: OSError) -> None:
        self._failed(error)
        raise self._bare(error)

    # -- may wait ---------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> Buffer:
        handle = self._usable()
        self._missed = None
        try:
            data = os.pread(handle.fd, length, offset)
            if len(data) == length:
                return data
            parts = [data]
            missing = length - len(data)
            while missing:
                data = os.pread(handle.fd, missing, offset + length - missing)
                if not data:
                    # The end of a medium that should go on: cut off under us. Zeros would be a lie.
                    raise short_io("the medium ends before its size", self.path)
                parts.append(data)
                missing -= len(data)
            return b"".join(parts)
        except OSError as error:
            self._failed(error)
            raise

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        handle = self._usable(write=True)
        try:
            self._write_all(handle, offset, data, 0, os.RWF_DSYNC if durable else 0)
            if len(data) and not durable:
                self._unflushed += len(data)
                self._mapping.wrote(offset, len(data))
        except OSError as error:
            self._note_failed_write(error, handle, offset, data, durable=durable)
            raise

    def _write_failed(
        self, error: OSError, handle: Handle, offset: int, data: Buffer, *, durable: bool
    ) -> None:
        self._note_failed_write(error, handle, offset, data, durable=durable)
        raise self._bare(error)

    def _note_failed_write(
        self, error: OSError, handle: Handle, offset: int, data: Buffer, *, durable: bool
    ) -> None:
        if self._tells_of_others(error, handle, offset, data, durable=durable):
            self._lost_write(error)
        self._failed(error)

    def _tells_of_others(
        self, error: OSError, handle: Handle, offset: int, data: Buffer, *, durable: bool
    ) -> bool:
        """Whether a failed write was told of data that others had written and that is lost.

        A durable write is a write and a flush in one, and an error of write-back is told once, by whatever
        errno: to the flush of whoever comes first. Was it the flush? Then the data goes into the cache
        without it now; if that is refused in the same way, the write itself was what failed. Network file
        systems keep errors of write-back for plain writes as well, and nobody can tell one from the other.
        """
        if error.errno in _NOT_WRITE_BACK:
            return False
        if self._tells_late:
            return True
        if not durable:
            return False
        if self._local and error.errno in _REFUSALS:
            try:
                self._write_all(handle, offset, data, 0, 0)
            except OSError as again:
                return again.errno != error.errno
        return True

    def _write_all(self, handle: Handle, offset: int, data: Buffer, done: int, flags: int) -> None:
        with memoryview(data) as view:
            while done < len(view):
                with view[done:] as rest:
                    if flags:
                        count = self._write_durable(handle, rest, offset + done, flags)
                    else:
                        count = os.pwrite(handle.fd, rest, offset + done)
                if not count:
                    raise short_io("nothing was written", self.path)
                done += count

    @staticmethod
    def _write_durable(handle: Handle, data: memoryview, offset: int, flags: int) -> int:
        try:
            return os.pwritev(handle.fd, [data], offset, flags)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        # A file system without RWF_DSYNC: the same by hand.
        count = os.pwrite(handle.fd, data, offset)
        os.fdatasync(handle.fd)
        return count

    def flush(self, offset: int = 0, length: int = 0) -> None:
        # The whole medium whatever the range: Linux has no call that makes a range durable
        # (sync_file_range writes neither metadata nor the disk's own cache).
        if self.writable:
            self._usable()
            self._flusher.run()

    def _sync(self) -> None:
        handle = self._handle
        mapping = self._mapping
        self._unflushed = 0
        try:
            os.fdatasync(handle.fd)
            mapping.cleaned()
        except OSError as error:
            # The kernel reports a write-back error once per open file and then forgets it, and the
            # pages count as clean: this is the only time that anyone hears of it.
            self._lost_write(error)
            self._failed(error)
            raise

    def close(self) -> None:
        with self._change:
            self._inline = False
            self._handle = CLOSED
            self._window = self._mapping = UNMAPPED
            self._closed = self._lost = True
            self._fault = OSError(errno.EBADF, "the extent has been closed", self.path)

    # -- state ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the extent has been closed", self.path)

    def _attach(self, handle: Handle, size_bytes: int) -> None:
        """Serve ``size_bytes`` of ``handle`` from now on. The caller holds ``_change``, sets the geometry."""
        mapping = UNMAPPED
        if size_bytes and may_ask(handle.fd):
            try:
                mapping = Mapping(handle.fd, size_bytes, writable=self.writable)
            except (OSError, ValueError):
                pass  # RWF_NOWAIT serves instead
        self._window = UNMAPPED  # never the old window with the new handle
        self._handle = handle
        self._mapping = mapping
        self.serve_by(self._engine)  # another file system may be there now
        self._lost = False
        self._set_fault(None)

    def _usable(self, *, write: bool = False) -> Handle:
        """The handle, if the medium can be used; the caller keeps it in a local while it works."""
        if write and not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
        if self._fault is not None:
            with self._change:
                self._judge()
                self._raise_fault()
        return self._handle

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._bare(self._fault)

    def _bare(self, error: OSError) -> OSError:
        """The error without its traceback, whose frames would hold on to the handle and the data."""
        return OSError(error.errno, error.strerror, self.path)

    def _judge(self) -> None:
        """Look whether the medium is whole. The caller holds ``_change``."""
        if not self._lost:
            self._set_fault(self._examine(self._handle))

    def _lose(self, error: OSError) -> None:
        """The medium is gone until ``refresh`` finds it. The caller holds ``_change``."""
        self._lost = True
        self._set_fault(error)

    def _set_fault(self, fault: OSError | None) -> None:
        self._fault = fault = fault and self._bare(fault)
        if fault is not None:
            self._inline = False
            self._window = UNMAPPED
            self._mapping.expire()
            self.last_error = fault
            self.status = fault.strerror or str(fault)
        else:
            self._window = self._mapping
            self._inline = self.writable and self._inline_medium
            self.status = self._write_back_error or "ok"

    def _failed(self, error: OSError) -> None:
        """An operation has failed: remember it, and see whether the medium itself is at fault."""
        self.last_error = self._bare(error)
        with self._change:
            self._judge()

    def _lost_write(self, error: OSError) -> None:
        with self._counting:
            self.lost_writes += 1
            self._write_back_error = f"write-back error: {error.strerror}; data written before may be lost"
            self.status = self._write_back_error
