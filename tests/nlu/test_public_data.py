"""nlu.public_data: rows of gzip'd files as phrases in normal form, with spans that stay exact."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nlu.normalizer import normalize
from nlu.public_data import Labelled, Tagged, acted, labelled, tagged


def tsv(path: Path, *lines: str) -> Path:
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return path


def jsonl(path: Path, *rows: tuple[list[str], list[str]]) -> Path:
    return tsv(path, *(json.dumps({"tokens": tokens, "tags": tags}) for tokens, tags in rows))


def one(path: Path, tokens: str, tags: str) -> Tagged:
    """The single row of a file, tokens and tags parted by blanks."""
    [row] = tagged(jsonl(path / "x.gz", (tokens.split(" "), tags.split(" "))))
    return row


def test_public_data_reads_labelled_rows(tmp_path: Path) -> None:
    path = tsv(tmp_path / "x.gz", "Lights  ON\tlights", "so sad\tsadness,grief", "доброе УТРО\thello")
    assert list(labelled(path)) == [
        Labelled("lights on", ("lights",)),
        Labelled("so sad", ("sadness", "grief")),
        Labelled("доброе утро", ("hello",)),
    ]


def test_public_data_reads_dialog_acts(tmp_path: Path) -> None:
    rows = [
        {"text": "Yes, PLEASE.", "acts": ["AFFIRM", "REQUEST"]},
        {"text": "?!", "acts": ["AFFIRM"]},
        {"text": "Bye", "acts": []},
    ]
    path = tsv(tmp_path / "x.gz", *map(json.dumps, rows))
    assert list(acted(path)) == [Labelled("yes, please.", ("AFFIRM", "REQUEST")), Labelled("bye", ())]


@pytest.mark.parametrize("text", ["", "?!", "\u200b", "x" * 600, "e" + "\u0301" * 20], ids=ascii)
def test_public_data_leaves_out_labelled_rows_the_service_would_refuse(tmp_path: Path, text: str) -> None:
    path = tsv(tmp_path / "x.gz", f"{text}\tbad", "fine\tgood")
    assert list(labelled(path)) == [Labelled("fine", ("good",))]


@pytest.mark.parametrize(
    ("tokens", "tags", "phrase", "spans"),
    [
        pytest.param("call Anna", "O B-person", "call anna", (("person", 5, 9),), id="one-word"),
        pytest.param("to New York", "O B-place I-place", "to new york", (("place", 3, 11),), id="two-words"),
        pytest.param("a b", "B-x B-x", "a b", (("x", 0, 1), ("x", 2, 3)), id="two-begin"),
        pytest.param("a b c", "B-x I-x B-x", "a b c", (("x", 0, 3), ("x", 4, 5)), id="begin-after-inside"),
        pytest.param("a b", "I-x I-x", "a b", (("x", 0, 3),), id="inside-without-a-beginning"),
        pytest.param("a b c", "B-x O I-x", "a b c", (("x", 0, 1), ("x", 4, 5)), id="inside-after-a-gap"),
        pytest.param("a b", "B-x I-y", "a b", (("x", 0, 1), ("y", 2, 3)), id="inside-of-another"),
        pytest.param("hi", "O", "hi", (), id="nothing"),
        pytest.param("Straße 7", "B-place I-place", "strasse 7", (("place", 0, 9),), id="a-word-that-grows"),
        pytest.param("go ﬁx it", "O B-x O", "go fix it", (("x", 3, 6),), id="a-ligature"),
        pytest.param("oh , Anna !", "O O B-person O", "oh , anna !", (("person", 5, 9),), id="punctuation"),
        pytest.param("oh … Anna", "O O B-person", "oh ... anna", (("person", 7, 11),), id="an-ellipsis"),
        pytest.param("oh ！ Anna", "O O B-person", "oh ! anna", (("person", 5, 9),), id="a-wide-mark"),
        pytest.param(
            "oh \u200b Anna", "O O B-person", "oh anna", (("person", 3, 7),), id="an-invisible-token"
        ),
        pytest.param("a \ufe0f b", "B-x I-x I-x", "a b", (("x", 0, 3),), id="invisible-inside-a-span"),
        pytest.param("john ´ s", "B-x O O", "john \u0301 s", (("x", 0, 4),), id="a-spacing-accent"),
    ],
)
def test_public_data_joins_tokens(
    tmp_path: Path, tokens: str, tags: str, phrase: str, spans: tuple[tuple[str, int, int], ...]
) -> None:
    assert one(tmp_path, tokens, tags) == Tagged(phrase, spans)


@pytest.mark.parametrize(
    "tokens",
    ["oh … Anna", "\u2026 \u201cyes\u201d \u2014", "a \u200b b", "x \xb4 s", "\u2600 \ufe0f hot", "5 \xbd ﷺ"],
)
def test_public_data_phrases_are_in_normal_form(tmp_path: Path, tokens: str) -> None:
    """A head trained on a phrase that the service never makes learns nothing for it."""
    phrase = one(tmp_path, tokens, " ".join("O" for _ in tokens.split(" "))).phrase
    assert normalize(phrase).text == phrase


@pytest.mark.parametrize(
    "tokens",
    [["?", "!"], ["word"] * 200, ["x" * 600], ["\u200b"], []],
    ids=["marks", "many", "long", "none", "empty"],
)
def test_public_data_leaves_out_tagged_rows_the_service_would_refuse(
    tmp_path: Path, tokens: list[str]
) -> None:
    path = jsonl(tmp_path / "x.gz", (tokens, ["O"] * len(tokens)), (["fine"], ["O"]))
    assert list(tagged(path)) == [Tagged("fine", ())]


def test_public_data_refuses_tokens_and_tags_that_do_not_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        list(tagged(jsonl(tmp_path / "x.gz", (["a", "b"], ["O"]))))
