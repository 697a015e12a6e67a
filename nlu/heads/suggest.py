"""Which phrases of a pool are most worth labelling next: those a head is unsure of, and not all the same.

Greedy: each choice has the largest product of uncertainty and distance to what was chosen before, so that one confusion is
not asked about fifty times.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators.table import Head
from annotators.token import TokenHead
from nlu.heads import verdict
from nlu.heads.material import Material
from nlu.heads.verdict import ClassHead


class Suggestion(NamedTuple):
    """A phrase to label, what the head would say, and how unsure it is."""

    phrase: str
    guess: str
    runner_up: str
    uncertainty: float  # 0..1


def suggest(head: Head, pool: Material, count: int) -> list[Suggestion]:
    """At most `count` phrases of the pool, the most useful first. Raises ValueError for a head that is never unsure."""
    pool = pool.take(list({row.phrase: i for i, row in enumerate(pool.rows)}.values()))
    unsure, guesses = _unsure(head, pool)
    vectors = pool.vectors
    distance = np.ones(len(pool), np.float32)
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        worth = unsure * distance
        worth[chosen] = -1.0
        best = int(worth.argmax())
        if worth[best] <= 0:
            break
        chosen.append(best)
        distance = np.minimum(distance, 1 - vectors @ vectors[best])
    return [Suggestion(pool.rows[i].phrase, *guesses[i], float(unsure[i])) for i in chosen]


def _unsure(head: Head, pool: Material) -> tuple[NDArray[np.float32], list[tuple[str, str]]]:
    """[phrases] uncertainty, and the two likeliest answers of each."""
    if isinstance(head, TokenHead):
        found = [head.doubt(encoding.tokens) for encoding in pool.encodings]
        return np.array(found, np.float32), [("", "")] * len(pool)
    if not isinstance(head, ClassHead):
        raise ValueError(
            f"head {head.spec.name}: found kind {head.spec.kind}, expected one that can be unsure; name another head"
        )
    _, scores, _ = verdict.answers(head, pool)
    names = head.spec.labels
    if not head.spec.exclusive:
        limits = np.array(head.spec.thresholds, np.float32)
        gap = np.abs(scores - limits)
        nearest = gap.argmin(axis=1)
        guesses = [(names[int(scores[i].argmax())], names[int(label)]) for i, label in enumerate(nearest)]
        return np.maximum(0, 1 - gap.min(axis=1)).astype(np.float32), guesses
    order = np.argsort(-scores, axis=1)[:, :2] if len(names) > 1 else np.zeros((len(pool), 2), np.int64)
    rows = np.arange(len(pool))
    margin = scores[rows, order[:, 0]] - (scores[rows, order[:, 1]] if len(names) > 1 else 0)
    return (1 - margin).astype(np.float32), [(names[int(a)], names[int(b)]) for a, b in order]
