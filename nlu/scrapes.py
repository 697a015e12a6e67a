"""The listener that Prometheus scrapes: a thread for each connection, a few at once, and none for long."""

from __future__ import annotations

import io
import logging
import socket
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from nlu import metrics
from nlu.settings import Settings

logger = logging.getLogger(__name__)

SILENCE_S = 5.0  # a connection that says nothing for so long is closed
CONNECTIONS = 16  # at once; Prometheus has one


def listen(settings: Settings, registry: CollectorRegistry = metrics.REGISTRY) -> Callable[[], None]:
    """Serve a registry, and return how to close that, which takes half a second at most.

    A port that is taken costs the metrics, not the service.
    """
    try:
        server = _Server(settings)
    except OSError as error:
        logger.error(
            "no metrics: port %d cannot be had (%s); set NLU_METRICS_PORT", settings.metrics_port, error
        )
        return lambda: None
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="scrapes", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who scrapes, and what is no HTTP, is not worth a line."""

    def get_stderr(self) -> io.StringIO:
        """Where wsgiref prints the traceback of an answer that could not be given: nowhere."""
        return io.StringIO()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, settings: Settings) -> None:
        found = socket.getaddrinfo(settings.metrics_host, settings.metrics_port, type=socket.SOCK_STREAM)
        self.address_family, _, _, _, address = found[0]
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((str(address[0]), int(address[1])), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more than there is room for is hung up on."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up, or says nothing; socketserver would print a traceback."""
        logger.debug("a scrape was not answered", exc_info=True)
