"""nlu.bucket against the sum it promises, under a clock that we turn."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlu.bucket import Bucket


class Clock:
    """Nanoseconds, as far as somebody turned it."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@given(
    st.integers(1, 1_000_000),
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(0, 3 * 10**9), st.integers(1, 40)), max_size=50),
)
def test_bucket_agrees_with_exact_fractions(rate: int, burst: int, steps: list[tuple[int, int]]) -> None:
    clock = Clock()
    bucket = Bucket(rate, burst, clock_ns=clock)
    level = Fraction(burst)
    for passed, count in steps:
        clock.now += passed
        level = min(Fraction(burst), level + Fraction(passed * rate, 10**9))
        wait = bucket.take(count)
        if level >= min(count, burst):
            assert wait == 0
            level -= count
        else:
            assert wait == -(-((min(count, burst) - level) * 1000) // rate)


@pytest.mark.parametrize(("rate", "burst"), [(3, 1), (7, 5), (1000, 200), (999_983, 17)])
def test_bucket_gives_exactly_its_rate_to_whoever_asks_all_the_time(rate: int, burst: int) -> None:
    """Asked at odd nanoseconds, tens of thousands of times: no more and no less than burst + rate x time."""
    clock = Clock()
    bucket = Bucket(rate, burst, clock_ns=clock)
    step, taken = 10**9 // rate // 3 + 1, 0
    for _ in range(30_000):
        taken += bucket.take() == 0
        clock.now += step
    assert taken == burst + (clock.now - step) * rate // 10**9


def test_bucket_that_refuses_takes_nothing_and_says_when() -> None:
    clock = Clock()
    bucket = Bucket(10, 2, clock_ns=clock)
    assert [bucket.take() for _ in range(4)] == [0, 0, 100, 100]
    clock.now += 99_999_999
    assert bucket.take() == 1
    clock.now += 1
    assert [bucket.take(), bucket.take()] == [0, 100]


def test_bucket_lends_a_batch_that_is_larger_than_it() -> None:
    clock = Clock()
    bucket = Bucket(10, 2, clock_ns=clock)
    assert bucket.take(32) == 0
    assert bucket.take() == 3100  # 30 owed, and 1 to come


@pytest.mark.parametrize("count", [2, 3, 4, 32])
def test_bucket_gives_a_batch_to_whoever_waits_as_long_as_they_are_told(count: int) -> None:
    """Each try takes one, and then asks for the whole, of which it has that one."""
    clock = Clock()
    bucket = Bucket(10, 4, clock_ns=clock)
    bucket.take(4)
    tries = 0
    while bucket.take() or bucket.take(count, had=1):
        tries += 1
        assert tries < 3
        clock.now += 400_000_000 if count > 4 else count * 100_000_000
    assert bucket.take(5) == 100 * (4 + max(0, count - 4))  # nothing is left of a full one, and what it owes
