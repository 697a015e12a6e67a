"""A run in MLflow, where that is installed and wanted."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nlu.training.config import Config

logger = logging.getLogger(__name__)


class Untracked:
    """What stands in where MLflow is not installed."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nowhere to."""

    def close(self, folder: Path, *, finished: bool) -> None:
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

    def close(self, folder: Path, *, finished: bool) -> None:
        """The report and its plots, and how it ended."""
        for path in (folder / "config.toml", folder / "run.md", *sorted((folder / "plots").glob("*.png"))):
            self._try(lambda: self._client.log_artifact(self._run, str(path)))  # noqa: B023
        self._try(lambda: self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED"))

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
    known.write_text(json.dumps({"run_id": run}, indent=1) + "\n", encoding="utf-8")
    return Tracked(client, run)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
