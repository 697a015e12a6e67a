"""Per-label thresholds that maximise F-beta on held-out scores; beta 1.8 prefers recall over precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEFAULT_BETA = 1.8


def fit_exclusive(
    scores: NDArray[np.float32], targets: NDArray[np.int64], *, beta: float = DEFAULT_BETA
) -> tuple[float, ...]:
    """Thresholds for labels that exclude each other: a row counts for a label only where that label scores best.

    scores [rows, labels] must be held-out; targets [rows] hold the label's number, or -1 for a row that belongs to none
    (out-of-scope rows belong here: without them nothing is ever rejected).
    """
    winners = scores.argmax(axis=1)
    thresholds = []
    for label in range(scores.shape[1]):
        wins = winners == label
        thresholds.append(
            best(scores[wins, label], targets[wins] == label, int((targets == label).sum()), beta)
        )
    return tuple(thresholds)


def fit_independent(
    scores: NDArray[np.float32], targets: NDArray[np.bool_], *, beta: float = DEFAULT_BETA
) -> tuple[float, ...]:
    """Thresholds for labels on their own; scores and targets are [rows, labels]."""
    return tuple(
        best(scores[:, label], targets[:, label], int(targets[:, label].sum()), beta)
        for label in range(scores.shape[1])
    )


def best(scores: NDArray[np.float32], hits: NDArray[np.bool_], positives: int, beta: float) -> float:
    """The threshold with the best F-beta; the midpoint to the next score below, so that ties and noise do not decide."""
    if not hits.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ordered, true = scores[order].astype(np.float64), np.cumsum(hits[order])
    accepted = np.arange(1, len(ordered) + 1)
    f_beta = (1 + beta**2) * true / (accepted + beta**2 * positives)
    last_of_its_score = np.append(ordered[1:] < ordered[:-1], True)
    cut = int(np.flatnonzero(last_of_its_score)[f_beta[last_of_its_score].argmax()])
    below = ordered[cut + 1] if cut + 1 < len(ordered) else 0.0
    return float((ordered[cut] + below) / 2)
