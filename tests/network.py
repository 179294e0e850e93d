"""Network namespaces for tests: addresses and links that come and go, seen by nobody else.

A namespace lives as long as something is in it, so there is nothing to delete: processes started and
sockets opened inside ``Network.entered`` are in it, and when they are gone it is.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NEW_NETWORK = 0x40000000
"""CLONE_NEWNET (linux/sched.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip"):
        return "not installed: ip (iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b"],
        capture_output=True,
        text=True,
    )
    return f"no veth in a network namespace here: {tried.stderr.strip()}" if tried.returncode else ""


WHY_NOT = _why_not()
needs_networks = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def _set(descriptor: int) -> None:
    if _libc.setns(descriptor, NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """A network namespace of its own, with the loopback interface up."""

    def __init__(self) -> None:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            if _libc.unshare(NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "unshare")
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            self.ip("link", "set", "lo", "up")
        finally:
            _set(before)
            os.close(before)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in it meanwhile: what it opens and starts stays there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _set(self._descriptor)
        try:
            yield
        finally:
            _set(before)
            os.close(before)

    def ip(self, *arguments: str) -> None:
        """``ip`` in there."""
        with self.entered():
            subprocess.run(["ip", *arguments], check=True)

    def join(self, other: "Network", mine: str, theirs: str) -> None:
        """A veth pair between the two, both ends up."""
        self.ip("link", "add", mine, "type", "veth", "peer", "name", theirs)
        path = Path(f"/proc/{os.getpid()}/fd/{other._descriptor}")
        self.ip("link", "set", theirs, "netns", str(path))
        self.ip("link", "set", mine, "up")
        other.ip("link", "set", theirs, "up")

    def close(self) -> None:
        os.close(self._descriptor)
