"""How good are the classifiers people would use instead of our heads, and how long do they take to train?

    python -m benchmarks.peers --make                                  # their environment, .cache/peers
    python -m benchmarks.peers --set banking77 --peer tfidf frozen [--shots 5] [--seeds 3] [--data ../shared/data]

Every trial is a process of its own on one core and one thread. Seconds are CPU seconds of learning, without imports and
reading weights. Results are merged into benchmarks/results/peers.json; a peer may also be named as MODULE:CLASS, and
then runs in this environment. The rules are the same for all: out of scope is a top score below the threshold that
keeps 95 % of the in-scope dev rows, and a label of several is given above the threshold that is best on dev.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score

from benchmarks.peer import Row, Task, Trial, read_trial, write_question
from benchmarks.result import emit, record
from nlu.public_data import labelled

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".cache" / "peers"
RESULTS = Path(__file__).parent / "results" / "peers.json"
PEERS = {
    "tfidf": "benchmarks.others:TfIdf",
    "frozen": "benchmarks.others:Frozen",
    "setfit": "benchmarks.others:SetFit",
    "finetune": "benchmarks.others:FineTuned",
    "semantic-router": "benchmarks.others:SemanticRouter",
}
KEPT = 0.95  # of in-scope dev rows, by the out-of-scope threshold
# Threads of a tokenizer and of linear algebra would only wait for one another on one core.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def clinc150(root: Path) -> Task:
    """CLINC150; its out-of-scope rows are rows without a label, and none is in train."""
    train, dev, test = (
        [(text, () if labels == ("oos",) else labels) for text, labels in _rows(root / "clinc150", split)]
        for split in ("train", "dev", "test")
    )
    return Task("clinc150", [row for row in train if row[1]], dev, test, multi=False)


def banking77(root: Path) -> Task:
    """BANKING77, which has no dev split."""
    train, test = (_rows(root / "banking77", split) for split in ("train", "test"))
    return Task("banking77", train, [], test, multi=False)


def goemotions(root: Path) -> Task:
    """GoEmotions: 27 emotions and neutral, several a text."""
    train, dev, test = (_rows(root / "goemotions", split) for split in ("train", "dev", "test"))
    return Task("goemotions", train, dev, test, multi=True)


def davidson(root: Path) -> Task:
    """Davidson's tweets: hate and offensive are toxic."""
    train, dev, test = (
        [_toxicity(row) for row in _rows(root / "davidson_hate_offensive", split)]
        for split in ("train", "dev", "test")
    )
    return Task("davidson", train, dev, test, multi=False)


def _toxicity(row: Row) -> Row:
    text, labels = row
    return text, ("acceptable" if labels == ("neither",) else "toxic",)


SETS: Mapping[str, Callable[[Path], Task]] = {
    "clinc150": clinc150,
    "banking77": banking77,
    "goemotions": goemotions,
    "davidson": davidson,
}


def few(task: Task, shots: int, *, seed: int) -> Task:
    """The task with so many train rows of each label, drawn anew for each seed."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in task.train:
        rows[row[1][0]].append(row)
    drawn = np.random.default_rng(seed)
    train = [
        rows[label][number]
        for label in sorted(rows)
        for number in drawn.choice(len(rows[label]), min(shots, len(rows[label])), replace=False)
    ]
    return replace(task, train=train)


def measure(task: Task, trial: Trial) -> dict[str, float]:
    """Quality from the scores alone, by the same rules for every peer; F1 is the mean over labels."""
    return _measure_multi(task, trial) if task.multi else _measure_single(task, trial)


def _measure_single(task: Task, trial: Trial) -> dict[str, float]:
    inside = np.array([bool(labels) for _, labels in task.test])
    gold = [labels[0] for _, labels in task.test if labels]
    given = [trial.labels[column] for column in trial.test[inside].argmax(axis=1)]
    figures = {
        "accuracy": float(np.mean([one == other for one, other in zip(gold, given, strict=True)])),
        "macro_f1": float(f1_score(gold, given, average="macro")),
    }
    if len(trial.labels) == 2:
        lead = trial.test[:, 1] - trial.test[:, 0]
        second = np.array([label == trial.labels[1] for label in gold])
        figures["auroc"] = float(roc_auc_score(second, lead[inside]))
    if not inside.all():
        top = trial.test.max(axis=1)
        dev_top = trial.dev.max(axis=1)[[bool(labels) for _, labels in task.dev]]
        threshold = np.quantile(dev_top, 1 - KEPT)
        figures |= {
            "oos_auroc": float(roc_auc_score(inside, top)),
            "oos_recall": float(np.mean(top[~inside] < threshold)),
            "in_scope_kept": float(np.mean(top[inside] >= threshold)),
        }
    return figures


def _measure_multi(task: Task, trial: Trial) -> dict[str, float]:
    dev, test = (_ones(rows, trial.labels) for rows in (task.dev, task.test))
    thresholds = [_threshold(dev[:, column], trial.dev[:, column]) for column in range(len(trial.labels))]
    return {"macro_f1": float(f1_score(test, trial.test >= thresholds, average="macro", zero_division=0))}


def _ones(rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([[label in given for label in labels] for _, given in rows])


def _threshold(gold: NDArray[np.bool_], scores: NDArray[np.float32]) -> float:
    """The one of highest F1."""
    precision, recall, thresholds = precision_recall_curve(gold, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return float(thresholds[f1[:-1].argmax()])


def elsewhere(peer: str, task: Task, *, seed: int) -> Trial:
    """One trial in a process of its own; `peer` is a name of PEERS, or MODULE:CLASS of this environment."""
    python = ENVIRONMENT / "bin" / "python" if peer in PEERS else Path(sys.executable)
    if not python.exists():
        sys.exit(f"benchmarks.peers: found no {python}, expected the peers' environment; say --make first")
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "trial.npz"
        write_question(question, task, seed=seed)
        command = [
            str(python),
            "-m",
            "benchmarks.peer",
            PEERS.get(peer, peer),
            str(question),
            str(answer),
        ]
        done = subprocess.run(
            command, env=os.environ | _ONE_THREAD, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"benchmarks.peers: {peer} failed on {task.name}\n{done.stderr}")
        return read_trial(answer)


def merge(results: Path, task: str, peer: str, entry: Mapping[str, Any]) -> None:
    """Put one entry into the file, leaving the others as other commands left them, or leave them this moment."""
    folder = os.open(results.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        kept.setdefault(task, {})[peer] = entry
        fresh = results.with_suffix(".tmp")
        fresh.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, results)
    finally:
        os.close(folder)  # and with it the lock


def main() -> None:
    """Measure, merge and print."""
    arguments = _arguments()
    if arguments.make:
        return _make()
    task = SETS[arguments.set](arguments.data)
    for peer in arguments.peer:
        _trials(peer, task, arguments)


def _trials(peer: str, whole: Task, arguments: argparse.Namespace) -> None:
    """One trial a seed. The file is written after each of them, because the next may take long."""
    runs: list[dict[str, float]] = []
    name = f"{whole.name}, {arguments.shots} shots" if arguments.shots else whole.name
    for seed in range(arguments.seeds):
        task = few(whole, arguments.shots, seed=seed) if arguments.shots else whole
        trial = elsewhere(peer, task, seed=seed)
        runs.append(measure(task, trial) | _seconds(trial))
        figures = _over_seeds(runs)
        about = {
            "set": name,
            "peer": peer,
            "seeds": str(len(runs)),
            "threads": "1",
            "versions": ", ".join(f"{package} {version}" for package, version in trial.versions.items()),
        }
        merge(RESULTS, name, peer, record("peers", figures, [], **about))
        print(f"{peer}, seed {seed}: {runs[-1]}", flush=True)
    emit("peers", figures, [], **about)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", action="store_true", help="set the peers' environment up and stop")
    parser.add_argument("--set", choices=SETS, help="what to learn")
    parser.add_argument(
        "--peer",
        nargs="+",
        default=["tfidf", "frozen"],
        help=f"{', '.join(PEERS)}, or MODULE:CLASS; default: the two that need no more than minutes",
    )
    parser.add_argument("--shots", type=int, help="train rows of each label; default: all rows")
    parser.add_argument("--seeds", type=int, default=1, help="trials, each with other shots")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the public sets lie")
    arguments = parser.parse_args()
    if not arguments.make and arguments.set is None:
        parser.error("found neither --set nor --make, expected one of them")
    if arguments.seeds < 1:
        parser.error(f"--seeds: found {arguments.seeds}, expected at least 1")
    if arguments.shots and arguments.set == "goemotions":
        parser.error("--shots: found a set of several labels a text, expected one; leave --shots out")
    return arguments


def _make() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", str(Path(__file__).with_suffix(".txt"))], check=True)


def _rows(folder: Path, split: str) -> list[Row]:
    return [(row.phrase, row.labels) for row in labelled(folder / f"{split}.tsv.gz")]


def _seconds(trial: Trial) -> dict[str, float]:
    return {
        "fit_without_encoding_s": trial.fit_s - trial.encode_s,
        "fit_s": trial.fit_s,
        "fit_wall_s": trial.fit_wall_s,
        "score_ms": trial.score_ms,
    }


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means, and deviations where there is more than one run."""
    figures = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        figures[name] = statistics.mean(values)
        if len(values) > 1:
            figures[f"{name}_deviation"] = statistics.stdev(values)
    return figures


if __name__ == "__main__":
    main()
