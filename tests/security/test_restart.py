"""Over a restart nobody is refused: sockets stay open, peers wait in the kernel's queue, commands come again.

``Manager`` stands in for systemd. The Linux initiator under fio goes through the same in ``tests/guest``.
"""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.enums import AsyncEvent, ScsiStatus
from targetd.net.inherited_sockets import Listeners, inherited
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import ConnectionClosed, LoginFailed, SocketInitiator
from tests.security.manager import Manager

WRITE = "2a00{:08x}00000800"
READ = "2800{:08x}00000800"
BLOCKS = 8
PATIENCE_S = 60
"""A daemon starts within a second; on a busy machine it may be half a minute."""
REPORT_LUNS = bytes.fromhex("a00000000000000000100000")
"""Answered whatever unit attention waits."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as made:
        yield made


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.kill9()


def listening(port: int = 0, family: int = socket.AF_INET, host: str = HOST) -> socket.socket:
    return socket.create_server((host, port), family=family, backlog=64)


class Worker(threading.Thread):
    """An initiator as hosts have them: writes and reads back, and when its connection ends or it is asked to
    log out it logs in again and sends again what was not answered. A refused connection is a failure here."""

    def __init__(self, daemon: Daemon, disk: Disk, number: int) -> None:
        super().__init__(daemon=True)
        self.address = (HOST, daemon.portal_port)
        self.disk = disk
        self.number = number
        self.verified = self.logins = self.asked_to_leave = 0
        self.enough = threading.Event()
        self.progress = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self._session()
        except BaseException as error:
            self.failure = error
            self.progress.release(1 << 20)

    def _session(self) -> None:
        try:
            with SocketInitiator(self.address, timeout_s=PATIENCE_S) as peer:
                self._work(peer)
        except (ConnectionClosed, ConnectionResetError, BrokenPipeError):
            pass  # in the middle of something: it comes again
        except LoginFailed as failed:
            # 03xxh: try again (RFC 7143 §11.13.5), as every initiator does.
            assert failed.response.status_class == 3, failed

    def _work(self, peer: SocketInitiator) -> None:
        peer.login(self.disk.iqn, f"iqn.2026-11.example:worker-{self.number}")
        self.logins += 1
        peer.command(bytes(6))
        while not self.enough.is_set():
            lba = (self.number * 4096 + self.verified % 256) * BLOCKS
            data = os.urandom(16) * (BLOCKS * 512 // 16)
            assert peer.command(bytes.fromhex(WRITE.format(lba)), data).good
            reply = peer.command(bytes.fromhex(READ.format(lba)), read=BLOCKS * 512)
            assert reply.good
            assert reply.data == data
            self.verified += 1
            self.progress.release()
            if any(pdu.header.async_event == AsyncEvent.LOGOUT_REQUEST for pdu in peer.asyncs):  # type: ignore[attr-defined]
                self.asked_to_leave += 1
                peer.logout()
                return

    def wait(self, pairs: int) -> None:
        for _ in range(pairs):
            assert self.progress.acquire(timeout=PATIENCE_S)
        if self.failure is not None:
            raise self.failure


@pytest.mark.parametrize("end", ["terminate", "kill9"])
def test_commands_over_a_restart_come_again_and_none_fails(
    managed: Daemon, manager: Manager, end: str
) -> None:
    """Portals are in the descriptor store: who is asked to log out, or thrown out by a crash, connects while
    nobody runs and is served by the next daemon. Four initiators write and verify all the while."""
    manager.start(managed)
    disk = managed.create_disk("one")
    workers = [Worker(managed, disk, number) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.wait(10)
    getattr(managed, end)()
    manager.start(managed)
    for worker in workers:
        worker.wait(10)
        worker.enough.set()
        worker.join(PATIENCE_S)
        assert worker.failure is None
        assert worker.logins == 2
        assert worker.asked_to_leave == (1 if end == "terminate" else 0)
    assert not managed.tracebacks()
    assert managed.terminate() == 0


def test_who_comes_while_nobody_runs_is_served_by_the_next_daemon(managed: Daemon, manager: Manager) -> None:
    """A whole login, and a request to the API, sent into the kernel's queues."""
    manager.start(managed)
    disk = managed.create_disk("one")
    managed.kill9()
    answers: list[int] = []

    def ask() -> None:
        answers.append(managed.api("GET", "services/iscsi/target/").status)

    def login() -> None:
        with SocketInitiator((HOST, managed.portal_port), timeout_s=PATIENCE_S) as peer:
            peer.login(disk.iqn)
            answers.append(peer.command(REPORT_LUNS, read=16).status)

    visitors = [threading.Thread(target=visit) for visit in (ask, login)]
    for visitor in visitors:
        visitor.start()
    assert answers == []
    manager.start(managed)
    for visitor in visitors:
        visitor.join(PATIENCE_S)
    assert sorted(answers) == [ScsiStatus.GOOD, 200]


def test_store_holds_what_is_listened_on_and_nothing_else(managed: Daemon, manager: Manager) -> None:
    """A portal that is made goes in; one that is deleted, or not wanted at a later start, goes out."""
    manager.start(managed)
    first = f"stored.portal.{managed.portal.replace(':', '_')}"
    api = f"stored.api.{HOST}_{managed.api_port}"
    assert set(manager.store) == {first, api}
    with listening() as sock:
        port = sock.getsockname()[1]
    made = managed.create("portal", iscsi_target_portal_ips=[f"{HOST}:{port}"])
    manager.listen()
    assert set(manager.store) == {first, api, f"stored.portal.{HOST}_{port}"}
    managed.delete("portal", made["id"])
    manager.listen()
    assert set(manager.store) == {first, api}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5)
    stale = listening()
    manager.store[f"stored.portal.{HOST}_{stale.getsockname()[1]}"] = stale
    managed.terminate()
    manager.start(managed)
    assert set(manager.store) == {first, api}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(stale_address(managed), timeout=5)


def stale_address(daemon: Daemon) -> tuple[str, int]:
    line = daemon.wait_for_line("nothing listens on", "any more")
    return HOST, int(line.split(f"{HOST}:")[1].split()[0])


def test_socket_unit_serves_portal_and_api(managed: Daemon, manager: Manager) -> None:
    """Sockets of a unit are used for the portal with their address, and for the API by name, wherever it is;
    they are not stored, and are there for a portal that is made again."""
    portal, api = listening(managed.portal_port), listening()
    manager.unit = [("iscsi-targetd.socket", portal), ("api", api)]
    manager.start(managed)
    assert manager.store == {}
    managed.api_port = api.getsockname()[1]
    disk = managed.create_disk("one")
    for enabled in (False, True):
        managed.expect(200, "PUT", "services/services/iscsitarget/", {"srv_enable": enabled})
    with SocketInitiator((HOST, managed.portal_port), timeout_s=PATIENCE_S) as peer:
        peer.login(disk.iqn)
        peer.command(bytes(6))
        assert peer.command(bytes(6)).good
    assert manager.listen() == [] or manager.store == {}
    assert managed.terminate() == 0


def test_sockets_that_are_none_for_us_are_told_and_left_alone(managed: Daemon, manager: Manager) -> None:
    """A datagram socket, one that takes IPv4 on its IPv6 address, and a portal that there is not."""
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagram.bind((HOST, 0))
    both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    manager.unit = [("datagram", datagram), ("both", both), ("spare", listening())]
    manager.start(managed)
    managed.wait_for_line("does not listen on TCP")
    managed.wait_for_line("use BindIPv6Only=ipv6-only")
    managed.create_disk("one")


def test_variables_for_another_process_are_not_ours() -> None:
    """LISTEN_PID names whom they are for (sd_listen_fds(3)); either way no child of ours sees them."""
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert inherited(environ) == []
    assert environ == {"HOME": "/"}
    assert inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == []


def test_a_socket_from_the_unit_and_from_the_store_is_one() -> None:
    sock = listening()
    address = f"{HOST}:{sock.getsockname()[1]}"
    listeners = Listeners([("unit", sock), ("stored.portal.x", sock.dup())])
    first, second = listeners.take(address), listeners.take(address)
    assert first is not None
    assert second is not None
    with first, second:
        assert first.getsockname() == second.getsockname()
    listeners.settle()
    listeners.close()
