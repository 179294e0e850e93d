"""COMPARE AND WRITE decides between initiators: the lock on disk of clusters (SBC-3 §5.3)."""

import threading
from collections.abc import Callable

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.functional.sessions import BLOCK, GOOD, log_in, read
from tests.initiator import SocketInitiator

ROUNDS = 1000
LBA = 77
MISCOMPARE = (0x1D, 0x00)


def owner(number: int) -> bytes:
    """The block as the winner of round ``number`` finds it."""
    return number.to_bytes(8, "big") * (BLOCK // 8)


def challenge(number: int) -> tuple[bytes, bytes]:
    """CDB and data with which to win that round."""
    return cdbs.compare_and_write(LBA, 1), owner(number) + owner(number + 1)


def in_step(initiator: SocketInitiator, gate: threading.Barrier) -> list[bool]:
    """One command a round, begun by both at once."""
    won = []
    for number in range(ROUNDS):
        gate.wait(30)
        reply = initiator.command(*challenge(number))
        won.append(reply.status == GOOD)
        assert won[-1] or reply.additional_sense == MISCOMPARE
        gate.wait(30)
    return won


def headlong(initiator: SocketInitiator, gate: threading.Barrier) -> list[bool]:
    """All of them, as many at once as the command window lets."""
    gate.wait(30)
    tasks = [initiator.send_command(*challenge(number)) for number in range(ROUNDS)]
    replies = [initiator.wait(task) for task in tasks]
    assert all(r.status == GOOD or r.additional_sense == MISCOMPARE for r in replies)
    return [reply.status == GOOD for reply in replies]


def second_target(daemon: Daemon, disk: Disk, **fields: object) -> str:
    """Another target that shows the same extent; its name."""
    target = daemon.create(
        "target",
        iscsi_target_name=f"again{disk.target_id}",
        iscsi_target_portalgroup=1,
        iscsi_target_initiatorgroup=1,
        iscsi_target_authtype="None",
        **fields,
    )
    daemon.create("targettoextent", iscsi_target=target["id"], iscsi_extent=disk.extent_id, iscsi_lunid=0)
    return daemon.full_name(target["iscsi_target_name"])


@pytest.mark.parametrize("compete", [in_step, headlong])
@pytest.mark.parametrize("paths", ["one target", "two targets", "two units"])
def test_each_round_has_exactly_one_winner(
    shared_daemon: Daemon,
    paths: str,
    compete: Callable[[SocketInitiator, threading.Barrier], list[bool]],
) -> None:
    """Through one target, through two that show the extent alike, through two that show it differently."""
    disk = shared_daemon.create_disk(
        f"lock-{paths.replace(' ', '-')}-{compete.__name__.replace('_', '-')}", "1MB"
    )
    other = disk.iqn
    if paths != "one target":
        differently = {"iscsi_target_serial": f"other{disk.target_id}"} if paths == "two units" else {}
        other = second_target(shared_daemon, disk, **differently)
    gate = threading.Barrier(2)
    results: dict[str, list[bool]] = {}
    with log_in(shared_daemon, disk.iqn, "one") as one, log_in(shared_daemon, other, "two") as two:

        def run(name: str, initiator: SocketInitiator) -> None:
            try:
                results[name] = compete(initiator, gate)
            finally:
                if name not in results:
                    gate.abort()

        threads = [threading.Thread(target=run, args=item) for item in (("one", one), ("two", two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert set(results) == {"one", "two"}, "an initiator failed"
        winners = [a + b for a, b in zip(results["one"], results["two"], strict=True)]
        assert winners == [1] * ROUNDS
        assert read(two, LBA, 1) == owner(ROUNDS)
