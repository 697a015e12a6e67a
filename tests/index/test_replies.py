"""The thing users hold: the best replies that may be said, against a brute-force reading of the rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import Entry, build
from index.change import block, extend, remove
from index.exact import ExactIndex
from index.filters import Filters
from index.items import EVERYONE, Items, Judged
from index.layout import IndexInvalid
from index.replies import Replies
from index.search import Hits
from tests.index.harms import HARMS, make_whole, refusal
from tests.index.tampering import seal, set_field

Floats = NDArray[np.float32]
NAMES: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
ANYONE: dict[str, Any] = {"persona": None, "surface": None}


def loaded(folder: Path, entries: list[Entry], vectors: Floats, **options: Any) -> Replies:
    build(entries, vectors, folder, **NAMES, **options)
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
        "said": [0] * count,
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
        "labels": [[]] * count,
        "blocked": [""] * count,
    }
    items = Items.of(plain | columns, vectors=len(index), said=1)
    said = np.zeros((1, 16), np.float16)
    return Replies(index, items, Filters(items, NAMES["personas"], NAMES["surfaces"]), said)


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


# --- what is said -------------------------------------------------------------------------------------------


def test_replies_carry_all_that_was_told_of_them(tmp_path: Path, now: datetime) -> None:
    judged = (Judged("emotion", "joy", 0.75),)
    entries = [Entry("a", "A.", "p", weight=0.5, emotion="joy", tags=("x", "y"), labels=judged)]
    [hit] = loaded(tmp_path / "i", entries, directions([0])).search(ALONG, 1, as_of=now, **ANYONE)
    assert (hit.item.weight, hit.item.emotion, hit.item.tags) == (0.5, "joy", ("x", "y"))
    assert (hit.item.labels, hit.item.blocked) == (judged, "")


def test_replies_obey_tags_and_never_find_what_is_blocked(tmp_path: Path, now: datetime) -> None:
    entries = [
        Entry("rude", "Rude.", "p0", tags=("warm",), blocked="toxic"),
        Entry("warm", "Warm.", "p1", tags=("warm", "film")),
        Entry("film", "Film.", "p2", tags=("film",)),
        Entry("bare", "Bare.", "p3"),
    ]
    replies = loaded(tmp_path / "i", entries, directions([1, 2, 3, 4]))
    assert ids(replies, 9, now) == ["warm", "film", "bare"]
    assert ids(replies, 9, now, tags=["warm"]) == ["warm"]
    assert ids(replies, 9, now, tags=["film", "warm"], avoid=["warm"]) == ["film"]
    assert ids(replies, 9, now, tags=["unheard-of"]) == []


@pytest.mark.parametrize("own", [True, False], ids=["own", "by the first prompt"])
def test_replies_said_are_unit_vectors_of_the_texts(tmp_path: Path, now: datetime, own: bool) -> None:
    """Where an index has none, the vector of a reply's first prompt stands for its text."""
    entries = [Entry("a", "A.", "p0"), Entry("b", "B.", "p1"), Entry("a", "A.", "p2")]
    texts = directions([100, 120, 100])
    replies = loaded(tmp_path / "i", entries, directions([40, 20, 10]), said=texts * 7 if own else None)
    hits = replies.search(ALONG, 5, as_of=now, **ANYONE)
    assert [hit.item.id for hit in hits] == ["a", "b"]
    expected = directions([100, 120] if own else [40, 20])
    np.testing.assert_allclose(replies.said(hits), expected, atol=1e-3)
    assert replies.said(hits).dtype == np.float32
    assert replies.said([]).shape == (0, 2)


def test_replies_say_whether_they_are_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_vectors: Callable[..., Floats]
) -> None:
    entries = [Entry(f"r{i}", "R.", "p") for i in range(30)]
    replies = loaded(tmp_path / "i", entries, random_vectors(30))
    assert replies.quick
    monkeypatch.setattr("index.replies.QUICK_ROWS", 20)
    assert not replies.quick
    assert loaded(tmp_path / "g", entries, random_vectors(30), kind="hnsw").quick


# --- against a brute-force reading of the rules -------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """An index and what it was built from: row i of `scores` is of entry i, its cosine with each of the queries."""

    replies: Replies
    entries: list[Entry]
    scores: NDArray[np.float64]  # [entries, queries]
    queries: Floats  # [queries, dim]


@dataclass(frozen=True)
class Situation:
    persona: str | None
    surface: str | None
    as_of: datetime
    avoid: tuple[str, ...]
    tags: tuple[str, ...]


# Few directions, few weights, several prompts per reply and replies per prompt: ties everywhere. Mirrored
# angles tie with different vectors, equal ones with the same.
ANGLES = [0.0, 20.0, -20.0, 45.0, -45.0, 90.0, 170.0]
SAID_BY: list[tuple[str, ...]] = [(), (), ("calm",), ("lively",), ("calm", "lively")]
PLAYED_ON: list[tuple[str, ...]] = [(), (), ("tv",), ("speaker",)]
OPENS, CLOSES = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
SPANS = [(None, None), (None, None), (OPENS, None), (CLOSES, None), (None, OPENS), (OPENS, CLOSES)]
CLOCKS = [moment + tick for moment in (OPENS, CLOSES) for tick in (timedelta(microseconds=-1), timedelta(0))]
TAGGED: list[tuple[str, ...]] = [(), (), ("warm",), ("warm", "film"), ("film",)]
WORLDS, SITUATIONS = 100, 40  # 4,000 searches


def drawn(rng: np.random.Generator, some: Sequence[Any]) -> Any:
    return some[int(rng.integers(len(some)))]


def make_world(folder: Path, seed: int) -> World:
    """Up to 8 replies to up to 14 prompts, strewn; one in four worlds changed afterwards in every way there is."""
    rng = np.random.default_rng(seed)
    angles = [drawn(rng, ANGLES) for _ in range(rng.integers(1, 15))]
    pairs = sorted(
        {(int(rng.integers(8)), int(rng.integers(len(angles)))) for _ in range(rng.integers(0, 31))}
    )
    blocked = {owner for owner in range(8) if rng.random() < 0.1}
    entries = []
    for owner, prompt in (pairs[i] for i in rng.permutation(len(pairs))):
        opens, closes = drawn(rng, SPANS)
        entries.append(
            Entry(
                f"r{owner}", f"R{owner}.", f"p{prompt}", drawn(rng, SAID_BY), drawn(rng, PLAYED_ON), opens, closes,
                weight=drawn(rng, [0.5, 1.0, 2.0]), tags=drawn(rng, TAGGED), blocked="rude" * (owner in blocked),
            )
        )  # fmt: skip
    vectors = directions([angles[int(entry.prompt[1:])] for entry in entries]).reshape(-1, 2)
    kind, shard_rows = drawn(rng, ["exact", "hnsw"]), drawn(rng, [8, 65536])
    if seed % 4:
        replies = loaded(folder, entries, vectors, kind=kind, shard_rows=shard_rows)
    else:
        half = len(entries) // 2
        build(entries[:half], vectors[:half], folder, kind=kind, shard_rows=shard_rows, **NAMES)
        extend(folder, folder, [(entries[half:], vectors[half:], None)])
        kept = [row for row, entry in enumerate(entries) if entry.id != "r3"]
        if len(kept) < len(entries):
            remove(folder, folder, ["r3"])
        entries, vectors = [entries[row] for row in kept], vectors[kept]
        if any(entry.id == "r4" for entry in entries):
            block(folder, folder, ["r4"], "stale")
            entries = [replace(entry, blocked="stale") if entry.id == "r4" else entry for entry in entries]
        replies = Replies.load(folder)
    queries = np.stack([ALONG, directions([20])[0], rng.standard_normal(2).astype(np.float32)])
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    rounded = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return World(replies, entries, rounded.astype(np.float64) @ units.astype(np.float64).T, queries)


def make_situation(rng: np.random.Generator) -> Situation:
    return Situation(
        drawn(rng, [None, "calm", "lively"]), drawn(rng, [None, "speaker", "tv"]), drawn(rng, CLOCKS),
        tuple(drawn(rng, ["r0", "r1", "r2", "r9"]) for _ in range(rng.integers(0, 4))),
        tuple(drawn(rng, ["warm", "film", "none"]) for _ in range(rng.integers(0, 3))),
    )  # fmt: skip


def twin(world: World, number: int, k: int, situation: Situation) -> list[tuple[float, float, str]]:
    """(similarity, weight, id), from the rules read row by row; rounded, so that equal angles tie as they do there."""
    best: dict[str, tuple[float, float, str]] = {}
    for entry, score in zip(world.entries, world.scores[:, number], strict=True):
        if (
            (not entry.personas or situation.persona in entry.personas)
            and (not entry.surfaces or situation.surface in entry.surfaces)
            and (entry.valid_from is None or entry.valid_from <= situation.as_of)
            and (entry.valid_until is None or situation.as_of < entry.valid_until)
            and (not situation.tags or set(situation.tags) & set(entry.tags))
            and entry.id not in situation.avoid
            and not entry.blocked
        ):
            row = (-round(float(score), 5), -entry.weight, entry.id)
            best[entry.id] = min(best.get(entry.id, row), row)
    return [(-score, -weight, name) for score, weight, name in sorted(best.values())][:k]


@pytest.mark.parametrize("seed", range(WORLDS))
def test_replies_equal_a_brute_force_reading(tmp_path: Path, seed: int) -> None:
    world = make_world(tmp_path / "i", seed)
    rng = np.random.default_rng(seed)
    for _ in range(SITUATIONS):
        situation = make_situation(rng)
        k, number = drawn(rng, [1, 2, 3, 5, 8, 60]), int(rng.integers(3))
        expected = twin(world, number, k, situation)
        hits = world.replies.search(world.queries[number], k, **vars(situation))
        assert [hit.item.id for hit in hits] == [name for *_, name in expected], situation
        for hit, (score, weight, _) in zip(hits, expected, strict=True):
            assert abs(hit.similarity - score) < 2e-5
            assert hit.item.weight == weight
            item = world.replies.items.reply(hit.row)
            assert item == hit.item
            [entry] = [e for e in world.entries if (e.id, e.prompt) == (item.id, item.prompt)]
            assert (entry.text, entry.tags, entry.blocked) == (item.text, item.tags, "")


def test_replies_brute_force_is_of_every_kind(tmp_path: Path) -> None:
    """The control: each rule decides some answers, some are empty, and in some ties are cut."""
    kinds = Counter[str]()
    for seed in range(10):
        world, rng = make_world(tmp_path / f"{seed}", seed), np.random.default_rng(seed)
        for _ in range(SITUATIONS):
            situation = make_situation(rng)
            expected = twin(world, 0, 60, situation)
            looser: dict[str, Any] = {
                "persona": "calm",
                "surface": "tv",
                "as_of": OPENS,
                "avoid": (),
                "tags": (),
            }
            for rule, value in looser.items():
                kinds[rule] += twin(world, 0, 60, replace(situation, **{rule: value})) != expected
            unblocked = replace(world, entries=[replace(entry, blocked="") for entry in world.entries])
            kinds["blocked"] += twin(unblocked, 0, 60, situation) != expected
            kinds["empty"] += not expected
            kinds["tied"] += len({score for score, *_ in expected}) < len(expected)
    assert len(kinds) == 8 and min(kinds.values()) > 20, kinds


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


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("harms") / "whole")


@pytest.mark.parametrize("name", HARMS)
def test_replies_load_refuses_a_harmed_index_and_names_the_part(whole: Path, name: str) -> None:
    assert refusal(whole, name) is None


def test_replies_load_refuses_every_harm_where_asserts_are_gone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "tests.index.harms", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_replies_load_refuses_items_of_another_build(
    folder: Path,
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> None:
    build(plain_entries(19), random_vectors(19), tmp_path / "other", **NAMES)
    Replies.load(folder)  # the control
    (tmp_path / "other" / "items.arrow").replace(folder / "items.arrow")
    with pytest.raises(IndexInvalid, match="items.arrow: found sha256 .* as index.json says"):
        Replies.load(folder)
    seal(folder)
    with pytest.raises(IndexInvalid, match="items.arrow: found 19 items, expected 20"):
        Replies.load(folder)


def test_replies_load_refuses_items_that_hang_on_other_vectors(
    folder: Path, tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """Both builds have 20 items, on 20 vectors and on 10."""
    shared = [Entry(f"r{i}", f"Reply {i}.", f"prompt {i // 2}") for i in range(20)]
    build(shared, np.repeat(random_vectors(10), 2, axis=0), tmp_path / "shared", **NAMES)
    Replies.load(tmp_path / "shared")  # the control
    (folder / "items.arrow").replace(tmp_path / "shared" / "items.arrow")
    seal(tmp_path / "shared")
    with pytest.raises(IndexInvalid, match="items.arrow row 10: found vector 10, expected one of the 10"):
        Replies.load(tmp_path / "shared")


@pytest.mark.parametrize("items", [0, 19, 21])
def test_replies_load_refuses_another_number_of_items(folder: Path, items: int) -> None:
    set_field(folder, "items", items)
    with pytest.raises(IndexInvalid, match=f"items.arrow: found 20 items, expected {items}, as index says"):
        Replies.load(folder)


def test_replies_load_refuses_names_of_another_build(tmp_path: Path) -> None:
    build([Entry("a", "A.", "p", personas=("lively",))], directions([0]), tmp_path / "i", **NAMES)
    Replies.load(tmp_path / "i")  # the control
    set_field(tmp_path / "i", "personas", ["calm"])
    with pytest.raises(IndexInvalid, match="persona_mask row 0: found 0x2"):
        Replies.load(tmp_path / "i")


def test_replies_load_refuses_vectors_of_texts_that_were_left_out(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    """Without them, `said` numbers would fall on the vectors of prompts, and some beyond those."""
    entries = [replace(entry, prompt="p", id=entry.id) for entry in plain_entries(9)]
    loaded(tmp_path / "i", entries, np.ones((9, 20), np.float32), said=random_vectors(9))
    for shard in (tmp_path / "i").glob("said-*"):
        shard.unlink()
    set_field(tmp_path / "i", "said", [])
    set_field(tmp_path / "i", "said_rows", 0)
    with pytest.raises(IndexInvalid, match="items.arrow row 1: found said vector 1, expected one of the 1"):
        Replies.load(tmp_path / "i")


def test_replies_go_on_answering_while_their_folder_is_replaced_or_deleted(
    folder: Path, now: datetime, random_vectors: Callable[..., Floats]
) -> None:
    """Every reply is read from the mapped files, because none has been seen before."""
    replies, vectors = Replies.load(folder), random_vectors(20)

    def nearest(some: Replies) -> list[str]:
        return [some.search(vector, 1, as_of=now, **ANYONE)[0].item.text for vector in vectors]

    build([Entry("new", "New.", "p")], vectors[:1], folder, **NAMES)
    assert nearest(Replies.load(folder)) == ["New."] * 20
    shutil.rmtree(folder)
    assert nearest(replies) == [f"Reply {number}." for number in range(20)]
