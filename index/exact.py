"""`ExactIndex`, the numpy twin of the served index: slow, obvious, and the truth the tests compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.search import Hits, QueryInvalid, check_k, check_mask, prepare_rows


class ExactIndex:
    """Brute force in float32 over the same float16-rounded vectors that a shard file holds."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        """Takes `[rows, dim]` of any length but zero: normalised and rounded here, as the build does."""
        if vectors.ndim != 2:
            raise QueryInvalid(
                f"vectors: found shape {vectors.shape}, expected [rows, dim]; remedy: stack them"
            )
        self.dim = int(vectors.shape[1])
        self._vectors = prepare_rows(vectors, self.dim).astype(np.float16).astype(np.float32)

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, vector: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None) -> Hits:
        if vector.ndim != 1:
            raise QueryInvalid(
                f"vector: found shape {vector.shape}, expected [{self.dim}]; remedy: search_many"
            )
        return self.search_many(vector[None], k, mask=mask)[0]

    def search_many(
        self, vectors: NDArray[np.float32], k: int, *, mask: NDArray[np.uint8] | None = None
    ) -> list[Hits]:
        if vectors.ndim != 2:
            raise QueryInvalid(
                f"vectors: found shape {vectors.shape}, expected [n, {self.dim}]; remedy: search"
            )
        queries = prepare_rows(vectors, self.dim)
        check_k(k)
        rows = np.arange(len(self))
        if mask is not None:
            check_mask(mask, len(self))
            rows = np.flatnonzero(np.unpackbits(mask, count=len(self), bitorder="little"))
        return [_best(self._vectors[rows], rows, query, k) for query in queries]


def _best(vectors: NDArray[np.float32], rows: NDArray[np.int64], query: NDArray[np.float32], k: int) -> Hits:
    # einsum sums every row in the same order; a BLAS product may not, and would tell equal vectors apart.
    scores = np.einsum("ij,j->i", vectors, query)
    order = np.argsort(-scores, kind="stable")[:k]
    return Hits(scores[order], rows[order])
