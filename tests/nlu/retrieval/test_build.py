"""nlu.retrieval.build: files become an index that finds, the same one every time, and changes leave the rest alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.build import BuildInvalid
from index.layout import read_layout
from index.replies import Replies
from nlu import canaries, parts
from nlu.errors import EngineRefused
from nlu.normalizer import normalize
from nlu.retrieval import build as module
from nlu.retrieval import reading
from nlu.retrieval.build import Built, Wanted, add, build, files, pulled
from nlu.retrieval.read import RepliesInvalid
from nlu.retrieval.reading import Models
from tests.nlu.retrieval.kitchen import digests, lines, many, opened, written
from tests.tiny import Made

NOW = datetime(2026, 7, 1, tzinfo=UTC)
TEA: list[dict[str, Any]] = [
    {"reply": "Tea it is.", "prompt": ["make tea", "tea please"], "weight": 2, "tags": ["kitchen"]},
    {"reply": "Чай готов.", "prompt": "где чай", "persona": "calm", "id": "tea.ready"},
    {"reply": "tea it is!", "prompt": ["boil water", "MAKE TEA"], "weight": 5, "tags": "hot"},
    {"reply": "Look at the screen.", "surface": "tv", "valid_until": "2026-12-31", "emotion": "joy"},
    {"reply": "zzz zz", "prompt": "how are you"},
]


@pytest.fixture
def models(tiny: Made, tmp_path: Path) -> Iterator[Models]:
    with opened(tiny, tmp_path / "vectors") as found:
        yield found


def made(models: Models, out: Path, *records: dict[str, Any], **wanted: Any) -> Built:
    source = written(out.with_name(f"{out.name}.jsonl"), *records)
    return build(source, out, models, Wanted(**wanted), report=out.parent)


def vector(models: Models, text: str) -> Any:
    return models.vectorizer.encode([normalize(text).text], tokens=False)[0].sentence


def found(models: Models, folder: Path, text: str, k: int = 9, **where: Any) -> list[str]:
    situation = {"persona": None, "surface": None, "as_of": NOW} | where
    hits = Replies.load(folder).search(vector(models, text), k, **situation)
    return [hit.item.text for hit in hits]


def test_build_replies_are_found_by_their_prompts_or_their_own_words(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "index.tea"
    built = made(models, out, *TEA)
    assert (built.rows, built.replies, built.entries, built.merged) == (5, 4, 6, 1)
    for prompt in ("make tea", "tea please", "boil water"):
        assert found(models, out, prompt, 1) == ["Tea it is."]
    assert found(models, out, "где чай", 1, persona="calm") == ["Чай готов."]
    assert "Чай готов." not in found(models, out, "где чай", persona=None)
    assert found(models, out, "look at the screen", 1, surface="tv") == ["Look at the screen."]
    assert "Look at the screen." not in found(
        models, out, "look at the screen", surface="tv", as_of=NOW.replace(year=2027)
    )
    assert parts.part(out).requires == {"vectorizer": models.vectorizer.fingerprint}


def test_build_rows_of_one_reply_are_united(models: Models, tmp_path: Path) -> None:
    made(models, tmp_path / "index.tea", *TEA)
    replies = Replies.load(tmp_path / "index.tea")
    rows = [replies.items.reply(row) for row in range(len(replies))]
    tea = [item for item in rows if item.text == "Tea it is."]
    assert [item.prompt for item in tea] == ["make tea", "tea please", "boil water"]
    assert {(item.weight, item.tags) for item in tea} == {(5.0, ("hot", "kitchen"))} and len(
        {item.id for item in tea}
    ) == 1
    assert lines(tmp_path / "merges.jsonl") == [
        {"id": tea[0].id, "kept": "Tea it is.", "merged": "tea it is!", "why": "the same words"}
    ]
    ready = next(item for item in rows if item.id == "tea.ready")
    assert (replies.personas, replies.surfaces) == (("calm",), ("tv",)) and ready.persona_mask == 1


def test_build_rows_carry_what_heads_say_and_vectors_of_their_texts(models: Models, tmp_path: Path) -> None:
    made(models, tmp_path / "index.tea", *TEA)
    replies = Replies.load(tmp_path / "index.tea")
    hits = replies.search(vector(models, "tea please"), 2, persona="calm", surface=None, as_of=NOW)
    for hit, said in zip(hits, replies.said(hits), strict=True):
        own = vector(models, hit.item.text)
        assert said @ own > 0.999
        (opinion,) = models.judge(own[None])
        stored = {(judged.head, judged.label): judged.score for judged in hit.item.labels}
        assert stored == pytest.approx({(j.head, j.label): j.score for j in opinion.labels}, abs=1e-5)
        assert {head for head, _ in stored} == {"intent", "emotion", "toxicity"}


def test_build_toxic_and_banned_replies_are_kept_and_never_found(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "index.tea"
    built = made(models, out, *TEA, banned=["tea.ready", "TEA it is.", "never said"])
    assert (built.toxic, built.banned, built.judged, built.unmatched) == (1, 2, True, ("never said",))
    told = {line["text"]: line["why"] for line in lines(tmp_path / "blocked.jsonl")}
    assert told.keys() == {"Tea it is.", "Чай готов.", "zzz zz"}
    assert told["Tea it is."] == told["Чай готов."] == "banned" and told["zzz zz"].startswith("toxicity ")
    for prompt in ("make tea", "где чай", "how are you", "zzz zz"):
        assert not set(found(models, out, prompt, persona="calm", surface="tv")) & told.keys()
    assert Replies.load(out).items.blocked.sum() == 5  # they are there

    lenient = made(models, tmp_path / "index.rude", *TEA, max_toxicity=0.99)
    assert (lenient.toxic, lenient.banned) == (0, 0)
    assert found(models, tmp_path / "index.rude", "how are you", 1) == ["zzz zz"]


def test_build_without_a_toxicity_head_says_that_nobody_looked(tiny: Made, tmp_path: Path) -> None:
    with opened(tiny, tmp_path / "vectors", judged=False) as models:
        built = made(models, tmp_path / "index.tea", *TEA)
    assert not built.judged and built.toxic == 0
    assert Replies.load(tmp_path / "index.tea").items.reply(0).labels == ()


@pytest.mark.parametrize(
    ("encode", "prompts", "texts"),
    [
        ("prompts", ["make tea", "tea please", "где чай", "boil water", "", "how are you"], 4),
        ("replies", ["", "", "", ""], 0),
        ("both", ["", "make tea", "tea please", "", "где чай", "boil water", "", "", "how are you"], 4),
    ],
)
def test_build_encodes_prompts_replies_or_both(
    models: Models, tmp_path: Path, encode: Any, prompts: list[str], texts: int
) -> None:
    built = made(models, tmp_path / "index.tea", *TEA, encode=encode)
    replies = Replies.load(tmp_path / "index.tea")
    assert [replies.items.reply(row).prompt for row in range(len(replies))] == prompts
    assert built.layout.said_rows == texts
    for row in range(len(replies)):
        item = replies.items.reply(row)
        own = vector(models, item.prompt or item.text)
        stored = replies.index.rows[replies.items.vectors[row], :8]  # type: ignore[attr-defined]
        assert stored.astype(np.float32) @ own > 0.999


def test_build_near_merges_what_differs_by_a_small_word(models: Models, tmp_path: Path) -> None:
    said = "we will surely come back to the old house by the sea and stay there until the end of summer"
    records: list[dict[str, Any]] = [
        {"reply": said, "prompt": "one"},
        {"reply": said.replace("surely ", ""), "prompt": "two", "weight": 3},
        {"reply": said.replace("will", "will not"), "prompt": "three"},
        {"reply": f"{said} 5", "prompt": "four"},
        {"reply": said.replace("surely ", ""), "prompt": "five", "persona": "calm"},
    ]
    (tmp_path / "near").mkdir()
    near = made(models, tmp_path / "near" / "index.x", *records, merge="near")
    assert (near.replies, near.merged) == (4, 1)
    (merge,) = lines(tmp_path / "near" / "merges.jsonl")
    assert (merge["kept"], merge["merged"]) == (said, records[1]["reply"])
    assert merge["why"] == "nearly the same words and vector"
    replies = Replies.load(tmp_path / "near" / "index.x")
    assert [(item.prompt, item.weight) for row in range(5) if (item := replies.items.reply(row)).text == said] == [
        ("one", 3.0), ("two", 3.0),
    ]  # fmt: skip
    same = made(models, tmp_path / "index.x", *records)  # without being asked it does not
    assert (same.replies, same.merged) == (5, 0)


def test_build_gives_the_same_bytes_whoever_encodes_and_however_often(tiny: Made, tmp_path: Path) -> None:
    records = [*TEA, *many(1100)]
    for name, store, workers in (("a", "one", 1), ("b", "other", 3), ("c", "one", 2)):
        with opened(tiny, tmp_path / store, workers=workers) as models:
            (tmp_path / name).mkdir()
            made(models, tmp_path / name / "index.x", *records, kind="hnsw", merge="near", shards=3)
            assert (models.store.encoded == 0) == (name == "c")  # the third met everything on disk
    first = digests(tmp_path / "a" / "index.x")
    assert first == digests(tmp_path / "b" / "index.x") == digests(tmp_path / "c" / "index.x")
    with opened(tiny, tmp_path / "one") as models:
        made(models, tmp_path / "a" / "index.x", *records[1:], kind="hnsw", merge="near", shards=3)
    assert first != digests(tmp_path / "a" / "index.x")


def test_build_shards_are_at_most_as_many_as_asked(models: Models, tmp_path: Path) -> None:
    layout = made(models, tmp_path / "index.x", *many(100), shards=3).layout
    assert 2 <= len(layout.shards) <= 3 and layout.shard_rows == 40
    layout = made(models, tmp_path / "index.x", *many(100), shard_rows=64).layout
    assert [shard.rows for shard in layout.shards] == [64, layout.rows - 64]


def test_build_reads_in_batches(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [*TEA, *many(40), *TEA]
    made(models, tmp_path / "index.whole", *records)
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 3)
    built = made(models, tmp_path / "index.parts", *records)
    assert (built.rows, built.replies, built.entries) == (50, 44, 46)
    whole, in_parts = (Replies.load(tmp_path / name).items.table for name in ("index.whole", "index.parts"))
    assert whole.drop(["labels", "blocked"]).equals(in_parts.drop(["labels", "blocked"]))


@pytest.mark.parametrize(
    ("records", "wanted", "words"),
    [
        ([], {}, "found no replies, expected some; --allow-empty"),
        ([{"reply": "ok"}, {"reply": "..."}], {}, "index.x.jsonl:2: reply: found nothing but spaces"),
        ([{"reply": "ok", "id": "a"}, {"reply": "no", "id": "a"}], {}, "index.x.jsonl:2: id: found 'a'"),
        ([{"reply": "ok", "persona": "grim"}], {"personas": ["calm"]}, "index.x.jsonl:1: persona: found 'grim', expected one of: calm"),
        ([{"reply": "ok", "surface": "tv"}], {"surfaces": []}, "surface: found 'tv', expected one of: none; name it in --surfaces"),
        ([{"reply": f"{i}", "persona": f"p{i}"} for i in range(33)], {}, "expected at most 32 different names"),
        ([{"reply": "ok"}], {"shard_rows": 12}, "expected a multiple of 8"),
    ],
    ids=["empty", "bad-row", "id", "persona", "surface", "too-many", "shard-rows"],
)  # fmt: skip
def test_build_refuses_and_leaves_what_is_there(
    models: Models, tmp_path: Path, records: list[dict[str, Any]], wanted: dict[str, Any], words: str
) -> None:
    made(models, tmp_path / "index.x", *TEA)
    before, told = digests(tmp_path / "index.x"), (tmp_path / "merges.jsonl").read_bytes()
    with pytest.raises((RepliesInvalid, BuildInvalid)) as refused:
        made(models, tmp_path / "index.x", *records, **wanted)
    assert words in str(refused.value)
    assert digests(tmp_path / "index.x") == before and (tmp_path / "merges.jsonl").read_bytes() == told
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.x", "index.x.jsonl", "merges.jsonl", "blocked.jsonl", "vectors",
    }  # fmt: skip


def test_build_shows_the_first_bad_rows_and_counts_all(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RepliesInvalid) as refused:
        made(models, tmp_path / "index.x", *[{"reply": "!"}] * 25)
    told = str(refused.value).splitlines()
    assert "(25 in all)" in told[0] and len(told) == 12 and told[-1] == "... and 15 more"
    assert told[10].startswith("index.x.jsonl:10: reply: found")


def test_build_an_empty_index_may_be_asked_for(models: Models, tmp_path: Path) -> None:
    built = made(models, tmp_path / "index.x", allow_empty=True)
    assert (built.replies, built.layout.items) == (0, 0)
    assert found(models, tmp_path / "index.x", "hello") == []


def test_build_the_folder_says_that_it_is_an_index(models: Models, tmp_path: Path) -> None:
    for name in ("tea", "head.tea", "index."):
        with pytest.raises(ValueError, match="expected a folder called index.NAME"):
            made(models, tmp_path / name, *TEA)


def test_build_sweeps_what_killed_builds_left(models: Models, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f".index.x.building-{gone.pid}", tmp_path / f".index.x.changing-{gone.pid}"]
    others = [tmp_path / f".index.x.building-{os.getppid()}", tmp_path / f".index.y.building-{gone.pid}"]
    for folder in (*left, *others):
        folder.mkdir()
    made(models, tmp_path / "index.x", *TEA)
    assert not any(folder.exists() for folder in left) and all(folder.exists() for folder in others)


def added(
    models: Models, folder: Path, *records: dict[str, Any], out: Path | None = None, **wanted: Any
) -> Built:
    source = written(folder.with_name("more.jsonl"), *records)
    return add(folder, source, out or folder, models, Wanted(**wanted), report=folder.parent)


def test_add_brings_new_replies_and_new_prompts_of_old_ones(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "index.tea"
    made(models, out, *TEA)
    built = added(
        models, out,
        {"reply": "TEA it is", "prompt": ["put the kettle on", "make tea"], "weight": 9},
        {"reply": "Bread is ready.", "prompt": "bread", "id": "bread", "persona": "calm"},
        {"reply": "zzzz z", "prompt": "weather"},
        {"reply": "Чай готов.", "prompt": "чайник", "persona": "calm", "id": "tea.ready"},
    )  # fmt: skip
    assert (built.rows, built.replies, built.entries, built.merged, built.toxic) == (4, 2, 4, 1, 1)
    assert found(models, out, "put the kettle on", 1) == ["Tea it is."]
    assert found(models, out, "bread", 1, persona="calm") == ["Bread is ready."]
    assert found(models, out, "чайник", 1, persona="calm") == ["Чай готов."]
    assert "zzzz z" not in found(models, out, "weather", 20)
    replies = Replies.load(out)
    tea = [replies.items.reply(row) for row in replies.items.rows_of(replies.items.reply(0).id)]
    assert [item.prompt for item in tea] == ["make tea", "tea please", "boil water", "put the kettle on"]
    assert {(item.weight, item.tags, item.labels) for item in tea} == {
        (5.0, ("hot", "kitchen"), tea[0].labels)
    }
    canaries.check("index", out, models.vectorizer)


def test_add_finds_what_a_whole_build_finds(models: Models, tmp_path: Path) -> None:
    records = many(120)
    made(models, tmp_path / "index.whole", *records)
    made(models, tmp_path / "index.grown", *records[:50])
    added(models, tmp_path / "index.grown", *records[50:])
    for record in records[::7]:
        asked = [
            found(models, tmp_path / name, record["prompt"], 3) for name in ("index.whole", "index.grown")
        ]
        assert asked[0] == asked[1] and record["reply"] in asked[0]


def test_add_leaves_full_shards_and_the_graph_alone(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "index.x"
    made(models, out, *many(100), shard_rows=32, kind="hnsw")
    before = files(out)
    built = added(models, out, *many(140)[100:])
    fetched = pulled(before, files(out))
    full = {shard.file for shard in built.layout.shards if before.get(shard.file, (0, ""))[1] == shard.sha256}
    assert full >= {"shard-000.f16", "shard-001.f16", "shard-002.f16"} and not full & fetched.keys()
    assert not fetched.keys() & {"graph-links.i32", "graph-levels.u8", "canaries.safetensors", "said-000.f16"}
    assert fetched.keys() >= {"index.json", "items.arrow"}
    assert fetched["items.arrow"] == (out / "items.arrow").stat().st_size
    graph = built.layout.graph
    assert graph is not None and graph.rows < built.layout.rows == read_layout(out).rows


def test_add_elsewhere_leaves_the_index_as_it_was(models: Models, tmp_path: Path) -> None:
    made(models, tmp_path / "index.x", *TEA)
    before = digests(tmp_path / "index.x")
    added(models, tmp_path / "index.x", {"reply": "Bread.", "prompt": "toast"}, out=tmp_path / "index.y")
    assert digests(tmp_path / "index.x") == before != digests(tmp_path / "index.y")


def test_add_to_replies_found_by_their_own_words(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "index.x"
    made(models, out, *TEA, encode="replies")
    with pytest.raises(RepliesInvalid, match="more.jsonl: found prompts, expected none"):
        added(models, out, {"reply": "Bread.", "prompt": "toast"})
    added(models, out, {"reply": "Bread.", "prompt": "toast"}, encode="replies")
    assert found(models, out, "bread.", 1) == ["Bread."]


@pytest.mark.parametrize(
    ("record", "wanted", "words"),
    [
        ({"reply": "Bread.", "id": "tea.ready"}, {}, "more.jsonl:1: id: found 'tea.ready', which another reply has"),
        ({"reply": "Bread.", "persona": "grim"}, {}, "more.jsonl:1: persona: found 'grim', expected one of: calm"),
        ({"reply": "Tea it is", "prompt": "x"}, {"banned": ["Tea it is"]}, "nlu index block"),
        ({"reply": "Tea it is", "prompt": "!"}, {}, "more.jsonl:1: prompt: found nothing"),
    ],
    ids=["id", "persona", "banned", "bad-row"],
)  # fmt: skip
def test_add_refuses_and_leaves_the_index_as_it_was(
    models: Models, tmp_path: Path, record: dict[str, Any], wanted: dict[str, Any], words: str
) -> None:
    out = tmp_path / "index.x"
    made(models, out, *TEA)
    before = digests(out)
    with pytest.raises(RepliesInvalid) as refused:
        added(models, out, record, **wanted)
    assert words in str(refused.value) and digests(out) == before
    assert not list(tmp_path.glob(".index*"))


def test_add_refuses_an_index_of_another_vectorizer(models: Models, stranger: Made, tmp_path: Path) -> None:
    made(models, tmp_path / "index.x", *TEA)
    before = digests(tmp_path / "index.x")
    with (
        opened(stranger, tmp_path / "vectors") as other,
        pytest.raises(EngineRefused, match="canaries that moved"),
    ):
        added(other, tmp_path / "index.x", {"reply": "Bread."})
    assert digests(tmp_path / "index.x") == before


def test_add_the_same_again_changes_nothing_but_is_no_error(models: Models, tmp_path: Path) -> None:
    made(models, tmp_path / "index.x", *TEA)
    before = digests(tmp_path / "index.x")
    built = added(models, tmp_path / "index.x", *TEA)
    assert (built.rows, built.replies, built.entries) == (5, 0, 0)
    assert digests(tmp_path / "index.x").keys() == before.keys()
    assert module.opened(tmp_path / "index.x")[0].items == 6
