"""Toy vectors and indexes of these tests: 20 dims (padded to 32), built in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import Entry, build

DIM = 20
PERSONAS = ("calm", "lively")
SURFACES = ("speaker", "tv")


@pytest.fixture
def now() -> datetime:
    return datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="session")
def random_vectors() -> Callable[..., NDArray[np.float32]]:
    def make(rows: int, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
        return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def plain_entries() -> Callable[[int], list[Entry]]:
    def make(count: int) -> list[Entry]:
        return [Entry(id=f"r{i}", text=f"Reply {i}.", prompt=f"prompt {i}") for i in range(count)]

    return make


@pytest.fixture
def folder(
    tmp_path: Path,
    random_vectors: Callable[..., NDArray[np.float32]],
    plain_entries: Callable[[int], list[Entry]],
) -> Path:
    """An index of 20 rows in shards of 8, 8 and 4; every malformed one in these tests starts as this good
    one.
    """
    out = tmp_path / "index"
    build(plain_entries(20), random_vectors(20), out, personas=PERSONAS, surfaces=SURFACES, shard_rows=8)
    return out
