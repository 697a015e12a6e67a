"""Admission, refusals and health over a real channel: every bad input is the caller's error, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from annotators.annotator import Encoding
from nlu import metrics, wire
from nlu.desk import Desk
from nlu.rpc import MAX_MESSAGE_BYTES, MAX_STREAMS, SERVICE, server_options
from nlu.serve import health_names, running
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import Vectorizer
from tests.test_one_utterance import serving, turn
from tests.tiny import Made

UNDERSTAND = f"/{SERVICE}/Understand"
STOP = turn("stop").SerializeToString()
COMBINING_BOMB = "a" + "\u0300\u0323" * 200

BAD = {
    "no hypothesis": pb.UnderstandRequest(),
    "empty": turn(""),
    "spaces": turn(" \t\n"),
    "punctuation": turn("?!..."),
    "invisible": turn("\u200b\u2060\ufeff"),
    "long": turn("word " * 1000),
    "one megabyte": turn("a" * 10**6),
    "combining bomb": turn(COMBINING_BOMB),
    "unknown annotator": turn("stop", annotators=["intent", "nonsense"]),
    "unknown persona": turn("stop", persona="nobody"),
    "unknown surface": turn("stop", surface="nowhere"),
    "ten thousand hypotheses": pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="stop")] * 10_000),
    "eleven hypotheses": pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="stop")] * 11),
    "NaN confidence": pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="stop", confidence=float("nan"))]),
    "infinite confidence": pb.UnderstandRequest(
        hypotheses=[pb.Hypothesis(text="stop", confidence=float("inf"))]
    ),
    "confidence over one": pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="stop", confidence=1.5)]),
    "turn without role": turn("stop", context=[pb.Turn(text="hello")]),
    "too many turns": turn("stop", context=[pb.Turn(role=pb.ROLE_USER, text="hello")] * 17),
    "too many replies": turn("stop", retrieval=pb.Retrieval(top_k=1000)),
    "clock out of range": turn("stop", as_of={"seconds": 1 << 60}),
    "endless request id": turn("stop", request_id="x" * 1000),
}
RAW = {
    "invalid UTF-8": b"\x12\x04\x0a\x02\xff\xfe",
    "lone surrogate": b"\x12\x05\x0a\x03\xed\xa0\x80",
    "overlong NUL": b"\x12\x04\x0a\x02\xc0\x80",
    "truncated": turn("stop now").SerializeToString()[:-3],
    "garbage": b"\xff" * 40,
}


def bare(channel: grpc.aio.Channel) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    """Understand without stubs, so that any bytes can be sent."""
    return channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)


async def code_of(call: grpc.aio.UnaryUnaryCall[bytes, bytes]) -> tuple[StatusCode, str]:
    """How a call ended."""
    return await call.code(), await call.details() or ""


@pytest.mark.parametrize("what", [*BAD, *RAW])
async def test_rpc_bad_input_is_the_callers_error(tiny: Made, what: str) -> None:
    raw = RAW[what] if what in RAW else BAD[what].SerializeToString()
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        code, details = await code_of(bare(channel)(raw))
        good, _ = await code_of(bare(channel)(turn("stop").SerializeToString()))
    assert code is StatusCode.INVALID_ARGUMENT, details
    assert "found" in details and "expected" in details
    assert "_pb2" not in details and "Traceback" not in details
    assert good is StatusCode.OK


async def test_rpc_bad_input_never_disturbs_others(tiny: Made) -> None:
    """All the bad requests at once, good ones between them: each gets its own answer."""
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    bad = [*RAW.values(), *(request.SerializeToString() for request in BAD.values())]
    good = turn("play music").SerializeToString()
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = bare(channel)
        ended = await asyncio.gather(
            *(code_of(call(raw)) for pair in ((item, good) for item in bad) for raw in pair)
        )
    codes = [code for code, _ in ended]
    assert set(codes[0::2]) == {StatusCode.INVALID_ARGUMENT}
    assert set(codes[1::2]) == {StatusCode.OK}


async def test_rpc_message_beyond_the_transports_limit_is_refused(tiny: Made) -> None:
    async with serving(tiny) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Understand(turn("a" * (MAX_MESSAGE_BYTES + 1)))
        assert (await stub.Understand(turn("stop"))).phrase == "stop"
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED


class _Slow(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """A call waits on its way to the handler, longer than a deadline that the transport rounds up to a millisecond."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        await asyncio.sleep(0.05)
        return await continuation(details)


async def test_rpc_late_call_costs_no_compute(tiny: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc.aio, "server", partial(grpc.aio.server, interceptors=[_Slow()]))
    async with serving(tiny) as stub:
        before = _computed()
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Understand(turn("nobody waits for this"), timeout=1e-6)
        assert late.value.code() is StatusCode.DEADLINE_EXCEEDED
        await stub.Understand(turn("somebody waits for this"), timeout=30)
        assert _computed() == before + 1


def _computed() -> float:
    value = metrics.REGISTRY.get_sample_value("nlu_phrases_total", {"fate": "computed"})
    assert value is not None
    return value


class Held:
    """Holds the model, from when it is told to until released, so that a queue can be filled for certain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self.released.set()
        self.hold = self.released.clear
        real = Vectorizer.encode

        def encode(self_: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
            if threading.current_thread().name.startswith("encode"):
                self.released.wait(10)
            return real(self_, phrases, tokens=tokens)

        monkeypatch.setattr(Vectorizer, "encode", encode)


async def test_rpc_full_queue_refuses_at_once_with_a_pause(
    tiny: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """workers + queue calls are taken on, exactly the rest are refused, and all taken on are answered."""
    held = Held(monkeypatch)
    async with serving(tiny, workers=1, queue=4, max_deadline_s=30, deadline_s=30) as stub:
        held.hold()
        first = stub.Understand(turn("held phrase"))
        await asyncio.sleep(0.1)  # the worker has it
        rest = [stub.Understand(turn(f"phrase number {i}")) for i in range(10)]
        refused = [call for call in rest if (await _settled(call))]
        held.released.set()
        assert await first.code() is StatusCode.OK
        codes = [await call.code() for call in rest]
    assert len(refused) == 6
    assert codes.count(StatusCode.OK) == 4
    for call in refused:
        assert await call.code() is StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1


async def _settled(call: grpc.aio.UnaryUnaryCall[pb.UnderstandRequest, pb.UnderstandReply]) -> bool:
    """Whether a call ends while the model is held."""
    done, _ = await asyncio.wait([asyncio.ensure_future(call.code())], timeout=0.3)
    return bool(done)


async def test_rpc_too_many_calls_are_refused(tiny: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    async with serving(tiny, in_flight=3, deadline_s=30, max_deadline_s=30) as stub:
        held.hold()
        calls = [stub.Understand(turn(f"phrase number {i}")) for i in range(5)]
        settled = [await _settled(call) for call in calls]
        held.released.set()
        codes = [await call.code() for call in calls]
    assert settled.count(True) == 2
    assert sorted(code.name for code in codes) == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 2


async def test_rpc_accepted_calls_finish_while_draining(tiny: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False, deadline_s=30, max_deadline_s=30)
    async with contextlib.AsyncExitStack() as client:
        async with running(settings) as port:
            channel = await client.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            held.hold()
            accepted = bare(channel)(turn("still on its way").SerializeToString())
            await asyncio.sleep(0.1)
            asyncio.get_running_loop().call_later(0.2, held.released.set)
        # The server is gone now, and left nobody behind.
        assert await accepted.code() is StatusCode.OK


async def test_rpc_health_knows_every_part_and_no_other(tiny: Made) -> None:
    from nlu import loading

    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        names = health_names(loading.load(tiny.bundle))
        states = [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names]
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="head/nonsense"))
    assert "head/intent" in names and SERVICE in names and "" in names
    assert set(states) == {health_pb2.HealthCheckResponse.SERVING}
    assert unknown.value.code() is StatusCode.NOT_FOUND


async def test_rpc_reflection_lists_the_service(tiny: Made) -> None:
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_rpc_largest_legal_batch_is_answered(tiny: Made) -> None:
    """What the transport takes must not be less than what we promise to take."""
    text = "я" * 512
    whole = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=text)] * 10)
    request = pb.UnderstandBatchRequest(requests=[whole] * wire.MAX_BATCH)
    assert MAX_MESSAGE_BYTES > wire.MAX_BATCH_REQUEST_BYTES > request.ByteSize() > 300_000
    async with serving(tiny) as stub:
        reply = await stub.UnderstandBatch(request)
    assert [outcome.problem.message for outcome in reply.outcomes if outcome.HasField("problem")] == []


@pytest.mark.parametrize("beyond", [wire.MAX_BATCH_REQUEST_BYTES, MAX_MESSAGE_BYTES - 100])
async def test_rpc_between_our_limit_and_the_transports_the_words_are_ours(tiny: Made, beyond: int) -> None:
    async with serving(tiny) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.UnderstandBatch(pb.UnderstandBatchRequest(requests=[turn("a" * beyond)]))
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert "expected at most" in (refused.value.details() or "")


@pytest.mark.parametrize(
    "path", ["//nlu.v1.Nlu/Understand", "/nlu.v1.Nlu//Understand", "/nlu.v1.Nlu/Understand/"]
)
async def test_rpc_methods_have_one_name_only(tiny: Made, path: str) -> None:
    """A proxy that allows some methods goes by their names."""
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name, code in ((path, StatusCode.UNIMPLEMENTED), (UNDERSTAND, StatusCode.OK)):
            call = channel.unary_unary(name, request_serializer=None, response_deserializer=None)
            assert (await code_of(call(STOP)))[0] is code


async def test_rpc_stream_answers_item_by_item(tiny: Made) -> None:
    async with serving(tiny) as stub:
        said = [turn("stop", request_id="a"), turn("", request_id="b"), turn("lamp on", request_id="c")]
        outcomes = [outcome async for outcome in stub.UnderstandStream(iter(said))]
    assert [outcome.request_id for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome.WhichOneof("result") for outcome in outcomes] == ["reply", "problem", "reply"]


@pytest.mark.parametrize(
    ("burst", "codes"), [(200, {StatusCode.OK}), (600, {StatusCode.OK, StatusCode.UNAVAILABLE})]
)
async def test_rpc_one_connection_cannot_have_all_the_room(
    tiny: Made, monkeypatch: pytest.MonkeyPatch, burst: int, codes: set[StatusCode]
) -> None:
    held = Held(monkeypatch)
    patient = {"deadline_s": 60, "max_deadline_s": 60, "queue_s": 60, "queue": 1000}
    async with serving(tiny, in_flight=1000, **patient) as stub:
        held.hold()
        await stub.Understand(turn("stop"))
        calls = [stub.Understand(turn(f"phrase number {i}")) for i in range(burst)]
        await asyncio.sleep(0.7)
        assert _in_flight() == min(burst, MAX_STREAMS)
        held.released.set()
        assert {await call.code() for call in calls} <= codes
        assert _in_flight() == 0


def _in_flight() -> float:
    value = metrics.REGISTRY.get_sample_value("nlu_in_flight")
    assert value is not None
    return value


async def test_rpc_who_pings_too_often_is_sent_away_and_nobody_else(tiny: Made) -> None:
    """A second channel of this process is another connection."""
    rude = (
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    )
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as polite:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=rude) as channel:
            assert await bare(channel)(STOP).code() is StatusCode.OK
            stream = channel.stream_stream(
                f"/{SERVICE}/UnderstandStream", request_serializer=None, response_deserializer=None
            )
            call = stream(None)
            with pytest.raises(grpc.aio.AioRpcError) as away:
                await call.read()
            assert away.value.details() == "Too many pings"
        assert await bare(polite)(STOP).code() is StatusCode.OK


def impatient(port: int, ready: threading.Event, go: threading.Event) -> list[StatusCode]:
    """One call, and when told so twenty at once that wait no longer than a fifth of a second."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)
        codes = [call.with_call(STOP)[1].code()]
        ready.set()
        go.wait(20)
        waiting = [call.future(STOP, timeout=0.2) for _ in range(20)]
        return codes + [one.code() for one in waiting]


@pytest.mark.parametrize("heard", [True, False], ids=["counted", "control"])
async def test_rpc_calls_that_end_before_they_begin_are_counted(
    tiny: Made, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """The event loop comes to them when their callers are gone; without _Arrival nobody would know of them."""
    if not heard:
        monkeypatch.setattr(Desk, "gone", lambda self, method: None)
    ready, go = threading.Event(), threading.Event()
    settings = Settings(bundle=tiny.bundle.path, port=0, metrics=False)
    async with running(settings) as port:
        before = _counted()
        calls = asyncio.create_task(asyncio.to_thread(impatient, port, ready, go))
        await asyncio.to_thread(ready.wait, 20)
        go.set()
        time.sleep(0.8)
        codes = await calls
        await asyncio.sleep(0.2)
        counted = _counted() - before
    assert codes == [StatusCode.OK] + [StatusCode.DEADLINE_EXCEEDED] * 20
    assert (counted == 21) == heard
    assert counted <= 21


def _counted() -> int:
    """Calls by all codes."""
    return sum(
        int(sample.value)
        for family in metrics.CALLS.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )


async def test_rpc_a_port_is_shared_only_where_that_is_asked(tiny: Made) -> None:
    shared = [grpc.aio.server(options=server_options(reuse_port=True)) for _ in range(2)]
    port = shared[0].add_insecure_port("127.0.0.1:0")
    assert shared[1].add_insecure_port(f"127.0.0.1:{port}") == port
    alone = grpc.aio.server(options=server_options())
    with pytest.raises(RuntimeError):
        alone.add_insecure_port(f"127.0.0.1:{port}")
    for server in (*shared, alone):
        await server.stop(None)


async def test_rpc_batch_larger_than_the_limit_is_refused(tiny: Made) -> None:
    async with serving(tiny) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.UnderstandBatch(
                pb.UnderstandBatchRequest(requests=[turn("stop")] * (wire.MAX_BATCH + 1))
            )
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
