"""nlu.normalizer: what becomes one phrase, how spans find the way back, and what is refused before it can cost anything."""

from __future__ import annotations

import unicodedata
from itertools import combinations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nlu import normalizer
from nlu.errors import InvalidInput
from nlu.normalizer import MAX_BYTES, MAX_CODE_POINTS, MAX_COMBINING_RUN, Phrase, normalize

WHITESPACE = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"
INVISIBLE = "\x00\x7f\xad\u061c\u200b\u200c\u200d\u200e\u200f\u202e\u202c\u2060\u2066\ufeff\ufe0e\ufe0f\U000e0067\U000e0101"
FILLERS = "\u034f\u115f\u1160\u17b4\u180b\u3164\uffa0"
MARKS = "\u0300\u0301\u0307\u0308\u0323\u0327\u0338\u0344\u0345\u05b4\u0651\u093c\u094d\u0b3e\u1ab0\u20e3\u3099\uff9e\uff9f"
LETTERS = "aAeEisSzÅåЁёЕеЙйßẞİıſŉΐΣςϐᾳªﬁﬃﬀᏘꭰⱢᲀK½²①㎏℀ﷺﷲשאשّﻼﻻतकஔがカｶﾊハ한하한ﾾￂ漢㋀𝒳Ａａếǖ"
SYMBOLS = "´¨͵;·!?-_'…“¿。<≠=+$€👍🏽👩🚀❤☀1２٣"
hostile = st.text(
    alphabet=st.sampled_from(WHITESPACE + INVISIBLE + FILLERS + MARKS + LETTERS + SYMBOLS), max_size=24
)
texts = st.one_of(hostile, st.text(max_size=24))
thorough = settings(deadline=None, derandomize=True, max_examples=400)


def accepted(text: str, *, uncased: bool = True) -> Phrase:
    """The phrase, or a discarded example where there is none."""
    try:
        return normalize(text, uncased=uncased)
    except InvalidInput:
        assume(False)
        raise


@thorough
@given(texts, st.booleans())
@example("Ａ\u200db", True)
@example("न\u200d ", True)
@example("न\u200d´", True)
@example("ẞ\u200dx", True)
@example("ﷺ" * 20, True)
@example("u" + "\u0344" * 4, True)
def test_normalizer_is_idempotent(text: str, uncased: bool) -> None:
    phrase = accepted(text, uncased=uncased).text
    assert normalize(phrase, uncased=uncased).text == phrase


@thorough
@given(texts, st.booleans())
def test_normalizer_phrase_is_in_nfkc(text: str, uncased: bool) -> None:
    assert unicodedata.is_normalized("NFKC", accepted(text, uncased=uncased).text)


@thorough
@given(texts)
def test_normalizer_uncased_phrase_has_no_case_left(text: str) -> None:
    phrase = accepted(text).text
    assert unicodedata.normalize("NFKC", phrase.casefold()) == phrase


@thorough
@given(texts, st.booleans())
@example("ế\u200dx", True)
@example("e\u0302\u0301\u200dx", True)
def test_normalizer_gives_equivalent_texts_one_phrase(text: str, uncased: bool) -> None:
    phrase = accepted(text, uncased=uncased).text
    assert accepted(unicodedata.normalize("NFD", text), uncased=uncased).text == phrase
    assert accepted(unicodedata.normalize("NFC", text), uncased=uncased).text == phrase


@thorough
@given(texts, st.booleans())
def test_normalizer_has_only_single_inner_blanks(text: str, uncased: bool) -> None:
    phrase = accepted(text, uncased=uncased).text
    assert phrase == " ".join(phrase.split())


@thorough
@given(texts, st.booleans())
@example("x\u200d´y", True)
@example("ＡẞＡ\u200db", True)
def test_normalizer_maps_every_span_to_what_made_it(text: str, uncased: bool) -> None:
    phrase = accepted(text, uncased=uncased)
    for start, end in combinations(range(len(phrase.text) + 1), 2):
        first, last = phrase.to_original(start, end)
        assert 0 <= first < last <= len(text)
        piece = phrase.text[start:end].strip(" \u200c\u200d")  # neither lives at the edge of a phrase
        if any(character.isalnum() for character in piece):
            assert piece in normalize(text[first:last], uncased=uncased).text


@thorough
@given(texts, st.booleans())
def test_normalizer_maps_later_characters_no_earlier(text: str, uncased: bool) -> None:
    phrase = accepted(text, uncased=uncased)
    bounds = [phrase.to_original(i, i + 1) for i in range(len(phrase.text))]
    assert bounds == sorted(bounds)


european = st.text(alphabet=st.characters(max_codepoint=0x52F, exclude_categories=["Cs"]), max_size=24)


@thorough
@given(st.one_of(european, hostile), st.booleans())
@example("Straße  İſı ŉ ª ½ µ ΐ ς Ёё", True)
def test_normalizer_short_way_agrees_with_the_long_one(text: str, uncased: bool) -> None:
    short = accepted(text, uncased=uncased)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalizer, "_plain", lambda text, *, uncased: None)
        long = normalize(text, uncased=uncased)
    assert short.text == long.text
    bounds = [(short.to_original(i, i + 1), long.to_original(i, i + 1)) for i in range(len(short.text))]
    assert [one for one, other in bounds if one != other] == []


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        pytest.param("Wake Me", "wake me", id="ascii"),
        pytest.param("  wake \t me\r\nup\n", "wake me up", id="tabs-and-crlf"),
        pytest.param("wake\xa0me\u2003up\u3000now", "wake me up now", id="nbsp-and-wide-blanks"),
        pytest.param("wake\u2028me\x85up", "wake me up", id="line-separators"),
        pytest.param("Ёлка", "ёлка", id="yo-composed"),
        pytest.param("Е\u0308лка", "ёлка", id="yo-decomposed"),
        pytest.param("\u00c5 \u212b A\u030a", "å å å", id="angstrom-three-ways"),
        pytest.param("q\u0323\u0307 = q\u0307\u0323", "q\u0323\u0307 = q\u0323\u0307", id="marks-in-canonical-order"),
        pytest.param("ᄒ\u1161\u11ab국", "한국", id="hangul-jamo"),
        pytest.param("하\u11ab", "한", id="hangul-syllable-and-final"),
        pytest.param("ﾊﾞﾅﾅ", "バナナ", id="half-width-katakana-voiced"),
        pytest.param("か\u3099", "が", id="kana-and-voiced-mark"),
        pytest.param("oﬀice ﬁle", "office file", id="ligatures"),
        pytest.param("Straße STRAẞE", "strasse strasse", id="sharp-s"),
        pytest.param("İstanbul", "i\u0307stanbul", id="dotted-capital-i"),
        pytest.param("ΟΔΟΣ οδος", "οδοσ οδοσ", id="final-sigma"),
        pytest.param("ＷＡＫＥ　２", "wake 2", id="full-width"),
        pytest.param("5 ㎏ ½", "5 kg 1⁄2", id="compatibility-signs"),
        pytest.param("un\u200bbeliev\u2060able\ufeff", "unbelievable", id="zero-width-space"),
        pytest.param("co\xadop", "coop", id="soft-hyphen"),
        pytest.param("a\x00b\x7fc", "abc", id="control-characters"),
        pytest.param("ab\u034fc\u3164", "abc", id="grapheme-joiner-and-hangul-filler"),
        pytest.param("wa\u200dke \u200cme", "wake me", id="joiners-between-latin-letters"),
        pytest.param("ế\u200dm", "ếm", id="joiner-after-a-composed-latin-letter"),
        pytest.param("می\u200cخواهم", "می\u200cخواهم", id="joiner-that-persian-needs"),
        pytest.param("क्\u200dष", "क्\u200dष", id="joiner-that-devanagari-needs"),
        pytest.param("\u202eשלום\u202c \u200fעולם", "שלום עולם", id="hebrew-with-overrides"),
        pytest.param("\u2067مرحبا\u2069 wake", "مرحبا wake", id="arabic-with-isolates"),
        pytest.param("ﻻ", "لا", id="arabic-presentation-form"),
        pytest.param("👩\u200d🚀 hi", "👩\u200d🚀 hi", id="emoji-with-joiner"),
        pytest.param("👍🏽", "👍🏽", id="emoji-with-skin-tone"),
        pytest.param("❤\ufe0f\u200d🔥", "❤\u200d🔥", id="variation-selector-before-joiner"),
        pytest.param("☀\ufe0f and ☀\ufe0e", "☀ and ☀", id="variation-selectors"),
        pytest.param("葛\U000e0100城", "葛城", id="ideographic-variation"),
        pytest.param("+", "+", id="a-symbol-is-a-word"),
        pytest.param("7", "7", id="a-digit-is-a-word"),
        pytest.param("...ok?", "...ok?", id="punctuation-beside-a-word"),
    ],
)  # fmt: skip
def test_normalizer_makes(text: str, phrase: str) -> None:
    assert normalize(text).text == phrase


@pytest.mark.parametrize(
    ("text", "phrase"), [("Wake ME", "Wake ME"), ("Ё\u200bЖ ＡẞﬁＩ", "ЁЖ AẞfiI"), ("İ", "İ")], ids=["ascii", "mixed", "dotted"]
)  # fmt: skip
def test_normalizer_cased_keeps_case(text: str, phrase: str) -> None:
    assert normalize(text, uncased=False).text == phrase


@pytest.mark.parametrize(
    ("text", "part", "original"),
    [
        pytest.param("wake me", "me", "me", id="unchanged"),
        pytest.param("  Wake \t ME  now", "me", "ME", id="folded-whitespace"),
        pytest.param("wa  ke", "a k", "a  k", id="across-folded-whitespace"),
        pytest.param("wa \t ke", " ", " \t ", id="all-of-folded-whitespace"),
        pytest.param("oﬀice", "f", "ﬀ", id="first-half-of-a-ligature"),
        pytest.param("oﬀice", "ice", "ice", id="after-a-ligature"),
        pytest.param("e\u0308lf cafe\u0301s", "é", "e\u0301", id="composed-cluster"),
        pytest.param("e\u0308lf cafe\u0301s", "s", "s", id="after-a-composed-cluster"),
        pytest.param("ﾊﾞｽ stop", "バ", "ﾊﾞ", id="voiced-katakana"),
        pytest.param("ᄒ\u1161\u11ab 국", "한", "ᄒ\u1161\u11ab", id="jamo"),
        pytest.param("un\u200bdo it", "undo", "un\u200bdo", id="zero-width-inside"),
        pytest.param("\u202eundo\u202c it", "undo", "undo", id="override-outside"),
        pytest.param("Straße nach", "strasse", "Straße", id="sharp-s"),
        pytest.param("Straße nach", "nach", "nach", id="after-sharp-s"),
        pytest.param("👍🏽 \u200byes", "yes", "yes", id="after-an-emoji"),
        pytest.param("❤\ufe0f ok", "❤", "❤", id="variation-selector-stays-out"),
        pytest.param("ẞＡ\u200db x", "b", "b", id="what-a-second-round-exposed"),
    ],
)
def test_normalizer_maps_a_span_back(text: str, part: str, original: str) -> None:
    phrase = normalize(text)
    start = phrase.text.index(part)
    first, last = phrase.to_original(start, start + len(part))
    assert text[first:last] == original


@pytest.mark.parametrize(
    "text",
    ["", " ", "\t\r\n", "?!...", "—", "。", "\u200b", "\u202e\ufeff", "\u200d\u200d", "\ufe0f", "\x00\x01", "\u0301", "\xa0 ,\u2060",
     "\u3164", "\u115f\u1160\uffa0", "\u034f", "\U000e0041\U000e0042"],
    ids=ascii,
)  # fmt: skip
def test_normalizer_refuses_what_has_no_word(text: str) -> None:
    with pytest.raises(
        InvalidInput, match="found nothing but spaces, punctuation or invisible characters"
    ) as refused:
        normalize(text)
    assert refused.value.field == "text"
    assert normalize(f"a {text}").text[0] == "a"  # the control: the same text beside a letter


@pytest.mark.parametrize(
    ("text", "unharmed", "found"),
    [
        ("a" * (MAX_CODE_POINTS + 1), "a" * MAX_CODE_POINTS, "513 code points"),
        ("ж" * (MAX_CODE_POINTS + 1), "ж" * MAX_CODE_POINTS, "513 code points"),
        ("👍" * (MAX_CODE_POINTS + 1), "👍" * MAX_CODE_POINTS, "513 code points"),
        ("a" * (MAX_BYTES + 1), "a" * MAX_CODE_POINTS, "4097 bytes"),
        ("ж" * (MAX_BYTES // 2 + 1), "ж" * MAX_CODE_POINTS, "4098 bytes"),
        ("ж" * 1_000_000, "ж", "1000000 bytes"),  # counted, not encoded
        (" " * 600 + "a", " " * 500 + "a", "601 code points"),
        ("ﷺ" * 30, "ﷺ" * 28, "540 code points"),  # 18 for one: a phrase is no longer than a text may be
    ],
    ids=["ascii", "cyrillic", "emoji", "ascii-bytes", "cyrillic-bytes", "megabyte", "blanks", "grown"],
)
def test_normalizer_refuses_what_is_too_long(text: str, unharmed: str, found: str) -> None:
    assert normalize(unharmed).text
    with pytest.raises(InvalidInput, match=f"found {found}"):
        normalize(text)


@pytest.mark.parametrize("surrogate", ["\ud800", "\udfff"])
def test_normalizer_refuses_a_lone_surrogate(surrogate: str) -> None:
    with pytest.raises(InvalidInput, match="found a lone surrogate at code point 3"):
        normalize(f"abc{surrogate}d")


@pytest.mark.parametrize(
    ("text", "unharmed"),
    [
        ("e" + "\u0301" * (MAX_COMBINING_RUN + 1), "e" + "\u0301" * MAX_COMBINING_RUN),
        ("e" + "\u0323\u0301" * 5, "e" + "\u0323\u0301" * 4),
        ("e" + "\u0301\u200b" * 9, "e" + "\u0301\u200b" * 8),  # what is dropped does not end a run
        ("u" + "\u0344" * 8, "u" + "\u0344" * 4),  # a mark that decomposes into two
    ],
    ids=["one-mark", "two-marks", "zero-width-between", "double-marks"],
)
def test_normalizer_refuses_a_run_of_combining_marks(text: str, unharmed: str) -> None:
    assert normalize(unharmed).text
    with pytest.raises(InvalidInput, match=f"more than {MAX_COMBINING_RUN} combining marks"):
        normalize(text)


class Counted:
    """unicodedata.normalize with a counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._real = unicodedata.normalize
        monkeypatch.setattr(unicodedata, "normalize", self)

    def __call__(self, form: str, text: str) -> str:
        self.calls += 1
        return self._real(form, text)  # type: ignore[arg-type]  # typeshed wants a Literal


@pytest.mark.parametrize(
    "bomb",
    ["a" + "\u0301\u0323" * 200, "a" + "\u0301\u0323" * 40_000, "\u0301" * 500, "é" * 2_000, "ж" * 100_000],
    ids=["short-run", "long-run", "no-base", "bytes", "code-points"],
)
def test_normalizer_caps_come_before_any_normalisation(monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    counted = Counted(monkeypatch)
    with pytest.raises(InvalidInput):
        normalize(bomb)
    assert counted.calls == 0


def test_normalizer_stops_where_a_text_has_grown_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes eighteen code points: of five hundred of them no more is looked at than of fifty."""
    counted, looks = Counted(monkeypatch), []
    for count in (50, 500):
        counted.calls = 0
        with pytest.raises(InvalidInput, match=f"more than {MAX_CODE_POINTS} code points"):
            normalize("ﷺ" * count)
        looks.append(counted.calls)
    assert looks[0] == looks[1]


def test_normalizer_within_the_caps_does_normalise(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    assert normalize("e\u0301").text == "é"
    assert counted.calls > 0


def test_normalizer_never_repeats_the_text_in_its_refusal() -> None:
    with pytest.raises(InvalidInput) as refused:
        normalize("secret" * 100)
    assert "secret" not in str(refused.value)
