"""Collections that remember what they were made from.

With thousands of objects a change must cost what it changes and not a pass over all of them. A collection
that an edit made therefore knows which ids were touched since its last forebears; the difference of two and
the look-ups (``lookups.py``) ask for those alone. Two that have no such forebear in common are compared
whole, as if nothing were remembered: what is known makes it faster, never other.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Self, TypeVar

__all__ = ["VersionedMap"]

_T = TypeVar("_T")

REMEMBERED: Final = 16
"""Forebears that a collection knows. An edit makes a few; what was kept of older ones is made anew."""


class VersionedMap(dict[int, _T]):
    """id → object. Never changed once it is made; what changes is made from it (``put``, ``without``)."""

    __slots__ = ("_forebears", "_token")

    def __init__(self, members: Mapping[int, _T] | Iterable[tuple[int, _T]] = ()) -> None:
        super().__init__(members)
        self._token = object()
        """Stands for this very collection in those made from it, and does not keep it alive."""
        self._forebears: tuple[tuple[object, frozenset[int]], ...] = ()
        """(token, ids touched in what was made from that one), the oldest first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def put(self, id: int, member: _T) -> Self:
        """With this object more, or in place of the one of the same id."""
        made = self._child(frozenset((id,)))
        dict.__setitem__(made, id, member)
        return made

    def without(self, ids: Iterable[int]) -> Self:
        """Less these; KeyError: one of them is not there."""
        gone = frozenset(ids)
        made = self._child(gone)
        for id in gone:
            dict.__delitem__(made, id)
        return made

    def _child(self, touched: frozenset[int]) -> Self:
        made = type(self)(self)
        made._forebears = (*self._forebears[1 - REMEMBERED :], (self._token, touched))
        return made

    def touched_since(self, before: Mapping[int, Any]) -> set[int] | None:
        """Ids that may be other than they were there: all that are, and no more than edits touched.

        None: it is not known what this has to do with ``before``.
        """
        if before is self:
            return set()
        if not isinstance(before, VersionedMap):
            return None
        touched: set[int] = set()
        for token, ids in reversed(self._forebears):
            touched |= ids
            if token is before._token:
                return touched
        return None
