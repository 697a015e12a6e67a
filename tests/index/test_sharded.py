"""The served index: equal to the exact twin, all or nothing at load, guards that outlive `python -O`."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import index.shard
import index.sharded
from index.exact import ExactIndex
from index.search import Hits, QueryInvalid, prepare_rows
from index.shard import IndexInvalid, Selector, Shard, padded
from index.sharded import REMEMBERED_MASKS, ShardedIndex, read_layout

DIM = 20
Floats = NDArray[np.float32]


def sharded(vectors: Floats, cuts: list[int], *, threads: int = 1) -> ShardedIndex:
    """An index in memory, cut into shards after the given rows."""
    rows, dim = vectors.shape
    stored = np.zeros((rows, padded(dim)), np.float16)
    stored[:, :dim] = prepare_rows(vectors, dim)
    bounds = [0, *cuts, rows]
    shards = [Shard(stored[a:b].copy()) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    return ShardedIndex(shards, dim, threads=threads)


def assert_same(found: Hits, expected: Hits, every: Hits) -> None:
    """Equal up to the rounding of float32 sums: the scores of the truth, each on a row that truly has it."""
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-6)  # also as many
    truth = dict(zip(every.rows.tolist(), every.scores.tolist(), strict=True))
    np.testing.assert_allclose(found.scores, [truth[row] for row in found.rows.tolist()], atol=2e-6)
    assert len(set(found.rows.tolist())) == len(found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, list[int], Floats, int, NDArray[np.uint8] | None]:
    """Few distinct directions (so many exact ties), any number of rows, shards down to one row, any mask."""
    rows = draw(st.integers(0, 40))
    dim = draw(st.sampled_from([1, 3, 16, 20]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    distinct = draw(st.integers(1, 12))
    directions = rng.integers(-3, 4, (distinct, dim)).astype(np.float32)
    directions[~directions.any(axis=1), 0] = 1.0
    vectors = directions[rng.integers(0, distinct, rows)] * rng.uniform(0.1, 9.0, (rows, 1)).astype(
        np.float32
    )
    cuts = sorted(draw(st.sets(st.sampled_from([8, 16, 24, 32]), max_size=4)) & set(range(rows)))
    query = rng.standard_normal(dim).astype(np.float32)
    k = draw(st.integers(1, 50))
    kind = draw(st.sampled_from(["none", "random", "empty", "full"]))
    chance = {"none": 1.0, "random": 0.4, "empty": 0.0, "full": 1.0}[kind]
    mask = None if kind == "none" else np.packbits(rng.random(rows) < chance, bitorder="little")
    return vectors, cuts, query, k, mask


@settings(max_examples=150, deadline=None)
@given(cases())
def test_sharded_equals_the_exact_twin(
    case: tuple[Floats, list[int], Floats, int, NDArray[np.uint8]],
) -> None:
    vectors, cuts, query, k, mask = case
    index, twin = sharded(vectors, cuts), ExactIndex(vectors)
    found, expected = index.search(query, k, mask=mask), twin.search(query, k, mask=mask)
    assert_same(found, expected, twin.search(query, max(1, len(twin)), mask=mask))
    # Equal vectors have equal scores to the last bit, wherever they lie: descending, then ascending by row.
    order = np.lexsort((found.rows, -found.scores))
    assert order.tolist() == list(range(len(found)))
    many = index.search_many(np.stack([query, -query]), k, mask=mask)
    assert many[0].rows.tolist() == found.rows.tolist()
    assert many[0].scores.tolist() == found.scores.tolist()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_sharded_cuts_do_not_change_the_answer(
    case: tuple[Floats, list[int], Floats, int, NDArray[np.uint8] | None],
) -> None:
    vectors, cuts, query, k, mask = case
    whole, cut = sharded(vectors, []), sharded(vectors, cuts)
    expected = whole.search(query, k, mask=mask)
    found = cut.search(query, k, mask=mask)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.scores.tolist() == expected.scores.tolist()


def test_sharded_comparison_notices_a_wrong_row(random_vectors: Callable[..., Floats]) -> None:
    """The control of the twin tests: one row swapped for a far one, or one score off, does not pass."""
    vectors = random_vectors(20)
    every = ExactIndex(vectors).search(vectors[3], 20)
    best = Hits(every.scores[:5], every.rows[:5])
    wrong_rows, wrong_scores = best.rows.copy(), best.scores.copy()
    wrong_rows[4] = every.rows[19]
    wrong_scores[1] += 1e-4
    assert_same(sharded(vectors, [8]).search(vectors[3], 5), best, every)
    for wrong in (Hits(best.scores, wrong_rows), Hits(wrong_scores, best.rows)):
        with pytest.raises(AssertionError):
            assert_same(wrong, best, every)


def test_sharded_load_gives_the_rows_of_the_build(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    index = ShardedIndex.load(folder)
    twin = ExactIndex(random_vectors(20))
    assert (index.dim, len(index)) == (DIM, 20)
    for vector in random_vectors(5, seed=1):
        every = twin.search(vector, 20)
        assert_same(index.search(vector, 20), every, every)


def test_sharded_scores_are_cosines_of_vectors_of_any_length(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    index = ShardedIndex.load(folder)
    hits = index.search(random_vectors(20)[17] * 1000.0, 1)
    assert hits.rows.tolist() == [17]
    np.testing.assert_allclose(hits.scores, [1.0], atol=1e-3)


def test_sharded_without_shards_answers_nothing() -> None:
    index = ShardedIndex([], DIM)
    query = np.ones(DIM, np.float32)
    assert len(index.search(query, 3)) == 0
    assert len(index.search(query, 3, mask=np.zeros(0, np.uint8))) == 0
    assert [len(hits) for hits in index.search_many(np.stack([query, query]), 3)] == [0, 0]


def test_sharded_threads_do_not_change_the_answer(
    random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(100)
    alone = sharded(vectors, [16, 32, 64])
    monkeypatch.setattr(index.sharded, "FAN_OUT_BYTES", 1)
    shared = sharded(vectors, [16, 32, 64], threads=3)
    assert len(alone._groups) == 1 and len(shared._groups) == 3
    queries = random_vectors(32, seed=1)
    expected = [alone.search(query, 7).rows.tolist() for query in queries]
    scans: list[int] = []
    scan = Shard.search

    def counted(shard: Shard, query: Floats, k: int, selector: Selector | None = None) -> Hits:
        scans.append(shard.rows)
        return scan(shard, query, k, selector)

    monkeypatch.setattr(Shard, "search", counted)
    with ThreadPoolExecutor(8) as callers:  # more callers than threads, so that work is taken back too
        found = list(callers.map(lambda query: shared.search(query, 7), queries))
    assert [hits.rows.tolist() for hits in found] == expected
    assert sorted(scans) == sorted([16, 16, 32, 36] * len(queries))  # every shard once for every query
    assert [hits.rows.tolist() for hits in shared.search_many(queries, 7)] == expected


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "writable"])
def test_sharded_remembered_masks_are_kept_alive(random_vectors: Callable[..., Floats], frozen: bool) -> None:
    """A mask known by its identity must live on, or the next mask could take its address and its answers."""
    vectors = random_vectors(16)
    index = sharded(vectors, [8])
    for row in (3, 12):
        mask = np.packbits(np.arange(16) == row, bitorder="little")[:]
        mask.flags.writeable = not frozen
        for _ in range(2):
            assert index.search(vectors[0], 3, mask=mask).rows.tolist() == [row]
    alive = weakref.ref(mask)
    del mask
    gc.collect()
    assert (alive() is not None) == frozen
    assert len(index._selectors) == 2 * frozen


def test_sharded_remembers_a_bounded_number_of_masks(random_vectors: Callable[..., Floats]) -> None:
    vectors = random_vectors(16)
    index = sharded(vectors, [8])
    for _ in range(REMEMBERED_MASKS + 5):
        mask = np.full(2, 255, np.uint8)
        mask.flags.writeable = False
        index.search(vectors[0], 3, mask=mask)
    assert len(index._selectors) == REMEMBERED_MASKS


def test_sharded_writable_masks_are_read_afresh(random_vectors: Callable[..., Floats]) -> None:
    vectors = random_vectors(16)
    index = sharded(vectors, [8])
    mask = np.packbits(np.arange(16) == 3, bitorder="little")
    assert index.search(vectors[0], 3, mask=mask).rows.tolist() == [3]
    mask[:] = np.packbits(np.arange(16) == 12, bitorder="little")
    assert index.search(vectors[0], 3, mask=mask).rows.tolist() == [12]
    assert not index._selectors


def test_sharded_load_holds_one_shard_file_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = index.shard.read

    def watched(path: Path, *, rows: int, dim: int) -> NDArray[np.float16]:
        nonlocal most
        vectors = original(path, rows=rows, dim=dim)
        alive.append(weakref.ref(vectors))
        most = max(most, sum(reference() is not None for reference in alive))
        return vectors

    monkeypatch.setattr(index.shard, "read", watched)
    ShardedIndex.load(folder)
    assert (len(alive), most) == (3, 1)
    kept = [watched(folder / "shard-000.f16", rows=8, dim=DIM) for _ in range(2)]
    assert (len(kept), most) == (2, 2)  # the control: two held arrays are noticed


def test_sharded_placement_is_asked_for_each_shard(folder: Path) -> None:
    asked: list[int] = []

    def placement(number: int) -> str:
        asked.append(number)
        return "cpu"

    ShardedIndex.load(folder, placement=placement)
    assert asked == [0, 1, 2]
    with pytest.raises(IndexInvalid, match="found gpu:7"):
        ShardedIndex.load(folder, placement=lambda number: f"gpu:{number + 7}")


# --- malformed folders -------------------------------------------------------------------------------------


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shards(*rows: int) -> list[dict[str, object]]:
    return [{"file": f"shard-{i:03d}.f16", "rows": count} for i, count in enumerate(rows)]


FILES = ["shard-000.f16", "shard-001.f16", "shard-002.f16"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hnsw"}, "index.json kind: found 'hnsw'"),
        ({"dim": 0}, "index.json dim: found 0"),
        ({"dim": "20"}, "index.json dim: found '20'"),
        ({"dim": 40}, "index.json padded: found 32, expected 48"),
        ({"dim": 19}, "shard-000.f16 row 0: found numbers in the padding"),
        ({"padded": 48}, "index.json padded: found 48, expected 32"),
        ({"rows": 21}, "index.json rows: found 21, expected 20"),
        ({"rows": -1}, "index.json rows: found -1"),
        ({"items": -1}, "index.json items: found -1"),
        ({"items": "20"}, "index.json items: found '20'"),
        ({"rows": 28, "shards": shards(8, 8, 12)}, "shard-002.f16: found 256 bytes, expected 768"),
        ({"rows": 12, "shards": shards(8, 4)}, "shard-002.f16: found a shard that index.json does not list"),
        ({"shards": shards(8, 4, 8)}, "shards rows modulo 8"),
        ({"shards": shards(8, 8, 4)[::-1]}, "index.json shards: found"),
        ({"shards": [{"file": FILES[0], "rows": 8}] * 2 + shards(4)}, "index.json shards: found"),
        ({"rows": 16, "shards": shards(8, 8, 0)}, "index.json shards.2.rows: found 0"),
        ({"shards": [{"file": "../x", "rows": 20}]}, "index.json shards: found"),
        ({"personas": ["calm", "calm"]}, "index.json personas: found"),
        ({"personas": [""]}, "index.json personas: found"),
        ({"surfaces": [f"s{i}" for i in range(33)]}, "index.json surfaces: found"),
        ({"surprise": 1}, "index.json surprise: found 1"),
    ],
    ids=[
        *"kind dim-0 dim-text dim-padded dim-narrow padded rows rows-negative items-negative items-text ntotal-lies two-builds".split(),
        *"uneven order overlap empty-shard path persona-twice persona-empty surfaces-33 extra".split(),
    ],
)
def test_sharded_load_refuses(folder: Path, fields: dict[str, object], message: str) -> None:
    rewrite(folder)
    ShardedIndex.load(folder)  # the control: rewritten without a change, it loads
    rewrite(folder, **fields)
    with pytest.raises(IndexInvalid) as refusal:
        ShardedIndex.load(folder)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "field", ["kind", "dim", "padded", "rows", "items", "personas", "surfaces", "shards"]
)
def test_sharded_load_refuses_a_missing_field(folder: Path, field: str) -> None:
    path = folder / "index.json"
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(IndexInvalid, match=f"index.json {field}: found .* expected Field required"):
        ShardedIndex.load(folder)


@pytest.mark.parametrize("missing", [*FILES, "index.json"])
def test_sharded_load_refuses_a_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(IndexInvalid, match=f"{missing}: found no file"):
        ShardedIndex.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\x00", '{"kind": NaN}'],
    ids=["empty", "cut", "list", "null", "nul", "nan"],
)
def test_sharded_load_refuses_what_is_not_its_json(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(IndexInvalid, match="index.json"):
        ShardedIndex.load(folder)


@pytest.mark.parametrize("damage", ["truncated", "trailing", "swapped"])
def test_sharded_load_refuses_a_damaged_shard(folder: Path, damage: str) -> None:
    path = folder / "shard-001.f16"
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[:-1], "trailing": raw + b"\0", "swapped": raw[1:] + raw[:1]}[damage])
    with pytest.raises(IndexInvalid, match=r"shard-001\.f16"):
        ShardedIndex.load(folder)


def test_sharded_load_accepts_an_empty_index_only_when_told(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(IndexInvalid):
        ShardedIndex.load(folder)
    rewrite(folder, rows=0, items=0, shards=[])
    assert len(ShardedIndex.load(folder)) == 0
    assert read_layout(folder).personas == ("calm", "lively")


# --- malformed queries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [DIM - 1, DIM + 1, 32, 0])
def test_sharded_search_refuses_a_wrong_width(folder: Path, width: int) -> None:
    index = ShardedIndex.load(folder)
    with pytest.raises(QueryInvalid, match="expected rows of width 20"):
        index.search(np.ones(width, np.float32), 3)
    with pytest.raises(QueryInvalid, match="expected rows of width 20"):
        index.search_many(np.ones((2, width), np.float32), 3)


def test_sharded_search_refuses_swapped_verbs(folder: Path) -> None:
    index = ShardedIndex.load(folder)
    with pytest.raises(QueryInvalid, match="pass one vector"):
        index.search(np.ones((1, DIM), np.float32), 3)
    with pytest.raises(QueryInvalid, match="remedy: search"):
        index.search_many(np.ones(DIM, np.float32), 3)


def test_sharded_search_refuses_a_mask_of_another_index(folder: Path) -> None:
    index = ShardedIndex.load(folder)
    index.search(np.ones(DIM, np.float32), 3, mask=np.zeros(3, np.uint8))
    with pytest.raises(QueryInvalid, match="expected 3 bytes in a row for 20 rows"):
        index.search(np.ones(DIM, np.float32), 3, mask=np.zeros(2, np.uint8))


GUARDS = """
import sys
import numpy as np
from pathlib import Path
from index.search import QueryInvalid
from index.shard import IndexInvalid
from index.sharded import ShardedIndex

if __debug__:
    sys.exit("not optimised: this proves nothing")
folder = Path(sys.argv[1])
index = ShardedIndex.load(folder)
good = np.ones(20, np.float32)
if len(index.search(good, 3)) != 3:
    sys.exit("the good query failed")
for bad in (good[:16], np.ones(32, np.float32), good * np.nan, good * np.inf, good * 0.0):
    try:
        index.search(bad, 3)
    except QueryInvalid:
        continue
    sys.exit(f"accepted {bad!r}")
try:
    index.search(good, 3, mask=np.zeros(1, np.uint8))
    sys.exit("accepted a short mask")
except QueryInvalid:
    pass
with open(folder / "shard-001.f16", "ab") as file:
    file.write(b"x")
try:
    ShardedIndex.load(folder)
except IndexInvalid:
    sys.exit(0)
sys.exit("accepted a longer shard")
"""


def test_sharded_guards_outlive_python_without_asserts(folder: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-O", "-c", GUARDS, str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
