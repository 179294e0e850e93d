"""Sessions with the real daemon for tests of whole sequences, and parameter lists that they send."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from protocol.enums import ScsiStatus
from tests import cdbs
from tests.daemon import HOST, Daemon
from tests.initiator import Reply, SessionState, SocketInitiator

GOOD, CHECK_CONDITION = ScsiStatus.GOOD, ScsiStatus.CHECK_CONDITION
RESERVATION_CONFLICT = ScsiStatus.RESERVATION_CONFLICT
BLOCK = 512


@contextlib.contextmanager
def daemon_in(directory: Path) -> Iterator[Daemon]:
    """A daemon with its state and its extents in that directory, gone when the ``with`` ends."""
    daemon = Daemon(directory)
    try:
        yield daemon.start()
        assert daemon.terminate() == 0
        assert not daemon.tracebacks()
    finally:
        daemon.kill9()


def log_in(
    daemon: Daemon, target: str, name: str = "one", *, isid: bytes = b"", lun: int = 0
) -> SocketInitiator:
    """A session of ``iqn…:name`` with a target, its first unit attention taken.

    Args:
        isid: given where the nexus must be the same again after a new login.
    """
    initiator = SocketInitiator((HOST, daemon.portal_port), session=SessionState(isid=isid))
    initiator.login(target, f"iqn.2003-01.org.example:{name}")
    assert attention(initiator, lun=lun) == (0x29, 0x00)
    return initiator


def attention(initiator: SocketInitiator, lun: int = 0) -> tuple[int, int] | None:
    """(ASC, ASCQ) of what TEST UNIT READY has to say; None: nothing."""
    return initiator.command(cdbs.test_unit_ready(), lun=lun).additional_sense


def capacity(initiator: SocketInitiator, lun: int = 0) -> int:
    """Bytes, by READ CAPACITY(16)."""
    reply = initiator.command(cdbs.read_capacity16(), read=32, lun=lun)
    assert reply.status == GOOD, reply
    return (int.from_bytes(reply.data[:8], "big") + 1) * int.from_bytes(reply.data[8:12], "big")


def write(initiator: SocketInitiator, lba: int, data: bytes, *, byte1: int = 0, lun: int = 0) -> Reply:
    return initiator.command(cdbs.write10(lba, len(data) // BLOCK, byte1), data, lun=lun)


def read(initiator: SocketInitiator, lba: int, blocks: int, *, lun: int = 0) -> bytes:
    reply = initiator.command(cdbs.read10(lba, blocks), read=blocks * BLOCK, lun=lun)
    assert reply.status == GOOD, reply
    return reply.data


def unit_name(initiator: SocketInitiator, lun: int = 0) -> bytes:
    """The NAA designator of the unit (VPD page 83h), as an EXTENDED COPY names it."""
    page = initiator.command(cdbs.inquiry(0x83, 1024), read=1024, lun=lun).data
    at = 4
    while at < len(page):
        association, kind, length = page[at + 1] >> 4 & 3, page[at + 1] & 0x0F, page[at + 3]
        if (association, kind) == (0, 3):
            return page[at + 4 : at + 4 + length]
        at += 4 + length
    raise AssertionError("the unit has no NAA designator")


# -- tokens (SPC-4 §6.23, SBC-3 §5.10, §5.47) -----------------------------------------------------------


def _token_command(action: int, list_id: int, body: bytes) -> tuple[bytes, bytes]:
    data = len(body).to_bytes(2, "big") + body
    cdb = bytes((0x83, action)) + bytes(4) + list_id.to_bytes(4, "big") + len(data).to_bytes(4, "big")
    return cdb + bytes(2), data


def _ranges(ranges: list[tuple[int, int]]) -> bytes:
    """Block device range descriptors, with their length before them."""
    body = b"".join(lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(4) for lba, blocks in ranges)
    return len(body).to_bytes(2, "big") + body


def populate_token(ranges: list[tuple[int, int]], list_id: int = 1) -> tuple[bytes, bytes]:
    """POPULATE TOKEN of (LBA, blocks) pairs."""
    return _token_command(0x10, list_id, bytes(12) + _ranges(ranges))


def write_using_token(token: bytes, ranges: list[tuple[int, int]], list_id: int = 2) -> tuple[bytes, bytes]:
    """WRITE USING TOKEN to (LBA, blocks) pairs."""
    return _token_command(0x11, list_id, bytes(14) + token + bytes(6) + _ranges(ranges))


def token_information(initiator: SocketInitiator, list_id: int, lun: int = 0) -> bytes:
    """RECEIVE ROD TOKEN INFORMATION."""
    cdb = bytes((0x84, 0x07)) + list_id.to_bytes(4, "big") + bytes(4) + (2048).to_bytes(4, "big") + bytes(2)
    return initiator.command(cdb, read=2048, lun=lun).data


def receive_token(initiator: SocketInitiator, list_id: int = 1, lun: int = 0) -> bytes:
    """The token that a POPULATE TOKEN made."""
    data = token_information(initiator, list_id, lun)
    at = 32 + data[13]
    length = int.from_bytes(data[at : at + 4], "big")
    return data[at + 6 : at + 4 + length]
