"""Block devices as extents of the real daemon: loop devices that are used, resized, taken away, mounted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import (
    BLOCK,
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


def disk_of(daemon: Daemon, node: str, **fields: Any) -> Disk:
    values = {"type": "Disk", "path": "", "disk": node.removeprefix("/dev/"), "filesize": "0", **fields}
    return daemon.create_disk(
        Path(node).name, extent={f"iscsi_target_extent_{name}": value for name, value in values.items()}
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


@pytest.fixture
def partitioned(node: str) -> Iterator[str]:
    """A disk of 16 MiB with two partitions, of 4 MiB and of 11; its node. The kernel is told of them, as not
    every one reads partition tables."""
    for number, first, count in (("1", "2048", "8192"), ("2", "10240", "22528")):
        subprocess.run(["addpart", node, number, first, count], check=True)
    try:
        yield node
    finally:
        for number in "12":
            subprocess.run(["delpart", node, number], check=True)


def test_partitions_are_disks_of_their_own(shared_daemon: Daemon, partitioned: str, image: Path) -> None:
    """Each claimed by itself, and with it the whole disk; what one LUN does the other does not see."""
    daemon = shared_daemon
    one, two = disk_of(daemon, f"{partitioned}p1"), disk_of(daemon, f"{partitioned}p2")
    with lun_of(daemon, one) as first, lun_of(daemon, two) as second:
        assert (first.capacity(), second.capacity()) == (4 * MIB, 11 * MIB)
        last = 4 * MIB // BLOCK - 8
        assert first.write(last, pattern(1, 8), fua=True).good
        assert second.write(0, pattern(2, 8), fua=True).good
        assert first.write(last + 8, pattern(3)).additional_sense == (0x21, 0x00)
        assert first.read(last, 8).data == pattern(1, 8)
        assert second.read(0, 8).data == pattern(2, 8)
        with image.open("rb") as file:
            file.seek((2048 + last) * BLOCK)
            assert file.read(16 * BLOCK) == pattern(1, 8) + pattern(2, 8)
        parameters = cdbs.unmap_parameters([(0, 4 * MIB // BLOCK)])
        if first.do(cdbs.read_capacity16(), read=32).data[14] & 0x80:  # this kernel's loop devices discard
            assert first.do(cdbs.unmap(len(parameters)), parameters).good
            assert first.read(last, 8).data == bytes(8 * BLOCK)
        assert second.read(0, 8).data == pattern(2, 8)
        refused = daemon.api(
            "POST",
            "services/iscsi/extent/",
            {
                "iscsi_target_extent_name": "whole",
                "iscsi_target_extent_type": "Disk",
                "iscsi_target_extent_disk": partitioned.removeprefix("/dev/"),
            },
        )
        assert refused.status == 409
        assert "has the same file or device already" in str(refused.json)
    daemon.delete_disk(one)
    daemon.delete_disk(two)


@pytest.mark.parametrize(("block_size", "exponent"), [(512, 3), (4096, 0)])
def test_a_disk_of_blocks_of_4096_is_shown_in_either_size(
    shared_daemon: Daemon, image: Path, block_size: int, exponent: int
) -> None:
    """Its own blocks are the physical ones; a write of less is the page cache's affair (512e)."""
    daemon = shared_daemon
    with loop_device(image, "--sector-size", "4096") as node:
        disk = disk_of(daemon, node, blocksize=block_size)
        with lun_of(daemon, disk) as lun:
            told = lun.do(cdbs.read_capacity16(), read=32).data
            assert (int.from_bytes(told[8:12], "big"), told[13] & 0x0F) == (block_size, exponent)
            assert lun.capacity() == 16 * MIB
            data = os.urandom(block_size)
            assert lun.do(cdbs.write10(3, 1, byte1=cdbs.FUA), data).good
            assert lun.do(cdbs.read10(3, 1), read=block_size).data == data
            assert image.read_bytes()[3 * block_size : 4 * block_size] == data
            parameters = cdbs.unmap_parameters([(3, 1)])
            if told[14] & 0x80:
                assert lun.do(cdbs.unmap(len(parameters)), parameters).good
                assert lun.do(cdbs.read10(3, 1), read=block_size).data == bytes(block_size)
        daemon.delete_disk(disk)


def test_a_write_protected_disk_is_refused_unless_it_shall_only_be_read(
    shared_daemon: Daemon, image: Path
) -> None:
    daemon = shared_daemon
    image.write_bytes(pattern(0, 64).ljust(16 * MIB, b"\0"))
    with loop_device(image, "--read-only") as node:
        fields = {
            "iscsi_target_extent_name": "protected",
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_disk": node.removeprefix("/dev/"),
        }
        refused = daemon.api("POST", "services/iscsi/extent/", fields)
        assert refused.status == 409
        assert "read-only" in str(refused.json).lower()
        disk = disk_of(daemon, node, ro=True)
        with lun_of(daemon, disk) as lun:
            assert lun.read(0, 64).data == pattern(0, 64)
            assert sense(lun.write(0, pattern(1))) == (DATA_PROTECT, (0x27, 0x00))
        daemon.delete_disk(disk)


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
                    absent = (NOT_READY, MEDIUM_NOT_PRESENT)
                    eventually(lambda: sense(lun.read(0)) == absent, "it is not taken")
                    assert "adopt" in status_of(daemon, disk.extent_id)
                    daemon.expect(200, "POST", f"services/iscsi/extent/{disk.extent_id}/adopt/")
                    lun.ready()
                    assert lun.read(0).data == bytes(512)
                    assert lun.capacity() == 8 * MIB
                    daemon.delete_disk(disk)
        finally:
            link.unlink(missing_ok=True)


def test_a_disk_that_is_deleted_with_its_file_has_none(shared_daemon: Daemon, node: str) -> None:
    """``{"delete": true}`` is about files: the node of a device is not the extent's to delete."""
    link = Path("/dev") / f"targetd-test-node-{os.getpid()}"
    link.symlink_to(node)
    try:
        disk = disk_of(shared_daemon, str(link))
        path = f"services/iscsi/extent/{disk.extent_id}/"
        assert shared_daemon.api("DELETE", path, {"delete": True}).status == 204
        assert link.is_block_device()
        shared_daemon.delete("target", disk.target_id)
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
