"""From `nlu index push` to answers: a bundle that points to Milvus gives the replies of the bundle it was made from, and
goes on understanding while Milvus is away.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvus_lite.adapter.grpc.server import start_server_in_thread
from pymilvus.client.connection_manager import ConnectionManager

from index import milvus
from nlu import loading, metrics, parts
from nlu.errors import EngineRefused
from nlu.v1 import nlu_pb2 as pb
from statics.bundle import Bundle, build
from tests.test_one_utterance import serving, turn
from tests.tiny import CREATED, Made


@dataclass
class Server:
    """A Milvus Lite that answers over gRPC until it is stopped."""

    uri: str
    running: Any
    database: Any

    def stop(self) -> None:
        self.running.stop(grace=None).wait()
        self.database.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(milvus, "SEARCH_S", 30.0)  # this machine may be busy
    monkeypatch.setattr(milvus, "CONNECT_S", 5.0)
    running, database, port = start_server_in_thread(str(tmp_path / "milvus"))
    server = Server(f"http://127.0.0.1:{port}", running, database)
    yield server
    ConnectionManager.get_instance().close_all()
    server.stop()


def push(*arguments: object, ok: bool = True) -> str:
    """What the command says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    done = subprocess.run(
        [sys.executable, "-m", "nlu", "index", "push", *map(str, arguments)],
        capture_output=True, text=True, env=clean, timeout=100,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if ok else " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def pointing(tiny: Made, server: Server, tmp_path: Path) -> Bundle:
    """The tiny bundle with its replies in Milvus."""
    folder = Path(shutil.copytree(tiny.parts, tmp_path / "parts"))
    out = tmp_path / "pushed" / "index.chitchat"
    told = json.loads(
        push(
            folder / "index.chitchat", "--out", out, "--collection", "chitchat", "--uri", server.uri,
            "--float32", "--json",
        )
    )  # fmt: skip
    assert (told["folder"], told["collection"], told["kind"]) == (str(out), "chitchat", "milvus")
    assert sorted(path.name for path in out.iterdir()) == ["canaries.safetensors", "index.json"]
    shutil.rmtree(folder / "index.chitchat")
    out.rename(folder / "index.chitchat")
    return build(
        parts.collect(folder), tmp_path / "bundle", created=CREATED, requires_service=">=0.1.0.dev0,<1"
    )


async def test_milvus_bundle_answers_as_the_one_it_was_made_from(
    tiny: Made, pointing: Bundle, server: Server
) -> None:
    asked = [
        turn(text, persona=persona, explain=True)
        for text in ("hello", "you are so annoying", "lamp on")
        for persona in ("calm", "lively")
    ]
    async with serving(tiny) as here, serving(replace(tiny, bundle=pointing), milvus_uri=server.uri) as there:
        for request in asked:
            mine, other = await here.Understand(request), await there.Understand(request)
            assert [reply.id for reply in other.replies] == [reply.id for reply in mine.replies]
            assert len(mine.replies) > 1
            for reply, twin in zip(mine.replies, other.replies, strict=True):
                assert twin.score == pytest.approx(reply.score, abs=1e-4)


async def test_milvus_away_costs_the_replies_and_nothing_else(
    tiny: Made, pointing: Bundle, server: Server
) -> None:
    """Nor is an answer without them kept, to be given again when they are back."""
    before = metrics.SEARCHES_FAILED.labels().value
    async with serving(replace(tiny, bundle=pointing), milvus_uri=server.uri) as stub:
        whole = await stub.Understand(turn("hello"))
        assert (
            await stub.Understand(turn("hello"))
        ).source == pb.SOURCE_ANSWER  # the control: a whole one is kept
        server.stop()
        for _ in range(2):
            reply = await stub.Understand(turn("lamp on"))
            assert not reply.replies
            assert reply.source != pb.SOURCE_ANSWER
            assert {each.name for each in reply.annotations} == {each.name for each in whole.annotations}
        assert metrics.SEARCHES_FAILED.labels().value == before + 2
        with pytest.raises(
            grpc.aio.AioRpcError, match="persona"
        ):  # what is known without asking it is checked
            await stub.Understand(turn("lamp on", persona="nobody"))


def test_milvus_bundle_is_refused_where_its_replies_cannot_be_reached(
    pointing: Bundle, server: Server
) -> None:
    loading.load(pointing, milvus=(server.uri, ""))  # the control
    with pytest.raises(EngineRefused, match="index chitchat: .* set NLU_MILVUS_URI"):
        loading.load(pointing)
    with pytest.raises(EngineRefused, match="index chitchat: .*Fail connecting"):
        loading.load(pointing, milvus=("http://127.0.0.1:1", ""))


def test_milvus_bundle_needs_its_extra(pointing: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "index.milvus", None)
    with pytest.raises(EngineRefused, match="expected the 'milvus' extra"):
        loading.load(pointing)


@pytest.mark.parametrize(
    ("out", "without", "words"),
    [
        ("pointer", "", "--out: found 'pointer', expected a folder called index.NAME"),
        (
            "index.chitchat",
            "canaries.safetensors",
            "found no canaries.safetensors, expected a part of a bundle",
        ),
        ("index.chitchat", "", "which MilvusLite does not support"),
    ],
    ids=["out", "canaries", "float16"],
)
def test_milvus_push_errors_are_clear_lines(
    tiny: Made, server: Server, tmp_path: Path, out: str, without: str, words: str
) -> None:
    index = Path(shutil.copytree(tiny.parts / "index.chitchat", tmp_path / "index.chitchat"))
    if without:
        (index / without).unlink()
    said = push(
        index, "--out", tmp_path / "out" / out, "--collection", "chitchat", "--uri", server.uri, ok=False
    )
    assert words in said
    assert not (tmp_path / "out" / out).exists()
