"""Exact search: FAISS's float16 scan over rows of a matrix, without a copy of them. What a mask looks like to FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.search import Hits

MOSTLY = 0.5  # from this share of allowed rows on, asking for more of all rows is tried first


@dataclass(frozen=True, slots=True)
class Selector:
    """A mask in the form FAISS reads it. C++ holds only addresses, so all three must live together."""

    bitmap: Any
    params: Any
    mask: NDArray[np.uint8]


def select(mask: NDArray[np.uint8]) -> Selector:
    """A selector over a slice of a checked mask; shares the mask's memory, copies nothing."""
    bitmap = faiss.IDSelectorBitmap(mask.size, faiss.swig_ptr(mask))  # the size is in bytes
    params = faiss.SearchParameters()
    params.sel = bitmap
    return Selector(bitmap, params, mask)


def look_at(flat: Any, rows: NDArray[np.float16]) -> None:
    """Let FAISS's flat float16 index be one of these very rows `[rows, padded]`; whoever uses it must keep them."""
    view(flat.codes, rows.reshape(-1).view(np.uint8))
    flat.ntotal = len(rows)


def view(vector: Any, array: NDArray[Any]) -> None:
    """Let one of FAISS's arrays look at this memory instead of its own.

    Such arrays have an unowned form since FAISS 1.11, but no call for it from Python: these five fields are what its
    own `create_view` sets.
    """
    vector.is_owned = False
    vector.view_data = vector.c_ptr = faiss.swig_ptr(array)
    vector.view_size = vector.c_size = array.size


class Scan:
    """Rows `first` to `first + len(rows)` of an index. Thread-safe: nothing changes later; a scan releases the GIL."""

    def __init__(self, rows: NDArray[np.float16], first: int) -> None:
        self.first = first
        self.rows = len(rows)
        self._rows = rows  # `_flat` looks at this memory
        self._flat = faiss.IndexScalarQuantizer(
            rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        look_at(self._flat, rows)

    def search(
        self, query: NDArray[np.float32], k: int, selector: Selector | None = None, *, share: float = 0.0
    ) -> Hits:
        """The k best rows for one prepared query `[padded]`, equal scores by ascending row.

        `share` is about how many rows the selector allows, where that is known.
        """
        if selector is not None and share >= MOSTLY:
            hits = self._among(query, k, selector.mask, share)
            if hits is not None:
                return hits
        want = k + 1
        while True:
            scores, rows = self._scan(query[None], min(want, self.rows), selector)
            hits = _proven(scores[0], rows[0], k, whole=want >= self.rows)
            if hits is not None:
                return self._placed(hits)
            want *= 4

    def _among(
        self, query: NDArray[np.float32], k: int, mask: NDArray[np.uint8], share: float
    ) -> Hits | None:
        """`search` among a few more of all rows; None where those do not prove it.

        A selector is asked about every row and costs a scan half as much again; where most rows are allowed, the best
        of all rows hold the best of the allowed ones, and what they hold above their last score is all there is.
        """
        want = min(self.rows, int((k + 1) / share) + 16)
        scores, rows = (found[0] for found in ask(self._flat, query[None], want, None))
        allowed = (mask[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        last, whole = scores[-1], want == self.rows
        scores, rows = scores[allowed], rows[allowed]
        if not whole and (len(rows) < k or scores[k - 1] <= last):
            return None
        return self._placed(ordered(scores, rows, k))

    def best(
        self, queries: NDArray[np.float32], k: int, selector: Selector | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """FAISS's own k best of each query, scores and rows `[n, k]`: ties cut anyhow, -inf and -1 where none is left."""
        scores, rows = self._scan(queries, min(k, self.rows), selector)
        absent = rows < 0
        scores[absent] = -np.inf
        rows += self.first
        rows[absent] = -1
        return scores, rows

    def _placed(self, hits: Hits) -> Hits:
        return Hits(hits.scores, hits.rows + self.first) if self.first else hits

    def _scan(
        self, queries: NDArray[np.float32], k: int, selector: Selector | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """FAISS itself: scores and rows `[n, k]`, padded with row -1, equal scores in no useful order."""
        return ask(self._flat, queries, k, None if selector is None else selector.params)


def ask(
    index: Any, queries: NDArray[np.float32], k: int, params: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A FAISS index on the calling thread alone: scores and rows `[n, k]`."""
    n, width = queries.shape
    # `search_c` reads raw memory and would read past the end; `swig_ptr` checks the type and the layout.
    if width != index.d:
        raise ValueError(f"queries: found width {width}, expected {index.d}; remedy: pad them")
    scores = np.empty((n, k), np.float32)
    rows = np.empty((n, k), np.int64)
    # The number is per calling thread. FAISS divides queries among OpenMP threads, not rows, and their
    # team spins at its barriers: beside other busy processes, 64 queries over 1 MB took 375 us each with
    # a team of two and 99 us without. So the threads are ours (`ShardedIndex`).
    faiss.omp_set_num_threads(1)
    index.search_c(n, faiss.swig_ptr(queries), k, faiss.swig_ptr(scores), faiss.swig_ptr(rows), params)
    return scores, rows


def _proven(scores: NDArray[np.float32], rows: NDArray[np.int64], k: int, *, whole: bool) -> Hits | None:
    """The k best of what FAISS found (in descending order), or None when it may have cut a tie.

    Among rows that tie for the last place FAISS keeps any (measured: the larger numbers), and it orders the
    tied it keeps by no rule of ours. So one row more than asked is fetched: only a lower score after the
    k-th, or that there are no more rows, proves the set; and ties inside it are put in order here.
    """
    if rows[-1] < 0:
        found = int(np.count_nonzero(rows >= 0))
        scores, rows, whole = scores[:found], rows[:found], True
    values = scores.tolist()
    if not whole and values[-1] == values[k - 1]:
        return None
    return ordered(scores, rows, k)


def ordered(scores: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> Hits:
    """The k best of descending scores, equal ones by ascending row."""
    values = scores.tolist()
    if len(set(values)) < len(values):
        order = np.lexsort((rows, -scores))
        scores, rows = scores[order], rows[order]
    return Hits(scores[:k], rows[:k])
