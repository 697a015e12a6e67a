"""What an index can be asked, and where the right answers stand: the questions an adapter learns from and is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.adapter import Residual
from index.items import Items
from index.replies import Replies
from index.sharded import ShardedIndex
from nlu.normalizer import normalize

HELD_OUT = 0.5  # of the old prompts; nothing is learnt from them, harm is measured on them
BLOCK = 64  # questions scored at a time
_SHOWN = 5  # bad lines told apart in one message

FloatArray = NDArray[np.float32]
Encode = Callable[[Sequence[str]], FloatArray]  # phrases to [phrases, dim]


@dataclass(frozen=True, slots=True)
class Library:
    """An index as training sees it, and who encodes phrases for it."""

    items: Items
    rows: FloatArray  # [vectors, dim]
    encode: Encode
    uncased: bool

    def vectors_of(self, replies: Iterable[str]) -> set[int]:
        """Every vector that leads to one of these replies."""
        return {int(self.items.vectors[row]) for reply in replies for row in self.items.rows_of(reply)}

    def replies_of(self, vector: int) -> set[str]:
        """Every reply that a vector leads to."""
        return {self.items.id_of(row) for row in self.items.pairs_of(vector)}

    def prompt_of(self, vector: int) -> str:
        """The phrase that a vector was made from: a prompt, or a reply itself."""
        return self._phrase_of(self.items.pairs_of(vector)[0])

    def _phrase_of(self, row: int) -> str:
        item = self.items.reply(row)
        return self.phrase(item.prompt or item.text)

    def vector_of(self, phrase: str, replies: Iterable[str]) -> int:
        """The vector made from this very phrase for one of these replies; -1 for none."""
        rows = [row for reply in replies for row in self.items.rows_of(reply)]
        return next(
            (int(self.items.vectors[row]) for row in rows if self._phrase_of(row) == phrase),
            -1,
        )

    def phrase(self, text: str) -> str:
        """As the vectorizer sees it."""
        return normalize(text, uncased=self.uncased).text


@dataclass(frozen=True, slots=True)
class Question:
    """What may be asked, and where the answer stands. `hidden` is a row made from this very phrase: asked as if it were
    not there; -1 for none."""

    vector: FloatArray  # [dim]
    right: NDArray[np.int64]  # rows that lead to a right reply
    hidden: int
    group: str  # the reply it is about: its questions are resampled together


def read_library(folder: Path, encode: Encode, *, uncased: bool) -> Library:
    """The index in a folder; raises `IndexInvalid`."""
    replies, index = Replies.load(folder), ShardedIndex.load(folder)
    return Library(replies.items, index.rows[:, : index.dim].astype(np.float32), encode, uncased)


def read_pairs(path: Path, library: Library) -> dict[str, list[str]]:
    """Phrases and the replies each is to find, of lines `query<TAB>reply id`; raises ValueError naming the bad lines."""
    pairs: dict[str, list[str]] = {}
    bad = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found {error}, expected UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            query, reply = _pair(line, library)
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
        else:
            replies = pairs.setdefault(query, [])
            replies += [reply] * (reply not in replies)
    if bad:
        more = [f"and {len(bad) - _SHOWN} lines more"] if len(bad) > _SHOWN else []
        raise ValueError("\n".join([*bad[:_SHOWN], *more]))
    return pairs


def new_questions(pairs: Mapping[str, Sequence[str]], library: Library) -> list[Question]:
    """One for each phrase, reply by reply; a phrase that is its reply's only prompt already has nothing to find."""
    ordered = sorted(pairs.items(), key=lambda pair: (pair[1][0], _digest(pair[0])))
    questions = []
    for (query, replies), vector in zip(
        ordered, library.encode([query for query, _ in ordered]), strict=True
    ):
        right = library.vectors_of(replies)
        own = library.vector_of(query, replies)
        if right - {own}:
            questions.append(Question(vector, np.array(sorted(right - {own})), own, replies[0]))
    return questions


def old_questions(library: Library, *, taught: set[str], most: int) -> tuple[list[Question], list[Question]]:
    """Prompts that lead to no reply in `taught`, at most so many of each: those to learn from, and those held out by the
    hash of their text. Raises ValueError where there are too few."""
    held: list[tuple[bytes, int]] = []
    kept: list[tuple[bytes, int]] = []
    for vector in sorted(set(library.items.vectors.tolist()) - library.vectors_of(taught)):
        digest = _digest(library.prompt_of(vector))
        (held if digest[0] < HELD_OUT * 256 else kept).append((digest, vector))
    if not held or not kept:
        raise ValueError(
            f"old content: found {len(held) + len(kept)} prompts that lead to none of the pairs' replies, expected enough to"
            " learn from and to measure harm on; take a bundle whose index holds more"
        )
    learnt, judged = (_asked(library, [vector for _, vector in sorted(part)[:most]]) for part in (kept, held))
    return learnt, judged


def places(
    questions: Sequence[Question], rows: FloatArray, residual: Residual | None = None
) -> NDArray[np.int64]:
    """[questions] where the first right row of each stands, from 1, among all rows but the hidden one."""
    found: list[int] = []
    for start in range(0, len(questions), BLOCK):
        some = questions[start : start + BLOCK]
        sought = [each.vector if residual is None else residual.apply(each.vector) for each in some]
        for question, scores in zip(some, np.stack(sought) @ rows.T, strict=True):
            if question.hidden >= 0:
                scores[question.hidden] = -np.inf
            found.append(1 + int(np.count_nonzero(scores > scores[question.right].max())))
    return np.array(found, np.int64)


def _pair(line: str, library: Library) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) != 2:
        raise ValueError(f"found {len(fields)} fields, expected query<TAB>reply id; part them by one tab")
    query, reply = library.phrase(fields[0]), fields[1].strip()
    if not library.items.rows_of(reply):
        raise ValueError(
            f"found reply id {reply!r}, expected one of the bundle's index; add the reply to the index first"
        )
    return query, reply


def _asked(library: Library, vectors: Sequence[int]) -> list[Question]:
    """What a prompt of the index can honestly be asked: without its own row where its replies have other prompts; by half
    of its words where they have none, because a row finds itself whatever happens around it."""
    replies = [sorted(library.replies_of(vector)) for vector in vectors]
    others = [library.vectors_of(mine) - {vector} for vector, mine in zip(vectors, replies, strict=True)]
    lone = [vector for vector, rows in zip(vectors, others, strict=True) if not rows]
    shortened = [_misheard(library.prompt_of(vector)) for vector in lone]
    heard = dict(zip(lone, library.encode(shortened) if lone else (), strict=True))
    return [
        Question(heard[vector], np.array([vector]), -1, mine[0])
        if vector in heard
        else Question(library.rows[vector], np.array(sorted(rows)), vector, mine[0])
        for vector, mine, rows in zip(vectors, replies, others, strict=True)
    ]


def _misheard(phrase: str) -> str:
    """Half of the words, chosen by hash, in their order."""
    words = phrase.split()
    chosen = sorted(range(len(words)), key=lambda i: _digest(f"{i} {phrase}"))[: (len(words) + 1) // 2]
    return " ".join(words[i] for i in sorted(chosen))


def _digest(text: str) -> bytes:
    # A name of its own: other splits of the same phrases go by their plain hash.
    return hashlib.blake2b(text.encode(), person=b"adapter", digest_size=16).digest()
