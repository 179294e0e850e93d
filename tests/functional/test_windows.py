"""What Windows asks of a disk: offloaded copies by token (ODX), trimming in long lists, where the space is.

What the validation of a failover cluster does has a file of its own: ``test_cluster``.
"""

import os
from collections.abc import Iterator

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.faults.kit import eventually
from tests.functional.sessions import (
    BLOCK,
    attention,
    log_in,
    populate_token,
    read,
    receive_token,
    token_information,
    write,
    write_using_token,
)
from tests.initiator import SocketInitiator

MIB = 1 << 20
SIZE = 96 * MIB
ZERO_TOKEN = bytes.fromhex("ffff0001000001f8").ljust(512, b"\0")
"""Block device zero ROD token (SBC-3 §4.28.4)."""
DONE = 0x01


@pytest.fixture(scope="module")
def disk(shared_daemon: Daemon) -> Disk:
    """A disk with data at the beginning and in the middle, and holes."""
    made = shared_daemon.create_disk("odx", f"{SIZE // MIB}MB")
    with made.path.open("r+b") as file:
        for at in (0, 40 * MIB):
            file.seek(at)
            file.write(os.urandom(3 * MIB))
    return made


@pytest.fixture
def initiator(shared_daemon: Daemon, disk: Disk) -> Iterator[SocketInitiator]:
    with log_in(shared_daemon, disk.iqn) as made:
        yield made


def token_limits(initiator: SocketInitiator) -> dict[str, int]:
    """The Block Device ROD Token Limits descriptor of VPD page 8Fh (SBC-3 §6.6.6.3)."""
    page = initiator.command(cdbs.inquiry(0x8F, 4096), read=4096).data[4:]
    at = 0
    while int.from_bytes(page[at : at + 2], "big") != 0x0000:
        at += 4 + int.from_bytes(page[at + 2 : at + 4], "big")
    found = page[at + 4 : at + 4 + int.from_bytes(page[at + 2 : at + 4], "big")]
    fields = {"ranges": (6, 8), "longest": (8, 12), "default": (12, 16), "most": (16, 24), "best": (24, 32)}
    return {name: int.from_bytes(found[a:b], "big") for name, (a, b) in fields.items()}


def test_a_file_is_copied_by_tokens_of_the_size_that_the_unit_likes_best(
    initiator: SocketInitiator, disk: Disk
) -> None:
    """POPULATE TOKEN, RECEIVE ROD TOKEN INFORMATION, WRITE USING TOKEN, with IMMED and asked until done."""
    limits = token_limits(initiator)
    assert limits["ranges"] >= 8 and limits["longest"] >= limits["default"] >= 10
    assert limits["most"] >= limits["best"] == 64 * MIB // BLOCK
    before = disk.path.read_bytes()
    source, length, to = 8, 32 * MIB // BLOCK, 50 * MIB // BLOCK
    ranges = [(source, 4096), (source + 4096, length - 4096)]
    assert initiator.command(*populate_token(ranges, list_id=7)).good
    token = receive_token(initiator, list_id=7)
    cdb, data = write_using_token(token, [(to, length)], list_id=8)
    data = data[:2] + b"\x01" + data[3:]  # IMMED
    assert initiator.command(cdb, data).good
    eventually(lambda: token_information(initiator, 8)[5] == DONE, "the copy is done")
    done = token_information(initiator, 8)
    assert int.from_bytes(done[16:24], "big") == length, "TRANSFER COUNT, in blocks"
    expected = bytearray(before)
    expected[to * BLOCK : (to + length) * BLOCK] = before[source * BLOCK : (source + length) * BLOCK]
    assert initiator.command(cdbs.synchronize_cache10()).good
    assert disk.path.read_bytes() == bytes(expected)
    assert write(initiator, to, bytes(BLOCK)).good
    assert read(initiator, source, 8) == before[source * BLOCK : (source + 8) * BLOCK], (
        "the source is its own"
    )


def test_a_file_is_zeroed_by_the_zero_token(initiator: SocketInitiator) -> None:
    lba, blocks = 41 * MIB // BLOCK, 2 * MIB // BLOCK
    assert any(read(initiator, lba, blocks))
    assert initiator.command(*write_using_token(ZERO_TOKEN, [(lba, blocks)])).good
    assert not any(read(initiator, lba, blocks))


def test_a_token_opens_nothing_to_a_session_of_another_target(
    shared_daemon: Daemon, initiator: SocketInitiator
) -> None:
    """Where an extent is kept to its own target; for the rest see ``test_copies_between_targets``."""
    assert initiator.command(*populate_token([(0, 8)], list_id=9)).good
    token = receive_token(initiator, list_id=9)
    own_target_only = {"iscsi_target_extent_insecure_tpc": False}
    other = shared_daemon.create_disk("odx-other", "1MB", extent=own_target_only)
    with log_in(shared_daemon, other.iqn, "two") as stranger:
        reply = stranger.command(*write_using_token(token, [(0, 8)]))
        assert (reply.sense_key, reply.additional_sense) == (5, (0x23, 0x04))
        assert not any(read(stranger, 0, 8))


def test_trimming_with_as_many_descriptors_as_there_may_be(initiator: SocketInitiator, disk: Disk) -> None:
    """Optimize-Volume -ReTrim: lists as long as VPD page B0h allows, of clusters that are not neighbours."""
    limits = initiator.command(cdbs.inquiry(0xB0), read=255).data
    count = int.from_bytes(limits[24:28], "big")
    assert count == 256
    before = disk.path.stat().st_blocks * 512
    data = cdbs.unmap_parameters([(16 * number, 8) for number in range(count)])
    assert initiator.command(cdbs.unmap(len(data)), data).good
    of_its_own = 8 * 4096  # the file system's, for a file that is in so many parts now
    assert disk.path.stat().st_blocks * 512 <= before - count * 4096 + of_its_own
    assert not any(read(initiator, 16 * (count - 1), 8))
    data = cdbs.unmap_parameters([(16 * number, 8) for number in range(count + 1)])
    assert initiator.command(cdbs.unmap(len(data)), data).additional_sense == (0x26, 0x00)


def test_space_is_told_in_the_threshold_sets_that_the_pages_agree_on(
    shared_daemon: Daemon, disk: Disk
) -> None:
    """VPD page B2h (exponent), log page 0Ch (available, used), mode page 1Ch/02h (SBC-3 §4.7.3.7)."""
    path = f"services/iscsi/extent/{disk.extent_id}/"
    shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_avail_threshold": 1})
    with log_in(shared_daemon, disk.iqn) as initiator:
        exponent = initiator.command(cdbs.inquiry(0xB2), read=255).data[4]
        set_bytes = BLOCK << exponent
        log = initiator.command(cdbs.log_sense(0x0C), read=1024).data[4:]
        counts = {int.from_bytes(log[at : at + 2], "big"): log[at + 4 : at + 8] for at in (0, 12)}
        free = os.statvfs(disk.path)
        available = int.from_bytes(counts[1], "big") * set_bytes
        assert 0.5 * free.f_bavail * free.f_frsize < available < 2 * free.f_bavail * free.f_frsize
        assert int.from_bytes(counts[2], "big") == disk.path.stat().st_blocks * 512 // set_bytes

        def page() -> bytes:
            return initiator.command(cdbs.mode_sense10(0x1C, subpage=0x02, dbd=True), read=255).data[8:]

        eventually(lambda: len(page()) > 16, "the space has been looked at")
        total = free.f_blocks * free.f_frsize // 100 // set_bytes
        assert page()[16:18] == b"\x82\x01", "soft, armed decreasing, of what is available"
        assert abs(int.from_bytes(page()[20:24], "big") - total) <= 1
        assert attention(initiator) is None
