"""open-iscsi as an admin uses it: node records, logins, and the block devices that come of them."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.guest.inside import host
from tests.guest.inside.checks import CheckFailedError
from tests.guest.inside.shell import Ran, attempt, run, until
from tests.guest.wires import PORTALS

ALICE: Final = "iqn.2003-01.org.example:alice"
BOB: Final = "iqn.2003-01.org.example:bob"
"""Two initiator names, each with an interface record; Alice's is also the one of discovery."""

first_lun = 0
"""The LUN of a target's first disk; the stage tells, for not every subject begins at 0."""

SESSIONS: Final = Path("/sys/class/iscsi_session")
FAST_RECOVERY: Final = {
    "node.conn[0].timeo.noop_out_interval": 2,
    "node.conn[0].timeo.noop_out_timeout": 2,
    "node.session.timeo.replacement_timeout": 60,
}
"""Find a dead connection within 4 s instead of 10, for checks that wait for it."""
CHAP_KEYS: Final = {
    "user": "node.session.auth.username",
    "secret": "node.session.auth.password",
    "peer_user": "node.session.auth.username_in",
    "peer_secret": "node.session.auth.password_in",
    "algorithms": "node.session.auth.chap_algs",
}


def chap(**values: str) -> dict[str, str]:
    """Settings of a node record for CHAP; keywords as in ``CHAP_KEYS``."""
    return {
        "node.session.auth.authmethod": "CHAP",
        **{CHAP_KEYS[name]: value for name, value in values.items()},
    }


def digests(header: bool, data: bool) -> dict[str, str]:
    """Settings of a node record that insist on, or do without, each digest."""
    return {
        "node.conn[0].iscsi.HeaderDigest": "CRC32C" if header else "None",
        "node.conn[0].iscsi.DataDigest": "CRC32C" if data else "None",
    }


def _interface(initiator: str) -> str:
    """The name of an interface record that logs in as ``initiator``, made if it is not there."""
    name = initiator.rpartition(":")[2]
    if not Path(f"/etc/iscsi/ifaces/{name}").exists():
        run("iscsiadm", "-m", "iface", "-I", name, "-o", "new")
        for key, value in {"iface.initiatorname": initiator, "iface.transport_name": "tcp"}.items():
            run("iscsiadm", "-m", "iface", "-I", name, "-o", "update", "-n", key, "-v", value)
    return name


@dataclass(frozen=True)
class Node:
    """A node record: a target through a portal, as one initiator."""

    iqn: str
    portal: str = PORTALS[0]
    initiator: str = ALICE
    settings: Mapping[str, Any] = field(default_factory=dict)

    def _iscsiadm(self, *more: object) -> Ran:
        return attempt(
            # With the portal group's tag, or records of several interfaces do not live side by side.
            *("iscsiadm", "-m", "node", "-T", self.iqn, "-p", f"{self.portal},1"),
            *("-I", _interface(self.initiator)),
            *more,
        )

    def _must(self, *more: object) -> str:
        ran = self._iscsiadm(*more)
        if ran.status != 0:
            raise CheckFailedError(str(ran))
        return ran.output

    def record(self) -> "Node":
        self._must("-o", "new")
        self.set(**self.settings)
        return self

    def set(self, **settings: Any) -> None:
        pairs = [word for key, value in settings.items() for word in ("-n", key, "-v", value)]
        if pairs:
            self._must("-o", "update", *pairs)

    def try_login(self) -> Ran:
        return self._iscsiadm("-l")

    def login(self) -> "Node":
        self._must("-l")
        return self

    def logout(self) -> None:
        self._must("-u")

    def forget(self) -> None:
        self._must("-o", "delete")

    def rescan(self) -> None:
        self._must("-R")

    def sessions(self) -> list[Path]:
        """This node's sessions in sysfs, oldest first."""
        address = self.portal.rpartition(":")[0]

        def ours(session: Path) -> bool:
            number = session.name.removeprefix("session")
            connection = session / "device" / f"connection{number}:0" / "iscsi_connection"
            addresses = [path.read_text().strip() for path in connection.glob("*/persistent_address")]
            return (
                _read(session / "targetname") == self.iqn
                and _read(session / "initiatorname") == self.initiator
                and address in addresses
            )

        found = SESSIONS.glob("session*") if SESSIONS.exists() else []
        return [session for session in sorted(found, key=lambda path: int(path.name[7:])) if ours(session)]

    def session(self) -> Path:
        return until(f"a session of {self.initiator} with {self.iqn}", lambda: self.sessions())[-1]

    def lun_path(self, lun: int | None = None, session: Path | None = None) -> Path | None:
        """The SCSI device of a LUN in sysfs, None if it is not there."""
        where = session or self.session()
        lun = first_lun if lun is None else lun
        return next(iter((where / "device").glob(f"target*/*:*:*:{lun}")), None)

    def disk(self, lun: int | None = None, session: Path | None = None) -> str:
        """``/dev/sdX`` of a LUN, once udev has seen it."""

        def found() -> str | None:
            device = self.lun_path(lun, session)
            names = (
                [path.name for path in (device / "block").iterdir()]
                if device and (device / "block").exists()
                else []
            )
            return f"/dev/{names[0]}" if names and Path(f"/dev/{names[0]}").exists() else None

        name = until(f"the block device of LUN {lun} of {self.iqn}", found)
        run("udevadm", "settle")
        return name

    def generic(self, lun: int | None = None) -> str:
        """``/dev/sgN`` of a LUN."""

        def found() -> str | None:
            device = self.lun_path(lun)
            names = [path.name for path in (device / "scsi_generic").iterdir()] if device else []
            return f"/dev/{names[0]}" if names else None

        return until(f"the generic device of LUN {lun} of {self.iqn}", found)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@contextmanager
def logged_in(iqn: str, portal: str = PORTALS[0], initiator: str = ALICE, **settings: Any) -> Iterator[Node]:
    """A session for the block; afterwards logged out and forgotten."""
    node = Node(iqn, portal, initiator, settings).record().login()
    yield node
    node.logout()
    node.forget()


_made = 0


def make_disk(size: str = "64MB", **more: Any) -> dict[str, Any]:
    """A target with a LUN of its own on the host side: ``iqn``, ``target_id``, ``luns`` by number."""
    global _made
    _made += 1
    made: dict[str, Any] = host.ask("disk", name=f"disk{_made}", size=size, **more)
    return made


@contextmanager
def disk(size: str = "64MB", portal: str = PORTALS[0], **settings: Any) -> Iterator[tuple[Node, str]]:
    """A fresh disk, logged in: the node and ``/dev/sdX``."""
    with logged_in(make_disk(size)["iqn"], portal, **settings) as node:
        yield node, node.disk()


def capacity(device: str) -> int:
    """Bytes of a block device."""
    return int(run("blockdev", "--getsize64", device))


def negotiated(session: Path, connection_key: str) -> str:
    """An operational value of the session's first connection as the kernel has it."""
    number = session.name.removeprefix("session")
    connection = session / "device" / f"connection{number}:0" / "iscsi_connection" / f"connection{number}:0"
    return _read(connection / connection_key) or _read(session / connection_key)


def clear() -> str:
    """Unmount, tear down maps, log out and forget everything; what was still there that should not be."""
    left = []
    mounts = re.findall(r"^\S+ (/mnt/\S*|/tmp/\S+) ", Path("/proc/self/mounts").read_text(), re.MULTILINE)
    for mount in sorted(mounts, reverse=True):
        left.append(f"mount {mount}")
        subprocess.run(["umount", "-l", mount], check=False)
    maps = [path.name for path in Path("/dev/mapper").glob("*") if path.name != "control"]
    if maps:
        subprocess.run(["pkill", "-x", "multipathd"], check=False)
        for name in maps:
            left.append(f"map {name}")
            subprocess.run(["dmsetup", "remove", "--force", name], check=False, capture_output=True)
    sessions = list(SESSIONS.glob("session*")) if SESSIONS.exists() else []
    if sessions:
        left.append(f"{len(sessions)} sessions")
        attempt("iscsiadm", "-m", "session", "-u")
    if any(Path("/etc/iscsi/nodes").glob("*")):
        attempt("iscsiadm", "-m", "node", "-o", "delete")
    for path in Path("/mnt").iterdir():
        path.rmdir()
    return ", ".join(left)
