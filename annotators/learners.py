"""What can be learnt on frozen vectors: linear heads, one hidden layer, boosted trees. Each gives raw scores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from annotators import linear
from annotators.answers import Answers
from annotators.sentence import Hidden

FloatArray = NDArray[np.float32]

REGULARISATIONS = (2.0, 8.0, 32.0, 128.0, 512.0)
_STEPS = 200  # of a hidden layer at the least: where rows are few, a pass over them is hardly a step


class Model(Protocol):
    """Something learnt."""

    def raw(self, rows: FloatArray) -> FloatArray:
        """[rows, labels]."""
        ...


class Learner(Protocol):
    """Something that learns; `strengths` are what there is to choose from, weakest first."""

    @property
    def strengths(self) -> Sequence[float]: ...

    def path(
        self,
        rows: FloatArray,
        answers: Answers,
        strengths: Sequence[float],
        *,
        loosely: bool = False,
        near: Sequence[Any] = (),
    ) -> Iterator[Model]:
        """A model for each strength; `loosely` is for models that are only asked what they do not know, and saves time.

        `near` are models of the learner's own, of parts of the rows; one that goes step by step starts from them.
        """
        ...


@dataclass(frozen=True, slots=True)
class LinearLearner:
    """Logistic regression; the strengths are C."""

    strengths: Sequence[float] = REGULARISATIONS

    def path(
        self,
        rows: FloatArray,
        answers: Answers,
        strengths: Sequence[float],
        *,
        loosely: bool = False,
        near: Sequence[Any] = (),
    ) -> Iterator[linear.Linear]:
        tolerance = 1e-3 if loosely else linear.TOLERANCE
        start = linear.averaged(near) if near else None
        yield from linear.path(rows, answers.targets(), strengths, tolerance=tolerance, start=start)


@dataclass(frozen=True, slots=True)
class HiddenModel:
    """One layer of rectified units, then the labels."""

    hidden: Hidden
    labels: linear.Linear

    def raw(self, rows: FloatArray) -> FloatArray:
        return self.labels.raw(np.maximum(rows @ self.hidden.weight.T + self.hidden.bias, 0))


@dataclass(frozen=True, slots=True)
class HiddenLearner:
    """scikit-learn's multilayer perceptron with one layer of `units`; the strengths are 1 / alpha."""

    units: int
    seed: int = 0
    strengths: Sequence[float] = (1e3, 1e4)

    def path(
        self,
        rows: FloatArray,
        answers: Answers,
        strengths: Sequence[float],
        *,
        loosely: bool = False,
        near: Sequence[Any] = (),
    ) -> Iterator[HiddenModel]:
        wanted: NDArray[Any] = answers.codes if answers.exclusive else answers.wanted.astype(np.int64)
        if wanted.shape[1:] == (1,):
            wanted = wanted[:, 0]  # a single label of its own, which scikit-learn wants flat
        batch = min(256, len(rows))
        passes = max(10 if loosely else 40, _STEPS * batch // len(rows))
        for strength in strengths:
            found = MLPClassifier(
                hidden_layer_sizes=(self.units,), alpha=1 / strength, learning_rate_init=3e-3, batch_size=batch,
                max_iter=passes, tol=1e-3, n_iter_no_change=3, random_state=self.seed,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is ours
                found.fit(rows, wanted, sample_weight=answers.weights)
            first, second = (layer.astype(np.float32).T for layer in found.coefs_)
            bias, last = (layer.astype(np.float32) for layer in found.intercepts_)
            yield HiddenModel(
                Hidden(first, bias),
                _two_sided(linear.Linear(second, last), len(answers.names), answers.exclusive),
            )


def _two_sided(found: linear.Linear, labels: int, exclusive: bool) -> linear.Linear:
    """scikit-learn keeps one row for two labels that exclude each other; we keep both."""
    if not (exclusive and labels == 2):
        return found
    return linear.Linear(
        np.concatenate([-found.weight / 2, found.weight / 2]),
        np.concatenate([-found.bias / 2, found.bias / 2]),
    )


@dataclass(frozen=True, slots=True)
class BoostedModel:
    """LightGBM's trees, one set a label."""

    booster: Any  # lightgbm.Booster
    labels: int

    def raw(self, rows: FloatArray) -> FloatArray:
        """Logarithms of the probabilities, as the served head gives them."""
        found = np.asarray(self.booster.predict(rows, num_threads=os.cpu_count()), np.float32)
        chances = np.stack([1 - found, found], axis=1) if found.ndim == 1 else found
        raw: FloatArray = np.log(np.maximum(chances, np.float32(1e-7)))
        return raw


@dataclass(frozen=True, slots=True)
class BoostedLearner:
    """Gradient-boosted trees (Ke et al. 2017, LightGBM); the strengths are numbers of trees."""

    leaves: int = 15
    seed: int = 0
    strengths: Sequence[float] = (50, 150)

    def path(
        self,
        rows: FloatArray,
        answers: Answers,
        strengths: Sequence[float],
        *,
        loosely: bool = False,
        near: Sequence[Any] = (),
    ) -> Iterator[BoostedModel]:
        try:
            import lightgbm  # takes half a second, and only these heads need it
        except OSError as error:
            raise ValueError(
                f"lightgbm: found {error}, expected its OpenMP library; install libgomp1 with your system's package manager"
            ) from error

        count = len(answers.names)
        objective = {"objective": "multiclass", "num_class": count} if count > 2 else {"objective": "binary"}
        parameters = {
            **objective, "num_leaves": self.leaves, "learning_rate": 0.1, "feature_fraction": 0.3, "verbosity": -1,
            "seed": self.seed, "deterministic": True, "force_col_wise": True, "num_threads": 1, "min_data_in_leaf": 5,
        }  # fmt: skip
        for trees in strengths:
            data = lightgbm.Dataset(rows, answers.codes, weight=answers.weights)
            yield BoostedModel(lightgbm.train(parameters, data, int(trees)), count)
