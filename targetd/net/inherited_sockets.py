"""Listening sockets that outlive the process, so that over a restart nobody is refused.

While no daemon runs, who connects waits in the kernel's queue of a socket that somebody else keeps open:

* systemd's socket activation (sd_listen_fds(3)): a ``.socket`` unit listens, and hands its sockets to every
  daemon it starts. They are systemd's, so they are kept here even while no portal has their address: to bind
  it anew would fail.
* systemd's descriptor store (``FileDescriptorStoreMax=``, sd_notify(3)): what we listen on ourselves is given
  into the store, and comes back at the next start in the same way.

Which socket serves what follows from the address it is bound to, as asked for by the configuration (portals)
and ``--api``; only the API takes one that the unit names ``api`` wherever it is bound. Neither of the two is
needed: without a service manager every address is bound here.
"""

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import MutableMapping

from targetd.daemon.options import Address
from targetd.net.server import bind
from targetd.system import notify

__all__ = ["API", "PORTAL", "Listeners", "inherited"]

log = logging.getLogger("targetd.listeners")

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""
STORED = "stored."
"""How names of descriptors of ours in the store begin; those of a unit are the unit's own by default."""
PORTAL, API = "portal", "api"


def inherited(environ: MutableMapping[str, str]) -> list[tuple[str, socket.socket]]:
    """(name, socket) of every descriptor that the service manager handed us; the variables are taken away,
    so that no child takes them for its own."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
        return []
    found = []
    for index in range(int(count)):
        fd = FIRST_FD + index
        name = names[index] if index < len(names) else ""
        os.set_inheritable(fd, False)
        try:
            found.append((name, socket.socket(fileno=fd)))
        except OSError as error:
            log.warning("descriptor %d (%s) from the service manager is no socket: %s", fd, name, error)
    return found


def _address(sock: socket.socket) -> str:
    """What a socket listens on, as portals spell it; empty if it is nothing for us."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return ""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return ""
    host, port = sock.getsockname()[:2]
    return str(Address(host, port))


def _stored_name(kind: str, address: str) -> str:
    """A name in the store holds no colon (sd_notify(3), FDNAME=)."""
    return f"{STORED}{kind}.{address.replace(':', '_')}"


class Listeners:
    """Where listening sockets come from, and who keeps them."""

    def __init__(self, handed: list[tuple[str, socket.socket]] | None = None) -> None:
        """
        Args:
            handed: what ``inherited`` found.
        """
        self._activated: dict[str, socket.socket] = {}
        """Address → the service manager's own; users get duplicates."""
        self._stored: dict[str, tuple[str, socket.socket]] = {}
        """Address → name in the store and socket that an earlier daemon put there."""
        self._api: list[socket.socket] = []
        """Those that a unit names ``api``."""
        for name, sock in handed or ():
            self._take(name, sock)

    def _take(self, name: str, sock: socket.socket) -> None:
        address = _address(sock)
        if not address:
            log.warning("the service manager's socket %s does not listen on TCP: not used", name or sock)
        elif sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            # Its v4 peers would come as ::ffff:a.b.c.d, which no initiator group knows.
            log.error(
                "the service manager's socket %s takes IPv4 as well: use BindIPv6Only=ipv6-only", address
            )
        elif address in self._stored or address in self._activated:
            pass  # from a unit and from the store: one and the same
        else:
            sock.setblocking(False)
            if name.startswith(STORED):
                self._stored[address] = (name, sock)
            else:
                self._activated[address] = sock
                if name == API:
                    self._api.append(sock)
            return
        sock.close()

    def take(self, address: str) -> socket.socket | None:
        """A socket that listens on ``IP:PORT`` already, for whoever accepts on it from now on."""
        if address in self._activated:
            return self._activated[address].dup()
        _, sock = self._stored.pop(address, ("", None))
        return sock

    async def api(self, address: Address) -> list[socket.socket]:
        """Sockets for the API: the ones named so, else one for each address of the host.

        Raises:
            OSError: the port is in use, or the host has no address here.
        """
        if self._api:
            return [sock.dup() for sock in self._api]
        try:
            hosts = [str(ipaddress.ip_address(address.host))]
        except ValueError:
            known = await asyncio.get_running_loop().getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM
            )
            hosts = list(dict.fromkeys(str(info[4][0]) for info in known))
        places = [str(Address(host, address.port)) for host in hosts]
        return [self.take(place) or bind(place) for place in places]

    def keep(self, kind: str, sock: socket.socket) -> None:
        """Something accepts on it: into the store with it, unless it is the service manager's anyway."""
        address = _address(sock)
        if address and address not in self._activated:
            notify.notify("FDSTORE=1", f"FDNAME={_stored_name(kind, address)}", descriptors=(sock.fileno(),))

    def forget(self, kind: str, address: str) -> None:
        """Nothing accepts there any more, and nobody shall wait for it."""
        if address not in self._activated:
            notify.notify("FDSTOREREMOVE=1", f"FDNAME={_stored_name(kind, address)}")

    def settle(self) -> None:
        """All that is wanted at the start has been taken: close what is left of an earlier daemon."""
        for address, (name, sock) in self._stored.items():
            log.info("nothing listens on %s any more", address)
            notify.notify("FDSTOREREMOVE=1", f"FDNAME={name}")
            sock.close()
        self._stored.clear()

    def close(self) -> None:
        """Let go of the service manager's sockets; it keeps them."""
        for sock in self._activated.values():
            sock.close()
        self._activated.clear()
