"""How fast is the exact search on a GPU, and what share of its memory bandwidth does it use?

    python -m benchmarks.gpu [--save] [--rows 660000 6600000]

Rows are random and of unit length, since an exact scan takes the same time over any. One query at a time and 64 at once,
through the same code that serves (`index/gpu.py`), answers compared with the CPU's. The bandwidth is that of a copy on the
device by torch. Where there is no GPU, or no torch for it, that is what the result says.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.result import Bar, at_least, emit
from index.gpu import Devices, GpuScan
from index.scan import Scan

WIDTH, K, QUERIES = 304, 10, 200


def main() -> None:
    """Measure on device 0; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--rows", type=int, nargs="+", default=[660_000, 6_600_000])
    chosen = parser.parse_args()
    devices = Devices()
    if not devices.count:
        emit("gpu", {"gpus": 0}, [], note="no GPU, or faiss is built for CPUs: nothing was run")
        return
    bandwidth = copy_bandwidth()
    figures: dict[str, float] = {"gpus": devices.count, "copy_gb_s": bandwidth / 1e9}
    bars: list[Bar] = []
    for count in chosen.rows:
        rows = unit_rows(count)
        scan = GpuScan(rows, 0, 0, devices)
        queries = rows[:QUERIES].astype(np.float32)
        one = median_s([partial(scan.search, query, K) for query in queries])
        share = rows.nbytes / one / bandwidth if bandwidth else 0.0
        same = [
            scan.search(query, K).rows.tolist() == Scan(rows, 0).search(query, K).rows.tolist()
            for query in queries[:10]
        ]
        figures |= {f"{count}_p50_ms": 1e3 * one, f"{count}_bandwidth_share": share}
        bars.append(at_least(f"{count} rows: answers equal to the CPU's, of 10", sum(same), 10))
    emit("gpu", figures, bars)


def unit_rows(count: int) -> np.ndarray:
    """`[count, 304]` float16, written block by block: in float32 it would take twice as much."""
    rows, random = np.empty((count, WIDTH), np.float16), np.random.default_rng(0)
    for start in range(0, count, 1 << 16):
        block = random.standard_normal((min(1 << 16, count - start), WIDTH), np.float32)
        rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return rows


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of a gigabyte on the device; 0 without torch for it."""
    try:
        import torch
    except ImportError:
        return 0.0
    if not torch.cuda.is_available():
        return 0.0
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * source.numel() / median_s([copy] * 20)


def median_s(calls: list[Callable[[], object]]) -> float:
    """Seconds of a call; the first warms up and does not count."""
    calls[0]()
    taken = []
    for call in calls:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
