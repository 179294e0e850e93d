"""Wireshark as a second reader of RFC 7143: what the daemon sends must decode without complaint.

The traffic of real initiators (discovery, CHAP, refused logins, reads, writes with R2T, task management,
misbehaving commands) and of ours (a cut connection, reassignment, SNACK) is captured on loopback and read
back by tshark's iSCSI and SCSI dissectors.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.functional.recovering import ask_again, cut_and_carry_on
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


@contextmanager
def capture(port: int, path: Path) -> Iterator[None]:
    """Record what passes the loopback interface to and from a port."""
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
            str(path),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    begun = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("File:"):
                # Printed once the interface is open and packets are being taken.
                begun.set()
        begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        begun.wait(START_LIMIT_S)
        if process.poll() is not None or not any(line.startswith("File:") for line in said):
            pytest.skip("dumpcap cannot capture here: " + "".join(said).strip())
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(START_LIMIT_S)
        reader.join(START_LIMIT_S)
        if process.stderr is not None:
            process.stderr.close()


def dissect(path: Path, port: int, display_filter: str, *fields: str) -> list[list[str]]:
    """The chosen fields of the PDUs that a display filter lets through."""
    columns = [word for name in fields for word in ("-e", name)]
    said = subprocess.run(
        [
            "tshark",
            "-r",
            str(path),
            "-d",
            f"tcp.port=={port},iscsi",
            "-Y",
            display_filter,
            "-T",
            "fields",
            *columns,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    return [line.split("\t") for line in said.splitlines()]


@pytest.fixture(scope="module")
def recording(shared_daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        cut_and_carry_on(daemon, careful.iqn, 1 << 20)
        ask_again(daemon, careful.iqn)
    return path


def test_capture_holds_the_pdus_of_a_target(recording: Path, shared_daemon: Daemon) -> None:
    """The check below would be empty on a capture that the dissector did not recognise."""
    port = shared_daemon.portal_port
    opcodes = {
        int(code, 0)
        for (row,) in dissect(recording, port, f"iscsi && tcp.srcport == {port}", "iscsi.opcode")
        for code in row.split(",")
    }
    # SCSI, Task Management, Login, Text, Logout Response, Data-In, R2T, Async, Reject (RFC 7143 §11.2.1.2)
    assert {0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3F} <= opcodes


def truncated_inquiry_data(recording: Path, port: int) -> set[str]:
    """Numbers of frames whose INQUIRY data ends where the allocation length cut it, as SPC-4 §4.3.5.6 wants.

    The dissector (4.0) reads on past the end of a designator that was cut and then calls it malformed.
    """
    allocated = {
        frame: lengths.split(",")
        for frame, lengths in dissect(
            recording, port, "scsi.cdb.alloclen16", "frame.number", "scsi.cdb.alloclen16"
        )
    }
    return {
        frame
        for frame, lengths, requests in dissect(
            recording,
            port,
            f"tcp.srcport == {port} && scsi.request_frame",
            "frame.number",
            "iscsi.datasegmentlength",
            "scsi.request_frame",
        )
        if any(set(allocated.get(request, ())) & set(lengths.split(",")) for request in requests.split(","))
    }


def test_nothing_the_daemon_sends_is_malformed(recording: Path, shared_daemon: Daemon) -> None:
    """No malformed PDU and no expert error in what comes from the portal."""
    port = shared_daemon.portal_port
    cut = truncated_inquiry_data(recording, port)
    complaints = [
        row
        for row in dissect(
            recording,
            port,
            f'tcp.srcport == {port} && (_ws.malformed || _ws.expert.severity == "Error")',
            "frame.number",
            "_ws.expert.message",
            "_ws.col.Info",
        )
        if not (row[0] in cut and "Inquiry" in row[2])
    ]
    assert not complaints, complaints[:20]
