"""nlu.heads.plot: a chart puts every number where its axes say, and text is only ever text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlu.heads import plot
from nlu.heads.plot import Axis, Series, chart, log_axis, round_axis, thin, whisker

HOSTILE = '"><script>alert(1)</script>'


def drawn(markup: str) -> ElementTree.Element:
    """The SVG as a tree; raises where it is not well-formed."""
    return ElementTree.fromstring(markup)


def with_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [each for each in svg.iter() if name in each.get("class", "").split()]


def numbers(path: ElementTree.Element) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]


def tags(markup: str) -> list[str]:
    """The elements that a browser would see."""
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append(tag)

    reader = Reader()
    reader.feed(markup)
    reader.close()
    return seen


@pytest.mark.parametrize(
    ("axis", "value", "place"),
    [
        (Axis("share"), 0.25, 0.25),
        (Axis("rows", 100.0, 300.0), 150.0, 0.25),
        (Axis("rows", 100.0, 300.0), 50.0, 0.0),  # beyond either end: at the border
        (Axis("rows", 100.0, 300.0), 900.0, 1.0),
        (Axis("c", 1.0, 100.0, log=True), 10.0, 0.5),
        (Axis("c", 1.0, 100.0, log=True), 0.0, 0.0),
    ],
)
def test_plot_axis_places_values(axis: Axis, value: float, place: float) -> None:
    assert axis.place(value) == pytest.approx(place)


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 4)), min_size=1, max_size=8))
def test_plot_round_axis_holds_its_values_between_few_ticks(values: list[float]) -> None:
    axis = round_axis("any", values)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) and max(values) <= axis.high + slack
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high) and 2 <= len(axis.ticks) <= 7


def test_plot_round_axis_is_round() -> None:
    assert round_axis("accuracy", [0.66, 0.957]).ticks == pytest.approx((0.6, 0.7, 0.8, 0.9, 1.0))
    assert round_axis("rows", [750, 15000]).ticks == (0, 5000, 10000, 15000)
    assert round_axis("accuracy", [1.0, 1.0]).high == 1.0


def test_plot_log_axis_has_its_values_as_ticks() -> None:
    assert log_axis("shots", [50, 5, 10, 5]).ticks == (5, 10, 50)
    assert log_axis("shots", [5]).place(5) == pytest.approx(0.5)


def test_plot_draws_points_where_the_ticks_are() -> None:
    x, y = round_axis("rows", [0, 300]), Axis("accuracy")
    svg = drawn(chart([Series([(x.ticks[1], 0.5)], mark="dots")], x=x, y=y, text="one dot"))
    (dot,) = with_class(svg, "dot")
    across = {
        each.text: each.get("x") for each in with_class(svg, "tick") if "x" in each.get("class", "").split()
    }
    heights = [numbers(line)[1] for line in with_class(svg, "grid")]
    assert float(dot.get("cx", "")) == pytest.approx(float(across["100"] or "nan"), abs=0.1)
    assert float(dot.get("cy", "")) == pytest.approx(heights[y.ticks.index(0.5)], abs=0.1)
    assert heights == sorted(heights, reverse=True)  # more is higher


def test_plot_draws_bars_areas_and_guides() -> None:
    stair = Series([(0.0, 0.2), (0.5, 0.2), (0.5, 0.8), (1.0, 0.8)], "inside", "area", [(0.5, 0.1, 0.9)])
    svg = drawn(
        chart([stair], x=Axis("score"), y=Axis("share"), text="a stair", guides=[((0.5, 0.0), (0.5, 1.0))])
    )
    left, low, right, high = numbers(with_class(svg, "bar")[0])
    assert left == right and low > high
    assert numbers(with_class(svg, "guide")[0])[::2] == [left, right]
    assert with_class(svg, "area")[0].get("d", "").endswith("Z")


def test_plot_tells_series_apart_without_colour() -> None:
    pair = [Series([(0.1, 0.1), (0.9, 0.9)], name, "dotted") for name in ("after", "before")]
    svg = drawn(chart(pair, x=Axis("score"), y=Axis("right"), text="two lines"))
    assert [each.text for each in with_class(svg, "key")] == ["after", "before"]
    shapes = {each.tag for each in with_class(svg, "dot") if "s0" in each.get("class", "")}
    assert not shapes & {each.tag for each in with_class(svg, "dot") if "s1" in each.get("class", "")}


def test_plot_leaves_out_ticks_that_would_touch() -> None:
    crowded = log_axis("rows", [1000, 1001, 1002, 9000])
    svg = drawn(chart([], x=crowded, y=Axis("accuracy"), text="ticks"))
    shown = [each.text for each in with_class(svg, "tick") if "x" in each.get("class", "").split()]
    assert shown == ["1,000", "9,000"]


def test_plot_is_an_image_with_a_text() -> None:
    svg = drawn(chart([], x=Axis("a"), y=Axis("b"), text='Precision of "да"'))
    assert (svg.get("role"), svg.get("aria-label")) == ("img", 'Precision of "да"')
    assert drawn(whisker(0.5, 0.4, 0.6)).get("aria-hidden") == "true"


def test_plot_whisker_marks_the_value_within_its_interval() -> None:
    svg = drawn(whisker(0.75, 0.6, 0.9, floor=0.5))
    start, _, end = numbers(with_class(svg, "reach")[0])
    at = numbers(with_class(svg, "mark")[0])[0]
    first, _, last = numbers(with_class(svg, "track")[0])
    assert first < start < at < end < last
    assert at == pytest.approx((first + last) / 2)


@given(st.integers(0, 500), st.integers(2, 300))
def test_plot_thin_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    points = [(float(i), float(-i)) for i in range(count)]
    kept = thin(points, most)
    assert len(kept) == min(count, most) and kept == sorted(set(kept))
    assert kept[:1] == points[:1] and kept[-1:] == points[-1:]


def test_plot_escapes_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def elements(text: str) -> list[str]:
        series = [Series([(0.5, 0.5)], text)]
        return tags(chart(series, x=Axis(text), y=Axis(text), text=text))

    assert elements(HOSTILE) == elements("harmless")
    monkeypatch.setattr(plot, "Markup", str)  # the control: without escaping the same phrase gets in
    assert elements(HOSTILE) != elements("harmless")
