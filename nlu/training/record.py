"""What a run writes down while it goes: metrics, held rows, environment; the report is run_report.py's."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nlu.training import config as configs
from nlu.training import loop, network
from nlu.training.config import Config
from nlu.training.data import Data
from nlu.training.distributed import World
from nlu.training.loop import Event, Learner, TaskData, Trained
from nlu.training.tracking import track

logger = logging.getLogger(__name__)

FINISHED = "finished"
MODEL = "model"  # inside a run's folder, the network in the end
RAW = "mlm"  # inside a run's folder, the run of what comes before it

Evaluation = Mapping[str, tuple[str, float]]  # pool -> (measure, value)
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
        write_json(folder / (f"env-step-{start:08d}.json" if start else "env.json"), self.environment)
        # What was logged after the checkpoint is about to happen again.
        self.rows = [row for row in read_rows(folder / "metrics.jsonl") if start and row["step"] <= start]
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

    @property
    def seconds(self) -> float:
        """Since this process began."""
        return time.monotonic() - self._began

    def flush(self) -> None:
        """Log the steps since the last line."""
        if self._since:
            self._log()

    def close(self, status: str) -> None:
        """The end, however it came."""
        self._tracking.close(self.folder, finished=status == FINISHED)

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


def read_rows(path: Path) -> list[Row]:
    """Whole lines of a metrics.jsonl; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
    return [json.loads(line) for line in whole.splitlines()]


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads and compares well."""
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


def evaluate(encoder: network.Network, tasks: Sequence[TaskData]) -> Evaluation:
    """One measure per pool on its held rows: a sign of life; `nlu vectorizer evaluate` is the judge."""
    found = {each.pool.name: loop.measure(encoder, each) for each in tasks}
    return {name: value for name, value in found.items() if value is not None}
