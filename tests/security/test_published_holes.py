"""Every class of hole published for an iSCSI target, tried on this one.

At wire level, against the whole target in memory (``MemoryTarget``) where that shows it, against the real
daemon where files, sockets or its randomness are the point. Each test names what was published.
"""

import os
import socket
import stat
from dataclasses import replace
from typing import Any

import pytest

from protocol import bhs
from protocol.access import Credential
from protocol.enums import AuthMethod, LoginStage, LoginStatus, ScsiStatus
from protocol.scsi.device import LogicalUnit, Target, UnitConfig
from protocol.scsi.reservations import Reservations
from protocol.scsi.sense import Sense
from storage.memory import Memory
from tests.daemon import HOST, Daemon
from tests.initiator import LoginFailed, MemoryPeer, SocketInitiator
from tests.protocol.target import TARGET, MemoryTarget, connection_of

NAMED = [("InitiatorName", "iqn.2026-11.example:host"), ("TargetName", TARGET), ("SessionType", "Normal")]
OPERATIONAL = LoginStage.OPERATIONAL
SECRET = b"\xa5\x5a" * 256
"""What another's stale memory would look like."""


def requests(peer: MemoryPeer) -> dict[str, bytes]:
    """One PDU of every kind that is no login."""
    initiator = peer.initiator
    return {
        "SCSI Command": initiator.scsi_command(bytes(6)),
        "Data-Out": initiator.data_out(b"x" * 512, tag=1, offset=0, data_sn=0, final=True),
        "NOP-Out": initiator.nop_out(b"hello"),
        "Text": initiator.text_request({"SendTargets": "All"}),
        "Logout": initiator.logout_request(),
        "Task Management": initiator.task_management(1),
        "SNACK": initiator.snack(0),
        "opcode 3Fh": b"\x3f" + bytes(47),
        "opcode of a target": b"\x21" + bytes(47),
    }


# -- Order of PDUs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(requests(MemoryTarget().connect())))
def test_first_pdu_that_is_no_login_closes_the_connection_spdk_2026(kind: str) -> None:
    """SPDK 2026: a first PDU other than a Login Request reached code that took the login for granted."""
    target = MemoryTarget()
    peer = target.connect()
    peer.send(requests(peer)[kind])
    assert connection_of(peer).closing
    assert peer.pending() == []
    assert not target.sessions.sessions
    assert target.logged_in().command(bytes(6)).good, "others are served"


@pytest.mark.parametrize("kind", list(requests(MemoryTarget().connect())))
def test_pdu_in_the_middle_of_a_login_does_not_pass_for_one(kind: str) -> None:
    """SPDK 2026, second half: the same between two Login Requests ends the login (020Bh)."""
    peer = MemoryTarget().connect()
    peer.send(peer.initiator.login_request(NAMED, transit=False))
    assert [pdu.header.status_class for pdu in peer.pending()] == [0]  # type: ignore[attr-defined]
    peer.send(requests(peer)[kind])
    (pdu,) = peer.pending()
    answer = pdu.expect(bhs.LoginResponse)
    assert answer.status_class << 8 | answer.status_detail == LoginStatus.INVALID_DURING_LOGIN
    assert connection_of(peer).closing


# -- Text ---------------------------------------------------------------------------------------------


def test_empty_text_with_c_bit_is_answered_empty_cve_2021_28361() -> None:
    """CVE-2021-28361 (SPDK): a Text Request with C=1 and no data was dereferenced as a null pointer."""
    peer = MemoryTarget().logged_in()
    for _ in range(3):
        peer.send(peer.initiator.text_request(b"", final=False, more=True))
        (pdu,) = peer.pending()
        assert isinstance(pdu.header, bhs.TextResponse | bhs.Reject)
        assert pdu.data == b"" or isinstance(pdu.header, bhs.Reject)
    assert peer.text({"SendTargets": "All"})[0] == ("TargetName", TARGET)


def test_empty_login_with_c_bit_is_bounded_cve_2021_28361() -> None:
    """The same in login: any number of empty pieces costs nothing and comes to an end."""
    peer = MemoryTarget().connect()
    for _ in range(1000):
        peer.send(peer.initiator.login_request(b"", transit=False, more=True, initiator_task_tag=1))
        if connection_of(peer).closing:
            break
    assert connection_of(peer).closing
    assert peer.pending()[-1].expect(bhs.LoginResponse).status_class == 2


@pytest.mark.parametrize("size", [63, 64, 65, 255, 4000, 8000])
def test_long_unknown_key_is_not_copied_beyond_its_reply_cve_2013_2850(size: int) -> None:
    """CVE-2013-2850 (LIO): an unknown key longer than 64 bytes was copied into a heap buffer of 64.

    A key name has at most 63 bytes (RFC 7143 §6.1), so a longer one refuses the login; either way the
    answer is one PDU within what was declared.
    """
    peer = MemoryTarget().connect()
    peer.send(peer.initiator.login_request([*NAMED, ("X-" + "k" * (size - 2), "v")], transit=False)[:8192])
    answers = peer.pending()
    assert len(answers) == 1
    for pdu in answers:
        answer = pdu.expect(bhs.LoginResponse)
        assert len(pdu.data) <= 8192
        assert (answer.status_class == 0) == (size <= 63)


@pytest.mark.parametrize("hostile", ["%n%n%n%n", "%s" * 40, "{0.__class__}", "%(name)s", "$(id)", "a\u202eb"])
def test_format_strings_in_names_are_text_cve_2010_0743(
    hostile: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2010-0743 (tgt, iscsitarget): an initiator name was used as a format string."""
    target = MemoryTarget()
    name = f"iqn.2026-11.example:{hostile}"
    peer = target.connect()
    keys = [("InitiatorName", name), ("InitiatorAlias", hostile), ("TargetName", TARGET)]
    peer.send(peer.initiator.login_request([*keys, ("SessionType", "Normal")]))
    (pdu,) = peer.pending()
    answer = pdu.expect(bhs.LoginResponse)
    if not answer.status_class:
        (session,) = target.sessions.sessions.values()
        assert session.initiator_name == name.lower() or session.initiator_name == name
    peer.send(peer.initiator.text_request({"SendTargets": hostile}))
    assert target.logged_in().command(bytes(6)).good


@pytest.mark.parametrize("hostile", ["%n%n%n%n", "%s" * 40, "{0.__class__}", "%(name)s"])
def test_format_strings_in_names_are_text_in_the_log_cve_2010_0743(
    shared_daemon: Daemon, hostile: str
) -> None:
    """The same where it would have happened: what the daemon logs of such a login is what was said, of a name
    that is none its first 60 characters."""
    since = len(shared_daemon.lines)
    name = f"iqn.2026-11.example:{hostile}"
    with SocketInitiator((HOST, shared_daemon.portal_port)) as peer, pytest.raises(LoginFailed):
        peer.login(f"iqn.2026-11.example:{hostile}", name)
    shared_daemon.wait_for_line(name[:60], since=since)
    assert not [line for line in shared_daemon.lines[since:] if "Logging error" in line]
    assert not shared_daemon.tracebacks()


# -- CHAP ---------------------------------------------------------------------------------------------


def challenge(daemon: Daemon, iqn: str) -> tuple[str, str]:
    """CHAP_I and CHAP_C of one login that is not finished."""
    with SocketInitiator((HOST, daemon.portal_port)) as peer:
        keys = [("InitiatorName", "iqn.2026-11.example:host"), ("TargetName", iqn)]
        keys += [("SessionType", "Normal"), ("AuthMethod", "CHAP")]
        stage: dict[str, Any] = {"stage": LoginStage.SECURITY, "next_stage": OPERATIONAL}
        stage |= {"transit": False, "initiator_task_tag": 1}
        peer.request(peer.initiator.login_request(keys, **stage))
        found = dict(peer.request(peer.initiator.login_request([("CHAP_A", "7")], **stage)).text)
        return found["CHAP_I"], found["CHAP_C"]


def test_chap_challenges_cannot_be_foretold_cve_2024_45751(daemon: Daemon) -> None:
    """CVE-2024-45751 (tgt): challenges came from ``rand()`` with a seed of the clock, so that after each
    start they came again. Here: long, all different, and different over a restart."""
    daemon.create(
        "authcredential",
        iscsi_target_auth_tag=1,
        iscsi_target_auth_user="user",
        iscsi_target_auth_secret="secret-of-14-ch",
    )
    disk = daemon.create_disk("chap", target={"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 1})
    before = [challenge(daemon, disk.iqn)[1] for _ in range(16)]
    daemon.restart()
    after = [challenge(daemon, disk.iqn)[1] for _ in range(16)]
    assert len({*before, *after}) == 32
    numbers = [bytes.fromhex(text[2:]) for text in (*before, *after)]
    assert min(map(len, numbers)) >= 16
    # Bits that never change would be no randomness: over 32 draws a true one fails once in 10^7.
    either, both = int.from_bytes(numbers[0], "big"), int.from_bytes(numbers[0], "big")
    for number in numbers[1:]:
        either |= int.from_bytes(number, "big")
        both &= int.from_bytes(number, "big")
    assert either.bit_count() == 8 * len(numbers[0])
    assert both == 0


def test_own_challenge_sent_back_is_not_answered() -> None:
    """RFC 7143 §12.1.3: a reflected challenge would have the target compute the answer to its own."""
    target = MemoryTarget()
    credential = Credential("user", b"x" * 16, "peer", b"y" * 16)
    target.access.grant = replace(target.access.grant, methods=AuthMethod.CHAP, credentials=(credential,))
    peer = target.connect()
    stage: dict[str, Any] = {"stage": LoginStage.SECURITY, "next_stage": OPERATIONAL}
    stage["initiator_task_tag"] = 1
    peer.request(peer.initiator.login_request([*NAMED, ("AuthMethod", "CHAP")], transit=False, **stage))
    found = dict(peer.request(peer.initiator.login_request([("CHAP_A", "7")], transit=False, **stage)).text)
    keys = [("CHAP_N", "user"), ("CHAP_R", "0x" + "00" * 32)]
    keys += [("CHAP_I", found["CHAP_I"]), ("CHAP_C", found["CHAP_C"])]
    pdu = peer.request(peer.initiator.login_request(keys, **stage))
    assert pdu.expect(bhs.LoginResponse).status_class == 2
    assert b"CHAP_R" not in pdu.data


# -- Third-party copy ---------------------------------------------------------------------------------


def extended_copy_list(source: str, destination: str) -> bytes:
    """A parameter list of EXTENDED COPY (LID1) that copies one block (SPC-4 r37 §6.4)."""

    def unit(naa: str) -> bytes:
        name = bytes.fromhex(naa[2:])
        return bytes([0xE4, 0, 0, 0, 1, 3, 0, len(name)]) + name.ljust(20, b"\0") + b"\0\0\x02\0"

    segment = bytes.fromhex("02000018 0000 0001 0000 0001") + bytes(16)
    units = unit(source) + unit(destination)
    header = b"\x01\0" + len(units).to_bytes(2, "big") + bytes(4) + len(segment).to_bytes(4, "big") + bytes(4)
    return header + units + segment


@pytest.mark.parametrize("stolen", ["source", "destination"])
def test_extended_copy_reaches_no_unit_of_others_cve_2020_28374_cve_2021_3139(stolen: str) -> None:
    """CVE-2020-28374 (LIO), CVE-2021-3139 (tcmu-runner): EXTENDED COPY looked for the named unit among
    all units of the host, so that an initiator could read and write those of others."""
    target = MemoryTarget()
    foreign_medium = Memory(1 << 20)
    foreign_medium.write(0, SECRET)
    config = UnitConfig(name="theirs", serial="9", naa=f"0x6{9:031x}")
    foreign = LogicalUnit(
        config, foreign_medium, target.lane, reservations=Reservations(), now=lambda: target.now
    )
    Target("iqn.2026-11.example:theirs", {0: foreign}, lane=target.lane, now=lambda: target.now)
    ours = target.units[0].config.naa
    names = (config.naa, ours) if stolen == "source" else (ours, config.naa)
    peer = target.logged_in()
    data = extended_copy_list(*names)
    cdb = b"\x83" + bytes(9) + len(data).to_bytes(4, "big") + bytes(2)
    reply = peer.command(cdb, data)
    assert reply.status == ScsiStatus.CHECK_CONDITION
    assert reply.additional_sense == Sense.UNREACHABLE_COPY_TARGET.value[1:]
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)
    assert bytes(foreign_medium.read(0, 512)) == SECRET
    own = extended_copy_list(ours, ours)
    assert peer.command(b"\x83" + bytes(9) + len(own).to_bytes(4, "big") + bytes(2), own).good


# -- Replies ------------------------------------------------------------------------------------------

INQUIRIES = [
    bytes.fromhex(f"12 01 {page:02x} 00 ff 00") for page in (0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2)
]
REPORTS = {
    "INQUIRY": bytes.fromhex("12000000ff00"),
    **{f"INQUIRY page {cdb[2]:02X}h": cdb for cdb in INQUIRIES},
    "REQUEST SENSE": bytes.fromhex("03000000ff00"),
    "MODE SENSE(6)": bytes.fromhex("1a003f00ff00"),
    "MODE SENSE(10)": bytes.fromhex("5a003f00000000ffff00"),
    "READ CAPACITY(10)": bytes.fromhex("25000000000000000000"),
    "READ CAPACITY(16)": bytes.fromhex("9e10000000000000000000000fff0000"),
    "REPORT LUNS": bytes.fromhex("a00000000000" + "0000ffff" + "0000"),
    "REPORT SUPPORTED OPERATION CODES": bytes.fromhex("a30c80000000" + "0000ffff" + "0000"),
    "LOG SENSE": bytes.fromhex("4d00400000000000ff00")[:7] + b"\xff\xff\x00",
    "PERSISTENT RESERVE IN": bytes.fromhex("5e020000000000ffff00"),
    "READ BUFFER": bytes.fromhex("3c0b000000000000ff00"),
    "RECEIVE COPY RESULTS": bytes.fromhex("8403000000000000000000" + "00ffff" + "0000"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_nothing_of_a_former_command_is_in_a_reply_cve_2014_4027_cve_2024_8178(name: str) -> None:
    """CVE-2014-4027 (LIO), CVE-2024-8178 (ctl): replies were built in memory that was not cleared. Here:
    the same command before and after much has gone through says the same, and none of that."""
    target = MemoryTarget()
    peer = target.logged_in()
    before = peer.command(REPORTS[name], read=0xFFFF)
    write = bytes.fromhex("2a00" + "00000010" + "00" + "0010" + "00")
    for _ in range(8):
        assert peer.command(write, SECRET * 16).good
    after = peer.command(REPORTS[name], read=0xFFFF)
    assert SECRET[:4] not in after.data
    if name != "LOG SENSE":  # it counts what was written
        assert after.data == before.data


@pytest.mark.parametrize("room", [0, 1, 3, 4, 5, 7, 8, 35, 36, 96])
@pytest.mark.parametrize("name", REPORTS)
def test_reply_is_no_longer_than_asked_for_cve_2020_1711_cve_2020_11947(name: str, room: int) -> None:
    """CVE-2020-1711, CVE-2020-11947 (QEMU's client): a response longer or shorter than the request thought.
    Of the CDB's allocation length and the expected transfer length the smaller one bounds the data; the
    strict initiator of these tests judges offsets, residuals and lengths of every Data-In."""
    peer = MemoryTarget().logged_in()
    whole = peer.command(REPORTS[name], read=0xFFFF)
    short = peer.command(REPORTS[name], read=room)
    assert len(short.data) <= room
    if whole.good and room:
        assert short.data == whole.data[:room]


HOSTILE_CDBS = {
    "REPORT SUPPORTED OPERATION CODES": (
        "a30c{:02x}{:02x}{:04x}0000ffff0000",
        [(option, opcode, action) for option in range(8) for opcode in (0, 0x9E, 0xFF)
         for action in (0, 0xFFFF)],
    ),
    "REQUEST SENSE": ("03{:02x}0000{:02x}00", [(d, n) for d in (0, 1, 0xFF) for n in (0, 1, 255)]),
    "READ BUFFER": (
        "3c{:02x}{:02x}{:06x}{:06x}00",
        [(m, b, o, n) for m in (0, 2, 3, 0x0A, 0x0B, 0x1F) for b in (0, 255) for o in (0, 0xFFFFFF)
         for n in (0, 0xFFFFFF)],
    ),
    "WRITE BUFFER": (
        "3b{:02x}{:02x}{:06x}{:06x}00",
        [(m, b, o, n) for m in (0, 2, 5, 0x0A, 0x1F) for b in (0, 255) for o in (0, 0xFFFFFF)
         for n in (0, 0xFFFFFF)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_CDBS)
def test_fields_of_cdbs_are_checked_cve_2024_42416_cve_2024_43110_cve_2024_45063(name: str) -> None:
    """CVE-2024-42416 (REPORT SUPPORTED OPERATION CODES), CVE-2024-43110 (REQUEST SENSE), CVE-2024-45063
    (READ/WRITE BUFFER; all FreeBSD ctl): fields used as index or length without a check."""
    target = MemoryTarget()
    peer = target.logged_in()
    layout, cases = HOSTILE_CDBS[name]
    for case in cases:
        cdb = bytes.fromhex(layout.format(*case))
        reply = peer.command(cdb, SECRET) if name == "WRITE BUFFER" else peer.command(cdb, read=0xFFFF)
        assert reply.status in (ScsiStatus.GOOD, ScsiStatus.CHECK_CONDITION), case
        assert SECRET[:4] not in reply.data
        assert len(reply.data) <= 0xFFFF
    assert peer.command(bytes(6)).good


# -- Files, sockets, the API --------------------------------------------------------------------------


def test_configuration_and_backups_are_the_owners_alone_cve_2020_13867_cve_2020_14019(
    daemon: Daemon,
) -> None:
    """CVE-2020-13867 (targetcli: backups 0644), CVE-2020-14019 (rtslib: saveconfig.json 0644)."""
    daemon.create_disk("one")
    daemon.restart()
    places = [daemon.state_dir, *daemon.state_dir.rglob("*")]
    assert len(places) > 2
    for place in places:
        assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0, place


def test_there_is_no_local_control_socket_cve_2020_10699(daemon: Daemon) -> None:
    """CVE-2020-10699 (targetcli): the daemon's Unix socket was 0666. Here there is none to protect: every
    listening socket of the process is TCP, on the portal and the API."""
    assert daemon.process is not None
    inodes = set()
    for name in os.listdir(f"/proc/{daemon.process.pid}/fd"):  # noqa: PTH208  # descriptors come and go
        try:
            link = os.readlink(f"/proc/{daemon.process.pid}/fd/{name}")  # noqa: PTH115
        except FileNotFoundError:
            continue
        if link.startswith("socket:["):
            inodes.add(link[8:-1])
    with open("/proc/net/unix", encoding="utf-8") as table:  # noqa: PTH123
        next(table)
        unix = [line.split() for line in table]
    # Field 3 has __SO_ACCEPTCON (10000h) for a listener.
    listening = [row for row in unix if row[6] in inodes and int(row[3], 16) & 0x10000]
    assert listening == []


@pytest.mark.parametrize(
    "path",
    ["/console", "/debug", "/_debug", "/__debugger__", "/?__debugger__=yes&cmd=resource&f=debugger.js",
     "/api/v1.0/console", "/api/v1.0/../../etc/passwd", "//etc/passwd", "/static/../../etc/passwd"],
)  # fmt: skip
def test_api_has_no_debugger_cve_2018_14649(shared_daemon: Daemon, path: str) -> None:
    """CVE-2018-14649 (ceph-iscsi): the API ran under Werkzeug's debugger, a Python shell for everyone."""
    for password in (None, "wrong"):
        reply = shared_daemon.api("GET", path, password=password)
        assert reply.status in (400, 401, 403, 404), reply.status
        assert "Traceback" not in reply.text and "root:" not in reply.text
    broken = shared_daemon.api("POST", "services/iscsi/extent/", {"iscsi_target_extent_name": {"a": [1]}})
    assert broken.status == 400 or broken.status == 409
    assert "Traceback" not in broken.text and ".py" not in broken.text


# -- Floods and teardown ------------------------------------------------------------------------------


def test_packet_flood_takes_nothing_from_others_cve_2014_0255(shared_daemon: Daemon) -> None:
    """CVE-2014-0255 (Windows iSCSI Target): floods of crafted packets stopped the service. Two thousand
    connections of rubbish, and the disk still answers each command between them."""
    disk = shared_daemon.create_disk("flood")
    rubbish = [b"\xff" * 48, b"\x43" + b"\xff" * 47, b"GET / HTTP/1.0\r\n\r\n" * 4, b"", b"\x43", bytes(48)]
    with SocketInitiator((HOST, shared_daemon.portal_port)) as peer:
        peer.login(disk.iqn)
        peer.command(bytes(6))
        for round_ in range(200):
            sockets = []
            for number in range(10):
                sock = socket.create_connection((HOST, shared_daemon.portal_port), timeout=10)
                try:
                    sock.sendall(rubbish[(round_ + number) % len(rubbish)])
                except OSError:
                    pass
                sockets.append(sock)
            assert peer.command(bytes(6)).good
            for sock in sockets:
                sock.close()
        assert peer.command(bytes(6)).good
    assert not shared_daemon.tracebacks()


def teardown_logout(peer: MemoryPeer, target: MemoryTarget) -> None:
    peer.send(peer.initiator.logout_request())


def teardown_cut(peer: MemoryPeer, target: MemoryTarget) -> None:
    connection_of(peer).lost("cut")


def teardown_reinstatement(peer: MemoryPeer, target: MemoryTarget) -> None:
    target.connect(session=type(peer.session)(isid=peer.session.isid)).login(TARGET)


def teardown_reset(peer: MemoryPeer, target: MemoryTarget) -> None:
    peer.send(peer.initiator.task_management(7))  # TARGET COLD RESET ends sessions


TEARDOWNS = [teardown_logout, teardown_cut, teardown_reinstatement, teardown_reset]


@pytest.mark.parametrize("teardown", TEARDOWNS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("again", TEARDOWNS, ids=lambda each: each.__name__)
def test_command_that_ends_after_its_session_touches_nothing_cve_2026_23193_cve_2026_23216(
    teardown: Any, again: Any
) -> None:
    """CVE-2026-23193, CVE-2026-23216 (LIO): session or connection freed while commands of it were still
    under way. Here every way to end, twice, with a command on a worker and a write half received."""
    target = MemoryTarget()
    peer = target.logged_in(strict=False)
    target.lane.hold = True
    peer.send_command(bytes.fromhex("35000000000000000000"))  # SYNCHRONIZE CACHE goes to the lane
    assert target.lane.held
    peer.answer_r2ts = False
    peer.send_command(bytes.fromhex("2a000000000000040000"), SECRET * 1024, unsolicited=0, immediate_data=0)
    teardown(peer, target)
    again(peer, target)
    target.lane.release()
    target.lane.hold = False
    connection = connection_of(peer)
    assert connection.session is not None
    if connection.session.ended:
        assert not connection.session.tasks
        assert not connection.session.connections or connection.closing
    fresh = target.logged_in()
    assert fresh.command(bytes(6)).good
    assert bytes(target.backends[0].read(0, 512)) == bytes(512)
