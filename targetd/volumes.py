"""Pools and volumes beside the extents: configured directories, and ZFS where it is installed.

A directory pool is a directory. Its volumes are sparse files in ``VOLUMES`` below it, so that nothing else
that lives in the directory can be taken for one; its datasets are its other directories. The path
``/dev/zvol/POOL/NAME`` of an extent then means that file (``volume_file``). A configured pool hides a ZFS
pool of its name.

Everything here may wait for a disk or a command: the public methods go to a worker, one change at a time.
"""

import asyncio
import errno
import glob
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from storage.open import create_file
from storage.zfs_command import find_command, run_command
from targetd.interface import Dataset, StorageError, Volume
from targetd.system.threads import run_in_thread

__all__ = ["DEVICES", "MAX_NAME", "VOLUMES", "VOLUME_BLOCK", "Pools", "check_name", "run_zfs", "volume_file"]

DEVICES = "/dev/zvol/"
VOLUMES = "zvols"
"""Directory of a directory pool that holds its volumes."""
SNAPSHOTS = ".snapshots"
"""The same for snapshots. No dataset can have this name: names begin with a letter or digit."""
VOLUME_BLOCK = 8192
"""Sizes are rounded up to it; ZFS' own default volblocksize, bytes."""
COMMAND_S = 60.0

_T = TypeVar("_T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*(?:/[A-Za-z0-9][A-Za-z0-9_.:-]*)*")
MAX_NAME = 255
"""Of a dataset with its pool, as ZFS has it."""


def check_name(name: str) -> None:
    """Names are those that ZFS allows, and never lead out of a directory.

    Raises:
        StorageError: this is none.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME - 64:
        raise StorageError(f"invalid name {name[:MAX_NAME]!r}: letters, digits and _ . : - between slashes")


def volume_file(path: str, pools: Mapping[str, Path]) -> Path | None:
    """The file behind ``/dev/zvol/POOL/NAME``; None: it is no volume of a directory pool."""
    if not path.startswith(DEVICES):
        return None
    pool, _, name = path.removeprefix(DEVICES).partition("/")
    if pool not in pools or not _NAME.fullmatch(name):
        return None
    return pools[pool] / VOLUMES / name


class _Pool(Protocol):
    """One pool; worker threads only."""

    name: str

    def dataset(self, name: str) -> Dataset | None:
        """``POOL`` or ``POOL/…``; None: there is none."""

    def children(self) -> list[Dataset]:
        """The datasets right below the pool's own."""

    def volumes(self) -> list[Volume]:
        """All volumes, by name."""

    def volume(self, name: str) -> Volume | None:
        """One of them; None: there is none."""

    def create(self, name: str, size_bytes: int, sparse: bool) -> None:
        """Make a volume; its name is not taken."""

    def resize(self, name: str, size_bytes: int) -> None:
        """Set the size of a volume that is there."""

    def delete(self, name: str, recursive: bool) -> None:
        """Destroy a volume that is there."""


class DirectoryPool:
    """A directory and the sparse files in it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._volumes = directory / VOLUMES

    def dataset(self, name: str) -> Dataset | None:
        inside = name.partition("/")[2]
        path = self._directory / inside
        if not path.is_dir() or (inside and path.resolve() != self._directory.resolve() / inside):
            return None
        if path == self._volumes or self._volumes in path.parents:
            return None
        space = os.statvfs(path)
        return Dataset(
            name=name,
            pool=self.name,
            available=space.f_bavail * space.f_frsize,
            used=(space.f_blocks - space.f_bfree) * space.f_frsize,
            mountpoint=str(path),
            status="HEALTHY",
        )

    def children(self) -> list[Dataset]:
        names = (entry.name for entry in os.scandir(self._directory) if entry.is_dir(follow_symlinks=False))
        found = (self.dataset(f"{self.name}/{name}") for name in sorted(names) if _NAME.fullmatch(name))
        return [dataset for dataset in found if dataset is not None]

    def volumes(self) -> list[Volume]:
        names = sorted(
            str((Path(directory) / file).relative_to(self._volumes))
            for directory, _, files in os.walk(self._volumes)
            for file in files
        )
        return [volume for volume in map(self.volume, names) if volume is not None]

    def volume(self, name: str) -> Volume | None:
        path = self._volumes / name
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        space = os.statvfs(path)
        return Volume(name, status.st_size, status.st_blocks * 512, space.f_bavail * space.f_frsize)

    def create(self, name: str, size_bytes: int, sparse: bool) -> None:
        # Space that is promised must be there at least now; a file holds none of it back.
        space = os.statvfs(self._directory)
        if not sparse and size_bytes > space.f_bavail * space.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        create_file(self._volumes / name, size_bytes)

    def resize(self, name: str, size_bytes: int) -> None:
        descriptor = os.open(self._volumes / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def delete(self, name: str, recursive: bool) -> None:
        path = self._volumes / name
        taken = sorted((self._directory / SNAPSHOTS / name).parent.glob(f"{glob.escape(path.name)}@*"))
        if taken and not recursive:
            raise StorageError(f"cannot destroy '{self.name}/{name}': volume has snapshots: {taken[0].name}")
        for snapshot in taken:
            snapshot.unlink()
        path.unlink()
        for parent in path.parents:
            if parent == self._volumes:
                break
            try:
                parent.rmdir()
            except OSError:
                break  # others are in it


class ZfsPool:
    """A pool of ZFS, through its commands."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _datasets(self, name: str, depth: int) -> Iterator[Dataset]:
        listed = run_zfs("zfs", "list", "-Hp", "-t", "filesystem", "-d", str(depth), "-o",
                      "name,available,used,mountpoint", name)  # fmt: skip
        health = run_zfs("zpool", "list", "-H", "-o", "health", self.name)[0][0]
        for row in listed:
            yield Dataset(
                name=row[0],
                pool=self.name,
                available=int(row[1]),
                used=int(row[2]),
                mountpoint=row[3],
                status="HEALTHY" if health == "ONLINE" else health,
            )

    def dataset(self, name: str) -> Dataset | None:
        try:
            return next(self._datasets(name, 0), None)
        except _NotThereError:
            return None

    def children(self) -> list[Dataset]:
        return [dataset for dataset in self._datasets(self.name, 1) if dataset.name != self.name]

    def _list(self, *what: str) -> list[Volume]:
        rows = run_zfs("zfs", "list", "-Hp", "-t", "volume", "-o", "name,volsize,used,available", *what)
        return [Volume(row[0].partition("/")[2], int(row[1]), int(row[2]), int(row[3])) for row in rows]

    def volumes(self) -> list[Volume]:
        return self._list("-r", self.name)

    def volume(self, name: str) -> Volume | None:
        try:
            return next(iter(self._list(f"{self.name}/{name}")), None)
        except _NotThereError:
            return None

    def create(self, name: str, size_bytes: int, sparse: bool) -> None:
        flags = ("-s",) if sparse else ()
        run_zfs("zfs", "create", *flags, "-V", str(size_bytes), f"{self.name}/{name}")

    def resize(self, name: str, size_bytes: int) -> None:
        run_zfs("zfs", "set", f"volsize={size_bytes}", f"{self.name}/{name}")

    def delete(self, name: str, recursive: bool) -> None:
        run_zfs("zfs", "destroy", *(("-r",) if recursive else ()), f"{self.name}/{name}")


class _NotThereError(StorageError):
    """ZFS knows no such dataset."""


def run_zfs(*command: str, limit_s: float | None = COMMAND_S) -> list[list[str]]:
    """The rows that a ZFS command prints.

    Args:
        limit_s: how long it may take; None: as long as it takes.

    Raises:
        StorageError: it failed; the text is its own.
    """
    try:
        done = run_command(command, limit_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageError(f"{command[0]}: {error}") from None
    if done.returncode:
        text = done.stderr.strip() or f"{command[0]} failed with {done.returncode}"
        raise _NotThereError(text) if "does not exist" in text else StorageError(text)
    return [line.split("\t") for line in done.stdout.splitlines()]


class Pools:
    """All pools; implements ``targetd.interface.Storage``."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self.directories = dict(directories)
        self._directories = {name: DirectoryPool(name, path) for name, path in directories.items()}
        self.turn = asyncio.Lock()
        """Held while anything is made, changed or destroyed."""

    def _all(self) -> Sequence[_Pool]:
        pools: dict[str, _Pool] = {}
        if find_command("zpool"):
            pools = {name: ZfsPool(name) for (name,) in run_zfs("zpool", "list", "-H", "-o", "name")}
        return [*{**pools, **self._directories}.values()]

    def _find(self, name: str) -> _Pool:
        for pool in (*self._directories.values(), *self._all()):
            if pool.name == name:
                return pool
        raise KeyError(name)

    async def pools(self) -> list[tuple[Dataset, list[Dataset]]]:
        def work() -> list[tuple[Dataset, list[Dataset]]]:
            found = ((pool.dataset(pool.name), pool) for pool in self._all())
            return [(dataset, pool.children()) for dataset, pool in found if dataset is not None]

        return await _worker(work)

    async def dataset(self, path: str) -> Dataset | None:
        def work() -> Dataset | None:
            try:
                check_name(path)
                return self._find(path.partition("/")[0]).dataset(path)
            except (KeyError, StorageError):
                return None

        return await _worker(work)

    async def volumes(self, pool: str) -> list[Volume]:
        return await _worker(lambda: self._find(pool).volumes())

    async def volume(self, pool: str, name: str) -> Volume | None:
        def work() -> Volume | None:
            found = self._find(pool)
            return found.volume(name) if _NAME.fullmatch(name) else None

        return await _worker(work)

    async def create(self, pool: str, name: str, size_bytes: int, sparse: bool) -> Volume:
        def work() -> Volume:
            found = self._find(pool)
            check_name(name)
            if found.volume(name) is not None or found.dataset(f"{pool}/{name}") is not None:
                raise StorageError(f"cannot create '{pool}/{name}': dataset already exists")
            found.create(name, _rounded(size_bytes), sparse)
            made = found.volume(name)
            assert made is not None
            return made

        async with self.turn:
            return await _worker(work)

    async def resize(self, pool: str, name: str, size_bytes: int) -> Volume | None:
        def work() -> Volume | None:
            found = self._find(pool)
            if not _NAME.fullmatch(name) or found.volume(name) is None:
                return None
            found.resize(name, _rounded(size_bytes))
            return found.volume(name)

        async with self.turn:
            return await _worker(work)

    async def delete(self, pool: str, name: str, recursive: bool = False) -> bool:
        def work() -> bool:
            found = self._find(pool)
            if not _NAME.fullmatch(name) or found.volume(name) is None:
                return False
            found.delete(name, recursive)
            return True

        async with self.turn:
            return await _worker(work)


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // VOLUME_BLOCK) * VOLUME_BLOCK


async def _worker(work: Callable[[], _T]) -> _T:
    try:
        return await run_in_thread(work)
    except OSError as error:
        raise StorageError(error.strerror or str(error)) from error
