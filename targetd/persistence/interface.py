"""What a live engine asks of whoever keeps things for it: in the daemon's first process the store itself."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from targetd.config import Configuration

__all__ = ["UNITS", "Persistence", "Records", "StoreError", "StoreFullError"]

UNITS = "unit"
"""Namespace of what logical units have kept; keys are "<extent id>/<name>"."""


class StoreError(Exception):
    """The store cannot be opened, read or written; the text is for the operator and says what to do."""

    full = False
    """There is no room: a change that frees some first may succeed."""


class StoreFullError(StoreError):
    """The file system of the store has no room; what was stored is stored still."""

    full = True


class Persistence(Protocol):
    """Keeps a configuration and named bytes, durably."""

    async def save(self, old: Configuration, new: Configuration) -> None:
        """Make what is kept, which is ``old``, into ``new``. What it raises has left ``old``.

        With an extent goes what its units had kept.
        """

    async def put(self, namespace: str, key: str, value: bytes | None) -> None:
        """Keep these bytes under this name; None forgets them.

        Raises:
            StoreError: what was kept is kept still.
        """

    async def items(self, namespace: str) -> dict[str, bytes]:
        """Everything kept under a namespace: key → bytes."""


class Records:
    """What logical units have kept, by extent."""

    def __init__(self, items: Mapping[str, bytes] | None = None) -> None:
        """``items``: as in ``UNITS``."""
        self._by_extent: dict[int, dict[str, bytes]] = {}
        self.update(items or {})

    def update(self, items: Mapping[str, bytes]) -> None:
        for key, value in items.items():
            extent, _, name = key.partition("/")
            self._by_extent.setdefault(int(extent), {})[name] = value

    def of(self, extent_id: int) -> Mapping[str, bytes]:
        """Name → bytes."""
        return self._by_extent.get(extent_id, {})

    def items_of(self, extent_ids: Iterable[int]) -> dict[str, bytes]:
        """As in ``UNITS``."""
        return {f"{id}/{name}": value for id in extent_ids for name, value in self.of(id).items()}

    def forget(self, extent_ids: Iterable[int]) -> None:
        """These extents are gone."""
        for id in extent_ids:
            self._by_extent.pop(id, None)
