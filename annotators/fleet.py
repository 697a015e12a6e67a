"""All heads over one turn: every linear sentence head in a single matrix product, then the others one by one.

A Fleet is immutable. A head is added, replaced or removed by building the next Fleet aside and swapping one reference,
and no other head's answer changes by a bit: each head owns whole blocks of BLOCK label rows, the product is batched over
blocks of that one shape, and so the arithmetic behind a score never depends on who else is in the fleet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Annotator, Heard, Status
from annotators.head import HeadInvalid
from annotators.outside import logistic
from annotators.sentence import TOP_LABELS, SentenceHead, disagreement, ranking
from annotators.table import Head

logger = logging.getLogger(__name__)

BLOCK = 16
_NEVER = np.float32(-1e30)  # finite, so that a hypothesis of no weight is 0 times it and not NaN


@dataclass(frozen=True)
class Stack:
    """The linear sentence heads side by side. Unused rows of a block score _NEVER and so have probability 0.

    A segment is the blocks of one head's labels, or of its centroids where it goes by them.
    """

    heads: tuple[SentenceHead, ...]
    weight: NDArray[np.float32]  # [blocks, BLOCK, dim]
    bias: NDArray[np.float32]  # [blocks * BLOCK]
    scale: NDArray[np.float32]  # [blocks * BLOCK]
    shift: NDArray[np.float32]  # [blocks * BLOCK]
    starts: NDArray[np.int64]  # [segments] first row of each
    widths: NDArray[np.int64]  # [segments] rows of each, padding included
    independent: NDArray[np.bool_]  # [blocks * BLOCK] rows of heads whose labels do not exclude each other
    rows: tuple[slice, ...]  # [heads] the rows of each head's labels
    strangers: Strangers | None

    @classmethod
    def of(cls, heads: Sequence[SentenceHead]) -> Stack:
        """Lay the heads out in whole blocks."""
        segments = [segment for head in heads for segment in _segments(head)]
        widths = np.array([-(-len(segment.weight) // BLOCK) * BLOCK for segment in segments], np.int64)
        starts = np.cumsum(widths) - widths
        rows, dim = int(widths.sum()), heads[0].dim if heads else 0
        weight = np.zeros((rows, dim), np.float32)
        bias = np.full(rows, _NEVER, np.float32)
        scale = np.ones(rows, np.float32)
        shift = np.zeros(rows, np.float32)
        independent = np.zeros(rows, np.bool_)
        for segment, start in zip(segments, starts.tolist(), strict=True):
            mine = slice(start, start + len(segment.weight))
            weight[mine], bias[mine] = segment.weight, segment.bias
            scale[mine], shift[mine] = segment.scale, segment.shift
            independent[mine] = segment.independent
        own = [i for i, segment in enumerate(segments) if segment.labels]
        return cls(
            heads=tuple(heads),
            weight=weight.reshape(rows // BLOCK, BLOCK, dim),
            bias=bias,
            scale=scale,
            shift=shift,
            starts=starts,
            widths=widths,
            independent=independent,
            rows=tuple(
                slice(starts[i], starts[i] + len(head.spec.labels))
                for i, head in zip(own, heads, strict=True)
            ),
            strangers=Strangers.of(heads, own),
        )

    def raw(self, sentences: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores [hypotheses, rows] of sentence vectors [hypotheses, dim]: the one product."""
        product = np.matmul(self.weight, sentences.T)  # [blocks, BLOCK, hypotheses]
        raw: NDArray[np.float32] = product.reshape(-1, len(sentences)).T + self.bias
        return raw

    def scores(self, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Calibrated scores of all heads at once, softmax or logistic where labels do not exclude, [hypotheses, rows];
        and the score of being outside of each head that has one, [hypotheses, strangers]."""
        logits = raw * self.scale + self.shift
        peaks = np.maximum.reduceat(logits, self.starts, axis=1)  # [hypotheses, segments]
        logits -= np.repeat(peaks, self.widths, axis=1)
        powers = np.exp(logits)
        sums = np.add.reduceat(powers, self.starts, axis=1)
        result: NDArray[np.float32] = powers / np.repeat(sums, self.widths, axis=1)
        if self.independent.any():
            margin = raw[:, self.independent] * self.scale[self.independent] + self.shift[self.independent]
            result[:, self.independent] = logistic(margin)
        outside = np.zeros((len(raw), 0), np.float32)
        if self.strangers is not None:
            outside = self.strangers.scores(peaks, sums)
        return result, outside


class _Segment(NamedTuple):
    weight: NDArray[np.float32]  # [rows, dim]
    bias: NDArray[np.float32]
    scale: Sequence[float]
    shift: Sequence[float]
    independent: bool
    labels: bool  # or centroids


def _segments(head: SentenceHead) -> list[_Segment]:
    spec = head.spec
    labels = _Segment(head.weight, head.bias, spec.scale, spec.shift, not spec.exclusive, labels=True)
    if head.centroids is None:
        return [labels]
    count = len(head.centroids)
    nothing = np.zeros(count, np.float32)
    return [labels, _Segment(head.centroids, nothing, [1.0] * count, [0.0] * count, False, labels=False)]


@dataclass(frozen=True)
class Strangers:
    """The heads of a stack that say how sure they are that a phrase is none of theirs; see annotators.outside."""

    numbers: dict[int, int]  # which of the stack's heads -> which column here
    labels: NDArray[np.int64]  # [strangers] segment of the labels
    centroids: NDArray[np.int64]  # [strangers] segment of the centroids; any, where the head has none
    coefficients: NDArray[np.float32]  # [3, strangers] of MEASURES
    shift: NDArray[np.float32]  # [strangers]

    @classmethod
    def of(cls, heads: Sequence[SentenceHead], segments: Sequence[int]) -> Strangers | None:
        """Of a stack's heads, whose labels are these segments; None where no head has such a score."""
        mine = [i for i, head in enumerate(heads) if head.spec.outside is not None]
        if not mine:
            return None
        known = [heads[i].spec.outside for i in mine]
        return cls(
            numbers={i: column for column, i in enumerate(mine)},
            labels=np.array([segments[i] for i in mine], np.int64),
            centroids=np.array([segments[i] + (heads[i].centroids is not None) for i in mine], np.int64),
            coefficients=np.array(
                [(o.max_logit, o.energy, o.centroid) for o in known if o is not None], np.float32
            ).T,
            shift=np.array([o.shift for o in known if o is not None], np.float32),
        )

    def scores(self, peaks: NDArray[np.float32], sums: NDArray[np.float32]) -> NDArray[np.float32]:
        """[hypotheses, strangers] of the segments' largest logits and of their summed exponentials over it."""
        max_logit = peaks[:, self.labels]
        energy = max_logit + np.log(sums[:, self.labels])
        by_logit, by_energy, by_centroid = self.coefficients
        known = by_logit * max_logit + by_energy * energy + by_centroid * peaks[:, self.centroids]
        return logistic(self.shift - known)


class Answered(NamedTuple):
    """What a fleet says to one turn."""

    live: tuple[Annotation, ...]
    shadows: Callable[[], tuple[Annotation, ...]]  # computed when called, from any thread
    # What the live heads took, by kind; the one product counts as sentence.
    seconds: Mapping[str, float] = MappingProxyType({})


class Fleet:
    """The heads of one engine, and their shadows: candidates for a live head of the same name, which answer beside it
    and are heard by nobody but whoever compares the two. Thread-safe, immutable."""

    def __init__(self, heads: Iterable[Head], shadows: Iterable[Head] = ()) -> None:
        self.heads = _by_name(heads)
        self.shadows = _by_name(shadows)
        for name in self.shadows:
            if name not in self.heads:
                raise HeadInvalid(
                    name,
                    found="a shadow without a live head of its name",
                    expected="the head it is compared with",
                    remedy="add that head, or remove the shadow",
                )
        self.names = tuple(self.heads)
        self.kinds = frozenset(head.spec.kind for head in self.heads.values())
        linear = [head for head in self.heads.values() if _is_linear(head)]
        candidates = [head for head in self.shadows.values() if _is_linear(head)]
        self.stack = Stack.of([*linear, *candidates])
        # Which of the stack's heads a name is, among the live ones and among the shadows.
        self._linear = {head.spec.name: i for i, head in enumerate(linear)}
        self._candidates = {head.spec.name: i for i, head in enumerate(candidates, len(linear))}
        self.token_heads = frozenset(
            head.spec.name
            for head in (*self.heads.values(), *self.shadows.values())
            if head.spec.kind == "token"
        )

    def with_head(self, head: Head) -> Fleet:
        """The next fleet, with this head added or in the place of its namesake."""
        return Fleet({**self.heads, head.spec.name: head}.values(), self.shadows.values())

    def without(self, name: str) -> Fleet:
        """The next fleet, without this head and its shadow; raises KeyError."""
        if name not in self.heads:
            raise KeyError(name)
        return Fleet(
            (head for head in self.heads.values() if head.spec.name != name),
            (head for head in self.shadows.values() if head.spec.name != name),
        )

    def needs_tokens(self, wanted: frozenset[str] | None) -> bool:
        """Whether any of the wanted heads (None = all) reads token vectors."""
        return bool(self.token_heads) if wanted is None else not self.token_heads.isdisjoint(wanted)

    def annotate(self, heard: Heard, *, wanted: frozenset[str] | None = None) -> tuple[Annotation, ...]:
        """Every wanted head's answer, in the fleet's order. A head that raises is reported as an error, alone."""
        return self.answer(heard, wanted=wanted).live

    def answer(
        self, heard: Heard, *, wanted: frozenset[str] | None = None, skip: frozenset[str] = frozenset()
    ) -> Answered:
        """What `annotate` returns, and what the shadows of those heads say: their rows are in the same product, and all
        else they cost is left to whoever calls for it, after the reply is given. Heads to `skip` are wanted, and there is
        no time for them: they answer "skipped", and their shadows nothing."""
        began = time.perf_counter()
        scored = self._score(heard, wanted)
        now = time.perf_counter()
        seconds = {"sentence": now - began}
        live = []
        for name, head in self.heads.items():
            if wanted is not None and name not in wanted:
                continue
            if name in skip:
                live.append(_skipped(head))
                continue
            live.append(_guarded(head, heard, scored, self._linear.get(name), logging.ERROR))
            before, now = now, time.perf_counter()
            seconds[head.spec.kind] = seconds.get(head.spec.kind, 0.0) + now - before

        def shadows() -> tuple[Annotation, ...]:
            return tuple(
                # A candidate that always fails must not fill the log of the service; its failures are counted.
                _guarded(head, heard, scored, self._candidates.get(name), logging.DEBUG)
                for name, head in self.shadows.items()
                if (wanted is None or name in wanted) and name not in skip
            )

        return Answered(tuple(live), shadows, seconds)

    def _score(self, heard: Heard, wanted: frozenset[str] | None) -> _Scored | None:
        stack = self.stack
        if not stack.heads or (
            wanted is not None and all(head.spec.name not in wanted for head in stack.heads)
        ):
            return None
        sentences = np.array([encoding.sentence for encoding in heard.encodings])
        raw = stack.raw(sentences)  # [hypotheses, rows]
        scores, outside = stack.scores(raw)
        # Hypotheses are mixed by recogniser confidence; one alone is itself, to the last bit. Not by `@`, whose rounding
        # depends on how many rows there are.
        weights = None if len(sentences) == 1 else np.asarray(heard.weights, np.float32)
        mixed, mixed_raw, strangers = (_mixed(each, weights) for each in (scores, raw, outside))
        return _Scored(stack, scores, weights, mixed, mixed_raw, strangers)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What the one product gave for a turn; a linear head's answer is read off its rows."""

    stack: Stack
    scores: NDArray[np.float32]  # [hypotheses, rows]
    weights: NDArray[np.float32] | None  # [hypotheses]; None for one alone
    mixed: list[float]  # [rows], as are
    mixed_raw: list[float]
    strangers: list[float]  # [strangers]

    def annotation(self, number: int) -> Annotation:
        """The answer of one of the stack's heads."""
        stack = self.stack
        head, mine = stack.heads[number], stack.rows[number]
        spec = head.spec
        columns = {} if stack.strangers is None else stack.strangers.numbers
        stranger = self.strangers[columns[number]] if number in columns else None
        return Annotation(
            spec.name,
            spec.kind,
            Status.OK,
            labels=ranking(spec, self.mixed[mine], self.mixed_raw[mine], top=TOP_LABELS, stranger=stranger),
            out_of_scope=stranger,
            disagreement=0.0
            if self.weights is None
            else disagreement(self.scores[:, mine], self.weights, exclusive=spec.exclusive),
            version=head.version,
        )


def _by_name(heads: Iterable[Head]) -> dict[str, Head]:
    named: dict[str, Head] = {}
    for head in heads:
        if head.spec.name in named:
            raise HeadInvalid(
                head.spec.name, found="two heads of this name", expected="one", remedy="rename one"
            )
        named[head.spec.name] = head
    return named


def _is_linear(head: Head) -> TypeGuard[SentenceHead]:
    return isinstance(head, SentenceHead) and head.hidden is None


def _mixed(each: NDArray[np.float32], weights: NDArray[np.float32] | None) -> list[float]:
    """[...] of [hypotheses, ...]."""
    mixed: list[float] = (each[0] if weights is None else np.add.reduce(weights[:, None] * each)).tolist()
    return mixed


def _skipped(head: Head) -> Annotation:
    return Annotation(head.spec.name, head.spec.kind, Status.SKIPPED, version=head.version, note="no time")


def _guarded(
    head: Annotator, heard: Heard, scored: _Scored | None, column: int | None, level: int
) -> Annotation:
    try:
        if scored is not None and column is not None:
            return scored.annotation(column)
        return head.annotate(heard)
    except Exception as error:  # one head's failure must not take the others' answers with it
        logger.log(level, "head %s failed", head.spec.name, exc_info=True)
        return Annotation(
            head.spec.name,
            head.spec.kind,
            Status.ERROR,
            version=head.version,
            note=f"{type(error).__name__} in this head",
        )
