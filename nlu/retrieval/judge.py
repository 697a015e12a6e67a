"""What the heads say of replies' own texts, from their vectors alone: worked out once, when an index is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators.sentence import SentenceHead, linked
from annotators.table import Head
from index.items import Judged
from nlu.errors import EngineRefused

AT_LEAST = 0.1  # score of a label that is kept beside the best one
TOP = 3  # labels of a head that are kept
TOXIC = ("toxicity", "toxic")  # the head and the label that keep a reply from being said


class Opinion(NamedTuple):
    """Of one text."""

    labels: tuple[Judged, ...]
    toxicity: float | None  # None where there is no such head


class Judge:
    """The sentence heads of a bundle; others need more than a vector."""

    def __init__(self, heads: Iterable[Head], fingerprint: str) -> None:
        """Raises EngineRefused for a head of another vectorizer than `fingerprint`."""
        self.heads = [head for head in heads if isinstance(head, SentenceHead)]
        for head in self.heads:
            if head.spec.requires.vectorizer != fingerprint:
                raise EngineRefused(
                    f"head {head.spec.name}", found=f"one of vectorizer {head.spec.requires.vectorizer}",
                    expected=fingerprint, remedy="train the head on this bundle's vectorizer",
                )  # fmt: skip

    @property
    def tells_toxicity(self) -> bool:
        """Whether any head does."""
        return any(head.spec.name == TOXIC[0] and TOXIC[1] in head.spec.labels for head in self.heads)

    def __call__(self, vectors: NDArray[np.float32]) -> list[Opinion]:
        """An opinion of each vector `[texts, dim]`: of each head the best label, and others from AT_LEAST on."""
        labels: list[list[Judged]] = [[] for _ in vectors]
        toxicity: Sequence[float | None] = [None] * len(vectors)
        for head in self.heads:
            name, names = head.spec.name, head.spec.labels
            scores = linked(head.spec, head.raw(vectors))[1]  # [texts, labels]
            order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
            best = np.take_along_axis(scores, order, axis=1)
            for mine, numbers, found in zip(labels, order.tolist(), best.tolist(), strict=True):
                mine += [
                    Judged(name, names[number], score)
                    for rank, (number, score) in enumerate(zip(numbers, found, strict=True))
                    if rank == 0 or score >= AT_LEAST
                ]
            if name == TOXIC[0] and TOXIC[1] in names:
                toxicity = scores[:, names.index(TOXIC[1])].tolist()
        return [Opinion(tuple(mine), told) for mine, told in zip(labels, toxicity, strict=True)]
