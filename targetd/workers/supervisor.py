"""The ``Engine`` over worker processes.

The front is a ``Runtime`` too, over all of the configuration but targets and extents: so it has the portals,
the discovery sessions and the logical unit controller. What is asked of the engine is asked of the workers
that it concerns and put together here, with no difference to the reader.

A change (``apply``) has two phases. Every worker that it touches prepares its share, and says so; then the
front binds its ports and saves all of it, once; then all put it in force. Whatever fails before it is saved,
everybody undoes. What is saved is in force: a worker that ends at that moment is started with it.

Changes, moves and (re)starts of workers are under one lock, so that what a worker begins with and what it is
told next always fit together.
"""

import asyncio
import itertools
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from protocol.access import Refusal
from protocol.enums import LoginStatus
from protocol.events import End, EndReason
from protocol.limits import DATA_MEMORY
from targetd.config import (
    WHOLE,
    ConfigError,
    Configuration,
    diff,
    full_name,
    mappings_by_target,
    target_named,
    validate,
)
from targetd.engine.allocation import SpaceOfChange
from targetd.engine.media import OwnFiles
from targetd.engine.runtime import KEPT_FAILURES, Runtime
from targetd.interface import (
    Edit,
    Event,
    Explanation,
    LoginFailure,
    LunStatus,
    PortalStatistics,
    ServiceState,
    SessionStatus,
    Statistics,
    Work,
)
from targetd.net.access import AccessSnapshot
from targetd.net.admission import Admission
from targetd.net.inherited_sockets import Listeners
from targetd.net.loop import Loop
from targetd.persistence.interface import UNITS, Persistence, Records, StoreError
from targetd.workers.handle import (
    Change,
    Owner,
    WorkerError,
    WorkerGoneError,
    WorkerHandle,
    WorkerSilentError,
    status_in_words,
)
from targetd.workers.handover import FrontSessions, LoginChannel
from targetd.workers.merge import Counted, merged, with_base
from targetd.workers.messages import Adopt, Delta, Persist, Start
from targetd.workers.placement import Move, Placement, Plan, coming, leaving, share_of_front
from targetd.workers.quota import SessionQuota, make_file
from targetd.workers.rivals import Rivals

__all__ = ["Supervisor"]

log = logging.getLogger("targetd.workers")

RESTART_PATIENCE_S = 10.0
"""How long a change waits for a worker that is being started again."""
STEADY_S = 60.0
"""A worker that has lived for so long is started again at once when it ends."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before it is started again otherwise: doubled each time."""
ANSWER_S = 10.0
"""How long a question may take; a worker that is later counts as not there."""
WATCH_S = 10.0
"""How often workers are asked for a sign of life."""
HUNG = 6
"""So many times without any in between, and a worker is ended: its initiators have given it up by then."""
SOON_S = 1.0
"""How long a change waits for workers that it does not concern."""
ADOPT_S = 30.0
"""How long a medium may take to be opened that an operator puts in place of another."""
STOP_S = 8.8
"""How long workers may take to stop, who wait 3 s for initiators and 5 s for media; the daemon has 10 s in
all (design.md §2)."""


class _Saver:
    """``Persistence`` of the front's own Runtime: with its share, all of the configuration is saved."""

    def __init__(self, store: Persistence) -> None:
        self._store = store
        self.whole = Configuration(), Configuration()
        """(the old, the new) of the change under way."""

    async def save(self, old: Configuration, new: Configuration) -> None:
        await self._store.save(*self.whole)

    async def put(self, namespace: str, key: str, value: bytes | None) -> None:
        await self._store.put(namespace, key, value)

    async def items(self, namespace: str) -> dict[str, bytes]:
        return {}  # the front has no logical units


class Supervisor(Owner):
    """Implements ``targetd.interface.Engine`` over worker processes."""

    def __init__(
        self,
        store: Persistence,
        extent_roots: Sequence[Path],
        loop: Loop,
        pools: Mapping[str, Path],
        workers: int,
        log_level: str,
        log_format: str,
        listeners: Listeners | None = None,
        io_engine: str = "auto",
        own_files: OwnFiles | None = None,
        data_memory: int = DATA_MEMORY,
    ) -> None:
        """Starts the processes; they load while other things are made ready."""
        self._data_memory = data_memory // workers
        self._store = store
        self._loop = loop
        self._extent_roots = tuple(extent_roots)
        self._pools = {name: str(directory) for name, directory in pools.items()}
        self._own_files = own_files or OwnFiles()
        self._log_level, self._log_format = log_level, log_format
        self._io_engine = io_engine
        self._lock = asyncio.Lock()
        self._config = Configuration()
        self._view = AccessSnapshot(self._config, {})
        self._kept = Records()
        self._numbers = itertools.count(1)
        self._failures: deque[LoginFailure] = deque(maxlen=KEPT_FAILURES)
        self._base: dict[int, PortalStatistics] = {}
        """What workers that have ended had counted."""
        self._moving: set[int] = set()
        """Targets between two workers."""
        self._parked: list[tuple[LoginChannel, int]] = []
        """Logins that wait until a move is over."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._shares = Placement(workers)
        self._seats_file = make_file(workers)
        self._seats = SessionQuota(self._seats_file, workers)
        self._saver = _Saver(store)
        self.front = Runtime(
            *(self._saver, extent_roots, loop, pools),
            sessions=FrontSessions(self._numbers),
            listeners=listeners,
            own_files=own_files,
            io_engine="threads",  # it has no media
        )
        self.front.controller.engine = self
        self.front.server.view = lambda: self._view
        self.front.server.channel = partial(LoginChannel, obstacle=self._obstacle, hand_over=self._hand_over)
        self._rivals = Rivals(self._of_all_soon, self._withhold, pools)
        self._members = {
            index: WorkerHandle(self, index, loop, self._seats_file) for index in range(1, workers + 1)
        }
        for member in self._members.values():
            member.spawn(self._start_of(member))

    def _start_of(self, member: WorkerHandle) -> Start:
        roots = tuple(map(str, self._extent_roots))
        return Start(
            *(member.index, len(self._members), roots, self._pools, _paths(self._own_files)),
            *(self._log_level, self._log_format, self._io_engine, self._data_memory),
        )

    def _keep_running(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- start and end ------------------------------------------------------------------------

    async def start(self, config: Configuration, *, first: bool = False) -> None:
        """Bring up a stored configuration, as ``Runtime.start`` does.

        Raises:
            ConfigError: it is the first, and a portal cannot be bound; nothing listens then.
        """
        self._kept = Records(await self._store.items(UNITS))
        empty = Configuration()
        changes = diff(empty, config)
        self._shares.carried_out(self._shares.plan(empty, config, changes), changes)
        self._in_force(config)
        await asyncio.gather(*map(self._begin, self._members.values()))
        await self._rivals.settle()
        self._keep_running(self._tell_of_portals())
        self._keep_running(self._watch())
        await self.front.start(share_of_front(config), first=first)
        for member in self._present():  # only now: a start that fails is one line
            member.tell_that_it_serves()

    def tell_io_engine(self) -> None:
        """Workers do so by themselves."""

    def settle(self) -> None:
        """Workers do so by themselves."""
        self.front.settle()

    async def _begin(self, member: WorkerHandle) -> None:
        """Have a fresh process bring up its share. Under the lock, or before there is anyone else."""
        kept = self._kept.items_of(id for id, index in self._shares.extents.items() if index == member.index)
        try:
            await member.ask("take_over", self._shares.whole(self._config, member.index), kept, {}, True)
        except WorkerGoneError:
            pass  # what becomes of that is under way
        except WorkerError as error:
            log.error("worker process %d cannot begin: %s", member.index, error)
            await member.end()
        else:
            member.ask("absent", dict(self.front.portals.absent))
            member.up.set()

    async def _tell_of_portals(self) -> None:
        """SendTargets of a worker's session leaves out what is not listened on, too."""
        async for event in self.front.events():
            if event.kind.startswith("portal."):
                for member in self._present():
                    member.ask("absent", dict(self.front.portals.absent))

    async def stop(self) -> None:
        """As ``Runtime.stop``, of all processes at once."""
        self._stopping = True
        await asyncio.gather(self.front.stop(), *map(self._stop_member, self._members.values()))

    async def _stop_member(self, member: WorkerHandle) -> None:
        try:
            await asyncio.wait_for(member.ask("stop"), STOP_S)
        except (WorkerGoneError, WorkerError, TimeoutError) as error:
            log.error("worker process %d does not stop in an orderly way: %s", member.index, error or "late")
            await member.end()
        else:
            await member.end(0.5)

    def set_logs(self, level: str, style: str) -> None:
        """Of the workers."""
        self._log_level, self._log_format = level, style
        for member in self._members.values():
            member.ask("logs", level, style)

    @property
    def extent_roots(self) -> tuple[Path, ...]:
        """Where File extents may live; from the next change on."""
        return self._extent_roots

    @extent_roots.setter
    def extent_roots(self, roots: tuple[Path, ...]) -> None:
        self._extent_roots = roots
        for member in self._members.values():
            member.ask("extent_roots", tuple(map(str, roots)))

    @property
    def own_files(self) -> OwnFiles:
        """What no extent may have; from the next change on."""
        return self._own_files

    @own_files.setter
    def own_files(self, own_files: OwnFiles) -> None:
        self._own_files = self.front.own_files = own_files
        for member in self._members.values():
            member.ask("own_files", _paths(own_files))

    # -- workers that end ---------------------------------------------------------------------

    def ended(self, member: WorkerHandle) -> None:
        for visitor, _ in member.visitors.values():
            self.front.server.connection_limiter.leave(visitor)
        member.visitors.clear()
        self._seats.forget(member.index)
        sessions, member.sessions = member.sessions, {}
        for id, initiator in sessions.items():
            reason = f"its worker process {member.index} ended"
            self.front.announce("session.end", id=id, initiator=initiator, reason=reason)
        for portal in member.portals:
            self._base[portal.id] = with_base(portal, self._base.get(portal.id))
        member.portals = ()
        if not self._stopping:
            self._keep_running(self._revive(member, len(sessions)))

    async def _revive(self, member: WorkerHandle, sessions: int) -> None:
        """Start a worker again; if it ends again and again, ever later."""
        status = status_in_words(await member.end(patience_s=0.5))
        log.error(
            "worker process %d (process %d) has ended: %s; it had %d sessions",
            member.index,
            member.pid,
            status,
            sessions,
        )
        self.front.announce(
            "worker.end", worker=member.index, pid=member.pid, status=status, sessions=sessions
        )
        if self._loop.time() - member.started_at >= STEADY_S:
            member.pause_s = 0.0
        elif member.pause_s:
            log.warning("worker process %d is started again in %g s", member.index, member.pause_s)
            await asyncio.sleep(member.pause_s)
        member.pause_s = min(max(2 * member.pause_s, PAUSE_S), LONGEST_PAUSE_S)
        while not self._stopping:
            try:
                member.spawn(self._start_of(member))
                break
            except OSError as error:  # no memory, no process to be had
                log.error("worker process %d cannot be started: %s", member.index, error)
                await asyncio.sleep(LONGEST_PAUSE_S)
        else:
            return
        async with self._lock:
            await self._begin(member)
            await self._rivals.settle()
        if member.up.is_set():
            member.tell_that_it_serves()
            self.front.announce("worker.start", worker=member.index, pid=member.pid)

    def _present(self) -> list[WorkerHandle]:
        return [member for member in self._members.values() if member.up.is_set()]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self.watch()

    def watch(self) -> None:
        """Ask for signs of life; end who has given none for long."""
        for member in self._present():
            if member.unanswered >= HUNG:
                log.error("worker process %d does not react any more; it is ended", member.index)
                member.kill()
            else:
                member.unanswered += 1
                member.ask("alive")

    # -- connections --------------------------------------------------------------------------

    def owner(self, target_id: int) -> int:
        """The worker that a target lives in; KeyError: there is no such target."""
        return self._shares.targets[target_id]

    def _owner(self, target_id: int) -> WorkerHandle:
        return self._members[self._shares.targets[target_id]]

    def _obstacle(self, target_id: int) -> Refusal | None:
        """Why nobody can log in to a target at the moment. Initiators try again after this status."""
        if target_id in self._moving or self._owner(target_id).up.is_set():
            return None
        reason = f"worker process {self.owner(target_id)} of the target is being started again"
        return Refusal(LoginStatus.SERVICE_UNAVAILABLE, reason)

    def _hand_over(self, channel: LoginChannel, target_id: int) -> None:
        if target_id in self._moving:
            self._parked.append((channel, target_id))
            return
        owner = self._shares.targets.get(target_id)
        if owner is None or not self._members[owner].up.is_set():  # since it was asked; it comes again
            channel.drop(End(EndReason.TARGET_MOVED, "the target is not there any more"))
            return
        number = next(self._numbers)
        descriptor = channel.leave()
        adopt = Adopt(
            number,
            channel.portal_id,
            channel.peer,
            channel.local,
            channel.connection.in_login_since,
            bytes(channel.received),
            channel.answered,
        )
        self._members[owner].adopt(adopt, descriptor, channel.visitor, target_id)

    def logged_in(self, visitor: Admission) -> None:
        self.front.server.connection_limiter.logged_in(visitor)

    def left(self, visitor: Admission) -> None:
        self.front.server.connection_limiter.leave(visitor)

    def _connections(self, target_id: int) -> int:
        owner = self._shares.targets.get(target_id)
        if owner is None:
            return 0
        return Counter(target for _, target in self._members[owner].visitors.values())[target_id]

    # -- what units have kept -----------------------------------------------------------------

    def keep(self, member: WorkerHandle, request: Persist) -> None:
        self._keep_running(self._put(member, request))

    async def _put(self, member: WorkerHandle, request: Persist) -> None:
        try:
            await self._store.put(UNITS, request.key, request.value)
        except StoreError as error:
            log.error("could not keep %s: %s", request.key, error)
            member.kept(request, str(error))
        else:
            self._kept.update({request.key: request.value})
            member.kept(request, "")

    # -- changes ------------------------------------------------------------------------------

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
        """See ``Engine.apply``. It goes on to its end if who waits for it does not."""
        return await asyncio.shield(self._keep_running(self._apply(edit, discard_files, clone_of, force)))

    async def foresee(self, edit: Edit, *, force: bool = False) -> None:
        """See ``Engine.foresee``. Who is logged in is known to the workers, and not asked ahead."""
        async with self._lock:
            old = self._config
            new = edit(old)
            if new is not old:
                validate(new, old)
                await self._rivals.check(old, diff(old, new))
                await self.front.judge_change(old, new, force)

    async def _stand_still(self) -> None:
        """See ``Runtime.stand_still``."""
        await asyncio.gather(self.front.stand_still(), self._of_all("stand_still"))

    async def _apply(
        self, edit: Edit, discard_files: frozenset[int], clone_of: int | None, force: bool
    ) -> Configuration:
        async with self.front.allocations.of_change() as space:
            old, new = await self._apply_with(space, edit, discard_files, clone_of, force)
        if old.service_enabled and not new.service_enabled:
            await self._stand_still()
        return new

    async def _apply_with(
        self,
        space: SpaceOfChange,
        edit: Edit,
        discard_files: frozenset[int],
        clone_of: int | None,
        force: bool,
    ) -> tuple[Configuration, Configuration]:
        deadline = self._loop.time() + RESTART_PATIENCE_S
        while True:
            async with self._lock:
                old = self._config
                new = edit(old)
                if new is old:
                    return old, old
                validate(new, old)
                due = space.due(old, new) if clone_of is None else []
                if not due:
                    awaited = await self._try(old, new, discard_files, clone_of, force)
                    if not awaited:
                        return old, new
            if due:
                await self._rivals.check(old, diff(old, new))
                await space.take(due, old)
            else:
                await self._wait_for(awaited[0], deadline)

    async def _try(
        self,
        old: Configuration,
        new: Configuration,
        discard_files: frozenset[int],
        clone_of: int | None,
        force: bool,
    ) -> list[WorkerHandle]:
        """Carry out a change, unless workers must be waited for, which are returned; nothing was done then.
        Under the lock."""
        changes = diff(old, new)
        await self._rivals.check(old, changes)
        silent = frozenset(member.index for member in self._present() if member.silent_since is not None)
        plan = self._shares.plan(old, new, changes, self._connections, clone_of, silent)
        await self._ready(index for move in plan.moves for index in (move.source, move.destination))
        for move in plan.moves:
            await self._move(move)
        deltas = self._shares.deltas(old, new, changes, plan)
        await self._ready(deltas)
        absent = [self._members[index] for index in deltas if not self._members[index].up.is_set()]
        # One that is not there begins with what is in force then. Only media that are to be opened
        # now have to wait for it.
        awaited = [member for member in absent if deltas[member.index].written.get("extents")]
        if not awaited:
            await self._carry_out(new, plan, deltas, discard_files, clone_of, force)
            self.front.allocations.removed(old.extents.keys() - new.extents.keys())
            if self._rivals.any:
                await self._rivals.settle()
        return awaited

    async def _ready(self, indices: Iterable[int]) -> None:
        """See that workers that a change concerns can be told of it.

        Raises:
            ConfigError: one does not answer.
        """
        members = [self._members[index] for index in set(indices)]
        for result in await asyncio.gather(
            *(member.ready_for_change() for member in members if member.up.is_set()), return_exceptions=True
        ):
            if isinstance(result, WorkerSilentError):
                raise _silent(result)
            if isinstance(result, BaseException):
                raise result

    async def _wait_for(self, member: WorkerHandle, deadline: float) -> None:
        try:
            await asyncio.wait_for(member.up.wait(), max(deadline - self._loop.time(), 0.0))
        except TimeoutError:
            message = f"Worker process {member.index} is being started again; try again later."
            raise ConfigError.one("extents", WHOLE, message) from None

    async def _carry_out(
        self,
        new: Configuration,
        plan: Plan,
        deltas: Mapping[int, Delta],
        discard_files: frozenset[int],
        clone_of: int | None,
        force: bool,
    ) -> None:
        old, shares = self._config, self._shares
        work: dict[WorkerHandle, Change] = {}
        for index, delta in deltas.items():
            member = self._members[index]
            if not member.up.is_set():
                continue
            discarded = frozenset(id for id in discard_files if shares.extents.get(id) == index)
            cloned = clone_of if clone_of is not None and shares.extents.get(clone_of) == index else None
            work[member] = member.change(delta, discarded, cloned, force)
        try:
            await asyncio.gather(*(_prepared(member, change) for member, change in work.items()))
            self._saver.whole = old, new
            await self.front.carry_out(share_of_front(new))
        except BaseException:
            for member, change in work.items():
                if not change.prepared.done() or change.prepared.exception() is None:
                    member.decide(False)
            await _over(work)
            raise
        for member in work:
            member.decide(True)
        shares.carried_out(plan, diff(old, new))
        await _over(work)
        for member, change in work.items():
            if not change.over.done():
                log.error("%r was silenced while it carried out a change: it does so when it goes on", member)
            elif (error := change.over.exception()) is not None:
                log.error("%r did not carry out what was decided: %s", member, error)
        self._kept.forget(old.extents.keys() - new.extents.keys())
        self._in_force(new)
        self.front.announce_change(old, new)

    def _in_force(self, config: Configuration) -> None:
        self._config = config
        self._view = AccessSnapshot(config, {id: id for id in config.targets}, self.front.portals.absent)

    async def _move(self, move: Move) -> None:
        """Have a part of what is in force live elsewhere. Logins to it wait meanwhile."""
        config, part = self._config, move.part
        names = ", ".join(full_name(config.globals, config.targets[id]) for id in sorted(part.targets))
        log.log(
            logging.INFO if any(map(self._connections, part.targets)) else logging.DEBUG,
            "worker process %d hands on to %d: %s",
            move.source,
            move.destination,
            names or f"{len(part.extents)} extents",
        )
        source, destination = self._members[move.source], self._members[move.destination]
        self._moving |= part.targets
        states: Mapping[int, Any] = {}
        try:
            if source.up.is_set():
                states = await self._of_move(source, "hand_on", leaving(config, part))
        except (WorkerGoneError, WorkerError) as error:
            log.error("%s", error)
        self._shares.moved(move)
        kept = self._kept.items_of(part.extents)
        try:
            if destination.up.is_set():
                await self._of_move(destination, "take_over", coming(config, part), kept, states, False)
        except (WorkerGoneError, WorkerError) as error:
            log.error("%s", error)
        self._moving -= part.targets
        parked, self._parked = self._parked, []
        for channel, target_id in parked:
            if channel.fd >= 0:
                self._hand_over(channel, target_id)

    async def _of_move(self, member: WorkerHandle, what: str, *arguments: Any) -> Any:
        """One side of a move. A worker that falls silent in the middle is ended: were it to go on later, two
        would have the same media."""
        future = member.ask(what, *arguments)
        try:
            await member.attend(future)
        except WorkerSilentError:
            log.error("%r fell silent while it handed on or took over; it is ended", member)
            await member.end()
        return await future

    # -- questions ----------------------------------------------------------------------------

    async def _of_all(self, what: str, *arguments: Any) -> list[Any]:
        """The answers of all workers that are there."""
        answers = await asyncio.gather(*(self._ask(member, what, *arguments) for member in self._present()))
        return [answer for answer in answers if answer is not None]

    async def sanitize(self, extent_id: int, method: str, passes: int = 1) -> Work | str:
        """See ``Engine.sanitize``."""
        async with self._lock:  # the extent stays where it is
            owner = self._shares.extents.get(extent_id)
            if owner is None:
                return "The extent is not a LUN of any target."
            answer: Work | str | None = await self._ask(
                self._members[owner], "sanitize", extent_id, method, passes
            )
            return answer if answer is not None else "Its worker process does not answer; try again later."

    async def adopt_medium(self, extent_id: int) -> str:
        """See ``Engine.adopt_medium``."""
        async with self._lock:  # the extent stays where it is
            owner = self._shares.extents.get(extent_id)
            if owner is None:
                return "There is no such extent."
            member = self._members[owner]
            try:
                answered = member.ask("adopt_medium", extent_id)
                await asyncio.wait_for(member.attend(answered), ADOPT_S)
                answer: str = answered.result()
            except (WorkerGoneError, WorkerError, WorkerSilentError, TimeoutError):
                return "Its worker process does not answer; try again later."
            return answer

    async def look_again(self, path: str = "") -> None:
        """See ``Engine.look_again``: a medium may take its time to answer."""
        looking = (self._ask(member, "look_again", path, limit_s=ADOPT_S) for member in self._present())
        await asyncio.gather(*looking, return_exceptions=True)

    async def extent_statuses(self, extent_ids: Collection[int]) -> dict[int, str]:
        found = {
            id: "its worker process is being started again" if id in self._shares.extents else "ok"
            for id in extent_ids
        }
        asked: dict[int, list[int]] = {}
        for id in extent_ids:
            if id in self._shares.extents:
                asked.setdefault(self._shares.extents[id], []).append(id)
        for index, answer in zip(
            asked,
            await asyncio.gather(
                *(self._ask(self._members[index], "extent_statuses", ids) for index, ids in asked.items())
            ),
            strict=True,
        ):
            member = self._members[index]
            if answer is not None:
                member.statuses |= answer
                found |= answer
            elif member.silent_since is not None:
                found |= {id: _as_told(member, id) for id in asked[index]}
        return found

    async def _of_all_soon(self, what: str, *arguments: Any) -> list[Any]:
        """The answers of all workers that are there and at it: a change does not wait for one that hangs."""
        asked = [self._loop.create_task(self._ask(member, what, *arguments)) for member in self._present()]
        if asked:
            await asyncio.wait(asked, timeout=SOON_S)
        for late in asked:
            late.cancel()
        answers = [each.result() for each in asked if each.done() and each.exception() is None]
        return [answer for answer in answers if answer is not None]

    async def _withhold(self, extent_id: int, reason: str) -> None:
        owner = self._shares.extents.get(extent_id)
        if owner is not None:
            await self._ask(self._members[owner], "withhold", extent_id, reason)

    async def _settle_rivals(self) -> None:
        async with self._lock:
            await self._rivals.settle()

    async def _ask(self, member: WorkerHandle, what: str, *arguments: Any, limit_s: float = ANSWER_S) -> Any:
        """One worker's answer; None: it is not there, or does not answer."""
        if not member.up.is_set() or member.silent_since is not None:
            return None
        future = member.ask(what, *arguments)
        try:
            await asyncio.wait_for(member.attend(future), limit_s)
            return future.result()
        except (WorkerGoneError, WorkerSilentError):
            return None
        except TimeoutError:
            log.error("worker process %d does not answer (%s)", member.index, what)
            return None

    async def _ask_or_last(self, member: WorkerHandle, what: str) -> tuple[Any, float]:
        """One worker's answer, or its last one, and how old it is in seconds; None: there is neither."""
        answer = await self._ask(member, what)
        if answer is not None:
            member.said[what] = self._loop.time(), answer
            return answer, 0.0
        if member.silent_since is None or what not in member.said:
            return None, 0.0
        at, answer = member.said[what]
        return answer, self._loop.time() - at

    def portal_status(self, portal_id: int) -> str:
        return self.front.portal_status(portal_id)

    def service_state(self) -> ServiceState:
        return self.front.service_state()

    async def sessions(self) -> list[SessionStatus]:
        sessions = await self.front.sessions()
        for answer, age in await asyncio.gather(
            *(self._ask_or_last(member, "sessions") for member in self._present())
        ):
            sessions += [replace(each, told_s=age) for each in answer or ()] if age else answer or ()
        return sessions

    def _refuse_if_silent(self, session_id: int) -> None:
        """ConfigError if a session is one of a worker that does not answer."""
        for member in self._present():
            if session_id in member.sessions and member.silent_since is not None:
                error = WorkerSilentError(f"worker process {member.index} does not answer")
                raise _silent(error)

    async def drop(self, session_id: int, reason: str) -> bool:
        if await self.front.drop(session_id, reason):
            return True
        if any(await self._of_all("drop", session_id, reason)):
            return True
        self._refuse_if_silent(session_id)
        return False

    async def negotiate(self, session_id: int) -> bool:
        if await self.front.negotiate(session_id):
            return True
        if any(await self._of_all("negotiate", session_id)):
            return True
        self._refuse_if_silent(session_id)
        return False

    async def statistics(self) -> Statistics:
        own = await self.front.statistics()
        present = self._present()
        answers = await asyncio.gather(*(self._ask_or_last(member, "statistics") for member in present))
        counted = [
            Counted(member, answer, age)
            for member, (answer, age) in zip(present, answers, strict=True)
            if answer is not None
        ]
        for each in counted:
            if each.member.up.is_set():  # still
                each.member.portals = each.statistics.portals
        return merged(own, counted, self._base.values(), self._members.values())

    async def login_failures(self) -> list[LoginFailure]:
        await self._of_all("alive")  # what they had to tell before that has been told
        both = [*await self.front.login_failures(), *self._failures]
        return sorted(both, key=lambda failure: -failure.at)[:KEPT_FAILURES]

    async def explain(
        self, initiator_name: str, address: str, target: str = "", portal_id: int | None = None
    ) -> list[Explanation]:
        found: list[Explanation] = []
        for answer in await self._of_all("explain", initiator_name, address, target, portal_id):
            found += answer
        told = {each.target_id for each in found}
        found += [each for each in self._unexplained(target.lower(), portal_id) if each.target_id not in told]
        found = [self._behind_portal(each) for each in found]
        portals = {id: at for at, id in enumerate(self._config.portals)}
        targets = {id: at for at, id in enumerate(self._config.targets)}
        return sorted(
            found, key=lambda each: (portals.get(each.portal_id, 0), targets.get(each.target_id, 0))
        )

    def _behind_portal(self, explanation: Explanation) -> Explanation:
        """What a worker answers, who does not know whether the portal listens."""
        portal = self._config.portals.get(explanation.portal_id)
        if portal is None or not explanation.allowed or not (obstacle := self.front.portals.obstacle(portal)):
            return explanation
        reason = f"{explanation.reason}, but {obstacle}"
        return replace(explanation, allowed=False, reason=reason, authentication="", luns=())

    def _why_unexplained(self, target_id: int) -> str:
        """Why the worker of a target says nothing; empty: it does."""
        if (obstacle := self._obstacle(target_id)) is not None:
            return obstacle.reason
        silence_s = self._owner(target_id).silence_s
        return _silence(self.owner(target_id), silence_s) if silence_s else ""

    def _unexplained(self, wanted: str, portal_id: int | None) -> list[Explanation]:
        """What there is to say of targets whose worker is not there."""
        return [
            Explanation(
                portal_id=portal.id,
                portal_addresses=portal.addresses,
                target_id=target.id,
                target_name=full_name(self._config.globals, target),
                allowed=False,
                reason=obstacle,
                authentication="",
                discovered=False,
                luns=(),
            )
            for target in self._config.targets.values()
            if wanted in ("", full_name(self._config.globals, target), target.name.lower())
            and (obstacle := self._why_unexplained(target.id))
            for portal in self._config.portals.values()
            if portal_id in (None, portal.id)
        ]

    # -- what the logical unit controller asks for --------------------------------------------

    async def luns(self, target_name: str) -> Mapping[int, LunStatus] | None:
        """See ``Runtime.luns``. Of a worker that is not there no medium is present."""
        target = target_named(self._config, target_name)
        if target is None:
            return None
        answer: Mapping[int, LunStatus] | None = await self._ask(self._owner(target.id), "luns", target_name)
        if answer is not None:
            return answer
        return {
            mapping.lun: LunStatus(self._config.extents[mapping.extent_id].path, 0, present=False)
            for mapping in mappings_by_target(self._config).get(target.id, ())
        }

    async def reset_lun(self, target_name: str, lun: int) -> None:
        """See ``Runtime.reset_lun``."""
        await self._of_owner(target_name, "reset_lun", lun)

    async def load_lun(self, target_name: str, lun: int, loaded: bool) -> None:
        """See ``Runtime.load_lun``."""
        await self._of_owner(target_name, "load_lun", lun, loaded)

    async def _of_owner(self, target_name: str, what: str, *arguments: Any) -> None:
        target = target_named(self._config, target_name)
        if target is not None:
            await self._ask(self._owner(target.id), what, target_name, *arguments)

    # -- events -------------------------------------------------------------------------------

    def happened(self, event: Event) -> None:
        if event.kind == "login.refused":
            self._failures.append(LoginFailure(**event.data))
        elif event.kind == "extent.ready":  # a medium has come back: is it another's by now?
            self._keep_running(self._settle_rivals())
        self.front.announce(event.kind, **event.data)

    def events(self) -> AsyncIterator[Event]:
        return self.front.events()


def _paths(own_files: OwnFiles) -> tuple[str, ...]:
    """As ``Start`` has them."""
    if own_files.state_directory is None:
        return ()
    return tuple(map(str, (own_files.state_directory, *own_files.files)))


def _silence(index: int, seconds: float) -> str:
    return f"its worker process {index} has not answered for {seconds:.0f} s"


def _as_told(member: WorkerHandle, extent_id: int) -> str:
    """The status of an extent of a worker that does not answer."""
    last = member.statuses.get(extent_id)
    return _silence(member.index, member.silence_s) + (f"; before that: {last}" if last else "")


async def _over(work: Mapping[WorkerHandle, Change]) -> None:
    """Wait until it is, however it ends; not for who gives no sign of life."""
    await asyncio.gather(
        *(member.attend(change.over) for member, change in work.items()), return_exceptions=True
    )


async def _prepared(member: WorkerHandle, change: Change) -> None:
    """Wait until a worker has prepared a change.

    Raises:
        ConfigError: what kept it from that, as who asked for the change can read it.
        WorkerError: it has logged what.
    """
    try:
        await member.attend(change.prepared)
    except WorkerSilentError as error:
        raise _silent(error) from None
    try:
        change.prepared.result()
    except WorkerGoneError as error:
        raise ConfigError.one("extents", WHOLE, f"{error}; try again.") from None


def _silent(error: WorkerSilentError) -> ConfigError:
    message = f"{str(error).capitalize()}, and this concerns it: nothing was changed; try again later."
    return ConfigError.one("extents", WHOLE, message)
