"""An index changed in part answers as one built anew, keeps the bytes of its full shards, and is whole at every moment."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.build import BuildInvalid, Entry, build
from index.change import block, extend, remove
from index.layout import IndexInvalid, read_layout
from index.replies import Replies
from index.search import QueryInvalid
from tests.index.matrices import Floats
from tests.index.tampering import change_array, seal

NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
ANYONE: dict[str, Any] = {"persona": None, "surface": None}


def entries_of(first: int, last: int) -> list[Entry]:
    """Every third proposes the reply before it once more, to another prompt."""
    owners = [number - (number % 3 == 2) for number in range(first, last)]
    return [Entry(f"r{owner}", f"Reply {owner}.", f"prompt {first + i}") for i, owner in enumerate(owners)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answers(
    folder: Path, queries: Floats, now: datetime, **situation: Any
) -> list[list[tuple[str, str, float]]]:
    replies = Replies.load(folder)
    return [
        [
            (hit.item.id, hit.item.prompt, hit.similarity)
            for hit in replies.search(query, 7, as_of=now, **(ANYONE | situation))
        ]
        for query in queries
    ]


# --- extend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@pytest.mark.parametrize("with_said", [True, False], ids=["said", "prompts"])
@pytest.mark.parametrize(
    ("before", "added"), [(0, 5), (8, 0), (8, 1), (12, 3), (12, 4), (12, 30), (16, 8), (1, 1)]
)
def test_change_extend_answers_as_one_build_of_all(
    tmp_path: Path,
    now: datetime,
    random_vectors: Callable[..., Floats],
    kind: Any,
    with_said: bool,
    before: int,
    added: int,
) -> None:
    """In two batches; the bytes too are those of one build, where there is no graph."""
    count = before + added
    entries, vectors = entries_of(0, count), random_vectors(count)
    owners = [int(entry.id[1:]) for entry in entries]
    texts = random_vectors(count + 1, seed=1)[owners] if with_said else None
    options: dict[str, Any] = {"kind": kind, "shard_rows": 8, **NAMES}

    def part(first: int, last: int) -> tuple[list[Entry], Floats, Floats | None]:
        return entries[first:last], vectors[first:last], None if texts is None else texts[first:last]

    old, out = tmp_path / "old", tmp_path / "new"
    build(*part(0, before)[:2], old, said=part(0, before)[2], **options)
    untouched = contents(old)
    layout = extend(old, out, [part(before, before + added // 2), part(before + added // 2, count)])
    assert layout == read_layout(out) and layout.items == count
    assert contents(old) == untouched
    build(entries, vectors, tmp_path / "whole", said=texts, **options)
    whole = read_layout(tmp_path / "whole")
    assert (layout.shards, layout.said) == (whole.shards, whole.said)
    assert (layout.graph, layout.shard_rows) == (read_layout(old).graph, 8)
    queries = random_vectors(6, seed=2)
    assert answers(out, queries, now) == answers(tmp_path / "whole", queries, now)
    hits = [
        some.search(queries[0], 9, as_of=now, **ANYONE)
        for some in map(Replies.load, (out, tmp_path / "whole"))
    ]
    for folder, some in zip((out, tmp_path / "whole"), hits, strict=True):
        np.testing.assert_array_equal(Replies.load(folder).said(some), Replies.load(out).said(hits[0]))


def test_change_extend_keeps_full_shards_as_they_are_and_never_writes_into_the_last(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """They are the same files under two names; only the last, with room left, is written anew."""
    old, out = tmp_path / "old", tmp_path / "new"
    vectors = random_vectors(30)
    build(entries_of(0, 20), vectors[:20], old, shard_rows=8, **NAMES)
    before = contents(old)
    extend(old, out, [(entries_of(20, 30), vectors[20:], None)])
    for name in ("shard-000.f16", "shard-001.f16"):
        assert (out / name).stat().st_ino == (old / name).stat().st_ino
    assert (out / "shard-002.f16").read_bytes()[: 4 * 64] == before["shard-002.f16"]
    assert contents(old) == before
    shutil.rmtree(old)
    assert len(Replies.load(out)) == 30


def test_change_extend_hangs_on_vectors_that_are_there_already(
    folder: Path, now: datetime, random_vectors: Callable[..., Floats]
) -> None:
    vectors = random_vectors(20)
    layout = extend(
        folder, folder, [([Entry("n1", "N.", "p"), Entry("n2", "M.", "q")], vectors[[17, 17]] * 3, None)]
    )
    assert (layout.rows, layout.items) == (20, 22)
    found = [name for name, *_ in answers(folder, vectors[[17]], now)[0]]
    assert found[:3] == ["n1", "n2", "r17"]


def test_change_extend_in_place_keeps_a_loaded_index_answering(
    folder: Path, now: datetime, random_vectors: Callable[..., Floats]
) -> None:
    replies, vectors = Replies.load(folder), random_vectors(20)
    extend(folder, folder, [([Entry("new", "New.", "p")], -vectors[:1], None)])
    remove(folder, folder, ["r3"])
    found = [replies.search(vector, 1, as_of=now, **ANYONE)[0].item.id for vector in vectors]
    assert found == [f"r{number}" for number in range(20)]
    assert answers(folder, -vectors[:1], now)[0][0][0] == "new"


@pytest.mark.parametrize("name", ["shard-000.f16", "shard-002.f16"])
def test_change_extend_refuses_damaged_vectors_instead_of_giving_them_a_digest(
    folder: Path, tmp_path: Path, random_vectors: Callable[..., Floats], name: str
) -> None:
    """The last shard is written anew, so its damage would be sealed in."""
    more = [([Entry("new", "New.", "p")], random_vectors(1, seed=9), None)]
    extend(folder, tmp_path / "control", more)

    def turn(numbers: Any) -> None:
        numbers[3] *= -1  # no length changes

    change_array(folder / name, "<f2", turn)
    with pytest.raises(IndexInvalid, match=f"{name}: found sha256"):
        extend(folder, tmp_path / "out", more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "rows", "said", "error", "message"),
    [
        ([Entry("r3", "Reply 3.", "prompt 3")], 1, None, BuildInvalid, "entry 'r3': found a pair that the index has"),
        ([Entry("r3", "Other.", "p")], 1, None, IndexInvalid, "id 'r3': found different texts"),
        ([Entry("n", "N.", "p")] * 2, 2, None, IndexInvalid, "id 'n': found one prompt twice"),
        ([Entry("n", "N.", "p")], 2, None, BuildInvalid, "vectors: found 2 rows, expected 1"),
        ([Entry("n", "N.", "p")], 1, 2, BuildInvalid, "said: found 2 rows, expected 1"),
        ([Entry("n", "N.", "p")], 1, 1, BuildInvalid, "said: the index has no vectors of texts"),
        ([Entry("n", "N.", "p", ("grumpy",))], 1, None, BuildInvalid, "found persona 'grumpy'"),
        ([Entry("n", "", "p")], 1, None, IndexInvalid, "row 20: found an empty text"),
        ([Entry("n", "\ud800", "p")], 1, None, BuildInvalid, "entries: found 'utf-8' codec"),
        ([Entry("n", "N.", "p")], 0, None, BuildInvalid, "vectors: found 0 rows"),
    ],
    ids="pair text twice vectors said-rows said persona empty surrogate none".split(),
)  # fmt: skip
def test_change_extend_refuses_and_changes_nothing(
    folder: Path, random_vectors: Callable[..., Floats], entries: list[Entry], rows: int, said: int | None,
    error: type[ValueError], message: str,
) -> None:  # fmt: skip
    before = contents(folder)
    texts = None if said is None else random_vectors(said, seed=8)
    with pytest.raises(error, match=message):
        extend(folder, folder, [(entries, random_vectors(rows, seed=7), texts)])
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_change_extend_names_the_row_of_a_bad_vector(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    vectors = random_vectors(3, seed=7)
    vectors[1] = np.nan
    with pytest.raises(QueryInvalid, match="row 21: found NaN"):
        extend(folder, folder, [([Entry(f"n{i}", "N.", "p") for i in range(3)], vectors, None)])


@pytest.mark.parametrize("first", [True, False])
def test_change_extend_wants_texts_in_all_batches_or_none(
    tmp_path: Path, random_vectors: Callable[..., Floats], first: bool
) -> None:
    """An empty index has no say in it, so the first batch decides."""
    build([], np.empty((0, 20), np.float32), tmp_path / "i", **NAMES)
    vectors = random_vectors(4)
    batches = [
        ([Entry(f"r{i}", "R.", "p")], vectors[[i]], vectors[[i]] if first == (i == 0) else None)
        for i in range(2)
    ]
    with pytest.raises(BuildInvalid, match="said: the index has"):
        extend(tmp_path / "i", tmp_path / "i", batches)
    assert extend(tmp_path / "i", tmp_path / "i", batches[:1]).said_rows == first  # the control


# --- remove, block -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_change_remove_answers_as_if_it_had_never_been_there(
    tmp_path: Path, now: datetime, random_vectors: Callable[..., Floats], kind: Any
) -> None:
    """Its vectors stay where they are, out of reach: beside one, another reply comes."""
    folder, out = tmp_path / "i", tmp_path / "out"
    entries, vectors = entries_of(0, 30), random_vectors(30)
    build(entries, vectors, folder, kind=kind, shard_rows=8, **NAMES)
    gone = {"r1", "r12", "r28"}
    layout = remove(folder, out, gone)
    kept = [row for row, entry in enumerate(entries) if entry.id not in gone]
    build([entries[row] for row in kept], vectors[kept], tmp_path / "anew", kind=kind, **NAMES)
    queries = np.concatenate([vectors, random_vectors(5, seed=3)])
    assert answers(out, queries, now) == answers(tmp_path / "anew", queries, now)
    old = read_layout(folder)
    assert (layout.shards, layout.graph, layout.rows, layout.items) == (old.shards, old.graph, 30, len(kept))
    assert len(Replies.load(folder)) == 30


def test_change_remove_of_everything_leaves_an_index_that_can_be_filled_again(
    folder: Path, now: datetime, random_vectors: Callable[..., Floats]
) -> None:
    remove(folder, folder, [f"r{number}" for number in range(20)])
    vectors = random_vectors(20)
    assert answers(folder, vectors[:2], now) == [[], []]
    extend(folder, folder, [([Entry("back", "Back.", "p")], vectors[[5]], None)])
    layout = read_layout(folder)
    assert (layout.rows, layout.items) == (20, 1)
    assert [name for name, *_ in answers(folder, vectors[[0]], now)[0]] == ["back"]


def test_change_block_keeps_a_reply_from_everybody_until_it_is_allowed_again(
    folder: Path, tmp_path: Path, now: datetime, random_vectors: Callable[..., Floats]
) -> None:
    vectors, before = random_vectors(20), contents(folder)
    layout = block(folder, tmp_path / "b", ["r4", "r7"], "rude")
    assert layout.shards == read_layout(folder).shards
    found = answers(tmp_path / "b", vectors[[4, 7]], now, persona="calm", surface="tv")
    assert not {"r4", "r7"} & {name for some in found for name, *_ in some}
    items = Replies.load(tmp_path / "b").items
    assert [items.reply(row).blocked for row in (3, 4, 7)] == ["", "rude", "rude"]
    block(tmp_path / "b", tmp_path / "b", ["r4", "r7"], "")
    assert answers(tmp_path / "b", vectors, now) == answers(folder, vectors, now)
    assert contents(tmp_path / "b") == contents(folder) == before


@pytest.mark.parametrize(
    "change", [remove, lambda folder, out, ids: block(folder, out, ids, "rude")], ids=["remove", "block"]
)
def test_change_refuses_ids_that_there_are_not(folder: Path, change: Callable[..., Any]) -> None:
    before = contents(folder)
    with pytest.raises(BuildInvalid, match="'r99', 'x': found no such reply"):
        change(folder, folder, ["r1", "r99", "x"])
    assert contents(folder) == before
    change(folder, folder, ["r1"])  # the control
    assert contents(folder) != before


# --- nothing by halves -------------------------------------------------------------------------------------

CHANGES = {
    "extend": lambda folder, out: extend(folder, out, []),
    "remove": lambda folder, out: remove(folder, out, ["r1"]),
    "block": lambda folder, out: block(folder, out, ["r1"], "rude"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_refuses_to_write_over_anything_but_an_index(
    folder: Path, tmp_path: Path, change: Callable[[Path, Path], Any]
) -> None:
    thesis = tmp_path / "work" / "thesis.odt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(BuildInvalid, match="found 'thesis.odt', expected an index or nothing"):
        change(folder, thesis.parent)
    assert thesis.read_text() == "years of work"
    change(folder, tmp_path / "new")  # the control
    change(folder, tmp_path / "new")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_refuses_a_damaged_table(folder: Path, change: Callable[[Path, Path], Any]) -> None:
    path = folder / "items.arrow"
    raw = path.read_bytes()
    path.write_bytes(raw[:-30])
    with pytest.raises(IndexInvalid, match="items.arrow: found sha256"):
        change(folder, folder)
    seal(folder)
    with pytest.raises(IndexInvalid, match="items.arrow: found unreadable"):
        change(folder, folder)


KILLED = """
import importlib, os, signal, sys
from pathlib import Path
import numpy as np
from index.build import Entry
from index.change import extend, remove

folder, change, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def batches():
    rows = np.random.default_rng(9).standard_normal((20, 20)).astype(np.float32)
    for first in (0, 10):
        if when == "adding" and first:
            die()
        yield [Entry(f"n{i}", "New.", "p") for i in range(first, first + 10)], rows[first : first + 10], None

module = importlib.import_module("index.build")
if when == "publishing":
    module.Layout.save = die
if when == "replacing":
    module._replace = die
if when == "clearing":
    rmtree = module.shutil.rmtree
    module.shutil.rmtree = lambda path, **options: die() if Path(path).exists() else None
extend(folder, folder, batches()) if change == "extend" else remove(folder, folder, ["r3"])
"""


@pytest.mark.parametrize(
    ("change", "when", "left"),
    [
        ("extend", "adding", 20), ("extend", "publishing", 20), ("extend", "replacing", 20), ("extend", "clearing", 40),
        ("remove", "publishing", 20), ("remove", "clearing", 19),
    ],
)  # fmt: skip
def test_change_killed_leaves_a_whole_index(folder: Path, change: str, when: str, left: int) -> None:
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), change, when],
        cwd=Path(__file__).parents[2], capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(Replies.load(folder)) == left
    assert (contents(folder) == before) == (left == 20)
    remove(folder, folder, ["r5"])
    assert len(Replies.load(folder)) == left - 1
