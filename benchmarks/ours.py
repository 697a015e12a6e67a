"""Our heads as peers among peers: `python -m benchmarks.peers --set banking77 --peer benchmarks.ours:Sentence`.

The vectorizer is the shipped bundle's, on one thread, and every text is encoded anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annotators.anchors import AnchorsHead
from annotators.answers import Answers
from annotators.fit import About, fit_sentence
from annotators.fit_anchors import make_anchors
from annotators.sentence import SentenceHead, linked
from benchmarks.peer import Predictor
from nlu.errors import InvalidInput
from nlu.normalizer import normalize
from nlu.settings import shipped_bundle
from nlu.vectorizer import Vectorizer

Labels = Sequence[tuple[str, ...]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scored:
    """A head behind its vectorizer."""

    vectorizer: Vectorizer
    head: SentenceHead | AnchorsHead
    encode_s: float

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of `scores`."""
        return self.head.spec.labels

    def scores(self, texts: Sequence[str]) -> FloatArray:
        """[texts, labels], calibrated."""
        vectors, phrases = _vectors(self.vectorizer, texts)
        if isinstance(self.head, AnchorsHead):
            return self.head.scored(vectors, phrases)[0]
        return linked(self.head.spec, self.head.raw(vectors))[1]


class Sentence:
    """`nlu heads train --kind sentence`: logistic regression, calibrated on folds."""

    name = "chorus sentence"
    packages: tuple[str, ...] = ("chorus-nlu",)

    def __init__(self) -> None:
        self._vectorizer = Vectorizer(next(shipped_bundle().glob("vectorizer.*")))

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """A head of all texts."""
        began = time.process_time()
        vectors, phrases = _vectors(self._vectorizer, texts)
        encode_s = time.process_time() - began
        answers = Answers.of(labels, exclusive=not multi)
        about = About("peer", "benchmark", self._vectorizer.fingerprint)
        return Scored(self._vectorizer, fit_sentence(about, phrases, vectors, answers).head, encode_s)


class Anchors(Sentence):
    """`nlu heads train --kind anchors`: the phrases themselves, nothing trained."""

    name = "chorus anchors"

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """A head whose anchors are the texts."""
        began = time.process_time()
        vectors, phrases = _vectors(self._vectorizer, texts)
        encode_s = time.process_time() - began
        answers = Answers.of(labels, at_least=1)
        about = About("peer", "benchmark", self._vectorizer.fingerprint)
        return Scored(self._vectorizer, make_anchors(about, phrases, vectors, answers), encode_s)


def _vectors(vectorizer: Vectorizer, texts: Sequence[str]) -> tuple[FloatArray, list[str]]:
    """[texts, dim], and the phrases."""
    phrases = [_phrase(text) for text in texts]
    encodings = vectorizer.encode_corpus(phrases, tokens=False, workers=1)
    return np.stack([encoding.sentence for encoding in encodings]), phrases


def _phrase(text: str) -> str:
    try:
        return normalize(text).text
    except InvalidInput:  # a text without a word still has to be answered
        return "..."
