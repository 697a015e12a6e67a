"""The twin itself, against cosines worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from index.exact import ExactIndex
from index.search import QueryInvalid

VECTORS = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]], np.float32)


def test_exact_scores_are_cosines_descending() -> None:
    hits = ExactIndex(VECTORS).search(np.array([10.0, 0.0], np.float32), 4)
    assert hits.rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(hits.scores, [1.0, 0.6, 0.0, -1.0], atol=2**-11)  # 0.6 is not a float16


def test_exact_ties_go_by_ascending_row() -> None:
    hits = ExactIndex(VECTORS[[2, 0, 2, 0, 0]]).search(np.array([1.0, 0.0], np.float32), 2)
    assert hits.rows.tolist() == [1, 3]


def test_exact_mask_lets_only_set_bits_through() -> None:
    mask = np.packbits([False, True, False, True], bitorder="little")
    hits = ExactIndex(VECTORS).search(np.array([1.0, 0.0], np.float32), 4, mask=mask)
    assert hits.rows.tolist() == [1, 3]


def test_exact_empty_index_has_no_hits() -> None:
    hits = ExactIndex(np.empty((0, 2), np.float32)).search(np.array([1.0, 0.0], np.float32), 3)
    assert len(hits) == 0


@pytest.mark.parametrize("rows", [0, 3])
def test_exact_search_many_answers_each_row(rows: int) -> None:
    index = ExactIndex(VECTORS)
    queries = VECTORS[:rows]
    many = index.search_many(queries, 2)
    assert [hits.rows.tolist() for hits in many] == [
        index.search(query, 2).rows.tolist() for query in queries
    ]


def test_exact_refuses_wrong_shapes() -> None:
    index = ExactIndex(VECTORS)
    with pytest.raises(QueryInvalid, match="search_many"):
        index.search(VECTORS, 1)
    with pytest.raises(QueryInvalid, match="remedy: search"):
        index.search_many(VECTORS[0], 1)
    with pytest.raises(QueryInvalid, match="stack them"):
        ExactIndex(VECTORS[0])
