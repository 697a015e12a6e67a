"""Other people's shapes: what is refused names its field and never quotes what it holds."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from nlu import dialects
from nlu.dialects import EmbeddingsReply, EmbeddingsRequest, ErrorReply, ParseReply, ParseRequest
from nlu.errors import InvalidInput
from nlu.v1 import nlu_pb2 as pb

SECRET = "meet me at the old mill"


def test_dialects_one_string_is_a_list_of_one() -> None:
    assert dialects.parsed(EmbeddingsRequest, b'{"input": "stop", "model": "m"}').texts == ["stop"]
    assert dialects.parsed(EmbeddingsRequest, b'{"input": ["a", "b"], "model": "m"}').texts == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (f'{{"input": {{"text": "{SECRET}"}}, "model": "m"}}', "input"),
        (f'{{"input": ["{SECRET}", 5], "model": "m"}}', "input"),
        (f'{{"input": "{SECRET}"}}', "model"),
        (f'{{"input": "{SECRET}", "model": 5}}', "model"),
        (f'{{"input": "{SECRET}", "model": "m", "dimensions": "{SECRET}"}}', "dimensions"),
        (f'{{"input": "{SECRET}", "model": "m", "encoding_format": "{SECRET}"}}', "encoding_format"),
        (f'{{"input": "{SECRET}", "model": "m", "{SECRET}": 1}}', "request"),
        (f'{{"input": "{SECRET}", "model": "m", "{"x" * 500}": 1}}', "x" * 64),
        (f'{{"input": "{SECRET}', "request"),
        (f'"{SECRET}"', "request"),
        (f'{{"input": "\\ud800 {SECRET}", "model": "m"}}', "request"),
    ],
)
def test_dialects_bad_requests_name_the_field_and_quote_nothing(body: str, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        dialects.parsed(EmbeddingsRequest, body.encode())
    assert refused.value.field == field
    assert "found" in str(refused.value) and "expected" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None  # pydantic's own words quote what they choked on


def test_dialects_rasas_other_fields_are_not_looked_at() -> None:
    assert dialects.parsed(ParseRequest, b'{"text": "stop", "sender": 5}').text == "stop"
    with pytest.raises(InvalidInput, match="text: found something else, expected this field"):
        dialects.parsed(ParseRequest, b'{"message": "stop"}')


def test_dialects_base64_is_little_endian_float32() -> None:
    vectors = np.array([[0.5, -0.25], [1.0, 0.0]], np.float32)
    made = EmbeddingsReply(**dialects.embeddings(vectors, model="m", tokens=3, encoding="base64"))
    row = made.data[1].embedding
    assert isinstance(row, str)
    assert base64.b64decode(row) == bytes.fromhex("0000803f00000000")
    assert made.usage.total_tokens == 3


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (401, "invalid_request_error", "invalid_api_key"),
        (404, "invalid_request_error", "model_not_found"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (503, "server_error", None),
    ],
)
def test_dialects_errors_have_openais_types(status: int, kind: str, code: str | None) -> None:
    error = ErrorReply(**dialects.error(status, "no", param="input")).error
    assert (error.type, error.code, error.param, error.message) == (kind, code, "input", "no")


def reply(*annotations: pb.Annotation) -> pb.UnderstandReply:
    return pb.UnderstandReply(annotations=annotations)


def annotation(name: str, kind: str, *labels: tuple[str, float, bool]) -> pb.Annotation:
    made = [pb.Label(label=label, score=score, accepted=accepted) for label, score, accepted in labels]
    return pb.Annotation(name=name, kind=kind, labels=made)


def test_dialects_intent_is_the_head_of_that_name() -> None:
    mood, intent = (
        annotation("mood", "sentence", ("glad", 0.75, True)),
        annotation("intent", "sentence", ("stop", 0.5, True), ("play", 0.25, False)),
    )
    said = ParseReply(**dialects.parse_reply(reply(mood, intent), ParseRequest(text="stop")))
    assert (said.intent.name, said.intent.confidence) == ("stop", 0.5)
    assert [each.name for each in said.intent_ranking] == ["stop", "play"]
    other = ParseReply(**dialects.parse_reply(reply(mood), ParseRequest(text="stop")))
    assert other.intent.name == "glad"


def test_dialects_an_intent_that_is_not_accepted_has_no_name() -> None:
    unsure = annotation("intent", "sentence", ("stop", 0.25, False))
    said = ParseReply(**dialects.parse_reply(reply(unsure), ParseRequest(text="stop")))
    assert said.intent.name is None and said.intent.confidence == 0
    assert said.intent_ranking[0].name == "stop"
    nothing = ParseReply(**dialects.parse_reply(reply(), ParseRequest(text="stop")))
    assert nothing.intent.name is None and nothing.intent_ranking == []


def test_dialects_marks_of_punctuation_are_no_entities() -> None:
    span = pb.Span(label="time", text="six", start=3, end=6, score=0.5)
    slots = pb.Annotation(name="slots", kind="token", spans=[span])
    marks = pb.Annotation(name="marks", kind="token", spans=[span], restored="At six.")
    said = ParseReply(**dialects.parse_reply(reply(slots, marks), ParseRequest(text="at six")))
    assert [(each.entity, each.extractor) for each in said.entities] == [("time", "slots")]
