"""Snapshots and file systems of API v1.0, as the Cinder driver and OpenSVC call them."""

from pathlib import Path
from typing import Any

import pytest

from api.resources.snapshot import SnapshotResource
from api.resources.storage import StorageResource
from targetd.datasets.service import DatasetService
from targetd.volumes import Pools
from tests.api.conftest import Api
from tests.api.engine import MemoryEngine
from tests.targetd.test_datasets import MemoryRecords

V1 = "/api/v1.0/storage"
MB = 1 << 20


@pytest.fixture
def further(engine: MemoryEngine, tmp_path: Path) -> list[Any]:
    pools = Pools({"tank": tmp_path})
    return [
        StorageResource(engine, pools),
        SnapshotResource(engine, DatasetService(pools, MemoryRecords())),
    ]


async def volume(api: Api, name: str = "volume-1") -> None:
    made = await api.post(f"{V1}/volume/tank/zvols/", {"name": name, "volsize": 4 * MB})
    assert made.status == 202


async def test_snapshot_clone_and_their_end(api: Api, tmp_path: Path) -> None:
    await volume(api)
    (tmp_path / "zvols" / "volume-1").write_bytes(b"before" + bytes(4 * MB - 6))
    taken = await api.post(f"{V1}/snapshot/", {"dataset": "tank/volume-1", "name": "snap-1"})
    assert taken.status == 201
    assert taken.json["fullname"] == "tank/volume-1@snap-1" and taken.json["mostrecent"] is True
    (tmp_path / "zvols" / "volume-1").write_bytes(b"after!" + bytes(4 * MB - 6))
    cloned = await api.post(f"{V1}/snapshot/tank%2Fvolume-1@snap-1/clone/", {"name": "tank/volume-2"})
    assert (cloned.status, cloned.json) == (202, "Snapshot cloned.")
    assert (tmp_path / "zvols" / "volume-2").read_bytes()[:6] == b"before"
    kept = await api.delete(f"{V1}/volume/tank/zvols/volume-1/")
    assert kept.status == 400 and "has snapshots: volume-1@snap-1" in kept.json["error_message"]
    back = await api.post(f"{V1}/snapshot/tank%2Fvolume-1@snap-1/rollback/", {})
    assert back.status == 202
    assert (tmp_path / "zvols" / "volume-1").read_bytes()[:6] == b"before"
    assert (await api.delete(f"{V1}/snapshot/tank%2Fvolume-1@snap-1/")).status == 204
    assert (await api.get(f"{V1}/snapshot/tank%2Fvolume-1@snap-1/")).status == 404
    assert (await api.get(f"{V1}/snapshot/")).json == []


async def test_a_cascade_takes_the_snapshots_along(api: Api) -> None:
    await volume(api)
    await api.post(f"{V1}/snapshot/", {"dataset": "tank/volume-1", "name": "s"})
    assert (await api.delete(f"{V1}/volume/tank/zvols/volume-1/", {"cascade": True})).status == 204
    assert (await api.get(f"{V1}/snapshot/")).json == []


async def test_the_latest_snapshot_is_told(api: Api) -> None:
    await volume(api)
    for name in ("a", "b"):
        assert (await api.post(f"{V1}/snapshot/", {"dataset": "tank/volume-1", "name": name})).status == 201
    listed = (await api.get(f"{V1}/snapshot/?limit=0")).json
    assert [(one["name"], one["mostrecent"]) for one in listed] == [("a", False), ("b", True)]
    assert listed[0]["parent_type"] == "volume"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 409, "dataset"),
        ({"dataset": "tank/volume-1"}, 409, "name"),
        ({"dataset": "tank/none", "name": "s"}, 400, "does not exist"),
        ({"dataset": "tank/volume-1", "name": "a/b"}, 400, "invalid snapshot name"),
        ({"dataset": "tank/volume-1", "name": "there"}, 400, "already exists"),
        ({"dataset": "tank/volume-1", "name": 5}, 409, "name"),
    ],
)
async def test_a_snapshot_that_cannot_be_is_refused_in_words(
    api: Api, body: dict[str, Any], status: int, words: str
) -> None:
    await volume(api)
    await api.post(f"{V1}/snapshot/", {"dataset": "tank/volume-1", "name": "there"})
    found = await api.post(f"{V1}/snapshot/", body)
    assert found.status == status and words in found.raw.decode()


async def test_file_systems_of_a_pool(api: Api, tmp_path: Path) -> None:
    made = await api.post(f"{V1}/volume/tank/datasets/", {"name": "svc"})
    assert made.status == 201 and made.json["mountpoint"] == str(tmp_path / "svc")
    assert [one["name"] for one in (await api.get(f"{V1}/volume/tank/datasets/")).json] == ["svc"]
    assert (await api.get(f"{V1}/volume/tank/datasets/svc/")).json["pool"] == "tank"
    assert (await api.get(f"{V1}/volume/none/datasets/")).status == 404
    again = await api.post(f"{V1}/volume/tank/datasets/", {"name": "svc"})
    assert again.status == 400 and "already exists" in again.json["error_message"]
    (tmp_path / "svc" / "file").touch()
    full = await api.delete(f"{V1}/volume/tank/datasets/svc/")
    assert full.status == 400 and "not empty" in full.json["error_message"]
    (tmp_path / "svc" / "file").unlink()
    assert (await api.delete(f"{V1}/volume/tank/datasets/svc/")).status == 204
