"""One command's life in the transport: Data-Out in, R2T out. Knows no LUN content.

A write's data arrives in up to three ways (RFC 7143 §4.2.5.2): with the command (immediate), behind it
unasked (unsolicited, up to FirstBurstLength) and as R2Ts ask for it (solicited). ``Transfer`` is the
book-keeping of the last two. Its rules:

* What is asked for never exceeds what the CDB needs, whatever the initiator expected to send; data beyond
  that (only immediate and unsolicited data can be) is taken from the wire and dropped.
* Bytes of a sequence come in order (DataPDUInOrder=Yes, DataSequenceInOrder=Yes: we never agree to No),
  so one offset a sequence is the whole truth about what has arrived.
* A broken sequence never ends GOOD: the first fault is kept in ``fault``, the rest of the data is drained,
  and the command ends with that sense (RFC 7143 §7.9, §11.4.7.2). Above ErrorRecoveryLevel 0 what was lost is
  ``missing`` instead, and asked for again.
"""

from collections import deque
from typing import TYPE_CHECKING

from protocol.scsi.request import Buffer, Nexus, Outcome, Request
from protocol.scsi.sense import Sense

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.scsi.device import LogicalUnit

__all__ = ["FLAG_READ", "FLAG_WRITE", "Burst", "Task", "Transfer", "residuals"]

FLAG_READ = 0x40
FLAG_WRITE = 0x20
"""R and W of a SCSI Command (RFC 7143 §11.3.1)."""


class Task(Request):
    """A SCSI command as the transport knows it; the same object is the logical unit's ``Request``."""

    __slots__ = (
        "borrowed",
        "cmd_sn",
        "connection",
        "data_sn",
        "expected",
        "flags",
        "immediate",
        "initiator_task_tag",
        "lun",
        "started",
        "transfer",
        "unit",
    )

    started: float
    """When it was submitted, by the owner's clock; set only where it did not end at once."""

    def __init__(
        self,
        connection: "Connection",
        nexus: Nexus,
        unit: "LogicalUnit",
        flags: int,
        lun: bytes,
        initiator_task_tag: int,
        expected: int,
        cmd_sn: int,
        immediate: bool,
        cdb: bytes,
    ) -> None:
        # Request.__init__ spelled out: a call more would cost a tenth of what a 4 KiB READ may cost.
        self.nexus = nexus
        self.cdb = cdb
        self.attribute = flags & 7
        self.data_out = b""
        # With both R and W it is the write's length; the read's is in an AHS (RFC 7143 §11.3.4, §11.2.2.4).
        self.expected_in = expected if flags & 0x60 == 0x40 else 0
        self.expected_out = expected if flags & 0x20 else 0
        self.touched = connection.touches
        self.aborted = False
        self.command = None
        self.transfer_length = 0
        self.offset = 0
        self.length = 0
        self.connection = connection
        self.unit = unit
        self.flags = flags
        self.lun = lun
        self.initiator_task_tag = initiator_task_tag
        self.expected = expected
        """ExpectedDataTransferLength, bytes."""
        self.cmd_sn = cmd_sn
        self.immediate = immediate
        self.borrowed = False
        """``data_out`` is a window on the receive buffer and will not outlive this wake-up."""
        self.transfer: Transfer | None = None
        self.data_sn = 0
        """DataSN or R2TSN of the next Data-In or R2T."""

    def hold(self) -> None:
        if self.borrowed:
            self.data_out = bytes(self.data_out)
            self.borrowed = False


class Burst:
    """One sequence of Data-Out PDUs: the unsolicited one, or the answer to one R2T."""

    __slots__ = ("data_sn", "end", "heard_at", "offset", "r2t_sn", "start", "target_transfer_tag", "task")

    def __init__(self, task: Task, target_transfer_tag: int, start: int, end: int) -> None:
        self.task = task
        self.target_transfer_tag = target_transfer_tag
        self.start = start
        """First byte of the sequence in the command's data."""
        self.offset = start
        """Where the next PDU must begin."""
        self.end = end
        """Where the sequence must end (solicited) or must not go beyond (unsolicited)."""
        self.data_sn = 0
        """The DataSN the next PDU must carry."""
        self.heard_at = task.connection.now
        """When something of it came last, or it was asked for."""
        self.r2t_sn = task.data_sn
        """Of the R2T that asks for it."""


class Transfer:
    """The Data-Out of one command that did not come whole with the command."""

    __slots__ = (
        "allotted", "asked", "buffer", "bursts", "fault", "fruitless", "missing", "need", "outcome",
        "unsolicited",
    )  # fmt: skip

    def __init__(self, need: int, outcome: Outcome | None, room: int) -> None:
        """
        Args:
            need: bytes the command will use: min(EDTL, what the CDB asks for).
            outcome: the command has failed already; its data is only drained.
            room: bytes there is memory for now; at least what may come unasked.
        """
        self.need = need
        self.allotted = 0
        """Bytes of ``protocol.limits.MAX_IN_FLIGHT`` that are this command's."""
        self.buffer = memoryview(bytearray(min(need, room)))
        """Shorter than ``need`` until ``grow``."""
        self.outcome = outcome
        self.fault: Sense | None = None
        self.unsolicited: Burst | None = None
        """Unsolicited Data-Out PDUs are still to come."""
        self.bursts: deque[Burst] = deque()
        """R2Ts that are out, in order."""
        self.asked = 0
        """Bytes from offset 0 that have arrived, are on their way unasked, or were asked for."""
        self.missing: list[tuple[int, int]] = []
        """(start, end) of what was sent and did not arrive; filled with ErrorRecoveryLevel 1 and 2 only."""
        self.fruitless = 0
        """R2Ts in a row that brought nothing."""

    def grow(self) -> None:
        """There is memory for all of it."""
        buffer = memoryview(bytearray(self.need))
        buffer[: len(self.buffer)] = self.buffer
        self.buffer = buffer

    def store(self, offset: int, data: Buffer) -> None:
        """Take bytes that arrived at ``offset``; what lies beyond ``need`` is dropped."""
        end = min(offset + len(data), len(self.buffer))
        if offset < end:
            self.buffer[offset:end] = data[: end - offset]

    def lose(self, start: int, end: int) -> None:
        """These bytes have to be asked for again."""
        end = min(end, self.need)
        if start < end:
            self.missing.append((start, end))

    @property
    def open(self) -> bool:
        """Data is still to come."""
        return self.unsolicited is not None or bool(self.bursts) or self.cramped

    @property
    def cramped(self) -> bool:
        """There is no memory yet for what is still to come."""
        return len(self.buffer) < self.need and not self.draining

    @property
    def draining(self) -> bool:
        """The outcome is known to be a failure; no more data is asked for."""
        return self.outcome is not None or self.fault is not None


def residuals(task: Task, length: int) -> tuple[int, int, int]:
    """(flag bits, Residual Count, Bidirectional Read Residual Count) of a response, RFC 7143 §11.4.1.

    ``length`` is what the command had to send. For both directions at once the read's residual goes to
    the bidirectional field and its o and u bits.
    """
    flags = 0
    residual = 0
    if task.flags & FLAG_WRITE:
        residual = task.expected_out - task.transfer_length
        if residual:
            flags = 0x02 if residual > 0 else 0x04
        if task.flags & FLAG_READ:
            read = task.expected_in - length
            if read:
                flags |= 0x08 if read > 0 else 0x10
            return flags, abs(residual), abs(read)
        return flags, abs(residual), 0
    residual = task.expected_in - length
    if residual:
        flags = 0x02 if residual > 0 else 0x04
    elif task.transfer_length and not task.expected_in:
        # A CDB that asks for Data-Out, in a command with neither R nor W: none of it could be sent.
        return 0x04, task.transfer_length, 0
    return flags, abs(residual), 0
