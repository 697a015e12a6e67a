"""The report of a trained head as one HTML page that opens anywhere: report.json in, page.html.jinja filled in.

Nothing is measured here. Phrases and labels are what users typed, so the template escapes everything it is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from nlu.heads.plot import Axis, Bar, Point, Series, chart, log_axis, round_axis, thin, whisker

_TEMPLATE = "page.html.jinja"

_NAMES = {
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "span_f1": "span F1",
    "f1": "F1",
    "auroc": "AUROC",
    "ece_before": "calibration error before",
    "ece_after": "calibration error",
    "c": "C",
}
_FIRST = ("accuracy", "span_f1", "macro_f1", "precision", "recall", "ece_after")  # what readers look for
_MOST_FIRST = 5
_SEVERITIES = ("error", "warning", "note")
_COVERAGE_ROWS = 11

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A chart and the numbers it was drawn from."""

    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


def render(report: Mapping[str, Any]) -> str:
    """The page. Every key of the report but `head` may be missing or null; what has no data has no section.

    An estimate is a number or {"value", "low", "high"}. The page asks nothing of the network and is readable without
    its few lines of script.
    """
    given = {key: value for key, value in report.items() if value}
    figures = {key: draw(given[key]) for key, draw in _FIGURES.items() if key in given}
    figures = {key: figure for key, figure in figures.items() if figure.rows}
    page = _ENVIRONMENT.get_template(_TEMPLATE).render(
        report=given,
        head=given.get("head", {}),
        shown={"made"} | (given.keys() - _FIGURES.keys()) | figures.keys(),
        figures=figures,
        first=_first(given.get("summary", {})),
        classes=_worst_first(given.get("classes", ())),
        findings=_gravest_first(given.get("findings", ())),
        curves=[(curve, _curve(curve)) for curve in given.get("curves", ())],
        outside=_outside(given.get("outside", {})),
    )
    # Half a surrogate pair, which JSON can hold, cannot be written to a file.
    return page.encode("utf-8", "replace").decode("utf-8")


def _first(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The measures at the top of the page."""
    known = [name for name in _FIRST if _value(summary.get(name)) is not None]
    return [(name, summary[name]) for name in (known or list(summary))[:_MOST_FIRST]]


def _worst_first(classes: Rows) -> list[Mapping[str, Any]]:
    return sorted(classes, key=lambda row: (_known(row.get("f1"), 2.0), str(row.get("label"))))


def _gravest_first(findings: Rows) -> list[Mapping[str, Any]]:
    rank = {severity: i for i, severity in enumerate(_SEVERITIES)}
    return sorted(findings, key=lambda row: rank.get(str(row.get("severity")), len(rank)))


def _coverage(rows: Rows) -> _Figure:
    covered, right = _points(rows, "threshold", "coverage"), _points(rows, "threshold", "precision")
    known = dict(right)
    picked = thin(covered, _COVERAGE_ROWS)
    svg = chart(
        [Series(covered, "answered"), Series(right, "right among them")],
        x=Axis("threshold"),
        y=Axis("share of phrases"),
        text=f"Two lines over the threshold. Answered: {_story(covered)}. Right among them: {_story(right)}.",
    )
    return _Figure(
        svg, ("threshold", "coverage", "precision"), tuple((_short(x), y, known.get(x)) for x, y in picked)
    )


def _reliability(pair: Mapping[str, Rows | None]) -> _Figure:
    before, after = (_points(pair.get(key) or (), "score", "right") for key in ("before", "after"))
    svg = chart(
        [Series(after, "calibrated", "dotted"), Series(before, "before", "dotted")],
        x=Axis("score"),
        y=Axis("share that is right"),
        guides=[((0.0, 0.0), (1.0, 1.0))],
        text=f"Share that is right over the score. Calibrated: {_story(after)}. Before: {_story(before)}.",
    )
    rows = [
        (key, _value(row.get("score")), _value(row.get("right")), row.get("rows"))
        for key in ("before", "after")
        for row in pair.get(key) or ()
    ]
    return _Figure(svg, ("calibration", "score", "right", "rows"), tuple(rows))


def _accuracy_over(key: str, title: str, *, log: bool = False, also: str = "") -> Callable[[Rows], _Figure]:
    """A figure of accuracy over another number of the rows; `also` names a further column of its table."""

    def draw(rows: Rows) -> _Figure:
        points, bars = _points(rows, key, "accuracy"), _bars(rows, key)
        if not points:
            return _Figure(Markup(), (), ())
        along = [x for x, _ in points]
        heights = [y for _, y in points] + [end for _, *ends in bars for end in ends]
        svg = chart(
            [Series(points, "", "dotted", bars)],
            x=(log_axis if log and min(along) > 0 else round_axis)(title, along),
            y=round_axis("accuracy", heights),
            text=f"Accuracy over {title}: {_story(points)}.",
        )
        columns = (key, "accuracy", *([also] if any(row.get(also) is not None for row in rows) else []))
        cells = tuple(
            (_short(_value(row.get(key))), *(row.get(name) for name in columns[1:])) for row in rows
        )
        return _Figure(svg, columns, cells)

    return draw


_FIGURES: dict[str, Callable[[Any], _Figure]] = {
    "coverage": _coverage,
    "reliability": _reliability,
    "learning_curve": _accuracy_over("rows", "training rows"),
    "few_shot": _accuracy_over("shots", "training phrases a label", log=True, also="seeds"),
    "regularisation": _accuracy_over("c", "C (larger is weaker)", log=True, also="loss"),
}


def _curve(curve: Mapping[str, Any]) -> Markup:
    """Precision over recall of one label, and the point that was chosen."""
    points = _known_pairs(curve.get("recall") or (), curve.get("precision") or ())
    chosen = curve.get("chosen") or ()
    return chart(
        [Series(points), Series(_known_pairs(chosen[:1], chosen[1:]), mark="dots")],
        x=Axis("recall", ticks=(0.0, 0.5, 1.0)),
        y=Axis("precision", ticks=(0.0, 0.5, 1.0)),
        text=f"Precision over recall of {curve.get('label')}: {_story(points)}.",
        width=180.0,
        height=180.0,
    )


def _outside(outside: Mapping[str, Any]) -> Markup:
    """Both histograms as shares of their own phrases: there are many more inside than outside."""
    scores, threshold = outside.get("scores") or {}, _value(outside.get("threshold"))
    within, without = (_shares(scores.get(key) or ()) for key in ("inside", "outside"))
    if not within and not without:
        return Markup()
    y = round_axis("share of phrases", [0.0, *(share for _, share in within + without)])
    return chart(
        [Series(within, "inside", "area"), Series(without, "outside", "area")],
        x=Axis("score"),
        y=y,
        guides=[] if threshold is None else [((threshold, y.low), (threshold, y.high))],
        text=f"Histograms of the score. Inside: most phrases at {_peak(within)}. Outside: most at {_peak(without)}.",
    )


def _shares(counts: Sequence[float]) -> list[Point]:
    """Counts over equal bins of 0 to 1 as the corners of a stair."""
    total = sum(counts)
    if total <= 0:
        return []
    return [((i + side) / len(counts), count / total) for i, count in enumerate(counts) for side in (0, 1)]


def _peak(stair: Sequence[Point]) -> str:
    return f"{_short(max(stair, key=lambda point: point[1])[0])}" if stair else "none"


def _points(rows: Rows, x: str, y: str) -> list[Point]:
    """In the order of x; rows that lack either number are left out."""
    return sorted(_known_pairs([row.get(x) for row in rows], [row.get(y) for row in rows]))


def _known_pairs(across: Sequence[object], up: Sequence[object]) -> list[Point]:
    pairs = [(_value(x), _value(y)) for x, y in zip(across, up, strict=False)]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _bars(rows: Rows, x: str) -> list[Bar]:
    ends = [(_value(row.get(x)), _ends(row.get("accuracy"))) for row in rows]
    return [(at, *low_high) for at, low_high in ends if at is not None and low_high is not None]


def _story(points: Sequence[Point]) -> str:
    """A line in words: where it begins, its middle, where it ends."""
    return ", ".join(f"{y:.3f} at {_short(x)}" for x, y in thin(points, 3)) or "nothing"


def _value(estimate: object) -> float | None:
    """The number of an estimate; None where there is none that can be shown."""
    if isinstance(estimate, Mapping):
        estimate = estimate.get("value")
    if isinstance(estimate, bool) or not isinstance(estimate, int | float) or not math.isfinite(estimate):
        return None
    return float(estimate)


def _ends(estimate: object) -> tuple[float, float] | None:
    if not isinstance(estimate, Mapping):
        return None
    low, high = _value(estimate.get("low")), _value(estimate.get("high"))
    return None if low is None or high is None else (low, high)


def _known(estimate: object, otherwise: float) -> float:
    value = _value(estimate)
    return otherwise if value is None else value


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.6g}"


def _rate(estimate: object) -> str:
    """Three digits, whatever the kind of number."""
    value = _value(estimate)
    return "–" if value is None else f"{value:.3f}"


def _number(estimate: object) -> str:
    """Three digits, but counts and numbers in the thousands whole."""
    value = _value(estimate)
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(estimate, int) or abs(value) >= 1000 else f"{value:.3f}"


def _interval(estimate: object) -> str:
    ends = _ends(estimate)
    return "" if ends is None else f"{ends[0]:.3f}–{ends[1]:.3f}"


def _whisker(estimate: object, floor: float = 0.0) -> Markup:
    value = _value(estimate)
    if value is None:
        return Markup()
    low, high = _ends(estimate) or (value, value)
    return whisker(value, low, high, floor=floor)


def _floor(rows: Rows, key: str) -> float:
    """Where the lines of a table's intervals begin: the tenth below the lowest."""
    ends = [_ends(row.get(key)) or (_known(row.get(key), 1.0),) for row in rows]
    return max(0.0, min(0.9, math.floor(min(low for low, *_ in ends) * 10) / 10))


def _size(value: object) -> str:
    size = _value(value)
    if size is None:
        return "–"
    for unit, bytes_each in (("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size:,.0f} bytes"


def _duration(value: object) -> str:
    seconds = _value(value)
    if seconds is None:
        return "–"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _plain(value: object) -> str:
    """A setting as it would be written in a file."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _breakable(label: object) -> Markup:
    """A label that may be broken after its underscores."""
    return Markup("_<wbr>").join(("" if label is None else str(label)).split("_"))


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("_", " "))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nlu.heads", "."),
        autoescape=True,
        undefined=ChainableUndefined,  # what a report lacks is empty, at any depth, and so is null
        finalize=lambda value: "" if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (_rate, _number, _value, _interval, _whisker, _floor, _size, _duration, _plain, _breakable, _name)
    environment.filters.update({filter_.__name__.removeprefix("_"): filter_ for filter_ in shown})
    return environment


_ENVIRONMENT = _environment()
