"""nlu.vector_store: vectors from disk are the vectorizer's own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from nlu import record, vector_store
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.tiny import make_vectorizer


def opened(folder: Path, vectorizer: Vectorizer) -> VectorStore:
    return VectorStore(folder, vectorizer, 1, lambda _done, _total: None)


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
    assert (store.encoded, store.met) == (4, 4)


@pytest.mark.parametrize("at_once", [1, 3, 7, 500])
def test_store_finds_each_phrase_its_own_vector_however_many_are_asked(
    vectorizer: Vectorizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(vector_store, "_ASKED_AT_ONCE", at_once)
    monkeypatch.setattr(vector_store, "_ENCODED_AT_ONCE", 2)
    phrases = [f"phrase {i} {'ж' * (i % 3)}".strip() for i in range(7)]
    with closing(opened(tmp_path, vectorizer)) as store:
        store.encode(phrases[::2], False)
        asked = [*reversed(phrases), phrases[3]]
        found = store.encode(asked, False)  # some are there, some are not
        assert (store.encoded, store.met) == (7, 4)
    for phrase, encoding in zip(asked, found, strict=True):
        assert np.array_equal(encoding.sentence, vectorizer.encode([phrase], tokens=False)[0].sentence)


def test_store_asked_nothing_gives_nothing(vectorizer: Vectorizer, tmp_path: Path) -> None:
    with closing(opened(tmp_path, vectorizer)) as store:
        assert store.encode([], True) == []


def test_store_outlives_the_process_and_is_of_one_vectorizer(vectorizer: Vectorizer, tmp_path: Path) -> None:
    stranger = Vectorizer(make_vectorizer(tmp_path / "stranger", seed=1))
    with closing(opened(tmp_path, vectorizer)) as store:
        store.encode(["hello"], False)
    with closing(opened(tmp_path, stranger)) as other, closing(opened(tmp_path, vectorizer)) as again:
        theirs, ours = other.encode(["hello"], False)[0], again.encode(["hello"], False)[0]
        assert (other.encoded, again.encoded) == (1, 0)
    assert not np.array_equal(theirs.sentence, ours.sentence)


def test_store_takes_two_writers(vectorizer: Vectorizer, tmp_path: Path) -> None:
    with closing(opened(tmp_path, vectorizer)) as one, closing(opened(tmp_path, vectorizer)) as other:
        one.encode(["a", "b"], False)
        assert len(other.encode(["b", "c"], True)) == 2
        one.encode(["a", "b", "c"], True)
        assert (one.encoded, other.encoded) == (3, 2)  # only "a" had no token vectors yet


@pytest.mark.parametrize("harm", [b"", b"E1", b"no record at all"])
def test_store_encodes_again_what_it_does_not_understand(
    vectorizer: Vectorizer, tmp_path: Path, harm: bytes
) -> None:
    with closing(opened(tmp_path, vectorizer)) as store:
        (wanted,) = store.encode(["hello"], True)
    with closing(sqlite3.connect(next(tmp_path.glob("*.sqlite")))) as base, base:
        key = record.key(vectorizer.fingerprint, "hello")
        assert base.execute("UPDATE encodings SET record = ? WHERE key = ?", (harm, key)).rowcount == 1
    with closing(opened(tmp_path, vectorizer)) as store:
        (found,) = store.encode(["hello"], True)
        assert store.encoded == 1
    assert np.array_equal(found.sentence, wanted.sentence)


def test_store_that_is_broken_says_what_to_do(vectorizer: Vectorizer, tmp_path: Path) -> None:
    (tmp_path / f"{vectorizer.fingerprint}.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match="delete the file"):
        VectorStore(tmp_path, vectorizer, 1, lambda _done, _total: None)
