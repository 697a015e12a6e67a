"""Linear heads on the sentence vector: intent, scope, emotion, toxicity, domain.

They never run alone: the Fleet multiplies all of them at once and hands each its own columns to decode.
"""

from __future__ import annotations

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


def ranking(
    spec: Spec, scores: NDArray[np.float32], raw: NDArray[np.float32], *, top: int
) -> tuple[Label, ...]:
    """Labels best first. Exclusive labels: only the best can be accepted; otherwise each by its own threshold.

    `scores` and `raw` are [labels]; at most `top` labels are returned, but every accepted one.
    """
    order = (-scores).argsort(kind="stable")  # of equal scores the earlier label, as argmax has it
    labels: list[Label] = []
    names, thresholds = spec.labels, spec.thresholds
    for rank, i in enumerate(order.tolist()):
        score = scores.item(i)
        accepted = score >= thresholds[i] and (rank == 0 or not spec.exclusive)
        if rank < top or accepted:
            labels.append(Label(names[i], score, accepted, raw.item(i), thresholds[i]))
        elif spec.exclusive:
            break
    return tuple(labels)
