"""Error recovery with the real daemon over TCP: connections cut, PDUs damaged (RFC 7143 §7.1.4, §7.8)."""

import contextlib

import pytest

from protocol import bhs
from protocol.enums import AsyncEvent, ScsiStatus
from tests import cdbs
from tests.daemon import HOST, Daemon
from tests.functional.recovering import DamagingProxy, Model, ask_again, cut, cut_and_carry_on, pair
from tests.functional.sessions import BLOCK, attention, log_in
from tests.initiator import Breach, ConnectionClosed, Rejected, SessionState, SocketInitiator
from tests.initiator_recovery import RecoveringSocket

SIZE = 1 << 20
DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
ONE_IN = 1000


def disk(daemon: Daemon, name: str, level: int) -> str:
    """A target that offers this level at most; its name."""
    daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_maxconnect": 4})
    made = daemon.create_disk(name, "1MB", target={"iscsi_target_error_recovery_level": level})
    return made.iqn


def on_disk(daemon: Daemon, name: str) -> bytes:
    return (daemon.extent_root / f"{name}.img").read_bytes()


def test_the_level_of_a_target_holds_for_new_sessions(shared_daemon: Daemon) -> None:
    """RFC 7143 §13.20; live: a session that is open keeps what it settled."""
    made = shared_daemon.create_disk("levels", "1MB")
    path = f"services/iscsi/target/{made.target_id}/"
    assert shared_daemon.expect(200, "GET", path)["iscsi_target_error_recovery_level"] == 0
    sessions = []
    for level in (0, 1, 2, 0):
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_error_recovery_level": level})
        peer = SocketInitiator((HOST, shared_daemon.portal_port), session=SessionState())
        peer.login(made.iqn, keys={"ErrorRecoveryLevel": "2"})
        assert peer.keys["ErrorRecoveryLevel"] == str(level)
        sessions.append(peer)
    listed = shared_daemon.expect(200, "GET", "services/iscsi/session/")
    of_it = [each for each in listed if each["target_name"] == made.iqn]
    assert [each["negotiated"]["ErrorRecoveryLevel"] for each in of_it] == ["0", "1", "2", "0"]
    for peer in sessions:
        assert attention(peer) == (0x29, 0x00)
        peer.logout()
        peer.close()


def test_a_cut_connection_with_level_2_costs_nothing(shared_daemon: Daemon) -> None:
    """RFC 7143 §7.1.4.3, §7.2.2: every command outstanding is reassigned and ends GOOD, with right data."""
    target = disk(shared_daemon, "carry", 2)
    model = cut_and_carry_on(shared_daemon, target, SIZE)
    assert on_disk(shared_daemon, "carry") == bytes(model.content)


def test_snacks_of_every_kind_bring_what_they_ask_for(shared_daemon: Daemon) -> None:
    """RFC 7143 §11.16, over a socket."""
    ask_again(shared_daemon, disk(shared_daemon, "snacks", 2))


def test_a_cut_connection_with_level_0_ends_the_session_cleanly(shared_daemon: Daemon) -> None:
    """RFC 7143 §7.1.5: told on the other connection, closed, and gone; what was answered is on the disk."""
    target = disk(shared_daemon, "ends", 0)
    one, two = pair(shared_daemon, target, ErrorRecoveryLevel="0")
    model = Model(SIZE, seed=3720)
    for n in range(20):
        model.io((one, two)[n % 2])
    answered = bytes(model.content)
    outstanding = [two.send_command(cdbs.read10(0, 64), read=64 * BLOCK) for _ in range(8)]
    assert len(outstanding) == 8
    cut(two)
    event = one.wait_for_async().expect(bhs.AsyncMessage)
    assert event.async_event == AsyncEvent.SESSION_DROP
    assert one.wait_closed() == []
    listed = shared_daemon.expect(200, "GET", "services/iscsi/session/")
    assert target not in [each["target_name"] for each in listed]
    again = log_in(shared_daemon, target)
    assert again.command(cdbs.read10(0, 2048), read=SIZE).data == answered
    again.logout()
    again.close()
    one.close()


def test_a_session_that_waits_is_shown_and_can_be_dropped(shared_daemon: Daemon) -> None:
    """Without a connection, for as long as it retains its tasks; DELETE does not wait for anybody."""
    target = disk(shared_daemon, "waits", 2)
    one, two = pair(shared_daemon, target)
    cut(two)
    event = one.wait_for_async().expect(bhs.AsyncMessage)
    assert (event.async_event, event.parameter1) == (AsyncEvent.CONNECTION_DROP, 2)
    since = len(shared_daemon.lines)
    cut(one)
    shared_daemon.wait_for_line("connection of", "closed", since=since)
    (shown,) = [
        each
        for each in shared_daemon.expect(200, "GET", "services/iscsi/session/")
        if each["target_name"] == target
    ]
    assert shown["connections"] == []
    shared_daemon.expect(204, "DELETE", f"services/iscsi/session/{shown['id']}/")
    listed = shared_daemon.expect(200, "GET", "services/iscsi/session/")
    assert target not in [each["target_name"] for each in listed]


def test_damaged_pdus_are_recovered_at_level_1(shared_daemon: Daemon) -> None:
    """RFC 7143 §7.8: one PDU in a thousand is damaged, both ways; every command ends GOOD with right data."""
    target = disk(shared_daemon, "damaged", 1)
    with DamagingProxy((HOST, shared_daemon.portal_port), ONE_IN, seed=5048) as proxy:
        peer = RecoveringSocket(proxy.address, session=SessionState())
        peer.login(
            target,
            keys={
                **DIGESTS,
                "ErrorRecoveryLevel": "1",
                "MaxRecvDataSegmentLength": "1024",
                "MaxBurstLength": "8192",
                "FirstBurstLength": "8192",
            },
        )
        peer.max_data_out = 1024
        assert attention(peer) == (0x29, 0x00)
        model = Model(SIZE, seed=5048)
        while sum(proxy.damaged.values()) < 6 or not all(proxy.damaged.values()):
            waiting = [model.begin(peer) for _ in range(8)]
            for task, expected, where in waiting:
                reply = peer.wait(task)
                assert reply.status == ScsiStatus.GOOD, reply
                assert reply.data == expected
                model.done(where)
        assert proxy.passed > ONE_IN
        assert peer.initiator.breaches == []
        peer.close()
    assert on_disk(shared_daemon, "damaged") == bytes(model.content)


def test_damaged_pdus_never_do_harm_at_level_0(shared_daemon: Daemon) -> None:
    """RFC 7143 §7.8: commands fail, connections close, but no wrong byte is stored, and none is believed."""
    target = disk(shared_daemon, "harmless", 0)
    model = Model(SIZE, seed=3721)
    doubtful: dict[int, bytes] = {}
    with DamagingProxy((HOST, shared_daemon.portal_port), ONE_IN // 10, seed=3721) as proxy:
        while sum(proxy.damaged.values()) < 12:
            peer = SocketInitiator(proxy.address, session=SessionState(), timeout_s=2)
            with contextlib.suppress(Breach, ConnectionClosed, Rejected, TimeoutError):
                peer.login(target, keys={**DIGESTS, "MaxRecvDataSegmentLength": "1024"})
                attention(peer)
                while True:
                    _one_command(peer, model, doubtful)
            peer.close()
    stored = on_disk(shared_daemon, "harmless")
    for block in range(SIZE // BLOCK):
        content = stored[block * BLOCK : (block + 1) * BLOCK]
        expected = bytes(model.content[block * BLOCK : (block + 1) * BLOCK])
        assert content in (expected, doubtful.get(block, expected)), f"block {block}"


def _one_command(peer: SocketInitiator, model: Model, doubtful: dict[int, bytes]) -> None:
    """A READ or WRITE; what becomes of a write that is not answered GOOD is not known."""
    lba, blocks = model.choose()
    model.done((lba, blocks))
    span = range(lba, lba + blocks)
    if any(block in doubtful for block in span):
        return
    start, size = lba * BLOCK, blocks * BLOCK
    if model.dice.randrange(2):
        reply = peer.command(cdbs.read10(lba, blocks), read=size)
        assert reply.status != ScsiStatus.GOOD or reply.data == model.content[start : start + size]
        return
    data = model.dice.randbytes(size)
    doubtful.update({block: data[(block - lba) * BLOCK : (block - lba + 1) * BLOCK] for block in span})
    reply = peer.command(cdbs.write10(lba, blocks), data, unsolicited=min(size, 4096))
    if reply.status == ScsiStatus.GOOD:
        model.content[start : start + size] = data
        for block in span:
            del doubtful[block]


@pytest.mark.parametrize("level", [1, 2])
def test_reads_and_writes_at_a_level_of_their_own(shared_daemon: Daemon, level: int) -> None:
    """All is as at level 0 while nothing goes wrong."""
    target = disk(shared_daemon, f"plain{level}", level)
    peer = SocketInitiator((HOST, shared_daemon.portal_port), session=SessionState())
    peer.login(target, keys={"ErrorRecoveryLevel": str(level), "DefaultTime2Retain": "20"})
    assert attention(peer) == (0x29, 0x00)
    model = Model(SIZE, seed=level)
    for _ in range(60):
        model.io(peer)
    peer.logout()
    peer.close()
    assert on_disk(shared_daemon, f"plain{level}") == bytes(model.content)


def test_sessions_are_told_of_luns_that_come_and_go(shared_daemon: Daemon) -> None:
    """RFC 7143 §11.9.1, event 0: REPORTED LUNS DATA HAS CHANGED, which makes open-iscsi scan."""
    made = shared_daemon.create_disk("grows", "1MB")
    other = shared_daemon.create_disk("lends", "1MB")
    peer = SocketInitiator((HOST, shared_daemon.portal_port), session=SessionState())
    peer.login(made.iqn)
    assert attention(peer) == (0x29, 0x00)
    lent = shared_daemon.create(
        "targettoextent", iscsi_target=made.target_id, iscsi_extent=other.extent_id, iscsi_lunid=1
    )
    shared_daemon.expect(202, "PUT", f"services/iscsi/target/{made.target_id}/", {"iscsi_target_alias": "a"})
    shared_daemon.delete("targettoextent", lent["id"])
    for _ in range(2):
        event = peer.wait_for_async()
        assert event.expect(bhs.AsyncMessage).async_event == AsyncEvent.SCSI_EVENT
        assert event.data[14:16] == b"\x3f\x0e"
    assert peer.nop(b"nothing else")
    assert peer.asyncs == []
    assert attention(peer) == (0x3F, 0x0E)
    peer.logout()
    peer.close()
