"""A walk finds what a scan finds where it looks everywhere, gives way to one where it comes back short, and never
follows a link that leads out of the graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import Entry, build
from index.change import extend, remove
from index.exact import ExactIndex
from index.graph import EF_SEARCH, LEVELS_FILE, LINKS_FILE, MAX_LEVEL, Graph, build_graph
from index.layout import GraphFiles, IndexInvalid, read_layout
from index.matrix import Matrix
from index.replies import Replies
from index.search import Hits
from index.sharded import WALK_SHARE, ShardedIndex
from tests.index.matrices import Floats, assert_same, index_of, packed, plain, query_of, stored
from tests.index.tampering import change_array, read_fields, seal, set_field

DIM, ROWS = 20, 60
NAMES: dict[str, Any] = {"personas": (), "surfaces": ()}


@pytest.fixture
def walked(
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> Path:
    """An index of 60 rows with a graph."""
    out = tmp_path / "walked"
    build(plain_entries(ROWS), random_vectors(ROWS), out, kind="hnsw", shard_rows=16, **NAMES)
    return out


def graph_index(
    folder: Path, vectors: Floats, *, rows: int | None = None, threads: int = 1, **options: Any
) -> ShardedIndex:
    """An index in memory with a graph over its first `rows`."""
    matrix = Matrix(stored(vectors))
    files = build_graph(matrix.array[:rows], folder, **options)
    graph = Graph.load(folder, files, matrix)
    return ShardedIndex(matrix, vectors.shape[1], graph=graph, threads=threads)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each search did: "walk", "short" for a walk given up, "scan" for a scan of everything."""
    seen: list[str] = []
    walk, search = ShardedIndex._walk, Graph.search

    def watched(self: ShardedIndex, *arguments: Any) -> Hits | None:
        found = walk(self, *arguments)
        if found is None:
            seen.append("short")
        return found

    def counted(self: Graph, *arguments: Any) -> Hits:
        seen.append("walk")
        return search(self, *arguments)

    monkeypatch.setattr(ShardedIndex, "_walk", watched)
    monkeypatch.setattr(Graph, "search", counted)
    return seen


# --- against the twin --------------------------------------------------------------------------------------

WORLDS, SEARCHES = 50, 20  # 1,000 searches, each of them also within a batch


@pytest.mark.parametrize("seed", range(WORLDS))
def test_graph_equals_the_exact_twin_where_it_looks_at_every_row(tmp_path: Path, seed: int) -> None:
    """`ef` is not below the rows; a part of them may have been added after the graph was made."""
    rng = np.random.default_rng(seed)
    rows, dim = int(rng.integers(1, 81)), int(rng.choice([3, 16, 20]))
    linked = rows if rng.random() < 0.5 else int(rng.integers(1, rows + 1))
    vectors = rng.standard_normal((rows, dim)).astype(np.float32)
    threads = int(rng.integers(1, 4))
    walked = graph_index(
        tmp_path, vectors, rows=linked, m=int(rng.choice([8, 16, 32])), ef_search=80, threads=threads
    )
    twin, scanned = ExactIndex(vectors), index_of(vectors)
    for _ in range(SEARCHES // 4):
        queries = rng.standard_normal((4, dim)).astype(np.float32)
        k = int(rng.choice([1, 2, 5, 13, 100]))
        mask = None if rng.random() < 0.3 else packed(rng.random(rows) < rng.choice([0.02, 0.3, 0.9, 1.0]))
        for query, many in zip(queries, walked.search_many(queries, k, mask=mask), strict=True):
            every = twin.search(query, rows, mask=mask)
            found = walked.search(query, k, mask=mask)
            assert_same(found, Hits(every.scores[:k], every.rows[:k]), every)
            assert plain(many) == plain(found)
            assert found.rows.tolist() == scanned.search(query, k, mask=mask).rows.tolist()


def test_graph_of_equal_rows_gives_those_it_finds_in_order(tmp_path: Path) -> None:
    """Such rows are never built, and which of them a walk cuts off is its own affair."""
    vectors = np.repeat(np.eye(3, DIM, dtype=np.float32), 10, axis=0)
    walked = graph_index(tmp_path, vectors, ef_search=64)
    found = walked.search(np.array([1.0, 0.5] + [0.0] * 18, np.float32), 15)
    assert found.rows[:10].tolist() == list(range(10))
    assert found.rows[10:].tolist() == sorted(found.rows[10:]) and set(found.rows[10:]) < set(range(10, 20))


# --- when it walks -----------------------------------------------------------------------------------------


def test_graph_walks_where_much_is_allowed_and_scans_where_little_is(
    walked: Path, random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    some, seen = ShardedIndex.load(walked), watch(monkeypatch)
    query = random_vectors(1, seed=1)[0]
    for allowed, did in [
        (ROWS, ["walk"]),
        (int(ROWS * WALK_SHARE), ["walk"]),
        (int(ROWS * WALK_SHARE) - 1, []),
    ]:
        seen.clear()
        mask = packed(np.arange(ROWS) < allowed)
        assert len(some.search(query, 3, mask=mask)) == 3
        assert seen == did, allowed
    seen.clear()
    some.search(query, 3)
    assert seen == ["walk"]


@pytest.mark.parametrize("masked", [True, False])
def test_graph_scans_where_a_walk_comes_back_short(
    tmp_path: Path, random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """All links of the entry point are cut, so a walk ends where it began."""
    vectors = random_vectors(ROWS)
    matrix = Matrix(stored(vectors))
    files = build_graph(matrix.array, tmp_path)
    change_array(tmp_path / LINKS_FILE, "<i4", lambda links: np.full_like(links, -1))
    levels = np.fromfile(tmp_path / LEVELS_FILE, np.uint8)
    links = np.fromfile(tmp_path / LINKS_FILE, "<i4")
    lost = ShardedIndex(matrix, DIM, graph=Graph(matrix.array, levels, links, files))
    seen = watch(monkeypatch)
    mask = packed(np.arange(ROWS) % 2 == 0) if masked else None
    found = lost.search(vectors[3], 5, mask=mask)
    assert plain(found) == plain(index_of(vectors).search(vectors[3], 5, mask=mask))
    assert seen == ["walk", "short"]


def test_graph_walk_is_wider_the_less_is_allowed(
    walked: Path, random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    some, widths = ShardedIndex.load(walked), []
    search = Graph.search

    def watched(self: Graph, query: Floats, k: int, selector: Any, ef: int) -> Hits:
        widths.append(ef)
        return search(self, query, k, selector, ef)

    monkeypatch.setattr(Graph, "search", watched)
    for step in (1, 2, 5):
        some.search(random_vectors(1)[0], 3, mask=packed(np.arange(ROWS) % step == 0))
    some.search(random_vectors(1)[0], ROWS)
    assert widths == [EF_SEARCH, round(EF_SEARCH * 2**0.5), round(EF_SEARCH * 5**0.5), EF_SEARCH]


def test_graph_finds_rows_that_were_added_later_and_none_that_were_removed(
    walked: Path, random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 rows were linked, so the last four of them share a byte of a mask with the first that were not."""
    from datetime import UTC, datetime

    added = random_vectors(9, seed=5)
    extend(walked, walked, [([Entry(f"n{i}", "New.", "p") for i in range(9)], added, None)])
    remove(walked, walked, ["n3", "r7"])
    layout = read_layout(walked)
    assert layout.graph is not None and (layout.graph.rows, layout.rows) == (60, 69)
    replies, seen = Replies.load(walked), watch(monkeypatch)
    asked: dict[str, Any] = {"persona": None, "surface": None, "as_of": datetime(2026, 1, 1, tzinfo=UTC)}
    old = random_vectors(ROWS)
    names = {f"n{i}": added[i] for i in range(9)} | {f"r{i}": old[i] for i in range(ROWS)}
    for name, vector in names.items():
        found = [hit.item.id for hit in replies.search(vector, 5, **asked)]
        if name in ("n3", "r7"):
            assert name not in found
        else:
            assert found[0] == name
        assert len(set(found)) == 5
    assert set(seen) == {"walk"} and len(seen) >= len(names)
    every = [hit.item.id for hit in replies.search(old[0], 100, **asked)]
    assert sorted(every) == sorted({*names} - {"n3", "r7"})


def test_graph_recalls_nearly_everything_at_its_ordinary_width(tmp_path: Path) -> None:
    """3,000 rows, of which a walk sees a few hundred; the control is a walk as narrow as it goes."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 32)).astype(np.float32)
    queries = rng.standard_normal((100, 32)).astype(np.float32)
    twin, recalls = index_of(vectors), []
    for ef in (64, 1):
        (tmp_path / str(ef)).mkdir()
        walked = graph_index(
            tmp_path / str(ef), vectors, m=16 if ef > 1 else 2, ef_construction=64, ef_search=ef
        )
        found = [set(walked.search(query, 5).rows.tolist()) for query in queries]
        best = [set(twin.search(query, 5).rows.tolist()) for query in queries]
        recalls.append(sum(len(a & b) for a, b in zip(found, best, strict=True)) / 500)
    assert recalls[0] > 0.95 > 0.8 > recalls[1]


# --- on disk and in memory ---------------------------------------------------------------------------------


def test_graph_of_the_same_rows_is_the_same_bytes(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    made = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        (tmp_path / name).mkdir()
        made.append(build_graph(stored(random_vectors(200, seed=seed)), tmp_path / name))
    assert made[0] == made[1] != made[2]


def test_graph_build_counts_its_rows(
    tmp_path: Path, random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.graph.ADD_ROWS", 25)
    steps: list[tuple[int, int]] = []
    build_graph(stored(random_vectors(60)), tmp_path, progress=lambda *step: steps.append(step))
    assert steps == [(25, 60), (50, 60), (60, 60)]


def test_graph_looks_at_mapped_files_and_lets_them_go(walked: Path) -> None:
    some = ShardedIndex.load(walked, pages="shared")
    mapped = Path("/proc/self/maps").read_text()
    assert str(walked / LEVELS_FILE) in mapped and str(walked / LINKS_FILE) in mapped
    (walked / LINKS_FILE).unlink()
    assert len(some.search(np.ones(DIM, np.float32), 3)) == 3
    del some
    gc.collect()
    assert str(walked) not in Path("/proc/self/maps").read_text()


# --- what is refused ---------------------------------------------------------------------------------------


def links_at(levels: NDArray[np.uint8], m: int, level: int) -> list[int]:
    """The first place of each vector's links on this level, of those that stand so high."""
    first, places = 0, []
    for high in levels.tolist():
        if high >= level:
            places.append(first + (2 * m + (level - 1) * m if level else 0))
        first += 2 * m + high * m
    return places


def tall(folder: Path) -> GraphFiles:
    """The graph of a folder, made anew with so few neighbours that many vectors stand high."""
    layout = read_layout(folder)
    files = build_graph(Matrix.load(folder, layout.shards, layout.dim).array, folder, m=2)
    set_field(folder, "graph", files.model_dump())
    return files


@pytest.mark.parametrize(
    ("place", "link", "message"),
    [
        ("ground", ROWS, "graph-links.i32 0: found 60, expected -1 or a vector below 60"),
        ("ground", 2**31 - 1, "graph-links.i32 0: found 2147483647"),
        ("ground", -2, "graph-links.i32 0: found -2"),
        ("ground", -(2**31), "graph-links.i32 0: found -2147483648"),
        ("last", ROWS, "found 60, expected -1 or a vector below 60"),
        ("above", "low", "a neighbour below level 1, expected none"),
    ],
)  # fmt: skip
def test_graph_load_refuses_a_link_that_leads_nowhere(
    walked: Path, place: str, link: Any, message: str
) -> None:
    files = tall(walked)
    ShardedIndex.load(walked)  # the control
    levels = np.fromfile(walked / LEVELS_FILE, np.uint8)
    where = {"ground": 0, "last": -1, "above": links_at(levels, files.m, 1)[-1]}[place]
    value = int(np.argmin(levels)) if link == "low" else link

    def harm(links: NDArray[np.int32]) -> None:
        links[where] = value

    change_array(walked / LINKS_FILE, "<i4", harm)
    with pytest.raises(IndexInvalid, match="graph-links.i32: found sha256"):
        ShardedIndex.load(walked)
    seal(walked)
    with pytest.raises(IndexInvalid, match=message):
        ShardedIndex.load(walked)


def test_graph_load_takes_links_anywhere_on_their_level(walked: Path) -> None:
    """The control of the above: other links to vectors that stand high enough are no harm, and are walked."""
    tall(walked)
    levels = np.fromfile(walked / LEVELS_FILE, np.uint8)

    def shuffle(links: NDArray[np.int32]) -> None:
        links[links >= 0] = int(np.argmax(levels))

    change_array(walked / LINKS_FILE, "<i4", shuffle)
    seal(walked)
    assert len(ShardedIndex.load(walked).search(np.ones(DIM, np.float32), 5)) == 5


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (255, f"graph-levels.u8: found level 255, expected at most {MAX_LEVEL}"),
        (MAX_LEVEL + 1, "graph-levels.u8: found level 31"),
        (MAX_LEVEL, "graph-levels.u8: found level 30, expected as few as one vector in m a level makes"),
        (1, r"graph-links.i32: found \d+ bytes, expected \d+ bytes"),
    ],
)  # fmt: skip
def test_graph_load_refuses_levels_too_high(walked: Path, level: int, message: str) -> None:
    """The links are lengthened to fit, all but in the last case: it is the level itself that is refused."""
    fields = read_fields(walked)["graph"]
    high = int(np.fromfile(walked / LEVELS_FILE, np.uint8)[5])

    def raise_one(levels: NDArray[np.uint8]) -> None:
        levels[5] = high + level if level == 1 else level

    change_array(walked / LEVELS_FILE, "u1", raise_one)
    if level != 1:
        more = (level - high) * fields["m"]
        change_array(walked / LINKS_FILE, "<i4", lambda links: np.concatenate([links, np.full(more, -1)]))
        set_field(walked, "graph.entry_point", 5)
    seal(walked)
    with pytest.raises(IndexInvalid, match=message):
        ShardedIndex.load(walked)


def test_graph_load_refuses_an_entry_point_that_is_not_the_highest(walked: Path) -> None:
    files = tall(walked)
    levels = np.fromfile(walked / LEVELS_FILE, np.uint8)
    others = np.flatnonzero(levels == levels.max())
    for entry_point in others.tolist():
        set_field(walked, "graph.entry_point", entry_point)
        ShardedIndex.load(walked)  # the control: any of the highest will do
    set_field(walked, "graph.entry_point", int(np.argmin(levels)))
    with pytest.raises(
        IndexInvalid,
        match=f"graph entry_point: found a vector of level 0, expected one of level {levels.max()}",
    ):
        ShardedIndex.load(walked)
    assert files.entry_point in others


@pytest.mark.parametrize("name", [LEVELS_FILE, LINKS_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "empty", "other"])
def test_graph_load_refuses_damaged_files(walked: Path, name: str, damage: str) -> None:
    path = walked / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        other = bytes(byte ^ 1 for byte in raw)
        path.write_bytes(
            {"truncated": raw[:-4], "longer": raw + b"\0" * 4, "empty": b"", "other": other}[damage]
        )
    with pytest.raises(IndexInvalid) as refusal:
        ShardedIndex.load(walked)
    assert refusal.value.part == name


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("m", 16, LINKS_FILE),
        ("m", 33, LINKS_FILE),
        ("rows", 59, LEVELS_FILE),
        ("levels_sha256", "ab" * 32, LEVELS_FILE),
    ],
)
def test_graph_load_refuses_facts_of_another_graph(
    walked: Path, field: str, value: object, part: str
) -> None:
    set_field(walked, f"graph.{field}", value)
    set_field(walked, "graph.entry_point", 0)
    with pytest.raises(IndexInvalid) as refusal:
        ShardedIndex.load(walked)
    assert refusal.value.part == part


def test_graph_load_refuses_the_graph_of_another_build(
    walked: Path,
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> None:
    """As many rows and levels drawn the same way, so all sizes fit: only the digest tells."""
    other = tmp_path / "other"
    build(plain_entries(ROWS), random_vectors(ROWS, seed=1), other, kind="hnsw", shard_rows=16, **NAMES)
    assert (other / LINKS_FILE).stat().st_size == (walked / LINKS_FILE).stat().st_size
    (other / LINKS_FILE).replace(walked / LINKS_FILE)
    with pytest.raises(IndexInvalid, match="graph-links.i32: found sha256"):
        ShardedIndex.load(walked)


def test_graph_search_by_itself_takes_no_more_than_it_has(
    walked: Path, random_vectors: Callable[..., Floats]
) -> None:
    layout = read_layout(walked)
    assert layout.graph is not None
    graph = Graph.load(walked, layout.graph, Matrix.load(walked, layout.shards, DIM))
    query = query_of(random_vectors(1)[0])
    assert len(graph.search(query, 1000, None, 1000)) == ROWS
