"""Additional Header Segments: the rest of a long CDB, the read length of a bidirectional command
(RFC 7143 §11.2.2). Knows nothing else."""

from struct import Struct

from protocol.enums import RejectReason
from protocol.errors import ProtocolViolation

__all__ = ["bidirectional_length", "extended_cdb"]

_AHS = Struct("!HB")


def _ahs(view: memoryview, at: int, words: int) -> list[tuple[int, memoryview]]:
    """(AHSType, its specific bytes) of each additional header segment (RFC 7143 §11.2.2)."""
    segments = []
    position, end = at + 48, at + 48 + 4 * words
    while end - position >= 4:
        length, kind = _AHS.unpack_from(view, position)
        stop = position + 3 + length
        if stop > end:
            raise ProtocolViolation(RejectReason.INVALID_PDU_FIELD, f"AHSLength {length}", fatal=True)
        segments.append((kind & 0x3F, view[position + 3 : stop]))
        position += (3 + length + 3) & ~3
    return segments


def extended_cdb(view: memoryview, at: int, words: int) -> bytes:
    """The CDB bytes beyond 16 (AHSType 1; its first byte is reserved), RFC 7143 §11.2.2.3."""
    return b"".join(bytes(rest[1:]) for kind, rest in _ahs(view, at, words) if kind == 1)


def bidirectional_length(view: memoryview, at: int, words: int) -> int:
    """Expected bidirectional read length (AHSType 2), bytes, RFC 7143 §11.2.2.4."""
    for kind, rest in _ahs(view, at, words):
        if kind == 2 and len(rest) >= 5:
            return int.from_bytes(rest[1:5], "big")
    return 0
