"""Shards on a GPU, on a stand-in for one: FAISS's own flat index, which rounds as a GPU does, behind the same names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from index.build import Entry, build
from index.change import extend
from index.gpu import MOST, TEMPORARY_BYTES, Devices, GpuScan, devices_of
from index.scan import Scan, ask, select
from index.sharded import ShardedIndex
from tests.index.matrices import Floats, index_of, packed, plain, query_of, stored

DIM = 20


class Resources:
    def __init__(self) -> None:
        self.temporary = 0

    def setTempMemory(self, size: int) -> None:
        self.temporary = size


class Config:
    device = 0
    useFloat16 = False


class Flat:
    """Keeps the rows as they are and rounds each query to float16, as the product on a GPU does."""

    def __init__(self, resources: Resources, width: int, config: Config) -> None:
        assert resources.temporary > 0 and config.useFloat16
        self.d = width
        self._flat: Any = faiss.IndexFlatIP(width)

    def add(self, rows: Floats) -> None:
        self._flat.add(rows)

    def search_c(self, n: int, queries: Any, k: int, *rest: Any) -> None:
        assert k <= MOST
        halves = faiss.rev_swig_ptr(queries, n * self.d).astype(np.float16).astype(np.float32)
        self._flat.search_c(n, faiss.swig_ptr(halves), k, *rest)


class Library:
    """What faiss looks like where there are GPUs, each with room for so many shards."""

    StandardGpuResources = Resources
    GpuIndexFlatConfig = Config

    def __init__(self, gpus: int, *, room: int = 1000) -> None:
        self.gpus, self.room = gpus, room
        self.placed: list[int] = []

    def get_num_gpus(self) -> int:
        return self.gpus

    def GpuIndexFlatIP(self, resources: Resources, width: int, config: Config) -> Flat:
        if self.placed.count(config.device) == self.room:
            raise RuntimeError(f"Error: out of memory on device {config.device}\nand a stack trace")
        self.placed.append(config.device)
        return Flat(resources, width, config)


def placed(folder: Path, placement: str, library: Library, **options: Any) -> ShardedIndex:
    return ShardedIndex.load(folder, placement=placement, devices=Devices(library), **options)


@pytest.fixture
def five(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> Path:
    """An index of 36 rows in five shards."""
    build(plain_entries(36), random_vectors(36), tmp_path / "five", personas=(), surfaces=(), shard_rows=8)
    return tmp_path / "five"


# --- against a scan on the CPU -----------------------------------------------------------------------------

WORLDS, SEARCHES = 50, 20  # 1,000 searches, each of them also within a batch


@pytest.mark.parametrize("seed", range(WORLDS))
def test_gpu_answers_as_the_cpu_to_the_last_bit(tmp_path: Path, seed: int) -> None:
    """Rows with many that tie, or all but tie; some shards do not fit."""
    rng = np.random.default_rng(seed)
    rows, dim = int(rng.integers(1, 120)), int(rng.choice([3, 16, 20]))
    centres = rng.standard_normal((int(rng.integers(1, 9)), dim))
    vectors = centres[rng.integers(0, len(centres), rows)] + rng.choice(
        [0.0, 1e-3, 1.0]
    ) * rng.standard_normal((rows, dim))
    vectors = vectors.astype(np.float32)
    entries = [Entry(f"r{i}", "R.", "p") for i in range(rows)]
    build(entries, vectors, tmp_path / "i", personas=(), surfaces=(), shard_rows=int(rng.choice([8, 32, 64])))
    library = Library(int(rng.integers(1, 3)), room=int(rng.integers(0, 4)))
    cpu = ShardedIndex.load(tmp_path / "i", threads=1)
    gpu = placed(tmp_path / "i", "gpu", library, threads=int(rng.integers(1, 4)))
    for _ in range(SEARCHES // 4):
        queries = (centres[rng.integers(0, len(centres), 4)] + 0.1 * rng.standard_normal((4, dim))).astype(
            np.float32
        )
        k = int(rng.choice([1, 2, 5, 13, 200]))
        mask = None if rng.random() < 0.3 else packed(rng.random(len(cpu)) < rng.choice([0.0, 0.1, 0.6, 1.0]))
        for query, many in zip(queries, gpu.search_many(queries, k, mask=mask), strict=True):
            found = gpu.search(query, k, mask=mask)
            assert plain(found) == plain(cpu.search(query, k, mask=mask)) == plain(many)


def scans(vectors: Floats, first: int = 0) -> tuple[GpuScan, Scan]:
    rows = stored(vectors)
    return GpuScan(rows, first, 0, Devices(Library(1))), Scan(rows, first)


def along(axis: int) -> Floats:
    return query_of(np.eye(DIM, dtype=np.float32)[axis])


@pytest.mark.parametrize("rows", [5, 100, 3000])
def test_gpu_ties_go_by_ascending_row_however_many_there_are(rows: int) -> None:
    """Behind ten others; more than FAISS returns from a GPU, in the largest case."""
    vectors = np.eye(2, DIM, dtype=np.float32)[[1] * 10 + [0] * rows]
    gpu, cpu = scans(vectors, first=16)
    assert gpu.search(along(0), 3).rows.tolist() == [26, 27, 28]
    assert plain(gpu.search(along(0), 3)) == plain(cpu.search(along(0), 3))


@pytest.mark.parametrize("allowed", [0, 1, 3, 40])
def test_gpu_finds_the_allowed_behind_a_crowd_of_forbidden(
    random_vectors: Callable[..., Floats], allowed: int
) -> None:
    """A GPU knows no masks: the nearest 4,960 rows are forbidden, so no answer of one is enough."""
    vectors = random_vectors(5000)
    gpu, cpu = scans(vectors)
    order = cpu.search(along(0), 5000).rows
    mask = packed(np.isin(np.arange(5000), order[5000 - allowed :]))
    assert plain(gpu.search(along(0), 3, mask)) == plain(cpu.search(along(0), 3, select(mask)))


def test_gpu_is_asked_for_more_until_the_answer_is_proven(
    random_vectors: Callable[..., Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    wants: list[int] = []

    def asked(flat: Any, queries: Floats, k: int, params: Any) -> Any:
        wants.append(k)
        return ask(flat, queries, k, params)

    monkeypatch.setattr("index.gpu.ask", asked)
    gpu, cpu = scans(random_vectors(5000))
    order = cpu.search(along(0), 5000).rows
    for behind, expected in [(0, [20]), (50, [20, 160]), (1000, [20, 160, 1280]), (2000, [20, 160, 1280])]:
        wants.clear()
        mask = packed(np.isin(np.arange(5000), order[behind:]))
        assert gpu.search(along(0), 2, mask).rows.tolist() == order[behind : behind + 2].tolist()
        assert wants == expected


def test_gpu_rounding_of_a_query_never_decides() -> None:
    """Rows on a cone around the query, so that float16 products order them wrongly; the control is what the device says."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(20):
        axis = rng.standard_normal(DIM)
        axis /= np.linalg.norm(axis)
        around = rng.standard_normal((400, DIM))
        around -= np.outer(around @ axis, axis)
        around /= np.linalg.norm(around, axis=1, keepdims=True)
        gpu, cpu = scans((axis + around).astype(np.float32))
        query = query_of(axis.astype(np.float32))
        expected = cpu.search(query, 3)
        assert plain(gpu.search(query, 3)) == plain(expected)
        wrong += ask(gpu._flat, query[None], 3, None)[1][0].tolist() != expected.rows.tolist()
    assert wrong > 3


# --- placement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "gpus", "expected"),
    [
        ("cpu", 2, [None] * 5),
        ("gpu", 1, [0] * 5),
        ("gpu", 2, [0, 1, 0, 1, 0]),
        ("gpu:1", 2, [1] * 5),
        ("gpu:0", 1, [0] * 5),
        ("gpu", 0, [None] * 5),
        ("gpu:3", 0, [None] * 5),
    ],
)
def test_gpu_devices_of_a_placement(placement: str, gpus: int, expected: list[int | None]) -> None:
    assert devices_of(placement, 5, Devices(Library(gpus))) == expected


@pytest.mark.parametrize(("placement", "gpus"), [("gpu:1", 1), ("gpu:2", 2), ("gpu:99", 2)])
def test_gpu_refuses_a_device_there_is_not(five: Path, placement: str, gpus: int) -> None:
    placed(five, "gpu:0", Library(gpus))  # the control
    with pytest.raises(ValueError, match=f"placement: found '{placement}', expected one of {gpus} GPUs"):
        placed(five, placement, Library(gpus))


@pytest.mark.parametrize("library", [Library(0), faiss], ids=["none", "faiss for CPUs"])
def test_gpu_that_is_not_there_is_logged_and_served_without(
    five: Path, random_vectors: Callable[..., Floats], caplog: pytest.LogCaptureFixture, library: Any
) -> None:
    if library is faiss and hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss is built for GPUs")
    with caplog.at_level(logging.WARNING, "index"):
        some = placed(five, "gpu", library)
    assert "there is no GPU or faiss is built for CPUs; searching on the CPU" in caplog.text
    assert len(some.search(random_vectors(1)[0], 3)) == 3
    caplog.clear()
    placed(five, "cpu", library)
    assert not caplog.text  # the control


@pytest.mark.parametrize(
    ("placement", "gpus", "room", "on_gpu", "message"),
    [
        ("gpu", 1, 1000, [0, 1, 2, 3, 4], None),
        ("gpu", 1, 2, [0, 1], "shard 2 does not fit on gpu:0, 3 shards stay on the CPU"),
        ("gpu:1", 2, 0, [], "shard 0 does not fit on gpu:1, 5 shards stay on the CPU"),
        ("gpu", 2, 1, [0, 1], "shard 2 does not fit on gpu:0, 2 shards stay on the CPU"),
    ],
)
def test_gpu_takes_the_shards_that_fit(
    five: Path,
    random_vectors: Callable[..., Floats],
    caplog: pytest.LogCaptureFixture,
    placement: str,
    gpus: int,
    room: int,
    on_gpu: list[int],
    message: str | None,
) -> None:
    library = Library(gpus, room=room)
    with caplog.at_level(logging.WARNING, "index"):
        some = placed(five, placement, library)
    assert [scan.first // 8 for scan in some._on_gpu] == on_gpu
    covered = sorted([(s.first, s.rows) for s in some._on_gpu] + [(s.first, s.rows) for s in some._scans])
    assert [first for first, _ in covered] == [0, *np.cumsum([rows for _, rows in covered])[:-1]]
    assert sum(rows for _, rows in covered) == 36
    if message is None:
        assert not caplog.text
    else:
        assert message in caplog.text and "out of memory" in caplog.text and "stack trace" not in caplog.text
    reference = index_of(random_vectors(36))
    for query in random_vectors(5, seed=1):
        mask = packed(np.arange(36) % 5 > 1)
        assert plain(some.search(query, 7, mask=mask)) == plain(reference.search(query, 7, mask=mask))


def test_gpu_and_a_graph_still_find_rows_that_were_added_later(
    tmp_path: Path, random_vectors: Callable[..., Floats], plain_entries: Callable[[int], list[Entry]]
) -> None:
    """A walk does not reach them, and no scan on the CPU is theirs when their shard is on a GPU."""
    folder, vectors = tmp_path / "i", random_vectors(60)
    build(plain_entries(50), vectors[:50], folder, kind="hnsw", personas=(), surfaces=(), shard_rows=8)
    extend(folder, folder, [(plain_entries(60)[50:], vectors[50:], None)])
    some = placed(folder, "gpu", Library(1))
    assert [some.search(vector, 1).rows[0] for vector in vectors] == list(range(60))
    mask = packed(np.arange(60) >= 55)  # so few that all are scanned
    assert [some.search(vector, 1, mask=mask).rows[0] for vector in vectors[55:]] == [55, 56, 57, 58, 59]


def test_gpu_scratch_memory_is_shared_by_all_shards_of_a_device(five: Path) -> None:
    devices = Devices(Library(2))
    ShardedIndex.load(five, placement="gpu", devices=devices)
    assert [devices.resources(number)[0].temporary for number in (0, 1)] == [TEMPORARY_BYTES] * 2
    assert devices.resources(0)[1] is devices.resources(0)[1] is not devices.resources(1)[1]
