"""Toy bundles of plain bytes, a real S3 server (moto), and a network that does as it is told."""

import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics.bundle import Bundle, Part, build
from statics.signing import Keyring, generate_key
from statics.store import FolderStore

FINGERPRINT = "f" * 64
FILES = {
    "vectorizer.main": {
        "model.onnx": bytes(range(256)) * 20,
        "tokenizer.json": b"{}",
        "vectorizer.json": b"[300]",
    },
    "head.emotion": {"head.json": b'{"task": "emotion"}', "weights.safetensors": b"emotion" * 300},
    "head.intent": {"head.json": b'{"task": "intent"}', "weights.safetensors": b"intent" * 400},
    "rules.clock": {"rules.txt": b""},
}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, so none waits for the disk; test_disk.py looks at the calls."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def make_parts(tmp_path: Path) -> Callable[..., list[Part]]:
    """Parts from FILES; `files={"head.intent": {...}}` replaces, `trained_on` is what the heads require."""

    def make(
        *,
        files: dict[str, dict[str, bytes]] | None = None,
        trained_on: str = FINGERPRINT,
        made: str = FINGERPRINT,
    ) -> list[Part]:
        source, parts = tmp_path / "sources" / uuid.uuid4().hex, []
        for label, content in {**FILES, **(files or {})}.items():
            kind, name = label.split(".")
            folder = source / label
            folder.mkdir(parents=True)
            for file, data in content.items():
                (folder / file).write_bytes(data)
            requires = {"vectorizer": trained_on} if kind == "head" else {}
            provides = {"vectorizer": made} if kind == "vectorizer" else {}
            parts.append(Part(kind, name, folder, requires, provides))
        return parts

    return make


@pytest.fixture
def make_bundle(tmp_path: Path, make_parts: Callable[..., list[Part]]) -> Callable[..., Bundle]:
    """`build` with everything given; `files` as in make_parts."""

    def make(*, files: dict[str, dict[str, bytes]] | None = None, **options: Any) -> Bundle:
        options = {
            "requires_service": ">=1,<2",
            "created": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            **options,
        }
        return build(make_parts(files=files), tmp_path / "built" / uuid.uuid4().hex, **options)

    return make


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return generate_key()[0]


@pytest.fixture
def keyring(key: Ed25519PrivateKey) -> Keyring:
    return Keyring.of(key.public_key())


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in [name for name in os.environ if name.startswith("AWS_ENDPOINT_URL")]:
            patch.delenv(name)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    import boto3  # type: ignore[import-untyped,unused-ignore]

    name = f"statics-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture
def bad_network(s3_endpoint: str) -> Iterator[Callable[[Callable[[socket.socket, bytes, int], None]], str]]:
    """Start a TCP proxy before the S3 server: `send(client, data, sent before)` passes answers on, or not."""
    host, port = s3_endpoint.removeprefix("http://").split(":")
    listeners: list[socket.socket] = []

    def start(send: Callable[[socket.socket, bytes, int], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=_accept, args=(listener, (host, int(port)), send), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Front(ThreadingHTTPServer):
    """Answers S3's GET out of the folder of a FolderStore, under any bucket name; its moods are options."""

    def __init__(self, root: Path, *, ranges: bool = True, busy: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.root, self.ranges, self.busy = root, ranges, busy
        self.refused = 0
        self.ranges_asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        front = self.server
        assert isinstance(front, Front)
        if "/blobs/" in self.path and front.refused < front.busy:
            front.refused += 1
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
        path = front.root / self.path.split("?")[0].split("/", 2)[2]
        if not path.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        body, asked = path.read_bytes(), self.headers.get("Range")
        if asked is None:
            return self.answer(200, body)
        front.ranges_asked.append(asked)
        offset = int(re.findall(r"\d+", asked)[0])
        if not front.ranges:
            return self.answer(200, body)
        if offset >= len(body):
            return self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
        return self.answer(206, body[offset:], f"bytes {offset}-{len(body) - 1}/{len(body)}")

    def answer(self, status: int, body: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Front]]:
    """Start a Front."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with ExitStack() as stack:

        def start(root: Path, **options: Any) -> Front:
            server = stack.enter_context(Front(root, **options))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


def _accept(
    listener: socket.socket, upstream: tuple[str, int], send: Callable[[socket.socket, bytes, int], None]
) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        server = socket.create_connection(upstream)
        threading.Thread(target=_pump, args=(client, server, None), daemon=True).start()
        threading.Thread(target=_pump, args=(server, client, send), daemon=True).start()


def _pump(
    source: socket.socket, target: socket.socket, send: Callable[[socket.socket, bytes, int], None] | None
) -> None:
    sent = 0
    try:
        while data := source.recv(16 * 1024):
            if send is None:
                target.sendall(data)
            else:
                send(target, data, sent)
            sent += len(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        end.close()
