"""The words of our test initiator: framing, digests, text, CHAP, and one connection without I/O.

What it is for, and how it hangs together: ``tests.initiator``. Knows no login, no task, no socket.
"""

import base64
import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from crc32c import crc32c

from protocol import bhs
from protocol.enums import RESERVED_TAG, LoginStage, LogoutReason, TaskAttribute
from protocol.wire import Header

__all__ = [
    "CHAP_HASHES",
    "LOGIN_SEGMENT",
    "Breach",
    "ConnectionClosed",
    "Initiator",
    "LoginFailed",
    "Pdu",
    "Rejected",
    "SessionState",
    "chap_response",
    "decode_binary",
    "decode_text",
    "digest",
    "encode_binary",
    "encode_lun",
    "encode_text",
    "frame",
    "pad",
    "serial_lt",
]

BHS = 48
WORD = 4
LOGIN_SEGMENT = 8192
"""MaxRecvDataSegmentLength before it is declared (RFC 7143 §6.2, §13.12)."""

H = TypeVar("H", bound=Header)


class Breach(AssertionError):  # noqa: N818  # named as what happened
    """The target did what RFC 7143 forbids."""


class ConnectionClosed(ConnectionError):  # noqa: N818  # named as what happened
    """The target has closed the connection, or has no more to say (in memory)."""


class LoginFailed(Exception):  # noqa: N818  # named as what happened
    """A Login Response with a status other than success.

    ``status`` is Status-Class << 8 | Status-Detail, comparable with ``protocol.enums.LoginStatus``.
    """

    def __init__(self, response: bhs.LoginResponse, keys: Mapping[str, str]) -> None:
        self.response = response
        self.status = response.status_class << 8 | response.status_detail
        self.keys = dict(keys)
        super().__init__(f"login refused with status {self.status:04x}h, keys {self.keys}")


class Rejected(Exception):  # noqa: N818  # named as what happened
    """A Reject PDU for what is waited for. ``reason`` is comparable with ``enums.RejectReason``."""

    def __init__(self, pdu: "Pdu") -> None:
        self.pdu = pdu
        self.reason = pdu.expect(bhs.Reject).reason
        super().__init__(f"rejected with reason {self.reason:02x}h: {pdu}")


# -- Words of the protocol --------------------------------------------------------------------------


def encode_lun(lun: int) -> bytes:
    """The 8-byte LUN: peripheral addressing below 256, flat space above (RFC 7143 §11.2.1.7, SAM-5 §4.7)."""
    return struct.pack("!H6x", lun if lun < 256 else 0x4000 | lun)


def encode_text(pairs: Mapping[str, str] | Iterable[tuple[str, str]]) -> bytes:
    """key=value pairs, each ended by a null (RFC 7143 §6.1)."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in items)


def decode_text(data: bytes) -> list[tuple[str, str]]:
    """The pairs in order; keys may repeat (TargetAddress does)."""
    if not data:
        return []
    if not data.endswith(b"\0"):
        raise Breach(f"text does not end with a null: {data[-40:]!r}")
    pairs = []
    for item in data[:-1].split(b"\0"):
        key, equals, value = item.decode().partition("=")
        if not equals or not key:
            raise Breach(f"no key=value pair: {item!r}")
        pairs.append((key, value))
    return pairs


def encode_binary(value: bytes, encoding: str = "hex") -> str:
    """A binary value as ``0x…`` or ``0b…`` (RFC 7143 §6.1)."""
    return "0x" + value.hex() if encoding == "hex" else "0b" + base64.b64encode(value).decode()


def decode_binary(text: str) -> bytes:
    """The bytes of ``0x…`` or ``0b…``, in either case."""
    prefix, digits = text[:2].lower(), text[2:]
    if prefix == "0x":
        return bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
    if prefix == "0b":
        return base64.b64decode(digits, validate=True)
    raise Breach(f"no binary value: {text!r}")


CHAP_HASHES: dict[int, str] = {5: "md5", 6: "sha1", 7: "sha256", 8: "sha3_256"}
"""CHAP_A → hashlib's name (RFC 7143 §12.1.3 and IANA's PPP authentication algorithms)."""


def chap_response(algorithm: int, identifier: int, secret: str | bytes, challenge: bytes) -> bytes:
    """H(identifier ‖ secret ‖ challenge) (RFC 1994 §4.1)."""
    key = secret.encode() if isinstance(secret, str) else secret
    return hashlib.new(CHAP_HASHES[algorithm], bytes([identifier]) + key + challenge).digest()


def digest(*parts: bytes) -> bytes:
    """CRC32C of the parts one after the other, as it is on the wire (RFC 7143 §13.1, appendix A)."""
    value = 0
    for part in parts:
        value = crc32c(part, value)
    return struct.pack("<I", value)


def pad(data: bytes, byte: bytes = b"\0") -> bytes:
    """The padding that follows ``data`` (RFC 7143 §11.1)."""
    return byte * (-len(data) % WORD)


def serial_lt(a: int, b: int) -> bool:
    """a before b in 32-bit serial arithmetic (RFC 1982)."""
    return 0 < (b - a) & 0xFFFFFFFF < 1 << 31


def frame(
    header: Header | bytes,
    data: bytes = b"",
    *,
    ahs: bytes = b"",
    header_digest: bool | bytes = False,
    data_digest: bool | bytes = False,
    padding: bytes | None = None,
) -> bytes:
    """One PDU as it is on the wire. ``header`` says its lengths itself.

    Args:
        header_digest: True computes it; bytes are sent as they are.
        data_digest: likewise; there is none without data.
        padding: instead of nulls.
    """
    head = (header.build() if isinstance(header, Header) else header) + ahs
    tail = data + (pad(data) if padding is None else padding)
    parts = [head]
    if header_digest:
        parts.append(digest(head) if header_digest is True else header_digest)
    parts.append(tail)
    if data_digest and tail:
        parts.append(digest(tail) if data_digest is True else data_digest)
    return b"".join(parts)


@dataclass(slots=True)
class Pdu:
    """One PDU received."""

    header: Header
    data: bytes = b""
    ahs: bytes = b""

    @property
    def opcode(self) -> int:
        """Without the I bit."""
        return int(self.header.OPCODE)

    @property
    def initiator_task_tag(self) -> int:
        """Every PDU of a target has one."""
        return int(cast(Any, self.header).initiator_task_tag)

    @property
    def text(self) -> list[tuple[str, str]]:
        """The data as key=value pairs."""
        return decode_text(self.data)

    def expect(self, kind: type[H]) -> H:
        """The header, which must be of this kind."""
        if not isinstance(self.header, kind):
            raise Breach(f"expected {kind.__name__}, got {self}")
        return self.header


TARGET_OPCODES = frozenset(opcode for opcode in bhs.BY_OPCODE if opcode & 0x20)
"""Opcodes a target may send have bit 20h (RFC 7143 §11.2.1.2)."""


# -- One connection without I/O ---------------------------------------------------------------------


@dataclass
class SessionState:
    """What the connections of one session share."""

    isid: bytes = b""
    """Six bytes; by default of the random kind (RFC 7143 §11.12.5), so new for every session."""
    tsih: int = 0
    cmd_sn: int = 1
    """Of the next command that is not immediate."""
    next_tag: int = 0x10
    exp_cmd_sn: int | None = None
    """As the target last said it, over all connections; None before its first word."""
    max_cmd_sn: int | None = None
    keys: dict[str, str] = field(default_factory=dict)
    """Session-wide values as settled at login of the leading connection."""

    def __post_init__(self) -> None:
        if not self.isid:
            self.isid = b"\x80" + os.urandom(3) + b"\0\0"

    def new_tag(self) -> int:
        """An Initiator Task Tag not used before."""
        tag = self.next_tag
        self.next_tag = tag + 1 & 0xFFFFFFFF
        if self.next_tag == RESERVED_TAG:
            self.next_tag = 0
        return tag

    @property
    def window(self) -> int:
        """Commands the target takes now: MaxCmdSN - CmdSN + 1 (RFC 7143 §4.2.2.1)."""
        if self.max_cmd_sn is None:
            return 1
        return max(0, ((self.max_cmd_sn - self.cmd_sn + 1 + (1 << 31)) & 0xFFFFFFFF) - (1 << 31))


class Initiator:
    """One connection: bytes in, PDUs out; requests in, bytes out.

    Attributes:
        exp_stat_sn: what the next status must carry; None takes the first as it comes.
        header_digest, data_digest: set both ways; the conversation does it when login ends.
        max_data_in: the MaxRecvDataSegmentLength we declared; a longer data segment is a breach.
        strict: False gathers in ``breaches`` what True raises.
        lossy: a PDU with a wrong digest is lost, not a breach (RFC 7143 §7.8); its length is believed.
        lost: how many were.
    """

    def __init__(self, session: SessionState | None = None, cid: int = 1, *, strict: bool = True) -> None:
        self.session = session or SessionState()
        self.cid = cid
        self.strict = strict
        self.breaches: list[str] = []
        self.exp_stat_sn: int | None = None
        self.header_digest = False
        self.data_digest = False
        self.max_data_in = LOGIN_SEGMENT
        self.lossy = False
        self.lost = 0
        self._received = bytearray()

    def breach(self, message: str) -> None:
        """The target broke a rule."""
        self.breaches.append(message)
        if self.strict:
            raise Breach(message)

    # -- in --

    def feed(self, data: bytes) -> list[Pdu]:
        """The PDUs that ``data`` completes, digests verified and numbers checked."""
        self._received += data
        pdus = []
        while (pdu := self._cut()) is not None:
            self._check(pdu)
            pdus.append(pdu)
        return pdus

    @property
    def unread(self) -> int:
        """Bytes received of a PDU that is not complete."""
        return len(self._received)

    def _cut(self) -> Pdu | None:
        buffer = self._received
        if len(buffer) < BHS:
            return None
        ahs_length = buffer[4] * WORD
        data_length = int.from_bytes(buffer[5:8], "big")
        head = BHS + ahs_length
        at = head + WORD * self.header_digest
        padded = data_length + -data_length % WORD
        end = at + padded + WORD * (self.data_digest and padded > 0)
        if len(buffer) < end:
            return None
        raw = bytes(buffer[:end])
        del buffer[:end]
        head_is_wrong = self.header_digest and raw[head:at] != digest(raw[:head])
        data_is_wrong = self.data_digest and padded > 0 and raw[-WORD:] != digest(raw[at : at + padded])
        if self.lossy and (head_is_wrong or data_is_wrong):
            self.lost += 1
            return self._cut()
        opcode = raw[0] & 0x3F
        if raw[0] & 0x40 or opcode not in TARGET_OPCODES:
            raise Breach(f"no PDU of a target: {raw[:BHS].hex()}")
        header = bhs.BY_OPCODE[opcode].parse(raw)
        if head_is_wrong:
            self.breach(f"header digest {raw[head:at].hex()} is not {digest(raw[:head]).hex()}")
        if data_is_wrong:
            self.breach(f"data digest {raw[-WORD:].hex()} is not {digest(raw[at : at + padded]).hex()}")
        if any(raw[at + data_length : at + padded]):
            self.breach(f"padding is not null: {raw[at + data_length : at + padded].hex()}")
        if data_length > self.max_data_in:
            self.breach(f"data segment of {data_length} bytes; we declared {self.max_data_in}")
        if header.build() != raw[:BHS]:
            self.breach(f"reserved fields are not zero: {raw[:BHS].hex()} for {header}")
        return Pdu(header, raw[at : at + data_length], raw[BHS:head])

    def _check(self, pdu: Pdu) -> None:
        """StatSN and the command window (RFC 7143 §4.2.2)."""
        header = cast(Any, pdu.header)
        if isinstance(header, bhs.DataIn):
            counts = bool(header.flags & 0x01)  # S: status is valid, and only then StatSN
            numbered = counts
        elif isinstance(header, bhs.ReadyToTransfer):
            counts, numbered = False, True
        elif isinstance(header, bhs.NopIn):
            # A ping of the target's own carries the next StatSN and does not advance it (§11.19.3).
            counts, numbered = header.initiator_task_tag != RESERVED_TAG, True
        else:
            counts = numbered = True
        if isinstance(header, bhs.LoginResponse) and header.status_class:
            numbered = counts = False  # StatSN, ExpCmdSN, MaxCmdSN are invalid then (§11.13.1, §11.13.4)
        if numbered:
            if self.exp_stat_sn is None:
                self.exp_stat_sn = header.stat_sn
            if header.stat_sn != self.exp_stat_sn:
                self.breach(f"StatSN {header.stat_sn:#x}, expected {self.exp_stat_sn:#x}: {header}")
            if counts:
                self.exp_stat_sn = header.stat_sn + 1 & 0xFFFFFFFF
        if isinstance(header, bhs.LoginResponse) and header.status_class:
            return
        self._check_window(header.exp_cmd_sn, header.max_cmd_sn)

    def _check_window(self, exp_cmd_sn: int, max_cmd_sn: int) -> None:
        session = self.session
        if serial_lt(max_cmd_sn, exp_cmd_sn - 1 & 0xFFFFFFFF):
            self.breach(f"MaxCmdSN {max_cmd_sn:#x} is below ExpCmdSN {exp_cmd_sn:#x} - 1")
            return
        # What arrives on several connections may overtake; only a larger number is news (§4.2.2.1).
        if session.exp_cmd_sn is None or serial_lt(session.exp_cmd_sn, exp_cmd_sn):
            session.exp_cmd_sn = exp_cmd_sn
        if session.max_cmd_sn is None or serial_lt(session.max_cmd_sn, max_cmd_sn):
            session.max_cmd_sn = max_cmd_sn

    # -- out --

    def pdu(
        self,
        kind: type[Header],
        data: bytes = b"",
        *,
        ahs: bytes = b"",
        header_digest: bool | bytes | None = None,
        data_digest: bool | bytes | None = None,
        padding: bytes | None = None,
        **fields: Any,
    ) -> bytes:
        """The bytes of a PDU; fields not named are zero, ``lengths`` follows from ``ahs`` and ``data``.

        ``header_digest`` and ``data_digest``: None as negotiated, bytes as they are.
        """
        values: dict[str, Any] = {
            name: b"\0" * 8 if name == "lun" else b"" if name in ("cdb", "isid") else 0
            for name in cast(Any, kind).__slots__
        }
        values["opcode"] = kind.OPCODE
        values["lengths"] = len(ahs) // WORD << 24 | len(data)
        unknown = fields.keys() - values.keys()
        if unknown:
            raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        values.update(fields)
        return frame(
            kind(**values),
            data,
            ahs=ahs,
            header_digest=self.header_digest if header_digest is None else header_digest,
            data_digest=self.data_digest if data_digest is None else data_digest,
            padding=padding,
        )

    def _numbers(self, fields: dict[str, Any], *, immediate: bool) -> None:
        """CmdSN and ExpStatSN; an immediate request carries CmdSN and leaves it (RFC 7143 §4.2.2.1)."""
        if "cmd_sn" not in fields:
            fields["cmd_sn"] = self.session.cmd_sn
            if not immediate:
                self.session.cmd_sn = self.session.cmd_sn + 1 & 0xFFFFFFFF
        fields.setdefault("exp_stat_sn", self.exp_stat_sn or 0)

    def _request(self, kind: type[Header], data: bytes, immediate: bool, fields: dict[str, Any]) -> bytes:
        fields.setdefault("opcode", kind.OPCODE | (bhs.IMMEDIATE if immediate else 0))
        if "initiator_task_tag" not in fields:
            fields["initiator_task_tag"] = self.session.new_tag()
        self._numbers(fields, immediate=immediate)
        return self.pdu(kind, data, **fields)

    def login_request(
        self,
        keys: Mapping[str, str] | Iterable[tuple[str, str]] | bytes = b"",
        *,
        stage: int = LoginStage.OPERATIONAL,
        next_stage: int = LoginStage.FULL_FEATURE,
        transit: bool = True,
        more: bool = False,
        **fields: Any,
    ) -> bytes:
        """Login Request (RFC 7143 §11.12); NSG is sent only with T. ``more`` is C."""
        fields.setdefault("flags", transit << 7 | more << 6 | stage << 2 | (next_stage if transit else 0))
        fields.setdefault("isid", self.session.isid)
        fields.setdefault("tsih", self.session.tsih)
        fields.setdefault("cid", self.cid)
        data = keys if isinstance(keys, bytes) else encode_text(keys)
        return self._request(bhs.LoginRequest, data, True, fields)

    def scsi_command(
        self,
        cdb: bytes,
        data: bytes = b"",
        *,
        lun: int | bytes = 0,
        read: bool = False,
        write: bool = False,
        final: bool = True,
        expected: int = 0,
        attribute: int = TaskAttribute.SIMPLE,
        immediate: bool = False,
        **fields: Any,
    ) -> bytes:
        """SCSI Command (RFC 7143 §11.3); a CDB above 16 bytes goes on in an AHS (§11.2.2.3).

        Args:
            data: the immediate data.
            expected: Expected Data Transfer Length in bytes.
        """
        if len(cdb) > 16:
            rest = struct.pack("!HBx", len(cdb) - 15, 1) + cdb[16:]
            fields.setdefault("ahs", rest + pad(rest))
        fields.setdefault("flags", final << 7 | read << 6 | write << 5 | attribute)
        fields.setdefault("lun", lun if isinstance(lun, bytes) else encode_lun(lun))
        fields.setdefault("expected_data_transfer_length", expected)
        fields.setdefault("cdb", cdb[:16].ljust(16, b"\0"))
        return self._request(bhs.ScsiCommand, data, immediate, fields)

    def data_out(
        self,
        data: bytes,
        *,
        tag: int,
        offset: int,
        data_sn: int,
        final: bool,
        transfer_tag: int = RESERVED_TAG,
        lun: int | bytes = 0,
        **fields: Any,
    ) -> bytes:
        """SCSI Data-Out (RFC 7143 §11.7); LUN is that of the R2T, reserved when unsolicited (§11.7.4)."""
        fields.setdefault("flags", final << 7)
        fields.setdefault("lun", lun if isinstance(lun, bytes) else encode_lun(lun))
        fields.setdefault("initiator_task_tag", tag)
        fields.setdefault("target_transfer_tag", transfer_tag)
        fields.setdefault("exp_stat_sn", self.exp_stat_sn or 0)
        fields.setdefault("data_sn", data_sn)
        fields.setdefault("buffer_offset", offset)
        return self.pdu(bhs.DataOut, data, **fields)

    def task_management(
        self,
        function: int,
        *,
        lun: int | bytes = 0,
        referenced_task_tag: int = RESERVED_TAG,
        ref_cmd_sn: int = 0,
        immediate: bool = True,
        **fields: Any,
    ) -> bytes:
        """Task Management Function Request (RFC 7143 §11.5)."""
        fields.setdefault("flags", 0x80 | function)
        fields.setdefault("lun", lun if isinstance(lun, bytes) else encode_lun(lun))
        fields.setdefault("referenced_task_tag", referenced_task_tag)
        fields.setdefault("ref_cmd_sn", ref_cmd_sn)
        return self._request(bhs.TaskManagementRequest, fields.pop("data", b""), immediate, fields)

    def nop_out(self, data: bytes = b"", *, immediate: bool = False, **fields: Any) -> bytes:
        """NOP-Out that asks for an answer (RFC 7143 §11.18)."""
        fields.setdefault("flags", 0x80)
        fields.setdefault("target_transfer_tag", RESERVED_TAG)
        return self._request(bhs.NopOut, data, immediate, fields)

    def nop_answer(self, ping: bhs.NopIn, data: bytes = b"", **fields: Any) -> bytes:
        """NOP-Out that answers the target's ping: immediate, same LUN and tag (RFC 7143 §11.18.1-2)."""
        fields.setdefault("initiator_task_tag", RESERVED_TAG)
        fields.setdefault("target_transfer_tag", ping.target_transfer_tag)
        fields.setdefault("lun", ping.lun)
        return self.nop_out(data, immediate=True, **fields)

    def text_request(
        self,
        keys: Mapping[str, str] | Iterable[tuple[str, str]] | bytes = b"",
        *,
        final: bool = True,
        more: bool = False,
        transfer_tag: int = RESERVED_TAG,
        immediate: bool = False,
        **fields: Any,
    ) -> bytes:
        """Text Request (RFC 7143 §11.10)."""
        fields.setdefault("flags", final << 7 | more << 6)
        fields.setdefault("target_transfer_tag", transfer_tag)
        data = keys if isinstance(keys, bytes) else encode_text(keys)
        return self._request(bhs.TextRequest, data, immediate, fields)

    def logout_request(
        self, reason: int = LogoutReason.CLOSE_SESSION, *, cid: int | None = None, immediate: bool = False,
        **fields: Any,
    ) -> bytes:  # fmt: skip
        """Logout Request (RFC 7143 §11.14)."""
        fields.setdefault("flags", 0x80 | reason)
        fields.setdefault("cid", (self.cid if reason else 0) if cid is None else cid)
        return self._request(bhs.LogoutRequest, fields.pop("data", b""), immediate, fields)

    def snack(
        self, kind: int, *, tag: int = RESERVED_TAG, begin: int = 0, run: int = 0, **fields: Any
    ) -> bytes:
        """SNACK Request (RFC 7143 §11.16); it has no CmdSN."""
        fields.setdefault("flags", 0x80 | kind)
        fields.setdefault("initiator_task_tag", tag)
        fields.setdefault("target_transfer_tag", RESERVED_TAG)
        fields.setdefault("exp_stat_sn", self.exp_stat_sn or 0)
        fields.setdefault("beg_run", begin)
        fields.setdefault("run_length", run)
        return self.pdu(bhs.SnackRequest, **fields)
