"""Which vectorizer is better, and is it so beyond chance: folders side by side through light heads on frozen vectors.

    nlu vectorizer evaluate OURS TEACHER --suite quick

Read `evaluate` first, then EXAMS, the list of everything that is measured. Folders are loaded as they are served, so what
is measured is what is served. Heads learn from train splits, choose their regularisation on dev splits or folds, and meet
a test split once. The same test rows are resampled for every vectorizer (paired bootstrap, Efron 1979), so that a
difference between two has an interval of its own. Vectors are kept on disk: only new phrases are ever encoded.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from annotators import fit, thresholds
from annotators.annotator import Encoding, Span
from annotators.fit import About, TaggedEncoding
from nlu import record
from nlu.public_data import Labelled, Tagged
from nlu.training import datasets
from nlu.training.augment import near_words, noisy, vocabulary
from nlu.training.config import Evaluate
from nlu.training.datasets import DEV, OUT_OF_SCOPE, TEST, TRAIN, Example, Pair, Scored
from nlu.vectorizer import MODEL_FILE, SPEC_FILE, TOKENIZER_FILE, Vectorizer

T = TypeVar("T")
FloatArray = NDArray[np.float32]
Rows = NDArray[np.int64]
Statistic = Callable[[Rows], float]  # the number that some test rows give; rows may repeat
Progress = Callable[[str, int, int], None]
Encode = Callable[[Sequence[str], bool], list[Encoding]]  # (phrases, with token vectors)
Metric = Callable[[NDArray[np.str_], NDArray[np.str_]], float]  # (gold, predicted)

REPORT_FILES = ("evaluation.json", "evaluation.md", "evaluation.png")
STORE = Path(".cache/vectors")

# C of logistic regression, ascending, because each fit starts where the one before ended
REGULARISATIONS = (2.0, 8.0, 32.0, 128.0)
FOLDS = 3
NOISES = {"typos": "keyboard", "misheard": "recogniser"}  # how rows call it -> the kind in augment
CANDIDATES = 100  # replies to choose one from
_CLEAN = ""
_SEED = 13  # of everything drawn here; another seed is another benchmark
_NEAR_VOCABULARY = 20_000
_TOXICITY = {"hate": "toxic", "offensive": "toxic", "neither": "acceptable"}
# scikit-learn compares tol with a gradient averaged over rows, which shrinks with the number of labels: at 1e-3 a head
# over CLINC150's 150 stops after ten steps, a point and a half short.
_TOLERANCE = 1e-5
_MAX_ITERATIONS = 300
_ENCODED_AT_ONCE = 1024
_TIMING_PASSES = 3
_TIMED = "clinc150"


# --- what comes out


@dataclass(frozen=True, slots=True)
class Score:
    """A vectorizer's number, its 95 % interval, and how far it is from the first vectorizer's on the same rows."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None  # standard deviation over the draws of a few-shot row
    change: float | None = None  # minus the first vectorizer's; None for that one itself
    change_low: float | None = None
    change_high: float | None = None

    @property
    def verdict(self) -> int:
        """1 above the first vectorizer, -1 below it, 0 where the interval of the change holds both."""
        if self.change_low is None or self.change_high is None:
            return 0
        return 1 if self.change_low > 0 else -1 if self.change_high < 0 else 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; `scores` are in the order of the columns."""

    task: str
    data: str
    language: str
    condition: str
    metric: str
    items: int  # test rows; for cost 0, or phrases timed
    unseen: bool  # no vectorizer is meant to have trained on this set
    scores: tuple[Score, ...]

    @property
    def higher_is_better(self) -> bool:
        """Of megabytes and milliseconds it is not."""
        return self.task != "cost"


@dataclass(frozen=True, slots=True)
class Column:
    """One vectorizer, or one of its truncations (`width` below `dim`)."""

    name: str
    folder: str
    fingerprint: str
    dim: int
    width: int
    precision: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole table, with what it takes to make it again."""

    suite: str
    settings: Mapping[str, Any]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    data: Mapping[str, str]  # file -> SHA-256
    seconds: float

    def line(self, task: str, data: str, condition: str, metric: str) -> Line:
        """The one line of that name. Raises ValueError, saying which there are."""
        wanted = (task, data, condition, metric)
        for line in self.lines:
            if (line.task, line.data, line.condition, line.metric) == wanted:
                return line
        known = "; ".join(f"{line.task}, {line.data}, {line.condition}, {line.metric}" for line in self.lines)
        raise ValueError(
            f"evaluation: found no line {', '.join(wanted)}, expected one of: {known}; choose one"
        )


# --- the run


def evaluate(
    folders: Sequence[Path],
    data: Path,
    settings: Evaluate | None = None,
    *,
    dims: Sequence[int] = (),
    store: Path = STORE,
    workers: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure vectorizer folders on the public sets under `data`; the first is what the others are held against.

    With `dims` each vectorizer stands beside itself cut to these widths by PCA of training phrases, on intents and
    similarity alone. `workers` threads encode (0: one a core); milliseconds per phrase are always of one thread.
    Raises FileNotFoundError before any work where a set is missing, and VectorizerRefused.
    """
    began = time.perf_counter()
    settings = settings or Evaluate()
    report = progress or _silent
    sizes = SIZES[settings.suite]
    exams = [exam for exam in EXAMS if exam.belongs(settings.suite, sweep=bool(dims))]
    digests = _check_data(exams, data)
    names = _names(folders)
    vectorizers = [Vectorizer(folder) for folder in folders]
    widest = max(vectorizer.dim for vectorizer in vectorizers)
    if dims and not 0 < min(dims) < widest:
        raise ValueError(f"dims: found {list(dims)}, expected widths below {widest}; leave the others out")
    desks = {uncased: Desk(data, settings, sizes, uncased) for uncased in (True, False)}
    candidates: list[Candidate] = []
    lines: list[Line] = []
    with ExitStack() as stores:
        for name, vectorizer in zip(names, vectorizers, strict=True):
            stored = Stored(store, vectorizer, workers or os.cpu_count() or 1, partial(report, "encoding"))
            stores.enter_context(closing(stored))
            whole = Candidate(name, vectorizer.spec.uncased, stored)
            candidates += [whole, *_truncated(whole, vectorizer.dim, dims, desks[whole.uncased])]
        columns = _columns(candidates, dict(zip(names, zip(folders, vectorizers, strict=True), strict=True)))
        if not dims:
            lines += _cost(columns, vectorizers, desks, sizes)
        for done, exam in enumerate(exams):
            report("exams", done, len(exams))
            lines += sit(exam, candidates, desks, sizes.resamples)
        report("exams", len(exams), len(exams))
    made_with = settings.model_dump() | {"dims": list(dims), "resamples": sizes.resamples, "seed": _SEED}
    return Evaluation(settings.suite, made_with, columns, tuple(lines), digests, time.perf_counter() - began)


def sit(
    exam: Exam, candidates: Sequence[Candidate], desks: Mapping[bool, Desk], resamples: int
) -> list[Line]:
    """All candidates through one exam, and their lines."""
    judges: dict[bool, Judge] = {}  # cased and uncased vectorizers read different phrases
    outcomes: list[dict[tuple[str, str, str], Outcome]] = []
    for candidate in candidates:
        if candidate.uncased not in judges:
            judges[candidate.uncased] = exam.prepare(desks[candidate.uncased])
        found = judges[candidate.uncased](candidate)
        outcomes.append({(one.task, one.condition, one.metric): one for one in found})
    held_out = desks[True].settings.held_out
    unseen = exam.unseen or any(name in held_out or name.split(".")[0] in held_out for name, _ in exam.needs)
    return [
        Line(
            *(key[0], exam.data, exam.language, key[1], key[2]),
            items=outcomes[0][key].items,
            unseen=unseen,
            scores=compare([each[key] for each in outcomes], resamples),
        )
        for key in outcomes[0]
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one vectorizer did in one line. `statistic(arange(items))` is its number."""

    task: str
    condition: str
    metric: str
    items: int
    statistic: Statistic
    spread: float | None = None


def compare(outcomes: Sequence[Outcome], resamples: int) -> tuple[Score, ...]:
    """Numbers with percentile intervals; every outcome sees the same resampled rows, so changes are paired."""
    scores: list[Score] = []
    first: NDArray[np.float64] = np.zeros(0)
    for i, outcome in enumerate(outcomes):
        value = outcome.statistic(np.arange(outcome.items))
        drawn = _resampled(outcome, resamples)
        low, high = _interval(drawn)
        if i == 0:
            first = drawn
            scores.append(Score(value, low, high, outcome.spread))
        elif outcome.items == outcomes[0].items:
            change_low, change_high = _interval(drawn - first)
            change = value - scores[0].value
            scores.append(Score(value, low, high, outcome.spread, change, change_low, change_high))
        else:  # a normaliser that refused other rows: nothing to pair
            scores.append(Score(value, low, high, outcome.spread))
    return tuple(scores)


def _resampled(outcome: Outcome, resamples: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(_SEED)  # the same rows for equal numbers of items
    return np.array(
        [outcome.statistic(rng.integers(outcome.items, size=outcome.items)) for _ in range(resamples)]
    )


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _silent(_what: str, _done: int, _total: int) -> None: ...


def _check_data(exams: Sequence[Exam], data: Path) -> dict[str, str]:
    """Digests of every file that will be read: an hour of work must not end in a missing one."""
    if not data.is_dir():
        raise FileNotFoundError(
            f"data: found no folder {data}, expected the public sets (clinc150, banking77, ...); pass it with --data"
        )
    needs = dict.fromkeys(need for exam in exams for need in exam.needs)
    return {name: sha for need in needs for name, sha in datasets.digests(*need, data).items()}


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that differ; raises ValueError for the same folder twice, or none."""
    absolute = [folder.resolve() for folder in folders]
    if not folders or len(set(absolute)) < len(folders):
        found = ", ".join(map(str, folders)) or "none"
        raise ValueError(f"vectorizers: found {found}, expected different folders; name each once")
    short = [folder.name for folder in absolute]
    return [
        name if short.count(name) == 1 else "/".join(folder.parts[-2:])
        for name, folder in zip(short, absolute, strict=True)
    ]


def _columns(
    candidates: Sequence[Candidate], loaded: Mapping[str, tuple[Path, Vectorizer]]
) -> tuple[Column, ...]:
    columns = []
    for candidate in candidates:
        folder, vectorizer = loaded[candidate.vectorizer or candidate.name]
        width = vectorizer.dim if candidate.axes is None else candidate.axes.shape[1]
        size = sum((folder / name).stat().st_size for name in (MODEL_FILE, TOKENIZER_FILE, SPEC_FILE))
        columns.append(
            Column(
                *(candidate.name, str(folder), vectorizer.fingerprint, vectorizer.dim, width),
                *(vectorizer.spec.precision, size),
            )
        )
    return tuple(columns)


# --- who is measured


@dataclass(frozen=True, slots=True)
class Candidate:
    """One vectorizer as exams see it: a function from phrases to Encodings, cut to `axes` [dim, width] where given."""

    name: str
    uncased: bool
    encode: Encode
    axes: FloatArray | None = None
    vectorizer: str = ""  # the name of what this is a truncation of

    def vectors(self, phrases: Sequence[str]) -> FloatArray:
        """[phrases, width], unit length."""
        whole = np.stack([encoding.sentence for encoding in self.encode(phrases, False)])
        return whole if self.axes is None else unit(whole @ self.axes)


class Stored:
    """An Encode that remembers on disk, by (fingerprint, phrase); safe beside other processes, not among threads."""

    def __init__(
        self, folder: Path, vectorizer: Vectorizer, workers: int, progress: Callable[[int, int], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{vectorizer.fingerprint}.sqlite"
        self._vectorizer, self._workers, self._progress = vectorizer, workers, progress
        self._base = sqlite3.connect(self._path, timeout=60.0)
        with self._understood():
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = OFF")  # it can all be computed again
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS encodings (key BLOB PRIMARY KEY, record BLOB) WITHOUT ROWID"
            )

    def __call__(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        """Encodings in order; phrases met before come from disk, the same bits as fresh ones."""
        distinct = tuple(dict.fromkeys(phrases))
        known = {phrase: self._stored(phrase, tokens) for phrase in distinct}
        missing = [phrase for phrase, encoding in known.items() if encoding is None]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            chunk = missing[start : start + _ENCODED_AT_ONCE]
            fresh = list(self._vectorizer.encode_corpus(chunk, tokens=tokens, workers=self._workers))
            known.update(zip(chunk, fresh, strict=True))
            rows = [
                (self._key(phrase), record.pack(known_)) for phrase, known_ in zip(chunk, fresh, strict=True)
            ]
            with self._understood(), self._base:
                self._base.executemany("INSERT OR REPLACE INTO encodings VALUES (?, ?)", rows)
            self._progress(start + len(chunk), len(missing))
        return [encoding for phrase in phrases if (encoding := known[phrase]) is not None]

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def _stored(self, phrase: str, tokens: bool) -> Encoding | None:
        with self._understood():
            found = self._base.execute("SELECT record FROM encodings WHERE key = ?", (self._key(phrase),))
            row = found.fetchone()
        if row is None:
            return None
        encoding = record.unpack(row[0], dim=self._vectorizer.dim, token_dim=self._vectorizer.token_dim)
        return None if encoding is None or (tokens and encoding.tokens is None) else encoding

    def _key(self, phrase: str) -> bytes:
        return record.key(self._vectorizer.fingerprint, phrase)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(
                f"{self._path}: found {error}, expected a table of vectors; delete the file, it will be made again"
            ) from error


def unit(vectors: FloatArray) -> FloatArray:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: FloatArray = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled


def principal_axes(vectors: FloatArray) -> FloatArray:
    """[dim, dim] directions of greatest variance, greatest first.

    They are applied without taking the mean off, as the compressing layer of a student applies them.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    descending: FloatArray = axes[:, ::-1].astype(np.float32)
    return descending


def _truncated(whole: Candidate, dim: int, dims: Sequence[int], desk: Desk) -> list[Candidate]:
    """The same vectorizer cut to each width below its own."""
    narrower = [width for width in dict.fromkeys(dims) if width < dim]
    if not narrower:
        return []
    phrases = [
        example.phrase
        for exam in EXAMS
        if exam.belongs(desk.settings.suite, sweep=True)
        for name, split in exam.needs
        if split == TRAIN
        for example in desk.of_labels(name, TRAIN, desk.sizes.per_label)
    ]
    axes = principal_axes(whole.vectors(phrases))
    return [
        Candidate(
            f"{whole.name}@{width}",
            whole.uncased,
            whole.encode,
            np.ascontiguousarray(axes[:, :width]),
            whole.name,
        )
        for width in narrower
    ]


# --- how much of each set is looked at


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a suite looks at; 0: all of it."""

    per_label: int  # training phrases of one intent
    train: int  # training phrases of tasks that are not intents
    tagged: int  # training phrases of token heads, all with a span
    dev: int
    test: int
    resamples: int
    timed: int  # phrases


SIZES: Mapping[str, Sizes] = {
    "quick": Sizes(per_label=16, train=2000, tagged=800, dev=500, test=500, resamples=300, timed=100),
    "full": Sizes(per_label=0, train=0, tagged=0, dev=0, test=0, resamples=1000, timed=400),
}


@dataclass(frozen=True)
class Desk:
    """What exams are prepared from. Draws go by position, so that cased and uncased phrases of a row stay together."""

    data: Path
    settings: Evaluate
    sizes: Sizes
    uncased: bool
    _read: dict[tuple[str, str], tuple[Example, ...]] = field(default_factory=dict, repr=False)

    def all(self, name: str, split: str) -> tuple[Example, ...]:
        """A whole split, read once."""
        if (name, split) not in self._read:
            loaded = datasets.read(name, split, self.data, uncased=self.uncased)
            self._read[name, split] = loaded.examples
        return self._read[name, split]

    def labelled(self, name: str, split: str, limit: int) -> list[Labelled]:
        """Rows of a labelled set, `limit` of them."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Labelled)]

    def tagged(self, name: str, split: str, limit: int) -> list[Tagged]:
        """Rows of a tagged set."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Tagged)]

    def scored(self, name: str, split: str, limit: int) -> list[Scored]:
        """Rows of a similarity set."""
        return [example for example in self._some(name, split, limit) if isinstance(example, Scored)]

    def of_labels(self, name: str, split: str, per_label: int) -> list[Labelled]:
        """`per_label` rows of each label, as they stand; 0: all."""
        rows = self.labelled(name, split, 0)
        if not per_label:
            return rows
        labels = np.array([row.labels[0] for row in rows])
        return [rows[i] for i in sorted(draw_shots(labels, per_label, _SEED).tolist())]

    def _some(self, name: str, split: str, limit: int) -> list[Example]:
        return some(self.all(name, split), limit)


def some(items: Sequence[T], limit: int) -> list[T]:
    """`limit` of the items by a fixed draw, in their order; 0: all."""
    if not limit or len(items) <= limit:
        return list(items)
    rows = np.random.default_rng(_SEED).permutation(len(items))[:limit]
    return [items[i] for i in np.sort(rows)]


def draw_shots(labels: NDArray[np.str_], shots: int, seed: int) -> Rows:
    """Rows of `shots` examples of each label (fewer where there are fewer), by label.

    A label's draw depends on seed and label alone, and fewer shots are the first of more.
    """
    chosen = []
    for label in np.unique(labels):
        rng = np.random.default_rng([seed, datasets.identity(str(label))])
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:shots])
    return np.concatenate(chosen)


def without(rows: Sequence[Labelled], test: Sequence[Labelled]) -> list[Labelled]:
    """Rows that are not in the test split, however they are cased."""
    seen = {row.phrase.casefold() for row in test}
    return [row for row in rows if row.phrase.casefold() not in seen]


# --- exams


Judge = Callable[[Candidate], list[Outcome]]


@dataclass(frozen=True, slots=True)
class Exam:
    """One data set with what is asked of it. `prepare` reads the data once; the judge it gives meets every candidate."""

    data: str
    language: str
    needs: tuple[tuple[str, str], ...]  # (set, split)
    prepare: Callable[[Desk], Judge]
    full_only: bool = False
    unseen: bool = False
    in_sweep: bool = False

    def belongs(self, suite: str, *, sweep: bool) -> bool:
        """Whether a suite, or a sweep of widths in it, has this exam."""
        return (suite == "full" or not self.full_only) and (self.in_sweep or not sweep)


def intents(
    data: str, language: str, *parts: str, dev: bool = False, outside: str = "", **options: bool
) -> Exam:
    """Intents with all data and with few shots, clean and under noise; `parts` have heads of their own, one table.

    With `outside`, the rows of that set that belong to no intent are to be told from the others.
    """
    splits = (TRAIN, DEV, TEST) if dev else (TRAIN, TEST)
    needs = [(part, split) for part in parts for split in splits] + [(outside, TEST)] * bool(outside)

    def prepare(desk: Desk) -> Judge:
        prepared = [_part(desk, part, len(parts), dev=dev) for part in parts]
        rows = desk.labelled(outside, TEST, 0) if outside else []
        strangers = some([row.phrase for row in rows if row.labels[0] == OUT_OF_SCOPE], desk.sizes.test)
        return partial(_judge_intents, desk.settings, prepared, strangers)

    return Exam(data, language, tuple(needs), prepare, in_sweep=True, **options)


@dataclass(frozen=True, slots=True)
class _Part:
    """An intent set ready for heads; `tests` holds the same phrases clean and under each noise."""

    train: tuple[str, ...]
    labels: NDArray[np.str_]
    dev: tuple[tuple[str, ...], NDArray[np.str_]] | None
    tests: Mapping[str, tuple[str, ...]]
    gold: NDArray[np.str_]


def _part(desk: Desk, name: str, parts: int, *, dev: bool) -> _Part:
    held_out = desk.labelled(name, TEST, 0)
    test = some(held_out, desk.sizes.test // parts)
    train = without(desk.of_labels(name, TRAIN, desk.sizes.per_label), held_out)
    tuned = desk.labelled(name, DEV, desk.sizes.dev) if dev else []
    phrases, gold = _phrases(test), _labels(test, name)
    return _Part(
        _phrases(train),
        _labels(train, name),
        (_phrases(tuned), _labels(tuned, name)) if dev else None,
        {_CLEAN: phrases} | under_noise(phrases, _phrases(train), desk.settings.noise, uncased=desk.uncased),
        gold,
    )


def under_noise(
    phrases: Sequence[str], known: Sequence[str], rate: float, *, uncased: bool
) -> dict[str, tuple[str, ...]]:
    """The phrases under each of NOISES, `rate` of the characters or words hit; recognisers mishear for words of `known`."""
    near = near_words(vocabulary(known, _NEAR_VOCABULARY))
    return {
        name: tuple(
            datasets.phrase_of(heard, uncased=uncased)
            or said  # hardly ever refused; then nothing was heard wrong
            for said, heard in zip(phrases, noisy(phrases, kind, rate, _SEED, near=near), strict=True)
        )
        for name, kind in NOISES.items()
    }


def _judge_intents(
    settings: Evaluate, parts: Sequence[_Part], strangers: Sequence[str], candidate: Candidate
) -> list[Outcome]:
    answers: dict[tuple[str, str], list[list[NDArray[np.str_]]]] = {}  # (shots, noise) -> parts -> draws
    scope: list[Outcome] = []
    for part in parts:
        train = candidate.vectors(part.train)
        tests = {noise: candidate.vectors(phrases) for noise, phrases in part.tests.items()}
        dev = None if part.dev is None else (candidate.vectors(part.dev[0]), part.dev[1])
        head = fit_head(train, part.labels, choose(train, part.labels, accuracy, dev))
        for noise, vectors in tests.items():
            answers.setdefault(("full", noise), []).append([head.predict(vectors)])
        # one choice for all numbers of shots: the draws are small, and the largest tells it best
        few = _choose_few(train, part.labels, max(settings.shots, default=0))
        for shots in settings.shots:
            drawn = [draw_shots(part.labels, shots, seed) for seed in range(settings.seeds)]
            heads = [fit_head(train[rows], part.labels[rows], few) for rows in drawn]
            for noise, vectors in tests.items():
                found = [head.predict(vectors) for head in heads]
                answers.setdefault((f"{shots}-shot", noise), []).append(found)
        if strangers:
            scope = _scope(head, train, tests[_CLEAN], candidate.vectors(strangers))
    gold = np.concatenate([part.gold for part in parts])
    outcomes: list[Outcome] = []
    for (heads_of, noise), by_part in answers.items():
        draws = [np.concatenate(draw) for draw in zip(*by_part, strict=True)]
        condition = f"{heads_of}, {noise}" if noise else heads_of
        outcomes.append(_accuracy(condition, gold, draws))
        if heads_of == "full":
            outcomes.append(
                Outcome(
                    "intents",
                    condition,
                    f"F{settings.f_beta:g}",
                    len(gold),
                    macro_f(gold, draws[0], settings.f_beta),
                )
            )
    return outcomes + scope


def _accuracy(condition: str, gold: NDArray[np.str_], draws: Sequence[NDArray[np.str_]]) -> Outcome:
    hits = np.array([draw == gold for draw in draws], np.float64)  # [draws, items]
    spread = float(hits.mean(axis=1).std(ddof=1)) if len(draws) > 1 else None
    return Outcome("intents", condition, "accuracy", len(gold), mean_of(hits.mean(axis=0)), spread)


def _choose_few(train: FloatArray, labels: NDArray[np.str_], shots: int) -> float:
    """The regularisation for few shots, on folds of the first draw; with one shot a label there is nothing to hold out."""
    if shots < 2:
        return REGULARISATIONS[-1]
    rows = draw_shots(labels, shots, 0)
    return choose(train[rows], labels[rows], accuracy)


def _scope(head: Any, train: FloatArray, inside: FloatArray, outside: FloatArray) -> list[Outcome]:
    """Is a phrase one of ours: by the head's confidence, and by the nearest training phrase."""
    both = np.concatenate([inside, outside])
    belongs = np.arange(len(both)) < len(inside)
    by = {"max softmax": head.predict_proba(both).max(axis=1), "max cosine": nearest(both, train)}
    return [
        Outcome("out of scope", name, "AUROC", len(both), auroc(scores.astype(np.float64), belongs))
        for name, scores in by.items()
    ]


def one_label(
    task: str,
    data: str,
    language: str,
    source: str,
    *,
    test: str = TEST,
    dev: bool = True,
    rename: Mapping[str, str] | None = None,
    **options: bool,
) -> Exam:
    """One label a phrase, macro-F1 over the labels."""
    splits = (TRAIN, DEV, test) if dev else (TRAIN, test)

    def prepare(desk: Desk) -> Judge:
        limits = {TRAIN: desk.sizes.train, DEV: desk.sizes.dev} | {test: desk.sizes.test}
        rows = {split: desk.labelled(source, split, limits[split]) for split in splits}
        rows[TRAIN] = without(rows[TRAIN], desk.labelled(source, test, 0))
        sheets = {split: (_phrases(found), _labels(found, "", rename)) for split, found in rows.items()}
        return partial(_judge_labels, task, sheets[TRAIN], sheets[DEV] if dev else None, sheets[test])

    return Exam(data, language, tuple((source, split) for split in splits), prepare, **options)


_Sheet = tuple[tuple[str, ...], NDArray[np.str_]]


def _judge_labels(
    task: str, train: _Sheet, dev: _Sheet | None, test: _Sheet, candidate: Candidate
) -> list[Outcome]:
    vectors = candidate.vectors(train[0])
    tuned = None if dev is None else (candidate.vectors(dev[0]), dev[1])
    head = fit_head(vectors, train[1], choose(vectors, train[1], f1, tuned))
    answers = head.predict(candidate.vectors(test[0]))
    return [Outcome(task, "full", "macro-F1", len(test[1]), macro_f(test[1], answers, 1.0))]


def emotions(data: str, language: str, source: str, **options: bool) -> Exam:
    """Rows with one emotion as one label each; and all rows, each emotion a yes or no with a threshold from dev."""
    splits = (TRAIN, DEV, TEST)

    def prepare(desk: Desk) -> Judge:
        limits = {TRAIN: desk.sizes.train, DEV: desk.sizes.dev, TEST: desk.sizes.test}
        rows = {split: desk.labelled(source, split, limits[split]) for split in splits}
        rows[TRAIN] = without(rows[TRAIN], desk.labelled(source, TEST, 0))
        return partial(_judge_emotions, rows)

    return Exam(data, language, tuple((source, split) for split in splits), prepare, **options)


def _judge_emotions(rows: Mapping[str, Sequence[Labelled]], candidate: Candidate) -> list[Outcome]:
    vectors = {split: candidate.vectors(_phrases(found)) for split, found in rows.items()}
    alone = {split: np.array([len(row.labels) == 1 for row in found]) for split, found in rows.items()}
    single = {
        split: _labels([row for row in found if len(row.labels) == 1], "") for split, found in rows.items()
    }
    dev = (vectors[DEV][alone[DEV]], single[DEV])
    c = choose(vectors[TRAIN][alone[TRAIN]], single[TRAIN], f1, dev)
    head = fit_head(vectors[TRAIN][alone[TRAIN]], single[TRAIN], c)
    answers = head.predict(vectors[TEST][alone[TEST]])
    names = sorted({label for found in rows.values() for row in found for label in row.labels})
    wanted = {
        split: np.array([[name in row.labels for name in names] for row in found])
        for split, found in rows.items()
    }
    scores = _each_label(vectors[TRAIN], wanted[TRAIN], [vectors[DEV], vectors[TEST]], c)
    limits = np.array(thresholds.fit_independent(scores[0], wanted[DEV], beta=1.0))
    return [
        Outcome("emotion", "one label", "macro-F1", len(answers), macro_f(single[TEST], answers, 1.0)),
        Outcome(
            "emotion",
            "all labels",
            "macro-F1",
            len(scores[1]),
            macro_f_of_many(wanted[TEST], scores[1] >= limits),
        ),
    ]


def _each_label(
    train: FloatArray, wanted: NDArray[np.bool_], others: Sequence[FloatArray], c: float
) -> list[FloatArray]:
    """Probability of each label by itself, [rows, labels] for each of `others`; 0 where training never saw it."""
    scores = [np.zeros((len(vectors), wanted.shape[1]), np.float32) for vectors in others]
    for label in range(wanted.shape[1]):
        if wanted[:, label].any() and not wanted[:, label].all():
            head = fit_head(train, wanted[:, label], c)
            for score, vectors in zip(scores, others, strict=True):
                score[:, label] = head.predict_proba(vectors)[:, 1]
    return scores


def spans(task: str, data: str, language: str, source: str, **options: bool) -> Exam:
    """Slots or entities through token vectors and the head that is served: exact spans, micro-F1."""

    def prepare(desk: Desk) -> Judge:
        train = desk.tagged(source, TRAIN, 0)
        if (
            desk.sizes.tagged
        ):  # two in three rows of WNUT-17 hold no entity: a few hundred at random teach nothing
            train = some([row for row in train if row.spans], desk.sizes.tagged)
        return partial(_judge_spans, task, train, desk.tagged(source, TEST, desk.sizes.test))

    return Exam(data, language, ((source, TRAIN), (source, TEST)), prepare, **options)


def _judge_spans(
    task: str, train: Sequence[Tagged], test: Sequence[Tagged], candidate: Candidate
) -> list[Outcome]:
    encodings = candidate.encode([row.phrase for row in train], True)
    phrases = [
        TaggedEncoding(row.phrase, encoding, tuple(Span(*span, 1.0) for span in row.spans))
        for row, encoding in zip(train, encodings, strict=True)
    ]
    tags = 2 * len({span.label for phrase in phrases for span in phrase.spans}) + 1
    with _fitting(sum(len(row.phrase.split()) for row in train) * 3 * _width(encodings) * tags):
        head = fit.fit_token(About(task, task, "0" * 64, made_by=__name__), phrases, seed=_SEED)
    counts = []
    for row, encoding in zip(test, candidate.encode([row.phrase for row in test], True), strict=True):
        found: set[tuple[str, int, int]] = set()
        if encoding.tokens is not None and encoding.offsets is not None:
            found = {span[:3] for span in head.decode(encoding.tokens, encoding.offsets)}
        counts.append((len(found & set(row.spans)), len(found), len(row.spans)))
    return [Outcome(task, "full", "span F1", len(test), span_f1(np.array(counts, np.float64)))]


def _width(encodings: Sequence[Encoding]) -> int:
    return next((encoding.tokens.shape[1] for encoding in encodings if encoding.tokens is not None), 0)


def similarity(data: str, language: str, source: str, **options: bool) -> Exam:
    """Spearman's correlation between cosines and how alike people found two sentences."""

    def prepare(desk: Desk) -> Judge:
        return partial(_judge_similarity, desk.scored(source, TEST, desk.sizes.test))

    return Exam(data, language, ((source, TEST),), prepare, in_sweep=True, **options)


def _judge_similarity(rows: Sequence[Scored], candidate: Candidate) -> list[Outcome]:
    one, other = candidate.vectors([row.a for row in rows]), candidate.vectors([row.b for row in rows])
    cosines = (unit(one) * unit(other)).sum(axis=1).astype(np.float64)
    gold = np.array([row.score for row in rows])
    return [Outcome("similarity", "cosine", "Spearman", len(rows), spearman(cosines, gold))]


def replies(data: str, language: str, source: str, **options: bool) -> Exam:
    """The next turn among CANDIDATES, by the cosine to the last turn of the context."""

    def prepare(desk: Desk) -> Judge:
        pairs = [example for example in desk.all(source, TEST) if isinstance(example, Pair)]
        wanted = min(desk.sizes.test or REPLIES, REPLIES)
        return partial(_judge_replies, choose_pairs(pairs, wanted))

    return Exam(data, language, ((source, TEST),), prepare, **options)


REPLIES = 2000  # pairs a full suite looks at, 20 rounds of CANDIDATES


def choose_pairs(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """Up to `limit` pairs in a fixed random order, no anchor and no reply twice: none has two right answers."""
    chosen: list[Pair] = []
    taken: set[str] = set()
    for i in np.random.default_rng(_SEED).permutation(len(pairs)):
        pair = pairs[i]
        if len(chosen) < limit and pair.anchor not in taken and pair.positive not in taken:
            taken |= {pair.anchor, pair.positive}
            chosen.append(pair)
    return chosen


def _judge_replies(pairs: Sequence[Pair], candidate: Candidate) -> list[Outcome]:
    anchors = unit(candidate.vectors([pair.anchor for pair in pairs]))
    positives = unit(candidate.vectors([pair.positive for pair in pairs]))
    hits = right_first(anchors, positives, CANDIDATES)
    return [Outcome("replies", f"1 of {CANDIDATES}", "R@1", len(hits), mean_of(hits))]


def _phrases(rows: Sequence[Labelled]) -> tuple[str, ...]:
    return tuple(row.phrase for row in rows)


def _labels(rows: Sequence[Labelled], part: str, rename: Mapping[str, str] | None = None) -> NDArray[np.str_]:
    """First labels; of several parts in one table, each with its part's name, because heads do not share labels."""
    first = [(rename or {}).get(row.labels[0], row.labels[0]) for row in rows]
    return np.array([f"{part}/{label}" for label in first] if part else first, np.str_)


EXAMS: tuple[Exam, ...] = (
    intents("clinc150", "en", "clinc150", dev=True, outside="clinc150.full"),
    intents("banking77", "en", "banking77"),
    intents("hint3", "en", "hint3.curekart", "hint3.powerplay11", "hint3.sofmattress", unseen=True),
    intents("home_assistant.en", "en", "home_assistant_intents.en", full_only=True),
    emotions("goemotions", "en", "goemotions"),
    one_label("toxicity", "davidson", "en", "davidson_hate_offensive", rename=_TOXICITY),
    spans("slots", "snips", "en", "snips.slots"),
    spans("entities", "wnut17", "en", "wnut17"),
    similarity("stsb.en", "en", "stsb.en"),
    replies("self_dialogue", "en", "self_dialogue.replies"),
    intents("home_assistant.ru", "ru", "home_assistant_intents.ru"),
    one_label("toxicity", "detox", "ru", "ru_toxicity_detox", test=DEV, dev=False, full_only=True),
    spans("entities", "factrueval2016", "ru", "factrueval2016", full_only=True),
    similarity("stsb.ru", "ru", "stsb.ru"),
    replies("movie_dialogs", "ru", "ru_movie_dialogs", full_only=True),
)


# --- light heads


def fit_head(train: FloatArray, labels: NDArray[Any], c: float) -> Any:
    """Multinomial logistic regression, as scikit-learn has it."""
    head = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS, tol=_TOLERANCE)
    with _fitting(train.size * len(np.unique(labels))):
        return head.fit(train, labels)


def choose(
    train: FloatArray,
    labels: NDArray[np.str_],
    metric: Metric,
    dev: tuple[FloatArray, NDArray[np.str_]] | None = None,
) -> float:
    """The regularisation that answers dev phrases best, or held-out folds where there is no dev; ties go to the stronger."""
    if dev is not None:
        found = _along(train, labels, dev[0])
        scores = [metric(dev[1], answers) for answers in found]
    else:
        folds = deal(labels, FOLDS)
        every = np.empty((len(REGULARISATIONS), len(labels)), labels.dtype)
        for fold in np.unique(folds):
            inside = folds != fold
            every[:, ~inside] = _along(train[inside], labels[inside], train[~inside])
        scores = [metric(labels, answers) for answers in every]
    return REGULARISATIONS[int(np.argmax(scores))]


def _along(train: FloatArray, labels: NDArray[np.str_], held_out: FloatArray) -> list[NDArray[np.str_]]:
    """Answers to held-out phrases at each of REGULARISATIONS."""
    head = LogisticRegression(max_iter=_MAX_ITERATIONS, tol=_TOLERANCE, warm_start=True)
    answers = []
    with _fitting(train.size * len(np.unique(labels))):
        for c in REGULARISATIONS:
            answers.append(head.set_params(C=c).fit(train, labels).predict(held_out))
    return answers


def deal(labels: NDArray[np.str_], folds: int) -> Rows:
    """A fold for each row, each label dealt out evenly; a label with one row is in no other fold's training."""
    dealt = np.zeros(len(labels), np.int64)
    rng = np.random.default_rng(_SEED)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        dealt[rng.permutation(rows)] = np.arange(len(rows)) % folds
    return dealt


_LARGE = 5 * 10**8  # multiplications a step; the quick suite stays below


@contextmanager
def _fitting(size: int) -> Iterator[None]:
    """No warnings of lbfgs at its limit, which has long stopped moving held-out answers, and no idle threads.

    Below some size a team of BLAS threads costs more than it saves; on a busy machine, tenfold.
    """
    with warnings.catch_warnings(), _pools().limit(limits=None if size >= _LARGE else 1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


# --- numbers


def accuracy(gold: NDArray[np.str_], predicted: NDArray[np.str_]) -> float:
    """Share of right answers."""
    return float((gold == predicted).mean())


def f1(gold: NDArray[np.str_], predicted: NDArray[np.str_]) -> float:
    """Macro-F1."""
    return macro_f(gold, predicted, 1.0)(np.arange(len(gold)))


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """The mean of one value a row."""
    return lambda rows: float(values[rows].mean())


def macro_f(gold: NDArray[np.str_], predicted: NDArray[np.str_], beta: float) -> Statistic:
    """Mean F-beta over the labels that are in the gold rows."""
    names, codes = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    wanted, proposed = codes[: len(gold)], codes[len(gold) :]
    right = wanted == proposed

    def statistic(rows: Rows) -> float:
        hits = np.bincount(wanted[rows][right[rows]], minlength=len(names))
        positives = np.bincount(wanted[rows], minlength=len(names))
        return _mean_f(hits, positives, np.bincount(proposed[rows], minlength=len(names)), beta)

    return statistic


def macro_f_of_many(wanted: NDArray[np.bool_], proposed: NDArray[np.bool_]) -> Statistic:
    """Mean F1 over the labels that are in the gold rows, [rows, labels] each."""
    hits = wanted & proposed
    return lambda rows: _mean_f(hits[rows].sum(0), wanted[rows].sum(0), proposed[rows].sum(0), 1.0)


def _mean_f(
    hits: NDArray[np.int64], positives: NDArray[np.int64], proposed: NDArray[np.int64], beta: float
) -> float:
    present = positives > 0
    scores = (1 + beta**2) * hits[present] / (beta**2 * positives[present] + proposed[present])
    return float(scores.mean()) if len(scores) else 0.0


def span_f1(counts: NDArray[np.float64]) -> Statistic:
    """Micro-F1 from (right, found, wanted) of each phrase."""

    def statistic(rows: Rows) -> float:
        right, found, wanted = counts[rows].sum(axis=0)
        return float(2 * right / (found + wanted)) if found + wanted else 0.0

    return statistic


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> Statistic:
    """Chance that a positive row scores above a negative one (Mann and Whitney 1947); 0.5 where one kind is missing."""

    def statistic(rows: Rows) -> float:
        chosen = positive[rows]
        count = int(chosen.sum())
        if not 0 < count < len(rows):
            return 0.5
        ranks = float(rankdata(scores[rows])[chosen].sum())
        return (ranks - count * (count + 1) / 2) / (count * (len(rows) - count))

    return statistic


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> Statistic:
    """Correlation of ranks, ties at their mean; 0 where one side does not vary."""

    def statistic(rows: Rows) -> float:
        a, b = (rankdata(values[rows]) for values in (one, other))
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
        return float((a * b).sum()) / norm if norm else 0.0

    return statistic


def right_first(anchors: FloatArray, positives: FloatArray, candidates: int) -> NDArray[np.float64]:
    """1 for each anchor whose own positive is nearest among a round's; rounds of `candidates`, a smaller rest dropped."""
    rounds = range(0, max(1, len(anchors) // candidates) * candidates, candidates)
    hits = [
        (cosines := anchors[i : i + candidates] @ positives[i : i + candidates].T).argmax(axis=1)
        == np.arange(len(cosines))
        for i in rounds
    ]
    return np.concatenate(hits).astype(np.float64)


def nearest(vectors: FloatArray, known: FloatArray) -> FloatArray:
    """Greatest cosine of each row to any known one; in pieces, because all of CLINC150 would take 400 MB."""
    pieces = [(vectors[i : i + 512] @ known.T).max(axis=1) for i in range(0, len(vectors), 512)]
    return np.concatenate(pieces)


# --- size and speed


def _cost(
    columns: Sequence[Column], vectorizers: Sequence[Vectorizer], desks: Mapping[bool, Desk], sizes: Sizes
) -> list[Line]:
    phrases = [
        [row.phrase for row in desks[vectorizer.spec.uncased].labelled(_TIMED, TEST, sizes.timed)]
        for vectorizer in vectorizers
    ]
    taken = time_each([vectorizer.encode for vectorizer in vectorizers], phrases)
    size = tuple(Score(column.bytes / 1e6) for column in columns)
    medians = [
        Outcome("cost", "one thread", "ms per phrase", len(times), median_of(times)) for times in taken
    ]
    return [
        Line("cost", "", "", "on disk", "MB", 0, False, size),
        Line(
            "cost",
            "clinc150",
            "",
            "one thread",
            "ms per phrase",
            len(taken[0]),
            False,
            compare(medians, sizes.resamples),
        ),
    ]


def median_of(values: NDArray[np.float64]) -> Statistic:
    """The median of one value a row."""
    return lambda rows: float(np.median(values[rows]))


def time_each(
    encoders: Sequence[Callable[..., Any]],
    phrases: Sequence[Sequence[str]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[NDArray[np.float64]]:
    """Milliseconds of each encoder on each of its phrases, alone and without token vectors.

    Encoders take turns phrase by phrase, and turns at going first, so that whatever else the machine does hits all
    alike and their ratio holds; of several passes a phrase keeps its fastest.
    """
    count = len(phrases[0])
    best = np.full((len(encoders), count), np.inf)
    for number in range(_TIMING_PASSES):
        for i in range(count):
            for turn in range(len(encoders)):
                which = (turn + i + number) % len(encoders)
                began = clock()
                encoders[which]([phrases[which][i]], tokens=False)
                best[which, i] = min(best[which, i], 1000 * (clock() - began))
    return list(best)


# --- how it is shown


def write(evaluation: Evaluation, out: Path) -> tuple[Path, ...]:
    """evaluation.json, evaluation.md and evaluation.png into a folder; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = tuple(out / name for name in REPORT_FILES)
    paths[0].write_text(
        json.dumps(as_json(evaluation), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    paths[1].write_text(markdown(evaluation), encoding="utf-8")
    figure(evaluation).savefig(paths[2], dpi=120)
    return paths


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON types."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(evaluation)))
    return plain


_LANGUAGES = {"en": "English", "ru": "Russian", "": "Cost"}


def by_language(evaluation: Evaluation) -> dict[str, list[Line]]:
    """Lines under English, Russian and Cost, in that order."""
    groups = {
        title: [line for line in evaluation.lines if line.language == code]
        for code, title in _LANGUAGES.items()
    }
    return {title: lines for title, lines in groups.items() if lines}


def table(evaluation: Evaluation) -> Table:
    """For the terminal. Green and red: the interval of the change from the first column leaves out 0."""
    found = Table(
        *("task", "data", "condition", "metric", "n"),
        *(column.name for column in evaluation.columns),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for title, lines in by_language(evaluation).items():
        found.add_row(Text(title, style="bold"))
        for line in lines:
            cells = [_cell(line, i) for i in range(len(line.scores))]
            found.add_row(line.task, _data(line), line.condition, line.metric, str(line.items or ""), *cells)
    return found


def markdown(evaluation: Evaluation) -> str:
    """The same table for a document, with what it was made from."""
    text = [f"# Evaluation, suite {evaluation.suite}", ""]
    for column in evaluation.columns:
        text.append(
            f"- {column.name}: `{column.fingerprint[:12]}`, {column.width} dimensions, {column.precision}"
        )
    text += ["", "Brackets: 95 % intervals (bootstrap over test rows); ±: standard deviation over draws;"]
    text += ["▲ ▼: above or below the first column on the same rows, its interval leaving out 0.", ""]
    for title, lines in by_language(evaluation).items():
        header = ["task", "data", "condition", "metric", "n", *(column.name for column in evaluation.columns)]
        text += [f"## {title}", "", _row(header), _row(["---"] * len(header))]
        for line in lines:
            cells = [_cell(line, i).plain for i in range(len(line.scores))]
            text.append(
                _row([line.task, _data(line), line.condition, line.metric, str(line.items or ""), *cells])
            )
        text.append("")
    return "\n".join(text)


def figure(evaluation: Evaluation) -> Figure:
    """Every quality line with its interval, English and Russian apart; for a sweep, numbers over widths."""
    if any(column.width < column.dim for column in evaluation.columns):
        return _sweep_figure(evaluation)
    groups = {title: lines for title, lines in by_language(evaluation).items() if title != "Cost"}
    rows = sum(map(len, groups.values()))
    drawn = Figure(figsize=(10, 2.0 + 0.28 * rows), layout="constrained")
    grid = drawn.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(lines) for lines in groups.values()]
    )
    for axes, (title, lines) in zip(grid[:, 0], groups.items(), strict=True):
        _bars(axes, title, lines, [column.name for column in evaluation.columns])
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return drawn


def _bars(axes: Axes, title: str, lines: Sequence[Line], names: Sequence[str]) -> None:
    places = np.arange(len(lines))
    for i, name in enumerate(names):
        scores = [line.scores[i] for line in lines]
        values = np.array([score.value for score in scores])
        low = values - [score.value if score.low is None else score.low for score in scores]
        high = [score.value if score.high is None else score.high for score in scores] - values
        shift = (i - (len(names) - 1) / 2) * 0.7 / len(names)
        axes.errorbar(
            *(values, places + shift),
            xerr=np.maximum(0.0, [low, high]),
            fmt="o",
            markersize=3,
            linewidth=1,
            label=name,
        )
    axes.set_yticks(places, [f"{line.task} {_data(line)}, {line.condition}, {line.metric}" for line in lines])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=9)


def _sweep_figure(evaluation: Evaluation) -> Figure:
    shown = [
        line
        for line in evaluation.lines
        if line.metric in ("accuracy", "Spearman") and "," not in line.condition
    ]
    wide = 4
    drawn = Figure(figsize=(14, 3.2 * math.ceil(len(shown) / wide)), layout="constrained")
    grid = drawn.subplots(math.ceil(len(shown) / wide), wide, squeeze=False).ravel()
    for axes, line in zip(grid, shown, strict=False):
        for folder in dict.fromkeys(column.folder for column in evaluation.columns):
            points = sorted(
                (column.width, score.value)
                for column, score in zip(evaluation.columns, line.scores, strict=True)
                if column.folder == folder
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=Path(folder).name)
        axes.set_title(f"{_data(line)}, {line.condition}, {line.metric}", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    grid[0].legend(fontsize=7)
    return drawn


def _data(line: Line) -> str:
    return f"{line.data} (unseen)" if line.unseen else line.data


def _cell(line: Line, column: int) -> Text:
    score = line.scores[column]
    if not line.higher_is_better:
        first = line.scores[0]
        ratio = f" ({score.value / first.value:.2f}x)" if column and first.value else ""
        return Text(f"{score.value:.2f}{ratio}")
    margin = ""
    if score.spread is not None:
        margin = f" ±{score.spread:.3f}"
    elif score.low is not None and score.high is not None:
        margin = f" [{score.low:.3f} {score.high:.3f}]"
    mark, style = {1: (" ▲", "green"), -1: (" ▼", "red"), 0: ("", "")}[score.verdict]
    return Text(f"{score.value:.3f}{margin}{mark}", style=style)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
