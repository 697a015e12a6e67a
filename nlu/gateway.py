"""HTTP for those who do not speak gRPC: the same desk, the same messages as JSON, and the words of OpenAI and Rasa.

A request is capped before it is read, becomes one of the messages of nlu.proto, and goes to the desk, which takes it on or
refuses it exactly as a gRPC call. What the desk raises becomes a status and a problem; nothing is decided here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from email.utils import formatdate
from typing import Any, TypeVar

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc import StatusCode
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from nlu import dialects, logs, metrics, openapi, tracing, wire
from nlu.desk import Desk, Read, status_of
from nlu.errors import InvalidInput, Overloaded
from nlu.health import LIVE, Health
from nlu.listener import Listener, serve_http
from nlu.openapi import Operation
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import Vectorizer
from statics.version import service_version

__all__ = ["Listener", "app", "serve_http"]

logger = logging.getLogger(__name__)

MAX_BODY = 4 * wire.MAX_REQUEST_BYTES  # JSON may take six bytes for a character that protobuf has in two
MAX_BATCH_BODY = 2 * wire.MAX_BATCH_REQUEST_BYTES
MAX_VALUES = 1000  # of JSON in one turn; what nlu/wire.py allows one to hold comes to less
_MANY = (
    16 * 1024
)  # bytes of JSON from which work on it is left to a thread, so that it holds nobody up for long
_QUOTED = 300  # characters of what a parser says

_HTTP_STATUS = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,  # nginx's, for a caller who did not wait
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
_CODES = {status: code for code, status in _HTTP_STATUS.items()} | {
    405: StatusCode.UNIMPLEMENTED,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.INVALID_ARGUMENT,
    415: StatusCode.INVALID_ARGUMENT,
}
_STRANGER = re.compile(r'Message type "([^"]+)" has no field named "([^"]*)"')
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

M = TypeVar("M", bound=Message)
R = TypeVar("R")
Endpoint = Callable[[Request], Awaitable[Response]]


class Problem(BaseModel):
    """Every answer that is not 200, but for OpenAI's: `code` is gRPC's name for it."""

    code: str
    message: str
    request_id: str


class Alive(BaseModel):
    """Of GET /health/live."""

    live: bool


class Ready(BaseModel):
    """Of GET /health/ready; `reason` says why not."""

    ready: bool
    bundle: str
    reason: str


class Refused(Exception):
    """What HTTP alone can do wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def app(desk: Desk, settings: Settings, *, health: Health | None = None) -> Starlette:
    """The gateway in front of a desk. `health` says whether the process lives; None: it does."""
    gateway = _Gateway(desk, settings, health)
    nlu = pb.DESCRIPTOR.message_types_by_name
    served: list[tuple[Operation, Endpoint]] = [
        (
            Operation("post", "/v1/understand", "What one turn meant, and what could be said back.",
                      nlu["UnderstandReply"], nlu["UnderstandRequest"], Problem),
            gateway.message("Understand", pb.UnderstandRequest, pb.UnderstandReply, MAX_BODY),
        ),
        (
            Operation("post", "/v1/understand:batch", "Up to 32 turns; each succeeds or fails on its own.",
                      nlu["UnderstandBatchReply"], nlu["UnderstandBatchRequest"], Problem),
            gateway.message("UnderstandBatch", pb.UnderstandBatchRequest, pb.UnderstandBatchReply, MAX_BATCH_BODY),
        ),
        (
            Operation("post", "/v1/encode", "The vectors themselves, of up to 32 texts.",
                      nlu["EncodeReply"], nlu["EncodeRequest"], Problem),
            gateway.message("Encode", pb.EncodeRequest, pb.EncodeReply, MAX_BODY),
        ),
        (
            Operation("get", "/v1/describe", "What is served: versions, heads, limits, release.",
                      nlu["DescribeReply"], None, Problem),
            gateway.describe,
        ),
        (
            Operation("post", "/v1/embeddings", "Sentence vectors, as OpenAI's clients ask for them.",
                      dialects.EmbeddingsReply, dialects.EmbeddingsRequest, dialects.ErrorReply),
            gateway.embeddings,
        ),
        (
            Operation("get", "/v1/models", "The one model of /v1/embeddings.", dialects.ModelsReply, None, Problem),
            gateway.models,
        ),
        (
            Operation("post", "/model/parse", "Intent and entities, as Rasa's clients ask for them.",
                      dialects.ParseReply, dialects.ParseRequest, Problem),
            gateway.parse,
        ),
        (Operation("get", "/status", "What is served, in Rasa's words.", dialects.StatusReply, None, Problem), gateway.status),
        (Operation("get", "/version", "The version of this service.", dialects.VersionReply), gateway.version),
        (Operation("get", "/", "A greeting.", "text"), gateway.hello),
        (Operation("get", "/health/live", "503 when the process is stuck.", Alive), gateway.live),
        (Operation("get", "/health/ready", "503 when no calls are answered, and why.", Ready), gateway.ready),
    ]  # fmt: skip
    # Of one process's numbers only: where there are several, their supervisor has the metrics of all of them.
    if settings.metrics and settings.processes == 1:
        served.append((Operation("get", "/metrics", "Prometheus.", "text", None, Problem), gateway.metrics))
    if settings.reflection:
        described = openapi.document([operation for operation, _ in served], version=service_version())
        served += [
            (Operation("get", "/openapi.json", "This, for machines.", None), _fixed(_json(described))),
            (Operation("get", "/docs", "This, to be read.", "html"), _fixed(openapi.page(described), "text/html")),
        ]  # fmt: skip
    routes = [
        Route(operation.path, gateway.guarded(endpoint), methods=[operation.verb.upper()])
        for operation, endpoint in served
    ]
    starlette = Starlette(
        routes=routes,
        middleware=[Middleware(_Door, paths=frozenset(operation.path for operation, _ in served))],
        exception_handlers={HTTPException: _not_here},
    )
    starlette.router.redirect_slashes = False
    return starlette


class _Gateway:
    """The endpoints."""

    def __init__(self, desk: Desk, settings: Settings, health: Health | None) -> None:
        self._desk, self._settings, self._health = desk, settings, health

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint whose errors are answers."""

        async def guard(request: Request) -> Response:
            try:
                return await endpoint(request)
            except (ClientDisconnect, asyncio.CancelledError):
                raise
            except Exception as error:
                return _problem(request, error)

        return guard

    def message(self, method: str, takes: type[M], gives: type[Message], limit: int) -> Endpoint:
        """A method of nlu.proto in the JSON mapping of its messages, with the field names of the .proto file."""

        async def endpoint(request: Request) -> Response:
            body = await self._body(request, method, limit)

            async def asked() -> bytes:
                return await _aside(len(body), lambda: _from_json(takes(), body).SerializeToString())

            reply = await self._answer(request, method, asked)
            return _answered(await _aside(len(reply), lambda: _to_json(gives.FromString(reply))))

        return endpoint

    async def describe(self, request: Request) -> Response:
        """GET /v1/describe."""
        reply = await self._answer(request, "Describe", b"")
        return _answered(_to_json(pb.DescribeReply.FromString(reply)))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings; more texts than one call of Encode takes become several, one after the other."""
        body = await self._body(request, "Encode", MAX_BATCH_BODY)
        await _aside(len(body), lambda: _text(body, MAX_VALUES))
        said = dialects.parsed(dialects.EmbeddingsRequest, body)
        pipeline = self._desk.pipeline
        if pipeline is not None:
            _check_served(said, pipeline.engine.vectorizer)
        rows: list[NDArray[np.float32]] = []
        tokens = 0
        for texts in _portions(said.texts):
            # Vectors were rounded to float16 when they were made, so this loses nothing.
            asked = pb.EncodeRequest(texts=texts, precision=pb.PRECISION_FLOAT16)
            reply = pb.EncodeReply.FromString(
                await self._answer(request, "Encode", asked.SerializeToString())
            )
            if pipeline is None or reply.versions.vectorizer != pipeline.engine.vectorizer.fingerprint:
                raise Refused(503, "model: another took its place while it was asked; ask again")
            rows += [np.frombuffer(each.sentence_f16, "<f2").astype(np.float32) for each in reply.vectors]
            tokens += sum(pipeline.engine.vectorizer.count(each.phrase) for each in reply.vectors)
        vectors = np.stack(rows)
        made = dialects.embeddings(vectors, model=said.model, tokens=tokens, encoding=said.encoding_format)
        return _answered(_json(made))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one there is."""
        await self._answer(request, "Describe", b"")
        pipeline = self._desk.pipeline
        return _answered(
            _json(dialects.models([] if pipeline is None else [pipeline.engine.vectorizer.spec.name]))
        )

    async def parse(self, request: Request) -> Response:
        """POST /model/parse."""
        body = await self._body(request, "Understand", MAX_BODY)
        said = dialects.parsed(dialects.ParseRequest, body)
        asked = pb.UnderstandRequest(
            hypotheses=[pb.Hypothesis(text=said.text)], retrieval=pb.Retrieval(top_k=0)
        )
        reply = await self._answer(request, "Understand", asked.SerializeToString())
        return _answered(_json(dialects.parse_reply(pb.UnderstandReply.FromString(reply), said)))

    async def status(self, request: Request) -> Response:
        """GET /status."""
        reply = pb.DescribeReply.FromString(await self._answer(request, "Describe", b""))
        file = f"{reply.channel}-{reply.seq}" if reply.versions.bundle else ""
        return _answered(_json(dialects.StatusReply(model_id=reply.versions.bundle, model_file=file)))

    async def version(self, request: Request) -> Response:
        """GET /version."""
        version = service_version()
        return _answered(_json(dialects.VersionReply(version=version, minimum_compatible_version=version)))

    async def hello(self, request: Request) -> Response:
        """GET /."""
        return Response(f"Hello from Chorus NLU: {service_version()}\n", media_type="text/plain")

    async def live(self, request: Request) -> Response:
        """GET /health/live."""
        live = self._health is None or self._health.serving(LIVE) is not False
        return _answered(_json(Alive(live=live)), 200 if live else 503)

    async def ready(self, request: Request) -> Response:
        """GET /health/ready."""
        desk, reason = self._desk, ""
        if desk.draining or (self._health is not None and self._health.serving("ready") is False):
            reason = "no bundle to serve yet" if desk.pipeline is None else "this server is stopping"
        elif desk.pipeline is None:
            reason = "no bundle to serve yet"
        if reason and desk.release.reason:
            reason = f"{reason}: {desk.release.reason}"
        bundle = "" if desk.pipeline is None else desk.pipeline.engine.versions.bundle
        return _answered(_json(Ready(ready=not reason, bundle=bundle, reason=reason)), 503 if reason else 200)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics; where callers have names, for those who may call Describe."""
        if self._desk.callers is not None:
            self._desk.callers.known(_metadata(request), _peer(request), method="Describe")
        return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)

    async def _body(self, request: Request, method: str, limit: int) -> bytes:
        """What was sent, as long as it is JSON, no more than this, and not from a stranger; raises Refused."""
        if not self._desk.knows(method, metadata=_metadata(request), peer=_peer(request)):
            await self._answer(request, method, b"")  # which the desk refuses in its own words, and counts
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise Refused(415, "content-type: found something else, expected application/json; say so")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "content-encoding: found one, expected none; send it plain")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 9 or int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise _too_large(limit)
        return bytes(body)

    async def _answer(self, request: Request, method: str, asked: bytes | Read) -> bytes:
        """The desk's reply. Where the caller hangs up first, the work ends with that."""
        answer = asyncio.ensure_future(
            self._desk.answer(
                method,
                asked,
                remaining_s=_remaining_s(request),
                metadata=_metadata(request),
                peer=_peer(request),
            )
        )
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Refused(499, "the caller hung up")
            request.scope["state"]["told"] = (
                answer.exception() is not None
            )  # what fails there is logged there
            return answer.result()
        finally:
            gone.cancel()
            if answer.cancel():
                await asyncio.wait((answer,))


class _Door:
    """What every answer carries, and the one place where requests are counted."""

    def __init__(self, inner: ASGIApp, paths: frozenset[str]) -> None:
        self._inner, self._paths = inner, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        status = 0
        request_id = logs.request_id(Headers(scope=scope))
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.monotonic())

        async def answer(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                headers = MutableHeaders(scope=event)
                headers["date"] = formatdate(usegmt=True)
                headers[logs.REQUEST_ID] = request_id
                headers["cache-control"] = "no-store"
                headers["x-content-type-options"] = "nosniff"
            await send(event)

        path = scope["path"] if scope["path"] in self._paths else "other"
        try:
            with tracing.request(path, Headers(scope=scope)):
                await self._inner(scope, receive, answer)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:  # no answer could be made; Starlette says 500, and nobody else why
            status = status or 500
            logger.error("a request of the gateway failed", exc_info=error)
            raise
        finally:
            metrics.HTTP.labels(path, str(status or 499)).inc()


def _check_served(said: dialects.EmbeddingsRequest, vectorizer: Vectorizer) -> None:
    if said.model not in (vectorizer.spec.name, vectorizer.fingerprint):
        raise Refused(404, "model: found one that is not served here, expected the one of GET /v1/models")
    if said.dimensions not in (None, vectorizer.dim):
        raise InvalidInput(
            "dimensions", found=str(said.dimensions), expected=str(vectorizer.dim), remedy="leave it out"
        )


def _too_large(limit: int) -> Refused:
    return Refused(
        413, f"request: found more than {limit} bytes, expected at most that; send fewer or shorter texts"
    )


def _from_json(message: M, body: bytes) -> M:
    """Raises InvalidInput where the JSON is none, or not that of this message."""
    name, most = message.DESCRIPTOR.full_name, MAX_VALUES
    if isinstance(message, pb.UnderstandBatchRequest):
        most *= wire.MAX_BATCH
    try:
        json_format.Parse(_text(body, most), message)
    except json_format.ParseError as error:
        found = str(error).splitlines()[0][:_QUOTED].encode("utf-8", "backslashreplace").decode()
        if stranger := _STRANGER.search(found):
            name, found = stranger[1], f"a field {stranger[2]!r}"
    except InvalidInput:
        raise
    except (ValueError, TypeError, RecursionError):  # lone surrogates
        found = "no JSON in UTF-8"
    else:
        return message
    raise InvalidInput("request", found=found, expected=f"the JSON of a {name}", remedy="see /docs")


def _text(body: bytes, most: int) -> str:
    """JSON of no more than so many values; raises InvalidInput.

    protobuf's reader takes seconds for a megabyte of small values, and pydantic for the list of what is wrong with them;
    Python's own a few milliseconds.
    """
    try:
        text = body.decode("utf-8")
        count = _values(json.loads(text), most)
    except (ValueError, RecursionError):  # no UTF-8, digits or brackets without end
        raise InvalidInput("request", found="no JSON in UTF-8", expected="JSON", remedy="see /docs") from None
    if count > most:
        raise InvalidInput("request", found=f"more than {most} values", expected="fewer", remedy="see /docs")
    return text


def _values(found: Any, most: int) -> int:
    """How many values there are in what JSON said; no further than `most` and a few."""
    count, rest = 0, [found]
    while rest and count <= most:
        value = rest.pop()
        count += 1
        if isinstance(value, dict | list):
            if len(value) > most:
                return len(value)
            rest.extend(value.values() if isinstance(value, dict) else value)
    return count


def _to_json(message: Message) -> bytes:
    text = json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
        ensure_ascii=False,
    )
    return text.encode()


async def _aside(size: int, work: Callable[[], R]) -> R:
    return work() if size < _MANY else await asyncio.to_thread(work)


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Lists that one call of Encode takes, in order."""
    portion: list[str] = []
    size = 0
    for text in texts:
        more = len(text.encode("utf-8", "replace")) + 8  # around a string in protobuf
        if portion and (len(portion) == wire.MAX_BATCH or size + more > wire.MAX_REQUEST_BYTES - 8):
            yield portion
            portion, size = [], 0
        portion.append(text)
        size += more
    yield portion


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _remaining_s(request: Request) -> float | None:
    """What is left of the caller's deadline, by X-Timeout-Ms or grpc-timeout; raises InvalidInput."""
    milliseconds, grpc = request.headers.get("x-timeout-ms"), request.headers.get("grpc-timeout")
    if milliseconds is None and grpc is None:
        return None
    match = _TIMEOUT.fullmatch(f"{milliseconds}m" if milliseconds is not None else grpc or "")
    if match is None:
        raise InvalidInput(
            "grpc-timeout" if milliseconds is None else "x-timeout-ms",
            found="something else",
            expected="1 to 8 digits" + (" and one of H, M, S, m, u, n" if milliseconds is None else ""),
            remedy="leave it out for the server's own",
        )
    left: float = int(match[1]) * _UNITS[match[2]] - (time.monotonic() - request.scope["state"]["arrived"])
    return left


def _metadata(request: Request) -> dict[str, str]:
    return {**request.headers, logs.REQUEST_ID: request.scope["state"]["request_id"]}


def _peer(request: Request) -> str:
    peer: str = request.scope["state"].get("peer", "")
    return peer


def _problem(request: Request, error: Exception) -> Response:
    """What went wrong, in the shape that those who ask at this path know."""
    headers = {}
    if isinstance(error, Refused):
        status, message = error.status, str(error)
        code = _CODES.get(status, StatusCode.UNKNOWN)
    else:
        code, message = status_of(error)
        status = _HTTP_STATUS.get(code, 500)
    if code is StatusCode.INTERNAL and not request.scope["state"].get("told"):
        logger.error("a request of the gateway failed", exc_info=error)
    if isinstance(error, Overloaded):
        headers = {
            "retry-after": str(math.ceil(error.retry_after_ms / 1000)),
            "retry-after-ms": str(error.retry_after_ms),
        }
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (408, 413, 415, 499):
        headers["connection"] = "close"  # the rest of the request is not read
    if request.scope["path"] == "/v1/embeddings":
        field = error.field if isinstance(error, InvalidInput) else None
        known = field is None or field in dialects.EmbeddingsRequest.model_fields
        param = field if known else "input"  # whose texts the desk knows under other names
        return _answered(_json(dialects.error(status, message, param=param)), status, headers)
    said = Problem(code=code.name, message=message, request_id=request.scope["state"]["request_id"])
    return _answered(_json(said), status, headers)


def _not_here(request: Request, error: Exception) -> Response:
    """404 and 405, in our shape."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    message = "path: found one that is not served here, expected one of /docs"
    if status == 405:
        message = f"method: found {request.method[:16]}, expected another at this path; see /docs"
    answer = _problem(request, Refused(status, message))
    if isinstance(error, HTTPException) and error.headers:
        answer.headers.update(error.headers)
    return answer


def _answered(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _json(found: BaseModel | dict[str, Any]) -> bytes:
    if isinstance(found, BaseModel):
        return found.model_dump_json().encode()
    return json.dumps(found, ensure_ascii=False).encode("utf-8")


def _fixed(body: bytes | str, media_type: str = "application/json") -> Endpoint:
    """An endpoint that always says the same."""
    headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}

    async def endpoint(request: Request) -> Response:
        return Response(body, headers=headers, media_type=media_type)

    return endpoint
