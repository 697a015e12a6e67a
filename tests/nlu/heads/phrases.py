"""Phrases that a vectorizer of letters can tell apart: the words of each label are spelt with letters of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LETTERS = {"lamp": "abcd", "music": "klmn", "погода": "жзий"}
STRANGE = "wxyz"  # of phrases that belong to no label
NAMES = "opqr"

Line = dict[str, Any]


def words(letters: str, rng: random.Random, count: int) -> list[str]:
    """Words of three to six of the letters."""
    return ["".join(rng.choices(letters, k=rng.randint(3, 6))) for _ in range(count)]


def said(letters: str, count: int, seed: int) -> list[str]:
    """So many different phrases of one to four words."""
    rng = random.Random(f"{letters}{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(words(letters, rng, rng.randint(1, 4)))] = None
    return list(found)


def labelled(count: int, seed: int, labels: Iterable[str] = LETTERS) -> list[Line]:
    """So many phrases of each label, label by label."""
    return [{"text": text, "label": label} for label in labels for text in said(LETTERS[label], count, seed)]


def strange(count: int, seed: int) -> list[Line]:
    """Phrases that belong to no label."""
    return [{"text": text, "label": "oos"} for text in said(STRANGE, count, seed)]


def several(count: int, seed: int) -> list[Line]:
    """Phrases of no label, of one, or of two, in the same proportion."""
    rng = random.Random(seed)
    named = sorted(LETTERS)
    lines = []
    for i in range(count):
        labels = rng.sample(named, i % 3)
        spelt = [word for label in labels for word in words(LETTERS[label], rng, 2)] or words(STRANGE, rng, 2)
        lines.append({"text": " ".join(spelt), "labels": labels})
    return lines


def answered(count: int, seed: int) -> list[Line]:
    """A "yes" that means what the assistant asked about just before."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        label = ("lamp", "music")[i % 2]
        asked = " ".join(words(LETTERS[label], rng, 3))
        lines.append(
            {"text": rng.choice(("yes", "yes do", "ok yes")), "label": label, "context": [{"role": "assistant", "text": asked}]}
        )  # fmt: skip
    return lines


def marked(count: int, seed: int) -> list[Line]:
    """Plain words around a name, a time or both, with their spans."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        text, spans = words(LETTERS["lamp"], rng, 1)[0], []
        for label, letters in (("name", NAMES), ("time", STRANGE))[i % 2 : 1 + max(1, i % 3)]:
            spans.append({"label": label, "start": len(text) + 1, "end": 0})
            text += " " + " ".join(words(letters, rng, rng.randint(1, 2)))
            spans[-1]["end"] = len(text)
            text += " " + words(LETTERS["lamp"], rng, 1)[0]
        lines.append({"text": text, "spans": spans})
    return lines


def spelt(count: int, seed: int) -> list[Line]:
    """Written sentences: names are capitalised, and what ends in a word of time is a question."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        plain, name = words(LETTERS["lamp"], rng, 2), words(NAMES, rng, 1)[0].capitalize()
        end = words(STRANGE, rng, 1)[0] + "?" if i % 2 else words(LETTERS["music"], rng, 1)[0] + "."
        lines.append({"text": " ".join([*plain, name, end])})
    return lines


def written(path: Path, lines: Sequence[Line]) -> Path:
    """The lines as JSONL."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
