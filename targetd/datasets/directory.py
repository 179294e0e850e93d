"""Datasets of a directory pool: volumes are sparse files, file systems are directories.

Below the pool's directory ``D``::

    D/vms                    file system POOL/vms
    D/zvols/vms/disk1        volume POOL/vms/disk1
    D/.snapshots/vms/disk1@a snapshot POOL/vms/disk1@a: a whole file, which shares its blocks where it can

The files say what is there and how large it is; what files cannot say (block size, origin, user properties)
is a record in the configuration store, which ``Attributes`` holds. A record without its file means nothing.

Worker threads only: everything here may wait for a disk.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from storage import linux
from storage.open import create_file
from targetd.interface import DatasetError, DatasetRequest, DatasetStatus, SnapshotStatus
from targetd.volumes import SNAPSHOTS, VOLUME_BLOCK, VOLUMES

__all__ = ["Attributes", "DirectoryDatasets"]

COPIES = ".copies"
"""Where copies grow until they are whole."""
COPY_PIECE = 8 << 20
"""Bytes copied between two calls of ``progress``."""
NO_REFLINK = frozenset((errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS))
"""What FICLONE says where files cannot share blocks (ioctl_ficlonerange(2))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What is known of a dataset or snapshot beside its files."""

    block_size: int = VOLUME_BLOCK
    sparse: bool = True
    origin: str = ""
    comments: str = ""
    created: float = 0.0
    properties: Mapping[str, str] = field(default_factory=dict)


Known = Callable[[str], Attributes]
"""Attributes by whole name; those of nothing in particular where there is no record."""


class DirectoryDatasets:
    """One directory pool. Names are whole and have been checked."""

    def __init__(self, pool: str, directory: Path, known: Known) -> None:
        self.pool = pool
        self._directory = directory
        self._known = known

    # -- where things are -------------------------------------------------------------------------

    def _inside(self, name: str) -> str:
        return name.partition("/")[2]

    def _folder(self, name: str) -> Path:
        return self._directory / self._inside(name)

    def _file(self, name: str) -> Path:
        return self._directory / VOLUMES / self._inside(name)

    def _snapshot_file(self, full_name: str) -> Path:
        return self._directory / SNAPSHOTS / self._inside(full_name)

    # -- reading ----------------------------------------------------------------------------------

    def datasets(self) -> list[DatasetStatus]:
        """All of them, by name."""
        space = os.statvfs(self._directory)
        free = space.f_bavail * space.f_frsize
        volumes = [self._volume(name, status, free) for name, status in self._volume_files()]
        snapshots = {name: status.st_blocks * 512 for name, status in self._snapshot_files()}
        folders = [self._filesystem(name, free, volumes, snapshots) for name in self._folders()]
        total = (space.f_blocks - space.f_bfree) * space.f_frsize
        top = DatasetStatus(
            name=self.pool,
            kind="FILESYSTEM",
            available=free,
            used=total,
            mountpoint=str(self._directory),
            comments=self._known(self.pool).comments,
            properties=self._known(self.pool).properties,
        )
        return sorted([top, *folders, *volumes], key=lambda dataset: dataset.name)

    def dataset(self, name: str) -> DatasetStatus | None:
        """One of them."""
        if name != self.pool:
            try:
                status = self._file(name).lstat()
            except (FileNotFoundError, NotADirectoryError):
                pass
            else:
                if stat.S_ISREG(status.st_mode):
                    space = os.statvfs(self._directory)
                    return self._volume(name, status, space.f_bavail * space.f_frsize)
            if not self._is_filesystem(name):
                return None
        return next((found for found in self.datasets() if found.name == name), None)

    def _is_filesystem(self, name: str) -> bool:
        folder = self._folder(name)
        return (
            folder.is_dir()
            and not folder.is_symlink()
            and folder.relative_to(self._directory).parts[:1] != (VOLUMES,)
        )

    def _volume_files(self) -> Iterator[tuple[str, os.stat_result]]:
        yield from self._files(self._directory / VOLUMES)

    def _snapshot_files(self) -> Iterator[tuple[str, os.stat_result]]:
        yield from self._files(self._directory / SNAPSHOTS)

    def _files(self, top: Path) -> Iterator[tuple[str, os.stat_result]]:
        """(whole name, status) of each regular file below a directory."""
        for directory, _, files in os.walk(top):
            prefix = os.path.relpath(directory, top)
            for file in files:
                status = os.lstat(f"{directory}/{file}")
                if stat.S_ISREG(status.st_mode):
                    yield f"{self.pool}/{file if prefix == '.' else f'{prefix}/{file}'}", status

    def _folders(self) -> Iterator[str]:
        for directory, names, _ in os.walk(self._directory):
            if directory == str(self._directory):
                names[:] = [name for name in names if name != VOLUMES]
            names[:] = [name for name in names if not name.startswith(".") and name != "lost+found"]
            for name in names:
                yield f"{self.pool}/{(Path(directory) / name).relative_to(self._directory)}"

    def _volume(self, name: str, status: os.stat_result, free: int) -> DatasetStatus:
        known = self._known(name)
        return DatasetStatus(
            name=name,
            kind="VOLUME",
            available=free,
            used=status.st_blocks * 512,
            size_bytes=status.st_size,
            block_size=known.block_size,
            sparse=known.sparse,
            origin=known.origin,
            comments=known.comments,
            properties=known.properties,
        )

    def _filesystem(
        self, name: str, free: int, volumes: list[DatasetStatus], snapshots: Mapping[str, int]
    ) -> DatasetStatus:
        below = f"{name}/"
        used = sum(volume.used for volume in volumes if volume.name.startswith(below))
        used += sum(blocks for snapshot, blocks in snapshots.items() if snapshot.startswith(below))
        folder = self._folder(name)
        for directory, _, files in os.walk(folder):
            used += sum(os.lstat(f"{directory}/{file}").st_blocks * 512 for file in files)
        known = self._known(name)
        return DatasetStatus(
            name=name,
            kind="FILESYSTEM",
            available=free,
            used=used,
            mountpoint=str(folder),
            comments=known.comments,
            properties=known.properties,
        )

    # -- datasets ---------------------------------------------------------------------------------

    def create(self, request: DatasetRequest) -> None:
        """Make it; its name is free."""
        parent = request.name.rpartition("/")[0]
        if not self._is_filesystem(parent) and parent != self.pool:
            if self.dataset(parent) is not None:
                raise DatasetError(
                    errno.EINVAL, f"cannot create '{request.name}': parent is not a filesystem"
                )
            if not request.ancestors:
                raise DatasetError(errno.ENOENT, f"cannot create '{request.name}': parent does not exist")
            self._folder(parent).mkdir(parents=True)
        if request.kind == "FILESYSTEM":
            self._folder(request.name).mkdir()
            return
        space = os.statvfs(self._directory)
        if not request.sparse and request.size_bytes > space.f_bavail * space.f_frsize:
            raise DatasetError(errno.ENOSPC, f"cannot create '{request.name}': out of space")
        created = create_file(self._file(request.name), request.size_bytes)
        if not request.sparse:
            try:
                self._reserve(request.name, request.size_bytes)
            except BaseException:
                created.undo()
                raise

    def _reserve(self, name: str, size_bytes: int) -> None:
        fd = os.open(self._file(name), os.O_RDWR | os.O_CLOEXEC)
        try:
            linux.fallocate(fd, 0, 0, size_bytes)
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            text = f"cannot create '{name}': this file system cannot reserve space; make it sparse"
            raise DatasetError(errno.ENOTSUP, text) from None
        finally:
            os.close(fd)

    def resize(self, name: str, size_bytes: int) -> None:
        fd = os.open(self._file(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)

    def destroy(self, name: str, recursive: bool) -> None:
        """Destroy a dataset that is there."""
        if name == self.pool:
            raise DatasetError(errno.EINVAL, f"cannot destroy '{name}': it is the pool itself")
        below = [found.name for found in self.datasets() if found.name.startswith(f"{name}/")] + [
            snapshot.full_name for snapshot in self.snapshots() if snapshot.dataset == name
        ]
        if below and not recursive:
            kind = "snapshots" if "@" in below[-1] else "children"
            raise DatasetError(
                errno.EBUSY, f"cannot destroy '{name}': it has {kind}: {', '.join(below[:5])}; use recursive"
            )
        if not self._is_filesystem(name):
            self._file(name).unlink()
            self._prune(self._file(name), VOLUMES)
            for snapshot in self.snapshots():
                if snapshot.dataset == name:
                    self.destroy_snapshot(snapshot.full_name)
            return
        folder = self._folder(name)
        if not recursive and any(folder.iterdir()):
            raise DatasetError(errno.EBUSY, f"cannot destroy '{name}': it is not empty; use recursive")
        for path in (folder, self._file(name), self._snapshot_file(name)):
            if path.is_dir():
                shutil.rmtree(path)

    def _prune(self, path: Path, top: str) -> None:
        """Remove the empty directories that led to a file."""
        for parent in path.parents:
            if parent == self._directory / top:
                return
            try:
                parent.rmdir()
            except OSError:
                return

    def rename(self, name: str, new_name: str) -> None:
        """Move files, snapshots and all below; the new name is free."""
        for old, new in (
            (self._folder(name), self._folder(new_name)),
            (self._file(name), self._file(new_name)),
            (self._snapshot_file(name), self._snapshot_file(new_name)),
        ):
            if old.exists() and old != self._directory:
                new.parent.mkdir(parents=True, exist_ok=True)
                old.rename(new)
        for snapshot in self.snapshots():
            if snapshot.dataset == name:
                self.rename_snapshot(snapshot.full_name, f"{new_name}@{snapshot.name}")
        self._prune(self._file(name), VOLUMES)

    # -- snapshots --------------------------------------------------------------------------------

    def snapshots(self) -> list[SnapshotStatus]:
        """All of them, by name."""
        found = []
        for full_name, status in self._snapshot_files():
            dataset, _, name = full_name.partition("@")
            known = self._known(full_name)
            found.append(
                SnapshotStatus(
                    dataset=dataset,
                    name=name,
                    created=known.created or status.st_mtime,
                    used=status.st_blocks * 512,
                    referenced=status.st_blocks * 512,
                    size_bytes=status.st_size,
                    properties=known.properties,
                )
            )
        return sorted(found, key=lambda snapshot: snapshot.full_name)

    def snapshot(self, dataset: str, name: str, in_use: bool) -> None:
        """Take a snapshot of a volume.

        A clone by the file system (FICLONE) holds the file still for as long as it takes: the snapshot is
        what a power cut at that moment would have left, consistent after a crash, with sessions open.
        """
        if self._is_filesystem(dataset) or dataset == self.pool:
            raise DatasetError(
                errno.ENOTSUP,
                f"cannot snapshot '{dataset}': a directory pool takes snapshots of volumes only",
            )
        self._duplicate(
            self._file(dataset), self._snapshot_file(f"{dataset}@{name}"), f"snapshot '{dataset}'", in_use
        )

    def _duplicate(self, source: Path, target: Path, what: str, in_use: bool) -> None:
        """Make a file that shares the blocks of another, or a copy where blocks cannot be shared."""
        created = create_file(target, 0)
        if created.file is None:
            raise DatasetError(errno.EEXIST, f"cannot {what}: it already exists")
        try:
            reader = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            writer = os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._share(reader, writer, what, in_use)
                os.fsync(writer)
            finally:
                os.close(reader)
                os.close(writer)
        except BaseException:
            created.undo()
            raise

    def _share(self, reader: int, writer: int, what: str, in_use: bool) -> None:
        try:
            linux.clone(reader, writer)
            return
        except OSError as error:
            if error.errno not in NO_REFLINK:
                raise
        if in_use:
            raise DatasetError(
                errno.EBUSY,
                f"cannot {what}: an initiator is logged in to it, and the file system of pool {self.pool}"
                " cannot share blocks (XFS and btrfs can); log out first, or use such a file system",
            )
        copy_sparse(reader, writer, lambda done, total: None)

    def destroy_snapshot(self, full_name: str) -> None:
        """Destroy a snapshot that is there."""
        self._snapshot_file(full_name).unlink()
        self._prune(self._snapshot_file(full_name), SNAPSHOTS)

    def rename_snapshot(self, full_name: str, new_full_name: str) -> None:
        """Rename a snapshot; the new name is free."""
        new = self._snapshot_file(new_full_name)
        new.parent.mkdir(parents=True, exist_ok=True)
        self._snapshot_file(full_name).rename(new)
        self._prune(self._snapshot_file(full_name), SNAPSHOTS)

    def clone(self, full_name: str, name: str) -> None:
        """Make a volume of a snapshot; its name is free, its parent exists."""
        parent = name.rpartition("/")[0]
        if not self._is_filesystem(parent) and parent != self.pool:
            raise DatasetError(errno.ENOENT, f"cannot create '{name}': parent does not exist")
        self._duplicate(self._snapshot_file(full_name), self._file(name), f"clone '{full_name}'", False)

    def rollback(self, full_name: str) -> None:
        """Put the blocks of a snapshot back into its volume, in place: who has the file open sees them."""
        dataset = full_name.partition("@")[0]
        reader = os.open(self._snapshot_file(full_name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            writer = os.open(self._file(dataset), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                size = os.fstat(reader).st_size
                if os.fstat(writer).st_size > size:
                    os.ftruncate(writer, size)
                try:
                    linux.clone(reader, writer)
                except OSError as error:
                    if error.errno not in NO_REFLINK:
                        raise
                    copy_sparse(reader, writer, lambda done, total: None)
                os.fsync(writer)
            finally:
                os.close(writer)
        finally:
            os.close(reader)

    def copy(self, full_name: str, name: str, progress: Callable[[int, int], None]) -> None:
        """Copy a snapshot into a new volume that shares nothing with it.

        The volume has its name only when it is whole; an unfinished copy is removed, now or at the next
        start.
        """
        unfinished = self._directory / COPIES / secrets.token_hex(8)
        created = create_file(unfinished, 0)
        try:
            reader = os.open(self._snapshot_file(full_name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            writer = os.open(unfinished, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                copy_sparse(reader, writer, progress)
                os.fsync(writer)
            finally:
                os.close(reader)
                os.close(writer)
            volume = self._file(name)
            volume.parent.mkdir(parents=True, exist_ok=True)
            volume.hardlink_to(unfinished)
        finally:
            created.undo()

    def clean(self) -> None:
        """Remove what a daemon that was killed had not finished copying."""
        shutil.rmtree(self._directory / COPIES, ignore_errors=True)


def copy_sparse(reader: int, writer: int, progress: Callable[[int, int], None]) -> None:
    """Make one file's contents and size another's, with holes where the first has them.

    The second is never shorter on the way than it ends up: who has it open keeps its size.

    Args:
        progress: bytes done, bytes in all.
    """
    total = os.fstat(reader).st_size
    used = os.fstat(writer).st_blocks > 0
    os.ftruncate(writer, total)
    at = 0
    while at < total:
        try:
            start = os.lseek(reader, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = total  # nothing but a hole to the end
        if used and start > at:
            linux.punch_hole(writer, at, start - at)
        if start == total:
            break
        end = os.lseek(reader, start, os.SEEK_HOLE)
        while start < end:
            piece = os.pread(reader, min(COPY_PIECE, end - start), start)
            if not piece:
                break
            written = 0
            view = memoryview(piece)
            while written < len(piece):
                written += os.pwrite(writer, view[written:], start + written)
            start += len(piece)
            progress(start, total)
        at = max(end, start)
    progress(total, total)
