"""nlu.gathered: sums that are exact, whoever came and went."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nlu.gathered import Gathered


class Counted:
    """One process' instruments."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("calls", "Calls.", ["code"], registry=self.registry)
        self.waiting = Gauge("waiting", "Waiting.", registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", buckets=(1.0, 2.0), registry=self.registry)

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()


def value(gathered: Gathered, name: str, **labels: str) -> float | None:
    """One sample's value; None where there is no such sample, an error where there are several."""
    found = [
        sample.value
        for family in gathered.families()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) < 2
    return found[0] if found else None


def test_gathered_names_the_worker_of_every_sample() -> None:
    one, two, gathered = Counted(), Counted(), Gathered()
    one.calls.labels("OK").inc(3)
    two.calls.labels("OK").inc(4)
    two.waiting.set(5)
    gathered.heard("1", one.text)
    gathered.heard("2", two.text)
    assert value(gathered, "calls_total", worker="1", code="OK") == 3
    assert value(gathered, "calls_total", worker="2", code="OK") == 4
    assert value(gathered, "waiting", worker="2") == 5
    names = [family.name for family in gathered.families()]
    assert sorted(set(names)) == sorted(names), "each family comes once, or a scraper refuses the page"
    assert all("worker" in sample.labels for family in gathered.families() for sample in family.samples)


def test_gathered_adds_what_predecessors_counted() -> None:
    first, second, gathered = Counted(), Counted(), Gathered()
    first.calls.labels("OK").inc(3)
    first.calls.labels("LATE").inc(2)
    first.waiting.set(9)
    first.seconds.observe(1.5)
    gathered.heard("1", first.text)
    gathered.gone("1")
    assert value(gathered, "calls_total", worker="1", code="OK") == 3, (
        "shown also while nobody is in its place"
    )
    assert value(gathered, "waiting", worker="1") is None, "what was true of a moment ends with it"
    second.calls.labels("OK").inc()
    second.waiting.set(1)
    second.seconds.observe(0.5)
    gathered.heard("1", second.text)
    assert value(gathered, "calls_total", worker="1", code="OK") == 4
    assert value(gathered, "calls_total", worker="1", code="LATE") == 2, (
        "though it has not counted one itself"
    )
    assert value(gathered, "waiting", worker="1") == 1
    assert value(gathered, "seconds_bucket", worker="1", le="1.0") == 1
    assert value(gathered, "seconds_bucket", worker="1", le="+Inf") == 2
    assert value(gathered, "seconds_sum", worker="1") == 2.0
    gathered.gone("1")
    gathered.heard("1", Counted().text)
    assert value(gathered, "calls_total", worker="1", code="OK") == 4, "over more than one death"


def test_gathered_would_fall_without_the_predecessors() -> None:
    """The negative control of the test above: a successor alone has fewer."""
    first, gathered = Counted(), Gathered()
    first.calls.labels("OK").inc(3)
    gathered.heard("1", first.text)
    gathered.heard("1", Counted().text)
    assert value(gathered, "calls_total", worker="1", code="OK") is None


def test_gathered_hears_only_what_is_asked_for() -> None:
    one, gathered = Counted(), Gathered()
    gathered.heard("1", one.text, only=("call", "wait"), without=("calls",))
    assert {family.name for family in gathered.families()} == {"waiting"}
