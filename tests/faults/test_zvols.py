"""ZFS volumes as extents of the real daemon, with a stand-in for the ``zfs`` command and a loop device as the
volume: names, properties, discard by whole blocks, growth, snapshots.
"""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import (
    BLOCK,
    CAPACITY_DATA_CHANGED,
    DATA_PROTECT,
    UNIT_ATTENTION,
    eventually,
    lun_of,
    pattern,
    sense,
)
from tests.media import loop_device, requires_loop_devices

pytestmark = requires_loop_devices

MIB = 1 << 20
POOL = f"targetd-test-{os.getpid()}"
VOLUME = f"{POOL}/disk0"
BLOCK_SIZE = 16384
STAND_IN = f"""#!/bin/sh
# zfs get -Hp -o property,value PROPERTIES DATASET
[ "$1 $2 $3 $4" = "get -Hp -o property,value" ] || exit 2
case "$6" in
    {VOLUME}|{VOLUME}@monday) ;;
    *) echo "cannot open '$6': dataset does not exist" >&2; exit 1 ;;
esac
size=$(cat "$(dirname "$0")/volsize")
printf '%s\\t%s\\n' volsize $size volblocksize {BLOCK_SIZE} refreservation none used 1000000 available 9000000
"""


@dataclass
class Volume:
    """A volume of 8 MiB."""

    daemon: Daemon
    node: str
    image: Path
    size_file: Path

    def grow(self, size_bytes: int) -> None:
        """``zfs set volsize=…``."""
        self.size_file.write_text(str(size_bytes))
        os.truncate(self.image, size_bytes)
        subprocess.run(["losetup", "-c", self.node], check=True)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the stand-in, and of what it says the volume's size is."""
    made = tmp_path_factory.mktemp("bin")
    (made / "zfs").write_text(STAND_IN)
    (made / "zfs").chmod(0o755)
    return made


@pytest.fixture(scope="module")
def daemon(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("daemon"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
            made.start()
        yield made
        assert made.terminate() == 0
        assert not made.tracebacks()
    finally:
        made.kill9()


@pytest.fixture
def volume(daemon: Daemon, programs: Path, tmp_path: Path) -> Iterator[Volume]:
    links, image = Path("/dev/zvol") / POOL, tmp_path / "image"
    (programs / "volsize").write_text(str(8 * MIB))
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    had = links.parent.is_dir()
    links.mkdir(parents=True)
    try:
        with loop_device(image) as node:
            for name in ("disk0", "disk0@monday"):
                (links / name).symlink_to(node)
            yield Volume(daemon, node, image, programs / "volsize")
            for extent in daemon.expect(200, "GET", "services/iscsi/extent/"):
                daemon.delete("extent", extent["id"])
    finally:
        for link in links.iterdir():
            link.unlink()
        links.rmdir()
        if not had:
            links.parent.rmdir()


def disk_of(volume: Volume, name: str, given: str, kind: str = "ZVOL", **fields: object) -> Disk:
    values = {"type": kind, "path": "", "disk": given, "filesize": "0", **fields}
    return volume.daemon.create_disk(
        name, extent={f"iscsi_target_extent_{name}": value for name, value in values.items()}
    )


@pytest.mark.parametrize(
    ("kind", "given"), [("Disk", f"zvol/{VOLUME}"), ("ZFS Volume", VOLUME), ("ZVOL", f"/dev/zvol/{VOLUME}")]
)
def test_a_volume_is_found_by_each_of_its_names_and_used(volume: Volume, kind: str, given: str) -> None:
    """volblocksize is the physical block and the unmap granularity; what is smaller is zeroed."""
    disk = disk_of(volume, f"volume-{kind}".lower().replace(" ", "-"), given, kind)
    shown = volume.daemon.expect(200, "GET", f"services/iscsi/extent/{disk.extent_id}/")
    assert shown["iscsi_target_extent_path"] == f"/dev/zvol/{VOLUME}"
    with lun_of(volume.daemon, disk) as lun:
        assert lun.capacity() == 8 * MIB
        assert 512 << (lun.do(cdbs.read_capacity16(), read=32).data[13] & 0x0F) == BLOCK_SIZE
        limits = lun.do(cdbs.inquiry(0xB0), read=255).data
        assert int.from_bytes(limits[28:32], "big") * BLOCK == BLOCK_SIZE
        assert lun.write(0, pattern(0, 128), fua=True).good
        parameters = cdbs.unmap_parameters([(8, 64)])  # one whole block of the volume, and parts of two
        assert lun.do(cdbs.unmap(len(parameters)), parameters).good
        assert lun.read(0, 128).data == pattern(0, 8) + bytes(64 * BLOCK) + pattern(72, 56)


def test_growth_of_a_volume_is_told_and_used(volume: Volume) -> None:
    disk = disk_of(volume, "grows", VOLUME)
    with lun_of(volume.daemon, disk) as lun:
        volume.grow(12 * MIB)
        met = []
        eventually(
            lambda: met.append(sense(lun.do(cdbs.test_unit_ready()))) or met[-1][0] == UNIT_ATTENTION,
            "the new capacity is told",
        )
        assert met[-1] == (UNIT_ATTENTION, CAPACITY_DATA_CHANGED)
        assert lun.capacity() == 12 * MIB
        assert lun.write(12 * MIB // BLOCK - 1, pattern(1), fua=True).good


def test_a_snapshot_is_read_and_never_written(volume: Volume) -> None:
    fields = {
        "iscsi_target_extent_name": "monday",
        "iscsi_target_extent_type": "ZVOL",
        "iscsi_target_extent_disk": f"{VOLUME}@monday",
    }
    refused = volume.daemon.api("POST", "services/iscsi/extent/", fields)
    assert refused.status == 409
    assert "snapshot" in str(refused.json)
    disk = disk_of(volume, "monday", f"{VOLUME}@monday", ro=True)
    with lun_of(volume.daemon, disk) as lun:
        assert lun.read(0).good
        assert sense(lun.write(0, pattern(1))) == (DATA_PROTECT, (0x27, 0x00))


def test_a_volume_that_zfs_does_not_know_is_refused_in_its_words(volume: Volume) -> None:
    fields = {
        "iscsi_target_extent_name": "none",
        "iscsi_target_extent_type": "Disk",
        "iscsi_target_extent_disk": f"zvol/{POOL}/none",
    }
    refused = volume.daemon.api("POST", "services/iscsi/extent/", fields)
    assert refused.status == 409
    assert "does not exist" in str(refused.json)
