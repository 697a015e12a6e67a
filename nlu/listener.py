"""The HTTP listener: uvicorn's protocol in our own event loop, with a bound on everything a caller could hold on to.

uvicorn waits for ever for a request that never comes whole, and for a reader who never reads. Here one clock runs beside
every connection, from its beginning or its last answer on; when its time is over, so is the connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from nlu import tls
from nlu.settings import Settings

logger = logging.getLogger(__name__)

EXCHANGE_S = (
    15.0  # for a request to come whole and its answer to be read, beside the time the answer itself may take
)
IDLE_S = 5  # a connection that asks nothing more is closed
HANDSHAKE_S = 5.0
HEAD_BYTES = 16 * 1024  # request line and headers
CHUNKS = (
    2000  # of one request: each costs the event loop 6 µs, so a megabyte of single bytes would take it 6 s
)
CONNECTIONS = 1000  # of one process; more are hung up on
_BACKLOG = 512

_SAID = (
    b'{"code": "INVALID_ARGUMENT", "message": "request: found no HTTP/1.1, expected it", "request_id": ""}'
)
_NO_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_SAID), _SAID)
)


class Requests(h11.Connection):
    """h11, stricter: nothing that a proxy in front may read as another request, and no body in crumbs."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)
        self._chunks = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11 has it; raises h11.RemoteProtocolError, which is answered with 400 and the end of the connection."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                raise h11.RemoteProtocolError("two lengths")  # RFC 9112, 6.3: what smugglers of requests send
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            if self._chunks > CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        return event


class Connection(H11Protocol):
    """One connection; in `state` its requests have what nlu/tls.py says of the caller's certificate, as "peer"."""

    def __init__(self, *, config: uvicorn.Config, server_state: ServerState, exchange_s: float) -> None:
        super().__init__(config, server_state, {})
        self.conn = Requests()
        self._exchange_s = exchange_s
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        self.app_state = {"peer": tls.peer_of_http(transport.get_extra_info("ssl_object"))}
        super().connection_made(transport)
        self._wind()
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        if self._clock is not None:
            self._clock.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start it anew."""
        self._wind()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP; none where another answer was begun already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_NO_HTTP)
        if self.cycle is not None:  # whoever works on an answer learns at once that nobody will get it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _wind(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(self._exchange_s, self.transport.abort)


class Listener:
    """A listening application."""

    def __init__(self, server: asyncio.Server, state: ServerState) -> None:
        self.port = int(server.sockets[0].getsockname()[1])
        self._server, self._state = server, state

    async def close(self, grace_s: float) -> None:
        """No new connections; those with an answer under way have `grace_s` seconds for it, idle ones none."""
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        end = asyncio.get_running_loop().time() + grace_s
        while self._state.connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)


async def serve_http(
    application: ASGIApp, settings: Settings, *, port: int | None = None, reuse_port: bool = False
) -> Listener:
    """Listen on `port`, else settings.http_port, with TLS where the settings name a certificate; 0 takes any free one.

    `reuse_port` lets several processes share it. Raises OSError where it is taken, ValueError for a bad certificate.
    """
    config = uvicorn.Config(
        application,
        http=H11Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,  # logging is ours
        log_level=logging.CRITICAL,  # what is no HTTP, and who sends it, is not worth a line each
        access_log=False,  # paths are a caller's words too
        proxy_headers=False,  # who is behind a proxy is for the proxy to say, with a token of its own
        timeout_keep_alive=IDLE_S,
    )
    config.load()
    state = ServerState()
    exchange_s = EXCHANGE_S + settings.max_deadline_s

    def connection() -> Connection:
        return Connection(config=config, server_state=state, exchange_s=exchange_s)

    context = tls.http_ssl(settings)
    secured: dict[str, Any] = (
        {} if context is None else {"ssl": context, "ssl_handshake_timeout": HANDSHAKE_S}
    )
    listening = _bind(
        settings.host, (settings.http_port or 0) if port is None else port, reuse_port=reuse_port
    )
    server = await asyncio.get_running_loop().create_server(
        connection, sock=listening, backlog=_BACKLOG, **secured
    )
    listener = Listener(server, state)
    logger.info("listening for %s on %s:%d", "HTTPS" if secured else "HTTP", settings.host, listener.port)
    return listener


def _bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(
            f"address: found {host}:{port} taken or not of this machine, expected a free one for HTTP; "
            "set NLU_HTTP_PORT, or stop the other server"
        ) from error
    return listening
