"""nlu.vector_store: vectors from disk are the vectorizer's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer


def test_store_gives_the_bits_of_the_vectorizer(vectorizer: Vectorizer, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    store = VectorStore(tmp_path, vectorizer, 1, lambda done, total: steps.append((done, total)))
    phrases = ["hello", "включи свет", "hello"]
    for tokens in (
        False,
        True,
        True,
        False,
    ):  # the second time token vectors are missing, then they are there
        for found, fresh in zip(store.encode(phrases, tokens), vectorizer.encode(phrases), strict=True):
            assert np.array_equal(found.sentence, fresh.sentence)
            if tokens:
                assert found.tokens is not None and found.offsets is not None
                assert np.array_equal(found.tokens, fresh.tokens if fresh.tokens is not None else ())
                assert np.array_equal(found.offsets, fresh.offsets if fresh.offsets is not None else ())
    store.close()
    assert steps == [(2, 2), (2, 2)]


def test_store_that_is_broken_says_what_to_do(vectorizer: Vectorizer, tmp_path: Path) -> None:
    (tmp_path / f"{vectorizer.fingerprint}.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match="delete the file"):
        VectorStore(tmp_path, vectorizer, 1, lambda _done, _total: None)
