"""The only file that maps memory: windows on page cache, and what is known to be in it.

A mapping lets a READ go from the page cache to the socket in one system call: ``sendmsg([header, slice
of the mapping])`` copies once, in the kernel, and Python never sees the data. It has teeth, and these
rules keep them off:

1. **Mapped memory is touched by system calls only.** A page past a truncated end or on a failing disk
   is SIGBUS when touched from Python (a slice copy, a checksum) and the daemon is gone; handed to
   ``sendmsg`` it is EFAULT and the daemon lives. So a ``Mapping`` hands out views, and whoever must look
   at the bytes takes ``Backend.read`` or ``Backend.copy_nowait`` instead.
2. **After EFAULT, ask ``Backend.read`` for the same range**: it uses ``preadv`` and raises the true errno
   (EIO when the file was cut off under us). Part of the reply may have left before the EFAULT.
3. **A cold page is never touched**: it would hold up the event loop for as long as the disk takes. What
   is in memory is known per chunk of 256 KiB as a fact in a set, found with one look on the hot path. A
   fact comes from mincore(2), a few microseconds, and is dropped by ``expire`` after about two seconds:
   memory pressure may have taken the pages by then. A stale fact costs one slow reply, never a wrong one.
4. **Stores go by system call too** (``store``). The data is copied into a few pages of our own that are a
   memfd, and ``preadv`` of that memfd puts it into the mapping: a page that cannot be had is a short count
   or EFAULT, and the caller does it again with ``pwrite``, which names the error. It is done only where
   the pages are in memory (rule 3) and writable: ``mapped_writes.py`` says why, and knows which are.
5. **Nothing is flushed here.** ``mmap.flush`` holds the GIL (0.16–0.19 s for 512 MiB of dirty pages); the
   backend's ``fdatasync`` on a worker cleans the same pages.

A mapping is never unmapped by hand: views that have been handed out keep it alive, and the last one to
go takes it along.

mincore tells the truth only to who may write the file or owns it; to others every page is said to be
resident (Linux ``can_do_mincore``, against spying on the page cache). ``may_ask`` knows, and a backend
that may not ask does without a mapping.
"""

import mmap
import os

from storage.linux import address_of, mincore
from storage.mapped_writes import CHUNK, CHUNK_SHIFT, PAGE, STORE_LIMIT, Stores, bounce

__all__ = ["CHUNK", "PAGE", "STORE_LIMIT", "UNMAPPED", "Mapping", "may_ask"]


def may_ask(fd: int) -> bool:
    """Whether mincore would tell us the truth about this file (see the module's last paragraph)."""
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


class Mapping:
    """A window on the first ``size`` bytes of a file or device."""

    __slots__ = ("_address", "_end", "_store", "_stores", "asked", "mapped", "view", "warm")

    def __init__(self, fd: int, size: int, *, writable: bool = False) -> None:
        """Map ``size`` bytes (0: map nothing, know nothing).

        Raises:
            OSError: the file system cannot map, or there is no address space left.
            ValueError: a regular file is shorter than ``size``.
        """
        self.mapped = size > 0
        self.view = memoryview(b"")
        """For readers: nothing can be stored through it."""
        self._store: memoryview | None = None
        self._stores: Stores | None = None
        self.warm: set[int] = set()
        """Chunks of which every page was in memory when last asked."""
        self.asked: set[int] = set()
        """Chunks that were asked about as a whole, which is done when a page of theirs was in memory: of one
        that is not all there, the pages of each request alone are asked about (1.3 µs, not 6)."""
        self._address = 0
        self._end = 0
        if self.mapped:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            window = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
            self.view = memoryview(window).toreadonly()
            self._address = address_of(window)
            self._end = -(-size // PAGE) * PAGE
            if writable:
                self._store = memoryview(window)
                self._stores = Stores(window.madvise, self._end)

    def read(self, offset: int, length: int) -> memoryview | None:
        """The range, when facts already known say that it is in memory. Hot: asks the kernel nothing."""
        warm = self.warm
        end = offset + length
        if length <= CHUNK and offset >> CHUNK_SHIFT in warm and (end - 1) >> CHUNK_SHIFT in warm:
            return self.view[offset:end]
        return None

    def look(self, offset: int, length: int) -> bool:
        """Whether the range is in memory, asking the kernel about what is not known; learns facts.

        ``length`` is at least 1 and the range lies inside the mapping (False where nothing is mapped).
        """
        if not self.mapped:
            return False
        warm = self.warm
        end = offset + length
        for chunk in range(offset >> CHUNK_SHIFT, ((end - 1) >> CHUNK_SHIFT) + 1):
            if chunk in warm:
                continue
            start = chunk << CHUNK_SHIFT
            stop = min(start + CHUNK, self._end)
            low = max(offset & -PAGE, start)
            high = min((end + PAGE - 1) & -PAGE, stop)
            if 0 in mincore(self._address + low, high - low, (high - low) // PAGE):
                return False
            if chunk not in self.asked:
                self.asked.add(chunk)
                if 0 not in mincore(self._address + start, stop - start, (stop - start) // PAGE):
                    warm.add(chunk)
        return True

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Put ``data`` at ``offset`` by way of the mapping (rule 4), if that is cheap and waits for no disk.

        ``data`` has 1 to STORE_LIMIT bytes. False: nothing, or only a part, was stored; use ``pwrite``.
        """
        stores, target = self._stores, self._store
        if stores is None or target is None:
            return False
        chunk = offset >> CHUNK_SHIFT
        end = offset + len(data)
        if (end - 1) >> CHUNK_SHIFT != chunk:
            return False  # across two chunks: too rare for its tests
        if chunk not in stores.ready and not (
            stores.affords(chunk) and self._all_in_memory(chunk) and stores.prepare(chunk)
        ):
            return False
        return bounce.into(target[offset:end], data)

    def _all_in_memory(self, chunk: int) -> bool:
        start = chunk << CHUNK_SHIFT
        self.look(start, min(CHUNK, self._end - start))
        return chunk in self.warm

    def wrote(self, offset: int, length: int) -> None:
        """So many bytes, at least 1, were written there past the mapping. Any thread."""
        if self._stores is not None:
            self._stores.wrote(offset, length)

    def cleaned(self) -> None:
        """All that was written before has reached the medium. Any thread."""
        if self._stores is not None:
            self._stores.cleaned()

    def forget(self, offset: int, length: int) -> None:
        """Drop the facts about a range whose pages have been taken out of memory (a punched hole)."""
        first, last = offset >> CHUNK_SHIFT, (offset + length - 1) >> CHUNK_SHIFT
        if last - first >= len(self.warm):
            # A hole larger than all that is known: cheaper to learn anew. (A copy and a loop over it
            # would race with the event loop's ``look``.)
            self.warm.clear()
        else:
            for chunk in range(first, last + 1):
                self.warm.discard(chunk)
        if self._stores is not None:
            self._stores.forget()

    def expire(self) -> None:
        """Drop all facts."""
        self.warm.clear()
        self.asked.clear()
        if self._stores is not None:
            self._stores.expire()


UNMAPPED = Mapping(-1, 0)
"""Maps nothing and knows nothing; what a backend without a mapping has in its place."""
