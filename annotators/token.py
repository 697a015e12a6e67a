"""Heads on token vectors: slots and entities as BIO tags, punctuation and case as a label a word.

A tag is read off a token and its neighbours; Viterbi weighs which tag follows which, and keeps the sequence legal (an I-
tag only continues its own B- or I-).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, Span, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write
from annotators.restore import is_written, written

OUTSIDE = "O"
MAX_REACH = 4


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """O, then B- and I- of every span label, in the order of the weight rows."""
    return (OUTSIDE, *(f"{part}-{label}" for label in labels for part in "BI"))


def windows(tokens: NDArray[np.float32], reach: int = 1, *, edges: bool = False) -> NDArray[np.float32]:
    """[tokens, (2 * reach + 1) * token_dim + 2 * edges]: `reach` tokens before, the token, as many after; zeros beyond the edges.

    With `edges` two more columns say whether the token is the first and whether it is the last.
    """
    count, width = tokens.shape
    padded = np.zeros((count + 2 * reach, width), np.float32)
    padded[reach : reach + count] = tokens
    columns = [padded[shift : shift + count] for shift in range(2 * reach + 1)]
    if edges:
        ends = np.zeros((count, 2), np.float32)
        ends[:1, 0] = ends[-1:, 1] = 1
        columns.append(ends)
    return np.concatenate(columns, axis=1)


def legal_steps(tags: Sequence[str]) -> NDArray[np.bool_]:
    """[tags, tags]: whether the column's tag may follow the row's."""
    steps = np.ones((len(tags), len(tags)), np.bool_)
    for j, tag in enumerate(tags):
        if tag.startswith("I-"):
            steps[:, j] = [previous[:2] in ("B-", "I-") and previous[2:] == tag[2:] for previous in tags]
    return steps


def viterbi(scores: NDArray[np.float32], steps: NDArray[np.float32]) -> list[int]:
    """The best path through log scores [tokens, tags], from tag to tag at steps [tags, tags], -inf where it may not go.

    Before the first token everything was outside.
    """
    greedy: list[int] = scores.argmax(axis=1).tolist()
    if not any(greedy) and _outside_is_best(scores, steps):
        return greedy
    taken = steps[[0, *greedy[:-1]], greedy]
    if (taken == steps.max()).all():
        return greedy  # best token by token and best step by step
    best = [scores[0] + steps[0]]
    for row in scores[1:]:
        best.append((best[-1][:, None] + steps).max(axis=0) + row)
    path = [int(best.pop().argmax())]
    while best:  # asked on the way back, one tag a token, rather than kept for all on the way there
        path.append(int((best.pop() + steps[:, path[-1]]).argmax()))
    return path[::-1]


def _outside_is_best(scores: NDArray[np.float32], steps: NDArray[np.float32]) -> bool:
    """Whether every other tag costs a token more than the two steps it changes could ever bring."""
    gain = 2 * (steps.max() - steps[0, 0])
    return bool((scores[:, 0] - scores[:, 1:].max(axis=1) > gain).all())


class Scheme(NamedTuple):
    """How tags stand for spans: runs of B- and I-, or a label a word."""

    tags: tuple[str, ...]
    runs: bool

    @classmethod
    def of(cls, name: str, labels: Sequence[str]) -> Scheme:
        """`bio` or `words`; raises ValueError."""
        if name == "bio":
            return cls(tags_of(labels), runs=True)
        if name == "words":
            return cls((OUTSIDE, *labels), runs=False)
        raise ValueError(f"scheme {name!r}")

    def label(self, tag: int) -> int:
        """The number of the label behind a tag other than O."""
        return (tag - 1) // 2 if self.runs else tag - 1

    def ends(self, path: Sequence[int], first: int) -> int:
        """The last token of the span that begins at token `first`."""
        last = first
        if self.runs:
            inside = 2 * self.label(path[first]) + 2
            while last + 1 < len(path) and path[last + 1] == inside:
                last += 1
        return last


def _scheme(spec: Spec) -> Scheme:
    name = spec.params.get("scheme", "bio")
    try:
        return Scheme.of(name, spec.labels)
    except ValueError as error:
        raise HeadInvalid(
            spec.name, found=f"params.scheme = {name!r}", expected="'bio' or 'words'"
        ) from error


@dataclass(frozen=True)
class TokenHead:
    """Spans from tags over `windows` of token vectors, by Viterbi over learnt transitions.

    A span is as good as its worst token, the one after its end included, because that is where it would have gone on:
    raw score = the smallest log-odds among them, score = logistic(scale * raw + shift), the chance that the span is right.
    """

    spec: Spec
    weight: NDArray[np.float32]  # [tags, features of `windows`]
    bias: NDArray[np.float32]  # [tags]
    transitions: NDArray[np.float32] | None = None  # [tags, tags]; None: only legal or not
    version: str = ""
    scheme: Scheme = field(init=False, repr=False)
    reach: int = field(init=False, repr=False)  # tokens to either side that are read
    edges: bool = field(init=False, repr=False)  # whether the first and the last token are known as such
    temperature: np.float32 = field(init=False, repr=False)
    steps: NDArray[np.float32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scheme, temperature = _scheme(self.spec), self.spec.params.get("temperature", 1.0)
        if not isinstance(temperature, float | int) or not 0 < temperature < 1e3:
            raise HeadInvalid(
                self.spec.name, found=f"params.temperature = {temperature!r}", expected="a number above 0"
            )
        reach = self.spec.params.get("reach", 1)
        if not isinstance(reach, int) or not 0 <= reach <= MAX_REACH:
            raise HeadInvalid(
                self.spec.name,
                found=f"params.reach = {reach!r}",
                expected=f"a whole number from 0 to {MAX_REACH}",
            )
        edges = bool(self.spec.params.get("edges", False))
        if self.weight.shape[1] - 2 * edges < 1 or (self.weight.shape[1] - 2 * edges) % (2 * reach + 1):
            raise HeadInvalid(
                self.spec.name,
                found=f"weights {self.weight.shape[1]} wide",
                expected=f"a multiple of {2 * reach + 1}" + (" and 2 more for the edges" if edges else ""),
            )
        legal = np.where(legal_steps(scheme.tags) | (not scheme.runs), np.float32(0), np.float32(-np.inf))
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "reach", reach)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "temperature", np.float32(temperature))
        object.__setattr__(self, "steps", legal if self.transitions is None else legal + self.transitions)

    @classmethod
    def load(cls, folder: Path) -> TokenHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        tags = len(_scheme(spec).tags)
        shapes: dict[str, tuple[int | None, ...]] = {"weight": (tags, None), "bias": (tags,)}
        if "transitions" in tensors:
            shapes["transitions"] = (tags, tags)
        expect_shapes(spec, tensors, shapes)
        return cls(spec, tensors["weight"], tensors["bias"], tensors.get("transitions"), version)

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        tensors: dict[str, NDArray[Any]] = {
            "weight": self.weight.astype(np.float16),
            "bias": self.bias.astype(np.float32),
        }
        if self.transitions is not None:
            tensors["transitions"] = self.transitions.astype(np.float32)
        write(folder, self.spec, tensors)

    @property
    def token_dim(self) -> int:
        """Width of the token vectors this head reads."""
        return (int(self.weight.shape[1]) - 2 * self.edges) // (2 * self.reach + 1)

    def annotate(self, heard: Heard) -> Annotation:
        """Spans of the best hypothesis, in code points of its phrase."""
        spec, encoding, phrase = self.spec, heard.encodings[heard.best], heard.phrases[heard.best]
        if encoding.tokens is None or encoding.offsets is None:
            return self._skipped("token vectors were not computed")
        restores = bool(spec.params.get("restores"))
        if restores and is_written(phrase):
            return self._skipped("the phrase has punctuation already")
        spans = self.decode(encoding.tokens, encoding.offsets)
        restored = written(phrase, spans) if restores else ""
        return Annotation(
            spec.name, spec.kind, Status.OK, spans=spans, version=self.version, restored=restored
        )

    def _skipped(self, note: str) -> Annotation:
        return Annotation(self.spec.name, self.spec.kind, Status.SKIPPED, version=self.version, note=note)

    def decode(self, tokens: NDArray[np.float32], offsets: NDArray[np.int32]) -> tuple[Span, ...]:
        """Accepted spans of one phrase, from token vectors [tokens, token_dim] and their offsets [tokens, 2]."""
        spec = self.spec
        spans = []
        for label, first, last, raw in self.proposed(tokens):
            score = 1 / (1 + math.exp(-min(max(spec.scale[label] * raw + spec.shift[label], -50.0), 50.0)))
            if score >= spec.thresholds[label]:
                spans.append(Span(spec.labels[label], int(offsets[first, 0]), int(offsets[last, 1]), score))
        return tuple(spans)

    def proposed(self, tokens: NDArray[np.float32]) -> list[tuple[int, int, int, float]]:
        """(label, first token, last token, raw score) of every span on the best path, left to right."""
        if not len(tokens):
            return []
        logits = (
            windows(tokens, self.reach, edges=self.edges) @ self.weight.T + self.bias
        ) * self.temperature
        path = viterbi(logits, self.steps)  # normalising rows would not change the best path
        if not any(path):
            return []
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        chosen = powers[np.arange(len(path)), path]
        rest = powers.sum(axis=1) - chosen
        odds = np.log(np.maximum(chosen, np.float32(1e-9)) / np.maximum(rest, np.float32(1e-9))).tolist()
        found = []
        first = 0
        while first < len(path):
            last = first
            if path[first]:
                last = self.scheme.ends(path, first)
                judged = odds[first : last + 2] if self.scheme.runs else odds[first : last + 1]
                found.append((self.scheme.label(path[first]), first, last, min(judged)))
            first = last + 1
        return found

    def doubt(self, tokens: NDArray[np.float32] | None) -> float:
        """How unsure the head is of its least sure token, 0..1, from token vectors [tokens, token_dim]."""
        if tokens is None or not len(tokens):
            return 0.0
        logits = (
            windows(tokens, self.reach, edges=self.edges) @ self.weight.T + self.bias
        ) * self.temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return float(1 - (powers.max(axis=1) / powers.sum(axis=1)).min())
