"""Who may hear what, where and when: masks against the rule spelled out row by row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.filters import Filters
from index.items import EVERYONE, Items, micros
from index.shard import IndexInvalid

PERSONAS = ("calm", "lively")
SURFACES = ("speaker", "tv", "car")
DAY = timedelta(days=1)
START = datetime(2026, 12, 1, tzinfo=UTC)
Row = tuple[int, int, int | None, int | None]


def items_of(rows: list[Row]) -> Items:
    """Rows of (persona mask, surface mask, first day, last day); days count from START."""
    count = len(rows)

    def instants(days: list[int | None]) -> list[int | None]:
        return [None if day is None else micros(START + day * DAY) for day in days]

    return Items.of(
        {
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
        }
    )


def filters_of(rows: list[Row]) -> Filters:
    return Filters(items_of(rows), PERSONAS, SURFACES)


def rows_in(mask: NDArray[np.uint8]) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()


masks = st.sampled_from([EVERYONE, 1, 2, 3])
days = st.tuples(st.none() | st.integers(0, 4), st.none() | st.integers(5, 9))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(masks, masks, days), max_size=20),
    st.lists(st.sampled_from(["r0", "r3", "x"]), max_size=3),
)
def test_filters_equal_the_rule_spelled_out(
    drawn: list[tuple[int, int, tuple[int | None, int | None]]], avoid: list[str]
) -> None:
    rows: list[Row] = [(persona, surface, *span) for persona, surface, span in drawn]
    filters = filters_of(rows)
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
        ]
        as_of = START + day * DAY
        mask = filters.mask(persona=persona, surface=surface, as_of=as_of)
        assert mask.shape == ((len(rows) + 7) // 8,)
        assert rows_in(mask) == expected
        assert filters.allowed(persona=persona, surface=surface, as_of=as_of) == len(expected)
        left = [number for number in expected if f"r{number // 2}" not in avoid]
        assert rows_in(filters.mask(persona=persona, surface=surface, as_of=as_of, avoid=avoid)) == left


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
    assert rows_in(filters.mask(persona=None, surface=None, as_of=START + offset)) == open_rows
    elsewhere = (START + offset).astimezone(timezone(timedelta(hours=-9)))
    assert rows_in(filters.mask(persona=None, surface=None, as_of=elsewhere)) == open_rows


def test_filters_hand_out_one_mask_per_interval() -> None:
    filters = filters_of([(EVERYONE, EVERYONE, 0, 5)])

    def at(day: float) -> NDArray[np.uint8]:
        return filters.mask(persona="calm", surface="tv", as_of=START + day * DAY)

    assert at(1) is at(4.5)
    assert at(1) is not at(6)
    assert at(1) is not filters.mask(persona="lively", surface="tv", as_of=START + DAY)


def test_filters_masks_cannot_be_spoilt_by_a_caller() -> None:
    filters = filters_of([(EVERYONE, EVERYONE, None, None)])
    mask = filters.mask(persona=None, surface=None, as_of=START)
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 0
    avoiding = filters.mask(persona=None, surface=None, as_of=START, avoid={"r0"})
    assert rows_in(avoiding) == []
    assert rows_in(filters.mask(persona=None, surface=None, as_of=START)) == [0]


def test_filters_of_nothing_have_an_empty_mask() -> None:
    filters = filters_of([])
    assert filters.mask(persona="calm", surface=None, as_of=START).shape == (0,)
    assert filters.allowed(persona="calm", surface=None, as_of=START) == 0


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
    filters.mask(persona="calm", surface="car", as_of=START)  # the control
    with pytest.raises(ValueError, match=message):
        filters.mask(persona=persona, surface=surface, as_of=START)


def test_filters_refuse_a_naive_clock() -> None:
    with pytest.raises(ValueError, match="time zone"):
        filters_of([]).mask(persona=None, surface=None, as_of=datetime(2026, 1, 1))


def test_filters_refuse_items_that_name_more_personas_than_there_are() -> None:
    rows: list[Row] = [(EVERYONE, EVERYONE, None, None), (1 << 2, EVERYONE, None, None)]
    Filters(items_of(rows), ("a", "b", "c"), SURFACES)  # the control: the third persona exists
    with pytest.raises(IndexInvalid, match="persona_mask row 1: found 0x4"):
        Filters(items_of(rows), PERSONAS, SURFACES)


def test_filters_reach_the_thirty_second_persona() -> None:
    personas = tuple(f"p{i}" for i in range(32))
    filters = Filters(items_of([(1 << 31, EVERYONE, None, None)]), personas, SURFACES)
    assert rows_in(filters.mask(persona="p31", surface=None, as_of=START)) == [0]
    assert rows_in(filters.mask(persona="p30", surface=None, as_of=START)) == []
