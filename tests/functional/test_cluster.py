"""What the validation of a failover cluster does to a disk with persistent reservations (SPC-4 §5.13).

Two nodes register, one reserves, the other takes over while the first is still writing; paths are lost and
come back; the power of the storage fails. At every step it is looked at who can still write.
"""

from collections.abc import Callable

import pytest

from tests import cdbs
from tests.daemon import Daemon, Disk
from tests.functional.sessions import (
    BLOCK,
    GOOD,
    RESERVATION_CONFLICT,
    attention,
    log_in,
    write,
)
from tests.initiator import Reply, SocketInitiator

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_AND_IGNORE = range(7)
KEYS, RESERVATION = 0, 1
WRITE_EXCLUSIVE_REGISTRANTS_ONLY, EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 5, 8
KEY_1, KEY_2 = 0x1111, 0x2222
ISID_1, ISID_2 = b"\x80\x00\x00\x01\x00\x00", b"\x80\x00\x00\x02\x00\x00"
REGISTRATIONS_PREEMPTED = (0x2A, 0x05)


def out(
    initiator: SocketInitiator,
    action: int,
    key: int = 0,
    new_key: int = 0,
    kind: int = 0,
    aptpl: bool = False,
) -> Reply:
    """PERSISTENT RESERVE OUT."""
    data = cdbs.persistent_reserve_parameters(key, new_key, aptpl=aptpl)
    return initiator.command(cdbs.persistent_reserve_out(action, kind), data)


def keys(initiator: SocketInitiator) -> list[int]:
    data = initiator.command(cdbs.persistent_reserve_in(KEYS, 1024), read=1024).data
    return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]


def held(initiator: SocketInitiator) -> tuple[int, int] | None:
    """Key and type of the reservation; None: there is none."""
    data = initiator.command(cdbs.persistent_reserve_in(RESERVATION, 64), read=64).data
    return (int.from_bytes(data[8:16], "big"), data[21] & 0x0F) if len(data) > 8 else None


def can_write(initiator: SocketInitiator) -> bool:
    status = write(initiator, 0, bytes(BLOCK)).status
    assert status in (GOOD, RESERVATION_CONFLICT)
    return status == GOOD


def can_read(initiator: SocketInitiator) -> bool:
    status = initiator.command(cdbs.read10(0, 1), read=BLOCK).status
    assert status in (GOOD, RESERVATION_CONFLICT)
    return status == GOOD


def node(daemon: Daemon, disk: Disk, number: int) -> SocketInitiator:
    """A node's only path: the same I_T nexus each time."""
    return log_in(daemon, disk.iqn, f"node{number}", isid=(ISID_1, ISID_2)[number - 1])


RESTARTS: dict[str, Callable[[Daemon], object]] = {
    "SIGTERM": lambda daemon: daemon.restart(),
    "kill -9": lambda daemon: (daemon.kill9(), daemon.start()),
}


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("kind", [WRITE_EXCLUSIVE_REGISTRANTS_ONLY, EXCLUSIVE_ACCESS_ALL_REGISTRANTS])
def test_validation_of_a_failover_cluster(daemon: Daemon, kind: int, restart: str) -> None:
    disk = daemon.create_disk("quorum", "8MB")
    one, two = node(daemon, disk, 1), node(daemon, disk, 2)
    shared = kind == EXCLUSIVE_ACCESS_ALL_REGISTRANTS
    holder_1, holder_2 = (0, kind) if shared else (KEY_1, kind), (0, kind) if shared else (KEY_2, kind)

    # both register; node 1 arbitrates and wins, node 2 may still write as a registrant
    for initiator, key in ((one, KEY_1), (two, KEY_2)):
        assert out(initiator, REGISTER_AND_IGNORE, new_key=key, aptpl=True).good
    assert keys(one) == [KEY_1, KEY_2]
    assert out(one, RESERVE, KEY_1, kind=kind).good
    assert out(one, RESERVE, KEY_1, kind=kind).good, "the same again is no error (SPC-4 §5.13.9)"
    other = EXCLUSIVE_ACCESS_ALL_REGISTRANTS + WRITE_EXCLUSIVE_REGISTRANTS_ONLY - kind
    assert out(two, RESERVE, KEY_2, kind=other).status == RESERVATION_CONFLICT
    assert held(two) == holder_1
    assert can_write(one) and can_write(two)

    # whoever is not registered is fenced off
    with log_in(daemon, disk.iqn, "stranger") as stranger:
        assert not can_write(stranger)
        assert can_read(stranger) == (not shared)
        assert out(stranger, RESERVE, 0x9999, kind=kind).status == RESERVATION_CONFLICT
        assert out(stranger, CLEAR, 0x9999).status == RESERVATION_CONFLICT
        assert not stranger.command(cdbs.reserve6()).good

    # a path is lost and comes back: registration and reservation are the nexus's, not the session's
    one.close()
    assert held(two) == holder_1
    one = node(daemon, disk, 1)
    assert can_write(one)

    # node 2 takes over, while node 1 is writing
    writes = [one.send_command(cdbs.write10(lba, 1), bytes(BLOCK)) for lba in range(8)]
    assert out(two, PREEMPT_AND_ABORT, KEY_2, KEY_1, kind).good
    for task in writes:
        reply = one.wait(task)
        assert (
            reply.status in (GOOD, RESERVATION_CONFLICT) or reply.additional_sense == REGISTRATIONS_PREEMPTED
        )
        if reply.additional_sense == REGISTRATIONS_PREEMPTED:
            break
    else:
        assert attention(one) == REGISTRATIONS_PREEMPTED
    one.close()
    one = node(daemon, disk, 1)
    assert not can_write(one)
    assert keys(two) == [KEY_2]
    assert held(two) == holder_2
    assert attention(two) is None, "it was its own act"

    # the power of the storage fails: APTPL
    one.close(), two.close()
    RESTARTS[restart](daemon)
    with log_in(daemon, disk.iqn, "stranger") as stranger:
        assert not can_write(stranger), "fenced from the first command on"
    one, two = node(daemon, disk, 1), node(daemon, disk, 2)
    assert keys(two) == [KEY_2]
    assert held(two) == holder_2
    assert can_write(two)
    assert not can_write(one)

    # node 1 joins again; node 2 hands over in order
    assert out(one, REGISTER, 0, KEY_1).good
    assert can_write(one)
    assert out(two, RELEASE, KEY_2, kind=kind).good
    assert attention(one) == (0x2A, 0x04)  # RESERVATIONS RELEASED: to registrants
    assert held(one) is None
    assert out(one, RESERVE, KEY_1, kind=kind).good
    assert out(one, CLEAR, KEY_1).good
    assert attention(two) == (0x2A, 0x03)  # RESERVATIONS PREEMPTED
    assert keys(two) == []
    with log_in(daemon, disk.iqn, "stranger") as stranger:
        assert can_write(stranger)
    one.close(), two.close()


def test_without_aptpl_a_restart_forgets(daemon: Daemon) -> None:
    """SPC-4 §5.13.5; and the last REGISTER decides whether there is APTPL."""
    disk = daemon.create_disk("quorum", "8MB")
    with node(daemon, disk, 1) as one:
        assert out(one, REGISTER, 0, KEY_1, aptpl=True).good
        assert out(one, RESERVE, KEY_1, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY).good
        assert out(one, REGISTER, KEY_1, KEY_2, aptpl=False).good
    daemon.kill9()
    daemon.start()
    with node(daemon, disk, 2) as two:
        assert keys(two) == []
        assert held(two) is None
        assert can_write(two)
