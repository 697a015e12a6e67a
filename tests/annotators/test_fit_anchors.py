"""Heads of reference phrases: the phrases are kept, what their cosines mean is learnt by leaving each of them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from annotators import calibration, thresholds
from annotators.anchors import AnchorsHead
from annotators.annotator import Heard
from annotators.answers import Answers
from annotators.fit_anchors import make_anchors
from annotators.golden import GOLDEN
from annotators.head import HeadInvalid
from tests.annotators.clouds import ABOUT, LABELS, Said, accepted, best, cloud, files, reloaded, strangers
from tests.annotators.toys import encoded, make_spec


def head_of(said: Said) -> AnchorsHead:
    return make_anchors(ABOUT, said.texts, said.vectors, said.answers)


def at_angles(*angles: float) -> NDArray[np.float32]:
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_fit_anchors_are_the_phrases_by_label() -> None:
    said = cloud(0.15, per_label=2)
    head = head_of(said)
    order = sorted(range(6), key=said.firsts.__getitem__)
    assert head.owner.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(head.anchors, said.vectors[order])
    assert head.spec == make_spec(
        LABELS,
        kind="anchors",
        made_by="tests",
        scale=head.spec.scale,
        shift=head.spec.shift,
        thresholds=head.spec.thresholds,
        golden=head.spec.golden,
        prior=head.spec.prior,
    )


def test_fit_anchors_answer_phrases_near_them() -> None:
    unseen = cloud(0.15, seed=1)
    assert best(head_of(cloud(0.15, per_label=3)), unseen.vectors) == unseen.firsts


def test_fit_anchors_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    said = cloud(0.15)
    head = reloaded(head_of(said), tmp_path)
    rows = [said.texts.index(golden.text) for golden in head.spec.golden]
    assert len(rows) == GOLDEN
    labels = [golden.label for golden in head.spec.golden]
    assert best(head, said.vectors[rows]) == labels == [said.firsts[i] for i in rows]


def left_out() -> tuple[NDArray[np.float32], list[str], NDArray[np.float32], NDArray[np.bool_]]:
    """Anchors and their labels, one phrase of the music among the others'; each one's cosine to its nearest neighbour, and
    whether that is its label's."""
    vectors, labels = at_angles(0, 10, 20, 90, 100, 12), ["light"] * 3 + ["music"] * 3
    cosines = np.cos(np.radians([10, 2, 8, 10, 10, 2])).astype(np.float32)
    return vectors, labels, cosines, np.array([True, False, False, True, True, False])


def test_fit_anchors_calibrate_by_leaving_each_out() -> None:
    vectors, labels, raw, hits = left_out()
    outsiders = -vectors[:1].repeat(40, axis=0)  # far away, so that nearer is better after all
    far = np.full(40, (-vectors[:1] @ vectors.T).max(), np.float32)
    raw, hits = np.concatenate([raw, far]), np.concatenate([hits, np.zeros(40, np.bool_)])
    scale, shift = calibration.fit_platt(raw, hits)
    head = make_anchors(ABOUT, list("abcdef"), vectors, Answers.one(labels), outsiders=outsiders, beta=0.5)
    assert scale > 0
    assert (head.spec.scale[0], head.spec.shift[0]) == pytest.approx((scale, shift), rel=1e-3)
    chances = calibration.logistic(raw, scale, shift)
    assert head.spec.thresholds == pytest.approx(
        (min(0.5, thresholds.best(chances, hits, 6.0, 0.5)),) * 2, abs=1e-3
    )


def test_fit_anchors_outsiders_keep_other_strangers_out() -> None:
    """The head that never met an outsider, the negative control, lets more of them in."""
    said, others = cloud(0.4), strangers(seed=3)

    def share(outsiders: NDArray[np.float32] | None) -> float:
        head = make_anchors(ABOUT, said.texts, said.vectors, said.answers, outsiders=outsiders)
        return float(np.mean([bool(labels) for labels in accepted(head, others)]))

    assert share(strangers()) < 0.5 * share(None)


def test_fit_anchors_threshold_is_one_for_all_and_never_above_one_half() -> None:
    for noise in (0.15, 0.4, 0.7):
        (threshold,) = set(head_of(cloud(noise)).spec.thresholds)
        assert 0 < threshold <= 0.5


@pytest.mark.parametrize(
    ("labels", "angles"),
    [
        pytest.param("abc", (0, 90, 180), id="one phrase a label"),
        pytest.param("aabb", (0, 5, 90, 95), id="never wrong"),
        pytest.param("aabb", (0, 80, 2, 170), id="always wrong"),
        pytest.param("aabbcc", (0, -60, 1, 62, 170, 230), id="wrong where it is nearest"),
    ],
)
def test_fit_anchors_without_evidence_keep_the_defaults(labels: str, angles: tuple[float, ...]) -> None:
    head = make_anchors(ABOUT, list(labels), at_angles(*angles), Answers.one(list(labels), at_least=1))
    assert set(head.spec.scale) == {20.0}
    assert set(head.spec.shift) == {-10.0}
    assert set(head.spec.thresholds) == {0.5}


@pytest.mark.parametrize("seed", range(6))
def test_fit_anchors_nearest_is_best_whatever_the_phrases(seed: int) -> None:
    """Fitted to noise, calibration would as soon rank the farthest label first (seeds 1, 2 and 4 do without the guard)."""
    vectors = np.random.default_rng(seed).standard_normal((6, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = list("aabbcc")
    assert best(make_anchors(ABOUT, list("123456"), vectors, Answers.one(labels)), vectors) == labels


def test_fit_anchors_patterns_are_kept_and_heard(tmp_path: Path) -> None:
    said = cloud(0.15, per_label=2)
    patterns = {"stop": (r"\bstop\b", r"\bстоп\b"), "light": ["ламп"]}
    made = make_anchors(ABOUT, said.texts, said.vectors, said.answers, patterns=patterns)
    head = reloaded(made, tmp_path)
    assert head.spec.params == {"patterns": {"stop": [r"\bstop\b", r"\bстоп\b"], "light": ["ламп"]}}
    of_music = encoded(said.vectors[said.firsts.index("music")])
    for phrase, label in (("ну стоп же", "stop"), ("лампа", "light"), ("unstoppable", "music")):
        first = head.annotate(Heard.alone(phrase, of_music)).labels[0]
        assert (first.label, first.accepted) == (label, True)


def test_fit_anchors_pattern_of_no_label_is_refused() -> None:
    said = cloud(0.15, per_label=2)
    with pytest.raises(
        HeadInvalid, match="found a pattern for label 'window', expected one of the head's labels"
    ):
        make_anchors(ABOUT, said.texts, said.vectors, said.answers, patterns={"window": ["x"]})


def test_fit_anchors_of_the_same_phrases_are_the_same_bytes(tmp_path: Path) -> None:
    """Other phrases, the negative control, are other anchors."""
    one, again, other = (
        files(head_of(cloud(0.4, seed=seed)), tmp_path / f"{i}") for i, seed in enumerate((5, 5, 6))
    )
    assert one == again
    assert one != other
