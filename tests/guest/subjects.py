"""The target under test, as the stage drives it: ours, or on demand Debian's tgtd for comparison.

The methods are what a check in the guest may ask for by name (``inside/host.py``); arguments and answers
are JSON. A subject that cannot do a thing at all raises ``UnsupportedError``: the check counts as skipped.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.daemon import ROOT, Daemon
from tests.guest.wires import PORTALS

TGTD_LIMIT_S: Final = 120
TGTD_SOCKETS: Final = Path("/run/tgtd")
SIZE_UNITS: Final = {"MB": 1 << 20, "GB": 1 << 30}


class UnsupportedError(Exception):
    """This subject has no such thing."""


def bytes_of(size: str) -> int:
    return int(size[:-2]) * SIZE_UNITS[size[-2:]]


def python() -> dict[str, str]:
    """For the daemon inside the guest: the interpreter it runs on here, and where the sources are."""
    return {"executable": sys.executable, "root": str(ROOT)}


class _GuestDaemon(Daemon):
    """Listens where the guest can reach it instead of on loopback; the API stays on loopback."""

    @property
    def portal(self) -> str:
        return PORTALS[0]


class Ours:
    """iscsi-targetd, configured through its API alone."""

    name = "ours"
    first_lun = 0

    def __init__(self, directory: Path) -> None:
        self.daemon = _GuestDaemon(directory)

    def start(self) -> None:
        self.daemon.start()
        self.api("PUT", "services/iscsi/portal/1/", {"iscsi_target_portal_ips": list(PORTALS)})

    def finish(self) -> str:
        """Stop; what was wrong with how it ended, or nothing."""
        if not self.daemon.alive():
            return "the daemon is not running"
        status = self.daemon.terminate()
        if status != 0:
            return f"exit status {status} after SIGTERM"
        return "\n".join(self.daemon.lines[-200:]) if self.daemon.tracebacks() else ""

    def abandon(self) -> None:
        self.daemon.kill9()

    def log(self) -> str:
        return self.daemon.log

    # -- what checks ask for --------------------------------------------------------------------

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Any request below /api/v1.0/ that must succeed."""
        reply = self.daemon.api(method, path, body)
        assert 200 <= reply.status < 300, f"{method} {path} {body}: {reply.status} {reply.text}"
        return reply.json if reply.text else None

    def disk(
        self,
        name: str,
        size: str,
        *,
        luns: int = 1,
        method: str = "None",
        credentials: int | None = None,
        initiators: list[str] | None = None,
        extent: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A target with LUNs 0 and up, each a sparse file of its own, open to everyone unless told."""
        group = 1
        if initiators is not None:
            group = self.daemon.create(
                "authorizedinitiator", iscsi_target_initiator_initiators="\n".join(initiators)
            )["id"]
        made_target = self.daemon.create(
            "target",
            **{
                "iscsi_target_name": name,
                "iscsi_target_portalgroup": 1,
                "iscsi_target_initiatorgroup": group,
                "iscsi_target_authtype": method,
                "iscsi_target_authgroup": credentials,
                **(target or {}),
            },
        )
        made = {
            "name": name,
            "iqn": self.daemon.full_name(name),
            "target_id": made_target["id"],
            "luns": [],
        }
        for lun in range(luns):
            made["luns"].append(self.add_lun(name, made_target["id"], lun, size, extent))
        return made

    def add_lun(
        self, name: str, target_id: int, lun: int, size: str, extent: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        path = self.daemon.extent_root / f"{name}-{lun}.img"
        made = self.daemon.create(
            "extent",
            **{
                "iscsi_target_extent_name": f"{name}-{lun}",
                "iscsi_target_extent_type": "File",
                "iscsi_target_extent_path": str(path),
                "iscsi_target_extent_filesize": size,
                **(extent or {}),
            },
        )
        mapping = self.daemon.create(
            "targettoextent", iscsi_target=target_id, iscsi_extent=made["id"], iscsi_lunid=lun
        )
        return {
            "lun": lun,
            "extent_id": made["id"],
            "mapping_id": mapping["id"],
            "path": str(path),
            "serial": made["iscsi_target_extent_serial"],
            "naa": made["iscsi_target_extent_naa"],
        }

    def remove_lun(self, mapping_id: int) -> None:
        self.daemon.delete("targettoextent", mapping_id)

    def resize(self, extent_id: int, size: str) -> None:
        self.api("PUT", f"services/iscsi/extent/{extent_id}/", {"iscsi_target_extent_filesize": size})

    def negotiate(self, iqn: str) -> None:
        """Have the initiators of a target asked to negotiate anew."""
        for id in self.sessions(iqn):
            self.api("POST", f"services/iscsi/session/{id}/negotiate/", None)

    def sessions(self, iqn: str) -> list[int]:
        """Ids of the sessions of a target; no two that ever were have the same."""
        found = self.daemon.expect(200, "GET", "services/iscsi/session/")
        return [session["id"] for session in found if session["target_name"] == iqn]

    def credential(
        self, tag: int, user: str, secret: str, peer_user: str = "", peer_secret: str = ""
    ) -> None:
        self.daemon.create(
            "authcredential",
            iscsi_target_auth_tag=tag,
            iscsi_target_auth_user=user,
            iscsi_target_auth_secret=secret,
            iscsi_target_auth_peeruser=peer_user,
            iscsi_target_auth_peersecret=peer_secret,
        )

    def allocated(self, path: str) -> int:
        """Bytes that the backing file takes on its file system."""
        return Path(path).stat().st_blocks * 512

    def restart(self) -> None:
        self.daemon.restart()

    def stop(self) -> None:
        self.daemon.terminate()

    def start_again(self) -> None:
        self.daemon.start()

    def kill9_and_start(self) -> None:
        self.daemon.kill9()
        self.daemon.start()

    def pause(self) -> None:
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGCONT)

    def log_lines(self) -> int:
        return len(self.daemon.lines)

    def wait_for_line(self, parts: list[str], since: int, limit_s: float) -> str:
        return self.daemon.wait_for_line(*parts, since=since, limit_s=limit_s)

    def python(self) -> dict[str, str]:
        return python()


class Tgt:
    """Debian's tgtd, for comparison: ``GUEST_SUBJECT=tgt``."""

    name = "tgt"
    first_lun = 1
    """LUN 0 of every target of tgtd is a controller."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("tgtd") is None:
            raise UnsupportedError("tgtd is not installed")
        # tgtadm finds tgtd by a name below /run; this mount is seen in the stage's namespace only.
        TGTD_SOCKETS.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", TGTD_SOCKETS], check=True)
        self.directory = directory
        self.commands: list[list[str]] = []
        """What made the present configuration, for tgtd keeps none over a restart."""
        self.process: subprocess.Popen[bytes] | None = None
        self.targets = 0
        self.accounts: dict[int, list[tuple[str, bool]]] = {}
        """By tag: user and whether the target proves itself with it."""

    def start(self) -> None:
        with (self.directory / "tgtd.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["tgtd", "-f", "--iscsi", ",".join(f"portal={portal}" for portal in PORTALS)],
                stdout=log,
                stderr=log,
            )
        answers = "until tgtadm --mode sys --op show >/dev/null 2>&1; do sleep 0.1; done"
        subprocess.run(["sh", "-c", answers], check=True, timeout=TGTD_LIMIT_S)
        commands, self.commands = self.commands, []
        for command in commands:
            self._tgtadm(*command)

    def _tgtadm(self, *given: object) -> None:
        arguments = [str(word) for word in given]
        done = subprocess.run(
            ["tgtadm", "--lld", "iscsi", *arguments], capture_output=True, text=True, timeout=TGTD_LIMIT_S
        )
        assert done.returncode == 0, f"tgtadm {arguments}: {done.stderr}"
        self.commands.append(arguments)

    def finish(self) -> str:
        self.abandon()
        return ""

    def abandon(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        return (self.directory / "tgtd.log").read_text(errors="replace")

    # -- what checks ask for --------------------------------------------------------------------

    def negotiate(self, iqn: str) -> None:
        raise UnsupportedError("tgtd sends no Async Message 4")

    def disk(
        self,
        name: str,
        size: str,
        *,
        luns: int = 1,
        method: str = "None",
        credentials: int | None = None,
        initiators: list[str] | None = None,
        extent: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if extent or target:
            raise UnsupportedError("tgtd has no such fields")
        if method == "CHAP Mutual" and credentials is None:
            raise UnsupportedError("tgtd has no such method")
        self.targets += 1
        tid = self.targets
        iqn = f"iqn.2003-01.org.example.tgt:{name}"
        self._tgtadm("--mode", "target", "--op", "new", "--tid", tid, "-T", iqn)
        for initiator in initiators or ["ALL"]:
            how = "-I" if initiator == "ALL" else "-Q"
            self._tgtadm("--mode", "target", "--op", "bind", "--tid", tid, how, initiator)
        for user, outgoing in self.accounts.get(credentials or 0, []):
            if method == "CHAP" and outgoing:
                continue
            way = ["--outgoing"] if outgoing else []
            self._tgtadm("--mode", "account", "--op", "bind", "--tid", tid, "--user", user, *way)
        made = {"name": name, "iqn": iqn, "target_id": tid, "luns": []}
        for lun in range(self.first_lun, self.first_lun + luns):
            made["luns"].append(self.add_lun(name, tid, lun, size))
        return made

    def add_lun(
        self, name: str, target_id: int, lun: int, size: str, extent: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if extent:
            raise UnsupportedError("tgtd has no extents")
        path = self.directory / f"{name}-{lun}.img"
        with path.open("wb") as file:
            file.truncate(bytes_of(size))
        unit = ("--mode", "logicalunit", "--tid", target_id, "--lun", lun)
        self._tgtadm(*unit, "--op", "new", "-b", path)
        self._tgtadm(*unit, "--op", "update", "--params", "thin_provisioning=1")
        return {"lun": lun, "mapping_id": [target_id, lun], "extent_id": 0, "path": str(path)}

    def remove_lun(self, mapping_id: list[int]) -> None:
        target_id, lun = mapping_id
        self._tgtadm("--mode", "logicalunit", "--op", "delete", "--tid", target_id, "--lun", lun)

    def credential(
        self, tag: int, user: str, secret: str, peer_user: str = "", peer_secret: str = ""
    ) -> None:
        for name, password, outgoing in [(user, secret, False), (peer_user, peer_secret, True)]:
            if name:
                self._tgtadm("--mode", "account", "--op", "new", "--user", name, "--password", password)
                self.accounts.setdefault(tag, []).append((name, outgoing))

    def allocated(self, path: str) -> int:
        return Path(path).stat().st_blocks * 512

    def restart(self) -> None:
        self.abandon()
        self.start()

    stop = abandon
    start_again = start
    kill9_and_start = restart

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


SUBJECTS: Final = {subject.name: subject for subject in (Ours, Tgt)}
