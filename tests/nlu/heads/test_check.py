"""nlu.heads.check: every kind of flaw is found where it is, sound data are left alone, and nothing sound is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlu.heads import check, data
from nlu.heads import config as configs
from nlu.heads.config import HeadConfig
from nlu.heads.data import DataInvalid, Dataset, Finding
from nlu.heads.material import Materials, encode
from nlu.heads.train import train
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.phrases import Line

SOUND = [
    *({"text": text, "label": "light"} for text in phrases.said("abcd", 12, 0)),
    *({"text": text, "label": "music"} for text in phrases.said("klmn", 12, 0)),
    *({"text": text, "label": "oos"} for text in phrases.said("wxyz", 12, 0)),
    *({"text": text, "label": "light", "split": "dev"} for text in phrases.said("abcd", 3, 1)),
    *({"text": text, "label": "music", "split": "test"} for text in phrases.said("klmn", 3, 2)),
]  # fmt: skip
SPANS: list[Line] = [line | {"spans": line["spans"]} for line in phrases.marked(24, 0)]


def dataset(folder: Path, lines: Sequence[Line], **options: Any) -> tuple[Dataset, HeadConfig]:
    path = phrases.written(folder / "a.jsonl", lines)
    config = configs.load(None, name="x", files={"train": [path]}, **options)
    found = data.read(config, uncased=True)
    assert found.findings == ()
    return found, config


def texts(folder: Path, lines: Sequence[Line], **options: Any) -> list[Finding]:
    return check.texts(*dataset(folder, lines, **options))


def encoded(
    folder: Path, store: Path, vectorizer: Vectorizer, lines: Sequence[Line], **options: Any
) -> tuple[Materials, HeadConfig]:
    found, config = dataset(folder, lines, **options)
    with closing(VectorStore(store, vectorizer, 1, lambda _done, _total: None)) as vectors:
        return encode(found, vectors, tokens=False), config


@pytest.mark.parametrize("options", [{}, {"multi": True}, {"kind": "anchors"}, {"kind": "boosted"}], ids=str)
def test_check_finds_nothing_in_sound_data(tmp_path: Path, options: dict[str, Any]) -> None:
    assert texts(tmp_path, SOUND, **options) == []


def test_check_finds_nothing_in_sound_spans(tmp_path: Path) -> None:
    assert texts(tmp_path, SPANS, kind="token") == []


LIGHT = SOUND[0]["text"]

# Rows beside the sound ones (from line 43 on), the severity and kind of what is found, where, and words of it.
FLAWS: list[tuple[list[Line], tuple[str, str], str, str]] = [
    (
        [{"text": LIGHT, "label": "light"}, {"text": LIGHT.upper(), "label": "light"}],
        ("note", "duplicates in train"),
        r"a\.jsonl:44$",
        "2 rows that are there already",
    ),
    (
        [{"text": f" {LIGHT}?! ", "label": "light", "split": "test"}],
        ("warning", "leakage from train or dev to test"),
        r"a\.jsonl:43 = a\.jsonl:1$",
        "1 phrases of test .* drop them",
    ),
    (
        [{"text": SOUND[36]["text"] + ".", "label": "light", "split": "test"}],
        ("warning", "leakage from train or dev to test"),
        r"a\.jsonl:43 = a\.jsonl:37$",
        "1 phrases of test",
    ),
    (
        [{"text": SOUND[0]["text"].replace("a", "a-"), "label": "light", "split": "dev"}],
        ("warning", "leakage from train to dev"),
        r"a\.jsonl:43 = a\.jsonl:1$",
        "1 phrases of dev",
    ),
    (
        [{"text": "cold", "label": "light"}, {"text": "Cold", "label": "music", "split": "dev"}],
        ("warning", "conflicting labels"),
        r"a\.jsonl:43, a\.jsonl:44$",
        "'cold' as light and music; decide for one",
    ),
    (
        [{"text": "cold", "label": "light"}, {"text": "cold", "label": "oos"}],
        ("warning", "conflicting labels"),
        r"a\.jsonl:43, a\.jsonl:44$",
        "'cold' as no label and light",
    ),
    (
        [{"text": "cold", "label": "heat"}],
        ("error", "label too small"),
        "train",
        "1 phrase of 'heat'; add phrases, at least 2, or drop the label",
    ),
    (
        [{"text": "cold", "label": "heat"}, {"text": "hot", "label": "heat"}],
        ("warning", "labels with few phrases"),
        "train",
        r"heat \(2\); add phrases, 10 or more",
    ),
    (
        [{"text": "cold", "label": "heat", "split": "test"}],
        ("warning", "labels of test that train does not have"),
        r"a\.jsonl:43$",
        "heat; add training phrases",
    ),
    (
        [{"text": "свет", "label": "light"}],
        ("note", "mixed scripts"),
        r"a\.jsonl:43$",
        r"latin 97\.7%, cyrillic 2\.3%",
    ),
    (
        [{"text": "a " * 41, "label": "light"}],
        ("note", "long texts"),
        r"a\.jsonl:43$",
        "1 rows of more than 40 words",
    ),
]


@pytest.mark.parametrize(("more", "kind", "where", "words"), FLAWS, ids=[kind[1] for _, kind, _, _ in FLAWS])
def test_check_finds_each_flaw_alone(
    tmp_path: Path, more: list[Line], kind: tuple[str, str], where: str, words: str
) -> None:
    found = texts(tmp_path, SOUND + more)
    assert kind in [(finding.severity, finding.what) for finding in found]
    wanted = next(finding for finding in found if finding.what == kind[1])
    assert re.search(where, wanted.where)
    assert re.search(words, f"{wanted.found}; {wanted.remedy}")
    # what follows from the same rows: a phrase that leaks into another split under another label also conflicts
    follows = {
        "leakage from train or dev to test": {"conflicting labels"},
        "conflicting labels": {"duplicates in train", "leakage from train to dev"},
    }
    assert {finding.what for finding in found} - {kind[1]} <= follows.get(kind[1], set())


def test_check_one_row_of_another_script_is_rather_a_mistake_than_a_language(tmp_path: Path) -> None:
    more = [{"text": text, "label": "light"} for text in phrases.said("abcd", 70, 9)[50:]]
    (finding,) = texts(
        tmp_path, [*SOUND, *more, {"text": "ѕtop it", "label": "light"}, {"text": "стоп", "label": "light"}]
    )
    assert (finding.severity, finding.what, finding.where) == ("warning", "mixed scripts", "a.jsonl:64")


def test_check_names_few_of_many_places(tmp_path: Path) -> None:
    (finding,) = texts(tmp_path, SOUND + [line | {"split": "train"} for line in SOUND[:12]])
    assert finding.where == "a.jsonl:43, a.jsonl:44, a.jsonl:45, a.jsonl:46, a.jsonl:47 and 7 more"


@pytest.mark.parametrize(
    ("one", "other"),
    [("👍", "👎"), ("c++", "c"), ("कि", "की"), ("5", "6"), ("ел", "ёл")],
)
def test_check_takes_no_two_phrases_for_one(tmp_path: Path, one: str, other: str) -> None:
    def leaks(text: str) -> list[str]:
        more = [{"text": one, "label": "light"}, {"text": text, "label": "light", "split": "test"}]
        return [finding.what for finding in texts(tmp_path, SOUND + more) if "leakage" in finding.what]

    assert leaks(other) == []
    assert leaks(f"«{one}»!") == ["leakage from train or dev to test"]


def test_check_looks_at_the_turns_before_where_the_head_does(tmp_path: Path) -> None:
    def yes(asked: str, label: str, split: str = "train") -> Line:
        turns = [{"role": "assistant", "text": asked}]
        return {"text": "yes", "label": label, "context": turns, "split": split}

    more = [yes("lights", "light"), yes("music", "music"), yes("lights?", "light", "test")]
    assert texts(tmp_path, SOUND + more, kind="context") == []
    assert {finding.what for finding in texts(tmp_path, SOUND + more)} == {
        "duplicates in train",
        "leakage from train or dev to test",
        "conflicting labels",
    }


def test_check_asks_for_strangers_where_nothing_else_is_said(tmp_path: Path) -> None:
    known = [line for line in SOUND if line["label"] != "oos"]
    (finding,) = texts(tmp_path, known, outside_labels=("none",))
    assert finding.what == "no out-of-scope phrases" and "label some 'none'" in finding.remedy
    for options in ({"outside": "labels"}, {"outside": "none"}, {"multi": True}, {"kind": "boosted"}):
        assert texts(tmp_path, known, **options) == []


def test_check_finds_spans_that_cut_a_word(tmp_path: Path) -> None:
    cut = {"text": "abc oprq dcba", "spans": [[5, 8, "name"]]}
    (finding,) = texts(tmp_path, [*SPANS, cut], kind="token")
    assert (finding.what, finding.where, finding.found) == ("spans that cut a word", "a.jsonl:25", "1 spans")


def test_check_finds_span_labels_that_only_test_has(tmp_path: Path) -> None:
    strange = {"text": "abc oprq", "spans": [[4, 8, "place"]], "split": "test"}
    (finding,) = texts(tmp_path, [*SPANS, strange], kind="token")
    assert (finding.what, finding.found) == ("labels of test that train does not have", "place")


def least(count: int, labels: int) -> list[Line]:
    """So many rows of so many labels."""
    return phrases.labelled(count, 0, list(phrases.LETTERS)[:labels])


# What is just enough for a head, and what is just too little.
EDGES: list[tuple[dict[str, Any], list[Line], list[Line], str]] = [
    ({}, least(2, 2), [*least(2, 2), *least(1, 3)[-1:]], "label too small"),
    ({}, least(2, 2), least(4, 1), "one label alone"),
    ({"kind": "boosted"}, least(2, 2), least(4, 1), "one label alone"),
    ({"kind": "context"}, least(2, 2), least(1, 2), "label too small"),
    ({"multi": True}, least(2, 1), least(1, 2), "label too small"),
    ({"kind": "anchors"}, least(1, 1), phrases.strange(3, 0), "nothing to learn from"),
    ({"kind": "token"}, phrases.marked(6, 0), phrases.marked(5, 0), "too few rows"),
    ({"kind": "token"}, phrases.marked(6, 0), [{"text": text} for text in phrases.said("abcd", 6, 0)], "no spans"),
    ({"kind": "token", "scheme": "restore"}, phrases.spelt(6, 0), phrases.spelt(5, 0), "too few rows"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "enough", "too_little", "what"), EDGES, ids=[f"{each[0]}-{each[3]}" for each in EDGES])  # fmt: skip
def test_check_agrees_with_training(
    tmp_path: Path,
    store: Path,
    vectorizer: Vectorizer,
    options: dict[str, Any],
    enough: list[Line],
    too_little: list[Line],
    what: str,
) -> None:
    def errors(lines: list[Line]) -> list[str]:
        return [finding.what for finding in texts(tmp_path, lines, **options) if finding.severity == "error"]

    def run(lines: list[Line]) -> Path:
        _, config = dataset(tmp_path, lines, **options)
        done = train(config, vectorizer, store, tmp_path / "out", workers=1, progress=lambda *_: None)
        return done.folder

    assert errors(enough) == []
    assert (run(enough) / "head.json").exists()
    assert what in errors(too_little)
    with pytest.raises(DataInvalid, match=what):
        run(too_little)


def test_check_rules_need_no_rows() -> None:
    rules = configs.load(None, name="x", kind="rules", rules=[{"label": "stop", "phrases": ["stop"]}])
    assert check.texts(data.read(rules, uncased=True), rules) == []


# What vectors show.


def test_check_finds_near_duplicates_that_are_spelt_otherwise(
    tmp_path: Path, store: Path, vectorizer: Vectorizer
) -> None:
    text = "abca dcbd bbac"
    turned = " ".join(reversed(text.split()))  # the tiny vectorizer knows no order
    more = [{"text": text, "label": "light"}, {"text": turned, "label": "light", "split": "test"}]
    found = check.vectors(*encoded(tmp_path, store, vectorizer, SOUND + more))
    near = [finding for finding in found if finding.what == "near-duplicates of train in test"]
    assert [finding.where.split(", ")[0] for finding in near] == ["a.jsonl:44 ~ a.jsonl:43"]
    same = [more[0], more[1] | {"text": text + "!"}]  # a leak, and named as one by what texts show
    found = check.vectors(*encoded(tmp_path, store, vectorizer, SOUND + same))
    assert not any("a.jsonl:44" in finding.where for finding in found)


def test_check_nearest_does_not_depend_on_how_much_is_in_memory(
    tmp_path: Path, store: Path, vectorizer: Vectorizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    materials, _ = encoded(tmp_path, store, vectorizer, SOUND)
    part, known = materials.train, materials.outside
    cosines = part.vectors @ known.vectors.T
    for at_once in (1, 7, 24, 1024):
        monkeypatch.setattr(check, "_AT_ONCE", at_once)
        rows, found = check._nearest(part, known)
        assert np.array_equal(rows, cosines.argmax(axis=1))
        assert np.allclose(found, cosines.max(axis=1), atol=1e-6)


def test_check_finds_labels_that_the_other_rows_speak_against(
    tmp_path: Path, store: Path, vectorizer: Vectorizer
) -> None:
    lines = phrases.labelled(30, 0, ["lamp", "music"])

    def doubted(given: list[Line]) -> list[Finding]:
        found = check.vectors(*encoded(tmp_path, store, vectorizer, given))
        return [finding for finding in found if finding.what == "labels that look wrong"]

    assert doubted(lines) == []
    wrong = [line | {"label": "music"} if i in (3, 8) else line for i, line in enumerate(lines)]
    (finding,) = doubted(wrong)
    named = [part.split(" ")[0] for part in finding.where.split("; ")]
    assert {"a.jsonl:4", "a.jsonl:9"} <= set(named) and len(named) < 6
    assert finding.found == f"{len(named)} of 60 rows"
    assert f"{lines[3]['text']!r} is music, rather lamp" in finding.where


def test_check_doubts_no_label_of_few_phrases(tmp_path: Path, store: Path, vectorizer: Vectorizer) -> None:
    lines = phrases.labelled(check.FEW - 1, 0, ["lamp", "music"])
    wrong = [lines[0] | {"label": "music"}, *lines[1:]]
    assert check.vectors(*encoded(tmp_path, store, vectorizer, wrong)) == []
