"""Real media for tests: loop devices and file systems on them. Each says why it cannot be had."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = [
    "attach",
    "detach",
    "drop_from_cache",
    "file_system",
    "loop_device",
    "requires_loop_devices",
    "small_tmpfs",
]


def _why_no_loop_devices() -> str | None:
    if os.geteuid():
        return "needs root for loop devices"
    if not shutil.which("losetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        return "losetup is not installed"
    if not Path("/dev/loop-control").exists():
        return "the kernel has no loop devices"
    probe = subprocess.run(["losetup", "--find"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no loop device to be had: {probe.stderr.strip()}"


_reason = _why_no_loop_devices()
requires_loop_devices = pytest.mark.skipif(_reason is not None, reason=_reason or "")


def attach(file: Path, *options: str) -> str:
    """Make a loop device of a file; gives its node."""
    answer = subprocess.run(
        ["losetup", "--find", "--show", *options, str(file)], check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def detach(node: str) -> None:
    """Take a loop device away."""
    subprocess.run(["losetup", "--detach", node], check=True, capture_output=True)


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    """A loop device over a file, for the length of a ``with``."""
    node = attach(file, *options)
    try:
        yield node
    finally:
        detach(node)


@contextlib.contextmanager
def small_tmpfs(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs with so much room, mounted: a medium under it fails when that is used up."""
    at = directory / "small"
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@contextlib.contextmanager
def file_system(directory: Path, make: list[str], size_bytes: int) -> Iterator[Path]:
    """A new file system of its own on a loop device, mounted; gives the mount point.

    ``make``: the command that makes it, to which the device is appended. Skips where it is missing.
    """
    if not shutil.which(make[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        pytest.skip(f"{make[0]} is not installed")
    image = directory / "file-system.img"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    with loop_device(image) as node:
        subprocess.run([*make, node], check=True, capture_output=True)
        at = directory / "mounted"
        at.mkdir()
        mounted = subprocess.run(["mount", node, str(at)], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
        try:
            yield at
        finally:
            left = subprocess.run(["umount", str(at)], capture_output=True, text=True)
            if left.returncode:
                subprocess.run(["umount", "--lazy", str(at)], check=True)
                pytest.fail(f"something still uses the file system: {left.stderr.strip()}")


def drop_from_cache(path: Path) -> None:
    """Take a file's pages out of memory, as memory pressure would."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
