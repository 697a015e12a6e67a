"""The gateway over real sockets: the desk's own answers as JSON, every refusal in one shape, and nothing that harms it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from tokenizers import Tokenizer

from annotators.annotator import Encoding
from nlu import callers, gateway, metrics
from nlu.callers import Callers
from nlu.desk import Desk
from nlu.engine import Engine
from nlu.health import Health
from nlu.serve import pipeline_of
from nlu.settings import Settings
from nlu.types import Release
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import TOKENIZER_FILE, Vectorizer
from tests.pki import authority, issue, tls_settings
from tests.tiny import Made
from tests.web import JSON, Answer, exchange, get, post, request

MODEL = "tiny-0"
TURN = {"hypotheses": [{"text": "turn the lights on"}]}


@dataclass(frozen=True)
class Front:
    """A gateway that listens, and what stands behind it."""

    port: int
    desk: Desk
    health: Health


@asynccontextmanager
async def fronted(
    engine: Engine | None, settings: Settings | None = None, *, known: Callers | None = None
) -> AsyncIterator[Front]:
    """A gateway over the tiny engine, or over a desk that has nothing to serve."""
    settings = settings or Settings(http_port=0)
    desk = Desk(in_flight=64, deadline_s=20, max_deadline_s=20, callers=known)
    health = Health()
    listener = await gateway.serve_http(gateway.app(desk, settings, health=health), settings)
    try:
        if engine is None:
            yield Front(listener.port, desk, health)
            return
        async with pipeline_of(engine, settings) as pipeline:
            await desk.flip(pipeline)
            yield Front(listener.port, desk, health)
    finally:
        await listener.close(1)


@pytest.fixture
async def front(engine: Engine) -> AsyncIterator[Front]:
    async with fronted(engine) as made:
        yield made


@dataclass
class Held:
    """Holds the model until released."""

    released: threading.Event
    reached: threading.Event


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    made = Held(threading.Event(), threading.Event())
    real = Vectorizer.encode

    def encode(self_: Vectorizer, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
        made.reached.set()
        made.released.wait(10)
        return real(self_, phrases, tokens=tokens)

    monkeypatch.setattr(Vectorizer, "encode", encode)
    return made


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def calls(method: str) -> Counter[str]:
    """What the desk has counted so far, by code."""
    return Counter(
        {
            sample.labels["code"]: int(sample.value)
            for family in metrics.CALLS.collect()
            for sample in family.samples
            if sample.labels["method"] == method
        }
    )


def asked_so_far() -> Counter[tuple[str, str]]:
    """What the gateway has counted so far, by path and status."""
    return Counter(
        {
            (sample.labels["path"], sample.labels["status"]): int(sample.value)
            for family in metrics.HTTP.collect()
            for sample in family.samples
        }
    )


async def test_gateway_understand_is_the_desks_reply(front: Front) -> None:
    asked = {**TURN, "persona": "calm", "request_id": "7", "retrieval": {"top_k": 2}, "explain": True}
    answer = await post(front.port, "/v1/understand", asked)
    raw = json_format.ParseDict(asked, pb.UnderstandRequest()).SerializeToString()
    reply = await front.desk.answer("Understand", raw, remaining_s=None, metadata={}, peer="")
    found = json_format.Parse(answer.body, pb.UnderstandReply())
    wanted = pb.UnderstandReply.FromString(reply)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert found.source in (pb.SOURCE_MODEL, pb.SOURCE_COLD, pb.SOURCE_LRU)
    for each in (found, wanted):
        each.ClearField("timings_ns")
        each.ClearField("source")
    assert found == wanted
    assert answer.json["request_id"] == "7"
    assert (
        answer.json["annotations"][0]["labels"][-1]["accepted"] is False
    )  # said, though it is proto3's default


async def test_gateway_takes_both_spellings_of_a_field(front: Front) -> None:
    for name in ("raw_scores", "rawScores"):
        answer = await post(front.port, "/v1/understand", {**TURN, name: True})
        assert "raw_score" in answer.json["annotations"][0]["labels"][0]


async def test_gateway_batch_answers_each_item(front: Front) -> None:
    answer = await post(front.port, "/v1/understand:batch", {"requests": [TURN, {"hypotheses": []}]})
    first, second = answer.json["outcomes"]
    assert first["reply"]["phrase"] == "turn the lights on"
    assert second["problem"]["code"] == 3


async def test_gateway_encode_and_describe(front: Front) -> None:
    answer = await post(front.port, "/v1/encode", {"texts": ["stop", "стоп"], "tokens": True})
    assert [each["phrase"] for each in answer.json["vectors"]] == ["stop", "стоп"]
    assert len(answer.json["vectors"][0]["sentence"]) == answer.json["dim"] == 8
    described = await get(front.port, "/v1/describe")
    assert {head["name"] for head in described.json["heads"]} >= {"intent", "slots"}


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_gateway_embeddings_are_the_vectors(
    front: Front, engine: Engine, tiny: Made, form: str
) -> None:
    """Requests as the openai package sends them; values against the vectorizer itself."""
    texts = ["hello there", "Привет, мир", *(f"phrase number {i}" for i in range(70))]
    answer = await post(
        front.port, "/v1/embeddings", {"input": texts, "model": MODEL, "encoding_format": form}
    )
    assert answer.status == 200, answer.body
    rows = [each["embedding"] for each in answer.json["data"]]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in rows]
    phrases = ["hello there", "привет, мир", *(f"phrase number {i}" for i in range(70))]
    wanted = [encoding.sentence for encoding in engine.vectorizer.encode(phrases, tokens=False)]
    np.testing.assert_array_equal(np.array(rows, np.float32), np.stack(wanted))
    assert [each["index"] for each in answer.json["data"]] == list(range(72))
    tokenizer = Tokenizer.from_file(str(tiny.parts / "vectorizer.tiny" / TOKENIZER_FILE))
    tokens = sum(len(tokenizer.encode(phrase).ids) for phrase in phrases)
    assert answer.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer.json["object"], answer.json["model"]) == ("list", MODEL)


async def test_gateway_embeddings_of_one_string(front: Front) -> None:
    answer = await post(
        front.port, "/v1/embeddings", {"input": "stop", "model": MODEL, "dimensions": 8, "user": "u"}
    )
    assert [each["object"] for each in answer.json["data"]] == ["embedding"]
    models = await get(front.port, "/v1/models")
    assert [model["id"] for model in models.json["data"]] == [MODEL]


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "says"),
    [
        ({"input": [1, 2, 3]}, 400, "input", None, "lists of tokens are not taken"),
        ({"input": [[1, 2], [3]]}, 400, "input", None, "lists of tokens are not taken"),
        ({"input": []}, 400, "input", None, "found 0 strings"),
        ({"input": ["a"] * 257}, 400, "input", None, "found 257 strings"),
        ({"input": [0] * 1000}, 400, "input", None, "more than 1000 values"),
        ({"input": ""}, 400, "input", None, "found nothing"),
        ({"input": "word " * 1000}, 400, "input", None, "at most 4096"),
        ({"model": "text-embedding-3-small"}, 404, None, "model_not_found", "GET /v1/models"),
        ({"dimensions": 4}, 400, "dimensions", None, "expected 8"),
        ({"encoding_format": "int8"}, 400, "encoding_format", None, "'float' or 'base64'"),
        ({"colour": "red"}, 400, "colour", None, "no field of this name"),
        ({"model": None}, 400, "model", None, "a valid string"),
    ],
)
async def test_gateway_embeddings_refuses_in_openais_words(
    front: Front, change: dict[str, Any], status: int, param: str | None, code: str | None, says: str
) -> None:
    answer = await post(front.port, "/v1/embeddings", {"input": "stop", "model": MODEL, **change})
    assert answer.status == status
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]
    if param is None or param in ("input", "dimensions"):
        assert error["param"] == param
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


async def test_gateway_parse_answers_as_rasa_does(front: Front) -> None:
    answer = await post(
        front.port, "/model/parse", {"text": "Wake me at six", "message_id": "m-1", "sender": "s"}
    )
    assert answer.status == 200, answer.body
    said = answer.json
    assert (said["text"], said["message_id"]) == ("Wake me at six", "m-1")
    assert said["intent"] == said["intent_ranking"][0]
    assert [each["confidence"] for each in said["intent_ranking"]] == sorted(
        (each["confidence"] for each in said["intent_ranking"]), reverse=True
    )
    (entity,) = said["entities"]
    assert (entity["entity"], entity["value"]) == ("time", "six")
    assert said["text"][entity["start"] : entity["end"]] == "six"
    assert 0 < entity["confidence_entity"] <= 1


async def test_gateway_small_pages(front: Front) -> None:
    assert (await get(front.port, "/")).body.startswith(b"Hello from Chorus NLU: ")
    version = (await get(front.port, "/version")).json
    assert version.keys() == {"version", "minimum_compatible_version"}
    status = (await get(front.port, "/status")).json
    assert status["model_id"] == (await get(front.port, "/v1/describe")).json["versions"]["bundle"]
    assert status["num_active_training_jobs"] == 0


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "unknown field": (b'{"texts": ["stop"]}', "found a field 'texts', expected the JSON of a nlu.v1.UnderstandRequest"),
    "unknown nested field": (b'{"hypotheses": [{"txt": "stop"}]}', "found a field 'txt', expected the JSON of a nlu.v1.Hypothesis"),
    "no JSON": (b"hypotheses: stop", "request: found "),
    "empty": (b"", "request: found "),
    "a list": (b"[]", "hypotheses: found 0"),
    "a number": (b"5", "request: found "),
    "not UTF-8": (b'{"request_id": "\xff\xfe"}', "request: found no JSON in UTF-8"),
    "lone surrogate": (b'{"hypotheses": [{"text": "\\ud800"}]}', "request: found "),
    "lone surrogate that is quoted": (b'{"hypotheses": "\\ud800"}', r"\ud800"),
    "lone surrogate as a number": (b'{"hypotheses": [{"confidence": "\\ud800"}]}', r"\ud800"),
    "wrong type": (b'{"hypotheses": "stop"}', "request: found "),
    "twice the same": (b'{"explain": true, "explain": false}', "request: found "),
    "deep": (b"[" * 50_000, "request: found "),
    "deep and closed": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "request: found "),
    "endless digits": (b'{"retrieval": {"top_k": ' + b"9" * 10_000 + b"}}", "request: found "),
    "NaN": (b'{"hypotheses": [{"text": "stop", "confidence": NaN}]}', "NaN"),
    "infinite": (b'{"hypotheses": [{"text": "stop", "confidence": 1e999}]}', "found"),
    "bad enum": (b'{"context": [{"role": "ROLE_DOG", "text": "x"}]}', "request: found "),
    "bad clock": (b'{"hypotheses": [{"text": "stop"}], "as_of": "yesterday"}', "request: found "),
    "many values": (json.dumps({"annotators": [""] * 1001}).encode(), "found more than 1000 values"),
    "silence": (b'{"hypotheses": [{"text": "..."}]}', "found nothing but"),
    "unknown annotator": (b'{"hypotheses": [{"text": "stop"}], "annotators": ["x"]}', "annotators: found 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BODIES)
async def test_gateway_bad_input_is_the_callers_error(front: Front, what: str) -> None:
    body, says = BAD_BODIES[what]
    answer = await post(front.port, "/v1/understand", body, {"x-request-id": "mine-1"})
    assert (answer.status, answer.json["code"]) == (400, "INVALID_ARGUMENT")
    assert answer.json.keys() == {"code", "message", "request_id"}
    assert answer.json["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert says in answer.json["message"]
    assert "Traceback" not in answer.json["message"] and "_pb2" not in answer.json["message"]
    assert (await post(front.port, "/v1/understand", TURN)).status == 200


async def test_gateway_the_largest_request_that_is_allowed_is_answered(front: Front) -> None:
    """What nlu/wire.py allows of everything, in Russian, as clients that escape it send it."""
    asked = {
        "hypotheses": [{"text": f"включи свет {i}", "confidence": 0.1} for i in range(10)],
        "context": [{"role": "ROLE_USER", "text": "привет " * 60}] * 16,
        "retrieval": {"top_k": 50, "avoid_ids": [f"reply-{i}" for i in range(500)], "tags": ["x"] * 20},
    }
    assert (await post(front.port, "/v1/understand", asked)).status == 200
    batch = {"requests": [{**asked, "context": []}] * 32}
    assert (await post(front.port, "/v1/understand:batch", batch)).status == 200


async def test_gateway_what_is_too_large_is_refused_before_it_is_read(front: Front) -> None:
    head = {**JSON, "content-length": str(gateway.MAX_BODY + 1)}
    unread = await exchange(front.port, request("POST", "/v1/understand", headers=head))
    assert unread is not None and unread.status == 413  # not one byte of it was sent
    assert unread.headers["connection"] == "close"
    endless = request("POST", "/v1/understand", headers={**JSON, "content-length": "9" * 40})
    assert (answer := await exchange(front.port, endless)) is not None and answer.status in (400, 413)
    fits = json.dumps({**TURN, "request_id": "x"}).encode().ljust(gateway.MAX_BODY)
    assert (await post(front.port, "/v1/understand", fits)).status == 200  # the control: one byte less


async def test_gateway_chunks_are_capped_too(front: Front) -> None:
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    head = request("POST", "/v1/understand", headers={**JSON, "transfer-encoding": "chunked"}).replace(
        b"content-length: 0\r\n", b""
    )
    answer = await exchange(front.port, head + chunk * 9 + b"0\r\n\r\n")
    assert answer is None or answer.status == 413  # hung up on while it was still sending, or told
    small = json.dumps(TURN).encode()
    whole = head + f"{len(small):x}\r\n".encode() + small + b"\r\n0\r\n\r\n"
    assert (control := await exchange(front.port, whole)) is not None and control.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_gateway_takes_json_and_nothing_else(front: Front, headers: dict[str, str]) -> None:
    answer = await post(front.port, "/v1/understand", TURN, headers)
    assert (answer.status, answer.json["code"]) == (415, "INVALID_ARGUMENT")
    fine = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await post(front.port, "/v1/understand", TURN, fine)).status == 200


async def test_gateway_paths_and_methods_that_are_not_there(front: Front) -> None:
    missing = await get(front.port, "/v1/understood")
    wrong = await get(front.port, "/v1/understand")
    assert (missing.status, missing.json["code"]) == (404, "NOT_FOUND")
    assert (wrong.status, wrong.json["code"], wrong.headers["allow"]) == (405, "UNIMPLEMENTED", "POST")
    assert (await get(front.port, "/v1/understand/")).status == 404
    assert "access-control-allow-origin" not in (await get(front.port, "/", {"origin": "http://x"})).headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-timeout-ms": "0"}, 504),
        ({"grpc-timeout": "1n"}, 504),
        ({"x-timeout-ms": "20000"}, 200),
        ({"grpc-timeout": "20S"}, 200),
        ({"x-timeout-ms": "soon"}, 400),
        ({"x-timeout-ms": "-1"}, 400),
        ({"x-timeout-ms": "٣"}, 400),
        ({"grpc-timeout": "123456789S"}, 400),
        ({"grpc-timeout": "5x"}, 400),
    ],
)
async def test_gateway_deadlines_are_kept(front: Front, headers: dict[str, str], status: int) -> None:
    encoded = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    answer = await post(front.port, "/v1/understand", TURN, encoded)
    assert answer.status == status
    if status == 504:
        assert answer.json["code"] == "DEADLINE_EXCEEDED"


async def test_gateway_knows_callers_by_their_tokens(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "callers.toml"
    token = callers.add(file, "skills", rate=1, burst=3)
    known = {"authorization": f"Bearer {token}"}
    async with fronted(engine, known=Callers.load(file)) as front:
        for headers in ({}, {"authorization": "Bearer nobody"}, {"authorization": token}):
            answer = await post(front.port, "/v1/understand", TURN, headers)
            assert (answer.status, answer.json["code"]) == (401, "UNAUTHENTICATED")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.body.decode()
        for path in ("/v1/describe", "/status", "/metrics", "/v1/models"):
            assert (await get(front.port, path)).status == 401
        for path in ("/health/live", "/health/ready", "/version"):
            assert (await get(front.port, path)).status in (200, 503)
        refused = await post(front.port, "/v1/embeddings", {"input": "stop", "model": MODEL})
        assert refused.json["error"]["code"] == "invalid_api_key"
        answers = [await post(front.port, "/v1/understand", TURN, known) for _ in range(6)]
    assert [answer.status for answer in answers[:3]] == [200] * 3
    over = answers[-1]
    assert (over.status, over.json["code"]) == (429, "RESOURCE_EXHAUSTED")
    assert int(over.headers["retry-after"]) >= 1
    assert 0 < int(over.headers["retry-after-ms"]) <= 1000 * int(over.headers["retry-after"])


@pytest.mark.parametrize(
    "path", ["/v1/understand", "/v1/understand:batch", "/v1/encode", "/v1/embeddings", "/model/parse"]
)
async def test_gateway_reads_nothing_of_strangers(engine: Engine, tmp_path: Path, path: str) -> None:
    """They are refused by their headers; a caller's body is waited for, and each call of theirs spends one."""
    file = tmp_path / "callers.toml"
    token = callers.add(file, "skills", rate=1, burst=2)
    method = {"/v1/understand:batch": "UnderstandBatch", "/v1/encode": "Encode", "/v1/embeddings": "Encode"}
    before = calls(method.get(path, "Understand"))
    async with fronted(engine, known=Callers.load(file)) as front:
        head = {**JSON, "content-length": "100", "connection": "keep-alive"}
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(request("POST", path, headers=head, keep=True))
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(request("POST", path, headers={**head, "authorization": f"Bearer {token}"}, keep=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readline(), 0.2)
        writer.close()
        known = {"authorization": f"Bearer {token}"}
        bad = [await post(front.port, "/v1/understand", b"{", known) for _ in range(3)]
    assert [answer.status for answer in bad] == [400, 400, 429]
    assert (calls(method.get(path, "Understand")) - before)["UNAUTHENTICATED"] == 1


async def test_gateway_what_no_answer_can_be_made_of_is_counted_and_logged(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(gateway, "_problem", broken)
    before = asked_so_far()
    assert (await post(front.port, "/v1/understand", b"{")).status == 500
    assert asked_so_far() - before == {("/v1/understand", "500"): 1}
    assert [record.name for record in caplog.records] == ["nlu.gateway"]


async def test_gateway_knows_callers_by_their_certificates(engine: Engine, tmp_path: Path) -> None:
    ours, theirs = authority(), authority("clients")
    file = tmp_path / "callers.toml"
    file.write_text('[skills]\ncertificates = ["skills.test"]\n')
    settings = tls_settings(tmp_path, issue(ours, "localhost"), theirs, http_port=0)
    async with fronted(engine, settings, known=Callers.load(file)) as front:
        statuses = {}
        for name in ("skills.test", "others.test"):
            context = ssl.create_default_context(cadata=ours.cert_pem.decode())
            context.load_cert_chain(*issue(theirs, name).write(tmp_path, name))
            statuses[name] = (await post(front.port, "/v1/understand", TURN, secure=context)).status
        bare = ssl.create_default_context(cadata=ours.cert_pem.decode())
        try:
            without = await exchange(front.port, request("GET", "/health/live"), secure=bare)
        except (ssl.SSLError, ConnectionError):
            without = None
    assert statuses == {"skills.test": 200, "others.test": 401}
    assert without is None  # a certificate is asked for in the handshake


async def test_gateway_says_when_it_is_ready() -> None:
    async with fronted(None) as front:
        front.desk.release = Release(reason="the store is unreachable")
        ready = await get(front.port, "/health/ready")
        assert (ready.status, ready.json["ready"]) == (503, False)
        assert "the store is unreachable" in ready.json["reason"]
        assert (await get(front.port, "/health/live")).status == 200
        call = await post(front.port, "/v1/understand", TURN)
        assert (call.status, call.json["code"]) == (503, "UNAVAILABLE")
        openai = await post(front.port, "/v1/embeddings", {"input": "stop", "model": MODEL})
        assert (openai.status, openai.json["error"]["type"]) == (503, "server_error")
        front.health.set(("live",), False)
        assert (await get(front.port, "/health/live")).status == 503


async def test_gateway_is_not_ready_while_it_drains(front: Front) -> None:
    assert (await get(front.port, "/health/ready")).status == 200
    front.desk.draining = True
    ready = await get(front.port, "/health/ready")
    assert (ready.status, ready.json["reason"]) == (503, "this server is stopping")
    assert (await post(front.port, "/v1/understand", TURN)).status == 503


async def test_gateway_work_for_a_caller_who_hung_up_ends(front: Front, held: Held) -> None:
    before = calls("Understand")
    body = json.dumps({"hypotheses": [{"text": "nobody waits for this"}]}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", front.port)
    writer.write(request("POST", "/v1/understand", body, JSON))
    await until(held.reached.is_set)
    assert front.desk.in_flight == 1
    writer.close()
    await until(lambda: front.desk.in_flight == 0)  # while the model is still held
    assert not held.released.is_set()
    held.released.set()
    assert calls("Understand") - before == {"CANCELLED": 1}


async def test_gateway_a_caller_who_waits_is_answered(front: Front, held: Held) -> None:
    """The control of the test above."""
    asked = asyncio.create_task(
        post(front.port, "/v1/understand", {"hypotheses": [{"text": "somebody waits"}]})
    )
    await until(held.reached.is_set)
    held.released.set()
    assert (await asked).status == 200


async def test_gateway_counts_are_exact(engine: Engine, tmp_path: Path) -> None:
    """What a client counts is what the gateway counts, and what reached the desk is what the desk counts."""
    async with fronted(engine) as front:
        before, desk_before, tally = asked_so_far(), calls("Understand"), Counter[tuple[str, str]]()
        requests: list[tuple[str, bytes | dict[str, Any]]] = [
            ("/v1/understand", TURN),
            ("/v1/understand", {"hypotheses": []}),
            ("/v1/understand", b"{"),
            ("/model/parse", {"text": "stop"}),
            ("/nothing/here", {}),
        ] * 6
        answers = await asyncio.gather(*(post(front.port, path, body) for path, body in requests))
    for (path, _), answer in zip(requests, answers, strict=True):
        tally["other" if path == "/nothing/here" else path, str(answer.status)] += 1
    assert asked_so_far() - before == tally
    assert calls("Understand") - desk_before == {"OK": 12, "INVALID_ARGUMENT": 12}


@pytest.mark.parametrize(
    ("settings", "path", "there"),
    [
        ({}, "/metrics", True),
        ({"metrics": False}, "/metrics", False),
        ({"processes": 2}, "/metrics", False),  # one worker's numbers alone would be misleading
        ({}, "/openapi.json", True),
        ({}, "/docs", True),
        ({"reflection": False}, "/openapi.json", False),
        ({"reflection": False}, "/docs", False),
    ],
)
async def test_gateway_pages_can_be_turned_off(settings: dict[str, Any], path: str, there: bool) -> None:
    async with fronted(None, Settings(http_port=0, **settings)) as front:
        answer = await get(front.port, path)
    assert answer.status == (200 if there else 404)
    if there and path == "/metrics":
        assert b"nlu_http_requests_total" in answer.body


async def test_gateway_docs_page_needs_nothing_from_elsewhere(front: Front) -> None:
    page = await get(front.port, "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"/v1/understand" in page.body and b"nlu.v1.UnderstandReply" in page.body
    assert b"src=" not in page.body and b"http://" not in page.body and b"https://" not in page.body


def mutated(rng: random.Random) -> bytes:
    """A request with something wrong in it, or cut, or with another behind it."""
    body = rng.choice([b for b, _ in BAD_BODIES.values()] + [json.dumps(TURN).encode()])[:2000]
    raw = request(
        rng.choice(["POST", "GET", "PUT", "OPTIONS", "HEAD", "CONNECT", "\x00"]),
        rng.choice(PATHS),
        body,
        JSON,
    )
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(raw))
        change = rng.choice(SPICE)
        match rng.randrange(4):
            case 0:
                raw = raw[:at] + change + raw[at:]
            case 1:
                raw = raw[:at] + change + raw[at + len(change) :]
            case 2:
                raw = raw[:at] + raw[at + rng.randrange(1, 30) :] or b"\r\n"
            case _:
                raw = raw.replace(b"content-length", rng.choice(FRAMING), 1)
    if rng.random() < 0.2:
        raw += raw[: rng.randrange(1, len(raw) + 1)]
    return raw


PATHS = (
    "/v1/understand", "/v1/understand:batch", "/v1/encode", "/v1/embeddings", "/model/parse", "/v1/describe", "/status",
    "/", "*", "//", "/%00", "/%ff%fe", "/../../etc/passwd", "/v1/understand?x=" + "y" * 500, "http://[::1/", "/\u20ac".encode().decode("latin-1"),
)  # fmt: skip
SPICE = (
    b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b":", b" ", b"\t", b"\r\n\r\n", b"A" * 20_000, b"\r\nexpect: 100-continue",
    b"\r\nupgrade: h2c\r\nconnection: upgrade", b"\r\ntransfer-encoding: chunked", b"\r\ncontent-length: -1",
    b"\r\ncontent-length: 99999999999999999999", b"HTTP/9.9", b"HTTP/1.0", b"{", b"]", b"\r\nx-timeout-ms: 1e9",
    b"\r\nhost: a\r\nhost: b", b"\r\nx-request-id: " + b"%" * 100, b"\r\ncontent-length: 3\r\ncontent-length: 4",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)  # fmt: skip
FRAMING = (
    b"transfer-encoding",
    b"content-length: 5\r\ncontent-length",
    b"x",
    b"transfer-encoding: chunked\r\nx",
    b" content-length",
)


async def test_gateway_fuzzed_requests_never_harm_it(front: Front) -> None:
    """Each is answered in words or hung up on; never a 500, never an error in the loop, and good ones are answered."""
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    rng = random.Random(20)
    statuses: Counter[int] = Counter()

    async def one(raw: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        try:
            writer.write(raw)
            writer.write_eof()
            read = await reader.read()
            statuses[int(read[9:12]) if read.startswith(b"HTTP/1.1 ") else 0] += 1
        except ConnectionError:
            statuses[0] += 1
        finally:
            writer.close()

    async with asyncio.timeout(100):
        for _ in range(40):
            await asyncio.gather(*(one(mutated(rng)) for _ in range(25)))
            assert (await post(front.port, "/v1/understand", TURN)).status == 200
    assert trouble == []
    assert not {status for status in statuses if status >= 500}, statuses
    assert statuses[400] > 100 and len(statuses) >= 6, statuses  # the requests did meet different refusals
    await until(lambda: front.desk.in_flight == 0)


async def test_gateway_chunked_bodies_that_lie_are_refused(front: Front) -> None:
    head = request("POST", "/v1/understand", headers={**JSON, "transfer-encoding": "chunked"}).replace(
        b"content-length: 0\r\n", b""
    )
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    answers: list[Answer | None] = [
        await exchange(front.port, head + lie)
        for lie in (
            b"zz\r\n{}\r\n0\r\n\r\n",
            b"ffffffffffffffffffff\r\n{}",
            b"-5\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhello world\r\n0\r\n\r\n",
            b"2;" + b"x" * 20_000 + b"\r\n{}\r\n0\r\n\r\n",
            b"1\r\n{\r\n" * 3000 + b"0\r\n\r\n",
        )
    ]
    assert trouble == []
    assert {None if answer is None else answer.status for answer in answers} <= {None, 400}
    assert (await post(front.port, "/v1/understand", TURN)).status == 200
