"""Open descriptors: who may still be using one, and who else may have the medium open.

**Lifetime.** A worker may sit in ``pread`` on a descriptor for as long as a disk takes. Were the number
closed meanwhile, the kernel would give it to the next ``open`` or ``accept``, and a late ``pwrite`` would
write a guest's data into a socket or another guest's file. So a ``Handle`` has no close method: whoever
uses it holds a reference in a local variable for as long as the call takes, and the descriptor closes
when the last reference goes. CPython's reference counts are the use count; it costs the hot path nothing.

**Claims.** Two daemons that write one medium destroy it. A file is claimed with ``flock`` (exclusive to
write, shared to read), a block device by opening it with ``O_EXCL``, which the kernel also uses for
mounts, swap, RAID and LVM. Both bind the open descriptor rather than the process, but this process may
rightly have a medium open twice for a moment, as when a changed extent is prepared before the old one is
closed. So the first handle on a medium holds the claim, and later ones hold that first handle.
Whether two *extents* may share a medium is for the configuration to judge, not for us.
"""

import errno
import fcntl
import logging
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

__all__ = ["CLAIM_PATIENCE_S", "CLOSED", "Handle", "open_device", "open_file"]

CLAIM_PATIENCE_S = 0.5
"""How long to wait for a claim. A predecessor that is just exiting, or a reply still leaving from a
mapping, lets go within milliseconds; anything longer is a real second user."""

_PAUSE_S = 0.02

_log = logging.getLogger(__name__)


_Key = tuple[str, int, int]
"""Kind, device, inode or 0."""


class Handle:
    """A descriptor that closes itself when its last user lets go of it."""

    __slots__ = ("__weakref__", "_claim", "_exclusive", "_key", "_relied_on", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._claim: Handle | None = None
        """The handle that holds the claim, when it is not this one."""
        self._exclusive = False
        self._key: _Key | None = None
        """Under which it is in ``_claims``, when it holds the claim."""
        self._relied_on = False
        """Another handle has relied on that."""

    def __del__(
        self,
        # Bound now: at exit the modules go first.
        _flock: Callable[[int, int], None] = fcntl.flock,
        _unlock: int = fcntl.LOCK_UN,
        _close: Callable[[int], None] = os.close,
    ) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                # Explicitly: a mapping has a duplicate of the descriptor, and a view of it that is
                # still leaving through a socket would keep the lock.
                _flock(fd, _unlock)
            except OSError:
                pass
            _close(fd)

    def abandon(self) -> None:
        """Close at once, for an opening that failed: the traceback of the failure has this handle in its
        frames, and would keep the medium claimed for as long as anyone looks at it."""
        with _claims_lock:
            if not self._relied_on:
                if self._key is not None:
                    del _claims[self._key]
                self.__del__()

    def lock(self, exclusive: bool) -> None:
        """flock, waiting ``CLAIM_PATIENCE_S`` at most; an exclusive lock is never weakened.

        Raises:
            OSError: EBUSY, another process has it.
        """
        if self._exclusive:
            return
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = time.monotonic() + CLAIM_PATIENCE_S
        while True:
            try:
                fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    if self._key is not None:
                        self._lock_again()  # a failed change of a lock gives the old one up (flock(2))
                    raise OSError(errno.EBUSY, "another process has the file open as an extent") from None
                time.sleep(_PAUSE_S)
            except OSError as error:
                # Some network file systems have no locks (ENOLCK, EOPNOTSUPP). No lock is no reason to
                # refuse the only storage there is; the operator is told.
                _log.warning("extent not locked against other processes: %s", error)
                return
            else:
                self._exclusive = exclusive
                return

    def _lock_again(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            pass


CLOSED = Handle(-1)
"""What a closed backend has; every call on it fails with EBADF."""

_claims: weakref.WeakValueDictionary[_Key, Handle] = weakref.WeakValueDictionary()
"""Medium → the handle that holds the claim on it."""
_claims_lock = threading.Lock()


def _claimed(handle: Handle, key: _Key) -> None:
    handle._key = key
    _claims[key] = handle


def _rely(handle: Handle, holder: Handle) -> None:
    handle._claim = holder
    holder._relied_on = True


def open_file(path: str, *, writable: bool) -> tuple[Handle, os.stat_result]:
    """Open a regular file and claim it.

    Raises:
        OSError: EISDIR or EINVAL, it is something else; EBUSY, another process has claimed it; or
            what open(2) says.
    """
    # O_NONBLOCK: a FIFO in the place of the file must not hold the worker for ever.
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    handle = Handle(fd)
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    try:
        with _claims_lock:
            key: _Key = ("file", status.st_dev, status.st_ino)
            holder = _claims.get(key)
            (holder or handle).lock(exclusive=writable)
            if holder is None:
                _claimed(handle, key)
            else:
                _rely(handle, holder)
    except OSError as error:
        handle.abandon()
        raise OSError(error.errno, error.strerror, path) from None
    return handle, status


def open_device(path: str, *, writable: bool) -> tuple[Handle, os.stat_result]:
    """Open a block device and claim it against mounts and other daemons.

    Raises:
        OSError: ENOTBLK, it is no block device; EBUSY, in use, with where; or what open(2) says.
    """
    status = Path(path).stat()
    if not stat.S_ISBLK(status.st_mode):
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), path)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    with _claims_lock:
        key: _Key = ("device", status.st_rdev, 0)
        holder = _claims.get(key)
        if holder is not None:
            handle = Handle(os.open(path, flags))
            _rely(handle, holder)
            return handle, status
        deadline = time.monotonic() + CLAIM_PATIENCE_S
        while True:
            try:
                handle = Handle(os.open(path, flags | os.O_EXCL))
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() >= deadline:
                    raise OSError(errno.EBUSY, _user_of(status.st_rdev), path) from None
                time.sleep(_PAUSE_S)
        _claimed(handle, key)
        return handle, status


def _user_of(device: int) -> str:
    """Who has a device that will not be claimed, in words."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields = line.split()
            if fields[2] == number:
                return f"the device is mounted on {fields[4]}"
        holders = [entry.name for entry in Path(f"/sys/dev/block/{number}/holders").iterdir()]
    except OSError:
        holders = []
    if holders:
        return f"the device is part of {', '.join(sorted(holders))}"
    return "the device is in use: a partition of it mounted, swap, or another process has claimed it"
