"""What a logical unit is given: configuration, workers, reservations, keeper. No behaviour."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from protocol.scsi.commands import Command
from protocol.scsi.request import Nexus, Request
from protocol.scsi.sense import Sense

__all__ = ["Keep", "Lane", "Reservations", "Reset", "UnitConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitConfig:
    """What an operator decides about a logical unit."""

    name: str
    """For the log."""
    serial: str
    naa: str
    """``0x`` and 16 or 32 hexadecimal digits."""
    vendor: str = "TARGETD"
    product: str = "iSCSI Disk"
    revision: str = "0123"
    eui64: bytes = b""
    """8, 12 or 16 bytes, or none."""
    block_size: int = 512
    """Logical block, bytes."""
    physical_block_exponent: int = 3
    """log2 of logical blocks per physical block; 0 = not reported."""
    read_only: bool = False
    rotation_rate: int = 1
    """MEDIUM ROTATION RATE (SBC-3 §6.6.2): 0 not reported, 1 non-rotating, else rpm."""
    removable: bool = False
    thin: bool = True
    """Report logical block provisioning where the backend can ``unmap``."""
    write_cache: bool = True
    """Default of WCE."""
    xen: bool = False
    """Do not pad the T10 vendor identification with blanks."""
    insecure_tpc: bool = True
    """Third-party copy may reach the unit from another target, if the initiator that asks for it may be there
    (``copymanager``); else from its own target alone."""
    threshold: int | None = None
    """Percent of the medium's space: when no more is left, the soft threshold attention is raised."""


class Lane(Protocol):
    """Workers of one medium, bounded, so that a stuck medium holds no other."""

    def run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Call ``work`` on a worker thread, then ``done`` with its result on the event loop."""

    @property
    def long(self) -> "Lane":
        """Workers for what takes long, so that it leaves room for what does not."""

    @property
    def flushes(self) -> "Lane":
        """A worker for flushes, one at a time: each covers all that was written before it began."""


class Reservations(Protocol):
    """Reservations of one unit, as dispatch sees them."""

    held: bool
    """Some command of somebody might conflict; kept up to date, since every command looks at it."""

    def check(self, request: Request, command: Command) -> None:
        """Raises ``ReservationConflict`` when the nexus may not do this now."""

    def reset(self) -> None:
        """A hard or logical unit reset: RESERVE(6/10) ends; persistent reservations stay."""

    def nexus_lost(self, nexus: Nexus) -> None:
        """The nexus is gone: its RESERVE(6/10) ends; persistent reservations stay."""


Keep = Callable[[str, bytes, Callable[[Exception | None], None]], None]
"""Stores a value that must outlive the daemon: (what, value, done); ``done`` is called on the event
loop when it is durable, or with the error."""


class Reset(Enum):
    """Kinds of reset, and the unit attention each leaves behind (SAM-5 §6.3, SPC-4 table 61)."""

    LOGICAL_UNIT = Sense.BUS_DEVICE_RESET
    TARGET_WARM = Sense.SCSI_BUS_RESET
    TARGET_COLD = Sense.POWER_ON_OCCURRED
