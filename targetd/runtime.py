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
import logging
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from protocol.connection import Connection
from protocol.management import forget_aborted
from protocol.scsi import sanitize
from protocol.scsi.device import LogicalUnit, UnitConfig
from protocol.scsi.device import Target as ScsiTarget
from protocol.scsi.reservations import KEPT_AS as RESERVATIONS_KEPT_AS
from protocol.scsi.reservations import Reservations
from protocol.session import Session
from storage.base import TICK_INTERVAL_S, Backend
from storage.open import ExtentSpec, open_backend
from targetd.access import PortalAuthorizer, View, credentials_of
from targetd.counters import command_name, status_name
from targetd.extents import LiveExtent, UnitKey, check_path, open_extent, spec_of, unit_key
from targetd.interface import (
    ConnectionStatus,
    Edit,
    Event,
    Explanation,
    Latency,
    LoginFailure,
    ServiceState,
    SessionStatus,
    Statistics,
    UnitStatistics,
    VisibleLun,
)
from targetd.lanes import Completions, Lane, off_loop
from targetd.loop import Loop
from targetd.lucserver import ControllerServer
from targetd.model import (
    Change,
    Collection,
    ConfigError,
    Configuration,
    Extent,
    Portal,
    diff,
    full_name,
    mappings_by_extent,
    mappings_by_target,
    split_address,
    validate,
)
from targetd.server import Channel, Server, bind, bind_reason
from targetd.store import Store, StoreError

__all__ = ["Runtime"]

log = logging.getLogger("targetd.runtime")

KEPT = "unit"
"""Namespace in the store of what logical units keep across restarts."""

LOGOUT_S = 3
"""How long initiators of a removed target or portal, or at shutdown, have to log out when asked to."""

RETRY_MISSING_S = 5.0
"""How often a medium that is missing is looked for."""

KEPT_FAILURES = 200
"""Refused logins that are remembered: an hour of one that tries every 20 s."""

MAX_WAITING_EVENTS = 1000
"""Events that a slow reader of the stream may be behind before it loses the oldest."""


@dataclass(slots=True)
class _Prepared:
    """What a change needs and the old configuration has not. ``undo`` gives all of it back."""

    backends: dict[int, Backend] = field(default_factory=dict)
    """Extent id → newly opened."""
    made: list[Path] = field(default_factory=list)
    """Files that did not exist before."""
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    """Address → bound, not yet accepting."""
    controller: asyncio.Server | None = None
    """The logical unit controller's new listener."""

    def undo(self) -> None:
        """On a worker."""
        if self.controller is not None:
            self.controller.get_loop().call_soon_threadsafe(self.controller.close)
        for sock in self.sockets.values():
            sock.close()
        for backend in self.backends.values():
            backend.close()
        for path in self.made:
            path.unlink(missing_ok=True)


class Runtime:
    """Implements ``targetd.interface.Engine``."""

    def __init__(
        self,
        store: Store,
        extent_roots: Sequence[Path],
        loop: Loop,
        pools: Mapping[str, Path] | None = None,
    ) -> None:
        """
        Args:
            extent_roots: where File extents may live.
            pools: directory pools by name.
        """
        self._store = store
        self._roots = tuple(extent_roots)
        self._pools = dict(pools or {})
        self._loop = loop
        self._lock = asyncio.Lock()
        self._config = Configuration()
        self._view = View(self._config, {})
        self._extents: dict[int, LiveExtent] = {}
        self._targets: dict[int, ScsiTarget] = {}
        self._subscribers: set[asyncio.Queue[Event]] = set()
        self._housekeeping: set[asyncio.Task[None]] = set()
        self._kept: dict[str, bytes] = {}
        """What logical units had us keep: ``<extent id>/<what>`` → bytes."""
        self._next_backend_tick = 0.0
        self._next_retry = 0.0
        self._failures: deque[LoginFailure] = deque(maxlen=KEPT_FAILURES)
        self._stopping = False
        self._changes = self._changes_failed = self._events_lost = 0
        self._save_s = self._save_longest_s = 0.0
        self.server = Server(loop, lambda: self._view, self._note, self._tick)
        self.server.sessions.ended = self._session_ended
        self.controller = ControllerServer(self)
        self._completions = Completions(loop, self.server.flush_stirred)
        self._spare_lane = Lane(self._completions, "absent", 1)

    # -- the engine interface -----------------------------------------------------------------

    @property
    def configuration(self) -> Configuration:
        return self._config

    @property
    def view(self) -> View:
        """What logins are judged by now, with the live targets."""
        return self._view

    def stirred(self) -> None:
        """Send what something else than its own peer has queued for a connection."""
        self.server.flush_stirred()

    async def apply(self, edit: Edit, *, discard_files: frozenset[int] = frozenset()) -> Configuration:
        """See ``Engine.apply``. ``discard_files``: extents whose file is deleted once they are gone."""
        async with self._lock:
            old = self._config
            new = edit(old)
            if new is old:
                return old
            validate(new, old)
            changes = diff(old, new)
            prepared = await off_loop(self._prepare_extents, old, new, changes)
            try:
                self._bind_portals(new, prepared)
                prepared.controller = await self.controller.prepare(new)
                await self._save(old, new)
            except BaseException:
                self._changes_failed += 1
                await off_loop(prepared.undo)
                raise
            retired = self._swap(old, new, changes, prepared)
            doomed = [Path(old.extents[id].path) for id in discard_files if id not in new.extents]
            await off_loop(_retire, retired, doomed)
            self._announce(
                "configuration",
                globals=old.globals != new.globals or old.service_enabled != new.service_enabled,
                changed={
                    collection: {"written": sorted(change.written), "removed": sorted(change.removed)}
                    for collection, change in changes.items()
                },
            )
            return new

    async def _save(self, old: Configuration, new: Configuration) -> None:
        began = self._loop.time()
        await self._store.save(old, new)
        elapsed_s = self._loop.time() - began
        self._changes += 1
        self._save_s += elapsed_s
        self._save_longest_s = max(elapsed_s, self._save_longest_s)

    def service_state(self) -> ServiceState:
        return ServiceState(self._config.service_enabled, bool(self.server.listeners))

    def sessions(self) -> list[SessionStatus]:
        now = self._loop.time()
        names = {id(live): target_id for target_id, live in self._targets.items()}
        return [_status(session, names, now) for session in self.server.sessions.sessions.values()]

    async def drop(self, session_id: int, reason: str) -> bool:
        session = self.server.sessions.sessions.get(session_id)
        if session is None:
            return False
        await self._log_out([session], reason)
        return True

    def statistics(self) -> Statistics:
        counters = self.server.counters
        places: dict[int, list[tuple[str, int]]] = {}
        for scsi in self._targets.values():
            for lun, unit in scsi.luns.items():
                places.setdefault(id(unit), []).append((scsi.name, lun))
        sessions = list(self.server.sessions.sessions.values())
        portals: dict[int, tuple[list[Channel], list[Session]]] = {
            portal_id: ([], []) for portal_id in self._config.portals
        }
        for channel in self.server.channels:
            portals.setdefault(channel.portal_id, ([], []))[0].append(channel)
        for session in sessions:
            portals.setdefault(session.grant.target_portal_group_tag, ([], []))[1].append(session)
        return Statistics(
            units=tuple(
                _unit_statistics(live, unit, tuple(places.get(id(unit), ())), counters.latency_of(unit))
                for live in self._extents.values()
                for unit in live.units.values()
            ),
            sessions=tuple(map(counters.of_session, sessions)),
            portals=tuple(
                counters.of_portal(portal_id, len(channels), open_ones)
                for portal_id, (channels, open_ones) in portals.items()
            ),
            changes=self._changes,
            changes_failed=self._changes_failed,
            save_s=self._save_s,
            save_longest_s=self._save_longest_s,
            loop_lag_s=counters.loop_lag_s,
            loop_lag_longest_s=counters.loop_lag_longest_s,
            events_lost=self._events_lost,
        )

    def login_failures(self) -> list[LoginFailure]:
        return list(reversed(self._failures))

    def explain(
        self, initiator_name: str, address: str, target: str = "", portal_id: int | None = None
    ) -> list[Explanation]:
        config = self._config
        wanted = target.lower()
        return [
            self._explain(portal, name, initiator_name, address)
            for portal in config.portals.values()
            if portal_id in (None, portal.id)
            for name, (configured, _) in self._view.targets.items()
            if not wanted or wanted in (name, configured.name.lower())
        ]

    def _explain(self, portal: Portal, name: str, initiator_name: str, address: str) -> Explanation:
        """What the login itself would answer, asked of the very code that answers it."""
        local_host, local_port = split_address(portal.addresses[0]) if portal.addresses else (address, 0)
        authorizer = PortalAuthorizer(lambda: self._view, portal.id, address, local_host, local_port)
        target, scsi = self._view.targets[name]
        verdict = authorizer.judge(target, initiator_name)
        allowed, rule = verdict.group is not None, verdict.rule
        method = verdict.group.auth_method if verdict.group is not None else ""
        if verdict.group is not None and method.startswith("CHAP"):
            tag = verdict.group.auth_group
            if not credentials_of(self._config, verdict.group.auth_method, tag):
                allowed = False
                rule += f", but {method} is asked for and credential group {tag} has no user"
        if not self._config.service_enabled:
            allowed, rule = False, f"{rule}, but the service is stopped"
        elif not portal.addresses:
            allowed, rule = False, f"{rule}, but portal {portal.id} has no address"
        return Explanation(
            portal_id=portal.id,
            portal_addresses=portal.addresses,
            target_id=target.id,
            target_name=name,
            allowed=allowed,
            reason=rule,
            authentication=method if allowed else "",
            discovered=bool(authorizer.send_targets(initiator_name, name)),
            luns=tuple(self._visible(target.id, scsi)) if allowed else (),
        )

    def _visible(self, target_id: int, scsi: ScsiTarget) -> Iterator[VisibleLun]:
        mappings = mappings_by_target(self._config).get(target_id, ())
        for mapping in sorted(mappings, key=lambda mapping: mapping.lun):
            unit = scsi.luns[mapping.lun]
            yield VisibleLun(
                lun=mapping.lun,
                extent_id=mapping.extent_id,
                extent=self._config.extents[mapping.extent_id].name,
                size_bytes=unit.blocks * unit.block_size,
                block_size=unit.block_size,
                read_only=unit.read_only,
                ready=unit.medium_present,
            )

    async def events(self) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING_EVENTS)
        self._subscribers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    # -- start and end ------------------------------------------------------------------------

    async def start(self, config: Configuration) -> None:
        """Bring up a stored configuration. A medium that is missing leaves its LUN there and not ready.

        Raises:
            ConfigError: a portal cannot be bound; nothing listens then.
        """
        self._kept = await self._store.items(KEPT)
        prepared = await off_loop(self._open_stored, config)
        try:
            self._bind_portals(config, prepared)
            prepared.controller = await self.controller.prepare(config)
        except BaseException:
            await off_loop(prepared.undo)
            raise
        empty = Configuration()
        self._swap(empty, config, diff(empty, config), prepared)

    async def stop(self) -> None:
        """Stop accepting, ask initiators to log out, finish what runs, flush every extent, close."""
        self._stopping = True
        self.controller.close()
        for address in list(self.server.listeners):
            self.server.unlisten(address)
        await self._log_out(list(self.server.sessions.sessions.values()), "shutdown", wait=True)
        self.server.close()
        for live in self._extents.values():
            for unit in live.units.values():
                sanitize.stop(unit)
        started = time.monotonic()
        backends = [live.backend for live in self._extents.values() if live.backend is not None]
        if backends:
            flushes = [asyncio.create_task(off_loop(_flush_and_close, backend)) for backend in backends]
            done, late = await asyncio.wait(flushes, timeout=5)
            for task in done:
                if (error := task.exception()) is not None:
                    log.error("an extent could not be flushed: %s", error)
            log.info(
                "%d extents flushed in %.2f s%s",
                len(done),
                time.monotonic() - started,
                f", {len(late)} still waiting for their medium" if late else "",
            )

    # -- prepare: on a worker -----------------------------------------------------------------

    def _prepare_extents(
        self, old: Configuration, new: Configuration, changes: Mapping[Collection, Change]
    ) -> _Prepared:
        prepared = _Prepared()
        written = changes["extents"].written if "extents" in changes else {}
        try:
            for extent in written.values():
                assert isinstance(extent, Extent)
                before = old.extents.get(extent.id)
                if before is not None and spec_of(before, self._pools) == spec_of(extent, self._pools):
                    continue
                self._prepare_extent(before, extent, prepared)
        except BaseException:
            prepared.undo()
            raise
        return prepared

    def _prepare_extent(self, before: Extent | None, extent: Extent, prepared: _Prepared) -> None:
        """Open what the extent shall be from now on. A medium that is open already may be opened again
        beside itself, with another size or protection; the old opening goes when the change is certain."""
        check_path(extent, self._roots, self._pools)
        fresh = extent.type == "File" and not os.path.lexists(extent.path)
        backend = open_extent(extent, self._pools)
        prepared.backends[extent.id] = backend
        if fresh:
            prepared.made.append(Path(extent.path))
        live = self._extents.get(extent.id)
        if live is None or live.backend is None or not live.in_use:
            return
        size, had = backend.geometry.size_bytes, live.backend.geometry.size_bytes
        if size < had:
            raise ConfigError.one(
                "extents", "file_size", f"The extent is in use and cannot shrink from {had} to {size} bytes.",
                extent.id,
            )  # fmt: skip

    def _open_stored(self, config: Configuration) -> _Prepared:
        """At start a missing medium is no error of the configuration."""
        prepared = _Prepared()
        for extent in config.extents.values():
            try:
                prepared.backends[extent.id] = open_backend(self._existing(extent))
            except (OSError, ValueError) as error:
                log.error("extent %s: %s: %s; its LUNs are not ready", extent.name, extent.path, error)
        return prepared

    def _bind_portals(self, new: Configuration, prepared: _Prepared) -> None:
        """Bind what is wanted and not listened on yet. Binding to a local address does not wait."""
        for address, portal_id in _wanted_addresses(new).items():
            if address in self.server.listeners:
                continue
            try:
                prepared.sockets[address] = bind(address)
            except OSError as error:
                message = f"{address} {bind_reason(error)}."
                raise ConfigError.one("portals", "addresses", message, portal_id) from None

    # -- swap: cannot fail --------------------------------------------------------------------

    def _swap(
        self,
        old: Configuration,
        new: Configuration,
        changes: Mapping[Collection, Change],
        prepared: _Prepared,
    ) -> list[Backend]:
        """Make ``new`` the configuration in force. Returns backends that nobody needs any more."""
        retired = self._swap_extents(old, new, changes, prepared)
        gone = self._swap_targets(old, new, changes)
        self._config = new
        self._view = View(
            new,
            {
                full_name(new.globals, target): (target, self._targets[target.id])
                for target in new.targets.values()
            },
        )
        table = self.server.sessions
        table.max_sessions = new.globals.max_sessions
        self._swap_portals(old, new, prepared)
        self.controller.swap(new, prepared.controller)
        leaving = [session for session in table.sessions.values() if session.target in gone]
        if not new.service_enabled:
            leaving = list(table.sessions.values())
        if leaving:
            self._keep_running(self._log_out(leaving, "target removed" if new.service_enabled else "stopped"))
        for channel in self.server.channels:
            channel.connection.io_timeout_s = new.globals.io_timeout_s
            channel.connection.nop_interval_s = new.globals.nop_in_interval_s
        self.server.flush_stirred()
        return retired

    def _swap_extents(
        self,
        old: Configuration,
        new: Configuration,
        changes: Mapping[Collection, Change],
        prepared: _Prepared,
    ) -> list[Backend]:
        retired: list[Backend] = []
        change = changes.get("extents")
        if change is None:
            return retired
        for id in change.removed:
            live = self._extents.pop(id)
            live.lane.close()
            if live.backend is not None:
                retired.append(live.backend)
        for extent in change.written.values():
            assert isinstance(extent, Extent)
            live_or_none = self._extents.get(extent.id)
            backend = prepared.backends.get(extent.id)
            if live_or_none is None:
                self._extents[extent.id] = self._new_extent(extent, backend)
                continue
            live = live_or_none
            if backend is not None and live.backend is not None:
                retired.append(live.backend)
            live.rekey(_renamed_keys(old, live.extent, new, extent))
            live.update(extent, backend or live.backend)
        return retired

    def _new_extent(self, extent: Extent, backend: Backend | None) -> LiveExtent:
        lane = Lane(self._completions, f"extent-{extent.id}")
        reservations = Reservations(self._kept.get(f"{extent.id}/{RESERVATIONS_KEPT_AS}"))
        live = LiveExtent(extent, backend, lane, reservations, self._make_unit)
        if backend is None:
            live.missing = "not found when the daemon started"
        return live

    def _make_unit(self, live: LiveExtent, config: UnitConfig) -> LogicalUnit:
        prefix = f"{live.extent.id}/"
        unit = LogicalUnit(
            config,
            live.backend,
            live.lane,
            reservations=live.reservations,
            now=time.time,
            keep=lambda what, value, done: self._keep(prefix + what, value, done),
            kept={
                key.removeprefix(prefix): value for key, value in self._kept.items() if key.startswith(prefix)
            },
        )
        unit.deliver = self.server.deliver
        unit.aborted = forget_aborted
        for sibling in live.units.values():
            unit.share_medium(sibling)
        live.reservations.units.add(unit)
        sanitize.resume(unit)
        return unit

    def _keep(self, key: str, value: bytes, done: Callable[[Exception | None], None]) -> None:
        """Store what an initiator asked to have kept; ``done`` on the loop when it is durable."""

        async def put() -> None:
            try:
                await self._store.put(KEPT, key, value)
            except StoreError as error:
                log.error("could not keep %s: %s", key, error)
                done(error)
            else:
                self._kept[key] = value
                done(None)
            self.server.flush_stirred()

        self._keep_running(put())

    def _swap_targets(
        self, old: Configuration, new: Configuration, changes: Mapping[Collection, Change]
    ) -> list[ScsiTarget]:
        """Bring targets and their LUN maps in line; returns the targets that are gone.

        Only what the change touches is looked at: with a thousand targets all of them would cost more
        than the rest of the change together.
        """
        gone = []
        targets, extents = _touched(old, new, changes)
        for id in targets:
            scsi = self._targets.get(id)
            target = new.targets.get(id)
            units = {}
            if target is not None:
                for mapping in mappings_by_target(new).get(id, ()):
                    extent = new.extents[mapping.extent_id]
                    units[mapping.lun] = self._extents[extent.id].unit(unit_key(extent, target, mapping))
            if scsi is not None:
                for request in scsi.replace_luns(units):
                    forget_aborted(request)
                if target is None:
                    gone.append(self._targets.pop(id))
            elif target is not None:
                name = full_name(new.globals, target)
                self._targets[id] = ScsiTarget(name, units, lane=self._spare_lane, now=time.time)
        for id in extents & self._extents.keys():
            mappings = mappings_by_extent(new).get(id, ())
            self._extents[id].keep_units(
                {unit_key(new.extents[id], new.targets[m.target_id], m) for m in mappings}
            )
        return gone

    def _swap_portals(self, old: Configuration, new: Configuration, prepared: _Prepared) -> None:
        wanted = _wanted_addresses(new)
        for address in list(self.server.listeners):
            if address not in wanted:
                self.server.unlisten(address)
            else:
                sock, _ = self.server.listeners[address]
                self.server.listeners[address] = (sock, wanted[address])
        for address, sock in prepared.sockets.items():
            self.server.listen(address, sock, wanted[address])
            log.info("portal %d listens on %s", wanted[address], address)

    # -- sessions -----------------------------------------------------------------------------

    async def _log_out(self, sessions: list[Session], reason: str, *, wait: bool = False) -> None:
        """Ask initiators to log out; those that do not within LOGOUT_S are dropped."""
        table = self.server.sessions
        for session in sessions:
            for connection in list(session.connections.values()):
                connection.now = self._loop.time()
                connection.request_logout(LOGOUT_S, reason)
        self.server.flush_stirred()
        deadline = self._loop.time() + LOGOUT_S
        while any(session.id in table.sessions for session in sessions):
            if self._loop.time() >= deadline:
                for session in sessions:
                    table.end(session, reason)
                self.server.flush_stirred()
                return
            await asyncio.sleep(0.05)

    def _session_ended(self, session: Session) -> None:
        self.server.counters.session_ended(session)
        log.info(
            "%s left %s: %s",
            session.initiator_name,
            session.grant.target_name or "discovery",
            session.ended,
        )
        self._announce("session.end", id=session.id, initiator=session.initiator_name, reason=session.ended)

    # -- housekeeping -------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        """Once a second on the loop."""
        if now >= self._next_backend_tick:
            self._next_backend_tick = now + TICK_INTERVAL_S
            for live in self._extents.values():
                if live.backend is not None:
                    live.backend.tick()
        if now >= self._next_retry and not self._stopping:
            self._next_retry = now + RETRY_MISSING_S
            for live in self._extents.values():
                if live.backend is None:
                    self._look_for(live)

    def _existing(self, extent: Extent) -> ExtentSpec:
        """An extent's medium as it must be there already: nothing is created."""
        return replace(spec_of(extent, self._pools), create=False)

    async def look_again(self, path: str = "") -> None:
        """See ``Engine.look_again``. A medium that does not answer is waited for on its own lane only."""
        found = [live for live in self._extents.values() if path in ("", live.extent.path)]
        await asyncio.gather(*(self._refresh(live) for live in found if live.backend is not None))
        self.server.flush_stirred()

    def _refresh(self, live: LiveExtent) -> asyncio.Future[None]:
        backend, over = live.backend, self._loop.create_future()
        assert backend is not None

        def work() -> None:
            try:
                backend.refresh()
            except OSError as error:
                log.error("extent %s: %s", live.extent.name, error)

        def done(_: None) -> None:
            if live.backend is backend and self._extents.get(live.extent.id) is live:
                live.update(live.extent, backend)
            if not over.done():
                over.set_result(None)

        live.lane.run(work, done)
        return over

    def _look_for(self, live: LiveExtent) -> None:
        """A medium was missing: perhaps it is back."""
        extent = live.extent

        def work() -> Backend | OSError | ValueError:
            try:
                return open_backend(self._existing(extent))
            except (OSError, ValueError) as error:
                return error

        def done(result: Backend | OSError | ValueError) -> None:
            if isinstance(result, Backend):
                if live.backend is None and self._extents.get(extent.id) is live and live.extent is extent:
                    log.info("extent %s: its medium is back", extent.name)
                    self._announce("extent.ready", id=extent.id, name=extent.name)
                    live.missing = ""
                    live.update(extent, result)
                else:
                    live.lane.run(result.close, lambda _: None)
            else:
                live.missing = str(result)

        live.lane.run(work, done)

    def _keep_running(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._housekeeping.add(task)
        task.add_done_callback(self._housekeeping.discard)

    # -- events -------------------------------------------------------------------------------

    def _note(self, kind: str, what: Any) -> None:
        """The server tells of a login or a refusal."""
        if isinstance(what, LoginFailure):
            self._failures.append(what)
            self._announce(kind, **asdict(what))
        elif isinstance(what, Session):
            self._announce(
                kind, id=what.id, initiator=what.initiator_name, target=what.grant.target_name or None
            )

    def _announce(self, kind: str, **data: Any) -> None:
        if not self._subscribers:
            return
        event = Event(kind, time.time(), data)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
                self._events_lost += 1
            queue.put_nowait(event)


def _wanted_addresses(config: Configuration) -> dict[str, int]:
    """Address → portal id of everything to listen on."""
    if not config.service_enabled:
        return {}
    return {address: portal.id for portal in config.portals.values() for address in portal.addresses}


def _touched(
    old: Configuration, new: Configuration, changes: Mapping[Collection, Change]
) -> tuple[set[int], set[int]]:
    """Ids of the targets and of the extents whose LUN maps a change may have altered."""
    targets: set[int] = set()
    extents: set[int] = set()
    for collection, change in changes.items():
        ids = {*change.written, *change.removed}
        if collection == "targets":
            targets |= ids
        elif collection == "extents":
            extents |= ids
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


def _renamed_keys(
    old: Configuration, before: Extent, new: Configuration, extent: Extent
) -> dict[UnitKey, UnitKey]:
    """How the units of an extent are keyed now, where its own fields changed the key."""
    renamed = {}
    for mapping in mappings_by_extent(new).get(extent.id, ()):
        target = old.targets.get(mapping.target_id)
        if target is not None:
            was, now = unit_key(before, target, mapping), unit_key(extent, target, mapping)
            if was != now:
                renamed[was] = now
    return renamed


def _flush_and_close(backend: Backend) -> None:
    try:
        if backend.capabilities.writable:
            backend.flush()
    finally:
        backend.close()


def _retire(backends: Sequence[Backend], doomed: Sequence[Path]) -> None:
    """On a worker: let go of media that nobody exports any more."""
    for backend in backends:
        try:
            _flush_and_close(backend)
        except OSError as error:
            log.error("a removed extent could not be flushed: %s", error)
    for path in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s could not be deleted: %s", path, error.strerror)


def _unit_statistics(
    live: LiveExtent, unit: LogicalUnit, luns: tuple[tuple[str, int], ...], latency: Latency
) -> UnitStatistics:
    commands: dict[str, int] = {}
    for opcode, count in enumerate(unit.commands):
        if count:
            name = command_name(opcode)
            commands[name] = commands.get(name, 0) + count
    failures: dict[tuple[str, str], int] = {}
    for (opcode, status), count in unit.failures.items():
        key = command_name(opcode), status_name(status)
        failures[key] = failures.get(key, 0) + count
    return UnitStatistics(
        extent_id=live.extent.id,
        extent=live.extent.name,
        luns=luns,
        commands=commands,
        failures=failures,
        reads=unit.reads,
        writes=unit.writes,
        bytes_read=unit.bytes_read,
        bytes_written=unit.bytes_written,
        read_errors=unit.read_errors,
        write_errors=unit.write_errors,
        in_flight=len(unit.tasks),
        queued=live.lane.depth,
        ready=unit.medium_present,
        latency=latency,
    )


def _status(session: Session, targets: Mapping[int, int], now: float) -> SessionStatus:
    connections: list[Connection] = list(session.connections.values())
    target = session.target
    negotiated = dict(session.keys.as_dict())
    for connection in connections[:1]:
        negotiated |= connection.keys.as_dict()
    last_heard = max((connection.last_heard for connection in connections), default=session.created_at)
    return SessionStatus(
        id=session.id,
        initiator_name=session.initiator_name,
        initiator_alias=session.initiator_alias,
        target_id=targets.get(id(target)) if target is not None else None,
        target_name=session.grant.target_name,
        target_portal_group_tag=session.grant.target_portal_group_tag,
        isid=f"0x{session.isid.hex()}",
        tsih=session.tsih,
        user=session.user,
        connections=tuple(
            ConnectionStatus(
                cid=cid,
                peer_address=connection.owner.peer,
                local_address=connection.owner.local,
                header_digest="CRC32C" if connection.keys.header_digest else "None",
                data_digest="CRC32C" if connection.keys.data_digest else "None",
            )
            for cid, connection in session.connections.items()
        ),
        negotiated=negotiated,
        luns=tuple(target.luns) if target is not None else (),
        commands=session.commands,
        bytes_read=session.bytes_read,
        bytes_written=session.bytes_written,
        age_s=now - session.created_at,
        idle_s=now - last_heard,
    )
