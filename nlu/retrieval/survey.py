"""`Survey`: what the first reading of a file finds out, which rows are one reply above all, without holding the file."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from index.items import EVERYONE, Items
from index.layout import Layout
from nlu.errors import InvalidInput
from nlu.normalizer import normalize
from nlu.retrieval.near import wording
from nlu.retrieval.read import Row

Merge = Literal["same", "near", "off"]


class Survey:
    """Replies numbered in the order in which they first come. Memory holds two digests a reply."""

    def __init__(self, merge: Merge, banned: Mapping[str, str] | None = None) -> None:
        """`banned`: ids and phrases that must never be said, with the line that bans each; see `banned_by`."""
        self.rows = 0  # read
        self.prompts = 0  # of all rows
        self.without_prompt = 0  # rows
        self.personas: set[str] = set()
        self.surfaces: set[str] = set()
        self.banned: set[int] = set()  # replies
        self.shared: set[int] = set()  # replies of several rows
        self.matched: set[str] = set()  # lines that banned something
        self.indexed = array("q")  # of each reply that an index has already, its first row there
        self._merge, self._bans = merge, banned or {}
        self._numbers: dict[bytes, int] = {}
        self._ids: dict[bytes, int] = {}
        self._weights = array("d")
        self._tags: dict[int, tuple[str, ...]] = {}
        self._merged: dict[int, int] = {}

    def __len__(self) -> int:
        """Replies met, those merged with others by `unite` too."""
        return len(self._weights)

    def start_with(self, items: Items, layout: Layout, *, uncased: bool) -> None:
        """Number the replies that an index has, so that rows may add prompts to them."""
        columns = ("id", "text", "persona_mask", "surface_mask", "valid_from", "valid_until", "emotion")
        row = 0
        for batch in items.table.select(columns).to_batches(max_chunksize=1024):
            for cells in batch.to_pylist():
                reply = Row(
                    where="", text=cells["text"], phrase=normalize(cells["text"], uncased=uncased).text,
                    id=cells["id"], personas=_names(cells["persona_mask"], layout.personas),
                    surfaces=_names(cells["surface_mask"], layout.surfaces), valid_from=cells["valid_from"],
                    valid_until=cells["valid_until"], emotion=cells["emotion"],
                )  # fmt: skip
                known = len(self)
                number = self._numbers.setdefault(self._key(reply), known)
                self._ids.setdefault(_digest(reply.id), number)
                if number == known:
                    self._weights.append(0.0)
                    self.indexed.append(row)
                    self.shared.add(number)
                row += 1

    def put(self, row: Row) -> str:
        """Take note of a row; what is wrong with it, or ""."""
        known = len(self)
        number = self._numbers.setdefault(self._key(row), known)
        if self._ids.setdefault(_digest(identity(row)), number) != number:
            if number == known:
                del self._numbers[self._key(row)]
            return (
                f"id: found {row.id!r}, which another reply has, expected one of its own; "
                "name it otherwise, or make text, personas, surfaces, times and emotion alike"
            )
        if number == known:
            self._weights.append(row.weight)
        else:
            self.shared.add(number)
            self._weights[number] = max(self._weights[number], row.weight)
        self._note_tags(number, row.tags)
        for name in (identity(row), row.phrase):
            if name in self._bans:
                self.banned.add(number)
                self.matched.add(self._bans[name])
        self.rows += 1
        self.prompts += len(row.prompts)
        self.without_prompt += not row.prompts
        self.personas.update(row.personas)
        self.surfaces.update(row.surfaces)
        return ""

    def unite(self, later: int, earlier: int) -> bool:
        """Make two replies one, unless either is part of another already, or only one of them is banned."""
        if later in self._merged or earlier in self._merged:
            return False
        if (later in self.banned) != (earlier in self.banned):
            return False
        self._merged[later] = earlier
        self._weights[earlier] = max(self._weights[earlier], self._weights[later])
        self._note_tags(earlier, self._tags.pop(later, ()))
        self.shared.add(earlier)
        return True

    def number(self, row: Row) -> int:
        """Of the row's reply as it was met; -1 for a row that was not."""
        return self._numbers.get(self._key(row), -1)

    def kept(self, number: int) -> int:
        """The reply that this one has become part of, or itself."""
        return self._merged.get(number, number)

    def weight(self, number: int) -> float:
        """The heaviest of a reply's rows."""
        return self._weights[number]

    def tags(self, number: int) -> tuple[str, ...]:
        """Those of all rows of a reply, sorted."""
        return self._tags.get(number, ())

    def _note_tags(self, number: int, tags: tuple[str, ...]) -> None:
        before = self._tags.get(number, ())
        if not set(tags) <= set(before):
            self._tags[number] = tuple(sorted({*before, *tags})) if before else tags

    def _key(self, row: Row) -> bytes:
        same = f"{row.phrase}\n{identity(row)}" if self._merge == "off" else wording(row.phrase)
        return _digest(f"{same}\n{occasion(row)}")


def identity(row: Row) -> str:
    """The row's id; without one a digest of its phrase, and of when and by whom it may be said if not always by all."""
    if row.id:
        return row.id
    told = occasion(row)
    return _digest(f"{row.phrase}\n{told}" if told else row.phrase).hex()[:16]


def occasion(row: Row) -> str:
    """When and by whom a reply may be said, and to which mood: equal for equal ones, "" for any."""
    times = [each.isoformat() if each else "" for each in (row.valid_from, row.valid_until)]
    told = [",".join(row.personas), ",".join(row.surfaces), *times, row.emotion]
    return "\t".join(told) if any(told) else ""


def banned_by(lines: Iterable[str], *, uncased: bool) -> dict[str, str]:
    """Lines of ids or texts, by themselves and by their phrases."""
    bans: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines)):
        bans[line] = line
        try:
            bans[normalize(line, uncased=uncased).text] = line
        except InvalidInput:
            continue  # an id need not be a phrase
    return bans


def _names(mask: int, known: Collection[str]) -> tuple[str, ...]:
    if mask == EVERYONE:
        return ()
    return tuple(sorted(name for bit, name in enumerate(known) if mask >> bit & 1))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
