"""How fast is a reply found among 660,000, how near to the best, and what do the others take?

    python -m benchmarks.retrieval [--save] [--rows 660000] [--ef-construction 256] [--peers faiss-plain hnswlib usearch milvus-lite]

Rows and queries are real phrases (benchmarks/phrases.py); queries are 2,000 dialog turns that are not among the rows.
The machine's read bandwidth is the most that summing an array of the index's size reaches, on as many threads as there
are cores. The exact scan reads the index once, so it is compared with that. Single queries along the graph use one
thread. Peers run one after another, each in a process of its own, over the same files (benchmarks/stores.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import phrases, stores
from benchmarks.result import Bar, at_least, at_most, emit
from index.build import Entry, Writer
from index.graph import build_graph
from index.layout import GraphFiles, read_layout
from index.search import Hits, Index
from index.sharded import ShardedIndex
from nlu.progress import Bar as Progress

FOLDER = Path(".cache/retrieval")
K = 10
SEED = 0
SPARE = 2_000  # phrases beyond those needed, because some have equal vectors
TIMED = 400  # queries that are timed one by one
WIDTHS = (32, 48, 64, 96, 128, 192, 256)
BATCH = 64


def main() -> None:
    """Build once, measure, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--rows", type=int, default=660_000)
    parser.add_argument("--ef-construction", type=int, default=256)
    parser.add_argument("--peers", nargs="*", default=list(stores.PEERS))
    chosen = parser.parse_args()
    folder = prepared(chosen.rows)
    queries = np.fromfile(folder / "queries.f16", "<f2").astype(np.float32).reshape(phrases.QUERIES, -1)
    figures, bars = measured(folder, queries, chosen.ef_construction)
    others = {peer: stores.run(peer, folder, ef_construction=chosen.ef_construction) for peer in chosen.peers}
    emit("retrieval", figures, bars, peers=json.dumps(others))


def prepared(rows: int) -> Path:
    """The rows, the queries, the true answers and an index of the rows, made once for each number of rows."""
    folder = FOLDER / str(rows)
    if (folder / "truth.i64").exists():
        return folder
    every = phrases.vectors(rows + phrases.QUERIES + SPARE)
    # Some phrases that differ have equal vectors: the vectorizer reads them alike.
    distinct = np.sort(np.unique(every.view(f"V{every.itemsize * every.shape[1]}"), return_index=True)[1])
    distinct = distinct[: rows + phrases.QUERIES]
    turns = int(np.searchsorted(distinct, phrases.turns()))
    asked = np.sort(np.random.default_rng(SEED).choice(turns, phrases.QUERIES, replace=False))
    kept = np.delete(distinct, asked)
    folder.mkdir(parents=True, exist_ok=True)
    queries = np.ascontiguousarray(every[distinct[asked]])
    queries.tofile(folder / "queries.f16")
    every[kept].tofile(folder / "rows.f16")
    _write_index(folder / "index", every, kept)
    found = ShardedIndex.load(folder / "index").search_many(queries.astype(np.float32), K)
    np.stack([hits.rows for hits in found]).astype("<i8").tofile(folder / "truth.i64")
    return folder


def _write_index(out: Path, every: NDArray[np.float16], kept: NDArray[np.int64]) -> None:
    """An index as `nlu index build` writes it, of replies that are found by their own vectors."""
    texts = phrases.phrases(len(every))
    with Writer(out, every.shape[1], personas=("calm", "lively"), surfaces=()) as index, Progress() as bar:
        for start in range(0, len(kept), phrases.CHUNK):
            some = kept[start : start + phrases.CHUNK]
            entries = [Entry(id=f"{row}", text=texts[row], prompt="") for row in some.tolist()]
            index.add(entries, every[some].astype(np.float32))
            bar.step("rows written", start + len(some), len(kept))
        index.finish()


def measured(
    folder: Path, queries: NDArray[np.float32], ef_construction: int
) -> tuple[dict[str, float], list[Bar]]:
    """Ours: the scan, the graph, batches, filters."""
    truth = np.fromfile(folder / "truth.i64", "<i8").reshape(len(queries), K)
    exact = ShardedIndex.load(folder / "index")
    rows, nbytes = len(exact), exact.rows.nbytes
    one = ShardedIndex.load(folder / "index", threads=1)
    shared = ShardedIndex.load(folder / "index", pages="shared")
    figures: dict[str, float] = {"rows": rows, "dim": exact.dim}

    bandwidth = read_bandwidth(nbytes)
    scan = times(exact, queries[:TIMED])
    figures |= {
        "read_gb_s": bandwidth / 1e9,
        "exact_p50_ms": scan[0],
        "exact_p99_ms": scan[1],
        "exact_shared_pages_p50_ms": times(shared, queries[:100])[0],
        "exact_one_core_p50_ms": times(one, queries[:100])[0],
        "exact_read_share": nbytes / (scan[0] / 1e3) / bandwidth,
        "exact_batch_ms_a_query": batch(exact, queries),
        "bytes_a_row_vectors": nbytes / rows,
        "bytes_a_row_items": (folder / "index" / "items.arrow").stat().st_size / rows,
    }
    graph, seconds = _graph(folder, exact, ef_construction)
    figures |= {
        "graph_build_s": seconds,
        "bytes_a_row_graph": sum(file.stat().st_size for file in graph.glob("graph-*")) / rows,
    }
    walk = ShardedIndex.load(graph, threads=1)
    assert walk.graph is not None
    for width in WIDTHS:
        walk.graph.ef = width
        p50, p99 = times(walk, queries[:TIMED])
        figures |= {
            f"graph_{width}_recall": recall([walk.search(query, K) for query in queries], truth),
            f"graph_{width}_p50_ms": p50,
            f"graph_{width}_p99_ms": p99,
        }
    enough = [width for width in WIDTHS if figures[f"graph_{width}_recall"] >= 0.99]
    served = enough[0] if enough else WIDTHS[-1]
    walk.graph.ef = served
    figures |= {
        "graph_ef": served,
        "graph_recall": figures[f"graph_{served}_recall"],
        "graph_p50_ms": figures[f"graph_{served}_p50_ms"],
    }
    many = ShardedIndex.load(graph)
    assert many.graph is not None
    many.graph.ef = served
    figures["graph_batch_ms_a_query"] = batch(many, queries)
    del many
    for share in (0.9, 0.5, 0.1, 0.01):
        mask = np.packbits(np.random.default_rng(SEED).random(rows) < share, bitorder="little")
        mask.flags.writeable = False
        figures[f"exact_filter_{share}_ratio"] = ratio(exact, queries[:TIMED], mask)
        figures[f"graph_filter_{share}_ratio"] = ratio(walk, queries[:TIMED], mask)
        true = np.stack([hits.rows for hits in exact.search_many(queries, K, mask=mask)])
        figures[f"graph_filter_{share}_recall"] = recall(
            [walk.search(q, K, mask=mask) for q in queries], true
        )
    bars = [
        at_least("exact scan, share of read bandwidth", figures["exact_read_share"], 0.75),
        at_least("graph, recall@10", figures["graph_recall"], 0.99),
        at_most("graph, p50 in ms on one thread", figures["graph_p50_ms"], 0.3),
        at_most("exact, half of the rows allowed, over all", figures["exact_filter_0.5_ratio"], 1.5),
        at_most("graph, half of the rows allowed, over all", figures["graph_filter_0.5_ratio"], 1.5),
    ]
    return figures, bars


def _graph(folder: Path, exact: ShardedIndex, ef_construction: int) -> tuple[Path, float]:
    """The index with a graph beside it, and how long linking took."""
    out = folder / f"graph-{ef_construction}"
    if not (out / "seconds.json").exists():
        out.mkdir(exist_ok=True)
        for file in (folder / "index").iterdir():
            (out / file.name).unlink(missing_ok=True)
            os.link(file, out / file.name)
        with Progress() as bar:
            began = time.perf_counter()
            files: GraphFiles = build_graph(
                exact.rows,
                out,
                ef_construction=ef_construction,
                progress=lambda done, all_: bar.step("rows linked", done, all_),
            )
            seconds = time.perf_counter() - began
        (out / "index.json").unlink()
        read_layout(folder / "index").model_copy(update={"graph": files}).save(out)
        (out / "seconds.json").write_text(json.dumps(seconds))
    return out, float(json.loads((out / "seconds.json").read_text()))


def read_bandwidth(nbytes: int) -> float:
    """Bytes a second, the best of several readers over several rounds."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(nbytes // 8, np.int64), cores)
    readers: list[Callable[[NDArray[Any]], object]] = [
        np.sum, np.max, lambda part: np.dot(part.view(np.float32), part.view(np.float32)), lambda part: np.bitwise_or.reduce(part),
    ]  # fmt: skip
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for reader in readers:
            for _ in range(7):
                began = time.perf_counter()
                list(pool.map(reader, parts))
                best = max(best, nbytes / (time.perf_counter() - began))
    return best


def times(
    index: Index, queries: NDArray[np.float32], mask: NDArray[np.uint8] | None = None
) -> tuple[float, float]:
    """Milliseconds of a single query: median and 99th percentile."""
    taken = []
    for query in queries:
        began = time.perf_counter()
        index.search(query, K, mask=mask)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken), float(np.quantile(taken, 0.99))


def ratio(index: Index, queries: NDArray[np.float32], mask: NDArray[np.uint8]) -> float:
    """With a filter over without, in turns, so that both meet the same machine."""
    with_, without = [], []
    for start in range(0, len(queries), 20):
        some = queries[start : start + 20]
        without.append(times(index, some)[0])
        with_.append(times(index, some, mask)[0])
    return statistics.median(with_) / statistics.median(without)


def batch(index: Index, queries: NDArray[np.float32]) -> float:
    """Milliseconds a query, in batches, all cores."""
    taken = []
    for start in range(0, min(len(queries), 8 * BATCH), BATCH):
        began = time.perf_counter()
        index.search_many(queries[start : start + BATCH], K)
        taken.append(1e3 * (time.perf_counter() - began) / BATCH)
    return statistics.median(taken)


def recall(found: Sequence[Hits], truth: NDArray[np.int64]) -> float:
    """Share of the true ten that were found."""
    return statistics.fmean(
        len(set(hits.rows.tolist()) & set(row.tolist())) / len(row)
        for hits, row in zip(found, truth, strict=True)
    )


if __name__ == "__main__":
    main()
