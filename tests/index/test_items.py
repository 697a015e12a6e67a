"""What each row stands for: read back as written, and refused when it cannot be what a build wrote."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.items import EVERYONE, SCHEMA, Items, micros
from index.shard import IndexInvalid

START = datetime(2026, 1, 1, tzinfo=UTC)
Columns = dict[str, list[Any]]


@pytest.fixture
def columns() -> Columns:
    """Three rows, each on its own vector; the first two propose one reply."""
    return {
        "vector": [0, 1, 2],
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
    made = Items.of(columns, vectors=3)
    made.save(tmp_path / "items.arrow")
    items = Items.load(tmp_path / "items.arrow", rows=3, vectors=3)
    assert len(items) == 3
    assert [items.reply(row) for row in range(3)] == [made.reply(row) for row in range(3)]
    assert items.vectors.tolist() == [0, 1, 2]
    second, third = items.reply(1), items.reply(2)
    assert (second.id, second.text, second.prompt) == ("tea", "Чай или кофе?", "хочу пить")
    assert (second.weight, second.emotion, second.tags) == (0.5, "", ("drink", "hot"))
    assert (second.persona_mask, second.surface_mask) == (1, EVERYONE)
    assert (second.valid_from, second.valid_until) == (START, None)
    assert (third.valid_from, third.valid_until, third.emotion) == (None, START, "joy")


def test_items_same_rows_give_same_bytes(tmp_path: Path, columns: Columns) -> None:
    Items.of(columns, vectors=3).save(tmp_path / "a")
    Items.load(tmp_path / "a", rows=3, vectors=3).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_items_know_the_rows_of_a_reply(columns: Columns) -> None:
    items = Items.of(columns, vectors=3)
    assert items.rows_of("tea") == [0, 1]
    assert items.rows_of("dog") == []


@pytest.mark.parametrize(
    ("hangs_on", "pairs"),
    [
        ([0, 1, 2], [[0], [1], [2]]),
        ([2, 0, 1], [[1], [2], [0]]),
        ([1, 0, 1], [[1], [2, 0]]),
        ([0, 0, 0], [[2, 0, 1]]),
    ],
    ids=["one each", "another order", "strewn", "all on one"],
)
def test_items_know_the_pairs_of_a_vector(
    columns: Columns, hangs_on: list[int], pairs: list[list[int]]
) -> None:
    """Row 2 weighs most and row 1 least."""
    items = Items.of(columns | {"vector": hangs_on}, vectors=len(pairs))
    assert [items.pairs_of(vector) for vector in range(len(pairs))] == pairs
    for allowed in product([False, True], repeat=3):
        expected = [any(allowed[row] for row in rows) for rows in pairs]
        assert items.any_of(np.array(allowed)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("aBb\u00e9\U0001f408\uffff", min_size=1, max_size=3),
            st.sampled_from([-1.0, 0.0, 0.1, 2.0]),
            st.integers(0, 4),
        ),
        max_size=20,
    )
)
def test_items_order_pairs_by_weight_then_id_then_row(drawn: list[tuple[str, float, int]]) -> None:
    """Ids as Python compares strings, which is not how their bytes in UTF-16 would."""
    count = len(drawn)
    numbers = sorted({vector for _, _, vector in drawn})
    hangs_on = [numbers.index(vector) for _, _, vector in drawn]
    items = Items.of(
        {
            "vector": hangs_on,
            "id": [reply_id for reply_id, _, _ in drawn],
            "text": [f"Reply {reply_id}." for reply_id, _, _ in drawn],
            "prompt": [f"prompt {row}" for row in range(count)],
            "persona_mask": [EVERYONE] * count,
            "surface_mask": [EVERYONE] * count,
            "valid_from": [None] * count,
            "valid_until": [None] * count,
            "weight": [weight for _, weight, _ in drawn],
            "emotion": [""] * count,
            "tags": [[]] * count,
        },
        vectors=len(numbers),
    )
    expected = sorted(range(count), key=lambda row: (-drawn[row][1], drawn[row][0], row))
    assert items.ordered(list(range(count))) == expected
    for vector in range(len(numbers)):
        assert items.pairs_of(vector) == [row for row in expected if hangs_on[row] == vector]


def test_items_may_be_none(tmp_path: Path, columns: Columns) -> None:
    Items.of({name: [] for name in columns}, vectors=0).save(tmp_path / "items.arrow")
    items = Items.load(tmp_path / "items.arrow", rows=0, vectors=0)
    assert len(items) == 0
    assert items.any_of(np.empty(0, np.bool_)).shape == (0,)


@pytest.mark.parametrize("row", [-1, 3])
def test_items_refuse_a_row_that_is_not_there(columns: Columns, row: int) -> None:
    with pytest.raises(IndexError, match=f"found {row}"):
        Items.of(columns, vectors=3).reply(row)


def test_items_replies_cannot_be_changed(columns: Columns) -> None:
    with pytest.raises(FrozenInstanceError):
        Items.of(columns, vectors=3).reply(0).text = "other"  # type: ignore[misc]


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
        ("vector", 0, None, "vector: found nulls"),
        ("vector", 2, 3, "row 2: found vector 3, expected one of the 3 there are"),
    ],
)
def test_items_load_refuses(
    tmp_path: Path, columns: Columns, column: str, row: int, value: object, message: str
) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    Items.load(path, rows=3, vectors=3)  # the control: written the same way, unchanged, it loads
    columns[column][row] = value
    written(path, table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow {message}"):
        Items.load(path, rows=3, vectors=3)


@pytest.mark.parametrize(
    ("hangs_on", "vectors", "message"),
    [
        ([0, 1, 2], 2, "items.arrow row 2: found vector 2, expected one of the 2 there are"),
        ([3, 0, 9], 2, "items.arrow row 0: found vector 3, expected one of the 2 there are"),
        ([0, 1, 2], 0, "items.arrow row 0: found vector 0, expected one of the 0 there are"),
        ([0, 1, 2], 4, "items.arrow: found vector 3 without a reply, expected one reply or more for each"),
        ([0, 2, 2], 3, "items.arrow: found vector 1 without a reply"),
        ([2, 1, 1], 3, "items.arrow: found vector 0 without a reply"),
    ],
    ids="beyond first-beyond none-there fewer gap headless".split(),
)
def test_items_load_refuses_vectors_of_another_index(
    tmp_path: Path, columns: Columns, hangs_on: list[int], vectors: int, message: str
) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    Items.load(path, rows=3, vectors=3)  # the control
    written(path, table_of(columns | {"vector": hangs_on}))
    with pytest.raises(IndexInvalid, match=message):
        Items.load(path, rows=3, vectors=vectors)


def test_items_load_refuses_the_largest_vector_number_in_little_memory(
    tmp_path: Path, columns: Columns
) -> None:
    """Counting up to it would take 32 GB before the refusal."""
    path = written(tmp_path / "items.arrow", table_of(columns | {"vector": [0, 1, 0xFFFFFFFF]}))
    tracemalloc.start()
    try:
        with pytest.raises(IndexInvalid, match="row 2: found vector 4294967295, expected one of the 3"):
            Items.load(path, rows=3, vectors=3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


def test_items_none_are_refused_where_there_are_vectors(columns: Columns) -> None:
    with pytest.raises(IndexInvalid, match="entries: found vector 0 without a reply"):
        Items.of({name: [] for name in columns}, vectors=2)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_items_load_refuses_another_number_of_rows(tmp_path: Path, columns: Columns, rows: int) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow: found 3 items, expected {rows}"):
        Items.load(path, rows=rows, vectors=3)


def cast(name: str, to: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, table[name].cast(to))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["emotion"]),
        lambda table: table.drop_columns(["vector"]),
        lambda table: table.append_column("extra", table["id"]),
        lambda table: table.select(table.schema.names[::-1]),
        cast("weight", pa.float64()),
        cast("vector", pa.int64()),
        cast("valid_from", pa.timestamp("us")),
    ],
    ids=["missing", "earlier-build", "extra", "order", "type", "signed-vector", "no-time-zone"],
)
def test_items_load_refuses_another_schema(
    tmp_path: Path, columns: Columns, change: Callable[[pa.Table], pa.Table]
) -> None:
    path = written(tmp_path / "items.arrow", change(table_of(columns)))
    with pytest.raises(IndexInvalid, match="found columns"):
        Items.load(path, rows=3, vectors=3)


def test_items_load_refuses_broken_utf8(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    raw = path.read_bytes()
    assert raw.count(b"what does the cat say") == 1
    path.write_bytes(raw.replace(b"what does the cat say", b"what does the cat \xff\xfe\xfd"))
    with pytest.raises(IndexInvalid, match="broken columns"):
        Items.load(path, rows=3, vectors=3)


@pytest.mark.parametrize("raw", [b"", b"not arrow at all", b"ARROW1\0\0"], ids=["empty", "other", "head"])
def test_items_load_refuses_what_is_not_arrow(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "items.arrow").write_bytes(raw)
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        Items.load(tmp_path / "items.arrow", rows=3, vectors=3)


def test_items_load_refuses_a_truncated_file(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        Items.load(path, rows=3, vectors=3)


def test_items_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IndexInvalid, match="items.arrow: found no file"):
        Items.load(tmp_path / "items.arrow", rows=3, vectors=3)


def test_items_micros_counts_in_any_time_zone() -> None:
    instant = datetime(1970, 1, 1, 2, 0, 0, 7, tzinfo=timezone(timedelta(hours=2)))
    assert micros(instant) == 7


def test_items_micros_refuses_a_naive_datetime() -> None:
    with pytest.raises(ValueError, match="time zone"):
        micros(datetime(2026, 1, 1))
