"""`push`: an index into a Milvus collection, row by row, and a pointer to it for a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient, MilvusException

from index.items import ALWAYS_FROM, ALWAYS_UNTIL, EVERYONE, ITEMS_FILE, Items, micros
from index.layout import INDEX_FILE, MASK_BITS, IndexInvalid, Layout, read_layout
from index.matrix import Matrix
from index.milvus import (
    DTYPES,
    LOAD_S,
    NOT_IN_NAMES,
    STAMP_ROW,
    Pointer,
    answering,
    check_collection,
    connect,
    fitting,
)

PUSH_S = 3600.0  # of a call that waits until the server has written everything, or built its graph
INSERT_ROWS = 1000  # a megabyte or two a call; Milvus takes 64
TEXT_BYTES = 65535  # of a VARCHAR, the most there can be
TAGS = 256  # of one reply, its id counted too
EF_CONSTRUCTION = 200

Floats = NDArray[np.float16]


def push(
    folder: Path,
    out: Path,
    *,
    uri: str,
    token: str = "",
    collection: str,
    vectorizer: str,
    precision: Literal["float16", "float32"] = "float16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pointer:
    """Writes the index in `folder` into a new collection and a pointer to it into `out`; returns the pointer.

    A collection that holds this very index already is left as it is. One that holds anything else is refused: engines
    may be answering from it. A push that fails takes its collection away again. `IndexInvalid` for all of these, and
    for a server that is away. An index with a graph becomes a collection with one (HNSW), any other is compared row by
    row. "float32" is for servers without float16 fields, such as Milvus Lite; it rounds to float16 all the same.
    """
    if (out / ITEMS_FILE).exists():
        raise IndexInvalid(
            part=str(out),
            found="an index",
            expected="a folder for the pointer to it",
            remedy="choose another",
        )
    layout = read_layout(folder)
    vectors, said, items = _read(folder, layout)
    with fitting():
        pointer = Pointer(
            kind="milvus",
            collection=collection,
            digest=hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest(),
            vectorizer=vectorizer,
            dim=layout.dim,
            rows=len(items),
            ef=0 if layout.graph is None else layout.graph.ef_search,
            personas=layout.personas,
            surfaces=layout.surfaces,
            boundaries=_boundaries(items),
        )
    _check_names(layout, items)
    with answering(collection):
        client = connect(uri, token)
        if client.has_collection(collection, timeout=LOAD_S):
            check_collection(client, pointer, timeout=PUSH_S)
        else:
            try:
                _create(client, pointer, precision, m=0 if layout.graph is None else layout.graph.m)
                _fill(client, pointer, _batches(items, vectors, said), np.dtype(precision), progress)
                check_collection(client, pointer, timeout=PUSH_S)
            except BaseException:
                with suppress(MilvusException, grpc.RpcError):
                    client.drop_collection(collection, timeout=LOAD_S)
                raise
    pointer.save(out)
    return pointer


def _boundaries(items: Items) -> tuple[int, ...]:
    instants = set(items.valid_from.tolist()) | set(items.valid_until.tolist())
    return tuple(sorted(instants - {ALWAYS_FROM, ALWAYS_UNTIL}))


def _check_names(layout: Layout, items: Items) -> None:
    """`IndexInvalid` for a name that no search could ask for."""
    _check_askable("personas and surfaces", [*layout.personas, *layout.surfaces])
    for first in range(0, len(items), INSERT_ROWS):
        some = items.table.select(["id", "tags"]).slice(first, INSERT_ROWS).to_pylist()
        for row, cell in enumerate(some, first):
            _check_askable(f"row {row}", [cell["id"], *cell["tags"]])


def _check_askable(part: str, names: list[str]) -> None:
    if any(NOT_IN_NAMES.search(name) for name in names) or len(names) > TAGS:
        raise IndexInvalid(
            part=part,
            found=f"the names {names}",
            expected=f"at most {TAGS}, without control characters",
            remedy="rename it and build the index again",
        )


def _read(folder: Path, layout: Layout) -> tuple[Floats, Floats, Items]:
    """What a collection takes over, checked as at a load: vectors `[vectors, dim]`, those of the texts, and rows."""
    vectors = Matrix.load(folder, layout.shards, layout.dim).array
    said = Matrix.load(folder, layout.said, layout.dim).array if layout.said else vectors
    items = Items.load(
        folder / ITEMS_FILE,
        rows=layout.items,
        vectors=len(vectors),
        said=len(said),
        sha256=layout.items_sha256,
    )
    return vectors[:, : layout.dim], said[:, : layout.dim], items


def _batches(items: Items, vectors: Floats, said: Floats) -> Iterator[list[dict[str, Any]]]:
    """Every row, its own columns and its vectors, `INSERT_ROWS` at a time."""
    for first in range(0, len(items), INSERT_ROWS):
        cells = items.table.slice(first, INSERT_ROWS).to_pylist()
        yield [
            {
                **cell,
                "row": row,
                "labels": [judged._asdict() for judged in items.reply(row).labels],
                "vector": vectors[cell["vector"]],
                "said": said[cell["said"]],
            }
            for row, cell in enumerate(cells, first)
        ]


def _create(client: MilvusClient, pointer: Pointer, precision: str, *, m: int) -> None:
    """An empty collection with its indexes. Milvus loads no collection with a vector field that has none."""
    kind = {str(dtype): kind for kind, dtype in DTYPES.items()}[precision]
    names = {"element_type": DataType.VARCHAR, "max_length": TEXT_BYTES}
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    for field in ("id", "text", "prompt", "emotion", "labels", "blocked"):
        schema.add_field(field, DataType.VARCHAR, max_length=TEXT_BYTES)
    for field in ("persona_mask", "surface_mask", "valid_from", "valid_until"):
        schema.add_field(field, DataType.INT64)
    schema.add_field("weight", DataType.DOUBLE)
    schema.add_field("tags", DataType.ARRAY, max_capacity=TAGS, **names)
    for field in ("personas", "surfaces"):
        schema.add_field(field, DataType.ARRAY, max_capacity=MASK_BITS + 1, **names)
    for field in ("vector", "said"):
        schema.add_field(field, kind, dim=pointer.dim)
    indexes = client.prepare_index_params()
    if pointer.ef:
        graph = {"M": m, "efConstruction": EF_CONSTRUCTION}
        indexes.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
    else:
        indexes.add_index("vector", index_type="FLAT", metric_type="IP")
    indexes.add_index("said", index_type="FLAT", metric_type="IP")
    client.create_collection(pointer.collection, schema=schema, timeout=LOAD_S)
    client.create_index(pointer.collection, indexes, timeout=LOAD_S)


def _fill(
    client: MilvusClient,
    pointer: Pointer,
    batches: Iterable[list[dict[str, Any]]],
    dtype: np.dtype[Any],
    progress: Callable[[int, int], None],
) -> None:
    """Every row, and the stamp last."""
    done = 0
    for batch in chain(batches, [[_stamp(pointer)]]):
        client.insert(pointer.collection, [_fields(row, pointer, dtype) for row in batch], timeout=LOAD_S)
        done = min(done + len(batch), pointer.rows)
        progress(done, pointer.rows)
    client.flush(pointer.collection, timeout=PUSH_S)


def _fields(row: Mapping[str, Any], pointer: Pointer, dtype: np.dtype[Any]) -> dict[str, Any]:
    """A row as a collection has it."""
    opens, closes = row["valid_from"], row["valid_until"]
    return {
        **row,
        "personas": _named(row["persona_mask"], pointer.personas),
        "surfaces": _named(row["surface_mask"], pointer.surfaces),
        "valid_from": ALWAYS_FROM if opens is None else micros(opens),
        "valid_until": ALWAYS_UNTIL if closes is None else micros(closes),
        "labels": json.dumps([[*judged.values()] for judged in row["labels"]], ensure_ascii=False),
        "vector": row["vector"].astype(dtype),
        "said": row["said"].astype(dtype),
    }


def _named(mask: int, names: Sequence[str]) -> list[str]:
    """Who a mask means; "" is nobody in particular, who may say what everybody may. Milvus has no bit operators."""
    found = [name for bit, name in enumerate(names) if mask >> bit & 1]
    return [*found, ""] if mask == EVERYONE else found


def _stamp(pointer: Pointer) -> dict[str, Any]:
    """What the collection is, as a row that no search finds: Milvus Lite keeps no description of a collection."""
    direction = np.eye(1, pointer.dim, dtype=np.float16)[0]
    return {
        "id": "", "text": json.dumps(pointer.stamp()), "prompt": "", "weight": 0.0, "emotion": "", "tags": [],
        "persona_mask": 0, "surface_mask": 0, "valid_from": None, "valid_until": None, "labels": [],
        "blocked": "not a reply: what this collection is", "row": STAMP_ROW, "vector": direction, "said": direction,
    }  # fmt: skip
