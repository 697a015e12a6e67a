"""How close together an index lies: what an author sets thresholds on similarity by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from index.items import Items
from index.replies import Hit, Replies
from index.search import Hits
from index.sharded import ShardedIndex

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SAMPLE = 10_000
SEED = 0
_BLOCK = 512  # searched for together
_FIRST_K = 16


class Quantiles(NamedTuple):
    """Similarities at QUANTILES of a sample of rows."""

    rows: int
    other: dict[str, float]  # of a row's vector to the nearest other vector that leads to another reply
    own: dict[str, float]  # of a prompt to its own reply's text; empty where no row has a prompt


def quantiles(
    replies: Replies,
    *,
    sample: int = SAMPLE,
    seed: int = SEED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantiles:
    """Of at most `sample` rows, drawn by `seed`. Who may say a reply, and when, does not count here."""
    items, index = replies.items, cast(ShardedIndex, replies.index)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(items))[:sample])
    other: list[float] = []
    for start in range(0, len(drawn), _BLOCK):
        rows = drawn[start : start + _BLOCK]
        vectors = index.rows[items.vectors[rows], : index.dim].astype(np.float32)
        found = index.search_many(vectors, _FIRST_K)
        other += [
            _nearest_other(row, vector, hits, index, items)
            for row, vector, hits in zip(rows.tolist(), vectors, found, strict=True)
        ]
        progress(start + len(rows), len(drawn))
    return Quantiles(len(drawn), _at(other), _at(_own(drawn.tolist(), replies, index)))


def _nearest_other(
    row: int, vector: NDArray[np.float32], hits: Hits, index: ShardedIndex, items: Items
) -> float:
    """-1 where there is no other reply."""
    k = _FIRST_K
    while True:
        for score, found in zip(hits.scores.tolist(), hits.rows.tolist(), strict=True):
            if found != items.vectors[row] and any(
                items.replies[pair] != items.replies[row] for pair in items.pairs_of(found)
            ):
                return float(min(score, 1.0))
        if k >= len(index):
            return -1.0
        k *= 8
        hits = index.search(vector, k)


def _own(rows: list[int], replies: Replies, index: ShardedIndex) -> list[float]:
    """Of those rows that have a prompt."""
    hits = [Hit(item, 1.0, row) for row in rows for item in (replies.items.reply(row),) if item.prompt]
    prompts = index.rows[replies.items.vectors[[hit.row for hit in hits]], : index.dim].astype(np.float32)
    own: list[float] = np.einsum("ij,ij->i", prompts, replies.said(hits)).clip(-1, 1).tolist()
    return own


def _at(similarities: list[float]) -> dict[str, float]:
    if not similarities:
        return {}
    found = np.quantile(similarities, QUANTILES).tolist()
    return {f"{quantile:g}": round(value, 4) for quantile, value in zip(QUANTILES, found, strict=True)}
