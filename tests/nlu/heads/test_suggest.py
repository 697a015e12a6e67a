"""nlu.heads.suggest: unsure and different phrases first, each once, and never what the head knows for certain."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from annotators import table
from annotators.token import TokenHead
from nlu.heads import config as configs
from nlu.heads import data, verdict
from nlu.heads.material import Material, encode
from nlu.heads.suggest import suggest
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.annotators.toys import biased, random_units
from tests.nlu.heads import phrases
from tests.nlu.heads.sprints import Trainer
from tests.nlu.heads.test_verdict import HEADS, material


def pool(count: int = 60, seed: int = 11) -> Material:
    return material(random_units(count, seed=seed), [()] * count)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.spec.exclusive])
def test_suggest_is_greedy_by_doubt_times_distance(name: str) -> None:
    head, rows = HEADS[name], pool()
    scores = verdict.answers(head, rows)[1]
    ordered = np.sort(scores, axis=1)
    doubt = 1 - (ordered[:, -1] - ordered[:, -2])
    chosen: list[int] = []
    for _ in range(12):
        worth = [
            -1.0 if i in chosen else float(doubt[i]) * min([1.0, *(1 - float(rows.vectors[i] @ rows.vectors[j]) for j in chosen)])
            for i in range(len(rows))
        ]  # fmt: skip
        chosen.append(int(np.argmax(worth)))
    found = suggest(head, rows, 12)
    assert [each.phrase for each in found] == [rows.phrases[i] for i in chosen]
    assert found[0].uncertainty == pytest.approx(doubt.max(), abs=1e-6)
    for each, i in zip(found, chosen, strict=True):
        order = np.argsort(-scores[i], kind="stable")
        assert (each.guess, each.runner_up) == tuple(head.spec.labels[j] for j in order[:2])
        assert each.uncertainty == pytest.approx(doubt[i], abs=1e-6)


def test_suggest_doubts_labels_at_their_own_thresholds() -> None:
    head, rows = HEADS["several"], pool()
    gaps = np.abs(verdict.answers(head, rows)[1] - np.array(head.spec.thresholds))
    first = suggest(head, rows, 1)[0]
    i = int(gaps.min(axis=1).argmin())
    assert first.phrase == rows.phrases[i]
    assert first.runner_up == head.spec.labels[int(gaps[i].argmin())]
    assert first.uncertainty == pytest.approx(1 - gaps[i].min(), abs=1e-6)


def test_suggest_takes_no_phrase_twice() -> None:
    rows = pool(20)
    twice = rows.joined(rows).joined(rows.take([0, 0, 0]))
    found = suggest(HEADS["linear"], twice, 100)
    assert len(found) == len({each.phrase for each in found}) <= 20


def test_suggest_does_not_ask_the_same_thing_in_other_words() -> None:
    vectors = random_units(3, seed=2)
    many = np.concatenate([np.repeat(vectors[:1], 20, axis=0), vectors[1:]])  # twenty that say the same
    found = suggest(biased([0.0, 0.0]), material(many[:, :2] / np.linalg.norm(many[:, :2], axis=1, keepdims=True), [()] * 22), 3)  # fmt: skip
    assert {each.phrase for each in found} >= {"p20", "p21"}


def test_suggest_gives_at_most_what_is_worth_asking() -> None:
    assert len(suggest(HEADS["linear"], pool(5), 50)) <= 5
    certain = biased([200.0, 0.0])
    assert suggest(certain, material(random_units(5, dim=2), [()] * 5), 3) == []


def test_suggest_anchors_of_one_label(trained: Trainer) -> None:
    head = table.load(trained("anchors alone").folder)
    found = suggest(head, pool(10), 4)
    assert len(found) == 4
    assert all(0 <= each.uncertainty <= 1 for each in found)


def test_suggest_spans_by_the_least_sure_token(
    trained: Trainer, bundled: Vectorizer, store: Path, tmp_path: Path
) -> None:
    head = table.load(trained("spans").folder)
    assert isinstance(head, TokenHead)
    lines = [{"text": line["text"]} for line in phrases.marked(20, 8)]
    path = phrases.written(tmp_path / "pool.jsonl", lines)
    config = configs.load(None, name="x", files={"outside": [path]})
    with closing(VectorStore(store, bundled, 1, lambda _done, _total: None)) as vectors:
        rows = encode(data.read(config, uncased=True), vectors, tokens=True).outside
    found = suggest(head, rows, 5)
    doubts = {
        phrase: head.doubt(encoding.tokens)
        for phrase, encoding in zip(rows.phrases, rows.encodings, strict=True)
    }
    assert found[0].phrase == max(doubts, key=doubts.__getitem__)
    assert [each.uncertainty for each in found] == pytest.approx([doubts[each.phrase] for each in found])


def test_suggest_refuses_a_head_that_is_never_unsure(trained: Trainer) -> None:
    head = table.load(trained("rules").folder)
    with pytest.raises(
        ValueError, match="found kind rules, expected one that can be unsure; name another head"
    ):
        suggest(head, pool(3), 1)


def test_suggest_asks_where_labels_are_level_whatever_the_gate_says() -> None:
    """A phrase that is sure to be out of scope is still asked about where labels are level."""
    head = HEADS["blend"]
    assert head.spec.outside is not None
    shut = replace(head, spec=head.spec.model_copy(update={"outside": head.spec.outside.model_copy(update={"threshold": 0.0})}))  # fmt: skip
    assert suggest(shut, pool(), 10) == suggest(head, pool(), 10)
