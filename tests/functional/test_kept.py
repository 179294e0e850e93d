"""What a unit was told to keep, or had begun, is there after kill -9. (Reservations: ``test_cluster``; mode
pages: ``test_write_cache``.)"""

import sqlite3
from contextlib import closing

import pytest

from targetd.persistence.interface import UNITS
from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import eventually
from tests.functional.sessions import BLOCK, attention, log_in, write

MIB = 1 << 20
IN_PROGRESS = (0x04, 0x1B)
OVERWRITE = 1


@pytest.mark.parametrize("beginner", ["initiator", "administrator"])
def test_a_sanitize_that_was_cut_off_goes_on_to_its_end(daemon: Daemon, beginner: str) -> None:
    """SBC-3 §4.11.2: it is not stopped by a power loss, and nothing is let in until it is over."""
    disk = daemon.create_disk("secret", "1MB")
    pattern = bytes.fromhex("a55a00ff") if beginner == "initiator" else bytes(4)
    with log_in(daemon, disk.iqn) as initiator:
        assert write(initiator, 0, b"\x77" * MIB).good
        if beginner == "initiator":
            data = bytes((1, 0)) + len(pattern).to_bytes(2, "big") + pattern
            assert initiator.command(cdbs.sanitize(OVERWRITE, len(data), immediate=True), data).good
            assert attention(initiator) == IN_PROGRESS
    if beginner == "administrator":
        path = f"services/iscsi/extent/{disk.extent_id}/sanitize/"
        daemon.expect(202, "POST", path, {"method": "overwrite"})
    daemon.kill9()
    daemon.start()
    with log_in(daemon, disk.iqn) as initiator:
        reply = initiator.command(cdbs.read10(0, 1), read=BLOCK)
        assert (reply.sense_key, reply.additional_sense) == (2, IN_PROGRESS)
        assert reply.sense[15] & 0x80, "with its progress"
        assert initiator.command(cdbs.inquiry(), read=96).data[0] == 0

        def progress() -> int:
            sense = initiator.command(cdbs.request_sense(), read=252).data
            return int.from_bytes(sense[16:18], "big") if sense[15] & 0x80 else 0x10000

        first = progress()
        eventually(lambda: progress() > first, "it advances")
        eventually(lambda: attention(initiator) is None, "it ends")
        found = initiator.command(cdbs.read10(0, 2048), read=MIB).data
        assert found == pattern * (MIB // 4)


SET_INFORMATION = bytes((0xA4, 0x06)) + bytes(4)


def test_nothing_is_kept_for_an_extent_that_is_gone(daemon: Daemon) -> None:
    """Its neighbour keeps what is its own."""
    name = b"shelf 7, slot 3"
    disks = [daemon.create_disk(disk, "1MB") for disk in ("stays", "goes")]
    for disk in disks:
        with log_in(daemon, disk.iqn) as initiator:
            assert initiator.command(SET_INFORMATION + len(name).to_bytes(4, "big") + bytes(2), name).good
    before = {key for disk in disks for key in kept_of(daemon, disk)}
    assert before == set(kept(daemon))
    stays = kept_of(daemon, disks[0])
    assert len(stays) == len(kept_of(daemon, disks[1])) == 2, "the medium that it is, and the name"
    daemon.expect(204, "DELETE", f"services/iscsi/extent/{disks[1].extent_id}/")
    assert kept(daemon) == stays


def kept_of(daemon: Daemon, disk: Disk) -> list[str]:
    return [key for key in kept(daemon) if key.startswith(f"{disk.extent_id}/")]


def kept(daemon: Daemon) -> list[str]:
    """Keys of what units have kept, in the store."""
    with closing(sqlite3.connect(f"file:{daemon.state_dir}/targetd.sqlite?mode=ro", uri=True)) as store:
        return [key for (key,) in store.execute("SELECT key FROM kept WHERE namespace = ?", (UNITS,))]


def test_identifying_information_is_kept(daemon: Daemon) -> None:
    """SPC-4 §5.5, §6.45; who did not set it is told."""
    disk = daemon.create_disk("named", "1MB")
    name = b"shelf 7, slot 3"
    set_information = SET_INFORMATION + len(name).to_bytes(4, "big") + bytes(2)
    report = bytes((0xA3, 0x05)) + bytes(4) + (256).to_bytes(4, "big") + bytes(2)
    with log_in(daemon, disk.iqn, "one") as one, log_in(daemon, disk.iqn, "two") as two:
        assert one.command(set_information, name).good
        assert attention(one) is None
        assert attention(two) == (0x3F, 0x05)
    daemon.kill9()
    daemon.start()
    with log_in(daemon, disk.iqn) as initiator:
        data = initiator.command(report, read=256).data
        assert data[4 : 4 + int.from_bytes(data[2:4], "big")] == name
