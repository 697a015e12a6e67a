"""Turns asked of an index as the service asks it: how sure the best reply is, whether it is the true one, how long it took."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.adapter import Adapter
from index.replies import Retriever
from nlu.features import Situation
from nlu.ranker import Ranker
from nlu.retrieval.dialogs import Exchange
from nlu.types import Retrieval

HITS_PER_REPLY = 4  # as the service searches
WARM_UP = 20  # answers that are given again before the clock counts
QUANTILES = tuple(i / 20 for i in range(20))
PERCENTILES = (50, 95, 99)
_BINS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """The best reply to a turn; "" and -1 where none may be said."""

    text: str
    similarity: float
    search_ns: int  # with the adapter
    rank_ns: int


def ask(
    situations: Sequence[Situation],
    retriever: Retriever,
    adapter: Adapter | None,
    ranker: Ranker,
    *,
    persona: str | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Every turn alone, one after another."""

    def answer(situation: Situation) -> Answer:
        began = perf_counter_ns()
        query = situation.vector if adapter is None else adapter.apply(situation.vector)
        hits = retriever.search(
            query,
            Retrieval().top_k * HITS_PER_REPLY,
            persona=persona,
            surface=None,
            as_of=datetime.now(UTC),
        )
        searched = perf_counter_ns()
        best = ranker.rank(hits, situation, retriever.said, k=Retrieval().top_k, explain=False)
        ranked = perf_counter_ns()
        text, similarity = (best[0].text, best[0].similarity) if best else ("", -1.0)
        return Answer(text, similarity, searched - began, ranked - searched)

    for situation in situations[:WARM_UP]:
        answer(situation)
    answers = []
    for done, situation in enumerate(situations, 1):
        answers.append(answer(situation))
        progress(done, len(situations))
    return answers


def coverage(
    answers: Sequence[Answer], exchanges: Sequence[Exchange], phrases: Mapping[str, str] | None
) -> dict[str, Any]:
    """How many turns have a best reply at or above a threshold, for thresholds at quantiles of their similarities.

    `phrases` are those of the index's texts: where the true reply is one of them, precision is how many of the replies at
    or above the threshold are the true ones; None where there is no such turn.
    """
    sure = np.array([answer.similarity for answer in answers])
    held = frozenset() if phrases is None else frozenset(phrases.values())
    known = np.array([exchange.reply in held for exchange in exchanges])
    right = np.array(
        [
            phrases is not None and phrases.get(answer.text) == exchange.reply
            for answer, exchange in zip(answers, exchanges, strict=True)
        ]
    )

    def point(quantile: float, threshold: float) -> dict[str, float | None]:
        above = sure >= threshold
        judged = right[above & known]
        return {
            "quantile": quantile,
            "threshold": threshold,
            "coverage": float(above.mean()),
            "precision": float(judged.mean()) if len(judged) else None,
        }

    return {
        "exchanges": len(answers),
        "known": int(known.sum()),
        "curve": [
            point(quantile, threshold)
            for quantile, threshold in zip(QUANTILES, np.quantile(sure, QUANTILES).tolist(), strict=True)
        ],
    }


def latency(answers: Sequence[Answer]) -> dict[str, Any]:
    """Percentiles in microseconds, of search and of rank, as this machine took them."""
    spent = {
        "search": np.array([answer.search_ns for answer in answers]) / 1000,
        "rank": np.array([answer.rank_ns for answer in answers]) / 1000,
    }
    return {
        "answers": len(answers),
        "cpus": os.cpu_count(),
        "us": {name: _percentiles(each) for name, each in spent.items()},
        "histogram": {name: _histogram(each) for name, each in spent.items()},
    }


def _percentiles(spent: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{cut}": float(np.percentile(spent, cut)) for cut in PERCENTILES}


def _histogram(spent: NDArray[np.float64]) -> dict[str, list[float]]:
    """Counts in bins of equal ratio: most answers are alike, and few take many times as long."""
    low, high = float(spent.min()), float(spent.max())
    edges = np.geomspace(low, max(high, low * 1.01), _BINS + 1)
    counts, _ = np.histogram(np.clip(spent, edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
