"""nlu.memory: what there is, what we have, and what is refused because it would not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlu import memory
from nlu.errors import EngineRefused
from nlu.settings import Settings
from statics.bundle import Bundle
from tests.tiny import Made

MIB = 2**20


def group_of(folder: Path, line: str, **files: str) -> Path:
    """A /proc with one process in the group of this line of its cgroup file, and the files of a cgroup tree."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(f"{line}\n3:cpuset:/elsewhere\n")
    for path, text in files.items():
        target = folder / "groups" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")
    return folder


def limits(folder: Path) -> list[int]:
    return sorted(memory.cgroup_limits(folder / "proc", folder / "groups"))


def test_memory_reads_version_1_limits_of_the_group_and_of_those_above(tmp_path: Path) -> None:
    files = {
        "memory/pods/one/memory.limit_in_bytes": "400",
        "memory/pods/memory.limit_in_bytes": "300",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert limits(group_of(tmp_path, "4:memory:/pods/one", **files)) == [300, 400, 9223372036854771712]


def test_memory_reads_version_2_limits_and_max_is_none(tmp_path: Path) -> None:
    files = {"pods/one/memory.max": "max", "pods/memory.max": "300"}
    assert limits(group_of(tmp_path, "0::/pods/one", **files)) == [300]


def test_memory_in_a_container_finds_its_group_mounted_as_the_root(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": "500"}
    assert limits(group_of(tmp_path, "4:memory:/docker/abc", **files)) == [500]


def test_memory_without_groups_is_limited_by_the_machine(tmp_path: Path) -> None:
    assert limits(tmp_path) == []
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.limit_bytes(Settings()) <= machine
    assert memory.limit_bytes(Settings(memory_bytes=77)) == 77


def test_memory_resident_bytes_grow_with_what_is_touched_and_are_0_of_nobody() -> None:
    before = memory.rss_bytes()
    held = bytearray(os.urandom(1) * (32 * MIB))
    assert memory.rss_bytes() - before > 24 * MIB
    del held
    assert memory.rss_bytes(2**22 + 1) == 0  # above any process number


def gated(
    bundle: Bundle, live: Bundle | None = None, measured: int | None = None, *, used: int, processes: int = 1
) -> None:
    memory.gate(bundle, live, measured, used=used, limit=100 * MIB, processes=processes)


def test_memory_gate_counts_files_or_what_a_trial_measured(tiny: Made) -> None:
    gated(tiny.bundle, used=80 * MIB)
    with pytest.raises(EngineRefused, match=r"memory: found 85 MiB in use .* expected at most 85 MiB"):
        gated(tiny.bundle, used=85 * MIB)
    gated(tiny.bundle, measured=4 * MIB, used=80 * MIB)
    with pytest.raises(EngineRefused, match="80 MiB in use and 6 MiB needed"):
        gated(tiny.bundle, measured=5 * MIB, used=80 * MIB)
    with pytest.raises(EngineRefused, match="8 MiB needed"):
        gated(tiny.bundle, measured=round(3.5 * MIB), used=80 * MIB, processes=2)


def test_memory_gate_does_not_count_parts_that_are_served_already(tiny: Made, stranger: Made) -> None:
    gated(tiny.bundle, tiny.bundle, measured=500 * MIB, used=80 * MIB)
    with pytest.raises(EngineRefused):
        gated(tiny.bundle, stranger.bundle, measured=500 * MIB, used=80 * MIB)


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group of its own, of version 1."""
    if os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("needs root, and a machine with memory control groups of version 1")
    folder = GROUPS / f"chorus-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def test_memory_limit_is_that_of_the_control_group_this_process_is_in(group: Path) -> None:
    (group / "memory.limit_in_bytes").write_text(str(300 * MIB))
    said = "from nlu import memory, settings; print(memory.limit_bytes(settings.Settings()))"
    entering = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{said}'"
    inside = subprocess.run(["sh", "-c", entering], capture_output=True, text=True, check=True, timeout=60)
    assert int(inside.stdout) == 300 * MIB
    outside = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(outside.stdout) > 300 * MIB
