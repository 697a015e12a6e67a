"""The flow of docs/one-utterance.md: a turn goes in over a real gRPC channel, a complete answer comes out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from annotators.annotator import Annotation, Heard
from annotators.rules import RulesHead
from nlu.serve import running
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from tests.conftest import RedisServer
from tests.tiny import Made


@asynccontextmanager
async def serving(made: Made, **settings: object) -> AsyncIterator[NluStub]:
    """A real server on a free port and a client's stub."""
    chosen = Settings(bundle=made.bundle.path, port=0, metrics=False, **settings)  # type: ignore[arg-type]
    async with running(chosen) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield NluStub(channel)  # type: ignore[no-untyped-call]


def turn(text: str, **fields: object) -> pb.UnderstandRequest:
    """A request with one hypothesis."""
    return pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=text)], **fields)  # type: ignore[arg-type]


def annotation(reply: pb.UnderstandReply, name: str) -> pb.Annotation:
    """One head's answer."""
    return next(found for found in reply.annotations if found.name == name)


async def test_utterance_is_answered_whole(tiny: Made) -> None:
    async with serving(tiny) as stub:
        reply = await stub.Understand(turn("Turn the  lights on", request_id="r1"))
    assert reply.request_id == "r1"
    assert reply.phrase == "turn the lights on"
    assert [found.name for found in reply.annotations] == [
        "emotion",
        "followup",
        "intent",
        "quick",
        "slots",
        "topic",
    ]
    best = annotation(reply, "intent").labels[0]
    assert (best.label, best.accepted) == ("lights_on", True)
    assert annotation(reply, "followup").status == pb.STATUS_SKIPPED
    assert reply.versions.bundle == tiny.bundle.digest
    assert reply.versions.vectorizer == tiny.bundle.of_kind("vectorizer")[0].provides["vectorizer"]
    assert reply.source == pb.SOURCE_MODEL
    timings = reply.timings_ns
    stages = (timings.normalize, timings.encode, timings.annotate, timings.search, timings.rank)
    assert min(stages) > 0
    assert sum(stages) == timings.total


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ("wake me at six", [("time", "six", 11, 14)]),
        ("  Wake   me at SIX ", [("time", "SIX", 15, 18)]),
        ("wake\u00a0me at\r\ns\u200bix", [("time", "s\u200bix", 12, 16)]),
    ],
)
async def test_utterance_spans_are_in_the_callers_text(
    tiny: Made, sent: str, found: list[tuple[str, str, int, int]]
) -> None:
    async with serving(tiny) as stub:
        reply = await stub.Understand(turn(sent, annotators=["slots"]))
    spans = [(span.label, span.text, span.start, span.end) for span in annotation(reply, "slots").spans]
    assert spans == found


async def test_utterance_says_the_same_from_every_tier(tiny: Made, redis_server: RedisServer) -> None:
    """Fresh, from the LRU, from Redis, from the cold table, or given again: the same scores to the last bit."""
    answers: dict[int, pb.UnderstandReply] = {}
    async with serving(tiny) as stub:
        for _ in range(2):
            reply = await stub.Understand(turn("so annoying"))
            answers[reply.source] = reply
    async with serving(tiny, redis=redis_server.url, answers_bytes=0) as stub:
        for _ in range(2):
            reply = await stub.Understand(turn("so annoying"))
            answers[reply.source] = reply
    async with serving(tiny, redis=redis_server.url, lru_bytes=0) as stub:
        reply = await stub.Understand(turn("so annoying"))
        answers[reply.source] = reply
        cold = await stub.Understand(turn("hello"))
    async with serving(Made(tiny.bundle, tiny.parts)) as stub:
        assert cold.source == pb.SOURCE_COLD
        warm = await stub.Understand(turn("Hello "))
    assert set(answers) == {pb.SOURCE_MODEL, pb.SOURCE_ANSWER, pb.SOURCE_LRU, pb.SOURCE_REDIS}
    assert len({_facts(reply) for reply in answers.values()}) == 1
    assert _facts(cold) == _facts(warm)


def _facts(reply: pb.UnderstandReply) -> bytes:
    """All of a reply but when and whence."""
    bare = pb.UnderstandReply()
    bare.CopyFrom(reply)
    bare.ClearField("timings_ns")
    bare.ClearField("source")
    return bare.SerializeToString(deterministic=True)


async def test_utterance_weighs_hypotheses(tiny: Made) -> None:
    hypotheses = [
        pb.Hypothesis(text="play music", confidence=0.3),
        pb.Hypothesis(text="stop", confidence=0.7),
    ]
    async with serving(tiny) as stub:
        reply = await stub.Understand(pb.UnderstandRequest(hypotheses=hypotheses))
        agreed = await stub.Understand(pb.UnderstandRequest(hypotheses=[hypotheses[1], hypotheses[1]]))
    assert (reply.hypothesis, reply.phrase) == (1, "stop")
    assert annotation(reply, "intent").labels[0].label == "stop"
    assert annotation(reply, "intent").disagreement > 0.1
    assert annotation(agreed, "intent").disagreement == pytest.approx(0, abs=1e-6)


async def test_utterance_means_another_thing_after_another_turn(tiny: Made) -> None:
    meant = []
    async with serving(tiny) as stub:
        for before in ("shall i turn it on", "shall i play music"):
            said = [pb.Turn(role=pb.ROLE_ASSISTANT, text=before)]
            reply = await stub.Understand(turn("yes", context=said, annotators=["followup"]))
            meant.append(annotation(reply, "followup").labels[0].label)
    assert meant == ["lights_on", "music_play"]


async def test_utterance_gets_the_replies_of_its_persona_surface_and_day(tiny: Made) -> None:
    async with serving(tiny) as stub:
        calm = await stub.Understand(turn("so annoying"))
        lively = await stub.Understand(turn("so annoying", persona="lively"))
        tv = await stub.Understand(turn("what can i watch", surface="tv"))
        speaker = await stub.Understand(turn("what can i watch", surface="speaker"))
        request = turn("what can i watch", surface="speaker")
        request.as_of.FromJsonString("2026-06-03T12:00:00Z")
        during = await stub.Understand(request)
        request.as_of.FromJsonString("2026-06-08T00:00:00Z")
        after = await stub.Understand(request)
    assert (calm.replies[0].id, lively.replies[0].id) == ("sorry.1", "sorry.2")
    assert tv.replies[0].id == "tv.1"
    assert "tv.1" not in [reply.id for reply in speaker.replies]
    assert during.replies[0].id == "promo.1"
    assert "promo.1" not in [reply.id for reply in after.replies]


async def test_utterance_does_not_repeat_what_was_said_or_must_be_avoided(tiny: Made) -> None:
    said = [pb.Turn(role=pb.ROLE_ASSISTANT, text="Hello, take your time.")]
    async with serving(tiny) as stub:
        first = await stub.Understand(turn("hello"))
        again = await stub.Understand(turn("hello", context=said))
        avoided = await stub.Understand(turn("hello", retrieval=pb.Retrieval(avoid_ids=["hi.1", "hi.2"])))
    assert first.replies[0].id == "hi.2"
    assert again.replies[0].id == "hi.1"
    assert not {"hi.1", "hi.2"} & {reply.id for reply in avoided.replies}


async def test_utterance_kept_answers_are_each_callers_own(tiny: Made) -> None:
    async with serving(tiny) as stub:
        await stub.Understand(turn("hello there", request_id="first"))
        again = await stub.Understand(turn("hello there", request_id="second"))
        other = await stub.Understand(turn("hello there", request_id="third", persona="lively"))
    assert (again.request_id, again.source) == ("second", pb.SOURCE_ANSWER)
    assert again.timings_ns.total > 0
    assert (other.request_id, other.source) == ("third", pb.SOURCE_LRU)
    assert "hi.2" not in [reply.id for reply in other.replies]


async def test_utterance_kept_answers_do_not_outlive_a_promotion(tiny: Made) -> None:
    """The same question on both sides of the promotion's end, asked again inside each stretch of time."""
    clocks = ("2026-06-02T00:00:00Z", "2026-06-07T23:59:59Z", "2026-06-08T00:00:00Z", "2026-07-01T00:00:00Z")
    seen = []
    async with serving(tiny) as stub:
        for clock in clocks:
            request = turn("what can i watch", surface="speaker")
            request.as_of.FromJsonString(clock)
            reply = await stub.Understand(request)
            seen.append((reply.source == pb.SOURCE_ANSWER, reply.replies[0].id == "promo.1"))
    assert seen == [(False, True), (True, True), (False, False), (True, False)]


async def test_utterance_answer_with_a_failed_head_is_not_kept(
    tiny: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RulesHead, heard: Heard) -> Annotation:
        raise RuntimeError("for once")

    async with serving(tiny) as stub:
        with monkeypatch.context() as harm:
            harm.setattr(RulesHead, "annotate", broken)
            failed = await stub.Understand(turn("stop"))
        mended = await stub.Understand(turn("stop"))
    assert annotation(failed, "quick").status == pb.STATUS_ERROR
    assert not annotation(failed, "quick").labels
    assert annotation(failed, "intent").status == pb.STATUS_OK
    assert annotation(mended, "quick").status == pb.STATUS_OK


async def test_utterance_explains_itself_only_when_asked(tiny: Made) -> None:
    async with serving(tiny) as stub:
        plain = await stub.Understand(turn("hello"))
        explained = await stub.Understand(turn("hello", explain=True, raw_scores=True))
    assert not plain.annotations[0].labels[0].HasField("threshold")
    assert not plain.replies[0].features
    label = explained.annotations[0].labels[0]
    assert label.HasField("threshold") and label.HasField("raw_score")
    assert explained.replies[0].features["similarity"] == pytest.approx(explained.replies[0].similarity)


async def test_batch_answers_each_item_for_itself(tiny: Made) -> None:
    requests = [turn("stop", request_id="a"), turn("", request_id="b"), turn("play music", request_id="c")]
    async with serving(tiny) as stub:
        batch = await stub.UnderstandBatch(pb.UnderstandBatchRequest(requests=requests))
        alone = await stub.Understand(requests[2])
    assert [outcome.request_id for outcome in batch.outcomes] == ["a", "b", "c"]
    assert batch.outcomes[1].problem.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert _facts(batch.outcomes[2].reply) == _facts(alone)


async def test_stream_answers_in_order_and_survives_a_bad_item(tiny: Made) -> None:
    async with serving(tiny) as stub:
        call = stub.UnderstandStream(
            iter([turn("stop", request_id="1"), turn(" "), turn("hello", request_id="3")])
        )
        outcomes = [outcome async for outcome in call]
    assert [outcome.WhichOneof("result") for outcome in outcomes] == ["reply", "problem", "reply"]
    assert outcomes[2].reply.request_id == "3"


@pytest.mark.parametrize("precision", [pb.PRECISION_FLOAT32, pb.PRECISION_FLOAT16])
async def test_encode_gives_unit_vectors_and_offsets(tiny: Made, precision: pb.Precision) -> None:
    async with serving(tiny) as stub:
        reply = await stub.Encode(
            pb.EncodeRequest(texts=["Hello  there", "stop"], tokens=True, precision=precision)
        )
    first = reply.vectors[0]
    half = precision == pb.PRECISION_FLOAT16
    sentence = np.frombuffer(first.sentence_f16, "<f2") if half else np.array(first.sentence, np.float32)
    assert len(sentence) == reply.dim
    assert float(np.linalg.norm(sentence.astype(np.float32))) == pytest.approx(1, abs=1e-3)
    assert list(zip(first.token_starts, first.token_ends, strict=True)) == [(0, 5), (7, 12)]


async def test_describe_names_everything_served(tiny: Made) -> None:
    async with serving(tiny) as stub:
        description = await stub.Describe(pb.DescribeRequest())
    assert {f"{part.kind}.{part.name}" for part in description.components} == {
        component.folder for component in tiny.bundle.manifest.components
    }
    assert list(description.personas) == ["calm", "lively"]
    assert description.replies == 7
