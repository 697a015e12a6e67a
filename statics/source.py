"""The store for as long as one pull lasts: the deadline, the rates, and what is tried again."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from statics import disk
from statics.errors import StoreUnavailable
from statics.store import Store

log = logging.getLogger(__name__)

TRIES = (
    4  # of one object, where the store fails for a moment; a store may have repeated its requests before that
)
PAUSE_S = 0.25  # before the second try at most, and twice as long before each further one
SLOWEST = 1_000_000  # bytes/s that all streams of a pull must bring together ...
PATIENCE_S = 10.0  # ... once we have waited this long for one of them

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock, looked at before each request and after each piece of a stream."""

    end: float
    limit_s: float

    @classmethod
    def after(cls, limit_s: float) -> "Deadline":
        return cls(time.monotonic() + limit_s, limit_s)

    def check(self, part: str) -> None:
        self.wait(0.0, part)

    def wait(self, seconds: float, part: str) -> None:
        """Sleep; StoreUnavailable at once where that would last too long."""
        if time.monotonic() + seconds >= self.end:
            raise StoreUnavailable(
                part=part,
                found=f"a pull still running after {self.limit_s:g} s",
                expected=f"one that ends within {self.limit_s:g} s",
                remedy="look at the network and the store, or allow more time",
            )
        if seconds > 0:
            time.sleep(seconds)


class Source:
    """A store, as one pull may use it; the threads of the pull share it, and its limits.

    `bytes_s` is the rate that is not exceeded (0: none); `retries` counts what was tried again.
    """

    def __init__(self, store: Store, *, deadline_s: float, bytes_s: int = 0) -> None:
        self.store, self.bytes_s = store, bytes_s
        self.deadline = Deadline.after(deadline_s)
        self.retries = 0
        self._lock = threading.Lock()
        self._streams = 0
        self._due = 0.0  # when all bytes so far should have come, at the rate allowed

    @contextmanager
    def open(self, key: str, offset: int = 0) -> Iterator[Iterator[bytes]]:
        self.deadline.check(key)
        with self.store.open(key, offset) as chunks, self._counted():
            yield self._watched(chunks, key)

    def read(self, key: str, limit: int) -> bytes:
        with self.open(key) as chunks:
            return disk.collect(chunks, key, limit)

    def again(self, work: Callable[[], Answer], key: str) -> Answer:
        """What `work` returns, tried TRIES times while the store is unavailable.

        Pauses grow and are drawn at random, so that many pods do not come back at one moment (full jitter, as in
        M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).
        """
        for number in range(1, TRIES):
            try:
                return work()
            except StoreUnavailable as error:
                log.warning("try %d of %d failed: %s", number, TRIES, error)
                self.deadline.wait(random.uniform(0.0, PAUSE_S * 2 ** (number - 1)), key)
            with self._lock:
                self.retries += 1
        return work()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def _watched(self, chunks: Iterator[bytes], key: str) -> Iterator[bytes]:
        """The stream, not above the rate allowed; StoreUnavailable where it drips, or lasts beyond the deadline."""
        waited, seen = 0.0, 0  # for the store alone: neither the disk nor our own limit makes a stream slow
        while True:
            asked = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            waited, seen = waited + time.monotonic() - asked, seen + len(chunk)
            if waited >= PATIENCE_S:
                self._check_rate(seen / waited, key)
                waited, seen = 0.0, 0
            self.deadline.wait(self._excess(len(chunk)), key)
            yield chunk

    def _check_rate(self, rate: float, key: str) -> None:
        share = SLOWEST / self._streams
        if rate < share:
            raise StoreUnavailable(
                part=key,
                found=f"{rate:.0f} bytes/s over {PATIENCE_S:g} s",
                expected=f"{share:.0f} bytes/s or more",
                remedy="look at the network and the store",
            )

    def _excess(self, size: int) -> float:
        """Seconds that these bytes came too early."""
        if not self.bytes_s:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now) + size / self.bytes_s
            return self._due - now
