"""Snapshot and clone of a File extent: blocks shared on XFS and btrfs, both independent; else refused."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cdbs
from tests.daemon import Daemon, Reply
from tests.faults.fusefs import faulty_fs
from tests.faults.kit import BLOCK, DATA_PROTECT, lun_of, pattern
from tests.media import file_system, requires_loop_devices

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture(
    scope="module",
    params=[["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], ["mkfs.btrfs", "-q", "-f"]],
    ids=["XFS", "btrfs"],
)
def sharing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that shares blocks between files."""
    with file_system(tmp_path_factory.mktemp("sharing"), request.param, 320 * MIB) as at:
        yield at


@pytest.fixture(scope="module")
def daemon(sharing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("daemon"), options=("--extent-root", str(sharing)))
    try:
        yield made.start()
        assert made.terminate() == 0
        assert not made.tracebacks()
    finally:
        made.kill9()


def clone(daemon: Daemon, extent_id: int, name: str, path: Path, **fields: Any) -> Reply:
    body = {"iscsi_target_extent_name": name, "iscsi_target_extent_path": str(path), **fields}
    return daemon.api("POST", f"services/iscsi/extent/{extent_id}/clone/", body)


def free(at: Path) -> int:
    subprocess.run(["sync", "-f", str(at)], check=True)
    space = os.statvfs(at)
    return space.f_bfree * space.f_frsize


def show(daemon: Daemon, extent_id: int, name: str) -> str:
    """Make a target for an extent; its name."""
    target = daemon.create(
        "target",
        iscsi_target_name=name,
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=1,
        iscsi_target_authtype="None",
    )
    daemon.create("targettoextent", iscsi_target=target["id"], iscsi_extent=extent_id, iscsi_lunid=0)
    return daemon.full_name(name)


@requires_loop_devices
def test_a_clone_shares_blocks_and_both_are_independent(daemon: Daemon, sharing: Path) -> None:
    disk = daemon.create_disk(
        "source", "32MB", extent={"iscsi_target_extent_path": str(sharing / "source.img")}
    )
    with lun_of(daemon, disk) as lun:
        for lba in range(0, SIZE // BLOCK, 512):
            assert lun.write(lba, pattern(lba, 512)).good
        before = free(sharing)
        made = clone(daemon, disk.extent_id, "copy", sharing / "copy.img")
        assert made.status == 201, made.text
        assert made.headers["location"].endswith(f"/extent/{made.json['id']}/")
        assert before - free(sharing) < MIB, "no data was moved"
        assert (sharing / "copy.img").stat().st_blocks * 512 >= SIZE
        assert made.json["iscsi_target_extent_naa"] != ""
        with lun_of(daemon, show(daemon, made.json["id"], "copy")) as copy:
            assert copy.capacity() == SIZE
            assert copy.read(512, 512).data == pattern(512, 512)
            assert copy.write(0, pattern(7, 512)).good
            assert lun.write(1024, pattern(8, 512)).good
            assert lun.read(0, 512).data == pattern(0, 512)
            assert copy.read(0, 512).data == pattern(7, 512)
            assert copy.read(1024, 512).data == pattern(1024, 512)
            assert lun.read(1024, 512).data == pattern(8, 512)


@requires_loop_devices
def test_a_snapshot_is_a_clone_that_nobody_writes(daemon: Daemon, sharing: Path) -> None:
    """Taken while a session writes numbered blocks in order: it holds a beginning of them, each whole."""
    disk = daemon.create_disk("live", "8MB", extent={"iscsi_target_extent_path": str(sharing / "live.img")})
    with lun_of(daemon, disk) as lun:
        tasks = [lun.send_command(cdbs.write10(lba, 64), pattern(lba, 64)) for lba in range(0, 2048, 64)]
        made = clone(
            daemon, disk.extent_id, "snapshot", sharing / "snapshot.img", iscsi_target_extent_ro=True
        )
        assert made.status == 201, made.text
        assert all(lun.wait(task).good for task in tasks)
        with lun_of(daemon, show(daemon, made.json["id"], "snapshot")) as snapshot:
            for lba in range(0, 2048, 64):
                assert snapshot.read(lba, 64).data in (pattern(lba, 64), bytes(64 * BLOCK))
            assert snapshot.write(0, pattern(1)).sense_key == DATA_PROTECT
        assert lun.write(0, pattern(2)).good


@requires_loop_devices
def test_what_was_answered_before_is_in_it(daemon: Daemon, sharing: Path) -> None:
    disk = daemon.create_disk("then", "1MB", extent={"iscsi_target_extent_path": str(sharing / "then.img")})
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(1, 64)).good
        made = clone(daemon, disk.extent_id, "now", sharing / "now.img")
        assert lun.write(0, pattern(2, 64)).good
        assert made.status == 201
        assert (sharing / "now.img").read_bytes()[: 64 * BLOCK] == pattern(1, 64)


def test_refusals_say_why_and_leave_nothing(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    disk = daemon.create_disk("plain", "1MB")
    with lun_of(daemon, disk) as lun:
        before = daemon.expect(200, "GET", "services/iscsi/extent/")
        root = daemon.extent_root
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("iscsi_target_extent_path", {"iscsi_target_extent_path": "/etc/x"}, "reside inside"),
            ("iscsi_target_extent_path", {"iscsi_target_extent_path": str(disk.path)}, "already"),
            ("iscsi_target_extent_path", {"iscsi_target_extent_path": ""}, "required"),
            ("iscsi_target_extent_name", {"iscsi_target_extent_name": "plain"}, "unique"),
        ]
        for field, fields, words in cases:
            refused = clone(daemon, disk.extent_id, "c", root / "c.img", **fields)
            assert refused.status == 409, refused.text
            assert words in str(refused.json[field])
        assert clone(daemon, 999999, "c", root / "c.img").status == 404
        assert not (root / "c.img").exists()
        assert daemon.expect(200, "GET", "services/iscsi/extent/") == before
        assert lun.write(0, pattern(3)).good
    daemon.delete_disk(disk)


def test_a_file_system_that_cannot_share_blocks_is_named(tmp_path: Path) -> None:
    with faulty_fs(tmp_path) as fs:
        daemon = Daemon(tmp_path / "d", options=("--extent-root", str(fs.at))).start()
        try:
            disk = daemon.create_disk(
                "source", "1MB", extent={"iscsi_target_extent_path": str(fs.at / "source.img")}
            )
            refused = clone(daemon, disk.extent_id, "copy", fs.at / "copy.img")
            assert refused.status == 409
            assert "cannot share blocks" in refused.json["iscsi_target_extent_path"][0]
            other = clone(daemon, disk.extent_id, "copy", daemon.extent_root / "copy.img")
            assert other.status == 409
            assert "another file system" in other.json["iscsi_target_extent_path"][0]
            assert not (fs.at / "copy.img").exists()
            with lun_of(daemon, disk) as lun:
                assert lun.write(0, pattern(1)).good
            assert daemon.terminate() == 0
        finally:
            daemon.kill9()
