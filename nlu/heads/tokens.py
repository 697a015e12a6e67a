"""Fitting and reporting heads that mark spans: slots, entities, punctuation and case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators import calibration
from annotators.annotator import Span
from annotators.fit import About
from annotators.fit_token import FittedToken, by_token, fit_token
from annotators.report import expected_calibration_error
from annotators.restore import MARKS
from annotators.table import Head
from annotators.token import TokenHead
from nlu.heads import report
from nlu.heads.config import HeadConfig
from nlu.heads.material import Material, Materials
from nlu.heads.verdict import share

_ERRORS = 40

Bounds = tuple[str, int, int]


def fit_tokens(config: HeadConfig, about: About, materials: Materials) -> FittedToken:
    """A head on the spans of train; dev rows, where there are any, are trained on too, because thresholds come from folds."""
    restores = config.scheme == "restore"
    return fit_token(
        about,
        materials.train.joined(materials.dev).tagged,
        beta=config.beta,
        seed=config.seed,
        scheme="words" if restores else "bio",
        restores=restores,
    )


def report_tokens(head: Head, made: FittedToken, materials: Materials) -> dict[str, Any]:
    """Every section that is about spans."""
    if not isinstance(head, TokenHead):
        raise ValueError(f"{head.spec.name}: found kind {head.spec.kind}, expected token")
    folds = _of_folds(head, made)
    if not len(materials.test):
        return folds
    phrases, gold, found = _answers(head, materials.test)
    summary: dict[str, Any] = _summary(gold, found)
    scored = [
        (span.score, bounds in wanted)
        for bounds_of, wanted in zip(found, gold, strict=True)
        for bounds, span in bounds_of.items()
    ]
    scores, right = np.array([score for score, _ in scored]), np.array([hit for _, hit in scored], np.bool_)
    if len(scores):
        summary["ece_after"] = expected_calibration_error(scores, right)
    if head.spec.params.get("restores"):
        summary |= _marks(gold, found)
    exact = np.array([set(f) == g for f, g in zip(found, gold, strict=True)])
    return {
        "summary": summary,
        "classes": _classes(head, gold, found),
        "reliability": {"after": report.bins(scores, right)} if len(scores) else None,
        "errors": _errors(phrases, gold, found),
        "slices": report.lengths(phrases, exact),
        "regularisation": folds["regularisation"],
    }


def _answers(
    head: TokenHead, test: Material
) -> tuple[list[str], list[set[Bounds]], list[dict[Bounds, Span]]]:
    """Phrases, gold spans and found spans of each."""
    gold: list[set[Bounds]] = []
    found: list[dict[Bounds, Span]] = []
    for phrase in test.tagged:
        wanted = by_token(phrase) if head.spec.params.get("restores") else phrase.spans
        gold.append({span[:3] for span in wanted})
        tokens, offsets = phrase.encoding.tokens, phrase.encoding.offsets
        spans = () if tokens is None or offsets is None else head.decode(tokens, offsets)
        found.append({span[:3]: span for span in spans})
    return test.phrases, gold, found


def counts(head: TokenHead, rows: Material) -> NDArray[np.float64]:
    """[rows, 3]: spans found right, wanted and found."""
    _, gold, found = _answers(head, rows)
    return np.array(
        [(len(g & f.keys()), len(g), len(f)) for g, f in zip(gold, found, strict=True)], np.float64
    ).reshape(-1, 3)


def _summary(gold: Sequence[set[Bounds]], found: Sequence[dict[Bounds, Span]]) -> dict[str, Any]:
    hits = np.array([len(g & f.keys()) for g, f in zip(gold, found, strict=True)])
    wanted, proposed = (np.array([len(each) for each in side]) for side in (gold, found))
    drawn = np.random.default_rng(0).poisson(1.0, (300, len(hits)))
    f1 = 2 * hits.sum() / max(1, wanted.sum() + proposed.sum())
    trials = 2 * (drawn @ hits) / np.maximum(drawn @ (wanted + proposed), 1)
    low, high = np.percentile(trials, [2.5, 97.5])
    return {
        "span_f1": {"value": float(f1), "low": float(low), "high": float(high)},
        "precision": share(int(hits.sum()), int(proposed.sum())),
        "recall": share(int(hits.sum()), int(wanted.sum())),
    }


def _marks(gold: Sequence[set[Bounds]], found: Sequence[dict[Bounds, Span]]) -> dict[str, Any]:
    """F1 of marks by themselves and of case by itself, where a label is both."""
    f1: dict[str, Any] = {}
    for name, part in (("mark_f1", _mark_of), ("case_f1", _case_of)):
        wanted = [{(part(label), start, end) for label, start, end in each if part(label)} for each in gold]
        said = [
            {(part(label), start, end): span for (label, start, end), span in each.items() if part(label)}
            for each in found
        ]
        f1[name] = _summary(wanted, said)["span_f1"]
    return f1


def _mark_of(label: str) -> str:
    return label[len(label.rstrip(MARKS)) :]


def _case_of(label: str) -> str:
    return label.rstrip(MARKS)


def _classes(
    head: TokenHead, gold: Sequence[set[Bounds]], found: Sequence[dict[Bounds, Span]]
) -> list[dict[str, Any]]:
    rows = []
    for number, label in enumerate(head.spec.labels):
        wanted = [{bounds for bounds in each if bounds[0] == label} for each in gold]
        said = [{bounds: span for bounds, span in each.items() if bounds[0] == label} for each in found]
        support = sum(map(len, wanted))
        if not support and not sum(map(len, said)):
            continue
        summary = _summary(wanted, said)
        rows.append(
            {
                "label": label, "support": support, "threshold": head.spec.thresholds[number],
                "precision": summary["precision"], "recall": summary["recall"], "f1": summary["span_f1"],
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: float(row["f1"]["value"]))


def _errors(
    phrases: Sequence[str], gold: Sequence[set[Bounds]], found: Sequence[dict[Bounds, Span]]
) -> list[dict[str, Any]]:
    """The phrases with the surest spans that should not be there, then those where spans are only missing."""
    wrong: list[dict[str, Any]] = [
        {
            "text": phrase,
            "gold": _shown(phrase, wanted),
            "predicted": _shown(phrase, said),
            "score": max((span.score for bounds, span in said.items() if bounds not in wanted), default=0.0),
        }
        for phrase, wanted, said in zip(phrases, gold, found, strict=True)
        if wanted != said.keys()
    ]
    return sorted(wrong, key=lambda each: -each["score"])[:_ERRORS]


def _shown(phrase: str, spans: Any) -> str:
    return (
        ", ".join(
            f"{label}={phrase[start:end]}" for label, start, end in sorted(spans, key=lambda each: each[1])
        )
        or "nothing"
    )


def _of_folds(head: TokenHead, made: FittedToken) -> dict[str, Any]:
    """What the heads of the folds found, where there is no test split."""
    spec, wanted = head.spec, made.wanted
    labels = np.array([each.label for each in made.proposed], np.int64)
    right = np.array([each.right for each in made.proposed], np.bool_)
    raw = np.array([each.raw for each in made.proposed], np.float32)
    scores = calibration.logistic(raw, spec.scale[0], spec.shift[0])
    accepted = scores >= np.array(spec.thresholds, np.float32)[labels] if len(labels) else right
    said = np.eye(len(spec.labels), dtype=np.bool_)[labels] & accepted[:, None]
    hits, proposed = (said & right[:, None]).sum(axis=0), said.sum(axis=0)
    f1 = 2 * hits.sum() / max(1, int(proposed.sum() + wanted.sum()))
    summary: dict[str, Any] = {
        "span_f1": float(f1),
        "precision": share(int(hits.sum()), int(proposed.sum())),
        "recall": share(int(hits.sum()), int(wanted.sum())),
    }
    if len(scores):
        summary["ece_before"] = expected_calibration_error(
            calibration.logistic(raw, 1.0, 0.0).astype(np.float64), right
        )
        summary["ece_after"] = expected_calibration_error(scores.astype(np.float64), right)
    return {
        "summary": summary,
        "classes": [
            {
                "label": label, "support": int(wanted[i]), "threshold": spec.thresholds[i],
                "precision": share(int(hits[i]), int(proposed[i])), "recall": share(int(hits[i]), int(wanted[i])),
                "f1": float(2 * hits[i] / max(1, int(proposed[i] + wanted[i]))),
            }
            for i, label in enumerate(spec.labels)
        ],
        "reliability": {"after": report.bins(scores.astype(np.float64), right)} if len(scores) else None,
        "regularisation": [{"c": made.strength}],
    }  # fmt: skip
