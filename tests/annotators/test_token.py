"""Heads on token vectors: tags always make sense together, the best such sequence wins, and spans say where and how sure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from annotators.annotator import Annotation, Encoding, Heard, Span, Status
from annotators.head import HeadInvalid, write
from annotators.token import TokenHead, legal_steps, tags_of, viterbi, windows
from tests.annotators.toys import encoded, make_spec, tokenized

TAGS = ("O", "B-time", "I-time", "B-who", "I-who")
OFFSETS = ((0, 4), (5, 7), (8, 10), (11, 14))  # w-a-k-e m-e a-t s-i-x


def reader(thresholds: tuple[float, float] = (0.0, 0.0), scale: float = 1.0) -> TokenHead:
    """A head whose tag logits are the token vectors themselves, [tokens, 5]."""
    weight = np.concatenate([np.zeros((5, 5)), np.eye(5), np.zeros((5, 5))], axis=1).astype(np.float32)
    spec = make_spec(("time", "who"), kind="token", thresholds=thresholds, scale=(scale,) * 2)
    return TokenHead(spec, weight, np.zeros(5, np.float32), version="v1")


def sure(*tags: str, probability: float = 0.9) -> NDArray[np.float32]:
    """Token vectors [tags, 5] that give each of these tags this probability and the others equal shares of the rest."""
    share = np.full((len(tags), len(TAGS)), (1 - probability) / (len(TAGS) - 1))
    share[np.arange(len(tags)), [TAGS.index(tag) for tag in tags]] = probability
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


def test_token_windows_are_before_self_after() -> None:
    tokens = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert windows(tokens).tolist() == [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 0, 0]]


def test_token_legal_steps_by_hand() -> None:
    #        to O  B-time I-time B-who I-who
    assert legal_steps(("time", "who")).astype(int).tolist() == [
        [1, 1, 0, 1, 0],  # from O
        [1, 1, 1, 1, 0],  # from B-time
        [1, 1, 1, 1, 0],  # from I-time
        [1, 1, 0, 1, 1],  # from B-who
        [1, 1, 0, 1, 1],  # from I-who
    ]


def test_token_labels_that_begin_alike_are_kept_apart() -> None:
    steps = legal_steps(("a", "a-b"))  # B-a I-a B-a-b I-a-b
    assert not steps[1, 4]
    assert not steps[3, 2]
    assert steps[3, 4]


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Scores of a short phrase, as whole numbers so that sums are exact, and the labels."""
    labels = draw(st.sampled_from([("time",), ("time", "who")]))
    shape = (draw(st.integers(1, 4)), len(tags_of(labels)))
    scores = draw(arrays(np.int8, shape, elements=st.integers(-9, 9)))
    return scores.astype(np.float32), labels


@settings(deadline=None)
@given(problems())
def test_token_viterbi_equals_brute_force_over_all_legal_paths(
    problem: tuple[NDArray[np.float32], tuple[str, ...]],
) -> None:
    scores, labels = problem
    tags = tags_of(labels)
    legal_paths = [
        path for path in itertools.product(range(len(tags)), repeat=len(scores)) if is_legal(path, tags)
    ]
    rows = np.arange(len(scores))
    best = max(scores[rows, list(path)].sum() for path in legal_paths)
    found = viterbi(scores, legal_steps(labels))
    assert is_legal(found, tags)
    assert scores[rows, found].sum() == best


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
    assert [TAGS[tag] for tag in viterbi(scores, legal_steps(("time", "who")))] == mended


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


def test_token_span_score_is_the_mean_probability_of_its_tags() -> None:
    tokens = np.concatenate([sure("B-who", probability=0.5), sure("I-who", probability=0.75), sure("O")])
    (span,) = reader().decode(tokens, np.array(OFFSETS[:3], np.int32))
    assert span[:3] == ("who", 0, 7)
    assert span.score == pytest.approx(0.625, abs=1e-6)


def test_token_scale_is_the_temperature_of_the_scores() -> None:
    (span,) = reader(scale=2.0).decode(sure("B-who", probability=0.6), np.array(OFFSETS[:1], np.int32))
    assert span.score == pytest.approx(0.6**2 / (0.6**2 + 4 * 0.1**2), abs=1e-6)


@pytest.mark.parametrize(
    ("thresholds", "labels"),
    [((0.0, 0.0), ["who", "time"]), ((0.0, 0.7), ["time"]), ((0.7, 0.0), ["who"]), ((0.7, 0.7), [])],
)
def test_token_spans_below_their_labels_threshold_are_dropped(
    thresholds: tuple[float, float], labels: list[str]
) -> None:
    tokens = sure("B-who", "O", "O", "B-time", probability=0.6)
    found = reader(thresholds).decode(tokens, np.array(OFFSETS, np.int32))
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


def test_token_comes_back_as_saved(tmp_path: Path) -> None:
    reader().save(tmp_path)
    loaded = TokenHead.load(tmp_path)
    assert (loaded.spec, loaded.token_dim) == (reader().spec, 5)
    said: Encoding = tokenized(sure("B-who", "I-who", "O", "B-time"), OFFSETS)
    spans: tuple[Span, ...] = loaded.annotate(Heard.alone("wake me at six", said)).spans
    assert spans == reader().annotate(Heard.alone("wake me at six", said)).spans
    assert len(spans) == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param((5, 16), "found weights 16 wide, expected a multiple of 3", id="no window"),
        pytest.param((4, 15), "found tensor 'weight' of shape 4x15, expected 5xany", id="a tag short"),
    ],
)
def test_token_weights_that_fit_no_window_are_refused(
    tmp_path: Path, shape: tuple[int, int], message: str
) -> None:
    write(
        tmp_path, make_spec(("time", "who"), kind="token"), {"weight": np.zeros(shape), "bias": np.zeros(5)}
    )
    with pytest.raises(HeadInvalid, match=message):
        TokenHead.load(tmp_path)
