"""A daemon that cannot start: one line, the right exit status, nothing left half done."""

import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import HOST, ROOT, START_LIMIT_S, Daemon, DaemonError, free_ports


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that has not been started yet."""
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.kill9()


def refused(daemon: Daemon) -> str:
    """What is said by a daemon that ends with exit status 1: one line, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "targetd", *daemon.arguments()],
        cwd=daemon.directory,
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr.removeprefix("iscsi-targetd: ").rstrip("\n")


def occupied(daemon: Daemon, *, portal: bool, api: bool) -> Daemon:
    """The same daemon beside another that has its addresses; both are fresh."""
    ports = free_ports(2)
    return Daemon(
        daemon.directory / "other",
        portal_port=daemon.portal_port if portal else ports[0],
        api_port=daemon.api_port if api else ports[1],
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("portal", "api"), [(True, False), (False, True)])
def test_a_port_in_use_is_one_line_and_leaves_nothing_behind(
    daemon: Daemon, portal: bool, api: bool, workers: int
) -> None:
    """The next start, with other ports, is the first one: it takes them, and tells of the password."""
    daemon.start()
    other = occupied(daemon, portal=portal, api=api)
    other.options = ["--workers", str(workers)]
    said = refused(other)
    address = f"{HOST}:{daemon.portal_port}" if portal else f"--api {HOST}:{daemon.api_port}"
    assert said.startswith(address)
    assert "in use" in said
    other.portal_port, other.api_port = free_ports(2)
    other.start()
    try:
        assert other.expect(200, "GET", "services/iscsi/portal/1/")["iscsi_target_portal_ips"] == [
            other.portal
        ]
        told = [line for line in other.lines if "admin password" in line]
        assert told == [f"The admin password of the API (user root) is in {other.state_dir / 'api-password'}"]
        shown = len(other.lines)
        other.restart()
        assert not any("admin password" in line for line in other.lines[shown:]), "it is told once"
    finally:
        other.kill9()


def spoil(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)


def of_the_future(path: Path) -> None:
    with sqlite3.connect(path) as store:
        store.execute("UPDATE alembic_version SET version_num = '9999'")
    store.close()


@pytest.mark.parametrize(("damage", "words"), [(spoil, "damaged"), (of_the_future, "newer")])
def test_a_store_that_must_not_be_used_stays_as_it_is(
    daemon: Daemon, damage: Callable[[Path], None], words: str
) -> None:
    daemon.start()
    daemon.create("target", iscsi_target_name="precious")
    daemon.terminate()
    path = daemon.state_dir / "targetd.sqlite"
    damage(path)
    before = hashlib.sha256(path.read_bytes()).digest()
    said = refused(daemon)
    assert str(path) in said
    assert words in said
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_a_demo_that_cannot_be_made_is_one_line(daemon: Daemon) -> None:
    daemon.start()
    daemon.create(
        "extent",
        iscsi_target_extent_name="demo",
        iscsi_target_extent_type="File",
        iscsi_target_extent_path=str(daemon.extent_root / "mine.img"),
        iscsi_target_extent_filesize="1MB",
    )
    daemon.delete("portal", 1)
    daemon.terminate()
    daemon.options = ["--demo", "--log-level", "error"]
    assert refused(daemon) == "--demo needs a portal with an address, and there is none."
    daemon.options = []
    daemon.start()
    daemon.create("portal", iscsi_target_portal_ips=[daemon.portal])
    daemon.terminate()
    daemon.options = ["--demo", "--log-level", "error"]
    assert refused(daemon) == "Extent name must be unique"


def test_the_demo_names_the_password_file_that_is_used(daemon: Daemon) -> None:
    password = daemon.directory / "pass word"
    password.write_text("of-the-operator\n")
    daemon.options = ["--demo", "--api-password-file", str(password)]
    daemon.start()
    (line,) = [line for line in daemon.lines if "curl" in line]
    command = line.partition("REST API")[2].strip()
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert '"iscsi_target_name": "demo"' in answer.stdout, answer.stderr
    assert not any("admin password" in line for line in daemon.lines)


def test_a_daemon_that_did_not_start_says_so_to_who_waits(daemon: Daemon) -> None:
    daemon.options = ["--nonsense"]
    with pytest.raises(DaemonError, match=r"ended with 2 .*\n.*--nonsense"):
        daemon.start()
