"""Where the SPC commands have their ALLOCATION LENGTH and PARAMETER LIST LENGTH. Knows no meaning.

LBA and TRANSFER LENGTH of the SBC commands are decoded in ``block.py``, on the hot path.
"""

__all__ = ["allocation_length", "cut", "parameter_list_length"]

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
