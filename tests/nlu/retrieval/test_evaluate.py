"""nlu.retrieval.evaluate: places that agree with plain arithmetic, rankers and adapters told apart, and a whole report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from index.build import Entry, build
from index.replies import Replies
from nlu.engine import Engine
from nlu.ranker import Ranker
from nlu.retrieval import evaluate as judging
from nlu.retrieval.dialogs import Exchange
from nlu.retrieval.evaluate import (
    Contestant,
    among,
    among_all,
    contestants,
    draw,
    evaluate,
    make_base,
    prepare,
)
from nlu.retrieval.ranking_measures import candidates
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer
from tests.nlu.retrieval.turning import turning

THINGS = ("kettle", "window", "garden", "pillow", "bucket", "жираф", "маяк", "сундук", "вагон", "ракета")
DOINGS = ("is broken", "looks nice", "has gone", "стоит тут", "светится")


def silent(what: str, done: int, total: int) -> None: ...


def exchanges() -> list[Exchange]:
    """Ten dialogs. Each reply has a word of its query, which no other dialog has, and many letters of other things."""
    found = []
    for number, thing in enumerate(THINGS):
        others = " ".join(THINGS[(number + step) % 10][::-1] for step in (1, 3, 4))
        for i, doing in enumerate(DOINGS):
            reply = f"{doing} {others[i:]} {thing}"
            found.append(Exchange(thing, (f"the {thing} then", f"{thing} {doing}")[i % 2 :], reply, reply))
    return found


@pytest.fixture
def store(vectorizer: Vectorizer, tmp_path: Path) -> Iterator[VectorStore]:
    store = VectorStore(tmp_path / "vectors", vectorizer, 1, lambda done, total: None)
    yield store
    store.close()


@pytest.fixture
def plain(engine: Engine, vectorizer: Vectorizer) -> Engine:
    """The tiny engine without replies, with the default ranker."""
    assert engine.vectorizer.fingerprint == vectorizer.fingerprint
    return replace(engine, replies=None, adapter=None, ranker=Ranker.linear())


def test_evaluate_places_among_candidates_are_those_of_plain_cosines(
    plain: Engine, store: VectorStore, vectorizer: Vectorizer
) -> None:
    given, adapter = exchanges(), turning(vectorizer.dim)
    sets = candidates(given, 12, seed=0)
    found = among(
        prepare(given, plain, store, silent),
        sets,
        [Contestant("cosine"), Contestant("adapter", adapter), Contestant("linear", None, Ranker.linear())],
        silent,
    )
    replies = list(dict.fromkeys(each.reply for each in given))
    vectors = np.stack([each.sentence for each in vectorizer.encode(replies, tokens=False)])
    for i, exchange in enumerate(given):
        query = vectorizer.encode([exchange.context[-1]], tokens=False)[0].sentence
        for name, asked in (("cosine", query), ("adapter", adapter.apply(query)), ("linear", query)):
            scores = (vectors[sets[i]] @ asked).astype(np.float64)
            close = int((scores[1:] > scores[0] + 1e-5).sum()) + 1, int((scores > scores[0] - 1e-5).sum())
            assert close[0] <= found[name][i] <= close[1]
    assert found["cosine"].tolist() == found["linear"].tolist()
    assert found["cosine"].tolist() != found["adapter"].tolist()


def test_evaluate_places_among_all_are_those_of_an_index_without_what_was_said(
    plain: Engine, store: VectorStore, vectorizer: Vectorizer, tmp_path: Path
) -> None:
    # A dialog whose second query was a reply before: found first if it were not left out.
    given = [
        *exchanges(),
        Exchange("echo", ("kettle is broken",), "oh dear", "Oh dear"),
        Exchange("echo", ("kettle is broken", "oh dear"), "i shall mend it", "I shall mend it"),
        Exchange("again", ("oh dear", "oh dear"), "oh dear", "Oh dear"),  # the true reply is never left out
    ]
    told = prepare(given, plain, store, silent)
    base = make_base(told, tmp_path / "base")
    adapter = turning(vectorizer.dim)
    found = among_all(told, base, [Contestant("cosine"), Contestant("adapter", adapter)], silent)
    replies = list(dict.fromkeys(each.reply for each in given))
    vectors = np.stack([each.sentence for each in vectorizer.encode(replies, tokens=False)]).astype(
        np.float64
    )
    for i, exchange in enumerate(given):
        query = vectorizer.encode([exchange.context[-1]], tokens=False)[0].sentence
        for name, asked in (("cosine", query), ("adapter", adapter.apply(query))):
            scores = dict(zip(replies, (vectors @ asked).tolist(), strict=True))
            true = scores.pop(exchange.reply)
            others = np.array([score for reply, score in scores.items() if reply not in exchange.context])
            assert 1 + (others > true + 1e-3).sum() <= found[name][i] <= 1 + (others > true - 1e-3).sum()
    assert found["cosine"][-1] == 1
    assert (found["cosine"] != found["adapter"]).any()


def test_evaluate_a_ranker_orders_the_first_found_and_no_more(
    plain: Engine, store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = exchanges()
    told = prepare(given, plain, store, silent)
    base = make_base(told, tmp_path / "base")
    entrants = [Contestant("cosine"), Contestant("ranker", None, Ranker.linear({"reply_overlap": 1.0}))]
    monkeypatch.setattr(judging, "RERANKED", 10)
    found = among_all(told, base, entrants, silent)
    beyond = found["cosine"] > 10
    assert 0 < beyond.sum() < len(given)  # both kinds are there
    assert (found["ranker"][beyond] == found["cosine"][beyond]).all()
    assert (found["ranker"][~beyond] <= 10).all()
    assert (found["ranker"] != found["cosine"]).any()


def test_evaluate_a_reply_that_is_not_found_has_no_place(
    plain: Engine, store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = prepare(exchanges(), plain, store, silent)
    base = make_base(told, tmp_path / "base")
    whole = among_all(told, base, [Contestant("cosine")], silent)["cosine"]
    monkeypatch.setattr(judging, "FOUND", 5)
    found = among_all(told, base, [Contestant("cosine")], silent)["cosine"]
    assert (found[whole <= 5] == whole[whole <= 5]).all()
    assert (1 / found[whole > 5] < 1e-9).all() and (whole > 5).any()


def test_evaluate_a_ranker_that_knows_gains_and_one_that_is_wrong_loses(
    plain: Engine, store: VectorStore
) -> None:
    reports = [
        evaluate(
            exchanges(),
            replace(plain, ranker=Ranker.linear({"reply_overlap": weight})),
            store,
            of=20,
            seed=0,
            persona="",
        )["among"]["contestants"]["ranker"]
        for weight in (1.0, -1.0)
    ]
    right, wrong = reports
    assert right["measures"]["recall@1"]["value"] > 0.9
    assert right["gain"]["recall@1"]["low"] > 0
    assert wrong["measures"]["recall@1"]["value"] == 0
    assert wrong["gain"]["mrr"]["high"] < 0


def test_evaluate_contestants_are_what_the_engine_has(plain: Engine, vectorizer: Vectorizer) -> None:
    assert [each.name for each in contestants(plain)] == ["cosine", "linear"]
    own = replace(plain, adapter=turning(vectorizer.dim), ranker=Ranker.linear({"similarity": 2.0}))
    found = {each.name: each for each in contestants(own)}
    assert list(found) == ["cosine", "adapter", "linear", "ranker"]
    assert found["ranker"].adapter is own.adapter and found["cosine"].adapter is None


def test_evaluate_reports_all_and_the_same_again(plain: Engine, store: VectorStore) -> None:
    steps: list[tuple[str, int, int]] = []
    reports = [
        evaluate(
            exchanges(), plain, store, of=20, seed=7, persona="", progress=lambda *step: steps.append(step)
        )
        for _ in range(2)
    ]
    first, second = ({key: part for key, part in report.items() if key != "latency"} for report in reports)
    assert json.loads(json.dumps(first)) == second
    assert (first["exchanges"], first["dialogs"], first["replies"]) == (50, 10, 50)
    assert "coverage" not in first
    assert reports[0]["latency"]["index"] == "the dialogs' replies"
    for key in ("among", "among_all"):
        for contestant in first[key]["contestants"].values():
            assert set(contestant["measures"]) == {"recall@1", "recall@5", "recall@10", "mrr"}
            for each in contestant["measures"].values():
                assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
    assert {("among candidates", 50, 50), ("among all", 50, 50), ("asking", 50, 50)} <= set(steps)


def test_evaluate_asks_the_index_that_is_served(plain: Engine, store: VectorStore, tmp_path: Path) -> None:
    given = exchanges()
    half = [each for each in given if each.dialog in THINGS[:5]]
    queries = [each.context[-1] for each in half]
    rows = np.stack([each.sentence for each in store.encode(queries, tokens=False)])
    entries = [
        Entry(id=each.reply, text=each.text.upper(), prompt=query, personas=("calm",))
        for each, query in zip(half, queries, strict=True)
    ]
    build(entries, rows, tmp_path / "index", personas=("calm",), surfaces=())
    engine = replace(plain, replies=Replies.load(tmp_path / "index"))
    report = evaluate(given, engine, store, of=20, seed=0, persona="calm")
    assert report["coverage"]["known"] == 25  # the texts differ in case alone
    assert report["coverage"]["curve"][-1]["threshold"] > 0.99  # the same queries
    assert report["latency"]["rows"] == 25
    # Nobody but that persona may say any of it.
    stranger = evaluate(given, engine, store, of=20, seed=0, persona="unknown")["coverage"]
    assert stranger["curve"][-1]["threshold"] == -1.0


def test_evaluate_too_few_dialogs_are_refused_before_anything_is_encoded(
    plain: Engine, store: VectorStore
) -> None:
    with pytest.raises(ValueError, match="found 45 replies outside the longest dialog, expected at least 99"):
        evaluate(exchanges(), plain, store, of=100, seed=0, persona="")
    assert store.encoded == 0


def test_evaluate_draws_whole_dialogs_by_seed() -> None:
    given = exchanges()
    drawn = draw(given, 12, seed=1)
    assert len(drawn) == 12
    dialogs = list(dict.fromkeys(each.dialog for each in drawn))
    assert drawn == [each for dialog in dialogs for each in given if each.dialog == dialog][:12]
    assert drawn == draw(given, 12, seed=1)
    assert drawn != draw(given, 12, seed=2)
    assert sorted(draw(given, 999, seed=1), key=str) == sorted(given, key=str)


def test_evaluate_the_base_is_an_index_like_any_other(
    plain: Engine, store: VectorStore, tmp_path: Path
) -> None:
    told = prepare(exchanges(), plain, store, silent)
    base = make_base(told, tmp_path / "base")
    assert len(base) == len(told.items) == 50
    hits = base.search(told.vectors[3], 1, persona=None, surface=None, as_of=datetime.now(UTC))
    assert hits[0].item.id == told.items[3].id
    assert {judged.head for judged in hits[0].item.labels} >= {"intent", "emotion"}
    assert [each[:2] for each in hits[0].item.labels] == [each[:2] for each in told.items[3].labels]
    np.testing.assert_allclose(base.said(hits), told.vectors[[3]], atol=1e-3)
