"""Callers in a process of their own: they ask at the times they were told to, whatever the answers do.

    python -m benchmarks.chaos.load ORDER.json RESULT.npz

Latency counts from the moment a call was meant to be sent. SIGTERM ends it; what is under way then is waited for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.chaos.rig import LOAD_CORE, Process, Rig
from benchmarks.chaos.toys import PROBES, facts, request
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub

BATCH = 32
CODES = ("OK", *(code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK))
SOURCES = tuple(pb.Source.keys())
# What UNAVAILABLE says of a call that no handler has seen: ours, no connection, and a connection that was closing.
_REFUSED = ("this server is stopping", "no bundle", "failed to connect", "Connection refused", "GOAWAY")


@dataclass(frozen=True)
class Order:
    """What to ask of whom.

    `rates` are (calls a second, seconds) one after the other; without any, `callers` ask one batch after the other until
    they are ended. `texts` is "probes" (judged by `known`: {probe: {toy: digest of facts}}), or "new": no two the same.
    """

    targets: tuple[str, ...]
    rates: tuple[tuple[float, float], ...] = ()
    callers: int = 0
    deadline_s: float = 1.0
    texts: str = "probes"
    words: int = 4
    retries: int = 0  # UNAVAILABLE, and CANCELLED by the server, is asked again of the next target
    channels: int = 4
    known: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seed: int = 1


@dataclass(frozen=True)
class Loaded:
    """What came back. Arrays are by call: `at` is the moment of intent on time.monotonic()."""

    at: NDArray[np.float64]
    ms: NDArray[np.float64]
    code: NDArray[np.int8]  # of CODES
    source: NDArray[np.int8]  # of SOURCES
    bundle: NDArray[np.int16]  # of bundles; -1: none
    bundles: tuple[str, ...]
    answers: dict[str, Counter[str]]  # bundle digest -> whose answers: a toy's name, "partial" or "nobody's"
    retried: int  # tries refused with UNAVAILABLE before the server had taken the call on
    torn: int  # tries that ended with UNAVAILABLE in any other way

    @property
    def ok(self) -> NDArray[np.bool_]:
        return np.equal(self.code, 0)

    def codes(self) -> Counter[str]:
        """Calls by status code."""
        return Counter(CODES[code] for code in self.code.tolist())


class Load:
    """The process, from outside."""

    def __init__(self, rig: Rig, order: Order, *, core: int | None = LOAD_CORE) -> None:
        folder = rig.work / f"load-{time.time_ns()}"
        folder.mkdir()
        self._result = folder / "result.npz"
        (folder / "order.json").write_text(json.dumps(asdict(order)))
        self.process: Process = rig.start(
            [sys.executable, "-m", "benchmarks.chaos.load", str(folder / "order.json"), str(self._result)],
            log=folder / "log",
            core=core,
        )
        self._began = folder / "result.began"

    def begun(self) -> Load:
        """Wait until it asks."""
        end = time.monotonic() + 60
        while not self._began.exists() and self.process.popen.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self

    def result(self, *, stop: bool = False, within_s: float = 600.0) -> Loaded:
        """Wait for its end (`stop`: end it now) and read what it found; RuntimeError where it failed."""
        if stop:
            self.process.popen.terminate()
        if self.process.popen.wait(within_s) != 0:
            raise RuntimeError(f"the load failed:\n{self.process.says()[-4000:]}")
        with np.load(self._result) as found:
            about = json.loads(str(found["about"]))
            return Loaded(
                **{name: found[name] for name in ("at", "ms", "code", "source", "bundle")},
                bundles=tuple(about["bundles"]),
                answers={digest: Counter(whose) for digest, whose in about["answers"].items()},
                retried=about["retried"],
                torn=about["torn"],
            )


def judged(known: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, str]]:
    """An oracle as an order carries it."""
    probes = next(iter(known.values()))
    return {probe: {_digest(answers[probe]): toy for toy, answers in known.items()} for probe in probes}


def difference(mine: Mapping[str, int], told: Mapping[str, int]) -> float:
    """How many calls client and server do not tell alike, by status code.

    A call whose time runs out at the client ends there as DEADLINE_EXCEEDED, whatever the server was about to say: it may
    count it as cancelled, late, refused or even answered. Where there are such calls only the sums are compared.
    """
    if mine.get("DEADLINE_EXCEEDED") or mine.get("CANCELLED"):
        return float(abs(sum(mine.values()) - sum(told.values())))
    return float(sum(abs(mine.get(name, 0) - told.get(name, 0)) for name in {*mine, *told}))


def wrong(answers: Mapping[str, Mapping[str, int]], toy: str) -> int:
    """Answers that are not this toy's; one that leaves something out, and says so, is not wrong."""
    return sum(
        count for whose in answers.values() for name, count in whose.items() if name not in (toy, "partial")
    )


class _Callers:
    def __init__(self, order: Order) -> None:
        self.order = order
        self._random = random.Random(order.seed)
        self._rows: list[tuple[float, float, int, int, int]] = []
        self._bundles: dict[str, int] = {}
        self._answers: dict[str, Counter[str]] = {}
        self._stop = asyncio.Event()
        self._channels = [
            [grpc.aio.insecure_channel(target, options=_options(i)) for i in range(order.channels)]
            for target in order.targets
        ]
        self._stubs = [[NluStub(channel) for channel in channels] for channels in self._channels]  # type: ignore[no-untyped-call]
        self._asked = 0
        self._retried: Counter[bool] = Counter()

    async def run(self, began: Path) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        await asyncio.gather(*(c.channel_ready() for channels in self._channels[:1] for c in channels))
        began.touch()
        if self.order.rates:
            await self._open_loop()
        else:
            await asyncio.gather(*(self._closed_loop() for _ in range(self.order.callers)))
        for channels in self._channels:
            for channel in channels:
                await channel.close(None)

    async def _open_loop(self) -> None:
        calls: set[asyncio.Task[None]] = set()
        at = time.monotonic()
        for rate, seconds in self.order.rates:
            end = at + seconds
            while at < end and not self._stop.is_set():
                if (pause := at - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                call = asyncio.create_task(self._call(at))
                calls.add(call)
                call.add_done_callback(calls.discard)
                at += 1 / rate
        await asyncio.gather(*calls)

    async def _closed_loop(self) -> None:
        while not self._stop.is_set():
            at = time.monotonic()
            texts = [self._text() for _ in range(BATCH)]
            batch = pb.UnderstandBatchRequest(requests=[request(text) for text in texts])
            code, digest, source = 0, "", 0
            try:
                reply = await self._stub(0).UnderstandBatch(batch, timeout=self.order.deadline_s)
            except grpc.aio.AioRpcError as error:
                code = CODES.index(error.code().name)
            else:
                for text, outcome in zip(texts, reply.outcomes, strict=True):
                    if outcome.HasField("problem"):
                        code = CODES.index(_name(outcome.problem.code))
                        continue
                    digest, source = outcome.reply.versions.bundle, outcome.reply.source
                    self._judge(text, outcome.reply)
            self._note(at, code, digest, source)

    async def _call(self, at: float) -> None:
        text, code, digest, source = self._text(), 0, "", 0
        for attempt in range(self.order.retries + 1):
            left = self.order.deadline_s - (time.monotonic() - at)
            try:
                reply = await self._stub(attempt).Understand(request(text), timeout=max(left, 0.001))
                code, digest, source = 0, reply.versions.bundle, reply.source
                self._judge(text, reply)
                break
            except grpc.aio.AioRpcError as error:
                code = CODES.index(error.code().name)
                # A server that stops ends what it has not looked at yet as CANCELLED, which no caller of ours asks for.
                unseen = error.code() is grpc.StatusCode.CANCELLED
                if error.code() is not grpc.StatusCode.UNAVAILABLE and not unseen:
                    break
                refused = unseen or any(words in (error.details() or "") for words in _REFUSED)
                if not refused:
                    print(error.details(), file=sys.stderr)
                self._retried[refused] += 1
        self._note(at, code, digest, source)

    def _stub(self, target: int) -> NluStub:
        self._asked += 1
        stubs = self._stubs[target % len(self._stubs)]
        return stubs[self._asked % len(stubs)]

    def _text(self) -> str:
        if self.order.texts == "probes":
            return self._random.choice(PROBES)
        return " ".join(_word(self._random) for _ in range(self.order.words))

    def _judge(self, text: str, reply: pb.UnderstandReply) -> None:
        if not self.order.known:
            return
        whose = self.order.known[text].get(_digest(facts(reply)), "nobody's")
        if whose == "nobody's" and reply.skipped:
            whose = "partial"
        self._answers.setdefault(reply.versions.bundle, Counter())[whose] += 1

    def _note(self, at: float, code: int, digest: str, source: int) -> None:
        bundle = -1 if not digest else self._bundles.setdefault(digest, len(self._bundles))
        self._rows.append((at, 1000 * (time.monotonic() - at), code, source, bundle))

    def save(self, path: Path) -> None:
        rows = np.array(self._rows, np.float64).reshape(-1, 5)
        about = {
            "bundles": list(self._bundles),
            "answers": self._answers,
            "retried": self._retried[True],
            "torn": self._retried[False],
        }
        np.savez(
            path,
            at=rows[:, 0],
            ms=rows[:, 1],
            code=rows[:, 2].astype(np.int8),
            source=rows[:, 3].astype(np.int8),
            bundle=rows[:, 4].astype(np.int16),
            about=json.dumps(about),
        )


def _options(i: int) -> tuple[tuple[str, int], ...]:
    """A connection of its own for each channel, and no retries of gRPC's: every answer is to be counted."""
    return (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.chaos", i),
    )


def _name(code: int) -> str:
    return next(each.name for each in grpc.StatusCode if each.value[0] == code)


def _word(chance: random.Random) -> str:
    return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 8)))


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Ask, then save."""
    order = Order(**json.loads(Path(arguments[0]).read_text()))
    result = Path(arguments[1])

    async def run() -> _Callers:
        callers = _Callers(order)
        await callers.run(result.with_suffix(".began"))
        return callers

    asyncio.run(run()).save(result)


if __name__ == "__main__":
    main(sys.argv[1:])
