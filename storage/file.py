"""A file as a medium.

The exported size and the file's size are two things. The file is grown, sparse, when the exported size is
larger, and never shortened: a smaller exported size leaves the rest of the file alone (api-semantics
§6.3). An exported size of 0 means that of the file, and follows its growth at ``refresh``. A file that is
*shorter* than what is exported has been cut off under us: everything but that is an error until it is
whole again, since a write past its end would fill the gap with silent zeros.

A file whose name has gone, or leads to another file, is no longer the medium: what is written to it would
vanish with the descriptor. ``refresh`` raises until the old one is back under its path. Another one there is
not ours to take: whoever put it there may want it whole, and initiators have in memory what the old one held.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from storage import linux
from storage.base import Backend, Capabilities, Geometry, Run, Space
from storage.handle import Handle, open_file
from storage.identity import ANOTHER
from storage.mapping import PAGE
from storage.paged import Paged
from storage.transfer import copy_buffered, copy_by_runs, merged, overlaps, short_io, zero_buffered

__all__ = ["File"]

IN_MEMORY: Final = frozenset({linux.TMPFS, linux.RAMFS})

INLINE: Final = frozenset({linux.EXT4, linux.XFS, linux.BTRFS, linux.F2FS, linux.OVERLAYFS}) | IN_MEMORY
"""File systems where a buffered write of whole pages waits for no one. Anything unknown is taken to wait:
FUSE, NFS, CIFS, 9p ask another process. ZFS is not here, because a write of less than a record reads the
record in first and no call tells whether it is in memory."""

LOCAL: Final = INLINE | {linux.ZFS}
"""File systems where fstat waits for no one."""

COPY_PIECE = 256 << 20
"""Bytes for one copy_file_range: a shared block costs next to nothing, but where the kernel has to copy,
the call cannot be interrupted for as long as it takes."""

_NO_OFFLOAD = frozenset(
    (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ETXTBSY, errno.EBADF)
)
"""What copy_file_range(2) says when it cannot, rather than when the medium fails."""


_CANNOT_SHARE = "the file system cannot share blocks between files (XFS and btrfs can)"
_NO_CLONE = {
    errno.EOPNOTSUPP: _CANNOT_SHARE,
    errno.ENOTTY: _CANNOT_SHARE,
    errno.EINVAL: _CANNOT_SHARE,
    errno.ENOSYS: _CANNOT_SHARE,
    errno.EXDEV: "it is on another file system, and blocks can be shared within one only",
}
"""What FICLONE says (ioctl_ficlonerange(2)) when it cannot, and what that means."""

_NO_SUCH_FILE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENOTCONN, errno.ESTALE))
"""What stat(2) says of a path that leads nowhere, rather than when the file system fails."""


class File(Paged):
    """A regular file, open."""

    def __init__(self, path: str, size_bytes: int = 0, *, read_only: bool = False, grow: bool = True) -> None:
        """Open ``path`` and claim it against other processes.

        Args:
            path: an existing regular file.
            size_bytes: exported size; 0 = the size of the file.
            read_only: open it so; others may read it too.
            grow: make it as large, sparse, where it is shorter; otherwise it has been cut off.

        Raises:
            OSError: it cannot be opened, is in use, or is shorter than ``size_bytes`` and cannot grow.
        """
        super().__init__(path, writable=not read_only)
        self._asked_size = size_bytes
        self._grow = grow
        self._identity = (0, 0)
        self._zero_range = True
        with self._change:
            self._open()

    def _open(self) -> None:
        handle, status = open_file(self.path, writable=self.writable)
        try:
            self._adopt(handle, status)
        except BaseException:
            handle.abandon()
            raise

    def _adopt(self, handle: Handle, status: os.stat_result) -> None:
        size = self._asked_size or status.st_size
        if not size:
            raise OSError(
                errno.EINVAL, "the file is empty; give the extent a size, or the file contents", self.path
            )
        if size > status.st_size:
            if not self.writable:
                raise OSError(errno.EINVAL, f"the file is shorter than {size} bytes and read-only", self.path)
            if not self._grow:
                raise OSError(
                    errno.EIO, f"the file has been cut off at {status.st_size} of {size} bytes", self.path
                )
            os.ftruncate(handle.fd, size)
            os.fsync(handle.fd)  # a power loss after this must not find it shorter
        kind = linux.file_system(handle.fd)
        self._identity = (status.st_dev, status.st_ino)
        self._local = kind in LOCAL
        self._in_memory = kind in IN_MEMORY
        self._inline_medium = kind in INLINE
        self._tells_late = kind == linux.NFS
        granularity = status.st_blksize if kind == linux.ZFS else os.fstatvfs(handle.fd).f_frsize
        self.capabilities = Capabilities(
            writable=self.writable,
            unmap=self.writable and self._can_punch(handle, max(size, status.st_size)),
            unmap_granularity=max(512, granularity),
            unmap_reads_zero=True,
            map_query=self._can_seek_holes(handle),
            copy_offload=self.writable,
        )
        self.geometry = Geometry(size_bytes=size)
        self._attach(handle, size)

    @staticmethod
    def _can_punch(handle: Handle, size: int) -> bool:
        # Past the end, so that nothing is touched. EFBIG: the end is as far as the file system goes.
        try:
            linux.punch_hole(handle.fd, -(-size // PAGE) * PAGE, PAGE)
        except OSError as error:
            return error.errno == errno.EFBIG
        return True

    @staticmethod
    def _can_seek_holes(handle: Handle) -> bool:
        try:
            os.lseek(handle.fd, 0, os.SEEK_HOLE)
        except OSError as error:
            return error.errno == errno.ENXIO  # an empty file
        return True

    def _examine(self, handle: Handle) -> OSError | None:
        try:
            status = os.fstat(handle.fd)
        except OSError as error:
            return error
        if not status.st_nlink:
            return OSError(errno.ENOENT, "the file has been deleted", self.path)
        if status.st_size < self.geometry.size_bytes:
            return OSError(
                errno.EIO,
                f"the file has been cut off at {status.st_size} of {self.geometry.size_bytes} bytes",
                self.path,
            )
        return None

    # -- holes ------------------------------------------------------------------------------------

    def unmap(self, offset: int, length: int) -> None:
        handle = self._usable(write=True)
        if length:
            end = offset + length
            if end % PAGE and end == os.fstat(handle.fd).st_size:
                length += -end % PAGE  # the file's last block is a whole one: free it, do not zero its start
            try:
                linux.punch_hole(handle.fd, offset, length)
            except OSError as error:
                self._failed(error)
                raise
            finally:
                self._mapping.forget(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        handle = self._usable(write=True)
        if not length:
            return
        if self._zero_range:
            try:
                linux.zero_range(handle.fd, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    self._failed(error)
                    raise
                self._zero_range = False
            else:
                return
            finally:
                self._mapping.forget(offset, length)
        zero_buffered(self, offset, length)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        return merged(self._raw_runs(self._usable(), offset, offset + length))

    def _raw_runs(self, handle: Handle, at: int, end: int) -> Iterator[Run]:
        if not self.capabilities.map_query:
            if at < end:
                yield Run(at, end - at, True)
            return
        while at < end:
            try:
                data = min(os.lseek(handle.fd, at, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: no more data
                    raise
                data = end
            if data > at:
                yield Run(at, data - at, False)
            if data == end:
                return
            # May equal ``data`` when it was punched between the two calls; the loop then goes on.
            at = min(os.lseek(handle.fd, data, os.SEEK_HOLE), end)
            if at > data:
                yield Run(data, at - data, True)

    # -- copying ----------------------------------------------------------------------------------

    def copy_from(self, source: Backend, source_offset: int, offset: int, length: int) -> None:
        self._usable(write=True)
        if source is self and overlaps(source_offset, offset, length):
            copy_buffered(self, source, source_offset, offset, length)
        elif isinstance(source, File):
            copy_by_runs(self, source, source_offset, offset, length, File._copy_data)
        else:
            copy_by_runs(self, source, source_offset, offset, length)

    @staticmethod
    def _copy_data(
        destination: Backend, source: Backend, source_offset: int, offset: int, length: int
    ) -> None:
        """``copy_buffered`` by copy_file_range(2), which shares blocks where the file system can."""
        assert isinstance(source, File) and isinstance(destination, File)
        take, give = source._usable(), destination._usable(write=True)
        done = 0
        try:
            while done < length:
                count = os.copy_file_range(
                    take.fd, give.fd, min(COPY_PIECE, length - done), source_offset + done, offset + done
                )
                if not count:
                    raise short_io("the source ends before its size", source.path)
                done += count
        except OSError as error:
            if error.errno not in _NO_OFFLOAD:
                destination._failed(error)
                raise
        finally:
            # Shared blocks take the place of the destination's pages.
            destination._mapping.forget(offset, length)
        if done < length:
            copy_buffered(destination, source, source_offset + done, offset + done, length - done)

    def clone_into(self, path: str) -> None:
        """Make the empty file ``path`` share all blocks of this one; both are independent from then on.

        Raises:
            OSError: EOPNOTSUPP, the file system cannot share blocks between files, or these two are on
                different ones; or what the medium says. ``path`` is as it was.
        """
        handle = self._usable()
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            linux.clone(handle.fd, fd)
            os.fsync(fd)
        except OSError as error:
            if error.errno in _NO_CLONE:
                raise OSError(errno.EOPNOTSUPP, _NO_CLONE[error.errno], path) from None
            self._failed(error)
            raise
        finally:
            os.close(fd)

    # -- size and presence ------------------------------------------------------------------------

    def refresh(self) -> Geometry:
        with self._change:
            self._check_open()
            try:
                status = Path(self.path).stat()
            except OSError as error:
                if error.errno in _NO_SUCH_FILE:
                    self._lose(error)
                else:
                    self._set_fault(error)  # the next look at the file itself may find it well
                raise self._bare(error) from None
            if (status.st_dev, status.st_ino) != self._identity:
                fault = OSError(errno.ESTALE, ANOTHER.format("file"), self.path)
                self._lose(fault)
                raise fault
            if not self._asked_size and status.st_size > self.geometry.size_bytes:
                self._export(status.st_size)
            else:
                self._lost = False
                self._judge()
                self._raise_fault()
            return self.geometry

    def resize(self, size_bytes: int) -> None:
        """Export ``size_bytes`` (0: the size of the file), growing the file, sparse, where it is shorter."""
        with self._change:
            handle = self._usable()
            present = os.fstat(handle.fd).st_size
            if size_bytes > present:
                if not self.writable:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.path)
                os.ftruncate(handle.fd, size_bytes)
                os.fsync(handle.fd)
            self._asked_size = size_bytes
            self._export(size_bytes or present)

    def _export(self, size_bytes: int) -> None:
        self.geometry = Geometry(size_bytes=size_bytes)
        self._attach(self._handle, size_bytes)

    def space(self) -> Space:
        handle = self._usable()
        around = os.fstatvfs(handle.fd)
        return Space(
            used=os.fstat(handle.fd).st_blocks * 512,
            available=around.f_bavail * around.f_frsize,
            total=around.f_blocks * around.f_frsize,
        )
