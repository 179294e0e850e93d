"""The sans-IO Connection: bytes and completions in; bytes and events out.

One object a TCP connection (RFC 7143 §8.1.1). It owns the order of things on the wire: which PDU is allowed
in which phase (``_PHASES``), StatSN, digests, R2Ts, responses. What it never does: wait, look at a clock,
touch a socket or a medium. Its owner carries between it and the world::

    connection.receive_data(view, now)      → events: a Task is a command to submit to its unit
    connection.complete(task, outcome)      → bytes in ``out``
    connection.tick(now)                    → keepalive and time limits
    connection.data_to_send()               ← what to write, in order
    connection.closing                      ← close when that is written

Views in events and in ``Task.data_out`` are borrowed until the next ``receive_data``; ``Task.hold`` copies.
"""

from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct
from typing import Any

from protocol import allegiance, serial
from protocol.access import Authorizer, Refusal
from protocol.ahs import bidirectional_length, extended_cdb
from protocol.bhs import (
    FINAL,
    IMMEDIATE,
    AsyncMessage,
    LoginRequest,
    LoginResponse,
    LogoutRequest,
    LogoutResponse,
    NopIn,
    NopOut,
    Reject,
    ScsiCommand,
    ScsiResponse,
    TaskManagementRequest,
    TaskManagementResponse,
    TextRequest,
    TextResponse,
)
from protocol.bhs import DataIn as DataInHeader
from protocol.bhs import DataOut as DataOutHeader
from protocol.dataout import WriteTransfers
from protocol.dataout_recovery import RecoveringWrites
from protocol.digest import digest
from protocol.enums import (
    RESERVED_TAG,
    AsyncEvent,
    LoginStatus,
    LogoutReason,
    LogoutResponseCode,
    Opcode,
    RejectReason,
    ScsiStatus,
)
from protocol.errors import ProtocolViolation
from protocol.events import End, EndReason, LoggedIn, LoggedOut, LoginRefused
from protocol.fastpath import scsi_command_handler
from protocol.framer import Framer, Handler
from protocol.limits import (
    MAX_EARLY_HEADERS,
    MAX_IMMEDIATE_TASKS,
    MAX_LOGIN_DATA,
    MAX_TEXT_QUEUED,
    PING_PATIENCE,
    PROBE_S,
    LoginLimits,
)
from protocol.login import LoginMachine, LoginReply, LoginResult
from protocol.management import execute
from protocol.negotiation import ConnectionKeys
from protocol.paced import PIECE, Paced, pdus_of
from protocol.recovery import Recovery
from protocol.scsi.request import Buffer, Outcome
from protocol.session import DeferredPdu, Session, SessionTable
from protocol.task import FLAG_READ, FLAG_WRITE, Task, residuals
from protocol.text import TextExchange

__all__ = ["Connection", "Phase"]

_MASK = serial.MASK
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")
_NO_LUN = bytes(8)

_DATA_IN = DataInHeader.LAYOUT.pack
_RESPONSE = ScsiResponse.LAYOUT.pack
_COMMAND = ScsiCommand.LAYOUT.unpack_from
_TAG = Struct("!I").unpack_from
_EXP_STAT_SN_AT = 28


class Phase(IntEnum):
    """Where the connection is (RFC 7143 §8.1.3: IN_LOGIN, LOGGED_IN, IN_LOGOUT)."""

    LOGIN = 0
    FULL_FEATURE = 1
    LOGGED_OUT = 2


LOGOUT = End(EndReason.LOGOUT, "logout")


class Connection:
    """The target's end of one iSCSI connection."""

    __slots__ = (
        "_early",
        "_login",
        "_login_cmd_sn",
        "_logout_deadline",
        "_negotiation_deadline",
        "_next_tag",
        "_ping_sent_at",
        "_ping_tag",
        "_probes",
        "_text",
        "_text_queued",
        "authorizer",
        "cid",
        "closing",
        "closing_since",
        "events",
        "framer",
        "has_unread",
        "in_login_since",
        "io_timeout_s",
        "keys",
        "last_heard",
        "login_limits",
        "nop_interval_s",
        "now",
        "origin",
        "out",
        "owner",
        "paced",
        "phase",
        "recovery",
        "send_limit",
        "session",
        "sessions",
        "stat_sn",
        "touches",
        "writes",
    )

    def __init__(
        self,
        sessions: SessionTable,
        authorizer: Authorizer,
        *,
        randomness: Callable[[int], bytes],
        now: float,
        login_limits: LoginLimits | None = None,
        io_timeout_s: float = 30,
        nop_interval_s: float = 20,
        origin: str = "",
        owner: Any = None,
    ) -> None:
        """
        Args:
            randomness: n → n bytes that nobody can predict, for CHAP.
            now: seconds of any monotonic clock, as in every later call.
            io_timeout_s: a peer that stalls inside a PDU for longer is dropped; 0 = never.
            nop_interval_s: silence after which the peer is asked for a sign of life; 0 = never.
            origin: whom limits on sessions count it for, as an address.
            owner: whatever the owner wants to find again.
        """
        self.sessions = sessions
        self.authorizer = authorizer
        self.origin = origin
        self.owner = owner
        self.has_unread: Callable[[], bool] = _nothing_unread
        """Whether the peer has said something that was not received yet: then it is not silent."""
        self.session: Session | None = None
        self.cid = 0
        self.keys = ConnectionKeys()
        self.send_limit = MAX_LOGIN_DATA
        """The initiator's MaxRecvDataSegmentLength, bytes."""
        self.stat_sn = 1
        self.phase = Phase.LOGIN
        self.events: list[object] = []
        self.out: list[Buffer | Paced] = []
        self.paced = 0
        """Replies in ``out`` that are made in pieces."""
        self.closing: End | None = None
        """Why the connection is to be closed once ``out`` is sent; empty while it lives."""
        self.closing_since = 0.0
        self.now = now
        self.last_heard = now
        self.in_login_since = now
        self.io_timeout_s = io_timeout_s
        self.nop_interval_s = nop_interval_s
        self.login_limits = login_limits or LoginLimits()
        self._login: LoginMachine | None = LoginMachine(authorizer, self, randomness, self.login_limits)
        self._login_cmd_sn = 0
        self._text: TextExchange | None = None
        self._text_queued = 0
        """Bytes of text in ``out``."""
        self._early: dict[int, DeferredPdu] = {}
        """InitiatorTaskTag → a command that waits for its turn."""
        self._next_tag = 0
        self._ping_tag = RESERVED_TAG
        self._ping_sent_at = 0.0
        self._probes: dict[int, tuple[float, Callable[[], None]]] = {}
        """Target Transfer Tag of a NOP-In → until when its answer is waited for, and who does."""
        self._logout_deadline = 0.0
        self._negotiation_deadline = 0.0
        self.touches = False
        """Data-In is looked at or kept here, so it may not be a window on mapped memory."""
        self.recovery: Recovery | None = None
        """What can be sent again; None with ErrorRecoveryLevel 0, which pays nothing for it."""
        self.writes: WriteTransfers
        """From full feature phase on."""
        self.framer = Framer([], self._damaged, _nowhere, MAX_LOGIN_DATA)
        self._enter(Phase.LOGIN)

    # -- in -----------------------------------------------------------------------------------

    def receive_data(self, view: Buffer, now: float) -> None:
        """Take received bytes. Results are in ``events``, ``out`` and ``closing``."""
        self.now = self.last_heard = now
        try:
            self.framer.feed(view if isinstance(view, memoryview) else memoryview(view))
        except ProtocolViolation as violation:
            self._violated(violation)

    def received_in_target(self, count: int, now: float) -> None:
        """``count`` bytes were received into ``framer.receive_target()``."""
        self.now = self.last_heard = now
        try:
            self.framer.received_in_target(count)
        except ProtocolViolation as violation:
            self._violated(violation)

    @property
    def unread(self) -> bool:
        """Bytes were received and have not been looked at, as ``framer.pause`` has said so."""
        return self.framer.unread is not None

    def go_on(self, now: float) -> None:
        """Look at what is ``unread``; nothing more may be received before that is done."""
        self.now = now
        try:
            self.framer.go_on()
        except ProtocolViolation as violation:
            self._violated(violation)

    def was_alone(self, view: memoryview) -> bool:
        """Whether the initiator had nothing else under way when it sent the PDU at the start of ``view``,
        which was answered since: its ExpStatSN (RFC 7143 §11.3) is the StatSN of that answer."""
        exp_stat_sn: int = _TAG(view, _EXP_STAT_SN_AT)[0]
        return (exp_stat_sn + 1) & _MASK == self.stat_sn

    def take_events(self) -> list[object]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    def data_to_send(self) -> list[Buffer]:
        """What to write now, in order; the caller owns the list. As long as ``paced`` there is more."""
        out, self.out = self.out, []
        if self.paced:
            out = self._next_piece(out)
        if not self.paced:
            self._text_queued = 0
            if self.recovery is not None:
                self.recovery.resent = 0
        return out  # type: ignore[return-value]  # nothing paced is left in it

    def _next_piece(self, out: list[Buffer | Paced]) -> list[Buffer | Paced]:
        """What stands before replies that are made in pieces, and their next ``PIECE`` PDUs."""
        made: list[Buffer | Paced] = []
        left = PIECE
        for index, item in enumerate(out):
            if not isinstance(item, Paced):
                made.append(item)
                continue
            pdus = item.take(left) if left else []
            left -= len(pdus)
            for header, data in pdus:
                self._put(made, header, data)
            if not item.done:
                self.out = out[index:] + self.out
                return made
            self.paced -= 1
        return made

    def lost(self, reason: End) -> None:
        """The TCP connection is gone."""
        self.close(reason)
        session = self.session
        if session is not None and session.connections.get(self.cid) is self:
            allegiance.lose(self.sessions, session, self, reason)

    def unfinished_login(self) -> tuple[str, str, str]:
        """Initiator, target, and how far its login had come, where the connection ended within it. Some
        initiators do not say why they leave, as with a mutual CHAP that does not convince them."""
        machine = self._login
        return (machine.initiator_name, machine.target_name, machine.so_far) if machine else ("", "", "")

    def close(self, reason: End) -> None:
        """Say nothing more than what is queued, then close."""
        if not self.closing:
            self.closing = reason
            self.closing_since = self.now
            self._enter(Phase.LOGGED_OUT)
            self.sessions.stirred.add(self)
            self._conclude_probes(list(self._probes))

    def tick(self, now: float) -> None:
        """Time has passed: login limit, stalled peer, keepalive."""
        self.now = now
        if self.closing:
            return
        if self.phase == Phase.LOGIN:
            if now - self.in_login_since > self.login_limits.seconds:
                self.close(End(EndReason.LOGIN_TIMEOUT, f"no login within {self.login_limits.seconds} s"))
            return
        overdue = self._overdue(now)
        if overdue and not self.has_unread():
            if self._logout_deadline and now > self._logout_deadline and self.session is not None:
                self.sessions.end(self.session, overdue, notice=True)  # all its connections were asked
            else:
                self.lost(overdue)
        elif (
            self.nop_interval_s
            and self._ping_tag == RESERVED_TAG
            and now - self.last_heard > self.nop_interval_s
        ):
            self._ping_tag = self.new_tag()
            self._ping_sent_at = now
            self._nop_in(RESERVED_TAG, self._ping_tag, _NO_LUN, b"")
        if self._probes:
            self._conclude_probes([tag for tag, (until, _) in self._probes.items() if now > until])
        if not self.closing:
            self.writes.tick(now)
            if self.recovery is not None:
                self.sessions.stirred.add(self)

    def _overdue(self, now: float) -> End | None:
        """What the peer owes us for too long; None: nothing."""
        silence = now - self.last_heard
        if self.io_timeout_s and self.framer.in_pdu and silence > self.io_timeout_s:
            return End(EndReason.IO_TIMEOUT, f"stalled inside a PDU for {silence:.0f} s (iscsi_iotimeout)")
        if self._logout_deadline and now > self._logout_deadline:
            return End(EndReason.LOGOUT_TIMEOUT, "did not log out when asked to")
        if self._negotiation_deadline and now > self._negotiation_deadline:
            return End(EndReason.NEGOTIATION_TIMEOUT, "did not negotiate when asked to")
        waited = now - self._ping_sent_at
        if self._ping_tag != RESERVED_TAG and waited > PING_PATIENCE * self.nop_interval_s:
            return End(EndReason.PING_TIMEOUT, f"no answer to NOP-In for {waited:.0f} s (iscsi_nopinint)")
        return None

    def excuse(self, seconds: float) -> None:
        """For so long nobody was here to listen, as the process or the machine stood still: no time limit of
        the peer's goes on meanwhile."""
        self.last_heard += seconds
        self.in_login_since += seconds
        self.closing_since += seconds
        self._ping_sent_at += seconds
        if self._logout_deadline:
            self._logout_deadline += seconds
        if self._negotiation_deadline:
            self._negotiation_deadline += seconds
        self._probes = {tag: (until + seconds, then) for tag, (until, then) in self._probes.items()}
        if self.phase == Phase.FULL_FEATURE:
            self.writes.excuse(seconds)

    def probe(self, answered: Callable[[], None]) -> None:
        """Call ``answered`` once the initiator has shown that it has got everything sent so far, or when it
        has had long enough for that, or the connection is gone."""
        if len(self._probes) >= MAX_IMMEDIATE_TASKS:
            answered()
            return
        tag = self.new_tag()
        self._probes[tag] = self.now + PROBE_S, answered
        self._nop_in(RESERVED_TAG, tag, _NO_LUN, b"")

    def _conclude_probes(self, tags: list[int]) -> None:
        for tag in tags:
            self._probes.pop(tag)[1]()

    # -- phases -------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        default, allowed = _PHASES[phase]
        handlers: list[Handler] = [getattr(self, default)] * 64
        for opcode, name in allowed.items():
            handlers[opcode] = getattr(self, name)
        if phase == Phase.FULL_FEATURE:
            handlers[Opcode.SCSI_DATA_OUT] = self.writes.data_out
            if self.recovery is not None:
                handlers[Opcode.SNACK_REQUEST] = self.recovery.snack
                handlers = [self.recovery.noting(handler) for handler in handlers]
        self.framer.handlers = handlers
        self.choose_path()

    def choose_path(self) -> None:
        """Which way SCSI commands go from now on (``protocol.fastpath``)."""
        session = self.session
        if self.phase != Phase.FULL_FEATURE or self.recovery is not None or session is None:
            return
        plain = session.target is not None and not session.withheld
        self.framer.handlers[Opcode.SCSI_COMMAND] = (
            scsi_command_handler(self, self._scsi_command) if plain else self._scsi_command
        )

    def _ignore(self, view: memoryview, at: int, data: memoryview) -> None:
        """After logout nothing more is looked at."""

    def _not_login(self, view: memoryview, at: int, data: memoryview) -> None:
        """RFC 7143 §6.3: anything but a Login Request ends the connection; at once before the first Login
        Request, with "invalid during login" after it."""
        machine = self._login
        if machine is not None and machine.first is not None:
            reason = f"opcode {view[at] & 0x3F:#04x} during login"
            self._login_response(
                machine.first, LoginReply(status=LoginStatus.INVALID_DURING_LOGIN, reason=reason)
            )
            return
        raise ProtocolViolation(
            RejectReason.PROTOCOL_ERROR, f"opcode {view[at] & 0x3F:#04x} before login", fatal=True
        )

    def _unsupported(self, view: memoryview, at: int, data: memoryview) -> None:
        self.reject(RejectReason.COMMAND_NOT_SUPPORTED, view, at)

    def _violated(self, violation: ProtocolViolation) -> None:
        self.lost(End(EndReason.PROTOCOL, violation.message))

    def _damaged(self, view: memoryview, at: int, data: memoryview) -> None:
        """A data digest is wrong (RFC 7143 §7.8): Reject, and the PDU never happened.

        A Data-Out's command can then not end well, and says so. Anything else the initiator sends again if
        the session recovers within connections (ErrorRecoveryLevel 1 and 2). At level 0 it does not: the
        CmdSN of the PDU would be waited for for ever, and so would the answer to one that has none. There the
        connection ends, which is session recovery (§7.1.5): the initiator logs in again at once.
        """
        if self.closing:
            return
        self.reject(RejectReason.DATA_DIGEST_ERROR, view, at)
        opcode = view[at] & 0x3F
        concluded = opcode == Opcode.SCSI_DATA_OUT and self.writes.damaged(view, at, len(data))
        if not concluded and self.recovery is None:
            words = f"data digest error in a PDU of opcode {opcode:#04x}, at ErrorRecoveryLevel 0"
            self.close(End(EndReason.PROTOCOL, words))

    # -- login --------------------------------------------------------------------------------

    def admit(self, login: LoginResult) -> int | Refusal:
        """``access.SessionDirectory`` for this one connection."""
        answer = self.sessions.admit(login, self, self._login_cmd_sn, self.now)
        if isinstance(answer, Refusal):
            return answer
        self.session = answer
        self.cid = login.cid
        return answer.tsih

    def _login_request(self, view: memoryview, at: int, data: memoryview) -> None:
        request = LoginRequest.parse(view, at)
        assert self._login is not None
        self._login_cmd_sn = request.cmd_sn
        self._login_response(request, self._login.receive(request, data))

    def _login_response(self, request: LoginRequest, reply: LoginReply) -> None:
        machine = self._login
        assert machine is not None
        session = self.session
        # The login request is immediate: the first command carries the same CmdSN (RFC 7143 §11.12.8).
        exp_cmd_sn = session.exp_cmd_sn if session else request.cmd_sn
        max_cmd_sn = session.max_cmd_sn if session else request.cmd_sn
        header = LoginResponse(
            Opcode.LOGIN_RESPONSE, reply.flags, 0, reply.version_active, len(reply.data), request.isid,
            reply.tsih, request.initiator_task_tag, self.status_number(), exp_cmd_sn, max_cmd_sn,
            reply.status >> 8, reply.status & 0xFF,
        )  # fmt: skip
        self.send(header.build(), reply.data)
        if reply.status >> 8:
            self.events.append(
                LoginRefused(
                    machine.initiator_name, machine.target_name, int(reply.status), reply.reason, reply.bug
                )
            )
            self.close(End(EndReason.LOGIN_REFUSED, f"login refused: {reply.reason}"))
        elif reply.result is not None:
            self._logged_in(reply.result)

    def _logged_in(self, login: LoginResult) -> None:
        session = self.session
        assert session is not None
        keys = login.connection_keys
        self.keys = keys
        self.send_limit = keys.max_recv_data_segment_length_initiator
        self.framer.max_data = keys.max_recv_data_segment_length_target
        self.framer.header_digest = keys.header_digest
        self.framer.data_digest = keys.data_digest
        self._login = None
        self._text = TextExchange(self.authorizer, session, keys)
        if session.keys.error_recovery_level:
            self.recovery = Recovery(self, session)
            self.writes = RecoveringWrites(self, session, self._keep_for_early, self.recovery)
            self.framer.resynchronise = True
        else:
            self.writes = WriteTransfers(self, session, self._keep_for_early)
        self.touches = keys.data_digest or self.recovery is not None
        self.framer.place = self.writes.place
        self._enter(Phase.FULL_FEATURE)
        self.events.append(LoggedIn(session, self.cid))

    # -- out ----------------------------------------------------------------------------------

    def status_number(self) -> int:
        """The StatSN of a response that carries status."""
        stat_sn = self.stat_sn
        self.stat_sn = (stat_sn + 1) & _MASK
        return stat_sn

    def answer(self, header: bytes, data: Buffer = b"") -> None:
        """Queue one PDU that carries status, with a StatSN of its own."""
        if self.recovery is not None:
            self.recovery.keep_answer(header, data)
        self.send(header, data)

    def send(self, header: bytes, data: Buffer = b"") -> None:
        """Queue one PDU; ``header`` has the lengths already."""
        self._put(self.out, header, data)

    def send_paced(self, pdus: Iterator[tuple[bytes, Buffer]], count: int, size: int) -> None:
        """Queue ``count`` PDUs with ``size`` bytes of data; many of them are made as they are sent."""
        if count <= PIECE:
            for header, data in pdus:
                self.send(header, data)
        else:
            self.out.append(Paced(pdus, size + 48 * count))
            self.paced += 1

    def _put(self, out: list[Buffer | Paced], header: bytes, data: Buffer) -> None:
        out.append(header)
        if self.phase != Phase.LOGIN and self.framer.header_digest:
            out.append(digest(header))
        size = len(data)
        if size:
            out.append(data)
            if size & 3:
                out.append(_PAD[size & 3])
            if self.phase != Phase.LOGIN and self.framer.data_digest:
                out.append(digest(data, _PAD[size & 3]))

    def _window(self) -> tuple[int, int]:
        session = self.session
        assert session is not None
        return session.exp_cmd_sn, session.max_cmd_sn

    def reject(self, reason: RejectReason, view: memoryview, at: int) -> None:
        """Reject the PDU whose header is at ``view[at:]`` (RFC 7143 §11.17)."""
        header = Reject(
            Opcode.REJECT, FINAL, reason, 48, RESERVED_TAG, self.status_number(), *self._window(), 0
        )
        self.answer(header.build(), bytes(view[at : at + 48]))

    def new_tag(self) -> int:
        """A Target Transfer Tag that is not in use."""
        while True:
            self._next_tag = (self._next_tag + 1) & _MASK
            if self._next_tag != RESERVED_TAG and self._next_tag not in self.writes.bursts:
                return self._next_tag

    def request_logout(self, within_s: int, reason: End) -> None:
        """Ask the initiator to log out (Async Message, RFC 7143 §11.9.1), and drop it if it does not."""
        if self.phase != Phase.FULL_FEATURE:
            self.close(reason)
            return
        if not self._logout_deadline:
            self._logout_deadline = self.now + within_s
            self.asynchronous(AsyncEvent.LOGOUT_REQUEST, parameter3=within_s)

    def request_negotiation(self, within_s: int) -> bool:
        """Ask for a Text Request, to negotiate anew (Async Message 4, RFC 7143 §11.9.1), and drop
        the connection if none comes; False: not in full feature phase, or on its way out of it."""
        if self.phase != Phase.FULL_FEATURE or self._logout_deadline or self._text is None:
            return False
        if not self._negotiation_deadline:
            self._negotiation_deadline = self.now + within_s
            self._text.renegotiate()
            self.asynchronous(AsyncEvent.NEGOTIATION_REQUEST, parameter3=within_s)
        return True

    def asynchronous(
        self,
        event: AsyncEvent,
        vcode: int = 0,
        parameter1: int = 0,
        parameter2: int = 0,
        parameter3: int = 0,
        lun: bytes = _NO_LUN,
        data: bytes = b"",
    ) -> None:
        """Queue an Asynchronous Message (RFC 7143 §11.9)."""
        header = AsyncMessage(
            Opcode.ASYNC_MESSAGE, FINAL, len(data), lun, RESERVED_TAG, self.status_number(), *self._window(),
            event, vcode, parameter1, parameter2, parameter3,
        )  # fmt: skip
        self.answer(header.build(), data)
        self.sessions.stirred.add(self)

    # -- commands in --------------------------------------------------------------------------

    def _in_turn(self, opcode: int, cmd_sn: int, view: memoryview, at: int, data: memoryview) -> bool:
        """Whether this PDU is to be carried out now; one that is early is kept for its turn."""
        session = self.session
        assert session is not None
        if opcode & IMMEDIATE:
            return True
        if cmd_sn == session.exp_cmd_sn:
            return session.in_turn(cmd_sn)
        if session.is_early(cmd_sn):
            early = DeferredPdu(self, bytes(view[at : at + 48 + 4 * view[at + 4]]), bytes(data))
            session.held[cmd_sn] = early
            if opcode == Opcode.SCSI_COMMAND:
                self._early[_TAG(view, at + 16)[0]] = early
        return False

    def carry_out_early(self, early: DeferredPdu) -> None:
        """The turn of a PDU has come, maybe by what another connection received."""
        tag = _TAG(early.header, 16)[0]
        if self._early.get(tag) is early:
            del self._early[tag]
        try:
            self.framer.handlers[early.header[0] & 0x3F](memoryview(early.header), 0, memoryview(early.data))
            for header, data in early.data_outs:
                self.framer.handlers[Opcode.SCSI_DATA_OUT](memoryview(header), 0, memoryview(data))
        except ProtocolViolation as violation:
            self._violated(violation)
        self.sessions.stirred.add(self)

    def forget_early(self, early: DeferredPdu) -> None:
        """It will not be carried out; unsolicited data that still comes for it is dropped silently."""
        tag = _TAG(early.header, 16)[0]
        if self._early.get(tag) is early:
            del self._early[tag]
            self.writes.forgotten.append(tag)

    def _keep_for_early(self, header: DataOutHeader, view: memoryview, at: int, data: memoryview) -> bool:
        """Whether this is unsolicited data of a command that waits for its turn; then it waits too."""
        early = self._early.get(header.initiator_task_tag)
        if early is None or header.target_transfer_tag != RESERVED_TAG:
            return False
        early.size += 48 + len(data)
        assert self.session is not None
        if early.size <= self.session.keys.first_burst_length + MAX_EARLY_HEADERS:
            early.data_outs.append((bytes(view[at : at + 48]), bytes(data)))
        return True  # what is too much is missed later: the sequence is broken then

    def _scsi_command(self, view: memoryview, at: int, data: memoryview) -> None:
        opcode, flags, lengths, lun, tag, expected, cmd_sn, _, cdb = _COMMAND(view, at)
        session = self.session
        assert session is not None
        if not self._in_turn(opcode, cmd_sn, view, at, data):
            return
        immediate = bool(opcode & IMMEDIATE)
        target = session.target
        tasks = session.tasks
        refusal = None
        if target is None:
            refusal = RejectReason.PROTOCOL_ERROR  # a discovery session has no LUNs (RFC 7143 §4.3)
        elif tag in tasks:
            refusal = RejectReason.TASK_IN_PROGRESS
        elif immediate and sum(task.immediate for task in tasks.values()) >= MAX_IMMEDIATE_TASKS:
            refusal = RejectReason.IMMEDIATE_COMMAND_REJECT
        if refusal is not None or target is None:
            self.reject(refusal or RejectReason.PROTOCOL_ERROR, view, at)
            if not immediate:
                session.retired()
            session.release_held()
            return
        unit = target.unit_for(lun)
        if lengths >> 24:
            cdb += extended_cdb(view, at, lengths >> 24)
        task = Task(self, session.nexus, unit, flags, lun, tag, expected, cmd_sn, immediate, cdb)
        if lengths >> 24 and flags & FLAG_READ and flags & FLAG_WRITE:
            task.expected_in = bidirectional_length(view, at, lengths >> 24)
        tasks[tag] = task
        session.commands += 1
        outcome = unit.admit(task)
        if not flags & FLAG_WRITE or (flags & FINAL and not data and not expected):
            if outcome is None:
                self.events.append(task)
            else:
                self.complete(task, outcome)
        elif (
            outcome is None
            and len(data) == expected
            and flags & FINAL
            and self.writes.immediate_allowed(expected)
        ):
            task.data_out = data
            task.borrowed = not view.readonly
            self.events.append(task)
        else:
            self.writes.begin(task, outcome, data)
        if session.held:
            session.release_held()

    def forget(self, task: Task) -> None:
        """The task was aborted: nothing more is sent for it, and its late Data-Out is dropped silently."""
        session = self.session
        if session is None or session.tasks.get(task.initiator_task_tag) is not task:
            return
        del session.tasks[task.initiator_task_tag]
        if not task.immediate:
            session.retired()
        self.writes.forget(task)
        if self.recovery is not None:
            self.recovery.drop(task.initiator_task_tag)

    def conclude(self, task: Task, outcome: Outcome) -> None:
        """End a task that its logical unit has dropped, with a status. While data is still due the status
        waits for it (RFC 7143 §11.4.2); what a worker has in hand is over for the initiator now."""
        session = self.session
        if session is None or session.tasks.get(task.initiator_task_tag) is not task:
            return
        if self.closing:  # lost: TASK REASSIGN tells the initiator that there is no such task
            self.forget(task)
            return
        self.sessions.stirred.add(self)
        transfer = task.transfer
        if transfer is not None and transfer.open:
            task.aborted = False  # no worker has it, and this is the only outcome that it can have
            transfer.outcome = outcome
            self.writes.advance(task)
            return
        if transfer is not None and task.unit.has_in_hand(task):
            self.writes.linger(task)
        task.aborted = False
        self.complete(task, outcome)
        task.aborted = True

    # -- commands out -------------------------------------------------------------------------

    def complete(self, task: Task, outcome: Outcome) -> None:
        """Queue the response of a command: Data-In, then status, with exact residuals (RFC 7143 §11.4.5)."""
        session = self.session
        if task.aborted or session is None:
            return
        if self.closing:
            allegiance.ended_meanwhile(session, task, outcome)
            return
        if session.tasks.pop(task.initiator_task_tag, None) is None:
            return
        if task.immediate:
            pass
        elif session.withheld:
            session.retired()
        else:
            session.max_cmd_sn = (session.max_cmd_sn + 1) & _MASK
        status = outcome.status
        data = outcome.data_in
        flags, residual, read_residual = residuals(task, len(data))
        if len(data) > task.expected_in:
            data = _cut(data, task.expected_in)
        if data:
            session.bytes_read += len(data)
            # With both directions the residuals have fields of their own, in the SCSI Response only.
            collapse = status == ScsiStatus.GOOD and not task.flags & FLAG_WRITE and self.recovery is None
            if self.recovery is not None:
                self.recovery.send_data(task, data)
            else:
                self._data_in(task, data, flags if collapse else 0, residual if collapse else 0, collapse)
            if collapse:
                return
        if task.expected_out and status == ScsiStatus.GOOD:
            session.bytes_written += min(task.expected_out, task.transfer_length)
        sense = outcome.sense
        if sense:
            sense = len(sense).to_bytes(2, "big") + sense
        header = _RESPONSE(
            0x21, 0x80 | flags, 0, status, len(sense), task.initiator_task_tag, 0, self.status_number(),
            session.exp_cmd_sn, session.max_cmd_sn, task.data_sn, read_residual, residual,
        )  # fmt: skip
        self.answer(header, sense)
        if task.transfer is not None:
            self.writes.release(task)

    def _data_in(self, task: Task, data: Buffer, flags: int, residual: int, collapse: bool) -> None:
        """Data-In PDUs for all of ``data``; with ``collapse`` the last one carries GOOD status."""
        session = self.session
        assert session is not None
        size = len(data)
        if size <= self.send_limit and size <= session.keys.max_burst_length:
            bits, stat_sn = 0x80, 0
            if collapse:
                bits |= 0x01 | flags
                stat_sn = self.status_number()
            header = _DATA_IN(
                0x25, bits, 0, size, _NO_LUN, task.initiator_task_tag, RESERVED_TAG, stat_sn,
                session.exp_cmd_sn, session.max_cmd_sn, task.data_sn, 0, residual,
            )  # fmt: skip
            task.data_sn += 1
            self.send(header, data)
            return
        limit, burst = self.send_limit, session.keys.max_burst_length
        count = pdus_of(size, limit, burst)
        last = 0x80, 0, 0
        if collapse:
            last = 0x81 | flags, self.status_number(), residual
        pdus = _data_in_pdus(
            memoryview(data), limit, burst, task.initiator_task_tag, self._window(), task.data_sn, last
        )
        task.data_sn += count
        self.send_paced(pdus, count, size)

    # -- the rest of full feature phase -------------------------------------------------------

    def _task_management(self, view: memoryview, at: int, data: memoryview) -> None:
        """Carried out here and now, not by the owner later: commands that follow it in the same bytes are
        not in the task set yet, and must not be ended by it (RFC 7143 §4.2.3.3, §11.5.1)."""
        request = TaskManagementRequest.parse(view, at)
        if not self._in_turn(request.opcode, request.cmd_sn, view, at, data):
            return
        session = self.session
        assert session is not None
        if not request.opcode & IMMEDIATE:
            session.retired()
        if session.target is None:
            self._not_in_discovery(view, at)
        else:
            execute(self, session, session.target, request)
        session.release_held()

    def answer_task_management(
        self, request: TaskManagementRequest, response: int, additional: bytes = bytes(3)
    ) -> None:
        """Queue the response to a task management function (RFC 7143 §11.6).

        ``additional`` is the Additional Response Information of RFC 7144 §5, bytes 8 to 10 of the header.
        """
        header = TaskManagementResponse(
            Opcode.TASK_MANAGEMENT_RESPONSE, FINAL, response, 0, request.initiator_task_tag,
            self.status_number(), *self._window(),
        ).build()  # fmt: skip
        self.answer(header[:8] + additional + header[11:])

    def _not_in_discovery(self, view: memoryview, at: int) -> None:
        """RFC 7143 §4.3: a discovery session takes SendTargets and logout, all else MUST be rejected."""
        self.reject(RejectReason.PROTOCOL_ERROR, view, at)

    def _nop_out(self, view: memoryview, at: int, data: memoryview) -> None:
        request = NopOut.parse(view, at)
        if request.initiator_task_tag == RESERVED_TAG:
            # An answer to our ping, or a sign of life that wants no answer (RFC 7143 §11.18).
            if request.target_transfer_tag == self._ping_tag:
                self._ping_tag = RESERVED_TAG
            elif request.target_transfer_tag in self._probes:
                self._conclude_probes([request.target_transfer_tag])
            elif request.target_transfer_tag != RESERVED_TAG:
                self.reject(RejectReason.INVALID_PDU_FIELD, view, at)
            return
        if not self._in_turn(request.opcode, request.cmd_sn, view, at, data):
            return
        session = self.session
        assert session is not None
        if not request.opcode & IMMEDIATE:
            session.retired()
        if session.target is None:
            self._not_in_discovery(view, at)
        else:
            echo = bytes(data[: self.send_limit])
            self._nop_in(request.initiator_task_tag, RESERVED_TAG, request.lun, echo, status=True)
        session.release_held()

    def _nop_in(
        self, initiator_tag: int, target_tag: int, lun: bytes, data: bytes, *, status: bool = False
    ) -> None:
        stat_sn = self.status_number() if status else self.stat_sn
        header = NopIn(
            Opcode.NOP_IN, FINAL, len(data), lun, initiator_tag, target_tag, stat_sn, *self._window()
        )
        if status:
            self.answer(header.build(), data)
        else:
            self.send(header.build(), data)
            self.sessions.stirred.add(self)

    def _text_request(self, view: memoryview, at: int, data: memoryview) -> None:
        request = TextRequest.parse(view, at)
        if not self._in_turn(request.opcode, request.cmd_sn, view, at, data):
            return
        assert self._text is not None and self.session is not None
        if not request.opcode & IMMEDIATE:
            self.session.retired()
        try:
            if self._text_queued > MAX_TEXT_QUEUED:
                raise ProtocolViolation(
                    RejectReason.LONG_OPERATION_REJECT, f"{self._text_queued} bytes of text wait to be read"
                )
            reply = self._text.receive(request, data)
        except ProtocolViolation as violation:
            if violation.fatal:
                raise
            assert isinstance(violation.reason, RejectReason)
            self.reject(violation.reason, view, at)
        else:
            header = TextResponse(
                Opcode.TEXT_RESPONSE, reply.flags, len(reply.data), request.lun, reply.initiator_task_tag,
                reply.target_transfer_tag, self.status_number(), *self._window(),
            )  # fmt: skip
            self.answer(header.build(), reply.data)
            self._text_queued += len(reply.data)
            self._negotiation_deadline = 0.0
            if reply.settled:
                self.send_limit = self.keys.max_recv_data_segment_length_initiator
                # What left the initiator before it read this may be as long as was right then, and nothing
                # tells when the last of it has come: a shorter one is declared, and a longer one taken.
                self.framer.max_data = max(
                    self.framer.max_data, self.keys.max_recv_data_segment_length_target
                )
        self.session.release_held()

    def _logout_request(self, view: memoryview, at: int, data: memoryview) -> None:
        request = LogoutRequest.parse(view, at)
        if not self._in_turn(request.opcode, request.cmd_sn, view, at, data):
            return
        session = self.session
        assert session is not None
        if not request.opcode & IMMEDIATE:
            session.retired()
        answer = self._logout(session, request)
        keys = session.keys
        header = LogoutResponse(
            Opcode.LOGOUT_RESPONSE, FINAL, answer, 0, request.initiator_task_tag, self.status_number(),
            *self._window(), keys.default_time2wait, keys.default_time2retain,
        )  # fmt: skip
        self.answer(header.build())
        if answer != LogoutResponseCode.CLOSED:
            return
        reason = request.flags & 0x7F
        last = set(session.connections) <= {request.cid} and not session.lost
        if reason == LogoutReason.REMOVE_CONNECTION_FOR_RECOVERY:
            allegiance.remove_for_recovery(session, request.cid)
        elif reason == LogoutReason.CLOSE_CONNECTION and not last:
            allegiance.log_out(session, request.cid)
        else:
            self.events.append(LoggedOut(session))
            self.sessions.end(session, LOGOUT)
            self.close(LOGOUT)

    def _logout(self, session: Session, request: LogoutRequest) -> LogoutResponseCode:
        reason = request.flags & 0x7F
        if reason == LogoutReason.CLOSE_SESSION:
            return LogoutResponseCode.CLOSED
        if reason != LogoutReason.CLOSE_CONNECTION and session.keys.error_recovery_level < 2:
            return LogoutResponseCode.RECOVERY_NOT_SUPPORTED
        return (
            LogoutResponseCode.CLOSED
            if allegiance.is_known(session, request.cid)
            else LogoutResponseCode.CID_NOT_FOUND
        )

    def _snack(self, view: memoryview, at: int, data: memoryview) -> None:
        """RFC 7143 §7.1.4.1: SNACK is for ErrorRecoveryLevel 1 and above, which is not in force."""
        self.reject(RejectReason.SNACK_REJECT, view, at)


_PHASES: dict[Phase, tuple[str, dict[int, str]]] = {
    Phase.LOGIN: ("_not_login", {Opcode.LOGIN_REQUEST: "_login_request"}),
    Phase.FULL_FEATURE: (
        "_unsupported",
        {
            Opcode.NOP_OUT: "_nop_out",
            Opcode.SCSI_COMMAND: "_scsi_command",
            Opcode.TASK_MANAGEMENT_REQUEST: "_task_management",
            Opcode.TEXT_REQUEST: "_text_request",
            Opcode.LOGOUT_REQUEST: "_logout_request",
            Opcode.SNACK_REQUEST: "_snack",
        },
    ),
    Phase.LOGGED_OUT: ("_ignore", {}),
}
"""Phase → (handler of everything else, opcode → handler)."""


def _data_in_pdus(
    data: memoryview,
    limit: int,
    burst: int,
    tag: int,
    window: tuple[int, int],
    data_sn: int,
    last: tuple[int, int, int],
) -> Iterator[tuple[bytes, Buffer]]:
    """Data-In PDUs of at most ``limit`` bytes, in sequences of ``burst`` bytes (RFC 7143 §11.7).

    Args:
        window: ExpCmdSN and MaxCmdSN.
        last: flags, StatSN and residual count of the last of them.
    """
    size = len(data)
    at = in_burst = 0
    while at < size:
        length = min(size - at, limit, burst - in_burst)
        in_burst += length
        bits, stat_sn, residual = (0x80 if in_burst == burst else 0), 0, 0
        if in_burst == burst:
            in_burst = 0
        if at + length == size:
            bits, stat_sn, residual = last
        header = _DATA_IN(
            0x25, bits, 0, length, _NO_LUN, tag, RESERVED_TAG, stat_sn, *window, data_sn, at, residual
        )
        yield header, data[at : at + length]
        data_sn += 1
        at += length


def _cut(data: Buffer, length: int) -> Buffer:
    """The first bytes; a window keeps all of what it is on, and a reply may have to wait for long."""
    view = memoryview(data)[:length]
    return bytes(view) if 2 * length < len(data) and isinstance(view.obj, bytes | bytearray) else view


def _nothing_unread() -> bool:
    return False


def _nowhere(view: memoryview, at: int, size: int) -> memoryview | None:
    """Where data goes before full feature phase."""
    return None
