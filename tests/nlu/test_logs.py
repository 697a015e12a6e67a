"""nlu.logs: one event is one line, secrets are struck out, and nothing anybody said is written, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from pydantic import SecretStr

from annotators.annotator import Annotation, Heard
from annotators.rules import RulesHead
from nlu import callers, logs
from nlu.bucket import Bucket
from nlu.errors import EngineRefused, InvalidInput
from nlu.logs import REQUEST_ID
from nlu.rpc import SERVICE
from nlu.serve import running
from nlu.settings import Settings
from nlu.v1 import nlu_pb2 as pb
from nlu.vectorizer import Vectorizer
from statics.errors import NotFound
from tests.conftest import free_port
from tests.nlu.test_bucket import Clock
from tests.pki import authority, issue
from tests.tiny import Made

CANARY = "kanarienvogel"
RUSSIAN_CANARY = "канарейка"
FORMATS = ("text", "json")


@contextmanager
def configured(**settings: Any) -> Iterator[None]:
    """Logging as a server has it, and afterwards as it was."""
    before = logging.root.handlers[:], logging.root.level, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in logs.OURS}
    logs.configure(Settings(**settings))
    try:
        yield
    finally:
        logging.root.handlers[:], logging.root.level, logging.raiseExceptions = before
        logging.captureWarnings(False)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logs.CALL.set(None)


@pytest.fixture(autouse=True)
def every_failure_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_budgets", {level: Bucket(10**6, 10**6) for level in logs._budgets})
    monkeypatch.setattr(logs, "_unwritten", 0)


log = logging.getLogger("nlu.test")


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize(
    "planted",
    [
        "two\nlines",
        "a\r\n2026-01-01T00:00:00.000Z ERROR nlu.serve: forged",
        "\x1b[2J\x1b[31mred",
        "paragraph\u2029line\u2028next\u0085feed\x0b\x0c\x1c",
        "\u202edesrever\u202c",
        "nul\x00 del\x7f csi\x9b",
        "lone \ud800 surrogate",
        '{"level": "ERROR"}\n{"forged": 1}',
        "percent %s %d {} {0}",
    ],
)
def test_logs_cannot_be_forged(log_format: str, planted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with configured(log_format=log_format):
        log.info("before %s after", planted)
        log.info(planted)
        try:
            raise OSError(planted)
        except OSError:
            log.exception("%s", planted)
    written = capsys.readouterr().err
    assert written.endswith("\n")
    lines = written[:-1].split("\n")
    assert len(lines) == len(written.splitlines()) == 3
    for line in lines:
        assert line.isprintable()
        if log_format == "json":
            json.loads(line)
    if log_format == "json":
        assert json.loads(lines[0])["message"] == f"before {planted} after"


@pytest.mark.parametrize("log_format", FORMATS)
def test_logs_say_when_what_and_in_which_call(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    with configured(log_format=log_format):
        call = logs.begin("Understand", {REQUEST_ID: "turn-7"})
        call.caller, call.bundle = "dialogs", "f" * 64
        log.warning("слишком %s", "поздно")
        log.debug("not at this level")
    line = capsys.readouterr().err
    if log_format == "json":
        found = json.loads(line)
        assert found.pop("time").endswith("Z")
        assert found == {
            "level": "WARNING",
            "logger": "nlu.test",
            "message": "слишком поздно",
            "request_id": "turn-7",
            "caller": "dialogs",
            "bundle": "f" * 12,
        }
    else:
        assert line[line.index("WARNING") :] == (
            "WARNING nlu.test: слишком поздно request_id=turn-7 caller=dialogs bundle=ffffffffffff\n"
        )


@pytest.mark.parametrize("log_format", FORMATS)
def test_logs_strike_secrets_out(
    log_format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted")
    token, _ = callers.new_token()
    secrets = [
        "hunter2",
        "pepper",
        "milvuspw",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted",
        "AKIAPLANTEDPLANTED12",
        token,
    ]
    secrets += ["MIIprivate", "otherpw", "anothersecretkey", "sometoken"]
    settings: dict[str, Any] = {
        "redis": SecretStr("redis://user:hunter2@cache:6379/0"),
        "cache_secret": SecretStr("pepper"),
        "milvus_token": SecretStr("root:milvuspw"),
        "log_format": log_format,
    }
    planted = (
        "redis://user:hunter2@cache:6379/0, the pepper, root:milvuspw, wJalrXUtnFEMI/K7MDENG/bPxRfiCYplanted, "
        f"AKIAPLANTEDPLANTED12, {token}, Authorization: Bearer sometoken, redis://:otherpw@elsewhere:1/0, "
        "aws_secret_access_key = anothersecretkey\n-----BEGIN PRIVATE KEY-----\nMIIprivate\n-----END PRIVATE KEY-----"
    )
    assert all(secret in planted for secret in secrets)
    with configured(**settings):
        log.info("%s", planted)
        log.info("set to %s", settings["redis"])
        try:
            raise OSError(planted)
        except OSError:
            log.exception("opening")
    written = capsys.readouterr().err
    assert [secret for secret in secrets if secret in written] == []
    assert "elsewhere:1/0" in written and "opening" in written  # the rest is there


def test_logs_without_the_filter_would_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The control of the test above: the same handler with a plain formatter."""
    with configured(redis=SecretStr("redis://:hunter2@cache:6379/0")):
        logging.root.handlers[0].setFormatter(logging.Formatter())
        log.info("%s", "redis://:hunter2@cache:6379/0")
    assert "hunter2" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", FORMATS)
def test_logs_tell_of_exceptions_what_is_ours_and_where(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def choke(text: str) -> None:
        raise ValueError(f"cannot read {text!r}")

    def refuse(text: str) -> None:
        try:
            choke(text)
        except ValueError as error:
            raise EngineRefused(
                "head intent", found="9 labels", expected="8", remedy="build it again"
            ) from error

    with configured(log_format=log_format):
        for _ in range(2):
            try:
                refuse(CANARY)
            except EngineRefused as error:
                log.exception("could not swap")
                log.error("could not swap: %s", error)
                log.error(error)
        log.error("no file: %s", FileNotFoundError(2, "No such file or directory", "/srv/bundle"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    for line in lines[:6]:
        assert CANARY not in line
        assert "EngineRefused: head intent: found 9 labels, expected 8; build it again" in line
        assert "ValueError" in line and "test_logs.py" in line and "choke" in line
    assert "/srv/bundle" in lines[6]


def test_logs_repeat_no_words_of_what_a_caller_got_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with configured():
        log.error("refused", exc_info=InvalidInput("persona", found=CANARY, expected="one", remedy="look"))
        log.error("missing", exc_info=NotFound(part="blob", found="none", expected="one", remedy="publish"))
    written = capsys.readouterr().err
    assert CANARY not in written and "InvalidInput" in written and "publish" in written


async def test_logs_of_asyncio_have_no_arguments_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    def callback(text: str) -> None:
        raise RuntimeError(text)

    async def task(text: str) -> None:
        raise RuntimeError(text)

    with configured(log_level="DEBUG"):
        asyncio.get_running_loop().call_soon(callback, CANARY)
        forgotten = asyncio.create_task(task(CANARY))
        await asyncio.sleep(0.01)
        del forgotten
    written = capsys.readouterr().err
    assert "Exception in callback" in written and "never retrieved" in written
    assert CANARY not in written


def test_logs_hear_libraries_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    with configured(log_level="DEBUG"):
        logging.getLogger("botocore.auth").debug("StringToSign: %s", CANARY)
        logging.getLogger("uvicorn.access").info("GET /model/parse?q=%s", CANARY)
        logging.getLogger("botocore").warning("slow down")
        logging.getLogger("statics.pull").debug("heard")
        warnings.showwarning("old", UserWarning, "somewhere.py", 3)
    written = capsys.readouterr().err
    assert CANARY not in written
    assert "slow down" in written and "heard" in written and "UserWarning: old" in written
    assert len(written.splitlines()) == 3


def test_logs_survive_what_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    with configured():
        log.info("%d phrases of %s", "many")
        log.info("%s", "x" * 100_000)
    first, second = capsys.readouterr().err.splitlines()
    assert "arguments do not fit" in first and "many" not in first
    assert len(second) < 4096 and "100000 characters" in second


@pytest.mark.parametrize("level", ["LOUD", "", "10"])
def test_logs_refuse_a_level_that_is_none(level: str) -> None:
    with (
        pytest.raises(ValueError, match="NLU_LOG_LEVEL: found .*expected DEBUG"),
        configured(log_level=level),
    ):
        pass


def test_logs_take_a_sane_request_id_and_make_one_else() -> None:
    assert logs.request_id({REQUEST_ID: "a-Z.0:_9"}) == "a-Z.0:_9"
    made = [
        logs.request_id(sent) for sent in ({}, {REQUEST_ID: ""}, {REQUEST_ID: "a b"}, {REQUEST_ID: "x" * 65})
    ]
    made += [logs.request_id({REQUEST_ID: f"a{end}"}) for end in ("\n", "\u0661", "%", '"')]
    assert len(set(made)) == 8
    assert all(logs.request_id({REQUEST_ID: own}) == own for own in made)


def test_logs_hash_a_phrase_with_a_key_of_this_process() -> None:
    assert logs.hash_of(CANARY) == logs.hash_of(CANARY) != logs.hash_of(CANARY + " ")
    done = subprocess.run(
        [sys.executable, "-c", f"from nlu import logs; print(logs.hash_of({CANARY!r}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.strip()) == 16 and done.stdout.strip() != logs.hash_of(CANARY)


def test_logs_of_failures_are_bounded_and_say_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(
        logs,
        "_budgets",
        {level: Bucket(20, 100, clock_ns=clock) for level in (logging.INFO, logging.WARNING, logging.ERROR)},
    )
    with configured():
        call = logs.begin("Understand", {})
        for _ in range(1000):
            logs.ended(call, "RESOURCE_EXHAUSTED", 0.001)
        logs.ended(call, "INTERNAL", 0.001, RuntimeError())
        clock.now += 10**9
        logs.ended(call, "RESOURCE_EXHAUSTED", 0.001)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 103
    assert "900 lines before this one were not written" in lines[100]
    assert "RuntimeError" in lines[101]  # a flood of bad calls hides no fault of ours


def test_logs_of_libraries_are_bounded_and_ours_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(logs, "_budgets", {logging.WARNING: Bucket(20, 100, clock_ns=clock)})
    with configured():
        for name in ("asyncio", "nlu.serve"):
            for _ in range(500):
                logging.getLogger(name).error("socket.accept() out of system resource")
        clock.now += 10**9
        logging.getLogger("asyncio").error("once more")
    lines = capsys.readouterr().err.splitlines()
    assert [sum(f" ERROR {name}: " in line for line in lines) for name in ("asyncio", "nlu.serve")] == [
        101,
        500,
    ]
    assert "400 lines before this one were not written" in lines[-2]


# What a server writes of calls, valid and not, while heads and the model fail around it.

UNDERSTAND = f"/{SERVICE}/Understand"


@asynccontextmanager
async def calling(made: Made, **settings: Any) -> AsyncIterator[grpc.aio.Channel]:
    chosen = {"bundle": made.bundle.path, "port": 0, "metrics": False, "log_level": "DEBUG", **settings}
    with configured(**chosen):
        async with (
            running(Settings(**chosen)) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            yield channel


def turn(text: str, **fields: Any) -> bytes:
    return pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text=text)], **fields).SerializeToString()


async def call(
    channel: grpc.aio.Channel,
    raw: bytes,
    *,
    method: str = "Understand",
    metadata: Any = (),
    timeout: float = 20,
) -> tuple[StatusCode, dict[str, Any]]:
    """How a call ended, and what came with it."""
    made = channel.unary_unary(f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=None)(
        raw, metadata=metadata, timeout=timeout
    )
    return await made.code(), dict(await made.trailing_metadata() or ())


def planted(text: str) -> list[tuple[str, bytes, float]]:
    """One text in every place a caller can put it, well and badly: method, request, deadline."""
    long, bomb = f"{text} " * 500, text + "\u0300\u0323" * 200
    hostile = f"{text}\r\n2026 ERROR forged\x1b[31m {{}} %s %(x)s \u2028 \u202e"
    batch = pb.UnderstandBatchRequest(
        requests=[pb.UnderstandRequest.FromString(turn(t)) for t in (text, long)]
    )
    requests = [
        turn(text), turn(hostile), turn(long), turn(bomb), turn(f"crash {text}"), turn(f"crash rules {text}"),
        turn("hello", persona=text), turn("hello", surface=text), turn("hello", annotators=[text]),
        turn("hello", locale=text), turn("hello", request_id=text), turn("hello", request_id=text * 50),
        turn("hello", context=[pb.Turn(role=pb.ROLE_USER, text=text)]), turn("hello", context=[pb.Turn(text=text)]),
        turn("hello", retrieval=pb.Retrieval(avoid_ids=[text], tags=[text])), turn(text, explain=True),
        turn(text)[:-3], b"\xff" + text.encode(), text.encode(), turn(text) + b"\xff\xff",
        b"\x12" + bytes([len(text.encode()) + 4]) + b"\x0a\x02\xff\xfe" + text.encode(),
    ]  # fmt: skip
    calls = [("Understand", raw, 20.0) for raw in requests]
    calls += [
        ("Understand", turn(f"{text} late"), 1e-6),
        ("UnderstandBatch", batch.SerializeToString(), 20.0),
    ]
    calls += [
        ("UnderstandBatch", turn(text), 20.0),
        ("Describe", turn(text), 20.0),
        ("Nothing", turn(text), 20.0),
    ]
    for texts in ([text, "crash " + text], [text, long], [text] * 40):
        calls.append(("Encode", pb.EncodeRequest(texts=texts, tokens=True).SerializeToString(), 20.0))
    return calls


class Crashing:
    """A model and a head that say what they choked on, as third parties do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encode, annotate = Vectorizer.encode, RulesHead.annotate

        def crash(self_: Vectorizer, phrases: Any, **options: Any) -> Any:
            if any(phrase.startswith("crash") and "rules" not in phrase for phrase in phrases):
                raise RuntimeError(f"index out of range for {phrases!r}")
            return encode(self_, phrases, **options)

        def choke(self_: RulesHead, heard: Heard) -> Annotation:
            if "crash rules" in heard.phrases[0]:
                raise RuntimeError(f"no match in {heard!r}")
            return annotate(self_, heard)

        monkeypatch.setattr(Vectorizer, "encode", crash)
        monkeypatch.setattr(RulesHead, "annotate", choke)


@pytest.mark.parametrize("log_format", FORMATS)
async def test_logs_have_nothing_that_was_said(
    tiny: Made, log_format: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path of a request, at DEBUG, with a word nobody else says: it is in no line, nor are its pieces."""
    Crashing(monkeypatch)
    codes = []
    async with calling(tiny, log_format=log_format) as channel:
        for text in (f"play {CANARY}", f"сыграй {RUSSIAN_CANARY}"):
            for method, raw, deadline in planted(text):
                codes.append((await call(channel, raw, method=method, timeout=deadline))[0])
            stream = channel.stream_stream(
                f"/{SERVICE}/UnderstandStream", request_serializer=None, response_deserializer=None
            )
            answers = [
                answer
                async for answer in stream(iter([turn(text), turn(f"crash {text}"), b"\xff" + text.encode()]))
            ]
            assert len(answers) == 3
            for metadata in (
                (REQUEST_ID, f"{CANARY} {CANARY}"),
                ("authorization", f"Bearer {CANARY}"),
                ("x-other", CANARY),
            ):
                await call(channel, turn("hello"), metadata=(metadata,))
            dropped = channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)(
                turn(text)
            )
            await asyncio.sleep(0)
            dropped.cancel()
    out, err = capfd.readouterr()
    assert {
        StatusCode.OK,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.INTERNAL,
        StatusCode.DEADLINE_EXCEEDED,
    } <= set(codes)
    assert err.count("RuntimeError") >= 4  # the crashes were told
    written = (out + err).lower()
    forms = [
        form
        for word in (CANARY, RUSSIAN_CANARY)
        for form in (word, word.encode().hex(), ascii(word)[1:-1], str(word.encode())[2:-1])
    ]
    assert [form for form in forms if form.lower() in written] == []
    assert "forged" not in written


async def test_logs_would_show_it_if_somebody_wrote_it(tiny: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """The control of the test above: one planted call of a logger, at the lowest level, is found."""
    async with calling(tiny) as channel:
        log.debug("heard %s", CANARY)
        assert (await call(channel, turn("hello")))[0] is StatusCode.OK
    assert CANARY in capfd.readouterr().err


async def test_logs_of_calls_have_what_an_operator_asks_for(
    tiny: Made, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "callers.toml"
    shown = (("authorization", f"Bearer {callers.add(path, 'dialogs')}"), (REQUEST_ID, "turn-7"))
    async with calling(tiny, log_format="json", callers=path) as channel:
        capfd.readouterr()
        code, back = await call(channel, turn("play music"), metadata=shown)
        assert (code, back[REQUEST_ID]) == (StatusCode.OK, "turn-7")
        code, back = await call(channel, turn("?!"), metadata=shown)
        assert (code, back[REQUEST_ID]) == (StatusCode.INVALID_ARGUMENT, "turn-7")
        code, back = await call(channel, turn("play music"))
        assert code is StatusCode.UNAUTHENTICATED and back[REQUEST_ID]
    written = capfd.readouterr().err
    good, bad, stranger = (json.loads(line) for line in written.splitlines() if '"nlu.logs"' in line)
    assert good["level"] == "DEBUG" and bad["level"] == stranger["level"] == "INFO"
    assert (good["method"], good["code"], good["caller"], good["request_id"]) == (
        "Understand",
        "OK",
        "dialogs",
        "turn-7",
    )
    assert good["bundle"] == tiny.bundle.digest[:12] and good["ms"] > 0
    assert (good["phrase_chars"], good["phrase_hash"]) == (10, logs.hash_of("play music"))
    assert (bad["code"], bad["error"], bad["caller"]) == ("INVALID_ARGUMENT", "InvalidInput", "dialogs")
    assert (stranger["code"], stranger["request_id"]) == ("UNAUTHENTICATED", back[REQUEST_ID])
    assert "caller" not in stranger


def _ended(method: grpc.UnaryUnaryMultiCallable[bytes, bytes], text: str) -> StatusCode:
    """How a call over a blocking channel ends."""
    code: StatusCode = method.future(turn(text), timeout=10).code()
    return code


def test_logs_of_a_process_are_json_from_the_first_line_to_the_last(tiny: Made, tmp_path: Path) -> None:
    """Of `nlu serve` as an operator starts it, with handshakes that fail and HTTP that is none, told to stop at last."""
    authority_ = authority()
    cert, key = issue(authority_, "localhost").write(tmp_path, "server")
    port, http_port = free_port(), free_port()
    env = {
        "NLU_BUNDLE": tiny.bundle.path, "NLU_PORT": port, "NLU_HTTP_PORT": http_port, "NLU_METRICS": "false",
        "NLU_LOG_FORMAT": "json", "NLU_LOG_LEVEL": "DEBUG", "NLU_TLS_CERT": cert, "NLU_TLS_KEY": key,
    }  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NLU_", "GRPC_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "nlu", "serve"],
        env=clean | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        credentials = grpc.ssl_channel_credentials(authority_.cert_pem)
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            understand = channel.unary_unary(UNDERSTAND, request_serializer=None, response_deserializer=None)
            ended: list[StatusCode] = []
            while len(ended) < 100 and StatusCode.OK not in ended:  # it listens before it has loaded anything
                ended.append(_ended(understand, CANARY))
                time.sleep(0.1)
            assert _ended(understand, f"{CANARY} " * 500) is StatusCode.INVALID_ARGUMENT
        for where in (port, http_port):
            with socket.create_connection(("127.0.0.1", where), timeout=5) as plain:
                plain.sendall(f"GET /{CANARY} HTTP/1.1\r\nHost: {CANARY}\r\n\r\n".encode())
                plain.recv(1000)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == b""
    events = [json.loads(line) for line in err.decode().splitlines()]
    assert {"INVALID_ARGUMENT", "OK"} <= {event.get("code") for event in events}
    assert CANARY not in err.decode()


async def test_logs_at_info_have_failures_only(tiny: Made, capfd: pytest.CaptureFixture[str]) -> None:
    async with calling(tiny, log_level="INFO") as channel:
        capfd.readouterr()
        for text in ("play music", "?!", "hello"):
            await call(channel, turn(text))
    lines = [line for line in capfd.readouterr().err.splitlines() if " nlu.logs: " in line]
    assert len(lines) == 1 and "code=INVALID_ARGUMENT" in lines[0]
