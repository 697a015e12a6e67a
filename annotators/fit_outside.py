"""Choosing and calibrating the score of being out of scope, on held-out phrases and on outsiders nobody trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from annotators import thresholds
from annotators.answers import HeldOut
from annotators.linear import single_threaded
from annotators.outside import MEASURES, Outside, measured

FloatArray = NDArray[np.float32]

METHODS = {
    "max_logit": ("max_logit",),
    "energy": ("energy",),
    "centroid": ("centroid",),
    "blend": ("max_logit", "energy", "centroid"),
}
SHARE = 0.1  # of all phrases, that are expected to be out of scope
_FOLDS = 5
_WORTH = 0.002  # of AUROC, that a blend must bring to be worth its centroids


@dataclass(frozen=True, slots=True)
class FittedOutside:
    """The score, and what speaks for it."""

    outside: Outside
    aurocs: dict[str, float]  # method -> on held-out phrases and outsiders
    inside_scores: FloatArray  # [rows] of phrases that belong
    outside_scores: FloatArray  # [outsiders]


def fit(
    held_out: HeldOut,
    scale: float,
    *,
    centroids: bool,
    share: float = SHARE,
    beta: float = 1.0,
    seed: int = 0,
) -> FittedOutside:
    """The best method by AUROC, the simplest where they are level, with its threshold at the best F-beta.

    Scores are chances where `share` of all phrases are out of scope, whatever the share of outsiders given. `scale` is the
    temperature of the logits; `centroids` says whether the head can carry them.
    """
    inside = measured(held_out.raw * np.float32(scale), held_out.cosines if centroids else None)
    strange = measured(held_out.strange * np.float32(scale), held_out.strange_cosines if centroids else None)
    rows = np.concatenate([inside, strange]).astype(np.float64)
    is_outside = np.arange(len(rows)) >= len(inside)
    weights = np.where(is_outside, share / max(1, len(strange)), (1 - share) / len(inside)) * len(rows)
    folds = np.random.default_rng(seed).permutation(len(rows)) % _FOLDS
    scores = {
        method: _held_out_margins(
            rows[:, [MEASURES.index(name) for name in used]], is_outside, weights, folds
        )
        for method, used in METHODS.items()
        if centroids or "centroid" not in used
    }
    aurocs = {method: float(roc_auc_score(is_outside, margins)) for method, margins in scores.items()}
    method = max(aurocs, key=lambda name: aurocs[name] - _WORTH * (len(METHODS[name]) - 1))
    used = METHODS[method]
    columns = [MEASURES.index(name) for name in used]
    slopes, shift = _logistic(rows[:, columns], is_outside, weights)
    margins = scores[method]
    outside = Outside(
        method=method,
        shift=shift,
        threshold=_threshold(expit(margins), is_outside, weights, beta),
        **{name: -float(slope) for name, slope in zip(used, slopes, strict=True)},
    )
    chances = expit(margins).astype(np.float32)
    return FittedOutside(outside, aurocs, chances[~is_outside], chances[is_outside])


def _held_out_margins(
    rows: NDArray[np.float64],
    is_outside: NDArray[np.bool_],
    weights: NDArray[np.float64],
    folds: NDArray[np.int64],
) -> NDArray[np.float64]:
    margins = np.zeros(len(rows))
    for fold in range(_FOLDS):
        seen = folds != fold
        if is_outside[seen].all() or not is_outside[seen].any():
            continue
        slopes, shift = _logistic(rows[seen], is_outside[seen], weights[seen])
        margins[~seen] = rows[~seen] @ slopes + shift
    return margins


def _logistic(
    rows: NDArray[np.float64], is_outside: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    mean, spread = rows.mean(axis=0), rows.std(axis=0) + 1e-9
    with single_threaded(True):
        found = LogisticRegression(C=10.0).fit((rows - mean) / spread, is_outside, sample_weight=weights)
    slopes = found.coef_[0] / spread
    return slopes, float(found.intercept_[0] - slopes @ mean)


def _threshold(
    scores: NDArray[np.float64], is_outside: NDArray[np.bool_], weights: NDArray[np.float64], beta: float
) -> float:
    return thresholds.best(
        scores.astype(np.float32), is_outside, float(weights[is_outside].sum()), beta, weights=weights
    )
