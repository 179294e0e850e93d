"""Data-Out that is a window on the receive buffer must not be looked at once the buffer is used again."""

import pytest

from tests import cdbs
from tests.protocol.target import MemoryTarget

BLOCK = bytes(range(256)) * 2
NOWAIT_OFF = "write_nowait"


@pytest.mark.parametrize("stuck", ["lane", "ordered"])
def test_a_write_that_waits_keeps_its_own_copy_of_immediate_data(
    stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initiator in memory overwrites what it lent at its next delivery, as the server's buffer does."""
    target = MemoryTarget()
    peer = target.logged_in()
    backend = target.backends[0]
    monkeypatch.setattr(backend, NOWAIT_OFF, lambda offset, data: False)
    target.lane.hold = True
    first = peer.send_command(cdbs.write10(0, 1), BLOCK, attribute=2 if stuck == "ordered" else 1)
    second = peer.send_command(cdbs.write10(8, 1), BLOCK[::-1])
    peer.nop(b"\xee" * 4096)
    while target.lane.held:
        target.lane.release()
    assert peer.wait(first).good
    assert peer.wait(second).good
    assert bytes(backend.read(0, 512)) == BLOCK
    assert bytes(backend.read(8 * 512, 512)) == BLOCK[::-1]
