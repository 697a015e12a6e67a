"""Heads, Encodings and turns small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annotators.annotator import Encoding, Heard, HeardTurn
from annotators.head import Requires, Spec
from annotators.outside import Outside
from annotators.sentence import Hidden, SentenceHead

FINGERPRINT = "a" * 64


def make_spec(labels: Sequence[str] = ("a", "b", "c"), **fields: Any) -> Spec:
    """A spec that leaves raw scores alone and accepts from one half on; `fields` replace."""
    count = len(labels)
    usual: dict[str, Any] = {
        "name": "toy",
        "kind": "sentence",
        "task": "test",
        "labels": tuple(labels),
        "scale": (1.0,) * count,
        "shift": (0.0,) * count,
        "thresholds": (0.5,) * count,
        "requires": Requires(vectorizer=FINGERPRINT),
    }
    return Spec(**{**usual, **fields})


def biased(bias: Sequence[float], **fields: Any) -> SentenceHead:
    """A head whose raw scores are its bias, whatever is said; labels are a, b, c, ..."""
    labels = [chr(ord("a") + i) for i in range(len(bias))]
    return SentenceHead(
        make_spec(labels, **fields), np.zeros((len(bias), 2), np.float32), np.array(bias, np.float32)
    )


BLEND = Outside(method="blend", max_logit=0.3, energy=0.2, centroid=1.5, shift=0.75, threshold=0.5)
ENERGY = Outside(method="energy", energy=0.7, shift=1.0, threshold=0.4)


def random_head(
    name: str,
    labels: int,
    *,
    dim: int = 8,
    seed: int = 0,
    exclusive: bool = True,
    outside: Outside | None = None,
    units: int = 0,
) -> SentenceHead:
    """A head of random weights and calibration, with a hidden layer of so many units, and centroids where it needs them."""
    rng = np.random.default_rng(seed)
    spec = make_spec(
        [f"{name}{i}" for i in range(labels)],
        name=name,
        exclusive=exclusive,
        scale=tuple(rng.uniform(0.5, 2.0, labels).tolist()),
        shift=tuple(rng.uniform(-1.0, 1.0, labels).tolist()),
        thresholds=tuple(rng.uniform(0.2, 0.8, labels).tolist()),
        outside=outside,
    )

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return SentenceHead(
        spec,
        normal(labels, units or dim),
        normal(labels),
        version=f"v-{name}-{seed}",
        hidden=Hidden(normal(units, dim), normal(units)) if units else None,
        centroids=random_units(labels, dim, seed)
        if outside is not None and outside.needs_centroids
        else None,
    )


def random_units(rows: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    """[rows, dim], unit length."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    units: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return units


def encoded(sentence: ArrayLike) -> Encoding:
    """An Encoding without tokens."""
    return Encoding(np.asarray(sentence, np.float32))


def tokenized(tokens: ArrayLike, offsets: Sequence[tuple[int, int]]) -> Encoding:
    """An Encoding whose tokens [tokens, token_dim] matter and whose sentence does not."""
    return Encoding(
        np.zeros(2, np.float32), np.asarray(tokens, np.float32), np.array(offsets, np.int32).reshape(-1, 2)
    )


def heard(
    *sentences: ArrayLike, weights: Sequence[float] | None = None, context: Sequence[HeardTurn] = ()
) -> Heard:
    """A turn of these hypotheses, of equal weight unless told."""
    count = len(sentences)
    given = tuple(weights) if weights is not None else (1 / count,) * count
    return Heard(
        phrases=tuple(f"phrase {i}" for i in range(count)),
        encodings=tuple(encoded(sentence) for sentence in sentences),
        weights=given,
        best=max(range(count), key=given.__getitem__),
        context=tuple(context),
    )
