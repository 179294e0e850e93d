"""One worker as the front sees it: its process, the link to it, the connections it has.

A member is *up* from when it has brought up its share until its link ends. Whatever was asked of it then and
is not answered fails with ``WorkerGoneError``.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetd.config import ConfigError
from targetd.interface import Event, PortalStatistics
from targetd.net.admission import Admission
from targetd.system.threads import run_in_thread
from targetd.workers.link import Link
from targetd.workers.messages import (
    Adopt,
    Answer,
    Ask,
    ConnectionClosed,
    Decide,
    Delta,
    EventRaised,
    LoggedIn,
    Persist,
    Persisted,
    Prepared,
    Start,
)

__all__ = ["Change", "Owner", "WorkerError", "WorkerGoneError", "WorkerHandle", "WorkerSilentError"]

log = logging.getLogger("targetd.workers")

SIGN_S = 0.8
"""How long a worker has for a sign of life. It answers between two pieces of work, however long that is, so
one that does not is stopped, or waits in a system call."""
SIGNS_APART_S = 0.5
"""Before one that was there a moment ago, and is still at it, is asked for another."""

KILL_S = 1.0
"""How long the end of a process that was killed is waited for."""


def _import_path() -> list[str]:
    """PYTHONPATH of a worker: what this process was given, without what means the current directory, from
    which a worker imports nothing (CWE-427; ``-P`` sees to the entry that ``-m`` makes). Where our packages
    are stands first, as it does here: in a checkout, or inside the installed ``iscsi_targetd``."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    home = str(Path(__file__).resolve().parents[2])
    return ([home] if sys.path[0] == home else []) + [path for path in given if path.startswith("/")]


class WorkerGoneError(Exception):
    """The worker ended before it could answer."""


class WorkerError(Exception):
    """Something went wrong in a worker, which has logged it."""


class WorkerSilentError(Exception):
    """The process is there, and gives no sign of life."""


@dataclass(slots=True)
class Change:
    """A change as one worker makes it."""

    prepared: asyncio.Future[None]
    """Done when it can be put in force; fails with why it cannot."""
    over: asyncio.Future[Any]


class Owner:
    """What a member tells; the fleet does something about it."""

    def logged_in(self, visitor: Admission) -> None:
        """A connection is through with its login."""
        raise NotImplementedError

    def left(self, visitor: Admission) -> None:
        """A connection is closed."""
        raise NotImplementedError

    def happened(self, event: Event) -> None:
        """Something for the event stream."""
        raise NotImplementedError

    def keep(self, member: "WorkerHandle", request: Persist) -> None:
        """Something is to be kept; answer with ``WorkerHandle.kept``."""
        raise NotImplementedError

    def ended(self, member: "WorkerHandle") -> None:
        """The link has ended."""
        raise NotImplementedError


class WorkerHandle:
    """One worker, over all the processes that it is one after the other."""

    def __init__(self, owner: Owner, index: int, loop: asyncio.AbstractEventLoop, seats: int) -> None:
        self.index = index
        self.up = asyncio.Event()
        self.pid = 0
        self.unanswered = 0
        """Times it was asked for a sign of life since it gave one."""
        self.starts = 0
        self.pause_s = 0.0
        """Before the next start."""
        self.started_at = 0.0
        self.visitors: dict[int, tuple[Admission, int]] = {}
        """Number of a connection → who it is for the doorkeeper, and the id of its target."""
        self.sessions: dict[int, str] = {}
        """Session id → initiator."""
        self.portals: tuple[PortalStatistics, ...] = ()
        """As it told last."""
        self.silent_since: float | None = None
        """When it was last heard, on the loop's clock, if it was asked for a sign of life and gave none."""
        self.said: dict[str, tuple[float, Any]] = {}
        """Question → when it was last answered, and how: shown while it is silent."""
        self.statuses: dict[int, str] = {}
        """Extent → its status, as it told last."""
        self._heard_at = 0.0
        self._owner = owner
        self._loop = loop
        self._seats = seats
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._change: Change | None = None

    def __repr__(self) -> str:
        return f"worker {self.index}"

    # -- the process --------------------------------------------------------------------------

    def spawn(self, start: Start) -> None:
        """Start the process, and say what it is. From the main thread, as the kernel ends it with the thread
        that made it (PR_SET_PDEATHSIG, prctl(2)); that takes about a millisecond (vfork)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        environment["PYTHONPATH"] = os.pathsep.join(_import_path())
        with theirs:
            arguments = ["worker", str(theirs.fileno()), str(self._seats), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "targetd", *arguments],
                pass_fds=(theirs.fileno(), self._seats),
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for the front alone
            )
        self.pid = self._process.pid
        self.starts += 1
        self.started_at = self._loop.time()
        self.unanswered = 0
        self._heard_at, self.silent_since = self.started_at, None
        self.said.clear()
        self.statuses.clear()
        self._link = Link(self._loop, ours, self._received, self._lost)
        self._link.send(start)

    def _lost(self) -> None:
        self.up.clear()
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_exception(WorkerGoneError(f"worker process {self.index} has ended"))
                future.exception()  # who waits for it is told; nobody has to
        self._owner.ended(self)

    def tell_that_it_serves(self) -> None:
        log.info("worker process %d serves (process %d)", self.index, self.pid)
        self.ask("tell_io_engine")

    def kill(self) -> None:
        """End the process; the end of the link tells what follows."""
        if self._process is not None:
            self._process.kill()

    async def end(self, patience_s: float = 0.0) -> int | None:
        """See to it that the process is gone; its exit status. None: not even SIGKILL ends it now, as where a
        disk does not answer; the kernel does when that lets go."""
        process = self._process
        if process is None:
            return None
        if self._link is not None:
            self._link.close()
        for limit_s in (patience_s, KILL_S):
            if limit_s:
                try:
                    return await run_in_thread(process.wait, limit_s)
                except subprocess.TimeoutExpired:
                    pass
            process.kill()
        return None

    # -- what it is told ----------------------------------------------------------------------

    def ask(self, what: str, *arguments: Any) -> asyncio.Future[Any]:
        """Ask for one of ``worker.SERVICES``.

        The future fails with ConfigError, WorkerError or MemberGoneError.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._link is None or self._link.closed:
            future.set_exception(WorkerGoneError(f"worker process {self.index} is not there"))
            future.exception()
            return future
        self._last += 1
        self._asked[self._last] = future
        self._link.send(Ask(self._last, what, arguments))
        return future

    async def attend(self, future: asyncio.Future[Any]) -> None:
        """Wait until something that was asked is answered, as long as the process gives signs of life.

        Raises:
            WorkerSilentError: it gives none; from then on at once, until it does.
        """
        while not future.done():
            if self.silent_since is not None:
                raise WorkerSilentError(f"worker process {self.index} does not answer")
            asked_at = self._loop.time()
            sign = self.ask("alive")
            await asyncio.wait((future, sign), timeout=SIGN_S, return_when=asyncio.FIRST_COMPLETED)
            if not future.done() and not sign.done() and self._heard_at < asked_at:
                if self.silent_since is None:
                    self.silent_since = self._heard_at
                    log.error(
                        "worker process %d (process %d) does not answer; what it said last is shown, and "
                        "changes that concern it are refused until it does",
                        self.index,
                        self.pid,
                    )
                continue
            await asyncio.wait((future,), timeout=SIGNS_APART_S)

    async def ready_for_change(self) -> None:
        """Wait until it has ended what it was told before and answers.

        Raises:
            WorkerSilentError: it does not.
        """
        await self.attend(self.ask("alive"))
        if self._change is not None:
            await self.attend(self._change.over)

    @property
    def silence_s(self) -> float:
        """For how long it has given no sign of life; 0: it answers, as far as is known."""
        return 0.0 if self.silent_since is None else self._loop.time() - self.silent_since

    def change(
        self, delta: Delta, discard_files: frozenset[int], clone_of: int | None, force: bool
    ) -> Change:
        """Begin a change; ``decide`` must follow, whatever becomes of it."""
        prepared: asyncio.Future[None] = self._loop.create_future()
        over = self.ask("change", delta, discard_files, clone_of, force)
        self._change = Change(prepared, over)

        def ended(future: asyncio.Future[Any]) -> None:
            if not prepared.done():
                error = future.exception() or WorkerError("a change was over before it was decided")
                prepared.set_exception(error)
                prepared.exception()

        over.add_done_callback(ended)
        return self._change

    def decide(self, commit: bool) -> None:
        """What becomes of the change."""
        if self._link is not None:
            self._link.send(Decide(commit))

    def kept(self, request: Persist, error: str) -> None:
        """Answer to a ``Persist``."""
        if self._link is not None:
            self._link.send(Persisted(request.number, error))

    def adopt(self, adopt: Adopt, descriptor: int, visitor: Admission, target_id: int) -> None:
        """Hand over a connection."""
        assert self._link is not None
        self.visitors[adopt.number] = visitor, target_id
        self._link.send(adopt, descriptor)

    # -- what it tells ------------------------------------------------------------------------

    def _received(self, message: object, descriptor: int) -> None:
        self.unanswered = 0
        self._heard_at = self._loop.time()
        if self.silent_since is not None:
            log.warning("worker process %d answers again, after %.1f s", self.index, self.silence_s)
            self.silent_since = None
        _RECEIVED[type(message)](self, message)

    def _answered(self, answer: Answer) -> None:
        future = self._asked.pop(answer.number)
        if future.done():
            return
        if answer.problems:
            future.set_exception(ConfigError(answer.problems))
        elif answer.failure:
            future.set_exception(WorkerError(f"worker process {self.index}: {answer.failure}"))
        else:
            future.set_result(answer.value)
            return
        future.exception()

    def _prepared(self, _: Prepared) -> None:
        if self._change is not None and not self._change.prepared.done():
            self._change.prepared.set_result(None)

    def _keep(self, request: Persist) -> None:
        self._owner.keep(self, request)

    def _logged_in(self, message: LoggedIn) -> None:
        self._owner.logged_in(self.visitors[message.number][0])

    def _gone(self, message: ConnectionClosed) -> None:
        self._owner.left(self.visitors.pop(message.number)[0])

    def _happened(self, message: EventRaised) -> None:
        event = message.event
        if event.kind == "session.login":
            self.sessions[event.data["id"]] = event.data["initiator"]
        elif event.kind == "session.end":
            self.sessions.pop(event.data["id"], None)
        self._owner.happened(event)


_RECEIVED: dict[type, Callable[[WorkerHandle, Any], None]] = {
    Answer: WorkerHandle._answered,
    ConnectionClosed: WorkerHandle._gone,
    EventRaised: WorkerHandle._happened,
    Persist: WorkerHandle._keep,
    LoggedIn: WorkerHandle._logged_in,
    Prepared: WorkerHandle._prepared,
}


def status_in_words(status: int | None) -> str:
    """An exit status as an operator reads it."""
    if status is None:
        return "it hangs in a system call"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
