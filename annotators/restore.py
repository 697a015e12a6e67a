"""Punctuation and case: how written text becomes labels on the words of spoken text, and how labels become text again.

A label is what to do with a word, first its letters, then what follows it: "Aa" and "AA" are case, ", . ? !" are marks,
and "Aa," is both. A token of several in one word (it ' s) carries the case of its beginning and the marks of its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from annotators.annotator import Span

MARKS = ",.?!"
_WORD = re.compile(r"\S+")
_EDGES = re.compile(r"^[\W_]*(.*?)([\W_]*)$", re.DOTALL)


def spoken(text: str) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """What a recogniser would have written for `text`, lower case and without marks, and (label, start, end) of its words."""
    words: list[str] = []
    labels: list[tuple[str, int, int]] = []
    position = 0
    for match in _WORD.finditer(text):
        found = _EDGES.match(match.group())
        word, after = found.groups() if found else ("", "")
        if not word:
            if (
                labels and words and (mark := _mark(match.group()))
            ):  # a mark that stands alone belongs to the word before
                label, start, end = labels.pop() if labels[-1][2] == position - 1 else ("", 0, 0)
                if end:
                    labels.append((label.rstrip(MARKS) + mark, start, end))
            continue
        start, lower = position, word.lower()
        words.append(lower)
        position += len(lower) + 1
        labels.append((_case(word) + _mark(after), start, start + len(lower)))
    return " ".join(words), tuple(label for label in labels if label[0])


def written(phrase: str, spans: Sequence[Span]) -> str:
    """The phrase with the case and marks of its labelled words."""
    pieces: list[str] = []
    position = 0
    for span in spans:
        word = phrase[span.start : span.end]
        case, mark = span.label.rstrip(MARKS), span.label[len(span.label.rstrip(MARKS)) :]
        pieces.append(phrase[position : span.start])
        pieces.append({"Aa": word[:1].upper() + word[1:], "AA": word.upper()}.get(case, word) + mark)
        position = span.end
    return "".join(pieces) + phrase[position:]


def is_written(phrase: str) -> bool:
    """Whether the phrase has marks already, so that there is nothing to restore."""
    return any(word[-1] in MARKS for word in phrase.split())


def _case(word: str) -> str:
    if len(word) > 1 and word.isupper():
        return "AA"
    return "Aa" if word[:1].isupper() else ""


def _mark(after: str) -> str:
    """The one mark that what follows a word comes down to."""
    if "?" in after:
        return "?"
    if "!" in after:
        return "!"
    if "." in after or "…" in after:
        return "."
    return "," if any(mark in after for mark in ",;:") else ""
