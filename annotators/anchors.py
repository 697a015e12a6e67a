"""Heads made of reference phrases: a label scores as its nearest anchor. No training; one to five phrases a label are enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write
from annotators.sentence import ranking


@dataclass(frozen=True)
class AnchorsHead:
    """Raw score of a label = cosine of the phrase and the label's nearest anchor; score = logistic(scale * raw + shift)."""

    spec: Spec
    anchors: NDArray[np.float32]  # [anchors, dim], unit length, ordered by label
    owner: NDArray[np.int64]  # [anchors] the label each anchor belongs to, ascending
    version: str = ""
    starts: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        labels = np.arange(len(self.spec.labels))
        starts = np.searchsorted(self.owner, labels)
        if not np.array_equal(np.unique(self.owner), labels) or (np.diff(self.owner) < 0).any():
            raise HeadInvalid(
                self.spec.name,
                found="anchors without a label, a label without anchors, or anchors out of order",
                expected="one anchor or more for every label, ordered by label",
            )
        object.__setattr__(self, "starts", starts)

    @classmethod
    def load(cls, folder: Path) -> AnchorsHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        count = len(np.atleast_1d(tensors.get("anchors", np.zeros(0))))
        expect_shapes(spec, tensors, {"anchors": (None, None), "owner": (count,)})
        return cls(spec, tensors["anchors"], tensors["owner"].astype(np.int64), version)

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        write(
            folder,
            self.spec,
            {"anchors": self.anchors.astype(np.float16), "owner": self.owner.astype(np.float32)},
        )

    @property
    def dim(self) -> int:
        """Width of the vectors this head reads."""
        return int(self.anchors.shape[1])

    def annotate(self, heard: Heard) -> Annotation:
        """Answer by the nearest anchors; over several hypotheses the cosines are averaged by weight."""
        spec = self.spec
        raw = np.zeros(len(spec.labels), np.float32)
        for weight, encoding in zip(heard.weights, heard.encodings, strict=True):
            raw += np.float32(weight) * np.maximum.reduceat(self.anchors @ encoding.sentence, self.starts)
        with np.errstate(over="ignore"):  # far below zero the score is 0
            scores = 1 / (1 + np.exp(-(np.float32(spec.scale[0]) * raw + np.float32(spec.shift[0]))))
        return Annotation(
            spec.name,
            spec.kind,
            Status.OK,
            labels=ranking(spec, scores.tolist(), raw.tolist(), top=3),
            version=self.version,
        )
