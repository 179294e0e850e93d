"""CDB layouts: where the fields of a command are. Knows no meaning of them.

Fields that follow the CDB's size group (SPC-4 §4.2.5) are read by group; what a service action lays out
in its own way is a ``Struct`` beside its body's use. All integers are big-endian.
"""

from struct import Struct

__all__ = ["allocation_length", "blocks", "cut", "parameter_list_length"]

_RW10 = Struct("!2xIxH").unpack_from
_RW12 = Struct("!2xII").unpack_from
_RW16 = Struct("!2xQI").unpack_from
_RW32 = Struct("!12xQ8xI").unpack_from


def blocks(cdb: bytes) -> tuple[int, int]:
    """LOGICAL BLOCK ADDRESS and TRANSFER LENGTH (blocks) of a CDB in the common layout of its group.

    A 6-byte CDB has 21 bits of LBA, and its length 0 means 256 (SBC-3 §5.11).
    """
    group = cdb[0] >> 5
    if group == 1 or group == 2:
        lba, count = _RW10(cdb)
    elif group == 4:
        lba, count = _RW16(cdb)
    elif group == 5:
        lba, count = _RW12(cdb)
    elif group == 0:
        lba, count = int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256
    else:
        lba, count = _RW32(cdb)
    return lba, count


# (byte, length) of ALLOCATION LENGTH or PARAMETER LIST LENGTH by operation code.
_LENGTH_FIELDS: dict[int, tuple[int, int]] = {
    0x03: (4, 1),  # REQUEST SENSE
    0x12: (3, 2),  # INQUIRY
    0x15: (4, 1),  # MODE SELECT(6)
    0x1A: (4, 1),  # MODE SENSE(6)
    0x3B: (6, 3),  # WRITE BUFFER
    0x3C: (6, 3),  # READ BUFFER
    0x4D: (7, 2),  # LOG SENSE
    0x55: (7, 2),  # MODE SELECT(10)
    0x5A: (7, 2),  # MODE SENSE(10)
    0xA0: (6, 4),  # REPORT LUNS
    0xA3: (6, 4),  # MAINTENANCE IN
    0xA4: (6, 4),  # MAINTENANCE OUT
}


def allocation_length(cdb: bytes) -> int:
    """ALLOCATION LENGTH of an SPC command, bytes (SPC-4 §4.2.5.6)."""
    at, size = _LENGTH_FIELDS[cdb[0]]
    return int.from_bytes(cdb[at : at + size], "big")


parameter_list_length = allocation_length
"""PARAMETER LIST LENGTH of an SPC command, bytes (SPC-4 §4.2.5.5): the same place."""


def cut(data: bytes, cdb: bytes) -> bytes:
    """``data`` truncated to the ALLOCATION LENGTH; lengths inside it stay the full ones."""
    return data[: allocation_length(cdb)]
