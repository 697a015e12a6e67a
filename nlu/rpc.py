"""gRPC at the desk: raw bytes in and out, metadata and peer, aborts with code and pause. Nothing is decided here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import grpc
from grpc.aio import ServicerContext

from nlu import logs, tls, wire
from nlu.desk import Desk, status_of
from nlu.errors import Overloaded
from nlu.v1 import nlu_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Nlu"].full_name
METHODS = ("Understand", "UnderstandBatch", "Encode", "Describe")

# Twice the largest legal request: what lies between is refused in our words (INVALID_ARGUMENT), what is larger by the
# transport (RESOURCE_EXHAUSTED), before it is all in memory.
MAX_MESSAGE_BYTES = 2 * wire.MAX_BATCH_REQUEST_BYTES
MAX_STREAMS = 256  # calls of one connection under way

Context = ServicerContext[bytes, bytes]


def server_options(*, reuse_port: bool = False) -> tuple[tuple[str, int], ...]:
    """For grpc.aio.server. With `reuse_port` several processes share one port; without it a port that is taken is an
    error, not a coin toss between two servers."""
    return (
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # Half of the calls there is room for, so that no one connection has them all, and several times what an honest one
        # has under way. Not less: a burst beyond it the transport refuses with UNAVAILABLE, and says no pause.
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # Connections end now and then, so that callers find new servers; calls under way, streams too, have the grace.
        ("grpc.max_connection_age_ms", 600_000),
        ("grpc.max_connection_age_grace_ms", 30_000),
        # A caller that is gone without a word is noticed after 80 s.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Callers may ping every 10 s, also between calls; who does it faster a third time is sent away.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.so_reuseport", int(reuse_port)),
    )


SERVER_OPTIONS = server_options()


class NluServicer:
    """One server's handlers."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """What a grpc.aio server is given."""
        return _Handlers(self._handler_of)

    def _handler_of(self, method: str) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if method == "UnderstandStream":
            return grpc.stream_stream_rpc_method_handler(self._understand_stream)
        return grpc.unary_unary_rpc_method_handler(self._unary(method)) if method in METHODS else None

    def _unary(self, method: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """The handler of one call."""
        arrival = _Arrival(self._desk, method)

        async def handle(raw: bytes, context: Context) -> bytes:
            arrival.begun = True
            metadata, peer = self._who(context)
            try:
                return await self._desk.answer(
                    method, raw, remaining_s=context.time_remaining(), metadata=metadata, peer=peer
                )
            except Exception as error:
                code, text = status_of(error)
                await context.abort(code, text, _pushback(error))

        return handle

    async def _understand_stream(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        metadata, peer = self._who(context)
        async for raw in requests:
            yield await self._desk.item(raw, metadata=metadata, peer=peer)

    def _who(self, context: Context) -> tuple[Mapping[str, str], str]:
        """What the desk is given of who calls; the caller is told the request id, its own or a fresh one."""
        metadata = dict(context.invocation_metadata() or ())
        metadata[logs.REQUEST_ID] = logs.request_id(metadata)
        context.set_trailing_metadata(((logs.REQUEST_ID, metadata[logs.REQUEST_ID]),))
        return metadata, tls.peer_of(context.auth_context())


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Finds a call's handler when the call arrives, which may be long before it begins."""

    def __init__(self, handler_of: Callable[[str], grpc.RpcMethodHandler[bytes, bytes] | None]) -> None:
        self._handler_of = handler_of

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        # One slash is taken off and no more: a proxy's rule for /nlu.v1.Nlu/Encode does not hold of //nlu.v1.Nlu/Encode.
        service, _, method = call.method.removeprefix("/").partition("/")
        return self._handler_of(method) if service == SERVICE else None


class _Arrival:
    """A call that arrived. gRPC drops the handler of one whose caller was gone, or whose deadline had passed, before it
    began, and tells nobody: then it is counted here."""

    __slots__ = ("begun", "_desk", "_method")

    def __init__(self, desk: Desk, method: str) -> None:
        self.begun = False
        self._desk, self._method = desk, method

    def __del__(self) -> None:
        if not self.begun:
            self._desk.gone(self._method)


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """How long a gRPC client should wait before it tries again (gRFC A6)."""
    if isinstance(error, Overloaded):
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
