"""All heads at once: the one product answers as each head alone would, and no head can touch another's answer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from annotators.anchors import AnchorsHead
from annotators.annotator import Annotation, Heard, HeardTurn, Label, Status
from annotators.context import ContextHead
from annotators.fleet import BLOCK, Fleet, Stack
from annotators.head import HeadInvalid
from annotators.outside import Outside
from annotators.rules import RulesHead
from annotators.sentence import TOP_LABELS, SentenceHead
from annotators.table import Head
from annotators.token import TokenHead
from tests.annotators.toys import (
    BLEND,
    ENERGY,
    biased,
    encoded,
    heard,
    make_spec,
    random_head,
    random_units,
    tokenized,
)

CERTAIN = 200.0  # a raw score far enough above the others' to be a probability of one


def anchors_head(name: str = "topic") -> AnchorsHead:
    return AnchorsHead(
        make_spec(("x", "y"), name=name, kind="anchors"), random_units(4), np.array([0, 0, 1, 1])
    )


def broken_head(name: str = "broken") -> ContextHead:
    """Weights for vectors of 3 numbers, where everyone else speaks of 8."""
    spec = make_spec(("x", "y"), name=name, kind="context", params={"turns": 1})
    return ContextHead(
        spec, np.zeros((2, 12), np.float32), np.zeros(2, np.float32), turns=1, version="v-broken"
    )


def token_head(name: str = "slots") -> TokenHead:
    spec = make_spec(("x",), name=name, kind="token", thresholds=(0.0,))
    return TokenHead(spec, np.zeros((3, 6), np.float32), np.array([0, 1, 0], np.float32))


def rules_head(name: str = "quick") -> RulesHead:
    return RulesHead(
        make_spec(
            ("x",), name=name, kind="rules", params={"rules": [{"label": "x", "phrases": ["phrase 0"]}]}
        )
    )


def by_name(annotations: tuple[Annotation, ...]) -> dict[str, Annotation]:
    return {annotation.name: annotation for annotation in annotations}


def turn_of(hypotheses: int, dim: int = 8) -> Heard:
    """Random hypotheses of falling weight, after a question."""
    weights = np.arange(hypotheses, 0, -1) / sum(range(hypotheses + 1))
    question = HeardTurn("assistant", encoded(random_units(1, dim)[0]))
    return heard(*random_units(hypotheses, dim, seed=7), weights=weights.tolist(), context=[question])


def twin(head: SentenceHead, turn: Heard) -> tuple[Label, ...]:
    """The head alone, in float64, one hypothesis after the other."""
    spec = head.spec
    scores, raw_scores = np.zeros(len(spec.labels)), np.zeros(len(spec.labels))
    for encoding, weight in zip(turn.encodings, turn.weights, strict=True):
        raw = head.weight.astype(np.float64) @ encoding.sentence.astype(np.float64) + head.bias
        logits = np.array(spec.scale) * raw + np.array(spec.shift)
        powers = np.exp(logits)
        scores += weight * (powers / powers.sum() if spec.exclusive else powers / (1 + powers))
        raw_scores += weight * raw
    order = np.argsort(-scores).tolist()
    accepted = [
        scores[i] >= spec.thresholds[i] and (i == order[0] or not spec.exclusive) for i in range(len(order))
    ]
    return tuple(
        Label(spec.labels[i], scores[i], accepted[i], raw_scores[i], spec.thresholds[i])
        for rank, i in enumerate(order)
        if rank < TOP_LABELS or accepted[i]
    )


@pytest.mark.parametrize("hypotheses", [1, 2, 5])
@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
@pytest.mark.parametrize("labels", [1, 2, 15, 16, 17, 40])
def test_fleet_one_product_equals_the_head_alone(labels: int, exclusive: bool, hypotheses: int) -> None:
    head = random_head("mine", labels, seed=3, exclusive=exclusive)
    fleet = Fleet(
        [random_head("before", 20, seed=1), head, random_head("after", 3, seed=2, exclusive=not exclusive)]
    )
    turn = turn_of(hypotheses)
    found, expected = by_name(fleet.annotate(turn))["mine"].labels, twin(head, turn)
    assert [label.label for label in found] == [label.label for label in expected]
    assert [label.accepted for label in found] == [label.accepted for label in expected]
    assert [label.score for label in found] == pytest.approx([label.score for label in expected], rel=1e-5)
    assert [label.raw_score for label in found] == pytest.approx(
        [label.raw_score for label in expected], abs=1e-5
    )
    assert [label.threshold for label in found] == [label.threshold for label in expected]


CENTROID = Outside(method="centroid", centroid=3.0, shift=1.0, threshold=0.5)
MAX_LOGIT = Outside(method="max_logit", max_logit=0.8, shift=1.0, threshold=0.5)


@pytest.mark.parametrize("hypotheses", [1, 2, 5])
@pytest.mark.parametrize("outside", [None, MAX_LOGIT, ENERGY, CENTROID, BLEND])
@pytest.mark.parametrize("labels", [1, 2, 16, 17, 40])
def test_fleet_one_product_equals_the_heads_own_answer(
    labels: int, outside: Outside | None, hypotheses: int
) -> None:
    """Among heads with centroids and without, before it and after."""
    mine, turn = random_head("mine", labels, seed=3, outside=outside), turn_of(hypotheses)
    others = [
        random_head("before", 20, seed=1, outside=BLEND),
        random_head("plain", 3, seed=2, exclusive=False),
        random_head("after", 17, seed=4, outside=ENERGY),
        random_head("last", 5, seed=5, outside=CENTROID),
    ]
    found = by_name(Fleet([*others[:2], mine, *others[2:]]).annotate(turn))
    for head in (mine, *others):
        annotation, alone = found[head.spec.name], head.annotate(turn)
        assert [label._replace(score=0, raw_score=0) for label in annotation.labels] == [
            label._replace(score=0, raw_score=0) for label in alone.labels
        ]
        assert numbers(annotation) == pytest.approx(numbers(alone), abs=1e-5)
        assert (annotation.out_of_scope is None) == (head.spec.outside is None)
        assert (annotation.name, annotation.kind, annotation.status, annotation.version) == (
            alone.name, alone.kind, alone.status, alone.version
        )  # fmt: skip


def numbers(annotation: Annotation) -> list[float]:
    """Scores, raw scores, disagreement, and the score of being outside."""
    of_labels = [number for label in annotation.labels for number in (label.score, label.raw_score)]
    return [
        *of_labels,
        annotation.disagreement,
        -1.0 if annotation.out_of_scope is None else annotation.out_of_scope,
    ]


def test_fleet_stranger_is_given_no_label() -> None:
    """The negative control is the same head without the score."""
    certain = follower()
    unknown = make_spec("ab", outside=Outside(method="none", shift=3.0, threshold=0.5))
    turn = saying(0, count=2)
    (closed,) = Fleet([SentenceHead(unknown, certain.weight, certain.bias)]).annotate(turn)
    (open_,) = Fleet([certain]).annotate(turn)
    assert closed.out_of_scope == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert [label.accepted for label in closed.labels] == [False, False]
    assert [label.accepted for label in open_.labels] == [True, False]


@pytest.mark.parametrize(("labels", "rows"), [(1, 16), (15, 16), (16, 16), (17, 32), (40, 48)])
def test_fleet_heads_own_whole_blocks(labels: int, rows: int) -> None:
    stack = Stack.of([random_head("a", labels), random_head("b", 2)])
    assert stack.widths.tolist() == [rows, BLOCK]
    assert stack.starts.tolist() == [0, rows]
    assert stack.weight.shape == ((rows + BLOCK) // BLOCK, BLOCK, 8)


def test_fleet_centroids_own_whole_blocks_behind_their_labels() -> None:
    stack = Stack.of([random_head("a", 17, outside=BLEND), random_head("b", 2, outside=ENERGY)])
    assert stack.widths.tolist() == [32, 32, 16]
    assert stack.rows == (slice(0, 17), slice(64, 66))
    assert stack.strangers is not None
    assert stack.strangers.numbers == {0: 0, 1: 1}


def test_fleet_padding_has_no_probability() -> None:
    stack = Stack.of([random_head("a", 3), random_head("b", 17)])
    scores, _ = stack.scores(stack.raw(random_units(2)))
    padding = np.ones(48, np.bool_)
    padding[:3] = padding[16:33] = False
    assert not scores[:, padding].any()
    np.testing.assert_allclose(scores[:, :16].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(scores[:, 16:].sum(axis=1), 1, rtol=1e-6)


HYPOTHESES = (1, 2, 3, 5)
NEIGHBOURS = (1, 2, 15, 16, 17, 33, 150, 1600)


@pytest.mark.parametrize("dim", [8, 384])
@pytest.mark.parametrize("hypotheses", HYPOTHESES)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_fleet_neighbour_changes_no_bit(neighbour: int, hypotheses: int, dim: int) -> None:
    mine, other = random_head("mine", 40, dim=dim, seed=1), random_head("other", neighbour, dim=dim, seed=2)
    said = random_units(hypotheses, dim)
    alone, beside = Stack.of([mine]), Stack.of([other, mine])
    raw_alone, raw_beside = alone.raw(said), beside.raw(said)
    start = int(beside.starts[1])
    np.testing.assert_array_equal(raw_beside[:, start : start + 40], raw_alone[:, :40])
    np.testing.assert_array_equal(
        beside.scores(raw_beside)[0][:, start : start + 40], alone.scores(raw_alone)[0][:, :40]
    )


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
@pytest.mark.parametrize("hypotheses", HYPOTHESES)
@pytest.mark.parametrize("neighbour", [*NEIGHBOURS, 17_000])
def test_fleet_neighbour_changes_no_answer(neighbour: int, hypotheses: int, exclusive: bool) -> None:
    """An independent head that accepts everything shows the mixed scores of all its labels."""
    head, other = (
        random_head("mine", 40, seed=1),
        random_head("other", neighbour, seed=2, exclusive=exclusive),
    )
    spec = head.spec.model_copy(update={"exclusive": exclusive, "thresholds": (0.0,) * 40})
    mine, turn = SentenceHead(spec, head.weight, head.bias), turn_of(hypotheses)
    (alone,) = Fleet([mine]).annotate(turn)
    assert by_name(Fleet([other, mine]).annotate(turn))["mine"] == alone
    assert by_name(Fleet([mine, other]).annotate(turn))["mine"] == alone
    assert len(alone.labels) == (TOP_LABELS if exclusive else 40)


@pytest.mark.parametrize("hypotheses", [*HYPOTHESES, 9])
@pytest.mark.parametrize("outside", [ENERGY, BLEND], ids=["energy", "blend"])
@pytest.mark.parametrize("neighbour", [1, 15, 16, 17, 150, 1600])
def test_fleet_neighbour_with_centroids_changes_no_answer(
    neighbour: int, outside: Outside, hypotheses: int
) -> None:
    """Not even the score of being outside, of which there are as many in a row as heads that have one."""
    mine, turn = random_head("mine", 40, seed=1, outside=outside), turn_of(hypotheses)
    knows = [random_head(f"knows{i}", neighbour, seed=2 + i, outside=BLEND) for i in range(8)]
    plain = random_head("plain", neighbour, seed=11)
    (alone,) = Fleet([mine]).annotate(turn)
    assert alone.out_of_scope is not None
    for others in ([plain], knows[:1], knows[:2], [plain, *knows]):
        assert by_name(Fleet([*others, mine]).annotate(turn))["mine"] == alone
        assert by_name(Fleet([mine, *others]).annotate(turn))["mine"] == alone


def test_fleet_without_blocks_a_neighbour_does_change_bits() -> None:
    """The negative control of the test above: a plain product of all the label rows depends on who else is there."""

    def plain(neighbour: int, hypotheses: int, dim: int) -> bool:
        mine, other = (
            random_head("mine", 40, dim=dim, seed=1),
            random_head("other", neighbour, dim=dim, seed=2),
        )
        said = random_units(hypotheses, dim)
        beside = said @ np.concatenate([other.weight, mine.weight]).T
        return np.array_equal(beside[:, neighbour:], said @ mine.weight.T)

    assert not all(itertools.starmap(plain, itertools.product(NEIGHBOURS, HYPOTHESES, (8, 20, 64, 384))))


@pytest.mark.parametrize("hypotheses", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda fleet: fleet.with_head(random_head("new", 30, seed=9)), id="a sentence head added"
        ),
        pytest.param(lambda fleet: fleet.with_head(anchors_head("new")), id="an anchors head added"),
        pytest.param(lambda fleet: fleet.with_head(broken_head("new")), id="a broken head added"),
        pytest.param(lambda fleet: fleet.without("changed"), id="removed"),
        pytest.param(
            lambda fleet: fleet.with_head(random_head("changed", 33, seed=9)), id="replaced by a larger head"
        ),
        pytest.param(
            lambda fleet: fleet.with_head(random_head("changed", 1, seed=9)), id="replaced by a smaller head"
        ),
        pytest.param(lambda fleet: fleet.with_head(rules_head("changed")), id="replaced by another kind"),
    ],
)
def test_fleet_change_leaves_every_other_answer_bit_equal(
    change: Callable[[Fleet], Fleet], hypotheses: int
) -> None:
    others: list[Head] = [
        random_head("first", 5, seed=1),
        random_head("second", 40, seed=2, exclusive=False),
        random_head("third", 16, seed=3),
        anchors_head(),
        rules_head(),
    ]
    fleet = Fleet([others[0], random_head("changed", 20, seed=4), *others[1:]])
    turn = turn_of(hypotheses)
    before, after = by_name(fleet.annotate(turn)), by_name(change(fleet).annotate(turn))
    names = [head.spec.name for head in others]
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert after.get("changed") != before["changed"] or "new" in after


def test_fleet_keeps_its_order_and_the_fleet_before() -> None:
    fleet = Fleet([random_head("a", 2), anchors_head("b"), random_head("c", 2)])
    assert fleet.with_head(rules_head("a")).names == ("a", "b", "c")
    assert fleet.with_head(rules_head("d")).names == ("a", "b", "c", "d")
    assert fleet.without("b").names == ("a", "c")
    assert fleet.names == ("a", "b", "c")
    assert [annotation.name for annotation in fleet.annotate(turn_of(1))] == ["a", "b", "c"]


def test_fleet_head_that_raises_is_an_error_and_takes_nobody_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole: list[Head] = [random_head("intent", 3), anchors_head(), rules_head()]
    turn = Heard.alone(
        "phrase 0", encoded(random_units(1)[0]), [HeardTurn("user", encoded(random_units(1)[0]))]
    )
    with caplog.at_level(logging.ERROR, "annotators.fleet"):
        *others, failed = Fleet([*whole, broken_head()]).annotate(turn)
    assert tuple(others) == Fleet(whole).annotate(turn)
    assert failed == Annotation(
        "broken", "context", Status.ERROR, version="v-broken", note="ValueError in this head"
    )
    assert [record.getMessage() for record in caplog.records] == ["head broken failed"]


def test_fleet_failed_head_never_says_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    turn = Heard.alone(
        "my secret", encoded(random_units(1)[0]), [HeardTurn("user", encoded(random_units(1)[0]))]
    )
    (failed,) = Fleet([broken_head()]).annotate(turn)
    assert "secret" not in failed.note + caplog.text


def test_fleet_two_heads_of_a_name_are_refused() -> None:
    with pytest.raises(HeadInvalid, match="head a: found two heads of this name, expected one; rename one"):
        Fleet([random_head("a", 2), anchors_head("a")])


def test_fleet_removing_an_unknown_head_is_an_error() -> None:
    with pytest.raises(KeyError, match="nobody"):
        Fleet([random_head("a", 2)]).without("nobody")


@pytest.mark.parametrize("wanted", [None, frozenset({"a"})])
def test_fleet_without_heads_answers_nothing(wanted: frozenset[str] | None) -> None:
    assert Fleet([]).annotate(turn_of(2), wanted=wanted) == ()


@pytest.mark.parametrize(
    "wanted",
    [(), ("c",), ("b",), ("c", "a"), ("d", "b", "a"), ("nobody",), ("nobody", "b"), ("a", "b", "c", "d")],
)
def test_fleet_wanted_heads_answer_as_in_the_whole_fleet(wanted: tuple[str, ...]) -> None:
    fleet = Fleet([random_head("a", 3), anchors_head("b"), random_head("c", 20), rules_head("d")])
    whole = fleet.annotate(turn_of(2))
    assert fleet.annotate(turn_of(2), wanted=frozenset(wanted)) == tuple(
        annotation for annotation in whole if annotation.name in wanted
    )


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [(None, True), (frozenset({"slots"}), True), (frozenset({"a"}), False), (frozenset({"a", "slots"}), True), (frozenset(), False)],
)  # fmt: skip
def test_fleet_needs_tokens_only_where_a_wanted_head_reads_them(
    wanted: frozenset[str] | None, needed: bool
) -> None:
    assert Fleet([random_head("a", 3), token_head()]).needs_tokens(wanted) is needed


def test_fleet_of_no_token_head_needs_no_tokens() -> None:
    assert not Fleet([random_head("a", 3), anchors_head()]).needs_tokens(None)


def test_fleet_runs_every_kind_over_one_turn() -> None:
    said = tokenized([[1, 2], [3, 4]], [(0, 6), (7, 8)])
    turn = Heard.alone("phrase 0", said)
    context = ContextHead(
        make_spec(name="c", kind="context"), np.zeros((3, 8), np.float32), np.zeros(3, np.float32), turns=1
    )
    anchors = AnchorsHead(
        make_spec(("x",), name="a", kind="anchors"), np.eye(1, 2, dtype=np.float32), np.array([0])
    )
    answers = Fleet([context, biased([1, 0], name="s"), token_head("t"), anchors, rules_head("r")]).annotate(
        turn
    )
    assert [(answer.name, answer.kind, answer.status.value) for answer in answers] == [
        ("c", "context", "skipped"),
        ("s", "sentence", "ok"),
        ("t", "token", "ok"),
        ("a", "anchors", "ok"),
        ("r", "rules", "ok"),
    ]


@pytest.mark.parametrize(
    ("threshold", "accepted"),
    [(0.5, True), (float(np.nextafter(0.5, 1.0)), False), (0.0, True), (1.0, False)],
)
@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
def test_fleet_accepts_from_the_threshold_on(threshold: float, accepted: bool, exclusive: bool) -> None:
    head = biased([0.0, 0.0], exclusive=exclusive, thresholds=(threshold,) * 2)  # both score exactly one half
    first, _ = Fleet([head]).annotate(heard((0, 0)))[0].labels
    assert (first.score, first.accepted) == (0.5, accepted)


@pytest.mark.parametrize(
    ("exclusive", "accepted"),
    [pytest.param(True, ["a"], id="exclusive"), pytest.param(False, ["a", "b", "c"], id="independent")],
)
def test_fleet_only_labels_that_do_not_exclude_each_other_are_accepted_together(
    exclusive: bool, accepted: list[str]
) -> None:
    head = biased([3.0, 2.0, 1.0, -1.0], exclusive=exclusive, thresholds=(0.05, 0.05, 0.05, 0.3))
    labels = Fleet([head]).annotate(heard((0, 0)))[0].labels
    assert [label.label for label in labels if label.accepted] == accepted


def test_fleet_far_below_zero_a_score_is_zero_without_a_warning() -> None:
    labels = Fleet([biased([-CERTAIN, CERTAIN], exclusive=False)]).annotate(heard((0, 0)))[0].labels
    assert [(label.label, label.score) for label in labels] == [("b", 1.0), ("a", 0.0)]


def follower(count: int = 2) -> SentenceHead:
    """Answers with label i to the i-th unit vector, with certainty; a zero vector is anyone's."""
    return SentenceHead(
        make_spec("abcd"[:count]), np.eye(count, dtype=np.float32) * CERTAIN, np.zeros(count, np.float32)
    )


def saying(*labels: int, weights: tuple[float, ...] | None = None, count: int = 4) -> Heard:
    return heard(*np.eye(count)[list(labels)], weights=weights)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.75, 0.25), (0.125, 0.875)])
def test_fleet_weights_combine_the_hypotheses_scores(weights: tuple[float, float]) -> None:
    labels = Fleet([follower()]).annotate(saying(0, 1, weights=weights, count=2))[0].labels
    assert {label.label: label.score for label in labels} == pytest.approx(
        dict(zip("ab", weights, strict=True))
    )
    assert {label.label: label.raw_score for label in labels} == pytest.approx(
        {label: CERTAIN * weight for label, weight in zip("ab", weights, strict=True)}
    )


def test_fleet_acceptance_is_of_the_combined_score() -> None:
    turn = saying(0, 1, weights=(0.375, 0.625), count=2)
    first, second = Fleet([follower()]).annotate(turn)[0].labels
    assert (first.label, first.accepted, second.accepted) == ("b", True, False)
    strict = SentenceHead(make_spec("ab", thresholds=(0.7, 0.7)), follower().weight, follower().bias)
    assert not any(label.accepted for label in Fleet([strict]).annotate(turn)[0].labels)


@pytest.mark.parametrize(
    ("labels", "weights", "disagreement"),
    [
        pytest.param((0,), (1.0,), 0.0, id="one hypothesis"),
        pytest.param((0, 0), (0.5, 0.5), 0.0, id="equal"),
        pytest.param((2, 2, 2), (0.5, 0.3, 0.2), 0.0, id="three equal"),
        pytest.param((0, 1), (0.5, 0.5), 1.0, id="two that differ"),
        pytest.param((0, 1), (0.9, 0.1), 1.0, id="two that differ, whatever their weights"),
        pytest.param((0, 1, 2, 3), (0.4, 0.3, 0.2, 0.1), 1.0, id="four that differ"),
        pytest.param((0, 1), (1.0, 0.0), 0.0, id="the other weighs nothing"),
        pytest.param((0, 0, 1), (0.25, 0.25, 0.5), 2 / 3, id="two against one: ln 2 of 1.5 ln 2"),
    ],
)
def test_fleet_disagreement_of_certain_answers(
    labels: tuple[int, ...], weights: tuple[float, ...], disagreement: float
) -> None:
    annotation = Fleet([follower(4)]).annotate(saying(*labels, weights=weights))[0]
    assert annotation.disagreement == pytest.approx(disagreement, abs=1e-6)


def entropy(distribution: NDArray[np.float64]) -> float:
    return float(-(distribution * np.log(distribution)).sum())


def test_fleet_disagreement_is_the_jensen_shannon_divergence() -> None:
    head, turn = random_head("a", 4, seed=5), turn_of(3)
    scores = []
    for encoding in turn.encodings:
        labels = twin(head, Heard.alone("", encoding))
        scores.append([{label.label: label.score for label in labels}[name] for name in head.spec.labels])
    rows, weights = np.array(scores), np.array(turn.weights)
    divergence = entropy(weights @ rows) - sum(w * entropy(row) for w, row in zip(weights, rows, strict=True))
    found = Fleet([head]).annotate(turn)[0].disagreement
    assert 0.01 < found < 0.99
    assert found == pytest.approx(divergence / entropy(weights), abs=1e-5)


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "independent"])
def test_fleet_disagreement_is_symmetric(exclusive: bool) -> None:
    fleet = Fleet([random_head("a", 6, exclusive=exclusive)])
    one, other = random_units(2, seed=4)
    there = fleet.annotate(heard(one, other, weights=(0.25, 0.75)))[0].disagreement
    back = fleet.annotate(heard(other, one, weights=(0.75, 0.25)))[0].disagreement
    assert there == pytest.approx(back, abs=1e-6)
    assert there > 0.001


def test_fleet_answers_carry_their_heads_version() -> None:
    assert [a.version for a in Fleet([random_head("a", 2, seed=6)]).annotate(turn_of(1))] == ["v-a-6"]


def test_fleet_shadows_answer_beside_the_live_heads_and_change_nothing() -> None:
    live: list[Head] = [
        random_head("a", 5, seed=1, outside=BLEND),
        anchors_head("b"),
        random_head("c", 17, seed=2),
    ]
    candidates: list[Head] = [random_head("c", 33, seed=3, outside=ENERGY), random_head("b", 4, seed=4)]
    turn = turn_of(3)
    answers = Fleet(live, candidates).answer(turn)
    assert answers.live == Fleet(live).annotate(turn)
    assert answers.shadows() == Fleet(candidates).annotate(turn)
    assert Fleet(live, candidates).annotate(turn) == answers.live


def test_fleet_shadows_answer_only_for_wanted_heads() -> None:
    fleet = Fleet(
        [random_head("a", 5), random_head("b", 5)], [random_head("a", 5, seed=1), random_head("b", 5, seed=2)]
    )
    answers = fleet.answer(turn_of(1), wanted=frozenset({"b"}))
    assert [annotation.version for annotation in (*answers.live, *answers.shadows())] == ["v-b-0", "v-b-2"]


def test_fleet_shadow_of_no_live_head_is_refused() -> None:
    with pytest.raises(
        HeadInvalid, match="head b: found a shadow without a live head of its name, expected the head"
    ):
        Fleet([random_head("a", 2)], [random_head("b", 2)])


def test_fleet_shadow_that_fails_says_so_but_not_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    turn = turn_of(1)
    with caplog.at_level(logging.INFO, "annotators.fleet"):
        answers = Fleet([random_head("a", 2)], [broken_head("a")]).answer(turn)
        (failed,) = answers.shadows()
    assert (failed.status, caplog.records) == (Status.ERROR, [])
    assert answers.live == Fleet([random_head("a", 2)]).annotate(turn)


def test_fleet_head_removed_takes_its_shadow_along() -> None:
    fleet = Fleet([random_head("a", 2), random_head("b", 2)], [random_head("a", 2, seed=1)])
    assert list(fleet.without("b").shadows) == list(fleet.with_head(random_head("a", 3)).shadows) == ["a"]
    assert not fleet.without("a").shadows


def test_fleet_shadow_may_be_what_needs_tokens() -> None:
    assert Fleet([random_head("a", 2)], [token_head("a")]).needs_tokens(None)
    assert not Fleet([random_head("a", 2)], [random_head("a", 2)]).needs_tokens(None)


def test_fleet_head_with_a_hidden_layer_answers_for_itself() -> None:
    head, turn = random_head("h", 5, units=6, outside=BLEND), turn_of(3)
    fleet = Fleet([random_head("a", 3), head])
    assert [mine.spec.name for mine in fleet.stack.heads] == ["a"]
    assert fleet.annotate(turn)[1] == head.annotate(turn)


def test_fleet_heads_to_skip_say_so_and_the_others_answer_as_before() -> None:
    fleet = Fleet([random_head("a", 3), token_head(), rules_head(), anchors_head()])
    said = heard(*random_units(2))
    whole = fleet.annotate(said)
    partly = fleet.answer(said, skip=frozenset({"slots", "topic"})).live
    assert [annotation.name for annotation in partly] == [annotation.name for annotation in whole]
    for before, now in zip(whole, partly, strict=True):
        if now.name in ("slots", "topic"):
            assert (now.status, now.note, now.labels, now.spans) == (Status.SKIPPED, "no time", (), ())
        else:
            assert now == before


def test_fleet_skips_nothing_that_is_not_wanted() -> None:
    fleet = Fleet([random_head("a", 3), token_head()])
    answered = fleet.answer(heard(*random_units(2)), wanted=frozenset({"a"}), skip=frozenset({"slots"}))
    assert [annotation.name for annotation in answered.live] == ["a"]


def test_fleet_shadows_of_heads_to_skip_are_not_asked() -> None:
    fleet = Fleet([random_head("a", 3), token_head()], [token_head()])
    assert [said.name for said in fleet.answer(heard(*random_units(2))).shadows()] == ["slots"]  # the control
    assert fleet.answer(heard(*random_units(2)), skip=frozenset({"slots"})).shadows() == ()


def test_fleet_says_what_each_kind_took() -> None:
    fleet = Fleet([random_head("a", 3), token_head(), rules_head()])
    answered = fleet.answer(heard(*random_units(2)), skip=frozenset({"slots"}))
    assert set(answered.seconds) == {"sentence", "rules"}
    assert all(seconds > 0 for seconds in answered.seconds.values())
