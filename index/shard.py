"""One shard: a raw float16 file, checked number by number, and the same rows inside FAISS, ready to scan.

No FAISS file format is ever parsed (its reader takes lying headers and trailing bytes): the codes of an
`IndexScalarQuantizer` are exactly the bytes of the file. The only module that imports faiss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.search import Hits

NORM_TOLERANCE = 1e-3  # rounding to float16 moves a coordinate, so the length, by at most 2**-11 = 4.9e-4
CHECK_ROWS = 4096  # rows widened to float32 at a time, so that checking a shard does not triple its memory


class IndexInvalid(ValueError):
    """A stored index that must not be served; the whole of it is refused, never the part that would load."""

    def __init__(self, *, part: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{part}: found {found}, expected {expected}; remedy: {remedy}")
        self.part = part
        self.found = found
        self.expected = expected
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Selector:
    """A mask in the form FAISS reads it. C++ holds only addresses, so all three must live together."""

    params: Any
    bitmap: Any
    mask: NDArray[np.uint8]


def padded(dim: int) -> int:
    """The stored width: the next multiple of 16, zeros at the end.

    FAISS scans float16 with SIMD only at such widths: 660,000 rows take 220 ms at 300 and 17 ms at 304.
    """
    return -(-dim // 16) * 16


def read(path: Path, *, rows: int, dim: int) -> NDArray[np.float16]:
    """The vectors `[rows, padded]` of a little-endian file, or `IndexInvalid` at the first number that no
    build would have written.
    """
    size = rows * padded(dim) * 2
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise IndexInvalid(
            part=path.name,
            found="no file" if found is None else f"{found} bytes",
            expected=f"{size} bytes ({rows} rows of {padded(dim)} float16)",
            remedy="build or pull the index again",
        )
    vectors = np.fromfile(path, dtype="<f2").astype(np.float16, copy=False).reshape(rows, padded(dim))
    for start in range(0, rows, CHECK_ROWS):
        _check(vectors[start : start + CHECK_ROWS], dim, part=path.name, first_row=start)
    return vectors


def select(mask: NDArray[np.uint8]) -> Selector:
    """A selector over a shard's slice of a checked mask; shares the mask's memory, copies nothing."""
    bitmap = faiss.IDSelectorBitmap(mask.size, faiss.swig_ptr(mask))  # the size is in bytes
    params = faiss.SearchParameters()
    params.sel = bitmap
    return Selector(params, bitmap, mask)


class Shard:
    """Rows 0 to n of one shard inside FAISS. Thread-safe: nothing changes later; a scan releases the GIL."""

    def __init__(self, vectors: NDArray[np.float16], *, placement: str = "cpu") -> None:
        """Copies `[rows, padded]` into FAISS and keeps no reference to the array."""
        if placement != "cpu":
            raise IndexInvalid(
                part="placement", found=placement, expected="cpu", remedy="place every shard on the CPU"
            )
        rows, width = int(vectors.shape[0]), int(vectors.shape[1])
        if vectors.dtype != np.float16 or width != padded(width) or not vectors.flags.c_contiguous:
            raise ValueError(f"vectors: found {vectors.dtype} of width {width}, expected what `read` returns")
        self.placement = placement
        self.rows = rows
        self.width = width
        self._flat = faiss.IndexScalarQuantizer(
            width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        faiss.copy_array_to_vector(vectors.reshape(-1).view(np.uint8), self._flat.codes)
        self._flat.ntotal = rows

    @classmethod
    def load(cls, path: Path, *, rows: int, dim: int, placement: str = "cpu") -> Shard:
        return cls(read(path, rows=rows, dim=dim), placement=placement)

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * 2

    def search(self, query: NDArray[np.float32], k: int, selector: Selector | None = None) -> Hits:
        """The k best rows for one prepared query `[padded]`, equal scores by ascending row."""
        want = k + 1
        while True:
            scores, rows = self._scan(query[None], min(want, self.rows), selector)
            hits = _exact(scores[0], rows[0], k, whole=want >= self.rows)
            if hits is not None:
                return hits
            want *= 4

    def search_many(
        self, queries: NDArray[np.float32], k: int, selector: Selector | None = None
    ) -> list[Hits]:
        """`search` for prepared queries `[n, padded]`."""
        scores, rows = self._scan(queries, min(k + 1, self.rows), selector)
        answers = []
        for i, query in enumerate(queries):
            hits = _exact(scores[i], rows[i], k, whole=k + 1 >= self.rows)
            answers.append(self.search(query, k, selector) if hits is None else hits)
        return answers

    def _scan(
        self, queries: NDArray[np.float32], k: int, selector: Selector | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """FAISS itself: scores and rows `[n, k]`, padded with row -1, equal scores in no useful order."""
        n, width = queries.shape
        # `search_c` reads raw memory and would read past the end; `swig_ptr` checks the type and the layout.
        if width != self.width:
            raise ValueError(f"queries: found width {width}, expected {self.width}; remedy: pad them")
        scores = np.empty((n, k), np.float32)
        rows = np.empty((n, k), np.int64)
        # The number is per calling thread. FAISS divides queries among OpenMP threads, not rows, and their
        # team spins at its barriers: beside other busy processes, 64 queries over 1 MB took 375 us each with
        # a team of two and 99 us without. So the threads are ours (`ShardedIndex`).
        faiss.omp_set_num_threads(1)
        self._flat.search_c(  # type: ignore[attr-defined]  # the C++ method, which faiss's stubs leave out
            n,
            faiss.swig_ptr(queries),
            k,
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            None if selector is None else selector.params,
        )
        return scores, rows


def _exact(scores: NDArray[np.float32], rows: NDArray[np.int64], k: int, *, whole: bool) -> Hits | None:
    """The k best of what FAISS found (in descending order), or None when it may have cut a tie.

    Among rows that tie for the last place FAISS keeps any (measured: the larger numbers), and it orders the
    tied it keeps by no rule of ours. So one row more than asked is fetched: only a lower score after the
    k-th, or that there are no more rows, proves the set; and ties inside it are put in order here.
    """
    if rows[-1] < 0:
        found = int(np.count_nonzero(rows >= 0))
        scores, rows, whole = scores[:found], rows[:found], True
    values = scores.tolist()
    if not whole and values[k] == values[k - 1]:
        return None
    if len(set(values)) < len(values):
        order = np.lexsort((rows, -scores))
        scores, rows = scores[order], rows[order]
    return Hits(scores[:k], rows[:k])


def _check(vectors: NDArray[np.float16], dim: int, *, part: str, first_row: int) -> None:
    with np.errstate(all="ignore"):  # what overflows or is NaN is reported by name below
        wide = vectors.astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        unit = np.abs(norms - 1.0) <= NORM_TOLERANCE  # False for NaN and infinity too
    if not unit.all():
        row = int(np.argmin(unit))
        found = f"length {norms[row]:.6g}" if np.isfinite(wide[row]).all() else "NaN or infinity"
        expected = "a finite vector of length 1"
    elif wide[:, dim:].any():
        row = int(np.argmax(wide[:, dim:].any(axis=1)))
        found, expected = "numbers in the padding", f"zeros after column {dim}"
    else:
        return
    raise IndexInvalid(
        part=f"{part} row {first_row + row}",
        found=found,
        expected=expected,
        remedy="build the index again; no build of this width wrote this file",
    )
