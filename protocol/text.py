"""Text Requests in full feature phase (RFC 7143 §6.4, §11.10, §11.11, appendix C): SendTargets, and the few
keys that may be renegotiated.

One exchange at a time on a connection. It is told from the next one by the Target Transfer Tag: we give
one as long as we have more to say or expect more; a request without it begins anew (§11.10.4). What is
declared in an exchange holds from its end on (§6.4); one that is given up or rejected changes nothing.

Of the keys of §13 those with Use "ALL" may be declared here: MaxRecvDataSegmentLength by both sides, and the
aliases. We say ours when the initiator says its own, and when we asked for the negotiation
(``renegotiate``); never unasked in an answer to SendTargets.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol import names
from protocol.access import Authorizer, Grant, TargetList
from protocol.bhs import FINAL, TextRequest
from protocol.enums import RESERVED_TAG, AuthMethod, RejectReason
from protocol.errors import ProtocolViolation
from protocol.limits import MAX_TEXT, MAX_TEXT_PIECE
from protocol.negotiation import KEYS, LOGIN_KEYS, OBSOLETE, RESPONSES, ConnectionKeys
from protocol.textkeys import TextError, build, cut, parse, read_number

if TYPE_CHECKING:
    from protocol.session import Session

__all__ = ["TextExchange", "TextReply"]

_CONTINUE = 0x40
_LENGTH = "MaxRecvDataSegmentLength"
_THEIRS, _OURS = "max_recv_data_segment_length_initiator", "max_recv_data_segment_length_target"


@dataclass(frozen=True, slots=True)
class TextReply:
    """What a Text Response says; numbering is the connection's."""

    flags: int
    initiator_task_tag: int
    target_transfer_tag: int
    data: bytes
    settled: bool = False
    """The exchange is over; the MaxRecvDataSegmentLengths declared in it hold behind this PDU."""


_Answers = list[tuple[str, str] | TargetList]


class _Unsent:
    """An answer as far as it was not sent yet. Of a list of targets only what is sent is looked at: an
    initiator may ask for it again and again, and read no more than its beginning."""

    __slots__ = ("_answers", "_number", "_ready")

    def __init__(self, answers: _Answers | None = None) -> None:
        self._answers = deque(answers or ())
        self._number = 0
        """Of the record that is next, where a list is."""
        self._ready = b""
        self._fill(0)

    def __bool__(self) -> bool:
        return bool(self._ready)

    def take(self, limit: int) -> bytes:
        """What goes into one data segment."""
        self._fill(limit)
        piece, self._ready = cut(self._ready, limit)
        self._fill(0)
        return piece

    def _fill(self, size: int) -> None:
        """Have more than ``size`` bytes ready, or all there is."""
        parts = [self._ready]
        have = len(self._ready)
        while self._answers and have <= size:
            answer = self._answers[0]
            if isinstance(answer, TargetList):
                text = answer.text(self._number)
                self._number += 1
                if not text:
                    self._answers.popleft()
                    self._number = 0
                    continue
            else:
                text = build([answer])
                self._answers.popleft()
            parts.append(text)
            have += len(text)
        self._ready = b"".join(parts)


class TextExchange:
    """The text negotiation of one connection."""

    def __init__(self, authorizer: Authorizer, session: "Session", keys: ConnectionKeys) -> None:
        self._authorizer = authorizer
        self._session = session
        self._keys = keys
        self._asked = False
        """We want to negotiate, and have not said yet what."""
        self._wanted = False
        """We have said it, and the exchange is not over."""
        self._declared: dict[str, int] = {}
        """Attribute of ``keys`` → what it will be when the exchange is over."""
        self._seen: set[str] = set()
        """Keys of the exchange under way."""
        self._tag = RESERVED_TAG
        """The Initiator Task Tag of the exchange under way."""
        self._transfer_tag = RESERVED_TAG
        self._last_transfer_tag = 0
        self._gathered = bytearray()
        self._unsent = _Unsent()
        self._final = False
        """The request at hand says that the initiator has nothing more to say."""

    def renegotiate(self) -> None:
        """Say in the next answer what holds for us now, without being asked (RFC 7143 §11.9.1, event 4)."""
        self._asked = True

    def receive(self, request: TextRequest, data: bytes | memoryview) -> TextReply:
        """Take one Text Request.

        Raises:
            ProtocolViolation: with the reason of a Reject; the exchange is over, the connection goes on.
        """
        try:
            return self._receive(request, data)
        except ProtocolViolation:
            self._reset()
            raise

    def _receive(self, request: TextRequest, data: bytes | memoryview) -> TextReply:
        if request.initiator_task_tag == RESERVED_TAG:
            raise _violation(RejectReason.INVALID_PDU_FIELD, "a Text Request without a task tag")
        if request.flags & FINAL and request.flags & _CONTINUE:
            raise _violation(RejectReason.PROTOCOL_ERROR, "F and C are both set")
        if request.target_transfer_tag == RESERVED_TAG:
            self._reset()
            self._tag = request.initiator_task_tag
        elif (request.target_transfer_tag, request.initiator_task_tag) != (self._transfer_tag, self._tag):
            raise _violation(RejectReason.PROTOCOL_ERROR, "a Text Request of no exchange under way")
        self._final = bool(request.flags & FINAL)  # our F answers this request's (RFC 7143 §11.11.1)
        if self._unsent:
            if data:
                raise _violation(RejectReason.PROTOCOL_ERROR, "a text answer under way was interrupted")
            return self._reply()
        self._gathered += data
        if len(self._gathered) > MAX_TEXT:
            raise _violation(RejectReason.PROTOCOL_ERROR, f"more than {MAX_TEXT} bytes of text")
        if request.flags & _CONTINUE:
            return self._reply()
        try:
            pairs = parse(self._gathered)
        except TextError as error:
            raise _violation(RejectReason.PROTOCOL_ERROR, str(error)) from None
        self._gathered.clear()
        self._unsent = _Unsent(self._answer(pairs))
        return self._reply()

    def _reply(self) -> TextReply:
        piece = self._unsent.take(min(self._keys.max_recv_data_segment_length_initiator, MAX_TEXT_PIECE))
        tag = self._tag
        if self._final and not self._unsent:
            for attribute, length in self._declared.items():
                setattr(self._keys, attribute, length)
            self._wanted = False
            self._reset()
            return TextReply(FINAL, tag, RESERVED_TAG, piece, settled=True)
        if self._transfer_tag == RESERVED_TAG:
            self._last_transfer_tag = self._last_transfer_tag % 0xFFFF + 1
            self._transfer_tag = self._last_transfer_tag
        return TextReply(_CONTINUE if self._unsent else 0, tag, self._transfer_tag, piece)

    def _reset(self) -> None:
        self._tag = self._transfer_tag = RESERVED_TAG
        self._gathered.clear()
        self._unsent = _Unsent()
        self._final = False
        self._declared = {}
        self._seen = set()
        self._asked |= self._wanted  # to be said again: it was given up
        self._wanted = False

    # -- what is said -------------------------------------------------------------------------

    def _answer(self, pairs: list[tuple[str, str]]) -> "_Answers":
        answers: _Answers = []
        for name, value in pairs:
            if name in self._seen:  # "MUST NOT" within one negotiation sequence (RFC 7143 §6.4)
                raise _violation(RejectReason.PROTOCOL_ERROR, f"{name} is given twice")
            self._seen.add(name)
            if name == "SendTargets":
                answers.append(self._send_targets(value))
            elif name == _LENGTH:
                self._declared[_THEIRS] = self._max_recv(value)
                answers.append((name, self._our_length()))
            elif name in OBSOLETE:
                answers.append((name, "Reject"))
            elif name == "InitiatorAlias":
                self._session.initiator_alias = value  # declared, at any time (RFC 7143 §13.7)
            elif name in KEYS or name in LOGIN_KEYS:
                raise _violation(RejectReason.PROTOCOL_ERROR, f"{name} after login")
            elif value not in RESPONSES:
                answers.append((name, "NotUnderstood"))
        if self._asked:
            self._asked = False
            self._wanted = True
            if _OURS not in self._declared:
                answers.append((_LENGTH, self._our_length()))
            grant = self._grant()
            if grant is not None and grant.target_alias:
                answers.append(("TargetAlias", grant.target_alias))
        return answers

    def _our_length(self) -> str:
        """The data segment length we take, as configured now."""
        grant = self._grant()
        length = self._keys.max_recv_data_segment_length_target
        if grant is not None:
            length = grant.offer.max_recv_data_segment_length
        self._declared[_OURS] = length
        return str(length)

    def _may_discover(self) -> bool:
        """Whether discovery as it is configured now would have let this session in as it is."""
        session = self._session
        grant = self._authorizer.discovery(session.initiator_name)
        if not isinstance(grant, Grant):
            return False
        if grant.methods & AuthMethod.NONE:
            return True
        proven = not session.grant.target_name and session.user
        return bool(proven) and any(credential.user == session.user for credential in grant.credentials)

    def _grant(self) -> Grant | None:
        """What a login would be granted now; None where it would be refused."""
        session = self._session
        name = session.grant.target_name
        ask = self._authorizer
        now = ask.target(session.initiator_name, name) if name else ask.discovery(session.initiator_name)
        return now if isinstance(now, Grant) else None

    def _max_recv(self, value: str) -> int:
        key = KEYS[_LENGTH]
        try:
            number = read_number(value)
        except TextError:
            number = 0
        if not key.low <= number <= key.high:
            raise _violation(RejectReason.PROTOCOL_ERROR, f"{_LENGTH}={value[:40]!a}")
        return number

    def _send_targets(self, value: str) -> TargetList:
        """RFC 7143 appendix C: ``All``, one name, or nothing for the session's own target.

        A normal session is told of other targets where anybody would be; where discovery asks for a proof, of
        its own target alone, however it asks.
        """
        wanted: str | None = None
        own = self._session.grant.target_name
        if not value:
            wanted = own
            if not wanted:
                raise _violation(
                    RejectReason.PROTOCOL_ERROR, "SendTargets without a value in a discovery session"
                )
        elif value != "All":
            try:
                wanted = names.normalise(value)
            except ValueError as error:
                raise _violation(
                    RejectReason.PROTOCOL_ERROR, f"SendTargets={value[:60]!a}: the name {error}"
                ) from None
        if not self._may_discover():
            if not own:
                raise _violation(
                    RejectReason.PROTOCOL_ERROR, "discovery needs a proof that this session has not given"
                )
            if wanted not in (None, own):
                return TargetList(())
            wanted = own
        return self._authorizer.send_targets(self._session.initiator_name, wanted)


def _violation(reason: RejectReason, message: str) -> ProtocolViolation:
    return ProtocolViolation(reason, message)
