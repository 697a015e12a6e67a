"""A build either writes a whole index, the same bytes every time, or changes nothing and says why."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.build import BuildInvalid, Entry, Writer, build
from index.change import extend, remove
from index.graph import EF_SEARCH
from index.items import Items, Judged
from index.layout import IndexInvalid, read_layout
from index.matrix import Matrix
from index.replies import Replies
from index.search import QueryInvalid
from tests.index.matrices import Floats, Halves
from tests.index.tampering import digest

NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker",)}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def items_of(folder: Path) -> Items:
    """The items alone, whatever is wrong with the rest."""
    layout = read_layout(folder)
    said = layout.said_rows if layout.said else layout.rows
    return Items.load(
        folder / "items.arrow", sha256=layout.items_sha256, rows=layout.items, vectors=layout.rows, said=said
    )


def stored(folder: Path) -> Halves:
    """The vectors of all shards, without their padding."""
    layout = read_layout(folder)
    return Matrix.load(folder, layout.shards, layout.dim).array[:, : layout.dim]


def in_batches(
    entries: list[Entry], vectors: Floats, out: Path, size: int, *, said: Floats | None = None, **options: Any
) -> None:
    with Writer(out, vectors.shape[1], **NAMES, **options) as index:
        for first in range(0, len(entries), size):
            part = slice(first, first + size)
            index.add(entries[part], vectors[part], None if said is None else said[part])
        index.finish()


def test_build_writes_the_layout(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "items.arrow",
        "shard-000.f16",
        "shard-001.f16",
        "shard-002.f16",
    ]
    assert json.loads((folder / "index.json").read_text()) == {
        "format": 2,
        "dim": 20,
        "padded": 32,
        "rows": 20,
        "items": 20,
        "items_sha256": digest(folder / "items.arrow"),
        "personas": ["calm", "lively"],
        "surfaces": ["speaker", "tv"],
        "shard_rows": 8,
        "shards": [
            {"file": f"shard-00{i}.f16", "rows": rows, "sha256": digest(folder / f"shard-00{i}.f16")}
            for i, rows in enumerate((8, 8, 4))
        ],
        "said_rows": 0,
        "said": [],
        "graph": None,
    }


def test_build_writes_the_layout_of_all_there_can_be(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    out, vectors = tmp_path / "out", random_vectors(20)
    said = np.repeat(random_vectors(10, seed=1), 2, axis=0)
    build(plain_entries(20), vectors, out, said=said, kind="hnsw", shard_rows=8, **NAMES)
    layout = read_layout(out)
    assert (layout.kind, layout.rows, layout.said_rows) == ("hnsw", 20, 10)
    assert [shard.file for shard in layout.said] == ["said-000.f16", "said-001.f16"]
    assert layout.graph is not None
    assert layout.graph.levels_sha256 == digest(out / "graph-levels.u8")
    assert layout.graph.links_sha256 == digest(out / "graph-links.i32")
    assert (layout.graph.rows, layout.graph.m, layout.graph.ef_search) == (20, 32, EF_SEARCH)
    items = items_of(out)
    assert items.said.tolist() == [i // 2 for i in range(20)]
    stored_said = Matrix.load(out, layout.said, 20).array[items.said, :20].astype(np.float32)
    np.testing.assert_allclose(stored_said, said / np.linalg.norm(said, axis=1, keepdims=True), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "rows", "made"),
    [
        ("auto", 10, "exact"),
        ("auto", 20, "hnsw"),
        ("hnsw", 10, "hnsw"),
        ("hnsw", 0, "exact"),
        ("exact", 20, "exact"),
    ],
)
def test_build_makes_a_graph_where_it_is_to(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]],
    monkeypatch: pytest.MonkeyPatch, kind: Any, rows: int, made: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        importlib.import_module("index.build"), "GRAPH_FROM", 20
    )  # `build` is the function too
    build(plain_entries(rows), random_vectors(rows), tmp_path / "out", kind=kind, **NAMES)
    assert read_layout(tmp_path / "out").kind == made
    assert len(Replies.load(tmp_path / "out")) == rows


def test_build_stores_unit_vectors_rounded_to_float16(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    vectors = random_vectors(20)
    expected = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.testing.assert_allclose(stored(folder), expected, rtol=2**-10)


def test_build_keeps_the_order_and_all_the_facts(tmp_path: Path, now: datetime) -> None:
    later = datetime(2027, 1, 1, tzinfo=UTC)
    entries = [
        Entry(
            "b", "B.", "say b", ("lively",), ("speaker",), now, later, 0.25, "joy", ("x", "y"),
            (Judged("scope", "да", 0.5),), "rude",
        ),
        Entry("a", "A.", "say a"),
    ]  # fmt: skip
    build(entries, np.eye(2, 3, dtype=np.float32), tmp_path / "out", **NAMES)
    items = items_of(tmp_path / "out")
    first, second = items.reply(0), items.reply(1)
    assert (first.id, first.text, first.prompt) == ("b", "B.", "say b")
    assert (first.persona_mask, first.surface_mask) == (0b10, 0b1)
    assert (first.valid_from, first.valid_until) == (now, later)
    assert (first.weight, first.emotion, first.tags) == (0.25, "joy", ("x", "y"))
    assert (first.labels, first.blocked) == ((Judged("scope", "да", 0.5),), "rude")
    assert (second.id, second.persona_mask, second.surface_mask) == ("a", 0xFFFFFFFF, 0xFFFFFFFF)
    assert (second.valid_from, second.valid_until, second.weight, second.tags) == (None, None, 1.0, ())
    assert (second.labels, second.blocked) == ((), "")


def test_build_stores_the_labels_of_a_reply_once_and_every_row_has_them(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """In two batches, extended by one more row, with a reply before it removed."""
    out, vectors, labels = tmp_path / "out", random_vectors(5), (Judged("scope", "chitchat", 0.5),)
    entries = [Entry("b", "B.", "p0")] + [Entry("a", "A.", f"p{i}", labels=labels) for i in range(1, 5)]
    in_batches(entries[:4], vectors[:4], out, 2)
    extend(out, out, [(entries[4:], vectors[4:], None)])
    assert items_of(out).table["labels"].combine_chunks().flatten().to_pylist() == [labels[0]._asdict()]
    remove(out, out, ["b"])
    items = items_of(out)
    assert [items.reply(row).labels for row in range(4)] == [labels] * 4


def test_build_gives_the_same_bytes_for_the_same_input(
    folder: Path,
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    names: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
    build(plain_entries(20), random_vectors(20), again, shard_rows=8, **names)
    build(plain_entries(20), random_vectors(20, seed=1), other, shard_rows=8, **names)
    assert contents(folder) == contents(again)
    assert contents(folder) != contents(other)  # the control: the comparison sees a difference


def test_build_of_nothing_is_an_empty_index(tmp_path: Path, now: datetime) -> None:
    build([], np.empty((0, 20), np.float32), tmp_path / "out", **NAMES)
    replies = Replies.load(tmp_path / "out")
    assert (len(replies), replies.dim) == (0, 20)
    assert replies.search(np.ones(20, np.float32), 5, persona=None, surface=None, as_of=now) == []


def test_build_replaces_an_earlier_index_whole(
    folder: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    build(plain_entries(3), random_vectors(3), folder, **NAMES)
    assert len(Replies.load(folder)) == 3
    assert not (folder / "shard-002.f16").exists()


def test_build_refuses_a_folder_that_holds_anything_else(
    folder: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    (folder / "thesis.odt").write_text("years of work")
    with pytest.raises(BuildInvalid, match="found 'thesis.odt'"):
        build(plain_entries(3), random_vectors(3), folder, **NAMES)
    assert (folder / "thesis.odt").exists()


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (3, np.nan, "row 3: found NaN, infinity or overflow"),
        (13, np.inf, "row 13: found NaN, infinity or overflow"),
        (19, 0.0, "row 19: found zero length"),
    ],
)
def test_build_names_the_row_of_a_bad_vector_and_leaves_the_old_index(
    folder: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
    row: int,
    value: float,
    message: str,
) -> None:
    before = contents(folder)
    vectors = random_vectors(20)
    vectors[row] = value
    for size in (8, 20):  # rows 3, 13 and 19 lie in three batches, or in one
        with pytest.raises(QueryInvalid, match=message):
            in_batches(plain_entries(20), vectors, folder, size, shard_rows=8)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["index"]  # nothing half-built is left behind


def test_build_takes_lengths_that_float16_cannot_hold(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    vectors = random_vectors(2)
    vectors[0] *= 1e20
    vectors[1] *= 1e-20
    build(plain_entries(2), vectors, tmp_path / "out", **NAMES)
    assert len(Replies.load(tmp_path / "out")) == 2


# --- one vector for all the replies of a prompt ------------------------------------------------------------


def shuffled(prompts: int, seed: int) -> tuple[list[Entry], list[int]]:
    """Every prompt under 1 to 9 replies, twice in between with a persona, in any order; and their prompts."""
    rng = np.random.default_rng(seed)
    entries, numbers = [], []
    for prompt in range(prompts):
        for reply in range(int(rng.integers(1, 10))):
            personas: tuple[str, ...] = ((), ("calm",), ("lively",))[reply % 3]
            entries.append(Entry(f"r{reply}", f"Reply {reply}.", f"prompt {prompt}", personas))
            numbers.append(prompt)
    order = rng.permutation(len(entries)).tolist()
    return [entries[i] for i in order], [numbers[i] for i in order]


@pytest.mark.parametrize("size", [1, 3, 8, 4096], ids="batch-{}".format)
@pytest.mark.parametrize("with_said", [True, False], ids=["said", "prompts"])
def test_build_stores_one_vector_per_prompt_however_its_replies_are_strewn(
    tmp_path: Path, random_vectors: Callable[..., Floats], size: int, with_said: bool
) -> None:
    entries, prompts = shuffled(21, seed=size)
    owners = [int(entry.id[1:]) for entry in entries]
    vectors, texts = random_vectors(21)[prompts], random_vectors(10, seed=1)[owners] if with_said else None
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    build(entries, vectors, tmp_path / "whole", said=texts, shard_rows=8, **NAMES)
    in_batches(entries, vectors, tmp_path / "out", size, said=texts, shard_rows=8)
    layout = read_layout(tmp_path / "out")
    assert (layout.rows, layout.items) == (21, len(entries))
    assert [shard.rows for shard in layout.shards] == [8, 8, 5]
    items = items_of(tmp_path / "out")
    places = list(dict.fromkeys(prompts))  # a vector stands where the first of its entries stood
    assert items.vectors.tolist() == [places.index(prompt) for prompt in prompts]
    np.testing.assert_allclose(stored(tmp_path / "out")[items.vectors], units, atol=2**-11)
    assert [(items.reply(row).id, items.reply(row).prompt) for row in range(len(items))] == [
        (entry.id, entry.prompt) for entry in entries
    ]
    if with_said:
        assert items.said.tolist() == [[*dict.fromkeys(owners)].index(owner) for owner in owners]
    else:  # the vector of its first prompt stands for a reply's text
        first = {entry.id: items.vectors[row] for row, entry in reversed([*enumerate(entries)])}
        assert items.said.tolist() == [first[entry.id] for entry in entries]
    whole = contents(tmp_path / "whole")
    shards = {name: raw for name, raw in contents(tmp_path / "out").items() if name.endswith(".f16")}
    assert shards == {name: raw for name, raw in whole.items() if name.endswith(".f16")}
    assert items.table.equals(items_of(tmp_path / "whole").table)  # stored batch by batch


@pytest.mark.parametrize(
    ("vectors", "hangs_on"),
    [
        ([[3, 4], [3, 4], [3, 4]], [0, 0, 0]),
        ([[3, 4], [6, 8], [0.75, 1]], [0, 0, 0]),
        ([[3, 4], [3, 4.0001], [3, 4]], [0, 0, 0]),
        ([[3, 4], [4, 3], [3, 4]], [0, 1, 0]),
        ([[3, 4], [-3, -4], [3, -4]], [0, 1, 2]),
        ([[3, 4], [3, 4.01], [3, 4.02]], [0, 1, 2]),
    ],
    ids="same scaled one-in-float16 apart mirrored close".split(),
)
def test_build_shares_what_float16_cannot_tell_apart_and_nothing_else(
    tmp_path: Path, vectors: list[list[float]], hangs_on: list[int]
) -> None:
    """The vector alone decides, whatever the prompts say."""
    entries = [Entry("a", "A.", "one"), Entry("b", "B.", "two"), Entry("c", "C.", "one")]
    build(entries, np.array(vectors, np.float32), tmp_path / "out", **NAMES)
    layout = read_layout(tmp_path / "out")
    assert (layout.rows, layout.items) == (max(hangs_on) + 1, 3)
    items = items_of(tmp_path / "out")
    assert items.vectors.tolist() == hangs_on


def test_build_names_a_bad_vector_behind_many_equal_ones(tmp_path: Path) -> None:
    """The number is the entry's, counted over all batches, not that of a distinct vector."""
    entries = [Entry(f"r{i}", f"R{i}.", "p") for i in range(30)]
    vectors = np.ones((30, 3), np.float32)
    build(entries, vectors, tmp_path / "good", **NAMES)  # the control
    assert read_layout(tmp_path / "good").rows == 1
    vectors[29] = 0.0
    with pytest.raises(QueryInvalid, match="row 29: found zero length"):
        in_batches(entries, vectors, tmp_path / "out", 4)


# --- what is refused ---------------------------------------------------------------------------------------

GOOD = Entry(id="a", text="A.", prompt="say a")
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([GOOD, GOOD], IndexInvalid, r"id 'a': found one prompt twice in rows \[0, 1\]"),
        ([GOOD, replace(GOOD, text="B.", prompt="b")], IndexInvalid, "id 'a': found different texts"),
        ([GOOD, replace(GOOD, id="")], IndexInvalid, "row 1: found an empty id"),
        ([replace(GOOD, text="")], IndexInvalid, "row 0: found an empty text"),
        ([replace(GOOD, weight=float("nan"))], IndexInvalid, "row 0: found an infinite or NaN weight"),
        ([replace(GOOD, valid_from=START, valid_until=START)], IndexInvalid, "valid_from not before"),
        ([replace(GOOD, valid_from=datetime(2026, 1, 1))], ValueError, "time zone"),
        ([replace(GOOD, valid_until=datetime(2026, 1, 1))], ValueError, "time zone"),
        (
            [replace(GOOD, personas=("grumpy",))],
            BuildInvalid,
            "found persona 'grumpy', expected one of: calm",
        ),
        ([replace(GOOD, surfaces=("fridge",))], BuildInvalid, "found surface 'fridge'"),
        ([GOOD, replace(GOOD, prompt="b", blocked="rude")], IndexInvalid, "id 'a': found blocked in one row"),
        (
            [replace(GOOD, labels=(Judged("h", "l", float("inf")),))],
            IndexInvalid,
            "row 0: found a label of an",
        ),
        ([replace(GOOD, weight=1e300)], IndexInvalid, "row 0: found an infinite or NaN weight"),
        ([replace(GOOD, text="\ud800")], BuildInvalid, "entries: found 'utf-8' codec can't encode"),
        ([replace(GOOD, text=None)], IndexInvalid, "entries text: found nulls"),  # type: ignore[arg-type]
        ([replace(GOOD, id=7)], BuildInvalid, "entries: found .* expected text and numbers"),  # type: ignore[arg-type]
    ],
    ids=[
        *"twice texts id text weight empty-span naive-from naive-until persona surface".split(),
        *"blocked label-score huge-weight surrogate no-text numeric-id".split(),
    ],
)
def test_build_refuses_entries(
    tmp_path: Path, entries: list[Entry], error: type[ValueError], message: str
) -> None:
    vectors = np.ones((len(entries), 4), np.float32)
    with pytest.raises(error, match=message):
        build(entries, vectors, tmp_path / "out", **NAMES)
    assert not (tmp_path / "out").exists()
    build([GOOD], vectors[:1], tmp_path / "out", **NAMES)  # the control


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2,), (2, 0), (2, 2, 2)], ids=str)
def test_build_refuses_vectors_that_do_not_fit_the_entries(tmp_path: Path, shape: tuple[int, ...]) -> None:
    entries = [GOOD, replace(GOOD, id="b")]
    with pytest.raises(BuildInvalid, match="vectors: found"):
        build(entries, np.ones(shape, np.float32), tmp_path / "out", **NAMES)


@pytest.mark.parametrize("shard_rows", [0, -8, 4, 12])
def test_build_refuses_shards_that_would_split_a_byte_of_a_mask(tmp_path: Path, shard_rows: int) -> None:
    with pytest.raises(BuildInvalid, match="multiple of 8"):
        build([GOOD], np.ones((1, 4), np.float32), tmp_path / "out", shard_rows=shard_rows, **NAMES)


@pytest.mark.parametrize(
    "personas", [["a", "a"], [""], [f"p{i}" for i in range(33)]], ids=["twice", "empty", "33"]
)
def test_build_refuses_names_that_no_mask_can_hold(tmp_path: Path, personas: list[str]) -> None:
    with pytest.raises(BuildInvalid, match="personas: found"):
        build([GOOD], np.ones((1, 4), np.float32), tmp_path / "out", personas=personas, surfaces=())


def test_build_refuses_texts_in_one_batch_and_not_in_another(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    entries, vectors = plain_entries(4), random_vectors(4)
    for first, second in ((None, vectors), (vectors, None)):
        with Writer(tmp_path / "out", 20, **NAMES) as index:
            index.add(entries[:2], vectors[:2], first if first is None else first[:2])
            with pytest.raises(BuildInvalid, match="said: found in one batch and not in another"):
                index.add(entries[2:], vectors[2:], second if second is None else second[2:])
    with pytest.raises(BuildInvalid, match="said: found 3 rows, expected 4"):
        build(entries, vectors, tmp_path / "out", said=vectors[:3], **NAMES)
    assert not (tmp_path / "out").exists()


# --- nothing by halves -------------------------------------------------------------------------------------


def test_build_changes_nothing_before_it_is_finished(
    folder: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    before = contents(folder)
    with Writer(folder, 20, **NAMES) as index:
        index.add(plain_entries(3), random_vectors(3))
        assert contents(folder) == before
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["index"]
    with Writer(folder, 20, **NAMES) as index:  # the control
        index.add(plain_entries(3), random_vectors(3))
        index.finish()
    assert contents(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_build_lets_a_caller_add_what_belongs_to_the_folder(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    def also(staging: Path) -> None:
        assert staging != tmp_path / "out"
        (staging / "canaries.safetensors").write_bytes(b"song")

    for _ in range(2):  # it is replaced with the rest
        with Writer(tmp_path / "out", 20, **NAMES) as index:
            index.add(plain_entries(3), random_vectors(3))
            index.finish(also=also)
        assert (tmp_path / "out" / "canaries.safetensors").read_bytes() == b"song"


KILLED = """
import importlib, os, signal, sys
from pathlib import Path
import numpy as np
from index.build import Entry, Writer

out, when = Path(sys.argv[1]), sys.argv[2]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

module = importlib.import_module("index.build")
if when == "linking":
    module.build_graph = die
elif when == "publishing":
    module.Items.load = die
elif when == "replacing":
    module._replace = die
elif when == "clearing":
    rmtree = module.shutil.rmtree
    module.shutil.rmtree = lambda path, **options: die() if Path(path).exists() else None
rows = np.random.default_rng(9).standard_normal((40, 20)).astype(np.float32)
with Writer(out, 20, personas=(), surfaces=(), kind="hnsw", shard_rows=8) as writer:
    for first in range(0, 40, 10):
        writer.add([Entry(f"n{i}", "New.", "p") for i in range(first, first + 10)], rows[first : first + 10])
        if when == "adding" and first == 20:
            die()
    writer.finish()
"""


@pytest.mark.parametrize("when", ["adding", "linking", "publishing", "replacing", "clearing"])
def test_build_killed_leaves_a_whole_index(folder: Path, when: str) -> None:
    """The old one, until all of the new one is there; what was half made lies beside it and hinders nobody."""
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), when],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(Replies.load(folder)) == (40 if when == "clearing" else 20)
    assert (contents(folder) == before) == (when != "clearing")
    build([GOOD], np.ones((1, 20), np.float32), folder, **NAMES)
    assert len(Replies.load(folder)) == 1


def test_build_begins_anew_where_a_killed_process_of_its_number_left_off(
    folder: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    """In a container every process may have the same number."""
    left = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    left.mkdir()
    (left / "shard-007.f16").write_bytes(b"half")
    build(plain_entries(3), random_vectors(3), folder, **NAMES)
    assert len(Replies.load(folder)) == 3
    assert not left.exists()
