"""A head's answers to rows it has not seen, and the numbers they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from annotators.anchors import AnchorsHead
from annotators.boosted import BoostedHead
from annotators.context import ContextHead
from annotators.fit import Learnt, context_rows
from annotators.head import Spec
from annotators.outside import measured
from annotators.report import expected_calibration_error
from annotators.sentence import SentenceHead, linked
from nlu.heads.material import Material

FloatArray = NDArray[np.float32]
Bools = NDArray[np.bool_]

ClassHead = SentenceHead | ContextHead | BoostedHead | AnchorsHead

_RESAMPLES = 300
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Verdict:
    """Scores of rows and of outsiders, and what should have been said."""

    spec: Spec
    phrases: Sequence[str]
    raw: FloatArray  # [rows, labels]
    scores: FloatArray  # [rows, labels], calibrated
    wanted: Bools  # [rows, labels]
    strangeness: FloatArray | None  # [rows] score of being out of scope
    outside: FloatArray  # [outsiders, labels], calibrated
    outside_strangeness: FloatArray | None  # [outsiders]

    @property
    def best(self) -> NDArray[np.int64]:
        """[rows] the number of the best label."""
        return np.asarray(self.scores.argmax(axis=1), np.int64)

    @property
    def right(self) -> Bools:
        """[rows] whether the best label is wanted."""
        return np.asarray(self.wanted[np.arange(len(self.wanted)), self.best], np.bool_)

    @property
    def accepted(self) -> Bools:
        """[rows, labels] what the head says for sure."""
        return decided(self.spec, self.scores, self.strangeness)

    @property
    def outside_accepted(self) -> Bools:
        """[outsiders, labels]."""
        return decided(self.spec, self.outside, self.outside_strangeness)


def decided(spec: Spec, scores: FloatArray, strangeness: FloatArray | None) -> Bools:
    """[rows, labels] which labels are accepted, by the rule that serving goes by."""
    over = scores >= np.array(spec.thresholds, np.float32)
    if spec.exclusive:
        over &= np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
    if spec.outside is not None and strangeness is not None:
        over &= (strangeness < spec.outside.threshold)[:, None]
    accepted: Bools = over
    return accepted


def judge(head: ClassHead, rows: Material, outside: Material) -> Verdict:
    """The answers of a stored head."""
    raw, scores, strangeness = answers(head, rows)
    _, strange, outside_strangeness = answers(head, outside)
    return Verdict(head.spec, rows.phrases, raw, scores, rows.wanted(head.spec.labels), strangeness, strange, outside_strangeness)  # fmt: skip


def of_folds(spec: Spec, learnt: Learnt, phrases: Sequence[str]) -> Verdict:
    """What the folds' held-out rows were answered; where there is no test split."""
    fitted, none = learnt.outside, np.zeros((0, len(spec.labels)), np.float32)
    return Verdict(
        spec, phrases, learnt.raw, learnt.scores, learnt.answers.wanted,
        None if fitted is None else fitted.inside_scores, none, None if fitted is None else fitted.outside_scores[:0],
    )  # fmt: skip


def answers(head: ClassHead, rows: Material) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Raw scores and scores [rows, labels], and the scores of being out of scope [rows] where the head has one."""
    none = np.zeros((0, len(head.spec.labels)), np.float32)
    if not len(rows):
        return none, none, None if head.spec.outside is None else none[:, 0]
    if isinstance(head, AnchorsHead):
        return head.scored(rows.vectors, rows.phrases) + (None,)
    if isinstance(head, ContextHead):
        raw = context_rows(rows.encodings, rows.contexts, head.turns) @ head.weight.T + head.bias
    else:
        raw = head.raw(rows.vectors)
    logits, scores = linked(head.spec, raw)
    if head.spec.outside is None:
        return raw, scores, None
    centroids = getattr(head, "centroids", None)
    cosines = None if centroids is None else rows.vectors @ centroids.T
    return raw, scores, head.spec.outside.score(measured(logits, cosines))


def summary(verdict: Verdict, *, beta: float) -> dict[str, Any]:
    """The measures of a verdict by name, with 95 % intervals where they are shares or F-scores."""
    spec, wanted, accepted = verdict.spec, verdict.wanted, verdict.accepted
    found: dict[str, Any] = {}
    if spec.exclusive:
        best = np.arange(wanted.shape[1]) == verdict.best[:, None]
        found["accuracy"] = share(int(verdict.right.sum()), len(wanted))
        found["macro_f1"] = resampled(wanted, best, lambda counts: _macro(f_scores(*counts, 1.0), counts))
    else:
        found["macro_f1"] = resampled(wanted, accepted, lambda counts: _macro(f_scores(*counts, 1.0), counts))
        found["micro_f1"] = resampled(wanted, accepted, lambda counts: _micro(counts, 1.0))
    refused = verdict.outside_accepted
    everyone = np.concatenate([wanted, np.zeros_like(refused)]), np.concatenate([accepted, refused])
    found["f_beta"] = resampled(*everyone, lambda counts: _macro(f_scores(*counts, beta), counts)) | {
        "beta": beta
    }
    found["recall"] = share(int((wanted & accepted).sum()), int(wanted.sum()))
    found["promised_recall"] = spec.metrics.get("promised_recall")
    found["coverage"] = share(int(accepted.any(axis=1).sum()), len(accepted))
    found["accepted_precision"] = share(int((wanted & accepted).sum()), int(accepted.sum()))
    found["ece_before"], found["ece_after"] = calibration_errors(verdict)
    if (auc := _auroc(verdict)) is not None:
        found["auroc"] = auc
    if len(refused):
        found["outside_recall"] = share(int((~refused.any(axis=1)).sum()), len(refused))
    return {name: value for name, value in found.items() if value is not None}


def _auroc(verdict: Verdict) -> float | None:
    """Of two labels the second's; of labels on their own the mean of those that can be measured."""
    wanted = verdict.wanted
    if verdict.spec.exclusive and wanted.shape[1] != 2:
        return None
    columns = [1] if verdict.spec.exclusive else range(wanted.shape[1])
    found = [
        float(roc_auc_score(wanted[:, label], verdict.scores[:, label]))
        for label in columns
        if wanted[:, label].any() and not wanted[:, label].all()
    ]
    return sum(found) / len(found) if found else None


def calibration_errors(verdict: Verdict) -> tuple[float, float]:
    """Expected calibration error before and after calibration: of the best label, or of every label's answer."""
    plain = verdict.spec.model_copy(
        update={"scale": (1.0,) * len(verdict.spec.labels), "shift": (0.0,) * len(verdict.spec.labels)}
    )
    before = linked(plain, verdict.raw)[1]
    return tuple(
        expected_calibration_error(*confidence(verdict, scores)) for scores in (before, verdict.scores)
    )  # type: ignore[return-value]


def confidence(verdict: Verdict, scores: FloatArray) -> tuple[NDArray[np.float64], Bools]:
    """Scores, and whether they were right: the best label's a row, or every label's where they do not exclude."""
    if not verdict.spec.exclusive:
        return scores.ravel().astype(np.float64), verdict.wanted.ravel()
    best = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    return scores[rows, best].astype(np.float64), verdict.wanted[rows, best]


Counts = tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]
]  # hits, proposed, positives [..., labels]


def f_scores(hits: NDArray[np.float64], proposed: NDArray[np.float64], positives: NDArray[np.float64], beta: float) -> NDArray[np.float64]:  # fmt: skip
    """F-beta of each label; 0 where a label was neither wanted nor said."""
    scores: NDArray[np.float64] = (1 + beta**2) * hits / np.maximum(proposed + beta**2 * positives, 1e-9)
    return scores


def _macro(scores: NDArray[np.float64], counts: Counts) -> NDArray[np.float64]:
    """The mean over labels that some row has."""
    present = counts[2] > 0
    mean: NDArray[np.float64] = np.where(present, scores, 0).sum(axis=-1) / np.maximum(
        present.sum(axis=-1), 1
    )
    return mean


def _micro(counts: Counts, beta: float) -> NDArray[np.float64]:
    hits, proposed, positives = (count.sum(axis=-1) for count in counts)
    return f_scores(hits, proposed, positives, beta)


def resampled(
    wanted: Bools, said: Bools, measure: Callable[[Counts], NDArray[np.float64]], *, seed: int = 0
) -> dict[str, Any]:
    """A measure of hits, proposals and positives, with a bootstrap interval over rows; arrays a label give lists."""
    hits, proposed, positives = (each.astype(np.float32) for each in (wanted & said, said, wanted))
    value = measure((hits.sum(axis=0), proposed.sum(axis=0), positives.sum(axis=0)))
    drawn = np.random.default_rng(seed).poisson(1.0, (_RESAMPLES, len(wanted))).astype(np.float32)
    trials = measure((drawn @ hits, drawn @ proposed, drawn @ positives))  # type: ignore[arg-type]
    low, high = np.percentile(trials, [2.5, 97.5], axis=0)
    return {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}


def share(count: int, total: int) -> dict[str, float]:
    """A share with its Wilson interval (Wilson 1927)."""
    if not total:
        return {"value": 0.0, "low": 0.0, "high": 1.0}
    p, z = count / total, _Z
    centre, width = p + z**2 / (2 * total), z * sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return {"value": p, "low": max(0.0, (centre - width) / scale), "high": min(1.0, (centre + width) / scale)}


def value_of(measure: Any) -> float:
    """The number of a measure, with or without an interval."""
    return float(measure["value"] if isinstance(measure, Mapping) else measure)
