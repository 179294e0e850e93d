"""The real daemon as a subprocess, for tests that look at it from outside.

A ``Daemon`` is started on loopback ports of its own with a state directory of its own; whatever it
prints is kept and shown when a test fails. Nothing here waits by sleeping: readiness is the daemon's own
``ready`` line, the end of a process is ``wait``, both with a time limit.
"""

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
WORKERS = os.environ.get("TEST_WORKERS", "1")
"""The same on every machine; TEST_WORKERS=2 runs any test with targets spread over two processes."""
IO_ENGINE = os.environ.get("TEST_IO_ENGINE", "auto")
"""TEST_IO_ENGINE=threads runs any test without io_uring."""
START_LIMIT_S = 300.0
"""Two seconds of work, twenty in an emulated PC: minutes, on a machine that does ten other things."""
STOP_LIMIT_S = 20.0
"""A SIGTERM ends the daemon in under 10 s on a machine that has nothing else to do (``threads.Deadline``)."""
LINE_LIMIT_S = 60.0
"""For what the daemon logs at once."""
READY = re.compile(r"(?<!not )\bready\b")
PREFIX = "/api/v1.0/"


class Ports:
    """TCP ports that no other test run on this machine uses, given out in turn.

    They lie together, so that one capture filter tells a run's daemons from everybody else's, and apart from
    those that the kernel gives to clients, which would take one between its choice and its use.
    """

    FIRST, BLOCK, LAST = 10000, 400, 65535

    def __init__(self) -> None:
        self.claim = socket.socket(socket.AF_UNIX)
        """A name in the kernel holds the block as long as this process lives."""
        for low in self.blocks(*map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())):
            try:
                self.claim.bind(f"\0iscsi-targetd-tests-{(low - self.FIRST) // self.BLOCK}")
            except OSError:
                continue
            self.low = low
            break
        else:
            raise RuntimeError("every block of ports is in use")
        self._given = 0

    @classmethod
    def blocks(cls, clients_low: int, clients_high: int) -> list[int]:
        """The first port of each block: those apart from the clients' ports, unless these leave no room."""
        every = range(cls.FIRST, cls.LAST - cls.BLOCK + 2, cls.BLOCK)
        apart = [low for low in every if low + cls.BLOCK <= clients_low or low > clients_high]
        return apart or list(every)

    @property
    def high(self) -> int:
        return self.low + self.BLOCK - 1

    def next(self) -> int:
        """One that nobody listens on."""
        for _ in range(self.BLOCK):
            port = self.low + self._given % self.BLOCK
            self._given += 1
            try:
                socket.create_server((HOST, port)).close()
            except OSError:
                continue
            return port
        raise RuntimeError(f"somebody listens on each of the ports {self.low} to {self.high}")


@cache
def ports() -> Ports:
    """Those of this process."""
    return Ports()


def free_ports(count: int) -> list[int]:
    """Loopback TCP ports that nobody listens on, all different."""
    return [ports().next() for _ in range(count)]


class DaemonError(Exception):
    """The daemon did not start, or did not stop; the text ends with its log."""

    def __init__(self, what: str, log: str) -> None:
        super().__init__(f"{what}\n{log[-4000:]}")


@dataclass(frozen=True)
class Reply:
    """An answer of the API."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Disk:
    """A target with one LUN, as ``Daemon.create_disk`` made it."""

    target_id: int
    extent_id: int
    mapping_id: int
    iqn: str
    url: str
    path: Path


@dataclass
class Daemon:
    """One daemon process at a time over one state directory; ports stay the same over restarts."""

    directory: Path
    options: Sequence[str] = ()
    portal_port: int = 0
    api_port: int = 0
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    _reader: threading.Thread | None = None
    _printed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.directory = self.directory.resolve()
        self.extent_root.mkdir(parents=True, exist_ok=True)
        if not self.portal_port:
            self.portal_port, self.api_port = free_ports(2)

    # -- places ---------------------------------------------------------------------------------

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def extent_root(self) -> Path:
        return self.directory / "extents"

    @property
    def portal(self) -> str:
        return f"{HOST}:{self.portal_port}"

    @property
    def password(self) -> str:
        return (self.state_dir / "api-password").read_text(encoding="utf-8").strip()

    def url(self, target: str = "", lun: int | None = 0, *, user: str = "", secret: str = "") -> str:
        """A libiscsi URL; without a target the one that ``iscsi-ls`` takes.

        libiscsi takes ``user%secret`` as it stands, so neither may hold ``%``, ``@`` or ``/``.
        """
        account = f"{user}%{secret}@" if user else ""
        return f"iscsi://{account}{self.portal}" + (f"/{target}/{lun}" if target else "")

    # -- life -----------------------------------------------------------------------------------

    def arguments(self) -> list[str]:
        return [
            *("serve", "--state-dir", str(self.state_dir), "--extent-root", str(self.extent_root)),
            *("--portal", self.portal, "--api", f"{HOST}:{self.api_port}"),
            *("--workers", WORKERS),
            *("--io-engine", IO_ENGINE),
            *self.options,
        ]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "targetd", *self.arguments()]

    def start(
        self,
        *,
        launcher: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
    ) -> Self:
        """Start and wait for ``ready``; DaemonError with the log if it ends or takes too long.

        Args:
            launcher: what comes before the command line, and ends by executing it.
            variables: more of the environment.
            descriptors: handed on to the process, under their numbers.
        """
        assert self.process is None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ISCSI_TARGETD_")}
        environment["PYTHONPATH"] = str(ROOT)
        environment["PYTHONUNBUFFERED"] = "1"
        environment.update(variables or {})
        self.process = subprocess.Popen(
            [*launcher, *self.command()],
            pass_fds=tuple(descriptors),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            env=environment,
        )
        told = threading.Event()
        ready: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self.process, told, ready), daemon=True)
        self._reader.start()
        told.wait(START_LIMIT_S)
        if not ready:
            ended = self.process.poll()
            self.kill9()
            raise DaemonError(
                f"no ready line within {START_LIMIT_S} s"
                if ended is None
                else f"the daemon ended with {ended} before it was ready",
                self.log,
            )
        return self

    def _read(self, process: subprocess.Popen[bytes], told: threading.Event, ready: list[str]) -> None:
        """Keep what the daemon prints; tell the starter about the ready line or the end."""
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            with self._printed:
                self.lines.append(line)
                self._printed.notify_all()
            if not ready and READY.search(line):
                ready.append(line)
                told.set()
        process.wait()
        told.set()

    def _ended(self, limit_s: float) -> int:
        assert self.process is not None
        status = self.process.wait(limit_s)
        if self._reader is not None:
            self._reader.join(STOP_LIMIT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        return status

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill9(self) -> None:
        """End the process as a power cut ends it, except for what the kernel holds."""
        if self.process is not None:
            self.process.kill()
            self._ended(STOP_LIMIT_S)

    def terminate(self) -> int:
        """SIGTERM; its exit status. DaemonError if it takes longer than it may."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self._ended(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise DaemonError(f"still there {STOP_LIMIT_S} s after SIGTERM", self.log) from None

    def restart(self) -> Self:
        """Start again on the same state and ports, ending the process first if it runs."""
        if self.process is not None:
            self.terminate()
        return self.start()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, *parts: str, since: int = 0, limit_s: float = LINE_LIMIT_S) -> str:
        """The first line from number ``since`` on that holds every part; DaemonError if none comes."""

        def found() -> str | None:
            return next((line for line in self.lines[since:] if all(part in line for part in parts)), None)

        with self._printed:
            if not self._printed.wait_for(found, limit_s):
                raise DaemonError(f"no log line with {parts} within {limit_s} s", self.log)
            return found() or ""

    def tracebacks(self) -> list[str]:
        """The lines that begin a traceback: each is a bug of ours (style.md, "Errors")."""
        return [line for line in self.lines if "Traceback (most recent call last)" in line]

    # -- API ------------------------------------------------------------------------------------

    def authorization(self, user: str = "root", password: str | None = None) -> dict[str, str]:
        """The header that lets a user in."""
        token = base64.b64encode(f"{user}:{password or self.password}".encode()).decode()
        return {"Authorization": f"Basic {token}"}

    def api(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        password: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request as root, unless ``headers`` say who else. ``path`` is below /api/v1.0/ unless it begins
        with a slash."""
        sent = {**self.authorization(password=password), **(headers or {})}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(HOST, self.api_port, timeout=30)
        try:
            connection.request(method, path if path.startswith("/") else PREFIX + path, data, sent)
            response = connection.getresponse()
            return Reply(
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read().decode("utf-8"),
            )
        finally:
            connection.close()

    def expect(self, status: int, method: str, path: str, body: Any = None) -> Any:
        """A request whose status is known; the parsed answer, None where it has no body."""
        reply = self.api(method, path, body)
        assert reply.status == status, f"{method} {path} {body}: {reply.status} {reply.text}"
        return reply.json if reply.text else None

    def create(self, resource: str, **fields: Any) -> dict[str, Any]:
        """POST one object of ``services/iscsi/<resource>/``."""
        created = self.expect(201, "POST", f"services/iscsi/{resource}/", fields)
        assert isinstance(created, dict)
        return created

    def delete(self, resource: str, identity: int) -> None:
        self.expect(204, "DELETE", f"services/iscsi/{resource}/{identity}/")

    def full_name(self, name: str) -> str:
        """The iSCSI name of a target stored under a short name (api-semantics §4)."""
        if name.startswith(("iqn.", "eui.", "naa.")):
            return name
        basename = self.expect(200, "GET", "services/iscsi/globalconfiguration/")["iscsi_basename"]
        return f"{basename}:{name}"

    def create_disk(
        self,
        name: str,
        size: str = "256MB",
        *,
        extent: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
        lun: int = 0,
    ) -> Disk:
        """A File extent, a target open to everyone on portal 1 (the flat form), and the LUN.

        ``extent`` and ``target`` hold further fields, by their wire names, that win over these.
        """
        path = self.extent_root / f"{name}.img"
        made_extent = self.create(
            "extent",
            **{
                "iscsi_target_extent_name": name,
                "iscsi_target_extent_type": "File",
                "iscsi_target_extent_path": str(path),
                "iscsi_target_extent_filesize": size,
                **(extent or {}),
            },
        )
        made_target = self.create(
            "target",
            **{
                "iscsi_target_name": name,
                "iscsi_target_portalgroup": 1,
                "iscsi_target_initiatorgroup": 1,
                "iscsi_target_authtype": "None",
                **(target or {}),
            },
        )
        mapping = self.create(
            "targettoextent",
            iscsi_target=made_target["id"],
            iscsi_extent=made_extent["id"],
            iscsi_lunid=lun,
        )
        iqn = self.full_name(made_target["iscsi_target_name"])
        return Disk(made_target["id"], made_extent["id"], mapping["id"], iqn, self.url(iqn, lun), path)

    def delete_disk(self, disk: Disk) -> None:
        """Target, extent and backing file; sessions on the target are ended by it."""
        self.delete("target", disk.target_id)
        self.delete("extent", disk.extent_id)
        disk.path.unlink(missing_ok=True)
