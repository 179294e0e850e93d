"""What every third-party copy has in common: whom it may name, how it copies, what it leaves to ask about.

Commands of a copy are decoded on the event loop, where the units and the sessions may be looked at; the copy
itself runs on a worker of the commanded unit and touches backends only. A copy reaches the logical units of
the target that its session is logged in to, and is held to the reservations and write protection there as if
the same nexus read and wrote by itself.

It reaches units of other targets too, for hosts that have a target for each LUN (VMware, CSI), if their
initiator has a session there, or would be let in there with what it has proven here; and if both extents
allow it (``UnitConfig.insecure_tpc``). There the nexus counts that it has, or would have, with that target.
Which those are the owner of the targets says (``Target.beyond``): the targets of one process, since a copy
is made by one process.

Source: SPC-4 r37 §5.17, §6.4 to 6.6, §6.18, §6.19, §6.23.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from protocol.enums import ScsiStatus
from protocol.scsi.commands import Access, Command, Needs
from protocol.scsi.request import GOOD, Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense, from_os_error
from protocol.scsi.taskset import Throttle
from storage.base import Backend

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "MAXIMUM_RESULTS",
    "Copy",
    "Result",
    "Results",
    "results_of",
    "run",
    "throttles_of",
    "visible_units",
]

log = logging.getLogger(__name__)

MAXIMUM_RESULTS = 64
"""Ended copies that one unit remembers for RECEIVE COPY RESULTS; the oldest are forgotten."""

CHUNK_BYTES = 16 * 2**20
"""Copied between two looks for an abort. Large, since where blocks are shared a piece costs nothing."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A unit that a copy may name."""

    unit: "LogicalUnit"
    nexus: Nexus
    """Whose rights count there."""
    foreign: bool = False
    """It is one of another target."""

    @property
    def durable(self) -> bool:
        """What is written there must be on the medium before the copy has ended: WCE is off, or there is no
        session to which a later loss could be told."""
        return not self.unit.write_cache or self.nexus not in self.unit.nexuses


def reachable(unit: "LogicalUnit", nexus: Nexus, naa: str) -> Iterator[Reach]:
    """The units with an NAA (``UnitConfig.naa``) that a copy may name here, its own target's first."""
    for other in visible_units(unit, nexus):
        if other.config.naa.lower() == naa.lower():
            yield Reach(other, nexus)
    target = unit.nexuses.get(nexus)
    if target is not None:
        for other, there in target.beyond(nexus, naa):
            yield Reach(other, there, foreign=True)


def may_copy(source: Reach, destination: Reach) -> bool:
    """Between targets both extents must allow it."""
    allowed = source.unit.config.insecure_tpc and destination.unit.config.insecure_tpc
    return allowed or not (source.foreign or destination.foreign)


def visible_units(unit: "LogicalUnit", nexus: Nexus) -> "list[LogicalUnit]":
    """The logical units that this nexus sees: those of its target, and the one it speaks to."""
    target = unit.nexuses.get(nexus)
    others = [other for other in target.luns.values() if other is not unit] if target is not None else []
    return [unit, *others]


def _nobody(unit: "LogicalUnit", request: Request) -> Outcome:
    raise NotImplementedError  # these rows are only ever asked for their access


_READS = Command(0x88, "copy source", _nobody, bytes(16), access=Access.READ)
_WRITES = Command(0x8A, "copy destination", _nobody, bytes(16), access=Access.WRITE)


@dataclass(frozen=True, slots=True)
class Copy:
    """One range to copy. ``source`` None: zeros. Bytes."""

    source: Backend | None
    source_offset: int
    reach: Reach
    """Of the destination."""
    backend: Backend
    offset: int
    length: int
    durable: bool
    """It is flushed at its end (``Reach.durable``)."""
    throttles: tuple[Throttle, ...] = ()
    """I/O limits of the source and the destination; what both share counts once."""

    def pieces(self) -> Iterable[tuple[int, int]]:
        """(Where in it, bytes) of its pieces. Within one medium source and destination may overlap: it goes
        in the direction in which nothing is overwritten that is still to be read."""
        limits = [each.piece_bytes for each in self.throttles]
        chunk = min([CHUNK_BYTES, *filter(None, limits)])
        steps: Iterable[int] = range(0, self.length, chunk)
        if self.source is self.backend and self.source_offset < self.offset:
            steps = reversed(range(0, self.length, chunk))
        return ((at, min(chunk, self.length - at)) for at in steps)


def throttles_of(*units: "LogicalUnit | None") -> tuple[Throttle, ...]:
    """The I/O limits of some units, each once."""
    found = dict.fromkeys(unit.throttle for unit in units if unit is not None)
    return tuple(throttle for throttle in found if throttle is not None)


def source_backend(reach: Reach, request: Request) -> Backend:
    """The medium to copy from; raises if the nexus could not read it now."""
    return _accessible(reach, request, _READS, Needs.READY | Needs.MEDIUM)


def destination_backend(reach: Reach, request: Request) -> Backend:
    """The medium to copy to; raises if the nexus could not write it now."""
    return _accessible(reach, request, _WRITES, Needs.READY | Needs.MEDIUM | Needs.WRITABLE)


def _accessible(reach: Reach, request: Request, row: Command, needs: Needs) -> Backend:
    unit = reach.unit
    if unit.reservations.held:
        there = request if reach.nexus is request.nexus else Request(reach.nexus, request.cdb)
        try:
            unit.reservations.check(there, row)
        finally:
            if reach.nexus not in unit.nexuses:
                unit.reservations.nexus_lost(reach.nexus)  # it is made for this copy alone
    if unit.locked is not None:
        raise unit.locked()
    backend = unit.backend
    if backend is None or not unit.loaded:
        raise CheckCondition(Sense.MEDIUM_NOT_PRESENT)
    if needs & Needs.WRITABLE and unit.write_protected:
        raise CheckCondition(Sense.WRITE_PROTECTED)
    return backend


def _copies(request: Request, todo: list[Copy], progress: Callable[[int], None]) -> bool:
    """Do them in order, on a worker; False: the command was aborted. ``progress`` hears the bytes done."""
    done = 0
    for copy in todo:
        for at, size in copy.pieces():
            if request.aborted:
                return False
            if not all(throttle.spend(size, lambda: request.aborted) for throttle in copy.throttles):
                return False
            if copy.source is None:
                copy.backend.write_zeroes(copy.offset + at, size)
            else:
                copy.backend.copy_from(copy.source, copy.source_offset + at, copy.offset + at, size)
            done += size
            progress(done)
        if copy.durable and copy.length:
            copy.backend.flush(copy.offset, copy.length)
    return True


# -- what there is to ask afterwards ------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Result:
    """A copy, under way or ended; equal to itself alone, whatever others have come to."""

    service_action: int
    outcome: Outcome | None = None
    """None: under way."""
    segments: int = 0
    """Segments or ranges processed."""
    transferred: int = 0
    """Bytes."""
    total: int = 0
    """Bytes that all of it comes to."""
    token: bytes = b""


class Results:
    """The copies that one logical unit knows of, by nexus and list identifier. On the event loop."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Nexus, int], Result] = {}
        self.under_way: list[Result] = []
        """Those at work just now, also those that nobody can ask for."""

    def begin(self, unit: "LogicalUnit", nexus: Nexus, list_identifier: int, service_action: int) -> Result:
        """A copy begins; one that is under way with the same list identifier is an error (SPC-4 §6.4.3)."""
        key = (nexus, list_identifier)
        before = self._kept.get(key)
        if before is not None and before.outcome is None:
            raise CheckCondition(Sense.LIST_IDENTIFIER_IN_USE)
        for stale in [stale for stale in self._kept if stale[0] not in unit.nexuses]:
            del self._kept[stale]
        self._kept.pop(key, None)
        while len(self._kept) >= MAXIMUM_RESULTS:
            del self._kept[next(iter(self._kept))]
        result = self._kept[key] = Result(service_action)
        return result

    def find(self, nexus: Nexus, list_identifier: int, *service_actions: int) -> Result | None:
        """The copy of that name, if it was of one of these kinds."""
        result = self._kept.get((nexus, list_identifier))
        return result if result is not None and result.service_action in service_actions else None


_results: "WeakKeyDictionary[LogicalUnit, Results]" = WeakKeyDictionary()


def results_of(unit: "LogicalUnit") -> Results:
    """The unit's memory of copies; it goes with the unit."""
    results = _results.get(unit)
    if results is None:
        results = _results[unit] = Results()
    return results


def run(
    unit: "LogicalUnit", request: Request, result: Result, todo: list[Copy], *, answer: bool = True
) -> None:
    """Copy on a worker, keep account in ``result``, and end the command with its outcome if ``answer``.

    The ranges that it changes are claimed meanwhile: a COMPARE AND WRITE, a SANITIZE there wait for it and it
    for them, and once it is aborted nothing may pass what is still at work for it.
    """

    def note(done: int) -> None:
        result.transferred = done

    def work() -> Outcome:
        try:
            return GOOD if _copies(request, todo, note) else Outcome(ScsiStatus.TASK_ABORTED)
        except CheckCondition as condition:
            return unit.check(condition)
        except ReservationConflict:
            return Outcome(ScsiStatus.RESERVATION_CONFLICT)
        except OSError as error:
            return unit.check(from_os_error(error, write=True))
        except Exception:
            log.exception("%s: a third-party copy failed by a fault of ours", unit.config.name)
            return unit.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE))

    def done(outcome: Outcome) -> None:
        under_way.remove(result)
        result.outcome = outcome
        for copy in todo:
            copy.reach.unit.note_lost_writes()
        unit.release(request)
        if answer:
            unit.complete(request, outcome)

    result.total = sum(copy.length for copy in todo)
    under_way = results_of(unit).under_way
    under_way.append(result)
    ranges = [(copy.reach.unit, copy.offset, copy.length) for copy in todo]
    for copy in todo:
        copy.reach.unit.note_written(copy.reach.nexus)
    unit.claim(request, ranges, partial(unit.lane.long.run, work, done))
