"""nlu.heads.verdict: a head's answers are those it gives when served, and every number is recomputed another way."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, fbeta_score, recall_score, roc_auc_score

from annotators.anchors import AnchorsHead
from annotators.annotator import Encoding, Heard, HeardTurn
from annotators.context import ContextHead
from annotators.fleet import Fleet
from nlu.heads import verdict
from nlu.heads.data import Row
from nlu.heads.material import Material
from nlu.heads.verdict import ClassHead, Verdict
from tests.annotators.toys import BLEND, ENERGY, make_spec, random_head, random_units

ROWS, STRANGERS = 120, 40


def material(vectors: NDArray[np.float32], labels: Sequence[tuple[str, ...]]) -> Material:
    """Rows of given vectors and labels; every third has a turn before it."""
    rows = [Row(f"a:{i}", "test", f"p{i}", f"p{i}", named) for i, named in enumerate(labels)]
    encodings = [Encoding(vector) for vector in vectors]
    turns = [[HeardTurn("assistant", encodings[i - 1])] if i % 3 else [] for i in range(len(rows))]
    return Material(rows, encodings, turns)


def strangers(count: int = STRANGERS, seed: int = 9) -> Material:
    return material(random_units(count, seed=seed), [()] * count)


def heads() -> dict[str, ClassHead]:
    linear = random_head("linear", 5)
    context = make_spec(
        linear.spec.labels, kind="context", params={"turns": 1, "alone": True}, thresholds=(0.3,) * 5
    )
    weight = np.random.default_rng(3).standard_normal((5, 4 * 8)).astype(np.float32)
    anchors = make_spec(
        linear.spec.labels, kind="anchors", scale=(9.0,) * 5, shift=(-5.0,) * 5,
        params={"patterns": {"linear2": ["^p1"]}},
    )  # fmt: skip
    return {
        "linear": linear,
        "two": random_head("linear", 2, seed=4),
        "blend": random_head("linear", 5, outside=BLEND),
        "energy": random_head("linear", 5, outside=ENERGY),
        "hidden": random_head("linear", 5, units=6),
        "several": random_head("linear", 5, exclusive=False),
        "context": ContextHead(context, weight, np.zeros(5, np.float32), 1),
        "anchors": AnchorsHead(anchors, random_units(10, seed=2), np.repeat(np.arange(5), 2)),
    }


HEADS = heads()


def labelled(head: ClassHead, seed: int = 1) -> Material:
    """Rows that the head mostly answers right, the last of them with a label that it does not have."""
    rng = np.random.default_rng(seed)
    vectors = random_units(ROWS, seed=seed)
    names = np.array(head.spec.labels)
    raw, scores, _ = verdict.answers(head, material(vectors, [()] * ROWS))
    named: list[tuple[str, ...]] = []
    for i in range(ROWS):
        if head.spec.exclusive:
            named.append((str(names[scores[i].argmax()] if rng.random() < 0.7 else rng.choice(names)),))
        else:
            flipped = (scores[i] >= 0.5) ^ (rng.random(len(names)) < 0.15)
            named.append(tuple(map(str, names[flipped])))
    return material(vectors, [*named[:-1], ("unheard_of",)])


def judged(name: str) -> Verdict:
    head = HEADS[name]
    return verdict.judge(head, labelled(head), strangers())


@pytest.mark.parametrize("name", HEADS)
def test_verdict_accepts_what_serving_accepts(name: str) -> None:
    head = HEADS[name]
    rows, outside = labelled(head), strangers()
    found = verdict.judge(head, rows, outside)
    fleet = Fleet([head])
    accepted = 0
    for part, said, scores in (
        (rows, found.accepted, found.scores),
        (outside, found.outside_accepted, found.outside),
    ):
        for i, encoding in enumerate(part.encodings):
            annotation = fleet.annotate(Heard.alone(part.rows[i].phrase, encoding, part.contexts[i]))[0]
            served = {label.label for label in annotation.labels if label.accepted}
            assert {head.spec.labels[j] for j in np.flatnonzero(said[i])} == served
            best = annotation.labels[0]
            assert scores[i, head.spec.labels.index(best.label)] == pytest.approx(best.score, abs=1e-5)
            accepted += len(served)
    assert 0 < accepted < (ROWS + STRANGERS) * (1 if head.spec.exclusive else len(head.spec.labels))


def test_verdict_threshold_is_not_rounded() -> None:
    score = np.float32(0.3)  # 0.30000001192...
    scores = np.array([[score, 1 - score]], np.float32)
    over = make_spec(("a", "b"), exclusive=False, thresholds=(float(score) + 1e-9, 0.9))
    at = make_spec(("a", "b"), exclusive=False, thresholds=(float(score), 0.9))
    assert verdict.decided(over, scores, None).tolist() == [[False, False]]
    assert verdict.decided(at, scores, None).tolist() == [[True, False]]


def gold(rows: Material, names: Sequence[str]) -> list[int]:
    return [list(names).index(row.labels[0]) if row.labels[0] in names else -1 for row in rows.rows]


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.spec.exclusive])
def test_verdict_summary_of_labels_that_exclude_each_other(name: str) -> None:
    head = HEADS[name]
    rows, names, beta = labelled(head), head.spec.labels, 1.8
    found = verdict.judge(head, rows, strangers())
    summary = verdict.summary(found, beta=beta)
    wanted = gold(rows, names)
    best = found.scores.argmax(axis=1).tolist()
    hits = sum(want == got for want, got in zip(wanted, best, strict=True))
    assert summary["accuracy"]["value"] == pytest.approx(hits / ROWS)
    present = sorted(set(wanted) - {-1})
    assert summary["macro_f1"]["value"] == pytest.approx(
        f1_score(wanted, best, labels=present, average="macro")
    )

    accepts = [got if found.accepted[i, got] else -2 for i, got in enumerate(best)]
    strange = [int(row.argmax()) if row.any() else -2 for row in found.outside_accepted]
    f_beta = fbeta_score(wanted + [-1] * STRANGERS, accepts + strange, beta=beta, labels=present, average="macro", zero_division=0)  # fmt: skip
    assert summary["f_beta"]["value"] == pytest.approx(f_beta)
    assert summary["f_beta"]["beta"] == beta
    sure = sum(want == got for want, got in zip(wanted, accepts, strict=True))
    said = sum(got >= 0 for got in accepts)
    heard = sum(got >= 0 for got in strange)
    assert summary["recall"]["value"] == pytest.approx(sure / (ROWS - 1))  # one row's label is not the head's
    assert summary["coverage"]["value"] == pytest.approx(said / ROWS)
    assert summary["accepted_precision"]["value"] == pytest.approx(sure / (said + heard))
    assert summary["outside_recall"]["value"] == pytest.approx(1 - heard / STRANGERS)
    assert ("auroc" in summary) == (len(names) == 2)
    if len(names) == 2:
        second = [want == 1 for want in wanted]
        assert summary["auroc"] == pytest.approx(roc_auc_score(second, found.scores[:, 1]))


def test_verdict_summary_of_any_number_of_labels() -> None:
    head = HEADS["several"]
    rows = labelled(head)
    found = verdict.judge(head, rows, rows.take([]))
    summary = verdict.summary(found, beta=0.5)
    wanted = np.array([[name in row.labels for name in head.spec.labels] for row in rows.rows])
    said = found.scores >= np.array(head.spec.thresholds)
    assert summary["macro_f1"]["value"] == pytest.approx(f1_score(wanted, said, average="macro"))
    assert summary["micro_f1"]["value"] == pytest.approx(f1_score(wanted, said, average="micro"))
    assert summary["f_beta"]["value"] == pytest.approx(fbeta_score(wanted, said, beta=0.5, average="macro"))
    assert summary["recall"]["value"] == pytest.approx(recall_score(wanted, said, average="micro"))
    assert summary["auroc"] == pytest.approx(roc_auc_score(wanted, found.scores))
    assert not {"accuracy", "outside_recall"} & summary.keys()


@pytest.mark.parametrize("name", HEADS)
def test_verdict_exact_is_just_what_is_wanted(name: str) -> None:
    head = HEADS[name]
    rows, found = labelled(head), judged(name)
    for i, row in enumerate(rows.rows):
        said = {head.spec.labels[j] for j in np.flatnonzero(found.accepted[i])}
        assert found.exact[i] == (said == set(row.labels))
    assert not found.exact[-1]  # silence is no right answer to a label that the head does not have


def equal_bins(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error over ten bins of as equal size as can be, one pair after the other."""
    pairs = sorted(zip(scores, right, strict=True), key=lambda pair: pair[0])
    base, more = divmod(len(pairs), 10)
    gap, at = 0.0, 0
    for number in range(10):
        mine = pairs[at : at + base + (number < more)]
        at += len(mine)
        gap += abs(sum(score for score, _ in mine) - sum(hit for _, hit in mine))
    return gap / len(pairs)


@pytest.mark.parametrize("name", HEADS)
def test_verdict_calibration_error_before_and_after(name: str) -> None:
    head = HEADS[name]
    rows, found = labelled(head), judged(name)
    wanted = np.array([[label in row.labels for label in head.spec.labels] for row in rows.rows])
    raw = found.raw.astype(np.float64)
    plain: NDArray[Any]
    if name == "anchors":
        plain = raw
    elif head.spec.exclusive:
        plain = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    else:
        plain = 1 / (1 + np.exp(-raw))
    both: list[NDArray[Any]] = [plain, found.scores]
    for scores, error in zip(both, verdict.calibration_errors(found), strict=True):
        if head.spec.exclusive:
            best = scores.argmax(axis=1)
            pairs = [(float(scores[i, j]), bool(wanted[i, j])) for i, j in enumerate(best)]
        else:
            pairs = [
                (float(score), bool(hit)) for score, hit in zip(scores.ravel(), wanted.ravel(), strict=True)
            ]
        assert error == pytest.approx(equal_bins(*zip(*pairs, strict=True)), abs=1e-5)


@given(st.integers(1, 5000), st.data())
def test_verdict_share_is_wilsons(total: int, drawn: st.DataObject) -> None:
    count = drawn.draw(st.integers(0, total))
    found = verdict.share(count, total)
    p = count / total
    assert found["value"] == p
    assert 0 <= found["low"] <= p + 1e-9 and p - 1e-9 <= found["high"] <= 1
    for end in (found["low"], found["high"]):
        # Wilson: the shares from which what was seen is z standard errors away (those of the share, not of what was seen)
        assert abs(p - end) == pytest.approx(1.96 * sqrt(end * (1 - end) / total), abs=1e-7)


def test_verdict_share_of_nothing_is_anything() -> None:
    assert verdict.share(0, 0) == {"value": 0.0, "low": 0.0, "high": 1.0}


def f1(counts: verdict.Counts) -> NDArray[np.float64]:
    return verdict.f_scores(counts, 1.0)


def test_verdict_intervals_hold_the_value_and_shrink_with_rows() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.random((1600, 3)) < 0.3
    said = wanted ^ (rng.random((1600, 3)) < 0.1)
    few, many = verdict.resampled(wanted[:100], said[:100], f1), verdict.resampled(wanted, said, f1)
    assert many == verdict.resampled(wanted, said, f1)  # the same resamples every time
    for i in range(3):
        assert few["low"][i] <= few["value"][i] <= few["high"][i]
        width = [each["high"][i] - each["low"][i] for each in (few, many)]
        assert width[0] / width[1] == pytest.approx(4, rel=0.5)  # the root of sixteen times as many rows


def test_verdict_interval_is_as_wide_as_what_other_samples_give() -> None:
    def sample(seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        wanted = rng.random((200, 1)) < 0.4
        return wanted, wanted ^ (rng.random((200, 1)) < 0.2)

    truth = float(np.mean([verdict.resampled(*sample(seed), f1)["value"] for seed in range(1000, 1100)]))
    held = [found["low"][0] <= truth <= found["high"][0] for found in (verdict.resampled(*sample(seed), f1) for seed in range(100))]  # fmt: skip
    assert 88 <= sum(held) <= 100


def test_verdict_macro_is_over_labels_that_some_row_has() -> None:
    found = judged("linear")
    only = found.wanted[:, 1]
    part = Verdict(
        found.spec, found.phrases, found.raw[only], found.scores[only], found.wanted[only], found.known[only], None, found.outside, None
    )  # fmt: skip
    wanted = [1] * int(only.sum())
    summary = verdict.summary(part, beta=1.0)
    assert summary["macro_f1"]["value"] == pytest.approx(
        f1_score(wanted, part.best, labels=[1], average="macro")
    )


def test_verdict_of_no_strangers_and_without_a_score_for_them() -> None:
    head = HEADS["blend"]
    raw, scores, strangeness = verdict.answers(head, strangers(0))
    assert raw.shape == scores.shape == (0, 5) and strangeness is not None and strangeness.shape == (0,)
    assert verdict.answers(HEADS["linear"], strangers(0))[2] is None


@pytest.mark.parametrize(("measure", "value"), [(0.5, 0.5), ({"value": 0.25, "low": 0, "high": 1}, 0.25)])
def test_verdict_value_of_a_measure(measure: Any, value: float) -> None:
    assert verdict.value_of(measure) == value
