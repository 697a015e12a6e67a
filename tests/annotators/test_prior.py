"""Shares of what a head says in training: those its own folds gave, thresholds applied, abstentions included."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from annotators import fit, prior
from annotators.annotator import Annotation, Label, Span, Status
from annotators.answers import Answers
from annotators.fit import Plan
from annotators.fit_anchors import make_anchors
from annotators.fit_token import fit_token
from annotators.learners import LinearLearner
from annotators.sentence import ranking
from annotators.token import TokenHead
from tests.annotators.clouds import ABOUT, cloud, reloaded, strangers
from tests.annotators.test_fit_token import tagged
from tests.annotators.toys import make_spec


def annotation(*labels: Label, spans: tuple[Span, ...] = ()) -> Annotation:
    return Annotation("toy", "sentence", Status.OK, labels=labels, spans=spans)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (annotation(Label("a", 0.9, True, 0, 0), Label("b", 0.1, False, 0, 0)), ["a"]),
        (annotation(Label("a", 0.4, False, 0, 0)), ["none"]),
        (annotation(), ["none"]),
        (annotation(Label("a", 0.9, True, 0, 0), Label("b", 0.8, True, 0, 0)), ["a", "b"]),
        (annotation(spans=(Span("time", 0, 3, 0.9), Span("time", 5, 8, 0.9))), ["time", "time"]),
        (annotation(Label("a", 1, True, 1, 1), spans=(Span("clock", 0, 3, 1.0),)), ["a", "clock"]),
    ],
)
def test_prior_said_is_what_was_accepted_or_marked(answer: Annotation, said: list[str]) -> None:
    assert prior.said(answer) == said


def test_prior_shares_sum_to_one() -> None:
    assert prior.shares({"b": 1, "a": 3, "never": 0}) == {"a": 0.75, "b": 0.25}
    assert prior.shares({"a": 0}) is None


def test_prior_a_label_called_none_counts_with_abstentions() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.3]], np.float32)
    found = prior.of_scores(("a", "none"), scores, (0.5, 0.5), exclusive=True)
    assert found == {"a": 0.333333, "none": 0.666667}


@pytest.mark.parametrize("exclusive", [True, False])
def test_prior_of_scores_is_what_the_ranking_accepts(exclusive: bool) -> None:
    rng = np.random.default_rng(3)
    labels, limits = ("a", "b", "c", "d"), (0.4, 0.3, 0.6, 0.2)
    scores = rng.random((200, 4)).astype(np.float32)
    spec = make_spec(labels, thresholds=limits, exclusive=exclusive)
    answers = [
        annotation(*ranking(spec, row, row, top=4)) for row in scores.tolist()
    ]  # the twin: what serving makes of the same scores
    counts = Counter(label for answer in answers for label in prior.said(answer))
    assert prior.of_scores(labels, scores, limits, exclusive=exclusive) == prior.shares(counts)
    assert counts["none"] < len(scores)


def test_prior_of_a_sentence_head_is_that_of_its_held_out_rows(tmp_path: Path) -> None:
    said, outsiders = cloud(0.9, per_label=20), strangers(30)
    plan = Plan(LinearLearner((4.0,)))
    fitted = fit.fit_sentence(
        ABOUT, said.texts, said.vectors, said.answers, plan=plan, outsiders=outsiders, outside=True
    )
    spec, learnt = fitted.head.spec, fitted.learnt
    assert learnt.outside is not None
    counts = Counter(
        label
        for row, stranger in zip(learnt.scores.tolist(), learnt.outside.inside_scores.tolist(), strict=True)
        for label in prior.said(annotation(*ranking(spec, row, row, top=3, stranger=stranger)))
    )
    assert spec.prior == prior.shares(counts)
    assert 0 < counts["none"] < len(said.texts)  # neither half of the rule goes untested
    assert reloaded(fitted.head, tmp_path).spec.prior == spec.prior


def test_prior_of_a_token_head_is_that_of_spans_of_other_folds() -> None:
    names = ("anna", "boris", "clara", "david")
    phrases = [tagged(f"{verb} {name}") for name in names for verb in ("call", "wake")]
    phrases += [tagged("call me"), tagged("wake me please"), tagged("please call me"), tagged("wake me")]
    fitted = fit_token(ABOUT, phrases)
    spec = fitted.head.spec
    found = Counter(prior.NONE for _ in phrases)
    score = {
        i: 1 / (1 + np.exp(-(spec.scale[0] * each.raw + spec.shift[0])))
        for i, each in enumerate(fitted.proposed)
    }
    kept = [each for i, each in enumerate(fitted.proposed) if score[i] >= spec.thresholds[each.label]]
    found[prior.NONE] -= len({each.phrase for each in kept})
    found.update(spec.labels[each.label] for each in kept)
    assert isinstance(fitted.head, TokenHead)
    assert spec.prior == prior.shares(found)
    assert spec.prior is not None and spec.prior.keys() == {"who", "none"}


def test_prior_of_anchors_leaves_each_anchor_out() -> None:
    said = cloud(0.9, per_label=6)
    head = make_anchors(ABOUT, said.texts, said.vectors, said.answers)
    counts: Counter[str] = Counter()
    for i in range(len(head.anchors)):
        rest = np.arange(len(head.anchors)) != i
        others = type(head)(head.spec, head.anchors[rest], head.owner[rest])
        raw, scores = others.scored(head.anchors[i][None], [""])
        counts.update(prior.said(annotation(*ranking(head.spec, scores[0].tolist(), raw[0].tolist(), top=3))))
    assert head.spec.prior == prior.shares(counts)


def test_prior_is_none_where_nothing_can_be_left_out() -> None:
    said = cloud(0.1, per_label=1)
    answers = Answers.one(said.firsts, at_least=1)
    assert make_anchors(ABOUT, said.texts, said.vectors, answers).spec.prior is None
