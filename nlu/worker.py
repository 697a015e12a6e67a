"""One of several processes behind a port: it does what its supervisor (nlu/crew.py) says, and ends when that is gone.

`python -m nlu.worker FD` with the supervisor's NLU_* variables; FD is its end of the socket between them.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import generate_latest

from nlu import logs, metrics
from nlu.errand import errand, leave
from nlu.errors import NluError
from nlu.lines import Body, Lines, bundle_in, error_out, release_in
from nlu.serve import Server, settle
from nlu.settings import Settings
from statics.bundle import Bundle
from statics.errors import DigestMismatch, StaticsError
from statics.manifest import manifest_digest, parse
from statics.verify import check_files, read_manifest

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FORESEEN = (NluError, StaticsError, ValueError, OSError)  # they say what to do


def main() -> None:
    """Entry point. Ends with status 0 when it was drained, whoever asked for it."""
    _end_with_parent()
    # A terminal sends it to the whole group; the supervisor says what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = Settings()
    logs.configure(settings)
    settle(settings)
    asyncio.run(work(settings, socket.socket(fileno=int(sys.argv[1]))))
    leave()


async def work(settings: Settings, end: socket.socket) -> None:
    """Until told to drain, by the supervisor, its end or SIGTERM."""
    lines = await Lines.over(end)
    hello = await lines.receive()
    if hello is None:
        return
    try:
        server = Server(settings, reuse_port=True)
    except _FORESEEN as error:  # the supervisor says it, once for all its workers
        lines.send({"id": hello["id"], "error": error_out(error)})
        lines.close()
        await lines.closed()
        return
    lines.send({"id": hello["id"], "answer": {}})
    worker = Worker(server, lines)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop.set)
    reading = asyncio.create_task(worker.read(), name="supervisor")
    await worker.stop.wait()
    logger.info("draining: up to %.0f s for calls under way", settings.drain_s)
    await worker.drain()
    reading.cancel()


class Worker:
    """A Server, as its supervisor's orders reach it. Each is answered once, with what was asked or with the error."""

    def __init__(self, server: Server, lines: Lines) -> None:
        self.stop = asyncio.Event()
        self._server, self._lines = server, lines
        self._doing: set[asyncio.Task[None]] = set()
        self._preparing: asyncio.Task[None] | None = None
        self._answers: dict[str, Callable[[Body], Awaitable[Body]]] = {
            "hello": self._hello,
            "prepare": self._prepare,
            "flip": self._flip,
            "abandon": self._abandon,
            "tell": self._tell,
            "listen": self._listen,
            "serving": self._serving,
            "metrics": self._metrics,
            "drain": self._drain,
        }

    async def read(self) -> None:
        """Take orders until there is nobody left to give any. Orders overtake each other: a load may take minutes."""
        try:
            while (order := await self._lines.receive()) is not None:
                task = asyncio.create_task(self._do(order))
                self._doing.add(task)
                task.add_done_callback(self._doing.discard)
        except ValueError as error:
            logger.error("the supervisor sent what is no order: %s", error)
        if not self.stop.is_set():
            logger.error("the supervisor is gone: stopping")
        self.stop.set()

    async def drain(self) -> None:
        """Lose none of the calls that were accepted, then say what was counted, and goodbye."""
        await self._server.drain()
        self._lines.send({"farewell": _exposition()})
        for task in self._doing:  # a load that is under way brings nothing any more
            task.cancel()
        self._lines.close()
        await self._lines.closed()

    async def _do(self, order: Body) -> None:
        try:
            answer = await self._answers[order["what"]](order)
        except Exception as error:
            if not isinstance(error, _FORESEEN):
                logger.error("%s failed", order["what"], exc_info=error)
            self._lines.send({"id": order["id"], "error": error_out(error)})
        else:
            self._lines.send({"id": order["id"], "answer": answer})

    async def _hello(self, order: Body) -> Body:
        return {}

    async def _prepare(self, order: Body) -> Body:
        bundle = await errand(bundle_at, *bundle_in(order["bundle"]), whole=bool(order["whole"]))
        self._preparing = asyncio.create_task(self._server.prepare(bundle))
        await self._preparing
        return {}

    async def _flip(self, order: Body) -> Body:
        await self._server.flip(order["at_us"] / 1e6)
        return {}

    async def _abandon(self, order: Body) -> Body:
        if self._preparing is not None:
            self._preparing.cancel()
        await self._server.abandon()
        return {}

    async def _tell(self, order: Body) -> Body:
        self._server.tell(release_in(order["release"]))
        return {}

    async def _listen(self, order: Body) -> Body:
        await self._server.start()
        return {}

    async def _serving(self, order: Body) -> Body:
        pipeline = self._server.desk.pipeline
        return {"digest": "" if pipeline is None else pipeline.engine.bundle.digest}

    async def _metrics(self, order: Body) -> Body:
        return {"text": _exposition()}

    async def _drain(self, order: Body) -> Body:
        self.stop.set()
        return {}


def bundle_at(path: Path, digest: str, *, whole: bool) -> Bundle:
    """The bundle there, which the supervisor verified; `whole` where that may be long ago: every byte is read again.

    Raises StaticsError for another bundle, or one that changed.
    """
    raw, _ = read_manifest(path, shared=True)
    if manifest_digest(raw) != digest:
        raise DigestMismatch(
            part=str(path), found=f"bundle {manifest_digest(raw)[:12]}", expected=digest[:12],
            remedy="leave the folder of a served bundle alone; pull it again",
        )  # fmt: skip
    manifest = parse(raw)
    if whole:
        check_files(path, manifest, shared=True)
    return Bundle(path, manifest, digest)


def _exposition() -> str:
    return generate_latest(metrics.REGISTRY).decode()


def _end_with_parent() -> None:
    """SIGTERM when the supervisor ends, where the system has that; the end of the socket says so everywhere."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


if __name__ == "__main__":
    main()
