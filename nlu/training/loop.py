"""The steps of a run, as a generator: sampler -> noise -> tokens -> vectors -> loss of the task -> gradients -> optimizer.

Everything that is drawn at a step is a function of (seed, step, rank or row): the pool and its rows (sampler.py), the
noise, and torch's own random state, which is set anew at every step. So a checkpoint needs no random state, and a run
that was stopped goes on as if it had not been.

    TaskData       one data set as one task uses it: rows, labels, and a few rows held back to measure on
    train          yields (steps done, what happened)
    measure        how good a task is on the rows held back
    save, resume   checkpoints: safetensors and JSON, whole or not at all
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.optim import Optimizer

from nlu.public_data import Labelled, Tagged
from nlu.training.augment import Augmenter
from nlu.training.config import Config, Task
from nlu.training.config import Optimizer as OptimizerConfig
from nlu.training.datasets import OUT_OF_SCOPE, Example, Pair, Scored, identity, labels_of
from nlu.training.distributed import World, write_once
from nlu.training.losses import (
    Loss,
    Outcome,
    UncertaintyWeights,
    cached_backward,
    make_loss,
    pair_groups,
    text_ids,
)
from nlu.training.network import OUTSIDE, Head, Network, Tokens, layer_of, layers_of, token_labels, word_tags
from nlu.training.sampler import Pool, Sampler

FORMAT = 1
STATE_FILE, MODEL_FILE, OPTIMIZER_FILE = "state.json", "model.safetensors", "optimizer.safetensors"
REFERENCES = 4  # training rows of a label that held rows may be nearest to


class Diverged(ValueError):
    """A loss that is no longer a number; nothing of that step was kept."""


class Interrupted(Exception):
    """The run was told to stop and did, with a checkpoint of `step` steps in `path`."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"stopped after {step} steps; {path} holds them, --resume goes on from there")
        self.step, self.path = step, path


# --- what is learnt from --------------------------------------------------------------------------------------------------


class Lesson(Protocol):
    """What a teacher has to say of the rows of a pool."""

    def work(
        self, rows: Sequence[int], chunks: Sequence[Tokens], order: Sequence[int], network: Network
    ) -> Work:
        """What is to be done with chunks of a batch's phrases, perhaps noisy; `order` says which row each phrase is of."""

    def measure(self, network: Network, *, batch: int) -> tuple[str, float]:
        """(measure, value from 0 to 1) on phrases held back."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """One data set as one task uses it; row i of the pool is `examples[i]`, and `held` are never trained on."""

    task: Task
    pool: Pool
    examples: tuple[Example, ...]
    held: tuple[Example, ...]
    labels: tuple[str, ...]  # sorted; empty where the task has none
    lesson: Lesson | None = None  # of a task whose targets a teacher gives

    @property
    def head(self) -> Head | None:
        """The head it trains, if any."""
        match self.task.kind:
            case "classify" | "tags" | "tokens" as kind:
                return Head(self.pool.name, kind, self.labels)
        return None


def task_data(
    task: Task, dataset: str, examples: Iterable[Example], held: Iterable[Example], *, batch: int
) -> TaskData:
    """Rows as a task uses them. Held rows of labels that no training row has are left out; none could be right."""
    rows = tuple(examples)
    if task.kind == "labels" and task.loss.name != "supervised_contrastive":
        # Only that loss knows rows that are negatives for all; mined triplets would pull them together.
        rows = tuple(row for row in rows if _label(row) != OUT_OF_SCOPE)
    match task.kind:
        case "labels" | "classify":
            labels = tuple(sorted({_label(row) for row in rows}))
        case "tags":
            labels = tuple(sorted(labels_of(rows)))
        case "tokens":
            labels = token_labels(labels_of(rows))
        case _:
            labels = ()
    if task.kind in ("classify", "tokens", "tags") and len(labels) < 2:
        raise ValueError(
            f"task {task.name!r}: found {len(labels)} label(s) in {dataset}, expected at least 2 to tell apart; "
            "check the file, or leave the set out"
        )
    known = set(labels)
    kept = tuple(row for row in held if not isinstance(row, Labelled) or known.issuperset(row.labels))
    numbers = {label: i for i, label in enumerate(labels)}
    of_rows = np.array([_number(row, numbers) for row in rows], np.int64) if task.examples_per_label else None
    pool = Pool(
        task.name,
        dataset,
        len(rows),
        batch,
        share=task.share,
        per_label=task.examples_per_label,
        labels=of_rows,
    )
    return TaskData(task, pool, rows, kept, labels)


def texts_of(examples: Sequence[Example]) -> list[list[str]]:
    """Columns of phrases: anchors and positives, both sides of a scored pair, or the phrases alone."""
    rows: list[tuple[str, ...]] = []
    for example in examples:
        match example:
            case Pair(anchor=one, positive=other) | Scored(a=one, b=other):
                rows.append((one, other))
            case Labelled(phrase=phrase) | Tagged(phrase=phrase):
                rows.append((phrase,))
    return [list(column) for column in zip(*rows, strict=True)]


def _label(example: Example) -> str:
    """The first label, which is the one that counts where there may be one only."""
    return example.labels[0] if isinstance(example, Labelled) else ""


def _number(example: Example, numbers: Mapping[str, int]) -> int:
    """Out of scope is -1, the label of a negative for all, not a class of its own."""
    label = _label(example)
    return -1 if label == OUT_OF_SCOPE else numbers[label]


def _targets(data: TaskData, examples: Sequence[Example]) -> Tensor:
    """What the task's loss wants beside vectors or logits; clean phrases tell who says the same."""
    numbers = {label: i for i, label in enumerate(data.labels)}
    match data.task.kind:
        case "pairs":
            pairs = [example for example in examples if isinstance(example, Pair)]
            anchors, positives = texts_of(pairs)
            return pair_groups(anchors, positives, [pair.group for pair in pairs])
        case "similarity":
            return torch.tensor([example.score for example in examples if isinstance(example, Scored)])
        case "labels":
            labels = torch.tensor([_number(example, numbers) for example in examples])
            if data.task.loss.name != "supervised_contrastive":
                return labels
            return torch.stack([labels, text_ids(texts_of(examples)[0])], dim=1)
        case "classify":
            return torch.tensor([numbers[_label(example)] for example in examples])
        case "tags":
            targets = torch.zeros(len(examples), len(numbers))
            for row, example in enumerate(examples):
                for label in example.labels if isinstance(example, Labelled) else ():
                    targets[row, numbers[label]] = 1.0
            return targets
        case "tokens" | "lesson":
            raise ValueError("targets of words need tokens, those of lessons a teacher; this is a bug")


def _word_targets(data: TaskData, examples: Sequence[Example], chunks: Sequence[Tokens]) -> Tensor:
    """[words] of phrases in the order of the chunks; a held span of a label nobody was taught is outside."""
    numbers = {label: i for i, label in enumerate(data.labels)}
    bounds = [words for chunk in chunks for words in chunk.bounds]
    tags = [
        tag
        for example, words in zip(examples, bounds, strict=True)
        for tag in word_tags(example.spans if isinstance(example, Tagged) else (), words)
    ]
    return torch.tensor([numbers.get(tag, numbers[OUTSIDE]) for tag in tags], dtype=torch.int64)


# --- who learns -----------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """The network and, where weights of tasks are learnt, those: all that an optimizer changes and a checkpoint holds."""

    def __init__(self, network: Network, tasks: Sequence[Task], *, uncertainty: bool) -> None:
        super().__init__()
        self.network = network
        self.fixed = {task.name: task.weight for task in tasks}
        self.uncertainty = UncertaintyWeights(list(self.fixed)) if uncertainty else None
        if self.uncertainty is not None:
            with torch.no_grad():  # exp(-s) is the weight
                for value, weight in zip(self.uncertainty.log_variances, self.fixed.values(), strict=True):
                    value.fill_(-math.log(weight))

    def weigh(self, task: str, loss: Tensor) -> Tensor:
        """The loss as it counts."""
        if self.uncertainty is None:
            return loss * self.fixed[task]
        weighted: Tensor = self.uncertainty(task, loss)
        return weighted

    def weights(self) -> dict[str, float]:
        """What each task's loss is multiplied by now."""
        return dict(self.fixed) if self.uncertainty is None else self.uncertainty.weights()


def make_optimizer(learner: Learner, config: OptimizerConfig, *, ranks: int) -> Optimizer:
    """AdamW, or LAMB (You et al. 2019), over groups of one rate and one decay each; `rate` scales them at each step.

    Biases, norms and task weights do not decay. Raises ValueError where LAMB's package is missing.
    """
    factor = _scale(config, ranks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((_rate_of(name, learner.network, config) * factor, decay), []).append(parameter)
    parameters = [
        {"params": group, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]
    if config.name == "lamb":
        return _lamb(parameters, config)
    return torch.optim.AdamW(parameters, betas=config.betas, eps=config.epsilon, fused=True)


def _scale(config: OptimizerConfig, ranks: int) -> float:
    return {"none": 1.0, "sqrt": math.sqrt(ranks), "linear": float(ranks)}[config.scale_with_ranks]


def _rate_of(name: str, network: Network, config: OptimizerConfig) -> float:
    _, _, inner = name.partition("network.graph.encoder.")
    if inner:
        layers = layers_of(network.graph.encoder)
        return config.learning_rate * config.layer_decay ** (layers - layer_of(inner, layers))
    trained = len(network.graph.dense or ()) - 2 * network.fresh  # type: ignore[arg-type]
    _, _, place = name.partition("network.graph.dense.")
    if place and int(place.partition(".")[0]) < trained:
        return config.learning_rate
    return config.head_learning_rate


def _lamb(parameters: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise ValueError(
            "optimizer.name: found 'lamb' but no module pytorch_optimizer, expected the 'train' extra; "
            "pip install 'chorus-nlu[train]', or take 'adamw'"
        ) from error
    # As in the authors' code: a step in proportion to a tensor's norm is for matrices, biases and norms take Adam's; decay
    # is part of the update whose norm is taken; warm-up makes up for moments that begin at zero (left alone, the package
    # takes first steps ten times as long). A matrix that starts at zero, one half of LoRA, would never get away from there.
    groups = [
        group | {"params": members, "adam": plain, "adam_debias": True}
        for group in parameters
        for plain, members in _plain_or_not(group["params"])
    ]
    made: Optimizer = Lamb(groups, betas=config.betas, eps=config.epsilon, weight_decouple=False)
    return made


def _plain_or_not(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """Whether they take Adam's step, and which do."""
    for plain in (False, True):
        members = [each for each in parameters if plain == (each.ndim < 2 or not each.any())]
        if members:
            yield plain, members


def rate(step: int, config: OptimizerConfig, *, steps: int) -> float:
    """What rates are multiplied by at a step, from 0: up to 1 over the warm-up, then down to 0 at the end."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    done = (step - config.warm_up) / max(1, steps - config.warm_up)
    match config.decay:
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "constant":
            return 1.0


# --- a step -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """One step, as all ranks together saw it."""

    task: str
    dataset: str
    loss: float  # before its weight
    weight: float
    negatives: float | None  # per anchor, mean; None for losses that do not contrast rows
    learning_rate: float  # of the encoder's top
    phrases: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint."""

    path: Path


Event = Trained | Saved


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank computes at one step: `encode` makes [rows, width] of a chunk, `loss` gets all rows of each column."""

    columns: tuple[tuple[Tokens, ...], ...]
    encode: Callable[[Tokens], Tensor]
    loss: Callable[[Sequence[Tensor]], Outcome]

    @property
    def phrases(self) -> int:
        """Over all columns."""
        return sum(len(chunk.ids) for column in self.columns for chunk in column)


def train(
    learner: Learner,
    optimizer: Optimizer,
    data: Sequence[TaskData],
    config: Config,
    world: World,
    *,
    sampler: Sampler,
    augmenter: Augmenter | None = None,
    start: int = 0,
    checkpoints: Path,
    stamp: Mapping[str, Any],
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Event]]:
    """Train from `start` to the schedule's end. Raises Diverged for a loss that is no number, Interrupted once told to.

    The optimizer comes as `World.wrap_optimizer` gives it: it averages gradients over ranks and clips them. All ranks
    stop at the same step, whichever of them was told. A checkpoint is written every `checkpoint_every` steps, at the
    end, and on the way out.
    """
    by_pool = {each.pool.name: each for each in data}
    losses = {each.task.name: make_task_loss(each.task) for each in data if each.lesson is None}
    steps = config.schedule.steps
    for step in range(start, steps):
        began = time.perf_counter()
        # Dropout must be the same after a resume, and differ between ranks.
        torch.manual_seed(identity(f"{config.run.seed}\0{step}\0{world.rank}"))
        learner.train()
        batch = sampler.batch(step)
        each = by_pool[batch.pool.name]
        work = prepare(
            each,
            batch.rows.tolist(),
            learner.network,
            losses.get(each.task.name),
            world,
            config,
            noise=StepNoise(augmenter, config, step),
        )
        weight = learner.weights()[each.task.name]
        factor = rate(step, config.optimizer, steps=steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        optimizer.zero_grad()
        outcome = backward(
            work, each.task.name, learner, recompute=config.batch.chunk > 0 and config.batch.recompute
        )
        seen = {"loss": outcome.loss.item(), "stop": float(stopping())}
        if outcome.negatives is not None:
            seen["negatives"] = outcome.negatives.float().mean().item()
        seen = world.average(seen)
        if not math.isfinite(seen["loss"]):
            raise Diverged(
                f"step {step + 1}, {each.pool.name}: found a loss of {seen['loss']}, expected a number; "
                "train again under another name, with a lower optimizer.learning_rate, a longer warm_up or run.autocast = 'off'"
            )
        optimizer.step()
        done = step + 1
        yield (
            done,
            Trained(
                each.task.name,
                each.pool.dataset,
                seen["loss"],
                weight,
                seen.get("negatives"),
                config.optimizer.learning_rate * _scale(config.optimizer, world.size) * factor,
                work.phrases * world.size,
                time.perf_counter() - began,
            ),
        )
        told = seen["stop"] > 0
        every = config.schedule.checkpoint_every
        if told or done == steps or (every and done % every == 0):
            path = checkpoints / f"step-{done:08d}"
            state = {"step": done, "visits": sampler.visits(done), "stamp": dict(stamp)}
            write_once(world, partial(save, path, learner, optimizer, state, keep=config.schedule.keep))
            yield done, Saved(path)
            if told:
                raise Interrupted(done, path)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """What a step's phrases suffer; a row's noise depends on seed, step and row, not on ranks."""

    augmenter: Augmenter | None
    config: Config
    step: int

    def on(self, task: Task, columns: Sequence[list[str]], rows: Sequence[int]) -> list[list[str]]:
        """Columns with noise where the task wants it: never on words, whose spans would move."""
        if self.augmenter is None or not task.augment or task.kind == "tokens":
            return list(columns)
        noisy = len(columns) if self.config.augment.both_sides else 1
        return [
            [
                self.augmenter.apply(
                    text, np.random.default_rng((self.config.run.seed, self.step, row, number))
                )
                for text, row in zip(column, rows, strict=True)
            ]
            if number < noisy
            else column
            for number, column in enumerate(columns)
        ]


def make_task_loss(task: Task) -> Loss:
    """The loss a task names, with its options."""
    return make_loss(task.loss.name, **task.loss.model_dump(exclude={"name"}))


def prepare(
    data: TaskData,
    rows: Sequence[int],
    network: Network,
    loss: Loss | None,
    world: World,
    config: Config,
    *,
    noise: StepNoise,
) -> Work:
    """Tokens of some rows of a pool, in chunks of similar length, and what is to be done with their vectors."""
    examples = [data.examples[row] for row in rows]
    device = network.device
    columns = [
        _chunked(column, network, config.batch.chunk)
        for column in noise.on(data.task, texts_of(examples), rows)
    ]
    if data.lesson is not None:
        ((chunks, order),) = columns
        work = data.lesson.work(rows, [chunk.to(device) for chunk in chunks], order, network)
        return replace(work, encode=cast(work.encode, config, device))
    if loss is None:
        raise ValueError(f"{data.pool.name}: neither a lesson nor a loss; this is a bug")
    if data.task.kind == "tokens":
        ((chunks, order),) = columns
        targets = _word_targets(data, [examples[i] for i in order], chunks).to(device)
    else:
        targets = _targets(data, examples).to(device)
    # Rows went to the chunks by length; a loss wants them as the targets stand.
    places = [torch.tensor(order).argsort().to(device) for _, order in columns]

    encode = network.words if data.task.kind == "tokens" else network.sentences

    def of_vectors(vectors: Sequence[Tensor]) -> Outcome:
        if data.task.kind == "tokens":
            return loss([network.logits(data.pool.name, vectors[0])], targets, world=world)
        ordered = [column[place] for column, place in zip(vectors, places, strict=True)]
        if data.head is not None:
            ordered = [network.logits(data.pool.name, ordered[0])]
        return loss(ordered, targets, world=world)

    moved = tuple(tuple(chunk.to(device) for chunk in chunks) for chunks, _ in columns)
    return Work(moved, cast(encode, config, device), of_vectors)


def backward(work: Work, task: str, learner: Learner, *, recompute: bool) -> Outcome:
    """Gradients of the weighted loss; the outcome has the loss before its weight."""
    plain: list[Tensor] = []

    def weighted(vectors: Sequence[Tensor]) -> Outcome:
        outcome = work.loss(vectors)
        plain.append(outcome.loss.detach())
        return replace(outcome, loss=learner.weigh(task, outcome.loss))

    if recompute:
        outcome = cached_backward(work.encode, work.columns, weighted)
    else:
        outcome = weighted([torch.cat([work.encode(chunk) for chunk in column]) for column in work.columns])
        outcome.loss.backward()  # type: ignore[no-untyped-call]
    return Outcome(plain[0], outcome.negatives)


def cast(
    encode: Callable[[Tokens], Tensor], config: Config, device: torch.device
) -> Callable[[Tokens], Tensor]:
    """The same encoding, computed in the numbers that `run.autocast` names."""

    def within(chunk: Tokens) -> Tensor:
        # Entered anew for each chunk: its cache of cast weights must not outlive a pass without gradients.
        with torch.autocast(device.type, torch.bfloat16, enabled=config.run.autocast == "bf16"):
            return encode(chunk)

    return within


def _chunked(phrases: Sequence[str], network: Network, chunk: int) -> tuple[list[Tokens], list[int]]:
    """Chunks, and which phrase each of their rows is. Longest first, so that little of a chunk is padding."""
    if not chunk:
        return [network.tokenise(phrases)], list(range(len(phrases)))
    lengths = network.lengths(phrases)
    order = sorted(range(len(phrases)), key=lambda i: (-lengths[i], i))
    starts = range(0, len(order), chunk)
    return [network.tokenise([phrases[i] for i in order[start : start + chunk]]) for start in starts], order


# --- how good ---------------------------------------------------------------------------------------------------------------


def measure(network: Network, data: TaskData, *, batch: int = 64) -> tuple[str, float] | None:
    """(measure, value from 0 to 1) on the held rows, without noise; None where no row is held.

    Pairs: whether the own positive is the nearest of all held ones. Labels: whether the nearest of some training rows
    has the same label. Similarity: rank correlation. Classes and tags: whether the top label is right. Words: F1 of
    words that belong to a span.
    """
    if data.lesson is not None:
        return data.lesson.measure(network, batch=batch)
    if not data.held:
        return None
    columns = texts_of(data.held)
    match data.task.kind:
        case "pairs":
            return "r_at_1", _recall(network, data.held, columns, batch)
        case "similarity":
            a, b = (network.encode(column, batch=batch) for column in columns)
            scores = [example.score for example in data.held if isinstance(example, Scored)]
            found = float(spearmanr((a * b).sum(dim=1).numpy(), scores).statistic)
            return "spearman", 0.0 if math.isnan(found) else found
        case "labels":
            return "accuracy", _nearest(network, data, columns[0], batch)
        case "classify" | "tags":
            return "accuracy", _top_label(network, data, columns[0], batch)
        case "tokens":
            return "f1", _word_f1(network, data, columns[0], batch)
        case "lesson":
            raise ValueError("a lesson without a teacher; this is a bug")


def _recall(network: Network, held: Sequence[Example], columns: list[list[str]], batch: int) -> float:
    anchors, positives = (network.encode(column, batch=batch) for column in columns)
    nearest = (anchors @ positives.T).argmax(dim=1).tolist()
    pairs = [pair for pair in held if isinstance(pair, Pair)]
    right = [
        pair.group == pairs[found].group or pair.positive == pairs[found].positive
        for pair, found in zip(pairs, nearest, strict=True)
    ]
    return float(np.mean(right))


def _nearest(network: Network, data: TaskData, phrases: list[str], batch: int) -> float:
    wanted = [_label(example) for example in data.held]
    references: dict[str, list[str]] = {label: [] for label in wanted}
    for example, phrase in zip(data.examples, texts_of(data.examples)[0], strict=True):
        near = references.get(_label(example))
        if near is not None and len(near) < REFERENCES:
            near.append(phrase)
    labels = [label for label, near in references.items() for _ in near]
    known = network.encode([phrase for near in references.values() for phrase in near], batch=batch)
    found = (network.encode(phrases, batch=batch) @ known.T).argmax(dim=1).tolist()
    return float(np.mean([labels[i] == label for i, label in zip(found, wanted, strict=True)]))


@torch.no_grad()
def _top_label(network: Network, data: TaskData, phrases: list[str], batch: int) -> float:
    vectors = network.encode(phrases, batch=batch).to(network.device)
    top = network.logits(data.pool.name, vectors).argmax(dim=1).tolist()
    right = [
        data.labels[i] in (example.labels if isinstance(example, Labelled) else ())
        for i, example in zip(top, data.held, strict=True)
    ]
    return float(np.mean(right))


@torch.no_grad()
def _word_f1(network: Network, data: TaskData, phrases: list[str], batch: int) -> float:
    training = network.training
    network.eval()
    both = found = wanted = 0
    for start in range(0, len(phrases), batch):
        chunk = network.tokenise(phrases[start : start + batch])
        targets = _word_targets(data, data.held[start : start + batch], [chunk])
        states = network.words(chunk.to(network.device))
        predicted = network.logits(data.pool.name, states).argmax(dim=1).cpu()
        outside = data.labels.index(OUTSIDE)
        both += int(((predicted == targets) & (targets != outside)).sum())
        found += int((predicted != outside).sum())
        wanted += int((targets != outside).sum())
    network.train(training)
    return 2 * both / max(1, found + wanted)


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def save(
    folder: Path, learner: Learner, optimizer: Optimizer, state: Mapping[str, Any], *, keep: int
) -> None:
    """Write a checkpoint whole or not at all, and leave the newest `keep`. ValueError for weights that are no numbers."""
    broken = [name for name, value in learner.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise Diverged(
            f"{folder}: found weights that are no numbers ({broken[0]} and {len(broken) - 1} more), expected numbers; "
            "train again under another name, with a lower optimizer.learning_rate or a longer warm_up"
        )
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(learner, str(partial / MODEL_FILE))
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, slots in zip(_names(learner, optimizer), _slots(optimizer), strict=True):
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(name, {})[slot] = value
    save_file(tensors, partial / OPTIMIZER_FILE)
    whole = {"format": FORMAT, **state, "optimizer": plain, "torch": torch.__version__}
    (partial / STATE_FILE).write_text(json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _to_disk(folder.parent)
    for old in saved(folder.parent)[:-keep]:
        shutil.rmtree(old)


def saved(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def resume(
    checkpoints: Path, learner: Learner, optimizer: Optimizer, sampler: Sampler, stamp: Mapping[str, Any]
) -> int:
    """Load the newest checkpoint in place and say how many steps it has behind it; 0 where there is none yet.

    Raises ValueError where it belongs to another experiment or to other data, naming what differs.
    """
    found = saved(checkpoints)
    if not found:
        return 0
    folder = found[-1]
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: found format {state.get('format')}, expected {FORMAT}; resume it with the code that wrote it"
        )
    step = int(state["step"])
    differing = _differing(state["stamp"], stamp)
    if not differing and state["visits"] != sampler.visits(step):
        differing = ["the order of batches"]
    if differing:
        raise ValueError(
            f"{folder}: found another {', '.join(differing)}, expected what the run began with; restore that, or start "
            "a run of another name"
        )
    load_model(learner, folder / MODEL_FILE)
    tensors = load_file(folder / OPTIMIZER_FILE)
    slots: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state["optimizer"].items()}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        slots.setdefault(name, {})[slot] = tensor
    names = _names(learner, optimizer)
    optimizer.load_state_dict(
        {
            "state": {i: slots[name] for i, name in enumerate(names) if name in slots},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return step


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    """Keys whose values differ, the innermost ones."""
    keys: list[str] = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += _differing(a, b, f"{path}{key} ")
        elif a != b:
            keys.append(f"{path}{key}")
    return keys


def _names(learner: Learner, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _slots(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    """State of each parameter, in the optimizer's order; empty for those no step has trained."""
    return [
        optimizer.state.get(parameter, {})
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _to_disk(path: Path) -> None:
    """Past the operating system's cache, so that a power cut leaves a checkpoint whole or absent."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
