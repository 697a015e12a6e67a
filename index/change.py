"""An index changed in part: replies added, removed or blocked. Shards that are full keep their bytes, so that a pull
fetches only what changed.

A removed reply takes its rows out of the table; a vector that nothing hangs on any more stays in its shard, where no
search can return it, until the index is built anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.build import (
    BuildInvalid,
    Entry,
    Shards,
    bits,
    check_lengths,
    check_replaceable,
    name_key,
    publish,
    record,
    staging_of,
    stand_for,
)
from index.items import ITEMS_FILE, Items, writer
from index.layout import INDEX_FILE, Layout, read_layout, said_name, shard_name

FloatArray = NDArray[np.float32]
Batch = tuple[Sequence[Entry], FloatArray, FloatArray | None]  # as `Writer.add` takes them


def extend(folder: Path, out: Path, batches: Iterable[Batch]) -> Layout:
    """The index in `folder` with these entries too, at `out` (which may be the same folder).

    Vectors go into the last shard until it is full, then into new ones. A graph stays as it is: what it does not reach
    is scanned. Raises `BuildInvalid`, `QueryInvalid` or `IndexInvalid`, and then nothing has changed.
    """
    layout, items = _open(folder)
    personas, surfaces = bits("persona", layout.personas), bits("surface", layout.surfaces)
    with (
        _staged(folder, out) as staging,
        closing(Shards.after(staging, layout.dim, layout.shard_rows, shard_name, layout.shards)) as vectors,
        closing(Shards.after(staging, layout.dim, layout.shard_rows, said_name, layout.said)) as said,
    ):
        with_said = bool(layout.said) if layout.rows else None  # whether texts have vectors of their own
        tables = [items.table]
        known = set(_pairs(items.table))
        stands = dict(zip(items.table["id"].to_pylist(), items.said.tolist(), strict=True))
        labelled = {name_key(name) for name in stands}
        row = len(items)
        for entries, prompts, texts in batches:
            check_lengths(entries, prompts, texts)
            twice = [entry for entry in entries if (entry.id, entry.prompt) in known]
            if twice:
                raise BuildInvalid(
                    f"entry {twice[0].id!r}: found a pair that the index has already, expected a new prompt or reply;"
                    " remedy: remove it first"
                )
            if with_said is None:
                with_said = texts is not None
            if (texts is not None) != with_said:
                has = "has" if with_said else "has no"
                raise BuildInvalid(
                    f"said: the index {has} vectors of texts; expected the entries alike; remedy: encode as it was built"
                )
            hang_on = vectors.add(prompts, first_row=row)
            own = stand_for(stands, entries, hang_on) if texts is None else said.add(texts, first_row=row)
            tables.append(
                pa.Table.from_batches([record(entries, hang_on, own, personas, surfaces, labelled)])
            )
            row += len(entries)
        return _publish(staging, out, layout, pa.concat_tables(tables), vectors, said)


def remove(folder: Path, out: Path, ids: Collection[str]) -> Layout:
    """The index without these replies; raises `BuildInvalid` for an id it does not have."""
    layout, items = _open(folder)
    _check_known(items, ids)
    table = items.table.filter(pc.invert(pc.is_in(items.table["id"], pa.array(list(ids), pa.string()))))
    with _staged(folder, out) as staging:
        return _publish(staging, out, layout, table)


def block(folder: Path, out: Path, ids: Collection[str], why: str) -> Layout:
    """The index with these replies kept from ever being said, or allowed again where `why` is empty."""
    layout, items = _open(folder)
    _check_known(items, ids)
    table, hit = items.table, pc.is_in(items.table["id"], pa.array(list(ids), pa.string()))
    place = table.schema.get_field_index("blocked")
    blocked = pc.if_else(hit, why, table["blocked"])
    table = table.set_column(place, table.schema.field("blocked"), blocked)
    with _staged(folder, out) as staging:
        return _publish(staging, out, layout, table)


def _open(folder: Path) -> tuple[Layout, Items]:
    layout = read_layout(folder)
    said = layout.said_rows if layout.said else layout.rows
    path = folder / ITEMS_FILE
    return layout, Items.load(
        path, sha256=layout.items_sha256, rows=layout.items, vectors=layout.rows, said=said
    )


@contextmanager
def _staged(folder: Path, out: Path) -> Iterator[Path]:
    """A folder of links to the index's files, thrown away unless it is published."""
    check_replaceable(out)
    staging = staging_of(out)
    shutil.copytree(folder, staging, copy_function=_link)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    if Path(source).name in (ITEMS_FILE, INDEX_FILE):  # written anew
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _publish(
    staging: Path, out: Path, layout: Layout, table: pa.Table, vectors: Shards | None = None, said: Shards | None = None
) -> Layout:  # fmt: skip
    with pa.OSFile(str(staging / ITEMS_FILE), "wb") as sink, writer(sink) as batches:
        batches.write_table(table)
    return publish(
        staging, out, dim=layout.dim, items=len(table), personas=layout.personas, surfaces=layout.surfaces,
        shard_rows=layout.shard_rows, shards=layout.shards if vectors is None else vectors.close(),
        said=layout.said if said is None else said.close(), graph=layout.graph,
    )  # fmt: skip


def _pairs(table: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(table["id"].to_pylist(), table["prompt"].to_pylist(), strict=True)


def _check_known(items: Items, ids: Collection[str]) -> None:
    unknown = [name for name in ids if not items.rows_of(name)]
    if unknown:
        raise BuildInvalid(
            f"{', '.join(map(repr, unknown[:5]))}: found no such reply, expected ids of this index; remedy: see its items"
        )
