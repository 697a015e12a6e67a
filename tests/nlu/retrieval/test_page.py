"""nlu.retrieval.page: both files, every number on the page, nothing from elsewhere, nothing unescaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nlu.retrieval.page import PAGE, REPORT, render, write


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.011, "high": value + 0.022}


def contestant(value: float, gain: float | None = None) -> dict[str, Any]:
    names = ("recall@1", "recall@5", "recall@10", "mrr")
    measures = {name: estimate(value + i / 10) for i, name in enumerate(names)}
    gains = {} if gain is None else {"gain": {name: estimate(gain) for name in names}}
    return {"measures": measures, **gains}


def report() -> dict[str, Any]:
    contestants = {
        "cosine": contestant(0.213),
        "linear": contestant(0.224, -0.1),
        "ranker": contestant(0.335, 0.122),
    }
    steps = [0.25, 0.5, 0.75]
    return {
        "dialogs_from": ["held-out.jsonl", "<b>ещё</b>.jsonl.gz"],
        "vectorizer": "ab" * 32,
        "bundle": "cd" * 32,
        "context": 3,
        "seed": 11,
        "skipped_turns": 2,
        "exchanges": 1234,
        "dialogs": 56,
        "replies": 1200,
        "among": {"of": 100, "contestants": contestants},
        "among_all": {"of": 1200, "found": 1000, "reranked": 100, "contestants": contestants},
        "coverage": {
            "exchanges": 1234,
            "known": 78,
            "curve": [
                {"quantile": q, "threshold": 0.4 + q / 2, "coverage": 1 - q, "precision": None if q > 0.5 else 0.913}
                for q in steps
            ],
        },
        "latency": {
            "rows": 4321,
            "index": "the index served",
            "answers": 1234,
            "cpus": 2,
            "us": {name: {"p50": 81.0, "p95": 143.0, "p99": 3961.0} for name in ("search", "rank")},
            "histogram": {
                name: {"edges": [40.0, 80.0, 400.0, 4000.0], "counts": [600, 600, 34]} for name in ("search", "rank")
            },
        },
    }  # fmt: skip


class Seen(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_every_number() -> None:
    seen = Seen(render(report()))
    for shown in (
        "1,234 exchanges", "56 dialogs", "1,200 different replies", "0.213 [0.202, 0.235]", "+0.122 [+0.111, +0.144]",
        "-0.100 [-0.111, -0.078]", "0.650", "0.913", "3,961", "4,321 rows of the index served", "cd" * 32,
    ):  # fmt: skip
        assert shown in seen.text
    assert {attributes["id"] for tag, attributes in seen.tags if tag == "section"} == {
        *("among", "among_all", "coverage", "latency", "made")
    }


def test_page_draws_bars_a_curve_and_a_histogram() -> None:
    tags = Seen(render(report())).tags
    classes = [attributes.get("class") or "" for _, attributes in tags]
    assert classes.count("measure") == 2 * 3 * 4
    assert classes.count("plot") == 2
    assert {"line s0", "line s1", "area s0", "area s1"} <= set(classes)
    widths = [attributes["d"] for _, attributes in tags if attributes.get("class") == "value"]
    assert widths[0] == f"M0,6H{160 * 0.213:.1f}"


def test_page_says_which_gains_are_certain() -> None:
    page = render(report())
    assert '<small class="good">+0.122' in page
    assert '<small class="bad">-0.100' in page
    unsure = report()
    unsure["among"]["contestants"]["ranker"]["gain"]["mrr"] = {"value": 0.01, "low": -0.01, "high": 0.03}
    assert '<small class="">+0.010' in render(unsure)


def test_page_without_an_index_has_no_coverage() -> None:
    without = {key: part for key, part in report().items() if key != "coverage"}
    seen = Seen(render(without))
    assert "Coverage" in Seen(render(report())).text  # the control
    assert "Coverage" not in seen.text


def test_page_of_a_threshold_all_turns_share_is_drawn() -> None:
    flat = report()
    for point in flat["coverage"]["curve"]:
        point |= {"threshold": 1.0, "coverage": 1.0, "precision": None}
    assert Seen(render(flat)).text.count("right among them") == 1  # in the table alone


@pytest.mark.parametrize("edges", [[0.4, 0.41, 0.42, 0.43], [1.0, 10.0, 100.0, 1e6], [5.0, 5.1, 5.2, 5.3]])
def test_page_latency_of_any_scale_is_drawn(edges: list[float]) -> None:
    other = report()
    for histogram in other["latency"]["histogram"].values():
        histogram["edges"] = edges
    ticks = re.findall(r'class="tick x"[^>]*>([^<]+)<', render(other))
    assert len(ticks) >= 2


def test_page_escapes_and_asks_nothing_of_the_network() -> None:
    page = render(report())
    seen = Seen(page)
    assert "<b>" not in page and "<b>ещё</b>.jsonl.gz" in seen.text
    for tag, attributes in seen.tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page and "@import" not in page


def test_page_writes_both_files(tmp_path: Path) -> None:
    write(report(), tmp_path / "new" / "report")
    assert json.loads((tmp_path / "new/report" / REPORT).read_text(encoding="utf-8")) == report()
    assert (tmp_path / "new/report" / PAGE).read_text(encoding="utf-8") == render(report())
