"""The report of a trained head: every figure as data. nlu/heads/page.py makes a page of it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Heard
from annotators.fleet import Fleet
from annotators.table import Head
from nlu.heads.data import Dataset, Row
from nlu.heads.material import Material
from nlu.heads.verdict import Verdict, confidence, f_scores, resampled, share, uncalibrated

FORMAT = 1
_PAIRS, _PHRASES, _ERRORS, _CURVES, _POINTS, _BINS = 15, 5, 40, 12, 60, 10
_TIMED = 400  # answers
_SCRIPTS = {"latin": re.compile("[A-Za-zÀ-ɏ]"), "cyrillic": re.compile("[Ѐ-ԯ]")}

FloatArray = NDArray[np.float32]
Bools = NDArray[np.bool_]


def about(data: Dataset) -> dict[str, Any]:
    """Files, rows by split, scripts and lengths."""
    rows = Counter(row.split for row in data.rows if row.labels or data.multi)
    rows["outside"] = len(data.rows) - sum(rows.values())
    words = np.array([len(row.phrase.split()) for row in data.rows] or [0])
    return {
        "files": [source._asdict() for source in data.sources],
        "rows": dict(rows),
        "scripts": scripts(data.rows),
        "words": {"median": float(np.median(words)), "p95": float(np.percentile(words, 95))},
    }


def scripts(rows: Sequence[Row]) -> dict[str, float]:
    """The share of rows whose letters are mostly of each script."""
    found = Counter(script(row.phrase) for row in rows)
    return {name: count / len(rows) for name, count in found.most_common()}


def script(phrase: str) -> str:
    """The script that most letters of a phrase are of: latin, cyrillic, other or none."""
    if phrase.isascii():
        return "latin" if any(map(str.isalpha, phrase)) else "none"
    counts = {name: len(letters.findall(phrase)) for name, letters in _SCRIPTS.items()}
    counts["other"] = sum(map(str.isalpha, phrase)) - sum(counts.values())
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else "none"


def classes(verdict: Verdict) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every label as it is accepted, worst first."""
    wanted, said = verdict.everyone
    f1 = resampled(wanted, said, lambda counts: f_scores(counts, 1.0))
    hits, support, proposed = ((wanted & said).sum(axis=0), wanted.sum(axis=0), said.sum(axis=0))
    rows = [
        {
            "label": label,
            "support": int(support[i]),
            "threshold": verdict.spec.thresholds[i],
            "precision": share(int(hits[i]), int(proposed[i])),
            "recall": share(int(hits[i]), int(support[i])),
            "f1": {name: f1[name][i] for name in ("value", "low", "high")},
        }
        for i, label in enumerate(verdict.spec.labels)
        if support[i] or proposed[i]
    ]
    return sorted(rows, key=lambda row: row["f1"]["value"])


def confusions(verdict: Verdict) -> list[dict[str, Any]]:
    """The pairs that are taken for each other most, with the phrases behind them."""
    if not verdict.spec.exclusive:
        return []
    names, best, known = verdict.spec.labels, verdict.best, verdict.wanted.any(axis=1)
    gold = verdict.wanted.argmax(axis=1)
    wrong = np.flatnonzero(known & ~verdict.right)
    pairs = Counter((int(gold[i]), int(best[i])) for i in wrong)
    return [
        {
            "gold": names[want],
            "predicted": names[got],
            "count": count,
            "phrases": [
                {"text": verdict.phrases[int(i)], "score": float(verdict.scores[i, got])}
                for i in sorted(wrong, key=lambda i: -verdict.scores[i, got])
                if gold[i] == want and best[i] == got
            ][:_PHRASES],
        }
        for (want, got), count in pairs.most_common(_PAIRS)
    ]


def coverage(verdict: Verdict) -> list[dict[str, float]]:
    """How much would be answered, and how much of it right, if one threshold held for all labels."""
    if not verdict.spec.exclusive:
        return []
    scores, right = confidence(verdict, verdict.scores)
    order = np.argsort(-scores, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    return [
        {"threshold": float(scores[order[i]]), "coverage": (i + 1) / len(order), "precision": float(precision[i])}
        for i in _cuts(scores[order])
    ]  # fmt: skip


def _cuts(falling: NDArray[Any]) -> list[int]:
    """Where thresholds can lie among scores that fall: the last of each score, thinned to so many as a chart shows."""
    last = np.flatnonzero(np.append(falling[1:] < falling[:-1], True))
    chosen: list[int] = last[np.unique(np.linspace(0, len(last) - 1, _POINTS).astype(int))].tolist()
    return chosen


def curves(verdict: Verdict, worst: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Precision over recall of the labels that need a look, with the point that the threshold chose."""
    found = []
    scores, wanted = np.concatenate([verdict.scores, verdict.outside]), verdict.everyone[0]
    sayable = verdict.sayable
    for row in [each for each in worst if each["support"]][:_CURVES]:
        label = verdict.spec.labels.index(row["label"])
        mine = np.flatnonzero(sayable[:, label])
        order = mine[np.argsort(-scores[mine, label], kind="stable")]
        if not len(order):
            continue
        hits, points = np.cumsum(wanted[order, label]), np.array(_cuts(scores[order, label]))
        found.append(
            {
                "label": row["label"],
                "threshold": row["threshold"],
                "recall": (hits[points] / row["support"]).tolist(),
                "precision": (hits[points] / (points + 1)).tolist(),
                "chosen": [row["recall"]["value"], row["precision"]["value"]],
            }
        )
    return found


def reliability(verdict: Verdict) -> dict[str, list[dict[str, float]]]:
    """What scores promise and what they keep, in bins of equal size, before and after calibration."""
    before, after = confidence(verdict, uncalibrated(verdict)), confidence(verdict, verdict.scores)
    return {"before": bins(*before), "after": bins(*after)}


def bins(scores: NDArray[np.float64], right: Bools) -> list[dict[str, float]]:
    """Mean score and share of right answers, over bins of the same number of answers."""
    order = np.argsort(scores, kind="stable")
    return [
        {"score": float(scores[part].mean()), "right": float(right[part].mean()), "rows": len(part)}
        for part in np.array_split(order, _BINS)
        if len(part)
    ]


def errors(verdict: Verdict, rows: Material, train: Material) -> list[dict[str, Any]]:
    """The surest wrong answers among the rows, each beside the training phrases, itself not among them, that it is nearest to."""
    if verdict.spec.exclusive:
        wrong = np.flatnonzero(~verdict.right)
        sureness = verdict.scores[wrong, verdict.best[wrong]]
    else:
        wrong = np.flatnonzero(~verdict.exact)
        sureness = np.abs(verdict.scores[wrong] - verdict.wanted[wrong]).max(axis=1)
    chosen = wrong[np.argsort(-sureness, kind="stable")][:_ERRORS]
    if not len(chosen):
        return []
    cosines = rows.take(chosen.tolist()).vectors @ train.vectors.T
    places = {id(row): j for j, row in enumerate(train.rows)}
    for i, row in enumerate(chosen):
        if (itself := places.get(id(rows.rows[row]))) is not None:
            cosines[i, itself] = -np.inf
    near = np.argsort(-cosines, axis=1)[:, : min(3, len(train) - 1)]
    return [
        {
            "text": verdict.phrases[row],
            "gold": ", ".join(rows.rows[row].labels) or "nothing",
            "predicted": verdict.spec.labels[verdict.best[row]]
            if verdict.spec.exclusive
            else _named(verdict, verdict.accepted[row]) or "nothing",
            "score": float(verdict.scores[row, verdict.best[row]]),
            "nearest": [
                {"text": train.rows[j].phrase, "label": ", ".join(train.rows[j].labels), "cosine": float(cosines[i, j])}
                for j in near[i]
            ],
        }
        for i, row in enumerate(chosen)
    ]  # fmt: skip


def _named(verdict: Verdict, labels: Bools) -> str:
    return ", ".join(name for name, yes in zip(verdict.spec.labels, labels, strict=True) if yes)


_LENGTHS = ((1, 3, "1-3 words"), (4, 7, "4-7 words"), (8, 12, "8-12 words"), (13, 10**6, "13 words or more"))


def lengths(phrases: Sequence[str], right: Bools) -> list[dict[str, Any]]:
    """The share of right answers by number of words."""
    words = np.array([len(phrase.split()) for phrase in phrases])
    found = []
    for first, last, name in _LENGTHS:
        mine = (words >= first) & (words <= last)
        if mine.any():
            found.append(_slice("length", name, right[mine]))
    return found


def _slice(of: str, value: str, right: Bools) -> dict[str, Any]:
    return {"slice": of, "value": value, "rows": len(right), "accuracy": share(int(right.sum()), len(right))}


def noisy(right: Bools, clean: Bools) -> list[dict[str, Any]]:
    """The same rows as written and with a typing mistake."""
    return [_slice("noise", "as written", clean), _slice("noise", "with typing mistakes", right)]


def outside(verdict: Verdict, aurocs: dict[str, float], auroc: float | None) -> dict[str, Any] | None:
    """The score of being out of scope: how it was chosen and how well it parts those who belong from those who do not."""
    chosen = verdict.spec.outside
    if chosen is None or verdict.strangeness is None or verdict.outside_strangeness is None:
        return None
    strange = verdict.outside_strangeness
    found: dict[str, Any] = {
        "method": chosen.method,
        "threshold": chosen.threshold,
        "candidates": [{"method": name, "auroc": value} for name, value in aurocs.items()],
        "false_alarms": share(int((verdict.strangeness >= chosen.threshold).sum()), len(verdict.strangeness)),
    }
    if len(strange):
        found["auroc"] = auroc
        found["recall"] = share(int((strange >= chosen.threshold).sum()), len(strange))
        found["scores"] = {"inside": _histogram(verdict.strangeness), "outside": _histogram(strange)}
    return found


def _histogram(scores: FloatArray) -> list[int]:
    counts: list[int] = np.histogram(scores, bins=20, range=(0.0, 1.0))[0].tolist()
    return counts


def cost_us(head: Head, rows: Material) -> float:
    """Microseconds of one answer, the median of many, on this machine and one thread."""
    fleet = Fleet([head])
    some = rows.take(range(min(50, len(rows))))
    heards = [
        Heard.alone(phrase, encoding, context)
        for phrase, encoding, context in zip(some.phrases, some.encodings, some.contexts, strict=True)
    ]
    taken = []
    for i in range(_TIMED):
        began = time.perf_counter_ns()
        fleet.annotate(heards[i % len(heards)])
        taken.append(time.perf_counter_ns() - began)
    return float(np.median(taken)) / 1000
