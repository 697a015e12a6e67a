"""Sentence heads: what is stored comes back, raw numbers become ranked, accepted labels, and strangers are turned away."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.special import expit, logsumexp, softmax

from annotators.annotator import Label, Status
from annotators.head import HeadInvalid, write
from annotators.outside import CENTROIDS, Outside
from annotators.sentence import Hidden, SentenceHead, linked, ranking
from tests.annotators.toys import BLEND, ENERGY, heard, make_spec, random_head, random_units


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


def halved(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array.astype(np.float16).astype(np.float32)


def test_sentence_hidden_layer_and_centroids_come_back_as_saved(tmp_path: Path) -> None:
    head = random_head("toy", 3, dim=4, units=6, outside=BLEND)
    head.save(tmp_path)
    loaded = SentenceHead.load(tmp_path)
    assert (loaded.spec, loaded.dim, loaded.weight.shape) == (head.spec, 4, (3, 6))
    assert head.hidden is not None and loaded.hidden is not None
    assert head.centroids is not None and loaded.centroids is not None
    np.testing.assert_array_equal(loaded.hidden.weight, halved(head.hidden.weight))
    np.testing.assert_array_equal(loaded.hidden.bias, head.hidden.bias)
    np.testing.assert_array_equal(loaded.centroids, halved(head.centroids))


def test_sentence_hidden_units_are_rectified() -> None:
    hidden = Hidden(np.array([[1, 0], [-1, 0], [0, 2]], np.float32), np.array([0, 0, -1], np.float32))
    weight = np.array([[1, 10, 100], [-1, 0, 0]], np.float32)
    head = SentenceHead(make_spec("ab"), weight, np.array([0.5, 0], np.float32), hidden=hidden)
    said = np.array([[2, 0], [-3, 0], [0, 1], [0, 0.25]], np.float32)
    assert head.raw(said).tolist() == [[2.5, -2], [30.5, 0], [100.5, 0], [0.5, 0]]


HIDDEN = {"hidden_weight": np.zeros((6, 4)), "hidden_bias": np.zeros(6)}
NARROW = {"weight": np.zeros((3, 6)), "bias": np.zeros(3)} | HIDDEN  # a good head with a hidden layer
PLAIN = {"weight": np.zeros((3, 4)), "bias": np.zeros(3)}  # and one without
CENTRES = {CENTROIDS: np.zeros((3, 4))}


@pytest.mark.parametrize(
    ("outside", "tensors"),
    [(None, PLAIN), (None, NARROW), (ENERGY, PLAIN), (BLEND, PLAIN | CENTRES), (BLEND, NARROW | CENTRES)],
)
def test_sentence_tensors_that_agree_are_accepted(
    tmp_path: Path, outside: Outside | None, tensors: dict[str, NDArray[np.float64]]
) -> None:
    write(tmp_path, make_spec(outside=outside), tensors)
    assert SentenceHead.load(tmp_path).dim == 4


@pytest.mark.parametrize(
    ("outside", "tensors", "message"),
    [
        pytest.param(None, PLAIN | {"weight": np.zeros((2, 4))}, "tensor 'weight' of shape 2x4, expected 3xany", id="fewer weights"),
        pytest.param(None, PLAIN | {"bias": np.zeros(2)}, "tensor 'bias' of shape 2, expected 3", id="fewer biases"),
        pytest.param(None, PLAIN | {"weight": np.zeros(3)}, "tensor 'weight' of shape 3, expected 3xany", id="flat weights"),
        pytest.param(None, PLAIN | {"weight": np.array(1.0)}, "tensor 'weight' of shape 1, expected 3xany", id="one weight"),
        pytest.param(None, PLAIN | {"weight": np.full((3, 4), np.nan)}, "NaN or infinite values in tensor 'weight', expected finite", id="NaN"),
        pytest.param(None, {"weight": np.zeros((3, 4))}, "tensors weight, expected bias, weight", id="no bias"),
        pytest.param(None, {}, "tensors none, expected bias, weight", id="nothing"),
        pytest.param(None, PLAIN | {"extra": np.zeros(1)}, "tensors bias, extra, weight, expected bias, weight", id="a tensor too many"),
        pytest.param(None, PLAIN | CENTRES, "tensors bias, centroids, weight, expected bias, weight", id="centroids nobody goes by"),
        pytest.param(ENERGY, PLAIN | CENTRES, "tensors bias, centroids, weight, expected bias, weight", id="nor does the energy"),
        pytest.param(BLEND, PLAIN, "tensors bias, weight, expected bias, centroids, weight", id="no centroids"),
        pytest.param(BLEND, PLAIN | {CENTROIDS: np.zeros((3, 5))}, "tensor 'centroids' of shape 3x5, expected 3x4", id="wider centroids"),
        pytest.param(BLEND, PLAIN | {CENTROIDS: np.zeros((2, 4))}, "tensor 'centroids' of shape 2x4, expected 3x4", id="fewer centroids"),
        pytest.param(BLEND, NARROW | {CENTROIDS: np.zeros((3, 6))}, "tensor 'centroids' of shape 3x6, expected 3x4", id="centroids of units"),
        pytest.param(BLEND, PLAIN | {CENTROIDS: np.full((3, 4), np.inf)}, "NaN or infinite values in tensor 'centroids'", id="infinite"),
        pytest.param(None, NARROW | {"weight": np.zeros((3, 5))}, "tensor 'hidden_weight' of shape 6x4, expected 5xany", id="other units"),
        pytest.param(None, NARROW | {"hidden_bias": np.zeros(5)}, "tensor 'hidden_bias' of shape 5, expected 6", id="fewer hidden biases"),
        pytest.param(None, NARROW | {"hidden_weight": np.zeros(6)}, "tensor 'hidden_weight' of shape 6, expected 6xany", id="flat hidden"),
        pytest.param(
            None, PLAIN | {"hidden_bias": np.zeros(4)}, "tensors bias, hidden_bias, weight, expected bias, hidden_bias, hidden_weight, weight",
            id="half a layer",
        ),
    ],
)  # fmt: skip
def test_sentence_other_tensors_are_refused(
    tmp_path: Path, outside: Outside | None, tensors: dict[str, NDArray[np.float64]], message: str
) -> None:
    write(tmp_path, make_spec(outside=outside), tensors)
    with pytest.raises(HeadInvalid, match=f"^head toy: found {re.escape(message)}"):
        SentenceHead.load(tmp_path)


def test_sentence_labels_on_their_own_have_no_score_of_being_outside() -> None:
    with pytest.raises(
        ValidationError, match="outside is for labels that exclude each other; others reject by"
    ):
        make_spec(exclusive=False, outside=ENERGY)


def outside_twin(head: SentenceHead, said: NDArray[np.float32]) -> NDArray[np.float64]:
    """[rows], from the definitions, in float64."""
    features, vectors = said.astype(np.float64), said.astype(np.float64)
    if head.hidden is not None:
        features = np.maximum(vectors @ head.hidden.weight.T + head.hidden.bias, 0)
    logits = (features @ head.weight.T + head.bias) * head.spec.scale + head.spec.shift
    centroids = np.zeros_like(head.weight) if head.centroids is None else head.centroids
    nearest = (vectors @ centroids.T).max(axis=1) if head.centroids is not None else np.zeros(len(said))
    outside = head.spec.outside
    assert outside is not None
    known = outside.max_logit * logits.max(axis=1) + outside.energy * logsumexp(logits, axis=1)
    margins: NDArray[np.float64] = expit(outside.shift - known - outside.centroid * nearest)
    return margins


@pytest.mark.parametrize("outside", [BLEND, ENERGY], ids=["blend", "energy"])
@pytest.mark.parametrize("units", [0, 6], ids=["linear", "hidden"])
def test_sentence_out_of_scope_is_mixed_over_the_hypotheses(units: int, outside: Outside) -> None:
    head, said = random_head("toy", 5, units=units, outside=outside), random_units(3)
    weights = (0.5, 0.3, 0.2)
    found = head.annotate(heard(*said, weights=weights))
    assert found.out_of_scope == pytest.approx(float(np.array(weights) @ outside_twin(head, said)), abs=1e-5)
    assert (found.status, found.version) == (Status.OK, "v-toy-0")


def test_sentence_stranger_is_given_no_label() -> None:
    """The same head without the score, the negative control, accepts."""
    head = random_head("toy", 3)

    def first(shift: float | None) -> Label:
        outside = None if shift is None else Outside(method="none", shift=shift, threshold=0.5)
        spec = head.spec.model_copy(update={"thresholds": (0.0,) * 3, "outside": outside})
        return SentenceHead(spec, head.weight, head.bias).annotate(heard(random_units(1)[0])).labels[0]

    assert first(None).accepted
    assert first(-3.0) == first(None)
    assert first(3.0) == first(None)._replace(accepted=False)


@pytest.mark.parametrize(
    ("stranger", "accepted"),
    [(None, True), (0.0, True), (float(np.nextafter(0.4, 0.0)), True), (0.4, False), (1.0, False)],
)
def test_sentence_ranking_accepts_nothing_from_the_strangers_threshold_on(
    stranger: float | None, accepted: bool
) -> None:
    labels = ranking(make_spec("ab", outside=ENERGY), [0.9, 0.1], [0.0, 0.0], top=2, stranger=stranger)
    assert [label.accepted for label in labels] == [accepted, False]


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
def test_sentence_linked_scores_are_of_the_calibrated_logits(exclusive: bool) -> None:
    head, raw = random_head("toy", 4, exclusive=exclusive), 50 * random_units(6, 4)
    logits, scores = linked(head.spec, raw)
    expected = raw.astype(np.float64) * head.spec.scale + head.spec.shift
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores, softmax(expected, axis=1) if exclusive else expit(expected), atol=1e-5)


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
