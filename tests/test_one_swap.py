"""The flow of docs/hot-swap.md: releases come, good and bad, while callers ask without a pause; and a stop at any moment."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nlu import memory, metrics, origin
from nlu.settings import Settings
from nlu.steward import Steward
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.verify import Trust, verify_bundle
from statics.version import service_version
from tests.nlu.test_memory import group
from tests.nlu.test_steward import CHANNEL, Rig, followed, rig, shuffle, until
from tests.test_one_candidate import SAID, Callers
from tests.test_one_utterance import turn
from tests.tiny import Made, make_bundle, make_parts

__all__ = ["group", "rig"]  # fixtures


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Two bundles on two vectorizers; whatever one of them says begins with its mark."""
    folder = tmp_path_factory.mktemp("marked")
    whole = make_bundle(folder / "whole").bundle
    return (
        Made(whole, make_parts(folder / "a", seed=0, mark="a.")),
        Made(whole, make_parts(folder / "b", seed=1, mark="b.")),
    )


def marks(reply: pb.UnderstandReply) -> set[str]:
    """Who had a part in an answer."""
    said = [label.label for annotation in reply.annotations for label in annotation.labels]
    said += [span.label for annotation in reply.annotations for span in annotation.spans]
    said += [candidate.id for candidate in reply.replies] + [candidate.text for candidate in reply.replies]
    return {text[:2] for text in said}


def _is(steward: Steward, field: str, digest: str) -> bool:
    return bool(getattr(steward.release, field) == digest)


def counted(code: StatusCode) -> float:
    labels = {"method": "Understand", "code": code.name}
    return metrics.REGISTRY.get_sample_value("nlu_calls_total", labels) or 0.0


@pytest.mark.parametrize("answers_bytes", [0, 2**20], ids=["computed", "kept answers"])
async def test_swap_under_load_loses_no_call_and_mixes_no_answer(
    marked: tuple[Made, Made], tmp_path: Path, answers_bytes: int
) -> None:
    rig = Rig(tmp_path, marked[0])
    settings = rig.settings(answers_bytes=answers_bytes, queue_s=60, workers=1)
    says = {rig.publish(1).digest: "a."}
    async with followed(settings) as (steward, stub):
        await steward.serving.wait()
        before = {code: counted(code) for code in StatusCode}
        callers = Callers(stub, 4)
        for seq in range(2, 8):
            if seq == 5:  # one that is refused, in the middle of it all
                bad = rig.publish(seq, made=marked[1], edit=shuffle)
                await until(partial(_is, steward, "wanted", bad.digest))
                await callers.answered(10)
                continue
            good = rig.publish(seq, made=marked[seq % 2])
            says[good.digest] = "ab"[seq % 2] + "."
            await until(partial(_is, steward, "bundle", good.digest))
            await callers.answered(10)
        await callers.stop()
        after = {code: counted(code) for code in StatusCode}
    assert {reply.versions.bundle for _, reply in callers.replies} == set(says)
    for _, reply in callers.replies:
        assert marks(reply) == {says[reply.versions.bundle]}
    assert {code: after[code] - before[code] for code in StatusCode if after[code] != before[code]} == {
        StatusCode.OK: len(callers.replies)
    }
    assert {text for text, _ in callers.replies} == set(SAID)


async def test_swap_control_a_mixed_answer_is_seen(marked: tuple[Made, Made], tmp_path: Path) -> None:
    rig = Rig(tmp_path, marked[0])
    rig.publish(1)
    async with followed(rig.settings()) as (steward, stub):
        await steward.serving.wait()
        mixed: pb.UnderstandReply = await stub.Understand(turn("stop it"))
        second = rig.publish(2, made=marked[1])
        await until(lambda: steward.release.bundle == second.digest)
        other: pb.UnderstandReply = await stub.Understand(turn("stop it"))
    assert (marks(mixed), marks(other)) == ({"a."}, {"b."})
    mixed.annotations.append(other.annotations[0])
    assert marks(mixed) == {"a.", "b."}


# A process, and a stop at any moment


class Serving:
    """`nlu serve` as an operator starts it; its log is read as it comes."""

    def __init__(self, rig: Rig, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
        given = {
            "NLU_STORE": str(rig.folder / "store"), "NLU_CHANNEL": CHANNEL, "NLU_STATICS": str(rig.root), "NLU_PORT": "0",
            "NLU_METRICS": "false", "NLU_WATCH_S": "0.05", "NLU_TRIAL": "never", "NLU_LOG_LEVEL": "DEBUG",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nlu", "serve"],
            env=clean | given | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def close(self) -> None:
        """The rest of the log, once the process has ended."""
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            assert self.process.poll() is None, self.log
            time.sleep(0.01)

    def says(self, words: str) -> None:
        self.until(lambda: words in self.log)

    def stops(self) -> None:
        """With status 0. What is under way would take far longer than we wait."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=20) == 0, self.log
        assert "Traceback" not in self.log

    @property
    def port(self) -> int:
        found = re.search(r"listening on 127\.0\.0\.1:(\d+)", self.log)
        assert found is not None
        return int(found[1])


@contextmanager
def serving(rig: Rig, **variables: str) -> Iterator[Serving]:
    server = Serving(rig, **variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        server.close()


def whole(root: Path) -> set[str]:
    """The bundles of a root, every one of which must be whole."""
    folders = sorted((root / "bundles").glob("*")) if (root / "bundles").exists() else []
    return {verify_bundle(folder, Trust(service_version())).digest for folder in folders}


def test_swap_stop_while_a_release_is_pulled_leaves_no_visible_part(rig: Rig) -> None:
    first = rig.publish(1)
    with serving(rig, NLU_PULL_BYTES_S="2000") as server:  # half a minute for this bundle
        server.says("listening on")
        server.until(lambda: any((rig.root / "blobs").glob("*")))
        server.stops()
    assert whole(rig.root) == set()
    assert not (rig.root / "current.json").exists()
    with serving(rig) as server:
        server.says(f"bundle {first.digest[:12]} serves")
        server.stops()
    assert whole(rig.root) == {first.digest}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle that takes a while to load."""
    folder = tmp_path_factory.mktemp("slow")
    return Made(make_bundle(folder / "whole").bundle, make_parts(folder / "parts", seed=3, work=2))


@pytest.mark.parametrize("trial", ["never", "always"])
def test_swap_stop_while_a_release_is_loaded_does_not_wait_for_it(rig: Rig, slow: Made, trial: str) -> None:
    first = rig.publish(1)
    with serving(rig, NLU_TRIAL=trial) as server:
        server.says("serving on")
        second = rig.publish(2, made=slow)
        server.until(lambda: (rig.root / "bundles" / second.digest).exists())
        server.stops()
        assert f"bundle {second.digest[:12]} serves" not in server.log
    assert whole(rig.root) == {first.digest, second.digest}
    settings = Settings(store=str(rig.folder / "store"), channel=CHANNEL, statics=rig.root)
    found = origin.last_good(settings)
    assert found is not None and found.digest == first.digest  # what never served is not current


def test_swap_stop_while_nothing_is_fit_to_serve(rig: Rig) -> None:
    with serving(rig) as server:
        server.says("holding")
        server.stops()


def test_swap_told_to_look_looks_at_once(rig: Rig) -> None:
    rig.publish(1)
    with serving(rig, NLU_WATCH_S="0") as server:
        server.says("serving on")
        second = rig.publish(2)
        server.process.send_signal(signal.SIGHUP)
        server.says(f"bundle {second.digest[:12]} serves")
        server.stops()


def test_swap_that_would_not_fit_the_control_group_is_refused_and_nobody_is_killed(
    rig: Rig, group: Path
) -> None:
    rig.publish(1)
    with serving(rig) as server:
        (group / "cgroup.procs").write_text(str(server.process.pid))
        server.says("serving on")
        (group / "memory.limit_in_bytes").write_text(str(memory.rss_bytes(server.process.pid) * 11 // 10))
        second = rig.publish(2)
        server.says(f"bundle {second.digest[:12]} is not served: memory: found")
        assert f"bundle {second.digest[:12]} serves" not in server.log
        (group / "memory.limit_in_bytes").write_text("-1")  # the control
        server.process.send_signal(signal.SIGHUP)
        server.says(f"bundle {second.digest[:12]} serves")
        server.stops()


def test_swap_named_bundle_that_is_bad_is_one_clear_line_and_status_1(rig: Rig) -> None:
    bad = rig.build(1, edit=shuffle)
    with serving(rig, NLU_BUNDLE=str(bad.path)) as server:
        assert server.process.wait(timeout=60) == 1
    assert "nlu: head intent: found" in " ".join(server.log.split())
    assert "Traceback" not in server.log


async def test_swap_stop_under_load_answers_every_call_it_accepted(rig: Rig) -> None:
    """Half a second before the listener closes health says so: callers that heed it lose nothing."""
    rig.publish(1)
    with serving(rig, NLU_LINGER_S="0.5", NLU_QUEUE_S="60") as server:
        await asyncio.to_thread(server.says, "serving on")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            callers = Callers(NluStub(channel), 4)  # type: ignore[no-untyped-call]
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await callers.answered(50)
            server.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await callers.stop()  # raises what any call raised
        assert await asyncio.to_thread(server.process.wait, 20) == 0
