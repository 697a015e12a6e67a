"""`build`: entries and their vectors in, a folder for `Replies.load` out. The same input gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.items import EVERYONE, ITEMS_FILE, Items, micros
from index.search import prepare_rows
from index.shard import padded
from index.sharded import INDEX_FILE, MASK_BITS, Layout, ShardFile, shard_name

BLOCK_ROWS = 4096  # rows normalised at a time, in float64: a corpus may be large


class BuildInvalid(ValueError):
    """Entries, names or a folder that no index can be built from."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One (prompt, reply) pair. No personas or surfaces means all of them; no times means always."""

    id: str
    text: str
    prompt: str
    personas: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    weight: float = 1.0
    emotion: str = ""
    tags: tuple[str, ...] = ()


def build(
    entries: Sequence[Entry],
    vectors: NDArray[np.float32],
    out: Path,
    *,
    personas: Sequence[str],
    surfaces: Sequence[str],
    shard_rows: int = 65536,
) -> None:
    """Writes the index of `vectors` `[entries, dim]`, row i made from the prompt of entry i, in that order.

    Replies written for the same prompt share one vector: the first entry's place is the vector's.
    Nothing at `out` changes unless everything is right: `BuildInvalid` or `IndexInvalid` for entries,
    `QueryInvalid` for a vector, naming the row. An earlier index at `out` is replaced whole; a folder that
    holds anything else is refused.
    """
    persona_bits, surface_bits = _bits("persona", personas), _bits("surface", surfaces)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise BuildInvalid(
            f"vectors: found shape {vectors.shape}, expected [entries, dim]; remedy: stack them"
        )
    if len(entries) != len(vectors):
        raise BuildInvalid(
            f"vectors: found {len(vectors)} rows, expected {len(entries)}, one for each entry;"
            " remedy: encode the prompts of these entries, in order"
        )
    firsts, hangs_on = _distinct(vectors)
    layout = _layout(len(firsts), vectors.shape[1], len(entries), personas, surfaces, shard_rows)
    items = Items.of(
        {"vector": hangs_on, **_columns(entries, persona_bits, surface_bits)}, vectors=len(firsts)
    )
    _check_replaceable(out)
    staging = out.with_name(f".{out.name}.building-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        for number, shard in enumerate(layout.shards):
            first = number * shard_rows
            _write_shard(staging / shard.file, vectors, firsts[first : first + shard.rows])
        items.save(staging / ITEMS_FILE)
        text = json.dumps(layout.model_dump(), indent=2, ensure_ascii=False)
        (staging / INDEX_FILE).write_bytes(f"{text}\n".encode())
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _distinct(vectors: NDArray[np.float32]) -> tuple[list[int], list[int]]:
    """The first row of every distinct vector, and for each row the number of its vector."""
    firsts: list[int] = []
    numbers: dict[bytes, int] = {}
    hangs_on: list[int] = []
    for start in range(0, len(vectors), BLOCK_ROWS):
        unit = prepare_rows(vectors[start : start + BLOCK_ROWS], vectors.shape[1], first_row=start)
        for row, vector in enumerate(unit.astype("<f2"), start):
            digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
            number = numbers.setdefault(digest, len(firsts))
            if number == len(firsts):
                firsts.append(row)
            hangs_on.append(number)
    return firsts, hangs_on


def _layout(
    rows: int, dim: int, items: int, personas: Sequence[str], surfaces: Sequence[str], shard_rows: int
) -> Layout:
    if shard_rows < 8 or shard_rows % 8:
        raise BuildInvalid(f"shard_rows: found {shard_rows}, expected a multiple of 8; remedy: 65536")
    return Layout(
        kind="exact",
        dim=dim,
        padded=padded(dim),
        rows=rows,
        items=items,
        personas=tuple(personas),
        surfaces=tuple(surfaces),
        shards=tuple(
            ShardFile(file=shard_name(number), rows=min(shard_rows, rows - first))
            for number, first in enumerate(range(0, rows, shard_rows))
        ),
    )


def _write_shard(path: Path, vectors: NDArray[np.float32], rows: Sequence[int]) -> None:
    dim = vectors.shape[1]
    with path.open("wb") as file:
        for start in range(0, len(rows), BLOCK_ROWS):
            some = list(rows[start : start + BLOCK_ROWS])
            block = np.zeros((len(some), padded(dim)), "<f2")
            block[:, :dim] = prepare_rows(vectors[some], dim)
            file.write(block.tobytes())


def _columns(
    entries: Sequence[Entry], personas: Mapping[str, int], surfaces: Mapping[str, int]
) -> dict[str, list[Any]]:
    return {
        "id": [entry.id for entry in entries],
        "text": [entry.text for entry in entries],
        "prompt": [entry.prompt for entry in entries],
        "persona_mask": [_mask(entry.id, "persona", entry.personas, personas) for entry in entries],
        "surface_mask": [_mask(entry.id, "surface", entry.surfaces, surfaces) for entry in entries],
        "valid_from": [entry.valid_from and micros(entry.valid_from) for entry in entries],
        "valid_until": [entry.valid_until and micros(entry.valid_until) for entry in entries],
        "weight": [entry.weight for entry in entries],
        "emotion": [entry.emotion for entry in entries],
        "tags": [list(entry.tags) for entry in entries],
    }


def _bits(kind: str, names: Sequence[str]) -> dict[str, int]:
    if len(set(names)) < len(names) or not all(names) or len(names) > MASK_BITS:
        raise BuildInvalid(
            f"{kind}s: found {list(names)}, expected at most {MASK_BITS} different names; remedy: merge some"
        )
    return {name: 1 << bit for bit, name in enumerate(names)}


def _mask(entry: str, kind: str, names: Sequence[str], bits: Mapping[str, int]) -> int:
    unknown = [name for name in names if name not in bits]
    if unknown:
        raise BuildInvalid(
            f"entry {entry!r}: found {kind} {unknown[0]!r}, expected one of: {', '.join(bits) or 'none'};"
            f" remedy: name it in {kind}s"
        )
    return sum(bits[name] for name in set(names)) if names else EVERYONE


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
    foreign = [name for name in names if name not in (INDEX_FILE, ITEMS_FILE) and not name.endswith(".f16")]
    if foreign:
        raise BuildInvalid(
            f"{out}: found {foreign[0]!r}, expected an index or nothing; remedy: build elsewhere"
        )
