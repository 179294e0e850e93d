"""Which extent has which medium, and which no extent may have.

A medium is judged before it is opened, whoever wants it: an edit, the start, a look for one that was
missing, an operator who takes what was put in its place. What may be wrong with it, worst first:

* It is the daemon's own: a file of its state directory, a password, a key (``OwnFiles``).
* Another extent has it, by whatever name (``storage.identity``), and not both only read it.
* It is not the one that this extent had: a file that was put in its place is not ours to grow and to write
  to.

What an extent had is known from its opening while the daemon runs, and from a trace that is kept with it
over restarts. Where a trace cannot tell (another file system, as after a restore or on a rebuilt node)
what is found is taken; and all traces are forgotten when the store itself is not where it was
(``targetd.daemon.main``).
"""

import errno
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.identity import ANOTHER, Medium, is_other, medium_of, trace_of
from storage.open import ExtentSpec
from storage.zvol import device_path
from targetd.config import Extent

__all__ = ["TRACE_KEPT_AS", "Found", "Media", "OwnFiles", "discard", "find", "place_of", "taken"]

TRACE_KEPT_AS = "medium"
"""Name of the trace among what is kept with an extent."""

OWN_FILES_S = 1.0
"""How old the list of the daemon's own files may be: a start asks for thousands of extents."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is under the path of an extent."""

    medium: Medium
    trace: str
    """Empty: nothing is there yet."""

    @property
    def there(self) -> bool:
        return self.medium.own[0].kind != "name"

    def is_other_than(self, known: "Found") -> bool:
        """Whether it is certainly not what was ``known`` since the daemon started."""
        return self.there and known.there and self.medium.own != known.medium.own


def place_of(spec: ExtentSpec) -> str:
    """The path of its file or node; empty: it has none."""
    if spec.kind in ("memory", "null"):
        return ""
    return device_path(spec.path) if spec.kind == "zvol" else spec.path


def find(spec: ExtentSpec) -> Found | None:
    """What there is; None where the extent has no place. Worker threads only.

    Raises:
        OSError: it cannot be looked at.
        ValueError: the path names no ZFS volume.
    """
    place = place_of(spec)
    if not place:
        return None
    found = Found(medium_of(place), "")
    return Found(found.medium, trace_of(place)) if found.there else found


class OwnFiles:
    """What the daemon itself lives by, and no initiator may see: compared by inode, whatever the names."""

    def __init__(self, state_directory: Path | None = None, files: Collection[Path] = ()) -> None:
        """
        Args:
            state_directory: everything in it but the folders for extents.
            files: further ones: passwords, keys, options.
        """
        self.state_directory = state_directory
        self.files = tuple(files)
        self._media: list[tuple[Path, Medium]] = []
        self._until = 0.0

    def obstacle(self, place: str, medium: Medium, folders: Sequence[Path]) -> str:
        """Why an extent may not be there, in words; empty: it may. Worker threads only.

        Args:
            folders: where extents may live; below the state directory, but not above or at it.
        """
        if self.state_directory is not None:
            folders = [self.state_directory / "extents", *folders]
            folders = [each for each in folders if self.state_directory in each.parents]
            if self._inside(place, folders):
                return "it is in the state directory, which is the daemon's own"
        now = time.monotonic()
        if now >= self._until:
            self._media = list(self._found(folders))
            self._until = now + OWN_FILES_S
        for path, own in self._media:
            if medium.clashes(own):
                return f"it is, or holds, {path}, which the daemon itself needs"
        return ""

    def _inside(self, place: str, folders: Sequence[Path]) -> bool:
        assert self.state_directory is not None
        state, free = _inode(self.state_directory), {_inode(folder) for folder in folders} - {None}
        to_be_made = {os.path.realpath(folder) for folder in folders}
        for parent in Path(os.path.realpath(place)).parents:
            inode = _inode(parent)
            if str(parent) in to_be_made or (inode is not None and inode in free):
                return False
            if inode is not None and inode == state:
                return True
        return False

    def _found(self, folders: Sequence[Path]) -> Iterator[tuple[Path, Medium]]:
        paths = list(self.files)
        if self.state_directory is not None:
            for directory, names, files in os.walk(self.state_directory):
                names[:] = [name for name in names if Path(directory, name) not in folders]
                paths += [Path(directory, name) for name in files]
        for path in paths:
            try:
                yield path, medium_of(str(path))
            except OSError:
                continue  # it went meanwhile


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Media:
    """What the extents have. Changed on the event loop only; judged on any thread."""

    def __init__(self, own: OwnFiles | None = None) -> None:
        self.own = own or OwnFiles()
        self._entries: dict[int, tuple[Extent, Found]] = {}
        self._users: dict[object, set[int]] = {}
        """What a part is a stretch of, as own or below → ids of extents."""

    def put(self, extent: Extent, found: Found | None) -> None:
        """An extent has this open now; None: nothing that others could have too."""
        self.forget(extent.id)
        if found is not None:
            self._entries[extent.id] = extent, found
            for key in _keys(found):
                self._users[key] = self._users.get(key, set()) | {extent.id}

    def forget(self, extent_id: int) -> None:
        """It has nothing any more."""
        entry = self._entries.pop(extent_id, None)
        for key in _keys(entry[1]) if entry is not None else ():
            self._users[key] = self._users[key] - {extent_id}  # a new set: other threads may read the old one
            if not self._users[key]:
                del self._users[key]

    def of(self, extent_id: int) -> Found | None:
        """What an extent has open."""
        entry = self._entries.get(extent_id)
        return entry[1] if entry is not None else None

    def rival(
        self,
        extent: Extent,
        found: Found,
        leaving: Collection[int] = (),
        coming: Collection[tuple[Extent, Found]] = (),
    ) -> Extent | None:
        """Another extent that has the same, unless both only read it.

        Args:
            leaving: ids of extents that let go of what they have.
            coming: what extents are about to have.
        """
        ids: set[int] = set()
        for part in found.medium.own:
            ids |= self._users.get((True, part.key), set()) | self._users.get((False, part.key), set())
        for part in found.medium.below:
            ids |= self._users.get((True, part.key), set())
        entries = [entry for id in sorted(ids - set(leaving)) if (entry := self._entries.get(id)) is not None]
        for other, has in (*entries, *coming):
            if other.id == extent.id or (other.read_only and extent.read_only):
                continue
            if found.medium.clashes(has.medium):
                return other
        return None

    def all(self) -> list[tuple[Extent, Found]]:
        """What every extent has."""
        return list(self._entries.values())

    def check_known(self, extent: Extent, found: Found, kept: str) -> None:
        """Whether this is what the extent had.

        Args:
            kept: its trace; empty: there is none.

        Raises:
            OSError: ESTALE: it is certainly another.
        """
        known = self.of(extent.id)
        changed = known is not None and found.is_other_than(known)
        if changed or (kept and found.trace and is_other(kept, found.trace)):
            kind = "file" if found.medium.own[0].kind == "file" else "device"
            raise OSError(errno.ESTALE, ANOTHER.format(kind), extent.path)


def _keys(found: Found) -> Iterator[tuple[bool, object]]:
    yield from ((True, part.key) for part in found.medium.own)
    yield from ((False, part.key) for part in found.medium.below)


def taken(other: Extent) -> str:
    """That another extent has it, in words."""
    return f"extent {other.name} has the same file or device already, as {other.path}"


def discard(path: str, known: Found | None, kept: str) -> None:
    """Delete the file of an extent, if it is the one that the extent had. Worker threads only.

    Args:
        known: what the extent had open; None: it had nothing.
        kept: its trace.

    Raises:
        OSError: it cannot be deleted, or is another.
    """
    real = os.path.realpath(path)
    try:
        found = Found(medium_of(real), trace_of(real))
    except FileNotFoundError:
        return
    if found.medium.own != known.medium.own if known is not None else found.trace != kept:
        raise OSError(errno.ESTALE, "it is not the file that the extent had; it is left as it is", path)
    Path(real).unlink()
    if Path(path).is_symlink():
        Path(path).unlink()
