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


class VectorStore:
    """Encodings of one vectorizer; safe beside other processes, not among threads. Raises OSError for a broken file."""

    def __init__(
        self, folder: Path, vectorizer: Vectorizer, workers: int, progress: Callable[[int, int], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{vectorizer.fingerprint}.sqlite"
        self._vectorizer, self._workers, self._progress = vectorizer, workers, progress
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
        known = {phrase: self._stored(phrase, tokens) for phrase in distinct}
        missing = [phrase for phrase, encoding in known.items() if encoding is None]
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

    def _stored(self, phrase: str, tokens: bool) -> Encoding | None:
        with self._understood():
            found = self._base.execute("SELECT record FROM encodings WHERE key = ?", (self._key(phrase),))
            row = found.fetchone()
        if row is None:
            return None
        encoding = record.unpack(row[0], dim=self._vectorizer.dim, token_dim=self._vectorizer.token_dim)
        return None if encoding is None or (tokens and encoding.tokens is None) else encoding

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
