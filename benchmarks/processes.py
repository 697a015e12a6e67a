"""What do worker processes cost in memory, and how much of an index do they share?

    python -m benchmarks.processes [--save] [--rows 400000]

The shipped bundle, its index replaced by random unit vectors with a reply each, is served by 1, 2 and 4 workers, with
pages of their own and with shared ones. After every worker has answered, resident memory (RSS, in which a page that is
shared counts for each) and proportional memory (PSS, in which it counts once) of all of them are added up. The file of
the vectors alone is the yardstick: shared, N workers should hold one copy of it, and of their own N.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.result import at_least, emit
from index.build import Entry
from index.build import build as build_index
from index.matrix import Pages
from nlu import canaries, parts
from nlu.crew import Workers
from nlu.memory import rss_bytes
from nlu.settings import Settings, shipped_bundle
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle, build

COUNTS = (1, 2, 4)
PAGES: tuple[Pages, ...] = ("own", "shared")
CALLS = 40  # each over a connection of its own, so that every worker answers


def main() -> None:
    """Build, serve, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--rows", type=int, default=400_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as work:
        bundle, vectors_mb = larger(Path(work), rows)
        figures = {"vectors_mb": vectors_mb}
        for pages in PAGES:
            for count in COUNTS:
                told = asyncio.run(measure(bundle, count, pages))
                figures |= {f"{pages}_{count}_{name}": value for name, value in told.items()}
    for pages in PAGES:
        more = (figures[f"{pages}_4_pss_mb"] - figures[f"{pages}_1_pss_mb"]) / 3
        figures[f"{pages}_each_further_mb"] = more
    saved = (figures["own_each_further_mb"] - figures["shared_each_further_mb"]) / vectors_mb
    figures["saved_by_each_further_over_vectors"] = saved
    bars = [at_least("memory that a further worker saves with shared pages, over the vectors", saved, 0.9)]
    emit("processes", figures, bars)


def larger(work: Path, rows: int) -> tuple[Bundle, float]:
    """The shipped bundle with an index of so many random vectors, and how large these are."""
    shipped = shipped_bundle()
    made = shutil.copytree(shipped, work / "parts", ignore=shutil.ignore_patterns("manifest.json", "index.*"))
    vectorizer = Vectorizer(made / "vectorizer.sentence")
    index, chance = made / "index.chitchat", np.random.default_rng(0)
    vectors = chance.standard_normal((rows, vectorizer.dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [Entry(f"r{row}", f"reply number {row}", "") for row in range(rows)]
    build_index(
        entries, vectors, index, personas=("calm", "lively"), surfaces=("speaker", "tv"), kind="exact"
    )
    canaries.write(index, vectorizer)
    bundle = build(parts.collect(made), work / "bundle", channel="dev", requires_service=">=0.1.0.dev0,<1")
    shutil.rmtree(made)
    return bundle, sum(file.stat().st_size for file in (bundle.path / "index.chitchat").glob("*.f16")) / 1e6


async def measure(bundle: Bundle, count: int, pages: Pages) -> dict[str, float]:
    """Memory of all workers once each has answered, and how long the load took."""
    settings = Settings(
        processes=count, port=0, metrics=False, index_pages=pages, max_deadline_s=60, deadline_s=60
    )
    workers = Workers(settings)
    port = await workers.start()
    try:
        began = time.monotonic()
        await workers.prepare(bundle)
        await workers.flip()
        seconds = time.monotonic() - began
        for number in range(CALLS):
            await ask(port, f"tell me something number {number}")
        rss = sum(rss_bytes(pid) for pid in workers.pids.values())
        return {"rss_mb": rss / 1e6, "pss_mb": workers.rss_bytes() / 1e6, "load_s": seconds}
    finally:
        await workers.drain()


async def ask(port: int, text: str) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        await stub.Understand(pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=text)]), timeout=60)


if __name__ == "__main__":
    main()
