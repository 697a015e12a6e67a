"""How long work takes here, by what was measured, and whether more of it can be taken on in time.

A queue without such a bound never recovers from an overload: everything in it is late by the time its turn comes, and the
server is busy with answers nobody waits for. So the bound is a time and not a number, and it moves with the model, the
quota and the neighbours (SRE book, ch. 21; Little's law).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from nlu import metrics
from nlu.errors import Overloaded, TooLate

_WEIGHT = 0.1  # of the newest measurement
_MOST_AT_ONCE = (
    4.0  # a measurement counts as this many times the average at most: one stall of ten seconds is no trend,
)
# and a model that became ten times slower is still believed after nine phrases
_FORGETS = 0.99  # what is left out is not measured, so each time it counts for less, until it is tried again
_WINDOW = 64  # newest measurements behind the 95th percentile
_WINDOW_S = 5.0  # and none older than this
_STALE_S = 1.0  # an idle server that measured nothing for so long takes one request on to measure it
_AT_FIRST_S = 0.005  # until something was measured
_TURN_S = 0.002  # of one turn of the event loop; what everybody else then waits longer


class Average:
    """An exponential average in seconds that one outlier does not carry away. 0 until something was measured."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def observe(self, seconds: float) -> None:
        """Take a measurement in."""
        if not self.seconds:
            self.seconds = seconds
        else:
            self.seconds += _WEIGHT * (min(seconds, _MOST_AT_ONCE * self.seconds) - self.seconds)

    def forget(self) -> None:
        """Trust it a little less."""
        self.seconds *= _FORGETS


class Admission:
    """Of one queue in front of `workers` that take phrases from it. Only the event loop's thread may touch it."""

    def __init__(self, *, workers: int, queue_s: float, lag_s: Callable[[], float]) -> None:
        """`queue_s` is how long a phrase may wait; `lag_s` says how late the event loop itself is."""
        self._workers, self._queue_s, self._lag_s = workers, queue_s, lag_s
        self._one = Average(_AT_FIRST_S)
        self._newest: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # (when, seconds of a run)
        self._measured = time.monotonic()
        self.p95_s = _AT_FIRST_S  # of one run of the model

    @property
    def service_s(self) -> float:
        """Average time of one phrase on one worker."""
        return self._one.seconds

    def observe(self, seconds: float, phrases: int) -> None:
        """A run of the model over so many phrases took so long."""
        now = self._measured = time.monotonic()
        if not self._newest:
            self._one = Average()  # whatever was measured is better than the guess
        self._one.observe(seconds / phrases)
        self._newest.append((now, seconds))
        while self._newest[0][0] < now - _WINDOW_S:
            self._newest.popleft()
        times = sorted(taken for _, taken in self._newest)
        self.p95_s = times[int(0.95 * (len(times) - 1))]
        metrics.SERVICE_SECONDS.set(self._one.seconds)

    def wait_s(self, phrases: int) -> float:
        """When the last of so many phrases, queued and running ones included, is expected to be done, from now."""
        return self._lag_s() + phrases * self._one.seconds / self._workers

    def admit(self, ahead: int, wanted: int, remaining_s: float) -> None:
        """Return where `wanted` phrases behind `ahead` others will be done in the time there is; else raise.

        Overloaded where a pause, or another server, may help; TooLate where the time would not do even without a queue.
        """
        if not self._newest or (not ahead and time.monotonic() - self._measured > _STALE_S):
            return  # nothing to go by; or too old: a wrong estimate that refuses everything could never be put right
        one, lag = self._one.seconds, self._lag_s()
        wait = self.wait_s(ahead + wanted)
        idle = ahead < self._workers
        # What finds a worker idle waits for nobody, and takes nobody's turn if it fails.
        if wait > self._queue_s and (not idle or lag > self._queue_s):
            metrics.SHED.labels("lag" if lag > self._queue_s else "queue").inc()
            raise Overloaded(
                f"{1000 * wait:.0f} ms of work are waiting already", retry_after_ms=pause_ms(wait)
            )
        alone = max(one, wanted * one / self._workers)
        needed = lag + alone if idle else self.wait_s(ahead + wanted - 1) + self.p95_s
        if remaining_s >= needed:
            return
        metrics.SHED.labels("deadline").inc()
        if remaining_s < alone:
            raise TooLate(f"{1000 * remaining_s:.0f} ms are left, and the answer takes {1000 * alone:.0f}")
        raise Overloaded(
            f"{1000 * wait:.0f} ms of work are waiting already, more than the deadline leaves",
            retry_after_ms=pause_ms(wait),
        )


def pause_ms(seconds: float) -> int:
    """The pause to ask of a refused caller: not before that time, and not all callers at once."""
    return max(1, round(1000 * seconds * random.uniform(1.0, 1.5)))


class Turns:
    """Lets nobody keep the event loop to themselves: work that must be done on it, in pieces, a few milliseconds a turn.

    A text that has to be composed anew takes up to 2 ms, and a request may have hundreds; plain ones cost nothing here.
    """

    def __init__(self) -> None:
        self._spent_s = 0.0

    async def mine(self) -> None:
        """Wait for a turn that is not spent yet."""
        while self._spent_s > _TURN_S:
            await asyncio.sleep(0)

    def spend(self, seconds: float) -> None:
        """A piece of work took so much of this turn."""
        if not self._spent_s:
            asyncio.get_running_loop().call_soon(self._next)
        self._spent_s += seconds

    def _next(self) -> None:
        self._spent_s = 0.0


class Costs:
    """What the stages of an answer cost, by what was measured."""

    def __init__(self) -> None:
        self._stages: dict[str, Average] = {}

    def observe(self, stage: str, seconds: float) -> None:
        """It was run, and took so long."""
        known = self._stages.get(stage)
        if known is None:
            known = self._stages[stage] = Average()
        known.observe(seconds)

    def left(self, stage: str) -> None:
        """It was left out, and so not measured."""
        self._stages[stage].forget()

    def left_out(self, stages: Collection[str], drops: Sequence[str], time_s: float) -> frozenset[str]:
        """Which of `drops`, first to last, to leave out so that the rest of these stages fits into the time."""
        costs = {name: self._stages[name].seconds for name in stages if name in self._stages}
        total = sum(costs.values())
        if total <= time_s:
            return frozenset()
        out = []
        for name in drops:
            if name in costs:
                out.append(name)
                total -= costs[name]
            if total <= time_s:
                break
        return frozenset(out)
