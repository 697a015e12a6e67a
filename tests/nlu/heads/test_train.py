"""nlu.heads.train: from labelled lines to a head that a bundle serves, of every kind; nothing of test reaches the head."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from annotators import table
from annotators.annotator import Annotation, Heard, HeardTurn
from annotators.fleet import Fleet
from annotators.learners import BoostedLearner, HiddenLearner, LinearLearner
from nlu import loading
from nlu.heads import config as configs
from nlu.heads import data, lifecycle
from nlu.heads.data import DataInvalid, Row
from nlu.heads.train import PAGE, REPORT, Trained, plan_of
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import ASKED, KNOWN, SPRINTS, STRANGE, STRANGE_ASKED, Sprint, Trainer
from tests.tiny import Made

TESTED = [name for name, sprint in SPRINTS.items() if sprint.test]
CLASSES = [name for name in TESTED if SPRINTS[name].options.get("kind") != "token"]
EXCLUSIVE = [name for name in CLASSES if name != "several"]
SPANS = ["spans", "restore"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(trained: Trained, split: str = "test") -> list[Row]:
    """The rows of a split, those of no label last."""
    folder = trained.folder.parent.parent
    head = table.load(trained.folder)
    config = configs.load(
        None, name="x", kind=head.spec.kind, multi=(not head.spec.exclusive) or None,
        scheme="restore" if head.spec.params.get("restores") else None, files={"test": [folder / f"{split}.jsonl"]},
    )  # fmt: skip
    read = data.read(config, uncased=True)
    return [*read.split("test"), *read.split("test", outside=True)]


def answers(trained: Trained, asked: Sequence[Row], vectorizer: Vectorizer) -> list[Annotation]:
    """What the head, as it lies in its folder, answers when it is served."""
    fleet = Fleet([table.load(trained.folder)])
    found = []
    for row in asked:
        encoding, *before = vectorizer.encode([row.phrase, *(turn.text for turn in row.context)])
        turns = [HeardTurn(turn.role, said) for turn, said in zip(row.context, before, strict=True)]
        found.append(fleet.annotate(Heard.alone(row.phrase, encoding, turns))[0])
    return found


# From a file to an answer.

ASKS = {  # a phrase that each head gets right, with what was said before
    "linear": ("abcd dcba", "", "lamp"),
    "hidden": ("жзий ийзж", "", "погода"),
    "left out": ("klmn nmlk", "", "music"),
    "folds": ("klmn nmlk", "", "music"),
    "several": ("abcd dcba klmn nmlk", "", "lamp, music"),
    "context": ("yes", "abcd dcba", "lamp"),
    "boosted": ("klmn nmlk", "", "music"),
    "anchors": ("wxyz spark wxyz", "", "lamp"),  # a pattern
    "anchors alone": ("klmn nmlk", "", "music"),
    "spans": ("abcd oprq abcd", "", "name=oprq"),
    "restore": ("abcd dcba oprq wxyz", "", "Aa=oprq, ?=wxyz"),
    "rules": ("ring at 07:15", "", "clock=07:15"),
}


@pytest.mark.parametrize("name", ASKS)
def test_train_makes_heads_that_a_bundle_takes_and_serves(
    trained: Trainer, tiny: Made, bundled: Vectorizer, tmp_path: Path, name: str
) -> None:
    head = trained(name)
    new = lifecycle.add(tiny.bundle, head.folder.parent, tmp_path / "new")  # with canaries and golden phrases
    engine = loading.load(new)
    text, before, wanted = ASKS[name]
    encoding, asked = engine.vectorizer.encode([text, before or "well"])
    turns = [HeardTurn("assistant", asked)] if before else []
    heard = Heard.alone(text, encoding, turns)
    answer = {found.name: found for found in engine.fleet.annotate(heard)}["sprint"]
    labels = sorted(label.label for label in answer.labels if label.accepted)
    spans = [f"{span.label}={text[span.start : span.end]}" for span in answer.spans]
    assert ", ".join([*labels, *spans]) == wanted
    if name == "restore":
        assert answer.restored == "abcd dcba Oprq wxyz?"


def test_train_refuses_words_that_its_own_tests_contradict(
    bundled: Vectorizer, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"'stop.' answered with \['stop'\], expected \['go'\]; mend the rule"
    ):
        SPRINTS["rules"].run(tmp_path, bundled, store, tests={"stop.": ["go"]})
    assert not (tmp_path / "out").exists()


# What is kept apart.


def permuted(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with what they teach handed on to the next but some."""
    taught = [
        {key: value for key, value in line.items() if key in ("label", "labels", "spans")} for line in lines
    ]
    turned = taught[7:] + taught[:7]
    kept = [
        {key: value for key, value in line.items() if key not in ("label", "labels", "spans")}
        for line in lines
    ]
    return [line | other for line, other in zip(kept, turned, strict=True)]


OTHER_TESTS = {
    **{name: permuted(SPRINTS[name].test) for name in CLASSES},
    "spans": phrases.marked(30, 7),
    "restore": phrases.spelt(30, 7),
}


@pytest.mark.parametrize("name", TESTED)
def test_train_never_learns_from_test(
    trained: Trainer, bundled: Vectorizer, store: Path, tmp_path: Path, name: str
) -> None:
    sprint = replace(SPRINTS[name], test=OTHER_TESTS[name])
    assert sprint.test != SPRINTS[name].test
    again = sprint.run(tmp_path, bundled, store)
    made = files(again.folder)
    assert made == files(trained(name).folder)
    assert again.report["summary"] != trained(name).report["summary"]  # it is measured on, though
    # the control: the same change to what is learnt from does show
    taught = permuted(sprint.train) if name in CLASSES else OTHER_TESTS[name]
    other = replace(SPRINTS[name], train=taught).run(tmp_path, bundled, store, skip_bad=True)
    assert files(other.folder) != made


@pytest.mark.parametrize("name", ["linear", "left out", "anchors"])
def test_train_never_learns_from_strangers_of_test(
    bundled: Vectorizer, store: Path, tmp_path: Path, name: str
) -> None:
    without = replace(SPRINTS[name], test=ASKED)
    plain = files(without.run(tmp_path, bundled, store).folder)
    many = replace(without, test=[*ASKED, *phrases.strange(40, 9)])
    assert files(many.run(tmp_path, bundled, store).folder) == plain
    told = replace(without, train=[*without.train, *phrases.strange(40, 9)])  # the control
    assert files(told.run(tmp_path, bundled, store).folder) != plain


@pytest.mark.parametrize("name", [name for name in SPRINTS if name != "rules"])
def test_train_is_the_same_every_time(
    trained: Trainer, bundled: Vectorizer, store: Path, tmp_path: Path, name: str
) -> None:
    again = SPRINTS[name].run(tmp_path, bundled, store)
    assert files(again.folder) == files(trained(name).folder)
    timeless = [
        {key: value for key, value in each.report.items() if key not in ("seconds", "cost_us", "vectors", "data", "head")}
        for each in (again, trained(name))
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_train_weighs_rows(bundled: Vectorizer, store: Path, tmp_path: Path) -> None:
    plain = replace(SPRINTS["linear"], train=KNOWN)
    heavy = replace(plain, train=[line | {"weight": 5.0 if i % 2 else 1.0} for i, line in enumerate(KNOWN)])
    level = replace(plain, train=[line | {"weight": 1} for line in KNOWN])
    found = [
        files(each.run(tmp_path, bundled, store).folder)["weights.safetensors"]
        for each in (plain, heavy, level)
    ]
    assert found[0] == found[2] != found[1]


def test_train_uses_dev_for_thresholds_alone(bundled: Vectorizer, store: Path, tmp_path: Path) -> None:
    plain = SPRINTS["linear"]
    with_dev = replace(plain, dev=[*phrases.labelled(9, 5), {"text": "hm", "label": "who knows"}])
    one = files(plain.run(tmp_path, bundled, store).folder)
    other = files(with_dev.run(tmp_path, bundled, store).folder)
    assert one["weights.safetensors"] == other["weights.safetensors"]
    assert one["head.json"] != other["head.json"]


# The report.


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_train_reports_what_the_stored_head_answers(trained: Trainer, bundled: Vectorizer, name: str) -> None:
    head = trained(name)
    asked = rows(head)
    inside = [row for row in asked if row.labels]
    found = answers(head, asked, bundled)
    mine = found[: len(inside)]
    summary, labels = head.report["summary"], head.report["head"]["labels"]
    assert head.report["measured_on"] == "test"
    assert head.report["data"]["rows"]["test"] == len(inside)

    wanted = [row.labels[0] for row in inside]
    best = [answer.labels[0].label for answer in mine]
    right = [want == got for want, got in zip(wanted, best, strict=True)]
    share, n = sum(right) / len(right), len(right)
    assert 0.5 < share < 1
    assert summary["accuracy"]["value"] == pytest.approx(share)
    assert [summary["accuracy"][end] for end in ("low", "high")] == pytest.approx(wilson(share, n))
    known = sorted(set(wanted) & set(labels))
    assert summary["macro_f1"]["value"] == pytest.approx(
        f1_score(wanted, best, labels=known, average="macro")
    )
    sure = [answer.labels[0].accepted for answer in mine]
    heard = [answer.labels[0].accepted for answer in found[len(inside) :]]
    assert summary["coverage"]["value"] == pytest.approx(sum(sure) / n)
    assert summary["recall"]["value"] == pytest.approx(
        sum(hit and yes for hit, yes in zip(right, sure, strict=True))
        / sum(want in labels for want in wanted)
    )
    scores = [answer.labels[0].score for answer in mine]
    assert summary["ece_after"] == pytest.approx(calibration_error(scores, right), abs=1e-5)
    if heard:
        assert summary["outside_recall"]["value"] == pytest.approx(1 - sum(heard) / len(heard))
    for row in head.report["classes"]:
        said = [
            want for want, got, yes in zip(wanted, best, sure, strict=True) if yes and got == row["label"]
        ]
        strange = sum(
            answer.labels[0].accepted and answer.labels[0].label == row["label"]
            for answer in found[len(inside) :]
        )
        assert row["support"] == wanted.count(row["label"])
        assert row["precision"]["value"] == pytest.approx(
            said.count(row["label"]) / max(1, len(said) + strange)
        )
        assert row["recall"]["value"] == pytest.approx(said.count(row["label"]) / max(1, row["support"]))


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The roots of (share - p)^2 = z^2 p (1 - p) / n in p."""
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    spread = sqrt(b * b - 4 * a * c)
    return (-b - spread) / (2 * a), (-b + spread) / (2 * a)


def calibration_error(scores: list[float], right: list[bool]) -> float:
    order = sorted(range(len(scores)), key=scores.__getitem__)
    parts = np.array_split(np.array(order), 10)
    return float(sum(abs(sum(scores[i] - right[i] for i in part)) for part in parts) / len(scores))


@pytest.mark.parametrize("name", ["linear", "hidden", "left out"])
def test_train_reports_how_strangers_are_told(trained: Trainer, bundled: Vectorizer, name: str) -> None:
    head = trained(name)
    asked = rows(head)
    scores = [answer.out_of_scope for answer in answers(head, asked, bundled)]
    strange = [not row.labels for row in asked]
    section = head.report["outside"]
    assert section["auroc"] == pytest.approx(roc_auc_score(strange, scores))
    assert section["auroc"] > 0.9
    over = [score is not None and score >= section["threshold"] for score in scores]
    caught = [yes for yes, stranger in zip(over, strange, strict=True) if stranger]
    alarms = [yes for yes, stranger in zip(over, strange, strict=True) if not stranger]
    assert section["recall"]["value"] == pytest.approx(sum(caught) / len(caught))
    assert section["false_alarms"]["value"] == pytest.approx(sum(alarms) / len(alarms))


def test_train_reports_any_number_of_labels(trained: Trainer, bundled: Vectorizer) -> None:
    head = trained("several")
    asked = rows(head)
    labels = head.report["head"]["labels"]
    wanted = np.array([[label in row.labels for label in labels] for row in asked])
    accepted = [
        {label.label for label in answer.labels if label.accepted} for answer in answers(head, asked, bundled)
    ]
    said = np.array([[label in each for label in labels] for each in accepted])
    summary = head.report["summary"]
    assert summary["macro_f1"]["value"] == pytest.approx(f1_score(wanted, said, average="macro"))
    assert summary["micro_f1"]["value"] == pytest.approx(f1_score(wanted, said, average="micro"))


@pytest.mark.parametrize("name", SPANS)
def test_train_reports_spans_that_the_stored_head_marks(
    trained: Trainer, bundled: Vectorizer, name: str
) -> None:
    head = trained(name)
    asked = rows(head)
    found = [{span[:3] for span in answer.spans} for answer in answers(head, asked, bundled)]
    gold = [{tuple(mark) for mark in row.marks} for row in asked]
    hits = sum(len(f & g) for f, g in zip(found, gold, strict=True))
    proposed, wanted = sum(map(len, found)), sum(map(len, gold))
    summary = head.report["summary"]
    assert summary["precision"]["value"] == pytest.approx(hits / proposed)
    assert summary["recall"]["value"] == pytest.approx(hits / wanted)
    assert summary["span_f1"]["value"] == pytest.approx(2 * hits / (proposed + wanted))
    assert 0.5 < summary["span_f1"]["value"] < 1


@pytest.mark.parametrize("name", ["folds", "spans of folds"])
def test_train_measures_on_folds_where_there_is_no_test(trained: Trainer, name: str) -> None:
    report = trained(name).report
    assert report["measured_on"] == "folds"
    sprint = SPRINTS[name]
    if name == "folds":
        support = sum(row["support"] for row in report["classes"])
        assert support == len([line for line in sprint.train + sprint.dev if line["label"] != "oos"])
        assert 0.8 < report["summary"]["accuracy"]["value"] < 1
        for error in report["errors"]:
            assert error["text"] not in [near["text"] for near in error["nearest"]]
    else:
        wanted = sum(len(line["spans"]) for line in sprint.train)
        assert sum(row["support"] for row in report["classes"]) == wanted


def test_train_measures_nothing_where_anchors_would_answer_themselves(trained: Trainer) -> None:
    report = trained("anchors alone").report
    assert report["measured_on"] is None
    assert not {"summary", "classes", "slices"} & report.keys()


@pytest.mark.parametrize("name", SPRINTS)
def test_train_writes_a_report_that_every_program_reads(trained: Trainer, name: str) -> None:
    found = trained(name)
    text = (found.folder.parent / REPORT).read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == found.report
    head = found.report["head"]
    assert head["version"] == table.load(found.folder).version
    assert head["bytes"] == sum(map(len, files(found.folder).values()))
    assert found.report["seconds"]["total"] == pytest.approx(
        sum(seconds for part, seconds in found.report["seconds"].items() if part != "total"), abs=0.01
    )


class _Words(HTMLParser):
    """The texts of a page that a reader sees, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.texts.append(" ".join(data.split()))


@pytest.mark.parametrize("name", SPRINTS)
def test_train_writes_a_page_of_it(trained: Trainer, name: str) -> None:
    found = trained(name)
    page = (found.folder.parent / PAGE).read_text(encoding="utf-8")
    words = _Words()
    words.feed(page)
    shown = "\n".join(words.texts)
    assert not re.search(r"\b(None|nan|NaN|inf|null|Undefined)\b", shown)
    sections = set(re.findall(r'<section id="(\w+)"', page))
    filled = {key for key, value in found.report.items() if value}
    assert sections - {"made"} <= filled
    without = {"format", "head", "data", "seconds", "vectors", "cost_us", "measured_on", "regularisation"}
    assert filled - without <= sections
    if accuracy := found.report.get("summary", {}).get("accuracy"):
        assert f"{accuracy['value']:.3f}" in words.texts


# What is asked for beside the head.


def test_train_trials_are_those_that_were_asked_for(trained: Trainer) -> None:
    report = trained("linear").report
    assert [part["shots"] for part in report["few_shot"]] == [2, 5]
    assert report["cross_validation"]["folds"] == 3
    assert [part["rows"] for part in report["learning_curve"]] == [6, 12, 24, len(KNOWN)]
    assert report["learning_curve"][-1]["accuracy"] == report["summary"]["accuracy"]
    for name in ("folds", "several", "boosted"):
        assert "cross_validation" not in trained(name).report


def test_train_reports_what_context_brings(trained: Trainer) -> None:
    ablation = trained("context").report["ablation"]
    assert [step["features"] for step in ablation] == [
        "text alone",
        "with 1 turn before",
        "with 2 turns before",
    ]
    alone, one, _ = (step["accuracy"]["value"] for step in ablation)
    assert alone < 0.65 < 0.75 < one  # four of the twenty are labelled wrong


def test_train_counts_vectors_it_had_to_compute(bundled: Vectorizer, tmp_path: Path) -> None:
    sprint = Sprint([*KNOWN, KNOWN[0]], ASKED + STRANGE_ASKED)
    distinct = len({line["text"] for line in [*KNOWN, *ASKED, *STRANGE_ASKED]})
    cold = sprint.run(tmp_path, bundled, tmp_path / "store").report["vectors"]
    warm = sprint.run(tmp_path, bundled, tmp_path / "store").report["vectors"]
    assert (cold, warm) == ({"encoded": distinct, "from_store": 0}, {"encoded": 0, "from_store": distinct})


def test_train_tells_how_far_it_is(bundled: Vectorizer, tmp_path: Path) -> None:
    from nlu.heads.train import train

    steps: list[tuple[str, int, int]] = []
    config = SPRINTS["linear"].config(tmp_path)
    train(
        config,
        bundled,
        tmp_path / "store",
        tmp_path / "out",
        workers=2,
        progress=lambda *step: steps.append(step),
    )
    assert {what for what, _, _ in steps} == {"encoding", "fitting", "2 phrases a label", "5 phrases a label", "cross-validation"}  # fmt: skip
    assert all(0 <= done <= total for _, done, total in steps)


@pytest.mark.parametrize(
    ("options", "learner"),
    [
        ({}, LinearLearner()),
        ({"regularisations": [8, 1]}, LinearLearner((1.0, 8.0))),
        ({"hidden": 4, "seed": 3}, HiddenLearner(4, seed=3)),
        ({"hidden": 4, "regularisations": [10]}, HiddenLearner(4, strengths=(10.0,))),
        ({"kind": "boosted", "leaves": 7}, BoostedLearner(7)),
        ({"kind": "boosted", "regularisations": [20]}, BoostedLearner(strengths=(20.0,))),
    ],
)
def test_train_plans_what_the_config_says(options: dict[str, Any], learner: Any) -> None:
    plan = plan_of(configs.load(None, name="x", folds=4, balanced=True, beta=1.5, **options))
    assert (plan.learner, plan.folds, plan.balanced, plan.beta) == (learner, 4, True, 1.5)


# Refusals.


def test_train_refuses_bad_rows_by_line_and_writes_nothing(
    bundled: Vectorizer, store: Path, tmp_path: Path
) -> None:
    bad = [{"text": "?" * i, "label": "lamp"} for i in range(1, 14)]
    sprint = Sprint([*KNOWN, *bad])
    with pytest.raises(DataInvalid) as caught:
        sprint.run(tmp_path, bundled, store)
    lines = str(caught.value).splitlines()
    assert lines[0] == "data: found 13 errors, expected none:"
    assert re.fullmatch(
        r"train.jsonl:46: text that cannot be said: found .*; mend or drop the line", lines[1]
    )
    assert len(lines) == 12 and lines[-1] == "... and 3 more; `nlu heads check` shows all"
    assert not (tmp_path / "out").exists()


def test_train_leaves_bad_rows_out_where_told(bundled: Vectorizer, store: Path, tmp_path: Path) -> None:
    with_bad = Sprint([*KNOWN, *STRANGE, {"text": "?!", "label": "lamp"}], ASKED)
    found = with_bad.run(tmp_path, bundled, store, skip_bad=True)
    bad = [each for each in found.findings if each.what == "text that cannot be said"]
    assert [(each.severity, each.where) for each in bad] == [("warning", "train.jsonl:58")]
    without = Sprint([*KNOWN, *STRANGE], ASKED).run(tmp_path, bundled, store)
    assert files(found.folder) == files(without.folder)


def test_train_replaces_a_head_and_nothing_else(bundled: Vectorizer, store: Path, tmp_path: Path) -> None:
    sprint = Sprint(KNOWN)
    head = sprint.run(tmp_path, bundled, store).folder
    (head / "left.over").write_text("x")
    assert not (sprint.run(tmp_path, bundled, store).folder / "left.over").exists()
    (head / "head.json").unlink()
    kept = files(head)
    with pytest.raises(
        ValueError, match=r"head.sprint: found what is no head, expected nothing or a head to replace"
    ):
        sprint.run(tmp_path, bundled, store)
    assert files(head) == kept


def test_train_lets_go_of_the_store_when_it_fails(
    bundled: Vectorizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[sqlite3.Connection] = []
    real = sqlite3.connect

    class Watched(sqlite3.Connection):
        def close(self) -> None:
            closed.append(self)
            super().close()

    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: real(*args, factory=Watched, **kwargs))
    with pytest.raises(ValueError, match="found 2, expected at least 3 to leave some out"):
        Sprint(phrases.labelled(4, 0, ["lamp", "music"])).run(
            tmp_path, bundled, tmp_path / "store", outside="labels"
        )
    assert len(closed) == 1
