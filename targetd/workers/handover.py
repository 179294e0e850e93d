"""How the front reads a login: as far as it must to know whose it is.

The very ``Connection`` that could serve it reads it, with an authorizer that judges as ever: discovery
sessions, logins that are refused and bytes that are no login are served here to their end. Where a target is
granted, nothing has been decided yet but that; ``HandOver`` takes the stack down, this ``Connection`` is
forgotten, and the worker reads the same bytes again. Text that is spread over several requests (C bit, RFC
7143 §6.2) was answered by then, with empty responses; the worker is told how many bytes that were.
"""

import socket
from collections.abc import Callable, Iterator

from protocol.access import Authorizer, Grant, Refusal, TargetList
from protocol.connection import Connection, Phase
from protocol.session import SessionTable
from targetd.net.admission import Admission
from targetd.net.loop import TURN_S, Turn
from targetd.net.server import Channel, Server

__all__ = ["FrontSessions", "LoginChannel"]

TURN = 64 * 1024
"""Bytes received at once from who has not logged in. A whole login has 1 KiB."""


class HandOver(BaseException):
    """This login is for a target of a worker. No error, but the way out of the middle of a PDU: what takes
    errors for bugs on that way lets it through."""

    def __init__(self, target_id: int) -> None:
        super().__init__(target_id)
        self.target_id = target_id


class _Gate:
    """An ``Authorizer`` that lets nobody in to a target here."""

    def __init__(self, inner: Authorizer, obstacle: Callable[[int], Refusal | None]) -> None:
        self._obstacle = obstacle
        self._inner = inner

    def discovery(self, initiator_name: str) -> Grant | Refusal:
        return self._inner.discovery(initiator_name)

    def target(self, initiator_name: str, target_name: str) -> Grant | Refusal:
        answer = self._inner.target(initiator_name, target_name)
        if isinstance(answer, Refusal):
            return answer
        assert isinstance(answer.target, int)
        obstacle = self._obstacle(answer.target)
        if obstacle is not None:
            return obstacle
        raise HandOver(answer.target)

    def send_targets(self, initiator_name: str, target_name: str | None) -> TargetList:
        return self._inner.send_targets(initiator_name, target_name)

    def chap_wait_s(self, user: str) -> float:
        return self._inner.chap_wait_s(user)

    def chap_judged(self, user: str, right: bool) -> None:
        self._inner.chap_judged(user, right)


class FrontSessions(SessionTable):
    """The discovery sessions; their ids are out of one series with those of the workers' sessions."""

    def __init__(self, numbers: Iterator[int]) -> None:
        super().__init__()
        self._numbers = numbers

    def new_id(self, connection: Connection) -> int:
        return next(self._numbers)


class LoginChannel(Channel):
    """A connection until it is known whose it is; a discovery session to its end."""

    __slots__ = ("_hand_over", "_obstacle", "answered", "handed", "received")

    def __init__(
        self,
        server: Server,
        sock: socket.socket,
        peer: str,
        local: str,
        portal_id: int,
        visitor: Admission,
        *,
        obstacle: Callable[[int], Refusal | None],
        hand_over: Callable[["LoginChannel", int], None],
    ) -> None:
        """
        Args:
            obstacle: target id → why nobody can log in to it at the moment.
            hand_over: takes the channel, and the id of the target that it is for.
        """
        self._obstacle = obstacle
        self._hand_over = hand_over
        self.received = bytearray()
        """All of the login so far."""
        self.answered = 0
        """Bytes queued as answers to that."""
        self.handed = False
        super().__init__(server, sock, peer, local, portal_id, visitor)
        self.connection.framer.pause = self._turn_is_over

    def _turn_is_over(self) -> bool:
        """A login, which has few PDUs, is read to its end: it may be for another process."""
        return self.connection.phase != Phase.LOGIN and self.server.turn_is_over()

    def authorizer(self) -> Authorizer:
        return _Gate(super().authorizer(), self._obstacle)

    def readable(self) -> Turn:
        connection = self.connection
        if connection.phase != Phase.LOGIN:
            self.received.clear()
            return super().readable()
        server = self.server
        now = server.loop.time()
        server.turn_ends = now + TURN_S
        view = server.receive_buffer[:TURN]
        count = self._receive(view)
        if not count:
            return Turn.OVER
        self.received += view[:count]
        if self.handed:
            return Turn.OVER
        try:
            connection.receive_data(view[:count], now)
        except HandOver as error:
            self.handed = True
            server.loop.want(self.fd, read=False, write=False)
            self._hand_over(self, error.target_id)
            return Turn.OVER
        self.answered += sum(map(len, connection.out))
        self.carry_out()
        self.flush()
        if server.sessions.stirred:
            server.flush_stirred()
        return self._more()

    def leave(self) -> int:
        """The connection goes elsewhere; its descriptor, which is the caller's from now on."""
        self.answered -= sum(map(len, self.waiting))
        self.server.loop.forget(self.fd)
        self.server.channels.discard(self)
        self.visitor.evict = None
        self.fd = -1
        return self.sock.detach()
