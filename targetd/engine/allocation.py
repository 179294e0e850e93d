"""The space of file extents (``iscsi_target_extent_allocate``), taken ahead of the change that asks for it.

Where the file system has to write for it that can last for hours, and the lock of the configuration is not
held meanwhile. So a change goes twice through its edit: the first time it is found that space is due and the
lock is let go of; once the space is there it begins again with the configuration of that moment, and is
carried out or refused like any other::

    async with allocations.of_change() as space:
        while True:
            async with lock:
                ... new = edit(old) ...
                due = space.due(old, new)
                if not due:
                    ... carry out; return
            await space.take(due)

What a change refused in the end had made is removed again; a file that was there keeps what it was given.
Nobody else may bring the same file into the configuration, or change its size, while its space is taken.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from storage.open import Created, allocate_file
from targetd.config import ConfigError, Configuration, Extent, diff
from targetd.engine.extents import check_path, path_errors, spec_of
from targetd.interface import Work
from targetd.system.threads import run_in_thread

__all__ = ["Allocations", "SpaceOfChange"]

BUSY = "The space of this file is being taken; try again when that has ended."


class _Allocation:
    """The space of one extent, being taken or taken."""

    def __init__(self, extent: Extent, *, known: bool) -> None:
        self.extent = extent
        self.known = known
        """The configuration has the extent already; else its id is only the likely one."""
        self.done = 0
        """Bytes; written by the worker at it."""
        self.taken = False
        self.unwanted = False
        """Give up."""

    def told(self, done: int) -> None:
        self.done = done


def _key(extent: Extent) -> tuple[str, int]:
    return extent.path, extent.size_bytes


class Allocations:
    """All that are under way in one daemon. On the event loop."""

    def __init__(
        self,
        roots: Callable[[], Sequence[Path]],
        pools: Mapping[str, Path],
        judge: Callable[[Extent], None] = lambda extent: None,
    ) -> None:
        """
        Args:
            roots: where File extents may live now.
            judge: raises a ConfigError for a file that an extent may not have; on a worker.
        """
        self.roots = roots
        self.judge = judge
        self.pools = pools
        self.under_way: dict[_Allocation, None] = {}

    def of_change(self) -> "SpaceOfChange":
        """The account of one change; a context manager."""
        return SpaceOfChange(self)

    def work(self) -> Iterator[Work]:
        """What is under way, for those who look."""
        for each in self.under_way:
            if not each.taken:
                extent = each.extent
                yield Work("allocate", extent.id, extent.name, each.done, max(extent.size_bytes, each.done))

    def removed(self, extent_ids: Iterable[int]) -> None:
        """Extents have been deleted: nobody wants their space any more."""
        gone = set(extent_ids)
        for each in self.under_way:
            if each.known and each.extent.id in gone:
                each.unwanted = True

    def stop(self) -> None:
        """The daemon ends: give up soon."""
        for each in self.under_way:
            each.unwanted = True


class SpaceOfChange:
    """What one change has taken ahead of itself; undone unless the ``with`` block ends well."""

    def __init__(self, owner: Allocations) -> None:
        self._owner = owner
        self._mine: list[_Allocation] = []
        self._made: list[Created] = []

    async def __aenter__(self) -> "SpaceOfChange":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                for created in self._made:
                    await run_in_thread(created.undo)
        finally:
            for each in self._mine:
                self._owner.under_way.pop(each, None)

    def due(self, old: Configuration, new: Configuration) -> list[Extent]:
        """The extents whose space is still to be taken before ``new`` may come into force.

        Raises:
            ConfigError: one that is written has a file whose space another change is taking.
        """
        change = diff(old, new).get("extents")
        if change is None:
            return []
        taken = {_key(each.extent) for each in self._mine}
        busy = {each.extent.path for each in self._owner.under_way if each not in self._mine}
        due = []
        for extent in change.written.values():
            assert isinstance(extent, Extent)
            before = old.extents.get(extent.id)
            moved = before is None or _key(before) != _key(extent)
            if extent.path in busy and moved:
                raise ConfigError.one("extents", "path", BUSY, extent.id)
            if (
                extent.type == "File"
                and extent.allocate
                and (moved or (before is not None and not before.allocate))
                and _key(extent) not in taken
            ):
                due.append(extent)
        return due

    async def take(self, extents: Iterable[Extent], known: Configuration) -> None:
        """Take the space of these, one after the other; ``known``: the configuration in force.

        Raises:
            ConfigError: on ``path``, why it cannot be.
        """
        for extent in extents:
            each = _Allocation(extent, known=extent.id in known.extents)
            self._mine.append(each)
            self._owner.under_way[each] = None
            self._made.append(await run_in_thread(self._take, each))
            each.taken = True

    def _take(self, each: _Allocation) -> Created:
        """On a worker."""
        extent = each.extent
        check_path(extent, self._owner.roots(), self._owner.pools)
        self._owner.judge(extent)
        with path_errors(extent):
            return allocate_file(spec_of(extent, self._owner.pools), each.told, lambda: each.unwanted)
