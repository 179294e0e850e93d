"""What is measured: each target as a process on a loopback port, serving one given file as one LUN.

The file is the same for all, so that all read the same cached pages of the same extents. Peers run with
Debian's defaults but for what is needed to serve the file; where a default decides a number it is said here.
"""

import math
import os
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path

from tests.daemon import HOST, Daemon, DaemonError, free_ports

CHAP_USER, CHAP_SECRET = "bench", "bench-secret-12"
"""12 bytes or more, as RFC 7143 §9.2.1 wants them."""

BUILD = Path(__file__).resolve().parent / "build"
START_LIMIT_S = 20.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class UnavailableError(Exception):
    """This subject cannot be measured here; the text says why."""


class Subject(ABC):
    """One target. ``start`` returns when it can be logged into; ``directory`` is for its own files."""

    name: str
    lun = 0
    digests = True
    """It negotiates header and data digests."""
    chap = True
    """``chap_iqn`` is a second target over the same file, for ``CHAP_USER`` alone."""
    flushes = True
    """SYNCHRONIZE CACHE does something."""
    is_file = False
    """No target, but the file that all of them serve."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image = image
        self.directory = directory
        self.port = free_ports(1)[0]
        self.iqn = f"iqn.2003-01.org.example:{self.name}"
        self.chap_iqn = f"{self.iqn}-chap"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def start(self) -> None:
        """Bring it up; UnavailableError if it is not installed or may not run here."""

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def cpu_seconds(self) -> float:
        """User and system time of the process so far, all its threads and all its descendants."""
        return sum(ticks for _, ticks in self._family()) / TICKS_PER_SECOND

    def memory_kib(self) -> int:
        """Memory of the process and its descendants, what they share counted once (Pss, proc(5))."""
        total = 0
        for pid, _ in self._family():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0])
        return total

    def _family(self) -> list[tuple[int, int]]:
        """(process, its ticks of CPU time) of the process and all its descendants."""
        family = {self.pid}
        stats = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    # proc(5): after the command in parentheses come state, parent, …, utime (14), stime (15).
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                stats[int(entry.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
        grown = True
        while grown:
            children = {pid for pid, (parent, _) in stats.items() if parent in family}
            grown = not children <= family
            family |= children
        return [(pid, stats[pid][1]) for pid in family if pid in stats]

    def _spawn(self, *argv: str) -> None:
        log = (self.directory / "log").open("wb")
        with log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.directory
            )

    def _log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-500:]

    def _wait_until_listening(self) -> None:
        """These peers have no readiness notice; a refused connection is tried again."""
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            if self.process is not None and self.process.poll() is not None:
                break
            try:
                socket.create_connection((HOST, self.port), 1).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise UnavailableError(f"{self.name} did not start: {self._log()}")


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise UnavailableError(f"{name} is not installed (Debian: {package})")
    return path


class Limit(Subject):
    """The floor: a C server that checks nothing (limit.c)."""

    name = "limit"
    digests = False
    chap = False
    flushes = False

    def start(self) -> None:
        program = BUILD / "limit"
        if not program.exists():
            raise UnavailableError("bench/build/limit is not built (bench/build.sh)")
        self._spawn(str(program), str(self.image), str(self.port))
        self._wait_until_listening()


class Tgtd(Subject):
    """Debian's tgt: 16 I/O threads, backing store "rdwr", MaxRecvDataSegmentLength 8192 by default.

    Digests are off unless allowed by parameter; allowing them changes nothing for who does not ask.
    """

    name = "tgtd"
    lun = 1
    """LUN 0 is its controller."""

    def start(self) -> None:
        if os.geteuid() != 0:
            raise UnavailableError("tgtd needs root for its control socket")
        program = _program("tgtd", "tgt")
        self.control = str(os.getpid() % 30000 + 1000)
        self._spawn(program, "-f", "-C", self.control, "--iscsi", f"portal={HOST}:{self.port}")
        self._wait_until_listening()
        for tid, name in (("1", self.iqn), ("2", self.chap_iqn)):
            one = ("--tid", tid)
            self._admin("target", "new", *one, "--targetname", name)
            self._admin("logicalunit", "new", *one, "--lun", "1", "--backing-store", str(self.image))
            self._admin("target", "bind", *one, "--initiator-address", "ALL")
            for key in ("HeaderDigest", "DataDigest"):
                self._admin("target", "update", *one, "--name", key, "--value", "CRC32C")
        self._admin("account", "new", "--user", CHAP_USER, "--password", CHAP_SECRET)
        self._admin("account", "bind", "--tid", "2", "--user", CHAP_USER)

    def stop(self) -> None:
        """It ignores SIGTERM while it has targets, and leaves its control socket behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            for suffix in ("", ".lock"):
                Path(f"/var/run/tgtd/socket.{self.control}{suffix}").unlink(missing_ok=True)

    def _admin(self, mode: str, operation: str, *more: str) -> None:
        argv = [
            _program("tgtadm", "tgt"),
            "-C",
            self.control,
            "--lld",
            "iscsi",
            "--mode",
            mode,
            "--op",
            operation,
        ]
        done = subprocess.run([*argv, *more], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise UnavailableError(f"{' '.join([*argv, *more])}: {done.stderr.strip()}")


class Istgt(Subject):
    """Debian's istgt, configured as FreeNAS 9.2 rendered it, with room for the sessions of the benchmark."""

    name = "istgt"

    CONFIGURATION = """\
[Global]
  NodeBase "iqn.2003-01.org.example"
  PidFile {directory}/pid
  AuthFile {directory}/auth.conf
  MediaDirectory {directory}
  LogFacility "local7"
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod None
  MaxSessions 128
  MaxConnections 8
  MaxR2T 32
  MaxOutstandingR2T 16
  DefaultTime2Wait 2
  DefaultTime2Retain 60
  FirstBurstLength 65536
  MaxBurstLength 262144
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData Yes
  DataPDUInOrder Yes
  DataSequenceInOrder Yes
  ErrorRecoveryLevel 0
[UnitControl]
[PortalGroup1]
  Portal DA1 {host}:{port}
[InitiatorGroup1]
  InitiatorName "ALL"
  Netmask ALL
[LogicalUnit1]
  TargetName {name}
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod None
  UseDigest Auto
  UnitType Disk
  QueueDepth 64
  LUN0 Storage {image} Auto
[LogicalUnit2]
  TargetName {name}-chap
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod CHAP
  AuthGroup AuthGroup1
  UseDigest Auto
  UnitType Disk
  QueueDepth 64
  LUN0 Storage {image} Auto
"""

    def start(self) -> None:
        program = _program("istgt", "istgt")
        accounts = self.directory / "auth.conf"
        accounts.write_text(f'[AuthGroup1]\n  Auth "{CHAP_USER}" "{CHAP_SECRET}"\n')
        accounts.chmod(0o600)
        configuration = self.directory / "istgt.conf"
        configuration.write_text(
            self.CONFIGURATION.format(
                directory=self.directory, host=HOST, port=self.port, name=self.name, image=self.image
            )
        )
        self._spawn(program, "-c", str(configuration), "-D")
        self._wait_until_listening()


class Ours(Subject):
    """The complete daemon as its users start it, with a target made through its API."""

    name = "ours"

    def start(self) -> None:
        self.daemon = Daemon(
            self.directory,
            options=("--extent-root", str(self.image.parent)),
            portal_port=self.port,
            api_port=free_ports(1)[0],
        )
        fresh = not self.daemon.state_dir.exists()
        try:
            self.daemon.start()
        except DaemonError as error:
            raise UnavailableError(str(error)) from None
        if fresh:
            # 64 sessions are more than the specification's default of 16, and 1000 idle ones are measured.
            self.daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_maxsesh": 1024})
            path = {"iscsi_target_extent_path": str(self.image)}
            disk = self.daemon.create_disk("bench", "0", extent=path)
            self.iqn = disk.iqn
            self._offer_with_chap(disk.extent_id)

    def _offer_with_chap(self, extent_id: int) -> None:
        self.daemon.create(
            "authcredential",
            iscsi_target_auth_tag=1,
            iscsi_target_auth_user=CHAP_USER,
            iscsi_target_auth_secret=CHAP_SECRET,
        )
        target = self.daemon.create(
            "target",
            iscsi_target_name="bench-chap",
            iscsi_target_portalgroup=1,
            iscsi_target_initiatorgroup=1,
            iscsi_target_authtype="CHAP",
            iscsi_target_authgroup=1,
        )
        self.daemon.create("targettoextent", iscsi_target=target["id"], iscsi_extent=extent_id, iscsi_lunid=0)
        self.chap_iqn = self.daemon.full_name("bench-chap")

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def stop(self) -> None:
        if self.daemon.alive():
            self.daemon.terminate()


class File(Subject):
    """What the medium gives without any target: fio on the file itself, by io_uring."""

    name = "file"
    is_file = True

    def start(self) -> None:
        """It is there."""

    def cpu_seconds(self) -> float:
        """There is no server."""
        return math.nan


SUBJECTS: dict[str, type[Subject]] = {kind.name: kind for kind in (Ours, Limit, Tgtd, Istgt, File)}
