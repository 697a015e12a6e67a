"""nlu.heads.data: the same rows from every kind of file, spans that stay on their words, and errors by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlu.errors import InvalidInput
from nlu.heads import config as configs
from nlu.heads import data
from nlu.heads.data import DataInvalid, Dataset, Finding, Mark, Row
from nlu.normalizer import normalize
from nlu.types import Turn

Line = dict[str, Any]


def read(*paths: Path, uncased: bool = True, split: str = "train", **options: Any) -> Dataset:
    return data.read(configs.load(None, name="x", files={split: list(paths)}, **options), uncased=uncased)


def file(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def sound(*paths: Path, **options: Any) -> tuple[Row, ...]:
    """The rows of files without a bad one."""
    found = read(*paths, **options)
    assert found.findings == ()
    return found.rows


def lone(folder: Path, name: str, text: str | bytes, **options: Any) -> Finding:
    """The finding of a file whose only row is bad."""
    found = read(file(folder, name, text), **options)
    assert found.rows == ()
    (finding,) = found.findings
    return finding


def what(row: Row) -> tuple[Any, ...]:
    """A row without the place it came from."""
    return row.split, row.text, row.phrase, row.labels, row.marks, row.context, row.weight


# One line as each kind of file has it.


def context_cell(line: Line) -> str:
    return " | ".join(f"{turn['role']}: {turn['text']}" for turn in line["context"])


def as_table(lines: Sequence[Line], comma: str, end: str, bom: str = "") -> bytes:
    columns = ("text", "label", "context", "split", "weight")
    cells = [
        [line["text"], line["label"], context_cell(line), line["split"], repr(line["weight"])]
        for line in lines
    ]
    text = io.StringIO(newline="")
    if comma == ",":
        csv.writer(text, lineterminator=end).writerows([columns, *cells])
    else:
        text.writelines(comma.join(row) + end for row in [columns, *cells])
    return (bom + text.getvalue()).encode()


def as_json(lines: Sequence[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def as_parquet(lines: Sequence[Line]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(lines)), out)
    return out.getvalue()


FORMATS: dict[str, Callable[[Sequence[Line]], bytes]] = {
    "rows.csv": lambda lines: as_table(lines, ",", "\n"),
    "excel.csv": lambda lines: as_table(lines, ",", "\r\n", bom="\ufeff"),
    "rows.tsv": lambda lines: as_table(lines, "\t", "\n"),
    "excel.TSV": lambda lines: as_table(lines, "\t", "\r\n", bom="\ufeff"),
    "rows.jsonl": as_json,
    "rows.parquet": as_parquet,
    "rows.tsv.gz": lambda lines: gzip.compress(as_table(lines, "\t", "\n")),
    "rows.jsonl.GZ": lambda lines: gzip.compress(as_json(lines)),
}

LETTERS = "abcXYZ абвЁЯ 0123 '\"«»,;:!?()-–… ßİéй漢字😀\u2028\x85\u00a0"
# No bar and no brackets, which mean something in a TSV; no blank at the ends, which a table does not keep.
PLAIN = st.text(LETTERS, min_size=1, max_size=30).map(str.strip)


def sayable(text: str) -> bool:
    try:
        return bool(normalize(text).text)
    except InvalidInput:
        return False


LINES = st.fixed_dictionaries(
    {
        "text": PLAIN.filter(sayable),
        "label": st.sampled_from(["light", "погода", "a b", "it's"]),
        "context": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "text": PLAIN.filter(sayable)}), max_size=2
        ),
        "split": st.sampled_from(["train", "dev", "test"]),
        "weight": st.sampled_from([1.0, 0.25, 3.0]),
    }
)  # fmt: skip


@given(st.lists(LINES, min_size=1, max_size=5))
def test_data_reads_the_same_rows_from_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Line]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    wanted = [
        (
            line["split"], line["text"], normalize(line["text"]).text, (line["label"],), (),
            tuple(Turn(turn["role"], normalize(turn["text"]).text) for turn in line["context"]), line["weight"],
        )
        for line in lines
    ]  # fmt: skip
    for name, write in FORMATS.items():
        assert [what(row) for row in sound(file(folder, name, write(lines)))] == wanted, name


# Words that normalisation shortens, lengthens or spells otherwise.
WORDS = ["wake", "ﬁnd", "ＷＩＤＥ", "e\u0301te\u0301", "Straße", "İzmir", "ещё", "и\u0306", "½", "😀", "👩\u200d🚀", "so\u00adft", "㎏", "don't"]  # fmt: skip
BLANKS = [" ", "  ", "\u00a0", "\t", " \u200b "]


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[str], list[str], int, int]:
    """Words, the blanks before each of them, and which of them are a span."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
    blanks = [draw(st.sampled_from(BLANKS)) for _ in words]
    first = draw(st.integers(0, len(words) - 1))
    return words, blanks, first, draw(st.integers(first, len(words) - 1))


@given(spans(), st.booleans())
def test_data_spans_stay_on_their_words_whatever_normalisation_does(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[str], list[str], int, int], uncased: bool
) -> None:
    words, blanks, first, last = drawn
    folder = tmp_path_factory.mktemp("spans")
    before = (
        "".join(blank + word for blank, word in zip(blanks[:first], words[:first], strict=True))
        + blanks[first]
    )
    inside = words[first] + "".join(blank + word for blank, word in zip(blanks[first + 1 : last + 1], words[first + 1 : last + 1], strict=True))  # fmt: skip
    after = "".join(blank + word for blank, word in zip(blanks[last + 1 :], words[last + 1 :], strict=True))
    line = {"text": before + inside + after, "spans": [[len(before), len(before + inside), "thing"]]}
    wanted = normalize(inside, uncased=uncased).text
    tokens = [*words, "."]
    tags = [
        ("B-" if i == first else "I-") + "thing" if first <= i <= last else "O" for i in range(len(tokens))
    ]
    conll = "".join(f"{token}\t{tag}\n" for token, tag in zip(tokens, tags, strict=True))
    for path in (
        file(folder, "offsets.jsonl", json.dumps(line) + "\n"),
        file(folder, "marked.jsonl", json.dumps({"text": f"{before}[{inside}](thing){after}"}) + "\n"),
        file(folder, "tags.conll", conll),
    ):
        (row,) = sound(path, kind="token", uncased=uncased)
        (mark,) = row.marks
        said = row.phrase[mark.start : mark.end]
        spaced = normalize(" ".join(words[first : last + 1]), uncased=uncased).text
        assert (mark.label, said) == ("thing", spaced if path.suffix == ".conll" else wanted)


def test_data_spans_without_a_blank_between_keep_apart(tmp_path: Path) -> None:
    line = {
        "text": "ＦＲＯＭ(5€)to６",
        "spans": [[5, 6, "sum"], [6, 7, "money"], [8, 10, "word"], [10, 11, "sum"]],
    }
    (row,) = sound(file(tmp_path, "a.jsonl", json.dumps(line)), kind="token")
    assert row.phrase == "from(5€)to6"
    assert row.marks == (Mark("sum", 5, 6), Mark("money", 6, 7), Mark("word", 8, 10), Mark("sum", 10, 11))


def test_data_span_of_marks_that_fold_to_a_blank_begins_after_it(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({"text": "x ´one´ y", "spans": [[2, 7, "quoted"]]}))
    (row,) = sound(path, kind="token")
    (mark,) = row.marks
    said = row.phrase[mark.start : mark.end]
    assert said == said.strip() and "one" in said


@pytest.mark.parametrize(
    "span",
    [
        {"start": 8, "end": 11, "label": "time"},  # spaCy
        {"start": 8, "end": 11, "entity": "time", "value": "six", "confidence": 0.9},  # Rasa
        [8, 11, "time"],
    ],
)
def test_data_knows_spans_as_other_tools_write_them(tmp_path: Path, span: Any) -> None:
    (row,) = sound(
        file(tmp_path, "a.jsonl", json.dumps({"text": "Wake me six", "spans": [span]})), kind="token"
    )
    assert row.marks == (Mark("time", 8, 11),)
    (row,) = sound(file(tmp_path, "a.tsv", f"text\tspans\nWake me six\t{json.dumps([span])}\n"), kind="token")
    assert row.marks == (Mark("time", 8, 11),)


def test_data_marked_text_may_have_several_spans(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", "[два](count) [латте](drink) на [овсяном молоке]( extra )\n")
    (row,) = sound(path, kind="token")
    assert row.phrase == "два латте на овсяном молоке"
    assert [(mark.label, row.phrase[mark.start : mark.end]) for mark in row.marks] == [
        ("count", "два"),
        ("drink", "латте"),
        ("extra", "овсяном молоке"),
    ]


def test_data_given_spans_leave_brackets_alone(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({"text": "see [this](that)", "spans": []}))
    (row,) = sound(path, kind="token")
    assert (row.phrase, row.marks) == ("see [this](that)", ())


CONLL = """-DOCSTART- -X- O

Meet NNP O
Anna NNP B-person
Karenina NNP I-person
and CC O
Boris NNP B-person
Anna NNP B-person

10\u00a0000\tI-count
people\tO
"""


def test_data_conll_parts_sentences_and_joins_tags(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        first, second = sound(
            file(tmp_path, "a.conll", CONLL.replace("\n", end)), kind="token", uncased=False
        )
        assert (first.where, second.where) == ("a.conll:3", "a.conll:10")
        assert first.text == "Meet Anna Karenina and Boris Anna"
        assert [first.phrase[mark.start : mark.end] for mark in first.marks] == [
            "Anna Karenina",
            "Boris",
            "Anna",
        ]
        # a no-break space parts no columns, and an I- without its B- opens a span
        assert (second.phrase, second.marks) == ("10 000 people", (Mark("count", 0, 6),))


def test_data_restoring_reads_what_a_recogniser_would_have_written(tmp_path: Path) -> None:
    (row,) = sound(file(tmp_path, "a.txt", "Straße, wo? IBM ruft AN!\n"), kind="token", scheme="restore")
    assert row.phrase == "strasse wo ibm ruft an"
    assert [(mark.label, row.phrase[mark.start : mark.end]) for mark in row.marks] == [
        ("Aa,", "strasse"),
        ("?", "wo"),
        ("AA", "ibm"),
        ("AA!", "an"),
    ]


# Labels.


def test_data_without_a_heading_has_text_and_label(tmp_path: Path) -> None:
    rows = sound(file(tmp_path, "a.tsv", '\n\t\nlights on\tlight\nвключи "Джаз"\tmusic\n'))
    assert [(row.where, row.phrase, row.labels) for row in rows] == [
        ("a.tsv:3", "lights on", ("light",)),
        ("a.tsv:4", 'включи "джаз"', ("music",)),
    ]


def test_data_heading_may_come_after_blank_lines_in_any_case_and_order(tmp_path: Path) -> None:
    rows = sound(file(tmp_path, "a.csv", '\n\nNote,Label, Text \nx,light,"Lights, on"\n'))
    assert [(row.where, row.phrase, row.labels) for row in rows] == [("a.csv:4", "lights, on", ("light",))]


def test_data_columns_by_other_names_win_over_ours(tmp_path: Path) -> None:
    lines = [{"text": "id-1", "utterance": "Lights on", "Label": "x", "Intent": "light"}]
    columns = {"text": "utterance", "label": "Intent"}
    table = "text\tutterance\tLabel\tIntent\nid-1\tLights on\tx\tlight\n"
    for path in (
        file(tmp_path, "a.tsv", table),
        file(tmp_path, "a.jsonl", as_json(lines)),
        file(tmp_path, "a.parquet", as_parquet(lines)),
    ):
        (row,) = sound(path, columns=columns)
        assert (row.phrase, row.labels) == ("lights on", ("light",)), path


def test_data_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", 'text,label\r\n"lights\r\non",light\r\n"of\nf",\r\n')
    found = read(path)
    assert [(row.where, row.phrase) for row in found.rows] == [("a.csv:2", "lights on")]
    assert [(finding.where, finding.what) for finding in found.findings] == [("a.csv:4", "no label")]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"label": "light"}, ("light",)),
        ({"label": " a, b "}, ("a, b",)),  # one label, with a comma
        ({"label": 5}, ("5",)),
        ({"label": 0}, ("0",)),
        ({"labels": ["light"]}, ("light",)),
        ({"labels": None, "label": "light"}, ("light",)),
        ({"labels": [], "label": "light"}, ("light",)),
        ({"intent": "light"}, ("light",)),
        ({"label": "oos"}, ()),
    ],
)
def test_data_label_of_a_row(tmp_path: Path, given: Line, found: tuple[str, ...]) -> None:
    (row,) = sound(file(tmp_path, "a.jsonl", as_json([{"text": "hello"} | given])))
    assert row.labels == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"label": "light, music ,light"}, ("light", "music")),
        ({"labels": ["light, music"]}, ("light, music",)),
        ({"labels": []}, ()),
        ({"labels": ""}, ()),
        ({}, ()),
        ({"label": "oos"}, ()),
    ],
)
def test_data_labels_of_a_row_that_may_have_any_number(
    tmp_path: Path, given: Line, found: tuple[str, ...]
) -> None:
    (row,) = sound(file(tmp_path, "a.jsonl", as_json([{"text": "hello"} | given])), multi=True)
    assert row.labels == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no label: found an empty label; label it, or with 'oos'"),
        ({"label": None}, "no label"),
        ({"label": "  "}, "no label"),
        ({"labels": ["a", "b"]}, "several labels: found a, b; keep one, or train with multi"),
        ({"labels": ["a", "oos"]}, "several labels: found a, oos; keep the label, or that it has none"),
        ({"labels": ["a", None]}, r"unreadable line: found label: found \['a', None\], expected names"),
        ({"label": {"a": 1}}, "unreadable line: found label: found .*expected names"),
        ({"label": 1.5}, "unreadable line: found label: found .1.5., expected names"),
        ({"label": "a", "split": "exam"}, "unknown split: found 'exam'; use one of train, dev, test"),
        ({"label": "a", "weight": 0}, "weight: found 0; give a number above 0"),
        ({"label": "a", "weight": "much"}, "weight: found 'much'"),
        ({"label": "a", "weight": float("nan")}, "weight: found nan"),
        ({"label": "a", "weight": [1]}, r"weight: found \[1\]"),
        ({"label": "a", "context": "user"}, "context: found .'role': 'user'., expected a role"),
        ({"label": "a", "context": "robot: hi"}, "expected a role, user or assistant, and a text"),
        ({"label": "a", "context": [{"role": "user", "text": " "}]}, "expected a role"),
        ({"label": "a", "context": ["hi"]}, "context: found 'hi', expected a role"),
        ({"label": "a", "context": 5}, "context: found 5, expected a list of turns"),
        ({"label": "a", "context": "user: ..."}, "text that cannot be said"),
        ({"label": "a", "text": "?!"}, "text that cannot be said: found text: found nothing but spaces"),
        ({"label": "a", "text": "x" * 513}, "text that cannot be said: .*513 code points, expected at most 512"),
        ({"label": "a", "text": "\ud83d"}, "text that cannot be said: .*lone surrogate"),
        ({"label": "a", "text": "e" + "\u0301" * 9}, "text that cannot be said: .*more than 8 combining marks"),
        ({"label": "a", "text": 5}, "unreadable line: found text: found int, expected a string"),
        ({"label": "a", "text": None}, "no text: found columns label; name its column with --columns text="),
    ],
)  # fmt: skip
def test_data_names_what_is_wrong_with_a_row(tmp_path: Path, given: Line, words: str) -> None:
    lines = [{"text": "hello", "label": "a"}, {"text": "hello"} | given]
    path = file(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = read(path)
    assert [row.where for row in found.rows] == ["a.jsonl:1"]
    (finding,) = found.findings
    assert (finding.severity, finding.where) == ("error", "a.jsonl:2")
    assert re.search(words, f"{finding.what}: found {finding.found}; {finding.remedy}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"spans": [[0, 99, "x"]]}, "span x 0..99: outside the text's 10 code points"),
        ({"spans": [[3, 3, "x"]]}, "span x 3..3: outside"),
        ({"spans": [[-1, 3, "x"]]}, "span x -1..3: outside"),
        ({"spans": [[4, 7, "x"]]}, "span x 4..7: begins or ends with a blank"),
        ({"spans": [[0, 6, "x"], [5, 10, "y"]]}, "span y 5..10: begins inside the span before it"),
        ({"spans": [[5, 7, "x"], [5, 7, "x"]]}, "span x 5..7: begins inside the span before it"),
        ({"spans": [[0, 4, ""]]}, "expected whole numbers and a label"),
        ({"spans": [[0.0, 4.0, "x"]]}, "expected whole numbers and a label"),
        ({"spans": [{"from": 0, "to": 4}]}, "expected start, end and label"),
        ({"spans": {"start": 0}}, "spans: found .*, expected a list"),
        ({"spans": 5}, "spans: found 5, expected a list"),
        ({"spans": "[[0, 4"}, "Expecting ',' delimiter"),
        ({"text": "wake [ me](x)"}, "span x 5..8: begins or ends with a blank"),
        ({"text": "wake [me]( )"}, "found no label, expected one in the round brackets"),
        ({"tokens": ["wake", "me"], "tags": ["O"]}, "tokens and tags: expected two lists of the same length"),
        ({"tokens": "wake me", "tags": "O O"}, "tokens and tags: expected two lists"),
        ({"tokens": ["wake", "me"], "tags": ["O", "X-a"]}, "tag: found 'X-a', expected O, B-label or I-label"),
        ({"tokens": ["wake", "me"], "tags": ["O", "B-"]}, "tag: found 'B-'"),
        ({"tokens": ["wake", "me"], "tags": ["O", 3]}, "tag: found '3'"),
        ({"text": "now \u200b me", "spans": [[4, 5, "x"]]}, "nothing of it can be said"),
    ],
)  # fmt: skip
def test_data_names_spans_that_miss(tmp_path: Path, given: Line, words: str) -> None:
    line = json.dumps({"text": "wake me up"} | given)
    finding = lone(tmp_path, "a.jsonl", f"\n{line}\n", kind="token")
    assert finding.where == "a.jsonl:2"
    assert re.search(words, finding.found)


@pytest.mark.parametrize(
    ("name", "text", "where", "words"),
    [
        ("a.tsv", "text\tlabel\na\tb\tc\n", "a.tsv:2", "3 cells where the heading has 2"),
        ("a.csv", 'text,label\n"a,b\n', "a.csv:2", r"a row that is no .csv \(unexpected end of data\)"),
        ("a.csv", 'text,label\n"a"b,c\n', "a.csv:2", "a row that is no .csv"),
        ("a.csv", f"text,label\n{'x' * 140_000},b\n", "a.csv:2", "field larger than field limit"),
        ("a.tsv", f"text\tlabel\n{'x' * 140_000}\tb\n", "a.tsv:2", "field larger than field limit"),
        ("a.jsonl", '{"text": "a"', "a.jsonl:1", "a line that is no JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1", "a line that is no JSON"),
        ("a.jsonl", '["a", "b"]', "a.jsonl:1", "a JSON list where an object is expected"),
        ("a.conll", "Anna\n", "a.conll:1", "no text"),
    ],
)
def test_data_names_lines_that_are_no_rows(
    tmp_path: Path, name: str, text: str, where: str, words: str
) -> None:
    finding = lone(tmp_path, name, text)
    assert finding.where == where
    assert re.search(words, f"{finding.what}: {finding.found}")


def test_data_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    text = f'text,label\na,b\n"c"c,d\n{"x" * 140_000},e\nf,g\n'
    found = read(file(tmp_path, "a.csv", text))
    assert [row.where for row in found.rows] == ["a.csv:2", "a.csv:5"]
    assert [finding.where for finding in found.findings] == ["a.csv:3", "a.csv:4"]


def test_data_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "a\tb\n???\tb\n")
    assert [finding.severity for finding in read(path).findings] == ["error"]
    found = read(path, skip_bad=True)
    assert [finding.severity for finding in found.findings] == ["warning"]
    assert [row.phrase for row in found.rows] == ["a"]


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.tsv", "a\tb\nд\tb\n".encode("cp1251"), "a.tsv:2: found the byte 0xe4, expected UTF-8 text"),
        ("a.csv", "a,b\n".encode("utf-16"), "a.csv:1: found the byte 0xff, expected UTF-8"),
        ("a.tsv.gz", b"a\tb\n", "found Not a gzipped file .*expected a whole gzip'd file"),
        ("a.tsv.gz", gzip.compress(b"a\tb\n" * 99)[:-9], "found Compressed file ended .*expected a whole"),
        ("a.tsv.gz", gzip.compress(b"a\tb\n")[:10] + b"\xff" * 20, "found .*expected a whole gzip'd file"),
        ("a.parquet", b"PAR1", "expected a Parquet file; write it again"),
        ("a.xlsx", b"PK", "found a file of kind '.xlsx', expected .tsv .csv .jsonl .parquet .conll; convert"),
        ("phrases", b"a\n", "found a file of kind 'none'"),
        ("a.gz", gzip.compress(b"a"), "found a file of kind 'none'"),
    ],
)
def test_data_refuses_files_that_cannot_be_read(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    with pytest.raises(DataInvalid, match=words) as caught:
        read(file(tmp_path, name, raw))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_data_refuses_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="none.tsv: found No such file .* expected a file of phrases"):
        read(tmp_path / "none.tsv")
    (tmp_path / "a.tsv").mkdir()
    with pytest.raises(DataInvalid, match="a.tsv: found Is a directory"):
        read(tmp_path / "a.tsv")


def test_data_refuses_a_file_over_the_cap_packed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = b"a\tb\n" * 100, gzip.compress(b"a\tb\n" * 100)
    paths = file(tmp_path, "a.tsv", plain), file(tmp_path, "b.tsv.gz", packed)
    monkeypatch.setattr(data, "_MAX_FILE", len(plain))
    assert [len(sound(path)) for path in paths] == [100, 100]
    monkeypatch.setattr(data, "_MAX_FILE", len(plain) - 1)
    with pytest.raises(DataInvalid, match="a.tsv: found 400 bytes, expected at most 399; split the file"):
        read(paths[0])
    with pytest.raises(DataInvalid, match="b.tsv.gz: found more bytes, expected at most 399 unpacked"):
        read(paths[1])


def test_data_refuses_a_table_without_the_named_column(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\nhello,a\n")
    with pytest.raises(DataInvalid, match="found columns text, label, expected 'utterance' among them"):
        read(path, columns={"text": "utterance"})


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.conll", "a.tsv.gz"])
def test_data_of_an_empty_file_is_no_rows(tmp_path: Path, name: str) -> None:
    raw = gzip.compress(b"") if name.endswith(".gz") else b""
    found = read(file(tmp_path, name, raw))
    assert (found.rows, found.findings, found.sources[0].rows) == ((), (), 0)


# Splits.


def test_data_split_is_the_files_unless_the_row_says_otherwise(tmp_path: Path) -> None:
    table = "text\tlabel\tsplit\na\tx\t\nb\tx\tTest\nc\tx\tvalidation\nd\tx\ttrain\n"
    path = file(tmp_path, "a.tsv", table)
    assert [row.split for row in read(path).rows] == ["train", "test", "dev", "train"]
    assert [row.split for row in read(path, split="dev").rows] == ["dev", "test", "dev", "train"]
    outside = read(path, split="outside").rows
    assert [(row.split, row.labels) for row in outside] == [
        ("train", ()),
        ("test", ()),
        ("dev", ()),
        ("train", ()),
    ]


def test_data_rows_of_no_label_stand_apart_unless_any_number_is_right(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "a\tx\nb\toos\nc\ty\n")
    one = read(path)
    assert [row.phrase for row in one.split("train")] == ["a", "c"]
    assert [row.phrase for row in one.split("train", outside=True)] == ["b"]
    several = read(path, multi=True)
    assert [row.phrase for row in several.split("train")] == ["a", "b", "c"]
    assert several.split("train", outside=True) == []


def test_data_remembers_its_files(tmp_path: Path) -> None:
    import hashlib

    first, second = file(tmp_path, "a.tsv", "a\tx\nb\tx\n"), file(tmp_path, "b.tsv", "c\tx\n")
    found = read(first, second)
    assert [(source.path, source.rows) for source in found.sources] == [(str(first), 2), (str(second), 1)]
    assert found.sources[0].sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
