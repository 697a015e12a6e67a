"""Heads made of reference phrases: a label scores as its nearest anchor. No training; one to five phrases a label are enough.

params.patterns, {label: [regular expression, ...]}, are for what must be sure: where one is found, its label scores 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write
from annotators.outside import logistic
from annotators.rules import compiled
from annotators.sentence import ranking


@dataclass(frozen=True)
class AnchorsHead:
    """Raw score of a label = cosine of the phrase and the label's nearest anchor; score = logistic(scale * raw + shift)."""

    spec: Spec
    anchors: NDArray[np.float32]  # [anchors, dim], unit length, ordered by label
    owner: NDArray[np.int64]  # [anchors] the label each anchor belongs to, ascending
    version: str = ""
    starts: NDArray[np.int64] = field(init=False, repr=False)
    patterns: tuple[tuple[int, re.Pattern[str]], ...] = field(init=False, repr=False)  # label number, pattern

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
        object.__setattr__(self, "patterns", tuple(self._patterns()))

    def _patterns(self) -> Iterator[tuple[int, re.Pattern[str]]]:
        given = self.spec.params.get("patterns", {})
        if not isinstance(given, dict) or not all(isinstance(each, list | tuple) for each in given.values()):
            raise HeadInvalid(
                self.spec.name, found=f"params.patterns = {given!r}", expected="lists of patterns by label"
            )
        for label, patterns in given.items():
            if label not in self.spec.labels:
                raise HeadInvalid(
                    self.spec.name,
                    found=f"a pattern for label {label!r}",
                    expected="one of the head's labels",
                )
            for pattern in patterns:
                yield self.spec.labels.index(label), compiled(self.spec.name, pattern)

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

    def raw(self, sentences: NDArray[np.float32]) -> NDArray[np.float32]:
        """[rows, labels] cosine to each label's nearest anchor, of sentence vectors [rows, dim]."""
        cosines: NDArray[np.float32] = np.maximum.reduceat(sentences @ self.anchors.T, self.starts, axis=1)
        return cosines

    def scored(
        self, sentences: NDArray[np.float32], phrases: Sequence[str]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Raw scores and scores [rows, labels] of phrases and their vectors."""
        raw = self.raw(sentences)
        return raw, self._scores(raw, phrases)

    def _scores(self, raw: NDArray[np.float32], phrases: Sequence[str]) -> NDArray[np.float32]:
        scores = logistic(np.float32(self.spec.scale[0]) * raw + np.float32(self.spec.shift[0]))
        for label, pattern in self.patterns:
            for row, phrase in enumerate(phrases):
                if pattern.search(phrase):
                    scores[row, label] = 1.0
        return scores

    def annotate(self, heard: Heard) -> Annotation:
        """Answer by the nearest anchors; over several hypotheses the cosines are averaged by weight."""
        spec = self.spec
        sentences = np.array([encoding.sentence for encoding in heard.encodings])
        raw = np.asarray(heard.weights, np.float32) @ self.raw(sentences)
        scores = self._scores(raw[None], heard.phrases[heard.best : heard.best + 1])[0]
        return Annotation(
            spec.name,
            spec.kind,
            Status.OK,
            labels=ranking(spec, scores.tolist(), raw.tolist(), top=3),
            version=self.version,
        )
