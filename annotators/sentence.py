"""Heads on the sentence vector: intent, scope, emotion, toxicity, domain.

Linear ones never run alone: the Fleet multiplies all of them at once and hands each its own columns to decode. Those with
a hidden layer answer for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators import outside
from annotators.annotator import Annotation, Heard, Label, Status
from annotators.head import Spec, Tensors, expect_shapes, read, write
from annotators.outside import CENTROIDS, logistic

TOP_LABELS = 5


class Hidden(NamedTuple):
    """One layer of rectified units before the labels."""

    weight: NDArray[np.float32]  # [units, dim]
    bias: NDArray[np.float32]  # [units]


@dataclass(frozen=True)
class SentenceHead:
    """score = link(scale * (weight @ features + bias) + shift); features are the sentence, or its hidden units."""

    spec: Spec
    weight: NDArray[np.float32]  # [labels, dim or units]
    bias: NDArray[np.float32]  # [labels]
    version: str = ""
    hidden: Hidden | None = None
    centroids: NDArray[np.float32] | None = None  # [labels, dim], unit length; see annotators.outside

    @classmethod
    def load(cls, folder: Path) -> SentenceHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        expect_shapes(spec, tensors, _shapes(spec, tensors))
        hidden = (
            Hidden(tensors["hidden_weight"], tensors["hidden_bias"]) if "hidden_weight" in tensors else None
        )
        return cls(spec, tensors["weight"], tensors["bias"], version, hidden, tensors.get(CENTROIDS))

    def save(self, folder: Path) -> None:
        """Write a head folder; weights are kept as float16, which moves a score by less than 1e-3."""
        tensors: dict[str, NDArray[Any]] = {
            "weight": self.weight.astype(np.float16),
            "bias": self.bias.astype(np.float32),
        }
        if self.hidden is not None:
            tensors["hidden_weight"] = self.hidden.weight.astype(np.float16)
            tensors["hidden_bias"] = self.hidden.bias.astype(np.float32)
        if self.centroids is not None:
            tensors[CENTROIDS] = self.centroids.astype(np.float16)
        write(folder, self.spec, tensors)

    @property
    def dim(self) -> int:
        """Width of the vectors this head reads."""
        return int((self.weight if self.hidden is None else self.hidden.weight).shape[1])

    def raw(self, sentences: NDArray[np.float32]) -> NDArray[np.float32]:
        """[rows, labels] of sentence vectors [rows, dim]."""
        features = sentences
        if self.hidden is not None:
            features = np.maximum(sentences @ self.hidden.weight.T + self.hidden.bias, 0)
        raw: NDArray[np.float32] = features @ self.weight.T + self.bias
        return raw

    def annotate(self, heard: Heard) -> Annotation:
        """Answer alone, without the fleet's one product."""
        sentences = np.array([encoding.sentence for encoding in heard.encodings])
        cosines = None if self.centroids is None else sentences @ self.centroids.T
        return answered(self.spec, self.version, self.raw(sentences), heard.weights, cosines)


def _shapes(spec: Spec, tensors: Tensors) -> dict[str, tuple[int | None, ...]]:
    """What the weights must look like; widths that have to agree are those of the tensors that are there."""
    labels = len(spec.labels)
    shapes: dict[str, tuple[int | None, ...]] = {"weight": (labels, None), "bias": (labels,)}
    if "hidden_weight" in tensors or "hidden_bias" in tensors:
        units = np.atleast_2d(tensors.get("weight", np.zeros((labels, 1)))).shape[1]
        shapes |= {"hidden_weight": (units, None), "hidden_bias": (units,)}
    if spec.outside is not None and spec.outside.needs_centroids:
        shape = np.atleast_2d(tensors.get("hidden_weight", tensors.get("weight", np.zeros((1, 1))))).shape
        shapes[CENTROIDS] = (labels, shape[1])
    return shapes


def linked(spec: Spec, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Calibrated logits and scores [rows, labels] of a head's raw scores [rows, labels]."""
    return link(raw, spec.scale, spec.shift, exclusive=spec.exclusive)


def link(
    raw: NDArray[np.float32], scale: Sequence[float], shift: Sequence[float], *, exclusive: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same of a calibration that is no head's yet."""
    logits = raw * np.array(scale, np.float32) + np.array(shift, np.float32)
    if not exclusive:
        return logits, logistic(logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logits, powers / powers.sum(axis=1, keepdims=True)


def answered(
    spec: Spec,
    version: str,
    raw: NDArray[np.float32],
    weights: Sequence[float],
    cosines: NDArray[np.float32] | None = None,
) -> Annotation:
    """The annotation of raw scores [hypotheses, labels], mixed by the hypotheses' weights; for heads outside the stack."""
    logits, scores = linked(spec, raw)
    mixing = np.asarray(weights, np.float32)
    stranger = None
    if spec.outside is not None:
        stranger = float(mixing @ spec.outside.score(outside.measured(logits, cosines)))
    mixed, mixed_raw = mixing @ scores, mixing @ raw
    return Annotation(
        spec.name,
        spec.kind,
        Status.OK,
        labels=ranking(spec, mixed.tolist(), mixed_raw.tolist(), top=TOP_LABELS, stranger=stranger),
        out_of_scope=stranger,
        disagreement=disagreement(scores, mixing, exclusive=spec.exclusive),
        version=version,
    )


def ranking(
    spec: Spec, scores: Sequence[float], raw: Sequence[float], *, top: int, stranger: float | None = None
) -> tuple[Label, ...]:
    """Labels best first. Exclusive labels: only the best can be accepted; otherwise each by its own threshold.

    `scores` and `raw` are [labels]; at most `top` labels are returned, but every accepted one. None is accepted where
    `stranger`, the score of being outside, reaches its threshold. Plain lists, because for the few labels of a head they
    are sorted faster than an array is.
    """
    names, thresholds = spec.labels, spec.thresholds
    inside = stranger is None or spec.outside is None or stranger < spec.outside.threshold
    if spec.exclusive:
        order = sorted(range(len(names)), key=scores.__getitem__, reverse=True)[:top]
        best = order[0]
        return tuple(
            Label(
                names[i],
                scores[i],
                inside and i == best and scores[i] >= thresholds[i],
                raw[i],
                thresholds[i],
            )
            for i in order
        )
    order = sorted(range(len(names)), key=scores.__getitem__, reverse=True)
    return tuple(
        Label(names[i], scores[i], scores[i] >= thresholds[i], raw[i], thresholds[i])
        for rank, i in enumerate(order)
        if rank < top or scores[i] >= thresholds[i]
    )


def disagreement(scores: NDArray[np.float32], weights: NDArray[np.float32], *, exclusive: bool) -> float:
    """Jensen-Shannon divergence of the hypotheses' answers [hypotheses, labels] over its largest possible value, the
    entropy of the weights (Lin 1991): 0 where every hypothesis says the same, 1 where each says something else.

    Labels that do not exclude each other are yes-or-no answers each; the head disagrees as much as its worst label.
    """
    if len(weights) == 1:
        return 0.0
    possible = float(_entropy(weights))
    if possible < 1e-6:
        return 0.0
    answers = (
        scores[:, None, :] if exclusive else np.stack([scores, 1 - scores], axis=-1)
    )  # [.., questions, options]
    mixed = np.tensordot(weights, answers, axes=1)  # [questions, options]
    spread = _entropy(mixed) - weights @ _entropy(answers)
    return min(1.0, max(0.0, float(spread.max()) / possible))


def _entropy(distributions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last axis, in nats."""
    terms = distributions * np.log(np.where(distributions > 0, distributions, 1))
    result: NDArray[np.float32] = -terms.sum(axis=-1)
    return result
