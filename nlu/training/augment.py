"""Noise as people, scanners and speech recognisers make it, in English and Russian: for training and for fixed tests.

Every function draws from the numpy Generator it is given and from nothing else, so equal generators give equal noise.
What comes out is never without a word and stays in the script it came in; text in other scripts is only swapped, dropped
and doubled.

Why not augmentex (1.3.1, MIT, by the authors of Martynov et al., Dialogue 2023): it offers keyboard typos, character
confusions and word errors counted from what people typed, for both languages. But it draws from the process-wide `random`
and `numpy.random`, so a stream of batches could not be resumed or repeated; it edits 1 to 5 places of a text whatever
its length, so "10 % of characters" cannot be said; deletion may leave nothing; it has no recogniser or look-alike
errors; it loads up to 70 MB of JSON per language and needs python-Levenshtein to be imported; and its Russian counts
come from KartaSlov's list, which is CC BY-NC-SA 4.0 and so not for weights that ship. The keyboards and lists below are
ours; errors people made come from a licensed set instead (`misspelling`, table built from `en_misspellings`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.random import Generator

from nlu.training.config import Augment, Noise

Table = Mapping[str, tuple[str, ...]]  # a word (or character) in lower case -> what may stand in its place


class Edit(Enum):
    """What can happen to one character."""

    NEIGHBOUR = "neighbour"  # the key next to it
    SWAP = "swap"  # with the next character
    DROP = "drop"
    DOUBLE = "double"
    INSERT = "insert"  # the key next to it as well


EDITS = tuple(Edit)

# --- keyboards, as they stand on the desk; a row's shift is in keys

_QWERTY = (("1234567890", 0.0), ("qwertyuiop", 0.5), ("asdfghjkl", 0.75), ("zxcvbnm", 1.25))
_JCUKEN = (("1234567890", 0.0), ("йцукенгшщзхъ", 0.5), ("фывапролджэ", 0.75), ("ячсмитьбю", 1.25))


def _keys_beside(rows: Sequence[tuple[str, float]]) -> dict[str, tuple[str, ...]]:
    """Keys at most 1.2 key widths away; letters beside letters, digits beside digits: a phrase keeps its script."""
    places = {key: (shift + i, row) for row, (keys, shift) in enumerate(rows) for i, key in enumerate(keys)}
    beside: dict[str, tuple[str, ...]] = {}
    for key, (x, y) in places.items():
        beside[key] = tuple(
            other
            for other, (u, v) in places.items()
            if other != key and other.isdigit() == key.isdigit() and (x - u) ** 2 + (y - v) ** 2 <= 1.2**2
        )
    return beside


# ё sits beyond the digits, where nobody hits it by mistake; it is written е, and missed for й
KEYS: Table = {**_keys_beside(_QWERTY), **_keys_beside(_JCUKEN), "ё": ("е", "й")}

# --- shapes that scanners take for each other; digits become digits, because a digit stands in texts of any script

LOOK_ALIKES: Table = {
    "a": ("o", "e"), "b": ("h", "6"), "c": ("e", "o"), "d": ("cl", "o"), "e": ("c", "o"), "f": ("t",), "g": ("q", "9"),
    "h": ("b", "n"), "i": ("l", "1", "j"), "j": ("i",), "k": ("lc", "h"), "l": ("1", "i", "t"), "m": ("rn", "nn"),
    "n": ("ri", "u", "r"), "o": ("0", "c"), "p": ("q",), "q": ("g", "9"), "r": ("n",), "s": ("5",), "t": ("f", "l"),
    "u": ("v", "ii"), "v": ("u", "y"), "w": ("vv",), "x": ("k",), "y": ("v",), "z": ("2",),
    "0": ("8", "6"), "1": ("7", "4"), "2": ("7",), "3": ("8",), "4": ("9", "1"), "5": ("6",), "6": ("8", "5"),
    "7": ("1",), "8": ("3", "0"), "9": ("4",),
    "а": ("о", "я"), "б": ("6", "в"), "в": ("б", "8"), "г": ("т",), "д": ("л",), "е": ("с", "ё"), "ё": ("е",),
    "ж": ("х", "к"), "з": ("э", "3"), "и": ("н", "п", "й"), "й": ("и",), "к": ("н", "х"), "л": ("п", "д"), "м": ("н", "и"),
    "н": ("и", "п"), "о": ("0", "с"), "п": ("н", "л"), "р": ("п", "ф"), "с": ("о", "е"), "т": ("г", "п"), "у": ("ч",),
    "ф": ("ср", "р"), "х": ("ж", "к"), "ц": ("и", "щ"), "ч": ("4", "у"), "ш": ("щ",), "щ": ("ш", "ц"), "ъ": ("ь", "б"),
    "ы": ("ьг", "м"), "ь": ("ъ", "б"), "э": ("з",), "ю": ("го", "ко"), "я": ("а", "л"),
}  # fmt: skip

# --- words that sound alike; written for this project

_HOMOPHONES_EN = """
to two too|for four fore|their there they're|your you're|its it's|hear here|know no|new knew|right write rite|by buy bye
weather whether|meet meat|week weak|see sea|son sun|one won|eight ate|hour our|flower flour|mail male|sale sail|tail tale
pair pear pare|bare bear|fair fare|hair hare|stair stare|where wear ware|which witch|wait weight|way weigh|wood would
hole whole|road rode|root route|peace piece|plain plane|principal principle|read red|reed read|scene seen|sell cell
sent cent scent|steal steel|some sum|threw through|thrown throne|time thyme|toe tow|vain vein|waist waste|warn worn
break brake|board bored|blue blew|been bin|be bee|cereal serial|check cheque|course coarse|dear deer|die dye|do due dew
fourth forth|great grate|heal heel|heard herd|him hymn|hi high|in inn|knight night|knot not|made maid|main mane
morning mourning|none nun|pain pane|passed past|patience patients|pause paws|poor pour|pray prey|rain reign|raise rays
ring wring|role roll|sight site cite|stake steak|than then|tide tied|wine whine|are our|an and|has as|of off|ask asked
light lights|call called|turn turned|play played|want wanted|can can't|were we're|will we'll|heal he'll|aisle i'll isle
allowed aloud|alter altar|band banned|base bass|beat beet|berry bury|billed build|cash cache|chews choose|dessert desert
effect affect|except accept|find fined|guest guessed|higher hire|idle idol|jeans genes|key quay|lead led|loan lone|mind mined
maybe may_be|everyday every_day|anyone any_one|into in_to|alright all_right|awhile a_while|already all_ready|cannot can_not
mist missed|muscle mussel|pole poll|real reel|roof ruth|sauce source|seam seem|sweet suite|sword soared|tense tents|wrap rap
"""
_HOMOPHONES_RU = """
кот код|лук луг|плот плод|рог рок|род рот|прут пруд|бал балл|столб столп|стог сток|мок мог|лес лез|груз груздь|дог док
грипп гриб|порок порог|труд трут|молод молот|вперёд впереди|компания кампания|предать придать|пребывать прибывать
примерить примирить|посвятить посветить|разредить разрядить|отварить отворить|умалять умолять|полоскать поласкать
съесть съезд|туш тушь|серп серб|кровь кров|меч мяч|дочь точь|бак бок|вол вал|зуб суп|игра икра|коза коса|лиса леса
мыл мил|пыл пил|роза роса|слива сливы|тень день|угол уголь|шест жест|этаж этажи|везти вести|обе оба|частное честное
тоже то_же|также так_же|чтобы что_бы|зато за_то|потому по_тому|итак и_так|причём при_чём|совсем со_всем|вовсе во_все
зачем за_чем|насчёт на_счёт|вместе в_месте|сначала с_начала|навстречу на_встречу|погода по_года|почему по_чему
поэтому по_этому|отсюда от_сюда|наверно на_верно|вокруг в_округ|вдали в_дали|наутро на_утро|никого не_кого|нечем ни_чем
пять опять|семь всем|десять девять|двенадцать девятнадцать|пятнадцать пятьдесят|шестнадцать шестьдесят|сорок срок
тринадцать тридцать|завтра завтрак|какая какой|какое какие|мне мной|тебя тебе|есть ест|уже уж|ещё ищу|мои мой|твои твой
свои свой|новая новое|включи включить|выключи выключить|открой открою|закрой закрою|поставь поставить|найди найти
расскажи расскажу|покажи покажу|скажи скажу|позвони позвонить|напомни напомнить|лед лёд лет|весной весна|зимой зима
летом лето|музыка музыку|песня песню|фильм фильмы|будильник будильники|таймер таймеры|свет цвет|окно окна|дверь двери
кухня кухне|комната комнату|сделай сделаю|громче громко|тише тихо|сейчас час|который которая|сегодня сегодняшний
"""

_LITTLE = frozenset(
    """a an the to of in on at and or is are am be it i my me you do for with please um uh so just that
    и в во на с со к ко у о об от до за из по не ни а но же бы ли что как это вот ну я мы вы ты он она мне""".split()
)  # what recognisers swallow first


def _alike(groups: str) -> dict[str, tuple[str, ...]]:
    """Groups parted by bars or line ends, words by blanks; `_` is a blank inside what is heard."""
    table: dict[str, tuple[str, ...]] = {}
    for group in re.split(r"[|\n]", groups.strip()):
        words = [word.replace("_", " ") for word in group.split()]
        for word in words:
            others = (*table.get(word, ()), *(other for other in words if other != word))
            table[word] = tuple(dict.fromkeys(others))
    return table


SOUND_ALIKES: Table = {**_alike(_HOMOPHONES_EN), **_alike(_HOMOPHONES_RU)}

# --- numbers

_ONES = {
    "en": """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split(),
    "ru": """ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать
    четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать""".split(),
}
_TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "ru": "двадцать тридцать сорок пятьдесят шестьдесят семьдесят восемьдесят девяносто".split(),
}
_HUNDREDS = "сто двести триста четыреста пятьсот шестьсот семьсот восемьсот девятьсот".split()
_LARGEST = 9999


def in_words(number: int, language: str) -> str:
    """0 to 9999 as they are said, in `en` or in Russian nominative (`ru`)."""
    if not 0 <= number <= _LARGEST:
        raise ValueError(f"found {number}, expected 0 to {_LARGEST}; leave larger numbers as digits")
    thousands, rest = divmod(number, 1000)
    hundreds, rest = divmod(rest, 100)
    words: list[str] = []
    if thousands:
        words += _thousands(thousands, language)
    if hundreds:
        words += [_HUNDREDS[hundreds - 1]] if language == "ru" else [_ONES["en"][hundreds], "hundred"]
    if rest >= 20:
        words.append(_TENS[language][rest // 10 - 2])
        rest %= 10
        words += [_ONES[language][rest]] if rest else []
    elif rest or not words:
        words.append(_ONES[language][rest])
    return " ".join(words)


def _thousands(count: int, language: str) -> list[str]:
    if language == "en":
        return [_ONES["en"][count], "thousand"]
    if count == 1:
        return ["тысяча"]
    return ["две" if count == 2 else _ONES["ru"][count], "тысячи" if count < 5 else "тысяч"]


_AS_DIGITS = {
    in_words(number, language): str(number)
    for language in ("en", "ru")
    for number in (*range(2, 21), *range(30, 101, 10))  # "one" and "один" are mostly no numbers
}

# --- characters


def typos(
    text: str, rate: float, rng: Generator, *, edits: Sequence[Edit] = EDITS, keys: Table = KEYS
) -> str:
    """Each character that is no blank is hit with probability `rate`, by one of `edits`, all as likely.

    What the chosen edit cannot do to a character (a neighbour of `é`, a swap at the end) becomes a doubling, so the
    rate stays true. Case is kept.
    """
    hits = rng.random(len(text)) < rate
    if not hits.any():
        return text
    chosen = rng.integers(len(edits), size=len(text))
    drawn = rng.random(len(text))
    out: list[str] = []
    taken = False  # this character was moved by the swap before it
    for i, character in enumerate(text):
        if taken:
            taken = False
            continue
        if not hits[i] or character.isspace():
            out.append(character)
            continue
        following = text[i + 1 : i + 2]
        edit = edits[chosen[i]]
        taken = edit is Edit.SWAP and bool(following.strip()) and following != character
        out.append(following + character if taken else _edited(character, edit, float(drawn[i]), keys))
    return _or(text, "".join(out))


def _edited(character: str, edit: Edit, draw: float, keys: Table) -> str:
    beside = keys.get(character.lower())
    if edit is Edit.DROP:
        return ""
    if beside and edit in (Edit.NEIGHBOUR, Edit.INSERT):
        other = _like(character, _pick(beside, draw))
        return other if edit is Edit.NEIGHBOUR else character + other
    return character * 2


def look_alikes(text: str, rate: float, rng: Generator, *, shapes: Table = LOOK_ALIKES) -> str:
    """Each character that has a look-alike becomes one with probability `rate` (OCR errors)."""
    hits = rng.random(len(text)) < rate
    if not hits.any():
        return text
    drawn = rng.random(len(text))
    out = [
        _like(character, _pick(shapes.get(character.lower()) or (character,), float(drawn[i])))
        if hits[i]
        else character
        for i, character in enumerate(text)
    ]
    return _or(text, "".join(out))


# --- words

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_QUOTES = re.compile(r"(?<!\w)['’]|['’](?!\w)")


def replaced(text: str, rate: float, rng: Generator, table: Table) -> str:
    """Each word of the table becomes one of its alternatives with probability `rate`; words it has not are left."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        hit, draw = rng.random(2)  # always two, so that the table does not shift what later words draw
        alternatives = table.get(word.lower())
        return _like(word, _pick(alternatives, float(draw))) if alternatives and hit < rate else word

    return _or(text, _WORD.sub(other, text))


def misheard(
    text: str, rate: float, rng: Generator, *, alike: Table = SOUND_ALIKES, near: Table | None = None
) -> str:
    """What a speech recogniser makes of it: no case, no punctuation, and each word hit with probability `rate`.

    A hit word becomes one that sounds like it, a number in the other spelling, vanishes (little words alone), is cut in
    two (long ones) or grows together with the next, whichever of these can be done, all as likely. Recognisers mostly
    hear other words, so give `near` (of near_words) for those that have no homophone in our lists.
    """
    words = _unpunctuated(text.lower()).split()
    hits = rng.random(len(words)) < rate
    drawn = rng.random((len(words), 2))
    language = "ru" if _is_cyrillic(text) else "en"
    others = {word: alike.get(word) or (near or {}).get(word, ()) for word in words}
    out: list[str] = []
    joined = False
    for i, word in enumerate(words):
        said = word
        glue = ""
        if hits[i]:
            last = i + 1 == len(words)
            said, glue = _mistaken(word, others[word], language, drawn[i, 0], drawn[i, 1], last=last)
        if joined and out:
            out[-1] += said
        elif said:
            out.append(said)
        joined = bool(glue)
    return _or(text, " ".join(out))


def _unpunctuated(text: str) -> str:
    """Blanks for punctuation; apostrophes inside words stay, and so do marks that belong to letters."""
    heard = "".join(
        " " if unicodedata.category(character)[0] == "P" and character not in "'’" else character
        for character in text
    )
    return _QUOTES.sub(" ", heard)


def _mistaken(
    word: str, alike: Sequence[str], language: str, choice: float, draw: float, *, last: bool
) -> tuple[str, str]:
    """(what is heard, "+" where it grows together with the next word)."""
    options: list[tuple[str, str]] = []
    if alike:
        options.append((_pick(alike, draw), ""))
    if word.isdecimal() and len(word) <= 4 and word.isascii():
        options.append((in_words(int(word), language), ""))
    elif word in _AS_DIGITS:
        options.append((_AS_DIGITS[word], ""))
    if word in _LITTLE:
        options.append(("", ""))
    if len(word) >= 6 and word.isalpha():
        cut = 2 + int(draw * (len(word) - 3))  # two letters on either side at least
        options.append((f"{word[:cut]} {word[cut:]}", ""))
    if not last:
        options.append((word, "+"))
    return options[int(choice * len(options))] if options else (word, "")


# --- real words that are spelt nearly alike


def near_words(words: Iterable[str], *, shortest: int = 4) -> Table:
    """For each word the others at one edit (insertion, deletion, substitution, swap), of those with `shortest` letters.

    Words meet over what is left of them when one letter is taken out (SymSpell, Garbe 2012), so it takes about a second
    for 20,000 words. Attacks by such words: Pruthi et al., ACL 2019.
    """
    known = sorted({word for word in words if len(word) >= shortest and word.isalpha()})
    stubs: dict[str, list[str]] = {}
    for word in known:
        for stub in {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}:
            stubs.setdefault(stub, []).append(word)
    near: dict[str, set[str]] = {}
    for group in stubs.values():
        for word in group if len(group) > 1 else ():
            near.setdefault(word, set()).update(other for other in group if one_edit(word, other))
    return {word: tuple(sorted(others)) for word, others in near.items() if others}


def one_edit(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns a into b (and they differ)."""
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1 or a == b:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[i:] == b[i + 1 :]
    return a[i + 1 :] == b[i + 1 :] or (a[i : i + 2] == b[i : i + 2][::-1] and a[i + 2 :] == b[i + 2 :])


def errors_of(pairs: Iterable[tuple[str, str]]) -> Table:
    """Word -> its misspellings, from (misspelling, word) pairs; whatever is not one word for another is left out."""
    table: dict[str, dict[str, None]] = {}
    for error, word in pairs:
        if error != word and _WORD.fullmatch(error) and _WORD.fullmatch(word):
            table.setdefault(word.lower(), {})[error] = None
    return {word: tuple(errors) for word, errors in table.items()}


def vocabulary(phrases: Iterable[str], size: int) -> tuple[str, ...]:
    """The `size` most frequent words of some phrases, in lower case; ties in alphabetical order."""
    counts = Counter(word.lower() for phrase in phrases for word in _WORD.findall(phrase))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:size])


# --- together


@dataclass(frozen=True, slots=True)
class Augmenter:
    """The noise of a config's [augment]. `near` is for adversarial noise, `errors` (word -> misspellings) for its kind.

    Raises ValueError where the config wants a kind whose words are missing.
    """

    config: Augment
    near: Table = field(default_factory=dict)
    errors: Table = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, table, remedy in (
            ("adversarial", self.near, "pass near_words(vocabulary(phrases, size))"),
            ("misspelling", self.errors, "pass the table of a set such as en_misspellings"),
        ):
            if getattr(self.config, kind).probability and not table:
                raise ValueError(f"augment.{kind}: found no words, expected some; {remedy}")

    def apply(self, text: str, rng: Generator) -> str:
        """The text with each kind of noise put on it by its probability; words first, characters last."""
        for kind, noise in self._kinds():
            if noise.probability and rng.random() < noise.probability:
                text = make_noise(text, kind, noise.rate, rng, near=self.near, errors=self.errors)
        return text

    def _kinds(self) -> tuple[tuple[str, Noise], ...]:
        return tuple((kind, getattr(self.config, kind)) for kind in KINDS)


def make_noise(
    text: str,
    kind: str,
    rate: float,
    rng: Generator,
    *,
    near: Table | None = None,
    errors: Table | None = None,
) -> str:
    """One kind of noise at a rate, by its name in the config. Raises ValueError for an unknown kind."""
    noises: Mapping[str, Callable[[], str]] = {
        "misspelling": lambda: replaced(text, rate, rng, errors or {}),
        "adversarial": lambda: replaced(text, rate, rng, near or {}),
        "recogniser": lambda: misheard(text, rate, rng, near=near),
        "ocr": lambda: look_alikes(text, rate, rng),
        "keyboard": lambda: typos(text, rate, rng),
    }
    if kind not in noises:
        raise ValueError(
            f"noise: found kind {kind!r}, expected one of {', '.join(noises)}; choose one of those"
        )
    return noises[kind]()


KINDS = ("misspelling", "adversarial", "recogniser", "ocr", "keyboard")


def noisy(
    texts: Sequence[str], kind: str, rate: float, seed: int, *, near: Table | None = None
) -> tuple[str, ...]:
    """The fixed noise of an evaluation, e.g. ("keyboard", 0.1): each character hit with probability 0.1.

    A text's noise depends on seed, kind and the text, not on its place or on the other texts.
    """
    return tuple(make_noise(text, kind, rate, _generator(seed, kind, text), near=near) for text in texts)


def _generator(seed: int, kind: str, text: str) -> Generator:
    digest = hashlib.blake2b(f"{seed}\0{kind}\0{text}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _pick(options: Sequence[str], draw: float) -> str:
    return options[int(draw * len(options))]


def _like(original: str, other: str) -> str:
    """`other` in the case of `original`."""
    if original.isupper():
        return other.upper() if len(original) > 1 or len(other) == 1 else other.capitalize()
    return other.capitalize() if original[:1].isupper() else other


def _or(text: str, changed: str) -> str:
    """The changed text, unless nothing that the normaliser would take is left of it."""
    folded = " ".join(changed.split())
    spoken = any(character.isalnum() or unicodedata.category(character)[0] == "S" for character in folded)
    return folded if spoken else text


def _is_cyrillic(text: str) -> bool:
    return sum("\u0400" <= character <= "\u04ff" for character in text) * 2 > sum(map(str.isalpha, text))
