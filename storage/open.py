"""Extent description → Backend. Also where files may live, and how new ones are made.

The only file that knows all backends. Everything here may wait for a medium: worker threads only.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.allocation import take_space
from storage.base import Backend
from storage.device import Device
from storage.file import File
from storage.memory import Memory, Null
from storage.wrap import Wrapper
from storage.zvol import Zvol

__all__ = [
    "INSIDE_A_ROOT",
    "NOTHING",
    "NOT_A_FILE",
    "ROOT_ITSELF",
    "Created",
    "ExtentKind",
    "ExtentSpec",
    "PathError",
    "allocate_file",
    "clone_file",
    "create_file",
    "open_backend",
    "resolve_path",
]

ExtentKind = Literal["file", "device", "zvol", "memory", "null"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentSpec:
    """What to open. Hashable: equal specs can share a backend."""

    kind: ExtentKind
    path: str = ""
    """File: absolute. Device: the node. ZFS volume: any form of ``zvol.dataset_of``. Others: a name."""
    size_bytes: int = 0
    """What to export; 0 = all there is (not for memory and null, which have nothing of their own)."""
    read_only: bool = False
    create: bool = False
    """File only: make it, sparse, when it is missing and ``size_bytes`` is not 0."""
    grow: bool = True
    """File only: make it as large as ``size_bytes``, sparse; otherwise a shorter one has been cut off."""


# -- opening --------------------------------------------------------------------------------------


def open_backend(spec: ExtentSpec) -> Backend:
    """Open what ``spec`` describes.

    Raises:
        OSError: it is missing, in use, not permitted …; a file made for it has been removed again.
        ValueError: memory or null without a size, or a name that is none of a ZFS volume.
    """
    return _OPENERS[spec.kind](spec)


def _open_file(spec: ExtentSpec) -> Backend:
    created = None
    if spec.create and spec.size_bytes:
        created = create_file(spec.path, spec.size_bytes)
    try:
        backend = File(spec.path, spec.size_bytes, read_only=spec.read_only, grow=spec.grow)
    except BaseException:
        if created is not None:
            created.undo()
        raise
    return backend


def _sized(spec: ExtentSpec) -> int:
    if spec.size_bytes <= 0:
        raise ValueError(f"a {spec.kind} extent needs a size")
    return spec.size_bytes


_OPENERS: dict[ExtentKind, Callable[[ExtentSpec], Backend]] = {
    "file": _open_file,
    "device": lambda spec: Device(spec.path, spec.size_bytes, read_only=spec.read_only),
    "zvol": lambda spec: Zvol(spec.path, spec.size_bytes, read_only=spec.read_only),
    "memory": lambda spec: Memory(_sized(spec), name=spec.path, read_only=spec.read_only),
    "null": lambda spec: Null(_sized(spec), read_only=spec.read_only),
}


# -- creating -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Created:
    """What ``create_file`` has added to the file system."""

    file: Path | None
    """None: the file was there already."""
    identity: tuple[int, int]
    """(st_dev, st_ino) of ``file``."""
    directories: tuple[Path, ...]
    """Outermost first."""

    def undo(self) -> None:
        """Take away what was made, but nothing that another has put there since."""
        if self.file is not None:
            try:
                found = self.file.lstat()
                if (found.st_dev, found.st_ino) == self.identity:
                    self.file.unlink()
            except OSError:
                pass
        for directory in reversed(self.directories):
            try:
                directory.rmdir()
            except OSError:
                return  # someone uses it


NOTHING = Created(None, (0, 0), ())


def create_file(path: str | Path, size_bytes: int) -> Created:
    """Make a sparse file of ``size_bytes`` and the directories that lead to it, durably.

    An existing file is left as it is, whatever its size: growing it is ``File``'s affair, and nothing
    ever shortens it.

    Raises:
        OSError: it cannot be made; what had been made is gone again.
    """
    path = Path(path)
    directories: list[Path] = []
    made: Path | None = None
    identity = (0, 0)
    try:
        missing = []
        for parent in path.parents:
            if parent.exists():
                break
            missing.append(parent)
        for parent in reversed(missing):
            try:
                parent.mkdir(mode=0o755)
            except FileExistsError:
                continue  # another extent's creation was faster
            directories.append(parent)
        try:
            # 0600: the disks of others are nobody's business.
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
        else:
            made = path
            try:
                status = os.fstat(fd)
                identity = (status.st_dev, status.st_ino)
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
        for changed in ([path.parent] if made else []) + [directory.parent for directory in directories]:
            _sync_directory(changed)
    except BaseException:
        Created(made, identity, tuple(directories)).undo()
        raise
    return Created(made, identity, tuple(directories))


def allocate_file(
    spec: ExtentSpec, told: Callable[[int], None], stopped: Callable[[], bool] = lambda: False
) -> Created:
    """Take all the space of a file extent, which is made first where it is missing. Sessions may be using it.

    Args:
        told, stopped: as ``allocation.take_space`` takes them.

    Returns:
        What was made for it, to be undone if the extent does not come to be after all.

    Raises:
        OSError: as for ``create_file`` and ``take_space``; what had been made is gone again.
    """
    created = create_file(spec.path, spec.size_bytes) if spec.create and spec.size_bytes else NOTHING
    try:
        fd = os.open(spec.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", spec.path)
            reachable = 0 if created.file is not None else status.st_size
            take_space(fd, spec.size_bytes or status.st_size, reachable, told, stopped)
        finally:
            os.close(fd)
    except BaseException:
        created.undo()
        raise
    return created


def clone_file(source: Backend, path: str) -> Created:
    """Make a new file that shares the blocks of a file's backend, durably.

    Raises:
        OSError: EOPNOTSUPP, the source is no file or the file system cannot do it; EEXIST; or as for
            ``create_file``. What had been made is gone again.
    """
    while isinstance(source, Wrapper):
        source = source.inner
    if not isinstance(source, File):
        raise OSError(errno.EOPNOTSUPP, "only a file can be cloned", path)
    created = create_file(path, 0)
    try:
        if created.file is None:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        source.clone_into(path)
    except BaseException:
        created.undo()
        raise
    return created


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable (fsync(2): syncing a file does not promise its name)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # not every file system syncs directories
            raise
    finally:
        os.close(fd)


# -- where files may live -------------------------------------------------------------------------

INSIDE_A_ROOT = "Your path to the extent must reside inside a volume/dataset mount point."
NOT_A_FILE = "You need to specify a filepath, not a directory."
ROOT_ITSELF = "You need to specify a file inside your volume/dataset."


class PathError(ValueError):
    """A path that no file extent may have; the text is for the person who gave it."""


def resolve_path(path: str, roots: Sequence[str | Path]) -> Path:
    """The real path of a file extent, with all symbolic links followed; the file need not exist.

    Source: api-semantics §6.1; the texts are FreeNAS's own, as clients match on them.

    Raises:
        PathError: not absolute, not strictly inside one of ``roots``, or not a regular file.
    """
    if not path.startswith("/") or "\0" in path:
        raise PathError(INSIDE_A_ROOT)
    # realpath: Path.resolve takes a loop of links otherwise since Python 3.13. It is left as it is here.
    real = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(root)) for root in roots]
    if real in allowed:
        raise PathError(ROOT_ITSELF)
    if not any(real.is_relative_to(root) for root in allowed):
        raise PathError(INSIDE_A_ROOT)
    if path.endswith(("/", "/.", "/..")):
        raise PathError(NOT_A_FILE)
    try:
        if not stat.S_ISREG(real.stat().st_mode):
            raise PathError(NOT_A_FILE)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise PathError(f"A part of the path is a file, not a directory: {path}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead round, and so into no root
            raise PathError(INSIDE_A_ROOT) from None
        raise PathError(f"The path cannot be used: {error.strerror}.") from None
    return real
