"""What a client does with a disk that it has made: log in, verified I/O, and find it gone afterwards."""

import os

import pytest

from tests.daemon import HOST, Daemon
from tests.initiator import INITIATOR_NAME, LoginFailed, SocketInitiator

__all__ = ["gone", "use"]


def use(
    daemon: Daemon, iqn: str, lun: int, size: int, block: int = 512, initiator: str = INITIATOR_NAME
) -> None:
    """Log in at once, write at the beginning, in the middle and at the end, and read all of it back in
    another session."""
    blocks = size // block
    places = {lba: os.urandom(8 * block) for lba in (0, blocks // 2, blocks - 8)}
    for write in (True, False):
        with SocketInitiator((HOST, daemon.portal_port)) as session:
            session.login(iqn, initiator)
            session.command(bytes(6), lun=lun)  # POWER ON
            capacity = session.command(bytes.fromhex("25") + bytes(9), read=8, lun=lun).data
            assert int.from_bytes(capacity[:4], "big") + 1 == blocks
            assert int.from_bytes(capacity[4:8], "big") == block
            for lba, data in places.items():
                fields = lba.to_bytes(4, "big") + b"\0" + (8).to_bytes(2, "big") + b"\0"
                if write:
                    assert session.command(b"\x2a\0" + fields, data, lun=lun).good
                else:
                    assert bytes(session.command(b"\x28\0" + fields, read=len(data), lun=lun).data) == data
            if write:
                assert session.command(bytes.fromhex("35") + bytes(9), lun=lun).good
            session.logout()


def gone(daemon: Daemon, iqn: str) -> None:
    with SocketInitiator((HOST, daemon.portal_port)) as session, pytest.raises(LoginFailed):
        session.login(iqn)
