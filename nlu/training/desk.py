"""What exams are set from: the rows of the public sets, as much of each as a suite looks at, by fixed draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nlu.public_data import Labelled, Tagged
from nlu.training import datasets
from nlu.training.config import Evaluate
from nlu.training.datasets import Example, Pair, Scored
from nlu.training.measures import Rows

T = TypeVar("T")
SEED = 13  # of everything drawn here; another seed is another benchmark


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a suite looks at; 0: all of it."""

    per_label: int  # training phrases of one intent
    train: int  # training phrases of tasks that are not intents
    tagged: int  # training phrases of token heads, all with a span
    dev: int
    test: int
    resamples: int
    timed: int  # phrases


SIZES: Mapping[str, Sizes] = {
    "quick": Sizes(per_label=16, train=2000, tagged=800, dev=500, test=500, resamples=300, timed=100),
    "full": Sizes(per_label=0, train=0, tagged=0, dev=0, test=0, resamples=1000, timed=400),
}


@dataclass(frozen=True)
class Desk:
    """What exams are prepared from. Draws go by position, so that cased and uncased phrases of a row stay together."""

    data: Path
    settings: Evaluate
    sizes: Sizes
    uncased: bool
    _read: dict[tuple[str, str], tuple[Example, ...]] = field(default_factory=dict, repr=False)

    def all(self, name: str, split: str) -> tuple[Example, ...]:
        """A whole split, read once."""
        if (name, split) not in self._read:
            loaded = datasets.read(name, split, self.data, uncased=self.uncased)
            self._read[name, split] = loaded.examples
        return self._read[name, split]

    def labelled(self, name: str, split: str, limit: int) -> list[Labelled]:
        """Rows of a labelled set, `limit` of them."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Labelled)]

    def tagged(self, name: str, split: str, limit: int) -> list[Tagged]:
        """Rows of a tagged set."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Tagged)]

    def scored(self, name: str, split: str, limit: int) -> list[Scored]:
        """Rows of a similarity set."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Scored)]

    def of_labels(self, name: str, split: str, per_label: int) -> list[Labelled]:
        """`per_label` rows of each label, as they stand; 0: all."""
        rows = self.labelled(name, split, 0)
        if not per_label:
            return rows
        labels = np.array([row.labels[0] for row in rows])
        return [rows[i] for i in sorted(draw_shots(labels, per_label, SEED).tolist())]

    def _some(self, name: str, split: str, limit: int) -> list[Example]:
        return some(self.all(name, split), limit)


def some(items: Sequence[T], limit: int) -> list[T]:
    """`limit` of the items by a fixed draw, in their order; 0: all."""
    if not limit or len(items) <= limit:
        return list(items)
    rows = np.random.default_rng(SEED).permutation(len(items))[:limit]
    return [items[i] for i in np.sort(rows)]


def draw_shots(labels: NDArray[np.str_], shots: int, seed: int) -> Rows:
    """Rows of `shots` examples of each label (fewer where there are fewer), by label.

    A label's draw depends on seed and label alone, and fewer shots are the first of more.
    """
    chosen = []
    for label in np.unique(labels):
        rng = np.random.default_rng([seed, datasets.identity(str(label))])
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:shots])
    return np.concatenate(chosen)


def choose_pairs(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """Up to `limit` pairs in a fixed random order, no anchor and no reply twice: none has two right answers."""
    chosen: list[Pair] = []
    taken: set[str] = set()
    for i in np.random.default_rng(SEED).permutation(len(pairs)):
        pair = pairs[i]
        if len(chosen) < limit and pair.anchor not in taken and pair.positive not in taken:
            taken |= {pair.anchor, pair.positive}
            chosen.append(pair)
    return chosen


def without(rows: Sequence[Labelled], test: Sequence[Labelled]) -> list[Labelled]:
    """Rows that are not in the test split, however they are cased."""
    seen = {row.phrase.casefold() for row in test}
    return [row for row in rows if row.phrase.casefold() not in seen]
