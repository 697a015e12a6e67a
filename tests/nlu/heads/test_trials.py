"""nlu.heads.trials: less to learn from, honestly: every number is of rows that were not learnt from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from annotators.answers import Answers
from annotators.fit import About
from annotators.learners import LinearLearner, Model
from nlu.heads import data, trials
from nlu.heads.classes import fit_classes
from nlu.heads.material import Materials, encode
from nlu.heads.train import plan_of
from nlu.heads.trials import Exam, drawn
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import SPRINTS, Sprint

FloatArray = NDArray[np.float32]


@pytest.fixture
def tried(bundled: Vectorizer, store: Path, tmp_path: Path) -> Any:
    """Runs the trials of a sprint; gives the sections, what went in and the learner's pupils."""

    def run(sprint: Sprint, **options: Any) -> tuple[dict[str, Any], Materials, list[tuple[int, float]]]:
        config = sprint.config(tmp_path, **options)
        with closing(VectorStore(store, bundled, 1, lambda _done, _total: None)) as vectors:
            materials = encode(data.read(config, uncased=True), vectors, tokens=False)
        plan = plan_of(config)
        fitted = fit_classes(config, About("x", "x", bundled.fingerprint), materials, plan)
        watched = Watched(plan.learner)
        plan = replace(plan, learner=watched)
        return trials.run(config, plan, fitted, materials, lambda *_: None), materials, watched.lessons

    return run


class Watched:
    """A learner that remembers how many rows it was given, at which strength."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.lessons: list[tuple[int, float]] = []

    @property
    def strengths(self) -> Sequence[float]:
        found: Sequence[float] = self._learner.strengths
        return found

    def path(
        self, rows: FloatArray, answers: Answers, strengths: Sequence[float], **how: Any
    ) -> Iterator[Model]:
        self.lessons += [(len(rows), strength) for strength in strengths]
        yield from self._learner.path(rows, answers, strengths, **how)


KNOWN = Sprint(phrases.labelled(20, 0), SPRINTS["linear"].test)


def test_trials_learning_curve_takes_shares_of_every_label(tried: Any) -> None:
    found, _, lessons = tried(KNOWN)
    curve = found["learning_curve"]
    assert [step["rows"] for step in curve] == [6, 15, 30]
    assert [rows for rows, _ in lessons] == [6, 15, 30]
    assert curve[0]["accuracy"]["value"] <= curve[-1]["accuracy"]["value"]
    assert not {"ablation", "few_shot", "cross_validation"} & found.keys()


def test_trials_without_a_test_keep_rows_back(tried: Any) -> None:
    _, _, lessons = tried(Sprint(KNOWN.train), shots=(100,), shot_seeds=1)
    assert [rows for rows, _ in lessons] == [6, 12, 24, 48]  # of 60 rows every fifth is asked
    wrong, _, _ = tried(Sprint([{"text": f"{i} wxyz", "label": label} for i in range(12) for label in ("a", "b")]), shots=(9,))  # fmt: skip
    # the vectors say nothing of the labels; a head that were asked what it had learnt would know
    assert wrong["few_shot"][0]["accuracy"]["value"] < 0.8


def test_trials_can_be_left_out(tried: Any) -> None:
    assert tried(KNOWN, learning_curve=False)[0] == {}
    assert tried(Sprint(phrases.several(30, 0)), multi=True, shots=(2,))[0] == {}


def test_trials_few_shots_take_as_many_of_each_label(tried: Any) -> None:
    found, _, lessons = tried(KNOWN, shots=(1, 4), shot_seeds=7, learning_curve=False)
    assert [(part["shots"], part["seeds"]) for part in found["few_shot"]] == [(1, 7), (4, 7)]
    assert [rows for rows, _ in lessons] == [3] * 7 + [12] * 7
    for part in found["few_shot"]:
        accuracy = part["accuracy"]
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert found["few_shot"][0]["accuracy"]["value"] < found["few_shot"][1]["accuracy"]["value"]


@pytest.mark.parametrize(
    ("options", "strengths"),
    [({}, set(LinearLearner().strengths)), ({"hidden": 4}, {1e3, 1e4}), ({"kind": "boosted"}, {50, 150})],
)
def test_trials_few_shots_are_learnt_by_the_kinds_own_learner(
    tried: Any, options: dict[str, Any], strengths: set[float]
) -> None:
    _, _, lessons = tried(KNOWN, shots=(6,), shot_seeds=1, learning_curve=False, **options)
    ((rows, strength),) = lessons
    assert rows == 18 and strength in strengths


def test_trials_draw_each_label_alike() -> None:
    codes = np.array([0] * 10 + [1] * 3 + [2] * 7)
    seen = np.array([0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 19])
    for seed in range(5):
        rows = drawn(codes, seen, 4, seed)
        assert set(rows.tolist()) <= set(seen.tolist())
        assert len(set(rows.tolist())) == len(rows)
        assert Counter(codes[rows].tolist()) == {0: 4, 1: 3, 2: 3}
    assert {tuple(drawn(codes, seen, 4, seed)) for seed in range(5)} != {tuple(drawn(codes, seen, 4, 0))}
    assert np.array_equal(drawn(codes, seen, 4, 3), drawn(codes, seen, 4, 3))


def test_trials_cross_validation_is_that_of_a_plain_loop(tried: Any) -> None:
    strength = 8.0
    noisy = [line | {"label": "music"} if i % 7 == 0 else line for i, line in enumerate(KNOWN.train)]
    found, materials, lessons = tried(
        Sprint(noisy), cross_validate=4, regularisations=(strength,), learning_curve=False
    )
    answers = materials.train.answers(exclusive=True)
    hits = 0
    for seen, unseen in answers.folds(4, 0):
        model = next(LinearLearner().path(materials.train.vectors[seen], answers.take(seen), (strength,)))
        hits += int(
            (model.raw(materials.train.vectors[unseen]).argmax(axis=1) == answers.codes[unseen]).sum()
        )
    assert found["cross_validation"]["folds"] == 4
    assert found["cross_validation"]["accuracy"]["value"] == pytest.approx(hits / 60)
    assert 0.5 < hits / 60 < 1
    assert max(rows for rows, _ in lessons) == 45  # never more than the other folds


def test_trials_cross_validation_chooses_strength_inside_each_fold(tried: Any) -> None:
    _, _, lessons = tried(KNOWN, cross_validate=3, folds=4, learning_curve=False)
    tried_on = [rows for rows, _ in lessons]
    strengths = len(LinearLearner().strengths)
    assert tried_on == ([30] * strengths + [40]) * 3  # a fourth of the 40 rows of the other folds is asked


@pytest.mark.parametrize("options", [{}, {"hidden": 3}, {"kind": "boosted"}])
def test_trials_cross_validation_of_labels_with_two_rows(tried: Any, options: dict[str, Any]) -> None:
    found, _, _ = tried(Sprint(phrases.labelled(2, 0)), cross_validate=5, **options)
    assert found["cross_validation"]["folds"] == 2
    assert 0 <= found["cross_validation"]["accuracy"]["value"] <= 1


def test_trials_ablation_takes_turns_away(tried: Any) -> None:
    found, _, _ = tried(Sprint(phrases.answered(40, 0), phrases.answered(20, 1)), kind="context", turns=2)
    assert [step["features"] for step in found["ablation"]] == [
        "text alone",
        "with 1 turn before",
        "with 2 turns before",
    ]
    alone, one, two = (step["accuracy"]["value"] for step in found["ablation"])
    assert alone < 0.7 and one == two == 1.0  # there is never more than one turn


def test_trials_exam_knows_only_labels_that_were_taught() -> None:
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], np.float32)
    answers = Answers(("a", "b", "c"), rows.astype(np.bool_), True)
    exam = Exam(np.arange(4), rows, answers, rows, answers.wanted)
    learner = LinearLearner((100.0,))
    assert exam.hits(learner, [100.0], np.arange(4)) == [4]
    assert exam.hits(learner, [100.0], np.array([0, 2])) == [3]  # "b" is not known, and never answered
    assert exam.hits(learner, [1.0, 100.0], np.array([3])) == [2, 2]  # one label is always answered
    assert exam.score(learner, 100.0, np.array([3]))["value"] == 0.5
