"""Traces, for who asks for them: OpenTelemetry's own gRPC instrumentation, and the stages of one utterance beneath it.

Switched off (no NLU_OTLP) nothing of it is loaded and a call pays one comparison. Switched on, spans leave
in batches from a thread of their own; what a dead collector cannot take is dropped. No span has a text in it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from annotators.annotator import Encoding
from nlu.settings import Settings
from nlu.types import Reply
from statics.version import service_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

Value = str | int | tuple[str, ...]

SERVICE = "nlu.v1.Nlu"  # whose calls are traced: health checks are not
_STAGES = ("normalize", "encode", "annotate", "search", "rank")
_EXPORT_S = (
    2.0  # for one batch, tries and all; a process that stops waits so long for a collector that is gone
)
_ENDPOINT = re.compile(r"https?://[^/\s]+")

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def interceptors(settings: Settings) -> list[Any]:
    """What a grpc.aio server is given, once a process: nothing, or the interceptor that follows a caller's traceparent.

    Raises ValueError for an address that is none, and where the otel extra is not installed.
    """
    global _provider, _tracer
    if not settings.otlp:
        return []
    if not _ENDPOINT.fullmatch(settings.otlp):
        raise ValueError(
            f"NLU_OTLP: found {settings.otlp!r}, expected http://host:4317; set it to the collector's"
        )
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ValueError(
            f"NLU_OTLP: found no module {error.name}, expected the 'otel' extra; pip install 'chorus-nlu[otel]'"
        ) from error
    # Resource.create also takes OTEL_RESOURCE_ATTRIBUTES, and the provider OTEL_TRACES_SAMPLER.
    of_us = {"service.name": "chorus-nlu", "service.version": str(service_version())}
    _provider = TracerProvider(resource=Resource.create(of_us))
    _provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp, timeout=_EXPORT_S))
    )
    _tracer = _provider.get_tracer("nlu")
    return [aio_server_interceptor(_provider, filters.service_name(SERVICE))]  # type: ignore[no-untyped-call]


def close() -> None:
    """Send what has not been sent, and stop. A process that ends without it does so on its way out."""
    global _provider, _tracer
    if _provider is not None:
        _provider.shutdown()
    _provider = _tracer = None


@contextmanager
def request(path: str, headers: Mapping[str, str]) -> Iterator[None]:
    """The span of one HTTP request, beneath the caller's where a traceparent names one; `path` is one of our own."""
    if _tracer is None:
        yield
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(
        path, extract(headers), SpanKind.SERVER, {"url.path": path}, record_exception=False
    ):
        yield


def understood(reply: Reply, encoding: Encoding) -> None:
    """The spans of an utterance that has just been answered; the Encoding is that of its best reading."""
    if _tracer is None:
        return
    facts: dict[str, Value] = {
        "nlu.source": reply.source.value,
        "nlu.tokens": 0 if encoding.offsets is None else len(encoding.offsets),
        "nlu.skipped": reply.skipped,
        "nlu.bundle": reply.versions.bundle,
    }
    _record(_tracer, reply, facts)


def _record(tracer: Tracer, reply: Reply, facts: Mapping[str, Value]) -> None:
    from opentelemetry.trace import set_span_in_context

    timings = reply.timings
    ended = time.time_ns()
    began = ended - timings.total
    whole = tracer.start_span("understand", start_time=began, attributes=facts)
    within = set_span_in_context(whole)
    for stage in _STAGES:
        span = tracer.start_span(stage, within, start_time=began)
        began += getattr(timings, stage)
        span.end(began)
    whole.end(ended)
