"""Requests and answers in the words of others: OpenAI's embeddings, Rasa's parse. Only shapes; nothing is decided here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nlu.errors import InvalidInput
from nlu.v1 import nlu_pb2 as pb

MAX_INPUTS = 256  # of one embeddings request; more than one call of Encode takes, so it becomes several

R = TypeVar("R", bound="_Request")

_OF_INPUT = f"a string, or a list of 1 to {MAX_INPUTS} strings"


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EmbeddingsRequest(_Request):
    """POST /v1/embeddings. `user` is taken and not looked at."""

    input: str | list[str]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """What is to be encoded."""
        return [self.input] if isinstance(self.input, str) else self.input


class Embedding(BaseModel):
    """One vector: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """Of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """What can be asked for vectors."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "chorus-nlu"


class ModelsReply(BaseModel):
    """Of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Around it."""

    error: ErrorDetail


class ParseRequest(_Request):
    """POST /model/parse; what Rasa's other settings say is not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    text: str
    message_id: str | None = None


class Intent(BaseModel):
    """A label and its calibrated score; no name: nothing was accepted."""

    name: str | None
    confidence: float


class Entity(BaseModel):
    """A span, in code points of the text, end exclusive."""

    entity: str
    start: int
    end: int
    value: str
    confidence_entity: float
    extractor: str


class ParseReply(BaseModel):
    """Of POST /model/parse."""

    text: str
    message_id: str | None = None
    intent: Intent
    intent_ranking: list[Intent]
    entities: list[Entity]


class VersionReply(BaseModel):
    """Of GET /version."""

    version: str
    minimum_compatible_version: str


class StatusReply(BaseModel):
    """Of GET /status."""

    model_id: str = Field(description="SHA-256 of the bundle")
    model_file: str = Field(description="its channel and number")
    num_active_training_jobs: int = 0


def parsed(kind: type[R], body: bytes) -> R:
    """A request from its JSON; raises InvalidInput naming the field, and never quoting what it holds."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step.isidentifier())
        if first["type"] == "json_invalid":
            field, expected = "request", "JSON in UTF-8"
        elif first["loc"][:1] == ("input",):
            field, expected = (
                "input",
                f"{_OF_INPUT}; lists of tokens are not taken, because tokenizers differ",
            )
        else:
            expected = _expected(first["type"], first["msg"])
        raise InvalidInput(
            field[:64] or "request", found="something else", expected=expected, remedy="see /docs"
        ) from None
    if isinstance(request, EmbeddingsRequest) and not 1 <= len(request.texts) <= MAX_INPUTS:
        raise InvalidInput(
            "input", found=f"{len(request.texts)} strings", expected=_OF_INPUT, remedy="split the list"
        )
    return request


def embeddings(
    vectors: NDArray[np.float32], *, model: str, tokens: int, encoding: Literal["float", "base64"]
) -> dict[str, Any]:
    """An EmbeddingsReply of vectors [inputs, dim]."""
    rows: list[Any] = (
        vectors.tolist()
        if encoding == "float"
        else [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors]
    )
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def models(names: Sequence[str]) -> dict[str, Any]:
    """A ModelsReply."""
    return ModelsReply(data=[Model(id=name) for name in names]).model_dump()


def error(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """An ErrorReply."""
    kinds = {
        401: "invalid_api_key",
        403: "permission_denied",
        404: "model_not_found",
        429: "rate_limit_exceeded",
    }
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": param,
            "code": kinds.get(status),
        }
    }


def parse_reply(reply: pb.UnderstandReply, said: ParseRequest) -> dict[str, Any]:
    """A ParseReply. The intent is that of the head called intent, else of the first head that reads whole sentences."""
    annotations = {annotation.name: annotation for annotation in reply.annotations}
    sentences = [annotation for annotation in reply.annotations if annotation.kind == "sentence"]
    chosen = annotations.get("intent") or next(iter(sentences), pb.Annotation())
    ranking = [{"name": label.label, "confidence": label.score} for label in chosen.labels]
    best = next((label for label in chosen.labels if label.accepted), None)
    return {
        "text": said.text,
        "message_id": said.message_id,
        "intent": {"name": None, "confidence": 0.0}
        if best is None
        else {"name": best.label, "confidence": best.score},
        "intent_ranking": ranking,
        "entities": [
            {
                "entity": span.label,
                "start": span.start,
                "end": span.end,
                "value": span.text,
                "confidence_entity": span.score,
                "extractor": annotation.name,
            }
            for annotation in reply.annotations
            if not annotation.restored  # marks of punctuation name nothing
            for span in annotation.spans
        ],
    }


def _expected(kind: str, message: str) -> str:
    """What pydantic says is wrong, as what would be right."""
    if kind == "extra_forbidden":
        return "no field of this name"
    if kind == "missing":
        return "this field"
    return message.removeprefix("Input should be ")
