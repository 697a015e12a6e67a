"""An evaluation as report.json and as one HTML page that opens anywhere: page.html.jinja filled in. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nlu.heads.plot import Axis, Point, Series, chart, round_axis

REPORT, PAGE = "report.json", "report.html"
_TEMPLATE = "page.html.jinja"
_DECADE = (1.0, 2.0, 5.0)

Report = Mapping[str, Any]


def write(report: Report, folder: Path) -> None:
    """Both files, into a folder that need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page of what `evaluate` gives; it asks nothing of the network and has no script."""
    figures = {"latency": _latency(report["latency"])}
    if "coverage" in report:
        figures["coverage"] = _coverage(report["coverage"]["curve"])
    return _ENVIRONMENT.get_template(_TEMPLATE).render(report=report, figures=figures)


def _coverage(curve: Sequence[Report]) -> Markup:
    covered = _points(curve, "coverage")
    right = _points(curve, "precision")
    return chart(
        [Series(covered, "covered"), *([Series(right, "right among them")] if right else [])],
        x=round_axis("similarity of the best reply, at least", [x for x, _ in covered]),
        y=Axis("share of turns"),
        text=f"Over the threshold, covered: {_story(covered)}; right among them: {_story(right)}.",
    )


def _latency(latency: Report) -> Markup:
    """Both histograms as shares of their own answers, over a logarithmic axis."""
    stairs = {name: _stair(histogram) for name, histogram in latency["histogram"].items()}
    along = [x for stair in stairs.values() for x, _ in stair]
    return chart(
        [Series(stair, name, "area") for name, stair in stairs.items()],
        x=_decades("microseconds", min(along), max(along)),
        y=round_axis("share of answers", [0.0, *(y for stair in stairs.values() for _, y in stair)]),
        text="; ".join(
            f"{name}: half within {each['p50']:.0f}, 99 of 100 within {each['p99']:.0f} microseconds"
            for name, each in latency["us"].items()
        ),
    )


def _stair(histogram: Report) -> list[Point]:
    """The corners of its bins, from left to right."""
    edges, counts = histogram["edges"], histogram["counts"]
    total = sum(counts)
    return [
        (edge, count / total)
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        for edge in (left, right)
    ]


def _decades(title: str, low: float, high: float) -> Axis:
    """Logarithmic, between ticks of 1, 2 or 5 times a power of ten."""
    ticks = [step * 10.0**power for power in range(-3, 10) for step in _DECADE]
    first = max(tick for tick in ticks if tick <= max(low, ticks[0]))
    last = min(tick for tick in ticks if tick > min(high, ticks[-2]))
    return Axis(title, first, last, tuple(tick for tick in ticks if first <= tick <= last), log=True)


def _points(curve: Sequence[Report], key: str) -> list[Point]:
    return [(point["threshold"], point[key]) for point in curve if point[key] is not None]


def _story(points: Sequence[Point]) -> str:
    """A line in words: where it begins and where it ends."""
    return ", ".join(f"{y:.3f} at {x:.3f}" for x, y in (points[0], points[-1])) if points else "not known"


def _bar(measure: Report) -> Markup:
    """A bar from 0 to the value, its interval upon it. It stands beside the same numbers and is not read aloud."""
    width = 160.0 * measure["value"]
    return Markup(
        '<svg class="measure" viewBox="0 0 160 12" aria-hidden="true"><path class="track" d="M0,6H160"/>'
        '<path class="value" d="M0,6H{:.1f}"/><path class="reach" d="M{:.1f},6H{:.1f}"/></svg>'
    ).format(width, 160.0 * measure["low"], 160.0 * measure["high"])


def _estimate(measure: Report, *, signed: bool = False) -> str:
    kind = "+.3f" if signed else ".3f"
    return f"{measure['value']:{kind}} [{measure['low']:{kind}}, {measure['high']:{kind}}]"


def _environment() -> Environment:
    environment = Environment(
        # The style is that of a head's page.
        loader=ChoiceLoader([PackageLoader("nlu.retrieval", "."), PackageLoader("nlu.heads", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"bar": _bar, "estimate": _estimate})
    return environment


_ENVIRONMENT = _environment()
