"""docs/reliability.md, written from the kept results of the full run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"


class Part(TypedDict):
    """What one part of the run gave."""

    figures: dict[str, float]
    bars: list[dict[str, Any]]
    timed: list[dict[str, Any]]
    skipped: list[str]
    seconds: float
    git: str
    machine: Any


TITLES = {
    "swaps": "Hot swaps under load",
    "kills": "SIGKILL at random moments of pulls and swaps",
    "mutations": "Spoilt bundles",
    "overload": "More calls than can be answered",
    "caches": "Redis in trouble",
    "stores": "The store of releases in trouble",
    "hostile": "Hostile texts and bytes",
    "endings": "Cancelled calls and SIGTERM",
    "doors": "Doors that must stay closed",
}


def keep(path: Path, name: str, part: Part) -> None:
    """Put one part's result in the place of the one before."""
    parts: dict[str, Part] = json.loads(path.read_text())["parts"] if path.exists() else {}
    kept = {"benchmark": "chaos", "parts": {**parts, name: part}}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def write(path: Path, docs: Path = DOCS) -> None:
    """The page."""
    parts: dict[str, Part] = json.loads(path.read_text())["parts"]
    lines = [
        "# Reliability: what is promised, and what was measured",
        "",
        "Written by `python -m benchmarks.chaos --save`; do not edit. Real processes: `nlu serve`, redis-server, two",
        "S3 servers behind a proxy that does what bad networks do, callers in a process of their own. How each part",
        "works is told at the top of its file in benchmarks/chaos/. A row without a tick is a promise not kept.",
    ]
    for name, title in TITLES.items():
        if name in parts:
            lines += ["", f"## {title}", "", *_table(parts[name]), "", *_figures(parts[name])]
    docs.write_text("\n".join(lines) + "\n")


def _table(part: Part) -> list[str]:
    rows = ["| | promised | measured | kept |", "|---|---|---|---|"]
    for bar in [*part["bars"], *part["timed"]]:
        least = bar["value"] >= bar["bar"] if bar["holds"] else bar["value"] < bar["bar"]
        sign = "=" if bar["value"] == bar["bar"] and bar["holds"] else ("≥" if least else "≤")
        rows.append(
            f"| {bar['name']} | {sign} {_number(bar['bar'])} | {_number(bar['value'])} | {'✓' if bar['holds'] else ''} |"
        )
    return rows


def _figures(part: Part) -> list[str]:
    machine = part["machine"]
    told = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in part["figures"].items())
    lines = [
        f"Also measured: {told}.",
        "",
        f"{part['seconds']:.0f} s at {part['git']} on {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}.",
    ]
    if part["skipped"]:
        lines += ["", "Not run here: " + "; ".join(part["skipped"]) + "."]
    return lines


def _number(value: float) -> str:
    if value in (float("inf"), float("-inf")):
        return "never"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"
