"""nlu.heads.report: every section says what a slow and plain count of the same answers says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from nlu.heads import report, verdict
from nlu.heads.data import Dataset, Row, Source
from nlu.heads.verdict import Verdict
from tests.annotators.toys import random_units
from tests.nlu.heads.test_verdict import HEADS, judged, labelled, material, strangers

EXCLUSIVE = [name for name, head in HEADS.items() if head.spec.exclusive]


def said(found: Verdict) -> list[int]:
    """The label that is accepted of each row and each outsider, -2 for none; labels exclude each other."""
    both = np.concatenate([found.accepted, found.outside_accepted])
    return [int(row.argmax()) if row.any() else -2 for row in both]


def meant(found: Verdict) -> list[int]:
    """The label of each row and each outsider, -1 where the head has none for it."""
    rows = [int(row.argmax()) if row.any() else -1 for row in found.wanted]
    return rows + [-1] * len(found.outside)


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_report_classes_are_those_of_scikit_learn(name: str) -> None:
    found = judged(name)
    numbers = range(len(found.spec.labels))
    precision, recall, f1, support = precision_recall_fscore_support(meant(found), said(found), labels=numbers, zero_division=0)  # fmt: skip
    rows = report.classes(found)
    assert [row["f1"]["value"] for row in rows] == sorted(row["f1"]["value"] for row in rows)  # worst first
    for row in rows:
        i = found.spec.labels.index(row["label"])
        assert row["support"] == support[i]
        assert row["precision"]["value"] == pytest.approx(precision[i])
        assert row["recall"]["value"] == pytest.approx(recall[i])
        assert row["f1"]["value"] == pytest.approx(f1[i])
        assert row["threshold"] == found.spec.thresholds[i]
        for measure in ("precision", "recall", "f1"):
            assert row[measure]["low"] <= row[measure]["value"] + 1e-9
            assert row[measure]["value"] - 1e-9 <= row[measure]["high"]


def test_report_classes_of_any_number_of_labels() -> None:
    found = judged("several")
    wanted, accepted = found.everyone
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, accepted, zero_division=0)
    for row in report.classes(found):
        i = found.spec.labels.index(row["label"])
        assert (row["precision"]["value"], row["recall"]["value"]) == pytest.approx((precision[i], recall[i]))
        assert row["f1"]["value"] == pytest.approx(f1[i])


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_report_confusions_are_what_was_said_for_what(name: str) -> None:
    found = judged(name)
    names = found.spec.labels
    matrix = confusion_matrix(meant(found)[: len(found.wanted)], found.best, labels=range(len(names)))
    np.fill_diagonal(matrix, 0)
    wanted = Counter({(i, j): int(count) for (i, j), count in np.ndenumerate(matrix) if count})
    pairs = report.confusions(found)
    counts = [pair["count"] for pair in pairs]
    assert counts == sorted(wanted.values(), reverse=True)[:15]
    for pair in pairs:
        want, got = names.index(pair["gold"]), names.index(pair["predicted"])
        assert wanted[want, got] == pair["count"]
        assert len(pair["phrases"]) == min(5, pair["count"])
        scores = [phrase["score"] for phrase in pair["phrases"]]
        assert scores == sorted(scores, reverse=True)
        for phrase in pair["phrases"]:
            i = int(phrase["text"].removeprefix("p"))
            assert found.wanted[i, want] and found.best[i] == got
            assert phrase["score"] == pytest.approx(found.scores[i, got])


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_report_coverage_is_what_each_threshold_gives(name: str) -> None:
    found = judged(name)
    best = found.scores.max(axis=1)
    points = report.coverage(found)
    assert points[-1]["coverage"] == 1.0
    assert len({point["threshold"] for point in points}) == len(points)
    for point in points:
        over = best >= np.float32(point["threshold"])
        assert point["coverage"] == pytest.approx(over.mean())
        assert point["precision"] == pytest.approx(found.right[over].mean())


def test_report_coverage_is_for_labels_that_exclude_each_other() -> None:
    assert report.coverage(judged("several")) == report.confusions(judged("several")) == []


@pytest.mark.parametrize("name", HEADS)
def test_report_curves_are_what_each_threshold_gives_and_the_chosen_one_is_on_them(name: str) -> None:
    found = judged(name)
    worst = report.classes(found)
    curves = report.curves(found, worst)
    sayable = dict(zip(found.spec.labels, np.atleast_1d(found.sayable.any(axis=0)), strict=True))
    assert [curve["label"] for curve in curves] == [
        row["label"] for row in worst if row["support"] and sayable[row["label"]]
    ]
    for curve in curves:
        label = found.spec.labels.index(curve["label"])
        scores = np.concatenate([found.scores, found.outside])[:, label]
        possible = scores[found.sayable[:, label]]
        wanted = found.everyone[0][:, label]
        reached = set()
        for threshold in np.unique(possible):
            over = (scores >= threshold) & found.sayable[:, label]
            reached.add(
                (round(float(wanted[over].sum() / wanted.sum()), 9), round(float(wanted[over].mean()), 9))
            )
        drawn = [(round(r, 9), round(p, 9)) for r, p in zip(curve["recall"], curve["precision"], strict=True)]
        assert set(drawn) <= reached
        if len(np.unique(possible)) <= 60:  # else some are left out
            assert set(drawn) == reached
            chosen = (round(curve["chosen"][0], 9), round(curve["chosen"][1], 9))
            assert chosen in (reached if possible.max() >= curve["threshold"] else {(0.0, 0.0)})


def test_report_cuts_stand_at_the_last_of_equal_scores() -> None:
    assert report._cuts(np.array([0.9, 0.9, 0.5, 0.1, 0.1])) == [1, 2, 4]
    many = report._cuts(np.linspace(1, 0, 1000))
    assert len(many) == 60 and (many[0], many[-1]) == (0, 999)


@pytest.mark.parametrize("name", HEADS)
def test_report_reliability_keeps_all_answers_and_their_error(name: str) -> None:
    found = judged(name)
    sections = report.reliability(found)
    for side, error in zip(("before", "after"), verdict.calibration_errors(found), strict=True):
        bins = sections[side]
        answers = found.scores.size if not found.spec.exclusive else len(found.scores)
        assert sum(part["rows"] for part in bins) == answers
        gaps = sum(abs(part["score"] - part["right"]) * part["rows"] for part in bins)
        assert gaps / answers == pytest.approx(error, abs=1e-6)
        assert [part["score"] for part in bins] == sorted(part["score"] for part in bins)


@pytest.mark.parametrize("name", HEADS)
def test_report_errors_are_the_surest_first_beside_their_neighbours(name: str) -> None:
    head = HEADS[name]
    rows, found = labelled(head), judged(name)
    train = material(random_units(30, seed=5), [(label,) for label in head.spec.labels * 30][:30])
    errors = report.errors(found, rows, train)
    wrong = np.flatnonzero(~(found.right if head.spec.exclusive else found.exact))
    assert len(errors) == min(40, len(wrong))
    shown = [int(error["text"].removeprefix("p")) for error in errors]
    assert set(shown) <= set(wrong.tolist())
    if head.spec.exclusive:
        assert [error["score"] for error in errors] == sorted((float(found.scores[i].max()) for i in wrong), reverse=True)[:40]  # fmt: skip
    for i, error in zip(shown, errors, strict=True):
        assert error["gold"] == (", ".join(rows.rows[i].labels) or "nothing")
        cosines = train.vectors @ rows.encodings[i].sentence
        nearest = np.argsort(-cosines)[:3]
        assert [near["text"] for near in error["nearest"]] == [train.phrases[j] for j in nearest]
        assert [near["cosine"] for near in error["nearest"]] == pytest.approx(
            cosines[nearest].tolist(), abs=1e-6
        )
        assert error["nearest"][0]["label"] == train.rows[nearest[0]].labels[0]


def test_report_errors_of_folds_are_not_their_own_neighbours() -> None:
    head = HEADS["linear"]
    rows = labelled(head)
    found = judged("linear")
    for error in report.errors(found, rows, rows):
        assert error["text"] not in [near["text"] for near in error["nearest"]]
        assert max(near["cosine"] for near in error["nearest"]) < 1 - 1e-4


def test_report_lengths_are_parts_of_the_rows() -> None:
    texts = ["a", "a b c", "a b c d", " ".join("a" * 12), " ".join("a" * 13), " ".join("a" * 99)]
    right = np.array([True, False, True, True, False, False])
    slices = report.lengths(texts, right)
    assert [(part["value"], part["rows"], part["accuracy"]["value"]) for part in slices] == [
        ("1-3 words", 2, 0.5),
        ("4-7 words", 1, 1.0),
        ("8-12 words", 1, 1.0),
        ("13 words or more", 2, 0.0),
    ]
    assert [part["value"] for part in report.lengths(texts[:2], right[:2])] == ["1-3 words"]


@pytest.mark.parametrize("name", ["blend", "energy"])
def test_report_outside_counts_both_sides(name: str) -> None:
    found = judged(name)
    assert found.strangeness is not None and found.outside_strangeness is not None
    section = report.outside(found, {"energy": 0.8}, 0.75)
    assert section is not None
    threshold = found.spec.outside.threshold if found.spec.outside else 0.0
    assert section["recall"]["value"] == pytest.approx((found.outside_strangeness >= threshold).mean())
    assert section["false_alarms"]["value"] == pytest.approx((found.strangeness >= threshold).mean())
    assert (section["auroc"], section["candidates"]) == (0.75, [{"method": "energy", "auroc": 0.8}])
    assert sum(section["scores"]["inside"]) == len(found.strangeness)
    assert sum(section["scores"]["outside"]) == len(found.outside_strangeness)


def test_report_outside_without_strangers_or_without_a_score() -> None:
    head = HEADS["blend"]
    section = report.outside(verdict.judge(head, labelled(head), strangers(0)), {}, None)
    assert section is not None and not {"auroc", "recall", "scores"} & section.keys()
    assert report.outside(judged("linear"), {}, None) is None


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("lights on", "latin"), ("12:30", "none"), ("👍", "none"), ("включи", "cyrillic"), ("включи tv", "cyrillic"),
        ("включи netflix", "latin"), ("straße à gogo", "latin"), ("電気", "other"), ("φως on ok", "latin"),
    ],
)  # fmt: skip
def test_report_script_is_that_of_most_letters(phrase: str, name: str) -> None:
    assert report.script(phrase) == name


def test_report_about_counts_rows_by_split() -> None:
    def row(split: str, phrase: str, *labels: str) -> Row:
        return Row("a:1", split, phrase, phrase, labels)

    rows = (
        row("train", "lights on", "a"), row("train", "свет", "a"), row("test", "on and on and on", "b"), row("test", "x"),
    )  # fmt: skip
    about = report.about(Dataset(rows, (Source("a.tsv", "0" * 64, 4),)))
    assert about["rows"] == {"train": 2, "test": 1, "outside": 1}
    assert about["scripts"] == {"latin": 0.75, "cyrillic": 0.25}
    assert about["words"] == {"median": 1.5, "p95": pytest.approx(np.percentile([2, 1, 5, 1], 95))}
    assert about["files"] == [{"path": "a.tsv", "sha256": "0" * 64, "rows": 4}]
    assert report.about(Dataset(rows, (), multi=True))["rows"] == {"train": 2, "test": 2, "outside": 0}


@pytest.mark.parametrize("name", HEADS)
def test_report_cost_is_a_number_of_microseconds(name: str) -> None:
    assert 0 < report.cost_us(HEADS[name], labelled(HEADS[name])) < 1e6
