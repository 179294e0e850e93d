"""Media without a medium, for tests and benchmarks. What is written is gone when the daemon is.

``Memory`` keeps pages of 4 KiB that have been written, so that a terabyte costs nothing until it is used
and holes are true. Under a name it can be opened beside itself, with another size, as a file can: the pages
are there until the last opening is closed. ``Null`` takes everything, keeps nothing and reads as zeros: what
is left of a benchmark on it is the cost of the target itself.
"""

import errno
import os
import threading
from collections.abc import Iterator
from weakref import WeakValueDictionary

from storage.base import Backend, Buffer, Capabilities, Geometry, Run, Space
from storage.transfer import ZEROS, copy_buffered, copy_by_runs, merged, overlaps

__all__ = ["Memory", "Null"]

PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT
"""Bytes. The granularity of holes; as on most file systems, so that tests meet the usual numbers."""

_HOLE = bytes(PAGE)


class _Volatile(Backend):
    """What the two have in common: nothing to open, nothing to wait for."""

    def __init__(self, size_bytes: int, *, read_only: bool = False) -> None:
        self.writable = not read_only
        self.geometry = Geometry(size_bytes=size_bytes, rotational=False)
        self.capabilities = Capabilities(
            writable=self.writable,
            unmap=self.writable,
            unmap_granularity=PAGE,
            map_query=True,
            volatile=True,
        )

    def _check_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.read(offset, length)

    def copy_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.read(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.write(offset, data)
        return True

    def flush(self, offset: int = 0, length: int = 0) -> None:
        pass

    def refresh(self) -> Geometry:
        return self.geometry

    def resize(self, size_bytes: int) -> None:
        self.geometry = Geometry(size_bytes=size_bytes, rotational=False)


class _Pages(dict[int, bytearray]):
    """The pages that have been written, by number."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        """Held to change pages: a request is taken as a whole or not at all by any other."""


_named: "WeakValueDictionary[str, _Pages]" = WeakValueDictionary()
_named_lock = threading.Lock()


class Memory(_Volatile):
    """Pages in a dict; a page that is not there is a hole."""

    def __init__(self, size_bytes: int, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(size_bytes, read_only=read_only)
        with _named_lock:
            pages = _named.get(name) if name else None
            if pages is None:
                pages = _Pages()
                if name:
                    _named[name] = pages
        self._pages = pages
        self._lock = pages.lock

    def read(self, offset: int, length: int) -> Buffer:
        first, start = offset >> PAGE_SHIFT, offset & (PAGE - 1)
        with self._lock:
            if start + length <= PAGE:
                return bytes(memoryview(self._pages.get(first, _HOLE))[start : start + length])
            last = (offset + length - 1) >> PAGE_SHIFT
            get = self._pages.get
            data = b"".join([get(number, _HOLE) for number in range(first, last + 1)])
        return data if start == 0 and len(data) == length else memoryview(data)[start : start + length]

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        self._check_writable()
        done, total = 0, len(data)
        with self._lock, memoryview(data) as view:
            while done < total:
                number, start = (offset + done) >> PAGE_SHIFT, (offset + done) & (PAGE - 1)
                count = min(PAGE - start, total - done)
                page = self._pages.get(number)
                try:
                    if count == PAGE:
                        self._pages[number] = bytearray(view[done : done + PAGE])
                    else:
                        if page is None:
                            page = self._pages[number] = bytearray(PAGE)
                        page[start : start + count] = view[done : done + count]
                except MemoryError:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
                done += count

    def unmap(self, offset: int, length: int) -> None:
        self._check_writable()
        end = offset + length
        first, last = -(-offset >> PAGE_SHIFT), end >> PAGE_SHIFT
        with self._lock:
            for number in self._present(first, last):
                del self._pages[number]
            for start, stop in (
                (offset, min(first << PAGE_SHIFT, end)),
                (max(last << PAGE_SHIFT, offset), end),
            ):
                page = self._pages.get(start >> PAGE_SHIFT)
                if page is not None and start < stop:
                    low = start & (PAGE - 1)
                    page[low : low + stop - start] = _HOLE[: stop - start]

    def write_zeroes(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, len(ZEROS)):
            count = min(len(ZEROS), offset + length - at)
            self.write(at, ZEROS if count == len(ZEROS) else ZEROS[:count])

    def _present(self, first: int, last: int) -> list[int]:
        """Numbers of the pages in ``[first, last)`` that exist, in order; the caller holds the lock."""
        if last - first > len(self._pages):
            return sorted(number for number in self._pages if first <= number < last)
        return [number for number in range(first, last) if number in self._pages]

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        end = offset + length
        if not length:
            return iter(())
        with self._lock:
            present = self._present(offset >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        return merged(self._raw_runs(present, offset, end))

    @staticmethod
    def _raw_runs(present: list[int], at: int, end: int) -> Iterator[Run]:
        for number in present:
            start = number << PAGE_SHIFT
            if start > at:
                yield Run(at, start - at, False)
                at = start
            stop = min(start + PAGE, end)
            yield Run(at, stop - at, True)
            at = stop
        if at < end:
            yield Run(at, end - at, False)

    def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
        self._check_writable()
        if source is self and overlaps(source_offset, offset, length):
            copy_buffered(self, source, source_offset, offset, length)
        else:
            copy_by_runs(self, source, source_offset, offset, length)

    def space(self) -> Space:
        with self._lock:
            used = len(self._pages) << PAGE_SHIFT
        return Space(used=used, available=os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def close(self) -> None:
        self._pages = _Pages()
        self._lock = self._pages.lock


class Null(_Volatile):
    """Takes everything, keeps nothing, reads as zeros."""

    _zeros = memoryview(ZEROS)

    def read(self, offset: int, length: int) -> Buffer:
        return self._zeros[:length] if length <= len(ZEROS) else bytes(length)

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        self._check_writable()

    def unmap(self, offset: int, length: int) -> None:
        self._check_writable()

    def write_zeroes(self, offset: int, length: int) -> None:
        self._check_writable()

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        if length:
            yield Run(offset, length, False)

    def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
        self._check_writable()

    def space(self) -> Space:
        return Space(used=0, available=self.geometry.size_bytes)

    def close(self) -> None:
        pass
