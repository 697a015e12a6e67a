"""The flow of docs/tls-and-callers.md, from outside: whoever should not come in does not, at a real server, and whoever
should does. Every refusal stands beside the same call made rightly."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nlu import callers, metrics
from nlu.rpc import SERVICE
from nlu.serve import running
from nlu.settings import Settings
from nlu.v1 import control_pb2
from nlu.v1 import nlu_pb2 as pb
from tests.conftest import free_port
from tests.nlu.test_main import nlu
from tests.pki import Pair, authority, issue, tls_settings
from tests.tiny import Made

CA, OTHER_CA = authority(), authority("another authority")
TURN = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="play music")]).SerializeToString()
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name


@asynccontextmanager
async def served(made: Made, settings: Settings | None = None, **more: Any) -> AsyncIterator[int]:
    base = settings or Settings(port=0, metrics=False)
    async with running(base.model_copy(update={"bundle": made.bundle.path, **more})) as port:
        yield port


async def knock(
    channel: grpc.aio.Channel, *, token: str = "", method: str = f"/{SERVICE}/Understand", raw: bytes = TURN
) -> tuple[StatusCode, dict[str, str]]:
    """One call, and how it ended."""
    shown = (("authorization", f"Bearer {token}"),) if token else ()
    call = channel.unary_unary(method, request_serializer=None, response_deserializer=None)(
        raw, metadata=shown, timeout=10
    )
    return await call.code(), {name: str(value) for name, value in await call.trailing_metadata() or ()}


def plain(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}")


def secure(port: int, mine: Pair | None = None, *, trusted: Pair = CA) -> grpc.aio.Channel:
    shown = (None, None) if mine is None else (mine.key_pem, mine.cert_pem)
    return grpc.aio.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(trusted.cert_pem, *shown)
    )


def counted(code: StatusCode, caller: str = "") -> float:
    labels = {"code": code.name} | ({"caller": caller} if caller else {"method": "Understand"})
    name = "nlu_caller_calls_total" if caller else "nlu_calls_total"
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "callers.toml"


async def test_doors_are_closed_to_no_token_and_to_a_wrong_one(tiny: Made, book: Path) -> None:
    token = callers.add(book, "dialogs")
    before = counted(StatusCode.UNAUTHENTICATED), counted(StatusCode.OK, "dialogs")
    async with served(tiny, callers=book) as port, plain(port) as channel:
        for wrong in ("", "wrong", callers.new_token()[0], token[:-1], token.upper()):
            assert (await knock(channel, token=wrong))[0] is StatusCode.UNAUTHENTICATED
        assert (await knock(channel, token=token))[0] is StatusCode.OK
    assert counted(StatusCode.UNAUTHENTICATED) == before[0] + 5
    assert counted(StatusCode.OK, "dialogs") == before[1] + 1


async def test_doors_of_every_method_are_closed(tiny: Made, book: Path) -> None:
    token = callers.add(book, "dialogs")
    async with served(tiny, callers=book) as port, plain(port) as channel:
        for method in ("Understand", "UnderstandBatch", "Encode", "Describe"):
            assert (await knock(channel, method=f"/{SERVICE}/{method}"))[0] is StatusCode.UNAUTHENTICATED
            assert (await knock(channel, method=f"/{SERVICE}/{method}", token=token))[
                0
            ] is not StatusCode.UNAUTHENTICATED
        stream = channel.stream_stream(
            f"/{SERVICE}/UnderstandStream", request_serializer=None, response_deserializer=None
        )
        answers = [pb.Outcome.FromString(answer) async for answer in stream(iter([TURN, TURN]))]
    assert [answer.problem.code for answer in answers] == [StatusCode.UNAUTHENTICATED.value[0]] * 2


async def test_doors_open_to_a_caller_for_its_methods_only(tiny: Made, book: Path) -> None:
    token, sha256 = callers.new_token()
    book.write_text(f'[vectors]\nsha256 = ["{sha256}"]\nmethods = ["Encode"]\n')
    encode = pb.EncodeRequest(texts=["hello"]).SerializeToString()
    async with served(tiny, callers=book) as port, plain(port) as channel:
        assert (await knock(channel, token=token))[0] is StatusCode.PERMISSION_DENIED
        code, _ = await knock(channel, token=token, method=f"/{SERVICE}/Encode", raw=encode)
    assert code is StatusCode.OK


async def test_doors_close_to_a_caller_over_its_rate_and_to_no_other(tiny: Made, book: Path) -> None:
    greedy, modest = callers.add(book, "greedy", rate=1, burst=3), callers.add(book, "modest")
    async with served(tiny, callers=book) as port, plain(port) as channel:
        ended = [await knock(channel, token=greedy) for _ in range(8)]
        assert (await knock(channel, token=modest))[0] is StatusCode.OK
    codes = [code for code, _ in ended]
    assert codes[:3] == [StatusCode.OK] * 3 and codes.count(StatusCode.RESOURCE_EXHAUSTED) >= 4
    pauses = [int(back["grpc-retry-pushback-ms"]) for code, back in ended if code is not StatusCode.OK]
    assert all(1 <= pause <= 1000 for pause in pauses)


async def test_doors_with_a_lock_take_no_wrong_certificate(tiny: Made, tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    async with served(tiny, settings) as port:
        async with secure(port, issue(CA, "dm.prod.example")) as channel:
            assert (await knock(channel))[0] is StatusCode.OK
        for wrong in (None, issue(OTHER_CA, "dm.prod.example"), issue(CA, "dm.prod.example", days=-1)):
            async with secure(port, wrong) as channel:
                assert (await knock(channel))[0] is StatusCode.UNAVAILABLE
        async with plain(port) as channel:
            assert (await knock(channel))[0] is StatusCode.UNAVAILABLE


async def test_doors_show_a_certificate_that_callers_may_refuse(tiny: Made, tmp_path: Path) -> None:
    for server, trusted in (
        (issue(CA, "localhost", days=-1), CA),
        (issue(CA, "elsewhere"), CA),
        (issue(CA, "localhost"), OTHER_CA),
    ):
        async with (
            served(tiny, tls_settings(tmp_path, server)) as port,
            secure(port, trusted=trusted) as channel,
        ):
            assert (await knock(channel))[0] is StatusCode.UNAVAILABLE
    async with served(tiny, tls_settings(tmp_path, issue(CA, "localhost"))) as port, secure(port) as channel:
        assert (await knock(channel))[0] is StatusCode.OK


async def test_doors_without_tls_do_not_speak_it(tiny: Made) -> None:
    async with served(tiny) as port:
        async with secure(port) as channel:
            assert (await knock(channel))[0] is StatusCode.UNAVAILABLE
        async with plain(port) as channel:
            assert (await knock(channel))[0] is StatusCode.OK


async def test_doors_know_a_caller_by_its_certificate(tiny: Made, tmp_path: Path, book: Path) -> None:
    book.write_text('[dialogs]\ncertificates = ["dm.prod.example"]\nrate = 1000\n')
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    before = counted(StatusCode.OK, "dialogs")
    async with served(tiny, settings, callers=book) as port:
        async with secure(port, issue(CA, "dm.prod.example")) as channel:
            assert (await knock(channel))[0] is StatusCode.OK
            assert (await knock(channel, token="wrong"))[0] is StatusCode.UNAUTHENTICATED
        async with secure(port, issue(CA, "other.prod.example")) as channel:
            assert (await knock(channel))[0] is StatusCode.UNAUTHENTICATED
    assert counted(StatusCode.OK, "dialogs") == before + 1


async def test_doors_forge_no_certificate_with_metadata(tiny: Made, book: Path) -> None:
    book.write_text('[dialogs]\ncertificates = ["dm.prod.example"]\n')
    forged = [
        (name, "dm.prod.example")
        for name in ("peer", "x509_common_name", "x-forwarded-client-cert", "x-ssl-cn")
    ]
    async with served(tiny, callers=book) as port, plain(port) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/Understand", request_serializer=None, response_deserializer=None
        )
        assert await call(TURN, metadata=forged).code() is StatusCode.UNAUTHENTICATED


async def test_doors_to_the_public_have_no_control_behind_them(tiny: Made, tmp_path: Path) -> None:
    async with served(tiny, control=f"unix:{tmp_path}/control.sock") as port, plain(port) as channel:
        for method in ("Swap", "State"):
            code, _ = await knock(channel, method=f"/{CONTROL}/{method}", raw=b"")
            assert code is StatusCode.UNIMPLEMENTED
        for path in ("/metrics", "/nlu.v1.Nlu/Swap", "/nlu.v1.Control/"):
            assert (await knock(channel, method=path, raw=b""))[0] is StatusCode.UNIMPLEMENTED
        assert (await knock(channel))[0] is StatusCode.OK


@pytest.mark.parametrize("reflection", [True, False])
async def test_doors_tell_the_schema_where_they_are_told_to(tiny: Made, reflection: bool) -> None:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    async with served(tiny, reflection=reflection) as port, plain(port) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        if reflection:
            services = [service.name for service in (await answers.read()).list_services_response.service]
            assert SERVICE in services and CONTROL not in services
        else:
            assert await answers.code() is StatusCode.UNIMPLEMENTED


async def test_doors_let_probes_ask_for_health_without_a_token(tiny: Made, book: Path) -> None:
    callers.add(book, "dialogs")
    async with served(tiny, callers=book) as port, plain(port) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            await health.Check(health_pb2.HealthCheckRequest())
        ).status == health_pb2.HealthCheckResponse.SERVING


async def test_doors_over_http_are_the_same(tiny: Made, tmp_path: Path, book: Path) -> None:
    token = callers.add(book, "dialogs", rate=1, burst=2)
    settings = tls_settings(tmp_path, issue(CA, "localhost"))
    port = free_port()
    async with served(tiny, settings, callers=book, http_port=port):
        answers = [await post(port, given) for given in ("", "wrong", token, token, token)]
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await post(port, token, secured=False)
    assert [status for status, _ in answers] == [401, 401, 200, 200, 429]
    assert all(b"play music" not in body for status, body in answers if status != 200)


async def post(port: int, token: str, *, secured: bool = True) -> tuple[int, bytes]:
    """One POST of /v1/understand, as bytes on a socket."""
    context = ssl.create_default_context(cadata=CA.cert_pem.decode()) if secured else None
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    body = json.dumps({"hypotheses": [{"text": "play music"}]})
    head = f"POST /v1/understand HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    shown = f"Authorization: Bearer {token}\r\n" if token else ""
    writer.write(f"{head}{shown}Connection: close\r\n\r\n{body}".encode())
    try:
        status = await reader.readuntil(b"\r\n")
        return int(status.split()[1]), await reader.read()
    finally:
        writer.close()


async def test_doors_open_to_the_command_line(tiny: Made, tmp_path: Path, book: Path) -> None:
    token = callers.add(book, "me")
    mine, key = issue(CA, "me.example").write(tmp_path, "mine")
    settings = tls_settings(tmp_path, issue(CA, "localhost"), client_ca=CA)
    door = ["--ca", str(tmp_path / "clients.pem"), "--cert", str(mine), "--key", str(key)]

    def say(*more: str, ok: bool = True, env: dict[str, str] | None = None) -> str:
        done = nlu("say", "play music", "--json", *more, cwd=tmp_path, ok=ok, env=env)
        return done.stdout if ok else done.stderr

    async with served(tiny, settings, callers=book) as port:
        target = ("--target", f"localhost:{port}")
        answer = json.loads(await asyncio.to_thread(say, *target, *door, env={"NLU_TOKEN": token}))
        assert answer["phrase"] == "play music"
        assert "UNAUTHENTICATED" in await asyncio.to_thread(say, *target, *door, ok=False)
        assert "UNAVAILABLE" in await asyncio.to_thread(say, *target, *door[:2], "--token", token, ok=False)
        assert "--key together" in await asyncio.to_thread(say, *target, *door[:4], ok=False)
        described = await asyncio.to_thread(
            lambda: nlu("describe", "--json", *target, *door, "--token", token, cwd=tmp_path).stdout
        )
        assert json.loads(described)["versions"]["bundle"] == tiny.bundle.digest
