"""Two heads side by side: their measures on the same labelled rows, and every phrase they answer differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Heard
from annotators.fleet import Fleet
from annotators.table import Head
from annotators.token import TokenHead
from nlu.heads import tokens, verdict
from nlu.heads.material import Material
from nlu.heads.verdict import ClassHead, Verdict

_NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Flip:
    """A phrase that two heads answer differently. An answer is what is accepted."""

    phrase: str
    before: str
    after: str
    gold: str  # "" where it is not known


@dataclass(frozen=True)
class Comparison:
    """What changes from one head to the next."""

    measures: dict[str, dict[str, Any]]  # name -> before, after, and low and high of the difference
    flips: tuple[Flip, ...]
    phrases: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        pairs = Counter((flip.before, flip.after) for flip in self.flips)
        return {
            "phrases": self.phrases,
            "measures": self.measures,
            "flips": [
                {"phrase": f.phrase, "before": f.before, "after": f.after, "gold": f.gold} for f in self.flips
            ],
            "by_pair": [{"before": a, "after": b, "count": count} for (a, b), count in pairs.most_common()],
        }


def compare(before: Head, after: Head, rows: Material, *, labelled: bool) -> Comparison:
    """Ask both heads the same rows; labelled ones without a label belong to none.

    Raises ValueError for heads of different vectorizers or of kinds that do not compare.
    """
    check(before, after)
    flips = [
        Flip(row.phrase, old, new, _gold(row.labels, row.marks, row.phrase) if labelled else "")
        for row, old, new in zip(rows.rows, said(before, rows), said(after, rows), strict=True)
        if old != new
    ]
    measures = _measures(before, after, rows) if labelled else {}
    return Comparison(measures, tuple(flips), len(rows))


def check(before: Head, after: Head) -> None:
    """Raise ValueError for heads whose answers cannot stand side by side."""
    ours, theirs = before.spec.requires.vectorizer, after.spec.requires.vectorizer
    if ours != theirs:
        raise ValueError(
            f"head {after.spec.name}: found one trained on vectorizer {theirs[:12]}, expected {ours[:12]}, that of {before.spec.name}; "
            "retrain it with --bundle naming a bundle of that vectorizer"
        )
    if isinstance(before, TokenHead) != isinstance(after, TokenHead):
        raise ValueError(
            f"heads: found kinds {before.spec.kind} and {after.spec.kind}, expected two that mark spans or two that name labels"
        )


def said(head: Head, rows: Material) -> list[str]:
    """What a head accepts of each row, as serving would."""
    fleet = Fleet([head])
    answers = []
    for row, encoding, context in zip(rows.rows, rows.encodings, rows.contexts, strict=True):
        found = fleet.annotate(Heard.alone(row.phrase, encoding, context))[0]
        spans = [f"{span.label}={row.phrase[span.start : span.end]}" for span in found.spans]
        labels = sorted(label.label for label in found.labels if label.accepted)
        answers.append(", ".join([*labels, *spans]) or _NOTHING)
    return answers


def _gold(labels: Sequence[str], marks: Sequence[Any], phrase: str) -> str:
    spans = [f"{mark.label}={phrase[mark.start : mark.end]}" for mark in marks]
    return ", ".join([*sorted(label for label in labels if label), *spans]) or _NOTHING


def _measures(before: Head, after: Head, rows: Material) -> dict[str, dict[str, Any]]:
    if isinstance(before, TokenHead) and isinstance(after, TokenHead):
        old, new = tokens.counts(before, rows), tokens.counts(after, rows)
        return {"span_f1": _paired(old, new, _span_f1)}
    if isinstance(before, ClassHead) and isinstance(after, ClassHead):
        old_verdict, new_verdict = (verdict.judge(head, rows, rows.take([])) for head in (before, after))
        belongs = np.array([bool(row.labels) for row in rows.rows], np.bool_)
        everyone = np.ones_like(belongs)
        measures: dict[str, tuple[Callable[[Verdict], NDArray[np.bool_]], NDArray[np.bool_]]] = {
            "accuracy": (lambda judged: judged.right, belongs),
            "coverage": (lambda judged: np.asarray(judged.accepted.any(axis=1), np.bool_), everyone),
            "accepted and right": (lambda judged: judged.exact, everyone),
        }
        if not before.spec.exclusive or not belongs.any():
            del measures["accuracy"]
        return {
            name: _paired(_column(measure(old_verdict)[rows]), _column(measure(new_verdict)[rows]), _mean)
            for name, (measure, rows) in measures.items()
        }
    return {}


def _column(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[rows, 1]."""
    return hits.astype(np.float64).reshape(-1, 1)


def _paired(old: NDArray[np.float64], new: NDArray[np.float64], measure: Any) -> dict[str, Any]:
    """A measure of rows' counts [rows, ...] before and after, and the interval of its change over resampled rows."""
    everyone = np.ones((1, len(old)))
    drawn = np.random.default_rng(0).poisson(1.0, (500, len(old)))
    change = measure(drawn, new) - measure(drawn, old)
    low, high = np.percentile(change, [2.5, 97.5])
    return {
        "before": float(measure(everyone, old)[0]),
        "after": float(measure(everyone, new)[0]),
        "change_low": float(low),
        "change_high": float(high),
    }


def _mean(drawn: NDArray[Any], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((drawn @ counts)[:, 0] / np.maximum(drawn.sum(axis=1), 1))


def _span_f1(drawn: NDArray[Any], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    hits, wanted, proposed = (drawn @ counts).T
    return np.asarray(2 * hits / np.maximum(wanted + proposed, 1))
