"""Rows with their vectors: what heads are fitted and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Encoding, HeardTurn, Span
from annotators.answers import Answers
from annotators.fit_token import TaggedEncoding
from annotators.head import GoldenTurn
from nlu.heads.data import Dataset, Row
from nlu.vector_store import VectorStore

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """Some rows, their Encodings, and those of the turns before them."""

    rows: Sequence[Row]
    encodings: Sequence[Encoding]
    contexts: Sequence[Sequence[HeardTurn]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def phrases(self) -> list[str]:
        """[rows]."""
        return [row.phrase for row in self.rows]

    @property
    def vectors(self) -> FloatArray:
        """[rows, dim]."""
        return np.stack([encoding.sentence for encoding in self.encodings])

    @property
    def golden_turns(self) -> list[list[GoldenTurn]]:
        """The turns before each row, as golden phrases keep them."""
        return [[GoldenTurn(role=turn.role, text=turn.text) for turn in row.context] for row in self.rows]

    @property
    def tagged(self) -> list[TaggedEncoding]:
        """The rows as token heads learn them."""
        return [
            TaggedEncoding(row.phrase, encoding, tuple(Span(*mark, 1.0) for mark in row.marks))
            for row, encoding in zip(self.rows, self.encodings, strict=True)
        ]

    def wanted(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """[rows, labels]; a label that is not among the names is nowhere."""
        number = {name: i for i, name in enumerate(names)}
        wanted = np.zeros((len(self.rows), len(names)), np.bool_)
        for i, row in enumerate(self.rows):
            wanted[i, [number[label] for label in row.labels if label in number]] = True
        return wanted

    def known(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """[rows] whether all labels of a row are among the names."""
        return np.array([set(row.labels) <= set(names) for row in self.rows], np.bool_)

    def answers(self, *, exclusive: bool, at_least: int = 2) -> Answers:
        """The rows' labels, numbered; raises ValueError where there is too little to learn from."""
        given = np.array([row.weight for row in self.rows], np.float32)
        weights = None if (given == 1).all() else given
        labels = [row.labels for row in self.rows]
        return Answers.of(labels, exclusive=exclusive, at_least=at_least, weights=weights)

    def joined(self, other: Material) -> Material:
        """These rows, then the others."""
        return Material(
            [*self.rows, *other.rows],
            [*self.encodings, *other.encodings],
            [*self.contexts, *other.contexts],
        )

    def take(self, chosen: Sequence[int]) -> Material:
        """Some of the rows."""
        return Material(
            [self.rows[i] for i in chosen],
            [self.encodings[i] for i in chosen],
            [self.contexts[i] for i in chosen],
        )


@dataclass(frozen=True)
class Materials:
    """Everything one head is made of."""

    train: Material
    dev: Material
    test: Material
    outside: Material  # of train and dev: what thresholds are held against
    outside_test: Material


def encode(data: Dataset, store: VectorStore, *, tokens: bool) -> Materials:
    """Look every phrase up in the store, which encodes what it does not have."""
    parts = {
        "train": data.split("train"),
        "dev": data.split("dev"),
        "test": data.split("test"),
        "outside": [*data.split("train", outside=True), *data.split("dev", outside=True)],
        "outside_test": data.split("test", outside=True),
    }
    phrases = [row.phrase for rows in parts.values() for row in rows]
    known = dict(zip(phrases, store.encode(phrases, tokens), strict=True))
    said = [turn.text for rows in parts.values() for row in rows for turn in row.context]
    turns = [text for text in said if text not in known]
    known |= dict(zip(turns, store.encode(turns, False), strict=True))
    return Materials(**{name: _material(rows, known) for name, rows in parts.items()})


def _material(rows: Sequence[Row], known: dict[str, Encoding]) -> Material:
    return Material(
        rows,
        [known[row.phrase] for row in rows],
        [[HeardTurn(turn.role, known[turn.text]) for turn in row.context] for row in rows],
    )
