"""The flow of a candidate: a shadow beside the live head, then live, then back again; over the command line and gRPC."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from annotators.annotator import Span
from nlu import loading, metrics
from nlu.desk import Desk
from nlu.heads import lifecycle
from nlu.pipeline import Pipeline
from nlu.rpc import SERVER_OPTIONS, NluServicer
from nlu.serve import pipeline_of, running
from nlu.settings import Settings
from nlu.shadow import redact
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from tests.nlu.heads.test_lifecycle import edited
from tests.nlu.test_main import nlu
from tests.nlu.test_shadow import contrary
from tests.test_one_utterance import annotation, turn
from tests.tiny import Made

SAID = ("stop it", "play music", "lamp on", "so annoying", "wake me at six, or write to anna@example.com")


def facts(reply: pb.UnderstandReply, *, but: frozenset[str] = frozenset()) -> bytes:
    """All a reply says, apart from the call, the versions and the heads that are left out."""
    kept = pb.UnderstandReply()
    kept.CopyFrom(reply)
    for field in ("request_id", "timings_ns", "source", "versions"):
        kept.ClearField(field)
    del kept.annotations[:]
    kept.annotations.extend(found for found in reply.annotations if found.name not in but)
    return kept.SerializeToString(deterministic=True)


async def answers(bundle: Path, sample: Path | None = None) -> list[pb.UnderstandReply]:
    """What a server answers to everything, and to everything again."""
    settings = Settings(bundle=bundle, port=0, metrics=False, shadow_sample=sample)
    async with running(settings) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        return [await stub.Understand(turn(text)) for text in SAID * 2]


def counted() -> float:
    found = [
        metrics.REGISTRY.get_sample_value("nlu_shadow_answers_total", {"head": "intent", "verdict": verdict})
        for verdict in ("same", "flip", "abstains", "speaks")
    ]
    return sum(value or 0.0 for value in found)


async def test_candidate_is_shadowed_promoted_and_rolled_back(tiny: Made, tmp_path: Path) -> None:
    head = contrary(tiny, tmp_path / "run")
    bundle = str(tiny.bundle.path)
    done = nlu("heads", "shadow", str(head), "--bundle", bundle, "--out", "one", "--json", cwd=tmp_path)
    made = json.loads(done.stdout)
    assert [(change["part"], change["what"]) for change in made["changes"]] == [("shadow.intent", "added")]
    assert made["seq"] == tiny.bundle.manifest.seq + 1
    assert made["bytes_to_pull"] == (head / "head.json").stat().st_size

    sample = tmp_path / "flips.jsonl"
    live = await answers(tiny.bundle.path)
    before = counted()
    beside = await answers(tmp_path / "one", sample)
    assert [facts(reply) for reply in beside] == [facts(reply) for reply in live]
    assert counted() == before + 2 * len(SAID)
    assert pb.SOURCE_ANSWER in [reply.source for reply in live]
    assert pb.SOURCE_ANSWER not in [reply.source for reply in beside]  # the shadow sees every turn
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * len(SAID)
    assert stat.S_IMODE(sample.stat().st_mode) == 0o600
    assert [row["phrase"] for row in rows] == [
        redact(
            text,
            [Span(found.label, found.start, found.end, 1.0) for found in annotation(reply, "slots").spans],
        )
        for text, reply in zip(SAID * 2, live, strict=True)
    ]
    kept = sample.read_text(encoding="utf-8")
    assert "<time>" in kept and "<email>" in kept and "six" not in kept and "example" not in kept

    page = nlu("heads", "promote", "intent", "--bundle", "one", "--out", "two", cwd=tmp_path).stdout
    assert "a pod that holds the old bundle pulls 0 bytes" in page
    assert "nlu serve --bundle two" in page and "nlu bundle publish two STORE" in page
    promoted = await answers(tmp_path / "two")
    but = frozenset({"intent"})
    assert [facts(reply, but=but) for reply in promoted] == [facts(reply, but=but) for reply in live]
    assert annotation(live[0], "intent").labels[0].label == "stop"
    assert annotation(promoted[0], "intent").labels[0].label == "lights_on"

    nlu("heads", "rollback", "intent", "--bundle", "two", "--out", "two", cwd=tmp_path)
    assert [facts(reply) for reply in await answers(tmp_path / "two")] == [facts(reply) for reply in live]
    description = json.loads(nlu("describe", "--bundle", "two", "--json", cwd=tmp_path).stdout)
    assert ("intent", "shadow") in [(part["name"], part["kind"]) for part in description["components"]]
    assert "shadows     intent" in nlu("describe", "--bundle", "two", cwd=tmp_path).stdout


def test_candidate_comes_and_goes_over_the_command_line(tiny: Made, tmp_path: Path) -> None:
    bundle, topic = str(tiny.bundle.path), str(tiny.parts / "head.topic")
    nlu("bundle", "keygen", "key.pem", "trusted.json", cwd=tmp_path)
    trust = {"NLU_KEYRING": str(tmp_path / "trusted.json"), "NLU_REQUIRE_SIGNATURE": "1"}
    sign = ("--sign", "key.pem")
    nlu("heads", "remove", "topic", "--bundle", bundle, "--out", "less", *sign, cwd=tmp_path)
    nlu("heads", "add", topic, "--bundle", "less", "--out", "more", *sign, cwd=tmp_path, env=trust)
    shown = nlu(
        "heads", "replace", topic, "--bundle", "more", "--out", "same", cwd=tmp_path, env=trust
    ).stdout
    assert "unsigned" in shown and "pulls 0 bytes" in shown
    edited(contrary(tiny, tmp_path), kind="oracle")
    refused = nlu(
        "heads", "replace", "head.intent", "--bundle", bundle, "--out", "new", cwd=tmp_path, ok=False
    )
    assert "expected one of sentence" in " ".join(refused.stderr.split())
    gone = nlu(
        "heads", "remove", "topic", "--bundle", "less", "--out", "new", cwd=tmp_path, ok=False, env=trust
    )
    assert "head.topic: found only" in gone.stderr
    assert not (tmp_path / "new").exists()


class Callers:
    """Callers without a pause between question and question, until they are told to stop."""

    def __init__(self, stub: NluStub, count: int) -> None:
        self.replies: list[tuple[str, pb.UnderstandReply]] = []
        self._stub, self._enough = stub, False
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(count)]

    async def _call(self, number: int) -> None:
        while not self._enough:
            text = SAID[(len(self.replies) + number) % len(SAID)]
            self.replies.append((text, await self._stub.Understand(turn(text), timeout=30)))

    async def answered(self, more: int) -> None:
        """Wait until that many more replies are in; raises what a call raised."""
        wanted = len(self.replies) + more
        while len(self.replies) < wanted:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        """Wait for the last replies; raises what a call raised."""
        self._enough = True
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def serving(pipeline: Pipeline) -> AsyncIterator[tuple[Desk, NluStub]]:
    """A real server whose pipeline can be swapped."""
    desk = Desk(in_flight=64, deadline_s=30, max_deadline_s=30)
    await desk.flip(pipeline)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((NluServicer(desk).handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield desk, NluStub(channel)  # type: ignore[no-untyped-call]
    finally:
        await server.stop(None)


@pytest.mark.parametrize("answers_bytes", [0, 2**20], ids=["computed", "kept answers"])
async def test_candidate_swap_under_load_loses_no_request_and_touches_no_other_head(
    tiny: Made, tmp_path: Path, answers_bytes: int
) -> None:
    old = loading.load(tiny.bundle)
    replaced = lifecycle.replace(tiny.bundle, contrary(tiny, tmp_path), tmp_path / "bundle")
    settings = Settings(metrics=False, workers=1, answers_bytes=answers_bytes)
    async with pipeline_of(old, settings) as before, serving(before) as (desk, stub):
        callers = Callers(stub, 4)
        await callers.answered(20)
        new = await asyncio.to_thread(loading.load, replaced, before=old)
        async with pipeline_of(new, settings) as after:
            await desk.flip(after)
            await callers.answered(20)
            await callers.stop()
    assert new.vectorizer is old.vectorizer
    assert all(new.fleet.heads[name] is head for name, head in old.fleet.heads.items() if name != "intent")

    intents = {
        bundle: {head.version for head in engine.describe().heads if head.name == "intent"}
        for bundle, engine in ((tiny.bundle.digest, old), (replaced.digest, new))
    }
    seen: dict[str, set[bytes]] = {text: set() for text in SAID}
    for text, reply in callers.replies:
        assert {annotation(reply, "intent").version} == intents[reply.versions.bundle]
        seen[text].add(facts(reply, but=frozenset({"intent"})))
    assert {reply.versions.bundle for _, reply in callers.replies} == set(intents)
    assert [len(answers) for answers in seen.values()] == [1] * len(SAID)
    assert (
        len(
            {
                annotation(reply, "intent").labels[0].label
                for text, reply in callers.replies
                if text == "stop it"
            }
        )
        == 2
    )
