"""Shard files are served only when every number is what a build writes; then they are the mapped files themselves."""

from __future__ import annotations

import gc
import hashlib
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from index.layout import IndexInvalid, ShardFile
from index.matrix import CHECK_ROWS, HUGE, Matrix, read
from index.search import prepare_rows
from tests.index.matrices import Floats, Halves, stored
from tests.index.tampering import digest

ROWS, DIM, WIDTH = 24, 20, 32
PAGE_ROWS = mmap.PAGESIZE // (2 * WIDTH)  # of 20 dims, so that a shard of them is whole pages


@pytest.fixture
def halves(random_vectors: Callable[..., Floats]) -> Halves:
    """What a shard file of 24 rows holds: `[rows, padded]`."""
    return stored(random_vectors(ROWS))


def write(folder: Path, *parts: Halves) -> list[ShardFile]:
    """Shard files of these rows, as `index.json` lists them."""
    listed = []
    for number, rows in enumerate(parts):
        path = folder / f"shard-{number:03d}.f16"
        np.ascontiguousarray(rows).astype("<f2").tofile(path)
        listed.append(ShardFile(file=path.name, rows=len(rows), sha256=digest(path)))
    return listed


def mappings(folder: Path) -> list[str]:
    """Of this process, the files of the folder, one for each stretch of memory that looks at one."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [Path(line.split()[5]).name for line in lines if str(folder) in line]


# --- what is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [8], [8, 16], [1, 2, 3], [16]], ids=str)
def test_matrix_load_gives_the_rows_of_all_shards_in_order(
    tmp_path: Path, halves: Halves, cuts: list[int]
) -> None:
    shards = write(tmp_path, *np.split(halves, cuts))
    matrix = Matrix.load(tmp_path, shards, DIM)
    np.testing.assert_array_equal(matrix.array, halves)
    assert matrix.array.dtype == np.float16
    assert (len(matrix), matrix.width) == (ROWS, WIDTH)


def test_matrix_of_no_shards_has_no_rows(tmp_path: Path) -> None:
    assert Matrix.load(tmp_path, [], DIM).array.shape == (0, WIDTH)


@pytest.mark.parametrize("dim", [1, 16, 300, 1024])
def test_matrix_tolerance_holds_for_float16_rounding(
    tmp_path: Path, random_vectors: Callable[..., Floats], dim: int
) -> None:
    vectors = random_vectors(200, dim, seed=dim)
    vectors[: len(vectors) // 2] **= 5  # few large coordinates and many that are subnormal in float16
    assert len(Matrix.load(tmp_path, write(tmp_path, stored(vectors)), dim)) == 200


@pytest.mark.parametrize(
    "array",
    [np.ones((2, 20), np.float16), np.ones((2, 32), np.float32), np.ones((2, 64), np.float16)[:, ::2]],
    ids=["unpadded", "float32", "strided"],
)
def test_matrix_refuses_arrays_that_no_file_would_give(array: np.ndarray) -> None:
    Matrix(np.ones((2, 32), np.float16))  # the control
    with pytest.raises(ValueError, match="expected padded float16 rows"):
        Matrix(array)


# --- what is refused ---------------------------------------------------------------------------------------


def set_to(row: int, column: int, value: float) -> Callable[[Halves], Halves]:
    def change(rows: Halves) -> Halves:
        rows[row, column] = value
        return rows

    return change


def scale(row: int, factor: float) -> Callable[[Halves], Halves]:
    def change(rows: Halves) -> Halves:
        rows[row] *= np.float16(factor)
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(3, 5, np.nan), "row 3: found NaN or infinity"),
        (set_to(3, 5, np.inf), "row 3: found NaN or infinity"),
        (set_to(3, 5, -np.inf), "row 3: found NaN or infinity"),
        (set_to(3, 5, 65504.0), "row 3: found length 65504"),
        (scale(7, 0.0), "row 7: found length 0"),
        (scale(7, 1.01), "row 7: found length 1.0"),
        (scale(7, 0.99), "row 7: found length 0.9"),
        (scale(7, 300.0), "row 7: found length "),
        (set_to(9, DIM, 0.001), f"row 9: found numbers in the padding, expected zeros after column {DIM}"),
        (set_to(9, WIDTH - 1, 6e-8), "row 9: found numbers in the padding"),
        (set_to(9, DIM, np.nan), "row 9: found NaN or infinity"),
        (lambda rows: rows[:-1], f"found {(ROWS - 1) * WIDTH * 2} bytes, expected {ROWS * WIDTH * 2}"),
        (lambda rows: rows.repeat(2, axis=0), f"found {ROWS * WIDTH * 4} bytes"),
        (lambda rows: rows.ravel()[:-1], f"found {ROWS * WIDTH * 2 - 2} bytes"),
        (lambda rows: np.append(rows, np.float16(0)), f"found {ROWS * WIDTH * 2 + 2} bytes"),
        (lambda rows: rows[:, :DIM], f"found {ROWS * DIM * 2} bytes"),
        (lambda rows: rows[:0], "found 0 bytes"),
    ],
    ids=[
        *"nan inf -inf overflow zero long short overlong padding faint-padding nan-padding".split(),
        *"fewer more truncated trailing unpadded empty".split(),
    ],
)
def test_matrix_load_refuses(
    tmp_path: Path, halves: Halves, change: Callable[[Halves], Halves], message: str
) -> None:
    """The digests fit: these are the checks behind them."""
    listed = write(tmp_path, halves)
    Matrix.load(tmp_path, listed, DIM)  # the control: the same file, unchanged, is accepted
    path = tmp_path / "shard-000.f16"
    np.ascontiguousarray(change(halves)).tofile(path)
    shard = ShardFile(file=path.name, rows=ROWS, sha256=digest(path))
    with pytest.raises(IndexInvalid, match=message) as refusal:
        Matrix.load(tmp_path, [shard], DIM)
    assert refusal.value.part.startswith("shard-000.f16")
    assert refusal.value.remedy


def test_matrix_load_refuses_another_digest(tmp_path: Path, halves: Halves) -> None:
    """A sign turned leaves every length as it was."""
    listed = write(tmp_path, halves[:8], halves[8:])
    halves[8, 0] *= -1
    write(tmp_path, halves[:8], halves[8:])
    with pytest.raises(IndexInvalid, match="found sha256 .* as index.json says") as refusal:
        Matrix.load(tmp_path, listed, DIM)
    assert refusal.value.part == "shard-001.f16"


def test_matrix_load_refuses_swapped_shards(tmp_path: Path, halves: Halves) -> None:
    listed = write(tmp_path, halves[:8], halves[8:16])
    Matrix.load(tmp_path, listed, DIM)  # the control
    write(tmp_path, halves[8:16], halves[:8])
    with pytest.raises(IndexInvalid, match="shard-000.f16: found sha256"):
        Matrix.load(tmp_path, listed, DIM)


def test_matrix_load_refuses_a_missing_file_before_it_reads_another(tmp_path: Path, halves: Halves) -> None:
    listed = write(tmp_path, halves[:8], halves[8:])
    (tmp_path / "shard-001.f16").unlink()
    (tmp_path / "shard-000.f16").write_bytes(bytes(8 * WIDTH * 2))  # of the right size, all zeros
    with pytest.raises(IndexInvalid, match="shard-001.f16: found no file"):
        Matrix.load(tmp_path, listed, DIM)


def test_matrix_load_refuses_a_folder_in_place_of_a_file(tmp_path: Path, halves: Halves) -> None:
    listed = write(tmp_path, halves)
    (tmp_path / "shard-000.f16").unlink()
    (tmp_path / "shard-000.f16").mkdir()
    with pytest.raises(IndexInvalid, match="shard-000.f16: found no file"):
        Matrix.load(tmp_path, listed, DIM)


def test_matrix_load_refuses_another_width_of_the_same_size(tmp_path: Path, halves: Halves) -> None:
    with pytest.raises(IndexInvalid, match="row 0: found numbers in the padding"):
        Matrix.load(tmp_path, write(tmp_path, halves), DIM - 1)  # padded to the same 32


def test_matrix_load_names_rows_beyond_the_first_block_and_shard(tmp_path: Path) -> None:
    rows = np.zeros((CHECK_ROWS + 10, 16), np.float16)
    rows[:, 0] = 1.0
    good = rows.copy()
    rows[CHECK_ROWS + 3, 0] = 2.0
    with pytest.raises(IndexInvalid, match=f"shard-001.f16 row {CHECK_ROWS + 3}: found length 2"):
        Matrix.load(tmp_path, write(tmp_path, good, rows), 16)


def test_matrix_mapped_takes_one_file_of_exactly_these_bytes(tmp_path: Path) -> None:
    path = tmp_path / "levels"
    path.write_bytes(b"levels")
    sha256 = hashlib.sha256(b"levels").hexdigest()
    assert read(path, 6, sha256, expected="six", pages="shared").tobytes() == b"levels"
    with pytest.raises(IndexInvalid, match=r"levels: found 6 bytes, expected 7 bytes \(seven\)"):
        read(path, 7, sha256, expected="seven", pages="shared")
    path.write_bytes(b"Levels")
    with pytest.raises(IndexInvalid, match="levels: found sha256"):
        read(path, 6, sha256, expected="six", pages="shared")


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "files"),
    [
        ([ROWS], [0]),
        ([PAGE_ROWS, PAGE_ROWS, 8], [0, 1, 2]),
        ([3 * PAGE_ROWS, 3 * PAGE_ROWS], [0, 1]),
        ([PAGE_ROWS + 8, PAGE_ROWS + 8], []),
        ([PAGE_ROWS // 2, PAGE_ROWS // 2, 8], [2]),
    ],
    ids=["one", "pages", "many-pages", "odd", "half-pages"],
)
def test_matrix_maps_whole_pages_and_reads_the_rest(
    tmp_path: Path, random_vectors: Callable[..., Floats], rows: list[int], files: list[int]
) -> None:
    halves = stored(random_vectors(sum(rows)))
    shards = write(tmp_path, *np.split(halves, np.cumsum(rows)[:-1]))
    matrix = Matrix.load(tmp_path, shards, DIM)
    np.testing.assert_array_equal(matrix.array, halves)
    assert mappings(tmp_path) == [f"shard-{number:03d}.f16" for number in files]


def test_matrix_pages_are_those_of_the_file_and_cannot_be_written(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """Shared with every process that maps the file, so nobody has a copy: `smaps` counts none as anonymous."""
    matrix = Matrix.load(tmp_path, write(tmp_path, stored(random_vectors(4 * PAGE_ROWS))), DIM)
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    head = next(line for line in lines if str(tmp_path) in line)
    facts: dict[str, int] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if not value.endswith(" kB"):
            break
        facts[name] = int(value.split()[0])
    assert head.split()[1] == "r--s"  # read-only, shared
    assert (facts["Size"], facts["Rss"], facts["Anonymous"]) == (16, 16, 0)
    assert facts["Size"] * 1024 == matrix.array.nbytes
    with pytest.raises(ValueError, match="read-only"):
        matrix.array[0, 0] = 1


def test_matrix_of_its_own_pages_holds_the_same_rows_and_maps_no_file(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    halves = stored(random_vectors(3 * PAGE_ROWS + 8))
    shards = write(tmp_path, *np.split(halves, [PAGE_ROWS, 2 * PAGE_ROWS]))
    own = Matrix.load(tmp_path, shards, DIM, pages="own")
    np.testing.assert_array_equal(own.array, halves)
    assert mappings(tmp_path) == []
    assert own.array.ctypes.data % HUGE == 0 and not own.array.flags.writeable
    shared = Matrix.load(tmp_path, shards, DIM)
    assert len(mappings(tmp_path)) == 3  # the control
    np.testing.assert_array_equal(shared.array, own.array)


def test_matrix_of_its_own_pages_is_checked_like_any(tmp_path: Path, halves: Halves) -> None:
    shards = write(tmp_path, halves)
    Matrix.load(tmp_path, shards, DIM, pages="own")  # the control
    harmed = [shards[0].model_copy(update={"sha256": "0" * 64})]
    with pytest.raises(IndexInvalid, match="sha256"):
        Matrix.load(tmp_path, harmed, DIM, pages="own")


SHARER = """
import sys
from pathlib import Path
from index.layout import ShardFile
from index.matrix import Matrix
folder = Path(sys.argv[1])
matrix = Matrix.load(folder, [ShardFile(file="shard-000.f16", rows=int(sys.argv[2]), sha256=sys.argv[3])], 20)
print(float(matrix.array.astype("f4").sum()), flush=True)
sys.stdin.read()
"""


def test_matrix_pages_are_shared_by_two_processes(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    """What `smaps` calls shared becomes private again when the other process ends: the control."""
    rows = 16 * PAGE_ROWS
    [shard] = write(tmp_path, stored(random_vectors(rows)))
    matrix = Matrix.load(tmp_path, [shard], DIM)

    def shared() -> int:
        """kB of the mapping that another process has mapped too."""
        text = Path("/proc/self/smaps").read_text().split(str(tmp_path), 1)[1]
        counts = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:16] if ":" in line}
        return int(counts["Shared_Clean"]) + int(counts["Shared_Dirty"])

    assert shared() == 0
    with subprocess.Popen(
        [sys.executable, "-c", SHARER, str(tmp_path), str(rows), shard.sha256],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin and other.stdout
        assert float(other.stdout.readline()) == float(matrix.array.astype("f4").sum())
        assert shared() * 1024 == matrix.array.nbytes
        other.stdin.close()
    assert shared() == 0


def test_matrix_arrays_outlive_the_matrix_and_the_mapping_ends_with_the_last(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    halves = stored(random_vectors(2 * PAGE_ROWS))
    matrix = Matrix.load(tmp_path, write(tmp_path, halves), DIM)
    part = matrix.array[5:9, 2:7].T
    del matrix
    gc.collect()
    np.testing.assert_array_equal(part, halves[5:9, 2:7].T)
    assert mappings(tmp_path) == ["shard-000.f16"]
    del part
    gc.collect()
    assert mappings(tmp_path) == []


def test_matrix_that_was_refused_leaves_no_mapping(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    halves = stored(random_vectors(2 * PAGE_ROWS))
    halves[-1] = 0
    for _ in range(3):
        with pytest.raises(IndexInvalid):
            Matrix.load(tmp_path, write(tmp_path, halves), DIM)
    gc.collect()
    assert mappings(tmp_path) == []


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "deleted"])
def test_matrix_outlives_its_files(
    tmp_path: Path, random_vectors: Callable[..., Floats], replaced: bool
) -> None:
    """As a pull or a build replaces files: under their names, never in place."""
    halves = stored(random_vectors(2 * PAGE_ROWS))
    matrix = Matrix.load(tmp_path, write(tmp_path, halves), DIM)
    shutil.rmtree(tmp_path)
    if replaced:
        tmp_path.mkdir()
        write(tmp_path, -halves)
    np.testing.assert_array_equal(matrix.array, halves)


@pytest.mark.parametrize("placed", [True, False])
def test_matrix_lets_go_of_the_pages_of_a_shard_that_was_placed_elsewhere(
    tmp_path: Path, random_vectors: Callable[..., Floats], placed: bool
) -> None:
    halves = stored(random_vectors(4 * PAGE_ROWS))
    shards = write(tmp_path, *np.split(halves, 2))
    seen: list[tuple[int, Halves]] = []

    def place(number: int, rows: Halves) -> bool:
        seen.append((number, rows.copy()))
        return placed

    matrix = Matrix.load(tmp_path, shards, DIM, placed=place)
    smaps = Path("/proc/self/smaps").read_text().split(str(tmp_path))[1:]
    resident = [int(text.split("Rss:")[1].split()[0]) for text in smaps]
    assert resident == ([0, 0] if placed else [8, 8])
    assert [number for number, _ in seen] == [0, 1]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in seen]), halves)
    np.testing.assert_array_equal(matrix.array, halves)  # read again from the file


def test_matrix_keeps_rows_it_had_to_read_when_they_were_placed_elsewhere(
    tmp_path: Path, halves: Halves
) -> None:
    """Memory that no file is behind would come back as zeros."""
    matrix = Matrix.load(
        tmp_path, write(tmp_path, *np.split(halves, 3)), DIM, placed=lambda number, rows: True
    )
    np.testing.assert_array_equal(matrix.array, halves)


def test_matrix_holds_one_shard_as_float32_never_all(tmp_path: Path) -> None:
    """`CHECK_ROWS` bound what a check widens: loading 16 MB allocates a fraction of that beside the mapping."""
    import tracemalloc

    rows = np.zeros((8 * CHECK_ROWS, 256), np.float16)
    rows[:, 0] = 1.0
    listed = write(tmp_path, *np.split(rows, 4))
    del rows
    tracemalloc.start()
    try:
        matrix = Matrix.load(tmp_path, listed, 256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert matrix.array.nbytes == 16 << 20
    assert peak < 3 * 4 * CHECK_ROWS * 256


def test_matrix_unit_rows_are_those_of_prepare_rows(
    tmp_path: Path, random_vectors: Callable[..., Floats]
) -> None:
    vectors = random_vectors(9)
    matrix = Matrix.load(tmp_path, write(tmp_path, stored(vectors)), DIM)
    np.testing.assert_array_equal(matrix.array[:, :DIM], prepare_rows(vectors, DIM).astype(np.float16))
