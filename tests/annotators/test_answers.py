"""What rows should be answered with: labels numbered, weighed and dealt into folds, and too little to learn from refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_sample_weight

from annotators.answers import Answers, HeldOut
from annotators.linear import AnyOf, OneOf
from tests.annotators.toys import random_units

NAMES = ("light", "music", "stop")
some_labels = st.lists(st.sampled_from(NAMES), min_size=1, max_size=30)


def weighing(answers: Answers, *weights: float) -> Answers:
    return Answers(answers.names, answers.wanted, answers.exclusive, np.array(weights, np.float32))


def weights_of(answers: Answers) -> NDArray[np.float32]:
    assert answers.weights is not None
    return answers.weights


def test_answers_number_the_labels_by_name() -> None:
    answers = Answers.one(["stop", "light", "stop", "light"])
    assert (answers.names, answers.exclusive, answers.weights, len(answers)) == (
        ("light", "stop"),
        True,
        None,
        4,
    )
    assert answers.codes.tolist() == [1, 0, 1, 0]
    assert answers.wanted.astype(int).tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]


def test_answers_on_their_own_may_be_several_or_none() -> None:
    answers = Answers.of([("stop", "light"), (), ("light",), ("stop",)], exclusive=False)
    assert (answers.names, answers.exclusive) == (("light", "stop"), False)
    assert answers.wanted.astype(int).tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        pytest.param([("a",)] * 4, {}, "labels: found 1 distinct, expected at least 2; add phrases of another", id="one label"),
        pytest.param([], {}, "labels: found 0 distinct, expected at least 2", id="no rows"),
        pytest.param([()] * 4, {"exclusive": False}, "labels: found 0 distinct, expected at least 1", id="no label at all"),
        pytest.param([("a",), ("a",), ("b",)], {}, "label 'b': found 1 phrase, expected at least 2; add phrases or drop", id="rare"),
        pytest.param([("a",), ("a", "b")], {"exclusive": False}, "label 'b': found 1 phrase, expected at least 2", id="rare, on its own"),
        pytest.param([("a",), ("a",), ()], {}, "row 3: found 0 labels, expected one, because labels exclude", id="a row of none"),
        pytest.param([("a",), ("a", "b")], {}, "row 2: found 2 labels, expected one, because labels exclude", id="a row of two"),
    ],
)  # fmt: skip
def test_answers_too_little_to_learn_from_is_refused(
    labels: list[tuple[str, ...]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Answers.of(labels, **options)


def test_answers_one_phrase_of_one_label_is_enough_where_nothing_is_fitted() -> None:
    assert Answers.one(["a"], at_least=1).names == ("a",)


def test_answers_taken_rows_keep_their_labels_and_weights() -> None:
    answers = weighing(Answers.one(["a", "b", "a", "b"]), 1, 2, 3, 4)
    taken = answers.take(np.array([3, 0]))
    assert (taken.names, taken.codes.tolist()) == (("a", "b"), [1, 0])
    assert weights_of(taken).tolist() == [4, 1]
    assert Answers.one(["a", "b", "a", "b"]).take(np.array([0])).weights is None


def test_answers_joined_rows_of_no_weight_weigh_one() -> None:
    plain, weighed = (
        Answers.one(["a", "b", "a", "b"]),
        weighing(Answers.one(["b", "b", "a", "a"]), 2, 3, 4, 5),
    )
    joined = plain.joined(weighed)
    assert joined.codes.tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert weights_of(joined).tolist() == [1, 1, 1, 1, 2, 3, 4, 5]
    assert plain.joined(plain).weights is None
    assert plain.joined(None) is plain


@given(some_labels)
def test_answers_balanced_weights_are_scikit_learns(labels: list[str]) -> None:
    balanced = Answers.one(labels, at_least=0).balanced()
    np.testing.assert_allclose(weights_of(balanced), compute_sample_weight("balanced", labels), rtol=1e-6)


@given(some_labels)
def test_answers_balanced_labels_count_the_same_in_sum(labels: list[str]) -> None:
    balanced = Answers.one(labels, at_least=0).balanced()
    sums = weights_of(balanced) @ balanced.wanted
    np.testing.assert_allclose(sums, len(labels) / len(balanced.names), rtol=1e-5)


def test_answers_balanced_rows_of_several_labels_weigh_as_their_labels_do_on_average() -> None:
    rows = [("a",), ("a",), ("a", "b"), ()]  # a weighs 4 / (2 * 3), b 4 / (2 * 1); a row of none weighs one
    balanced = Answers.of(rows, exclusive=False, at_least=1).balanced()
    np.testing.assert_allclose(weights_of(balanced), [2 / 3, 2 / 3, (2 / 3 + 2) / 2, 1], rtol=1e-6)


def test_answers_balancing_multiplies_the_weights_that_rows_have() -> None:
    answers = weighing(Answers.one(["a", "a", "a", "b"], at_least=1), 1, 2, 3, 4)
    np.testing.assert_allclose(weights_of(answers.balanced()), [2 / 3, 4 / 3, 2, 8], rtol=1e-6)


def test_answers_targets_are_what_labels_mean_to_each_other() -> None:
    rows = weighing(Answers.one(["a", "b", "a", "b"]), 1, 3, 1, 3)
    exclusive = rows.targets()
    independent = Answers(rows.names, rows.wanted, False, rows.weights).targets()
    assert isinstance(exclusive, OneOf)
    assert isinstance(independent, AnyOf)
    assert exclusive.rates.tolist() == [0.25, 0.75]
    raw = np.zeros((4, 2), np.float32)
    assert independent.slope(raw, slice(0, 4)) == pytest.approx(8 * 2 * np.log(2))
    assert raw.tolist() == [[-0.5, 0.5], [1.5, -1.5], [-0.5, 0.5], [1.5, -1.5]]


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_folds_hold_every_row_out_once(exclusive: bool, seed: int) -> None:
    answers = Answers.of([(name,) for name in NAMES * 5], exclusive=exclusive)
    folds = answers.folds(3, seed)
    assert sorted(np.concatenate([unseen for _, unseen in folds]).tolist()) == list(range(15))
    for seen, unseen in folds:
        assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(15))


def test_answers_folds_deal_every_label_out_evenly() -> None:
    answers = Answers.one([*["a"] * 9, *["b"] * 3, *["c"] * 6])
    assert [answers.wanted[unseen].sum(axis=0).tolist() for _, unseen in answers.folds(3, 0)] == [
        [3, 1, 2]
    ] * 3


@pytest.mark.parametrize(("rarest", "folds"), [(2, 2), (3, 3), (4, 4), (9, 5)])
def test_answers_folds_are_fewer_where_a_label_has_fewer_rows(rarest: int, folds: int) -> None:
    answers = Answers.one([*["a"] * 9, *["b"] * rarest])
    assert len(answers.folds(5, 0)) == folds


def test_answers_folds_follow_the_seed() -> None:
    answers = Answers.one(list(NAMES * 5))
    one, again, other = ([unseen.tolist() for _, unseen in answers.folds(3, seed)] for seed in (5, 5, 6))
    assert one == again
    assert one != other


def test_answers_held_out_rows_are_taken_with_all_outsiders() -> None:
    raw, strange, cosines, strange_cosines = (random_units(4, 3, seed=seed) for seed in range(4))
    taken = HeldOut(raw, strange, cosines, strange_cosines).take(np.array([2, 0]))
    np.testing.assert_array_equal(taken.raw, raw[[2, 0]])
    np.testing.assert_array_equal(taken.cosines, cosines[[2, 0]])
    np.testing.assert_array_equal(taken.strange, strange)
    np.testing.assert_array_equal(taken.strange_cosines, strange_cosines)
