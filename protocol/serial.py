"""32-bit serial-number arithmetic (RFC 1982 with SERIAL_BITS = 32) for CmdSN, StatSN and DataSN.

RFC 7143 §4.2.2.1 counts CmdSN in this arithmetic, so two numbers are never compared with ``<``: 0 comes
right after FFFFFFFFh. Numbers exactly 2³¹ apart are neither before nor after each other.
"""

__all__ = ["MASK", "add", "le", "lt"]

MASK = 0xFFFFFFFF
_HALF = 0x80000000


def add(number: int, increment: int = 1) -> int:
    """``number + increment`` modulo 2³²."""
    return (number + increment) & MASK


def lt(a: int, b: int) -> bool:
    """Whether ``a`` comes before ``b``."""
    return 0 < ((b - a) & MASK) < _HALF


def le(a: int, b: int) -> bool:
    """Whether ``a`` is ``b`` or comes before it."""
    return ((b - a) & MASK) < _HALF
