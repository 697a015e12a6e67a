"""One typing mistake a phrase, the same every time: what a head loses to it is a slice of its report."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

SAMPLE = 500  # phrases, which is enough to see three points of accuracy


def sample(phrases: Sequence[str]) -> list[int]:
    """Which phrases are mistyped: at most SAMPLE, chosen by their text, so that other rows do not change the choice."""
    order = sorted(range(len(phrases)), key=lambda i: hashlib.sha256(phrases[i].encode()).digest())
    return sorted(order[:SAMPLE])


def mistyped(phrases: Sequence[str]) -> list[str]:
    """Each phrase with two neighbouring letters swapped, one left out or one doubled; words of under four letters are safe."""
    return [_mistyped(phrase) for phrase in phrases]


def _mistyped(phrase: str) -> str:
    draw = random.Random(hashlib.sha256(phrase.encode()).digest())
    words = phrase.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return phrase
    chosen = draw.choice(long)
    word = words[chosen]
    at = draw.randrange(1, len(word) - 1)
    mistakes = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )
    words[chosen] = draw.choice([each for each in mistakes if each != word])
    return " ".join(words)
