"""RFC 1982 with SERIAL_BITS = 32, as RFC 7143 §4.2.2.1 wants it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import serial

NUMBERS = st.integers(0, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [(0, 1), (0xFFFFFFFF, 0), (0xFFFFFFFE, 5), (0, 0x7FFFFFFF), (0x80000000, 0xFFFFFFFF)],
)
def test_order_goes_round_the_end(earlier: int, later: int) -> None:
    assert serial.lt(earlier, later)
    assert serial.le(earlier, later)
    assert not serial.lt(later, earlier)
    assert not serial.le(later, earlier)


def test_numbers_half_the_circle_apart_have_no_order() -> None:
    """RFC 1982 §3.2: neither is before the other."""
    assert not serial.lt(0, 0x80000000)
    assert not serial.lt(0x80000000, 0)


@given(NUMBERS, st.integers(1, 0x7FFFFFFF))
def test_what_is_added_comes_later(number: int, increment: int) -> None:
    assert serial.lt(number, serial.add(number, increment))
    assert serial.le(number, number)
    assert not serial.lt(number, number)
