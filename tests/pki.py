"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from nlu.settings import Settings


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def cert_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """NAME.pem and NAME.key."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert_pem)
        key.write_bytes(self.key_pem)
        return cert, key


def authority(name: str = "authority") -> Pair:
    """One that signs itself."""
    return _signed(name, None, (), days=30)


def issue(by: Pair, *names: str, days: float = 1, common: str = "") -> Pair:
    """A certificate with these alternative names, for this machine too; `days` may be negative: expired."""
    return _signed(common or "somebody", by, names, days=days)


def _signed(common: str, by: Pair | None, names: tuple[str, ...], *, days: float) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(by is None, None), critical=True)
    )
    if names:
        general = [
            x509.UniformResourceIdentifier(name) if "://" in name else x509.DNSName(name) for name in names
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    return Pair(builder.sign(key if by is None else by.key, SHA256()), key)


def tls_settings(folder: Path, server: Pair, client_ca: Pair | None = None, **settings: object) -> Settings:
    """Settings of a server with this certificate, in files server.pem, server.key and clients.pem of the folder."""
    cert, key = server.write(folder, "server")
    if client_ca is not None:
        (folder / "clients.pem").write_bytes(client_ca.cert_pem)
        settings["tls_client_ca"] = folder / "clients.pem"
    return Settings(tls_cert=cert, tls_key=key, port=0, metrics=False, **settings)  # type: ignore[arg-type]
