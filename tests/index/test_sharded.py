"""The served index: equal to the exact twin however it is cut and shared, all or nothing at load, with guards that
outlive `python -O`."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import index.sharded
from index.build import Entry, build
from index.exact import ExactIndex
from index.layout import IndexInvalid
from index.scan import Scan, Selector
from index.search import Hits, QueryInvalid
from index.sharded import REMEMBERED_MASKS, ShardedIndex, merge
from tests.index.matrices import Floats, assert_same, index_of, packed, plain
from tests.index.tampering import seal, set_field

DIM = 20
PAGE_ROWS = 64  # of 20 dims: 4096 bytes, so shards of so many rows are mapped, and of fewer read


# --- against the twin --------------------------------------------------------------------------------------

WORLDS, SEARCHES = 100, 40  # 4,000 searches, each of them also within a batch
DIMS = (1, 3, 16, 20)


class World:
    """Rows with many exact ties, an index of them cut somehow, and the twin."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        rows, dim = int(rng.integers(0, 41)), int(rng.choice(DIMS))
        directions = rng.integers(-3, 4, (int(rng.integers(1, 13)), dim)).astype(np.float32)
        directions[~directions.any(axis=1), 0] = 1.0
        lengths = rng.uniform(0.1, 9.0, (rows, 1)).astype(np.float32)
        vectors = directions[rng.integers(0, len(directions), rows)] * lengths
        self.dim, self.twin = dim, ExactIndex(vectors)
        cuts = [cut for cut in (8, 16, 24, 32) if cut < rows and rng.random() < 0.5]
        threads = int(rng.integers(1, 4))
        self.index = index_of(vectors, cuts=cuts, threads=threads)
        self.others = [index_of(vectors), index_of(vectors, cuts=None, threads=3)]

    def mask(self) -> NDArray[np.uint8] | None:
        kind = self.rng.integers(0, 6)
        if kind == 0:
            return None
        mask = packed(self.rng.random(len(self.twin)) < (0.0, 1.0, 0.4, 0.4, 0.05)[kind - 1])
        if kind == 3 and len(mask):
            mask[-1] |= 0xFF << ((len(self.twin) - 1) % 8 + 1) & 0xFF  # bits of rows that there are not
        return mask


@pytest.mark.parametrize("fan_out", [False, True], ids=["small", "as if large"])
@pytest.mark.parametrize("seed", range(0, WORLDS, 2))
def test_sharded_equals_the_exact_twin(seed: int, fan_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large indexes share one query among threads, and pass a whole batch over a block of rows at a time."""
    if fan_out:
        monkeypatch.setattr(index.sharded, "FAN_OUT_BYTES", 1)
        monkeypatch.setattr(index.sharded, "BLOCK_BYTES", 512)
        monkeypatch.setattr(index.sharded, "BATCH", 3)
    world = World(seed + fan_out)
    rng, rows = world.rng, len(world.twin)
    for _ in range(SEARCHES // 4):
        queries = rng.standard_normal((4, world.dim)).astype(np.float32)
        k, mask = int(rng.choice([1, 2, 5, 13, 50])), world.mask()
        many = world.index.search_many(queries, k, mask=mask)
        for query, from_many in zip(queries, many, strict=True):
            found = world.index.search(query, k, mask=mask)
            every = world.twin.search(query, max(1, rows), mask=mask)
            assert_same(found, Hits(every.scores[:k], every.rows[:k]), every)
            # Equal vectors have equal scores to the last bit, wherever they lie: descending, then ascending by row.
            assert np.lexsort((found.rows, -found.scores)).tolist() == list(range(len(found)))
            assert plain(from_many) == plain(found)
            for other in world.others:
                assert plain(other.search(query, k, mask=mask)) == plain(found)


def test_sharded_twin_test_reaches_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: batches go block by block, ties are cut and searched on, and queries are shared among threads."""
    seen: set[str] = set()
    scan, share, single = ShardedIndex._scan_batch, ShardedIndex._share, ShardedIndex._search

    def scan_batch(self: ShardedIndex, *arguments: Any) -> list[Hits]:
        seen.add("batch")
        monkeypatch.setattr(ShardedIndex, "_search", searched)
        try:
            return scan(self, *arguments)
        finally:
            monkeypatch.setattr(ShardedIndex, "_search", single)

    def searched(self: ShardedIndex, *arguments: Any, **options: Any) -> Hits:
        seen.add("tie cut in a batch")
        return single(self, *arguments, **options)

    def shared(self: ShardedIndex, tasks: Any, nbytes: int | None = None) -> Any:
        if nbytes is not None and len(tasks) > 1 and self._threads > 1:
            seen.add("shared")
        return share(self, tasks, nbytes)

    monkeypatch.setattr(ShardedIndex, "_scan_batch", scan_batch)
    monkeypatch.setattr(ShardedIndex, "_share", shared)
    for seed in range(0, 10, 2):
        test_sharded_equals_the_exact_twin(seed, True, monkeypatch)
    assert seen == {"batch", "tie cut in a batch", "shared"}


def test_sharded_comparison_notices_a_wrong_row(random_vectors: Callable[..., Floats]) -> None:
    """The control of the twin tests: one row swapped for a far one, or one score off, does not pass."""
    vectors = random_vectors(20)
    every = ExactIndex(vectors).search(vectors[3], 20)
    best = Hits(every.scores[:5], every.rows[:5])
    wrong_rows, wrong_scores = best.rows.copy(), best.scores.copy()
    wrong_rows[4] = every.rows[19]
    wrong_scores[1] += 1e-4
    assert_same(index_of(vectors, cuts=[8]).search(vectors[3], 5), best, every)
    for wrong in (Hits(best.scores, wrong_rows), Hits(wrong_scores, best.rows)):
        with pytest.raises(AssertionError):
            assert_same(wrong, best, every)


@pytest.mark.parametrize("shard_rows", [8, 24, PAGE_ROWS, 2 * PAGE_ROWS, 65536])
@pytest.mark.parametrize("rows", [1, 8, 65, 129])
def test_sharded_load_answers_as_built_in_shards_of_any_size(
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
    rows: int,
    shard_rows: int,
) -> None:
    """Down to one row in the last shard; of whole pages, which are mapped, or not, which are read."""
    vectors = random_vectors(rows)
    build(plain_entries(rows), vectors, tmp_path / "i", personas=(), surfaces=(), shard_rows=shard_rows)
    loaded, made = ShardedIndex.load(tmp_path / "i", threads=1), index_of(vectors)
    assert (loaded.dim, len(loaded)) == (DIM, rows)
    np.testing.assert_array_equal(loaded.rows, made.rows)
    for query in random_vectors(5, seed=1):
        mask = packed(np.arange(rows) % 3 < 2)
        assert plain(loaded.search(query, 9)) == plain(made.search(query, 9))
        assert plain(loaded.search(query, 9, mask=mask)) == plain(made.search(query, 9, mask=mask))


def test_sharded_scores_are_cosines_of_vectors_of_any_length(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    hits = ShardedIndex.load(folder).search(random_vectors(20)[17] * 1000.0, 1)
    assert hits.rows.tolist() == [17]
    np.testing.assert_allclose(hits.scores, [1.0], atol=1e-3)


def test_sharded_of_no_rows_answers_nothing() -> None:
    nothing = index_of(np.empty((0, DIM), np.float32))
    query = np.ones(DIM, np.float32)
    assert len(nothing.search(query, 3)) == 0
    assert len(nothing.search(query, 3, mask=np.zeros(0, np.uint8))) == 0
    assert [len(hits) for hits in nothing.search_many(np.stack([query, query]), 3)] == [0, 0]
    assert nothing.search_many(np.empty((0, DIM), np.float32), 3) == []


def test_sharded_merge_of_parts_is_the_best_of_all() -> None:
    parts = [
        Hits(np.array([0.9, 0.5], np.float32), np.array([4, 2])),
        Hits(np.array([0.9, 0.5, 0.1], np.float32), np.array([3, 1, 0])),
    ]
    assert merge(parts, 4).rows.tolist() == [3, 4, 1, 2]
    assert merge(parts[:1], 4) is parts[0]
    assert len(merge([], 4)) == 0


# --- threads and masks -------------------------------------------------------------------------------------


def test_sharded_threads_do_not_change_the_answer(
    random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(100)
    alone = index_of(vectors, cuts=[16, 32, 64])
    monkeypatch.setattr(index.sharded, "FAN_OUT_BYTES", 1)
    shared = index_of(vectors, cuts=[16, 32, 64], threads=3)
    queries = random_vectors(32, seed=1)
    expected = [plain(alone.search(query, 7)) for query in queries]
    scans: list[int] = []
    scan = Scan.search

    def counted(self: Scan, query: Floats, k: int, selector: Selector | None = None) -> Hits:
        scans.append(self.rows)
        return scan(self, query, k, selector)

    monkeypatch.setattr(Scan, "search", counted)
    with ThreadPoolExecutor(8) as callers:  # more callers than threads, so that work is taken back too
        found = list(callers.map(lambda query: shared.search(query, 7), queries))
    assert [plain(hits) for hits in found] == expected
    assert sorted(scans) == sorted([16, 16, 32, 36] * len(queries))  # every part once for every query
    assert [plain(hits) for hits in shared.search_many(queries, 7)] == expected


def test_sharded_is_parted_evenly_among_threads_where_it_is_large(
    random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(100)
    assert [scan.rows for scan in index_of(vectors, cuts=None, threads=3)._scans] == [100]
    monkeypatch.setattr(index.sharded, "FAN_OUT_BYTES", 1)
    parted = index_of(vectors, cuts=None, threads=3)
    assert [(scan.first, scan.rows) for scan in parted._scans] == [(0, 32), (32, 32), (64, 36)]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "writable"])
def test_sharded_remembered_masks_are_kept_alive(random_vectors: Callable[..., Floats], frozen: bool) -> None:
    """A mask known by its identity must live on, or the next mask could take its address and its answers."""
    vectors = random_vectors(16)
    some = index_of(vectors, cuts=[8])
    for row in (3, 12):
        mask = packed(np.arange(16) == row)[:]
        mask.flags.writeable = not frozen
        for _ in range(2):
            assert some.search(vectors[0], 3, mask=mask).rows.tolist() == [row]
    alive = weakref.ref(mask)
    del mask
    gc.collect()
    assert (alive() is not None) == frozen
    assert len(some._remembered) == 2 * frozen


def test_sharded_remembers_a_bounded_number_of_masks(random_vectors: Callable[..., Floats]) -> None:
    vectors = random_vectors(16)
    some = index_of(vectors, cuts=[8])
    for _ in range(REMEMBERED_MASKS + 5):
        mask = np.full(2, 255, np.uint8)
        mask.flags.writeable = False
        some.search(vectors[0], 3, mask=mask)
    assert len(some._remembered) == REMEMBERED_MASKS


def test_sharded_writable_masks_are_read_afresh(random_vectors: Callable[..., Floats]) -> None:
    vectors = random_vectors(16)
    some = index_of(vectors, cuts=[8])
    mask = packed(np.arange(16) == 3)
    assert some.search(vectors[0], 3, mask=mask).rows.tolist() == [3]
    mask[:] = packed(np.arange(16) == 12)
    assert some.search(vectors[0], 3, mask=mask).rows.tolist() == [12]
    assert not some._remembered


def test_sharded_memory_is_the_matrix_and_ends_with_it(
    folder: Path, random_vectors: Callable[..., Floats]
) -> None:
    """Scans hold no copy; and what an index mapped is let go with the last array of it."""
    some = ShardedIndex.load(folder)
    some.search_many(random_vectors(3), 2, mask=np.full(3, 255, np.uint8))
    assert all(np.shares_memory(scan._rows, some.rows) for scan in some._scans)
    rows = weakref.ref(some.rows)
    del some
    gc.collect()
    assert rows() is None


# --- malformed folders -------------------------------------------------------------------------------------

FILES = ["shard-000.f16", "shard-001.f16", "shard-002.f16"]


@pytest.mark.parametrize("missing", [*FILES, "index.json"])
def test_sharded_load_refuses_a_missing_file(folder: Path, missing: str) -> None:
    ShardedIndex.load(folder)  # the control
    (folder / missing).unlink()
    with pytest.raises(IndexInvalid, match=f"{missing}: found no file"):
        ShardedIndex.load(folder)


@pytest.mark.parametrize("damage", ["truncated", "trailing", "turned"])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as pulled"])
def test_sharded_load_refuses_a_damaged_shard(folder: Path, damage: str, sealed: bool) -> None:
    path = folder / "shard-001.f16"
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[:-1], "trailing": raw + b"\0", "turned": raw[1:] + raw[:1]}[damage])
    if sealed:
        seal(folder)
    with pytest.raises(IndexInvalid, match=r"shard-001\.f16"):
        ShardedIndex.load(folder)


def test_sharded_load_refuses_the_shard_of_another_build(
    folder: Path,
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> None:
    """It has the size, the width and the lengths: only its digest tells."""
    build(
        plain_entries(20), random_vectors(20, seed=1), tmp_path / "o", personas=(), surfaces=(), shard_rows=8
    )
    shutil.copy(tmp_path / "o" / FILES[1], folder)
    with pytest.raises(IndexInvalid, match=r"shard-001\.f16: found sha256"):
        ShardedIndex.load(folder)
    seal(folder)
    ShardedIndex.load(folder)  # the control: nothing else would have


def test_sharded_load_refuses_another_width_of_the_same_size(folder: Path) -> None:
    set_field(folder, "dim", 19)
    with pytest.raises(IndexInvalid, match="shard-000.f16 row 0: found numbers in the padding"):
        ShardedIndex.load(folder)


@pytest.mark.parametrize("placement", ["moon", "", "gpu:", "gpu:-1", "gpu:x", "gpu0", "GPU"])
def test_sharded_load_refuses_an_unknown_placement(folder: Path, placement: str) -> None:
    ShardedIndex.load(folder, placement="cpu")  # the control
    with pytest.raises(ValueError, match="expected cpu, gpu or gpu:N"):
        ShardedIndex.load(folder, placement=placement)


# --- malformed queries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [DIM - 1, DIM + 1, 32, 0])
def test_sharded_search_refuses_a_wrong_width(folder: Path, width: int) -> None:
    some = ShardedIndex.load(folder)
    with pytest.raises(QueryInvalid, match="expected rows of width 20"):
        some.search(np.ones(width, np.float32), 3)
    with pytest.raises(QueryInvalid, match="expected rows of width 20"):
        some.search_many(np.ones((2, width), np.float32), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_sharded_search_refuses_what_has_no_direction(folder: Path, value: float) -> None:
    some, query = ShardedIndex.load(folder), np.ones(DIM, np.float32)
    with pytest.raises(QueryInvalid, match="row 0: found"):
        some.search(query * np.float32(value), 3)
    with pytest.raises(QueryInvalid, match="found"):
        some.search_many(np.stack([query, query * np.float32(value)]), 3)


def test_sharded_search_refuses_swapped_verbs(folder: Path) -> None:
    some = ShardedIndex.load(folder)
    with pytest.raises(QueryInvalid, match="pass one vector"):
        some.search(np.ones((1, DIM), np.float32), 3)
    with pytest.raises(QueryInvalid, match="remedy: search"):
        some.search_many(np.ones(DIM, np.float32), 3)


def test_sharded_search_refuses_a_mask_of_another_index(folder: Path) -> None:
    some, query = ShardedIndex.load(folder), np.ones(DIM, np.float32)
    some.search(query, 3, mask=np.zeros(3, np.uint8))
    for ask in (some.search, lambda *arguments, **options: some.search_many(query[None], 3, **options)):
        with pytest.raises(QueryInvalid, match="expected 3 bytes in a row for 20 rows"):
            ask(query, 3, mask=np.zeros(2, np.uint8))


@pytest.mark.parametrize("k", [0, -1])
def test_sharded_search_refuses_k_below_one(folder: Path, k: int) -> None:
    some, query = ShardedIndex.load(folder), np.ones(DIM, np.float32)
    with pytest.raises(QueryInvalid, match=f"found {k}, expected at least 1"):
        some.search(query, k)
    with pytest.raises(QueryInvalid, match=f"found {k}, expected at least 1"):
        some.search_many(query[None], k)


def test_sharded_k_beyond_all_rows_costs_no_more_than_them(folder: Path) -> None:
    assert len(ShardedIndex.load(folder).search(np.ones(DIM, np.float32), 1 << 60)) == 20


# --- without asserts ---------------------------------------------------------------------------------------

GUARDS = """
import sys
import numpy as np
from index.search import QueryInvalid
from index.sharded import ShardedIndex
from pathlib import Path

if __debug__:
    sys.exit("not optimised: this proves nothing")
index = ShardedIndex.load(Path(sys.argv[1]))
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
except QueryInvalid:
    sys.exit(0)
sys.exit("accepted a short mask")
"""


def test_sharded_guards_outlive_python_without_asserts(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-c", GUARDS, str(folder)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
