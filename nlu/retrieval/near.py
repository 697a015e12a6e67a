"""Which replies say the same: in the same words, or in nearly the same words with nearly the same vector."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from index.build import Entry, Writer
from index.replies import Replies
from index.sharded import ShardedIndex

COSINE = 0.98  # from here on two replies may be one
EXTRA_WORDS = 0.2  # of the longer one: so many may be missing from the shorter
NEIGHBOURS = 8  # looked at for each reply
_BLOCK = 512  # replies searched for together
_NUMBER = re.compile(r"(?<!\w)[-\u2212+]?\d+(?:[.,:/]\d+)*(?:\s?[%‰])?")

# Words that may not be what two replies differ by. Small ones beside each other say the opposite, or another amount.
_NEGATIONS = frozenset(
    "no not nor never none nothing nobody nowhere neither cannot without t hardly barely unless "  # t of don't
    "не нет ни никогда никто ничто ничего никого никому нигде никуда никак нельзя без вряд едва".split()
)
_AMOUNTS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand million "
    "half quarter all every each any some both only almost less more least most "
    "ноль один одна одно два две три четыре пять шесть семь восемь девять десять одиннадцать двенадцать двадцать тридцать "
    "сорок пятьдесят сто тысяча миллион пол полтора четверть весь вся всё все каждый каждая любой оба обе только лишь почти "
    "меньше больше менее более".replace("ё", "е").split()
)

FloatArray = NDArray[np.float32]
Progress = Callable[[int, int], None]


class Pair(NamedTuple):
    """Two replies whose vectors are close, by their numbers."""

    later: int
    earlier: int
    cosine: float


def wording(phrase: str) -> str:
    """The words of a phrase and its numbers as written: equal for phrases that only punctuation and spaces tell apart."""
    numbers = " ".join(_NUMBER.findall(phrase))
    return f"{' '.join(_words(phrase))}\n{numbers}"


def alike(one: str, other: str) -> bool:
    """Whether two phrases differ by so little that, with vectors as close as COSINE, they are one reply.

    The words of one are those of the other in the same order, a few left out; none of these is a number, an amount or a
    negation. A word in the place of another is never little: no vector tells Monday from Tuesday for certain.
    """
    if _NUMBER.findall(one) != _NUMBER.findall(other):
        return False
    short, long = sorted((_words(each.casefold().replace("ё", "е")) for each in (one, other)), key=len)
    left_out = _missing(short, long)
    return (
        left_out is not None
        and len(left_out) <= EXTRA_WORDS * len(long)
        and not any(word in _NEGATIONS or word in _AMOUNTS or not word.isalpha() for word in left_out)
    )


def pairs(
    batches: Iterable[FloatArray], dim: int, *, progress: Progress = lambda done, total: None
) -> list[Pair]:
    """Pairs with a cosine of COSINE or more among vectors `[n, dim]` of all batches, numbered as they come; for each later
    one its closest earlier ones first, of the NEIGHBOURS nearest."""
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder) / "index", dim, personas=(), surfaces=(), kind="auto") as index:
            count = 0
            for vectors in batches:
                numbers = range(count, count + len(vectors))
                index.add([Entry(id=str(i), text=str(i), prompt="") for i in numbers], vectors)
                count += len(vectors)
            index.finish()
        return sorted(_pairs(Replies.load(Path(folder) / "index"), progress), key=_closest)


def _closest(pair: Pair) -> tuple[int, float, int]:
    return pair.later, -pair.cosine, pair.earlier


def _pairs(replies: Replies, progress: Progress) -> Iterable[Pair]:
    index, items = cast(ShardedIndex, replies.index), replies.items
    stored = index.rows[:, : index.dim]  # float16, each distinct vector once
    for start in range(0, len(stored), _BLOCK):
        found = index.search_many(stored[start : start + _BLOCK].astype(np.float32), NEIGHBOURS)
        for vector, hits in enumerate(found, start):
            close = [
                (number, min(score, 1.0))
                for score, row in zip(hits.scores.tolist(), hits.rows.tolist(), strict=True)
                if score >= COSINE
                for number in items.pairs_of(row)
            ]
            for later in items.pairs_of(vector):
                yield from (Pair(later, number, cosine) for number, cosine in close if number < later)
        progress(min(start + _BLOCK, len(stored)), len(stored))


class _Separators(dict[int, int]):
    """For `str.translate`: all that is neither letter, mark, number nor symbol becomes a space."""

    def __missing__(self, code_point: int) -> int:
        kept = unicodedata.category(chr(code_point))[0] in "LMNS"
        self[code_point] = code_point if kept else ord(" ")
        return self[code_point]


_SEPARATORS = _Separators()


def _words(phrase: str) -> list[str]:
    return phrase.casefold().translate(_SEPARATORS).split()


def _missing(short: list[str], long: list[str]) -> list[str] | None:
    """What the longer one has between the words of the shorter; None where the shorter is no part of it."""
    left_out, place = [], 0
    for word in long:
        if place < len(short) and word == short[place]:
            place += 1
        else:
            left_out.append(word)
    return left_out if place == len(short) else None
