"""nlu.ranker: scores against numbers computed by hand, the order they give, and the folder they are read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from annotators.annotator import Annotation, Label, Status
from index.items import EVERYONE, ReplyItem
from index.replies import Hit
from nlu.errors import EngineRefused
from nlu.features import Situation, Turn
from nlu.ranker import DEFAULT_WEIGHTS, FILE, INPUT, MODEL_FILE, OUTPUT, Ranker, Requires, Spec, diverse

HERE = np.array([1.0, 0.0], np.float32)


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
        persona_mask=personas, surface_mask=EVERYONE, valid_from=None, valid_until=None, labels=(), blocked="",
    )  # fmt: skip
    return Hit(item, similarity, 0)


def nothing_said(hits: Sequence[Hit]) -> NDArray[np.float32]:
    raise AssertionError("the vectors of the replies are not needed")


def mood(label: str, score: float, *, accepted: bool = True, head: str = "emotion") -> Annotation:
    labels = (Label(label, score, accepted, score, 0.5), Label("neutral", 1 - score, False, 1 - score, 0.5))
    return Annotation(head, "sentence", Status.OK, labels)


def situation(*annotations: Annotation, said: Sequence[str] = ()) -> Situation:
    return Situation("and you", HERE, annotations, [Turn("assistant", text, HERE) for text in said])


ANGRY = mood("anger", 0.8)
LINEAR = Ranker.linear()


def score(found: Hit, *annotations: Annotation, said: Sequence[str] = ()) -> float:
    [candidate] = LINEAR.rank([found], situation(*annotations, said=said), nothing_said, k=1, explain=False)
    return candidate.score


@pytest.mark.parametrize(
    ("found", "annotations", "said", "expected"),
    [
        pytest.param(hit("a", 0.7), [], [], 0.7, id="similarity-alone"),
        pytest.param(hit("a", -0.7), [], [], -0.7, id="negative"),
        pytest.param(hit("a", 0.7, emotion="anger"), [ANGRY], [], 0.7 + 0.15 * 0.8, id="same-mood"),
        pytest.param(hit("a", 0.7, emotion="joy"), [ANGRY], [], 0.7 - 0.2 * 0.8, id="other-mood"),
        pytest.param(hit("a", 0.7), [ANGRY], [], 0.7, id="for-every-mood"),
        pytest.param(hit("a", 0.7, emotion="joy"), [], [], 0.7, id="mood-unknown"),
        pytest.param(hit("a", 0.7, emotion="joy"), [mood("anger", 0.4, accepted=False)], [], 0.7, id="mood-not-accepted"),
        pytest.param(hit("a", 0.7, emotion="joy"), [mood("anger", 0.8, head="intent")], [], 0.7, id="another-head"),
        pytest.param(
            hit("a", 0.7, emotion="anger"), [mood("joy", 0.9, head="intent"), ANGRY], [], 0.7 + 0.15 * 0.8, id="head-by-name"
        ),
        pytest.param(hit("a", 0.7, emotion="joy"), [Annotation("emotion", "sentence", Status.ERROR)], [], 0.7, id="head-failed"),
        pytest.param(hit("a", 0.7, personas=1), [], [], 0.75, id="own-voice"),
        pytest.param(hit("a", 0.7, weight=1.5), [], [], 0.75, id="heavier"),
        pytest.param(hit("a", 0.7, weight=0.0), [], [], 0.6, id="lighter"),
        pytest.param(hit("a", 0.7, text="Hi THERE."), [], ["hI there."], -0.3, id="said-before"),
        pytest.param(hit("a", 0.7, text="Hi there."), [], ["Hi"], 0.7, id="something-else-said"),
        pytest.param(
            hit("a", 0.7, emotion="anger", weight=2.0, personas=2, text="x"), [ANGRY], ["x"],
            0.7 + 0.12 + 0.05 + 0.1 - 1.0, id="all-together",
        ),
    ],
)  # fmt: skip
def test_ranker_scores(found: Hit, annotations: list[Annotation], said: list[str], expected: float) -> None:
    assert score(found, *annotations, said=said) == pytest.approx(expected, abs=1e-6)


def ids(hits: list[Hit], *annotations: Annotation, k: int = 9, said: Sequence[str] = ()) -> list[str]:
    found = LINEAR.rank(hits, situation(*annotations, said=said), nothing_said, k=k, explain=False)
    return [candidate.id for candidate in found]


def test_ranker_puts_the_best_first() -> None:
    assert ids([hit("a", 0.1), hit("b", 0.9), hit("c", 0.5)]) == ["b", "c", "a"]


@pytest.mark.parametrize("count", [2, 7, 16, 33])
def test_ranker_keeps_the_order_of_equals(count: int) -> None:
    names = [f"{number:02}" for number in range(count)]
    equals = [hit(name, 0.1, weight=0.7, personas=1) for name in names]
    assert ids(equals[::-1], k=count) == names[::-1]


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


@pytest.mark.parametrize("weights", [DEFAULT_WEIGHTS, {"similarity": 1.0}], ids=["weighed", "not-weighed"])
def test_ranker_repeats_nothing_while_there_is_something_else(weights: dict[str, float]) -> None:
    hits = [hit("a", 0.99), hit("b", 0.2), hit("c", -0.9)]
    ranker, after = Ranker.linear(weights), situation(said=["ok", "REPLY A."])

    def best(now: Situation, k: int) -> list[str]:
        return [each.id for each in ranker.rank(hits, now, nothing_said, k=k, explain=False)]

    assert best(situation(), 2) == ["a", "b"]  # the control
    assert best(after, 2) == ["b", "c"]
    assert best(after, 3) == ["b", "c", "a"]
    assert [each.id for each in ranker.rank(hits[:1], after, nothing_said, k=1, explain=False)] == ["a"]


def test_ranker_may_repeat_what_the_user_said() -> None:
    echo = Situation("and you", HERE, (), [Turn("user", "reply a.", HERE)])
    found = LINEAR.rank([hit("a", 0.9), hit("b", 0.2)], echo, nothing_said, k=2, explain=False)
    assert [candidate.id for candidate in found] == ["a", "b"]


def test_ranker_candidate_carries_its_hit() -> None:
    [candidate] = LINEAR.rank([hit("a", 0.5, personas=1)], situation(), nothing_said, k=1, explain=False)
    assert (candidate.id, candidate.text, candidate.prompt) == ("a", "Reply a.", "prompt a")
    assert candidate.similarity == 0.5
    assert candidate.features == {}


def test_ranker_explains_a_score_by_its_features() -> None:
    found = hit("a", 0.5, emotion="anger", weight=1.5, personas=1)
    [candidate] = LINEAR.rank([found], situation(ANGRY), nothing_said, k=1, explain=True)
    assert candidate.features == pytest.approx(
        {"similarity": 0.5, "same_mood": 0.8, "other_mood": 0, "own_voice": 1, "weight": 0.5, "repeated": 0}
    )
    total = sum(DEFAULT_WEIGHTS[name] * value for name, value in candidate.features.items())
    assert candidate.score == pytest.approx(total, abs=1e-6)


# Five replies on a circle: 0 and 1 nearly the same, 3 across.
ANGLES = (0.0, 0.1, 1.0, 3.0, 1.5)
CIRCLE = np.array([[np.cos(angle), np.sin(angle)] for angle in ANGLES], np.float32)


def spread(diversity: float, k: int = 5) -> list[int]:
    return diverse([1.0, 0.95, 0.6, 0.2, 0.0], CIRCLE, diversity, k)


def test_ranker_diversity_weighs_what_is_new_against_what_is_good() -> None:
    assert spread(0.0) == [0, 1, 2, 3, 4]
    # By hand: relevance (.95, .6, .2, 0) and cosines to row 0 (.995, .54, -.99, .07).
    # At .3: .7 * .95 - .3 * .995 = .367, .258, .437, -.021; then row 1 (.367) against row 2 (.258).
    assert spread(0.3) == [0, 3, 1, 2, 4]
    assert spread(1.0, k=2) == [0, 3]


@pytest.mark.parametrize("diversity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_ranker_diversity_never_moves_the_first(diversity: float, k: int) -> None:
    found = spread(diversity, k)
    assert found[0] == 0
    assert len(found) == len(set(found)) == min(k, 5)


def test_ranker_diversity_of_equals_keeps_their_order() -> None:
    assert diverse([0.5, 0.5, 0.5], np.ones((3, 1), np.float32), 0.3, 3) == [0, 1, 2]
    assert diverse([], np.zeros((0, 2), np.float32), 0.3, 3) == []


def test_ranker_with_diversity_spreads_its_candidates() -> None:
    hits = [hit(f"{row}", similarity)._replace(row=row) for row, similarity in enumerate((1, 0.95, 0.6, 0.2))]

    def best(diversity: float, said: Sequence[str] = ()) -> list[str]:
        ranker = Ranker.linear(diversity=diversity)
        found = ranker.rank(
            hits, situation(said=said), lambda some: CIRCLE[[each.row for each in some]], k=2, explain=False
        )
        return [candidate.id for candidate in found]

    assert best(0.0) == ["0", "1"]
    assert best(0.5) == ["0", "3"]
    assert best(0.5, said=["Reply 0."]) == ["1", "3"]  # what is repeated takes no part
    assert best(0.5, said=[f"Reply {row}." for row in range(4)]) == ["0", "1"]  # there is nothing else


def graph(width: int, *, output: str = OUTPUT, input_name: str = INPUT, weight: float = 1.0) -> bytes:
    """scores = weight * the sum of all features; the simplest graph of that shape."""
    tensors = [numpy_helper.from_array(np.full((width, 1), weight, np.float32), "weights")]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", [input_name, "weights"], [output])],
            "ranker",
            [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [None, width])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, 1])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    serialised: bytes = model.SerializeToString()
    return serialised


TREES = Spec(kind="trees", features=("similarity", "own_voice"), requires=Requires(vectorizer="0" * 64))


def test_ranker_of_a_graph_scores_with_it(tmp_path: Path) -> None:
    Ranker.trees(TREES, graph(2)).save(tmp_path)
    ranker = Ranker.load(tmp_path)
    assert ranker.spec == TREES
    hits = [hit("a", 0.6), hit("b", 0.5, personas=1)]
    found = ranker.rank(hits, situation(), nothing_said, k=2, explain=True)
    assert [each.id for each in found] == ["b", "a"]
    assert [each.score for each in found] == pytest.approx([1.5, 0.6], abs=1e-6)
    assert found[0].features == {"similarity": 0.5, "own_voice": 1.0}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param(b"", "found 0 nodes", id="empty"),
        pytest.param(b"not a model", "found bytes that are cut or garbage", id="no-model"),
        pytest.param(graph(2).replace(b"weights", b"nowhere", 1), "does not load", id="broken"),
        pytest.param(
            graph(3), r"inputs \[\('features', \[3\]\)\].*expected features \[rows, 2\]", id="too-wide"
        ),
        pytest.param(graph(2, input_name="vector"), r"inputs \[\('vector', \[2\]\)\]", id="another-input"),
        pytest.param(graph(2, output="variable"), r"outputs \['variable'\]", id="another-output"),
        pytest.param(graph(2, weight=float("nan")), r"found scores \[nan, nan\]", id="not-finite"),
    ],
)
def test_ranker_refuses_a_graph_that_is(tmp_path: Path, model: bytes, words: str) -> None:
    Ranker.trees(TREES, graph(2)).save(tmp_path)
    Ranker.load(tmp_path)  # the control
    (tmp_path / MODEL_FILE).write_bytes(model)
    with pytest.raises(EngineRefused, match=words):
        Ranker.load(tmp_path)


def test_ranker_of_trees_needs_its_graph(tmp_path: Path) -> None:
    Ranker.trees(TREES, graph(2)).save(tmp_path)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(EngineRefused, match=MODEL_FILE):
        Ranker.load(tmp_path)


def test_ranker_scores_with_the_weights_of_its_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"weights": {"similarity": 2, "own_voice": -1}}))
    ranker = Ranker.load(tmp_path)
    [candidate] = ranker.rank([hit("a", 0.5, personas=1)], situation(ANGRY), nothing_said, k=1, explain=False)
    assert candidate.score == pytest.approx(0.0)


def test_ranker_is_saved_as_it_is(tmp_path: Path) -> None:
    ranker = Ranker.linear(DEFAULT_WEIGHTS, diversity=0.25)
    ranker.save(tmp_path / "one")
    loaded = Ranker.load(tmp_path / "one")
    assert loaded.spec == ranker.spec
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()


def document(**changes: object) -> str:
    return json.dumps({"format": 1, "kind": "linear", "weights": DEFAULT_WEIGHTS} | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "Invalid JSON", id="empty"),
        pytest.param("{", "Invalid JSON", id="cut"),
        pytest.param("[]", "Input should be an object", id="a-list"),
        pytest.param("{}", "a linear ranker has weights", id="no-weights"),
        pytest.param(document(weights=1), "weights: Input should be", id="a-number"),
        pytest.param(document(weights={"weight": "heavy"}), "weights.weight: Input should be", id="a-word"),
        pytest.param(document(weights={"weight": None}), "weights.weight: Input should be", id="null"),
        pytest.param(document(weights={"weight": float("nan")}), "weights.weight: .*finite", id="nan"),
        pytest.param(document(weights={"weight": float("-inf")}), "weights.weight: .*finite", id="infinite"),
        pytest.param(document(weights={"charm": 1}), "found 'charm', expected some of similarity", id="unknown-feature"),
        pytest.param(document(weights={"query.emotion": 1}), "found 'query.emotion'", id="label-without-a-label"),
        pytest.param(document(format=2), "format: ", id="another-format"),
        pytest.param(document(kind="deep"), "kind: ", id="another-kind"),
        pytest.param(document(diversity=1.5), "diversity: ", id="too-diverse"),
        pytest.param(document(charm=1), "charm: Extra inputs", id="unknown-field"),
        pytest.param(document(features=["weight"]), "no list of features", id="both"),
        pytest.param(document(kind="trees"), "a ranker of trees has a list of features", id="trees-of-weights"),
        pytest.param(
            document(kind="trees", weights={}, features=["weight"]), "requires the vectorizer", id="trees-of-nothing"
        ),
    ],
)  # fmt: skip
def test_ranker_refuses_a_file_that_is(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / FILE).write_text(document())
    assert Ranker.load(tmp_path).spec.weights == DEFAULT_WEIGHTS  # the control
    (tmp_path / FILE).write_text(text)
    with pytest.raises(EngineRefused, match=f"ranker: found .*{words}") as refused:
        Ranker.load(tmp_path)
    assert refused.value.part == "ranker"


def test_ranker_refuses_a_folder_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match=f"ranker: found .*{FILE}.*rebuild it"):
        Ranker.load(tmp_path)
