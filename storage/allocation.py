"""Taking all the space of a file now, so that no later write can run out of it.

Three rules:

* **Nobody else goes short.** Free space is asked for before the first byte is taken and again before every
  piece, what other allocations have still to take counts as gone, and some room is left.
* **Nothing that is written meanwhile is lost.** Space is taken by fallocate(2) alone. glibc's
  ``posix_fallocate`` would, where the file system has no such call, read a byte of each block and write it
  back: a block that a session writes between the two is damaged.
* Where there is no fallocate(2) (NFS before 4.2, many FUSE file systems, ext2), zeros are written, but only
  to what no session can reach: a file that was made just now, or what lies beyond the end that it had.
  Holes below that end are left alone, and the request is refused in words.

Worker threads only.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage import linux
from storage.transfer import PIECE, ZEROS

__all__ = ["ALLOCATE_PIECE", "take_space"]

ALLOCATE_PIECE = 256 << 20
"""Bytes taken at once. One call for them costs microseconds where the file system only notes them down."""

ROOM_LEAST, ROOM_MOST = 64 << 20, 1 << 30
"""Bytes left free: a hundredth of the file system within these, but never more than a tenth of it."""

_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS))

_NO_FALLOCATE = (
    "the file system cannot take the space of a file that is there already (it has no fallocate(2)); "
    "make the extent with a new file, and copy into it"
)
_STOPPED = "its space is not wanted any more"


class _Taking:
    """One allocation under way."""

    def __init__(self, status: os.stat_result, missing: int) -> None:
        self.device = status.st_dev
        self.inode = status.st_ino
        self.missing = missing
        """Bytes that it has still to take."""


_under_way: set[_Taking] = set()
_lock = threading.Lock()


@contextmanager
def _registered(status: os.stat_result, missing: int) -> Iterator[_Taking]:
    taking = _Taking(status, missing)
    with _lock:
        if any((other.device, other.inode) == (taking.device, taking.inode) for other in _under_way):
            raise OSError(errno.EBUSY, "its space is being taken already")
        _under_way.add(taking)
    try:
        yield taking
    finally:
        with _lock:
            _under_way.discard(taking)


def take_space(
    fd: int,
    size_bytes: int,
    reachable: int,
    told: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Allocate a file up to ``size_bytes``; what it has already is left as it is.

    Args:
        fd: open for writing.
        reachable: a session may be writing to the bytes below this; nobody can to those from it on.
        told: hears how many bytes are taken, again and again.
        stopped: asked between two pieces; True gives up.

    Raises:
        OSError: ENOSPC, there is not enough, with the figures in words; EOPNOTSUPP, the file system cannot do
            it without harm; EBUSY, another is at it; ECANCELED, ``stopped``; or what the file system says.
            What was taken stays taken.
    """
    status = os.fstat(fd)
    missing = max(0, size_bytes - status.st_blocks * 512)
    with _registered(status, missing) as taking:
        _check_room(fd, taking)
        told(size_bytes - missing)
        for at in range(0, size_bytes, ALLOCATE_PIECE):
            if stopped():
                raise OSError(errno.ECANCELED, _STOPPED)
            end = min(at + ALLOCATE_PIECE, size_bytes)
            try:
                _fallocate(fd, at, end - at)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                _write_zeroes(fd, size_bytes, reachable, taking, told, stopped)
                return
            taking.missing = max(0, size_bytes - os.fstat(fd).st_blocks * 512)
            told(end)
            if taking.missing:
                _check_room(fd, taking)


def _fallocate(fd: int, offset: int, length: int) -> None:
    """Without moving the end of the file, if that can be had (NFS 4.2 has only the call that moves it)."""
    try:
        linux.fallocate(fd, linux.FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        linux.fallocate(fd, 0, offset, length)


def _write_zeroes(
    fd: int,
    size_bytes: int,
    reachable: int,
    taking: _Taking,
    told: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    """Zeros from ``reachable`` on; all below must be there already."""
    reachable = min(reachable, size_bytes)
    status = os.fstat(fd)
    if status.st_blocks * 512 < reachable:
        raise OSError(errno.EOPNOTSUPP, _NO_FALLOCATE)
    if status.st_blocks * 512 >= size_bytes <= status.st_size:
        told(size_bytes)
        return
    next_check = reachable
    for at in range(reachable, size_bytes, PIECE):
        if stopped():
            raise OSError(errno.ECANCELED, _STOPPED)
        taking.missing = size_bytes - at
        if at >= next_check:
            os.fdatasync(fd)  # a file system behind a network may say only now that it is full
            _check_room(fd, taking)
            next_check = at + ALLOCATE_PIECE
        with memoryview(ZEROS) as zeros:
            done, length = 0, min(PIECE, size_bytes - at)
            while done < length:
                done += os.pwrite(fd, zeros[done:length], at + done)
        told(at + length)
    taking.missing = 0
    os.fdatasync(fd)


def _check_room(fd: int, taking: _Taking) -> None:
    """ENOSPC unless the file system has what is missing, here and in other allocations, and some to spare."""
    around = os.fstatvfs(fd)
    total, available = around.f_blocks * around.f_frsize, around.f_bavail * around.f_frsize
    if not total or not taking.missing:
        return  # not known, as of some FUSE file systems; or there is nothing to take
    room = min(max(total // 100, ROOM_LEAST), ROOM_MOST, total // 10)
    with _lock:
        others = sum(
            other.missing for other in _under_way if other is not taking and other.device == taking.device
        )
    if taking.missing + others + room > available:
        promised = f", {others} of them promised to other extents" if others else ""
        raise OSError(
            errno.ENOSPC,
            f"its space cannot be taken: {taking.missing} bytes are missing, the file system has {available} "
            f"bytes free{promised}, and {room} are left for others",
        )
