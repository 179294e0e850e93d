"""Text Requests in full feature phase (RFC 7143 §11.10, §11.11, appendix C): SendTargets, and the few keys
that may be renegotiated.

One exchange at a time on a connection. It is told from the next one by the Target Transfer Tag: we give
one as long as we have more to say or expect more; a request without it begins anew (§11.10.4).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.access import Authorizer
from protocol.bhs import FINAL, TextRequest
from protocol.enums import RESERVED_TAG, RejectReason
from protocol.errors import ProtocolViolation
from protocol.limits import MAX_TEXT
from protocol.negotiation import KEYS, LOGIN_KEYS, OBSOLETE, RESPONSES, ConnectionKeys
from protocol.textkeys import TextError, build, cut, parse, read_number

if TYPE_CHECKING:
    from protocol.session import Session

__all__ = ["TextExchange", "TextReply"]

_CONTINUE = 0x40
_NAME = re.compile(r"(?:iqn|eui|naa)\.\S+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TextReply:
    """What a Text Response says; numbering is the connection's."""

    flags: int
    initiator_task_tag: int
    target_transfer_tag: int
    data: bytes
    new_max_recv: int | None = None
    """The initiator has declared a new MaxRecvDataSegmentLength, bytes."""


class TextExchange:
    """The text negotiation of one connection."""

    def __init__(self, authorizer: Authorizer, session: "Session", keys: ConnectionKeys) -> None:
        self._authorizer = authorizer
        self._session = session
        self._limit = keys.max_recv_data_segment_length_initiator
        self._declared = keys.max_recv_data_segment_length_target
        self._tag = RESERVED_TAG
        """The Initiator Task Tag of the exchange under way."""
        self._transfer_tag = RESERVED_TAG
        self._last_transfer_tag = 0
        self._gathered = bytearray()
        self._unsent = b""
        self._final = False
        """The request at hand says that the initiator has nothing more to say."""

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
            return self._reply(None)
        self._gathered += data
        if len(self._gathered) > MAX_TEXT:
            raise _violation(RejectReason.PROTOCOL_ERROR, f"more than {MAX_TEXT} bytes of text")
        if request.flags & _CONTINUE:
            return self._reply(None)
        try:
            pairs = parse(self._gathered)
        except TextError as error:
            raise _violation(RejectReason.PROTOCOL_ERROR, str(error)) from None
        self._gathered.clear()
        answers, new_max_recv = self._answer(pairs)
        self._unsent = build(answers)
        reply = self._reply(new_max_recv)
        if new_max_recv is not None:
            self._limit = new_max_recv
        return reply

    def _reply(self, new_max_recv: int | None) -> TextReply:
        piece, self._unsent = cut(self._unsent, self._limit)
        tag = self._tag
        if self._final and not self._unsent:
            self._reset()
            return TextReply(FINAL, tag, RESERVED_TAG, piece, new_max_recv)
        if self._transfer_tag == RESERVED_TAG:
            self._last_transfer_tag = self._last_transfer_tag % 0xFFFF + 1
            self._transfer_tag = self._last_transfer_tag
        return TextReply(_CONTINUE if self._unsent else 0, tag, self._transfer_tag, piece, new_max_recv)

    def _reset(self) -> None:
        self._tag = self._transfer_tag = RESERVED_TAG
        self._gathered.clear()
        self._unsent = b""
        self._final = False

    # -- what is said -------------------------------------------------------------------------

    def _answer(self, pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], int | None]:
        answers: list[tuple[str, str]] = []
        new_max_recv = None
        seen = set()
        for name, value in pairs:
            if name in seen:
                raise _violation(RejectReason.PROTOCOL_ERROR, f"{name} is given twice")
            seen.add(name)
            if name == "SendTargets":
                answers += self._send_targets(value)
            elif name == "MaxRecvDataSegmentLength":
                new_max_recv = self._max_recv(value)
                answers.append((name, str(self._declared)))
            elif name in OBSOLETE:
                answers.append((name, "Reject"))
            elif name == "InitiatorAlias":
                pass  # declared, at any time (RFC 7143 §13.7)
            elif name in KEYS or name in LOGIN_KEYS:
                raise _violation(RejectReason.PROTOCOL_ERROR, f"{name} after login")
            elif value not in RESPONSES:
                answers.append((name, "NotUnderstood"))
        return answers, new_max_recv

    def _max_recv(self, value: str) -> int:
        key = KEYS["MaxRecvDataSegmentLength"]
        try:
            number = read_number(value)
        except TextError:
            number = 0
        if not key.low <= number <= key.high:
            raise _violation(RejectReason.PROTOCOL_ERROR, f"MaxRecvDataSegmentLength={value[:40]!a}")
        return number

    def _send_targets(self, value: str) -> list[tuple[str, str]]:
        """RFC 7143 appendix C: ``All``, one name, or nothing for the session's own target."""
        wanted: str | None = None
        if not value:
            wanted = self._session.grant.target_name
            if not wanted:
                raise _violation(
                    RejectReason.PROTOCOL_ERROR, "SendTargets without a value in a discovery session"
                )
        elif value != "All":
            if not _NAME.fullmatch(value):
                raise _violation(RejectReason.PROTOCOL_ERROR, f"SendTargets={value[:60]!a}")
            wanted = value.lower()
        answers = []
        for record in self._authorizer.send_targets(self._session.initiator_name, wanted):
            answers.append(("TargetName", record.name))
            answers += [("TargetAddress", f"{address},{tag}") for address, tag in record.addresses]
        return answers


def _violation(reason: RejectReason, message: str) -> ProtocolViolation:
    return ProtocolViolation(reason, message)
