"""How fast and how exact are the stores people would keep vectors in, over the same vectors as our index?

    python -m benchmarks.stores --make                                          # their environment, .cache/stores
    python -m benchmarks.stores --folder FOLDER [--peer faiss-plain hnswlib usearch milvus-lite]

FOLDER has rows.f16 `[n, 300]`, queries.f16 `[q, 300]` (float16, little-endian, of unit length) and truth.i64 `[q, 10]`,
the rows of each query's best ten by inner product. A peer is built on all cores in one process and measured in another,
which import NumPy and the peer alone; what is built stays for the next run. One JSON object a peer is printed; a peer
that fails is told with its error.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".cache" / "stores"
DIM, PADDED, TOP, M, EF_CONSTRUCTION = 300, 304, 10, 32, 128
WIDTHS = (32, 64, 128, 256)  # efSearch
FILTERED_WIDTH, FILTERED_QUERIES = 64, 200
SHARES = {"half": 0.5, "tenth": 0.1}  # of the rows, that a filter allows
ADD_ROWS, BATCH = 8192, 64
CORES = len(os.sched_getaffinity(0))
SECONDS, LEAST = 5.0, 5  # no call is begun after so many seconds of calls, unless there were too few

Rows = NDArray[np.float16]  # [rows, 300]
Queries = NDArray[np.float32]  # [queries, 300]
Found = NDArray[np.integer[Any]]  # [queries, 10], best first; -1 where there are fewer
Bits = NDArray[np.bool_]  # [rows], true where a row may be found


class Store(Protocol):
    """An index of a peer, exact or a graph. Its constructor imports the peer, which no figure counts."""

    def __init__(self, exact: bool) -> None: ...

    def build(self, rows: Rows, folder: Path, ef_construction: int) -> None:
        """Index the rows on all cores and leave files in the folder."""

    def load(self, folder: Path) -> None:
        """Make ready to search what `build` left there."""

    def threads(self, number: int) -> None:
        """So many for each search from now on."""

    def allow(self, name: str, bits: Bits) -> Any:
        """A filter in the peer's own form, for `search`; no figure counts the making of it."""

    def search(self, queries: Queries, width: int, allowed: Any = None) -> Found:
        """The best ten rows of each query; `width` is efSearch, 0 for an exact search."""


class Faiss:
    """`IndexScalarQuantizer` as FAISS's wiki has it, as wide as the vectors are. `IndexHNSWSQ` gets them padded to 304: at
    300 FAISS leaves its SIMD out, and linking 660,000 rows takes hours."""

    def __init__(self, exact: bool) -> None:
        self._faiss, self._exact = import_module("faiss"), exact

    def build(self, rows: Rows, folder: Path, ef_construction: int) -> None:
        fp16, metric = self._faiss.ScalarQuantizer.QT_fp16, self._faiss.METRIC_INNER_PRODUCT
        if self._exact:
            index = self._faiss.IndexScalarQuantizer(DIM, fp16, metric)
        else:
            index = self._faiss.IndexHNSWSQ(PADDED, fp16, M, metric)
            index.hnsw.efConstruction = ef_construction
        for first in range(0, len(rows), ADD_ROWS):
            index.add(self._wide(rows[first : first + ADD_ROWS].astype(np.float32)))
        self._faiss.write_index(index, str(folder / "index"))

    def load(self, folder: Path) -> None:
        self._index = self._faiss.read_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        self._faiss.omp_set_num_threads(number)

    def allow(self, name: str, bits: Bits) -> Any:
        return self._faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))

    def search(self, queries: Queries, width: int, allowed: Any = None) -> Found:
        if self._exact:
            params = self._faiss.SearchParameters(sel=allowed)
        else:
            params = self._faiss.SearchParametersHNSW(efSearch=width, sel=allowed)
        found: Found = self._index.search(self._wide(queries), TOP, params=params)[1]
        return found

    def _wide(self, vectors: Queries) -> Queries:
        return vectors if self._exact else np.pad(vectors, ((0, 0), (0, PADDED - DIM)))


class Hnswlib:
    """`BFIndex` and `Index`. Both give a single query one thread, however many they may have.

    With a filter `BFIndex` 0.8.0 finds nothing worse than the worst it allowed among its first ten rows: too few, rarely.
    """

    def __init__(self, exact: bool) -> None:
        hnswlib = import_module("hnswlib")
        self._exact, self._threads = exact, CORES
        self._index = (hnswlib.BFIndex if exact else hnswlib.Index)("ip", DIM)

    def build(self, rows: Rows, folder: Path, ef_construction: int) -> None:
        graph = {} if self._exact else {"M": M, "ef_construction": ef_construction}
        self._index.init_index(len(rows), **graph)
        for first in range(0, len(rows), ADD_ROWS):
            some = rows[first : first + ADD_ROWS].astype(np.float32)
            self._index.add_items(some, np.arange(first, first + len(some)))
        self._index.save_index(str(folder / "index"))

    def load(self, folder: Path) -> None:
        self._index.load_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        self._threads = number

    def allow(self, name: str, bits: Bits) -> Any:
        return bits.tolist().__getitem__  # nothing in Python answers sooner

    def search(self, queries: Queries, width: int, allowed: Any = None) -> Found:
        if width:
            self._index.set_ef(width)
        found = self._index.knn_query(queries, TOP, num_threads=self._threads, filter=allowed)[0]
        return np.asarray(found, np.int64)


class Usearch:
    """`Index`, which searches exactly too. It has no filter."""

    def __init__(self, exact: bool) -> None:
        self._usearch, self._threads = import_module("usearch.index"), CORES

    def build(self, rows: Rows, folder: Path, ef_construction: int) -> None:
        index = self._usearch.Index(
            ndim=DIM, metric="ip", dtype="f16", connectivity=M, expansion_add=ef_construction
        )
        index.add(np.arange(len(rows), dtype=np.uint64), np.asarray(rows), threads=CORES)
        index.save(str(folder / "index"))

    def load(self, folder: Path) -> None:
        self._index = self._usearch.Index.restore(str(folder / "index"))

    def threads(self, number: int) -> None:
        self._threads = number

    def allow(self, name: str, bits: Bits) -> Any:
        raise ValueError("found a filter, expected none: a search of usearch takes no filter")

    def search(self, queries: Queries, width: int, allowed: Any = None) -> Found:
        if width:
            self._index.expansion_search = width
        found = self._index.search(queries, TOP, threads=self._threads, exact=not width)
        return np.asarray(np.atleast_2d(found.keys), np.int64)  # one query's are not a table


class Milvus:
    """A FLAT and an HNSW collection of milvus-lite, asked over gRPC by a client in the same process."""

    def __init__(self, exact: bool) -> None:
        import_module("milvus_lite.adapter.grpc.server")  # the client would import it while loading
        self._pymilvus, self._exact = import_module("pymilvus"), exact
        self._limit = import_module("threadpoolctl").threadpool_limits

    def build(self, rows: Rows, folder: Path, ef_construction: int) -> None:
        client, kinds = self._pymilvus.MilvusClient(str(folder / "milvus.db")), self._pymilvus.DataType
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", kinds.INT64, is_primary=True)
        for name in SHARES:
            schema.add_field(name, kinds.BOOL)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=DIM)
        client.create_collection("rows", schema=schema)
        bits = np.stack([*masks(len(rows)).values()], axis=1).tolist()
        for first in range(0, len(rows), ADD_ROWS):
            some = enumerate(rows[first : first + ADD_ROWS].astype(np.float32), first)
            client.insert(
                "rows",
                [
                    {"row": row, "vector": vector, **dict(zip(SHARES, bits[row], strict=True))}
                    for row, vector in some
                ],
            )
        client.flush("rows")
        params, graph = client.prepare_index_params(), {"M": M, "efConstruction": ef_construction}
        # pymilvus flattens what is in `params`, and milvus-lite reads only what still is in a `params` after that.
        more = {"index_type": "FLAT"} if self._exact else {"index_type": "HNSW", "params": {"params": graph}}
        params.add_index("vector", metric_type="IP", **more)
        client.create_index("rows", params)
        client.load_collection("rows")  # milvus-lite builds now
        client.close()

    def load(self, folder: Path) -> None:
        self._client = self._pymilvus.MilvusClient(str(folder / "milvus.db"))
        self._client.load_collection("rows")

    def threads(self, number: int) -> None:
        self._limit(number)  # of linear algebra; client and server have threads of their own besides

    def allow(self, name: str, bits: Bits) -> Any:
        return name

    def search(self, queries: Queries, width: int, allowed: Any = None) -> Found:
        hits = self._client.search(
            "rows",
            list(queries),
            filter=f"{allowed} == true" if allowed else "",
            limit=TOP,
            search_params={"metric_type": "IP", "params": {"ef": width} if width else {}},
        )
        found = np.full((len(queries), TOP), -1)
        for row, some in zip(found, hits, strict=True):
            row[: len(some)] = [hit["row"] for hit in some]
        return found


@dataclass(frozen=True, slots=True)
class Peer:
    """What is measured under one name."""

    package: str
    store: type[Store]
    precision: str
    filter: str  # how it keeps rows out before it takes the best ten; empty: it cannot
    apart: bool = True  # an exact search has an index of its own


PEERS = {
    "faiss-plain": Peer("faiss-cpu", Faiss, "float16", "IDSelectorBitmap"),
    "hnswlib": Peer("hnswlib", Hnswlib, "float32, it has no other", "a Python function called with each row"),
    "usearch": Peer("usearch", Usearch, "float16", "", apart=False),
    "milvus-lite": Peer(
        "milvus-lite", Milvus, "float32, it takes no FLOAT16_VECTOR", "an expression over a BOOL field"
    ),
}


def masks(rows: int) -> dict[str, Bits]:
    """The same random rows for every peer, by the names of SHARES."""
    drawn = np.random.default_rng(0)
    return {name: drawn.random(rows) < share for name, share in SHARES.items()}


def best(rows: Rows, queries: Queries, bits: Bits) -> Found:
    """The rows of the best ten among those allowed, by float32 products; block by block, for there may be many."""
    scores = np.full((len(queries), TOP), -np.inf, np.float32)
    found = np.full((len(queries), TOP), -1)
    for first in range(0, len(rows), ADD_ROWS):
        block = queries @ rows[first : first + ADD_ROWS].astype(np.float32).T
        block[:, ~bits[first : first + ADD_ROWS]] = -np.inf
        numbers = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
        scores, found = np.hstack([scores, block]), np.hstack([found, numbers])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        scores, found = (np.take_along_axis(array, order, axis=1) for array in (scores, found))
    return np.where(np.isfinite(scores), found, -1)


def recall(found: Found, truth: Found) -> float:
    """The share of the true rows, -1 not among them, that were found."""
    hits = (truth[:, :, None] == found[:, None, :]).any(axis=2)
    return float(hits[truth >= 0].mean())


def timed(
    search: Callable[[Queries], Found], queries: Queries, truth: Found, *, batch: int = 1
) -> dict[str, float]:
    """Milliseconds of a call with `batch` queries, and recall; the first call warms up and is not counted."""
    search(queries[:batch])
    seconds: list[float] = []
    found: list[Found] = []
    for first in range(0, len(queries) - batch + 1, batch):
        if sum(seconds) > SECONDS and len(seconds) >= LEAST:
            break
        some = queries[first : first + batch]
        began = time.perf_counter()
        found.append(search(some))
        seconds.append(time.perf_counter() - began)
    rows = np.concatenate(found)
    p50, p99 = 1000 * np.percentile(seconds, [50, 99])
    return {
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "recall_at_10": recall(rows, truth[: len(rows)]),
        "queries": len(rows),
    }


def build(name: str, folder: Path, built: Path, ef_construction: int) -> None:
    """Leave the peer's indexes in `built`. Those made of the same rows by the same version stay."""
    peer, rows = PEERS[name], _rows(folder)
    digest = hashlib.sha256(rows.view(np.uint8).data).hexdigest()
    made_of = {"rows": len(rows), "rows_sha256": digest, "version": version(peer.package)}
    for kind in ("graph", "scan") if peer.apart else ("graph",):
        place = built / kind
        note = place / "built.json"
        if note.exists() and made_of.items() <= json.loads(note.read_text()).items():
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        began = time.perf_counter()
        peer.store(kind == "scan").build(rows, place, ef_construction)
        build_s = time.perf_counter() - began
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        # Written last: without it the folder is no index but a build that broke off.
        note.write_text(json.dumps(made_of | {"build_s": build_s, "bytes": size}))


def measure(name: str, folder: Path, built: Path) -> dict[str, Any]:
    """All figures of a peer that is built. Bytes are those of files, and of this process's growth."""
    peer = PEERS[name]
    queries = np.fromfile(folder / "queries.f16", "<f2").reshape(-1, DIM).astype(np.float32)
    truth = np.fromfile(folder / "truth.i64", "<i8").reshape(-1, TOP)
    asked = _filters(folder, queries[:FILTERED_QUERIES]) if peer.filter else []
    graph, figures = _opened(peer.store(False), built / "graph", queries, WIDTHS[0])
    ann = [_at_width(graph, width, queries, truth) for width in WIDTHS]
    scan, exact = graph, dict(figures)
    if peer.apart:
        scan, exact = _opened(peer.store(True), built / "scan", queries, 0)
    for threads, number in (("one_thread", 1), ("all_threads", CORES)):
        scan.threads(number)
        exact[threads] = timed(partial(scan.search, width=0), queries, truth)
    filtered = []
    for kind, store, width in (("exact", scan, 0), ("ann", graph, FILTERED_WIDTH)):
        store.threads(1)
        for share, bits, best_rows in asked:
            search = partial(store.search, width=width, allowed=store.allow(share, bits))
            figures_of = timed(search, queries[:FILTERED_QUERIES], best_rows)
            filtered.append({"allowed": SHARES[share], "search": kind, "ef": width} | figures_of)
    about = {"peer": name, "version": version(peer.package), "precision": peer.precision, "cores": CORES}
    return about | figures | {"exact": exact, "ann": ann, "filter": peer.filter, "filtered": filtered}


def _filters(folder: Path, queries: Queries) -> list[tuple[str, Bits, Found]]:
    """Each filter, and what is best under it. The rows are let go of before memory is measured."""
    rows = _rows(folder)
    return [(share, bits, best(rows, queries, bits)) for share, bits in masks(len(rows)).items()]


def _at_width(graph: Store, width: int, queries: Queries, truth: Found) -> dict[str, float]:
    search, batch = partial(graph.search, width=width), min(BATCH, len(queries))
    graph.threads(1)
    single = timed(search, queries, truth)
    graph.threads(CORES)
    batched = timed(search, queries, truth, batch=batch)
    return {"ef": width} | single | {"batch_ms_per_query": batched["p50_ms"] / batch}


def _opened(store: Store, folder: Path, queries: Queries, width: int) -> tuple[Store, dict[str, Any]]:
    """A store that is ready to search, and what it took. A first search counts as memory, not as time."""
    before, began = _resident(), time.perf_counter()
    store.load(folder)
    load_s = time.perf_counter() - began
    store.search(queries[:1], width)
    resident = _resident() - before
    note = json.loads((folder / "built.json").read_text())
    per_row = {"disk": note["bytes"] / note["rows"], "resident": resident / note["rows"]}
    return store, {
        "rows": note["rows"],
        "build_s": note["build_s"],
        "load_s": load_s,
        "bytes_per_row": per_row,
    }


def _rows(folder: Path) -> Rows:
    return np.memmap(folder / "rows.f16", "<f2", mode="r").reshape(-1, DIM)


def _resident() -> int:
    # Memory that was freed but is still the process's would take in what a load needs, and hide it.
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(
    name: str,
    folder: Path,
    *,
    ef_construction: int = EF_CONSTRUCTION,
    built: Path = ENVIRONMENT / "built",
    python: Path = ENVIRONMENT / "bin" / "python",
) -> dict[str, Any]:
    """The figures of a peer, measured in a process of its own after another has built; or its name and `error`."""
    place = built / f"{name}-{len(_rows(folder))}-{ef_construction}"
    for step in ("build", "measure"):
        command = [str(python), "-m", "benchmarks.stores", "--step", step, "--peer", name]
        command += ["--folder", str(folder.resolve()), "--built", str(place.resolve())]
        command += ["--ef-construction", str(ef_construction)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError as error:
            return {"peer": name, "error": f"{error}; remedy: --make"}
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()[-1:]
            return {"peer": name, "error": f"{step}: status {done.returncode} {' '.join(said)}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def make() -> None:
    """The environment. A package that cannot be installed does not keep the others out."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pins = Path(__file__).with_suffix(".txt")
    for pin in pins.read_text(encoding="utf-8").splitlines():
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(pins)]
        if not pin.startswith("#") and subprocess.run([*pip, pin], check=False).returncode != 0:
            print(f"benchmarks.stores: {pin} was not installed, its peer will fail", file=sys.stderr)


def main() -> None:
    """Make, or measure and print; with --step, be the other process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", action="store_true", help="set the peers' environment up and stop")
    parser.add_argument("--folder", type=Path, help="where rows, queries and truth lie")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--ef-construction", type=int, default=EF_CONSTRUCTION)
    parser.add_argument("--step", choices=("build", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--built", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make:
        return make()
    if chosen.folder is None:
        parser.error("found neither --folder nor --make, expected one of them")
    for name in chosen.peer:
        if chosen.step == "build":
            build(name, chosen.folder, chosen.built, chosen.ef_construction)
        elif chosen.step == "measure":
            print(json.dumps(measure(name, chosen.folder, chosen.built)))
        else:
            print(json.dumps(run(name, chosen.folder, ef_construction=chosen.ef_construction)), flush=True)


if __name__ == "__main__":
    main()
