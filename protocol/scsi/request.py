"""What goes into a logical unit and what comes out. Knows no iSCSI.

``protocol.task.Task`` extends ``Request`` with what the transport needs, so that a command is one
object from the wire to the medium and back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.enums import ScsiStatus, TaskAttribute

if TYPE_CHECKING:
    from protocol.scsi.commands import Command

__all__ = ["GOOD", "Buffer", "Nexus", "Outcome", "Request"]

Buffer = bytes | bytearray | memoryview


class Nexus:
    """An I_T nexus (SAM-5 §4.8): one iSCSI session between an initiator port and a target port.

    Compared by identity. Persistent reservations outlive it and are keyed by ``initiator_port`` and
    ``target_port`` (SPC-4 §5.13.7 with RFC 7143 §4.4: the names carry ISID and portal group tag). The
    target's name changes where an operator renames it.
    """

    __slots__ = (
        "initiator_name", "initiator_port", "relative_target_port", "target_name", "target_port", "user",
    )  # fmt: skip

    def __init__(
        self,
        initiator_name: str,
        isid: bytes,
        target_name: str,
        target_portal_group_tag: int,
        user: str = "",
    ) -> None:
        self.initiator_name = initiator_name
        self.initiator_port = f"{initiator_name},i,0x{isid.hex()}"
        self.relative_target_port = target_portal_group_tag
        self.user = user
        """Who it has proven to be (CHAP); empty where no proof was asked for. Names are only claimed, so
        what belongs to a nexus of a user is not inherited by another's of the same name."""
        self.rename_target(target_name)

    def rename_target(self, target_name: str) -> None:
        """The target, and so its port, has another name from now on."""
        self.target_name = target_name
        self.target_port = f"{target_name},t,0x{self.relative_target_port:04x}"

    def __repr__(self) -> str:
        return f"<Nexus {self.initiator_port} {self.target_port}>"


class Request:
    """One SCSI command on its way through a logical unit.

    ``data_out`` is complete when the command runs; it is what the initiator sent, which may be less
    or more than the CDB asks for. ``command`` and ``transfer_length`` are set by ``LogicalUnit.admit``.
    """

    __slots__ = (
        "aborted",
        "attribute",
        "cdb",
        "command",
        "data_out",
        "expected_in",
        "expected_out",
        "length",
        "nexus",
        "offset",
        "touched",
        "transfer_length",
    )

    def __init__(
        self,
        nexus: Nexus,
        cdb: bytes,
        *,
        data_out: Buffer = b"",
        expected_in: int = 0,
        expected_out: int = 0,
        attribute: int = TaskAttribute.SIMPLE,
    ) -> None:
        self.nexus = nexus
        self.cdb = cdb
        """The whole CDB: at least 16 bytes, zero-padded, more with an extended CDB."""
        self.attribute = attribute
        self.data_out = data_out
        self.expected_in = expected_in
        """Bytes of Data-In the initiator has room for."""
        self.expected_out = expected_out
        """Bytes of Data-Out the initiator means to send."""
        self.touched = False
        """The transport has to look at the Data-In (a digest): it may not be a window on mapped memory."""
        self.aborted = False
        """Set by task management; a body that runs long looks at it now and then."""
        self.command: Command | None = None
        self.transfer_length = 0
        """Bytes of Data-Out that the CDB asks for (0: none); the transport fetches no more than this."""
        self.offset = 0
        """First byte of the medium that the command touches; with ``length`` set for medium commands."""
        self.length = 0

    def hold(self) -> None:
        """Make ``data_out`` outlive the call that brought it.

        A transport may pass a window on its receive buffer. Whoever parks a request or hands it to
        another thread calls this first; a command that runs at once never pays for the copy.
        """


@dataclass(slots=True)
class Outcome:
    """How a command ended. Never changed once made; not frozen, as that costs 0.27 µs per READ."""

    status: int = ScsiStatus.GOOD
    data_in: Buffer = b""
    """All the Data-In the command has for this CDB (already cut to its allocation length).

    The transport cuts it further to ``expected_in`` and reports the residual.
    """
    sense: bytes = b""


GOOD = Outcome()
"""GOOD without data; shared."""
