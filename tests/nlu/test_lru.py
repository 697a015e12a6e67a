"""nlu.lru: a byte budget that is never exceeded, and the order in which values go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.lru import Lru


def made(budget: int, **values: int) -> Lru[str]:
    """Keys, each under its own name, with sizes."""
    lru = Lru[str](budget)
    for name, size in values.items():
        lru.put(name.encode(), name, size)
    return lru


def held(lru: Lru[str], names: str) -> str:
    return "".join(name for name in names if lru.get(name.encode()) == name)


def test_lru_gives_back_what_was_put() -> None:
    value = object()
    lru = Lru[object](10)
    lru.put(b"a", value, 1)
    assert lru.get(b"a") is value
    assert lru.get(b"b") is None


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(0, ""), (9, ""), (10, "e"), (19, "e"), (20, "de"), (49, "bcde"), (50, "abcde"), (99, "abcde")],
)
def test_lru_stays_within_its_budget(budget: int, kept: str) -> None:
    lru = made(budget, a=10, b=10, c=10, d=10, e=10)
    assert held(lru, "abcde") == kept
    assert (len(lru), lru.nbytes) == (len(kept), 10 * len(kept))


def test_lru_drops_as_many_as_a_large_value_needs() -> None:
    assert held(made(40, a=10, b=10, c=10, d=25), "abcd") == "cd"


def test_lru_keeps_what_was_used_last() -> None:
    lru = made(20, a=10, b=10)
    lru.get(b"a")
    lru.put(b"c", "c", 10)
    assert held(lru, "abc") == "ac"


def test_lru_asking_for_what_is_not_there_changes_nothing() -> None:
    lru = made(20, a=10, b=10)
    lru.get(b"x")
    lru.put(b"c", "c", 10)
    assert held(lru, "abc") == "bc"


def test_lru_a_replaced_value_counts_once() -> None:
    lru = made(100, a=10, b=10)
    lru.put(b"a", "other", 30)
    assert (len(lru), lru.nbytes, lru.get(b"a")) == (2, 40, "other")


def test_lru_a_replaced_value_is_the_most_recent() -> None:
    lru = made(20, a=10, b=10)
    lru.put(b"a", "a", 10)
    lru.put(b"c", "c", 10)
    assert held(lru, "abc") == "ac"


def test_lru_a_value_beyond_the_budget_drops_nobody_else() -> None:
    lru = made(20, a=10, b=10)
    lru.put(b"c", "c", 21)
    assert held(lru, "abc") == "ab"


def test_lru_a_value_that_outgrew_the_budget_is_gone() -> None:
    lru = made(20, a=10, b=10)
    lru.put(b"a", "other", 21)
    assert (lru.get(b"a"), held(lru, "b"), lru.nbytes) == (None, "b", 10)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 9)), max_size=60), st.integers(0, 20)
)
def test_lru_agrees_with_a_plain_list(steps: list[tuple[bool, int, int]], budget: int) -> None:
    lru, twin = Lru[int](budget), list[tuple[int, int]]()  # (name, size), most recent last
    for put, name, size in steps:
        if put:
            lru.put(bytes([name]), name, size)
            twin = [
                *(entry for entry in twin if entry[0] != name),
                *([(name, size)] if size <= budget else []),
            ]
            while sum(size for _, size in twin) > budget:
                twin = twin[1:]
        else:
            assert (lru.get(bytes([name])) == name) == (name in dict(twin))
            twin = sorted(twin, key=lambda entry: entry[0] == name)
    assert (len(lru), lru.nbytes) == (len(twin), sum(size for _, size in twin))
    assert {name for name in range(6) if lru.get(bytes([name])) is not None} == set(dict(twin))
