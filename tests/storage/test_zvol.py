"""ZFS volumes: names, properties through a stand-in ``zfs`` command, and discard on a loop device."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import linux, zvol
from storage.zvol import Zvol, dataset_of, device_path
from tests.media import loop_device, requires_loop_devices

MIB = 1 << 20
DATA = os.urandom(MIB)


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("zvol/tank/disk0", "tank/disk0"),
        ("/dev/zvol/tank/disk0", "tank/disk0"),
        ("tank/disk0", "tank/disk0"),
        ("/dev/zvol/tank/vm/disk-0.a:b", "tank/vm/disk-0.a:b"),
        ("tank/disk0@monday", "tank/disk0@monday"),
    ],
)
def test_the_forms_of_a_name(path: str, dataset: str) -> None:
    assert dataset_of(path) == dataset
    assert device_path(path) == f"/dev/zvol/{dataset}"


@pytest.mark.parametrize(
    "path",
    ["", "tank", "/dev/zvol/tank", "zvol/tank/../sda", "/dev/sda", "-o/x", "tank//x", "tank/x\n", "zvol//x"],
)
def test_what_names_no_volume_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        dataset_of(path)


STAND_IN = """#!/bin/sh
case "$*" in
    *tank/files*) printf 'type\\tfilesystem\n'; exit ;;
    *tank/none*) echo "cannot open 'tank/none': dataset does not exist" >&2; exit 1;;
esac
[ "$1 $2 $3 $4" = "get -Hp -o property,value" ] || exit 2
printf '%s\\t%s\\n' volsize 4194304 volblocksize 16384 refreservation none used 1000000 available 9000000
"""


@pytest.fixture
def zfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in ``zfs`` first in PATH, and a directory in the place of /dev/zvol."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "zfs"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    links = tmp_path / "zvol"
    (links / "tank").mkdir(parents=True)
    monkeypatch.setattr(zvol, "PREFIX", f"{links}/")
    return links


@pytest.fixture
def volume(zfs: Path, tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "image"
    image.write_bytes(DATA * 4)
    with loop_device(image) as node:
        (zfs / "tank/disk0").symlink_to(node)
        yield "zvol/tank/disk0"


@requires_loop_devices
def test_properties_come_from_zfs(volume: str) -> None:
    extent = Zvol(volume)
    assert extent.properties == {
        "volsize": 4 * MIB,
        "volblocksize": 16384,
        "used": 1000000,
        "available": 9000000,
    }
    assert extent.geometry.physical_block_size == extent.capabilities.unmap_granularity == 16384
    assert extent.space().used == 1000000
    assert extent.space().available == 9000000
    extent.close()


@requires_loop_devices
def test_whole_blocks_are_discarded_and_edges_written(volume: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zvol keeps the data of a block that is discarded in part, and reports success."""
    discarded: list[tuple[int, int]] = []
    real = linux.discard

    def discard(fd: int, offset: int, length: int) -> None:
        discarded.append((offset, length))
        real(fd, offset, length)

    monkeypatch.setattr(linux, "discard", discard)
    extent = Zvol(volume)
    for offset, length in ((10000, 100000), (512, 1024), (32768, 16384)):
        before = bytearray(extent.read(0, 4 * MIB))
        extent.unmap(offset, length)
        before[offset : offset + length] = bytes(length)
        assert extent.read(0, 4 * MIB) == before
    assert discarded == [(16384, 81920), (32768, 16384)]
    extent.close()


@requires_loop_devices
def test_the_node_of_a_new_volume_is_waited_for(
    zfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(DATA)
    with loop_device(image) as node:
        pause = SimpleNamespace(
            monotonic=time.monotonic, sleep=lambda _: (zfs / "tank/late").symlink_to(node)
        )
        monkeypatch.setattr(zvol, "time", pause)
        extent = Zvol("tank/late")
        assert extent.read(0, 512) == DATA[:512]
        extent.close()


@pytest.mark.usefixtures("zfs")
def test_a_volume_that_zfs_does_not_know_is_missing() -> None:
    with pytest.raises(OSError, match="dataset does not exist") as caught:
        Zvol("zvol/tank/none")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.usefixtures("zfs")
def test_a_file_system_of_zfs_is_no_volume_and_not_waited_for() -> None:
    with pytest.raises(OSError, match="not a volume") as caught:
        Zvol("tank/files")
    assert caught.value.errno == errno.ENOTBLK


@pytest.mark.usefixtures("zfs")
def test_a_volume_without_a_node_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zvol, "APPEAR_TIMEOUT_S", 0.0)
    with pytest.raises(OSError, match="does not appear") as caught:
        Zvol("zvol/tank/nodeless")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.usefixtures("zfs")
def test_a_snapshot_is_not_written() -> None:
    with pytest.raises(OSError) as caught:
        Zvol("zvol/tank/disk0@monday")
    assert caught.value.errno == errno.EROFS
