"""A head's answers to rows it has not seen, and the numbers they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

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
    known: Bools  # [rows] whether the head has all labels that a row should be answered with
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
    def everyone(self) -> tuple[Bools, Bools]:
        """[rows and outsiders, labels] what is wanted, and what is accepted."""
        strange = self.outside_accepted
        return np.concatenate([self.wanted, np.zeros_like(strange)]), np.concatenate([self.accepted, strange])

    @property
    def sayable(self) -> Bools:
        """[rows and outsiders, labels] what would be accepted if no label had a threshold."""
        anything = self.spec.model_copy(update={"thresholds": (0.0,) * len(self.spec.labels)})
        return np.concatenate(
            [
                decided(anything, self.scores, self.strangeness),
                decided(anything, self.outside, self.outside_strangeness),
            ]
        )

    @property
    def exact(self) -> Bools:
        """[rows] whether just what is wanted is accepted."""
        return np.asarray((self.accepted == self.wanted).all(axis=1) & self.known, np.bool_)

    @property
    def outside_accepted(self) -> Bools:
        """[outsiders, labels]."""
        return decided(self.spec, self.outside, self.outside_strangeness)


def decided(spec: Spec, scores: FloatArray, strangeness: FloatArray | None) -> Bools:
    """[rows, labels] which labels are accepted, by the rule that serving goes by, and in its precision."""
    over: Bools = scores >= np.array(spec.thresholds, np.float64)
    if spec.exclusive:
        over &= np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
    if spec.outside is not None and strangeness is not None:
        over &= (strangeness < np.float64(spec.outside.threshold))[:, None]
    return over


def judge(head: ClassHead, rows: Material, outside: Material) -> Verdict:
    """The answers of a stored head."""
    raw, scores, strangeness = answers(head, rows)
    _, strange, outside_strangeness = answers(head, outside)
    names = head.spec.labels
    return Verdict(
        head.spec, rows.phrases, raw, scores, rows.wanted(names), rows.known(names), strangeness, strange, outside_strangeness
    )  # fmt: skip


def of_folds(spec: Spec, learnt: Learnt, rows: Material) -> Verdict:
    """What the held-out rows, which are those of the folds and of dev, were answered; where there is no test split."""
    strangeness = None if learnt.outside is None else learnt.outside.inside_scores
    none = np.zeros((0, len(spec.labels)), np.float32)
    return Verdict(
        spec, rows.phrases, learnt.raw, learnt.scores, learnt.answers.wanted, rows.known(spec.labels), strangeness,
        none, None if strangeness is None else none[:, 0],
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
        found["macro_f1"] = resampled(wanted, best, lambda counts: _macro(counts, 1.0))
    else:
        found["macro_f1"] = resampled(wanted, accepted, lambda counts: _macro(counts, 1.0))
        found["micro_f1"] = resampled(wanted, accepted, lambda counts: _micro(counts, 1.0))
    strange = verdict.outside_accepted
    found["f_beta"] = resampled(*verdict.everyone, lambda counts: _macro(counts, beta)) | {"beta": beta}
    found["recall"] = share(int((wanted & accepted).sum()), int(wanted.sum()))
    found["promised_recall"] = spec.metrics.get("promised_recall")
    found["coverage"] = share(int(accepted.any(axis=1).sum()), len(accepted))
    found["accepted_precision"] = share(
        int((wanted & accepted).sum()), int(accepted.sum()) + int(strange.sum())
    )
    found["ece_before"], found["ece_after"] = calibration_errors(verdict)
    if (auc := _auroc(verdict)) is not None:
        found["auroc"] = auc
    if len(strange):
        found["outside_recall"] = share(int((~strange.any(axis=1)).sum()), len(strange))
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
    before, after = confidence(verdict, uncalibrated(verdict)), confidence(verdict, verdict.scores)
    return expected_calibration_error(*before), expected_calibration_error(*after)


def uncalibrated(verdict: Verdict) -> FloatArray:
    """[rows, labels] what scores would be without calibration; of anchors, the cosines."""
    if verdict.spec.kind == "anchors":
        return verdict.raw
    count = len(verdict.spec.labels)
    plain = verdict.spec.model_copy(update={"scale": (1.0,) * count, "shift": (0.0,) * count})
    return linked(plain, verdict.raw)[1]


def confidence(verdict: Verdict, scores: FloatArray) -> tuple[NDArray[np.float64], Bools]:
    """Scores, and whether they were right: the best label's a row, or every label's where they do not exclude."""
    if not verdict.spec.exclusive:
        return scores.ravel().astype(np.float64), verdict.wanted.ravel()
    best = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    return scores[rows, best].astype(np.float64), verdict.wanted[rows, best]


class Counts(NamedTuple):
    """What F-scores are made of, [..., labels] each."""

    hits: NDArray[np.float64]
    proposed: NDArray[np.float64]
    positives: NDArray[np.float64]


def f_scores(counts: Counts, beta: float) -> NDArray[np.float64]:
    """F-beta of each label; 0 where a label was neither wanted nor said."""
    hits, proposed, positives = counts
    scores: NDArray[np.float64] = (1 + beta**2) * hits / np.maximum(proposed + beta**2 * positives, 1e-9)
    return scores


def _macro(counts: Counts, beta: float) -> NDArray[np.float64]:
    """The mean over labels that some row has."""
    present = counts.positives > 0
    scores = np.where(present, f_scores(counts, beta), 0)
    mean: NDArray[np.float64] = scores.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)
    return mean


def _micro(counts: Counts, beta: float) -> NDArray[np.float64]:
    return f_scores(Counts(*(count.sum(axis=-1) for count in counts)), beta)


def resampled(
    wanted: Bools, said: Bools, measure: Callable[[Counts], NDArray[np.float64]], *, seed: int = 0
) -> dict[str, Any]:
    """A measure of hits, proposals and positives, with a bootstrap interval over rows; arrays a label give lists."""
    each = [rows.astype(np.float32) for rows in (wanted & said, said, wanted)]
    value = measure(Counts(*(rows.sum(axis=0, dtype=np.float64) for rows in each)))
    drawn = np.random.default_rng(seed).poisson(1.0, (_RESAMPLES, len(wanted))).astype(np.float32)
    trials = measure(Counts(*((drawn @ rows).astype(np.float64) for rows in each)))
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
