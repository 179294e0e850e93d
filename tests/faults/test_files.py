"""Files that are cut off, vanish, come back, or grow under a LUN that is in use: true sense, no death."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon
from tests.faults.kit import (
    CAPACITY_DATA_CHANGED,
    MEDIUM_ERROR,
    MEDIUM_MAY_HAVE_CHANGED,
    MEDIUM_NOT_PRESENT,
    NOT_READY,
    UNIT_ATTENTION,
    UNRECOVERED_READ_ERROR,
    WRITE_ERROR,
    eventually,
    lun_of,
    pattern,
    sense,
    status_of,
)
from tests.initiator import ConnectionClosed

MIB = 1 << 20


def test_a_file_cut_to_nothing_under_a_reader_and_a_writer(shared_daemon: Daemon) -> None:
    """A reply that was promised from a page that is gone drops the connection (EFAULT); the retry meets the
    true error. The daemon never dies of SIGBUS."""
    daemon = shared_daemon
    disk = daemon.create_disk("cut", "8MB")
    with lun_of(daemon, disk) as reader, lun_of(daemon, disk, name="iqn.2016-04.com.example:w") as writer:
        assert writer.write(0, pattern(0, 512)).good
        for _ in range(3):  # until it is known to be in memory
            assert reader.read(0, 512).data == pattern(0, 512)
        os.truncate(disk.path, 0)
        with suppress(ConnectionClosed):
            met = reader.read(0, 512)
            assert sense(met) == (MEDIUM_ERROR, UNRECOVERED_READ_ERROR)
    with lun_of(daemon, disk) as reader:
        met = reader.read(8, 8)
        assert sense(met) == (MEDIUM_ERROR, UNRECOVERED_READ_ERROR)
        assert int.from_bytes(met.sense[3:7], "big") == 8
        assert sense(reader.write(8, pattern(0, 8))) == (MEDIUM_ERROR, WRITE_ERROR)
        eventually(lambda: "cut off" in status_of(daemon, disk.extent_id), "the status says so")
        os.truncate(disk.path, 8 * MIB)
        eventually(lambda: reader.read(0).good, "whole again, it is read again")
        assert reader.write(0, pattern(7)).good
        assert reader.read(0).data == pattern(7)
        eventually(lambda: status_of(daemon, disk.extent_id) == "ok", "the status is ok again")
    daemon.delete_disk(disk)


def test_a_file_that_vanishes_makes_its_lun_not_ready_until_it_is_back(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    disk, other = daemon.create_disk("vanished", "4MB"), daemon.create_disk("stays", "4MB")
    away = disk.path.with_suffix(".away")
    with lun_of(daemon, disk) as lun, lun_of(daemon, other) as beside:
        assert lun.write(0, pattern(1, 8)).good
        assert lun.flush().good
        disk.path.rename(away)
        eventually(
            lambda: sense(lun.do(cdbs.test_unit_ready())) == (NOT_READY, MEDIUM_NOT_PRESENT),
            "the LUN is not ready",
        )
        assert sense(lun.read(0)) == (NOT_READY, MEDIUM_NOT_PRESENT)
        assert beside.write(0, pattern(2)).good
        assert "No such file" in status_of(daemon, disk.extent_id)
        away.rename(disk.path)
        eventually(lambda: lun.do(cdbs.test_unit_ready()).sense_key != NOT_READY, "the LUN is ready again")
        assert lun.ready().read(0, 8).data == pattern(1, 8)
        assert status_of(daemon, disk.extent_id) == "ok"
    daemon.delete_disk(disk)
    daemon.delete_disk(other)


def test_a_medium_that_comes_back_is_told_as_one_that_may_have_changed(shared_daemon: Daemon) -> None:
    """28h/00h (SPC-4 §5.14, SBC-3 §4.9): once, and then commands go on."""
    daemon = shared_daemon
    disk = daemon.create_disk("back", "4MB")
    away = disk.path.with_suffix(".away")
    with lun_of(daemon, disk) as lun:
        disk.path.rename(away)
        eventually(lambda: lun.read(0).sense_key == NOT_READY, "the LUN is not ready")
        away.rename(disk.path)
        met = []
        eventually(
            lambda: met.append(sense(lun.read(0))) or met[-1][0] == UNIT_ATTENTION, "the attention comes"
        )
        assert met[-1] == (UNIT_ATTENTION, MEDIUM_MAY_HAVE_CHANGED)
        assert lun.ready().read(0).good
    daemon.delete_disk(disk)


def test_a_file_of_automatic_size_is_followed_when_it_grows(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    file = daemon.extent_root / "grows.img"
    with file.open("wb") as made:
        made.truncate(MIB)
    disk = daemon.create_disk("grows", "0")
    with lun_of(daemon, disk) as lun:
        assert lun.capacity() == MIB
        os.truncate(file, 3 * MIB)
        met = []
        eventually(
            lambda: met.append(sense(lun.do(cdbs.test_unit_ready()))) or met[-1][0] == UNIT_ATTENTION,
            "the new capacity is told",
        )
        assert met[-1] == (UNIT_ATTENTION, CAPACITY_DATA_CHANGED)
        assert lun.capacity() == 3 * MIB
        assert lun.write(4096, pattern(3)).good
    daemon.delete_disk(disk)


def test_a_medium_that_is_missing_at_the_start_is_taken_when_it_comes(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path).start()
    try:
        disk = daemon.create_disk("late", "1MB")
        daemon.terminate()
        away = disk.path.with_suffix(".away")
        disk.path.rename(away)
        daemon.start()
        with lun_of(daemon, disk) as lun:
            assert sense(lun.read(0)) == (NOT_READY, MEDIUM_NOT_PRESENT)
            assert "No such file" in status_of(daemon, disk.extent_id)
            away.rename(disk.path)
            eventually(lambda: lun.read(0).good, "the LUN works")
        assert daemon.terminate() == 0
        assert not daemon.tracebacks()
    finally:
        daemon.kill9()


def test_a_second_daemon_does_not_get_the_same_file(shared_daemon: Daemon, tmp_path: Path) -> None:
    disk = shared_daemon.create_disk("owned", "1MB")
    second = Daemon(tmp_path, options=("--extent-root", str(shared_daemon.extent_root))).start()
    try:
        refused = second.api(
            "POST",
            "services/iscsi/extent/",
            {
                "iscsi_target_extent_name": "owned",
                "iscsi_target_extent_type": "File",
                "iscsi_target_extent_path": str(disk.path),
                "iscsi_target_extent_filesize": "1MB",
            },
        )
        assert refused.status == 409
        assert "another process has the file open" in refused.json["iscsi_target_extent_path"][0]
    finally:
        second.kill9()
    shared_daemon.delete_disk(disk)


@pytest.mark.parametrize("allocate", [False, True])
def test_a_fully_allocated_file_has_its_blocks_and_keeps_them(shared_daemon: Daemon, allocate: bool) -> None:
    daemon = shared_daemon
    disk = daemon.create_disk("thick", "4MB", extent={"iscsi_target_extent_allocate": allocate})
    assert (disk.path.stat().st_blocks * 512 >= 4 * MIB) == allocate
    with lun_of(daemon, disk) as lun:
        provisioned = bool(lun.do(cdbs.read_capacity16(), read=32).data[14] & 0x80)
        assert provisioned != allocate, "LBPME says whether blocks can be given back (SBC-3 §5.16.2)"
    if not allocate:
        daemon.expect(
            202,
            "PUT",
            f"services/iscsi/extent/{disk.extent_id}/",
            {"iscsi_target_extent_allocate": True},
        )
        assert disk.path.stat().st_blocks * 512 >= 4 * MIB
    daemon.delete_disk(disk)


def test_an_extent_cannot_be_allocated_beyond_the_file_system(shared_daemon: Daemon) -> None:
    refused = shared_daemon.api(
        "POST",
        "services/iscsi/extent/",
        {
            "iscsi_target_extent_name": "huge",
            "iscsi_target_extent_type": "File",
            "iscsi_target_extent_path": str(shared_daemon.extent_root / "huge.img"),
            "iscsi_target_extent_filesize": "8000TB",
            "iscsi_target_extent_allocate": True,
        },
    )
    assert refused.status == 409
    assert refused.json["iscsi_target_extent_path"]
    assert not (shared_daemon.extent_root / "huge.img").exists()
