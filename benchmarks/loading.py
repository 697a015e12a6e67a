"""Does loading an index ever hold more than the index, and how long until the first answer?

    python -m benchmarks.loading [--save] [--rows 660000]

The index of benchmarks/retrieval.py, cut into 4, 16 and 64 shards. Each is loaded by a process of its own, which tells
its peak of resident memory while loading and what stays. The control loads as people do without thinking: the whole
file into an array, and the array into FAISS. Pages that Python and its libraries take are in both figures.

Time to the first answer (checks, tables and search included) is set against reading the same files and no more, both
with nothing of them in the page cache, and once more with everything in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.result import at_least, at_most, emit
from index.build import Shards
from index.layout import read_layout, shard_name
from index.replies import Replies

FOLDER = Path(".cache/retrieval")
SHARDS = (4, 16, 64)


def main() -> None:
    """Cut, load in processes of their own, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--rows", type=int, default=660_000)
    parser.add_argument("--load", choices=["ours", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.load:
        print(json.dumps(ours(chosen.folder) if chosen.load == "ours" else whole(chosen.folder)))
        return
    figures: dict[str, float] = {}
    bars = []
    for count in SHARDS:
        folder = cut(FOLDER / str(chosen.rows), count)
        for how in ("ours", "whole"):
            told = _process(how, folder)
            figures |= {f"{how}_{count}_{name}": value for name, value in told.items()}
        figures |= {f"ours_{count}_{name}": value for name, value in _times(folder).items()}
        bars.append(at_most(f"peak over steady, {count} shards", figures[f"ours_{count}_peak_ratio"], 1.10))
    bars += [
        at_least(
            f"control: peak over steady, whole index, {count} shards",
            figures[f"whole_{count}_peak_ratio"],
            1.10,
        )
        for count in SHARDS
    ]
    emit("loading", figures, bars)


def cut(folder: Path, count: int) -> Path:
    """The same index in so many shards."""
    out = folder / f"index-{count}"
    if (out / "index.json").exists():
        return out
    out.mkdir(exist_ok=True)
    layout = read_layout(folder / "index")
    shard_rows = -(-layout.rows // count // 128) * 128 if layout.rows >= 128 * count else 8
    shards = Shards(out, layout.dim, shard_rows, shard_name)
    first = 0
    for shard in layout.shards:
        rows = np.fromfile(folder / "index" / shard.file, "<f2").reshape(shard.rows, -1)
        shards.add(rows[:, : layout.dim].astype(np.float32), first_row=first)
        first += shard.rows
    for file in ("items.arrow",):
        os.link(folder / "index" / file, out / file)
    layout.model_copy(update={"shard_rows": shard_rows, "shards": tuple(shards.close())}).save(out)
    return out


def ours(folder: Path) -> dict[str, float]:
    """Load and answer once, as the server does."""
    _reset_peak()
    before = _resident("VmRSS")
    began = time.perf_counter()
    replies = Replies.load(folder)
    loaded = time.perf_counter()
    peak, steady = _resident("VmHWM"), _resident("VmRSS")
    query = np.ones(replies.dim, np.float32)
    replies.search(query, 10, persona=None, surface=None, as_of=datetime.now(UTC))
    answered = time.perf_counter()
    return {
        "peak_mb": peak / 1e6, "steady_mb": steady / 1e6, "before_mb": before / 1e6, "peak_ratio": peak / steady,
        "load_s": loaded - began, "first_answer_s": answered - began,
    }  # fmt: skip


def whole(folder: Path) -> dict[str, float]:
    """The control: everything read, then everything copied into FAISS."""
    import faiss

    layout = read_layout(folder)
    _reset_peak()
    rows = np.concatenate([np.fromfile(folder / shard.file, np.uint8) for shard in layout.shards])
    flat = faiss.IndexScalarQuantizer(
        layout.padded, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    faiss.copy_array_to_vector(rows, flat.codes)
    flat.ntotal = layout.rows
    peak = _resident("VmHWM")
    del rows
    steady = _resident("VmRSS")
    return {"peak_mb": peak / 1e6, "steady_mb": steady / 1e6, "peak_ratio": peak / steady}


def _times(folder: Path) -> dict[str, float]:
    """Seconds to the first answer and of reading the files alone, without and with the page cache."""
    files = sorted(folder.iterdir())
    figures = {}
    for how in ("cold", "warm"):
        if how == "cold":
            _drop(files)
        began = time.perf_counter()
        for file in files:
            _read(file)
        figures[f"read_{how}_s"] = time.perf_counter() - began
        if how == "cold":
            _drop(files)
        figures[f"first_answer_{how}_s"] = _process("ours", folder)["first_answer_s"]
        figures[f"first_answer_over_read_{how}"] = figures[f"first_answer_{how}_s"] / figures[f"read_{how}_s"]
    return figures


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as source:
        buffer = bytearray(1 << 20)
        while source.readinto(buffer):
            pass


def _drop(files: Sequence[Path]) -> None:
    """Let the system forget what it cached of these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _process(how: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--load", how, "--folder", str(folder)]
    told: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return told


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
