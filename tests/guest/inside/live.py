"""What changes under a session: LUNs come, grow and go, the daemon restarts, dies and stalls."""

from pathlib import Path

from tests.guest.inside import host, iscsi
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import FAST_RECOVERY, disk, logged_in, make_disk
from tests.guest.inside.shell import Background, attempt, run, until
from tests.guest.wires import PORTALS

MIB = 1 << 20
LOGINS = 50
STALL_S = 20


def steady_load(device: str, seconds: int) -> Background:
    """Verified random writes at depth 8 for as long as said; ends with an error at the first that fails."""
    return Background(
        *("fio", "--name=load", f"--filename={device}", "--rw=randwrite", "--bs=16k", "--size=32M"),
        *("--direct=1", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1"),
        *("--time_based", f"--runtime={seconds}", "--rate_iops=400"),
    )


def underway(device: str) -> None:
    """Wait until the load has written something."""
    name = device.rpartition("/")[2]
    statistics = Path(f"/sys/block/{name}/stat")

    def writes() -> int:
        return int(statistics.read_text().split()[4])

    before = writes()
    until(f"writes to {device}", lambda: writes() > before + 50)


# -- LUNs ---------------------------------------------------------------------------------------


@check()
def lun_added_live_appears() -> None:
    """A LUN mapped to a target in use is there after `iscsiadm --rescan`, the first one undisturbed."""
    made = make_disk("16MB")
    with logged_in(made["iqn"]) as node, steady_load(node.disk(), 4) as load:
        underway(node.disk())
        lun = iscsi.first_lun + 1
        host.ask("add_lun", name=made["name"], target_id=made["target_id"], lun=lun, size="24MB")
        node.rescan()
        device = node.disk(lun)
        require(iscsi.capacity(device) == 24 * MIB, "not the new LUN's size")
        run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=4", "oflag=direct")
        load.ended(60)


@check()
def lun_resized_live_grows_and_shrinks() -> None:
    """An extent grown and shrunk through the API: a unit attention tells the kernel, a rescan shows it."""
    made = make_disk("32MB")
    extent = made["luns"][0]["extent_id"]
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        for size in (96, 48):
            host.ask("resize", extent_id=extent, size=f"{size}MB")
            # The attention comes with the next command; the kernel logs it, an admin rescans.
            attempt("sg_turs", device)
            node.rescan()
            until(f"{size} MiB", lambda size=size: iscsi.capacity(device) == size * MIB)
            run("dd", f"if={device}", "of=/dev/null", "bs=1M", f"skip={size - 1}", "iflag=direct")


@check()
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


@check()
def lun_removed_live_goes() -> None:
    """A LUN unmapped under a session: its I/O fails at once, the other LUN goes on, a new one can come."""
    made = make_disk("16MB", luns=2)
    first, second = made["luns"]
    with logged_in(made["iqn"]) as node:
        gone, stays = node.disk(second["lun"]), node.disk(first["lun"])
        with steady_load(stays, 4) as load:
            underway(stays)
            host.ask("remove_lun", mapping_id=second["mapping_id"])
            attempt("dd", f"if={gone}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct").refused()
            path = node.lun_path(second["lun"])
            assert path is not None
            (path / "delete").write_text("1")
            node.rescan()
            require(node.lun_path(second["lun"]) is None, "the removed LUN is found again")
            said = run("sg_luns", "--decode", stays)
            require(f"lun={second['lun']}" not in said, said)
            load.ended(60)


@check()
def target_deleted_live_ends_its_session_alone() -> None:
    """A target deleted through the API: its session ends, that of another target does not notice."""
    doomed, other = make_disk("16MB"), make_disk("16MB")
    with logged_in(other["iqn"]) as stays, steady_load(stays.disk(), 4) as load:
        node = iscsi.Node(doomed["iqn"], settings=FAST_RECOVERY).record().login()
        node.disk()
        underway(stays.disk())
        host.ask("api", method="DELETE", path=f"services/iscsi/target/{doomed['target_id']}/?force=true")
        # open-iscsi tries to come back and is told that there is no such target.
        until("the session to be down", lambda: "LOGGED_IN" not in [_state(path) for path in node.sessions()])
        attempt("iscsiadm", "-m", "node", "-T", doomed["iqn"], "-u")
        node.forget()
        load.ended(60)


def _state(session: Path) -> str:
    try:
        return (session / "state").read_text().strip()
    except OSError:
        return "gone"


# -- the daemon ---------------------------------------------------------------------------------


def survives(what: str, seconds: int, **settings: object) -> str:
    """A verified load during which ``what`` happens to the daemon; it ends without an error."""
    made = make_disk("32MB")
    with logged_in(made["iqn"], **{**FAST_RECOVERY, **settings}) as node:
        device = node.disk()
        with steady_load(device, seconds) as load:
            underway(device)
            if what == "stall":
                host.ask("pause")
                try:
                    host.ask("sleep", seconds=STALL_S)
                finally:
                    host.ask("resume")
            else:
                host.ask(what)
            underway(device)
            load.ended(120)
        return f"{load.command.split()[0]} ended without error"


@check(limit_s=150)
def daemon_restarted_under_fio() -> str:
    """SIGTERM and a new daemon under verified load: fio ends without an error."""
    return survives("restart", 8)


@check(limit_s=150)
def daemon_killed_under_fio() -> str:
    """`kill -9` and a new daemon under verified load: fio ends without an error."""
    return survives("kill9_and_start", 8)


@check(limit_s=180)
def daemon_stopped_for_20_s_under_fio() -> str:
    """SIGSTOP for 20 s: the initiator's NOP-Out times out, it drops and comes back, fio sees no error."""
    return survives("stall", 26)


@check(limit_s=180)
def daemon_stopped_for_20_s_without_nops() -> str:
    """The same with NOPs off: nothing is dropped, everything waits and goes on."""
    never = {"node.conn[0].timeo.noop_out_interval": 0, "node.conn[0].timeo.noop_out_timeout": 0}
    return survives("stall", 26, **never)


@check()
def daemon_down_at_login_is_waited_for() -> None:
    """A login while nobody listens succeeds once the daemon is back."""
    iqn = make_disk("16MB")["iqn"]
    host.ask("stop")
    node = iscsi.Node(iqn, settings={"node.session.initial_login_retry_max": 20}).record()
    with Background(
        "iscsiadm", "-m", "node", "-T", iqn, "-p", f"{PORTALS[0]},1", "-I", "alice", "-l"
    ) as login:
        host.ask("sleep", seconds=2)
        host.ask("start_again")
        login.ended(45)
    node.disk()
    node.logout()
    node.forget()


# -- sessions -----------------------------------------------------------------------------------


@check(limit_s=180)
def fifty_logins_under_load() -> str:
    """50 logins and logouts of one target while another is under verified load."""
    busy, other = make_disk("32MB"), make_disk("16MB")
    with logged_in(busy["iqn"]) as node, steady_load(node.disk(), 25) as load:
        underway(node.disk())
        again = iscsi.Node(other["iqn"], PORTALS[1], settings={"node.session.scan": "manual"}).record()
        for _ in range(LOGINS):
            again.login()
            again.logout()
        again.forget()
        load.ended(90)
    return f"{LOGINS} logins"


@check()
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


@check(limit_s=90)
def nop_timeout_finds_a_cut_wire() -> str:
    """A wire cut: the initiator drops the connection after its NOP timeout, and comes back with the wire."""
    with disk("16MB", portal=PORTALS[1], **FAST_RECOVERY) as (node, device):
        session = node.session()
        host.ask("cut", wire=1)
        try:
            until("the session to fail", lambda: _state(session) == "FAILED", 20)
        finally:
            host.ask("restore", wire=1)
        until("the session to be back", lambda: _state(session) == "LOGGED_IN", 40)
        run("dd", f"if={device}", "of=/dev/null", "bs=1M", "count=4", "iflag=direct")
    return "FAILED, then LOGGED_IN"


@check(limit_s=90)
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
                said = host.ask("wait_for_line", parts=[iscsi.ALICE, "left"], since=since, limit_s=40)
            finally:
                host.ask("restore", wire=1)
            until("the session to be back", lambda: _state(node.session()) == "LOGGED_IN", 40)
    finally:
        back = {key: before[key] for key in ("iscsi_nopinint", "iscsi_iotimeout")}
        host.ask("api", method="PUT", path=settings, body=back)
    return str(said)
