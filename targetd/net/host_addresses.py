"""Tells when an IP address comes to this host or leaves it: rtnetlink, read by pyroute2 on the event loop.

Only tells. What an address is good for is found out by binding it (``targetd.net.portals``), so a
message that is lost costs no more than a look at everything.
"""

import asyncio
import importlib
import ipaddress
import logging
from collections.abc import Callable
from typing import Any

from targetd.system.threads import run_in_thread

__all__ = ["HostAddresses"]

log = logging.getLogger("targetd.addresses")

_TENTATIVE = 0x40
_DUPLICATE = 0x08
"""IFA_F_TENTATIVE, IFA_F_DADFAILED (linux/if_addr.h): an IPv6 address that cannot be bound, RFC 4862 §5.4."""

_NOT_YET = {
    _DUPLICATE: "is in use by another host too (duplicate address detection)",
    _TENTATIVE: "is being checked for duplicates on its network",
}


class HostAddresses:
    """One netlink socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, changed: Callable[[str, str], None]) -> None:
        """
        Args:
            changed: called on the loop with (IP address, why it cannot be bound although it is there, if
                that is so); with an empty address when any may have changed.
        """
        self._loop = loop
        self._changed = changed
        self._socket: Any = None
        self._closed = False

    async def open(self) -> None:
        """Begin to listen, then have everything looked at once."""
        try:
            # On a thread: pyroute2 takes a fifth of a second to load, and initiators are waiting already.
            module = await run_in_thread(importlib.import_module, "pyroute2")
            if self._closed:
                return
            sock = module.IPRSocket()
            sock.bind(module.netlink.rtnl.RTMGRP_IPV4_IFADDR | module.netlink.rtnl.RTMGRP_IPV6_IFADDR)
            sock.socket.setblocking(False)
        except (ImportError, OSError) as error:
            log.warning("addresses that come and go are noticed late: no netlink: %s", error)
            return
        self._socket = sock.socket
        self._read = sock.get
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self._changed("", "")

    def close(self) -> None:
        """Hear nothing more."""
        self._closed = True
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _readable(self) -> None:
        try:
            messages = self._read()
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: more came than was read, and some of it is lost
            self._changed("", "")
            return
        for message in messages:
            host = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if message.get("event") not in ("RTM_NEWADDR", "RTM_DELADDR") or not host:
                continue
            flags = message.get_attr("IFA_FLAGS") or message["flags"]
            new = message["event"] == "RTM_NEWADDR"
            why = next((words for flag, words in _NOT_YET.items() if new and flags & flag), "")
            self._changed(str(ipaddress.ip_address(host)), why)
