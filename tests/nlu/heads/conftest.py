"""One BLAS thread for toy vectors, one store of vectors, and a head of every kind, each trained once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from nlu.heads.train import Trained
from nlu.vectorizer import Vectorizer
from tests.nlu.heads.sprints import SPRINTS, Trainer
from tests.tiny import Made


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On vectors this small the solvers would spend their time waking threads."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vectors of the tiny vectorizer are kept."""
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="session")
def bundled(tiny: Made) -> Vectorizer:
    """The vectorizer of the tiny bundle, loaded."""
    return Vectorizer(tiny.parts / "vectorizer.tiny")


@pytest.fixture(scope="session")
def trained(bundled: Vectorizer, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The head of a sprint, trained when first asked for; its files are in `out`, beside those it was made of."""

    @cache
    def run(name: str) -> Trained:
        return SPRINTS[name].run(tmp_path_factory.mktemp("sprint"), bundled, store)

    return run
