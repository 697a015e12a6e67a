"""Exchanges as what a ranker sees of them: situations, candidate replies, and the table of features of each set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Encoding, Heard
from annotators.fleet import Fleet
from annotators.sentence import SentenceHead
from index.items import EVERYONE, Judged, ReplyItem
from index.replies import Hit
from nlu.features import Features, Situation, Turn
from nlu.retrieval.dialogs import Exchange
from nlu.retrieval.judge import AT_LEAST, TOP
from nlu.retrieval.ranking_measures import candidates, distinct_replies

POOL = (
    2000  # replies among which the hard ones are looked for: beyond, the nearest are often right themselves
)
NEAR = 0.05  # of the pool: the very nearest alone would teach that what is near is wrong
_ROLES = ("user", "assistant")
_BLOCK = 512  # queries compared with the pool at once

FloatArray = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Lessons:
    """Exchanges with their replies, each reply once, all encoded and judged."""

    exchanges: Sequence[Exchange]
    situations: Sequence[Situation]  # of each exchange
    items: Sequence[ReplyItem]  # of each different reply
    vectors: FloatArray  # [replies, dim] of their own texts

    def said(self, hits: Sequence[Hit]) -> FloatArray:
        """What `Retriever.said` gives of an index of these replies."""
        return self.vectors[[hit.row for hit in hits]]

    def hits(self, exchange: int, rows: NDArray[np.int64]) -> list[Hit]:
        """Replies as hits of an index whose rows were made from the replies themselves."""
        cosines = self.vectors[rows] @ self.situations[exchange].vector
        return [
            Hit(self.items[row], cosine, row)
            for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]

    def table(self, features: Features, sets: NDArray[np.int64], progress: Progress) -> FloatArray:
        """[exchanges, candidates, features] of candidate sets [exchanges, candidates]."""
        table = np.empty((*sets.shape, len(features.names)), np.float32)
        for i, rows in enumerate(sets):
            table[i] = features.table(self.situations[i], self.hits(i, rows), self.said)
            progress(i + 1, len(sets))
        return table

    def sets(self, of: int, hard: int, seed: int) -> NDArray[np.int64]:
        """[exchanges, of] rows of `items`: the true reply at column 0, then others of other dialogs, drawn from all, and
        `hard` ones drawn from those near the query. Raises ValueError where there are too few replies."""
        drawn = candidates(self.exchanges, of, seed)
        if hard:
            near = self._near(max(hard, round(NEAR * min(POOL, len(self.items)))), seed)
            rng = np.random.default_rng(seed)
            drawn[:, of - hard :] = rng.permuted(near, axis=1)[:, :hard]
        return drawn

    def nearest(self, of: int, seed: int) -> NDArray[np.int64]:
        """[exchanges, of]: the true reply at column 0, and of the others of a pool those nearest to the query."""
        drawn = candidates(self.exchanges, of, seed)
        drawn[:, 1:] = self._near(of - 1, seed)
        return drawn

    def _near(self, count: int, seed: int) -> NDArray[np.int64]:
        """[exchanges, count] of a pool of replies those nearest to each query, its own dialog's excepted."""
        rng = np.random.default_rng(seed)
        pool = np.sort(rng.permutation(len(self.items))[:POOL])
        place = {row: i for i, row in enumerate(pool.tolist())}
        number = {item.id: row for row, item in enumerate(self.items)}
        own: dict[str, list[int]] = {}
        for exchange in self.exchanges:
            row = number[exchange.reply]
            if row in place:
                own.setdefault(exchange.dialog, []).append(place[row])
        near = np.empty((len(self.exchanges), count), np.int64)
        for start in range(0, len(self.exchanges), _BLOCK):
            queries = np.stack([each.vector for each in self.situations[start : start + _BLOCK]])
            cosines = queries @ self.vectors[pool].T
            for row, exchange in enumerate(self.exchanges[start : start + _BLOCK]):
                cosines[row, own.get(exchange.dialog, [])] = -np.inf
            best = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            near[start : start + _BLOCK] = pool[best]
        return near


def lessons(
    exchanges: Sequence[Exchange], encodings: dict[str, Encoding], opinions: dict[str, tuple[Annotation, ...]]
) -> Lessons:
    """Lessons of exchanges whose phrases are all encoded and judged."""
    texts = {exchange.reply: exchange.text for exchange in exchanges}
    replies = distinct_replies(exchanges)
    return Lessons(
        exchanges=exchanges,
        situations=[_situation(exchange.context, encodings, opinions) for exchange in exchanges],
        items=[_item(reply, texts[reply], opinions[reply]) for reply in replies],
        vectors=np.stack([encodings[reply].sentence for reply in replies]),
    )


def opinions(
    phrases: Iterable[str], encodings: dict[str, Encoding], fleet: Fleet, progress: Progress
) -> dict[str, tuple[Annotation, ...]]:
    """What the heads that a reply's own text is asked (nlu/retrieval/judge.py) say of each phrase alone."""
    heads = Fleet(head for head in fleet.heads.values() if isinstance(head, SentenceHead))
    different = list(dict.fromkeys(phrases))
    found: dict[str, tuple[Annotation, ...]] = {}
    for done, phrase in enumerate(different, 1):
        found[phrase] = heads.annotate(Heard.alone(phrase, encodings[phrase]))
        progress(done, len(different))
    return found


def _situation(
    context: Sequence[str], encodings: dict[str, Encoding], opinions: dict[str, tuple[Annotation, ...]]
) -> Situation:
    *before, query = context
    turns = [
        Turn(_ROLES[ago % 2], phrase, encodings[phrase].sentence)  # two people, so they take turns
        for ago, phrase in zip(range(len(before), 0, -1), before, strict=True)
    ]
    return Situation(query, encodings[query].sentence, opinions[query], turns)


def _item(phrase: str, text: str, annotations: Sequence[Annotation]) -> ReplyItem:
    judged = tuple(  # as a build keeps them
        Judged(annotation.name, label.label, label.score)
        for annotation in annotations
        for rank, label in enumerate(annotation.labels[:TOP])
        if rank == 0 or label.score >= AT_LEAST
    )
    return ReplyItem(
        id=phrase, text=text, prompt="", weight=1.0, emotion="", tags=(), persona_mask=EVERYONE, surface_mask=EVERYONE,
        valid_from=None, valid_until=None, labels=judged, blocked="",
    )  # fmt: skip
