"""``pool.dataset.*`` and ``pool.*``: volumes and file systems of all pools.

Numbers and texts of a dataset are objects, ``{"value", "rawvalue", "parsed", "source"}``, as ZFS' properties
are. User properties are kept durably: several clients use them as their database.
"""

import errno
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from api.audit import note
from api.dataset_use import DEVICES, extent_on
from api.v2.errors import ArgumentsError, CallError
from api.v2.methods import Call, Method, Model, Parameter, reading, writing
from api.v2.query import PARAMETERS, QueryOptions, select
from targetd.interface import (
    Dataset,
    DatasetError,
    DatasetRequest,
    Datasets,
    DatasetStatus,
    Engine,
    SnapshotStatus,
    Storage,
)
from targetd.system.threads import run_in_thread

__all__ = ["DatasetMethods", "call_error", "parsed"]

_BLOCK: Final = re.compile(r"([0-9]{1,6})(K?)")
FULL: Final = "a directory pool holds no quota and no reservation of a file system"


class UserProperty(Model):
    """One user property of a new dataset."""

    key: str
    value: str | int | float | bool


class UserPropertyUpdate(Model):
    """A change of one user property: a value, or its removal."""

    key: str
    value: str | int | float | bool | None = None
    remove: bool = False

    @model_validator(mode="after")
    def _either(self) -> "UserPropertyUpdate":
        if self.remove == (self.value is not None):
            raise ValueError("give a value, or remove")
        return self


class DatasetCreate(Model):
    name: str
    type: Literal["FILESYSTEM", "VOLUME"] = "FILESYSTEM"
    volsize: int | None = None
    volblocksize: str | int | None = None
    sparse: bool = False
    force_size: bool = False
    comments: str = ""
    create_ancestors: bool = False
    share_type: Literal["GENERIC"] = "GENERIC"
    refreservation: int | None = None
    user_properties: list[UserProperty] = Field(default_factory=list)


class DatasetUpdate(Model):
    volsize: int | None = None
    force_size: bool = False
    comments: str | None = None
    user_properties: list[UserProperty] = Field(default_factory=list)
    user_properties_update: list[UserPropertyUpdate] = Field(default_factory=list)


class DeleteOptions(Model):
    recursive: bool = False
    force: bool = False


class RenameOptions(Model):
    new_name: str
    recursive: bool = False
    force: bool = False


def call_error(error: DatasetError) -> CallError:
    """As an error of a call: its text is ZFS', which clients match on."""
    return CallError(str(error), error.error)


def parsed(value: Any, source: str = "LOCAL") -> dict[str, Any]:
    """A property as TrueNAS shows it."""
    text = "" if value is None else str(value)
    return {"value": text, "rawvalue": text, "parsed": value, "source": source}


def block_size(given: str | int | None) -> int:
    """Bytes of a ``volblocksize`` (``16K``, 16384); 0 for none.

    Raises:
        ArgumentsError: no power of two from 512 to 128 KiB.
    """
    if given is None:
        return 0
    match = _BLOCK.fullmatch(str(given).upper())
    size = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if size not in [512 << power for power in range(9)]:
        raise ArgumentsError(
            [("pool_dataset_create.volblocksize", f"{given!r}: use 512, 1K, 2K … 128K", errno.EINVAL)]
        )
    return size


class DatasetMethods:
    """``pool.dataset.*`` and ``pool.*``."""

    def __init__(self, engine: Engine, storage: Storage, datasets: Datasets) -> None:
        self.engine = engine
        self.storage = storage
        self.datasets = datasets

    # -- reading ----------------------------------------------------------------------------------

    def show(
        self, status: DatasetStatus, below: Sequence[DatasetStatus], snapshots: Sequence[SnapshotStatus]
    ) -> dict[str, Any]:
        """One dataset."""
        body: dict[str, Any] = {
            "id": status.name,
            "name": status.name,
            "pool": status.pool,
            "type": status.kind,
            "encrypted": False,
            "encryption_root": None,
            "key_loaded": False,
            "locked": False,
            "available": parsed(status.available, "NONE"),
            "used": parsed(status.used, "NONE"),
            "referenced": parsed(status.used, "NONE"),
            "origin": parsed(status.origin, "NONE"),
            "readonly": {"value": "OFF", "rawvalue": "off", "parsed": False, "source": "DEFAULT"},
            "user_properties": {key: parsed(value) for key, value in status.properties.items()},
            "children": [self.show(child, (), ()) for child in below],
            "snapshots": [
                {
                    "id": one.full_name,
                    "name": one.full_name,
                    "snapshot_name": one.name,
                    "dataset": one.dataset,
                }
                for one in snapshots
            ],
            "properties": {},
        }
        if status.comments:
            body["comments"] = parsed(status.comments)
        if status.kind == "VOLUME":
            body |= {
                "volsize": parsed(status.size_bytes),
                "volblocksize": {
                    **parsed(status.block_size),
                    "value": f"{status.block_size // 1024}K"
                    if status.block_size >= 1024
                    else str(status.block_size),
                },
                "refreservation": parsed(0 if status.sparse else status.size_bytes),
                "sparse": parsed(status.sparse, "NONE"),
            }
        else:
            body |= {
                "mountpoint": status.mountpoint,
                "quota": parsed(None, "DEFAULT"),
                "refquota": parsed(None, "DEFAULT"),
                "reservation": parsed(None, "DEFAULT"),
                "refreservation": parsed(None, "DEFAULT"),
            }
        for key, value in status.properties.items():
            body.setdefault(key, parsed(value))
        return body

    async def _shown(self, extra: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            found = await self.datasets.datasets()
            snapshots = await self.datasets.snapshots() if extra.get("snapshots") else []
        except DatasetError as error:
            raise call_error(error) from None
        return await run_in_thread(
            self._showing, found, snapshots, bool(extra.get("retrieve_children", True))
        )

    def _showing(
        self, found: Sequence[DatasetStatus], snapshots: Sequence[SnapshotStatus], with_children: bool
    ) -> list[dict[str, Any]]:
        """All datasets as bodies; a thousand of them would hold the event loop for too long."""
        children: dict[str, list[DatasetStatus]] = {}
        if with_children:
            for status in found:
                children.setdefault(status.name.rpartition("/")[0], []).append(status)
        taken: dict[str, list[SnapshotStatus]] = {}
        for snapshot in snapshots:
            taken.setdefault(snapshot.dataset, []).append(snapshot)
        return [self.show(one, children.get(one.name, ()), taken.get(one.name, ())) for one in found]

    async def query(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return await run_in_thread(select, await self._shown(options.extra), filters, options)

    async def get_instance(self, call: Call, id: str, options: QueryOptions) -> Any:
        status = await self._there(id)
        try:
            below = []
            if status.kind == "FILESYSTEM" and options.extra.get("retrieve_children", True):
                below = [one for one in await self.datasets.datasets() if one.name.rpartition("/")[0] == id]
            snapshots = await self.datasets.snapshots(id) if options.extra.get("snapshots") else []
        except DatasetError as error:
            raise call_error(error) from None
        return select([self.show(status, below, snapshots)], [], options.model_copy(update={"get": True}))

    async def pools(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        found = await self.storage.pools()
        return select([_pool(number, one) for number, (one, _) in enumerate(found, 1)], filters, options)

    # -- writing ----------------------------------------------------------------------------------

    async def create(self, call: Call, model: DatasetCreate) -> dict[str, Any]:
        argument = "pool_dataset_create"
        errors: list[tuple[str, str, int]] = []
        if model.type == "VOLUME":
            if not model.volsize or model.volsize < 0:
                errors.append((f"{argument}.volsize", "This field is required for VOLUME", errno.EINVAL))
            if model.refreservation and model.refreservation != model.volsize:
                errors.append(
                    (f"{argument}.refreservation", "use 0, or the size of the volume", errno.EINVAL)
                )
        else:
            given = model.model_fields_set
            errors.extend(
                (f"{argument}.{name}", "This field is not valid for FILESYSTEM", errno.EINVAL)
                for name in ("volsize", "volblocksize", "sparse", "force_size")
                if name in given and getattr(model, name)
            )
            if model.refreservation:
                errors.append((f"{argument}.refreservation", FULL, errno.EINVAL))
        if "/" not in model.name:
            errors.append((f"{argument}.name", "You need a full name, e.g. pool/newdataset", errno.EINVAL))
        if errors:
            raise ArgumentsError(errors)
        request = DatasetRequest(
            name=model.name,
            kind=model.type,
            size_bytes=model.volsize or 0,
            block_size=block_size(model.volblocksize),
            sparse=model.sparse and not model.refreservation,
            ancestors=model.create_ancestors,
            comments=model.comments,
            properties={one.key: _value(one.value) for one in model.user_properties},
        )
        try:
            await self.datasets.create(request)
        except DatasetError as error:
            if error.error in (errno.EEXIST, errno.ENOENT):
                text = f"{model.name} already exists" if error.error == errno.EEXIST else str(error)
                raise ArgumentsError([(f"{argument}.name", text, error.error)]) from None
            raise call_error(error) from None
        note("datasets", model.name, None, {"type": model.type, "volsize": model.volsize})
        return await self._one(call, model.name)

    async def _one(self, call: Call, name: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.get_instance(call, name, QueryOptions())
        return found

    async def _there(self, name: str) -> DatasetStatus:
        try:
            found = await self.datasets.dataset(name)
        except DatasetError as error:
            raise call_error(error) from None
        if found is None:
            raise CallError(f"{name} does not exist", errno.ENOENT)
        return found

    async def update(self, call: Call, id: str, model: DatasetUpdate) -> dict[str, Any]:
        status = await self._there(id)
        given = model.model_fields_set
        changes: dict[str, str | None] = {}
        if "user_properties" in given:
            changes |= dict.fromkeys(status.properties)
            changes |= {one.key: _value(one.value) for one in model.user_properties}
        for one in model.user_properties_update:
            changes[one.key] = None if one.remove or one.value is None else _value(one.value)
        if model.volsize is not None:
            self._check_size(status, model.volsize)
        try:
            if model.volsize is not None and model.volsize != status.size_bytes:
                await self.datasets.resize(id, model.volsize)
                await self.engine.look_again(f"{DEVICES}{id}")
                note("datasets", id, {"volsize": status.size_bytes}, {"volsize": model.volsize})
            if changes or model.comments is not None:
                await self.datasets.describe(id, model.comments, changes)
        except DatasetError as error:
            raise call_error(error) from None
        return await self._one(call, id)

    def _check_size(self, status: DatasetStatus, volsize: int) -> None:
        where = "pool_dataset_update.volsize"
        if status.kind != "VOLUME":
            raise ArgumentsError([(where, "This field is not valid for FILESYSTEM", errno.EINVAL)])
        if volsize < status.size_bytes:
            raise ArgumentsError(
                [
                    (
                        where,
                        f"You cannot shrink a zvol from its size of {status.size_bytes} bytes",
                        errno.EINVAL,
                    )
                ]
            )

    async def delete(self, call: Call, id: str, options: DeleteOptions) -> bool:
        await self._there(id)
        self.check_unused(id, "destroy")
        try:
            await self.datasets.destroy(id, options.recursive)
        except DatasetError as error:
            raise call_error(error) from None
        note("datasets", id, {"name": id}, None)
        return True

    def check_unused(self, name: str, what: str) -> None:
        """Refuse while an extent is on a dataset, or below it.

        Raises:
            CallError: EBUSY, with the extent's name.
        """
        user = extent_on(self.engine.configuration, name)
        if user:
            raise CallError(f"cannot {what} '{name}': dataset is busy: extent {user} is on it", errno.EBUSY)

    async def rename(self, call: Call, id: str, options: RenameOptions) -> None:
        await self._there(id)
        self.check_unused(id, "rename")
        try:
            await self.datasets.rename(id, options.new_name)
        except DatasetError as error:
            raise call_error(error) from None
        note("datasets", id, {"name": id}, {"name": options.new_name})

    async def promote(self, call: Call, id: str) -> None:
        try:
            await self.datasets.promote(id)
        except DatasetError as error:
            raise call_error(error) from None
        note("datasets", id, None, {"promoted": True})

    def methods(self) -> Iterator[Method]:
        """All of them."""
        id, rest = Parameter("id", str), "/pool/dataset"
        yield reading("pool.query", "List pools.", self.pools, *PARAMETERS, rest=("GET", "/pool"))
        yield reading(
            "pool.dataset.query",
            "List volumes and file systems. extra: snapshots, retrieve_children.",
            self.query,
            *PARAMETERS,
            rest=("GET", rest),
        )
        yield reading(
            "pool.dataset.get_instance",
            "Show a volume or a file system.",
            self.get_instance,
            id,
            PARAMETERS[1],
            rest=("GET", f"{rest}/id/{{id}}"),
        )
        yield writing(
            "pool.dataset.create",
            "Create a volume or a file system.",
            self.create,
            Parameter("pool_dataset_create", DatasetCreate),
            rest=("POST", rest),
        )
        yield writing(
            "pool.dataset.update",
            "Grow a volume, set comments and user properties.",
            self.update,
            id,
            Parameter("pool_dataset_update", DatasetUpdate),
            rest=("PUT", f"{rest}/id/{{id}}"),
        )
        yield replace(
            writing(
                "pool.dataset.delete",
                "Destroy a volume or a file system that no extent is on.",
                self.delete,
                id,
                Parameter("dataset_delete", DeleteOptions, DeleteOptions),
                rest=("DELETE", f"{rest}/id/{{id}}"),
            ),
            absent_status=422,
        )
        yield writing(
            "pool.dataset.rename",
            "Give another name.",
            self.rename,
            id,
            Parameter("pool_dataset_rename", RenameOptions),
            rest=("POST", f"{rest}/id/{{id}}/rename"),
        )
        yield writing(
            "pool.dataset.promote",
            "Make a clone independent of where it came from.",
            self.promote,
            id,
            rest=("POST", f"{rest}/id/{{id}}/promote"),
        )


def _value(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pool(number: int, pool: Dataset) -> dict[str, Any]:
    healthy = pool.status == "HEALTHY"
    return {
        "id": number,
        "name": pool.name,
        "guid": str(zlib.crc32(pool.name.encode())),
        "path": pool.mountpoint,
        "status": "ONLINE" if healthy else pool.status,
        "healthy": healthy,
        "warning": False,
        "size": pool.used + pool.available,
        "allocated": pool.used,
        "free": pool.available,
        "is_decrypted": True,
    }
