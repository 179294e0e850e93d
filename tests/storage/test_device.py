"""Device extents on loop devices: what the kernel says, claims, discard, size, removal."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.base import Run
from storage.device import Device
from storage.file import File
from tests.media import attach, detach, file_system, loop_device, requires_loop_devices, small_tmpfs

pytestmark = requires_loop_devices

MIB = 1 << 20
DATA = os.urandom(MIB)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA * 8)
    return path


@pytest.fixture
def node(image: Path) -> Iterator[str]:
    with loop_device(image) as node:
        yield node


def test_geometry_is_the_kernels(image: Path) -> None:
    with loop_device(image, "--sector-size", "4096") as node:
        extent = Device(node)
        assert extent.geometry.size_bytes == 8 * MIB
        assert extent.geometry.logical_block_size == 4096
        assert extent.geometry.physical_block_size % 4096 == 0
        assert extent.geometry.rotational in (True, False)
        extent.close()


def test_reads_and_writes_by_every_way(node: str, image: Path) -> None:
    extent = Device(node)
    assert extent.read(4096, 8192) == DATA[4096:12288]
    assert extent.read_nowait(4096, 8192) is not None
    assert extent.copy_nowait(4096, 8192) == DATA[4096:12288]
    assert extent.write_nowait(0, b"a" * 4096)
    extent.write(4096, b"b" * 512, durable=True)
    extent.write(MIB - 512, b"c" * 1024)
    assert extent.read(0, 4608) == b"a" * 4096 + b"b" * 512
    extent.flush()
    subprocess.run(["sync", str(image)], check=True)
    assert image.read_bytes()[MIB - 512 : MIB + 512] == b"c" * 1024
    assert list(extent.runs(512, MIB)) == [Run(512, MIB, True)]
    assert not extent.capabilities.map_query


def test_unmap_reads_as_zeros_and_returns_space(node: str, image: Path) -> None:
    extent = Device(node)
    if not extent.capabilities.unmap:
        pytest.skip("this kernel's loop devices do not discard")
    extent.read(0, 8 * MIB)
    before = image.stat().st_blocks
    extent.unmap(MIB, 4 * MIB)
    extent.unmap(512, 1024)
    assert image.stat().st_blocks * 512 <= before * 512 - 4 * MIB
    if extent.capabilities.unmap_reads_zero:
        whole = extent.read(0, 8 * MIB)
        assert whole == DATA[:512] + bytes(1024) + DATA[1536:] + bytes(4 * MIB) + DATA * 3


def test_zeroes_are_written(node: str) -> None:
    extent = Device(node)
    extent.read(0, 2 * MIB)
    extent.write_zeroes(1000, MIB)
    assert extent.read(0, 2 * MIB) == DATA[:1000] + bytes(MIB) + DATA[1000:]


def test_a_copy_to_a_file_and_back(node: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    file, device = File(str(path), 8 * MIB), Device(node)
    file.copy_from(device, 0, 3 * MIB, MIB)
    assert file.read(3 * MIB, MIB) == DATA
    device.copy_from(file, 2 * MIB, 0, 2 * MIB)
    assert device.read(0, 2 * MIB) == bytes(MIB) + DATA
    device.copy_from(device, 512, 0, 2 * MIB)
    assert device.read(0, 2 * MIB) == bytes(MIB - 512) + DATA + DATA[:512]


def test_a_mounted_device_is_refused_and_says_where(tmp_path: Path) -> None:
    with file_system(tmp_path, ["mkfs.ext4", "-q"], 16 * MIB) as mounted:
        device = next(
            line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if str(mounted) in line
        )
        for read_only in (False, True):
            with pytest.raises(OSError, match=f"mounted on {mounted}") as caught:
                Device(device, read_only=read_only)
            assert caught.value.errno == errno.EBUSY


def test_an_open_device_cannot_be_mounted_or_claimed(node: str) -> None:
    extent = Device(node)
    with pytest.raises(OSError) as caught:
        os.open(node, os.O_RDWR | os.O_EXCL)
    assert caught.value.errno == errno.EBUSY
    extent.close()
    os.close(os.open(node, os.O_RDWR | os.O_EXCL))


def test_a_changed_extent_may_be_opened_before_the_old_one_is_closed(node: str) -> None:
    old = Device(node)
    new = Device(node, read_only=True)
    old.close()
    with pytest.raises(OSError):
        os.open(node, os.O_RDWR | os.O_EXCL)
    assert new.read(0, 512) == DATA[:512]
    new.close()
    os.close(os.open(node, os.O_RDWR | os.O_EXCL))


def test_growth_is_followed(node: str, image: Path) -> None:
    extent = Device(node)
    os.truncate(image, 16 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    assert extent.refresh().size_bytes == 16 * MIB
    extent.write(16 * MIB - 4096, b"z" * 4096)
    assert extent.read_nowait(16 * MIB - 4096, 4096) is not None


def test_a_part_of_a_device_can_be_exported(node: str) -> None:
    extent = Device(node, MIB)
    assert extent.geometry.size_bytes == MIB
    extent.resize(2 * MIB)
    assert extent.refresh().size_bytes == 2 * MIB
    with pytest.raises(OSError) as caught:
        extent.resize(9 * MIB)
    assert caught.value.errno == errno.ENOSPC
    extent.resize(0)
    assert extent.geometry.size_bytes == 8 * MIB
    assert extent.space().used == 8 * MIB


def test_a_device_that_shrinks_below_what_is_exported_is_a_fault(node: str, image: Path) -> None:
    extent = Device(node, 8 * MIB)
    assert extent.read(0, 512) == DATA[:512]
    assert extent.read_nowait(0, 512) is not None
    os.truncate(image, 4 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    extent.tick()
    assert extent.read_nowait(0, 512) is None
    with pytest.raises(OSError) as caught:
        extent.read(0, 512)
    assert caught.value.errno == errno.EIO
    os.truncate(image, 8 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    assert extent.refresh().size_bytes == 8 * MIB
    assert extent.read(0, 512) == DATA[:512]


def test_a_medium_that_goes_away_and_comes_back(node: str, image: Path) -> None:
    extent = Device(node)
    os.truncate(image, 0)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    with pytest.raises(OSError) as caught:
        extent.refresh()
    assert caught.value.errno == errno.ENODEV
    assert not extent.write_nowait(0, bytes(4096))
    with pytest.raises(OSError):
        extent.flush()
    os.truncate(image, 8 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    assert extent.refresh().size_bytes == 8 * MIB
    assert extent.status == "ok"
    extent.write(0, DATA)
    assert extent.read(0, MIB) == DATA


def test_another_disk_under_the_name_is_not_taken(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"o" * 2 * MIB)
    link = tmp_path / "by-id"
    first, second = attach(image), attach(other)
    try:
        link.symlink_to(first)
        extent = Device(str(link))
        link.unlink()
        with pytest.raises(FileNotFoundError):
            extent.refresh()
        link.symlink_to(first)
        assert extent.refresh().size_bytes == 8 * MIB
        link.unlink()
        link.symlink_to(second)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                extent.refresh()
            assert caught.value.errno == errno.ESTALE
            with pytest.raises(OSError):
                extent.write(0, DATA)
        link.unlink()
        link.symlink_to(first)
        assert extent.refresh().size_bytes == 8 * MIB
        extent.write(0, DATA)
        assert other.read_bytes() == b"o" * 2 * MIB
        del caught
        extent.close()
    finally:
        detach(first)
        detach(second)


def test_a_loop_device_over_the_same_file_is_the_same_whatever_its_number(
    image: Path, tmp_path: Path
) -> None:
    """A disk that is unplugged and comes back: what it is known by has not changed."""
    link = tmp_path / "by-id"
    first, second = attach(image), attach(image)
    try:
        link.symlink_to(first)
        extent = Device(str(link))
        link.unlink()
        link.symlink_to(second)
        with pytest.raises(OSError, match="another number"):
            extent.refresh()
        assert extent.refresh().size_bytes == 8 * MIB
        extent.write(0, DATA)
        extent.close()
    finally:
        detach(first)
        detach(second)


def test_a_write_back_error_is_told_once_and_remembered(tmp_path: Path) -> None:
    """The device takes writes into memory that it cannot keep: the file under it has no room."""
    with small_tmpfs(tmp_path, 2 * MIB) as small:
        image = small / "image"
        with image.open("wb") as file:
            file.truncate(16 * MIB)
        with loop_device(image) as node:
            extent = Device(node)
            for at in range(0, 8 * MIB, MIB // 4):
                if not extent.write_nowait(at, DATA[: MIB // 4]):
                    extent.write(at, DATA[: MIB // 4])
            with pytest.raises(OSError) as caught:
                extent.flush()
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
            assert extent.lost_writes == 1
            assert extent.last_error is not None
            assert extent.last_error.errno == caught.value.errno
            extent.flush()  # the kernel has told it, and takes the pages for clean
            assert extent.lost_writes == 1
            assert extent.status.startswith("write-back error")
            with pytest.raises(OSError):
                extent.write(8 * MIB, DATA, durable=True)
            assert extent.lost_writes == 2
            del caught
            extent.close()


def test_a_read_only_device_refuses_to_be_writable(image: Path) -> None:
    with loop_device(image, "--read-only") as node:
        with pytest.raises(OSError) as caught:
            Device(node)
        assert caught.value.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        extent = Device(node, read_only=True)
        assert extent.read(0, 512) == DATA[:512]
        assert not extent.capabilities.writable
        extent.close()


def test_only_a_block_device_is_one(image: Path) -> None:
    with pytest.raises(OSError) as caught:
        Device(str(image))
    assert caught.value.errno == errno.ENOTBLK
