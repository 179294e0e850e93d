"""TrueNAS' API over an engine in memory: who may what, errors on both wires, frames of JSON-RPC and DDP."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

from api.app import make_app
from api.auth import Authenticator
from api.keys import KeyRing
from api.v2.app import TrueNas
from targetd.datasets.service import DatasetService
from targetd.volumes import Pools
from tests.api.conftest import PASSWORD, Answer, Api, ApiServer, basic
from tests.api.engine import MemoryEngine
from tests.targetd.test_datasets import MemoryRecords

REST = "/api/v2.0"
MB = 1 << 20


class Clock:
    """Seconds since the epoch, as told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(clock: Clock) -> KeyRing:
    return KeyRing(MemoryRecords(), now=clock)


@pytest.fixture
async def nas(
    engine: MemoryEngine, authenticator: Authenticator, keys: KeyRing, tmp_path: Path
) -> AsyncIterator[Api]:
    pools = Pools({"tank": tmp_path})
    truenas = TrueNas(pools, DatasetService(pools, MemoryRecords()))
    app = make_app(engine, authenticator, version="0.1.0", keys=keys, truenas=truenas)
    server = ApiServer(app)
    await server.start_server()
    async with ClientSession(skip_auto_headers=("Content-Type",)) as session:
        yield Api(session, server, engine)
    await server.close()


class Socket:
    """A JSON-RPC connection."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket
        self.number = 0
        self.events: list[dict[str, Any]] = []

    async def answer(self, method: str, *given: Any) -> dict[str, Any]:
        """The whole answer; events on the way are kept."""
        self.number += 1
        await self.socket.send_json(
            {"jsonrpc": "2.0", "id": self.number, "method": method, "params": list(given)}
        )
        while True:
            message: dict[str, Any] = await self.socket.receive_json(timeout=20)
            if message.get("id") == self.number:
                return message
            self.events.append(message)

    async def call(self, method: str, *given: Any) -> Any:
        found = await self.answer(method, *given)
        assert "result" in found, found
        return found["result"]

    async def error(self, method: str, *given: Any) -> dict[str, Any]:
        found = await self.answer(method, *given)
        error: dict[str, Any] = found["error"]
        return error


async def connect(nas: Api, path: str = "/api/current", *, user: str | None = "root") -> Socket:
    url = f"ws://{nas.server.host}:{nas.server.port}{path}"
    socket = Socket(await nas.session.ws_connect(url))
    if user is not None:
        assert await socket.call("auth.login", user, PASSWORD) is True
    return socket


async def volume(nas: Api, name: str = "tank/v", **more: Any) -> Answer:
    return await nas.post(
        f"{REST}/pool/dataset", {"name": name, "type": "VOLUME", "volsize": 4 * MB, "sparse": True, **more}
    )


# -- Who may what ---------------------------------------------------------------------------------------

READS = ("iscsi.target.query", "pool.dataset.query", "zfs.snapshot.query", "core.get_jobs", "service.query")
WRITES: tuple[tuple[str, list[Any]], ...] = (
    ("iscsi.target.create", [{"name": "x"}]),
    ("iscsi.portal.create", [{"listen": [{"ip": "127.0.0.1", "port": 4000}]}]),
    ("pool.dataset.create", [{"name": "tank/x"}]),
    ("zfs.snapshot.create", [{"dataset": "tank/x", "name": "s"}]),
    ("service.stop", ["iscsitarget"]),
    ("api_key.query", []),
    ("api_key.create", [{"name": "x"}]),
    ("replication.run_onetime", [{"source_datasets": ["tank/x"], "target_dataset": "tank/y"}]),
)


@pytest.mark.parametrize("method", READS)
async def test_nobody_reads_without_a_login(nas: Api, method: str) -> None:
    socket = await connect(nas, user=None)
    error = await socket.error(method)
    assert (error["code"], error["data"]["errname"]) == (-32001, "ENOTAUTHENTICATED")
    assert await socket.call("core.ping") == "pong"


@pytest.mark.parametrize("method", READS)
async def test_a_read_only_account_reads(nas: Api, method: str) -> None:
    socket = await connect(nas, user="viewer")
    assert isinstance(await socket.call(method), list)


@pytest.mark.parametrize(("method", "given"), WRITES)
async def test_a_read_only_account_does_not_write(nas: Api, method: str, given: list[Any]) -> None:
    socket = await connect(nas, user="viewer")
    before = nas.engine.applied
    assert (await socket.error(method, *given))["data"]["errname"] == "EACCES"
    bulk = await socket.call("core.bulk", method, [given])
    waited = await socket.call("core.job_wait", bulk)
    found = await finished(socket, waited)
    assert "EACCES" in found["result"][0]["error"]
    assert nas.engine.applied == before


async def finished(socket: Socket, id: int) -> dict[str, Any]:
    """The job, when it is over."""
    await socket.call("core.subscribe", "core.get_jobs")
    while True:
        job: dict[str, Any] = await socket.call("core.get_jobs", [["id", "=", id]], {"get": True})
        if job["state"] != "RUNNING":
            return job
        message = await socket.socket.receive_json(timeout=20)
        assert message["method"] == "collection_update"


async def test_a_read_only_account_sees_no_secret(nas: Api) -> None:
    made = await nas.post(f"{REST}/iscsi/auth", {"tag": 1, "user": "alice", "secret": "alices-secret"})
    assert (made.status, made.json["secret"]) == (200, "alices-secret")
    for user, seen in (("root", "alices-secret"), ("viewer", "********")):
        socket = await connect(nas, user=user)
        (found,) = await socket.call("iscsi.auth.query")
        assert found["secret"] == seen
        counted = await socket.call("iscsi.auth.query", [["secret", "=", "alices-secret"]], {"count": True})
        assert counted == (1 if user == "root" else 0), "nor can it be found by a filter"


async def test_rest_refuses_strangers_and_writers_who_may_only_read(nas: Api) -> None:
    nas.authorization = basic("viewer", PASSWORD)
    assert (await nas.get(f"{REST}/iscsi/target")).status == 200
    assert (await nas.post(f"{REST}/iscsi/target", {"name": "x"})).status == 403
    nas.authorization = None
    assert (await nas.get(f"{REST}/iscsi/target")).status == 401


# -- API keys ---------------------------------------------------------------------------------------------


async def test_a_key_logs_in_until_it_is_deleted(nas: Api, keys: KeyRing, clock: Clock) -> None:
    made = await nas.post("/api/v1.0/account/keys/", {"name": "ci", "role": "admin"})
    assert made.status == 201
    token, id = made.json["key"], made.json["id"]
    listed = (await nas.get("/api/v1.0/account/keys/")).json
    assert [(key["name"], key["role"], key["used_at"]) for key in listed] == [("ci", "admin", None)]
    assert token not in json.dumps(listed)
    root, nas.authorization = nas.authorization, f"Bearer {token}"
    assert (await nas.get("/api/v1.0/services/iscsi/target/")).status == 200
    assert (await nas.post(f"{REST}/iscsi/target", {"name": "x"})).status == 200
    socket = await connect(nas, user=None)
    assert await socket.call("auth.login_with_api_key", token) is True
    assert (await socket.call("auth.me"))["pw_name"] == "api-key:ci"
    (key,) = keys.list()
    assert key.used == clock.now
    nas.authorization = root
    assert (await nas.delete(f"/api/v1.0/account/keys/{id}/")).status == 204
    nas.authorization = f"Bearer {token}"
    assert (await nas.get("/api/v1.0/services/iscsi/target/")).status == 401


async def test_a_key_ends_when_its_time_is_over(nas: Api, keys: KeyRing, clock: Clock) -> None:
    _, token = await keys.create("short", False, 60)
    nas.authorization = f"Bearer {token}"
    assert (await nas.get(f"{REST}/iscsi/target")).status == 200
    clock.now += 60
    assert (await nas.get(f"{REST}/iscsi/target")).status == 401


@pytest.mark.parametrize("token", ["", "1", "1-", "1-" + "x" * 43, "2-" + "x" * 43, "1-" + "x" * 4000, "ä-ö"])
async def test_what_is_no_key_logs_nobody_in(nas: Api, keys: KeyRing, token: str) -> None:
    await keys.create("real", False, None)
    assert await keys.login(token) is None
    socket = await connect(nas, user=None)
    assert await socket.call("auth.login_with_api_key", token) is False


async def test_keys_outlive_the_process_and_ids_are_never_given_twice() -> None:
    records = MemoryRecords()
    first = KeyRing(records)
    key, token = await first.create("a", True, None)
    other, _ = await first.create("b", False, None)
    await first.delete(other.id)
    second = KeyRing(records)
    await second.load()
    account = await second.login(token)
    assert account is not None and account.read_only
    third, _ = await second.create("c", False, None)
    assert third.id > other.id > key.id
    assert token.partition("-")[2].encode() not in b"".join(records.kept.values())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "x", "role": "king"}, "role"),
        ({"name": "x", "role": {}}, "role"),
        ({"name": "x", "role": ["admin"]}, "role"),
        ({"name": "x", "expires_in_s": -1}, "expires_in_s"),
        ({"name": "x", "expires_in_s": "soon"}, "expires_in_s"),
    ],
)
async def test_a_wrong_key_is_refused_by_field(nas: Api, body: dict[str, Any], field: str) -> None:
    answer = await nas.post("/api/v1.0/account/keys/", body)
    assert answer.status == 409 and list(answer.json) == [field]


# -- Objects ----------------------------------------------------------------------------------------------


async def test_a_target_is_made_with_its_groups_and_keeps_those_that_stay(nas: Api) -> None:
    group = {"portal": 1, "initiator": 1, "authmethod": "NONE", "auth": None}
    made = (await nas.post(f"{REST}/iscsi/target", {"name": "x", "groups": [group]})).json
    assert made == {"id": 1, "name": "x", "alias": None, "mode": "ISCSI", "groups": [group]}
    before = dict(nas.engine.configuration.target_groups)
    changed = (await nas.put(f"{REST}/iscsi/target/id/1", {"alias": "why", "groups": [group]})).json
    assert changed["alias"] == "why" and dict(nas.engine.configuration.target_groups) == before
    emptied = (await nas.put(f"{REST}/iscsi/target/id/1", {"groups": []})).json
    assert emptied["groups"] == []
    again = await nas.post(f"{REST}/iscsi/target", {"name": "x"})
    assert (again.status, again.json) == (
        422,
        {"iscsi_target_create.name": [{"message": "Target name already exists", "errno": 22}]},
    )


async def test_a_wrong_group_makes_no_target(nas: Api) -> None:
    answer = await nas.post(f"{REST}/iscsi/target", {"name": "x", "groups": [{"portal": 99}]})
    assert answer.status == 422
    assert nas.engine.configuration.targets == {}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/iscsi/target", {"name": "x", "bogus": 1}, "iscsi_target_create.bogus"),
        ("/iscsi/target", {}, "iscsi_target_create.name"),
        ("/iscsi/extent", {"name": "x", "type": "TAPE"}, "iscsi_extent_create.type"),
        ("/iscsi/extent", {"name": "x", "type": "FILE", "blocksize": 300}, "iscsi_extent_create.blocksize"),
        ("/iscsi/extent", {"name": "x", "type": "FILE", "enabled": False}, "iscsi_extent_create.enabled"),
        ("/iscsi/targetextent", {"target": 1}, "iscsi_targetextent_create.extent"),
        ("/pool/dataset", {"name": "tank/x", "type": "VOLUME"}, "pool_dataset_create.volsize"),
        ("/pool/dataset", {"name": "tank/x", "sparse": True}, "pool_dataset_create.sparse"),
        ("/pool/dataset", {"name": "tank"}, "pool_dataset_create.name"),
        ("/pool/dataset", {"name": "tank/x", "share_type": "SMB"}, "pool_dataset_create.share_type"),
    ],
)
async def test_a_wrong_argument_is_refused_by_name(
    nas: Api, path: str, body: dict[str, Any], field: str
) -> None:
    answer = await nas.post(f"{REST}{path}", body)
    assert answer.status == 422
    assert field in answer.json, answer.json
    name = f"{path.removeprefix('/').replace('/', '.')}.create"
    error = await (await connect(nas)).error(name, body)
    assert error["code"] == -32602
    assert field in [one[0] for one in error["data"]["extra"]]


async def test_a_volume_from_nothing_to_nothing(nas: Api) -> None:
    made = await volume(
        nas, "tank/a/v", create_ancestors=True, user_properties=[{"key": "a:b", "value": "1"}]
    )
    assert made.json["volsize"] == {
        "value": "4194304",
        "rawvalue": "4194304",
        "parsed": 4194304,
        "source": "LOCAL",
    }
    assert made.json["user_properties"]["a:b"]["value"] == "1"
    parent = (await nas.get(f"{REST}/pool/dataset/id/tank%2Fa")).json
    assert (parent["type"], [child["id"] for child in parent["children"]]) == ("FILESYSTEM", ["tank/a/v"])
    path = f"{REST}/pool/dataset/id/tank%2Fa%2Fv"
    update = {
        "volsize": 8 * MB,
        "user_properties_update": [{"key": "a:b", "remove": True}, {"key": "c:d", "value": 2}],
    }
    changed = (await nas.put(path, update)).json
    assert changed["volsize"]["parsed"] == 8 * MB
    assert {key: one["value"] for key, one in changed["user_properties"].items()} == {"c:d": "2"}
    shrunk = await nas.put(path, {"volsize": MB})
    assert shrunk.status == 422 and "cannot shrink" in shrunk.raw.decode()
    extent = await nas.post(f"{REST}/iscsi/extent", {"name": "v", "type": "DISK", "disk": "zvol/tank/a/v"})
    assert (extent.json["type"], extent.json["disk"]) == ("DISK", "zvol/tank/a/v")
    busy = await nas.delete(path, {"recursive": True, "force": True})
    assert busy.status == 422 and "dataset is busy: extent v is on it" in busy.json["message"]
    assert (await nas.delete(f"{REST}/iscsi/extent/id/{extent.json['id']}", {"remove": True})).json is True
    assert (await nas.delete(path, {"recursive": True, "force": True})).json is True
    assert (await nas.get(path)).status == 404
    gone = await nas.delete(path, {"recursive": True})
    assert gone.status == 422 and "does not exist" in gone.json["message"]


async def test_a_bad_block_size_is_refused(nas: Api) -> None:
    answer = await volume(nas, volblocksize="3K")
    assert answer.status == 422 and "pool_dataset_create.volblocksize" in answer.json
    assert (await volume(nas, volblocksize="16K")).json["volblocksize"]["parsed"] == 16384


async def test_a_list_is_filtered_by_the_query_string(nas: Api) -> None:
    for name in ("a", "b", "c"):
        assert (await nas.post(f"{REST}/iscsi/target", {"name": name})).status == 200

    async def names(query: str) -> list[str]:
        return [one["name"] for one in (await nas.get(f"{REST}/iscsi/target?{query}")).json]

    assert await names("") == ["a", "b", "c"]
    assert await names("limit=0") == ["a", "b", "c"]
    assert await names("limit=1&offset=1") == ["b"]
    assert await names("name=c") == ["c"]
    assert await names("id__in=1,3") == ["a", "c"]
    assert await names("id__gt=1&sort=-name") == ["c", "b"]
    assert (await nas.get(f"{REST}/iscsi/target?limit=many")).status == 422


async def test_unknown_places_and_methods_are_told_apart(nas: Api) -> None:
    assert (await nas.get(f"{REST}/nothing/here")).status == 404
    assert (await nas.put(f"{REST}/iscsi/target", {})).status == 405
    assert (await nas.request("POST", f"{REST}/iscsi/target", data="{")).status == 422
    socket = await connect(nas)
    assert (await socket.error("iscsi.target.explode"))["code"] == -32601


async def test_the_document_names_every_place_of_rest(nas: Api) -> None:
    document = (await nas.get(f"{REST}/openapi.json")).json
    assert document["openapi"].startswith("3.1")
    target = document["paths"][f"{REST}/iscsi/target"]["post"]
    schema = target["requestBody"]["content"]["application/json"]["schema"]
    assert "name" in schema["properties"] and schema["additionalProperties"] is False
    assert f"{REST}/pool/dataset/id/{{id}}" in document["paths"]


# -- The wire of JSON-RPC -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", -32700),
        ("[" * 100_000, -32700),
        ("1", -32600),
        ("[]", -32600),
        ('{"jsonrpc": "2.0"}', -32600),
        ('{"jsonrpc": "1.0", "id": 1, "method": "core.ping"}', -32600),
        ('{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600),
        ('{"jsonrpc": "2.0", "id": 1, "method": "core.ping", "params": {}}', -32600),
        ('{"jsonrpc": "2.0", "id": {}, "method": "core.ping", "params": []}', -32600),
        ('{"jsonrpc": "2.0", "id": 1, "method": "core.ping", "params": [1, 2]}', -32001),
    ],
)
async def test_a_malformed_frame_gets_an_error_and_the_connection_goes_on(
    nas: Api, frame: str, code: int
) -> None:
    socket = await connect(nas)
    await socket.socket.send_str(frame)
    assert (await socket.socket.receive_json(timeout=20))["error"]["code"] == code
    assert await socket.call("core.ping") == "pong"


async def test_a_message_that_is_too_large_ends_the_connection(nas: Api) -> None:
    socket = await connect(nas)
    await socket.socket.send_str('"' + "x" * (2 * MB) + '"')
    message = await socket.socket.receive(timeout=20)
    assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING)


@pytest.mark.parametrize(
    "path", ["/api/current", "/api/v25.04.0", "/api/v25.04.2", "/api/v25.10.1", "/api/current/"]
)
async def test_json_rpc_is_there_under_the_names_that_clients_use(nas: Api, path: str) -> None:
    assert await (await connect(nas, path)).call("system.version") == "TrueNAS-SCALE-25.04.2"


async def test_login_ex_says_what_came_of_it(nas: Api, keys: KeyRing) -> None:
    _, token = await keys.create("k", True, None)
    socket = await connect(nas, user=None)
    wrong = {"mechanism": "PASSWORD_PLAIN", "username": "root", "password": "wrong"}
    assert await socket.call("auth.login_ex", wrong) == {"response_type": "AUTH_ERR"}
    right = {"mechanism": "API_KEY_PLAIN", "username": "root", "api_key": token}
    assert (await socket.call("auth.login_ex", right))["response_type"] == "SUCCESS"
    assert (await socket.call("auth.me"))["privilege"]["roles"] == ["READONLY_ADMIN"]
    assert await socket.call("auth.logout") is True
    assert (await socket.error("auth.me"))["data"]["errname"] == "ENOTAUTHENTICATED"


async def test_ddp_of_older_clients(nas: Api) -> None:
    socket = (await connect(nas, "/websocket", user=None)).socket
    await socket.send_json({"msg": "connect", "version": "1", "support": ["1"]})
    assert (await socket.receive_json(timeout=20))["msg"] == "connected"
    for id, method, given in (
        ("1", "auth.login", ["root", PASSWORD]),
        ("2", "iscsi.global.config", []),
    ):
        await socket.send_json({"id": id, "msg": "method", "method": method, "params": given})
        answer = await socket.receive_json(timeout=20)
        assert (answer["id"], answer["msg"]) == (id, "result") and "result" in answer
    await socket.send_json({"id": "3", "msg": "method", "method": "iscsi.target.create", "params": [{}]})
    assert (await socket.receive_json(timeout=20))["error"]["type"] == "VALIDATION"
    await socket.send_json({"msg": "ping"})
    assert await socket.receive_json(timeout=20) == {"msg": "pong"}


async def test_a_job_tells_how_far_it_is_and_what_came_of_it(nas: Api) -> None:
    await volume(nas)
    await nas.post(f"{REST}/zfs/snapshot", {"dataset": "tank/v", "name": "s"})
    socket = await connect(nas)
    await socket.call("core.subscribe", "core.get_jobs")
    copy = {"source_datasets": ["tank/v"], "target_dataset": "tank/copy", "transport": "LOCAL"}
    job = await finished(socket, await socket.call("replication.run_onetime", copy))
    assert (job["state"], job["progress"]["percent"]) == ("SUCCESS", 100)
    assert [one["params"]["collection"] for one in socket.events] == ["core.get_jobs"] * len(socket.events)
    assert (await nas.get(f"{REST}/pool/dataset/id/tank%2Fcopy")).status == 200
    job = await finished(socket, await socket.call("replication.run_onetime", copy))
    assert job["state"] == "FAILED" and "already exists" in job["error"]


async def test_a_write_over_json_rpc_is_in_the_audit_log(nas: Api, caplog: pytest.LogCaptureFixture) -> None:
    socket = await connect(nas)
    with caplog.at_level("INFO", "audit"):
        await socket.call("iscsi.target.create", {"name": "x"})
        await socket.error("iscsi.target.create", {"name": "x"})
    records = [json.loads(record.message) for record in caplog.records if record.name == "audit"]
    assert [(one["user"], one["path"], one["status"]) for one in records] == [
        ("root", "iscsi.target.create", 200),
        ("root", "iscsi.target.create", 422),
    ]
    assert [change["kind"] for change in records[0]["changes"]] == ["targets"]
