"""iSNS messages as bytes (RFC 4171 §5, §6). Knows no socket and no configuration.

A message is one PDU or several: 12 bytes of header, then a part of the payload. The payload of a request is
attributes, tag and length and value each: the source, the key, a delimiter, what is said. That of a response
is a status, then attributes.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct, pack

__all__ = [
    "DELIMITER",
    "HEADER_LENGTH",
    "MAX_MESSAGE",
    "STATUSES",
    "Attribute",
    "Function",
    "MessageError",
    "PduFlag",
    "PduHeader",
    "Tag",
    "address",
    "attributes",
    "number",
    "read_response",
    "request",
    "text",
]  # fmt: skip

HEADER_LENGTH = 12
_HEADER = Struct("!HHHHHH")
_TAG_AND_LENGTH = Struct("!II")
_VERSION = 1
_MAX_PAYLOAD = 65532
"""Of one PDU: its length is 16 bits and a multiple of four (§5.1.3)."""
MAX_MESSAGE = 1 << 20
"""Bytes of a response that are taken: of the two that we ask for, one names what was registered."""


class Function(IntEnum):
    """Function IDs (§5.6); a response has bit 15 besides (§5.7)."""

    REGISTER = 0x0001
    QUERY = 0x0002
    DEREGISTER = 0x0004
    RESPONSE = 0x8000


class PduFlag(IntFlag):
    """§5.1.4."""

    CLIENT = 0x8000
    SERVER = 0x4000
    REPLACE = 0x1000
    LAST = 0x0800
    FIRST = 0x0400


class Tag(IntEnum):
    """Attributes (§6.1)."""

    DELIMITER = 0
    ENTITY_IDENTIFIER = 1
    ENTITY_PROTOCOL = 2
    REGISTRATION_PERIOD = 6
    PORTAL_ADDRESS = 16
    PORTAL_PORT = 17
    ISCSI_NAME = 32
    ISCSI_NODE_TYPE = 33
    ISCSI_ALIAS = 34
    GROUP_PORTAL_ADDRESS = 49
    GROUP_PORTAL_PORT = 50
    GROUP_TAG = 51


STATUSES = {
    1: "unknown error",
    2: "the message is badly formatted",
    3: "the registration is invalid",
    5: "the query is invalid",
    6: "the source is unknown",
    7: "the source is absent",
    8: "the source is not authorized",
    9: "there is no such entry",
    10: "the version is not supported",
    11: "internal error",
    12: "busy",
    13: "an option is not understood",
    14: "the update is invalid",
    15: "the message is not supported",
}
"""§5.4; what else there is has to do with other messages."""


class MessageError(ValueError):
    """No iSNS message, or not the one that was waited for."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute; a value's length is a multiple of four."""

    tag: int
    value: bytes = b""


DELIMITER = Attribute(Tag.DELIMITER)


def text(tag: Tag, value: str) -> Attribute:
    """UTF-8 with a NUL, and NULs up to a multiple of four (§5.3)."""
    raw = value.encode() + b"\0"
    return Attribute(tag, raw + bytes(-len(raw) % 4))


def number(tag: Tag, value: int) -> Attribute:
    """Four bytes."""
    return Attribute(tag, pack("!I", value))


def address(tag: Tag, host: str) -> Attribute:
    """An IP address: sixteen bytes, one of IPv4 mapped into IPv6 (§6.3.1)."""
    ip = ipaddress.ip_address(host)
    return Attribute(tag, ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed)


@dataclass(frozen=True, slots=True)
class PduHeader:
    """§5.1."""

    function: int
    length: int
    """Of the payload of this PDU, bytes."""
    flags: int
    transaction: int
    sequence: int

    @classmethod
    def parse(cls, raw: bytes) -> "PduHeader":
        """
        Raises:
            MessageError: another version, or a length that cannot be.
        """
        version, function, length, flags, transaction, sequence = _HEADER.unpack(raw)
        if version != _VERSION:
            raise MessageError(f"iSNSP version {version}, not {_VERSION}")
        if length % 4:
            raise MessageError(f"a PDU of {length} bytes, which is no multiple of four")
        return cls(function, length, flags, transaction, sequence)

    def build(self) -> bytes:
        return _HEADER.pack(_VERSION, self.function, self.length, self.flags, self.transaction, self.sequence)


def request(function: Function, transaction: int, said: Iterable[Attribute], flags: int = 0) -> bytes:
    """A whole request, in as many PDUs as it takes (§5.1.5)."""
    payload = b"".join(
        _TAG_AND_LENGTH.pack(attribute.tag, len(attribute.value)) + attribute.value for attribute in said
    )
    pieces = [payload[at : at + _MAX_PAYLOAD] for at in range(0, len(payload), _MAX_PAYLOAD)]
    out = []
    for sequence, piece in enumerate(pieces):
        place = PduFlag.FIRST if sequence == 0 else 0
        if sequence == len(pieces) - 1:
            place |= PduFlag.LAST
        header = PduHeader(function, len(piece), PduFlag.CLIENT | flags | place, transaction, sequence)
        out += [header.build(), piece]
    return b"".join(out)


def attributes(payload: bytes) -> Iterator[Attribute]:
    """The attributes of a payload, from its first.

    Raises:
        MessageError: one ends behind the payload, or its length is no multiple of four.
    """
    at = 0
    while at < len(payload):
        if at + _TAG_AND_LENGTH.size > len(payload):
            raise MessageError("an attribute is cut")
        tag, length = _TAG_AND_LENGTH.unpack_from(payload, at)
        at += _TAG_AND_LENGTH.size
        if length % 4 or length > len(payload) - at:
            raise MessageError(f"attribute {tag} of {length} bytes, where {len(payload) - at} are left")
        yield Attribute(tag, payload[at : at + length])
        at += length


def read_response(payload: bytes) -> tuple[int, list[Attribute]]:
    """The status of a response, and its attributes.

    Raises:
        MessageError: it is none.
    """
    if len(payload) < 4:
        raise MessageError(f"a response of {len(payload)} bytes")
    return int.from_bytes(payload[:4], "big"), list(attributes(payload[4:]))
