"""Our types to protobuf and back; every cap on what a request may hold is applied here, before anything is touched."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from annotators.annotator import Annotation, Encoding, Label, Status
from nlu.errors import InvalidInput
from nlu.normalizer import MAX_BYTES, MAX_CODE_POINTS, Phrase
from nlu.types import (
    Candidate,
    Description,
    Hypothesis,
    Release,
    Reply,
    Retrieval,
    Role,
    Route,
    Source,
    Turn,
    Utterance,
    Versions,
)
from nlu.v1 import nlu_pb2 as pb

MAX_REQUEST_BYTES = 64 * 1024
MAX_BATCH_REQUEST_BYTES = 512 * 1024
MAX_HYPOTHESES = 10
MAX_CONTEXT_TURNS = 16
MAX_BATCH = 32
MAX_TOP_K = 50
MAX_AVOID = 500
MAX_TAGS = 20
MAX_NAME = 64
DEFAULT_TOP_K = 5

_ROLES: dict[int, Role] = {pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
_STATUSES = {
    Status.OK: pb.STATUS_OK,
    Status.DEGRADED: pb.STATUS_DEGRADED,
    Status.SKIPPED: pb.STATUS_SKIPPED,
    Status.ERROR: pb.STATUS_ERROR,
}
_SOURCES = {
    Source.ANSWER: pb.SOURCE_ANSWER,
    Source.COLD: pb.SOURCE_COLD,
    Source.LRU: pb.SOURCE_LRU,
    Source.REDIS: pb.SOURCE_REDIS,
    Source.MODEL: pb.SOURCE_MODEL,
}


M = TypeVar("M", bound=Message)


def parse(message: M, raw: bytes, *, limit: int = MAX_REQUEST_BYTES) -> M:
    """Parse request bytes; a malformed or oversized request is the caller's error, in our words."""
    if len(raw) > limit:
        raise InvalidInput(
            "request",
            found=f"{len(raw)} bytes",
            expected=f"at most {limit}",
            remedy="send fewer or shorter texts",
        )
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise InvalidInput(
            "request", found="bytes that do not parse", expected=f"a {message.DESCRIPTOR.full_name} with valid UTF-8 strings",
            remedy="check the caller's stubs and text encoding",
        ) from error  # fmt: skip
    return message


def utterance(request: pb.UnderstandRequest, *, as_of: datetime) -> Utterance:
    """Check and translate; raises InvalidInput naming the field. `as_of` is the moment the answer is for."""
    _count("hypotheses", len(request.hypotheses), MAX_HYPOTHESES, at_least=1)
    _count("context", len(request.context), MAX_CONTEXT_TURNS)
    _count("annotators", len(request.annotators), MAX_NAME)
    _count("retrieval.avoid_ids", len(request.retrieval.avoid_ids), MAX_AVOID)
    _count("retrieval.tags", len(request.retrieval.tags), MAX_TAGS)
    for name in ("request_id", "locale", "persona", "surface"):
        if len(getattr(request, name)) > MAX_NAME:
            raise InvalidInput(
                name, found="a longer string", expected=f"at most {MAX_NAME} characters", remedy="shorten it"
            )
    return Utterance(
        hypotheses=_hypotheses(request),
        context=tuple(Turn(_role(turn.role, i), turn.text) for i, turn in enumerate(request.context)),
        request_id=request.request_id,
        locale=request.locale,
        persona=request.persona,
        surface=request.surface,
        as_of=as_of,
        annotators=frozenset(request.annotators) if request.annotators else None,
        retrieval=_retrieval(request.retrieval),
        explain=request.explain,
        raw_scores=request.raw_scores,
    )


def question(request: pb.UnderstandRequest, moment: int) -> bytes:
    """What a request asks, apart from who asks and when: equal questions of one engine have equal answers.

    `moment` numbers the stretch of time in which the same replies are valid.
    """
    if len(request.request_id) > MAX_NAME:
        raise InvalidInput(
            "request_id",
            found="a longer string",
            expected=f"at most {MAX_NAME} characters",
            remedy="shorten it",
        )
    asked = pb.UnderstandRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.ClearField("as_of")
    return moment.to_bytes(8, "little") + asked.SerializeToString(deterministic=True)


def clock(request: pb.UnderstandRequest) -> datetime | None:
    """The request's own clock, if it has one; raises InvalidInput."""
    return _clock(request) if request.HasField("as_of") else None


def keepable(message: pb.UnderstandReply) -> bytes | None:
    """A reply as it can be given again, without what belongs to one call; None where a head failed and may not again."""
    if any(annotation.status == pb.STATUS_ERROR for annotation in message.annotations):
        return None
    kept = pb.UnderstandReply()
    kept.CopyFrom(message)
    for name in ("request_id", "timings_ns", "source"):
        kept.ClearField(name)
    return kept.SerializeToString()


def given_again(kept: bytes, request_id: str, nanoseconds: int) -> bytes:
    """A kept reply for another call: serialised messages one after the other are the merged message."""
    mine = pb.UnderstandReply(
        request_id=request_id, timings_ns=pb.Timings(total=nanoseconds), source=pb.SOURCE_ANSWER
    )
    return kept + mine.SerializeToString()


def texts(request: pb.EncodeRequest) -> list[str]:
    """The texts of an Encode call; raises InvalidInput."""
    _count("texts", len(request.texts), MAX_BATCH, at_least=1)
    return list(request.texts)


def reply_message(reply: Reply, said: Utterance) -> pb.UnderstandReply:
    """A Reply as its message."""
    text = said.hypotheses[reply.hypothesis].text
    timings = reply.timings
    return pb.UnderstandReply(
        request_id=said.request_id,
        phrase=reply.phrase,
        annotations=[_annotation(annotation, text, said) for annotation in reply.annotations],
        replies=[_candidate(candidate, said) for candidate in reply.replies],
        versions=versions_message(reply.versions),
        timings_ns=pb.Timings(
            total=timings.total,
            normalize=timings.normalize,
            encode=timings.encode,
            annotate=timings.annotate,
            search=timings.search,
            rank=timings.rank,
        ),
        source=_SOURCES[reply.source],
        hypothesis=reply.hypothesis,
        route=None if reply.route is None else _route(reply.route),
        skipped=reply.skipped,
    )


def versions_message(versions: Versions) -> pb.Versions:
    """Versions as their message."""
    return pb.Versions(bundle=versions.bundle, vectorizer=versions.vectorizer, service=versions.service)


def vectors_message(
    phrase: Phrase, encoding: Encoding, source: Source, request: pb.EncodeRequest
) -> pb.Vectors:
    """One Encoding as its message, offsets in the caller's text; a cache may have tokens that nobody asked for."""
    message = pb.Vectors(phrase=phrase.text, source=_SOURCES[source])
    half = request.precision == pb.PRECISION_FLOAT16
    if half:
        message.sentence_f16 = encoding.sentence.astype("<f2").tobytes()
    else:
        message.sentence.extend(encoding.sentence.tolist())
    if request.tokens and encoding.tokens is not None and encoding.offsets is not None:
        if half:
            message.tokens_f16 = encoding.tokens.astype("<f2").tobytes()
        else:
            message.tokens.extend(encoding.tokens.reshape(-1).tolist())
        bounds = [phrase.to_original(start, end) for start, end in encoding.offsets.tolist()]
        message.token_starts.extend(start for start, _ in bounds)
        message.token_ends.extend(end for _, end in bounds)
    return message


def describe_message(description: Description | None, release: Release) -> pb.DescribeReply:
    """What an engine serves, None while there is none; what became of the release; and what a request may hold."""
    limits = pb.Limits(
        max_request_bytes=MAX_REQUEST_BYTES,
        max_text_bytes=MAX_BYTES,
        max_code_points=MAX_CODE_POINTS,
        max_hypotheses=MAX_HYPOTHESES,
        max_context_turns=MAX_CONTEXT_TURNS,
        max_batch=MAX_BATCH,
    )
    if description is None:
        return pb.DescribeReply(limits=limits, release=release_message(release))
    return pb.DescribeReply(
        versions=versions_message(description.versions),
        components=[
            pb.Component(name=part.name, kind=part.kind, digest=part.digest, state="READY")
            for part in description.components
        ],
        heads=[
            pb.Head(name=head.name, kind=head.kind, task=head.task, labels=head.labels, version=head.version)
            for head in description.heads
        ],
        dim=description.dim,
        token_dim=description.token_dim,
        replies=description.reply_rows,
        personas=description.personas,
        surfaces=description.surfaces,
        limits=limits,
        channel=description.channel,
        seq=description.seq,
        release=release_message(release),
    )


def release_message(release: Release) -> pb.Release:
    """A Release as its message."""
    message = pb.Release(
        state=release.state,
        bundle=release.bundle,
        channel=release.channel,
        seq=release.seq,
        pinned=release.pinned,
        wanted=release.wanted,
        reason=release.reason,
    )
    if release.since is not None:
        message.since.FromDatetime(release.since)
    if release.expires is not None:
        message.expires.FromDatetime(release.expires)
    return message


def _hypotheses(request: pb.UnderstandRequest) -> tuple[Hypothesis, ...]:
    hypotheses = []
    for i, hypothesis in enumerate(request.hypotheses):
        confidence = hypothesis.confidence if hypothesis.HasField("confidence") else None
        if confidence is not None and not (math.isfinite(confidence) and 0 <= confidence <= 1):
            raise InvalidInput(
                f"hypotheses[{i}].confidence",
                found=str(confidence),
                expected="a number from 0 to 1",
                remedy="leave it unset if unknown",
            )
        hypotheses.append(Hypothesis(hypothesis.text, confidence))
    return tuple(hypotheses)


def _role(role: int, i: int) -> Role:
    if role not in _ROLES:
        raise InvalidInput(
            f"context[{i}].role",
            found=str(role),
            expected="ROLE_USER or ROLE_ASSISTANT",
            remedy="say who spoke",
        )
    return _ROLES[role]


def _clock(request: pb.UnderstandRequest) -> datetime:
    try:
        return request.as_of.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            "as_of", found="a time out of range", expected="year 1 to 9999", remedy="leave it unset for now"
        ) from error


def _retrieval(retrieval: pb.Retrieval) -> Retrieval:
    top_k = retrieval.top_k if retrieval.HasField("top_k") else DEFAULT_TOP_K
    _count("retrieval.top_k", top_k, MAX_TOP_K)
    return Retrieval(top_k, frozenset(retrieval.avoid_ids), frozenset(retrieval.tags))


def _count(field: str, found: int, at_most: int, *, at_least: int = 0) -> None:
    if not at_least <= found <= at_most:
        raise InvalidInput(
            field, found=str(found), expected=f"{at_least} to {at_most}", remedy="see Describe for the limits"
        )


def _annotation(annotation: Annotation, text: str, said: Utterance) -> pb.Annotation:
    return pb.Annotation(
        name=annotation.name,
        kind=annotation.kind,
        status=_STATUSES[annotation.status],
        labels=[_label(label, said) for label in annotation.labels],
        spans=[
            pb.Span(
                label=span.label,
                text=text[span.start : span.end],
                start=span.start,
                end=span.end,
                score=span.score,
            )
            for span in annotation.spans
        ],
        disagreement=annotation.disagreement,
        out_of_scope=annotation.out_of_scope,
        restored=annotation.restored,
        version=annotation.version,
        note=annotation.note,
    )


def _label(label: Label, said: Utterance) -> pb.Label:
    message = pb.Label(label=label.label, score=label.score, accepted=label.accepted)
    if said.raw_scores:
        message.raw_score = label.raw_score
    if said.explain:
        message.threshold = label.threshold
    return message


def _route(route: Route) -> pb.Route:
    return pb.Route(to=route.to, name=route.name, because=route.because)


def _candidate(candidate: Candidate, said: Utterance) -> pb.Candidate:
    message = pb.Candidate(
        id=candidate.id, text=candidate.text, score=candidate.score, similarity=candidate.similarity
    )
    if said.explain:
        message.prompt = candidate.prompt
        message.features.update(candidate.features)
    return message
