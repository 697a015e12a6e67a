"""A TCP proxy that does to connections what networks and stores do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Literal

Fault = Literal["pass", "refuse", "hole", "cut", "stall", "flip", "drip", "status", "latency"]

_CHUNK = 64 * 1024
_DRIP_S, _DRIP_BYTES = 0.1, 64
_FOREVER_S = 3600
_VERBS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


@dataclass(frozen=True)
class Plan:
    """What happens, and to what.

    refuse: the connection is reset; hole: nothing is ever answered; status: the answer is `status`, empty; cut, stall,
    flip: after `at` bytes of an answer the connection is reset, falls silent, or one bit is another; drip: answers come
    at 640 bytes a second; latency: every piece waits for `at` milliseconds. Only HTTP requests with `where` in their
    first line are hurt, and of those only the first `times`.
    """

    fault: Fault = "pass"
    at: int = 0
    where: bytes = b""
    status: int = 503
    times: int = 1_000_000


class Proxy:
    """Listens on `port`, passes on to `upstream`, and follows its plan, which may change at any time."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.plan = Plan()
        self.port = 0
        self.requests = 0  # that matched the plan's `where`
        self.hurt = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def url(self) -> str:
        """Where an HTTP client finds it."""
        return f"http://127.0.0.1:{self.port}"

    def be(self, plan: Plan) -> None:
        """Follow this plan from now on; counts begin anew."""
        self.requests = self.hurt = 0
        self.plan = plan

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda loop, context: None)  # connections end in every way there is
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.plan.fault == "refuse" and not self.plan.where:
            _reset(writer)
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            _reset(writer)
            return
        link = _Link(self, reader, writer, up_reader, up_writer)
        ways = [asyncio.ensure_future(link.forth()), asyncio.ensure_future(link.back())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            _reset(writer) if link.broken else writer.close()
            up_writer.close()


class _Link:
    """One client's connection and ours to the upstream."""

    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._up_reader, self._up_writer = up_reader, up_writer
        self._answered = 0  # bytes of the present answer
        self._mine = False  # whether the present request is to be hurt
        self.broken = False

    async def forth(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_CHUNK):
                plan = self._proxy.plan
                if not plan.where or data.startswith(_VERBS):
                    self._begin(data, plan)
                if self._mine and plan.fault == "refuse":
                    self.broken = True
                    return
                if self._mine and plan.fault == "hole":
                    await asyncio.sleep(_FOREVER_S)
                if self._mine and plan.fault == "status":
                    head = b"HTTP/1.1 %d Planted\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    self._writer.write(head % plan.status)
                    await self._writer.drain()
                    return
                self._up_writer.write(data)
                await self._up_writer.drain()

    def _begin(self, data: bytes, plan: Plan) -> None:
        proxy = self._proxy
        self._answered = 0
        self._mine = plan.fault != "pass" and plan.where in data.split(b"\r\n", 1)[0]
        proxy.requests += plan.where in data.split(b"\r\n", 1)[0]
        if self._mine:
            self._mine = proxy.hurt < plan.times
            proxy.hurt += self._mine

    async def back(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._up_reader.read(_CHUNK):
                plan = self._proxy.plan
                fault = plan.fault if self._mine else "pass"
                begin, end = self._answered, self._answered + len(data)
                self._answered = end
                if fault in ("cut", "stall", "flip") and begin <= plan.at < end:
                    here = plan.at - begin
                    if fault != "flip":
                        self._writer.write(data[:here])
                        await self._writer.drain()
                        if fault == "stall":
                            await asyncio.sleep(_FOREVER_S)
                        self.broken = True
                        return
                    data = data[:here] + bytes([data[here] ^ 1]) + data[here + 1 :]
                if fault == "hole":
                    await asyncio.sleep(_FOREVER_S)
                if fault == "latency":
                    await asyncio.sleep(plan.at / 1000)
                await self._pass_on(data, drip=fault == "drip")

    async def _pass_on(self, data: bytes, *, drip: bool) -> None:
        step = _DRIP_BYTES if drip else len(data)
        for begin in range(0, len(data), step):
            self._writer.write(data[begin : begin + step])
            await self._writer.drain()
            if drip:
                await asyncio.sleep(_DRIP_S if self._proxy.plan.fault == "drip" else 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Hang up with a RST."""
    connection: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
