"""benchmarks.stores: figures worked out by hand, filtered truth against a sort of everything, and the peers themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import stores
from benchmarks.stores import DIM, PEERS, SHARES, TOP, best, masks, recall, run, timed

ROWS, QUERIES = 500, 16
MODULES = {"faiss-plain": "faiss", "hnswlib": "hnswlib", "usearch": "usearch", "milvus-lite": "milvus_lite"}


def units(rows: int, seed: int) -> NDArray[np.float16]:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM))
    halves: NDArray[np.float16] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(
        np.float16
    )
    return halves


def sorted_best(
    rows: NDArray[np.float16], queries: NDArray[np.float16], bits: NDArray[np.bool_]
) -> NDArray[np.int64]:
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    return np.argsort(np.where(bits, -scores, np.inf), axis=1)[:, :TOP]


def write(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    rows, queries = units(ROWS, seed), units(QUERIES, seed + 1)
    rows.tofile(folder / "rows.f16")
    queries.tofile(folder / "queries.f16")
    sorted_best(rows, queries, np.ones(ROWS, np.bool_)).astype("<i8").tofile(folder / "truth.i64")
    return folder


def python_with(peer: str) -> Path:
    """An interpreter that has the peer: this one, or that of the stores' environment."""
    if find_spec(MODULES[peer]) and (peer != "milvus-lite" or find_spec("threadpoolctl")):
        return Path(sys.executable)
    there = stores.ENVIRONMENT / "bin" / "python"
    if not there.exists():
        pytest.skip(f"{peer} is not installed; python -m benchmarks.stores --make installs it")
    return there


@pytest.fixture(scope="module", params=PEERS)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A peer's figures, and where it was built."""
    folder = tmp_path_factory.mktemp("stores")
    python = python_with(request.param)
    figures = run(request.param, write(folder / "in", 1), built=folder / "built", python=python)
    assert "error" not in figures, figures
    yield figures, folder / "built" / f"{request.param}-{ROWS}-{stores.EF_CONSTRUCTION}"


def test_stores_recall_counts_true_rows_wherever_they_stand_and_only_those_there_are() -> None:
    truth = np.array([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert recall(np.array([[4, 3, 2, 1], [6, 5, -1, -1]]), truth) == 1.0
    assert recall(np.array([[4, 9, 2, -1], [7, 5, 8, 9]]), truth) == pytest.approx(3 / 6)
    assert recall(np.full((2, 4), -1), truth) == 0.0


@pytest.mark.parametrize("allowed", [1.0, 0.3, 0.0])
def test_stores_best_is_the_sort_of_everything_allowed(
    allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stores, "ADD_ROWS", 64
    )  # so that there are several blocks, and a last one that is short
    rows, queries = units(ROWS, 3), units(QUERIES, 4)
    bits = np.random.default_rng(5).random(ROWS) < allowed
    found = best(rows, queries.astype(np.float32), bits)
    expected = sorted_best(rows, queries, bits) if allowed else np.full((QUERIES, TOP), -1)
    np.testing.assert_array_equal(found, expected)


def test_stores_best_of_fewer_than_ten_is_padded() -> None:
    rows, queries = units(ROWS, 3), units(QUERIES, 4)
    bits = np.zeros(ROWS, np.bool_)
    bits[[7, 400]] = True
    found = best(rows, queries.astype(np.float32), bits)
    assert [sorted(row) for row in found.tolist()] == [[-1] * 8 + [7, 400]] * QUERIES


def test_stores_masks_are_the_same_in_every_process_and_of_the_shares_they_are_named_for() -> None:
    for name, bits in masks(100_000).items():
        assert bits.mean() == pytest.approx(SHARES[name], abs=0.01)
        np.testing.assert_array_equal(bits, masks(100_000)[name])


def test_stores_timed_asks_each_query_once_after_a_warm_up_and_stops_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def search(queries: NDArray[np.float32]) -> NDArray[np.int64]:
        asked.extend(queries[:, 0].astype(int).tolist())
        return np.repeat(queries[:, :1].astype(np.int64), TOP, axis=1)

    queries = np.repeat(np.arange(20, dtype=np.float32)[:, None], DIM, axis=1)
    truth = np.repeat(np.arange(20)[:, None], TOP, axis=1)
    figures = timed(search, queries, truth)
    assert asked == [0, *range(20)]
    assert (figures["queries"], figures["recall_at_10"]) == (20, 1.0)
    asked.clear()
    assert timed(search, queries, truth, batch=8)["queries"] == 16
    assert asked == [*range(8), *range(16)]
    monkeypatch.setattr(stores, "SECONDS", 0.0)
    assert timed(search, queries, truth)["queries"] == stores.LEAST


def test_stores_a_peer_finds_what_is_there_exactly_and_by_a_wide_search(measured: Any) -> None:
    figures, _ = measured
    assert figures["rows"] == ROWS
    for threads in ("one_thread", "all_threads"):
        assert (
            figures["exact"][threads]["recall_at_10"] >= 0.99
        )  # float16 sums may swap the tenth and eleventh
        assert figures["exact"][threads]["queries"] == QUERIES
    assert [entry["ef"] for entry in figures["ann"]] == list(stores.WIDTHS)
    recalls = [entry["recall_at_10"] for entry in figures["ann"]]
    assert recalls[-1] >= 0.98  # half of the rows are looked at
    assert figures["bytes_per_row"]["disk"] >= DIM * 2


def test_stores_a_peer_that_filters_finds_the_best_of_those_allowed(measured: Any) -> None:
    figures, _ = measured
    if not figures["filter"]:
        assert figures["filtered"] == []
        return
    assert [(entry["allowed"], entry["search"]) for entry in figures["filtered"]] == [
        (0.5, "exact"), (0.1, "exact"), (0.5, "ann"), (0.1, "ann"),
    ]  # fmt: skip
    for entry in figures["filtered"]:
        # hnswlib's filtered scan stays under the worst of the first rows, so among this few it finds too few.
        exact = entry["search"] == "exact" and figures["peer"] != "hnswlib"
        assert entry["recall_at_10"] >= (0.99 if exact else 0.8), entry


def test_stores_without_its_filter_a_search_would_be_seen_to_miss(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    rows, queries = (
        np.fromfile(folder / f"{name}.f16", "<f2").reshape(-1, DIM) for name in ("rows", "queries")
    )
    unfiltered = sorted_best(rows, queries, np.ones(ROWS, np.bool_))
    for bits in masks(ROWS).values():
        assert recall(unfiltered, best(rows, queries.astype(np.float32), bits)) < 0.7


def test_stores_graphs_have_the_links_that_were_asked_for(measured: Any) -> None:
    figures, built = measured
    if figures["peer"] not in ("faiss-plain", "milvus-lite"):
        pytest.skip("no reader of this peer's file here")
    files: list[Path] = [*built.glob("graph/index"), *built.glob("graph/**/*.idx")]
    assert len(files) == 1
    index: Any = faiss.read_index(str(files[0]))
    hnsw = index.hnsw
    assert (hnsw.nb_neighbors(0), hnsw.nb_neighbors(1)) == (2 * stores.M, stores.M)
    assert hnsw.efConstruction == stores.EF_CONSTRUCTION


def test_stores_built_once_for_the_same_rows_and_again_for_others(tmp_path: Path) -> None:
    folder, built = write(tmp_path / "in", 1), tmp_path / "built"
    note = built / "graph" / "built.json"
    stores.build("faiss-plain", folder, built, 40)
    first = note.read_text()
    stores.build("faiss-plain", folder, built, 40)
    assert note.read_text() == first
    write(folder, 9)
    stores.build("faiss-plain", folder, built, 40)
    assert json.loads(note.read_text())["rows_sha256"] != json.loads(first)["rows_sha256"]
    index: Any = faiss.read_index(str(built / "scan" / "index"))
    np.testing.assert_array_equal(index.reconstruct(3), units(ROWS, 9)[3].astype(np.float32))


def test_stores_a_build_that_broke_off_is_begun_again(tmp_path: Path) -> None:
    folder, built = write(tmp_path / "in", 1), tmp_path / "built"
    for kind in ("graph", "scan"):
        (built / kind).mkdir(parents=True)
        (built / kind / "index").write_bytes(b"half")
    stores.build("faiss-plain", folder, built, 40)
    index: Any = faiss.read_index(str(built / "graph" / "index"))
    assert index.ntotal == ROWS


def test_stores_a_peer_that_fails_is_told_with_its_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", 1)
    (folder / "truth.i64").unlink()
    told = run("faiss-plain", folder, built=tmp_path / "built", python=Path(sys.executable))
    assert told["peer"] == "faiss-plain"
    assert told["error"].startswith("measure: status 1 FileNotFoundError")
    told = run("faiss-plain", folder, built=tmp_path / "built", python=tmp_path / "no-python")
    assert "no-python" in told["error"] and "--make" in told["error"]
