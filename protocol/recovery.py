"""What a connection can send again: SNACK and acknowledgement (ErrorRecoveryLevel 1 and 2).

A connection of a session with ErrorRecoveryLevel above 0 has one ``Recovery``; others have none and pay
nothing. It keeps copies of what was sent until the initiator says that it has it, in two places (RFC 7143
§4.2.2.2, §4.2.2.3, §11.16):

* ``answers``, by StatSN: every PDU with status of its own. Acknowledged by ExpStatSN in any request.
* ``sent``, by command: its Data-In and R2T, by DataSN and R2TSN, which share one numbering. Acknowledged
  by DataACK, by ExpDataSN of TASK REASSIGN, and with the status of the command.

Status never rides on Data-In here, so that data and status can be sent again each by itself.

All of it together is bounded (``limits.MAX_KEPT``). Long before, Data-In asks to be acknowledged (A bit);
beyond it the oldest data, then the oldest answers are forgotten, and a SNACK for them gets Reject with
"SNACK reject", after which the initiator has the command's failure to tell (RFC 7143 §7.8). What was never
sent, or was acknowledged, is a "protocol error".

Data-In that is kept is not copied: it comes from buffers that nobody writes to (``Request.touched``).

Nothing here takes longer the more is kept, but for what sends it: hence the ``OrderedDict``, whose first
entry is found at once however many went before it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import TYPE_CHECKING

from protocol import serial
from protocol.bhs import FINAL, DataIn, ScsiResponse, SnackRequest
from protocol.enums import RESERVED_TAG, Opcode, RejectReason, SnackType
from protocol.framer import Handler
from protocol.limits import KEPT_COST, MAX_KEPT
from protocol.paced import pdus_of
from protocol.scsi.request import Buffer, Outcome

if TYPE_CHECKING:
    from protocol.connection import Connection
    from protocol.session import Session
    from protocol.task import Task

__all__ = ["Recovery", "Sent"]

_ACKNOWLEDGE = 0x40
"""A bit of Data-In (RFC 7143 §11.7.2)."""
_NO_LUN = bytes(8)
_DATA_IN = DataIn.LAYOUT.pack
_NUMBER = Struct("!I").unpack_from
_WINDOW = Struct("!II").pack
_TAG_AT, _STAT_SN_AT, _EXP_STAT_SN_AT, _WINDOW_AT, _WINDOW_END, _SN_AT = 16, 24, 28, 28, 36, 36
"""Bytes where every header has these fields, if it has them (RFC 7143 §11)."""


class _Rest:
    """The end of a command's data, and where in it that begins."""

    __slots__ = ("data", "offset")

    def __init__(self, data: memoryview, offset: int) -> None:
        self.data = data
        self.offset = offset


class Sent:
    """The Data-In and R2T of one command, as far as they may be asked for again."""

    __slots__ = ("acknowledged", "asks", "forgotten", "lun", "next_sn", "pdus", "rest", "stat_sn", "tag")

    def __init__(self, tag: int, lun: bytes) -> None:
        self.tag = tag
        """InitiatorTaskTag."""
        self.lun = lun
        self.pdus: OrderedDict[int, tuple[bytes, Buffer]] = OrderedDict()
        """DataSN or R2TSN → header and data, in order."""
        self.next_sn = 0
        self.rest: _Rest | None = None
        """Data that is numbered and whose PDUs are not made yet (``protocol.paced``)."""
        self.acknowledged = 0
        """Data acknowledgement reference number: the first DataSN not acknowledged (RFC 7143 §11.5.6)."""
        self.forgotten = 0
        """What is not in ``pdus`` below this number was forgotten for want of room."""
        self.asks: list[int] = []
        """Target Transfer Tags of those that asked to be acknowledged."""
        self.stat_sn: int | None = None
        """Of its status, once that is sent."""


class Recovery:
    """What one connection keeps."""

    __slots__ = (
        "acknowledged", "answers", "connection", "full", "resent", "responses", "sent", "session", "size",
        "tags", "waiting",
    )  # fmt: skip

    def __init__(self, connection: "Connection", session: "Session") -> None:
        self.connection = connection
        self.session = session
        self.acknowledged = connection.stat_sn
        """ExpStatSN: the first StatSN that the initiator has not got."""
        self.answers: OrderedDict[int, tuple[bytes, Buffer]] = OrderedDict()
        """StatSN → header and data, in order."""
        self.responses: dict[int, int] = {}
        """InitiatorTaskTag → StatSN of its SCSI Response, the last one where a tag was used again."""
        self.sent: dict[int, Sent] = {}
        """InitiatorTaskTag → what was sent for it."""
        self.full: OrderedDict[int, Sent] = OrderedDict()
        """Those of ``sent`` that hold any PDU, the oldest first."""
        self.tags: dict[int, Sent] = {}
        """Target Transfer Tag of Data-In with the A bit → its command."""
        self.waiting: dict[int, Outcome] = {}
        """InitiatorTaskTag → how a command ended after the connection was lost (``protocol.allegiance``)."""
        self.size = 0
        """Bytes kept, by ``KEPT_COST`` and data."""
        self.resent = 0
        """Bytes sent again since the owner last took what there is to send."""

    # -- keeping ------------------------------------------------------------------------------

    def keep_answer(self, header: bytes, data: Buffer) -> None:
        """A PDU with a StatSN of its own goes out."""
        stat_sn = _NUMBER(header, _STAT_SN_AT)[0]
        if header[0] == Opcode.SCSI_RESPONSE:
            tag = _NUMBER(header, _TAG_AT)[0]
            self.responses[tag] = stat_sn
            sent = self.sent.get(tag)
            if sent is not None and sent.stat_sn not in (None, stat_sn):
                self.drop(sent.tag)  # an earlier command that had the same tag
            elif sent is not None:
                sent.stat_sn = stat_sn
        self.answers[stat_sn] = header, data
        self._grow(len(data))

    def keep_r2t(self, task: "Task", header: bytes) -> None:
        """An R2T goes out."""
        sent = self._sent_for(task)
        sent.next_sn = task.data_sn
        self._keep(sent, _NUMBER(header, _SN_AT)[0], header, b"")

    def drop_r2t(self, task: "Task", r2t_sn: int) -> None:
        """All that an R2T asked for is here."""
        sent = self.sent.get(task.initiator_task_tag)
        if sent is not None:
            self._forget(sent, r2t_sn)

    def drop(self, tag: int) -> None:
        """Nothing will be sent again for this command."""
        self.take_outcome(tag)
        sent = self.sent.pop(tag, None)
        if sent is not None:
            for number in list(sent.pdus):
                self._forget(sent, number)
            for ask in sent.asks:
                del self.tags[ask]

    def _sent_for(self, task: "Task") -> Sent:
        sent = self.sent.get(task.initiator_task_tag)
        if sent is not None and sent.stat_sn is not None:
            self.drop(sent.tag)
            sent = None
        if sent is None:
            sent = self.sent[task.initiator_task_tag] = Sent(task.initiator_task_tag, task.lun)
        return sent

    def _keep(self, sent: Sent, number: int, header: bytes, data: Buffer) -> None:
        sent.pdus[number] = header, data
        self.full[sent.tag] = sent
        self._grow(len(data))

    def _forget(self, sent: Sent, number: int) -> None:
        pdu = sent.pdus.pop(number, None)
        if pdu is not None:
            self.size -= KEPT_COST + len(pdu[1])
            if not sent.pdus:
                del self.full[sent.tag]

    def _grow(self, size: int) -> None:
        self.size += KEPT_COST + size
        while self.size > MAX_KEPT and (self.full or self.answers):
            if self.full:
                sent = next(iter(self.full.values()))
                oldest = next(iter(sent.pdus))
                self._forget(sent, oldest)
                sent.forgotten = oldest + 1
            else:
                self._free(next(iter(self.answers)))

    def _free(self, stat_sn: int) -> None:
        header, data = self.answers.pop(stat_sn)
        self.size -= KEPT_COST + len(data)
        if header[0] == Opcode.SCSI_RESPONSE:
            tag = _NUMBER(header, _TAG_AT)[0]
            if self.responses.get(tag) == stat_sn:
                del self.responses[tag]
            sent = self.sent.get(tag)
            if sent is not None and sent.stat_sn == stat_sn:
                self.drop(tag)

    # -- acknowledgement ----------------------------------------------------------------------

    def noting(self, handler: Handler) -> Handler:
        """A handler that takes note of ExpStatSN first, which every request has in the same place."""

        def handle(view: memoryview, at: int, data: memoryview) -> None:
            exp_stat_sn: int = _NUMBER(view, at + _EXP_STAT_SN_AT)[0]
            if exp_stat_sn != self.acknowledged:
                self.acknowledge(exp_stat_sn)
            handler(view, at, data)

        return handle

    def acknowledge(self, exp_stat_sn: int) -> None:
        """The initiator has every status before this one (RFC 7143 §4.2.2.2), and with it the data."""
        news = serial.lt(self.acknowledged, exp_stat_sn) and serial.le(exp_stat_sn, self.connection.stat_sn)
        if not news:
            return
        self.acknowledged = exp_stat_sn
        while self.answers and serial.lt(next(iter(self.answers)), exp_stat_sn):
            self._free(next(iter(self.answers)))

    def _acknowledge_data(self, sent: Sent, number: int) -> None:
        sent.acknowledged = number
        while sent.pdus and (oldest := next(iter(sent.pdus))) < number:
            self._forget(sent, oldest)

    # -- sending ------------------------------------------------------------------------------

    def send_data(self, task: "Task", data: Buffer) -> None:
        """All the Data-In of a command, numbered after what it sent before."""
        sent = self._sent_for(task)
        sent.next_sn = task.data_sn
        self._segment(sent, memoryview(data), 0)
        task.data_sn = sent.next_sn

    def _segment(self, sent: Sent, data: memoryview, offset: int) -> None:
        """Data-In PDUs from ``sent.next_sn`` on, for bytes that begin at ``offset``."""
        limit, burst = self.connection.send_limit, self.session.keys.max_burst_length
        count = pdus_of(len(data), limit, burst)
        number = sent.next_sn
        sent.next_sn += count
        rest = sent.rest = _Rest(data, offset)
        self.connection.send_paced(self._pdus(sent, rest, number, limit, burst), count, len(data))

    def _pdus(
        self, sent: Sent, rest: _Rest, number: int, limit: int, burst: int
    ) -> Iterator[tuple[bytes, Buffer]]:
        """Those PDUs. They end early where the rest is cut anew (``_resegment``)."""
        connection, session = self.connection, self.session
        in_burst = 0
        while rest.data and sent.rest is rest:
            length = min(len(rest.data), limit, burst - in_burst)
            piece, rest.data = rest.data[:length], rest.data[length:]
            in_burst += length
            flags, tag, lun = 0, RESERVED_TAG, _NO_LUN
            if not rest.data or in_burst == burst:
                flags = FINAL
                in_burst = 0
                if (
                    self.size > MAX_KEPT // 2 and self.sent.get(sent.tag) is sent
                ):  # no more often than once a sequence (§11.7.2)
                    flags |= _ACKNOWLEDGE
                    tag, lun = connection.new_tag(), sent.lun
                    self.tags[tag] = sent
                    sent.asks.append(tag)
            header = _DATA_IN(
                Opcode.SCSI_DATA_IN, flags, 0, length, lun, sent.tag, tag, 0, session.exp_cmd_sn,
                session.max_cmd_sn, number, rest.offset, 0,
            )  # fmt: skip
            rest.offset += length
            if self.sent.get(sent.tag) is sent:
                self._keep(sent, number, header, piece)
            number += 1
            yield header, piece

    def _again(self, pdus: Sequence[tuple[bytes, Buffer]]) -> None:
        """Send copies, with the numbers of the command window as they are then (RFC 7143 §11.16)."""
        size = sum(len(data) for _, data in pdus)
        self.resent += KEPT_COST * len(pdus) + size
        self.connection.send_paced(map(self._renewed, pdus), len(pdus), size)

    def _renewed(self, pdu: tuple[bytes, Buffer]) -> tuple[bytes, Buffer]:
        header, data = pdu
        session = self.session
        window = _WINDOW(session.exp_cmd_sn, session.max_cmd_sn)
        head = header[:_WINDOW_AT]
        if header[0] == Opcode.READY_TO_TRANSFER:
            head = header[:_STAT_SN_AT] + self.connection.stat_sn.to_bytes(4, "big")
        return head + window + header[_WINDOW_END:], data

    # -- for protocol.allegiance --------------------------------------------------------------

    def keep_outcome(self, task: "Task", outcome: Outcome) -> bool:
        """A command ended after the connection was lost; False: there is no room to keep its data."""
        size = len(outcome.data_in)
        if self.size + size > MAX_KEPT:
            return False
        self.size += size
        self.waiting[task.initiator_task_tag] = outcome
        return True

    def take_outcome(self, tag: int) -> Outcome | None:
        """What ``keep_outcome`` kept."""
        outcome = self.waiting.pop(tag, None)
        if outcome is not None:
            self.size -= len(outcome.data_in)
        return outcome

    def response_of(self, tag: int) -> tuple[bytes, Buffer] | None:
        """The SCSI Response of a command that is not acknowledged; the last one that had this tag."""
        stat_sn = self.responses.get(tag)
        return self.answers[stat_sn] if stat_sn is not None else None

    def forget_answer(self, stat_sn: int) -> None:
        """Another connection has taken it over."""
        self._free(stat_sn)

    def carry_on(self, tag: int, lun: bytes, number: int, data: bytes, offset: int) -> int:
        """Data-In from this DataSN on of a command that began on another connection; the ExpDataSN it
        makes."""
        self.drop(tag)
        sent = self.sent[tag] = Sent(tag, lun)
        sent.acknowledged = sent.next_sn = number
        self._segment(sent, memoryview(data), offset)
        return sent.next_sn

    def answer_again(self, response: ScsiResponse, sense: bytes) -> None:
        """The status of such a command, with a StatSN of this connection and no SNACK Tag (§7.2.2)."""
        session = self.session
        response.snack_tag = 0
        response.stat_sn = self.connection.status_number()
        response.exp_cmd_sn, response.max_cmd_sn = session.exp_cmd_sn, session.max_cmd_sn
        self.connection.answer(response.build(), sense)

    # -- SNACK (RFC 7143 §11.16) --------------------------------------------------------------

    def snack(self, view: memoryview, at: int, data: memoryview) -> None:
        """Do what a SNACK asks for, or reject it."""
        request = SnackRequest.parse(view, at)
        act = _SNACKS.get(request.flags & 0x0F)
        if act is None:
            refusal: RejectReason | None = RejectReason.INVALID_PDU_FIELD
        elif self.resent > MAX_KEPT:
            refusal = RejectReason.SNACK_REJECT  # a SNACK is 48 bytes: who asks without end gets no more
        else:
            refusal = act(self, request)
        if refusal is not None:
            self.connection.reject(refusal, view, at)

    def _status_snack(self, request: SnackRequest) -> RejectReason | None:
        begin, end = request.beg_run, serial.add(request.beg_run, request.run_length)
        if not request.run_length:
            begin = request.beg_run or self.acknowledged
            end = self.connection.stat_sn
        if serial.lt(begin, self.acknowledged) or serial.lt(self.connection.stat_sn, end):
            return RejectReason.PROTOCOL_ERROR  # acknowledged, or never sent
        count = (end - begin) & serial.MASK
        if count > len(self.answers):
            return RejectReason.SNACK_REJECT
        wanted = [self.answers.get(serial.add(begin, n)) for n in range(count)]
        answers = [answer for answer in wanted if answer is not None]
        if len(answers) < count:
            return RejectReason.SNACK_REJECT
        self._again(answers)
        return None

    def _data_snack(self, request: SnackRequest) -> RejectReason | None:
        sent = self.sent.get(request.initiator_task_tag)
        if sent is None:
            # All that was sent and not acknowledged of a command that sent nothing yet: that is nothing.
            nothing = request.initiator_task_tag in self.session.tasks
            nothing = nothing and not (request.beg_run or request.run_length)
            return None if nothing else RejectReason.PROTOCOL_ERROR
        begin, end = request.beg_run, request.beg_run + request.run_length
        if not request.run_length:
            begin, end = begin or sent.acknowledged, sent.next_sn
        if begin < sent.acknowledged or end > sent.next_sn:
            return RejectReason.PROTOCOL_ERROR
        if begin < sent.forgotten and begin not in sent.pdus:
            return RejectReason.SNACK_REJECT
        pdus = [sent.pdus[sn] for sn in range(begin, end) if sn in sent.pdus]
        if request.run_length and len(pdus) < request.run_length:
            return RejectReason.PROTOCOL_ERROR  # an R2T whose data has come: that acknowledged it
        if any(len(data) > self.connection.send_limit for _, data in pdus):
            return RejectReason.PROTOCOL_ERROR  # it must be R-Data now (§11.16.3)
        self._again(pdus)
        return None

    def _data_ack(self, request: SnackRequest) -> RejectReason | None:
        """RFC 7143 §11.16.2: found by the tag and LUN of the Data-In that asked for it."""
        sent = self.tags.get(request.target_transfer_tag)
        if sent is None or request.lun != sent.lun or request.run_length:
            return RejectReason.INVALID_DATA_ACK
        if not sent.acknowledged <= request.beg_run <= sent.next_sn:
            return RejectReason.INVALID_DATA_ACK
        self._acknowledge_data(sent, request.beg_run)
        return None

    def _r_data_snack(self, request: SnackRequest) -> RejectReason | None:
        """RFC 7143 §11.16.3: everything not acknowledged, cut anew, then a SCSI Response with the SNACK
        Tag."""
        sent = self.sent.get(request.initiator_task_tag)
        tag = request.target_transfer_tag
        if request.beg_run or request.run_length or tag in (0, RESERVED_TAG):
            return RejectReason.INVALID_PDU_FIELD
        if sent is None or sent.stat_sn is None:
            return RejectReason.PROTOCOL_ERROR
        if sent.forgotten > sent.acknowledged or sent.stat_sn not in self.answers:
            return RejectReason.SNACK_REJECT
        self._resegment(sent)
        header, data = self.answers[sent.stat_sn]
        response = ScsiResponse.parse(header)
        response.snack_tag = tag
        response.exp_data_sn = sent.next_sn
        self.answers[sent.stat_sn] = response.build(), data
        self._again([self.answers[sent.stat_sn]])
        return None

    def _resegment(self, sent: Sent) -> None:
        data, offset = self.unacknowledged(sent, sent.acknowledged)
        for number in list(sent.pdus):
            self._forget(sent, number)
        sent.next_sn = sent.acknowledged
        self.resent += len(data)
        self._segment(sent, memoryview(data), offset)

    @staticmethod
    def unacknowledged(sent: Sent, number: int) -> tuple[bytes, int]:
        """The Data-In from this DataSN on, and where in the command's data it begins."""
        kept = [(header, data) for sn, (header, data) in sent.pdus.items() if sn >= number and len(data)]
        rest = sent.rest
        offset = DataIn.parse(kept[0][0]).buffer_offset if kept else rest.offset if rest is not None else 0
        unmade = rest.data if rest is not None else b""
        return b"".join((*(data for _, data in kept), unmade)), offset


_SNACKS: dict[int, Callable[[Recovery, SnackRequest], RejectReason | None]] = {
    SnackType.DATA_R2T: Recovery._data_snack,
    SnackType.STATUS: Recovery._status_snack,
    SnackType.DATA_ACK: Recovery._data_ack,
    SnackType.R_DATA: Recovery._r_data_snack,
}
