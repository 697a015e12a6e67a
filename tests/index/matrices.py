"""Rows as a shard file holds them, an index over them in memory, and what it means that two answers agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index.layout import padded
from index.matrix import Matrix
from index.search import Hits, prepare, prepare_rows
from index.sharded import ShardedIndex

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
ROUNDING = 2e-6  # of float32, in a cosine


def stored(vectors: Floats) -> Halves:
    """`[rows, padded]`: at unit length, rounded, zeros at the end."""
    rows, dim = vectors.shape
    halves = np.zeros((rows, padded(dim)), np.float16)
    halves[:, :dim] = prepare_rows(vectors, dim)
    return halves


def query_of(vector: Floats) -> Floats:
    """`[padded]`: prepared as `ShardedIndex` does it."""
    query = np.zeros(padded(len(vector)), np.float32)
    query[: len(vector)] = prepare(vector, len(vector))
    return query


def index_of(vectors: Floats, *, cuts: Sequence[int] | None = (), threads: int = 1) -> ShardedIndex:
    """An exact index in memory; a scan is parted after these rows."""
    return ShardedIndex(Matrix(stored(vectors)), vectors.shape[1], cuts=cuts, threads=threads)


def packed(allowed: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A mask as an index takes it."""
    return np.packbits(np.asarray(allowed, np.bool_), bitorder="little")


def plain(hits: Hits) -> tuple[list[float], list[int]]:
    """Scores and rows, to compare to the last bit."""
    return hits.scores.tolist(), hits.rows.tolist()


def assert_same(found: Hits, expected: Hits, every: Hits) -> None:
    """Equal up to the rounding of float32 sums: the scores of the truth, each on a row that truly has it."""
    np.testing.assert_allclose(found.scores, expected.scores, atol=ROUNDING)  # also as many
    truth = dict(zip(every.rows.tolist(), every.scores.tolist(), strict=True))
    np.testing.assert_allclose(found.scores, [truth[row] for row in found.rows.tolist()], atol=ROUNDING)
    assert len(set(found.rows.tolist())) == len(found)
