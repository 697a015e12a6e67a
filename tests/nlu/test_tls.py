"""nlu.tls against real handshakes: which certificate is shown, who is let in, and what a change of files does."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from nlu import metrics, tls, watched
from nlu.settings import Settings
from tests.pki import Pair, authority, issue, tls_settings

WHO = "/test.Doors/Who"
CA = authority()
OTHER_CA = authority("another authority")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are seen by the next handshake."""
    monkeypatch.setattr(watched, "LOOK_S", 0.0)


@asynccontextmanager
async def grpc_listener(settings: Settings) -> AsyncIterator[int]:
    """A server that answers with the names in its caller's certificate."""
    server = grpc.aio.server()

    async def who(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return tls.peer_of(context.auth_context()).encode()

    methods = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Doors", methods),))
    credentials = tls.server_credentials(settings)
    assert credentials is not None
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def http_listener(settings: Settings) -> AsyncIterator[int]:
    """The same over a bare asyncio server: a line with the names."""

    async def who(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(tls.peer_of_http(writer.get_extra_info("ssl_object")).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(who, "127.0.0.1", 0, ssl=tls.http_ssl(settings))
    async with server:
        yield server.sockets[0].getsockname()[1]


async def ask_grpc(port: int, trusted: Pair, mine: Pair | None = None) -> str:
    """What the gRPC server calls us; AioRpcError where the handshake fails."""
    credentials = grpc.ssl_channel_credentials(
        trusted.cert_pem, None if mine is None else mine.key_pem, None if mine is None else mine.cert_pem
    )
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        call = channel.unary_unary(WHO, request_serializer=None, response_deserializer=None)
        answer: bytes = await call(b"", timeout=5)
        return answer.decode()


async def ask_http(port: int, trusted: Pair, mine: Pair | None = None, *, folder: Path | None = None) -> str:
    """What the HTTP side calls us; OSError where the handshake fails."""
    context = ssl.create_default_context(cadata=trusted.cert_pem.decode())
    if mine is not None and folder is not None:
        context.load_cert_chain(*mine.write(folder, "mine"))
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        line = await reader.readline()
    finally:
        writer.close()
    if not line:
        raise ConnectionResetError("the server hung up")
    return line.decode().strip()


def shown(port: int, *, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """The certificate a listener shows just now, in PEM, to a client that speaks no newer TLS than this."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if most < ssl.TLSVersion.TLSv1_2:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("ALL:@SECLEVEL=0")
    context.maximum_version = most
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            return ssl.DER_cert_to_PEM_cert(secure.getpeercert(True) or b"").encode()


LISTENERS = {"grpc": grpc_listener, "http": http_listener}


@pytest.mark.parametrize("kind", LISTENERS)
async def test_tls_new_certificate_is_shown_without_a_restart(tmp_path: Path, kind: str) -> None:
    first, second = issue(CA, "localhost"), issue(CA, "localhost", days=9)
    settings = tls_settings(tmp_path, first)
    async with LISTENERS[kind](settings) as port:
        assert await asyncio.to_thread(shown, port) == first.cert_pem
        assert metrics.TLS_EXPIRES.collect()
        second.write(tmp_path, "server")
        assert await asyncio.to_thread(shown, port) == second.cert_pem
        expires = metrics.REGISTRY.get_sample_value("nlu_tls_expires_timestamp_seconds")
    assert expires == second.certificate.not_valid_after_utc.timestamp()


async def test_tls_calls_under_way_keep_the_connection_they_were_made_on(tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"))
    async with grpc_listener(settings) as port:
        credentials = grpc.ssl_channel_credentials(CA.cert_pem)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            call = channel.unary_unary(WHO, request_serializer=None, response_deserializer=None)
            assert await call(b"") == b""
            issue(OTHER_CA, "localhost").write(tmp_path, "server")  # one this caller would not trust
            assert await call(b"") == b""
        with pytest.raises(grpc.aio.AioRpcError):
            await ask_grpc(port, CA)
        assert await ask_grpc(port, OTHER_CA) == ""


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("harm", ["another key", "no PEM", "empty", "gone"])
async def test_tls_broken_new_file_keeps_the_old_certificate(
    tmp_path: Path, kind: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = issue(CA, "localhost")
    settings = tls_settings(tmp_path, first)
    async with LISTENERS[kind](settings) as port:
        with caplog.at_level(logging.INFO, logger="nlu.watched"):
            key = tmp_path / "server.key"
            match harm:
                case "another key":
                    key.write_bytes(issue(CA, "localhost").key_pem)
                case "no PEM":
                    key.write_bytes(b"\x00\xff" * 100)
                case "empty":
                    key.write_bytes(b"")
                case "gone":
                    key.unlink()
            for _ in range(3):
                assert await asyncio.to_thread(shown, port) == first.cert_pem
            told = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert len(told) == 1 and "NLU_TLS_KEY: found" in told[0].getMessage()
        second = issue(CA, "localhost")
        second.write(tmp_path, "server")
        assert await asyncio.to_thread(shown, port) == second.cert_pem


async def test_tls_callers_certificate_is_asked_for_and_read_grpc(tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    named = issue(CA, "dm.prod.example", "spiffe://prod/dm", common="ignored beside other names")
    async with grpc_listener(settings) as port:
        assert await ask_grpc(port, CA, named) == "dm.prod.example spiffe://prod/dm"
        assert await ask_grpc(port, CA, issue(CA, common="only-a-common-name")) == "only-a-common-name"
        assert await ask_grpc(port, CA, issue(CA, common="dm.prod.example admin")) == ""  # one name, not two
        for stranger in (None, issue(OTHER_CA, "dm.prod.example"), issue(CA, "dm.prod.example", days=-1)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask_grpc(port, CA, stranger)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_callers_certificate_is_asked_for_and_read_http(tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    named = issue(CA, "dm.prod.example", "spiffe://prod/dm", common="ignored beside other names")
    async with http_listener(settings) as port:
        assert await ask_http(port, CA, named, folder=tmp_path) == "dm.prod.example spiffe://prod/dm"
        common = issue(CA, common="only-a-common-name")
        assert await ask_http(port, CA, common, folder=tmp_path) == "only-a-common-name"
        for stranger in (None, issue(OTHER_CA, "dm.prod.example"), issue(CA, "dm.prod.example", days=-1)):
            with pytest.raises(OSError):
                await ask_http(port, CA, stranger, folder=tmp_path)


async def test_tls_new_client_authority_is_in_force_at_once(tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    ours, theirs = issue(CA, "ours"), issue(OTHER_CA, "theirs")
    async with grpc_listener(settings) as over_grpc, http_listener(settings) as over_http:
        assert (
            await ask_grpc(over_grpc, CA, ours)
            == await ask_http(over_http, CA, ours, folder=tmp_path)
            == "ours"
        )
        (tmp_path / "clients.pem").write_bytes(OTHER_CA.cert_pem)
        assert await ask_grpc(over_grpc, CA, theirs) == "theirs"
        assert await ask_http(over_http, CA, theirs, folder=tmp_path) == "theirs"
        with pytest.raises(grpc.aio.AioRpcError):
            await ask_grpc(over_grpc, CA, ours)
        with pytest.raises(OSError):
            await ask_http(over_http, CA, ours, folder=tmp_path)


async def test_tls_no_session_is_taken_up_without_verifying_its_caller_again(tmp_path: Path) -> None:
    """The control is the same listener without a client CA: there a session may go on, as nobody was verified."""
    mine = issue(CA, "dm.prod.example").write(tmp_path, "mine")

    def twice(port: int, newest: ssl.TLSVersion) -> bool | None:
        context = ssl.create_default_context(cadata=CA.cert_pem.decode())
        context.maximum_version = newest
        context.load_cert_chain(*mine)
        session = None
        for _ in range(2):
            with socket.create_connection(("localhost", port), timeout=5) as plain:
                with context.wrap_socket(plain, server_hostname="localhost", session=session) as secure:
                    secure.recv(1)
                    session, reused = secure.session, secure.session_reused
        return reused

    for client_ca, reused in ((CA, False), (None, True)):
        async with http_listener(tls_settings(tmp_path, issue(CA, "localhost"), client_ca=client_ca)) as port:
            assert await asyncio.to_thread(twice, port, ssl.TLSVersion.TLSv1_3) is reused
            if client_ca is not None:
                with pytest.raises(ssl.SSLError):
                    await asyncio.to_thread(twice, port, ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
async def test_tls_1_2_is_the_oldest(tmp_path: Path, kind: str) -> None:
    """The client would speak 1.1, as a server that takes it shows first."""
    pair = issue(CA, "localhost")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.load_cert_chain(*pair.write(tmp_path, "old"))
    async with await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=old
    ) as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(shown, port, most=ssl.TLSVersion.TLSv1_1) == pair.cert_pem
    async with LISTENERS[kind](tls_settings(tmp_path, pair)) as port:
        assert await asyncio.to_thread(shown, port, most=ssl.TLSVersion.TLSv1_2) == pair.cert_pem
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(shown, port, most=ssl.TLSVersion.TLSv1_1)


async def test_tls_plain_text_is_refused_at_a_tls_port_and_the_other_way_round(tmp_path: Path) -> None:
    async with grpc_listener(tls_settings(tmp_path, issue(CA, "localhost"))) as port:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                call = channel.unary_unary(WHO, request_serializer=None, response_deserializer=None)
                await call(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask_grpc(port, CA)
    await server.stop(0)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_without_files_there_is_none() -> None:
    assert tls.server_credentials(Settings()) is None and tls.http_ssl(Settings()) is None
    assert tls.peer_of({}) == "" and tls.peer_of_http(None) == ""


@pytest.mark.parametrize(
    "given", [("tls_cert",), ("tls_key",), ("tls_client_ca",), ("tls_key", "tls_client_ca")]
)
def test_tls_half_a_configuration_is_refused(tmp_path: Path, given: tuple[str, ...]) -> None:
    pair = issue(CA, "localhost")
    cert, key = pair.write(tmp_path, "server")
    paths = {"tls_cert": cert, "tls_key": key, "tls_client_ca": cert}
    settings = Settings(**{name: paths[name] for name in given})  # type: ignore[arg-type]
    for build in (tls.server_credentials, tls.http_ssl):
        with pytest.raises(ValueError, match="NLU_TLS_.*found nothing beside.*expected.*unset"):
            build(settings)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("server.pem", None, "NLU_TLS_CERT: found nothing to read"),
        ("server.key", None, "NLU_TLS_KEY: found nothing to read"),
        ("clients.pem", None, "NLU_TLS_CLIENT_CA: found nothing to read"),
        ("server.pem", b"no certificate", "NLU_TLS_CERT: found no certificate"),
        ("clients.pem", b"", "NLU_TLS_CLIENT_CA: found no certificate"),
        ("server.key", b"canary-in-a-key", "NLU_TLS_KEY: found no private key"),
        ("server.key", issue(CA).key_pem, "NLU_TLS_KEY: found a key of another certificate"),
        ("server.pem", b"x" * (2**20 + 1), "NLU_TLS_CERT: found more than"),
    ],
)
def test_tls_files_that_cannot_serve_are_refused_at_the_start(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    assert tls.server_credentials(settings) is not None  # as they are, they will do
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for build in (tls.server_credentials, tls.http_ssl):
        with pytest.raises(ValueError, match=f"{told}.*expected.*;") as refused:
            build(settings)
        assert "canary" not in str(refused.value)


def test_tls_key_behind_a_password_is_refused(tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"))
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", "server.key", "-out", "locked.key", "-passout", "pass:secret"],
        cwd=tmp_path,
        check=True,
    )
    os.replace(tmp_path / "locked.key", tmp_path / "server.key")
    with pytest.raises(ValueError, match="a key behind a password"):
        tls.server_credentials(settings)


@pytest.mark.parametrize(("days", "warnings"), [(-1, 1), (1, 0)])
def test_tls_expired_certificate_is_served_with_a_warning_and_a_metric(
    tmp_path: Path, days: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that stops answering would be worse than one whose callers decide for themselves."""
    settings = tls_settings(tmp_path, issue(CA, "localhost", days=days))
    with caplog.at_level(logging.WARNING, logger="nlu.tls"):
        assert tls.server_credentials(settings) is not None
    assert len(caplog.records) == warnings
    expires = metrics.REGISTRY.get_sample_value("nlu_tls_expires_timestamp_seconds")
    assert expires is not None and (expires < time.time()) is bool(warnings)


def test_tls_names_that_could_be_read_as_two_are_no_names() -> None:
    odd = [
        b"good.example",
        b"bad example",
        b"new\nline",
        b"nul\x00",
        b"",
        b"x" * 300,
        b"\xff\xfe",
        b"spiffe://a/b",
    ]
    assert tls.peer_of({"x509_subject_alternative_name": odd}) == "good.example spiffe://a/b"
