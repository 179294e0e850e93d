"""Memory and null extents: for tests and benchmarks, and never to be taken for a disk."""

from typing import Any

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.functional.sessions import BLOCK, attention, capacity, log_in, read, write

MIB = 1 << 20


def volatile(daemon: Daemon, kind: str, name: str, size: str) -> Disk:
    fields: dict[str, Any] = {"type": kind, "path": "", "filesize": size}
    extent = {f"iscsi_target_extent_{field}": value for field, value in fields.items()}
    return daemon.create_disk(name, extent=extent)


@pytest.mark.parametrize(("kind", "kept"), [("Memory", True), ("Null", False)])
def test_it_says_what_it_is_and_forgets_at_the_end(daemon: Daemon, kind: str, kept: bool) -> None:
    """PRODUCT IDENTIFICATION says so to initiators, the type to those who ask the API."""
    disk = volatile(daemon, kind, "bench", "64MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    shown = daemon.expect(200, "GET", path)
    assert shown["iscsi_target_extent_type"] == kind
    data = b"\x5a" * MIB
    with log_in(daemon, disk.iqn) as initiator:
        told = initiator.command(cdbs.inquiry(), read=96).data
        assert told[16:32] == f"VOLATILE {kind.upper()}".encode().ljust(16)
        assert write(initiator, 0, data).good
        assert read(initiator, 0, MIB // BLOCK) == (data if kept else bytes(MIB))
        daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "1TB"})
        assert attention(initiator) == (0x2A, 0x09)
        assert capacity(initiator) == 1 << 40
        assert read(initiator, 0, MIB // BLOCK) == (data if kept else bytes(MIB))
        assert not any(read(initiator, 0x7FFFFFF0, 8))
    shown = daemon.expect(200, "GET", path)
    writable = {
        name: value for name, value in shown.items() if name not in ("id", "iscsi_target_extent_status")
    }
    assert daemon.api("PUT", path, writable).status == 202, "what was got can be put back"
    daemon.restart()
    with log_in(daemon, disk.iqn) as initiator:
        assert not any(read(initiator, 0, MIB // BLOCK))


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"filesize": "0"}, "filesize"),
        ({"filesize": "1MB", "path": "/etc/passwd"}, "path"),
        ({"filesize": "1MB", "disk": "sda"}, "disk"),
    ],
)
def test_it_has_a_size_and_no_place(shared_daemon: Daemon, fields: dict[str, str], wrong: str) -> None:
    values = {"name": "refused", "type": "Memory", **fields}
    body = {f"iscsi_target_extent_{name}": value for name, value in values.items()}
    refused = shared_daemon.api("POST", "services/iscsi/extent/", body)
    assert refused.status == 409
    assert list(refused.json) == [f"iscsi_target_extent_{wrong}"]
