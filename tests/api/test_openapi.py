"""The OpenAPI document says what the API does (issue: generated, and validated in tests)."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from targetd.interface import Statistics
from tests.api.conftest import Api

DOCUMENT = "/api/v1.0/openapi.json"
JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def agrees(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is what a schema says; as much of JSON Schema as the document uses."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if isinstance(value, bool) and "boolean" not in kinds:
        return False
    if not any(isinstance(value, JSON_TYPES[kind]) for kind in kinds):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, dict):
        return all(name in value for name in schema.get("required", ())) and all(
            agrees(document, part, value[name])
            for name, part in schema.get("properties", {}).items()
            if name in value
        )
    return not isinstance(value, list) or all(agrees(document, schema["items"], item) for item in value)


@pytest.fixture
async def document(api: Api) -> dict[str, Any]:
    answer = await api.get(DOCUMENT)
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    return found


async def test_the_document_is_whole(document: dict[str, Any]) -> None:
    """OpenAPI 3.1 §4.8: version, info, paths; every reference leads somewhere, every name is used once."""
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert {"title", "version"} <= set(document["info"])
    for reference in references(document):
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    operations = [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(set(names)) == len(names)
    for path, method, operation in operations:
        assert operation["responses"], (path, method)
        wanted = set(re.findall(r"{(\w+)}", path))
        assert {parameter["name"] for parameter in document["paths"][path].get("parameters", ())} == wanted


async def test_every_documented_path_answers_as_documented(api: Api, document: dict[str, Any]) -> None:
    await api.made(
        "target/", iscsi_target_name="t", iscsi_target_portalgroup=1, iscsi_target_initiatorgroup=1
    )
    await api.made("target/", iscsi_target_name="bare")
    await api.made(
        "extent/",
        iscsi_target_extent_name="e",
        iscsi_target_extent_type="File",
        iscsi_target_extent_path="/mnt/e",
        iscsi_target_extent_filesize="1MB",
    )
    await api.made("targettoextent/", iscsi_target=1, iscsi_extent=1)
    await api.made("authcredential/", iscsi_target_auth_user="u", iscsi_target_auth_secret="s")
    checked = 0
    for path, item in document["paths"].items():
        if "get" not in item:
            continue
        url = path.replace("{id}", "1").replace("{name}", "iscsitarget")
        if path.endswith("/explain/"):
            url += "?initiator=iqn.client&address=127.0.0.1"
        answer = await api.get(url)
        documented = item["get"]["responses"]
        assert str(answer.status) in documented, url
        content = documented[str(answer.status)].get("content")
        if content:
            assert agrees(document, content["application/json"]["schema"], answer.json), (url, answer.json)
            checked += 1
        options = await api.request("OPTIONS", url)
        methods = {method.upper() for method in item if method != "parameters"}
        assert set(options.headers["Allow"].split(", ")) - {"HEAD", "OPTIONS"} == methods
    assert checked >= 20


async def test_defaults_and_required_fields_are_those_that_a_create_has(
    api: Api, document: dict[str, Any]
) -> None:
    schemas = document["components"]["schemas"]
    made = await api.made("authorizedinitiator/")
    for name, schema in schemas["AuthorizedInitiatorCreate"]["properties"].items():
        if schema.get("default") is not None:
            assert made[name] == schema["default"]
    flat = await api.made("target/", iscsi_target_name="t", iscsi_target_portalgroup=1)
    for name, schema in schemas["TargetCreate"]["properties"].items():
        if schema.get("default"):
            assert flat[name] == schema["default"], name
    answer = await api.post("targetgroup/", {})
    assert set(answer.json) == set(schemas["TargetGroupCreate"]["required"])
    # null stands for "not given"
    nulls = dict.fromkeys(schemas["PortalCreate"]["properties"])
    assert all("null" in part["type"] for part in schemas["PortalCreate"]["properties"].values())
    assert (await api.post("portal/", nulls)).status == 201


REQUIRED_VALUES: dict[str, dict[str, Any]] = {
    "Extent": {
        "iscsi_target_extent_name": "e",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": "/mnt/e",
        "iscsi_target_extent_filesize": "1MB",
    },
    "AuthorizedInitiator": {},
    "AuthCredential": {"iscsi_target_auth_user": "u", "iscsi_target_auth_secret": "secret-secret"},
    "Target": {"iscsi_target_name": "t"},
    "TargetGroup": {"iscsi_target": "Target", "iscsi_target_portalgroup": 1},
    "Portal": {"iscsi_target_portal_ips": ["127.0.0.1:3261"]},
    "TargetToExtent": {"iscsi_target": "Target", "iscsi_extent": "Extent"},
}
"""What a body must say beside the defaults, in an order in which each can be made after those before; the
name of one of them stands for its id."""


async def test_every_documented_default_can_be_sent_and_changes_nothing(
    api: Api, document: dict[str, Any]
) -> None:
    """Generated clients fill the defaults in. What comes of it is what comes of a body without them."""
    schemas = document["components"]["schemas"]
    bodies = {
        item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]: path
        for path, item in document["paths"].items()
        if "requestBody" in item.get("post", {}) and "{" not in path and "/services/iscsi/" in path
    }
    assert {f"{name}Create" for name in REQUIRED_VALUES} <= set(bodies)
    sent_defaults = 0
    ids: dict[object, int] = {}
    for name, named in REQUIRED_VALUES.items():
        required = {
            wire: ids.get(value, value) if isinstance(value, str) else value for wire, value in named.items()
        }
        path = bodies[f"{name}Create"]
        defaults = {
            wire: schema["default"]
            for wire, schema in schemas[f"{name}Create"]["properties"].items()
            if "default" in schema and wire not in required
        }
        sent_defaults += len(defaults)
        plain = await api.made(path, **required)
        assert (await api.delete(f"{path}{plain['id']}/")).status == 204
        made = await api.made(path, **defaults, **required)
        ids[name] = made["id"]
        made_up = {"id", "iscsi_target_serial", "iscsi_target_extent_serial", "iscsi_target_extent_naa"}
        assert {key: made[key] for key in made.keys() - made_up} == {
            key: plain[key] for key in plain.keys() - made_up
        }
        for wire, value in defaults.items():  # and each of them alone changes nothing either
            answer = await api.put(f"{path}{made['id']}/", {wire: value} if value is not None else {})
            assert (answer.status, answer.json) == (202, made), (name, wire)
    assert sent_defaults > 40


async def test_the_page_shows_every_path_and_asks_for_nothing_from_elsewhere(
    api: Api, document: dict[str, Any]
) -> None:
    answer = await api.get("/api/docs")
    assert answer.headers["Content-Type"].startswith("text/html")
    page = answer.raw.decode()
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_statistics_are_documented_as_what_they_are(document: dict[str, Any]) -> None:
    """Numbers, unless it says otherwise."""
    documented = document["components"]["schemas"]["Statistics"]["properties"]
    kinds = {str: "string", tuple: "array"}
    shown = {name: type(value) for name, value in asdict(Statistics()).items()}
    assert {name: schema["type"] for name, schema in documented.items()} == {
        name: kinds[kind] for name, kind in shown.items() if kind in kinds
    }
