"""nlu.heads.page: what is measured is shown, what is missing is left out, and a phrase never becomes markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.heads import page

VOID = {"meta", "input", "col", "br", "wbr"}
APART = {"th", "td", "dt", "dd", "br"}  # what a browser sets apart
HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(1)</script>"
SECTIONS = [
    "findings", "classes", "confusions", "errors", "slices", "outside", "coverage", "reliability", "learning_curve",
    "few_shot", "regularisation", "ablation", "cross_validation", "curves", "summary", "golden",
]  # fmt: skip

Path = tuple[str | int, ...]


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.0045, "high": value + 0.0055}


def report() -> dict[str, Any]:
    """A report with everything in it, as train.py writes it."""
    lamp, bread = "dim the lamp over the desk", "напомни купить хлеб"
    measured = {name: estimate(0.81) for name in ("precision", "recall", "f1")}
    return {
        "format": 1,
        "head": {
            "name": "intent",
            "kind": "sentence",
            "task": "intent",
            "labels": ["light_dim", "reminder_set"],
            "version": "3f" * 32,
            "vectorizer": "9a" * 32,
            "made_by": "nlu heads train",
            "bytes": 183412,
            "exclusive": True,
            "beta": 1.8,
            "params": {"c": 8.0, "sources": ["журнал"]},
        },
        "data": {
            "files": [{"path": "train.tsv", "sha256": "ab" * 32, "rows": 15000}],
            "rows": {"train": 15000, "dev": 3000, "test": 4500, "outside": 1200},
            "scripts": {"latin": 0.98, "cyrillic": 0.02},
            "words": {"median": 8, "p95": 16},
        },
        "seconds": {"read": 0.2, "encode": 0.0, "fit": 2.9, "report": 1.5, "total": 4.6},
        "vectors": {"encoded": 0, "from_store": 22600},
        "cost_us": 12.34,
        "measured_on": "test",
        "summary": {
            "accuracy": estimate(0.9604),
            "macro_f1": estimate(0.9587),
            "ece_before": 0.11,
            "ece_after": 0.0104,
            "promised_recall": 0.95,
            "recall": 0.946,
            "phrases": 4500,
        },
        "classes": [
            {"label": "light_dim", "support": 30, "threshold": 0.21, **measured},
            {"label": "reminder_set", "support": 1230, "threshold": 0.3, **measured, "f1": estimate(0.79)},
        ],
        "confusions": [
            {
                "gold": "light_dim",
                "predicted": "reminder_set",
                "count": 7,
                "phrases": [{"text": lamp, "score": 0.61}],
            }
        ],
        "coverage": [
            {"threshold": i / 10, "coverage": 1 - i / 20, "precision": 0.9 + i / 100} for i in range(11)
        ],
        "curves": [
            {
                "label": "light_dim",
                "threshold": 0.21,
                "recall": [0.0, 0.5, 1.0],
                "precision": [1.0, 0.9, 0.6],
                "chosen": [0.5, 0.9],
            }
        ],
        "reliability": {
            "before": [{"score": 0.4, "right": 0.6, "rows": 450}, {"score": 0.7, "right": 0.9, "rows": 450}],
            "after": [{"score": 0.5, "right": 0.5, "rows": 450}, {"score": 0.9, "right": 0.9, "rows": 450}],
        },
        "learning_curve": [
            {"rows": 1500, "accuracy": estimate(0.9)},
            {"rows": 15000, "accuracy": estimate(0.96)},
        ],
        "errors": [
            {
                "text": bread,
                "gold": "reminder_set",
                "predicted": "light_dim",
                "score": 0.57,
                "nearest": [{"text": lamp, "label": "light_dim", "cosine": 0.83}],
            }
        ],
        "slices": [{"slice": "length", "value": "1-3 words", "rows": 500, "accuracy": estimate(0.91)}],
        "outside": {
            "method": "centroid",
            "auroc": estimate(0.977),
            "recall": estimate(0.81),
            "threshold": 0.5,
            "candidates": [{"method": "energy", "auroc": 0.97}],
            "scores": {"inside": [40, 9, 1, 0], "outside": [0, 2, 8, 10]},
        },
        "ablation": [{"features": "text alone", "accuracy": estimate(0.91)}],
        "few_shot": [{"shots": n, "accuracy": estimate(0.8 + n / 100), "seeds": 5} for n in (5, 10)],
        "cross_validation": {"folds": 5, "accuracy": estimate(0.958)},
        "regularisation": [{"c": c, "accuracy": 0.95, "loss": 0.2} for c in (0.5, 8.0)],
        "findings": [
            {
                "severity": "note",
                "what": "few phrases",
                "where": "a.tsv",
                "found": bread,
                "remedy": "Write more.",
            },
            {
                "severity": "error",
                "what": "near-duplicate across splits",
                "where": "a.tsv:12, b.tsv:440",
                "found": lamp,
                "remedy": "Remove one.",
            },
        ],
        "golden": [{"text": lamp, "label": "light_dim"}],
    }


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    above: tuple[str, ...]  # the tags it lies in
    text: str = ""


@dataclass
class Outline(HTMLParser):
    """The page as a browser takes it apart; raises where an element is closed that is not the open one."""

    elements: list[Element] = field(default_factory=list)
    opened: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(
            tag, {key: value or "" for key, value in attrs}, tuple(each.tag for each in self.opened)
        )
        self.elements.append(element)
        self.handle_data(" " if tag in APART else "")
        if tag not in VOID:
            self.opened.append(element)

    def handle_endtag(self, tag: str) -> None:
        found = self.opened.pop().tag if self.opened else "nothing"
        if found != tag:
            raise ValueError(f"found </{tag}>, expected the end of {found}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        for element in self.opened:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [each for each in self.elements if each.tag in tags]

    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags and the names of their attributes: everything but text."""
        return [(each.tag, tuple(each.attributes)) for each in self.elements]

    def section(self, key: str) -> str:
        """The text of a section, whitespace folded."""
        (found,) = (each for each in self.all("section") if each.attributes["id"] == key)
        return " ".join(found.text.split())


def outline(given: dict[str, Any]) -> Outline:
    reader = Outline()
    reader.feed(page.render(given))
    reader.close()
    assert reader.opened == []
    return reader


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Where every key of a report is."""
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if isinstance(value, dict):
            yield (*at, key)
        yield from paths(inner, (*at, key))


def changed(at: Path, *, to_null: bool) -> dict[str, Any]:
    """The report with one key null or missing."""
    made: Any = report()
    inner = made
    for step in at[:-1]:
        inner = inner[step]
    if to_null:
        inner[at[-1]] = None
    else:
        del inner[at[-1]]
    return dict(made)


def hostile(value: Any) -> Any:
    """The report with markup in every text of it, the keys of open tables among them."""
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) and value not in ("test", "error") else value


def test_page_begins_with_what_readers_look_for() -> None:
    (header,) = outline(report()).all("header")
    shown = " ".join(header.text.split())
    assert shown.startswith("sentence head · intent · 2 labels intent Measured on 4,500 test rows")
    assert "accuracy 0.960 0.956–0.966" in shown
    assert "recall 0.946 promised 0.950, kept within 2 points" in shown
    assert "calibration error 0.010 0.110 before calibration" in shown
    assert "4.6 s" in shown and "12.3 µs" in shown and "183.4 kB" in shown and "15,000" in shown


@pytest.mark.parametrize(
    ("recall", "said"), [(0.95, "kept"), (0.935, "kept within 2 points"), (0.92, "missed")]
)
def test_page_says_whether_a_promise_is_kept(recall: float, said: str) -> None:
    given = report()
    given["summary"]["recall"] = estimate(recall)
    shown = " ".join(outline(given).all("header")[0].text.split())
    assert f"promised 0.950, {said} calibration" in shown


def test_page_says_that_folds_were_measured() -> None:
    given = report() | {"measured_on": "folds"}
    assert "Measured on folds of its 15,000 training rows" in " ".join(
        outline(given).all("header")[0].text.split()
    )


def test_page_shows_what_is_in_the_report() -> None:
    shown = outline(report())
    assert "напомни купить хлеб meant reminder_set, answered light_dim 0.570" in shown.section("errors")
    assert "dim the lamp over the desk light_dim ✕ 0.830" in shown.section("errors").replace("\xa0", " ")
    assert (
        "7 times light_dim → was answered as reminder_set dim the lamp over the desk 0.610"
        in shown.section("confusions")
    )
    assert "length 1-3 words 500 0.910 0.906–0.915" in shown.section("slices")
    assert "method centroid AUROC 0.977" in shown.section("outside")
    assert "light_dim threshold 0.210 recall 0.500 precision 0.900" in shown.section("curves")
    assert "5 0.850 0.846–0.856 5" in shown.section("few_shot")
    assert "folds 5 accuracy 0.958" in shown.section("cross_validation")
    assert "phrases 4,500" in shown.section("summary")
    assert "15,000 train, 3,000 dev, 4,500 test, 1,200 outside" in shown.section("made")
    assert 'sources ["журнал"]' in shown.section("made")


def test_page_puts_errors_in_the_data_before_notes() -> None:
    shown = outline(report()).section("findings")
    assert shown.index("✕ error") < shown.index("note few phrases")


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("to_null", [True, False], ids=["null", "missing"])
def test_page_leaves_out_a_section_without_data(key: str, to_null: bool) -> None:
    sections = [each.attributes["id"] for each in outline(report()).all("section")]
    assert sections == [*SECTIONS, "made"]
    shown = outline(changed((key,), to_null=to_null))
    assert [each.attributes["id"] for each in shown.all("section")] == [
        each for each in sections if each != key
    ]
    assert f"#{key}" not in [each.attributes["href"] for each in shown.all("a")]


@pytest.mark.parametrize("to_null", [True, False], ids=["null", "missing"])
def test_page_takes_a_report_that_lacks_any_key(to_null: bool) -> None:
    for at in paths(report()):
        if at != ("head",):
            shown = outline(changed(at, to_null=to_null))
            text = shown.all("div")[0].text
            assert not re.search(r"\b(None|nan|null|Undefined|inf)\b", text), at


def test_page_of_a_head_alone() -> None:
    shown = outline({"head": {"name": "intent"}})
    assert [each.attributes["id"] for each in shown.all("section")] == ["made"]
    assert shown.all("h1")[0].text == "intent"


def test_page_shows_a_dash_for_what_is_no_number() -> None:
    given = report()
    given["summary"] = {
        "loss": math.nan,
        "perplexity": math.inf,
        "rows": 12,
        "large": 1234.5,
        "small": 0.12345,
    }
    shown = outline(given).section("summary")
    assert shown.endswith("loss – perplexity – rows 12 large 1,234 small 0.123")


def test_page_sorts_labels_worst_first_and_folds_the_many() -> None:
    given = report()
    scores = [((i * 37) % 150) / 150 for i in range(150)]
    given["classes"] = [{"label": f"label {i}", "f1": score} for i, score in enumerate(scores)]
    given["classes"].append({"label": "unmeasured"})
    rows = [each for each in outline(given).all("bdi") if each.text.startswith(("label ", "unmeasured"))]
    named = [each.text for each in rows if "table" in each.above]
    assert named == [f"label {i}" for i in sorted(range(150), key=scores.__getitem__)] + ["unmeasured"]
    assert [("details" in each.above) for each in rows] == [False] * 20 + [True] * 131


def test_page_folds_long_lists() -> None:
    given = report()
    given["errors"] = [{"text": f"phrase {i}", "gold": "a", "predicted": "b"} for i in range(30)]
    said = [each for each in outline(given).all("bdi") if each.text.startswith("phrase ")]
    assert [each.text for each in said] == [f"phrase {i}" for i in range(30)]
    assert ["details" in each.above for each in said] == [False] * 8 + [True] * 22


def test_page_escapes_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given = hostile(report())
    assert outline(given).structure() == outline(report()).structure()
    # the control: without escaping the same phrases do become elements
    monkeypatch.setattr(page, "_ENVIRONMENT", page._ENVIRONMENT.overlay(autoescape=False))
    reader = Outline()
    with pytest.raises(ValueError, match="expected the end of"):
        reader.feed(page.render(given))
    assert any("onerror" in each.attributes for each in reader.all("img"))


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_page_shows_any_phrase_as_it_is(text: str) -> None:
    shown = outline({"head": {"name": "intent"}, "golden": [{"text": text, "label": "any"}]})
    assert next(each.text for each in shown.all("bdi") if each.attributes.get("class") == "said") == text


def test_page_with_half_a_surrogate_pair_can_be_written() -> None:
    given = {"head": {"name": "intent"}, "golden": [{"text": "broken \ud83d here", "label": "any"}]}
    assert "broken ? here" in page.render(given).encode().decode()


def test_page_asks_nothing_of_the_network() -> None:
    given = report()
    given["golden"] = [{"text": "open http://example.org", "label": "any"}]  # text may name an address
    shown = outline(given)
    addresses = [
        value
        for each in shown.elements
        for key, value in each.attributes.items()
        if key in ("href", "src", "action")
    ]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not shown.all("link", "img", "iframe", "object", "embed")
    loaded = shown.all("style")[0].text + shown.all("script")[0].text
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp", loaded)
    assert "default-src 'none'" in [each.attributes.get("content", "")[:18] for each in shown.all("meta")]


def test_page_is_readable_aloud() -> None:
    shown = outline(report())
    assert shown.all("html")[0].attributes["lang"] == "en"
    levels = [int(each.tag[1]) for each in shown.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    for svg in shown.all("svg"):
        spoken = svg.attributes.get("role") == "img" and len(svg.attributes.get("aria-label", "")) > 20
        assert spoken or svg.attributes.get("aria-hidden") == "true"
    assert len(shown.all("figcaption")) == len(shown.all("figure")) > 5
    assert len(shown.all("caption")) == len(shown.all("table")) > 5
    assert all("scope" in each.attributes for each in shown.all("th"))
    assert all(
        "tabindex" in each.attributes for each in shown.all("div") if each.attributes.get("class") == "scroll"
    )


def test_page_links_lead_somewhere() -> None:
    shown = outline(report())
    names = [each.attributes["id"] for each in shown.elements if "id" in each.attributes]
    assert len(names) == len(set(names))
    targets = [each.attributes["href"][1:] for each in shown.all("a")]
    targets += [each.attributes["aria-labelledby"] for each in shown.all("section")]
    assert targets and set(targets) <= set(names)


def test_page_explains_each_section_in_one_sentence() -> None:
    shown = outline(report())
    for section in shown.all("section"):
        about = [
            each
            for each in shown.all("p")
            if each.attributes.get("class") == "about" and each.text in section.text
        ]
        assert about and re.fullmatch(r"[A-Z][^.!?]*(\d\.\d[^.!?]*)?\.", about[0].text), section.attributes[
            "id"
        ]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_page_has_contrast_in_light_and_dark() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    style = outline(report()).all("style")[0].text
    palettes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root {(.*?)}", style, re.S)
    ]
    light, dark, _ = palettes
    assert light.keys() == dark.keys()
    for palette in (light, dark):
        for name in ("ink", "soft", "first", "second", "good", "bad"):
            for ground in ("paper", "raised"):
                assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)


def widths(style: str) -> list[float]:
    """Every width that something must at least have, in pixels; conditions on the window are none."""
    style = re.sub(r"@media[^{]*|max-width:[^;]*", "", style)
    found = re.findall(r"(?:width:|minmax\()[^;,)]*?([\d.]+)(px|rem)", style)
    return [float(amount) * (16 if unit == "rem" else 1) for amount, unit in found]


def test_page_fits_a_phone() -> None:
    shown = outline(report())
    assert widths("a { min-width: 30rem } b { columns: minmax(10px, 1fr); width: 8px }") == [480, 10, 8]
    assert max(widths(shown.all("style")[0].text)) <= 360
    tables = shown.all("table")  # what may be wider stands in a box of its own that scrolls
    boxes = [each for each in shown.all("div") if each.attributes.get("class") == "scroll"]
    assert len(boxes) == len(tables) and all(each.above[-1] == "div" for each in tables)
    views = [each.attributes.get("content", "") for each in shown.all("meta")]
    assert "width=device-width, initial-scale=1" in views
