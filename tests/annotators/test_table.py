"""One table from kind to class: every kind loads, saves and answers, and what is no head is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from annotators import table
from annotators.anchors import AnchorsHead
from annotators.annotator import Heard, HeardTurn
from annotators.answers import Answers
from annotators.boosted import BoostedHead
from annotators.context import ContextHead
from annotators.fleet import Fleet
from annotators.head import SPEC_FILE, HeadInvalid, Kind
from annotators.learners import BoostedLearner
from annotators.rules import RulesHead
from annotators.sentence import Hidden, SentenceHead
from annotators.table import KINDS, Head, load
from annotators.token import TokenHead
from annotators.trees import to_onnx
from tests.annotators.toys import BLEND, encoded, make_spec, random_head, random_units, tokenized

OFFSETS = [(0, 2), (3, 4)]


def quarters(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Weights that float16 keeps."""
    return (np.random.default_rng(0).integers(-8, 9, shape) / 4).astype(np.float32)


def sentence() -> Head:
    head = random_head("toy", 3, dim=2)
    return type(head)(head.spec, quarters(3, 2), quarters(3))


def hidden() -> Head:
    spec = random_head("toy", 3, outside=BLEND).spec
    return SentenceHead(
        spec, quarters(3, 4), quarters(3), "", Hidden(quarters(4, 2), quarters(4)), quarters(3, 2)
    )


def boosted() -> Head:
    rows = random_units(60, 2)
    answers = Answers.one(["abc"[i] for i in np.arange(60) % 3])
    model = next(BoostedLearner().path(rows, answers, (2,)))
    return BoostedHead.of(make_spec(kind="boosted"), to_onnx(model, 2))


def context() -> Head:
    return ContextHead(make_spec(kind="context", params={"turns": 1}), quarters(3, 8), quarters(3), turns=1)


def token() -> Head:
    return TokenHead(
        make_spec(("a",), kind="token", thresholds=(0.0,)), quarters(3, 6), np.array([-9, 0, 0], np.float32)
    )


def anchors() -> Head:
    return AnchorsHead(make_spec(("a", "b"), kind="anchors"), np.eye(2, dtype=np.float32), np.array([0, 1]))


def rules() -> Head:
    return RulesHead(make_spec(kind="rules", params={"rules": [{"label": "a", "phrases": ["be b"]}]}))


@pytest.mark.parametrize("make", [sentence, hidden, context, token, anchors, rules, boosted])
def test_table_loads_every_kind_as_it_was_saved(tmp_path: Path, make: Callable[[], Head]) -> None:
    head = make()
    head.save(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(head)
    said = tokenized([[1.0, 0.5], [-1.0, 2.0]], OFFSETS)
    turn = Heard.alone("be b", said, [HeardTurn("user", encoded([0.5, 1]))])
    (before,), (after,) = Fleet([head]).annotate(turn), Fleet([loaded]).annotate(turn)
    assert (after.labels, after.spans, after.status) == (before.labels, before.spans, before.status)
    assert (after.out_of_scope, after.disagreement) == (before.out_of_scope, before.disagreement)
    assert after.labels or after.spans


@pytest.mark.parametrize("make", [sentence, hidden, context, token, anchors, rules, boosted])
def test_table_version_stands_for_the_files(tmp_path: Path, make: Callable[[], Head]) -> None:
    make().save(tmp_path / "a")
    load(tmp_path / "a").save(tmp_path / "b")
    assert load(tmp_path / "a").version == load(tmp_path / "b").version != ""


def test_table_knows_every_kind_a_spec_may_have() -> None:
    assert set(KINDS) == set(get_args(Kind))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "tree"}', "found kind 'tree', expected one of sentence, context, token, anchors, rules, boosted; use the code that made"),
        ('{"kind": ["sentence"]}', r"found kind \['sentence'\], expected one of sentence"),
        ("{}", "found kind None, expected one of sentence"),
        ("[]", "found unreadable head.json"),
        ('{"kind": ', "found unreadable head.json"),
        ("", "found unreadable head.json"),
        ('{"kind": "sentence"}', "found name: Field required"),
    ],
)  # fmt: skip
def test_table_other_documents_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / SPEC_FILE).write_text(text)
    with pytest.raises(HeadInvalid, match=message):
        load(tmp_path)


def test_table_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).write_bytes(b'{"kind": "\xff"}')
    with pytest.raises(HeadInvalid, match=r"found unreadable head.json .*, expected a head folder"):
        load(tmp_path)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_table_folder_without_a_head_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(HeadInvalid, match=r"found unreadable head.json .*, expected a head folder"):
        load(tmp_path / folder)


def test_table_kind_decides_how_weights_are_read(tmp_path: Path) -> None:
    """The same folder, called another kind, is refused by that kind's own check."""
    sentence().save(tmp_path)
    document = json.loads((tmp_path / SPEC_FILE).read_bytes())
    (tmp_path / SPEC_FILE).write_text(json.dumps({**document, "kind": "rules"}))
    with pytest.raises(HeadInvalid, match="found tensors bias, weight, expected none"):
        table.load(tmp_path)
