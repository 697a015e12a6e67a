"""How well true replies are ranked among others: candidate sets, places, recall, MRR, and intervals over dialogs.

Training and evaluation share these, so that their numbers compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlu.retrieval.dialogs import Exchange

RESAMPLES = 1000
LEVEL = 0.95  # of every interval


def distinct_replies(exchanges: Sequence[Exchange]) -> list[str]:
    """Each reply once, in the order they first come: what the columns of `candidates` count."""
    return list(dict.fromkeys(exchange.reply for exchange in exchanges))


def candidates(exchanges: Sequence[Exchange], of: int, seed: int) -> NDArray[np.int64]:
    """[exchanges, of] indices into `distinct_replies`, the true one at column 0, the others drawn evenly from the replies
    that its dialog does not have, none twice. Raises ValueError where there are too few."""
    if of < 2:
        raise ValueError(f"of: found {of}, expected at least 2, the true reply and another; raise it")
    number = {reply: i for i, reply in enumerate(distinct_replies(exchanges))}
    own: defaultdict[str, set[int]] = defaultdict(set)
    for exchange in exchanges:
        own[exchange.dialog].add(number[exchange.reply])
    fewest = len(number) - max(map(len, own.values()), default=0)
    if fewest < of - 1:
        raise ValueError(
            f"dialogs: found {fewest} replies outside the longest dialog, expected at least {of - 1} to choose others from;"
            " give more dialogs, or fewer candidates"
        )
    rng = np.random.default_rng(seed)
    sets = np.empty((len(exchanges), of), np.int64)
    for row, exchange in enumerate(exchanges):
        mine = own[exchange.dialog]
        drawn = rng.choice(len(number), of - 1 + len(mine), replace=False)  # enough of them are not mine
        sets[row, 0] = number[exchange.reply]
        sets[row, 1:] = drawn[~np.isin(drawn, list(mine))][: of - 1]
    return sets


def places(scores: NDArray[Any]) -> NDArray[np.int64]:
    """[exchanges] where column 0 of `scores` [exchanges, candidates] stands, from 1; ties count against it. Raises
    ValueError for a score that is not a number."""
    if np.isnan(scores).any():
        raise ValueError("scores: found NaN, expected numbers; check the ranker and its features")
    return np.asarray((scores >= scores[:, :1]).sum(axis=1), np.int64)  # the true one is as good as itself


def recall_at(places: NDArray[np.int64], k: int) -> float:
    """Share of exchanges whose true reply is among the first k."""
    return float((places <= k).mean())


def mrr(places: NDArray[np.int64]) -> float:
    """Mean of 1 / place."""
    return float((1.0 / places).mean())


def interval(values: NDArray[Any], groups: Sequence[str], seed: int) -> tuple[float, float]:
    """95 % interval of the mean of one value an exchange, by the percentile bootstrap over whole groups (Efron 1979; clusters
    as in Davison and Hinkley 1997, 3.8): exchanges of one dialog are no independent witnesses. For a paired difference pass
    the differences. Raises ValueError for fewer than two groups."""
    _, group_of = np.unique(np.asarray(groups, np.object_), return_inverse=True)
    sizes = np.bincount(group_of)
    if len(sizes) < 2:
        raise ValueError(
            f"groups: found {len(sizes)} dialogs, expected at least 2 to draw again from; give more dialogs"
        )
    sums = np.bincount(group_of, np.asarray(values, np.float64))
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(sizes), size=len(sizes))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
