"""Training heads on toy token vectors: words like those seen are found, their order is learnt, and scores are chances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from annotators import calibration, thresholds
from annotators.annotator import Heard, Span, Status
from annotators.fit_token import (
    INFLUENCES,
    REGULARISATIONS,
    FittedToken,
    TaggedEncoding,
    by_token,
    fit_token,
    tags,
)
from annotators.restore import spoken, written
from annotators.table import Head
from annotators.token import tags_of
from tests.annotators.clouds import ABOUT, files, reloaded
from tests.annotators.toys import encoded, random_units, tokenized

WHO, TIME = ("anna", "boris", "clara", "david"), ("six", "noon", "seven", "midnight")
WORDS = ("call", "wake", "me", "at", "please", "and", *WHO, *TIME)
GROUPS = np.concatenate([random_units(6, 6, seed=8), np.repeat(random_units(2, 6, seed=9), 4, axis=0)])


def tagged(text: str, *, noise: float = 0.0) -> TaggedEncoding:
    """A phrase whose token vectors stand for its words, tagged by what the words are."""
    rng = np.random.default_rng(len(text))
    offsets: list[tuple[int, int]] = []
    spans: list[Span] = []
    for word in text.split():
        start = offsets[-1][1] + 1 if offsets else 0
        offsets.append((start, start + len(word)))
        if word in WHO or word in TIME:
            spans.append(Span("who" if word in WHO else "time", *offsets[-1], 1.0))
    tokens = GROUPS[[WORDS.index(word) for word in text.split()]]
    return TaggedEncoding(text, tokenized(tokens + rng.normal(0, noise, tokens.shape), offsets), tuple(spans))


def tagged_phrases(noise: float = 0.0) -> list[TaggedEncoding]:
    pairs = list(zip(WHO[:3], TIME[:3], strict=True))
    texts = [f"call {who} at {time}" for who, time in itertools.product(WHO[:3], TIME[:3])]
    texts += [f"wake me at {time} please" for _, time in pairs] + [f"call {who}" for who, _ in pairs]
    return [tagged(text, noise=noise) for text in [*texts, "wake me please"]]


def found_in(head: Head, said: TaggedEncoding) -> list[tuple[str, int, int]]:
    return [span[:3] for span in head.annotate(Heard.alone(said.text, said.encoding)).spans]


def spans_of(said: TaggedEncoding) -> list[tuple[str, int, int]]:
    return [span[:3] for span in said.spans]


@pytest.mark.parametrize("scheme", ["bio", "words"])
@pytest.mark.parametrize(
    "text", ["call david at midnight please", "please call david and anna", "at midnight", "please wake me"]
)
def test_fit_token_finds_words_it_has_not_seen_among_words_like_them(
    tmp_path: Path, scheme: str, text: str
) -> None:
    said, head = tagged(text), reloaded(fit_token(ABOUT, tagged_phrases(), scheme=scheme).head, tmp_path)
    assert found_in(head, said) == spans_of(said)


def test_fit_token_records_what_it_is() -> None:
    fitted = fit_token(ABOUT, tagged_phrases())
    spec = fitted.head.spec
    assert (spec.name, spec.kind, spec.task, spec.made_by, spec.labels) == (
        "toy",
        "token",
        "test",
        "tests",
        ("time", "who"),
    )
    assert (spec.params["scheme"], spec.params.get("restores")) == ("bio", None)
    assert fitted.strength in REGULARISATIONS
    assert fitted.influence in INFLUENCES
    assert spec.metrics["regularisation"] == fitted.strength
    assert spec.metrics["phrases"] == 16
    assert fitted.wanted.tolist() == [12, 12]


def test_fit_token_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    head = reloaded(fit_token(ABOUT, tagged_phrases()).head, tmp_path)
    assert len(head.spec.golden) > 3
    for golden in head.spec.golden:
        said = tagged(golden.text)
        spans = head.annotate(Heard.alone(golden.text, said.encoding)).spans
        assert tuple(f"{s.label}={golden.text[s.start : s.end]}" for s in spans) == golden.spans
        assert len(spans) == len(said.spans) > 0
        assert min(span.score for span in spans) >= 0.8


def test_fit_token_never_answers_a_tag_it_never_saw() -> None:
    """Every span of these phrases is one word long, so no I- tag was ever seen."""
    head = fit_token(ABOUT, tagged_phrases()).head
    assert head.bias[[2, 4]].tolist() == [-30.0, -30.0]
    assert (head.bias[[0, 1, 3]] > -30).all()
    for seed in range(50):
        assert all(first == last for _, first, last, _ in head.proposed(random_units(5, 6, seed=seed)))


def chance(fitted: FittedToken) -> NDArray[np.float32]:
    """Calibrated scores of the spans found in held-out phrases."""
    raw = np.array([each.raw for each in fitted.proposed], np.float32)
    return calibration.logistic(raw, fitted.head.spec.scale[0], fitted.head.spec.shift[0])


def test_fit_token_scores_are_calibrated_on_phrases_the_model_did_not_see() -> None:
    fitted = fit_token(ABOUT, tagged_phrases(noise=0.5))
    spec = fitted.head.spec
    right = np.array([each.right for each in fitted.proposed])
    assert 0 < right.sum() < len(right)
    expected = calibration.fit_platt(np.array([each.raw for each in fitted.proposed], np.float32), right)
    assert spec.scale == pytest.approx((expected[0],) * 2)
    assert spec.shift == pytest.approx((expected[1],) * 2)
    assert chance(fitted).mean() == pytest.approx(right.mean(), abs=0.1)


def test_fit_token_thresholds_are_the_best_of_each_label() -> None:
    fitted = fit_token(ABOUT, tagged_phrases(noise=0.5), beta=1.5)
    labels, right = (
        np.array([getattr(each, name) for each in fitted.proposed]) for name in ("label", "right")
    )
    for label in range(2):
        mine = labels == label
        expected = thresholds.best(chance(fitted)[mine], right[mine], float(fitted.wanted[label]), 1.5)
        assert fitted.head.spec.thresholds[label] == expected


def by_chance(phrases: int = 40, length: int = 6, width: int = 60) -> list[TaggedEncoding]:
    """Tags of pure chance, over vectors of so many dimensions that every one can be learnt by heart."""
    rng = np.random.default_rng(1)
    offsets = [(2 * i, 2 * i + 1) for i in range(length)]
    return [
        TaggedEncoding(
            "a " * length,
            tokenized(random_units(length, width, seed=i), offsets),
            tuple(Span("x", *offsets[j], 1.0) for j in np.flatnonzero(rng.random(length) < 0.3)),
        )
        for i in range(phrases)
    ]


def test_fit_token_measures_on_phrases_the_model_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("annotators.fit_token.REGULARISATIONS", (1e4,))
    phrases = by_chance()
    fitted = fit_token(ABOUT, phrases)
    lenient = fitted.head.spec.model_copy(update={"thresholds": (0.0,)})
    by_heart = type(fitted.head)(lenient, fitted.head.weight, fitted.head.bias)
    hits = [set(found_in(by_heart, said)) & set(spans_of(said)) for said in phrases]
    right = sum(map(len, hits)) / fitted.wanted.sum()
    assert right > 0.9
    assert fitted.head.spec.metrics["folds_span_f1"] < 0.5


def test_fit_token_proposed_spans_belong_to_their_phrases() -> None:
    phrases = by_chance()
    fitted = fit_token(ABOUT, phrases)
    for i, said in enumerate(phrases):
        mine = [each.right for each in fitted.proposed if each.phrase == i]
        assert sum(mine) <= len(said.spans)
        assert len(mine) <= len(said.text.split())
    f1 = 2 * sum(each.right for each in fitted.proposed) / (len(fitted.proposed) + fitted.wanted.sum())
    assert fitted.head.spec.metrics["folds_span_f1"] == pytest.approx(f1)


def in_order(*, shuffled: bool) -> list[TaggedEncoding]:
    """Phrases in which a time always follows a person, whose vectors hardly tell either from the rest; or in any order."""
    rng = np.random.default_rng(3)
    phrases = []
    for i in range(120):
        names = [name for _ in range(3) for name in (("who", "time") if rng.random() < 0.5 else ("", ""))]
        if shuffled:
            rng.shuffle(names)
        tokens = np.array([[name == "who", name == "time"] for name in names]) + rng.normal(0, 0.7, (6, 2))
        offsets = [(2 * j, 2 * j + 1) for j in range(6)]
        spans = tuple(Span(name, *offset, 1.0) for name, offset in zip(names, offsets, strict=True) if name)
        phrases.append(TaggedEncoding(f"phrase {i}", tokenized(tokens, offsets), spans))
    return phrases


def test_fit_token_learns_what_follows_what() -> None:
    """Where words come in any order, the negative control, there is nothing to learn from their order."""
    labels = tags_of(("time", "who"))
    outside, time, who = (labels.index(name) for name in ("O", "B-time", "B-who"))
    fitted = fit_token(ABOUT, in_order(shuffled=False))
    steps = fitted.head.transitions
    assert fitted.influence > 0
    assert steps is not None
    assert steps[who, time] > 0 > max(steps[who, outside], steps[outside, time])
    other = fit_token(ABOUT, in_order(shuffled=True)).head.transitions
    if other is not None:
        assert np.abs(other[np.ix_([outside, time, who], [outside, time, who])]).max() < steps[who, time] / 2


def test_fit_token_transitions_are_log_ratios_of_counts() -> None:
    """Counted here one step at a time: how much likelier a tag is after another than anywhere, smoothed by one each."""
    phrases = in_order(shuffled=False)
    fitted = fit_token(ABOUT, phrases)
    assert fitted.head.transitions is not None
    sequences = [tags(phrase, ("time", "who")).tolist() for phrase in phrases]
    pairs = [pair for sequence in sequences for pair in itertools.pairwise([0, *sequence])]
    for before, after in itertools.product(range(5), repeat=2):
        anywhere = (sum(tag == after for _, tag in pairs) + 1) / (len(pairs) + 5)
        here = sum(pair == (before, after) for pair in pairs) + 5 * anywhere
        ratio = here / (sum(tag == before for tag, _ in pairs) + 5) / anywhere
        assert fitted.head.transitions[before, after] == pytest.approx(
            fitted.influence * math.log(ratio), abs=1e-5
        )


def test_fit_token_influence_is_the_one_with_the_best_held_out_f1(monkeypatch: pytest.MonkeyPatch) -> None:
    phrases = in_order(shuffled=False)
    chosen = fit_token(ABOUT, phrases)
    of_one = {}
    for influence in INFLUENCES:
        monkeypatch.setattr("annotators.fit_token.INFLUENCES", (influence,))
        of_one[influence] = fit_token(ABOUT, phrases).head.spec.metrics["folds_span_f1"]
    assert of_one[chosen.influence] == max(of_one.values()) > of_one[0.0]


SENTENCES = (
    "Привет, Анна.", "Привет, Борис.", "Где Анна?", "Где Борис?", "Анна, где Борис?", "Борис, где Анна?",
    "Привет.", "Привет, Анна. Где Борис?", "Привет, Борис. Где Анна?", "Где Анна, Борис?", "Где Борис, Анна?", "Анна.",
)  # fmt: skip
SPOKEN_WORDS = ("привет", "анна", "борис", "где")


def sentence(text: str) -> TaggedEncoding:
    """Written text as spoken words, whose vectors are their names."""
    phrase, labels = spoken(text)
    words = phrase.split()
    starts = [len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]
    offsets = [(start, start + len(word)) for start, word in zip(starts, words, strict=True)]
    tokens = np.eye(len(SPOKEN_WORDS))[[SPOKEN_WORDS.index(word) for word in words]]
    return TaggedEncoding(phrase, tokenized(tokens, offsets), tuple(Span(*label, 1.0) for label in labels))


def test_fit_token_restores_punctuation_and_case(tmp_path: Path) -> None:
    fitted = fit_token(ABOUT, [sentence(text) for text in SENTENCES * 3], scheme="words", restores=True)
    head = reloaded(fitted.head, tmp_path)
    assert head.spec.params["restores"] is True
    for text in ("Где Анна?", "Привет, Борис.", "Анна, где Борис?"):
        said = sentence(text)
        annotation = head.annotate(Heard.alone(said.text, said.encoding))
        assert (annotation.status, annotation.restored) == (Status.OK, text)


def test_fit_token_that_restores_has_golden_phrases_without_marks(tmp_path: Path) -> None:
    head = fit_token(ABOUT, [sentence(text) for text in SENTENCES * 3], scheme="words", restores=True).head
    assert head.spec.golden
    assert all(golden.text == spoken(golden.text)[0] for golden in head.spec.golden)


def test_fit_token_by_token_case_begins_a_word_and_a_mark_ends_it() -> None:
    """It's said NATO-wide? as the tokens it ' s said nato - wide."""
    offsets = [(0, 2), (2, 3), (3, 4), (5, 9), (10, 14), (14, 15), (15, 19)]
    words = (Span("Aa,", 0, 4, 1.0), Span("AA?", 10, 19, 1.0))
    phrase = TaggedEncoding("it's said nato-wide", tokenized(np.zeros((7, 1)), offsets), words)
    assert [span[:3] for span in by_token(phrase)] == [
        ("Aa", 0, 2), (",", 3, 4), ("AA", 10, 14), ("AA", 14, 15), ("AA?", 15, 19)
    ]  # fmt: skip
    assert written(phrase.text, by_token(phrase)) == "It's, said NATO-WIDE?"


@pytest.mark.parametrize(
    ("label", "labels"), [("Aa", ["Aa", ""]), ("AA", ["AA", "AA"]), ("?", ["", "?"]), ("Aa!", ["Aa", "!"])]
)
def test_fit_token_by_token_of_a_word_in_two(label: str, labels: list[str]) -> None:
    phrase = TaggedEncoding("ab", tokenized(np.zeros((2, 1)), [(0, 1), (1, 2)]), (Span(label, 0, 2, 1.0),))
    found = {(span.start, span.end): span.label for span in by_token(phrase)}
    assert [found.get((0, 1), ""), found.get((1, 2), "")] == labels


def without_tokens() -> TaggedEncoding:
    return TaggedEncoding("six", encoded([1, 0]), (Span("time", 0, 3, 1.0),))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        pytest.param(lambda: fit_token(ABOUT, [without_tokens()] * 9), "token heads are fitted on Encodings with token", id="fit"),
        pytest.param(lambda: tags(without_tokens(), ["time"]), "token heads are fitted on Encodings with token", id="tags"),
        pytest.param(
            lambda: fit_token(ABOUT, [tagged("wake me please")] * 9), "spans: found none in any phrase, expected some to learn", id="no spans"
        ),
        pytest.param(lambda: fit_token(ABOUT, tagged_phrases()[:5]), "phrases: found 5, expected at least 6; add phrases", id="few"),
        pytest.param(lambda: fit_token(ABOUT, tagged_phrases(), scheme="bilou"), "scheme 'bilou'", id="scheme"),
    ],
)  # fmt: skip
def test_fit_token_what_cannot_be_learnt_is_refused(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(
    ("spans", "runs", "words"),
    [
        pytest.param([], [0, 0, 0, 0], [0, 0, 0, 0], id="none"),
        pytest.param([("time", 8, 10)], [0, 0, 1, 0], [0, 0, 1, 0], id="one token"),
        pytest.param([("who", 5, 14)], [0, 3, 4, 4], [0, 2, 2, 2], id="three tokens"),
        pytest.param([("time", 0, 4), ("time", 5, 7)], [1, 1, 0, 0], [1, 1, 0, 0], id="two side by side"),
        pytest.param([("who", 0, 7), ("time", 8, 14)], [3, 4, 1, 2], [2, 2, 1, 1], id="two labels"),
        pytest.param([("time", 2, 6)], [1, 2, 0, 0], [1, 1, 0, 0], id="half a token counts"),
        pytest.param([("time", 4, 5)], [0, 0, 0, 0], [0, 0, 0, 0], id="between tokens"),
        pytest.param([("time", 7, 11)], [0, 0, 1, 0], [0, 0, 1, 0], id="touching is not overlapping"),
    ],
)
def test_fit_token_tags_by_hand(
    spans: Sequence[tuple[str, int, int]], runs: list[int], words: list[int]
) -> None:
    """Tags of runs are O, B-time, I-time, B-who, I-who, and of words O, time, who."""
    encoding = tokenized(np.zeros((4, 2)), [(0, 4), (5, 7), (8, 10), (11, 14)])
    phrase = TaggedEncoding("wake me at six", encoding, tuple(Span(*span, 1.0) for span in spans))
    assert tags(phrase, ("time", "who")).tolist() == runs
    assert tags(phrase, ("time", "who"), runs=False).tolist() == words


@pytest.mark.parametrize("scheme", ["bio", "words"])
def test_fit_token_same_seed_gives_same_bytes(tmp_path: Path, scheme: str) -> None:
    """Another seed, the negative control, deals other folds."""
    phrases = in_order(shuffled=False)[::2]
    one, again, other = (
        files(fit_token(ABOUT, phrases, seed=seed, scheme=scheme).head, tmp_path / f"{i}")
        for i, seed in enumerate((5, 5, 6))
    )
    assert one == again
    assert one != other
