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

__all__ = ["Change", "Owner", "WorkerError", "WorkerGoneError", "WorkerHandle"]

log = logging.getLogger("targetd.workers")

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
