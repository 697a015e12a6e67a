"""What vectors cost: megabytes on disk, and milliseconds a phrase as served, one phrase at a time on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlu.training.measures import median_of
from nlu.training.scores import Column, Line, Outcome, Score, compare

TIMED = "clinc150"  # the set whose test phrases are timed
_PASSES = 3


def cost(
    columns: Sequence[Column],
    encoders: Sequence[Callable[..., Any]],
    phrases: Sequence[Sequence[str]],
    resamples: int,
) -> list[Line]:
    """Size of each folder, and the median time of each encoder over its phrases; one entry a vectorizer."""
    size = tuple(Score(column.bytes / 1e6) for column in columns)
    medians = [
        Outcome("cost", "one thread", "ms per phrase", len(times), median_of(times))
        for times in time_each(encoders, phrases)
    ]
    return [
        Line("cost", "", "", "on disk", "MB", 0, False, size),
        Line(
            *("cost", TIMED, "", "one thread", "ms per phrase", len(phrases[0])),
            unseen=False,
            scores=compare(medians, resamples),
        ),
    ]


def time_each(
    encoders: Sequence[Callable[..., Any]],
    phrases: Sequence[Sequence[str]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[NDArray[np.float64]]:
    """Milliseconds of each encoder on each of its phrases, alone and without token vectors.

    Encoders take turns phrase by phrase, and turns at going first, so that whatever else the machine does hits all
    alike and their ratio holds; of several passes a phrase keeps its fastest.
    """
    count = len(phrases[0])
    best = np.full((len(encoders), count), np.inf)
    for number in range(_PASSES):
        for i in range(count):
            for turn in range(len(encoders)):
                which = (turn + i + number) % len(encoders)
                began = clock()
                encoders[which]([phrases[which][i]], tokens=False)
                best[which, i] = min(best[which, i], 1000 * (clock() - began))
    return list(best)
