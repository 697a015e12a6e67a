"""A token bucket: so many a second, and no more than so many at once."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECOND = 10**9


class Bucket:
    """Full at first. The count is of whole billionths, so nothing is lost to rounding however often it is asked.

    Of one thread.
    """

    def __init__(self, rate: int, burst: int, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.rate, self.burst = rate, burst
        self._clock_ns = clock_ns
        self._level = burst * _SECOND
        self._seen = clock_ns()

    def take(self, count: int = 1, *, had: int = 0) -> int:
        """Take `count` and return 0, or take none and return the milliseconds until they would be there.

        More than `burst` are never there at once: they are had from a full bucket, which then owes the rest. `had` of the
        count were taken before, and are not given back; whoever waits as long as they are told has all of them then.
        """
        now = self._clock_ns()
        # `rate` a second is `rate` billionths a nanosecond.
        self._level = min(self.burst * _SECOND, self._level + (now - self._seen) * self.rate)
        self._seen = now
        missing = min(count, self.burst) * _SECOND - self._level
        if missing > had * _SECOND:
            return -(-missing // (self.rate * 1_000_000))
        self._level -= (count - had) * _SECOND
        return 0
