"""How good a head is: the numbers scikit-learn gives, or those of a pencil."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score

from annotators.annotator import Label
from annotators.report import Spans, auroc, classification, expected_calibration_error, spans


def answer(label: str, score: float, accepted: bool) -> tuple[Label, ...]:
    """The best label, and one that must not be looked at."""
    return Label(label, score, accepted, 0.0, 0.5), Label("never", 0.0, True, 0.0, 0.0)


ANSWERS = (
    answer("a", 1.0, True),
    answer("a", 0.75, True),
    answer("b", 0.75, True),
    answer("c", 0.5, False),
    answer("b", 0.25, False),
)
GOLD = ("a", "b", "b", "a", "b")


def test_report_classification_equals_scikit_learn() -> None:
    found = [labels[0].label for labels in ANSWERS]
    report = classification(ANSWERS, GOLD)
    assert report["accuracy"] == accuracy_score(GOLD, found) == 0.6
    assert report["macro_f1"] == pytest.approx(
        np.mean([f1_score([g == label for g in GOLD], [f == label for f in found]) for label in "ab"])
    )
    assert report["phrases"] == 5.0


def test_report_classification_counts_what_is_accepted() -> None:
    report = classification(ANSWERS, GOLD)
    right = [labels[0].label == gold for labels, gold in zip(ANSWERS, GOLD, strict=True)]
    accepted = [labels[0].accepted for labels in ANSWERS]
    assert report["coverage"] == 0.6
    assert report["accepted_precision"] == pytest.approx(precision_score(right, accepted))


def test_report_classification_of_a_head_that_always_abstains() -> None:
    report = classification([answer("a", 0.2, False)] * 2, ["a", "b"])
    assert (report["coverage"], report["accepted_precision"]) == (0.0, 0.0)


def test_report_classification_measures_the_calibration_of_the_best_label() -> None:
    scores, right = np.array([1, 0.75, 0.75, 0.5, 0.25]), np.array([1, 0, 1, 0, 1], np.bool_)
    assert classification(ANSWERS, GOLD)["ece"] == expected_calibration_error(scores, right)


@pytest.mark.parametrize(
    ("scores", "right", "bins", "error"),
    [
        pytest.param([1.0, 1.0], [True, True], 1, 0.0, id="sure and right"),
        pytest.param([1.0, 1.0], [False, False], 1, 1.0, id="sure and wrong"),
        pytest.param([0.5, 0.5], [True, False], 1, 0.0, id="half and half"),
        pytest.param([0.5, 0.5], [True, False], 2, 0.5, id="half and half, each in a bin"),
        pytest.param(
            [0.9, 0.2, 0.8, 0.1], [True, False, False, True], 2, 0.35, id="two bins, sorted by score"
        ),
        pytest.param([0.25, 0.75, 1.0], [False, True, True], 2, (2 * 0 + 0) / 3, id="bins of two and one"),
        pytest.param(
            [0.25, 0.5, 1.0], [False, True, True], 2, 2 * 0.125 / 3, id="bins weigh by their phrases"
        ),
        pytest.param([0.75], [True], 10, 0.25, id="fewer phrases than bins"),
    ],
)
def test_report_calibration_error_by_hand(
    scores: list[float], right: list[bool], bins: int, error: float
) -> None:
    assert expected_calibration_error(np.array(scores), np.array(right), bins) == pytest.approx(error)


@pytest.mark.parametrize(
    ("scores", "area"),
    [
        ([0.9, 0.8, 0.2, 0.1], 1.0),
        ([0.1, 0.2, 0.8, 0.9], 0.0),
        ([0.9, 0.3, 0.5, 0.1], 0.75),
        ([0.5] * 4, 0.5),
    ],
)
def test_report_auroc_is_the_share_of_pairs_in_order(scores: list[float], area: float) -> None:
    assert auroc(np.array(scores), np.array([True, True, False, False])) == area


@pytest.mark.parametrize(
    ("found", "gold", "precision", "recall", "f1"),
    [
        pytest.param([{("time", 0, 3)}], [{("time", 0, 3)}], 1.0, 1.0, 1.0, id="exact"),
        pytest.param([{("time", 0, 3)}], [{("time", 0, 4)}], 0.0, 0.0, 0.0, id="another border"),
        pytest.param([{("time", 0, 3)}], [{("who", 0, 3)}], 0.0, 0.0, 0.0, id="another label"),
        pytest.param([{("a", 0, 1)}, {("a", 0, 1)}], [{("a", 0, 1)}, set()], 0.5, 1.0, 2 / 3, id="one too many"),
        pytest.param([set()], [{("a", 0, 1)}], 0.0, 0.0, 0.0, id="nothing found"),
        pytest.param([set()], [set()], 0.0, 0.0, 0.0, id="nothing to find"),
        pytest.param([{("a", 0, 1)}, set()], [set(), {("a", 0, 1)}], 0.0, 0.0, 0.0, id="in another phrase"),
        pytest.param(
            [{("a", 0, 1), ("b", 2, 3)}, {("a", 5, 6)}],
            [{("a", 0, 1), ("b", 2, 4), ("b", 7, 8)}, {("a", 5, 6)}],
            2 / 3, 0.5, 4 / 7, id="micro, over all phrases",
        ),
    ],
)  # fmt: skip
def test_report_spans_by_hand(
    found: list[Spans], gold: list[Spans], precision: float, recall: float, f1: float
) -> None:
    assert spans(found, gold) == pytest.approx(
        {"precision": precision, "recall": recall, "span_f1": f1, "phrases": len(gold)}
    )
