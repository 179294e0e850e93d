"""The one exception of the transport: the peer broke the protocol."""

from protocol.enums import LoginStatus, RejectReason

__all__ = ["ProtocolViolation"]


class ProtocolViolation(Exception):  # noqa: N818 - it is the peer's error, not ours
    """The peer did what RFC 7143 forbids.

    Args:
        reason: what a Reject says, or, in the login phase, the status of the Login Response.
        message: for the operator's log; never sent.
        fatal: the connection cannot go on.
    """

    def __init__(self, reason: RejectReason | LoginStatus, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.fatal = fatal
