"""Keeps this host registered with its iSNS servers: a task for each, which registers what has changed, gives
a sign of life before the registration expires, and takes it back at the end.

A server that does not answer is tried again, less and less often; nobody waits for it, and it is told of
once.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from targetd.config import Configuration, split_address, split_list
from targetd.isns.messages import (
    HEADER_LENGTH,
    MAX_MESSAGE,
    STATUSES,
    Attribute,
    Function,
    MessageError,
    PduFlag,
    PduHeader,
    Tag,
    read_response,
    request,
)
from targetd.isns.registration import PERIOD_S, Registration, registration

__all__ = ["DEFAULT_ISNS_PORT", "Registrar", "isns_servers"]

log = logging.getLogger("targetd.isns")

DEFAULT_ISNS_PORT = 3205
"""RFC 4171 §2.9."""
EXCHANGE_S = 10.0
"""How long a server may take for one exchange."""
GOODBYE_S = 2.0
"""And at the end of the daemon for the last one."""
SIGN_OF_LIFE_S = PERIOD_S / 3
RETRY_S = (5.0, 60.0)
"""First wait after a failure, and the longest; it doubles."""


def isns_servers(config: Configuration) -> dict[str, tuple[str, int]]:
    """As written → where it is. Without a port: 3205."""
    found = {}
    for entry in split_list(config.globals.isns_servers):
        host, port = split_address(entry, DEFAULT_ISNS_PORT)
        found[entry] = host, port
    return found


@dataclass(slots=True)
class _Server:
    """One server, and what it knows of us."""

    name: str
    place: tuple[str, int]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    registered: Registration | None = None
    failing: str = ""
    """Why the last exchange failed, as it was told."""
    transaction: int = 0


class Registrar:
    """All servers."""

    def __init__(self, absent: Callable[[], Collection[str]]) -> None:
        """
        Args:
            absent: addresses of portals that are not listened on now.
        """
        self._absent = absent
        self._seen: tuple[Configuration | None, frozenset[str]] = (None, frozenset())
        """What ``follow`` has looked at."""
        self._wanted: Registration | None = None
        self._servers: dict[str, _Server] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._hidden = 0

    def follow(self, config: Configuration) -> None:
        """This is in force now; also called now and then, as addresses come and go."""
        seen = config, frozenset(self._absent())
        if seen[0] is self._seen[0] and seen[1] == self._seen[1]:
            return
        self._seen = seen
        wanted = registration(*seen, socket.gethostname())
        hidden = wanted.hidden if wanted is not None else 0
        if hidden != self._hidden and hidden:
            log.warning(
                "%d targets are not registered with iSNS servers: discovery asks for a proof at every portal "
                "that they are granted through",
                hidden,
            )
        self._hidden = hidden
        places = isns_servers(config) if config.service_enabled else {}
        for name in [name for name, server in self._servers.items() if places.get(name) != server.place]:
            self._leave(self._servers.pop(name))
        for name, place in places.items():
            if name not in self._servers:
                server = self._servers[name] = _Server(name, place)
                server.task = asyncio.get_running_loop().create_task(self._serve(server))
        if wanted != self._wanted:
            self._wanted = wanted
            for server in self._servers.values():
                server.wake.set()

    def _leave(self, server: _Server) -> None:
        task = asyncio.get_running_loop().create_task(self._goodbye(server))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Take back what was registered, with what time there is for that."""
        servers, self._servers = self._servers, {}
        for server in servers.values():
            self._leave(server)
        if self._leaving:
            await asyncio.wait(set(self._leaving), timeout=GOODBYE_S)
        for task in self._leaving:
            task.cancel()

    # -- one server ---------------------------------------------------------------------------

    async def _serve(self, server: _Server) -> None:
        wait_s = RETRY_S[0]
        while True:
            server.wake.clear()
            try:
                await self._bring_in_line(server)
            except (OSError, EOFError, TimeoutError, MessageError) as error:
                reason = str(error) or type(error).__name__
                if reason != server.failing:
                    log.warning("iSNS server %s: %s; it is tried again", server.name, reason)
                server.failing = reason
                due_s, wait_s = wait_s, min(2 * wait_s, RETRY_S[1])
            else:
                server.failing = ""
                due_s, wait_s = SIGN_OF_LIFE_S, RETRY_S[0]
            try:
                await asyncio.wait_for(server.wake.wait(), due_s)
            except TimeoutError:
                pass

    async def _bring_in_line(self, server: _Server) -> None:
        wanted, known = self._wanted, server.registered
        if wanted is None:
            if known is not None:
                await self._exchange(server, Function.DEREGISTER, lambda _: known.deregister())
                server.registered = None
                log.info("iSNS server %s: deregistered", server.name)
            return
        if wanted == known:
            status, said = await self._exchange(
                server, Function.QUERY, lambda _: wanted.query(), refusals_are_errors=False
            )
            if not status and any(attribute.tag == Tag.ENTITY_PROTOCOL for attribute in said):
                return
            log.warning("iSNS server %s has forgotten this host", server.name)
        await self._exchange(server, Function.REGISTER, wanted.register, PduFlag.REPLACE)
        server.registered = wanted
        log.info("iSNS server %s: %d targets registered", server.name, len(wanted.targets))

    async def _goodbye(self, server: _Server) -> None:
        if server.task is not None:
            server.task.cancel()
            await asyncio.wait({server.task})
        known = server.registered
        if known is None:
            return
        try:
            await self._exchange(server, Function.DEREGISTER, lambda _: known.deregister())
            log.info("iSNS server %s: deregistered", server.name)
        except (OSError, EOFError, TimeoutError, MessageError) as error:
            log.warning("iSNS server %s: not deregistered: %s", server.name, error or type(error).__name__)

    async def _exchange(
        self,
        server: _Server,
        function: Function,
        said: Callable[[str], list[Attribute]],
        flags: int = 0,
        *,
        refusals_are_errors: bool = True,
    ) -> tuple[int, list[Attribute]]:
        """One request and its response, on a connection of its own.

        Raises:
            OSError, EOFError, TimeoutError: the server is not there, or not to the end.
            MessageError: what it says is no response to that, or a refusal.
        """
        async with asyncio.timeout(EXCHANGE_S):
            reader, writer = await asyncio.open_connection(*server.place)
            try:
                server.transaction = server.transaction % 0xFFFF + 1
                seen_at = str(writer.get_extra_info("sockname")[0]).partition("%")[0]
                writer.write(request(function, server.transaction, said(seen_at), flags))
                await writer.drain()
                status, found = await _response(reader, function, server.transaction)
            finally:
                writer.close()
        if status and refusals_are_errors:
            raise MessageError(f"it refuses: {STATUSES.get(status, 'status')} ({status})")
        return status, found


async def _response(
    reader: asyncio.StreamReader, function: Function, transaction: int
) -> tuple[int, list[Attribute]]:
    payload = bytearray()
    while True:
        header = PduHeader.parse(await reader.readexactly(HEADER_LENGTH))
        if header.function != function | Function.RESPONSE or header.transaction != transaction:
            raise MessageError(f"function {header.function:04x}h is no answer to {function.name}")
        if len(payload) + header.length > MAX_MESSAGE:
            raise MessageError(f"an answer of more than {MAX_MESSAGE} bytes")
        payload += await reader.readexactly(header.length)
        if header.flags & PduFlag.LAST:
            return read_response(bytes(payload))
