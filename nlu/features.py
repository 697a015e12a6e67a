"""What a ranker may look at: named numbers about every hit, worked out from the reply, the user's turn and the turns before.

Only what is asked for is computed. The same code serves and makes the rows that a ranker learns from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation
from index.items import EVERYONE
from index.replies import Hit

RECENT = 3  # turns before the user's that are looked at, but for `repeated`, which looks at all
MOOD_HEAD = "emotion"
_FADES = 0.6  # what a turn counts of the one after it
_SHORT = 3  # letters; the shorter a word, the more often it is met by chance (Zipf, 1935)
_QUESTION = ("?", "\uff1f", "\u061f", "\u037e")  # Latin and Cyrillic, full width, Arabic, Greek
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_REMEMBERED = 8192  # texts whose words are kept: good replies come again and again

FloatArray = NDArray[np.float32]
Said = Callable[[Sequence[Hit]], FloatArray]  # unit vectors [hits, dim] of the replies' own texts


class Turn(NamedTuple):
    """An earlier turn, as it was said."""

    role: str  # "user" or "assistant"
    text: str
    vector: FloatArray  # [dim]


@dataclass(frozen=True, slots=True)
class Situation:
    """The user's turn, and what is known of it."""

    text: str
    vector: FloatArray  # [dim]
    annotations: Sequence[Annotation] = ()
    turns: Sequence[Turn] = ()  # oldest first


@dataclass(frozen=True)
class Features:
    """A choice of features, in order. Immutable and thread-safe.

    Besides `NAMES` there are `query.HEAD.LABEL` and `reply.HEAD.LABEL`: the score of a label among the top labels of the
    user's turn, and among those that the index keeps for the reply; 0 where it is not among them.
    """

    names: tuple[str, ...]
    columns: tuple[tuple[int, Column], ...]
    query_labels: Mapping[tuple[str, str], int]  # (head, label) -> column
    reply_labels: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, names: Sequence[str]) -> Features:
        """These features; raises ValueError for a name that is none, or comes twice."""
        columns: list[tuple[int, Column]] = []
        labels: dict[str, dict[tuple[str, str], int]] = {"query": {}, "reply": {}}
        for place, name in enumerate(names):
            side, head, label = [*name.split(".", 2), "", ""][:3]
            if name in names[:place]:
                raise ValueError(f"features: found {name!r} twice, expected it once; name each feature once")
            if name in _COLUMNS:
                columns.append((place, _COLUMNS[name]))
            elif side in labels and head and label:
                labels[side][head, label] = place
            else:
                raise ValueError(
                    f"features: found {name!r}, expected some of {', '.join(NAMES)},"
                    " query.HEAD.LABEL or reply.HEAD.LABEL; correct the name"
                )
        return cls(tuple(names), tuple(columns), labels["query"], labels["reply"])

    @property
    def labels(self) -> Iterator[tuple[str, str, str]]:
        """(feature, head, label) of every feature that is a head's."""
        for asked in (self.query_labels, self.reply_labels):
            for (head, label), place in asked.items():
                yield self.names[place], head, label

    def table(self, situation: Situation, hits: Sequence[Hit], said: Said) -> FloatArray:
        """The features `[hits, features]`; `said` is called at most once, and only where a feature needs it."""
        columns = np.zeros((len(self.names), len(hits)), np.float32)  # filled along memory
        seen = _Seen(situation, hits, said)
        for place, column in self.columns:
            columns[place] = column(seen)
        if asked := self.query_labels:
            for annotation in situation.annotations:
                for label in annotation.labels:
                    if (place_of := asked.get((annotation.name, label.label))) is not None:
                        columns[place_of] = label.score
        if judged := self.reply_labels:
            found = [
                (place_of, row, score)
                for row, hit in enumerate(hits)
                for head, name, score in hit.item.labels
                if (place_of := judged.get((head, name))) is not None
            ]
            if found:
                places, rows, scores = zip(*found, strict=True)
                columns[places, rows] = scores
        return np.ascontiguousarray(columns.T)


def label_name(side: Literal["query", "reply"], head: str, label: str) -> str:
    """The feature that is this label's score; a head with a dot in its name has none."""
    return f"{side}.{head}.{label}"


def repeats(situation: Situation, hits: Sequence[Hit]) -> list[bool]:
    """Whether the assistant said the very same in the turns sent along; case does not count."""
    said = {turn.text.casefold() for turn in situation.turns if turn.role == "assistant"}
    return [hit.item.text.casefold() in said for hit in hits] if said else [False] * len(hits)


@lru_cache(maxsize=_REMEMBERED)
def words(text: str) -> frozenset[str]:
    """The different words of a text, case-folded."""
    return frozenset(_WORD.findall(text.casefold()))


class _Seen:
    """What several features share, worked out once, when first asked for."""

    def __init__(self, situation: Situation, hits: Sequence[Hit], said: Said) -> None:
        self.situation, self.hits, self._said = situation, hits, said
        self.recent = situation.turns[-RECENT:]

    @cached_property
    def said(self) -> FloatArray:
        return self._said(self.hits)

    @cached_property
    def query(self) -> frozenset[str]:
        return words(self.situation.text)

    @cached_property
    def replies(self) -> list[frozenset[str]]:
        return [words(hit.item.text) for hit in self.hits]

    @cached_property
    def mood(self) -> tuple[str, float]:
        """The mood the user is in, where its head is sure enough to say."""
        for annotation in self.situation.annotations:
            if annotation.name == MOOD_HEAD and annotation.labels and annotation.labels[0].accepted:
                return annotation.labels[0].label, annotation.labels[0].score
        return "", 0.0

    @cached_property
    def spoken(self) -> list[tuple[str, frozenset[str]]]:
        """Role and words of each recent turn."""
        return [(turn.role, words(turn.text)) for turn in self.recent]


Column = Callable[[_Seen], Sequence[float] | NDArray[Any]]


def _similarity(seen: _Seen) -> Sequence[float]:
    return [hit.similarity for hit in seen.hits]


def _reply_similarity(seen: _Seen) -> FloatArray:
    return seen.said @ seen.situation.vector


def _context_similarity(turns_ago: int) -> Column:
    def column(seen: _Seen) -> Sequence[float] | FloatArray:
        turns = seen.situation.turns
        if len(turns) < turns_ago:
            return [0.0] * len(seen.hits)
        return seen.said @ turns[-turns_ago].vector

    return column


def _dialog_similarity(seen: _Seen) -> FloatArray:
    about, share = seen.situation.vector, 1.0
    for turn in reversed(seen.recent):
        share *= _FADES
        about = about + share * turn.vector
    length = float(np.linalg.norm(about))
    return seen.said @ (about / np.float32(length or 1.0))


def _prompt_overlap(seen: _Seen) -> Sequence[float]:
    return [_jaccard(seen.query, words(hit.item.prompt)) for hit in seen.hits]


def _reply_overlap(seen: _Seen) -> Sequence[float]:
    return [_jaccard(seen.query, reply) for reply in seen.replies]


def _context_share(seen: _Seen) -> Sequence[float]:
    met = frozenset[str]().union(*(turn for _, turn in seen.spoken))
    return [len(reply & met) / len(reply) if reply else 0.0 for reply in seen.replies]


def _long_words(seen: _Seen) -> Sequence[float]:
    met = seen.query.union(*(turn for _, turn in seen.spoken))
    long = frozenset(word for word in met if len(word) > _SHORT)
    return [math.log1p(sum(len(word) - _SHORT for word in reply & long)) for reply in seen.replies]


def _reply_length(seen: _Seen) -> Sequence[float]:
    return [math.log1p(len(reply)) for reply in seen.replies]


def _length_ratio(seen: _Seen) -> Sequence[float]:
    query = math.log1p(len(seen.query))
    return [math.log1p(len(reply)) - query for reply in seen.replies]


def _query_asks(seen: _Seen) -> Sequence[float]:
    return [float(seen.situation.text.rstrip().endswith(_QUESTION))] * len(seen.hits)


def _reply_asks(seen: _Seen) -> Sequence[float]:
    return [float(hit.item.text.rstrip().endswith(_QUESTION)) for hit in seen.hits]


def _same_mood(seen: _Seen) -> Sequence[float]:
    mood, strength = seen.mood
    return [strength if hit.item.emotion and hit.item.emotion == mood else 0.0 for hit in seen.hits]


def _other_mood(seen: _Seen) -> Sequence[float]:
    mood, strength = seen.mood
    return [strength if hit.item.emotion and hit.item.emotion != mood else 0.0 for hit in seen.hits]


def _own_voice(seen: _Seen) -> Sequence[float]:
    return [0.0 if hit.item.persona_mask == EVERYONE else 1.0 for hit in seen.hits]


def _weight(seen: _Seen) -> Sequence[float]:
    return [hit.item.weight - 1.0 for hit in seen.hits]


def _repeated(seen: _Seen) -> Sequence[float]:
    return [*map(float, repeats(seen.situation, seen.hits))]


def _overlap_with(role: str) -> Column:
    def column(seen: _Seen) -> Sequence[float]:
        turns = [turn for speaker, turn in seen.spoken if speaker == role]
        if len(turns) == 1:  # most often, and twice as fast
            return [_jaccard(reply, turns[0]) for reply in seen.replies]
        return [max((_jaccard(reply, turn) for turn in turns), default=0.0) for reply in seen.replies]

    return column


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Words in both over words in either (Jaccard, 1901); 0 where there are none."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


_COLUMNS: Mapping[str, Column] = {
    "similarity": _similarity,  # of the query and what the row's vector was made from
    "reply_similarity": _reply_similarity,  # ... and the reply's own text
    **{f"context_similarity_{ago}": _context_similarity(ago) for ago in range(1, RECENT + 1)},
    "dialog_similarity": _dialog_similarity,  # of the reply and the query with the recent turns, older ones fading
    "prompt_overlap": _prompt_overlap,
    "reply_overlap": _reply_overlap,
    "context_share": _context_share,  # of the reply's words, those met in the recent turns
    "assistant_overlap": _overlap_with("assistant"),  # the largest, over recent turns
    "user_overlap": _overlap_with("user"),
    "long_words": _long_words,  # in the reply and in the query or a recent turn: logarithm of their letters beyond three
    "reply_length": _reply_length,  # logarithm of different words
    "length_ratio": _length_ratio,  # ... less that of the query
    "query_asks": _query_asks,
    "reply_asks": _reply_asks,
    "same_mood": _same_mood,  # the reply was written for the mood the user is in: how sure that mood is
    "other_mood": _other_mood,  # ... or for another one
    "own_voice": _own_voice,  # only some personas may say it
    "weight": _weight,  # the editor's preference, 0 = ordinary
    "repeated": _repeated,
}
NAMES = tuple(_COLUMNS)
