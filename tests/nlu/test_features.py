"""nlu.features: every feature against a number worked out by hand, and nothing computed that was not asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from annotators.annotator import Annotation, Label, Status
from index.items import EVERYONE, Judged, ReplyItem
from index.replies import Hit
from nlu.features import NAMES, Features, Situation, Turn, label_name, repeats, words

EAST = np.array([1.0, 0.0], np.float32)
NORTH = np.array([0.0, 1.0], np.float32)
BETWEEN = np.array([0.6, 0.8], np.float32)


def hit(
    text: str,
    *,
    prompt: str = "",
    similarity: float = 0.0,
    emotion: str = "",
    weight: float = 1.0,
    personas: int = EVERYONE,
    labels: tuple[Judged, ...] = (),
    row: int = 0,
) -> Hit:
    item = ReplyItem(
        id=text, text=text, prompt=prompt, weight=weight, emotion=emotion, tags=(), persona_mask=personas,
        surface_mask=EVERYONE, valid_from=None, valid_until=None, labels=labels, blocked="",
    )  # fmt: skip
    return Hit(item, similarity, row)


def said(hits: Sequence[Hit]) -> NDArray[np.float32]:
    """Row 0 points east, row 1 north."""
    return np.stack([(EAST, NORTH)[hit.row] for hit in hits])


def unwanted(hits: Sequence[Hit]) -> NDArray[np.float32]:
    raise AssertionError("no feature that was asked for needs the vectors of the replies")


def mood(label: str, score: float, *, accepted: bool = True) -> Annotation:
    return Annotation("emotion", "sentence", Status.OK, (Label(label, score, accepted, score, 0.5),))


def one(name: str, situation: Situation, found: Hit) -> float:
    return float(Features.of([name]).table(situation, [found], said)[0, 0])


USER, ASSISTANT = "user", "assistant"
# Oldest first; of five turns only the last three are recent.
TALK = (
    Turn(USER, "Old oak", EAST),
    Turn(ASSISTANT, "Green tea", EAST),
    Turn(USER, "I like black tea", NORTH),
    Turn(ASSISTANT, "Tea is warm", EAST),
    Turn(USER, "Warm it is", BETWEEN),
)


@pytest.mark.parametrize(
    ("name", "text", "found", "expected"),
    [
        ("similarity", "tea", hit("coffee", similarity=0.25), 0.25),
        ("reply_similarity", "tea", hit("coffee", row=0), 0.6),
        ("reply_similarity", "tea", hit("coffee", row=1), 0.8),
        ("context_similarity_1", "tea", hit("coffee", row=1), 0.8),
        ("context_similarity_2", "tea", hit("coffee", row=1), 0.0),
        ("context_similarity_3", "tea", hit("coffee", row=1), 1.0),
        # .6 of each turn before: (.6, .8) + .6 * (.6, .8) + .36 * (1, 0) + .216 * (0, 1) = (1.32, 1.496), at unit length
        ("dialog_similarity", "tea", hit("coffee", row=0), 0.661622),
        ("dialog_similarity", "tea", hit("coffee", row=1), 0.749838),
        ("prompt_overlap", "Some GREEN tea?", hit("no", prompt="green tea, please"), 2 / 4),
        ("prompt_overlap", "tea", hit("tea"), 0.0),  # there is no prompt
        ("reply_overlap", "do you drink tea", hit("I drink tea, black tea"), 2 / 6),
        ("reply_overlap", "зелёный чай", hit("Зелёный ЧАЙ!"), 1.0),
        ("reply_overlap", "?!", hit("..."), 0.0),
        ("context_share", "and", hit("Black tea with milk"), 2 / 4),
        ("context_share", "old oak", hit("Old green oak"), 0.0),  # not recent, and the query is no context
        ("context_share", "and", hit("..."), 0.0),
        ("assistant_overlap", "and", hit("Warm tea"), 2 / 3),
        ("user_overlap", "and", hit("Warm tea"), 1 / 4),
        (
            "long_words",
            "what about",
            hit("Black tea about oak"),
            math.log(1 + 2 + 2),
        ),  # black, about; oak is long ago
        ("long_words", "what", hit("green"), 0.0),
        ("reply_length", "and", hit("tea, tea and milk"), math.log(4)),
        ("length_ratio", "one two three", hit("tea"), math.log(2 / 4)),
        ("query_asks", "what is it? ", hit("tea"), 1.0),
        ("query_asks", "это чай？", hit("tea"), 1.0),
        ("query_asks", "what? tea", hit("tea"), 0.0),
        ("reply_asks", "what?", hit("More tea?"), 1.0),
        ("reply_asks", "what?", hit("Tea."), 0.0),
        ("own_voice", "and", hit("tea", personas=2), 1.0),
        ("own_voice", "and", hit("tea"), 0.0),
        ("weight", "and", hit("tea", weight=1.5), 0.5),
        ("weight", "and", hit("tea", weight=0.0), -1.0),
        ("repeated", "and", hit("TEA is warm"), 1.0),
        ("repeated", "and", hit("green TEA"), 1.0),  # however long ago
        ("repeated", "and", hit("warm it is"), 0.0),  # that was the user
        ("same_mood", "and", hit("tea"), 0.0),
    ],
)
def test_features_of_one_reply(name: str, text: str, found: Hit, expected: float) -> None:
    assert one(name, Situation(text, BETWEEN, (), TALK), found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("annotations", "emotion", "expected"),
    [
        pytest.param([mood("joy", 0.75)], "joy", (0.75, 0.0), id="same"),
        pytest.param([mood("joy", 0.75)], "anger", (0.0, 0.75), id="other"),
        pytest.param([mood("joy", 0.75)], "", (0.0, 0.0), id="for-every-mood"),
        pytest.param([mood("joy", 0.75, accepted=False)], "joy", (0.0, 0.0), id="not-sure"),
        pytest.param([], "joy", (0.0, 0.0), id="not-asked"),
    ],
)
def test_features_of_the_mood(
    annotations: list[Annotation], emotion: str, expected: tuple[float, float]
) -> None:
    situation = Situation("and", EAST, annotations)
    found = [one(name, situation, hit("tea", emotion=emotion)) for name in ("same_mood", "other_mood")]
    assert found == pytest.approx(expected)


def test_features_without_a_context_are_zero() -> None:
    names = [
        name for name in NAMES if name.startswith("context") or name in ("assistant_overlap", "repeated")
    ]
    assert len(names) == 6  # with three turns ago
    alone, talking = Situation("tea", EAST), Situation("tea", EAST, (), [Turn(ASSISTANT, "tea", EAST)] * 3)
    assert not Features.of(names).table(alone, [hit("tea")], said).any()
    assert Features.of(names).table(talking, [hit("tea")], said).all()  # the control


def test_features_of_labels_are_their_scores() -> None:
    labels = (Label("ask", 0.75, True, 1.0, 0.5), Label("want", 0.25, False, 0.0, 0.5))
    situation = Situation("and", EAST, [Annotation("act", "sentence", Status.OK, labels), mood("joy", 0.5)])
    hits = [
        hit("a", labels=(Judged("act", "inform", 0.5), Judged("mood", "joy", 0.125))),
        hit("b", labels=(Judged("act", "want", 0.25),)),
        hit("c"),
    ]
    names = [
        label_name("query", "act", "ask"),
        label_name("query", "act", "inform"),
        label_name("reply", "act", "want"),
        label_name("reply", "act", "inform"),
        label_name("reply", "mood", "joy"),
        "query.emotion.joy",
    ]
    assert Features.of(names).table(situation, hits, unwanted).tolist() == [
        [0.75, 0.0, 0.0, 0.5, 0.125, 0.5],
        [0.75, 0.0, 0.25, 0.0, 0.0, 0.5],
        [0.75, 0.0, 0.0, 0.0, 0.0, 0.5],
    ]


def test_features_of_labels_may_have_dots_in_the_label() -> None:
    assert [*Features.of(["weight", "reply.act.a.b"]).labels] == [("reply.act.a.b", "act", "a.b")]


def test_features_come_in_the_order_asked_for() -> None:
    situation, hits = Situation("tea", BETWEEN, (), TALK), [hit("tea", similarity=0.5), hit("oak", row=1)]
    names = [*NAMES, "query.emotion.joy", "reply.emotion.joy"]
    table = Features.of(names).table(situation, hits, said)
    assert table.shape == (2, len(names))
    assert table.dtype == np.float32
    turned = Features.of(names[::-1]).table(situation, hits, said)
    assert turned[:, ::-1].tolist() == table.tolist()


def test_features_do_not_depend_on_the_other_hits() -> None:
    situation = Situation("warm tea?", BETWEEN, [mood("joy", 0.5)], TALK)
    hits = [hit("Tea is warm", row=1, similarity=0.5), hit("oak", emotion="joy"), hit("More?", weight=2.0)]
    features = Features.of(NAMES)
    together = features.table(situation, hits, said)
    alone = [features.table(situation, [found], said)[0] for found in hits]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_features_read_the_vectors_once_and_only_where_they_are_needed() -> None:
    calls = []

    def counted(hits: Sequence[Hit]) -> NDArray[np.float32]:
        calls.append(len(hits))
        return said(hits)

    cheap = [name for name in NAMES if "_similarity" not in name]
    assert len(cheap) == len(NAMES) - 5
    situation, hits = Situation("tea", BETWEEN, (), TALK), [hit("tea"), hit("oak")]
    Features.of(cheap).table(situation, hits, counted)
    assert calls == []
    Features.of(NAMES).table(situation, hits, counted)
    assert calls == [2]


@pytest.mark.parametrize(
    "name",
    ["", "charm", "Similarity", "query", "query.emotion", "query..joy", "reply.emotion.", "user.emotion.joy"],
)
def test_features_refuse_an_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"found '.*', expected some of similarity, .*correct the name"):
        Features.of(["similarity", name])


def test_features_refuse_a_name_that_comes_twice() -> None:
    with pytest.raises(ValueError, match="found 'weight' twice"):
        Features.of(["weight", "similarity", "weight"])


def test_features_repeats_are_the_assistants_own_words() -> None:
    situation = Situation("and", EAST, (), TALK)
    assert repeats(situation, [hit("tea is WARM"), hit("Warm it is"), hit("Tea is warm.")]) == [
        True, False, False,
    ]  # fmt: skip
    assert repeats(Situation("and", EAST), [hit("Tea is warm")]) == [False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't, don’t; DON'T!", {"don't", "don’t"}),
        ("Straße STRASSE", {"strasse"}),
        ("Ёлка, ёлка и 3 шара", {"ёлка", "и", "3", "шара"}),
        ("", set()),
        ("?!…", set()),
    ],
)
def test_features_words(text: str, expected: set[str]) -> None:
    assert words(text) == expected
