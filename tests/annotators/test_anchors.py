"""Heads made of reference phrases: the nearest anchor of a label speaks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from annotators.anchors import AnchorsHead
from annotators.annotator import Annotation, Heard, Status
from annotators.head import WEIGHTS_FILE, HeadInvalid, write, write_spec
from tests.annotators.toys import encoded, heard, make_spec, random_units

ANCHORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)  # the first two are greetings
SPEC = make_spec(("greeting", "music"), kind="anchors", scale=(20.0,) * 2, shift=(-10.0,) * 2)


def toy(version: str = "v1") -> AnchorsHead:
    return AnchorsHead(SPEC, ANCHORS, np.array([0, 0, 1]), version)


def logistic(cosine: float) -> float:
    return float(1 / (1 + np.exp(10 - 20 * cosine)))


@pytest.mark.parametrize(
    ("said", "cosines"),
    [
        ((0.6, 0.0, 0.8), {"music": 0.8, "greeting": 0.6}),
        ((0.6, 0.8, 0.0), {"greeting": 0.8, "music": 0.0}),
        ((0.0, 1.0, 0.0), {"greeting": 1.0, "music": 0.0}),
    ],
)
def test_anchors_label_scores_as_its_nearest_anchor(
    said: tuple[float, ...], cosines: dict[str, float]
) -> None:
    labels = toy().annotate(heard(said)).labels
    assert [label.label for label in labels] == list(cosines)
    assert [label.raw_score for label in labels] == pytest.approx(list(cosines.values()), abs=1e-6)
    assert [label.score for label in labels] == pytest.approx(
        [logistic(c) for c in cosines.values()], rel=1e-5
    )


@pytest.mark.parametrize(("cosine", "accepted"), [(0.51, True), (0.5, True), (0.49, False)])
def test_anchors_accept_from_the_threshold_on(cosine: float, accepted: bool) -> None:
    assert toy().annotate(heard((0.0, 0.0, cosine))).labels[0].accepted is accepted


def test_anchors_equal_a_twin_that_looks_at_every_anchor() -> None:
    anchors, said = random_units(12, seed=1), random_units(1, seed=2)[0]
    owner = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3])
    spec = make_spec(("a", "b", "c", "d"), kind="anchors", exclusive=False, thresholds=(0.0,) * 4)
    labels = AnchorsHead(spec, anchors, owner).annotate(heard(said)).labels
    twin = {
        name: max(float(said @ anchor) for anchor, of in zip(anchors, owner, strict=True) if of == i)
        for i, name in enumerate("abcd")
    }
    assert [label.label for label in labels] == sorted(twin, key=lambda name: -twin[name])
    assert {label.label: label.raw_score for label in labels} == pytest.approx(twin, abs=1e-6)


def test_anchors_of_many_rows_score_as_each_alone() -> None:
    head, said = toy(), random_units(5, 3, seed=3)
    raw, scores = head.scored(said, ["a phrase"] * 5)
    assert raw.shape == scores.shape == (5, 2)
    np.testing.assert_array_equal(raw, head.raw(said))
    for row in range(5):
        labels = {label.label: label for label in head.annotate(heard(said[row])).labels}
        for i, name in enumerate(SPEC.labels):
            assert (labels[name].raw_score, labels[name].score) == pytest.approx(
                (raw[row, i], scores[row, i]), abs=1e-6
            )


def sure(patterns: Any) -> AnchorsHead:
    return AnchorsHead(
        SPEC.model_copy(update={"params": {"patterns": patterns}}), ANCHORS, np.array([0, 0, 1])
    )


@pytest.mark.parametrize(
    ("phrase", "label", "score"),
    [
        pytest.param("включи музыку", "music", 1.0, id="found"),
        pytest.param("turn the MUSIC on", "music", 1.0, id="another of the label's"),
        pytest.param("hello there", "greeting", logistic(0.8), id="not found"),
    ],
)
def test_anchors_pattern_makes_its_label_sure(phrase: str, label: str, score: float) -> None:
    """The vector says greeting whatever is said."""
    head = sure({"music": ["музык", "(?i)music"]})
    first = head.annotate(Heard.alone(phrase, encoded((0.8, 0.0, 0.1)))).labels[0]
    assert (first.label, first.accepted) == (label, True)
    assert first.score == pytest.approx(score, rel=1e-5)


def test_anchors_pattern_leaves_the_cosine_as_it_is() -> None:
    said = encoded((0.8, 0.0, 0.1))
    first = sure({"music": ["music"]}).annotate(Heard.alone("music", said)).labels[0]
    assert first.raw_score == pytest.approx(0.1, abs=1e-6)


def test_anchors_patterns_are_of_the_heaviest_hypothesis() -> None:
    both = Heard(("music", "hello"), (encoded((1, 0, 0)),) * 2, (0.4, 0.6), 1)
    assert sure({"music": ["music"]}).annotate(both).labels[0].label == "greeting"
    assert sure({"music": ["hello"]}).annotate(both).labels[0].label == "music"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        pytest.param({"music": ["(:"]}, r"found pattern '\(:': .*, expected a regular expression; mend it", id="no pattern"),
        pytest.param({"music": [7]}, "found pattern 7: .*, expected a regular expression; mend it", id="a number"),
        pytest.param({"noise": ["x"]}, "found a pattern for label 'noise', expected one of the head's labels", id="unknown label"),
        pytest.param({"music": "music"}, "found params.patterns = .*, expected lists of patterns by label", id="a word for a list"),
        pytest.param(["music"], r"found params.patterns = \['music'\], expected lists of patterns by label", id="no labels"),
    ],
)  # fmt: skip
def test_anchors_patterns_that_make_no_sense_are_refused(tmp_path: Path, patterns: Any, message: str) -> None:
    toy().save(tmp_path)
    write_spec(tmp_path, SPEC.model_copy(update={"params": {"patterns": patterns}}))
    with pytest.raises(HeadInvalid, match=message):
        AnchorsHead.load(tmp_path)


def test_anchors_average_the_hypotheses_cosines_by_weight() -> None:
    annotation = toy().annotate(heard((1, 0, 0), (0, 0.6, 0.8), weights=(0.75, 0.25)))
    greeting, music = annotation.labels
    assert (greeting.label, music.label) == ("greeting", "music")
    assert (greeting.raw_score, music.raw_score) == pytest.approx(
        (0.75 * 1 + 0.25 * 0.6, 0.25 * 0.8), abs=1e-6
    )
    assert greeting.score == pytest.approx(logistic(0.9), rel=1e-5)


def test_anchors_far_from_everything_score_zero_without_a_warning() -> None:
    spec = make_spec(("a",), kind="anchors", scale=(400.0,), shift=(-200.0,))
    annotation = AnchorsHead(spec, np.array([[1, 0]], np.float32), np.array([0])).annotate(heard((-1, 0)))
    assert annotation.labels[0].score == 0.0


def test_anchors_say_who_answered() -> None:
    annotation = toy().annotate(heard((1, 0, 0)))
    assert annotation == Annotation("toy", "anchors", Status.OK, labels=annotation.labels, version="v1")


def test_anchors_come_back_as_saved(tmp_path: Path) -> None:
    toy().save(tmp_path)
    loaded = AnchorsHead.load(tmp_path)
    assert (loaded.spec, loaded.owner.tolist(), loaded.dim) == (SPEC, [0, 0, 1], 3)
    turn = heard((0.6, 0.0, 0.8))
    assert loaded.annotate(turn).labels == toy().annotate(turn).labels


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param([0, 0, 0], id="a label without anchors"),
        pytest.param([1, 0, 1], id="out of order"),
        pytest.param([0, 1, 2], id="a label too many"),
        pytest.param([1, 1, 2], id="counted from one"),
        pytest.param([-1, 0, 0], id="negative"),
    ],
)
def test_anchors_with_impossible_owners_are_refused(owner: list[int]) -> None:
    """Negative control: [0, 0, 1] is accepted throughout these tests."""
    with pytest.raises(HeadInvalid, match="expected one anchor or more for every label"):
        AnchorsHead(SPEC, ANCHORS, np.array(owner))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param({"anchors": np.zeros((3, 2)), "owner": np.zeros(2)}, "'owner' of shape 2, expected 3", id="owners"),
        pytest.param({"anchors": np.zeros(3), "owner": np.zeros(3)}, "'anchors' of shape 3, expected anyxany", id="flat"),
        pytest.param({"anchors": np.array(1.0), "owner": np.zeros(1)}, "'anchors' of shape , expected anyxany", id="one number"),
        pytest.param({"anchors": np.full((3, 2), np.nan), "owner": np.zeros(3)}, "found NaN or infinite values in tensor 'anchors'", id="NaN"),
        pytest.param({"owner": np.zeros(3)}, "found tensors owner, expected anchors, owner", id="no anchors"),
    ],
)  # fmt: skip
def test_anchors_other_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, NDArray[np.float64]], message: str
) -> None:
    write(tmp_path, SPEC, {})
    (tmp_path / WEIGHTS_FILE).write_bytes(save(tensors))
    with pytest.raises(HeadInvalid, match=message):
        AnchorsHead.load(tmp_path)
