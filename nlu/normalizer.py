"""Text to phrase: the only text a vectorizer, a rule or a cache key ever sees, with the way back to the caller's text.

The same code runs in training and in serving, and RULES_VERSION is part of the vectorizer's fingerprint.
Caps come before any Unicode work, because canonical reordering is quadratic in the length of a run of
combining marks (160 KB of them keep one core busy for ten seconds).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from nlu.errors import InvalidInput

RULES_VERSION = 1

MAX_BYTES = 4096
MAX_CODE_POINTS = 512
MAX_COMBINING_RUN = 8

# Printable ASCII; Latin, Greek and Cyrillic without no-break space, soft hyphen and combining marks.
_PLAIN = re.compile(r"[ -~¡-¬®-ʯͰ-҂Ҋ-ԯ]*")
_JOINERS = ("\u200c", "\u200d")
# Latin, Greek, Cyrillic and Armenian never need a joiner; between their letters it only makes two equal words differ.
_JOINERLESS_BELOW = 0x0590
# Letters and marks that show nothing: grapheme joiner, Hangul fillers, Khmer inherent vowels, Mongolian selectors.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
_FIX_POINT_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Phrase:
    """Normalised text. `starts[i]` and `ends[i]` bound the code points of `original` that made code point i of `text`.

    Both are None when text and original correspond one to one.
    """

    text: str
    original: str
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None

    def to_original(self, start: int, end: int) -> tuple[int, int]:
        """Map a non-empty span of `text` (code points, end exclusive) to the span of `original` it came from."""
        if self.starts is None or self.ends is None:
            return start, end
        return self.starts[start], self.ends[end - 1]


def normalize(text: str, *, uncased: bool = True) -> Phrase:
    """Apply the rules of RULES_VERSION. Raises InvalidInput for text that is too long, hostile or without a word."""
    _check_length(len(text), _utf8_length(text))
    plain = _plain(text, uncased=uncased)
    if plain is not None:
        return plain
    kept = _drop_ignorable(text)
    _check_combining_runs(text, kept)
    characters, starts, ends = _compose(text, kept, uncased=uncased)
    phrase = _fold_whitespace(text, characters, starts, ends)
    return phrase if phrase.text == text else _settled(phrase, normalize(phrase.text, uncased=uncased))


def _settled(phrase: Phrase, again: Phrase) -> Phrase:
    """A second round may see what the first uncovered (a joiner after a letter that became Latin, a length that grew)."""
    if again.text == phrase.text:
        return phrase
    spans = [phrase.to_original(*again.to_original(i, i + 1)) for i in range(len(again.text))]
    return Phrase(again.text, phrase.original, tuple(s for s, _ in spans), tuple(e for _, e in spans))


def _check_length(code_points: int, size: int) -> None:
    if size > MAX_BYTES:
        raise InvalidInput(
            "text",
            found=f"{size} bytes",
            expected=f"at most {MAX_BYTES}",
            remedy="send one utterance, not a document",
        )
    if code_points > MAX_CODE_POINTS:
        raise InvalidInput(
            "text",
            found=f"{code_points} code points",
            expected=f"at most {MAX_CODE_POINTS}",
            remedy="send one utterance, not a document",
        )


def _utf8_length(text: str) -> int:
    if text.isascii() or len(text) > MAX_BYTES:
        return len(text)  # already too long in code points; do not encode megabytes to say so
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(
            "text",
            found=f"a lone surrogate at code point {error.start}",
            expected="valid Unicode",
            remedy="fix the caller's decoding",
        ) from error


def _plain(text: str, *, uncased: bool) -> Phrase | None:
    """Text of European scripts that is in normal form already, where every code point stays where it is; else None.

    This is nearly all there is, and it takes microseconds where the long way takes one for every code point.
    """
    if _PLAIN.fullmatch(text) is None:
        return None
    phrase = text.casefold() if uncased else text
    if not text.isascii() and not (
        len(phrase) == len(text)  # folding never shortens, so each code point became exactly one
        and unicodedata.is_normalized("NFKC", text)
        and unicodedata.is_normalized("NFKC", phrase)
    ):
        return None
    if "  " not in phrase and phrase[:1] != " " and phrase[-1:] != " ":
        return Phrase(_with_a_word(phrase), text)
    return _fold_whitespace(text, list(phrase), list(range(len(text))), list(range(1, len(text) + 1)))


def _drop_ignorable(text: str) -> list[int]:
    """Indices of the code points that stay: no format, control, variation-selector or unassigned-surrogate characters."""
    kept: list[int] = []
    last = ""
    for i, character in enumerate(text):
        if character in _JOINERS:
            if not last or _is_joinerless(last) or last in _JOINERS or last.isspace():
                continue
        elif unicodedata.category(character) in ("Cf", "Cc", "Cs") and not character.isspace():
            continue
        elif "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
            continue
        elif character in _INVISIBLE:
            continue
        kept.append(i)
        last = character
    while kept and text[kept[-1]] in _JOINERS:
        kept.pop()
    return kept


def _is_joinerless(character: str) -> bool:
    base = unicodedata.normalize("NFKD", character)[0]  # Latin letters composed with marks lie far above
    return ord(base) < _JOINERLESS_BELOW


def _check_combining_runs(text: str, kept: Sequence[int]) -> None:
    run = 0
    for i in kept:
        run = run + 1 if unicodedata.combining(text[i]) else 0
        if run > MAX_COMBINING_RUN:
            raise InvalidInput(
                "text",
                found=f"more than {MAX_COMBINING_RUN} combining marks in a row at code point {i}",
                expected=f"at most {MAX_COMBINING_RUN}",
                remedy="strip decorative marks before sending",
            )


def _joins_previous(character: str) -> bool:
    """Whether normalisation may merge this code point with what stands before it, so that they form one cluster."""
    first = unicodedata.normalize("NFKD", character)[:1]
    return (
        unicodedata.category(first).startswith("M")
        or "\u1160" <= first <= "\u11ff"  # Hangul vowel and final jamo
    )


def _compose(text: str, kept: Sequence[int], *, uncased: bool) -> tuple[list[str], list[int], list[int]]:
    """NFKC (and case-fold) cluster by cluster; every code point of a changed cluster maps to the whole cluster."""
    characters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    position, shown = 0, 0
    while position < len(kept):
        stop = position + 1
        while stop < len(kept) and _joins_previous(text[kept[stop]]):
            stop += 1
        cluster = "".join(text[i] for i in kept[position:stop])
        composed = _canonical(cluster, uncased=uncased)
        begin, end = kept[position], kept[stop - 1] + 1
        if len(composed) == stop - position and composed == cluster:
            starts.extend(kept[position:stop])
            ends.extend(i + 1 for i in kept[position:stop])
        else:
            starts.extend([begin] * len(composed))
            ends.extend([end] * len(composed))
        characters.extend(composed)
        position = stop
        shown += sum(not character.isspace() for character in composed)
        if shown > MAX_CODE_POINTS:  # one code point may become eighteen: look no further than to refuse it
            raise InvalidInput(
                "text",
                found=f"more than {MAX_CODE_POINTS} code points once it is normalised",
                expected=f"at most {MAX_CODE_POINTS}",
                remedy="send one utterance, not a document",
            )
    return characters, starts, ends


def _canonical(cluster: str, *, uncased: bool) -> str:
    """NFKC and case folding undo each other for a few letters (e.g. U+0345), so go on until nothing changes."""
    for _ in range(_FIX_POINT_ROUNDS):
        composed = unicodedata.normalize("NFKC", cluster)
        composed = unicodedata.normalize("NFKC", composed.casefold()) if uncased else composed
        if composed == cluster:
            break
        cluster = composed
    return cluster


def _fold_whitespace(
    original: str, characters: Sequence[str], starts: Sequence[int], ends: Sequence[int]
) -> Phrase:
    text: list[str] = []
    kept_starts: list[int] = []
    kept_ends: list[int] = []
    for character, start, end in zip(characters, starts, ends, strict=True):
        if not character.isspace():
            text.append(character)
        elif text and text[-1] != " ":
            text.append(" ")
        elif text:
            kept_ends[-1] = end
            continue
        else:
            continue
        kept_starts.append(start)
        kept_ends.append(end)
    if text and text[-1] == " ":
        text.pop()
        kept_starts.pop()
        kept_ends.pop()
    return Phrase(_with_a_word("".join(text)), original, tuple(kept_starts), tuple(kept_ends))


def _with_a_word(phrase: str) -> str:
    if phrase.isalnum() or any(
        character.isalnum() or unicodedata.category(character)[0] == "S" for character in phrase
    ):
        return phrase
    raise InvalidInput(
        "text", found="nothing but spaces, punctuation or invisible characters", expected="at least one letter, digit or symbol",
        remedy="do not call for silence",
    )  # fmt: skip
