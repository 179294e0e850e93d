"""Data-Out that is lost on the way is asked for again (ErrorRecoveryLevel 1 and 2, RFC 7143 §7.1.4.1, §7.8,
§7.9).

A PDU is lost when its digest is wrong or when none of its kind has come for too long. Which bytes that were
is known by the DataSN and Buffer Offset of what does come, or when the sequence is over; they are then in
``Transfer.missing``, and recovery R2Ts, each with the next R2TSN, ask for them before anything that lies
behind (DataSequenceInOrder=Yes; ``protocol.negotiation`` sees to it that only one R2T is outstanding).

Rule: what an R2T that was given up on still brings is dropped unread. Its bytes come again by another.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol import serial
from protocol.bhs import FINAL, DataOut
from protocol.dataout import WriteTransfers
from protocol.enums import RESERVED_TAG, RejectReason
from protocol.limits import LARGE_COMMAND, MAX_FRUITLESS, REMEMBERED_TAGS, SEQUENCE_TIMEOUT_S
from protocol.scsi.sense import Sense
from protocol.task import Burst, Task

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.recovery import Recovery
    from protocol.session import Session

__all__ = ["RecoveringWrites"]


class RecoveringWrites(WriteTransfers):
    """The writes of a connection that recovers them."""

    __slots__ = ("recovery", "stale")

    def __init__(
        self,
        connection: "Connection",
        session: "Session",
        keep_early: Callable[[DataOut, memoryview, int, memoryview], bool],
        recovery: "Recovery",
    ) -> None:
        super().__init__(connection, session, keep_early)
        self.recovery = recovery
        self.stale: deque[int] = deque(maxlen=REMEMBERED_TAGS)
        """Target Transfer Tags of sequences that are over."""

    def advance(self, task: Task) -> None:
        """What is missing comes first."""
        self._wanting.pop(task, None)
        transfer = task.transfer
        assert transfer is not None
        if transfer.missing and transfer.unsolicited is None and not transfer.draining:
            if not transfer.bursts and self.may_ask(task):
                start, end = transfer.missing.pop(0)
                length = min(end - start, self.session.keys.max_burst_length)
                transfer.missing[:0] = [(start + length, end)] if start + length < end else []
                self.ask(task, start, length)
            return
        super().advance(task)

    def ask(self, task: Task, start: int, length: int) -> bytes:
        """The R2T is kept, as it may be asked for by SNACK."""
        header = super().ask(task, start, length)
        self.recovery.keep_r2t(task, header)
        return header

    def over(self, burst: Burst) -> None:
        """The rest of the sequence, if any, is missing."""
        transfer = burst.task.transfer
        assert transfer is not None
        if burst is not transfer.unsolicited:
            self.stale.append(burst.target_transfer_tag)
            if burst.offset == burst.end:
                self.recovery.drop_r2t(burst.task, burst.r2t_sn)
            elif transfer.fault is None:
                transfer.fruitless = 0 if burst.offset > burst.start else transfer.fruitless + 1
                if transfer.fruitless > MAX_FRUITLESS:
                    transfer.fault = Sense.PROTOCOL_SERVICE_CRC_ERROR
                else:
                    transfer.lose(burst.offset, burst.end)
                    burst.offset = burst.end
        super().over(burst)

    def adopt(self, task: Task) -> None:
        """The task comes from a connection that is gone (RFC 7143 §7.2.2): what was under way there, asked
        for or unsolicited, is asked for here. The connection it had must have forgotten its sequences."""
        transfer = task.transfer
        assert transfer is not None
        if transfer.unsolicited is not None:
            transfer.asked = transfer.unsolicited.offset
            transfer.unsolicited = None
        for burst in transfer.bursts:
            transfer.lose(burst.offset, burst.end)
        transfer.bursts.clear()
        if transfer.cramped:
            self._queue[task] = None
        elif transfer.need > LARGE_COMMAND:
            self._allot(transfer)
        self.advance(task)
        self._serve_queue()

    def excuse(self, seconds: float) -> None:
        """The sequences under way have so much longer."""
        for task in self.session.tasks.values():
            transfer = task.transfer
            if transfer is not None and task.connection is self.connection:
                for burst in (*transfer.bursts, *filter(None, (transfer.unsolicited,))):
                    burst.heard_at += seconds

    def tick(self, now: float) -> None:
        """Sequence reception timeout (RFC 7143 §7.1.4.1): what has not come in time is missing."""
        super().tick(now)
        for task in list(self.session.tasks.values()):
            transfer = task.transfer
            if transfer is None or task.connection is not self.connection:
                continue
            burst = transfer.unsolicited or (transfer.bursts[0] if transfer.bursts else None)
            if burst is not None and now - burst.heard_at > SEQUENCE_TIMEOUT_S:
                self.over(burst)

    # -- Data-Out PDUs ------------------------------------------------------------------------

    def _follow(self, burst: Burst, header: DataOut) -> bool:
        """Bring the sequence to where this PDU is, with what lies between as missing; False: it was here
        already, or its numbers fit nowhere, which ``data_out`` judges."""
        burst.heard_at = self.connection.now
        if serial.lt(header.data_sn, burst.data_sn):
            return False
        ahead = header.data_sn != burst.data_sn and header.buffer_offset >= burst.offset
        if ahead and burst.task.transfer is not None:
            burst.task.transfer.lose(burst.offset, header.buffer_offset)
            burst.offset = header.buffer_offset
            burst.data_sn = header.data_sn
        return True

    def data_out(self, view: memoryview, at: int, data: memoryview) -> None:
        """A PDU that shows that some before it are lost is good in itself; one that was here is dropped."""
        header = DataOut.parse(view, at)
        burst = self.find(header)
        if burst is None or self._follow(burst, header):
            super().data_out(view, at, data)

    def damaged(self, view: memoryview, at: int, size: int) -> bool:
        """RFC 7143 §7.8, option of a recovery R2T. A header that no digest covers is believed only if it is
        the very next of its sequence; if not, the one behind it or the timeout tells what is missing."""
        header = DataOut.parse(view, at)
        burst = self.find(header)
        transfer = burst.task.transfer if burst is not None else None
        if burst is None or transfer is None:
            return False
        if not transfer.draining:
            if self.connection.keys.header_digest and not self._follow(burst, header):
                return True
            expected = header.data_sn == burst.data_sn and header.buffer_offset == burst.offset
            if not expected or burst.offset + size > burst.end:
                return True
            transfer.lose(burst.offset, burst.offset + size)
            burst.offset += size
            burst.data_sn += 1
        if header.flags & FINAL:
            self.over(burst)
        return True

    def stray(self, header: DataOut, view: memoryview, at: int, data: memoryview) -> None:
        """Unsolicited data whose command was lost comes again with it; so does that of an R2T given up on."""
        tag = header.target_transfer_tag
        if self.keep_early(header, view, at, data) or tag == RESERVED_TAG or tag in self.stale:
            return
        if header.initiator_task_tag not in self.forgotten:
            self.connection.reject(RejectReason.INVALID_PDU_FIELD, view, at)
