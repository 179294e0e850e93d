"""Unit attention conditions: a queue per nexus, in the order in which SAM-5 wants them reported.

Each condition is reported once, by the first command that reports unit attentions at all. A condition
that is pending already is not queued twice. A reset takes the place of lesser resets and is reported
before anything else (SAM-5 §5.14.4: 29h/00h, 29h/01h and 29h/02h, 29h/03h, 29h/04h, 29h/07h, others).

A deferred error (SPC-4 §4.5.7) waits in the same queue: data that a nexus wrote, and that was answered GOOD,
has been lost since. Like an attention it ends the next command that reports such things, undone and once.
"""

from protocol.scsi.request import Nexus
from protocol.scsi.sense import CheckCondition, Sense, SenseKey

__all__ = ["LIMIT", "Attentions", "condition"]

LIMIT = 16
"""Conditions kept per nexus. There are fewer kinds than that; it bounds what a silent session costs."""

_RANK = {
    Sense.POWER_ON_RESET: 0,
    Sense.POWER_ON_OCCURRED: 1,
    Sense.SCSI_BUS_RESET: 1,
    Sense.BUS_DEVICE_RESET: 2,
    Sense.DEVICE_INTERNAL_RESET: 3,
    Sense.I_T_NEXUS_LOSS: 4,
}
_OTHER = 5


def condition(sense: Sense) -> CheckCondition:
    """How something out of the queue is reported: whatever is no unit attention is an error of the past."""
    return CheckCondition(sense, deferred=sense.key != SenseKey.UNIT_ATTENTION)


class Attentions:
    """The pending unit attentions of one unit."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending: dict[Nexus, list[Sense]] = {}
        """Only nexuses that have one: while it is empty nobody needs to look further."""

    def add(self, nexus: Nexus, sense: Sense) -> None:
        """Queue ``sense`` for ``nexus``."""
        queue = self.pending.setdefault(nexus, [])
        rank = _RANK.get(sense, _OTHER)
        if rank == _OTHER:
            if sense not in queue and len(queue) < LIMIT:
                queue.append(sense)
        elif not queue or _RANK.get(queue[0], _OTHER) == _OTHER:
            queue.insert(0, sense)
        elif rank <= _RANK[queue[0]]:
            queue[0] = sense

    def take(self, nexus: Nexus) -> Sense | None:
        """The next one to report, which is then no longer pending."""
        queue = self.pending.get(nexus)
        if queue is None:
            return None
        sense = queue.pop(0)
        if not queue:
            del self.pending[nexus]
        return sense

    def clear(self, nexus: Nexus, sense: Sense) -> None:
        """Forget one condition, reported by other means."""
        queue = self.pending.get(nexus)
        if queue is not None and sense in queue:
            queue.remove(sense)
            if not queue:
                del self.pending[nexus]

    def forget(self, nexus: Nexus) -> None:
        """The nexus is gone."""
        self.pending.pop(nexus, None)
