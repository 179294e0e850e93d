"""Data segment ↔ key=value pairs (RFC 7143 §6.1). Knows no key's meaning.

A data segment is pairs, each ended by a null; a pair may begin in one PDU and end in a later one as long
as the C bit says that more follows, so what is parsed here is always the gathered whole.
"""

import base64
import re
from collections.abc import Iterable

from protocol.limits import MAX_KEY, MAX_LONG_VALUE, MAX_VALUE

__all__ = ["TextError", "build", "cut", "encode_binary", "parse", "read_binary", "read_number"]

LONG_KEYS = frozenset(("CHAP_C", "CHAP_R", "CHAP_N", "SendTargets", "TargetAddress"))

_KEY = re.compile(r"(?:[A-Z]|iSCSI[A-Z])[A-Za-z0-9.\-+@_#/]*", re.ASCII)
"""A key begins with a capital letter (RFC 7143 §6.1), but for iSCSIProtocolLevel (RFC 7144 §7.1)."""


_NUMBER = re.compile(r"0[xX]([0-9a-fA-F]{1,16})|([0-9]{1,20})", re.ASCII)


class TextError(ValueError):
    """Not key=value text; the message says where."""


def parse(data: bytes | bytearray | memoryview) -> list[tuple[str, str]]:
    """The pairs of a gathered data segment, in order, duplicates included.

    Empty strings between pairs (surplus nulls) are passed over: several initiators pad with them.

    Raises:
        TextError: no null at the end, no ``=``, a key or value that cannot be.
    """
    raw = bytes(data)
    if raw and not raw.endswith(b"\0"):
        raise TextError("the text does not end with a null")
    pairs = []
    for piece in raw.split(b"\0"):
        if not piece:
            continue
        name, equals, value = piece.partition(b"=")
        if not equals:
            raise TextError(f"no '=' in {_shown(piece)}")
        try:
            key, text = name.decode("ascii"), value.decode("utf-8")
        except UnicodeDecodeError:
            raise TextError(f"not UTF-8: {_shown(piece)}") from None
        if len(key) > MAX_KEY or not _KEY.fullmatch(key):
            raise TextError(f"not a key name: {_shown(name)}")
        if len(value) > (MAX_LONG_VALUE if key in LONG_KEYS else MAX_VALUE):
            raise TextError(f"the value of {key} has {len(value)} bytes")
        pairs.append((key, text))
    return pairs


def build(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The data segment that says ``pairs``."""
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)


def cut(text: bytes, limit: int) -> tuple[bytes, bytes]:
    """What goes into one data segment of at most ``limit`` bytes, and the rest.

    A pair may be cut anywhere (RFC 7143 §6.2), and is cut only where it is longer than a segment: readers
    that look at one PDU alone then understand all of it.
    """
    end = limit
    if len(text) > limit:
        end = text.rfind(b"\0", 0, limit) + 1 or limit
    return text[:end], text[end:]


def read_number(text: str) -> int:
    """A numerical value: decimal, or hexadecimal with ``0x`` (RFC 7143 §6.1).

    Raises:
        TextError: neither.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise TextError(f"not a number: {_shown(text.encode())}")
    hexadecimal, decimal = match.groups()
    return int(hexadecimal, 16) if hexadecimal else int(decimal)


def read_binary(text: str, longest: int) -> bytes:
    """A binary value: hexadecimal with ``0x`` or base64 with ``0b`` (RFC 7143 §6.1).

    Raises:
        TextError: neither, or more than ``longest`` bytes.
    """
    kind, digits = text[:2].lower(), text[2:]
    try:
        if kind == "0x" and digits.isalnum():
            value = bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2))
        elif kind == "0b":
            value = base64.b64decode(digits, validate=True)
        else:
            value = b""
    except ValueError:  # binascii.Error is one
        value = b""
    if not value:
        raise TextError(f"not a binary value: {_shown(text.encode())}")
    if len(value) > longest:
        raise TextError(f"{len(value)} bytes where {longest} are the most")
    return value


def encode_binary(value: bytes) -> str:
    """A binary value as we send it: hexadecimal, which every initiator reads."""
    return "0x" + value.hex()


def _shown(text: bytes) -> str:
    """Foreign bytes for a log line: short, printable, unmistakably quoted."""
    return ascii(text[:40].decode("latin-1")) + ("…" if len(text) > 40 else "")
