"""Our test initiator with ErrorRecoveryLevel 1 and 2: it loses PDUs and gets them again (RFC 7143 §7.1.4).

``Recovering`` is a conversation whose PDUs may be damaged on the way. What is missing shows in the numbers:

* StatSN jumps: a status is missing, Status SNACK asks for it;
* DataSN jumps, or ExpDataSN of the response is more than what came: Data SNACK;
* the target does not acknowledge a command (ExpCmdSN), or rejects it for its data digest: it is sent again;
* nothing comes at all: ``idle`` looks at all of that, and pings, as the answer tells the StatSN.

Status is acknowledged only when the data of its command is complete (RFC 7143 §11.7.2). Lost Data-Out is the
target's to ask for.

``reassign`` moves a task to another connection of the session, strict or not.
"""

from typing import Any, cast

from protocol import bhs
from protocol.enums import RESERVED_TAG, RejectReason, ScsiStatus, SnackType
from protocol.enums import TaskManagementFunction as Function
from tests.initiator import ConnectionClosed, Conversation, Reply, Residuals, SocketInitiator, Task
from tests.initiator_wire import Initiator, Pdu, serial_lt

__all__ = ["LossyInitiator", "Recovering", "RecoveringSocket", "reassign"]


class LossyInitiator(Initiator):
    """Numbers may jump and come twice: ``Recovering`` judges them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lossy = True

    def _check(self, pdu: Pdu) -> None:
        header = cast(Any, pdu.header)
        if isinstance(header, bhs.LoginResponse):
            super()._check(pdu)
        else:
            self._check_window(header.exp_cmd_sn, header.max_cmd_sn)


class Recovering(Conversation):
    """A conversation that recovers what it loses. Commands, writes and NOP only."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands: dict[int, tuple[int, bytes]] = {}
        """Task tag → CmdSN and what was sent, until the target acknowledges it."""
        self.statuses: set[int] = set()
        """StatSNs that are here and done with, ahead of ExpStatSN."""
        self.responses: dict[int, tuple[bhs.ScsiResponse, bytes]] = {}
        """Task tag → a response whose data is not complete."""
        self.highest = 0
        """The StatSN behind the last that was seen."""
        self.snacks = 0
        self.retries = 0

    def send_command(self, *arguments: Any, **options: Any) -> Task:
        """As ``Conversation.send_command``; what it sends is kept for a retry."""
        sent: list[bytes] = []
        send, self.send = self.send, sent.append  # type: ignore[method-assign]
        try:
            task = super().send_command(*arguments, **options)
        finally:
            self.send = send  # type: ignore[method-assign]
        self.commands[task.tag] = task.cmd_sn, b"".join(sent)
        self.send(b"".join(sent))
        return task

    def wait(self, task: Task | int) -> Reply:
        """Read until the task has ended, and recover while nothing comes."""
        if isinstance(task, int):
            task = self.tasks[task]
        while task.reply is None:
            try:
                pdu = self.receive()
            except (TimeoutError, ConnectionClosed) as error:
                self.idle(error)
            else:
                self._dispatch(pdu)
        self.tasks.pop(task.tag, None)
        return task.reply

    def idle(self, error: Exception) -> None:
        """Nothing came: ask for what is missing, send again what was not acknowledged, ping."""
        if isinstance(error, ConnectionClosed):
            raise error
        session = self.session
        for tag, (cmd_sn, sent) in sorted(self.commands.items(), key=lambda item: item[1][0]):
            if session.exp_cmd_sn is not None and not serial_lt(cmd_sn, session.exp_cmd_sn):
                self.retries += 1
                self.send(sent)
            elif tag not in self.tasks:
                del self.commands[tag]
        self._ask_for_statuses()
        for tag in list(self.responses):
            self._try_to_finish(self.tasks[tag])
        self.send(self.initiator.nop_out(immediate=True))

    # -- what comes --

    def _dispatch(self, pdu: Pdu) -> None:
        header = cast(Any, pdu.header)
        numbered = isinstance(header, (bhs.ScsiResponse, bhs.TaskManagementResponse, bhs.Reject, bhs.NopIn))
        if isinstance(header, bhs.NopIn) and header.initiator_task_tag == RESERVED_TAG:
            numbered = False
        if isinstance(header, bhs.DataIn) and header.flags & 0x01:
            self.initiator.breach("status rides on Data-In above level 0")
        if not isinstance(header, bhs.DataIn):
            self._note_status(header.stat_sn, numbered)
        task = self.tasks.get(header.initiator_task_tag)
        if isinstance(header, bhs.ScsiResponse):
            if task is not None and task.reply is None:
                task.pdus.append(pdu)
                self.responses[task.tag] = header, pdu.data
                self._try_to_finish(task)
            else:
                self._got(header.stat_sn)
            return
        if numbered:
            self._got(header.stat_sn)
        if isinstance(header, bhs.NopIn):
            if header.initiator_task_tag == RESERVED_TAG and header.target_transfer_tag != RESERVED_TAG:
                self.send(self.initiator.nop_answer(header, pdu.data))
        elif isinstance(header, bhs.Reject):
            self._rejected(header, pdu)
        elif isinstance(header, bhs.AsyncMessage):
            self.asyncs.append(pdu)
        elif task is not None and task.reply is None:
            task.pdus.append(pdu)
            if isinstance(header, bhs.DataIn):
                self._take(task, header, pdu.data)
            elif isinstance(header, bhs.ReadyToTransfer):
                self.answer_r2t(task, header)

    def _take(self, task: Task, header: bhs.DataIn, data: bytes) -> None:
        seen = self._seen(task)
        if header.data_sn in seen:
            return
        gap = [number for number in range(task.next_data_sn, header.data_sn) if number not in seen]
        seen.add(header.data_sn)
        task.next_data_sn = max(task.next_data_sn, header.data_sn + 1)
        task.data_in[header.buffer_offset : header.buffer_offset + len(data)] = data
        task.received += len(data)
        if gap:
            self._snack(SnackType.DATA_R2T, tag=task.tag, begin=gap[0], run=len(gap))
        if header.flags & 0x40 and not self._holes(task):
            self.send(
                self.initiator.snack(
                    SnackType.DATA_ACK,
                    begin=task.next_data_sn,
                    target_transfer_tag=header.target_transfer_tag,
                    lun=header.lun,
                )
            )
        if task.tag in self.responses:
            self._try_to_finish(task)

    def _seen(self, task: Task) -> set[int]:
        """DataSNs that came."""
        return cast(set[int], task.__dict__.setdefault("seen", set()))

    def _holes(self, task: Task) -> list[int]:
        seen = self._seen(task)
        return [number for number in range(task.next_data_sn) if number not in seen]

    def _try_to_finish(self, task: Task) -> None:
        """The response is here; the task ends when its data is."""
        header, data = self.responses[task.tag]
        is_read = not task.data_out
        if is_read:
            task.next_data_sn = max(task.next_data_sn, header.exp_data_sn)
            holes = self._holes(task)
            if holes:
                self._snack(SnackType.DATA_R2T, tag=task.tag, begin=holes[0], run=holes[-1] - holes[0] + 1)
                return
        del self.responses[task.tag]
        sense = data[2 : 2 + int.from_bytes(data[:2], "big")] if data else b""
        under, over = bool(header.flags & 0x02), bool(header.flags & 0x04)
        task.reply = Reply(
            ScsiStatus(header.status),
            bytes(task.data_in[: task.received]),
            sense,
            Residuals(header.residual if under else 0, header.residual if over else 0),
            header.response,
        )
        self.commands.pop(task.tag, None)
        self._got(header.stat_sn)

    def _rejected(self, header: bhs.Reject, pdu: Pdu) -> None:
        self.rejects.append(pdu)
        tag = self._rejected_tag(pdu)
        is_command = pdu.data[0] & 0x3F == bhs.ScsiCommand.OPCODE
        if header.reason == RejectReason.DATA_DIGEST_ERROR and is_command and tag in self.commands:
            self.retries += 1
            self.send(self.commands[tag][1])

    # -- status --

    def _note_status(self, stat_sn: int, numbered: bool) -> None:
        behind = stat_sn + 1 & 0xFFFFFFFF if numbered else stat_sn
        if serial_lt(self.highest, behind) or not self.highest:
            jumped = self.highest and serial_lt(self.highest, stat_sn)
            self.highest = behind
            if jumped:
                self._ask_for_statuses()

    def _got(self, stat_sn: int) -> None:
        assert self.initiator.exp_stat_sn is not None
        self.statuses.add(stat_sn)
        while self.initiator.exp_stat_sn in self.statuses:
            self.statuses.discard(self.initiator.exp_stat_sn)
            self.initiator.exp_stat_sn = self.initiator.exp_stat_sn + 1 & 0xFFFFFFFF

    def _ask_for_statuses(self) -> None:
        """Each hole by itself; a response that waits for its data is no hole."""
        waiting = {header.stat_sn for header, _ in self.responses.values()}
        number = self.initiator.exp_stat_sn or 0
        while serial_lt(number, self.highest):
            if number not in self.statuses and number not in waiting:
                self._snack(SnackType.STATUS, begin=number, run=1)
            number = number + 1 & 0xFFFFFFFF

    def _snack(self, kind: int, **fields: int) -> None:
        self.snacks += 1
        self.send(self.initiator.snack(kind, **fields))


class RecoveringSocket(Recovering, SocketInitiator):
    """Over TCP. ``timeout_s`` is short: when nothing comes for so long, ``idle`` looks what is missing."""

    def __init__(self, address: tuple[str, int], **options: Any) -> None:
        super().__init__(address, **{"timeout_s": 0.5, **options}, kind=LossyInitiator)


def reassign(task: Task, to: Conversation, *, exp_data_sn: int | None = None, **fields: Any) -> int:
    """TASK REASSIGN of a task to this connection (RFC 7143 §7.2.2); the response code.

    Args:
        exp_data_sn: the Data-In and R2T that are here; by default what is.
    """
    to.tasks[task.tag] = task
    acknowledged = task.next_data_sn if exp_data_sn is None else exp_data_sn
    task.burst = 0
    task.next_r2t_offset = None
    task.r2ts.clear()
    return to.task_management(Function.TASK_REASSIGN, task=task, exp_data_sn=acknowledged, lun=0, **fields)
