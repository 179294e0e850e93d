"""Who an initiator is: what it claims by name and what it proves by CHAP, at a daemon."""

import pytest

from protocol.enums import LoginStatus
from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import LoginFailed, Rejected, SessionState, SocketInitiator

NAME = "iqn.2026-11.com.example:host"
ALICE, BOB = ("alice", "secret of alice!"), ("bob", "secret of bob...")
EXCLUSIVE_ACCESS = 3
KEY = 0xA11CE
CONFLICT = 0x18


@pytest.fixture
def disk(daemon: Daemon) -> Disk:
    """A target with two users."""
    for user, secret in (ALICE, BOB):
        daemon.create(
            "authcredential",
            iscsi_target_auth_tag=1,
            iscsi_target_auth_user=user,
            iscsi_target_auth_secret=secret,
        )
    made = daemon.create_disk("disk", "1MB")
    ask_for(daemon, made, "CHAP", 1)
    return made


def ask_for(daemon: Daemon, disk: Disk, method: str, group: int | None) -> None:
    body = {"iscsi_target_authtype": method, "iscsi_target_authgroup": group}
    daemon.expect(202, "PUT", f"services/iscsi/target/{disk.target_id}/", body)


def log_in(
    daemon: Daemon, disk: Disk, chap: tuple[str, str] | None, isid: bytes | None = None
) -> SocketInitiator:
    session = SessionState() if isid is None else SessionState(isid=isid)
    peer = SocketInitiator((HOST, daemon.portal_port), session=session)
    try:
        peer.login(disk.iqn, NAME, chap=chap)
    except BaseException:
        peer.close()
        raise
    for _ in range(4):  # unit attentions
        if peer.command(cdbs.test_unit_ready()).status != 2:
            break
    return peer


def persistent_reserve(peer: SocketInitiator, action: int, key: int, new: int = 0) -> int:
    kind = EXCLUSIVE_ACCESS if action == 1 else 0
    cdb = bytes((0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0))
    return peer.command(cdb, key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)).status


@pytest.mark.parametrize("alice_is_there", [True, False])
def test_another_user_of_the_same_name_inherits_neither_session_nor_reservation(
    daemon: Daemon, disk: Disk, alice_is_there: bool
) -> None:
    alice = log_in(daemon, disk, ALICE)
    assert persistent_reserve(alice, 0, 0, KEY) == 0
    assert persistent_reserve(alice, 1, KEY) == 0
    isid = alice.session.isid
    if alice_is_there:
        with pytest.raises(LoginFailed) as failed:
            log_in(daemon, disk, BOB, isid)
        assert failed.value.status == LoginStatus.AUTHORIZATION_FAILURE
        assert alice.command(cdbs.write10(0, 1), bytes(512)).good
        return
    alice.logout()
    alice.close()
    bob = log_in(daemon, disk, BOB, isid)
    assert bob.command(cdbs.write10(0, 1), bytes(512)).status == CONFLICT
    assert bob.command(cdbs.read10(0, 1), read=512).status == CONFLICT
    assert persistent_reserve(bob, 2, KEY) == CONFLICT  # RELEASE: he is not registered
    bob.close()
    again = log_in(daemon, disk, ALICE, isid)
    assert again.command(cdbs.write10(0, 1), bytes(512)).good
    again.close()


def test_auto_without_users_is_without_proof_for_who_offers_chap_first(daemon: Daemon, disk: Disk) -> None:
    """Windows and open-iscsi offer ``CHAP,None``."""
    ask_for(daemon, disk, "Auto", None)
    for method in ("CHAP,None", "None,CHAP", "None"):
        with SocketInitiator((HOST, daemon.portal_port)) as peer:
            peer.login(disk.iqn, NAME, auth_method=method)
    ask_for(daemon, disk, "Auto", 1)
    log_in(daemon, disk, ALICE).close()


def test_discovery_by_proof_holds_in_normal_sessions_too(daemon: Daemon, disk: Disk) -> None:
    """SendTargets in a session of an open target tells of that target alone."""
    opened = daemon.create_disk("open", "1MB")
    everybody = [disk.iqn, opened.iqn]
    with SocketInitiator((HOST, daemon.portal_port)) as peer:
        peer.login(opened.iqn, NAME)
        assert sorted(found.name for found in peer.discover("All")) == sorted(everybody)
        body = {"iscsi_discoveryauthmethod": "CHAP", "iscsi_discoveryauthgroup": 1}
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", body)
        assert [found.name for found in peer.discover("All")] == [opened.iqn]
        assert peer.discover(disk.iqn) == []
    with SocketInitiator((HOST, daemon.portal_port)) as peer, pytest.raises(LoginFailed):
        peer.login(None, NAME)
    with SocketInitiator((HOST, daemon.portal_port)) as peer:
        peer.login(None, NAME, chap=ALICE)
        assert sorted(found.name for found in peer.discover("All")) == sorted(everybody)
        daemon.expect(
            202,
            "PUT",
            "services/iscsi/globalconfiguration/",
            {"iscsi_discoveryauthgroup": group_of_carol(daemon)},
        )
        with pytest.raises(Rejected):  # alice is none of those any more
            peer.discover("All")


def group_of_carol(daemon: Daemon) -> int:
    made = daemon.create(
        "authcredential",
        iscsi_target_auth_tag=2,
        iscsi_target_auth_user="carol",
        iscsi_target_auth_secret="secret of carol!",
    )
    return int(made["iscsi_target_auth_tag"])


@pytest.mark.parametrize("name", [f"{NAME}/1", f"{NAME}_1", "iqn.host", "eui.1", f"{NAME}\u2009", "host"])
def test_a_name_that_is_none_is_refused_and_the_reason_told(daemon: Daemon, disk: Disk, name: str) -> None:
    with SocketInitiator((HOST, daemon.portal_port)) as peer, pytest.raises(LoginFailed) as failed:
        peer.login(disk.iqn, name, chap=ALICE)
    assert failed.value.status == LoginStatus.INITIATOR_ERROR
    daemon.wait_for_line("is no iSCSI name: it ")


CRC_FIRST = {"HeaderDigest": "CRC32C,None", "DataDigest": "CRC32C,None"}
NONE_FIRST = {"HeaderDigest": "None,CRC32C", "DataDigest": "None,CRC32C"}
NONE_ONLY = {"HeaderDigest": "None", "DataDigest": "None"}


@pytest.mark.parametrize(
    ("target", "grant", "offers"),
    [
        # (HeaderDigest, DataDigest) for who offers CRC32C first, None first, None alone; None: refused
        ("Auto", "Auto", ("CC", "NN", "NN")),
        ("None", "Auto", ("NN", "NN", "NN")),
        ("Header", "Auto", ("CC", "CN", None)),
        ("Data", "Auto", ("CC", "NC", None)),
        ("data, header", "Auto", ("CC", "CC", None)),
        ("Header Data", "None", ("NN", "NN", "NN")),  # what the grant says comes first
        ("None", "Header", ("CC", "CN", None)),
        ("Header", "CHAP", ("CC", "CN", None)),  # no word for digests
    ],
)
def test_which_digests_a_login_gets(
    shared_daemon: Daemon, target: str, grant: str, offers: tuple[str | None, ...]
) -> None:
    name = f"digest-{target}-{grant}".lower().replace(",", "").replace(" ", "-")
    disk = shared_daemon.create_disk(name, "1MB", target={"iscsi_target_initialdigest": target})
    groups = shared_daemon.expect(200, "GET", "services/iscsi/targetgroup/?limit=0")
    group = next(each for each in groups if each["iscsi_target"] == disk.target_id)
    shared_daemon.expect(
        202, "PUT", f"services/iscsi/targetgroup/{group['id']}/", {"iscsi_target_initialdigest": grant}
    )
    for keys, expected in zip((CRC_FIRST, NONE_FIRST, NONE_ONLY), offers, strict=True):
        with SocketInitiator((HOST, shared_daemon.portal_port)) as peer:
            if expected is None:
                with pytest.raises(LoginFailed) as failed:
                    peer.login(disk.iqn, NAME, keys=keys)
                assert failed.value.status == LoginStatus.INITIATOR_ERROR
                continue
            peer.login(disk.iqn, NAME, keys=keys)
            chosen = peer.keys["HeaderDigest"][0] + peer.keys["DataDigest"][0]
            assert chosen == expected
            assert peer.command(cdbs.read10(0, 1), read=512).status in (0, 2)
    shared_daemon.delete_disk(disk)


def test_who_guesses_is_slowed_and_a_good_login_from_elsewhere_is_not(daemon: Daemon, disk: Disk) -> None:
    statuses = []
    for _ in range(15):
        with SocketInitiator((HOST, daemon.portal_port), source="127.0.0.3") as peer:
            with pytest.raises(LoginFailed) as failed:
                peer.login(disk.iqn, NAME, chap=("alice", "a guess"))
            statuses.append(failed.value.status)
    assert statuses[:10] == [LoginStatus.AUTHENTICATION_FAILURE] * 10
    assert LoginStatus.SERVICE_UNAVAILABLE in statuses[10:]
    with SocketInitiator((HOST, daemon.portal_port), source="127.0.0.3") as peer, pytest.raises(LoginFailed):
        peer.login(disk.iqn, NAME, chap=ALICE)
    for source, user in (("127.0.0.4", ALICE), ("127.0.0.3", BOB)):
        with SocketInitiator((HOST, daemon.portal_port), source=source) as peer:
            peer.login(disk.iqn, NAME, chap=user)
    daemon.wait_for_line("has given too many wrong answers from this address")
