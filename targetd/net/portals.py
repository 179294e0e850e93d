"""The addresses of portals: listened on while this host has them, waited for while it has not.

The kernel is the one judge of what this host has. What it lets us bind is listened on. What it says is no
address of this host (not there yet, gone, an IPv6 one still being checked for duplicates) waits in
``absent`` with the reason in words, and is tried again when netlink tells of a change (``HostAddresses``)
and every ``RETRY_S`` besides, for what netlink does not tell: local routes, a port that was taken meanwhile.
Not IP_FREEBIND: a portal would then seem to listen where nobody can reach it.

A listener whose address has left the host is closed. Connections made through it are left to their own
time limits: an address that comes back within them (a renewed lease, a failover undone) finds them alive.
"""

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from targetd.config import ConfigError, Configuration, Portal, split_address
from targetd.net.inherited_sockets import PORTAL, Listeners
from targetd.net.server import Server, bind, bind_reason, socket_address

__all__ = ["Bound", "Portals"]

log = logging.getLogger("targetd.portals")

RETRY_S = 5.0
"""How often addresses are looked at that cannot be listened on, and those that are, for having left. Costs
some 10 µs each."""

ABSENT = frozenset((errno.EADDRNOTAVAIL, errno.ENODEV, errno.EAFNOSUPPORT))
"""What ``bind`` says of an address that this host has not got: none such, no such interface (of a link-local
address), no IPv6 at all. Anything else, as a port in use, is an error of whoever configured it: a change is
refused; at a start it is waited for too."""

_GONE = bind_reason(OSError(errno.EADDRNOTAVAIL, ""))


@dataclass(slots=True)
class Bound:
    """What a new configuration needs, and the one in force has not. Give back with ``undo``."""

    sockets: dict[str, socket.socket] = field(default_factory=dict)
    """Address → bound, not yet accepting."""
    absent: dict[str, str] = field(default_factory=dict)
    """Address → why it cannot be bound yet."""

    def undo(self) -> None:
        for sock in self.sockets.values():
            sock.close()


class Portals:
    """All addresses of all portals."""

    def __init__(self, server: Server, announce: Callable[..., None], listeners: Listeners) -> None:
        """
        Args:
            announce: told of addresses that come and go: (kind of event, what).
            listeners: sockets that are there already, and whom to tell of ours.
        """
        self._server = server
        self._announce = announce
        self._listeners = listeners
        self._wanted: dict[str, int] = {}
        """Address as configured → id of its portal."""
        self.absent: dict[str, str] = {}
        """Address → why it is not listened on, as what is said of it. Live: only this class changes it."""
        self._not_yet: dict[str, str] = {}
        """IP address that is there and cannot be bound → why."""
        self._next_look = 0.0

    def prepare(self, new: Configuration, *, waits: bool = False) -> Bound:
        """Bind what is wanted and not listened on yet. Binding to a local address does not wait.

        Args:
            waits: for whatever cannot be bound, as at the start: there is nobody to be told of an error, and
                the API is needed to change the portal.

        Raises:
            ConfigError: an address cannot be listened on, for another reason than not being there.
        """
        wanted = _wanted(new)
        leaving = [sock for address, (sock, _) in self._server.listeners.items() if address not in wanted]
        bound = Bound()
        for address, portal_id in wanted.items():
            if address in self._wanted:
                continue
            try:
                bound.sockets[address] = self._listeners.take(address) or _bind(address, leaving)
            except OSError as error:
                if waits or error.errno in ABSENT:
                    bound.absent[address] = bind_reason(error)
                    continue
                bound.undo()
                message = f"{address} {bind_reason(error)}."
                raise ConfigError.one("portals", "addresses", message, portal_id) from None
        return bound

    def swap(self, new: Configuration, bound: Bound) -> None:
        """Put ``new`` in force. Cannot fail."""
        wanted = _wanted(new)
        listeners = self._server.listeners
        for address in list(listeners):
            if address not in wanted:
                self._unlisten(address)
            else:
                listeners[address] = (listeners[address][0], wanted[address])
        for address in self.absent.keys() - wanted.keys():
            del self.absent[address]
        self._wanted = wanted
        for address, sock in bound.sockets.items():
            self._listen(address, sock)
        for address, reason in bound.absent.items():
            self._miss(address, reason)

    def close(self) -> None:
        """Listen nowhere. Who keeps the sockets meanwhile goes on keeping them, for the next start."""
        self._wanted = {}
        self.absent.clear()
        for address in list(self._server.listeners):
            self._server.unlisten(address)

    # -- as addresses come and go -------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed."""
        if now >= self._next_look:
            self._next_look = now + RETRY_S
            self.look()

    def changed(self, host: str, why: str) -> None:
        """An IP address has come or gone; see ``HostAddresses``."""
        if why:
            self._not_yet[host] = why
        else:
            self._not_yet.pop(host, None)
        self.look(host)

    def look(self, host: str = "") -> None:
        """Listen on what can be bound now, let go of what has left; only of this IP address, if given."""
        for address in [address for address in self._wanted if host in ("", _host(address))]:
            if address in self._server.listeners:
                if not _is_here(address):
                    self._unlisten(address)
                    self._miss(address, _GONE)
                continue
            try:
                sock = self._listeners.take(address) or bind(address)
            except OSError as error:
                reason = bind_reason(error)
                if error.errno in ABSENT:
                    reason = self._not_yet.get(_host(address), reason)
                if reason != self.absent.get(address):
                    self._miss(address, reason)
            else:
                self.absent.pop(address, None)
                self._listen(address, sock)
                self._announce("portal.listening", id=self._wanted[address], address=address)

    def _listen(self, address: str, sock: socket.socket) -> None:
        portal_id = self._wanted[address]
        self._server.listen(address, sock, portal_id)
        self._listeners.keep(PORTAL, sock)
        log.info("portal %d listens on %s", portal_id, address)

    def _unlisten(self, address: str) -> None:
        self._server.unlisten(address)
        self._listeners.forget(PORTAL, address)

    def _miss(self, address: str, reason: str) -> None:
        self.absent[address] = reason
        portal_id = self._wanted[address]
        log.warning("portal %d: %s %s; it is listened on as soon as it can be", portal_id, address, reason)
        self._announce("portal.absent", id=portal_id, address=address, reason=reason)

    # -- what is told of it -------------------------------------------------------------------

    def status(self, portal: Portal) -> str:
        """``ok``, or where the portal does not listen and why."""
        if not portal.addresses:
            return "it has no address"
        if not self._wanted.keys() & set(portal.addresses):
            return "the service is stopped"
        missing = [address for address in portal.addresses if address in self.absent]
        return "; ".join(f"{address} {self.absent[address]}" for address in missing) or "ok"

    def count_absent(self, portal_id: int) -> int:
        """How many of its addresses are waited for here; a worker waits for none, but knows of them."""
        return sum(self._wanted.get(address) == portal_id for address in self.absent)

    def obstacle(self, portal: Portal) -> str:
        """Why nobody can come in through a portal; empty if it listens, at one address at least."""
        if any(address in self._server.listeners for address in portal.addresses):
            return ""
        return f"portal {portal.id} listens nowhere: {self.status(portal)}"


def _wanted(config: Configuration) -> dict[str, int]:
    """Address → portal id of everything to listen on."""
    if not config.service_enabled:
        return {}
    return {address: portal.id for portal in config.portals.values() for address in portal.addresses}


def _host(address: str) -> str:
    """The IP address, without the zone of a link-local one: netlink tells of that in another way."""
    return split_address(address)[0].partition("%")[0]


def _bind(address: str, leaving: Sequence[socket.socket]) -> socket.socket:
    """``bind``, also where nothing but listeners of ours stand in the way that the same change removes: from
    every address to one, or back. They and the new one share the port until the change is certain."""
    try:
        return bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not leaving:
            raise
    try:
        for sock in leaving:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return bind(address, share_port=True)
    finally:
        for sock in leaving:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def _is_here(address: str) -> bool:
    """Whether this host still has the address of a listener."""
    host, _ = split_address(address)
    if ipaddress.ip_address(host).is_unspecified:
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind(socket_address(host, 0))
    except OSError as error:
        return error.errno not in ABSENT
    return True
