"""nlu.retrieval.read: rows of every kind of file, and what is wrong with them by file and line."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nlu.retrieval import read as module
from nlu.retrieval.read import Bad, Prompt, RepliesFile, RepliesInvalid, Row, read

FULL = {
    "reply": "Чай  готов, Anna.", "prompts": ["Is it READY?", "где  мой чай", "is it ready?"], "id": "tea.1",
    "personas": ["lively", "calm"], "surface": "tv", "valid_from": "2026-12-24", "valid_until": "2026-12-25T00:00:00+03:00",
    "weight": 0.5, "emotion": "joy", "tags": ["tea", "kitchen", "tea"],
}  # fmt: skip


def full(where: str) -> Row:
    return Row(
        where=where,
        text="Чай  готов, Anna.",
        phrase="чай готов, anna.",
        prompts=(Prompt("Is it READY?", "is it ready?"), Prompt("где  мой чай", "где мой чай")),
        id="tea.1",
        personas=("calm", "lively"),
        surfaces=("tv",),
        valid_from=datetime(2026, 12, 24, tzinfo=UTC),
        valid_until=datetime(2026, 12, 24, 21, tzinfo=UTC),
        weight=0.5,
        emotion="joy",
        tags=("kitchen", "tea"),
    )


def written(folder: Path, text: str | bytes, name: str = "replies.tsv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def only(path: Path) -> Row | Bad:
    (found,) = read(path, uncased=True)
    return found


def test_read_gives_one_row_whatever_the_kind_of_file(tmp_path: Path) -> None:
    cells = {
        name: value if isinstance(value, str) else str(value) for name, value in FULL.items()
    } | {"prompts": "Is it READY? | где  мой чай |  is it ready?", "personas": "lively, calm", "tags": "tea,kitchen, tea,"}  # fmt: skip
    table = "\t".join(cells) + "\n" + "\t".join(cells.values()) + "\n"
    assert only(written(tmp_path, table)) == full("replies.tsv:2")
    assert only(written(tmp_path, as_line(FULL), "replies.jsonl")) == full("replies.jsonl:1")
    packed = written(tmp_path, gzip.compress(as_line(FULL).encode()), "replies.jsonl.gz")
    assert only(packed) == full("replies.jsonl.gz:1")
    times = {
        "valid_from": date(2026, 12, 24),
        "valid_until": datetime(2026, 12, 24, 21, tzinfo=UTC),
    }
    pq.write_table(pa.Table.from_pylist([FULL | times]), tmp_path / "replies.parquet")
    assert only(tmp_path / "replies.parquet") == full("replies.parquet:row 1")


@pytest.mark.parametrize(
    "text",
    ["\ufeffprompt\treply\r\n\r\nhello\tHi.\r\n", "Reply\tPROMPT\n\nHi.\thello", "reply\tprompt\ttags\n\nHi.\thello\n"],
    ids=["bom-crlf", "no-last-line-end", "cells-left-out"],
)  # fmt: skip
def test_read_takes_a_table_as_spreadsheets_write_it(tmp_path: Path, text: str) -> None:
    assert only(written(tmp_path, text)) == Row(
        "replies.tsv:3", "Hi.", "hi.", prompts=(Prompt("hello", "hello"),)
    )


def test_read_a_reply_needs_no_prompt_and_quotes_are_text(tmp_path: Path) -> None:
    found = list(read(written(tmp_path, 'reply\tprompt\n"Да", сказала она\t\nok\t  \n'), uncased=True))
    assert found == [
        Row("replies.tsv:2", '"Да", сказала она', '"да", сказала она'),
        Row("replies.tsv:3", "ok", "ok"),
    ]
    none = written(tmp_path, '{"reply": "ok", "prompt": null, "tags": [], "weight": null}', "replies.jsonl")
    assert only(none) == Row("replies.jsonl:1", "ok", "ok")


def test_read_case_stays_for_a_cased_vectorizer(tmp_path: Path) -> None:
    (found,) = read(written(tmp_path, "reply\nOK Anna\n"), uncased=False)
    assert isinstance(found, Row) and found.phrase == "OK Anna"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"reply": ""}, "reply: found nothing but spaces"),
        ({"prompt": "hi"}, "reply: found nothing but spaces"),
        ({"reply": "..."}, "reply: found nothing but spaces, punctuation"),
        ({"reply": "a" * 513}, "reply: found 513 code points, expected at most 512; mend or drop the row"),
        ({"reply": "ok", "prompt": ["hi", "!"]}, "prompt: found nothing but spaces"),
        ({"reply": 5}, "reply: found 5, expected text"),
        ({"reply": ["ok"]}, "reply: found a list, expected text"),
        ({"reply": "ok", "prompts": [["hi"]]}, "prompts: found a list, expected text or a list of texts"),
        ({"reply": "ok", "prompts": {"a": 1}}, "prompts: found an object"),
        ({"reply": "ok", "id": "a\nb"}, "id: found 'a\\nb', expected at most 200 printable"),
        ({"reply": "ok", "tags": ["a", "\ud800"]}, "tags: found '\\ud800', expected at most 200 printable"),
        ({"reply": "ok", "emotion": "a\tb"}, "emotion: found 'a\\tb', expected at most 200 printable"),
        ({"reply": "ok \ud800"}, "reply: found a lone surrogate at code point 3, expected valid Unicode"),
        ({"reply": "ok", "weight": 10**400}, "weight: found 1000"),
        ({"reply": "ok", "weight": "heavy"}, "weight: found 'heavy', expected a number from 0 to 1000000"),
        ({"reply": "ok", "weight": -1}, "weight: found -1, expected a number"),
        ({"reply": "ok", "weight": True}, "weight: found True, expected a number"),
        ({"reply": "ok", "weight": float("inf")}, "weight: found inf, expected a number"),
        ({"reply": "ok", "valid_from": "2026-01-01T10:00"}, "valid_from: found '2026-01-01T10:00', expected a time with its zone"),
        ({"reply": "ok", "valid_from": "soon"}, "valid_from: found 'soon', expected a time"),
        ({"reply": "ok", "valid_from": "0001-01-01T00:00:00+14:00"}, "valid_from: found '0001"),
        ({"reply": "ok", "valid_until": 20261224}, "valid_until: found 20261224, expected a time"),
        ({"reply": "ok", "valid_from": "2026-01-02", "valid_until": "2026-01-02"}, "valid_until: found 2026-01-02, expected a time after"),
        ({"reply": "ok", "author": "me"}, "found column 'author', expected some of reply, prompts"),
        ({"reply": "ok", "tag": "x"}, "found column 'tag'"),
        ({"reply": "ok", "prompt": "a", "prompts": "b"}, "found 'prompts' twice, expected it once"),
        (["ok"], "found a JSON list, expected an object"),
    ],
)  # fmt: skip
def test_read_tells_a_bad_row_with_its_line_and_goes_on(tmp_path: Path, record: Any, words: str) -> None:
    path = written(tmp_path, f'{{"reply": "one"}}\n\n{json.dumps(record)}\n{{"reply": "two"}}\n', "r.jsonl")
    first, bad, last = read(path, uncased=True)
    assert isinstance(first, Row) and isinstance(last, Row) and isinstance(bad, Bad)
    assert str(bad).startswith(f"r.jsonl:3: {words}"), bad
    assert "mend or drop" in bad.what or "rename or drop" in bad.what


def test_read_tells_lines_that_are_no_json_and_rows_of_too_many_cells(tmp_path: Path) -> None:
    (bad,) = read(written(tmp_path, '{"reply": "one"', "r.jsonl"), uncased=True)
    assert str(bad).startswith("r.jsonl:1: found no JSON (")
    (bad,) = read(written(tmp_path, "prompt\treply\na\tb\tc\n"), uncased=True)
    assert str(bad) == "replies.tsv:2: found 3 cells, expected 2 as in the heading; mend or drop the row"


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("r.tsv", b"prompt;reply\nhi;Hello\n", "r.tsv:1: found columns parted by semicolons, expected tabs"),
        ("r.tsv", b'"prompt","reply"\nhi,Hello\n', "r.tsv:1: found columns parted by commas, expected tabs"),
        ("r.tsv", b"hi\tHello\n", "r.tsv:1: found no heading, expected one such as prompt<TAB>reply"),
        ("r.tsv", b"prompt\tid\nhi\tx\n", "r.tsv:1: found columns prompt, id, expected reply among them"),
        ("r.tsv", b"\n\nprompt\treply\tauthor\n", "r.tsv:3: found column 'author', expected some of"),
        ("r.tsv", b"reply\tprompt\tprompts\n", "r.tsv:1: found column 'prompts' twice"),
        ("r.tsv", b"prompt\treply\rhi\tHello\r", "r.tsv:1: found lines that end in CR alone"),
        ("r.tsv", "reply\nок\n".encode("utf-16"), "r.tsv:1: found UTF-16, expected UTF-8"),
        ("r.tsv", b"reply\nfine\n" + "плохо".encode("cp1251"), "r.tsv:3: found the byte 0xef, expected UTF-8"),
        ("r.tsv", b"reply\n" + b"a" * (1 << 20), "r.tsv:2: found a line of 1048576 bytes or more"),
        ("r.tsv.gz", gzip.compress(b"reply\n" + bytes(range(32, 127)) * 99)[:-20], "expected a whole gzip'd file"),
        ("r.tsv.gz", b"reply\nok\n", "expected a whole gzip'd file"),
        ("r.csv", b"reply\nok\n", "found a file of kind '.csv', expected .tsv, .jsonl"),
        ("replies", b"reply\nok\n", "found a file of kind 'none'"),
        ("r.parquet", b"reply\nok\n", "expected a Parquet file"),
    ],
)  # fmt: skip
def test_read_refuses_a_file_that_is_no_table_of_replies(
    tmp_path: Path, name: str, raw: bytes, words: str
) -> None:
    with pytest.raises(RepliesInvalid) as refused:
        list(read(written(tmp_path, raw, name), uncased=True))
    assert words in str(refused.value)


def test_read_refuses_columns_of_parquet_by_name_and_tells_rows_by_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"reply": ["ok"], "author": ["me"]}), tmp_path / "r.parquet")
    with pytest.raises(RepliesInvalid, match=r"r\.parquet: found column 'author'"):
        list(read(tmp_path / "r.parquet", uncased=True))
    replies = pa.table({"reply": ["ok", None, "fine"], "valid_from": [None, None, datetime(2026, 1, 1)]})
    pq.write_table(replies, tmp_path / "r.parquet")
    fine, *bad = read(tmp_path / "r.parquet", uncased=True)
    assert isinstance(fine, Row)
    assert [str(each).partition(", ")[0] for each in bad] == [
        "r.parquet:row 2: reply: found nothing but spaces",
        "r.parquet:row 3: valid_from: found datetime.datetime(2026",
    ]


def test_read_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    path = written(tmp_path, "reply\n" + "".join(f"reply {i}\n" for i in range(2000)))
    steps: list[tuple[int, int]] = []
    rows = read(path, uncased=True, progress=lambda done, total: steps.append((done, total)))
    next(rows)
    assert len(steps) <= 1  # the rest of the file has not been looked at
    assert len(list(rows)) == 1999
    assert steps[-1][0] == steps[-1][1] and len(steps) > 900


def test_read_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "reply\nok\nwell\n")
    file = RepliesFile(path, uncased=True)
    assert [row.text for row in file.good("checking")] == ["ok", "well"]
    rows = file.good("encoding")
    assert next(rows).text == "ok"
    written(tmp_path, "reply\nok\nwell\nmore\n")
    with pytest.raises(RepliesInvalid, match="found another file than a moment ago"):
        list(rows)
    with pytest.raises(RepliesInvalid, match="found another file than a moment ago"):
        list(file.rows("encoding"))
    with pytest.raises(RepliesInvalid, match="expected a file of replies; check the path"):
        RepliesFile(tmp_path / "nowhere.tsv", uncased=True)


def test_read_takes_the_example_of_the_docs(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "building-an-index.md"
    example = page.read_text(encoding="utf-8").partition("```tsv\n")[2].partition("```")[0]
    rows = list(read(written(tmp_path, example), uncased=True))
    assert [row.id for row in rows if isinstance(row, Row)] == ["", "rain.1", "rain.ru", ""]
    assert rows[0] == Row(
        "replies.tsv:2", "Hello, how was your day?", "hello, how was your day?",
        prompts=(Prompt("hello", "hello"), Prompt("hi there", "hi there")), tags=("greeting",),
    )  # fmt: skip


FIELD = st.sampled_from([*module.COLUMNS, "prompt", "author"])
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["2026-01-01", "1e5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.lists(st.dictionaries(FIELD, VALUE, max_size=5), max_size=4),
    st.binary(max_size=60),
    st.sampled_from(["tsv", "jsonl"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_any_bytes_are_rows_or_told(tmp_path: Path, records: list[Any], raw: bytes, kind: str) -> None:
    text = "\n".join(map(json.dumps, records)) if kind == "jsonl" else "reply\tprompt\tweight\tvalid_from"
    path = written(tmp_path, text.encode() + b"\n" + raw, f"r.{kind}")
    try:
        found = list(read(path, uncased=True))
    except RepliesInvalid as error:
        assert "found the byte" in str(error)
        return
    for row in found:
        if isinstance(row, Row):
            assert row.phrase and all(prompt.phrase for prompt in row.prompts) and 0 <= row.weight <= 1e6
            assert "".join([row.text, row.id, row.emotion, *row.tags, *row.personas]).encode()
        else:
            assert row.where.startswith("r.") and "expected" in row.what
