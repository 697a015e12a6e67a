"""One training run, told once, in the order it happens.

    nlu vectorizer train CONFIG                                             one process
    horovodrun --gloo -np 2 nlu vectorizer train CONFIG                     two on this machine
    horovodrun --gloo -np 8 --hostfile hosts nlu vectorizer train CONFIG    eight, on the machines of a file: `node1 slots=4`
    nlu vectorizer train CONFIG --resume                                    on from the newest checkpoint, or from the start

What a run leaves in OUT/NAME of its config, all of it written by rank 0:

    config.toml      every value in force           checkpoints/   what --resume goes on from
    env.json         code, packages, machine, data  model/         the trained network, sentence-transformers, with heads
    metrics.jsonl    what was logged                vectorizer/    what is served; only of a run that came to its end
    mlruns/          the same for MLflow            plots/ run.md  the report
"""

from __future__ import annotations

import heapq
import importlib
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from nlu import content
from nlu.training import augment, datasets, loop, network
from nlu.training import config as configs
from nlu.training.augment import Augmenter
from nlu.training.config import Config, Task
from nlu.training.datasets import ALL, DEV, OWN, TEST, TRAIN, Example, Form, Loaded, Pair, Source, identity
from nlu.training.distributed import World, world, write_once
from nlu.training.export import MAX_GATE_PHRASES, Parity, export, vars_of
from nlu.training.loop import Event, Learner, TaskData, Trained
from nlu.training.sampler import Sampler
from nlu.vectorizer import SPEC_FILE, VectorizerSpec, fingerprint

logger = logging.getLogger(__name__)

HELD = 128  # rows of a pool that are measured while training
PCA_PHRASES = 20_000  # what a compressing layer is fitted to
GRAPH_TOKENS = 512  # the most an exported graph takes

Evaluation = Mapping[str, tuple[str, float]]  # pool -> (measure, value)
Watch = Callable[[int, Event], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that came to its end."""

    folder: Path
    vectorizer: Path
    steps: int
    fingerprint: str
    parity: Parity | None  # None on ranks that did not export
    evaluation: Evaluation


def train(
    path: Path, *, resume: bool = False, steps: int | None = None, watch: Watch = lambda step, what: None
) -> Finished:
    """Run the experiment of a config; `steps` overrides its schedule, `watch` sees every step of rank 0.

    Raises Interrupted, with a checkpoint written, when the process is told to stop (SIGINT, SIGTERM), and ValueError
    or OSError for whatever a config, its data or an earlier run in the same folder have wrong.
    """
    # What: one file says all of it.
    config = settings(path, steps)
    folder = Path(config.run.out) / config.run.name

    # Who: this process alone, or one of those that horovodrun started; each on a GPU of its own where there are any.
    here = world()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = torch.device("cuda", here.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if here.rank == 0:
        claim(folder, resume=resume)

    # On what: every rank reads everything and takes its share of each batch.
    data = read_data(config)
    sampler = Sampler(
        [each.pool for each in data.tasks],
        temperature=config.mix.temperature,
        seed=config.run.seed,
        rank=here.rank,
        ranks=here.size,
    )

    # With what: the encoder, its heads, and perhaps weights of tasks; rank 0's are everybody's.
    torch.manual_seed(config.run.seed)
    heads = [each.head for each in data.tasks if each.head is not None]
    encoder = network.make(config.model, heads)
    if encoder.fresh and config.model.compress == "pca" and here.rank == 0:
        kept = network.start_from_principal_components(encoder, data.phrases(PCA_PHRASES))
        logger.info("%d principal components keep %.1f %% of the vectors", encoder.dim, 100 * kept)
    learner = Learner(encoder, config.tasks, uncertainty=config.mix.weighting == "uncertainty").to(device)
    optimizer = here.wrap_optimizer(
        loop.make_optimizer(learner, config.optimizer, ranks=here.size),
        config.optimizer.compression,
        max_norm=config.optimizer.clip or None,
    )

    # From where: the beginning, or a checkpoint that only rank 0 needs to see.
    stamp = stamp_of(config, data)
    start = 0
    if resume and here.rank == 0:
        start = loop.resume(folder / "checkpoints", learner, optimizer, sampler, stamp)
    here.broadcast_state(learner, optimizer)
    start = int(here.gather_strings([str(start)])[0])
    if start > config.schedule.steps:
        raise ValueError(
            f"{folder}: found a checkpoint of {start} steps, expected at most {config.schedule.steps}; "
            "ask for more with --steps, or start a run of another name"
        )

    # The steps.
    record = Record(folder, config, here, data, device, start=start) if here.rank == 0 else None
    try:
        with told_to_stop() as stopping:
            if record and start == 0:
                record.evaluated(0, evaluate(encoder, data.tasks))
            for step, what in loop.train(
                learner,
                optimizer,
                data.tasks,
                config,
                here,
                sampler=sampler,
                augmenter=augmenter_of(config, data),
                start=start,
                checkpoints=folder / "checkpoints",
                stamp=stamp,
                stopping=stopping,
            ):
                if record:
                    record.noted(step, what)
                    watch(step, what)
                    if isinstance(what, Trained) and _is_due(step, config):
                        record.evaluated(step, evaluate(encoder, data.tasks))

        # The end: only a run that got here leaves a vectorizer, and only one that passes the exporter's gate.
        parity: list[Parity] = []
        write_once(here, lambda: parity.append(publish(folder, config, encoder, data)))
        finished = Finished(
            folder,
            folder / "vectorizer",
            config.schedule.steps,
            fingerprint(folder / "vectorizer") if record else "",
            parity[0] if parity else None,
            record.evaluations[-1][1] if record and record.evaluations else {},
        )
    except BaseException as error:
        if record:
            record.close(f"not finished: {str(error) or type(error).__name__}")
        raise
    if record:
        record.close("finished", finished)
    return finished


def _is_due(step: int, config: Config) -> bool:
    every = config.schedule.evaluate_every
    return step == config.schedule.steps or bool(every and step % every == 0)


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one stops at once, without a checkpoint."""
    told = threading.Event()

    def note(*_: object) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()
        logger.warning("told to stop: writing a checkpoint after this step")

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield told.is_set
        return
    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told.is_set
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# --- what -------------------------------------------------------------------------------------------------------------------


def settings(path: Path, steps: int | None = None) -> Config:
    """The config, if this command can run it. Raises ConfigInvalid, naming the key that it cannot."""
    config = configs.load(path)
    if steps is not None:
        if steps < 1:
            raise configs.ConfigInvalid(f"--steps: found {steps}, expected at least 1; ask for more")
        config = config.model_copy(
            update={"schedule": config.schedule.model_copy(update={"steps": steps})}
        )
    for wrong, complaint in (
        (config.distill, "distill: found a student to make; run it with `nlu vectorizer distill`"),
        (
            config.mlm,
            "mlm: found a base to adapt on raw text first, which this command does not do; remove the section and "
            "point model.base at a base that is adapted",
        ),
        (not config.tasks, "task: found none, expected at least one; add a [[task]]"),
        (
            config.run.autocast == "fp16",
            "run.autocast: found 'fp16', whose small numbers vanish without loss scaling, expected 'bf16' or 'off'; "
            "change it",
        ),
        (
            not config.export.token_dim,
            "export.token_dim: found 0, expected at least 1: token heads and a vectorizer's format need token vectors; "
            "raise it",
        ),
    ):
        if wrong:
            raise configs.ConfigInvalid(f"{path}: {complaint}")
    return config


def claim(folder: Path, *, resume: bool) -> None:
    """Make the run's folder. Raises ValueError where a run is in it and this one is not to go on from there."""
    if not resume and (folder / "config.toml").exists():
        raise ValueError(
            f"{folder}: found a run in it, expected none; go on from there with --resume, rename this run or remove the folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def stamp_of(config: Config, data: Data) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from: all that decides what a step does."""
    said = config.model_dump(mode="json", by_alias=True)
    for free in ("schedule", "export", "evaluate"):
        del said[free]
    for free in ("out", "tracking", "threads"):
        del said["run"][free]
    said["task"] = {task["name"]: task for task in said["task"]}
    return {"config": said, "data": dict(data.digests)}


# --- on what ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Data:
    """All a run reads."""

    tasks: tuple[TaskData, ...]
    digests: Mapping[str, str]  # SHA-256 by file
    dropped: Mapping[str, int]  # by pool: rows with a phrase that something is tested on
    errors: augment.Table  # word -> misspellings

    def phrases(self, count: int) -> list[str]:
        """Distinct training phrases, at most `count`, chosen by their hash."""
        texts = {
            text for each in self.tasks for column in loop.texts_of(each.examples) for text in column
        }
        return heapq.nsmallest(count, texts, key=identity)


def read_data(config: Config) -> Data:
    """Every pool of every task: test rows taken out, some rows held back, cut as the task says."""
    root = Path(config.data.root)
    uncased = config.model.uncased
    read: dict[tuple[str, Form, str], Loaded] = {}

    def loaded(source: Source, split: str) -> Loaded:
        key = (source.name, source.form, split)
        if key not in read:
            read[key] = datasets.read(source, split, root, uncased=uncased)
        return read[key]

    tested = {
        text
        for source, split in tested_on(config)
        for column in loop.texts_of(loaded(source, split).examples)
        for text in column
    }
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
    misspelt = [
        loop.texts_of(loaded(datasets.find(name), TRAIN).examples) for name in config.augment.misspellings
    ] if config.augment.misspelling.probability else []
    errors = augment.errors_of(pair for columns in misspelt for pair in zip(*columns, strict=True))
    files = {file.name: file.sha256 for each in read.values() for file in each.files}
    return Data(tuple(tasks), dict(sorted(files.items())), dropped, errors)


def tested_on(config: Config) -> Iterator[tuple[Source, str]]:
    """What no task may see: test rows of the run's own sets, and all rows of sets that are only ever tested on."""
    own = {
        (source.name, source.form): source
        for task in config.tasks
        for source in (configs.source_of(name, task.form) for name in task.datasets)
    }
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


# --- how good, and out ------------------------------------------------------------------------------------------------------


def evaluate(encoder: network.Network, tasks: Sequence[TaskData]) -> Evaluation:
    """One measure per pool on its held rows: a sign of life; `nlu vectorizer evaluate` is the judge."""
    found = {each.pool.name: loop.measure(encoder, each) for each in tasks}
    return {name: value for name, value in found.items() if value is not None}


def publish(folder: Path, config: Config, encoder: network.Network, data: Data) -> Parity:
    """Save the network and export it; neither folder is ever half there. Raises VectorizerRefused at the gate."""
    with _whole(folder / "model") as partial:
        encoder.save(partial)
    # Half of the gate's phrases are those it was trained on, half are what people say to any assistant.
    said = data.phrases(MAX_GATE_PHRASES // 2)
    phrases = [*said, *content.load().phrases()[: MAX_GATE_PHRASES - len(said)]]
    with _whole(folder / "vectorizer") as partial:
        parity = export(
            str(folder / "model"),
            partial,
            precision=config.export.precision,
            phrases=phrases,
            token_dim=config.export.token_dim,
            max_tokens=min(config.model.max_tokens, GRAPH_TOKENS),
        )
        spec = VectorizerSpec.model_validate_json((partial / SPEC_FILE).read_bytes())
        made = spec.provenance | {
            "run": config.run.name,
            "git": git_revision(),
            "datasets": sorted({each.pool.dataset for each in data.tasks}),
        }
        spec = spec.model_copy(update={"name": config.run.name, "provenance": made})
        _write_json(partial / SPEC_FILE, spec.model_dump(mode="json"))
    return parity


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside it to write to, which takes its place once all went well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- the record -------------------------------------------------------------------------------------------------------------


class Record:
    """The run's folder, as rank 0 writes it: metrics while it runs, plots and run.md when it ends, however it ends."""

    def __init__(
        self, folder: Path, config: Config, here: World, data: Data, device: torch.device, *, start: int
    ) -> None:
        self.folder, self.config, self.data, self.start = folder, config, data, start
        self.evaluations: list[tuple[int, Evaluation]] = []
        self._since: dict[str, list[Trained]] = defaultdict(list)
        self._began = time.monotonic()
        self._rows = _kept_rows(folder / "metrics.jsonl", start)
        self.environment = environment(here, device, data, start)
        (folder / "config.toml").write_text(configs.dump(config), encoding="utf-8")
        _write_json(folder / ("env.json" if not start else f"env-step-{start:08d}.json"), self.environment)
        _write_rows(folder / "metrics.jsonl", self._rows)
        self._tracking = Tracking.start(folder, config)
        for row in self._rows:
            if "evaluation" in row:
                self.evaluations.append((row["step"], {k: tuple(v) for k, v in row["evaluation"].items()}))

    def noted(self, step: int, what: Event) -> None:
        """A step, or a checkpoint."""
        if not isinstance(what, Trained):
            logger.info("step %d: checkpoint %s", step, what.path)
            return
        self._since[what.task].append(what)
        if step % self.config.schedule.log_every == 0 or step == self.config.schedule.steps:
            self._log(step)

    def evaluated(self, step: int, found: Evaluation) -> None:
        """What the held rows say."""
        self.evaluations.append((step, found))
        self._write({"step": step, "evaluation": {name: list(value) for name, value in found.items()}})
        for name, (measure, value) in found.items():
            self._tracking.metrics(step, {f"{measure}.{name}": value})

    def close(self, status: str, finished: Finished | None = None) -> None:
        """The report."""
        if self._since:
            self._log(max(row["step"] for row in self._rows) if self._rows else self.start)
        plot(self.folder / "plots", self._rows)
        text = report(self, status, finished, self._rows, time.monotonic() - self._began)
        (self.folder / "run.md").write_text(text, encoding="utf-8")
        self._tracking.close(self.folder, finished=finished is not None)

    def _log(self, step: int) -> None:
        events = [event for found in self._since.values() for event in found]
        means = {name: _mean([each.loss for each in found]) for name, found in self._since.items()}
        negatives = {
            name: _mean(counted)
            for name, found in self._since.items()
            if (counted := [each.negatives for each in found if each.negatives is not None])
        }
        row = {
            "step": step,
            "learning_rate": events[-1].learning_rate if events else 0.0,
            "phrases_per_second": sum(e.phrases for e in events) / max(1e-9, sum(e.seconds for e in events)),
            "loss": means,
            "negatives": negatives,
            "weight": {name: found[-1].weight for name, found in self._since.items()},
        }
        self._since.clear()
        self._write(row)
        flat = {f"{key}.{name}": value for key in ("loss", "negatives", "weight") for name, value in row[key].items()}  # type: ignore[attr-defined]
        self._tracking.metrics(
            step, {**flat, **{key: row[key] for key in ("learning_rate", "phrases_per_second")}}  # type: ignore[dict-item]
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
