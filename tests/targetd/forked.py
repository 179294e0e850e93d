"""A daemon for tests that start it many times: its modules are loaded once, and each start is a fork.

What is killed is a whole daemon process, as in ``tests.daemon``; only the second and a half of imports
before its first line of work is not repeated. ``python -m tests.targetd.forked`` is the process that forks.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Self

from tests.daemon import ROOT, START_LIMIT_S, Daemon, DaemonError


@dataclass
class ForkedDaemon(Daemon):
    """As ``Daemon``; what it prints goes to ``output``. To be used in a ``with``."""

    _nursery: subprocess.Popen[str] | None = None
    _told: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    pid: int = 0
    """Of the daemon; 0: there is none."""

    def __enter__(self) -> Self:
        # The daemon tells by sd_notify(3) when it is ready.
        self._told.bind("")
        name = "@" + self._told.getsockname()[1:].decode()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": name},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill9()
        assert self._nursery is not None
        self._nursery.communicate(timeout=START_LIMIT_S)
        self._told.close()

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text(encoding="utf-8", errors="replace")

    def start(self) -> Self:
        nursery = self._nursery
        assert nursery is not None and nursery.stdin is not None and nursery.stdout is not None
        assert not self.pid
        print(json.dumps([str(self.directory / "output"), *self.arguments()]), file=nursery.stdin, flush=True)
        self.pid = int(nursery.stdout.readline())
        said = b""
        while b"READY=1" not in said:  # it also gives its sockets to the descriptor store
            told, _, _ = select.select([self._told, nursery.stdout], [], [], START_LIMIT_S)
            if self._told not in told:
                raise DaemonError("the daemon is not ready", self.output)
            said = self._told.recv(4096)
        return self

    def _wait(self) -> int:
        assert self._nursery is not None and self._nursery.stdout is not None
        self.pid = 0
        return int(self._nursery.stdout.readline())

    def kill9(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):  # somebody else has killed it
                os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def terminate(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        while b"STOPPING=1" not in self._told.recv(4096):
            pass
        return self._wait()


def main() -> None:
    """Fork a daemon for each line of standard input, a JSON list: its output file, its arguments.

    Answers with two lines: its process id, and, when it has ended, its exit status.
    """
    from targetd.__main__ import main as serve
    from targetd.daemon.main import run  # noqa: F401  # loads all that a daemon needs

    for line in sys.stdin:
        output, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            empty = os.open(os.devnull, os.O_RDONLY)
            for number, fd in ((0, empty), (1, log), (2, log)):
                os.dup2(fd, number)
            sys.exit(serve(arguments))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
