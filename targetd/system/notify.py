"""Tells the service manager how we are: systemd's notification protocol, sd_notify(3).

A datagram of ``KEY=value`` lines to the socket that ``NOTIFY_SOCKET`` names. Where nobody listens,
nothing happens: a daemon does not fail for want of an audience.
"""

import logging
import os
import socket
from collections.abc import Mapping, Sequence

__all__ = ["notify", "ready", "status", "stopping"]

log = logging.getLogger(__name__)


def notify(*lines: str, environ: Mapping[str, str] = os.environ, descriptors: Sequence[int] = ()) -> bool:
    """Send the lines as one datagram; False when there is no socket or it takes nothing.

    ``descriptors`` go along, as ``FDSTORE=1`` has it: the receiver gets duplicates.

    A name that begins with ``@`` is in the abstract namespace (a leading null, unix(7)).
    """
    name = environ.get("NOTIFY_SOCKET", "")
    if not name:
        return False
    if name[0] not in "/@":
        log.warning("NOTIFY_SOCKET=%s is neither a path nor abstract", name)
        return False
    address = "\0" + name[1:] if name[0] == "@" else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # Never wait on the event loop for a service manager that does not read.
            sender.setblocking(False)
            sender.connect(address)
            socket.send_fds(sender, ["\n".join(lines).encode()], list(descriptors))
    except OSError as error:
        log.warning("cannot notify %s: %s", name, error.strerror or error)
        return False
    return True


def ready(text: str = "", environ: Mapping[str, str] = os.environ) -> bool:
    """Portals and API listen. ``text`` becomes the status."""
    return notify("READY=1", *_status(text), environ=environ)


def stopping(text: str = "", environ: Mapping[str, str] = os.environ) -> bool:
    """The shutdown has begun."""
    return notify("STOPPING=1", *_status(text), environ=environ)


def status(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """What ``systemctl status`` shows; one line."""
    return notify(*_status(text), environ=environ)


def _status(text: str) -> tuple[str, ...]:
    # A newline would begin an assignment of its own.
    return (f"STATUS={' '.join(text.split())}",) if text else ()
