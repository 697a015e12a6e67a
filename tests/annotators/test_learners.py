"""What learns on vectors: the numbers that scikit-learn's and LightGBM's own models give, as raw scores of one kind."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

from annotators import learners, linear
from annotators.answers import Answers
from annotators.learners import BoostedLearner, HiddenLearner, Learner, LinearLearner
from tests.annotators.clouds import cloud
from tests.annotators.toys import random_units

XOR = np.repeat(np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]], np.float32), 200, axis=0)
SAME, OTHER = ["same"] * 400, ["other"] * 400


def fitted(learner: Learner, rows: NDArray[np.float32], answers: Answers) -> Any:
    """The model of the first strength."""
    return next(iter(learner.path(rows, answers, learner.strengths)))


def test_learners_linear_path_is_the_solvers() -> None:
    said, strengths = cloud(0.4), (0.5, 4.0)
    models = list(LinearLearner().path(said.vectors, said.answers, strengths))
    expected = list(linear.path(said.vectors, said.answers.targets(), strengths))
    assert [model.weight.tobytes() for model in models] == [model.weight.tobytes() for model in expected]


def test_learners_linear_loosely_is_nearly_as_good() -> None:
    said = cloud(0.4, per_label=40)

    def loss(*, loosely: bool) -> float:
        (model,) = LinearLearner().path(said.vectors, said.answers, (4.0,), loosely=loosely)
        return float(log_loss(said.answers.codes, softmax(model.raw(said.vectors), axis=1)))

    assert loss(loosely=True) != loss(loosely=False)
    assert loss(loosely=True) == pytest.approx(loss(loosely=False), rel=0.02)


def test_learners_hidden_layer_learns_what_no_line_divides() -> None:
    """The negative control is a line."""
    answers = Answers.one([*SAME, *OTHER])
    bent = fitted(HiddenLearner(16), XOR, answers).raw(XOR).argmax(axis=1)
    straight = fitted(LinearLearner(), XOR, answers).raw(XOR).argmax(axis=1)
    assert (bent == answers.codes).all()
    assert (straight == answers.codes).mean() <= 0.75


@pytest.mark.parametrize("per_label", [12, 60, 200])
def test_learners_hidden_loosely_is_as_sure_where_phrases_are_few(per_label: int) -> None:
    """What held-out scores are calibrated to must fit the head that is served."""
    said, unseen = cloud(0.3, per_label=per_label), cloud(0.3, seed=1).vectors
    exact, loose = (
        next(HiddenLearner(16).path(said.vectors, said.answers, (1e3,), loosely=loosely)).raw(unseen)
        for loosely in (False, True)
    )
    assert np.abs(loose).mean() == pytest.approx(np.abs(exact).mean(), rel=0.2)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(Answers.one(["a", "b", "c"] * 16), id="three that exclude each other"),
        pytest.param(Answers.one(["a", "b"] * 24), id="two that exclude each other"),
        pytest.param(Answers.of([("a", "b"), ("b", "c"), ()] * 16, exclusive=False), id="three on their own"),
        pytest.param(Answers.of([("a", "b"), ("b",), ()] * 16, exclusive=False), id="two on their own"),
        pytest.param(Answers.of([("a",), ()] * 24, exclusive=False), id="one on its own"),
    ],
)
def test_learners_hidden_scores_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> None:
    made: list[MLPClassifier] = []

    class Kept(MLPClassifier):  # type: ignore[misc]  # scikit-learn has no types
        def fit(self, *arguments: Any, **options: Any) -> Any:
            made.append(self)
            return super().fit(*arguments, **options)

    monkeypatch.setattr(learners, "MLPClassifier", Kept)
    rows = random_units(48, 6)
    raw = fitted(HiddenLearner(8), rows, answers).raw(rows)
    assert raw.shape == (48, len(answers.names))
    chances = made[0].predict_proba(rows)
    if answers.exclusive:
        np.testing.assert_allclose(softmax(raw, axis=1), chances, atol=1e-5)
    else:
        found = expit(raw)
        np.testing.assert_allclose(found, chances[:, -1:] if len(answers.names) == 1 else chances, atol=1e-5)


def test_learners_hidden_layer_heeds_the_rows_weights() -> None:
    """Every row says both; the weights say which of them is meant, and turned round they say the opposite."""
    rows, labels = np.tile(XOR, (2, 1)), [*SAME, *OTHER, *OTHER, *SAME]
    for first, second, meant in ((4.0, 0.0, [*SAME, *OTHER]), (0.0, 4.0, [*OTHER, *SAME])):
        weights = np.repeat(np.array([first, second], np.float32), len(XOR))
        answers = Answers.of([(label,) for label in labels], weights=weights)
        found = fitted(HiddenLearner(16), rows, answers).raw(XOR).argmax(axis=1)
        assert [answers.names[i] for i in found] == meant


@pytest.mark.parametrize("strengths", [(1e-2, 1e4)])
def test_learners_hidden_strengths_loosen_the_weights(strengths: tuple[float, float]) -> None:
    answers = Answers.one([*SAME, *OTHER])
    weak, strong = (
        np.abs(model.hidden.weight).sum() for model in HiddenLearner(8).path(XOR, answers, strengths)
    )
    assert weak < strong


@pytest.mark.parametrize("labels", [2, 3])
def test_learners_boosted_scores_are_logarithms_of_lightgbms_chances(labels: int) -> None:
    said = cloud(0.4, per_label=20)
    answers = Answers.one([label if labels == 3 or label != "stop" else "light" for label in said.firsts])
    model = fitted(BoostedLearner(strengths=(7,)), said.vectors, answers)
    chances = model.booster.predict(said.vectors)
    found = np.exp(model.raw(said.vectors))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found if labels == 3 else found[:, 1], chances, rtol=1e-5)
    assert (found.argmax(axis=1) == answers.codes).mean() > 0.8
    assert model.booster.current_iteration() == 7


def test_learners_boosted_trees_heed_the_rows_weights() -> None:
    rows = np.tile(np.repeat(np.eye(2, dtype=np.float32), 20, axis=0), (2, 1))
    labels = [*["a"] * 20, *["b"] * 20, *["b"] * 20, *["a"] * 20]
    for first, second, meant in ((4.0, 1.0, [0, 1]), (1.0, 4.0, [1, 0])):
        weights = np.repeat(np.array([first, second], np.float32), 40)
        model = fitted(BoostedLearner(), rows, Answers.of([(label,) for label in labels], weights=weights))
        assert model.raw(np.eye(2, dtype=np.float32)).argmax(axis=1).tolist() == meant


@pytest.mark.parametrize("learner", [LinearLearner((4.0,)), HiddenLearner(8), BoostedLearner()])
def test_learners_near_models_change_no_answer(learner: Learner) -> None:
    """They are of parts of the rows; whoever goes step by step starts from them, the others do without."""
    said, halves = cloud(0.4), (np.arange(0, 36, 2), np.arange(1, 36, 2))
    near = [fitted(learner, said.vectors[half], said.answers.take(half)) for half in halves]
    (with_them,) = learner.path(said.vectors, said.answers, learner.strengths[:1], near=near)
    alone = fitted(learner, said.vectors, said.answers)
    found, expected = (softmax(model.raw(said.vectors), axis=1) for model in (with_them, alone))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_learners_boosted_trees_without_openmp_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "lightgbm":
                raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "lightgbm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    said = cloud(0.4)
    with pytest.raises(
        ValueError, match="found libgomp.so.1: .*, expected its OpenMP library; install libgomp1 with"
    ):
        fitted(BoostedLearner(), said.vectors, said.answers)


@pytest.mark.parametrize("learner", [LinearLearner, lambda: HiddenLearner(8), BoostedLearner])
def test_learners_same_rows_give_the_same_scores(learner: Any) -> None:
    said = cloud(0.4)
    one, again = (fitted(learner(), said.vectors, said.answers).raw(said.vectors) for _ in range(2))
    assert one.tobytes() == again.tobytes()
    assert one.dtype == np.float32
    assert one.shape == (36, 3)


@pytest.mark.parametrize(
    "learner", [lambda seed: HiddenLearner(8, seed), lambda seed: BoostedLearner(seed=seed)]
)
def test_learners_follow_their_seed(learner: Any) -> None:
    said = cloud(0.4)
    one, other = (fitted(learner(seed), said.vectors, said.answers).raw(said.vectors) for seed in (1, 2))
    assert one.tobytes() != other.tobytes()
