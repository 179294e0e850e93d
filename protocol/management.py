"""Task management functions (RFC 7143 §11.5, RFC 7144 §4, SAM-5 §7): one function each, one table.

They are carried out in the session's order, between the command before and the command behind: what came
before is in the task set or over, what comes behind is not there yet. Nothing here waits for a medium: a
task that a worker has in hand is forgotten at once, and the logical unit keeps its range closed to later
commands until the worker is done with it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from protocol import allegiance, serial
from protocol.bhs import TaskManagementRequest
from protocol.enums import TaskManagementFunction as Function
from protocol.enums import TaskManagementResponseCode as Response
from protocol.events import End, EndReason
from protocol.scsi.device import LogicalUnit, Reset, Target
from protocol.scsi.sense import CheckCondition, Sense
from protocol.task import Task

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.session import Session

__all__ = ["answer_aborted", "execute", "forget_aborted"]


def forget_aborted(request: object) -> None:
    """Tell the transport that a logical unit aborted one of its tasks (``LogicalUnit.aborted``)."""
    assert isinstance(request, Task)
    request.connection.forget(request)


def answer_aborted(request: object, sense: Sense) -> None:
    """End a task that the operator's doing has taken out of its task set with CHECK CONDITION and this sense:
    no initiator asked for that, so none knows that there is nothing to wait for."""
    assert isinstance(request, Task)
    request.connection.conclude(request, request.unit.check(CheckCondition(sense)))


def execute(
    connection: "Connection", session: "Session", target: Target, request: TaskManagementRequest
) -> None:
    """Carry out one function and queue its response."""
    code = request.flags & 0x7F
    function = _FUNCTIONS.get(code)
    additional = bytes(3)
    if function is None or (code in _RFC7144 and session.keys.iscsi_protocol_level < 2):
        answer = Response.FUNCTION_NOT_SUPPORTED
    else:
        answer = function(session, target, request)
        if code == Function.QUERY_ASYNC_EVENT and answer == Response.FUNCTION_SUCCEEDED:
            additional = _pending_attention(session, target, request)
    others = [
        other for other in session.connections.values() if other is not connection and not other.closing
    ]
    if code in _MULTI_TASK and answer == Response.FUNCTION_COMPLETE and others:
        _Conclusion(connection, request, others)
        return
    connection.answer_task_management(request, answer, additional)
    if code == Function.TASK_REASSIGN and answer == Response.FUNCTION_COMPLETE:
        allegiance.resume(session, connection, request)
    if code == Function.TARGET_COLD_RESET and answer == Response.FUNCTION_COMPLETE:
        _drop_everybody(connection, target)


class _Conclusion:
    """The answer to a multi-task abort, which must come after every status sent before it, wherever that was
    sent (RFC 7143 §4.2.3.3 d). On its own connection it does; the others are asked for a sign, and the last
    one to give it sets the answer free. Step a of the same, waiting for Data-Out that is still due, is not
    done: our Target Transfer Tags do not come again, and half of all initiators send no more (FastAbort)."""

    def __init__(
        self, connection: "Connection", request: TaskManagementRequest, others: "list[Connection]"
    ) -> None:
        self.connection = connection
        self.request = request
        self.waiting = len(others)
        for other in others:
            other.now = connection.now
            other.probe(self._one_has_shown)

    def _one_has_shown(self) -> None:
        self.waiting -= 1
        if not self.waiting and not self.connection.closing:
            self.connection.answer_task_management(self.request, Response.FUNCTION_COMPLETE)
            self.connection.sessions.stirred.add(self.connection)


def _forget(session: "Session", unit: LogicalUnit | None, dropped: Sequence[object]) -> None:
    """Nothing more is sent for what a unit (None: every unit) dropped, nor for commands it refused whose
    data is still being drained: they are in no task set, but the initiator counts them."""
    for task in dropped:
        forget_aborted(task)
    for task in list(session.tasks.values()):
        if task.transfer is not None and task.transfer.outcome is not None and unit in (None, task.unit):
            task.connection.forget(task)
    if session.lost:
        allegiance.forget_waiting(session, unit)


def _unit(target: Target, request: TaskManagementRequest) -> LogicalUnit | None:
    unit = target.unit_for(request.lun)
    return None if unit.absent else unit


def _abort_task(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """RFC 7143 §11.5.5, §11.6.1: a task not here that is inside the window counts as received."""
    task = session.tasks.get(request.referenced_task_tag)
    if task is not None and task.lun == request.lun:
        task.unit.abort(task)
        task.connection.forget(task)
        return Response.FUNCTION_COMPLETE
    if task is None and serial.le(session.exp_cmd_sn, request.ref_cmd_sn):
        inside = serial.le(request.ref_cmd_sn, session.max_cmd_sn)
        if inside and serial.lt(request.ref_cmd_sn, request.cmd_sn):
            session.skip(request.ref_cmd_sn)
            return Response.FUNCTION_COMPLETE
    return Response.TASK_DOES_NOT_EXIST


def _abort_task_set(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    _forget(session, unit, unit.abort_task_set(session.nexus))
    return Response.FUNCTION_COMPLETE


def _clear_task_set(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    _forget(session, unit, unit.clear_task_set(session.nexus))
    return Response.FUNCTION_COMPLETE


def _clear_aca(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """No ACA condition is ever established (NormACA=0), so there is none to clear (SAM-5 §7.4)."""
    return Response.FUNCTION_COMPLETE if _unit(target, request) else Response.LUN_DOES_NOT_EXIST


def _logical_unit_reset(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    _forget(session, unit, unit.reset(session.nexus, Reset.LOGICAL_UNIT))
    return Response.FUNCTION_COMPLETE


def _target_reset(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    cold = request.flags & 0x7F == Function.TARGET_COLD_RESET
    _forget(session, None, target.reset(session.nexus, Reset.TARGET_COLD if cold else Reset.TARGET_WARM))
    return Response.FUNCTION_COMPLETE


def _drop_everybody(connection: "Connection", target: Target) -> None:
    """TARGET COLD RESET ends all sessions with the target (RFC 7143 §11.5.1, function 7)."""
    table = connection.sessions
    for session in [session for session in table.sessions.values() if session.target is target]:
        table.end(session, End(EndReason.TARGET_RESET, "target cold reset"), notice=True)


def _query_task(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """SAM-5 §7.9: is this task in the task set?"""
    if _unit(target, request) is None:
        return Response.LUN_DOES_NOT_EXIST
    task = session.tasks.get(request.referenced_task_tag)
    there = task is not None and task.lun == request.lun
    return Response.FUNCTION_SUCCEEDED if there else Response.FUNCTION_COMPLETE


def _query_task_set(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """SAM-5 §7.10: is any task of this nexus in the task set?"""
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    there = any(task.nexus is session.nexus for task in unit.tasks)
    return Response.FUNCTION_SUCCEEDED if there else Response.FUNCTION_COMPLETE


def _nexus_reset(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """SAM-5 §7.6: as if the session had gone and come back, on every unit."""
    _forget(session, None, target.nexus_lost(session.nexus))
    return Response.FUNCTION_COMPLETE


def _query_async_event(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """SAM-5 §7.8: is a unit attention pending for this nexus?"""
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    pending = session.nexus in unit.attentions.pending
    return Response.FUNCTION_SUCCEEDED if pending else Response.FUNCTION_COMPLETE


def _pending_attention(session: "Session", target: Target, request: TaskManagementRequest) -> bytes:
    """UADE DEPTH and sense key, ASC, ASCQ of what is reported next (SAM-5 §7.8)."""
    pending = target.unit_for(request.lun).attentions.pending[session.nexus]
    sense = pending[0]
    depth = 0x10 if len(pending) == 1 else 0x20
    return bytes((depth | sense.key, sense.asc, sense.ascq))


def _task_reassign(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """RFC 7143 §7.2.2. The LUN field is reserved (§11.5.4)."""
    return allegiance.may_reassign(session, request)


_FUNCTIONS: dict[int, Callable[["Session", Target, TaskManagementRequest], Response]] = {
    Function.ABORT_TASK: _abort_task,
    Function.ABORT_TASK_SET: _abort_task_set,
    Function.CLEAR_ACA: _clear_aca,
    Function.CLEAR_TASK_SET: _clear_task_set,
    Function.LOGICAL_UNIT_RESET: _logical_unit_reset,
    Function.TARGET_WARM_RESET: _target_reset,
    Function.TARGET_COLD_RESET: _target_reset,
    Function.TASK_REASSIGN: _task_reassign,
    Function.QUERY_TASK: _query_task,
    Function.QUERY_TASK_SET: _query_task_set,
    Function.I_T_NEXUS_RESET: _nexus_reset,
    Function.QUERY_ASYNC_EVENT: _query_async_event,
}

_MULTI_TASK = frozenset(
    (
        Function.ABORT_TASK_SET,
        Function.CLEAR_TASK_SET,
        Function.LOGICAL_UNIT_RESET,
        Function.TARGET_WARM_RESET,
    )
)
"""TARGET COLD RESET is one, too (RFC 7143 §4.2.3.3), but it closes every connection behind its answer."""

_RFC7144 = frozenset(
    (Function.QUERY_TASK, Function.QUERY_TASK_SET, Function.I_T_NEXUS_RESET, Function.QUERY_ASYNC_EVENT)
)
"""Only when iSCSIProtocolLevel 2 was negotiated (RFC 7144 §4)."""
