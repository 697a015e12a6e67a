"""What heads say is counted exactly, given again or not; drift is the divergence it says it is, of what it says."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from annotators.annotator import Annotation, Label, Span, Status
from annotators.head import Spec
from nlu import drift, metrics
from nlu.desk import Desk
from nlu.drift import ENOUGH, HALF_LIFE, Tally, Window, Windows, divergence
from nlu.engine import Engine
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from tests.annotators.toys import make_spec

MOOD = make_spec(("good", "bad"), name="mood", prior={"good": 0.5, "bad": 0.3, "none": 0.2})
PLAIN = make_spec(("on", "off"), name="switch")


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tally]:
    """A fresh one in the place of the process's, and in the scrape."""
    fresh = Tally()
    monkeypatch.setattr(drift, "TALLY", fresh)
    metrics.HEADS.watch(fresh.read)
    yield fresh
    monkeypatch.undo()
    metrics.HEADS.watch(drift.TALLY.read)


def says(spec: Spec, *labels: str, status: Status = Status.OK) -> Annotation:
    return Annotation(
        spec.name, spec.kind, status, labels=tuple(Label(label, 0.9, True, 0.0, 0.5) for label in labels)
    )


def put(windows: Windows, *annotations: Annotation, times: int = 1) -> None:
    code = windows.code(annotations)
    for _ in range(times):
        windows.put(code)


def counts(tally: Tally) -> dict[tuple[str, str], int]:
    return tally.read()[0]


def drifts(tally: Tally) -> dict[str, tuple[str, float]]:
    return {found.head: (found.reference, found.bits) for found in tally.read()[1]}


@pytest.mark.parametrize("seed", range(5))
def test_drift_divergence_is_jensens_and_shannons(seed: int) -> None:
    """The twin is scipy's distance, which is the root of it."""
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 50, 20).astype(float), rng.integers(0, 9, 20).astype(float)
    assert divergence(one, other) == pytest.approx(jensenshannon(one, other, base=2) ** 2, abs=1e-12)


def test_drift_divergence_is_0_of_the_same_and_1_of_nothing_in_common() -> None:
    assert divergence(np.array([1.0, 3.0]), np.array([2.0, 6.0])) == 0
    assert divergence(np.array([1.0, 0.0]), np.array([0.0, 2.0])) == pytest.approx(1)


def test_drift_counts_what_heads_said(tally: Tally) -> None:
    windows = Windows([MOOD, PLAIN])
    put(windows, says(MOOD, "good"), says(PLAIN))
    put(windows, says(MOOD, "bad"), says(PLAIN, "on"), times=3)
    assert counts(tally) == {
        ("mood", "good"): 1,
        ("switch", "none"): 1,
        ("mood", "bad"): 3,
        ("switch", "on"): 3,
    }
    assert metrics.REGISTRY.get_sample_value("nlu_head_labels_total", {"head": "mood", "label": "bad"}) == 3


def test_drift_spans_and_several_labels_each_count(tally: Tally) -> None:
    slots = make_spec(("time", "person"), name="slots", kind="token")
    several = make_spec(("a", "b"), name="several", exclusive=False)
    windows = Windows([slots, several])
    spans = (Span("time", 0, 3, 0.9), Span("time", 4, 6, 0.8))
    put(windows, Annotation("slots", "token", Status.OK, spans=spans), says(several, "a", "b"))
    assert counts(tally) == {("slots", "time"): 2, ("several", "a"): 1, ("several", "b"): 1}


@pytest.mark.parametrize("status", [Status.SKIPPED, Status.ERROR])
def test_drift_heads_that_did_not_answer_said_nothing(tally: Tally, status: Status) -> None:
    windows = Windows([MOOD])
    put(windows, says(MOOD, status=status))
    assert counts(tally) == {}
    put(windows, says(MOOD))  # the control: a head that abstains has answered
    assert counts(tally) == {("mood", "none"): 1}


def test_drift_a_label_called_none_is_counted_with_abstentions(tally: Tally) -> None:
    windows = Windows([make_spec(("some", "none"), name="toy")])
    put(windows, says(make_spec(name="toy"), "none"))
    put(windows, says(make_spec(name="toy")))
    assert counts(tally) == {("toy", "none"): 2}


def test_drift_is_of_the_training_data_where_the_head_knows_it(tally: Tally) -> None:
    windows = Windows([MOOD])
    put(windows, says(MOOD, "good"), times=ENOUGH // 2)
    put(windows, says(MOOD, "bad"), times=ENOUGH * 3 // 10)
    put(windows, says(MOOD), times=ENOUGH // 5)
    reference, bits = drifts(tally)["mood"]
    assert reference == "training"
    assert bits == pytest.approx(0, abs=1e-9)
    put(windows, says(MOOD, "bad"), times=3 * ENOUGH)
    assert drifts(tally)["mood"][1] > 0.1


def test_drift_is_of_the_first_answers_where_the_head_does_not(tally: Tally) -> None:
    windows = Windows([PLAIN])
    put(windows, says(PLAIN, "on"), times=ENOUGH)
    assert drifts(tally) == {"switch": ("first", 0.0)}
    put(windows, says(PLAIN, "off"), times=ENOUGH)
    reference, bits = drifts(tally)["switch"]
    shares = [0.5 ** (ENOUGH / HALF_LIFE), 1.0]
    assert reference == "first"
    assert bits == pytest.approx(divergence(np.array(shares), np.array([1.0, 0.0])))
    labels = {"head": "switch", "reference": "first"}
    assert metrics.REGISTRY.get_sample_value("nlu_head_drift", labels) == bits


def test_drift_is_not_told_of_few_answers(tally: Tally) -> None:
    windows = Windows([MOOD, PLAIN])
    put(windows, says(MOOD, "bad"), says(PLAIN, "on"), times=ENOUGH - 1)
    assert drifts(tally) == {}
    put(windows, says(MOOD, "bad"))
    assert drifts(tally).keys() == {"mood"}


def test_drift_answers_count_half_after_a_half_life() -> None:
    """Old answers fade: two half-lives later, the first ones weigh a quarter, whatever the portions."""
    window = Window(PLAIN)
    window.add(np.array([HALF_LIFE, 0, 0]))
    for _ in range(20):
        window.add(np.array([0, HALF_LIFE // 10, 0]))
    on, off, _ = window._recent
    assert on == pytest.approx(HALF_LIFE / 4)
    assert off == pytest.approx(sum(HALF_LIFE / 10 * 0.5 ** (i / 10) for i in range(20)))


def test_drift_a_new_engine_has_new_windows_and_counts_go_on(tally: Tally) -> None:
    first, second = Windows([PLAIN]), Windows([PLAIN])
    put(first, says(PLAIN, "on"), times=ENOUGH)
    assert drifts(tally) == {"switch": ("first", 0.0)}
    put(second, says(PLAIN, "off"), times=10)
    assert (
        drifts(tally) == {}
    )  # it has not said enough, and what the other engine said is not held against it
    put(second, says(PLAIN, "off"), times=ENOUGH)
    assert drifts(tally) == {"switch": ("first", 0.0)}
    assert counts(tally) == {("switch", "on"): ENOUGH, ("switch", "off"): ENOUGH + 10}


def test_drift_what_waits_is_bounded(tally: Tally) -> None:
    windows = Windows([PLAIN])
    code = windows.code([says(PLAIN, "on")])
    most = 0
    for _ in range(20_000):
        windows.put(code)
        most = max(most, len(tally._waiting))
    assert most < 5_000
    assert counts(tally) == {("switch", "on"): 20_000}


def test_drift_scrapes_lose_nothing(tally: Tally) -> None:
    """Threads read all the while; every answer is counted once."""
    windows: Sequence[Windows] = [Windows([MOOD, PLAIN]) for _ in range(2)]
    codes = [each.code([says(MOOD, "good"), says(PLAIN, "off")]) for each in windows]
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            tally.read()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=scrape) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for i in range(30_000):
            windows[i % 2].put(codes[i % 2])
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert counts(tally) == {("mood", "good"): 30_000, ("switch", "off"): 30_000}


async def test_drift_answers_given_again_count_each_time(tally: Tally, engine: Engine) -> None:
    """The same question three times: computed once, said three times; the control is an engine that keeps no answers."""
    asked = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="turn the lights on")]).SerializeToString()
    said: list[dict[tuple[str, str], int]] = []
    for kept in (2**20, 0):
        known, before = metrics.KNOWN.labels().value, counts(tally)
        async with pipeline_of(engine, Settings(answers_bytes=kept)) as pipeline:
            desk = Desk(in_flight=8, deadline_s=5, max_deadline_s=5)
            await desk.flip(pipeline)
            for _ in range(3):
                await desk.answer("Understand", asked, remaining_s=None, metadata={}, peer="")
        assert metrics.KNOWN.labels().value - known == (2 if kept else 0)
        said.append({key: count - before.get(key, 0) for key, count in counts(tally).items()})
    assert said[0] == said[1]
    assert {count for (head, _), count in said[0].items() if head in ("intent", "emotion")} == {3}
    skipped = {"followup"}  # no turn came before
    assert {head for head, _ in said[0]} == {*engine.fleet.heads} - skipped
