"""Targets spread over worker processes: nobody notices, until one of them ends, and then only its own do."""

import os
import re
import select
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cdbs
from tests.daemon import HOST, Daemon, Disk, free_ports
from tests.functional.sessions import (
    BLOCK,
    GOOD,
    attention,
    capacity,
    log_in,
    populate_token,
    read,
    receive_token,
    unit_name,
    write,
    write_using_token,
)
from tests.functional.test_cluster import (
    KEY_1,
    KEY_2,
    REGISTER_AND_IGNORE,
    RESERVE,
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    can_write,
    held,
    keys,
    node,
    out,
)
from tests.functional.test_vmware import xcopy
from tests.initiator import ConnectionClosed, LoginFailed, SocketInitiator

MIB = 1 << 20
CAPACITY_CHANGED = (0x2A, 0x09)
OUT_OF_RESOURCES, SERVICE_UNAVAILABLE = 0x0302, 0x0301
LOGOUT_REQUESTED = 1
"""AsyncEvent of an Asynchronous Message (RFC 7143 §11.9.1)."""
LIMIT_MS = 20_000


def fleet_in(directory: Path) -> Iterator[Daemon]:
    daemon = Daemon(directory, options=("--workers", "2"))
    try:
        yield daemon.start()
        assert daemon.alive()
        assert daemon.terminate() == 0
        assert not daemon.tracebacks()
    finally:
        daemon.kill9()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with two workers, for this test alone."""
    yield from fleet_in(tmp_path)


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for tests that leave it as it was."""
    yield from fleet_in(tmp_path_factory.mktemp("fleet"))


def worker_of(daemon: Daemon, disk: Disk) -> int:
    """Which worker the target lives in, by what the last login has logged."""
    since = len(daemon.lines)
    log_in(daemon, disk.iqn, "asks").close()
    line = daemon.wait_for_line("logged in to", disk.iqn, "worker=", since=since)
    return int(line.rpartition("worker=")[2])


def statistics(daemon: Daemon) -> Any:
    return daemon.expect(200, "GET", "services/iscsi/statistics/")


def pids(daemon: Daemon) -> dict[int, int]:
    """Worker → its process."""
    return {int(process["name"]): process["pid"] for process in statistics(daemon)["processes"]}


def wait_for_end(pid: int) -> None:
    """Until the process is gone, by its own notice (pidfd_open(2))."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(LIMIT_MS), f"process {pid} is still there"
    finally:
        os.close(descriptor)


def two_apart(daemon: Daemon) -> tuple[Disk, Disk]:
    """Two disks that live in different workers."""
    one, two = daemon.create_disk("one", "8MB"), daemon.create_disk("two", "8MB")
    assert worker_of(daemon, one) != worker_of(daemon, two)
    return one, two


def sessions(daemon: Daemon) -> list[dict[str, Any]]:
    found = daemon.expect(200, "GET", "services/iscsi/session/")
    assert isinstance(found, list)
    return found


def test_targets_made_live_serve_wherever_they_live(shared_fleet: Daemon) -> None:
    """Create, log in, verified I/O, resize, list, drop, delete with sessions: as with one process."""
    daemon = shared_fleet
    disks = [daemon.create_disk(f"flow{number}", "8MB") for number in range(4)]
    assert {worker_of(daemon, disk) for disk in disks} == {1, 2}
    opened = [log_in(daemon, disk.iqn, f"flow{number}") for number, disk in enumerate(disks)]
    for number, initiator in enumerate(opened):
        assert write(initiator, 8, bytes((number + 1,)) * 4096).good
    for number, initiator in enumerate(opened):
        assert read(initiator, 8, 8) == bytes((number + 1,)) * 4096

    listed = {session["target_name"]: session for session in sessions(daemon)}
    assert listed.keys() == {disk.iqn for disk in disks}
    assert len({session["id"] for session in listed.values()}) == 4
    units = {unit["extent"]: unit for unit in statistics(daemon)["units"]}
    assert {units[f"flow{number}"]["bytes_written"] for number in range(4)} == {4096}

    for disk, initiator in zip(disks, opened, strict=True):
        path = f"services/iscsi/extent/{disk.extent_id}/"
        body = daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "16MB"})
        assert body["iscsi_target_extent_status"] == "ok"
        assert attention(initiator) == CAPACITY_CHANGED
        assert capacity(initiator) == 16 * MIB

    daemon.expect(204, "DELETE", f"services/iscsi/session/{listed[disks[1].iqn]['id']}/")
    with pytest.raises(ConnectionClosed):
        opened[1].command(cdbs.test_unit_ready())
    assert opened[1].asyncs, "it was asked to log out first"
    assert [s["target_name"] for s in sessions(daemon)] == [disks[n].iqn for n in (0, 2, 3)]
    daemon.expect(404, "DELETE", "services/iscsi/session/99999/")
    for disk in disks:
        daemon.delete_disk(disk)
    for initiator in (opened[0], opened[2], opened[3]):
        initiator.wait_closed()
    assert statistics(daemon)["units"] == []


def test_a_login_in_pieces_is_read_once_by_each_process(shared_fleet: Daemon) -> None:
    """RFC 7143 §6.2: with the C bit empty answers come from the front, the rest from the worker; CHAP too."""
    daemon = shared_fleet
    fields = {
        "iscsi_target_auth_tag": 7,
        "iscsi_target_auth_user": "user",
        "iscsi_target_auth_secret": "s" * 12,
    }
    daemon.create("authcredential", **fields)
    guarded = {"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 7}
    disk = daemon.create_disk("pieces", "1MB", target=guarded)
    with SocketInitiator((HOST, daemon.portal_port)) as initiator:
        initiator.login(disk.iqn, chap=("user", b"s" * 12), segment=16)
        assert attention(initiator) == (0x29, 0x00)
        assert write(initiator, 0, b"\x5a" * 512).good
    with SocketInitiator((HOST, daemon.portal_port)) as stranger, pytest.raises(LoginFailed):
        stranger.login(disk.iqn, chap=("user", b"wrong wrong 1"))
    with SocketInitiator((HOST, daemon.portal_port)) as stranger, pytest.raises(LoginFailed):
        stranger.login("iqn.2003-01.org.example:nobody")
    failures = daemon.expect(200, "GET", "services/iscsi/loginfailure/")
    assert [failure["status"] for failure in failures[:2]] == ["0203", "0201"]
    with SocketInitiator((HOST, daemon.portal_port)) as discovery:
        discovery.login()
        assert disk.iqn in [target.name for target in discovery.discover()]
    daemon.delete_disk(disk)


def test_a_change_that_fails_after_it_was_prepared_changes_nothing(shared_fleet: Daemon) -> None:
    """Every worker has prepared; the front cannot bind a port; the next change finds nobody waiting."""
    daemon = shared_fleet
    path = "services/iscsi/globalconfiguration/"
    before = daemon.expect(200, "GET", path)
    with socket.create_server((HOST, 0)) as taken:
        body = {
            "iscsi_toggleluc": True,
            "iscsi_lucport": taken.getsockname()[1],
            "iscsi_luc_authmethod": "None",
        }
        assert daemon.api("PUT", path, {**body, "iscsi_r2t": 17}).status == 409
    assert daemon.expect(200, "GET", path) == before
    daemon.expect(202, "PUT", path, {"iscsi_r2t": 18})
    daemon.expect(202, "PUT", path, {"iscsi_r2t": before["iscsi_r2t"]})


def test_iscsi_maxsesh_counts_the_sessions_of_all_workers(fleet: Daemon) -> None:
    one, two = two_apart(fleet)
    path = "services/iscsi/globalconfiguration/"
    fleet.expect(202, "PUT", path, {"iscsi_maxsesh": 2})
    with log_in(fleet, one.iqn, "a"), log_in(fleet, two.iqn, "b") as second:
        for disk in (one, two):
            with SocketInitiator((HOST, fleet.portal_port)) as third, pytest.raises(LoginFailed) as refused:
                third.login(disk.iqn, "iqn.2003-01.org.example:c")
            assert refused.value.status == OUT_OF_RESOURCES
        second.logout()
        log_in(fleet, one.iqn, "c").close()


class Busy(threading.Thread):
    """A session that writes and reads until it is told to end, or its connection does."""

    def __init__(self, daemon: Daemon, disk: Disk) -> None:
        super().__init__(daemon=True)
        self.initiator = log_in(daemon, disk.iqn, "busy")
        self.rounds = 0
        self.error: Exception | None = None
        self.over = threading.Event()
        self.moved = threading.Condition()

    def run(self) -> None:
        try:
            while not self.over.is_set():
                data = bytes((self.rounds % 256,)) * 4096
                assert write(self.initiator, 64, data).good
                assert read(self.initiator, 64, 8) == data
                with self.moved:
                    self.rounds += 1
                    self.moved.notify_all()
        except Exception as error:
            self.error = error

    def goes_on(self, rounds: int = 50) -> None:
        """So many rounds more."""
        with self.moved:
            aim = self.rounds + rounds
            assert self.moved.wait_for(lambda: self.rounds >= aim or self.error, LIMIT_MS / 1000)
        assert self.error is None, self.error

    def end(self) -> None:
        self.over.set()
        self.join()
        self.initiator.close()


def log_in_again(daemon: Daemon, disk: Disk, name: str) -> SocketInitiator:
    """As an initiator that recovers: while the target says that it is not available, it tries again.

    A process that is killed closes its connections before the front sees that it is gone (what it had in
    io_uring ends in between). What is handed to it goes with it, and one that comes with the news.
    """
    closed = 0
    while True:
        try:
            return log_in(daemon, disk.iqn, name)
        except LoginFailed as refused:
            assert refused.status == SERVICE_UNAVAILABLE
        except ConnectionClosed:
            closed += 1
            assert closed <= 2, "the front has seen the end of its worker"


def test_a_killed_worker_takes_its_own_sessions_only_and_comes_back(fleet: Daemon) -> None:
    one, two = two_apart(fleet)
    victim = worker_of(fleet, one)
    killed, spared = Busy(fleet, one), Busy(fleet, two)
    for busy in (killed, spared):
        busy.start()
        busy.goes_on()
    accepted = statistics(fleet)["portals"][0]
    since = len(fleet.lines)
    process = pids(fleet)[victim]
    os.kill(process, signal.SIGKILL)
    killed.join()
    assert isinstance(killed.error, ConnectionClosed)
    with log_in_again(fleet, one, "busy") as again:
        assert write(again, 0, b"\xc3" * 512).good
        assert read(again, 0, 1) == b"\xc3" * 512
    spared.goes_on()
    spared.end()
    assert spared.error is None
    fleet.wait_for_line(
        f"worker process {victim} (process {process}) has ended: killed by SIGKILL", since=since
    )
    after = statistics(fleet)
    assert pids(fleet)[victim] != process
    assert {p["name"]: p["restarts"] for p in after["processes"]} == {str(victim): 1, str(3 - victim): 0}
    for name in ("connections_accepted", "commands", "bytes_written"):
        assert after["portals"][0][name] >= accepted[name], f"{name}: a counter does not fall"
    metrics = fleet.api("GET", "/metrics").text
    assert f'iscsi_worker_restarts_total{{worker="{victim}"}} 1.0' in metrics
    # what is changed from now on reaches it as ever
    path = f"services/iscsi/extent/{one.extent_id}/"
    fleet.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "16MB"})
    with log_in(fleet, one.iqn) as initiator:
        assert capacity(initiator) == 16 * MIB


def test_what_a_unit_has_kept_survives_its_worker(fleet: Daemon) -> None:
    """SPC-4 §5.13.5: with APTPL the reservation is there when the power is back, and fences at once."""
    disk = fleet.create_disk("quorum", "8MB")
    process = pids(fleet)[worker_of(fleet, disk)]
    one = node(fleet, disk, 1)
    assert out(one, REGISTER_AND_IGNORE, new_key=KEY_1, aptpl=True).good
    assert out(one, RESERVE, KEY_1, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY).good
    os.kill(process, signal.SIGKILL)
    one.wait_closed()
    with log_in_again(fleet, disk, "stranger") as stranger:
        assert not can_write(stranger)
        assert keys(stranger) == [KEY_1]
    fleet.restart()
    with log_in(fleet, disk.iqn, "stranger") as stranger:
        assert not can_write(stranger)
    with node(fleet, disk, 1) as one:
        assert can_write(one)


def test_a_killed_front_leaves_no_process(fleet: Daemon) -> None:
    one, two = two_apart(fleet)
    workers = pids(fleet).values()
    with log_in(fleet, one.iqn) as initiator, log_in(fleet, two.iqn):
        assert write(initiator, 0, b"\x11" * 512).good
        fleet.kill9()
        for process in workers:
            wait_for_end(process)
    fleet.start()
    with log_in(fleet, one.iqn) as initiator:
        assert read(initiator, 0, 1) == b"\x11" * 512


def test_an_extent_shown_by_two_targets_brings_them_into_one_worker(fleet: Daemon) -> None:
    """The lesser part moves, with all it has: its initiators are asked to log out and come back."""
    one, two = two_apart(fleet)
    staying = worker_of(fleet, one)
    path = {"iscsi_target": two.target_id, "iscsi_extent": one.extent_id, "iscsi_lunid": 3}
    with (
        log_in(fleet, one.iqn, "s1") as s1,
        log_in(fleet, one.iqn, "s2") as s2,
        log_in(fleet, two.iqn) as goes,
    ):
        assert write(s1, 0, b"\x01" * BLOCK).good
        assert write(goes, 0, b"\x02" * BLOCK).good
        assert out(goes, REGISTER_AND_IGNORE, new_key=KEY_2).good
        fleet.create("targettoextent", **path)
        with pytest.raises(ConnectionClosed):
            goes.command(cdbs.test_unit_ready())
        assert goes.asyncs[0].header.async_event == LOGOUT_REQUESTED
        assert worker_of(fleet, two) == staying
        with log_in(fleet, two.iqn) as back:
            assert read(back, 0, 1) == b"\x02" * BLOCK
            assert keys(back) == [KEY_2], "no power was lost"
            assert attention(back, 3) == (0x29, 0x00)
            assert read(back, 0, 1, lun=3) == b"\x01" * BLOCK
            assert out(s1, REGISTER_AND_IGNORE, new_key=KEY_1).good
            assert out(s1, RESERVE, KEY_1, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY).good
            reply = write(back, 0, bytes(BLOCK), lun=3)
            assert reply.status != GOOD, "one medium, one reservation"
            assert held(s2) == (KEY_1, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)


def test_a_copy_does_not_reach_into_another_worker(fleet: Daemon) -> None:
    """The initiator learns that it must copy by itself; a process reaches its own media only."""
    one, two = two_apart(fleet)
    with log_in(fleet, one.iqn) as source, log_in(fleet, two.iqn) as destination:
        assert write(source, 0, b"\x01" * BLOCK).good
        reply = source.command(*xcopy(unit_name(source), unit_name(destination), [(0, 0, 1)]))
        assert (reply.sense_key, reply.additional_sense) == (0x0A, (0x08, 0x04))
        assert source.command(*populate_token([(0, 1)])).good
        reply = destination.command(*write_using_token(receive_token(source), [(0, 1)]))
        assert (reply.sense_key, reply.additional_sense) == (0x05, (0x23, 0x04))
        assert read(destination, 0, 1) == bytes(BLOCK)


def test_stopping_the_service_ends_the_sessions_of_all_workers(shared_fleet: Daemon) -> None:
    daemon = shared_fleet
    disks = [daemon.create_disk(f"stop{number}", "1MB") for number in range(2)]
    opened = [log_in(daemon, disk.iqn) for disk in disks]
    state = "services/services/iscsitarget/"
    daemon.expect(200, "PUT", state, {"srv_enable": False})
    for initiator in opened:
        initiator.wait_closed()
    daemon.expect(200, "PUT", state, {"srv_enable": True})
    for disk in disks:
        log_in(daemon, disk.iqn).close()
        daemon.delete_disk(disk)


def test_a_stopped_worker_holds_up_only_what_concerns_it(fleet: Daemon) -> None:
    """What it said last is shown with its age; who asks again does not wait again; others change."""
    daemon = fleet
    one, two = two_apart(daemon)
    initiators = [log_in(daemon, disk.iqn, "stays") for disk in (one, two)]
    extents = {disk: f"services/iscsi/extent/{disk.extent_id}/" for disk in (one, two)}
    assert daemon.expect(200, "GET", extents[one])["iscsi_target_extent_status"] == "ok"
    assert {session["told_s"] for session in sessions(daemon)} == {0}
    index = worker_of(daemon, one)
    stopped = pids(daemon)[index]
    os.kill(stopped, signal.SIGSTOP)
    try:
        since = len(daemon.lines)
        for _ in range(3):
            status = daemon.expect(200, "GET", extents[one])["iscsi_target_extent_status"]
            assert re.fullmatch(
                rf"its worker process {index} has not answered for \d+ s; before that: ok", status
            )
            assert daemon.expect(200, "GET", extents[two])["iscsi_target_extent_status"] == "ok"
            told = {session["target_name"]: session["told_s"] for session in sessions(daemon)}
            assert (told[one.iqn] > 0, told[two.iqn]) == (True, 0)
            figures = statistics(daemon)
            assert {unit["extent"] for unit in figures["units"]} == {"one", "two"}
            ages = {int(process["name"]): process["told_s"] for process in figures["processes"]}
            assert {number for number, age in ages.items() if age > 0} == {index}
            peer = f"initiator={initiators[0].initiator_name}&address={HOST}"
            (explained,) = daemon.expect(200, "GET", f"services/iscsi/explain/?{peer}&target={one.iqn}")
            assert not explained["allowed"]
            assert "has not answered for" in explained["reason"]

        for path, body in (
            (extents[one], {"iscsi_target_extent_filesize": "16MB"}),
            ("services/iscsi/globalconfiguration/", {"iscsi_pool_avail_threshold": 70}),
        ):
            refused = daemon.expect(409, "PUT", path, body)
            assert f"Worker process {index} does not answer" in str(refused)
        body = daemon.expect(202, "PUT", extents[two], {"iscsi_target_extent_filesize": "16MB"})
        assert body["iscsi_target_extent_status"] == "ok"
        assert attention(initiators[1]) == CAPACITY_CHANGED
        new = [daemon.create_disk(f"new{number}", "8MB") for number in range(2)]
        for disk in new:
            assert worker_of(daemon, disk) != index, "what is new goes to workers that answer"
        silences = [line for line in daemon.lines[since:] if f"worker process {index} (" in line]
        assert len(silences) == 1, "that it is silent was found out once, and nobody waited for it again"
    finally:
        since = len(daemon.lines)
        os.kill(stopped, signal.SIGCONT)
    daemon.wait_for_line(f"worker process {index} answers again", since=since)
    assert daemon.expect(200, "GET", extents[one])["iscsi_target_extent_status"] == "ok"
    assert {session["told_s"] for session in sessions(daemon)} == {0}
    assert capacity(initiators[0]) == 8 * MIB, "what was refused was not done later"
    daemon.expect(202, "PUT", extents[one], {"iscsi_target_extent_filesize": "16MB"})
    assert attention(initiators[0]) == CAPACITY_CHANGED
    for number, initiator in enumerate(initiators):
        assert write(initiator, 8, bytes((number + 1,)) * 4096).good
        assert read(initiator, 8, 8) == bytes((number + 1,)) * 4096
        initiator.close()


def test_explain_shows_the_luns_of_every_worker(shared_fleet: Daemon) -> None:
    daemon = shared_fleet
    disks = [daemon.create_disk(f"shown{number}", "1MB") for number in range(2)]
    query = f"services/iscsi/explain/?initiator=iqn.2003-01.org.example:x&address={HOST}"
    answers = daemon.expect(200, "GET", query)
    assert [answer["target_name"] for answer in answers] == [disk.iqn for disk in disks]
    assert all(answer["luns"][0]["ready"] for answer in answers)
    for disk in disks:
        daemon.delete_disk(disk)


def test_the_controller_reaches_units_of_every_worker(shared_fleet: Daemon) -> None:
    """istgt's protocol: LIST, INFO and RESET, wherever the unit lives."""
    daemon = shared_fleet
    disks = [daemon.create_disk(f"unit{number}", "1MB") for number in range(2)]
    path = "services/iscsi/globalconfiguration/"
    (port,) = free_ports(1)
    body = {"iscsi_toggleluc": True, "iscsi_lucport": port, "iscsi_luc_authmethod": "None"}
    daemon.expect(202, "PUT", path, body)
    opened = [log_in(daemon, disk.iqn) for disk in disks]
    with socket.create_connection((HOST, port), 10) as client, client.makefile("rw", newline="\r\n") as lines:
        assert "iSCSI Target Controller" in lines.readline()
        for disk, initiator in zip(disks, opened, strict=True):
            lines.write(f'LIST "{disk.iqn}"\r\n')
            lines.flush()
            assert re.fullmatch(r'LIST lun0 storage ".*" 1048576\r\n', lines.readline())
            assert lines.readline() == "OK LIST\r\n"
            lines.write(f'RESET "{disk.iqn}" 0\r\n')
            lines.flush()
            assert lines.readline() == "OK RESET\r\n"
            assert attention(initiator) == (0x29, 0x03)  # BUS DEVICE RESET FUNCTION OCCURRED
        lines.write("INFO\r\n")
        lines.flush()
        told = lines.readline() + lines.readline()
        assert all(disk.iqn in told for disk in disks)
        assert lines.readline() == "OK INFO\r\n"
    daemon.expect(202, "PUT", path, {"iscsi_toggleluc": False})
    for initiator, disk in zip(opened, disks, strict=True):
        initiator.close()
        daemon.delete_disk(disk)
