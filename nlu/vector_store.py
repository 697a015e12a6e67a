"""Vectors kept on disk by (fingerprint, phrase), so that only new phrases are ever encoded."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from annotators.annotator import Encoding
from nlu import record
from nlu.vectorizer import Vectorizer

_ENCODED_AT_ONCE = 1024  # phrases between two saves
_ASKED_AT_ONCE = 500  # phrases a query


class VectorStore:
    """Encodings of one vectorizer; safe beside other processes, not among threads. Raises OSError for a broken file."""

    def __init__(
        self, folder: Path, vectorizer: Vectorizer, workers: int, progress: Callable[[int, int], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{vectorizer.fingerprint}.sqlite"
        self._vectorizer, self._workers, self._progress = vectorizer, workers, progress
        self.encoded = self.met = 0  # distinct phrases of each call that were new, and that were there
        self._base = sqlite3.connect(self._path, timeout=60.0)
        with self._understood():
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = OFF")  # it can all be computed again
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS encodings (key BLOB PRIMARY KEY, record BLOB) WITHOUT ROWID"
            )

    def encode(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        """Encodings in order; phrases met before come from disk, the same bits as fresh ones."""
        distinct = tuple(dict.fromkeys(phrases))
        known = self._stored(distinct, tokens)
        missing = [phrase for phrase, encoding in known.items() if encoding is None]
        self.encoded += len(missing)
        self.met += len(known) - len(missing)
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            chunk = missing[start : start + _ENCODED_AT_ONCE]
            fresh = list(self._vectorizer.encode_corpus(chunk, tokens=tokens, workers=self._workers))
            known.update(zip(chunk, fresh, strict=True))
            rows = [
                (self._key(phrase), record.pack(encoding))
                for phrase, encoding in zip(chunk, fresh, strict=True)
            ]
            with self._understood(), self._base:
                self._base.executemany("INSERT OR REPLACE INTO encodings VALUES (?, ?)", rows)
            self._progress(start + len(chunk), len(missing))
        return [encoding for phrase in phrases if (encoding := known[phrase]) is not None]

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def _stored(self, phrases: Sequence[str], tokens: bool) -> dict[str, Encoding | None]:
        """What is on disk of each phrase."""
        dim, token_dim = self._vectorizer.dim, self._vectorizer.token_dim
        known: dict[str, Encoding | None] = dict.fromkeys(phrases)
        for start in range(0, len(phrases), _ASKED_AT_ONCE):
            by_key = {self._key(phrase): phrase for phrase in phrases[start : start + _ASKED_AT_ONCE]}
            marks = ", ".join("?" * len(by_key))
            with self._understood():
                found = self._base.execute(
                    f"SELECT key, record FROM encodings WHERE key IN ({marks})", tuple(by_key)
                ).fetchall()
            for key, stored in found:
                encoding = record.unpack(stored, dim=dim, token_dim=token_dim)
                if encoding is not None and not (tokens and encoding.tokens is None):
                    known[by_key[key]] = encoding
        return known

    def _key(self, phrase: str) -> bytes:
        return record.key(self._vectorizer.fingerprint, phrase)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(
                f"{self._path}: found {error}, expected a table of vectors; delete the file, it will be made again"
            ) from error
