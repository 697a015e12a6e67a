"""What is wrong with labelled phrases, found before anything is trained on them, by file and line."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from annotators.answers import Answers
from annotators.fit import Plan, learn
from annotators.fit_token import FOLDS
from annotators.learners import LinearLearner
from nlu.heads.config import HeadConfig
from nlu.heads.data import Dataset, Finding, Row
from nlu.heads.material import Material, Materials
from nlu.heads.report import script, scripts
from nlu.types import Turn

FEW = 10  # phrases, under which a label is hard to learn and harder to measure
NEAR = 0.97  # cosine, from which two phrases say the same in all but name
_SHOWN = 5  # places a finding names
_MIXED = 0.02
_LONG = 40  # words
_AT_ONCE = 1024  # rows whose cosines are in memory


def texts(data: Dataset, config: HeadConfig) -> list[Finding]:
    """What the texts and labels alone show."""
    checks = (
        _empty, _spans, _twins, _leaks, _conflicts, _small, _unknown, _strangers, _scripts, _lengths, _borders,
    )  # fmt: skip
    return [finding for one in checks for finding in one(data, config)]


def vectors(materials: Materials, config: HeadConfig) -> list[Finding]:
    """What the vectors show: phrases of different splits that say the same, and labels that look wrong."""
    found = list(_near(materials, config))
    if config.kind in ("sentence", "boosted", "anchors") and not config.multi:
        found += _doubtful(materials, config)
    return found


def _empty(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    if config.kind != "rules" and not data.split("train"):
        yield Finding(
            "error",
            "nothing to learn from",
            "train",
            "no labelled row",
            "name a file with --data, or mark rows with split train",
        )


def _spans(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    """What a token head needs; it learns from dev too, because its thresholds come from folds."""
    train = data.split("train")
    if config.kind != "token" or not train:
        return
    if not any(row.marks for row in train):
        yield Finding(
            "error", "no spans", "train", f"none in {len(train)} rows", "mark some, such as [six](time)"
        )
    if (rows := len(train) + len(data.split("dev"))) < 2 * FOLDS:
        yield Finding("error", "too few rows", "train", str(rows), f"add rows, at least {2 * FOLDS}")


def _twins(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    for split in ("train", "dev", "test"):
        rows = [row for row in data.rows if row.split == split]
        twins = [group for group in _twinned(rows, config) if len(group) > 1]
        count = sum(len(group) - 1 for group in twins)
        if count:
            yield Finding(
                "note",
                f"duplicates in {split}",
                _places([group[-1] for group in twins]),
                f"{count} rows that are there already",
                "drop them, or leave them where they count as frequency",
            )


def _leaks(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    """The same words in two splits, whatever the punctuation: what was learnt by heart is not measured."""
    for split, others in (("dev", ("train",)), ("test", ("train", "dev"))):
        seen = {_canonical(row, config): row for row in data.rows if row.split in others}
        leaked = [row for row in data.rows if row.split == split and _canonical(row, config) in seen]
        if leaked:
            pairs = [f"{row.where} = {seen[_canonical(row, config)].where}" for row in leaked[:_SHOWN]]
            there = " or ".join(others)
            yield Finding(
                "warning",
                f"leakage from {there} to {split}",
                ", ".join(pairs) + _more(leaked),
                f"{len(leaked)} phrases of {split} that are in {there}",
                f"drop them from {there}; {split} measures them too kindly",
            )


def _conflicts(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    if config.kind == "token":
        return
    for group in _twinned(data.rows, config):
        labels = {row.labels for row in group}
        if len(labels) > 1:
            named = " and ".join(", ".join(each) or "no label" for each in sorted(labels))
            yield Finding(
                "warning",
                "conflicting labels",
                _places(group),
                f"{group[0].phrase!r} as {named}",
                "decide for one",
            )


def _small(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    counts = Counter(name for row in data.split("train") for name in _names(row, config))
    least = 1 if config.kind in ("anchors", "token") else 2
    for label, count in sorted(counts.items()):
        if count < least:
            yield Finding(
                "error",
                "label too small",
                "train",
                f"{count} phrase of {label!r}",
                f"add phrases, at least {least}, or drop the label",
            )
    few = sorted(
        (label for label, count in counts.items() if least <= count < FEW), key=lambda label: counts[label]
    )
    if few and config.kind != "anchors":
        shown = ", ".join(f"{label} ({counts[label]})" for label in few[:_SHOWN])
        yield Finding(
            "warning",
            "labels with few phrases",
            "train",
            f"{shown}{_more(few)}",
            f"add phrases, {FEW} or more" + (", or train kind anchors" if config.kind != "token" else ""),
        )
    if config.kind not in ("anchors", "token") and len(counts) == 1 and not config.multi:
        yield Finding(
            "error",
            "one label alone",
            "train",
            repr(next(iter(counts))),
            "add phrases of another label, or train kind anchors",
        )


def _unknown(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    known = {name for row in data.split("train") for name in _names(row, config)}
    for split in ("dev", "test"):
        strange = [row for row in data.split(split) if set(_names(row, config)) - known]
        if strange and known:
            names = sorted({name for row in strange for name in _names(row, config)} - known)
            yield Finding(
                "warning",
                f"labels of {split} that train does not have",
                _places(strange),
                ", ".join(names[:_SHOWN]) + _more(names),
                "add training phrases, or rename the labels",
            )


def _strangers(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    if config.kind in ("sentence", "anchors") and not config.multi and config.outside == "given":
        if not any(not row.labels for row in data.rows if row.split == "train"):
            yield Finding(
                "note",
                "no out-of-scope phrases",
                "train",
                "none",
                f"label some {config.outside_labels[0]!r}, or pass --outside-from labels; without either the head cannot say that a phrase is none of its own",
            )


def _scripts(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    found = scripts(data.rows) if data.rows else {}
    main = next(iter(found), "")
    others = {name: part for name, part in found.items() if name not in (main, "none")}
    if others:
        strange = [row for row in data.rows if script(row.phrase) in others]
        shown = ", ".join(f"{name} {part:.1%}" for name, part in found.items())
        severity = "note" if min(others.values()) >= _MIXED else "warning"
        yield Finding(
            severity, "mixed scripts", _places(strange), shown, "check that these rows are meant to be here"
        )


def _lengths(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    long = [row for row in data.rows if len(row.phrase.split()) > _LONG]
    if long:
        yield Finding(
            "note",
            "long texts",
            _places(long),
            f"{len(long)} rows of more than {_LONG} words",
            "check that each is one turn of speech",
        )


def _borders(data: Dataset, config: HeadConfig) -> Iterator[Finding]:
    """Spans that begin or end inside a word are seldom meant."""
    inside = [
        row
        for row in data.rows
        for mark in row.marks
        if (mark.start and row.phrase[mark.start - 1].isalnum() and row.phrase[mark.start].isalnum())
        or (
            mark.end < len(row.phrase)
            and row.phrase[mark.end - 1].isalnum()
            and row.phrase[mark.end].isalnum()
        )
    ]
    if inside:
        yield Finding(
            "warning",
            "spans that cut a word",
            _places(inside),
            f"{len(inside)} spans",
            "move their offsets to the word's borders",
        )


def _near(materials: Materials, config: HeadConfig) -> Iterator[Finding]:
    train = materials.train
    said = {_canonical(row, config) for row in train.rows}
    for split, part in (("dev", materials.dev), ("test", materials.test)):
        if not len(part) or not len(train):
            continue
        nearest, cosines = _nearest(part, train)
        close = [
            int(i)
            for i in np.argsort(-cosines, kind="stable")
            if cosines[i] >= NEAR and _canonical(part.rows[i], config) not in said
        ]
        if close:
            pairs = [f"{part.rows[i].where} ~ {train.rows[nearest[i]].where}" for i in close[:_SHOWN]]
            yield Finding(
                "note",
                f"near-duplicates of train in {split}",
                ", ".join(pairs) + _more(close),
                f"{len(close)} phrases with a cosine of {NEAR} or more",
                f"drop them from train where {split} should be new",
            )


def _nearest(part: Material, train: Material) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[rows] the training row that each row is nearest to, and their cosine; never all pairs at once."""
    known = train.vectors.T
    found = []
    for chunk in np.array_split(part.vectors, -(-len(part) // _AT_ONCE)):
        cosines = chunk @ known
        found.append((cosines.argmax(axis=1), cosines.max(axis=1)))
    return np.concatenate([best for best, _ in found]), np.concatenate([cosine for _, cosine in found])


def _doubtful(materials: Materials, config: HeadConfig) -> list[Finding]:
    """Rows whose label the other rows speak against (confident learning, Northcutt et al. 2021, by cleanlab)."""
    train = materials.train
    counts = Counter(row.labels for row in train.rows)
    if len(counts) < 2 or min(counts.values()) < FEW:  # so few rows say nothing about each other
        return []
    from cleanlab.filter import find_label_issues

    answers = Answers.of([row.labels for row in train.rows])
    learnt = learn(train.vectors, answers, Plan(learner=LinearLearner((8.0,)), seed=config.seed))
    order: NDArray[np.int64] = find_label_issues(
        answers.codes, learnt.scores.astype(np.float64), return_indices_ranked_by="self_confidence", n_jobs=1
    )
    if not len(order):
        return []
    shown = [
        f"{train.rows[i].where} {train.rows[i].phrase!r} is {train.rows[i].labels[0]}, rather {answers.names[int(learnt.scores[i].argmax())]}"
        for i in order[:_SHOWN]
    ]
    return [
        Finding(
            "warning",
            "labels that look wrong",
            "; ".join(shown) + _more(order.tolist()),
            f"{len(order)} of {len(train)} rows",
            "look at them, worst first",
        )
    ]


def _names(row: Row, config: HeadConfig) -> tuple[str, ...]:
    """What a row teaches."""
    return tuple(mark.label for mark in row.marks) if config.kind == "token" else row.labels


def _twinned(rows: Sequence[Row], config: HeadConfig) -> list[list[Row]]:
    """The rows in groups of those that say the same, as far as the head can see."""
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_before(row, config), row.phrase].append(row)
    return list(groups.values())


def _canonical(row: Row, config: HeadConfig) -> tuple[object, str]:
    """What is left of a row when punctuation and spacing do not count."""
    return _before(row, config), row.phrase.casefold().translate(_WORDS_ALONE)


class _WordsAlone(dict[int, int | None]):
    """For str.translate: no punctuation, no space. A character's category is looked up once."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZ" else code
        return self[code]


_WORDS_ALONE = _WordsAlone()


def _before(row: Row, config: HeadConfig) -> tuple[Turn, ...]:
    """The turns before, where the head reads them."""
    return row.context if config.kind == "context" else ()


def _places(rows: Sequence[Row]) -> str:
    return ", ".join(row.where for row in rows[:_SHOWN]) + _more(rows)


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
