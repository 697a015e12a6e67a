"""Every way to harm a stored index that these tests know, and the part that must be named when it is refused.

`python -O -m tests.index.harms FOLDER` tries them all where asserts are gone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.build import Entry, build
from index.graph import build_graph
from index.items import SCHEMA, Judged
from index.layout import IndexInvalid, read_layout
from index.matrix import Matrix
from index.replies import Replies
from tests.index.tampering import (
    change_array,
    change_items,
    read_fields,
    seal,
    set_cell,
    set_field,
    write_fields,
)

Harm = Callable[[Path], None]
ROWS, DIM, WIDTH = 40, 20, 32


def make_whole(out: Path, *, seed: int = 0) -> Path:
    """An index with all there can be: 40 rows in shards of 16, vectors of the texts, a graph of several levels."""
    rng = np.random.default_rng(seed)
    vectors, texts = rng.standard_normal((2, ROWS, DIM)).astype(np.float32)
    entries = [
        Entry(
            f"r{i}",
            f"Reply {i} of {seed}.",
            f"prompt {i}",
            personas=("lively",),
            tags=("x",),
            labels=(Judged("h", "l", 0.5),),
        )
        for i in range(ROWS)
    ]
    build(entries, vectors, out, personas=("calm", "lively"), surfaces=("tv",), said=texts, shard_rows=16)
    layout = read_layout(out)
    graph = build_graph(Matrix.load(out, layout.shards, DIM).array, out, m=2)
    set_field(out, "graph", graph.model_dump())
    return out


def number(name: str, place: int, value: float) -> Harm:
    """One number of a shard."""

    def harm(folder: Path) -> None:
        def change(numbers: NDArray[Any]) -> None:
            numbers[place] = value

        change_array(folder / name, "<f2", change)

    return harm


def row(name: str, which: int, factor: float) -> Harm:
    def harm(folder: Path) -> None:
        def change(numbers: NDArray[Any]) -> None:
            numbers[which * WIDTH : (which + 1) * WIDTH] *= np.float16(factor)

        change_array(folder / name, "<f2", change)

    return harm


def cut(name: str, by: int) -> Harm:
    """So many bytes fewer, or more."""

    def harm(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-by] if by > 0 else raw + bytes(-by))

    return harm


def swap(one: str, other: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / one).rename(folder / "aside")
        (folder / other).rename(folder / one)
        (folder / "aside").rename(folder / other)

    return harm


def from_another_build(*names: str) -> Harm:
    def harm(folder: Path) -> None:
        other = make_whole(folder.with_name(f"{folder.name}-other"), seed=1)
        for name in names:
            shutil.copy(other / name, folder / name)
        shutil.rmtree(other)

    return harm


def link(place: int, value: int) -> Harm:
    def harm(folder: Path) -> None:
        def change(links: NDArray[Any]) -> None:
            links[place] = value

        change_array(folder / "graph-links.i32", "<i4", change)

    return harm


def link_above(folder: Path) -> None:
    """From the highest vector, on its highest level, to one that stands on the ground alone."""
    levels = np.fromfile(folder / "graph-levels.u8", np.uint8).astype(int)
    m, high = read_fields(folder)["graph"]["m"], int(np.argmax(levels))
    last = int((2 * m + levels[: high + 1] * m).sum()) - 1
    link(last, int(np.argmin(levels)))(folder)


def level(value: int) -> Harm:
    def harm(folder: Path) -> None:
        def change(levels: NDArray[Any]) -> None:
            levels[3] = value

        change_array(folder / "graph-levels.u8", "u1", change)

    return harm


def low_entry(folder: Path) -> None:
    levels = np.fromfile(folder / "graph-levels.u8", np.uint8)
    set_field(folder, "graph.entry_point", int(np.argmin(levels)))


def schema(change: Callable[[pa.Table], pa.Table]) -> Harm:
    return partial(change_items, change=change)


def cell(column: str, which: int, value: object) -> Harm:
    return partial(change_items, change=set_cell(column, which, value))


def field(path: str, value: object) -> Harm:
    return partial(set_field, path=path, value=value)


def fields(**values: object) -> Harm:
    return each(*(field(name, value) for name, value in values.items()))


def shards(kind: str, *which: int) -> Harm:
    """Only these are listed, in this order."""

    def harm(folder: Path) -> None:
        listed = read_fields(folder)[kind]
        set_field(folder, kind, [listed[number] for number in which])

    return harm


def each(*harms: Harm) -> Harm:
    def harm(folder: Path) -> None:
        for one in harms:
            one(folder)

    return harm


def content(name: str, raw: bytes) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return harm


def missing(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()

    return harm


def no_field(name: str) -> Harm:
    def harm(folder: Path) -> None:
        fields = read_fields(folder)
        del fields[name]
        write_fields(folder, fields)

    return harm


def text(old: str, new: str) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(path.read_text().replace(old, new, 1))

    return harm


# What is seen behind digests that fit: after the harm, they are made to.
BEHIND: dict[str, tuple[Harm, str]] = {
    "a shard truncated": (cut("shard-001.f16", 2), "shard-001.f16"),
    "a shard longer": (cut("shard-001.f16", -2), "shard-001.f16"),
    "a shard one row longer": (cut("shard-001.f16", -2 * WIDTH), "shard-001.f16"),
    "a shard empty": (content("shard-000.f16", b""), "shard-000.f16"),
    "NaN": (number("shard-001.f16", 3 * WIDTH, np.nan), "shard-001.f16 row 3"),
    "infinity": (number("shard-002.f16", 5, np.inf), "shard-002.f16 row 0"),
    "zero": (row("shard-000.f16", 9, 0.0), "shard-000.f16 row 9"),
    "short": (row("shard-000.f16", 9, 0.9), "shard-000.f16 row 9"),
    "overlong": (row("shard-000.f16", 15, 2.0), "shard-000.f16 row 15"),
    "padding": (number("shard-000.f16", 2 * WIDTH - 1, 1e-4), "shard-000.f16 row 1"),
    "NaN said": (number("said-001.f16", 3 * WIDTH, np.nan), "said-001.f16 row 3"),
    "zero said": (row("said-002.f16", 1, 0.0), "said-002.f16 row 1"),
    "narrower": (fields(dim=19), "shard-000.f16 row 0"),
    "wider": (fields(dim=33), "index.json padded"),
    "wider, padded": (fields(dim=33, padded=48), "shard-000.f16"),
    "more rows": (fields(rows=41), "index.json rows"),
    "fewer rows": (fields(rows=39), "index.json rows"),
    "more rows in the last": (each(fields(rows=41), field("shards.2.rows", 9)), "shard-002.f16"),
    "other shard_rows": (fields(shard_rows=24), "index.json shards rows"),
    "a shard unlisted": (each(shards("shards", 0, 1), fields(rows=32, graph=None)), "shard-002.f16"),
    "a shard twice": (shards("shards", 0, 0, 2), "index.json shards"),
    "shards out of order": (shards("shards", 1, 0, 2), "index.json shards"),
    "a path": (field("shards.0.file", "../shard-000.f16"), "index.json shards"),
    "another format": (fields(format=1), "index.json format"),
    "an unknown field": (fields(surprise=1), "index.json surprise"),
    "an unknown field of a shard": (field("shards.0.surprise", 1), "index.json shards.0.surprise"),
    "a field of another type": (fields(rows="40"), "index.json rows"),
    "a name twice": (fields(personas=["lively", "lively"]), "index.json personas"),
    "33 names": (fields(surfaces=[f"s{i}" for i in range(33)]), "index.json surfaces"),
    "a persona fewer": (fields(personas=["calm"]), "persona_mask row 0"),
    "no vectors": (fields(rows=0, shards=[], graph=None), "shard-000.f16"),
    "no texts": (fields(said_rows=0, said=[]), "said-000.f16"),
    "more items": (fields(items=41), "items.arrow"),
    "a vector number beyond": (cell("vector", 7, ROWS), "items.arrow row 7"),
    "a said number beyond": (cell("said", 7, ROWS), "items.arrow row 7"),
    "an id of two texts": (cell("id", 8, "r7"), "items.arrow id 'r7'"),
    "an empty id": (cell("id", 8, ""), "items.arrow row 8"),
    "an empty text": (cell("text", 8, ""), "items.arrow row 8"),
    "a weight that is none": (cell("weight", 2, float("nan")), "items.arrow row 2"),
    "a score that is none": (cell("labels", 2, [Judged("h", "l", float("inf"))._asdict()]), "items.arrow row 2"),
    "a tag that is none": (cell("tags", 2, ["x", None]), "items.arrow tags"),
    "a mask beyond the names": (cell("surface_mask", 2, 2), "surface_mask row 2"),
    "a time out of time": (cell("valid_from", 2, 1 << 61), "items.arrow row 2"),
    "a missing cell": (cell("emotion", 2, None), "items.arrow emotion"),
    "a missing column": (schema(lambda table: table.drop_columns(["blocked"])), "items.arrow"),
    "columns of another order": (schema(lambda table: table.select(SCHEMA.names[::-1])), "items.arrow"),
    "items that are no table": (content("items.arrow", b"ARROW1"), "items.arrow"),
    "items cut": (cut("items.arrow", 40), "items.arrow"),
    "a link out of range": (link(0, ROWS), "graph-links.i32 0"),
    "a link far out of range": (link(9, 1 << 30), "graph-links.i32 9"),
    "a negative link": (link(5, -2), "graph-links.i32 5"),
    "a link to a lower level": (link_above, "graph-links.i32 of vector"),
    "a level beyond all": (level(200), "graph-levels.u8"),
    "a level too many": (level(30), "graph-l"),
    "a low entry point": (low_entry, "graph entry_point"),
    "an entry point beyond": (field("graph.entry_point", ROWS), "index.json graph entry_point"),
    "a graph of more rows": (field("graph.rows", ROWS + 1), "index.json graph rows"),
    "a graph of fewer rows": (each(field("graph.rows", 39), field("graph.entry_point", 0)), "graph-levels.u8"),
    "a graph of other degree": (field("graph.m", 3), "graph-links.i32"),
    "links cut": (cut("graph-links.i32", 4), "graph-links.i32"),
    "levels longer": (cut("graph-levels.u8", -1), "graph-levels.u8"),
}  # fmt: skip

FILES = ("index.json", "items.arrow", "shard-000.f16", "shard-002.f16", "said-001.f16", "graph-levels.u8", "graph-links.i32")  # fmt: skip
# What only the digests tell, or the names of files.
AS_PULLED: dict[str, tuple[Harm, str]] = {
    "a number turned": (number("shard-001.f16", 0, 0.0), "shard-001.f16"),
    "a said number turned": (number("said-001.f16", 0, 0.0), "said-001.f16"),
    "shards swapped": (swap("shard-000.f16", "shard-001.f16"), "shard-000.f16"),
    "said in place of vectors": (swap("shard-000.f16", "said-000.f16"), "shard-000.f16"),
    "a shard of another build": (from_another_build("shard-001.f16"), "shard-001.f16"),
    "two shards of another build": (from_another_build("shard-000.f16", "shard-002.f16"), "shard-000.f16"),
    "items of another build": (from_another_build("items.arrow"), "items.arrow"),
    "a graph of another build": (from_another_build("graph-levels.u8", "graph-links.i32"), "graph-"),
    "an unlisted shard": (content("shard-003.f16", b""), "shard-003.f16"),
    "another digest": (field("shards.1.sha256", "0" * 64), "shard-001.f16"),
    "no digest": (fields(items_sha256=""), "index.json items_sha256"),
    "a field twice": (text('"dim": 20', '"dim": 20, "dim": 20'), "index.json dim"),
    "not JSON": (text("{", "["), "index.json"),
    "no graph field": (no_field("graph"), "index.json graph"),
    **{f"{name} missing": (missing(name), name) for name in FILES},
}  # fmt: skip
HARMS = {name: (*harm, name in BEHIND) for name, harm in (BEHIND | AS_PULLED).items()}


def refusal(whole: Path, name: str) -> str | None:
    """What is wrong about how a copy of this index is refused when it was harmed so; None when all is well."""
    harm, part, sealed = HARMS[name]
    folder = Path(shutil.copytree(whole, whole.with_name("harmed")))
    try:
        Replies.load(folder)  # the control: unharmed, it loads
        harm(folder)
        if sealed:
            seal(folder)
        try:
            Replies.load(folder)
        except IndexInvalid as error:
            return None if error.part.startswith(part) and error.remedy else f"{name}: refused as {error}"
        return f"{name}: loaded"
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if __debug__:
        sys.exit("not optimised: this proves nothing")
    made = make_whole(Path(sys.argv[1]) / "whole")
    sys.exit("\n".join(filter(None, (refusal(made, name) for name in HARMS))) or None)
