"""No value in any field is more than the API can say no to, and what it takes it can show."""

from typing import Any

import pytest

from api.fields import DECLARATIONS
from api.schema import Declaration
from targetd.config import GLOBALS, validate
from tests.api.conftest import Api

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 1.5, 1e308, -0.0,
    "", " ", "null", "None", "0", "1", "-1", "1e3", "0x10", "٣", "true", "ALL", "iqn.2020-01.com.example:x",
    "\x00", "\n", "\u2028", "\ud800", "é", "💾", "%s%n", "../../etc/passwd", "/", "/dev/null",
    "a" * 200, "a" * 5000,
    "1.2.3.4", "::", "[::1]:1", "1.2.3.4:99999", "fe80::1%eth0", "10.0.0.0/8", "10MB", "9999999999999TB",
    [], [None], ["1.2.3.4:5"], [[]], ["a"] * 2000, {}, {"a": 1},
]  # fmt: skip
URLS = {
    "extents": "extent",
    "initiator_groups": "authorizedinitiator",
    "credentials": "authcredential",
    "targets": "target",
    "target_groups": "targetgroup",
    "portals": "portal",
    "lun_mappings": "targettoextent",
    GLOBALS: "globalconfiguration",
}
VALID: dict[str, dict[str, Any]] = {
    "extents": {
        "iscsi_target_extent_name": "e",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": "/mnt/e",
        "iscsi_target_extent_filesize": "1MB",
    },
    "initiator_groups": {},
    "credentials": {"iscsi_target_auth_user": "u", "iscsi_target_auth_secret": "s"},
    "targets": {"iscsi_target_name": "t", "iscsi_target_portalgroup": 1},
    "target_groups": {"iscsi_target": 1, "iscsi_target_portalgroup": 1},
    "portals": {"iscsi_target_portal_ips": ["127.0.0.2:4000"]},
    "lun_mappings": {"iscsi_target": 1, "iscsi_extent": 1},
    GLOBALS: {},
}


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda declaration: declaration.title)
async def test_any_value_is_taken_or_refused_by_name(api: Api, declaration: Declaration) -> None:
    url = f"{URLS[declaration.collection]}/"
    await api.put("portal/1/", {"iscsi_target_portal_ips": ["127.0.0.1:3260"]})
    if declaration.collection in ("target_groups", "lun_mappings"):
        await api.made("target/", iscsi_target_name="t")
        await api.made("extent/", **VALID["extents"])
    start = api.engine.configuration
    for column in declaration.columns:
        for value in VALUES:
            body = {**VALID[declaration.collection], column.wire: value}
            if declaration.collection == GLOBALS:
                answers = [await api.put(url, body)]
            else:
                answers = [await api.post(url, body)]
                api.engine.configuration = start
                made = await api.made(url, **VALID[declaration.collection])
                answers.append(await api.put(f"{url}{made['id']}/", {column.wire: value}))
            for answer in answers:
                assert answer.status in (201, 202, 409), (column.wire, value, answer.raw)
                if answer.status == 409:
                    assert answer.json
                    assert all(name == "__all__" or name in declaration.by_wire for name in answer.json), (
                        answer.json
                    )
            assert (await api.get(url)).status == 200
            validate(api.engine.configuration)
            api.engine.configuration = start


async def test_a_body_of_nothing_but_wrong_values_is_told_all_of_it(api: Api) -> None:
    for declaration in DECLARATIONS:
        body = {column.wire: {"a": []} for column in declaration.columns if not column.read_only}
        url = f"{URLS[declaration.collection]}/"
        send = api.put if declaration.collection == GLOBALS else api.post
        answer = await send(url, body)
        assert answer.status == 409
        assert set(answer.json) >= set(body)
