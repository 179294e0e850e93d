"""One medium, one extent, over all worker processes.

Each worker sees to it among its own extents. Between workers the kernel does most of it, since a file is
locked and a device claimed by whoever opens it; what it cannot see is that a loop device and its file, a
disk and what lies on it, are one. So the front asks: before a change, whether anybody has what it opens;
and when workers have begun, or a medium has come back, who has what, and of two that have the same the
younger extent is withheld.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from targetd.config import Changes, ConfigError, Configuration, Extent, Problem
from targetd.engine.extents import spec_of
from targetd.engine.media import Found, Media, find, taken
from targetd.system.threads import run_in_thread

__all__ = ["Rivals"]

log = logging.getLogger("targetd.workers")

AskAll = Callable[..., Awaitable[Sequence[Any]]]
"""(what, arguments): the answers of the workers that are there."""


class Rivals:
    """What the front does about it."""

    def __init__(
        self,
        ask_all: AskAll,
        withhold: Callable[[int, str], Awaitable[None]],
        pools: Mapping[str, Path],
    ) -> None:
        """``withhold``: an extent gives its medium up, and why; empty: it may have it again."""
        self._ask_all = ask_all
        self._withhold = withhold
        self._pools = pools
        self._withheld: dict[int, str] = {}

    async def check(self, old: Configuration, changes: Changes) -> None:
        """Whether nobody has what a change is about to open.

        Raises:
            ConfigError: somebody has.
        """
        if "extents" not in changes:
            return
        written = [
            extent
            for extent in changes["extents"].written.values()
            if isinstance(extent, Extent) and self._opens(old.extents.get(extent.id), extent)
        ]
        if not written:
            return
        found = await run_in_thread(self._find, written)
        leaving = {*changes["extents"].removed, *(extent.id for extent in written)}
        answers = await self._ask_all("rivals", found, leaving)
        problems = [
            Problem("extents", "path", f"{extent.path}: {message}.", extent.id)
            for answer in answers
            for extent, message in answer
        ]
        if problems:
            raise ConfigError(problems)

    def _opens(self, before: Extent | None, extent: Extent) -> bool:
        return before is None or spec_of(before, self._pools) != spec_of(extent, self._pools)

    def _find(self, extents: Iterable[Extent]) -> list[tuple[Extent, Found]]:
        found = []
        for extent in extents:
            try:
                what = find(spec_of(extent, self._pools))
            except (OSError, ValueError):
                continue  # its worker says what is wrong with it
            if what is not None:
                found.append((extent, what))
        return found

    async def settle(self) -> None:
        """Of extents that turn out to have one medium the oldest keeps it."""
        table, rivals = Media(), dict[int, str]()
        all_found = [pair for answer in await self._ask_all("media_found") for pair in answer]
        for extent, found in sorted(all_found, key=lambda pair: pair[0].id):
            other = table.rival(extent, found)
            if other is None:
                table.put(extent, found)
            else:
                rivals[extent.id] = taken(other)
        for id in self._withheld.keys() - rivals.keys():
            await self._withhold(id, "")
        for id, reason in rivals.items():
            if self._withheld.get(id) != reason:
                log.error("extent %d: %s; its LUNs are not ready", id, reason)
                await self._withhold(id, reason)
        self._withheld = rivals

    @property
    def any(self) -> bool:
        """Some are withheld."""
        return bool(self._withheld)
