"""nlu.training.sampler: every epoch once, no row twice in a global batch, the same pool on all ranks, resume by number."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.training.sampler import Batch, Pool, Sampler, probabilities


def samplers(pools: list[Pool], ranks: int, seed: int = 7, temperature: float = 2.0) -> list[Sampler]:
    return [
        Sampler(pools, temperature=temperature, seed=seed, rank=rank, ranks=ranks) for rank in range(ranks)
    ]


def global_batches(pool: Pool, ranks: int, steps: int, seed: int = 7) -> list[list[int]]:
    """Rows of all ranks, rank after rank, step by step."""
    every = samplers([pool], ranks, seed)
    return [[int(row) for one in every for row in one.batch(step).rows] for step in range(steps)]


# --- one pool


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("size", [64, 65, 100, 127, 640])
def test_sampler_covers_each_epoch_exactly_once(ranks: int, size: int) -> None:
    pool = Pool("t", "d", size, batch=32 // ranks)
    stream = [row for batch in global_batches(pool, ranks, 5 * size // 32 + 1) for row in batch]
    for epoch in range(4):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2, 90), st.integers(1, 24), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_sampler_holds_no_row_twice_in_a_global_batch(size: int, batch: int, ranks: int, seed: int) -> None:
    if size < 2 * ranks:
        return
    for rows in global_batches(Pool("t", "d", size, batch), ranks, 12, seed):
        assert len(set(rows)) == len(rows)


def test_sampler_without_the_exchange_would_repeat_rows() -> None:
    """Negative control: permutations put end to end do repeat rows in the group that spans two."""
    ends = [np.random.default_rng(seed).permutation(40) for seed in range(20)]
    spans = [[*one[-8:], *other[:8]] for one, other in zip(ends, ends[1:], strict=False)]
    assert any(len(set(span)) < len(span) for span in spans)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sampler_global_batch_does_not_depend_on_the_ranks(ranks: int) -> None:
    alone = global_batches(Pool("t", "d", 1000, batch=64), 1, 40)
    shared = global_batches(Pool("t", "d", 1000, batch=64 // ranks), ranks, 40)
    assert shared == alone


def test_sampler_epochs_and_seeds_differ() -> None:
    pool = Pool("t", "d", 128, batch=64)
    first, second, third, fourth = global_batches(pool, 1, 4)
    assert first + second != third + fourth
    assert global_batches(pool, 1, 4, seed=8)[0] != first


@pytest.mark.parametrize(("size", "ranks", "expected"), [(100, 1, 32), (40, 1, 20), (40, 4, 5), (8, 4, 1)])
def test_sampler_small_pool_gives_smaller_batches(size: int, ranks: int, expected: int) -> None:
    for one in samplers([Pool("t", "d", size, batch=32)], ranks):
        assert len(one.batch(3).rows) == expected


def test_sampler_too_small_pool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t/d: found 7 example\(s\), expected at least 8 for 4 rank"):
        Sampler([Pool("t", "d", 7, batch=2)], temperature=1.0, seed=0, ranks=4)


# --- many pools


POOLS = [
    Pool("intents", "clinc", 1500, 8),
    Pool("intents", "snips", 900, 8),
    Pool("replies", "films", 90000, 16),
    Pool("emotion", "goemotions", 4000, 4),
]


def test_sampler_probabilities_by_hand() -> None:
    pools = [Pool("a", "x", 900, 1), Pool("a", "y", 700, 1), Pool("b", "z", 6400, 1, share=0.5)]
    # T = 2: task a sqrt(1600) = 40, task b 0.5 * sqrt(6400) = 40; inside a: 30 to sqrt(700)
    inside = 30 / (30 + 700**0.5)
    assert probabilities(pools, 2.0) == pytest.approx([0.5 * inside, 0.5 * (1 - inside), 0.5])
    # T = 1: by size, 1600 to 3200
    assert probabilities(pools, 1.0) == pytest.approx([900 / 4800, 700 / 4800, 3200 / 4800])
    # T without end: tasks by share, sets of a task alike
    assert probabilities(pools, 1e9) == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-6)


def test_sampler_a_task_gains_nothing_by_being_cut() -> None:
    whole = [Pool("a", "x", 1000, 1), Pool("b", "z", 1000, 1)]
    cut = [Pool("a", f"x{i}", 100, 1) for i in range(10)] + whole[1:]
    assert probabilities(cut, 3.0)[-1] == pytest.approx(probabilities(whole, 3.0)[-1])


def test_sampler_draws_pools_by_their_probability() -> None:
    sampler = samplers(POOLS, 1)[0]
    steps = 20000
    counts = Counter(sampler.visits(steps))
    for pool, chance in zip(POOLS, sampler.probabilities, strict=True):
        spread = 4 * (steps * chance * (1 - chance)) ** 0.5
        assert abs(counts[pool.name] - steps * chance) <= spread
    assert sum(counts.values()) == steps


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sampler_same_pool_on_every_rank(ranks: int) -> None:
    every = samplers(POOLS, ranks)
    for step in (*range(200), 4095, 4096, 10000):
        batches = [one.batch(step) for one in every]
        assert len({batch.pool.name for batch in batches}) == 1
        assert len({len(batch.rows) for batch in batches}) == 1
        rows = np.concatenate([batch.rows for batch in batches])
        assert len(set(rows)) == len(rows)
        assert rows.max() < batches[0].pool.size


def test_sampler_each_pool_is_covered_among_others() -> None:
    sampler = samplers(POOLS, 1)[0]
    rows: dict[str, list[int]] = {pool.name: [] for pool in POOLS}
    for batch in islice(sampler.stream(), 3000):
        rows[batch.pool.name].extend(map(int, batch.rows))
    for pool in POOLS[:2]:
        assert sorted(rows[pool.name][: pool.size]) == list(range(pool.size))


def same(one: Batch, other: Batch) -> bool:
    return (one.step, one.pool.name) == (other.step, other.pool.name) and np.array_equal(one.rows, other.rows)


@pytest.mark.parametrize("start", [1, 500, 4096, 5000])
def test_sampler_resumes_with_the_same_stream(start: int) -> None:
    labels = np.arange(600) % 30
    pools = [*POOLS, Pool("topics", "x", 600, 12, per_label=3, labels=labels)]
    whole = list(islice(samplers(pools, 2)[1].stream(), start, start + 50))
    resumed = list(islice(samplers(pools, 2)[1].stream(start), 50))  # a new process knows nothing of the old
    assert all(same(one, other) for one, other in zip(whole, resumed, strict=True))
    assert not all(
        same(one, other)
        for one, other in zip(whole, samplers(pools, 2, seed=8)[1].stream(start), strict=False)
    )


def test_sampler_steps_may_be_asked_in_any_order() -> None:
    forwards = [samplers(POOLS, 2)[0].batch(step) for step in range(100)]
    one = samplers(POOLS, 2)[0]
    backwards = [one.batch(step) for step in reversed(range(100))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_sampler_a_new_task_leaves_the_orders_of_others() -> None:
    alone, among = samplers(POOLS[:1], 1)[0], samplers(POOLS, 1)[0]
    theirs = (batch for batch in among.stream() if batch.pool.name == POOLS[0].name)
    for ours, other in zip(islice(alone.stream(), 50), theirs, strict=False):
        assert np.array_equal(ours.rows, other.rows)


# --- batches by label


def by_label(labels: list[int], batch: int, each: int) -> Pool:
    return Pool("intents", "x", len(labels), batch, per_label=each, labels=np.array(labels))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sampler_by_label_has_p_labels_of_k_rows(ranks: int) -> None:
    labels = np.repeat(np.arange(40), 10)
    pool = Pool("intents", "x", 400, batch=15, per_label=3, labels=labels)
    every = samplers([pool], ranks)
    for step in range(60):
        rows = [one.batch(step).rows for one in every]
        for mine in rows:
            assert sorted(Counter(labels[mine].tolist()).values()) == [3] * 5
        together = np.concatenate(rows)
        assert len(set(together)) == len(together)
        assert len(set(labels[together])) == 5 * ranks  # ranks get different labels


@pytest.mark.parametrize("ranks", [1, 2])
def test_sampler_by_label_takes_turns_over_labels_and_rows(ranks: int) -> None:
    labels = np.repeat(np.arange(20), np.arange(6, 26))  # rare and frequent ones
    pool = Pool("intents", "x", len(labels), batch=8 // ranks, per_label=2, labels=labels)
    rows = [row for batch in global_batches(pool, ranks, 20 * 13 // 4) for row in batch]
    seen = Counter(labels[rows].tolist())
    assert max(seen.values()) - min(seen.values()) <= 2  # one turn
    for label in range(20):
        mine = [row for row in rows if labels[row] == label]
        size = label + 6
        for epoch in range(len(mine) // size):
            assert len(set(mine[epoch * size : (epoch + 1) * size])) == size


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sampler_by_label_shares_few_labels_without_sharing_rows(ranks: int) -> None:
    pool = by_label([0] * 100 + [1] * 90 + [2] * 80, batch=16, each=4)
    labels = pool.labels
    assert labels is not None
    for rows in global_batches(pool, ranks, 50):
        assert len(set(rows)) == len(rows) == 12 * ranks  # 3 labels are all there are
        assert Counter(labels[rows].tolist()) == {0: 4 * ranks, 1: 4 * ranks, 2: 4 * ranks}


def test_sampler_by_label_rare_ones_repeat_and_single_ones_are_left_out() -> None:
    pool = by_label([0, 0, 1, 1, 1, 2], batch=8, each=4)
    for rows in global_batches(pool, 1, 20):
        assert set(rows) == {0, 1, 2, 3, 4}
        assert len(rows) == 8


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (Pool("t", "d", 3, 4, per_label=2), "found no labels"),
        (Pool("t", "d", 3, 4, per_label=2, labels=np.array([0, 1])), "found 2 labels"),
        (by_label([0, 0, 1], 4, 2), r"found 1 label\(s\) with two rows"),
    ],
)
def test_sampler_by_label_refuses_what_has_no_pairs(pool: Pool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampler([pool], temperature=1.0, seed=0)


# --- refusals


@pytest.mark.parametrize(
    ("pools", "temperature", "rank", "said"),
    [
        ([], 1.0, 0, "found none"),
        (POOLS, 0.5, 0, "expected at least 1"),
        (POOLS, 1.0, 1, "found 1 of 1"),
        ([POOLS[0], POOLS[0]], 1.0, 0, "lists a data set twice"),
    ],
)
def test_sampler_refuses(pools: list[Pool], temperature: float, rank: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampler(pools, temperature=temperature, seed=0, rank=rank)
