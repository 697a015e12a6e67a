"""One trial of one peer: it learns from texts and labels, scores other texts, and the seconds are told.

    python -m benchmarks.peer MODULE:CLASS QUESTION.json TRIAL.npz

That is one trial in a process of its own, which may belong to another environment: nothing but NumPy is needed here.
Whatever reads text can take part; it only has to be a Peer. `benchmarks/peers.py` asks the questions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Row = tuple[str, tuple[str, ...]]  # a text and its labels; none: out of scope


@dataclass(frozen=True, slots=True)
class Task:
    """A set of texts. Out-of-scope rows are in dev and test alone: a peer never learns from them."""

    name: str
    train: list[Row]
    dev: list[Row]  # thresholds are chosen here; empty where the set has none
    test: list[Row]
    multi: bool  # a text may have several labels, or none without being out of scope


class Predictor(Protocol):
    """What a peer has learnt."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of `scores`."""

    @property
    def encode_s(self) -> float:
        """CPU seconds of `fit` that went into vectors of the texts; 0 where learning and encoding are one."""

    def scores(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """[texts, labels]; higher is likelier, and one scale for all texts."""


class Peer(Protocol):
    """A way to learn labels. Its constructor imports and reads weights, which no second counts."""

    name: str
    packages: tuple[str, ...]  # distributions whose versions are told with the figures

    def fit(
        self, texts: Sequence[str], labels: Sequence[tuple[str, ...]], *, multi: bool, seed: int
    ) -> Predictor:
        """Learn, from the texts to a predictor that is ready to score."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Scores and seconds. CPU seconds are those of the whole process, so a busy neighbour is not counted."""

    labels: tuple[str, ...]
    dev: NDArray[np.float32]  # [dev rows, labels]
    test: NDArray[np.float32]  # [test rows, labels]
    fit_s: float  # CPU, encoding included
    fit_wall_s: float
    encode_s: float  # CPU, of fit_s
    score_ms: float  # CPU, of one test text among all of them
    versions: Mapping[str, str]


def attempt(peer: Peer, task: Task, *, seed: int) -> Trial:
    """Learn from the train rows and score the others, in this process."""
    texts, labels = [text for text, _ in task.train], [labels for _, labels in task.train]
    began, began_wall = time.process_time(), time.perf_counter()
    predictor = peer.fit(texts, labels, multi=task.multi, seed=seed)
    fitted, fitted_wall = time.process_time(), time.perf_counter()
    test = predictor.scores([text for text, _ in task.test])
    scored = time.process_time()
    dev = predictor.scores([text for text, _ in task.dev]) if task.dev else test[:0]
    return Trial(
        labels=predictor.labels,
        dev=dev.astype(np.float32),
        test=test.astype(np.float32),
        fit_s=fitted - began,
        fit_wall_s=fitted_wall - began_wall,
        encode_s=predictor.encode_s,
        score_ms=1000 * (scored - fitted) / len(task.test),
        versions={package: version(package) for package in peer.packages},
    )


def write_question(path: Path, task: Task, *, seed: int) -> None:
    """What the other process reads."""
    path.write_text(json.dumps({"task": asdict(task), "seed": seed}), encoding="utf-8")


def read_trial(path: Path) -> Trial:
    """What the other process wrote."""
    with np.load(path) as arrays:
        about: dict[str, Any] = json.loads(str(arrays["about"]))
        return Trial(dev=arrays["dev"], test=arrays["test"], labels=tuple(about.pop("labels")), **about)


def main() -> None:
    """The other process."""
    spec, question, answer = sys.argv[1:]
    # One core, whatever a library takes for the number of its threads.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    task, splits = asked["task"], ("train", "dev", "test")
    rows = {split: [(text, tuple(labels)) for text, labels in task[split]] for split in splits}
    module, _, name = spec.partition(":")
    peer: Peer = getattr(importlib.import_module(module), name)()
    trial = asdict(attempt(peer, Task(**task | rows), seed=asked["seed"]))
    arrays = {split: trial.pop(split) for split in ("dev", "test")}
    np.savez(answer, about=np.array(json.dumps(trial)), **arrays)


if __name__ == "__main__":
    main()
