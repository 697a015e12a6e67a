"""From a file of labelled phrases to a head in a bundle: how long does it take, and what must a pod pull?

    python -m benchmarks.sprint [--data ../shared/data] [--save]

`nlu heads train` as a process of its own on CLINC150 (150 intents, 15,000 phrases, and out of scope), report included, with
an empty store of vectors and again with the one the first run filled; then `nlu heads add` to the shipped bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result import at_most, emit
from nlu.settings import shipped_bundle


def main() -> None:
    """Train twice, add, diff; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the public sets lie")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    folder = (parser.parse_args().data / "clinc150").resolve()
    if not folder.is_dir():
        sys.exit(
            f"benchmarks.sprint: found no {folder}, expected the set CLINC150; name its place with --data"
        )
    splits = [
        part
        for split in ("train", "dev", "test")
        for part in (_option(split), str(folder / f"{split}.tsv.gz"))
    ]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        train = ["heads", "train", *splits, "--name", "clinc", "--store", "vectors", "--json"]
        for run in ("cold", "warm"):
            seconds, cpu, report = _nlu([*train, "--out", run], Path(work))
            figures |= {f"{run}_s": seconds, f"{run}_cpu_s": cpu}
            figures |= {
                f"{run}_{part}_s": value for part, value in report["seconds"].items() if part != "total"
            }
        _, _, added = _nlu(["heads", "add", "warm", "--out", "bundle", "--json"], Path(work))
    figures |= {
        "head_bytes": report["head"]["bytes"],
        "bytes_to_pull": added["bytes_to_pull"],
        "accuracy": report["summary"]["accuracy"]["value"],
        "ece": report["summary"]["ece_after"],
    }
    bars = [
        at_most("seconds with an empty store", figures["cold_s"], 60),
        at_most("seconds with a warm store", figures["warm_s"], 10),
        at_most("seconds with a warm store, as the design wishes", figures["warm_s"], 5),
        at_most("MB that a pod pulls", figures["bytes_to_pull"] / 1e6, 1),
    ]
    emit("sprint", figures, bars, bundle=shipped_bundle().name)


def _option(split: str) -> str:
    return "--data" if split == "train" else f"--{split}"


def _nlu(arguments: list[str], cwd: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds on the clock and of CPU of one command, and the object it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "nlu", *arguments], cwd=cwd, env=clean, stdout=subprocess.PIPE, text=True, check=False
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"benchmarks.sprint: nlu {' '.join(arguments)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = json.loads(done.stdout)
    return seconds, cpu, found


if __name__ == "__main__":
    main()
