"""Small writes through a mapping: where they are cheap, and how they are made. ``mapping.py`` has the rules.

What a small write costs is decided by folios, the pieces in which the page cache keeps a file: whoever
brought the bytes in chose their size, 4 KiB to 2 MiB. Linux 6.18, ext4, 4 KiB at random, µs and KiB to the
disk of one:

==========================  =====  ======  =======  =====
folio                       4 KiB  64 KiB  256 KiB  1 MiB
==========================  =====  ======  =======  =====
``pwrite``                    1.1     3.1      3.9    9.6
store to a writable page      1.0     1.0      1.0    1.0
store to a clean page         2.2     3.8      6.2   15.2
``pwrite``: to the disk         4       4        4      4
clean page: to the disk         4      64      256    980
==========================  =====  ======  =======  =====

So a page that has been written back (it is clean, and write-protected in the mapping) must not be stored to:
the page fault makes its whole folio dirty. ``pwrite`` makes dirty what it writes. But where all is dirty
anyway, a store is by far the cheaper. Hence, by region of 2 MiB (no folio is larger, none lies in two):

1. A store is paid for in advance: half a region must have been written, and not flushed by us, before its
   pages are made writable. So, all in all, no more than about three times what was written goes to the disk.
2. Pages are made writable by MADV_POPULATE_WRITE, a chunk at a time, after MADV_DONTNEED has dropped what is
   write-protected: then one fault takes a whole folio. Where it takes one page only (a kernel before 6.18,
   small folios) there is little to gain, and ``pwrite`` goes on.
3. The kernel writes back when it likes and tells nobody, so a chunk is tried once a second: a fault there
   says that its region is clean, and has to be paid for again.

``madvise`` and the faults wait for no disk where the pages are in memory, which the caller has made sure of.
"""

import mmap
import os
import resource
import threading
from collections.abc import Callable

__all__ = ["CHUNK", "CHUNK_SHIFT", "PAGE", "REGION", "STORE_LIMIT", "Stores", "bounce"]

PAGE = mmap.PAGESIZE

CHUNK_SHIFT = 18
CHUNK = 1 << CHUNK_SHIFT
"""Bytes that one fact is about; see ``mapping``."""

REGION_SHIFT = 21
REGION = 1 << REGION_SHIFT
"""Bytes of the largest folio (PMD_SIZE with pages of 4 KiB)."""

PRICE = REGION // 2
"""Bytes that must have been written to a region before it is made writable."""

STORE_LIMIT = 32 * 1024
"""Bytes up to which a store is faster than ``pwrite``, if its pages are writable."""

REMEMBERED_S = 15
"""Ticks, about a second each, for which what was written counts: half of the age at which the kernel writes
back by default (vm.dirty_expire_centisecs)."""

MOST_REGIONS = 16384
"""That are kept writable, 32 GiB: then all is learnt anew, so that memory stays bounded."""

_MADV_POPULATE_WRITE = 23
"""Linux 5.14."""
_SHIFT = REGION_SHIFT - CHUNK_SHIFT


class _Bounce:
    """The pages that stores pass through. Touching them is safe: the memfd is ours and never shrinks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1
        self._pages = memoryview(b"")

    def open(self) -> None:
        """Have the pages, once for a process: not in the middle of the first store, nor before a fork."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.memfd_create("iscsi-targetd-bounce", os.MFD_CLOEXEC)
                os.ftruncate(self._fd, STORE_LIMIT)
                self._pages = memoryview(mmap.mmap(self._fd, STORE_LIMIT))

    def into(self, target: memoryview, data: bytes | bytearray | memoryview) -> bool:
        """Copy ``data`` to ``target``, which may be mapped; False: not all of it, or in use just now."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            length = len(data)
            self._pages[:length] = data
            return os.preadv(self._fd, (target,), 0) == length
        except OSError:
            return False
        finally:
            self._lock.release()


bounce = _Bounce()


def _faults() -> int:
    """Page faults of this thread so far that needed no disk (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


class Stores:
    """Which chunks of a writable mapping are cheap to store to. One thread uses it, but where it says any."""

    __slots__ = ("_advise", "_age", "_end", "_granted", "_paid", "ready")

    def __init__(self, advise: Callable[[int, int, int], None], end: int) -> None:
        """
        Args:
            advise: madvise of the mapping: advice, offset, length.
            end: bytes in the mapping, in whole pages.
        """
        bounce.open()
        self._advise = advise
        self._end = end
        self._paid: dict[int, int] = {}
        """Region → bytes written since it was last made writable or is known to be clean."""
        self._granted: dict[int, int] = {}
        """Region that was made writable → its chunks that were, one bit each."""
        self.ready: set[int] = set()
        """Chunks that were writable when last tried."""
        self._age = 0

    def wrote(self, offset: int, length: int) -> None:
        """So much was written there by other ways. Any thread: two at once may lose a count, and no more."""
        paid = self._paid
        region = offset >> REGION_SHIFT
        end = offset + length
        while True:
            stop = (region + 1) << REGION_SHIFT
            if end <= stop:
                paid[region] = paid.get(region, 0) + end - offset
                return
            paid[region] = paid.get(region, 0) + stop - offset
            offset = stop
            region += 1

    def cleaned(self) -> None:
        """All was written back. Any thread."""
        self._paid = {}
        self._granted = {}
        self.ready = set()

    def forget(self) -> None:
        """Pages have been taken out of memory. Any thread."""
        if self.ready:
            self.ready = set()

    def expire(self) -> None:
        """A second has passed."""
        self.forget()
        self._age += 1
        if self._age >= REMEMBERED_S:
            self._age = 0
            self._paid = {}

    def affords(self, chunk: int) -> bool:
        """Whether it is worth while, or has been already, to make this chunk writable."""
        region = chunk >> _SHIFT
        return region in self._granted or self._paid.get(region, 0) >= PRICE

    def prepare(self, chunk: int) -> bool:
        """Make sure that stores to this chunk are cheap; True: it is ``ready``.

        All of the chunk is in memory, and ``affords`` has said yes.
        """
        region = chunk >> _SHIFT
        bit = 1 << (chunk & (1 << _SHIFT) - 1)
        granted = self._granted
        chunks = granted.get(region, 0)
        if not chunks:
            self._paid[region] = 0
            if len(granted) >= MOST_REGIONS:
                granted.clear()
        try:
            if not chunks:
                start = region << REGION_SHIFT
                self._advise(mmap.MADV_DONTNEED, start, min(REGION, self._end - start))
            if not self._populate(chunk, tried=bool(chunks & bit)):
                granted.pop(region, None)
                return False
        except OSError:  # an older kernel, or a page that cannot be had: pwrite names the error
            granted.pop(region, None)
            return False
        granted[region] = chunks | bit
        self.ready.add(chunk)
        return True

    def _populate(self, chunk: int, *, tried: bool) -> bool:
        """Whether the chunk is writable now, at the price of a fault a folio and not of one a page.

        ``tried``: it was writable before, and must not need a fault.
        """
        start = chunk << CHUNK_SHIFT
        length = min(CHUNK, self._end - start)
        faults = _faults()
        self._advise(_MADV_POPULATE_WRITE, start, min(2 * PAGE, length))
        faults = _faults() - faults
        if tried or faults > 1:
            return not faults
        self._advise(_MADV_POPULATE_WRITE, start, length)
        return True
