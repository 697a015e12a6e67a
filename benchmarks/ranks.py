"""Do two ranks learn what one process learns, and how much sooner?

    python -m benchmarks.ranks [--seeds 3] [--steps 20] [--data ../shared/data] [--save]

Trains benchmarks/ranks.toml with the command a user has, per seed once as one process on one thread and once on two
ranks of one thread each: as many steps, the same rows in each, half of them on either rank. One run follows the other,
so that a machine that is busy for a while is so for both. Phrases per second are those of the run's own log over the
second half of its steps. What was learnt is measured afterwards, for all runs alike, on the dev split of every set:
the run's own measures, and intents through logistic regression on the vectors. A difference is noise where it is
smaller than what another seed and other dev rows would have made. A control must not be: what training gained.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.result import Bar, at_least, at_most, emit
from nlu.public_data import Labelled
from nlu.training import config as configs
from nlu.training import loop, network
from nlu.training.config import Config
from nlu.training.data import read_data
from nlu.training.datasets import DEV, Example, read
from nlu.training.loop import TaskData
from nlu.training.train import make_learner

RANKS = 2
CONFIG = Path(__file__).with_suffix(".toml")
INTENTS, REGRESSION = "intents", "intents_through_regression"
SHOTS = 10  # training rows of an intent for logistic regression
REGULARISATION, ITERATIONS = 32.0, 1000
_SECONDS = 1800

Scores = Mapping[str, float]  # measure -> 0 to 1


@dataclass(frozen=True, slots=True)
class Run:
    """One training that came to its end."""

    phrases_per_second: float  # over the second half of its steps, all ranks together
    losses: Mapping[str, float]  # of each task over that half
    scores: Scores


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    if importlib.util.find_spec("horovod") is None:
        sys.exit("benchmarks.ranks: horovod is not installed; see deploy/horovod/README.md")
    if not arguments.data.is_dir():
        sys.exit(f"benchmarks.ranks: found no folder {arguments.data}, expected the public sets; say --data")
    config = _config(arguments)
    exam = Exam(config)
    untrained = exam.scores(make_learner(config, exam.data).network)
    runs: dict[int, list[Run]] = {1: [], RANKS: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for ranks in sorted(runs, reverse=bool(seed % 2)):
                out = Path(folder) / f"{seed}-{ranks}"
                run = _run(_share(config, seed, ranks), ranks, out, exam)
                runs[ranks].append(run)
                speed = f"{run.phrases_per_second:.1f} phrases/s"
                print(f"seed {seed}, {ranks} rank(s): {speed}, {_said(run.scores)}", flush=True)
    pairs = list(zip(runs[1], runs[RANKS], strict=True))
    figures, bars = _throughput(pairs)
    learnt, same = _evaluation(pairs, untrained, exam.rows)
    horovod = importlib.metadata.version("horovod")
    emit("ranks", figures | learnt, [*bars, *same], horovod=horovod, torch=torch.__version__)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--steps", type=int, help="of each training; default: the config's")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the public sets lie")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(
            f"--seeds: found {arguments.seeds}, expected at least 2; one seed tells nothing of noise"
        )
    return arguments


def _config(arguments: argparse.Namespace) -> Config:
    """The one process's config; two lines of log, so that the second is the steady state."""
    config = configs.load(CONFIG)
    steps = arguments.steps or config.schedule.steps
    schedule = config.schedule.model_copy(update={"steps": steps, "log_every": math.ceil(steps / 2)})
    root = config.data.model_copy(update={"root": str(arguments.data)})
    return config.model_copy(update={"schedule": schedule, "data": root})


def _share(config: Config, seed: int, ranks: int) -> Config:
    """What each of some ranks does, all together what one process would."""
    tasks = [
        task.model_copy(
            update={"batch": task.batch // ranks, "labels_per_batch": task.labels_per_batch // ranks}
        )
        for task in config.tasks
    ]
    batch = config.batch.model_copy(update={"per_rank": config.batch.per_rank // ranks})
    run = config.run.model_copy(update={"seed": seed})
    return config.model_copy(update={"run": run, "batch": batch, "tasks": tuple(tasks)})


def _run(config: Config, ranks: int, out: Path, exam: Exam) -> Run:
    out.mkdir()
    run = config.run.model_copy(update={"out": str(out)})
    path = out / "config.toml"
    path.write_text(configs.dump(config.model_copy(update={"run": run})), encoding="utf-8")
    command = [sys.executable, "-m", "nlu", "vectorizer", "train", str(path)]
    if ranks > 1:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        command = [horovodrun, "--gloo", "-np", str(ranks), *command]
    done = subprocess.run(
        command,
        # A tokenizer has threads of its own: one process would use the second core through them.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"benchmarks.ranks: {ranks} rank(s) failed\n{done.stdout}\n{done.stderr}")
    folder = out / config.run.name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steady = [row for row in rows if "phrases_per_second" in row][-1]
    return Run(steady["phrases_per_second"], steady["loss"], exam.scores(network.load(folder / "model")))


class Exam:
    """What every trained network is asked, on rows that depend on no seed."""

    def __init__(self, config: Config) -> None:
        """Read the sets; raises as `read_data` does."""
        self.data = read_data(config)
        self._tasks = [_with_all_dev_rows(each, config) for each in self.data.tasks]
        intents = next(each for each in self._tasks if each.task.name == INTENTS)
        self._train, self._dev = _few(intents.examples), _few(intents.held, limit=len(intents.held))
        self.rows = {each.task.name: len(each.held) for each in self._tasks} | {REGRESSION: len(self._dev)}

    def scores(self, encoder: network.Network) -> Scores:
        """Each measure of one network."""
        measured = {each.task.name: loop.measure(encoder, each) for each in self._tasks}
        found = {name: each[1] for name, each in measured.items() if each is not None}
        train, dev = (
            encoder.encode([row.phrase for row in rows]).numpy() for rows in (self._train, self._dev)
        )
        labels, gold = (np.array([row.labels[0] for row in rows]) for rows in (self._train, self._dev))
        regression = LogisticRegression(C=REGULARISATION, max_iter=ITERATIONS).fit(train, labels)
        return found | {REGRESSION: float(regression.score(dev, gold))}


def _with_all_dev_rows(data: TaskData, config: Config) -> TaskData:
    """A run holds back a few rows to look at; here all of the dev split that its labels cover."""
    source = configs.source_of(data.pool.dataset, data.task.form)
    rows = read(source, DEV, Path(config.data.root), uncased=config.model.uncased).examples
    known = set(data.labels)
    held = (row for row in rows if not isinstance(row, Labelled) or known.issuperset(row.labels))
    return replace(data, held=tuple(held))


def _few(examples: Sequence[Example], limit: int = SHOTS) -> list[Labelled]:
    """The first rows of each label."""
    kept: dict[str, list[Labelled]] = defaultdict(list)
    for row in examples:
        if isinstance(row, Labelled) and len(kept[row.labels[0]]) < limit:
            kept[row.labels[0]].append(row)
    return [row for rows in kept.values() for row in rows]


def _said(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _throughput(pairs: Sequence[tuple[Run, Run]]) -> tuple[dict[str, float], list[Bar]]:
    one, ranks = ([run.phrases_per_second for run in runs] for runs in zip(*pairs, strict=True))
    ratios = [many / single for single, many in zip(one, ranks, strict=True)]
    ratio = statistics.mean(ratios)
    figures = {
        "one_process_phrases_per_second": statistics.mean(one),
        f"{RANKS}_ranks_phrases_per_second": statistics.mean(ranks),
        "throughput_ratio": ratio,
        "throughput_ratio_deviation": statistics.stdev(ratios),
        "throughput_ratio_min": min(ratios),
        "throughput_ratio_max": max(ratios),
    }
    return figures, [at_least(f"{RANKS} ranks: phrases/s over those of one process", ratio, 1.7)]


def _evaluation(
    pairs: Sequence[tuple[Run, Run]], untrained: Scores, rows: Mapping[str, int]
) -> tuple[dict[str, float], list[Bar]]:
    figures: dict[str, float] = {}
    differences, gains = [], []
    for name, before in untrained.items():
        one, ranks = ([run.scores[name] for run in runs] for runs in zip(*pairs, strict=True))
        mean = statistics.mean(one)
        difference = statistics.mean(ranks) - mean
        # One run's score would be another with another seed, and with other rows to measure on: one of them at least.
        of_rows = max(math.sqrt(mean * (1 - mean) / rows[name]), 1 / rows[name])
        noise = math.hypot(statistics.stdev(one), of_rows)
        differences.append(abs(difference) / noise)
        gains.append((mean - before) / noise)
        figures |= {
            f"{name}_untrained": before,
            f"{name}_one_process": mean,
            f"{name}_one_process_deviation": statistics.stdev(one),
            f"{name}_{RANKS}_ranks": statistics.mean(ranks),
            f"{name}_{RANKS}_ranks_deviation": statistics.stdev(ranks),
            f"{name}_difference": difference,
            f"{name}_noise": noise,
        }
    losses = [
        abs(many.losses[task] / loss - 1) for single, many in pairs for task, loss in single.losses.items()
    ]
    figures["largest_relative_difference_of_losses"] = max(losses)
    gain = max(gains)
    return figures, [
        at_most(f"{RANKS} ranks: largest difference of a measure over its noise", max(differences), 1.0),
        Bar("control: what training gained is more than noise", round(gain, 4), 1.0, gain > 1.0),
    ]


if __name__ == "__main__":
    main()
