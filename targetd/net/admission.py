"""How many connections this process takes, and the doorkeeper that sees to it.

A portal is open to everyone who can reach it, so what a peer costs before it has proven itself must be
small, and what all of them cost together must leave the initiators that are at work alone. Who comes when
a limit is reached takes the place of one that has nothing to lose: a login under way for longer than any
login takes, or a discovery session; the oldest of the same address, or of the address that has the most. If
there is none, the newcomer is accepted and closed at once: an initiator sees that and tries again, where one
left in the listen queue would wait for its own time limit. A session with a target is never put out.

What a connection or a session itself may hold is in ``protocol.limits``, all of it, and how many sessions one
address or initiator may have in ``protocol.session``.
"""

import ipaddress
import logging
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Admission", "ConnectionLimiter", "Limits", "neighbourhood"]

log = logging.getLogger("targetd.limits")

LOG_EVERY_S = 5.0
"""Refusals for one reason are told once in so long, with their number: a flood must not become one of log
lines as well."""


PATIENCE_S = 2.0
"""How long a connection keeps its place in any case. A login takes milliseconds: who is slower by then makes
room, and a crowd that comes at once does not push itself out."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be."""

    connections: int = 4096
    """In all. Ten times the largest iscsi_maxsesh in use with a few paths each; some 10 KiB apiece idle."""
    connections_per_address: int = 1024
    """An initiator host has one a path and target; a gateway or hypervisor with hundreds of LUNs has the
    most, and stays below. Four addresses are needed to take all."""
    half_open: int = 1024
    """Logins under way, in all. One takes milliseconds and may keep 64 KiB of text at worst
    (``LoginLimits.bytes``): 64 MiB. A crowd that starts at once after a power cut fits."""
    half_open_per_address: int = 256
    """Logins under way from one address: a host that starts logs in to all its targets at once."""
    descriptors_kept: int = 128
    """Descriptors that connections never take: media, the store, the API and its clients."""

    def within(self, descriptors: int) -> "Limits":
        """These limits, for a process that may have so many descriptors."""
        room = max(descriptors - self.descriptors_kept, descriptors // 2, 1)
        return Limits(
            min(self.connections, room),
            min(self.connections_per_address, room),
            min(self.half_open, max(room // 2, 1)),
            min(self.half_open_per_address, max(room // 4, 1)),
            self.descriptors_kept,
        )

    @staticmethod
    def here() -> "Limits":
        """For this process, by its RLIMIT_NOFILE now."""
        return Limits().within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def neighbourhood(address: str) -> str:
    """Whom an address counts for: itself, or the /64 it is in (RFC 4291 §2.5.4: one host has all of it)."""
    if ":" not in address:
        return address
    network = ipaddress.IPv6Address(address.partition("%")[0]).packed[:8]
    return f"{ipaddress.IPv6Address(network + bytes(8))}/64"


class Admission:
    """One connection as the doorkeeper knows it."""

    __slots__ = ("address", "evict", "half_open", "since")

    def __init__(self, address: str, since: float = 0.0) -> None:
        self.address = address
        self.since = since
        self.half_open = True
        self.evict: Callable[[], None] | None = None
        """Closes it, to make room. None: it is not ours to close."""


class ConnectionLimiter:
    """Counts who is there, and says who may not come in."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.connections = 0
        self.half_open = 0
        self.refused: Counter[str] = Counter()
        """Reason → how many were refused for it since the start."""
        self.telling = ""
        """The reason of the last refusal, if it is one of those that are told; else empty."""
        self._by_address: Counter[str] = Counter()
        self._half_open: _Waiting = {}
        self._spare: _Waiting = {}
        """Discovery sessions."""
        self._told: dict[str, tuple[float, int]] = {}
        """Reason → when it was told last, and ``refused`` then."""

    def enter(self, address: str, now: float) -> Admission | None:
        """A peer is at the door; None: it is to be closed at once."""
        address = neighbourhood(address)
        objection = self._objection(address)
        if objection is not None:
            reason, crowded, alone = objection
            if not self._make_room(crowded, address if alone else "", now) or self._objection(address):
                self._refuse(reason, address, now)
                return None
        self.connections += 1
        self.half_open += 1
        self._by_address[address] += 1
        visitor = Admission(address, now)
        self._half_open.setdefault(address, {})[visitor] = None
        return visitor

    def _objection(self, address: str) -> "tuple[str, tuple[_Waiting, ...], bool] | None":
        """Why nobody more can come in; among whom one may be put out; whether of this address only."""
        limits = self.limits
        anyone = (self._half_open, self._spare)
        if self.connections >= limits.connections:
            return f"{limits.connections} connections are open", anyone, False
        if self._by_address[address] >= limits.connections_per_address:
            return f"{limits.connections_per_address} connections of one address are open", anyone, True
        if self.half_open >= limits.half_open:
            return f"{limits.half_open} logins are under way", (self._half_open,), False
        if len(self._half_open.get(address, ())) >= limits.half_open_per_address:
            reason = f"{limits.half_open_per_address} logins of one address are under way"
            return reason, (self._half_open,), True
        return None

    def _make_room(self, crowded: "tuple[_Waiting, ...]", address: str, now: float) -> bool:
        """Put one out; of this address, if one is given."""
        for waiting in crowded:
            most = address or max(waiting, key=lambda each: len(waiting[each]), default="")
            victim = next(
                (
                    visitor
                    for visitor in waiting.get(most, ())
                    if visitor.evict is not None and now - visitor.since >= PATIENCE_S
                ),
                None,
            )
            if victim is not None and victim.evict is not None:
                victim.evict()
                return True
        return False

    def _refuse(self, reason: str, address: str, now: float) -> None:
        self._forget_nobody(address)
        self.refused[reason] += 1
        self.telling = ""
        at, count = self._told.get(reason, (-LOG_EVERY_S, 0))
        if now - at >= LOG_EVERY_S:
            self._told[reason] = (now, self.refused[reason])
            more = self.refused[reason] - count - 1
            self.telling = reason + (f" ({more} before it)" if more else "")
            log.warning("%s is not let in: %s", address, self.telling)

    def logged_in(self, visitor: Admission) -> None:
        """Its login is over, well."""
        if visitor.half_open:
            visitor.half_open = False
            self.half_open -= 1
            _forget(self._half_open, visitor)

    def is_spare(self, visitor: Admission) -> None:
        """It has a discovery session, which can be had again at any time."""
        self._spare.setdefault(visitor.address, {})[visitor] = None

    def leave(self, visitor: Admission) -> None:
        """It is gone. Once."""
        self.logged_in(visitor)
        _forget(self._spare, visitor)
        self.connections -= 1
        self._by_address[visitor.address] -= 1
        self._forget_nobody(visitor.address)

    def _forget_nobody(self, address: str) -> None:
        """An address without connections costs no memory: there are 2^128 of them."""
        if not self._by_address[address]:
            del self._by_address[address]


_Waiting = dict[str, dict[Admission, None]]
"""Address → its connections of one kind, the oldest first."""


def _forget(waiting: _Waiting, visitor: Admission) -> None:
    of_address = waiting.get(visitor.address)
    if of_address is not None:
        of_address.pop(visitor, None)
        if not of_address:
            del waiting[visitor.address]
