"""Wireshark as a second reader of RFC 7143: what the daemon sends must decode without complaint.

The traffic of real initiators (discovery, CHAP, refused logins, reads, writes with R2T, task management,
misbehaving commands), and of our own, which says what those never say (every task management function, PDUs
that are rejected, text over many PDUs, pings, redirections, logouts asked for, additional header segments, a
cut connection, reassignment, SNACK), is captured on loopback and read back by tshark's iSCSI and SCSI
dissectors.
"""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol import bhs
from tests import cdbs
from tests.daemon import HOST, Daemon, Disk
from tests.functional.recovering import ask_again, cut_and_carry_on
from tests.initiator import INITIATOR_NAME, LoginFailed, SocketInitiator, frame
from tests.interop.dissection import Capture
from tests.interop.libiscsi_suite import installed, run_test
from tests.interop.peers import needs, run

pytestmark = [
    pytest.mark.interop,
    needs("tshark", "dumpcap", "iscsi-ls", "qemu-io"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can capture"),
    pytest.mark.skipif(not installed(), reason="not installed: iscsi-test-cu"),
]

CAPTURE_BUFFER_MIB = 64
START_LIMIT_S = 20.0

CONFORMANCE = [
    "Inquiry.Standard",
    "Inquiry.MandatoryVPDSBC",
    "ReadCapacity16.Simple",
    "ReportSupportedOpcodes.Simple",
    "ModeSense6.AllPages",
    "PrinReadKeys.Simple",
    "ProutRegister.Simple",
    "Reserve6.Simple",
    "Unmap.Simple",
    "Read10.BeyondEol",
    "Write10.Simple",
    "iSCSIcmdsn.iSCSICmdSnTooHigh",
    "iSCSIResiduals.Write10Residuals",
    "iSCSITMF.AbortTaskSimpleAsync",
]
"""Tests whose traffic is worth reading; how they end is another module's business."""


LAST_WORDS = b"the recording ends here".ljust(48)
"""Sent to the portal at the end: when they are in the file, so is all that went before."""


@contextmanager
def capture(port: int, path: Path) -> Iterator[None]:
    """Record what passes the loopback interface to and from a port, up to the end of the block."""
    process = subprocess.Popen(
        [
            "dumpcap",
            "-q",
            "-i",
            "lo",
            "-B",
            str(CAPTURE_BUFFER_MIB),
            "-f",
            f"tcp port {port}",
            "-w",
            "-",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said: list[str] = []
    begun, whole = threading.Event(), threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.decode())
            if said[-1].startswith("File:"):
                # Printed once the interface is open and packets are being taken.
                begun.set()
        begun.set()

    def record() -> None:
        assert process.stdout is not None
        tail = b""
        with path.open("wb") as file:
            while data := os.read(process.stdout.fileno(), 1 << 16):
                file.write(data)
                tail = tail[-len(LAST_WORDS) :] + data
                if LAST_WORDS in tail:
                    whole.set()

    readers = [threading.Thread(target=work, daemon=True) for work in (listen, record)]
    for reader in readers:
        reader.start()
    try:
        begun.wait(START_LIMIT_S)
        if process.poll() is not None or not any(line.startswith("File:") for line in said):
            pytest.skip("dumpcap cannot capture here: " + "".join(said).strip())
        yield
        with socket.create_connection((HOST, port)) as last:
            last.sendall(LAST_WORDS)
            assert whole.wait(START_LIMIT_S), "dumpcap does not deliver what it has captured"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(START_LIMIT_S)
        for reader in readers:
            reader.join(START_LIMIT_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="module")
def recording(shared_daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """A capture of varied traffic with the daemon."""
    daemon = shared_daemon
    plain = daemon.create_disk("plain", "256MB")
    daemon.create(
        "authcredential",
        iscsi_target_auth_tag=1,
        iscsi_target_auth_user="shark",
        iscsi_target_auth_secret="sharks-secret1",
        iscsi_target_auth_peeruser="target",
        iscsi_target_auth_peersecret="targets-secret",
    )
    guarded = daemon.create_disk(
        "guarded", "8MB", target={"iscsi_target_authtype": "CHAP Mutual", "iscsi_target_authgroup": 1}
    )
    careful = daemon.create_disk("careful", "1MB", target={"iscsi_target_error_recovery_level": 2})
    mutual = {
        "LIBISCSI_CHAP_TARGET_USERNAME": "target",
        "LIBISCSI_CHAP_TARGET_PASSWORD": "targets-secret",
    }
    for number in range(24):
        daemon.create(
            "target",
            iscsi_target_name=f"target-{number}",
            iscsi_target_portalgroup=1,
            iscsi_target_initiatorgroup=1,
        )
    path = tmp_path_factory.mktemp("capture") / "traffic.pcapng"
    with capture(daemon.portal_port, path):
        run("iscsi-ls", daemon.url()).ok()
        url = daemon.url(guarded.iqn, user="shark", secret="sharks-secret1")
        run("iscsi-inq", url, environment=mutual).ok()
        run("iscsi-inq", daemon.url(guarded.iqn, user="shark", secret="wrong-secret-0")).refused()
        run("iscsi-inq", daemon.url(f"{plain.iqn}.absent")).refused()
        for command in ("write -P 5 0 1M", "read -P 5 0 1M", "discard 0 64k", "flush"):
            run("qemu-io", "-f", "raw", "-d", "unmap", "-c", command, plain.url).ok()
        # Not as ?header_digest= in the URL: QEMU 7.2 with libiscsi 1.19 dies of that.
        digested = (
            f"driver=iscsi,transport=tcp,portal={daemon.portal},target={plain.iqn},lun=0,header-digest=crc32c"
        )
        run("qemu-io", "--image-opts", "-c", "write -P 6 0 64k", "-c", "read -P 6 0 64k", digested).ok()
        for test in CONFORMANCE:
            run_test(test, [plain.url])
        for talk in CONVERSATIONS:
            talk(daemon, plain)
        cut_and_carry_on(daemon, careful.iqn, 1 << 20)
        ask_again(daemon, careful.iqn)
    return Capture(path, {daemon.portal_port})


# -- what other initiators never say -----------------------------------------------------------------


def _session(daemon: Daemon, disk: Disk, **login: Any) -> SocketInitiator:
    initiator = SocketInitiator((HOST, daemon.portal_port))
    initiator.login(disk.iqn, **login)
    initiator.command(cdbs.test_unit_ready())
    return initiator


def solicited_data_with_digests(daemon: Daemon, disk: Disk) -> None:
    """R2Ts of small bursts, digests of headers and data, Data-In in many PDUs."""
    keys = {
        "HeaderDigest": "CRC32C",
        "DataDigest": "CRC32C",
        "InitialR2T": "Yes",
        "ImmediateData": "No",
        "FirstBurstLength": "512",
        "MaxBurstLength": "4096",
        "MaxRecvDataSegmentLength": "1024",
    }
    with _session(daemon, disk, keys=keys) as initiator:
        assert initiator.command(cdbs.write10(0, 64), b"\x5a" * 32768).good
        assert initiator.command(cdbs.read10(0, 64), read=32768).good
        initiator.logout()


def every_task_management_function(daemon: Daemon, disk: Disk) -> None:
    """RFC 7143 §11.5.1 and those of RFC 7144; the resets end the session, so they come last."""
    with _session(daemon, disk) as initiator:
        initiator.answer_r2ts = False
        task = initiator.send_command(cdbs.write10(0, 8), bytes(4096), immediate_data=0, unsolicited=0)
        initiator.wait_for_r2t(task)
        for function in (9, 1):
            initiator.task_management(function, task=task)
        for function in (2, 3, 4, 5, 8, 10, 11, 12, 6):
            initiator.task_management(function)
        initiator.send(initiator.initiator.task_management(7, initiator_task_tag=99))
        initiator.wait_closed()


def what_is_rejected(daemon: Daemon, disk: Disk) -> None:
    """RFC 7143 §11.17: unknown opcodes, SNACK without recovery, data of no command, text that is none."""
    with _session(daemon, disk) as initiator:
        wire = initiator.initiator
        initiator.send(frame(bytes((0x1D, 0x80)) + bytes(46)))
        initiator.send(wire.snack(0))
        initiator.send(wire.data_out(bytes(512), tag=1234, transfer_tag=77, data_sn=0, offset=0, final=True))
        initiator.send(wire.text_request({"SendTargets": "nonsense"}, initiator_task_tag=1235))
        for _ in range(4):
            initiator.receive().expect(bhs.Reject)
        initiator.nop(b"still here")
        initiator.logout()


def long_texts(daemon: Daemon, disk: Disk) -> None:
    """Login and Text in pieces, both ways (C bit)."""
    with SocketInitiator((HOST, daemon.portal_port)) as initiator:
        initiator.login(None, segment=40, keys={"MaxRecvDataSegmentLength": "512"})
        assert len(initiator.discover()) > 20
        initiator.text({"X-org.example.unknown": "x", "MaxRecvDataSegmentLength": "1024"})
        initiator.logout()


def longer_headers(daemon: Daemon, disk: Disk) -> None:
    """Additional header segments: a CDB of 32 bytes, and the read length of both directions at once."""
    with _session(daemon, disk) as initiator:
        initiator.command(b"\x7f" + bytes(6) + b"\x18" + bytes(24))
        ahs = (5).to_bytes(2, "big") + b"\x02\0" + (512).to_bytes(4, "big")
        initiator.send(
            initiator.initiator.scsi_command(
                cdbs.read10(0, 1), bytes(512), read=True, write=True, expected=512, ahs=ahs
            )
        )
        while not isinstance(initiator.receive().header, bhs.ScsiResponse):
            pass
        initiator.logout()


def pings_and_a_logout_asked_for(daemon: Daemon, disk: Disk) -> None:
    """NOP-In of the target's own (§11.19), Asynchronous Message (§11.9): an administrator
    ends the session."""
    globals_ = "services/iscsi/globalconfiguration/"
    daemon.expect(202, "PUT", globals_, {"iscsi_nopinint": 1})
    with _session(daemon, disk) as initiator:
        ping = initiator.wait_for_ping().expect(bhs.NopIn)
        initiator.send(initiator.initiator.nop_answer(ping))
        daemon.expect(202, "PUT", globals_, {"iscsi_nopinint": 20})
        (session,) = daemon.expect(200, "GET", "services/iscsi/session/")
        ended = threading.Thread(
            target=daemon.expect, args=(204, "DELETE", f"services/iscsi/session/{session['id']}/")
        )
        ended.start()
        initiator.wait_for_async()
        initiator.logout()
        ended.join()


def a_negotiation_asked_for(daemon: Daemon, disk: Disk) -> None:
    """Asynchronous Message 4 (§11.9.1), and the Text exchange that it is for."""
    with _session(daemon, disk) as initiator:
        (session,) = daemon.expect(200, "GET", "services/iscsi/session/")
        daemon.expect(202, "POST", f"services/iscsi/session/{session['id']}/negotiate/")
        initiator.wait_for_async()
        assert initiator.text({})
        initiator.logout()


def logins_that_end(daemon: Daemon, disk: Disk) -> None:
    """Refused for what they say, and sent on to another address, v4 and v6 (§11.13.5, §13.8)."""
    target = f"services/iscsi/target/{disk.target_id}/"
    for place, permanent in (("192.0.2.1:3260", False), ("[2001:db8::1]:3260", True)):
        body = {"iscsi_target_redirect": place, "iscsi_target_redirect_permanent": permanent}
        daemon.expect(202, "PUT", target, body)
        with SocketInitiator((HOST, daemon.portal_port)) as initiator, pytest.raises(LoginFailed):
            initiator.login(disk.iqn)
    daemon.expect(202, "PUT", target, {"iscsi_target_redirect": ""})
    for fields in ({"version_min": 9, "version_max": 9}, {"tsih": 77}, {"flags": 0xFF}):
        with SocketInitiator((HOST, daemon.portal_port)) as initiator:
            names = {"InitiatorName": INITIATOR_NAME, "TargetName": disk.iqn}
            initiator.request(initiator.initiator.login_request(names, **fields)).expect(bhs.LoginResponse)


CONVERSATIONS = (
    solicited_data_with_digests,
    every_task_management_function,
    what_is_rejected,
    long_texts,
    longer_headers,
    pings_and_a_logout_asked_for,
    a_negotiation_asked_for,
    logins_that_end,
)


def test_capture_holds_the_pdus_of_a_target(recording: Capture) -> None:
    """The check below would be empty on a capture that the dissector did not recognise: every opcode that a
    target has is there (RFC 7143 §11.2.1.2)."""
    assert recording.opcodes_sent() == {0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3F}


def test_nothing_the_daemon_sends_is_malformed(recording: Capture) -> None:
    """No malformed PDU and no expert error in what comes from the portal."""
    found = recording.complaints()
    assert not found, found[:20]
