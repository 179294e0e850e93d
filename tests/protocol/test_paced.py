"""Replies of many PDUs, made in pieces: the same bytes as if made at once, and never many in one go."""

from collections.abc import Iterator

import pytest

from protocol import bhs
from protocol.enums import SnackType
from protocol.paced import PIECE, Paced, pdus_of
from tests import cdbs
from tests.initiator import MemoryPeer
from tests.protocol.target import MemoryTarget, connection_of

BLOCKS = 1024
SIZE = 512 * BLOCKS
SMALL = {"MaxRecvDataSegmentLength": "512"}
DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}


def pattern(size: int = SIZE) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in range(size // 4))


def log_in(target: MemoryTarget, **keys: str) -> MemoryPeer:
    target.backends[0].write(0, pattern())
    return target.logged_in(keys={**SMALL, **keys})


def ask(peer: MemoryPeer, *commands: bytes) -> None:
    peer.send(
        b"".join(
            peer.initiator.scsi_command(cdb, read=True, expected=SIZE, initiator_task_tag=tag)
            for tag, cdb in enumerate(commands, 900)
        )
    )


def pieces(peer: MemoryPeer) -> Iterator[list[bytes]]:
    while piece := peer.target.data_to_send():
        yield [bytes(part) for part in piece]


@pytest.mark.parametrize(
    ("size", "limit", "burst"),
    [(0, 512, 1024), (1, 512, 1024), (1025, 512, 1024), (10_000, 1000, 1500), (9, 9, 9)],
)
def test_pdus_are_counted_as_they_are_cut(size: int, limit: int, burst: int) -> None:
    count = at = in_burst = 0
    while at < size:
        length = min(limit, burst - in_burst, size - at)
        at += length
        in_burst = (in_burst + length) % burst
        count += 1
    assert pdus_of(size, limit, burst) == count


@pytest.mark.parametrize("keys", [{}, DIGESTS, {"MaxBurstLength": "1536", "FirstBurstLength": "512"}])
@pytest.mark.parametrize("length", [BLOCKS, BLOCKS - 1])
def test_the_bytes_are_those_of_a_reply_made_at_once(
    keys: dict[str, str], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A READ, one that is too long for it, a small one and a NOP, all behind each other."""
    said = []
    for piece in (PIECE, 1 << 30):
        monkeypatch.setattr("protocol.connection.PIECE", piece)
        peer = log_in(MemoryTarget(), **keys)
        ask(peer, cdbs.read10(0, length), cdbs.read10(0, BLOCKS), cdbs.read10(0, 1), bytes(6))
        peer.send(peer.initiator.nop_out(b"behind"))
        said.append(b"".join(part for piece in pieces(peer) for part in piece))
    assert said[0] == said[1]
    assert pattern()[:512] in said[0]


def test_one_go_makes_no_more_than_a_piece() -> None:
    peer = log_in(MemoryTarget())
    ask(peer, cdbs.read10(0, BLOCKS), cdbs.read10(0, BLOCKS))
    waiting = sum(map(len, connection_of(peer).out))
    assert waiting == 2 * (SIZE + 48 * BLOCKS)
    sizes = [len(piece) for piece in pieces(peer)]
    assert len(sizes) >= 2 * BLOCKS // PIECE
    assert max(sizes) <= 2 * PIECE
    assert not connection_of(peer).paced


def test_a_whole_conversation_goes_on_around_them() -> None:
    peer = log_in(MemoryTarget())
    tasks = [peer.send_command(cdbs.read10(0, BLOCKS), read=SIZE) for _ in range(3)]
    write = peer.send_command(cdbs.write10(0, 8), bytes(4096))
    assert all(peer.wait(task).data == pattern() for task in tasks)
    assert peer.wait(write).good
    assert peer.command(cdbs.read10(0, 8), read=4096).data == bytes(4096)


def test_a_connection_that_is_closed_says_all_of_it_first() -> None:
    peer = log_in(MemoryTarget())
    task = peer.send_command(cdbs.read10(0, BLOCKS), read=SIZE)
    reply = peer.logout()
    assert reply.response == 0
    assert task.reply is not None and task.reply.data == pattern()


# -- with error recovery ----------------------------------------------------------------------------


def recovering(level: int) -> MemoryPeer:
    target = MemoryTarget(error_recovery_level=2)
    target.backends[0].write(0, pattern())
    return target.logged_in(keys={**SMALL, "ErrorRecoveryLevel": str(level)}, strict=False)


def data_of(pdus: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(SIZE)
    for offset, piece in pdus:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def test_data_that_comes_again_is_made_in_pieces_too() -> None:
    peer = recovering(1)
    ask(peer, cdbs.read10(0, BLOCKS))
    first = [part for piece in pieces(peer) for part in piece]
    peer.send(peer.initiator.snack(SnackType.DATA_R2T, initiator_task_tag=900, exp_stat_sn=0))
    again = list(pieces(peer))
    assert max(map(len, again)) <= 2 * PIECE
    flat = [part for piece in again for part in piece]
    assert [part for part in flat if len(part) == 512] == [part for part in first if len(part) == 512]


def test_data_cut_anew_while_it_is_being_sent_comes_whole() -> None:
    """An R-Data SNACK after the first piece: what was made by then and what was not is cut anew, once."""
    peer = recovering(1)
    ask(peer, cdbs.read10(0, BLOCKS))
    stream = b"".join(bytes(part) for part in peer.target.data_to_send())
    connection = connection_of(peer)
    assert connection.paced
    connection.send_limit = 1024
    peer.send(
        peer.initiator.snack(SnackType.R_DATA, initiator_task_tag=900, target_transfer_tag=5, exp_stat_sn=0)
    )
    received = peer.initiator.feed(stream) + peer.pending()
    assert not [pdu for pdu in received if isinstance(pdu.header, bhs.Reject)]
    anew = [pdu for pdu in received if isinstance(pdu.header, bhs.DataIn) and len(pdu.data) == 1024]
    assert data_of([(pdu.header.buffer_offset, pdu.data) for pdu in anew]) == pattern()  # type: ignore[union-attr]
    last = received[-1].expect(bhs.ScsiResponse)
    assert (last.snack_tag, last.exp_data_sn) == (5, len(anew))


def test_what_is_done_says_so() -> None:
    paced = Paced(iter([(bytes(48), b"x"), (bytes(48), b"")]), 97)
    assert len(paced) == 97
    assert len(paced.take(1)) == 1
    assert (len(paced), paced.done) == (48, False)
    assert paced.take(5) == [(bytes(48), b"")]
    assert (len(paced), paced.done) == (0, True)
