"""What the heads say, counted by label, and how far that is from what they said of their training data.

A call only puts down what was said, as a few bytes; these are counted when some thousands have come together, or when
Prometheus asks. An answer given again carries the bytes of its first time, so it counts at the price of one append.
"""

from __future__ import annotations

import threading
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Status
from annotators.head import Spec
from annotators.prior import NONE, said
from nlu import metrics

HALF_LIFE = 10_000  # labels a head says after which one counts half
ENOUGH = (
    1_000  # labels a head must have said before its drift is told: among fewer, chance alone looks like drift
)
_WAITING = 4_096  # answers put down and not counted yet; more are counted at once

_SPOKE = (Status.OK, Status.DEGRADED)


class Drift(NamedTuple):
    """How far what a head says lately is from what it is held against."""

    head: str
    reference: str  # "training"; "first" where the head does not know its training: what it said here first
    bits: float  # Jensen-Shannon divergence: 0 the same shares, 1 nothing in common


class Window:
    """What one head said lately: counts by label, each worth half after HALF_LIFE more."""

    def __init__(self, spec: Spec) -> None:
        self.head = spec.name
        self.labels = [*spec.labels, *(() if NONE in spec.labels else (NONE,))]
        prior = spec.prior or {}
        self._trained = bool(prior)
        self._reference = np.array([prior.get(label, 0.0) for label in self.labels])  # [labels]
        self._recent = np.zeros(len(self.labels))
        self._said = 0

    def add(self, counts: NDArray[np.int64]) -> None:
        """Count what was said next, [labels]."""
        count = int(counts.sum())
        if not self._trained and self._said < ENOUGH:
            self._reference += counts
        self._recent = self._recent * 0.5 ** (count / HALF_LIFE) + counts
        self._said += count

    def drift(self) -> Drift | None:
        """None where the head has not said enough yet."""
        if self._said < ENOUGH:
            return None
        reference = "training" if self._trained else "first"
        return Drift(self.head, reference, divergence(self._recent, self._reference))


class Windows:
    """A window for each head of one engine. A new engine has new ones; memory is bounded by the labels."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self.windows = [Window(spec) for spec in specs]
        self._numbers: dict[
            str, dict[str, int]
        ] = {}  # head -> label -> its number among all labels of all heads
        self._size = 0
        for window in self.windows:
            self._numbers[window.head] = {label: self._size + i for i, label in enumerate(window.labels)}
            self._size += len(window.labels)

    def code(self, annotations: Iterable[Annotation]) -> bytes:
        """What one answer said, as the numbers of its labels; heads that were skipped or failed said nothing."""
        numbers = [
            self._numbers[annotation.name].get(label, -1)
            for annotation in annotations
            if annotation.status in _SPOKE
            for label in said(annotation)
        ]
        return array("i", [number for number in numbers if number >= 0]).tobytes()

    def put(self, code: bytes) -> None:
        """An answer with this code was given. Only the event loop's thread may call this."""
        TALLY.put(self, code)

    def add(self, codes: Sequence[bytes]) -> list[tuple[str, str, int]]:
        """Count answers; how often each head said each label that occurs among them."""
        counts = np.bincount(np.frombuffer(b"".join(codes), np.intc), minlength=self._size)
        found, start = [], 0
        for window in self.windows:
            mine = counts[start : start + len(window.labels)]
            start += len(window.labels)
            window.add(mine)
            found += [(window.head, window.labels[i], int(mine[i])) for i in np.flatnonzero(mine)]
        return found


class Tally:
    """All that was said in this process, whichever engine said it, and the drift of the one that answered last."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Windows, bytes]] = deque()
        self._totals: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._live: Windows | None = None
        self._lock = threading.Lock()  # a scrape counts on another thread than the event loop's

    def put(self, windows: Windows, code: bytes) -> None:
        """Put down what an answer said."""
        self._waiting.append((windows, code))
        # Where a scrape has the lock it is counting already: the event loop does not wait for it.
        if len(self._waiting) >= _WAITING and self._lock.acquire(blocking=False):
            try:
                self._count()
            finally:
                self._lock.release()

    def read(self) -> tuple[dict[tuple[str, str], int], list[Drift]]:
        """How often each head said each label, and the drift of each head; from any thread."""
        with self._lock:
            self._count()
            drifts = [] if self._live is None else [window.drift() for window in self._live.windows]
            return dict(self._totals), [drift for drift in drifts if drift is not None]

    def _count(self) -> None:
        answers: defaultdict[Windows, list[bytes]] = defaultdict(list)
        for _ in range(len(self._waiting)):
            self._live, code = self._waiting.popleft()
            answers[self._live].append(code)
        for windows, codes in answers.items():
            for head, label, count in windows.add(codes):
                self._totals[head, label] += count


def divergence(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two distributions, given as counts [labels], in bits (Lin, "Divergence measures based
    on the Shannon entropy", IEEE Trans. Inf. Theory 37, 1991): the entropy of their mixture less the mean of theirs."""
    shares = np.stack([one / one.sum(), other / other.sum()])
    return max(0.0, _entropy(shares.mean(axis=0)) - (_entropy(shares[0]) + _entropy(shares[1])) / 2)


def _entropy(shares: NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())


TALLY = Tally()
metrics.HEADS.watch(TALLY.read)
