"""What is counted besides what sessions and logical units count for themselves. Plain numbers.

Latency is the one thing whose measurement costs: a look at the clock, the buckets of unit and session and
the search for them are about 1 µs, a quarter of a whole READ. So of the wake-ups that carry commands out at
once one in ``SAMPLED`` is measured, and each of its commands counts for ``SAMPLED``; the others pay for one
subtraction a wake-up. Commands that go to a worker cost tens of microseconds anyway and are all measured.
The buckets are powers of two, so that the right one is a ``bit_length`` away.
"""

from weakref import WeakKeyDictionary

from protocol.enums import LoginStatus, ScsiStatus
from protocol.events import EndReason
from protocol.scsi.commands import Command
from protocol.scsi.device import LogicalUnit
from protocol.scsi.table import ROWS
from protocol.session import Session
from targetd.interface import LATENCY_BOUNDS_S, Latency, PortalStatistics, SessionStatistics

__all__ = [
    "SAMPLED",
    "Counters",
    "LatencyCounter",
    "command_name",
    "login_status_name",
    "status_name",
]

SAMPLED = 64
"""One wake-up in so many is timed. A wake-up pays 0.04 µs for the countdown and, on average, 0.02 µs for the
timing: 0.06 µs a command at depth 1, nothing that can be measured at depth 32."""

_LONGER = len(LATENCY_BOUNDS_S)


class LatencyCounter:
    """A histogram being filled."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (_LONGER + 1)
        self.sum_s = 0.0

    def add(self, elapsed_s: float, weight: int = 1) -> None:
        """``weight`` commands took so long."""
        bucket = int(elapsed_s * 1e6).bit_length()
        self.buckets[bucket if bucket < _LONGER else _LONGER] += weight
        self.sum_s += elapsed_s * weight

    def merge(self, other: "LatencyCounter") -> None:
        """Add what another one counted."""
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]
        self.sum_s += other.sum_s

    def frozen(self) -> Latency:
        """As plain data."""
        return Latency(tuple(self.buckets), self.sum_s)


class _Portal:
    """What one portal has seen. The sums are of sessions that are over."""

    __slots__ = (
        "accepted",
        "bytes_read",
        "bytes_written",
        "commands",
        "drops",
        "latency",
        "login_failures",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.commands = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.login_failures: dict[str, int] = {}
        self.drops: dict[str, int] = {}
        self.latency = LatencyCounter()


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


class Counters:
    """The server's counters."""

    def __init__(self) -> None:
        self.portals: dict[int, _Portal] = {}
        self.units: WeakKeyDictionary[LogicalUnit, LatencyCounter] = WeakKeyDictionary()
        self.sessions: dict[Session, LatencyCounter] = {}
        self.loop_lag_s = 0.0
        self.loop_lag_longest_s = 0.0

    def portal(self, portal_id: int) -> _Portal:
        """The counters of a portal."""
        portal = self.portals.get(portal_id)
        if portal is None:
            portal = self.portals[portal_id] = _Portal()
        return portal

    def took(self, unit: LogicalUnit, session: Session | None, elapsed_s: float, weight: int = 1) -> None:
        """A command, or ``weight`` like it, took so long."""
        counter = self.units.get(unit)
        if counter is None:
            counter = self.units[unit] = LatencyCounter()
        counter.add(elapsed_s, weight)
        if session is not None and not session.ended:
            own = self.sessions.get(session)
            if own is None:
                own = self.sessions[session] = LatencyCounter()
            own.add(elapsed_s, weight)

    def refused(self, portal_id: int, status: int) -> None:
        """A login was refused."""
        _count(self.portal(portal_id).login_failures, login_status_name(status))

    def dropped(self, portal_id: int, reason: EndReason) -> None:
        """A connection ended."""
        _count(self.portal(portal_id).drops, reason.value)

    def session_ended(self, session: Session) -> None:
        """What it counted goes to its portal."""
        portal = self.portal(session.grant.target_portal_group_tag)
        portal.commands += session.commands
        portal.bytes_read += session.bytes_read
        portal.bytes_written += session.bytes_written
        latency = self.sessions.pop(session, None)
        if latency is not None:
            portal.latency.merge(latency)

    def lagged(self, lag_s: float) -> None:
        """The event loop was so late."""
        self.loop_lag_s = lag_s
        self.loop_lag_longest_s = max(lag_s, self.loop_lag_longest_s)

    def latency_of(self, unit: LogicalUnit) -> Latency:
        """Of one logical unit."""
        counter = self.units.get(unit)
        return counter.frozen() if counter is not None else Latency()

    def of_session(self, session: Session) -> SessionStatistics:
        """One open session."""
        latency = self.sessions.get(session)
        return SessionStatistics(
            id=session.id,
            initiator_name=session.initiator_name,
            target_name=session.grant.target_name,
            portal_id=session.grant.target_portal_group_tag,
            commands=session.commands,
            bytes_read=session.bytes_read,
            bytes_written=session.bytes_written,
            in_flight=len(session.tasks),
            latency=latency.frozen() if latency is not None else Latency(),
        )

    def of_portal(
        self, portal_id: int, connections: int, sessions: list[Session], addresses_absent: int = 0
    ) -> PortalStatistics:
        """One portal, with the sessions that came through it and are open."""
        portal = self.portal(portal_id)
        latency = LatencyCounter()
        latency.merge(portal.latency)
        for session in sessions:
            if session in self.sessions:
                latency.merge(self.sessions[session])
        return PortalStatistics(
            id=portal_id,
            connections_accepted=portal.accepted,
            connections=connections,
            sessions=len(sessions),
            commands=portal.commands + sum(session.commands for session in sessions),
            bytes_read=portal.bytes_read + sum(session.bytes_read for session in sessions),
            bytes_written=portal.bytes_written + sum(session.bytes_written for session in sessions),
            in_flight=sum(len(session.tasks) for session in sessions),
            login_failures=dict(portal.login_failures),
            drops=dict(portal.drops),
            latency=latency.frozen(),
            addresses_absent=addresses_absent,
        )


# -- Names, of which there are only so many ------------------------------------------------------------

UNSUPPORTED = "unsupported"
"""Every opcode that is in no row: an initiator must not be able to make names."""


def _names() -> list[str]:
    """Opcode → name; commands that differ by service action share that of their opcode."""
    by_opcode: dict[int, list[Command]] = {}
    for row in ROWS:
        by_opcode.setdefault(row.opcode, []).append(row)
    names = [UNSUPPORTED] * 256
    for opcode, rows in by_opcode.items():
        alone = len(rows) == 1 and rows[0].service_action is None
        names[opcode] = rows[0].name if alone else f"{opcode:02X}h"
    return names


_NAMES = _names()


def command_name(opcode: int) -> str:
    """``READ(10)``; ``9Eh`` where service actions share an opcode."""
    return _NAMES[opcode]


_STATUSES = {int(status): status.name.lower() for status in ScsiStatus}
_LOGIN_STATUSES = {int(status): status.name.lower() for status in LoginStatus}


def status_name(status: int) -> str:
    """``check_condition``."""
    return _STATUSES.get(status, "other")


def login_status_name(status: int) -> str:
    """``authentication_failure``."""
    return _LOGIN_STATUSES.get(status, "other")
