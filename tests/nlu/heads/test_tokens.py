"""nlu.heads.tokens: spans are counted as they are served, and where there is no test, as the folds found them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scipy.special import expit

from annotators import report as plain
from annotators.annotator import Heard
from annotators.fit import About
from annotators.fit_token import FittedToken, by_token
from annotators.fleet import Fleet
from nlu.heads import data, tokens
from nlu.heads.material import Material, Materials, encode
from nlu.heads.tokens import fit_tokens, report_tokens
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.annotators.toys import biased
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import SPRINTS, Sprint


@pytest.fixture
def made(bundled: Vectorizer, store: Path, tmp_path: Path) -> Any:
    """Fits a sprint's head; gives what came out, and what went in."""

    def run(sprint: Sprint, **options: Any) -> tuple[FittedToken, Materials]:
        config = sprint.config(tmp_path, kind="token", **options)
        with closing(VectorStore(store, bundled, 1, lambda _done, _total: None)) as vectors:
            materials = encode(data.read(config, uncased=True), vectors, tokens=True)
        return fit_tokens(config, About("x", "x", bundled.fingerprint), materials), materials

    return run


def spans(made: FittedToken, rows: Material) -> tuple[list[set[Any]], list[set[Any]]]:
    """What is served of each row, and what should be; of restored text by token."""
    fleet = Fleet([made.head])
    restores = made.head.spec.params.get("restores")
    found = [
        {span[:3] for span in fleet.annotate(Heard.alone(phrase, encoding))[0].spans}
        for phrase, encoding in zip(rows.phrases, rows.encodings, strict=True)
    ]
    gold = [{span[:3] for span in (by_token(each) if restores else each.spans)} for each in rows.tagged]
    return found, gold


@pytest.mark.parametrize("name", ["spans", "restore"])
def test_tokens_report_what_is_served(made: Any, name: str) -> None:
    fitted, materials = made(SPRINTS[name])
    found, gold = spans(fitted, materials.test)
    report = report_tokens(fitted.head, fitted, materials)
    twin = plain.spans(found, gold)
    for measure in ("precision", "recall", "span_f1"):
        assert report["summary"][measure]["value"] == pytest.approx(twin[measure])
        assert report["summary"][measure]["low"] <= twin[measure] <= report["summary"][measure]["high"]
    for row in report["classes"]:
        mine = [{span for span in each if span[0] == row["label"]} for each in found]
        wanted = [{span for span in each if span[0] == row["label"]} for each in gold]
        of_label = plain.spans(mine, wanted)
        assert row["support"] == sum(map(len, wanted))
        for measure, other in (("precision", "precision"), ("recall", "recall"), ("f1", "span_f1")):
            assert row[measure]["value"] == pytest.approx(of_label[other])
        assert row["threshold"] == fitted.head.spec.thresholds[fitted.head.spec.labels.index(row["label"])]
    assert tokens.counts(fitted.head, materials.test).tolist() == [
        [len(f & g), len(g), len(f)] for f, g in zip(found, gold, strict=True)
    ]
    right = [f == g for f, g in zip(found, gold, strict=True)]
    assert sum(part["rows"] for part in report["slices"]) == len(right)
    hits = sum(part["rows"] * part["accuracy"]["value"] for part in report["slices"])
    assert hits == pytest.approx(sum(right))


def test_tokens_errors_are_phrases_with_other_spans_the_surest_first(made: Any) -> None:
    fitted, materials = made(SPRINTS["spans"])
    found, gold = spans(fitted, materials.test)
    errors = report_tokens(fitted.head, fitted, materials)["errors"]
    wrong = {phrase for phrase, f, g in zip(materials.test.phrases, found, gold, strict=True) if f != g}
    assert {error["text"] for error in errors} == wrong and wrong
    assert [error["score"] for error in errors] == sorted((error["score"] for error in errors), reverse=True)
    shown = {error["text"]: error for error in errors}
    for phrase, f, g in zip(materials.test.phrases, found, gold, strict=True):
        if f != g:
            for side, bounds in (("gold", g), ("predicted", f)):
                ordered = sorted(bounds, key=lambda span: span[1])
                words = ", ".join(f"{label}={phrase[start:end]}" for label, start, end in ordered)
                assert shown[phrase][side] == (words or "nothing")


def test_tokens_restoring_counts_marks_and_case_apart(made: Any) -> None:
    fitted, materials = made(SPRINTS["restore"])
    found, gold = spans(fitted, materials.test)

    def part(sides: list[set[Any]], marks: bool) -> list[set[Any]]:
        cut = [{(label.strip("Aa") if marks else label.strip(",.?!"), *bounds) for label, *bounds in each} for each in sides]  # fmt: skip
        return [{span for span in each if span[0]} for each in cut]

    summary = report_tokens(fitted.head, fitted, materials)["summary"]
    assert summary["mark_f1"]["value"] == pytest.approx(
        plain.spans(part(found, True), part(gold, True))["span_f1"]
    )
    assert summary["case_f1"]["value"] == pytest.approx(
        plain.spans(part(found, False), part(gold, False))["span_f1"]
    )


def test_tokens_without_a_test_report_what_folds_found(made: Any) -> None:
    fitted, materials = made(SPRINTS["spans of folds"])
    spec = fitted.head.spec
    report = report_tokens(fitted.head, fitted, materials)
    accepted = [
        each for each in fitted.proposed
        if expit(spec.scale[0] * each.raw + spec.shift[0]) >= spec.thresholds[each.label]
    ]  # fmt: skip
    hits, wanted = sum(each.right for each in accepted), int(fitted.wanted.sum())
    assert 0 < hits < len(accepted)
    assert report["summary"]["span_f1"] == pytest.approx(2 * hits / (len(accepted) + wanted))
    assert report["summary"]["precision"]["value"] == pytest.approx(hits / len(accepted))
    assert report["summary"]["recall"]["value"] == pytest.approx(hits / wanted)
    for row in report["classes"]:
        mine = [each for each in accepted if spec.labels[each.label] == row["label"]]
        right = sum(each.right for each in mine)
        assert row["precision"]["value"] == pytest.approx(right / len(mine))
        assert row["f1"] == pytest.approx(2 * right / (len(mine) + row["support"]))
    assert sum(part["rows"] for part in report["reliability"]["after"]) == len(fitted.proposed)


def test_tokens_learn_from_dev_too(made: Any) -> None:
    lines = phrases.marked(30, 0)
    whole, _ = made(Sprint(lines))
    parted, _ = made(Sprint(lines[:20], dev=lines[20:]))
    assert whole.head.weight.tobytes() == parted.head.weight.tobytes()


def test_tokens_beta_moves_thresholds(made: Any) -> None:
    strict, loose = (made(SPRINTS["spans of folds"], beta=beta)[0] for beta in (0.2, 5.0))
    assert sum(strict.head.spec.thresholds) > sum(loose.head.spec.thresholds)


def test_tokens_phrases_without_spans_are_measured_too(made: Any) -> None:
    silent = [{"text": text} for text in phrases.said("abcd", 6, 5)]
    fitted, materials = made(Sprint(phrases.marked(40, 0), silent))
    report = report_tokens(fitted.head, fitted, materials)
    assert sum(part["rows"] for part in report["slices"]) == 6
    assert report["summary"]["recall"]["value"] == 0.0
    assert all(row["support"] == 0 for row in report["classes"])


def test_tokens_are_no_matter_of_other_heads(made: Any) -> None:
    fitted, materials = made(SPRINTS["spans"])
    with pytest.raises(ValueError, match="toy: found kind sentence, expected token"):
        report_tokens(biased([0.0, 1.0]), fitted, materials)
