"""Task management (RFC 7143 §11.5, §11.6; RFC 7144 §4; SAM-5 §7): a stuck medium holds nothing up."""

from collections.abc import Iterator
from typing import Any

import pytest

from protocol import bhs
from protocol.enums import RejectReason, ScsiStatus
from protocol.enums import TaskManagementFunction as Function
from protocol.enums import TaskManagementResponseCode as Response
from tests import cdbs
from tests.initiator import MemoryPeer, Rejected, SessionState, Task, encode_lun
from tests.protocol.target import TARGET, MemoryTarget, connection_of

RESET_OCCURRED = (0x29, 0x00)
DATA = bytes(range(256)) * 2


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryTarget]:
    """Two units; everything that touches the medium of either waits until ``lane.release()``."""
    target = MemoryTarget(luns=2)
    for backend in target.backends:
        monkeypatch.setattr(backend, "read_nowait", lambda offset, length: None)
        monkeypatch.setattr(backend, "write_nowait", lambda offset, data: False)
    target.lane.hold = True
    yield target
    for session in list(target.sessions.sessions.values()):
        target.sessions.end(session, "end of the test")
    target.lane.hold = False
    while target.lane.held:
        target.lane.release()
    assert not any(unit.tasks or unit._running or unit._barriers for unit in target.units)


def log_in(target: MemoryTarget, **login: Any) -> MemoryPeer:
    peer = target.connect()
    peer.login(TARGET, **login)
    for lun in range(2):
        peer.command(bytes(6), lun=lun)
    return peer


def tasks(peer: MemoryPeer) -> list[Task]:
    """One of each kind at LUN 0, all held up, and one at LUN 1."""
    peer.answer_r2ts = False
    return [
        peer.send_command(cdbs.read10(0, 1), read=512),
        peer.send_command(cdbs.write10(8, 1), DATA),
        peer.send_command(cdbs.write10(16, 8), DATA * 8, immediate_data=0, unsolicited=0),
        peer.send_command(cdbs.write10(1 << 30, 8), DATA * 8, immediate_data=0, final=False, unsolicited=0),
        peer.send_command(cdbs.read10(0, 1), read=512, lun=1),
    ]


def width(target: MemoryTarget) -> list[int]:
    return [s.max_cmd_sn - s.exp_cmd_sn + 1 for s in target.sessions.sessions.values()]


def drain(peer: MemoryPeer) -> list[object]:
    return [pdu.header for pdu in peer.pending()]


@pytest.mark.parametrize("which", range(4))
def test_abort_task_answers_at_once_and_the_task_says_nothing_more(stuck: MemoryTarget, which: int) -> None:
    peer = log_in(stuck)
    task = tasks(peer)[which]
    drain(peer)
    assert peer.task_management(Function.ABORT_TASK, task=task) == Response.FUNCTION_COMPLETE
    assert width(stuck) == [8 - 4]
    assert peer.task_management(Function.ABORT_TASK, task=task) == Response.TASK_DOES_NOT_EXIST
    stuck.lane.release()
    said = {header.initiator_task_tag for header in drain(peer)}  # type: ignore[attr-defined]
    assert task.tag not in said


def test_an_aborted_write_does_not_land_after_a_later_one(stuck: MemoryTarget) -> None:
    """Its thread may still be at work: a later command in its range waits."""
    peer = log_in(stuck)
    old = peer.send_command(cdbs.write10(0, 1), b"\x01" * 512)
    assert peer.task_management(Function.ABORT_TASK, task=old) == 0
    new = peer.send_command(cdbs.write10(0, 1), b"\x02" * 512)
    assert peer.pending() == []
    stuck.lane.release()
    stuck.lane.release()
    assert peer.wait(new).good
    assert bytes(stuck.backends[0].read(0, 512)) == b"\x02" * 512


def test_abort_of_what_is_not_there(stuck: MemoryTarget) -> None:
    """RFC 7143 §11.6.1."""
    peer = log_in(stuck)
    task = tasks(peer)[0]
    drain(peer)
    abort = peer.task_management
    assert abort(Function.ABORT_TASK, lun=1, referenced_task_tag=task.tag) == Response.TASK_DOES_NOT_EXIST
    assert abort(Function.ABORT_TASK, lun=0, referenced_task_tag=9999) == Response.TASK_DOES_NOT_EXIST
    assert task.tag in next(iter(stuck.sessions.sessions.values())).tasks


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("arrived", [False, True])
def test_abort_of_a_command_still_on_its_way(gap: int, arrived: bool) -> None:
    """RFC 7143 §11.6.1 b: inside the window it counts as received; it must not run when it does come."""
    target = MemoryTarget()
    peer = target.logged_in()
    number = peer.session.cmd_sn
    write = peer.initiator.scsi_command(
        cdbs.write10(0, 1), DATA, write=True, expected=512, initiator_task_tag=700, cmd_sn=number + gap
    )
    peer.session.cmd_sn = number + gap + 1
    if arrived and gap:
        peer.send(write)
    reply = peer.task_management(Function.ABORT_TASK, referenced_task_tag=700, ref_cmd_sn=number + gap)
    assert reply == Response.FUNCTION_COMPLETE
    peer.send(write)
    for n in range(gap):
        peer.send(peer.initiator.nop_out(cmd_sn=number + n, initiator_task_tag=800 + n))
    assert [pdu.initiator_task_tag for pdu in peer.pending()] == [800 + n for n in range(gap)]
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)
    assert peer.command(cdbs.write10(0, 1), DATA).good  # the numbers go on
    assert width(target) == [8]


def test_a_function_ends_only_what_came_before_it() -> None:
    """RFC 7143 §11.5.1: all three in one delivery."""
    target = MemoryTarget()
    peer = target.logged_in()
    peer.answer_r2ts = False
    before = peer.send_command(cdbs.write10(0, 1), DATA, immediate_data=0, unsolicited=0)
    peer.wait_for_r2t(before)
    reset = peer.initiator.task_management(Function.ABORT_TASK_SET, immediate=False, initiator_task_tag=500)
    after = peer.initiator.scsi_command(
        cdbs.write10(8, 1), DATA, write=True, expected=512, initiator_task_tag=501
    )
    peer.send(reset + after)
    assert [pdu.initiator_task_tag for pdu in peer.pending()] == [500, 501]
    assert bytes(target.backends[0].read(8 * 512, 512)) == DATA


def test_a_function_waits_for_its_turn() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    number = peer.session.cmd_sn
    peer.send(
        peer.initiator.task_management(
            Function.LOGICAL_UNIT_RESET, immediate=False, cmd_sn=number + 1, initiator_task_tag=500
        )
    )
    assert peer.pending() == []
    peer.send(peer.initiator.nop_out(cmd_sn=number, initiator_task_tag=499))
    assert [pdu.initiator_task_tag for pdu in peer.pending()] == [499, 500]


ENDS: dict[Function, tuple[bool, bool, bool]] = {
    # (the caller's tasks at this unit, the other session's, those at other units)
    Function.ABORT_TASK_SET: (True, False, False),
    Function.CLEAR_TASK_SET: (True, True, False),
    Function.LOGICAL_UNIT_RESET: (True, True, False),
    Function.TARGET_WARM_RESET: (True, True, True),
    Function.I_T_NEXUS_RESET: (True, False, True),
    Function.QUERY_TASK_SET: (False, False, False),
    Function.CLEAR_ACA: (False, False, False),
}


@pytest.mark.parametrize("function", ENDS)
def test_which_tasks_a_function_ends(stuck: MemoryTarget, function: Function) -> None:
    """SAM-5 §7; each answered while the medium is stuck."""
    level = {"iSCSIProtocolLevel": "2"}
    one, two = log_in(stuck, keys=level), log_in(stuck, keys=level)
    mine, theirs = tasks(one), tasks(two)
    drain(one)
    drain(two)
    answer = one.task_management(function)
    expected = (
        Response.FUNCTION_SUCCEEDED if function == Function.QUERY_TASK_SET else Response.FUNCTION_COMPLETE
    )
    assert answer == expected
    here, others, elsewhere = ENDS[function]
    first, second = stuck.sessions.sessions.values()
    assert ({task.tag for task in mine[:4]} & first.tasks.keys() == set()) == here
    assert (mine[4].tag not in first.tasks) == elsewhere
    running = {task.tag for task in theirs[:3]} & second.tasks.keys()
    assert (running == set()) == others
    assert (theirs[4].tag not in second.tasks) == (elsewhere and others)
    stuck.lane.hold = False
    stuck.lane.release()
    said = {header.initiator_task_tag for header in drain(one)}  # type: ignore[attr-defined]
    if here:
        assert not said & {task.tag for task in mine[:4]}
    for session in (first, second):
        held = sum(task.cmd_sn is not None for task in session.tasks.values())
        assert session.max_cmd_sn - session.exp_cmd_sn + 1 == 8 - held


@pytest.mark.parametrize("function", [Function.LOGICAL_UNIT_RESET, Function.TARGET_WARM_RESET])
def test_a_reset_is_told_to_every_session(function: Function) -> None:
    """SAM-5 §6.3.3: a unit attention, the caller's too."""
    target = MemoryTarget(luns=2)
    one, two = log_in(target), log_in(target)
    assert one.task_management(function) == 0
    for peer in (one, two):
        first = peer.command(bytes(6))
        assert first.sense_key == 6
        assert first.additional_sense is not None
        assert first.additional_sense[0] == 0x29
        assert peer.command(bytes(6)).good
        at_the_other = peer.command(bytes(6), lun=1)
        assert (at_the_other.sense_key == 6) == (function == Function.TARGET_WARM_RESET)


def test_clearing_a_task_set_is_told_to_the_losers(stuck: MemoryTarget) -> None:
    one, two = log_in(stuck), log_in(stuck)
    tasks(two)
    drain(two)
    assert one.task_management(Function.CLEAR_TASK_SET) == 0
    assert one.command(bytes(6)).good
    assert two.command(bytes(6)).additional_sense == (0x2F, 0x00)


def test_a_cold_reset_is_answered_and_then_everybody_goes(stuck: MemoryTarget) -> None:
    """RFC 7143 §11.5.1: all sessions end."""
    one, two = log_in(stuck), log_in(stuck)
    tasks(one)
    tasks(two)
    drain(one)
    assert one.task_management(Function.TARGET_COLD_RESET) == 0
    assert not stuck.sessions.sessions
    assert connection_of(one).closing == connection_of(two).closing == "target cold reset"


@pytest.mark.parametrize(
    "function",
    [
        Function.ABORT_TASK_SET, Function.CLEAR_ACA, Function.CLEAR_TASK_SET, Function.LOGICAL_UNIT_RESET,
        Function.QUERY_TASK, Function.QUERY_TASK_SET, Function.QUERY_ASYNC_EVENT,
    ],
)  # fmt: skip
def test_a_lun_that_does_not_exist(function: Function) -> None:
    peer = log_in(MemoryTarget(luns=2), keys={"iSCSIProtocolLevel": "2"})
    assert peer.task_management(function, lun=7) == Response.LUN_DOES_NOT_EXIST
    assert peer.task_management(function, lun=b"\xff" * 8) == Response.LUN_DOES_NOT_EXIST


@pytest.mark.parametrize("function", [0, 13, 64, 127])
def test_a_function_that_does_not_exist(function: int) -> None:
    assert log_in(MemoryTarget(luns=2)).task_management(function) == Response.FUNCTION_NOT_SUPPORTED


def test_reassignment_needs_level_2() -> None:
    """RFC 7143 §11.6.1, response 4."""
    peer = log_in(MemoryTarget(luns=2))
    answer = peer.task_management(Function.TASK_REASSIGN, referenced_task_tag=1)
    assert answer == Response.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED


@pytest.mark.parametrize("function", range(9, 13))
def test_the_functions_of_rfc_7144_need_its_level(function: int) -> None:
    assert log_in(MemoryTarget(luns=2)).task_management(function) == Response.FUNCTION_NOT_SUPPORTED


def test_queries(stuck: MemoryTarget) -> None:
    """RFC 7144 §4; SAM-5 §7.8 to §7.10."""
    peer = log_in(stuck, keys={"iSCSIProtocolLevel": "2"})
    query = peer.task_management
    assert query(Function.QUERY_TASK_SET) == Response.FUNCTION_COMPLETE
    task = peer.send_command(cdbs.read10(0, 1), read=512)
    assert query(Function.QUERY_TASK, task=task) == Response.FUNCTION_SUCCEEDED
    assert query(Function.QUERY_TASK_SET) == Response.FUNCTION_SUCCEEDED
    assert query(Function.QUERY_TASK_SET, lun=1) == Response.FUNCTION_COMPLETE
    assert query(Function.QUERY_TASK, lun=1, referenced_task_tag=task.tag) == Response.FUNCTION_COMPLETE
    stuck.lane.release()
    assert peer.wait(task).good
    assert query(Function.QUERY_TASK, lun=0, referenced_task_tag=task.tag) == Response.FUNCTION_COMPLETE


def test_a_pending_unit_attention_can_be_asked_for() -> None:
    """RFC 7144 §5: Additional Response Information: one or more than one, sense key, ASC, ASCQ."""
    target = MemoryTarget()
    peer = target.connect(strict=False)  # those bytes were reserved before RFC 7144
    peer.login(TARGET, keys={"iSCSIProtocolLevel": "2"})
    pdu = peer.request(peer.initiator.task_management(Function.QUERY_ASYNC_EVENT))
    header = pdu.expect(bhs.TaskManagementResponse)
    assert header.response == Response.FUNCTION_SUCCEEDED
    assert bytes.fromhex(peer.initiator.breaches[-1].split()[5])[8:12] == b"\x16\x29\x00\x00"
    peer.command(bytes(6))
    assert peer.task_management(Function.QUERY_ASYNC_EVENT) == Response.FUNCTION_COMPLETE


def test_a_discovery_session_has_no_tasks_to_manage() -> None:
    """RFC 7143 §4.3: MUST be rejected."""
    peer = MemoryTarget().connect()
    peer.login(None)
    with pytest.raises(Rejected) as rejected:
        peer.task_management(Function.TARGET_COLD_RESET)
    assert rejected.value.reason == RejectReason.PROTOCOL_ERROR


def test_what_a_lost_session_left_running_says_nothing_and_harms_nobody(stuck: MemoryTarget) -> None:
    one = log_in(stuck)
    tasks(one)
    drain(one)
    two = stuck.connect(session=SessionState(isid=one.session.isid))
    two.login(TARGET)
    stuck.lane.release()
    assert drain(one) == drain(two) == []
    assert two.command(bytes(6)).status == ScsiStatus.CHECK_CONDITION
    assert two.command(bytes(6), lun=encode_lun(1)).status == ScsiStatus.CHECK_CONDITION
    assert two.command(bytes(6)).good
