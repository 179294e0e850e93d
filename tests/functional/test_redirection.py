"""Where initiators are told to go: redirection (RFC 7143 §11.13.5, §13.8), advertised addresses, wildcards.

With the real daemon, our own initiator, which shows what is said, and libiscsi's, which follows it.
"""

import shutil
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.enums import LoginStatus
from tests.daemon import HOST, Daemon, Disk, free_ports
from tests.functional.sessions import log_in, write
from tests.initiator import LoginFailed, SocketInitiator
from tests.interop.peers import run

ELSEWHERE = "[2001:db8::77]:3261"
INITIATOR = "iqn.2003-01.org.example:one"


@pytest.fixture(scope="module")
def disk(shared_daemon: Daemon) -> Disk:
    return shared_daemon.create_disk("disk", "8MB")


@pytest.fixture
def second(shared_daemon: Daemon, disk: Disk) -> Iterator[tuple[int, str]]:
    """Another portal, (id, address), through which the disk is granted too."""
    address = f"{HOST}:{free_ports(1)[0]}"
    made = shared_daemon.create("portal", iscsi_target_portal_ips=[address])
    shared_daemon.create("targetgroup", iscsi_target=disk.target_id, iscsi_target_portalgroup=made["id"])
    yield made["id"], address
    shared_daemon.delete("portal", made["id"])


def change(daemon: Daemon, kind: str, number: int, **fields: Any) -> None:
    daemon.expect(202, "PUT", f"services/iscsi/{kind}/{number}/", fields)


@pytest.fixture(autouse=True)
def as_it_was(shared_daemon: Daemon, disk: Disk) -> Iterator[None]:
    yield
    for kind, number in (("target", disk.target_id), ("portal", 1)):
        prefix = "iscsi_target_" if kind == "target" else "iscsi_target_portal_"
        change(shared_daemon, kind, number, **{f"{prefix}redirect": "", f"{prefix}redirect_permanent": False})
    change(
        shared_daemon,
        "portal",
        1,
        iscsi_target_portal_advertised=[],
        iscsi_target_portal_ips=[shared_daemon.portal],
    )


def answer(address: str, target: str) -> tuple[int, dict[str, str]]:
    """Status of a login and the keys that came with a refusal."""
    host, _, port = address.rpartition(":")
    with SocketInitiator((host.strip("[]"), int(port))) as initiator:
        try:
            initiator.login(target, INITIATOR)
        except LoginFailed as failed:
            return failed.status, dict(failed.keys)
        initiator.logout()
    return LoginStatus.SUCCESS, {}


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("kind", ["target", "portal"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (ELSEWHERE, ELSEWHERE),
        ("2001:db8::77:3261", ELSEWHERE),
        ("[2001:DB8:0::77]", "[2001:db8::77]:3260"),
        ("192.0.2.7", "192.0.2.7:3260"),
        ("Storage-2.example.com:860", "storage-2.example.com:860"),
    ],
)
def test_a_login_is_sent_on(
    shared_daemon: Daemon, disk: Disk, kind: str, permanent: bool, given: str, told: str
) -> None:
    """0101h or 0102h with TargetAddress, "the comma and portal group tag MUST be omitted" (§13.8)."""
    number, prefix = (disk.target_id, "iscsi_target_") if kind == "target" else (1, "iscsi_target_portal_")
    change(
        shared_daemon,
        kind,
        number,
        **{f"{prefix}redirect": given, f"{prefix}redirect_permanent": permanent},
    )
    status = LoginStatus.TARGET_MOVED_PERMANENTLY if permanent else LoginStatus.TARGET_MOVED_TEMPORARILY
    assert answer(shared_daemon.portal, disk.iqn) == (status, {"TargetAddress": told})
    assert answer(shared_daemon.portal, disk.iqn + "x") == (LoginStatus.NOT_FOUND, {})


def test_a_redirection_is_for_logins_and_no_failure(shared_daemon: Daemon, disk: Disk) -> None:
    """Sessions go on, discovery shows the target, nothing is counted as a failed login; explained ahead."""
    before = shared_daemon.expect(200, "GET", "services/iscsi/loginfailure/")
    with log_in(shared_daemon, disk.iqn) as initiator:
        seen = len(shared_daemon.lines)
        change(shared_daemon, "target", disk.target_id, iscsi_target_redirect=ELSEWHERE)
        assert answer(shared_daemon.portal, disk.iqn)[0] == LoginStatus.TARGET_MOVED_TEMPORARILY
        shared_daemon.wait_for_line("INFO", f"the target sends logins on to {ELSEWHERE}", since=seen)
        assert write(initiator, 0, bytes(512)).good
        assert [found.name for found in initiator.discover(disk.iqn)] == [disk.iqn]
        initiator.logout()
    assert shared_daemon.expect(200, "GET", "services/iscsi/loginfailure/") == before
    query = f"services/iscsi/explain/?initiator={INITIATOR}&address={HOST}&target={disk.iqn}&portal=1"
    (explained,) = shared_daemon.expect(200, "GET", query)
    assert not explained["allowed"]
    assert explained["reason"].endswith(f"but the target sends logins on to {ELSEWHERE}")


def test_a_login_that_came_to_the_place_is_served(
    shared_daemon: Daemon, disk: Disk, second: tuple[int, str]
) -> None:
    """A target can say through which portal it is to be used, by its address or the one outside."""
    number, address = second
    moved = LoginStatus.TARGET_MOVED_TEMPORARILY, {"TargetAddress": address}
    change(shared_daemon, "target", disk.target_id, iscsi_target_redirect=address)
    assert answer(shared_daemon.portal, disk.iqn) == moved
    assert answer(address, disk.iqn) == (LoginStatus.SUCCESS, {})
    change(shared_daemon, "target", disk.target_id, iscsi_target_redirect="storage.example:3260")
    change(shared_daemon, "portal", number, iscsi_target_portal_advertised=["storage.example"])
    assert answer(shared_daemon.portal, disk.iqn)[1] == {"TargetAddress": "storage.example:3260"}
    assert answer(address, disk.iqn) == (LoginStatus.SUCCESS, {})


@pytest.mark.interop
@pytest.mark.skipif(not shutil.which("iscsi-inq"), reason="not installed: iscsi-inq")
def test_libiscsi_follows(shared_daemon: Daemon, disk: Disk, second: tuple[int, str]) -> None:
    _, address = second
    change(shared_daemon, "portal", 1, iscsi_target_portal_redirect=address)
    seen = len(shared_daemon.lines)
    assert "Vendor:TARGETD" in run("iscsi-inq", disk.url).ok()
    shared_daemon.wait_for_line(f"to {address}: ", "logged in to", disk.iqn, since=seen)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("10.0.0.1:3260,1", "leave out the portal group tag"),
        ("0.0.0.0:3260", "cannot be sent to every address"),
        ("[::]", "cannot be sent to every address"),
        ("10.0.0.1:0", "the port must be between 1 and 65535"),
        ("storage:70000", "a port is between 1 and 65535"),
        ("[fe80::1%eth0]:3260", "a zone means nothing to another host"),
        ("10.0.0", "enter a valid IPv4 or IPv6 address"),
        ("two words", "enter a valid IPv4 or IPv6 address"),
        ("-storage.example", "enter a valid IPv4 or IPv6 address"),
        ("[storage.example]:3260", "brackets are for IPv6 addresses"),
    ],
)
def test_places_that_are_none(shared_daemon: Daemon, disk: Disk, wrong: str, words: str) -> None:
    """Told by field, and nothing changes."""
    for path, field, value in (
        (f"target/{disk.target_id}", "iscsi_target_redirect", wrong),
        ("portal/1", "iscsi_target_portal_redirect", wrong),
        ("portal/1", "iscsi_target_portal_advertised", [wrong]),
    ):
        if value == [wrong] and "every address" in words:
            continue  # that is a place: the one that the initiator came to
        answer = shared_daemon.expect(409, "PUT", f"services/iscsi/{path}/", {field: value})
        assert answer.keys() == {field}
        assert words in answer[field][0]
    assert shared_daemon.expect(200, "GET", "services/iscsi/portal/1/")["iscsi_target_portal_redirect"] == ""


def test_a_portal_is_no_place_to_be_sent_on_from_twice(
    shared_daemon: Daemon, second: tuple[int, str]
) -> None:
    number, address = second
    change(shared_daemon, "portal", number, iscsi_target_portal_redirect=ELSEWHERE)
    body = {"iscsi_target_portal_redirect": address}
    answer = shared_daemon.expect(409, "PUT", "services/iscsi/portal/1/", body)
    (message,) = answer["iscsi_target_portal_redirect"]
    assert message == f"Portal {number}, where portal 1 sends logins, sends them on too."


# -- SendTargets (api-semantics §7.4 rule 3) -----------------------------------------------------------


def told(daemon: Daemon, host: str, disk: Disk) -> tuple[str, ...]:
    with SocketInitiator((host, daemon.portal_port)) as initiator:
        initiator.login(None, INITIATOR)
        (found,) = initiator.discover(disk.iqn)
        initiator.logout()
    return found.addresses


def test_wildcard_portals_that_name_each_other_do_not_send_in_a_circle(
    shared_daemon: Daemon, disk: Disk
) -> None:
    """No rule on the configuration can see that the addresses are each other's."""
    one, other = f"0.0.0.0:{shared_daemon.portal_port}", f"0.0.0.0:{free_ports(1)[0]}"
    change(
        shared_daemon,
        "portal",
        1,
        iscsi_target_portal_ips=[one],
        iscsi_target_portal_redirect=other.replace("0.0.0.0", HOST),
    )
    second = shared_daemon.create(
        "portal",
        iscsi_target_portal_ips=[other],
        iscsi_target_portal_redirect=one.replace("0.0.0.0", HOST),
    )
    try:
        assert answer(one.replace("0.0.0.0", HOST), disk.iqn) == (LoginStatus.SUCCESS, {})
        # Where the second would be another host's, it is no circle.
        elsewhere = answer(one.replace("0.0.0.0", "127.0.0.2"), disk.iqn)
        assert elsewhere[0] == LoginStatus.TARGET_MOVED_TEMPORARILY
    finally:
        shared_daemon.delete("portal", second["id"])


def test_advertised_addresses_stand_in_place_of_those_listened_on(shared_daemon: Daemon, disk: Disk) -> None:
    """Behind NAT; a wildcard among them is for initiators on the inside."""
    change(
        shared_daemon,
        "portal",
        1,
        iscsi_target_portal_advertised=[
            "203.0.113.5:13260",
            "nat.example",
            "[2001:db8::5]",
            "0.0.0.0",
            "[::]",
        ],
    )
    outside = ("203.0.113.5:13260,1", "nat.example:3260,1", "[2001:db8::5]:3260,1")
    assert told(shared_daemon, HOST, disk) == (*outside, f"{HOST}:3260,1")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this host")
def test_a_wildcard_is_told_as_the_address_that_the_initiator_came_to(
    shared_daemon: Daemon, disk: Disk
) -> None:
    """Of its own family; a wildcard of the other family is left out."""
    port = shared_daemon.portal_port
    change(shared_daemon, "portal", 1, iscsi_target_portal_ips=[f"0.0.0.0:{port}", f"[::]:{port}"])
    assert told(shared_daemon, HOST, disk) == (f"{HOST}:{port},1",)
    assert told(shared_daemon, "127.0.0.2", disk) == (f"127.0.0.2:{port},1",)
    assert told(shared_daemon, "::1", disk) == (f"[::1]:{port},1",)


# -- CHAP policy (RFC 7143 §12.1.3) --------------------------------------------------------------------


@pytest.mark.parametrize("discovery", [False, True])
def test_weak_algorithms_can_be_forbidden(shared_daemon: Daemon, discovery: bool) -> None:
    """Live, for targets and discovery; what is left is chosen in the initiator's order."""
    daemon = shared_daemon
    made = daemon.create(
        "authcredential",
        iscsi_target_auth_tag=7,
        iscsi_target_auth_user="alice",
        iscsi_target_auth_secret="alice-secret-1",
    )
    guarded = daemon.create_disk(
        f"guarded{discovery}", "1MB", target={"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 7}
    )
    change(
        daemon,
        "portal",
        1,
        iscsi_target_portal_discoveryauthmethod="CHAP",
        iscsi_target_portal_discoveryauthgroup=7,
    )
    target = None if discovery else guarded.iqn

    def log_in_with(*algorithms: int) -> int:
        with SocketInitiator((HOST, daemon.portal_port)) as initiator:
            try:
                initiator.login(target, INITIATOR, chap=("alice", "alice-secret-1"), algorithms=algorithms)
            except LoginFailed as failed:
                return failed.status
            initiator.logout()
        return LoginStatus.SUCCESS

    refused = LoginStatus.AUTHENTICATION_FAILURE
    names = ("MD5", "SHA1", "SHA256", "SHA3-256")
    try:
        for least, weakest in enumerate(names, 5):
            daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_chap_weakest": weakest})
            for number in (5, 6, 7, 8):
                expected = LoginStatus.SUCCESS if number >= least else refused
                assert log_in_with(number) == expected
            assert log_in_with(5, 6, 7, 8) == LoginStatus.SUCCESS
        wrong = daemon.expect(
            409, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_chap_weakest": "MD4"}
        )
        assert wrong.keys() == {"iscsi_chap_weakest"}
    finally:
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_chap_weakest": "MD5"})
        change(
            daemon,
            "portal",
            1,
            iscsi_target_portal_discoveryauthmethod="None",
            iscsi_target_portal_discoveryauthgroup=None,
        )
        daemon.delete_disk(guarded)
        daemon.delete("authcredential", made["id"])
