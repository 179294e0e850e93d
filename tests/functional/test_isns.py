"""The daemon registers its targets with iSNS servers (RFC 4171)."""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.daemon import HOST, Daemon
from tests.isns_server import DEREGISTER, REGISTER, IsnsServer

GLOBALS = "services/iscsi/globalconfiguration/"


def configure(daemon: Daemon, **fields: Any) -> None:
    daemon.expect(202, "PUT", GLOBALS, fields)


def test_targets_are_registered_follow_edits_and_are_taken_back(daemon: Daemon) -> None:
    one = daemon.create_disk("one", "1MB", target={"iscsi_target_alias": "the first"})
    with IsnsServer() as server:
        configure(daemon, iscsi_isns_servers=f"{HOST}:{server.port}")
        server.wait_until(lambda: server.targets() == {one.iqn})
        (entity,) = server.entities.values()
        assert entity.portals == {(HOST, daemon.portal_port)}
        assert entity.targets == {one.iqn: {1: {(HOST, daemon.portal_port)}}}
        assert entity.aliases == {one.iqn: "the first"}
        assert entity.period_s == 900
        two = daemon.create_disk("two", "1MB")
        server.wait_until(lambda: server.targets() == {one.iqn, two.iqn})
        daemon.delete("target", one.target_id)
        server.wait_until(lambda: server.targets() == {two.iqn})
        daemon.expect(200, "PUT", "services/services/iscsitarget/", {"srv_enable": False})
        server.wait_until(lambda: not server.entities)
        daemon.expect(200, "PUT", "services/services/iscsitarget/", {"srv_enable": True})
        server.wait_until(lambda: server.targets() == {two.iqn})
        configure(daemon, iscsi_isns_servers="")
        server.wait_until(lambda: not server.entities)
        configure(daemon, iscsi_isns_servers=f"{HOST}:{server.port}")
        server.wait_until(lambda: server.targets() == {two.iqn})
        taken_back = server.requests.count(DEREGISTER)
        daemon.restart()
        server.wait_until(lambda: server.targets() == {two.iqn} and server.requests[-1] == REGISTER)
        assert server.requests.count(DEREGISTER) == taken_back + 1
        assert set(server.requests) == {REGISTER, DEREGISTER}


def test_what_discovery_by_proof_hides_is_not_registered(daemon: Daemon) -> None:
    daemon.create_disk("hidden", "1MB")
    portal = daemon.create("portal", iscsi_target_portal_ips=[f"127.0.0.2:{daemon.portal_port}"])
    shown = daemon.create_disk("shown", "1MB", target={"iscsi_target_portalgroup": portal["id"]})
    daemon.create(
        "authcredential",
        iscsi_target_auth_tag=1,
        iscsi_target_auth_user="alice",
        iscsi_target_auth_secret="secret of alice!",
    )
    body = {"iscsi_target_portal_discoveryauthmethod": "CHAP", "iscsi_target_portal_discoveryauthgroup": 1}
    daemon.expect(202, "PUT", "services/iscsi/portal/1/", body)
    with IsnsServer() as server:
        configure(daemon, iscsi_isns_servers=f"{HOST}:{server.port}")
        server.wait_until(lambda: server.targets() == {shown.iqn})
        (entity,) = server.entities.values()
        assert entity.portals == {("127.0.0.2", daemon.portal_port)}
        daemon.wait_for_line("1 targets are not registered with iSNS servers")
        configure(daemon, iscsi_discoveryauthmethod="CHAP", iscsi_discoveryauthgroup=1)
        server.wait_until(lambda: not server.entities)


Answer = Callable[[int, int], bytes]


def said(version: int = 1, function: int = 0, late: int = 0, rest: bytes = b"", length: int = -1) -> Answer:
    """An answer that is right but for what is given."""

    def answer(asked: int, transaction: int) -> bytes:
        size = len(rest) if length < 0 else length
        number = function or asked | 0x8000
        return struct.pack("!HHHHHH", version, number, size, 0x4C00, transaction + late, 0) + rest

    return answer


def without_end(function: int, transaction: int) -> bytes:
    return (struct.pack("!HHHHHH", 1, function | 0x8000, 65532, 0x4000, transaction, 0) + bytes(65532)) * 17


ODD: dict[str, tuple[Answer, str]] = {
    "refusal": (said(rest=struct.pack("!I", 8)), "the source is not authorized (8)"),
    "another version": (said(version=2), "version 2"),
    "another answer": (said(function=0x8002, rest=bytes(4)), "8002h is no answer to REGISTER"),
    "an old answer": (said(late=1, rest=bytes(4)), "8001h is no answer to REGISTER"),
    "no status": (said(), "a response of 0 bytes"),
    "an odd length": (said(length=3), "no multiple of four"),
    "a cut attribute": (
        said(rest=struct.pack("!III", 0, 1, 400)),
        "attribute 1 of 400 bytes, where 0 are left",
    ),
    "no end": (without_end, "more than 1048576 bytes"),
}


@pytest.mark.parametrize("what", sorted(ODD))
def test_an_answer_that_is_none_is_told_and_harms_nobody(shared_daemon: Daemon, what: str) -> None:
    disk = shared_daemon.create_disk("isns-" + what.replace(" ", "-"), "1MB")
    answer, told = ODD[what]
    with IsnsServer() as server:
        server.answer = answer
        configure(shared_daemon, iscsi_isns_servers=f"{HOST}:{server.port}")
        try:
            shared_daemon.wait_for_line(f"iSNS server {HOST}:{server.port}:", told)
            assert shared_daemon.api("GET", GLOBALS).status == 200
        finally:
            configure(shared_daemon, iscsi_isns_servers="")
            shared_daemon.delete_disk(disk)


def test_a_server_that_is_not_there_is_tried_again(daemon: Daemon) -> None:
    disk = daemon.create_disk("disk", "1MB")
    with IsnsServer() as server:
        port = server.port
    configure(daemon, iscsi_isns_servers=f"{HOST}:{port}")
    daemon.wait_for_line(f"iSNS server {HOST}:{port}: ")
    with IsnsServer(port) as server:
        server.wait_until(lambda: server.targets() == {disk.iqn})
