"""Does the service keep its promises when things go wrong? Real processes, real faults, one JSON object.

    python -m benchmarks.chaos [--fast] [--only PART ...] [--save]

The parts: mutations, kills, swaps, overload, caches, stores, hostile, endings, doors. `--fast` takes under three minutes
and is part of the tests; without it the run takes about an hour, and `--save` keeps each part's result as it ends and
writes docs/reliability.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.chaos import page
from benchmarks.chaos.rig import Rig
from benchmarks.chaos.section import Section
from benchmarks.result import record

PARTS = ("mutations", "kills", "swaps", "overload", "caches", "stores", "hostile", "endings", "doors")
RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str]) -> int:
    """Run the parts; exit status 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="one case of each family")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--save", action="store_true", help="keep results, write docs/reliability.md")
    asked = parser.parse_args(arguments)
    parts = {}
    for name in asked.only:
        parts[name] = run_part(name, fast=asked.fast)
        if asked.save and not asked.fast:
            page.keep(RESULTS / "chaos.json", name, parts[name])
    if asked.save and not asked.fast:
        page.write(RESULTS / "chaos.json")
    broken = {
        "bars": [
            f"{name}: {bar['name']}"
            for name, part in parts.items()
            for bar in part["bars"]
            if not bar["holds"]
        ],
        "timed": [
            f"{name}: {bar['name']}"
            for name, part in parts.items()
            for bar in part["timed"]
            if not bar["holds"]
        ],
    }
    print(json.dumps({"benchmark": "chaos", "fast": asked.fast, "parts": parts, "broken": broken}))
    return 1 if any(broken.values()) else 0


def run_part(name: str, *, fast: bool) -> page.Part:
    """One part, with processes and a folder of its own."""

    def say(what: str) -> None:
        print(f"[{name} {time.monotonic() - began:6.1f} s] {what}", file=sys.stderr, flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as work:
        with Rig(Path(work)) as rig:
            section = Section(name, fast, rig, say)
            importlib.import_module(f"benchmarks.chaos.{name}").run(section)
    bars = [*section.bars, *section.timed]
    for bar in bars:
        if not bar.holds:
            say(f"NOT KEPT: {bar.name}: {bar.value:g}, promised {bar.bar:g}")
    say(f"{sum(bar.holds for bar in bars)} of {len(bars)} promises kept")
    about = record(name, section.figures, bars)
    return {
        "figures": section.figures,
        "bars": [asdict(bar) for bar in section.bars],
        "timed": [asdict(bar) for bar in section.timed],
        "skipped": section.skipped,
        "seconds": round(time.monotonic() - began, 1),
        "git": str(about["git"]),
        "machine": about["machine"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
