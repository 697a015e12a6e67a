"""What a search is: the `Index` protocol, its answer `Hits`, and the gate every vector passes on its way in.

The score convention of the whole project, stated once, here: a score is the cosine; higher is better; hits
come descending, equal scores by ascending row; vectors are brought to unit length once, on the way in
(`prepare`), so that an inner product is the cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TINY, HUGE = 1e-12, 1e12  # squares between them lose nothing in float32


class QueryInvalid(ValueError):
    """A vector, a number of hits or a mask that cannot be searched with."""


@dataclass(frozen=True, slots=True)
class Hits:
    """The answer to one query: as many hits as there are, never padded, so a row is always a real row."""

    scores: NDArray[np.float32]  # [hits], descending
    rows: NDArray[np.int64]  # [hits]

    def __len__(self) -> int:
        return len(self.rows)


NOTHING = Hits(np.empty(0, np.float32), np.empty(0, np.int64))


class Index(Protocol):
    """Nearest neighbours over rows numbered from 0.

    `mask` is a packed bitmap over all rows (`np.packbits(..., bitorder="little")`); a set bit means that the
    row may be returned. Both searches take vectors of any length but zero, raise `QueryInvalid` for what
    cannot be searched, and are thread-safe.
    """

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def search(self, vector: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None) -> Hits:
        """The k best rows for one vector `[dim]`; fewer when fewer are allowed."""
        ...

    def search_many(
        self, vectors: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None
    ) -> list[Hits]:
        """`search` for every row of `[n, dim]`, with the very same answers."""
        ...


def prepare(vector: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """One vector `[dim]` at unit length, or `QueryInvalid`.

    This is the guard in front of FAISS, whose own checks are assert statements (gone under `python -O`) and
    which ranks NaN and infinity wherever they happen to fall. A scan leaves nothing of numpy in the
    processor's caches and every call into it starts cold, so an ordinary vector passes in as few calls as
    will do.
    """
    if isinstance(vector, np.ndarray) and vector.shape == (dim,) and vector.dtype == np.float32:
        square = float(np.vdot(vector, vector))  # unlike `dot` and `@`, without a warning when it overflows
        if TINY < square < HUGE:  # False for NaN
            unit: NDArray[np.float32] = vector * np.float32(1.0 / math.sqrt(square))
            return unit
    if isinstance(vector, np.ndarray) and vector.ndim != 1:
        raise QueryInvalid(f"vector: found shape {vector.shape}, expected [{dim}]; remedy: pass one vector")
    row: NDArray[np.float32] = prepare_rows(np.atleast_2d(vector), dim)[0]
    return row


def prepare_rows(vectors: NDArray[Any], dim: int, *, first_row: int = 0) -> NDArray[np.float32]:
    """`prepare` for every row of `[n, dim]`; an error names its row, counted from `first_row`."""
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f":
        found = getattr(vectors, "dtype", type(vectors).__name__)
        raise QueryInvalid(f"vectors: found {found}, expected an array of float32; remedy: convert it")
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise QueryInvalid(
            f"vectors: found shape {vectors.shape}, expected rows of width {dim};"
            " remedy: encode with the vectorizer this index was built with"
        )
    with np.errstate(all="ignore"):  # what is NaN or overflows is refused by name below
        wide = vectors.astype(np.float64)  # holds the square of every float32: none overflows or vanishes
        squares = np.einsum("ij,ij->i", wide, wide)
    good = (squares > 0.0) & (squares < np.inf)
    if not good.all():
        row = int(np.argmin(good))
        found = "zero length" if squares[row] == 0.0 else "NaN, infinity or overflow"
        raise QueryInvalid(
            f"vectors row {first_row + row}: found {found}, expected finite numbers that are not all zero;"
            " remedy: look at what produced this vector"
        )
    units: NDArray[np.float32] = (wide / np.sqrt(squares)[:, None]).astype(np.float32)
    return units


def check_k(k: int) -> None:
    if k < 1:
        raise QueryInvalid(f"k: found {k}, expected at least 1; remedy: ask for one hit or more")


def check_mask(mask: NDArray[np.uint8], rows: int) -> None:
    """Every shape but the right one is refused: past the end of a short mask, FAISS would allow no row."""
    size = (rows + 7) // 8
    if mask.dtype != np.uint8 or mask.shape != (size,) or not mask.flags.c_contiguous:
        raise QueryInvalid(
            f"mask: found {mask.dtype} of shape {mask.shape}, expected {size} bytes in a row for {rows} rows;"
            ' remedy: pack one bit per row with np.packbits(bitorder="little")'
        )
