"""The command line as a newcomer meets it: answers, JSON, and errors that are one clear line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.tiny import Made

JSON_KEYS = {"phrase", "annotations", "replies", "versions", "timings_ns", "source", "hypothesis"}


def nlu(
    *arguments: str, cwd: Path, ok: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, in a folder where nothing lies about."""
    import os

    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    done = subprocess.run(
        [sys.executable, "-m", "nlu", *arguments], capture_output=True, text=True, cwd=cwd, env=clean | (env or {}), timeout=60
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def target(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server started as a user starts it."""
    port = free_port()
    metrics = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "nlu", "serve", "--bundle", str(tiny.bundle.path), "--port", str(port)],
        env=__import__("os").environ | {"NLU_METRICS_PORT": str(metrics)},
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("server"),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "serving on" in line:
            break
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    process.stderr.close()
    assert process.wait(timeout=20) == 0, "a server that is told to stop stops cleanly"


def test_say_prints_one_json_object(tiny: Made, tmp_path: Path) -> None:
    done = nlu("say", "wake me at six", "--bundle", str(tiny.bundle.path), "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert set(answer) == JSON_KEYS
    slots = next(found for found in answer["annotations"] if found["name"] == "slots")
    assert slots["spans"][0] | {"score": 0} == {
        "label": "time",
        "text": "six",
        "start": 11,
        "end": 14,
        "score": 0,
    }
    assert answer["versions"]["bundle"] == tiny.bundle.digest


def test_say_here_and_from_a_server_are_the_same(tiny: Made, target: str, tmp_path: Path) -> None:
    here = json.loads(
        nlu("say", "so annoying", "--bundle", str(tiny.bundle.path), "--json", cwd=tmp_path).stdout
    )
    there = json.loads(nlu("say", "so annoying", "--target", target, "--json", cwd=tmp_path).stdout)
    for answer in (here, there):
        del answer["timings_ns"], answer["source"]
    assert here == there


def test_say_takes_context_hypotheses_persona_and_clock(target: str, tmp_path: Path) -> None:
    done = nlu(
        "say", "yes", "--target", target, "--json", "--context", "assistant: shall i play music", "--hypothesis", "stop=0.2",
        "--persona", "lively", "--as-of", "2026-06-03T12:00:00Z", "--explain", cwd=tmp_path,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    followup = next(found for found in answer["annotations"] if found["name"] == "followup")
    assert followup["labels"][0]["label"] == "music_play"
    assert {"threshold", "raw_score"} <= set(followup["labels"][0])
    assert "features" in answer["replies"][0]


def test_say_shows_a_page(target: str, tmp_path: Path) -> None:
    page = nlu("say", "wake me at six", "--target", target, cwd=tmp_path).stdout
    assert "[six]time" in page
    assert re.search(r"\d\.\d\d ms", page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("say", "hello", "--bundle", "nowhere"), ("file-missing", "nowhere")),
        (("say", "  ", "--target", "TARGET"), ("INVALID_ARGUMENT", "found")),
        (("say", "hello", "--target", "TARGET", "--persona", "nobody"), ("persona", "calm, lively")),
        (("say", "hello", "--target", "TARGET", "--annotator", "nonsense"), ("nonsense", "intent")),
        (("say", "hello", "--target", "127.0.0.1:1"), ("UNAVAILABLE",)),
        (("say", "hello", "--context", "hello there"), ("assistant: ...",)),
        (("say", "hello", "--hypothesis", "what"), ("TEXT=0.3",)),
        (("bundle", "verify", "nowhere"), ("file-missing", "nowhere", "remedy")),
        (("bundle", "pull", "nowhere", "here"), ("not-found", "remedy")),
        (("cache", "build", "none.txt", "--out", "x"), ("none.txt",)),
    ],
)
def test_main_errors_are_clear_lines(
    arguments: tuple[str, ...], words: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    said = [target if argument == "TARGET" else argument for argument in arguments]
    if said[0] == "cache":
        said += ["--bundle", str(tmp_path)]
    done = nlu(*said, cwd=tmp_path, ok=False, env={"COLUMNS": "400"})
    for word in words:
        assert word in done.stderr


def test_describe_names_heads_and_versions(target: str, tiny: Made, tmp_path: Path) -> None:
    found = json.loads(nlu("describe", "--target", target, "--json", cwd=tmp_path).stdout)
    assert found["versions"]["bundle"] == tiny.bundle.digest
    assert {head["name"] for head in found["heads"]} == {
        "emotion",
        "followup",
        "intent",
        "quick",
        "slots",
        "topic",
    }
    assert "intent" in nlu("describe", "--target", target, cwd=tmp_path).stdout


def test_doctor_tells_health_and_sickness(tiny: Made, tmp_path: Path) -> None:
    well = json.loads(nlu("doctor", "--bundle", str(tiny.bundle.path), "--json", cwd=tmp_path).stdout)
    assert well["healthy"]
    assert {finding["check"] for finding in well["findings"]} >= {
        "service",
        "onnxruntime",
        "faiss",
        "redis",
        "bundle",
    }
    broken = shutil.copytree(tiny.bundle.path, tmp_path / "broken")
    (broken / "head.intent" / "head.json").write_text("{}")
    sick = nlu("doctor", "--bundle", str(broken), "--json", cwd=tmp_path, ok=False)
    bundle = next(finding for finding in json.loads(sick.stdout)["findings"] if finding["check"] == "bundle")
    assert bundle["state"] == "bad" and bundle["remedy"]


def test_doctor_survives_an_absent_redis_and_store(tiny: Made, tmp_path: Path) -> None:
    done = nlu(
        "doctor", "--bundle", str(tiny.bundle.path), "--json", cwd=tmp_path, ok=False,
        env={"NLU_REDIS": "redis://127.0.0.1:1/0", "NLU_STORE": str(tmp_path / "store")},
    )  # fmt: skip
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["redis"]["state"] == "note"
    assert findings["store"]["state"] == "bad"
    assert findings["bundle"]["state"] == "ok"


def test_bundle_commands_build_sign_publish_pull_and_diff(tiny: Made, tmp_path: Path) -> None:
    parts = str(shutil.copytree(tiny.parts, tmp_path / "parts"))
    nlu("bundle", "keygen", "key.pem", "trusted.json", cwd=tmp_path)
    build = ("bundle", "build", parts, "--channel", "prod", "--sign", "key.pem")
    nlu(*build, "--out", "one", "--seq", "1", cwd=tmp_path)
    trust = {"NLU_KEYRING": str(tmp_path / "trusted.json"), "NLU_REQUIRE_SIGNATURE": "1"}
    nlu("bundle", "verify", "one", cwd=tmp_path, env=trust)
    nlu("bundle", "publish", "one", "store", cwd=tmp_path, env=trust)
    pulled = nlu(
        "bundle", "pull", "store", "pod", "--channel", "prod", cwd=tmp_path, env=trust | {"COLUMNS": "400"}
    ).stdout
    assert "channel prod, seq 1" in pulled
    (tmp_path / "more.txt").write_text("hello there\nstop it\n\n?!\n")
    nlu(
        "cache",
        "build",
        "more.txt",
        "--out",
        "parts/cold.phrases",
        "--bundle",
        "one",
        cwd=tmp_path,
        env=trust,
    )
    nlu(*build, "--out", "two", "--seq", "2", cwd=tmp_path)
    changes = json.loads(nlu("bundle", "diff", "one", "two", "--json", cwd=tmp_path).stdout)["changes"]
    assert [change["part"] for change in changes if change["what"] != "same"] == ["cold.phrases"]
    tampered = tmp_path / "two" / "manifest.json"
    tampered.write_text(tampered.read_text().replace('"seq":2', '"seq":3').replace('"seq": 2', '"seq": 3'))
    assert "signature" in nlu("bundle", "verify", "two", cwd=tmp_path, ok=False, env=trust).stderr


def test_serve_says_why_it_cannot_start(tiny: Made, target: str, tmp_path: Path) -> None:
    taken = nlu(
        "serve", "--bundle", str(tiny.bundle.path), "--port", target.split(":")[1], cwd=tmp_path, ok=False
    )
    assert "address: found" in taken.stderr and "--port" in taken.stderr
    unsigned = nlu(
        "serve",
        "--bundle",
        str(tiny.bundle.path),
        "--port",
        "0",
        cwd=tmp_path,
        ok=False,
        env={"NLU_REQUIRE_SIGNATURE": "1"},
    )
    assert "NLU_KEYRING" in unsigned.stderr


def test_main_help_is_quick_because_it_imports_little(tmp_path: Path) -> None:
    """Not timed: the heavy modules must simply not be there."""
    code = "import sys, nlu.__main__; sys.exit(any(m in sys.modules for m in ('numpy', 'grpc', 'onnxruntime', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_serve_never_imports_torch(tiny: Made, tmp_path: Path) -> None:
    code = (
        "import sys, nlu.serve, nlu.loading, statics.verify; from pathlib import Path;"
        f"nlu.loading.load(statics.verify.verify(Path({str(tiny.bundle.path)!r}), service='0.1.0'));"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
