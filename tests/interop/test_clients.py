"""What real clients of the API make, from the first request to bytes on the LUN (api-semantics §9).

The requests are those of ``tests/api/test_clients.py`` with the volumes made too, against the real daemon
over a directory pool; each sequence ends with a login to what it made, verified I/O, and the client's own
way to take it down.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.daemon import HOST, Daemon
from tests.initiator import SocketInitiator
from tests.interop.using import gone, use

BASENAME = "iqn.2011-03.org.example.istgt"
ZVOLS = "storage/volume/tank/zvols"
MB = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    pool = tmp_path_factory.mktemp("tank")
    daemon = Daemon(tmp_path_factory.mktemp("clients"), ["--pool", f"tank={pool}"]).start()
    yield daemon
    assert not daemon.tracebacks()
    assert daemon.terminate() == 0


def post(daemon: Daemon, path: str, **body: Any) -> dict[str, Any]:
    """POST to a path below the iSCSI resources, spelled as the client spells it."""
    made = daemon.expect(201, "POST", f"services/iscsi/{path}", body)
    assert isinstance(made, dict)
    return made


def listed(daemon: Daemon, path: str) -> list[dict[str, Any]]:
    found = daemon.expect(200, "GET", f"services/iscsi/{path}")
    assert isinstance(found, list)
    return found


def remove(daemon: Daemon, *paths: str) -> None:
    for path in paths:
        daemon.expect(204, "DELETE", path if path.startswith("storage") else f"services/iscsi/{path}")


def test_freenas_iscsi_provisioner(daemon: Daemon) -> None:
    """Go: dataset, zvol (202), target, group, extent, LUN 0; deletes target, extent, zvol."""
    assert daemon.expect(200, "GET", "storage/dataset/tank/")["avail"] > 0
    basename = daemon.expect(200, "GET", "services/iscsi/globalconfiguration/")["iscsi_basename"]
    daemon.expect(202, "POST", f"{ZVOLS}/", {"name": "pvc-1", "volsize": "16M", "sparse": True})
    target = post(daemon, "target/", iscsi_target_name="pvc-1", iscsi_target_mode="iscsi")
    post(
        daemon,
        "targetgroup/",
        iscsi_target=target["id"],
        iscsi_target_authgroup=None,
        iscsi_target_authtype="None",
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=1,
        iscsi_target_initialdigest="Auto",
    )
    extent = post(
        daemon,
        "extent/",
        iscsi_target_extent_name="pvc-1",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_disk="zvol/tank/pvc-1",
        iscsi_target_extent_insecure_tpc=True,
        iscsi_target_extent_blocksize=512,
        iscsi_target_extent_pblocksize=False,
        iscsi_target_extent_rpm="SSD",
    )
    post(daemon, "targettoextent/", iscsi_target=target["id"], iscsi_extent=extent["id"], iscsi_lunid=0)
    use(daemon, f"{basename}:pvc-1", 0, 16 * MB)
    remove(daemon, f"target/{target['id']}/", f"extent/{extent['id']}/", f"{ZVOLS}/pvc-1/")
    gone(daemon, f"{basename}:pvc-1")


def test_freenas_proxmox(daemon: Daemon) -> None:
    """Perl: volumes are made over SSH by ``zfs``, so before; ``?limit=0``; LUNs by number and path."""
    made = post(daemon, "target/", iscsi_target_name="proxmox", iscsi_target_portalgroup=1)
    assert daemon.expect(200, "GET", "system/version/")["fullversion"].startswith("FreeNAS-")
    for lun in (0, 1):
        name = f"vm-100-disk-{lun}"
        daemon.expect(202, "POST", f"{ZVOLS}/", {"name": name, "volsize": f"{8 + lun}MiB"})
        extent = post(
            daemon,
            "extent/",
            iscsi_target_extent_type="Disk",
            iscsi_target_extent_name=f"tank/{name}",
            iscsi_target_extent_disk=f"zvol/tank/{name}",
        )
        post(daemon, "targettoextent/", iscsi_target=made["id"], iscsi_extent=extent["id"], iscsi_lunid=lun)
        use(daemon, f"{BASENAME}:proxmox", lun, (8 + lun) * MB)
    extents = {item["id"]: item for item in listed(daemon, "extent/?limit=0")}
    mappings = [
        item for item in listed(daemon, "targettoextent/?limit=0") if item["iscsi_target"] == made["id"]
    ]
    assert {extents[item["iscsi_extent"]]["iscsi_target_extent_path"] for item in mappings} == {
        "/dev/zvol/tank/vm-100-disk-0",
        "/dev/zvol/tank/vm-100-disk-1",
    }
    for item in mappings:
        remove(daemon, f"targettoextent/{item['id']}/", f"extent/{item['iscsi_extent']}/")
    remove(daemon, f"target/{made['id']}/", f"{ZVOLS}/vm-100-disk-0/", f"{ZVOLS}/vm-100-disk-1/")


def test_cinder_driver(daemon: Daemon) -> None:
    """Python 2: statistics, zvol, target, ``targetgroup//``, extent, LUN without a number."""
    pool = daemon.expect(200, "GET", "storage/volume/tank/")
    assert isinstance(pool["avail"], int) and isinstance(pool["used"], int)
    daemon.expect(202, "POST", f"{ZVOLS}/", {"name": "volume-1", "volsize": "0.5 GiB"})
    post(daemon, "target/", iscsi_target_name="volume-1", iscsi_target_alias="")
    (target_id,) = (
        item["id"] for item in listed(daemon, "target/") if item["iscsi_target_name"] == "volume-1"
    )
    post(
        daemon,
        "targetgroup//",
        iscsi_target=target_id,
        iscsi_target_authgroup=None,
        iscsi_target_portalgroup="1",
        iscsi_target_initiatorgroup="1",
        iscsi_target_authtype="None",
        iscsi_target_initialdigest="Auto",
    )
    post(
        daemon,
        "extent/",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_name="volume-1",
        iscsi_target_extent_disk="zvol/tank/volume-1",
    )
    (extent_id,) = (
        item["id"] for item in listed(daemon, "extent/") if item["iscsi_target_extent_name"] == "volume-1"
    )
    post(daemon, "targettoextent/", iscsi_target=target_id, iscsi_extent=extent_id)
    use(daemon, f"{BASENAME}:volume-1", 0, 512 * MB)
    remove(daemon, f"target/{target_id}/", f"extent/{extent_id}/")
    daemon.expect(204, "DELETE", f"{ZVOLS}/volume-1/", {"cascade": True})


def test_opensvc(daemon: Daemon) -> None:
    """Python: ``"<n>MB"`` files and zvols, initiators joined by commas, ``targetgroup//``, authgroup -1."""
    ours, iqn = "iqn.2009-11.com.opensvc.srv:n2.1", "iqn.2009-11.com.opensvc:svc"
    initiator = post(
        daemon,
        "authorizedinitiator",
        iscsi_target_initiator_initiators=f"iqn.2009-11.com.opensvc.srv:n1.1,{ours}",
        iscsi_target_initiator_auth_network="ALL",
        iscsi_target_initiator_comment="svc",
    )
    target = post(daemon, "target/", iscsi_target_name=iqn, iscsi_target_alias="")
    post(
        daemon,
        "targetgroup//",
        iscsi_target=target["id"],
        iscsi_target_authgroup=-1,
        iscsi_target_authtype="None",
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=initiator["id"],
        iscsi_target_initialdigest="Auto",
    )
    assert daemon.expect(200, "GET", "storage/volume/?limit=0&format=json")[0]["name"] == "tank"
    daemon.expect(202, "POST", f"{ZVOLS}/", {"name": "svc/disk2", "volsize": "12MB", "sparse": True})
    extents = [
        post(
            daemon,
            "extent/",
            iscsi_target_extent_type="File",
            iscsi_target_extent_name="disk1",
            iscsi_target_extent_insecure_tpc=True,
            iscsi_target_extent_blocksize=512,
            iscsi_target_extent_filesize="10MB",
            iscsi_target_extent_path=str(daemon.extent_root / "svc" / "disk1"),
        ),
        post(
            daemon,
            "extent/",
            iscsi_target_extent_type="Disk",
            iscsi_target_extent_name="disk2",
            iscsi_target_extent_disk="zvol/tank/svc/disk2",
        ),
    ]
    for extent in extents:
        post(daemon, "targettoextent/", iscsi_target=target["id"], iscsi_extent=extent["id"])
    use(daemon, iqn, 0, 10 * MB, initiator=ours)
    use(daemon, iqn, 1, 12 * MB, initiator=ours)
    gone(daemon, iqn)  # for another initiator it never was there
    remove(
        daemon,
        *(f"extent/{extent['id']}" for extent in extents),
        f"target/{target['id']}",
        f"authorizedinitiator/{initiator['id']}",
        f"{ZVOLS}/svc/disk2",
    )


def test_democratic_csi(daemon: Daemon) -> None:
    """JavaScript: 4096-byte blocks, pages of 100, names compared before each DELETE; a volume that grows."""
    daemon.expect(202, "POST", f"{ZVOLS}/", {"name": "csi/pvc-9", "volsize": 32 * MB})
    target = post(
        daemon,
        "target",
        iscsi_target_name="csi-pvc-9",
        iscsi_target_alias="",
        iscsi_target_mode="iscsi",
    )
    post(
        daemon,
        "targetgroup",
        iscsi_target=target["id"],
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=1,
        iscsi_target_authtype="None",
        iscsi_target_authgroup="",
        iscsi_target_initialdigest="Auto",
    )
    extent = post(
        daemon,
        "extent",
        iscsi_target_extent_comment="",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_name="csi-pvc-9",
        iscsi_target_extent_insecure_tpc=True,
        iscsi_target_extent_xen=False,
        iscsi_target_extent_avail_threshold=80,
        iscsi_target_extent_blocksize=4096,
        iscsi_target_extent_pblocksize=True,
        iscsi_target_extent_rpm="5400",
        iscsi_target_extent_ro=False,
        iscsi_target_extent_disk="zvol/tank/csi/pvc-9",
    )
    post(daemon, "targettoextent", iscsi_target=target["id"], iscsi_extent=extent["id"], iscsi_lunid=0)
    use(daemon, f"{BASENAME}:csi-pvc-9", 0, 32 * MB, 4096)
    daemon.expect(200, "PUT", f"{ZVOLS}/csi/pvc-9", {"volsize": 64 * MB})
    use(daemon, f"{BASENAME}:csi-pvc-9", 0, 64 * MB, 4096)
    for resource, made, key in (("target", target, "name"), ("extent", extent, "extent_name")):
        shown = daemon.expect(200, "GET", f"services/iscsi/{resource}/{made['id']}")
        assert shown[f"iscsi_target_{key}"] == "csi-pvc-9"
        remove(daemon, f"{resource}/{made['id']}")
    remove(daemon, f"{ZVOLS}/csi/pvc-9")


def test_hypervisors_library(daemon: Daemon) -> None:
    """C#: ids as texts, ``"null"``, ``//api`` and ``?limit=99999``, DELETE without a final slash."""
    daemon.expect(202, "POST", f"{ZVOLS}/", {"name": "blade-1", "volsize": "8M"})
    target = post(daemon, "target/", iscsi_target_name="blade-1", iscsi_target_alias="", id="0")
    group = {
        "id": "13",
        "iscsi_target": str(target["id"]),
        "iscsi_target_authgroup": "null",
        "iscsi_target_authtype": "None",
        "iscsi_target_initialdigest": "None",
        "iscsi_target_initiatorgroup": "null",
        "iscsi_target_portalgroup": "1",
    }
    daemon.expect(201, "POST", "//api/v1.0/services/iscsi/targetgroup/", group)
    extent = post(
        daemon,
        "extent/",
        iscsi_target_extent_name="blade-1",
        iscsi_target_extent_type="ZVOL",
        iscsi_target_extent_path="zvol/tank/blade-1",
    )
    mapping = post(
        daemon,
        "targettoextent/",
        iscsi_target=str(target["id"]),
        iscsi_extent=str(extent["id"]),
        iscsi_lunid=None,
    )
    use(daemon, f"{BASENAME}:blade-1", mapping["iscsi_lunid"], 8 * MB)
    assert mapping["id"] in [item["id"] for item in listed(daemon, "targettoextent/?limit=99999")]
    remove(
        daemon,
        f"targettoextent/{mapping['id']}",
        f"target/{target['id']}",
        f"extent/{extent['id']}",
        f"{ZVOLS}/blade-1",
    )


def test_freenas_own_tests(daemon: Daemon) -> None:
    """``tests/api1/iscsi.py``: a full name, a File of 50MB, the service off and on again."""
    iqn = "iqn.1994-09.freenasqa:target0"
    target = post(daemon, "target/", iscsi_target_name=iqn)
    post(
        daemon,
        "targetgroup/",
        iscsi_target=str(target["id"]),
        iscsi_target_authgroup=None,
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup="1",
        iscsi_target_authtype="None",
        iscsi_target_initialdigest="Auto",
    )
    extent = post(
        daemon,
        "extent/",
        iscsi_target_extent_type="File",
        iscsi_target_extent_name="extent",
        iscsi_target_extent_filesize="50MB",
        iscsi_target_extent_rpm="SSD",
        iscsi_target_extent_path=str(daemon.extent_root / "iscsi"),
    )
    post(
        daemon,
        "targettoextent/",
        id=1,
        iscsi_extent=str(extent["id"]),
        iscsi_lunid=None,
        iscsi_target=target["id"],
    )
    service = "services/services/iscsitarget/"
    assert daemon.expect(200, "PUT", service, {"srv_enable": False})["srv_state"] == "STOPPED"
    with pytest.raises(ConnectionRefusedError):
        SocketInitiator((HOST, daemon.portal_port))
    assert daemon.expect(200, "PUT", service, {"srv_enable": True})["srv_state"] == "RUNNING"
    use(daemon, iqn, 0, 50 * MB)
    remove(daemon, f"target/{target['id']}/", f"extent/{extent['id']}/")
