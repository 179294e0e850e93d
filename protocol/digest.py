"""CRC32C as iSCSI sends it (RFC 7143 §13.1). Knows nothing else.

The polynomial is 11EDC6F41h; on the wire the four bytes go out least significant first, as the
examples in RFC 7143 appendix A show (32 zero bytes: AAh 36h 91h 8Ah).
"""

from struct import Struct

from crc32c import crc32c

__all__ = ["DIGEST_LENGTH", "digest", "matches"]

DIGEST_LENGTH = 4

_WIRE = Struct("<I")


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """The digest of the parts one after another."""
    value = 0
    for part in parts:
        value = crc32c(part, value)
    return _WIRE.pack(value)


def matches(data: memoryview, at: int, length: int, digest_at: int) -> bool:
    """Whether ``data[digest_at:]`` begins with the digest of ``data[at:at + length]``."""
    received: int = _WIRE.unpack_from(data, digest_at)[0]
    return crc32c(data[at : at + length]) == received
