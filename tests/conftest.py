"""What many tests share: a tiny whole bundle, a real redis-server, a real S3-compatible server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from nlu import loading
from nlu.engine import Engine
from nlu.vectorizer import Vectorizer
from tests.tiny import Made, make_bundle, make_vectorizer

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle and its parts; do not change them in place, copy first."""
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same bundle on another vectorizer of the same shape."""
    return make_bundle(tmp_path_factory.mktemp("stranger"), seed=1)


@pytest.fixture(scope="session")
def vectorizer(tmp_path_factory: pytest.TempPathFactory) -> Vectorizer:
    """The tiny vectorizer, loaded."""
    return Vectorizer(make_vectorizer(tmp_path_factory.mktemp("vectorizer") / "tiny"))


@pytest.fixture(scope="session")
def engine(tiny: Made) -> Engine:
    """The tiny bundle, loaded."""
    return loading.load(tiny.bundle)


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A real redis-server on a free port, with the signals to hurt it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(folder), *options,
        ]  # fmt: skip
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return process
            time.sleep(0.02)
        process.kill()
        raise RuntimeError(f"redis-server did not start: {' '.join(self._command)}")

    def stop(self) -> None:
        """Kill it, without a goodbye."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """On the same port, empty."""
        self.process = self._start()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server of this test alone."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server is not installed; `make test` installs it with apt-get when root")
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3-compatible server (moto) speaking HTTP on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tensors of a few rows gain nothing from a team of threads, and lose much where cores are busy."""
    torch = pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
