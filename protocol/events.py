"""What a Connection tells its owner. A ``Task`` among the events is a command with all its data: submit it
to ``task.unit``; everything else is one of these."""

from dataclasses import dataclass

from protocol.session import Session

__all__ = ["LoggedIn", "LoggedOut", "LoginRefused"]


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """Full feature phase has begun on this connection."""

    session: Session
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

    session: Session
