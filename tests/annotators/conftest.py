"""Toy vectors want one BLAS thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On vectors this small the solvers would spend their time waking threads."""
    with threadpool_limits(1):
        yield
