"""``zfs.snapshot.*`` and ``pool.snapshot.*`` (the same), and ``replication.run_onetime`` within a host."""

import asyncio
import errno
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from api.audit import note
from api.dataset_use import DEVICES, initiator_on
from api.v2.datasets import call_error, parsed
from api.v2.errors import ArgumentsError, CallError
from api.v2.jobs import Job, Jobs
from api.v2.methods import Call, Method, Model, Parameter, reading, writing
from api.v2.query import PARAMETERS, QueryOptions, select
from targetd.interface import DatasetError, Datasets, Engine, SnapshotStatus

__all__ = ["SnapshotMethods"]


class SnapshotCreate(Model):
    dataset: str
    name: str
    recursive: bool = False
    properties: dict[str, str] = Field(default_factory=dict)


class SnapshotDelete(Model):
    recursive: bool = False
    defer: bool = False


class SnapshotClone(Model):
    snapshot: str
    dataset_dst: str
    dataset_properties: dict[str, str] = Field(default_factory=dict)


class RollbackOptions(Model):
    recursive: Literal[False] = False
    force: bool = False


class SnapshotRename(Model):
    new_name: str


class Replication(Model):
    """A copy of one snapshot, or of the newest, to another dataset of this host."""

    direction: Literal["PUSH"] = "PUSH"
    transport: Literal["LOCAL"] = "LOCAL"
    source_datasets: list[str]
    target_dataset: str
    recursive: Literal[False] = False
    name_regex: str | None = None
    naming_schema: list[str] = Field(default_factory=list)
    also_include_naming_schema: list[str] = Field(default_factory=list)
    retention_policy: Literal["NONE", "SOURCE"] = "NONE"
    allow_from_scratch: bool = True
    only_from_scratch: bool = False
    readonly: Literal["IGNORE"] = "IGNORE"
    properties: bool = False
    replicate: Literal[False] = False
    replicate_snapshots: bool = False
    encryption: Literal[False] = False
    hold_pending_snapshots: Literal[False] = False
    name: str | None = None


class SnapshotMethods:
    """Snapshots, clones, copies."""

    def __init__(self, engine: Engine, datasets: Datasets, jobs: Jobs) -> None:
        self.engine = engine
        self.datasets = datasets
        self.jobs = jobs

    def show(self, one: SnapshotStatus) -> dict[str, Any]:
        """One snapshot."""
        created = {"$date": int(one.created * 1000)}
        properties: dict[str, Any] = {
            "creation": {
                "value": str(int(one.created)),
                "rawvalue": str(int(one.created)),
                "parsed": created,
            },
            "used": parsed(one.used, "NONE"),
            "referenced": parsed(one.referenced, "NONE"),
            **({"volsize": parsed(one.size_bytes)} if one.size_bytes else {}),
            **{key: parsed(value) for key, value in one.properties.items()},
        }
        return {
            "id": one.full_name,
            "name": one.full_name,
            "pool": one.dataset.partition("/")[0],
            "type": "SNAPSHOT",
            "dataset": one.dataset,
            "snapshot_name": one.name,
            "createtxg": str(int(one.created)),
            "holds": {},
            "properties": properties,
            "user_properties": dict(one.properties),
        }

    async def _all(self) -> list[dict[str, Any]]:
        try:
            return [self.show(one) for one in await self.datasets.snapshots()]
        except DatasetError as error:
            raise call_error(error) from None

    async def query(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return select(await self._all(), filters, options)

    async def get_instance(self, call: Call, id: str, options: QueryOptions) -> Any:
        found = [one for one in await self._all() if one["id"] == id]
        if not found:
            raise CallError(f"{id} does not exist", errno.ENOENT)
        return select(found, [], options.model_copy(update={"get": True}))

    async def create(self, call: Call, model: SnapshotCreate) -> dict[str, Any]:
        busy = bool(await initiator_on(self.engine, model.dataset))
        try:
            made = await self.datasets.snapshot(
                model.dataset, model.name, model.properties, busy, model.recursive
            )
        except DatasetError as error:
            if error.error == errno.EEXIST:
                raise ArgumentsError([("snapshot_create.name", str(error), errno.EEXIST)]) from None
            raise call_error(error) from None
        note("snapshots", made.full_name, None, {"name": made.full_name})
        return self.show(made)

    async def delete(self, call: Call, id: str, options: SnapshotDelete) -> bool:
        try:
            await self.datasets.destroy_snapshot(id, options.recursive)
        except DatasetError as error:
            raise call_error(error) from None
        note("snapshots", id, {"name": id}, None)
        return True

    async def clone(self, call: Call, model: SnapshotClone) -> bool:
        properties = {key: value for key, value in model.dataset_properties.items() if ":" in key}
        unknown = sorted(model.dataset_properties.keys() - properties.keys())
        if unknown:
            raise ArgumentsError(
                [("snapshot_clone.dataset_properties", f"{unknown[0]}: user properties only", errno.EINVAL)]
            )
        try:
            await self.datasets.clone(model.snapshot, model.dataset_dst, properties)
        except DatasetError as error:
            raise call_error(error) from None
        note("datasets", model.dataset_dst, None, {"origin": model.snapshot})
        return True

    async def rollback(self, call: Call, id: str, options: RollbackOptions) -> None:
        dataset = id.partition("@")[0]
        user = await initiator_on(self.engine, dataset)
        if user:
            raise CallError(f"cannot rollback '{dataset}': dataset is busy: {user} is logged in", errno.EBUSY)
        try:
            await self.datasets.rollback(id)
        except DatasetError as error:
            raise call_error(error) from None
        await self.engine.look_again(f"{DEVICES}{dataset}")
        note("datasets", dataset, None, {"rolled back to": id})

    async def rename(self, call: Call, id: str, model: SnapshotRename) -> None:
        try:
            await self.datasets.rename_snapshot(id, model.new_name)
        except DatasetError as error:
            raise call_error(error) from None
        note("snapshots", id, {"name": id}, {"name": model.new_name})

    # -- copies -----------------------------------------------------------------------------------

    async def replicate(self, call: Call, model: Replication) -> int:
        """A local copy as a job; its number."""
        if len(model.source_datasets) != 1:
            raise ArgumentsError(
                [("replication_run_onetime.source_datasets", "one dataset is copied at a time", errno.EINVAL)]
            )
        source = model.source_datasets[0]
        query = [["dataset", "=", source]]
        if model.name_regex:
            query.append(["snapshot_name", "~", f"(?:{model.name_regex})$"])
        found = select(await self._all(), query, QueryOptions(order_by=["-createtxg"]))
        if not found:
            raise CallError(f"'{source}' has no snapshot to copy", errno.ENOENT)
        snapshot = str(found[0]["id"])
        loop = asyncio.get_running_loop()

        stopped = threading.Event()

        async def work(job: Job) -> None:
            def progress(done: int, total: int) -> None:
                if stopped.is_set():
                    raise DatasetError(errno.ECANCELED, "aborted")
                percent = 100.0 * done / total if total else 100.0
                told = self.jobs.progress(job, percent, f"{done} of {total} bytes copied")
                asyncio.run_coroutine_threadsafe(told, loop)

            try:
                await self.datasets.copy(snapshot, model.target_dataset, progress)
                if model.replicate_snapshots or model.retention_policy == "SOURCE":
                    await self.datasets.snapshot(
                        model.target_dataset, snapshot.partition("@")[2], {}, in_use=False, recursive=False
                    )
            except DatasetError as error:
                raise call_error(error) from None
            except asyncio.CancelledError:
                stopped.set()
                raise

        job = await self.jobs.start("replication.run_onetime", [model.model_dump(exclude_unset=True)], work)
        note("datasets", model.target_dataset, None, {"copy of": snapshot})
        return job.id

    def methods(self) -> Iterator[Method]:
        """All of them; both families are the same."""
        id = Parameter("id", str)
        for family, rest in (("zfs.snapshot", "/zfs/snapshot"), ("pool.snapshot", "/pool/snapshot")):
            yield reading(f"{family}.query", "List snapshots.", self.query, *PARAMETERS, rest=("GET", rest))
            yield reading(
                f"{family}.get_instance",
                "Show a snapshot.",
                self.get_instance,
                id,
                PARAMETERS[1],
                rest=("GET", f"{rest}/id/{{id}}"),
            )
            yield writing(
                f"{family}.create",
                "Take a snapshot, consistent after a crash, with sessions open.",
                self.create,
                Parameter("snapshot_create", SnapshotCreate),
                rest=("POST", rest),
            )
            yield writing(
                f"{family}.delete",
                "Destroy a snapshot.",
                self.delete,
                id,
                Parameter("options", SnapshotDelete, SnapshotDelete),
                rest=("DELETE", f"{rest}/id/{{id}}"),
            )
            yield writing(
                f"{family}.clone",
                "Make a volume of a snapshot.",
                self.clone,
                Parameter("snapshot_clone", SnapshotClone),
                rest=("POST", f"{rest}/clone"),
            )
            yield writing(
                f"{family}.rollback",
                "Make a dataset what its latest snapshot is; not while an initiator is logged in.",
                self.rollback,
                id,
                Parameter("options", RollbackOptions, RollbackOptions),
                rest=("POST", f"{rest}/rollback"),
            )
            yield writing(
                f"{family}.rename",
                "Give a snapshot another name.",
                self.rename,
                id,
                Parameter("options", SnapshotRename),
            )
        yield replace(
            writing(
                "replication.run_onetime",
                "Copy the newest snapshot of a dataset to a new dataset of this host, as a job.",
                self.replicate,
                Parameter("replication_run_onetime", Replication),
                rest=("POST", "/replication/run_onetime"),
            ),
            job=True,
        )
