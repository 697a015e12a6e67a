"""nlu.heads.noise: one mistake a phrase, always the same one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nlu.heads import noise
from tests.nlu.heads import phrases

PHRASES = st.lists(
    st.text("abcé ёжз0'-", min_size=1, max_size=25).map(lambda text: " ".join(text.split())), max_size=5
)


def mistakes(word: str) -> set[str]:
    """Everything one swap, one loss or one doubling inside a word can make of it."""
    inside = range(1, len(word) - 1)
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inside}
    return (
        swapped | {word[:i] + word[i + 1 :] for i in inside} | {word[:i] + word[i] + word[i:] for i in inside}
    )


@given(PHRASES)
def test_noise_is_one_mistake_in_one_long_word(given: list[str]) -> None:
    for phrase, typed in zip(given, noise.mistyped(given), strict=True):
        before, after = phrase.split(" "), typed.split(" ")
        long = [word for word in before if len(word) >= 4 and word.isalpha()]
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert len(changed) == (1 if long else 0)
        for old, new in changed:
            assert old in long and new in mistakes(old)
            assert new[0] == old[0]


@given(PHRASES)
def test_noise_depends_on_the_phrase_alone(given: list[str]) -> None:
    assert noise.mistyped(given) == [noise.mistyped([phrase])[0] for phrase in given]


def test_noise_swaps_no_letter_with_itself() -> None:
    same = ["o" * length for length in range(4, 40)]
    assert all(phrase != typed for phrase, typed in zip(same, noise.mistyped(same), strict=True))


def test_noise_makes_every_kind_of_mistake() -> None:
    typed = noise.mistyped([f"word{'abcdefghijklmnopqrstuvwxyz'[i % 26]}{'xyz'[i // 26]}" for i in range(78)])
    lengths = {len(word) for word in typed}
    assert lengths == {5, 6, 7}  # one letter lost, two swapped, one doubled


def test_noise_sample_is_small_and_does_not_depend_on_order() -> None:
    given = phrases.said("abcdef", noise.SAMPLE + 50, 0)
    chosen = {given[i] for i in noise.sample(given)}
    assert len(chosen) == noise.SAMPLE
    turned = given[::-1]
    assert {turned[i] for i in noise.sample(turned)} == chosen
    assert noise.sample(given[:3]) == [0, 1, 2]
    assert noise.sample([]) == []
