"""How often CHAP may be answered wrongly: so often at once, then so often in a time, for each user from each
address, and for each address over all users.

Only wrong answers count, so a host with the right secret is never slowed by its own logins, nor by what comes
from elsewhere. Who is over its measure is turned away before its answer is looked at, and learns nothing by
it; nothing sleeps or waits here for anybody. A worker process counts for its own targets.

What is kept is one number for each, the time at which all that was wrong is forgiven (as in GCRA, the cell
rate algorithm of ATM), in a table of bounded size.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from targetd.net.admission import neighbourhood

__all__ = ["GuessLimiter", "Measure"]

MAX_KEPT = 8192
"""Users from addresses that are remembered. A stranger needs 140 addresses, each at its own measure, to have
one of them forgotten that is not forgiven yet."""


@dataclass(frozen=True, slots=True)
class Measure:
    """So many at once, then one in so many seconds."""

    at_once: int
    every_s: float


OF_USER = Measure(10, 10.0)
"""A typing mistake in a host's configuration is repeated by every target and path of that host at once. 8,640
guesses a day do not find a secret that is worth the name."""
OF_ADDRESS = Measure(60, 1.0)
"""Over all users: several hosts behind one address, and names that are tried in turn."""


class GuessLimiter:
    """Counts wrong answers."""

    def __init__(self) -> None:
        self._forgiven: OrderedDict[Hashable, float] = OrderedDict()
        """(address, user), or address → when all is forgiven; the latest wrong one last."""

    def __len__(self) -> int:
        return len(self._forgiven)

    def wait_s(self, address: str, user: str, now: float) -> float:
        """Seconds until this user may try again from this address; 0: now."""
        home = neighbourhood(address)
        waits = (
            self._forgiven.get(key, now) - now - (measure.at_once - 1) * measure.every_s
            for key, measure in (((home, user), OF_USER), (home, OF_ADDRESS))
        )
        return max(0.0, *waits)

    def judged(self, address: str, user: str, right: bool, now: float) -> None:
        """An answer was right or wrong."""
        home = neighbourhood(address)
        if right:
            self._forgiven.pop((home, user), None)
            return
        for key, measure in (((home, user), OF_USER), (home, OF_ADDRESS)):
            self._forgiven[key] = max(self._forgiven.get(key, now), now) + measure.every_s
            self._forgiven.move_to_end(key)
        while len(self._forgiven) > MAX_KEPT:
            self._forgiven.popitem(last=False)
