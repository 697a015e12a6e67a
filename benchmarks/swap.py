"""What do callers notice of a head that is added, replaced and removed while they ask?

    python -m benchmarks.swap [--save]

Callers ask a real gRPC server without a pause; every answer is computed anew. Each change is a bundle of its own, loaded
beside the engine that serves and then put in its place. What every other head says of a phrase is compared, byte for byte,
with what it said before the first change.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

import grpc
import numpy as np

from annotators.linear import single_threaded
from annotators.sentence import SentenceHead
from benchmarks.result import at_least, at_most, emit
from nlu import canaries, content, loading
from nlu.engine import Engine
from nlu.heads import lifecycle
from nlu.serve import pipeline_of
from nlu.settings import Settings, shipped_bundle
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle
from statics.verify import verify
from statics.version import service_version
from tests.test_one_candidate import serving

NAME = "newcomer"  # the head that comes, changes and goes
CALLERS = 8
PHRASES = 100
SECONDS = 4.0  # of calls before each change and after the last


def main() -> None:
    """Swap under load; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.parse_args()
    shipped = verify(shipped_bundle(), service=service_version(), shared=True)
    engine = loading.load(shipped)
    with tempfile.TemporaryDirectory() as work, single_threaded(True):  # as `nlu serve` computes
        bundles = _changed(shipped, engine, Path(work))
        calls, loads = asyncio.run(_swapped(engine, bundles))
    changed = sum(count for name, count in calls.changed.items() if name != NAME)
    figures = {
        "calls": float(len(calls.alone_ms) + len(calls.beside_ms)),
        "lost": float(calls.lost),
        "annotations_compared": float(calls.compared),
        "annotations_changed": float(changed),
        "annotations_of_the_replaced_head_changed": float(calls.changed[NAME]),  # else nothing was swapped
        "engines_that_answered": float(len(calls.engines)),
        "load_p50_ms": float(np.median(loads)),
    }
    for when, taken in (("alone", calls.alone_ms), ("beside_a_load", calls.beside_ms)):
        for quantile in (50, 99):
            figures[f"p{quantile}_ms_{when}"] = float(np.percentile(taken, quantile))
    bars = [
        at_most("requests lost", calls.lost, 0),
        at_most("answers of other heads that changed by a bit", changed, 0),
        at_least("engines that answered", len(calls.engines), len(bundles) + 1),
    ]
    emit("swap", figures, bars, bundle=shipped.digest)


@dataclass
class Calls:
    """What the callers got."""

    first: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (phrase, head) -> what it said first
    engines: Counter[str] = field(default_factory=Counter)  # bundle -> replies
    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)  # while the next engine is loaded
    lost: int = 0
    compared: int = 0
    changed: Counter[str] = field(default_factory=Counter)  # head -> answers that are not its first
    loading: bool = False

    def take(self, text: str, reply: pb.UnderstandReply, milliseconds: float) -> None:
        """Compare and count one reply."""
        (self.beside_ms if self.loading else self.alone_ms).append(milliseconds)
        self.engines[reply.versions.bundle] += 1
        for annotation in reply.annotations:
            said = annotation.SerializeToString(deterministic=True)
            self.changed[annotation.name] += self.first.setdefault((text, annotation.name), said) != said
            self.compared += 1


async def _swapped(engine: Engine, bundles: Sequence[Bundle]) -> tuple[Calls, list[float]]:
    """What came back, and milliseconds of each load, while bundle after bundle takes the place of the one before."""
    settings = Settings(metrics=False, workers=1, answers_bytes=0)
    said = content.load().phrases()
    said = said[:: len(said) // PHRASES][:PHRASES]
    calls, loads = Calls(), []
    async with AsyncExitStack() as stack:
        pipeline = await stack.enter_async_context(pipeline_of(engine, settings))
        desk, stub = await stack.enter_async_context(serving(pipeline))
        await _call(stub, said, calls, asyncio.Event())  # every phrase once, before anything changes
        enough = asyncio.Event()
        starts = [PHRASES * i // CALLERS for i in range(CALLERS)]
        callers = [
            asyncio.create_task(_call(stub, islice(cycle(said), start, None), calls, enough))
            for start in starts
        ]
        for bundle in bundles:
            await asyncio.sleep(SECONDS)
            calls.loading, began = True, time.perf_counter()
            engine = await asyncio.to_thread(loading.load, bundle, before=engine)
            loads.append((time.perf_counter() - began) * 1000)
            calls.loading = False
            await desk.flip(await stack.enter_async_context(pipeline_of(engine, settings)))
        await asyncio.sleep(SECONDS)
        enough.set()
        await asyncio.gather(*callers)
    return calls, loads


async def _call(stub: NluStub, said: Iterable[str], calls: Calls, enough: asyncio.Event) -> None:
    """Ask one phrase after the other, until it is enough."""
    for text in said:
        if enough.is_set():
            return
        began = time.perf_counter()
        try:
            reply = await stub.Understand(
                pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=text)]), timeout=5
            )
        except grpc.aio.AioRpcError:
            calls.lost += 1
        else:
            calls.take(text, reply, (time.perf_counter() - began) * 1000)


def _changed(shipped: Bundle, engine: Engine, work: Path) -> list[Bundle]:
    """The shipped bundle with a head more, with another in its place, and without it again."""
    domain = engine.fleet.heads["domain"]
    if not isinstance(domain, SentenceHead):
        raise SystemExit(
            f"benchmarks.swap: found a head domain of kind {domain.spec.kind}, expected sentence"
        )
    head = replace(domain, spec=domain.spec.model_copy(update={"name": NAME, "golden": ()}))
    folders = [
        _saved(head, engine, work / "first"),
        _saved(replace(head, weight=-head.weight), engine, work / "second"),
    ]
    added = lifecycle.add(shipped, folders[0], work / "added")
    replaced = lifecycle.replace(added, folders[1], work / "replaced")
    return [added, replaced, lifecycle.remove(replaced, NAME, work / "removed")]


def _saved(head: SentenceHead, engine: Engine, folder: Path) -> Path:
    head.save(folder / f"head.{NAME}")
    canaries.write(folder / f"head.{NAME}", engine.vectorizer)
    return folder


if __name__ == "__main__":
    main()
