"""What one part of the whole gives: figures, promises kept or not, and how it was done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.chaos.rig import Rig
from benchmarks.result import Bar

Say = Callable[[str], None]


@dataclass
class Section:
    """Filled while it runs; `figures` and `bars` are what is printed, `about` says what the numbers are of."""

    name: str
    fast: bool
    rig: Rig
    say: Say
    figures: dict[str, float] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    timed: list[Bar] = field(
        default_factory=list
    )  # promises about time, which a busy machine breaks without a bug
    skipped: list[str] = field(default_factory=list)  # what this machine cannot do, and why
    began: float = field(default_factory=time.monotonic)

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def scale(self, full: int, fast: int) -> int:
        """How many, by tier."""
        return fast if self.fast else full
