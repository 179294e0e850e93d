"""A connection that asks for much in few bytes, beside one that asks for little: nothing is lost, and each
has its turn."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from protocol import bhs
from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import SocketInitiator

NOPS = 12_000
TINY = {"MaxRecvDataSegmentLength": "512"}
READ = 8 << 20


@pytest.fixture(scope="module")
def disk(shared_daemon: Daemon) -> Disk:
    return shared_daemon.create_disk("turns", "16MB")


@pytest.fixture
def abuser(shared_daemon: Daemon, disk: Disk) -> Iterator[SocketInitiator]:
    peer = SocketInitiator((HOST, shared_daemon.portal_port), timeout_s=60)
    with peer:
        peer.login(disk.iqn, "iqn.2026-11.example:abuser", keys=TINY)
        peer.command(bytes(6))
        yield peer


@pytest.fixture
def other(shared_daemon: Daemon, disk: Disk) -> Iterator[SocketInitiator]:
    with SocketInitiator((HOST, shared_daemon.portal_port), timeout_s=60) as peer:
        peer.login(disk.iqn, "iqn.2026-11.example:other")
        peer.command(bytes(6))
        yield peer


def test_every_nop_of_a_flood_is_answered_in_order_and_another_is_served_meanwhile(
    abuser: SocketInitiator, other: SocketInitiator
) -> None:
    """12,000 in one go are more than one receives, and hundreds of turns. The READs of the other one begin
    when the flood has, and are over before it is."""
    nops = [abuser.initiator.nop_out(b"", immediate=True, initiator_task_tag=tag) for tag in range(NOPS)]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(abuser.send, b"".join(nops))
        answered = [abuser.receive().expect(bhs.NopIn).initiator_task_tag]
        for _ in range(20):
            assert other.command(cdbs.read10(0, 8), read=4096).good
        abuser.socket.settimeout(60)
        answered += [abuser.receive().expect(bhs.NopIn).initiator_task_tag for _ in range(NOPS - 1)]
        sending.result()
    assert answered == list(range(NOPS))
    assert abuser.command(bytes(6)).good


def test_a_read_in_tiny_segments_is_whole_and_another_is_served_meanwhile(
    abuser: SocketInitiator, other: SocketInitiator
) -> None:
    data = b"".join(n.to_bytes(4, "big") for n in range(READ // 4))
    for at in range(0, READ, 1 << 20):
        assert other.command(cdbs.write10(at // 512, 2048), data[at : at + (1 << 20)]).good
    task = abuser.send_command(cdbs.read16(0, READ // 512), read=READ)
    behind = abuser.send_command(cdbs.read10(0, 1), read=512)
    for _ in range(20):
        assert other.command(cdbs.read10(0, 8), read=4096).good
    assert abuser.wait(task).data == data
    assert abuser.wait(behind).data == data[:512]


def test_an_abuser_that_goes_in_the_midst_of_its_turns_takes_nothing_with_it(
    shared_daemon: Daemon, abuser: SocketInitiator, other: SocketInitiator
) -> None:
    for _ in range(4):
        abuser.send_command(cdbs.read16(0, READ // 512), read=READ)
    abuser.send(abuser.initiator.nop_out(b"x", immediate=True) * 2000)
    assert other.command(cdbs.read10(0, 8), read=4096).good
    abuser.socket.close()
    for _ in range(20):
        assert other.command(cdbs.read10(0, 8), read=4096).good
    assert not shared_daemon.tracebacks()
