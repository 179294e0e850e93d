"""What a medium is to the kernel, whatever its names are: so that one is never taken for two, or another
for it.

Two questions, two answers.

**Is this the same bytes as that?** ``medium_of`` gives a ``Medium``: the stretches (``Part``) of files and
disks that it *is*, and those that it lies on (``below``). A partition is a stretch of its disk, a loop
device one of the file behind it; a map of device mapper or MD is a disk of its own that lies on others, as
a file lies on the disk of its file system. Two media clash if one has bytes that the other has, or lies
on: a disk and its partition, a loop device and its file, a volume group's disk and a volume. Two
partitions, two volumes, two files of one file system do not. Hard links, symbolic links and bind mounts
are one file by themselves.

**Is this the one that was here before?** ``trace_of`` gives a text to be kept over restarts, and
``is_other`` says of two whether they are certainly not of one medium. Device and inode numbers are not for
that: numbers of devices change from one boot to the next. What is kept of a file is its inode's number and
time of birth with the identity of its file system, where file systems keep these for good; of a device,
the name that it has by its hardware or its driver. What cannot be told is no difference: a copy on another
file system, as after a restore on a new disk, is taken as it is found.
"""

import fcntl
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from typing import Final, Literal

from storage import linux

__all__ = ["ANOTHER", "Medium", "Part", "device_name", "disk_sequence", "is_other", "medium_of", "trace_of"]

ANOTHER: Final = (
    "another {} has taken the place of the extent's; put that back, or take this one (POST extent/ID/adopt/)"
)
"""With ``file`` or ``device`` in it."""

END: Final = 1 << 63
"""Bytes; beyond all that there is."""
SECTOR: Final = 512
"""Bytes; the unit of sizes in sysfs."""
MAX_DEPTH: Final = 16
"""Devices on devices; more is a mistake of the kernel's."""

LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_STATUS: Final = Struct("=QQQQQ")
"""lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit: the beginning of ``struct loop_info64``."""
_LOOP_STATUS_SIZE: Final = 232

KEEPS_INODES: Final = frozenset({linux.EXT4, linux.XFS, linux.BTRFS, linux.F2FS, linux.ZFS})
"""File systems on which a file has one inode number and one time of birth for as long as it exists."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of something that holds bytes."""

    kind: Literal["file", "disk", "name"]
    """``name``: a file that is not there yet, in the directory ``device``, ``inode``."""
    device: int
    inode: int = 0
    name: str = ""
    start: int = 0
    end: int = END
    """In bytes; the stretch ends before it."""

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What it is a stretch of."""
        return self.kind, self.device, self.inode, self.name

    def overlaps(self, other: "Part") -> bool:
        return self.key == other.key and self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class Medium:
    """One file or device."""

    own: tuple[Part, ...]
    """What it is."""
    below: tuple[Part, ...] = ()
    """What it lies on."""

    def clashes(self, other: "Medium") -> bool:
        """Whether a write to one may change what the other holds, or destroy what it lies on."""
        return (
            _overlap(self.own, other.own)
            or _overlap(self.own, other.below)
            or _overlap(self.below, other.own)
        )


def _overlap(some: Sequence[Part], others: Sequence[Part]) -> bool:
    return any(part.overlaps(other) for part in some for other in others)


def medium_of(path: str) -> Medium:
    """What is under a path, with all links followed; of a file that is not there, where it would be made.

    May wait for a file system.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return _to_be_made(path)
    return _medium(status)


def _medium(status: os.stat_result) -> Medium:
    if stat.S_ISBLK(status.st_mode):
        return _of_device(status.st_rdev)
    return _of_file(status.st_dev, status.st_ino)


def _of_file(device: int, inode: int, depth: int = 0) -> Medium:
    lies_on: tuple[Part, ...] = ()
    if _sysfs(device) is not None:  # not of a network file system, of memory, or one with numbers of its own
        disk = _of_device(device, depth + 1)
        lies_on = disk.own + disk.below
    return Medium((Part("file", device, inode),), lies_on)


def _to_be_made(path: str) -> Medium:
    """Two names that lead to one file that is not there yet are one."""
    real = Path(os.path.realpath(path))
    for directory in real.parents:
        try:
            status = directory.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return Medium((Part("name", status.st_dev, status.st_ino, str(real.relative_to(directory))),))
    return Medium((Part("name", 0, 0, str(real)),))


# -- devices --------------------------------------------------------------------------------------


def _sysfs(rdev: int) -> Path | None:
    """The directory of a block device; None: the kernel knows no such, or does not show it."""
    node = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    return node.resolve() if os.major(rdev) and node.exists() else None


def _text(path: Path) -> str:
    """An attribute; empty where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0


def _rdev_of(directory: Path) -> int | None:
    major, _, minor = _text(directory / "dev").partition(":")
    return os.makedev(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _of_device(rdev: int, depth: int = 0) -> Medium:
    itself = Medium((Part("disk", rdev),))
    node = _sysfs(rdev)
    if node is None or depth > MAX_DEPTH:
        return itself
    if (node / "partition").exists():
        disk = _rdev_of(node.parent)
        if disk is None:
            return itself
        start, size = _number(node / "start") * SECTOR, _number(node / "size") * SECTOR
        return _stretch(_of_device(disk, depth + 1), start, size)
    if (node / "loop").exists():
        return _of_loop(rdev, node, depth)
    lower = [_rdev_of(each) for each in _listed(node / "slaves")]
    media = [_of_device(each, depth + 1) for each in lower if each is not None]
    return Medium(itself.own, tuple(part for medium in media for part in medium.own + medium.below))


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _stretch(medium: Medium, start: int, size: int) -> Medium:
    """``size`` bytes of it; 0: all from ``start`` on."""
    own = (
        replace(
            part, start=part.start + start, end=min(part.end, part.start + start + size) if size else part.end
        )
        for part in medium.own
    )
    return Medium(tuple(own), medium.below)


def _of_loop(rdev: int, node: Path, depth: int) -> Medium:
    """The kernel tells by number what is behind a loop device; the name in sysfs may be anybody's by now."""
    device, inode, lower, offset, limit = 0, 0, 0, 0, 0
    try:
        fd = os.open(f"/dev/{node.name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        fd = -1
    try:
        if fd >= 0 and os.fstat(fd).st_rdev == rdev:
            answer = bytearray(_LOOP_STATUS_SIZE)
            fcntl.ioctl(fd, LOOP_GET_STATUS64, answer)
            device, inode, lower, offset, limit = _LOOP_STATUS.unpack_from(answer)
    except OSError:
        pass  # ENXIO: nothing is behind it
    finally:
        if fd >= 0:
            os.close(fd)
    if lower and lower != device:  # a device, whose node is the inode
        return _stretch(_of_device(lower, depth + 1), offset, limit)
    if inode:
        return _stretch(_of_file(device, inode, depth), offset, limit)
    return Medium((Part("disk", rdev),))


# -- over restarts --------------------------------------------------------------------------------


def trace_of(path: str) -> str:
    """What is kept of a file or device, to know it again. May wait for a file system.

    Raises:
        OSError: it cannot be looked at.
    """
    status = Path(path).stat()
    if stat.S_ISBLK(status.st_mode):
        return json.dumps({"disk": device_name(status.st_rdev, loops=False)})
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        return json.dumps(
            {
                "file system": f"{linux.file_system(fd):x}-{os.fstatvfs(fd).f_fsid:x}",
                "inode": status.st_ino,
                "born": linux.birth_time(fd) if linux.file_system(fd) in KEEPS_INODES else None,
            }
        )
    finally:
        os.close(fd)


def is_other(kept: str, found: str) -> bool:
    """Whether two traces are certainly of two media."""
    try:
        was, now = json.loads(kept), json.loads(found)
    except ValueError:
        return False
    if "disk" in was and "disk" in now:
        return bool(was["disk"] and now["disk"]) and was["disk"] != now["disk"]
    if was.get("file system") != now.get("file system") or not (was.get("born") and now.get("born")):
        return False
    return (was["inode"], was["born"]) != (now["inode"], now["born"])


def disk_sequence(rdev: int) -> str:
    """The number that no other disk since boot has had under any device number; empty before Linux 5.15."""
    node = _sysfs(rdev)
    if node is None:
        return ""
    return _text((node.parent if (node / "partition").exists() else node) / "diskseq")


def device_name(rdev: int, *, loops: bool = True, depth: int = 0) -> str:
    """The name of a block device that stays when it goes and comes back; empty: it has none.

    Of hardware its world-wide name or serial number, of a map its UUID.

    Args:
        loops: of a loop device the file behind it, by number; not to be kept over a restart.
    """
    node = _sysfs(rdev)
    if node is None or depth > MAX_DEPTH:
        return ""
    if (node / "partition").exists():
        disk = _rdev_of(node.parent)
        whole = "" if disk is None else device_name(disk, loops=loops, depth=depth + 1)
        return f"{whole} {_text(node / 'partition')} {_text(node / 'start')}" if whole else ""
    if (node / "loop").exists():
        (part, *_) = _of_loop(rdev, node, depth).own
        return f"loop {part}" if loops and part != Part("disk", rdev) else ""
    for attribute in ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"):
        if name := " ".join(_text(node / attribute).split()):
            return f"{attribute} {name}"
    return ""
