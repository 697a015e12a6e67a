"""All that a run reads: pools of every task without a row that something is tested on, raw phrases, noise."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nlu.training import augment, datasets, loop, mlm
from nlu.training import config as configs
from nlu.training.augment import Augmenter
from nlu.training.config import Config, Task
from nlu.training.datasets import ALL, DEV, OWN, TEST, TRAIN, Example, Form, Loaded, Pair, Source, identity
from nlu.training.distributed import world
from nlu.training.loop import TaskData

HELD = 128  # rows of a pool that are measured while training
RAW_HELD = 512  # phrases whose perplexity is watched


@dataclass(frozen=True, slots=True)
class Data:
    """All a run reads."""

    tasks: tuple[TaskData, ...]
    digests: Mapping[str, str]  # SHA-256 by file
    dropped: Mapping[str, int]  # by pool: rows with a phrase that something is tested on
    errors: augment.Table  # word -> misspellings

    def phrases(self, count: int) -> list[str]:
        """Distinct training phrases, at most `count`, chosen by their hash."""
        texts = {text for each in self.tasks for column in loop.texts_of(each.examples) for text in column}
        return heapq.nsmallest(count, texts, key=identity)


Lessons = Callable[[Config, Data], Data]


def read_data(config: Config) -> Data:
    """Every pool of every task: test rows taken out, some rows held back, cut as the task says."""
    read: dict[tuple[str, Form, str], Loaded] = {}

    def loaded(source: Source, split: str) -> Loaded:
        key = (source.name, source.form, split)
        if key not in read:
            read[key] = datasets.read(source, split, Path(config.data.root), uncased=config.model.uncased)
        return read[key]

    tested = tested_phrases(config, loaded)
    tasks: list[TaskData] = []
    dropped: dict[str, int] = {}
    for task in config.tasks:
        for name in task.datasets:
            source = configs.source_of(name, task.form)
            whole = [_without_context(row) for row in loaded(source, task.split).examples]
            clean = datasets.excluding(whole, tested)
            rows = _selected(clean, task, config)
            held = _held(loaded, source, rows, task, config)
            apart = set(held)
            tasks.append(
                loop.task_data(
                    task, name, [row for row in rows if row not in apart], held, batch=config.batch_of(task)
                )
            )
            dropped[f"{task.name}/{name}"] = len(whole) - len(clean)
    misspelt = (
        [loop.texts_of(loaded(datasets.find(name), TRAIN).examples) for name in config.augment.misspellings]
        if config.augment.misspelling.probability
        else []
    )
    errors = augment.errors_of(pair for columns in misspelt for pair in zip(*columns, strict=True))
    files = {file.name: file.sha256 for each in read.values() for file in each.files}
    return Data(tuple(tasks), dict(sorted(files.items())), dropped, errors)


def read_raw(config: Config) -> Data:
    """Phrases of the sets that the base reads before everything else: a pool a set, without what anything is tested on."""
    if config.mlm is None:
        raise ValueError("a config without [mlm]; this is a bug")
    files: dict[str, str] = {}

    def loaded(source: Source, split: str) -> Loaded:
        found = datasets.read(source, split, Path(config.data.root), uncased=config.model.uncased)
        files.update((file.name, file.sha256) for file in found.files)
        return found

    tested = tested_phrases(config, loaded)
    tasks: list[TaskData] = []
    dropped: dict[str, int] = {}
    for name in config.mlm.datasets:
        source = configs.source_of(name, Form.PAIRS)
        whole = _phrases(loaded(source, config.mlm.split))
        clean = [text for text in whole if text not in tested]
        if DEV in source.splits and config.mlm.split not in (DEV, ALL):
            apart = [text for text in _phrases(loaded(source, DEV)) if text not in tested]
            held = heapq.nsmallest(RAW_HELD, apart, key=identity)
        else:
            held = heapq.nsmallest(min(RAW_HELD, len(clean) // 10), clean, key=identity)
        unseen = set(held)
        rows = [text for text in clean if text not in unseen]
        tasks.append(mlm.task_data(config.mlm, name, rows, held, world()))
        dropped[tasks[-1].pool.name] = len(whole) - len(clean)
    return Data(tuple(tasks), dict(sorted(files.items())), dropped, {})


def _phrases(read: Loaded) -> list[str]:
    """Every phrase once."""
    return list(dict.fromkeys(text for column in loop.texts_of(read.examples) for text in column))


def tested_phrases(config: Config, loaded: Callable[[Source, str], Loaded]) -> set[str]:
    """Phrases that no training may see."""
    return {
        text
        for source, split in tested_on(config)
        for column in loop.texts_of(loaded(source, split).examples)
        for text in column
    }


def tested_on(config: Config) -> Iterator[tuple[Source, str]]:
    """What no task may see: test rows of the run's own sets, and all rows of sets that are only ever tested on."""
    named = [(name, task.form) for task in config.tasks for name in task.datasets]
    for raw in (config.mlm, config.distill):
        named += [(name, Form.PAIRS) for name in raw.datasets] if raw else []
    sources = (configs.source_of(name, form) for name, form in named)
    own = {(source.name, source.form): source for source in sources}
    for source in own.values():
        if TEST in source.splits:
            yield source, TEST
    if all(name.startswith(OWN) for name, _ in own):
        return  # nothing public is at hand, nor needed
    held_out = set(config.evaluate.held_out)
    for source in datasets.SOURCES.values():
        never = source.evaluation_only or bool({source.name, source.folder} & held_out)
        if never and (Path(config.data.root) / source.folder).is_dir():
            yield source, ALL


def _without_context(row: Example) -> Example:
    """Earlier turns are not trained on, so one of them that is a test phrase is no reason to drop the pair."""
    return replace(row, context=()) if isinstance(row, Pair) else row


def _selected(rows: Sequence[Example], task: Task, config: Config) -> tuple[Example, ...]:
    return datasets.select(
        rows,
        rename=task.rename,
        cap_per_label=task.cap_per_label,
        min_chars=task.min_chars,
        limit=task.limit,
        seed=config.run.seed,
    )


def _held(
    loaded: Callable[[Source, str], Loaded],
    source: Source,
    rows: Sequence[Example],
    task: Task,
    config: Config,
) -> tuple[Example, ...]:
    """Rows to measure on while training: of the set's dev split, or else a tenth of the rows at most."""
    if DEV in source.splits and task.split not in (DEV, ALL):
        known = [_without_context(row) for row in loaded(source, DEV).examples]
        dev = datasets.select(known, rename=task.rename, min_chars=task.min_chars)
        return datasets.select(dev, limit=HELD, seed=config.run.seed)
    count = min(HELD, len(rows) // 10)
    return datasets.select(rows, limit=count, seed=config.run.seed) if count else ()


def augmenter_of(config: Config, data: Data) -> Augmenter | None:
    """The noise of the config with the words it needs; None where it wants none."""
    noises = {kind: getattr(config.augment, kind).probability for kind in augment.KINDS}
    if not any(noises.values()):
        return None
    near: augment.Table = {}
    if noises["adversarial"] or noises["recogniser"]:  # recognisers, too, mostly hear other real words
        phrases = (text for each in data.tasks for column in loop.texts_of(each.examples) for text in column)
        near = augment.near_words(augment.vocabulary(phrases, config.augment.vocabulary))
    return Augmenter(config.augment, near, data.errors)
