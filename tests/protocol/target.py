"""A whole target in memory for protocol tests: our Connection, sessions and logical units, with no socket,
no thread and a clock that stands still until a test moves it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Self

from protocol.access import Grant, Offer, Refusal, TargetList, TargetRecord
from protocol.connection import Connection
from protocol.enums import AuthMethod, LoginStatus
from protocol.management import forget_aborted
from protocol.scsi.device import LogicalUnit, Target, UnitConfig
from protocol.scsi.request import Outcome, Request
from protocol.scsi.reservations import Reservations
from protocol.session import SessionTable
from protocol.task import Task
from storage.base import Backend
from storage.memory import Memory
from tests.initiator import Initiator, MemoryPeer, SessionState

TARGET = "iqn.2026-11.example:disk"
SIZE = 1 << 20


class WorkerThreads:
    """Work for other threads, done when a test says so, or at once."""

    def __init__(self) -> None:
        self.held: list[tuple[Callable[[], Outcome], Callable[[Outcome], None]]] = []
        self.hold = False

    @property
    def long(self) -> Self:
        """Long work and flushes go where all other work goes."""
        return self

    @property
    def flushes(self) -> Self:
        return self

    def run(self, work: Callable[[], Outcome], done: Callable[[Outcome], None]) -> None:
        if self.hold:
            self.held.append((work, done))
        else:
            done(work())

    def release(self) -> None:
        """Do what was held back."""
        held, self.held = self.held, []
        for work, done in held:
            done(work())


@dataclass
class Access:
    """An ``Authorizer`` that a test sets up by assignment."""

    target_unit: Target
    grant: Grant
    refusals: dict[str, Refusal] = field(default_factory=dict)
    """Initiator name → how its login is refused."""
    records: list[TargetRecord] = field(default_factory=list)
    wait_s: float = 0
    """How long every CHAP user has to wait."""
    answers: list[tuple[str, bool]] = field(default_factory=list)
    """(CHAP user, whether the answer was right), as they were told."""
    discovery_grant: Grant | None = None
    """Where discovery is granted otherwise than the target."""

    def discovery(self, initiator_name: str) -> Grant | Refusal:
        open_door = replace(self.grant, target_name="", target=None)
        return self.refusals.get(initiator_name) or self.discovery_grant or open_door

    def target(self, initiator_name: str, target_name: str) -> Grant | Refusal:
        if target_name != TARGET:
            return Refusal(LoginStatus.NOT_FOUND, f"no target {target_name}")
        return self.refusals.get(initiator_name) or self.grant

    def send_targets(self, initiator_name: str, target_name: str | None) -> TargetList:
        return TargetList(record for record in self.records if target_name in (None, record.name))

    def chap_wait_s(self, user: str) -> float:
        return self.wait_s

    def chap_judged(self, user: str, right: bool) -> None:
        self.answers.append((user, right))


class Endpoint:
    """One connection of the target with what an owner does for it."""

    def __init__(self, target: "MemoryTarget") -> None:
        numbers = count(1)
        self.connection = Connection(
            target.sessions,
            target.access,
            randomness=lambda n: next(numbers).to_bytes(n, "big"),
            now=target.now,
            owner=self,
        )
        self._target = target
        self.events: list[object] = []
        """All but commands, as they came."""

    def receive_data(self, view: memoryview, now: float) -> None:
        self.connection.receive_data(view, self._target.now)

    def data_to_send(self) -> list[Any]:
        return self.connection.data_to_send()

    def serve(self) -> None:
        """Carry out what has become ready, as ``targetd.net.server.Channel`` does."""
        while events := self.connection.take_events():
            for event in events:
                if isinstance(event, Task):
                    if not event.aborted and (outcome := event.unit.submit(event)) is not None:
                        self.connection.complete(event, outcome)
                else:
                    self.events.append(event)


class MemoryTarget:
    """One target with memory LUNs."""

    def __init__(self, *, luns: int = 1, size: int = SIZE, **offer: Any) -> None:
        self.now = 1000.0
        self.lane = WorkerThreads()
        self.backends: list[Backend] = [Memory(size) for _ in range(luns)]
        self.units = [self._unit(number, backend) for number, backend in enumerate(self.backends)]
        self.target = Target(TARGET, dict(enumerate(self.units)), lane=self.lane, now=lambda: self.now)
        self.sessions = SessionTable(max_sessions=8)
        self.access = Access(
            self.target,
            Grant(
                methods=AuthMethod.NONE,
                offer=Offer(**offer),
                target_portal_group_tag=1,
                target_name=TARGET,
                queue_depth=8,
                target=self.target,
            ),
            records=[TargetRecord(TARGET, (("192.0.2.1:3260", 1),))],
        )

    def _unit(self, number: int, backend: Backend) -> LogicalUnit:
        config = UnitConfig(name=f"lun{number}", serial=f"1000{number}", naa=f"0x6{number:031x}")
        unit = LogicalUnit(config, backend, self.lane, reservations=Reservations(), now=lambda: self.now)
        unit.deliver = _deliver
        unit.aborted = forget_aborted
        return unit

    def connect(
        self, *, session: SessionState | None = None, split: int | None = None, strict: bool = True
    ) -> MemoryPeer:
        """A new connection; of an existing session with its ``session``."""
        endpoint = Endpoint(self)
        initiator = Initiator(session=session, strict=strict) if session else Initiator(strict=strict)
        return MemoryPeer(endpoint, endpoint.serve, initiator=initiator, split=split)

    def logged_in(self, *, split: int | None = None, strict: bool = True, **login: Any) -> MemoryPeer:
        """A connection in full feature phase, its first unit attention taken away."""
        peer = self.connect(split=split, strict=strict)
        peer.login(TARGET, **login)
        for lun in range(len(self.units)):
            peer.command(bytes(6), lun=lun)
        return peer

    def pass_time(self, seconds: float) -> None:
        """Let the clock run and tick every connection."""
        self.now += seconds
        for session in list(self.sessions.sessions.values()):
            for connection in list(session.connections.values()):
                connection.tick(self.now)
        self.sessions.tick(self.now)


def _deliver(request: Request, outcome: Outcome) -> None:
    assert isinstance(request, Task)
    request.connection.complete(request, outcome)


def connection_of(peer: MemoryPeer) -> Connection:
    """Our end of a peer's connection."""
    endpoint = peer.target
    assert isinstance(endpoint, Endpoint)
    return endpoint.connection
