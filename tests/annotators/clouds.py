"""Phrases whose vectors lie around one centre a label, strangers far from all of them, and what a head says of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators import table
from annotators.annotator import Annotation, Heard, HeardTurn
from annotators.answers import Answers
from annotators.fit import About
from annotators.fleet import Fleet
from annotators.table import Head
from tests.annotators.toys import FINGERPRINT, encoded, random_units

ABOUT = About("toy", "test", FINGERPRINT, made_by="tests")
LABELS = ("light", "music", "stop")
DIM = 8
CENTRES = random_units(len(LABELS), DIM, seed=100)


@dataclass(frozen=True)
class Said:
    """Phrases, their vectors [phrases, dim], and the labels of each."""

    texts: list[str]
    vectors: NDArray[np.float32]
    labels: list[tuple[str, ...]]

    @property
    def firsts(self) -> list[str]:
        """The only label of each."""
        return [label for (label,) in self.labels]

    @property
    def answers(self) -> Answers:
        """Of labels that exclude each other."""
        return Answers.one(self.firsts)

    @property
    def several(self) -> Answers:
        """Of labels that do not."""
        return Answers.of(self.labels, exclusive=False)


def cloud(
    noise: float, *, per_label: int = 12, seed: int = 0, labels: Sequence[tuple[str, ...]] | None = None
) -> Said:
    """Phrases of one label each, or of the sets of labels given, in shuffled order; a vector is about the sum of its
    labels' centres."""
    rng = np.random.default_rng(seed)
    rows = [each for each in labels or [(label,) for label in LABELS] for _ in range(per_label)]
    order = rng.permutation(len(rows))
    rows = [rows[i] for i in order]
    holds = np.array([[label in row for label in LABELS] for row in rows])
    vectors = holds @ CENTRES + rng.normal(0, noise, (len(rows), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Said([f"phrase {i}" for i in range(len(rows))], vectors.astype(np.float32), rows)


def strangers(seed: int = 2) -> NDArray[np.float32]:
    """Vectors with nothing of any label's centre in them."""
    basis = np.linalg.qr(CENTRES.T)[0]
    vectors = random_units(60, DIM, seed=seed)
    vectors -= vectors @ basis @ basis.T
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def answer(head: Head, vector: NDArray[np.float32], context: Sequence[HeardTurn] = ()) -> Annotation:
    """What the head says in a fleet."""
    return Fleet([head]).annotate(Heard.alone("", encoded(vector), context))[0]


def best(head: Head, vectors: NDArray[np.float32]) -> list[str]:
    """The best label of each."""
    return [answer(head, vector).labels[0].label for vector in vectors]


def accepted(head: Head, vectors: NDArray[np.float32]) -> list[tuple[str, ...]]:
    """The accepted labels of each, in the order of their names."""
    return [
        tuple(sorted(label.label for label in answer(head, vector).labels if label.accepted))
        for vector in vectors
    ]


def reloaded(head: Head, folder: Path) -> Head:
    """The head as it comes back from its files."""
    head.save(folder)
    return table.load(folder)


def files(head: Head, folder: Path) -> dict[str, bytes]:
    """The head's files."""
    head.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
