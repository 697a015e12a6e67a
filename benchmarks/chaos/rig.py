"""Real processes on this machine: redis-server, two S3 servers, and `nlu serve` as an operator starts it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.request import urlopen

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from nlu.v1 import control_pb2, nlu_pb2
from nlu.v1.control_pb2_grpc import ControlStub
from nlu.v1.nlu_pb2_grpc import NluStub

ACCESS, SECRET, BUCKET = "AKIACHAOSCHAOS", "secret-of-the-chaos-rig", "statics"
READY_S = 60.0
SERVER_CORE, LOAD_CORE = 0, 1  # the server has one core, load and helpers the other


@dataclass
class Rig:
    """Starts processes in `work` and ends them all."""

    work: Path
    _ends: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Rig:
        self.work.mkdir(parents=True, exist_ok=True)
        for name, value in s3_environment().items():
            os.environ[name] = value
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        core: int | None = None,
    ) -> Process:
        """A process in a group of its own; killed with the rig."""
        process = Process.start(command, log=log, env={**os.environ, **(env or {})}, core=core)
        self._ends.callback(process.kill)
        return process

    def redis(self, *options: str, port: int = 0) -> Redis:
        """A redis-server that keeps nothing on disk."""
        redis = Redis(self, port or free_port(), options)
        redis.start()
        return redis

    def moto(self) -> S3:
        """An S3 server that knows conditional writes and versions, and checks no signature."""
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = self.start(command, log=self.work / "moto.log", core=LOAD_CORE)
        wait_for(port, process)
        store = S3("moto", port, None)
        store.make_bucket()
        return store

    def rclone(self) -> S3:
        """An S3 server that checks signatures and keeps objects as files we can spoil."""
        port, folder = free_port(), self.work / "rclone"
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}",
            "--auth-key", f"{ACCESS},{SECRET}", "--vfs-cache-mode", "off", "--dir-cache-time", "0s", str(folder),
        ]  # fmt: skip
        process = self.start(command, log=self.work / "rclone.log", core=LOAD_CORE)
        wait_for(port, process)
        return S3("rclone", port, folder / BUCKET)

    def serve(self, name: str, **settings: object) -> Server:
        """`nlu serve` with these settings (without NLU_), ready or not; all its ports are free ones."""
        return Server.start(self, name, settings)


@dataclass
class Process:
    """A child, its group and its log."""

    popen: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls, command: Sequence[str], *, log: Path, env: Mapping[str, str], core: int | None = None
    ) -> Process:
        pinned = ["taskset", "-c", str(core)] if core is not None and (os.cpu_count() or 1) > core else []
        file: IO[bytes] = open(log, "ab")
        with file:
            popen = subprocess.Popen(
                [*pinned, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        return cls(popen, log)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: int) -> None:
        """To the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def end(self, *, within_s: float = 30.0) -> int:
        """SIGTERM to the process we started, and its exit status."""
        self.popen.terminate()
        return self.popen.wait(within_s)

    def says(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def rss(self) -> int:
        """Resident bytes of the process and its children."""
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            for process in (top, *top.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time of the process and its children."""
        top = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
        return float(sum(each.user + each.system for each in times))


class Redis:
    """A real redis-server and the ways to hurt it."""

    def __init__(self, rig: Rig, port: int, options: Sequence[str]) -> None:
        self._rig, self.port, self._options = rig, port, options
        self.process: Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(self._rig.work), *self._options,
        ]  # fmt: skip
        self.process = self._rig.start(command, log=self._rig.work / "redis.log", core=LOAD_CORE)
        wait_for(self.port, self.process)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def freeze(self) -> None:
        if self.process is not None:
            self.process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process is not None:
            self.process.signal(signal.SIGCONT)

    def do(self, *command: str) -> str:
        """redis-cli."""
        answer = subprocess.run(
            ["redis-cli", "-p", str(self.port), *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return answer.stdout


@dataclass(frozen=True)
class S3:
    """An S3 server; `files` is where its objects lie as files, if they do."""

    name: str
    port: int
    files: Path | None

    def make_bucket(self) -> None:
        import boto3  # type: ignore[import-untyped,unused-ignore]

        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}").create_bucket(Bucket=BUCKET)


@dataclass
class Server:
    """`nlu serve`, from outside: its port, its control socket, its metrics, its log."""

    process: Process
    port: int
    metrics_port: int
    control: str
    http_port: int

    @classmethod
    def start(cls, rig: Rig, name: str, settings: Mapping[str, object]) -> Server:
        port, metrics_port, http_port = free_port(), free_port(), free_port()
        folder = rig.work / name
        folder.mkdir(parents=True, exist_ok=True)
        chosen: dict[str, object] = {
            "host": "127.0.0.1", "port": port, "metrics_port": metrics_port, "control": f"unix:{folder}/control.sock",
            "watch_s": 0, "workers": 1, **settings,
        }  # fmt: skip
        module = str(chosen.pop("module", "nlu"))
        core = chosen.pop("core", SERVER_CORE)
        env = {f"NLU_{key.upper()}": _text(value) for key, value in chosen.items()}
        command = [sys.executable, "-m", module, *(["serve"] if module == "nlu" else [])]
        process = rig.start(
            command,
            log=folder / f"{time.time_ns()}.log",
            env=env,
            core=None if core is None else int(str(core)),
        )
        return cls(process, int(str(chosen["port"])), metrics_port, str(chosen["control"]), http_port)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_ready(self, within_s: float = READY_S) -> Server:
        """Until health says SERVING; RuntimeError with the log where it ends or takes too long."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if self.process.popen.poll() is not None:
                break
            if self.health() == health_pb2.HealthCheckResponse.SERVING:
                return self
            time.sleep(0.02)
        raise RuntimeError(f"the server did not get ready:\n{self.process.says()[-4000:]}")

    def health(self, service: str = "") -> int:
        """What grpc.health.v1 says; -1 where nobody answers."""
        with grpc.insecure_channel(self.target, options=(("grpc.enable_retries", 0),)) as channel:
            try:
                stub = health_pb2_grpc.HealthStub(channel)
                return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1).status)
            except grpc.RpcError:
                return -1

    def describe(self) -> nlu_pb2.DescribeReply:
        with grpc.insecure_channel(self.target) as channel:
            reply: nlu_pb2.DescribeReply = NluStub(channel).Describe(nlu_pb2.DescribeRequest(), timeout=5)  # type: ignore[no-untyped-call]
            return reply

    def state(self) -> nlu_pb2.Release:
        """From the control socket, so that it works before there is a bundle."""
        with grpc.insecure_channel(self.control) as channel:
            found: nlu_pb2.Release = ControlStub(channel).State(control_pb2.StateRequest(), timeout=5)  # type: ignore[no-untyped-call]
            return found

    def swap(self, digest: str = "", *, timeout_s: float = 60.0) -> control_pb2.SwapReply:
        """Ask for a release; raises grpc.RpcError where it is refused."""
        with grpc.insecure_channel(self.control) as channel:
            reply: control_pb2.SwapReply = ControlStub(channel).Swap(  # type: ignore[no-untyped-call]
                control_pb2.SwapRequest(digest=digest), timeout=timeout_s
            )
            return reply

    def metrics(self) -> dict[str, float]:
        """Every sample as `name{label="value",...}`; those of several workers are summed."""
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return samples(answer.read().decode())

    def calls(self) -> dict[str, int]:
        """Finished calls of Understand by status code."""
        found: dict[str, int] = {}
        for name, value in self.metrics().items():
            match = re.fullmatch(r'nlu_calls_total\{code="(\w+)",method="Understand"\}', name)
            if match and value:
                found[match[1]] = int(value)
        return found


def samples(exposition: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = {name: value for name, value in sorted(sample.labels.items()) if name != "worker"}
            inside = ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items())
            name = f"{sample.name}{{{inside}}}" if labels else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def s3_environment() -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: Process, within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end and process.popen.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}:\n{process.says()[-2000:]}")


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This process on one core, as far as there are two."""
    before = os.sched_getaffinity(0)
    if core is not None and core in before and len(before) > 1:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)
