"""`nlu index train-ranker`: from dialogs to a ranker that serves, and errors that are one clear line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nlu.ranker import Ranker
from tests.tiny import Made

WORDS = ("kettle", "window", "garden", "чайник", "маяк", "ракета", "forest", "bucket", "pillow", "wagon")


@pytest.fixture
def dialogs(tmp_path: Path) -> Path:
    """A hundred dialogs about two things each, in both languages."""
    path = tmp_path / "dialogs.jsonl"
    lines = []
    for first in WORDS:
        for other in WORDS:
            texts = (
                f"my {first}",
                f"Whose {first}, {other}?",
                f"{other} и {first}",
                f"No {first} near {other}",
            )
            turns = [{"speaker": "AB"[i % 2], "text": text} for i, text in enumerate(texts)]
            lines.append(json.dumps({"id": f"{first} {other}", "turns": turns}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def nlu(*arguments: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    done = subprocess.run(
        [sys.executable, "-m", "nlu", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env={**clean, "COLUMNS": "120"}, timeout=100,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def train(*arguments: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return nlu("index", "train-ranker", *arguments, cwd=cwd, ok=ok)


def test_ranker_train_tells_what_was_learnt(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    options = ("--bundle", tiny.bundle.path, "--out", "ranker.chat", "--candidates", 8)
    shown = train(dialogs, *options, cwd=tmp_path)
    for words in (
        "true replies among 8 at random",
        "over cosine, 95 %",
        "recall@1",
        "share of the gain",
        "nlu heads add",
    ):
        assert words in shown.stdout
    ranker = Ranker.load(tmp_path / "ranker.chat")
    told = json.loads(train(dialogs, *options, "--json", cwd=tmp_path).stdout)
    assert told == json.loads((tmp_path / "ranker.chat.report.json").read_bytes())
    assert told["ranker"] == ranker.spec.trained  # the second run made the same one
    assert told["ranker"]["dialogs"] == ["dialogs.jsonl"]

    nlu("heads", "add", "ranker.chat", "--bundle", tiny.bundle.path, "--out", "next", cwd=tmp_path)
    asked = ("say", "hello kettle", "--context", "assistant: My kettle", "--explain", "--json", "--bundle")
    before, after = (
        json.loads(nlu(*asked, bundle, cwd=tmp_path).stdout)["replies"]
        for bundle in (tiny.bundle.path, "next")
    )
    assert {reply["id"] for reply in before} == {reply["id"] for reply in after}
    assert set(before[0]["features"]) == set(Ranker.linear().features.names)  # the control
    assert set(after[0]["features"]) == set(ranker.spec.features)
    assert [reply["score"] for reply in after] == sorted((reply["score"] for reply in after), reverse=True)


def test_ranker_train_errors_are_one_clear_line(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    bundle = ("--bundle", tiny.bundle.path)
    refused = train(dialogs, *bundle, "--out", "chat", cwd=tmp_path, ok=False)
    assert "found 'chat', expected a folder called ranker.NAME" in refused.stderr
    few = train(dialogs, *bundle, "--out", "ranker.chat", "--limit", 3, cwd=tmp_path, ok=False)
    assert "expected at least 2 of each; give more dialogs" in few.stderr
    assert not (tmp_path / "ranker.chat").exists()
