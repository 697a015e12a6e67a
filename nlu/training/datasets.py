"""Training and evaluation sets: one table of names, and readers that turn their files into four uniform kinds of example.

A name is a folder of ../shared/data, or a view of one (`sgd.slots`), or a user's own files in the same formats
(`file:/data/mine`). Nothing is opened before `read` asks for it, and only the files of that one set and split are. Texts
are phrases (nlu.normalizer); those it refuses are left out and counted. What was read is described by digests, for the
record of the run.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from nlu.errors import InvalidInput
from nlu.normalizer import Phrase, normalize
from nlu.public_data import Labelled, Tagged

TRAIN, DEV, TEST, ALL = "train", "dev", "test", "all"
OUT_OF_SCOPE = "oos"  # the one label of phrases that belong to no intent, whatever the source calls it
OWN = "file:"  # what the name of a user's own set begins with
CONTEXT_TURNS = 2  # turns before the anchor that a dialog pair carries along
TOP_SIMILARITY = 5.0  # similarity files score from 0 to 5
WELL_FORMED = 0.8  # share of raters; Faruqui and Das, EMNLP 2018, take the same bar


class Form(Enum):
    """The kinds of example a reader can give."""

    PAIRS = "pairs"
    LABELLED = "labelled"
    TAGGED = "tagged"
    SCORED = "scored"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two phrases that belong together. Rows of equal `group` say the same and are never negatives of each other.

    `context` holds up to CONTEXT_TURNS turns before the anchor, oldest first, where the pair comes from a dialog.
    """

    anchor: str
    positive: str
    group: int
    context: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Two phrases and how alike they are, from 0 to 1."""

    a: str
    b: str
    score: float


Example = Pair | Labelled | Tagged | Scored
# (file, uncased) -> its examples; None stands for one with a text that the normaliser refuses
Reader = Callable[[Path, bool], Iterator[Example | None]]
Texts = Callable[[Path], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of the table: what it gives, under which licence, and in which files its splits lie."""

    name: str
    form: Form
    languages: tuple[str, ...]
    licence: str
    may_ship: bool  # may weights trained on it ship: the `weights` column of the data folder's README
    folder: str
    splits: Mapping[str, tuple[str, ...]]
    read: Reader
    clusters: bool = False  # pairs that share a text form one group
    evaluation_only: bool = False

    def files(self, split: str) -> tuple[str, ...]:
        """File names of a split; `all` is every file of the set, once. Raises ValueError for a split it has not."""
        if split == ALL:
            return tuple(dict.fromkeys(name for names in self.splits.values() for name in names))
        if split not in self.splits:
            raise ValueError(
                f"{self.name}: found split {split!r}, expected one of {', '.join(self.splits)} or {ALL}; "
                "choose one of those"
            )
        return self.splits[split]


class UsedFile(NamedTuple):
    """A file that examples came from; `sha256` is of the bytes on disk, `rows` and `skipped` count examples."""

    name: str
    sha256: str
    bytes: int
    rows: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """One split of one set, in the order of its files."""

    source: Source
    split: str
    examples: tuple[Example, ...]
    files: tuple[UsedFile, ...]

    @property
    def skipped(self) -> int:
        """Examples left out because the normaliser refused a text of theirs."""
        return sum(file.skipped for file in self.files)


def read(name: str | Source, split: str, root: Path, *, uncased: bool = True) -> Loaded:
    """Read one split. Raises FileNotFoundError for missing files and ValueError for a broken row or an unknown name.

    A user's own set needs its form: make it with `own` and pass the Source.
    """
    source = find(name) if isinstance(name, str) else name
    examples: list[Example] = []
    files: list[UsedFile] = []
    for path in paths(source, split, root):
        before = len(examples)
        skipped = 0
        for example in source.read(path, uncased):
            if example is None:
                skipped += 1
            else:
                examples.append(example)
        files.append(UsedFile(*_stamp(path, root), len(examples) - before, skipped))
    return Loaded(source, split, tuple(_grouped(examples) if source.clusters else examples), tuple(files))


def digests(name: str | Source, split: str, root: Path) -> dict[str, str]:
    """SHA-256 of each file of a split by its path under `root`, without parsing any: what the run record keeps."""
    source = find(name) if isinstance(name, str) else name
    return {stamp[0]: stamp[1] for stamp in (_stamp(path, root) for path in paths(source, split, root))}


def paths(source: Source, split: str, root: Path) -> tuple[Path, ...]:
    """Where the files of a split lie. Raises FileNotFoundError, naming the folder first when that is what is missing."""
    names = source.files(split)
    folder = root / source.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source.name}: found no folder {folder}, expected one holding {', '.join(names)}; "
            "point `data.root` at a copy of the public sets, or leave this set out of the config"
        )
    found = tuple(folder / name for name in names)
    for path in found:
        if not path.is_file():
            held = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{source.name}: found {held} in {folder}, expected {path.name}; "
                f"copy the file there or take another split than {split!r}"
            )
    return found


def find(name: str) -> Source:
    """The table's entry of that name. Raises ValueError with the nearest names."""
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=3, cutoff=0.4)
    views = [known for known in SOURCES if known.startswith(f"{name}.")]
    raise ValueError(
        f"dataset: found {name!r}, expected a name of the table in nlu/training/datasets.py or {OWN}PATH; "
        f"nearest: {', '.join(views or near) or 'none'}"
    )


def own(name: str, form: Form) -> Source:
    """A user's own set, `file:PATH`: one file (its train split) or a folder of `<split>.tsv|.jsonl`, gzip'd or not.

    The formats are those of the public sets: `text<TAB>label[,label]`, `{"tokens", "tags"}`, `a<TAB>b`, dialogs, and
    `a<TAB>b<TAB>score` with scores from 0 to 5. Whether its weights may ship is the user's own affair, so they may.
    """
    path = Path(os.path.abspath(name.removeprefix(OWN)))
    endings = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
    splits: dict[str, tuple[str, ...]] = {}
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.name.endswith(endings):
                split = file.name.split(".")[0]
                splits[split] = (*splits.get(split, ()), file.name)
    elif path.is_file():
        splits[TRAIN] = (path.name,)
    if not splits:
        raise FileNotFoundError(
            f"{name}: found {'no such path' if not path.exists() else 'no data in it'}, expected a file or a folder with "
            f"train{'|'.join(endings)}; check the path, it is taken from the working directory"
        )
    folder = path if path.is_dir() else path.parent
    return Source(
        name, form, ("und",), "the user's own", True, str(folder), splits, _OWN_READERS[form], clusters=False
    )


def select(
    examples: Sequence[Example],
    *,
    rename: Mapping[str, str] | None = None,
    cap_per_label: int = 0,
    min_chars: int = 0,
    limit: int = 0,
    seed: int = 0,
) -> tuple[Example, ...]:
    """The examples a task wants: labels renamed (to "": dropped), short phrases, crowded labels and the rest cut.

    0 switches a cut off. What stays is chosen by a hash of seed and phrase, so that one new example moves no other, and
    keeps its order. `min_chars` counts code points, of the shorter side where there are two; `cap_per_label` looks at the
    first label of a labelled example and leaves others alone.
    """
    renamed = [_renamed(example, rename) for example in examples] if rename else list(examples)
    long = [example for example in renamed if example and min(map(len, _texts(example)[:2])) >= min_chars]
    return tuple(_limited(_capped(long, cap_per_label, seed), limit, seed))


def excluding(examples: Iterable[Example], phrases: Collection[str]) -> tuple[Example, ...]:
    """Examples none of whose phrases is in `phrases`: keeps the test rows out of training, whichever set they hide in."""
    return tuple(example for example in examples if not any(text in phrases for text in _texts(example)))


def labels_of(examples: Iterable[Example]) -> Counter[str]:
    """How often each label occurs: labels of labelled examples, span labels of tagged ones."""
    counts: Counter[str] = Counter()
    for example in examples:
        if isinstance(example, Labelled):
            counts.update(example.labels)
        elif isinstance(example, Tagged):
            counts.update(label for label, _, _ in example.spans)
    return counts


def identity(text: str) -> int:
    """63 bits that stand for a text, the same in every process: duplicates and groups across ranks are found by it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def phrase_of(text: str, *, uncased: bool = True) -> str | None:
    """`normalize(text).text`, or None where the normaliser refuses."""
    try:
        return normalize(text, uncased=uncased).text
    except InvalidInput:
        return None


# --- files


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file, gzip'd or not, without their ends; only a line feed ends one (texts may hold U+2028 or \\r)."""
    opened = gzip.open(path, "rt", encoding="utf-8", newline="\n") if path.suffix == ".gz" else None
    with opened or path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            stripped = line.rstrip("\r\n")
            if stripped:
                yield stripped


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    for number, line in enumerate(_lines(path), 1):
        row = line.split("\t")
        if len(row) < columns:
            raise ValueError(
                f"{path}, row {number}: found {len(row)} column(s), expected at least {columns}; "
                "separate them by tabs, without quotes or a header"
            )
        yield row


def _records(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, row {number}: found no JSON ({error}), expected one object a line; mend the row"
            ) from error
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(
                f"{path}, row {number}: found no {', '.join(missing)}, expected an object with {', '.join(keys)}; "
                "see the schemas in the data folder's README"
            )
        yield record


def _stamp(path: Path, root: Path) -> tuple[str, str, int]:
    """Path under root (or absolute), SHA-256 of the bytes, size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return name, digest.hexdigest(), path.stat().st_size


# --- readers: each takes options and gives a Reader


def _labelled(*, outside: Collection[str] = (), keep_outside: bool = False) -> Reader:
    """`text<TAB>label[,label]`. Labels in `outside` mark phrases of no intent: left out, or kept as OUT_OF_SCOPE."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for text, labels, *_ in _rows(path, 2):
            names = tuple(labels.split(","))
            if outside and names[0] in outside:
                if not keep_outside:
                    continue
                names = (OUT_OF_SCOPE,)
            phrase = phrase_of(text, uncased=uncased)
            yield None if phrase is None else Labelled(phrase, names)

    return reader


def _named(label: str) -> Reader:
    """A list, first column: every entry gets the one label."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for row in _rows(path, 1):
            phrase = phrase_of(row[0], uncased=uncased)
            yield None if phrase is None else Labelled(phrase, (label,))

    return reader


def _well_formed(path: Path, uncased: bool) -> Iterator[Example | None]:
    for text, score, *_ in _rows(path, 2):
        phrase = phrase_of(text, uncased=uncased)
        label = "well_formed" if float(score) >= WELL_FORMED else "ill_formed"
        yield None if phrase is None else Labelled(phrase, (label,))


def _intents(*, act: str = "", outside: Collection[str] = ()) -> Reader:
    """`intent` of JSONL records; with `act`, only of turns that do it (a "yes, please" does not tell its intent)."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for record in _records(path, "text", "intent"):
            intent = record["intent"]
            if not intent or intent in outside or (act and act not in record["acts"]):
                continue
            phrase = phrase_of(record["text"], uncased=uncased)
            yield None if phrase is None else Labelled(phrase, (intent,))

    return reader


def _tagged(path: Path, uncased: bool) -> Iterator[Example | None]:
    """`{"text", "tokens", "tags"}`: spans of the phrase that the serving side would make of `text`."""
    for number, record in enumerate(_records(path, "tokens", "tags"), 1):
        tokens, tags = record["tokens"], record["tags"]
        if len(tokens) != len(tags):
            raise ValueError(
                f"{path}, row {number}: found {len(tokens)} tokens and {len(tags)} tags, expected as many of both; "
                "mend the row"
            )
        yield _spans(record.get("text", ""), tokens, tags, uncased=uncased)


def _spans(text: str, tokens: Sequence[str], tags: Sequence[str], *, uncased: bool) -> Tagged | None:
    bounds = _locate(text, tokens)
    if bounds is None:  # a text that lost a token, or none at all
        text = " ".join(tokens)
        bounds = _locate(text, tokens) or []
    try:
        phrase = normalize(text, uncased=uncased)
    except InvalidInput:
        return None
    spans: list[tuple[str, int, int]] = []
    last = "O"
    for (start, end), tag in zip(bounds, tags, strict=True):
        label = tag[2:]
        if label and tag.startswith("I-") and last[2:] == label and spans:
            spans[-1] = (label, spans[-1][1], end)
        elif label:
            spans.append((label, start, end))
        last = tag
    mapped = ((label, *_in_phrase(phrase, start, end)) for label, start, end in spans)
    return Tagged(phrase.text, tuple(span for span in mapped if span[2] > span[1]))


def _locate(text: str, tokens: Sequence[str]) -> list[tuple[int, int]] | None:
    bounds: list[tuple[int, int]] = []
    position = 0
    for token in tokens:
        start = text.find(token, position)
        if start < 0:
            return None
        position = start + len(token)
        bounds.append((start, position))
    return bounds


def _in_phrase(phrase: Phrase, start: int, end: int) -> tuple[int, int]:
    """The opposite of Phrase.to_original; empty where all of the span was dropped."""
    if phrase.starts is None or phrase.ends is None:
        return start, end
    return bisect_right(phrase.ends, start), bisect_left(phrase.starts, end)


def _pairs(*columns: int) -> Reader:
    """Two columns of a table that say the same, or answer each other."""
    first, second = columns or (0, 1)

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for row in _rows(path, 2):
            anchor = phrase_of(row[first], uncased=uncased)
            positive = phrase_of(row[second], uncased=uncased)
            if anchor is None or positive is None:
                yield None
            elif anchor != positive:  # a change of case alone teaches nothing
                yield Pair(anchor, positive, identity(positive))

    return reader


def _corrections(path: Path, uncased: bool) -> Iterator[Example | None]:
    """`error<TAB>word[,word]`: the first correction counts; the group is the correction."""
    for error, words, *_ in _rows(path, 2):
        anchor, positive = phrase_of(error, uncased=uncased), phrase_of(words.split(",")[0], uncased=uncased)
        yield None if anchor is None or positive is None else Pair(anchor, positive, identity(positive))


def _replies(path: Path, uncased: bool) -> Iterator[Example | None]:
    """Consecutive turns of two speakers; equal replies are one group."""
    for record in _records(path, "turns"):
        turns = record["turns"]
        phrases = [phrase_of(turn["text"], uncased=uncased) for turn in turns]
        for i in range(1, len(turns)):
            if turns[i]["speaker"] == turns[i - 1]["speaker"]:
                continue
            anchor, positive = phrases[i - 1], phrases[i]
            if anchor is None or positive is None:
                yield None
                continue
            context = tuple(phrase for phrase in phrases[max(0, i - 1 - CONTEXT_TURNS) : i - 1] if phrase)
            yield Pair(anchor, positive, identity(positive), context)


def _turn_labels(key: str) -> Reader:
    """Labels of single turns: `acts` (several) or `act` or `emotion` (one). Turns without are left out."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for record in _records(path, "turns"):
            for turn in record["turns"]:
                found = turn.get(key) or ()
                labels = (found,) if isinstance(found, str) else tuple(sorted(set(found)))
                if labels:
                    phrase = phrase_of(turn["text"], uncased=uncased)
                    yield None if phrase is None else Labelled(phrase, labels)

    return reader


def _scored(path: Path, uncased: bool) -> Iterator[Example | None]:
    for number, (a, b, score, *_) in enumerate(_rows(path, 3), 1):
        value = float(score)
        if not 0.0 <= value <= TOP_SIMILARITY:
            raise ValueError(
                f"{path}, row {number}: found a score of {score}, expected 0 to {TOP_SIMILARITY:g}; rescale the file"
            )
        one, other = phrase_of(a, uncased=uncased), phrase_of(b, uncased=uncased)
        yield None if one is None or other is None else Scored(one, other, value / TOP_SIMILARITY)


_END = re.compile(r"[.?!…]+[\"'»”)]*\s*$")
_SPOKEN = re.compile(r"\w+(?:['’\-]\w+)*")
# What stands right after a word, strongest first; the rest (colons, dashes, quotes) is nothing one hears.
_MARKS = {"?": "QUESTION", "!": "EXCLAMATION", ".": "PERIOD", "…": "PERIOD", ",": "COMMA", ";": "COMMA"}


def _turns(path: Path) -> Iterator[str]:
    for record in _records(path, "turns"):
        for turn in record["turns"]:
            yield turn["text"]


def _first_column(path: Path) -> Iterator[str]:
    for row in _rows(path, 1):
        yield row[0]


def _of_words(texts: Texts, label: Callable[[str, str], str]) -> Reader:
    """Written text to what a recogniser hears of it, a label(word, gap after it) on each word; "" is no span.

    The phrase is the words alone, joined by blanks. Texts without a mark at their end are left out: nobody punctuated.
    """

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for text in texts(path):
            if _END.search(text):
                yield _heard(text, label, uncased=uncased)

    return reader


def _heard(text: str, label: Callable[[str, str], str], *, uncased: bool) -> Tagged | None:
    words = list(_SPOKEN.finditer(text))
    phrase = phrase_of(" ".join(word[0] for word in words), uncased=uncased)
    heard = phrase.split(" ") if phrase else []
    if phrase is None or len(heard) != len(words):  # some character normalised to a blank
        return None
    starts = [*(word.start() for word in words[1:]), len(text)]
    spans: list[tuple[str, int, int]] = []
    position = 0
    for word, following, said in zip(words, starts, heard, strict=True):
        found = label(word[0], text[word.end() : following])
        if found:
            spans.append((found, position, position + len(said)))
        position += len(said) + 1
    return Tagged(phrase, tuple(spans))


def _mark(_word: str, gap: str) -> str:
    return next((name for mark, name in _MARKS.items() if mark in gap), "")


def _case(word: str, _gap: str) -> str:
    if word.isupper() and len(word) > 1:
        return "UPPER"
    return "TITLE" if word[:1].isupper() else ""


def _questions(texts: Texts) -> Reader:
    """One-sentence texts as question or statement, without the mark that would give it away."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        for text in texts(path):
            marks = re.findall(r"[.?!…]+", text)
            if len(marks) != 1 or not _END.search(text):
                continue
            phrase = phrase_of(_END.sub("", text), uncased=uncased)
            label = "question" if "?" in marks[0] else "statement"
            yield None if phrase is None else Labelled(phrase, (label,))

    return reader


def _by_ending(table: Reader, lines: Reader) -> Reader:
    """For users' own files, where the ending tells the format."""

    def reader(path: Path, uncased: bool) -> Iterator[Example | None]:
        return (lines if ".jsonl" in path.suffixes else table)(path, uncased)

    return reader


_OWN_READERS: Mapping[Form, Reader] = {
    Form.PAIRS: _by_ending(_pairs(), _replies),
    Form.LABELLED: _by_ending(_labelled(), _intents()),
    Form.TAGGED: _tagged,
    Form.SCORED: _scored,
}


# --- choosing examples


def _texts(example: Example) -> tuple[str, ...]:
    match example:
        case Pair():
            return (example.anchor, example.positive, *example.context)
        case Scored():
            return (example.a, example.b)
        case _:
            return (example.phrase,)


def _renamed(example: Example, rename: Mapping[str, str]) -> Example | None:
    match example:
        case Labelled():
            labels = tuple(dict.fromkeys(rename.get(label, label) for label in example.labels))
            kept = tuple(label for label in labels if label)
            return Labelled(example.phrase, kept) if kept else None
        case Tagged():
            spans = ((rename.get(label, label), start, end) for label, start, end in example.spans)
            return Tagged(example.phrase, tuple(span for span in spans if span[0]))
        case _:
            return example


def _capped(examples: Sequence[Example], cap: int, seed: int) -> Sequence[Example]:
    if not cap:
        return examples
    by_label: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        if isinstance(example, Labelled):
            by_label.setdefault(example.labels[0], []).append(i)
    dropped = {i for rows in by_label.values() for i in _drawn(examples, rows, seed)[cap:]}
    return [example for i, example in enumerate(examples) if i not in dropped]


def _limited(examples: Sequence[Example], limit: int, seed: int) -> Sequence[Example]:
    if not limit or len(examples) <= limit:
        return examples
    kept = set(_drawn(examples, range(len(examples)), seed)[:limit])
    return [example for i, example in enumerate(examples) if i in kept]


def _drawn(examples: Sequence[Example], rows: Iterable[int], seed: int) -> list[int]:
    """Rows in an order that depends on seed and phrases alone."""
    return sorted(rows, key=lambda i: (identity("\t".join((str(seed), *_texts(examples[i])))), i))


def _grouped(examples: Sequence[Example]) -> list[Example]:
    """Pairs that share a text, directly or over others, become one group (union-find), named by its smallest identity."""
    parents: dict[int, int] = {}

    def root(node: int) -> int:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = parents[parent]
            node = parents[node]
        return node

    pairs = [example for example in examples if isinstance(example, Pair)]
    for pair in pairs:
        one, other = root(identity(pair.anchor)), root(identity(pair.positive))
        parents[max(one, other)] = min(one, other)
    return [replace(pair, group=root(identity(pair.anchor))) for pair in pairs]


# --- the table


class _Folder(NamedTuple):
    """A folder of ../shared/data: licence as stated, `weights` column, languages."""

    licence: str
    may_ship: bool
    languages: tuple[str, ...]


_EN, _RU, _BOTH = ("en",), ("ru",), ("en", "ru")

FOLDERS: Mapping[str, _Folder] = {
    "banking77": _Folder("CC BY 4.0", True, _EN),
    "btc_ner": _Folder("CC BY 4.0", True, _EN),
    "chatterbot": _Folder("BSD-3-Clause", True, _BOTH),
    "clinc150": _Folder("CC BY 3.0", True, _EN),
    "clinc150_paraphrases": _Folder("not stated (CLINC side CC BY 3.0)", False, _EN),
    "dailydialog": _Folder("CC BY-NC-SA 4.0 (NC)", False, _EN),
    "date_number_expressions": _Folder("MIT", True, _EN),
    "davidson_hate_offensive": _Folder("MIT", True, _EN),
    "dream_intents": _Folder("Apache-2.0", True, _BOTH),
    "dstc11_intents": _Folder("CDLA-Permissive-2.0", True, _EN),
    "dstc2_dialogs": _Folder("CC BY 3.0", True, _EN),
    "dstc8_slots": _Folder("CC BY 4.0", True, _EN),
    "en_misspellings": _Folder("MIT or Apache-2.0", True, _EN),
    "en_spell_errors": _Folder("not stated (Birkbeck: NC)", False, _EN),
    "enru_professional": _Folder("CC BY-SA 3.0 / 4.0, CC0", True, _BOTH),
    "enru_questions": _Folder("CC BY-SA 4.0, CC BY 4.0", True, _BOTH),
    "enru_wmt_news": _Folder("not stated (WMT: research)", False, _BOTH),
    "factrueval2016": _Folder("MIT", True, _RU),
    "goemotions": _Folder("Apache-2.0", True, _EN),
    "hint3": _Folder("ODbL 1.0 + DbCL", False, _EN),
    "home_assistant_intents": _Folder("CC BY 4.0", True, _BOTH),
    "kvret": _Folder("not stated (code MIT)", False, _EN),
    "mcid": _Folder("not stated", False, _EN),
    "ms_assistant_skills": _Folder("MIT", True, _EN),
    "nlu_evaluation_corpora": _Folder("CC BY-SA 3.0", True, _EN),
    "olid_offensive": _Folder("no restriction stated (tweets)", False, _EN),
    "personality_chat": _Folder("MIT upstream (mirror: none stated)", False, _EN),
    "query_wellformedness": _Folder("CC BY-SA 4.0", True, _EN),
    "rasa_demo": _Folder("GPL-3.0", False, _EN),
    "restaurant8k": _Folder("CC BY 4.0", True, _EN),
    "ru_bot_intents": _Folder("not stated", False, _RU),
    "ru_goemotions": _Folder("MIT", True, _RU),
    "ru_inappropriate_sensitive": _Folder("CC BY-NC-SA 4.0 (NC)", False, _RU),
    "ru_movie_dialogs": _Folder("CC0 1.0 (source: film scripts)", True, _RU),
    "ru_names_cities": _Folder("CC0 1.0, CC BY-SA 4.0", True, _RU),
    "ru_paraphrases": _Folder("CC0 1.0", True, _RU),
    "ru_pc_commands": _Folder("CC BY-NC-SA 4.0 (NC)", False, _RU),
    "ru_premise_questions": _Folder("CC0 1.0", True, _RU),
    "ru_toxicity_detox": _Folder("not stated", False, _RU),
    "ru_utterances": _Folder("CC0 1.0", True, _RU),
    "self_dialogue": _Folder("BSD-3-Clause", True, _EN),
    "sgd": _Folder("CC BY-SA 4.0", True, _EN),
    "sim_dialogues": _Folder("not stated", False, _EN),
    "snips": _Folder("CC0 1.0", True, _EN),
    "sts_extra": _Folder("mixed, not stated", False, _EN),
    "stsb": _Folder("CC BY-SA 4.0 (scores), mixed source texts", False, _BOTH),
    "tatoeba_enru": _Folder("CC BY 2.0 FR (Tatoeba terms)", True, _BOTH),
    "tatoeba_paraphrases": _Folder("CC BY 2.0 FR (Tatoeba terms)", True, _BOTH),
    "topical_chat": _Folder("CDLA-Sharing-1.0", True, _EN),
    "trec_questions": _Folder("not stated", False, _EN),
    "tweeteval_irony_sentiment": _Folder("no restriction stated (tweets)", False, _EN),
    "wnut17": _Folder("CC BY 4.0", True, _EN),
}


def _view(
    name: str,
    read: Reader,
    splits: str,
    *,
    form: Form,
    ending: str,
    languages: tuple[str, ...] = (),
    clusters: bool = False,
    evaluation_only: bool = False,
) -> Source:
    """One line of the table. `splits` names them, each with the stems of its files where those differ from it."""
    folder = name.split(".")[0]
    about = FOLDERS[folder]
    files: dict[str, tuple[str, ...]] = {}
    for part in splits.split():
        split, _, stems = part.partition("=")
        files[split] = tuple(f"{stem}.{ending}.gz" for stem in (stems or split).split(","))
    spoken = languages or about.languages
    return Source(
        name, form, spoken, about.licence, about.may_ship, folder, files, read, clusters, evaluation_only
    )


def _of(form: Form, ending: str) -> Callable[..., Source]:
    def view(name: str, read: Reader, splits: str, **options: Any) -> Source:
        return _view(name, read, splits, form=form, ending=ending, **options)

    return view


_table = _of(Form.LABELLED, "tsv")
_json = _of(Form.LABELLED, "jsonl")
_token = _of(Form.TAGGED, "jsonl")
_words = _of(Form.TAGGED, "tsv")
_dialog = _of(Form.PAIRS, "jsonl")
_pair = _of(Form.PAIRS, "tsv")
_similar = _of(Form.SCORED, "tsv")

_CUT = "train dev test"
_SGD_USER = "train=user_train dev=user_dev test=user_test"
_SGD_DIALOGS = "train=dialogs_train dev=dialogs_dev test=dialogs_test"
_SIM = "train=sim_m_train dev=sim_m_dev,sim_r_dev test=sim_m_test"
_TOPICAL = "train=valid_freq,valid_rare test=test_freq,test_rare"
_CORPORA = (
    "train=askubuntu_train,chatbot_train,webapplications_train "
    "test=askubuntu_test,chatbot_test,webapplications_test"
)
_DSTC8 = (
    "train=buses_train,events_train,homes_train,rentalcars_train "
    "test=buses_test,events_test,homes_test,rentalcars_test"
)
_WMT = (
    "train=newstest2014,newstest2015,newstest2016,newstest2017,newstest2018,newstest2019,newstest2020 "
    "test=newstest2021,generaltest2022"
)


def _hint3(part: str) -> tuple[Source, Source]:
    """One of the three bots, without and with its out-of-scope queries."""
    outside, splits = ("NO_NODES_DETECTED",), f"train={part}_train test={part}_test"
    return (
        _table(f"hint3.{part}", _labelled(outside=outside), splits),
        _table(f"hint3.{part}.full", _labelled(outside=outside, keep_outside=True), splits),
    )


_RASA = ("out_of_scope.other", "out_of_scope.non_english")
_NONE = ("NONE", "None")

# A set without a split of its own gives all it has as `train`, unless something natural tells two parts apart.
_INTENTS = (
    _table("banking77", _labelled(), "train test"),
    _table("clinc150", _labelled(outside=("oos",)), _CUT),
    _table("clinc150.full", _labelled(outside=("oos",), keep_outside=True), _CUT),
    _table("dream_intents.en", _labelled(), "train=en", languages=_EN),
    _table("dream_intents.ru", _labelled(), "train=ru", languages=_RU),
    _table("dstc11_intents", _labelled(), "train=insurance,banking,finance"),
    _table("dstc11_intents.insurance", _labelled(), "train=insurance"),
    _table("dstc11_intents.banking", _labelled(), "train=banking"),
    _table("dstc11_intents.finance", _labelled(), "train=finance"),
    *_hint3("curekart"),
    *_hint3("powerplay11"),
    *_hint3("sofmattress"),
    # generated = made from templates, written = by people; both splits use the same labels in both languages
    _table("home_assistant_intents.en", _labelled(), "train=en_generated test=en_written", languages=_EN),
    _table("home_assistant_intents.ru", _labelled(), "train=ru_generated test=ru_written", languages=_RU),
    _table("mcid", _labelled(), _CUT),
    _json("ms_assistant_skills.intents", _intents(), _CUT),
    _json("nlu_evaluation_corpora.intents", _intents(outside=_NONE), _CORPORA),
    _table("personality_chat", _labelled(), _CUT),
    _table("rasa_demo", _labelled(outside=_RASA), _CUT),
    _table("rasa_demo.full", _labelled(outside=_RASA, keep_outside=True), _CUT),
    _table("ru_bot_intents", _labelled(), "train=utterances"),
    _table("ru_pc_commands", _labelled(), "train=commands"),
    _json("sgd.intents", _intents(act="INFORM_INTENT", outside=_NONE), _SGD_USER),
    _json("snips.intents", _intents(), "train test"),
    _table("trec_questions", _labelled(), "train test"),
)
_ATTITUDES = (  # emotion, toxicity, irony, dialog acts, questions
    _table("goemotions", _labelled(), _CUT),
    _table("ru_goemotions", _labelled(), "train=dev"),  # goemotions dev translated: tune on neither beside it
    _json("dailydialog.emotions", _turn_labels("emotion"), _CUT),
    _json("topical_chat.emotions", _turn_labels("emotion"), _TOPICAL),
    _table("davidson_hate_offensive", _labelled(), _CUT),
    _table("olid_offensive", _labelled(), _CUT),
    _table("ru_toxicity_detox", _labelled(), "train dev"),
    _table("ru_inappropriate_sensitive.inappropriate", _labelled(), "dev=inappropriate_dev"),
    _table("ru_inappropriate_sensitive.topics", _labelled(), "train=topics_train dev=topics_dev"),
    _table("tweeteval_irony_sentiment.irony", _labelled(), "train=irony_train dev=irony_dev test=irony_test"),
    _table("tweeteval_irony_sentiment.sentiment", _labelled(), "dev=sentiment_dev test=sentiment_test"),
    _json("sgd.acts", _turn_labels("acts"), _SGD_DIALOGS),
    _json("dailydialog.acts", _turn_labels("act"), _CUT),
    _json("sim_dialogues.acts", _turn_labels("acts"), _SIM),
    _table("query_wellformedness", _well_formed, _CUT),
    _table("ru_utterances.questions", _questions(_first_column), _CUT),
    _json("self_dialogue.questions", _questions(_turns), _CUT),
    _table("ru_names_cities.names", _named("first_name"), "train=names"),
    _table("ru_names_cities.cities", _named("city"), "train=cities"),
)
_TOKENS = (  # slots, entities, punctuation and case
    _token("snips.slots", _tagged, "train test"),
    _token("sgd.slots", _tagged, _SGD_USER),
    _token("restaurant8k", _tagged, "train test"),
    _token("dstc8_slots", _tagged, _DSTC8),  # turns of the schema-guided dialogues, as sgd is
    _token("ms_assistant_skills.slots", _tagged, _CUT),
    _token("nlu_evaluation_corpora.slots", _tagged, _CORPORA),
    _token("wnut17", _tagged, _CUT),
    _token("btc_ner", _tagged, "train=a,b,e,f,g test=h"),  # the sections are the source's, this cut is ours
    _token("factrueval2016", _tagged, "train=dev test"),  # its devset is meant for training
    # each of the three marks one thing and leaves the others bare, so they must not share a head
    _token("date_number_expressions.datetime", _tagged, "train=datetime"),
    _token("date_number_expressions.units", _tagged, "train=units"),
    _token("date_number_expressions.numbers", _tagged, "train=numbers"),
    _token("self_dialogue.punctuation", _of_words(_turns, _mark), _CUT),
    _token("self_dialogue.case", _of_words(_turns, _case), _CUT),
    _words("ru_utterances.punctuation", _of_words(_first_column, _mark), _CUT),
    _words("ru_utterances.case", _of_words(_first_column, _case), _CUT),
)
_DIALOGS = (  # a turn and the reply to it; a question and the fact that answers it
    _dialog("self_dialogue.replies", _replies, _CUT),
    _dialog("topical_chat.replies", _replies, _TOPICAL),
    _dialog("sgd.replies", _replies, _SGD_DIALOGS),
    _dialog("ru_movie_dialogs", _replies, _CUT),
    _dialog("dailydialog.replies", _replies, _CUT),
    _dialog("dstc2_dialogs", _replies, _CUT),
    _dialog("kvret", _replies, "dev test"),
    _dialog("sim_dialogues.replies", _replies, _SIM),
    _dialog("chatterbot.en", _replies, "train=en", languages=_EN),
    _dialog("chatterbot.ru", _replies, "train=ru", languages=_RU),
    _pair("ru_premise_questions", _pairs(1, 0), _CUT),
)
_SAME = (  # paraphrases, translations, corrections
    _pair(
        "tatoeba_paraphrases.en",
        _pairs(),
        "train=en_train dev=en_dev test=en_test",
        languages=_EN,
        clusters=True,
    ),
    _pair(
        "tatoeba_paraphrases.ru",
        _pairs(),
        "train=ru_train dev=ru_dev test=ru_test",
        languages=_RU,
        clusters=True,
    ),
    _pair("ru_paraphrases", _pairs(), _CUT, clusters=True),
    _pair("clinc150_paraphrases", _pairs(), "train", clusters=True),
    _pair("ru_toxicity_detox.pairs", _pairs(), "train=pairs_train dev=pairs_dev", clusters=True),
    _pair("tatoeba_enru", _pairs(), _CUT, clusters=True),
    _pair("tatoeba_enru.pivot", _pairs(), "train=pivot_train dev=pivot_dev test=pivot_test", clusters=True),
    _pair("enru_professional", _pairs(), "train=flores200_devtest,ntrex128,tico19,ud_pud", clusters=True),
    _pair(
        "enru_questions",
        _pairs(),
        "train=xquad_questions,rubq_questions,qald9plus_questions",
        clusters=True,
    ),
    _pair("enru_questions.paragraphs", _pairs(), "train=xquad_paragraphs", clusters=True),
    _pair("enru_wmt_news", _pairs(), _WMT, clusters=True),
    _pair("en_misspellings", _corrections, "train=misspellings"),
    _pair("en_spell_errors", _corrections, "train=errors"),
)
_STSB_EN, _STSB_RU = "train=en_train dev=en_dev test=en_test", "train=ru_train dev=ru_dev test=ru_test"
_SIMILAR = (
    _similar("stsb.en", _scored, _STSB_EN, languages=_EN, evaluation_only=True),
    _similar("stsb.ru", _scored, _STSB_RU, languages=_RU, evaluation_only=True),
    _similar("sts_extra", _scored, "test=2012,2013,2014,2015,2016", evaluation_only=True),
)
SOURCES: Mapping[str, Source] = {
    source.name: source for source in (*_INTENTS, *_ATTITUDES, *_TOKENS, *_DIALOGS, *_SAME, *_SIMILAR)
}
