"""nlu.pipeline where time is short: what does not fit is left out in order and said so, never read as "no"."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from annotators.annotator import Annotation, Encoding, Heard, Status
from annotators.fleet import Fleet
from annotators.head import Spec
from annotators.table import Head
from nlu import admission
from nlu.admission import Costs
from nlu.engine import Engine
from nlu.errors import TooLate
from nlu.pipeline import Pipeline
from nlu.routes import FILE, Routes
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.types import Hypothesis, Reply, Retrieval, Turn, Utterance
from nlu.vectorizer import Vectorizer

STUCK_S = 0.3  # what a slow head takes
CONTEXT = (Turn("assistant", "should i play a song"),)


@dataclass(frozen=True)
class SlowHead:
    """A head that takes its time."""

    head: Head
    seconds: float

    @property
    def spec(self) -> Spec:
        return self.head.spec

    @property
    def version(self) -> str:
        return self.head.version

    def annotate(self, heard: Heard) -> Annotation:
        time.sleep(self.seconds)
        return self.head.annotate(heard)


@asynccontextmanager
async def pipeline_with(engine: Engine, **settings: object) -> AsyncIterator[Pipeline]:
    chosen = Settings(metrics=False, workers=1, **settings)  # type: ignore[arg-type]
    async with pipeline_of(engine, chosen) as pipeline:
        yield pipeline


def expecting(pipeline: Pipeline, **seconds: float) -> Pipeline:
    """The same, whose stages have taken so long each."""
    costs = Costs()
    for stage, taken in seconds.items():
        costs.observe(stage, taken)
    return replace(pipeline, costs=costs)


def said(text: str, *, top_k: int = 3, annotators: frozenset[str] | None = None) -> Utterance:
    return Utterance((Hypothesis(text),), context=CONTEXT, retrieval=Retrieval(top_k), annotators=annotators)


def within(seconds: float) -> float:
    return time.monotonic() + seconds


def statuses(reply: Reply) -> dict[str, tuple[Status, str]]:
    return {annotation.name: (annotation.status, annotation.note) for annotation in reply.annotations}


def skipped(reply: Reply) -> set[str]:
    return {name for name, (status, note) in statuses(reply).items() if note == "no time"}


async def test_pipeline_leaves_out_nothing_where_there_is_time(engine: Engine) -> None:
    async with pipeline_with(engine) as pipeline:
        for _ in range(5):
            reply = await pipeline.understand(said("play music"), deadline=within(30))
    assert reply.skipped == ()
    assert reply.replies
    assert skipped(reply) == set()


@pytest.mark.parametrize(
    ("seconds", "left_out"),
    [
        (30.5, ()),
        (25.5, ("replies",)),
        (15.5, ("followup", "replies")),
        (0.5, ("followup", "slots", "replies")),
    ],
)
async def test_pipeline_leaves_out_in_order_what_there_is_no_time_for(
    engine: Engine, seconds: float, left_out: tuple[str, ...]
) -> None:
    """Ten seconds each are what the stages have cost so far."""
    async with pipeline_with(engine) as pipeline:
        pipeline = expecting(pipeline, replies=10.0, context=10.0, token=10.0)
        reply = await pipeline.understand(said("play music"), deadline=within(seconds))
    assert reply.skipped == left_out
    assert skipped(reply) == set(left_out) - {"replies"}
    assert bool(reply.replies) == ("replies" not in left_out)
    assert reply.searched
    assert statuses(reply)["intent"][0] is Status.OK  # what the linear heads say is never left out


async def test_pipeline_drops_are_the_operators_choice(engine: Engine) -> None:
    async with pipeline_with(engine, drops=("token",)) as pipeline:
        pipeline = expecting(pipeline, replies=10.0, context=10.0, token=10.0)
        reply = await pipeline.understand(said("play music"), deadline=within(0.5))
    assert reply.skipped == ("slots",)


async def test_pipeline_without_token_heads_asks_for_no_token_vectors(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = Vectorizer.encode

    def encode(self_: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
        asked.append(tokens)
        return real(self_, phrases, tokens=tokens)

    monkeypatch.setattr(Vectorizer, "encode", encode)
    async with pipeline_with(engine, drops=("token",)) as pipeline:
        await pipeline.understand(said("play music"), deadline=within(30))
        assert asked == [True, True]  # the control
        asked.clear()
        pipeline = expecting(pipeline, token=10.0)
        await pipeline.understand(said("play another song"), deadline=within(5))
    assert asked == [False]


async def test_pipeline_does_not_name_what_was_not_asked(engine: Engine) -> None:
    async with pipeline_with(engine) as pipeline:
        pipeline = expecting(pipeline, replies=10.0, context=10.0, token=10.0, sentence=10.0)
        reply = await pipeline.understand(
            said("play music", top_k=0, annotators=frozenset({"intent", "slots"})), deadline=within(0.5)
        )
    assert reply.skipped == ("slots",)
    assert set(statuses(reply)) == {"intent", "slots"}


async def test_pipeline_learns_what_its_stages_cost(engine: Engine) -> None:
    """A slow head is left out for those in a hurry, and for nobody else."""
    slow = SlowHead(engine.fleet.heads["followup"], STUCK_S)
    heads: list[Any] = [
        slow if head.spec.name == "followup" else head for head in engine.fleet.heads.values()
    ]
    slowed = replace(engine, fleet=Fleet(heads))
    async with pipeline_with(slowed, drops=("context",)) as pipeline:
        patient = await pipeline.understand(said("play music"), deadline=within(30))
        hurried = await pipeline.understand(said("play music"), deadline=within(STUCK_S / 2))
        again = await pipeline.understand(said("play music"), deadline=within(30))
    assert (patient.skipped, hurried.skipped, again.skipped) == ((), ("followup",), ())


async def test_pipeline_decides_again_by_the_clock(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectorizer takes longer than was to be expected; what then no longer fits is left out."""
    real = Vectorizer.encode

    def encode(self_: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
        time.sleep(0.3)
        return real(self_, phrases, tokens=tokens)

    async with pipeline_with(engine, drops=("replies",)) as pipeline:
        pipeline = expecting(pipeline, replies=0.5)
        expected = await pipeline.understand(said("play music"), deadline=within(1.0))
        monkeypatch.setattr(Vectorizer, "encode", encode)
        late = await pipeline.understand(replace(said("one more song"), context=()), deadline=within(0.7))
    assert expected.skipped == ()  # the control
    assert late.skipped == ("replies",)


async def test_pipeline_says_too_late_once_the_deadline_has_passed(engine: Engine) -> None:
    async with pipeline_with(engine) as pipeline:
        await pipeline.understand(said("play music"), deadline=within(30))
        with pytest.raises(TooLate):  # though all its phrases are known by now
            await pipeline.understand(said("play music"), deadline=time.monotonic() - 0.001)


async def test_pipeline_a_head_that_was_left_out_meets_no_condition(engine: Engine, tmp_path: Path) -> None:
    """Neither that it says something nor that it says nothing: the rules that ask it are passed by."""
    labels = ", ".join(f'"{label}"' for label in engine.fleet.heads["followup"].spec.labels)
    (tmp_path / FILE).write_text(
        f"""
[[route]]
name = "says"
to = "skill"
when.head.followup = {{ label = [{labels}] }}
[[route]]
name = "silent"
to = "chitchat"
when.head.followup = {{ abstains = true }}
[[route]]
name = "other"
to = "clarify"
"""
    )
    routed = replace(engine, routes=Routes.load(tmp_path))
    async with pipeline_with(routed, drops=("context",)) as pipeline:
        heard = await pipeline.understand(said("yes"), deadline=within(30))
        unheard = await expecting(pipeline, context=10.0).understand(said("yes"), deadline=within(1))
    assert heard.route is not None
    assert unheard.route is not None
    assert heard.route.name in ("says", "silent")  # the control: whatever it says, one of the two holds
    assert unheard.skipped == ("followup",)
    assert unheard.route.name == "other"


async def test_pipeline_many_in_a_hurry_are_all_answered(engine: Engine) -> None:
    async with pipeline_with(engine, queue_s=10) as pipeline:
        pipeline = expecting(pipeline, replies=10.0)
        replies = await asyncio.gather(
            *(pipeline.understand(said(f"song number {i}"), deadline=within(5)) for i in range(20))
        )
    assert all(reply.skipped == ("replies",) for reply in replies)


@pytest.mark.parametrize(
    ("turn_s", "others_live"), [(0.0002, True), (1e9, False)], ids=["bounded", "unbounded"]
)
async def test_pipeline_hostile_texts_do_not_keep_the_event_loop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, turn_s: float, others_live: bool
) -> None:
    """Twenty-six texts that have to be composed anew, code point by code point; the second row is the control."""
    monkeypatch.setattr(admission, "_TURN_S", turn_s)
    texts = ["न\u200d" * 200 + str(i) for i in range(26)]
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with pipeline_with(engine) as pipeline:
        living = asyncio.create_task(other())
        await asyncio.sleep(0)
        before = turns
        await pipeline._normalized(texts)
        during = turns - before
        living.cancel()
    assert (during >= 5) == others_live
