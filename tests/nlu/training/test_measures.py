"""nlu.training.measures: numbers by hand and against their twins."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")

from scipy.stats import spearmanr
from sklearn.metrics import f1_score, fbeta_score, roc_auc_score

from nlu.training import measures
from nlu.training.measures import Rows


def all_of(items: int) -> Rows:
    return np.arange(items)


def test_measures_macro_f_by_hand() -> None:
    gold, predicted = np.array(["a", "a", "b", "c"]), np.array(["a", "b", "b", "x"])
    # a: 1 of 2 found, nothing else taken for it; b: found, and one a taken for it; c: not found; x: no label here
    assert measures.macro_f(gold, predicted, 1.0)(all_of(4)) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    beta = 1.8**2
    assert measures.macro_f(gold, predicted, 1.8)(all_of(4)) == pytest.approx(
        ((1 + beta) / (beta * 2 + 1) + (1 + beta) / (beta + 2)) / 3
    )
    assert measures.macro_f(gold, predicted, 1.0)(np.array([3])) == 0.0


def test_measures_numbers_equal_their_twins() -> None:
    rng = np.random.default_rng(0)
    gold, predicted = (rng.integers(5, size=200).astype(str) for _ in range(2))
    rows = rng.integers(200, size=200)
    present = sorted(set(gold[rows]))
    assert measures.macro_f(gold, predicted, 1.8)(rows) == pytest.approx(
        fbeta_score(gold[rows], predicted[rows], beta=1.8, average="macro", labels=present, zero_division=0)
    )
    scores, other = rng.integers(20, size=200) / 20, rng.integers(20, size=200) / 20
    positive = rng.random(200) < 0.3
    assert measures.auroc(scores, positive)(rows) == pytest.approx(
        roc_auc_score(positive[rows], scores[rows])
    )
    assert measures.spearman(scores, other)(rows) == pytest.approx(
        float(spearmanr(scores[rows], other[rows]).statistic)
    )
    wanted, found = rng.random((200, 4)) < 0.3, rng.random((200, 4)) < 0.4
    assert measures.macro_f_of_many(wanted, found)(rows) == pytest.approx(
        f1_score(wanted[rows], found[rows], average="macro")
    )


def test_measures_auroc_and_spearman_by_hand() -> None:
    auroc = measures.auroc(np.array([0.9, 0.8, 0.3]), np.array([True, False, True]))
    assert auroc(all_of(3)) == 0.5  # one of the two pairs is right
    assert auroc(np.array([0, 2])) == 0.5  # nothing to tell apart
    assert measures.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))(all_of(3)) == 0.5
    assert measures.spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0]))(all_of(2)) == 0.0


def test_measures_span_f1_by_hand() -> None:
    counts = np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert measures.span_f1(counts)(all_of(3)) == pytest.approx(2 * 2 / (3 + 4))
    assert measures.span_f1(counts)(np.array([2])) == 0.0


def test_measures_right_first_goes_round_by_round() -> None:
    anchors = np.eye(4, dtype=np.float32)
    positives = np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]  # the first two are swapped
    assert measures.right_first(anchors, positives, 4).tolist() == [0, 0, 1, 1]
    assert measures.right_first(anchors, positives, 3).tolist() == [0, 0, 1]  # the rest makes no round
    assert measures.right_first(anchors, positives, 100).tolist() == [0, 0, 1, 1]  # fewer than a round
    alone = measures.right_first(anchors, positives, 1).tolist()
    assert alone == [1, 1, 1, 1], "one candidate is always first"


def test_measures_nearest_in_pieces_is_nearest() -> None:
    rng = np.random.default_rng(0)
    vectors, known = rng.random((1100, 3), np.float32), rng.random((7, 3), np.float32)
    assert np.array_equal(measures.nearest(vectors, known), (vectors @ known.T).max(axis=1))


def test_measures_mean_and_median_by_hand() -> None:
    values = np.array([1.0, 5.0, 2.0, 0.0])
    assert measures.median_of(values)(all_of(3)) == 2.0
    assert measures.mean_of(values)(np.array([0, 1, 1, 3])) == 11 / 4
