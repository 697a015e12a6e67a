"""The bundle inside the package: small, whole, of one vectorizer, free of other people's sentences, served without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from nlu import content, loading
from nlu.normalizer import normalize
from nlu.origin import find_bundle
from nlu.settings import Settings, shipped_bundle
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from nlu.vectorizer import fingerprint
from statics.bundle import Bundle
from tests.conftest import free_port
from tests.nlu.test_main import nlu
from tests.tiny import Made

ROOT = Path(__file__).parent.parent
LIMIT = 24_000_000  # bytes: what a clone and an installation carry for it
HEADS = {
    "intent", "domain", "scope", "emotion", "toxicity", "followup", "slots", "about_me", "quick", "emotion_reddit", "dialog_act",
    "slots_services", "entities", "punctuation",
}  # fmt: skip

# In front of every other importer: whoever asks for one of these packages gets an error instead.
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "sentence_transformers", "sklearn", "horovod"):
            raise RuntimeError(f"serving imported {name}")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    """The shipped bundle, verified."""
    if not (shipped_bundle() / "manifest.json").exists():
        pytest.skip("no bundle in statics/shipped yet; `make starter VECTORIZER=...` builds it")
    return find_bundle(Settings(bundle=None, store=""))


def test_shipped_bundle_is_small(shipped: Bundle) -> None:
    files = [path for path in shipped.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT


def test_shipped_vectorizer_is_the_student(shipped: Bundle) -> None:
    engine = loading.load(shipped)
    spec = engine.vectorizer.spec
    assert (spec.precision, spec.dim, spec.token_dim) == ("int8", 300, 128)
    assert set(engine.fleet.names) == HEADS
    assert engine.replies is not None and engine.cold is not None


def test_shipped_parts_are_of_the_shipped_vectorizer(shipped: Bundle) -> None:
    mine = fingerprint(shipped.folder(shipped.of_kind("vectorizer")[0]))
    parts = [
        component
        for component in shipped.manifest.components
        if component.kind not in ("vectorizer", "ranker", "routes")
    ]
    assert {part.kind for part in parts} == {"head", "index", "cold"}
    assert {part.requires["vectorizer"] for part in parts} == {mine}
    for part in shipped.of_kind("head"):
        head = json.loads((shipped.folder(part) / "head.json").read_text(encoding="utf-8"))
        assert head["requires"]["vectorizer"] == mine
    [cold] = shipped.of_kind("cold")
    assert json.loads((shipped.folder(cold) / "cold.json").read_text())["vectorizer"] == mine


@pytest.mark.parametrize(
    ("head", "tested_on", "measure"),
    [
        ("emotion", "starter dev", "macro_f1"),
        ("emotion", "goemotions/test", "macro_f1"),
        ("emotion_reddit", "goemotions/test", "macro_f1"),
        ("toxicity", "davidson_hate_offensive/test", "auroc"),
        ("dialog_act", "sgd/user_test", "macro_f1"),
        ("slots", "starter dev", "span_f1"),
        ("slots_services", "snips/test", "span_f1"),
        ("entities", "wnut17/test", "span_f1"),
        ("entities", "btc_ner/f", "span_f1"),
    ],
)
def test_shipped_heads_carry_what_was_measured(
    shipped: Bundle, head: str, tested_on: str, measure: str
) -> None:
    folder = shipped.folder(shipped.component("head", head))
    metrics = json.loads((folder / "head.json").read_text(encoding="utf-8"))["metrics"]
    assert 0 < metrics[f"{tested_on}: {measure}"] <= 1


def test_shipped_heads_hold_no_sentence_but_ours(shipped: Bundle) -> None:
    """Golden phrases are the only texts in a head, and the sets it learnt from are not ours to pass on."""
    ours = content.load()
    examples = (*ours.emotions, *ours.toxicity, *ours.contexts)
    known = {normalize(text).text for text in (*ours.phrases(), *(example.text for example in examples))}
    for part in shipped.of_kind("head"):
        head = json.loads((shipped.folder(part) / "head.json").read_text(encoding="utf-8"))
        assert {normalize(golden["text"]).text for golden in head["golden"]} <= known, part.name


def test_shipped_files_are_all_packed(shipped: Bundle) -> None:
    """What package data does not name is not in the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {path for glob in settings["package-data"]["statics"] for path in (ROOT / "statics").glob(glob)}
    files = {path for path in (ROOT / "statics" / "shipped").rglob("*") if path.is_file()}
    assert files and files <= packed


def test_shipped_bundle_is_what_commands_take_where_none_is_named(shipped: Bundle, tmp_path: Path) -> None:
    assert shipped.digest in nlu("bundle", "verify", cwd=tmp_path).stdout
    answer = json.loads(nlu("say", "wake me at six", "--json", cwd=tmp_path).stdout)
    assert answer["versions"]["bundle"] == shipped.digest
    findings = json.loads(nlu("doctor", "--json", cwd=tmp_path).stdout)["findings"]
    found = next(finding for finding in findings if finding["check"] == "bundle")
    assert found["state"] == "ok" and "shipped with the package" in found["found"]


@pytest.mark.parametrize("origin", ["tiny", "shipped"])
def test_shipped_serves_where_torch_cannot_be_imported(
    origin: str, tiny: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue("shipped") if origin == "shipped" else tiny.bundle
    named = [] if origin == "shipped" else ["--bundle", str(bundle.path)]
    with serving(named, tmp_path) as target, grpc.insecure_channel(target) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        request_ = pb.UnderstandRequest(hypotheses=[pb.Hypothesis(text="wake me at six")])
        reply = stub.Understand(request_, timeout=10, wait_for_ready=True)
    assert reply.versions.bundle == bundle.digest
    assert "intent" in {annotation.name for annotation in reply.annotations}


@pytest.mark.parametrize("name", ["torch", "transformers.models", "sentence_transformers"])
def test_shipped_refusal_of_torch_works(name: str, tmp_path: Path) -> None:
    """The control of the test above: an import would have been noticed."""
    done = subprocess.run(
        [sys.executable, "-c", f"{REFUSE}import {name}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "serving imported" in done.stderr


@contextmanager
def serving(arguments: list[str], folder: Path) -> Iterator[str]:
    """`nlu serve` in a process that can import nothing of the `train` and `heads` extras, as its address."""
    port = free_port()
    command = ["serve", "--port", str(port), *arguments]
    code = f"{REFUSE}from nlu.__main__ import main\nsys.argv = ['nlu', *{command!r}]\nmain()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=clean | {"NLU_METRICS": "false"}, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "serving on" in line:
            break
    else:
        pytest.fail("".join(said))
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.close()
        process.wait(timeout=20)
