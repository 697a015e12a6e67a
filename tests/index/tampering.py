"""A stored index, harmed. Digests are made to fit again where a test is about the checks behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Fields = dict[str, Any]


def read_fields(folder: Path) -> Fields:
    fields: Fields = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return fields


def write_fields(folder: Path, fields: Fields) -> None:
    (folder / "index.json").write_text(json.dumps(fields), encoding="utf-8")


def set_field(folder: Path, path: str, value: object) -> None:
    """One field of `index.json`, such as "shards.0.rows"."""
    fields: Any = read_fields(folder)
    *parents, last = path.split(".")
    at = fields
    for step in parents:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[int(last) if isinstance(at, list) else last] = value
    write_fields(folder, fields)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(folder: Path) -> None:
    """Every digest in `index.json` made to fit the files as they are."""
    fields = read_fields(folder)
    fields["items_sha256"] = digest(folder / "items.arrow")
    for shard in (*fields["shards"], *fields["said"]):
        if (folder / shard["file"]).exists():
            shard["sha256"] = digest(folder / shard["file"])
    if fields["graph"] is not None:
        fields["graph"]["levels_sha256"] = digest(folder / "graph-levels.u8")
        fields["graph"]["links_sha256"] = digest(folder / "graph-links.i32")
    write_fields(folder, fields)


def change_array(path: Path, dtype: str, change: Callable[[NDArray[Any]], Any]) -> None:
    """The numbers of a file, one after another, changed in place or replaced."""
    array = np.fromfile(path, dtype)
    changed = change(array)
    np.asarray(array if changed is None else changed, dtype).tofile(path)


def change_items(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The table of an index, replaced; written anew, because whoever serves it has mapped the old file."""
    path = folder / "items.arrow"
    with pa.memory_map(str(path)) as source:
        table = change(pa.ipc.open_file(source).read_all())
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def set_cell(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """A change of `change_items`: one cell, under the schema as it is."""

    def change(table: pa.Table) -> pa.Table:
        cells = table[column].to_pylist()
        cells[row] = value
        field = table.schema.field(column)
        return table.set_column(table.schema.get_field_index(column), field, pa.array(cells, field.type))

    return change
