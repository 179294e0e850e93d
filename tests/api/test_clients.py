"""What real clients send, in their own quirks, and what they need from the answers (api-semantics §9).

Each test is one program's sequence of requests, as its source has them; the comments name what that
program checks. Volumes exist beforehand here: the storage endpoints are not these tests' subject.
"""

from typing import Any

import pytest

from targetd.config import full_name, mappings_by_target
from tests.api.conftest import BASE, Api

ISCSI = "/api/v1.0/services/iscsi"


def luns(api: Api, iqn: str) -> list[tuple[int, str]]:
    """What an initiator would see behind an iSCSI name: LUN and path."""
    config = api.engine.configuration
    (target,) = (item for item in config.targets.values() if full_name(config.globals, item) == iqn)
    found = mappings_by_target(config).get(target.id, ())
    return sorted((mapping.lun, config.extents[mapping.extent_id].path) for mapping in found)


async def test_freenas_iscsi_provisioner(api: Api) -> None:
    """Go, Kubernetes. 201 strictly; 409 means: there already, look it up by name among ``?limit=1000``."""
    basename = (await api.get("globalconfiguration/")).json["iscsi_basename"]
    target_body = {"iscsi_target_name": "pvc-1", "iscsi_target_mode": "iscsi"}
    target = await api.made("target/", **target_body)
    group_body = {
        "iscsi_target": target["id"],
        "iscsi_target_authgroup": None,
        "iscsi_target_authtype": "None",
        "iscsi_target_portalgroup": 1,
        "iscsi_target_initiatorgroup": 1,
        "iscsi_target_initialdigest": "Auto",
    }
    group = await api.made("targetgroup/", **group_body)
    extent_body = {
        "iscsi_target_extent_name": "pvc-1",
        "iscsi_target_extent_type": "Disk",
        "iscsi_target_extent_disk": "zvol/tank/pvc-1",
        "iscsi_target_extent_insecure_tpc": True,
        "iscsi_target_extent_blocksize": 512,
        "iscsi_target_extent_pblocksize": False,
        "iscsi_target_extent_rpm": "SSD",
    }
    extent = await api.made("extent/", **extent_body)
    map_body = {"iscsi_target": target["id"], "iscsi_extent": extent["id"], "iscsi_lunid": 0}
    mapping = await api.made("targettoextent/", **map_body)
    assert luns(api, f"{basename}:pvc-1") == [(0, "/dev/zvol/tank/pvc-1")]

    # the same claim again, after the provisioner was restarted half way
    for path, body, text in (
        ("target", target_body, "Target name already exists"),
        ("targetgroup", group_body, "cannot be duplicated on a target"),
        ("extent", extent_body, "Extent name must be unique"),
        ("targettoextent", map_body, "LUN ID is already being used for this target."),
    ):
        answer = await api.post(f"{path}/", body)
        assert answer.status == 409
        assert text in str(answer.json)
    for path, made, key in (
        ("target", target, "iscsi_target_name"),
        ("extent", extent, "iscsi_target_extent_name"),
        ("targetgroup", group, "iscsi_target"),
        ("targettoextent", mapping, "iscsi_extent"),
    ):
        listed = (await api.get(f"{path}/?limit=1000")).json
        assert [item["id"] for item in listed if item[key] == made[key]] == [made["id"]]

    # target first, its grants and LUNs with it; they are then gone as asked for
    assert (await api.delete(f"target/{target['id']}/")).status == 204
    assert (await api.delete(f"extent/{extent['id']}/")).status == 204
    for path in (f"targettoextent/{mapping['id']}/", f"targetgroup/{group['id']}/"):
        assert (await api.delete(path)).status == 204


async def test_freenas_proxmox(api: Api) -> None:
    """Perl. Lists by ``?limit=0``, an explicit LUN, finds its LUN by the path ``/dev/zvol/…``."""
    await api.made("target/", iscsi_target_name="proxmox", iscsi_target_portalgroup=1)
    version = await api.get("/api/v1.0/system/version/")
    assert version.status == 200
    assert version.headers["Content-Type"].startswith("application/json")
    config = (await api.get("globalconfiguration/?limit=0")).json
    targets = (await api.get("target/?limit=0")).json
    (target_id,) = (
        item["id"]
        for item in targets
        if f"{config['iscsi_basename']}:{item['iscsi_target_name']}"
        == "iqn.2011-03.org.example.istgt:proxmox"
    )

    async def by_path() -> dict[str, tuple[int, int, int]]:
        extents = {item["id"]: item for item in (await api.get("extent/?limit=0")).json}
        return {
            extents[item["iscsi_extent"]]["iscsi_target_extent_path"]: (
                item["iscsi_extent"],
                item["id"],
                item["iscsi_lunid"],
            )
            for item in (await api.get("targettoextent/?limit=0")).json
            if item["iscsi_target"] == target_id
        }

    for lun, name in enumerate(("vm-100-disk-0", "vm-100-disk-1")):
        extent = await api.made(
            "extent/",
            iscsi_target_extent_type="Disk",
            iscsi_target_extent_name=f"tank/{name}",
            iscsi_target_extent_disk=f"zvol/tank/{name}",
        )
        assert extent["iscsi_target_extent_naa"].startswith("0x")
        await api.made("targettoextent/", iscsi_target=target_id, iscsi_extent=extent["id"], iscsi_lunid=lun)
    found = await by_path()
    assert [found[f"/dev/zvol/tank/vm-100-disk-{lun}"][2] for lun in (0, 1)] == [0, 1]

    # its releases up to 2.0 take the LUN away first, then the extent
    extent_id, mapping_id, _ = found["/dev/zvol/tank/vm-100-disk-0"]
    assert (await api.delete(f"targettoextent/{mapping_id}/")).status == 204
    assert (await api.delete(f"extent/{extent_id}/")).status == 204
    assert list(await by_path()) == ["/dev/zvol/tank/vm-100-disk-1"]


async def test_cinder_driver(api: Api) -> None:
    """Python 2. Doubled slash at ``targetgroup``, no LUN, lists without a limit, any 2xx is good."""
    await api.post("target/", {"iscsi_target_name": "volume-1", "iscsi_target_alias": ""})
    (target_id,) = (
        item["id"] for item in (await api.get("target/")).json if item["iscsi_target_name"] == "volume-1"
    )
    answer = await api.post(
        f"{ISCSI}/targetgroup//",
        {
            "iscsi_target": target_id,
            "iscsi_target_authgroup": None,
            "iscsi_target_portalgroup": "1",
            "iscsi_target_initiatorgroup": "1",
            "iscsi_target_authtype": "None",
            "iscsi_target_initialdigest": "Auto",
        },
    )
    assert answer.status == 201
    await api.post(
        "extent/",
        {
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_name": "volume-1",
            "iscsi_target_extent_disk": "zvol/tank/volume-1",
        },
    )
    (extent_id,) = (item["id"] for item in (await api.get("extent/")).json)
    answer = await api.post("targettoextent/", {"iscsi_target": target_id, "iscsi_extent": extent_id})
    assert answer.json["iscsi_lunid"] == 0
    assert luns(api, "iqn.2011-03.org.example.istgt:volume-1") == [(0, "/dev/zvol/tank/volume-1")]
    assert (await api.delete(f"target/{target_id}/")).status == 204
    assert (await api.delete(f"extent/{extent_id}/")).status == 204


async def test_opensvc(api: Api) -> None:
    """Python. ``?format=json&limit=0``, sizes ``"<n>MB"``, GET by id before DELETE, 404 that is no JSON."""
    query = "?format=json&limit=0"
    initiator = await api.made(
        "authorizedinitiator",
        iscsi_target_initiator_initiators="iqn.2009-11.com.opensvc.srv:n1.1,iqn.2009-11.com.opensvc.srv:n2.1",
        iscsi_target_initiator_auth_network="ALL",
        iscsi_target_initiator_comment="svc",
    )
    target = await api.made("target/", iscsi_target_name="iqn.2009-11.com.opensvc:svc", iscsi_target_alias="")
    answer = await api.post(
        f"{ISCSI}/targetgroup//",
        {
            "iscsi_target": target["id"],
            "iscsi_target_authgroup": -1,
            "iscsi_target_authtype": "None",
            "iscsi_target_portalgroup": 1,
            "iscsi_target_initiatorgroup": initiator["id"],
            "iscsi_target_initialdigest": "Auto",
        },
    )
    assert answer.json["iscsi_target_authgroup"] is None
    extent = await api.made(
        "extent/",
        iscsi_target_extent_type="File",
        iscsi_target_extent_name="disk1",
        iscsi_target_extent_insecure_tpc=True,
        iscsi_target_extent_blocksize=512,
        iscsi_target_extent_filesize="10MB",
        iscsi_target_extent_path="/mnt/tank/disk1",
    )
    await api.made("targettoextent/", iscsi_target=target["id"], iscsi_extent=extent["id"])
    for name in ("target", "targettoextent", "targetgroup", "authorizedinitiator", "portal", "extent"):
        assert (await api.get(f"{name}{query}")).status == 200
    assert extent["iscsi_target_extent_naa"].startswith("0x")
    for path in (
        f"extent/{extent['id']}",
        f"target/{target['id']}",
        f"authorizedinitiator/{initiator['id']}",
    ):
        assert (await api.get(path)).json["id"]
        assert (await api.delete(path)).status == 204
        gone = await api.get(path)
        with pytest.raises(ValueError, match="Expecting value"):
            assert gone.json
    errors = (await api.post("extent/", {"iscsi_target_extent_type": "File"})).json
    assert all(isinstance(messages, list) for messages in errors.values())


async def test_democratic_csi(api: Api) -> None:
    """JavaScript, its v1.0 code. Pages of 100 until one is empty; compares the name before it deletes."""

    async def find(resource: str, **wanted: Any) -> list[dict[str, Any]]:
        found, offset = [], 0
        while page := (await api.get(f"{resource}?limit=100&offset={offset}")).json:
            found += [item for item in page if all(item[key] == value for key, value in wanted.items())]
            offset += 100
        return found

    for number in range(130):
        await api.made("target/", iscsi_target_name=f"other-{number}")
    name = "csi-pvc-9"
    target = await api.made(
        "target", iscsi_target_name=name, iscsi_target_alias="", iscsi_target_mode="iscsi"
    )
    group_body = {
        "iscsi_target": target["id"],
        "iscsi_target_portalgroup": 1,
        "iscsi_target_initiatorgroup": 1,
        "iscsi_target_authtype": "None",
        "iscsi_target_authgroup": "",
        "iscsi_target_initialdigest": "Auto",
    }
    await api.made("targetgroup", **group_body)
    extent_body = {
        "iscsi_target_extent_comment": "",
        "iscsi_target_extent_type": "Disk",
        "iscsi_target_extent_name": name,
        "iscsi_target_extent_insecure_tpc": True,
        "iscsi_target_extent_xen": False,
        "iscsi_target_extent_avail_threshold": 80,
        "iscsi_target_extent_blocksize": 4096,
        "iscsi_target_extent_pblocksize": True,
        "iscsi_target_extent_rpm": "5400",
        "iscsi_target_extent_ro": False,
        "iscsi_target_extent_disk": "zvol/tank/csi/pvc-9",
    }
    extent = await api.made("extent", **extent_body)
    map_body = {"iscsi_target": target["id"], "iscsi_extent": extent["id"], "iscsi_lunid": 0}
    mapping = await api.made("targettoextent", **map_body)

    # idempotent: the texts of the 409 decide that this is fine, then it looks the object up
    answer = await api.post("target", {"iscsi_target_name": name, "iscsi_target_alias": ""})
    assert answer.json["iscsi_target_name"][0].startswith("Target name already exists")
    answer = await api.post("extent", extent_body)
    assert "Extent name must be unique" in answer.json["iscsi_target_extent_name"][0]
    answer = await api.post("targettoextent", map_body)
    assert "LUN ID is already being used for this target." in str(answer.json)
    assert [item["id"] for item in await find("target", iscsi_target_name=name)] == [target["id"]]
    assert [item["id"] for item in await find("extent", iscsi_target_extent_name=name)] == [extent["id"]]
    wanted = {"iscsi_target": target["id"], "iscsi_extent": extent["id"]}
    assert [item["id"] for item in await find("targettoextent", **wanted)] == [mapping["id"]]

    for resource, made, key in (("target", target, "name"), ("extent", extent, "extent_name")):
        shown = await api.get(f"{resource}/{made['id']}")
        assert shown.json[f"iscsi_target_{key}"] == name
        assert (await api.delete(f"{resource}/{made['id']}")).status == 204
        assert (await api.get(f"{resource}/{made['id']}")).status == 404


async def test_hypervisors_library(api: Api) -> None:
    """C#. Ids as texts, ``"null"`` for none, ``?limit=99999``, old releases delete without a final slash."""
    target = await api.made("target/", iscsi_target_name="blade-1", iscsi_target_alias="", id="0")
    await api.made(
        "targetgroup/",
        id="13",
        iscsi_target=str(target["id"]),
        iscsi_target_authgroup="null",
        iscsi_target_authtype="None",
        iscsi_target_initialdigest="None",
        iscsi_target_initiatorgroup="null",
        iscsi_target_portalgroup="1",
    )
    extent = await api.made(
        "extent/",
        iscsi_target_extent_name="blade-1",
        iscsi_target_extent_type="ZVOL",
        iscsi_target_extent_path="zvol/tank/blade-1",
    )
    mapping = await api.made(
        "targettoextent/",
        iscsi_target=str(target["id"]),
        iscsi_extent=str(extent["id"]),
        iscsi_lunid=None,
    )
    assert mapping["iscsi_lunid"] == 0
    assert len((await api.get("targettoextent/?limit=99999")).json) == 1
    for path in (f"targettoextent/{mapping['id']}", f"target/{target['id']}", f"extent/{extent['id']}"):
        assert (await api.delete(path)).status == 204


async def test_freenas_own_tests(api: Api) -> None:
    """``tests/api1/iscsi.py``: ids as texts, addresses replaced, the service switched on and off."""
    made = await api.made(
        "authorizedinitiator/",
        id=1,
        iscsi_target_initiator_auth_network="ALL",
        iscsi_target_initiator_comment="",
        iscsi_target_initiator_initiators="ALL",
        iscsi_target_initiator_tag=1,
    )
    assert made["id"] == 2
    assert (await api.put("portal/1/", {"iscsi_target_portal_ips": ["0.0.0.0:3620"]})).status == 202
    target = await api.made("target/", iscsi_target_name="iqn.1994-09.freenasqa:target0")
    await api.made(
        "targetgroup/",
        iscsi_target=str(target["id"]),
        iscsi_target_authgroup=None,
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup="1",
        iscsi_target_authtype="None",
        iscsi_target_initialdigest="Auto",
    )
    extent = await api.made(
        "extent/",
        iscsi_target_extent_type="File",
        iscsi_target_extent_name="extent",
        iscsi_target_extent_filesize="50MB",
        iscsi_target_extent_rpm="SSD",
        iscsi_target_extent_path="/mnt/dataset03/iscsi",
    )
    await api.made(
        "targettoextent/", id=1, iscsi_extent=str(extent["id"]), iscsi_lunid=None, iscsi_target=target["id"]
    )
    service = "/api/v1.0/services/services/iscsitarget/"
    assert (await api.put(service, {"srv_enable": True})).status == 200
    assert (await api.get(service)).json["srv_state"] == "RUNNING"
    assert (await api.put(service, {"srv_enable": False})).json["srv_state"] == "STOPPED"
    assert (await api.delete(f"extent/{extent['id']}/")).status == 204


async def test_powershell_module(api: Api) -> None:
    """Numbers and booleans as texts, PUT of the whole global configuration that was read before."""
    body = (await api.get("globalconfiguration/")).json
    texts = {name: value if value is None else str(value) for name, value in body.items()}
    answer = await api.put("globalconfiguration/", {**texts, "iscsi_pool_avail_threshold": "80"})
    assert (answer.status, answer.json) == (202, {**body, "iscsi_pool_avail_threshold": 80})


async def test_small_wrappers_change_a_comment_with_disk_and_path_cut(api: Api) -> None:
    """Ruby, Python, Go: PUT with type ``Disk`` and ``disk`` = the path they read minus ``/dev/``."""
    extent = await api.made(
        "extent/",
        iscsi_target_extent_name="w",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_disk="zvol/tank/w",
    )
    shown = (await api.get(f"{BASE}extent/{extent['id']}/")).json
    answer = await api.put(
        f"extent/{extent['id']}/",
        {
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_disk": shown["iscsi_target_extent_path"].removeprefix("/dev/"),
            "iscsi_target_extent_comment": "new",
        },
    )
    assert answer.json == {**shown, "iscsi_target_extent_comment": "new"}
