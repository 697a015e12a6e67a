"""Linear heads: what is stored comes back, and raw numbers become ranked, accepted labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from annotators.annotator import Label
from annotators.head import HeadInvalid, write
from annotators.sentence import SentenceHead, ranking
from tests.annotators.toys import make_spec, random_head, random_units


def test_sentence_comes_back_as_saved(tmp_path: Path) -> None:
    head = random_head("toy", 3, dim=4)
    head.save(tmp_path)
    loaded = SentenceHead.load(tmp_path)
    assert loaded.spec == head.spec
    np.testing.assert_array_equal(loaded.weight, head.weight.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(loaded.bias, head.bias)
    assert loaded.weight.dtype == loaded.bias.dtype == np.float32
    assert loaded.dim == 4


def test_sentence_float16_moves_a_score_by_less_than_a_thousandth(tmp_path: Path) -> None:
    head, said = random_head("toy", 40, dim=384), random_units(200, 384)
    head.save(tmp_path)
    loaded = SentenceHead.load(tmp_path)

    def scores(weight: NDArray[np.float32]) -> NDArray[np.float64]:
        raw = (said @ weight.T + head.bias).astype(np.float64)
        return np.asarray(softmax(np.array(head.spec.scale) * raw + np.array(head.spec.shift), axis=1))

    moved = np.abs(scores(loaded.weight) - scores(head.weight)).max()
    assert 0 < moved < 1e-3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"weight": np.zeros((2, 4)), "bias": np.zeros(3)},
            "found tensor 'weight' of shape 2x4, expected 3xany",
        ),
        ({"weight": np.zeros((3, 4)), "bias": np.zeros(2)}, "found tensor 'bias' of shape 2, expected 3"),
        ({"weight": np.zeros(3), "bias": np.zeros(3)}, "found tensor 'weight' of shape 3, expected 3xany"),
        ({"weight": np.zeros((3, 4))}, "found tensors weight, expected bias, weight"),
        ({}, "found tensors none, expected bias, weight"),
        (
            {"weight": np.zeros((3, 4)), "bias": np.zeros(3), "extra": np.zeros(1)},
            "found tensors bias, extra, weight, expected bias, weight",
        ),
    ],
)
def test_sentence_other_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, NDArray[np.float64]], message: str
) -> None:
    write(tmp_path, make_spec(), tensors)
    with pytest.raises(HeadInvalid, match=message):
        SentenceHead.load(tmp_path)


def ranked(*scores: float, top: int = 5, exclusive: bool = True, threshold: float = 0.5) -> tuple[Label, ...]:
    """Labels a, b, c, ... of these scores; raw scores are ten times as high."""
    labels = "abcdefghij"[: len(scores)]
    spec = make_spec(tuple(labels), exclusive=exclusive, thresholds=(threshold,) * len(scores))
    return ranking(spec, scores, [10 * score for score in scores], top=top)


def test_sentence_ranking_is_best_first_with_all_a_label_carries() -> None:
    spec = make_spec(thresholds=(0.125, 0.25, 0.5))
    labels = ranking(spec, [0.25, 0.125, 0.625], [1.0, 2.0, 3.0], top=5)
    assert labels == (
        Label("c", 0.625, True, 3.0, 0.5),
        Label("a", 0.25, False, 1.0, 0.125),
        Label("b", 0.125, False, 2.0, 0.25),
    )


def test_sentence_ranking_keeps_the_heads_order_between_equal_scores() -> None:
    assert [label.label for label in ranked(0.2, 0.3, 0.2, 0.3)] == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("exclusive", "accepted"),
    [pytest.param(True, ["b"], id="exclusive"), pytest.param(False, ["b", "c", "a"], id="independent")],
)
def test_sentence_ranking_accepts_only_the_best_of_labels_that_exclude_each_other(
    exclusive: bool, accepted: list[str]
) -> None:
    labels = ranked(0.6, 0.9, 0.7, 0.1, exclusive=exclusive)
    assert [label.label for label in labels if label.accepted] == accepted


def test_sentence_ranking_does_not_pass_acceptance_on_to_the_second_best() -> None:
    spec = make_spec(("a", "b"), thresholds=(0.9, 0.1))
    labels = ranking(spec, [0.6, 0.4], [0.0, 0.0], top=2)
    assert [(label.label, label.accepted) for label in labels] == [("a", False), ("b", False)]


@pytest.mark.parametrize(("score", "accepted"), [(0.5, True), (float(np.nextafter(0.5, 0.0)), False)])
def test_sentence_ranking_accepts_from_the_threshold_on(score: float, accepted: bool) -> None:
    assert ranked(score)[0].accepted is accepted


@pytest.mark.parametrize(
    ("exclusive", "threshold", "shown"),
    [
        pytest.param(True, 0.0, "jih", id="exclusive"),
        pytest.param(False, 0.5, "jihgf", id="independent: all accepted"),
        pytest.param(False, 0.9, "jih", id="independent: few accepted"),
    ],
)
def test_sentence_ranking_shows_the_top_and_every_accepted_label(
    exclusive: bool, threshold: float, shown: str
) -> None:
    scores = [i / 10 for i in range(10)]
    labels = ranked(*scores, top=3, exclusive=exclusive, threshold=threshold)
    assert "".join(label.label for label in labels) == shown
