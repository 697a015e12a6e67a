"""Training heads on toy vectors: what can be learnt is learnt, strangers are kept out, and the same run gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from annotators import calibration, fit, thresholds
from annotators.annotator import Encoding, Heard, HeardTurn
from annotators.answers import Answers
from annotators.boosted import BoostedHead
from annotators.fit import Borrowed, Dev, Fitted, Plan
from annotators.golden import GOLDEN
from annotators.head import GoldenTurn
from annotators.learners import BoostedLearner, HiddenLearner, LinearLearner
from annotators.sentence import SentenceHead, linked
from annotators.table import Head
from tests.annotators.clouds import (
    ABOUT,
    CENTRES,
    DIM,
    LABELS,
    Said,
    accepted,
    answer,
    best,
    cloud,
    files,
    reloaded,
    strangers,
)
from tests.annotators.toys import FINGERPRINT, encoded, heard, random_units

USUAL = Plan()
FOUR = Plan(LinearLearner((4.0,)))  # no choice of strength
BENT = Plan(HiddenLearner(16, strengths=(1e3,)))
GROWN = Plan(BoostedLearner(strengths=(10,)))
SETS = [("light",), ("music",), ("light", "music"), ("stop",), ()]


def fitted(said: Said, plan: Plan = USUAL, **options: Any) -> Fitted[SentenceHead]:
    return fit.fit_sentence(ABOUT, said.texts, said.vectors, said.answers, plan=plan, **options)


def head_of(said: Said, plan: Plan = USUAL, **options: Any) -> SentenceHead:
    return fitted(said, plan, **options).head


def several(said: Said, plan: Plan = USUAL, **options: Any) -> Fitted[SentenceHead]:
    return fit.fit_sentence(ABOUT, said.texts, said.vectors, said.several, plan=plan, **options)


def grown(said: Said, plan: Plan = GROWN, **options: Any) -> Fitted[BoostedHead]:
    return fit.fit_boosted(ABOUT, said.texts, said.vectors, said.answers, plan=plan, **options)


def chances(head: SentenceHead, vectors: NDArray[np.float32]) -> Any:
    """Before calibration."""
    return softmax(head.raw(vectors), axis=1)


# Heads on the sentence vector.


@pytest.mark.parametrize(
    ("make", "per_label"),
    [
        pytest.param(lambda said: head_of(said), 12, id="linear"),
        pytest.param(lambda said: head_of(said, BENT), 200, id="hidden"),
        pytest.param(lambda said: grown(said).head, 40, id="boosted"),
    ],
)
def test_fit_learns_what_is_separable(make: Callable[[Said], Head], per_label: int) -> None:
    head, unseen = make(cloud(0.15, per_label=per_label)), cloud(0.15, seed=1)
    assert np.mean(np.array(best(head, unseen.vectors)) == unseen.firsts) >= 0.97
    assert np.mean([bool(labels) for labels in accepted(head, unseen.vectors)]) >= 0.9
    assert head.spec.metrics["folds_accuracy"] >= 0.97


def test_fit_sentence_records_what_it_is() -> None:
    spec = head_of(cloud(0.15), FOUR).spec
    assert (spec.name, spec.kind, spec.task, spec.made_by) == ("toy", "sentence", "test", "tests")
    assert spec.requires.vectorizer == FINGERPRINT
    assert (spec.labels, spec.exclusive, spec.outside) == (LABELS, True, None)
    assert (spec.metrics["phrases"], spec.metrics["regularisation"]) == (36.0, 4.0)


def test_fit_sentence_is_scikit_learns_regression() -> None:
    said = cloud(0.4)
    model = LogisticRegression(C=4.0).fit(said.vectors, said.firsts)
    np.testing.assert_allclose(
        chances(head_of(said, FOUR), said.vectors), model.predict_proba(said.vectors), atol=0.01
    )


def test_fit_sentence_of_two_labels_scores_as_scikit_learn_does() -> None:
    """scikit-learn keeps one row of weights for two labels, where the head has one for each, which are penalised apart."""
    said = cloud(0.4)
    two = ["stop" if label == "stop" else "go" for label in said.firsts]
    head = fit.fit_sentence(ABOUT, said.texts, said.vectors, Answers.one(two), plan=FOUR).head
    model = LogisticRegression(C=8.0).fit(said.vectors, two)
    assert head.spec.labels == tuple(model.classes_) == ("go", "stop")
    np.testing.assert_allclose(chances(head, said.vectors), model.predict_proba(said.vectors), atol=0.01)


@pytest.mark.parametrize("strengths", [(1e-4, 4.0), (4.0, 1e-4)])
def test_fit_keeps_the_strength_with_the_lowest_held_out_loss(strengths: tuple[float, float]) -> None:
    learnt = fitted(cloud(0.15), Plan(LinearLearner(strengths))).learnt
    assert learnt.strength == 4.0 == learnt.metrics["regularisation"]
    assert learnt.losses[4.0] < learnt.losses[1e-4]


def test_fit_asks_no_further_once_the_loss_rises() -> None:
    learnt = fitted(cloud(0.7), Plan(LinearLearner((1e-4, 0.3, 1e6, 1e7, 1e8)))).learnt
    assert 1e-4 in learnt.losses
    assert 1e8 not in learnt.losses


@pytest.mark.parametrize("large", [False, True], ids=["every fold chooses", "the first fold chooses"])
def test_fit_measures_on_phrases_the_model_did_not_see(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Labels of pure chance, in so many dimensions that every one can be learnt by heart."""
    if large:
        monkeypatch.setattr(fit, "_ALL_FOLDS_CHOOSE", 0)
    vectors, labels = random_units(60, 100), ["heads", "tails"] * 30
    plan = Plan(LinearLearner((1e2, 1e3)))
    learnt = fit.fit_sentence(ABOUT, labels, vectors, Answers.one(labels), plan=plan).learnt
    by_heart = learnt.model.raw(vectors).argmax(axis=1) == learnt.answers.codes
    assert by_heart.all()
    assert learnt.metrics["folds_accuracy"] < 0.7
    assert learnt.metrics["promised_recall"] < 0.8


def test_fit_calibrates_on_phrases_the_model_did_not_see() -> None:
    """The folds, dealt again and given to scikit-learn."""
    said = cloud(0.7, per_label=30)
    learnt = fitted(said, replace(FOUR, seed=3)).learnt
    raw = cross_val_predict(
        LogisticRegression(C=4.0), said.vectors, said.firsts, method="decision_function",
        cv=StratifiedKFold(fit.FOLDS, shuffle=True, random_state=3),
    ).astype(np.float32)  # fmt: skip
    targets = said.answers.codes
    assert learnt.scale == pytest.approx((calibration.fit_temperature(raw, targets),) * 3, rel=0.05)
    np.testing.assert_allclose(
        softmax(learnt.raw, axis=1), softmax(raw, axis=1), atol=0.05
    )  # a bias common to all labels is free
    assert learnt.metrics["folds_accuracy"] == pytest.approx((raw.argmax(axis=1) == targets).mean(), abs=0.03)
    assert learnt.thresholds == thresholds.fit_exclusive(learnt.scores, targets)


def test_fit_promises_the_recall_of_held_out_thresholds() -> None:
    learnt = fitted(cloud(0.7), replace(FOUR, seed=4, beta=1.0)).learnt
    codes = learnt.answers.codes
    expected = thresholds.promised_exclusive(learnt.scores, codes, beta=1.0, seed=4)
    np.testing.assert_array_equal(learnt.promised, expected)
    assert learnt.metrics["promised_recall"] == pytest.approx(expected @ np.bincount(codes) / len(codes))


def test_fit_balanced_weighs_rare_labels_up() -> None:
    """Against scikit-learn's own balance, and against no balance, the negative control."""
    said = cloud(0.4, per_label=40)
    kept = [i for i, label in enumerate(said.firsts) if label != "stop" or i % 8 == 0]
    few = Said([said.texts[i] for i in kept], said.vectors[kept], [said.labels[i] for i in kept])
    found, plain = (
        chances(head_of(few, replace(FOUR, balanced=balanced)), few.vectors) for balanced in (True, False)
    )
    model = LogisticRegression(C=4.0, class_weight="balanced").fit(few.vectors, few.firsts)
    np.testing.assert_allclose(found, model.predict_proba(few.vectors), atol=0.02)
    assert found[:, LABELS.index("stop")].mean() > 1.3 * plain[:, LABELS.index("stop")].mean()


# Strangers.


def test_fit_outsiders_raise_thresholds() -> None:
    closed, guarded = (head_of(cloud(0.15), FOUR, outsiders=given) for given in (None, strangers()))
    assert all(high > low for high, low in zip(guarded.spec.thresholds, closed.spec.thresholds, strict=True))


@pytest.mark.parametrize(
    ("make", "per_label"),
    [
        pytest.param(head_of, 12, id="linear"),
        pytest.param(lambda said, **options: head_of(said, replace(BENT, beta=1.0), **options), 60, id="hidden"),
        pytest.param(lambda said, **options: grown(said, replace(GROWN, beta=1.0), **options).head, 40, id="boosted"),
    ],
)  # fmt: skip
def test_fit_outsiders_keep_other_strangers_out(make: Callable[..., Head], per_label: int) -> None:
    """The head that never met an outsider, the negative control, accepts most of them."""
    said, others, known = cloud(0.15, per_label=per_label), strangers(seed=3), cloud(0.15, seed=1).vectors

    def share(head: Head, vectors: NDArray[np.float32]) -> float:
        return float(np.mean([bool(labels) for labels in accepted(head, vectors)]))

    guarded = make(said, outsiders=strangers())
    assert share(make(said), others) > 0.8
    assert share(guarded, others) < 0.5
    assert share(guarded, known) > 0.8


@pytest.mark.parametrize("outside", [False, True])
def test_fit_outsiders_are_not_trained_on(outside: bool) -> None:
    closed, guarded = (
        head_of(cloud(0.15), FOUR),
        head_of(cloud(0.15), FOUR, outsiders=strangers(), outside=outside),
    )
    np.testing.assert_array_equal(guarded.weight, closed.weight)
    np.testing.assert_array_equal(guarded.bias, closed.bias)


@pytest.mark.parametrize(("plan", "per_label"), [(Plan(), 12), (BENT, 200)], ids=["linear", "hidden"])
def test_fit_outside_is_a_score_of_its_own(tmp_path: Path, plan: Plan, per_label: int) -> None:
    made = head_of(cloud(0.15, per_label=per_label), plan, outsiders=strangers(), outside=True)
    head = reloaded(made, tmp_path)
    assert isinstance(head, SentenceHead)
    outside = head.spec.outside
    assert outside is not None
    assert (head.centroids is not None) == outside.needs_centroids
    for vectors, is_outside in ((strangers(seed=3), True), (cloud(0.15, seed=1).vectors, False)):
        scores = [answer(head, vector).out_of_scope for vector in vectors]
        assert (
            np.mean([score is not None and (score >= outside.threshold) == is_outside for score in scores])
            > 0.9
        )


def test_fit_outside_by_centroids_carries_the_mean_direction_of_each_label() -> None:
    """Some strangers are more of one label than any phrase is, and less of the others: no logit tells them apart."""
    said = cloud(0.05, per_label=20)
    beyond = CENTRES - (CENTRES[[1, 2, 0]] + CENTRES[[2, 0, 1]]) / 2
    beyond = np.repeat(beyond / np.linalg.norm(beyond, axis=1, keepdims=True), 20, axis=0)
    far = np.concatenate([beyond, strangers()]).astype(np.float32)
    head = head_of(said, FOUR, outsiders=far, outside=True)
    assert head.spec.outside is not None and head.spec.outside.needs_centroids
    assert head.centroids is not None
    for label, centroid in zip(LABELS, head.centroids, strict=True):
        mean = said.vectors[[name == label for name in said.firsts]].mean(axis=0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-6)


def test_fit_outside_refused_phrases_do_not_hold_thresholds_up() -> None:
    """Whoever is found out of scope is refused whatever the label's score, so the labels' thresholds need not do it too."""
    alone, with_score = (
        head_of(cloud(0.15), FOUR, outsiders=strangers(), outside=outside) for outside in (False, True)
    )
    assert sum(with_score.spec.thresholds) < sum(alone.spec.thresholds)


def test_fit_outside_without_outsiders_there_is_no_such_score() -> None:
    assert head_of(cloud(0.15), FOUR, outside=True).spec.outside is None


def test_fit_outside_share_is_what_is_expected() -> None:
    """The rarer strangers are expected to be, the less a phrase is taken for one."""
    said = cloud(0.4)
    rare, common = (
        fitted(said, replace(FOUR, outside_share=share), outsiders=strangers(), outside=True).learnt.outside
        for share in (0.01, 0.5)
    )
    assert rare is not None and common is not None
    assert rare.inside_scores.mean() < common.inside_scores.mean()


def test_fit_outside_of_labels_on_their_own_is_refused() -> None:
    with pytest.raises(ValidationError, match="outside is for labels that exclude each other"):
        several(cloud(0.15, labels=SETS), FOUR, outsiders=strangers(), outside=True)


# Rows of another origin.


def test_fit_borrowed_rows_are_trained_on_in_every_fold() -> None:
    said = cloud(0.15)
    elsewhere = -said.vectors[[label == "stop" for label in said.firsts]]
    for label in ("music", "light"):
        joint = head_of(said, borrowed=Borrowed(elsewhere, [label] * len(elsewhere)))
        assert best(joint, elsewhere) == [label] * len(elsewhere)
        assert best(joint, said.vectors) == said.firsts
        assert (joint.spec.metrics["phrases"], joint.spec.metrics["borrowed"]) == (36, 12)


def test_fit_borrowed_rows_are_never_measured_on() -> None:
    """Contradicting labels of borrowed rows cost accuracy on our own phrases, and that is what the folds report."""
    said = cloud(0.15)
    wrong = [LABELS[(LABELS.index(label) + 1) % len(LABELS)] for label in said.firsts] * 3
    joint = head_of(said, borrowed=Borrowed(np.tile(said.vectors, (3, 1)), wrong))
    assert head_of(said).spec.metrics["folds_accuracy"] == 1
    assert joint.spec.metrics["folds_accuracy"] == 0
    assert joint.spec.golden == ()


def test_fit_without_borrowed_rows_is_the_same_head(tmp_path: Path) -> None:
    none = Borrowed(np.zeros((0, DIM), np.float32), [])
    assert files(head_of(cloud(0.4), borrowed=none), tmp_path / "none") == files(
        head_of(cloud(0.4)), tmp_path / "alone"
    )


def test_fit_borrowed_rows_of_no_label_of_ours_are_refused() -> None:
    with pytest.raises(
        ValueError, match="found labels window, expected some of light, music, stop; map or drop"
    ):
        head_of(cloud(0.15), borrowed=Borrowed(random_units(1, DIM, seed=1), ["window"]))


def test_fit_dev_rows_are_judged_by_but_not_trained_on() -> None:
    """Dev phrases that are noisier than the others lower what the scores claim."""
    said, noisy = cloud(0.15), cloud(0.9, seed=1)
    alone, judged = fitted(said, FOUR), fitted(said, FOUR, dev=Dev(noisy.vectors, noisy.answers))
    np.testing.assert_array_equal(judged.head.weight, alone.head.weight)
    np.testing.assert_array_equal(judged.learnt.raw[:36], alone.learnt.raw)
    np.testing.assert_array_equal(judged.learnt.raw[36:], judged.head.raw(noisy.vectors))
    assert judged.learnt.answers.codes.tolist() == [*said.answers.codes, *noisy.answers.codes]
    assert judged.head.spec.scale[0] < alone.head.spec.scale[0]
    assert judged.head.spec.metrics["phrases"] == 72


def test_fit_dev_rows_count_for_being_outside_too() -> None:
    said, dev = cloud(0.15), cloud(0.3, seed=1)
    learnt = fitted(said, FOUR, outsiders=strangers(), outside=True, dev=Dev(dev.vectors, dev.answers)).learnt
    assert learnt.outside is not None
    assert (len(learnt.outside.inside_scores), len(learnt.outside.outside_scores)) == (72, 60)


# Labels on their own.


@pytest.mark.parametrize(("plan", "per_set"), [(Plan(), 12), (BENT, 150)], ids=["linear", "hidden"])
def test_fit_labels_on_their_own_are_told_apart(tmp_path: Path, plan: Plan, per_set: int) -> None:
    """Phrases of one label, of two, and of none; the answer is all of a phrase's labels."""
    head = reloaded(several(cloud(0.1, per_label=per_set, labels=SETS), plan).head, tmp_path)
    unseen = cloud(0.1, per_label=10, labels=SETS, seed=1)
    assert (head.spec.exclusive, head.spec.labels) == (False, LABELS)
    known = [i for i, labels in enumerate(unseen.labels) if labels]
    found = accepted(head, unseen.vectors[known])
    assert np.mean([labels == unseen.labels[i] for i, labels in zip(known, found, strict=True)]) > 0.85
    assert ("light", "music") in found


def test_fit_labels_on_their_own_are_scikit_learns_one_by_one() -> None:
    said = cloud(0.3, labels=SETS)
    head = several(said, FOUR).head
    for i, label in enumerate(LABELS):
        model = LogisticRegression(C=4.0).fit(said.vectors, [label in labels for labels in said.labels])
        np.testing.assert_allclose(
            expit(head.raw(said.vectors)[:, i]), model.predict_proba(said.vectors)[:, 1], atol=0.02
        )


def test_fit_labels_on_their_own_are_calibrated_one_by_one() -> None:
    learnt = several(cloud(0.4, labels=SETS), FOUR).learnt
    for i in range(len(LABELS)):
        expected = calibration.fit_platt(learnt.raw[:, i], learnt.answers.wanted[:, i])
        assert (learnt.scale[i], learnt.shift[i]) == pytest.approx(expected)
    assert learnt.thresholds == thresholds.fit_independent(learnt.scores, learnt.answers.wanted)
    np.testing.assert_array_equal(
        learnt.promised, thresholds.promised_independent(learnt.scores, learnt.answers.wanted)
    )


def test_fit_labels_on_their_own_keep_the_strength_with_the_lowest_held_out_loss() -> None:
    learnt = several(cloud(0.15, labels=SETS), Plan(LinearLearner((1e-4, 4.0)))).learnt
    assert learnt.strength == 4.0


def test_fit_a_single_label_on_its_own_is_a_head() -> None:
    said = cloud(0.15, labels=[("light",), ()])
    head = several(said, FOUR).head
    assert head.spec.labels == ("light",)
    assert accepted(head, CENTRES) == [("light",), (), ()]


# Golden phrases.


@pytest.mark.parametrize("noise", [0.15, 0.7], ids=["separable", "noisy"])
@pytest.mark.parametrize("make", [head_of, lambda said: grown(said).head], ids=["linear", "boosted"])
def test_fit_golden_phrases_are_answered_by_the_stored_head(
    tmp_path: Path, make: Callable[[Said], Head], noise: float
) -> None:
    said = cloud(noise)
    head = reloaded(make(said), tmp_path)
    golden = {said.texts.index(golden.text): golden.label for golden in head.spec.golden}
    assert best(head, said.vectors[list(golden)]) == list(golden.values())
    assert [said.firsts[i] for i in golden] == list(golden.values())
    assert sorted(golden.values()) == list(LABELS)  # one each


def test_fit_golden_phrases_of_several_labels_are_answered_with_one_of_them(tmp_path: Path) -> None:
    said = cloud(0.2, labels=SETS)
    head = reloaded(several(said).head, tmp_path)
    assert len(head.spec.golden) == 3
    for golden in head.spec.golden:
        i = said.texts.index(golden.text)
        assert best(head, said.vectors[[i]]) == [golden.label]
        assert golden.label in said.labels[i]


def test_fit_phrases_answered_by_chance_are_not_golden() -> None:
    said = cloud(0.15)
    nothing_to_learn = Said(said.texts, np.ones_like(said.vectors), said.labels)
    assert head_of(nothing_to_learn).spec.golden == ()


def test_fit_of_many_labels_keeps_golden_phrases_for_some() -> None:
    labels = [f"label {i:02}" for i in range(40) for _ in range(4)]
    vectors = np.repeat(np.eye(40, dtype=np.float32), 4, axis=0)
    plan = Plan(LinearLearner((64.0,)))
    head = fit.fit_sentence(ABOUT, labels, vectors, Answers.one(labels), plan=plan).head
    assert len({golden.label for golden in head.spec.golden}) == len(head.spec.golden) == GOLDEN


# Boosted trees.


def test_fit_boosted_is_lightgbm_under_the_calibration(tmp_path: Path) -> None:
    said = cloud(0.4, per_label=30)
    made = grown(said)
    head = reloaded(made.head, tmp_path)
    assert isinstance(head, BoostedHead)
    assert (head.spec.kind, head.spec.metrics["regularisation"]) == ("boosted", 10)
    np.testing.assert_allclose(head.raw(said.vectors), made.learnt.model.raw(said.vectors), atol=1e-4)
    found = {label.label: label.score for label in head.annotate(heard(said.vectors[0])).labels}
    expected = linked(made.head.spec, head.raw(said.vectors[:1]))[1][0].tolist()
    assert found == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-6)


def test_fit_boosted_grows_trees_unless_told() -> None:
    said = cloud(0.15)
    learnt = fit.fit_boosted(ABOUT, said.texts, said.vectors, said.answers).learnt
    assert learnt.strength in BoostedLearner().strengths


def test_fit_boosted_of_labels_on_their_own_is_refused() -> None:
    said = cloud(0.15, labels=SETS)
    with pytest.raises(
        ValueError, match="found several a phrase, expected one for boosted trees; train kind sentence"
    ):
        fit.fit_boosted(ABOUT, said.texts, said.vectors, said.several)


# Heads in context.

LIGHT, MUSIC = np.eye(2, DIM, dtype=np.float32)
YES = np.full(DIM, DIM**-0.5, np.float32)
Questions = tuple[list[str], list[Encoding], list[list[HeardTurn]], list[list[GoldenTurn]], Answers]


def questions() -> Questions:
    """The same "yes" after questions about the light and about music, the question in other words each time."""
    rng = np.random.default_rng(4)
    labels = ["light", "music"] * 9
    asked = [
        (LIGHT if label == "light" else MUSIC) + rng.normal(0, 0.1, DIM).astype(np.float32)
        for label in labels
    ]
    return (
        [f"yes {i}" for i in range(18)],
        [encoded(YES)] * 18,
        [[HeardTurn("assistant", encoded(vector))] for vector in asked],
        [[GoldenTurn(role="assistant", text=f"shall i {i}")] for i in range(18)],
        Answers.one(labels),
    )


@pytest.mark.parametrize(("asked", "meant"), [(LIGHT, "light"), (MUSIC, "music")], ids=["light", "music"])
def test_fit_context_learns_that_yes_depends_on_the_question(asked: NDArray[np.float32], meant: str) -> None:
    head = fit.fit_context(ABOUT, *questions()).head
    first = answer(head, YES, [HeardTurn("assistant", encoded(asked))]).labels[0]
    assert (first.label, first.accepted) == (meant, True)


def test_fit_context_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    texts, encodings, contexts, golden_turns, answers = questions()
    head = reloaded(fit.fit_context(ABOUT, *questions(), turns=3).head, tmp_path)
    assert head.spec.params == {"turns": 3}
    assert sorted(golden.label for golden in head.spec.golden) == ["light", "music"]
    for golden in head.spec.golden:
        i = texts.index(golden.text)
        assert golden.context == tuple(golden_turns[i])
        wanted = answers.names[answers.codes[i]]
        assert answer(head, encodings[i].sentence, contexts[i]).labels[0].label == golden.label == wanted


def test_fit_context_scores_as_it_answers() -> None:
    """Several labels a phrase or one, with a turn before or none: what was calibrated is what is served."""
    texts, encodings, contexts, golden_turns, answers = questions()
    contexts = [[] if i % 3 == 0 else context for i, context in enumerate(contexts)]
    for exclusive in (True, False):
        given = replace(answers, exclusive=exclusive)
        made = fit.fit_context(ABOUT, texts, encodings, contexts, golden_turns, given)
        scores = linked(made.head.spec, made.learnt.model.raw(fit.context_rows(encodings, contexts, 2)))[1]
        for i in range(6):
            found = {label.label: label.score for label in answer(made.head, YES, contexts[i]).labels}
            assert found == pytest.approx(dict(zip(answers.names, scores[i].tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize(("without", "alone"), [(0, False), (6, True)])
def test_fit_context_answers_without_a_turn_where_it_has_learnt_to(without: int, alone: bool) -> None:
    texts, encodings, contexts, golden_turns, answers = questions()
    contexts = [[] if i < without else context for i, context in enumerate(contexts)]
    head = fit.fit_context(ABOUT, texts, encodings, contexts, golden_turns, answers).head
    assert bool(head.spec.params.get("alone")) is alone
    assert bool(head.annotate(Heard.alone("yes", encoded(YES))).labels) is alone


# What goes through all of them.


def noisy_sentence(seed: int) -> Head:
    return head_of(cloud(0.7), replace(FOUR, seed=seed), outsiders=strangers())


def noisy_outside(seed: int) -> Head:
    return head_of(cloud(0.7), replace(FOUR, seed=seed), outsiders=strangers(), outside=True)


def noisy_several(seed: int) -> Head:
    return several(cloud(0.7, labels=SETS), replace(FOUR, seed=seed)).head


def noisy_hidden(seed: int) -> Head:
    return head_of(cloud(0.7, per_label=30), replace(BENT, seed=seed))


def noisy_boosted(seed: int) -> Head:
    return grown(cloud(0.7), replace(GROWN, seed=seed)).head


def noisy_context(seed: int) -> Head:
    said = cloud(0.7, per_label=5)
    before = [[HeardTurn("user", encoded(vector))] for vector in said.vectors[::-1]]
    golden = [[GoldenTurn(role="user", text=text)] for text in said.texts[::-1]]
    encodings = [encoded(vector) for vector in said.vectors]
    plan = Plan(seed=seed)
    return fit.fit_context(
        ABOUT, said.texts, encodings, before, golden, said.answers, turns=1, plan=plan
    ).head


@pytest.mark.parametrize(
    "train", [noisy_sentence, noisy_outside, noisy_several, noisy_hidden, noisy_boosted, noisy_context]
)
def test_fit_same_seed_gives_same_bytes(tmp_path: Path, train: Callable[[int], Head]) -> None:
    """Another seed, the negative control, deals other folds."""
    one, again, other = (files(train(seed), tmp_path / f"{i}") for i, seed in enumerate((5, 5, 6)))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("use", "message"),
    [
        pytest.param(lambda: fitted(cloud(0.15), GROWN), "found BoostedModel, expected a linear one or one with a hidden", id="trees"),
        pytest.param(
            lambda: fit.fit_context(ABOUT, *questions(), plan=BENT), "found HiddenModel, expected a linear one for heads in context",
            id="context",
        ),
        pytest.param(lambda: grown(cloud(0.15), FOUR), "learner: found Linear, expected boosted trees", id="no trees"),
    ],
)  # fmt: skip
def test_fit_learners_that_a_kind_does_not_serve_are_refused(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use()


def test_fit_centroid_of_a_label_without_rows_is_nowhere() -> None:
    answers = Answers(("a", "b"), np.array([[True, False], [True, False]]), True)
    centroids = fit.centroids_of(np.array([[3, 0], [0, 4]], np.float32), answers)
    np.testing.assert_allclose(centroids, np.array([[0.6, 0.8], [0.0, 0.0]]), rtol=1e-6)
