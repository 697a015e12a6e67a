"""nlu.heads.compare: every flip and no other, measures of both sides on the same rows, and an honest interval between."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotators import table
from annotators.head import Requires
from annotators.sentence import SentenceHead
from annotators.table import Head
from nlu.heads import config as configs
from nlu.heads import data
from nlu.heads.compare import compare
from nlu.heads.material import Material, encode
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.annotators.toys import biased, make_spec, random_head, random_units
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import Trainer
from tests.nlu.heads.test_verdict import material

NAMES = ("linear0", "linear1", "linear2")


def asked(count: int = 90) -> Material:
    """Rows of three labels, of none, and of one that no head has."""
    names = (*NAMES, "unheard_of")
    return material(random_units(count, seed=6), [(names[i % 4],) if i % 9 else () for i in range(count)])


def heads() -> tuple[SentenceHead, SentenceHead]:
    one = random_head("linear", 3)
    other = random_head("linear", 3, seed=8)
    return one, replace(other, weight=(one.weight + 0.6 * other.weight).astype(np.float32))


def answer(head: SentenceHead, rows: Material, i: int) -> str:
    """By hand: the best label, if it reaches its threshold."""
    raw = head.weight.astype(np.float64) @ rows.encodings[i].sentence + head.bias
    logits = raw * np.array(head.spec.scale) + np.array(head.spec.shift)
    scores = np.exp(logits) / np.exp(logits).sum()
    best = int(scores.argmax())
    return head.spec.labels[best] if scores[best] >= head.spec.thresholds[best] else "nothing"


def test_compare_names_every_flip_and_no_other() -> None:
    rows, (one, other) = asked(), heads()
    found = compare(one, other, rows, labelled=True)
    wanted = [
        (row.phrase, answer(one, rows, i), answer(other, rows, i), row.labels[0] if row.labels else "nothing")
        for i, row in enumerate(rows.rows)
        if answer(one, rows, i) != answer(other, rows, i)
    ]
    assert [(flip.phrase, flip.before, flip.after, flip.gold) for flip in found.flips] == wanted
    assert 5 < len(wanted) < len(rows)
    assert "nothing" in {flip[1] for flip in wanted} | {flip[2] for flip in wanted}
    shown = found.as_dict()
    pairs = Counter((before, after) for _, before, after, _ in wanted)
    assert [(pair["before"], pair["after"], pair["count"]) for pair in shown["by_pair"]] == [
        (*pair, count) for pair, count in pairs.most_common()
    ]
    assert shown["phrases"] == len(rows)


def test_compare_measures_are_of_the_same_rows() -> None:
    rows, (one, other) = asked(), heads()
    measures = compare(one, other, rows, labelled=True).measures
    for side, head in (("before", one), ("after", other)):
        said = [answer(head, rows, i) for i in range(len(rows))]
        anyway = replace(head, spec=head.spec.model_copy(update={"thresholds": (0.0,) * 3}))
        best = [answer(anyway, rows, i) for i in range(len(rows))]
        belonging = [i for i, row in enumerate(rows.rows) if row.labels]
        right = [best[i] == rows.rows[i].labels[0] for i in belonging]
        assert measures["accuracy"][side] == pytest.approx(np.mean(right))
        assert measures["coverage"][side] == pytest.approx(np.mean([name != "nothing" for name in said]))
        exact = [
            name == (row.labels[0] if row.labels else "nothing")
            for name, row in zip(said, rows.rows, strict=True)
        ]
        assert measures["accepted and right"][side] == pytest.approx(np.mean(exact))
    for measure in measures.values():
        change = measure["after"] - measure["before"]
        assert measure["change_low"] <= change <= measure["change_high"]


def test_compare_of_a_head_with_itself_changes_nothing() -> None:
    one, _ = heads()
    found = compare(one, one, asked(), labelled=True)
    assert found.flips == ()
    for measure in found.measures.values():
        assert measure["before"] == measure["after"]
        assert measure["change_low"] == measure["change_high"] == 0.0


def test_compare_interval_is_of_the_change_and_not_of_either_side() -> None:
    # one head answers "a" always, the other "b": 60 rows of a and 40 of b
    rows = material(random_units(100, dim=2, seed=1), [("a",)] * 60 + [("b",)] * 40)
    one, other = biased([1.0, 0.0], thresholds=(0.1, 0.1)), biased([0.0, 1.0], thresholds=(0.1, 0.1))
    measure = compare(one, other, rows, labelled=True).measures["accuracy"]
    assert (measure["before"], measure["after"]) == (0.6, 0.4)
    # each row changes by -1 or +1: the spread of their mean is 2 sqrt(p (1 - p) / n)
    half = 1.96 * 2 * np.sqrt(0.6 * 0.4 / 100)
    assert (measure["change_low"], measure["change_high"]) == pytest.approx(
        (-0.2 - half, -0.2 + half), abs=0.04
    )


def test_compare_silence_is_no_right_answer_to_an_unknown_label() -> None:
    rows = material(random_units(4, dim=2), [("new",)] * 4)
    silent = biased([0.0, 0.0], thresholds=(0.9, 0.9))
    knowing = replace(biased([5.0, 0.0]), spec=make_spec(("new", "b")))
    measures = compare(silent, knowing, rows, labelled=True).measures
    assert (measures["accepted and right"]["before"], measures["accepted and right"]["after"]) == (0.0, 1.0)
    belong_to_none = material(random_units(4, dim=2), [()] * 4)
    measures = compare(silent, knowing, belong_to_none, labelled=True).measures
    assert (measures["accepted and right"]["before"], measures["accepted and right"]["after"]) == (1.0, 0.0)
    assert "accuracy" not in measures


def test_compare_of_traffic_knows_no_gold() -> None:
    rows, (one, other) = asked(), heads()
    found = compare(one, other, rows, labelled=False)
    assert found.measures == {}
    assert {flip.gold for flip in found.flips} == {""}
    assert len(found.flips) == len(compare(one, other, rows, labelled=True).flips)


def test_compare_of_any_number_of_labels_has_no_best_one() -> None:
    rows = asked()
    one, other = (random_head("linear", 3, seed=seed, exclusive=False) for seed in (0, 3))
    found = compare(one, other, rows, labelled=True)
    assert set(found.measures) == {"coverage", "accepted and right"}
    assert any(", " in flip.before or ", " in flip.after for flip in found.flips)


def encoded(folder: Path, store: Path, vectorizer: Vectorizer, lines: list[Any], **options: Any) -> Material:
    path = phrases.written(folder / "a.jsonl", lines)
    config = configs.load(None, name="x", files={"test": [path]}, **options)
    with closing(VectorStore(store, vectorizer, 1, lambda _done, _total: None)) as vectors:
        return encode(data.read(config, uncased=True), vectors, tokens=True).test


def test_compare_heads_that_mark_spans(
    trained: Trainer, bundled: Vectorizer, store: Path, tmp_path: Path
) -> None:
    one, other = (table.load(trained(name).folder) for name in ("spans", "spans of folds"))
    assert one.spec.labels == ("name", "time")
    changed = replace(one, spec=one.spec.model_copy(update={"thresholds": (1.0, one.spec.thresholds[1])}))
    rows = encoded(tmp_path, store, bundled, phrases.marked(30, 5), kind="token")
    found = compare(one, changed, rows, labelled=True)
    assert 0 < found.measures["span_f1"]["after"] < found.measures["span_f1"]["before"]
    assert all("=" in flip.before for flip in found.flips)
    assert {flip.gold for flip in found.flips if flip.gold} <= {
        ", ".join(f"{mark.label}={row.phrase[mark.start : mark.end]}" for mark in row.marks)
        for row in rows.rows
    }
    assert compare(one, other, rows, labelled=True).measures["span_f1"]["after"] > 0.5


def test_compare_heads_of_different_kinds_that_name_labels(
    trained: Trainer, bundled: Vectorizer, store: Path, tmp_path: Path
) -> None:
    loaded: dict[str, Head] = {
        name: table.load(trained(name).folder) for name in ("linear", "anchors", "boosted", "rules")
    }
    rows = encoded(tmp_path, store, bundled, phrases.labelled(6, 4))
    for name in ("anchors", "boosted"):
        assert (
            compare(loaded["linear"], loaded[name], rows, labelled=True).measures["accuracy"]["before"] > 0.8
        )
    silent = compare(loaded["linear"], loaded["rules"], rows, labelled=True)
    assert silent.measures == {}  # rules score nothing; what they answer is compared all the same
    assert {flip.after for flip in silent.flips} == {"nothing"}


def test_compare_refuses_heads_that_cannot_stand_side_by_side(trained: Trainer) -> None:
    one = table.load(trained("linear").folder)
    spans = table.load(trained("spans").folder)
    other = replace(one, spec=one.spec.model_copy(update={"requires": Requires(vectorizer="b" * 64)}))
    with pytest.raises(
        ValueError, match=r"found one trained on vectorizer bbbbbbbbbbbb, expected \w{12}.*retrain"
    ):
        compare(one, other, asked(2), labelled=False)
    with pytest.raises(
        ValueError, match="found kinds sentence and token, expected two that mark spans or two"
    ):
        compare(one, spans, asked(2), labelled=False)
