"""ErrorRecoveryLevel 2, and several connections of one session at every level: who a task belongs to, and
what becomes of it when a connection goes (RFC 7143 §4.2.5.1, §6.3.4, §7.1.4.3, §7.2.2, §7.11, §11.14)."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from protocol import bhs, dataout
from protocol.enums import AsyncEvent, LoginStatus, LogoutReason, LogoutResponseCode, RejectReason, ScsiStatus
from protocol.enums import TaskManagementFunction as Function
from protocol.enums import TaskManagementResponseCode as Response
from protocol.limits import MAX_IMMEDIATE_TASKS, PROBE_S
from protocol.session import SessionTable
from tests import cdbs
from tests.initiator import LoginFailed, MemoryPeer, SessionState, Task
from tests.initiator_recovery import reassign
from tests.protocol.target import TARGET, MemoryTarget, connection_of

WAIT, RETAIN = 2, 30
DIGESTS = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
SOME_COMMANDS_CLEARED = (0x47, 0x7F)
RECOVERY = LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY
CLOSE = LogoutReason.CLOSE_CONNECTION


def pattern(size: int, start: int = 0) -> bytes:
    return bytes((start + n * 7) % 251 for n in range(size))


class Pair:
    """A session with two connections, ``one`` and ``two``."""

    def __init__(self, level: int = 2, *, connections: int = 2, **keys: str) -> None:
        self.target = MemoryTarget(
            luns=2,
            error_recovery_level=level,
            max_connections=connections,
            default_time2wait=WAIT,
            default_time2retain=RETAIN,
        )
        self.keys = {
            "ErrorRecoveryLevel": str(level),
            "MaxConnections": str(connections),
            "DefaultTime2Wait": str(WAIT),
            "DefaultTime2Retain": keys.pop("DefaultTime2Retain", str(RETAIN)),
            **keys,
        }
        self.one = self.target.logged_in(keys=self.keys)
        (self.session,) = self.target.sessions.sessions.values()
        if connections > 1:
            self.two = self.join(2)

    def join(self, cid: int, **keys: str) -> MemoryPeer:
        """One more connection, or one that takes the place of another."""
        peer = self.target.connect(session=self.one.session)
        peer.initiator.cid = cid
        peer.login(TARGET, keys=keys)
        return peer

    @property
    def alive(self) -> bool:
        return self.session.id in self.target.sessions.sessions

    def cut(self, peer: MemoryPeer) -> None:
        """The TCP connection is gone, with all that was on its way to the initiator."""
        connection_of(peer).data_to_send()
        connection_of(peer).lost("cable cut")

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on everything that touches a medium waits for ``release``."""
        for backend in self.target.backends:
            monkeypatch.setattr(backend, "copy_nowait", lambda offset, length: None)
            monkeypatch.setattr(backend, "write_nowait", lambda offset, data: False)
        self.target.lane.hold = True

    def release(self) -> None:
        self.target.lane.hold = False
        self.target.lane.release()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connections at level 2; at the end nothing is left of any task."""
    made = Pair()
    yield made
    made.release()
    for session in list(made.target.sessions.sessions.values()):
        made.target.sessions.end(session, "end of the test")
    assert not any(unit.tasks for unit in made.target.units)


def event_of(peer: MemoryPeer) -> bhs.AsyncMessage:
    return peer.wait_for_async().expect(bhs.AsyncMessage)


def moved(task: Task, peer: MemoryPeer, **options: Any) -> Any:
    """Reassign, and the reply."""
    assert reassign(task, peer, **options) == Response.FUNCTION_COMPLETE
    return peer.wait(task)


# -- a connection is cut ----------------------------------------------------------------------------


def test_a_cut_leaves_the_session_to_the_others(pair: Pair) -> None:
    """RFC 7143 §7.1.4.3: the target "SHOULD send an Asynchronous Message that indicates that it has dropped
    the connection" (§11.9.1, event 2: CID, Time2Wait, Time2Retain)."""
    pair.cut(pair.two)
    event = event_of(pair.one)
    assert (event.async_event, event.parameter1) == (AsyncEvent.CONNECTION_DROP, 2)
    assert (event.parameter2, event.parameter3) == (WAIT, RETAIN)
    assert pair.one.command(cdbs.read10(0, 1), read=512).good
    assert set(pair.session.connections) == {1}


@pytest.mark.parametrize("level", [0, 1])
def test_without_level_2_a_cut_ends_the_session_cleanly(level: int) -> None:
    """RFC 7143 §7.1.4.4, §7.1.5: session recovery is all there is. The others are told (event 3)."""
    pair = Pair(level)
    pair.one.answer_r2ts = False
    task = pair.one.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    pair.one.wait_for_r2t(task)
    pair.cut(pair.two)
    assert not pair.alive
    event = event_of(pair.one)
    assert (event.async_event, event.parameter2, event.parameter3) == (AsyncEvent.SESSION_DROP, WAIT, 0)
    assert connection_of(pair.one).closing == "cable cut"
    assert not pair.target.units[0].tasks
    assert not pair.target.target.nexuses
    again = pair.target.logged_in()
    assert again.command(cdbs.read10(0, 8), read=4096).data == bytes(4096)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_orderly_logout_of_a_connection_leaves_the_session_to_the_others(level: int) -> None:
    """RFC 7143 §11.14.1, reason 1: its tasks end (§7.11 a), which the next command learns."""
    pair = Pair(level)
    pair.two.answer_r2ts = False
    task = pair.two.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    pair.two.wait_for_r2t(task)
    assert pair.one.logout(CLOSE, cid=2).response == LogoutResponseCode.CLOSED
    assert connection_of(pair.two).closing
    assert pair.alive
    assert not pair.session.tasks
    assert pair.one.command(bytes(6)).additional_sense == SOME_COMMANDS_CLEARED
    assert pair.one.command(bytes(6), lun=1).good
    assert pair.one.command(cdbs.read10(0, 8), read=4096).data == bytes(4096)


def test_the_session_outlives_its_connections_for_as_long_as_it_promised(pair: Pair) -> None:
    """RFC 7143 §11.15.4, §13.15, §13.16: Time2Wait and Time2Retain, then all is gone."""
    pair.cut(pair.one)
    pair.cut(pair.two)
    pair.target.pass_time(WAIT + RETAIN)
    assert pair.alive
    pair.target.pass_time(1)
    assert not pair.alive
    assert not pair.target.target.nexuses
    with pytest.raises(LoginFailed):
        pair.join(1)


def test_a_session_that_waits_can_be_joined_again(pair: Pair) -> None:
    """RFC 7143 §6.3.4, §7.1.4.3: the window, the nexus and what it holds go on."""
    assert pair.one.command(cdbs.write10(0, 1), pattern(512)).good
    pair.cut(pair.one)
    pair.cut(pair.two)
    pair.target.pass_time(RETAIN)
    again = pair.join(7)
    assert again.command(bytes(6)).good  # no unit attention: the nexus was never lost
    pair.target.pass_time(WAIT + 1)
    assert pair.alive
    assert not pair.session.lost
    assert again.command(cdbs.read10(0, 1), read=512).data == pattern(512)


def test_a_session_that_waits_is_reinstated_by_its_initiator_port(pair: Pair) -> None:
    """RFC 7143 §6.3.5: TSIH 0 and the same ISID."""
    pair.cut(pair.one)
    pair.cut(pair.two)
    peer = pair.target.connect(session=SessionState(isid=pair.one.session.isid))
    peer.login(TARGET)
    assert not pair.alive
    assert pair.target.sessions.normal_count() == 1


def test_with_time2retain_0_nothing_waits() -> None:
    """RFC 7143 §11.9.1, §13.16."""
    pair = Pair(DefaultTime2Retain="0")
    pair.two.answer_r2ts = False
    task = pair.two.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    pair.two.wait_for_r2t(task)
    pair.cut(pair.two)
    assert event_of(pair.one).parameter3 == 0
    assert not pair.session.tasks
    assert pair.one.command(bytes(6)).additional_sense == SOME_COMMANDS_CLEARED
    assert reassign(task, pair.one) == Response.TASK_DOES_NOT_EXIST
    pair.cut(pair.one)
    assert not pair.alive


def test_tasks_that_nobody_takes_over_end(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §7.11 b, c: after the time they promised, with a unit attention on the unit they were for."""
    pair.hold(monkeypatch)
    pair.two.send_command(cdbs.read10(0, 1), read=512, lun=1)
    pair.cut(pair.two)
    event_of(pair.one)
    pair.target.pass_time(WAIT + RETAIN)
    assert len(pair.session.tasks) == 1
    pair.target.pass_time(1)
    pair.one.answer_pings = True
    assert not pair.session.tasks
    assert not pair.target.units[1].tasks
    assert pair.one.command(bytes(6)).good
    assert pair.one.command(bytes(6), lun=1).additional_sense == SOME_COMMANDS_CLEARED
    assert pair.session.max_cmd_sn - pair.session.exp_cmd_sn + 1 == 8


# -- logout -----------------------------------------------------------------------------------------


def test_logging_out_for_recovery_is_for_level_2() -> None:
    """RFC 7143 §11.15.1, response 2."""
    for level in (0, 1):
        pair = Pair(level)
        assert pair.one.logout(RECOVERY, cid=2).response == LogoutResponseCode.RECOVERY_NOT_SUPPORTED
        assert pair.two.command(bytes(6)).good


def test_a_connection_is_logged_out_for_recovery_dead_or_alive(pair: Pair) -> None:
    """RFC 7143 §11.14.1, reason 2; §11.15.3-4: with the times that hold."""
    assert pair.one.logout(RECOVERY, cid=9).response == LogoutResponseCode.CID_NOT_FOUND
    answer = pair.one.logout(RECOVERY, cid=2)
    assert (answer.response, answer.time2wait, answer.time2retain) == (
        LogoutResponseCode.CLOSED,
        WAIT,
        RETAIN,
    )
    assert connection_of(pair.two).closing == "connection removed for recovery"
    three = pair.join(3)
    pair.cut(three)
    assert pair.one.logout(RECOVERY, cid=3).response == LogoutResponseCode.CLOSED
    assert pair.one.command(cdbs.read10(0, 1), read=512).good


def test_a_lost_connection_can_be_logged_out_for_good(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §11.14.1, reason 1, of a CID that is waited for: its tasks end now."""
    pair.hold(monkeypatch)
    task = pair.two.send_command(cdbs.read10(0, 1), read=512)
    pair.cut(pair.two)
    assert pair.one.logout(CLOSE, cid=2).response == LogoutResponseCode.CLOSED
    assert not pair.session.tasks
    assert not pair.session.lost
    assert reassign(task, pair.one) == Response.TASK_DOES_NOT_EXIST


def test_the_last_connection_may_log_itself_out_for_recovery() -> None:
    """RFC 7143 §11.15.4: "If it is the last connection of a session, the whole session state is discarded
    after Time2Retain"."""
    pair = Pair(connections=1)
    assert pair.one.logout(RECOVERY).response == LogoutResponseCode.CLOSED
    pair.target.pass_time(WAIT + RETAIN)
    assert pair.alive
    assert pair.join(1).command(bytes(6)).good


def test_level_2_has_room_for_the_connection_that_takes_over() -> None:
    """RFC 7143 §6.3.4: targets MUST support a second connection then, even with MaxConnections=1."""
    pair = Pair(connections=1)
    pair.one.answer_r2ts = False
    task = pair.one.send_command(cdbs.write10(0, 8), pattern(4096), immediate_data=0, unsolicited=0)
    pair.one.wait_for_r2t(task)
    two = pair.join(2)
    assert two.logout(RECOVERY, cid=1).response == LogoutResponseCode.CLOSED
    assert moved(task, two).good
    pair.join(3)
    with pytest.raises(LoginFailed):
        pair.join(4)


def test_connections_that_come_back_count_like_others(pair: Pair) -> None:
    """RFC 7143 §13.2: a CID that is waited for is no way round MaxConnections."""
    pair.cut(pair.two)
    pair.join(3)
    pair.join(4)
    with pytest.raises(LoginFailed) as failed:
        pair.join(2)
    assert failed.value.status == LoginStatus.TOO_MANY_CONNECTIONS


# -- TASK REASSIGN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_reassignment_is_for_level_2(level: int) -> None:
    """RFC 7143 §11.6.1, response 4."""
    pair = Pair(level)
    answer = pair.one.task_management(Function.TASK_REASSIGN, referenced_task_tag=1)
    assert answer == Response.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED


def test_a_task_that_belongs_to_somebody_stays_there(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §7.2.2, §11.6.1, response 3: until its connection is logged out, lost or not."""
    answered = pair.two.send_command(cdbs.read10(0, 1), read=512)
    pair.hold(monkeypatch)
    running = pair.two.send_command(cdbs.read10(0, 1), read=512)
    for task in (running, answered):
        assert reassign(task, pair.one) == Response.TASK_STILL_ALLEGIANT
    pair.cut(pair.two)
    for task in (running, answered):
        assert reassign(task, pair.one) == Response.TASK_STILL_ALLEGIANT
    assert pair.one.logout(RECOVERY, cid=2).response == LogoutResponseCode.CLOSED
    for task in (running, answered):
        assert reassign(task, pair.one) == Response.FUNCTION_COMPLETE
    assert reassign(running, pair.one) == Response.TASK_STILL_ALLEGIANT  # to the one that asks
    pair.release()
    assert pair.one.wait(running).good
    assert pair.one.wait(answered).good


def test_a_task_that_is_unknown_or_acknowledged_does_not_exist(pair: Pair) -> None:
    """RFC 7143 §11.6.1, response 1."""
    task = pair.two.send_command(cdbs.read10(0, 1), read=512)
    pair.two.wait(task)
    pair.two.nop(b"acknowledges it")
    pair.cut(pair.two)
    pair.one.logout(RECOVERY, cid=2)
    assert reassign(task, pair.one) == Response.TASK_DOES_NOT_EXIST
    answer = pair.one.task_management(Function.TASK_REASSIGN, referenced_task_tag=0x777)
    assert answer == Response.TASK_DOES_NOT_EXIST


def test_a_read_cut_off_in_the_middle_of_its_data_comes_whole() -> None:
    """Its reply of 1,024 PDUs is made in pieces, and the connection goes when two of them are made."""
    pair = Pair(MaxRecvDataSegmentLength="512")
    pair.target.backends[0].write(0, pattern(1 << 19))
    task = pair.one.send_command(cdbs.read10(0, 1024), read=1 << 19)
    old = connection_of(pair.one)
    old.data_to_send()
    pair.cut(pair.one)
    assert old.paced
    new = pair.join(3, MaxRecvDataSegmentLength="4096")
    new.logout(RECOVERY, cid=1)
    assert moved(task, new).data == pattern(1 << 19)


@pytest.mark.parametrize("digests", [{}, DIGESTS])
def test_a_read_whose_answer_was_lost_is_answered_again(digests: dict[str, str]) -> None:
    """RFC 7143 §7.2.2: data and status come again, after the response to the reassignment, with a StatSN of
    the new connection."""
    pair = Pair(**digests)
    pair.one.command(cdbs.write10(0, 16), pattern(8192))
    task = pair.two.send_command(cdbs.read10(0, 16), read=8192)
    check = pair.two.send_command(b"\x7f" + bytes(15))
    pair.cut(pair.two)
    new = pair.join(3, MaxRecvDataSegmentLength="1024", **digests)
    new.logout(RECOVERY, cid=2)
    assert moved(task, new).data == pattern(8192)
    assert len(task.pdus) == 9  # as this connection takes it
    reply = moved(check, new)
    assert (reply.status, reply.sense_key) == (ScsiStatus.CHECK_CONDITION, 5)
    new.nop(b"acknowledges both")
    recovery = connection_of(new).recovery
    assert recovery is not None
    assert not recovery.answers.keys() - {connection_of(new).stat_sn - 1}


def test_data_that_the_initiator_has_is_not_sent_again(pair: Pair) -> None:
    """RFC 7143 §11.5.6: from ExpDataSN on, whatever the length of segments is now."""
    pair.one.command(cdbs.write10(0, 16), pattern(8192))
    two = pair.join(3, MaxRecvDataSegmentLength="1024")
    task = two.send_command(cdbs.read10(0, 16), read=8192)
    for _ in range(3):
        two._dispatch(two.receive())
    two._inbox.clear()
    pair.cut(two)
    new = pair.join(4, MaxRecvDataSegmentLength="2048")
    new.logout(RECOVERY, cid=3)
    assert task.next_data_sn == 3
    reply = moved(task, new)
    assert reply.data == pattern(8192)
    sns = [pdu.header.data_sn for pdu in task.pdus if isinstance(pdu.header, bhs.DataIn)]
    assert sns == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", [9, 0xFFFFFFFF])
def test_an_exp_data_sn_that_cannot_be_is_ignored(pair: Pair, wrong: int) -> None:
    """RFC 7143 §11.5.6: "Any other value MUST be ignored by the target"."""
    pair.one.command(cdbs.write10(0, 16), pattern(8192))
    two = pair.join(3, MaxRecvDataSegmentLength="1024")
    task = two.send_command(cdbs.read10(0, 16), read=8192)
    pair.cut(two)
    pair.one.logout(RECOVERY, cid=3)
    assert moved(task, pair.one, exp_data_sn=wrong).data == pattern(8192)


def test_a_command_in_hand_is_answered_where_it_is_then(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §7.2.2: reassigned while the medium works."""
    pair.one.command(cdbs.write10(8, 1), pattern(512))
    pair.hold(monkeypatch)
    read = pair.two.send_command(cdbs.read10(8, 1), read=512)
    write = pair.two.send_command(cdbs.write10(0, 1), pattern(512, 5))
    pair.cut(pair.two)
    pair.one.logout(RECOVERY, cid=2)
    for task in (read, write):
        assert reassign(task, pair.one) == Response.FUNCTION_COMPLETE
    pair.release()
    assert pair.one.wait(read).data == pattern(512)
    assert pair.one.wait(write).good
    assert bytes(pair.target.backends[0].read(0, 512)) == pattern(512, 5)


def test_a_command_that_ended_meanwhile_is_answered_when_it_is_asked_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 7143 §7.1.4.3: what it did was done; its data is that of then."""
    pair.one.command(cdbs.write10(8, 1), pattern(512))
    pair.hold(monkeypatch)
    read = pair.two.send_command(cdbs.read10(8, 1), read=512)
    write = pair.two.send_command(cdbs.write10(0, 1), pattern(512, 5))
    pair.cut(pair.two)
    pair.release()
    monkeypatch.undo()
    pair.one.command(cdbs.write10(8, 1), bytes(512))
    pair.one.logout(RECOVERY, cid=2)
    assert moved(read, pair.one).data == pattern(512)
    assert moved(write, pair.one).good
    assert bytes(pair.target.backends[0].read(0, 512)) == pattern(512, 5)
    assert pair.session.max_cmd_sn - pair.session.exp_cmd_sn + 1 == 8


@pytest.mark.parametrize("received", [0, 1, 3])
@pytest.mark.parametrize("unsolicited", [0, 2048])
def test_a_write_goes_on_where_its_data_stopped(pair: Pair, received: int, unsolicited: int) -> None:
    """RFC 7143 §7.2.2: what did not arrive is asked for on the new connection, nothing else."""
    two = pair.two
    two.max_data_out = 512
    two.answer_r2ts = False
    sent: list[bytes] = []
    send, two.send = two.send, sent.append  # type: ignore[method-assign]
    task = two.send_command(
        cdbs.write10(0, 16), pattern(8192), immediate_data=0, unsolicited=unsolicited, final=not unsolicited
    )
    two.send = send  # type: ignore[method-assign]
    if unsolicited:
        two.send(sent[0][: 48 + received * 560])
    else:
        two.send(sent[0])
        r2t = two.wait_for_r2t(task)
        pdus = two.data_outs(task, 0, 8192, transfer_tag=r2t.target_transfer_tag)
        two.send(b"".join(pdus[:received]))
    pair.cut(two)
    pair.one.logout(RECOVERY, cid=2)
    pair.one.answer_r2ts = False
    pair.one.initiator.strict = False
    assert reassign(task, pair.one) == Response.FUNCTION_COMPLETE
    asked = []
    while not task.done:
        while task.r2ts:
            r2t = task.r2ts.pop(0)
            asked.append((r2t.buffer_offset, r2t.desired_data_transfer_length))
            pair.one.answer_r2t(task, r2t)
        pair.one._dispatch(pair.one.receive())
    assert sum(length for _, length in asked) == 8192 - 512 * received
    assert min(offset for offset, _ in asked) == 512 * received
    assert pair.one.wait(task).good
    assert bytes(pair.target.backends[0].read(0, 8192)) == pattern(8192)


def test_a_failed_write_that_drains_is_answered_at_once(pair: Pair) -> None:
    """RFC 7143 §7.2.2: the data that was still due on the old connection will not come."""
    two = pair.two
    two.answer_r2ts = False
    task = two.send_command(
        cdbs.write10(1 << 30, 8), pattern(4096), immediate_data=0, unsolicited=0, final=False
    )
    assert two.pending() == []
    pair.cut(two)
    pair.one.logout(RECOVERY, cid=2)
    assert moved(task, pair.one).sense_key == 5


def test_logging_in_with_its_cid_logs_a_connection_out_for_recovery(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 7143 §6.3.4: "connection reinstatement enables future task reassignment" at level 2."""
    answered = pair.two.send_command(cdbs.read10(0, 1), read=512)
    pair.hold(monkeypatch)
    running = pair.two.send_command(cdbs.read10(0, 1), read=512)
    again = pair.join(2)  # the old one is not even known to be dead
    assert connection_of(pair.two).closing
    assert set(pair.session.connections) == {1, 2}
    for task in (running, answered):
        assert reassign(task, again) == Response.FUNCTION_COMPLETE
    pair.release()
    assert again.wait(running).good
    assert again.wait(answered).good
    connection_of(pair.two).lost("closed at last")
    assert again.command(bytes(6)).good


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["with memory first", "without first"])
def test_a_write_that_waits_for_memory_goes_on_elsewhere(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    """It had no R2T on the connection that was cut; on the other one it gets its turn like any other."""
    monkeypatch.setattr(dataout, "LARGE_COMMAND", 512)
    monkeypatch.setattr(SessionTable, "in_flight", lambda table, session: 4096)
    pair.two.answer_r2ts = False
    tasks = [
        pair.two.send_command(
            cdbs.write10(8 * n, 8), pattern(4096, n + 1), immediate_data=0, unsolicited=0, final=True
        )
        for n in range(2)
    ]
    pair.two.nop(immediate=True)
    assert [bool(task.r2ts) for task in tasks] == [True, False]
    pair.cut(pair.two)
    peer = pair.join(3)
    peer.logout(RECOVERY, cid=2)
    for index in order:
        assert reassign(tasks[index], peer) == Response.FUNCTION_COMPLETE
    for n, task in enumerate(tasks):
        assert peer.wait(task).good
        assert peer.command(cdbs.read10(8 * n, 8), read=4096).data == pattern(4096, n + 1)


def test_a_cut_twice_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that was reassigned is as safe as before."""
    pair.one.command(cdbs.write10(0, 8), pattern(4096))
    answered = pair.two.send_command(cdbs.read10(0, 8), read=4096)
    pair.hold(monkeypatch)
    running = pair.two.send_command(cdbs.write10(8, 8), pattern(4096, 3))
    peer = pair.two
    for cid in (3, 4, 5):
        pair.cut(peer)
        peer = pair.join(cid)
        peer.logout(RECOVERY, cid=cid - 1)
        for task in (running, answered):
            assert reassign(task, peer, exp_data_sn=0) == Response.FUNCTION_COMPLETE
    pair.release()
    assert peer.wait(answered).data == pattern(4096)
    assert peer.wait(running).good


def test_commands_not_acknowledged_come_again_on_another_connection(pair: Pair) -> None:
    """RFC 7143 §7.1.4.3, §7.2.1: what waited for its turn on the lost connection does not take its place."""
    number = pair.session.exp_cmd_sn
    early = pair.two.initiator.scsi_command(
        cdbs.write10(0, 1), pattern(512), write=True, expected=512, cmd_sn=number + 1, initiator_task_tag=0x61
    )
    pair.two.send(early)
    pair.cut(pair.two)
    event_of(pair.one)
    pair.one.send(early)
    pair.one.session.cmd_sn = number
    task = pair.one.send_command(cdbs.write10(0, 1), bytes(512))
    pair.one.session.cmd_sn = number + 2
    tags = {pdu.initiator_task_tag for pdu in pair.one.pending()}
    assert tags == {task.tag, 0x61}
    assert bytes(pair.target.backends[0].read(0, 512)) == pattern(512)


def test_what_is_kept_of_lost_tasks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bound a connection, dead or alive; a task whose data could not be kept does not exist (§11.6.1)."""
    monkeypatch.setattr("protocol.recovery.MAX_KEPT", 16384)
    pair = Pair()
    pair.hold(monkeypatch)
    tasks = [pair.two.send_command(cdbs.read10(0, 16), read=8192) for _ in range(4)]
    pair.cut(pair.two)
    pair.release()
    recovery = next(iter(pair.session.lost.values())).recovery
    assert recovery.size <= 16384
    pair.one.logout(RECOVERY, cid=2)
    answers = [reassign(task, pair.one) for task in tasks]
    assert answers.count(Response.FUNCTION_COMPLETE) == 2
    assert answers.count(Response.TASK_DOES_NOT_EXIST) == 2
    assert pair.session.max_cmd_sn - pair.session.exp_cmd_sn + 1 == 8


def test_no_more_connections_wait_than_there_may_be(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may keep MAX_KEPT: who cuts and comes again without end is not kept without end."""
    pair.hold(monkeypatch)
    for cid in range(2, 12):
        peer = pair.two if cid == 2 else pair.join(cid)
        peer.send_command(cdbs.read10(0, 1), read=512)
        pair.cut(peer)
    assert len(pair.session.lost) <= 3
    assert len(pair.session.tasks) <= 3
    assert pair.one.logout(RECOVERY, cid=11).response == LogoutResponseCode.CLOSED


def test_data_of_an_answer_that_is_kept_no_more_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §11.6.1, response 1: the initiator has to fail the command, and knows it."""
    monkeypatch.setattr("protocol.recovery.MAX_KEPT", 8192)
    pair = Pair()
    task = pair.two.send_command(cdbs.read10(0, 32), read=16384)
    pair.cut(pair.two)
    pair.one.logout(RECOVERY, cid=2)
    assert reassign(task, pair.one) == Response.TASK_DOES_NOT_EXIST


# -- task management over connections ---------------------------------------------------------------


def test_data_of_a_command_stays_on_its_connection(pair: Pair) -> None:
    """RFC 7143 §4.2.5.1, connection allegiance: elsewhere it belongs to nothing, and is rejected."""
    pair.one.answer_r2ts = False
    task = pair.one.send_command(cdbs.write10(0, 1), pattern(512), immediate_data=0, unsolicited=0)
    r2t = pair.one.wait_for_r2t(task)
    stray = pair.two.initiator.data_out(
        bytes(512), tag=task.tag, offset=0, data_sn=0, final=True, transfer_tag=r2t.target_transfer_tag
    )
    assert pair.two.request(stray).expect(bhs.Reject).reason == RejectReason.INVALID_PDU_FIELD
    pair.one.answer_r2t(task, r2t)
    assert pair.one.wait(task).good
    assert bytes(pair.target.backends[0].read(0, 512)) == pattern(512)


@pytest.mark.parametrize("level", [0, 2])
def test_a_task_is_aborted_from_another_connection(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §4.2.2.1, §11.5: task management is the session's."""
    pair = Pair(level)
    pair.hold(monkeypatch)
    for backend in pair.target.backends:
        monkeypatch.setattr(backend, "read_nowait", lambda offset, length: None)
    task = pair.two.send_command(cdbs.read10(0, 1), read=512)
    assert pair.one.task_management(Function.ABORT_TASK, task=task) == Response.FUNCTION_COMPLETE
    pair.release()
    assert pair.two.pending() == []
    assert not pair.session.tasks


MULTI_TASK = [
    Function.ABORT_TASK_SET,
    Function.CLEAR_TASK_SET,
    Function.LOGICAL_UNIT_RESET,
    Function.TARGET_WARM_RESET,
]


@pytest.mark.parametrize("function", MULTI_TASK)
@pytest.mark.parametrize("level", [0, 2])
def test_a_multi_task_abort_is_answered_when_the_other_connections_have_all(
    level: int, function: int
) -> None:
    """RFC 7143 §4.2.3.3 d: every status sent before it is acknowledged first, for which a NOP-In asks."""
    pair = Pair(level)
    before = pair.two.send_command(cdbs.read10(0, 1), read=512)
    request = pair.one.initiator.task_management(function, initiator_task_tag=0x55)
    pair.one.send(request)
    assert pair.one.pending() == []
    assert pair.two.wait(before).good
    ping = pair.two.wait_for_ping().expect(bhs.NopIn)  # and it is answered
    assert ping.stat_sn == pair.two.initiator.exp_stat_sn
    assert connection_of(pair.one) in pair.target.sessions.stirred
    (answer,) = pair.one.pending()
    assert answer.expect(bhs.TaskManagementResponse).response == Response.FUNCTION_COMPLETE
    assert answer.initiator_task_tag == 0x55


@pytest.mark.parametrize("gone", ["silent", "cut", "closed"])
def test_a_multi_task_abort_does_not_wait_for_a_dead_connection(gone: str) -> None:
    """RFC 7143 §4.2.3.3: bounded, as the initiator aborts because something is stuck already."""
    pair = Pair(2)
    pair.two.answer_pings = False
    pair.one.send(pair.one.initiator.task_management(Function.LOGICAL_UNIT_RESET))
    assert pair.one.pending() == []
    if gone == "silent":
        pair.target.pass_time(PROBE_S)
        assert pair.one.pending() == []
        pair.target.pass_time(1)
    elif gone == "cut":
        pair.cut(pair.two)
    else:
        connection_of(pair.two).close("as we wish")
    answers = [pdu for pdu in pair.one.pending() if isinstance(pdu.header, bhs.TaskManagementResponse)]
    assert len(answers) == 1
    assert not connection_of(pair.two)._probes


def test_aborts_without_end_do_not_pile_up() -> None:
    """Each costs a NOP-In on the other connection: as many as immediate tasks, then they wait no more."""
    pair = Pair(0)
    pair.one.send(pair.one.initiator.task_management(Function.ABORT_TASK_SET) * 500)
    assert len(connection_of(pair.two)._probes) == MAX_IMMEDIATE_TASKS
    assert len(pair.one.pending()) == 500 - MAX_IMMEDIATE_TASKS


def test_an_abort_reaches_tasks_of_a_lost_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §4.2.3.3: those in hand and those that ended meanwhile; their tags are free again."""
    pair.hold(monkeypatch)
    tasks = [pair.two.send_command(cdbs.read10(0, 1), read=512) for _ in range(2)]
    pair.cut(pair.two)
    pair.release()
    assert len(pair.session.tasks) == 2
    assert pair.one.task_management(Function.ABORT_TASK, task=tasks[0]) == Response.FUNCTION_COMPLETE
    assert pair.one.task_management(Function.ABORT_TASK_SET) == Response.FUNCTION_COMPLETE
    assert not pair.session.tasks
    pair.one.logout(RECOVERY, cid=2)
    for task in tasks:
        assert reassign(task, pair.one) == Response.TASK_DOES_NOT_EXIST
    monkeypatch.undo()
    assert pair.one.command(cdbs.read10(0, 1), read=512, initiator_task_tag=tasks[0].tag).good


def test_whatever_ends_the_session_ends_what_waits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 7143 §11.14.1, reason 0."""
    pair.hold(monkeypatch)
    pair.two.send_command(cdbs.read10(0, 1), read=512)
    pair.cut(pair.two)
    assert pair.one.logout().response == LogoutResponseCode.CLOSED
    assert not pair.alive
    assert not pair.session.lost
    assert not pair.target.units[0].tasks
    pair.release()


def test_every_connection_and_session_of_a_long_random_life_is_accounted_for() -> None:
    """Cuts, logins, logouts and reassignments at random: every command ends once, with right data."""
    dice = random.Random(71432)
    pair = Pair()
    model = bytearray(65536)
    peers: dict[int, MemoryPeer] = {1: pair.one, 2: pair.two}
    number = 2
    for _ in range(150):
        cid, peer = dice.choice(list(peers.items()))
        block, blocks = dice.randrange(100), dice.randrange(1, 9)
        size = blocks * 512
        if dice.randrange(2):
            data = dice.randbytes(size)
            task = peer.send_command(cdbs.write10(block, blocks), data, immediate_data=dice.choice([0, 512]))
            model[block * 512 : block * 512 + size] = data
        else:
            data = b""
            task = peer.send_command(cdbs.read10(block, blocks), read=size)
        if dice.randrange(3):
            reply = peer.wait(task)
        else:
            pair.cut(peer)
            del peers[cid]
            number += 1
            peer = peers[number] = pair.join(number)
            peer.logout(RECOVERY, cid=cid)
            reply = moved(task, peer)
        assert reply.good
        if not data:
            assert reply.data == model[block * 512 : block * 512 + size]
    assert bytes(pair.target.backends[0].read(0, 65536)) == model
    assert not pair.session.tasks
    pair.target.pass_time(WAIT + RETAIN + 1)
    assert not pair.session.lost
