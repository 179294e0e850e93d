"""Why logins are refused, and what would come of one: the real daemon's answers beside real logins."""

import http.client
import json

import pytest

from tests.daemon import HOST, Daemon
from tests.initiator import LoginFailed, SocketInitiator

CLIENT = "iqn.2020-01.example:client"
OTHER = "iqn.2020-01.example:other"
EXPLAIN = "services/iscsi/explain/"
FAILURES = "services/iscsi/loginfailure/"


@pytest.fixture(scope="module")
def guarded(shared_daemon: Daemon) -> Daemon:
    """Targets that differ in who may log in."""
    groups = {
        "named": {"iscsi_target_initiator_initiators": CLIENT},
        "denied": {"iscsi_target_initiator_initiators": f"!{CLIENT},ALL"},
        "elsewhere": {"iscsi_target_initiator_auth_network": "10.0.0.0/8"},
    }
    for name, fields in groups.items():
        group = shared_daemon.create("authorizedinitiator", **fields)
        shared_daemon.create_disk(name, "1MB", target={"iscsi_target_initiatorgroup": group["id"]})
    shared_daemon.create_disk("open", "1MB", lun=5)
    shared_daemon.create("target", iscsi_target_name="alone")
    return shared_daemon


def explain(daemon: Daemon, target: str, initiator: str = CLIENT, address: str = HOST) -> dict[str, object]:
    query = f"{EXPLAIN}?initiator={initiator}&address={address}&target={target}&portal=1"
    (found,) = daemon.expect(200, "GET", query)
    return dict(found)


@pytest.mark.parametrize(
    ("target", "initiator", "address", "allowed", "words"),
    [
        ("open", CLIENT, HOST, True, "allows"),
        ("named", CLIENT, HOST, True, "allows"),
        ("named", OTHER, HOST, False, "does not name it"),
        ("denied", CLIENT, HOST, False, "denies"),
        ("denied", OTHER, HOST, True, "allows"),
        ("elsewhere", CLIENT, HOST, False, "its networks are 10.0.0.0/8"),
        ("elsewhere", CLIENT, "10.1.2.3", True, "allows"),
        ("alone", CLIENT, HOST, False, "not granted through portal 1"),
    ],
)
def test_the_answer_ahead_of_time_is_that_of_the_login(
    guarded: Daemon, target: str, initiator: str, address: str, allowed: bool, words: str
) -> None:
    """api-semantics §7.4."""
    answer = explain(guarded, target, initiator, address)
    assert answer["allowed"] is allowed
    assert words in str(answer["reason"])
    assert bool(answer["luns"]) is allowed
    if address != HOST:
        return
    with SocketInitiator((HOST, guarded.portal_port)) as client:
        if allowed:
            client.login(guarded.full_name(target), initiator)
            client.logout()
            return
        with pytest.raises(LoginFailed):
            client.login(guarded.full_name(target), initiator)
    newest = guarded.expect(200, "GET", FAILURES)[0]
    assert newest["initiator_name"] == initiator
    assert newest["target_name"] == guarded.full_name(target)
    assert newest["peer_address"].startswith(f"{HOST}:")
    assert newest["status"] == "0203"
    assert newest["reason"] == answer["reason"]


def test_without_a_target_all_of_them_are_answered_for(guarded: Daemon) -> None:
    found = guarded.expect(200, "GET", f"{EXPLAIN}?initiator={CLIENT}&address={HOST}")
    assert {entry["target_name"] for entry in found} >= {
        guarded.full_name("open"),
        guarded.full_name("alone"),
    }
    (one,) = [entry for entry in found if entry["target_name"] == guarded.full_name("open")]
    assert one["luns"] == [
        {
            "lun": 5,
            "extent_id": one["luns"][0]["extent_id"],
            "extent": "open",
            "size_bytes": 1 << 20,
            "block_size": 512,
            "read_only": False,
            "ready": True,
        }
    ]


def test_a_peer_that_speaks_no_iscsi_is_remembered_too(guarded: Daemon) -> None:
    """RFC 7143 §6.3: the first PDU is a Login Request."""
    with SocketInitiator((HOST, guarded.portal_port)) as client:
        client.send(b"GET / HTTP/1.1\r\n" * 4)
        client.wait_closed()
    newest = guarded.expect(200, "GET", FAILURES)[0]
    assert newest["initiator_name"] == newest["target_name"] == ""
    assert newest["reason"]


def test_chap_without_a_user_is_said_ahead_of_time(guarded: Daemon) -> None:
    user = guarded.create(
        "authcredential",
        iscsi_target_auth_tag=7,
        iscsi_target_auth_user="u",
        iscsi_target_auth_secret="s" * 12,
    )
    guarded.create_disk("chap", "1MB", target={"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 7})
    assert explain(guarded, "chap")["authentication"] == "CHAP"
    guarded.delete("authcredential", user["id"])
    answer = explain(guarded, "chap")
    assert answer["allowed"] is False
    assert "credential group 7 has no user" in str(answer["reason"])


def test_events_tell_of_logins_and_changes(guarded: Daemon) -> None:
    connection = http.client.HTTPConnection(HOST, guarded.api_port, timeout=10)
    connection.request("GET", "/api/v1.0/services/iscsi/events/", headers=guarded.authorization())
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.fp is not None
    assert response.readline() == b": from now on\n"
    with SocketInitiator((HOST, guarded.portal_port)) as client:
        client.login(guarded.full_name("open"), CLIENT)
        client.logout()
        client.wait_closed()
    made = guarded.create("authorizedinitiator")
    seen: dict[str, dict[str, object]] = {}
    while "configuration" not in seen:
        line = response.readline().decode().strip()
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
            seen[kind] = json.loads(response.readline().decode().removeprefix("data: "))
    assert seen["session.login"]["initiator"] == CLIENT
    assert seen["session.end"]["id"] == seen["session.login"]["id"]
    assert seen["configuration"]["changed"] == {"initiator_groups": {"written": [made["id"]], "removed": []}}
    connection.close()


def test_metrics_count_what_was_done(guarded: Daemon) -> None:
    with SocketInitiator((HOST, guarded.portal_port)) as client:
        client.login(guarded.full_name("open"), CLIENT)
        client.command(bytes(6), lun=5)
        for _ in range(3):
            assert client.command(bytes.fromhex("28000000000000000100"), read=512, lun=5).good
        text = guarded.api("GET", "/metrics").text
        client.logout()
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("iscsi_lun_commands_total{") and 'extent="open"' in line and "READ(10)" in line
    ]
    assert float(line.split()[-1]) == 3
    assert 'iscsi_portal_login_failures_total{portal="1",status="not_found"}' in text
    assert 'iscsi_portal_drops_total{portal="1",reason="logout"}' in text
