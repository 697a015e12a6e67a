"""`Replies`, the one thing users of this package hold: a vector and a situation in, the best replies out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from index.filters import Allowed, Filters
from index.items import ITEMS_FILE, Items, ReplyItem
from index.layout import read_layout
from index.matrix import Matrix, Pages
from index.search import Hits, Index, check_k
from index.sharded import ShardedIndex

QUICK_ROWS = 20_000  # scanning more takes longer than other callers of one event loop should wait


class Hit(NamedTuple):
    """A proposed reply, and how close its best prompt came."""

    item: ReplyItem
    similarity: float
    row: int


class Retriever(Protocol):
    """Replies that can be searched, wherever they are kept. Thread-safe."""

    @property
    def dim(self) -> int: ...

    @property
    def personas(self) -> tuple[str, ...]: ...

    @property
    def surfaces(self) -> tuple[str, ...]: ...

    @property
    def quick(self) -> bool:
        """Whether a search takes so little that an event loop may wait for it."""
        ...

    def __len__(self) -> int:
        """Rows, not replies."""
        ...

    def moment(self, as_of: datetime) -> int:
        """A number for the stretch of time around `as_of` in which the same replies are valid."""
        ...

    def search(
        self,
        vector: NDArray[np.float32],
        k: int,
        *,
        persona: str | None,
        surface: str | None,
        as_of: datetime,
        avoid: Collection[str] = (),
        tags: Collection[str] = (),
    ) -> list[Hit]:
        """See `Replies.search`."""
        ...

    def said(self, hits: Sequence[Hit]) -> NDArray[np.float32]:
        """`[hits, dim]`: vectors of the replies' own texts, of unit length up to rounding."""
        ...


class Replies:
    """An index, its items and its filters, from one folder: a `Retriever` on this machine. Immutable."""

    def __init__(self, index: Index, items: Items, filters: Filters, said: NDArray[np.float16]) -> None:
        """`said` is `[replies, padded]`, one row for each text that can be said."""
        self.index = index
        self.items = items
        self.filters = filters
        self._said = said

    @classmethod
    def load(cls, folder: Path, *, placement: str = "cpu", pages: Pages = "own") -> Replies:
        """Everything in the folder, or `IndexInvalid`; `placement` and `pages` as in `ShardedIndex.load`."""
        layout = read_layout(folder)
        index = ShardedIndex.load(folder, layout=layout, placement=placement, pages=pages)
        # Of the texts' vectors a few are read for each answer, so their pages are let go once they have been checked.
        said = Matrix.load(folder, layout.said, layout.dim, placed=lambda number, rows: True).array
        if not layout.said:
            said = index.rows
        items = Items.load(
            folder / ITEMS_FILE,
            sha256=layout.items_sha256,
            rows=layout.items,
            vectors=layout.rows,
            said=len(said),
        )
        return cls(index, items, Filters(items, layout.personas, layout.surfaces), said)

    @property
    def dim(self) -> int:
        return self.index.dim

    @property
    def personas(self) -> tuple[str, ...]:
        return self.filters.personas

    @property
    def surfaces(self) -> tuple[str, ...]:
        return self.filters.surfaces

    @property
    def quick(self) -> bool:
        return len(self.items) <= QUICK_ROWS or getattr(self.index, "graph", None) is not None

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
        tags: Collection[str] = (),
    ) -> list[Hit]:
        """The k best replies that may be said, each by its best row; exactly k when that many may be.

        Filters apply before the search, so a crowd of forbidden rows never hides an allowed one. Equal
        similarities go by weight, then by id. Raises `ValueError` for an unknown persona or surface, a naive
        `as_of`, or a vector that has no direction or the wrong width.
        """
        check_k(k)
        allowed = self.filters.allow(persona=persona, surface=surface, as_of=as_of, avoid=avoid, tags=tags)
        want = k + 1
        while True:
            hits = self.index.search(vector, want, mask=None if allowed.whole else allowed.mask)
            best = self._best_rows(hits, allowed, k)
            # Every vector in the mask brings a reply, so k of them are enough unless they share replies, or
            # the k-th ties with a vector that was not fetched.
            if len(hits) < want or (len(best) >= k and best[k - 1].similarity > hits.scores[-1]):
                return best[:k]
            want *= 4

    def said(self, hits: Sequence[Hit]) -> NDArray[np.float32]:
        rows = self._said[self.items.said[[hit.row for hit in hits]], : self.dim]
        vectors: NDArray[np.float32] = rows.astype(np.float32)
        return vectors

    def _best_rows(self, hits: Hits, allowed: Allowed, k: int) -> list[Hit]:
        """The first k replies of the hits, each by its best row; equal similarities go by weight, then by id."""
        items, may_say = self.items, allowed.rows
        scores, vectors = hits.scores.tolist(), hits.rows.tolist()
        best: dict[int, Hit] = {}
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
                if may_say[row] and items.replies[row] not in best:
                    best[items.replies[row]] = Hit(items.reply(row), scores[first], row)
            first = after
        return list(best.values())
