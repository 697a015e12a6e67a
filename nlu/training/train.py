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
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nlu import content
from nlu.training import config as configs
from nlu.training import loop, mlm, network, run_report
from nlu.training.config import Config
from nlu.training.data import Data, Lessons, augmenter_of, read_data, read_raw
from nlu.training.distributed import World, world, write_once
from nlu.training.export import MAX_GATE_PHRASES, Parity, export
from nlu.training.loop import Event, Learner
from nlu.training.record import FINISHED, MODEL, RAW, Evaluation, Record, git_revision, write_json
from nlu.training.rounding import rounded
from nlu.training.sampler import Sampler
from nlu.vectorizer import SPEC_FILE, VectorizerSpec

logger = logging.getLogger(__name__)

PCA_PHRASES = 20_000  # what a compressing layer is fitted to
GRAPH_TOKENS = 512  # the most an exported graph takes

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
    with (
        reported(record),
        told_to_stop() as stopping,
        rounded(
            learner.network,
            on=int8,
            words=learner.network.graph.encoder.get_input_embeddings()
            if config.export.word_bits == 4
            else None,
        ),
    ):
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
            ended(record, f"not finished: {str(error) or type(error).__name__}")
        raise
    if record:
        ended(record, FINISHED)


def ended(record: Record, status: str) -> None:
    """The last line of the log, the report, and what MLflow is told, in this order."""
    record.flush()
    run_report.write(record, status)
    record.close(status)


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
    # Of the export, what stages that know they will be int8 compute with. What is at its default goes unsaid.
    if rounding := config.export.model_dump(include={"word_bits"}, exclude_defaults=True):
        said["export"] = rounding
    said["task"] = {task["name"]: task for task in said["task"]}
    return {"config": said, "data": dict(data.digests)}


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


# --- out -------------------------------------------------------------------------------------------------------------------


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
            word_bits=config.export.word_bits,
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
        write_json(partial / SPEC_FILE, spec.model_dump(mode="json"))
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
