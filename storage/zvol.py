"""A ZFS volume as a medium: a block device whose particulars ZFS knows.

Where it differs from other devices (tried on OpenZFS 2.1):

* ``fallocate(PUNCH_HOLE)`` is not supported; BLKDISCARD is, and a freed block reads as zeros for certain.
* A discard of less than a ``volblocksize`` reports success and keeps the data. So whole blocks are
  discarded, and the ends of the range are written with zeros: unmapped bytes always read as zeros.
* The node under /dev/zvol appears through udev, a moment after the volume.
* Growth of ``volsize`` is visible in the device at once.

``zfs get`` is used where the command is installed; without it (a container with only the device passed in)
the kernel's physical block size stands for ``volblocksize``, as the zvol driver makes it so.
"""

import errno
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from storage import linux
from storage.base import Capabilities, Space
from storage.device import Device
from storage.handle import Handle
from storage.zfs_command import run_command

__all__ = ["APPEAR_TIMEOUT_S", "Zvol", "dataset_of", "device_path"]

PREFIX = "/dev/zvol/"

APPEAR_TIMEOUT_S = 10.0
"""How long to wait for the node of a volume that ZFS knows; udev takes well under a second on an idle
machine and several on one that imports a pool with hundreds of volumes."""

_POLL_S = 0.05

_COMMAND_TIMEOUT_S = 20.0
"""``zfs get`` answers in milliseconds; on a suspended pool, never."""

_PROPERTIES = "type,volsize,volblocksize,refreservation,used,available"

_DATASET = re.compile(r"[A-Za-z][A-Za-z0-9_.: -]*(/[A-Za-z0-9_.: -]+)+(@[A-Za-z0-9_.: -]+)?")
"""A volume's name: pool, at least one component, possibly a snapshot (zfs(8))."""


def dataset_of(path: str) -> str:
    """``pool/name`` from ``/dev/zvol/pool/name``, ``zvol/pool/name`` or ``pool/name``.

    Raises:
        ValueError: it is none of these.
    """
    name = (
        path.removeprefix("/dev/").removeprefix("zvol/") if path.startswith(("/dev/zvol/", "zvol/")) else path
    )
    if not _DATASET.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise ValueError(f"not the name of a ZFS volume: {path!r}")
    return name


def device_path(path: str) -> str:
    """The device node of a volume in any of the forms of ``dataset_of``."""
    return PREFIX + dataset_of(path)


class Zvol(Device):
    """A ZFS volume, open and claimed."""

    def __init__(self, path: str, size_bytes: int = 0, *, read_only: bool = False) -> None:
        """Open a volume by any of the forms of ``dataset_of``; as for ``Device``.

        Raises:
            OSError: ENOENT, there is no such volume, or its node does not appear; ENOTBLK, it is a file
                system; EROFS, a snapshot is to be written; ETIMEDOUT, ``zfs`` does not answer; or as for
                ``Device``.
            ValueError: ``path`` names no volume.
        """
        self.dataset = dataset_of(path)
        if "@" in self.dataset and not read_only:
            raise OSError(errno.EROFS, "a snapshot cannot be written", path)
        self.properties: Mapping[str, int] = self._ask_zfs()
        """volsize, volblocksize, refreservation, used, available in bytes; empty without ``zfs``."""
        node = PREFIX + self.dataset
        if self.properties:
            _wait_for(node)
        super().__init__(node, size_bytes, read_only=read_only)

    def _ask_zfs(self) -> dict[str, int]:
        command = ("zfs", "get", "-Hp", "-o", "property,value", _PROPERTIES, self.dataset)
        try:
            answer = run_command(command, _COMMAND_TIMEOUT_S)
        except FileNotFoundError:
            return {}
        except subprocess.TimeoutExpired:
            raise OSError(
                errno.ETIMEDOUT, "zfs does not answer; is the pool suspended?", self.dataset
            ) from None
        if answer.returncode:
            raise OSError(errno.ENOENT, answer.stderr.strip() or "zfs get failed", self.dataset)
        pairs = [line.split("\t", 1) for line in answer.stdout.splitlines() if "\t" in line]
        if ["type", "filesystem"] in pairs:
            raise OSError(errno.ENOTBLK, "it is a file system of ZFS, not a volume", self.dataset)
        # A property that does not apply (a snapshot's refreservation) has the value "-" or "none".
        return {name: int(value) for name, value in pairs if value.isdigit()}

    def _physical_block_size(self, handle: Handle) -> int:
        return self.properties.get("volblocksize", 0) or linux.physical_block_size(handle.fd)

    def _capabilities(self, handle: Handle) -> Capabilities:
        return Capabilities(
            writable=self.writable,
            unmap=self.writable,
            unmap_granularity=self._physical_block_size(handle),
            unmap_reads_zero=True,
        )

    def unmap(self, offset: int, length: int) -> None:
        self._by_pieces(linux.discard, offset, length, self.capabilities.unmap_granularity)

    def space(self) -> Space:
        """From ``zfs get used,available``, asked anew."""
        self._usable()
        properties = self._ask_zfs()
        if "used" not in properties:
            return super().space()
        self.properties = properties
        return Space(used=properties["used"], available=properties.get("available", 0))


def _wait_for(node: str) -> None:
    deadline = time.monotonic() + APPEAR_TIMEOUT_S
    while not Path(node).exists():
        if time.monotonic() >= deadline:
            raise OSError(errno.ENOENT, "the volume exists, but its device node does not appear", node)
        time.sleep(_POLL_S)
