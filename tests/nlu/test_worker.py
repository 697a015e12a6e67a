"""nlu.worker as processes: they end with their supervisor, however that ends, and load only what they were told to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from nlu.worker import bundle_at
from statics.errors import DigestMismatch, FileMissing, StaticsError
from tests.test_one_utterance import turn
from tests.tiny import Made

DRAIN_S = 1000  # longer than any test: what ends sooner was not waited for


@dataclass
class Command:
    """`nlu serve` as it runs, with two workers."""

    process: subprocess.Popen[str]
    port: int
    workers: list[psutil.Process]
    said: list[str]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def send(self, name: signal.Signals) -> None:
        self.process.send_signal(name)


@contextmanager
def command(made: Made, folder: Path, **variables: str) -> Iterator[Command]:
    """Started as an operator starts it, in a process group of its own; nothing of it is left behind."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "nlu", "serve", "--bundle", str(made.bundle.path), "--port", "0"],
        env=clean | {"NLU_PROCESSES": "2", "NLU_METRICS": "false", "NLU_DRAIN_S": str(DRAIN_S)} | variables,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    assert process.stderr is not None
    said: list[str] = []
    port = 0
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"serving on 127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
            break
    assert port, "".join(said)
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "nlu.worker" in child.cmdline()]
    try:
        yield Command(process, port, workers, said)
    finally:
        for each in (*workers, process):
            if isinstance(each, psutil.Process) and not each.is_running():
                continue
            each.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def ended(workers: list[psutil.Process]) -> bool:
    """Waits for all of them."""
    _, alive = psutil.wait_procs(workers, timeout=60)
    return not alive


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def stream(target: str) -> Iterator[Iterator[pb.Outcome]]:
    """A conversation that its caller does not end; a server that drains waits for it."""
    told, over = threading.Event(), threading.Event()

    def turns() -> Iterator[pb.UnderstandRequest]:
        yield turn("play music")
        told.set()
        over.wait(100)

    with grpc.insecure_channel(target) as channel:
        outcomes = NluStub(channel).UnderstandStream(turns())  # type: ignore[no-untyped-call]
        assert next(outcomes).reply.phrase == "play music"
        try:
            yield outcomes
        finally:
            over.set()


def test_worker_processes_end_with_status_0_when_told_to_stop(tiny: Made, tmp_path: Path) -> None:
    with command(tiny, tmp_path) as served:
        assert len(served.workers) == 2
        with grpc.insecure_channel(served.target) as channel:
            stub = NluStub(channel)  # type: ignore[no-untyped-call]
            assert stub.Understand(turn("play music")).versions.bundle == tiny.bundle.digest
        served.send(signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert ended(served.workers) and not reachable(served.port)
    assert "Traceback" not in "".join(served.said)


def test_worker_processes_finish_what_they_began_and_a_second_signal_hurries(
    tiny: Made, tmp_path: Path
) -> None:
    with command(tiny, tmp_path) as served, stream(served.target) as outcomes:
        served.send(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(2)  # the conversation is under way
        served.send(signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert ended(served.workers)
        with pytest.raises(grpc.RpcError):
            next(outcomes)


def test_worker_processes_drain_where_the_whole_group_is_told(tiny: Made, tmp_path: Path) -> None:
    """As service managers and terminals do."""
    for name in (signal.SIGTERM, signal.SIGINT):
        with command(tiny, tmp_path) as served:
            os.killpg(served.process.pid, name)
            assert served.process.wait(60) == 0
            assert ended(served.workers)
        assert "Traceback" not in "".join(served.said)


def test_worker_ends_when_its_supervisor_is_killed(tiny: Made, tmp_path: Path) -> None:
    with command(tiny, tmp_path) as served:
        assert all(worker.is_running() for worker in served.workers)
        served.send(signal.SIGKILL)
        served.process.wait(60)
        assert ended(served.workers) and not reachable(served.port)


def test_worker_whose_supervisor_is_killed_finishes_what_it_began(tiny: Made, tmp_path: Path) -> None:
    with command(tiny, tmp_path) as served, stream(served.target) as outcomes:
        served.send(signal.SIGKILL)
        served.process.wait(60)
        _, alive = psutil.wait_procs(served.workers, timeout=3)
        assert len(alive) == 1, "the one that has the conversation"
        outcomes.cancel()  # type: ignore[attr-defined]
        assert ended(served.workers)


def test_worker_is_replaced_while_the_command_runs(tiny: Made, tmp_path: Path) -> None:
    with command(tiny, tmp_path) as served:
        served.workers[0].kill()
        served.workers[0].wait(60)
        while sum("nlu.worker" in child.cmdline() for child in _children(served)) < 2:
            assert served.process.poll() is None
        served.send(signal.SIGTERM)  # also while one is just starting
        assert served.process.wait(60) == 0
        assert not [child for child in served.workers if child.is_running()]


def _children(served: Command) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(served.process.pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
    ]


# -- what it loads ------------------------------------------------------------------------------------------------


def test_worker_takes_the_bundle_it_was_told(tiny: Made) -> None:
    assert bundle_at(tiny.bundle.path, tiny.bundle.digest, whole=True) == tiny.bundle


def test_worker_refuses_a_folder_with_another_bundle(tiny: Made, stranger: Made, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        bundle_at(stranger.bundle.path, tiny.bundle.digest, whole=False)
    with pytest.raises(FileMissing):
        bundle_at(tmp_path, tiny.bundle.digest, whole=False)


def test_worker_reads_every_byte_again_where_that_may_be_long_ago(tiny: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.bundle.path, tmp_path / "bundle")
    file = folder / "head.intent" / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    bundle_at(folder, tiny.bundle.digest, whole=False)  # the control: the manifest alone says nothing of it
    with pytest.raises(StaticsError, match="digest-mismatch"):
        bundle_at(folder, tiny.bundle.digest, whole=True)
