"""The logical unit controller's sockets, and what its commands do to the live engine.

One listener while ``toggleluc`` is on. Who is outside its networks is closed without a word; so is who
comes when there are enough already. A changed setting closes the clients that are there: they are asked
again by the new rules.
"""

import asyncio
import errno
import logging
import secrets
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from targetd.config import (
    GLOBALS,
    AuthChoice,
    ConfigError,
    Configuration,
    GlobalConfiguration,
    full_name,
)
from targetd.interface import LunStatus, SessionStatus
from targetd.luc.protocol import Conversation, Policy
from targetd.net.access import credentials_of, in_networks
from targetd.net.guesses import GuessLimiter
from targetd.net.server import bind, bind_reason

__all__ = ["ControllerServer", "Engine", "controller_address"]

log = logging.getLogger("targetd.luc")

IDLE_S = 60.0
"""A client that says nothing for so long is closed (api-semantics §8)."""
MAX_CLIENTS = 32
"""It is a tool of administrators: each of them may have several open."""
DEFAULT_NETWORK = "127.0.0.0/8 ::1"
"""Of ``luc_auth_network`` when it is empty; the v6 loopback is as local as v4's."""


class Engine(Protocol):
    """What of the runtime the controller needs."""

    @property
    def configuration(self) -> Configuration:
        """What is in force now."""

    def sessions(self) -> Awaitable[list[SessionStatus]]:
        """All sessions."""

    def luns(self, target_name: str) -> Awaitable[Mapping[int, LunStatus] | None]:
        """The logical units of a target; None: there is no such target."""

    def reset_lun(self, target_name: str, lun: int) -> Awaitable[None]:
        """LOGICAL UNIT RESET, if the unit is there."""

    def load_lun(self, target_name: str, lun: int, loaded: bool) -> Awaitable[None]:
        """Load or eject the medium, if the unit is there."""

    def look_again(self, path: str = "") -> Awaitable[None]:
        """Look at all media again."""


RETRY_S = 5.0
"""How often an address is tried again that could not be listened on at the start."""

_UNDER_WAY: set[asyncio.Future[None]] = set()
"""Held by somebody."""


def _keep(work: asyncio.Future[None]) -> None:
    _UNDER_WAY.add(work)
    work.add_done_callback(_UNDER_WAY.discard)


def controller_address(config: Configuration) -> tuple[str, int] | None:
    """Where the controller shall listen; None: nowhere."""
    g = config.globals
    if not (g.luc_enabled and config.service_enabled and g.luc_ip and g.luc_port):
        return None
    return g.luc_ip, g.luc_port


@dataclass(frozen=True, slots=True)
class _Rules:
    """What of the global configuration decides about clients."""

    networks: str
    method: AuthChoice
    group: int | None


def _rules(g: GlobalConfiguration) -> _Rules:
    return _Rules(g.luc_auth_network or DEFAULT_NETWORK, g.luc_auth_method or "CHAP", g.luc_auth_group)


class _Control:
    """``luc.Controller`` over the engine, for one client."""

    def __init__(self, engine: Engine, peer: str, guesses: GuessLimiter) -> None:
        self._engine = engine
        self._peer = peer
        self._guesses = guesses

    def policy(self) -> Policy:
        config = self._engine.configuration
        rules = _rules(config.globals)
        return Policy(rules.method, credentials_of(config, rules.method, rules.group))

    def targets(self) -> Sequence[str]:
        config = self._engine.configuration
        targets = sorted(config.targets.values(), key=lambda target: target.id)
        return [full_name(config.globals, target) for target in targets]

    def luns(self, target: str) -> Awaitable[Mapping[int, LunStatus] | None]:
        return self._engine.luns(target)

    def sessions(self) -> Awaitable[list[SessionStatus]]:
        return self._engine.sessions()

    def reset(self, target: str, lun: int) -> Awaitable[None]:
        log.warning("%s resets LUN %d of %s", self._peer, lun, target)
        return self._engine.reset_lun(target, lun)

    def load(self, target: str, lun: int, loaded: bool) -> Awaitable[None]:
        log.info("%s %s LUN %d of %s", self._peer, "loads" if loaded else "ejects", lun, target)
        return self._engine.load_lun(target, lun, loaded)

    def refresh(self) -> None:
        _keep(asyncio.ensure_future(self._engine.look_again()))

    def chap_wait_s(self, user: str) -> float:
        return self._guesses.wait_s(self._peer, user, monotonic())

    def chap_judged(self, user: str, right: bool) -> None:
        self._guesses.judged(self._peer, user, right, monotonic())

    def refused(self, reason: str) -> None:
        log.warning("login of %s to the logical unit controller refused: %s", self._peer, reason)


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: "ControllerServer") -> None:
        self._server = server
        self._conversation: Conversation | None = None
        self._transport: asyncio.Transport | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._answering = self._unread = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer, local = transport.get_extra_info("peername")[0], transport.get_extra_info("sockname")[0]
        if not self._server.welcome(self, peer):
            transport.abort()
            return
        self._conversation = Conversation(
            _Control(self._server.engine, peer, self._server.guesses), secrets.token_bytes, local, peer
        )
        transport.write(self._conversation.greeting)
        self._rest()

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)

    def data_received(self, data: bytes) -> None:
        conversation, transport = self._conversation, self._transport
        if conversation is None or transport is None or transport.is_closing():
            return
        self._answering = True
        self._read_or_rest()
        _keep(asyncio.ensure_future(self._answer(conversation, transport, data)))

    async def _answer(self, conversation: Conversation, transport: asyncio.Transport, data: bytes) -> None:
        """Nothing more is read until this is answered."""
        answer = await conversation.receive(data)
        self._answering = False
        if transport.is_closing():
            return
        transport.write(answer)
        if conversation.closing:
            transport.close()
        else:
            self._read_or_rest()
            self._rest()

    def _read_or_rest(self) -> None:
        """Who asks without reading the answers, or before there is one, is not asked for more."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._answering or self._unread:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._unread = True
        self._read_or_rest()

    def resume_writing(self) -> None:
        self._unread = False
        self._read_or_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._server.clients.discard(self)

    def close(self) -> None:
        """The end, with nothing more said."""
        if self._transport is not None:
            self._transport.abort()


class ControllerServer:
    """The listener and its clients."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.clients: set[_Client] = set()
        self.address: tuple[str, int] | None = None
        """Where it listens."""
        self._missing: tuple[str, int] | None = None
        """Where it would listen, and could not when it was started."""
        self._next_look = 0.0
        self.guesses = GuessLimiter()
        self._listener: asyncio.Server | None = None
        self._in_force: _Rules | None = None

    def welcome(self, client: _Client, peer: str) -> bool:
        """Whether to speak to a client; it is then one of ours."""
        if self.address is None:
            return False
        networks = _rules(self.engine.configuration.globals).networks
        if not in_networks(networks, peer):
            log.warning("%s may not speak to the logical unit controller: not in %s", peer, networks)
            return False
        if len(self.clients) >= MAX_CLIENTS:
            log.warning("%s: the logical unit controller has %d clients already", peer, MAX_CLIENTS)
            return False
        self.clients.add(client)
        return True

    async def prepare(self, config: Configuration, *, waits: bool = False) -> asyncio.Server | None:
        """Bind where the configuration wants it, if that is elsewhere than now. Who comes before ``swap``
        is turned away.

        Args:
            waits: where it cannot listen is tried again (``tick``), which is told in the log.

        Raises:
            ConfigError: it cannot listen there.
        """
        wanted = controller_address(config)
        if wanted is None or wanted in (self.address, self._missing):
            return None
        host, port = wanted
        try:
            return await self._listen(host, port)
        except OSError as error:
            if waits:
                log.error(
                    "the logical unit controller cannot listen: %s port %d %s; it is tried again",
                    *(host, port, bind_reason(error)),
                )
                self._missing = wanted
                return None
            attribute = "luc_ip" if error.errno == errno.EADDRNOTAVAIL else "luc_port"
            reason = bind_reason(error)
            raise ConfigError.one(GLOBALS, attribute, f"{host} port {port} {reason}.") from None

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        sock = bind(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return await asyncio.get_running_loop().create_server(lambda: _Client(self), sock=sock)

    def tick(self, now: float) -> None:
        """Time has passed: where it could not listen may be free now."""
        if self._missing is not None and now >= self._next_look:
            self._next_look = now + RETRY_S
            _keep(asyncio.ensure_future(self._look()))

    async def _look(self) -> None:
        wanted = self._missing
        if wanted is None:
            return
        try:
            listener = await self._listen(*wanted)
        except OSError:
            return
        if self._missing != wanted:
            listener.close()
            return
        self._missing, self.address, self._listener = None, wanted, listener
        log.info("the logical unit controller listens on %s port %d", *wanted)

    def swap(self, config: Configuration, prepared: asyncio.Server | None) -> None:
        """Bring it in line with the configuration now in force."""
        wanted, rules = controller_address(config), _rules(config.globals)
        if wanted != self._missing:
            self._missing = None
        if wanted != self.address and self._missing is None:
            self._unlisten()
            self.address, self._listener = wanted, prepared
            if wanted is not None:
                log.info("the logical unit controller listens on %s port %d", *wanted)
        if wanted is None or rules != self._in_force:
            self._drop_clients()
        self._in_force = rules

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self.address = self._listener = None

    def _drop_clients(self) -> None:
        for client in list(self.clients):
            client.close()

    def close(self) -> None:
        """Stop."""
        self._missing = None
        self._unlisten()
        self._drop_clients()
