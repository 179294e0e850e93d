"""Every example of the specification, in its printed order, against one fresh store.

The examples are those of ``docs/api/resources/iscsi.rst`` in the FreeNAS source tree, in its revision of
September 2013 (five resources; PUT answers 202). About the document itself:

- Each of its sections starts from an empty table, while a fresh store of ours holds initiator group 1 so
  that the target's example finds the group it names. The object that a section creates is therefore
  addressed by the id it was given, and ``id`` and tag of that one section differ from the print.
- It prints FreeNAS's default of ``iscsi_maxsesh``, 16. A fresh store of ours has 256, since we do enforce it.
- A list is printed as it looks after the section's create; the same body is expected there then.

The body of one example has a comma too many; it is sent exactly so.
"""

from typing import Any

from tests.api.conftest import Api

GLOBALS = {
    "iscsi_maxconnect": 8,
    "iscsi_luc_authnetwork": "",
    "iscsi_iotimeout": 30,
    "iscsi_lucip": "127.0.0.1",
    "iscsi_firstburst": 65536,
    "iscsi_r2t": 32,
    "iscsi_discoveryauthmethod": "None",
    "iscsi_defaultt2w": 2,
    "iscsi_maxrecdata": 262144,
    "iscsi_basename": "iqn.2011-03.org.example.istgt",
    "iscsi_defaultt2r": 60,
    "iscsi_nopinint": 20,
    "iscsi_discoveryauthgroup": None,
    "iscsi_maxburst": 262144,
    "iscsi_toggleluc": False,
    "iscsi_lucport": 3261,
    "iscsi_luc_authgroup": None,
    "iscsi_maxsesh": 256,  # printed: 16
    "iscsi_luc_authmethod": "",
    "iscsi_maxoutstandingr2t": 16,
    "id": 1,
}
EXTENT = {
    "iscsi_target_extent_comment": "",
    "iscsi_target_extent_type": "File",
    "iscsi_target_extent_name": "extent",
    "iscsi_target_extent_filesize": "10MB",
    "id": 1,
    "iscsi_target_extent_path": "/mnt/tank/iscsi",
}
EXTENT_REQUEST = """\
        {
                "iscsi_target_extent_type": "File",
                "iscsi_target_extent_name": "extent",
                "iscsi_target_extent_filesize": "10MB",
                "iscsi_target_extent_path": "/mnt/tank/iscsi"
        }
"""
INITIATOR = {
    "iscsi_target_initiator_initiators": "ALL",
    "iscsi_target_initiator_comment": "",
    "iscsi_target_initiator_auth_network": "ALL",
    "id": 1,
    "iscsi_target_initiator_tag": 1,
}
INITIATOR_REQUEST = """\
        {
                "iscsi_target_initiator_initiators": "ALL",
                "iscsi_target_initiator_auth_network": "ALL",
        }
"""
CREDENTIAL = {
    "iscsi_target_auth_secret": "secret",
    "iscsi_target_auth_peeruser": "peeruser",
    "iscsi_target_auth_peersecret": "peersecret",
    "iscsi_target_auth_user": "user",
    "iscsi_target_auth_tag": 1,
    "id": 1,
}
CREDENTIAL_REQUEST = """\
        {
                "iscsi_target_auth_secret": "secret",
                "iscsi_target_auth_peeruser": "peeruser",
                "iscsi_target_auth_peersecret": "peersecret",
                "iscsi_target_auth_user": "user",
                "iscsi_target_auth_tag": 1
        }
"""
TARGET = {
    "iscsi_target_logical_blocksize": 512,
    "iscsi_target_portalgroup": 1,
    "iscsi_target_initialdigest": "Auto",
    "iscsi_target_queue_depth": 32,
    "iscsi_target_name": "target",
    "iscsi_target_initiatorgroup": 1,
    "iscsi_target_alias": None,
    "iscsi_target_type": "Disk",
    "iscsi_target_authgroup": None,
    "iscsi_target_authtype": "Auto",
    "iscsi_target_serial": "10000001",
    "iscsi_target_flags": "rw",
    "id": 1,
}
TARGET_REQUEST = """\
        {
                "iscsi_target_name": "target",
                "iscsi_target_portalgroup": 1,
                "iscsi_target_initiatorgroup": 1
        }
"""

SECTIONS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # resource, create as printed, object as printed, update as printed
    ("extent", EXTENT_REQUEST, EXTENT, {"iscsi_target_extent_filesize": "20MB"}),
    (
        "authorizedinitiator",
        INITIATOR_REQUEST,
        INITIATOR,
        {"iscsi_target_initiator_auth_network": "192.168.3.0/24"},
    ),
    ("authcredential", CREDENTIAL_REQUEST, CREDENTIAL, {"iscsi_target_auth_peeruser": "myuser"}),
    ("target", TARGET_REQUEST, TARGET, {"iscsi_target_queue_depth": 64}),
]
JSON = {"Content-Type": "application/json"}
TANK = "/mnt/tank"


def printed_part(body: dict[str, Any], printed: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in printed}


async def test_every_example_of_the_specification_in_printed_order(api: Api) -> None:
    await walk(api, TANK)


async def walk(api: Api, root: str) -> None:
    """All examples, with ``root`` where they have /mnt/tank."""
    prefix = "/api/v1.0/services/iscsi/"

    answer = await api.get(f"{prefix}globalconfiguration/", headers=JSON)
    assert answer.status == 200
    assert printed_part(answer.json, GLOBALS) == GLOBALS
    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["Content-Type"] == "application/json"

    answer = await api.put(f"{prefix}globalconfiguration/", {"iscsi_maxconnect": 16})
    assert answer.status == 202
    assert printed_part(answer.json, GLOBALS) == {**GLOBALS, "iscsi_maxconnect": 16}

    for resource, request, printed, change in SECTIONS:
        url = f"{prefix}{resource}/"
        request = request.replace(TANK, root)
        printed = {
            name: value.replace(TANK, root) if isinstance(value, str) else value
            for name, value in printed.items()
        }
        there = len((await api.get(url, headers=JSON)).json)

        answer = await api.request("POST", url, data=request, headers=JSON)
        assert answer.status == 201, answer.raw
        created = answer.json["id"]
        # what the fresh store holds already moves the numbers of the section's own object
        expected = {**printed, "id": created}
        assert created == there + 1
        if resource == "authorizedinitiator":
            expected["iscsi_target_initiator_tag"] = created
        assert printed_part(answer.json, printed) == expected

        answer = await api.get(url, headers=JSON)
        assert answer.status == 200
        assert expected in [printed_part(body, printed) for body in answer.json]

        answer = await api.put(f"{url}{created}/", change)
        assert answer.status == 202
        assert printed_part(answer.json, printed) == {**expected, **change}

        answer = await api.delete(f"{url}{created}/", headers=JSON)
        assert (answer.status, answer.raw) == (204, b"")
        assert answer.headers["Vary"] == "Accept"
        assert (await api.get(f"{url}{created}/")).status == 404
