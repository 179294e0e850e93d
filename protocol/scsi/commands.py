"""What a row of the command table says. The rows themselves are in ``table.py``.

A SCSI command is one ``Command``: its CDB usage data, what it needs of the unit, where its body may
run, and the functions that decode and do it. Dispatch, CDB validation, reservation conflicts, task
ordering, REPORT SUPPORTED OPERATION CODES and the tests all read the same rows.

The modules with the bodies import this one and never ``table.py``, which imports all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import TYPE_CHECKING

from protocol.scsi.request import Outcome, Request
from storage.base import Done

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "Access",
    "Begin",
    "Body",
    "Command",
    "Data",
    "Needs",
    "Prepare",
    "Row",
    "Runs",
    "service_action_field",
]

Body = Callable[["LogicalUnit", Request], Outcome | None]
"""Does a command. An INLINE body may answer None: its outcome comes later by ``LogicalUnit.complete``."""
Prepare = Callable[["LogicalUnit", Request], None]
"""Decodes a CDB when the header arrives: sets ``transfer_length``, ``offset`` and ``length`` of the
request; raises ``CheckCondition``. ``offset`` and ``length`` cover all of the medium that the command may
touch: the whole of it when only the parameter list will tell."""
Begin = Callable[["LogicalUnit", Request, Done], bool]
"""Begins a command on the event loop, for its medium to end (``Backend.begin_read``); False: a worker's."""
After = Callable[["LogicalUnit", Request, Outcome], None]
"""Runs on the event loop when the body has ended well or badly, before the outcome is delivered."""


LONG_BYTES = 2 * 2**20
"""More than initiators read or write at once (Linux 1280 KiB), less than a slow disk does in 100 ms."""


class Data(Enum):
    """Which way the parameter or user data goes."""

    NONE = "none"
    IN = "in"
    OUT = "out"


class Needs(IntFlag):
    """What the unit must be for the command to be let in."""

    NOTHING = 0
    READY = 1
    """No operation is in progress that locks the unit (SANITIZE)."""
    MEDIUM = 2
    """There is a medium, loaded."""
    WRITABLE = 4
    """The medium may be changed: neither a read-only LUN nor SWP."""
    LBA_RANGE = 8
    """``prepare`` decodes a range of blocks: ``offset`` and ``length`` of the request are user data."""


class Runs(Enum):
    """Where the body runs."""

    INLINE = "inline"
    """On the event loop: it never touches the medium."""
    NOWAIT = "nowait"
    """``nowait`` on the event loop first; when that says None, ``begin``, where there is one, and where that
    says False, ``body`` on a worker."""
    WORKER = "worker"
    """On a worker: it may wait. It touches the backend and its request, nothing else of the unit."""


class Access(Enum):
    """How a command fares against reservations (SPC-4 table 54, SBC-3 table 13; SPC-2 table 9)."""

    READ = "read"
    """Reads the medium: conflicts with an exclusive access reservation of another."""
    WRITE = "write"
    """Changes the medium or the unit: conflicts with write exclusive too."""
    ALLOWED = "allowed"
    """Allowed under any persistent reservation; a RESERVE(6/10) of another conflicts."""
    EXEMPT = "exempt"
    """Allowed under any reservation: INQUIRY, REPORT LUNS, REQUEST SENSE, RELEASE and the like."""
    PERSISTENT_IN = "persistent in"
    PERSISTENT_OUT = "persistent out"
    RESERVE = "reserve"
    """RESERVE(6/10): conflicts with any registration (SPC-4 §5.13.3) and another's RESERVE."""
    RELEASE = "release"
    PREVENT = "prevent"
    """PREVENT ALLOW MEDIUM REMOVAL: with PREVENT 0 it is allowed, else it conflicts."""
    START_STOP = "start stop"
    """START STOP UNIT: START with POWER CONDITION 0 and LOEJ 0 is allowed, else it conflicts."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: an opcode, or an opcode with a service action."""

    opcode: int
    name: str
    body: Body
    usage: bytes
    """CDB usage data (SPC-4 §6.35.3): byte 0 the opcode, then a mask of the bits that are evaluated;
    the service action's bits hold its value. Its length is the CDB's."""
    service_action: int | None = None
    data: Data = Data.NONE
    needs: Needs = Needs.NOTHING
    runs: Runs = Runs.INLINE
    nowait: Body | None = None
    begin: Begin | None = None
    """Tried after ``nowait`` and before a worker."""
    access: Access = Access.ALLOWED
    prepare: Prepare | None = None
    after: After | None = None
    long_bytes: int = LONG_BYTES
    """A range of more than this takes long: it goes to the lane's workers for such work."""
    flushes: bool = False
    """The body is a flush of the medium: those that wait at the same time share one."""
    moves: int = 1
    """How often the medium moves the range, as I/O limits count it; 0: the body takes its shares piece by
    piece (``block.paced``), and no more than a command is counted when it starts."""
    limited: bool = False
    """Counts against I/O limits though it moves no data between initiator and medium."""
    exclusive: bool = False
    """Nothing else may touch its range while it runs."""
    offered: Callable[["LogicalUnit"], bool] | None = None
    """Does this unit have the command? None: always. Asked when the unit is made or reconfigured."""
    timeout_s: int = 30
    """Nominal and recommended time-out of REPORT SUPPORTED OPERATION CODES, seconds."""

    # Derived once, since the hot path reads them.
    length: int = field(init=False)
    """Bytes of the CDB."""
    reserved: int = field(init=False)
    """The bits of the CDB, as one big-endian integer, that must be zero."""
    required: int = field(init=False)
    """``needs`` as a plain integer: ``IntFlag`` arithmetic takes a microsecond."""
    inline: bool = field(init=False)
    reads: bool = field(init=False)
    """Moves user data from the medium: counted as such."""
    writes: bool = field(init=False)
    """Moves user data to the medium."""
    takes_parameters: bool = field(init=False)
    """Data-Out that is no user data: a parameter list."""
    counted: bool = field(init=False)
    """I/O limits count it."""
    changes: bool = field(init=False)
    """May change the medium: when aborted it may still land, so nobody may pass it."""

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen to everyone else
        mask = bytearray(self.usage)
        mask[0] = 0xFF
        if self.service_action is not None:
            at, bits = service_action_field(self.opcode)
            mask[at] |= bits
            if at == 8:
                mask[9] = 0xFF
        length = len(mask)
        put(self, "length", length)
        put(self, "reserved", ~int.from_bytes(mask, "big") & ((1 << 8 * length) - 1))
        put(self, "required", int(self.needs))
        put(self, "inline", self.runs is Runs.INLINE)
        ranged = bool(self.needs & Needs.LBA_RANGE)
        put(self, "reads", ranged and self.data is Data.IN)
        changes = bool(self.needs & Needs.WRITABLE)
        put(self, "takes_parameters", not ranged and self.data is Data.OUT)
        put(self, "writes", ranged and self.data is Data.OUT and changes)
        put(self, "changes", changes)
        put(self, "counted", self.reads or self.writes or self.limited)


def service_action_field(opcode: int) -> tuple[int, int]:
    """Where a CDB of ``opcode`` has its SERVICE ACTION: (byte, mask); 7Fh has two bytes from byte 8."""
    return (8, 0xFF) if opcode == 0x7F else (1, 0x1F)


Row = Command | dict[int, Command] | None
"""What is at an opcode: a command, commands by service action, or nothing."""
