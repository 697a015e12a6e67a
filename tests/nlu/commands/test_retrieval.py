"""`nlu index evaluate`: from dialogs to tables, JSON and a page, and errors that are one clear line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nlu import canaries
from nlu.ranker import FILE
from nlu.vectorizer import Vectorizer
from tests.tiny import Made

THINGS = ("kettle", "window", "garden", "чайник", "маяк", "ракета")


@pytest.fixture
def dialogs(tmp_path: Path) -> Path:
    path = tmp_path / "dialogs.jsonl"
    lines = [
        {"id": thing, "turns": [{"speaker": "A", "text": text} for text in (f"my {thing}", f"Whose {thing}?", "hello", f"No {thing} here", "...")]}
        for thing in THINGS
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def evaluate(*arguments: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    done = subprocess.run(
        [sys.executable, "-m", "nlu", "index", "evaluate", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env={**clean, "COLUMNS": "100"}, timeout=100,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_retrieval_evaluate_tells_all(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    options = ("--bundle", tiny.bundle.path, "--of", 5, "--out", "report", "--seed", 3)
    shown = evaluate(dialogs, *options, cwd=tmp_path)
    for part in ("18 exchanges of 6 dialogs, 13 different replies", "among 5 ", "among all 13", "cosine", "linear", "recall@10", "turns covered", "p99"):  # fmt: skip
        assert part in shown.stdout
    assert "skipped 6 turns, the first at dialogs.jsonl:1" in shown.stderr
    told = json.loads(evaluate(dialogs, *options, "--json", cwd=tmp_path).stdout)  # vectors are known by now
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written == told
    assert (told["bundle"], told["seed"], told["skipped_turns"]) == (tiny.bundle.digest, 3, 6)
    assert "Coverage" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert told["among"]["contestants"]["cosine"]["measures"]["recall@5"]["value"] == 1.0
    assert (tmp_path / ".cache" / "vectors").is_dir()


def test_retrieval_evaluate_takes_other_parts(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    (tmp_path / "ranker.hand").mkdir()
    (tmp_path / "ranker.hand" / FILE).write_text('{"format": 1, "weights": {"reply_overlap": 1.0}}')
    named = ("--ranker", "ranker.hand", "--index", tiny.parts / "index.chitchat", "--limit", 12)
    done = evaluate(dialogs, "--bundle", tiny.bundle.path, "--of", 3, *named, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert list(told["among"]["contestants"]) == ["cosine", "linear", "ranker"]
    assert (told["exchanges"], told["dialogs"]) == (12, 4)


def test_retrieval_evaluate_refuses_parts_of_another_vectorizer(
    tiny: Made, stranger: Made, dialogs: Path, tmp_path: Path
) -> None:
    refused = evaluate(
        dialogs, "--bundle", tiny.bundle.path, "--index", stranger.parts / "index.chitchat", cwd=tmp_path, ok=False
    )  # fmt: skip
    assert "found canaries that moved" in refused.stderr


def test_retrieval_evaluate_refuses_a_ranker_of_labels_that_are_not_there(
    tiny: Made, dialogs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ranker.other"
    folder.mkdir()
    (folder / FILE).write_text('{"format": 1, "weights": {"reply.intent.fly": 1.0}}')
    canaries.write(folder, Vectorizer(tiny.parts / "vectorizer.tiny"))
    refused = evaluate(dialogs, "--bundle", tiny.bundle.path, "--ranker", folder, cwd=tmp_path, ok=False)
    assert "found feature 'reply.intent.fly', of a label that this bundle does not have" in refused.stderr


def test_retrieval_evaluate_refuses_in_one_line(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    few = evaluate(dialogs, "--bundle", tiny.bundle.path, cwd=tmp_path, ok=False)
    assert "found 10 replies outside the longest dialog, expected at least 99" in few.stderr.replace(
        "\n", " "
    )
    with dialogs.open("a", encoding="utf-8") as file:
        file.write('{"id": "x", "turns": 5}\n')
    bad = evaluate(dialogs, "--bundle", tiny.bundle.path, cwd=tmp_path, ok=False)
    assert "dialogs.jsonl:7: turns: found a number, expected a list of turns" in bad.stderr.replace("\n", " ")


def test_retrieval_evaluate_leaves_nothing_but_vectors(tiny: Made, dialogs: Path, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    evaluate(dialogs, "--bundle", tiny.bundle.path, "--of", 5, "--store", "known", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - before == {"known"}
