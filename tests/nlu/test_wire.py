"""nlu.wire: what an answer leaves out and which release is served survive the way to the caller."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from annotators.annotator import Annotation, Status
from nlu import wire
from nlu.types import Description, Hypothesis, Release, Reply, Source, Timings, Utterance, Versions
from nlu.v1 import nlu_pb2 as pb

SAID = Utterance((Hypothesis("play music"),))
REPLY = Reply(
    phrase="play music",
    hypothesis=0,
    annotations=(Annotation("followup", "context", Status.SKIPPED, note="no time"),),
    replies=(),
    versions=Versions("b", "v", "s"),
    timings=Timings(6, 1, 2, 1, 1, 1),
    source=Source.MODEL,
    skipped=("followup", "replies"),
)
DESCRIBED = Description(REPLY.versions, "prod", 7, (), (), 8, 4, 3, ("calm",), ("tv",))
RELEASE = Release(
    state="SERVING",
    bundle="b" * 64,
    channel="prod",
    seq=7,
    since=datetime(2026, 5, 1, 12, 30, tzinfo=UTC),
    expires=datetime(2026, 8, 1, tzinfo=UTC),
    pinned="b" * 64,
    wanted="c" * 64,
    reason="expired: found 1 May, expected a later day; publish again",
)


def test_wire_reply_says_what_was_left_out() -> None:
    message = wire.reply_message(REPLY, SAID)
    assert list(message.skipped) == ["followup", "replies"]
    assert (message.annotations[0].status, message.annotations[0].note) == (pb.STATUS_SKIPPED, "no time")
    assert list(wire.reply_message(replace(REPLY, skipped=()), SAID).skipped) == []


@pytest.mark.parametrize("field", ["state", "bundle", "channel", "seq", "pinned", "wanted", "reason"])
def test_wire_release_is_told_whole(field: str) -> None:
    assert getattr(wire.release_message(RELEASE), field) == getattr(RELEASE, field)


def test_wire_release_times_are_told_in_utc() -> None:
    message = wire.release_message(RELEASE)
    assert message.since.ToDatetime(tzinfo=UTC) == RELEASE.since
    assert message.expires.ToDatetime(tzinfo=UTC) == RELEASE.expires


def test_wire_release_that_never_expires_says_nothing_of_it() -> None:
    message = wire.release_message(Release())
    assert not message.HasField("expires")
    assert not message.HasField("since")
    assert message.state == "HOLDING"


def test_wire_describe_has_limits_and_release_even_without_an_engine() -> None:
    nothing, something = (wire.describe_message(each, RELEASE) for each in (None, DESCRIBED))
    assert nothing.limits == something.limits
    assert nothing.release == something.release
    assert nothing.limits.max_request_bytes == wire.MAX_REQUEST_BYTES
    assert (nothing.versions.bundle, something.versions.bundle) == ("", "b")
