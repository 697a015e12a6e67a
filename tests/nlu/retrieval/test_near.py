"""nlu.retrieval.near: what may be merged, and above all what may not."""

from __future__ import annotations

import numpy as np
import pytest

from nlu.normalizer import normalize
from nlu.retrieval import near
from nlu.retrieval.near import COSINE, alike, pairs, wording


def phrase(text: str) -> str:
    return normalize(text).text


@pytest.mark.parametrize(
    ("one", "other"),
    [("Hello, Anna!", "hello anna"), ("Ну  что ж...", "ну, что ж"), ("«Да»", "да"), ("well-known", "well known")],
)  # fmt: skip
def test_near_wording_looks_over_case_punctuation_and_spaces(one: str, other: str) -> None:
    assert wording(phrase(one)) == wording(phrase(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"), ("it is 5", "it is 50"), ("it is 5", "it is -5"), ("1.5 litres", "15 litres"),
        ("1.5 litres", "1 5 litres"), ("5 off", "5% off"), ("at 7:30", "at 7 30"), ("i like c", "i like c+"),
        ("да", "да 😊"), ("we are here", "were here"), ("भला", "भली"), ("ещё", "ёще"),
    ],
)  # fmt: skip
def test_near_wording_differs_where_words_or_numbers_do(one: str, other: str) -> None:
    assert wording(phrase(one)) != wording(phrase(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("i will be glad to see you there", "i will be very glad to see you there"),
        ("я ещё вернусь к тебе завтра", "ну я еще вернусь к тебе завтра"),
        ("take 5 apples from the basket", "take 5 apples from the basket please"),
        ("good night", "Good night."),
    ],
)
def test_near_alike_lets_a_word_be_left_out(one: str, other: str) -> None:
    assert alike(phrase(one), phrase(other)) and alike(phrase(other), phrase(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("take 5 apples from the big basket", "take 50 apples from the big basket"),
        ("take apples from the big old basket", "take 5 apples from the big old basket"),
        ("take apples from the big old basket", "take five apples from the big old basket"),
        ("i do want to see you there today", "i do not want to see you there today"),
        ("i do want to see you there today", "i don't want to see you there today"),
        ("я хочу видеть тебя здесь завтра утром", "я не хочу видеть тебя здесь завтра утром"),
        ("у меня есть время и для тебя", "у меня нет есть время и для тебя"),
        ("we meet on monday near the old bridge", "we meet on tuesday near the old bridge"),
        ("the dog bit the man on the street", "the man bit the dog on the street"),
        ("good", "good night"),
        ("it is so warm in the kitchen now", "it is so warm in the kitchen now 😡"),
    ],
)
def test_near_alike_never_merges_what_says_something_else(one: str, other: str) -> None:
    assert not alike(phrase(one), phrase(other)) and not alike(phrase(other), phrase(one))


def test_near_pairs_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((300, 8)).astype(np.float32)
    vectors[200:220] = vectors[:20] + 0.05 * rng.standard_normal((20, 8)).astype(np.float32)
    vectors[250] = vectors[7]  # the very same
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    # Within the rounding of float16 either answer is right.
    sure = {(i, j) for i in range(300) for j in range(i) if cosines[i, j] >= COSINE + 1e-3}
    possible = {(i, j) for i in range(300) for j in range(i) if cosines[i, j] >= COSINE - 1e-3}
    steps: list[tuple[int, int]] = []
    found = pairs(
        np.split(vectors, [1, 100, 290]), 8, progress=lambda done, total: steps.append((done, total))
    )
    assert sure <= {(pair.later, pair.earlier) for pair in found} <= possible and len(sure) > 10
    assert (250, 7) in {(pair.later, pair.earlier) for pair in found}
    assert [pair.later for pair in found] == sorted(pair.later for pair in found)
    for one, after in zip(found, found[1:], strict=False):
        assert one.later != after.later or one.cosine >= after.cosine
    assert steps[-1] == (299, 299)


def test_near_pairs_looks_at_few_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "NEIGHBOURS", 3)
    crowd = np.ones((20, 4), np.float32) + np.arange(20, dtype=np.float32)[:, None] * [[0.003, 0, 0, 0]]
    counts = np.bincount([pair.later for pair in pairs([crowd.astype(np.float32)], 4)], minlength=20)
    assert counts.max() <= 3 and counts.sum() > 0
    assert pairs([], 4) == []
