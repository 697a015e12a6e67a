"""The light heads that judge vectors: linear probes (logistic regression) on frozen sentence vectors.

They are the heads of `annotators.linear`, fitted to a finer tolerance, because here vectorizers are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from annotators import linear, thresholds
from nlu.training.desk import SEED
from nlu.training.measures import FloatArray, Metric, Rows, macro_f_of_many

# C, ascending, because each fit starts where the one before ended
REGULARISATIONS = (2.0, 8.0, 32.0, 128.0, 512.0)
FOLDS = 3
_TOLERANCE = 1e-6  # of the objective, relative

Sheet = tuple[FloatArray, NDArray[np.str_]]  # vectors, labels


@dataclass(frozen=True, slots=True)
class Probe:
    """A fitted head. `names` [labels] is empty where the labels are columns of yes and no."""

    names: NDArray[np.str_]
    weight: FloatArray  # [labels, dim]
    bias: FloatArray  # [labels]

    def logits(self, vectors: FloatArray) -> FloatArray:
        """[rows, labels]."""
        return vectors @ self.weight.T + self.bias

    def predict(self, vectors: FloatArray) -> NDArray[np.str_]:
        """The best label of each row."""
        answers: NDArray[np.str_] = self.names[self.logits(vectors).argmax(axis=1)]
        return answers

    def confidence(self, vectors: FloatArray) -> FloatArray:
        """The probability of each row's best label, where labels exclude each other."""
        found: FloatArray = softmax(self.logits(vectors), axis=1).max(axis=1)
        return found

    def chances(self, vectors: FloatArray) -> FloatArray:
        """The probability of each label by itself, [rows, labels]."""
        found: FloatArray = expit(self.logits(vectors))
        return found


def fit(train: FloatArray, labels: NDArray[np.str_], c: float) -> Probe:
    """One label a row: multinomial logistic regression."""
    return next(_path(train, labels, (c,)))


def tune(train: FloatArray, labels: NDArray[np.str_], metric: Metric, dev: Sheet | None = None) -> Probe:
    """`fit` with the C that answers dev rows best, or held-out folds where there is no dev; ties go to the stronger."""
    if dev is None:
        return fit(train, labels, choose(train, labels, metric))
    return max(_path(train, labels), key=lambda probe: metric(dev[1], probe.predict(dev[0])))


def choose(train: FloatArray, labels: NDArray[np.str_], metric: Metric) -> float:
    """The C that answers held-out folds best."""
    folds = deal(labels, FOLDS)
    answers = np.empty((len(REGULARISATIONS), len(labels)), labels.dtype)
    for fold in np.unique(folds):
        inside = folds != fold
        for i, probe in enumerate(_path(train[inside], labels[inside])):
            answers[i, ~inside] = probe.predict(train[~inside])
    return REGULARISATIONS[int(np.argmax([metric(labels, found) for found in answers]))]


def tune_each(
    train: FloatArray, wanted: NDArray[np.bool_], dev: FloatArray, dev_wanted: NDArray[np.bool_]
) -> tuple[Probe, FloatArray]:
    """Any number of labels a row, `wanted` [rows, labels]: a probe, and the threshold [labels] of each label's chance.

    C and thresholds are those of the best macro-F1 over dev rows; one C for all labels, fitted at once.
    """
    found: list[tuple[float, Probe, FloatArray]] = []
    for fitted in linear.path(train, linear.AnyOf(wanted), REGULARISATIONS, tolerance=_TOLERANCE):
        probe = Probe(np.zeros(0, np.str_), fitted.weight, fitted.bias)
        chances = probe.chances(dev)
        limits = np.array(thresholds.fit_independent(chances, dev_wanted, beta=1.0), np.float32)
        score = macro_f_of_many(dev_wanted, chances >= limits)(np.arange(len(dev)))
        found.append((score, probe, limits))
    return max(found, key=lambda each: each[0])[1:]


def deal(labels: NDArray[np.str_], folds: int) -> Rows:
    """A fold for each row, each label dealt out evenly; a label with one row is in no other fold's training."""
    dealt = np.zeros(len(labels), np.int64)
    rng = np.random.default_rng(SEED)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        dealt[rng.permutation(rows)] = np.arange(len(rows)) % folds
    return dealt


def _path(
    train: FloatArray, labels: NDArray[np.str_], regularisations: Sequence[float] = REGULARISATIONS
) -> Iterator[Probe]:
    names, codes = np.unique(labels, return_inverse=True)
    targets = linear.OneOf(codes, len(names))
    for fitted in linear.path(train, targets, regularisations, tolerance=_TOLERANCE):
        yield Probe(names, fitted.weight, fitted.bias)
