"""A block device as a medium: a disk, a partition, a logical volume, a loop device.

The kernel is asked for everything: sizes and rotation by ioctl, what discard can do from the request
queue's attributes in sysfs, which is free of side effects where a trial discard would not be.

Two ways of giving space back, best first:

* ``fallocate(PUNCH_HOLE)`` on the device sends WRITE ZEROES with permission to deallocate. The range reads
  as zeros afterwards, for certain. It needs ``write_zeroes_max_bytes``.
* ``BLKDISCARD`` is advice. What the range reads as afterwards nobody promises (the kernel dropped
  ``discard_zeroes_data`` for that reason), so ``unmap_reads_zero`` is false.

A device cannot say what is mapped (lseek with SEEK_DATA gives EINVAL), and its size is its administrator's:
growth and shrinking are both followed at ``refresh``, unless a size was asked for.

One that has gone is taken again when it is back: a disk, a map or a volume by its name in the hardware or the
driver, a loop device by the file behind it. What has no such name, or another, is another one, and not taken.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from storage import linux
from storage.base import Backend, Capabilities, Geometry, Run, Space
from storage.handle import CLOSED, Handle, open_device
from storage.identity import ANOTHER, device_name, disk_sequence
from storage.mapping import UNMAPPED
from storage.paged import Paged
from storage.transfer import copy_buffered, copy_by_runs, overlaps, split_aligned, zero_buffered

__all__ = ["Device"]

DISCARD_PIECE = 1 << 30
"""Bytes for one discard or zeroing call: each is uninterruptible for as long as the device takes."""


class Device(Paged):
    """A block device, open and claimed."""

    _inline_medium = True

    def __init__(self, path: str, size_bytes: int = 0, *, read_only: bool = False) -> None:
        """Open ``path`` and claim it, so that nobody mounts it meanwhile.

        Args:
            path: a block device node.
            size_bytes: export only so much; 0 = all of it.
            read_only: open it so.

        Raises:
            OSError: EBUSY, it is mounted or otherwise in use; EROFS, it takes no writes; ENODEV, there is
                no medium; ENOSPC, it is smaller than ``size_bytes``; ENOTBLK; or what open(2) says.
        """
        super().__init__(path, writable=not read_only)
        self._asked_size = size_bytes
        self._rdev = 0
        self._name = ""
        """As it is known again when it has another number."""
        self._disk = ""
        """No other disk since boot is known by this."""
        self._sequence: int | None = None
        self._punch: Callable[[int, int, int], None] = linux.discard
        with self._change:
            self._open()

    def _open(self) -> None:
        handle, status = open_device(self.path, writable=self.writable)
        try:
            self._adopt(handle, status)
        except BaseException:
            handle.abandon()
            raise

    def _adopt(self, handle: Handle, status: os.stat_result) -> None:
        if self.writable and linux.is_read_only(handle.fd):
            raise OSError(errno.EROFS, "the device is read-only", self.path)
        present = self._size_of(handle)
        if self._asked_size > present:
            raise OSError(errno.ENOSPC, f"the device has only {present} bytes", self.path)
        self._rdev = status.st_rdev
        self._name, self._disk = self._name_of(status.st_rdev), disk_sequence(status.st_rdev)
        self._sequence = linux.disk_sequence(handle.fd)
        self.capabilities = self._capabilities(handle)
        self._export(handle, self._asked_size or present)

    def _export(self, handle: Handle, size_bytes: int) -> None:
        self.geometry = Geometry(
            size_bytes=size_bytes,
            logical_block_size=linux.logical_block_size(handle.fd),
            physical_block_size=self._physical_block_size(handle),
            rotational=linux.is_rotational(handle.fd),
        )
        self._attach(handle, size_bytes)

    def _physical_block_size(self, handle: Handle) -> int:
        return linux.physical_block_size(handle.fd)

    def _capabilities(self, handle: Handle) -> Capabilities:
        discards = self._queue("discard_max_bytes") > 0
        zeroes = discards and self._queue("write_zeroes_max_bytes") > 0
        self._punch = linux.punch_hole if zeroes else linux.discard
        return Capabilities(
            writable=self.writable,
            unmap=self.writable and discards,
            unmap_granularity=max(self._queue("discard_granularity"), linux.logical_block_size(handle.fd)),
            unmap_reads_zero=zeroes,
        )

    def _name_of(self, rdev: int) -> str:
        """The name of the device now under a number; empty: it has none that stays."""
        return device_name(rdev)

    def _check_name(self, rdev: int) -> None:
        """Whether what is under the path after a change is the device that was there."""
        if (rdev, disk_sequence(rdev)) == (self._rdev, self._disk):
            return
        if not self._name or self._name_of(rdev) != self._name:
            raise OSError(errno.ESTALE, ANOTHER.format("device"), self.path)

    def _queue(self, attribute: str) -> int:
        """A number from the request queue's attributes; 0 where sysfs has none."""
        node = Path(f"/sys/dev/block/{os.major(self._rdev)}:{os.minor(self._rdev)}")
        for queue in (node / "queue", node.resolve().parent / "queue"):  # a partition uses its disk's
            try:
                return int((queue / attribute).read_text())
            except (OSError, ValueError):
                continue
        return 0

    def _size_of(self, handle: Handle) -> int:
        try:
            size = linux.size_of_device(handle.fd)
        except OSError as error:
            raise OSError(errno.ENODEV, f"the device is gone: {error.strerror}", self.path) from None
        if not size:
            raise OSError(errno.ENODEV, "the device has no medium", self.path)
        return size

    def _examine(self, handle: Handle) -> OSError | None:
        try:
            present = self._size_of(handle)
        except OSError as error:
            return error
        if present < self.geometry.size_bytes:
            text = f"the device has shrunk to {present} of {self.geometry.size_bytes} bytes"
            return OSError(errno.EIO, text, self.path)
        return None

    # -- giving space back ------------------------------------------------------------------------

    def unmap(self, offset: int, length: int) -> None:
        self._by_pieces(self._punch, offset, length, self.geometry.logical_block_size)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._by_pieces(linux.zero_out, offset, length, self.geometry.logical_block_size)

    def _by_pieces(
        self, call: Callable[[int, int, int], None], offset: int, length: int, granularity: int
    ) -> None:
        """``call(fd, offset, length)`` on the whole granules of the range; its ends are zeroed."""
        handle = self._usable(write=True)
        start, stop = split_aligned(offset, length, granularity)
        try:
            for at in range(start, stop, DISCARD_PIECE):
                call(handle.fd, at, min(DISCARD_PIECE, stop - at))
        except OSError as error:
            self._failed(error)
            raise
        finally:
            if stop > start:
                self._mapping.forget(start, stop - start)
        zero_buffered(self, offset, start - offset)
        zero_buffered(self, stop, offset + length - stop)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        if length:
            yield Run(offset, length, True)

    def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
        self._usable(write=True)
        if source is self and overlaps(source_offset, offset, length):
            copy_buffered(self, source, source_offset, offset, length)
        else:
            copy_by_runs(self, source, source_offset, offset, length)

    # -- size and presence ------------------------------------------------------------------------

    def refresh(self) -> Geometry:
        with self._change:
            self._check_open()
            try:
                rdev = Path(self.path).stat().st_rdev
                if self._lost:
                    self._check_name(rdev)
                    # The old descriptor first: it holds the claim, and perhaps on a disk that is gone.
                    self._handle, self._mapping = CLOSED, UNMAPPED
                    self._open()
                    return self.geometry
                if rdev != self._rdev:
                    self._check_name(rdev)
                    raise OSError(errno.ESTALE, "the device has another number now", self.path)
                present = self._size_of(self._handle)
                if linux.disk_sequence(self._handle.fd) != self._sequence:
                    self._check_name(rdev)
                    raise OSError(errno.ESTALE, "the disk behind the device was changed", self.path)
            except OSError as error:
                self._lose(error)
                raise
            if not self._asked_size and present != self.geometry.size_bytes:
                self._export(self._handle, present)
            self._judge()
            self._raise_fault()
            return self.geometry

    def resize(self, size_bytes: int) -> None:
        """Export ``size_bytes`` of the device (0: all of it). ENOSPC when it has less."""
        with self._change:
            handle = self._usable()
            present = self._size_of(handle)
            if size_bytes > present:
                raise OSError(errno.ENOSPC, f"the device has only {present} bytes", self.path)
            self._asked_size = size_bytes
            self._export(handle, size_bytes or present)

    def space(self) -> Space:
        self._usable()
        return Space(used=self.geometry.size_bytes, available=0)
