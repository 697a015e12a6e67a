"""`Filters`: which replies may be said by this persona, on this surface, at this moment, as a bitmap of the
vectors that lead to one.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Collection
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.items import ALWAYS_FROM, ALWAYS_UNTIL, EVERYONE, Items, micros
from index.layout import IndexInvalid

REMEMBERED_MASKS = 32  # three quarters of a megabyte each at 660,000 rows


class Allowed(NamedTuple):
    """What a search may return: vectors as a packed bitmap (lowest bit first), and the rows that hang on them."""

    mask: NDArray[np.uint8]  # [vectors / 8]
    rows: bytes | bytearray  # [rows] 1 where a row may be said; bytes, because single cells of it are read
    whole: bool  # every vector is allowed, so a search needs no mask


class Filters:
    """Which replies of one index may be said when. Thread-safe.

    Validity changes only at the instants named in the items, so between two of them every clock gives one and
    the same mask: it is computed once and handed out read-only, for the index to recognise by identity.
    """

    def __init__(self, items: Items, personas: tuple[str, ...], surfaces: tuple[str, ...]) -> None:
        self.personas = personas
        self.surfaces = surfaces
        self._items = items
        self._persona_bits = _bits("persona", personas, items.persona_masks)
        self._surface_bits = _bits("surface", surfaces, items.surface_masks)
        instants = set(items.valid_from.tolist()) | set(items.valid_until.tolist())
        self._boundaries = sorted(instants - {ALWAYS_FROM, ALWAYS_UNTIL})
        me = weakref.proxy(self)  # as in items.py
        self._remembered = lru_cache(maxsize=REMEMBERED_MASKS)(lambda *asked: me._compute(*asked))

    def allow(
        self,
        *,
        persona: str | None,
        surface: str | None,
        as_of: datetime,
        avoid: Collection[str] = (),
        tags: Collection[str] = (),
    ) -> Allowed:
        """What may be said; a persona or surface of None gets the replies open to all of them.

        With `tags`, only replies that carry one of them. What is blocked is never among them, nor are replies in
        `avoid`; ids that the index does not know are no error, because a dialog may remember replies of an earlier
        bundle.
        """
        allowed = self._remembered(
            _lookup("persona", self._persona_bits, persona),
            _lookup("surface", self._surface_bits, surface),
            self.moment(as_of),
            frozenset(tags),
        )
        avoided = [row for reply_id in avoid for row in self._items.rows_of(reply_id)]
        return self._without(allowed, avoided) if avoided else allowed

    def moment(self, as_of: datetime) -> int:
        """How many of the instants at which validity changes have passed; `ValueError` for a naive clock."""
        return bisect_right(self._boundaries, micros(as_of))

    def _compute(self, persona: int, surface: int, interval: int, tags: frozenset[str]) -> Allowed:
        items = self._items
        as_of = self._boundaries[interval - 1] if interval else ALWAYS_FROM  # the interval's first instant
        rows = (items.persona_masks & np.uint32(persona)) == persona
        rows &= (items.surface_masks & np.uint32(surface)) == surface
        rows &= (items.valid_from <= as_of) & (as_of < items.valid_until)
        rows &= ~items.blocked
        if tags:
            rows &= np.logical_or.reduce([items.with_tag(tag) for tag in tags])
        reached = items.any_of(rows)
        mask = np.packbits(reached, bitorder="little")
        mask.flags.writeable = False
        return Allowed(mask, rows.tobytes(), bool(reached.all()))

    def _without(self, allowed: Allowed, avoided: list[int]) -> Allowed:
        """Only the vectors that lose a row can lose their bit."""
        rows, mask = bytearray(allowed.rows), allowed.mask.copy()
        for row in avoided:
            rows[row] = False
        for vector in {int(self._items.vectors[row]) for row in avoided}:
            if not any(rows[row] for row in self._items.pairs_of(vector)):
                mask[vector >> 3] &= 0xFF ^ (1 << (vector & 7))
        return Allowed(mask, rows, whole=False)


def _bits(kind: str, names: tuple[str, ...], masks: NDArray[np.uint32]) -> dict[str | None, int]:
    """Name to bit; None, who is nobody in particular, needs every bit set."""
    beyond = (masks != EVERYONE) & (masks >= (1 << len(names)))
    if beyond.any():
        row = int(np.argmax(beyond))
        raise IndexInvalid(
            part=f"{kind}_mask row {row}",
            found=f"{int(masks[row]):#x}",
            expected=f"bits of the {len(names)} known: {', '.join(names)}",
            remedy="items and index.json come from two builds: build the index again",
        )
    return {None: EVERYONE, **{name: 1 << bit for bit, name in enumerate(names)}}


def _lookup(kind: str, bits: dict[str | None, int], name: str | None) -> int:
    if name not in bits:
        known = ", ".join(other for other in bits if other) or "none"
        raise ValueError(f"{kind}: found {name!r}, expected one of: {known}; remedy: ask for a known {kind}")
    return bits[name]
