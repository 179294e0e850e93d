"""What a Connection tells its owner. A ``Task`` among the events is a command with all its data: submit it
to ``task.unit``; everything else is one of these."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from protocol.session import Session

__all__ = ["End", "EndReason", "LoggedIn", "LoggedOut", "LoginRefused"]


class EndReason(Enum):
    """Why a connection or a session ended. The values are those of ``iscsi_portal_drops_total{reason=…}``."""

    LOGOUT = "logout"
    CLOSED_BY_INITIATOR = "closed_by_initiator"
    """It closed the TCP connection without a logout."""
    NETWORK = "network"
    """The TCP connection failed."""
    PROTOCOL = "protocol"
    """The peer did what RFC 7143 forbids, or a header digest was wrong."""
    LOGIN_REFUSED = "login_refused"
    LOGIN_TIMEOUT = "login_timeout"
    PING_TIMEOUT = "ping_timeout"
    """No answer to a NOP-In."""
    IO_TIMEOUT = "io_timeout"
    """Stalled inside a PDU."""
    LOGOUT_TIMEOUT = "logout_timeout"
    """Did not log out when asked to."""
    NEGOTIATION_TIMEOUT = "negotiation_timeout"
    """Did not negotiate when asked to."""
    REINSTATEMENT = "reinstatement"
    """A new login of the same initiator port, or of the same connection, took its place."""
    RECOVERY = "recovery"
    """Removed so that another connection takes over its tasks."""
    RECOVERY_TIMEOUT = "recovery_timeout"
    """No connection came back in time."""
    TARGET_RESET = "target_reset"
    TARGET_REMOVED = "target_removed"
    TARGET_MOVED = "target_moved"
    """To another process."""
    ADMINISTRATOR = "administrator"
    STOPPED = "stopped"
    """The daemon or the service stops."""
    MEDIUM = "medium"
    """A page of an extent could not be read while its data was being sent."""
    TURNED_AWAY = "turned_away"
    """At the door: there are as many connections as may be."""
    MADE_ROOM = "made_room"
    """It was idle, or had not logged in, and somebody else came when there was no room."""


class End(str):
    """Why a connection or a session ended, in words for people; ``reason`` is for programs."""

    __slots__ = ("reason",)
    reason: EndReason

    def __new__(cls, reason: EndReason, words: str) -> Self:
        """``words``: not empty."""
        end = super().__new__(cls, words)
        end.reason = reason
        return end

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """A copy, in another process say, is the words alone."""
        return str, (str(self),)


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """Full feature phase has begun on this connection."""

    session: "Session"
    cid: int


@dataclass(frozen=True, slots=True)
class LoginRefused:
    """A login ended here."""

    initiator_name: str
    target_name: str
    status: int
    """As ``LoginStatus``."""
    reason: str
    bug: Exception | None = None
    """What nobody foresaw, to be logged with its traceback."""


@dataclass(frozen=True, slots=True)
class LoggedOut:
    """The initiator logged out; the connection closes when its answer has left."""

    session: "Session"
