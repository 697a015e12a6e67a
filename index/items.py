"""`Items`: an Arrow table of (prompt, reply) pairs, and which vector of the index each pair hangs on.

A vector was made from a prompt; a hit on it proposes every reply written for that prompt. Several pairs may
propose one reply, under one id. The only module that imports pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.shard import IndexInvalid

ITEMS_FILE = "items.arrow"
REMEMBERED_REPLIES = 8192  # rows kept ready as objects; an index may have a hundred times as many
EVERYONE = 0xFFFFFFFF  # the mask of a row that every persona may say, or every surface may play
ALWAYS_FROM = int(np.iinfo(np.int64).min)  # stands for a null valid_from, in microseconds since 1970
ALWAYS_UNTIL = int(np.iinfo(np.int64).max)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

SCHEMA = pa.schema(
    [
        pa.field("vector", pa.uint32(), nullable=False),
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
    ]
)


@dataclass(frozen=True, slots=True)
class ReplyItem:
    """One row: a reply, and the prompt under which it was found."""

    id: str
    text: str
    prompt: str
    weight: float
    emotion: str  # the mood this reply answers, or ""
    tags: tuple[str, ...]
    persona_mask: int
    surface_mask: int
    valid_from: datetime | None
    valid_until: datetime | None


class Items:
    """The rows of one index. Immutable.

    Columns lie in lists and arrays: reading one Arrow cell takes longer than a whole lookup may.
    """

    def __init__(self, table: pa.Table, *, vectors: int, part: str = ITEMS_FILE) -> None:
        """Checks every promise the rest of the package leans on; raises `IndexInvalid` naming `part`."""
        _check_table(table, part)
        self._table = table
        self.ids: list[str] = table["id"].to_pylist()
        self.weights: list[float] = table["weight"].to_pylist()
        self.persona_masks: NDArray[np.uint32] = table["persona_mask"].to_numpy()  # [rows]
        self.surface_masks: NDArray[np.uint32] = table["surface_mask"].to_numpy()  # [rows]
        self.valid_from = _micros(table["valid_from"], ALWAYS_FROM)  # [rows]
        self.valid_until = _micros(table["valid_until"], ALWAYS_UNTIL)  # [rows]
        self._texts: list[str] = table["text"].to_pylist()
        self._prompts: list[str] = table["prompt"].to_pylist()
        self._emotions: list[str] = table["emotion"].to_pylist()
        self._tags = [tuple(tags) for tags in table["tags"].to_pylist()]
        # `reply` reads these again one by one, and a list gives up a Python object faster than an array.
        self._persona_masks: list[int] = self.persona_masks.tolist()
        self._surface_masks: list[int] = self.surface_masks.tolist()
        self._valid_from = [_instant(value) for value in self.valid_from.tolist()]
        self._valid_until = [_instant(value) for value in self.valid_until.tolist()]
        self._rows_of: dict[str, list[int]] = {}
        for row, reply_id in enumerate(self.ids):
            self._rows_of.setdefault(reply_id, []).append(row)
        self._check_rows(part)
        self._check_replies(part)
        self.vectors: NDArray[np.uint32] = table["vector"].to_numpy()  # [rows] the vector each pair hangs on
        self._check_vectors(vectors, part)
        by_id = np.argsort(np.array(self.ids, object), kind="stable")  # as Python compares strings
        order = by_id[np.argsort(-np.array(self.weights, np.float32)[by_id], kind="stable")]
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))  # [rows] place by weight, then by id
        self._by_vector = np.lexsort((self._rank, self.vectors))  # pairs of a vector side by side
        self._starts = np.searchsorted(self.vectors[self._by_vector], np.arange(vectors + 1))
        rows, bounds = self._by_vector.tolist(), self._starts.tolist()
        self._pairs: list[list[int]] = [
            rows[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        self._known = lru_cache(maxsize=REMEMBERED_REPLIES)(self._reply)

    @classmethod
    def of(cls, columns: Mapping[str, list[Any]], *, vectors: int, part: str = "entries") -> Items:
        """Items of plain columns, named as in `SCHEMA`; times in microseconds since 1970 or None."""
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        return cls(pa.Table.from_arrays(arrays, schema=SCHEMA), vectors=vectors, part=part)

    @classmethod
    def load(cls, path: Path, *, rows: int, vectors: int) -> Items:
        """The `rows` pairs of an index of `vectors` vectors, memory-mapped."""
        if not path.is_file():
            raise _invalid(path.name, "no file", str(path))
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowException, OSError) as error:
            raise _invalid(path.name, f"unreadable ({error})", "an Arrow IPC file") from error
        if len(table) != rows:
            raise _invalid(path.name, f"{len(table)} items", f"{rows}, as {path.parent.name} says")
        return cls(table, vectors=vectors, part=path.name)

    def save(self, path: Path) -> None:
        """The same rows give the same bytes."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(self._table.combine_chunks())

    def __len__(self) -> int:
        return len(self.ids)

    def reply(self, row: int) -> ReplyItem:
        if not 0 <= row < len(self.ids):  # a negative row would answer with somebody else's reply
            raise IndexError(
                f"row: found {row}, expected 0 to {len(self.ids) - 1}; remedy: pass a row of a hit"
            )
        return self._known(row)

    def _reply(self, row: int) -> ReplyItem:
        return ReplyItem(
            self.ids[row],
            self._texts[row],
            self._prompts[row],
            self.weights[row],
            self._emotions[row],
            self._tags[row],
            self._persona_masks[row],
            self._surface_masks[row],
            self._valid_from[row],
            self._valid_until[row],
        )

    def pairs_of(self, vector: int) -> list[int]:
        """The rows that hang on this vector, heaviest first, then by id."""
        return self._pairs[vector]

    def ordered(self, rows: list[int]) -> list[int]:
        """Rows, heaviest first, then by id."""
        return sorted(rows, key=self._rank.__getitem__)

    def any_of(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[vectors]`: whether any row of a vector is among the `allowed` `[rows]`."""
        if not len(self):
            return np.zeros(0, np.bool_)
        reached: NDArray[np.bool_] = np.logical_or.reduceat(allowed[self._by_vector], self._starts[:-1])
        return reached

    def rows_of(self, reply_id: str) -> list[int]:
        """The rows that propose this reply; none when there is no such reply."""
        return self._rows_of.get(reply_id, [])

    def _check_rows(self, part: str) -> None:
        facts = [
            (np.isfinite(self.weights), "an infinite or NaN weight", "a finite weight"),
            (self.valid_from < self.valid_until, "valid_from not before valid_until", "a time to say it in"),
            (np.array([bool(name) for name in self.ids], bool), "an empty id", "an id"),
            (np.array([bool(text) for text in self._texts], bool), "an empty text", "words to say"),
        ]
        for good, found, expected in facts:
            if not good.all():
                raise _invalid(f"{part} row {int(np.argmin(good))}", found, expected)

    def _check_vectors(self, vectors: int, part: str) -> None:
        beyond = self.vectors >= vectors
        if beyond.any():  # before counting, which takes memory for every number up to the largest
            row = int(np.argmax(beyond))
            raise _invalid(
                f"{part} row {row}", f"vector {self.vectors[row]}", f"one of the {vectors} there are"
            )
        held = np.bincount(self.vectors, minlength=vectors)
        if (held == 0).any():
            raise _invalid(
                part, f"vector {int(np.argmin(held))} without a reply", "one reply or more for each"
            )

    def _check_replies(self, part: str) -> None:
        for reply_id, rows in self._rows_of.items():
            if len({self._texts[row] for row in rows}) > 1:
                raise _invalid(
                    f"{part} id {reply_id!r}", f"different texts in rows {rows}", "one text per id"
                )
            if len({self._prompts[row] for row in rows}) < len(rows):
                raise _invalid(
                    f"{part} id {reply_id!r}", f"one prompt twice in rows {rows}", "each pair once"
                )


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
        if not field.nullable and table[field.name].null_count:  # Arrow does not hold a schema to its word
            raise _invalid(f"{part} {field.name}", "nulls", "none")


def _invalid(part: str, found: str, expected: str) -> IndexInvalid:
    return IndexInvalid(
        part=part, found=found, expected=expected, remedy="build the index from its entries again"
    )
