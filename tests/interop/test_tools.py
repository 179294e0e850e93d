"""libiscsi's command line tools against the real daemon: discovery, INQUIRY, capacity, CHAP, access rules."""

import re
from collections.abc import Callable

import pytest

from tests.daemon import HOST, Daemon, Disk
from tests.interop.peers import needs, run
from tests.interop.rawsession import RawSession

pytestmark = [pytest.mark.interop, needs("iscsi-ls", "iscsi-inq", "iscsi-readcapacity16")]

ALICE = "iqn.2003-01.org.example:alice"
MALLORY = "iqn.2003-01.org.example:mallory"

AUTHENTICATION_FAILURE = "Authentication failure(513)"
"""Status 0201h (RFC 7143 §11.13.5) as libiscsi prints it."""
NOT_FOUND = "Target not found(515)"
"""Status 0203h: also for whom the target is not meant (api-semantics §7.4)."""


@pytest.fixture(scope="module")
def disk(shared_daemon: Daemon) -> Disk:
    return shared_daemon.create_disk("tools", "256MB")


DECODED_PAGES = {0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2}
"""What ``iscsi-inq`` can show, and every disk of ours has."""


# -- discovery and what a disk says of itself ---------------------------------------------------


def test_discovery_lists_target_portal_and_lun(shared_daemon: Daemon, disk: Disk) -> None:
    """SendTargets (RFC 7143 §4.3), REPORT LUNS and READ CAPACITY behind ``iscsi-ls -s``."""
    listing = run("iscsi-ls", "-s", shared_daemon.url()).ok()
    assert f"Target:{disk.iqn} Portal:{shared_daemon.portal},1" in listing
    # The tool counts up to the last LBA and rounds down.
    assert re.search(r"^Lun:0 +Type:DIRECT_ACCESS \(Size:255M\)$", listing, re.MULTILINE)


def test_standard_inquiry_names_vendor_and_type(disk: Disk) -> None:
    """SPC-4 §6.6.2."""
    said = run("iscsi-inq", disk.url).ok()
    assert "Peripheral Qualifier:CONNECTED" in said
    assert "Peripheral Device Type:DIRECT_ACCESS" in said
    assert re.search(r"^Vendor:TARGETD *$", said, re.MULTILINE)
    assert re.search(r"^Version:[56] ", said, re.MULTILINE)
    assert "ReponseDataFormat:2" in said
    assert "CmdQue:1" in said


def test_every_listed_vpd_page_can_be_read(disk: Disk) -> None:
    """SPC-4 §7.8.15: page 00h lists the pages in ascending order."""
    listed = [
        int(page, 16)
        for page in re.findall(r"Page:0x([0-9a-f]{2})", run("iscsi-inq", "-e", "1", "-c", "0", disk.url).ok())
    ]
    assert listed == sorted(listed)
    assert set(listed) >= DECODED_PAGES
    for page in listed:
        ran = run("iscsi-inq", "-e", "1", "-c", str(page), disk.url)
        if page in DECODED_PAGES:
            ran.ok()
        else:
            # The command itself succeeded; the tool has no decoder for what came.
            assert ran.status == 0 or "failed to unmarshall" in ran.output, ran.output


def test_serial_number_page_holds_the_extents_serial(shared_daemon: Daemon, disk: Disk) -> None:
    """api-semantics §5.2: VPD 80h comes from the extent."""
    extent = shared_daemon.expect(200, "GET", f"services/iscsi/extent/{disk.extent_id}/")
    said = run("iscsi-inq", "-e", "1", "-c", str(0x80), disk.url).ok()
    found = re.search(r"Unit Serial Number:\[ *(.*?) *\]", said)
    assert found and found[1] == extent["iscsi_target_extent_serial"]


def test_identification_page_names_the_unit_by_naa(disk: Disk) -> None:
    """SPC-4 §7.8.5: a designator of type 3 for the logical unit."""
    said = run("iscsi-inq", "-e", "1", "-c", str(0x83), disk.url).ok()
    assert re.search(r"Association:\(0\) LOGICAL_UNIT\nDesignator Type:\(3\) NAA", said)


CAPACITIES = [
    # block size, last LBA, physical block exponent
    (512, 524287, 3),
    (1024, 262143, 2),
    (2048, 131071, 1),
    (4096, 65535, 0),
]


@pytest.mark.parametrize(("block_size", "last_lba", "exponent"), CAPACITIES)
def test_capacity_follows_the_block_size(
    shared_daemon: Daemon, block_size: int, last_lba: int, exponent: int
) -> None:
    """READ CAPACITY(16), SBC-3 §5.16."""
    disk = shared_daemon.create_disk(
        f"blocks{block_size}", "256MB", extent={"iscsi_target_extent_blocksize": block_size}
    )
    said = run("iscsi-readcapacity16", disk.url).ok()
    assert f"RETURNED LOGICAL BLOCK ADDRESS:{last_lba}\n" in said
    assert f"LOGICAL BLOCK LENGTH IN BYTES:{block_size}\n" in said
    assert f"LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT:{exponent}\n" in said
    assert "LBPME:1 LBPRZ:1" in said
    assert "Total size:268435456" in said


def test_lun_other_than_zero_is_listed_without_lun_zero(shared_daemon: Daemon) -> None:
    """REPORT LUNS answers on LUN 0 whether or not it exists (SPC-4 §6.33)."""
    disk = shared_daemon.create_disk("lunseven", "8MB", lun=7)
    listing = run("iscsi-ls", "-s", shared_daemon.url()).ok()
    of_target = listing.partition(f"Target:{disk.iqn} ")[2].partition("Target:")[0]
    assert re.search(r"^Lun:7 +Type:DIRECT_ACCESS", of_target, re.MULTILINE)
    run("iscsi-inq", shared_daemon.url(disk.iqn, 7)).ok()


def test_unknown_target_is_not_found(shared_daemon: Daemon) -> None:
    """Status 0203h, RFC 7143 §11.13.5."""
    url = shared_daemon.url("iqn.2003-01.org.example:no-such-target")
    run("iscsi-inq", url).refused(NOT_FOUND)


# -- CHAP ---------------------------------------------------------------------------------------

USER, SECRET = "alice", "alices-secret1"
PEER_USER, PEER_SECRET = "target", "targets-secret"


@pytest.fixture(scope="module")
def chap_disks(shared_daemon: Daemon) -> dict[str, Disk]:
    """One target for each method, all with the same credentials."""
    shared_daemon.create(
        "authcredential",
        iscsi_target_auth_tag=7,
        iscsi_target_auth_user=USER,
        iscsi_target_auth_secret=SECRET,
        iscsi_target_auth_peeruser=PEER_USER,
        iscsi_target_auth_peersecret=PEER_SECRET,
    )
    return {
        method: shared_daemon.create_disk(
            name, "8MB", target={"iscsi_target_authtype": method, "iscsi_target_authgroup": 7}
        )
        for method, name in [("CHAP", "chap"), ("CHAP Mutual", "mutual"), ("Auto", "auto")]
    }


CHAP_CASES = [
    # method, user, secret, what the target must answer (user, secret), None = in, else what the tool says
    ("CHAP", USER, SECRET, None, None),
    ("CHAP", USER, SECRET, (PEER_USER, PEER_SECRET), None),
    ("CHAP", USER, "wrong-secret-00", None, AUTHENTICATION_FAILURE),
    ("CHAP", "nobody", SECRET, None, AUTHENTICATION_FAILURE),
    ("CHAP", "", "", None, AUTHENTICATION_FAILURE),
    ("CHAP Mutual", USER, SECRET, (PEER_USER, PEER_SECRET), None),
    ("CHAP Mutual", USER, SECRET, (PEER_USER, "not-his-secret1"), "Invalid CHAP_R response from the target"),
    ("CHAP Mutual", USER, SECRET, None, AUTHENTICATION_FAILURE),
    ("CHAP Mutual", USER, "wrong-secret-00", (PEER_USER, PEER_SECRET), AUTHENTICATION_FAILURE),
    ("CHAP Mutual", "", "", None, AUTHENTICATION_FAILURE),
    ("Auto", "", "", None, None),
    ("Auto", USER, SECRET, None, None),
    ("Auto", USER, "wrong-secret-00", None, AUTHENTICATION_FAILURE),
]


CHAP_WORDS: dict[Callable[[str, str, str], bool], str] = {
    lambda method, user, secret: not user: "the initiator went on without CHAP",
    lambda method, user, secret: user != USER: "CHAP user 'nobody' is unknown in this group",
    lambda method, user, secret: secret != SECRET: "CHAP user 'alice' gave a wrong secret",
    lambda method, user, secret: method == "CHAP Mutual": "the initiator did not challenge us",
}
"""Of method, user and secret → what the operator reads; the first that is so."""


@pytest.mark.parametrize(("method", "user", "secret", "peer", "refusal"), CHAP_CASES)
def test_chap_lets_in_whom_it_should(
    shared_daemon: Daemon,
    chap_disks: dict[str, Disk],
    method: str,
    user: str,
    secret: str,
    peer: tuple[str, str] | None,
    refusal: str | None,
) -> None:
    """RFC 7143 §12.1.3 and api-semantics §7.3; a refusal is logged in words, a secret never."""
    environment = {}
    if peer is not None:
        environment["LIBISCSI_CHAP_TARGET_USERNAME"] = peer[0]
        environment["LIBISCSI_CHAP_TARGET_PASSWORD"] = peer[1]
    before = len(shared_daemon.lines)
    url = shared_daemon.url(chap_disks[method].iqn, user=user, secret=secret)
    ran = run("iscsi-inq", "-i", ALICE, url, environment=environment)
    if refusal is None:
        ran.ok()
    else:
        ran.refused(refusal)
    if refusal is not None and peer == (PEER_USER, "not-his-secret1"):
        # It is the initiator that refuses, and it does not tell us; the API says the same.
        line = shared_daemon.wait_for_line(
            ALICE, chap_disks[method].iqn, "we answered its challenge with the peer secret", since=before
        )
        newest = shared_daemon.expect(200, "GET", "services/iscsi/loginfailure/?limit=1")[0]
        assert (newest["initiator_name"], newest["target_name"]) == (ALICE, chap_disks[method].iqn)
        assert newest["reason"] in line
    if refusal == AUTHENTICATION_FAILURE:
        words = next(words for reason, words in CHAP_WORDS.items() if reason(method, user, secret))
        shared_daemon.wait_for_line(ALICE, chap_disks[method].iqn, "refused (0201h)", words, since=before)
    for hidden in (SECRET, PEER_SECRET, "wrong-secret-00"):
        assert hidden not in shared_daemon.log


def test_new_credential_counts_from_the_next_login_on(shared_daemon: Daemon) -> None:
    """Every API write is in force when it is answered (api-semantics §7.5)."""
    shared_daemon.create(
        "authcredential",
        iscsi_target_auth_tag=8,
        iscsi_target_auth_user="early",
        iscsi_target_auth_secret="earlys-secret1",
    )
    disk = shared_daemon.create_disk(
        "latecomer", "8MB", target={"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 8}
    )
    url = shared_daemon.url(disk.iqn, user="late", secret="lates-secret-1")
    run("iscsi-inq", url).refused(AUTHENTICATION_FAILURE)
    made = shared_daemon.create(
        "authcredential",
        iscsi_target_auth_tag=8,
        iscsi_target_auth_user="late",
        iscsi_target_auth_secret="lates-secret-1",
    )
    run("iscsi-inq", url).ok()
    shared_daemon.delete("authcredential", made["id"])
    run("iscsi-inq", url).refused(AUTHENTICATION_FAILURE)


# -- initiator groups and networks ----------------------------------------------------------------

GROUPS = [
    # initiators, networks, name that asks, let in
    ("ALL", "ALL", MALLORY, True),
    (ALICE, "ALL", ALICE, True),
    (ALICE.upper(), "ALL", ALICE, True),
    (ALICE, "ALL", MALLORY, False),
    (f"{MALLORY} {ALICE}", "ALL", ALICE, True),
    (f"!{MALLORY}\nALL", "ALL", MALLORY, False),
    (f"!{MALLORY}\nALL", "ALL", ALICE, True),
    ("ALL", "127.0.0.0/8", ALICE, True),
    ("ALL", "127.0.0.1", ALICE, True),
    ("ALL", "192.0.2.0/24", ALICE, False),
    (ALICE, "192.0.2.0/24", ALICE, False),
    ("ALL", "192.0.2.0/24\n127.0.0.1/32", ALICE, True),
]


@pytest.mark.parametrize(("initiators", "networks", "asking", "welcome"), GROUPS)
def test_initiator_group_decides_who_may_log_in(
    shared_daemon: Daemon, initiators: str, networks: str, asking: str, welcome: bool
) -> None:
    """api-semantics §7.4: in order, names then networks; a refusal is 0203h and is logged."""
    group = shared_daemon.create(
        "authorizedinitiator",
        iscsi_target_initiator_initiators=initiators,
        iscsi_target_initiator_auth_network=networks,
    )
    disk = shared_daemon.create_disk(
        f"group{group['id']}", "8MB", target={"iscsi_target_initiatorgroup": group["id"]}
    )
    before = len(shared_daemon.lines)
    ran = run("iscsi-inq", "-i", asking, disk.url)
    if welcome:
        ran.ok()
    else:
        ran.refused(NOT_FOUND)
        shared_daemon.wait_for_line(asking, since=before)


def test_discovery_hides_what_is_not_for_the_asking_initiator(shared_daemon: Daemon) -> None:
    """api-semantics §7.4: names decide what SendTargets shows; networks do not."""
    group = shared_daemon.create("authorizedinitiator", iscsi_target_initiator_initiators=ALICE)
    disk = shared_daemon.create_disk("alices", "8MB", target={"iscsi_target_initiatorgroup": group["id"]})
    assert disk.iqn in run("iscsi-ls", "-i", ALICE, shared_daemon.url()).ok()
    assert disk.iqn not in run("iscsi-ls", "-i", MALLORY, shared_daemon.url()).ok()


# -- sessions and changes -------------------------------------------------------------------------


def test_deleting_a_target_ends_its_session_and_no_other(shared_daemon: Daemon) -> None:
    """api-semantics §6.4."""
    doomed = shared_daemon.create_disk("doomed", "8MB")
    kept = shared_daemon.create_disk("kept", "8MB")
    address = (HOST, shared_daemon.portal_port)
    with RawSession(address, ALICE, doomed.iqn) as ending, RawSession(address, ALICE, kept.iqn) as staying:
        assert (ending.status, staying.status) == (0, 0)
        shared_daemon.delete("target", doomed.target_id)
        ending.until_closed()
        staying.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            staying.receive()
    assert doomed.iqn not in run("iscsi-ls", shared_daemon.url()).ok()
    assert kept.iqn in run("iscsi-ls", shared_daemon.url()).ok()


def test_new_target_can_be_used_the_moment_its_creation_is_answered(shared_daemon: Daemon) -> None:
    """api-semantics §10.2: apply first, answer second."""
    for number in range(5):
        disk = shared_daemon.create_disk(f"atonce{number}", "8MB")
        run("iscsi-inq", disk.url).ok()


def test_everything_is_still_there_after_kill_9(daemon: Daemon) -> None:
    """design.md §6: acknowledged configuration survives kill -9 at any instant."""
    disk = daemon.create_disk("survivor", "8MB")
    before = run("iscsi-inq", "-e", "1", "-c", str(0x83), disk.url).ok()
    daemon.kill9()
    daemon.start()
    assert f"Target:{disk.iqn} Portal:{daemon.portal},1" in run("iscsi-ls", "-s", daemon.url()).ok()
    assert run("iscsi-inq", "-e", "1", "-c", str(0x83), disk.url).ok() == before
