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

from index.items import ALWAYS_FROM, ALWAYS_UNTIL, EVERYONE, SCHEMA, Items, Judged, batch, micros, writer
from index.layout import IndexInvalid
from tests.index.tampering import digest

START = datetime(2026, 1, 1, tzinfo=UTC)
Columns = dict[str, list[Any]]


@pytest.fixture
def columns() -> Columns:
    """Three rows, each on its own vector; the first two propose one reply."""
    return {
        "vector": [0, 1, 2],
        "said": [1, 1, 0],
        "id": ["tea", "tea", "cat"],
        "text": ["Чай или кофе?", "Чай или кофе?", "Meow 🐈"],
        "prompt": ["i am thirsty", "хочу пить", "what does the cat say"],
        "persona_mask": [EVERYONE, 1, 3],
        "surface_mask": [EVERYONE, EVERYONE, 2],
        "valid_from": [None, micros(START), None],
        "valid_until": [None, None, micros(START)],
        "weight": [1.0, 0.5, 2.0],
        "emotion": ["", "", "joy"],
        "tags": [[], ["drink", "hot"], ["hot"]],
        "labels": [
            [
                {"head": "emotion", "label": "joy", "score": 0.75},
                {"head": "scope", "label": "да", "score": 0.5},
            ],
            [],
            [],
        ],
        "blocked": ["", "", "rude"],
    }


def written(path: Path, table: pa.Table) -> Path:
    """An Arrow file that skips the checks of `Items`; a new file, because the old may still be mapped."""
    path.unlink(missing_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return path


def table_of(columns: Columns) -> pa.Table:
    return pa.Table.from_batches([batch(columns)])


def loaded(path: Path, *, rows: int = 3, vectors: int = 3, said: int = 2) -> Items:
    """The file with the digest it has: what is tested are the checks behind that."""
    return Items.load(path, sha256=digest(path), rows=rows, vectors=vectors, said=said)


def test_items_come_back_as_written(tmp_path: Path, columns: Columns) -> None:
    made = Items.of(columns, vectors=3, said=2)
    items = loaded(written(tmp_path / "items.arrow", made.table))
    assert len(items) == 3
    assert [items.reply(row) for row in range(3)] == [made.reply(row) for row in range(3)]
    assert (items.vectors.tolist(), items.said.tolist()) == ([0, 1, 2], [1, 1, 0])
    assert items.blocked.tolist() == [False, False, True]
    second, third = items.reply(1), items.reply(2)
    assert (second.id, second.text, second.prompt) == ("tea", "Чай или кофе?", "хочу пить")
    assert (second.weight, second.emotion, second.tags) == (0.5, "", ("drink", "hot"))
    assert (second.persona_mask, second.surface_mask) == (1, EVERYONE)
    assert (second.valid_from, second.valid_until) == (START, None)
    # They lie in the first row of each reply, and hold for all of them.
    assert (
        items.reply(0).labels == second.labels == (Judged("emotion", "joy", 0.75), Judged("scope", "да", 0.5))
    )
    assert (third.valid_from, third.valid_until, third.emotion) == (None, START, "joy")
    assert (third.labels, third.blocked) == ((), "rude")


def test_items_same_batches_give_the_same_bytes(tmp_path: Path, columns: Columns) -> None:
    for name in ("a", "b"):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, writer(sink) as batches:
            batches.write_batch(batch(columns))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_items_stay_in_the_file_and_outlive_it(tmp_path: Path, columns: Columns) -> None:
    items = loaded(written(tmp_path / "items.arrow", table_of(columns)))
    assert str(tmp_path / "items.arrow") in Path("/proc/self/maps").read_text()
    (tmp_path / "items.arrow").unlink()
    (tmp_path / "items.arrow").write_bytes(bytes(5000))
    assert [items.reply(row).id for row in range(3)] == ["tea", "tea", "cat"]


def test_items_of_many_batches_are_one_table(tmp_path: Path, columns: Columns) -> None:
    """Rows are numbered through, in tags too, which Arrow numbers batch by batch."""
    path = tmp_path / "items.arrow"
    with pa.OSFile(str(path), "wb") as sink, writer(sink) as batches:
        for row in range(3):
            batches.write_batch(batch({name: cells[row : row + 1] for name, cells in columns.items()}))
    items, whole = loaded(path), Items.of(columns, vectors=3, said=2)
    assert [items.reply(row) for row in range(3)] == [whole.reply(row) for row in range(3)]
    for tag, carried in (("hot", [False, True, True]), ("drink", [False, True, False]), ("x", [False] * 3)):
        assert items.with_tag(tag).tolist() == whole.with_tag(tag).tolist() == carried
    assert [items.id_of(row) for row in range(3)] == ["tea", "tea", "cat"]
    columns["labels"][2] = [{"head": "h", "label": "l", "score": float("nan")}]
    with pa.OSFile(str(path), "wb") as sink, writer(sink) as batches:
        for row in range(3):
            batches.write_batch(batch({name: cells[row : row + 1] for name, cells in columns.items()}))
    with pytest.raises(IndexInvalid, match="row 2: found a label of an infinite or NaN score"):
        loaded(path)


def test_items_know_the_rows_of_a_reply(columns: Columns) -> None:
    items = Items.of(columns, vectors=3, said=2)
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
    items = Items.of(columns | {"vector": hangs_on}, vectors=len(pairs), said=2)
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
            "said": [0] * count,
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
            "labels": [[]] * count,
            "blocked": [""] * count,
        },
        vectors=len(numbers),
        said=1,
    )
    expected = sorted(range(count), key=lambda row: (-drawn[row][1], drawn[row][0], row))
    assert items.ordered(list(range(count))) == expected
    for vector in range(len(numbers)):
        assert items.pairs_of(vector) == [row for row in expected if hangs_on[row] == vector]


def test_items_may_be_none(tmp_path: Path, columns: Columns) -> None:
    nothing = Items.of({name: [] for name in columns}, vectors=2, said=0)
    items = loaded(written(tmp_path / "items.arrow", nothing.table), rows=0, vectors=2, said=0)
    assert (len(items), items.pairs_of(1), items.rows_of("tea")) == (0, [], [])
    assert items.any_of(np.empty(0, np.bool_)).tolist() == [False, False]
    assert items.with_tag("hot").shape == (0,)


def test_items_leave_a_vector_without_rows_when_its_replies_were_removed(columns: Columns) -> None:
    items = Items.of(columns | {"vector": [0, 3, 3]}, vectors=5, said=2)
    assert [items.pairs_of(vector) for vector in range(5)] == [[0], [], [], [2, 1], []]
    assert items.any_of(np.ones(3, np.bool_)).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("row", [-1, 3])
def test_items_refuse_a_row_that_is_not_there(columns: Columns, row: int) -> None:
    with pytest.raises(IndexError, match=f"found {row}"):
        Items.of(columns, vectors=3, said=2).reply(row)
    with pytest.raises(IndexError, match=f"found {row}"):
        Items.of(columns, vectors=3, said=2).id_of(row)


def test_items_replies_cannot_be_changed(columns: Columns) -> None:
    with pytest.raises(FrozenInstanceError):
        Items.of(columns, vectors=3, said=2).reply(0).text = "other"  # type: ignore[misc]


def judged(**cells: object) -> list[dict[str, object]]:
    return [{"head": "h", "label": "l", "score": 0.5} | cells]


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("weight", 1, float("nan"), "row 1: found an infinite or NaN weight"),
        ("weight", 2, float("inf"), "row 2: found an infinite or NaN weight"),
        ("valid_until", 1, micros(START), "row 1: found valid_from not before valid_until"),
        ("valid_from", 0, ALWAYS_FROM + 1, "row 0: found a valid_from outside the calendar"),
        ("valid_from", 0, 1 << 60, "row 0: found a valid_from outside the calendar"),
        ("valid_from", 0, ALWAYS_UNTIL, "row 0: found valid_from not before valid_until"),
        ("valid_until", 1, 1 << 62, "row 1: found a valid_until outside the calendar"),
        ("id", 2, "", "row 2: found an empty id"),
        ("text", 2, "", "row 2: found an empty text"),
        ("text", 1, "Tea?", r"id 'tea': found different texts in rows \[0, 1\]"),
        ("id", 2, "tea", r"id 'tea': found different texts in rows \[1, 2\]"),
        ("prompt", 1, "i am thirsty", r"id 'tea': found one prompt twice in rows \[0, 1\]"),
        ("blocked", 1, "rude", r"id 'tea': found blocked in one row and not in another in rows \[0, 1\]"),
        ("said", 1, 0, r"id 'tea': found different said vectors in rows \[0, 1\]"),
        ("vector", 2, 3, "row 2: found vector 3, expected one of the 3 there are"),
        ("said", 2, 2, "row 2: found said vector 2, expected one of the 2 there are"),
        ("labels", 2, judged(score=float("nan")), "row 2: found a label of an infinite or NaN score"),
        ("labels", 0, judged(score=float("-inf")), "row 0: found a label of an infinite or NaN score"),
        ("labels", 2, judged(score=None), "labels: found nulls"),
        ("labels", 2, judged(head=None), "labels: found nulls"),
        ("labels", 2, judged() + [None], "labels: found nulls"),
        ("tags", 1, ["hot", None], "tags: found nulls"),
        *((name, 0, None, f"{name}: found nulls") for name in SCHEMA.names if "valid" not in name),
    ],
)
def test_items_load_refuses(
    tmp_path: Path, columns: Columns, column: str, row: int, value: object, message: str
) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    loaded(path)  # the control: written the same way, unchanged, it loads
    columns[column][row] = value
    written(path, table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow {message}") as refusal:
        loaded(path)
    assert refusal.value.part.startswith("items.arrow") and refusal.value.remedy


@pytest.mark.parametrize("instant", [datetime.min, datetime.max])
def test_items_reach_both_ends_of_the_calendar(columns: Columns, instant: datetime) -> None:
    moment = instant.replace(tzinfo=UTC)
    columns["valid_from"][2] = micros(moment) - (moment.year > 1)
    columns["valid_until"][2] = micros(moment) + (moment.year == 1)
    reply = Items.of(columns, vectors=3, said=2).reply(2)
    assert moment in (reply.valid_from, reply.valid_until)


@pytest.mark.parametrize(
    ("hangs_on", "vectors", "message"),
    [
        ([0, 1, 2], 2, "items.arrow row 2: found vector 2, expected one of the 2 there are"),
        ([3, 0, 9], 2, "items.arrow row 0: found vector 3, expected one of the 2 there are"),
        ([0, 1, 2], 0, "items.arrow row 0: found vector 0, expected one of the 0 there are"),
    ],
    ids="beyond first-beyond none-there".split(),
)
def test_items_load_refuses_vectors_of_another_index(
    tmp_path: Path, columns: Columns, hangs_on: list[int], vectors: int, message: str
) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    loaded(path)  # the control
    written(path, table_of(columns | {"vector": hangs_on}))
    with pytest.raises(IndexInvalid, match=message):
        loaded(path, vectors=vectors)


def test_items_load_refuses_the_largest_vector_number_in_little_memory(
    tmp_path: Path, columns: Columns
) -> None:
    """Counting up to it would take 32 GB before the refusal."""
    path = written(tmp_path / "items.arrow", table_of(columns | {"vector": [0, 1, 0xFFFFFFFF]}))
    tracemalloc.start()
    try:
        with pytest.raises(IndexInvalid, match="row 2: found vector 4294967295, expected one of the 3"):
            loaded(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_items_load_refuses_another_number_of_rows(tmp_path: Path, columns: Columns, rows: int) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    with pytest.raises(IndexInvalid, match=f"items.arrow: found 3 items, expected {rows}"):
        loaded(path, rows=rows)


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
        cast("valid_from", pa.timestamp("ns", "UTC")),
        cast("emotion", pa.dictionary(pa.int32(), pa.string())),
        cast("text", pa.large_string()),
    ],
    ids="missing earlier-build extra order type signed-vector no-time-zone nanoseconds codes large".split(),
)
def test_items_load_refuses_another_schema(
    tmp_path: Path, columns: Columns, change: Callable[[pa.Table], pa.Table]
) -> None:
    path = written(tmp_path / "items.arrow", change(table_of(columns)))
    with pytest.raises(IndexInvalid, match="found columns"):
        loaded(path)


def test_items_load_refuses_broken_utf8(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    raw = path.read_bytes()
    assert raw.count(b"what does the cat say") == 1
    path.write_bytes(raw.replace(b"what does the cat say", b"what does the cat \xff\xfe\xfd"))
    with pytest.raises(IndexInvalid, match="broken columns"):
        loaded(path)


@pytest.mark.parametrize("raw", [b"", b"not arrow at all", b"ARROW1\0\0"], ids=["empty", "other", "head"])
def test_items_load_refuses_what_is_not_arrow(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "items.arrow").write_bytes(raw)
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        loaded(tmp_path / "items.arrow")


def test_items_load_refuses_a_truncated_file(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        loaded(path)


def test_items_load_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IndexInvalid, match="items.arrow: found no file"):
        Items.load(tmp_path / "items.arrow", sha256="ab" * 32, rows=3, vectors=3, said=2)


def test_items_load_refuses_another_digest(tmp_path: Path, columns: Columns) -> None:
    path = written(tmp_path / "items.arrow", table_of(columns))
    before = digest(path)
    Items.load(path, sha256=before, rows=3, vectors=3, said=2)  # the control
    columns["text"][2] = "Woof"
    written(path, table_of(columns))
    with pytest.raises(
        IndexInvalid, match=f"items.arrow: found sha256 .* expected {before}, as index.json says"
    ):
        Items.load(path, sha256=before, rows=3, vectors=3, said=2)


@pytest.mark.parametrize("seed", range(8))
def test_items_load_survives_any_damage(tmp_path: Path, columns: Columns, seed: int) -> None:
    """Bytes turned, cut out or put in, behind a digest that fits: refused by name, or still rows like any others."""
    path = written(tmp_path / "items.arrow", table_of(columns))
    raw, rng, refused = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(150):
        data = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 4)):
            kind = rng.integers(0, 10)
            if kind < 8:
                data[min(place, len(data) - 1)] = rng.choice(
                    [0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))]
                )
            elif kind == 8:
                del data[place : place + 8]
            else:
                data[place:place] = bytes(8)
        path.unlink()
        path.write_bytes(data)
        try:
            items = loaded(path)
        except IndexInvalid as error:
            refused += 1
            assert error.part.startswith("items.arrow")
            continue
        assert all(items.reply(row).id for row in range(3))
        assert items.with_tag("hot").shape == (3,)
    assert 30 < refused < 150


def test_items_micros_counts_in_any_time_zone() -> None:
    instant = datetime(1970, 1, 1, 2, 0, 0, 7, tzinfo=timezone(timedelta(hours=2)))
    assert micros(instant) == 7


def test_items_micros_refuses_a_naive_datetime() -> None:
    with pytest.raises(ValueError, match="time zone"):
        micros(datetime(2026, 1, 1))


def test_items_refuse_compressed_batches(tmp_path: Path, columns: Columns) -> None:
    """A few kilobytes could grow to any size in memory; the same rows as they lie are the control."""
    wide = {name: cells * 2000 for name, cells in columns.items()}
    wide["id"] = [f"r{row}" for row in range(6000)]
    wide["said"] = [0] * 6000
    table = table_of(wide)
    plain = loaded(written(tmp_path / "plain.arrow", table), rows=6000)
    assert len(plain) == 6000
    path = tmp_path / "items.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as file:
        file.write_table(table)
    with pytest.raises(IndexInvalid, match="compressed"):
        loaded(path, rows=6000)
