"""How many connections the API takes, from one address and in all, and who makes room for a newcomer.

The port is open to everyone who can reach it, on loopback to every user of the machine, and a connection
costs a descriptor before it has said a word. Who comes when there is no room takes the place of one that is
idle: first of one that has never sent a whole request, the oldest; then of one that waits for its next; of
the same address if that has its share, else of the address that has the most. One whose request is being
carried out, an event stream among them, is never put out. If there is nobody to put out, the newcomer is
closed.
"""

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Guest", "GuestList", "Limits"]

log = logging.getLogger("api.limits")

LOG_EVERY_S: Final = 5.0
MOST: Final = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be."""

    connections: int = MOST
    """In all: consoles, drivers of a cluster's nodes, event streams."""
    of_one: int = 256
    """Of one address: a proxy in front of the API has one."""

    @staticmethod
    def here() -> "Limits":
        """For this process, by its RLIMIT_NOFILE now: an eighth, as disks and initiators come first."""
        connections = max(16, min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        return Limits(connections, connections // 2)


class Guest:
    """One connection."""

    __slots__ = ("address", "busy", "evict", "served")

    def __init__(self, address: str, evict: Callable[[], None]) -> None:
        self.address = address
        self.evict = evict
        self.busy: Callable[[], bool] = lambda: False
        """Whether a request of it is being carried out."""
        self.served = False
        """It has sent a whole request."""


class GuestList:
    """Who is there; the oldest first."""

    def __init__(self, limits: Limits | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits.here()
        self.refused = 0
        self._guests: dict[Guest, None] = {}
        self._of: Counter[str] = Counter()
        self._now = now
        self._told = -LOG_EVERY_S

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, guest: Guest) -> bool:
        """Let it in, if need be in the place of another; False: it is to be closed at once."""
        alone = self._of[guest.address] >= self.limits.of_one
        if alone or len(self._guests) >= self.limits.connections:
            most = guest.address if alone else max(self._of, key=lambda each: self._of[each])
            if not self._make_room(most):
                self._refuse(guest.address)
                return False
        self._guests[guest] = None
        self._of[guest.address] += 1
        return True

    def _make_room(self, address: str) -> bool:
        idle = [guest for guest in self._guests if guest.address == address and not guest.busy()]
        victim = next((guest for guest in idle if not guest.served), idle[0] if idle else None)
        if victim is None:
            return False
        self.leave(victim)
        victim.evict()
        return True

    def leave(self, guest: Guest) -> None:
        """It is gone; may be said more than once."""
        if guest in self._guests:
            del self._guests[guest]
            self._of[guest.address] -= 1
            if not self._of[guest.address]:
                del self._of[guest.address]

    def _refuse(self, address: str) -> None:
        if not self._of[address]:
            del self._of[address]
        self.refused += 1
        now = self._now()
        if now - self._told >= LOG_EVERY_S:
            self._told = now
            log.warning(
                "%s is not let in: the API has %d connections that are all at work; %d were refused by now",
                *(address, len(self._guests), self.refused),
            )
