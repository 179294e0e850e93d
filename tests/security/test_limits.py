"""What the network may take: connections, logins under way, descriptors, time and memory.

Bounds that hang on the clock or on bytes are shown on the target in memory; those of sockets and
descriptors on the real daemon, with peers of several loopback addresses.
"""

import logging
import re
import resource
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from protocol import bhs
from protocol.enums import LoginStatus
from protocol.events import EndReason
from protocol.limits import MAX_DISCOVERY_OF_ONE, LoginLimits
from targetd.net.admission import LOG_EVERY_S, Admission, ConnectionLimiter, Limits, neighbourhood
from tests.daemon import HOST, Daemon
from tests.initiator import LoginFailed, MemoryPeer, SocketInitiator
from tests.protocol.target import TARGET, MemoryTarget, connection_of

LIMITS = Limits(connections=6, connections_per_address=4, half_open=4, half_open_per_address=2)


# -- Who is let in ------------------------------------------------------------------------------------


def test_half_open_logins_of_one_address_are_bounded_and_others_come_in() -> None:
    door = ConnectionLimiter(LIMITS)
    assert [door.enter("192.0.2.1", 0.0) is not None for _ in range(3)] == [True, True, False]
    assert door.enter("192.0.2.2", 0.0) is not None


def test_half_open_logins_are_bounded_in_all() -> None:
    door = ConnectionLimiter(LIMITS)
    came = [door.enter(f"192.0.2.{host}", 0.0) is not None for host in range(5)]
    assert came == [True, True, True, True, False]


def test_connections_of_one_address_and_in_all_are_bounded() -> None:
    door = ConnectionLimiter(LIMITS)
    visitors = []
    for address in ("192.0.2.1",) * 5 + ("192.0.2.2",) * 3:
        visitor = door.enter(address, 0.0)
        if visitor is not None:
            door.logged_in(visitor)
            visitors.append(visitor)
    assert [visitor.address for visitor in visitors] == ["192.0.2.1"] * 4 + ["192.0.2.2"] * 2
    assert sum(door.refused.values()) == 2


def test_who_leaves_makes_room_and_nothing_is_kept_of_him() -> None:
    door = ConnectionLimiter(LIMITS)
    for host in range(2000):
        visitor = door.enter(f"198.51.{host // 256}.{host % 256}", 0.0)
        assert visitor is not None
        if host % 2:
            door.logged_in(visitor)
        door.leave(visitor)
    assert (door.connections, door.half_open) == (0, 0)
    assert not door._by_address and not door._half_open and not door._spare


def test_v6_addresses_count_by_network() -> None:
    """One host has a whole /64 (RFC 4291 §2.5.4)."""
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:1%eth0")
    assert neighbourhood("2001:db8::1") != neighbourhood("2001:db8:0:1::1")


def test_refusals_are_told_with_a_reason_and_not_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    door = ConnectionLimiter(LIMITS)
    with caplog.at_level(logging.WARNING, "targetd.limits"):
        for _ in range(1000):
            door.enter("192.0.2.1", 0.0)
        door.enter("192.0.2.1", LOG_EVERY_S)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "192.0.2.1 is not let in: 2 logins of one address are under way"
    assert second.endswith("(997 before it)")


def test_limits_leave_descriptors_for_media_and_api() -> None:
    for descriptors in (16, 256, 1024, 1 << 20):
        limits = Limits().within(descriptors)
        assert 0 < limits.connections < descriptors
        assert limits.connections <= Limits().connections
        assert limits.half_open_per_address <= limits.half_open <= limits.connections


def test_a_login_that_takes_too_long_makes_room() -> None:
    """The oldest of the same address, or of the one that has the most; never before ``PATIENCE_S``."""
    door = ConnectionLimiter(LIMITS)
    put_out = []

    def enter(address: str, now: float) -> Admission | None:
        visitor = door.enter(address, now)
        if visitor is not None:

            def evict() -> None:
                put_out.append((visitor.address, visitor.since))
                door.leave(visitor)

            visitor.evict = evict
        return visitor

    assert [enter("192.0.2.1", now) is not None for now in (0.0, 0.1, 1.9)] == [True, True, False]
    assert enter("192.0.2.1", 2.0) is not None
    assert put_out == [("192.0.2.1", 0.0)]
    assert enter("192.0.2.2", 2.0) is not None and enter("192.0.2.3", 2.0) is not None
    assert enter("192.0.2.4", 3.0) is not None, "four are under way, and one of them for long"
    assert put_out[1:] == [("192.0.2.1", 0.1)]
    assert enter("192.0.2.5", 3.0) is None


def test_a_discovery_session_makes_room_and_a_session_with_a_target_does_not() -> None:
    door = ConnectionLimiter(LIMITS)
    put_out = []
    for number in range(4):
        visitor = door.enter("192.0.2.1", 0.0)
        assert visitor is not None
        door.logged_in(visitor)
        if number == 2:
            door.is_spare(visitor)
        visitor.evict = lambda visitor=visitor: (put_out.append(visitor), door.leave(visitor))  # type: ignore
    assert door.enter("192.0.2.1", 10.0) is not None
    assert len(put_out) == 1
    door.limits = Limits(connections=4, connections_per_address=4, half_open=0, half_open_per_address=0)
    assert door.enter("192.0.2.2", 10.0) is None


def test_discovery_sessions_are_bounded_and_the_oldest_of_who_has_most_makes_room() -> None:
    target = MemoryTarget()
    target.sessions.max_discovery_sessions = 4
    peers = {}
    for name, origin in (("a", "x"), ("b", "y"), ("c", "y"), ("d", "x"), ("e", "x"), ("f", "z")):
        peers[name] = target.connect()
        connection_of(peers[name]).origin = origin
        peers[name].login()
    ended = [name for name, peer in peers.items() if connection_of(peer).closing]
    assert ended == ["a", "b"] or ended == ["a", "d"]
    assert target.sessions.discovery_count() == 4
    closing = connection_of(peers["a"]).closing
    assert closing is not None and closing.reason is EndReason.MADE_ROOM
    assert target.logged_in().command(bytes(6)).good


def test_one_origin_has_a_share_of_discovery_sessions() -> None:
    target = MemoryTarget()
    for _ in range(MAX_DISCOVERY_OF_ONE + 3):
        target.connect().login()
    assert target.sessions.discovery_count() == MAX_DISCOVERY_OF_ONE


@pytest.mark.parametrize("holder", ["address", "initiator"])
def test_one_address_or_initiator_has_three_quarters_of_all_sessions(holder: str) -> None:
    """The refusal says which limit that is, how many there are, and what to do."""
    target = MemoryTarget()
    target.sessions.max_sessions = 8

    def log_in(number: int, who: str) -> MemoryPeer:
        peer = target.connect()
        connection_of(peer).origin = who if holder == "address" else f"address {number}"
        peer.login(TARGET, f"iqn.2026-11.example:{number if holder == 'address' else who}")
        return peer

    one = [log_in(number, "greedy") for number in range(6)]
    with pytest.raises(LoginFailed) as failed:
        log_in(6, "greedy")
    answer = failed.value.response
    assert answer.status_class << 8 | answer.status_detail == LoginStatus.OUT_OF_RESOURCES
    log_in(7, "other"), log_in(8, "other")
    with pytest.raises(LoginFailed):
        log_in(9, "other")
    one[0].logout()
    log_in(10, "greedy")
    assert sum(target.sessions.counts.values()) == 2 * target.sessions.normal_count()


# -- Sockets and descriptors --------------------------------------------------------------------------


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(daemon: Daemon, source: str) -> socket.socket:
    return socket.create_connection((HOST, daemon.portal_port), timeout=10, source_address=(source, 0))


@pytest.mark.usefixtures("many_descriptors")
def test_thousand_half_open_logins_leave_sessions_and_other_hosts_alone(daemon: Daemon) -> None:
    """From three hosts as many as may be and more: what is too much is closed, or takes the place of an
    older one; the session that is there is served while they come, another host logs in."""
    disk = daemon.create_disk("one")
    bound = Limits().half_open_per_address
    with ExitStack() as stack:
        peer = stack.enter_context(SocketInitiator((HOST, daemon.portal_port)))
        peer.login(disk.iqn)
        peer.command(bytes(6))
        write = bytes.fromhex("2a000000000000000100")
        for number in range(1000):
            sock = stack.enter_context(connect(daemon, f"127.0.0.{2 + number % 3}"))
            sock.sendall(b"\x43")
            if not number % 20:
                assert peer.command(write, number.to_bytes(4, "big") * 128).good
        other = SocketInitiator((HOST, daemon.portal_port), source="127.0.0.9")
        with stack.enter_context(other):
            other.login(disk.iqn)
            other.command(bytes(6))
            read = other.command(bytes.fromhex("28000000000000000100"), read=512)
            assert read.data == (980).to_bytes(4, "big") * 128
        # It came last, so all that came before it have been met.
        metrics = daemon.api("GET", "/metrics").text
        gone = re.findall(
            r'iscsi_portal_drops_total\{.*reason="(?:turned_away|made_room)".*\} (\S+)', metrics
        )
        assert sum(map(float, gone)) >= 1000 - 3 * bound
        failures = daemon.expect(200, "GET", "services/iscsi/loginfailure/?limit=0")
        reasons = (f"{bound} logins of one address are under way", "made room for another connection")
        assert any(each["reason"].startswith(reasons) for each in failures)
        assert len([line for line in daemon.lines if "is not let in" in line]) < 10


def test_listener_outlives_the_end_of_descriptors(daemon: Daemon) -> None:
    """Descriptors run out below the limits: the portal rests, the session is served, and when there are
    descriptors again new initiators come in."""
    disk = daemon.create_disk("one")
    assert daemon.process is not None
    with SocketInitiator((HOST, daemon.portal_port)) as peer:
        peer.login(disk.iqn)
        peer.command(bytes(6))
        pid = daemon.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (24, before[1]))
        with ExitStack() as stack:
            for _ in range(32):
                stack.enter_context(connect(daemon, "127.0.0.2"))
            daemon.wait_for_line("accepts nothing for a second")
            assert peer.command(bytes(6)).good
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        with SocketInitiator((HOST, daemon.portal_port), source="127.0.0.3") as other:
            other.login(disk.iqn)
            other.command(bytes(6))
            assert other.command(bytes(6)).good
        assert peer.command(bytes(6)).good


# -- Time ---------------------------------------------------------------------------------------------


def login_bytes(peer: MemoryPeer) -> bytes:
    keys = {"InitiatorName": "iqn.2026-11.example:host", "TargetName": TARGET, "SessionType": "Normal"}
    return peer.initiator.login_request(keys, transit=False)


WHOLE = len(login_bytes(MemoryTarget().connect()))


@pytest.mark.parametrize("dripping", [False, True], ids=["silent", "dripping"])
def test_login_that_stops_at_any_byte_ends_at_its_time_limit(dripping: bool) -> None:
    """Slow loris, at every byte of the first Login Request and right behind it; bytes that come one by one
    buy no time."""
    target = MemoryTarget()
    for stop in range(WHOLE + 1):
        peer = target.connect()
        data = login_bytes(peer)
        connection = connection_of(peer)
        if dripping:
            for at in range(stop):
                peer.send(data[at : at + 1])
        elif stop:
            peer.send(data[:stop])
        connection.tick(target.now + LoginLimits().seconds - 0.1)
        assert not connection.closing, stop
        connection.tick(target.now + LoginLimits().seconds + 0.1)
        assert "no login within" in connection.closing, stop


def test_peer_that_stops_inside_a_pdu_after_login_is_dropped() -> None:
    """At every byte of a command's header and immediate data (iscsi_iotimeout)."""
    target = MemoryTarget()
    for stop in range(1, 48 + 512, 13):
        peer = target.logged_in()
        peer.send(peer.initiator.scsi_command(bytes(10), bytes(512), write=True, expected=512)[:stop])
        target.pass_time(31)
        assert "stalled inside a PDU" in connection_of(peer).closing
        assert not target.sessions.sessions


# -- Memory -------------------------------------------------------------------------------------------


def kept_of(work: "list[bytes]", peer: MemoryPeer) -> int:
    """The most bytes the process held more than before while ``work`` was delivered."""
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        for data in work:
            peer.send(data)
            peer.target.data_to_send()
        return tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()


def test_login_that_never_ends_keeps_no_more_than_its_limit() -> None:
    """Pieces with C=1 of 8 KiB: LoginLimits.bytes, then the end."""
    peer = MemoryTarget().connect()
    piece = peer.initiator.login_request(b"X" * 8192, transit=False, more=True, initiator_task_tag=1)
    assert kept_of([piece] * 200, peer) < 4 * LoginLimits().bytes
    assert connection_of(peer).closing


def test_text_that_never_ends_keeps_no_more_than_its_limit() -> None:
    peer = MemoryTarget().logged_in(strict=False)
    initiator = peer.initiator
    work = [
        initiator.text_request(
            b"X" * 8192, final=False, more=True, immediate=True, initiator_task_tag=7,
            transfer_tag=0xFFFFFFFF if number == 0 else 1,
        )
        for number in range(400)
    ]  # fmt: skip
    assert kept_of(work, peer) < 2 << 20


def test_commands_ahead_of_their_turn_keep_no_more_than_the_window() -> None:
    """Every CmdSN of the window and far beyond it but the first, each with 64 KiB of immediate data, over
    and over: a queue depth of 8 may hold 8 of them."""
    target = MemoryTarget()
    peer = target.logged_in()
    first = peer.session.cmd_sn
    data = bytes(65536)
    work = [
        peer.initiator.scsi_command(
            bytes.fromhex("2a000000000000008000"), data, write=True, expected=len(data), cmd_sn=first + ahead,
            initiator_task_tag=1000 + ahead,
        )
        for _ in range(4)
        for ahead in range(1, 100)
    ]  # fmt: skip
    # The peer's own copy of what it delivers counts as well.
    assert kept_of(work, peer) < (8 + 4) * len(data)
    assert not connection_of(peer).closing


def test_aborted_writes_and_tags_of_nobody_keep_nothing() -> None:
    """Writes begun and aborted, Data-Out for tags that never were: nothing grows."""
    target = MemoryTarget()
    peer = target.logged_in(strict=False)
    initiator = peer.initiator

    def round_(count: int) -> list[bytes]:
        work = []
        for number in range(count):
            work.append(
                initiator.scsi_command(
                    bytes.fromhex("2a000000000000008000"),
                    write=True,
                    expected=65536,
                    initiator_task_tag=number,
                )
            )
            work.append(initiator.task_management(1, referenced_task_tag=number, ref_cmd_sn=0))
            work.append(initiator.data_out(b"x" * 512, tag=900000 + number, offset=0, data_sn=0, final=True))
        return work

    peer_target = target.sessions
    kept_of(round_(50), peer)
    assert kept_of(round_(500), peer) < 1 << 20
    (session,) = peer_target.sessions.values()
    assert len(session.tasks) <= 1


def test_nop_flood_is_answered_piece_by_piece() -> None:
    """Echo data is not gathered over wake-ups."""
    peer = MemoryTarget().logged_in()
    ping = peer.initiator.nop_out(b"x" * 4096, immediate=True)
    assert kept_of([ping] * 2000, peer) < 1 << 20
    assert isinstance(bhs.NopOut.parse(ping), bhs.NopOut)
