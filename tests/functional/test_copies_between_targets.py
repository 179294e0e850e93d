"""Third-party copies between LUNs of two targets: hosts with one LUN a target (VMware, CSI).

Who may not use a LUN by itself may not have it copied either, whatever it says of itself: most of the tests
are of that.
"""

from collections.abc import Iterator

import pytest

from tests.daemon import HOST, Daemon, Disk, free_ports
from tests.functional.sessions import (
    BLOCK,
    populate_token,
    receive_token,
    unit_name,
    write_using_token,
)
from tests.functional.test_vmware import xcopy
from tests.initiator import Reply, SessionState, SocketInitiator

GOOD = 0
UNREACHABLE = (0xA, (0x08, 0x04))
TOKEN_UNKNOWN = (0x5, (0x23, 0x04))
NAME = "iqn.2016-04.com.example:esx"
OTHER = "iqn.2016-04.com.example:other"
DATA = bytes(range(256)) * (8 * BLOCK // 256)
FIRST, SECOND, THIRD = ("alice", "alice-secret-1"), ("bob", "bob-secret-12345"), ("alice", "alice-secret-2")
TAGS = {71: FIRST, 72: SECOND, 73: THIRD}
ELSEWHERE = "127.0.0.2"
"""Another address from which an initiator may come."""


def log_in(
    daemon: Daemon,
    iqn: str,
    name: str = NAME,
    chap: tuple[str, str] | None = None,
    *,
    source: str | None = None,
    port: int = 0,
) -> SocketInitiator:
    address = (HOST, port or daemon.portal_port)
    made = SocketInitiator(address, session=SessionState(), timeout_s=120, source=source)
    made.login(iqn, initiator_name=name, chap=chap)
    while made.command(bytes(6)).sense_key == 6:
        pass
    return made


BESIDE = ("portal", "authorizedinitiator", "authcredential")


def ids(daemon: Daemon, resource: str) -> set[int]:
    return {each["id"] for each in daemon.expect(200, "GET", f"services/iscsi/{resource}/?limit=0")}


@pytest.fixture
def pair(shared_daemon: Daemon) -> Iterator[tuple[Daemon, Disk, Disk]]:
    """Two disks in two targets, open to everybody; what a test makes beside them goes with them."""
    before = {resource: ids(shared_daemon, resource) for resource in BESIDE}
    one, two = (shared_daemon.create_disk(f"tpc{n}", "1MB") for n in (1, 2))
    yield shared_daemon, one, two
    shared_daemon.delete_disk(one)
    shared_daemon.delete_disk(two)
    for resource in BESIDE:
        for id in ids(shared_daemon, resource) - before[resource]:
            shared_daemon.delete(resource, id)


@pytest.fixture
def users(pair: tuple[Daemon, Disk, Disk]) -> None:
    """Those of ``TAGS``."""
    daemon, _, _ = pair
    for tag, (user, secret) in TAGS.items():
        daemon.create(
            "authcredential",
            iscsi_target_auth_tag=tag,
            iscsi_target_auth_user=user,
            iscsi_target_auth_secret=secret,
        )


def name_of(daemon: Daemon, disk: Disk) -> bytes:
    """The NAA as VPD page 83h has it."""
    with log_in(daemon, disk.iqn, "iqn.2016-04.com.example:admin") as session:
        return unit_name(session)


def grant(daemon: Daemon, disk: Disk, **fields: object) -> None:
    """Who may log in to the disk's target, from now on: the fields of its one target group."""
    groups = daemon.expect(200, "GET", "services/iscsi/targetgroup/?limit=0")
    (id,) = (each["id"] for each in groups if each["iscsi_target"] == disk.target_id)
    values = {f"iscsi_target_{key}": value for key, value in fields.items()}
    daemon.expect(202, "PUT", f"services/iscsi/targetgroup/{id}/", values)


def insecure(daemon: Daemon, disk: Disk, allowed: bool) -> None:
    fields = {"iscsi_target_extent_insecure_tpc": allowed}
    daemon.expect(202, "PUT", f"services/iscsi/extent/{disk.extent_id}/", fields)


def fill(session: SocketInitiator) -> None:
    assert session.command(bytes.fromhex("2a00000000000000 08 00"), DATA).good


def content(session: SocketInitiator) -> bytes:
    return bytes(session.command(bytes.fromhex("2800000000000000 08 00"), read=8 * BLOCK).data)


def copy(session: SocketInitiator, source: bytes, destination: bytes) -> Reply:
    return session.command(*xcopy(source, destination, [(0, 0, 8)]))


def sense(reply: Reply) -> tuple[int | None, tuple[int, int] | None]:
    return reply.sense_key, reply.additional_sense


@pytest.mark.parametrize("sessions", ["both", "one"])
@pytest.mark.parametrize("sent_to", [0, 1])
def test_a_copy_between_targets_that_are_open_to_the_initiator(
    pair: tuple[Daemon, Disk, Disk], sessions: str, sent_to: int
) -> None:
    """With a session there, or because it would be let in."""
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    with log_in(daemon, one.iqn, OTHER) as writer:
        fill(writer)
    asked = (one, two)[sent_to]
    others = [log_in(daemon, (two, one)[sent_to].iqn)] if sessions == "both" else []
    with log_in(daemon, asked.iqn) as session:
        assert copy(session, *names).status == GOOD
    for other in others:
        other.close()
    with log_in(daemon, two.iqn, OTHER) as reader:
        assert content(reader) == DATA


def test_a_token_is_used_on_another_target(pair: tuple[Daemon, Disk, Disk]) -> None:
    daemon, one, two = pair
    with log_in(daemon, one.iqn) as source, log_in(daemon, two.iqn) as destination:
        fill(source)
        assert source.command(*populate_token([(0, 8)])).good
        token = receive_token(source)
        assert destination.command(*write_using_token(token, [(0, 8)])).good
        assert content(destination) == DATA
        insecure(daemon, one, False)
        assert sense(destination.command(*write_using_token(token, [(0, 8)]))) == TOKEN_UNKNOWN


@pytest.mark.parametrize("refusing", [0, 1])
def test_an_extent_can_be_kept_to_its_own_target(pair: tuple[Daemon, Disk, Disk], refusing: int) -> None:
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    insecure(daemon, (one, two)[refusing], False)
    with log_in(daemon, one.iqn) as session, log_in(daemon, two.iqn) as other:
        for asked in (session, other):
            asked.command(bytes(6))  # INQUIRY DATA is as it was
            assert sense(copy(asked, *names)) == UNREACHABLE
        assert copy(session, names[0], names[0]).status == GOOD, "within a target it makes no difference"
        insecure(daemon, (one, two)[refusing], True)
        assert copy(session, *names).status == GOOD


def both_refused(session: SocketInitiator, names: tuple[bytes, bytes]) -> bool:
    """Neither read from the other target's nor written to."""
    return all(sense(copy(session, *pair)) == UNREACHABLE for pair in (names, names[::-1]))


def test_who_would_not_be_let_in_reaches_nothing_there(pair: tuple[Daemon, Disk, Disk]) -> None:
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    with log_in(daemon, two.iqn, OTHER) as member:
        fill(member)
        assert member.command(*populate_token([(0, 8)])).good
        token = receive_token(member)
    group = daemon.create("authorizedinitiator", iscsi_target_initiator_initiators=OTHER)
    grant(daemon, two, initiatorgroup=group["id"])
    with log_in(daemon, one.iqn) as stranger, log_in(daemon, one.iqn, OTHER) as member:
        assert both_refused(stranger, names)
        assert sense(stranger.command(*write_using_token(token, [(0, 8)]))) == TOKEN_UNKNOWN
        assert content(stranger) == bytes(len(DATA))
        assert copy(member, *names[::-1]).status == GOOD
        assert content(member) == DATA


def test_a_name_alone_does_not_open_another_target(pair: tuple[Daemon, Disk, Disk]) -> None:
    """The other target is for a network; somebody from elsewhere bears the name of who is logged in there."""
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    group = daemon.create(
        "authorizedinitiator",
        iscsi_target_initiator_initiators=NAME,
        iscsi_target_initiator_auth_network=f"{ELSEWHERE}/32",
    )
    grant(daemon, two, initiatorgroup=group["id"])
    with log_in(daemon, one.iqn) as impostor, log_in(daemon, two.iqn, source=ELSEWHERE) as there:
        assert both_refused(impostor, names)
        fill(there)
        assert there.command(*populate_token([(0, 8)])).good
        taken = write_using_token(receive_token(there), [(0, 8)])
        assert sense(impostor.command(*taken)) == TOKEN_UNKNOWN
        with log_in(daemon, one.iqn, source=ELSEWHERE) as itself:
            assert itself.command(*taken).good
            assert copy(itself, *names).status == GOOD


def test_a_portal_that_it_has_not_come_through_lets_nobody_in(pair: tuple[Daemon, Disk, Disk]) -> None:
    """Tenants are kept apart by the networks of their portals, which nobody can see from here."""
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    (port,) = free_ports(1)
    portal = daemon.create("portal", iscsi_target_portal_ips=[f"{HOST}:{port}"])
    grant(daemon, two, portalgroup=portal["id"])
    with log_in(daemon, one.iqn) as session:
        assert both_refused(session, names)
        with log_in(daemon, two.iqn, source=ELSEWHERE, port=port):
            assert both_refused(session, names), "another host of the same name"
        with log_in(daemon, two.iqn, port=port):
            assert copy(session, *names).status == GOOD, "it has shown that it can"
        assert both_refused(session, names)


def test_the_same_proof_opens_both_and_a_name_alone_does_not(
    pair: tuple[Daemon, Disk, Disk], users: None
) -> None:
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    grant(daemon, two, authtype="CHAP", authgroup=71)
    with log_in(daemon, one.iqn) as nobody:
        assert both_refused(nobody, names)
        with log_in(daemon, two.iqn, chap=FIRST):
            assert both_refused(nobody, names), "it bears the same name, and no more"
    grant(daemon, one, authtype="CHAP", authgroup=71)
    with log_in(daemon, one.iqn, chap=FIRST) as proven:
        assert copy(proven, *names).status == GOOD
        with log_in(daemon, two.iqn, chap=FIRST, source=ELSEWHERE):
            assert copy(proven, *names).status == GOOD


@pytest.mark.parametrize("tag", [72, 73])
def test_another_users_lun_is_not_reached(pair: tuple[Daemon, Disk, Disk], users: None, tag: int) -> None:
    """Nor that of one who happens to be called the same and has another secret."""
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    grant(daemon, one, authtype="CHAP", authgroup=71)
    grant(daemon, two, authtype="CHAP", authgroup=tag)
    with log_in(daemon, one.iqn, chap=FIRST) as proven:
        assert both_refused(proven, names)
        with log_in(daemon, two.iqn, chap=TAGS[tag]):
            assert both_refused(proven, names), "the name is the same, the user is another"


def test_reservations_and_write_protection_hold_there(pair: tuple[Daemon, Disk, Disk]) -> None:
    daemon, one, two = pair
    names = name_of(daemon, one), name_of(daemon, two)
    with log_in(daemon, one.iqn) as session, log_in(daemon, two.iqn, OTHER) as holder:
        assert holder.command(bytes((0x16, 0, 0, 0, 0, 0))).good
        assert copy(session, *names).status == 0x18
        assert holder.command(bytes((0x17, 0, 0, 0, 0, 0))).good
        assert copy(session, *names).status == GOOD
        with log_in(daemon, two.iqn) as there:
            assert there.command(bytes((0x16, 0, 0, 0, 0, 0))).good
            assert copy(session, *names).status == GOOD, "it is the initiator's own reservation"
