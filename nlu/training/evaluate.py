"""Which vectorizer is better, and is it so beyond chance: folders side by side through light heads on frozen vectors.

    nlu vectorizer evaluate OURS TEACHER --suite quick

Read `evaluate` first, then EXAMS in exams.py, the list of everything that is measured. Folders are loaded as they are
served, so what is measured is what is served. Heads learn from train splits, choose their regularisation on dev splits or
folds, and meet a test split once. Vectors are kept on disk: only new phrases are ever encoded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from nlu.training import datasets
from nlu.training.candidate import Candidate, truncated
from nlu.training.config import Evaluate
from nlu.training.cost import TIMED, cost
from nlu.training.datasets import TEST, TRAIN
from nlu.training.desk import SEED, SIZES, Desk
from nlu.training.exams import EXAMS, Exam, Judge
from nlu.training.scores import Column, Evaluation, Line, Outcome, compare
from nlu.vector_store import VectorStore
from nlu.vectorizer import MODEL_FILE, SPEC_FILE, TOKENIZER_FILE, Vectorizer

Progress = Callable[[str, int, int], None]

STORE = Path(".cache/vectors")


def evaluate(
    folders: Sequence[Path],
    data: Path,
    settings: Evaluate | None = None,
    *,
    dims: Sequence[int] = (),
    only: Sequence[str] = (),
    store: Path = STORE,
    workers: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure vectorizer folders on the public sets under `data`; the first is what the others are held against.

    With `dims` each vectorizer stands beside itself cut to these widths by PCA of training phrases, on intents and
    similarity alone. `only` names the sets to look at, as the lines do (none: all of the suite). `workers` threads encode (0: one a core); milliseconds per phrase are always of one thread.
    Raises ValueError for a set that no exam is about, FileNotFoundError before any work where one is missing, and
    VectorizerRefused.
    """
    began = time.perf_counter()
    settings = settings or Evaluate()
    report = progress or _silent
    sizes = SIZES[settings.suite]
    exams = _chosen([exam for exam in EXAMS if exam.belongs(settings.suite, sweep=bool(dims))], only)
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
            stored = VectorStore(
                store, vectorizer, workers or os.cpu_count() or 1, partial(report, "encoding")
            )
            stores.enter_context(closing(stored))
            whole = Candidate(name, vectorizer.spec.uncased, stored.encode)
            narrower = [width for width in dict.fromkeys(dims) if width < vectorizer.dim]
            phrases = _training_phrases(exams, desks[whole.uncased]) if narrower else []
            candidates += [whole, *truncated(whole, narrower, phrases)]
        columns = _columns(candidates, dict(zip(names, zip(folders, vectorizers, strict=True), strict=True)))
        if not dims:
            timed = [
                [row.phrase for row in desks[vectorizer.spec.uncased].labelled(TIMED, TEST, sizes.timed)]
                for vectorizer in vectorizers
            ]
            lines += cost(columns, [vectorizer.encode for vectorizer in vectorizers], timed, sizes.resamples)
        for done, exam in enumerate(exams):
            report("exams", done, len(exams))
            lines += sit(exam, candidates, desks, sizes.resamples)
        report("exams", len(exams), len(exams))
    made_with = settings.model_dump() | {
        "dims": list(dims),
        "only": list(only),
        "resamples": sizes.resamples,
        "seed": SEED,
    }
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


def _chosen(exams: Sequence[Exam], only: Sequence[str]) -> list[Exam]:
    known = {exam.data for exam in exams}
    if not known.issuperset(only):
        raise ValueError(
            f"only: found {', '.join(sorted(set(only) - known))}, expected some of {', '.join(sorted(known))}; choose among "
            "those, or another suite"
        )
    return [exam for exam in exams if not only or exam.data in only]


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


def _training_phrases(exams: Sequence[Exam], desk: Desk) -> list[str]:
    """What the axes of truncations come from; never a test phrase."""
    return [
        example.phrase
        for exam in exams
        for name, split in exam.needs
        if split == TRAIN
        for example in desk.of_labels(name, TRAIN, desk.sizes.per_label)
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
