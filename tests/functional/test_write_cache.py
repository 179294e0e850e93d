"""WCE says what a write is worth when the power fails, and means it (SBC-3 §4.15, §6.5.5).

The power is cut for real as far as the disk goes: the daemon's extent is a file on a file system on a loop
device, and what lies below the loop device at one moment is what a machine would find when it comes up.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.functional.sessions import BLOCK, attention, daemon_in, log_in, write
from tests.initiator import SocketInitiator
from tests.media import file_system, loop_device, requires_loop_devices

MIB = 1 << 20
EXT4 = ["mkfs.ext4", "-q", "-F"]
LBA = 1000
DATA = os.urandom(8 * BLOCK)


@contextmanager
def after_power_cut(directory: Path, disk: Disk) -> Iterator[bytes]:
    """The extent's file as it is when the machine comes up again, had the power failed now."""
    copy, at = directory / "cut.img", directory / "cut"
    shutil.copyfile(directory / "file-system.img", copy)
    at.mkdir(exist_ok=True)
    with loop_device(copy) as node:
        subprocess.run(["mount", node, str(at)], check=True, capture_output=True)
        try:
            yield (at / disk.path.relative_to(directory / "mounted")).read_bytes()
        finally:
            subprocess.run(["umount", str(at)], check=True)


def survives(directory: Path, disk: Disk) -> bool:
    with after_power_cut(directory, disk) as image:
        return image[LBA * BLOCK : LBA * BLOCK + len(DATA)] == DATA


def select_write_cache(initiator: SocketInitiator, on: bool, *, save: bool) -> None:
    """MODE SELECT(6) of the caching page as it is, WCE apart."""
    data = bytearray(initiator.command(cdbs.mode_sense6(0x08, dbd=True), read=255).data)
    data[0] = data[2] = 0  # reserved in MODE SELECT
    data[4] &= 0x3F  # PS
    data[6] = data[6] & ~0x04 | (0x04 if on else 0)
    assert initiator.command(cdbs.mode_select6(len(data), save=save), bytes(data)).good


def write_cache(initiator: SocketInitiator) -> bool:
    return bool(initiator.command(cdbs.mode_sense6(0x08, dbd=True), read=255).data[6] & 0x04)


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[tuple[Daemon, Disk]]:
    """A daemon whose extent is on a disk of its own: all of it allocated, and on the disk."""
    with file_system(tmp_path, EXT4, 48 * MIB) as at, daemon_in(at) as daemon:
        with (daemon.extent_root / "cached.img").open("wb") as file:
            file.write(b"\xff" * (4 * MIB))
        os.sync()
        yield daemon, daemon.create_disk("cached", "0")


def durably(initiator: SocketInitiator, how: str) -> None:
    """Write ``DATA`` so that it must be there after a power cut."""
    if how == "WCE=0":
        select_write_cache(initiator, False, save=False)
    assert write(initiator, LBA, DATA, byte1=cdbs.FUA if how == "FUA" else 0).good
    if how == "SYNCHRONIZE CACHE":
        assert initiator.command(cdbs.synchronize_cache10()).good
    elif how == "MODE SELECT afterwards":
        select_write_cache(initiator, False, save=False)


@requires_loop_devices
@pytest.mark.parametrize("how", ["WCE=0", "FUA", "SYNCHRONIZE CACHE", "MODE SELECT afterwards"])
def test_a_write_survives_a_power_cut(tmp_path: Path, medium: tuple[Daemon, Disk], how: str) -> None:
    """And with none of this it does not, or the test would prove nothing."""
    daemon, disk = medium
    with log_in(daemon, disk.iqn) as initiator:
        assert write_cache(initiator)
        assert write(initiator, LBA, bytes(len(DATA))).good
        assert not survives(tmp_path, disk)
        durably(initiator, how)
        assert survives(tmp_path, disk)


@requires_loop_devices
def test_a_clean_end_flushes_every_extent_and_says_how_long_it_took(
    tmp_path: Path, medium: tuple[Daemon, Disk]
) -> None:
    """SIGTERM: what was answered, and no more than that, is on the disk when the daemon has gone."""
    daemon, disk = medium
    with log_in(daemon, disk.iqn) as initiator:
        assert write(initiator, LBA, DATA).good
        assert not survives(tmp_path, disk)
    assert daemon.terminate() == 0
    assert survives(tmp_path, disk)
    assert re.search(r"1 extents flushed in \d+\.\d\d s", daemon.log)
    daemon.start()


def test_a_saved_wce_is_there_after_a_restart_and_told_to_the_others(daemon: Daemon) -> None:
    """SPC-4 §6.11 SP, §5.9; MODE PARAMETERS CHANGED is for everybody but the one that changed them."""
    disk = daemon.create_disk("saved", "1MB")
    with log_in(daemon, disk.iqn, "one") as one, log_in(daemon, disk.iqn, "two") as two:
        select_write_cache(one, False, save=True)
        assert attention(one) is None
        assert attention(two) == (0x2A, 0x01)
        assert attention(two) is None
        assert not write_cache(two)
    daemon.kill9()
    daemon.start()
    with log_in(daemon, disk.iqn) as initiator:
        assert not write_cache(initiator)
        select_write_cache(initiator, True, save=False)
    daemon.restart()
    with log_in(daemon, disk.iqn) as initiator:
        assert not write_cache(initiator), "what was not saved is forgotten"
