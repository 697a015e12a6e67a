"""The listener for Prometheus: what strangers can hold on to is bounded, and their trouble is no line of ours."""

from __future__ import annotations

import logging
import socket
import socketserver
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry, Gauge

from nlu import scrapes
from nlu.settings import Settings
from tests.conftest import free_port


@contextmanager
def listening() -> Iterator[int]:
    """A listener with a page too large for the buffers of a socket."""
    registry = CollectorRegistry()
    gauge = Gauge("answer", "x" * 2**24, registry=registry)
    gauge.set(42)
    port = free_port()
    close = scrapes.listen(Settings(metrics_port=port), registry)
    try:
        yield port
    finally:
        close()


def page(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return bytes(answer.read())


def serving() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def until_serving(count: int) -> None:
    end = time.monotonic() + 10
    while serving() != count:
        assert time.monotonic() < end, f"{serving()} threads serve, expected {count}"
        time.sleep(0.01)


def test_scrapes_are_answered() -> None:
    with listening() as port:
        assert page(port).endswith(b"answer 42.0\n")
        until_serving(0)


def test_scrapes_who_say_nothing_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, over in ((0.2, True), (60.0, False)):  # the second is the control
        monkeypatch.setattr(scrapes._Handler, "timeout", seconds)
        with listening() as port, socket.create_connection(("127.0.0.1", port)) as idle:
            idle.settimeout(10 if over else 1)
            idle.sendall(b"GET /met")
            if over:
                assert idle.recv(1) == b""
            else:
                with pytest.raises(TimeoutError):
                    idle.recv(1)
        until_serving(0)


def test_scrapes_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "CONNECTIONS", 3)
    with listening() as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        until_serving(3)
        with socket.create_connection(("127.0.0.1", port)) as one_more:
            assert one_more.recv(1) == b""
        for each in held:
            each.close()
        until_serving(0)
        assert b"answer 42.0" in page(port)


@pytest.mark.parametrize("quiet", [True, False])
def test_scrapes_that_break_off_leave_no_traceback(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second is the control: the library as it is."""
    monkeypatch.setattr(scrapes._Handler, "timeout", 0.2)
    if not quiet:
        monkeypatch.setattr(scrapes._Server, "handle_error", socketserver.BaseServer.handle_error)
        monkeypatch.delattr(scrapes._Handler, "get_stderr")
    with listening() as port:
        deaf = socket.create_connection(("127.0.0.1", port))
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        silent = socket.create_connection(("127.0.0.1", port))
        until_serving(2)
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(b"GET /metrics")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
        until_serving(0)
        deaf.close()
        silent.close()
    assert ("Traceback" in capfd.readouterr().err) is not quiet


def test_scrapes_of_a_port_that_is_taken_cost_the_metrics_only(caplog: pytest.LogCaptureFixture) -> None:
    with listening() as port, caplog.at_level(logging.ERROR):
        scrapes.listen(Settings(metrics_port=port))()
        assert "NLU_METRICS_PORT" in caplog.text
        assert b"answer 42.0" in page(port)
