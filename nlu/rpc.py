"""The gRPC servicer: admission, deadline, and the one mapping from our errors to status codes.

Requests arrive as raw bytes and are parsed in the handler: gRPC's own parser answers bad UTF-8 with UNKNOWN and class
names, and its message limit answers a large request with RESOURCE_EXHAUSTED; both are the caller's INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import grpc
from grpc import StatusCode
from grpc.aio import ServicerContext

from nlu import metrics, wire
from nlu.errors import Draining, InvalidInput, NluError, Overloaded, TooLate
from nlu.pipeline import Pipeline
from nlu.v1 import nlu_pb2 as pb

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Nlu"].full_name

# Above our own cap, so that a request between the two is refused in our words, and below what could hurt.
MAX_MESSAGE_BYTES = 4 * 2**20

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a coin toss between two servers
)

_CODES: tuple[tuple[type[Exception], StatusCode], ...] = (
    (InvalidInput, StatusCode.INVALID_ARGUMENT),
    (Overloaded, StatusCode.RESOURCE_EXHAUSTED),
    (TooLate, StatusCode.DEADLINE_EXCEEDED),
    (Draining, StatusCode.UNAVAILABLE),
)

_ANSWER_OVERHEAD = 200  # bytes of Python objects around a kept answer

Context = ServicerContext[bytes, bytes]
Answer = Callable[[bytes, float], Awaitable[bytes]]


def status_of(error: Exception) -> tuple[StatusCode, str]:
    """The status code and the text a caller may see; what we did not foresee says nothing of our insides."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, NluError):
        return StatusCode.INTERNAL, str(error)
    return StatusCode.INTERNAL, "an error on our side; the server's log has it"


class NluServicer:
    """One server's handlers. `pipeline` is the reference a new bundle replaces; a call reads it once."""

    def __init__(
        self, pipeline: Pipeline, *, in_flight: int, deadline_s: float, max_deadline_s: float
    ) -> None:
        self.pipeline = pipeline
        self.draining = False
        self._limit, self._deadline_s, self._max_deadline_s = in_flight, deadline_s, max_deadline_s
        self._in_flight = 0

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What a grpc.aio server is given."""
        unary = {
            "Understand": self._understand,
            "UnderstandBatch": self._understand_batch,
            "Encode": self._encode,
            "Describe": self._describe,
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(name, answer))
            for name, answer in unary.items()
        }
        methods["UnderstandStream"] = grpc.stream_stream_rpc_method_handler(self._understand_stream)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    @property
    def in_flight(self) -> int:
        """Calls being handled now."""
        return self._in_flight

    def _unary(self, method: str, answer: Answer) -> Callable[[bytes, Context], Awaitable[bytes]]:
        seconds = metrics.CALL_SECONDS.labels(method)
        succeeded = metrics.CALLS.labels(method, StatusCode.OK.name)

        async def handle(raw: bytes, context: Context) -> bytes:
            began = time.monotonic()
            try:
                deadline = self._admit(context, began)
                self._in_flight += 1
                try:
                    reply = await answer(raw, deadline)
                finally:
                    self._in_flight -= 1
            except asyncio.CancelledError:
                metrics.CALLS.labels(method, StatusCode.CANCELLED.name).inc()
                raise
            except Exception as error:
                code, text = status_of(error)
                if code is StatusCode.INTERNAL:
                    logger.error("%s failed", method, exc_info=error)
                metrics.CALLS.labels(method, code.name).inc()
                await context.abort(code, text, _pushback(error))
            seconds.observe(time.monotonic() - began)
            succeeded.inc()
            return reply

        return handle

    def _admit(self, context: Context, now: float) -> float:
        """The deadline of a call we take on, in time.monotonic() seconds; raises for one we do not."""
        if self.draining:
            raise Draining("this server is stopping; call another")
        if self._in_flight >= self._limit:
            raise Overloaded(f"{self._limit} calls are being handled already", retry_after_ms=50)
        remaining = context.time_remaining()
        if remaining is None or not math.isfinite(remaining):
            remaining = self._deadline_s
        if remaining <= 0:
            raise TooLate("the deadline passed before the call arrived")
        return now + min(remaining, self._max_deadline_s)

    async def _understand(self, raw: bytes, deadline: float) -> bytes:
        return await self._one(wire.parse(pb.UnderstandRequest(), raw), self.pipeline, deadline)

    async def _one(self, request: pb.UnderstandRequest, pipeline: Pipeline, deadline: float) -> bytes:
        """One turn's reply, serialised; a question this engine was asked before is answered from memory."""
        began = time.perf_counter_ns()
        # One reading of the clock for the question and for its answer, so that no answer is kept under another moment.
        as_of = wire.clock(request) or datetime.now(UTC)
        answers = pipeline.answers
        question = b"" if answers is None else wire.question(request, pipeline.moment(as_of))
        kept = None if answers is None else answers.get(question)
        if kept is not None:
            metrics.KNOWN.inc()
            return wire.given_again(kept, request.request_id, time.perf_counter_ns() - began)
        utterance = wire.utterance(request, as_of=as_of)
        reply = await pipeline.understand(utterance, deadline=deadline)
        message = wire.reply_message(reply, utterance)
        keepable = None if answers is None or not reply.searched else wire.keepable(message)
        if answers is not None and keepable is not None:
            answers.put(question, keepable, len(question) + len(keepable) + _ANSWER_OVERHEAD)
        return message.SerializeToString()

    async def _outcome(
        self, request: pb.UnderstandRequest, pipeline: Pipeline, deadline: float
    ) -> pb.Outcome:
        """A reply, or the problem this one item had."""
        try:
            reply = pb.UnderstandReply.FromString(await self._one(request, pipeline, deadline))
            return pb.Outcome(request_id=request.request_id, reply=reply)
        except Exception as error:
            code, text = status_of(error)
            if code is StatusCode.INTERNAL:
                logger.error("an item of a batch or stream failed", exc_info=error)
            problem = pb.Problem(code=code.value[0], message=text)
            return pb.Outcome(request_id=request.request_id, problem=problem)

    async def _understand_batch(self, raw: bytes, deadline: float) -> bytes:
        batch = wire.parse(pb.UnderstandBatchRequest(), raw, limit=wire.MAX_BATCH_REQUEST_BYTES)
        if not 1 <= len(batch.requests) <= wire.MAX_BATCH:
            raise InvalidInput(
                "requests",
                found=str(len(batch.requests)),
                expected=f"1 to {wire.MAX_BATCH}",
                remedy="split the batch",
            )
        pipeline = self.pipeline
        outcomes = await asyncio.gather(
            *(self._outcome(request, pipeline, deadline) for request in batch.requests)
        )
        return pb.UnderstandBatchReply(outcomes=outcomes).SerializeToString()

    async def _understand_stream(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Each item has the default deadline of its own; the stream lives as long as the caller keeps it."""
        async for raw in requests:
            began = time.monotonic()
            try:
                if self.draining:
                    raise Draining("this server is stopping; call another")
                request = wire.parse(pb.UnderstandRequest(), raw)
            except (InvalidInput, Draining) as error:
                code, text = status_of(error)
                outcome = pb.Outcome(problem=pb.Problem(code=code.value[0], message=text))
            else:
                outcome = await self._outcome(request, self.pipeline, began + self._deadline_s)
            metrics.CALL_SECONDS.labels("UnderstandStream").observe(time.monotonic() - began)
            yield outcome.SerializeToString()

    async def _encode(self, raw: bytes, deadline: float) -> bytes:
        request, pipeline = wire.parse(pb.EncodeRequest(), raw), self.pipeline
        encoded = await pipeline.encode(wire.texts(request), tokens=request.tokens, deadline=deadline)
        vectorizer = pipeline.engine.vectorizer
        return pb.EncodeReply(
            vectors=[wire.vectors_message(*found, request.precision) for found in encoded],
            dim=vectorizer.dim,
            token_dim=vectorizer.token_dim,
            versions=wire.versions_message(pipeline.engine.versions),
        ).SerializeToString()

    async def _describe(self, raw: bytes, deadline: float) -> bytes:
        wire.parse(pb.DescribeRequest(), raw)
        return wire.describe_message(self.pipeline.engine.describe()).SerializeToString()


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """How long a gRPC client should wait before it tries again (gRFC A6)."""
    if isinstance(error, Overloaded):
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
