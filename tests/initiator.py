"""An iSCSI initiator of our own, able to misbehave at will: a second, independent reading of RFC 7143.

It shares only the header layouts (``protocol.bhs``) and the numbers (``protocol.enums``) with what it
tests. Framing, digests, text keys, CHAP and the numbering rules are written again here, so that an
error of ours in one reading does not hide behind the same error in the other.

* ``Initiator`` (``tests.initiator_wire``) is one connection without I/O: ``feed`` cuts what the target
  sent into PDUs and holds it to the rules of numbering; one builder per request makes bytes, and every
  header field of it may be overridden by name. CmdSN and tags belong to the session
  (``SessionState``), which several connections may share.
* ``Conversation`` drives one: login with CHAP, discovery, commands with immediate, unsolicited and
  solicited data, task management, NOP, logout. It reads only while it waits for something.
* ``MemoryPeer`` is a conversation with an object in memory, ``SocketInitiator`` one over TCP.

Rule 1: what the target may never do raises ``Breach`` where it is seen (``strict=False`` gathers it in
``breaches``). Rule 2: what we may do wrong is never prevented, only not done unasked.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from protocol import bhs
from protocol.enums import RESERVED_TAG, LogoutReason, ScsiStatus, TaskAttribute
from tests.initiator_login import DEFAULTS, DISCOVERY_OFFER, LEADING_ONLY, OFFER, Login, Secret
from tests.initiator_wire import (
    BHS,
    CHAP_HASHES,
    LOGIN_SEGMENT,
    Breach,
    ConnectionClosed,
    Initiator,
    LoginFailed,
    Pdu,
    Rejected,
    SessionState,
    chap_response,
    decode_binary,
    decode_text,
    encode_binary,
    encode_lun,
    encode_text,
    frame,
)

__all__ = [
    "CHAP_HASHES",
    "DISCOVERY_OFFER",
    "INITIATOR_NAME",
    "OFFER",
    "Breach",
    "ConnectionClosed",
    "Conversation",
    "DiscoveredTarget",
    "Initiator",
    "LoginFailed",
    "MemoryPeer",
    "Pdu",
    "Rejected",
    "Reply",
    "Residuals",
    "SessionState",
    "SocketInitiator",
    "Task",
    "chap_response",
    "decode_binary",
    "decode_text",
    "encode_binary",
    "encode_lun",
    "encode_text",
    "frame",
]

INITIATOR_NAME = "iqn.2016-04.com.example:initiator"


# -- One command ------------------------------------------------------------------------------------


class Residuals(NamedTuple):
    """Bytes; at most one is not zero."""

    underflow: int = 0
    overflow: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """How a command ended. Unpacks as ``status, data, sense, residuals``."""

    status: int
    data: bytes
    sense: bytes
    residuals: Residuals
    response: int = 0
    """iSCSI service response; 0 is Command Completed at Target (RFC 7143 §11.4.3)."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.status, self.data, self.sense, self.residuals))

    @property
    def good(self) -> bool:
        """GOOD, and no residual of either kind."""
        return self.status == ScsiStatus.GOOD and self.residuals == (0, 0)

    @property
    def sense_key(self) -> int | None:
        """The sense key of either format (SPC-4 §4.5); None without sense data."""
        if not self.sense:
            return None
        return (self.sense[1] if self.sense[0] & 0x7F in (0x72, 0x73) else self.sense[2]) & 0x0F

    @property
    def additional_sense(self) -> tuple[int, int] | None:
        """(ASC, ASCQ) of either format; None without sense data."""
        if not self.sense:
            return None
        at = 2 if self.sense[0] & 0x7F in (0x72, 0x73) else 12
        return self.sense[at], self.sense[at + 1]


@dataclass
class Task:
    """A command outstanding, and what has come of it."""

    tag: int
    cmd_sn: int
    lun: bytes
    data_out: bytes
    expected: int
    """Expected Data Transfer Length, bytes."""
    data_in: bytearray = field(default_factory=bytearray)
    received: int = 0
    """Bytes of Data-In."""
    burst: int = 0
    """Bytes of the Data-In sequence that runs."""
    next_data_sn: int = 0
    """Data-In and R2T share it (RFC 7143 §4.2.2.3)."""
    next_r2t_offset: int | None = None
    r2ts: list[bhs.ReadyToTransfer] = field(default_factory=list)
    """Not answered yet; only filled while ``answer_r2ts`` is off."""
    pdus: list[Pdu] = field(default_factory=list)
    reply: Reply | None = None
    reject: Pdu | None = None

    @property
    def done(self) -> bool:
        """No more will come."""
        return self.reply is not None or self.reject is not None


@dataclass(frozen=True, slots=True)
class DiscoveredTarget:
    """One target of SendTargets (RFC 7143 appendix C)."""

    name: str
    addresses: tuple[str, ...]
    """``host:port,tag``."""


class Conversation(ABC):
    """One connection of an initiator that behaves, unless asked not to.

    Attributes:
        answer_pings: answer a NOP-In that asks for it as soon as it is read.
        answer_r2ts: send the data an R2T asks for as soon as it is read; else it waits in ``task.r2ts``
            for ``answer_r2t``.
        keys: what holds on this connection, session-wide keys included.
        asyncs, rejects, pings: Asynchronous Messages, Rejects and NOP-Ins of the target's own, in order.
    """

    def __init__(self, initiator: Initiator) -> None:
        self.initiator = initiator
        self.session = initiator.session
        self.answer_pings = True
        self.answer_r2ts = True
        self.keys: dict[str, str] = dict(DEFAULTS)
        self.max_data_out = LOGIN_SEGMENT
        """MaxRecvDataSegmentLength that the target declared."""
        self.max_data_in = LOGIN_SEGMENT
        """The one that we did."""
        self.initiator_name = INITIATOR_NAME
        self.tasks: dict[int, Task] = {}
        self.asyncs: list[Pdu] = []
        self.rejects: list[Pdu] = []
        self.pings: list[Pdu] = []
        self._inbox: list[Pdu] = []

    # -- bytes --

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Raw bytes to the target."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """What the target has sent next, at least one byte.

        Raises:
            ConnectionClosed: nothing more will come.
            TimeoutError: nothing came in time.
        """

    def receive(self) -> Pdu:
        """The next PDU, unprocessed: for tests that speak for themselves."""
        while not self._inbox:
            self._inbox += self.initiator.feed(self.read_bytes())
        return self._inbox.pop(0)

    def request(self, data: bytes) -> Pdu:
        """Send, and receive the next PDU."""
        self.send(data)
        return self.receive()

    def _request(self, build: Callable[..., bytes], *arguments: Any, **fields: Any) -> None:
        """Build and send, in our turn: a request that takes a CmdSN waits for the window to open."""
        takes_a_number = not fields.get("immediate") and "cmd_sn" not in fields
        while takes_a_number and not self.session.window:
            self._dispatch(self.receive())
        self.send(build(*arguments, **fields))

    # -- login --

    def login(
        self,
        target: str | None = None,
        initiator_name: str = INITIATOR_NAME,
        *,
        chap: Secret | None = None,
        mutual: Secret | None = None,
        algorithms: Sequence[int] = (8, 7, 6, 5),
        encoding: str = "hex",
        auth_method: str | None = None,
        keys: Mapping[str, str | None] | None = None,
        skip_security: bool = False,
        segment: int = LOGIN_SEGMENT,
    ) -> dict[str, str]:
        """Log in; a discovery session without ``target``. Answers the keys as they are now settled.

        Args:
            chap: our name and secret; sets AuthMethod=CHAP.
            mutual: the name and secret that the target must prove.
            algorithms: offered as CHAP_A in this order.
            encoding: of our CHAP values, ``hex`` or ``base64``.
            auth_method: instead of ``CHAP`` (with ``chap``) or ``None``.
            keys: added to what is offered; a value of None takes the key out.
            skip_security: begin in the operational stage (RFC 7143 §6.3).
            segment: longest data segment of a Login Request; smaller ones exercise the C bit.

        Raises:
            LoginFailed: the target refused.
        """
        self.initiator_name = initiator_name
        names = {"InitiatorName": initiator_name, "SessionType": "Discovery" if target is None else "Normal"}
        if target is not None:
            names["TargetName"] = target
        offer = dict(DISCOVERY_OFFER if target is None else OFFER)
        if self.session.tsih:
            offer = {key: value for key, value in offer.items() if key not in LEADING_ONLY}
        for key, value in (keys or {}).items():
            if value is None:
                offer.pop(key, None)
            else:
                offer[key] = value
        login = Login(self, segment)
        if not skip_security:
            method = auth_method or ("CHAP" if chap else "None")
            login.security({**names, "AuthMethod": method}, chap, mutual, algorithms, encoding)
            names = {}
        login.operational({**names, **offer}, offer)
        self._enter_full_feature(login)
        return self.keys

    def _enter_full_feature(self, login: Login) -> None:
        settled = login.settled
        shared = {key: value for key, value in settled.items() if key in LEADING_ONLY}
        self.session.keys.update(shared)
        self.keys = {**DEFAULTS, **self.session.keys, **settled}
        self.max_data_out = int(login.declared.get("MaxRecvDataSegmentLength", str(LOGIN_SEGMENT)))
        self.max_data_in = int(login.offer.get("MaxRecvDataSegmentLength", str(LOGIN_SEGMENT)))
        self.initiator.max_data_in = self.max_data_in
        self.initiator.header_digest = self.keys["HeaderDigest"] == "CRC32C"
        self.initiator.data_digest = self.keys["DataDigest"] == "CRC32C"
        self.keys = {**self.keys, **login.declared}
        self.session.tsih = login.tsih

    # -- requests and answers --

    def discover(self, name: str = "All") -> list[DiscoveredTarget]:
        """SendTargets (RFC 7143 appendix C); follows an answer over several PDUs."""
        found: list[tuple[str, list[str]]] = []
        for key, value in self.text({"SendTargets": name}):
            if key == "TargetName":
                found.append((value, []))
            elif key == "TargetAddress" and found:
                found[-1][1].append(value)
            else:
                self.initiator.breach(f"{key}={value} has no place in an answer to SendTargets")
        return [DiscoveredTarget(target, tuple(addresses)) for target, addresses in found]

    def text(self, keys: Mapping[str, str] | bytes, **fields: Any) -> list[tuple[str, str]]:
        """One text exchange to its end (RFC 7143 §11.10-11).

        Raises:
            Rejected: the target answered with Reject.
        """
        tag = fields.setdefault("initiator_task_tag", self.session.new_tag())
        self._request(self.initiator.text_request, keys, **fields)
        data = b""
        while True:
            pdu = self._await(tag)
            header = pdu.expect(bhs.TextResponse)
            data += pdu.data
            if header.flags & bhs.FINAL:
                if header.target_transfer_tag != RESERVED_TAG or header.flags & 0x40:
                    self.initiator.breach(f"F with a Target Transfer Tag or C (§11.11.1-4): {header}")
                return decode_text(data)
            if header.target_transfer_tag == RESERVED_TAG:
                self.initiator.breach(f"F=0 without a Target Transfer Tag (§11.11.4): {header}")
            self._request(
                self.initiator.text_request,
                initiator_task_tag=tag,
                transfer_tag=header.target_transfer_tag,
                lun=header.lun,
            )

    def nop(self, data: bytes = b"", **fields: Any) -> Pdu:
        """Ping the target; the echo is checked (RFC 7143 §11.19.4)."""
        tag = fields.setdefault("initiator_task_tag", self.session.new_tag())
        self._request(self.initiator.nop_out, data, **fields)
        pdu = self._await(tag)
        if pdu.expect(bhs.NopIn).target_transfer_tag != RESERVED_TAG:
            self.initiator.breach(f"an echo must not ask for an answer (§11.19.2): {pdu.header}")
        if pdu.data != data[: self.max_data_in]:
            self.initiator.breach(f"echo of {data!r} is {pdu.data!r}")
        return pdu

    def task_management(
        self, function: int, *, lun: int | bytes = 0, task: Task | None = None, **fields: Any
    ) -> int:
        """Ask for a task management function; the Response code of the answer (RFC 7143 §11.6.1)."""
        tag = fields.setdefault("initiator_task_tag", self.session.new_tag())
        if task is not None:
            fields.setdefault("referenced_task_tag", task.tag)
            fields.setdefault("ref_cmd_sn", task.cmd_sn)
            lun = task.lun
        self.send(self.initiator.task_management(function, lun=lun, **fields))
        return self._await(tag).expect(bhs.TaskManagementResponse).response

    def logout(self, reason: int = LogoutReason.CLOSE_SESSION, **fields: Any) -> bhs.LogoutResponse:
        """Log out; what still comes for tasks before the answer is taken in."""
        tag = fields.setdefault("initiator_task_tag", self.session.new_tag())
        self._request(self.initiator.logout_request, reason, **fields)
        return self._await(tag).expect(bhs.LogoutResponse)

    # -- commands --

    def command(
        self,
        cdb: bytes,
        data_out: bytes = b"",
        read: int = 0,
        lun: int | bytes = 0,
        attribute: int = TaskAttribute.SIMPLE,
        **options: Any,
    ) -> Reply:
        """One SCSI command to its end; options are those of ``send_command``."""
        return self.wait(self.send_command(cdb, data_out, read, lun, attribute, **options))

    def send_command(
        self,
        cdb: bytes,
        data_out: bytes = b"",
        read: int = 0,
        lun: int | bytes = 0,
        attribute: int = TaskAttribute.SIMPLE,
        *,
        expected: int | None = None,
        immediate_data: int | None = None,
        unsolicited: int | None = None,
        **fields: Any,
    ) -> Task:
        """Send a command with what data may go along now; ``wait`` for the task it answers.

        Args:
            data_out: all the data of a write.
            read: bytes of room for Data-In.
            expected: Expected Data Transfer Length, if not what the two before say.
            immediate_data: bytes of immediate data, if not as many as may be.
            unsolicited: bytes of unsolicited data in all, immediate included, if not as many as may be.
        """
        write = bool(data_out)
        length = expected if expected is not None else len(data_out) or read
        first = int(self.keys["FirstBurstLength"])
        allowed = min(first, len(data_out), length)
        if immediate_data is None:
            may = self.keys["ImmediateData"] == "Yes"
            immediate_data = min(allowed, self.max_data_out) if may else 0
            if unsolicited is not None:
                immediate_data = min(immediate_data, unsolicited)
        if unsolicited is None:
            # With InitialR2T=Yes only immediate data goes unasked (RFC 7143 §13.10).
            unsolicited = allowed if self.keys["InitialR2T"] == "No" else immediate_data
        while not (fields.get("immediate") or "cmd_sn" in fields or self.session.window):
            self._dispatch(self.receive())
        tag = fields.setdefault("initiator_task_tag", self.session.new_tag())
        cmd_sn = fields.get("cmd_sn", self.session.cmd_sn)
        task = Task(
            tag=tag,
            cmd_sn=cmd_sn,
            lun=lun if isinstance(lun, bytes) else encode_lun(lun),
            data_out=data_out,
            expected=length,
            data_in=bytearray(read if not write else 0),
        )
        self.tasks[tag] = task
        fields.setdefault("read", read > 0 and not write)
        fields.setdefault("write", write)
        fields.setdefault("final", unsolicited <= immediate_data)
        parts = [
            self.initiator.scsi_command(
                cdb,
                data_out[:immediate_data],
                lun=task.lun,
                expected=length,
                attribute=attribute,
                **fields,
            )
        ]
        if unsolicited > immediate_data:
            parts += self.data_outs(task, immediate_data, unsolicited - immediate_data)
        self.send(b"".join(parts))
        return task

    def data_outs(
        self, task: Task, offset: int, length: int, *, transfer_tag: int = RESERVED_TAG, lun: bytes = bytes(8)
    ) -> list[bytes]:
        """The Data-Out PDUs of one sequence, F on the last (RFC 7143 §11.7.1)."""
        end = offset + length
        pdus = []
        for data_sn, at in enumerate(range(offset, end, self.max_data_out)):
            piece = task.data_out[at : min(at + self.max_data_out, end)]
            pdus.append(
                self.initiator.data_out(
                    piece,
                    tag=task.tag,
                    offset=at,
                    data_sn=data_sn,
                    final=at + self.max_data_out >= end,
                    transfer_tag=transfer_tag,
                    lun=lun,
                )
            )
        return pdus

    def answer_r2t(self, task: Task, r2t: bhs.ReadyToTransfer) -> None:
        """Send what the R2T asks for."""
        self.send(
            b"".join(
                self.data_outs(
                    task,
                    r2t.buffer_offset,
                    r2t.desired_data_transfer_length,
                    transfer_tag=r2t.target_transfer_tag,
                    lun=r2t.lun,
                )
            )
        )

    def wait(self, task: Task | int) -> Reply:
        """Read until the task (or the one with this tag) has ended.

        Raises:
            Rejected: by a Reject of the command.
        """
        if isinstance(task, int):
            task = self.tasks[task]
        while not task.done:
            self._dispatch(self.receive())
        self.tasks.pop(task.tag, None)
        if task.reject is not None:
            raise Rejected(task.reject)
        assert task.reply is not None
        return task.reply

    def wait_all(self) -> list[Reply]:
        """The replies of all tasks outstanding, in the order they were sent."""
        return [self.wait(task) for task in list(self.tasks.values())]

    def wait_for_r2t(self, task: Task) -> bhs.ReadyToTransfer:
        """The next R2T of the task; ``answer_r2ts`` must be off."""
        while not task.r2ts:
            if task.done:
                raise Breach(f"the task ended without an R2T: {task.reply or task.reject}")
            self._dispatch(self.receive())
        return task.r2ts.pop(0)

    def wait_for_async(self) -> Pdu:
        """The next Asynchronous Message."""
        while not self.asyncs:
            self._dispatch(self.receive())
        return self.asyncs.pop(0)

    def wait_for_ping(self) -> Pdu:
        """The next NOP-In of the target's own."""
        while not self.pings:
            self._dispatch(self.receive())
        return self.pings.pop(0)

    def _await(self, tag: int) -> Pdu:
        """The next PDU with this tag; others go where they belong."""
        while True:
            pdu = self.receive()
            if isinstance(pdu.header, bhs.Reject) and self._rejected_tag(pdu) == tag:
                self.rejects.append(pdu)
                raise Rejected(pdu)
            if pdu.initiator_task_tag == tag:
                return pdu
            self._dispatch(pdu)

    @staticmethod
    def _rejected_tag(pdu: Pdu) -> int:
        """The Initiator Task Tag of the header that a Reject returns (RFC 7143 §11.17)."""
        return int.from_bytes(pdu.data[16:20], "big") if len(pdu.data) >= BHS else RESERVED_TAG

    def _dispatch(self, pdu: Pdu) -> None:
        header = pdu.header
        if isinstance(header, bhs.NopIn) and header.initiator_task_tag == RESERVED_TAG:
            self.pings.append(pdu)
            if self.answer_pings and header.target_transfer_tag != RESERVED_TAG:
                self.send(self.initiator.nop_answer(header, pdu.data))
        elif isinstance(header, bhs.AsyncMessage):
            self.asyncs.append(pdu)
        elif isinstance(header, bhs.Reject):
            self.rejects.append(pdu)
            task = self.tasks.get(self._rejected_tag(pdu))
            if task is not None:
                task.reject = pdu
        elif (task := self.tasks.get(pdu.initiator_task_tag)) is not None:
            task.pdus.append(pdu)
            if isinstance(header, bhs.DataIn):
                self._take_data_in(task, header, pdu.data)
            elif isinstance(header, bhs.ReadyToTransfer):
                self._take_r2t(task, header)
            elif isinstance(header, bhs.ScsiResponse):
                self._take_response(task, header, pdu.data)
            else:
                self.initiator.breach(f"for a SCSI command came {header}")
        else:
            self.initiator.breach(f"for no request of ours: {header}")

    def _take_data_in(self, task: Task, header: bhs.DataIn, data: bytes) -> None:
        """RFC 7143 §11.7; DataPDUInOrder and DataSequenceInOrder are what we always ask for."""
        breach = self.initiator.breach
        if header.data_sn != task.next_data_sn:
            breach(f"DataSN {header.data_sn}, expected {task.next_data_sn}")
        task.next_data_sn += 1
        end = header.buffer_offset + len(data)
        if header.buffer_offset != task.received and self.keys["DataPDUInOrder"] == "Yes":
            breach(f"Buffer Offset {header.buffer_offset} after {task.received} bytes")
        if end > task.expected:
            breach(f"Data-In up to {end}, Expected Data Transfer Length is {task.expected}")
        if not data and not header.flags & 0x01:
            breach("Data-In without data or status")
        task.received += len(data)
        task.burst += len(data)
        if task.burst > int(self.keys["MaxBurstLength"]):
            breach(f"a Data-In sequence of {task.burst} bytes is longer than MaxBurstLength")
        if header.flags & bhs.FINAL:
            task.burst = 0
        if end > len(task.data_in):
            task.data_in.extend(bytes(end - len(task.data_in)))
        task.data_in[header.buffer_offset : end] = data
        if header.flags & 0x01:
            if not header.flags & bhs.FINAL:
                breach("S without F (§11.7.3)")
            self._finish(task, header.status, b"", header.flags, header.residual, 0)

    def _take_r2t(self, task: Task, header: bhs.ReadyToTransfer) -> None:
        """RFC 7143 §11.8."""
        breach = self.initiator.breach
        wanted = header.desired_data_transfer_length
        if header.r2t_sn != task.next_data_sn:
            breach(f"R2TSN {header.r2t_sn}, expected {task.next_data_sn}")
        task.next_data_sn += 1
        if header.target_transfer_tag == RESERVED_TAG:
            breach("R2T without a Target Transfer Tag")
        if not 0 < wanted <= int(self.keys["MaxBurstLength"]):
            breach(f"Desired Data Transfer Length {wanted}; MaxBurstLength {self.keys['MaxBurstLength']}")
        if header.buffer_offset + wanted > task.expected:
            breach(f"R2T up to {header.buffer_offset + wanted}; expected transfer is {task.expected}")
        if task.next_r2t_offset not in (None, header.buffer_offset):
            breach(f"R2T from {header.buffer_offset}, the one before ended at {task.next_r2t_offset}")
        task.next_r2t_offset = header.buffer_offset + wanted
        if self.answer_r2ts:
            self.answer_r2t(task, header)
            return
        task.r2ts.append(header)
        if len(task.r2ts) > int(self.keys["MaxOutstandingR2T"]):
            breach(f"{len(task.r2ts)} R2Ts outstanding; MaxOutstandingR2T {self.keys['MaxOutstandingR2T']}")

    def _take_response(self, task: Task, header: bhs.ScsiResponse, data: bytes) -> None:
        """RFC 7143 §11.4."""
        if not header.flags & bhs.FINAL:
            self.initiator.breach("bit 7 of a SCSI Response is always set")
        # §11.4.8 counts R2Ts, and in its next sentence asks for 0 where no Data-In was sent: either will do.
        data_ins = any(isinstance(pdu.header, bhs.DataIn) for pdu in task.pdus)
        counts = {task.next_data_sn} if data_ins else {task.next_data_sn, 0}
        if header.response == 0 and header.exp_data_sn not in counts:
            self.initiator.breach(f"ExpDataSN {header.exp_data_sn}, {task.next_data_sn} PDUs came (§11.4.8)")
        sense = b""
        if data:
            length = int.from_bytes(data[:2], "big")
            sense = data[2 : 2 + length]
            if len(sense) != length:
                self.initiator.breach(f"SenseLength {length}, {len(sense)} bytes came (§11.4.7.1)")
        if (header.status == ScsiStatus.CHECK_CONDITION) != bool(sense) and header.response == 0:
            self.initiator.breach(f"status {header.status:02x}h with {len(sense)} bytes of sense (§11.4.7)")
        self._finish(task, header.status, sense, header.flags, header.residual, header.response)

    def _finish(
        self, task: Task, status: int, sense: bytes, flags: int, residual: int, response: int
    ) -> None:
        over, under = bool(flags & 0x04), bool(flags & 0x02)
        if over and under:
            self.initiator.breach("O and U both set (§11.4.1)")
        if residual and not over and not under:
            self.initiator.breach(f"Residual Count {residual} without O or U (§11.4.5)")
        if under and not task.data_out and response == 0 and task.received != task.expected - residual:
            self.initiator.breach(
                f"{task.received} bytes of {task.expected} came, underflow {residual} (§11.4.5.1)"
            )
        whole = task.received == task.expected or under or bool(task.data_out)
        if status == ScsiStatus.GOOD and response == 0 and not whole:
            self.initiator.breach(f"GOOD without U for {task.received} bytes of {task.expected}")
        task.reply = Reply(
            status,
            bytes(task.data_in[: task.received]),
            sense,
            Residuals(residual if under else 0, residual if over else 0),
            response,
        )


# -- In memory --------------------------------------------------------------------------------------


class SansIoTarget(Protocol):
    """The side of a sans-IO connection that faces the wire."""

    def receive_data(self, view: memoryview, now: float) -> Any:
        """Bytes from the initiator, borrowed until the next call."""

    def data_to_send(self) -> Sequence[bytes | bytearray | memoryview]:
        """Bytes for the initiator."""


class MemoryPeer(Conversation):
    """A conversation with an object in memory; everything happens within the calls made here.

    Args:
        target: the connection under test.
        serve: called after each delivery, to handle the target's events (run its commands). Called
            again until nothing more is to be sent.
        split: deliver this many bytes at a time.

    Attributes:
        now: the time, in seconds, that the target is told with each delivery; a test sets it.

    What was delivered is overwritten at the next delivery, as a receive buffer in use again would be, so
    that a target which keeps a view of it longer than it may is found out.
    """

    def __init__(
        self,
        target: SansIoTarget,
        serve: Callable[[], object] | None = None,
        *,
        initiator: Initiator | None = None,
        split: int | None = None,
    ) -> None:
        super().__init__(initiator or Initiator())
        self.target = target
        self.serve = serve or (lambda: None)
        self.split = split
        self.now = 0.0
        self._delivered = bytearray()

    def send(self, data: bytes) -> None:
        """Deliver to the target; its answers wait until read."""
        step = self.split or len(data) or 1
        for at in range(0, len(data), step):
            self._delivered[:] = b"\xee" * len(self._delivered)
            self._delivered = bytearray(data[at : at + step])
            self.target.receive_data(memoryview(self._delivered), self.now)
            self.serve()

    def read_bytes(self) -> bytes:
        """All that the target has to say now; when that is nothing, ``ConnectionClosed``."""
        sent = b"".join(self.target.data_to_send())
        if not sent:
            self.serve()
            sent = b"".join(self.target.data_to_send())
        if not sent:
            raise ConnectionClosed("the target has nothing to say")
        return sent

    def pending(self) -> list[Pdu]:
        """Every PDU that has come and was not read; empty when the target is silent."""
        while True:
            try:
                self._inbox += self.initiator.feed(self.read_bytes())
            except ConnectionClosed:
                break
        waiting, self._inbox = self._inbox, []
        return waiting


# -- Over TCP ---------------------------------------------------------------------------------------


class SocketInitiator(Conversation):
    """A conversation over TCP, with blocking calls that time out.

    Args:
        address: (host, port) of a portal.
        timeout_s: for every wait.
        session: of a connection that logs in to an existing session, with a ``cid`` of its own.
        source: local address to connect from.
        kind: of the connection without I/O.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        timeout_s: float = 10.0,
        session: SessionState | None = None,
        cid: int = 1,
        strict: bool = True,
        source: str | None = None,
        kind: type[Initiator] = Initiator,
    ) -> None:
        super().__init__(kind(session, cid, strict=strict))
        self.address = address
        self.timeout_s = timeout_s
        self.socket = socket.create_connection(
            address, timeout_s, source_address=None if source is None else (source, 0)
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def another_connection(self, cid: int | None = None) -> "SocketInitiator":
        """A further connection for this session, not logged in yet (RFC 7143 §6.3.1)."""
        return SocketInitiator(
            self.address,
            timeout_s=self.timeout_s,
            session=self.session,
            cid=self.initiator.cid + 1 if cid is None else cid,
            strict=self.initiator.strict,
        )

    def another_login(self) -> "SocketInitiator":
        """A connection for a new session with the same ISID: logging in reinstates (RFC 7143 §6.3.5)."""
        fresh = SessionState(isid=self.session.isid)
        return SocketInitiator(
            self.address, timeout_s=self.timeout_s, session=fresh, strict=self.initiator.strict
        )

    def send(self, data: bytes) -> None:
        """All of it, or ``ConnectionClosed``."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed(str(error)) from error

    def read_bytes(self) -> bytes:
        """What has arrived, at least one byte."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError as error:
            raise ConnectionClosed(str(error)) from error
        if not data:
            raise ConnectionClosed("closed by the target")
        return data

    def wait_closed(self) -> list[Pdu]:
        """Read until the target closes; what it still said. ``TimeoutError`` when it does not."""
        last: list[Pdu] = list(self._inbox)
        self._inbox = []
        while True:
            try:
                last += self.initiator.feed(self.read_bytes())
            except ConnectionClosed:
                return last

    def close(self) -> None:
        """Close at once, logged out or not."""
        self.socket.close()
