"""The daemon in the guest itself, over the guest's block devices.

It runs as it does on the host: the host's interpreter and libraries, which the guest sees read-only under
``/host``, are the root it is started in; the guest's own ``/dev``, ``/proc``, ``/sys`` and ``/run`` are
mounted there.
"""

import os
from pathlib import Path
from typing import Any, Final

from tests.daemon import Daemon, Disk
from tests.guest.inside import host
from tests.guest.inside.checks import require
from tests.guest.inside.shell import attempt, run

HOST_ROOT: Final = Path("/host")
PLACE: Final = Path("/run/own-daemon")
PORTAL: Final = "127.0.0.1:3260"
SHARED: Final = ("/dev", "/proc", "/sys", "/run")


def mount_host() -> None:
    """The host's files, read-only, with the guest's own devices; once for each guest."""
    if Path("/host/usr").exists():
        return
    hostfs = "hostfs" in Path("/proc/filesystems").read_text()  # user-mode Linux has it, a PC its like
    kind, source = ("hostfs", "none") if hostfs else ("virtiofs", "host")
    run("mount", "-t", kind, "-o", "ro", source, HOST_ROOT)
    for place in SHARED:
        run("mount", "--rbind", place, HOST_ROOT / place[1:])


class LocalDaemon(Daemon):
    """The daemon as a process of the guest; state and extents are below a directory of ``/run``."""

    def __init__(self, directory: Path = PLACE, portal: str = PORTAL, programs: Path | None = None) -> None:
        """``programs``: a directory below /run with commands that the host does not have."""
        self._portal = portal
        self._programs = programs
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory, portal_port=int(portal.rpartition(":")[2]), api_port=8260)
        self._python: dict[str, str] | None = None

    @property
    def portal(self) -> str:
        return self._portal

    def command(self) -> list[str]:
        if self._python is None:
            self._python = host.ask("python")
            mount_host()
        variables = [f"PYTHONPATH={self._python['root']}"]
        if self._programs is not None:
            variables.append(f"PATH={self._programs}:{os.environ['PATH']}")
        inside = ["-m", "targetd", *self.arguments()]
        return ["chroot", str(HOST_ROOT), "env", *variables, self._python["executable"], *inside]

    def device_disk(self, name: str, node: str, **extent: Any) -> Disk:
        """A target with one LUN over a block device."""
        fields = {
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_disk": node.removeprefix("/dev/"),
            "iscsi_target_extent_path": "",
            "iscsi_target_extent_filesize": "0",
        }
        return self.create_disk(name, extent={**fields, **extent})

    def status(self, disk: Disk) -> str:
        """What the API says of the disk's medium."""
        shown = self.expect(200, "GET", f"services/iscsi/extent/{disk.extent_id}/")
        return str(shown["iscsi_target_extent_status"])

    def forget(self, disk: Disk) -> None:
        """Target and extent; a device stays what it is."""
        self.delete("target", disk.target_id)
        self.delete("extent", disk.extent_id)


_daemon: LocalDaemon | None = None


def daemon(programs: Path | None = None) -> LocalDaemon:
    """The one daemon of this guest, started with the first check that needs it."""
    global _daemon
    if _daemon is None:
        made = LocalDaemon(programs=programs)
        made.start()
        _daemon = made
    require(_daemon.alive(), f"the daemon has died\n{_daemon.log[-3000:]}")
    return _daemon


def log() -> str:
    """The end of what it printed, for the report of a failure; empty where there is none."""
    return "\n".join(_daemon.lines[-60:]) if _daemon else ""


def drop_caches() -> None:
    """What is clean in the page cache goes, so that the next read asks the device."""
    attempt("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3")
