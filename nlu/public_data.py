"""Readers for the public datasets a checkout may have beside it (gzip'd TSV and JSONL); none of them is part of this project."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nlu.errors import InvalidInput
from nlu.normalizer import normalize


@dataclass(frozen=True, slots=True)
class Labelled:
    """A phrase (normalised) and its labels."""

    phrase: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tagged:
    """A phrase (normalised) and its spans (label, start, end) in code points of the phrase."""

    phrase: str
    spans: tuple[tuple[str, int, int], ...]


def labelled(path: Path) -> Iterator[Labelled]:
    """Rows of a `text<TAB>label[,label]` file; texts the normaliser refuses are left out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            text, _, labels = line.rstrip("\n").partition("\t")
            try:
                yield Labelled(normalize(text).text, tuple(labels.split(",")))
            except InvalidInput:
                continue


def acted(path: Path) -> Iterator[Labelled]:
    """Rows of a `{"text", "acts"}` file, the labels being the acts; texts the normaliser refuses are left out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            try:
                yield Labelled(normalize(record["text"]).text, tuple(record["acts"]))
            except InvalidInput:
                continue


def tagged(path: Path) -> Iterator[Tagged]:
    """Rows of a `{"tokens", "tags"}` file. The phrase is the normalised tokens joined by blanks, so spans stay exact."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            try:
                yield _join(record["tokens"], record["tags"])
            except InvalidInput:
                continue


def _join(tokens: list[str], tags: list[str]) -> Tagged:
    phrase = ""
    spans: list[tuple[str, int, int]] = []
    for token, tag in zip(tokens, tags, strict=True):
        word = normalize(f"x {token}").text[2:]  # beside a word, because punctuation alone is refused
        if not word:  # nothing but invisible characters
            continue
        phrase += " " * bool(phrase)
        start, end = len(phrase), len(phrase) + len(word)
        phrase += word
        if tag.startswith("I-") and spans and spans[-1][0] == tag[2:] and spans[-1][2] == start - 1:
            spans[-1] = (tag[2:], spans[-1][1], end)
        elif tag != "O":
            spans.append((tag[2:], start, end))
    normalize(phrase)  # raises where the whole is too long
    return Tagged(phrase, tuple(spans))
