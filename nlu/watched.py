"""Files of the deployment that may change while we run: certificates, callers. A broken new one changes nothing."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Literal, TypeVar

from nlu import metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 1.0  # a change is seen after this long at most; looking takes microseconds a file

_renewing = threading.Lock()  # gRPC asks from threads of its own; one for all, as the counters are shared


class Watched(Generic[T]):
    """What `read` made of some files. Whoever asks, looks: there is no thread, and an idle process reads nothing.

    `read` raises ValueError or OSError for files it will not take: from the constructor as they are, and later as one
    line in the log for each such change, while the value stays. Any thread may call `now`.
    """

    def __init__(
        self,
        what: Literal["tls", "callers"],
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._paths, self._read, self._clock = what, paths, read, clock
        self._stamp = self._look()  # taken before reading, so that a change while we read is seen next time
        self._value = read()
        self._next = clock() + LOOK_S

    def now(self) -> T:
        """The newest value that could be read."""
        now = self._clock()
        if now >= self._next:
            with _renewing:
                self._next = now + LOOK_S
                self._renew()
        return self._value

    def _renew(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._read()
        except (ValueError, OSError) as error:
            metrics.RELOADS.labels(self._what, "refused").inc()
            logger.error("%s: changed, but what was read before stays: %s", self._what, error)
        else:
            metrics.RELOADS.labels(self._what, "ok").inc()
            logger.info("%s: changed and read again", self._what)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Which file this is and when it was written; a link is followed, as mounted secrets are changed by moving one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
