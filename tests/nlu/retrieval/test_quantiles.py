"""nlu.retrieval.quantiles: similarities as numpy finds them by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import Entry, build
from index.replies import Replies
from nlu.retrieval import quantiles as module
from nlu.retrieval.quantiles import QUANTILES, quantiles

FloatArray = NDArray[np.float32]


def unit(rows: NDArray[np.floating]) -> FloatArray:
    result: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return result


def replies(folder: Path, ids: Sequence[str], vectors: FloatArray, said: FloatArray | None) -> Replies:
    entries = [
        Entry(id=name, text=name, prompt="" if said is None else f"prompt {i}") for i, name in enumerate(ids)
    ]
    build(entries, vectors, folder / "index.x", personas=(), surfaces=(), said=said)
    return Replies.load(folder / "index.x")


def test_quantiles_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "_FIRST_K", 2
    )  # most rows have to look further than their own reply's prompts
    monkeypatch.setattr(module, "_BLOCK", 7)
    rng = np.random.default_rng(5)
    ids = [f"reply {i // 5}" for i in range(60)]
    vectors = unit(
        rng.standard_normal((60, 12)).astype(np.float32)
        + 2 * np.repeat(rng.standard_normal((12, 12)), 5, axis=0)
    )
    vectors[10] = vectors[3]  # one prompt of two replies; itself it is not the nearest other
    said = unit(np.repeat(rng.standard_normal((12, 12)), 5, axis=0).astype(np.float32))
    cosines = vectors @ vectors.T
    number = np.arange(60) // 5
    other = (number[:, None] != number) & (cosines < 0.9999)
    nearest = np.where(other, cosines, -1).max(axis=1)
    steps: list[tuple[int, int]] = []
    found = quantiles(
        replies(tmp_path, ids, vectors, said), progress=lambda done, total: steps.append((done, total))
    )
    assert found.rows == 60 and steps[-1] == (60, 60)
    own = np.einsum("ij,ij->i", vectors, said)
    for told, expected in ((found.other, nearest), (found.own, own)):
        assert list(told) == [f"{quantile:g}" for quantile in QUANTILES]
        assert list(told.values()) == pytest.approx(np.quantile(expected, QUANTILES), abs=2e-3)


def test_quantiles_of_a_sample_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    index = replies(
        tmp_path, [f"r{i}" for i in range(90)], rng.standard_normal((90, 6)).astype(np.float32), None
    )
    one, again, other = (quantiles(index, sample=20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other and one.rows == 20
    assert one.own == {}  # no row has a prompt


def test_quantiles_of_one_reply_or_none(tmp_path: Path) -> None:
    one = replies(tmp_path, ["a", "a"], np.eye(2, 4, dtype=np.float32), np.ones((2, 4), np.float32))
    assert set(quantiles(one).other.values()) == {-1.0}
    none = replies(tmp_path, [], np.zeros((0, 4), np.float32), None)
    assert quantiles(none) == (0, {}, {})
