"""The 8-byte LUN field (SAM-5 §4.7): one level, peripheral or flat addressing."""

__all__ = ["decode_lun", "encode_lun", "flat_lun"]

LIMIT = 16384
"""LUNs are below this: what flat addressing can say."""


def decode_lun(field: bytes) -> int | None:
    """The LUN; None: another method, a bus other than 0, or more levels: no such unit here."""
    if any(field[2:]):
        return None
    method, value = field[0] >> 6, (field[0] & 0x3F) << 8 | field[1]
    if method == 0:
        return value if value < 256 else None
    return value if method == 1 else None


def encode_lun(lun: int) -> bytes:
    """As REPORT LUNS gives it: peripheral addressing below 256, flat above (SAM-5 §4.7.3)."""
    if not 0 <= lun < LIMIT:
        raise ValueError(f"LUN {lun} is not below {LIMIT}")
    return bytes((0, lun, 0, 0, 0, 0, 0, 0)) if lun < 256 else flat_lun(lun)


def flat_lun(lun: int) -> bytes:
    """Flat addressing, which initiators may use for any LUN (SAM-5 §4.7.7.3)."""
    return bytes((0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0, 0, 0))
