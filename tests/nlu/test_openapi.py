"""The document is a valid one, and what the gateway says and takes is what it describes."""

from __future__ import annotations

from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from nlu import openapi
from nlu.engine import Engine
from nlu.openapi import Operation
from nlu.v1 import nlu_pb2 as pb
from tests.nlu.test_gateway import MODEL, TURN, fronted
from tests.web import get, post

ASKED: dict[str, Any] = {
    "/v1/understand": {**TURN, "explain": True, "raw_scores": True, "as_of": "2026-06-03T12:00:00Z"},
    "/v1/understand:batch": {"requests": [TURN, {"hypotheses": []}]},
    "/v1/encode": {"texts": ["stop"], "tokens": True, "precision": "PRECISION_FLOAT16"},
    "/v1/embeddings": {"input": ["stop", "go"], "model": MODEL},
    "/model/parse": {"text": "wake me at six"},
}


def conforms(document: dict[str, Any], schema: dict[str, Any], found: Any) -> bool:
    """Whether it is what the schema says."""
    whole = {**schema, "components": document["components"]}
    return not list(OAS31Validator(whole).iter_errors(found))


def schema_of(part: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = part["content"]["application/json"]["schema"]
    return schema


async def test_openapi_document_is_valid_and_true(engine: Engine) -> None:
    async with fronted(engine) as front:
        document = (await get(front.port, "/openapi.json")).json
        validate(document)
        assert document["openapi"].startswith("3.1.")
        for path, verbs in document["paths"].items():
            for verb, operation in verbs.items():
                answer = await (
                    post(front.port, path, ASKED[path]) if verb == "post" else get(front.port, path)
                )
                assert answer.status == 200, path
                if "application/json" not in operation["responses"]["200"].get("content", {}):
                    continue
                assert conforms(document, schema_of(operation["responses"]["200"]), answer.json), path
                if verb == "post":
                    asked = schema_of(operation["requestBody"])
                    assert conforms(document, asked, ASKED[path])
                    refused = await post(front.port, path, b"{")
                    assert refused.status == 400
                    assert conforms(document, schema_of(operation["responses"]["default"]), refused.json)
                    assert not conforms(document, asked, 5)  # the control: not everything conforms
        assert ASKED.keys() <= document["paths"].keys()


@pytest.mark.parametrize(
    ("request_", "fits"),
    [
        ({"hypotheses": [{"text": "stop", "confidence": 0.5}]}, True),
        ({"hypotheses": [{"txt": "stop"}]}, False),
        ({"hypotheses": "stop"}, False),
        ({"context": [{"role": "ROLE_USER", "text": "x"}]}, True),
        ({"context": [{"role": "ROLE_DOG", "text": "x"}]}, False),
        ({"retrieval": {"top_k": -1}}, False),
        ({"explain": "yes"}, False),
        ({"texts": []}, False),
    ],
)
def test_openapi_schema_refuses_what_the_gateway_refuses(request_: dict[str, Any], fits: bool) -> None:
    operation = Operation("post", "/x", "X.", None, pb.DESCRIPTOR.message_types_by_name["UnderstandRequest"])
    document = openapi.document([operation], version="1")
    assert conforms(document, {"$ref": "#/components/schemas/nlu.v1.UnderstandRequest"}, request_) is fits


def test_openapi_covers_every_field_of_every_message() -> None:
    messages = pb.DESCRIPTOR.message_types_by_name
    operations = [Operation("get", f"/{name}", "X.", message) for name, message in messages.items()]
    schemas = openapi.document(operations, version="1")["components"]["schemas"]
    for message in messages.values():
        assert schemas[message.full_name]["properties"].keys() == {field.name for field in message.fields}
    assert schemas["nlu.v1.Candidate"]["properties"]["features"]["additionalProperties"]["type"] == "number"
    assert schemas["nlu.v1.Timings"]["properties"]["total"]["type"] == "string"


def test_openapi_page_escapes_what_it_shows() -> None:
    document = openapi.document([Operation("get", "/<x>", "a < b & c", "text")], version="<1>")
    page = openapi.page(document)
    assert "a &lt; b &amp; c" in page and "/&lt;x&gt;" in page and "<1>" not in page
