"""``storage/volume/…`` and ``storage/dataset/…``: what iSCSI clients also call (api-semantics §9.1).

A client makes a volume, then an extent on ``/dev/zvol/POOL/NAME``; it asks how much is free.
The texts are those of ZFS, since clients match on them. Volumes are sparse on directory pools whatever is
asked; properties that only ZFS knows (compression, deduplication) are left at what the pool has.
"""

import re
from collections.abc import Awaitable, Mapping
from decimal import Decimal
from typing import Any, Final, TypeVar

from aiohttp import web

from api.audit import note
from api.bodies import content_range, page, read_object
from api.dataset_use import DEVICES, extent_on
from api.errors import ApiError, FieldsError, NotFoundError, OperationFailedError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from api.schema import coerce
from targetd.config import REQUIRED
from targetd.interface import Dataset, Engine, Storage, StorageError, Volume

__all__ = ["StorageResource"]

BAD_SIZE: Final = "Enter a size: bytes, or a number with K, M, G, T or P (10G, 500MiB, 0.5 GiB)."
MAX_SIZE: Final = 2**62

_SIZE: Final = re.compile(r"([0-9]{1,19}(?:\.[0-9]+)?) ?([KMGTP]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_T = TypeVar("_T")


def volume_size(given: object) -> int:
    """Bytes of a size as clients write it, to the nearest one; units are powers of 1024.

    Raises:
        ValueError: it is none.
    """
    match = _SIZE.fullmatch(str(given).strip()) if not isinstance(given, bool) else None
    if match is None:
        raise ValueError(BAD_SIZE)
    exact = Decimal(match[1]) * 1024 ** (" KMGTP".index(match[2].upper()) if match[2] else 0)
    size = int(exact.to_integral_value())
    if not 0 < size <= MAX_SIZE:
        raise ValueError(BAD_SIZE)
    return size


class StorageResource:
    """Pools, their datasets and their volumes."""

    def __init__(self, engine: Engine, storage: Storage) -> None:
        self.engine = engine
        self.storage = storage

    def register(self, router: Router) -> None:
        """Add the places."""
        failures: dict[int, str | None] = {400: "Error", 401: None, 404: None}
        volume = f"{PREFIX}storage/volume/"
        router.add(
            "storage",
            volume,
            {
                "GET": Operation(
                    self.get_pools,
                    "List pools.",
                    {200: "Pool[]", 400: "Error", 401: None},
                    parameters=LIST_PARAMETERS,
                )
            },
        )
        router.add(
            "storage",
            f"{volume}{{pool}}/",
            {"GET": Operation(self.get_pool, "Show.", {200: "Pool", **failures})},
        )
        router.add(
            "storage",
            f"{volume}{{pool}}/zvols/",
            {
                "GET": Operation(
                    self.get_volumes,
                    "List volumes.",
                    {200: "Volume[]", **failures},
                    parameters=LIST_PARAMETERS,
                ),
                "POST": Operation(
                    self.post, "Create.", {202: "Volume", **failures, 409: "FieldErrors"}, "VolumeCreate"
                ),
            },
        )
        router.add(
            "storage",
            f"{volume}{{pool}}/zvols/{{zvol*}}/",
            {
                "GET": Operation(self.get_volume, "Show.", {200: "Volume", **failures}),
                "PUT": Operation(
                    self.put,
                    "Change the size; initiators learn it at once.",
                    {200: "Volume", **failures, 409: "FieldErrors"},
                    "VolumeUpdate",
                ),
                "DELETE": Operation(
                    self.delete, "Destroy it with all its data.", {204: None, **failures}, "VolumeDelete"
                ),
            },
        )
        router.add(
            "storage",
            f"{PREFIX}storage/dataset/{{dataset*}}/",
            {"GET": Operation(self.get_dataset, "Show.", {200: "Dataset", **failures})},
        )

    # -- pools and datasets -------------------------------------------------------------------

    async def get_pools(self, request: web.Request) -> web.StreamResponse:
        """GET of all pools."""
        pools = [
            _pool(number, *found) for number, found in enumerate(await _asked(self.storage.pools()), start=1)
        ]
        offset, shown = page(request, pools)
        return answer(200, list(shown), content_range(offset, len(shown), len(pools)))

    async def get_pool(self, request: web.Request, name: str) -> web.StreamResponse:
        """GET of one pool, by name or number."""
        for number, (dataset, children) in enumerate(await _asked(self.storage.pools()), start=1):
            if name in (dataset.name, str(number)):
                return answer(200, _pool(number, dataset, children))
        raise NotFoundError

    async def get_dataset(self, request: web.Request, path: str) -> web.StreamResponse:
        """GET of one dataset."""
        dataset = await _asked(self.storage.dataset(path))
        if dataset is None:
            raise NotFoundError
        return answer(200, _dataset(dataset))

    # -- volumes ------------------------------------------------------------------------------

    async def get_volumes(self, request: web.Request, pool: str) -> web.StreamResponse:
        """GET of all volumes of a pool."""
        volumes = [_volume(volume) for volume in await _asked(self.storage.volumes(pool))]
        offset, shown = page(request, volumes)
        return answer(200, list(shown), content_range(offset, len(shown), len(volumes)))

    async def get_volume(self, request: web.Request, pool: str, name: str) -> web.StreamResponse:
        """GET of one volume."""
        return answer(200, _volume(await self._found(pool, name)))

    async def post(self, request: web.Request, pool: str) -> web.StreamResponse:
        """POST: make one. 202 as FreeNAS had it, though it is there when this is answered."""
        body = await read_object(request)
        errors: dict[str, list[str]] = {}
        name = body.get("name")
        if not isinstance(name, str) or not name.strip():
            errors["name"] = [REQUIRED]
        size = _size(body, errors)
        sparse = _flag(body, "sparse", errors)
        if errors:
            raise FieldsError(errors)
        volume = await _asked(self.storage.create(pool, str(name).strip().strip("/"), size, sparse))
        note("volumes", f"{pool}/{volume.name}", None, {"volsize": volume.size_bytes})
        return answer(202, _volume(volume))

    async def put(self, request: web.Request, pool: str, name: str) -> web.StreamResponse:
        """PUT of ``volsize``; what is exported does not shrink."""
        body = await read_object(request)
        volume = await self._found(pool, name)
        if body.get("volsize") is not None:
            errors: dict[str, list[str]] = {}
            size = _size(body, errors)
            if errors:
                raise FieldsError(errors)
            extent = extent_on(self.engine.configuration, f"{pool}/{name}")
            if extent and size < volume.size_bytes:
                raise OperationFailedError(f"'{pool}/{name}' is in use by extent {extent} and cannot shrink")
            resized = await _asked(self.storage.resize(pool, name, size))
            if resized is None:
                raise NotFoundError
            note(
                "volumes",
                f"{pool}/{name}",
                {"volsize": volume.size_bytes},
                {"volsize": resized.size_bytes},
            )
            volume = resized
            await self.engine.look_again(f"{DEVICES}{pool}/{name}")
        return answer(200, _volume(volume))

    async def delete(self, request: web.Request, pool: str, name: str) -> web.StreamResponse:
        """DELETE: not while an extent is on it."""
        volume = await self._found(pool, name)
        try:
            body = await read_object(request) if request.can_read_body else {}
        except ApiError:
            body = {}  # never required
        extent = extent_on(self.engine.configuration, f"{pool}/{name}")
        if extent:
            raise OperationFailedError(
                f"cannot destroy '{pool}/{name}': dataset is busy: extent {extent} is on it"
            )
        if not await _asked(self.storage.delete(pool, name, body.get("cascade") is True)):
            raise NotFoundError
        note("volumes", f"{pool}/{name}", {"volsize": volume.size_bytes}, None)
        return answer(204)

    async def _found(self, pool: str, name: str) -> Volume:
        volume = await _asked(self.storage.volume(pool, name))
        if volume is None:
            raise NotFoundError
        return volume


async def _asked(question: Awaitable[_T]) -> _T:
    try:
        return await question
    except KeyError:
        raise NotFoundError from None
    except StorageError as error:
        raise OperationFailedError(str(error)) from None


def _size(body: Mapping[str, Any], errors: dict[str, list[str]]) -> int:
    given = body.get("volsize")
    if given is None or given == "":
        errors["volsize"] = [REQUIRED]
        return 0
    try:
        return volume_size(given)
    except ValueError as error:
        errors["volsize"] = [str(error)]
        return 0


def _flag(body: Mapping[str, Any], name: str, errors: dict[str, list[str]]) -> bool:
    given = body.get(name)
    try:
        return bool(coerce(bool, given)) if given is not None else True
    except ValueError as error:
        errors[name] = [str(error)]
        return True


def _volume(volume: Volume) -> dict[str, Any]:
    return {
        "name": volume.name,
        "volsize": volume.size_bytes,
        "used": volume.used,
        "refer": volume.used,
        "avail": volume.available,
    }


def _dataset(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "pool": dataset.pool,
        "avail": dataset.available,
        "used": dataset.used,
        "mountpoint": dataset.mountpoint,
    }


def _pool(number: int, dataset: Dataset, children: list[Dataset]) -> dict[str, Any]:
    total = dataset.used + dataset.available
    return {
        "id": number,
        "name": dataset.name,
        "vol_name": dataset.name,
        "vol_fstype": "ZFS",
        "avail": dataset.available,
        "used": dataset.used,
        "used_pct": 100 * dataset.used // total if total else 0,
        "mountpoint": dataset.mountpoint,
        "status": dataset.status,
        "children": [_dataset(child) for child in children],
    }
