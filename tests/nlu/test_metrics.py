"""Instruments: exact from one thread, readable from any, and every name that dashboards and alerts use is there."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Enum, Gauge, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families

from nlu import drift, metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD, ALERTS = DEPLOY / "grafana" / "chorus.json", DEPLOY / "prometheus" / "alerts.yml"
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
_NAME = re.compile(r"\b(?:nlu|process)_[a-z0-9_]+\b")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """An empty registry in the place of the service's."""
    fresh = CollectorRegistry()
    monkeypatch.setattr(metrics, "REGISTRY", fresh)
    return fresh


def page(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def served_names() -> set[str]:
    """Every sample and family name that the service can expose."""
    names: set[str] = set()
    for family in metrics.REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["", "_bucket", "_sum", "_count"]}.get(
            family.type, [""]
        )
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_metrics_counter_counts_by_labels(registry: CollectorRegistry) -> None:
    counter = metrics.Counter("toys", "Toys.", ["kind"], known=[("ball",)])
    counter.labels("car").inc()
    counter.labels("car").inc(4)
    assert registry.get_sample_value("toys_total", {"kind": "car"}) == 5
    assert registry.get_sample_value("toys_total", {"kind": "ball"}) == 0  # before the first one is counted


def test_metrics_counter_without_labels_is_there_at_zero(registry: CollectorRegistry) -> None:
    counter = metrics.Counter("toys", "Toys.")
    assert registry.get_sample_value("toys_total") == 0
    counter.inc(3)
    assert registry.get_sample_value("toys_total") == 3


@pytest.mark.parametrize("values", [(), ("a",), ("a", "b", "c")])
def test_metrics_wrong_number_of_labels_is_refused(
    registry: CollectorRegistry, values: tuple[str, ...]
) -> None:
    counter = metrics.Counter("toys", "Toys.", ["kind", "colour"])
    histogram = metrics.Histogram("toy_seconds", "Times.", ["kind", "colour"])
    info = metrics.Info("toy_info", "Info.", ["kind", "colour"])
    for refuse in (counter.labels, histogram.labels, info.show):
        with pytest.raises(ValueError, match=f"found {len(values)} label values, expected 2: kind, colour"):
            refuse(*values)


def test_metrics_a_name_has_one_owner(registry: CollectorRegistry) -> None:
    metrics.Counter("toys", "Toys.")
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        metrics.Counter("toys", "Toys.")


def test_metrics_histogram_is_that_of_prometheus_client(registry: CollectorRegistry) -> None:
    """The twin: the same values in both, bounds met exactly included."""
    bounds = (0.001, 0.01, 0.1, 1.0)
    mine = metrics.Histogram("toy_seconds", "Times.", ["kind"], bounds=bounds)
    their_registry = CollectorRegistry()
    theirs = TheirHistogram("toy_seconds", "Times.", ["kind"], buckets=bounds, registry=their_registry)
    for value in (0.0, 0.001, 0.0011, 0.05, 0.1, 3.0, 3.0):
        mine.labels("car").observe(value)
        theirs.labels("car").observe(value)

    def samples(text: str) -> set[tuple[str, frozenset[tuple[str, str]], float]]:
        return {
            (sample.name, frozenset(sample.labels.items()), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert samples(page(registry)) == samples(page(their_registry))


def test_metrics_info_shows_only_what_holds_now(registry: CollectorRegistry) -> None:
    info = metrics.Info("toy_info", "Info.", ["bundle"])
    assert registry.get_sample_value("toy_info", {"bundle": "one"}) is None
    info.show("one")
    info.show("two")
    assert registry.get_sample_value("toy_info", {"bundle": "one"}) is None
    assert registry.get_sample_value("toy_info", {"bundle": "two"}) == 1
    info.hide()
    assert registry.get_sample_value("toy_info", {"bundle": "two"}) is None


def test_metrics_scrapes_never_disturb_the_counting(registry: CollectorRegistry) -> None:
    """New labels appear while other threads scrape; nothing raises, nothing is lost."""
    counter = metrics.Counter("toys", "Toys.", ["kind"])
    histogram = metrics.Histogram("toy_seconds", "Times.", ["kind"])
    done, failures = threading.Event(), list[Exception]()

    def scrape() -> None:
        while not done.is_set():
            try:
                page(registry)
            except Exception as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=scrape) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for i in range(3000):
            counter.labels(str(i % 997)).inc()
            histogram.labels(str(i % 97)).observe(i)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failures == []
    family = next(family for family in registry.collect() if family.name == "toys")
    assert sum(sample.value for sample in family.samples) == 3000


def test_metrics_page_parses_and_names_follow_the_conventions() -> None:
    """Units are seconds, bytes, bits or none; what only grows ends in _total."""
    families = list(text_string_to_metric_families(page(metrics.REGISTRY)))
    ours = [family for family in families if family.name.startswith("nlu_")]
    assert len(ours) > 40
    for family in ours:
        assert re.fullmatch(r"nlu(_[a-z0-9]+)+", family.name)
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|percent)\b", family.name)
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_phrases"))


def test_metrics_every_instrument_is_used() -> None:
    """One that nothing in the service touches would be 0 for ever, and look like good news."""
    folder = Path(metrics.__file__).parent
    others = [path for path in folder.rglob("*.py") if path.name != "metrics.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in others)
    kinds = (metrics.Counter, metrics.Histogram, metrics.Info, metrics.Heads, Gauge, Enum)
    names = [name for name, value in vars(metrics).items() if isinstance(value, kinds)]
    assert len(names) > 40
    assert [name for name in names if not re.search(rf"\bmetrics\.{name}\b", code)] == []


def test_metrics_page_has_the_process() -> None:
    assert (metrics.REGISTRY.get_sample_value("process_resident_memory_bytes") or 0) > 1e6


def queries(path: Path) -> Iterator[str]:
    """Every expression of a dashboard or a file of alert rules."""
    if path.suffix == ".json":
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))
        return
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_metrics_dashboards_and_alerts_ask_only_for_what_there_is(path: Path) -> None:
    assert drift.TALLY  # registers what is computed at the scrape
    asked = {name for query in queries(path) for name in _NAME.findall(query)}
    assert len(asked) > 10
    assert asked - served_names() == set()


def test_metrics_a_name_that_is_not_there_would_be_found() -> None:
    """The control of the test above."""
    assert {"nlu_calls_total", "nlu_stage_seconds_bucket", "process_resident_memory_bytes"} <= served_names()
    assert not {"nlu_calls", "nlu_calls_count", "nlu_requests_total"} & served_names()


def test_metrics_alerts_say_what_and_what_to_do() -> None:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_metrics_page_of_the_docs_names_every_metric() -> None:
    described = set(_NAME.findall(DOCS.read_text(encoding="utf-8")))
    ours = {family.name for family in metrics.REGISTRY.collect() if family.name.startswith("nlu_")}
    totals = {family.name for family in metrics.REGISTRY.collect() if family.type == "counter"}
    assert {f"{name}_total" if name in totals else name for name in ours} <= described
    assert {name for name in described if name.startswith("nlu_")} <= served_names()
