"""What is asked of a vectorizer: each exam is a public set and a task on it; EXAMS is the list of everything measured.

An exam reads its data once and gives a judge, which meets every candidate: it fits light heads on the candidate's vectors
of the train split, never on a phrase of the test split, and says what they did with the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Span
from annotators.fit import About
from annotators.fit_token import TaggedEncoding, fit_token
from nlu.public_data import Labelled, Tagged
from nlu.training import datasets, probe
from nlu.training.augment import near_words, noisy, vocabulary
from nlu.training.candidate import Candidate, unit
from nlu.training.config import Evaluate
from nlu.training.datasets import DEV, OUT_OF_SCOPE, TEST, TRAIN, Pair, Scored
from nlu.training.desk import SEED, Desk, choose_pairs, draw_shots, some, without
from nlu.training.measures import (
    FloatArray,
    accuracy,
    auroc,
    f1,
    macro_f,
    macro_f_of_many,
    mean_of,
    nearest,
    right_first,
    span_f1,
    spearman,
)
from nlu.training.probe import REGULARISATIONS, Probe
from nlu.training.scores import Outcome

Judge = Callable[[Candidate], list[Outcome]]

NOISES = {"typos": "keyboard", "misheard": "recogniser"}  # how rows call it -> the kind in augment
CANDIDATES = 100  # replies to choose one from
REPLIES = 2000  # pairs a full suite looks at, 20 rounds of CANDIDATES
_CLEAN = ""
_NEAR_VOCABULARY = 20_000
_TOXICITY = {"hate": "toxic", "offensive": "toxic", "neither": "acceptable"}


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


# --- intents


def intents(
    data: str, language: str, *parts: str, dev: bool = False, outside: str = "", **options: bool
) -> Exam:
    """Intents with all data and with few shots, clean and under noise; `parts` have heads of their own, one table.

    Heads learn from clean phrases alone. With `outside`, the rows of that set that belong to no intent are to be told
    from the others.
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
            for said, heard in zip(phrases, noisy(phrases, kind, rate, SEED, near=near), strict=True)
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
        head = probe.tune(train, part.labels, accuracy, dev)
        for noise, vectors in tests.items():
            answers.setdefault(("full", noise), []).append([head.predict(vectors)])
        # one choice for all numbers of shots: the draws are small, and the largest tells it best
        few = _choose_few(train, part.labels, max(settings.shots, default=0))
        for shots in settings.shots:
            drawn = [draw_shots(part.labels, shots, seed) for seed in range(settings.seeds)]
            heads = [probe.fit(train[rows], part.labels[rows], few) for rows in drawn]
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
            statistic = macro_f(gold, draws[0], settings.f_beta)
            outcomes.append(Outcome("intents", condition, f"F{settings.f_beta:g}", len(gold), statistic))
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
    return probe.choose(train[rows], labels[rows], accuracy)


def _scope(head: Probe, train: FloatArray, inside: FloatArray, outside: FloatArray) -> list[Outcome]:
    """Is a phrase one of ours: by the head's confidence, and by the nearest training phrase."""
    both = np.concatenate([inside, outside])
    belongs = np.arange(len(both)) < len(inside)
    by = {"max softmax": head.confidence(both), "max cosine": nearest(both, train)}
    return [
        Outcome("out of scope", name, "AUROC", len(both), auroc(scores.astype(np.float64), belongs))
        for name, scores in by.items()
    ]


# --- labels of other kinds


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
    tuned = None if dev is None else (candidate.vectors(dev[0]), dev[1])
    head = probe.tune(candidate.vectors(train[0]), train[1], f1, tuned)
    answers = head.predict(candidate.vectors(test[0]))
    return [Outcome(task, "full", "macro-F1", len(test[1]), macro_f(test[1], answers, 1.0))]


def many_labels(
    task: str, data: str, language: str, source: str, *, alone: bool = False, train: int = 0, **options: bool
) -> Exam:
    """Any number of labels a phrase, each a yes or no with a threshold from dev; macro-F1 over the labels.

    With `alone`, also the rows with one label only, as `one_label` takes them. `train` caps the training phrases of sets
    that repeat themselves, by a fixed draw, and the line says so; 0: all.
    """
    splits = (TRAIN, DEV, TEST)

    def prepare(desk: Desk) -> Judge:
        most = min(desk.sizes.train or train, train or desk.sizes.train)
        limits = {TRAIN: most, DEV: desk.sizes.dev, TEST: desk.sizes.test}
        rows = {split: desk.labelled(source, split, limits[split]) for split in splits}
        rows[TRAIN] = without(rows[TRAIN], desk.labelled(source, TEST, 0))
        condition = f"all labels, {train:,} train" if train else "all labels"
        return partial(_judge_many, task, condition, rows, alone)

    return Exam(data, language, tuple((source, split) for split in splits), prepare, **options)


def _judge_many(
    task: str,
    condition: str,
    rows: Mapping[str, Sequence[Labelled]],
    alone: bool,
    candidate: Candidate,
) -> list[Outcome]:
    vectors = {split: candidate.vectors(_phrases(found)) for split, found in rows.items()}
    names = sorted({label for found in rows.values() for row in found for label in row.labels})
    wanted = {
        split: np.array([[name in row.labels for name in names] for row in found])
        for split, found in rows.items()
    }
    head, limits = probe.tune_each(vectors[TRAIN], wanted[TRAIN], vectors[DEV], wanted[DEV])
    found = head.chances(vectors[TEST]) >= limits
    whole = Outcome(task, condition, "macro-F1", len(found), macro_f_of_many(wanted[TEST], found))
    return [*(_judge_alone(task, rows, vectors) if alone else ()), whole]


def _judge_alone(
    task: str, rows: Mapping[str, Sequence[Labelled]], vectors: Mapping[str, FloatArray]
) -> list[Outcome]:
    one = {split: np.array([len(row.labels) == 1 for row in found]) for split, found in rows.items()}
    labels = {
        split: _labels([row for row in found if len(row.labels) == 1], "") for split, found in rows.items()
    }
    head = probe.tune(vectors[TRAIN][one[TRAIN]], labels[TRAIN], f1, (vectors[DEV][one[DEV]], labels[DEV]))
    answers = head.predict(vectors[TEST][one[TEST]])
    return [Outcome(task, "one label", "macro-F1", len(answers), macro_f(labels[TEST], answers, 1.0))]


# --- spans


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
    head = fit_token(About(task, task, "0" * 64, made_by=__name__), phrases, seed=SEED).head
    counts = []
    for row, encoding in zip(test, candidate.encode([row.phrase for row in test], True), strict=True):
        found: set[tuple[str, int, int]] = set()
        if encoding.tokens is not None and encoding.offsets is not None:
            found = {span[:3] for span in head.decode(encoding.tokens, encoding.offsets)}
        counts.append((len(found & set(row.spans)), len(found), len(row.spans)))
    return [Outcome(task, "full", "span F1", len(test), span_f1(np.array(counts, np.float64)))]


# --- without heads


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
    intents("mcid", "en", "mcid", dev=True, full_only=True, unseen=True),
    intents("home_assistant.en", "en", "home_assistant_intents.en", full_only=True),
    many_labels("emotion", "goemotions", "en", "goemotions", alone=True),
    one_label("toxicity", "davidson", "en", "davidson_hate_offensive", rename=_TOXICITY),
    many_labels("dialog acts", "sgd", "en", "sgd.acts", train=10_000, full_only=True),
    spans("slots", "snips", "en", "snips.slots"),
    spans("entities", "wnut17", "en", "wnut17"),
    similarity("stsb.en", "en", "stsb.en"),
    replies("self_dialogue", "en", "self_dialogue.replies"),
    replies("topical_chat", "en", "topical_chat.replies", full_only=True),
    intents("home_assistant.ru", "ru", "home_assistant_intents.ru"),
    one_label("toxicity", "detox", "ru", "ru_toxicity_detox", test=DEV, dev=False, full_only=True),
    spans("entities", "factrueval2016", "ru", "factrueval2016", full_only=True),
    similarity("stsb.ru", "ru", "stsb.ru"),
    replies("movie_dialogs", "ru", "ru_movie_dialogs", full_only=True),
)
