"""A certificate for the API that the daemon makes itself (``--tls auto``), signed by an authority of its own.

Four files below the state directory, each 0600::

    tls/ca.pem  tls/ca-key.pem          the authority, for ten years; clients are told to trust ``ca.pem``
    tls/server.pem  tls/server-key.pem  what is shown, for a year; made anew a month before it ends

The server certificate is made anew, too, when the names that it must hold change; the authority stays, so
that clients which trust it notice nothing.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from targetd.persistence.durable import write_private

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["CA", "OwnCertificate"]

CA = "ca.pem"
AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
RENEW_DAYS = 30
"""A server certificate that ends sooner is made anew."""


class OwnCertificate:
    """The files, and their making. May wait for a disk: worker threads only."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        """
        Args:
            directory: where the files are; made when there is none.
            names: DNS names and IP addresses that clients connect to.
        """
        self.directory = directory
        self.names = tuple(dict.fromkeys(names))
        self.files = (directory / "server.pem", directory / "server-key.pem")

    def ensure(self, now: datetime.datetime | None = None) -> bool:
        """Make what is missing, ends soon or holds other names; whether anything was made.

        Raises:
            OSError: a file cannot be read or written.
            ValueError: a file holds no certificate or key.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = self._authority(now)
        if self._is_good(authority[0], now):
            return False
        self._make_server(authority, now)
        return True

    def _authority(self, now: datetime.datetime) -> "tuple[x509.Certificate, ec.EllipticCurvePrivateKey]":
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        certificate, key = self.directory / CA, self.directory / "ca-key.pem"
        try:
            found = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = load_pem_private_key(key.read_bytes(), None)
        except FileNotFoundError:
            pass
        else:
            if (
                not isinstance(private, ec.EllipticCurvePrivateKey)
                or private.public_key() != found.public_key()
            ):
                raise ValueError(f"{key}: not the key of {certificate}; remove both to have new ones made")
            if found.not_valid_after_utc > now + datetime.timedelta(days=SERVER_DAYS):
                return found, private
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "iscsi-targetd authority")])
        made = (
            _builder(name, name, private.public_key(), now, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(private, _hash())
        )
        write_private(key, _private_pem(private))
        write_private(certificate, _public_pem(made))
        return made, private

    def _is_good(self, authority: "x509.Certificate", now: datetime.datetime) -> bool:
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        try:
            found = x509.load_pem_x509_certificate(self.files[0].read_bytes())
            held = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found.verify_directly_issued_by(authority)
        except (FileNotFoundError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        return (
            self.files[1].exists()
            and list(held) == [_general_name(name) for name in self.names]
            and found.not_valid_after_utc > now + datetime.timedelta(days=RENEW_DAYS)
        )

    def _make_server(
        self, authority: "tuple[x509.Certificate, ec.EllipticCurvePrivateKey]", now: datetime.datetime
    ) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "iscsi-targetd")])
        issuer, signer = authority
        made = (
            _builder(subject, issuer.subject, private.public_key(), now, SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in self.names]), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
            .sign(signer, _hash())
        )
        # the pair is looked at as one: a key that fits no certificate yet is made good by the next line
        write_private(self.files[1], _private_pem(private))
        write_private(self.files[0], _public_pem(made) + _public_pem(issuer))


def _hash() -> "hashes.SHA256":
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def _builder(
    subject: "x509.Name",
    issuer: "x509.Name",
    key: "ec.EllipticCurvePublicKey",
    now: datetime.datetime,
    days: int,
) -> "x509.CertificateBuilder":
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_pem(key: "ec.EllipticCurvePrivateKey") -> str:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _public_pem(certificate: "x509.Certificate") -> str:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM).decode()
