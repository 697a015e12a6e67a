"""A collection of Milvus answers as `Replies` does over the same entries. NLU_TEST_MILVUS_URI names a server to ask
instead of a Milvus Lite of these tests' own; it gets collections that are dropped again.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from milvus_lite.adapter.grpc.server import start_server_in_thread
from milvus_lite.server_manager import server_manager_instance
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient, MilvusException
from pymilvus.client.connection_manager import ConnectionManager

from index import milvus
from index.build import Entry, build
from index.items import Judged
from index.layout import IndexInvalid
from index.milvus import MilvusAway, MilvusReplies, read_pointer
from index.push import push
from index.replies import Replies, Retriever

Floats = NDArray[np.float32]
Names = Sequence[str]

SERVER = os.environ.get("NLU_TEST_MILVUS_URI", "")
PRECISION: Literal["float16", "float32"] = "float16" if SERVER else "float32"  # Milvus Lite has no float16
PERSONAS, SURFACES = ("calm", "lively"), ("speaker", "tv")
VECTORIZER = "5e" * 32
OPENS, CLOSES = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TICK = timedelta(microseconds=1)
ALONG = np.array([1, 0], np.float32)
ANYONE: dict[str, Any] = {"persona": None, "surface": None, "as_of": NOW}


@dataclass(frozen=True)
class Server:
    """A Milvus, and what it takes to fill it."""

    uri: str
    names: Iterator[str]
    made: list[str]

    def push(self, index: Path, *, vectorizer: str = VECTORIZER) -> Path:
        """The pointer to a new collection."""
        name = next(self.names)
        self.made.append(name)
        out = index.with_name(f"pointer-{name}")
        push(index, out, uri=self.uri, collection=name, vectorizer=vectorizer, precision=PRECISION)
        return out

    def load(self, pointer: Path) -> MilvusReplies:
        return MilvusReplies.load(pointer, uri=self.uri, vectorizer=VECTORIZER)

    def client(self) -> MilvusClient:
        return MilvusClient(self.uri, timeout=5)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milvus Lite is written in Python, and this machine may be busy."""
    monkeypatch.setattr(milvus, "SEARCH_S", 30.0)
    monkeypatch.setattr(milvus, "CONNECT_S", 30.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    uri = SERVER or str(tmp_path_factory.mktemp("milvus") / "replies.db")
    started = Server(uri, (f"replies_{os.getpid()}_{number}" for number in itertools.count()), [])
    yield started
    client = started.client()
    for name in started.made:
        client.drop_collection(name)
    ConnectionManager.get_instance().close_all()
    server_manager_instance.release_server(uri)


def directions(degrees: Sequence[float]) -> Floats:
    """Vectors `[degrees, 2]` at these angles to `ALONG`."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def made(folder: Path, entries: Sequence[Entry], vectors: Floats, **options: Any) -> Path:
    build(entries, vectors, folder, personas=PERSONAS, surfaces=SURFACES, **options)
    return folder


@pytest.fixture
def pushed(server: Server, tmp_path: Path) -> Callable[..., MilvusReplies]:
    """Entries and vectors to a collection of them."""

    def make(entries: Sequence[Entry], vectors: Floats, **options: Any) -> MilvusReplies:
        return server.load(server.push(made(tmp_path / "index", entries, vectors, **options)))

    return make


def ids(replies: Retriever, k: int, **asked: Any) -> list[str]:
    return [hit.item.id for hit in replies.search(ALONG, k, **{**ANYONE, **asked})]


@dataclass(frozen=True)
class Twins:
    """The same entries here and there."""

    here: Replies
    there: MilvusReplies


@pytest.fixture(scope="module")
def twins(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Few directions and few weights: ties, shared prompts and replies of many prompts everywhere."""
    angles = [0.0, 20.0, -20.0, 45.0, -45.0, 90.0, 170.0]
    spans = [(None, None), (OPENS, None), (CLOSES, None), (None, OPENS), (OPENS, CLOSES)]
    entries, at, texts = [], [], []
    for number, owner in itertools.product(range(7), range(40)):
        if (number * 7 + owner * 5) % 4:
            opens, closes = spans[(number + owner) % 5]
            at.append(angles[number])
            texts.append(float(owner))
            entries.append(
                Entry(
                    f"r{owner} «да» \"'\\",
                    f"Reply {owner}, ответ\n",
                    f"prompt {number}" if number else "",
                    personas=((), ("calm",), ("lively",), PERSONAS)[owner % 4],
                    surfaces=((), ("tv",), ("speaker",))[(owner + number) % 3],
                    valid_from=opens,
                    valid_until=closes,
                    weight=(0.1, 1.0, 2.0)[(owner + number) % 3],
                    emotion=("", "joy")[owner % 2],
                    tags=((), ("night",), ("night", 'the "sea"'))[owner % 3],
                    labels=(Judged("emotion", "joy", 0.7), Judged("intent", "радость", 0.1))[: owner % 3],
                    blocked="rude" if owner % 11 == 10 else "",
                )
            )
    folder = tmp_path_factory.mktemp("twins") / "index"
    made(folder, entries, directions(at), said=directions(texts), shard_rows=64)
    return Twins(Replies.load(folder), server.load(server.push(folder)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angle=st.sampled_from([0.0, 10.0, 32.5, 90.0, -135.0]),
    k=st.integers(1, 50),
    persona=st.sampled_from([None, *PERSONAS]),
    surface=st.sampled_from([None, *SURFACES]),
    as_of=st.sampled_from([NOW, OPENS, OPENS - TICK, CLOSES, CLOSES - TICK]),
    avoid=st.lists(st.sampled_from([f"r{n} «да» \"'\\" for n in (0, 1, 2, 3)] + ["gone"]), max_size=3),
    tags=st.lists(st.sampled_from(["night", 'the "sea"', "nobody's"]), max_size=2),
)
def test_milvus_answers_as_replies_do(
    twins: Twins,
    angle: float,
    k: int,
    persona: str | None,
    surface: str | None,
    as_of: datetime,
    avoid: list[str],
    tags: list[str],
) -> None:
    asked: dict[str, Any] = {
        "persona": persona, "surface": surface, "as_of": as_of, "avoid": avoid, "tags": tags,
    }  # fmt: skip
    vector = directions([angle])[0] * 3
    here = twins.here.search(vector, k, **asked)
    there = twins.there.search(vector, k, **asked)
    assert [(hit.item, hit.row) for hit in there] == [(hit.item, hit.row) for hit in here]
    assert [hit.similarity for hit in there] == pytest.approx([hit.similarity for hit in here], abs=1e-3)
    np.testing.assert_array_equal(twins.there.said(there), twins.here.said(here))
    assert twins.there.moment(as_of) == twins.here.moment(as_of)


def test_milvus_says_what_replies_say_of_themselves(twins: Twins) -> None:
    for name in ("dim", "personas", "surfaces"):
        assert getattr(twins.there, name) == getattr(twins.here, name)
    assert len(twins.there) == len(twins.here)
    assert not twins.there.quick


def test_milvus_said_asks_the_server_for_hits_that_it_did_not_find(
    server: Server, twins: Twins, tmp_path: Path
) -> None:
    hits = twins.here.search(ALONG, 5, **ANYONE)
    assert hits
    pointer = tmp_path / "pointer"
    twins.there._pointer.save(pointer)
    np.testing.assert_array_equal(server.load(pointer).said(hits), twins.here.said(hits))
    assert twins.there.said([]).shape == (0, 2)


def test_milvus_filters_before_it_searches(pushed: Callable[..., MilvusReplies]) -> None:
    """A hundred nearer rows are forbidden: filtering after the search would find nothing."""
    entries = [Entry(f"x{i}", "X.", f"p{i}", personas=("lively",)) for i in range(100)]
    entries += [Entry(f"b{i}", "B.", f"p{i}", blocked="rude") for i in range(100)] + [Entry("ok", "Ok.", "p")]
    replies = pushed(entries, directions([i / 10 for i in range(200)] + [80]))
    assert ids(replies, 3, persona="calm") == ["ok"]
    assert ids(replies, 1, persona="lively") == ["x0"]  # the control


def test_milvus_obeys_persona_surface_and_avoid(pushed: Callable[..., MilvusReplies]) -> None:
    entries = [
        Entry("all", "All.", "p"),
        Entry("calm", "Calm.", "p", personas=("calm",)),
        Entry("calm-tv", "Calm tv.", "p", personas=("calm",), surfaces=("tv",)),
        Entry("tv", "Tv.", "p", surfaces=("tv",)),
        Entry("named", "Named.", "p", personas=PERSONAS),
    ]
    replies = pushed(entries, directions([1, 2, 3, 4, 5]))
    assert ids(replies, 9) == ["all"]
    assert ids(replies, 9, persona="calm") == ["all", "calm", "named"]
    assert ids(replies, 9, surface="tv") == ["all", "tv"]
    assert ids(replies, 9, persona="calm", surface="tv") == ["all", "calm", "calm-tv", "tv", "named"]
    assert ids(replies, 9, persona="lively", surface="speaker") == ["all", "named"]
    assert ids(replies, 9, persona="calm", avoid=("all", "gone")) == ["calm", "named"]
    assert ids(replies, 9, persona="calm", avoid=("all", "calm", "named")) == []


def test_milvus_a_promotion_appears_and_expires_by_the_clock_alone(
    pushed: Callable[..., MilvusReplies],
) -> None:
    entries = [
        Entry("promo", "Winter films!", "films", valid_from=OPENS, valid_until=CLOSES),
        Entry("films", "I like films.", "films"),
    ]
    replies = pushed(entries, directions([1, 20]))
    clocks = (OPENS - TICK, OPENS, CLOSES - TICK, CLOSES)
    assert [ids(replies, 1, as_of=clock) for clock in clocks] == [["films"], ["promo"], ["promo"], ["films"]]
    assert [replies.moment(clock) for clock in clocks] == [0, 1, 1, 2]


def test_milvus_ties_far_beyond_the_first_fetch_are_won_by_weight(
    pushed: Callable[..., MilvusReplies],
) -> None:
    entries = [Entry(f"r{i:03d}", f"R{i}.", "p", weight=float(i)) for i in range(200)]
    assert ids(pushed(entries, directions([10] * 200)), 2) == ["r199", "r198"]


def test_milvus_counts_each_reply_once_by_its_best_row(pushed: Callable[..., MilvusReplies]) -> None:
    """Forty nearest rows are one reply's: more must be fetched until there is a second."""
    entries = [Entry("a", "A.", f"a{i}") for i in range(40)] + [Entry("b", "B.", "b")]
    replies = pushed(entries, directions([*range(40, 0, -1), 60]), said=directions([0] * 40 + [5]))
    assert [(hit.item.id, hit.row) for hit in replies.search(ALONG, 2, **ANYONE)] == [("a", 39), ("b", 40)]
    assert ids(replies, 99) == ["a", "b"]


def test_milvus_an_empty_index_has_no_replies(pushed: Callable[..., MilvusReplies]) -> None:
    replies = pushed([], np.empty((0, 2), np.float32))
    assert (len(replies), ids(replies, 3)) == (0, [])


@pytest.mark.parametrize(
    "name",
    ['"', "\\", '\\"', '"] or id != "', "line\nbreak", "\x00\x1f", "юность", "'", "{x}", "\ufffd"],
    ids=ascii,
)
def test_milvus_names_of_callers_are_never_read_as_an_expression(twins: Twins, name: str) -> None:
    everything = ids(twins.there, 99)
    assert everything
    assert ids(twins.there, 99, avoid=[name]) == everything
    assert ids(twins.there, 99, tags=[name]) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"k": 0}, "k: found 0"),
        ({"vector": np.zeros(2, np.float32)}, "zero length"),
        ({"vector": np.ones(3, np.float32)}, "expected rows of width 2|expected \\[2\\]"),
        ({"persona": "stern"}, "persona: found 'stern', expected one of: calm, lively"),
        ({"surface": ""}, "surface: found ''"),
        ({"as_of": datetime(2026, 1, 1)}, "time zone"),
    ],
    ids=["k", "zero", "wide", "persona", "surface", "clock"],
)
def test_milvus_refuses_what_replies_refuse(twins: Twins, asked: dict[str, Any], message: str) -> None:
    for replies in (twins.here, twins.there):
        with pytest.raises(ValueError, match=message):
            replies.search(**{"vector": ALONG, "k": 3, **ANYONE, **asked})


@pytest.mark.skipif(PRECISION == "float16", reason="Milvus Lite of old has no graphs")
def test_milvus_walks_a_graph_where_the_index_has_one(server: Server, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    entries = [Entry(f"r{i}", f"R{i}.", f"p{i}") for i in range(300)]
    pointer = server.push(made(tmp_path / "index", entries, vectors, kind="hnsw"))
    replies, client = server.load(pointer), server.client()
    [name] = client.list_indexes(read_pointer(pointer).collection, field_name="vector")
    found = client.describe_index(read_pointer(pointer).collection, name)
    assert (found["index_type"], found["metric_type"], read_pointer(pointer).ef > 0) == ("HNSW", "IP", True)
    best = [replies.search(vector, 1, **ANYONE)[0].row for vector in vectors[:100]]
    assert sum(row == asked for asked, row in enumerate(best)) >= 99


# Loading


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return made(tmp_path / "index", [Entry("a", "A.", "p"), Entry("b", "B.", "q")], directions([10, 20]))


def edited(pointer: Path, **fields: Any) -> Path:
    spec = json.loads((pointer / "index.json").read_text())
    (pointer / "index.json").write_text(json.dumps(spec | fields))
    return pointer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vectorizer": "77" * 32}, f"index.json vectorizer: found {'77' * 32}, expected {VECTORIZER}"),
        ({"digest": "0" * 64}, f"digest: found [0-9a-f]{{64}}, expected {'0' * 64}; remedy: push"),
        ({"dim": 3}, "dim: found 2, expected 3"),
        ({"rows": 3}, "rows: found 2, expected 3"),
        ({"collection": "nowhere"}, "nowhere: found no such collection"),
        (
            {"collection": "not a name"},
            "index.json collection: found 'not a name', expected String should match",
        ),
        ({"extra": 1}, "index.json extra: found 1"),
    ],
    ids=["vectorizer", "digest", "dim", "rows", "missing", "name", "extra"],
)
def test_milvus_load_refuses_a_pointer_that_means_another_collection(
    server: Server, index: Path, fields: dict[str, Any], message: str
) -> None:
    pointer = server.push(index)
    server.load(pointer)  # the control
    with pytest.raises(IndexInvalid, match=message):
        server.load(edited(pointer, **fields))


def test_milvus_load_refuses_a_collection_made_with_another_vectorizer(server: Server, index: Path) -> None:
    """The pointer was forged to fit the bundle; the collection was not."""
    other = "77" * 32
    pointer = server.push(index, vectorizer=other)
    MilvusReplies.load(pointer, uri=server.uri, vectorizer=other)  # the control
    with pytest.raises(IndexInvalid, match=f"vectorizer: found {other}, expected {VECTORIZER}; remedy: push"):
        server.load(edited(pointer, vectorizer=VECTORIZER))


@pytest.mark.parametrize(
    ("row", "message"), [(-1, "stamps: found 0, expected 1"), (1, "rows: found 1, expected 2")]
)
def test_milvus_load_refuses_a_collection_that_is_not_whole(
    server: Server, index: Path, row: int, message: str
) -> None:
    """Without its stamp, as after a push that broke off, or without one of its rows."""
    pointer = server.push(index)
    server.load(pointer)  # the control
    server.client().delete(read_pointer(pointer).collection, ids=[row])
    with pytest.raises(IndexInvalid, match=message):
        server.load(pointer)


def test_milvus_load_refuses_a_collection_of_something_else(server: Server, index: Path) -> None:
    pointer, client, name = server.push(index), server.client(), next(server.names)
    client.create_collection(name, dimension=4)
    server.made.append(name)
    with pytest.raises(IndexInvalid, match=f"{name} fields that lack: found .*'valid_from'"):
        server.load(edited(pointer, collection=name))
    with pytest.raises(IndexInvalid, match=f"{name} fields that lack"):
        push(index, pointer, uri=server.uri, collection=name, vectorizer=VECTORIZER, precision=PRECISION)
    assert client.has_collection(name)


def test_milvus_load_without_an_address_names_the_setting(server: Server, index: Path) -> None:
    with pytest.raises(IndexInvalid, match="set NLU_MILVUS_URI"):
        MilvusReplies.load(server.push(index), uri="", vectorizer=VECTORIZER)


def test_milvus_load_says_that_nobody_answers(
    server: Server, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "CONNECT_S", 0.2)
    with pytest.raises(IndexInvalid, match="Fail connecting .* remedy: check its address"):
        MilvusReplies.load(server.push(index), uri="http://127.0.0.1:1", vectorizer=VECTORIZER)


# Pushing


def test_milvus_push_of_the_same_index_again_changes_nothing(server: Server, index: Path) -> None:
    pointer = server.push(index)
    before = (pointer / "index.json").read_bytes()
    again = push(
        index, index.with_name("again"), uri=server.uri, collection=read_pointer(pointer).collection,
        vectorizer=VECTORIZER, precision=PRECISION,
    )  # fmt: skip
    assert (index.with_name("again") / "index.json").read_bytes() == before
    assert again == read_pointer(pointer)
    assert ids(server.load(pointer), 9) == ["a", "b"]


def test_milvus_push_leaves_a_collection_of_another_index_alone(
    server: Server, index: Path, tmp_path: Path
) -> None:
    pointer = server.push(index)
    other = made(tmp_path / "other", [Entry("c", "C.", "p")], directions([10]))
    with pytest.raises(IndexInvalid, match="digest: found .* a collection of another name"):
        push(
            other, tmp_path / "out", uri=server.uri, collection=read_pointer(pointer).collection,
            vectorizer=VECTORIZER, precision=PRECISION,
        )  # fmt: skip
    assert ids(server.load(pointer), 9) == ["a", "b"]
    assert not (tmp_path / "out").exists()


def test_milvus_push_that_breaks_off_leaves_nothing_behind(server: Server, index: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert server.client().has_collection(name)
        raise KeyboardInterrupt

    name, out = next(server.names), index.with_name("out")
    with pytest.raises(KeyboardInterrupt):
        push(
            index, out, uri=server.uri, collection=name, vectorizer=VECTORIZER, precision=PRECISION,
            progress=stop,
        )  # fmt: skip
    assert not server.client().has_collection(name)
    assert not out.exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("a\nb", "A.", "p"), "row 1: found the names .'a\\\\nb'"),
        (Entry("a", "A.", "p", tags=("t\x00",)), "row 1: found the names .'a', 't"),
        (Entry("a", "A.", "p", tags=tuple(f"t{i}" for i in range(257))), "expected at most 256"),
    ],
    ids=["id", "tag", "tags"],
)
def test_milvus_push_refuses_names_that_cannot_be_asked_for(
    server: Server, tmp_path: Path, entry: Entry, message: str
) -> None:
    index = made(tmp_path / "index", [Entry("ok", "Ok.", "p"), entry], directions([10, 20]))
    with pytest.raises(IndexInvalid, match=message):
        server.push(index)


def test_milvus_push_never_writes_its_pointer_over_an_index(server: Server, index: Path) -> None:
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    with pytest.raises(IndexInvalid, match="found an index, expected a folder for the pointer"):
        push(index, index, uri=server.uri, collection=next(server.names), vectorizer=VECTORIZER)
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before


@pytest.mark.skipif(bool(SERVER), reason="this server may have float16 fields")
def test_milvus_push_keeps_float16_unless_told_otherwise(server: Server, index: Path) -> None:
    """Milvus Lite has no such fields, and says which it was asked for."""
    assert milvus.DTYPES[DataType.FLOAT16_VECTOR] == np.float16
    name = next(server.names)
    with pytest.raises(IndexInvalid, match="Float16Vector which MilvusLite does not support"):
        push(index, index.with_name("out"), uri=server.uri, collection=name, vectorizer=VECTORIZER)


# Away


def test_milvus_away_is_told_and_over_when_the_server_is_back(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(milvus, "monotonic", lambda: clock[0])
    monkeypatch.setattr(milvus, "CONNECT_S", 0.5)
    server, database, port = start_server_in_thread(str(tmp_path / "data"))
    uri = f"http://127.0.0.1:{port}"
    out = tmp_path / "out"
    where: dict[str, Any] = {"uri": uri, "vectorizer": VECTORIZER}
    eventually(lambda: push(index, out, **where, collection="replies", precision="float32"), IndexInvalid)
    replies = eventually(lambda: MilvusReplies.load(out, **where), IndexInvalid)
    hits = replies.search(ALONG, 2, **ANYONE)
    server.stop(grace=None).wait()
    database.close()
    for _ in range(milvus.FAILURES_TO_PAUSE):
        with pytest.raises(MilvusAway, match="replies: found (?!a server that failed)"):
            replies.search(ALONG, 2, **ANYONE)
    with pytest.raises(MilvusAway, match="not asked again yet"):
        replies.search(ALONG, 2, **ANYONE)
    assert replies.moment(NOW) == 0  # asks nobody
    assert replies.said(hits).shape == (2, 2)  # known

    server, database, _ = start_server_in_thread(str(tmp_path / "data"), port=port)
    with pytest.raises(MilvusAway, match="not asked again yet"):
        replies.search(ALONG, 2, **ANYONE)
    clock[0] += milvus.PAUSE_S
    monkeypatch.setattr(milvus, "PAUSE_S", 0.0)
    assert (
        eventually(lambda: MilvusClient(uri, timeout=5).load_collection("replies"), MilvusException) is None
    )
    assert eventually(lambda: replies.search(ALONG, 2, **ANYONE), MilvusAway) == hits
    ConnectionManager.get_instance().close_all()
    server.stop(grace=None).wait()
    database.close()


def eventually(question: Callable[[], Any], *refused: type[Exception]) -> Any:
    """The answer, once there is one: a connection takes its time to come back."""
    while True:
        try:
            return question()
        except refused:
            time.sleep(0.05)
