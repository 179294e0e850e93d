"""Datasets of all pools: the one object that the API asks. Implements ``targetd.interface.Datasets``.

Changes are made one at a time, on a worker thread, under the same lock as those of ``targetd.volumes``. Names
are checked here, once: those that ZFS allows, which never lead out of a directory.
"""

import errno
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol, TypeVar

from storage.zfs_command import find_command
from targetd.datasets.directory import Attributes, DirectoryDatasets
from targetd.datasets.zfs import ZfsDatasets
from targetd.interface import DatasetError, DatasetRequest, DatasetStatus, SnapshotStatus, StorageError
from targetd.system.threads import run_in_thread
from targetd.volumes import VOLUME_BLOCK, Pools, check_name, run_zfs

__all__ = ["BLOCK_SIZES", "NAMESPACE", "DatasetService"]

NAMESPACE = "datasets"
"""Of the records in the configuration store."""
BLOCK_SIZES = tuple(512 << power for power in range(9))
"""What ``volblocksize`` may be: 512 bytes to 128 KiB (zfsprops(7))."""

_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_PROPERTY = re.compile(r"[a-z0-9:+._-]*:[a-z0-9:+._-]*")
MAX_PROPERTY = 256
"""Characters of a user property's name (zfsprops(7))."""
MAX_VALUE = 8192
"""Bytes of its value (zfsprops(7))."""

_T = TypeVar("_T")


class KeyedRecords(Protocol):
    """Where records are kept, durably."""

    async def put(self, name: str, value: bytes | None) -> None:
        """Keep under a name; None removes it."""

    async def items(self) -> dict[str, bytes]:
        """All of them."""


class DatasetService:
    """All pools. Lives on the event loop; what may wait runs on threads of its own."""

    def __init__(self, pools: Pools, records: KeyedRecords) -> None:
        self._pools = pools
        self._records = records
        self._attributes: dict[str, Attributes] = {}
        self._directories = {
            name: DirectoryDatasets(name, path, self._known) for name, path in pools.directories.items()
        }

    async def load(self) -> None:
        """Take over what is in the store."""
        for name, raw in (await self._records.items()).items():
            self._attributes[name] = Attributes(**json.loads(raw))
        for pool in self._directories.values():
            await run_in_thread(pool.clean)

    def _known(self, name: str) -> Attributes:
        return self._attributes.get(name, Attributes())

    async def _keep(self, name: str, attributes: Attributes | None) -> None:
        raw = None if attributes is None else json.dumps(asdict(attributes)).encode()
        await self._records.put(name, raw)
        if attributes is None:
            self._attributes.pop(name, None)
        else:
            self._attributes[name] = attributes

    async def _drop(self, name: str) -> None:
        """Remove the records of a dataset, its snapshots and what is below it."""
        for known in [
            one for one in self._attributes if one == name or one.startswith((f"{name}/", f"{name}@"))
        ]:
            await self._keep(known, None)

    # -- reading ----------------------------------------------------------------------------------

    def _all(self) -> list[DirectoryDatasets | ZfsDatasets]:
        pools: dict[str, DirectoryDatasets | ZfsDatasets] = {}
        if find_command("zpool"):
            names = (name for (name,) in run_zfs("zpool", "list", "-H", "-o", "name"))
            pools = {name: ZfsDatasets(name) for name in names}
        return list({**pools, **self._directories}.values())

    def _pool(self, name: str) -> DirectoryDatasets | ZfsDatasets:
        pool = name.partition("@")[0].partition("/")[0]
        if pool in self._directories:
            return self._directories[pool]
        for found in self._all():
            if found.pool == pool:
                return found
        raise DatasetError(errno.ENOENT, f"cannot open '{name[:200]}': pool does not exist")

    async def datasets(self) -> list[DatasetStatus]:
        return await _asked(lambda: [found for pool in self._all() for found in pool.datasets()])

    async def dataset(self, name: str) -> DatasetStatus | None:
        def work() -> DatasetStatus | None:
            try:
                check_name(name)
                return self._pool(name).dataset(name)
            except DatasetError as error:
                if error.error == errno.ENOENT:
                    return None
                raise
            except StorageError:
                return None

        return await _asked(work)

    async def snapshots(self, dataset: str | None = None) -> list[SnapshotStatus]:
        def work() -> list[SnapshotStatus]:
            pools = self._all() if dataset is None else [self._pool(dataset)]
            found = (snapshot for pool in pools for snapshot in pool.snapshots())
            return [snapshot for snapshot in found if dataset in (None, snapshot.dataset)]

        return await _asked(work)

    # -- datasets ---------------------------------------------------------------------------------

    async def create(self, request: DatasetRequest) -> DatasetStatus:
        _check_properties(request.properties)
        block = request.block_size or VOLUME_BLOCK
        if request.kind == "VOLUME":
            request = replace(request, size_bytes=-(-request.size_bytes // block) * block)

        def work() -> None:
            pool = self._pool(request.name)
            _check(request.name)
            if pool.dataset(request.name) is not None:
                raise DatasetError(errno.EEXIST, f"cannot create '{request.name}': dataset already exists")
            pool.create(request)

        async with self._pools.turn:
            await _asked(work)
            if self._is_directory(request.name):
                await self._drop(request.name)  # of one that went without us
                await self._keep(
                    request.name,
                    Attributes(
                        block_size=block,
                        sparse=request.sparse,
                        comments=request.comments,
                        created=time.time(),
                        properties=dict(request.properties),
                    ),
                )
        return await self._there(request.name)

    async def resize(self, name: str, size_bytes: int) -> None:
        block = (await self._there(name)).block_size or VOLUME_BLOCK
        async with self._pools.turn:
            await _asked(lambda: self._pool(name).resize(name, -(-size_bytes // block) * block))

    async def describe(self, name: str, comments: str | None, properties: Mapping[str, str | None]) -> None:
        _check_properties(properties)
        await self._there(name)
        async with self._pools.turn:
            pool = self._pool(name)
            if isinstance(pool, ZfsDatasets):
                zfs = pool
                await _asked(lambda: zfs.describe(name, comments, properties))
                return
            known = self._known(name)
            merged = {**known.properties, **properties}
            await self._keep(
                name,
                replace(
                    known,
                    comments=known.comments if comments is None else comments,
                    properties={key: value for key, value in merged.items() if value is not None},
                ),
            )

    async def destroy(self, name: str, recursive: bool) -> None:
        await self._there(name)
        async with self._pools.turn:
            await _asked(lambda: self._pool(name).destroy(name, recursive))
            await self._drop(name)

    async def rename(self, name: str, new_name: str) -> None:
        def work() -> None:
            pool = self._pool(name)
            _check(new_name)
            if new_name.partition("/")[0] != pool.pool or "/" not in name:
                raise DatasetError(errno.EINVAL, f"cannot rename '{name}': not within one pool")
            if new_name.startswith(f"{name}/"):
                raise DatasetError(errno.EINVAL, f"cannot rename '{name}': the new name is below it")
            if pool.dataset(new_name) is not None:
                raise DatasetError(errno.EEXIST, f"cannot rename '{name}': '{new_name}' already exists")
            pool.rename(name, new_name)

        await self._there(name)
        async with self._pools.turn:
            await _asked(work)
            for known in list(self._attributes):
                if known == name or known.startswith((f"{name}/", f"{name}@")):
                    await self._keep(new_name + known[len(name) :], self._attributes[known])
                    await self._keep(known, None)

    async def promote(self, name: str) -> None:
        status = await self._there(name)
        if not status.origin:
            raise DatasetError(errno.EINVAL, f"cannot promote '{name}': not a cloned filesystem or volume")
        async with self._pools.turn:
            pool = self._pool(name)
            if isinstance(pool, ZfsDatasets):
                zfs = pool
                await _asked(lambda: zfs.promote(name))
                return
            directory = pool
            source, _, snapshot = status.origin.partition("@")
            mine = f"{name}@{snapshot}"
            await _asked(lambda: directory.rename_snapshot(status.origin, mine))
            await self._keep(mine, self._known(status.origin))
            await self._keep(status.origin, None)
            await self._keep(name, replace(self._known(name), origin=""))
            await self._keep(source, replace(self._known(source), origin=mine))

    # -- snapshots --------------------------------------------------------------------------------

    async def snapshot(
        self, dataset: str, name: str, properties: Mapping[str, str], in_use: bool, recursive: bool
    ) -> SnapshotStatus:
        _check_properties(properties)
        _check_snapshot(name)
        await self._there(dataset)

        def work() -> None:
            pool = self._pool(dataset)
            if any((snapshot.dataset, snapshot.name) == (dataset, name) for snapshot in pool.snapshots()):
                raise DatasetError(
                    errno.EEXIST, f"cannot create snapshot '{dataset}@{name}': dataset already exists"
                )
            if isinstance(pool, ZfsDatasets):
                pool.snapshot(dataset, name, properties, recursive)
            else:
                pool.snapshot(dataset, name, in_use)

        async with self._pools.turn:
            await _asked(work)
            if self._is_directory(dataset):
                attributes = Attributes(
                    block_size=self._known(dataset).block_size,
                    created=time.time(),
                    properties=dict(properties),
                )
                await self._keep(f"{dataset}@{name}", attributes)
        return await self._taken(f"{dataset}@{name}")

    async def destroy_snapshot(self, full_name: str, recursive: bool) -> None:
        await self._taken(full_name)
        async with self._pools.turn:
            pool = self._pool(full_name)
            if isinstance(pool, ZfsDatasets):
                zfs = pool
                await _asked(lambda: zfs.destroy(full_name, recursive))
                return
            directory = pool
            await _asked(lambda: directory.destroy_snapshot(full_name))
            await self._keep(full_name, None)
            for name, known in list(self._attributes.items()):
                if known.origin == full_name:  # its blocks are its own all the same
                    await self._keep(name, replace(known, origin=""))

    async def rename_snapshot(self, full_name: str, new_full_name: str) -> None:
        dataset, _, new = new_full_name.partition("@")
        _check_snapshot(new)
        if dataset != full_name.partition("@")[0]:
            raise DatasetError(errno.EINVAL, f"cannot rename '{full_name}': the dataset must be the same")
        taken = await self._taken(full_name)
        if any(snapshot.name == new for snapshot in await self.snapshots(taken.dataset)):
            raise DatasetError(errno.EEXIST, f"cannot rename '{full_name}': '{new_full_name}' already exists")
        async with self._pools.turn:
            pool = self._pool(full_name)
            if isinstance(pool, ZfsDatasets):
                await _asked(lambda: pool.rename(full_name, new_full_name))
                return
            await _asked(lambda: pool.rename_snapshot(full_name, new_full_name))
            await self._keep(new_full_name, self._known(full_name))
            await self._keep(full_name, None)
            for name, known in list(self._attributes.items()):
                if known.origin == full_name:
                    await self._keep(name, replace(known, origin=new_full_name))

    async def clone(self, full_name: str, name: str, properties: Mapping[str, str]) -> DatasetStatus:
        _check_properties(properties)
        await self._taken(full_name)

        def work() -> None:
            pool = self._pool(full_name)
            self._check_new(pool, name)
            if isinstance(pool, ZfsDatasets):
                pool.clone(full_name, name, properties)
            else:
                pool.clone(full_name, name)

        async with self._pools.turn:
            await _asked(work)
            if self._is_directory(name):
                await self._drop(name)
                source = self._known(full_name)
                await self._keep(
                    name,
                    Attributes(
                        block_size=source.block_size,
                        origin=full_name,
                        created=time.time(),
                        properties=dict(properties),
                    ),
                )
        return await self._there(name)

    def _check_new(self, pool: DirectoryDatasets | ZfsDatasets, name: str) -> None:
        _check(name)
        if name.partition("/")[0] != pool.pool:
            raise DatasetError(errno.EINVAL, f"cannot create '{name}': not within pool {pool.pool}")
        if pool.dataset(name) is not None:
            raise DatasetError(errno.EEXIST, f"cannot create '{name}': dataset already exists")

    async def rollback(self, full_name: str) -> None:
        taken = await self._taken(full_name)
        later = [one.name for one in await self.snapshots(taken.dataset) if one.created > taken.created]
        if later:
            raise DatasetError(
                errno.EBUSY,
                f"cannot rollback to '{full_name}': more recent snapshots exist: {', '.join(later[:5])}",
            )
        async with self._pools.turn:
            await _asked(lambda: self._pool(full_name).rollback(full_name))

    async def copy(self, full_name: str, name: str, progress: Callable[[int, int], None]) -> None:
        await self._taken(full_name)

        def check() -> None:
            self._check_new(self._pool(full_name), name)

        async with self._pools.turn:
            await _asked(check)
        # for as long as it takes, and others go on meanwhile: the new file is made before anything is copied
        await _asked(lambda: self._pool(full_name).copy(full_name, name, progress))
        if self._is_directory(name):
            attributes = Attributes(block_size=self._known(full_name).block_size, created=time.time())
            await self._keep(name, attributes)

    # -- what all need ----------------------------------------------------------------------------

    def _is_directory(self, name: str) -> bool:
        return name.partition("/")[0] in self._directories

    async def _there(self, name: str) -> DatasetStatus:
        found = await self.dataset(name)
        if found is None:
            raise DatasetError(errno.ENOENT, f"cannot open '{name[:200]}': dataset does not exist")
        return found

    async def _taken(self, full_name: str) -> SnapshotStatus:
        dataset, at, name = full_name.partition("@")
        if at:
            for snapshot in await self.snapshots(dataset):
                if snapshot.name == name:
                    return snapshot
        raise DatasetError(errno.ENOENT, f"cannot open '{full_name[:200]}': dataset does not exist")


def _check(name: str) -> None:
    try:
        check_name(name)
    except StorageError as error:
        raise DatasetError(errno.EINVAL, str(error)) from None
    if name.partition("/")[2].partition("/")[0] == "zvols":
        raise DatasetError(errno.EINVAL, f"cannot create '{name}': a directory pool keeps its volumes there")


def _check_snapshot(name: str) -> None:
    if not _SNAPSHOT.fullmatch(name) or len(name) > 128:
        raise DatasetError(errno.EINVAL, f"invalid snapshot name {name[:130]!r}: letters, digits and _ . : -")


def _check_properties(properties: Mapping[str, Any]) -> None:
    for key, value in properties.items():
        if not _PROPERTY.fullmatch(key) or len(key) > MAX_PROPERTY:
            raise DatasetError(
                errno.EINVAL,
                f"invalid user property {key[:64]!r}: lower-case letters, digits and : + . _ -, with a colon",
            )
        if value is not None and len(str(value).encode()) > MAX_VALUE:
            raise DatasetError(errno.EINVAL, f"the value of {key} is longer than {MAX_VALUE} bytes")


async def _asked(work: Callable[[], _T]) -> _T:
    try:
        return await run_in_thread(work)
    except DatasetError:
        raise
    except StorageError as error:
        raise DatasetError(errno.EIO, str(error)) from error
    except OSError as error:
        raise DatasetError(error.errno or errno.EIO, error.strerror or str(error)) from error
