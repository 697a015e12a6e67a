"""nlu.ranker: scores against numbers computed by hand, the order they give, and the file they are read from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from annotators.annotator import Annotation, Label, Status
from index.items import EVERYONE, ReplyItem
from index.replies import Hit
from nlu.errors import EngineRefused
from nlu.ranker import DEFAULT_WEIGHTS, FEATURES, FILE, Ranker


def hit(
    name: str,
    similarity: float,
    *,
    emotion: str = "",
    weight: float = 1.0,
    personas: int = EVERYONE,
    text: str = "",
) -> Hit:
    item = ReplyItem(
        id=name, text=text or f"Reply {name}.", prompt=f"prompt {name}", weight=weight, emotion=emotion, tags=(),
        persona_mask=personas, surface_mask=EVERYONE, valid_from=None, valid_until=None,
    )  # fmt: skip
    return Hit(item, similarity, 0)


def mood(label: str, score: float, *, accepted: bool = True, head: str = "emotion") -> Annotation:
    labels = (Label(label, score, accepted, score, 0.5), Label("neutral", 1 - score, False, 1 - score, 0.5))
    return Annotation(head, "sentence", Status.OK, labels)


ANGRY = mood("anger", 0.8)
NOBODY: frozenset[str] = frozenset()


def score(found: Hit, *annotations: Annotation, said: frozenset[str] = NOBODY) -> float:
    [candidate] = Ranker(DEFAULT_WEIGHTS).rank([found], annotations, said, k=1, explain=False)
    return candidate.score


@pytest.mark.parametrize(
    ("found", "annotations", "said", "expected"),
    [
        pytest.param(hit("a", 0.7), [], NOBODY, 0.7, id="similarity-alone"),
        pytest.param(hit("a", -0.7), [], NOBODY, -0.7, id="negative"),
        pytest.param(hit("a", 0.7, emotion="anger"), [ANGRY], NOBODY, 0.7 + 0.15 * 0.8, id="same-mood"),
        pytest.param(hit("a", 0.7, emotion="joy"), [ANGRY], NOBODY, 0.7 - 0.2 * 0.8, id="other-mood"),
        pytest.param(hit("a", 0.7), [ANGRY], NOBODY, 0.7, id="for-every-mood"),
        pytest.param(hit("a", 0.7, emotion="joy"), [], NOBODY, 0.7, id="mood-unknown"),
        pytest.param(hit("a", 0.7, emotion="joy"), [mood("anger", 0.4, accepted=False)], NOBODY, 0.7, id="mood-not-accepted"),
        pytest.param(hit("a", 0.7, emotion="joy"), [mood("anger", 0.8, head="intent")], NOBODY, 0.7, id="another-head"),
        pytest.param(
            hit("a", 0.7, emotion="anger"), [mood("joy", 0.9, head="intent"), ANGRY], NOBODY, 0.7 + 0.15 * 0.8, id="head-by-name"
        ),
        pytest.param(hit("a", 0.7, emotion="joy"), [Annotation("emotion", "sentence", Status.ERROR)], NOBODY, 0.7, id="head-failed"),
        pytest.param(hit("a", 0.7, personas=1), [], NOBODY, 0.75, id="own-voice"),
        pytest.param(hit("a", 0.7, weight=1.5), [], NOBODY, 0.75, id="heavier"),
        pytest.param(hit("a", 0.7, weight=0.0), [], NOBODY, 0.6, id="lighter"),
        pytest.param(hit("a", 0.7, text="Hi THERE."), [], frozenset({"hi there."}), -0.3, id="said-before"),
        pytest.param(hit("a", 0.7, text="Hi there."), [], frozenset({"hi"}), 0.7, id="something-else-said"),
        pytest.param(
            hit("a", 0.7, emotion="anger", weight=2.0, personas=2, text="x"), [ANGRY], frozenset({"x"}),
            0.7 + 0.12 + 0.05 + 0.1 - 1.0, id="all-together",
        ),
    ],
)  # fmt: skip
def test_ranker_scores(
    found: Hit, annotations: list[Annotation], said: frozenset[str], expected: float
) -> None:
    assert score(found, *annotations, said=said) == pytest.approx(expected, abs=1e-6)


def ids(hits: list[Hit], *annotations: Annotation, k: int = 9, said: frozenset[str] = NOBODY) -> list[str]:
    return [c.id for c in Ranker(DEFAULT_WEIGHTS).rank(hits, annotations, said, k=k, explain=False)]


def test_ranker_puts_the_best_first() -> None:
    assert ids([hit("a", 0.1), hit("b", 0.9), hit("c", 0.5)]) == ["b", "c", "a"]


def test_ranker_keeps_the_order_of_equals() -> None:
    assert ids([hit("b", 0.5), hit("a", 0.5), hit("c", 0.5)]) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("k", "expected"), [(0, []), (1, ["b"]), (2, ["b", "c"]), (3, ["b", "c", "a"]), (9, ["b", "c", "a"])]
)
def test_ranker_gives_at_most_k(k: int, expected: list[str]) -> None:
    assert ids([hit("a", 0.1), hit("b", 0.9), hit("c", 0.5)], k=k) == expected


def test_ranker_of_no_hits_is_nothing() -> None:
    assert ids([], ANGRY) == []


def test_ranker_prefers_the_reply_for_the_mood_the_user_is_in() -> None:
    hits = [hit("joke", 0.60, emotion="joy"), hit("comfort", 0.55, emotion="anger"), hit("plain", 0.58)]
    assert ids(hits) == ["joke", "plain", "comfort"]  # the control: no mood, no preference
    assert ids(hits, ANGRY) == ["comfort", "plain", "joke"]


def test_ranker_does_not_repeat_itself() -> None:
    hits = [hit("a", 0.9), hit("b", 0.2)]
    assert ids(hits, said=frozenset({"reply a."})) == ["b", "a"]


def test_ranker_candidate_carries_its_hit() -> None:
    [candidate] = Ranker(DEFAULT_WEIGHTS).rank([hit("a", 0.5, personas=1)], [], NOBODY, k=1, explain=False)
    assert (candidate.id, candidate.text, candidate.prompt) == ("a", "Reply a.", "prompt a")
    assert candidate.similarity == 0.5
    assert candidate.features == {}


def test_ranker_explains_a_score_by_its_features() -> None:
    found = hit("a", 0.5, emotion="anger", weight=1.5, personas=1)
    [candidate] = Ranker(DEFAULT_WEIGHTS).rank([found], [ANGRY], NOBODY, k=1, explain=True)
    assert candidate.features == pytest.approx(
        {"similarity": 0.5, "same_mood": 0.8, "other_mood": 0, "own_voice": 1, "weight": 0.5, "repeated": 0}
    )
    total = sum(DEFAULT_WEIGHTS[name] * value for name, value in candidate.features.items())
    assert candidate.score == pytest.approx(total, abs=1e-6)


def test_ranker_scores_with_the_weights_of_its_file(tmp_path: Path) -> None:
    weights = dict.fromkeys(FEATURES, 0) | {"similarity": 2, "own_voice": -1}
    (tmp_path / FILE).write_text(json.dumps({"weights": weights}))
    [candidate] = Ranker.load(tmp_path).rank([hit("a", 0.5, personas=1)], [ANGRY], NOBODY, k=1, explain=False)
    assert candidate.score == pytest.approx(0.0)


def test_ranker_has_a_weight_for_every_feature() -> None:
    assert DEFAULT_WEIGHTS.keys() == set(FEATURES)


def weights(**changes: object) -> str:
    return json.dumps({"weights": DEFAULT_WEIGHTS | changes})


@pytest.mark.parametrize(
    "document",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut"),
        pytest.param("[]", id="a-list"),
        pytest.param("{}", id="no-weights"),
        pytest.param('{"weights": 1}', id="a-number"),
        pytest.param('{"weights": {"similarity": 1}}', id="weights-missing"),
        pytest.param(weights(weight="heavy"), id="a-word"),
        pytest.param(weights(weight=None), id="null"),
        pytest.param(weights(weight=float("nan")), id="nan"),
        pytest.param(weights(repeated=float("-inf")), id="infinite"),
    ],
)
def test_ranker_refuses_a_file_that_is(tmp_path: Path, document: str) -> None:
    (tmp_path / FILE).write_text(weights())
    assert Ranker.load(tmp_path) == Ranker(DEFAULT_WEIGHTS)  # the control
    (tmp_path / FILE).write_text(document)
    with pytest.raises(EngineRefused, match="ranker: found an unreadable ranker.json") as refused:
        Ranker.load(tmp_path)
    assert refused.value.part == "ranker"


def test_ranker_refuses_a_folder_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match="ranker: found an unreadable ranker.json"):
        Ranker.load(tmp_path)
