"""``iscsi-targetctl`` beside the resources, against a real daemon: users, statistics, why logins fail."""

import errno
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cdbs
from tests.daemon import HOST, ROOT, Daemon
from tests.initiator import LoginFailed, SocketInitiator
from tests.interop.peers import Ran, run

CLIENT = "iqn.2020-01.example:client"


@pytest.fixture(scope="module")
def busy(shared_daemon: Daemon) -> Daemon:
    """A daemon that has served three reads and refused a login."""
    disk = shared_daemon.create_disk("disk", "1MB")
    shared_daemon.create("target", iscsi_target_name="closed")
    with SocketInitiator((HOST, shared_daemon.portal_port)) as client:
        client.login(disk.iqn, CLIENT)
        client.command(bytes(6))
        for _ in range(3):
            assert client.command(bytes.fromhex("28000000000000000800"), read=4096).good
        client.logout()
    with SocketInitiator((HOST, shared_daemon.portal_port)) as client, pytest.raises(LoginFailed):
        client.login(shared_daemon.full_name("closed"), CLIENT)
    return shared_daemon


def options(daemon: Daemon, user: str = "root", password: Path | None = None) -> list[str]:
    return [
        *("--url", f"http://{HOST}:{daemon.api_port}", "--user", user),
        *("--password-file", str(password or daemon.state_dir / "api-password")),
    ]


def ctl(daemon: Daemon, *arguments: str, user: str = "root", password: Path | None = None) -> Ran:
    return run(
        *(sys.executable, "-m", "targetd.ctl", *options(daemon, user, password), *arguments),
        environment={"PYTHONPATH": str(ROOT)},
    )


def test_a_user_is_made_limited_and_deleted(busy: Daemon, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("of-the-watcher\n")
    ctl(busy, "user", "create", "watcher", "--password-file", str(secret), "--read-only").ok()
    ctl(busy, "extent", "list", user="watcher", password=secret).ok()
    ctl(busy, "extent", "delete", "disk", user="watcher", password=secret).refused("may only read")
    busy.restart()
    ctl(busy, "user", "list", user="watcher", password=secret).ok()
    ctl(busy, "user", "update", "watcher", "--admin").ok()
    listed = json.loads(ctl(busy, "user", "list", "--json").ok())
    assert {"name": "watcher", "read_only": False} in listed
    ctl(busy, "user", "delete", "watcher").ok()
    ctl(busy, "user", "list", user="watcher", password=secret).refused("does not accept the password")
    ctl(busy, "user", "create", "x", "--password-file", "/dev/null").refused("--password-file")
    ctl(busy, "user", "update", "root", "--read-only").refused("built in")
    stored = b"".join(path.read_bytes() for path in busy.state_dir.glob("targetd.sqlite*"))
    assert b"of-the-watcher" not in stored


def test_a_key_is_made_listed_and_deleted(busy: Daemon) -> None:
    key = ctl(busy, "key", "create", "backup", "--read-only", "--days", "1").ok().strip()
    (listed,) = json.loads(ctl(busy, "key", "list", "--json").ok())
    assert (listed["name"], listed["role"], listed["used_at"]) == ("backup", "read-only", None)
    assert "backup" in ctl(busy, "key", "list").ok()
    bearer = {"Authorization": f"Bearer {key}"}
    assert busy.api("GET", "services/iscsi/target/", headers=bearer).status == 200
    assert busy.api("POST", "services/iscsi/target/", {}, headers=bearer).status == 403
    ctl(busy, "key", "create", "backup").refused("already exists")
    ctl(busy, "key", "delete", "none").refused("there are: backup")
    ctl(busy, "key", "delete", "backup").ok()
    assert busy.api("GET", "services/iscsi/target/", headers=bearer).status == 401


def read_something(daemon: Daemon) -> None:
    with SocketInitiator((HOST, daemon.portal_port)) as client:
        client.login(daemon.full_name("disk"), CLIENT)
        client.command(bytes(6))
        assert client.command(bytes.fromhex("28000000000000000800"), read=4096).good
        client.logout()


def test_statistics_are_those_of_every_logical_unit(busy: Daemon) -> None:
    read_something(busy)
    shown = ctl(busy, "stats").ok()
    assert "disk" in shown
    statistics = json.loads(ctl(busy, "stats", "--json").ok())
    (unit,) = statistics["units"]
    assert unit["luns"] == [{"target": busy.full_name("disk"), "lun": 0}]
    assert unit["commands"]["READ(10)"] >= 1
    assert unit["bytes_read"] >= 4096
    assert {"command": "TEST UNIT READY", "status": "check_condition", "count": 1} in unit["failures"]


def test_the_live_view_names_units_and_sessions(busy: Daemon) -> None:
    with SocketInitiator((HOST, busy.portal_port)) as client:
        client.login(busy.full_name("disk"), CLIENT)
        shown = ctl(busy, "top", "--interval", "0.1", "--count", "2").ok()
        client.logout()
    assert CLIENT in shown
    assert f"{busy.full_name('disk')}/0" in shown


def on_a_terminal(daemon: Daemon, *arguments: str) -> str:
    """The command with a pseudo-terminal before it; what that shows."""
    shown = bytearray()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, "-m", "targetd.ctl", *options(daemon), *arguments])
    try:
        while data := os.read(terminal, 65536):
            shown += data
    except OSError as error:  # EIO: nobody has the other end any more (pty(7))
        assert error.errno == errno.EIO
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown.decode()
    return shown.decode()


def test_work_that_takes_its_time_is_listed(busy: Daemon) -> None:
    """SBC-3 §5.24: with IMMED a SANITIZE is answered when it has begun."""
    disk = busy.create_disk("wiped", "64MB")
    with SocketInitiator((HOST, busy.portal_port)) as client:
        client.login(disk.iqn, CLIENT)
        client.command(bytes(6))
        pattern = bytes((1, 0, 0, 4)) + b"wipe"
        begun = client.command(cdbs.sanitize(1, len(pattern), immediate=True), pattern)
        assert begun.good, begun
        # An OVERWRITE lasts eight seconds at least.
        (one,) = busy.expect(200, "GET", "services/iscsi/work/")
        assert (one["kind"], one["extent"], one["total"]) == ("sanitize", "wiped", 64 << 20)
        assert 0 <= one["done"] <= one["total"]
        client.logout()


def test_an_administrator_sanitizes_an_extent_that_nobody_uses(busy: Daemon) -> None:
    """SBC-3 §4.11: whoever logs in meanwhile is told 04h/1Bh; afterwards nothing that was there is there."""
    disk = busy.create_disk("erased", "64MB")
    other = busy.create_disk("kept", "16MB")
    before = bytes(range(256)) * 16
    write, read = bytes.fromhex("2a000000000000000800"), bytes.fromhex("28000000000000000800")
    asked = ("extent", "sanitize", "erased", "--yes", "--json", "--method")
    with SocketInitiator((HOST, busy.portal_port)) as client:
        client.login(disk.iqn, CLIENT)
        client.command(bytes(6))
        assert client.command(write, before).good
        ctl(busy, *asked, "overwrite").refused(f"in use by {CLIENT}")
        assert client.command(read, read=4096).data == before
        client.logout()
    with SocketInitiator((HOST, busy.portal_port)) as client:
        client.login(other.iqn, CLIENT)
        client.command(bytes(6))
        assert client.command(write, before).good
        ctl(busy, *asked, "shred").refused("--method", "overwrite")
        ctl(busy, *asked, "block erase", "--passes", "2").refused("--passes")
        begun = json.loads(ctl(busy, *asked, "overwrite").ok())
        assert (begun["kind"], begun["extent"], begun["total"]) == ("sanitize", "erased", 64 << 20)
        ctl(busy, *asked, "block erase").refused("being sanitized")
        # An OVERWRITE lasts eight seconds at least.
        with SocketInitiator((HOST, busy.portal_port)) as meanwhile:
            meanwhile.login(disk.iqn, CLIENT)
            meanwhile.command(bytes(6))
            refused = meanwhile.command(read, read=4096)
            assert not refused.good
            assert refused.additional_sense == (0x04, 0x1B)
            meanwhile.logout()
        assert client.command(read, read=4096).data == before, "another extent is left alone"
        on_a_terminal(busy, "work")  # until it is done
        client.logout()
    with SocketInitiator((HOST, busy.portal_port)) as client:
        client.login(disk.iqn, CLIENT)
        client.command(bytes(6))
        assert client.command(read, read=4096).data == bytes(4096)
        client.logout()


def test_an_extent_of_a_worker_is_sanitized_there_and_one_that_is_no_lun_is_not(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, ["--workers", "2"])
    path = "services/iscsi/extent/{}/sanitize/"
    try:
        daemon.start()
        for name in ("one", "two"):
            daemon.create_disk(name, "16MB")
            with (daemon.extent_root / f"{name}.img").open("r+b") as file:
                file.write(b"secret")
        for extent in daemon.expect(200, "GET", "services/iscsi/extent/"):
            begun = daemon.expect(202, "POST", path.format(extent["id"]), {"method": "overwrite"})
            assert begun["extent_id"] == extent["id"]
        on_a_terminal(daemon, "work")
        for name in ("one", "two"):
            assert (daemon.extent_root / f"{name}.img").read_bytes() == bytes(16 << 20)
        alone = daemon.create(
            "extent",
            iscsi_target_extent_name="alone",
            iscsi_target_extent_type="File",
            iscsi_target_extent_path=str(daemon.extent_root / "alone.img"),
            iscsi_target_extent_filesize="1MB",
        )
        refused = daemon.expect(409, "POST", path.format(alone["id"]), {"method": "block erase"})
        assert refused == {"__all__": ["The extent is not a LUN of any target."]}
        for given in ({}, {"method": "scrape"}, {"method": {}}, {"method": ["overwrite"]}):
            assert set(daemon.expect(409, "POST", path.format(alone["id"]), given)) == {"method"}
        daemon.expect(404, "POST", path.format(99), {"method": "block erase"})
    finally:
        daemon.kill9()


def test_an_extent_is_allocated_on_a_terminal_and_cloned_where_blocks_are_shared(busy: Daemon) -> None:
    path = busy.extent_root / "full.img"
    shown = on_a_terminal(
        busy, "extent", "create", "--name", "full", "--type", "File", "--path", str(path),
        "--file-size", "4MB", "--allocate",
    )  # fmt: skip
    assert "full.img" in shown
    assert path.stat().st_blocks * 512 >= 4 << 20
    copy = busy.extent_root / "copy.img"
    ran = ctl(busy, "extent", "clone", "full", "--name", "copy", "--path", str(copy))
    if copy.exists():
        ran.ok()
    else:
        ran.refused("--path", "cannot share blocks")
    ctl(busy, "extent", "clone", "full", "--name", "copy", "--file-size", "1MB").refused("--file-size")


def test_volumes_are_made_grown_and_destroyed(tmp_path: Path) -> None:
    pool = tmp_path / "tank"
    pool.mkdir()
    daemon = Daemon(tmp_path / "daemon", ["--pool", f"tank={pool}"])
    try:
        daemon.start()
        assert "tank  HEALTHY" in ctl(daemon, "pool", "list").ok()
        ctl(daemon, "volume", "create", "tank", "vm/one", "16M").ok()
        assert "vm/one  16.0 MiB" in ctl(daemon, "volume", "list", "tank").ok()
        ctl(daemon, "volume", "resize", "tank", "vm/one", "32M").ok()
        (shown,) = json.loads(ctl(daemon, "volume", "list", "tank", "--json").ok())
        assert (shown["name"], shown["volsize"]) == ("vm/one", 32 << 20)
        ctl(daemon, "extent", "create", "--name", "e", "--type", "ZVOL", "--disk", "tank/vm/one").ok()
        ctl(daemon, "volume", "delete", "tank", "vm/one").refused("extent e is on it")
        ctl(daemon, "extent", "delete", "e").ok()
        ctl(daemon, "volume", "delete", "tank", "vm/one").ok()
        ctl(daemon, "volume", "create", "tank", "two", "much").refused("volsize", "Enter a size")
        ctl(daemon, "volume", "list", "none").refused("there is no")
    finally:
        daemon.kill9()


def test_events_are_told_as_they_happen(busy: Daemon) -> None:
    command = [sys.executable, "-m", "targetd.ctl", *options(busy), "events", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as told:
        assert told.stdout is not None
        try:
            while True:  # until it listens, nothing is told
                made = busy.create("authorizedinitiator")
                if select.select([told.stdout], [], [], 0.2)[0]:
                    break
            event = json.loads(told.stdout.readline())
            assert event["event"] == "configuration"
            assert event["changed"]["initiator_groups"]["written"][0] <= made["id"]
        finally:
            told.terminate()


def test_refused_logins_are_told_and_explained(busy: Daemon) -> None:
    with SocketInitiator((HOST, busy.portal_port)) as client, pytest.raises(LoginFailed):
        client.login(busy.full_name("closed"), CLIENT)
    assert "is not granted through portal 1" in ctl(busy, "failures").ok()
    ctl(busy, "explain", CLIENT, HOST, "disk").ok()
    ctl(busy, "explain", CLIENT, HOST, "closed").refused("is not granted through portal 1")
    ctl(busy, "explain", CLIENT, HOST, "none").refused("no target none")
