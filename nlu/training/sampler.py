"""Which examples make the batch of a step, on every rank: a pure function of (seed, step, rank, ranks).

Nothing is stored between steps, so resuming is asking for a later step. One batch holds one pool, that is one data set of
one task, and all ranks draw from the same pool at the same step, because in-batch negatives are gathered across ranks.

    schedule    which pool a step gets: by temperature, so that large sets do not drown small ones
    order       an endless run of seeded permutations of a pool; ranks take neighbouring slices of it
    labels      for contrastive tasks: P labels of K examples each instead of a plain slice
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_BLOCK = 4096  # steps whose pools are drawn at once


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The examples of one data set as one task uses them; a row is an index into them.

    `batch` is what a rank asks for per step. With `per_label` = K > 0 a batch is made of batch // K labels with K
    examples each, and `labels` [size] says which label a row has.
    """

    task: str
    dataset: str
    size: int
    batch: int
    share: float = 1.0  # of the task, relative to the others, on top of its size
    per_label: int = 0
    labels: Rows | None = None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.dataset}"


class Batch(NamedTuple):
    """What one rank computes at one step: rows [batch] of one pool."""

    step: int
    pool: Pool
    rows: Rows


def probabilities(pools: Sequence[Pool], temperature: float) -> NDArray[np.float64]:
    """[pools] chance of each pool: task ~ share * size^(1/T), then a set of the task ~ size^(1/T).

    T = 1 is proportional to size, a large T nearly uniform (multilingual BERT and mT5 sample languages so). Two
    levels, so that a task does not gain by being cut into many sets.
    """
    if temperature < 1.0:
        raise ValueError(
            f"temperature: found {temperature}, expected at least 1; below 1 large sets would drown the others"
        )
    sizes = np.array([pool.size for pool in pools], np.float64)
    tasks = list(dict.fromkeys(pool.task for pool in pools))
    of_task = np.array([tasks.index(pool.task) for pool in pools])
    totals = np.bincount(of_task, weights=sizes)
    shares = np.zeros(len(tasks))
    shares[of_task] = [pool.share for pool in pools]
    by_task = shares * totals ** (1 / temperature)
    by_task /= by_task.sum()
    inside = sizes ** (1 / temperature)
    return np.asarray(by_task[of_task] * inside / np.bincount(of_task, weights=inside)[of_task])


class Sampler:
    """The stream of batches of one rank out of `ranks`. Not thread-safe (it caches permutations).

    Every pool's order is its own (a task added or taken away changes no other's), and with as many rows per step over
    all ranks, more or fewer ranks see the same global batches.
    """

    def __init__(
        self, pools: Sequence[Pool], *, temperature: float, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if not pools:
            raise ValueError(
                "pools: found none, expected at least one; give the config a task with a data set"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: found {rank} of {ranks}, expected 0 to {ranks - 1}; check the launcher")
        if len({pool.name for pool in pools}) < len(pools):
            raise ValueError(
                "pools: found a task that lists a data set twice, expected each once; drop the second"
            )
        self.pools = tuple(pools)
        self.probabilities = probabilities(pools, temperature)
        self._seed = seed
        self._drawers = [
            (_ByLabel if pool.per_label else _Plain)(pool, seed, rank, ranks) for pool in self.pools
        ]
        self._blocks: list[Rows] = []  # pool of each step, _BLOCK steps each
        self._before: list[Rows] = [np.zeros(len(pools), np.int64)]  # visits of each pool before a block

    def batch(self, step: int) -> Batch:
        """The batch of a step. Its pool, its size and, together with the other ranks', its rows are the same everywhere."""
        block, inside = divmod(step, _BLOCK)
        self._draw_up_to(block)
        chosen = int(self._blocks[block][inside])
        visit = int(self._before[block][chosen] + np.count_nonzero(self._blocks[block][:inside] == chosen))
        return Batch(step, self.pools[chosen], self._drawers[chosen].rows(visit))

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Batches from a step on, without end: what resuming from a checkpoint of `start` steps needs."""
        step = start
        while True:
            yield self.batch(step)
            step += 1

    def visits(self, step: int) -> dict[str, int]:
        """How many batches each pool has given before a step, by pool name."""
        block, inside = divmod(step, _BLOCK)
        self._draw_up_to(block)
        here = np.bincount(self._blocks[block][:inside], minlength=len(self.pools))
        counts = self._before[block] + here
        return {pool.name: int(count) for pool, count in zip(self.pools, counts, strict=True)}

    def _draw_up_to(self, block: int) -> None:
        while len(self._blocks) <= block:
            rng = _rng(self._seed, "schedule", len(self._blocks))
            drawn = rng.choice(len(self.pools), size=_BLOCK, p=self.probabilities)
            self._blocks.append(drawn)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.pools)))


class _Plain:
    """Slices of an endless order: every epoch of the pool is covered exactly once by all ranks together.

    A pool of fewer than two global batches gets smaller batches, because a global batch must not hold a row twice.
    """

    def __init__(self, pool: Pool, seed: int, rank: int, ranks: int) -> None:
        self._batch = min(pool.batch, pool.size // (2 * ranks))
        if self._batch < 1:
            raise ValueError(
                f"{pool.name}: found {pool.size} example(s), expected at least {2 * ranks} for {ranks} rank(s); "
                "give the set more rows or leave it out"
            )
        self._step = self._batch * ranks
        self._start = self._batch * rank
        self._order = _Order(pool.size, self._step, seed, pool.name)

    def rows(self, visit: int) -> Rows:
        """[batch] rows of this rank at the pool's visit-th turn."""
        return self._order.take(visit * self._step + self._start, self._batch)


class _ByLabel:
    """P labels with K rows each. Labels take turns, and so do the rows of a label, so rare labels are seen as often.

    With labels enough, ranks get different ones and a label comes again only after all others; with few, every rank
    draws its own and they share the rows of a label. Labels with a single row have no positive and are left out;
    one with fewer than K rows repeats them.
    """

    def __init__(self, pool: Pool, seed: int, rank: int, ranks: int) -> None:
        if pool.labels is None or len(pool.labels) != pool.size:
            raise ValueError(
                f"{pool.name}: found {'no' if pool.labels is None else len(pool.labels)} labels, "
                f"expected one for each of {pool.size} rows; batches by label need them"
            )
        by_label = [np.flatnonzero(pool.labels == label) for label in np.unique(pool.labels)]
        self._members = [rows.astype(np.int64) for rows in by_label if len(rows) > 1]
        if len(self._members) < 2:
            raise ValueError(
                f"{pool.name}: found {len(self._members)} label(s) with two rows or more, expected at least 2; "
                "use a task kind that does not contrast labels"
            )
        self._key = (seed, pool.name)
        self._rank, self._ranks = rank, ranks
        self._each = pool.per_label
        wanted = max(1, pool.batch // pool.per_label)
        self._apart = len(self._members) >= 2 * wanted * ranks  # labels enough for all ranks to differ
        self._labels = min(wanted, len(self._members))
        parts = 1 if self._apart else ranks
        self._turns = _Order(len(self._members), self._labels * ranks, seed, f"{pool.name} labels")
        self._orders = [
            _Order(len(rows), self._each * parts, seed, f"{pool.name} label {rows[0]}")
            for rows in self._members
        ]

    def rows(self, visit: int) -> Rows:
        """[P * K] rows of this rank, label after label."""
        if self._apart:
            start = (visit * self._ranks + self._rank) * self._labels
            labels = self._turns.take(start, self._labels)
            turns = (start + np.arange(self._labels)) // len(self._members)
            part, parts = 0, 1
        else:
            labels = _rng(*self._key, "labels", visit, self._rank).permutation(len(self._members))
            labels = labels[: self._labels]
            turns = np.full(len(labels), visit)
            part, parts = self._rank, self._ranks
        drawn = [
            self._of_label(int(label), int(turn), part, parts)
            for label, turn in zip(labels, turns, strict=True)
        ]
        return np.concatenate(drawn)

    def _of_label(self, label: int, turn: int, part: int, parts: int) -> Rows:
        members, order = self._members[label], self._orders[label]
        if len(members) >= 2 * self._each * parts:
            chosen = order.take((turn * parts + part) * self._each, self._each)
        else:  # too few for an order without repeats: a fresh permutation each turn, from its start where it ends
            places = (part * self._each + np.arange(self._each)) % len(members)
            chosen = order.shuffled(turn)[places]
        return members[chosen]


class _Order:
    """An endless concatenation of permutations of range(size), each seeded by its number.

    Read in groups of `group` (a global batch), the group that spans two permutations would hold rows twice. So rows
    at the head of a permutation that the tail before it already has are exchanged with others from its middle, which
    touches no tail and so needs no history; it takes size >= 2 * group.
    """

    def __init__(self, size: int, group: int, seed: int, name: str) -> None:
        self._size = size
        self._group = group
        self._key = (seed, name)
        self.shuffled = lru_cache(maxsize=3)(self._shuffled)
        self._epoch = lru_cache(maxsize=2)(self._made_distinct)

    def take(self, start: int, count: int) -> Rows:
        """[count] rows from a position on."""
        parts: list[Rows] = []
        while count > 0:
            epoch, inside = divmod(start, self._size)
            part = self._epoch(epoch)[inside : inside + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _shuffled(self, epoch: int) -> Rows:
        rows = _rng(*self._key, "epoch", epoch).permutation(self._size)
        rows.flags.writeable = False
        return rows

    def _made_distinct(self, epoch: int) -> Rows:
        rows = self.shuffled(epoch)
        tail = epoch * self._size % self._group  # rows of the epoch before in the group that spans both
        if not tail or self._size < 2 * self._group:
            return rows
        head = self._group - tail
        before = self.shuffled(epoch - 1)[-tail:]
        twice = np.flatnonzero(np.isin(rows[:head], before))
        if not len(twice):
            return rows
        # `tail` places of the middle hold enough rows that are not in the tail before: it has only `tail` in all
        free = head + np.flatnonzero(~np.isin(rows[head : head + tail], before))[: len(twice)]
        distinct = rows.copy()
        distinct[twice], distinct[free] = rows[free], rows[twice]
        distinct.flags.writeable = False
        return distinct


def _rng(*words: object) -> np.random.Generator:
    """A generator of its own for every purpose; equal words, equal stream, in any process."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
