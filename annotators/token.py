"""Heads on token vectors: slots and entities as BIO tags, decoded to spans that carry a score.

A tag is read off a token and its neighbours; Viterbi keeps the sequence legal (an I- tag only continues its own B- or I-).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, Span, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write

OUTSIDE = "O"
WINDOW = (-1, 0, 1)  # a token's own vector and its neighbours'


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """O, then B- and I- of every span label, in the order of the weight rows."""
    return (OUTSIDE, *(f"{part}-{label}" for label in labels for part in "BI"))


def windows(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """[tokens, 3 * token_dim]: the token before, the token, the token after; zeros beyond the edges."""
    count, width = tokens.shape
    padded = np.zeros((count + 2, width), np.float32)
    padded[1:-1] = tokens
    return np.concatenate([padded[1 + shift : 1 + shift + count] for shift in WINDOW], axis=1)


def legal_steps(labels: Sequence[str]) -> NDArray[np.bool_]:
    """[tags, tags]: whether the column's tag may follow the row's."""
    tags = tags_of(labels)
    steps = np.ones((len(tags), len(tags)), np.bool_)
    for j, tag in enumerate(tags):
        if tag.startswith("I-"):
            steps[:, j] = [previous[2:] == tag[2:] for previous in tags]
    return steps


def viterbi(scores: NDArray[np.float32], legal: NDArray[np.bool_]) -> list[int]:
    """The best legal path through log scores [tokens, tags]; an I- tag cannot open the sequence."""
    greedy: list[int] = scores.argmax(axis=1).tolist()
    first_legal = legal[0]  # what may follow O may open a sequence
    if not any(greedy) or legal[[0, *greedy[:-1]], greedy].all():
        return greedy  # the unconstrained optimum is legal, so it is the optimum
    barrier = np.where(legal, np.float32(0.0), np.float32(-np.inf))
    best = np.where(first_legal, scores[0], np.float32(-np.inf))
    back = np.zeros(scores.shape, np.int64)
    for t in range(1, len(scores)):
        arriving = best[:, None] + barrier
        back[t] = arriving.argmax(axis=0)
        best = arriving.max(axis=0) + scores[t]
    path = [int(best.argmax())]
    for t in range(len(scores) - 1, 0, -1):
        path.append(int(back[t, path[-1]]))
    return path[::-1]


@dataclass(frozen=True)
class TokenHead:
    """Spans from BIO tags over `windows` of token vectors. A span's score is the mean probability of its tokens' tags."""

    spec: Spec
    weight: NDArray[np.float32]  # [tags, 3 * token_dim]
    bias: NDArray[np.float32]  # [tags]
    version: str = ""
    legal: NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "legal", legal_steps(self.spec.labels))

    @classmethod
    def load(cls, folder: Path) -> TokenHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        tags = len(tags_of(spec.labels))
        expect_shapes(spec, tensors, {"weight": (tags, None), "bias": (tags,)})
        if tensors["weight"].shape[1] % len(WINDOW):
            raise HeadInvalid(
                spec.name, found=f"weights {tensors['weight'].shape[1]} wide", expected="a multiple of 3"
            )
        return cls(spec, tensors["weight"], tensors["bias"], version)

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        write(
            folder,
            self.spec,
            {"weight": self.weight.astype(np.float16), "bias": self.bias.astype(np.float32)},
        )

    @property
    def token_dim(self) -> int:
        """Width of the token vectors this head reads."""
        return int(self.weight.shape[1]) // len(WINDOW)

    def annotate(self, heard: Heard) -> Annotation:
        """Spans of the best hypothesis, in code points of its phrase."""
        spec, encoding = self.spec, heard.encodings[heard.best]
        if encoding.tokens is None or encoding.offsets is None:
            return Annotation(
                spec.name,
                spec.kind,
                Status.SKIPPED,
                version=self.version,
                note="token vectors were not computed",
            )
        spans = self.decode(encoding.tokens, encoding.offsets)
        return Annotation(spec.name, spec.kind, Status.OK, spans=spans, version=self.version)

    def decode(self, tokens: NDArray[np.float32], offsets: NDArray[np.int32]) -> tuple[Span, ...]:
        """Spans of one phrase, from token vectors [tokens, token_dim] and their offsets."""
        if not len(tokens):
            return ()
        logits = (windows(tokens) @ self.weight.T + self.bias) * np.float32(self.spec.scale[0])
        path = viterbi(logits, self.legal)  # normalising rows would not change the best path
        if not any(path):
            return ()
        chosen = logits[np.arange(len(path)), path]
        peaks = logits.max(axis=1)
        scores = np.exp(chosen - peaks) / np.exp(logits - peaks[:, None]).sum(axis=1)
        return self._spans(path, scores.tolist(), offsets)

    def _spans(self, path: list[int], scores: list[float], offsets: NDArray[np.int32]) -> tuple[Span, ...]:
        spans: list[Span] = []
        first = 0
        while first < len(path):
            last = first
            if path[first]:
                label = (path[first] - 1) // 2
                inside = 2 * label + 2
                while last + 1 < len(path) and path[last + 1] == inside:
                    last += 1
                score = sum(scores[first : last + 1]) / (last + 1 - first)
                if score >= self.spec.thresholds[label]:
                    spans.append(
                        Span(self.spec.labels[label], int(offsets[first, 0]), int(offsets[last, 1]), score)
                    )
            first = last + 1
        return tuple(spans)
