"""How good a head is, measured on phrases it has not seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

from annotators.annotator import Label

Spans = Collection[tuple[str, int, int]]


def classification(answers: Sequence[Sequence[Label]], gold: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro-F1 over the gold labels, expected calibration error, coverage, and precision where the head accepts."""
    best = [labels[0] for labels in answers]
    right = np.array([label.label == want for label, want in zip(best, gold, strict=True)])
    accepted = np.array([label.accepted for label in best])
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(
            f1_score(
                gold,
                [label.label for label in best],
                average="macro",
                labels=sorted(set(gold)),
                zero_division=0,
            )
        ),
        "ece": expected_calibration_error(np.array([label.score for label in best]), right),
        "coverage": float(accepted.mean()),
        "accepted_precision": float(right[accepted].mean()) if accepted.any() else 0.0,
        "phrases": float(len(gold)),
    }


def expected_calibration_error(
    scores: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10
) -> float:
    """Mean gap between confidence and accuracy over bins of equal size in phrases (Nguyen and O'Connor 2015)."""
    order = np.argsort(scores, kind="stable")
    gaps = [
        abs(float(scores[chunk].mean()) - float(right[chunk].mean())) * len(chunk)
        for chunk in np.array_split(order, bins)
        if len(chunk)
    ]
    return sum(gaps) / len(scores)


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Area under the receiver operating characteristic."""
    return float(roc_auc_score(positive, scores))


def spans(found: Sequence[Spans], gold: Sequence[Spans]) -> dict[str, float]:
    """Micro precision, recall and F1 of exact spans: label and both borders must agree."""
    hits = sum(len(set(f) & set(g)) for f, g in zip(found, gold, strict=True))
    proposed, wanted = sum(map(len, found)), sum(map(len, gold))
    precision, recall = hits / max(1, proposed), hits / max(1, wanted)
    return {
        "precision": precision,
        "recall": recall,
        "span_f1": 2 * precision * recall / max(1e-9, precision + recall),
        "phrases": float(len(gold)),
    }
