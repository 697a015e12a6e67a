"""Punctuation and case: written text becomes labels on spoken words, and the labels make it again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotators.annotator import Span
from annotators.restore import MARKS, is_written, spoken, written

LETTERS = "abcdefghijklmnopqrstuvwxyzабвгдеёжзийклмнопрстуфхцчшщъыьэюяçéüñ"


def spans_of(labels: Sequence[tuple[str, int, int]]) -> list[Span]:
    return [Span(*label, 1.0) for label in labels]


def again(text: str) -> str:
    """Spoken, then written."""
    phrase, labels = spoken(text)
    return written(phrase, spans_of(labels))


@pytest.mark.parametrize(
    ("text", "phrase", "labels"),
    [
        pytest.param("Hello.", "hello", {"hello": "Aa."}, id="a word"),
        pytest.param("wake me at six", "wake me at six", {}, id="nothing to restore"),
        pytest.param("Call Anna, please!", "call anna please", {"call": "Aa", "anna": "Aa,", "please": "!"}, id="several"),
        pytest.param("Позвони Анне, ладно?", "позвони анне ладно", {"позвони": "Aa", "анне": "Aa,", "ладно": "?"}, id="Russian"),
        pytest.param("Я из США.", "я из сша", {"я": "Aa", "сша": "AA."}, id="capitals"),
        pytest.param("It's Anna's, isn't it?", "it's anna's isn't it", {"it's": "Aa", "anna's": "Aa,", "it": "?"}, id="apostrophes"),
        pytest.param("Кто-то сказал что-нибудь?", "кто-то сказал что-нибудь", {"кто-то": "Aa", "что-нибудь": "?"}, id="hyphens"),
        pytest.param("Really?!", "really", {"really": "Aa?"}, id="a question that exclaims"),
        pytest.param("Ну...", "ну", {"ну": "Aa."}, id="three dots"),
        pytest.param("Ну… ладно", "ну ладно", {"ну": "Aa."}, id="an ellipsis"),
        pytest.param("One; two: three", "one two three", {"one": "Aa,", "two": ","}, id="lesser marks are commas"),
        pytest.param("«Привет», — сказала (она).", "привет сказала она", {"привет": "Aa,", "она": "."}, id="quotes and brackets"),
        pytest.param("hello , anna !", "hello anna", {"hello": ",", "anna": "!"}, id="marks that stand alone"),
        pytest.param("What ? !", "what", {"what": "Aa!"}, id="the last mark that stands alone"),
        pytest.param(", hello", "hello", {}, id="a mark before anything is said"),
        pytest.param("Great 🎉 thanks 👍!", "great thanks", {"great": "Aa", "thanks": "!"}, id="emoji"),
        pytest.param("🎉 !", "", {}, id="nothing said"),
        pytest.param("", "", {}, id="nothing"),
        pytest.param("at 10:30, 5 GB", "at 10:30 5 gb", {"10:30": ",", "gb": "AA"}, id="numbers"),
        pytest.param("  two\n words \t", "two words", {}, id="white space"),
    ],
)  # fmt: skip
def test_restore_spoken_by_hand(text: str, phrase: str, labels: dict[str, str]) -> None:
    found, spans = spoken(text)
    assert found == phrase
    assert {found[start:end]: label for label, start, end in spans} == labels


@pytest.mark.parametrize(
    ("phrase", "labels", "text"),
    [
        pytest.param("hello", [("Aa.", 0, 5)], "Hello.", id="case and mark"),
        pytest.param("hello", [("?", 0, 5)], "hello?", id="mark"),
        pytest.param("из сша", [("AA", 3, 6)], "из США", id="capitals"),
        pytest.param("it's six", [("Aa", 0, 2), (",", 3, 4)], "It's, six", id="tokens of one word"),
        pytest.param("🐈 мяу", [("Aa!", 2, 5)], "🐈 Мяу!", id="code points"),
        pytest.param("wake me", [], "wake me", id="no labels"),
    ],
)
def test_restore_written_by_hand(phrase: str, labels: list[tuple[str, int, int]], text: str) -> None:
    assert written(phrase, spans_of(labels)) == text


@st.composite
def plainly_written(draw: st.DrawFn) -> str:
    """Words in lower case, with a capital, or in capitals; apostrophes and hyphens inside; one mark or none behind."""
    parts = st.text(LETTERS, min_size=1, max_size=6)
    words = draw(
        st.lists(
            st.tuples(
                parts,
                st.sampled_from(["", "'", "-", "’"]),
                parts,
                st.sampled_from([str.lower, str.capitalize, str.upper]),
                st.sampled_from(["", *MARKS]),
            ),
            min_size=1,
            max_size=8,
        )
    )
    return " ".join(case(first + joint + second) + mark for first, joint, second, case, mark in words)


@given(plainly_written())
def test_restore_plainly_written_text_comes_back_as_it_was(text: str) -> None:
    assert again(text) == text


@given(plainly_written())
def test_restore_spoken_text_is_lower_case_without_marks(text: str) -> None:
    phrase, _ = spoken(text)
    assert phrase == phrase.lower()
    assert not is_written(phrase)
    assert len(phrase.split()) == len(text.split())


_ODD = "İẞ"  # their lower case is two letters, or has another upper case
anything = st.text(
    st.one_of(
        st.sampled_from([*LETTERS, *LETTERS.upper(), *" '’-.,?!;:…«»()🎉👍\u200d0123456789_"]),
        st.characters(exclude_characters=_ODD),
    ),
    max_size=40,
)


@given(anything)
def test_restore_labels_lie_on_the_words_of_the_phrase(text: str) -> None:
    phrase, labels = spoken(text)
    words = set(
        itertools.pairwise([-1, *(i for i, letter in enumerate(phrase) if letter == " "), len(phrase)])
    )
    assert {(start - 1, end) for _, start, end in labels} <= words
    assert [start for _, start, _ in labels] == sorted({start for _, start, _ in labels})
    assert {label for label, _, _ in labels} <= {
        case + mark for case in ("", "Aa", "AA") for mark in ("", *MARKS)
    } - {""}


@given(anything)
def test_restore_what_is_written_is_spoken_as_before(text: str) -> None:
    """Whatever the text lost on the way (quotes, emoji, a second mark) it loses once."""
    phrase, _ = spoken(text)
    assert spoken(again(text))[0] == phrase


@pytest.mark.parametrize(
    ("phrase", "has_marks"),
    [
        ("hello anna", False),
        ("hello, anna", True),
        ("hello anna.", True),
        ("ты где?", True),
        ("at 3.14 o'clock", False),
        ("well-known", False),
        ("", False),
        ("...", True),
    ],
)
def test_restore_text_with_marks_is_written_already(phrase: str, has_marks: bool) -> None:
    assert is_written(phrase) is has_marks
