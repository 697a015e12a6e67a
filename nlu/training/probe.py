"""The light heads that judge vectors: linear probes (logistic regression) on frozen sentence vectors.

The objective is scikit-learn's, `C * loss + |weights|^2 / 2` with a free intercept. It is minimised by L-BFGS in float32
along the principal axes of the training rows, each axis scaled by the curvature that labels of even odds have there, so
that the problem is about round: tens of steps where raw vectors, whose variances lie decades apart, take hundreds. That is
what pays for choosing C on all of the training data rather than on a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, softmax
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from annotators import thresholds
from nlu.training.desk import SEED
from nlu.training.measures import FloatArray, Metric, Rows, macro_f_of_many

# C, ascending, because each fit starts where the one before ended
REGULARISATIONS = (2.0, 8.0, 32.0, 128.0, 512.0)
FOLDS = 3
_TOLERANCE = 1e-6  # of the objective, relative
_MAX_STEPS = 200
_LARGE = 5 * 10**8  # multiplications a step, from where a team of BLAS threads saves more than it costs

Loss = Callable[[FloatArray], float]  # of logits [rows, labels], which it replaces by its slope in each
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
    for probe in _path_of(_independent(wanted), train, wanted.mean(axis=0), REGULARISATIONS):
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


def team(multiplications: int) -> AbstractContextManager[Any]:
    """All BLAS threads for large products, one for small ones: on a busy machine a team costs them tenfold."""
    limit = None if multiplications >= _LARGE else 1
    pools: AbstractContextManager[Any] = _pools().limit(limits=limit, user_api="blas")
    return pools


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _path(
    train: FloatArray, labels: NDArray[np.str_], regularisations: Sequence[float] = REGULARISATIONS
) -> Iterator[Probe]:
    names, codes = np.unique(labels, return_inverse=True)
    rates = np.bincount(codes) / len(codes)
    for probe in _path_of(_exclusive(codes), train, rates, regularisations):
        yield Probe(names, probe.weight, probe.bias)


def _path_of(
    loss: Loss, train: FloatArray, rates: NDArray[np.float64], regularisations: Sequence[float]
) -> Iterator[Probe]:
    """A probe for each C, ascending; `rates` [labels] are the shares of the rows that each label has."""
    count, labels = len(train), len(rates)
    mean = train.mean(axis=0)
    centred = train - mean
    variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    rows = np.column_stack([centred @ axes.astype(np.float32), np.ones(count, np.float32)])
    curvatures = np.append(np.maximum(variances, 0.0), count) * max(float((rates * (1 - rates)).mean()), 1e-6)
    known = np.clip(rates, 0.5 / count, 1 - 0.5 / count)
    weight = np.column_stack([np.zeros((labels, train.shape[1])), np.log(known / (1 - known))])
    for c in regularisations:
        penalty = np.append(np.full(train.shape[1], 1 / c), 0.0)  # the intercept is free
        scale = (curvatures + penalty) ** -0.5
        with team(train.size * labels):
            found = minimize(
                _objective(loss, rows * scale.astype(np.float32), penalty * scale**2),
                (weight / scale).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": _MAX_STEPS, "ftol": _TOLERANCE, "gtol": 0.0},
            )
        weight = found.x.reshape(labels, -1) * scale
        unrotated = weight[:, :-1] @ axes.T
        bias = weight[:, -1] - unrotated @ mean
        yield Probe(np.zeros(0, np.str_), unrotated.astype(np.float32), bias.astype(np.float32))


def _objective(
    loss: Loss, rows: FloatArray, penalty: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]:
    """Value and gradient over weights [labels, dim + 1], flat as scipy wants them."""

    def value_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = flat.reshape(-1, rows.shape[1])
        slopes = rows @ weight.T.astype(np.float32)
        value = loss(slopes)
        shrinkage = weight * penalty
        gradient = slopes.T @ rows + shrinkage
        return value + 0.5 * float((weight * shrinkage).sum()), gradient.ravel()

    return value_and_gradient


def _exclusive(codes: NDArray[np.int64]) -> Loss:
    """Cross-entropy of a softmax, summed over rows."""
    each = np.arange(len(codes))

    def loss(logits: FloatArray) -> float:
        logits -= logits.max(axis=1, keepdims=True)
        right = float(logits[each, codes].sum(dtype=np.float64))
        np.exp(logits, out=logits)
        sums = logits.sum(axis=1, keepdims=True)
        logits /= sums
        logits[each, codes] -= 1.0
        return float(np.log(sums).sum(dtype=np.float64)) - right

    return loss


def _independent(wanted: NDArray[np.bool_]) -> Loss:
    """Cross-entropy of a sigmoid for each label, summed over rows and labels."""
    signs = np.where(wanted, -1.0, 1.0).astype(np.float32)

    def loss(logits: FloatArray) -> float:
        logits *= signs
        value = float(np.logaddexp(np.float32(0.0), logits).sum(dtype=np.float64))
        expit(logits, out=logits)
        logits *= signs
        return value

    return loss
