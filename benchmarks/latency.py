"""What does Understand cost beside the least it could cost: a bare gRPC echo, and one bare run of the model?

    python -m benchmarks.latency [--bundle DIR] [--seconds S] [--save]

Servers and client are separate processes; the servers share one core and the client has the other, where there are two.
Every figure is measured in interleaved rounds of one run, so ratios hold when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from benchmarks.result import at_least, at_most, emit
from nlu import content
from nlu.cold import ColdTable
from nlu.normalizer import normalize
from nlu.record import key
from nlu.settings import shipped_bundle
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import Vectorizer

ROUNDS = 5
CONCURRENCY = 32
UNDERSTAND = "/nlu.v1.Nlu/Understand"

Call = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    with _servers(arguments.bundle) as (served, echo):
        figures = asyncio.run(_measure(arguments.bundle, served, echo, arguments.seconds))
    figures |= _ratios(figures)
    bars = [
        at_most("uncached p50, concurrency 1, over (echo + model)", figures["uncached_p50_ratio"], 1.8),
        at_most("LRU p50, concurrency 1, over echo", figures["lru_p50_ratio"], 2.0),
        at_most("cold table p50, concurrency 1, over echo", figures["cold_p50_ratio"], 2.0),
        at_least("LRU throughput, concurrency 32, over echo", figures["lru_throughput_ratio"], 0.5),
        at_most("kept answer p50, concurrency 1, over echo", figures["answer_p50_ratio"], 2.0),
        at_least(
            "kept answer throughput, concurrency 32, over echo", figures["answer_throughput_ratio"], 0.7
        ),
    ]
    emit("latency", figures, bars, bundle=arguments.bundle.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped_bundle())
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure and round")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    return parser.parse_args()


@contextlib.contextmanager
def _servers(bundle: Path) -> Iterator[tuple[dict[str, str], str]]:
    """One real server per way of caching, and a bare echo; all on the first core, this process on the last."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = _free_port()
        stack.enter_context(
            _process(["redis-server", "--port", str(redis), "--save", "", "--dir", str(scratch)], cores)
        )
        served = {}
        for name, settings in {
            "answers": {},  # as it comes: whole answers are kept
            "near": {"NLU_ANSWERS_BYTES": "0"},  # LRU and cold table
            "none": {"NLU_ANSWERS_BYTES": "0", "NLU_LRU_BYTES": "0"},
            "redis": {
                "NLU_ANSWERS_BYTES": "0",
                "NLU_LRU_BYTES": "0",
                "NLU_REDIS": f"redis://127.0.0.1:{redis}/0",
            },
        }.items():
            served[name] = stack.enter_context(serving(bundle, settings))
        port = _free_port()
        stack.enter_context(_process([sys.executable, "-m", "benchmarks.echo", str(port)], cores[:1]))
        os.sched_setaffinity(0, cores[-1:])
        yield served, f"127.0.0.1:{port}"
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def serving(bundle: Path, settings: dict[str, str]) -> Iterator[str]:
    """One real server, as its address."""
    port = _free_port()
    command = [sys.executable, "-m", "nlu", "serve", "--bundle", str(bundle), "--port", str(port)]
    quiet = {"NLU_METRICS": "false", "NLU_LOG_LEVEL": "WARNING"}
    with _process(command, sorted(os.sched_getaffinity(0)), quiet | settings):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _process(command: list[str], cores: list[int], extra: dict[str, str] | None = None) -> Iterator[None]:
    if shutil.which(command[0]) is None:
        sys.exit(f"benchmarks.latency: {command[0]} is not installed")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | (extra or {}))
    os.sched_setaffinity(process.pid, cores[:1])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Phrases:
    """Requests: ever new ones (a known phrase with a number in words, so that no tier has it), and a fixed hundred."""

    def __init__(self, bundle: Path) -> None:
        said = [normalize(phrase).text for phrase in content.load().phrases()]
        vectorizer = Vectorizer(next(bundle.glob("vectorizer.*")))
        table = ColdTable(next(bundle.glob("cold.*")))
        held = [phrase for phrase in said if table.get(key(vectorizer.fingerprint, phrase)) is not None]
        free = [phrase for phrase in said if table.get(key(vectorizer.fingerprint, phrase)) is None]
        self.vectorizer = vectorizer
        self.cold = [_request(phrase) for phrase in held[:: len(held) // 100][:100]]
        self.fixed = [_request(phrase) for phrase in free[:: len(free) // 100][:100]]
        self._free = free
        self._count = 0

    def new_phrase(self) -> str:
        """A phrase nobody has said."""
        self._count += 1
        base = self._free[self._count % len(self._free)]
        return f"{base} {_WORDS[self._count % 97]} {_WORDS[self._count // 97 % 97]}"

    def new(self) -> bytes:
        """A request nobody has made."""
        return _request(self.new_phrase())

    def among(self, requests: list[bytes]) -> Callable[[], bytes]:
        """The requests, round and round."""
        count = iter(range(1 << 60))
        return lambda: requests[next(count) % len(requests)]


_WORDS = [f"{tens} {ones}" for tens in ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "one", "two", "three") for ones in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")][:97]  # fmt: skip


def _request(phrase: str) -> bytes:
    return pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=phrase)]).SerializeToString()


async def _measure(bundle: Path, served: dict[str, str], echo: str, seconds: float) -> dict[str, float]:
    phrases = _Phrases(bundle)
    async with contextlib.AsyncExitStack() as stack:
        calls = {}
        for name, address in {**served, "echo": echo}.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            await asyncio.wait_for(channel.channel_ready(), 60)
            calls[name] = channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)
        fixed, cold = phrases.among(phrases.fixed), phrases.among(phrases.cold)
        for body in (*phrases.fixed, *phrases.cold):
            await calls["near"](body)
            await calls["answers"](body)
            await calls["redis"](body)
        ways = {
            "uncached": (calls["none"], phrases.new),
            "lru": (calls["near"], fixed),
            "cold": (calls["none"], cold),
            "redis": (calls["redis"], fixed),
            "answer": (calls["answers"], fixed),
            "echo": (calls["echo"], fixed),
        }
        alone: dict[str, list[float]] = {name: [] for name in ways}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        model: list[float] = []
        for _ in range(ROUNDS):
            for name, (call, request) in ways.items():
                alone[name] += await _latencies(call, request, seconds)
            model += _model(phrases, seconds)
            for name, (call, request) in ways.items():
                rates[name].append(await _throughput(call, request, seconds))
    figures = {}
    for name, taken in alone.items():
        figures[f"{name}_p50_ms"], figures[f"{name}_p99_ms"] = _quantiles(taken)
        figures[f"{name}_per_s_at_{CONCURRENCY}"] = statistics.median(rates[name])
    figures["model_p50_ms"], figures["model_p99_ms"] = _quantiles(model)
    return figures


async def _latencies(call: Call, request: Callable[[], bytes], seconds: float) -> list[float]:
    taken = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        body = request()
        began = time.perf_counter()
        await call(body)
        taken.append(time.perf_counter() - began)
    return taken


async def _throughput(call: Call, request: Callable[[], bytes], seconds: float) -> float:
    done = 0
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await call(request())
            done += 1

    await asyncio.gather(*(caller() for _ in range(CONCURRENCY)))
    return done / (time.perf_counter() - began)


def _model(phrases: _Phrases, seconds: float) -> list[float]:
    """One bare run of the model: tokenizer, session, both outputs; no queue, no thread, on this process's core."""
    taken = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        phrase = phrases.new_phrase()
        began = time.perf_counter()
        phrases.vectorizer.encode([phrase])
        taken.append(time.perf_counter() - began)
    return taken


def _quantiles(taken: list[float]) -> tuple[float, float]:
    milliseconds = np.array(taken) * 1000
    return float(np.quantile(milliseconds, 0.5)), float(np.quantile(milliseconds, 0.99))


def _ratios(figures: dict[str, float]) -> dict[str, float]:
    floor = figures["echo_p50_ms"] + figures["model_p50_ms"]
    rate = figures[f"echo_per_s_at_{CONCURRENCY}"]
    return {
        "uncached_p50_ratio": figures["uncached_p50_ms"] / floor,
        **{
            f"{name}_p50_ratio": figures[f"{name}_p50_ms"] / figures["echo_p50_ms"]
            for name in ("lru", "cold", "redis", "answer")
        },
        **{
            f"{name}_throughput_ratio": figures[f"{name}_per_s_at_{CONCURRENCY}"] / rate
            for name in ("uncached", "lru", "cold", "redis", "answer")
        },
    }


if __name__ == "__main__":
    main()
