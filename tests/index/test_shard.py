"""A shard file is served only when every number is what a build writes, and then equals the twin."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.exact import ExactIndex
from index.search import Hits, prepare_rows
from index.shard import CHECK_ROWS, IndexInvalid, Shard, padded, read, select

ROWS, DIM, WIDTH = 24, 20, 32
Vectors = NDArray[np.float16]


@pytest.fixture
def stored(random_vectors: Callable[..., NDArray[np.float32]]) -> Vectors:
    """What a shard file of 24 rows holds: `[rows, padded]`."""
    return pad(prepare_rows(random_vectors(ROWS), DIM))


def pad(vectors: NDArray[np.float32]) -> Vectors:
    wide = np.zeros((len(vectors), padded(vectors.shape[1])), np.float16)
    wide[:, : vectors.shape[1]] = vectors
    return wide


def query_of(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    query = np.zeros(padded(len(vector)), np.float32)
    query[: len(vector)] = vector / np.linalg.norm(vector)
    return query


@pytest.mark.parametrize(("dim", "width"), [(1, 16), (15, 16), (16, 16), (17, 32), (300, 304), (384, 384)])
def test_shard_padded_is_the_next_multiple_of_16(dim: int, width: int) -> None:
    assert padded(dim) == width


def test_shard_read_gives_back_the_file(tmp_path: Path, stored: Vectors) -> None:
    stored.astype("<f2").tofile(tmp_path / "s")
    np.testing.assert_array_equal(read(tmp_path / "s", rows=ROWS, dim=DIM), stored)


def set_to(row: int, column: int, value: float) -> Callable[[Vectors], Vectors]:
    def change(vectors: Vectors) -> Vectors:
        vectors[row, column] = value
        return vectors

    return change


def scale(row: int, factor: float) -> Callable[[Vectors], Vectors]:
    def change(vectors: Vectors) -> Vectors:
        vectors[row] *= np.float16(factor)
        return vectors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(3, 5, np.nan), "row 3: found NaN or infinity"),
        (set_to(3, 5, np.inf), "row 3: found NaN or infinity"),
        (set_to(3, 5, -np.inf), "row 3: found NaN or infinity"),
        (scale(7, 0.0), "row 7: found length 0"),
        (scale(7, 1.01), "row 7: found length 1.0"),
        (scale(7, 0.99), "row 7: found length 0.9"),
        (set_to(9, DIM, 0.001), f"row 9: found numbers in the padding, expected zeros after column {DIM}"),
        (lambda vectors: vectors[:-1], f"found {(ROWS - 1) * WIDTH * 2} bytes, expected {ROWS * WIDTH * 2}"),
        (lambda vectors: vectors.repeat(2, axis=0), f"found {ROWS * WIDTH * 4} bytes"),
        (lambda vectors: vectors.ravel()[:-1], f"found {ROWS * WIDTH * 2 - 2} bytes"),
        (lambda vectors: np.append(vectors, np.float16(0)), f"found {ROWS * WIDTH * 2 + 2} bytes"),
        (lambda vectors: vectors[:, :DIM], f"found {ROWS * DIM * 2} bytes"),
        (lambda vectors: vectors[:0], "found 0 bytes"),
    ],
    ids="nan inf -inf zero long short padding fewer more truncated trailing unpadded empty".split(),
)
def test_shard_read_refuses(
    tmp_path: Path, stored: Vectors, change: Callable[[Vectors], Vectors], message: str
) -> None:
    path = tmp_path / "shard-000.f16"
    stored.tofile(path)
    read(path, rows=ROWS, dim=DIM)  # the control: the same file, unchanged, is accepted
    np.ascontiguousarray(change(stored)).tofile(path)
    with pytest.raises(IndexInvalid, match=message) as refusal:
        read(path, rows=ROWS, dim=DIM)
    assert refusal.value.part.startswith("shard-000.f16")
    assert refusal.value.remedy


def test_shard_read_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IndexInvalid, match="shard-007.f16: found no file"):
        read(tmp_path / "shard-007.f16", rows=ROWS, dim=DIM)


def test_shard_read_refuses_another_width_of_the_same_size(tmp_path: Path, stored: Vectors) -> None:
    stored.tofile(tmp_path / "s")
    with pytest.raises(IndexInvalid, match="row 0: found numbers in the padding"):
        read(tmp_path / "s", rows=ROWS, dim=DIM - 1)  # padded to the same 32


def test_shard_read_names_rows_beyond_the_first_block(tmp_path: Path) -> None:
    vectors = np.zeros((CHECK_ROWS + 10, 16), np.float16)
    vectors[:, 0] = 1.0
    vectors[CHECK_ROWS + 3, 0] = 2.0
    vectors.tofile(tmp_path / "s")
    with pytest.raises(IndexInvalid, match=f"row {CHECK_ROWS + 3}: found length 2"):
        read(tmp_path / "s", rows=len(vectors), dim=16)


@pytest.mark.parametrize("dim", [1, 16, 300, 1024])
def test_shard_norm_tolerance_holds_for_float16_rounding(
    tmp_path: Path, random_vectors: Callable[..., NDArray[np.float32]], dim: int
) -> None:
    vectors = random_vectors(200, dim, seed=dim)
    vectors[: len(vectors) // 2] **= 5  # few large coordinates and many that are subnormal in float16
    pad(prepare_rows(vectors, dim)).tofile(tmp_path / "s")
    read(tmp_path / "s", rows=200, dim=dim)


def test_shard_codes_are_the_bytes_of_the_file(stored: Vectors) -> None:
    import faiss

    shard = Shard(stored)  # held: FAISS's vectors do not keep their index alive
    codes = faiss.vector_to_array(shard._flat.codes)
    assert codes.tobytes() == stored.tobytes()


def test_shard_equals_a_faiss_index_filled_in_the_ordinary_way(stored: Vectors) -> None:
    import faiss

    ordinary = faiss.IndexScalarQuantizer(WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    ordinary.add(stored.astype(np.float32))
    query = query_of(np.arange(1.0, DIM + 1, dtype=np.float32))
    scores, rows = ordinary.search(query[None], 5)
    hits = Shard(stored).search(query, 5)
    assert hits.rows.tolist() == rows[0].tolist()
    assert hits.scores.tolist() == scores[0].tolist()


def test_shard_keeps_no_copy_of_the_array(random_vectors: Callable[..., NDArray[np.float32]]) -> None:
    vectors = pad(prepare_rows(random_vectors(8), DIM))
    alive = weakref.ref(vectors)
    shard = Shard(vectors)
    assert alive() is not None  # the control: this reference does see the array while it lives
    del vectors
    gc.collect()
    assert alive() is None
    assert shard.rows == 8


def test_shard_scores_equal_the_twin(
    stored: Vectors, random_vectors: Callable[..., NDArray[np.float32]]
) -> None:
    twin = ExactIndex(random_vectors(ROWS))
    shard = Shard(stored)
    for vector in random_vectors(5, seed=1):
        expected = twin.search(vector, 10)
        hits = shard.search(query_of(vector), 10)
        assert hits.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(hits.scores, expected.scores, atol=1e-6)


def test_shard_mask_lets_only_set_bits_through(stored: Vectors) -> None:
    allowed = np.zeros(ROWS, bool)
    allowed[[2, 5, 23]] = True
    shard = Shard(stored)
    query = query_of(np.ones(DIM, np.float32))
    hits = shard.search(query, 10, select(np.packbits(allowed, bitorder="little")))
    assert sorted(hits.rows.tolist()) == [2, 5, 23]
    assert len(shard.search(query, 10)) == 10  # the control: without the mask others come


def test_shard_mask_of_no_rows_gives_no_hits(stored: Vectors) -> None:
    hits = Shard(stored).search(query_of(np.ones(DIM, np.float32)), 3, select(np.zeros(3, np.uint8)))
    assert hits.rows.tolist() == [] and hits.scores.tolist() == []


def duplicates(order: list[int]) -> Vectors:
    """Rows drawn from three directions, so that equal numbers in `order` are equal vectors."""
    return pad(np.eye(3, DIM, dtype=np.float32)[order])


@pytest.mark.parametrize("k", range(1, 8))
def test_shard_ties_go_by_ascending_row_even_at_the_cut(k: int) -> None:
    shard = Shard(duplicates([1, 0, 1, 0, 0, 1, 0]))
    query = query_of(np.array([1.0, 0.5] + [0.0] * (DIM - 2), np.float32))
    expected = [1, 3, 4, 6, 0, 2, 5][:k]
    assert shard.search(query, k).rows.tolist() == expected
    assert shard.search_many(query[None], k)[0].rows.tolist() == expected


def test_shard_ties_at_the_cut_need_more_than_faiss_gives() -> None:
    """The control of the test above: plain FAISS, asked for k, answers with other rows."""
    shard = Shard(duplicates([0, 0, 0, 0]))
    query = query_of(np.eye(1, DIM, dtype=np.float32)[0])
    _, rows = shard._scan(query[None], 2, None)
    assert rows[0].tolist() != [0, 1]
    assert shard.search(query, 2).rows.tolist() == [0, 1]


def test_shard_a_crowd_of_equal_vectors_is_searched_to_its_end() -> None:
    shard = Shard(duplicates([1] * 5 + [0] * 300))
    query = query_of(np.eye(1, DIM, dtype=np.float32)[0])
    assert shard.search(query, 3).rows.tolist() == [5, 6, 7]


def test_shard_search_many_equals_search(
    stored: Vectors, random_vectors: Callable[..., NDArray[np.float32]]
) -> None:
    shard = Shard(stored)
    queries = np.stack([query_of(vector) for vector in random_vectors(7, seed=2)])
    selector = select(np.packbits(np.arange(ROWS) % 3 > 0, bitorder="little"))

    def plain(hits: Hits) -> tuple[list[float], list[int]]:
        return hits.scores.tolist(), hits.rows.tolist()

    many = shard.search_many(queries, 6, selector)
    assert [plain(hits) for hits in many] == [plain(shard.search(query, 6, selector)) for query in queries]


def test_shard_refuses_a_query_of_another_width(stored: Vectors) -> None:
    with pytest.raises(ValueError, match="found width 16, expected 32"):
        Shard(stored).search(np.ones(16, np.float32), 1)


@pytest.mark.parametrize(
    "query", [np.ones(WIDTH), np.ones(2 * WIDTH, np.float32)[::2]], ids=["float64", "strided"]
)
def test_shard_refuses_memory_faiss_would_misread(stored: Vectors, query: np.ndarray) -> None:
    with pytest.raises((TypeError, ValueError)):
        Shard(stored).search(query, 1)


@pytest.mark.parametrize(
    "vectors",
    [np.ones((2, 20), np.float16), np.ones((2, 32), np.float32), np.ones((2, 64), np.float16)[:, ::2]],
    ids=["unpadded", "float32", "strided"],
)
def test_shard_refuses_arrays_that_read_does_not_return(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected what `read` returns"):
        Shard(vectors)


def test_shard_refuses_an_unknown_placement(stored: Vectors) -> None:
    assert Shard(stored, placement="cpu").placement == "cpu"
    with pytest.raises(IndexInvalid, match="placement: found moon, expected cpu"):
        Shard(stored, placement="moon")
