"""nlu.heads.material: each row has the vectors of its own words, and each split has its own rows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from annotators.head import GoldenTurn
from nlu.heads import config as configs
from nlu.heads import data
from nlu.heads.material import Materials, encode
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.phrases import Line

LINES: list[Line] = [
    {"text": "Yes", "label": "lamp", "context": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "Shall I?"}]},
    {"text": "play jazz", "label": "music", "weight": 0.5},
    {"text": "yes", "label": "music", "split": "dev"},
    {"text": "hi", "label": "lamp", "split": "test"},
    {"text": "bread", "label": "oos"},
    {"text": "butter", "label": "oos", "split": "dev"},
    {"text": "milk", "label": "oos", "split": "test"},
]  # fmt: skip


def materials(folder: Path, vectorizer: Vectorizer, *, tokens: bool = False) -> tuple[Materials, VectorStore]:
    path = phrases.written(folder / "a.jsonl", LINES)
    config = configs.load(None, name="x", files={"train": [path]})
    with closing(VectorStore(folder / "vectors", vectorizer, 1, lambda _done, _total: None)) as store:
        return encode(data.read(config, uncased=True), store, tokens=tokens), store


def test_material_each_split_has_its_rows(vectorizer: Vectorizer, tmp_path: Path) -> None:
    found, _ = materials(tmp_path, vectorizer)
    assert found.train.phrases == ["yes", "play jazz"]
    assert (found.dev.phrases, found.test.phrases) == (["yes"], ["hi"])
    assert found.outside.phrases == ["bread", "butter"]  # nothing of test
    assert found.outside_test.phrases == ["milk"]


@pytest.mark.parametrize("tokens", [False, True])
def test_material_has_the_vectorizers_vectors(vectorizer: Vectorizer, tmp_path: Path, tokens: bool) -> None:
    found, _ = materials(tmp_path, vectorizer, tokens=tokens)
    for part in (found.train, found.dev, found.test, found.outside, found.outside_test):
        fresh = vectorizer.encode(part.phrases, tokens=tokens)
        assert np.array_equal(part.vectors, np.stack([encoding.sentence for encoding in fresh]))
        for encoding, wanted in zip(part.encodings, fresh, strict=True):
            assert (encoding.tokens is None) == (not tokens)
            if encoding.tokens is not None and wanted.tokens is not None:
                assert np.array_equal(encoding.tokens, wanted.tokens)


def test_material_turns_before_are_heard(vectorizer: Vectorizer, tmp_path: Path) -> None:
    found, _ = materials(tmp_path, vectorizer)
    assert [turn.role for turn in found.train.contexts[0]] == ["user", "assistant"]
    (asked,) = vectorizer.encode(["shall i?"], tokens=False)
    assert np.array_equal(found.train.contexts[0][1].encoding.sentence, asked.sentence)
    assert found.train.contexts[1] == []
    assert found.train.golden_turns[0] == [GoldenTurn(role="user", text="hi"), GoldenTurn(role="assistant", text="shall i?")]  # fmt: skip


def test_material_encodes_nothing_twice(vectorizer: Vectorizer, tmp_path: Path) -> None:
    _, store = materials(tmp_path, vectorizer)
    # yes, play jazz, hi, bread, butter, milk, shall i?; "yes" is there twice, "hi" is also said before
    assert (store.encoded, store.met) == (7, 0)
    _, store = materials(tmp_path, vectorizer)
    assert (store.encoded, store.met) == (0, 7)


def test_material_of_some_rows_and_of_more(vectorizer: Vectorizer, tmp_path: Path) -> None:
    found, _ = materials(tmp_path, vectorizer)
    part = found.train.take([1])
    assert (len(part), part.phrases, part.contexts) == (1, ["play jazz"], [[]])
    both = part.joined(found.test)
    assert (both.phrases, len(both.encodings), len(both.contexts)) == (["play jazz", "hi"], 2, 2)
    assert found.train.phrases == ["yes", "play jazz"]


def test_material_labels_as_numbers(vectorizer: Vectorizer, tmp_path: Path) -> None:
    found, _ = materials(tmp_path, vectorizer)
    assert found.train.wanted(("lamp", "music")).tolist() == [[True, False], [False, True]]
    assert found.train.wanted(("music",)).tolist() == [[False], [True]]
    assert found.train.known(("music",)).tolist() == [False, True]
    assert found.outside.known(("music",)).tolist() == [True, True]  # to have no label is to be known
    assert found.train.take([]).wanted(("lamp",)).shape == (0, 1)
    answers = found.train.answers(exclusive=True, at_least=1)
    assert (answers.names, answers.codes.tolist()) == (("lamp", "music"), [0, 1])
    assert answers.weights is not None and answers.weights.tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="label 'lamp': found 1 phrase, expected at least 2"):
        found.train.answers(exclusive=True)


def test_material_without_weights_says_so(vectorizer: Vectorizer, tmp_path: Path) -> None:
    found, _ = materials(tmp_path, vectorizer)
    assert found.train.take([0]).answers(exclusive=False, at_least=1).weights is None
