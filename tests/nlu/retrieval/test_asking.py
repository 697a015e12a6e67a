"""nlu.retrieval.asking: the answers are the service's, and coverage and percentiles are those of hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.build import Entry, build
from index.replies import Replies
from nlu.features import Situation
from nlu.ranker import Ranker
from nlu.retrieval.asking import QUANTILES, Answer, ask, coverage, latency
from nlu.retrieval.dialogs import Exchange
from tests.nlu.retrieval.turning import turning

DIM = 8


def units(count: int) -> NDArray[np.float32]:
    """[count, DIM]"""
    drawn = np.random.default_rng(0).standard_normal((count, DIM))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


def made(folder: Path, personas: tuple[str, ...] = ()) -> Replies:
    entries = [
        Entry(
            id=f"r{i}",
            text=f"Reply {i}.",
            prompt=f"prompt {i}",
            weight=5.0 if i == 3 else 1.0,
            personas=personas,
        )
        for i in range(30)
    ]
    build(entries, units(30), folder, personas=("calm",), surfaces=())
    return Replies.load(folder)


def asked(replies: Replies, ranker: Ranker, persona: str | None = None) -> list[Answer]:
    return ask([Situation("so?", vector) for vector in units(30)], replies, None, ranker, persona=persona)


def test_asking_gives_the_best_ranked_reply(tmp_path: Path) -> None:
    replies = made(tmp_path / "index")
    nearest = asked(replies, Ranker.linear({"similarity": 1.0}))
    assert [answer.text for answer in nearest] == [f"Reply {i}." for i in range(30)]
    assert np.allclose([answer.similarity for answer in nearest], 1.0, atol=2e-3)
    # What a ranker prefers comes first wherever it is found, with its own similarity.
    preferred = asked(replies, Ranker.linear({"weight": 1.0}))
    changed = [answer for i, answer in enumerate(preferred) if answer.text == "Reply 3." and i != 3]
    assert changed and all(answer.similarity < 0.99 for answer in changed)
    assert all(answer.search_ns > 0 and answer.rank_ns > 0 for answer in preferred)


def test_asking_goes_through_the_adapter(tmp_path: Path) -> None:
    replies, adapter = made(tmp_path / "index"), turning(DIM)
    situations = [Situation("so?", vector) for vector in units(30)]
    answers = ask(situations, replies, adapter, Ranker.linear({"similarity": 1.0}), persona=None)
    nearest = [int((units(30) @ adapter.apply(each.vector)).argmax()) for each in situations]
    assert [answer.text for answer in answers] == [f"Reply {i}." for i in nearest]
    assert nearest != list(range(30))  # without it


def test_asking_has_no_answer_where_nothing_may_be_said(tmp_path: Path) -> None:
    replies = made(tmp_path / "index", personas=("calm",))
    assert all(answer.text for answer in asked(replies, Ranker.linear(), "calm"))  # the control
    assert {(answer.text, answer.similarity) for answer in asked(replies, Ranker.linear())} == {("", -1.0)}


def test_asking_coverage_is_that_of_hand() -> None:
    exchanges = [Exchange("d", ("so?",), reply, reply) for reply in ("one", "two", "три", "unknown")]
    answers = [Answer(text, s, 1, 1) for text, s in (("One", 0.9), ("One", 0.7), ("Три", 0.5), ("Two", 0.3))]
    phrases = {"One": "one", "Two": "two", "Три": "три"}
    found = coverage(answers, exchanges, phrases)
    assert (found["exchanges"], found["known"]) == (4, 3)
    assert [point["quantile"] for point in found["curve"]] == list(QUANTILES)
    lowest, highest = found["curve"][0], found["curve"][-1]
    assert (lowest["threshold"], lowest["coverage"]) == (0.3, 1.0)
    assert lowest["precision"] == pytest.approx(2 / 3)  # "unknown" can be nobody's fault
    assert highest["coverage"] == 0.25 and highest["precision"] == 1.0
    middle = next(point for point in found["curve"] if point["quantile"] == 0.5)
    assert (middle["coverage"], middle["precision"]) == (0.5, 0.5)


@pytest.mark.parametrize("phrases", [None, {"Elsewhere": "elsewhere"}], ids=["cannot be listed", "others"])
def test_asking_precision_is_not_told_where_nothing_is_known(phrases: dict[str, str] | None) -> None:
    exchanges = [Exchange("d", ("so?",), reply, reply) for reply in ("one", "two")]
    answers = [Answer("Elsewhere", 0.9, 1, 1), Answer("Elsewhere", 0.4, 1, 1)]
    found = coverage(answers, exchanges, phrases)
    assert found["known"] == 0
    assert {point["precision"] for point in found["curve"]} == {None}
    assert found["curve"][0]["coverage"] == 1.0


def test_asking_latency_counts_every_answer() -> None:
    found = latency([Answer("", 0.0, 1000 * i, 500) for i in range(1, 101)])
    assert found["us"]["search"]["p50"] == pytest.approx(50.5)
    assert found["us"]["search"]["p99"] == pytest.approx(99.01)
    assert found["us"]["rank"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5}
    for name, (low, high) in {"search": (1.0, 100.0), "rank": (0.5, 0.505)}.items():
        histogram = found["histogram"][name]
        assert sum(histogram["counts"]) == found["answers"] == 100
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert (histogram["edges"][0], histogram["edges"][-1]) == pytest.approx((low, high))
