"""The Backend interface, Geometry and Capabilities. No implementation, and nothing of SCSI.

A backend is bytes on a medium. Offsets and lengths are in bytes; callers have checked the range.
Three kinds of calls, told apart by what they may do to the thread that makes them:

* ``geometry``, ``capabilities``, ``status``, ``last_error`` and ``lost_writes`` are plain attributes.
* ``read_nowait``, ``copy_nowait``, ``write_nowait`` and ``tick`` never wait for a medium: they are for
  the event loop. They answer None / False when the work would have to wait, and then the caller takes
  the other kind.
* ``begin_read``, ``begin_write`` and ``begin_flush`` do not wait either: what they begin ends later, on the
  event loop, by a call of ``done``. A backend that has no such way answers False.
* Everything else may wait for as long as the medium likes: worker threads only.

Every failure is an ``OSError`` whose ``errno`` is the true one; what it means on the wire is decided
in ``protocol.scsi.sense``. Methods are safe to call from several threads at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["TICK_INTERVAL_S", "Backend", "Buffer", "Capabilities", "Done", "Geometry", "Rest", "Run", "Space"]

TICK_INTERVAL_S = 2.0
"""How often the daemon calls ``Backend.tick``: what is known about memory may be this old. Shorter, and
asking the kernel anew starts to show (a microsecond or two per 256 KiB in use); longer, and more replies
meet pages that memory pressure has taken meanwhile."""

Buffer = bytes | bytearray | memoryview

Rest = Callable[[], Buffer | None]
"""What is left of an operation that was begun and cannot be ended without waiting, as one that failed: to be
called on a worker. It returns what the operation has, or raises its error."""

Done = Callable[[Buffer | Rest | None], None]
"""Called on the event loop when an operation that was begun has ended, never from within ``begin_…``: with
the bytes of a read, None for a write or a flush that is done, or the rest of it."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the medium is."""

    size_bytes: int
    logical_block_size: int = 512
    """Bytes; the least the medium itself can address. A LUN's block size is a multiple of it."""
    physical_block_size: int = 4096
    """Bytes the medium writes as one."""
    rotational: bool | None = None
    """None: not known."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the medium can do. VPD pages derive from this, so we never advertise what we lack."""

    writable: bool = True
    unmap: bool = False
    """``unmap`` gives the space back to the host."""
    unmap_granularity: int = 4096
    """Bytes; smaller pieces are zeroed, not given back."""
    unmap_reads_zero: bool = True
    """Unmapped bytes read as zeros (LBPRZ)."""
    map_query: bool = False
    """``runs`` tells data from holes truthfully."""
    copy_offload: bool = False
    """``copy_from`` may share blocks or copy without passing through this process."""
    volatile: bool = False
    """Contents vanish with the daemon."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of bytes that is all data or all hole."""

    offset: int
    length: int
    mapped: bool


@dataclass(frozen=True, slots=True)
class Space:
    """Space on the medium behind the backend, bytes."""

    used: int
    """Taken by this backend."""
    available: int
    """Left for it to grow into."""
    total: int = 0
    """All there is, what others take included; 0: not known, or no others."""


class Backend(ABC):
    """One medium, open."""

    geometry: Geometry
    capabilities: Capabilities
    status: str = "ok"
    """``ok``, or what is wrong in words for the operator."""
    last_error: OSError | None = None
    """The last failure of the medium."""
    lost_writes: int = 0
    """How often the medium has said that it lost data it had taken (a write-back error). Whoever wrote
    before an increase cannot trust those writes: the next command of each such session fails once."""

    # -- never wait: for the event loop -------------------------------------------------------

    @abstractmethod
    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, when they can be had without waiting for the medium, else None.

        What is returned may be a window on mapped memory: it is borrowed until the reply has left,
        and only system calls may touch it (a fault there is EFAULT; touched from Python it is SIGBUS).
        After EFAULT, ``read`` of the same range gives the bytes or the true error.
        """

    def copy_nowait(self, offset: int, length: int) -> Buffer | None:
        """Like ``read_nowait``, in memory that Python may touch (never mapped): for digests and compares."""
        return None

    def tick(self) -> None:
        """Age what is believed about the medium. Called every ``TICK_INTERVAL_S`` from the event loop."""
        return

    @abstractmethod
    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write all of ``data`` if that needs no waiting; False: nothing was written.

        Raises:
            OSError: it was tried and failed; how much was written is not known.
        """

    # -- begin now, end later: for the event loop -----------------------------------------------

    def serve_by(self, engine: Any) -> None:
        """Use ``engine``, a ``storage.uring.Ring``, for what ``begin_…`` begins; None: there is none."""
        return

    def begin_read(self, offset: int, length: int, done: Done) -> bool:
        """Begin to read; False: take ``read``. ``done`` gets memory that Python may touch."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done, *, durable: bool = False) -> bool:
        """Begin to write all of ``data``, which stays as it is until ``done``; False: take ``write``."""
        return False

    def begin_flush(self, done: Done) -> bool:
        """Begin to flush everything that was written before; False: take ``flush``."""
        return False

    # -- may wait: worker threads only --------------------------------------------------------

    @abstractmethod
    def read(self, offset: int, length: int) -> Buffer:
        """The bytes, in memory that Python may touch (never mapped)."""

    @abstractmethod
    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of ``data``; with ``durable`` return only after the medium has it (FUA)."""

    @abstractmethod
    def flush(self, offset: int = 0, length: int = 0) -> None:
        """Return after the medium has everything written before the call; length 0 = to the end."""

    @abstractmethod
    def unmap(self, offset: int, length: int) -> None:
        """Give the range back; it reads as zeros afterwards if ``unmap_reads_zero``."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros without giving its space back."""

    @abstractmethod
    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The range as alternating runs of data and hole, in order, covering it exactly."""

    @abstractmethod
    def copy_from(self, source: "Backend", source_offset: int, offset: int, length: int) -> None:
        """Copy from another backend (or this one; ranges may overlap), offloaded where possible."""

    @abstractmethod
    def refresh(self) -> Geometry:
        """Look at the medium again: size changed, came back, went away.

        Raises:
            OSError: the medium is not there; the backend stays usable for a later ``refresh``.
        """

    @abstractmethod
    def resize(self, size_bytes: int) -> None:
        """Make the backend's exported size ``size_bytes``, growing the medium if it can grow."""

    @abstractmethod
    def space(self) -> Space:
        """What it takes and what is left."""

    @abstractmethod
    def close(self) -> None:
        """Flush nothing, release everything; borrowed buffers stay valid until dropped."""
