"""What a live engine asks of whoever keeps things for it: in the daemon's first process the store itself."""

from typing import Protocol

from targetd.model import Configuration

__all__ = ["Keeper", "StoreError"]


class StoreError(Exception):
    """The store cannot be opened, read or written; the text is for the operator and says what to do."""


class Keeper(Protocol):
    """Keeps a configuration and named bytes, durably."""

    async def save(self, old: Configuration, new: Configuration) -> None:
        """Make what is kept, which is ``old``, into ``new``. What it raises has left ``old``."""

    async def put(self, namespace: str, key: str, value: bytes | None) -> None:
        """Keep these bytes under this name; None forgets them.

        Raises:
            StoreError: what was kept is kept still.
        """

    async def items(self, namespace: str) -> dict[str, bytes]:
        """Everything kept under a namespace: key → bytes."""
