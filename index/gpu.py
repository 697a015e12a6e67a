"""Shards on a GPU: FAISS's flat float16 index there, the same answers as a scan on the CPU.

A GPU multiplies in float16 and knows no masks. So it is asked for more rows than wanted, and those that may be said are
scored again from the very rows of the shard. Where that does not prove that no other row belongs among them, more are
asked for, and at last the scan on the CPU answers: what a caller gets never depends on the placement.
"""

from __future__ import annotations

import logging
from threading import Lock
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index.scan import Scan, ask, select
from index.search import NOTHING, Hits

logger = logging.getLogger(__name__)

TEMPORARY_BYTES = 64 << 20  # of scratch memory on each GPU; FAISS alone would take a gigabyte and a half
COPY_ROWS = 1 << 16  # rows widened to float32 at a time on their way
MOST = 2048  # rows that FAISS returns from a GPU at most
# How far a GPU's score of unit vectors may be off: it rounds the query to float16, each number by a share of 2**-11 at
# most, so by Cauchy and Schwarz the sum of products by as much; the same again for all that is smaller.
ERROR = 2.0**-10


class Devices:
    """The GPUs of this process, each with bounded scratch memory. `library` is faiss, or a stand-in for it in tests."""

    def __init__(self, library: Any = faiss) -> None:
        self.library = library
        self.count: int = library.get_num_gpus() if hasattr(library, "StandardGpuResources") else 0
        self._resources: dict[int, Any] = {}
        self._locks: dict[int, Lock] = {}

    def resources(self, device: int) -> tuple[Any, Lock]:
        """What calls on one device share; FAISS allows one at a time."""
        if device not in self._resources:
            self._resources[device] = self.library.StandardGpuResources()
            self._resources[device].setTempMemory(TEMPORARY_BYTES)
            self._locks[device] = Lock()
        return self._resources[device], self._locks[device]


class GpuScan:
    """A shard on a GPU, with the interface of `Scan`. Thread-safe."""

    def __init__(self, rows: NDArray[np.float16], first: int, device: int, devices: Devices) -> None:
        """Copies `[rows, padded]` to the device; raises RuntimeError, FAISS's own, where it does not fit."""
        resources, self._lock = devices.resources(device)
        config = devices.library.GpuIndexFlatConfig()
        config.device, config.useFloat16 = device, True
        self.first, self.rows = first, len(rows)
        self._rows = rows
        self._on_cpu = Scan(rows, first)
        with self._lock:
            self._flat = devices.library.GpuIndexFlatIP(resources, rows.shape[1], config)
            for start in range(0, len(rows), COPY_ROWS):
                self._flat.add(rows[start : start + COPY_ROWS].astype(np.float32))

    def search(self, query: NDArray[np.float32], k: int, mask: NDArray[np.uint8] | None = None) -> Hits:
        """The k best rows for one prepared query `[padded]`; `mask` is this shard's own."""
        want = min(self.rows, 2 * k + 16)
        while want <= MOST:
            with self._lock:
                scores, rows = ask(self._flat, query[None], want, None)
            floor = -np.inf if want == self.rows else float(scores[0, -1]) + ERROR
            hits = self._scored(query, rows[0], k, mask, floor=floor)
            if hits is not None:
                return hits
            want = min(self.rows, 8 * want)
        return self._on_cpu.search(query, k, None if mask is None else select(mask))

    def _scored(
        self, query: NDArray[np.float32], rows: NDArray[np.int64], k: int, mask: NDArray[np.uint8] | None, *, floor: float
    ) -> Hits | None:  # fmt: skip
        """The k best of these rows, scored as the CPU scores them; None where others, of at most the `floor`'s score, may
        belong there."""
        if mask is not None:
            rows = rows[(mask[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1]
        rows = np.sort(rows)
        hits = Scan(self._rows[rows], 0).search(query, min(k, len(rows))) if len(rows) else NOTHING
        if floor > -np.inf and (len(hits) < k or hits.scores[-1] <= floor):
            return None
        return Hits(hits.scores, rows[hits.rows] + self.first)


def devices_of(placement: str, shards: int, devices: Devices) -> list[int | None]:
    """Where each shard goes: None is the CPU. `placement` is "cpu", "gpu" (all of them in turn) or "gpu:N".

    Raises ValueError for a word of another kind or a device there is not.
    """
    if placement == "cpu":
        return [None] * shards
    kind, colon, number = placement.partition(":")
    if kind != "gpu" or (colon and not number.isdecimal()):
        raise ValueError(
            f"placement: found {placement!r}, expected cpu, gpu or gpu:N; remedy: NLU_INDEX_PLACEMENT=cpu"
        )
    if not devices.count:
        logger.warning(
            "index: placement %s, but there is no GPU or faiss is built for CPUs; searching on the CPU",
            placement,
        )
        return [None] * shards
    if colon and int(number) >= devices.count:
        raise ValueError(
            f"placement: found {placement!r}, expected one of {devices.count} GPUs; remedy: gpu:0"
        )
    return [int(number) if colon else shard % devices.count for shard in range(shards)]
