"""What each row stands for: read back as written, and refused when it cannot be what a build wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from index.items import EVERYONE, SCHEMA, Items, micros
from index.shard import IndexInvalid

START = datetime(2026, 1, 1, tzinfo=UTC)
Columns = dict[str, list[Any]]


@pytest.fixture
def columns() -> Columns:
    """Three rows; the first two propose one reply."""
    return {
        "id": ["tea", "tea", "cat"],
        "text": ["Чай или кофе?", "Чай или кофе?", "Meow 🐈"],
        "prompt": ["i am thirsty", "хочу пить", "what does the cat say"],
        "persona_mask": [EVERYONE, 1, 3],
        "surface_mask": [EVERYONE, EVERYONE, 2],
        "valid_from": [None, micros(START), None],
        "valid_until": [None, None, micros(START)],
        "weight": [1.0, 0.5, 2.0],
        "emotion": ["", "", "joy"],
        "tags": [[], ["drink", "hot"], []],
    }


def written(path: Path, table: pa.Table) -> Path:
    """An Arrow file that skips the checks of `Items`."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def table_of(columns: Columns) -> pa.Table:
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def test_items_come_back_as_saved(tmp_path: Path, columns: Columns) -> None:
    Items.of(columns).save(tmp_path / "items.arrow")
    items = Items.load(tmp_path / "items.arrow", rows=3)
    assert len(items) == 3
    assert [items.reply(row) for row in range(3)] == [Items.of(columns).reply(row) for row in range(3)]
    second, third = items.reply(1), items.reply(2)
    assert (second.id, second.text, second.prompt) == ("tea", "Чай или кофе?", "хочу пить")
    assert (second.weight, second.emotion, second.tags) == (0.5, "", ("drink", "hot"))
    assert (second.persona_mask, second.surface_mask) == (1, EVERYONE)
    assert (second.valid_from, second.valid_until) == (START, None)
    assert (third.valid_from, third.valid_until, third.emotion) == (None, START, "joy")


def test_items_same_rows_give_same_bytes(tmp_path: Path, columns: Columns) -> None:
    Items.of(columns).save(tmp_path / "a")
    Items.load(tmp_path / "a", rows=3).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_items_know_the_rows_of_a_reply(columns: Columns) -> None:
    items = Items.of(columns)
    assert items.rows_of("tea") == [0, 1]
    assert items.rows_of("dog") == []
    assert items.max_rows_per_reply == 2


def test_items_may_be_none(tmp_path: Path, columns: Columns) -> None:
    Items.of({name: [] for name in columns}).save(tmp_path / "items.arrow")
    items = Items.load(tmp_path / "items.arrow", rows=0)
    assert (len(items), items.max_rows_per_reply) == (0, 0)


@pytest.mark.parametrize("row", [-1, 3])
def test_items_refuse_a_row_that_is_not_there(columns: Columns, row: int) -> None:
    with pytest.raises(IndexError, match=f"found {row}"):
        Items.of(columns).reply(row)


def test_items_replies_cannot_be_changed(columns: Columns) -> None:
    with pytest.raises(FrozenInstanceError):
        Items.of(columns).reply(0).text = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("weight", 1, float("nan"), "row 1: found an infinite or NaN weight"),
        ("weight", 2, float("inf"), "row 2: found an infinite or NaN weight"),
        ("valid_until", 1, micros(START), "row 1: found valid_from not before valid_until"),
        ("id", 2, "", "row 2: found an empty id"),
        ("text", 2, "", "row 2: found an empty text"),
        ("text", 1, "Tea?", r"id 'tea': found different texts in rows \[0, 1\]"),
        ("id", 2, "tea", r"id 'tea': found different texts in rows \[0, 1, 2\]"),
        ("prompt", 1, "i am thirsty", r"id 'tea': found one prompt twice in rows \[0, 1\]"),
        ("id", 0, None, "id: found nulls"),
        ("weight", 0, None, "weight: found nulls"),
        ("tags", 0, None, "tags: found nulls"),
    ],
)
def test_items_load_refuses(
    tmp_path: Path, columns: Columns, column: str, row: int, value: object, message: str
) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    Items.load(path, rows=3)  # the control: written the same way, unchanged, it loads
    columns[column][row] = value
    written(path, table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow {message}"):
        Items.load(path, rows=3)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_items_load_refuses_another_number_of_rows(tmp_path: Path, columns: Columns, rows: int) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow: found 3 items, expected {rows}"):
        Items.load(path, rows=rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["emotion"]),
        lambda table: table.append_column("extra", table["id"]),
        lambda table: table.select(table.schema.names[::-1]),
        lambda table: table.set_column(7, "weight", table["weight"].cast(pa.float64())),
        lambda table: table.set_column(5, "valid_from", table["valid_from"].cast(pa.timestamp("us"))),
    ],
    ids=["missing", "extra", "order", "type", "no-time-zone"],
)
def test_items_load_refuses_another_schema(
    tmp_path: Path, columns: Columns, change: Callable[[pa.Table], pa.Table]
) -> None:
    path = written(tmp_path / "items.arrow", change(table_of(columns)))
    with pytest.raises(IndexInvalid, match="found columns"):
        Items.load(path, rows=3)


def test_items_load_refuses_broken_utf8(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    raw = path.read_bytes()
    assert raw.count(b"what does the cat say") == 1
    path.write_bytes(raw.replace(b"what does the cat say", b"what does the cat \xff\xfe\xfd"))
    with pytest.raises(IndexInvalid, match="broken columns"):
        Items.load(path, rows=3)


@pytest.mark.parametrize("raw", [b"", b"not arrow at all", b"ARROW1\0\0"], ids=["empty", "other", "head"])
def test_items_load_refuses_what_is_not_arrow(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "items.arrow").write_bytes(raw)
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        Items.load(tmp_path / "items.arrow", rows=3)


def test_items_load_refuses_a_truncated_file(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        Items.load(path, rows=3)


def test_items_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IndexInvalid, match="items.arrow: found no file"):
        Items.load(tmp_path / "items.arrow", rows=3)


def test_items_micros_counts_in_any_time_zone() -> None:
    instant = datetime(1970, 1, 1, 2, 0, 0, 7, tzinfo=timezone(timedelta(hours=2)))
    assert micros(instant) == 7


def test_items_micros_refuses_a_naive_datetime() -> None:
    with pytest.raises(ValueError, match="time zone"):
        micros(datetime(2026, 1, 1))
