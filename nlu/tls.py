"""The server's certificate, for gRPC and HTTP, taken anew when its files change; and who a caller's certificate names.

Connections that stand keep what they were made with; new ones get the new certificate, and are held to the new client
CA. TLS 1.2 or newer: gRPC's own floor, set here for HTTP; 1.3 for HTTP with certificates of callers.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from nlu import metrics
from nlu.settings import Settings
from nlu.watched import Watched

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FILE_LIMIT = 2**20  # bytes; a chain or a set of authorities is far smaller
# Names are handed on with a space between them, so one that holds a space, or anything odd, is no name.
_NAME = re.compile(r"[A-Za-z0-9._:/@*-]{1,253}")


@dataclass(frozen=True)
class _Files:
    """Where the settings say the PEM files are."""

    cert: Path
    key: Path
    client_ca: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)


@dataclass(frozen=True)
class _Pems:
    """What was in them, checked to belong together."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Credentials of a gRPC port; None where the settings name no certificate.

    Raises ValueError for files that are missing, malformed or of two different keys.
    """
    files = _files(settings)
    if files is None:
        return None

    def read() -> tuple[grpc.ServerCertificateConfiguration, datetime]:
        pems = _read(files)
        pair = [(pems.key, pems.cert)]
        return grpc.ssl_server_certificate_configuration(pair, pems.client_ca), pems.expires

    watched = _watched(files, read)
    # gRPC asks before every handshake, on a thread of its own.
    return grpc.dynamic_ssl_server_credentials(
        watched.now()[0], lambda: watched.now()[0], files.client_ca is not None
    )


def http_ssl(settings: Settings) -> ssl.SSLContext | None:
    """The same for an HTTP listener of this process: a context that hands every handshake to the newest one."""
    files = _files(settings)
    if files is None:
        return None
    watched = _watched(files, lambda: _context(files))
    outer, _ = _context(files)

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = watched.now()[0]

    outer.sni_callback = renew  # called for every handshake, also of callers that send no name
    return outer


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """The names in a gRPC caller's verified certificate, a space between them; "" where there is none.

    The alternative names, or the common name where there are none of them (RFC 6125).
    """
    names = auth_context.get("x509_subject_alternative_name") or auth_context.get("x509_common_name") or ()
    return _sane(name.decode("utf-8", "replace") for name in names)


def peer_of_http(connection: ssl.SSLObject | None) -> str:
    """The same of an HTTP connection; None is one without TLS."""
    found = connection.getpeercert() if connection is not None else None
    if not found:
        return ""
    alternative: tuple[tuple[str, str], ...] = found.get("subjectAltName", ())  # type: ignore[assignment]
    subject: tuple[tuple[tuple[str, str], ...], ...] = found.get("subject", ())  # type: ignore[assignment]
    common = (value for part in subject for key, value in part if key == "commonName")
    return _sane(value for _, value in alternative) if alternative else _sane(common)


def _sane(names: Iterable[str]) -> str:
    return " ".join(name for name in names if _NAME.fullmatch(name))


def _files(settings: Settings) -> _Files | None:
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is not None and key is not None:
        return _Files(cert, key, client_ca)
    if cert is None and key is None and client_ca is None:
        return None
    given = {"NLU_TLS_CERT": cert, "NLU_TLS_KEY": key, "NLU_TLS_CLIENT_CA": client_ca}
    missing = " and ".join(name for name in ("NLU_TLS_CERT", "NLU_TLS_KEY") if given[name] is None)
    set_ = " and ".join(name for name, path in given.items() if path is not None)
    raise ValueError(f"{missing}: found nothing beside {set_}, expected both files; set it, or unset {set_}")


def _watched(files: _Files, read: Callable[[], tuple[T, datetime]]) -> Watched[tuple[T, datetime]]:
    watched = Watched("tls", files.paths, read)
    metrics.TLS_EXPIRES.set_function(lambda: watched.now()[1].timestamp())
    return watched


def _context(files: _Files) -> tuple[ssl.SSLContext, datetime]:
    pems = _read(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.cert, files.key)
    if pems.client_ca is not None:
        # A session that is taken up again is not verified again, and would outlive a change of the client CA. 1.3 does
        # without where no tickets are given; 1.2 cannot be told to.
        context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
        context.load_verify_locations(cadata=pems.client_ca.decode("ascii"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context, pems.expires


def _read(files: _Files) -> _Pems:
    """Raises ValueError; a certificate that has expired, or is not valid yet, is taken with a warning."""
    cert_pem, key_pem = _bytes("NLU_TLS_CERT", files.cert), _bytes("NLU_TLS_KEY", files.key)
    client_ca = None if files.client_ca is None else _bytes("NLU_TLS_CLIENT_CA", files.client_ca)
    certificate = _certificates("NLU_TLS_CERT", files.cert, cert_pem)[0]
    if client_ca is not None and files.client_ca is not None:
        _certificates("NLU_TLS_CLIENT_CA", files.client_ca, client_ca)
    if _public_key(files.key, key_pem) != certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    ):
        raise ValueError(
            f"NLU_TLS_KEY: found a key of another certificate in {files.key}, expected that of the first in {files.cert}; "
            "set both to files of one pair"
        )
    _warn(files.cert, certificate)
    return _Pems(cert_pem, key_pem, client_ca, certificate.not_valid_after_utc)


def _warn(path: Path, certificate: x509.Certificate) -> None:
    now, since, until = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not since <= now <= until:
        logger.warning(
            "NLU_TLS_CERT: found a certificate valid from %s until %s in %s, expected one valid now; "
            "callers that verify will refuse this server until the file is renewed",
            since.isoformat(),
            until.isoformat(),
            path,
        )


def _bytes(variable: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise ValueError(
            f"{variable}: found nothing to read at {path} ({error.strerror}), expected a PEM file; mount it there, "
            "readable for this process"
        ) from error
    if len(found) > _FILE_LIMIT:
        raise ValueError(
            f"{variable}: found more than {_FILE_LIMIT} bytes in {path}, expected a PEM file; mount that"
        )
    return found


def _certificates(variable: str, path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(
            f"{variable}: found no certificate in {path}, expected PEM (-----BEGIN CERTIFICATE-----); mount that"
        ) from error


def _public_key(path: Path, pem: bytes) -> bytes:
    """The public half, in DER. What the parser says of a key is not repeated."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        found = "a key behind a password" if isinstance(error, TypeError) else "no private key"
        raise ValueError(
            f"NLU_TLS_KEY: found {found} in {path}, expected PEM (-----BEGIN PRIVATE KEY-----) without a password; "
            "mount that"
        ) from None
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
