"""How long does a bad request take to be refused, and does it hold up a good one?

    python -m benchmarks.refusals [--bundle DIR] [--save]

Every bad input of tests/nlu/test_rpc.py is sent 50 times to a real server while another caller keeps asking good questions;
the good caller's times are compared with the same caller alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.latency import UNDERSTAND, Call, serving
from benchmarks.result import at_most, emit
from nlu.settings import shipped_bundle
from nlu.v1 import nlu_pb2 as pb
from tests.nlu.test_rpc import BAD, RAW

TIMES = 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped_bundle())
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    arguments = parser.parse_args()
    with serving(arguments.bundle, {"NLU_ANSWERS_BYTES": "0"}) as address:
        figures = asyncio.run(_measure(address))
    slowest = max(value for name, value in figures.items() if name.startswith("max_ms"))
    bars = [
        at_most("slowest refusal, ms", slowest, 20.0),
        at_most("refusals that were not INVALID_ARGUMENT", figures["wrong_codes"], 0),
        at_most("good calls that failed", figures["good_calls_failed"], 0),
    ]
    emit("refusals", figures, bars, bundle=arguments.bundle.name)


async def _measure(address: str) -> dict[str, float]:
    inputs = {name: request.SerializeToString() for name, request in BAD.items()} | RAW
    figures: dict[str, float] = {"wrong_codes": 0, "good_calls_failed": 0}
    async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(address) as other:
        await asyncio.wait_for(channel.channel_ready(), 60)
        call = channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)
        good = other.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)
        alone = await _good(good, figures, seconds=3)
        beside = asyncio.create_task(_good(good, figures, seconds=None))
        for name, raw in inputs.items():
            taken = []
            for _ in range(TIMES):
                began = time.perf_counter()
                code = await call(raw).code()
                taken.append((time.perf_counter() - began) * 1000)
                figures["wrong_codes"] += code is not grpc.StatusCode.INVALID_ARGUMENT
            figures[f"p50_ms {name}"] = statistics.median(taken)
            figures[f"max_ms {name}"] = max(taken)
        beside.cancel()
        disturbed = await beside
    for name, times in (("alone", alone), ("beside_bad", disturbed)):
        figures[f"good_p50_ms_{name}"] = float(np.quantile(times, 0.5))
        figures[f"good_p99_ms_{name}"] = float(np.quantile(times, 0.99))
    return figures


async def _good(call: Call, figures: dict[str, float], *, seconds: float | None) -> list[float]:
    """Milliseconds of good calls, one after the other, for some seconds or until cancelled."""
    body = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="play some jazz")]).SerializeToString()
    taken: list[float] = []
    stop = None if seconds is None else time.perf_counter() + seconds
    with contextlib.suppress(asyncio.CancelledError):
        while stop is None or time.perf_counter() < stop:
            began = time.perf_counter()
            code = await call(body).code()
            taken.append((time.perf_counter() - began) * 1000)
            figures["good_calls_failed"] += code is not grpc.StatusCode.OK
    return taken


if __name__ == "__main__":
    main()
