"""nlu.desk without any transport: who is taken on, what is counted, and how one pipeline follows another."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from grpc import StatusCode

from annotators.annotator import Encoding
from nlu import callers, loading, metrics
from nlu.callers import Callers
from nlu.desk import Desk, status_of
from nlu.engine import Engine
from nlu.errors import (
    Draining,
    EncodeFailed,
    Holding,
    InvalidInput,
    NotAllowed,
    Overloaded,
    Stuck,
    TooLate,
    Unauthenticated,
)
from nlu.pipeline import Pipeline
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.types import Release
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import Vectorizer
from tests.test_one_utterance import turn
from tests.tiny import Made

STOP = turn("stop").SerializeToString()
GARBAGE = b"\xff" * 40


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@asynccontextmanager
async def open_desk(
    engine: Engine, *, in_flight: int = 64, gate: Callers | None = None, **settings: object
) -> AsyncIterator[Desk]:
    chosen = Settings(metrics=False, workers=1, **settings)  # type: ignore[arg-type]
    desk = Desk(in_flight=in_flight, deadline_s=30, max_deadline_s=60, callers=gate)
    async with pipeline_of(engine, chosen) as pipeline:
        await desk.flip(pipeline)
        yield desk


async def ask(
    desk: Desk,
    raw: bytes = STOP,
    *,
    method: str = "Understand",
    remaining_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    return await desk.answer(method, raw, remaining_s=remaining_s, metadata=metadata or {}, peer="")


async def understood(desk: Desk, text: str, *, remaining_s: float | None = None) -> pb.UnderstandReply:
    return pb.UnderstandReply.FromString(
        await ask(desk, turn(text).SerializeToString(), remaining_s=remaining_s)
    )


class Tally:
    """What was counted since."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> Counter[tuple[str, str]]:
        return Counter(
            {
                (sample.labels["method"], sample.labels["code"]): int(sample.value)
                for family in metrics.CALLS.collect()
                for sample in family.samples
                if sample.name.endswith("_total")
            }
        )

    @property
    def new(self) -> dict[tuple[str, str], int]:
        return dict(self._now() - self._before)


class Held:
    """Holds the model until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self.rows = 0
        self.takes_s = 0.0
        real = Vectorizer.encode

        def encode(self_: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
            if threading.current_thread().name == "encode":
                self.rows += len(phrases)
                self.released.wait(20)
                time.sleep(self.takes_s)
            return real(self_, phrases, tokens=tokens)

        monkeypatch.setattr(Vectorizer, "encode", encode)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.released.set()


def book(path: Path, **limits: int) -> tuple[Callers, dict[str, str]]:
    """A file with one caller, and the metadata that caller sends."""
    token = callers.add(path / "callers.toml", "anna", **limits)
    return Callers.load(path / "callers.toml"), {"authorization": f"Bearer {token}"}


# --- each call is counted once ---


async def test_desk_counts_what_it_answers(engine: Engine) -> None:
    async with open_desk(engine) as desk:
        tally = Tally()
        await ask(desk)
        await ask(desk)  # kept from before
        await ask(desk, pb.EncodeRequest(texts=["stop"]).SerializeToString(), method="Encode")
        await ask(desk, b"", method="Describe")
        batch = pb.UnderstandBatchRequest(requests=[turn("stop"), turn("")])
        await ask(desk, batch.SerializeToString(), method="UnderstandBatch")
    assert tally.new == {
        ("Understand", "OK"): 2,
        ("Encode", "OK"): 1,
        ("Describe", "OK"): 1,
        ("UnderstandBatch", "OK"): 1,
    }


@pytest.mark.parametrize(
    ("raw", "method"),
    [
        (GARBAGE, "Understand"),
        (turn("").SerializeToString(), "Understand"),
        (b"", "UnderstandBatch"),
        (GARBAGE, "Encode"),
        (GARBAGE, "Describe"),
    ],
)
async def test_desk_counts_bad_input(engine: Engine, raw: bytes, method: str) -> None:
    async with open_desk(engine) as desk:
        tally = Tally()
        with pytest.raises(InvalidInput):
            await ask(desk, raw, method=method)
    assert tally.new == {(method, "INVALID_ARGUMENT"): 1}


async def test_desk_counts_who_comes_too_late(engine: Engine) -> None:
    async with open_desk(engine) as desk:
        tally = Tally()
        with pytest.raises(TooLate):
            await ask(desk, remaining_s=0.0)
    assert tally.new == {("Understand", "DEADLINE_EXCEEDED"): 1}


async def test_desk_counts_who_comes_while_it_drains_or_holds(engine: Engine) -> None:
    tally = Tally()
    with pytest.raises(Holding):
        await ask(Desk(in_flight=1, deadline_s=1, max_deadline_s=1))
    async with open_desk(engine) as desk:
        desk.draining = True
        with pytest.raises(Draining):
            await ask(desk)
    assert tally.new == {("Understand", "UNAVAILABLE"): 2}


async def test_desk_counts_those_it_does_not_know(engine: Engine, tmp_path: Path) -> None:
    gate, metadata = book(tmp_path)
    async with open_desk(engine, gate=gate) as desk:
        tally = Tally()
        for sent in ({}, {"authorization": "Bearer wrong"}):
            with pytest.raises(Unauthenticated):
                await ask(desk, metadata=sent)
        await ask(desk, metadata=metadata)  # the control
    assert tally.new == {("Understand", "UNAUTHENTICATED"): 2, ("Understand", "OK"): 1}


async def test_desk_counts_what_a_caller_may_not(engine: Engine, tmp_path: Path) -> None:
    _, metadata = book(tmp_path)
    file = tmp_path / "callers.toml"
    file.write_text(file.read_text() + 'methods = ["Encode"]\n')
    async with open_desk(engine, gate=Callers.load(file)) as desk:
        tally = Tally()
        with pytest.raises(NotAllowed):
            await ask(desk, metadata=metadata)
    assert tally.new == {("Understand", "PERMISSION_DENIED"): 1}


async def test_desk_counts_who_calls_too_often_item_by_item(engine: Engine, tmp_path: Path) -> None:
    gate, metadata = book(tmp_path, rate=1, burst=5)
    batch = pb.UnderstandBatchRequest(requests=[turn("stop")] * 3).SerializeToString()
    shed = metrics.SHED.labels("rate").value
    async with open_desk(engine, gate=gate) as desk:
        tally = Tally()
        await ask(desk, batch, method="UnderstandBatch", metadata=metadata)
        with pytest.raises(Overloaded):
            await ask(
                desk, batch, method="UnderstandBatch", metadata=metadata
            )  # two are left, and one of them spent
        await ask(desk, metadata=metadata)
        with pytest.raises(Overloaded):
            await ask(desk, metadata=metadata)
    assert tally.new == {
        ("UnderstandBatch", "OK"): 1,
        ("UnderstandBatch", "RESOURCE_EXHAUSTED"): 1,
        ("Understand", "OK"): 1,
        ("Understand", "RESOURCE_EXHAUSTED"): 1,
    }
    assert metrics.SHED.labels("rate").value == shed + 2


async def test_desk_gives_tokens_to_those_who_asked_for_them(engine: Engine) -> None:
    """Also where a cache has them from somebody else."""
    async with open_desk(engine) as desk:
        for tokens in (True, False):
            asked = pb.EncodeRequest(texts=["lamp"], tokens=tokens).SerializeToString()
            (vectors,) = pb.EncodeReply.FromString(await ask(desk, asked, method="Encode")).vectors
            assert bool(vectors.tokens) is bool(vectors.token_starts) is tokens


async def test_desk_counts_failures_of_the_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
        raise ValueError("a phrase this model cannot take")

    async with open_desk(engine) as desk:
        monkeypatch.setattr(Vectorizer, "encode", broken)
        tally = Tally()
        with pytest.raises(EncodeFailed):
            await ask(desk, turn("poison").SerializeToString())
    assert tally.new == {("Understand", "INTERNAL"): 1}


async def test_desk_counts_who_hangs_up_and_forgets_the_work(engine: Engine, held: Held) -> None:
    async with open_desk(engine) as desk:
        tally = Tally()
        calls = [asyncio.create_task(understood(desk, f"phrase number {i}")) for i in range(5)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        held.released.set()
        assert desk.in_flight == 0
        await ask(desk)
    assert tally.new == {("Understand", "CANCELLED"): 5, ("Understand", "OK"): 1}
    assert held.rows <= 2  # the one that was in the model, and "stop" where the cold table has it not


async def test_desk_counts_items_of_a_stream(engine: Engine) -> None:
    async with open_desk(engine) as desk:
        tally = Tally()
        good = await desk.item(turn("stop", request_id="a").SerializeToString(), metadata={}, peer="")
        bad = await desk.item(turn("", request_id="b").SerializeToString(), metadata={}, peer="")
        worse = await desk.item(GARBAGE, metadata={}, peer="")
    answered, problem, unreadable = (pb.Outcome.FromString(raw) for raw in (good, bad, worse))
    assert (answered.request_id, answered.reply.phrase) == ("a", "stop")
    assert (problem.request_id, problem.problem.code) == ("b", StatusCode.INVALID_ARGUMENT.value[0])
    assert (unreadable.request_id, unreadable.problem.code) == ("", StatusCode.INVALID_ARGUMENT.value[0])
    assert tally.new == {("UnderstandStream", "OK"): 1, ("UnderstandStream", "INVALID_ARGUMENT"): 2}


# --- admission ---


@pytest.mark.parametrize("why", ["draining", "holding", "full", "late", "stranger"])
async def test_desk_refuses_before_it_parses(engine: Engine, held: Held, tmp_path: Path, why: str) -> None:
    """What does not even parse gets the same refusal, so nothing was spent on it."""
    gate, _ = book(tmp_path)
    async with open_desk(engine, in_flight=1, gate=gate if why == "stranger" else None) as desk:
        with pytest.raises(Unauthenticated if why == "stranger" else InvalidInput):
            await ask(desk, GARBAGE)  # the control
        busy = asyncio.create_task(understood(desk, "held phrase")) if why == "full" else None
        await asyncio.sleep(0)
        if why == "holding":
            await desk.flip(None)
        desk.draining = why == "draining"
        with pytest.raises((Draining, Holding, Overloaded, TooLate, Unauthenticated)):
            await ask(desk, GARBAGE, remaining_s=0.0 if why == "late" else None)
        held.released.set()
        if busy is not None:
            await busy


async def test_desk_makes_no_request_of_what_it_refuses(engine: Engine) -> None:
    made = []

    async def make() -> bytes:
        made.append(STOP)
        return STOP

    async with open_desk(engine) as desk:
        desk.draining = True
        with pytest.raises(Draining):
            await desk.answer("Understand", make, remaining_s=None, metadata={}, peer="")
        assert not made
        desk.draining = False
        await desk.answer("Understand", make, remaining_s=None, metadata={}, peer="")
    assert made == [STOP]


async def test_desk_takes_exactly_as_many_calls_as_it_may(engine: Engine, held: Held) -> None:
    """Fifty waves, each of which lets three in and refuses two: the count never drifts."""
    async with open_desk(engine, in_flight=3) as desk:
        for wave in range(50):
            held.released.clear()
            calls = [asyncio.create_task(understood(desk, f"wave {wave} phrase {i}")) for i in range(5)]
            await asyncio.sleep(0)
            assert desk.in_flight == 3
            held.released.set()
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(answer) for answer in found] == [pb.UnderstandReply] * 3 + [Overloaded] * 2
            assert desk.in_flight == 0


async def test_desk_answers_from_memory_while_the_queue_is_full(engine: Engine, held: Held) -> None:
    held.released.set()
    async with open_desk(engine, queue=1) as desk:
        known = await understood(desk, "known phrase")
        held.released.clear()
        running = asyncio.create_task(understood(desk, "first"))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(understood(desk, "second"))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await understood(desk, "third")
        again = await understood(desk, "known phrase")
        held.released.set()
        await asyncio.gather(running, waiting)
    assert again.source == pb.SOURCE_ANSWER
    assert again.annotations == known.annotations


async def test_desk_computes_nothing_for_calls_that_cannot_be_in_time(engine: Engine, held: Held) -> None:
    held.released.set()
    held.takes_s = 0.01
    async with open_desk(engine) as desk:
        await understood(desk, "the first phrase")
        for i in range(50):
            with pytest.raises(TooLate):
                await understood(desk, f"phrase number {i}", remaining_s=0.001)
        assert held.rows == 1
        await understood(desk, "phrase in time", remaining_s=5)
    assert held.rows == 2


async def test_desk_nobody_waits_longer_than_the_longest_deadline(engine: Engine, held: Held) -> None:
    async with open_desk(engine) as desk:
        short = Desk(in_flight=9, deadline_s=0.1, max_deadline_s=0.2)
        await short.flip(desk.pipeline)
        for remaining_s in (None, float("inf"), 3600.0):
            with pytest.raises(TooLate):
                await understood(short, f"phrase {remaining_s}", remaining_s=remaining_s)
        held.released.set()


async def test_desk_keeps_no_answer_from_which_something_was_left_out(engine: Engine) -> None:
    async with open_desk(engine) as desk:
        pipeline = desk.pipeline
        assert pipeline is not None
        pipeline.costs.observe("replies", 100.0)
        hurried = await understood(desk, "play music", remaining_s=5)
        patient = await understood(desk, "play music", remaining_s=5)
        assert list(hurried.skipped) == list(patient.skipped) == ["replies"]
        assert patient.source != pb.SOURCE_ANSWER
        pipeline.costs.left("replies")
        for _ in range(1000):
            pipeline.costs.left("replies")
        whole = await understood(desk, "play music", remaining_s=5)
        again = await understood(desk, "play music", remaining_s=5)
    assert not whole.skipped
    assert again.source == pb.SOURCE_ANSWER  # the control


# --- one pipeline after another ---


@pytest.fixture
def other(stranger: Made) -> Engine:
    """Another bundle."""
    return loading.load(stranger.bundle)


async def test_desk_flip_waits_for_the_calls_that_use_what_was(
    engine: Engine, other: Engine, held: Held
) -> None:
    async with open_desk(engine) as desk, pipeline_of(other, Settings(metrics=False)) as following:
        before = desk.pipeline
        call = asyncio.create_task(understood(desk, "held phrase"))
        await asyncio.sleep(0.05)
        flip = asyncio.create_task(desk.flip(following))
        await asyncio.sleep(0)
        assert desk.pipeline is following  # at once
        new = asyncio.create_task(understood(desk, "stop"))
        await asyncio.sleep(0.2)
        assert not flip.done()
        held.released.set()
        old, fresh = await asyncio.gather(call, new)
        assert await asyncio.wait_for(flip, 20) is before
    assert old.versions.bundle == engine.versions.bundle
    assert fresh.versions.bundle == other.versions.bundle


async def test_desk_flip_of_an_idle_desk_returns_at_once(engine: Engine, other: Engine) -> None:
    async with open_desk(engine) as desk, pipeline_of(other, Settings(metrics=False)) as following:
        before = desk.pipeline
        await ask(desk)
        assert await asyncio.wait_for(desk.flip(following), 20) is before
        assert await asyncio.wait_for(desk.flip(before), 20) is following


async def test_desk_flip_waits_for_failed_and_cancelled_calls_no_longer_than_they_last(
    engine: Engine, other: Engine, held: Held
) -> None:
    async with open_desk(engine) as desk, pipeline_of(other, Settings(metrics=False)) as following:
        with pytest.raises(InvalidInput):
            await ask(desk, GARBAGE)
        call = asyncio.create_task(understood(desk, "held phrase"))
        await asyncio.sleep(0.05)
        flip = asyncio.create_task(desk.flip(following))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait_for(flip, 20)
        held.released.set()


async def test_desk_no_answer_mixes_two_bundles(engine: Engine, other: Engine) -> None:
    """Back and forth under load: every reply is wholly of the bundle that it names."""
    versions = {
        each.versions.bundle: {head.name: head.version for head in each.describe().heads}
        for each in (engine, other)
    }
    settings = Settings(metrics=False, answers_bytes=0, queue_s=10)
    async with open_desk(engine, answers_bytes=0, queue_s=10) as desk, pipeline_of(other, settings) as last:
        replies: list[pb.UnderstandReply] = []
        flips = 0

        async def call(number: int) -> None:
            for i in range(60):
                replies.append(await understood(desk, f"phrase {number} {i}"))

        calls = [asyncio.create_task(call(number)) for number in range(4)]
        following: Pipeline | None = last
        while not all(one.done() for one in calls):
            following = await desk.flip(following)
            flips += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*calls)
        assert flips > 10
    for reply in replies:
        said = {annotation.name: annotation.version for annotation in reply.annotations}
        assert said == versions[reply.versions.bundle]
    assert {reply.versions.bundle for reply in replies} == set(versions)


# --- Describe ---


async def test_desk_describe_says_why_there_is_nothing_to_serve() -> None:
    desk = Desk(in_flight=1, deadline_s=1, max_deadline_s=1)
    desk.release = Release(state="HOLDING", channel="prod", reason="nothing was found")
    described = pb.DescribeReply.FromString(await ask(desk, b"", method="Describe"))
    assert (described.release.state, described.release.reason) == ("HOLDING", "nothing was found")
    assert not described.versions.bundle
    assert described.limits.max_batch


async def test_desk_describe_is_answered_while_draining(engine: Engine) -> None:
    async with open_desk(engine) as desk:
        desk.draining = True
        desk.release = Release(state="DRAINING")
        described = pb.DescribeReply.FromString(await ask(desk, b"", method="Describe"))
    assert described.release.state == "DRAINING"
    assert described.versions.bundle == engine.versions.bundle


# --- codes ---


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("text", found="a", expected="b", remedy="c"), StatusCode.INVALID_ARGUMENT),
        (Overloaded("full", retry_after_ms=1), StatusCode.RESOURCE_EXHAUSTED),
        (TooLate("late"), StatusCode.DEADLINE_EXCEEDED),
        (Draining("stopping"), StatusCode.UNAVAILABLE),
        (Holding("nothing to serve"), StatusCode.UNAVAILABLE),
        (Stuck("hangs"), StatusCode.UNAVAILABLE),
        (Unauthenticated("who"), StatusCode.UNAUTHENTICATED),
        (NotAllowed("what"), StatusCode.PERMISSION_DENIED),
        (EncodeFailed("broken"), StatusCode.INTERNAL),
    ],
)
def test_desk_every_error_of_ours_has_its_code_and_its_words(error: Exception, code: StatusCode) -> None:
    assert status_of(error) == (code, str(error))


def test_desk_unforeseen_errors_tell_nothing() -> None:
    code, text = status_of(RuntimeError("password=hunter2"))
    assert code is StatusCode.INTERNAL
    assert "hunter2" not in text


async def test_desk_many_refusals_cost_the_model_nothing(engine: Engine, held: Held) -> None:
    """While the model is held, a flood is refused and the calls that were taken on are answered."""
    async with open_desk(engine, queue=4) as desk:
        taken = [asyncio.create_task(understood(desk, "first"))]
        await asyncio.sleep(0.05)
        flood = [asyncio.create_task(understood(desk, f"phrase number {i}")) for i in range(50)]
        await asyncio.sleep(0.2)
        refused = [call for call in flood if call.done()]
        assert len(refused) == 46
        assert all(isinstance(call.exception(), Overloaded) for call in refused)
        held.released.set()
        answered = await asyncio.gather(*taken, *(call for call in flood if call not in refused))
    assert len(answered) == 5
    assert held.rows == 5
