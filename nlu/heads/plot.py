"""Charts for the page of a head, as inline SVG: no script, no file. Colours and type are those of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

Point = tuple[float, float]
Bar = tuple[float, float, float]  # x, low, high

_LEFT, _RIGHT, _TOP, _BOTTOM = 36.0, 8.0, 26.0, 38.0  # room around the field, for ticks and titles
_LINE, _LETTER = 18.0, 6.6  # height of a line of text, width of a letter in it
_MOST_POINTS = 200


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a chart, from `low` to `high`."""

    title: str
    low: float = 0.0
    high: float = 1.0
    ticks: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies beyond is drawn at the border."""
        low, high, value = (
            (math.log(each) if self.log else each) for each in (self.low, self.high, max(self.low, value))
        )
        return min(1.0, max(0.0, (value - low) / (high - low)))


def round_axis(title: str, values: Sequence[float]) -> Axis:
    """Around these values, from one round number to another, with a few round ticks."""
    span = (max(values) - min(values)) or max(abs(max(values)), 1.0) / 10
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(times for times in (1, 2, 5, 10) if times * step * 4 >= span * 0.999)
    last = math.ceil(round(max(values) / step, 6))
    first = min(math.floor(round(min(values) / step, 6)), last - 1)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(title, ticks[0], ticks[-1], ticks)


def log_axis(title: str, values: Sequence[float]) -> Axis:
    """Logarithmic, with the values themselves, all above 0, as ticks."""
    ticks = tuple(sorted(set(values)))
    apart = ticks[-1] > ticks[0]
    return Axis(title, ticks[0] / (1 if apart else 2), ticks[-1] * (1 if apart else 2), ticks, log=True)


@dataclass(frozen=True, slots=True)
class Series:
    """What is drawn in one colour; a legend names it if it has a name. `bars` are intervals, drawn upright."""

    points: Sequence[Point]
    name: str = ""
    mark: Literal["line", "dotted", "dots", "area"] = "line"  # dotted: a line through its dots
    bars: Sequence[Bar] = ()

    @property
    def dotted(self) -> bool:
        return self.mark in ("dots", "dotted")


@dataclass(frozen=True, slots=True)
class _Field:
    """The rectangle that is drawn in, in the units of the SVG."""

    x: Axis
    y: Axis
    right: float
    top: float
    bottom: float

    def at(self, point: Point) -> str:
        return f"{self.across(point[0]):.1f},{self.up(point[1]):.1f}"

    def across(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (self.right - _LEFT)

    def up(self, value: float) -> float:
        return self.bottom - self.y.place(value) * (self.bottom - self.top)


def chart(
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    text: str,
    guides: Sequence[tuple[Point, Point]] = (),
    width: float = 360.0,
    height: float = 250.0,
) -> Markup:
    """Two axes and what lies between them; `text` says the same in words, `guides` are thin lines behind the data.

    Series differ by dashes and by the shape of their dots too, not by colour alone.
    """
    named = [(number, each) for number, each in enumerate(series) if each.name]
    field = _Field(x, y, width - _RIGHT, _TOP + (_LINE if named else 0.0), height - _BOTTOM)
    parts = [
        *_axes(field),
        *(Markup('<path class="guide" d="M{}L{}"/>').format(field.at(a), field.at(b)) for a, b in guides),
        *(part for number, each in enumerate(series) for part in _series(field, each, number)),
        *_legend(named),
    ]
    return Markup('<svg class="plot" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, text, Markup("").join(parts)
    )


def whisker(value: float, low: float, high: float, *, floor: float = 0.0) -> Markup:
    """A mark with its interval on a line from `floor` to 1. It stands beside the same numbers and is not read aloud."""
    axis = Axis("", floor)
    start, end, at = (2 + 92 * axis.place(each) for each in (low, high, value))
    return Markup(
        '<svg class="whisker" viewBox="0 0 96 12" aria-hidden="true"><path class="track" d="M2,6H94"/>'
        '<path class="reach" d="M{:.1f},6H{:.1f}"/><path class="mark" d="M{:.1f},1V11"/></svg>'
    ).format(start, end, at)


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most so many of the points, evenly taken, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _axes(field: _Field) -> Iterator[Markup]:
    for tick in field.y.ticks:
        up = field.up(tick)
        yield Markup('<path class="grid" d="M{},{:.1f}H{}"/>').format(_LEFT, up, field.right)
        yield Markup('<text class="tick y" x="{}" y="{:.1f}">{}</text>').format(
            _LEFT - 6, up + 4, _tick(tick)
        )
    free = -math.inf
    for tick in field.x.ticks:
        half = len(_tick(tick)) * _LETTER / 2
        across = min(field.across(tick), field.right + _RIGHT - half)
        if across - half >= free:  # one that would run into the last is left out
            yield Markup('<text class="tick x" x="{:.1f}" y="{}">{}</text>').format(
                across, field.bottom + 16, _tick(tick)
            )
            free = across + half + _LETTER
    yield Markup('<path class="axis" d="M{},{}H{}"/>').format(_LEFT, field.bottom, field.right)
    yield Markup('<text class="title x" x="{}" y="{}">{}</text>').format(
        (_LEFT + field.right) / 2, field.bottom + 33, field.x.title
    )
    yield Markup('<text class="title" x="0" y="11">{}</text>').format(field.y.title)


def _series(field: _Field, series: Series, number: int) -> Iterator[Markup]:
    for across, low, high in series.bars:
        yield Markup('<path class="bar s{}" d="M{}L{}"/>').format(
            number, field.at((across, low)), field.at((across, high))
        )
    points = thin(series.points)
    if points and series.mark != "dots":
        path = "M" + "L".join(field.at(point) for point in points)
        if series.mark == "area":
            yield Markup('<path class="area s{}" d="{}V{}H{:.1f}Z"/>').format(
                number, path, field.bottom, field.across(points[0][0])
            )
        yield Markup('<path class="line s{}" d="{}"/>').format(number, path)
    if series.dotted:
        for point in points:
            yield _dot(field.across(point[0]), field.up(point[1]), number)


def _dot(across: float, up: float, number: int) -> Markup:
    """A disc for the first series, a hollow diamond for others."""
    if number == 0:
        return Markup('<circle class="dot s0" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(across, up)
    return Markup('<path class="dot s{}" d="M{:.1f},{:.1f}l4.5,4.5l-4.5,4.5l-4.5,-4.5Z"/>').format(
        number, across, up - 4.5
    )


def _legend(named: Sequence[tuple[int, Series]]) -> Iterator[Markup]:
    left = _LEFT
    for number, series in named:
        if series.mark != "dots":
            yield Markup('<path class="line s{}" d="M{:.1f},{}h20"/>').format(number, left, _TOP + 2)
        if series.dotted:
            yield _dot(left + 10, _TOP + 2, number)
        yield Markup('<text class="key" x="{:.1f}" y="{}">{}</text>').format(left + 26, _TOP + 6, series.name)
        left += 26 + len(series.name) * _LETTER + 16


def _tick(value: float) -> str:
    return f"{value:,.6g}"
