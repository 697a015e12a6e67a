"""From an empty virtual environment to the first answer: how long does a newcomer wait, and how much disk does it take?

    python -m benchmarks.firstanswer            # pip takes packages from where it is set up to, its cache included
    python -m benchmarks.firstanswer --no-cache # downloads everything

Installs `.[cpu]` from a copy of the checkout's files, as a clone would have them, starts `nlu serve`, which then serves
the shipped bundle, and asks one phrase.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks.result import emit
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub

ROOT = Path(__file__).parent.parent
PHRASE = "wake me up at half past six tomorrow"


def main() -> None:
    """Install, serve, ask; print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-cache", action="store_true", help="let pip download what it has in its cache")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, venv = Path(folder) / "source", Path(folder) / "venv"
        _copy(source)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *["--no-cache-dir"] * arguments.no_cache, f"{source}[cpu]"], check=True)
        installed = time.perf_counter()
        size = sum(path.lstat().st_size for path in venv.rglob("*") if path.is_file())
        shutil.rmtree(source)  # what answers is what was installed
        with _serving(venv, Path(folder)) as (target, ready_s):
            first_ms, digest = _ask(target)
            second_ms, _ = _ask(target)
        torch = subprocess.run(
            [str(venv / "bin/python"), "-c", "import torch"], stderr=subprocess.DEVNULL, check=False
        )
    emit(
        "firstanswer",
        {
            "install_s": installed - began,
            "ready_s": ready_s,
            "first_answer_ms": first_ms,
            "same_answer_again_ms": second_ms,
            "installed_mb": size / 1e6,
            "torch_installed": float(torch.returncode == 0),
        },
        [],
        bundle=digest,
        pip_cache="no" if arguments.no_cache else "as found",
    )


def _copy(target: Path) -> None:
    """The files of the checkout that git knows or would add: none of a virtual environment, a cache or a former build."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


@contextmanager
def _serving(venv: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """`nlu serve` as installed, as its address and the seconds until it was SERVING."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NLU_") and name != "PYTHONPATH"
    }
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(venv / "bin/nlu"), "serve", "--port", str(port)], cwd=folder, env=clean | {"NLU_METRICS": "false"}, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "serving on" in line:
                break
        else:
            raise SystemExit("".join(said))
        yield f"127.0.0.1:{port}", time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.close()
        process.wait(timeout=30)


def _ask(target: str) -> tuple[float, str]:
    """Milliseconds of one `Understand` over a fresh connection, and the digest of the bundle that answered."""
    request = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=PHRASE)])
    began = time.perf_counter()
    with grpc.insecure_channel(target) as channel:
        reply = NluStub(channel).Understand(request, timeout=10)  # type: ignore[no-untyped-call]
    return (time.perf_counter() - began) * 1000, reply.versions.bundle


if __name__ == "__main__":
    main()
