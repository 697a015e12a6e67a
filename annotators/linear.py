"""Linear heads learnt on frozen vectors: logistic regression, many labels and many strengths of regularisation at once.

The objective is scikit-learn's, `C * loss + |weights|^2 / 2` with a free intercept. It is minimised by L-BFGS in float32
along the principal axes of the training rows, each axis scaled by the curvature that labels of even odds have there, so
that the problem is about round: tens of steps where raw vectors, whose variances lie decades apart, take hundreds. Rows go
through the cache in chunks, on as many threads as there are cores; the sums are taken in one order whatever their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

FloatArray = NDArray[np.float32]

TOLERANCE = (
    1e-4  # of the objective, relative: beyond it accuracy and log-likelihood of unseen rows no longer move
)
_MAX_STEPS = 200
_MEMORY = 5  # steps that L-BFGS looks back on; more cost more time than they save
_CHUNK = 1024  # rows whose logits stay in a core's cache
_PARTS = 8  # sums that are formed apart; fixed, so that the result does not depend on the machine's cores
_SMALL = 10**7  # multiplications a step, up to where threads cost more than they save


@dataclass(frozen=True, slots=True)
class Linear:
    """raw = rows @ weight.T + bias."""

    weight: FloatArray  # [labels, features]
    bias: FloatArray  # [labels]

    def raw(self, rows: FloatArray) -> FloatArray:
        """[rows, labels]."""
        return rows @ self.weight.T + self.bias


def averaged(models: Sequence[Linear]) -> Linear:
    """The model whose raw scores are the mean of theirs."""
    weights, biases = [model.weight for model in models], [model.bias for model in models]
    return Linear(np.mean(weights, axis=0), np.mean(biases, axis=0))


class Targets(Protocol):
    """What rows should answer: the loss of their raw scores, and its slope."""

    rates: NDArray[np.float64]  # [labels] share of the rows' weight that each label has

    def slope(self, raw: FloatArray, rows: slice) -> float:
        """The summed loss of raw scores [rows, labels], which are replaced by its slope in each."""
        ...


class OneOf:
    """Labels that exclude each other: cross-entropy of a softmax."""

    def __init__(self, codes: NDArray[np.int64], labels: int, weights: FloatArray | None = None) -> None:
        """`codes` [rows] number the labels; `weights` [rows] say how much a row counts (1 where there are none)."""
        self._codes, self._weights = codes, weights
        counted = np.bincount(codes, weights, minlength=labels).astype(np.float64)
        self.rates = counted / counted.sum()

    def slope(self, raw: FloatArray, rows: slice) -> float:
        codes = self._codes[rows]
        each = np.arange(len(codes))
        raw -= raw.max(axis=1, keepdims=True)
        right = raw[each, codes]
        np.exp(raw, out=raw)
        sums = raw.sum(axis=1, keepdims=True)
        raw /= sums
        raw[each, codes] -= 1.0
        losses = np.log(sums[:, 0]) - right
        if self._weights is None:
            return float(losses.sum(dtype=np.float64))
        raw *= self._weights[rows, None]
        return float((losses * self._weights[rows]).sum(dtype=np.float64))


class AnyOf:
    """Labels on their own: cross-entropy of a sigmoid each."""

    def __init__(self, wanted: NDArray[np.bool_], weights: FloatArray | None = None) -> None:
        """`wanted` [rows, labels]; `weights` [rows, labels] or [rows, 1] say how much an answer counts."""
        self._signs = np.where(wanted, -1.0, 1.0).astype(np.float32)
        self._weights = weights
        self.rates = wanted.mean(axis=0)

    def slope(self, raw: FloatArray, rows: slice) -> float:
        raw *= self._signs[rows]
        losses = np.logaddexp(np.float32(0.0), raw)
        expit(raw, out=raw)
        raw *= self._signs[rows]
        if self._weights is not None:
            raw *= self._weights[rows]
            losses *= self._weights[rows]
        return float(losses.sum(dtype=np.float64))


def fit(rows: FloatArray, targets: Targets, c: float, *, tolerance: float = TOLERANCE) -> Linear:
    """The head of one strength; `rows` are [rows, features]."""
    return next(path(rows, targets, (c,), tolerance=tolerance))


def path(
    rows: FloatArray,
    targets: Targets,
    regularisations: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    start: Linear | None = None,
) -> Iterator[Linear]:
    """A head for each C, which ascend, because each fit starts where the one before ended; the first at `start`."""
    count, labels = len(rows), len(targets.rates)
    mean = rows.mean(axis=0)
    centred = rows - mean
    variances, axes = _principal(centred)
    with single_threaded(True):  # how many threads there were would show in the last bits
        turned = np.column_stack([centred @ axes.astype(np.float32), np.ones(count, np.float32)])
    spread = max(float((targets.rates * (1 - targets.rates)).mean()), 1e-6)
    curvatures = np.append(np.maximum(variances, 0.0), count) * spread
    known = np.clip(targets.rates, 0.5 / count, 1 - 0.5 / count)
    weight = np.column_stack([np.zeros((labels, len(variances))), np.log(known / (1 - known))])
    if start is not None:
        with single_threaded(True):
            weight = np.column_stack([start.weight @ axes, start.bias + start.weight @ mean])
    for c in regularisations:
        penalty = np.append(np.full(len(variances), 1 / c), 0.0)  # the intercept is free
        scale = (curvatures + penalty) ** -0.5
        with _Objective(turned * scale.astype(np.float32), targets, penalty * scale**2) as objective:
            found = minimize(
                objective,
                (weight / scale).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": _MAX_STEPS, "maxcor": _MEMORY, "ftol": tolerance, "gtol": 0.0},
            )
            weight = found.x.reshape(labels, -1) * scale
            unturned = weight[:, :-1] @ axes.T
        yield Linear(unturned.astype(np.float32), (weight[:, -1] - unturned @ mean).astype(np.float32))


def _principal(centred: FloatArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances [axes] and axes [features, axes] of centred rows; where rows are fewer than features, only the axes along
    which they differ, because along all others the best weights are 0."""
    count, width = centred.shape
    wide = count < width
    with single_threaded(True):  # as above
        products = (centred @ centred.T if wide else centred.T @ centred).astype(np.float64)
        variances, axes = np.linalg.eigh(products)
        if not wide:
            return variances, axes
        kept = variances > 1e-6 * max(float(variances[-1]), 1e-12)
        return variances[kept], (centred.T @ axes[:, kept]) / np.sqrt(variances[kept])


class _Objective:
    """Value and gradient over weights [labels, features + 1], flat as scipy wants them."""

    def __init__(self, rows: FloatArray, targets: Targets, penalty: NDArray[np.float64]) -> None:
        self._rows, self._targets, self._penalty = rows, targets, penalty
        count, width = rows.shape
        labels = len(targets.rates)
        small = rows.size * labels < _SMALL
        chunks = [slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        self._parts = [part for part in (chunks[i::_PARTS] for i in range(_PARTS)) if part]
        self._raw = [np.empty((_CHUNK, labels), np.float32) for _ in self._parts]
        self._sums = np.empty((len(self._parts), labels, width), np.float32)
        self._terms = [np.empty((labels, width), np.float32) for _ in self._parts]
        self._pool = None if small or len(self._parts) == 1 else ThreadPoolExecutor(os.cpu_count())
        self._limit = single_threaded(True)

    def __enter__(self) -> _Objective:
        self._limit.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.__exit__(None, None, None)
        if self._pool is not None:
            self._pool.shutdown()

    def __call__(self, flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = flat.reshape(len(self._targets.rates), -1)
        turned = np.ascontiguousarray(weight.T, np.float32)
        numbers = range(len(self._parts))
        each: Callable[..., Any] = map if self._pool is None else self._pool.map
        value = sum(each(self._part, numbers, [turned] * len(numbers)))
        shrinkage = weight * self._penalty
        gradient = self._sums.sum(axis=0, dtype=np.float64) + shrinkage
        return value + 0.5 * float((weight * shrinkage).sum()), gradient.ravel()

    def _part(self, number: int, weight: FloatArray) -> float:
        sums, term = self._sums[number], self._terms[number]
        sums[:] = 0
        value = 0.0
        for chunk in self._parts[number]:
            rows = self._rows[chunk]
            raw = np.matmul(rows, weight, out=self._raw[number][: len(rows)])
            value += self._targets.slope(raw, chunk)
            sums += np.matmul(raw.T, rows, out=term)
        return value


def single_threaded(when: bool) -> AbstractContextManager[Any]:
    """One BLAS thread where that is better: small products, whose team costs tenfold, and products in threads of our own."""
    pools: AbstractContextManager[Any] = _pools().limit(limits=1 if when else None, user_api="blas")
    return pools


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()
