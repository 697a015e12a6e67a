"""`Graph`: approximate search along an HNSW graph (Malkov and Yashunin, 2018) over the rows of a matrix, by FAISS.

Stored as two plain arrays, checked number by number, instead of FAISS's own file: `graph-levels.u8` (how high each
vector stands) and `graph-links.i32` (its neighbours, level by level, -1 where there is none). FAISS walks whatever
numbers it is given, so a bad link would be a read from anywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.layout import GraphFiles, IndexInvalid
from index.matrix import Matrix, Pages, read
from index.scan import Selector, ask, look_at, ordered, view
from index.search import Hits

LEVELS_FILE = "graph-levels.u8"
LINKS_FILE = "graph-links.i32"
M = 32
EF_CONSTRUCTION = 256
EF_SEARCH = 112
ADD_ROWS = 8192  # rows linked between two reports of progress
CHECK_ROWS = 1 << 16
_faiss: Any = faiss  # its stubs do not know graphs
MAX_LEVEL = 30  # one in m vectors stands a level higher: nothing reaches half of this


class Graph:
    """Thread-safe: nothing changes after loading; a search releases the GIL."""

    def __init__(self, rows: NDArray[np.float16], levels: NDArray[np.uint8], links: NDArray[np.int32], files: GraphFiles) -> None:  # fmt: skip
        """Looks at `[rows, padded]`, `[rows]` and `[links]` where they lie; raises `IndexInvalid` for a bad link."""
        self.rows = len(rows)
        self.ef = files.ef_search
        self._arrays = rows, levels, links  # FAISS looks at this memory
        self._index = _faiss.IndexHNSWSQ(
            rows.shape[1], _faiss.ScalarQuantizer.QT_fp16, files.m, faiss.METRIC_INNER_PRODUCT
        )
        graph, reach = self._index.hnsw, _reach(files.m)
        if levels.max() + 1 >= graph.cum_nneighbor_per_level.size():  # FAISS looks levels up in this table
            raise _invalid(LEVELS_FILE, f"level {levels.max()}", "as few as one vector in m a level makes")
        offsets = np.concatenate([[0], np.cumsum(reach[levels.astype(np.int64) + 1])])
        _check_links(levels, links, offsets, reach, files.entry_point)
        look_at(faiss.downcast_index(self._index.storage), rows)
        self._index.ntotal = self.rows
        faiss.copy_array_to_vector(offsets.astype(np.uint64), graph.offsets)
        view(graph.neighbors, links)
        graph.entry_point = files.entry_point
        graph.max_level = int(levels[files.entry_point])

    @classmethod
    def load(cls, folder: Path, files: GraphFiles, matrix: Matrix, *, pages: Pages = "shared") -> Graph:
        """The graph of a folder over the first rows of its matrix, or `IndexInvalid`."""
        levels = read(
            folder / LEVELS_FILE,
            files.rows,
            files.levels_sha256,
            expected=f"{files.rows} levels",
            pages=pages,
        )
        if levels.max() > MAX_LEVEL:
            raise _invalid(LEVELS_FILE, f"level {levels.max()}", f"at most {MAX_LEVEL}")
        links = int(_reach(files.m)[levels.astype(np.int64) + 1].sum())
        data = read(
            folder / LINKS_FILE, 4 * links, files.links_sha256, expected=f"{links} links", pages=pages
        )
        return cls(matrix.array[: files.rows], levels, data.view("<i4").astype(np.int32, copy=False), files)

    def search(self, query: NDArray[np.float32], k: int, selector: Selector | None, ef: int) -> Hits:
        """Up to k rows for one prepared query `[padded]`, nearly the best; the wider `ef`, the nearer.

        A selector keeps rows out of the answer, not out of the walk.
        """
        params = _faiss.SearchParametersHNSW()
        params.efSearch = max(ef, k)
        if selector is not None:
            params.sel = selector.bitmap
        scores, rows = ask(self._index, query[None], min(k, self.rows), params)
        found = int(np.count_nonzero(rows[0] >= 0))
        return ordered(scores[0, :found], rows[0, :found], k)


def build_graph(
    rows: NDArray[np.float16],
    folder: Path,
    *,
    m: int = M,
    ef_construction: int = EF_CONSTRUCTION,
    ef_search: int = EF_SEARCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GraphFiles:
    """Links all rows `[rows, padded]` and writes both files. The same rows give the same bytes, on any number of cores."""
    index = _faiss.IndexHNSWSQ(rows.shape[1], _faiss.ScalarQuantizer.QT_fp16, m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))  # a search on this thread may have left it at one
    for first in range(0, len(rows), ADD_ROWS):
        index.add(rows[first : first + ADD_ROWS].astype(np.float32))
        progress(min(first + ADD_ROWS, len(rows)), len(rows))
    levels = (faiss.vector_to_array(index.hnsw.levels) - 1).astype(np.uint8)
    links = faiss.vector_to_array(index.hnsw.neighbors).astype("<i4")
    digests = []
    for name, array in ((LEVELS_FILE, levels), (LINKS_FILE, links)):
        (folder / name).write_bytes(array.tobytes())
        digests.append(hashlib.sha256(array.data).hexdigest())
    return GraphFiles(
        rows=len(rows), m=m, ef_search=ef_search, entry_point=int(index.hnsw.entry_point),
        levels_sha256=digests[0], links_sha256=digests[1],
    )  # fmt: skip


def _reach(m: int) -> NDArray[np.int64]:
    """How many links a vector of so many levels has in all: twice m on the ground, m on every level above."""
    return np.concatenate([[0], 2 * m + m * np.arange(MAX_LEVEL + 1)])


def _check_links(
    levels: NDArray[np.uint8],
    links: NDArray[np.int32],
    offsets: NDArray[np.int64],
    reach: NDArray[np.int64],
    entry_point: int,
) -> None:
    """Every link is -1 or a vector that stands at least as high as the level it is on."""
    rows = len(levels)
    if levels[entry_point] != levels.max():
        raise _invalid(
            "graph entry_point", f"a vector of level {levels[entry_point]}", f"one of level {levels.max()}"
        )
    for first in range(0, len(links), CHECK_ROWS):
        some = links[first : first + CHECK_ROWS]
        if some.min() < -1 or some.max() >= rows:
            where = first + int(np.argmax((some < -1) | (some >= rows)))
            raise _invalid(f"{LINKS_FILE} {where}", str(links[where]), f"-1 or a vector below {rows}")
    for level in range(1, int(levels.max()) + 1):
        standing = np.flatnonzero(levels >= level)
        starts = offsets[standing] + reach[level]
        above = links[starts[:, None] + np.arange(reach[level + 1] - reach[level])]
        low = (above >= 0) & (levels[above] < level)
        if low.any():
            row = int(standing[np.argmax(low.any(axis=1))])
            raise _invalid(f"{LINKS_FILE} of vector {row}", f"a neighbour below level {level}", "none")


def _invalid(part: str, found: str, expected: str) -> IndexInvalid:
    return IndexInvalid(part=part, found=found, expected=expected, remedy="build the index again")
