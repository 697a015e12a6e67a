"""Heads on token vectors: tags make sense together, the best sequence wins, and spans say where they are and how sure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, Status
from annotators.head import HeadInvalid, write
from annotators.token import Scheme, TokenHead, legal_steps, tags_of, viterbi, windows
from tests.annotators.toys import encoded, make_spec, random_units, tokenized

TAGS = ("O", "B-time", "I-time", "B-who", "I-who")
OFFSETS = ((0, 4), (5, 7), (8, 10), (11, 14))  # w-a-k-e m-e a-t s-i-x


def reader(transitions: NDArray[np.float32] | None = None, **fields: Any) -> TokenHead:
    """A head whose tag logits are the token vectors themselves, [tokens, 5] or, where tags are words, [tokens, 3]."""
    usual: dict[str, Any] = {"kind": "token", "thresholds": (0.0, 0.0)}
    spec = make_spec(("time", "who"), **usual | fields)
    tags = 3 if spec.params.get("scheme") == "words" else 5
    nothing = np.zeros((tags, tags))
    weight = np.concatenate([nothing, np.eye(tags), nothing], axis=1).astype(np.float32)
    return TokenHead(spec, weight, np.zeros(tags, np.float32), transitions, version="v1")


def sure(*said: str, probability: float = 0.9, tags: Sequence[str] = TAGS) -> NDArray[np.float32]:
    """Token vectors [said, tags] that give each of these tags this probability and the others equal shares of the rest."""
    share = np.full((len(said), len(tags)), (1 - probability) / (len(tags) - 1))
    share[np.arange(len(said)), [tags.index(tag) for tag in said]] = probability
    logs: NDArray[np.float32] = np.log(share).astype(np.float32)
    return logs


def is_legal(path: Sequence[int], tags: Sequence[str]) -> bool:
    """The BIO rule, said in words: an I- tag stands only behind the B- or I- tag of its label."""
    names = ["O", *(tags[tag] for tag in path)]
    return all(
        not name.startswith("I-") or before in (f"B-{name[2:]}", name)
        for before, name in itertools.pairwise(names)
    )


def test_token_tags_are_outside_then_begin_and_inside_of_every_label() -> None:
    assert tags_of(("time", "who")) == TAGS


@pytest.mark.parametrize(
    ("reach", "edges", "rows"),
    [
        pytest.param(0, False, [[1, 2], [3, 4], [5, 6]], id="itself"),
        pytest.param(1, False, [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 0, 0]], id="before and after"),
        pytest.param(0, True, [[1, 2, 1, 0], [3, 4, 0, 0], [5, 6, 0, 1]], id="first and last"),
        pytest.param(
            2, True,
            [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 1]],
            id="farther, first and last",
        ),
    ],
)  # fmt: skip
def test_token_windows_by_hand(reach: int, edges: bool, rows: list[list[float]]) -> None:
    tokens = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert windows(tokens, reach, edges=edges).tolist() == rows


def test_token_windows_of_one_token_and_of_none() -> None:
    assert windows(np.ones((1, 1), np.float32), 1, edges=True).tolist() == [[0, 1, 0, 1, 1]]
    assert windows(np.ones((0, 1), np.float32), 1, edges=True).shape == (0, 5)


def test_token_legal_steps_by_hand() -> None:
    #        to O  B-time I-time B-who I-who
    assert legal_steps(TAGS).astype(int).tolist() == [
        [1, 1, 0, 1, 0],  # from O
        [1, 1, 1, 1, 0],  # from B-time
        [1, 1, 1, 1, 0],  # from I-time
        [1, 1, 0, 1, 1],  # from B-who
        [1, 1, 0, 1, 1],  # from I-who
    ]


def test_token_labels_that_begin_alike_are_kept_apart() -> None:
    steps = legal_steps(tags_of(("a", "a-b")))  # B-a I-a B-a-b I-a-b
    assert not steps[1, 4]
    assert not steps[3, 2]
    assert steps[3, 4]


Problem = tuple[NDArray[np.float32], NDArray[np.float32], tuple[str, ...]]


def legal(labels: Sequence[str]) -> NDArray[np.float32]:
    """Steps [tags, tags] that cost nothing, and those that may not be taken."""
    steps: NDArray[np.float32] = np.where(legal_steps(tags_of(labels)), 0, -np.inf).astype(np.float32)
    return steps


def total(scores: NDArray[np.float32], steps: NDArray[np.float32], path: Sequence[int]) -> float:
    """The log score of a path, which comes from outside."""
    return float(scores[np.arange(len(path)), list(path)].sum() + steps[[0, *path[:-1]], list(path)].sum())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Scores of a short phrase, as whole numbers so that sums are exact, transitions likewise, and the labels."""
    labels = draw(st.sampled_from([("time",), ("time", "who")]))
    tags = len(tags_of(labels))
    scores = draw(arrays(np.int8, (draw(st.integers(1, 4)), tags), elements=st.integers(-9, 9)))
    if draw(st.booleans()):
        scores[:, 0] += 20  # mostly outside, which has a shortcut
    learnt = draw(
        st.one_of(st.just(0), st.integers(1, 9)).flatmap(
            lambda most: arrays(np.int8, (tags, tags), elements=st.integers(-most, most))
        )
    )
    return scores.astype(np.float32), learnt.astype(np.float32), labels


@settings(max_examples=200)
@given(problems())
def test_token_viterbi_equals_brute_force_over_all_paths(problem: Problem) -> None:
    scores, learnt, labels = problem
    tags, steps = tags_of(labels), legal(labels) + learnt
    paths = itertools.product(range(len(tags)), repeat=len(scores))
    best = max(total(scores, steps, path) for path in paths if is_legal(path, tags))
    found = viterbi(scores, steps)
    assert is_legal(found, tags)
    assert total(scores, steps, found) == best


@settings(max_examples=100)
@given(problems())
def test_token_viterbi_of_words_equals_brute_force_over_all_paths(problem: Problem) -> None:
    """Where any tag may follow any other."""
    scores, learnt, _ = problem
    paths = itertools.product(range(scores.shape[1]), repeat=len(scores))
    best = max(total(scores, learnt, path) for path in paths)
    assert total(scores, learnt, viterbi(scores, learnt)) == best


def outside_but(margin: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Three tokens, the middle one outside by this margin, where a step to B-time, or on from it, is liked better by 3."""
    scores = np.zeros((3, 3), np.float32)
    scores[:, 0] = 10, margin, 10
    steps = legal(("time",))
    steps[[0, 1], 1] += 3
    steps[1, 0] += 3
    return scores, steps


@pytest.mark.parametrize(
    ("margin", "path"),
    [
        pytest.param(6.5, [0, 0, 0], id="more than two steps could bring"),
        pytest.param(5.5, [0, 1, 0], id="less than two steps bring"),
    ],
)
def test_token_viterbi_leaves_outside_where_the_steps_are_worth_it(margin: float, path: list[int]) -> None:
    """Token by token everything is outside in both."""
    scores, steps = outside_but(margin)
    assert scores.argmax(axis=1).tolist() == [0, 0, 0]
    assert viterbi(scores, steps) == path


def test_token_viterbi_of_no_tokens_is_no_path() -> None:
    assert viterbi(np.zeros((0, 5), np.float32), legal(("time", "who"))) == []


@pytest.mark.parametrize(
    ("greedy", "mended"),
    [
        pytest.param(["I-time"], ["B-time"], id="opens with inside"),
        pytest.param(["O", "I-time"], ["B-time", "I-time"], id="inside after outside"),
        pytest.param(["B-who", "I-time"], ["B-time", "I-time"], id="inside of another label"),
    ],
)
def test_token_viterbi_mends_what_greedy_breaks(greedy: list[str], mended: list[str]) -> None:
    scores = np.full((len(greedy), len(TAGS)), -9, np.float32)
    rows = np.arange(len(greedy))
    scores[rows, [TAGS.index(tag) for tag in mended]] = -1
    scores[rows, [TAGS.index(tag) for tag in greedy]] = -0.5
    assert not is_legal(scores.argmax(axis=1).tolist(), TAGS)
    assert [TAGS[tag] for tag in viterbi(scores, legal(("time", "who")))] == mended


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        pytest.param(["O", "O", "O", "O"], [], id="nothing"),
        pytest.param(["O", "O", "O", "B-time"], [("time", 11, 14)], id="last token"),
        pytest.param(["B-who", "I-who", "O", "B-time"], [("who", 0, 7), ("time", 11, 14)], id="two labels"),
        pytest.param(["B-who", "B-who", "I-who", "O"], [("who", 0, 4), ("who", 5, 10)], id="two of one label"),
        pytest.param(["B-time", "B-who", "B-time", "I-time"], [("time", 0, 4), ("who", 5, 7), ("time", 8, 14)], id="touching"),
        pytest.param(["B-time", "I-time", "I-time", "I-time"], [("time", 0, 14)], id="the whole phrase"),
    ],
)  # fmt: skip
def test_token_spans_run_from_begin_to_the_last_inside(
    tags: list[str], spans: list[tuple[str, int, int]]
) -> None:
    found = reader().decode(sure(*tags), np.array(OFFSETS, np.int32))
    assert [(span.label, span.start, span.end) for span in found] == spans


def odds(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


@pytest.mark.parametrize(
    ("probabilities", "worst"),
    [
        pytest.param((0.5, 0.75, 0.9), 0.5, id="its beginning"),
        pytest.param((0.75, 0.5, 0.9), 0.5, id="its inside"),
        pytest.param((0.9, 0.8, 0.6), 0.6, id="the token after, where it might have gone on"),
    ],
)
def test_token_span_is_as_good_as_its_worst_token(probabilities: tuple[float, ...], worst: float) -> None:
    tags = ("B-who", "I-who", "O")
    tokens = np.concatenate(
        [sure(tag, probability=each) for tag, each in zip(tags, probabilities, strict=True)]
    )
    ((label, first, last, raw),) = reader().proposed(tokens)
    assert (label, first, last) == (1, 0, 1)
    assert raw == pytest.approx(odds(worst), abs=1e-5)
    (span,) = reader(scale=(2.0, 3.0), shift=(0.0, -0.5)).decode(tokens, np.array(OFFSETS[:3], np.int32))
    assert span.score == pytest.approx(1 / (1 + np.exp(0.5 - 3 * odds(worst))), abs=1e-5)


def test_token_span_at_the_end_is_judged_by_its_own_tokens() -> None:
    ((_, _, _, raw),) = reader().proposed(sure("O", "B-who", probability=0.6))
    assert raw == pytest.approx(odds(0.6), abs=1e-5)


def test_token_temperature_sharpens_the_tags() -> None:
    ((*_, raw),) = reader(params={"temperature": 2.0}).proposed(sure("B-who", probability=0.6))
    assert raw == pytest.approx(odds(0.6**2 / (0.6**2 + 4 * 0.1**2)), abs=1e-5)


@pytest.mark.parametrize(("logit", "score"), [(500.0, 1.0), (-500.0, 0.0)])
def test_token_score_far_out_overflows_nothing(logit: float, score: float) -> None:
    head = reader(shift=(0.0, logit))
    (span,) = head.decode(sure("B-who"), np.array(OFFSETS[:1], np.int32))
    assert span.score == pytest.approx(score, abs=1e-12)


def test_token_certain_tags_have_finite_odds() -> None:
    """One tag 1000 above the others, in log scores: float32 has no such odds."""
    ((*_, raw),) = reader().proposed(np.array([[0, 1000, 0, 0, 0]], np.float32))
    assert raw == pytest.approx(np.log(1e9), rel=1e-3)


def test_token_transitions_decide_where_tags_are_level() -> None:
    """Who or when, the vectors do not say; whoever wrote the training phrases never had a time after a person."""
    tokens = np.log(np.array([[0.05, 0.05, 0.0, 0.9, 0.0], [0.1, 0.45, 0.0, 0.45, 0.0]]) + 1e-6).astype(
        np.float32
    )
    offsets = np.array(OFFSETS[:2], np.int32)
    for disliked, label in ((TAGS.index("B-who"), "time"), (TAGS.index("B-time"), "who")):
        transitions = np.zeros((5, 5), np.float32)
        transitions[TAGS.index("B-who"), disliked] = -2
        assert [span.label for span in reader(transitions).decode(tokens, offsets)] == ["who", label]


def test_token_transitions_cannot_make_an_illegal_step_legal() -> None:
    transitions = np.zeros((5, 5), np.float32)
    transitions[0, TAGS.index("I-who")] = 100
    found = reader(transitions).proposed(sure("O", "I-who"))
    assert all(steps <= 1 for steps in [last - first for _, first, last, _ in found])
    assert is_legal(viterbi(sure("O", "I-who"), reader(transitions).steps), TAGS)


WORDS = ("O", "time", "who")


@pytest.mark.parametrize(
    ("said", "spans"),
    [
        pytest.param(["O", "O", "O", "O"], [], id="nothing"),
        pytest.param(["who", "who", "O", "time"], [("who", 0, 4), ("who", 5, 7), ("time", 11, 14)], id="each word is its own"),
    ],
)  # fmt: skip
def test_token_words_are_labelled_one_by_one(said: list[str], spans: list[tuple[str, int, int]]) -> None:
    head = reader(params={"scheme": "words"})
    found = head.decode(sure(*said, tags=WORDS), np.array(OFFSETS, np.int32))
    assert [span[:3] for span in found] == spans


def test_token_word_is_judged_by_itself_alone() -> None:
    tokens = np.concatenate(
        [sure("who", probability=0.8, tags=WORDS), sure("O", probability=0.4, tags=WORDS)]
    )
    ((*_, raw),) = reader(params={"scheme": "words"}).proposed(tokens)
    assert raw == pytest.approx(odds(0.8), abs=1e-5)


def test_token_scheme_of_labels_that_look_like_tags_is_theirs() -> None:
    """A word may be labelled I-time; it follows anything."""
    spec = make_spec(("B-x", "I-time"), kind="token", params={"scheme": "words"}, thresholds=(0.0, 0.0))
    head = TokenHead(spec, np.zeros((3, 9), np.float32), np.array([0, 0, 5], np.float32))
    assert [label for label, *_ in head.proposed(np.zeros((2, 3), np.float32))] == [1, 1]


def test_token_schemes_name_their_tags() -> None:
    assert Scheme.of("bio", ("time", "who")) == Scheme(TAGS, runs=True)
    assert Scheme.of("words", ("time", "who")) == Scheme(WORDS, runs=False)
    with pytest.raises(ValueError, match="scheme 'bilou'"):
        Scheme.of("bilou", ("time",))


def restorer() -> TokenHead:
    """A head whose tag logits are the token vectors themselves, [tokens, 4]."""
    spec = make_spec(
        ("?", "Aa", "Aa?"), kind="token", params={"scheme": "words", "restores": True}, thresholds=(0.0,) * 3
    )
    weight = np.concatenate([np.zeros((4, 4)), np.eye(4), np.zeros((4, 4))], axis=1).astype(np.float32)
    return TokenHead(spec, weight, np.zeros(4, np.float32), version="v1")


RESTORED = ("O", "?", "Aa", "Aa?")


@pytest.mark.parametrize(
    ("phrase", "said", "restored"),
    [
        pytest.param("кто там", ["Aa", "?"], "Кто там?", id="case and mark"),
        pytest.param("anna", ["Aa?"], "Anna?", id="both on a word"),
        pytest.param("so what", ["O", "O"], "so what", id="nothing to do"),
    ],
)
def test_token_head_that_restores_writes_the_phrase(phrase: str, said: list[str], restored: str) -> None:
    ends = np.cumsum([len(word) + 1 for word in phrase.split()]) - 1
    offsets = [(int(end) - len(word), int(end)) for word, end in zip(phrase.split(), ends, strict=True)]
    annotation = restorer().annotate(Heard.alone(phrase, tokenized(sure(*said, tags=RESTORED), offsets)))
    assert (annotation.status, annotation.restored) == (Status.OK, restored)


def test_token_head_that_restores_leaves_written_text_alone() -> None:
    said = tokenized(sure("Aa", tags=RESTORED), [(0, 5)])
    assert restorer().annotate(Heard.alone("Anna?", said)) == Annotation(
        "toy", "token", Status.SKIPPED, version="v1", note="the phrase has punctuation already"
    )


def test_token_other_heads_restore_nothing() -> None:
    assert reader().annotate(Heard.alone("anna", tokenized(sure("B-who"), [(0, 4)]))).restored == ""


@pytest.mark.parametrize(
    ("thresholds", "labels"),
    [((0.0, 0.0), ["who", "time"]), ((0.0, 0.7), ["time"]), ((0.7, 0.0), ["who"]), ((0.7, 0.7), [])],
)
def test_token_spans_below_their_labels_threshold_are_dropped(
    thresholds: tuple[float, float], labels: list[str]
) -> None:
    tokens = sure("B-who", "O", "O", "B-time", probability=0.6)
    found = reader(thresholds=thresholds).decode(tokens, np.array(OFFSETS, np.int32))
    assert [span.label for span in found] == labels


@pytest.mark.parametrize(
    ("window", "begins"),
    [
        pytest.param([0, 20, 0], [0, 1, 3], id="self"),
        pytest.param([-20, 20, 0], [0, 3], id="unless the one before is too"),
        pytest.param([0, 20, -20], [1, 3], id="unless the one after is too"),
    ],
)
def test_token_tag_is_read_off_the_neighbours_too(window: list[float], begins: list[int]) -> None:
    """Tokens 1 1 0 1, and a head that begins a span at every 1, unless its neighbour is another."""
    weight = np.array([[0, 0, 0], window, [0, 0, 0]], np.float32)
    head = TokenHead(make_spec(("time",), kind="token"), weight, np.array([0, -15, -30], np.float32))
    spans = head.decode(np.array([[1], [1], [0], [1]], np.float32), np.array(OFFSETS, np.int32))
    assert [(span.start, span.end) for span in spans] == [OFFSETS[i] for i in begins]


def test_token_of_an_empty_phrase_has_no_spans() -> None:
    empty = tokenized(np.zeros((0, 5)), [])
    annotation = reader().annotate(Heard.alone("", empty))
    assert annotation == Annotation("toy", "token", Status.OK, version="v1")


def test_token_without_token_vectors_is_skipped() -> None:
    assert reader().annotate(Heard.alone("six", encoded([1, 0]))) == Annotation(
        "toy", "token", Status.SKIPPED, version="v1", note="token vectors were not computed"
    )


@pytest.mark.parametrize(("best", "spans"), [(0, ["who"]), (1, ["time"])])
def test_token_reads_the_heaviest_hypothesis(best: int, spans: list[str]) -> None:
    encodings = (tokenized(sure("B-who"), OFFSETS[:1]), tokenized(sure("B-time"), OFFSETS[:1]))
    turn = Heard(("anna", "noon"), encodings, (0.5, 0.5), best)
    assert [span.label for span in reader().annotate(turn).spans] == spans


@pytest.mark.parametrize("reach", [0, 2])
@pytest.mark.parametrize("edges", [False, True])
def test_token_head_reads_as_far_as_it_says(tmp_path: Path, reach: int, edges: bool) -> None:
    """A head that begins a span at a token whose window, edges and all, holds more than the bias allows."""
    width = 2 * reach + 1 + 2 * edges
    weight = np.stack([np.zeros(width), np.ones(width), np.zeros(width)]).astype(np.float32)
    spec = make_spec(("time",), kind="token", params={"reach": reach, "edges": edges}, thresholds=(0.0,))
    TokenHead(spec, weight, np.array([0, -2.5, -30], np.float32)).save(tmp_path)
    head, tokens = TokenHead.load(tmp_path), np.array([[2], [2], [0], [1]], np.float32)
    sums = [tokens[max(0, i - reach) : i + reach + 1].sum() + (edges and i in (0, 3)) for i in range(4)]
    assert (head.token_dim, head.reach, head.edges) == (1, reach, edges)
    assert [first for _, first, _, _ in head.proposed(tokens)] == [i for i in range(4) if sums[i] > 2.5]


def test_token_doubt_is_that_of_the_least_sure_token() -> None:
    tokens = np.concatenate([sure("O", probability=0.9), sure("B-who", probability=0.6), sure("O")])
    assert reader().doubt(tokens) == pytest.approx(0.4, abs=1e-6)
    assert reader().doubt(tokens[:0]) == reader().doubt(None) == 0.0


@pytest.mark.parametrize("scheme", ["bio", "words"])
@pytest.mark.parametrize("learnt", [False, True], ids=["legal steps", "learnt steps"])
def test_token_comes_back_as_saved(tmp_path: Path, scheme: str, learnt: bool) -> None:
    tags = TAGS if scheme == "bio" else WORDS
    transitions = random_units(len(tags), len(tags))
    head = reader(transitions if learnt else None, params={"scheme": scheme, "temperature": 0.5})
    head.save(tmp_path)
    loaded = TokenHead.load(tmp_path)
    assert (loaded.spec, loaded.token_dim, loaded.scheme) == (head.spec, len(tags), head.scheme)
    np.testing.assert_array_equal(loaded.steps, head.steps)
    said = tokenized(sure(tags[-2], tags[-1], "O", tags[1], tags=tags), OFFSETS)
    spans = loaded.annotate(Heard.alone("wake me at six", said)).spans
    assert spans == head.annotate(Heard.alone("wake me at six", said)).spans
    assert len(spans) == (2 if scheme == "bio" else 3)


def tensors(tags: int, **replaced: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"weight": np.zeros((tags, 15)), "bias": np.zeros(tags)} | replaced


@pytest.mark.parametrize(
    ("params", "stored", "message"),
    [
        pytest.param({}, tensors(5, weight=np.zeros((5, 16))), "found weights 16 wide, expected a multiple of 3", id="no window"),
        pytest.param({}, tensors(5, weight=np.zeros((4, 15))), "found tensor 'weight' of shape 4x15, expected 5xany", id="a tag short"),
        pytest.param({}, tensors(5, bias=np.zeros(4)), "found tensor 'bias' of shape 4, expected 5", id="a bias short"),
        pytest.param({}, tensors(3), "found tensor 'weight' of shape 3x15, expected 5xany", id="tags of words"),
        pytest.param(
            {}, tensors(5, transitions=np.zeros((5, 4))), "found tensor 'transitions' of shape 5x4, expected 5x5", id="transitions"
        ),
        pytest.param(
            {}, tensors(5, transitions=np.full((5, 5), np.nan)), "found NaN or infinite values in tensor 'transitions'", id="NaN"
        ),
        pytest.param(
            {}, tensors(5, extra=np.zeros(1)), "found tensors bias, extra, weight, expected bias, weight", id="a tensor too many"
        ),
        pytest.param({"scheme": "words"}, tensors(5), "found tensor 'weight' of shape 5x15, expected 3xany", id="tags of runs"),
        pytest.param({"scheme": "bilou"}, tensors(5), "found params.scheme = 'bilou', expected 'bio' or 'words'", id="unknown scheme"),
        pytest.param({"scheme": 1}, tensors(3), "found params.scheme = 1, expected 'bio' or 'words'", id="no scheme"),
        pytest.param({"reach": 5}, tensors(5), "found params.reach = 5, expected a whole number from 0 to 4", id="too far"),
        pytest.param({"reach": -1}, tensors(5), "found params.reach = -1, expected a whole number from 0 to 4", id="backwards"),
        pytest.param({"reach": "1"}, tensors(5), "found params.reach = '1', expected a whole number from 0 to 4", id="no number"),
        pytest.param({"reach": 3}, tensors(5), "found weights 15 wide, expected a multiple of 7", id="another reach"),
        pytest.param({"edges": True}, tensors(5), "found weights 15 wide, expected a multiple of 3 and 2 more for the edges", id="no edges"),
        pytest.param(
            {"edges": True}, tensors(5, weight=np.zeros((5, 2))), "found weights 2 wide, expected a multiple of 3 and 2 more", id="only edges"
        ),
        pytest.param({"temperature": 0}, tensors(5), "found params.temperature = 0, expected a number above 0", id="temperature 0"),
        pytest.param({"temperature": "1"}, tensors(5), "found params.temperature = '1', expected a number above 0", id="a text"),
    ],
)  # fmt: skip
def test_token_malformed_is_refused(
    tmp_path: Path, params: dict[str, Any], stored: dict[str, NDArray[np.float64]], message: str
) -> None:
    """Negative control: what these are made of loads in the test above."""
    write(tmp_path, make_spec(("time", "who"), kind="token", params=params), stored)
    with pytest.raises(HeadInvalid, match=re.escape(message)):
        TokenHead.load(tmp_path)
