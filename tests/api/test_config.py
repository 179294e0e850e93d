"""``config/``: many changes as one, in the words of the document; refusals by object and field."""

import json
from typing import Any

import pytest

from targetd.config import WHOLE, ConfigError
from tests.api.conftest import PASSWORD, Api, basic

CONFIG = "/api/v1.0/config/"
LUN: list[dict[str, Any]] = [
    {
        "action": "create",
        "resource": "extent",
        "values": {"name": "e", "type": "File", "path": "/mnt/e", "file_size": "1MB"},
    },
    {"action": "create", "resource": "target", "values": {"name": "T"}},
    {"action": "create", "resource": "targetgroup", "values": {"target": "t", "portal": 1}},
    {"action": "create", "resource": "targettoextent", "values": {"target": "T", "extent": "e", "lun": 5}},
]


async def operate(api: Api, *operations: dict[str, Any], query: str = "", status: int = 200) -> Any:
    answer = await api.post(f"{CONFIG}{query}", {"operations": list(operations)})
    assert answer.status == status, answer.raw
    return answer.json


async def test_a_lun_is_made_and_unmade_by_one_request(api: Api) -> None:
    """Operations may refer to what those before them make; one edit does all."""
    done = await operate(api, *LUN)
    assert not done["dry_run"]
    assert [(one["action"], one["resource"], one["key"], one["id"]) for one in done["changes"]] == [
        ("create", "extent", ["e"], 1),
        ("create", "target", ["t"], 1),
        ("create", "targetgroup", ["t", 1], 1),
        ("create", "targettoextent", ["t", "e"], 1),
    ]
    assert api.engine.applied == 1
    (mapping,) = api.engine.configuration.lun_mappings.values()
    assert (mapping.target_id, mapping.extent_id, mapping.lun) == (1, 1, 5)

    changed = await operate(
        api,
        {"action": "update", "resource": "target", "key": ["t"], "values": {"name": "u", "alias": "A"}},
        {"action": "update", "resource": "targettoextent", "key": ["u", "e"], "values": {"lun": 6}},
        {"action": "update", "resource": "globalconfiguration", "values": {"r2t": 7}},
        {"action": "update", "resource": "service", "values": {"enabled": False}},
    )
    assert changed["changes"][0]["changes"] == {"name": ["t", "u"], "alias": ["", "A"]}
    config = api.engine.configuration
    assert (config.targets[1].name, config.lun_mappings[1].lun) == ("u", 6)
    assert (config.globals.r2t, config.service_enabled) == (7, False)

    await operate(
        api,
        {"action": "delete", "resource": "extent", "key": ["e"], "discard_file": True},
        {"action": "delete", "resource": "target", "key": "u"},
    )
    config = api.engine.configuration
    assert not (config.extents or config.targets or config.lun_mappings or config.target_groups)
    assert api.engine.discarded == {1}


async def test_a_dry_run_tells_the_same_and_changes_nothing(api: Api) -> None:
    before = api.engine.configuration
    foreseen = await operate(api, *LUN, query="?dry_run=1")
    assert foreseen["dry_run"]
    assert api.engine.configuration is before
    done = await operate(api, *LUN)
    for one in done["changes"]:
        one["id"] = None
    assert foreseen["changes"] == done["changes"]
    api.engine.refuse = ConfigError.one("extents", "path", "/mnt/f: no such directory.", 2)
    for query in ("", "?dry_run=1"):
        told = await operate(
            api,
            {
                "action": "create",
                "resource": "extent",
                "values": {**LUN[0]["values"], "name": "f", "path": "/mnt/f"},
            },
            query=query,
            status=409,
        )
        assert told == {"extent f: path": ["/mnt/f: no such directory."]}


async def test_everything_that_is_wrong_is_told_by_object_and_field(api: Api) -> None:
    before = api.engine.configuration
    told = await operate(
        api,
        LUN[0],
        {"action": "create", "resource": "extent", "values": {"name": "none", "type": "File"}},
        {"action": "update", "resource": "target", "key": ["no"], "values": {"alias": "x"}},
        {"action": "create", "resource": "targettoextent", "values": {"target": "no", "extent": "e"}},
        status=409,
    )
    assert told == {
        "extent none: path": ["This field is required."],
        "target no": ["There is no such object."],
        "targettoextent no/e: target": ["there is no target 'no'"],
    }
    told = await operate(
        api,
        {"action": "make", "resource": "extent"},
        {"action": "create", "resource": "disk", "values": {}},
        {"action": "create", "resource": "extent", "values": {"name": "e", "nme": "x", "file_size": "big"}},
        {"action": "update", "resource": "targetgroup", "key": ["t"], "values": {}},
        {"action": "delete", "resource": "target", "key": ["t"], "discard_file": True, "force": 1},
        status=409,
    )
    assert list(told) == [
        "operation 1: action",
        "operation 2: resource",
        "operation 3: extent: nme",
        "operation 3: extent: file_size",
        "operation 4: targetgroup: key",
        "operation 5: force",
        "operation 5: target: discard_file",
    ]
    api.engine.refuse = ConfigError.one("extents", WHOLE, "No.", 1)
    assert await operate(api, LUN[0], status=409) == {"extent e": ["No."]}
    assert api.engine.configuration is before


async def test_names_and_addresses_can_change_hands(api: Api) -> None:
    """Only what comes of all operations is judged."""
    for name in ("a", "b"):
        values = {"name": name, "type": "File", "path": f"/mnt/{name}", "file_size": "1MB"}
        await operate(api, {"action": "create", "resource": "extent", "values": values})
    await operate(
        api,
        {"action": "update", "resource": "extent", "key": ["a"], "values": {"path": "/mnt/b"}},
        {"action": "update", "resource": "extent", "key": ["b"], "values": {"path": "/mnt/a"}},
    )
    assert [extent.path for extent in api.engine.configuration.extents.values()] == ["/mnt/b", "/mnt/a"]


async def test_the_document_comes_back_and_changes_nothing(api: Api) -> None:
    await operate(api, *LUN)
    await api.made("authcredential/", iscsi_target_auth_user="u", iscsi_target_auth_secret="twelve-chars")
    document = (await api.get(CONFIG)).json
    answer = await api.post(f"{CONFIG}?delete=1", document)
    assert (answer.status, answer.json) == (200, {"dry_run": False, "changes": []})
    assert document["authcredential"][0]["secret"] == "twelve-chars"
    # without secrets it leaves them as they are; who may only read gets no other, and changes nothing
    masked = (await api.get(f"{CONFIG}?secrets=masked")).json
    viewer = {"Authorization": basic("viewer", PASSWORD)}
    assert (await api.get(CONFIG, headers=viewer)).json == masked
    assert "secret" not in masked["authcredential"][0]
    assert (await api.post(f"{CONFIG}?delete=1", masked)).json["changes"] == []
    assert (await api.post(CONFIG, document, headers=viewer)).status == 403

    del document["targettoextent"], document["targetgroup"][:]
    answer = await api.post(f"{CONFIG}?delete=1&dry_run=1", document)
    assert [(one["action"], one["resource"]) for one in answer.json["changes"]] == [
        ("delete", "targettoextent"),
        ("delete", "targetgroup"),
    ]


@pytest.mark.parametrize(
    ("query", "body", "status"),
    [
        ("?dry_run=perhaps", {"format": 1}, 400),
        ("?delete=2", {"format": 1}, 400),
        ("?secrets=masked", {"format": 1}, 200),
        ("", {}, 409),
        ("", {"format": 1, "operations": []}, 409),
        ("", {"operations": "none"}, 409),
        ("", {"operations": []}, 200),
        ("", {"format": 1, "extent": [5]}, 409),
        ("", {"format": 1, "service": {"enabled": None}}, 409),
    ],
)
async def test_what_is_no_document(api: Api, query: str, body: Any, status: int) -> None:
    assert (await api.post(f"{CONFIG}{query}", body)).status == status
    assert api.engine.applied == 0


async def test_a_document_may_be_longer_than_other_bodies(api: Api) -> None:
    """1,000 disks as LUNs of a target, in one change."""
    document: dict[str, Any] = {
        "format": 1,
        "extent": [
            {"name": f"e{n}", "type": "File", "path": f"/mnt/{n}", "file_size": "1MB", "comment": "x" * 100}
            for n in range(1000)
        ],
        "target": [{"name": f"t{n}"} for n in range(1000)],
        "targettoextent": [{"target": f"t{n}", "extent": f"e{n}"} for n in range(1000)],
    }
    padded = json.dumps(document) + " " * (1 << 20)
    answer = await api.post(CONFIG, None, data=padded)
    assert len(answer.json["changes"]) == 3000
    assert api.engine.applied == 1
    assert (await api.post(CONFIG, None, data=" " * (4 << 20) + "{}")).status == 413
