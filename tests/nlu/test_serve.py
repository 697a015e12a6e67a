"""nlu.serve: one process' listeners, from HOLDING to the last accepted call, and what a swap leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nlu import metrics, shadow
from nlu.errors import EngineRefused
from nlu.heads import lifecycle
from nlu.rpc import SERVICE
from nlu.serve import Server
from nlu.settings import Settings
from nlu.types import Release
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle
from tests.nlu.test_shadow import contrary
from tests.test_one_utterance import turn
from tests.tiny import Made

Status = health_pb2.HealthCheckResponse


@asynccontextmanager
async def listening(**settings: object) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server that has just begun to listen, and a channel to it."""
    server = Server(Settings(port=0, metrics=False, **settings))  # type: ignore[arg-type]
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, channel
    finally:
        await server.drain()


def stub_of(channel: grpc.aio.Channel) -> NluStub:
    return NluStub(channel)  # type: ignore[no-untyped-call]


async def swap(server: Server, bundle: Bundle) -> None:
    await server.prepare(bundle)
    await server.flip()


async def health(channel: grpc.aio.Channel, name: str) -> int:
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(reply.status)


async def refusal(channel: grpc.aio.Channel) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub_of(channel).Understand(turn("stop"))
    return refused.value.code(), str(refused.value.details())


async def test_serve_holds_until_the_first_flip_and_says_so(tiny: Made) -> None:
    async with listening() as (server, channel):
        code, text = await refusal(channel)
        assert code is grpc.StatusCode.UNAVAILABLE and "no bundle" in text
        names = ("", SERVICE, "ready", "live")
        assert [await health(channel, name) for name in names] == [Status.NOT_SERVING] * 3 + [Status.SERVING]
        server.tell(Release(state="HOLDING", reason="the store is gone"))
        description = await stub_of(channel).Describe(pb.DescribeRequest())
        assert (description.release.state, description.release.reason) == ("HOLDING", "the store is gone")
        await server.prepare(tiny.bundle)
        assert (await refusal(channel))[0] is grpc.StatusCode.UNAVAILABLE
        await server.flip()
        assert [await health(channel, name) for name in names] == [Status.SERVING] * 4
        reply = await stub_of(channel).Understand(turn("stop"))
        assert reply.versions.bundle == tiny.bundle.digest


async def test_serve_component_that_went_is_not_serving_and_its_watcher_hears_it(
    tiny: Made, tmp_path: Path
) -> None:
    less = lifecycle.remove(tiny.bundle, "topic", tmp_path / "less")
    async with listening() as (server, channel):
        await swap(server, tiny.bundle)
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="head/topic"))
        assert (await watch.read()).status == Status.SERVING
        await swap(server, less)
        assert (await watch.read()).status == Status.NOT_SERVING
        assert await health(channel, "head/intent") == Status.SERVING
        watch.cancel()


async def test_serve_flips_at_the_moment_that_was_named(tiny: Made, stranger: Made) -> None:
    loop = asyncio.get_running_loop()
    async with listening() as (server, channel):
        await swap(server, tiny.bundle)
        await server.prepare(stranger.bundle)
        at = loop.time() + 0.3
        flipping = asyncio.create_task(server.flip(at))
        seen = []
        while not flipping.done():
            began = loop.time()
            reply = await stub_of(channel).Understand(turn("hello"))
            seen.append((reply.versions.bundle, began, loop.time()))
        await flipping
    assert all(ended >= at for bundle, _, ended in seen if bundle == stranger.bundle.digest)
    assert all(began <= at + 0.25 for bundle, began, _ in seen if bundle == tiny.bundle.digest)
    assert {bundle for bundle, _, _ in seen} == {tiny.bundle.digest, stranger.bundle.digest}


async def test_serve_refused_load_leaves_what_serves_and_can_be_followed_by_a_good_one(
    tiny: Made, stranger: Made, tmp_path: Path
) -> None:
    bad = shuffled(stranger, tmp_path)
    async with listening() as (server, channel):
        await swap(server, tiny.bundle)
        with pytest.raises(EngineRefused):
            await server.prepare(bad)
        await server.abandon()
        reply = await stub_of(channel).Understand(turn("stop"))
        assert reply.versions.bundle == tiny.bundle.digest
        with pytest.raises(RuntimeError, match="nothing is prepared"):
            await server.flip()
        await swap(server, stranger.bundle)


def shuffled(made: Made, folder: Path) -> Bundle:
    """A bundle whose digests are honest and whose head does not answer its own golden phrases."""
    import json
    import shutil

    from nlu import parts
    from statics.bundle import build

    copy = shutil.copytree(made.parts, folder / "shuffled")
    spec = json.loads((copy / "head.intent" / "head.json").read_bytes())
    labels = spec["labels"]
    (copy / "head.intent" / "head.json").write_text(json.dumps(spec | {"labels": labels[1:] + labels[:1]}))
    return build(
        parts.collect(copy), folder / "bad", channel="test", seq=9, requires_service=">=0.1.0.dev0,<1"
    )


async def test_serve_flip_frees_the_engine_before(tiny: Made, stranger: Made) -> None:
    async with listening() as (server, channel):
        await swap(server, tiny.bundle)
        engine = weakref.ref(server.desk.pipeline.engine)  # type: ignore[union-attr]
        await stub_of(channel).Understand(turn("stop"))
        assert engine() is not None
        await swap(server, stranger.bundle)
        assert engine() is None


async def test_serve_control_an_engine_that_somebody_holds_is_not_freed(tiny: Made, stranger: Made) -> None:
    async with listening() as (server, _):
        await swap(server, tiny.bundle)
        pipeline = server.desk.pipeline
        assert pipeline is not None
        engine = weakref.ref(pipeline.engine)
        await swap(server, stranger.bundle)
        assert engine() is pipeline.engine


async def test_serve_abandoned_load_is_freed(tiny: Made) -> None:
    async with listening() as (server, _):
        await server.prepare(tiny.bundle)
        assert server._prepared is not None
        engine = weakref.ref(server._prepared.engine)
        assert engine() is not None
        await server.abandon()
        assert engine() is None


def grown(objects: int) -> int:
    gc.collect()
    return len(gc.get_objects()) - objects


async def test_serve_swaps_leave_nothing_behind(tiny: Made, stranger: Made) -> None:
    """Objects and file descriptors; what memory does is for the chaos benchmark, which has minutes for it."""
    from nlu.drift import TALLY

    async with listening() as (server, channel):

        async def swaps(count: int) -> None:
            for _ in range(count):
                for made in (tiny, stranger):
                    await swap(server, made.bundle)
                    await stub_of(channel).Understand(turn("stop"))
            TALLY.read()

        await swaps(3)
        gc.collect()
        objects, files = len(gc.get_objects()), len(os.listdir("/proc/self/fd"))
        await swaps(10)
        assert grown(objects) < 200
        assert len(os.listdir("/proc/self/fd")) - files < 3
        kept: list[list[object]] = [
            [] for _ in range(300)
        ]  # the control: a leak of 15 objects a swap is seen
        assert grown(objects) >= 200
        del kept


async def test_serve_metrics_tell_of_one_bundle_at_a_time(tiny: Made, stranger: Made) -> None:
    async with listening() as (server, _):
        await swap(server, tiny.bundle)
        await swap(server, stranger.bundle)
    family = next(found for found in metrics.REGISTRY.collect() if found.name == "nlu_serving_info")
    assert [sample.labels["bundle"] for sample in family.samples] == [stranger.bundle.digest]


async def test_serve_keeps_encodings_and_the_sample_over_a_swap(tiny: Made, tmp_path: Path) -> None:
    """Heads change, the vectorizer stays: what was encoded before is known after."""
    head = contrary(tiny, tmp_path / "run")
    shadowed = lifecycle.shadow(tiny.bundle, head, tmp_path / "shadowed")
    sample = tmp_path / "flips.jsonl"
    async with listening(shadow_sample=sample) as (server, channel):
        await swap(server, tiny.bundle)
        assert not sample.exists()
        first = await stub_of(channel).Understand(turn("wake me at noon"))
        await swap(server, shadowed)
        second = await stub_of(channel).Understand(turn("wake me at noon"))
        await swap(server, tiny.bundle)
        await swap(server, shadowed)
        await stub_of(channel).Understand(turn("wake me at six"))
    assert (first.source, second.source) == (pb.SOURCE_MODEL, pb.SOURCE_LRU)
    assert len(list(shadow._stored(sample))) == 2


async def test_serve_drain_answers_what_was_accepted_and_refuses_what_comes_later(tiny: Made) -> None:
    async with listening(workers=1, queue_s=60, linger_s=0.3) as (server, channel):
        await swap(server, tiny.bundle)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert (await watch.read()).status == Status.SERVING
        stub = stub_of(channel)
        calls = [stub.Understand(turn(f"play number {number}")) for number in range(50)]
        draining = asyncio.create_task(server.drain())
        assert (await watch.read()).status == Status.NOT_SERVING
        assert await health(channel, "live") == Status.SERVING
        late = await stub.Understand(turn("stop"))  # the platform has not noticed yet
        assert late.versions.bundle == tiny.bundle.digest
        answers = await asyncio.gather(*calls)
        await draining
        assert len(answers) == 50
        assert (await refusal(channel))[0] is grpc.StatusCode.UNAVAILABLE


async def test_serve_refuses_a_port_that_is_taken(tiny: Made) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(Settings(metrics=False), port=taken.getsockname()[1])
        with pytest.raises(OSError, match=r"taken.*--port"):
            await server.start()
        await server.drain()


async def test_serve_reflection_can_be_turned_off(tiny: Made) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    for on, code in ((True, None), (False, grpc.StatusCode.UNIMPLEMENTED)):
        async with listening(reflection=on) as (_, channel):
            call = channel.stream_stream(method, bytes, bytes)(iter([b"\x3a\x00"]))
            if code is None:
                assert await call.read()
                call.cancel()
                continue
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is code


async def test_serve_http_listens_beside_grpc_at_the_same_desk(tiny: Made) -> None:
    async with listening(http_port=0) as (server, _):
        assert server.http_port
        assert (await fetched(server.http_port, "/health/ready"))[0] == 503
        assert (await fetched(server.http_port, "/health/live"))[0] == 200
        await swap(server, tiny.bundle)
        assert (await fetched(server.http_port, "/health/ready"))[0] == 200
        status, body = await fetched(server.http_port, "/v1/describe")
        assert status == 200 and tiny.bundle.digest in body


async def fetched(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


@pytest.mark.parametrize("held", [False, True], ids=["freed", "control"])
async def test_serve_frees_a_replaced_engine_without_a_collection(
    tiny: Made, stranger: Made, held: bool
) -> None:
    """A collection would hold every call up for milliseconds, so nothing of an engine may be part of a cycle."""
    async with listening() as (server, channel):
        await swap(server, tiny.bundle)
        await NluStub(channel).Understand(turn("hello"))  # type: ignore[no-untyped-call]
        pipeline = server.desk.pipeline
        assert pipeline is not None and pipeline.engine.replies is not None
        engine = pipeline.engine
        parts = (engine, engine.vectorizer, engine.fleet, engine.replies, engine.cold, pipeline)
        watched = [weakref.ref(part) for part in parts]
        kept = pipeline if held else None
        del pipeline, engine, parts
        gc.collect()
        gc.disable()
        try:
            await swap(server, stranger.bundle)
            assert any(part() is not None for part in watched) is held
        finally:
            gc.enable()
        del kept
