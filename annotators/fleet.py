"""All heads over one turn: every linear sentence head in a single matrix product, then the others one by one.

A Fleet is immutable. A head is added, replaced or removed by building the next Fleet aside and swapping one reference,
and no other head's answer changes by a bit: each head owns whole blocks of BLOCK label rows, the product is batched over
blocks of that one shape, and so the arithmetic behind a score never depends on who else is in the fleet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Annotator, Heard, Status
from annotators.head import HeadInvalid
from annotators.sentence import SentenceHead, ranking
from annotators.table import Head

logger = logging.getLogger(__name__)

BLOCK = 16
TOP_LABELS = 5
_NEVER = np.float32(-1e30)  # finite, so that a hypothesis of no weight is 0 times it and not NaN


@dataclass(frozen=True)
class Stack:
    """The linear sentence heads side by side. Unused rows of a block score _NEVER and so have probability 0."""

    heads: tuple[SentenceHead, ...]
    weight: NDArray[np.float32]  # [blocks, BLOCK, dim]
    bias: NDArray[np.float32]  # [blocks * BLOCK]
    scale: NDArray[np.float32]  # [blocks * BLOCK]
    shift: NDArray[np.float32]  # [blocks * BLOCK]
    starts: NDArray[np.int64]  # [heads] first row of each head
    widths: NDArray[np.int64]  # [heads] rows of each head, padding included
    independent: NDArray[np.bool_]  # [blocks * BLOCK] rows of heads whose labels do not exclude each other
    firsts: tuple[int, ...]  # starts, as plain numbers

    @classmethod
    def of(cls, heads: Sequence[SentenceHead]) -> Stack:
        """Lay the heads out in whole blocks."""
        blocks = [-(-len(head.spec.labels) // BLOCK) for head in heads]
        rows = sum(blocks) * BLOCK
        dim = heads[0].dim if heads else 0
        weight = np.zeros((rows, dim), np.float32)
        bias = np.full(rows, _NEVER, np.float32)
        scale = np.ones(rows, np.float32)
        shift = np.zeros(rows, np.float32)
        widths = np.array(blocks, np.int64) * BLOCK
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])[: len(heads)]
        independent = np.zeros(rows, np.bool_)
        for head, start in zip(heads, starts.tolist(), strict=True):
            mine = slice(start, start + len(head.spec.labels))
            independent[mine] = not head.spec.exclusive
            weight[mine], bias[mine] = head.weight, head.bias
            scale[mine], shift[mine] = head.spec.scale, head.spec.shift
        return cls(
            heads=tuple(heads),
            weight=weight.reshape(sum(blocks), BLOCK, dim),
            bias=bias,
            scale=scale,
            shift=shift,
            starts=starts,
            widths=widths,
            independent=independent,
            firsts=tuple(starts.tolist()),
        )

    def raw(self, sentences: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw scores [hypotheses, rows] of sentence vectors [hypotheses, dim]: the one product."""
        product = np.matmul(self.weight, sentences.T)  # [blocks, BLOCK, hypotheses]
        raw: NDArray[np.float32] = product.reshape(-1, len(sentences)).T + self.bias
        return raw

    def scores(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrated scores [hypotheses, rows] of all heads at once: softmax, or logistic where labels do not exclude."""
        logits = raw * self.scale + self.shift
        logits -= np.repeat(np.maximum.reduceat(logits, self.starts, axis=1), self.widths, axis=1)
        powers = np.exp(logits)
        result: NDArray[np.float32] = powers / np.repeat(
            np.add.reduceat(powers, self.starts, axis=1), self.widths, axis=1
        )
        if self.independent.any():
            margin = raw[:, self.independent] * self.scale[self.independent] + self.shift[self.independent]
            with np.errstate(over="ignore"):  # far below zero the score is 0
                result[:, self.independent] = 1 / (1 + np.exp(-margin))
        return result


class Fleet:
    """The heads of one engine. Thread-safe, immutable."""

    def __init__(self, heads: Iterable[Head]) -> None:
        self.heads: dict[str, Head] = {}
        for head in heads:
            if head.spec.name in self.heads:
                raise HeadInvalid(
                    head.spec.name, found="two heads of this name", expected="one", remedy="rename one"
                )
            self.heads[head.spec.name] = head
        self.names = tuple(self.heads)
        self.stack = Stack.of([head for head in self.heads.values() if isinstance(head, SentenceHead)])
        self.single: tuple[Annotator, ...] = tuple(
            head for head in self.heads.values() if not isinstance(head, SentenceHead)
        )
        self.token_heads = frozenset(name for name, head in self.heads.items() if head.spec.kind == "token")

    def with_head(self, head: Head) -> Fleet:
        """The next fleet, with this head added or in the place of its namesake."""
        return Fleet({**self.heads, head.spec.name: head}.values())

    def without(self, name: str) -> Fleet:
        """The next fleet, without this head; raises KeyError."""
        if name not in self.heads:
            raise KeyError(name)
        return Fleet(head for head in self.heads.values() if head.spec.name != name)

    def needs_tokens(self, wanted: frozenset[str] | None) -> bool:
        """Whether any of the wanted heads (None = all) reads token vectors."""
        return bool(self.token_heads) if wanted is None else not self.token_heads.isdisjoint(wanted)

    def annotate(self, heard: Heard, *, wanted: frozenset[str] | None = None) -> tuple[Annotation, ...]:
        """Every wanted head's answer, in the fleet's order. A head that raises is reported as an error, alone."""
        answers = {annotation.name: annotation for annotation in self._stacked(heard, wanted)}
        for head in self.single:
            if wanted is None or head.spec.name in wanted:
                answers[head.spec.name] = _guarded(head, heard)
        return tuple(answers[name] for name in self.names if name in answers)

    def _stacked(self, heard: Heard, wanted: frozenset[str] | None) -> list[Annotation]:
        stack = self.stack
        if not stack.heads or (
            wanted is not None and all(head.spec.name not in wanted for head in stack.heads)
        ):
            return []
        sentences = np.array([encoding.sentence for encoding in heard.encodings])
        raw = stack.raw(sentences)  # [hypotheses, rows]
        scores = stack.scores(raw)
        # Hypotheses are mixed by recogniser confidence; one alone is itself, to the last bit. Not by `@`, whose rounding
        # depends on how many rows there are.
        weights = None if len(sentences) == 1 else np.asarray(heard.weights, np.float32)
        mixed = (scores[0] if weights is None else np.add.reduce(weights[:, None] * scores)).tolist()
        mixed_raw = (raw[0] if weights is None else np.add.reduce(weights[:, None] * raw)).tolist()
        answers = []
        for head, start in zip(stack.heads, stack.firsts, strict=True):
            spec = head.spec
            if wanted is not None and spec.name not in wanted:
                continue
            mine = slice(start, start + len(spec.labels))
            answers.append(
                Annotation(
                    spec.name,
                    spec.kind,
                    Status.OK,
                    labels=ranking(spec, mixed[mine], mixed_raw[mine], top=TOP_LABELS),
                    disagreement=0.0
                    if weights is None
                    else _disagreement(scores[:, mine], weights, exclusive=spec.exclusive),
                    version=head.version,
                )
            )
        return answers


def _disagreement(scores: NDArray[np.float32], weights: NDArray[np.float32], *, exclusive: bool) -> float:
    """Jensen-Shannon divergence of the hypotheses' answers [hypotheses, labels] over its largest possible value, the
    entropy of the weights (Lin 1991): 0 where every hypothesis says the same, 1 where each says something else.

    Labels that do not exclude each other are yes-or-no answers each; the head disagrees as much as its worst label.
    """
    possible = float(_entropy(weights))
    if possible < 1e-6:
        return 0.0
    answers = (
        scores[:, None, :] if exclusive else np.stack([scores, 1 - scores], axis=-1)
    )  # [.., questions, options]
    mixed = np.tensordot(weights, answers, axes=1)  # [questions, options]
    spread = _entropy(mixed) - weights @ _entropy(answers)
    return min(1.0, max(0.0, float(spread.max()) / possible))


def _entropy(distributions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last axis, in nats."""
    terms = distributions * np.log(np.where(distributions > 0, distributions, 1))
    result: NDArray[np.float32] = -terms.sum(axis=-1)
    return result


def _guarded(head: Annotator, heard: Heard) -> Annotation:
    try:
        return head.annotate(heard)
    except Exception as error:  # one head's failure must not take the others' answers with it
        logger.exception("head %s failed", head.spec.name)
        return Annotation(
            head.spec.name,
            head.spec.kind,
            Status.ERROR,
            version=head.version,
            note=f"{type(error).__name__} in this head",
        )
