"""Every door that must stay closed, tried from outside against a running server; and each one's key, which must open it."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.chaos.rig import Server, free_port
from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import SERVICE, make_toys, request
from benchmarks.result import at_least, at_most
from nlu import callers, parts
from nlu.v1 import control_pb2
from nlu.v1.control_pb2_grpc import ControlStub
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import build
from tests.tiny import CREATED

HOST = "localhost"


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority of this run."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(_pem(self._sign(self._name, self._key, days=30, authority=True)))

    def issue(self, name: str, *, days: int = 30) -> Pair:
        """A certificate for localhost; with negative days one that has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pair.cert.write_bytes(_pem(self._sign(subject, key, days=days, authority=False)))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        pair.key.chmod(0o600)
        return pair

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int, authority: bool
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())


def run(section: Section) -> None:
    """All of them."""
    rig = section.rig
    toy = make_toys(rig.work / "toys")[0]
    bundle = build(parts.collect(toy.folder), rig.work / "bundle", created=CREATED, requires_service=SERVICE)
    ours, theirs = Authority(rig.work, "ours"), Authority(rig.work, "theirs")
    site, caller = ours.issue("site"), ours.issue("caller")
    book = rig.work / "callers.toml"
    token = callers.add(book, "dialog")
    slow = callers.add(book, "slow", rate=1, burst=1)
    http = free_port()
    server = rig.serve(
        "doors", bundle=bundle.path, tls_cert=site.cert, tls_key=site.key, tls_client_ca=ours.cert, callers=book,
        http_port=http, reflection=False, core=None,
    )  # fmt: skip
    _wait(server, ours.cert, caller)
    good = _channel(server, ours.cert, caller)
    tried: dict[str, tuple[Callable[[], str], str]] = {
        "right certificate and token": (lambda: _call(good, token), "OK"),
        "no token": (lambda: _call(good, ""), "UNAUTHENTICATED"),
        "wrong token": (lambda: _call(good, "nlu_" + "x" * 43), "UNAUTHENTICATED"),
        "over its rate": (lambda: [_call(good, slow), _call(good, slow)][1], "RESOURCE_EXHAUSTED"),
        "no certificate": (lambda: _call(_channel(server, ours.cert, None), token), "UNAVAILABLE"),
        "certificate of a stranger": (
            lambda: _call(_channel(server, ours.cert, theirs.issue("stranger")), token),
            "UNAVAILABLE",
        ),
        "expired certificate": (
            lambda: _call(_channel(server, ours.cert, ours.issue("late", days=-1)), token),
            "UNAVAILABLE",
        ),
        "server of a stranger's authority": (
            lambda: _call(_channel(server, theirs.cert, caller), token),
            "UNAVAILABLE",
        ),
        "plain text to the TLS port": (lambda: _call(_plain(server), token), "UNAVAILABLE"),
        "TLS 1.1": (lambda: _old_tls(server), "refused"),
        "control on the public port": (lambda: _control(good, token), "UNIMPLEMENTED"),
        "control by its own socket": (lambda: _control(grpc.insecure_channel(server.control)), "OK"),
        "control: a path for a digest": (
            lambda: _control(grpc.insecure_channel(server.control), digest="../../etc/passwd"),
            "INVALID_ARGUMENT",
        ),
        "control socket's mode": (lambda: oct(_socket(server).stat().st_mode & 0o077), "0o0"),
        "reflection when it is off": (lambda: _reflection(good, token), "UNIMPLEMENTED"),
        "metrics on the public port": (
            lambda: _http(f"https://{HOST}:{server.port}/metrics", ours.cert, caller),
            "refused",
        ),
        "HTTP with certificate and token": (
            lambda: _http(f"https://{HOST}:{http}/v1/describe", ours.cert, caller, token),
            "200",
        ),
        "HTTP without a token": (
            lambda: _http(f"https://{HOST}:{http}/v1/describe", ours.cert, caller),
            "401",
        ),
        "HTTP without a certificate": (
            lambda: _http(f"https://{HOST}:{http}/v1/describe", ours.cert, None),
            "refused",
        ),
        "HTTP in plain text": (
            lambda: _http(f"http://{HOST}:{http}/v1/describe", ours.cert, None),
            "refused",
        ),
    }
    wrong = 0
    for name, (attempt, expected) in tried.items():
        found = attempt()
        if found != expected:
            wrong += 1
            section.say(f"{name}: {found}, expected {expected}")
    refused = _public_control(section, bundle.path)
    section.figures["doors"] = float(len(tried) + 1)
    section.bars += [
        at_least("doors tried", len(tried) + 1, 20),
        at_most(
            "doors that opened to the wrong key, or stayed closed to the right one", wrong + (not refused), 0
        ),
    ]
    server.process.end()


def _public_control(section: Section, bundle: Path) -> bool:
    """A control service on TCP without certificates: the server must not even start."""
    server = section.rig.serve("open-control", bundle=bundle, control=f"127.0.0.1:{free_port()}", core=None)
    status = server.process.popen.wait(60)
    section.say(server.process.says().strip().splitlines()[-1][:200])
    return status == 1


def _wait(server: Server, authority: Path, caller: Pair) -> None:
    grpc.channel_ready_future(_channel(server, authority, caller)).result(60)
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(_channel(server, authority, caller))
    for answer in stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=60):
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return


def _channel(server: Server, authority: Path, caller: Pair | None) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        authority.read_bytes(),
        caller.key.read_bytes() if caller else None,
        caller.cert.read_bytes() if caller else None,
    )
    return grpc.secure_channel(f"{HOST}:{server.port}", credentials, options=(("grpc.enable_retries", 0),))


def _plain(server: Server) -> grpc.Channel:
    return grpc.insecure_channel(server.target, options=(("grpc.enable_retries", 0),))


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _call(channel: grpc.Channel, token: str) -> str:
    try:
        NluStub(channel).Understand(request("hello"), timeout=5, metadata=_metadata(token))  # type: ignore[no-untyped-call]
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)


def _control(channel: grpc.Channel, token: str = "", *, digest: str | None = None) -> str:
    stub = ControlStub(channel)  # type: ignore[no-untyped-call]
    try:
        if digest is None:
            stub.State(control_pb2.StateRequest(), timeout=5, metadata=_metadata(token))
        else:
            stub.Swap(control_pb2.SwapRequest(digest=digest), timeout=5)
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)


def _reflection(channel: grpc.Channel, token: str) -> str:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    try:
        next(stub.ServerReflectionInfo(asked, timeout=5, metadata=_metadata(token)))
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)


def _socket(server: Server) -> Path:
    return Path(server.control.removeprefix("unix:"))


def _old_tls(server: Server) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    try:
        with (
            socket.create_connection(("127.0.0.1", server.port), 5) as plain,
            context.wrap_socket(plain) as secure,
        ):
            return str(secure.version())
    except (ssl.SSLError, OSError):
        return "refused"


def _http(url: str, authority: Path, caller: Pair | None, token: str = "") -> str:
    context = ssl.create_default_context(cafile=str(authority))
    if caller is not None:
        context.load_cert_chain(caller.cert, caller.key)
    asked = urllib.request.Request(url, headers=dict(_metadata(token)))
    try:
        with urllib.request.urlopen(
            asked, timeout=5, context=context if url.startswith("https") else None
        ) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError:
        return "refused"
    except Exception as error:  # http.client raises what is no OSError for an answer that is not HTTP
        return (
            "refused" if "HTTP" in type(error).__name__ or "Status" in type(error).__name__ else repr(error)
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
