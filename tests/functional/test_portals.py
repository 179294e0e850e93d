"""Portals follow the host: addresses are bound as they come and released as they go (api-semantics §5.6).

The daemon runs in a network namespace with one end of a veth pair; initiators come from another namespace,
over the wire, so that an address which is gone is gone for them too.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import HOST, Daemon, free_ports
from tests.functional.sessions import attention, daemon_in, log_in, read, write
from tests.initiator import SocketInitiator
from tests.network import Network, needs_networks

STAYS, COMES, COMES_V6 = "10.77.0.1", "10.77.0.9", "fd00:77::9"
ELSEWHERE = "192.0.2.77"
"""Of TEST-NET-1 (RFC 5737): no host has it."""
PORT = 3260
INITIATOR = "iqn.2003-01.org.example:one"


def portal(daemon: Daemon, *addresses: str) -> dict[str, Any]:
    return daemon.create("portal", iscsi_target_portal_ips=list(addresses))


def status(daemon: Daemon, portal_id: int) -> str:
    shown: str = daemon.expect(200, "GET", f"services/iscsi/portal/{portal_id}/")[
        "iscsi_target_portal_status"
    ]
    return shown


class Verified(threading.Thread):
    """Writes and reads back what it wrote, over one session from another network, until told to stop."""

    def __init__(self, network: Network, address: tuple[str, int], target: str) -> None:
        super().__init__(daemon=True)
        self._network = network
        self._stopped = threading.Event()
        self._progress = threading.Condition()
        self._rounds = 0
        self._error: BaseException | None = None
        with network.entered():
            self._initiator = SocketInitiator(address)
        self._initiator.login(target, INITIATOR)
        attention(self._initiator)

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                data = bytes((self._rounds + n) % 251 for n in range(16384))
                lba = self._rounds * 32 % 8192
                assert write(self._initiator, lba, data).good
                assert read(self._initiator, lba, 32) == data
                with self._progress:
                    self._rounds += 1
                    self._progress.notify_all()
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify_all()

    def go_on(self) -> None:
        """Wait until it has done some more."""
        with self._progress:
            goal = self._rounds + 3
            assert self._progress.wait_for(lambda: self._rounds >= goal or self._error, 30)
            assert self._error is None, self._error

    def stop(self) -> None:
        self._stopped.set()
        self.join(30)
        self._initiator.close()
        assert self._error is None, self._error


@contextmanager
def verified(network: Network, address: tuple[str, int], target: str) -> Iterator[Verified]:
    worker = Verified(network, address, target)
    worker.start()
    try:
        worker.go_on()
        yield worker
    finally:
        worker.stop()


@pytest.fixture
def wire() -> Iterator[tuple[Network, Network]]:
    """The daemon's network, which this test runs in, and the initiators'; a wire between them."""
    here, there = Network(), Network()
    try:
        here.join(there, "here0", "there0")
        here.ip("addr", "add", f"{STAYS}/24", "dev", "here0")
        there.ip("addr", "add", "10.77.0.2/24", "dev", "there0")
        there.ip("addr", "add", "fd00:77::2/64", "dev", "there0", "nodad")
        with here.entered():
            yield here, there
    finally:
        here.close()
        there.close()


@needs_networks
def test_an_address_comes_and_goes_while_sessions_on_another_portal_do_io(
    wire: tuple[Network, Network], tmp_path: Path
) -> None:
    """Bound when it appears (an IPv6 one when its duplicate address detection is over, RFC 4862 §5.4),
    released when it goes; nobody else notices."""
    here, there = wire
    with daemon_in(tmp_path) as daemon:
        quiet = portal(daemon, STAYS)
        moving = portal(daemon, COMES, f"[{COMES_V6}]:{PORT}")
        assert quiet["iscsi_target_portal_status"] == "ok"
        assert moving["iscsi_target_portal_status"] == (
            f"{COMES} is not an address of this host; [{COMES_V6}]:{PORT} is not an address of this host"
        )
        disk = daemon.create_disk("disk", "8MB", target={"iscsi_target_portalgroup": quiet["id"]})
        other = daemon.create_disk("other", "8MB", target={"iscsi_target_portalgroup": moving["id"]})
        daemon.create("targetgroup", iscsi_target=other.target_id, iscsi_target_portalgroup=quiet["id"])

        def addresses() -> set[str]:
            """Where initiators of the quiet portal learn that the other target is."""
            with there.entered(), SocketInitiator((STAYS, PORT)) as initiator:
                initiator.login(None, INITIATOR)
                (found,) = initiator.discover(other.iqn)
                initiator.logout()
            return {address.rpartition(",")[0] for address in found.addresses}

        with verified(there, (STAYS, PORT), disk.iqn) as worker:
            sessions = daemon.expect(200, "GET", "services/iscsi/session/")
            seen = 0
            for host, url, length in ((COMES, f"{COMES}:{PORT}", 24), (COMES_V6, f"[{COMES_V6}]:{PORT}", 64)):
                assert url not in addresses()
                address = COMES if host == COMES else url
                for _ in range(2):
                    here.ip("addr", "add", f"{host}/{length}", "dev", "here0")
                    daemon.wait_for_line(f"listens on {address}", since=seen)
                    seen = len(daemon.lines)
                    assert address not in status(daemon, moving["id"])
                    assert url in addresses()
                    with there.entered(), SocketInitiator((host, PORT)) as initiator:
                        initiator.login(other.iqn, INITIATOR)
                        initiator.logout()
                    worker.go_on()
                    here.ip("addr", "del", f"{host}/{length}", "dev", "here0")
                    daemon.wait_for_line(f"{address} is not an address of this host", since=seen)
                    seen = len(daemon.lines)
                    assert f"{address} is not an address" in status(daemon, moving["id"])
                    worker.go_on()
            assert daemon.expect(200, "GET", "services/iscsi/session/")[0]["id"] == sessions[0]["id"]
            here.ip("addr", "add", f"{COMES}/24", "dev", "here0")
            daemon.wait_for_line(f"listens on {COMES}", since=seen)


@needs_networks
def test_a_session_survives_an_address_that_comes_back(wire: tuple[Network, Network], tmp_path: Path) -> None:
    """A lease renewed, a failover undone: the listener goes and comes, connections have their own limits."""
    here, there = wire
    with daemon_in(tmp_path) as daemon:
        group = portal(daemon, STAYS)
        disk = daemon.create_disk("disk", "8MB", target={"iscsi_target_portalgroup": group["id"]})
        with there.entered(), SocketInitiator((STAYS, PORT)) as initiator:
            initiator.login(disk.iqn, INITIATOR)
            attention(initiator)
            seen = len(daemon.lines)
            here.ip("addr", "del", f"{STAYS}/24", "dev", "here0")
            daemon.wait_for_line(f"{STAYS} is not an address", since=seen)
            here.ip("addr", "add", f"{STAYS}/24", "dev", "here0")
            daemon.wait_for_line(f"listens on {STAYS}", since=seen)
            assert write(initiator, 0, bytes(512)).good
            initiator.logout()


@needs_networks
def test_a_port_taken_when_the_address_comes_is_told_and_tried_again(
    wire: tuple[Network, Network], tmp_path: Path
) -> None:
    here, _ = wire
    with daemon_in(tmp_path) as daemon:
        group = portal(daemon, COMES)
        intruder = socket.socket()
        intruder.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: there before the address is
        with intruder:
            intruder.bind((COMES, PORT))
            intruder.listen()
            here.ip("addr", "add", f"{COMES}/24", "dev", "here0")
            daemon.wait_for_line(f"{COMES} is in use already")
            assert status(daemon, group["id"]) == f"{COMES} is in use already"
        daemon.wait_for_line(f"listens on {COMES}", limit_s=30)
        assert status(daemon, group["id"]) == "ok"


def test_a_portal_with_an_address_of_nowhere(daemon: Daemon) -> None:
    """Accepted and told, as it may come; the daemon starts without it; initiators do not hear of it."""
    seen = len(daemon.lines)
    made = portal(daemon, f"{ELSEWHERE}:{PORT}")
    told = f"{ELSEWHERE}:{PORT} is not an address of this host"
    assert made["iscsi_target_portal_status"] == told
    daemon.wait_for_line("WARNING", told, since=seen)
    metrics = daemon.api("GET", "/metrics").text
    assert f'iscsi_portal_addresses_absent{{portal="{made["id"]}"}} 1.0' in metrics
    assert 'iscsi_portal_addresses_absent{portal="1"} 0.0' in metrics
    changed = daemon.expect(
        202,
        "PUT",
        "services/iscsi/portal/1/",
        {"iscsi_target_portal_ips": [daemon.portal, "[2001:db8::77]:3260", "[fe80::77%nowhere0]:3260"]},
    )
    v6, link_local = changed["iscsi_target_portal_status"].split("; ")
    assert v6.startswith("[2001:db8::77]:3260 ")
    assert link_local == "[fe80::77%nowhere0]:3260 is of an interface that this host does not have"
    disk = daemon.create_disk("disk", "8MB")
    daemon.restart()
    assert status(daemon, made["id"]) == told
    with SocketInitiator((HOST, daemon.portal_port)) as initiator:
        initiator.login(None)
        (found,) = initiator.discover(disk.iqn)
        assert found.addresses == (f"{daemon.portal},1",)
    explained = daemon.expect(200, "GET", f"services/iscsi/explain/?initiator={INITIATOR}&address={HOST}")
    assert [entry["allowed"] for entry in explained if entry["portal_id"] == made["id"]] in ([], [False])
    daemon.delete("portal", made["id"])


def test_a_port_in_use_is_an_error_of_a_change_and_waited_for_at_a_start(daemon: Daemon) -> None:
    """Somebody has to choose another, for which the API has to be there."""
    disk = daemon.create_disk("disk", "8MB")
    with socket.create_server((HOST, 0)) as taken:
        address = f"{HOST}:{taken.getsockname()[1]}"
        wrong = {"iscsi_target_portal_ips": [f"{address} is in use already."]}
        body = {"iscsi_target_portal_ips": [address]}
        assert daemon.expect(409, "POST", "services/iscsi/portal/", body) == wrong
        body = {"iscsi_target_portal_ips": [daemon.portal, address]}
        assert daemon.expect(409, "PUT", "services/iscsi/portal/1/", body) == wrong
    daemon.terminate()
    with socket.create_server((HOST, daemon.portal_port)):
        daemon.start()
        assert status(daemon, 1) == f"{daemon.portal} is in use already"
        # other changes are made meanwhile, that of the portal too
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_r2t": 7})
        (port,) = free_ports(1)
        body = {"iscsi_target_portal_ips": [f"{HOST}:{port}"]}
        daemon.expect(202, "PUT", "services/iscsi/portal/1/", body)
        assert status(daemon, 1) == "ok"
        SocketInitiator((HOST, port)).close()
    daemon.expect(202, "PUT", "services/iscsi/portal/1/", {"iscsi_target_portal_ips": [daemon.portal]})
    log_in(daemon, disk.iqn).close()
    daemon.terminate()
    shown = len(daemon.lines)
    with socket.create_server((HOST, daemon.portal_port)):
        daemon.start()
    daemon.wait_for_line(f"portal 1 listens on {daemon.portal}", since=shown)
    log_in(daemon, disk.iqn).close()


def test_the_controllers_port_in_use_is_waited_for_at_a_start(daemon: Daemon) -> None:
    (port,) = free_ports(1)
    settings = {
        "iscsi_toggleluc": True,
        "iscsi_lucip": HOST,
        "iscsi_lucport": port,
        "iscsi_luc_authmethod": "None",
    }
    daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", settings)
    daemon.terminate()
    with socket.create_server((HOST, port)):
        daemon.start()
        daemon.wait_for_line(f"controller cannot listen: {HOST} port {port} is in use already")
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_r2t": 7})
    daemon.wait_for_line(f"controller listens on {HOST} port {port}", since=len(daemon.lines))
    socket.create_connection((HOST, port)).close()


def test_from_every_address_to_one_and_back_without_a_pause(daemon: Daemon) -> None:
    """Our own listener that the same change removes is not in the way; if the change fails it listens on."""
    disk = daemon.create_disk("disk", "8MB")
    port = daemon.portal_port

    def listen_on(*addresses: str, expected: int = 202) -> None:
        body = {"iscsi_target_portal_ips": list(addresses)}
        daemon.expect(expected, "PUT", "services/iscsi/portal/1/", body)

    with log_in(daemon, disk.iqn) as initiator:
        listen_on(f"0.0.0.0:{port}")
        with socket.create_server((HOST, 0)) as taken:
            listen_on(f"{HOST}:{port}", f"{HOST}:{taken.getsockname()[1]}", expected=409)
        SocketInitiator(("127.0.0.2", port)).close()
        listen_on(f"127.0.0.2:{port}")
        with pytest.raises(ConnectionRefusedError):
            SocketInitiator((HOST, port))
        listen_on(f"{HOST}:{port}", f"127.0.0.2:{port}")
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((HOST, port))
        assert write(initiator, 0, bytes(512)).good
        initiator.logout()


@needs_networks
def test_a_link_local_address_is_listened_on_in_its_zone(
    wire: tuple[Network, Network], tmp_path: Path
) -> None:
    """RFC 4007 §11: the interface belongs to the address, by name or number; initiators are not told it."""
    here, there = wire
    for network, device, address in ((here, "here0", "fe80::77:1"), (there, "there0", "fe80::77:2")):
        network.ip("addr", "add", f"{address}/64", "dev", device, "nodad")
    with daemon_in(tmp_path) as daemon:
        made = portal(
            daemon, f"[fe80::77:1%here0]:{PORT}", f"[fe80::77:1%{socket.if_nametoindex('lo')}]:{PORT}"
        )
        assert made["iscsi_target_portal_status"] == (
            f"[fe80::77:1%{socket.if_nametoindex('lo')}]:{PORT} is not an address of this host"
        )
        disk = daemon.create_disk("disk", "1MB", target={"iscsi_target_portalgroup": made["id"]})
        with there.entered(), SocketInitiator(("fe80::77:1%there0", PORT)) as initiator:
            initiator.login(None, INITIATOR)
            (found,) = initiator.discover(disk.iqn)
            assert list(found.addresses) == [f"[fe80::77:1]:{PORT},{made['id']}"]
        with there.entered(), SocketInitiator(("fe80::77:1%there0", PORT)) as initiator:
            initiator.login(disk.iqn, INITIATOR)
            attention(initiator)
            assert write(initiator, 0, bytes(512)).good
        elsewhere = portal(daemon, f"[fe80::77:1%none0]:{PORT}")
        assert elsewhere["iscsi_target_portal_status"] == (
            f"[fe80::77:1%none0]:{PORT} is of an interface that this host does not have"
        )
        body = {"iscsi_target_portal_ips": [f"[fe80::77:1]:{PORT}"]}
        refused = daemon.expect(409, "POST", "services/iscsi/portal/", body)
        assert "needs its interface behind it: fe80::1%eth0" in refused["iscsi_target_portal_ips"][0]
