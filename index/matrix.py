"""`Matrix`: the float16 rows of many shard files, one after another in one stretch of memory, checked number by number.

Rows of all shards can so be addressed as one array, which a graph needs. With `shared` pages each file is mapped
read-only at its place, and processes that serve one index share them. With pages of its `own` a process reads the files
into huge pages, which are scanned half again as fast (docs/one-reply.md). No FAISS file format is ever parsed: its
reader takes lying headers and trailing bytes, and the codes of FAISS's float16 quantizer are exactly these bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from index.layout import IndexInvalid, ShardFile, padded

NORM_TOLERANCE = 1e-3  # rounding to float16 moves a coordinate, so the length, by at most 2**-11 = 4.9e-4
CHECK_ROWS = 4096  # rows widened to float32 at a time, so that checking a shard does not triple its memory

_MAP_FIXED = 0x10  # mmap.h of Linux, macOS and the BSDs; Python's mmap has no name for it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


Pages = Literal["own", "shared"]
HUGE = 2 << 20  # bytes of a huge page, where the system gives any


class Matrix:
    """`array` is `[rows, padded]` float16, read-only; it and every slice of it keep the mapping alive."""

    def __init__(self, array: NDArray[np.float16]) -> None:
        """Rows in memory, as `Writer` would have written them."""
        if (
            array.dtype != np.float16
            or array.shape[1] != padded(array.shape[1])
            or not array.flags.c_contiguous
        ):
            raise ValueError(
                f"rows: found {array.dtype} of shape {array.shape}, expected padded float16 rows"
            )
        self.array = array

    @classmethod
    def load(
        cls,
        folder: Path,
        shards: Sequence[ShardFile],
        dim: int,
        *,
        pages: Pages = "shared",
        placed: Callable[[int, NDArray[np.float16]], bool] | None = None,
    ) -> Matrix:
        """The rows of these files, or `IndexInvalid` at the first byte or number that no build would have written.

        Shard by shard: in its place, then read through once by the checks. `placed(shard, rows)` may then copy it to
        another memory; where it returns True, the shard's shared pages are let go before the next is touched.
        """
        width, files = padded(dim) * 2, [folder / shard.file for shard in shards]
        for path, shard in zip(files, shards, strict=True):
            _check_size(path, shard.rows * width, f"{shard.rows} rows of {padded(dim)} float16")
        memory = _Memory(
            [(path, shard.rows * width) for path, shard in zip(files, shards, strict=True)], pages
        )
        array = memory.bytes.view("<f2").astype(np.float16, copy=False).reshape(-1, padded(dim))
        first = 0
        with ThreadPoolExecutor(1, "digest") as beside:
            for number, shard in enumerate(shards):
                rows = array[first : first + shard.rows]
                data = memory.bytes[first * width : (first + shard.rows) * width]
                digest = beside.submit(check_digest, shard.file, data, shard.sha256)
                try:
                    for start in range(0, shard.rows, CHECK_ROWS):
                        _check(rows[start : start + CHECK_ROWS], dim, part=shard.file, first_row=start)
                finally:
                    digest.result()  # raises before what the numbers say: damage explains them
                if placed is not None and placed(number, rows):
                    memory.let_go(first * width, shard.rows * width)
                first += shard.rows
        return cls(array)

    def __len__(self) -> int:
        return len(self.array)

    @property
    def width(self) -> int:
        return int(self.array.shape[1])


def read(path: Path, size: int, sha256: str, *, expected: str, pages: Pages) -> NDArray[np.uint8]:
    """One file of exactly these bytes, read-only; raises `IndexInvalid`."""
    _check_size(path, size, expected)
    data = _Memory([(path, size)], pages).bytes
    check_digest(path.name, data, sha256)
    return data


def check_digest(part: str, data: NDArray[np.uint8], sha256: str) -> None:
    found = hashlib.sha256(data.data).hexdigest()
    if found != sha256:
        raise IndexInvalid(
            part=part,
            found=f"sha256 {found}",
            expected=f"{sha256}, as index.json says",
            remedy="build or pull the index again; this file is damaged or of another build",
        )


class _Memory:
    """Files one after another in one stretch of addresses, which lives as long as `bytes` or an array of it does."""

    def __init__(self, files: Sequence[tuple[Path, int]], pages: Pages) -> None:
        size = sum(length for _, length in files)
        if not size:
            self.bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
            return
        writable, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        taken = _map(None, size + HUGE, writable, flags, -1)
        self._base = -(-taken // HUGE) * HUGE
        if pages == "own" and hasattr(mmap, "MADV_HUGEPAGE"):
            _libc.madvise(
                self._base, size, mmap.MADV_HUGEPAGE
            )  # the system may decline, and loses speed only
        whole = (ctypes.c_uint8 * size).from_address(self._base)  # what every array of it keeps alive
        finalizer = weakref.finalize(whole, _libc.munmap, taken, size + HUGE)
        finalizer.atexit = False  # arrays may still be read while the interpreter ends
        data: NDArray[np.uint8] = np.frombuffer(memoryview(whole), np.uint8)
        # Only whole pages can be mapped: with an odd number of rows a shard, all but the first are read instead.
        self._mapped: set[int] = set()
        offset = 0
        for path, length in files:
            with path.open("rb", buffering=0) as file:
                aligned = offset % mmap.PAGESIZE == 0 and (
                    length % mmap.PAGESIZE == 0 or offset + length == size
                )
                if pages == "shared" and aligned:
                    fixed = mmap.MAP_SHARED | _MAP_FIXED
                    _map(self._base + offset, length, mmap.PROT_READ, fixed, file.fileno())
                    self._mapped.add(offset)
                else:
                    _read_into(data[offset : offset + length], file, path.name)
            offset += length
        data.flags.writeable = False
        self.bytes = data

    def let_go(self, offset: int, length: int) -> None:
        """Give back the pages of a mapped file; they are read again from disk by whoever touches them."""
        if offset in self._mapped:
            _libc.madvise(self._base + offset, length, mmap.MADV_DONTNEED)


def _map(address: int | None, size: int, protection: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, size, protection, flags, file, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: cannot map {size} bytes of an index")
    return int(found)


def _read_into(target: NDArray[np.uint8], file: Any, name: str) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target.data[done:])
        if not count:
            raise IndexInvalid(
                part=name, found=f"{done} bytes", expected=str(len(target)), remedy="build or pull it again"
            )
        done += count


def _check_size(path: Path, size: int, expected: str) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise IndexInvalid(
            part=path.name,
            found="no file" if found is None else f"{found} bytes",
            expected=f"{size} bytes ({expected})",
            remedy="build or pull the index again",
        )


def _check(vectors: NDArray[np.float16], dim: int, *, part: str, first_row: int) -> None:
    with np.errstate(all="ignore"):  # what overflows or is NaN is reported by name below
        wide = vectors.astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        unit = np.abs(norms - 1.0) <= NORM_TOLERANCE  # False for NaN and infinity too
    if not unit.all():
        row = int(np.argmin(unit))
        found = f"length {norms[row]:.6g}" if np.isfinite(wide[row]).all() else "NaN or infinity"
        expected = "a finite vector of length 1"
    elif wide[:, dim:].any():
        row = int(np.argmax(wide[:, dim:].any(axis=1)))
        found, expected = "numbers in the padding", f"zeros after column {dim}"
    else:
        return
    raise IndexInvalid(
        part=f"{part} row {first_row + row}",
        found=found,
        expected=expected,
        remedy="build the index again; no build of this width wrote this file",
    )
