"""The record of every write, and the users of the API."""

import json
import logging
from typing import Any

import pytest

from api.auth import Account, Authenticator, verify_password
from api.resources.users import UsersResource
from tests.api.conftest import Api, basic

USERS = "/api/v1.0/account/users/"


def records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "audit"]


async def test_a_write_is_recorded_with_what_it_changed(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "audit")
    made = await api.made("authorizedinitiator/", iscsi_target_initiator_comment="old")
    path = f"authorizedinitiator/{made['id']}/"
    await api.put(path, {"iscsi_target_initiator_comment": "new"})
    await api.put(path, {"iscsi_target_initiator_comment": "new"})
    await api.put("globalconfiguration/", {"iscsi_r2t": 7})
    await api.delete(path)
    create, change, same, settings, delete = records(caplog)
    assert (create["user"], create["method"], create["status"]) == ("root", "POST", 201)
    assert create["address"] == "127.0.0.1"
    (change_made,) = create["changes"]
    assert (change_made["kind"], change_made["before"]) == ("initiator_groups", None)
    assert change_made["after"]["comment"] == "old"
    assert change["changes"] == [
        {
            "kind": "initiator_groups",
            "id": made["id"],
            "before": {"comment": "old"},
            "after": {"comment": "new"},
        }
    ]
    assert same["changes"] == []
    assert settings["changes"] == [
        {"kind": "globals", "id": None, "before": {"r2t": 32}, "after": {"r2t": 7}}
    ]
    assert delete["changes"][0]["after"] is None


async def test_secrets_are_masked(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    user = await api.made(
        "authcredential/", iscsi_target_auth_user="u", iscsi_target_auth_secret="first-secret"
    )
    await api.put(f"authcredential/{user['id']}/", {"iscsi_target_auth_secret": "second-secret"})
    create, change = records(caplog)
    assert create["changes"][0]["after"]["secret"] == "***"
    assert change["changes"][0]["before"] == change["changes"][0]["after"] == {"secret": "***"}
    assert "first-secret" not in caplog.text and "second-secret" not in caplog.text


@pytest.mark.parametrize(
    ("authorization", "user", "status"),
    [
        (None, None, 401),
        (basic("root", "wrong"), None, 401),
        (basic("viewer", "correct horse"), "viewer", 403),
    ],
)
async def test_a_write_that_was_refused_is_recorded_too(
    api: Api,
    caplog: pytest.LogCaptureFixture,
    authorization: str | None,
    user: str | None,
    status: int,
) -> None:
    caplog.set_level(logging.INFO, "audit")
    api.authorization = authorization
    await api.post("target/", {"iscsi_target_name": "x"})
    (record,) = records(caplog)
    assert (record["user"], record["status"], record["changes"]) == (user, status, [])


async def test_reading_leaves_no_record(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "audit")
    await api.get("target/")
    assert records(caplog) == []


# -- Users ---------------------------------------------------------------------------------------------


class Drawer:
    """A keeper in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def put(self, name: str, value: bytes | None) -> None:
        if value is None:
            del self.kept[name]
        else:
            self.kept[name] = value

    async def items(self) -> dict[str, bytes]:
        return dict(self.kept)


@pytest.fixture
def drawer() -> Drawer:
    return Drawer()


@pytest.fixture
def further(authenticator: Authenticator, drawer: Drawer, root: Account) -> list[UsersResource]:
    return [UsersResource(authenticator, drawer, root)]


async def test_a_user_is_made_changed_and_deleted(
    api: Api, drawer: Drawer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await api.post(USERS, {"name": "eve", "password": "eves-password", "read_only": "true"})
    assert (answer.status, answer.json) == (201, {"name": "eve", "read_only": True})
    kept = json.loads(drawer.kept["eve"])
    assert verify_password("eves-password", kept["hash"])
    root, api.authorization = api.authorization, basic("eve", "eves-password")
    assert (await api.get("target/")).status == 200
    assert (await api.post("target/", {"iscsi_target_name": "x"})).status == 403
    assert (await api.put(f"{USERS}eve/", {"read_only": False})).status == 403
    api.authorization = root
    assert (await api.put(f"{USERS}eve/", {"password": "another-one", "read_only": False})).status == 202
    api.authorization = basic("eve", "eves-password")
    assert (await api.get("target/")).status == 401
    api.authorization = basic("eve", "another-one")
    assert (await api.post("target/", {"iscsi_target_name": "x"})).status == 201
    api.authorization = root
    assert (await api.get(USERS)).json == [
        {"name": "eve", "read_only": False},
        {"name": "root", "read_only": False},
    ]
    assert (await api.delete(f"{USERS}eve/")).status == 204
    assert drawer.kept == {}
    api.authorization = basic("eve", "another-one")
    assert (await api.get("target/")).status == 401
    assert "eves-password" not in caplog.text and "another-one" not in caplog.text
    assert [record["user"] for record in records(caplog)].count("eve") == 3  # refused writes have her name


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"password": "long enough"}, "name"),
        ({"name": "eve"}, "password"),
        ({"name": "eve", "password": "short"}, "password"),
        ({"name": "eve", "password": 12345678}, "password"),
        ({"name": "Eve:x", "password": "long enough"}, "name"),
        ({"name": ["eve"], "password": "long enough"}, "name"),
        ({"name": "root", "password": "long enough"}, "name"),
        ({"name": "eve", "password": "long enough", "read_only": "maybe"}, "read_only"),
    ],
)
async def test_a_user_that_cannot_be_is_refused(api: Api, body: dict[str, Any], field: str) -> None:
    answer = await api.post(USERS, body)
    assert answer.status == 409
    assert list(answer.json) == [field]


async def test_root_is_neither_changed_nor_deleted(api: Api) -> None:
    assert (await api.put(f"{USERS}root/", {"read_only": True})).status == 409
    assert (await api.delete(f"{USERS}root/")).status == 409
    assert (await api.get(f"{USERS}nobody/")).status == 404


async def test_kept_users_are_there_after_a_restart_and_never_replace_root(
    authenticator: Authenticator, drawer: Drawer, root: Account
) -> None:
    drawer.kept = {
        name: json.dumps({"hash": root.password_hash, "read_only": True}).encode() for name in ("eve", "root")
    }
    await UsersResource(authenticator, drawer, root).load()
    assert (await authenticator.login(basic("eve", "correct horse"), "127.0.0.1")).read_only
    assert not (await authenticator.login(basic("root", "correct horse"), "127.0.0.1")).read_only
