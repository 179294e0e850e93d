"""Task management functions (RFC 7143 §11.5, RFC 7144 §4, SAM-5 §7): one function each, one table.

Whoever runs these has carried out everything that came before in the session's order; so a task that is
not in the task set now has never been there or is over. Nothing here waits for a medium: a task that a
worker has in hand is forgotten at once, and the logical unit keeps its range closed to later commands
until the worker is done with it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol import serial
from protocol.bhs import TaskManagementRequest
from protocol.enums import TaskManagementFunction as Function
from protocol.enums import TaskManagementResponse as Response
from protocol.scsi.device import LogicalUnit, Reset, Target
from protocol.task import Task

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.session import Session

__all__ = ["execute", "forget_aborted"]


def forget_aborted(request: object) -> None:
    """Tell the transport that a logical unit aborted one of its tasks (``LogicalUnit.aborted``)."""
    assert isinstance(request, Task)
    request.connection.forget(request)


def execute(connection: "Connection", request: TaskManagementRequest) -> None:
    """Carry out one function and queue its response."""
    session = connection.session
    if session is None or session.target is None:
        connection.answer_task_management(request, Response.FUNCTION_REJECTED)
        return
    function = _FUNCTIONS.get(request.flags & 0x7F)
    if function is None:
        answer = Response.FUNCTION_NOT_SUPPORTED
    else:
        answer = function(session, session.target, request)
    connection.answer_task_management(request, answer)
    if request.flags & 0x7F == Function.TARGET_COLD_RESET and answer == Response.FUNCTION_COMPLETE:
        _drop_everybody(connection, session.target)


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
            session.in_turn(request.ref_cmd_sn, session.retired)
            return Response.FUNCTION_COMPLETE
    return Response.TASK_DOES_NOT_EXIST


def _abort_task_set(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    for task in unit.abort_task_set(session.nexus):
        forget_aborted(task)
    return Response.FUNCTION_COMPLETE


def _clear_task_set(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    for task in unit.clear_task_set(session.nexus):
        forget_aborted(task)
    return Response.FUNCTION_COMPLETE


def _clear_aca(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """No ACA condition is ever established (NormACA=0), so there is none to clear (SAM-5 §7.4)."""
    return Response.FUNCTION_COMPLETE if _unit(target, request) else Response.LUN_DOES_NOT_EXIST


def _logical_unit_reset(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    unit = _unit(target, request)
    if unit is None:
        return Response.LUN_DOES_NOT_EXIST
    for task in unit.reset(session.nexus, Reset.LOGICAL_UNIT):
        forget_aborted(task)
    return Response.FUNCTION_COMPLETE


def _target_reset(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    cold = request.flags & 0x7F == Function.TARGET_COLD_RESET
    for task in target.reset(session.nexus, Reset.TARGET_COLD if cold else Reset.TARGET_WARM):
        forget_aborted(task)
    return Response.FUNCTION_COMPLETE


def _drop_everybody(connection: "Connection", target: Target) -> None:
    """TARGET COLD RESET ends all sessions with the target (RFC 7143 §11.5.1, function 7)."""
    table = connection.sessions
    for session in [session for session in table.sessions.values() if session.target is target]:
        table.end(session, "target cold reset")


def _task_reassign(session: "Session", target: Target, request: TaskManagementRequest) -> Response:
    """Only with ErrorRecoveryLevel 2 (RFC 7143 §11.6.1, response 4)."""
    return Response.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED


_FUNCTIONS: dict[int, Callable[["Session", Target, TaskManagementRequest], Response]] = {
    Function.ABORT_TASK: _abort_task,
    Function.ABORT_TASK_SET: _abort_task_set,
    Function.CLEAR_ACA: _clear_aca,
    Function.CLEAR_TASK_SET: _clear_task_set,
    Function.LOGICAL_UNIT_RESET: _logical_unit_reset,
    Function.TARGET_WARM_RESET: _target_reset,
    Function.TARGET_COLD_RESET: _target_reset,
    Function.TASK_REASSIGN: _task_reassign,
}
