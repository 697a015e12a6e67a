"""nlu.retrieval.lessons: candidate sets that are what they say, and features that are those of the service."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from nlu.engine import Engine
from nlu.features import Features
from nlu.retrieval.dialogs import read
from nlu.retrieval.evaluate import make_base, prepare
from nlu.retrieval.lessons import Lessons
from nlu.vector_store import VectorStore
from tests.nlu.retrieval.talk import silent, write_dialogs


@pytest.fixture(scope="module")
def lessons(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    folder = tmp_path_factory.mktemp("lessons")
    dialogs = write_dialogs(folder / "things.jsonl", 100)
    store = VectorStore(folder / "vectors", engine.vectorizer, 1, silent)
    found = prepare(list(read([dialogs], uncased=True, context=4)), engine, store, silent)
    store.close()
    return found


def test_lessons_sets_are_the_true_reply_and_others_of_other_dialogs(lessons: Lessons) -> None:
    of: dict[str, set[str]] = {}
    for exchange in lessons.exchanges:
        of.setdefault(exchange.reply, set()).add(exchange.dialog)
    for sets in (lessons.sets(12, 0, 0), lessons.sets(12, 4, 0), lessons.nearest(8, 0)):
        for exchange, rows in zip(lessons.exchanges, sets.tolist(), strict=True):
            assert lessons.items[rows[0]].id == exchange.reply
            assert all(exchange.dialog not in of[lessons.items[row].id] for row in rows[1:])


def test_lessons_nearest_are_those_of_plain_arithmetic(lessons: Lessons) -> None:
    sets = lessons.nearest(8, 0)
    for i in range(0, len(sets), 37):
        cosines = lessons.vectors @ lessons.situations[i].vector
        mine = lessons.exchanges[i].dialog
        for row, item in enumerate(lessons.items):
            if any(each.reply == item.id and each.dialog == mine for each in lessons.exchanges):
                cosines[row] = -1.0
        assert set(sets[i, 1:].tolist()) == set(np.argsort(-cosines)[:7].tolist())


def test_lessons_hard_ones_lie_nearer_than_others(lessons: Lessons) -> None:
    sets = lessons.sets(12, 5, 0)
    queries = np.stack([situation.vector for situation in lessons.situations])
    cosines = np.einsum("ncd,nd->nc", lessons.vectors[sets], queries)
    assert cosines[:, -5:].mean() > cosines[:, 1:-5].mean() + 0.1


def test_lessons_features_are_those_that_are_served(lessons: Lessons, tmp_path: Path) -> None:
    """A real index of the same replies finds the same hits with the same features, but for float16."""
    features = Features.of(
        [
            "similarity", "reply_similarity", "context_similarity_1", "dialog_similarity", "reply_overlap", "long_words",
            "context_share", "assistant_overlap", "user_overlap", "reply_length", "query.intent.stop", "reply.intent.stop",
            "reply.emotion.anger",
        ]
    )  # fmt: skip
    base = make_base(lessons, tmp_path / "index")
    numbers = {item.id: row for row, item in enumerate(lessons.items)}
    for i in (3, 77, 205):
        situation = lessons.situations[i]
        served = base.search(situation.vector, 6, persona=None, surface=None, as_of=datetime.now(UTC))
        rows = np.array([numbers[hit.item.id] for hit in served])
        np.testing.assert_allclose(
            features.table(situation, served, base.said),
            features.table(situation, lessons.hits(i, rows), lessons.said),
            atol=2e-3,
        )


def test_lessons_speakers_take_turns(lessons: Lessons) -> None:
    longest = max(lessons.situations, key=lambda situation: len(situation.turns))
    assert [turn.role for turn in longest.turns] == ["assistant", "user", "assistant"]
