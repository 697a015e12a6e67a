"""Who is measured: a vectorizer as exams see it, whole or cut to fewer dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from annotators.annotator import Encoding
from nlu.training.measures import FloatArray

Encode = Callable[[Sequence[str], bool], list[Encoding]]  # (phrases, with token vectors)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One vectorizer: a function from phrases to Encodings, its sentence vectors cut to `axes` [dim, width] where given."""

    name: str
    uncased: bool
    encode: Encode
    axes: FloatArray | None = None
    vectorizer: str = ""  # the name of what this is a truncation of

    def vectors(self, phrases: Sequence[str]) -> FloatArray:
        """[phrases, width], unit length."""
        whole = np.stack([encoding.sentence for encoding in self.encode(phrases, False)])
        return whole if self.axes is None else unit(whole @ self.axes)


def truncated(whole: Candidate, widths: Sequence[int], phrases: Sequence[str]) -> list[Candidate]:
    """The same vectorizer cut to each width, by PCA of some phrases; `phrases` may be empty where `widths` is."""
    if not widths:
        return []
    axes = principal_axes(whole.vectors(phrases))
    return [
        Candidate(
            f"{whole.name}@{width}",
            whole.uncased,
            whole.encode,
            np.ascontiguousarray(axes[:, :width]),
            whole.name,
        )
        for width in widths
    ]


def unit(vectors: FloatArray) -> FloatArray:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: FloatArray = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled


def principal_axes(vectors: FloatArray) -> FloatArray:
    """[dim, dim] directions of greatest variance, greatest first.

    They are applied without taking the mean off, as the compressing layer of a student applies them.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    descending: FloatArray = axes[:, ::-1].astype(np.float32)
    return descending
