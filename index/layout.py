"""`index.json`: which files an index has, what they hold, and the digests they must have; all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

INDEX_FILE = "index.json"
MASK_BITS = 32  # persona and surface masks are uint32
DIGEST = r"^[0-9a-f]{64}$"
MAX_BYTES = 16 << 20  # of index.json: a line a shard, so far more than any index needs


class IndexInvalid(ValueError):
    """A stored index that must not be served; the whole of it is refused, never the part that would load."""

    def __init__(self, *, part: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{part}: found {found}, expected {expected}; remedy: {remedy}")
        self.part = part
        self.found = found
        self.expected = expected
        self.remedy = remedy


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardFile(_Strict):
    """One file of float16 vectors, `padded` numbers a row."""

    file: str
    rows: int = Field(ge=1)
    sha256: str = Field(pattern=DIGEST)


class GraphFiles(_Strict):
    """A graph over the first `rows` vectors; vectors beyond it were added later and are scanned."""

    rows: int = Field(ge=1)
    m: int = Field(ge=2, le=256)  # neighbours a vector above the ground level, twice as many on it
    ef_search: int = Field(ge=1, le=1 << 16)
    entry_point: int = Field(ge=0)
    levels_sha256: str = Field(pattern=DIGEST)
    links_sha256: str = Field(pattern=DIGEST)


class Layout(_Strict):
    """What the folder must hold."""

    format: Literal[2]
    dim: int = Field(ge=1, le=1 << 16)
    padded: int
    rows: int = Field(ge=0, lt=1 << 31)  # vectors that are searched
    items: int = Field(ge=0, lt=1 << 31)  # (prompt, reply) pairs
    items_sha256: str = Field(pattern=DIGEST)
    personas: tuple[str, ...] = Field(max_length=MASK_BITS)
    surfaces: tuple[str, ...] = Field(max_length=MASK_BITS)
    shard_rows: int = Field(ge=8)  # of every shard but the last
    shards: tuple[ShardFile, ...]
    said_rows: int = Field(ge=0, lt=1 << 31)  # vectors of the replies' own texts, for the ranker
    said: tuple[ShardFile, ...]
    graph: GraphFiles | None

    @property
    def kind(self) -> Literal["exact", "hnsw"]:
        return "exact" if self.graph is None else "hnsw"

    def save(self, folder: Path) -> None:
        """The same layout gives the same bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (folder / INDEX_FILE).write_bytes(f"{text}\n".encode())


def padded(dim: int) -> int:
    """The stored width: the next multiple of 16, zeros at the end.

    FAISS scans float16 with SIMD only at such widths: 660,000 rows take 220 ms at 300 and 17 ms at 304.
    """
    return -(-dim // 16) * 16


def shard_name(number: int) -> str:
    return f"shard-{number:03d}.f16"


def said_name(number: int) -> str:
    return f"said-{number:03d}.f16"


def read_layout(folder: Path) -> Layout:
    """`index.json`, checked against itself and against the names in its folder; raises `IndexInvalid`."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise IndexInvalid(
            part=INDEX_FILE, found="no file", expected=str(path), remedy="build or pull it again"
        )
    if path.stat().st_size > MAX_BYTES:
        raise IndexInvalid(
            part=INDEX_FILE,
            found=f"{path.stat().st_size} bytes",
            expected=f"at most {MAX_BYTES}",
            remedy="build the index again",
        )
    raw = path.read_bytes()
    try:
        layout = Layout.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise IndexInvalid(
            part=f"{INDEX_FILE} {'.'.join(str(step) for step in first['loc'])}".rstrip(),
            found=repr(first["input"])[:80],
            expected=first["msg"],
            remedy="build the index with this version of the code",
        ) from error
    json.loads(raw, object_pairs_hook=_once)
    _check(layout)
    listed = {shard.file for shard in (*layout.shards, *layout.said)}
    extra = sorted({path.name for path in folder.glob("*.f16")} - listed)
    if extra:
        raise IndexInvalid(
            part=extra[0],
            found="a shard that index.json does not list",
            expected=f"the {len(listed)} shards of one build",
            remedy="two builds share this folder: build into an empty one",
        )
    return layout


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys are all different; which of two equal ones counts is every parser's own choice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise IndexInvalid(
            part=f"{INDEX_FILE} {twice}",
            found="the field twice",
            expected="once",
            remedy="build the index again",
        )
    return fields


def _even(shards: tuple[ShardFile, ...], shard_rows: int) -> list[int]:
    """How many rows so many shards have: all are full but the last."""
    return [shard_rows for _ in shards[:-1]] + [min(shard.rows, shard_rows) for shard in shards[-1:]]


def _check(layout: Layout) -> None:
    """What one field says about another."""
    facts: list[tuple[str, object, object]] = [
        ("padded", layout.padded, padded(layout.dim)),
        ("shard_rows modulo 8", layout.shard_rows % 8, 0),
        ("rows", layout.rows, sum(shard.rows for shard in layout.shards)),
        ("said_rows", layout.said_rows, sum(shard.rows for shard in layout.said)),
        ("shards rows", [shard.rows for shard in layout.shards], _even(layout.shards, layout.shard_rows)),
        ("said rows", [shard.rows for shard in layout.said], _even(layout.said, layout.shard_rows)),
        ("shards", [shard.file for shard in layout.shards], [*map(shard_name, range(len(layout.shards)))]),
        ("said", [shard.file for shard in layout.said], [*map(said_name, range(len(layout.said)))]),
        ("personas", list(layout.personas), list(dict.fromkeys(filter(None, layout.personas)))),
        ("surfaces", list(layout.surfaces), list(dict.fromkeys(filter(None, layout.surfaces)))),
    ]
    if layout.graph is not None:
        facts += [
            ("graph rows", layout.graph.rows, min(layout.graph.rows, layout.rows)),
            ("graph entry_point", layout.graph.entry_point, min(layout.graph.entry_point, layout.graph.rows - 1)),
        ]  # fmt: skip
    for part, found, expected in facts:
        if found != expected:
            raise IndexInvalid(
                part=f"{INDEX_FILE} {part}",
                found=str(found)[:200],
                expected=str(expected)[:200],
                remedy="build the index again; this file was edited or mixes two builds",
            )
