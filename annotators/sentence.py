"""Linear heads on the sentence vector: intent, scope, emotion, toxicity, domain.

They never run alone: the Fleet multiplies all of them at once and hands each its own columns to decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Label
from annotators.head import Spec, expect_shapes, read, write


@dataclass(frozen=True)
class SentenceHead:
    """score = link(scale * (weight @ sentence + bias) + shift)."""

    spec: Spec
    weight: NDArray[np.float32]  # [labels, dim]
    bias: NDArray[np.float32]  # [labels]
    version: str = ""

    @classmethod
    def load(cls, folder: Path) -> SentenceHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        expect_shapes(spec, tensors, {"weight": (len(spec.labels), None), "bias": (len(spec.labels),)})
        return cls(spec, tensors["weight"], tensors["bias"], version)

    def save(self, folder: Path) -> None:
        """Write a head folder; weights are kept as float16, which moves a score by less than 1e-3."""
        write(
            folder,
            self.spec,
            {"weight": self.weight.astype(np.float16), "bias": self.bias.astype(np.float32)},
        )

    @property
    def dim(self) -> int:
        """Width of the vectors this head reads."""
        return int(self.weight.shape[1])


def ranking(spec: Spec, scores: Sequence[float], raw: Sequence[float], *, top: int) -> tuple[Label, ...]:
    """Labels best first. Exclusive labels: only the best can be accepted; otherwise each by its own threshold.

    `scores` and `raw` are [labels]; at most `top` labels are returned, but every accepted one. Plain lists, because
    for the few labels of a head they are sorted faster than an array is.
    """
    names, thresholds = spec.labels, spec.thresholds
    order = sorted(range(len(names)), key=scores.__getitem__, reverse=True)
    if spec.exclusive:
        best = order[0]
        return tuple(
            Label(names[i], scores[i], i == best and scores[i] >= thresholds[i], raw[i], thresholds[i])
            for i in order[:top]
        )
    return tuple(
        Label(names[i], scores[i], scores[i] >= thresholds[i], raw[i], thresholds[i])
        for rank, i in enumerate(order)
        if rank < top or scores[i] >= thresholds[i]
    )
