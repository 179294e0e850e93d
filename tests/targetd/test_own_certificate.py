"""``--tls auto``: a certificate of our own, judged by OpenSSL and by a client that trusts its authority."""

import datetime
import ssl
import urllib.request
from pathlib import Path

import pytest
from cryptography import x509

from targetd.system.own_certificate import CA, OwnCertificate
from tests.daemon import HOST, Daemon

NAMES = ("nas.example.org", "localhost", "127.0.0.1", "::1")
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def days(count: int) -> datetime.datetime:
    return NOW + datetime.timedelta(days=count)


def own(directory: Path, names: tuple[str, ...] = NAMES) -> OwnCertificate:
    return OwnCertificate(directory / "tls", names)


def test_it_is_made_once_and_nobody_else_may_read_the_keys(tmp_path: Path) -> None:
    made = own(tmp_path)
    assert made.ensure(NOW) is True
    assert made.ensure(NOW) is False
    assert {path.name: path.stat().st_mode & 0o777 for path in made.directory.iterdir()} == dict.fromkeys(
        ("ca.pem", "ca-key.pem", "server.pem", "server-key.pem"), 0o600
    )
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*made.files)


def serial(made: OwnCertificate, name: str = "server.pem") -> int:
    return x509.load_pem_x509_certificate((made.directory / name).read_bytes()).serial_number


@pytest.mark.parametrize(("later", "anew"), [(300, False), (334, False), (336, True), (400, True)])
def test_it_is_made_anew_a_month_before_it_ends(tmp_path: Path, later: int, anew: bool) -> None:
    made = own(tmp_path)
    made.ensure(NOW)
    server, authority = serial(made), serial(made, CA)
    assert made.ensure(days(later)) is anew
    assert (serial(made) != server) is anew
    assert serial(made, CA) == authority


def test_other_names_have_another_certificate_by_the_same_authority(tmp_path: Path) -> None:
    first = own(tmp_path)
    first.ensure(NOW)
    server, authority = serial(first), serial(first, CA)
    second = own(tmp_path, ("other.example.org", *NAMES))
    assert second.ensure(NOW) is True
    assert serial(second) != server and serial(second, CA) == authority


def test_an_authority_that_ends_is_replaced(tmp_path: Path) -> None:
    made = own(tmp_path)
    made.ensure(NOW)
    authority = serial(made, CA)
    made.ensure(days(3400))
    assert serial(made, CA) != authority
    made.files[0].unlink()
    assert made.ensure(days(3400)) is True


def test_a_key_of_another_authority_is_refused_in_words(tmp_path: Path) -> None:
    one, two = own(tmp_path / "one"), own(tmp_path / "two")
    one.ensure(NOW)
    two.ensure(NOW)
    (one.directory / "ca-key.pem").write_bytes((two.directory / "ca-key.pem").read_bytes())
    with pytest.raises(ValueError, match="remove both to have new ones made"):
        one.ensure(NOW)


def test_a_client_that_trusts_the_authority_is_served_over_restarts(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, ["--tls", "auto"])
    daemon.start()
    try:
        for _ in range(2):
            trusted = ssl.create_default_context(cafile=str(daemon.state_dir / "tls" / CA))
            for host in (HOST, "localhost"):
                url = f"https://{host}:{daemon.api_port}/healthz"
                with urllib.request.urlopen(url, context=trusted, timeout=20) as answer:
                    assert answer.status == 200
            daemon.restart()
    finally:
        assert daemon.terminate() == 0
    assert not daemon.tracebacks()
    assert "ca.pem; clients are to trust that" in daemon.log
