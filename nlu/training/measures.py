"""How good answers are, as numbers: each measure is a function of the test rows, so that rows can be drawn again.

A Statistic gets row numbers, which may repeat, and gives the number of those rows; `scores.compare` calls it once for
every row in turn, and once for every resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

FloatArray = NDArray[np.float32]
Rows = NDArray[np.int64]
Statistic = Callable[[Rows], float]  # the number that some test rows give; rows may repeat
Metric = Callable[[NDArray[np.str_], NDArray[np.str_]], float]  # (gold, predicted)


def accuracy(gold: NDArray[np.str_], predicted: NDArray[np.str_]) -> float:
    """Share of right answers."""
    return float((gold == predicted).mean())


def f1(gold: NDArray[np.str_], predicted: NDArray[np.str_]) -> float:
    """Macro-F1."""
    return macro_f(gold, predicted, 1.0)(np.arange(len(gold)))


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """The mean of one value a row."""
    return lambda rows: float(values[rows].mean())


def median_of(values: NDArray[np.float64]) -> Statistic:
    """The median of one value a row."""
    return lambda rows: float(np.median(values[rows]))


def macro_f(gold: NDArray[np.str_], predicted: NDArray[np.str_], beta: float) -> Statistic:
    """Mean F-beta over the labels that are in the gold rows."""
    names, codes = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    wanted, proposed = codes[: len(gold)], codes[len(gold) :]
    right = wanted == proposed

    def statistic(rows: Rows) -> float:
        hits = np.bincount(wanted[rows][right[rows]], minlength=len(names))
        positives = np.bincount(wanted[rows], minlength=len(names))
        return _mean_f(hits, positives, np.bincount(proposed[rows], minlength=len(names)), beta)

    return statistic


def macro_f_of_many(wanted: NDArray[np.bool_], proposed: NDArray[np.bool_]) -> Statistic:
    """Mean F1 over the labels that are in the gold rows, [rows, labels] each."""
    hits = wanted & proposed
    return lambda rows: _mean_f(hits[rows].sum(0), wanted[rows].sum(0), proposed[rows].sum(0), 1.0)


def _mean_f(
    hits: NDArray[np.int64], positives: NDArray[np.int64], proposed: NDArray[np.int64], beta: float
) -> float:
    present = positives > 0
    scores = (1 + beta**2) * hits[present] / (beta**2 * positives[present] + proposed[present])
    return float(scores.mean()) if len(scores) else 0.0


def span_f1(counts: NDArray[np.float64]) -> Statistic:
    """Micro-F1 from (right, found, wanted) of each phrase."""

    def statistic(rows: Rows) -> float:
        right, found, wanted = counts[rows].sum(axis=0)
        return float(2 * right / (found + wanted)) if found + wanted else 0.0

    return statistic


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> Statistic:
    """Chance that a positive row scores above a negative one (Mann and Whitney 1947); 0.5 where one kind is missing."""

    def statistic(rows: Rows) -> float:
        chosen = positive[rows]
        count = int(chosen.sum())
        if not 0 < count < len(rows):
            return 0.5
        ranks = float(rankdata(scores[rows])[chosen].sum())
        return (ranks - count * (count + 1) / 2) / (count * (len(rows) - count))

    return statistic


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> Statistic:
    """Correlation of ranks, ties at their mean; 0 where one side does not vary."""

    def statistic(rows: Rows) -> float:
        a, b = (rankdata(values[rows]) for values in (one, other))
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
        return float((a * b).sum()) / norm if norm else 0.0

    return statistic


def right_first(anchors: FloatArray, positives: FloatArray, candidates: int) -> NDArray[np.float64]:
    """1 for each anchor whose own positive is nearest among a round's; rounds of `candidates`, a smaller rest dropped."""
    rounds = range(0, max(1, len(anchors) // candidates) * candidates, candidates)
    hits = [
        (cosines := anchors[i : i + candidates] @ positives[i : i + candidates].T).argmax(axis=1)
        == np.arange(len(cosines))
        for i in rounds
    ]
    return np.concatenate(hits).astype(np.float64)


def nearest(vectors: FloatArray, known: FloatArray) -> FloatArray:
    """Greatest cosine of each row to any known one; in pieces, because all of CLINC150 would take 400 MB."""
    pieces = [(vectors[i : i + 512] @ known.T).max(axis=1) for i in range(0, len(vectors), 512)]
    return np.concatenate(pieces)
