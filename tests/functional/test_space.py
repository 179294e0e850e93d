"""Thin provisioning as the host sees it: what initiators give back is given back (SBC-3 §4.7)."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.functional.sessions import (
    BLOCK,
    GOOD,
    daemon_in,
    log_in,
    populate_token,
    read,
    receive_token,
    unit_name,
    write,
    write_using_token,
)
from tests.initiator import SocketInitiator
from tests.media import file_system, requires_loop_devices

MIB = 1 << 20
MAPPED, DEALLOCATED = 0, 1


def allocated(disk: Disk) -> int:
    """Bytes, as ``du`` counts them."""
    return disk.path.stat().st_blocks * 512


def filled(daemon: Daemon, name: str) -> Disk:
    """A disk of 16 MiB, every block of it written by an initiator and on the medium."""
    disk = daemon.create_disk(name, "16MB")
    with log_in(daemon, disk.iqn) as initiator:
        for lba in range(0, 16 * MIB // BLOCK, MIB // BLOCK):
            assert write(initiator, lba, os.urandom(MIB)).good
        assert initiator.command(cdbs.synchronize_cache10()).good
    assert allocated(disk) >= 16 * MIB
    return disk


def unmap(initiator: SocketInitiator, lba: int, blocks: int) -> None:
    data = cdbs.unmap_parameters([(lba, blocks)])
    assert initiator.command(cdbs.unmap(len(data)), data).good


def write_same10(initiator: SocketInitiator, lba: int, blocks: int) -> None:
    assert initiator.command(cdbs.write_same10(lba, blocks, unmap=True), bytes(BLOCK)).good


def write_same16(initiator: SocketInitiator, lba: int, blocks: int) -> None:
    assert initiator.command(cdbs.write_same16(lba, blocks, unmap=True, ndob=True)).good


@pytest.mark.parametrize("give_back", [unmap, write_same10, write_same16])
def test_what_is_unmapped_is_given_back_to_the_host(shared_daemon: Daemon, give_back) -> None:  # type: ignore[no-untyped-def]
    """LBPU, LBPWS10, LBPWS: the holes are real, read as zeros (LBPRZ), and nothing beside them is touched."""
    disk = filled(shared_daemon, give_back.__name__.replace("_", "-"))
    before = allocated(disk)
    with log_in(shared_daemon, disk.iqn) as initiator:
        kept = read(initiator, 4 * MIB // BLOCK - 8, 8), read(initiator, 12 * MIB // BLOCK, 8)
        give_back(initiator, 4 * MIB // BLOCK, 8 * MIB // BLOCK)
        assert allocated(disk) <= before - 8 * MIB
        assert read(initiator, 4 * MIB // BLOCK, 64) == bytes(64 * BLOCK)
        assert (read(initiator, 4 * MIB // BLOCK - 8, 8), read(initiator, 12 * MIB // BLOCK, 8)) == kept


def extents_of(path: Path) -> list[tuple[int, int, int]]:
    """(LBA, blocks, provisioning status) of the file, by SEEK_DATA and SEEK_HOLE."""
    found = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only hole from here on
                data = size
            if data > at:
                found.append((at // BLOCK, (data - at) // BLOCK, DEALLOCATED))
            if data < size:
                at = os.lseek(fd, data, os.SEEK_HOLE)
                found.append((data // BLOCK, (at - data) // BLOCK, MAPPED))
            else:
                at = size
    finally:
        os.close(fd)
    return found


def status_of(initiator: SocketInitiator, blocks: int) -> list[tuple[int, int, int]]:
    """(LBA, blocks, provisioning status) of the unit, by GET LBA STATUS, asked again until the end."""
    found: list[tuple[int, int, int]] = []
    lba = 0
    while lba < blocks:
        data = initiator.command(cdbs.get_lba_status(lba, 8 + 16 * 3), read=8 + 16 * 3).data
        for at in range(8, len(data), 16):
            entry = (
                int.from_bytes(data[at : at + 8], "big"),
                int.from_bytes(data[at + 8 : at + 12], "big"),
                data[at + 12] & 0x0F,
            )
            assert entry[0] == lba
            lba += entry[1]
            if found and found[-1][2] == entry[2]:
                entry = (found[-1][0], found[-1][1] + entry[1], entry[2])
                found.pop()
            found.append(entry)
    return found


def test_get_lba_status_agrees_with_the_holes_of_the_file(shared_daemon: Daemon) -> None:
    """SBC-3 §5.5."""
    disk = filled(shared_daemon, "holes")
    with log_in(shared_daemon, disk.iqn) as initiator:
        for number in range(1, 16, 2):
            unmap(initiator, number * MIB // BLOCK, (number * 4096) // BLOCK)
        told = status_of(initiator, 16 * MIB // BLOCK)
        assert told == extents_of(disk.path)
        assert sum(state == DEALLOCATED for _, _, state in told) == 8


# -- third-party copies within a file system that shares blocks ----------------------------------------

SIZE = 64 * MIB
XFS = ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"]


def moved(daemon: Daemon) -> int:
    """Bytes that the daemon has had read from disks and has given them to write, so far.

    (Not those of its system calls: there a clone counts as if it had been copied.)
    """
    assert daemon.process is not None
    counters = Path(f"/proc/{daemon.process.pid}/io").read_text().splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in counters)}
    return values["read_bytes"] + values["write_bytes"]


def by_extended_copy(initiator: SocketInitiator) -> None:
    source, destination = unit_name(initiator, 0), unit_name(initiator, 1)
    step = 16 * MIB // BLOCK
    ranges = [(lba, lba, step) for lba in range(0, SIZE // BLOCK, step)]
    cdb, data = cdbs.extended_copy(source, destination, ranges)
    assert initiator.command(cdb, data).good


def by_token(initiator: SocketInitiator) -> None:
    """ODX."""
    cdb, data = populate_token([(0, SIZE // BLOCK)])
    assert initiator.command(cdb, data).good
    cdb, data = write_using_token(receive_token(initiator), [(0, SIZE // BLOCK)])
    assert initiator.command(cdb, data, lun=1).good


@requires_loop_devices
@pytest.mark.parametrize("copy", [by_extended_copy, by_token])
def test_a_copy_within_a_file_system_that_shares_blocks_moves_no_data(tmp_path: Path, copy) -> None:  # type: ignore[no-untyped-def]
    """copy_file_range and reflinks: neither through the daemon nor on the disk below."""
    with file_system(tmp_path, XFS, 600 * MIB) as at, daemon_in(at) as daemon:
        image = os.urandom(MIB) * (SIZE // MIB)
        (daemon.extent_root / "source.img").write_bytes(image)
        disk = daemon.create_disk("source", "0")
        extent = daemon.create(
            "extent",
            iscsi_target_extent_name="copy",
            iscsi_target_extent_type="File",
            iscsi_target_extent_path=str(daemon.extent_root / "copy.img"),
            iscsi_target_extent_filesize=f"{SIZE // MIB}MB",
        )
        daemon.create("targettoextent", iscsi_target=disk.target_id, iscsi_extent=extent["id"], iscsi_lunid=1)
        os.sync()
        with log_in(daemon, disk.iqn) as initiator:
            assert initiator.command(cdbs.test_unit_ready(), lun=1).status != GOOD  # its own power-on
            free, carried = os.statvfs(at).f_bavail * 4096, moved(daemon)
            copy(initiator)
            assert moved(daemon) - carried < 2 * MIB
            assert initiator.command(cdbs.synchronize_cache10(), lun=1).good
            assert free - os.statvfs(at).f_bavail * 4096 < 4 * MIB
            assert read(initiator, SIZE // BLOCK - 8, 8, lun=1) == image[-8 * BLOCK :]
        assert (daemon.extent_root / "copy.img").read_bytes() == image
        shown = subprocess.run(
            ["filefrag", "-v", daemon.extent_root / "copy.img"], capture_output=True, text=True, check=True
        ).stdout
        assert "shared" in shown
