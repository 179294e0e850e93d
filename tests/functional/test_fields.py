"""What the fields of an extent say is what initiators see: capacity, INQUIRY, mode pages."""

from collections.abc import Callable
from typing import Any

import pytest

from tests import cdbs
from tests.daemon import HOST, Daemon
from tests.functional.sessions import capacity
from tests.initiator import SocketInitiator

MIB = 1 << 20
LBPME = 0x80

See = Callable[[SocketInitiator, int], Any]


def inquiry(initiator: SocketInitiator, lun: int) -> bytes:
    return initiator.command(cdbs.inquiry(), read=255, lun=lun).data


def page(initiator: SocketInitiator, lun: int, code: int) -> bytes:
    """A VPD page without its header."""
    return initiator.command(cdbs.inquiry(code, 1024), read=1024, lun=lun).data[4:]


def capacity16(initiator: SocketInitiator, lun: int) -> bytes:
    return initiator.command(cdbs.read_capacity16(), read=32, lun=lun).data


def designators(initiator: SocketInitiator, lun: int) -> dict[int, bytes]:
    """Those of the unit, by type (SPC-4 §7.8.5)."""
    data, found, at = page(initiator, lun, 0x83), {}, 0
    while at < len(data):
        if not data[at + 1] & 0x30:
            found[data[at + 1] & 0x0F] = data[at + 4 : at + 4 + data[at + 3]]
        at += 4 + data[at + 3]
    return found


def block_length(initiator: SocketInitiator, lun: int) -> int:
    return int.from_bytes(capacity16(initiator, lun)[8:12], "big")


def physical_exponent(initiator: SocketInitiator, lun: int) -> int:
    """LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT."""
    return capacity16(initiator, lun)[13] & 0x0F


def transfer_granularity(initiator: SocketInitiator, lun: int) -> int:
    """OPTIMAL TRANSFER LENGTH GRANULARITY, and what UNMAP gives back (SBC-3 §6.6.3)."""
    limits = page(initiator, lun, 0xB0)
    assert limits[24:28] == (4096 // block_length(initiator, lun)).to_bytes(4, "big")
    return int.from_bytes(limits[2:4], "big")


def rotation(initiator: SocketInitiator, lun: int) -> int:
    return int.from_bytes(page(initiator, lun, 0xB1)[:2], "big")


def provisioned(initiator: SocketInitiator, lun: int) -> tuple[bool, bool, bool]:
    """LBPME, LBPU and the limits of UNMAP say the same."""
    return (
        bool(capacity16(initiator, lun)[14] & LBPME),
        bool(page(initiator, lun, 0xB2)[1] & 0x80),
        any(page(initiator, lun, 0xB0)[16:24]),
    )


def write_protected(initiator: SocketInitiator, lun: int) -> tuple[bool, bool]:
    """WP of both mode parameter headers."""
    six = initiator.command(cdbs.mode_sense6(0x3F), read=255, lun=lun).data
    ten = initiator.command(cdbs.mode_sense10(0x3F), read=1024, lun=lun).data
    return bool(six[2] & 0x80), bool(ten[3] & 0x80)


T10_ID = b"TARGETD iSCSI Disk      SN-"

CASES: list[tuple[dict[str, Any], See, Any]] = [
    ({}, block_length, 512),
    ({}, physical_exponent, 3),
    ({}, transfer_granularity, 8),
    ({}, rotation, 1),
    ({}, provisioned, (True, True, True)),
    ({}, write_protected, (False, False)),
    ({"filesize": "3MB"}, capacity, 3 * MIB),
    ({"blocksize": 4096}, block_length, 4096),
    ({"blocksize": 4096}, physical_exponent, 0),
    ({"blocksize": 2048}, transfer_granularity, 2),
    ({"pblocksize": True}, physical_exponent, 0),
    ({"pblocksize": True}, transfer_granularity, 1),
    ({"serial": "SN-7"}, lambda i, lun: page(i, lun, 0x80), b"SN-7"),
    ({"serial": "SN-8"}, lambda i, lun: designators(i, lun)[1], (T10_ID + b"8").ljust(55)),
    ({"serial": "SN-9", "xen": True}, lambda i, lun: designators(i, lun)[1], T10_ID + b"9"),
    ({"naa": "0x5000c500a1b2c3d4"}, lambda i, lun: designators(i, lun)[3].hex(), "5000c500a1b2c3d4"),
    ({"rpm": "7200"}, rotation, 7200),
    ({"rpm": "Unknown"}, rotation, 0),
    ({"ro": True}, write_protected, (True, True)),
    ({"removable": True}, lambda i, lun: inquiry(i, lun)[1] & 0x80, 0x80),
    ({"avail_threshold": 20}, lambda i, lun: page(i, lun, 0xB2)[3], 80),
    ({"allocate": True}, provisioned, (False, False, False)),
]


@pytest.fixture(scope="module")
def initiator(shared_daemon: Daemon):  # type: ignore[no-untyped-def]
    """Logged in to a target that has an extent of each case, LUN by number."""
    target = shared_daemon.create(
        "target",
        iscsi_target_name="fields",
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=1,
        iscsi_target_authtype="None",
    )
    for lun, (fields, _, _) in enumerate(CASES):
        path = shared_daemon.extent_root / f"fields{lun}.img"
        with path.open("wb") as file:
            file.truncate(MIB)  # a read-only extent makes no file
        values = {
            "name": f"fields{lun}",
            "type": "File",
            "path": str(path),
            "filesize": "1MB",
            **fields,
        }
        extent = shared_daemon.create(
            "extent", **{f"iscsi_target_extent_{name}": value for name, value in values.items()}
        )
        shared_daemon.create(
            "targettoextent", iscsi_target=target["id"], iscsi_extent=extent["id"], iscsi_lunid=lun
        )
    with SocketInitiator((HOST, shared_daemon.portal_port)) as made:
        made.login(shared_daemon.full_name("fields"))
        for lun in range(len(CASES)):
            made.command(cdbs.test_unit_ready(), lun=lun)  # its power-on
        yield made


@pytest.mark.parametrize("lun", range(len(CASES)), ids=lambda lun: f"{lun}-{CASES[lun][0]}")
def test_a_field_is_seen(initiator: SocketInitiator, lun: int) -> None:
    _, see, expected = CASES[lun]
    assert see(initiator, lun) == expected


def test_the_naa_that_the_api_tells_is_the_units_and_nobody_elses(
    shared_daemon: Daemon, initiator: SocketInitiator
) -> None:
    """SPC-4 §7.8.5: by it multipath software and copy managers know the unit."""
    told = {
        extent["iscsi_target_extent_name"]: extent["iscsi_target_extent_naa"]
        for extent in shared_daemon.expect(200, "GET", "services/iscsi/extent/?limit=0")
    }
    seen = {f"fields{lun}": "0x" + designators(initiator, lun)[3].hex() for lun in range(len(CASES))}
    assert seen == {name: naa.lower() for name, naa in told.items()}
    assert len(set(seen.values())) == len(CASES)
