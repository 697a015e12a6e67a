"""Looks, many times a second, whether the event loop comes round in time and whether the vectorizer's threads come back.

How late the loop is goes into admission; threads that are stuck are replaced; and where that does not help either the
process says that it is not alive, so that the platform starts another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from nlu import metrics
from nlu.batcher import Batcher

logger = logging.getLogger(__name__)

LOOK_S = 0.05
_LATE_LOOKS = (
    4  # in a row make a lag; a loop that was held up once, by a load or a collection, catches up at once
)
FRUITLESS = (
    3  # so many replacements in a row with nothing computed in between: it is not a thread, it is the process
)


class Watchdog:
    """One process's, on its event loop: `run` is a task that ends when cancelled."""

    def __init__(self) -> None:
        self.batchers: set[Batcher] = set()  # add what is to be looked after, discard what was closed
        self.lag_s = 0.0  # how late the loop has been at every one of the last looks
        self._late_s: deque[float] = deque([0.0] * _LATE_LOOKS, maxlen=_LATE_LOOKS)

    @property
    def healthy(self) -> bool:
        """What liveness says. It asks nothing of Redis, stores or bundles: starting again would not mend those."""
        return all(batcher.fruitless < FRUITLESS for batcher in self.batchers)

    async def run(self) -> None:
        """Look until cancelled. Nothing that goes wrong here ends it."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LOOK_S)
            passed = time.monotonic() - began
            try:
                self._look(passed)
            except Exception:
                logger.exception("the watchdog failed to look; it goes on")

    def _look(self, passed: float) -> None:
        late_s = max(0.0, passed - LOOK_S)
        self._late_s.append(late_s)
        self.lag_s = min(self._late_s)
        metrics.LOOP_LAG.set(late_s)
        for batcher in tuple(self.batchers):
            batcher.look(min(passed, 2 * LOOK_S))
        metrics.HEALTHY.set(self.healthy)
