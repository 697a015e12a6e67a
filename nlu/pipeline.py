"""One utterance, from text to reply. This is the file to read first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Status
from index.replies import Hit
from nlu import metrics, shadow, tracing
from nlu.admission import Costs, Turns
from nlu.cache import EncodingCache
from nlu.drift import Windows
from nlu.engine import Engine
from nlu.errors import InvalidInput, TooLate
from nlu.features import Situation, Turn
from nlu.lru import Lru
from nlu.normalizer import Phrase, normalize
from nlu.routes import Facts
from nlu.types import Candidate, Reply, Route, Source, Timings, Utterance

REPLIES = "replies"  # the stage that finds and ranks them; the others are kinds of heads
_HITS_PER_REPLY = 4  # the ranker chooses among this many times as many hits as replies are wanted


class Kept(NamedTuple):
    """A reply that can be given again, and what its heads said, for nlu/drift.py."""

    reply: bytes
    said: bytes


@dataclass(frozen=True)
class Pipeline:
    """An engine with its caches. A new bundle is a new Pipeline; a request keeps the one it began with.

    `answers` are whole replies, kept by question. They are safe to keep because they die with the engine that gave
    them; what outlives an engine, in Redis or a cold table, are Encodings only. `sample` keeps flips of shadow heads.
    `drops` are the stages to leave out, first to last, where there is no time for all; `costs` says what they take.
    """

    engine: Engine
    cache: EncodingCache
    answers: Lru[Kept] | None
    default_persona: str
    sample: shadow.Sample | None = None
    drops: tuple[str, ...] = ()
    costs: Costs = field(default_factory=Costs, repr=False)
    turns: Turns = field(default_factory=Turns, repr=False)
    windows: Windows = field(init=False, repr=False)  # what this engine's heads say lately

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", Windows(head.spec for head in self.engine.fleet.heads.values()))

    def moment(self, as_of: datetime | None) -> int:
        """A number for the stretch of time around `as_of` (None = now) in which the same replies are valid."""
        return 0 if self.engine.replies is None else self.engine.replies.moment(as_of or datetime.now(UTC))

    async def understand(self, utterance: Utterance, *, deadline: float) -> Reply:
        """Answer one turn. `deadline` is in time.monotonic() seconds. Raises the errors of nlu/errors.py."""
        began = time.perf_counter_ns()
        engine = self.engine
        self._check(utterance)
        phrases = await self._normalized([hypothesis.text for hypothesis in utterance.hypotheses])
        turns = await self._normalized([turn.text for turn in utterance.context])
        normalized = time.perf_counter_ns()

        stages = self._stages(utterance)
        found, dropped = await self._encode_in_time(
            [*phrases, *turns],
            stages,
            tokens=engine.fleet.needs_tokens(utterance.annotators),
            deadline=deadline,
        )
        encodings = [encoding for encoding, _ in found]
        encoded = time.perf_counter_ns()

        heard = _heard(utterance, phrases, encodings)
        skip = self._heads(dropped, utterance.annotators)
        answered = engine.fleet.answer(heard, wanted=utterance.annotators, skip=skip)
        annotations = answered.live
        annotated = time.perf_counter_ns()

        nearest = [] if REPLIES in dropped else await self._search(utterance, encodings[heard.best])
        hits = nearest or []
        searched = time.perf_counter_ns()

        situation = Situation(
            phrases[heard.best].text, encodings[heard.best].sentence, annotations, _turns(utterance, heard)
        )
        replies = self._rank(utterance, hits, situation)
        route = self._route(utterance, annotations, hits, replies)
        ranked = time.perf_counter_ns()

        timings = Timings(
            total=ranked - began,
            normalize=normalized - began,
            encode=encoded - normalized,
            annotate=annotated - encoded,
            search=searched - annotated,
            rank=ranked - searched,
        )
        _count(timings, found, annotations)
        self._learn(stages, dropped, answered.seconds, (ranked - annotated) * 1e-9)
        if engine.fleet.shadows:
            # The loop comes to it when this call has nothing more to do, that is when its reply has been handed to gRPC.
            asyncio.get_running_loop().call_soon(
                shadow.observe, engine.fleet, answered, phrases[heard.best].text, self.sample
            )
        reply = Reply(
            phrase=phrases[heard.best].text,
            hypothesis=heard.best,
            annotations=tuple(_in_original(annotation, phrases[heard.best]) for annotation in annotations),
            replies=replies,
            versions=engine.versions,
            timings=timings,
            source=found[heard.best][1],
            route=route,
            searched=nearest is not None,
            skipped=(*(name for name in engine.fleet.names if name in skip), *dropped & {REPLIES}),
        )
        tracing.understood(reply, encodings[heard.best])
        return reply

    async def encode(
        self, texts: Sequence[str], *, tokens: bool, deadline: float
    ) -> list[tuple[Phrase, Encoding, Source]]:
        """The vectorizer as a service: each text's phrase, Encoding and source."""
        phrases = await self._normalized(texts)
        found = await self.cache.encode([phrase.text for phrase in phrases], tokens=tokens, deadline=deadline)
        for _, source in found:
            metrics.ENCODINGS.labels(source.value).inc()
        return [(phrase, encoding, source) for phrase, (encoding, source) in zip(phrases, found, strict=True)]

    def _check(self, utterance: Utterance) -> None:
        """Refuse what this engine does not have, by name, before any work is done."""
        fleet, replies = self.engine.fleet, self.engine.replies
        unknown = [] if utterance.annotators is None else sorted(utterance.annotators.difference(fleet.heads))
        if unknown:
            raise InvalidInput(
                "annotators",
                found=", ".join(map(repr, unknown)),
                expected=f"some of {', '.join(fleet.names)}",
                remedy="see Describe",
            )
        if replies is None:
            return
        for name, value, known in (
            ("persona", utterance.persona, replies.personas),
            ("surface", utterance.surface, replies.surfaces),
        ):
            if value and value not in known:
                raise InvalidInput(
                    name, found=repr(value), expected=f"one of {', '.join(known)}", remedy="see Describe"
                )

    async def _normalized(self, texts: Sequence[str]) -> list[Phrase]:
        uncased, phrases = self.engine.vectorizer.spec.uncased, []
        for text in texts:
            await self.turns.mine()
            began = time.perf_counter()
            phrases.append(normalize(text, uncased=uncased))
            self.turns.spend(time.perf_counter() - began)
        return phrases

    async def _encode_in_time(
        self, phrases: Sequence[Phrase], stages: frozenset[str], *, tokens: bool, deadline: float
    ) -> tuple[list[tuple[Encoding, Source]], frozenset[str]]:
        """The Encodings, and which of the stages to leave out after them: before, as far as it can be foreseen what the
        vectorizer leaves of the time; after, by the clock. Raises TooLate where no time is left."""
        near = [self.cache.near(phrase.text, tokens=tokens) for phrase in phrases]
        found = [hit for hit in near if hit is not None]
        dropped: frozenset[str] = frozenset()
        if len(found) < len(phrases):
            left_s = deadline - time.monotonic() - self.cache.wait_s(len(phrases) - len(found))
            dropped = self.costs.left_out(stages, self.drops, left_s)
            texts = [phrase.text for phrase in phrases]
            found = await self.cache.encode(
                texts, tokens=tokens and "token" not in dropped, deadline=deadline
            )
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TooLate("the deadline passed before the phrase was understood")
        return found, dropped | self.costs.left_out(stages - dropped, self.drops, left_s)

    def _stages(self, utterance: Utterance) -> frozenset[str]:
        """What this utterance asks of what can be left out or not: kinds of heads, and replies."""
        fleet, wanted = self.engine.fleet, utterance.annotators
        kinds = fleet.kinds if wanted is None else frozenset(fleet.heads[name].spec.kind for name in wanted)
        replied = self.engine.replies is not None and utterance.retrieval.top_k
        return kinds | {REPLIES} if replied else kinds

    def _heads(self, kinds: frozenset[str], wanted: frozenset[str] | None) -> frozenset[str]:
        """The wanted heads of these kinds."""
        if not kinds:
            return kinds
        heads = self.engine.fleet.heads
        return frozenset(
            name
            for name, head in heads.items()
            if head.spec.kind in kinds and (wanted is None or name in wanted)
        )

    def _learn(
        self,
        stages: frozenset[str],
        dropped: frozenset[str],
        heads_s: Mapping[str, float],
        replies_s: float,
    ) -> None:
        """Remember what the stages took this time."""
        for kind, seconds in heads_s.items():
            self.costs.observe(kind, seconds)
        if REPLIES in stages - dropped:
            self.costs.observe(REPLIES, replies_s)
        for stage in dropped:
            self.costs.left(stage)
            metrics.SKIPPED.labels(stage).inc()

    async def _search(self, utterance: Utterance, encoding: Encoding) -> list[Hit] | None:
        """Replies to choose among; None where they could not be searched."""
        replies, adapter, k = self.engine.replies, self.engine.adapter, utterance.retrieval.top_k
        if replies is None or not k:
            return []
        vector = encoding.sentence if adapter is None else adapter.apply(encoding.sentence)
        persona = utterance.persona or (
            self.default_persona if self.default_persona in replies.personas else None
        )

        def search() -> list[Hit]:
            return replies.search(
                vector,
                k * _HITS_PER_REPLY,
                persona=persona,
                surface=utterance.surface or None,
                as_of=utterance.as_of or datetime.now(UTC),
                avoid=utterance.retrieval.avoid,
                tags=utterance.retrieval.tags,
            )

        if replies.quick:
            return search()
        try:
            return await asyncio.to_thread(search)
        except ConnectionError:  # replies kept elsewhere; what was understood is an answer without them too
            metrics.SEARCHES_FAILED.inc()
            return None

    def _rank(self, utterance: Utterance, hits: Sequence[Hit], situation: Situation) -> tuple[Candidate, ...]:
        replies = self.engine.replies
        if replies is None:
            return ()
        return self.engine.ranker.rank(
            hits,
            situation,
            replies.said,
            k=utterance.retrieval.top_k,
            explain=utterance.explain,
        )

    def _route(
        self,
        utterance: Utterance,
        annotations: Sequence[Annotation],
        hits: Sequence[Hit],
        replies: Sequence[Candidate],
    ) -> Route | None:
        engine = self.engine
        if engine.routes is None:
            return None
        facts = Facts(
            heads={annotation.name: annotation for annotation in annotations},
            best=next((hit for hit in hits if hit.item.id == replies[0].id), None) if replies else None,
            personas=() if engine.replies is None else engine.replies.personas,
            surface=utterance.surface,
            locale=utterance.locale,
        )
        return engine.routes.take(facts, explain=utterance.explain)


def _heard(utterance: Utterance, phrases: Sequence[Phrase], encodings: Sequence[Encoding]) -> Heard:
    """What the heads see; hypotheses weigh by their confidence, or the same where there is none."""
    count = len(phrases)
    confidences = [hypothesis.confidence or 0.0 for hypothesis in utterance.hypotheses]
    total = sum(confidences)
    weights = tuple(confidence / total for confidence in confidences) if total > 0 else (1 / count,) * count
    return Heard(
        phrases=tuple(phrase.text for phrase in phrases),
        encodings=tuple(encodings[:count]),
        weights=weights,
        best=max(range(count), key=weights.__getitem__),
        context=tuple(
            HeardTurn(turn.role, encoding)
            for turn, encoding in zip(utterance.context, encodings[count:], strict=True)
        ),
    )


def _turns(utterance: Utterance, heard: Heard) -> tuple[Turn, ...]:
    """The turns before, as they were said, with their vectors."""
    return tuple(
        Turn(turn.role, turn.text, encoded.encoding.sentence)
        for turn, encoded in zip(utterance.context, heard.context, strict=True)
    )


def _in_original(annotation: Annotation, phrase: Phrase) -> Annotation:
    """Spans in the caller's own text."""
    if not annotation.spans or phrase.starts is None:
        return annotation
    return replace(
        annotation,
        spans=tuple(
            span._replace(start=start, end=end)
            for span in annotation.spans
            for start, end in (phrase.to_original(span.start, span.end),)
        ),
    )


def _count(
    timings: Timings, found: Sequence[tuple[Encoding, Source]], annotations: Sequence[Annotation]
) -> None:
    for stage in metrics.StageTimes.STAGES:
        metrics.STAGES.observe(stage, getattr(timings, stage))
    for _, source in found:
        _SOURCES[source].inc()
    for annotation in annotations:
        if annotation.status is not Status.OK:
            metrics.ANNOTATIONS.labels(annotation.name, annotation.status.value).inc()


# Looked up once: finding a labelled child costs more than counting.
_SOURCES = {source: metrics.ENCODINGS.labels(source.value) for source in Source}
