"""The live engine: the configuration in force, made of open backends, logical units, targets and portals.

``apply`` is the only way in which anything changes (style.md, "How one REST PUT flows")::

    edit      the old configuration → the new one; whatever is wrong is said now
    prepare   everything the new one needs that the old one has not: files made, media opened, ports bound.
              On workers where it may wait; what fails undoes what was prepared, and nothing has changed
    save      one transaction of the store
    swap      plain assignment, on the event loop, that cannot fail
    drain     the rest of the old: sessions asked to log out, media closed, files deleted

Changes are serialised by a lock; each sees the result of the one before. Knows neither HTTP nor SQL.
"""

import asyncio
import errno
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from protocol.events import End, EndReason
from protocol.limits import DATA_MEMORY
from protocol.management import answer_aborted, forget_aborted
from protocol.scsi import sanitize
from protocol.scsi.device import LogicalUnit, Reset, UnitConfig
from protocol.scsi.device import Target as ScsiTarget
from protocol.scsi.registrations import State as ReservationState
from protocol.scsi.request import GOOD, Nexus, Outcome
from protocol.scsi.reservations import KEPT_AS as RESERVATIONS_KEPT_AS
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import Sense
from protocol.session import Session, SessionTable
from storage.base import TICK_INTERVAL_S, Backend
from storage.open import Created, ExtentSpec, allocate_file, clone_file, open_backend
from targetd.config import (
    WHOLE,
    Changes,
    ConfigError,
    Configuration,
    Extent,
    Portal,
    diff,
    full_name,
    groups_by_target,
    mappings_by_extent,
    mappings_by_target,
    target_named,
    validate,
)
from targetd.engine import in_use
from targetd.engine.allocation import Allocations
from targetd.engine.extents import (
    LiveExtent,
    appearance,
    check_path,
    open_extent,
    path_errors,
    spec_of,
)
from targetd.engine.io_engine import IoEngine
from targetd.engine.media import TRACE_KEPT_AS, Found, Media, OwnFiles, discard, find, place_of, taken
from targetd.engine.media_probe import Job, MediaProbe
from targetd.engine.reports import explanation, lun_statuses, session_status, unit_statistics, work_under_way
from targetd.engine.third_party import units_beyond
from targetd.engine.throttle import Throttle
from targetd.interface import (
    SANITIZE_METHODS,
    Edit,
    Event,
    Explanation,
    LoginFailure,
    LunStatus,
    ServiceState,
    SessionStatus,
    Statistics,
    Work,
)
from targetd.isns.registrar import Registrar
from targetd.luc.server import ControllerServer
from targetd.net.access import AccessSnapshot
from targetd.net.admission import neighbourhood
from targetd.net.host_addresses import HostAddresses
from targetd.net.inherited_sockets import Listeners
from targetd.net.loop import Loop
from targetd.net.portals import Bound, Portals
from targetd.net.server import Channel, Server
from targetd.persistence.interface import UNITS, Persistence, Records, StoreError
from targetd.system.gc_schedule import GcScheduler
from targetd.system.logs import bind
from targetd.system.pieces import gathered
from targetd.system.threads import Completions, WorkerThreads, run_in_thread
from targetd.volumes import VOLUMES

__all__ = ["Runtime"]

log = logging.getLogger("targetd.runtime")

LOGOUT_S = 3
"""How long initiators of a removed target or portal, or at shutdown, have to log out when asked to."""

NEGOTIATE_S = 10
"""How long an initiator that is asked to negotiate anew has until its Text Request (RFC 7143 §11.9.1)."""

LOOK_S = 2.0
"""How often a medium that is missing or has a fault is looked at."""

SURVEY_S = 10.0
"""How often one that seems well and has sessions is: for a new size, another file under the name. What its
own descriptor can tell is known earlier, by ``Backend.tick``."""

START_PATIENCE_S = 3.0
"""How long the start waits for media that do not answer before it goes on without them."""

PREPARE_PATIENCE_S = 25.0
"""How long a change waits for a medium that it opens; others wait behind it. ZFS may take 10 s to show the
device of a new volume, and as long to say what it is."""

RETIRE_PATIENCE_S = 3.0
"""How long a change waits until a medium that it removes is flushed and closed; then it goes on meanwhile."""

PAUSE_PATIENCE_S = 5.0
"""How long a snapshot waits for the writes under way."""

STILL_THERE = frozenset(
    (
        errno.EIO,
        errno.EREMOTEIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.EMFILE,
        errno.ENFILE,
        errno.ETIMEDOUT,
    )
)
"""What ``Backend.refresh`` may raise for a medium that is there and fails: its commands tell the truth each
for itself. Anything else, and it is gone."""

KEPT_FAILURES = 200
"""Refused logins that are remembered: an hour of one that tries every 20 s."""

MAX_WAITING_EVENTS = 1000
"""Events that a slow reader of the stream may be behind before it loses the oldest."""


@dataclass(slots=True)
class _Prepared:
    """What a change needs and the old configuration has not. ``undo`` gives all of it back."""

    backends: dict[int, Backend] = field(default_factory=dict)
    """Extent id → newly opened."""
    found: dict[int, tuple[Extent, Found | None]] = field(default_factory=dict)
    """Extent id → what that is."""
    made: list[Path] = field(default_factory=list)
    """Files that did not exist before."""
    portals: Bound = field(default_factory=Bound)
    replaced: set[int] = field(default_factory=set)
    """Extents whose medium becomes another one."""
    missing: dict[int, str] = field(default_factory=dict)
    """Extent id → why its medium could not be opened."""
    controller: asyncio.Server | None = None
    """The logical unit controller's new listener."""

    def undo(self) -> None:
        """On a worker."""
        if self.controller is not None:
            self.controller.get_loop().call_soon_threadsafe(self.controller.close)
        self.portals.undo()
        for backend in self.backends.values():
            backend.close()
        for path in self.made:
            path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Opened:
    """A medium that has been opened."""

    backend: Backend
    found: Found | None


@dataclass(frozen=True, slots=True)
class _Doomed:
    """The file of an extent that is to be deleted with it."""

    extent: Extent
    known: Found | None
    kept: str


class Runtime:
    """Implements ``targetd.interface.Engine``."""

    def __init__(
        self,
        store: Persistence,
        extent_roots: Sequence[Path],
        loop: Loop,
        pools: Mapping[str, Path] | None = None,
        *,
        listens: bool = True,
        sessions: SessionTable | None = None,
        listeners: Listeners | None = None,
        io_engine: str = "auto",
        data_memory: int = DATA_MEMORY,
        own_files: OwnFiles | None = None,
    ) -> None:
        """
        Args:
            extent_roots: where File extents may live.
            pools: directory pools by name.
            listens: False: another process has the portals and the logical unit controller.
            sessions: as ``Server`` takes it.
            listeners: where the sockets of portals come from.
            io_engine: how what waits for a medium is carried out.
            data_memory: bytes for the data of all connections that is under way.
            own_files: what no extent may have.
        """
        self._store = store
        self.media = Media(own_files)
        self._withheld: dict[int, tuple[Extent, Found, str]] = {}
        """Extent id → what it would have, and why it may not."""
        self.extent_roots = tuple(extent_roots)
        """Where File extents that are made or changed from now on may live."""
        self._pools = dict(pools or {})
        self._listens = listens
        self._loop = loop
        self._lock = asyncio.Lock()
        self._config = Configuration()
        self._extents: dict[int, LiveExtent] = {}
        self._behind: WeakKeyDictionary[Backend, LiveExtent] = WeakKeyDictionary()
        """Openings of media that another has replaced, while they are flushed and closed."""
        self.allocations = Allocations(lambda: self.extent_roots, self._pools, self._judge_ahead)
        self._targets: dict[int, ScsiTarget] = {}
        self._subscribers: set[asyncio.Queue[Event]] = set()
        self._housekeeping: set[asyncio.Task[None]] = set()
        self._kept = Records()
        self._next_backend_tick = 0.0
        self._next_look = self._next_survey = 0.0
        self._failures: deque[LoginFailure] = deque(maxlen=KEPT_FAILURES)
        self._stopping = False
        self._leaving: asyncio.Task[None] | None = None
        """Ends the sessions of a service that was stopped."""
        self._changes = self._changes_failed = self._events_lost = 0
        self._save_s = self._save_longest_s = 0.0
        self.server = Server(loop, lambda: self._view, self._note, self._tick, sessions=sessions)
        self.server.sessions.ended = self._session_ended
        self.portals = Portals(self.server, self.announce, listeners or Listeners())
        self._addresses = HostAddresses(loop, self.portals.changed)
        self._view = AccessSnapshot(self._config, self._targets, self.portals.absent)
        self.controller = ControllerServer(self)
        self._isns = Registrar(lambda: self.portals.absent)
        self._completions = Completions(loop, self.server.flush_stirred)
        self.server.sessions.data_memory = data_memory
        self.io_engine = IoEngine(loop, io_engine, self.server.flush_stirred)
        self._patrol = MediaProbe(loop, self._completions)
        self._spare_lane = WorkerThreads(self._completions, "absent", 1)
        self._garbage = GcScheduler(self._bytes_moved)

    @property
    def own_files(self) -> OwnFiles:
        """What no extent may have."""
        return self.media.own

    @own_files.setter
    def own_files(self, own_files: OwnFiles) -> None:
        self.media.own = own_files

    # -- the engine interface -----------------------------------------------------------------

    @property
    def configuration(self) -> Configuration:
        return self._config

    async def apply(
        self,
        edit: Edit,
        *,
        discard_files: frozenset[int] = frozenset(),
        clone_of: int | None = None,
        force: bool = False,
    ) -> Configuration:
        """See ``Engine.apply``. ``discard_files``: extents whose file is deleted once they are gone."""
        async with self.allocations.of_change() as space:
            while True:
                async with self._lock:
                    old = self._config
                    new = edit(old)
                    if new is old:
                        return old
                    validate(new, old)
                    due = space.due(old, new) if clone_of is None else []
                    if not due:
                        await self._carry_out(new, discard_files, clone_of, force)
                        self.allocations.removed(old.extents.keys() - new.extents.keys())
                        self.announce_change(old, new)
                        break
                await space.take(due, old)
        if old.service_enabled and not new.service_enabled:
            await self.stand_still()
        return new

    async def foresee(self, edit: Edit, *, force: bool = False) -> None:
        """See ``Engine.foresee``."""
        async with self._lock:
            old = self._config
            new = edit(old)
            if new is not old:
                validate(new, old)
                await self.judge_change(old, new, force)

    async def judge_change(self, old: Configuration, new: Configuration, force: bool) -> None:
        """Whether sessions and media allow a valid change; nothing is made.

        Raises:
            ConfigError: they do not.
        """
        changes = diff(old, new)
        in_use.check_block_sizes(old, new, changes, self._extents, force)
        await self._prepared(old, changes, None, force, opens=False)

    async def stand_still(self) -> None:
        """After the service was stopped: until its sessions are gone, and nothing of theirs is being written.
        Initiators that were asked to log out have their time for that."""
        leaving = self._leaving
        if leaving is not None:
            await asyncio.wait({leaving})
        deadline = self._loop.time() + LOGOUT_S
        units = [unit for live in self._extents.values() for unit in live.units.values()]
        while any(unit.writing for unit in units):
            if self._loop.time() >= deadline:
                log.error("the service has stopped, but a medium that hangs still has writes of its sessions")
                return
            await asyncio.sleep(0.05)

    async def carry_out(
        self,
        new: Configuration,
        discard_files: frozenset[int] = frozenset(),
        clone_of: int | None = None,
        force: bool = False,
    ) -> None:
        """``apply`` for one of several processes: what all of them have was validated as a whole, and is
        announced as a whole."""
        async with self._lock:
            await self._carry_out(new, discard_files, clone_of, force)

    async def _carry_out(
        self, new: Configuration, discard_files: frozenset[int], clone_of: int | None, force: bool
    ) -> None:
        old = self._config
        changes = diff(old, new)
        in_use.check_block_sizes(old, new, changes, self._extents, force)
        clone = await self._clone(clone_of, changes) if clone_of is not None else None
        prepared = await self._prepared(old, changes, clone, force)
        had = [(live.extent, self.media.of(id)) for id in prepared.found if (live := self._extents.get(id))]
        try:
            self._claim(changes, prepared)
            await self._prepare_listeners(new, prepared)
            await self._save(old, new)
        except BaseException:
            self._changes_failed += 1
            for id in prepared.found:
                self.media.forget(id)
            for extent, found in had:
                self.media.put(extent, found)
            await run_in_thread(prepared.undo)
            raise
        doomed = [
            _Doomed(old.extents[id], self.media.of(id), self._trace(id))
            for id in discard_files
            if id not in new.extents and old.extents[id].type == "File"  # never a device's node
        ]
        retired = self._swap(old, new, changes, prepared)
        await self._retired(retired, doomed)

    def _claim(self, changes: Changes, prepared: _Prepared) -> None:
        """Let nobody else take what a change is about to have; a look for a missing medium may be under way.

        Raises:
            ConfigError: somebody has taken it since it was judged.
        """
        leaving = {*prepared.found, *(changes["extents"].removed if "extents" in changes else ())}
        for extent, found in prepared.found.values():
            if found is not None and (other := self.media.rival(extent, found, leaving)) is not None:
                raise ConfigError.one("extents", "path", f"{extent.path}: {taken(other)}.", extent.id)
        for extent, found in prepared.found.values():
            self.media.put(extent, found)

    def announce_change(self, old: Configuration, new: Configuration) -> None:
        """Tell the readers of the event stream what a change did."""
        self.announce(
            "configuration",
            globals=old.globals != new.globals or old.service_enabled != new.service_enabled,
            changed={
                collection: {"written": sorted(change.written), "removed": sorted(change.removed)}
                for collection, change in diff(old, new).items()
            },
        )

    async def _save(self, old: Configuration, new: Configuration) -> None:
        began = self._loop.time()
        await self._store.save(old, new)
        elapsed_s = self._loop.time() - began
        self._changes += 1
        self._save_s += elapsed_s
        self._save_longest_s = max(elapsed_s, self._save_longest_s)

    def service_state(self) -> ServiceState:
        return ServiceState(self._config.service_enabled, bool(self.server.listeners))

    async def sessions(self) -> list[SessionStatus]:
        now = self._loop.time()
        names = {id(live): target_id for target_id, live in self._targets.items()}
        sessions = list(self.server.sessions.sessions.values())
        return await gathered(session_status(session, names, now) for session in sessions)

    async def drop(self, session_id: int, reason: str) -> bool:
        session = self.server.sessions.sessions.get(session_id)
        if session is None:
            return False
        await self._log_out([session], End(EndReason.ADMINISTRATOR, reason))
        return True

    async def negotiate(self, session_id: int) -> bool:
        session = self.server.sessions.sessions.get(session_id)
        if session is None:
            return False
        for connection in list(session.connections.values()):
            connection.now = self._loop.time()
            connection.request_negotiation(NEGOTIATE_S)
        self.server.flush_stirred()
        return True

    async def statistics(self) -> Statistics:
        counters = self.server.counters
        extents = list(self._extents.values())
        units = await gathered(unit_statistics(extents, list(self._targets.values()), counters.latency_of))
        shown = await gathered(map(counters.of_session, list(self.server.sessions.sessions.values())))
        # Portals in one go: who ends in between would be counted twice, and counters never fall.
        portals: dict[int, tuple[list[Channel], list[Session]]] = {
            portal_id: ([], []) for portal_id in self._config.portals
        }
        for channel in self.server.channels:
            portals.setdefault(channel.portal_id, ([], []))[0].append(channel)
        for session in self.server.sessions.sessions.values():
            portals.setdefault(session.grant.target_portal_group_tag, ([], []))[1].append(session)
        return Statistics(
            units=tuple(units),
            sessions=tuple(shown),
            portals=tuple(
                counters.of_portal(portal_id, len(channels), open_ones, self.portals.count_absent(portal_id))
                for portal_id, (channels, open_ones) in portals.items()
            ),
            changes=self._changes,
            changes_failed=self._changes_failed,
            save_s=self._save_s,
            save_longest_s=self._save_longest_s,
            loop_lag_s=counters.loop_lag_s,
            loop_lag_longest_s=counters.loop_lag_longest_s,
            events_lost=self._events_lost,
            io_engine=self.io_engine.name,
            io_engine_reason=self.io_engine.reason,
            io_under_way=self.io_engine.under_way,
            work=(*self.allocations.work(), *work_under_way(extents)),
        )

    async def extent_statuses(self, extent_ids: Collection[int]) -> dict[int, str]:
        return {id: self._extents[id].status if id in self._extents else "ok" for id in extent_ids}

    def portal_status(self, portal_id: int) -> str:
        portal = self._config.portals.get(portal_id)
        return self.portals.status(portal) if portal is not None else "ok"

    async def login_failures(self) -> list[LoginFailure]:
        return list(reversed(self._failures))

    async def explain(
        self, initiator_name: str, address: str, target: str = "", portal_id: int | None = None
    ) -> list[Explanation]:
        wanted = target.lower()
        origin, table = neighbourhood(address), self.server.sessions

        def one(portal_id: int, target_id: int) -> Explanation | None:
            config = self._config  # of now: a piece of the list has just been made
            portal, configured = config.portals.get(portal_id), config.targets.get(target_id)
            if portal is None or configured is None:
                return None
            name = full_name(config.globals, configured)
            if wanted and wanted not in (name, configured.name.lower()):
                return None
            return explanation(
                *(self._view, portal, configured, initiator_name, address),
                self._obstacle(portal) or table.obstacle(origin, initiator_name, name),
            )

        asked = [id for id in self._config.portals if portal_id in (None, id)]
        found = await gathered(starmap(one, product(asked, list(self._config.targets))))
        return [each for each in found if each is not None]

    def _obstacle(self, portal: Portal) -> str:
        """Why nobody can log in through a portal; empty: they can."""
        if not self._config.service_enabled:
            return "the service is stopped"
        return self.portals.obstacle(portal) if self._listens else ""

    # -- what the logical unit controller asks for --------------------------------------------

    async def luns(self, target_name: str) -> dict[int, LunStatus] | None:
        """The logical units of a target; None: there is no such target."""
        target = target_named(self._config, target_name)
        if target is None:
            return None
        return lun_statuses(self._config, target.id, self._targets[target.id])

    async def reset_lun(self, target_name: str, lun: int) -> None:
        """LOGICAL UNIT RESET, if the unit is there."""
        unit = self._lun(target_name, lun)
        if unit is not None:
            for request in unit.reset(None, Reset.LOGICAL_UNIT):
                forget_aborted(request)
            self.server.flush_stirred()

    async def load_lun(self, target_name: str, lun: int, loaded: bool) -> None:
        """Load or eject the medium, if the unit is there."""
        unit = self._lun(target_name, lun)
        if unit is not None:
            unit.load(loaded, None)
            self.server.flush_stirred()

    def _lun(self, target_name: str, lun: int) -> LogicalUnit | None:
        target = target_named(self._config, target_name)
        return self._targets[target.id].luns.get(lun) if target is not None else None

    async def events(self) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING_EVENTS)
        self._subscribers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    # -- start and end ------------------------------------------------------------------------

    async def start(self, config: Configuration, *, first: bool = False) -> None:
        """Bring up a stored configuration. A medium that is missing leaves its LUN there and not ready; an
        address that is taken is waited for, as one that the host has not yet.

        Args:
            first: nobody has been served by this configuration yet.

        Raises:
            ConfigError: it is the first, and a portal cannot be bound for another reason than that its
                address is not there yet; nothing listens then.
        """
        self._kept = Records(await self._store.items(UNITS))
        await self._bring_up(config, waits=not first)
        if self._listens:
            self._keep_running(self._addresses.open())

    async def _bring_up(self, config: Configuration, *, waits: bool = False) -> None:
        """Make this the configuration in force, its new extents opened as they were left."""
        old = self._config
        prepared = await self._open_stored(
            [extent for extent in config.extents.values() if extent.id not in old.extents]
        )
        try:
            await self._prepare_listeners(config, prepared, waits=waits)
        except BaseException:
            for id in prepared.found:
                self.media.forget(id)
            await run_in_thread(prepared.undo)
            raise
        await self._retired(self._swap(old, config, diff(old, config), prepared), [])

    # -- targets that move between processes ----------------------------------------------------

    async def hand_on(self, new: Configuration) -> dict[int, ReservationState]:
        """Let go of the targets and extents that ``new`` lacks: another process shall have them.

        Their initiators are asked to log out first, and what they still have under way is over, or has lost
        its medium, when this returns.

        Returns:
            Extent id → its persistent reservation, kept for power losses or not.
        """
        async with self._lock:
            old = self._config
            gone = [live for id, live in self._targets.items() if id not in new.targets]
            table = self.server.sessions
            leaving = [session for session in table.sessions.values() if session.target in gone]
            moved = End(EndReason.TARGET_MOVED, "target moved")
            await self._log_out(leaving, moved)
            for channel in list(self.server.channels):
                if channel.connection.session is None:  # it may be about to have a session on one of them
                    channel.drop(moved)
            lost = old.extents.keys() - new.extents.keys()
            for id in lost:
                for unit in self._extents[id].units.values():
                    sanitize.stop(unit)
            states = {id: self._extents[id].reservations.state for id in lost}
            retired = self._swap(old, new, diff(old, new), _Prepared())
            await self._retired(retired, [])
            return states

    async def take_over(
        self, new: Configuration, kept: Mapping[str, bytes], states: Mapping[int, ReservationState]
    ) -> None:
        """Bring up what another process has let go of.

        Args:
            kept: what its extents had kept in the store.
            states: as ``hand_on`` gave them.
        """
        async with self._lock:
            self._kept.update(kept)
            await self._bring_up(new)
            for id, state in states.items():
                self._extents[id].reservations.take_over(state)

    async def stop(self) -> None:
        """Stop accepting, ask initiators to log out, finish what runs, flush every extent, close."""
        self._stopping = True
        self.allocations.stop()
        self.controller.close()
        self._addresses.close()
        await self._isns.close()
        self.portals.close()
        everybody = list(self.server.sessions.sessions.values())
        await self._log_out(everybody, End(EndReason.STOPPED, "shutdown"), wait=True)
        self.server.close()
        for live in self._extents.values():
            for unit in live.units.values():
                sanitize.stop(unit)
        started = time.monotonic()
        flushes = {
            asyncio.create_task(run_in_thread(_flush_and_close, live.backend)): live.extent.name
            for live in self._extents.values()
            if live.backend is not None
        }
        if flushes:
            done, late = await asyncio.wait(flushes, timeout=5)
            failed = {task: error for task in done if (error := task.exception()) is not None}
            for task, error in failed.items():
                log.error("extent %s could not be flushed: %s", flushes[task], error)
            for task in late:
                log.error("extent %s: its medium does not answer; not flushed", flushes[task])
            log.info(
                "%d extents flushed in %.2f s%s",
                len(done) - len(failed),
                time.monotonic() - started,
                f", {len(late)} still waiting for their medium" if late else "",
            )
        self.io_engine.close()

    # -- prepare: on a worker -----------------------------------------------------------------

    def _prepare_extents(
        self, old: Configuration, changes: Changes, users: Mapping[int, str], opens: bool
    ) -> _Prepared:
        """``users``: extent id → the initiators under whom no other medium may come, nor a smaller one.
        ``opens``: do it; else it is only judged."""
        prepared = _Prepared()
        if "extents" not in changes:
            return prepared
        opened: list[tuple[Extent, Extent | None]] = []
        for extent in changes["extents"].written.values():
            assert isinstance(extent, Extent)
            before = old.extents.get(extent.id)
            if before is None or spec_of(before, self._pools) != spec_of(extent, self._pools):
                opened.append((extent, before))
        leaving = {*changes["extents"].removed, *(extent.id for extent, _ in opened)}
        try:
            for extent, before in opened:
                names = users.get(extent.id, "")
                if before is not None:
                    was, now = spec_of(before, self._pools), spec_of(extent, self._pools)
                    if in_use.is_another_medium(was, now):
                        in_use.check_medium(extent, was.kind != now.kind, names)
                        prepared.replaced.add(extent.id)
                check_path(extent, self.extent_roots, self._pools)
                self._judge_written(extent, before, leaving, prepared)
                if opens:
                    self._prepare_extent(extent, prepared, names)
                else:
                    self._foresee_extent(extent, prepared, names)
        except BaseException:
            prepared.undo()
            raise
        return prepared

    def _prepare_extent(self, extent: Extent, prepared: _Prepared, names: str) -> None:
        """Open what the extent shall be from now on. A medium that is open already may be opened again
        beside itself, with another size or protection; the old opening goes when the change is certain."""
        fresh = extent.type == "File" and not os.path.lexists(extent.path)
        backend = open_extent(extent, self._pools)
        prepared.backends[extent.id] = backend
        if fresh:
            prepared.made.append(Path(extent.path))
        with path_errors(extent):
            prepared.found[extent.id] = extent, find(spec_of(extent, self._pools))
        live = self._extents.get(extent.id)
        if live is not None and live.backend is not None:
            had, size = live.backend.geometry.size_bytes, backend.geometry.size_bytes
            in_use.check_size(had, size, names, extent.id)

    def _foresee_extent(self, extent: Extent, prepared: _Prepared, names: str) -> None:
        """As far as ``_prepare_extent`` can be foreseen."""
        spec = spec_of(extent, self._pools)
        with path_errors(extent):
            found = find(spec)
            if found is not None and not found.there:
                if not spec.create:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                # folders on the way are made
                folder = next(folder for folder in Path(spec.path).parents if folder.exists())
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, f"No file can be made in {folder}")
        prepared.found[extent.id] = extent, found
        live = self._extents.get(extent.id)
        if extent.size_bytes and live is not None and live.backend is not None:
            in_use.check_size(live.backend.geometry.size_bytes, extent.size_bytes, names, extent.id)

    def _judge_written(
        self, extent: Extent, before: Extent | None, leaving: Collection[int], prepared: _Prepared
    ) -> None:
        """Whether an extent may have what is under its path: before that is grown, or taken for another."""
        spec = spec_of(extent, self._pools)
        coming = [(other, found) for other, found in prepared.found.values() if found is not None]
        with path_errors(extent):
            same_place = before is not None and place_of(spec_of(before, self._pools)) == place_of(spec)
            self._judge(extent, spec, known=same_place, leaving=leaving, coming=coming)

    def _judge_ahead(self, extent: Extent) -> None:
        """The same before space is taken for it, ahead of the change. On a worker."""
        live = self._extents.get(extent.id)
        self._judge_written(extent, live.extent if live is not None else None, {extent.id}, _Prepared())

    def _judge(
        self,
        extent: Extent,
        spec: ExtentSpec,
        *,
        known: bool,
        rivals: bool = True,
        leaving: Collection[int] = (),
        coming: Collection[tuple[Extent, Found]] = (),
    ) -> Found | None:
        """Whether an extent may have what is there now. On a worker.

        Args:
            known: it must be what the extent had.
            rivals: no other extent may have it; ``leaving``, ``coming`` as for ``Media.rival``.

        Raises:
            OSError, ValueError: it may not, or that cannot be found out.
        """
        found = find(spec)
        if found is None:
            return None
        folders = [*self.extent_roots, *(directory / VOLUMES for directory in self._pools.values())]
        if obstacle := self.media.own.obstacle(place_of(spec), found.medium, folders):
            raise OSError(errno.EPERM, obstacle, extent.path)
        if known:
            self.media.check_known(extent, found, self._trace(extent.id))
        if rivals and (other := self.media.rival(extent, found, leaving, coming)) is not None:
            raise OSError(errno.EBUSY, taken(other), extent.path)
        return found

    def _trace(self, extent_id: int) -> str:
        """What was kept of the medium that an extent had; empty: nothing."""
        return self._kept.of(extent_id).get(TRACE_KEPT_AS, b"").decode()

    def _remember(self, extent_id: int) -> None:
        """Keep by what the medium of an extent is known again."""
        found = self.media.of(extent_id)
        if found is not None and found.trace and found.trace != self._trace(extent_id):
            self._keep(extent_id, TRACE_KEPT_AS, found.trace.encode(), lambda error: None)

    async def _prepared(
        self,
        old: Configuration,
        changes: Changes,
        clone: Created | None,
        force: bool,
        opens: bool = True,
    ) -> _Prepared:
        """``_prepare_extents`` on a worker, as long as there is hope. A clone that was made is undone too."""
        written = changes["extents"].written if "extents" in changes else {}
        if not written:
            return _Prepared()
        users: dict[int, str] = {}
        for id in written.keys() & self._extents.keys():
            live, before, after = self._extents[id], old.extents[id], written[id]
            assert isinstance(after, Extent)
            if spec_of(before, self._pools) != spec_of(after, self._pools):
                in_use.check_busy(live)
            if not force:
                users[id] = in_use.users(live)
        work = asyncio.ensure_future(run_in_thread(self._prepare_extents, old, changes, users, opens))
        try:
            await asyncio.wait({work}, timeout=PREPARE_PATIENCE_S)
            if not work.done():
                self._keep_running(_undo_late(work))
                raise ConfigError.one(
                    "extents", "path", "The medium does not answer.", next(iter(written))
                )  # fmt: skip
            prepared = work.result()
        except BaseException:
            if clone is not None:
                await run_in_thread(clone.undo)
            raise
        if clone is not None and clone.file is not None:
            prepared.made.append(clone.file)
        return prepared

    async def _clone(self, source_id: int, changes: Changes) -> Created:
        """Make the file of the one extent that the change adds share the blocks of another's file.

        Between the commands: what was answered before is in it, what is written later is not.

        Raises:
            ConfigError: it cannot be; nothing was made.
        """
        (extent,) = changes["extents"].written.values()
        assert isinstance(extent, Extent)
        live = self._extents[source_id]
        backend = live.medium
        if backend is None:
            raise ConfigError.one("extents", WHOLE, f"The extent is not ready: {live.status}.", extent.id)
        unit = next(iter(live.units.values()), None)
        if unit is not None and unit.locked is not None:
            message = in_use.busy(live) or "The last SANITIZE or FORMAT UNIT of the extent has failed."
            raise ConfigError.one("extents", WHOLE, message, extent.id)
        await run_in_thread(partial(check_path, new=True), extent, self.extent_roots, self._pools)
        still = asyncio.Event()
        pause = None
        try:
            work = asyncio.ensure_future(run_in_thread(backend.flush))  # so that the pause is short
            if not await _in_time(work, PREPARE_PATIENCE_S):
                raise ConfigError.one("extents", "path", "The medium does not answer.", extent.id)
            if unit is not None:
                pause = unit.hold_still(still.set)
                try:
                    await asyncio.wait_for(still.wait(), PAUSE_PATIENCE_S)
                except TimeoutError:
                    message = "Writes to the extent do not come to an end; its medium hangs."
                    raise ConfigError.one("extents", WHOLE, message, extent.id) from None
            made = await run_in_thread(clone_file, backend, extent.path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError.one("extents", "path", f"{extent.path}: {reason}.", extent.id) from None
        finally:
            if unit is not None and pause is not None:
                unit.go_on(pause)
                self.server.flush_stirred()
        if extent.allocate:
            # what can share blocks has fallocate(2) too, which is done with this in no time
            spec = replace(spec_of(extent, self._pools), create=False)
            try:
                with path_errors(extent):
                    await run_in_thread(allocate_file, spec, _ignore)
            except BaseException:
                await run_in_thread(made.undo)
                raise
        return made

    async def _retired(self, backends: list[Backend], doomed: list[_Doomed]) -> None:
        """Let go of what nobody needs any more; a medium that does not answer is left to itself."""
        if backends or doomed:
            work = self._keep_running(self._let_go(backends, doomed))
            await asyncio.wait({work}, timeout=RETIRE_PATIENCE_S)

    async def _let_go(self, backends: list[Backend], doomed: list[_Doomed]) -> None:
        for backend in await run_in_thread(_retire, backends, doomed):
            live = self._behind.get(backend)
            if live is not None and self._extents.get(live.extent.id) is live:
                for unit in live.units.values():
                    unit.lost_behind()
                    break  # it tells those beside it

    async def _open_stored(self, extents: Sequence[Extent]) -> _Prepared:
        """At start a missing medium is no error of the configuration, and one that hangs keeps nobody."""
        prepared = _Prepared()
        waiting = {extent.id: extent for extent in extents}
        all_done = asyncio.Event()

        def opened(extent: Extent, result: _Opened | OSError | ValueError) -> None:
            if extent.id not in waiting:  # too late; it will be looked for again
                if isinstance(result, _Opened):
                    self._keep_running(run_in_thread(result.backend.close))
                return
            del waiting[extent.id]
            if isinstance(result, _Opened):
                prepared.backends[extent.id] = result.backend
                prepared.found[extent.id] = extent, result.found
            else:
                prepared.missing[extent.id] = _reason(result)
                log.error("extent %s: %s: %s; its LUNs are not ready", extent.name, extent.path, result)
            if not waiting:
                all_done.set()

        self._patrol.add(
            (partial(self._open_existing, extent, rivals=False), partial(opened, extent))
            for extent in extents
        )
        left = len(waiting)
        while waiting:
            try:
                await asyncio.wait_for(all_done.wait(), START_PATIENCE_S)
            except TimeoutError:
                if len(waiting) == left and not self._patrol.waiting:
                    break
                left = len(waiting)
        for extent in waiting.values():
            prepared.missing[extent.id] = "the medium does not answer"
            log.error("extent %s: %s does not answer; its LUNs are not ready", extent.name, extent.path)
        waiting.clear()
        self._part_rivals(prepared)
        return prepared

    def _part_rivals(self, prepared: _Prepared) -> None:
        """Of extents that turn out to have one medium the oldest keeps it, at every start the same."""
        for id in sorted(prepared.found):
            extent, found = prepared.found[id]
            other = self.media.rival(extent, found) if found is not None else None
            if other is None:
                self.media.put(extent, found)
                continue
            del prepared.found[id]
            self._keep_running(run_in_thread(prepared.backends.pop(id).close))
            prepared.missing[id] = taken(other)
            log.error("extent %s: %s; its LUNs are not ready", extent.name, taken(other))

    async def _prepare_listeners(
        self, new: Configuration, prepared: _Prepared, *, waits: bool = False
    ) -> None:
        """What connections come in through: addresses of portals, the logical unit controller's."""
        if self._listens:
            prepared.portals = self.portals.prepare(new, waits=waits)
            prepared.controller = await self.controller.prepare(new, waits=waits)

    # -- swap: cannot fail --------------------------------------------------------------------

    def _swap(
        self,
        old: Configuration,
        new: Configuration,
        changes: Changes,
        prepared: _Prepared,
    ) -> list[Backend]:
        """Make ``new`` the configuration in force. Returns backends that nobody needs any more."""
        retired = self._swap_extents(old, new, changes, prepared)
        gone = self._swap_targets(old, new, changes)
        self._config = new
        self._view = AccessSnapshot(new, self._targets, self.portals.absent)
        table = self.server.sessions
        table.max_sessions = new.globals.max_sessions
        if self._listens:
            self.portals.swap(new, prepared.portals)
            self.controller.swap(new, prepared.controller)
            self._isns.follow(new)
        leaving = [session for session in table.sessions.values() if session.target in gone]
        if not new.service_enabled:
            self._leaving = self._keep_running(
                self._log_out(
                    list(table.sessions.values()), End(EndReason.STOPPED, "the service was stopped")
                )
            )
        elif leaving:
            self._keep_running(self._log_out(leaving, End(EndReason.TARGET_REMOVED, "target removed")))
        for channel in self.server.channels:
            channel.connection.io_timeout_s = new.globals.io_timeout_s
            channel.connection.nop_interval_s = new.globals.nop_in_interval_s
        self.server.flush_stirred()
        return retired

    def _swap_extents(
        self,
        old: Configuration,
        new: Configuration,
        changes: Changes,
        prepared: _Prepared,
    ) -> list[Backend]:
        retired: list[Backend] = []
        if old.globals.pool_avail_threshold != new.globals.pool_avail_threshold:
            for live in self._extents.values():
                live.threshold = new.globals.pool_avail_threshold
                live.show()
        change = changes.get("extents")
        if change is None:
            return retired
        self._kept.forget(change.removed)
        for id in change.removed:
            self.media.forget(id)
            self._withheld.pop(id, None)
            live = self._extents.pop(id)
            live.lane.close()
            if live.backend is not None:
                retired.append(live.backend)
        for extent in change.written.values():
            assert isinstance(extent, Extent)
            self.media.put(extent, prepared.found.get(extent.id, (extent, self.media.of(extent.id)))[1])
            self._remember(extent.id)
            live_or_none = self._extents.get(extent.id)
            backend = prepared.backends.get(extent.id)
            if live_or_none is None:
                missing = prepared.missing.get(extent.id, "")
                self._extents[extent.id] = self._new_extent(extent, backend, new, missing)
                continue
            live = live_or_none
            if backend is not None and live.backend is not None:
                retired.append(live.backend)
                self._behind[live.backend] = live
            if backend is not None:
                live.missing = ""
                live.lost_writes = backend.lost_writes
            if extent.id in prepared.replaced:
                live.replace_medium(self._new_lane(extent.id))
            live.extent, live.backend = extent, backend or live.backend  # units hear of it with their targets
            self._limit(live)
        return retired

    def _limit(self, live: LiveExtent) -> None:
        """Put the extent's I/O limits in force."""
        limits = live.extent.iops_limit, live.extent.bandwidth_limit
        throttle = live.throttle
        if not any(limits):
            if isinstance(throttle, Throttle):
                throttle.change(0, 0)  # what waits for its share goes on
                live.limit(None)
        elif not isinstance(throttle, Throttle):

            def released() -> None:
                live.proceed()
                self.server.flush_stirred()

            live.limit(Throttle(*limits, released, self._loop))
        elif throttle.limits != limits:
            throttle.change(*limits)
            live.proceed()

    def _new_lane(self, extent_id: int) -> WorkerThreads:
        return WorkerThreads(self._completions, f"extent-{extent_id}")

    def _new_extent(
        self, extent: Extent, backend: Backend | None, config: Configuration, missing: str = ""
    ) -> LiveExtent:
        lane = self._new_lane(extent.id)
        reservations = Reservations(self._kept.of(extent.id).get(RESERVATIONS_KEPT_AS))
        reservations.target_port_groups = self._target_port_groups
        threshold = config.globals.pool_avail_threshold
        live = LiveExtent(
            extent, backend, lane, reservations, self._make_unit, threshold, self.io_engine.ring
        )
        if backend is None:
            live.missing = missing or "not found when the daemon started"
        live.told = live.status
        self._limit(live)
        return live

    def _make_unit(self, live: LiveExtent, config: UnitConfig) -> LogicalUnit:
        unit = LogicalUnit(
            config,
            live.medium,
            live.lane,
            reservations=live.reservations,
            now=time.time,
            keep=partial(self._keep, live.extent.id),
            kept=dict(self._kept.of(live.extent.id)),
        )
        unit.deliver = self.server.deliver
        unit.aborted = forget_aborted
        unit.concluded = answer_aborted
        for sibling in live.units.values():
            unit.share_medium(sibling)
        live.reservations.units.add(unit)
        sanitize.resume(unit)
        return unit

    def _beyond(self, nexus: Nexus, naa: str) -> Iterator[tuple[LogicalUnit, Nexus]]:
        """See ``protocol.scsi.device.Target.beyond``."""
        return units_beyond(self._config, self._targets, self.server.sessions, nexus, naa)

    def _target_port_groups(self, nexus: Nexus) -> tuple[int, ...]:
        """The portal groups through which the target of a nexus can be reached."""
        target = target_named(self._config, nexus.target_name)
        return self._targets[target.id].ports if target is not None else ()

    def _keep(
        self, extent_id: int, name: str, value: bytes, done: Callable[[Exception | None], None]
    ) -> None:
        """Store what an initiator asked to have kept; ``done`` on the loop when it is durable."""
        key = f"{extent_id}/{name}"

        async def put() -> None:
            try:
                await self._store.put(UNITS, key, value)
            except StoreError as error:
                log.error("could not keep %s: %s", key, error)
                done(error)
            else:
                self._kept.update({key: value})
                done(None)
            self.server.flush_stirred()

        self._keep_running(put())

    def _swap_targets(self, old: Configuration, new: Configuration, changes: Changes) -> list[ScsiTarget]:
        """Bring targets and their LUN maps in line; returns the targets that are gone.

        Only what the change touches is looked at: with a thousand targets all of them would cost more
        than the rest of the change together.
        """
        gone = []
        renamed: dict[ScsiTarget, str] = {}
        targets, extents = _touched(old, new, changes)
        if old.globals.basename != new.globals.basename:
            targets |= new.targets.keys()
        for id in targets:
            scsi = self._targets.get(id)
            target = new.targets.get(id)
            units = {}
            if target is not None:
                for mapping in mappings_by_target(new).get(id, ()):
                    extent = new.extents[mapping.extent_id]
                    units[mapping.lun] = self._extents[extent.id].unit(
                        id, appearance(extent, target, mapping)
                    )
            if scsi is not None:
                changed = units != scsi.luns
                for request in scsi.replace_luns(units):
                    answer_aborted(request, Sense.LOGICAL_UNIT_NOT_SUPPORTED)
                if target is None:
                    gone.append(self._targets.pop(id))
                elif changed:
                    self.server.sessions.tell_luns_changed(scsi)
                if target is not None and (name := full_name(new.globals, target)) != scsi.name:
                    renamed[scsi] = name
                if target is not None and target.queue_depth != old.targets[id].queue_depth:
                    self.server.sessions.set_depth(scsi, target.queue_depth)
            elif target is not None:
                name = full_name(new.globals, target)
                self._targets[id] = ScsiTarget(name, units, lane=self._spare_lane, now=time.time)
                self._targets[id].beyond = self._beyond
            if target is not None:
                groups = groups_by_target(new).get(id, ())
                self._targets[id].ports = tuple(sorted({group.portal_id for group in groups}))
        for id in extents & self._extents.keys():
            mappings = mappings_by_extent(new).get(id, ())
            self._extents[id].keep_units({mapping.target_id for mapping in mappings})
        if renamed:
            self._rename(renamed)
        return gone

    def _rename(self, renamed: Mapping[ScsiTarget, str]) -> None:
        """Targets that have another name stay what they are: sessions, registrations, units."""
        names = {scsi.name: name for scsi, name in renamed.items()}
        for scsi, name in renamed.items():
            scsi.rename(name)
        self.server.sessions.rename(renamed)
        for id, live in self._extents.items():
            live.reservations.rename_targets(names, partial(self._keep_reservations, id))

    def _keep_reservations(self, extent_id: int, state: bytes) -> None:
        self._keep(extent_id, RESERVATIONS_KEPT_AS, state, lambda error: None)  # it has been logged

    # -- sessions -----------------------------------------------------------------------------

    async def _log_out(self, sessions: list[Session], reason: End, *, wait: bool = False) -> None:
        """Ask initiators to log out; those that do not within LOGOUT_S are dropped."""
        table = self.server.sessions
        for session in sessions:
            if not session.connections:  # it only waits for lost ones to come back
                table.end(session, reason)
            for connection in list(session.connections.values()):
                connection.now = self._loop.time()
                connection.request_logout(LOGOUT_S, reason)
        self.server.flush_stirred()
        deadline = self._loop.time() + LOGOUT_S
        while any(session.id in table.sessions for session in sessions):
            if self._loop.time() >= deadline:
                for session in sessions:
                    table.end(session, reason, notice=True)
                self.server.flush_stirred()
                return
            await asyncio.sleep(0.05)

    def _session_ended(self, session: Session) -> None:
        self.server.counters.session_ended(session)
        names = {"initiator": session.initiator_name, "target": session.grant.target_name or None}
        bind(log, **names).info(
            "%s left %s: %s",
            session.initiator_name,
            session.grant.target_name or "discovery",
            session.ended,
        )
        self.announce(
            "session.end", id=session.id, initiator=session.initiator_name, reason=str(session.ended)
        )

    # -- housekeeping -------------------------------------------------------------------------

    def tell_io_engine(self) -> None:
        """Say in the log how what waits for a medium is carried out: the process serves."""
        self.io_engine.tell()

    def settle(self) -> None:
        """See ``GcScheduler.settle``: the process is ready."""
        self._garbage.settle()

    def _bytes_moved(self) -> int:
        return sum(
            session.bytes_read + session.bytes_written for session in self.server.sessions.sessions.values()
        )

    def _tick(self, now: float) -> None:
        """Once a second on the loop."""
        self._garbage.tick()
        if now >= self._next_backend_tick:
            self._next_backend_tick = now + TICK_INTERVAL_S
            for live in self._extents.values():
                backend = live.backend
                if backend is not None:
                    backend.tick()
                    if backend.lost_writes != live.lost_writes:
                        live.lost_writes = backend.lost_writes
                        for unit in live.units.values():
                            unit.note_lost_writes()
                if live.status != live.told:
                    self._tell(live)
        if self._stopping:
            return
        self.portals.tick(now)
        self.controller.tick(now)
        if self._listens:
            self._isns.follow(self._config)
        for live in self._extents.values():
            live.measure_space(now)
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            for live in self._extents.values():
                if live.told != "ok" and not live.looking:
                    live.lane.run(*self._look_at(live))
        if now >= self._next_survey:
            self._next_survey = now + SURVEY_S
            self._patrol.add(
                self._look_at(live)
                for live in self._extents.values()
                if live.told == "ok" and not live.looking and live.in_use
            )

    def _open_existing(self, extent: Extent, *, rivals: bool = True) -> _Opened | OSError | ValueError:
        """Open an extent's medium as it must be there already: nothing is made or grown. On a worker."""
        if (withheld := self._withheld.get(extent.id)) is not None:
            return OSError(errno.EBUSY, withheld[2], extent.path)
        spec = replace(spec_of(extent, self._pools), create=False, grow=False)
        return self._open_judged(extent, spec, known=True, rivals=rivals)

    def _open_judged(
        self, extent: Extent, spec: ExtentSpec, *, known: bool, rivals: bool = True
    ) -> _Opened | OSError | ValueError:
        try:
            judged = self._judge(extent, spec, known=known, rivals=rivals)
            backend = open_backend(spec)
        except (OSError, ValueError) as error:
            return error
        try:
            found = find(spec)
            if found is not None and judged is not None and found.is_other_than(judged):
                raise OSError(errno.EAGAIN, "it has changed while it was opened", extent.path)
        except (OSError, ValueError) as error:
            backend.close()
            return error
        return _Opened(backend, found)

    async def rivals(
        self, candidates: Collection[tuple[Extent, Found]], leaving: Collection[int]
    ) -> list[tuple[Extent, str]]:
        """What is wrong with these media for these extents, as far as this process knows: another extent has
        them, or its own is not what it had."""
        wrong = []
        for extent, found in candidates:
            live = self._extents.get(extent.id)
            if live is not None and live.extent.path == extent.path:
                try:
                    self.media.check_known(extent, found, self._trace(extent.id))
                except OSError as error:
                    wrong.append((extent, _reason(error)))
            other = self.media.rival(extent, found, leaving)
            if other is not None:
                wrong.append((extent, taken(other)))
        return wrong

    async def media_found(self) -> list[tuple[Extent, Found]]:
        """What all extents of this process have, or would have if it were not withheld."""
        return [*self.media.all(), *((extent, found) for extent, found, _ in self._withheld.values())]

    async def withhold(self, extent_id: int, reason: str) -> None:
        """Another process's extent has the same medium: this one gives it up; empty: it may look again."""
        self._withheld.pop(extent_id, None)
        live, found = self._extents.get(extent_id), self.media.of(extent_id)
        if live is None or found is None or not reason:
            return
        self._withheld[extent_id] = live.extent, found, reason
        self.media.forget(extent_id)
        backend, live.backend, live.missing = live.backend, None, reason
        live.show()
        self._tell(live)
        self.server.flush_stirred()
        if backend is not None:
            await self._retired([backend], [])

    async def adopt_medium(self, extent_id: int) -> str:
        """See ``Engine.adopt_medium``."""
        async with self._lock:
            live = self._extents.get(extent_id)
            if live is None:
                return "There is no such extent."
            if obstacle := in_use.busy(live):
                return obstacle
            if extent_id in self._withheld:
                return f"{self._withheld[extent_id][2]}."
            extent = live.extent
            spec = replace(spec_of(extent, self._pools), create=False)
            work = asyncio.ensure_future(run_in_thread(partial(self._open_judged, extent, spec, known=False)))
            if not await _in_time(work, PREPARE_PATIENCE_S):
                self._keep_running(_close_late(work))
                return "The medium does not answer."
            opened = work.result()
            if not isinstance(opened, _Opened):
                return f"{extent.path}: {_reason(opened)}."
            known = self.media.of(extent_id)
            if live.status == "ok" and (
                known is None or opened.found is None or opened.found.medium == known.medium
            ):
                await run_in_thread(opened.backend.close)
                return ""
            old, live.backend, live.missing = live.backend, opened.backend, ""
            live.lost_writes = opened.backend.lost_writes
            self.media.put(extent, opened.found)
            self._remember(extent_id)
            for unit in live.units.values():
                unit.replace_medium()
            live.show()
            for unit in live.units.values():
                sanitize.resume(unit)
            log.warning("extent %s: takes what is under %s now, as it was told to", extent.name, extent.path)
            self._tell(live)
            self.server.flush_stirred()
            if old is not None:
                self._keep_running(run_in_thread(old.close))
            return ""

    async def sanitize(self, extent_id: int, method: str, passes: int = 1) -> Work | str:
        """See ``Engine.sanitize``."""
        async with self._lock:  # no change takes the extent away meanwhile
            live = self._extents.get(extent_id)
            unit = next(iter(live.units.values()), None) if live is not None else None
            if live is None or unit is None:
                return "The extent is not a LUN of any target."
            obstacle = self._sanitize_obstacle(live)
            if obstacle:
                return obstacle
            action = sanitize.Action(SANITIZE_METHODS.index(method) + 1)
            pattern = bytes(1) if action is sanitize.Action.OVERWRITE else b""
            size_bytes = unit.blocks * unit.block_size
            begun: asyncio.Future[Exception | None] = self._loop.create_future()
            id, name = live.extent.id, live.extent.name

            def ended(outcome: Outcome) -> None:
                log.info("extent %s: sanitize has %s", name, "ended" if outcome is GOOD else "failed")
                self.announce("sanitize.end", id=id, name=name, failed=outcome is not GOOD)

            # AUSE, so that EXIT FAILURE MODE gets an extent back whose medium failed
            plan = sanitize.Plan(action, unrestricted=True, pattern=pattern, passes=passes)
            sanitize.begin(unit, plan, begun.set_result, ended)
            error = await asyncio.shield(begun)
            if error is not None:
                return f"It could not be stored: {error}"
            log.info("extent %s: sanitize by %s has begun", name, method)
            self.announce("sanitize.start", id=id, name=name, method=method)
            return Work("sanitize", id, name, 0, size_bytes * passes)

    def _sanitize_obstacle(self, live: LiveExtent) -> str:
        """Why the medium of an extent cannot be sanitized now, in words; empty: it can."""
        units = set(live.units.values())
        if live.extent.read_only or (live.backend is not None and not live.backend.capabilities.writable):
            return "The extent is read-only."
        if live.medium is None:
            return f"The extent is not ready: {live.status}."
        if obstacle := in_use.busy(live):
            return obstacle
        for session in self.server.sessions.sessions.values():
            if session.target is not None and not units.isdisjoint(session.target.luns.values()):
                return f"The extent is in use by {session.initiator_name}."
        return ""

    async def look_again(self, path: str = "") -> None:
        """See ``Engine.look_again``. A medium that does not answer is waited for on its own lane only."""
        found = [live for live in self._extents.values() if path in ("", live.extent.path)]
        await asyncio.gather(*(self._refresh(live) for live in found if live.backend is not None))
        self.server.flush_stirred()

    def _refresh(self, live: LiveExtent) -> asyncio.Future[None]:
        over = self._loop.create_future()
        work, done = self._look_at(live)

        def then(result: Any) -> None:
            done(result)
            if not over.done():
                over.set_result(None)

        live.lane.run(work, then)
        return over

    def _look_at(self, live: LiveExtent) -> Job:
        """Work that looks at a medium, or for one that is missing; and what becomes of that."""
        live.looking = True
        backend, extent = live.backend, live.extent
        work = (
            partial(self._open_existing, extent)
            if backend is None
            else partial(_refreshed, backend, spec_of(extent, self._pools))
        )
        return work, partial(self._looked, live, extent, backend)

    def _looked(
        self,
        live: LiveExtent,
        extent: Extent,
        backend: Backend | None,
        result: _Opened | Found | Exception | None,
    ) -> None:
        """What a look at a medium has found: it is gone, it is back, it has another size, or nothing new."""
        live.looking = False
        opened = isinstance(result, _Opened)
        if (
            self._extents.get(extent.id) is not live
            or live.backend is not backend
            or (opened and live.extent is not extent)
        ):
            if isinstance(result, _Opened):
                live.lane.run(result.backend.close, lambda _: None)
            return
        if isinstance(result, _Opened) and result.found is not None:
            other = self.media.rival(extent, result.found)  # somebody may have been faster
            if other is not None:
                live.lane.run(result.backend.close, lambda _: None)
                result = OSError(errno.EBUSY, taken(other), extent.path)
        if isinstance(result, Exception):
            gone = not isinstance(result, OSError) or result.errno not in STILL_THERE
            if backend is None or gone:
                was, live.missing = live.missing, _reason(result)
                if not was:
                    live.show()
        elif isinstance(result, _Opened) or live.missing:
            live.missing = ""
            if isinstance(result, _Opened):
                live.backend = result.backend
                self.media.put(extent, result.found)
            elif result is not None:  # a device may be back under another number
                self.media.put(extent, result)
            self._remember(extent.id)
            live.show()
            for unit in live.units.values():
                sanitize.resume(unit)
        elif any(unit.geometry != backend.geometry for unit in live.units.values() if backend is not None):
            live.show()
        self._tell(live)

    def _tell(self, live: LiveExtent) -> None:
        """If the status of an extent has changed, the operator hears of it."""
        status = live.status
        if status == live.told:
            return
        live.told = status
        extent = live.extent
        if status == "ok":
            log.info("extent %s: its medium is well again", extent.name)
            self.announce("extent.ready", id=extent.id, name=extent.name)
        else:
            log.error("extent %s: %s", extent.name, status)
            self.announce("extent.fault", id=extent.id, name=extent.name, reason=status)

    def _keep_running(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._housekeeping.add(task)
        task.add_done_callback(self._housekeeping.discard)
        return task

    # -- events -------------------------------------------------------------------------------

    def _note(self, kind: str, what: Any) -> None:
        """The server tells of a login or a refusal."""
        if isinstance(what, LoginFailure):
            self._failures.append(what)
            # asdict() copies deeply, for 40 µs: too much in a flood of refusals
            self.announce(kind, **{name: getattr(what, name) for name in LoginFailure.__slots__})
        elif isinstance(what, Session):
            self.announce(
                kind, id=what.id, initiator=what.initiator_name, target=what.grant.target_name or None
            )

    def announce(self, kind: str, **data: Any) -> None:
        """Tell the readers of the event stream."""
        if not self._subscribers:
            return
        event = Event(kind, time.time(), data)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
                self._events_lost += 1
            queue.put_nowait(event)


def _ignore(done: int) -> None:
    """Nobody looks at the progress of what is done in no time."""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _refreshed(backend: Backend, spec: ExtentSpec) -> Found | OSError | ValueError | None:
    """On a worker."""
    try:
        backend.refresh()
        return find(spec)
    except (OSError, ValueError) as error:
        return error


async def _close_late(work: asyncio.Future[_Opened | OSError | ValueError]) -> None:
    """Nobody waits any more for what was to be opened."""
    opened = await work
    if isinstance(opened, _Opened):
        await run_in_thread(opened.backend.close)


async def _in_time(work: asyncio.Future[Any], limit_s: float) -> bool:
    """Wait for it, but not for ever; it goes on. Raises what it raised."""
    await asyncio.wait({work}, timeout=limit_s)
    if work.done():
        work.result()
    return work.done()


async def _undo_late(work: asyncio.Future[_Prepared]) -> None:
    """Nobody waits any more for what was to be prepared."""
    try:
        prepared = await work
    except (ConfigError, OSError):
        return
    await run_in_thread(prepared.undo)


def _touched(old: Configuration, new: Configuration, changes: Changes) -> tuple[set[int], set[int]]:
    """Ids of the targets and of the extents whose LUN maps a change may have altered."""
    targets: set[int] = set()
    extents: set[int] = set()
    for collection, change in changes.items():
        ids = {*change.written, *change.removed}
        if collection == "targets":
            targets |= ids
        elif collection == "extents":
            extents |= ids
        elif collection == "target_groups":
            groups = [config.target_groups.get(id) for config in (old, new) for id in ids]
            targets |= {group.target_id for group in groups if group is not None}
        elif collection == "lun_mappings":
            for config in (old, new):
                for mapping in filter(None, (config.lun_mappings.get(id) for id in ids)):
                    targets.add(mapping.target_id)
                    extents.add(mapping.extent_id)
    for config in (old, new):
        for id in list(extents):
            targets |= {mapping.target_id for mapping in mappings_by_extent(config).get(id, ())}
        for id in targets:
            extents |= {mapping.extent_id for mapping in mappings_by_target(config).get(id, ())}
    return targets, extents


def _flush_and_close(backend: Backend) -> None:
    try:
        if backend.capabilities.writable:
            backend.flush()
    finally:
        backend.close()


def _retire(backends: Sequence[Backend], doomed: Sequence[_Doomed]) -> list[Backend]:
    """On a worker: let go of media, or openings of them, that nobody needs any more; those that could not be
    flushed are returned."""
    failed = []
    for backend in backends:
        try:
            _flush_and_close(backend)
        except OSError as error:
            failed.append(backend)
            log.error(
                "%s: data written before it was removed or opened anew could not be flushed: %s",
                error.filename or "an extent",
                error.strerror or error,
            )
    for each in doomed:
        path = each.extent.path
        try:
            discard(path, each.known, each.kept)
        except OSError as error:
            log.error("%s was not deleted with extent %s: %s", path, each.extent.name, error.strerror)
    return failed
