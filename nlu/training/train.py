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
    mlm/             the same of what came before, where the config has [mlm]; its model/ is the base of the rest
"""

from __future__ import annotations

import copy
import heapq
import importlib
import json
import logging
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
from nlu.training import augment, datasets, loop, mlm, network
from nlu.training import config as configs
from nlu.training.augment import Augmenter
from nlu.training.config import Config, Task
from nlu.training.datasets import ALL, DEV, OWN, TEST, TRAIN, Example, Form, Loaded, Pair, Source, identity
from nlu.training.distributed import World, world, write_once
from nlu.training.export import MAX_GATE_PHRASES, Parity, export
from nlu.training.loop import Event, Learner, TaskData, Trained
from nlu.training.rounding import rounded
from nlu.training.sampler import Sampler
from nlu.vectorizer import SPEC_FILE, VectorizerSpec, fingerprint

logger = logging.getLogger(__name__)

FINISHED = "finished"
HELD = 128  # rows of a pool that are measured while training
MODEL = "model"  # inside a run's folder, the network in the end
UNMIXED = "unmixed"  # the network before some of its base came back
RAW = "mlm"  # inside a run's folder, the run of what comes before it
RAW_HELD = 512  # phrases whose perplexity is watched
PCA_PHRASES = 20_000  # what a compressing layer is fitted to
GRAPH_TOKENS = 512  # the most an exported graph takes

Evaluation = Mapping[str, tuple[str, float]]  # pool -> (measure, value)
Watch = Callable[[int, Event], None]
Begun = Callable[[str, Config], Watch]  # is told of each run by name, and gives what sees its steps on rank 0


def unwatched(_name: str, _config: Config) -> Watch:
    """Nobody looks."""
    return lambda step, what: None


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that came to its end."""

    folder: Path
    vectorizer: Path
    steps: int
    parity: Parity | None  # None on ranks that did not export
    evaluation: Evaluation


def train(
    path: Path, *, resume: bool = False, steps: int | None = None, begun: Begun = unwatched
) -> Finished:
    """Run the experiment of a config; `steps` overrides its schedule, `begun` gives what sees every step of rank 0.

    Raises Interrupted, with a checkpoint written, when the process is told to stop (SIGINT, SIGTERM), and ValueError
    or OSError for whatever a config, its data or an earlier run in the same folder have wrong.
    """
    # What: one file says all of it.
    config = settings(path, steps)
    if config.mlm is None:
        return run(config, resume=resume, watch=begun(config.run.name, config))

    # Before everything else, where the config wants that, the base reads raw text, in a run of its own.
    folder = Path(config.run.out) / config.run.name
    if world().rank == 0:
        claim(folder, resume=resume)
    alone = not config.tasks
    staged = config if alone else mlm.stage(config, config.mlm)
    raw = run(
        staged,
        resume=resume,
        watch=begun(config.run.name if alone else RAW, staged),
        folder=folder if alone else folder / RAW,
        lessons=lambda _config, _data: read_raw(config),
        make=lambda staged, data: mlm.with_head(make_learner(staged, data)),
        exporting=alone,
    )
    if alone:
        return raw

    # Then the tasks, from what that left; rank 0 alone need see it, its weights are everybody's.
    base = str(raw.folder / MODEL) if world().rank == 0 else config.model.base
    model = config.model.model_copy(update={"base": base})
    return run(
        config,
        resume=resume,
        watch=begun(config.run.name, config),
        make=lambda config, data: make_learner(config.model_copy(update={"model": model}), data),
    )


def run(
    config: Config,
    *,
    resume: bool = False,
    watch: Watch = lambda step, what: None,
    folder: Path | None = None,
    lessons: Lessons = lambda config, data: data,
    make: Callable[[Config, Data], Learner] | None = None,
    int8: bool = False,
    exporting: bool = True,
) -> Finished:
    """`train` of a config that is already read, in `folder` where that is not to be OUT/NAME.

    `lessons` may add to the data what a teacher says; `make` is `make_learner` unless told; with `int8` the network
    computes with numbers rounded as they will be served; without `exporting` the run ends in its `model/`.
    """
    folder = folder or Path(config.run.out) / config.run.name

    # Who: this process alone, or one of those that horovodrun started; each on a GPU of its own where there are any.
    here = world()
    device = place(here, config)
    if here.rank == 0:
        claim(folder, resume=resume)

    # On what: every rank reads everything and takes its share of each batch.
    data = lessons(config, read_data(config))
    sampler = Sampler(
        [each.pool for each in data.tasks],
        temperature=config.mix.temperature,
        seed=config.run.seed,
        rank=here.rank,
        ranks=here.size,
    )

    # With what: the encoder, its heads, and perhaps weights of tasks.
    torch.manual_seed(config.run.seed)
    learner = (make or make_learner)(config, data).to(device)
    base = copy.deepcopy(learner.network.graph.encoder.state_dict()) if config.export.base_share else {}
    optimizer = here.wrap_optimizer(
        loop.make_optimizer(learner, config.optimizer, ranks=here.size),
        config.optimizer.compression,
        max_norm=config.optimizer.clip or None,
    )

    # From where: the beginning, or a checkpoint that only rank 0 needs to see; its weights are everybody's.
    stamp = stamp_of(config, data)
    start = 0
    if resume and here.rank == 0:
        start = loop.resume(folder / "checkpoints", learner, optimizer, sampler, stamp)
    here.broadcast_state(learner, optimizer)
    start = int(here.gather_strings([str(start)])[0])
    check_start(start, config, folder)

    # The steps. Rank 0 writes down what happens, and measures.
    record = Record(folder, config, here, data, device, learner, start=start) if here.rank == 0 else None
    with reported(record), told_to_stop() as stopping, rounded(learner.network, on=int8):
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

        # The end: only a run that got here leaves a vectorizer, and only one that passes the exporter's gate.
        if base:
            write_once(here, lambda: keep(folder / UNMIXED, learner.network))
            network.mix(learner.network, base, config.export.base_share)
        published: list[Parity] = []
        if exporting:
            write_once(here, lambda: published.append(publish(folder, config, learner.network, data)))
        else:
            write_once(here, lambda: keep(folder / MODEL, learner.network))
        return Finished(
            folder,
            folder / "vectorizer",
            config.schedule.steps,
            published[0] if published else None,
            record.evaluations[-1][1] if record and record.evaluations else {},
        )


@contextmanager
def reported(record: Record | None) -> Iterator[None]:
    """Whatever happens inside, the run's folder says how it ended."""
    try:
        yield
    except BaseException as error:
        if record:
            record.close(f"not finished: {str(error) or type(error).__name__}")
        raise
    if record:
        record.close(FINISHED)


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
        config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": steps})})
        if config.mlm:
            fewer = {"steps": min(steps, config.mlm.steps)}
            config = config.model_copy(update={"mlm": config.mlm.model_copy(update=fewer)})
    for wrong, complaint in (
        (config.distill, "distill: found a student to make; run it with `nlu vectorizer distill`"),
        (
            not config.tasks and (config.model.dim or config.model.adaptation != configs.Full()),
            "model: found a dim or an adaptation but no task, expected neither: raw text trains the whole base and nothing "
            "else; add a [[task]]",
        ),
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
    return mlm.stage(config, config.mlm) if config.mlm and not config.tasks else config


def place(here: World, config: Config) -> torch.device:
    """Where this rank computes, and on how many threads."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return torch.device("cuda", here.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def claim(folder: Path, *, resume: bool) -> None:
    """Make the run's folder. Raises ValueError where a run is in it and this one is not to go on from there."""
    if not resume and (folder / "config.toml").exists():
        raise ValueError(
            f"{folder}: found a run in it, expected none; go on from there with --resume, rename this run or remove the folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def check_start(start: int, config: Config, folder: Path) -> None:
    """ValueError for a checkpoint that is already further than this run is to go."""
    if start > config.schedule.steps:
        raise ValueError(
            f"{folder}: found a checkpoint of {start} steps, expected at most {config.schedule.steps}; "
            "ask for more with --steps, or start a run of another name"
        )


def stamp_of(config: Config, data: Data) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from: all that decides what a step does."""
    said = config.model_dump(mode="json", by_alias=True)
    for free in ("schedule", "export", "evaluate"):
        del said[free]
    for free in ("out", "tracking", "threads"):
        del said["run"][free]
    for stage in (said.get("distill") or {}).get("stage", ()):
        del stage["steps"]
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


# --- with what --------------------------------------------------------------------------------------------------------------


def make_learner(config: Config, data: Data) -> Learner:
    """The network with a head for each pool that needs one, before its first step."""
    heads = [each.head for each in data.tasks if each.head is not None]
    encoder = network.make(config.model, heads)
    if encoder.fresh and config.model.compress == "pca":
        kept = network.start_from_principal_components(encoder, data.phrases(PCA_PHRASES))
        logger.info("%d principal components keep %.1f %% of the vectors", encoder.dim, 100 * kept)
    tasks = list({each.task.name: each.task for each in data.tasks}.values())
    return Learner(encoder, tasks, uncertainty=config.mix.weighting == "uncertainty")


# --- how good, and out ------------------------------------------------------------------------------------------------------


def evaluate(encoder: network.Network, tasks: Sequence[TaskData]) -> Evaluation:
    """One measure per pool on its held rows: a sign of life; `nlu vectorizer evaluate` is the judge."""
    found = {each.pool.name: loop.measure(encoder, each) for each in tasks}
    return {name: value for name, value in found.items() if value is not None}


def publish(folder: Path, config: Config, encoder: network.Network, data: Data) -> Parity:
    """Save the network and export it; neither folder is ever half there. Raises VectorizerRefused at the gate."""
    keep(folder / MODEL, encoder)
    # Half of the gate's phrases are those it was trained on, half are what people say to any assistant.
    said = data.phrases(MAX_GATE_PHRASES // 2)
    phrases = [*said, *content.load().phrases()[: MAX_GATE_PHRASES - len(said)]]
    with _whole(folder / "vectorizer") as partial:
        parity = export(
            str(folder / MODEL),
            partial,
            precision=config.export.precision,
            phrases=phrases,
            token_dim=config.export.token_dim,
            max_tokens=min(config.model.max_tokens, GRAPH_TOKENS),
        )
        spec = VectorizerSpec.model_validate_json((partial / SPEC_FILE).read_bytes())
        made = spec.provenance | {
            "run": config.run.name,
            "steps": config.schedule.steps,
            "git": git_revision(),
            "datasets": sorted(config.sources()),
        }
        spec = spec.model_copy(update={"name": config.run.name, "provenance": made})
        _write_json(partial / SPEC_FILE, spec.model_dump(mode="json"))
    return parity


def keep(folder: Path, encoder: network.Network) -> None:
    """Save the network."""
    with _whole(folder) as partial:
        encoder.save(partial)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside it to write to, which takes its place once all went well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- the record -------------------------------------------------------------------------------------------------------------

Row = dict[str, Any]  # a line of metrics.jsonl


class Record:
    """The run's folder, as rank 0 writes it: metrics while it runs, plots and run.md when it ends, however it ends."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        here: World,
        data: Data,
        device: torch.device,
        learner: Learner,
        *,
        start: int,
    ) -> None:
        self.folder, self.config, self.data, self.start = folder, config, data, start
        self._learner = learner
        self.environment = environment(here, device, data)
        self._step = start
        self._since: list[Trained] = []
        self._began = time.monotonic()
        (folder / "config.toml").write_text(configs.dump(config), encoding="utf-8")
        _write_json(folder / (f"env-step-{start:08d}.json" if start else "env.json"), self.environment)
        # What was logged after the checkpoint is about to happen again.
        self.rows = [row for row in _read_rows(folder / "metrics.jsonl") if start and row["step"] <= start]
        _write_rows(folder / "metrics.jsonl", self.rows)
        self._tracking = track(folder, config)
        if not start:
            self._evaluate(0)

    @property
    def evaluations(self) -> list[tuple[int, Evaluation]]:
        """(step, what was found), in order."""
        return [(row["step"], row["evaluation"]) for row in self.rows if "evaluation" in row]

    def noted(self, step: int, what: Event) -> None:
        """A step, or a checkpoint."""
        if not isinstance(what, Trained):
            logger.info("step %d: checkpoint %s", step, what.path)
            return
        self._step = step
        self._since.append(what)
        last = step == self.config.schedule.steps
        if last or step % self.config.schedule.log_every == 0:
            self._log()
        every = self.config.schedule.evaluate_every
        if last or (every and step % every == 0):
            self._evaluate(step)

    def close(self, status: str) -> None:
        """The report."""
        if self._since:
            self._log()
        plot(self.folder / "plots", self.rows)
        text = report(self, status, seconds=time.monotonic() - self._began)
        (self.folder / "run.md").write_text(text, encoding="utf-8")
        self._tracking.close(self.folder, status)

    def _evaluate(self, step: int) -> None:
        found = evaluate(self._learner.network, self.data.tasks)
        self._write({"step": step, "evaluation": {name: list(value) for name, value in found.items()}})
        self._tracking.metrics(step, {f"{measure}.{name}": value for name, (measure, value) in found.items()})
        logger.info("step %d: %s", step, _said(found))

    def _log(self) -> None:
        row = summary(self._step, self._since)
        self._since = []
        self._write(row)
        by_task = {f"{key}.{task}": value for key in BY_TASK for task, value in row[key].items()}
        self._tracking.metrics(
            self._step, by_task | {key: row[key] for key in ("learning_rate", "phrases_per_second")}
        )

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


BY_TASK = ("loss", "negatives", "weight")


def summary(step: int, events: Sequence[Trained]) -> Row:
    """Some steps in one line: means of losses and effective negatives by task."""
    losses: dict[str, list[float]] = defaultdict(list)
    negatives: dict[str, list[float]] = defaultdict(list)
    for event in events:
        losses[event.task].append(event.loss)
        if event.negatives is not None:
            negatives[event.task].append(event.negatives)
    return {
        "step": step,
        "learning_rate": events[-1].learning_rate,
        "phrases_per_second": sum(e.phrases for e in events) / max(1e-9, sum(e.seconds for e in events)),
        "loss": {task: sum(found) / len(found) for task, found in losses.items()},
        "negatives": {task: sum(found) / len(found) for task, found in negatives.items()},
        "weight": {event.task: event.weight for event in events},
    }


def _said(found: Evaluation) -> str:
    return ", ".join(f"{name} {measure} {value:.3f}" for name, (measure, value) in found.items())


def _read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
    return [json.loads(line) for line in whole.splitlines()]


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def environment(here: World, device: torch.device, data: Data) -> dict[str, Any]:
    """What made the numbers, beside the config."""
    packages = {each.name: each.version for each in metadata.distributions()}
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "ranks": here.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "data": dict(data.digests),
    }


def git_revision() -> str:
    """The commit this code is, `-dirty` where it was changed since; empty outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # look, never touch
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git
        return ""
    return answer.stdout.strip()


# --- MLflow


class Untracked:
    """What stands in where MLflow is not installed."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nowhere to."""

    def close(self, folder: Path, status: str) -> None:
        """Nothing open."""


class Tracked:
    """One MLflow run. A store that stops answering costs a warning, not the training."""

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values at a step; MLflow takes ASCII names only."""
        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        named = [
            entities.Metric(re.sub(r"[^A-Za-z0-9_\-. /]", "_", name), value, now, step)
            for name, value in values.items()
        ]
        self._try(lambda: self._client.log_batch(self._run, metrics=named))

    def close(self, folder: Path, status: str) -> None:
        """The report and its plots, and how it ended."""
        for path in (folder / "config.toml", folder / "run.md", *sorted((folder / "plots").glob("*.png"))):
            self._try(lambda: self._client.log_artifact(self._run, str(path)))  # noqa: B023
        self._try(
            lambda: self._client.set_terminated(self._run, "FINISHED" if status == FINISHED else "FAILED")
        )

    def _try(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:  # a store behind HTTP raises what its client raises
            logger.warning("MLflow: %s; training goes on", error)


def track(folder: Path, config: Config) -> Tracked | Untracked:
    """The MLflow run of this folder, the same one after a resume. Its store is in the folder unless the config names one."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if not config.run.tracking:
        # A store of plain files needs no database; MLflow wants to be told that this is meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        mlflow = importlib.import_module("mlflow.tracking")
    except ImportError:
        logger.info(
            "no MLflow here, so metrics go to metrics.jsonl alone; pip install mlflow-skinny for both"
        )
        return Untracked()
    client = mlflow.MlflowClient(config.run.tracking or (folder / "mlruns").absolute().as_uri())
    known = folder / "mlflow.json"
    if known.exists():
        run = json.loads(known.read_text(encoding="utf-8"))["run_id"]
        client.update_run(run, "RUNNING")
        return Tracked(client, run)
    name = "vectorizer"
    experiment = client.get_experiment_by_name(name)
    identifier = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(identifier, run_name=config.run.name).info.run_id
    for key, value in _flat(config.model_dump(mode="json", exclude={"tasks"}, exclude_none=True)):
        client.log_param(run, key, value)
    _write_json(known, {"run_id": run})
    return Tracked(client, run)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# --- plots and run.md


def plot(folder: Path, rows: Sequence[Row]) -> None:
    """loss.png, learning-rate.png and evaluation.png; one that has nothing to show is not drawn."""
    folder.mkdir(exist_ok=True)
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    rates: dict[str, list[tuple[int, float]]] = defaultdict(list)
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        for task, loss in row.get("loss", {}).items():
            losses[task].append((row["step"], loss))
        if "learning_rate" in row:
            rates["learning rate"].append((row["step"], row["learning_rate"]))
        for name, (measure, value) in row.get("evaluation", {}).items():
            found[f"{name} {measure}"].append((row["step"], value))
    _draw(folder / "loss.png", losses, "loss, before its weight")
    _draw(folder / "learning-rate.png", rates, "learning rate")
    _draw(folder / "evaluation.png", found, "held rows")


def _draw(path: Path, lines: Mapping[str, Sequence[tuple[int, float]]], what: str) -> None:
    if not lines:
        return
    figure = Figure(figsize=(10, 5), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, marker=".", lw=1)
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def report(record: Record, status: str, *, seconds: float) -> str:
    """run.md."""
    config, machine = record.config, record.environment["machine"]
    logged = [row for row in record.rows if "loss" in row]
    steps = logged[-1]["step"] if logged else record.start
    lines = [
        f"# {config.run.name}",
        "",
        f"- **status**: {status}",
        f"- **steps**: {steps} of {config.schedule.steps}"
        + (f", the first {record.start} in an earlier process" if record.start else ""),
        f"- **time**: {seconds / 60:.1f} min in this process, started {record.environment['started']}",
        f"- **speed**: {_mean([row['phrases_per_second'] for row in logged]):.0f} phrases/s",
        f"- **code**: {record.environment['git'] or 'not a checkout'}",
        f"- **machine**: {machine['ranks']} rank(s), {machine['threads']} thread(s) each, {machine['device']}, "
        f"{machine['platform']}",
        f"- **command**: `{' '.join(record.environment['command'])}`",
        f"- **base**: {config.model.base}, adaptation {config.model.adaptation.kind}, dim {config.model.dim or 'of the base'}",
        "- everything else: config.toml, env.json",
        "",
    ]
    if status == FINISHED and (record.folder / "vectorizer").exists():
        lines += _vectorizer_lines(record.folder / "vectorizer")
    if (record.folder / RAW).exists():
        lines += _raw_lines(record.folder / RAW)
    lines += ["## Tasks", "", "Loss before its weight, at the first and the last line of the log.", ""]
    lines += _table(("task", "loss first", "loss last", "negatives", "weight"), _task_rows(logged))
    lines += [
        "## Held rows",
        "",
        "A sign of life, without noise; the judge is `nlu vectorizer evaluate`.",
        "",
    ]
    lines += _table(
        ("pool", "measure", "first", "last", "best", "at step"), _evaluation_rows(record.evaluations)
    )
    lines += ["## Data", "", "Dropped: rows with a phrase that something is tested on.", ""]
    lines += _table(
        ("pool", "rows", "held", "dropped", "labels", "licence"),
        [
            (
                each.pool.name,
                len(each.examples),
                len(each.held),
                record.data.dropped.get(each.pool.name, ""),
                len(each.labels) or "",
                _licence(each),
            )
            for each in record.data.tasks
        ],
    )
    drawn = sorted(path.name for path in (record.folder / "plots").glob("*.png"))
    lines += [f"![{name}](plots/{name})" for name in drawn]
    return "\n".join(lines) + "\n"


def _licence(each: TaskData) -> str:
    name = each.pool.dataset
    if name not in datasets.SOURCES and not name.startswith(OWN):
        return ""  # what a teacher says of many sets
    return configs.source_of(name, configs.FORMS.get(each.task.kind, Form.PAIRS)).licence


def _vectorizer_lines(folder: Path) -> list[str]:
    spec = VectorizerSpec.model_validate_json((folder / SPEC_FILE).read_bytes())
    parity = spec.provenance["parity"]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return [
        "## Vectorizer",
        "",
        f"`vectorizer/`: {spec.precision}, dim {spec.dim}, {size:.1f} MiB, fingerprint `{fingerprint(folder)}`; cosine to "
        f"torch over {parity['phrases']} phrases: mean {parity['mean_cosine']:.4f}, worst {parity['min_cosine']:.4f}.",
        "",
    ]


def _raw_lines(folder: Path) -> list[str]:
    evaluations = [
        (row["step"], row["evaluation"])
        for row in _read_rows(folder / "metrics.jsonl")
        if "evaluation" in row
    ]
    return [
        "## Raw text",
        "",
        f"{evaluations[-1][0]} steps before everything else; `{folder.name}/run.md` tells of them.",
        "",
        *_table(("pool", "measure", "first", "last", "best", "at step"), _evaluation_rows(evaluations)),
    ]


def _task_rows(logged: Sequence[Row]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for task in dict.fromkeys(task for row in logged for task in row["loss"]):
        losses = [row["loss"][task] for row in logged if task in row["loss"]]
        negatives = [row["negatives"][task] for row in logged if task in row["negatives"]]
        weight = next(row["weight"][task] for row in reversed(logged) if task in row["weight"])
        seen = f"{_mean(negatives):.0f}" if negatives else ""
        rows.append((task, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", seen, f"{weight:.3g}"))
    return rows


def _evaluation_rows(evaluations: Sequence[tuple[int, Evaluation]]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name in evaluations[0][1] if evaluations else ():
        seen = [(found[name][1], step) for step, found in evaluations if name in found]
        measure = evaluations[0][1][name][0]
        sign = -1 if measure == "perplexity" else 1
        best, step = max(seen, key=lambda each: (sign * each[0], -each[1]))
        rows.append((name, measure, f"{seen[0][0]:.3f}", f"{seen[-1][0]:.3f}", f"{best:.3f}", step))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
