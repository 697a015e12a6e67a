"""The gate every vector passes: unit length out, or a refusal that says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from index.exact import ExactIndex
from index.matrix import Matrix
from index.search import NOTHING, Hits, Index, QueryInvalid, check_k, check_mask, prepare, prepare_rows
from index.sharded import ShardedIndex
from tests.index.matrices import stored


def test_search_both_indexes_satisfy_the_protocol() -> None:
    nothing = np.empty((0, 4), np.float32)
    indexes: list[Index] = [ExactIndex(nothing), ShardedIndex(Matrix(stored(nothing)), 4)]
    assert [(index.dim, len(index)) for index in indexes] == [(4, 0), (4, 0)]


def test_search_hits_have_a_length() -> None:
    assert (len(Hits(np.ones(2, np.float32), np.arange(2))), len(NOTHING)) == (2, 0)


@pytest.mark.parametrize("scale", [1.0, 7.0, 1e-30, 1e30], ids=str)
def test_search_prepare_brings_any_length_to_one(scale: float) -> None:
    vector = np.array([3.0, 4.0], np.float32) * np.float32(scale)
    np.testing.assert_allclose(prepare(vector, 2), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(prepare_rows(vector[None], 2), [[0.6, 0.8]], rtol=1e-6)


def test_search_prepare_leaves_the_callers_vector_alone() -> None:
    vector = np.array([3.0, 4.0], np.float32)
    prepare(vector, 2)
    assert vector.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_search_prepare_takes_other_floats(dtype: type[np.floating]) -> None:
    prepared = prepare(np.array([3.0, 4.0], dtype), 2)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("vector", "found"),
    [
        (np.array([1.0, np.nan], np.float32), "NaN, infinity or overflow"),
        (np.array([1.0, np.inf], np.float32), "NaN, infinity or overflow"),
        (np.array([1e200, 1e200]), "NaN, infinity or overflow"),
        (np.array([0.0, 0.0], np.float32), "zero length"),
        (np.array([1, 2]), "int64"),
        (np.array([1.0], np.float32), "expected rows of width 2"),
        (np.array([1.0, 2.0, 3.0], np.float32), "expected rows of width 2"),
        (np.ones((1, 2), np.float32), "pass one vector"),
    ],
    ids=["nan", "inf", "overflow", "zero", "integers", "narrow", "wide", "matrix"],
)
def test_search_prepare_refuses(vector: np.ndarray, found: str) -> None:
    with pytest.raises(QueryInvalid, match=found):
        prepare(vector, 2)


def test_search_prepare_rows_names_the_row_counted_from_the_first() -> None:
    vectors = np.ones((4, 2), np.float32)
    prepare_rows(vectors, 2, first_row=100)  # the control: nothing is wrong yet
    vectors[3] = 0.0
    with pytest.raises(QueryInvalid, match="row 103: found zero length"):
        prepare_rows(vectors, 2, first_row=100)


def test_search_check_k_wants_one_or_more() -> None:
    check_k(1)
    with pytest.raises(QueryInvalid, match="found 0"):
        check_k(0)


@pytest.mark.parametrize(
    "mask",
    [
        np.ones(2, np.uint8),
        np.ones(4, np.uint8),
        np.ones(3, np.int8),
        np.ones(24, bool),
        np.ones(6, np.uint8)[::2],
    ],
    ids=["short", "long", "signed", "unpacked", "strided"],
)
def test_search_check_mask_refuses_all_but_packed_bytes(mask: np.ndarray) -> None:
    check_mask(np.ones(3, np.uint8), 20)  # the control
    with pytest.raises(QueryInvalid, match="expected 3 bytes"):
        check_mask(mask, 20)
