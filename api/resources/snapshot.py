"""``storage/snapshot/`` and ``storage/volume/POOL/datasets/``: snapshots, clones and file systems of pools.

As FreeNAS v1.0 had them, for clients that keep their volumes in pools (the Cinder driver, OpenSVC). Texts are
those of ZFS, since clients match on them.
"""

from collections.abc import Awaitable, Mapping
from typing import Any, Final, TypeVar

from aiohttp import web

from api.audit import note
from api.bodies import content_range, page, read_object
from api.dataset_use import DEVICES, extent_on, initiator_on
from api.errors import FieldsError, NotFoundError, OperationFailedError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from targetd.config import REQUIRED
from targetd.interface import DatasetError, DatasetRequest, Datasets, DatasetStatus, Engine, SnapshotStatus

__all__ = ["SnapshotResource"]

SNAPSHOTS: Final = f"{PREFIX}storage/snapshot/"
_T = TypeVar("_T")


class SnapshotResource:
    """Snapshots, and the file systems of pools."""

    def __init__(self, engine: Engine, datasets: Datasets) -> None:
        self.engine = engine
        self.datasets = datasets

    def register(self, router: Router) -> None:
        """Register the places."""
        failures: dict[int, str | None] = {400: "Error", 401: None, 404: None}
        written: dict[int, str | None] = {**failures, 409: "FieldErrors"}
        lists = (LIST_PARAMETERS,)
        rows: tuple[tuple[str, dict[str, Operation]], ...] = (
            (
                SNAPSHOTS,
                {
                    "GET": Operation(
                        self.get_snapshots, "List snapshots.", {200: "Snapshot[]", **failures}, None, *lists
                    ),
                    "POST": Operation(
                        self.post_snapshot,
                        "Take a snapshot, consistent after a crash, with sessions open.",
                        {201: "Snapshot", **written},
                        "SnapshotCreate",
                    ),
                },
            ),
            (
                f"{SNAPSHOTS}{{snapshot}}/",
                {
                    "GET": Operation(self.get_snapshot, "Show.", {200: "Snapshot", **failures}),
                    "DELETE": Operation(self.delete_snapshot, "Destroy.", {204: None, **failures}),
                },
            ),
            (
                f"{SNAPSHOTS}{{snapshot}}/clone/",
                {
                    "POST": Operation(
                        self.clone, "Make a volume of a snapshot.", {202: "Done", **written}, "SnapshotClone"
                    )
                },
            ),
            (
                f"{SNAPSHOTS}{{snapshot}}/rollback/",
                {
                    "POST": Operation(
                        self.rollback,
                        "Make the volume what its latest snapshot is; not while an initiator is logged in.",
                        {202: "Done", **failures},
                    )
                },
            ),
            (
                f"{PREFIX}storage/volume/{{pool}}/datasets/",
                {
                    "GET": Operation(
                        self.get_datasets,
                        "List file systems.",
                        {200: "FileSystem[]", **failures},
                        None,
                        *lists,
                    ),
                    "POST": Operation(
                        self.post_dataset,
                        "Create a file system.",
                        {201: "FileSystem", **written},
                        "FileSystemCreate",
                    ),
                },
            ),
            (
                f"{PREFIX}storage/volume/{{pool}}/datasets/{{dataset*}}/",
                {
                    "GET": Operation(self.get_dataset, "Show.", {200: "FileSystem", **failures}),
                    "DELETE": Operation(
                        self.delete_dataset, "Destroy an empty file system.", {204: None, **failures}
                    ),
                },
            ),
        )
        for path, operations in rows:
            router.add("storage", path, operations)

    # -- snapshots --------------------------------------------------------------------------------

    async def get_snapshots(self, request: web.Request) -> web.StreamResponse:
        """List all snapshots."""
        found = _shown(await _asked(self.datasets.snapshots()))
        offset, shown = page(request, found)
        return answer(200, list(shown), content_range(offset, len(shown), len(found)))

    async def _find(self, full_name: str) -> dict[str, Any]:
        dataset = full_name.partition("@")[0]
        for shown in _shown(await _asked(self.datasets.snapshots(dataset))):
            if shown["fullname"] == full_name:
                return shown
        raise NotFoundError

    async def get_snapshot(self, request: web.Request, full_name: str) -> web.StreamResponse:
        """Show one snapshot."""
        return answer(200, await self._find(full_name))

    async def post_snapshot(self, request: web.Request) -> web.StreamResponse:
        """Take a snapshot."""
        body = await read_object(request)
        dataset, name = _texts(body, "dataset", "name")
        busy = bool(await initiator_on(self.engine, dataset))
        taken = await _asked(self.datasets.snapshot(dataset, name, {}, in_use=busy, recursive=False))
        note("snapshots", taken.full_name, None, {"name": taken.full_name})
        return answer(201, await self._find(taken.full_name))

    async def delete_snapshot(self, request: web.Request, full_name: str) -> web.StreamResponse:
        """Destroy a snapshot."""
        await self._find(full_name)
        await _asked(self.datasets.destroy_snapshot(full_name, recursive=False))
        note("snapshots", full_name, {"name": full_name}, None)
        return answer(204)

    async def clone(self, request: web.Request, full_name: str) -> web.StreamResponse:
        """Make a volume of a snapshot."""
        await self._find(full_name)
        (name,) = _texts(await read_object(request), "name")
        await _asked(self.datasets.clone(full_name, name, {}))
        note("datasets", name, None, {"origin": full_name})
        return answer(202, "Snapshot cloned.")

    async def rollback(self, request: web.Request, full_name: str) -> web.StreamResponse:
        """Roll a volume back."""
        await self._find(full_name)
        dataset = full_name.partition("@")[0]
        user = await initiator_on(self.engine, dataset)
        if user:
            raise OperationFailedError(f"cannot rollback '{dataset}': dataset is busy: {user} is logged in")
        await _asked(self.datasets.rollback(full_name))
        await self.engine.look_again(f"{DEVICES}{dataset}")
        note("datasets", dataset, None, {"rolled back to": full_name})
        return answer(202, "Snapshot rolled back.")

    # -- file systems -----------------------------------------------------------------------------

    async def _below(self, pool: str) -> list[DatasetStatus]:
        found = await _asked(self.datasets.datasets())
        if not any(one.name == pool for one in found):
            raise NotFoundError
        return [one for one in found if one.kind == "FILESYSTEM" and one.name.startswith(f"{pool}/")]

    async def get_datasets(self, request: web.Request, pool: str) -> web.StreamResponse:
        """List the file systems of a pool."""
        found = [_filesystem(one) for one in await self._below(pool)]
        offset, shown = page(request, found)
        return answer(200, list(shown), content_range(offset, len(shown), len(found)))

    async def _filesystem(self, pool: str, name: str) -> DatasetStatus:
        for one in await self._below(pool):
            if one.name == f"{pool}/{name}":
                return one
        raise NotFoundError

    async def get_dataset(self, request: web.Request, pool: str, name: str) -> web.StreamResponse:
        """Show a file system."""
        return answer(200, _filesystem(await self._filesystem(pool, name)))

    async def post_dataset(self, request: web.Request, pool: str) -> web.StreamResponse:
        """Create a file system."""
        (name,) = _texts(await read_object(request), "name")
        await self._below(pool)
        made = await _asked(self.datasets.create(DatasetRequest(name=f"{pool}/{name.strip('/')}")))
        note("datasets", made.name, None, {"type": "FILESYSTEM"})
        return answer(201, _filesystem(made))

    async def delete_dataset(self, request: web.Request, pool: str, name: str) -> web.StreamResponse:
        """Destroy a file system that has nothing in it."""
        found = await self._filesystem(pool, name)
        extent = extent_on(self.engine.configuration, found.name)
        if extent:
            raise OperationFailedError(
                f"cannot destroy '{found.name}': dataset is busy: extent {extent} is on it"
            )
        await _asked(self.datasets.destroy(found.name, recursive=False))
        note("datasets", found.name, {"name": found.name}, None)
        return answer(204)


async def _asked(question: Awaitable[_T]) -> _T:
    try:
        return await question
    except DatasetError as error:
        raise OperationFailedError(str(error)) from None


def _texts(body: Mapping[str, Any], *names: str) -> list[str]:
    """The required texts of a body.

    Raises:
        FieldsError: one of them is missing or no text.
    """
    wrong = [name for name in names if not isinstance(body.get(name), str) or not body[name].strip()]
    if wrong:
        raise FieldsError({name: [REQUIRED] for name in wrong})
    return [body[name].strip() for name in names]


def _shown(snapshots: list[SnapshotStatus]) -> list[dict[str, Any]]:
    latest: dict[str, float] = {}
    for one in snapshots:
        latest[one.dataset] = max(latest.get(one.dataset, 0.0), one.created)
    return [
        {
            "id": one.full_name,
            "fullname": one.full_name,
            "filesystem": one.dataset,
            "name": one.name,
            "parent_type": "volume" if one.size_bytes else "filesystem",
            "mostrecent": one.created == latest[one.dataset],
            "used": one.used,
            "refer": one.referenced,
        }
        for one in snapshots
    ]


def _filesystem(one: DatasetStatus) -> dict[str, Any]:
    return {
        "name": one.name.partition("/")[2],
        "pool": one.pool,
        "avail": one.available,
        "used": one.used,
        "refer": one.used,
        "mountpoint": one.mountpoint,
        "comments": one.comments,
    }
