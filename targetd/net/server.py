"""The asyncio side of the engine: listening sockets, connections, one timer. Knows no PDU format.

The event loop (``targetd.net.loop``) calls ``Channel.readable`` when bytes have come; in that one call they
are received, cut into PDUs, carried out as far as nothing has to wait, and answered. No task, no future and
no timer per connection or per PDU. What had to wait comes back through ``lanes.Completions``.

The receive buffer is one for the whole process: whatever is kept beyond a wake-up is copied out of it, so
an idle connection costs no buffer. A turn of a connection ends after so many bytes, or after ``TURN_S``
(``targetd.net.loop``) in the midst of them: PDUs that were received and not looked at then, and replies of
many PDUs that are made in pieces (``protocol.paced``), are for its next turns (``Channel.behind``).

Mapped memory is handed to ``sendmsg`` as it is. A page that can no longer be had (the file was truncated,
the disk fails) is EFAULT there: what the header promised cannot be sent any more, so that connection is
dropped, and the retry of the command meets the true error.
"""

import errno
import ipaddress
import itertools
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from protocol.access import Authorizer
from protocol.connection import Connection
from protocol.enums import LoginStatus
from protocol.events import End, EndReason, LoggedIn, LoggedOut, LoginRefused
from protocol.limits import LARGE_COMMAND, MAX_IN_FLIGHT
from protocol.scsi.request import Buffer, Outcome, Request
from protocol.session import SessionTable
from protocol.task import Task
from targetd.config import split_address
from targetd.interface import LoginFailure
from targetd.net.access import AccessSnapshot, PortalAuthorizer
from targetd.net.admission import Admission, ConnectionLimiter, Limits, neighbourhood
from targetd.net.counters import SAMPLED, Counters
from targetd.net.guesses import GuessLimiter
from targetd.net.loop import TURN_S, Loop, Turn
from targetd.system.logs import bind as bind_fields

__all__ = ["Channel", "LoginSnapshot", "Server", "bind", "bind_reason", "socket_address"]

log = logging.getLogger("targetd.iscsi")

TURN = 512 * 1024
"""Bytes received from one connection before the others get their turn."""

LONE = 96 + 4096
"""Bytes of a wake-up that may be all of what an initiator at depth 1 has to say: a command with digests and
with 4 KiB of data."""

HIGH_WATER = 4 * 1024 * 1024
"""Bytes that may wait for a peer that does not read, before we stop reading from it."""

IOV_MAX = 1024
"""Buffers that one ``sendmsg`` takes (Linux UIO_MAXIOV)."""

CLOSE_S = 5.0
"""How long a peer may take to read the last of what we say before its connection is closed."""

CLOSED = End(EndReason.CLOSED_BY_INITIATOR, "the initiator closed the connection")

ACCEPT_AT_ONCE = 2
"""Then those that are connected get their turn: one takes some 0.1 ms."""
BACKLOG = 1024
TICK_S = 1.0
PAUSE_S = 1.0
"""A tick is so late only where process or machine was stopped; what peers sent meanwhile is unread."""
DESCRIPTOR_PAUSE_S = 1.0
"""How long a listener rests when there are no file descriptors left."""


BIND_REASONS = {
    errno.EADDRINUSE: "is in use already",
    errno.EADDRNOTAVAIL: "is not an address of this host",
    errno.EACCES: "may not be bound by this user",
    errno.EAFNOSUPPORT: "is of a kind that this host does not have",
    errno.ENODEV: "is of an interface that this host does not have",
    errno.EDESTADDRREQ: "is link-local, and needs its interface behind it: fe80::1%eth0",
}


def bind_reason(error: OSError) -> str:
    """Why ``bind`` failed, as what is said of the address."""
    return BIND_REASONS.get(error.errno or 0, error.strerror or str(error))


def socket_address(host: str, port: int) -> tuple[Any, ...]:
    """What ``socket.bind`` takes for an IP address. A link-local one is nowhere without its zone, which is an
    interface (RFC 4007 §11); the kernel wants that as a number.

    Raises:
        OSError: ENODEV, the zone is no interface; EDESTADDRREQ, a link-local address without a zone.
    """
    if ":" not in host:
        return host, port
    address, _, zone = host.partition("%")
    scope = 0
    if zone:
        try:
            scope = int(zone) if zone.isascii() and zone.isdecimal() else socket.if_nametoindex(zone)
        except OSError:
            raise OSError(errno.ENODEV, f"no interface {zone}") from None
    elif ipaddress.IPv6Address(address).is_link_local:
        raise OSError(errno.EDESTADDRREQ, "a link-local address without its zone")
    return address, port, 0, scope


def bind(address: str, *, share_port: bool = False) -> socket.socket:
    """A listening socket for ``IP:PORT``; not yet accepting.

    Args:
        share_port: beside listeners of ours that have SO_REUSEPORT just now; it does not stay.

    Raises:
        OSError: the port is in use or the address cannot be had.
    """
    host, port = split_address(address)
    where = socket_address(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share_port)
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    except OSError:
        sock.close()
        raise
    return sock


@dataclass(frozen=True, slots=True)
class LoginSnapshot:
    """A connection whose login another process has begun to read."""

    since: float
    """When it was accepted, on the loop's clock."""
    received: bytes
    """All that has come."""
    answered: int
    """Bytes that were said to it, and would be said again."""


class Channel:
    """One TCP connection and its ``Connection``."""

    __slots__ = (
        "behind",
        "connection",
        "failed",
        "fd",
        "held",
        "large",
        "local",
        "number",
        "peer",
        "portal_id",
        "reading",
        "server",
        "sock",
        "visitor",
        "waiting",
        "writing",
    )

    def __init__(
        self,
        server: "Server",
        sock: socket.socket,
        peer: str,
        local: str,
        portal_id: int,
        visitor: Admission,
    ) -> None:
        self.server = server
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.local = local
        self.portal_id = portal_id
        self.visitor = visitor
        self.number = next(server.numbers)
        """Of this connection in this process, for the log."""
        visitor.evict = self.make_room
        self.failed = False
        """A refusal was told."""
        self.waiting: list[Buffer] = []
        """What the socket did not take yet."""
        self.writing = False
        self.reading = True
        self.behind = False
        """There is work for a turn though nothing has come."""
        self.large: list[Task] = []
        """READs of large data that may not have ended yet."""
        self.held: deque[Task] = deque()
        """Those that wait for room (``SessionTable.in_flight``), in order."""
        globals_ = server.view().configuration.globals
        self.connection = Connection(
            server.sessions,
            self.authorizer(),
            randomness=secrets.token_bytes,
            now=server.loop.time(),
            io_timeout_s=globals_.io_timeout_s,
            nop_interval_s=globals_.nop_in_interval_s,
            origin=neighbourhood(split_address(peer)[0]),
            owner=self,
        )
        self.connection.has_unread = self._has_unread
        self.connection.framer.pause = server.turn_is_over
        server.loop.serve(self.fd, self.readable, self._writable)

    def __repr__(self) -> str:
        return f"{self.peer} to {self.local}"

    def log(self, initiator: str = "", target: str = "") -> "logging.LoggerAdapter[logging.Logger]":
        """A logger whose lines name this connection, and whose it is as far as that is known."""
        session = self.connection.session
        if session is not None:
            initiator, target = session.initiator_name, session.grant.target_name
        named = {name: value for name, value in (("initiator", initiator), ("target", target)) if value}
        return bind_fields(log, connection=self.number, peer=self.peer, **named)

    def authorizer(self) -> Authorizer:
        """Who answers for this connection."""
        local_host, local_port = split_address(self.local)
        return PortalAuthorizer(
            self.server.view,
            self.portal_id,
            split_address(self.peer)[0],
            local_host,
            local_port,
            self.server.guesses,
            self.server.loop.time,
        )

    def readable(self) -> Turn:
        """Bytes have come, or its turn: one turn of this connection."""
        server = self.server
        connection = self.connection
        now = monotonic()
        server.turn_ends = now + TURN_S
        if self.behind and not self._catch_up(now):
            return self._more()
        target = connection.framer.receive_target()
        count = self._receive(server.receive_buffer, target)
        if not count:
            if self.held and self.fd >= 0:
                self._release()
            return self._more() if self.behind else Turn.OVER
        lone = count <= LONE
        if target is not None:
            home = min(count, len(target))
            connection.received_in_target(home, now)
            count -= home
        if count:
            connection.receive_data(server.receive_buffer[:count], now)
        server.unmeasured -= 1
        if server.unmeasured:
            if connection.events:
                self.carry_out()
            self.flush()
        else:
            self._measure(now)
        if server.sessions.stirred:
            server.flush_stirred()
        if self.behind or connection.framer.unread is not None:
            return self._more()
        if not lone:
            return Turn.MORE if self.reading and server.turn_is_over() else Turn.OVER
        session = connection.session
        return Turn(session is not None and not session.tasks and connection.was_alone(server.receive_buffer))

    def _catch_up(self, now: float) -> bool:
        """Do of what is behind what there is time for; whether what has come may be received then."""
        connection = self.connection
        if connection.paced:
            self._push()
        if self.fd < 0 or not self.reading or self.server.turn_is_over():
            return False
        if connection.unread:
            connection.go_on(now)
            self.carry_out()
            self.flush()
            if self.server.sessions.stirred:
                self.server.flush_stirred()
            return False
        return True

    def _more(self) -> Turn:
        """Whether it stands in the queue for another turn: not while it waits for the socket."""
        connection = self.connection
        self.behind = bool(connection.paced) or connection.unread
        if self.fd < 0 or not self.behind:
            return Turn.OVER
        can = (connection.unread and self.reading) or (connection.paced and not self.writing)
        return Turn.MORE if can else Turn.OVER

    def _has_unread(self) -> bool:
        """Whether there is something of this peer that will be received in its next turn."""
        if not self.reading:
            return False
        if self.connection.unread:
            return True
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _receive(self, view: memoryview, target: memoryview | None = None) -> int:
        """Receive into ``view``, or first into ``target`` (the rest of a long data segment goes where it
        belongs; what follows it goes into ``view``).

        Returns:
            Bytes; 0: there were none, or the connection is at its end and was dropped.
        """
        try:
            count = self.sock.recv_into(view) if target is None else self.sock.recvmsg_into((target, view))[0]
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.drop(End(EndReason.NETWORK, error.strerror or str(error)))
            return 0
        if not count:
            self.drop(CLOSED)
        return count

    def _measure(self, now: float) -> None:
        """Carry out and flush, and count how long the commands took that ended here."""
        server = self.server
        server.unmeasured = SAMPLED
        tasks = [event for event in self.connection.events if isinstance(event, Task)]
        self.carry_out()
        self.flush()
        session = self.connection.session
        if session is not None:
            elapsed_s = monotonic() - now
            for task in tasks:
                if session.tasks.get(task.initiator_task_tag) is not task and not task.aborted:
                    server.counters.took(task.unit, session, elapsed_s, SAMPLED)

    def resume(self, begun: LoginSnapshot) -> None:
        """Go on with what another process has begun. A login is answered by the same bytes however often it
        is read, as far as it was read there: what follows from a request alone."""
        connection = self.connection
        connection.in_login_since = begun.since
        connection.receive_data(begun.received, self.server.loop.time())
        connection.out = [*_without(connection.data_to_send(), begun.answered)]
        self.carry_out()
        self.flush()
        if self._more() == Turn.MORE:
            self.server.loop.again(self.fd)

    def carry_out(self) -> None:
        """Run what the connection has made ready."""
        connection = self.connection
        for event in connection.take_events():
            if event.__class__ is Task:
                if event.aborted or (event.length > LARGE_COMMAND and self._holds_back(event)):
                    continue
                outcome = event.unit.submit(event)
                if outcome is not None:
                    connection.complete(event, outcome)
                else:
                    event.started = connection.now
            else:
                _EVENTS[event.__class__](self, event)
        if connection.events:
            self.carry_out()

    def _holds_back(self, task: Task) -> bool:
        """Whether a large command has to wait for room for its reply; then it does, else it has it."""
        row = task.command
        if row is None or not row.reads:
            return False
        if self.held or not self._has_room(task):
            self.held.append(task)
            return True
        self.large.append(task)
        return False

    def _has_room(self, task: Task) -> bool:
        """What is being read, by whichever command, and what waits for the peer to take it."""
        large = self.large = [each for each in self.large if each.unit.has_in_hand(each)]
        taken = sum(map(len, self.waiting)) + sum(map(len, self.connection.out))
        taken += sum(each.length for each in large)
        session = self.connection.session
        most = self.server.sessions.in_flight(session) if session is not None else MAX_IN_FLIGHT
        return taken + min(task.length, most // 2) <= most

    def _release(self) -> None:
        """Go on with what was held back, as far as there is room. While the peer is not read from it waits:
        what it has said meanwhile may be an abort."""
        held = self.held
        while held and self.reading and not self.connection.unread:
            if not held[0].aborted and not self._has_room(held[0]):
                return
            task = held.popleft()
            if task.aborted:
                continue
            self.large.append(task)
            self._submit(task)
            self._push()

    def _submit(self, task: Task) -> None:
        """Run what was held back; ``task.connection`` may be another one meanwhile (TASK REASSIGN)."""
        task.started = monotonic()
        outcome = task.unit.submit(task)
        if outcome is not None:
            self.server.deliver(task, outcome)

    def flush(self) -> None:
        """Send what there is, and go on with what waited for that."""
        self._push()
        if self.held:
            self._release()

    def _push(self) -> None:
        """Send what there is; wait for the socket when it takes no more."""
        connection = self.connection
        out = self.waiting
        if not out:
            out = connection.data_to_send()
        elif not connection.paced:  # else the next piece is made when all before it is gone
            out += connection.data_to_send()
        if self.writing:
            self._judge_backlog()
            return
        if out:
            try:
                out = self._send(out)
            except OSError as error:
                reason = End(EndReason.NETWORK, error.strerror or str(error))
                if error.errno == errno.EFAULT:
                    words = "a page of the extent could not be read while its data was being sent"
                    reason = End(EndReason.MEDIUM, words)
                    self._doubt_media()
                self.waiting = []
                self.drop(reason)
                return
            self.waiting = out
            if out or self.writing or not self.reading or connection.paced:
                self._judge_backlog()
        if connection.closing and not self.waiting and not connection.paced:
            self.drop(connection.closing)

    def _doubt_media(self) -> None:
        """What is believed to be in memory is not: forget it, so that the retry goes and asks the medium."""
        session = self.connection.session
        if session is not None and session.target is not None:
            for unit in session.target.luns.values():
                if unit.backend is not None:
                    unit.backend.tick()

    def _send(self, out: list[Buffer]) -> list[Buffer]:
        """Returns what the socket did not take."""
        sendmsg = self.sock.sendmsg
        while out:
            batch = out if len(out) <= IOV_MAX else out[:IOV_MAX]
            try:
                sent = sendmsg(batch)
            except (BlockingIOError, InterruptedError):
                return out
            if sent == sum(map(len, out)):
                return []
            out = _without(out, sent)
        return out

    def _judge_backlog(self) -> None:
        """Wait for the socket while something waits for it; stop reading from a peer that lets too much
        wait, and go on when it has caught up."""
        connection = self.connection
        waiting = sum(map(len, self.waiting))
        if connection.paced:
            waiting += sum(map(len, connection.out))
        self.writing = bool(self.waiting)
        self.reading = waiting < HIGH_WATER
        self.server.loop.want(self.fd, read=self.reading, write=self.writing)
        if self._more() == Turn.MORE:
            self.server.loop.again(self.fd)

    def _writable(self) -> None:
        self.writing = False
        self._push()
        if self.held and self.fd >= 0:
            if self.reading and self.readable() == Turn.MORE and self.fd >= 0:
                self.server.loop.again(self.fd)
            self._release()

    def fail(self, initiator_name: str, target_name: str, status: str, reason: str) -> None:
        """Tell that there will be no session."""
        self.failed = True
        self.server.note(
            "login.refused",
            LoginFailure(
                at=time.time(),
                initiator_name=initiator_name,
                peer_address=self.peer,
                local_address=self.local,
                portal_id=self.portal_id,
                target_name=target_name,
                status=status,
                reason=reason,
            ),
        )

    def make_room(self) -> None:
        """Somebody else needs the place (``targetd.net.admission``)."""
        self.drop(End(EndReason.MADE_ROOM, "made room for another connection"))

    def drop(self, reason: End) -> None:
        """Close the socket; whatever was under way for it is forgotten."""
        if self.fd < 0:
            return
        self.server.loop.forget(self.fd)
        self.fd = -1
        self.waiting = []
        connection = self.connection
        connection.lost(reason)
        for task in self.held:  # not aborted: they wait to be reassigned, and how they end is kept
            if not task.aborted:
                self._submit(task)
        self.held.clear()
        self.server.gone(self, reason)
        self.sock.close()


def _logged_in(channel: Channel, event: LoggedIn) -> None:
    session = event.session
    channel.server.connection_limiter.logged_in(channel.visitor)
    if (
        session.target is not None
    ):  # discovery sessions, which nobody waits for, share their turns with logins
        channel.server.loop.promote(channel.fd)
    else:
        channel.server.connection_limiter.is_spare(channel.visitor)
    channel.log().info(
        "%s: %s logged in to %s%s",
        channel,
        session.initiator_name,
        session.grant.target_name or "discovery",
        f" as {session.user}" if session.user else "",
    )
    channel.server.note("session.login", session)


def _logged_out(channel: Channel, event: LoggedOut) -> None:
    """The end of the session tells it."""


def _login_refused(channel: Channel, event: LoginRefused) -> None:
    if event.status in _MOVED:
        channel.failed = True  # told here: nothing has failed
        channel.log(event.initiator_name, event.target_name).info(
            "%s: %s asks for %s: %s", channel, event.initiator_name, event.target_name, event.reason
        )
        channel.server.counters.refused(channel.portal_id, event.status)
        return
    channel.log(event.initiator_name, event.target_name).warning(
        "%s: login of %s to %s refused (%04Xh): %s",
        channel,
        event.initiator_name or "an initiator without a name",
        event.target_name or "discovery",
        event.status,
        event.reason,
        exc_info=event.bug,
    )
    channel.server.counters.refused(channel.portal_id, event.status)
    channel.fail(event.initiator_name, event.target_name, f"{event.status:04X}", event.reason)


_MOVED = (LoginStatus.TARGET_MOVED_TEMPORARILY, LoginStatus.TARGET_MOVED_PERMANENTLY)

_EVENTS: dict[type, Callable[[Channel, Any], None]] = {
    LoggedIn: _logged_in,
    LoggedOut: _logged_out,
    LoginRefused: _login_refused,
}


class Server:
    """All portals and all connections of the process."""

    def __init__(
        self,
        loop: Loop,
        view: Callable[[], AccessSnapshot],
        note: Callable[[str, Any], None],
        on_tick: Callable[[float], None],
        limits: Limits | None = None,
        sessions: SessionTable | None = None,
    ) -> None:
        """
        Args:
            view: what logins are judged by now.
            note: told of events worth telling others: (kind, what).
            on_tick: called once a second on the loop.
            limits: how many may be connected; by what this process may have, if not given.
            sessions: a table of its own, if not given.
        """
        self.loop = loop
        self.view = view
        self.note = note
        self.sessions = sessions or SessionTable()
        self.channels: set[Channel] = set()
        self.numbers = itertools.count(1)
        self.listeners: dict[str, tuple[socket.socket, int]] = {}
        """Address as configured → its socket and the id of its portal."""
        self.receive_buffer = memoryview(bytearray(TURN))
        self.counters = Counters()
        self.connection_limiter = ConnectionLimiter(limits or Limits.here())
        self.guesses = GuessLimiter()
        self.channel: Callable[[Server, socket.socket, str, str, int, Admission], Channel] = Channel
        """Makes the channel of a connection that was accepted."""
        self.turn_ends = 0.0
        """When the turn of the connection that is served now is over, by ``time.monotonic``."""
        self.unmeasured = SAMPLED
        """Wake-ups until one is measured."""
        self._on_tick = on_tick
        self._timer = loop.call_later(TICK_S, self._tick)

    def turn_is_over(self) -> bool:
        """Whether the connection that is served now has had its time."""
        return monotonic() >= self.turn_ends

    # -- portals ------------------------------------------------------------------------------

    def listen(self, address: str, sock: socket.socket, portal_id: int) -> None:
        """Begin to accept on a bound socket."""
        self.listeners[address] = (sock, portal_id)
        self.loop.add_reader(sock.fileno(), self._accept, sock, address)

    def unlisten(self, address: str) -> None:
        """Close a listener; connections made through it go on."""
        sock, _ = self.listeners.pop(address)
        self.loop.remove_reader(sock.fileno())
        sock.close()

    def _accept(self, listener: socket.socket, address: str) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors or no memory: the connections that are open come first.
                log.error("portal %s accepts nothing for a second: %s", address, error)
                self.loop.remove_reader(listener.fileno())
                self.loop.call_later(DESCRIPTOR_PAUSE_S, self._resume, listener, address)
                return
            visitor = self.connection_limiter.enter(str(peer[0]), self.loop.time())
            if visitor is None:
                self._turn_away(sock, peer, address)
                continue
            try:
                self._welcome(sock, peer, self.listeners[address][1], visitor)
            except OSError as error:
                self.connection_limiter.leave(visitor)
                sock.close()
                log.error("%s cannot be served: %s", _shown(peer), error)

    def _turn_away(self, sock: socket.socket, peer: tuple[Any, ...], address: str) -> None:
        """The doorkeeper's word: count it, and let the operator find the reason where those of logins are."""
        sock.close()
        portal_id = self.listeners[address][1]
        self.counters.dropped(portal_id, EndReason.TURNED_AWAY)
        if self.connection_limiter.telling:
            failure = LoginFailure(
                at=time.time(),
                initiator_name="",
                peer_address=_shown(peer),
                local_address=address,
                portal_id=portal_id,
                target_name="",
                status="",
                reason=self.connection_limiter.telling,
            )
            self.note("login.refused", failure)

    def _welcome(
        self, sock: socket.socket, peer: tuple[Any, ...], portal_id: int, visitor: Admission
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        timeout_s = self.view().configuration.globals.io_timeout_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * timeout_s)
        self.counters.portal(portal_id).accepted += 1
        channel = self.channel(self, sock, _shown(peer), _shown(sock.getsockname()), portal_id, visitor)
        self.channels.add(channel)

    def adopt(
        self,
        sock: socket.socket,
        peer: str,
        local: str,
        portal_id: int,
        visitor: Admission,
        begun: LoginSnapshot,
    ) -> None:
        """Serve a connection that another process has accepted and set up."""
        sock.setblocking(False)
        channel = Channel(self, sock, peer, local, portal_id, visitor)
        self.channels.add(channel)
        channel.resume(begun)

    def _resume(self, listener: socket.socket, address: str) -> None:
        if self.listeners.get(address, (None, 0))[0] is listener:
            self.loop.add_reader(listener.fileno(), self._accept, listener, address)

    # -- connections --------------------------------------------------------------------------

    def deliver(self, request: Request, outcome: Outcome) -> None:
        """A command ended after its wake-up (``LogicalUnit.deliver``)."""
        assert isinstance(request, Task)
        connection = request.connection
        started = getattr(request, "started", None)  # set when it did not end at once
        if started is not None:
            self.counters.took(request.unit, connection.session, self.loop.time() - started)
        connection.complete(request, outcome)
        self.sessions.stirred.add(connection)

    def flush_stirred(self) -> None:
        """Send for, and close, connections that something else than their own peer has moved."""
        stirred = self.sessions.stirred
        while stirred:
            channel = stirred.pop().owner
            if channel.fd >= 0:
                if channel.connection.events:
                    channel.carry_out()
                channel.flush()

    def gone(self, channel: Channel, reason: End) -> None:
        """A channel has closed."""
        self.channels.discard(channel)
        self.connection_limiter.leave(channel.visitor)
        self.counters.dropped(channel.portal_id, (channel.connection.closing or reason).reason)
        session = channel.connection.session
        if session is None:
            channel.log(*channel.connection.unfinished_login()[:2]).debug(
                "%s: closed before login: %s", channel, reason
            )
            if channel.connection.closing and not channel.failed:
                name, target, so_far = channel.connection.unfinished_login()
                why = str(channel.connection.closing)
                if name:
                    why = f"{why} before the login had ended ({so_far})"
                    channel.log(name, target).warning(
                        "%s: no login of %s to %s: %s", channel, name, target or "discovery", why
                    )
                channel.fail(name, target, "", why)
        elif not session.ended:  # the end of a session is told once, by whoever is told of it
            channel.log().info("%s: connection of %s closed: %s", channel, session.initiator_name, reason)

    def _tick(self) -> None:
        now = self.loop.time()
        late_s = now - self._timer.when()
        self.counters.lagged(late_s)
        if late_s > PAUSE_S:
            log.warning(
                "this process (or its machine) was stopped for %.1f s; nobody loses a session by that",
                late_s,
            )
            self.sessions.excuse(late_s)
            for channel in self.channels:
                channel.connection.excuse(late_s)
        self._timer = self.loop.call_later(TICK_S, self._tick)
        for channel in list(self.channels):
            connection = channel.connection
            connection.tick(now)
            if channel.held:  # room may have come by what no peer was told of, as the end of an aborted READ
                channel.flush()
            if connection.closing and now - connection.closing_since > CLOSE_S:
                channel.drop(connection.closing)
        self.sessions.tick(now)
        self._on_tick(now)
        self.flush_stirred()

    def close(self) -> None:
        """Close everything at once."""
        self._timer.cancel()
        for address in list(self.listeners):
            self.unlisten(address)
        for channel in list(self.channels):
            channel.drop(End(EndReason.STOPPED, "shutdown"))


def _without(out: list[Buffer], count: int) -> list[Buffer]:
    """``out`` but for its first ``count`` bytes."""
    index = 0
    while index < len(out) and count >= len(out[index]):
        count -= len(out[index])
        index += 1
    out = out[index:]
    if count:
        out[0] = memoryview(out[0])[count:]
    return out


def _shown(address: tuple[Any, ...]) -> str:
    """A socket address as ``host:port``, v6 in brackets, without its zone."""
    host = str(address[0]).partition("%")[0]
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
