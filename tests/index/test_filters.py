"""Who may hear what, where and when: masks against the rule spelled out row by row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.filters import Allowed, Filters
from index.items import EVERYONE, Items, micros
from index.layout import IndexInvalid

PERSONAS = ("calm", "lively")
SURFACES = ("speaker", "tv", "car")
DAY = timedelta(days=1)
START = datetime(2026, 12, 1, tzinfo=UTC)
Row = tuple[int, int, int | None, int | None]
OPEN: Row = (EVERYONE, EVERYONE, None, None)


def items_of(rows: list[Row], hangs_on: list[int] | None = None, **columns: list[Any]) -> Items:
    """Rows of (persona mask, surface mask, first day, last day); days count from START.

    Rows 2n and 2n + 1 propose reply rn. Each row has a vector of its own unless `hangs_on` tells.
    """
    count = len(rows)
    vectors = list(range(count)) if hangs_on is None else hangs_on

    def instants(days: list[int | None]) -> list[int | None]:
        return [None if day is None else micros(START + day * DAY) for day in days]

    plain: dict[str, list[Any]] = {
        "vector": vectors,
        "said": [0] * count,
        "id": [f"r{i // 2}" for i in range(count)],
        "text": [f"Reply {i // 2}." for i in range(count)],
        "prompt": [f"prompt {i}" for i in range(count)],
        "persona_mask": [row[0] for row in rows],
        "surface_mask": [row[1] for row in rows],
        "valid_from": instants([row[2] for row in rows]),
        "valid_until": instants([row[3] for row in rows]),
        "weight": [1.0] * count,
        "emotion": [""] * count,
        "tags": [[]] * count,
        "labels": [[]] * count,
        "blocked": [""] * count,
    }
    return Items.of(plain | columns, vectors=len(set(vectors)), said=1)


def filters_of(rows: list[Row], hangs_on: list[int] | None = None, **columns: list[Any]) -> Filters:
    return Filters(items_of(rows, hangs_on, **columns), PERSONAS, SURFACES)


def vectors_in(allowed: Allowed) -> list[int]:
    return np.flatnonzero(np.unpackbits(allowed.mask, bitorder="little")).tolist()


def rows_in(allowed: Allowed) -> list[int]:
    return [row for row, may_say in enumerate(allowed.rows) if may_say]


def anyone(filters: Filters, *avoid: str) -> tuple[list[int], list[int]]:
    """The vectors and the rows that are left for nobody in particular."""
    allowed = filters.allow(persona=None, surface=None, as_of=START, avoid=avoid)
    return vectors_in(allowed), rows_in(allowed)


masks = st.sampled_from([EVERYONE, 1, 2, 3])
days = st.tuples(st.none() | st.integers(0, 4), st.none() | st.integers(5, 9))


tag_sets = st.lists(st.sampled_from(["warm", "film", "чай"]), max_size=2, unique=True)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(masks, masks, days, st.integers(0, 11), tag_sets), max_size=20),
    st.lists(st.sampled_from(["r0", "r3", "x"]), max_size=3),
    st.sets(st.sampled_from([1, 2, 5])),
    tag_sets,
)
def test_filters_equal_the_rule_spelled_out(
    drawn: list[tuple[int, int, tuple[int | None, int | None], int, list[str]]],
    avoid: list[str],
    blocked: set[int],
    tags: list[str],
) -> None:
    """One vector to many: up to twelve of them, so that their bits lie in two bytes."""
    rows: list[Row] = [(persona, surface, *span) for persona, surface, span, _, _ in drawn]
    numbers = sorted({vector for *_, vector, _ in drawn})
    hangs_on = [numbers.index(vector) for *_, vector, _ in drawn]
    carried = [some for *_, some in drawn]
    why = ["rude" if number // 2 in blocked else "" for number in range(len(rows))]
    filters = filters_of(rows, hangs_on, tags=carried, blocked=why)
    for persona, surface, day in product((None, "calm", "lively"), (None, "speaker", "tv"), range(-1, 11)):
        persona_bits = EVERYONE if persona is None else 1 << PERSONAS.index(persona)
        surface_bits = EVERYONE if surface is None else 1 << SURFACES.index(surface)
        expected = [
            number
            for number, (persona_mask, surface_mask, first, last) in enumerate(rows)
            if persona_mask & persona_bits == persona_bits
            and surface_mask & surface_bits == surface_bits
            and (first is None or first <= day)
            and (last is None or day < last)
            and not why[number]
        ]
        as_of = START + day * DAY
        for asked, avoided in product(([], tags), ([], avoid)):
            some = [
                number
                for number in expected
                if f"r{number // 2}" not in avoided and (not asked or set(asked) & set(carried[number]))
            ]
            allowed = filters.allow(persona=persona, surface=surface, as_of=as_of, avoid=avoided, tags=asked)
            assert allowed.mask.shape == ((len(numbers) + 7) // 8,)
            assert len(allowed.rows) == len(rows)
            assert rows_in(allowed) == some
            assert vectors_in(allowed) == sorted({hangs_on[number] for number in some})
            if allowed.whole:
                assert len(vectors_in(allowed)) == len(numbers)


def test_filters_tags_ask_for_any_of_them() -> None:
    filters = filters_of([OPEN] * 4, tags=[["warm"], ["warm", "film"], [], ["film"]])
    for tags, rows in [
        ((), [0, 1, 2, 3]), (("warm",), [0, 1]), (("film", "warm"), [0, 1, 3]), (("none",), []), (("war",), []),
    ]:  # fmt: skip
        allowed = filters.allow(persona=None, surface=None, as_of=START, tags=tags)
        assert rows_in(allowed) == vectors_in(allowed) == rows


def test_filters_blocked_replies_are_for_nobody() -> None:
    filters = filters_of([OPEN] * 4, [0, 0, 0, 1], tags=[["x"]] * 4, blocked=["", "", "rude", "rude"])
    for persona, tags in product((None, "calm"), ((), ("x",))):
        allowed = filters.allow(persona=persona, surface="tv", as_of=START, tags=tags)
        assert (rows_in(allowed), vectors_in(allowed), allowed.whole) == ([0, 1], [0], False)


def test_filters_say_whether_a_search_needs_a_mask() -> None:
    filters = filters_of([OPEN, (1, EVERYONE, None, None), OPEN], [0, 0, 1])
    assert filters.allow(persona=None, surface=None, as_of=START).whole  # each vector leads to something
    assert not filters.allow(persona=None, surface=None, as_of=START, avoid=["r1"]).whole
    assert (
        not filters_of([OPEN, (1, EVERYONE, None, None)]).allow(persona=None, surface=None, as_of=START).whole
    )


@pytest.mark.parametrize(
    ("persona", "surface", "day", "vectors", "rows"),
    [
        ("calm", None, 1, [1, 2, 3], [2, 4, 5, 6, 7]),
        ("calm", None, 2, [1, 2], [2, 5]),
        ("lively", None, 1, [0, 1, 2], [0, 1, 3, 5]),
        ("lively", "tv", 1, [0, 1, 2], [0, 1, 3, 5]),
        (None, None, 1, [2], [5]),
    ],
)
def test_filters_leave_out_a_vector_whose_replies_are_all_forbidden(
    persona: str | None, surface: str | None, day: int, vectors: list[int], rows: list[int]
) -> None:
    """Vector 0 is for the lively alone, 1 has a reply for each, 2 one for all, 3 ends for the calm on day 2."""
    calm: Row = (1, EVERYONE, None, None)
    lively: Row = (2, EVERYONE, None, None)
    promo: Row = (1, EVERYONE, None, 2)
    some = [lively, lively, calm, lively, promo, OPEN, promo, promo]
    filters = filters_of(some, [0, 0, 1, 1, 2, 2, 3, 3])
    allowed = filters.allow(persona=persona, surface=surface, as_of=START + day * DAY)
    assert (vectors_in(allowed), rows_in(allowed)) == (vectors, rows)


def test_filters_avoid_clears_a_vector_only_with_its_last_row() -> None:
    """Vector 8 has replies r0 and r1 and lies in the second byte of the mask; vector 0 has r0 alone."""
    hangs_on = [8, 0, 8, 1, 2, 3, 4, 5, 6, 7]
    filters = filters_of([OPEN] * 10, hangs_on)
    others = [2, 3, 4, 5, 6, 7]
    assert anyone(filters) == ([0, 1, *others, 8], list(range(10)))
    assert anyone(filters, "r0") == ([1, *others, 8], list(range(2, 10)))
    assert anyone(filters, "r1") == ([0, *others, 8], [0, 1, *range(4, 10)])
    assert anyone(filters, "r0", "r1") == (others, list(range(4, 10)))


def test_filters_avoid_counts_only_the_rows_that_were_allowed() -> None:
    """Beside r0, vector 0 has r1 for the calm alone: for the lively r0 is its last."""
    filters = filters_of([OPEN, OPEN, (1, EVERYONE, None, None), OPEN], [0, 1, 0, 1])
    for persona, left in [("lively", [1]), ("calm", [0, 1])]:
        allowed = filters.allow(persona=persona, surface=None, as_of=START, avoid=["r0"])
        assert vectors_in(allowed) == left


@pytest.mark.parametrize(
    ("offset", "open_rows"),
    [
        (timedelta(microseconds=-1), [0]),
        (timedelta(0), [0, 1]),
        (DAY - timedelta(microseconds=1), [0, 1]),
        (DAY, [0]),
    ],
    ids=["before", "first instant", "last instant", "after"],
)
def test_filters_follow_the_clock_to_the_microsecond(offset: timedelta, open_rows: list[int]) -> None:
    filters = filters_of([(EVERYONE, EVERYONE, None, None), (EVERYONE, EVERYONE, 0, 1)])
    elsewhere = (START + offset).astimezone(timezone(timedelta(hours=-9)))
    for as_of in (START + offset, elsewhere):
        allowed = filters.allow(persona=None, surface=None, as_of=as_of)
        assert (rows_in(allowed), vectors_in(allowed)) == (open_rows, open_rows)


def test_filters_hand_out_one_mask_per_interval() -> None:
    filters = filters_of([(EVERYONE, EVERYONE, 0, 5)])

    def at(day: float) -> NDArray[np.uint8]:
        return filters.allow(persona="calm", surface="tv", as_of=START + day * DAY).mask

    assert at(1) is at(4.5)
    assert at(1) is not at(6)
    assert at(1) is not filters.allow(persona="lively", surface="tv", as_of=START + DAY).mask


def test_filters_masks_cannot_be_spoilt_by_a_caller() -> None:
    filters = filters_of([(EVERYONE, EVERYONE, None, None)])
    allowed = filters.allow(persona=None, surface=None, as_of=START)
    with pytest.raises(ValueError, match="read-only"):
        allowed.mask[0] = 0
    assert isinstance(allowed.rows, bytes)
    assert anyone(filters, "r0") == ([], [])
    assert anyone(filters) == ([0], [0])


def test_filters_of_nothing_have_an_empty_mask() -> None:
    filters = filters_of([])
    allowed = filters.allow(persona="calm", surface=None, as_of=START, avoid=["r0"])
    assert (allowed.mask.shape, len(allowed.rows)) == ((0,), 0)


@pytest.mark.parametrize(
    ("persona", "surface", "message"),
    [
        ("grumpy", None, "persona: found 'grumpy', expected one of: calm, lively"),
        ("", None, "persona: found ''"),
        ("calm", "fridge", "surface: found 'fridge', expected one of: speaker, tv, car"),
    ],
)
def test_filters_refuse_unknown_names(persona: str | None, surface: str | None, message: str) -> None:
    filters = filters_of([(EVERYONE, EVERYONE, None, None)])
    filters.allow(persona="calm", surface="car", as_of=START)  # the control
    with pytest.raises(ValueError, match=message):
        filters.allow(persona=persona, surface=surface, as_of=START)


def test_filters_refuse_a_naive_clock() -> None:
    with pytest.raises(ValueError, match="time zone"):
        filters_of([]).allow(persona=None, surface=None, as_of=datetime(2026, 1, 1))


def test_filters_refuse_items_that_name_more_personas_than_there_are() -> None:
    rows: list[Row] = [(EVERYONE, EVERYONE, None, None), (1 << 2, EVERYONE, None, None)]
    Filters(items_of(rows), ("a", "b", "c"), SURFACES)  # the control: the third persona exists
    with pytest.raises(IndexInvalid, match="persona_mask row 1: found 0x4"):
        Filters(items_of(rows), PERSONAS, SURFACES)


def test_filters_reach_the_thirty_second_persona() -> None:
    personas = tuple(f"p{i}" for i in range(32))
    filters = Filters(items_of([(1 << 31, EVERYONE, None, None)]), personas, SURFACES)
    assert rows_in(filters.allow(persona="p31", surface=None, as_of=START)) == [0]
    assert rows_in(filters.allow(persona="p30", surface=None, as_of=START)) == []
