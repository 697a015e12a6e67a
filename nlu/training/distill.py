"""A teacher's knowledge in a smaller network, told once, in the order it happens.

    nlu vectorizer distill CONFIG                                  one process
    horovodrun --gloo -np 2 nlu vectorizer distill CONFIG          two
    nlu vectorizer distill CONFIG --resume                         on from wherever it stopped

    phrases -> the teacher's vector of each -> a student cut out of the teacher -> stage after stage -> a vectorizer

Every stage is a training run as `nlu vectorizer train` makes them (train.py), with a folder of its own in OUT/NAME, its
checkpoints and its report; the teacher is one more task in it. Each begins with the network that the one before it ended
with, and the last one exports.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nlu.public_data import Labelled
from nlu.training import config as configs
from nlu.training import datasets, loop, network, student
from nlu.training.config import Config, Distill, Model, Stage, Task
from nlu.training.data import Data, tested_phrases
from nlu.training.datasets import identity
from nlu.training.distributed import world, write_once
from nlu.training.loop import TaskData
from nlu.training.network import Network
from nlu.training.record import MODEL
from nlu.training.sampler import Pool
from nlu.training.teacher import Teaching, Vectors, read_vectors, write_vectors
from nlu.training.train import Begun, Finished, place, run, unwatched

logger = logging.getLogger(__name__)

LESSON = "teacher"
HELD = 512  # phrases whose cosine to the teacher is watched
CUT_PHRASES = 20_000  # what neurons and principal components are chosen on


def distill(
    path: Path,
    *,
    resume: bool = False,
    begun: Begun = unwatched,
    encoded: Callable[[int, int], None] = lambda done, total: None,
) -> Finished:
    """Make the student of a config; `begun` is told of each stage and gives what watches its steps.

    Raises Interrupted, with a checkpoint written, when the process is told to stop, and ValueError or OSError for
    whatever a config, its data or an earlier run in the same folder have wrong.
    """
    # What.
    config, plan = settings(path)
    folder = Path(config.run.out) / config.run.name
    if (folder / "student").exists() and not resume:
        raise ValueError(
            f"{folder}: found a student in it, expected none; go on with --resume, rename this run or remove the folder"
        )

    # Whose knowledge, of what.
    here = world()
    device = place(here, config)
    teacher = read_teacher(plan.teacher, config).to(device)
    phrases, digests = read_phrases(config, plan)
    held, taught = phrases[:HELD], phrases[HELD:]
    path = folder / "teacher" / f"{_name_of(teacher, phrases)}.f16"
    cast = partial(loop.cast, config=config, device=device)
    write_once(here, lambda: write_vectors(teacher, phrases, path, cast=cast, done=encoded))
    vectors = read_vectors(path, teacher.dim)

    # To whom: written down at once, so that a run which is stopped goes on with the same student.
    write_once(here, lambda: make_student(folder / "student", teacher, plan, config, taught, vectors[HELD:]))
    components = np.load(folder / "student" / COMPONENTS) if config.model.dim else None
    before = folder / "student"

    # Stage after stage.
    finished: Finished | None = None
    for number, stage in enumerate(plan.stages):
        inner = bool(stage.attention or stage.tokens)
        teaching = Teaching(
            stage,
            vectors[HELD:],
            None if components is None else torch.from_numpy(components),
            (tuple(held), torch.from_numpy(np.asarray(vectors[:HELD], np.float32))),
            network=teacher if inner else None,
            words=_common_words(network.load(before).tokenizer, teacher.tokenizer) if inner else None,
            layers=plan.layers,
        )
        staged = stage_config(config, plan, stage, before)
        finished = run(
            staged,
            resume=resume,
            watch=begun(stage.name, staged),
            folder=folder / f"{number + 1}-{stage.name}",
            lessons=lambda _config, data, teaching=teaching: with_lesson(  # type: ignore[misc]
                data, taught, teaching, plan, config, digests
            ),
            int8=stage.int8,
            exporting=number == len(plan.stages) - 1,
        )
        before = finished.folder / MODEL
    if finished is None:
        raise ValueError("distill: found no stage; this is a bug, the config refuses that")
    return finished


# --- what -------------------------------------------------------------------------------------------------------------------

COMPONENTS = "components.npy"


def settings(path: Path) -> tuple[Config, Distill]:
    """The config and its plan. Raises ConfigInvalid, naming the key that this command cannot do."""
    config = configs.load(path)
    for wrong, complaint in (
        (
            config.distill is None,
            "distill: found no such section, expected one; see nlu/training/configs/student.toml",
        ),
        (
            config.mlm,
            "mlm: found a stage of raw text, which belongs to the teacher's own run; remove the section",
        ),
        (
            config.batch.chunk and config.batch.recompute,
            "batch.recompute: found true, expected false: what is compared layer by layer is computed once; change it",
        ),
        (not config.export.token_dim, "export.token_dim: found 0, expected at least 1; raise it"),
    ):
        if wrong:
            raise configs.ConfigInvalid(f"{path}: {complaint}")
    assert config.distill is not None  # for the type checker
    return config, config.distill


def stage_config(config: Config, plan: Distill, stage: Stage, before: Path) -> Config:
    """The training run that a stage is."""
    rates = {"learning_rate": stage.learning_rate, "warm_up": stage.warm_up}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"base": str(before)}),
            "tasks": config.tasks if stage.tasks else (),
            "optimizer": config.optimizer.model_copy(update=rates),
            "schedule": config.schedule.model_copy(update={"steps": stage.steps}),
            "export": config.export.model_copy(update={"base_share": stage.base_share}),
            "distill": plan.model_copy(update={"stages": (stage,)}),
        }
    )


# --- whose knowledge, of what -------------------------------------------------------------------------------------------------


def read_teacher(name: str, config: Config) -> Network:
    """A run's model, or a base the exporter knows; it learns nothing any more."""
    folder = Path(name)
    teacher = (
        network.load(folder)
        if folder.exists()
        else network.make(Model(base=name, max_tokens=config.model.max_tokens, pooling=config.model.pooling))
    )
    teacher.max_tokens = config.model.max_tokens
    return teacher.requires_grad_(False).eval()


def read_phrases(config: Config, plan: Distill) -> tuple[list[str], dict[str, str]]:
    """Distinct raw phrases of the plan's sets, in an order that is nobody's, without those that something is tested on;
    and the digests of the files they came from."""
    root = Path(config.data.root)

    def loaded(source: datasets.Source, split: str) -> datasets.Loaded:
        return datasets.read(source, split, root, uncased=config.model.uncased)

    tested = tested_phrases(config, loaded)
    found: dict[int, str] = {}
    digests: dict[str, str] = {}
    for name in plan.datasets:
        read = loaded(configs.source_of(name, datasets.Form.PAIRS), plan.split)
        texts = {
            text
            for column in loop.texts_of(read.examples)
            for text in column
            if text not in tested and _written_in(text, plan.scripts)
        }
        chosen = heapq.nsmallest(plan.limit, texts, key=identity) if plan.limit else texts
        found |= {identity(text): text for text in chosen}
        digests |= {file.name: file.sha256 for file in read.files}
    phrases = [found[key] for key in sorted(found)]
    if len(phrases) <= HELD + plan.batch:
        raise ValueError(
            f"distill.datasets: found {len(phrases)} phrases, expected more than {HELD + plan.batch}; name more sets, or "
            "check distill.scripts"
        )
    return phrases, digests


def _written_in(text: str, scripts: Sequence[str]) -> bool:
    """Whether every letter is of one of some scripts; all are if none is named."""
    if not scripts or text.isascii():
        return not scripts or "latin" in scripts
    wanted = tuple(script.upper() for script in scripts)
    return all(unicodedata.name(each, "").startswith(wanted) for each in text if each.isalpha())


def _name_of(teacher: Network, phrases: Sequence[str]) -> str:
    """What tells one table of vectors from another: whose, and of what."""
    digest = hashlib.sha256()
    for name, tensor in teacher.graph.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    for phrase in phrases:
        digest.update(phrase.encode() + b"\n")
    return digest.hexdigest()[:16]


# --- to whom ------------------------------------------------------------------------------------------------------------------


def make_student(
    folder: Path,
    teacher: Network,
    plan: Distill,
    config: Config,
    phrases: Sequence[str],
    vectors: Vectors,
) -> None:
    """Cut the student, and write it down with the compression of the teacher's space; nothing where that was done."""
    if folder.exists():
        return
    some = np.asarray(vectors[:CUT_PHRASES], np.float32)
    made = student.cut(
        teacher,
        phrases[:CUT_PHRASES] if not plan.vocabulary else phrases,
        torch.from_numpy(some),
        layers=plan.layers,
        neurons=plan.neurons,
        vocabulary=plan.vocabulary,
        dim=config.model.dim,
        max_tokens=config.model.max_tokens,
    )
    unfinished = folder.with_name(f".{folder.name}.partial")
    made.save(unfinished)
    if config.model.dim:
        components, kept = network.principal_components(torch.from_numpy(some), config.model.dim)
        np.save(unfinished / COMPONENTS, components.numpy())
        logger.info(
            "%d principal components keep %.1f %% of the teacher's vectors", config.model.dim, 100 * kept
        )
    unfinished.rename(folder)


def _common_words(ours: object, theirs: object) -> Tensor | None:
    """The teacher's number of each of the student's words; None where they are the same."""
    words: dict[str, int] = ours.get_vocab()  # type: ignore[attr-defined]
    known: dict[str, int] = theirs.get_vocab()  # type: ignore[attr-defined]
    if words == known:
        return None
    return torch.tensor([known[word] for word in sorted(words, key=words.__getitem__)])


# --- stage after stage ----------------------------------------------------------------------------------------------------------


def with_lesson(
    data: Data,
    phrases: Sequence[str],
    teaching: Teaching,
    plan: Distill,
    config: Config,
    digests: dict[str, str],
) -> Data:
    """The data of a run and one more task: to be like the teacher, in its share of the steps."""
    share = teaching.stage.tasks
    if share == 1.0:
        return data
    task = Task.model_construct(name=LESSON, kind="lesson", datasets=("phrases",))  # type: ignore[call-arg]
    pool = Pool(LESSON, "phrases", len(phrases), plan.batch, share=1.0)
    if data.tasks:
        pool = replace(pool, share=_share_for(pool, [each.pool for each in data.tasks], 1 - share, config))
    rows = tuple(Labelled(phrase, ()) for phrase in phrases)
    lesson = TaskData(task, pool, rows, (), (), teaching)
    return replace(data, tasks=(*data.tasks, lesson), digests={**data.digests, **digests})


def _share_for(pool: Pool, others: Sequence[Pool], wanted: float, config: Config) -> float:
    """The share of a pool's task for which it gets `wanted` of the steps."""
    temperature = config.mix.temperature
    totals: dict[str, int] = {}
    shares = {each.task: each.share for each in others}
    for each in others:
        totals[each.task] = totals.get(each.task, 0) + each.size
    weight = sum(shares[task] * total ** (1 / temperature) for task, total in totals.items())
    return float(wanted / (1 - wanted) * weight / pool.size ** (1 / temperature))
