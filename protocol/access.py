"""What the login phase asks of those who know accounts, targets and sessions. Data and Protocols only.

One ``Authorizer`` is made per connection by its owner, so it already knows the portal the connection
came in on and the address of the peer. Everything it answers is plain data taken from one snapshot of
the configuration; it never waits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from protocol.enums import AuthMethod, LoginStatus

if TYPE_CHECKING:
    from protocol.login import LoginResult

__all__ = ["Authorizer", "Credential", "Grant", "Offer", "Refusal", "SessionDirectory", "TargetRecord"]


@dataclass(frozen=True, slots=True)
class Credential:
    """One CHAP user of a grant (RFC 7143 §12.1.3)."""

    user: str
    secret: bytes = field(repr=False)
    peer_user: str = ""
    peer_secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the target brings to operational negotiation (RFC 7143 §13). Lengths in bytes, times in s."""

    max_connections: int = 1
    initial_r2t: bool = False
    immediate_data: bool = True
    first_burst_length: int = 65536
    max_burst_length: int = 262144
    max_recv_data_segment_length: int = 262144
    max_outstanding_r2t: int = 16
    default_time2wait: int = 2
    default_time2retain: int = 60
    error_recovery_level: int = 0
    header_digests: tuple[str, ...] = ("CRC32C", "None")
    """What may be chosen; the initiator's order decides among them."""
    data_digests: tuple[str, ...] = ("CRC32C", "None")
    iscsi_protocol_level: int = 2
    """RFC 7144 §7: 2 = RFC 7144 task management."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to log in, if the peer proves itself as ``methods`` asks."""

    methods: AuthMethod
    offer: Offer
    target_portal_group_tag: int
    target_name: str = ""
    """Empty for a discovery session."""
    target_alias: str = ""
    credentials: tuple[Credential, ...] = ()
    chap_algorithms: tuple[int, ...] = (8, 7, 6, 5)
    """IANA numbers the policy allows; the initiator's order decides (RFC 7143 §12.1.3)."""
    queue_depth: int = 32
    """Commands in the window: MaxCmdSN = ExpCmdSN + queue_depth - 1."""
    r2ts: int = 32
    """R2Ts that may be open on one connection, over all its writes; one is always."""
    target: object = None
    """The owner's own handle of the target; the protocol does not look inside."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A login that ends here."""

    status: LoginStatus
    reason: str
    """For the operator's log, in plain words; never sent."""
    target_address: str = ""
    """TargetAddress of a redirection, with statuses 0101h and 0102h."""


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """One target as SendTargets tells it (RFC 7143 appendix C)."""

    name: str
    addresses: tuple[tuple[str, int], ...]
    """(``host:port`` with v6 hosts in brackets, target portal group tag)."""


class TargetList:
    """Target records that are made, and written as text, when they are first asked for, and then kept."""

    __slots__ = ("_records", "_texts")

    def __init__(self, records: Iterable[TargetRecord]) -> None:
        self._records = iter(records)
        self._texts: list[bytes] = []

    def text(self, number: int) -> bytes:
        """Of the record with this number, from 0: TargetName and TargetAddress, each with its NUL; empty:
        there are not so many. They are asked for in order."""
        while number >= len(self._texts):
            record = next(self._records, None)
            if record is None:
                return b""
            lines = [f"TargetName={record.name}\0"]
            lines += [f"TargetAddress={address},{tag}\0" for address, tag in record.addresses]
            self._texts.append("".join(lines).encode())
        return self._texts[number]

    @property
    def made(self) -> int:
        """How many were made so far."""
        return len(self._texts)

    def __bool__(self) -> bool:
        return bool(self.text(0))


class Authorizer(Protocol):
    """Who may log in here. One per connection."""

    def discovery(self, initiator_name: str) -> Grant | Refusal:
        """May this initiator hold a discovery session on this portal?"""

    def target(self, initiator_name: str, target_name: str) -> Grant | Refusal:
        """May this initiator log in to this target through this portal?"""

    def send_targets(self, initiator_name: str, target_name: str | None) -> TargetList:
        """The targets this initiator may see through this portal; all, or only the one named."""

    def chap_wait_s(self, user: str) -> float:
        """Seconds until this user may answer a challenge from where this connection comes from; 0: now."""

    def chap_judged(self, user: str, right: bool) -> None:
        """A user, known or not, has answered a challenge."""


class SessionDirectory(Protocol):
    """The sessions that exist. Asked once, when a login is about to succeed."""

    def admit(self, login: "LoginResult") -> int | Refusal:
        """Make or find the session this login belongs to (RFC 7143 §6.3.1, §6.3.5).

        New session, session reinstatement, new connection or connection reinstatement follow from
        (initiator name, ISID, target portal group, TSIH, CID). Returns the TSIH, never 0.
        """
