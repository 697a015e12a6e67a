"""Per-label thresholds that maximise F-beta on held-out scores; beta 1.8 prefers recall over precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

DEFAULT_BETA = 1.8
_PARTS = 5


def fit_exclusive(
    scores: FloatArray,
    targets: NDArray[np.int64],
    *,
    beta: float = DEFAULT_BETA,
    open_: NDArray[np.bool_] | None = None,
) -> tuple[float, ...]:
    """Thresholds for labels that exclude each other: a row counts for a label only where that label scores best.

    scores [rows, labels] must be held-out; targets [rows] hold the label's number, or -1 for a row that belongs to none
    (out-of-scope rows belong here: without them nothing is ever rejected). Rows that are not `open_` [rows] are refused
    whatever their label's score, because they were found out of scope.
    """
    winners = scores.argmax(axis=1)
    if open_ is not None:
        winners = np.where(open_, winners, -1)
    found = []
    for label in range(scores.shape[1]):
        wins = winners == label
        found.append(best(scores[wins, label], targets[wins] == label, int((targets == label).sum()), beta))
    return tuple(found)


def fit_independent(
    scores: FloatArray, targets: NDArray[np.bool_], *, beta: float = DEFAULT_BETA
) -> tuple[float, ...]:
    """Thresholds for labels on their own; scores and targets are [rows, labels]."""
    return tuple(
        best(scores[:, label], targets[:, label], int(targets[:, label].sum()), beta)
        for label in range(scores.shape[1])
    )


def best(
    scores: FloatArray,
    hits: NDArray[np.bool_],
    positives: float,
    beta: float,
    *,
    weights: NDArray[np.float64] | None = None,
) -> float:
    """The threshold with the best F-beta; the midpoint to the next score below, so that ties and noise do not decide.

    `positives` counts the rows that ought to be accepted, those that cannot be included. Rows may weigh.
    """
    if not hits.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    counted = np.ones(len(order)) if weights is None else weights[order]
    true, accepted = np.cumsum(counted * hits[order]), np.cumsum(counted)
    f_beta = (1 + beta**2) * true / (accepted + beta**2 * positives)
    last_of_its_score = np.append(ordered[1:] < ordered[:-1], True)
    cut = int(np.flatnonzero(last_of_its_score)[f_beta[last_of_its_score].argmax()])
    below = ordered[cut + 1] if cut + 1 < len(ordered) else 0.0
    return float((ordered[cut] + below) / 2)


def promised_exclusive(
    scores: FloatArray,
    targets: NDArray[np.int64],
    *,
    beta: float = DEFAULT_BETA,
    open_: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[labels] the recall to be expected of thresholds fitted like these: each part's, with thresholds of the others."""
    labels = scores.shape[1]
    admitted = np.ones(len(scores), np.bool_) if open_ is None else open_
    winners, hits = scores.argmax(axis=1), np.zeros(labels)
    for seen in _parts(len(scores), seed):
        limits = np.array(fit_exclusive(scores[seen], targets[seen], beta=beta, open_=admitted[seen]))
        rows = np.flatnonzero(~seen & admitted & (winners == targets))
        right = rows[scores[rows, winners[rows]] >= limits[winners[rows]]]
        hits += np.bincount(targets[right], minlength=labels)
    return hits / np.maximum(np.bincount(targets[targets >= 0], minlength=labels), 1)


def promised_independent(
    scores: FloatArray, targets: NDArray[np.bool_], *, beta: float = DEFAULT_BETA, seed: int = 0
) -> NDArray[np.float64]:
    """[labels] the same for labels on their own."""
    hits = np.zeros(scores.shape[1])
    for seen in _parts(len(scores), seed):
        limits = np.array(fit_independent(scores[seen], targets[seen], beta=beta))
        hits += (targets[~seen] & (scores[~seen] >= limits)).sum(axis=0)
    promised: NDArray[np.float64] = hits / np.maximum(targets.sum(axis=0), 1)
    return promised


def _parts(rows: int, seed: int) -> list[NDArray[np.bool_]]:
    """Which rows are seen, for each part of them that is not."""
    part = np.random.default_rng(seed).permutation(rows) % _PARTS
    return [part != unseen for unseen in range(_PARTS)]
