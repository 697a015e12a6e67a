"""A run in pictures and words: plots/ and run.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nlu.training import config as configs
from nlu.training import datasets
from nlu.training.datasets import OWN, Form
from nlu.training.loop import TaskData
from nlu.training.record import FINISHED, RAW, Evaluation, Record, Row, read_rows
from nlu.vectorizer import SPEC_FILE, VectorizerSpec, fingerprint


def write(record: Record, status: str) -> None:
    """Both, into the run's folder."""
    plot(record.folder / "plots", record.rows)
    (record.folder / "run.md").write_text(report(record, status), encoding="utf-8")


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


def report(record: Record, status: str) -> str:
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
        f"- **time**: {record.seconds / 60:.1f} min in this process, started {record.environment['started']}",
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
        (row["step"], row["evaluation"]) for row in read_rows(folder / "metrics.jsonl") if "evaluation" in row
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
