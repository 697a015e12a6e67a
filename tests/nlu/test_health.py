"""nlu.health: statuses over a real channel, and watchers that cannot hold anything up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nlu import health
from nlu.health import Health

Response = health_pb2.HealthCheckResponse


@asynccontextmanager
async def checked(kept: Health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(None)


def asked(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


async def test_health_check_tells_the_status_of_a_name_and_of_a_stranger_nothing() -> None:
    kept = Health()
    kept.set(("", "ready"), False)
    async with checked(kept) as stub:
        assert (await stub.Check(asked("ready"))).status == Response.NOT_SERVING
        kept.set(("ready",), True)
        assert (await stub.Check(asked("ready"))).status == Response.SERVING
        assert (await stub.Check(asked(""))).status == Response.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(asked("stranger"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_watch_tells_changes_and_of_a_name_that_comes_later() -> None:
    kept = Health()
    async with checked(kept) as stub:
        watch = stub.Watch(asked("head/intent"))
        assert (await watch.read()).status == Response.SERVICE_UNKNOWN
        kept.set(("head/intent",), True)
        assert (await watch.read()).status == Response.SERVING
        kept.set(("other",), True)
        kept.set(("head/intent",), False)
        assert (await watch.read()).status == Response.NOT_SERVING
        watch.cancel()


async def test_health_once_shut_serves_nothing_again_and_lives_on() -> None:
    kept = Health()
    kept.set(("", health.LIVE), True)
    kept.shut()
    kept.set(("", "new"), True)
    assert (kept.serving(""), kept.serving("new"), kept.serving(health.LIVE)) == (False, False, True)


async def test_health_end_lets_watchers_go_so_that_a_server_stops_without_them() -> None:
    kept = Health()
    kept.set(("",), True)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(asked(""))
        assert (await watch.read()).status == Response.SERVING
        stopping = asyncio.create_task(server.stop(60))
        await asyncio.sleep(0.2)
        assert not stopping.done()  # the watcher alone keeps it
        kept.shut()
        kept.end()
        await asyncio.wait_for(stopping, 30)
        assert (await watch.read()).status == Response.NOT_SERVING
        assert not await watch.read()  # the end of the stream


async def test_health_set_does_not_wait_for_watchers_that_do_not_read() -> None:
    kept = Health()
    kept.set(("",), True)
    async with checked(kept) as stub:
        watches = [stub.Watch(asked("")) for _ in range(3)]
        await asyncio.gather(*(watch.read() for watch in watches))
        for turn in range(20_000):
            kept.set(("",), bool(turn % 2))
            await asyncio.sleep(0)
        assert (await stub.Check(asked(""))).status == Response.SERVING
        for watch in watches:
            watch.cancel()


async def test_health_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 1)
    kept = Health()
    kept.set(("",), True)
    async with checked(kept) as stub:
        first = stub.Watch(asked(""))
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Watch(asked("")).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
