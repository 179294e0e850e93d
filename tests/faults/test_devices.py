"""Block devices as extents of the real daemon: loop devices that are used, resized, taken away, mounted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import (
    CAPACITY_DATA_CHANGED,
    DATA_PROTECT,
    MEDIUM_NOT_PRESENT,
    NOT_READY,
    SPACE_ALLOCATION_FAILED,
    UNIT_ATTENTION,
    eventually,
    lun_of,
    pattern,
    sense,
    status_of,
)
from tests.initiator import ConnectionClosed
from tests.media import attach, detach, file_system, loop_device, requires_loop_devices

pytestmark = requires_loop_devices

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


@pytest.fixture
def node(image: Path) -> Iterator[str]:
    with loop_device(image) as made:
        yield made


def disk_of(daemon: Daemon, node: str) -> Disk:
    return daemon.create_disk(
        Path(node).name,
        extent={
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_path": "",
            "iscsi_target_extent_disk": node.removeprefix("/dev/"),
            "iscsi_target_extent_filesize": "0",
        },
    )


def test_a_disk_is_read_written_flushed_and_discarded(shared_daemon: Daemon, node: str, image: Path) -> None:
    daemon = shared_daemon
    disk = disk_of(daemon, node)
    with lun_of(daemon, disk) as lun:
        assert lun.capacity() == 16 * MIB
        assert lun.write(0, pattern(0, 2048)).good
        assert lun.write(2048, pattern(1, 8), fua=True).good
        assert lun.flush().good
        assert lun.read(0, 2048).data == pattern(0, 2048)
        used = image.stat().st_blocks
        assert used * 512 >= MIB
        provisioned = lun.do(cdbs.read_capacity16(), read=32).data[14] & 0x80
        if provisioned:  # this kernel's loop devices discard
            parameters = cdbs.unmap_parameters([(0, 2048)])
            assert lun.do(cdbs.unmap(len(parameters)), parameters).good
            assert lun.read(2048, 8).data == pattern(1, 8)
            assert image.stat().st_blocks < used
    daemon.delete_disk(disk)


def test_a_disk_that_grows_is_told_and_used(shared_daemon: Daemon, node: str, image: Path) -> None:
    """``losetup -c``, as the growth of a volume or of a LUN below: 2Ah/09h (SBC-3 §4.7)."""
    daemon = shared_daemon
    disk = disk_of(daemon, node)
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(3)).good
        os.truncate(image, 32 * MIB)
        subprocess.run(["losetup", "-c", node], check=True)
        met = []
        eventually(lambda: met.append(sense(lun.read(0))) or met[-1][0] == UNIT_ATTENTION, "it is told")
        assert met[-1] == (UNIT_ATTENTION, CAPACITY_DATA_CHANGED)
        assert lun.capacity() == 32 * MIB
        assert lun.write(40000, pattern(4, 8)).good
        assert lun.read(40000, 8).data == pattern(4, 8)
        assert lun.read(0).data == pattern(3)
    daemon.delete_disk(disk)


def test_a_disk_taken_away_under_io_and_given_back(shared_daemon: Daemon, image: Path) -> None:
    daemon = shared_daemon
    node = attach(image)
    try:
        disk = disk_of(daemon, node)
        well = daemon.create_disk("beside", "1MB")
        with lun_of(daemon, disk) as lun, lun_of(daemon, well) as other:
            assert lun.write(0, pattern(5, 64)).good
            assert lun.flush().good
            # A loop device that is open goes with its last user, so its file is what is taken: the
            # kernel makes the size 0 at once.
            os.truncate(image, 0)
            subprocess.run(["losetup", "-c", node], check=True)
            with suppress(ConnectionClosed):  # promised from memory, and gone (EFAULT)
                lun.read(0)
        with lun_of(daemon, disk) as lun, lun_of(daemon, well) as other:
            eventually(lambda: sense(lun.read(0)) == (NOT_READY, MEDIUM_NOT_PRESENT), "the LUN is not ready")
            assert "no medium" in status_of(daemon, disk.extent_id)
            assert other.write(0, pattern(1)).good
            os.truncate(image, 16 * MIB)
            subprocess.run(["losetup", "-c", node], check=True)
            eventually(lambda: lun.read(0).good, "the LUN is back")
            assert lun.write(8, pattern(6)).good
            assert lun.read(8).data == pattern(6)
        daemon.delete_disk(disk)
        daemon.delete_disk(well)
    finally:
        detach(node)


def test_another_disk_under_the_same_name_is_noticed(
    shared_daemon: Daemon, image: Path, tmp_path: Path
) -> None:
    """Detached under a session and attached to another file: never silently another medium."""
    daemon = shared_daemon
    with loop_device(image) as node:
        link = Path("/dev") / f"targetd-test-{os.getpid()}"
        link.symlink_to(node)
        try:
            disk = disk_of(daemon, str(link))
            with lun_of(daemon, disk) as lun:
                assert lun.write(0, pattern(5)).good
                other = tmp_path / "other"
                with other.open("wb") as file:
                    file.truncate(8 * MIB)
                with loop_device(other) as second:
                    link.unlink()
                    link.symlink_to(second)
                    met: list[int | None] = []
                    eventually(
                        lambda: met.append(lun.read(0).sense_key) or met[-1] in (NOT_READY, UNIT_ATTENTION),
                        "it is noticed",
                    )
                    eventually(lambda: lun.read(0).good, "the other disk is taken")
                    assert lun.read(0).data == bytes(512)
                    assert lun.capacity() == 8 * MIB
                    daemon.delete_disk(disk)
        finally:
            link.unlink(missing_ok=True)


def test_a_mounted_disk_is_refused_with_where(shared_daemon: Daemon, tmp_path: Path) -> None:
    with file_system(tmp_path, ["mkfs.ext4", "-q", "-F"], 16 * MIB) as at:
        node = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", str(at)], check=True, capture_output=True, text=True
        ).stdout.strip()
        refused = shared_daemon.api(
            "POST",
            "services/iscsi/extent/",
            {
                "iscsi_target_extent_name": "mounted",
                "iscsi_target_extent_type": "Disk",
                "iscsi_target_extent_disk": node.removeprefix("/dev/"),
            },
        )
        assert refused.status == 409
        assert f"the device is mounted on {at}" in str(refused.json)


def test_a_full_file_system_fails_the_write_and_only_until_there_is_room(tmp_path: Path) -> None:
    """27h/07h SPACE ALLOCATION FAILED (SBC-3 §4.7.3.6); the same WRITE succeeds once space is freed."""
    with file_system(tmp_path, ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0"], 32 * MIB) as at:
        daemon = Daemon(tmp_path / "d", options=("--extent-root", str(at))).start()
        try:
            filler = at / "filler"
            filler.write_bytes(bytes(8 * MIB))
            path = at / "thin.img"
            disk = daemon.create_disk("thin", "64MB", extent={"iscsi_target_extent_path": str(path)})
            well = daemon.create_disk("well", "1MB")
            with lun_of(daemon, disk) as lun, lun_of(daemon, well) as other:
                lba, reply = 0, lun.write(0, pattern(0, 512))
                while reply.good:
                    lba += 512
                    reply = lun.write(lba, pattern(lba, 512))
                assert sense(reply) == (DATA_PROTECT, SPACE_ALLOCATION_FAILED)
                assert other.write(0, pattern(1)).good
                assert lun.read(0, 512).data == pattern(0, 512)
                assert lun.write(0, pattern(9, 512)).good, "what has its blocks is written in place"
                filler.unlink()
                assert lun.write(lba, pattern(lba, 512)).good
                assert lun.read(lba, 512).data == pattern(lba, 512)
                assert lun.flush().good
            assert daemon.terminate() == 0
            assert not daemon.tracebacks()
        finally:
            daemon.kill9()
