"""What of systemd a test of ours needs: it starts the daemon with sockets, and keeps those it is given.

``Manager`` speaks sd_listen_fds(3) and sd_notify(3) from the other side: descriptors go to the process from
number 3 on, ``FDSTORE=1`` keeps one under its name, ``FDSTOREREMOVE=1`` lets it go, and the next start gets
the sockets of the unit first and then those of the store, as systemd hands them on.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.daemon import Daemon

LAUNCH = """
import os, sys
given = [int(text) for text in sys.argv[1].split(",") if text]
spare = [os.dup2(fd, 1000 + n) for n, fd in enumerate(given)]
for number, fd in enumerate(spare):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(given), 1000 + len(given))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""LISTEN_PID is the daemon's own, which only the process that becomes it knows."""
ROOM = 4096


class Manager:
    """A service manager for one daemon."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.unit: list[tuple[str, socket.socket]] = []
        """Name and socket: those of a ``.socket`` unit."""
        self.store: dict[str, socket.socket] = {}
        self.told: list[str] = []
        """Every line of every message."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        for sock in (*self.store.values(), *(sock for _, sock in self.unit)):
            sock.close()

    def start(self, daemon: Daemon) -> Daemon:
        """Start it with all we have, and take in what it says until it is ready."""
        handed = [*self.unit, *self.store.items()]
        fds = [sock.fileno() for _, sock in handed]
        daemon.start(
            launcher=(sys.executable, "-c", LAUNCH, ",".join(map(str, fds))),
            variables={
                "NOTIFY_SOCKET": str(self.path),
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(name for name, _ in handed),
            },
            descriptors=fds,
        )
        self.listen()
        return daemon

    def listen(self) -> list[str]:
        """Take in what the daemon has said; the lines."""
        fresh: list[str] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, ROOM, 8)
            except BlockingIOError:
                self.told += fresh
                return fresh
            lines = data.decode().split("\n")
            fresh += lines
            self._keep(dict(line.split("=", 1) for line in lines), fds)

    def _keep(self, message: dict[str, str], fds: Sequence[int]) -> None:
        name = message.get("FDNAME", "")
        if "FDSTORE" in message:
            (fd,) = fds
            known = self.store.get(name)
            if known is not None and os.path.sameopenfile(known.fileno(), fd):
                os.close(fd)
            else:
                self.store[name] = socket.socket(fileno=fd)
        elif "FDSTOREREMOVE" in message:
            assert not fds
            self.store.pop(name).close()
        else:
            assert not fds
