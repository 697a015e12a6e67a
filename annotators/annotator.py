"""What every head sees (Heard), what it answers (Annotation), and the one small interface they all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from annotators.head import Spec

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the vectorizer knows of one phrase.

    Every number has been rounded to float16 on its way out of the vectorizer, so a fresh Encoding and one that went
    through a cache are the same bits. A token is a word of the tokenizer's pre-tokenizer (the mean of its pieces).
    """

    sentence: FloatArray  # [dim], unit length up to float16 rounding
    tokens: FloatArray | None = None  # [tokens, token_dim]; None where they were not asked for
    offsets: NDArray[np.int32] | None = None  # [tokens, 2] code points of the phrase, end exclusive

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        extra = 0 if self.tokens is None or self.offsets is None else self.tokens.nbytes + self.offsets.nbytes
        return self.sentence.nbytes + extra


class Status(Enum):
    """Whether an annotation may be believed. A head that failed says so; it never answers zero instead."""

    OK = "ok"
    DEGRADED = "degraded"
    SKIPPED = "skipped"
    ERROR = "error"


class Label(NamedTuple):
    """A label with its calibrated score; `accepted` means at or above the label's threshold."""

    label: str
    score: float
    accepted: bool
    raw_score: float
    threshold: float


class Span(NamedTuple):
    """A stretch of the phrase, in code points, end exclusive."""

    label: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Annotation:
    """One head's answer. No accepted label means that the head abstains."""

    name: str
    kind: str
    status: Status
    labels: tuple[Label, ...] = ()  # best first
    spans: tuple[Span, ...] = ()  # left to right
    disagreement: float = 0.0  # 0..1 between hypotheses
    out_of_scope: float | None = None  # calibrated; None where the head has no such score
    version: str = ""
    note: str = ""
    restored: str = ""  # the text with punctuation and case, from heads that restore them


class HeardTurn(NamedTuple):
    """An earlier turn, encoded."""

    role: str  # "user" or "assistant"
    encoding: Encoding


@dataclass(frozen=True, slots=True)
class Heard:
    """One user turn as the heads see it: n-best phrases with their Encodings and weights, and the turns before."""

    phrases: tuple[str, ...]
    encodings: tuple[Encoding, ...]
    weights: tuple[float, ...]  # sum to 1, one per hypothesis
    best: int  # index of the heaviest hypothesis
    context: tuple[HeardTurn, ...] = ()  # oldest first

    @classmethod
    def alone(cls, phrase: str, encoding: Encoding, context: Sequence[HeardTurn] = ()) -> Heard:
        """A turn with one hypothesis."""
        return cls((phrase,), (encoding,), (1.0,), 0, tuple(context))


class Annotator(Protocol):
    """A head that answers for itself. Linear sentence heads answer through the Fleet's single product instead."""

    @property
    def spec(self) -> Spec:
        """The head's head.json."""
        ...

    @property
    def version(self) -> str:
        """Digest of the head's files."""
        ...

    def annotate(self, heard: Heard) -> Annotation:
        """Answer one turn; thread-safe."""
        ...
