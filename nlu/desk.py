"""The desk: where calls come in, whatever the transport. Here a call is taken on or refused, given its deadline, answered
from one pipeline, and counted exactly once.

A transport hands over raw bytes, what is left of the caller's deadline and who calls; it gets bytes back or one of the
errors of nlu/errors.py, which `status_of` translates. Bytes are parsed here and not by the transport: gRPC's own parser
answers bad UTF-8 with UNKNOWN and class names, and whoever is refused at the door is not worth parsing for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from grpc import StatusCode

from nlu import logs, metrics, wire
from nlu.admission import pause_ms
from nlu.callers import Callers
from nlu.errors import (
    Draining,
    Holding,
    InvalidInput,
    NluError,
    NotAllowed,
    Overloaded,
    Stuck,
    TooLate,
    Unauthenticated,
)
from nlu.pipeline import Kept, Pipeline
from nlu.types import Release
from nlu.v1 import nlu_pb2 as pb

logger = logging.getLogger(__name__)

_CODES: tuple[tuple[type[Exception], StatusCode], ...] = (
    (InvalidInput, StatusCode.INVALID_ARGUMENT),
    (Overloaded, StatusCode.RESOURCE_EXHAUSTED),
    (TooLate, StatusCode.DEADLINE_EXCEEDED),
    (Draining, StatusCode.UNAVAILABLE),
    (Holding, StatusCode.UNAVAILABLE),
    (Stuck, StatusCode.UNAVAILABLE),
    (Unauthenticated, StatusCode.UNAUTHENTICATED),
    (NotAllowed, StatusCode.PERMISSION_DENIED),
)

_ANSWER_OVERHEAD = 200  # bytes of Python objects around a kept answer
_FULL_PAUSE_S = (
    0.05  # asked of callers when too many calls are under way; nobody knows how long each of them takes
)


def status_of(error: BaseException) -> tuple[StatusCode, str]:
    """The status code and the text a caller may see; what we did not foresee says nothing of our insides."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, NluError):
        return StatusCode.INTERNAL, str(error)
    return StatusCode.INTERNAL, "an error on our side; the server's log has it"


@dataclass(eq=False, slots=True)
class _Seat:
    """A pipeline, and how many calls use it."""

    pipeline: Pipeline
    calls: int = 0
    replaced: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)  # set when it was replaced and nobody is left

    def leave(self) -> None:
        self.calls -= 1
        if self.replaced and not self.calls:
            self.empty.set()


Read = Callable[[], Awaitable[bytes]]  # a request that is yet to be made of what was sent


class _Call(NamedTuple):
    """What a method needs to know of its call."""

    raw: bytes
    deadline: float  # in time.monotonic() seconds
    caller: str  # "" where nobody is asked who they are


Method = Callable[[_Call, Pipeline], Awaitable[bytes]]


class Desk:
    """One process's. `draining`, `release` and `callers` may be set at any time; the pipeline is changed by `flip`.

    Only the event loop's thread may touch it.
    """

    def __init__(
        self,
        *,
        in_flight: int,
        deadline_s: float,
        max_deadline_s: float,
        callers: Callers | None = None,
    ) -> None:
        self.callers = callers
        self.draining = False
        self.release = Release()
        self.in_flight = 0  # calls being handled now
        self._limit, self._deadline_s, self._max_deadline_s = in_flight, deadline_s, max_deadline_s
        self._seat: _Seat | None = None
        self._methods: dict[str, Method] = {
            "Understand": self._understand,
            "UnderstandStream": self._understand,
            "UnderstandBatch": self._understand_batch,
            "Encode": self._encode,
        }

    @property
    def pipeline(self) -> Pipeline | None:
        """What the next call will use; None while there is nothing to serve."""
        return None if self._seat is None else self._seat.pipeline

    async def flip(self, pipeline: Pipeline | None) -> Pipeline | None:
        """Every call from now on uses this pipeline; the change is made before anything is awaited.

        Returns what served before, once the last call that uses it has ended: then it may be closed.
        """
        before = self._seat
        self._seat = None if pipeline is None else _Seat(pipeline)
        if before is None:
            return None
        before.replaced = True
        if before.calls:
            await before.empty.wait()
        return before.pipeline

    async def answer(
        self,
        method: str,
        raw: bytes | Read,
        *,
        remaining_s: float | None,
        metadata: Mapping[str, str],
        peer: str,
    ) -> bytes:
        """Serialised reply to one serialised request, which may be made once the call is taken on; of an UnderstandStream,
        to one item.

        `remaining_s` is what is left of the caller's deadline, None where there is none; `metadata` and `peer` are for
        Callers.check. Raises the errors of nlu/errors.py.
        """
        began = time.monotonic()
        call = logs.begin(method, metadata)
        try:
            deadline, caller = self._admit(method, metadata, peer, remaining_s, began)
            self.in_flight += 1
            try:
                request = raw if isinstance(raw, bytes) else await raw()
                reply = await self._answer(method, _Call(request, deadline, caller))
            finally:
                self.in_flight -= 1
        except asyncio.CancelledError:
            _count(method, StatusCode.CANCELLED, call.caller)
            logs.ended(call, StatusCode.CANCELLED.name, time.monotonic() - began)
            raise
        except Exception as error:
            code, _ = status_of(error)
            _count(method, code, call.caller)
            logs.ended(call, code.name, time.monotonic() - began, error)
            raise
        seconds = time.monotonic() - began
        metrics.CALL_SECONDS.labels(method).observe(seconds)
        _count(method, StatusCode.OK, caller)
        logs.ended(call, StatusCode.OK.name, seconds)
        return reply

    async def item(self, raw: bytes, *, metadata: Mapping[str, str], peer: str) -> bytes:
        """A serialised Outcome for one item of an UnderstandStream: its reply, or the problem it had.

        Each item has the default deadline of its own; the stream lives as long as the caller keeps it.
        """
        try:
            reply = await self.answer("UnderstandStream", raw, remaining_s=None, metadata=metadata, peer=peer)
        except Exception as error:
            return _problem(_request_id(raw), error).SerializeToString()
        message = pb.UnderstandReply.FromString(reply)
        return pb.Outcome(request_id=message.request_id, reply=message).SerializeToString()

    def knows(self, method: str, *, metadata: Mapping[str, str], peer: str) -> bool:
        """Whether this caller may call this at all: for a transport that would not read what a stranger sends. `answer`
        looks again, and tells and counts those who may not."""
        try:
            if self.callers is not None:
                self.callers.known(metadata, peer, method=method)
        except (Unauthenticated, NotAllowed):
            return False
        return True

    def gone(self, method: str) -> None:
        """A call whose caller was gone before it could be answered."""
        _count(method, StatusCode.CANCELLED, "")

    def _admit(
        self, method: str, metadata: Mapping[str, str], peer: str, remaining_s: float | None, now: float
    ) -> tuple[float, str]:
        """Deadline and caller of a call we take on; raises for one we do not. The cheapest checks come first."""
        if self.draining and method != "Describe":
            metrics.SHED.labels("draining").inc()
            raise Draining("this server is stopping; call another")
        if self.in_flight >= self._limit:
            metrics.SHED.labels("in_flight").inc()
            raise Overloaded(
                f"{self._limit} calls are being handled already", retry_after_ms=pause_ms(_FULL_PAUSE_S)
            )
        caller = "" if self.callers is None else self.callers.check(metadata, peer, method=method)
        if remaining_s is None or not math.isfinite(remaining_s):
            remaining_s = self._deadline_s
        if remaining_s <= 0:
            metrics.SHED.labels("deadline").inc()
            raise TooLate("the deadline passed before the call arrived")
        return now + min(remaining_s, self._max_deadline_s), caller

    async def _answer(self, method: str, call: _Call) -> bytes:
        if method == "Describe":  # the one that says why there is nothing to serve
            return self._describe(call.raw)
        seat = self._seat
        if seat is None:
            metrics.SHED.labels("holding").inc()
            raise Holding("this server has no bundle to serve yet; call another")
        logs.note(bundle=seat.pipeline.engine.versions.bundle)
        seat.calls += 1
        try:
            return await self._methods[method](call, seat.pipeline)
        finally:
            seat.leave()

    async def _understand(self, call: _Call, pipeline: Pipeline) -> bytes:
        return await _one(wire.parse(pb.UnderstandRequest(), call.raw), pipeline, call.deadline)

    async def _understand_batch(self, call: _Call, pipeline: Pipeline) -> bytes:
        batch = wire.parse(pb.UnderstandBatchRequest(), call.raw, limit=wire.MAX_BATCH_REQUEST_BYTES)
        if not 1 <= len(batch.requests) <= wire.MAX_BATCH:
            raise InvalidInput(
                "requests",
                found=str(len(batch.requests)),
                expected=f"1 to {wire.MAX_BATCH}",
                remedy="split the batch",
            )
        if self.callers is not None and len(batch.requests) > 1:
            self.callers.spend(call.caller, len(batch.requests))
        outcomes = await asyncio.gather(
            *(_outcome(request, pipeline, call.deadline) for request in batch.requests)
        )
        return pb.UnderstandBatchReply(outcomes=outcomes).SerializeToString()

    async def _encode(self, call: _Call, pipeline: Pipeline) -> bytes:
        request = wire.parse(pb.EncodeRequest(), call.raw)
        encoded = await pipeline.encode(wire.texts(request), tokens=request.tokens, deadline=call.deadline)
        vectorizer = pipeline.engine.vectorizer
        return pb.EncodeReply(
            vectors=[wire.vectors_message(*found, request) for found in encoded],
            dim=vectorizer.dim,
            token_dim=vectorizer.token_dim,
            versions=wire.versions_message(pipeline.engine.versions),
        ).SerializeToString()

    def _describe(self, raw: bytes) -> bytes:
        wire.parse(pb.DescribeRequest(), raw)
        pipeline = self.pipeline
        described = None if pipeline is None else pipeline.engine.describe()
        return wire.describe_message(described, self.release).SerializeToString()


async def _one(request: pb.UnderstandRequest, pipeline: Pipeline, deadline: float) -> bytes:
    """One turn's reply, serialised; a question this engine was asked before is answered from memory."""
    began = time.perf_counter_ns()
    logs.note(heard=request.hypotheses[0].text if request.hypotheses else "")
    # One reading of the clock for the question and for its answer, so that no answer is kept under another moment.
    as_of = wire.clock(request) or datetime.now(UTC)
    answers = pipeline.answers
    question = b"" if answers is None else wire.question(request, pipeline.moment(as_of))
    kept = None if answers is None else answers.get(question)
    if kept is not None:
        metrics.KNOWN.inc()
        pipeline.windows.put(kept.said)
        return wire.given_again(kept.reply, request.request_id, time.perf_counter_ns() - began)
    utterance = wire.utterance(request, as_of=as_of)
    reply = await pipeline.understand(utterance, deadline=deadline)
    said = pipeline.windows.code(reply.annotations)
    pipeline.windows.put(said)
    message = wire.reply_message(reply, utterance)
    # What was left out this time, for want of time or of a store, may be there the next time.
    whole = reply.searched and not reply.skipped
    keepable = None if answers is None or not whole else wire.keepable(message)
    if answers is not None and keepable is not None:
        size = len(question) + len(keepable) + len(said) + _ANSWER_OVERHEAD
        answers.put(question, Kept(keepable, said), size)
    return message.SerializeToString()


async def _outcome(request: pb.UnderstandRequest, pipeline: Pipeline, deadline: float) -> pb.Outcome:
    """A reply, or the problem this one item of a batch had."""
    try:
        reply = pb.UnderstandReply.FromString(await _one(request, pipeline, deadline))
        return pb.Outcome(request_id=request.request_id, reply=reply)
    except Exception as error:
        if status_of(error)[0] is StatusCode.INTERNAL:
            logger.error("an item of a batch failed", exc_info=error)
        return _problem(request.request_id, error)


def _problem(request_id: str, error: Exception) -> pb.Outcome:
    code, text = status_of(error)
    return pb.Outcome(request_id=request_id, problem=pb.Problem(code=code.value[0], message=text))


def _request_id(raw: bytes) -> str:
    """Which item of a stream had the problem, as far as its bytes say."""
    try:
        return wire.parse(pb.UnderstandRequest(), raw).request_id
    except InvalidInput:
        return ""


def _count(method: str, code: StatusCode, caller: str) -> None:
    metrics.CALLS.labels(method, code.name).inc()
    if caller:
        metrics.CALLERS.labels(caller, code.name).inc()
