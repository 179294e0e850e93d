"""A logical unit over real memory, and an initiator that speaks to it directly."""

from collections.abc import Callable, Mapping
from typing import Self

from protocol.enums import ScsiStatus, TaskAttribute
from protocol.scsi.device import LogicalUnit, Target, UnitConfig
from protocol.scsi.request import Buffer, Nexus, Outcome, Request
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import Sense
from storage.base import Backend
from storage.memory import Memory

BLOCK = 512
BLOCKS = 4096
TARGET = "iqn.2011-03.org.example.istgt:disk"


class _OneLane:
    """Long work and flushes go where all other work goes."""

    @property
    def long(self) -> Self:
        return self

    @property
    def flushes(self) -> Self:
        return self


class SynchronousLane(_OneLane):
    """Work is done, and answered, before ``run`` returns."""

    def run(self, work: Callable[[], Outcome], done: Callable[[Outcome], None]) -> None:
        done(work())


class HeldLane(_OneLane):
    """Work waits until the test says so, as on a medium that is stuck."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Outcome], Callable[[Outcome], None]]] = []

    def run(self, work: Callable[[], Outcome], done: Callable[[Outcome], None]) -> None:
        self.jobs.append((work, done))

    def release(self, count: int | None = None) -> None:
        """Finish the oldest ``count`` jobs, or all there are now."""
        jobs, self.jobs = self.jobs[:count], self.jobs[count:] if count is not None else []
        for work, done in jobs:
            done(work())


class Keeper:
    """Stores in a dict; fails when told to."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.error: Exception | None = None

    def __call__(self, what: str, value: bytes, done: Callable[[Exception | None], None]) -> None:
        if self.error is None:
            self.values[what] = value
        done(self.error)


def make_nexus(number: int = 1, target: str = TARGET, group: int = 1) -> Nexus:
    return Nexus(f"iqn.2003-01.org.example:host{number}", bytes(5) + bytes([number]), target, group)


def make_config(**changes: object) -> UnitConfig:
    settings: dict[str, object] = {
        "name": "disk",
        "serial": "10000001",
        "naa": "0x6589cfc000000a1b2c3d4e5f60718293",
        "block_size": BLOCK,
    }
    return UnitConfig(**(settings | changes))  # type: ignore[arg-type]


class Disk:
    """One unit, with a log of what it delivered and aborted."""

    def __init__(
        self,
        *,
        backend: Backend | str | None = "memory",
        lane: object = None,
        keep: object = None,
        kept: Mapping[str, bytes] | None = None,
        attach: bool = True,
        **config: object,
    ) -> None:
        self.lane = lane or SynchronousLane()
        self.backend = Memory(BLOCKS * BLOCK) if backend == "memory" else backend
        self.unit = LogicalUnit(
            make_config(**config),
            self.backend,  # type: ignore[arg-type]
            self.lane,  # type: ignore[arg-type]
            reservations=Reservations(),
            now=lambda: 1_700_000_000.5,
            keep=keep,  # type: ignore[arg-type]
            kept=kept,
        )
        self.delivered: dict[Request, Outcome] = {}
        self.ended: list[Request] = []
        self.unit.deliver = self.delivered.__setitem__
        self.unit.aborted = self.ended.append
        self.nexus = make_nexus()
        if attach:
            self.target = Target(TARGET, {0: self.unit}, lane=self.lane, now=self.unit.now)  # type: ignore[arg-type]
            self.login(self.nexus)

    def login(self, nexus: Nexus) -> None:
        """Attach a nexus and take note of its power-on attention."""
        self.target.attach(nexus)
        while self.unit.attentions.take(nexus):
            pass

    def request(
        self,
        cdb: str | bytes,
        data: Buffer = b"",
        *,
        nexus: Nexus | None = None,
        attribute: int = TaskAttribute.SIMPLE,
        expected_in: int = 1 << 20,
        expected_out: int | None = None,
    ) -> Request:
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        return Request(
            nexus or self.nexus,
            raw.ljust(16, b"\0"),
            data_out=data,
            expected_in=expected_in,
            expected_out=len(data) if expected_out is None else expected_out,
            attribute=attribute,
        )

    def start(self, cdb: str | bytes, data: Buffer = b"", **more: object) -> Request:
        """Admit and submit; the outcome, when there is one, is in ``delivered``."""
        request = self.request(cdb, data, **more)  # type: ignore[arg-type]
        outcome = self.unit.admit(request)
        if outcome is None:
            outcome = self.unit.submit(request)
        if outcome is not None:
            self.delivered[request] = outcome
        return request

    def run(self, cdb: str | bytes, data: Buffer = b"", **more: object) -> Outcome:
        """Do it and answer its outcome."""
        return self.delivered[self.start(cdb, data, **more)]

    def read(self, cdb: str | bytes, **more: object) -> bytes:
        """The Data-In of a command that must end GOOD."""
        outcome = self.run(cdb, **more)
        assert outcome.status == ScsiStatus.GOOD, describe(outcome)
        return bytes(outcome.data_in)


def sense_of(outcome: Outcome) -> tuple[int, int, int]:
    """(key, ASC, ASCQ) of either format."""
    data = outcome.sense
    if not data:
        return (0, 0, 0)
    if data[0] & 0x02:
        return (data[1] & 0x0F, data[2], data[3])
    return (data[2] & 0x0F, data[12], data[13])


def pointer_of(outcome: Outcome) -> tuple[int, int | None, bool]:
    """(byte, bit or None, in the CDB) of the field pointer of fixed format sense (SPC-4 §4.5.2.4.2)."""
    flags, byte = outcome.sense[15], int.from_bytes(outcome.sense[16:18], "big")
    assert flags & 0x80, "SKSV is clear"
    return (byte, flags & 0x07 if flags & 0x08 else None, bool(flags & 0x40))


def triple(sense: Sense) -> tuple[int, int, int]:
    return (int(sense.key), sense.asc, sense.ascq)


def describe(outcome: Outcome) -> str:
    return f"status {outcome.status:02X}h sense {sense_of(outcome)}"
