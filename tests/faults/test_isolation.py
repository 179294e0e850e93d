"""A medium that hangs or fails keeps that to itself, shown on a file system that does so on command.

Nothing here measures time: whatever is said to be answered "while it hangs" is answered before the medium is
let go. ``bench/isolation.py`` has the figures.
"""

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protocol.enums import LogoutReason
from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.fusefs import OPERATIONS, FaultyFs, faulty_fs
from tests.faults.kit import (
    DATA_PROTECT,
    MEDIUM_ERROR,
    NOT_READY,
    PATIENCE_S,
    SPACE_ALLOCATION_FAILED,
    UNIT_ATTENTION,
    UNRECOVERED_READ_ERROR,
    WRITE_ERROR,
    eventually,
    lun_of,
    pattern,
    sense,
    status_of,
)

MIB = 1 << 20
ABORT_TASK = 1
LOGICAL_UNIT_RESET = 5
FUNCTION_COMPLETE = 0


@pytest.fixture(scope="module")
def fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyFs]:
    with faulty_fs(tmp_path_factory.mktemp("fuse")) as made:
        yield made


@pytest.fixture(scope="module")
def daemon(fs: FaultyFs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("daemon"), options=("--extent-root", str(fs.at)))
    try:
        yield made.start()
        fs.go()
        fs.clear()
        assert made.terminate() == 0
        assert not made.tracebacks()
    finally:
        made.kill9()


_made = iter(range(1000))


@pytest.fixture
def hanging(daemon: Daemon, fs: FaultyFs) -> Iterator[Disk]:
    """A disk on the faulty file system, which is well at the beginning and at the end."""
    disk = disk_on(daemon, fs)
    yield disk
    fs.clear()
    fs.go()
    daemon.delete_disk(disk)


def disk_on(daemon: Daemon, fs: FaultyFs) -> Disk:
    name = f"faulty{next(_made)}"
    disk = daemon.create_disk(name, "8MB", extent={"iscsi_target_extent_path": str(fs.at / f"{name}.img")})
    return Disk(disk.target_id, disk.extent_id, disk.mapping_id, disk.iqn, disk.url, fs.at / f"{name}.img")


@pytest.fixture
def well(daemon: Daemon) -> Iterator[Disk]:
    disk = daemon.create_disk(f"well{next(_made)}", "8MB")
    yield disk
    daemon.delete_disk(disk)


@pytest.mark.parametrize(
    ("operation", "cdb", "data"),
    [
        ("write", cdbs.write10(0, 8), pattern(0, 8)),
        ("read", cdbs.read10(8192, 8), b""),
        ("getattr", cdbs.read10(8192, 8), b""),
        ("fsync", cdbs.synchronize_cache10(0, 0), b""),
    ],
)
def test_while_a_medium_hangs_everything_else_is_answered(
    daemon: Daemon, fs: FaultyFs, hanging: Disk, well: Disk, operation: str, cdb: bytes, data: bytes
) -> None:
    """Another LUN, the same LUN's own state, ABORT TASK, LOGICAL UNIT RESET, a new login, the API, logout."""
    read = 4096 if operation in ("read", "getattr") else 0
    with lun_of(daemon, hanging) as stuck, lun_of(daemon, well) as other:
        stuck.write(16, pattern(5))
        # a read asks for the size first, and would wait there
        fs.stall(*(name for name in OPERATIONS if (operation, name) != ("read", "getattr")))
        task = stuck.send_command(cdb, data, read)
        fs.wait_for_stalled(operation)
        # more than the lane has threads
        more = [stuck.send_command(cdbs.write10(64 + i * 8, 8), pattern(i, 8)) for i in range(12)]
        assert other.write(0, pattern(1, 64)).good
        assert other.flush().good
        assert other.read(0, 64).data == pattern(1, 64)
        assert stuck.do(cdbs.inquiry(), read=255).status == 0
        assert stuck.do(cdbs.test_unit_ready()).good
        assert stuck.task_management(ABORT_TASK, task=task) == FUNCTION_COMPLETE
        assert stuck.task_management(LOGICAL_UNIT_RESET) == FUNCTION_COMPLETE
        stuck.tasks.clear()
        assert more
        with lun_of(daemon, hanging, name="iqn.2016-04.com.example:late") as late:
            assert late.do(cdbs.test_unit_ready()).good
            assert late.logout().response == 0
        assert daemon.expect(200, "GET", "services/iscsi/extent/")
        assert status_of(daemon, hanging.extent_id)
        assert daemon.api("GET", "/metrics").status == 200
        extra = daemon.create_disk(f"extra{next(_made)}", "1MB")
        with lun_of(daemon, extra) as new:
            assert new.write(0, pattern(3)).good
        daemon.delete_disk(extra)
        assert stuck.logout(LogoutReason.CLOSE_SESSION).response == 0
        fs.go()
    with lun_of(daemon, hanging) as again:
        assert again.write(0, pattern(9, 8)).good
        assert again.read(0, 8).data == pattern(9, 8)


def test_an_extent_that_hangs_can_be_deleted(daemon: Daemon, fs: FaultyFs) -> None:
    """Its flush goes on without the change that waits for nobody else's medium."""
    disk = disk_on(daemon, fs)
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(0)).good
        fs.stall("fsync")
        daemon.delete("target", disk.target_id)
        daemon.delete("extent", disk.extent_id)
        fs.wait_for_stalled("fsync")
        other = daemon.create_disk(f"after{next(_made)}", "1MB")
        fs.go()
    daemon.delete_disk(other)


def test_a_medium_that_hangs_while_it_is_opened_holds_only_its_own_request(
    daemon: Daemon, fs: FaultyFs, well: Disk
) -> None:
    fs.stall("open")
    made: list[Any] = []
    fields = {
        "iscsi_target_extent_name": "opening",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": str(fs.at / "opening.img"),
        "iscsi_target_extent_filesize": "1MB",
    }
    asking = threading.Thread(target=lambda: made.append(daemon.create("extent", **fields)))
    asking.start()
    fs.wait_for_stalled("open")
    with lun_of(daemon, well) as lun:
        assert lun.write(0, pattern(2)).good
        assert lun.flush().good
    assert daemon.expect(200, "GET", "services/iscsi/target/")
    assert not made
    fs.go()
    asking.join(20)
    assert made and made[0]["iscsi_target_extent_status"] == "ok"
    daemon.delete("extent", made[0]["id"])


@pytest.mark.parametrize(
    ("number", "operation", "expected"),
    [
        (errno.EIO, "read", (MEDIUM_ERROR, UNRECOVERED_READ_ERROR)),
        (errno.EIO, "write", (MEDIUM_ERROR, WRITE_ERROR)),
        (errno.ENOSPC, "write", (DATA_PROTECT, SPACE_ALLOCATION_FAILED)),
        (errno.EDQUOT, "write", (DATA_PROTECT, SPACE_ALLOCATION_FAILED)),
        (errno.EROFS, "write", (DATA_PROTECT, (0x27, 0x00))),
        (errno.ENODEV, "write", (NOT_READY, (0x3A, 0x00))),
        (errno.ESTALE, "write", (NOT_READY, (0x04, 0x00))),
        (errno.ENOMEM, "write", (0xB, (0x55, 0x00))),
        (errno.ETIMEDOUT, "write", (0xB, (0x08, 0x01))),
    ],
)
def test_each_errno_has_its_sense_and_is_over_when_it_is_over(
    daemon: Daemon, fs: FaultyFs, hanging: Disk, number: int, operation: str, expected: Any
) -> None:
    """The very next command succeeds; none is needed to find out that the medium is well again."""
    with lun_of(daemon, hanging) as lun:
        fs.fail(number, operation)
        reply = lun.read(4096, 8) if operation == "read" else lun.write(8, pattern(1, 8))
        assert sense(reply) == expected
        fs.clear()
        assert lun.write(8, pattern(4, 8)).good
        assert lun.read(8, 8).data == pattern(4, 8)
        assert lun.read(4096, 8).data == bytes(4096)


def test_a_file_system_that_fails_altogether_is_met_and_left(
    daemon: Daemon, fs: FaultyFs, hanging: Disk
) -> None:
    """EIO from stat(2) too: medium errors, seen in the status, and over at once when it is over."""
    with lun_of(daemon, hanging) as lun:
        fs.fail(errno.EIO)
        assert sense(lun.write(0, pattern(0))) == (MEDIUM_ERROR, WRITE_ERROR)
        eventually(lambda: status_of(daemon, hanging.extent_id) != "ok", "the status says so")
        fs.clear()
        assert lun.write(0, pattern(0)).good
        eventually(lambda: status_of(daemon, hanging.extent_id) == "ok", "the status is ok again")


def test_truncation_behind_the_file_system(daemon: Daemon, fs: FaultyFs, hanging: Disk) -> None:
    with lun_of(daemon, hanging) as lun:
        assert lun.write(0, pattern(0, 8)).good
        assert lun.read(0, 8).good
        fs.truncate(hanging.path.name, 0)
        assert sense(lun.read(8192, 8)) == (MEDIUM_ERROR, UNRECOVERED_READ_ERROR)
        fs.truncate(hanging.path.name, 8 * MIB)
        assert lun.read(8192, 8).data == bytes(4096)


def test_a_lost_write_is_told_once_to_every_session_that_wrote(
    daemon: Daemon, fs: FaultyFs, hanging: Disk
) -> None:
    """A deferred error (SPC-4 §4.5.7), for those whose data it may be; not for who flushed or never wrote."""
    with (
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:a") as flusher,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:b") as writer,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:c") as reader,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:d") as careful,
    ):
        assert careful.write(24, pattern(3)).good
        assert careful.flush().good
        assert flusher.write(0, pattern(1)).good
        assert writer.write(8, pattern(2)).good
        fs.fail(errno.EIO, "fsync")
        current = flusher.flush()
        assert sense(current) == (MEDIUM_ERROR, WRITE_ERROR)
        assert current.sense[0] & 0x7F == 0x70
        fs.clear()
        deferred = writer.flush()
        assert sense(deferred) == (MEDIUM_ERROR, WRITE_ERROR)
        assert deferred.sense[0] & 0x7F == 0x71
        for session in (flusher, writer, reader, careful):
            assert session.read(0).good
        assert writer.flush().good
        assert "write-back error" in status_of(daemon, hanging.extent_id)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("told", ["FUA", "WCE=0", "WRITE AND VERIFY"])
def test_a_lost_write_that_a_durable_write_is_told_reaches_all_who_wrote(
    daemon: Daemon, fs: FaultyFs, hanging: Disk, number: int, told: str
) -> None:
    """An NFS server or a quota that is full, a thin pool: the kernel says it once, to whoever comes first."""
    with (
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:a") as writer,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:b") as durable,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:c") as reader,
    ):
        if told == "WCE=0":
            page = bytes((0x08, 18)) + bytes(18)
            assert durable.do(cdbs.mode_select6(len(page) + 4), bytes(4) + page).good
            for session in (writer, reader):
                session.ready()
        assert writer.write(8, pattern(2)).good or told == "WCE=0"
        fs.fail(number, "fsync")
        if told == "WRITE AND VERIFY":
            reply = durable.do(cdbs.write_and_verify10(0, 1), pattern(1))
        else:
            reply = durable.write(0, pattern(1), fua=told == "FUA")
        fs.clear()
        assert reply.status == 2
        deferred = writer.flush()
        assert sense(deferred) == (MEDIUM_ERROR, WRITE_ERROR)
        assert deferred.sense[0] & 0x7F == 0x71
        assert reader.read(0).good
        assert writer.flush().good


def test_taking_space_that_lasts_holds_up_no_other_change(daemon: Daemon, fs: FaultyFs) -> None:
    """On a file system without fallocate(2) zeros are written, for hours if need be."""
    path = fs.at / "slow.img"
    fields = {
        "iscsi_target_extent_name": "slow",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": str(path),
        "iscsi_target_extent_filesize": "8MB",
        "iscsi_target_extent_allocate": True,
    }
    with ThreadPoolExecutor(1) as pool:
        fs.stall("write")
        try:
            slow = pool.submit(daemon.api, "POST", "services/iscsi/extent/", fields)
            fs.wait_for_stalled("write")
            other = daemon.create_disk("meanwhile", "1MB")
            (work,) = daemon.expect(200, "GET", "services/iscsi/work/")
            assert (work["kind"], work["extent"], work["total"]) == ("allocate", "slow", 8 << 20)
            same = daemon.api(
                "POST", "services/iscsi/extent/", {**fields, "iscsi_target_extent_name": "same"}
            )
            assert same.status == 409
            assert "being taken" in same.json["iscsi_target_extent_path"][0]
            daemon.delete_disk(other)
        finally:
            fs.go()
        made = slow.result(PATIENCE_S)
    assert made.status == 201, made.text
    assert path.stat().st_blocks * 512 >= 8 << 20
    daemon.expect(204, "DELETE", f"services/iscsi/extent/{made.json['id']}/")


def test_an_extent_may_be_deleted_while_its_space_is_taken(daemon: Daemon, fs: FaultyFs) -> None:
    disk = disk_on(daemon, fs)
    (fs.backing / disk.path.name).write_bytes(b"x" * (8 << 20))
    with ThreadPoolExecutor(1) as pool:
        fs.stall("write")
        try:
            grown = {"iscsi_target_extent_filesize": "16MB", "iscsi_target_extent_allocate": True}
            slow = pool.submit(daemon.api, "PUT", f"services/iscsi/extent/{disk.extent_id}/", grown)
            fs.wait_for_stalled("write")
            daemon.expect(204, "DELETE", f"services/iscsi/target/{disk.target_id}/")
            daemon.expect(204, "DELETE", f"services/iscsi/extent/{disk.extent_id}/")
        finally:
            fs.go()
        refused = slow.result(PATIENCE_S)
    assert refused.status in (404, 409), refused.text
    disk.path.unlink()


def test_holes_of_a_file_that_is_there_are_not_filled_without_fallocate(
    daemon: Daemon, hanging: Disk
) -> None:
    refused = daemon.api(
        "PUT", f"services/iscsi/extent/{hanging.extent_id}/", {"iscsi_target_extent_allocate": True}
    )
    assert refused.status == 409
    assert "fallocate(2)" in refused.json["iscsi_target_extent_path"][0]


def test_a_lost_write_is_nothing_to_who_wrote_to_another_lun(
    daemon: Daemon, fs: FaultyFs, hanging: Disk, well: Disk
) -> None:
    """Two LUNs of one target, and sessions on both: each LUN's loss is told to those that wrote to it."""
    daemon.create(
        "targettoextent", iscsi_target=hanging.target_id, iscsi_extent=well.extent_id, iscsi_lunid=1
    )
    with (
        lun_of(daemon, hanging) as writer,
        lun_of(daemon, hanging, name="iqn.2016-04.com.example:b") as other,
    ):
        assert writer.write(0, pattern(1)).good
        assert other.command(cdbs.write10(0, 1), pattern(2), 0, 1).sense_key == UNIT_ATTENTION
        assert other.command(cdbs.write10(0, 1), pattern(2), 0, 1).good
        fs.fail(errno.EIO, "fsync")
        assert sense(writer.flush()) == (MEDIUM_ERROR, WRITE_ERROR)
        fs.clear()
        assert other.flush().good
        assert other.command(cdbs.synchronize_cache10(0, 0), b"", 0, 1).good


def test_shutdown_does_not_wait_for_a_medium_that_hangs(fs: FaultyFs, tmp_path: Path) -> None:
    """SIGTERM: the daemon says that it is done while the medium still hangs. (Its threads in the kernel end
    with the medium's answer; no process can end them.)"""
    daemon = Daemon(tmp_path, options=("--extent-root", str(fs.at))).start()
    try:
        disk = disk_on(daemon, fs)
        well = daemon.create_disk("well", "1MB")
        with lun_of(daemon, disk) as lun, lun_of(daemon, well) as other:
            assert other.write(0, pattern(1)).good
            assert lun.write(8, pattern(0)).good
            fs.stall()
            lun.send_command(cdbs.write10(0, 8), pattern(0, 8))
            fs.wait_for_stalled("write")
            assert daemon.process is not None
            daemon.process.terminate()
            daemon.wait_for_line("still waiting for their medium")
            daemon.wait_for_line("stopped")
            fs.go()
        assert daemon.process.wait(20) == 0
        assert well.path.read_bytes()[:512] == pattern(1)
    finally:
        fs.go()
        daemon.kill9()


def test_shutdown_names_what_it_could_not_flush(fs: FaultyFs, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, options=("--extent-root", str(fs.at))).start()
    try:
        disk = disk_on(daemon, fs)
        daemon.create_disk("well", "1MB")
        with lun_of(daemon, disk) as lun:
            assert lun.write(8, pattern(0)).good
        fs.fail(errno.EIO, "fsync")
        assert daemon.terminate() == 0
        fs.clear()
        daemon.wait_for_line(f"extent {disk.path.stem} could not be flushed")
        daemon.wait_for_line("1 extents flushed in")
    finally:
        fs.clear()
        daemon.kill9()


def test_a_start_does_not_wait_for_a_medium_that_hangs(fs: FaultyFs, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, options=("--extent-root", str(fs.at))).start()
    try:
        disk, well = disk_on(daemon, fs), daemon.create_disk("well", "1MB")
        daemon.terminate()
        fs.stall("open")
        daemon.start()
        with lun_of(daemon, well) as lun:
            assert lun.write(0, pattern(1)).good
        with lun_of(daemon, disk) as stuck:
            assert stuck.read(0).sense_key == NOT_READY
            fs.go()
            eventually(lambda: stuck.read(0).sense_key not in (NOT_READY, UNIT_ATTENTION), "it comes")
            assert stuck.read(0).good
        assert daemon.terminate() == 0
        assert not daemon.tracebacks()
    finally:
        fs.go()
        daemon.kill9()
