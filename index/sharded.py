"""`ShardedIndex`, the served index: shards loaded one by one, a query fanned over the cores or walked along a graph."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from index.gpu import Devices, GpuScan, devices_of
from index.graph import Graph
from index.layout import Layout, read_layout
from index.matrix import Matrix, Pages
from index.scan import Scan, Selector, select
from index.search import NOTHING, Hits, QueryInvalid, check_k, check_mask, prepare

logger = logging.getLogger(__name__)

# Of vectors for each thread. Measured on two cores that others kept busy: up to 8 MB in all, handing over half
# of a scan mostly loses; from 16 MB on it neither wins nor loses for certain. An idle machine may differ.
FAN_OUT_BYTES = 8 << 20
# A batch is scanned in blocks that stay in a core's own cache while all its queries pass over them.
BLOCK_BYTES = 1 << 20
BATCH = 64  # queries of a batch that are scanned together
REMEMBERED_MASKS = 32
# A walk passes forbidden rows as it passes others, so it widens as they become more (by the root of the share: half of
# the rows allowed costs 1.4 times as much and finds no less, `python -m benchmarks.retrieval`); where fewer than this share is
# allowed, scanning the allowed ones is quicker.
WALK_SHARE = 0.1

Answer = TypeVar("Answer")


class Selectors(NamedTuple):
    """A mask as each part of the index wants it."""

    mask: NDArray[np.uint8]
    share: float  # of rows it allows
    scans: Sequence[Selector]  # of `ShardedIndex._scans`
    graph: Selector | None


class ShardedIndex:
    """Cosine search over float16 rows, an `index.search.Index`: exact, or along a graph. Immutable, thread-safe."""

    def __init__(
        self,
        matrix: Matrix,
        dim: int,
        *,
        graph: Graph | None = None,
        on_gpu: Sequence[GpuScan] = (),
        cuts: Sequence[int] | None = None,
        threads: int | None = None,
    ) -> None:
        """`threads` bounds the cores one call may use; by default all that this process may run on.

        `cuts` are the rows (multiples of 8) after which a scan by several threads may be parted; by default it is
        parted evenly.
        """
        self.dim = dim
        self.graph = graph
        self._matrix = matrix
        self._rows = len(matrix)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._on_gpu = tuple(on_gpu)
        stretches = _on_cpu(self._rows, self._on_gpu)
        if cuts is None:
            cuts = [cut for stretch in stretches for cut in self._even(stretch)]
        self._scans = [
            Scan(matrix.array[start:stop], start)
            for stretch in stretches
            for start, stop in _cut(stretch, sorted(cuts))
        ]
        # Rows added after the graph was made are scanned; a scan begins at a whole byte of a mask.
        walked = 0 if graph is None else graph.rows // 8 * 8
        whole = graph is None or graph.rows == self._rows
        self._added = None if whole else Scan(matrix.array[walked:], walked)
        # Starts no thread before a query needs it, and ends with the index when an engine is swapped.
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "index")
        self._remembered: dict[int, Selectors] = {}
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        layout: Layout | None = None,
        placement: str = "cpu",
        devices: Devices | None = None,
        pages: Pages = "own",
        threads: int | None = None,
    ) -> ShardedIndex:
        """The index in a folder, all of it or `IndexInvalid`.

        Shard by shard: each is mapped, checked, copied to its GPU if it has one, and only then the next is touched.
        A shard that does not fit on its GPU, and all after it there, stay on the CPU.
        """
        layout = layout or read_layout(folder)
        devices = devices or Devices()
        planned = devices_of(placement, len(layout.shards), devices)
        on_gpu: list[GpuScan] = []

        def place(number: int, rows: NDArray[np.float16]) -> bool:
            device, first = planned[number], number * layout.shard_rows
            if device is None:
                return False
            try:
                on_gpu.append(GpuScan(rows, first, device, devices))
            except RuntimeError as error:
                left = [other for other in range(number, len(planned)) if planned[other] == device]
                logger.warning(
                    "index: shard %d does not fit on gpu:%d, %d shards stay on the CPU: %s",
                    number, device, len(left), str(error).splitlines()[0],
                )  # fmt: skip
                for other in left:
                    planned[other] = None
                return False
            return True

        if any(device is not None for device in planned):  # what goes to a GPU is to leave no copy here
            pages = "shared"
        matrix = Matrix.load(folder, layout.shards, layout.dim, pages=pages, placed=place)
        graph = None if layout.graph is None else Graph.load(folder, layout.graph, matrix, pages=pages)
        return cls(matrix, layout.dim, graph=graph, on_gpu=on_gpu, threads=threads)

    def __len__(self) -> int:
        return self._rows

    @property
    def rows(self) -> NDArray[np.float16]:
        """`[rows, padded]`, read-only."""
        return self._matrix.array

    def search(self, vector: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None) -> Hits:
        query = np.zeros(self._matrix.width, np.float32)
        query[: self.dim] = prepare(vector, self.dim)
        check_k(k)
        return self._search(query, min(k, max(1, self._rows)), self._select(mask))

    def search_many(
        self, vectors: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None
    ) -> list[Hits]:
        if vectors.ndim != 2:
            raise QueryInvalid(
                f"vectors: found {vectors.ndim} axes, expected [n, {self.dim}]; remedy: search"
            )
        queries = np.zeros((len(vectors), self._matrix.width), np.float32)
        for query, vector in zip(queries, vectors, strict=True):
            query[: self.dim] = prepare(vector, self.dim)  # as in `search`, to the last bit
        check_k(k)
        selectors, k = self._select(mask), min(k, max(1, self._rows))
        if self._on_gpu or self._walks(selectors) or len(queries) * self._matrix.array.nbytes < FAN_OUT_BYTES:
            alone = [partial(self._search, query, k, selectors, alone=True) for query in queries]
            return self._share(alone, len(queries) * self._matrix.array.nbytes)
        return [
            hits
            for first in range(0, len(queries), BATCH)
            for hits in self._scan_batch(queries[first : first + BATCH], k, selectors)
        ]

    def _search(
        self, query: NDArray[np.float32], k: int, selectors: Selectors | None, *, alone: bool = False
    ) -> Hits:
        """One prepared query `[padded]`; `alone` keeps to the calling thread."""
        if self.graph is not None and self._walks(selectors):
            found = self._walk(self.graph, query, k, selectors)
            if found is not None:
                return found
        tasks = [
            partial(scan.search, query, k)
            if selectors is None
            else partial(scan.search, query, k, selectors.scans[number], share=selectors.share)
            for number, scan in enumerate(self._scans)
        ]
        parts = [task() for task in tasks] if alone else self._share(tasks, self._matrix.array.nbytes)
        for scan in self._on_gpu:
            mask = None if selectors is None else _slice(selectors.mask, scan)
            parts.append(scan.search(query, k, mask))
        return merge(parts, k)

    def _walks(self, selectors: Selectors | None) -> bool:
        return self.graph is not None and (selectors is None or selectors.share >= WALK_SHARE)

    def _walk(
        self, graph: Graph, query: NDArray[np.float32], k: int, selectors: Selectors | None
    ) -> Hits | None:
        """Along the graph, and a scan of the rows it does not reach; None where it comes back short of hits."""
        share = 1.0 if selectors is None else selectors.share
        found = graph.search(
            query,
            k,
            None if selectors is None else selectors.graph,
            round(max(graph.ef, k) / math.sqrt(share)),
        )
        if len(found) < min(k, graph.rows) and share * self._rows > len(found):
            return None
        if self._added is None:
            return found
        within = found.rows < self._added.first
        added = None if selectors is None else select(_slice(selectors.mask, self._added))
        return merge([Hits(found.scores[within], found.rows[within]), self._added.search(query, k, added)], k)

    def _scan_batch(self, queries: NDArray[np.float32], k: int, selectors: Selectors | None) -> list[Hits]:
        """`_search` for prepared queries `[n, padded]` on the CPU, block by block, all queries over each."""
        step = max(8, BLOCK_BYTES // (2 * self._matrix.width) // 8 * 8)
        starts = range(0, self._rows, step)

        def scan(some: Sequence[int]) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
            found = []
            for start in some:
                block = Scan(self._matrix.array[start : start + step], start)
                selector = None if selectors is None else select(_slice(selectors.mask, block))
                found.append(block.best(queries, k + 1, selector))
            return found

        groups = [starts[number :: self._threads] for number in range(min(self._threads, len(starts)))]
        parts = [part for found in self._share([partial(scan, group) for group in groups]) for part in found]
        scores = np.concatenate([scores for scores, _ in parts], axis=1)
        rows = np.concatenate([rows for _, rows in parts], axis=1)
        # A block is known down to its last fetched score; a tie may go on below it, unless the block was whole.
        known = np.stack([s[:, -1] if s.shape[1] > k else np.full(len(s), -np.inf) for s, _ in parts], axis=1)
        answers = []
        for query, some, where, floor in zip(queries, scores, rows, known.max(axis=1), strict=True):
            order = np.lexsort((where, -some))[:k]
            order = order[where[order] >= 0]
            if len(order) and floor >= some[order[-1]] and floor > -np.inf:
                answers.append(self._search(query, k, selectors))
            else:
                answers.append(Hits(some[order], where[order]))
        return answers

    def _share(self, tasks: Sequence[Callable[[], Answer]], nbytes: int | None = None) -> list[Answer]:
        """All answers, in order; the first share of tasks in the calling thread, others wherever there is time."""
        groups = _groups(len(tasks), self._threads if nbytes is None else _worth(self._threads, nbytes))
        first, *others = groups

        def run(group: range) -> list[Answer]:
            return [tasks[i]() for i in group]

        futures = [self._pool.submit(run, group) for group in others]
        answers = run(first)
        for group, future in zip(others, futures, strict=True):
            # Under load the pool serves other callers: work it has not begun is taken back, not waited for.
            answers.extend(run(group) if future.cancel() else future.result())
        return answers

    def _select(self, mask: NDArray[np.uint8] | None) -> Selectors | None:
        """A mask as each part wants it.

        Making it costs as much as scanning a hundred rows, so masks that cannot change are remembered by
        identity (a mask that is held cannot lend its id to another); a writable mask is some caller's
        scratch.
        """
        if mask is None:
            return None
        remembered = self._remembered.get(id(mask))
        if remembered is not None:
            return remembered
        check_mask(mask, self._rows)
        allowed = int.from_bytes(mask.tobytes(), "little").bit_count()
        selectors = Selectors(
            mask,
            allowed / max(1, self._rows),
            [select(_slice(mask, scan)) for scan in self._scans],
            None if self.graph is None else select(mask[: (self.graph.rows + 7) // 8]),
        )
        if not mask.flags.writeable:
            with self._lock:
                while len(self._remembered) >= REMEMBERED_MASKS:
                    del self._remembered[next(iter(self._remembered))]
                self._remembered[id(mask)] = selectors
        return selectors

    def _even(self, stretch: range) -> list[int]:
        """Where to part these rows so that each thread gets as many."""
        parts = _worth(self._threads, len(stretch) * 2 * self._matrix.width)
        return [stretch.start + len(stretch) * part // parts // 8 * 8 for part in range(1, parts)]


def merge(parts: Sequence[Hits], k: int) -> Hits:
    """The k best of all parts, equal scores by ascending row."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return NOTHING
    scores = np.concatenate([hits.scores for hits in parts])
    rows = np.concatenate([hits.rows for hits in parts])
    order = np.lexsort((rows, -scores))[:k]
    return Hits(scores[order], rows[order])


def _on_cpu(rows: int, on_gpu: Sequence[GpuScan]) -> list[range]:
    """The stretches of rows that no GPU holds."""
    stretches, start = [], 0
    for scan in sorted(on_gpu, key=lambda scan: scan.first):
        stretches.append(range(start, scan.first))
        start = scan.first + scan.rows
    return [stretch for stretch in (*stretches, range(start, rows)) if stretch]


def _cut(stretch: range, cuts: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [stretch.start, *(cut for cut in cuts if stretch.start < cut < stretch.stop), stretch.stop]
    return list(zip(bounds, bounds[1:], strict=False))


def _slice(mask: NDArray[np.uint8], scan: Scan | GpuScan) -> NDArray[np.uint8]:
    """The bits of a scan's rows; it begins at a multiple of 8, so they are whole bytes: a slice, not a copy."""
    return mask[scan.first // 8 : (scan.first + scan.rows + 7) // 8]


def _worth(threads: int, nbytes: int) -> int:
    """How many threads are worth waking to read so much."""
    return max(1, min(threads, nbytes // FAN_OUT_BYTES))


def _groups(tasks: int, count: int) -> list[range]:
    """`tasks` in runs for `count` threads; always one run or more."""
    count = max(1, min(count, tasks))
    bounds = [tasks * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
