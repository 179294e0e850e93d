"""What changes under a session: LUNs come, grow and go, the daemon restarts, dies and stalls."""

from collections.abc import Callable
from pathlib import Path

from tests.guest.inside import host, iscsi
from tests.guest.inside.checks import CheckFailedError, check, require
from tests.guest.inside.iscsi import FAST_RECOVERY, Node, disk, logged_in, make_disk
from tests.guest.inside.load import Load
from tests.guest.inside.shell import Background, attempt, run, until
from tests.guest.wires import PORTALS

MIB = 1 << 20
LOGINS = 50
STALL_S = 20


# -- LUNs ---------------------------------------------------------------------------------------


@check
def lun_added_live_appears() -> None:
    """A LUN mapped to a target in use is there after `iscsiadm --rescan`, the first one undisturbed."""
    made = make_disk("16MB")
    with logged_in(made["iqn"]) as node, Load(node.disk()) as load:
        load.goes_on()
        lun = iscsi.first_lun + 1
        host.ask("add_lun", name=made["name"], target_id=made["target_id"], lun=lun, size="24MB")
        node.rescan()
        device = node.disk(lun)
        require(iscsi.capacity(device) == 24 * MIB, "not the new LUN's size")
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=4", "oflag=direct")
        load.stop()


@check
def asked_to_negotiate_anew() -> None:
    """Asked to negotiate anew (Async Message 4), open-iscsi logs in again, and a load goes on."""
    made = make_disk("16MB")
    with logged_in(made["iqn"]) as node, Load(node.disk()) as load:
        load.goes_on()
        before = set(host.ask("sessions", iqn=made["iqn"]))
        host.ask("negotiate", iqn=made["iqn"])
        until("another session", lambda: set(host.ask("sessions", iqn=made["iqn"])) - before)
        load.goes_on()
        load.stop()


@check
def lun_resized_live() -> None:
    """An extent that grows: a unit attention tells the kernel, a rescan shows it. Shrinking is refused while
    somebody uses the disk, and done when nobody does."""
    made = make_disk("32MB")
    extent = made["luns"][0]["extent_id"]
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        host.ask("resize", extent_id=extent, size="96MB")
        # The attention comes with the next command; the kernel logs it, an admin rescans.
        attempt("sg_turs", device)
        node.rescan()
        until("96 MiB", lambda: iscsi.capacity(device) == 96 * MIB)
        run("dd", f"if={device}", "of=/dev/null", "bs=1M", "skip=95", "iflag=direct")
        try:
            host.ask("resize", extent_id=extent, size="48MB")
        except CheckFailedError as refused:
            require("in use and cannot shrink" in str(refused), str(refused))
        else:
            raise CheckFailedError("a disk in use was shrunk")
    host.ask("resize", extent_id=extent, size="48MB")
    with logged_in(made["iqn"]) as node:
        require(iscsi.capacity(node.disk()) == 48 * MIB, "not shrunk")


@check
def ext4_grows_online() -> None:
    """Mounted ext4 on a LUN that grows: rescan, `resize2fs`, more space, no remount."""
    made = make_disk("64MB")
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        run("mkfs.ext4", "-q", device)
        run("mkdir", "-p", "/mnt/disk")
        run("mount", device, "/mnt/disk")
        host.ask("resize", extent_id=made["luns"][0]["extent_id"], size="192MB")
        node.rescan()
        until("192 MiB", lambda: iscsi.capacity(device) == 192 * MIB)
        run("resize2fs", device)
        run("dd", "if=/dev/urandom", "of=/mnt/disk/file", "bs=1M", "count=120")
        run("umount", "/mnt/disk")
        run("e2fsck", "-f", "-n", device)


@check
def lun_removed_live_goes() -> None:
    """A LUN unmapped under a session: its I/O fails at once, the other LUN goes on, a new one can come."""
    made = make_disk("16MB", luns=2)
    first, second = made["luns"]
    with logged_in(made["iqn"]) as node:
        gone, stays = node.disk(second["lun"]), node.disk(first["lun"])
        with Load(stays) as load:
            load.goes_on()
            host.ask("remove_lun", mapping_id=second["mapping_id"])
            attempt("dd", f"if={gone}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct").refused()
            path = node.lun_path(second["lun"])
            assert path is not None
            (path / "delete").write_text("1")
            node.rescan()
            require(node.lun_path(second["lun"]) is None, "the removed LUN is found again")
            said = run("sg_luns", "--decode", stays)
            require(f"lun={second['lun']}" not in said, said)
            load.stop()


@check
def target_deleted_live_ends_its_session_alone() -> None:
    """A target deleted through the API: its session ends, that of another target does not notice."""
    doomed, other = make_disk("16MB"), make_disk("16MB")
    with logged_in(other["iqn"]) as stays, Load(stays.disk()) as load:
        node = Node(doomed["iqn"], settings=FAST_RECOVERY).record().login()
        node.disk()
        load.goes_on()
        host.ask("api", method="DELETE", path=f"services/iscsi/target/{doomed['target_id']}/?force=true")
        # open-iscsi tries to come back and is told that there is no such target.
        until("the session to be down", lambda: "LOGGED_IN" not in [_state(path) for path in node.sessions()])
        attempt("iscsiadm", "-m", "node", "-T", doomed["iqn"], "-u")
        node.forget()
        load.stop()


def _state(session: Path) -> str:
    try:
        return (session / "state").read_text().strip()
    except OSError:
        return "gone"


# -- the daemon ---------------------------------------------------------------------------------


def survives(event: Callable[[Node], None], **settings: object) -> None:
    """A verified load during which something happens to the daemon; it ends without an error."""
    with disk("32MB", **{**FAST_RECOVERY, **settings}) as (node, device), Load(device) as load:
        load.goes_on()
        event(node)
        load.stop()


def stalled(node: Node, session_state: str) -> None:
    """The daemon stopped for as long as ``STALL_S``, at the end of which the session is as said."""
    host.ask("pause")
    try:
        host.ask("sleep", seconds=STALL_S)
        until(f"the session to be {session_state}", lambda: _state(node.session()) == session_state)
    finally:
        host.ask("resume")
    until("the session to be LOGGED_IN", lambda: _state(node.session()) == "LOGGED_IN")


@check
def daemon_restarted_under_fio() -> None:
    """SIGTERM and a new daemon under verified load: fio ends without an error."""
    survives(lambda _: host.ask("restart"))


@check
def daemon_killed_under_fio() -> None:
    """`kill -9` and a new daemon under verified load: fio ends without an error."""
    survives(lambda _: host.ask("kill9_and_start"))


@check
def daemon_stopped_for_20_s_under_fio() -> None:
    """SIGSTOP for 20 s: the initiator's NOP-Out times out, it drops and comes back, fio sees no error."""
    survives(lambda node: stalled(node, "FAILED"))


@check
def daemon_stopped_for_20_s_without_nops() -> None:
    """The same with NOPs off: nothing is dropped, everything waits and goes on."""
    never = {"node.conn[0].timeo.noop_out_interval": 0, "node.conn[0].timeo.noop_out_timeout": 0}
    survives(lambda node: stalled(node, "LOGGED_IN"), **never)


@check
def daemon_down_at_login_is_waited_for() -> None:
    """A login while nobody listens succeeds once the daemon is back."""
    iqn = make_disk("16MB")["iqn"]
    host.ask("stop")
    node = Node(iqn, settings={"node.session.initial_login_retry_max": 20}).record()
    with Background(
        "iscsiadm", "-m", "node", "-T", iqn, "-p", f"{PORTALS[0]},1", "-I", "alice", "-l"
    ) as login:
        host.ask("sleep", seconds=2)
        host.ask("start_again")
        login.ended()
    node.disk()
    node.logout()
    node.forget()


# -- sessions -----------------------------------------------------------------------------------


@check
def fifty_logins_under_load() -> str:
    """50 logins and logouts of one target while another is under verified load."""
    busy, other = make_disk("32MB"), make_disk("16MB")
    with logged_in(busy["iqn"]) as node, Load(node.disk()) as load:
        load.goes_on()
        again = Node(other["iqn"], PORTALS[1], settings={"node.session.scan": "manual"}).record()
        for _ in range(LOGINS):
            again.login()
            again.logout()
        again.forget()
        load.stop()
    return f"{LOGINS} logins"


@check
def two_sessions_to_one_target() -> None:
    """`node.session.nr_sessions = 2`: two sessions with ISIDs of their own, one disk seen twice."""
    with disk("16MB", **{"node.session.nr_sessions": 2}) as (node, _):
        sessions = until("two sessions", lambda: found if len(found := node.sessions()) == 2 else None)
        first, second = (node.disk(session=session) for session in sessions)
        require(first != second, "one device for two sessions")
        names = {run("sg_vpd", "--page=di", "--quiet", device) for device in (first, second)}
        require(len(names) == 1, f"two names for one disk: {names}")
        run("dd", "if=/dev/urandom", f"of={first}", "bs=1M", "count=4", "oflag=direct")
        run("blockdev", "--flushbufs", second)
        run("cmp", f"--bytes={4 * MIB}", first, second)


@check
def nop_timeout_finds_a_cut_wire() -> str:
    """A wire cut: the initiator drops the connection after its NOP timeout, and comes back with the wire."""
    with disk("16MB", portal=PORTALS[1], **FAST_RECOVERY) as (node, device):
        session = node.session()
        host.ask("cut", wire=1)
        try:
            until("the session to fail", lambda: _state(session) == "FAILED")
        finally:
            host.ask("restore", wire=1)
        until("the session to be back", lambda: _state(session) == "LOGGED_IN")
        run("dd", f"if={device}", "of=/dev/null", "bs=1M", "count=4", "iflag=direct")
    return "FAILED, then LOGGED_IN"


@check
def target_notices_a_silent_initiator() -> str:
    """NOP-In by the target: a connection whose wire is cut is dropped by the target too."""
    settings = "services/iscsi/globalconfiguration/"
    before = host.ask("api", method="GET", path=settings)
    host.ask("api", method="PUT", path=settings, body={"iscsi_nopinint": 2, "iscsi_iotimeout": 4})
    try:
        with disk("16MB", portal=PORTALS[1], **FAST_RECOVERY) as (node, _):
            since = host.ask("log_lines")
            host.ask("cut", wire=1)
            try:
                said = host.ask("wait_for_line", parts=[iscsi.ALICE, "left"], since=since, limit_s=60)
            finally:
                host.ask("restore", wire=1)
            until("the session to be back", lambda: _state(node.session()) == "LOGGED_IN")
    finally:
        back = {key: before[key] for key in ("iscsi_nopinint", "iscsi_iotimeout")}
        host.ask("api", method="PUT", path=settings, body=back)
    return str(said)
