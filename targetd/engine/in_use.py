"""What an edit may not do to a disk under the initiators that have it open, unless it is forced.

An initiator takes these for granted as long as its session lasts: what it wrote is there, and at the LBA
where it wrote it. Another medium, another block size or a smaller size break that, and no unit attention
undoes a write that is on its way. So they are refused while somebody is logged in, in words that say who.
Forced, they are done: commands under way are ended, and every nexus gets its unit attention.

What each field of the configuration does to sessions is the table in ``tests/functional/test_edits.py``.
"""

import os
from collections.abc import Iterable, Iterator, Mapping

from protocol.scsi import sanitize
from storage.open import ExtentSpec
from targetd.config import (
    WHOLE,
    Changes,
    ConfigError,
    Configuration,
    Extent,
    Problem,
    mappings_by_extent,
    mappings_by_target,
)
from targetd.engine.extents import LiveExtent, appearance

__all__ = [
    "busy",
    "check_block_sizes",
    "check_busy",
    "check_medium",
    "check_size",
    "is_another_medium",
    "users",
]

MOST_NAMES = 4
"""Initiators that a message names; of a cluster of 64 the rest is counted."""


def users(live: LiveExtent) -> str:
    """The initiators that have an extent open, in words; empty: nobody has."""
    return _listed(nexus.initiator_name for unit in live.units.values() for nexus in unit.nexuses)


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(names))
    shown = found[:MOST_NAMES]
    if len(found) > MOST_NAMES:
        shown.append(f"{len(found) - MOST_NAMES} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _refusal(names: str, cannot: str) -> str:
    return f"The extent is in use and cannot {cannot}. Logged in: {names}. force=1 does it all the same."


def busy(live: LiveExtent) -> str:
    """Why an extent can get no other medium, size or block size now, not even by force; empty: it can."""
    for unit in live.units.values():
        locked = unit.locked
        if isinstance(locked, sanitize.Operation) and not locked.plan.failed:
            return f"The extent is being {'formatted' if locked.formats else 'sanitized'}."
    return ""


# -- block sizes --------------------------------------------------------------------------------------


def check_block_sizes(
    old: Configuration,
    new: Configuration,
    changes: Changes,
    extents: Mapping[int, LiveExtent],
    force: bool,
) -> None:
    """Refuse another block size where somebody is logged in, by whichever field it comes about.

    Raises:
        ConfigError: on ``block_size`` of an extent or ``logical_block_size`` of a target.
    """
    problems = tuple(_block_sizes(old, new, changes, extents, force))
    if problems:
        raise ConfigError(problems)


def _block_sizes(
    old: Configuration,
    new: Configuration,
    changes: Changes,
    extents: Mapping[int, LiveExtent],
    force: bool,
) -> Iterator[Problem]:
    touched = set(changes["extents"].written) if "extents" in changes else set()
    for target_id in changes["targets"].written if "targets" in changes else ():
        touched |= {mapping.extent_id for mapping in mappings_by_target(new).get(target_id, ())}
    for extent_id in sorted(touched & extents.keys()):
        live, before, after = extents[extent_id], old.extents[extent_id], new.extents[extent_id]
        by_extent = before.block_size != after.block_size
        under: dict[int, list[str]] = {}
        """Target → who is logged in to it and has the extent."""
        for mapping in mappings_by_extent(new).get(extent_id, ()):
            unit, target = live.units.get(mapping.target_id), old.targets.get(mapping.target_id)
            if unit is not None and target is not None:
                was = appearance(before, target, mapping)
                now = appearance(after, new.targets[target.id], mapping)
                if was.block_size != now.block_size:
                    under[target.id] = [nexus.initiator_name for nexus in unit.nexuses]
        message = busy(live) if under else ""
        names = _listed(name for found in under.values() for name in found)
        if not message and names and not force:
            message = _refusal(names, "change its block size")
        if message and by_extent:
            yield Problem("extents", "block_size", message, extent_id)
        elif message:
            for target_id in under:
                yield Problem("targets", "logical_block_size", message, target_id)


# -- media ----------------------------------------------------------------------------------------


def is_another_medium(was: ExtentSpec, now: ExtentSpec) -> bool:
    """Whether another medium comes in place of the one there was: a file that has only got another name is
    the same. On a worker."""
    return was.kind != now.kind or (was.path != now.path and _identity(was.path) != _identity(now.path))


def _identity(path: str) -> object:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return path
    return status.st_rdev or (status.st_dev, status.st_ino)


def check_medium(after: Extent, other_kind: bool, names: str) -> None:
    """Refuse another medium under the initiators ``names``, if there are any.

    Raises:
        ConfigError: on ``path`` or ``type``.
    """
    if names:
        attribute = "type" if other_kind else "path"
        message = _refusal(names, f"change its {attribute}")
        raise ConfigError.one("extents", attribute, message, after.id)


def check_size(had: int, size: int, names: str, extent_id: int) -> None:
    """Refuse a smaller size (bytes) under the initiators ``names``, if there are any.

    Raises:
        ConfigError: on ``file_size``.
    """
    if size < had and names:
        message = _refusal(names, f"shrink from {had} to {size} bytes")
        raise ConfigError.one("extents", "file_size", message, extent_id)


def check_busy(live: LiveExtent) -> None:
    """Refuse another medium or size while this one is made unreadable or formatted.

    Raises:
        ConfigError: on the extent as a whole.
    """
    if message := busy(live):
        raise ConfigError.one("extents", WHOLE, message, live.extent.id)
