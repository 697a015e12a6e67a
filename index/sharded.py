"""`ShardedIndex`, the served index: `index.json`, shards loaded one by one, a query fanned over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from index.search import Hits, QueryInvalid, check_k, check_mask, prepare
from index.shard import IndexInvalid, Selector, Shard, padded, select

INDEX_FILE = "index.json"
# Of vectors for each thread. Measured on two cores that others kept busy: up to 8 MB in all, handing over half
# of a scan mostly loses; from 16 MB on it neither wins nor loses for certain. An idle machine may differ.
FAN_OUT_BYTES = 8 << 20
REMEMBERED_MASKS = 32
MASK_BITS = 32  # persona and surface masks are uint32


class ShardFile(BaseModel):
    """One line of the shard list."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    rows: int = Field(ge=1)


class Layout(BaseModel):
    """`index.json`: what the folder must hold, all of it or nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["exact"]
    dim: int = Field(ge=1, le=1 << 16)
    padded: int
    rows: int = Field(ge=0, lt=1 << 31)  # vectors
    items: int = Field(ge=0, lt=1 << 31)  # (prompt, reply) pairs
    personas: tuple[str, ...] = Field(max_length=MASK_BITS)
    surfaces: tuple[str, ...] = Field(max_length=MASK_BITS)
    shards: tuple[ShardFile, ...]


def shard_name(number: int) -> str:
    return f"shard-{number:03d}.f16"


def read_layout(folder: Path) -> Layout:
    """`index.json`, checked against itself and against the names in its folder; raises `IndexInvalid`."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise IndexInvalid(
            part=INDEX_FILE, found="no file", expected=str(path), remedy="build or pull it again"
        )
    try:
        layout = Layout.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise IndexInvalid(
            part=f"{INDEX_FILE} {'.'.join(str(step) for step in first['loc'])}".rstrip(),
            found=repr(first["input"])[:80],
            expected=first["msg"],
            remedy="build the index with this version of the code",
        ) from error
    _check_layout(layout)
    extra = sorted({path.name for path in folder.glob("*.f16")} - {shard.file for shard in layout.shards})
    if extra:
        raise IndexInvalid(
            part=extra[0],
            found="a shard that index.json does not list",
            expected=f"the {len(layout.shards)} shards of one build",
            remedy="two builds share this folder: build into an empty one",
        )
    return layout


class ShardedIndex:
    """Exact cosine search over float16 shards, an `index.search.Index`. Immutable and thread-safe."""

    def __init__(self, shards: Sequence[Shard], dim: int, *, threads: int | None = None) -> None:
        """`threads` bounds the cores one call may use; by default all that this process may run on."""
        self.dim = dim
        self._padded = padded(dim)
        self._shards = tuple(shards)
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.rows)
        self._nbytes = sum(shard.nbytes for shard in self._shards)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._groups = _groups(len(self._shards), self._threads, self._nbytes)
        # Starts no thread before a query needs it, and ends with the index when an engine is swapped.
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "index")
        self._selectors: dict[int, tuple[NDArray[np.uint8], Sequence[Selector]]] = {}
        self._lock = Lock()

    @classmethod
    def load(
        cls, folder: Path, *, placement: Callable[[int], str] | None = None, threads: int | None = None
    ) -> ShardedIndex:
        """The index in a folder, all of it or `IndexInvalid`; `placement` tells where shard i goes ("cpu").

        Shard by shard: the copy that was read is gone before the next file is opened, so memory peaks at the
        index plus one shard.
        """
        layout = read_layout(folder)
        shards = [
            Shard.load(
                folder / shard.file,
                rows=shard.rows,
                dim=layout.dim,
                placement=placement(number) if placement else "cpu",
            )
            for number, shard in enumerate(layout.shards)
        ]
        return cls(shards, layout.dim, threads=threads)

    def __len__(self) -> int:
        return self._starts[-1]

    def search(self, vector: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None) -> Hits:
        query = np.zeros(self._padded, np.float32)
        query[: self.dim] = prepare(vector, self.dim)
        check_k(k)
        selectors = self._select(mask)

        def scan(group: range) -> list[Hits]:
            return [self._shards[i].search(query, k, selectors[i]) for i in group]

        return self._merge([hits for parts in self._share(scan, self._groups) for hits in parts], k)

    def search_many(
        self, vectors: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None
    ) -> list[Hits]:
        if vectors.ndim != 2:
            raise QueryInvalid(
                f"vectors: found {vectors.ndim} axes, expected [n, {self.dim}]; remedy: search"
            )
        queries = np.zeros((len(vectors), self._padded), np.float32)
        for query, vector in zip(queries, vectors, strict=True):
            query[: self.dim] = prepare(vector, self.dim)  # as in `search`, to the last bit
        check_k(k)
        selectors = self._select(mask)

        def scan(group: range) -> list[Hits]:
            some = queries[group.start : group.stop]
            pairs = zip(self._shards, selectors, strict=True)
            parts = [shard.search_many(some, k, selector) for shard, selector in pairs]
            return [self._merge([part[i] for part in parts], k) for i in range(len(some))]

        groups = _groups(len(queries), self._threads, len(queries) * self._nbytes)
        return [hits for answers in self._share(scan, groups) for hits in answers]

    def _share(self, scan: Callable[[range], list[Hits]], groups: Sequence[range]) -> list[list[Hits]]:
        """`scan` of every group, in order; the first in the calling thread, others wherever there is time."""
        first, *others = groups
        futures = [self._pool.submit(scan, group) for group in others]
        answers = [scan(first)]
        for group, future in zip(others, futures, strict=True):
            # Under load the pool serves other callers: work it has not begun is taken back, not waited for.
            answers.append(scan(group) if future.cancel() else future.result())
        return answers

    def _select(self, mask: NDArray[np.uint8] | None) -> Sequence[Selector | None]:
        """One selector per shard.

        Making one costs as much as scanning a hundred rows, so masks that cannot change are remembered by
        identity (a mask that is held cannot lend its id to another); a writable mask is some caller's
        scratch.
        """
        if mask is None:
            return [None] * len(self._shards)
        remembered = self._selectors.get(id(mask))
        if remembered is not None:
            return remembered[1]
        check_mask(mask, len(self))
        # Every shard but the last has a multiple of 8 rows, so its bits are whole bytes: a slice, not a copy.
        bounds = zip(self._starts, self._starts[1:], strict=False)
        selectors = [select(mask[start // 8 : (stop + 7) // 8]) for start, stop in bounds]
        if not mask.flags.writeable:
            with self._lock:
                while len(self._selectors) >= REMEMBERED_MASKS:
                    del self._selectors[next(iter(self._selectors))]
                self._selectors[id(mask)] = (mask, selectors)
        return selectors

    def _merge(self, parts: Sequence[Hits], k: int) -> Hits:
        """The k best of all shards; parts come in row order, so a stable sort keeps ties by ascending row."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Hits(np.empty(0, np.float32), np.empty(0, np.int64))
        scores = np.concatenate([hits.scores for hits in parts])
        rows = np.concatenate([hits.rows + start for hits, start in zip(parts, self._starts, strict=False)])
        order = np.argsort(-scores, kind="stable")[:k]
        return Hits(scores[order], rows[order])


def _groups(tasks: int, threads: int, nbytes: int) -> list[range]:
    """`tasks` in runs, one for each thread worth waking to read `nbytes` in all; always one run or more."""
    count = max(1, min(threads, tasks, nbytes // FAN_OUT_BYTES))
    bounds = [tasks * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _check_layout(layout: Layout) -> None:
    """What one field says about another."""
    counts = [shard.rows for shard in layout.shards]
    facts: list[tuple[str, object, object]] = [
        ("padded", layout.padded, padded(layout.dim)),
        ("rows", layout.rows, sum(counts)),
        ("shards", [shard.file for shard in layout.shards], [shard_name(i) for i in range(len(counts))]),
        ("shards rows modulo 8", [rows % 8 for rows in counts[:-1]], [0 for _ in counts[:-1]]),
        ("personas", list(layout.personas), list(dict.fromkeys(filter(None, layout.personas)))),
        ("surfaces", list(layout.surfaces), list(dict.fromkeys(filter(None, layout.surfaces)))),
    ]
    for part, found, expected in facts:
        if found != expected:
            raise IndexInvalid(
                part=f"{INDEX_FILE} {part}",
                found=str(found)[:200],
                expected=str(expected)[:200],
                remedy="build the index again; this file was edited or mixes two builds",
            )
