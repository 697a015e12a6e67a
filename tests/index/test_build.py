"""A build either writes a whole index, the same bytes every time, or changes nothing and says why."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import BuildInvalid, Entry, build
from index.items import Items
from index.replies import Replies
from index.search import QueryInvalid
from index.shard import IndexInvalid, read
from index.sharded import read_layout

Floats = NDArray[np.float32]
NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker",)}


@pytest.fixture
def block_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the blocks of a build small; the package's own attribute `build` is the function."""
    module = importlib.import_module("index.build")

    def set_to(rows: int) -> None:
        monkeypatch.setattr(module, "BLOCK_ROWS", rows)

    return set_to


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_build_writes_the_layout(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "items.arrow",
        "shard-000.f16",
        "shard-001.f16",
        "shard-002.f16",
    ]
    assert json.loads((folder / "index.json").read_text()) == {
        "kind": "exact",
        "dim": 20,
        "padded": 32,
        "rows": 20,
        "items": 20,
        "personas": ["calm", "lively"],
        "surfaces": ["speaker", "tv"],
        "shards": [
            {"file": "shard-000.f16", "rows": 8},
            {"file": "shard-001.f16", "rows": 8},
            {"file": "shard-002.f16", "rows": 4},
        ],
    }


def test_build_stores_unit_vectors_rounded_to_float16(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    vectors = random_vectors(20)
    expected = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    stored = read(folder / "shard-001.f16", rows=8, dim=20)
    np.testing.assert_allclose(stored[:, :20], expected[8:16], rtol=2**-10)


def test_build_keeps_the_order_and_all_the_facts(tmp_path: Path, now: datetime) -> None:
    later = datetime(2027, 1, 1, tzinfo=UTC)
    entries = [
        Entry("b", "B.", "say b", ("lively",), ("speaker",), now, later, 0.25, "joy", ("x", "y")),
        Entry("a", "A.", "say a"),
    ]
    build(entries, np.eye(2, 3, dtype=np.float32), tmp_path / "out", **NAMES)
    items = Items.load(tmp_path / "out" / "items.arrow", rows=2, vectors=2)
    first, second = items.reply(0), items.reply(1)
    assert (first.id, first.text, first.prompt) == ("b", "B.", "say b")
    assert (first.persona_mask, first.surface_mask) == (0b10, 0b1)
    assert (first.valid_from, first.valid_until) == (now, later)
    assert (first.weight, first.emotion, first.tags) == (0.25, "joy", ("x", "y"))
    assert (second.id, second.persona_mask, second.surface_mask) == ("a", 0xFFFFFFFF, 0xFFFFFFFF)
    assert (second.valid_from, second.valid_until, second.weight, second.tags) == (None, None, 1.0, ())


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
    block_rows: Callable[[int], None],
    row: int,
    value: float,
    message: str,
) -> None:
    block_rows(8)  # rows 3, 13 and 19 lie in three blocks
    before = contents(folder)
    vectors = random_vectors(20)
    vectors[row] = value
    with pytest.raises(QueryInvalid, match=message):
        build(plain_entries(20), vectors, folder, shard_rows=8, **NAMES)
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


def stored(folder: Path) -> NDArray[np.float16]:
    """The vectors of all shards, without their padding."""
    layout = read_layout(folder)
    shards = [read(folder / shard.file, rows=shard.rows, dim=layout.dim) for shard in layout.shards]
    return np.concatenate(shards)[:, : layout.dim]


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


@pytest.mark.parametrize("rows", [1, 3, 8, 4096], ids="block-{}".format)
def test_build_stores_one_vector_per_prompt_however_its_replies_are_strewn(
    tmp_path: Path, random_vectors: Callable[..., Floats], block_rows: Callable[[int], None], rows: int
) -> None:
    entries, prompts = shuffled(21, seed=rows)
    vectors = random_vectors(21)[prompts]
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    build(entries, vectors, tmp_path / "whole", shard_rows=8, **NAMES)
    block_rows(rows)
    build(entries, vectors, tmp_path / "out", shard_rows=8, **NAMES)
    layout = read_layout(tmp_path / "out")
    assert (layout.rows, layout.items) == (21, len(entries))
    assert [shard.rows for shard in layout.shards] == [8, 8, 5]
    items = Items.load(tmp_path / "out" / "items.arrow", rows=len(entries), vectors=21)
    places = list(dict.fromkeys(prompts))  # a vector stands where the first of its entries stood
    assert items.vectors.tolist() == [places.index(prompt) for prompt in prompts]
    np.testing.assert_allclose(stored(tmp_path / "out")[items.vectors], units, atol=2**-11)
    assert [(items.reply(row).id, items.reply(row).prompt) for row in range(len(items))] == [
        (entry.id, entry.prompt) for entry in entries
    ]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
    items = Items.load(tmp_path / "out" / "items.arrow", rows=3, vectors=layout.rows)
    assert items.vectors.tolist() == hangs_on


def test_build_names_a_bad_vector_behind_many_equal_ones(
    tmp_path: Path, block_rows: Callable[[int], None]
) -> None:
    """The number is the entry's, not that of a distinct vector."""
    block_rows(4)
    entries = [Entry(f"r{i}", f"R{i}.", "p") for i in range(30)]
    vectors = np.ones((30, 3), np.float32)
    build(entries, vectors, tmp_path / "good", **NAMES)  # the control
    assert read_layout(tmp_path / "good").rows == 1
    vectors[29] = 0.0
    with pytest.raises(QueryInvalid, match="row 29: found zero length"):
        build(entries, vectors, tmp_path / "out", **NAMES)


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
    ],
    ids="twice texts id text weight empty-span naive-from naive-until persona surface".split(),
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
