"""Golden phrases: answered right, clear of the next label, one a label and of as many labels as there is room for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from annotators.golden import GOLDEN, rows


def wanted(codes: list[int], labels: int) -> NDArray[np.bool_]:
    held: NDArray[np.bool_] = np.equal.outer(np.array(codes), np.arange(labels))
    return held


@pytest.mark.parametrize(
    ("scores", "codes", "kept"),
    [
        pytest.param([[0.9, 0.1], [0.2, 0.8]], [0, 1], [0, 1], id="one of each"),
        pytest.param([[0.8, 0.2], [0.9, 0.1]], [0, 0], [1], id="the clearest of a label"),
        pytest.param([[0.9, 0.1], [0.2, 0.8]], [1, 1], [1], id="not what is answered wrong"),
        pytest.param([[0.55, 0.45], [0.2, 0.8]], [0, 1], [1], id="not what is answered by chance"),
        pytest.param([[0.2, 0.8], [0.9, 0.1]], [1, 0], [0, 1], id="in the order of the rows"),
        pytest.param([[0.5, 0.5]], [0], [], id="nothing"),
    ],
)
def test_golden_rows_by_hand(scores: list[list[float]], codes: list[int], kept: list[int]) -> None:
    assert rows(np.array(scores, np.float32), wanted(codes, 2)) == kept


def test_golden_row_of_several_labels_is_kept_for_the_best_of_them() -> None:
    scores = np.array([[0.9, 0.1, 0.7], [0.1, 0.9, 0.7]], np.float32)
    assert rows(scores, np.array([[True, True, False], [True, False, False]])) == [0]


@pytest.mark.parametrize(("score", "kept"), [(0.9, [0]), (0.1, [])])
def test_golden_rows_of_a_single_label_are_clear_of_zero(score: float, kept: list[int]) -> None:
    assert rows(np.array([[score]], np.float32), np.array([[True]])) == kept


@given(st.integers(1, 200))
def test_golden_rows_are_of_distinct_labels_and_no_more_than_there_is_room_for(labels: int) -> None:
    kept = rows(np.eye(labels, dtype=np.float32), np.eye(labels, dtype=np.bool_))
    assert len(set(kept)) == len(kept) == min(labels, GOLDEN)
    assert labels < 2 * GOLDEN or max(kept) > labels / 2  # spread, not the first ones
