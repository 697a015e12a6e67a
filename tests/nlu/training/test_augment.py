"""nlu.training.augment: equal generators give equal noise, at the rate that was asked for, never out of its script or empty."""

from __future__ import annotations

import unicodedata
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.normalizer import normalize
from nlu.training import augment
from nlu.training.augment import KINDS, Augmenter, Edit, noisy
from nlu.training.config import Augment, Noise

ENGLISH = (
    "turn on the lights in the kitchen please",
    "what's the weather going to be like in new york at 7",
    "remind me to call my mother tomorrow morning",
    "Play some JAZZ, would you?",
)
RUSSIAN = (
    "включи пожалуйста свет на кухне в 7 часов",
    "Какая завтра погода в Москве, расскажи!",
    "напомни мне позвонить маме тоже",
    "поставь будильник на двадцать пять минут",
    "ёлка съезд ЩЁТКА вьюга",
)
NEAR = augment.near_words(
    word for text in (*ENGLISH, *RUSSIAN, "light lite right ton свят маме мамы") for word in text.split()
)
LOUD = Augment(
    keyboard=Noise(probability=0.5, rate=0.3),
    ocr=Noise(probability=0.5, rate=0.3),
    recogniser=Noise(probability=0.5, rate=0.3),
    adversarial=Noise(probability=0.5, rate=0.5),
    misspelling=Noise(probability=0.5, rate=0.5),
    misspellings=("en_misspellings",),
)
ERRORS = augment.errors_of([("kichen", "kitchen"), ("tommorow", "tomorrow"), ("a b", "ab")])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def within(count: int, trials: int, chance: float) -> bool:
    """Inside four standard deviations of a binomial."""
    return abs(count - trials * chance) <= 4 * sqrt(trials * chance * (1 - chance)) + 1e-9


# --- all kinds


@pytest.mark.parametrize("kind", KINDS)
def test_augment_equal_generators_give_equal_noise(kind: str) -> None:
    def once(seed: int) -> list[str]:
        generator = rng(seed)
        return [
            augment.make_noise(text, kind, 0.5, generator, near=NEAR, errors=ERRORS)
            for text in (*ENGLISH, *RUSSIAN) * 3
        ]

    assert once(1) == once(1)
    assert once(1) != once(2)


@pytest.mark.parametrize("kind", KINDS)
def test_augment_rate_zero_changes_no_word(kind: str) -> None:
    for text in (*ENGLISH, *RUSSIAN):
        changed = augment.make_noise(text, kind, 0.0, rng(), near=NEAR, errors=ERRORS)
        assert changed == (augment.misheard(text, 0.0, rng()) if kind == "recogniser" else text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_augment_russian_stays_cyrillic_and_english_latin(kind: str, rate: float) -> None:
    for text, script in [*((text, "LATIN") for text in ENGLISH), *((text, "CYRILLIC") for text in RUSSIAN)]:
        for seed in range(20):
            changed = augment.make_noise(text, kind, rate, rng(seed), near=NEAR, errors=ERRORS)
            letters = [character for character in changed if character.isalpha()]
            assert all(unicodedata.name(letter).startswith(script) for letter in letters), changed


texts = st.text(st.sampled_from("aZя Ё7'’.,!?👍漢é\u0301 \t"), max_size=12) | st.text(max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts, st.sampled_from(KINDS), st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_augment_never_leaves_nothing(text: str, kind: str, rate: float, seed: int) -> None:
    try:
        normalize(text)
    except ValueError:
        return  # no phrase to begin with
    changed = augment.make_noise(text, kind, rate, rng(seed), near=NEAR, errors=ERRORS)
    assert any(c.isalnum() or unicodedata.category(c)[0] == "S" for c in changed)


def test_augment_unknown_kind_brings_the_known() -> None:
    with pytest.raises(
        ValueError, match="expected one of misspelling, adversarial, recogniser, ocr, keyboard"
    ):
        augment.make_noise("text", "typo", 0.1, rng())


# --- characters


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_augment_typos_hit_that_share_of_characters(rate: float) -> None:
    text = "thequickbrownfoxjumpsoverthelazydogмойдядясамыхчестныхправил" * 40
    changed = augment.typos(text, rate, rng(), edits=(Edit.NEIGHBOUR,))
    assert len(changed) == len(text)
    assert within(sum(a != b for a, b in zip(text, changed, strict=True)), len(text), rate)
    dropped = augment.typos(text, rate, rng(), edits=(Edit.DROP,))
    assert within(len(text) - len(dropped), len(text), rate)
    for edit in (Edit.INSERT, Edit.DOUBLE):
        assert within(len(augment.typos(text, rate, rng(), edits=(edit,))) - len(text), len(text), rate)


def test_augment_typos_use_every_edit_alike() -> None:
    text = "ab" * 5000
    changed = augment.typos(text, 0.1, rng())
    # drops and insertions or doublings: one shortens, two lengthen, each a fifth of a tenth
    assert abs((len(changed) - len(text)) - len(text) * 0.1 / 5) <= 4 * sqrt(len(text) * 0.06)


def test_augment_typos_leave_blanks_and_foreign_letters_in_place() -> None:
    assert augment.typos("а б в", 1.0, rng(), edits=(Edit.NEIGHBOUR,)).count(" ") == 2
    assert augment.typos("漢字", 1.0, rng(), edits=(Edit.NEIGHBOUR,)) == "漢漢字字"


def test_augment_swap_moves_both_and_hits_no_blank() -> None:
    assert augment.typos("abcd", 1.0, rng(), edits=(Edit.SWAP,)) == "badc"
    assert augment.typos("ab c", 1.0, rng(), edits=(Edit.SWAP,)) == "ba cc"  # nothing to swap with: doubled


@pytest.mark.parametrize(("key", "beside"), [("g", "tfhvb"), ("п", "еарми"), ("5", "46"), ("ё", "ей")])
def test_augment_keys_stand_beside_each_other(key: str, beside: str) -> None:
    assert set(augment.KEYS[key]) == set(beside)


def test_augment_keyboards_are_mutual_and_keep_case() -> None:
    for key, others in augment.KEYS.items():
        assert key not in others
        assert key == "ё" or all(key in augment.KEYS[other] for other in others if other != "ё")
    assert augment.typos("Щ", 1.0, rng(), edits=(Edit.NEIGHBOUR,)) in "ШЗД"


def test_augment_look_alikes_hit_that_share_of_what_has_one() -> None:
    text = "aceghnosuxаевнорсу" * 200
    changed = augment.look_alikes(text, 0.1, rng(), shapes={k: ("#",) for k in augment.LOOK_ALIKES})
    assert within(changed.count("#"), len(text), 0.1)
    assert all(shape not in others for shape, others in augment.LOOK_ALIKES.items())


# --- words


def test_augment_recogniser_writes_no_case_and_no_punctuation() -> None:
    assert augment.misheard("Well, WHAT'S up — 'Tom'?", 0.0, rng()) == "well what's up tom"
    assert augment.misheard("«Да», — сказал он.", 0.0, rng()) == "да сказал он"
    assert augment.misheard("हिन्दी में।", 0.0, rng()) == "हिन्दी में"  # marks that belong to letters stay


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("their", {"there", "they're"}),
        ("вместе", {"в месте", "вм есте", "вме сте", "вмес те"}),
        ("7", {"seven"}),
        ("семь", {"7", "всем"}),
        ("kitchen", {"ki tchen", "kit chen", "kitc hen", "kitch en"}),
        ("at home", {"athome", "home"}),
    ],
)
def test_augment_recogniser_errors(text: str, expected: set[str]) -> None:
    heard = {augment.misheard(text, 1.0, rng(seed)) for seed in range(200)}
    assert heard - {text} == expected


def test_augment_recogniser_hits_that_share_of_words() -> None:
    alone = [augment.misheard("their", 0.2, rng(seed), alike={"their": ("x1",)}) for seed in range(2000)]
    assert within(alone.count("x1"), 2000, 0.2)


def test_augment_recogniser_hears_near_words_where_it_knows_no_homophone() -> None:
    assert "kent" not in augment.SOUND_ALIKES
    heard = {augment.misheard("kent", 1.0, rng(seed), near={"kent": ("bent",)}) for seed in range(20)}
    assert heard == {"bent"}


@pytest.mark.parametrize(
    ("number", "english", "russian"),
    [
        (0, "zero", "ноль"),
        (14, "fourteen", "четырнадцать"),
        (40, "forty", "сорок"),
        (21, "twenty one", "двадцать один"),
        (300, "three hundred", "триста"),
        (1001, "one thousand one", "тысяча один"),
        (2045, "two thousand forty five", "две тысячи сорок пять"),
        (9999, "nine thousand nine hundred ninety nine", "девять тысяч девятьсот девяносто девять"),
    ],
)
def test_augment_numbers_in_words(number: int, english: str, russian: str) -> None:
    assert augment.in_words(number, "en") == english
    assert augment.in_words(number, "ru") == russian


def test_augment_numbers_beyond_are_refused() -> None:
    with pytest.raises(ValueError, match="found 10000"):
        augment.in_words(10000, "en")


def test_augment_homophones_are_mutual_and_of_one_script() -> None:
    for word, others in augment.SOUND_ALIKES.items():
        assert word not in others
        assert len({character in "ё" or "а" <= character <= "я" for o in (word, *others) for character in o if character.isalpha()}) == 1  # fmt: skip
        assert all(word in augment.SOUND_ALIKES[other] for other in others)


def test_augment_replaced_hits_that_share_of_known_words() -> None:
    text = "Light on " * 2000
    changed = augment.replaced(text, 0.3, rng(), {"light": ("right",)})
    assert within(changed.count("Right"), 2000, 0.3)  # in the case it was
    assert changed.count("on") == 2000


def test_augment_near_words_are_one_edit_away() -> None:
    words = ["form", "from", "farm", "forms", "warm", "дома", "домам", "том", "cat", "cats"]
    near = augment.near_words(words)
    assert near == {
        "form": ("farm", "forms", "from"),
        "from": ("form",),
        "farm": ("form", "warm"),
        "forms": ("form",),
        "warm": ("farm",),
        "дома": ("домам",),
        "домам": ("дома",),
    }


words = st.text(st.sampled_from("abc"), min_size=4, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(words, max_size=12, unique=True))
def test_augment_near_words_equal_a_brute_force_search(found: list[str]) -> None:
    expected = {word: tuple(sorted(o for o in found if one_edit_naive(word, o))) for word in found}
    assert augment.near_words(found) == {word: others for word, others in expected.items() if others}


def one_edit_naive(a: str, b: str) -> bool:
    edits = {a[:i] + a[i + 1 :] for i in range(len(a))}
    edits |= {a[:i] + c + a[i + 1 :] for i in range(len(a)) for c in "abc"}
    edits |= {a[:i] + c + a[i:] for i in range(len(a) + 1) for c in "abc"}
    edits |= {a[:i] + a[i + 1] + a[i] + a[i + 2 :] for i in range(len(a) - 1)}
    return b != a and b in edits


def test_augment_vocabulary_is_by_frequency_then_alphabet() -> None:
    assert augment.vocabulary(["The cat", "the dog", "да"], 3) == ("the", "cat", "dog")


def test_augment_errors_of_keeps_single_words() -> None:
    assert ERRORS == {"kitchen": ("kichen",), "tomorrow": ("tommorow",)}


# --- together


def test_augment_apply_draws_each_kind_by_its_probability() -> None:
    quiet = Augmenter(Augment(ocr=Noise(probability=0.25, rate=1.0)))
    generator = rng()
    changed = sum(quiet.apply("lll", generator) != "lll" for _ in range(4000))
    assert within(changed, 4000, 0.25)


def test_augment_apply_is_deterministic_and_off_by_default() -> None:
    loud = Augmenter(LOUD, near=NEAR, errors=ERRORS)
    one, other = rng(5), rng(5)
    assert [loud.apply(text, one) for text in ENGLISH * 5] == [
        loud.apply(text, other) for text in ENGLISH * 5
    ]
    generator = rng(5)
    assert Augmenter(Augment()).apply(ENGLISH[0], generator) == ENGLISH[0]
    assert generator.random() == rng(5).random()  # and draws nothing


@pytest.mark.parametrize(
    ("tables", "said"), [({"errors": ERRORS}, "augment.adversarial"), ({"near": NEAR}, "augment.misspelling")]
)
def test_augment_wants_the_words_its_config_needs(tables: dict[str, augment.Table], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Augmenter(LOUD, **tables)


def test_augment_noisy_is_fixed_by_seed_and_text_alone() -> None:
    together = noisy(ENGLISH, "keyboard", 0.1, 3)
    assert noisy(ENGLISH[::-1], "keyboard", 0.1, 3) == together[::-1]
    assert noisy(ENGLISH[2:3], "keyboard", 0.1, 3) == together[2:3]
    assert noisy(ENGLISH, "keyboard", 0.1, 4) != together
    assert together != ENGLISH


PINNED = ("turn onb tee lightz", "аключ свет на кухне")


def test_augment_noisy_never_changes_between_releases() -> None:
    """Pinned: numbers under noise are compared over months."""
    assert noisy(("turn on the lights", "включи свет на кухне"), "keyboard", 0.2, 0) == PINNED
