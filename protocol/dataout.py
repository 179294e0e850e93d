"""The Data-Out of one connection: R2Ts go out, sequences of Data-Out come in (RFC 7143 §11.7, §11.8).

``WriteTransfers`` knows where every byte of a write belongs and asks for those that do not come unasked.
What it must never do: let a broken sequence end GOOD. The first fault of a write is kept in its
``Transfer``, the rest of its data is drained, and then the command ends with that sense.

A write stays on its connection (connection allegiance, RFC 7143 §4.2.5.1): a sequence is found by the tags of
this connection alone, so Data-Out on another one belongs to nothing and is rejected.

A large write gets the memory for its data, and with it the R2Ts, when the connection's share of it
(``SessionTable.in_flight``) has room for it: in the order in which they came, so none waits for ever.

``protocol.recovery`` has the same for sessions in which lost data is asked for again.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.bhs import FINAL, DataOut, ReadyToTransfer
from protocol.enums import RESERVED_TAG, Opcode, RejectReason
from protocol.limits import LARGE_COMMAND, REMEMBERED_TAGS
from protocol.scsi.request import Outcome
from protocol.scsi.sense import CheckCondition, Sense
from protocol.task import Burst, Task, Transfer

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.session import Session

__all__ = ["WriteTransfers"]

_R2T = ReadyToTransfer.LAYOUT.pack


class WriteTransfers:
    """The writes of one connection in full feature phase."""

    __slots__ = (
        "_allotted", "_lingering", "_placed", "_queue", "_wanting", "bursts", "connection", "forgotten",
        "keep_early", "r2ts", "session",
    )  # fmt: skip

    def __init__(
        self,
        connection: "Connection",
        session: "Session",
        keep_early: Callable[[DataOut, memoryview, int, memoryview], bool],
    ) -> None:
        """
        Args:
            keep_early: asked about a PDU of no task; True: it belongs to a command that waits for its turn.
        """
        self.connection = connection
        self.session = session
        self.keep_early = keep_early
        self.r2ts = max(session.grant.r2ts, 1)
        """How many may be in ``bursts``."""
        self.bursts: dict[int, Burst] = {}
        """Target Transfer Tag → the R2T it belongs to."""
        self.forgotten: deque[int] = deque(maxlen=REMEMBERED_TAGS)
        """Initiator Task Tags of tasks that are no more."""
        self._placed: tuple[memoryview, DataOut, Burst, memoryview] | None = None
        """A data segment on the way to its place, its header, the sequence it was found fit for, and the
        buffer that this place is in."""
        self._allotted = 0
        """Bytes of buffers of large writes."""
        self._queue: dict[Task, None] = {}
        """Those that wait for theirs, in order."""
        self._wanting: dict[Task, None] = {}
        """Those that want an R2T when another one is answered, in order."""
        self._lingering: list[Task] = []
        """Aborted, while a worker has their data in hand."""

    # -- memory -------------------------------------------------------------------------------

    def _has_room(self, need: int) -> bool:
        """For a large write, now."""
        if self._queue:
            return False
        return not self._allotted or self._allotted + need <= self.connection.sessions.in_flight(self.session)

    def _allot(self, transfer: Transfer) -> None:
        self._allotted += transfer.need
        transfer.allotted = transfer.need

    def linger(self, task: Task) -> None:
        """Its task is over, but a worker has its data in hand."""
        self._lingering.append(task)

    def release(self, task: Task) -> None:
        """The data of a write is needed no more."""
        self._queue.pop(task, None)
        self._wanting.pop(task, None)
        transfer = task.transfer
        if transfer is not None and transfer.allotted and task not in self._lingering:
            self._allotted -= transfer.allotted
            transfer.allotted = 0
            self._serve_queue()

    def _serve_queue(self) -> None:
        queue, self._queue = self._queue, {}
        for task in queue:
            transfer = task.transfer
            assert transfer is not None
            if self.connection.closing or not self._has_room(transfer.need):
                self._queue[task] = None
            elif transfer.cramped:
                self._allot(transfer)
                transfer.grow()
                self.advance(task)
                self.connection.sessions.stirred.add(self.connection)

    # -- a write begins, goes on, ends --------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed. Nothing that is late is asked for again here."""
        if self._lingering:
            over = [task for task in self._lingering if not task.unit.has_in_hand(task)]
            self._lingering = [task for task in self._lingering if task not in over]
            for task in over:
                self.release(task)

    def excuse(self, seconds: float) -> None:
        """For so long nobody was here to listen."""

    def adopt(self, task: Task) -> None:
        """Carry on with a write of another connection, which only ErrorRecoveryLevel 2 allows."""
        raise NotImplementedError

    def immediate_allowed(self, length: int) -> bool:
        """Whether so much immediate data may come with a command."""
        keys = self.session.keys
        return not length or (keys.immediate_data and length <= keys.first_burst_length)

    def begin(self, task: Task, outcome: Outcome | None, data: memoryview) -> None:
        """A write whose data is not all here, or that has failed already."""
        keys = self.session.keys
        need = 0 if outcome is not None else min(task.expected, task.transfer_length)
        size = len(data)
        if need <= LARGE_COMMAND:
            transfer = task.transfer = Transfer(need, outcome, need)
        elif self._has_room(need):
            transfer = task.transfer = Transfer(need, outcome, need)
            self._allot(transfer)
        else:
            unasked = size if task.flags & FINAL else max(size, keys.first_burst_length)
            transfer = task.transfer = Transfer(need, outcome, unasked)
            self._queue[task] = None
        if size > task.expected:
            transfer.fault = Sense.INCORRECT_AMOUNT_OF_DATA
        elif not self.immediate_allowed(size):
            transfer.fault = Sense.UNEXPECTED_UNSOLICITED_DATA
        else:
            transfer.store(0, data)
        transfer.asked = size
        if not task.flags & FINAL:
            if keys.initial_r2t:
                transfer.fault = Sense.UNEXPECTED_UNSOLICITED_DATA
            limit = min(task.expected, keys.first_burst_length)
            transfer.unsolicited = Burst(task, RESERVED_TAG, size, max(limit, size))
        self.advance(task)

    def advance(self, task: Task) -> None:
        """Ask for more, or finish, as the transfer stands."""
        if self._wanting:
            self._wanting.pop(task, None)
        transfer = task.transfer
        assert transfer is not None
        keys = self.session.keys
        if transfer.unsolicited is not None:
            return
        if transfer.cramped:
            return
        if not transfer.draining:
            while transfer.asked < transfer.need and len(transfer.bursts) < keys.max_outstanding_r2t:
                if not self.may_ask(task):
                    return
                length = min(keys.max_burst_length, transfer.need - transfer.asked)
                self.ask(task, transfer.asked, length)
                transfer.asked += length
        if transfer.bursts:
            return
        if transfer.fault is not None:
            self.connection.complete(task, task.unit.give_up(task, CheckCondition(transfer.fault)))
        elif transfer.outcome is not None:
            self.connection.complete(task, transfer.outcome)
        else:
            task.data_out = transfer.buffer
            self.connection.events.append(task)

    def may_ask(self, task: Task) -> bool:
        """Whether there may be one R2T more on this connection; if not, the task is asked again when there
        may."""
        if len(self.bursts) < self.r2ts:
            return True
        self._wanting[task] = None
        return False

    def _serve_wanting(self) -> None:
        """R2Ts were answered or given up."""
        while self._wanting and len(self.bursts) < self.r2ts and not self.connection.closing:
            task = next(iter(self._wanting))
            del self._wanting[task]
            self.advance(task)
            self.connection.sessions.stirred.add(self.connection)

    def ask(self, task: Task, start: int, length: int) -> bytes:
        """Send an R2T for these bytes; returns its header."""
        connection, session = self.connection, self.session
        transfer = task.transfer
        assert transfer is not None
        burst = Burst(task, connection.new_tag(), start, start + length)
        self.bursts[burst.target_transfer_tag] = burst
        transfer.bursts.append(burst)
        header = _R2T(
            Opcode.READY_TO_TRANSFER, FINAL, 0, task.lun, task.initiator_task_tag, burst.target_transfer_tag,
            connection.stat_sn, session.exp_cmd_sn, session.max_cmd_sn, task.data_sn, start, length,
        )  # fmt: skip
        task.data_sn += 1
        connection.send(header)
        return header

    def over(self, burst: Burst) -> None:
        """The last PDU of a sequence is here."""
        task = burst.task
        transfer = task.transfer
        assert transfer is not None
        if burst is transfer.unsolicited:
            transfer.unsolicited = None
            transfer.asked = burst.offset
        else:
            del self.bursts[burst.target_transfer_tag]
            transfer.bursts.remove(burst)
            if burst.offset != burst.end and transfer.fault is None:
                transfer.fault = Sense.INCORRECT_AMOUNT_OF_DATA
        self.advance(task)
        if self._wanting:
            self._serve_wanting()

    def forget(self, task: Task) -> None:
        """The task is no more: its late Data-Out is dropped silently."""
        transfer = task.transfer
        if transfer is not None:
            self.forgotten.append(task.initiator_task_tag)
            if task.unit.has_in_hand(task):
                self.linger(task)
            else:
                self.release(task)
            for burst in transfer.bursts:
                self.bursts.pop(burst.target_transfer_tag, None)
            # A burst knows its task: without this the data of an aborted write, up to 16 MiB, would wait
            # for the cycle collector, and a peer that aborts as fast as it writes would fill the memory.
            transfer.bursts.clear()
            transfer.unsolicited = None
            self._wanting.pop(task, None)
            self._serve_wanting()

    def disown(self, task: Task) -> None:
        """The task goes on on another connection: what still comes for it here belongs to nothing."""
        if task.transfer is not None:
            for burst in task.transfer.bursts:
                self.bursts.pop(burst.target_transfer_tag, None)
            self.release(task)
            self._serve_wanting()

    # -- Data-Out PDUs ------------------------------------------------------------------------

    def find(self, header: DataOut) -> Burst | None:
        """The sequence that a PDU belongs to, on this connection."""
        if header.target_transfer_tag != RESERVED_TAG:
            burst = self.bursts.get(header.target_transfer_tag)
            if burst is not None and burst.task.initiator_task_tag == header.initiator_task_tag:
                return burst
            return None
        task = self.session.tasks.get(header.initiator_task_tag)
        if task is None or task.connection is not self.connection or task.transfer is None:
            return None
        return task.transfer.unsolicited

    def place(self, view: memoryview, at: int, size: int) -> memoryview | None:
        """Where a long data segment should land: in its task's own buffer, if all is right with it."""
        self._placed = None
        if view[at] & 0x3F != Opcode.SCSI_DATA_OUT or self.connection.closing:
            return None
        header = DataOut.parse(view, at)
        burst = self.find(header)
        if burst is None or burst.task.transfer is None or _fault(burst, header, size) is not None:
            return None
        transfer = burst.task.transfer
        if header.buffer_offset + size > len(transfer.buffer):
            return None
        target = transfer.buffer[header.buffer_offset : header.buffer_offset + size]
        self._placed = target, header, burst, transfer.buffer
        return target

    def data_out(self, view: memoryview, at: int, data: memoryview) -> None:
        """Take one Data-Out PDU."""
        placed, self._placed = self._placed, None
        if placed is not None and placed[0] is data:
            # Judged when it began, and no other PDU has come here since. But what it belongs to may be gone
            # or broken by now, or may have got a larger buffer.
            _, header, burst, buffer = placed
            transfer = burst.task.transfer
            if (
                transfer is not None
                and transfer.fault is None
                and transfer.buffer is buffer
                and self._is_open(burst)
            ):
                burst.offset += len(data)
                burst.data_sn += 1
                if header.flags & FINAL:
                    self.over(burst)
                return
        header = DataOut.parse(view, at)
        found = self.find(header)
        if found is None or found.task.transfer is None:
            self.stray(header, view, at, data)
            return
        transfer = found.task.transfer
        size = len(data)
        if transfer.fault is None:
            transfer.fault = _fault(found, header, size)
        if transfer.fault is None:
            transfer.store(header.buffer_offset, data)
            found.offset += size
            found.data_sn += 1
        if header.flags & FINAL:
            self.over(found)

    def _is_open(self, burst: Burst) -> bool:
        """Whether it is still what ``find`` would find."""
        if burst.target_transfer_tag != RESERVED_TAG:
            return self.bursts.get(burst.target_transfer_tag) is burst
        transfer = burst.task.transfer
        return transfer is not None and transfer.unsolicited is burst

    def stray(self, header: DataOut, view: memoryview, at: int, data: memoryview) -> None:
        """A PDU of no sequence: of a command that waits for its turn, of a task that is no more, or wrong."""
        if not self.keep_early(header, view, at, data) and header.initiator_task_tag not in self.forgotten:
            self.connection.reject(RejectReason.INVALID_PDU_FIELD, view, at)

    def damaged(self, view: memoryview, at: int, size: int) -> bool:
        """The data digest of a PDU is wrong: its command can not end well (RFC 7143 §7.8).

        Returns:
            Whether that is all there is to it; False: it belongs to a command that waits for its turn, or
            to none at all.
        """
        header = DataOut.parse(view, at)
        burst = self.find(header)
        if burst is None or burst.task.transfer is None:
            return header.initiator_task_tag in self.forgotten
        burst.task.transfer.fault = Sense.PROTOCOL_SERVICE_CRC_ERROR
        if view[at + 1] & FINAL:
            self.over(burst)
        return True


def _fault(burst: Burst, header: DataOut, size: int) -> Sense | None:
    """What is wrong with a Data-Out PDU in its sequence (RFC 7143 §11.7, §7.9, §11.4.7.2)."""
    transfer = burst.task.transfer
    assert transfer is not None
    if transfer.fault is not None:
        return transfer.fault
    if transfer.bursts and burst is not transfer.bursts[0]:
        return Sense.PROTOCOL_SERVICE_CRC_ERROR  # DataSequenceInOrder=Yes
    if header.data_sn != burst.data_sn:
        return Sense.PROTOCOL_SERVICE_CRC_ERROR  # one is missing, twice here or swapped
    if header.buffer_offset != burst.offset or burst.offset + size > burst.end:
        return Sense.INCORRECT_AMOUNT_OF_DATA
    return None
