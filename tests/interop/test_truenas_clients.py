"""What clients of TrueNAS ask for, against the real daemon over a directory pool: REST v2.0 and JSON-RPC 2.0.

The sequences are those that democratic-csi (REST), the Proxmox plugin and Incus' tool (JSON-RPC) send for the
life of one volume; each is followed by a login to what was made and verified I/O.
"""

import asyncio
import errno
import json
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from pytruenas.connection import TrueNASWSConnection
from pytruenas.exceptions import ClientException, ValidationErrors
from yarl import URL

from tests.daemon import HOST, Daemon
from tests.interop.using import gone, use

BASENAME = "iqn.2011-03.org.example.istgt"
MB = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    pool = tmp_path_factory.mktemp("tank")
    daemon = Daemon(tmp_path_factory.mktemp("truenas"), ["--pool", f"tank={pool}"]).start()
    yield daemon
    assert not daemon.tracebacks()
    assert daemon.terminate() == 0


@pytest.fixture(scope="module")
def key(daemon: Daemon) -> str:
    made = daemon.expect(201, "POST", "account/keys/", {"name": "client"})
    return str(made["key"])


class Rest:
    """A client of REST v2.0 with an API key."""

    def __init__(self, session: aiohttp.ClientSession, daemon: Daemon, key: str) -> None:
        self.session = session
        self.base = f"http://{HOST}:{daemon.api_port}/api/v2.0"
        self.headers = {"Authorization": f"Bearer {key}"}

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        url = URL(self.base + path, encoded=True)
        async with self.session.request(method, url, json=body, headers=self.headers) as response:
            return response.status, json.loads(await response.text() or "null")

    async def expect(self, status: int, method: str, path: str, body: Any = None) -> Any:
        found, answer = await self.ask(method, path, body)
        assert found == status, f"{method} {path}: {found} {answer}"
        return answer


@pytest.fixture
async def rest(daemon: Daemon, key: str) -> AsyncIterator[Rest]:
    async with aiohttp.ClientSession() as session:
        yield Rest(session, daemon, key)


def dataset(name: str) -> str:
    return f"/pool/dataset/id/{urllib.parse.quote(name, safe='')}"


PROPERTIES = ("target_id", "extent_id", "targettoextent_id", "assets_name", "share_volume_context", "success")


async def csi_create(rest: Rest, name: str) -> str:
    """Create a volume as democratic-csi does, every step of which may have been done before."""
    assert "SCALE" in await rest.expect(200, "GET", "/system/version/")
    volume = f"tank/csi/{name}"
    body = {
        "refreservation": 0, "volblocksize": "16K", "type": "VOLUME", "volsize": 64 * MB, "sparse": True,
        "create_ancestors": True, "share_type": "GENERIC", "name": volume,
        "user_properties": [{"key": "democratic-csi:csi_volume_name", "value": name}],
    }  # fmt: skip
    status, answer = await rest.ask("POST", "/pool/dataset", body)
    assert status == 200 or (status == 422 and "already exists" in json.dumps(answer))
    await rest.expect(200, "PUT", dataset(volume), {"volsize": 64 * MB, "user_properties_update": []})
    known = (await rest.expect(200, "GET", dataset(volume)))["user_properties"]

    async def remember(what: str, value: object) -> None:
        update = [{"key": f"democratic-csi:{what}", "value": value}]
        await rest.expect(200, "PUT", dataset(volume), {"user_properties_update": update})

    basename = (await rest.expect(200, "GET", "/iscsi/global"))["basename"]
    target = {
        "name": f"csi-{name}", "alias": None, "mode": "ISCSI",
        "groups": [{"portal": 1, "initiator": 1, "auth": None, "authmethod": "NONE"}],
    }  # fmt: skip
    extent = {
        "comment": "", "type": "DISK", "name": f"csi-{name}", "disk": f"zvol/{volume}",

        "insecure_tpc": True, "xen": False, "avail_threshold": None, "blocksize": 512,
        "pblocksize": True, "rpm": "SSD", "ro": False,
    }  # fmt: skip
    ids: dict[str, int] = {}
    for kind, wanted, message in (
        ("target", target, "Target name already exists"),
        ("extent", extent, "Extent name must be unique"),
    ):
        status, answer = await rest.ask("POST", f"/iscsi/{kind}", wanted)
        if status == 422:
            assert message in json.dumps(answer)
            listed = await rest.expect(200, "GET", f"/iscsi/{kind}?limit=100&offset=0&name=csi-{name}")
            answer = listed[0]
        ids[kind] = answer["id"]
        await remember(f"{kind}_id", answer["id"])
    status, answer = await rest.ask(
        "POST", "/iscsi/targetextent", {"target": ids["target"], "extent": ids["extent"], "lunid": 0}
    )
    if status == 422:
        assert "LUN ID is already being used for this target." in json.dumps(answer)
        answer = (await rest.expect(200, "GET", f"/iscsi/targetextent?target={ids['target']}"))[0]
    await remember("targettoextent_id", answer["id"])
    await remember("assets_name", f"csi-{name}")
    await remember("share_volume_context", json.dumps({"iqn": f"{basename}:csi-{name}", "lun": 0}))
    await remember("success", "true")
    found = (await rest.expect(200, "GET", dataset(volume)))["user_properties"]
    assert {f"democratic-csi:{what}" for what in PROPERTIES} <= found.keys()
    assert known.items() <= found.items() or "democratic-csi:success" in known
    return f"{basename}:csi-{name}"


async def csi_delete(rest: Rest, name: str) -> None:
    """Delete a volume by what its properties say, every step of which may have been done before."""
    volume = f"tank/csi/{name}"
    status, found = await rest.ask("GET", dataset(volume))
    if status == 200:
        properties = found["user_properties"]
        for kind in ("target", "extent"):
            id = properties[f"democratic-csi:{kind}_id"]["value"]
            status, answer = await rest.ask("GET", f"/iscsi/{kind}/id/{id}")
            if status == 200:
                assert answer["name"] == f"csi-{name}"
                await rest.expect(200, "DELETE", f"/iscsi/{kind}/id/{id}")
            remove = [{"key": f"democratic-csi:{kind}_id", "remove": True}]
            await rest.expect(200, "PUT", dataset(volume), {"user_properties_update": remove})
    status, answer = await rest.ask("DELETE", dataset(volume), {"recursive": True, "force": True})
    assert status == 200 or (status == 422 and "does not exist" in json.dumps(answer))


async def test_democratic_csi(daemon: Daemon, rest: Rest) -> None:
    """One volume: made twice, used, expanded, snapshot and clone, deleted twice; nothing is left."""
    await rest.expect(200, "POST", "/pool/dataset", {"create_ancestors": True, "name": "tank/csi"})
    iqn = await csi_create(rest, "pvc-1")
    assert await csi_create(rest, "pvc-1") == iqn
    await asyncio.to_thread(use, daemon, iqn, 0, 64 * MB)
    await rest.expect(
        200, "PUT", dataset("tank/csi/pvc-1"), {"volsize": 128 * MB, "user_properties_update": []}
    )
    await asyncio.to_thread(use, daemon, iqn, 0, 128 * MB)
    snapshot = {
        "dataset": "tank/csi/pvc-1",
        "name": "snap-1",
        "properties": {"democratic-csi:managed": "true"},
    }
    taken = await rest.expect(200, "POST", "/zfs/snapshot", snapshot)
    assert taken["id"] == "tank/csi/pvc-1@snap-1" and taken["properties"]["volsize"]["parsed"] == 128 * MB
    again = await rest.expect(422, "POST", "/zfs/snapshot", snapshot)
    assert "already exists" in json.dumps(again)
    listed = await rest.expect(200, "GET", f"{dataset('tank/csi/pvc-1')}?extra.snapshots=1")
    assert [one["id"] for one in listed["snapshots"]] == ["tank/csi/pvc-1@snap-1"]
    await rest.expect(
        200,
        "POST",
        "/zfs/snapshot/clone",
        {"snapshot": "tank/csi/pvc-1@snap-1", "dataset_dst": "tank/csi/pvc-2"},
    )
    assert (await rest.expect(200, "GET", dataset("tank/csi/pvc-2")))["origin"][
        "value"
    ] == "tank/csi/pvc-1@snap-1"
    await rest.expect(200, "DELETE", dataset("tank/csi/pvc-2"))
    await csi_delete(rest, "pvc-1")
    await csi_delete(rest, "pvc-1")
    await asyncio.to_thread(gone, daemon, iqn)
    assert await rest.expect(200, "GET", "/zfs/snapshot") == []
    assert [one["id"] for one in await rest.expect(200, "GET", "/pool/dataset")] == ["tank", "tank/csi"]
    for kind in ("target", "extent", "targetextent"):
        assert await rest.expect(200, "GET", f"/iscsi/{kind}") == []


async def test_democratic_csi_eight_at_once(daemon: Daemon, rest: Rest) -> None:
    """Eight volumes at the same time, each twice; nothing of one is another's, nothing is left."""
    names = [f"pvc-{number}" for number in range(8)]
    iqns = await asyncio.gather(*(csi_create(rest, name) for name in names))
    assert len(set(iqns)) == 8
    assert await asyncio.gather(*(csi_create(rest, name) for name in names)) == iqns
    for iqn in iqns:
        await asyncio.to_thread(use, daemon, iqn, 0, 64 * MB)
    await asyncio.gather(*(csi_delete(rest, name) for name in names))
    for kind in ("target", "extent", "targetextent"):
        assert await rest.expect(200, "GET", f"/iscsi/{kind}") == []


class Socket:
    """A client of JSON-RPC: one call after the other."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.number = 0

    async def answer(self, method: str, *given: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json(
            {"id": self.number, "jsonrpc": "2.0", "method": method, "params": list(given)}
        )
        while True:
            message: dict[str, Any] = await self.socket.receive_json(timeout=30)
            if message.get("id") == self.number:
                return message

    async def call(self, method: str, *given: Any) -> Any:
        message = await self.answer(method, *given)
        assert "result" in message, message
        return message["result"]

    async def job(self, method: str, *given: Any) -> Any:
        """The result of a job, by its notifications."""
        id = await self.call(method, *given)
        while True:
            (job,) = await self.call("core.get_jobs", [["id", "=", id]])
            if job["state"] != "RUNNING":
                assert job["state"] == "SUCCESS", job
                return job["result"]
            event = await self.socket.receive_json(timeout=30)
            assert event["params"]["collection"] == "core.get_jobs"


@pytest.fixture
async def socket(daemon: Daemon, key: str) -> AsyncIterator[Socket]:
    async with aiohttp.ClientSession() as session:
        url = f"ws://{HOST}:{daemon.api_port}/api/current"
        async with session.ws_connect(url) as connected:
            client = Socket(connected)
            assert await client.call("auth.login_with_api_key", key) is True
            yield client


async def test_proxmox_plugin(daemon: Daemon, socket: Socket) -> None:
    """Three disks of one target, looked up by path, one resized, one snapshot, all deleted."""
    assert await socket.call("system.version") == "TrueNAS-SCALE-25.04.2"
    basename = (await socket.call("iscsi.global.config"))["basename"]
    await socket.call("iscsi.target.create", {"name": "pve", "groups": [{"portal": 1}]})
    target = await socket.call("iscsi.target.query", [["name", "=", "pve"]], {"get": True})
    assert await socket.call("iscsi.targetextent.query", [["target", "=", target["id"]]], {}) == []
    for number in range(3):
        name = f"vm-100-disk-{number}"
        await socket.call(
            "pool.dataset.create",
            {"name": f"tank/{name}", "type": "VOLUME", "volsize": 64 * MB, "sparse": True},
        )
        extent = await socket.call(
            "iscsi.extent.create", {"type": "DISK", "name": f"tank-{name}", "disk": f"zvol/tank/{name}"}
        )
        await socket.call(
            "iscsi.targetextent.create", {"target": target["id"], "extent": extent["id"], "lunid": number}
        )
    for number in range(3):
        await asyncio.to_thread(use, daemon, f"{basename}:pve", number, 64 * MB)
    again = await socket.answer(
        "iscsi.extent.create",
        {"type": "DISK", "name": "tank-vm-100-disk-0", "disk": "zvol/tank/vm-100-disk-0"},
    )
    assert "Extent name must be unique" in again["error"]["data"]["reason"]
    await socket.call("pool.dataset.update", "tank/vm-100-disk-1", {"volsize": 96 * MB})
    await asyncio.to_thread(use, daemon, f"{basename}:pve", 1, 96 * MB)
    await socket.call("zfs.snapshot.create", {"dataset": "tank/vm-100-disk-1", "name": "before"})
    await socket.call("zfs.snapshot.rollback", "tank/vm-100-disk-1@before", {"force": True})
    await socket.call("zfs.snapshot.delete", "tank/vm-100-disk-1@before")
    for number in range(3):
        disk = f"zvol/tank/vm-100-disk-{number}"
        extent = await socket.call("iscsi.extent.query", [["disk", "=", disk]], {"get": True})
        wanted = [["extent", "=", extent["id"]], ["target", "=", target["id"]]]
        mapping = await socket.call("iscsi.targetextent.query", wanted, {"get": True})
        assert mapping["lunid"] == number
        assert await socket.call("iscsi.targetextent.delete", mapping["id"], True) is True
        assert await socket.call("iscsi.extent.delete", extent["id"], False, True) is True
        assert (
            await socket.call("pool.dataset.delete", f"tank/vm-100-disk-{number}", {"recursive": True})
            is True
        )
    none = await socket.answer("iscsi.extent.query", [["disk", "=", disk]], {"get": True})
    assert none["error"]["data"]["errname"] == "ENOENT"
    await socket.call("iscsi.target.delete", target["id"], True)


async def test_incus(daemon: Daemon, socket: Socket) -> None:
    """The service, a portal by its addresses, one volume with its target, snapshot, clone, rename, bulk."""
    assert await socket.call("core.subscribe", "core.get_jobs")
    assert await socket.call("service.update", "iscsitarget", {"enable": True}) == 1
    assert await socket.call("service.start", "iscsitarget", {}) is True
    assert await socket.call("service.started", "iscsitarget") is True
    listen = [{"ip": HOST, "port": daemon.portal_port}]
    (portal,) = await socket.call("iscsi.portal.query", [["listen", "=", listen]], {})
    (group,) = await socket.call("iscsi.initiator.query", [], {})
    assert group["initiators"] == []
    options = {
        "extra": {"flat": False, "properties": None, "retrieve_children": False, "user_properties": False}
    }
    name = "tank/incus/vol1"
    await socket.call("pool.dataset.create", {"name": "tank/incus"})
    await socket.call(
        "pool.dataset.create", {"name": name, "sparse": True, "type": "VOLUME", "volsize": 64 * MB}
    )
    assert await socket.call("iscsi.target.query", [["alias", "in", [name]]], options) == []
    target = await socket.call(
        "iscsi.target.create",
        {"alias": name, "groups": [{"initiator": group["id"], "portal": portal["id"]}], "name": "incus:vol1"},
    )
    assert await socket.call("iscsi.extent.query", [["disk", "in", [f"zvol/{name}"]]], options) == []
    extent = await socket.call(
        "iscsi.extent.create", {"disk": f"zvol/{name}", "name": "incus:vol1", "ro": False}
    )
    await socket.call(
        "iscsi.targetextent.create", {"extent": extent["id"], "lunid": 0, "target": target["id"]}
    )
    await asyncio.to_thread(use, daemon, f"{BASENAME}:incus:vol1", 0, 64 * MB)
    await socket.call("pool.dataset.update", name, {"volsize": 128 * MB})
    await socket.call(
        "zfs.snapshot.create", {"dataset": name, "name": "s1", "properties": {}, "recursive": False}
    )
    await socket.call("zfs.snapshot.clone", {"snapshot": f"{name}@s1", "dataset_dst": "tank/incus/vol2"})
    await socket.call("pool.dataset.rename", "tank/incus/vol2", {"new_name": "tank/incus/vol3"})
    await socket.call("pool.dataset.promote", "tank/incus/vol3")
    found = await socket.call("pool.dataset.query", [["name", "in", [name]]], options)
    assert found[0]["volsize"]["parsed"] == 128 * MB
    busy = await socket.answer("pool.dataset.delete", name, {"recursive": True})
    assert "dataset is busy" in busy["error"]["data"]["reason"]
    removed = await socket.job("core.bulk", "iscsi.target.delete", [[target["id"], True, True]])
    assert removed == [{"job_id": None, "result": True, "error": None}]
    assert await socket.call("iscsi.extent.query", [["id", "=", extent["id"]]]) == []
    await socket.job(
        "core.bulk",
        "pool.dataset.delete",
        [[name, {"recursive": True}], ["tank/incus/vol3", {"recursive": True}]],
    )
    await socket.call("pool.dataset.delete", "tank/incus", {"recursive": True})
    await asyncio.to_thread(gone, daemon, f"{BASENAME}:incus:vol1")


def test_a_client_library_that_others_wrote(daemon: Daemon, key: str) -> None:
    """pytruenas: JSON-RPC 2.0, its own decoding of answers, errors and events."""
    url = f"ws://{HOST}:{daemon.api_port}/api/current"
    with TrueNASWSConnection(url) as client:
        assert client.call("auth.login_with_api_key", key) is True
        jobs = client.subscribe("core.get_jobs")
        made = client.call(
            "pool.dataset.create", {"name": "tank/lib", "type": "VOLUME", "volsize": MB, "sparse": True}
        )
        assert made["volsize"]["parsed"] == MB
        with pytest.raises(ValidationErrors, match="already exists"):
            client.call("pool.dataset.create", {"name": "tank/lib", "type": "VOLUME", "volsize": MB})
        with pytest.raises(ClientException) as caught:
            client.call("pool.dataset.get_instance", "tank/none")
        assert caught.value.errno == errno.ENOENT
        client.call("zfs.snapshot.create", {"dataset": "tank/lib", "name": "s"})
        job = client.call(
            "replication.run_onetime", {"source_datasets": ["tank/lib"], "target_dataset": "tank/lib2"}
        )
        for event in jobs.events(timeout=30):
            if event.fields["id"] == job and event.fields["state"] != "RUNNING":
                assert event.fields["state"] == "SUCCESS"
                break
        for name in ("tank/lib", "tank/lib2"):
            assert client.call("pool.dataset.delete", name, {"recursive": True}) is True


async def test_properties_and_snapshots_outlive_the_daemon(daemon: Daemon, key: str) -> None:
    """democratic-csi's database is in user properties: a kill -9 right after the answer loses none."""
    async with aiohttp.ClientSession() as session:
        rest = Rest(session, daemon, key)
        body = {
            "name": "tank/kept", "type": "VOLUME", "volsize": MB, "sparse": True,
            "user_properties": [{"key": "a:b", "value": "1"}],
        }  # fmt: skip
        await rest.expect(200, "POST", "/pool/dataset", body)
        await rest.expect(
            200, "POST", "/zfs/snapshot", {"dataset": "tank/kept", "name": "s", "properties": {"c:d": "2"}}
        )
        await asyncio.to_thread(daemon.kill9)
        await asyncio.to_thread(daemon.start)
    async with aiohttp.ClientSession() as session:
        rest = Rest(session, daemon, key)
        found = await rest.expect(200, "GET", f"{dataset('tank/kept')}?extra.snapshots=1")
        assert found["user_properties"]["a:b"]["value"] == "1"
        (snapshot,) = await rest.expect(200, "GET", "/zfs/snapshot?dataset=tank/kept")
        assert snapshot["user_properties"] == {"c:d": "2"}
        await rest.expect(200, "DELETE", dataset("tank/kept"), {"recursive": True})
