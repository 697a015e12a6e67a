"""The thing users hold: the best replies that may be said, against a brute-force reading of the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
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
from index.search import Hits
from index.shard import IndexInvalid

Floats = NDArray[np.float32]
NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
ANYONE: dict[str, Any] = {"persona": None, "surface": None}


def loaded(folder: Path, entries: list[Entry], vectors: Floats, *, shard_rows: int = 65536) -> Replies:
    build(entries, vectors, folder, shard_rows=shard_rows, **NAMES)
    return Replies.load(folder)


def directions(angles: list[float]) -> Floats:
    """Vectors at these angles in degrees; the query in these tests looks along 0."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def cone(angle: float, count: int) -> Floats:
    """So many different vectors, all of them at this angle from the query: their scores tie to the last bit."""
    radians = np.radians(angle)
    return np.hstack([np.full((count, 1), np.cos(radians)), np.sin(radians) * np.eye(count)]).astype(
        np.float32
    )


ALONG = np.array([1.0, 0.0], np.float32)


def ids(replies: Replies, k: int, as_of: datetime, **situation: Any) -> list[str]:
    """What is found along the first axis."""
    along = np.eye(1, replies.dim, dtype=np.float32)[0]
    hits = replies.search(along, k, as_of=as_of, **(ANYONE | situation))
    return [hit.item.id for hit in hits]


class Asked:
    """An index that notes how many vectors each search asked of it."""

    def __init__(self, vectors: Floats) -> None:
        self._index = ExactIndex(vectors)
        self.dim = self._index.dim
        self.wants: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    def search(self, vector: Floats, k: int, *, mask: NDArray[np.uint8] | None = None) -> Hits:
        self.wants.append(k)
        return self._index.search(vector, k, mask=mask)

    def search_many(self, vectors: Floats, k: int, *, mask: NDArray[np.uint8] | None = None) -> list[Hits]:
        self.wants.append(k)
        return self._index.search_many(vectors, k, mask=mask)


def over(index: ExactIndex | Asked, pairs: list[tuple[str, int]], **columns: list[Any]) -> Replies:
    """Replies of (id, vector) pairs that anyone may hear at any time."""
    count = len(pairs)
    plain: dict[str, list[Any]] = {
        "vector": [vector for _, vector in pairs],
        "id": [reply_id for reply_id, _ in pairs],
        "text": [f"Reply {reply_id}." for reply_id, _ in pairs],
        "prompt": [f"prompt {row}" for row in range(count)],
        "persona_mask": [EVERYONE] * count,
        "surface_mask": [EVERYONE] * count,
        "valid_from": [None] * count,
        "valid_until": [None] * count,
        "weight": [1.0] * count,
        "emotion": [""] * count,
        "tags": [[]] * count,
    }
    items = Items.of(plain | columns, vectors=len(index))
    return Replies(index, items, Filters(items, NAMES["personas"], NAMES["surfaces"]))


def test_replies_load_knows_its_names(folder: Path) -> None:
    replies = Replies.load(folder)
    assert (replies.personas, replies.surfaces) == (("calm", "lively"), ("speaker", "tv"))
    assert (replies.dim, len(replies), len(replies.index)) == (20, 20, 20)


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


@pytest.mark.parametrize(
    "vectors",
    [directions([10, 10, 10, 10]), directions([10, -10, -10, 10]), cone(10, 4)],
    ids=["one vector", "two vectors", "a vector each"],
)
def test_replies_of_equal_similarity_go_by_weight_then_id(
    tmp_path: Path, now: datetime, vectors: Floats
) -> None:
    entries = [
        Entry(name, name, name, weight=weight) for name, weight in [("d", 1), ("c", 1), ("b", 2), ("a", 1)]
    ]
    replies = loaded(tmp_path / "i", entries, vectors)
    assert [ids(replies, k, now) for k in (1, 2, 3, 4)] == [
        ["b"],
        ["b", "a"],
        ["b", "a", "c"],
        ["b", "a", "c", "d"],
    ]


@pytest.mark.parametrize(
    "vectors", [directions([10] * 200), cone(10, 200)], ids=["one vector", "a vector each"]
)
def test_replies_tied_far_beyond_the_first_fetch_still_win_by_weight(
    tmp_path: Path, now: datetime, vectors: Floats
) -> None:
    entries = [Entry(f"r{i:03d}", f"R{i}.", "p", weight=float(i)) for i in range(200)]
    replies = loaded(tmp_path / "i", entries, vectors, shard_rows=64)
    assert ids(replies, 2, now) == ["r199", "r198"]


def test_replies_of_one_prompt_are_all_found_through_its_vector(tmp_path: Path, now: datetime) -> None:
    entries = [
        Entry("tea", "Tea?", "i am thirsty"),
        Entry("cake", "Cake?", "i am hungry"),
        Entry("milk", "Milk?", "i am thirsty", ("calm",)),
        Entry("rum", "Rum!", "i am thirsty", ("lively",)),
        Entry("tea", "Tea?", "i am hungry"),
    ]
    replies = loaded(tmp_path / "i", entries, directions([30, 10, 30, 30, 10]))
    assert (len(replies), len(replies.index)) == (5, 2)
    hits = replies.search(ALONG, 9, persona="calm", surface=None, as_of=now)
    assert [(hit.item.id, hit.item.prompt, hit.row) for hit in hits] == [
        ("cake", "i am hungry", 1),
        ("tea", "i am hungry", 4),
        ("milk", "i am thirsty", 2),
    ]
    assert [hit.similarity for hit in hits] == pytest.approx(np.cos(np.radians([10, 10, 30])), abs=1e-3)
    assert ids(replies, 9, now, persona="lively") == ["cake", "tea", "rum"]
    assert ids(replies, 9, now) == ["cake", "tea"]
    assert ids(replies, 9, now, persona="calm", avoid=["cake"]) == ["tea", "milk"]
    assert ids(replies, 9, now, persona="calm", avoid=["cake", "tea"]) == ["milk"]
    assert ids(replies, 9, now, persona="calm", avoid=["cake", "tea", "milk"]) == []


@pytest.mark.parametrize("weights", [[0.5, 2.0], [2.0, 0.5]], ids=["light first", "heavy first"])
def test_replies_tied_with_themselves_go_by_their_heavier_row(now: datetime, weights: list[float]) -> None:
    """Two vectors of one score lead to reply a; whichever comes first, its heavier row speaks for it."""
    index = ExactIndex(directions([20, -20]))
    replies = over(index, [("a", 0), ("a", 1), ("b", 0)], weight=[*weights, 1.0])
    hits = replies.search(ALONG, 2, as_of=now, **ANYONE)
    assert [(hit.item.id, hit.item.weight) for hit in hits] == [("a", 2.0), ("b", 1.0)]


def test_replies_prefer_the_nearer_row_to_the_heavier(now: datetime) -> None:
    replies = over(ExactIndex(directions([30, 20])), [("a", 0), ("a", 1)], weight=[9.0, 0.1])
    [hit] = replies.search(ALONG, 2, as_of=now, **ANYONE)
    assert hit.row == 1


@pytest.mark.parametrize(
    ("vectors", "hangs_on", "wants"),
    [
        (directions([10, 20, 30, 40, 50]), [[0], [1], [2], [3], [4]], [3]),
        (directions([10, 20, 30, 40, 50]), [[0, 1, 2], [3], [4], [5], [6]], [3]),
        (directions([10, 20]), [[0], [1]], [3]),
        (directions([10, 20, -20, 30, 40]), [[0], [1], [2], [3], [4]], [3, 12]),
        (directions([10, -10, 30, 40, 50]), [[0], [1], [2], [3], [4]], [3]),
        (directions([10, 20, 30, 40, 50]), [[0], [0], [0], [1], [2]], [3, 12]),
        (cone(10, 40), [[number] for number in range(40)], [3, 12, 48]),
    ],
    ids="apart shared few tied-at-k tied-before-k repeated all-tied".split(),
)
def test_replies_fetch_one_vector_more_than_asked_and_grow_only_when_they_must(
    now: datetime, vectors: Floats, hangs_on: list[list[int]], wants: list[int]
) -> None:
    """`hangs_on` holds the replies of each vector; two are asked for."""
    index = Asked(vectors)
    pairs = [(f"r{reply:02d}", vector) for vector, held in enumerate(hangs_on) for reply in held]
    assert ids(over(index, pairs), 2, now) == ["r00", "r01"]
    assert index.wants == wants


def test_replies_do_not_grow_for_vectors_that_are_forbidden(now: datetime) -> None:
    """All 40 tie, but 38 of them lead to nothing that may be said: they are never fetched."""
    index = Asked(cone(10, 40))
    masks = [2] * 38 + [1, 1]
    replies = over(index, [(f"r{i:02d}", i) for i in range(40)], persona_mask=masks)
    assert ids(replies, 2, now, persona="calm") == ["r38", "r39"]
    assert index.wants == [3]
    assert ids(replies, 2, now, persona="lively") == ["r00", "r01"]  # the control: among 38 it must grow
    assert index.wants == [3, 3, 12, 48]


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


@dataclass(frozen=True)
class Case:
    """What one comparison with the twin needs: row i of `vectors` was made from the prompt of entry i."""

    entries: list[Entry]
    vectors: Floats
    k: int
    avoid: list[str]
    shard_rows: int


# Few directions, few weights, several prompts per reply and replies per prompt: ties everywhere. Mirrored
# angles tie with different vectors, equal ones with the same.
ANGLES = [0.0, 20.0, -20.0, 45.0, -45.0, 90.0, 170.0]
SAID_BY = [(), ("calm",), ("lively",)]
PLAYED_ON = [(), ("tv",), ("speaker",)]
OPENS, CLOSES = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
SPANS = [(None, None), (OPENS, None), (CLOSES, None), (None, OPENS), (OPENS, CLOSES)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    angles = draw(st.lists(st.sampled_from(ANGLES), min_size=1, max_size=14))
    pair = st.tuples(st.integers(0, 7), st.integers(0, len(angles) - 1))
    pairs = draw(st.lists(pair, unique=True, max_size=30))  # in any order
    entries = []
    for owner, prompt in pairs:
        opens, closes = draw(st.sampled_from(SPANS))
        entries.append(
            Entry(
                f"r{owner}",
                f"R{owner}.",
                f"p{prompt}",
                personas=draw(st.sampled_from(SAID_BY)),
                surfaces=draw(st.sampled_from(PLAYED_ON)),
                valid_from=opens,
                valid_until=closes,
                weight=draw(st.sampled_from([0.5, 1.0, 2.0])),
            )
        )
    return Case(
        entries=entries,
        vectors=directions([angles[prompt] for _, prompt in pairs]).reshape(-1, 2),
        k=draw(st.integers(1, 12)),
        avoid=draw(st.lists(st.sampled_from(["r0", "r1", "r2", "r9"]), max_size=3)),
        shard_rows=draw(st.sampled_from([8, 65536])),
    )


def twin(case: Case, as_of: datetime) -> list[tuple[float, float, str]]:
    """(similarity, weight, id) of what the calm may say on a tv, from the rule read row by row."""
    best: dict[str, tuple[float, float, str]] = {}
    for entry, score in zip(case.entries, every_score(case.vectors), strict=True):
        if (
            entry.personas in ((), ("calm",))
            and entry.surfaces in ((), ("tv",))
            and (entry.valid_from is None or entry.valid_from <= as_of)
            and (entry.valid_until is None or as_of < entry.valid_until)
            and entry.id not in case.avoid
        ):
            row = (-score, -entry.weight, entry.id)
            best[entry.id] = min(best.get(entry.id, row), row)
    return [(-score, -weight, name) for score, weight, name in sorted(best.values())][: case.k]


def every_score(vectors: Floats) -> list[float]:
    """Exact scores by row; rounded, so that equal angles tie here as they do in the index."""
    hits = ExactIndex(vectors).search(ALONG, max(1, len(vectors)))
    scores = np.empty(len(vectors))
    scores[hits.rows] = hits.scores
    return [round(float(score), 5) for score in scores]


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_replies_equal_a_brute_force_reading(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    as_of = datetime(2026, 6, 1, tzinfo=UTC)
    folder = tmp_path_factory.mktemp("case") / "i"
    replies = loaded(folder, case.entries, case.vectors, shard_rows=case.shard_rows)
    hits = replies.search(ALONG, case.k, persona="calm", surface="tv", as_of=as_of, avoid=case.avoid)
    found = [(round(hit.similarity, 5), hit.item.weight, hit.item.id) for hit in hits]
    assert found == twin(case, as_of)
    for hit in hits:
        entry = case.entries[hit.row]
        assert (hit.item.id, hit.item.prompt, hit.item.weight) == (entry.id, entry.prompt, entry.weight)
        assert every_score(case.vectors)[hit.row] == round(hit.similarity, 5)


def test_replies_work_over_any_index_of_the_protocol(now: datetime) -> None:
    replies = over(ExactIndex(directions([50, 10])), [("a", 0), ("b", 1)])
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


def test_replies_load_refuses_items_that_hang_on_other_vectors(
    folder: Path, tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """Both builds have 20 items, on 20 vectors and on 10."""
    shared = [Entry(f"r{i}", f"Reply {i}.", f"prompt {i // 2}") for i in range(20)]
    build(shared, np.repeat(random_vectors(10), 2, axis=0), tmp_path / "shared", **NAMES)
    for path in (folder, tmp_path / "shared"):
        Replies.load(path)  # the control
    (folder / "items.arrow").rename(tmp_path / "kept")
    (tmp_path / "shared" / "items.arrow").rename(folder / "items.arrow")
    (tmp_path / "kept").rename(tmp_path / "shared" / "items.arrow")
    with pytest.raises(IndexInvalid, match="items.arrow: found vector 10 without a reply"):
        Replies.load(folder)
    with pytest.raises(IndexInvalid, match="items.arrow row 10: found vector 10, expected one of the 10"):
        Replies.load(tmp_path / "shared")


@pytest.mark.parametrize("items", [0, 19, 21])
def test_replies_load_refuses_another_number_of_items(folder: Path, items: int) -> None:
    layout = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(layout | {"items": items}))
    with pytest.raises(IndexInvalid, match=f"items.arrow: found 20 items, expected {items}, as index says"):
        Replies.load(folder)


def test_replies_load_refuses_names_of_another_build(tmp_path: Path) -> None:
    build([Entry("a", "A.", "p", personas=("lively",))], directions([0]), tmp_path / "i", **NAMES)
    Replies.load(tmp_path / "i")  # the control
    layout = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps(layout | {"personas": ["calm"]}))
    with pytest.raises(IndexInvalid, match="persona_mask row 0: found 0x2"):
        Replies.load(tmp_path / "i")
