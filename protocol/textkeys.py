"""Data segment ↔ key=value pairs (RFC 7143 §6.1). Knows no key's meaning.

A data segment is pairs, each ended by a null; a pair may begin in one PDU and end in a later one as long
as the C bit says that more follows, so what is parsed here is always the gathered whole.
"""

import base64
import binascii
import re
from collections.abc import Iterable

__all__ = ["TextError", "build", "encode_binary", "parse", "read_binary", "read_number"]

MAX_KEY = 63
"""Bytes of a key name (RFC 7143 §6.1)."""
MAX_VALUE = 255
"""Bytes of a text value, unless a key says otherwise (RFC 7143 §6.1)."""
MAX_LONG_VALUE = 8192
"""Bytes of values that may be long, as binary ones. No login data segment is longer."""

LONG_KEYS = frozenset(("CHAP_C", "CHAP_R", "CHAP_N", "SendTargets", "TargetAddress"))

_KEY = re.compile(r"[A-Z][A-Za-z0-9.\-+@_#/]*", re.ASCII)


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


def read_number(text: str) -> int:
    """A numerical value: decimal, or hexadecimal with ``0x`` (RFC 7143 §6.1).

    Raises:
        TextError: neither.
    """
    if text[:2] in ("0x", "0X"):
        digits, base = text[2:], 16
    else:
        digits, base = text, 10
    if (
        not digits
        or len(digits) > 20
        or not all(digit in "0123456789abcdefABCDEF"[: base + 6] for digit in digits)
    ):
        raise TextError(f"not a number: {_shown(text.encode())}")
    try:
        return int(digits, base)
    except ValueError:
        raise TextError(f"not a number: {_shown(text.encode())}") from None


def read_binary(text: str, longest: int) -> bytes:
    """A binary value: hexadecimal with ``0x`` or base64 with ``0b`` (RFC 7143 §6.1).

    Raises:
        TextError: neither, or more than ``longest`` bytes.
    """
    kind, digits = text[:2].lower(), text[2:]
    try:
        if kind == "0x":
            if len(digits) > 2 * longest:
                raise TextError(f"more than {longest} bytes")
            return (
                bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2)) if digits.isalnum() else _bad(text)
            )
        if kind == "0b":
            if len(digits) > 4 * (longest // 3 + 1):
                raise TextError(f"more than {longest} bytes")
            value = base64.b64decode(digits, validate=True)
            return value if value and len(value) <= longest else _bad(text)
    except (ValueError, binascii.Error):
        pass
    return _bad(text)


def encode_binary(value: bytes) -> str:
    """A binary value as we send it: hexadecimal, which every initiator reads."""
    return "0x" + value.hex()


def _bad(text: str) -> bytes:
    raise TextError(f"not a binary value: {_shown(text.encode())}")


def _shown(text: bytes) -> str:
    """Foreign bytes for a log line: short, printable, unmistakably quoted."""
    return ascii(text[:40].decode("latin-1")) + ("…" if len(text) > 40 else "")
