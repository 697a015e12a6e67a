"""What comes out of an evaluation: numbers with intervals, lines of them, and the table they make.

`compare` turns what each vectorizer did in one line into its Scores. The same test rows are resampled for all of them
(paired bootstrap, Efron 1979), so that a difference between two has an interval of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlu.training.measures import Statistic

_SEED = 13  # of the resampled rows


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one vectorizer did in one line. `statistic(arange(items))` is its number."""

    task: str
    condition: str
    metric: str
    items: int
    statistic: Statistic
    spread: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A vectorizer's number, its 95 % interval, and how far it is from the first vectorizer's on the same rows."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None  # standard deviation over the draws of a few-shot row
    change: float | None = None  # minus the first vectorizer's; None for that one itself
    change_low: float | None = None
    change_high: float | None = None

    @property
    def verdict(self) -> int:
        """1 above the first vectorizer, -1 below it, 0 where the interval of the change holds both."""
        if self.change_low is None or self.change_high is None:
            return 0
        return 1 if self.change_low > 0 else -1 if self.change_high < 0 else 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; `scores` are in the order of the columns."""

    task: str
    data: str
    language: str
    condition: str
    metric: str
    items: int  # test rows; for cost 0, or phrases timed
    unseen: bool  # no vectorizer is meant to have trained on this set
    scores: tuple[Score, ...]

    @property
    def higher_is_better(self) -> bool:
        """Of megabytes and milliseconds it is not."""
        return self.task != "cost"


@dataclass(frozen=True, slots=True)
class Column:
    """One vectorizer, or one of its truncations (`width` below `dim`)."""

    name: str
    folder: str
    fingerprint: str
    dim: int
    width: int
    precision: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole table, with what it takes to make it again."""

    suite: str
    settings: Mapping[str, Any]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    data: Mapping[str, str]  # file -> SHA-256
    seconds: float

    def line(self, task: str, data: str, condition: str, metric: str) -> Line:
        """The one line of that name. Raises ValueError, saying which there are."""
        wanted = (task, data, condition, metric)
        for line in self.lines:
            if (line.task, line.data, line.condition, line.metric) == wanted:
                return line
        known = "; ".join(f"{line.task}, {line.data}, {line.condition}, {line.metric}" for line in self.lines)
        raise ValueError(
            f"evaluation: found no line {', '.join(wanted)}, expected one of: {known}; choose one"
        )


def compare(outcomes: Sequence[Outcome], resamples: int) -> tuple[Score, ...]:
    """Numbers with percentile intervals; every outcome sees the same resampled rows, so changes are paired."""
    scores: list[Score] = []
    first: NDArray[np.float64] = np.zeros(0)
    for i, outcome in enumerate(outcomes):
        value = outcome.statistic(np.arange(outcome.items))
        drawn = _resampled(outcome, resamples)
        low, high = _interval(drawn)
        if i == 0:
            first = drawn
            scores.append(Score(value, low, high, outcome.spread))
        elif outcome.items == outcomes[0].items:
            change_low, change_high = _interval(drawn - first)
            change = value - scores[0].value
            scores.append(Score(value, low, high, outcome.spread, change, change_low, change_high))
        else:  # a normaliser that refused other rows: nothing to pair
            scores.append(Score(value, low, high, outcome.spread))
    return tuple(scores)


def _resampled(outcome: Outcome, resamples: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(_SEED)  # the same rows for equal numbers of items
    return np.array(
        [outcome.statistic(rng.integers(outcome.items, size=outcome.items)) for _ in range(resamples)]
    )


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
