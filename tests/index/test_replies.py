"""The thing users hold: the best replies that may be said, against a brute-force reading of the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.build import Entry, build
from index.exact import ExactIndex
from index.filters import Filters
from index.items import EVERYONE, Items
from index.replies import Replies
from index.shard import IndexInvalid

Floats = NDArray[np.float32]
NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
ANYONE: dict[str, Any] = {"persona": None, "surface": None}


def loaded(folder: Path, entries: list[Entry], vectors: Floats) -> Replies:
    build(entries, vectors, folder, **NAMES)
    return Replies.load(folder)


def directions(angles: list[float]) -> Floats:
    """Vectors at these angles in degrees; the query in these tests looks along 0."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


ALONG = np.array([1.0, 0.0], np.float32)


def ids(replies: Replies, k: int, as_of: datetime, **situation: Any) -> list[str]:
    hits = replies.search(ALONG, k, as_of=as_of, **(ANYONE | situation))
    return [hit.item.id for hit in hits]


def test_replies_load_knows_its_names(folder: Path) -> None:
    replies = Replies.load(folder)
    assert (replies.personas, replies.surfaces) == (("calm", "lively"), ("speaker", "tv"))
    assert (replies.dim, len(replies), replies.max_rows_per_reply) == (20, 20, 1)


def test_replies_hit_carries_the_item_the_cosine_and_the_row(tmp_path: Path, now: datetime) -> None:
    entries = [Entry("far", "Far.", "p0"), Entry("near", "Near.", "p1")]
    [hit] = loaded(tmp_path / "i", entries, directions([90, 60])).search(ALONG * 5, 1, as_of=now, **ANYONE)
    assert (hit.item.id, hit.item.text, hit.item.prompt, hit.row) == ("near", "Near.", "p1", 1)
    assert hit.similarity == pytest.approx(0.5, abs=1e-3)


def test_replies_count_each_reply_once_by_its_best_row(tmp_path: Path, now: datetime) -> None:
    entries = [Entry("a", "A.", f"a{i}") for i in range(4)] + [Entry("b", "B.", "b"), Entry("c", "C.", "c")]
    replies = loaded(tmp_path / "i", entries, directions([4, 1, 2, 3, 30, 40]))
    hits = replies.search(ALONG, 2, as_of=now, **ANYONE)
    assert [(hit.item.id, hit.row) for hit in hits] == [("a", 1), ("b", 4)]
    assert ids(replies, 9, now) == ["a", "b", "c"]


def test_replies_of_equal_similarity_go_by_weight_then_id(tmp_path: Path, now: datetime) -> None:
    entries = [
        Entry(name, name, name, weight=weight) for name, weight in [("d", 1), ("c", 1), ("b", 2), ("a", 1)]
    ]
    replies = loaded(tmp_path / "i", entries, directions([10, 10, 10, 10]))
    assert [ids(replies, k, now) for k in (1, 2, 3, 4)] == [
        ["b"],
        ["b", "a"],
        ["b", "a", "c"],
        ["b", "a", "c", "d"],
    ]


def test_replies_tied_far_beyond_the_first_fetch_still_win_by_weight(tmp_path: Path, now: datetime) -> None:
    entries = [Entry(f"r{i:03d}", f"R{i}.", "p", weight=float(i)) for i in range(200)]
    replies = loaded(tmp_path / "i", entries, directions([10] * 200))
    assert ids(replies, 2, now) == ["r199", "r198"]


def test_replies_filter_before_they_search(tmp_path: Path, now: datetime) -> None:
    """A hundred nearer rows are forbidden: filtering after the search would find nothing."""
    entries = [Entry(f"x{i}", "X.", f"p{i}", personas=("lively",)) for i in range(100)] + [
        Entry("ok", "Ok.", "p")
    ]
    replies = loaded(tmp_path / "i", entries, directions([i / 10 for i in range(100)] + [80]))
    assert ids(replies, 3, now, persona="calm") == ["ok"]
    assert ids(replies, 1, now, persona="lively") == ["x0"]  # the control


def test_replies_obey_persona_surface_and_avoid(tmp_path: Path, now: datetime) -> None:
    entries = [
        Entry("all", "All.", "p"),
        Entry("calm", "Calm.", "p", personas=("calm",)),
        Entry("calm-tv", "Calm tv.", "p", personas=("calm",), surfaces=("tv",)),
        Entry("tv", "Tv.", "p", surfaces=("tv",)),
    ]
    replies = loaded(tmp_path / "i", entries, directions([1, 2, 3, 4]))
    assert ids(replies, 9, now) == ["all"]
    assert ids(replies, 9, now, persona="calm") == ["all", "calm"]
    assert ids(replies, 9, now, surface="tv") == ["all", "tv"]
    assert ids(replies, 9, now, persona="calm", surface="tv") == ["all", "calm", "calm-tv", "tv"]
    assert ids(replies, 9, now, persona="lively", surface="speaker") == ["all"]
    assert ids(replies, 9, now, persona="calm", avoid=("all", "gone")) == ["calm"]


def test_replies_a_promotion_appears_and_expires_by_the_clock_alone(tmp_path: Path) -> None:
    opens, closes = datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 8, tzinfo=UTC)
    entries = [
        Entry("promo", "Winter films!", "films", valid_from=opens, valid_until=closes),
        Entry("films", "I like films.", "films"),
    ]
    replies = loaded(tmp_path / "i", entries, directions([1, 20]))
    tick = timedelta(microseconds=1)
    answers = [ids(replies, 1, as_of) for as_of in (opens - tick, opens, closes - tick, closes)]
    assert answers == [["films"], ["promo"], ["promo"], ["films"]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Entry], Floats, int, list[str]]:
    """Few directions, few weights, several rows per reply: ties everywhere."""
    rows = draw(st.integers(0, 24))
    owners = draw(st.lists(st.integers(0, 7), min_size=rows, max_size=rows))
    weights = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=8, max_size=8))
    personas = draw(st.lists(st.sampled_from([(), ("calm",), ("lively",)]), min_size=rows, max_size=rows))
    angles = draw(st.lists(st.sampled_from([0.0, 20.0, 45.0, 90.0, 170.0]), min_size=rows, max_size=rows))
    entries = [
        Entry(f"r{owner}", f"R{owner}.", f"p{row}", personas=personas[row], weight=weights[owner])
        for row, owner in enumerate(owners)
    ]
    avoid = draw(st.lists(st.sampled_from(["r0", "r1", "r9"]), max_size=2))
    return entries, directions(angles), draw(st.integers(1, 10)), avoid


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_replies_equal_a_brute_force_reading(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[Entry], Floats, int, list[str]]
) -> None:
    entries, vectors, k, avoid = case
    as_of = datetime(2026, 1, 1, tzinfo=UTC)
    replies = loaded(tmp_path_factory.mktemp("case") / "i", entries, vectors)
    best: dict[str, tuple[float, float, str]] = {}
    for entry, score in zip(entries, every_score(vectors), strict=True):
        if entry.personas in ((), ("calm",)) and entry.id not in avoid:
            best[entry.id] = min(best.get(entry.id, (9.0, 0.0, "")), (-score, -entry.weight, entry.id))
    expected = [name for _, _, name in sorted(best.values())][:k]
    assert ids(replies, k, as_of, persona="calm", avoid=avoid) == expected


def every_score(vectors: Floats) -> list[float]:
    """Exact scores by row; rounded, so that equal angles tie here as they do in the index."""
    hits = ExactIndex(vectors).search(ALONG, max(1, len(vectors)))
    scores = np.empty(len(vectors))
    scores[hits.rows] = hits.scores
    return [round(float(score), 5) for score in scores]


def test_replies_work_over_any_index_of_the_protocol(now: datetime) -> None:
    items = Items.of(
        {
            "id": ["a", "b"],
            "text": ["A.", "B."],
            "prompt": ["p", "p"],
            "persona_mask": [EVERYONE] * 2,
            "surface_mask": [EVERYONE] * 2,
            "valid_from": [None] * 2,
            "valid_until": [None] * 2,
            "weight": [1.0] * 2,
            "emotion": [""] * 2,
            "tags": [[]] * 2,
        }
    )
    replies = Replies(ExactIndex(directions([50, 10])), items, Filters(items, (), ()))
    assert ids(replies, 1, now) == ["b"]


@pytest.mark.parametrize("k", [0, -1])
def test_replies_refuse_k_below_one(folder: Path, now: datetime, k: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        Replies.load(folder).search(np.ones(20, np.float32), k, as_of=now, **ANYONE)


@pytest.mark.parametrize(
    "vector", [np.zeros(20, np.float32), np.ones(19, np.float32)], ids=["zero", "narrow"]
)
def test_replies_refuse_a_vector_that_cannot_be_compared(folder: Path, now: datetime, vector: Floats) -> None:
    with pytest.raises(ValueError, match="found"):
        Replies.load(folder).search(vector, 3, as_of=now, **ANYONE)


def test_replies_refuse_a_naive_clock(folder: Path) -> None:
    with pytest.raises(ValueError, match="time zone"):
        Replies.load(folder).search(np.ones(20, np.float32), 3, as_of=datetime(2026, 1, 1), **ANYONE)


def test_replies_load_refuses_items_of_another_build(
    folder: Path,
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> None:
    build(plain_entries(19), random_vectors(19), tmp_path / "other", **NAMES)
    Replies.load(folder)  # the control
    (tmp_path / "other" / "items.arrow").rename(folder / "items.arrow")
    with pytest.raises(IndexInvalid, match="items.arrow: found 19 items, expected 20"):
        Replies.load(folder)


def test_replies_load_refuses_names_of_another_build(tmp_path: Path) -> None:
    build([Entry("a", "A.", "p", personas=("lively",))], directions([0]), tmp_path / "i", **NAMES)
    Replies.load(tmp_path / "i")  # the control
    layout = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps(layout | {"personas": ["calm"]}))
    with pytest.raises(IndexInvalid, match="persona_mask row 0: found 0x2"):
        Replies.load(tmp_path / "i")
