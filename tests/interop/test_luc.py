"""istgt's own ``istgtcontrol`` against our logical unit controller (api-semantics §8)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import HOST, Daemon, free_ports
from tests.initiator import SocketInitiator
from tests.interop.peers import Ran, needs, run

pytestmark = [pytest.mark.interop, needs("istgtcontrol")]

USER, SECRET = "operator", "operator-secret"
PEER_USER, PEER_SECRET = "controller", "controller-secret"
TAG = 9


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("luc")).start()
    daemon.create(
        "authcredential",
        iscsi_target_auth_tag=TAG,
        iscsi_target_auth_user=USER,
        iscsi_target_auth_secret=SECRET,
        iscsi_target_auth_peeruser=PEER_USER,
        iscsi_target_auth_peersecret=PEER_SECRET,
    )
    daemon.create_disk("one", "64MB")
    daemon.create_disk("two", "32MB")
    yield daemon
    assert not daemon.tracebacks()
    assert daemon.terminate() == 0


class Control:
    """``istgtcontrol`` with a configuration of its own, so that the machine's is not read."""

    def __init__(self, daemon: Daemon, directory: Path, port: int) -> None:
        self.daemon = daemon
        self.port = port
        self.config = directory / "istgtcontrol.conf"
        self.config.write_text(
            f'[Global]\n  Timeout 10\n  Host {HOST}\n  Port {port}\n  Lun 0\n  Flags "ro"\n  Size "auto"\n'
        )

    def switch(self, **fields: object) -> None:
        """Turn the controller on, with these settings too."""
        self.daemon.expect(
            202,
            "PUT",
            "services/iscsi/globalconfiguration/",
            {
                "iscsi_toggleluc": True,
                "iscsi_lucip": HOST,
                "iscsi_lucport": self.port,
                "iscsi_luc_authnetwork": "127.0.0.0/8",
                **fields,
            },
        )

    def __call__(self, *arguments: str) -> Ran:
        return run("istgtcontrol", "-c", str(self.config), *arguments)


@pytest.fixture
def control(daemon: Daemon, tmp_path: Path) -> Iterator[Control]:
    control = Control(daemon, tmp_path, free_ports(1)[0])
    control.switch(iscsi_luc_authmethod="None", iscsi_luc_authgroup=None)
    yield control
    daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_toggleluc": False})


def test_version_and_noop(control: Control) -> None:
    assert "target version 0.5 (20150713)" in control("version").ok()
    assert "DONE NOOP command" in control("noop").ok()


def test_list_names_every_target_and_the_storage_of_one(control: Control) -> None:
    daemon = control.daemon
    one, two = daemon.full_name("one"), daemon.full_name("two")
    listed = control("list").ok()
    assert one in listed and two in listed
    for name, size in (("one", 64), ("two", 32)):
        line = f'lun0 storage "{daemon.extent_root / name}.img" {size << 20}'
        assert line in control("-t", daemon.full_name(name), "list").ok()
    control("-t", "iqn.2011-03.example:none", "list").refused("no target")


def test_info_tells_who_is_logged_in(control: Control) -> None:
    assert "no login" in control("info").ok()
    name = control.daemon.full_name("one")
    with SocketInitiator((HOST, control.daemon.portal_port)) as initiator:
        initiator.login(name)
        told = control("-t", name, "info").ok()
        assert f"Login from {initiator.initiator_name} ({HOST}) on {name}" in told
        assert f"({control.daemon.portal},1)" in told
        assert "FirstBurstLength=65536" in told
        initiator.logout()


def test_reset_reaches_the_initiators_of_that_lun(control: Control) -> None:
    """SAM-5 §6.3.3: every nexus of the unit learns of the reset by unit attention."""
    name = control.daemon.full_name("one")
    with SocketInitiator((HOST, control.daemon.portal_port)) as initiator:
        initiator.login(name)
        ready = bytes(6)
        initiator.command(ready)  # POWER ON of the new nexus
        assert initiator.command(ready).good
        assert "DONE RESET command" in control("-t", name, "reset").ok()
        assert initiator.command(ready).additional_sense == (0x29, 0x03)
        assert initiator.command(ready).good
        initiator.logout()


def test_a_disk_has_no_medium_to_load_unload_or_change(control: Control) -> None:
    name = control.daemon.full_name("one")
    for command in (("load",), ("unload",), ("change", "/other.img")):
        control("-t", name, *command).refused("not removable")


CHAP = ("-A", "CHAP", "-U", USER, "-S", SECRET)
MUTUAL = ("-A", "Mutual CHAP", "-U", USER, "-S", SECRET, "-M", PEER_USER, "-R", PEER_SECRET)


@pytest.mark.parametrize(
    ("method", "given", "works"),
    [
        ("CHAP", CHAP, True),
        ("CHAP", MUTUAL, True),
        ("CHAP", (), False),
        ("CHAP", ("-A", "CHAP", "-U", USER, "-S", "wrong-secret"), False),
        ("CHAP", ("-A", "CHAP", "-U", "nobody", "-S", SECRET), False),
        ("CHAP Mutual", MUTUAL, True),
        ("CHAP Mutual", CHAP, False),
        ("CHAP Mutual", (*MUTUAL[:-1], "not-its-secret"), False),
        ("Auto", CHAP, True),
        ("Auto", (), True),
        ("", CHAP, True),
    ],
)
def test_chap(control: Control, method: str, given: tuple[str, ...], works: bool) -> None:
    """§7.3 and §8; an empty method is CHAP."""
    control.switch(iscsi_luc_authmethod=method, iscsi_luc_authgroup=TAG)
    ran = control(*given, "version")
    if works:
        assert "target version" in ran.ok()
    else:
        ran.refused()
        assert "target version" not in ran.output


def test_it_is_switched_off_moved_and_closed_to_networks_live(control: Control) -> None:
    daemon, settings = control.daemon, "services/iscsi/globalconfiguration/"
    control.switch(iscsi_luc_authnetwork="10.0.0.0/8")
    control("version").refused()
    control.switch()
    control("version").ok()
    old, control.port = control.port, free_ports(1)[0]
    control.switch()
    control("-p", str(old), "version").refused()
    control("-p", str(control.port), "version").ok()
    daemon.expect(202, "PUT", settings, {"iscsi_toggleluc": False})
    control("-p", str(control.port), "version").refused()


def test_a_port_in_use_changes_nothing_and_names_the_field(control: Control) -> None:
    daemon, settings = control.daemon, "services/iscsi/globalconfiguration/"
    answer = daemon.expect(409, "PUT", settings, {"iscsi_lucport": daemon.portal_port})
    assert answer == {"iscsi_lucport": [f"{HOST} port {daemon.portal_port} is in use already."]}
    assert daemon.expect(200, "GET", settings)["iscsi_lucport"] == control.port
    control("version").ok()
