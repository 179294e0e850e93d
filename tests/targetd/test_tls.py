"""The API's certificate changes under open connections, and is never replaced by one that does not fit."""

import os
import signal
import socket
import ssl
from pathlib import Path

from targetd.system.tls import Certificate
from tests.certificates import make_certificate
from tests.daemon import HOST, Daemon


def served(context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection is shown."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = (ssl.MemoryBIO(), ssl.MemoryBIO()), (ssl.MemoryBIO(), ssl.MemoryBIO())
    server = context.wrap_bio(incoming[0], outgoing[0], server_side=True)
    client = client_context.wrap_bio(incoming[1], outgoing[1])
    for _ in range(4):
        for side, out, into in ((client, outgoing[1], incoming[0]), (server, outgoing[0], incoming[1])):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            into.write(out.read())
    found = client.getpeercert(binary_form=True)
    assert found is not None
    return found


async def test_changed_files_are_in_force_for_new_connections(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    other, other_key = make_certificate(tmp_path, "other")
    kept = Certificate(certificate, key)
    before = served(kept.context)
    await kept.reload()
    assert served(kept.context) == before
    os.replace(other, certificate)  # noqa: PTH105
    await kept.reload()
    assert served(kept.context) == before, "a certificate without its key is no certificate"
    os.replace(other_key, key)  # noqa: PTH105
    await kept.reload()
    assert served(kept.context) != before


async def test_files_that_are_gone_leave_the_old_certificate(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    kept = Certificate(certificate, key)
    before = served(kept.context)
    certificate.rename(tmp_path / "away")
    await kept.reload(always=True)
    assert served(kept.context) == before


def shown(daemon: Daemon) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((HOST, daemon.api_port), 10) as raw, context.wrap_socket(raw) as wrapped:
        found = wrapped.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_sighup_reads_the_certificate_again(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    daemon = Daemon(tmp_path, ["--tls-cert", str(certificate), "--tls-key", str(key)]).start()
    try:
        before = shown(daemon)
        other, other_key = make_certificate(tmp_path, "other")
        certificate.write_bytes(other.read_bytes())
        key.write_bytes(other_key.read_bytes())
        since = len(daemon.lines)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("is in force", since=since)
        assert shown(daemon) != before
    finally:
        assert daemon.terminate() == 0
