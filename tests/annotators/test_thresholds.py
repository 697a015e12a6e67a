"""Thresholds: the best F-beta of every possible cut, found without trying them all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import fbeta_score

from annotators.thresholds import (
    DEFAULT_BETA,
    best,
    fit_exclusive,
    fit_independent,
    promised_exclusive,
    promised_independent,
)

Rows = list[tuple[float, bool]]

# Sixteenths are exact floats, and few enough that equal scores are common.
some_rows = st.lists(
    st.tuples(st.integers(0, 16).map(lambda n: n / 16), st.booleans()), min_size=1, max_size=12
)


def f_beta(rows: Rows, threshold: float, positives: int, beta: float) -> float:
    """From the definition: precision and recall of accepting at or above the threshold."""
    accepted = [hit for score, hit in rows if score >= threshold]
    if not any(accepted):
        return 0.0
    precision, recall = sum(accepted) / len(accepted), sum(accepted) / positives
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def fitted(rows: Rows, positives: int, beta: float) -> float:
    scores, hits = zip(*rows, strict=True)
    return best(np.array(scores, np.float32), np.array(hits), positives, beta)


@settings(deadline=None)
@given(rows=some_rows, missed=st.integers(0, 5), beta=st.sampled_from([0.5, 1.0, DEFAULT_BETA]))
def test_thresholds_best_equals_brute_force_over_all_cuts(rows: Rows, missed: int, beta: float) -> None:
    """`missed` positives never reached this label: they cost recall at every cut."""
    positives = sum(hit for _, hit in rows) + missed
    highest = (
        max(f_beta(rows, cut, positives, beta) for cut in [i / 32 for i in range(34)]) if positives else 0.0
    )
    threshold = fitted(rows, positives, beta)
    if any(hit for _, hit in rows):
        assert f_beta(rows, threshold, positives, beta) == pytest.approx(highest, abs=1e-12)
    else:
        assert threshold == 0.5


@settings(deadline=None)
@given(rows=some_rows, data=st.data())
def test_thresholds_do_not_depend_on_the_order_of_rows(rows: Rows, data: st.DataObject) -> None:
    positives = sum(hit for _, hit in rows)
    shuffled = data.draw(st.permutations(rows))
    assert fitted(rows, positives, 1.0) == fitted(shuffled, positives, 1.0)


@pytest.mark.parametrize(
    ("rows", "beta", "threshold"),
    [
        pytest.param([(0.9, True), (0.8, True), (0.4, False)], 1.0, 0.6, id="half way to the next below"),
        pytest.param([(0.9, True), (0.5, True)], 1.0, 0.25, id="half way to zero"),
        pytest.param([(0.9, False), (0.8, True)], 1.0, 0.4, id="a miss above"),
        pytest.param([(0.8, True), (0.8, False), (0.2, False)], 1.0, 0.5, id="equal scores go together"),
        pytest.param([(0.9, True), (0.5, False), (0.5, False), (0.1, True)], 0.5, 0.7, id="precision first"),
        pytest.param([(0.9, True), (0.5, False), (0.5, False), (0.1, True)], 1.8, 0.05, id="recall first"),
        pytest.param([(0.9, False)], 1.0, 0.5, id="nothing to find"),
    ],
)
def test_thresholds_best_by_hand(rows: Rows, beta: float, threshold: float) -> None:
    assert fitted(rows, sum(hit for _, hit in rows), beta) == pytest.approx(threshold, abs=1e-7)


def exclusive_scores(rows: int, labels: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(5)
    targets = rng.integers(-1, labels, rows)  # -1: belongs to no label
    raw = rng.normal(0, 1, (rows, labels)) + 2 * (targets[:, None] == np.arange(labels))
    scores = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    return scores.astype(np.float32), targets


def answers(scores: NDArray[np.float32], label: int, threshold: float) -> NDArray[np.bool_]:
    """Where an exclusive head answers with this label: it scores best, and high enough."""
    accepted: NDArray[np.bool_] = (scores.argmax(axis=1) == label) & (scores[:, label] >= threshold)
    return accepted


@pytest.mark.parametrize("beta", [1.0, DEFAULT_BETA])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_thresholds_exclusive_equal_brute_force_with_scikit_learn(label: int, beta: float) -> None:
    scores, targets = exclusive_scores(80, 3)
    gold = targets == label
    cuts = np.concatenate([[0.0], scores[:, label]])
    highest = max(fbeta_score(gold, answers(scores, label, cut), beta=beta, zero_division=0) for cut in cuts)
    threshold = fit_exclusive(scores, targets, beta=beta)[label]
    assert fbeta_score(gold, answers(scores, label, threshold), beta=beta) == pytest.approx(
        highest, abs=1e-12
    )


@pytest.mark.parametrize("label", [0, 1, 2])
def test_thresholds_independent_equal_brute_force_with_scikit_learn(label: int) -> None:
    rng = np.random.default_rng(6)
    targets = rng.random((60, 3)) < (0.5, 0.2, 0.8)
    scores = np.clip(rng.normal(0.4, 0.2, (60, 3)) + 0.2 * targets, 0, 1).astype(np.float32)
    highest = max(
        fbeta_score(targets[:, label], scores[:, label] >= cut, beta=DEFAULT_BETA) for cut in scores[:, label]
    )
    threshold = fit_independent(scores, targets)[label]
    found = fbeta_score(targets[:, label], scores[:, label] >= threshold, beta=DEFAULT_BETA)
    assert found == pytest.approx(highest, abs=1e-12)


def test_thresholds_rise_for_rows_that_belong_to_none() -> None:
    """Without the outsiders, the negative control, nothing is ever rejected."""
    inside = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]], np.float32)
    outside = np.array([[0.6, 0.4], [0.55, 0.45], [0.7, 0.3]], np.float32)
    targets = np.array([0, 0, 1, 1])
    assert fit_exclusive(inside, targets) == pytest.approx((0.4, 0.4))
    with_outsiders = fit_exclusive(np.concatenate([inside, outside]), np.concatenate([targets, [-1] * 3]))
    assert with_outsiders == pytest.approx((0.75, 0.4))


@settings(deadline=None)
@given(rows=some_rows, beta=st.sampled_from([0.5, 1.0, DEFAULT_BETA]), data=st.data())
def test_thresholds_row_that_weighs_three_is_three_rows(rows: Rows, beta: float, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    positives = sum(hit for _, hit in repeated)
    scores, hits = np.array([score for score, _ in rows], np.float32), np.array([hit for _, hit in rows])
    weighed = best(scores, hits, positives, beta, weights=np.array(weights, np.float64))
    assert f_beta(repeated, weighed, max(1, positives), beta) == pytest.approx(
        f_beta(repeated, fitted(repeated, positives, beta), max(1, positives), beta), abs=1e-12
    )


def test_thresholds_of_rows_found_outside_are_not_needed() -> None:
    """They are refused whatever their score, so they hold no threshold up; those of a label's own still cost it recall."""
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.85, 0.15], [0.2, 0.8]], np.float32)
    targets, everyone = np.array([0, 0, -1, 1]), np.ones(4, np.bool_)
    stranger = np.array([True, True, False, True])
    assert fit_exclusive(scores, targets, beta=0.5, open_=everyone) == fit_exclusive(
        scores, targets, beta=0.5
    )
    assert fit_exclusive(scores, targets, beta=0.5) == pytest.approx((0.875, 0.4))
    assert fit_exclusive(scores, targets, beta=0.5, open_=stranger) == pytest.approx((0.4, 0.4))


PARTS = 5


def parts(rows: int, seed: int) -> list[list[int]]:
    """The rows of each part, as the module deals them: a shuffled pack, one card each in turn."""
    dealt = np.random.default_rng(seed).permutation(rows) % PARTS
    return [np.flatnonzero(dealt == part).tolist() for part in range(PARTS)]


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "some found outside"])
@pytest.mark.parametrize(("seed", "beta"), [(0, 1.0), (3, DEFAULT_BETA)])
def test_thresholds_promised_recall_equals_brute_force(seed: int, beta: float, guarded: bool) -> None:
    """Row by row: thresholds of the four other parts, and whether the row is answered with its own label."""
    scores, targets = exclusive_scores(80, 3)
    open_ = np.random.default_rng(9).random(80) < 0.8 if guarded else np.ones(80, np.bool_)
    right = [0, 0, 0]
    for part in parts(80, seed):
        others = [row for row in range(80) if row not in part]
        limits = fit_exclusive(scores[others], targets[others], beta=beta, open_=open_[others])
        for row in part:
            label = int(scores[row].argmax())
            right[label] += bool(open_[row] and label == targets[row] and scores[row, label] >= limits[label])
    expected = [right[label] / np.sum(targets == label) for label in range(3)]
    found = promised_exclusive(scores, targets, beta=beta, open_=open_ if guarded else None, seed=seed)
    assert found.tolist() == pytest.approx(expected)
    assert 0 < min(expected) and max(expected) < 1


@pytest.mark.parametrize("seed", [0, 3])
def test_thresholds_promised_recall_of_labels_on_their_own_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(6)
    targets = rng.random((60, 3)) < (0.5, 0.2, 0.8)
    scores = np.clip(rng.normal(0.4, 0.2, (60, 3)) + 0.2 * targets, 0, 1).astype(np.float32)
    right = np.zeros(3)
    for part in parts(60, seed):
        others = [row for row in range(60) if row not in part]
        limits = fit_independent(scores[others], targets[others], beta=1.0)
        for row in part:
            right += [targets[row, label] and scores[row, label] >= limits[label] for label in range(3)]
    found = promised_independent(scores, targets, beta=1.0, seed=seed)
    assert found.tolist() == pytest.approx((right / targets.sum(axis=0)).tolist())
    assert 0 < found.min() and found.max() < 1


def test_thresholds_promised_recall_is_not_that_of_the_rows_themselves() -> None:
    """The negative control: thresholds judged by the rows they were fitted on promise more than they keep."""
    scores, targets = exclusive_scores(80, 3)
    limits = np.array(fit_exclusive(scores, targets, beta=1.0))
    winners = scores.argmax(axis=1)
    right = (winners == targets) & (scores[np.arange(80), winners] >= limits[winners])
    flattering = np.bincount(targets[right], minlength=3) / np.bincount(targets[targets >= 0], minlength=3)
    assert promised_exclusive(scores, targets, beta=1.0).sum() < flattering.sum()


def test_thresholds_promised_recall_of_a_label_without_rows_is_zero() -> None:
    scores = np.array([[0.9, 0.1]] * 6, np.float32)
    assert promised_exclusive(scores, np.zeros(6, np.int64)).tolist() == [1, 0]
    assert promised_independent(scores, np.tile([True, False], (6, 1))).tolist() == [1, 0]
