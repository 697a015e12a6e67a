"""A scan looks at rows where they lie, equals the twin, and puts ties in order that FAISS leaves in none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from index.exact import ExactIndex
from index.layout import padded
from index.scan import Scan, ask, ordered, select
from tests.index.matrices import Floats, Halves, packed, plain, query_of, stored

ROWS, DIM, WIDTH = 24, 20, 32


@pytest.fixture
def halves(random_vectors: Callable[..., Floats]) -> Halves:
    return stored(random_vectors(ROWS))


def test_scan_codes_are_the_very_memory_of_the_rows(halves: Halves) -> None:
    scan = Scan(halves, 0)  # held: FAISS's vectors do not keep their index alive
    assert faiss.vector_to_array(scan._flat.codes).tobytes() == halves.tobytes()
    query = query_of(np.eye(1, DIM, dtype=np.float32)[0])
    before = scan.search(query, 1).scores[0]
    halves[:, 0] = 1.0  # no copy was made: what changes here changes there
    assert (float(before) < 1.0, scan.search(query, 1).scores.tolist()) == (True, [1.0])


def test_scan_keeps_its_rows_alive(random_vectors: Callable[..., Floats]) -> None:
    rows = stored(random_vectors(8))
    alive = weakref.ref(rows)
    scan = Scan(rows, 0)
    del rows
    gc.collect()
    assert alive() is not None
    assert len(scan.search(query_of(np.ones(DIM, np.float32)), 3)) == 3
    del scan
    gc.collect()
    assert alive() is None  # the control: nobody else did


def test_scan_equals_a_faiss_index_filled_in_the_ordinary_way(halves: Halves) -> None:
    ordinary = faiss.IndexScalarQuantizer(WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    ordinary.add(halves.astype(np.float32))
    query = query_of(np.arange(1.0, DIM + 1, dtype=np.float32))
    scores, rows = ordinary.search(query[None], 5)
    assert plain(Scan(halves, 0).search(query, 5)) == (scores[0].tolist(), rows[0].tolist())


@pytest.mark.parametrize("first", [0, 8, 1 << 20])
def test_scan_equals_the_twin_with_rows_numbered_from_the_first(
    halves: Halves, random_vectors: Callable[..., Floats], first: int
) -> None:
    twin, scan = ExactIndex(random_vectors(ROWS)), Scan(halves, first)
    for vector in random_vectors(5, seed=1):
        expected, found = twin.search(vector, 10), scan.search(query_of(vector), 10)
        assert found.rows.tolist() == [first + row for row in expected.rows]
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_scan_mask_lets_only_set_bits_through(halves: Halves) -> None:
    allowed = np.isin(np.arange(ROWS), [2, 5, 23])
    scan = Scan(halves, 0)
    query = query_of(np.ones(DIM, np.float32))
    assert sorted(scan.search(query, 10, select(packed(allowed))).rows.tolist()) == [2, 5, 23]
    assert len(scan.search(query, 10)) == 10  # the control: without the mask others come


def test_scan_mask_of_no_rows_gives_no_hits(halves: Halves) -> None:
    hits = Scan(halves, 8).search(query_of(np.ones(DIM, np.float32)), 3, select(np.zeros(3, np.uint8)))
    assert plain(hits) == ([], [])


def test_scan_selector_shares_the_memory_of_its_mask(halves: Halves) -> None:
    mask = np.zeros(3, np.uint8)
    selector, query = select(mask), query_of(np.ones(DIM, np.float32))
    mask[1] = 0b100
    assert Scan(halves, 0).search(query, 3, selector).rows.tolist() == [10]


def duplicates(order: list[int]) -> Halves:
    """Rows drawn from three directions, so that equal numbers in `order` are equal vectors."""
    return stored(np.eye(3, DIM, dtype=np.float32)[order])


def test_scan_a_tie_at_the_cut_costs_one_more_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that tie for the last place among many: fetching a few more proves them, however many rows there are."""
    asked: list[int] = []

    def watched(index: object, queries: Floats, k: int, params: object) -> tuple[Floats, NDArray[np.int64]]:
        asked.append(k)
        return ask(index, queries, k, params)

    monkeypatch.setattr("index.scan.ask", watched)
    far = np.eye(DIM, dtype=np.float32)[2:4].repeat(500, axis=0)
    near = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32) @ np.eye(2, DIM, dtype=np.float32)
    rows = np.zeros((1002, padded(DIM)), np.float16)
    rows[:, :DIM] = np.vstack([far, near])
    rows[:1000, 0] = np.linspace(-0.5, 0.5, 1000)
    found = Scan(rows, 0).search(query_of(np.eye(1, DIM, dtype=np.float32)[0]), 1)
    assert (found.rows.tolist(), asked) == ([1000], [2, 8])


@pytest.mark.parametrize("k", range(1, 8))
def test_scan_ties_go_by_ascending_row_even_at_the_cut(k: int) -> None:
    query = query_of(np.array([1.0, 0.5] + [0.0] * (DIM - 2), np.float32))
    found = Scan(duplicates([1, 0, 1, 0, 0, 1, 0]), 0).search(query, k)
    assert found.rows.tolist() == [1, 3, 4, 6, 0, 2, 5][:k]


def test_scan_ties_at_the_cut_need_more_than_faiss_gives() -> None:
    """The control of the test above: plain FAISS, asked for k, answers with other rows."""
    scan = Scan(duplicates([0, 0, 0, 0]), 0)
    query = query_of(np.eye(1, DIM, dtype=np.float32)[0])
    _, rows = scan.best(query[None], 2)
    assert rows[0].tolist() != [0, 1]
    assert scan.search(query, 2).rows.tolist() == [0, 1]


def test_scan_a_crowd_of_equal_rows_is_searched_to_its_end() -> None:
    scan = Scan(duplicates([1] * 5 + [0] * 300), 0)
    assert scan.search(query_of(np.eye(1, DIM, dtype=np.float32)[0]), 3).rows.tolist() == [5, 6, 7]


@pytest.mark.parametrize("k", [1, 4, 24, 50])
def test_scan_best_says_where_nothing_is_left(halves: Halves, k: int) -> None:
    allowed = np.arange(ROWS) % 8 == 1
    queries = np.stack([query_of(np.ones(DIM, np.float32)), query_of(np.eye(1, DIM, dtype=np.float32)[0])])
    scores, rows = Scan(halves, 16).best(queries, k, select(packed(allowed)))
    assert scores.shape == rows.shape == (2, min(k, ROWS))
    for i, query in enumerate(queries):
        expected = Scan(halves, 16).search(query, min(k, 3), select(packed(allowed)))
        assert rows[i].tolist() == expected.rows.tolist() + [-1] * (min(k, ROWS) - len(expected))
        assert scores[i, : len(expected)].tolist() == expected.scores.tolist()
        assert np.isneginf(scores[i, len(expected) :]).all()


def test_scan_ordered_sorts_ties_and_cuts() -> None:
    scores, rows = np.array([0.5, 0.5, 0.25, 0.25], np.float32), np.array([9, 3, 7, 2])
    assert plain(ordered(scores, rows, 3)) == ([0.5, 0.5, 0.25], [3, 9, 2])


def test_scan_refuses_a_query_of_another_width(halves: Halves) -> None:
    with pytest.raises(ValueError, match="found width 16, expected 32"):
        Scan(halves, 0).search(np.ones(padded(16), np.float32), 1)


@pytest.mark.parametrize(
    "query", [np.ones(WIDTH), np.ones(2 * WIDTH, np.float32)[::2]], ids=["float64", "strided"]
)
def test_scan_refuses_memory_faiss_would_misread(halves: Halves, query: np.ndarray) -> None:
    with pytest.raises((TypeError, ValueError)):
        Scan(halves, 0).search(query, 1)
