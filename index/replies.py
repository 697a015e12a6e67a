"""`Replies`, the one thing users of this package hold: a vector and a situation in, the best replies out."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.filters import Allowed, Filters
from index.items import ITEMS_FILE, Items, ReplyItem
from index.search import Hits, Index, check_k
from index.sharded import ShardedIndex, read_layout


class Hit(NamedTuple):
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

    @classmethod
    def load(cls, folder: Path) -> Replies:
        """Everything in the folder, or `IndexInvalid`."""
        layout = read_layout(folder)
        index = ShardedIndex.load(folder)
        items = Items.load(folder / ITEMS_FILE, rows=layout.items, vectors=layout.rows)
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

    def moment(self, as_of: datetime) -> int:
        """A number for the stretch of time around `as_of` in which the same replies are valid."""
        return self.filters.moment(as_of)

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
        allowed = self.filters.allow(persona=persona, surface=surface, as_of=as_of, avoid=avoid)
        want = k + 1
        while True:
            hits = self.index.search(vector, want, mask=allowed.mask)
            best = self._best_rows(hits, allowed, k)
            # Every vector in the mask brings a reply, so k of them are enough unless they share replies, or
            # the k-th ties with a vector that was not fetched.
            if len(hits) < want or (len(best) >= k and best[k - 1].similarity > hits.scores[-1]):
                return best[:k]
            want *= 4

    def _best_rows(self, hits: Hits, allowed: Allowed, k: int) -> list[Hit]:
        """The first k replies of the hits, each by its best row; equal similarities go by weight, then by id."""
        items, may_say = self.items, allowed.rows
        scores, vectors = hits.scores.tolist(), hits.rows.tolist()
        best: dict[str, Hit] = {}
        first = 0
        while first < len(vectors) and len(best) < k:
            rows, after = items.pairs_of(vectors[first]), first + 1
            while after < len(vectors) and scores[after] == scores[first]:
                after += 1
            if after > first + 1:  # vectors that tie answer as one
                rows = items.ordered(
                    [row for vector in vectors[first:after] for row in items.pairs_of(vector)]
                )
            for row in rows:
                if may_say[row] and items.ids[row] not in best:
                    best[items.ids[row]] = Hit(items.reply(row), scores[first], row)
            first = after
        return list(best.values())
