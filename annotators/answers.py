"""What training phrases should be answered with, and what folds say of a head that did not see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold

from annotators.linear import AnyOf, OneOf, Targets

FloatArray = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answers:
    """The labels of training rows. Where labels exclude each other every row has exactly one."""

    names: tuple[str, ...]
    wanted: NDArray[np.bool_]  # [rows, labels]
    exclusive: bool
    weights: FloatArray | None = None  # [rows] how much each counts in training; None: the same

    @classmethod
    def of(
        cls, labels: Sequence[Sequence[str]], *, exclusive: bool = True, at_least: int = 2, weights: FloatArray | None = None
    ) -> Answers:  # fmt: skip
        """Number the labels of the rows; raises ValueError where there is too little to learn a label from."""
        names = tuple(sorted({label for row in labels for label in row}))
        number = {name: i for i, name in enumerate(names)}
        wanted = np.zeros((len(labels), len(names)), np.bool_)
        for i, row in enumerate(labels):
            if exclusive and len(row) != 1:
                raise ValueError(
                    f"row {i + 1}: found {len(row)} labels, expected one, because labels exclude each other"
                )
            wanted[i, [number[label] for label in row]] = True
        fewest = 2 if exclusive else 1
        if len(names) < fewest <= at_least:
            raise ValueError(
                f"labels: found {len(names)} distinct, expected at least {fewest}; add phrases of another label"
            )
        counts = wanted.sum(axis=0)
        if (counts < at_least).any():
            rarest = int(counts.argmin())
            raise ValueError(
                f"label {names[rarest]!r}: found {counts[rarest]} phrase, expected at least {at_least}; "
                "add phrases or drop the label"
            )
        return cls(names, wanted, exclusive, weights)

    @classmethod
    def one(cls, labels: Sequence[str], *, at_least: int = 2) -> Answers:
        """One label a row."""
        return cls.of([(label,) for label in labels], at_least=at_least)

    @property
    def codes(self) -> Rows:
        """[rows] the number of each row's label, where labels exclude each other."""
        codes: Rows = self.wanted.argmax(axis=1)
        return codes

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, rows: Rows) -> Answers:
        """Some of the rows, with the same labels."""
        return replace(
            self, wanted=self.wanted[rows], weights=None if self.weights is None else self.weights[rows]
        )

    def joined(self, other: Answers | None) -> Answers:
        """These rows, then the others, which have the same labels."""
        if other is None:
            return self
        weights = None
        if self.weights is not None or other.weights is not None:
            weights = np.concatenate([_counted(self), _counted(other)])
        return replace(self, wanted=np.concatenate([self.wanted, other.wanted]), weights=weights)

    def balanced(self) -> Answers:
        """The same rows, weighing so that each label counts the same in sum (each row's labels on average)."""
        counts = self.wanted.sum(axis=0)
        of_label = len(self) / (len(self.names) * np.maximum(counts, 1))
        mine = (self.wanted * of_label).sum(axis=1) / np.maximum(self.wanted.sum(axis=1), 1)
        return replace(self, weights=(np.where(mine > 0, mine, 1.0) * _counted(self)).astype(np.float32))

    def targets(self) -> Targets:
        """What the solver minimises."""
        if self.exclusive:
            return OneOf(self.codes, len(self.names), self.weights)
        return AnyOf(self.wanted, None if self.weights is None else self.weights[:, None])

    def folds(self, count: int, seed: int) -> list[tuple[Rows, Rows]]:
        """(seen, unseen) rows of each fold, every label dealt out evenly; fewer folds where a label has fewer rows."""
        if self.exclusive:
            count = max(2, min(count, int(self.wanted.sum(axis=0).min())))
            deal: Iterator[tuple[Rows, Rows]] = StratifiedKFold(count, shuffle=True, random_state=seed).split(
                np.zeros(len(self)), self.codes
            )
        else:
            deal = KFold(min(count, len(self)), shuffle=True, random_state=seed).split(np.zeros(len(self)))
        return list(deal)


def _counted(answers: Answers) -> FloatArray:
    return np.ones(len(answers), np.float32) if answers.weights is None else answers.weights


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Raw scores of rows by models that did not see them, and of outsiders, which no model sees."""

    raw: FloatArray  # [rows, labels]
    strange: FloatArray  # [outsiders, labels]
    cosines: FloatArray  # [rows, labels] to the labels' centroids
    strange_cosines: FloatArray  # [outsiders, labels]

    def take(self, rows: NDArray[np.bool_] | Rows) -> HeldOut:
        """Some of the rows, and all outsiders."""
        return replace(self, raw=self.raw[rows], cosines=self.cosines[rows])
