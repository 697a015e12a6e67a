"""nlu.watchdog on a real event loop: lag is measured, threads that hang are replaced, and a process that is lost says so."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from annotators.annotator import Encoding
from nlu import batcher as batchers
from nlu.batcher import Batcher
from nlu.errors import Draining, Overloaded, Stuck
from nlu.watchdog import FRUITLESS, Watchdog

FAR = time.monotonic() + 3600


class Model:
    """Hangs on phrases that say so, until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        if "hang" in phrases:
            self.open.wait(20)
        return [Encoding(np.zeros(2, np.float32)) for _ in phrases]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")


@pytest.fixture
async def watchdog() -> AsyncIterator[Watchdog]:
    """One that looks."""
    made = Watchdog()
    looking = asyncio.create_task(made.run())
    yield made
    looking.cancel()


@pytest.fixture
async def batcher(watchdog: Watchdog) -> AsyncIterator[Batcher]:
    """One that is looked after, over a model that may hang."""
    model = Model()
    made = Batcher(model, workers=1, limit=10, queue_s=0.1, lag_s=lambda: watchdog.lag_s)
    watchdog.batchers.add(made)
    yield made
    model.open.set()
    watchdog.batchers.discard(made)
    await made.close()


async def say(batcher: Batcher, phrase: str) -> Encoding:
    return await asyncio.wait_for(batcher.submit([phrase], tokens=False, deadline=FAR)[0].future, 20)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are given up after a fifth of a second."""
    monkeypatch.setattr(batchers, "STUCK_S", 0.2)


async def test_watchdog_replaces_a_thread_that_hangs(
    hasty: None, watchdog: Watchdog, batcher: Batcher
) -> None:
    with pytest.raises(Stuck):
        await say(batcher, "hang")
    assert watchdog.healthy
    await say(batcher, "go on")
    assert batcher.replaced == 1


async def test_watchdog_says_that_the_process_is_lost_where_replacing_helps_nothing(
    hasty: None, watchdog: Watchdog, batcher: Batcher
) -> None:
    for _ in range(FRUITLESS):
        assert watchdog.healthy
        with pytest.raises(Stuck):
            await say(batcher, "hang")
    assert not watchdog.healthy


async def test_watchdog_a_phrase_that_is_computed_begins_the_count_anew(
    hasty: None, watchdog: Watchdog, batcher: Batcher
) -> None:
    for _ in range(FRUITLESS + 1):
        with pytest.raises(Stuck):
            await say(batcher, "hang")
        await say(batcher, "go on")
    assert watchdog.healthy


async def test_watchdog_starts_a_loop_that_ended(watchdog: Watchdog, batcher: Batcher) -> None:
    batcher._loops[0].cancel()
    try:
        await say(batcher, "a")
    except Draining:  # it was the last that this loop took
        await say(batcher, "b")
    assert batcher.replaced == 1


async def test_watchdog_measures_a_loop_that_is_late_again_and_again(watchdog: Watchdog) -> None:
    await asyncio.sleep(0.2)
    assert watchdog.lag_s < 0.15  # the control
    for _ in range(5):
        time.sleep(0.3)  # a loop that is held up
        await asyncio.sleep(0.01)
    assert watchdog.lag_s >= 0.15


async def test_watchdog_takes_one_delay_for_no_trend(watchdog: Watchdog) -> None:
    """A bundle is loaded, or garbage collected: nobody needs to be refused for that."""
    for _ in range(3):
        await asyncio.sleep(0.2)
        time.sleep(0.5)
        await asyncio.sleep(0.01)
        assert watchdog.lag_s < 0.3


async def test_watchdog_lag_is_shed_and_forgotten(watchdog: Watchdog, batcher: Batcher) -> None:
    await say(batcher, "a")
    for _ in range(5):
        time.sleep(0.3)
        await asyncio.sleep(0.01)
    batcher.admission.observe(
        0.001, 1
    )  # just now: an idle server that measured nothing for a second tries one
    with pytest.raises(Overloaded):
        await say(batcher, "b")
    for _ in range(100):
        await asyncio.sleep(0.05)
        if watchdog.lag_s < 0.05:
            break
    await say(batcher, "c")


async def test_watchdog_a_process_that_was_stopped_has_no_stuck_threads(
    watchdog: Watchdog, batcher: Batcher
) -> None:
    """The clock went on and nobody lived: one look later six seconds are no reason to give up a thread."""
    hanging = asyncio.create_task(say(batcher, "hang"))
    await asyncio.sleep(0.1)
    time.sleep(batchers.STUCK_S + 1.0)
    await asyncio.sleep(0.2)
    assert batcher.replaced == 0
    hanging.cancel()


async def test_watchdog_goes_on_after_a_look_that_failed(
    hasty: None,
    watchdog: Watchdog,
    batcher: Batcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.watchdog")

    def broken(seconds: float) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(batcher, "look", broken)
    await asyncio.sleep(0.2)
    monkeypatch.undo()
    monkeypatch.setattr(batchers, "STUCK_S", 0.2)
    with pytest.raises(Stuck):
        await say(batcher, "hang")
