"""`Replies`, the one thing users of this package hold: a vector and a situation in, the best replies out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.filters import Filters
from index.items import ITEMS_FILE, Items, ReplyItem
from index.search import Hits, Index, check_k
from index.sharded import ShardedIndex, read_layout


@dataclass(frozen=True, slots=True)
class Hit:
    """A proposed reply, and how close its best prompt came."""

    item: ReplyItem
    similarity: float
    row: int


class Replies:
    """An index, its items and its filters, from one folder. Immutable and thread-safe."""

    def __init__(self, index: Index, items: Items, filters: Filters) -> None:
        self.index = index
        self.items = items
        self.filters = filters
        self.max_rows_per_reply = items.max_rows_per_reply

    @classmethod
    def load(cls, folder: Path) -> Replies:
        """Everything in the folder, or `IndexInvalid`."""
        layout = read_layout(folder)
        index = ShardedIndex.load(folder)
        items = Items.load(folder / ITEMS_FILE, rows=layout.rows)
        return cls(index, items, Filters(items, layout.personas, layout.surfaces))

    @property
    def dim(self) -> int:
        return self.index.dim

    @property
    def personas(self) -> tuple[str, ...]:
        return self.filters.personas

    @property
    def surfaces(self) -> tuple[str, ...]:
        return self.filters.surfaces

    def __len__(self) -> int:
        """Rows, not replies."""
        return len(self.items)

    def search(
        self,
        vector: NDArray[np.float32],
        k: int,
        *,
        persona: str | None,
        surface: str | None,
        as_of: datetime,
        avoid: Collection[str] = (),
    ) -> list[Hit]:
        """The k best replies that may be said, each by its best row; exactly k when that many may be.

        Filters apply before the search, so a crowd of forbidden rows never hides an allowed one. Equal
        similarities go by weight, then by id. Raises `ValueError` for an unknown persona or surface, a naive
        `as_of`, or a vector that has no direction or the wrong width.
        """
        check_k(k)
        mask = self.filters.mask(persona=persona, surface=surface, as_of=as_of, avoid=avoid)
        # At worst every one of the k - 1 best replies has all its rows before the first row of the k-th.
        fetch = k * self.max_rows_per_reply + 1
        while True:
            hits = self.index.search(vector, fetch, mask=mask)
            best = self._best_rows(hits)
            # A reply that ties with the k-th may lie beyond the rows fetched, and weigh more.
            if len(hits) < fetch or hits.scores[-1] < best[k - 1][0]:
                break
            fetch *= 2
        weights, ids = self.items.weights, self.items.ids
        best.sort(key=lambda found: (-found[0], -weights[found[1]], ids[found[1]]))
        return [Hit(self.items.reply(row), score, row) for score, row in best[:k]]

    def _best_rows(self, hits: Hits) -> list[tuple[float, int]]:
        """The first, so the best, (score, row) of each reply, descending."""
        ids = self.items.ids
        best: dict[str, tuple[float, int]] = {}
        for score, row in zip(hits.scores.tolist(), hits.rows.tolist(), strict=True):
            best.setdefault(ids[row], (score, row))
        return list(best.values())
