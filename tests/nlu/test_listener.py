"""What a caller can hold on to is bounded in time and number; the control is the same without the bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from nlu import listener
from nlu.listener import Listener, serve_http
from nlu.settings import Settings
from tests.conftest import free_port
from tests.web import exchange, get, request

BIG = b"x" * 2**20


class App:
    """Answers at once; /slow waits until it is told to go on, /big says a megabyte."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.cancelled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            self.begun.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        if scope["method"] == "POST":
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": BIG if scope["path"] == "/big" else b"hello"})


@asynccontextmanager
async def listening(app: App, **options: Any) -> AsyncIterator[Listener]:
    made = await serve_http(app, Settings(http_port=0, max_deadline_s=0.01), **options)
    try:
        yield made
    finally:
        await made.close(0)


async def ends(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the other side hangs up."""
    try:
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                while await reader.read(2**16):
                    pass
    except TimeoutError:
        return False
    return True


SLOW = {
    "says nothing": b"",
    "half a request line": b"GET / HT",
    "headers without end": b"GET / HTTP/1.1\r\nhost: x\r\nx-a: ",
    "a body that never comes": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc",
    "a chunk that never ends": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nff\r\nabc",
}


@pytest.mark.parametrize("what", SLOW)
async def test_listener_slow_requests_are_hung_up_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, over in ((0.2, True), (60.0, False)):  # the second is the control
        monkeypatch.setattr(listener, "EXCHANGE_S", seconds)
        async with listening(App()) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(SLOW[what])
            assert await ends(reader, 10 if over else 1) is over
            writer.close()


async def test_listener_bytes_one_by_one_buy_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "EXCHANGE_S", 0.3)
    async with listening(App()) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx-a: ")

        async def drip() -> None:
            while True:
                writer.write(b"a")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert await ends(reader, 10)
        dripping.cancel()
        writer.close()


async def test_listener_readers_who_do_not_read_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, over in ((0.3, True), (60.0, False)):
        monkeypatch.setattr(listener, "EXCHANGE_S", seconds)
        async with listening(App()) as made:
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", made.port))
            await loop.sock_sendall(deaf, request("GET", "/big", keep=True) * 20)
            gone = True
            try:
                async with asyncio.timeout(10 if over else 1):
                    await asyncio.sleep(0.1)
                    while made._state.connections:
                        await asyncio.sleep(0.01)
            except TimeoutError:
                gone = False
            deaf.close()
            assert gone is over


async def test_listener_a_connection_serves_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock begins anew with every answer: only an exchange is bounded, not a connection."""
    monkeypatch.setattr(listener, "EXCHANGE_S", 0.5)
    async with listening(App()) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        for _ in range(8):
            writer.write(request("GET", "/", keep=True))
            assert b" 200 " in await reader.readuntil(b"hello")
            await asyncio.sleep(0.1)
        writer.close()


async def test_listener_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS", 3)
    async with listening(App()) as made:
        held = [await asyncio.open_connection("127.0.0.1", made.port) for _ in range(3)]
        await asyncio.sleep(0.05)
        one_more, writer = await asyncio.open_connection("127.0.0.1", made.port)
        assert await ends(one_more, 10)
        writer.close()
        held[0][1].close()
        await asyncio.sleep(0.05)
        assert (await get(made.port, "/")).status == 200  # where one left, another is welcome
        for _, each in held:
            each.close()


async def test_listener_head_is_bounded() -> None:
    async with listening(App()) as made:
        large, small = [
            await exchange(made.port, request("GET", "/", headers={"x-a": "a" * size}))
            for size in (10 * listener.HEAD_BYTES, listener.HEAD_BYTES // 2)
        ]
    assert large is None or large.status == 400  # hung up on while it was still sending, or told
    assert small is not None and small.status == 200


async def test_listener_two_lengths_of_a_body_are_none() -> None:
    """A proxy that goes by the length hands on what we, going by the chunks, would take for the next request."""
    hidden = b"0\r\n\r\n" + request("GET", "/")
    chunked = {"transfer-encoding": "chunked"}
    smuggled = request("POST", "/", hidden, chunked, keep=True)
    plain = request("POST", "/", hidden, {**chunked, "content-length": ""}, keep=True)
    async with listening(App()) as made:
        for raw, status, answers in (
            (smuggled, 400, 1),
            (plain.replace(b"content-length: \r\n", b""), 200, 2),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(raw)
            answer = await reader.read()
            writer.close()
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            assert answer.count(b"HTTP/1.1 ") == answers


@pytest.mark.parametrize("verb", ["GET", "HEAD", "POST"])
async def test_listener_what_turns_bad_while_it_is_worked_on_harms_nobody(verb: str) -> None:
    """The application hears that nobody waits any more, and its answer goes nowhere."""
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    app = App()
    async with listening(app) as made:
        head = f"{verb} /slow HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(head)
        await app.begun.wait()
        writer.write(b"zz\r\n")
        asyncio.get_running_loop().call_soon(app.go_on.set)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await asyncio.gather(*made._state.tasks)
    assert trouble == []


async def test_listener_bodies_in_crumbs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CHUNKS", 50)
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    async with listening(App()) as made:
        for chunks, status in ((51, 400), (50, 200)):
            answer = await exchange(made.port, head + b"1\r\na\r\n" * chunks + b"0\r\n\r\n")
            assert answer is not None and answer.status == status


async def test_listener_close_lets_an_answer_under_way_finish() -> None:
    app = App()
    async with listening(app) as made:
        asked = asyncio.create_task(get(made.port, "/slow"))
        await app.begun.wait()
        idle, writer = await asyncio.open_connection("127.0.0.1", made.port)
        closing = asyncio.create_task(made.close(10))
        assert await ends(idle, 10)  # at once: it is owed nothing
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", made.port)
        app.go_on.set()
        assert b"hello" in (await asked).body
        await closing
        writer.close()


async def test_listener_close_does_not_wait_for_ever() -> None:
    app = App()
    async with listening(app) as made:
        asked = asyncio.create_task(get(made.port, "/slow"))
        await app.begun.wait()
        await made.close(0.05)
        assert app.cancelled
        with pytest.raises(AssertionError, match="without an answer"):
            await asked


async def test_listener_a_taken_port_is_an_error() -> None:
    port = free_port()
    async with listening(App(), port=port) as made:
        assert made.port == port
        with pytest.raises(OSError, match=f"found 127.0.0.1:{port} taken .* set NLU_HTTP_PORT"):
            await serve_http(App(), Settings(http_port=port))


async def test_listener_several_share_a_port_where_they_are_told_to() -> None:
    port = free_port()
    async with listening(App(), port=port, reuse_port=True), listening(App(), port=port, reuse_port=True):
        assert (await get(port, "/")).status == 200


async def test_listener_a_body_that_turns_bad_after_its_answer_ends_the_connection() -> None:
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    async with listening(App()) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert b" 200 " in await reader.readuntil(b"hello")
        writer.write(b"zz\r\n")
        assert await ends(reader, 10)
        writer.close()
    assert trouble == []
