"""One utterance, from text to reply. This is the file to read first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Status
from index.replies import Hit
from nlu import metrics, shadow
from nlu.cache import EncodingCache
from nlu.engine import Engine
from nlu.errors import InvalidInput
from nlu.features import Situation, Turn
from nlu.lru import Lru
from nlu.normalizer import Phrase, normalize
from nlu.routes import Facts
from nlu.types import Candidate, Reply, Route, Source, Timings, Utterance

_HITS_PER_REPLY = 4  # the ranker chooses among this many times as many hits as replies are wanted


@dataclass(frozen=True)
class Pipeline:
    """An engine with its caches. A new bundle is a new Pipeline; a request keeps the one it began with.

    `answers` are whole replies, kept by question. They are safe to keep because they die with the engine that gave
    them; what outlives an engine, in Redis or a cold table, are Encodings only. `sample` keeps flips of shadow heads.
    """

    engine: Engine
    cache: EncodingCache
    answers: Lru[bytes] | None
    default_persona: str
    sample: shadow.Sample | None = None

    def moment(self, as_of: datetime | None) -> int:
        """A number for the stretch of time around `as_of` (None = now) in which the same replies are valid."""
        return 0 if self.engine.replies is None else self.engine.replies.moment(as_of or datetime.now(UTC))

    async def understand(self, utterance: Utterance, *, deadline: float) -> Reply:
        """Answer one turn. `deadline` is in time.monotonic() seconds. Raises the errors of nlu/errors.py."""
        began = time.perf_counter_ns()
        engine = self.engine
        self._check(utterance)
        phrases = [self._normalize(hypothesis.text) for hypothesis in utterance.hypotheses]
        turns = [self._normalize(turn.text) for turn in utterance.context]
        normalized = time.perf_counter_ns()

        tokens = engine.fleet.needs_tokens(utterance.annotators)
        found = await self._encode([*phrases, *turns], tokens=tokens, deadline=deadline)
        encodings = [encoding for encoding, _ in found]
        encoded = time.perf_counter_ns()

        heard = _heard(utterance, phrases, encodings)
        answered = engine.fleet.answer(heard, wanted=utterance.annotators)
        annotations = answered.live
        annotated = time.perf_counter_ns()

        nearest = await self._search(utterance, encodings[heard.best])
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
        if engine.fleet.shadows:
            # The loop comes to it when this call has nothing more to do, that is when its reply has been handed to gRPC.
            asyncio.get_running_loop().call_soon(
                shadow.observe, engine.fleet, answered, phrases[heard.best].text, self.sample
            )
        return Reply(
            phrase=phrases[heard.best].text,
            hypothesis=heard.best,
            annotations=tuple(_in_original(annotation, phrases[heard.best]) for annotation in annotations),
            replies=replies,
            versions=engine.versions,
            timings=timings,
            source=found[heard.best][1],
            route=route,
            searched=nearest is not None,
        )

    async def encode(
        self, texts: Sequence[str], *, tokens: bool, deadline: float
    ) -> list[tuple[Phrase, Encoding, Source]]:
        """The vectorizer as a service: each text's phrase, Encoding and source."""
        phrases = [self._normalize(text) for text in texts]
        found = await self._encode(phrases, tokens=tokens, deadline=deadline)
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
        for field, value, known in (
            ("persona", utterance.persona, replies.personas),
            ("surface", utterance.surface, replies.surfaces),
        ):
            if value and value not in known:
                raise InvalidInput(
                    field, found=repr(value), expected=f"one of {', '.join(known)}", remedy="see Describe"
                )

    def _normalize(self, text: str) -> Phrase:
        return normalize(text, uncased=self.engine.vectorizer.spec.uncased)

    async def _encode(
        self, phrases: Sequence[Phrase], *, tokens: bool, deadline: float
    ) -> list[tuple[Encoding, Source]]:
        near = [self.cache.near(phrase.text, tokens=tokens) for phrase in phrases]
        missing = [phrase for phrase, hit in zip(phrases, near, strict=True) if hit is None]
        if not missing:
            return [hit for hit in near if hit is not None]
        if len(missing) == 1:
            fresh = [await self.cache.encode(missing[0].text, tokens=tokens, deadline=deadline)]
        else:
            wanted = [self.cache.encode(phrase.text, tokens=tokens, deadline=deadline) for phrase in missing]
            answers = await asyncio.gather(*wanted, return_exceptions=True)
            fresh = [_or_raise(answer) for answer in answers]
        computed = iter(fresh)
        return [next(computed) if hit is None else hit for hit in near]

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


def _or_raise(answer: tuple[Encoding, Source] | BaseException) -> tuple[Encoding, Source]:
    if isinstance(answer, BaseException):
        raise answer
    return answer


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
