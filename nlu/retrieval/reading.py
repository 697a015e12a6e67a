"""`Reading`: the second reading of a file, rows into batches of entries with their vectors and the heads' opinions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.build import Entry
from index.items import Items, Judged
from nlu.normalizer import normalize
from nlu.retrieval.judge import Judge
from nlu.retrieval.read import RepliesFile, Row
from nlu.retrieval.survey import Survey, identity
from nlu.retrieval.told import Told
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer

Encode = Literal["prompts", "replies", "both"]
FloatArray = NDArray[np.float32]
Batch = tuple[Sequence[Entry], FloatArray, FloatArray | None]  # as `Writer.add` takes them

ROWS_AT_ONCE = 1024  # about as many as the store encodes between two saves


class Models(NamedTuple):
    """What is asked about texts."""

    vectorizer: Vectorizer
    store: VectorStore  # of that vectorizer
    judge: Judge

    def sentences(self, phrases: Collection[str]) -> dict[str, FloatArray]:
        """The vector `[dim]` of each phrase."""
        distinct = sorted(set(phrases))
        encodings = self.store.encode(distinct, tokens=False)
        return {phrase: each.sentence for phrase, each in zip(distinct, encodings, strict=True)}


@dataclass(slots=True)
class Reply:
    """A reply as it goes into the index, in each of its rows alike."""

    id: str
    text: str
    phrase: str
    weight: float
    tags: tuple[str, ...]
    labels: tuple[Judged, ...] = ()
    blocked: str = ""
    found_by: set[str] = field(default_factory=set)  # phrases; "" is its own vector
    stands_for: set[str] = field(default_factory=set)  # other texts


class Reading:
    """Memory holds one batch, and those replies that have several rows."""

    def __init__(
        self,
        file: RepliesFile,
        survey: Survey,
        models: Models,
        told: Told,
        *,
        encode: Encode,
        max_toxicity: float,
        said: bool,
        items: Items | None = None,
    ) -> None:
        """`said`: whether texts get vectors of their own; `items` are those of an index that is extended."""
        self._file, self._survey, self._models, self._told, self._items = file, survey, models, told, items
        self._encode, self._max_toxicity, self._said = encode, max_toxicity, said
        self._shared: dict[int, Reply] = {}
        self.replies = self.entries = self.merged = self.toxic = self.banned = 0  # so far

    def batches(self) -> Iterator[Batch]:
        """Of ROWS_AT_ONCE rows each: on every run, scores are worked out among the same neighbours."""
        rows = self._file.good("encoding")
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            fresh: dict[int, Reply] = {}
            replies = [self._reply(row, fresh) for row in chunk]
            prompts = [] if self._encode == "replies" else [prompt for row in chunk for prompt in row.prompts]
            vectors = self._models.sentences(
                [*(reply.phrase for reply in replies), *(prompt.phrase for prompt in prompts)]
            )
            self._judge(fresh, vectors)
            entries, keys, texts = [], [], []
            for row, reply in zip(chunk, replies, strict=True):
                for prompt, phrase in self._new(row, reply):
                    entries.append(_entry(row, reply, prompt))
                    keys.append(vectors[phrase or reply.phrase])
                    texts.append(vectors[reply.phrase])
            self.replies += len(fresh)
            self.entries += len(entries)
            if entries:
                yield entries, np.stack(keys), np.stack(texts) if self._said else None

    def _reply(self, row: Row, fresh: dict[int, Reply]) -> Reply:
        """The reply of a row; one that comes for the first time is `fresh`."""
        number = self._survey.kept(self._survey.number(row))
        if number < 0:
            raise self._file.changed()
        reply = self._shared.get(number)
        if reply is None:
            reply = self._indexed(number) or self._first(number, row)
            if not self._is_indexed(number):
                fresh[number] = reply
            if number in self._survey.shared:
                self._shared[number] = reply
        if row.text != reply.text and row.text not in reply.stands_for:
            reply.stands_for.add(row.text)
            near = self._survey.kept(self._survey.number(row)) != self._survey.number(row)
            why = "nearly the same words and vector" if near else "the same words"
            self._told.merged(reply.id, reply.text, row.text, why)
            self.merged += 1
        return reply

    def _first(self, number: int, row: Row) -> Reply:
        survey = self._survey
        return Reply(
            identity(row), row.text, row.phrase, weight=survey.weight(number), tags=survey.tags(number)
        )

    def _is_indexed(self, number: int) -> bool:
        return number < len(self._survey.indexed)

    def _indexed(self, number: int) -> Reply | None:
        """A reply that the index has already: what it is stays."""
        if self._items is None or not self._is_indexed(number):
            return None
        item = self._items.reply(self._survey.indexed[number])
        rows = self._items.rows_of(item.id)
        uncased = self._file.uncased
        prompts = [self._items.reply(row).prompt for row in rows]
        return Reply(
            item.id, item.text, normalize(item.text, uncased=uncased).text, item.weight, item.tags, item.labels, item.blocked,
            found_by={prompt and normalize(prompt, uncased=uncased).text for prompt in prompts},
        )  # fmt: skip

    def _judge(self, fresh: Mapping[int, Reply], vectors: Mapping[str, FloatArray]) -> None:
        """What the heads say of replies that come for the first time, and whether they may be said."""
        if not fresh:
            return
        opinions = self._models.judge(np.stack([vectors[reply.phrase] for reply in fresh.values()]))
        for (number, reply), opinion in zip(fresh.items(), opinions, strict=True):
            reply.labels = opinion.labels
            if number in self._survey.banned:
                reply.blocked = "banned"
                self.banned += 1
            elif opinion.toxicity is not None and opinion.toxicity >= self._max_toxicity:
                reply.blocked = f"toxicity {opinion.toxicity:.2f}"
                self.toxic += 1
            if reply.blocked:
                self._told.blocked(reply.id, reply.text, reply.blocked)

    def _new(self, row: Row, reply: Reply) -> Iterator[tuple[str, str]]:
        """Prompts of a row by which its reply is not found yet, with their phrases; empty ones for its own vector."""
        found = [] if self._encode == "replies" else list(row.prompts)
        if not found or self._encode == "both":
            yield from self._once("", "", reply)
        for prompt in found:
            yield from self._once(prompt.text, prompt.phrase, reply)

    def _once(self, prompt: str, phrase: str, reply: Reply) -> Iterator[tuple[str, str]]:
        if phrase not in reply.found_by:
            reply.found_by.add(phrase)
            yield prompt, phrase


def _entry(row: Row, reply: Reply, prompt: str) -> Entry:
    return Entry(
        id=reply.id, text=reply.text, prompt=prompt, personas=row.personas, surfaces=row.surfaces,
        valid_from=row.valid_from, valid_until=row.valid_until, weight=reply.weight, emotion=row.emotion,
        tags=reply.tags, labels=reply.labels, blocked=reply.blocked,
    )  # fmt: skip
