"""What ESXi asks of an array: locks, copies, zeroing and space reclaimed on the array's side, and its two
warnings about space. The bytes of its commands are written down here as it sends them.

Its locks by COMPARE AND WRITE between hosts have a file of their own: ``test_compare_and_write``.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import eventually
from tests.functional.sessions import (
    BLOCK,
    attention,
    daemon_in,
    log_in,
    populate_token,
    read,
    receive_token,
    unit_name,
    write,
    write_using_token,
)
from tests.initiator import Reply, SocketInitiator
from tests.media import file_system, requires_loop_devices

MIB = 1 << 20
BLOCKS_PER_MIB = MIB // BLOCK
SOFT_THRESHOLD = (6, (0x38, 0x07))
OUT_OF_SPACE = (7, (0x27, 0x07))


def second_lun(daemon: Daemon, disk: Disk, name: str, size: str, **fields: object) -> int:
    """Another extent as LUN 1 of the same target; its id."""
    values = {"name": name, "type": "File", "path": str(daemon.extent_root / f"{name}.img"), "filesize": size}
    extent = daemon.create(
        "extent", **{f"iscsi_target_extent_{k}": v for k, v in {**values, **fields}.items()}
    )
    daemon.create("targettoextent", iscsi_target=disk.target_id, iscsi_extent=extent["id"], iscsi_lunid=1)
    return int(extent["id"])


def test_what_esxi_looks_for_before_it_offloads(shared_daemon: Daemon) -> None:
    """VPD pages 83h, 8Fh, B0h, B2h, READ CAPACITY(16): each of the five primitives is announced."""
    disk = shared_daemon.create_disk("announced", "16MB")
    with log_in(shared_daemon, disk.iqn) as initiator:
        standard = initiator.command(cdbs.inquiry(), read=255).data
        assert standard[5] & 0x08, "3PC: third-party copy"
        assert len(unit_name(initiator)) == 16, "an NAA of 16 bytes"
        assert unit_name(initiator)[0] >> 4 == 6, "IEEE registered extended"
        limits = initiator.command(cdbs.inquiry(0xB0), read=255).data
        assert limits[5] == 1, "ATS: one block"
        assert int.from_bytes(limits[36:44], "big") >= BLOCKS_PER_MIB, "zeroes come by the MiB"
        assert int.from_bytes(limits[20:24], "big") >= BLOCKS_PER_MIB
        granularity = int.from_bytes(limits[28:32], "big") * BLOCK
        assert granularity <= MIB, "space of VMFS 6 is reclaimed by itself where it can be by the MiB"
        capacity = initiator.command(cdbs.read_capacity16(), read=32).data
        assert capacity[14] & 0xC0 == 0xC0, "thin, and what is unmapped reads as zeros"
        assert initiator.command(cdbs.inquiry(0xB2), read=255).data[5] & 0xE0 == 0xE0
        operating = bytes((0x84, 0x03)) + bytes(8) + (512).to_bytes(4, "big") + bytes(2)
        parameters = initiator.command(operating, read=512).data
        assert int.from_bytes(parameters[8:10], "big") >= 2, "two CSCD descriptors"
        assert int.from_bytes(parameters[16:20], "big") >= 4 * MIB, "its copies are of 4 MiB"


def xcopy(source: bytes, destination: bytes, moves: list[tuple[int, int, int]]) -> tuple[bytes, bytes]:
    """EXTENDED COPY as ESXi sends it: two identification descriptors, blocks counted at the destination."""
    list_id, priority = 0x01, 0x10  # STR 0, LIST ID USAGE 10b: nothing is held for RECEIVE COPY DATA
    cscds = b""
    for naa in (source, destination):
        cscds += bytes.fromhex("e4 00 0000") + bytes.fromhex("01 03 00 10") + naa + bytes(4)
        cscds += bytes((0,)) + BLOCK.to_bytes(3, "big")
    segments = b""
    for from_lba, to_lba, blocks in moves:
        segments += bytes.fromhex("02 02 0018 0000 0001 0000") + blocks.to_bytes(2, "big")  # DC
        segments += from_lba.to_bytes(8, "big") + to_lba.to_bytes(8, "big")
    data = bytes((list_id, priority)) + len(cscds).to_bytes(2, "big") + bytes(4)
    data += len(segments).to_bytes(4, "big") + bytes(4) + cscds + segments
    return bytes((0x83, 0)) + bytes(8) + len(data).to_bytes(4, "big") + bytes(2), data


@pytest.mark.parametrize("sent_to", [0, 1], ids=["to the source", "to the destination"])
def test_a_virtual_disk_is_cloned_from_one_datastore_to_another(shared_daemon: Daemon, sent_to: int) -> None:
    """XCOPY in pieces of 4 MiB, several under way at once."""
    disk = shared_daemon.create_disk(f"source{sent_to}", "32MB")
    second_lun(shared_daemon, disk, f"destination{sent_to}", "32MB")
    image = os.urandom(16 * MIB)
    piece = 4 * BLOCKS_PER_MIB
    with log_in(shared_daemon, disk.iqn) as initiator:
        attention(initiator, lun=1)
        for lba in range(0, len(image) // BLOCK, BLOCKS_PER_MIB):
            assert write(initiator, lba, image[lba * BLOCK : lba * BLOCK + MIB]).good
        names = unit_name(initiator, 0), unit_name(initiator, 1)
        tasks = []
        for number in range(4):
            cdb, data = xcopy(*names, [(number * piece, (number + 4) * piece, piece)])
            data = bytes((number + 1,)) + data[1:]  # a list identifier each
            tasks.append(initiator.send_command(cdb, data, lun=sent_to))
        assert all(initiator.wait(task).good for task in tasks)
        for lba in range(0, len(image) // BLOCK, BLOCKS_PER_MIB):
            copied = read(initiator, 4 * piece + lba, BLOCKS_PER_MIB, lun=1)
            assert copied == image[lba * BLOCK : lba * BLOCK + MIB]


def zero(initiator: SocketInitiator, lba: int) -> Reply:
    """WRITE SAME(16) of a MiB with a block of zeros: an eager-zeroed virtual disk."""
    return initiator.command(cdbs.write_same16(lba, BLOCKS_PER_MIB), bytes(BLOCK))


def test_eager_zeroing_takes_the_space_and_reclaiming_gives_it_back(shared_daemon: Daemon) -> None:
    disk = shared_daemon.create_disk("zeroed", "16MB")
    with log_in(shared_daemon, disk.iqn) as initiator:
        assert write(initiator, 0, b"\xa5" * MIB).good
        assert zero(initiator, 0).good and zero(initiator, BLOCKS_PER_MIB).good
        assert read(initiator, 0, 2 * BLOCKS_PER_MIB) == bytes(2 * MIB)
        assert disk.path.stat().st_blocks * 512 >= 2 * MIB, "zeros that nobody unmapped have their space"
        data = cdbs.unmap_parameters([(0, BLOCKS_PER_MIB), (BLOCKS_PER_MIB, BLOCKS_PER_MIB)])
        assert initiator.command(cdbs.unmap(len(data)), data).good
        assert disk.path.stat().st_blocks * 512 < MIB
        assert read(initiator, 0, 2 * BLOCKS_PER_MIB) == bytes(2 * MIB)


# -- space runs out -----------------------------------------------------------------------------------

SMALL = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Daemon, Disk]]:
    """A datastore of 128 MiB, as it says, in a file system of 48: and the first MiB of it is written."""
    with file_system(tmp_path, SMALL, 48 * MIB) as at, daemon_in(at) as daemon:
        disk = daemon.create_disk("thin", "128MB", extent={"iscsi_target_extent_avail_threshold": 30})
        with log_in(daemon, disk.iqn) as initiator:
            assert write(initiator, 0, os.urandom(MIB)).good
        yield daemon, disk


def taken(at: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the file system, or fewer."""
    filler = at / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece in (MIB, 4096):
            try:
                while (space := os.statvfs(at)).f_bavail * space.f_frsize > leave:
                    os.posix_fallocate(file.fileno(), file.tell(), piece)
                    file.seek(piece, os.SEEK_CUR)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


def told(initiator: SocketInitiator) -> tuple[int, tuple[int, int] | None] | None:
    reply = initiator.command(cdbs.test_unit_ready())
    return None if reply.good else (reply.sense_key or 0, reply.additional_sense)


@requires_loop_devices
def test_the_soft_threshold_warns_every_host_once(small: tuple[Daemon, Disk]) -> None:
    """38h/07h (SBC-3 §4.7.3.7), by the host file system's free space, long before writes fail."""
    daemon, disk = small
    with log_in(daemon, disk.iqn, "one") as one, log_in(daemon, disk.iqn, "two") as two:
        assert told(one) is None
        taken(daemon.extent_root, 8 * MIB)
        eventually(lambda: told(one) == SOFT_THRESHOLD, "the threshold is told")
        assert told(two) == SOFT_THRESHOLD
        assert told(one) is None and told(two) is None
        assert write(one, 2 * BLOCKS_PER_MIB, bytes(MIB)).good


def settle(initiator: SocketInitiator) -> None:
    """Hear what there is to be told."""
    eventually(lambda: told(initiator) is None, "nothing more is told")


def by_write(initiator: SocketInitiator, lba: int) -> Reply:
    return write(initiator, lba, b"\x11" * (64 * 1024))


def by_write_same(initiator: SocketInitiator, lba: int) -> Reply:
    return initiator.command(cdbs.write_same16(lba, BLOCKS_PER_MIB), b"\x22" * BLOCK)


def by_compare_and_write(initiator: SocketInitiator, lba: int) -> Reply:
    return initiator.command(cdbs.compare_and_write(lba, 1), bytes(BLOCK) + b"\x33" * BLOCK)


def by_extended_copy(initiator: SocketInitiator, lba: int) -> Reply:
    name = unit_name(initiator)
    return initiator.command(*xcopy(name, name, [(0, lba, BLOCKS_PER_MIB)]))


def by_token(initiator: SocketInitiator, lba: int) -> Reply:
    assert initiator.command(*populate_token([(0, BLOCKS_PER_MIB)])).good
    token = receive_token(initiator)
    return initiator.command(*write_using_token(token, [(lba, BLOCKS_PER_MIB)]))


def by_orwrite(initiator: SocketInitiator, lba: int) -> Reply:
    return initiator.command(cdbs.orwrite(lba, 8), b"\x44" * (8 * BLOCK))


def by_write_and_verify(initiator: SocketInitiator, lba: int) -> Reply:
    return initiator.command(cdbs.write_and_verify16(lba, 8, byte1=0x02), b"\x55" * (8 * BLOCK))


WAYS: list[Callable[[SocketInitiator, int], Reply]] = [
    zero,
    by_write,
    by_write_same,
    by_compare_and_write,
    by_extended_copy,
    by_token,
    by_orwrite,
    by_write_and_verify,
]


@requires_loop_devices
def test_a_full_datastore_stuns_and_freed_space_wakes(small: tuple[Daemon, Disk]) -> None:
    """27h/07h DATA PROTECT (SBC-3 §4.7.3.6) to whatever would take space, and nothing else: the very sense by
    which ESXi suspends a virtual machine. The same command succeeds when there is room again."""
    daemon, disk = small
    with log_in(daemon, disk.iqn) as initiator:
        filler = taken(daemon.extent_root, 0)
        eventually(lambda: told(initiator) == SOFT_THRESHOLD, "the threshold is told, once, and not later")
        for number, way in enumerate(WAYS):
            settle(initiator)
            reply = way(initiator, (8 + 2 * number) * BLOCKS_PER_MIB)
            assert (reply.sense_key, reply.additional_sense) == OUT_OF_SPACE, (way.__name__, reply)
        assert write(initiator, 0, bytes(MIB)).good, "what has its space is written"
        assert len(read(initiator, 0, 8)) == 8 * BLOCK
        filler.unlink()
        for number, way in enumerate(WAYS):
            settle(initiator)
            assert way(initiator, (8 + 2 * number) * BLOCKS_PER_MIB).good, way.__name__
        assert initiator.command(cdbs.synchronize_cache10()).good
