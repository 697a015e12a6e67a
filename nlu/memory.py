"""What memory there is, what we have of it, and whether another bundle fits beside the one that serves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nlu.errors import EngineRefused
from nlu.settings import Settings
from statics.bundle import Bundle

SHARE = 0.85  # of the limit; the rest is for calls under way, and for what nobody foresaw
MARGIN = 1.2  # a load needs more for a moment than it keeps

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process, mapped files included; 0 where there is no such process."""
    try:
        pages = (_PROC / str(pid) / "statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def limit_bytes(settings: Settings) -> int:
    """What this process may have: `memory_bytes`, else the least of what its control groups and the machine allow."""
    return settings.memory_bytes or min([_machine_bytes(), *cgroup_limits(_PROC, _CGROUPS)])


def cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The memory limits in force for this process, of every group above it, version 1 and 2; none is no limit."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            yield from _limits(cgroups / "memory", path, "memory.limit_in_bytes")
        elif not controllers:
            yield from _limits(cgroups, path, "memory.max")
            yield from _limits(cgroups / "unified", path, "memory.max")


def gate(
    bundle: Bundle, live: Bundle | None, measured: int | None, *, used: int, limit: int, processes: int = 1
) -> None:
    """Raise EngineRefused where `bundle` would not fit beside `live`, which `used` bytes serve now.

    `measured` is what a whole load of it took in a trial; without one, files are taken to be as large in memory as
    on disk. Parts that are served already are not loaded again.
    """
    held = set() if live is None else {component.digest for component in live.manifest.components}
    fresh = sum(part.size for part in bundle.manifest.components if part.digest not in held)
    growth = fresh if measured is None else round(measured * fresh / max(1, bundle.manifest.size))
    needed, room = round(MARGIN * growth) * processes, round(SHARE * limit) - used
    if needed > room:
        raise EngineRefused(
            "memory",
            found=f"{_mib(used)} in use and {_mib(needed)} needed for bundle {bundle.digest[:12]}",
            expected=f"at most {_mib(round(SHARE * limit))} in all, {SHARE:.0%} of the limit",
            remedy="give the pod more memory, fewer processes or shared index pages, or publish a smaller bundle",
        )


def _limits(root: Path, path: str, name: str) -> Iterator[int]:
    """The limits from a group up to the root. In a container the group may be mounted as the root itself."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        for line in _lines(folder / name):
            if line != "max":
                yield int(line)


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
