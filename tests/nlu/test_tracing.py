"""nlu.tracing against a real collector: a gRPC server that speaks OTLP and keeps what it is sent."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from nlu import tracing
from nlu.rpc import SERVICE
from nlu.serve import running
from nlu.settings import Settings
from tests.conftest import free_port
from tests.nlu.test_logs import CANARY, call, turn
from tests.tiny import Made

STAGES = ("normalize", "encode", "annotate", "search", "rank")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(service_grpc.TraceServiceServicer):
    """What an operator's collector is to us."""

    def __init__(self) -> None:
        self.requests: list[service_pb.ExportTraceServiceRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        service_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: service_pb.ExportTraceServiceRequest, context: Any) -> Any:
        self.requests.append(request)
        return service_pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[trace_pb2.Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> trace_pb2.Span:
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    def stop(self) -> None:
        self._server.stop(0)


@asynccontextmanager
async def traced(made: Made, otlp: str, **settings: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A server; once it is gone, everything it had to tell has been sent."""
    chosen = Settings(bundle=made.bundle.path, port=0, metrics=False, otlp=otlp, **settings)
    try:
        async with running(chosen) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        tracing.close()


def attributes(span: trace_pb2.Span) -> dict[str, Any]:
    return {
        pair.key: [value.string_value for value in pair.value.array_value.values]
        if pair.value.HasField("array_value")
        else getattr(pair.value, pair.value.WhichOneof("value") or "")
        for pair in span.attributes
    }


async def test_tracing_follows_the_callers_trace_down_to_the_stages(tiny: Made) -> None:
    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        sent = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        assert (await call(channel, turn("wake me at six"), metadata=sent))[0] is StatusCode.OK
    collector.stop()
    of_the_call, whole = collector.named(f"/{SERVICE}/Understand"), collector.named("understand")
    assert (of_the_call.trace_id.hex(), of_the_call.parent_span_id.hex()) == (TRACE, PARENT)
    assert whole.parent_span_id == of_the_call.span_id
    found = attributes(whole)
    assert found["nlu.source"] == "model" and found["nlu.tokens"] == 4 and found["nlu.skipped"] == []
    assert found["nlu.bundle"] == tiny.bundle.digest
    stages = [collector.named(stage) for stage in STAGES]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert all(stage.parent_span_id == whole.span_id for stage in stages)
    edges = [whole.start_time_unix_nano, *(stage.end_time_unix_nano for stage in stages)]
    assert [stage.start_time_unix_nano for stage in stages] == edges[:-1]
    assert edges[-1] == whole.end_time_unix_nano
    assert of_the_call.start_time_unix_nano <= edges[0] < edges[-1] <= of_the_call.end_time_unix_nano
    resource = {
        pair.key: pair.value.string_value
        for pair in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "chorus-nlu" and resource["service.version"]


async def test_tracing_begins_a_trace_where_the_caller_has_none(tiny: Made) -> None:
    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        await call(channel, turn("play music"))
    collector.stop()
    of_the_call = collector.named(f"/{SERVICE}/Understand")
    assert len(of_the_call.trace_id) == 16 and not of_the_call.parent_span_id
    assert collector.named("understand").trace_id == of_the_call.trace_id


async def test_tracing_follows_http_too(tiny: Made) -> None:
    collector, port = Collector(), free_port()
    body = json.dumps({"hypotheses": [{"text": CANARY}]})
    async with traced(tiny, collector.url, http_port=port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST /v1/understand HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"traceparent: 00-{TRACE}-{PARENT}-01\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
    collector.stop()
    of_the_call, whole = collector.named("/v1/understand"), collector.named("understand")
    assert (of_the_call.trace_id.hex(), of_the_call.parent_span_id.hex()) == (TRACE, PARENT)
    assert whole.parent_span_id == of_the_call.span_id
    assert CANARY.encode() not in b"".join(request.SerializeToString() for request in collector.requests)


async def test_tracing_leaves_out_what_the_caller_does_not_sample(tiny: Made) -> None:
    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        await call(channel, turn("play music"), metadata=(("traceparent", f"00-{TRACE}-{PARENT}-00"),))
    collector.stop()
    assert collector.spans == []


async def test_tracing_has_no_text_in_it_and_tells_failures(tiny: Made) -> None:
    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        stream = channel.stream_stream(
            f"/{SERVICE}/UnderstandStream", request_serializer=None, response_deserializer=None
        )
        assert len([answer async for answer in stream(iter([turn(CANARY), turn("?!"), b"\xff"]))]) == 3
        for raw in (turn(CANARY), turn(f"{CANARY} " * 500), b"\xff" + CANARY.encode()):
            await call(channel, raw)
        await call(channel, turn(CANARY), timeout=1e-6)
    collector.stop()
    assert CANARY.encode() not in b"".join(request.SerializeToString() for request in collector.requests)
    codes = [attributes(span).get("rpc.grpc.status_code") for span in collector.spans]
    assert codes.count(StatusCode.INVALID_ARGUMENT.value[0]) == 2


async def test_tracing_cancelled_stream_ends_its_span(tiny: Made, caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        stream = channel.stream_stream(
            f"/{SERVICE}/UnderstandStream", request_serializer=None, response_deserializer=None
        )
        held = asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            yield turn("play music")
            await held.wait()

        under_way = stream(requests())
        await under_way.read()
        under_way.cancel()
        assert (await call(channel, turn("hello")))[0] is StatusCode.OK
    collector.stop()
    assert collector.named(f"/{SERVICE}/UnderstandStream").end_time_unix_nano
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


async def test_tracing_health_checks_are_not_traced(tiny: Made) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    collector = Collector()
    async with traced(tiny, collector.url) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        await call(channel, turn("hello"))
    collector.stop()
    assert {span.name for span in collector.spans if "/" in span.name} == {f"/{SERVICE}/Understand"}


async def test_tracing_dead_collector_costs_no_call(tiny: Made) -> None:
    async with traced(tiny, f"http://127.0.0.1:{free_port()}") as channel:
        codes = [(await call(channel, turn(f"phrase number {number}")))[0] for number in range(20)]
    assert set(codes) == {StatusCode.OK}


def test_tracing_off_loads_no_exporter_and_adds_no_interceptor() -> None:
    assert tracing.interceptors(Settings()) == []
    program = "import json, sys\nimport nlu.serve\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "nlu.tracing" in loaded
    # redis-py loads the API and the metrics where they are installed; traces and exporters nobody does
    heavy = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.instrumentation")
    assert [name for name in loaded if name.startswith(heavy)] == []


@pytest.mark.parametrize("otlp", ["collector:4317", "ftp://collector", "http://", "http://a b:1"])
def test_tracing_refuses_what_is_no_address(otlp: str) -> None:
    with pytest.raises(ValueError, match="NLU_OTLP: found .*expected http"):
        tracing.interceptors(Settings(otlp=otlp))


def test_tracing_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'chorus-nlu\[otel\]'"):
        tracing.interceptors(Settings(otlp="http://collector:4317"))
