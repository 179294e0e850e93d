"""Datasets of ZFS pools, by ``zfs`` and ``zpool`` (zfs(8), zfsprops(7)). Worker threads only."""

import errno
from collections.abc import Callable, Iterable, Mapping

from targetd.interface import DatasetError, DatasetRequest, DatasetStatus, SnapshotStatus, StorageError
from targetd.volumes import run_zfs

__all__ = ["ZfsDatasets"]

_COLUMNS = "name,type,available,used,volsize,volblocksize,refreservation,mountpoint,origin"
_COMMENTS = "org.freenas:description"
"""The user property that TrueNAS keeps a dataset's comments in."""

_KINDS = (
    ("does not exist", errno.ENOENT),
    ("already exists", errno.EEXIST),
    ("is busy", errno.EBUSY),
    ("has children", errno.EBUSY),
    ("has dependent clones", errno.EBUSY),
    ("out of space", errno.ENOSPC),
)


def _zfs(*arguments: str) -> list[list[str]]:
    """The rows that ``zfs`` prints.

    Raises:
        DatasetError: it failed; the text is its own, which clients match on.
    """
    try:
        return run_zfs("zfs", *arguments)
    except StorageError as error:
        text = str(error)
        number = next((number for words, number in _KINDS if words in text), errno.EINVAL)
        raise DatasetError(number, text) from None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _text(text: str) -> str:
    return "" if text == "-" else text


class ZfsDatasets:
    """All ZFS pools but those that a directory pool hides. Names are whole and have been checked."""

    def __init__(self, pool: str) -> None:
        self.pool = pool

    # -- reading ----------------------------------------------------------------------------------

    def datasets(self) -> list[DatasetStatus]:
        """All of them, by name."""
        return self._list("-r", self.pool)

    def dataset(self, name: str) -> DatasetStatus | None:
        """One of them."""
        try:
            return next(iter(self._list(name)), None)
        except DatasetError as error:
            if error.error == errno.ENOENT:
                return None
            raise

    def _list(self, *what: str) -> list[DatasetStatus]:
        rows = _zfs("list", "-Hp", "-t", "filesystem,volume", "-o", _COLUMNS, *what)
        properties = self._properties("filesystem,volume", *what)
        found = []
        for name, kind, available, used, size, block, reserved, mountpoint, origin in rows:
            own = properties.get(name, {})
            found.append(
                DatasetStatus(
                    name=name,
                    kind="VOLUME" if kind == "volume" else "FILESYSTEM",
                    available=_number(available),
                    used=_number(used),
                    size_bytes=_number(size),
                    block_size=_number(block),
                    sparse=kind == "volume" and not _number(reserved),
                    mountpoint=_text(mountpoint),
                    origin=_text(origin),
                    comments=own.pop(_COMMENTS, ""),
                    properties=own,
                )
            )
        return sorted(found, key=lambda dataset: dataset.name)

    def _properties(self, kinds: str, *what: str) -> dict[str, dict[str, str]]:
        """Dataset → user property → value, of those set on the dataset itself."""
        found: dict[str, dict[str, str]] = {}
        for name, key, value in _zfs(
            "get", "-Hp", "-t", kinds, "-s", "local,received", "-o", "name,property,value", "all", *what
        ):
            if ":" in key:
                found.setdefault(name, {})[key] = value
        return found

    def snapshots(self) -> list[SnapshotStatus]:
        """All of them, by name."""
        rows = _zfs(
            *("list", "-Hp", "-t", "snapshot", "-o", "name,creation,used,referenced,volsize", "-r", self.pool)
        )
        properties = self._properties("snapshot", "-r", self.pool)
        found = []
        for full_name, created, used, referenced, size in rows:
            dataset, _, name = full_name.partition("@")
            found.append(
                SnapshotStatus(
                    dataset=dataset,
                    name=name,
                    created=float(_number(created)),
                    used=_number(used),
                    referenced=_number(referenced),
                    size_bytes=_number(size),
                    properties=properties.get(full_name, {}),
                )
            )
        return sorted(found, key=lambda snapshot: snapshot.full_name)

    # -- datasets ---------------------------------------------------------------------------------

    def create(self, request: DatasetRequest) -> None:
        """Make it."""
        options = [*_settings(request.properties, request.comments)]
        if request.kind == "VOLUME":
            if request.block_size:
                options += ["-o", f"volblocksize={request.block_size}"]
            if request.sparse:
                options.append("-s")
            options += ["-V", str(request.size_bytes)]
        _zfs("create", *(("-p",) if request.ancestors else ()), *options, request.name)

    def resize(self, name: str, size_bytes: int) -> None:
        """Change a volume's size."""
        _zfs("set", f"volsize={size_bytes}", name)

    def describe(self, name: str, comments: str | None, properties: Mapping[str, str | None]) -> None:
        """Set and remove user properties."""
        wanted = {**properties, **({} if comments is None else {_COMMENTS: comments})}
        put = [f"{key}={value}" for key, value in wanted.items() if value is not None]
        if put:
            _zfs("set", *put, name)
        for key in (key for key, value in wanted.items() if value is None):
            _zfs("inherit", key, name)

    def destroy(self, name: str, recursive: bool) -> None:
        """Destroy a dataset."""
        _zfs("destroy", *(("-r",) if recursive else ()), name)

    def rename(self, name: str, new_name: str) -> None:
        """Rename a dataset or a snapshot."""
        _zfs("rename", name, new_name)

    def promote(self, name: str) -> None:
        """Make a clone the owner of the snapshot that it came from."""
        _zfs("promote", name)

    # -- snapshots --------------------------------------------------------------------------------

    def snapshot(self, dataset: str, name: str, properties: Mapping[str, str], recursive: bool) -> None:
        """Take a snapshot, in one instant."""
        _zfs("snapshot", *(("-r",) if recursive else ()), *_settings(properties, ""), f"{dataset}@{name}")

    def clone(self, full_name: str, name: str, properties: Mapping[str, str]) -> None:
        """Make a dataset of a snapshot."""
        _zfs("clone", *_settings(properties, ""), full_name, name)

    def rollback(self, full_name: str) -> None:
        """Make a dataset what its latest snapshot is."""
        _zfs("rollback", full_name)

    def copy(self, full_name: str, name: str, progress: Callable[[int, int], None]) -> None:
        """Copy by ``zfs send | zfs receive``; how far that is, ``zfs`` tells of what has arrived."""
        total = next((snap.referenced for snap in self.snapshots() if snap.full_name == full_name), 0)
        progress(0, total)
        run_zfs("sh", "-c", 'set -e; zfs send "$1" | zfs receive "$2"', "copy", full_name, name, limit_s=None)
        progress(total, total)


def _settings(properties: Mapping[str, str], comments: str) -> Iterable[str]:
    wanted = {**properties, **({_COMMENTS: comments} if comments else {})}
    for key, value in wanted.items():
        yield from ("-o", f"{key}={value}")
