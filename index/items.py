"""`Items`: an Arrow table of (prompt, reply) pairs, and which vector of the index each pair hangs on.

A vector was made from a prompt, or from a reply itself; a hit on it proposes every reply that hangs on it. Several
pairs may propose one reply, under one id. The table stays memory-mapped: a reply becomes an object when it is found.
The only module that imports pyarrow.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.layout import INDEX_FILE, IndexInvalid

ITEMS_FILE = "items.arrow"
CHECK_ROWS = 1 << 16
REMEMBERED_REPLIES = 8192  # rows kept ready as objects; an index may have a hundred times as many
EVERYONE = 0xFFFFFFFF  # the mask of a row that every persona may say, or every surface may play
ALWAYS_FROM = int(np.iinfo(np.int64).min)  # stands for a null valid_from, in microseconds since 1970
ALWAYS_UNTIL = int(np.iinfo(np.int64).max)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

_LABEL = pa.struct(
    [
        pa.field("head", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("vector", pa.uint32(), nullable=False),
        pa.field("said", pa.uint32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("persona_mask", pa.uint32(), nullable=False),
        pa.field("surface_mask", pa.uint32(), nullable=False),
        pa.field("valid_from", pa.timestamp("us", tz="UTC")),
        pa.field("valid_until", pa.timestamp("us", tz="UTC")),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("emotion", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
        # In the first row of each reply alone.
        pa.field("labels", pa.list_(pa.field("item", _LABEL, nullable=False)), nullable=False),
        pa.field("blocked", pa.string(), nullable=False),
    ]
)


class Judged(NamedTuple):
    """What a head says of a reply's own text, worked out when the index was built."""

    head: str
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class ReplyItem:
    """One row: a reply, and the prompt under which it was found."""

    id: str
    text: str
    prompt: str  # "" where the reply's own vector was found
    weight: float
    emotion: str  # the mood this reply answers, or ""
    tags: tuple[str, ...]
    persona_mask: int
    surface_mask: int
    valid_from: datetime | None
    valid_until: datetime | None
    labels: tuple[Judged, ...] = ()
    blocked: str = ""  # why it must never be said, or ""


class Items:
    """The rows of one index. Immutable."""

    def __init__(self, table: pa.Table, *, vectors: int, said: int, part: str = ITEMS_FILE) -> None:
        """Checks every promise the rest of the package leans on; raises `IndexInvalid` naming `part`.

        Rows hang on `vectors` vectors; `said` vectors are of the replies' own texts.
        """
        _check_table(table, part)
        self.table = table
        self.persona_masks: NDArray[np.uint32] = table["persona_mask"].to_numpy()  # [rows]
        self.surface_masks: NDArray[np.uint32] = table["surface_mask"].to_numpy()  # [rows]
        self.valid_from = _micros(table["valid_from"], ALWAYS_FROM)  # [rows]
        self.valid_until = _micros(table["valid_until"], ALWAYS_UNTIL)  # [rows]
        self.vectors: NDArray[np.uint32] = table["vector"].to_numpy()  # [rows] the vector each pair hangs on
        self.said: NDArray[np.uint32] = table["said"].to_numpy()  # [rows] the vector of each reply's text
        self.blocked: NDArray[np.bool_] = _numpy(pc.not_equal(table["blocked"], ""))  # [rows]
        _check_rows(table, self, part)
        _check_below(self.vectors, vectors, part, "vector")
        _check_below(self.said, said, part, "said vector")
        self._ids = table["id"]
        self._by_id: NDArray[np.int32] = _numpy(pc.sort_indices(self._ids)).astype(
            np.int32
        )  # as Python compares
        again = _same(self._ids, self._by_id[:-1], self._by_id[1:])  # the next row by id is of the same reply
        replies = np.empty(len(table), np.int32)
        replies[self._by_id] = np.cumsum(np.append(False, ~again)[: len(table)])
        _check_replies(table, self._by_id, again, part)
        firsts = np.empty(len(table), np.int32)
        firsts[replies[::-1]] = np.arange(len(table), dtype=np.int32)[::-1]
        self._firsts = firsts.data  # [replies] the first row of each, which holds its labels
        self.replies = replies.data  # [rows] the number of each row's reply; one reads it cell by cell
        order = np.lexsort((replies, -table["weight"].to_numpy()))
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        self._rank = rank.data  # [rows] place by weight, then by id
        self._by_vector = np.lexsort((rank, self.vectors)).astype(np.int32)  # pairs of a vector side by side
        starts = np.searchsorted(self.vectors[self._by_vector], np.arange(vectors + 1)).astype(np.int32)
        self._starts = starts.data
        self._columns = {name: table[name] for name in (*_SHOWN, "tags", "labels")}
        # What is remembered does not hold on to who remembers: replaced items are freed at once, without a collection.
        me: Items = weakref.proxy(self)
        self._labels = lru_cache(maxsize=REMEMBERED_REPLIES)(lambda first: me._judged(first))
        self._known = lru_cache(maxsize=REMEMBERED_REPLIES)(lambda row: me._reply(row))
        pa.default_memory_pool().release_unused()  # what the checks took and gave back

    @classmethod
    def of(cls, columns: Mapping[str, list[Any]], *, vectors: int, said: int, part: str = "entries") -> Items:
        """Items of plain columns, named as in `SCHEMA`; times in microseconds since 1970 or None."""
        return cls(pa.Table.from_batches([batch(columns)]), vectors=vectors, said=said, part=part)

    @classmethod
    def load(
        cls, path: Path, *, sha256: str, rows: int, vectors: int, said: int, part: str | None = None
    ) -> Items:
        """The `rows` pairs of an index, memory-mapped."""
        if not path.is_file():
            raise _invalid(path.name, "no file", str(path))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise _invalid(path.name, f"sha256 {digest}", f"{sha256}, as {INDEX_FILE} says")
        try:
            with pa.memory_map(str(path)) as source:
                table = _whole(pa.ipc.open_file(source), path)
        except (pa.ArrowException, OSError) as error:
            raise _invalid(path.name, f"unreadable ({error})", "an Arrow IPC file") from error
        if len(table) != rows:
            raise _invalid(path.name, f"{len(table)} items", f"{rows}, as {path.parent.name} says")
        return cls(table, vectors=vectors, said=said, part=part or path.name)

    def __len__(self) -> int:
        return len(self._ids)

    def reply(self, row: int) -> ReplyItem:
        self._check_row(row)
        return self._known(row)

    def id_of(self, row: int) -> str:
        """The id of a row's reply."""
        self._check_row(row)
        return str(self._ids[row].as_py())

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self._ids):  # a negative row would answer with somebody else's reply
            raise IndexError(
                f"row: found {row}, expected 0 to {len(self._ids) - 1}; remedy: pass a row of a hit"
            )

    def _reply(self, row: int) -> ReplyItem:
        cell = {name: self._columns[name][row].as_py() for name in _SHOWN}
        return ReplyItem(
            **cell,
            persona_mask=int(self.persona_masks[row]),
            surface_mask=int(self.surface_masks[row]),
            valid_from=_instant(int(self.valid_from[row])),
            valid_until=_instant(int(self.valid_until[row])),
            tags=tuple(self._columns["tags"][row].as_py()),
            labels=self._labels(self._firsts[self.replies[row]]),
        )

    def _judged(self, first: int) -> tuple[Judged, ...]:
        """The labels of the reply whose first row this is."""
        return tuple(Judged(**judged) for judged in self._columns["labels"][first].as_py())

    def pairs_of(self, vector: int) -> list[int]:
        """The rows that hang on this vector, heaviest first, then by id; none when they were all removed."""
        rows: list[int] = self._by_vector[self._starts[vector] : self._starts[vector + 1]].tolist()
        return rows

    def ordered(self, rows: list[int]) -> list[int]:
        """Rows, heaviest first, then by id."""
        return sorted(rows, key=self._rank.__getitem__)

    def any_of(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[vectors]`: whether any row of a vector is among the `allowed` `[rows]`."""
        reached = np.zeros(len(self._starts) - 1, np.bool_)
        reached[self.vectors[allowed]] = True
        return reached

    def with_tag(self, tag: str) -> NDArray[np.bool_]:
        """`[rows]`: whether the reply carries it."""
        tags = self.table["tags"]
        found = np.zeros(len(self), np.bool_)
        if len(self):
            flat, parents = pc.list_flatten(tags), pc.list_parent_indices(tags)
            found[_numpy(parents)[_numpy(pc.equal(flat, tag))]] = True
        return found

    def rows_of(self, reply_id: str) -> list[int]:
        """The rows that propose this reply, ascending; none when there is no such reply."""
        low, high = 0, len(self._by_id)
        while low < high:
            middle = (low + high) // 2
            if self._ids[int(self._by_id[middle])].as_py() < reply_id:
                low = middle + 1
            else:
                high = middle
        rows = []
        while low < len(self._by_id) and self._ids[row := int(self._by_id[low])].as_py() == reply_id:
            rows.append(row)
            low += 1
        return sorted(rows)


_SHOWN = ("id", "text", "prompt", "weight", "emotion", "blocked")


def batch(columns: Mapping[str, list[Any]]) -> pa.RecordBatch:
    """Rows of plain columns, named as in `SCHEMA`."""
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def writer(sink: Any) -> pa.ipc.RecordBatchFileWriter:
    """Where batches go that `Items.load` reads; the same batches give the same bytes."""
    return pa.ipc.new_file(sink, SCHEMA)


def _whole(file: pa.ipc.RecordBatchFileReader, path: Path) -> pa.Table:
    """All batches, which lie in the file as they are used: compressed ones would grow in memory by any factor."""
    batches, room = [], path.stat().st_size
    for number in range(file.num_record_batches):
        batches.append(file.get_batch(number))
        room -= batches[-1].get_total_buffer_size()  # `nbytes` would trust offsets that nobody has checked
        if room < 0:
            raise _invalid(path.name, "compressed batches", "plain ones, as `nlu index build` writes them")
    return pa.Table.from_batches(batches, file.schema)


def _check_rows(table: pa.Table, items: Items, part: str) -> None:
    labels = table["labels"]
    judged = np.ones(len(table), np.bool_)
    scores = _numpy(pc.struct_field(pc.list_flatten(labels), "score"))
    judged[_numpy(pc.list_parent_indices(labels))[~np.isfinite(scores)]] = False
    facts = [
        (np.isfinite(table["weight"].to_numpy()), "an infinite or NaN weight", "a finite weight"),
        (judged, "a label of an infinite or NaN score", "finite scores"),
        (_dated(items.valid_from), "a valid_from outside the calendar", "the years 1 to 9999"),
        (_dated(items.valid_until), "a valid_until outside the calendar", "the years 1 to 9999"),
        (items.valid_from < items.valid_until, "valid_from not before valid_until", "a time to say it in"),
        (_numpy(pc.not_equal(table["id"], "")), "an empty id", "an id"),
        (_numpy(pc.not_equal(table["text"], "")), "an empty text", "words to say"),
    ]
    for good, found, expected in facts:
        if not good.all():
            raise _invalid(f"{part} row {int(np.argmin(good))}", found, expected)


def _dated(instants: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether Python has a name for each, or it stands for none."""
    named = (instants >= micros(_FIRST)) & (instants <= micros(_LAST))
    dated: NDArray[np.bool_] = named | (instants == ALWAYS_FROM) | (instants == ALWAYS_UNTIL)
    return dated


def _check_below(column: NDArray[np.uint32], count: int, part: str, what: str) -> None:
    beyond = column >= count
    if beyond.any():
        row = int(np.argmax(beyond))
        raise _invalid(f"{part} row {row}", f"{what} {column[row]}", f"one of the {count} there are")


def _check_replies(table: pa.Table, by_id: NDArray[np.int32], again: NDArray[np.bool_], part: str) -> None:
    """All rows of a reply say the same, and none says it twice to the same prompt."""
    first, second = by_id[:-1][again], by_id[1:][again]
    for column, found, expected in (
        ("text", "different texts", "one text per id"),
        ("blocked", "blocked in one row and not in another", "one word on it per id"),
        ("said", "different said vectors", "one per id"),
    ):
        same = _same(table[column], first, second)
        if not same.all():
            pair = int(np.argmin(same))
            _refuse(table, [first[pair], second[pair]], part, found, expected)
    shared = by_id[np.append(again, False) | np.append(False, again)] if len(by_id) else by_id
    prompts = table.select(["id", "prompt"]).take(pa.array(shared))
    order = _numpy(pc.sort_indices(prompts, sort_keys=[("id", "ascending"), ("prompt", "ascending")]))
    twice = _same(prompts["id"], order[:-1], order[1:]) & _same(prompts["prompt"], order[:-1], order[1:])
    if twice.any():
        pair = int(np.argmax(twice))
        rows = sorted(shared[order[pair : pair + 2]].tolist())
        _refuse(table, rows, part, "one prompt twice", "each pair once")


def _refuse(table: pa.Table, rows: Sequence[int], part: str, found: str, expected: str) -> NoReturn:
    name = table["id"][int(rows[0])].as_py()
    raise _invalid(f"{part} id {name!r}", f"{found} in rows {[int(row) for row in rows]}", expected)


def _same(column: pa.ChunkedArray, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the cells of these two rows are equal, for each pair."""
    same = np.empty(len(first), np.bool_)
    for start in range(0, len(first), CHECK_ROWS):  # strings are copied to be compared
        some = slice(start, start + CHECK_ROWS)
        same[some] = _numpy(pc.equal(column.take(pa.array(first[some])), column.take(pa.array(second[some]))))
    return same


def _numpy(column: Any) -> NDArray[Any]:
    array = (
        column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    )
    return np.asarray(array)


def micros(instant: datetime) -> int:
    """Whole microseconds since 1970, exactly; `ValueError` for a datetime that does not say its time zone."""
    if instant.utcoffset() is None:
        raise ValueError(f"datetime: found {instant!r}, expected one with a time zone; remedy: tzinfo=UTC")
    return (instant - EPOCH) // timedelta(microseconds=1)


def _instant(value: int) -> datetime | None:
    return None if value in (ALWAYS_FROM, ALWAYS_UNTIL) else EPOCH + timedelta(microseconds=value)


def _micros(column: pa.ChunkedArray, null: int) -> NDArray[np.int64]:
    values: NDArray[np.int64] = column.cast(pa.int64()).fill_null(null).to_numpy()
    return values


def _check_table(table: pa.Table, part: str) -> None:
    if not table.schema.equals(SCHEMA):
        raise _invalid(part, f"columns {table.schema.to_string()}", SCHEMA.to_string())
    try:
        table.validate(full=True)  # offsets and UTF-8: reading takes both on trust
    except pa.ArrowException as error:
        raise _invalid(part, f"broken columns ({error})", "valid Arrow data") from error
    for field in SCHEMA:
        if not field.nullable and any(map(_nulls, table[field.name].chunks)):
            raise _invalid(f"{part} {field.name}", "nulls", "none")


def _nulls(array: pa.Array) -> bool:
    """Whether anything is missing in it, at any depth: Arrow does not hold a schema to its word."""
    if array.null_count:
        return True
    if pa.types.is_list(array.type):
        return _nulls(array.flatten())
    return pa.types.is_struct(array.type) and any(map(_nulls, array.flatten()))


def _invalid(part: str, found: str, expected: str) -> IndexInvalid:
    return IndexInvalid(
        part=part, found=found, expected=expected, remedy="build the index from its entries again"
    )
