"""Which connection a task belongs to, and what becomes of it when that connection goes (RFC 7143 §4.2.2.1,
§7.1.4, §7.2.2, §7.11, §11.14, §11.15).

A task is allegiant to the connection its command came on. When that ends it is, by ErrorRecoveryLevel of
the session::

    the connection …                            level 0, 1                     level 2
    is logged out ("close the connection")      its tasks end                  its tasks end
    is cut                                      the session ends               it is *lost*: its tasks wait
    logs in again with its CID                  its tasks end                  its tasks may be reassigned
    is logged out ("remove for recovery")       refused                        its tasks may be reassigned

Tasks that wait end when Time2Wait and Time2Retain have passed since the connection was lost, or since it
was logged out. Meanwhile they go on: a command that the logical unit has in hand is carried out, and how it
ended is kept, as is what was sent and not acknowledged. TASK REASSIGN then moves one task to the connection
it comes on, which carries on from the data that the initiator has. A session outlives all its connections
for as long as one is lost.

With levels 0 and 1 a cut ends the whole session: RFC 7143 §7.1.5 leaves these levels nothing but session
recovery for a connection that fails, and whatever was on its way there would be a hole in the order of
commands that nobody can fill. An orderly logout of one connection leaves the session to the others.

Time comes as an argument, as everywhere here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.bhs import ScsiResponse, TaskManagementRequest
from protocol.enums import AsyncEvent
from protocol.enums import TaskManagementResponseCode as Response
from protocol.events import End, EndReason
from protocol.scsi.request import Outcome
from protocol.scsi.sense import Sense

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.recovery import Recovery, Sent
    from protocol.session import Session, SessionTable
    from protocol.task import Task

__all__ = [
    "Lost",
    "ended_meanwhile",
    "excuse",
    "expire",
    "forget_waiting",
    "is_known",
    "log_out",
    "lose",
    "may_reassign",
    "remove_for_recovery",
    "resume",
    "terminate",
]


@dataclass(slots=True)
class Lost:
    """A connection that is gone and whose tasks wait."""

    cid: int
    recovery: "Recovery"
    until: float
    """When its tasks end."""
    logged_out: bool = False
    """For recovery, explicitly or by a new login: now its tasks may be reassigned (RFC 7143 §7.2.2)."""


# -- a connection goes --------------------------------------------------------------------------------


def lose(table: "SessionTable", session: "Session", connection: "Connection", reason: End) -> None:
    """A connection of the session was cut, or given up by us."""
    del session.connections[connection.cid]
    keys = session.keys
    if keys.error_recovery_level < 2:
        table.end(session, reason, notice=True)
        return
    if not keys.default_time2retain:
        # Nothing may be kept (RFC 7143 §11.9.1, §13.16): the tasks end, the session is left to the others.
        terminate(session, connection)
        if not session.connections and not session.lost:
            table.end(session, reason)
    else:
        _retain(session, connection, logged_out=False)
    for other in session.connections.values():
        if other.closing:
            continue
        other.asynchronous(
            AsyncEvent.CONNECTION_DROP,
            parameter1=connection.cid,
            parameter2=keys.default_time2wait,
            parameter3=keys.default_time2retain,
        )


def remove_for_recovery(session: "Session", cid: int) -> bool:
    """Log a connection out so that its tasks may be reassigned; False: there is no such connection.

    RFC 7143 §11.14.1 (reason 2), and §6.3.4 for a login with its CID.
    """
    connection = session.connections.pop(cid, None)
    if connection is not None:
        _retain(session, connection, logged_out=True)
        connection.close(End(EndReason.RECOVERY, "connection removed for recovery"))
        return True
    found = [lost for lost in session.lost.values() if lost.cid == cid]
    for lost in found:
        lost.logged_out = True
        lost.until = _until(session, lost.recovery.connection)
    return bool(found)


def log_out(session: "Session", cid: int) -> None:
    """Close a connection in good order (RFC 7143 §11.14.1, reason 1): its tasks end."""
    connection = session.connections.pop(cid, None)
    if connection is not None:
        terminate(session, connection)
        connection.close(End(EndReason.LOGOUT, "logout of the connection"))
        return
    for lost in [lost for lost, of in session.lost.items() if of.cid == cid]:
        terminate(session, lost)


def is_known(session: "Session", cid: int) -> bool:
    """Whether the session has this connection, or waits for it."""
    return cid in session.connections or any(lost.cid == cid for lost in session.lost.values())


def terminate(session: "Session", connection: "Connection") -> None:
    """End the tasks of a connection without a word to the initiator, which learns it by unit attention on
    its next command: SOME COMMANDS CLEARED BY ISCSI PROTOCOL EVENT (RFC 7143 §7.11)."""
    units = {task.unit for task in session.tasks.values() if task.connection is connection}
    session.forget_tasks(connection)
    session.lost.pop(connection, None)
    for unit in units:
        unit.raise_attention(Sense.SOME_COMMANDS_CLEARED, only=session.nexus)


def _until(session: "Session", connection: "Connection") -> float:
    keys = session.keys
    return connection.sessions.now + keys.default_time2wait + keys.default_time2retain


def _retain(session: "Session", connection: "Connection", *, logged_out: bool) -> None:
    recovery = connection.recovery
    assert recovery is not None
    # As many wait as there may be connections: one that is cut again and again must not leave ever more.
    while len(session.lost) > session.keys.max_connections:
        terminate(session, next(iter(session.lost)))
    session.lost[connection] = Lost(connection.cid, recovery, _until(session, connection), logged_out)
    # What came before its turn was not acknowledged by ExpCmdSN: it comes again, on another connection.
    for cmd_sn, early in list(session.held.items()):
        if early is not None and early.connection is connection:
            del session.held[cmd_sn]


def expire(table: "SessionTable", session: "Session", now: float) -> None:
    """Time has passed: end what waited for too long (RFC 7143 §7.11, cases b and c)."""
    for connection, lost in list(session.lost.items()):
        if now > lost.until:
            terminate(session, connection)
    if not session.connections and not session.lost:
        words = "no connection came back within Time2Wait and Time2Retain"
        table.end(session, End(EndReason.RECOVERY_TIMEOUT, words))


def excuse(session: "Session", seconds: float) -> None:
    """For so long nobody was here to listen: who is waited for has so much longer."""
    for lost in session.lost.values():
        lost.until += seconds


# -- a task waits -------------------------------------------------------------------------------------


def ended_meanwhile(session: "Session", task: "Task", outcome: Outcome) -> None:
    """A command ended while its connection is gone: keep how, if there is room."""
    recovery = task.connection.recovery
    if recovery is None or session.keys.error_recovery_level < 2 or session.ended:
        return
    if session.tasks.get(task.initiator_task_tag) is task and not recovery.keep_outcome(task, outcome):
        task.connection.forget(task)


def forget_waiting(session: "Session", unit: object | None) -> None:
    """A multi-task abort of this unit (None: every unit) concludes commands that ended meanwhile, too."""
    for lost in list(session.lost.values()):
        for tag in list(lost.recovery.waiting):
            task = session.tasks.get(tag)
            if task is not None and unit in (None, task.unit):
                task.connection.forget(task)


# -- TASK REASSIGN ------------------------------------------------------------------------------------


def _answered(session: "Session", tag: int) -> "tuple[Recovery, Sent | None, ScsiResponse, bytes] | None":
    """A command that has ended and whose status was not acknowledged, wherever it was sent: what is kept of
    its data, and its response."""
    live = [c.recovery for c in session.connections.values() if c.recovery is not None]
    for recovery in (*(lost.recovery for lost in session.lost.values()), *live):
        found = recovery.response_of(tag)
        if found is not None:
            return recovery, recovery.sent.get(tag), ScsiResponse.parse(found[0]), bytes(found[1])
    return None


def may_reassign(session: "Session", request: TaskManagementRequest) -> Response:
    """What TASK REASSIGN is answered with (RFC 7143 §7.2.2, §11.6.1)."""
    if session.keys.error_recovery_level < 2:
        return Response.TASK_ALLEGIANCE_REASSIGNMENT_NOT_SUPPORTED
    tag = request.referenced_task_tag
    task = session.tasks.get(tag)
    if task is not None:
        connection = task.connection
    else:
        found = _answered(session, tag)
        if found is None:
            return Response.TASK_DOES_NOT_EXIST
        connection = found[0].connection
        sent = found[1]
        if sent is not None and _reference(sent, request.exp_data_sn) < sent.forgotten:
            return Response.TASK_DOES_NOT_EXIST  # its data could not be kept
    lost = session.lost.get(connection)
    return (
        Response.FUNCTION_COMPLETE if lost is not None and lost.logged_out else Response.TASK_STILL_ALLEGIANT
    )


def resume(session: "Session", connection: "Connection", request: TaskManagementRequest) -> None:
    """Carry on here what ``may_reassign`` has allowed. Its answer has been sent: it comes first."""
    tag = request.referenced_task_tag
    task = session.tasks.get(tag)
    recovery = connection.recovery
    assert recovery is not None
    if task is None:
        found = _answered(session, tag)
        assert found is not None
        old, sent, response, data = found
        _send_again(recovery, old, sent, response, data, request.exp_data_sn)
        return
    old_connection, task.connection = task.connection, connection
    assert old_connection.recovery is not None
    old_connection.writes.disown(task)
    sent = old_connection.recovery.sent.get(tag)
    if sent is not None:  # R2Ts, and the initiator says by ExpDataSN which of them it knows
        task.data_sn = _reference(sent, request.exp_data_sn)
    outcome = old_connection.recovery.take_outcome(tag)
    old_connection.recovery.drop(tag)
    if outcome is not None:
        connection.complete(task, outcome)
    elif task.transfer is not None and task.transfer.open:
        connection.writes.adopt(task)


def _reference(sent: "Sent", exp_data_sn: int) -> int:
    """The data acknowledgement reference number: ExpDataSN, if it can be one (RFC 7143 §11.5.6)."""
    return exp_data_sn if sent.acknowledged <= exp_data_sn <= sent.next_sn else sent.acknowledged


def _send_again(
    recovery: "Recovery",
    old: "Recovery",
    sent: "Sent | None",
    response: ScsiResponse,
    sense: bytes,
    exp_data_sn: int,
) -> None:
    """Data-In from the reference number on, cut as this connection takes it, and the status anew."""
    tag = response.initiator_task_tag
    if sent is not None:
        number = _reference(sent, exp_data_sn)
        data, offset = old.unacknowledged(sent, number)
        response.exp_data_sn = recovery.carry_on(tag, sent.lun, number, data, offset)
    old.forget_answer(response.stat_sn)
    recovery.answer_again(response, sense)
