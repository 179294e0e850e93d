"""Sessions, connections, and the command window they share (RFC 7143 §4.2.2.1, §6.3)."""

import random
from dataclasses import replace

import pytest

from protocol import bhs
from protocol.enums import LoginStatus, RejectReason
from protocol.session import Session
from tests import cdbs
from tests.initiator import LoginFailed, MemoryPeer, SessionState
from tests.protocol.target import TARGET, MemoryTarget, connection_of

BLOCK = bytes(range(256)) * 2
SOME_COMMANDS_CLEARED = (0x47, 0x7F)
"""By an iSCSI protocol event (RFC 7143 §7.11)."""


def only_session(target: MemoryTarget) -> Session:
    (session,) = target.sessions.sessions.values()
    return session


def second(target: MemoryTarget, first: MemoryPeer, cid: int = 2, **login: object) -> MemoryPeer:
    """One more connection of the session of ``first``."""
    peer = target.connect(session=first.session)
    peer.initiator.cid = cid
    peer.login(TARGET, **login)  # type: ignore[arg-type]  # passed on
    return peer


# -- the window -------------------------------------------------------------------------------------


def test_a_number_outside_the_window_or_seen_before_is_ignored() -> None:
    """RFC 7143 §4.2.2.1: silently, and the connection is kept."""
    target = MemoryTarget()
    peer = target.logged_in()
    session = only_session(target)
    for wrong in (session.exp_cmd_sn - 1, session.max_cmd_sn + 1, session.exp_cmd_sn - (1 << 31)):
        number = wrong & 0xFFFFFFFF
        peer.send(peer.initiator.scsi_command(cdbs.read10(0, 1), read=True, expected=512, cmd_sn=number))
        peer.send(peer.initiator.nop_out(b"x", cmd_sn=number))
    assert peer.pending() == []
    assert not session.held
    assert peer.command(cdbs.read10(0, 1), read=512).good


def test_commands_are_carried_out_in_order_however_they_arrive() -> None:
    """RFC 7143 §4.2.2.1."""
    target = MemoryTarget()
    peer = target.logged_in()
    session = only_session(target)
    first = session.exp_cmd_sn
    writes = [
        peer.initiator.scsi_command(
            cdbs.write10(0, 1),
            bytes([n]) * 512,
            write=True,
            expected=512,
            cmd_sn=first + n,
            initiator_task_tag=n,
        )
        for n in range(8)
    ]
    for n in (3, 1, 7, 5, 6, 2, 4):
        peer.send(writes[n])
        peer.send(writes[n])  # twice: the second is a duplicate
    assert peer.pending() == []
    peer.send(writes[0])
    assert [pdu.initiator_task_tag for pdu in peer.pending()] == list(range(8))
    assert bytes(target.backends[0].read(0, 512)) == bytes([7]) * 512
    assert not session.held


def test_a_whole_window_in_reverse_order_is_no_deep_recursion() -> None:
    """As many as the deepest queue that can be configured."""
    target = MemoryTarget()
    target.access.grant = replace(target.access.grant, queue_depth=1024)
    peer = target.logged_in()
    first = only_session(target).exp_cmd_sn
    for n in reversed(range(1024)):
        kind = n % 3
        if kind == 0:
            pdu = peer.initiator.nop_out(cmd_sn=first + n, initiator_task_tag=n)
        elif kind == 1:
            pdu = peer.initiator.scsi_command(bytes(6), cmd_sn=first + n, initiator_task_tag=n)
        else:
            pdu = peer.initiator.text_request(b"", cmd_sn=first + n, initiator_task_tag=n)
        peer.send(pdu)
    assert sorted(pdu.initiator_task_tag for pdu in peer.pending()) == list(range(1024))


def test_the_window_is_as_wide_as_the_queue_depth_whatever_happens() -> None:
    """Commands of every kind, some failing, one aborted, one rejected: none may cost or gain a place."""
    target = MemoryTarget()
    peer = target.logged_in()
    session = only_session(target)

    def width() -> int:
        return session.max_cmd_sn - session.exp_cmd_sn + 1

    assert width() == 8
    peer.command(cdbs.read10(0, 1), read=512)
    peer.command(cdbs.read10(1 << 30, 1), read=512)
    peer.command(cdbs.write10(0, 8), BLOCK * 8)
    peer.nop(b"x")
    peer.text(b"")
    peer.command(bytes(6), lun=5)
    peer.command(bytes(6), immediate=True)
    assert width() == 8
    peer.answer_r2ts = False
    task = peer.send_command(cdbs.write10(0, 8), BLOCK * 8, immediate_data=0, unsolicited=0)
    peer.wait_for_r2t(task)
    assert width() == 7
    peer.send(peer.initiator.scsi_command(bytes(6), initiator_task_tag=task.tag))  # in progress: rejected
    assert peer.pending()[-1].expect(bhs.Reject).reason == RejectReason.TASK_IN_PROGRESS
    assert width() == 7
    assert peer.task_management(1, task=task) == 0
    assert width() == 8


@pytest.mark.parametrize("steps", [(2, 16), (16, 2), (3, 6), (0, 8), (5, 4, 3, 2), (4, 4)])
def test_another_queue_depth_holds_at_once_and_the_window_never_moves_back(steps: tuple[int, ...]) -> None:
    """RFC 7143 §4.2.2.1: MaxCmdSN never decreases. By both ways of commands, with some under way."""
    target = MemoryTarget()
    peer = target.logged_in()
    session = only_session(target)
    peer.answer_r2ts = False
    under_way = peer.send_command(cdbs.write10(0, 1), bytes(512), immediate_data=0, unsolicited=0)
    r2t = peer.wait_for_r2t(under_way)
    last = session.max_cmd_sn

    def command() -> None:
        nonlocal last
        assert peer.command(cdbs.read10(0, 1), read=512).good
        assert last <= session.max_cmd_sn
        last = session.max_cmd_sn

    for depth in steps:
        session.set_depth(depth)
        assert last <= session.max_cmd_sn
        if depth < 2:
            peer.answer_r2t(under_way, r2t)
            peer.wait(under_way)
        for _ in range(20):
            command()
        outstanding = len(session.tasks)
        assert session.max_cmd_sn - session.exp_cmd_sn + 1 + outstanding == max(depth, 1)
        (connection,) = session.connections.values()
        assert connection.framer.handlers[1] != connection._scsi_command, "the fast path is taken again"


def test_no_more_than_the_queue_depth_is_ever_outstanding() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    session = only_session(target)
    for n in range(20):
        peer.send(
            peer.initiator.scsi_command(
                cdbs.write10(0, 1), write=True, expected=512, initiator_task_tag=1000 + n
            )
        )
    assert len(session.tasks) == 8
    r2ts = [pdu.expect(bhs.ReadyToTransfer) for pdu in peer.pending()]
    assert [r2t.initiator_task_tag for r2t in r2ts] == list(range(1000, 1008))
    assert r2ts[-1].max_cmd_sn + 1 == r2ts[-1].exp_cmd_sn  # closed


def test_the_window_never_moves_back() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    last = 0
    for n in range(30):
        peer.send(
            peer.initiator.scsi_command(cdbs.read10(0, 1), read=True, expected=512)
            + peer.initiator.nop_out(bytes(n))
        )
        for pdu in peer.pending():
            assert pdu.header.max_cmd_sn >= last  # type: ignore[attr-defined]
            last = pdu.header.max_cmd_sn  # type: ignore[attr-defined]


def test_numbers_wrap() -> None:
    """RFC 1982 arithmetic: CmdSN 0 comes after FFFFFFFFh."""
    target = MemoryTarget()
    peer = target.connect(session=SessionState(cmd_sn=0xFFFFFFFC))
    peer.login(TARGET)
    for _ in range(12):
        peer.command(cdbs.read10(0, 1), read=512)
    assert only_session(target).exp_cmd_sn == 8


def test_unsolicited_data_waits_with_its_command() -> None:
    """A command that is early is no reason to lose the Data-Out behind it (RFC 7143 §4.2.2.1)."""
    target = MemoryTarget()
    peer = target.logged_in()
    number = peer.session.cmd_sn
    peer.session.cmd_sn = number + 1
    write = peer.send_command(cdbs.write10(4, 8), BLOCK * 8, immediate_data=512, unsolicited=4096)
    assert peer.pending() == []
    peer.request(peer.initiator.nop_out(cmd_sn=number)).expect(bhs.NopIn)
    assert peer.wait(write).good
    assert bytes(target.backends[0].read(4 * 512, 4096)) == BLOCK * 8


def test_endless_data_for_an_early_command_is_not_kept() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    number = peer.session.cmd_sn
    peer.session.cmd_sn = number + 1
    write = peer.send_command(cdbs.write10(4, 8), BLOCK * 8, immediate_data=0, unsolicited=512)
    for sn in range(1, 200):
        peer.send(peer.initiator.data_out(bytes(4096), tag=write.tag, offset=512, data_sn=sn, final=False))
    (early,) = only_session(target).held.values()
    assert early is not None
    assert sum(len(data) for _, data in early.data_outs) <= 65536 + 65536


# -- several connections ----------------------------------------------------------------------------


def test_a_second_connection_joins_and_commands_are_ordered_across_both() -> None:
    """RFC 7143 §4.2.2.1, §6.3.1."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    session = only_session(target)
    assert set(session.connections) == {1, 2}
    one.command(cdbs.write10(0, 1), BLOCK)
    assert two.command(cdbs.read10(0, 1), read=512).data == BLOCK
    number = session.exp_cmd_sn
    two.send(two.initiator.scsi_command(cdbs.read10(0, 1), read=True, expected=512, cmd_sn=number + 1))
    assert two.pending() == []
    one.send(
        one.initiator.scsi_command(cdbs.write10(0, 1), BLOCK[::-1], write=True, expected=512, cmd_sn=number)
    )
    assert connection_of(two) in target.sessions.stirred  # its owner must look, though it received nothing
    (data,) = two.pending()
    assert data.data == BLOCK[::-1]


def test_an_early_pdu_that_cannot_be_parsed_hurts_only_its_own_connection() -> None:
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    number = only_session(target).exp_cmd_sn
    two.send(two.initiator.scsi_command(bytes(6), cmd_sn=number + 1, ahs=b"\xff\xff\x01\0"))
    one.send(one.initiator.nop_out(b"still here", cmd_sn=number))
    assert connection_of(two).closing
    assert "AHSLength" in connection_of(two).closing


def test_a_connection_too_many_is_refused() -> None:
    """RFC 7143 §11.13.5: 0206h."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    second(target, one)
    with pytest.raises(LoginFailed) as failed:
        second(target, one, cid=3)
    assert failed.value.status == LoginStatus.TOO_MANY_CONNECTIONS
    assert one.nop(b"x")


def test_logging_in_with_the_same_cid_reinstates_the_connection() -> None:
    """RFC 7143 §6.3.4: an implicit logout of the old one; the session and its window go on."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    two.answer_r2ts = False
    session = only_session(target)
    stuck = two.send_command(cdbs.write10(0, 8), BLOCK * 8, immediate_data=0, unsolicited=0)
    two.wait_for_r2t(stuck)
    two.send(two.initiator.nop_out(cmd_sn=session.exp_cmd_sn + 1))  # held for its turn
    again = second(target, one)
    assert connection_of(two).closing == "connection reinstatement"
    assert only_session(target) is session
    assert session.connections == {1: connection_of(one), 2: connection_of(again)}
    assert not session.tasks
    one.session.cmd_sn = session.exp_cmd_sn
    one.nop(b"fills the gap")
    assert session.max_cmd_sn - session.exp_cmd_sn + 1 == 8
    one.session.cmd_sn = session.exp_cmd_sn
    assert again.command(bytes(6)).additional_sense == SOME_COMMANDS_CLEARED
    assert again.command(cdbs.read10(0, 8), read=4096).data == bytes(4096)
    connection_of(two).lost("closed at last")
    assert only_session(target) is session


def test_logging_out_another_connection_leaves_the_session() -> None:
    """RFC 7143 §11.14: by its CID, on whatever connection."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    assert one.logout(1, cid=9).response == 1  # CID not found
    assert one.logout(2, cid=2).response == 2  # recovery is not supported
    assert one.logout(1, cid=2).response == 0
    assert connection_of(two).closing
    assert not connection_of(one).closing
    assert one.command(cdbs.read10(0, 1), read=512).good
    assert one.logout(1, cid=1).response == 0  # the last one ends the session
    assert not target.sessions.sessions


def test_losing_a_connection_ends_the_session_at_level_0() -> None:
    """RFC 7143 §7.1.4.1, §7.5."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    connection_of(two).lost("cable cut")
    assert not target.sessions.sessions
    assert connection_of(one).closing


# -- who gets which session -------------------------------------------------------------------------


def test_the_same_initiator_port_reinstates_its_session() -> None:
    """RFC 7143 §6.3.5: the old connection closes and its tasks are dropped."""
    target = MemoryTarget()
    one = target.logged_in()
    one.answer_r2ts = False
    task = one.send_command(cdbs.write10(0, 1), BLOCK, immediate_data=0, unsolicited=0)
    one.wait_for_r2t(task)
    old = only_session(target)
    two = target.connect(session=SessionState(isid=one.session.isid))
    two.login(TARGET)
    assert connection_of(one).closing == "session reinstatement"
    assert not old.tasks
    assert only_session(target) is not old
    one.send(one.initiator.data_out(BLOCK, tag=task.tag, offset=0, data_sn=0, final=True, transfer_tag=1))
    assert one.pending() == []
    connection_of(one).lost("closed")
    assert two.command(bytes(6)).status == 2  # the unit attention of a new nexus
    assert two.command(cdbs.read10(0, 1), read=512).data == bytes(512)


def test_another_isid_is_another_session() -> None:
    target = MemoryTarget()
    one, two = target.logged_in(), target.logged_in()
    assert len(target.sessions.sessions) == 2
    assert one.session.tsih != two.session.tsih
    assert one.nop(b"1")
    assert two.nop(b"2")


@pytest.mark.parametrize("what", ["tsih", "isid", "name"])
def test_a_tsih_that_is_not_the_initiators_is_refused(what: str) -> None:
    """RFC 7143 §6.3.1: 020Ah."""
    target = MemoryTarget(max_connections=4)
    one = target.logged_in(keys={"MaxConnections": "4"})
    state = SessionState(isid=one.session.isid, tsih=one.session.tsih)
    name = {}
    if what == "tsih":
        state.tsih ^= 0x55
    elif what == "isid":
        state.isid = bytes(6)
    else:
        name = {"initiator_name": "iqn.2026-11.example:other"}
    with pytest.raises(LoginFailed) as failed:
        target.connect(session=state).login(TARGET, **name)
    assert failed.value.status == LoginStatus.SESSION_DOES_NOT_EXIST
    assert one.nop(b"x")


def test_a_session_does_not_span_portal_groups() -> None:
    """RFC 7143 §11.13.5: 0208h; §4.4.1: the portal group is part of what names the nexus."""
    target = MemoryTarget(max_connections=4)
    one = target.logged_in(keys={"MaxConnections": "4"})
    target.access.grant = replace(target.access.grant, target_portal_group_tag=2)
    with pytest.raises(LoginFailed) as failed:
        second(target, one)
    assert failed.value.status == LoginStatus.CANNOT_INCLUDE_IN_SESSION
    assert one.nop(b"x")


def test_sessions_beyond_the_limit_are_refused_but_not_a_reinstatement() -> None:
    """RFC 7143 §11.13.5: 0302h."""
    target = MemoryTarget()
    target.sessions.max_sessions = 2
    one = target.logged_in()
    target.logged_in()
    with pytest.raises(LoginFailed) as failed:
        target.logged_in()
    assert failed.value.status == LoginStatus.OUT_OF_RESOURCES
    target.connect(session=SessionState(isid=one.session.isid)).login(TARGET)
    target.connect().login(None)  # discovery does not count
    assert target.sessions.normal_count() == 2


def test_a_tsih_is_never_0_and_never_used_twice() -> None:
    target = MemoryTarget()
    target.sessions._last_tsih = 0xFFFE
    peers = [target.logged_in() for _ in range(3)]
    assert [peer.session.tsih for peer in peers] == [0xFFFF, 1, 2]


def test_random_arrival_over_two_connections_keeps_every_promise() -> None:
    """Every command answered once, in order of effect, the window whole at the end."""
    target = MemoryTarget(max_connections=2)
    one = target.logged_in(keys={"MaxConnections": "2"})
    two = second(target, one)
    session = only_session(target)
    dice = random.Random(7143)
    for _ in range(30):
        first = session.exp_cmd_sn
        order = list(range(8))
        dice.shuffle(order)
        for n in order:
            peer = dice.choice((one, two))
            peer.send(
                peer.initiator.scsi_command(
                    cdbs.write10(0, 1), bytes([n]) * 512, write=True, expected=512,
                    cmd_sn=first + n, initiator_task_tag=n,
                )
            )  # fmt: skip
        answered = [pdu.initiator_task_tag for peer in (one, two) for pdu in peer.pending()]
        assert sorted(answered) == list(range(8))
        assert session.exp_cmd_sn == first + 8
        assert session.max_cmd_sn == first + 15
