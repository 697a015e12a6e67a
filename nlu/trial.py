"""A bundle is loaded once in a process of its own, under limits, before a serving process loads it (`python -m nlu.trial`).

A model can take all memory, run for minutes or bring ONNX Runtime down, and no look at its bytes tells (nlu/graphs.py does
what can be done by looking). Here only the child pays: it loads the whole bundle, canaries and golden phrases included, and
says in one line of JSON what that took or why it was refused. Who is killed, by its limits or by its own crash, is refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlu.errors import EngineRefused, NluError
from nlu.settings import Settings
from statics.bundle import Bundle
from statics.errors import StaticsError
from statics.manifest import manifest_digest, parse
from statics.verify import read_manifest

OPEN_FILES = 256  # a load holds a few dozen: each shard, each library
_LAST_WORDS = 300  # characters of what a child that died wrote to stderr

# What the child gets of our environment: where libraries lie. No settings, and so no passwords.
_KEPT = ("LD_LIBRARY_PATH", "LANG", "TZ", "ORT_DISABLE_TELEMETRY")
# One thread, and heaps that do not reserve what they never use: Arrow's own takes 1.2 GiB of the limit to hold kilobytes.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a trial may take. The memory is what it could write to (RLIMIT_DATA): RLIMIT_AS would count mapped libraries and
    files too, which cost nothing and differ by machine."""

    data_bytes: int
    cpu_s: int
    wall_s: float

    @classmethod
    def of(cls, size: int) -> Limits:
        """For a bundle of so many bytes. An honest load stays far below: the shipped one, of 24 MB, takes 0.4 GiB (0.25 of
        them libraries) and one second.

        2 GiB and 4 times its size: ONNX Runtime holds a model three times while it prepares it. 30 s and a second for each
        20 MB: the slowest kernels we know. Four times that by the clock: the child has the lowest priority of the machine.
        """
        cpu_s = 30 + size // 20_000_000
        return cls(data_bytes=2 * 2**30 + 4 * size, cpu_s=cpu_s, wall_s=4.0 * cpu_s)


@dataclass(frozen=True, slots=True)
class Trial:
    """What an accepted load took."""

    rss_bytes: int  # most memory it held beyond the libraries, mapped files included
    seconds: float  # of load, canaries, golden phrases and warm-up


def try_load(bundle: Bundle, settings: Settings, *, limits: Limits | None = None) -> Trial:
    """Load a verified bundle in a child; raises EngineRefused with the child's words, or the limit it broke.

    Blocks until the child is gone; it dies with this process too. Replies are placed on the CPU, wherever they will be.
    """
    limits = limits or Limits.of(bundle.manifest.size)
    uri, token = settings.milvus
    task = {
        "path": str(bundle.path.absolute()),
        "digest": bundle.digest,
        "limits": asdict(limits),
        "pages": settings.index_pages,
        "milvus": [uri, token],
    }
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "nlu.trial"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=_environment(os.environ),
        start_new_session=True,
    )  # fmt: skip
    with child:
        try:
            said, errors = child.communicate(json.dumps(task).encode(), limits.wall_s)
        except subprocess.TimeoutExpired:
            raise _refused(bundle, f"a load of more than {limits.wall_s:g} s", limits) from None
        finally:
            child.kill()
    return _outcome(bundle, limits, child.returncode, said, errors)


def _outcome(bundle: Bundle, limits: Limits, status: int, said: bytes, errors: bytes) -> Trial:
    try:
        told: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        raise _refused(bundle, _death(status, errors, limits), limits) from None
    if not told.get("ok"):
        raise _refused(bundle, " ".join(str(told.get("refused")).split()), limits)
    return Trial(int(told["rss_bytes"]), float(told["seconds"]))


def _death(status: int, errors: bytes, limits: Limits) -> str:
    """In words, what became of a child that gave no answer."""
    words = " ".join(errors.decode("utf-8", "replace").split())
    last = "".join(character for character in words[-_LAST_WORDS:] if character.isprintable())
    if status == -signal.SIGXCPU:
        return f"a load of more than {limits.cpu_s} s of CPU"
    if status == -signal.SIGKILL:
        return "a load that the system killed, for memory most likely"
    if status < 0:
        return f"a load that died of {signal.Signals(-status).name}" + (f" ({last})" if last else "")
    return f"a load that ended with status {status} ({last or 'no word'})"


def _refused(bundle: Bundle, found: str, limits: Limits) -> EngineRefused:
    return EngineRefused(
        f"trial of bundle {bundle.digest[:12]}",
        found=found,
        expected=f"one that loads within {limits.data_bytes / 2**20:.0f} MiB and {limits.cpu_s} s of CPU",
        remedy="mend or leave out the part at fault, and publish another bundle",
    )


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Enough to find the same code as this process."""
    code = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return {name: ours[name] for name in _KEPT if name in ours} | _ENVIRONMENT | {"PYTHONPATH": code}


# The child


def main() -> None:
    """Read a task from stdin, load under its limits, and say how it went."""
    began_as = os.getppid()
    task = json.load(sys.stdin)
    _confine(Limits(**task["limits"]), began_as)
    try:
        trial = _load(Path(task["path"]), task["digest"], task["pages"], task["milvus"])
        told = {"ok": True} | asdict(trial)
    except (NluError, StaticsError, ValueError) as error:
        told = {"refused": str(error)}
    except MemoryError as error:
        told = {"refused": f"a load that needs more memory ({error or 'none was left'})"}
    except Exception as error:  # whatever it is, the parent is to hear of it
        told = {"refused": f"a load that failed with {type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing that was loaded has a say any more


def _confine(limits: Limits, parent: int) -> None:
    """Before anything of the bundle, or a library that reads it, is loaded."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive who asked
    if os.getppid() != parent:
        os._exit(1)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    with suppress(OSError):  # where memory runs out for all, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    for what, limit in (
        (resource.RLIMIT_DATA, limits.data_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(what)
        # One more as the hard limit, so that too much CPU ends in a signal of its own.
        resource.setrlimit(
            what, (limit, limit + 1) if most == resource.RLIM_INFINITY else (min(limit, most), most)
        )


def _load(path: Path, digest: str, pages: Any, milvus: list[str]) -> Trial:
    from nlu import guard, loading

    guard.arm()
    raw, _ = read_manifest(path, shared=True)
    if manifest_digest(raw) != digest:
        raise ValueError(f"{path}: found bundle {manifest_digest(raw)}, expected {digest}; it was changed")
    held = _memory("VmRSS")
    began = time.monotonic()
    engine = loading.load(Bundle(path, parse(raw), digest), pages=pages, milvus=(milvus[0], milvus[1]))
    seconds = time.monotonic() - began
    most = _memory("VmHWM")
    del engine
    return Trial(max(0, most - held), seconds)


def _memory(field: str) -> int:
    """A line of /proc/self/status, in bytes. Not ru_maxrss: through an exec it keeps what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
