"""The last line every benchmark prints: figures, the bars that were promised, and where it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from statics.version import service_version


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise and whether this run kept it."""

    name: str
    value: float
    bar: float
    holds: bool


def at_most(name: str, value: float, bar: float) -> Bar:
    """A promise kept by staying at or under the bar."""
    return Bar(name, round(value, 4), bar, value <= bar)


def at_least(name: str, value: float, bar: float) -> Bar:
    """A promise kept by reaching the bar."""
    return Bar(name, round(value, 4), bar, value >= bar)


def record(name: str, figures: dict[str, float], bars: list[Bar], **about: str) -> dict[str, object]:
    """The one JSON object."""
    return {
        "benchmark": name,
        "figures": {figure: round(value, 4) for figure, value in figures.items()},
        "bars": [asdict(bar) for bar in bars],
        "git": _git(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "service": service_version(),
        **about,
    }


def emit(name: str, figures: dict[str, float], bars: list[Bar], **about: str) -> None:
    """Print the one JSON object, and keep it under benchmarks/results/ when asked to by --save."""
    line = json.dumps(record(name, figures, bars, **about))
    if "--save" in sys.argv:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(line + "\n")
    print(line)


def _git() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
