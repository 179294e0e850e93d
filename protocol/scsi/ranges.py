"""Things that are at ranges of a medium, found by range: what of all this overlaps what I mean to touch?

A range is kept in one or two cells of a grid whose cells are as long as it is, or up to eight times that; a
question looks at the few cells of each such grid that it meets. So adding, removing and asking cost the same
however many there are, but for a question about a long range: it may meet many short ones, and the first that
it finds is its answer.
"""

from bisect import bisect_left, insort
from typing import Generic, TypeVar

__all__ = ["Ranges"]

_T = TypeVar("_T")

_SHORTEST = 12
"""Bits of the length of the shortest cells, 4 KiB."""
_STEP = 3
"""Bits between a grid and the next."""
LOOKED_AT = 32
"""Things in one cell that are looked at. Where there are more, the one behind them is named though it may
only be near: to wait for it does no harm."""


class Ranges(Generic[_T]):
    """Things at ranges, each with a number that no other has."""

    __slots__ = ("_grids", "_places")

    def __init__(self) -> None:
        self._grids: dict[int, dict[int, list[tuple[int, int, int, _T]]]] = {}
        """Bits of the length of a cell → its number → (number, begin, end, thing), by number."""
        self._places: dict[_T, tuple[int, int, int, int]] = {}
        """Thing → bits, first and last cell, number."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, thing: object) -> bool:
        return thing in self._places

    def add(self, thing: _T, offset: int, length: int, number: int) -> None:
        """Put it there; one that is there already stays as it is, and no range is nowhere."""
        if not length or thing in self._places:
            return
        bits = _bits(length)
        first, last = offset >> bits, (offset + length - 1) >> bits
        self._places[thing] = bits, first, last, number
        grid = self._grids.setdefault(bits, {})
        for cell in {first, last}:
            insort(grid.setdefault(cell, []), (number, offset, offset + length, thing), key=_number)

    def discard(self, thing: _T) -> bool:
        """Take it away; whether it was there."""
        place = self._places.pop(thing, None)
        if place is None:
            return False
        bits, first, last, number = place
        grid = self._grids[bits]
        for cell in {first, last}:
            things = grid[cell]
            del things[bisect_left(things, number, key=_number)]
            if not things:
                del grid[cell]
        if not grid:
            del self._grids[bits]
        return True

    def find(self, offset: int, length: int, before: int) -> _T | None:
        """One with a number below ``before`` whose range overlaps this one; of a cell the highest such."""
        if not length:
            return None
        end = offset + length
        for bits, grid in self._grids.items():
            first, last = offset >> bits, (end - 1) >> bits
            if last - first < len(grid):
                cells = range(first, last + 1)
                found = [things for cell in cells if (things := grid.get(cell)) is not None]
            else:
                found = [things for cell, things in grid.items() if first <= cell <= last]
            for things in found:
                at = bisect_left(things, before, key=_number)
                lowest = max(at - LOOKED_AT, 0)
                for _, begin, over, thing in reversed(things[lowest:at]):
                    if begin < end and offset < over:
                        return thing
                if lowest:
                    return things[lowest - 1][3]
        return None


def _bits(length: int) -> int:
    """Of the length of the cells that a range of this length is kept in."""
    beyond = max((length - 1).bit_length() - _SHORTEST, 0)
    return _SHORTEST + -(-beyond // _STEP) * _STEP


def _number(place: tuple[int, int, int, object]) -> int:
    return place[0]
