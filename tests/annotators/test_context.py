"""Heads that hear the turns before: where each turn lands, and the same word meaning two things after two questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotators.annotator import Annotation, HeardTurn, Status
from annotators.context import ContextHead, features
from annotators.head import HeadInvalid, write
from tests.annotators.toys import encoded, heard, make_spec

USER, ASSISTANT = HeardTurn("user", encoded([3, 4])), HeardTurn("assistant", encoded([5, 6]))
NONE = (0, 0)
SENTENCE = np.array([1, 2], np.float32)
ROOT = 2**0.5

LIGHT, MUSIC, YES = (1, 0, 0), (0, 1, 0), (0.6, 0.6, 0.5)


def yes_head(**fields: Any) -> ContextHead:
    """Reads only the product of what is said with the turn before: its first number speaks for light, its second for music."""
    weight = np.zeros((2, 4, 3), np.float32)
    weight[0, -1, 0] = weight[1, -1, 1] = 10
    spec = make_spec(("light", "music"), kind="context", params={"turns": 1}, **fields)
    return ContextHead(spec, weight.reshape(2, 12), np.zeros(2, np.float32), turns=1, version="v1")


@pytest.mark.parametrize(
    ("context", "turns", "blocks"),
    [
        pytest.param([], 1, [(1, 2), NONE, NONE, NONE], id="nothing before"),
        pytest.param([USER], 1, [(1, 2), (3, 4), NONE, (3 * ROOT, 8 * ROOT)], id="user"),
        pytest.param([ASSISTANT], 1, [(1, 2), NONE, (5, 6), (5 * ROOT, 12 * ROOT)], id="assistant"),
        pytest.param(
            [USER, ASSISTANT],
            2,
            [(1, 2), NONE, (5, 6), (3, 4), NONE, (5 * ROOT, 12 * ROOT)],
            id="user, assistant",
        ),
        pytest.param(
            [ASSISTANT, USER],
            2,
            [(1, 2), (3, 4), NONE, NONE, (5, 6), (3 * ROOT, 8 * ROOT)],
            id="assistant, user",
        ),
        pytest.param(
            [USER, USER, ASSISTANT],
            1,
            [(1, 2), NONE, (5, 6), (5 * ROOT, 12 * ROOT)],
            id="only the last of three",
        ),
    ],
)
def test_context_features_have_a_place_for_every_distance_and_role(
    context: Sequence[HeardTurn], turns: int, blocks: list[tuple[float, float]]
) -> None:
    np.testing.assert_allclose(features(SENTENCE, context, turns), np.ravel(blocks), rtol=1e-6)


def test_context_features_of_an_unknown_role_are_refused() -> None:
    with pytest.raises(ValueError):
        features(SENTENCE, [HeardTurn("robot", encoded([1, 2]))], 1)


def test_context_without_an_earlier_turn_is_skipped() -> None:
    assert yes_head().annotate(heard(YES)) == Annotation(
        "toy", "context", Status.SKIPPED, version="v1", note="needs an earlier turn; none was sent"
    )


def test_context_head_that_learnt_from_lone_turns_answers_them() -> None:
    """The bias alone speaks, because nothing was said before that the weights could read."""
    head = yes_head()
    spec = head.spec.model_copy(update={"params": {"turns": 1, "alone": True}})
    alone = ContextHead(spec, head.weight, np.array([0, 1], np.float32), turns=1, version="v1")
    annotation = alone.annotate(heard(YES))
    assert (annotation.status, annotation.labels[0].label, annotation.note) == (Status.OK, "music", "")
    assert annotation.labels[0].score == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-5)


def test_context_labels_on_their_own_are_scored_one_by_one() -> None:
    head = yes_head(exclusive=False)
    found = head.annotate(heard(YES, context=[HeardTurn("assistant", encoded(LIGHT))])).labels
    raw = 10 * 0.6 * 3**0.5
    assert [(label.label, label.accepted) for label in found] == [("light", True), ("music", True)]
    assert [label.score for label in found] == pytest.approx([1 / (1 + np.exp(-raw)), 0.5], rel=1e-5)


@pytest.mark.parametrize(("before", "meant"), [(LIGHT, "light"), (MUSIC, "music")])
def test_context_decides_what_yes_means(before: tuple[float, ...], meant: str) -> None:
    annotation = yes_head().annotate(heard(YES, context=[HeardTurn("assistant", encoded(before))]))
    assert annotation.status is Status.OK
    assert annotation.labels[0].label == meant


def test_context_scores_are_the_calibrated_softmax() -> None:
    head = yes_head(scale=(0.5, 0.25), shift=(0.0, 1.0), thresholds=(0.9, 0.1))
    annotation = head.annotate(heard(YES, context=[HeardTurn("assistant", encoded(LIGHT))]))
    raw = 10 * 0.6 * 3**0.5  # music: 0
    light = 1 / (1 + np.exp(1.0 - 0.5 * raw))
    first, second = annotation.labels
    assert (first.label, first.accepted, first.threshold) == ("light", True, 0.9)
    assert (first.score, first.raw_score) == pytest.approx((light, raw), rel=1e-5)
    assert (second.label, second.accepted, second.raw_score) == ("music", False, 0.0)
    assert second.score == pytest.approx(1 - light, rel=1e-4)
    assert annotation.version == "v1"


def test_context_reads_the_heaviest_hypothesis() -> None:
    before = [HeardTurn("assistant", encoded(LIGHT))]
    both = yes_head().annotate(heard(MUSIC, YES, weights=(0.25, 0.75), context=before))
    assert both == yes_head().annotate(heard(YES, context=before))
    assert both != yes_head().annotate(heard(MUSIC, context=before))


def test_context_comes_back_as_saved(tmp_path: Path) -> None:
    yes_head().save(tmp_path)
    loaded = ContextHead.load(tmp_path)
    assert (loaded.spec, loaded.turns, loaded.dim) == (yes_head().spec, 1, 3)
    turn = heard(YES, context=[HeardTurn("assistant", encoded(MUSIC))])
    assert loaded.annotate(turn).labels == yes_head().annotate(turn).labels


@pytest.mark.parametrize("turns", [None, 0, 17, 1.5, "2"])
def test_context_impossible_turns_are_refused(tmp_path: Path, turns: object) -> None:
    write(
        tmp_path,
        make_spec(kind="context", params={"turns": turns}),
        {"weight": np.zeros((3, 8)), "bias": np.zeros(3)},
    )
    with pytest.raises(HeadInvalid, match="found params.turns = .*, expected a whole number from 1 to 16"):
        ContextHead.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param(
            (3, 50), "found weights 50 wide, expected a multiple of 6 for 2 turns", id="half a vector"
        ),
        pytest.param((2, 48), "found tensor 'weight' of shape 2x48, expected 3xany", id="a label short"),
    ],
)
def test_context_weights_that_fit_no_vector_are_refused(
    tmp_path: Path, shape: tuple[int, int], message: str
) -> None:
    write(
        tmp_path,
        make_spec(kind="context", params={"turns": 2}),
        {"weight": np.zeros(shape), "bias": np.zeros(3)},
    )
    with pytest.raises(HeadInvalid, match=message):
        ContextHead.load(tmp_path)


def test_context_weights_that_fit_are_accepted(tmp_path: Path) -> None:
    write(
        tmp_path,
        make_spec(kind="context", params={"turns": 2}),
        {"weight": np.zeros((3, 48)), "bias": np.zeros(3)},
    )
    assert ContextHead.load(tmp_path).dim == 8
