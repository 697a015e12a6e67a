"""How an evaluation is shown: a table for the terminal, one for documents, a figure, and JSON that holds everything."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from nlu.training.scores import Evaluation, Line, Score

REPORT_FILES = ("evaluation.json", "evaluation.md", "evaluation.png")
_LANGUAGES = {"en": "English", "ru": "Russian", "": "Cost"}
_MARKS = {1: (" ▲", "green"), -1: (" ▼", "red"), 0: ("", "")}


def write(evaluation: Evaluation, out: Path) -> tuple[Path, ...]:
    """evaluation.json, evaluation.md and evaluation.png into a folder; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = tuple(out / name for name in REPORT_FILES)
    paths[0].write_text(
        json.dumps(as_json(evaluation), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    paths[1].write_text(markdown(evaluation), encoding="utf-8")
    figure(evaluation).savefig(paths[2], dpi=120)
    return paths


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON types."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(evaluation)))
    return plain


def by_language(evaluation: Evaluation) -> dict[str, list[Line]]:
    """Lines under English, Russian and Cost, in that order."""
    groups = {
        title: [line for line in evaluation.lines if line.language == code]
        for code, title in _LANGUAGES.items()
    }
    return {title: lines for title, lines in groups.items() if lines}


def table(evaluation: Evaluation) -> Table:
    """For the terminal. Green and red: the interval of the change from the first column leaves out 0."""
    found = Table(
        *("task", "data", "condition", "metric", "n"),
        *(column.name for column in evaluation.columns),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for title, lines in by_language(evaluation).items():
        found.add_row(Text(title, style="bold"))
        for line in lines:
            cells = [cell(line, i) for i in range(len(line.scores))]
            found.add_row(line.task, _data(line), line.condition, line.metric, str(line.items or ""), *cells)
    return found


def markdown(evaluation: Evaluation) -> str:
    """The same table for a section of a document: a key, then one table a language and one of cost."""
    text = [
        f"- **{column.name}**: `{column.fingerprint[:12]}`, {column.width} dimensions, {column.precision}"
        for column in evaluation.columns
    ]
    text += [
        "",
        f"Suite {evaluation.suite}. Brackets are 95 % intervals (bootstrap over test rows), ± is the standard deviation "
        "over draws. From the second column on, parentheses hold the change from the first column on the same rows with "
        "its interval; ▲ ▼ where that leaves out 0. x is a ratio to the first column.",
        "",
    ]
    for title, lines in by_language(evaluation).items():
        header = ["line", "n", *(column.name for column in evaluation.columns)]
        text += [f"### {title}", "", _row(header), _row(["---", *["---:"] * (len(header) - 1)])]
        for line in lines:
            cells = [cell(line, i).plain for i in range(len(line.scores))]
            text.append(_row([_title(line), f"{line.items:,}" if line.items else "", *cells]))
        text.append("")
    return "\n".join(text)


def cell(line: Line, column: int) -> Text:
    """A score with its margin and, from the second column on, its change from the first."""
    score = line.scores[column]
    if not line.higher_is_better:
        first = line.scores[0].value
        ratio = f" ({score.value / first:.2f}x)" if column and first else ""
        return Text(f"{score.value:.2f}{_interval(score.low, score.high, '.2f')}{ratio}")
    margin = f" ±{score.spread:.3f}" if score.spread is not None else ""
    if score.change is None:
        return Text(f"{score.value:.3f}{margin or _interval(score.low, score.high, '.3f')}")
    mark, style = _MARKS[score.verdict]
    change = f"{score.change:+.3f}{_interval(score.change_low, score.change_high, '+.3f')}"
    return Text(f"{score.value:.3f}{margin} ({change}){mark}", style=style)


def figure(evaluation: Evaluation) -> Figure:
    """Every quality line with its interval, English and Russian apart; for a sweep, numbers over widths."""
    if any(column.width < column.dim for column in evaluation.columns):
        return _sweep_figure(evaluation)
    groups = {title: lines for title, lines in by_language(evaluation).items() if title != "Cost"}
    rows = sum(map(len, groups.values()))
    drawn = Figure(figsize=(10, 2.0 + 0.28 * rows), layout="constrained")
    grid = drawn.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(lines) for lines in groups.values()]
    )
    for axes, (title, lines) in zip(grid[:, 0], groups.items(), strict=True):
        _bars(axes, title, lines, [column.name for column in evaluation.columns])
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return drawn


def _bars(axes: Axes, title: str, lines: Sequence[Line], names: Sequence[str]) -> None:
    places = np.arange(len(lines))
    for i, name in enumerate(names):
        scores: list[Score] = [line.scores[i] for line in lines]
        values = np.array([score.value for score in scores])
        low = values - [score.value if score.low is None else score.low for score in scores]
        high = [score.value if score.high is None else score.high for score in scores] - values
        shift = (i - (len(names) - 1) / 2) * 0.7 / len(names)
        axes.errorbar(
            *(values, places + shift),
            xerr=np.maximum(0.0, [low, high]),
            fmt="o",
            markersize=3,
            linewidth=1,
            label=name,
        )
    axes.set_yticks(places, [_title(line) for line in lines])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=9)


def _sweep_figure(evaluation: Evaluation) -> Figure:
    shown = [
        line
        for line in evaluation.lines
        if line.metric in ("accuracy", "Spearman") and "," not in line.condition
    ]
    wide = 4
    drawn = Figure(figsize=(14, 3.2 * math.ceil(len(shown) / wide)), layout="constrained")
    grid = drawn.subplots(math.ceil(len(shown) / wide), wide, squeeze=False).ravel()
    for axes, line in zip(grid, shown, strict=False):
        for folder in dict.fromkeys(column.folder for column in evaluation.columns):
            points = sorted(
                (column.width, score.value)
                for column, score in zip(evaluation.columns, line.scores, strict=True)
                if column.folder == folder
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=Path(folder).name)
        axes.set_title(f"{_data(line)}, {line.condition}, {line.metric}", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    grid[0].legend(fontsize=7)
    return drawn


def _title(line: Line) -> str:
    """`intents, clinc150, full: accuracy`; with `(unseen)` after sets that no vectorizer is meant to have trained on."""
    return f"{', '.join(filter(None, (line.task, _data(line), line.condition)))}: {line.metric}"


def _data(line: Line) -> str:
    return f"{line.data} (unseen)" if line.unseen else line.data


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f" [{low:{form}} {high:{form}}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
