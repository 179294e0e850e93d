"""dm-multipath over two portals: one cut and restored under load, both cut, a disk that grows.

multipathd finds out by itself what the target is: the priority of a path by ALUA, its health by TEST UNIT
READY. The kernel of user-mode Linux has no device handlers, so the map does without ``hwhandler alua``; the
one target port group of ours is active and optimized on every path, which leaves a handler nothing to do.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guest.inside import host, iscsi
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import Node, logged_in, make_disk
from tests.guest.inside.load import Load
from tests.guest.inside.shell import Background, attempt, run, until
from tests.guest.wires import PORTALS

MIB = 1 << 20
OPTIMIZED = "50"
"""The priority that multipath-tools gives to the ALUA state active/optimized."""
CONFIGURATION = """
defaults {
    user_friendly_names no
    find_multipaths no
    path_grouping_policy group_by_prio
    path_selector "round-robin 0"
    failback immediate
    polling_interval 1
    max_polling_interval 2
    no_path_retry queue
}
overrides {
    hardware_handler "0"
}
"""
FAIL_FAST = {
    "node.conn[0].timeo.noop_out_interval": 2,
    "node.conn[0].timeo.noop_out_timeout": 2,
    "node.session.timeo.replacement_timeout": 1,
}
"""A dead path is dm-multipath's to deal with: give its commands back after a second."""


@dataclass(frozen=True)
class Hop:
    """What multipathd says of one path."""

    disk: str
    state: str
    """``active`` or ``failed``, as device mapper has it."""
    checker: str
    priority: str


@dataclass(frozen=True)
class Map:
    """A multipath device over the sessions of its nodes, one for each portal."""

    name: str
    nodes: list[Node]
    extent_id: int

    @property
    def device(self) -> str:
        return f"/dev/mapper/{self.name}"

    def paths(self) -> list[Hop]:
        shown = run("multipathd", "show", "paths", "raw", "format", "%d|%t|%T|%p|%w")
        rows = [[word.strip() for word in line.split("|")] for line in shown.splitlines()]
        return [Hop(*row[:4]) for row in rows if len(row) == 5 and row[4] == self.name]

    def active(self, count: int) -> None:
        """Wait until so many paths carry I/O, and multipathd and the kernel agree about it."""
        until(f"{count} active paths", lambda: self._active() == count)

    def _active(self) -> int:
        known = sum(path.state == "active" and path.checker == "ready" for path in self.paths())
        in_kernel = len(re.findall(r"\d+:\d+ A ", run("dmsetup", "status", self.name)))
        return known if known == in_kernel else -1


@contextmanager
def multipath(
    size: str = "32MB", portals: tuple[str, ...] = PORTALS, paths: int = 2, **settings: object
) -> Iterator[Map]:
    """A fresh disk through every portal, and the map that multipathd makes of it."""
    made = make_disk(size)
    Path("/etc/multipath.conf").write_text(CONFIGURATION)
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(logged_in(made["iqn"], portal, **{**FAIL_FAST, **settings}))
            for portal in portals
        ]
        disks = [node.disk(session=session) for node in nodes for session in node.sessions()]
        wwid = run("/usr/lib/udev/scsi_id", "--whitelisted", "--page=0x83", f"--device={disks[0]}").strip()
        stack.enter_context(multipathd())
        made_map = Map(wwid, nodes, made["luns"][0]["extent_id"])
        until(f"the map {wwid}", lambda: Path(made_map.device).exists())
        made_map.active(paths)
        yield made_map
        run("udevadm", "settle")
        run("multipath", "-f", wwid)


@contextmanager
def multipathd() -> Iterator[None]:
    with Background("multipathd", "-d") as daemon:
        until("multipathd", lambda: "pid " in attempt("multipathd", "show", "daemon").output)
        yield
        attempt("multipathd", "shutdown")
        daemon.ended()


@check
def multipath_finds_priorities_and_checker_by_itself() -> None:
    """Two portals make one map; `prio alua` and `path_checker tur` are what multipathd chooses for it."""
    with multipath() as disk:
        paths = disk.paths()
        require([path.priority for path in paths] == [OPTIMIZED] * 2, f"priorities {paths}")
        used = run("multipathd", "show", "paths", "raw", "format", "%d|%p|%s|%c")
        chosen = run("multipath", "-v3", "-d").splitlines() + used.splitlines()
        require(any("prio = alua" in line for line in chosen), "\n".join(chosen[-80:]))
        require(any("path_checker = tur" in line for line in chosen), "\n".join(chosen[-80:]))
        groups = run("multipath", "-ll", disk.name)
        require(groups.count("policy='round-robin 0' prio=50 status=active") == 1, groups)


@check
def both_paths_carry_load() -> None:
    """Round robin over the two sessions: reads and writes go down both, and verify."""
    with multipath() as disk:
        before = {path.disk: _completed(path.disk) for path in disk.paths()}
        with Load(disk.device) as load:
            load.goes_on(200)
            load.stop()
        for name, count in before.items():
            require(_completed(name) > count + 50, f"{name} carried {_completed(name) - count} commands")


def _completed(disk: str) -> int:
    numbers = Path(f"/sys/block/{disk}/stat").read_text().split()
    return int(numbers[0]) + int(numbers[4])


@check
def each_path_cut_and_restored_under_load() -> None:
    """One wire cut, then restored, then the other: the load goes on over what is left, with no error."""
    with multipath() as disk, Load(disk.device) as load:
        for wire in range(len(PORTALS)):
            load.goes_on()
            host.ask("cut", wire=wire)
            try:
                disk.active(1)
                load.goes_on(200)
            finally:
                host.ask("restore", wire=wire)
            disk.active(2)
        load.stop()


@check
def both_paths_cut_hold_the_load() -> None:
    """No path left: the load is held (`no_path_retry queue`), and goes on with the first that returns."""
    with multipath() as disk, Load(disk.device) as load:
        load.goes_on()
        for wire in range(len(PORTALS)):
            host.ask("cut", wire=wire)
        try:
            disk.active(0)
        finally:
            host.ask("restore", wire=1)
        try:
            disk.active(1)
            load.goes_on()
        finally:
            host.ask("restore", wire=0)
        disk.active(2)
        load.stop()


@check
def path_logged_out_and_in_again_under_load() -> None:
    """A session ended by the admin takes its path out of the map; a new one brings it back."""
    with multipath() as disk, Load(disk.device) as load:
        load.goes_on()
        second = disk.nodes[1]
        second.logout()
        until("one path", lambda: len(disk.paths()) == 1)
        load.goes_on()
        second.login()
        disk.active(2)
        load.stop()


@check
def daemon_restarted_under_multipath() -> None:
    """All paths go and come at once: the load is held meanwhile, and ends without an error."""
    with multipath() as disk, Load(disk.device) as load:
        load.goes_on()
        host.ask("kill9_and_start")
        load.goes_on()
        disk.active(2)
        load.stop()


@check
def sessions_of_one_portal_are_paths_too() -> None:
    """`node.session.nr_sessions = 2` on one portal: two paths of one map."""
    with multipath(portals=PORTALS[:1], **{"node.session.nr_sessions": 2}) as disk, Load(disk.device) as load:
        load.goes_on(100)
        load.stop()


@check
def multipath_disk_grows_online() -> None:
    """The LUN grows: a rescan of each path, `multipathd resize map`, and the map has the new size."""
    with multipath() as disk, Load(disk.device) as load:
        load.goes_on()
        host.ask("resize", extent_id=disk.extent_id, size="64MB")
        for node in disk.nodes:
            node.rescan()
        for path in disk.paths():
            until("64 MiB", lambda name=path.disk: iscsi.capacity(f"/dev/{name}") == 64 * MIB)  # type: ignore[misc]
        require("ok" in run("multipathd", "resize", "map", disk.name), "not resized")
        require(iscsi.capacity(disk.device) == 64 * MIB, "the map has not grown")
        load.goes_on()
        load.stop()


@check
def mpathpersist_registers_every_path() -> None:
    """`mpathpersist`: one registration makes one key on each I_T nexus, and a reservation over all."""
    with multipath() as disk:
        run("mpathpersist", "--out", "--register", "--param-sark=0xa11ce", disk.device)
        run("mpathpersist", "--out", "--reserve", "--param-rk=0xa11ce", "--prout-type=5", disk.device)
        keys = run("mpathpersist", "--in", "--read-keys", disk.device)
        require(keys.count("0xa11ce") == 2, keys)
        with Load(disk.device) as load:
            load.goes_on()
            load.stop()
        run("mpathpersist", "--out", "--clear", "--param-rk=0xa11ce", disk.device)
