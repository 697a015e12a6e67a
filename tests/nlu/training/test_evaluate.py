"""nlu.training.evaluate: whole runs on toy files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'chorus-nlu[train]'")

from typer.testing import CliRunner

from nlu.__main__ import app
from nlu.training import evaluate, report
from nlu.training.config import Evaluate
from nlu.training.exams import EXAMS
from nlu.training.scores import Evaluation, Line
from nlu.vectorizer import SPEC_FILE, Vectorizer
from tests.nlu.training.toy import make_toy
from tests.tiny import make_vectorizer

BRIEF = Evaluate(shots=(2,), seeds=3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A vectorizer, a wider one, and the first again for cased text."""
    root = tmp_path_factory.mktemp("vectorizers")
    one, wide = make_vectorizer(root / "one"), make_vectorizer(root / "wide", seed=1, dim=16)
    cased = make_vectorizer(root / "cased")
    spec = json.loads((cased / SPEC_FILE).read_text()) | {"uncased": False}
    (cased / SPEC_FILE).write_text(json.dumps(spec))
    return [one, wide, cased]


A_FEW = tuple(exam for exam in EXAMS if exam.data in ("banking77", "stsb.en", "goemotions"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def evaluation(folders: list[Path], toy: Path, store: Path) -> Evaluation:
    return evaluate.evaluate(folders, toy, BRIEF, store=store)


def test_evaluate_whole_run_has_every_line(evaluation: Evaluation) -> None:
    assert [column.name for column in evaluation.columns] == ["one", "wide", "cased"]
    assert [column.dim for column in evaluation.columns] == [8, 16, 8]
    tasks = {(line.task, line.language) for line in evaluation.lines}
    assert tasks >= {
        ("intents", "en"),
        ("intents", "ru"),
        ("out of scope", "en"),
        ("emotion", "en"),
        ("slots", "en"),
    }
    assert tasks >= {
        ("toxicity", "en"),
        ("entities", "en"),
        ("similarity", "ru"),
        ("replies", "en"),
        ("cost", ""),
    }
    for line in evaluation.lines:
        assert len(line.scores) == 3
        assert all(np.isfinite(score.value) for score in line.scores)
    few = evaluation.line("intents", "clinc150", "2-shot", "accuracy")
    assert all(score.spread is not None for score in few.scores)
    assert evaluation.line("intents", "banking77", "full", "accuracy").items == 7
    assert evaluation.line("intents", "hint3", "full", "accuracy").unseen
    assert not few.unseen
    size = evaluation.line("cost", "", "on disk", "MB").scores[0].value
    assert size == pytest.approx(
        sum(f.stat().st_size for f in Path(evaluation.columns[0].folder).iterdir()) / 1e6
    )
    assert evaluation.line("cost", "clinc150", "one thread", "ms per phrase").scores[0].value > 0
    with pytest.raises(ValueError, match="found no line x, y, z, w"):
        evaluation.line("x", "y", "z", "w")


def test_evaluate_cased_and_uncased_meet_the_same_rows(evaluation: Evaluation) -> None:
    russian = evaluation.line("intents", "home_assistant.ru", "full", "accuracy")
    assert russian.items == 2 and russian.scores[2].change is not None
    similar = evaluation.line("similarity", "stsb.en", "cosine", "Spearman")
    assert similar.scores[2].change == 0.0, "nothing in these rows has case"


def without_cost(evaluation: Evaluation) -> list[Line]:
    return [line for line in evaluation.lines if line.task != "cost"]


def test_evaluate_second_run_encodes_nothing_and_says_the_same(
    evaluation: Evaluation, folders: list[Path], toy: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> Any:
        raise AssertionError("a phrase was encoded again")

    monkeypatch.setattr(Vectorizer, "encode_corpus", encode)
    again = evaluate.evaluate(folders, toy, BRIEF, store=store)
    assert without_cost(again) == without_cost(evaluation)
    assert again.data == evaluation.data


def test_evaluate_without_the_store_would_encode(
    folders: list[Path], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vectorizer, "encode_corpus", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.evaluate(folders[:1], toy, BRIEF, store=tmp_path)


def test_evaluate_sweep_cuts_each_vectorizer(
    evaluation: Evaluation,
    folders: list[Path],
    toy: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "EXAMS", A_FEW)
    swept = evaluate.evaluate(folders[:2], toy, BRIEF, dims=(8, 4), store=store)
    assert [(column.name, column.width) for column in swept.columns] == [
        *(("one", 8), ("one@4", 4), ("wide", 16), ("wide@8", 8), ("wide@4", 4)),
    ]
    assert {line.task for line in swept.lines} == {"intents", "similarity"}
    for line in swept.lines:
        whole = evaluation.line(line.task, line.data, line.condition, line.metric)
        assert line.scores[0].value == whole.scores[0].value, "the first column stands uncut"
    assert report.write(swept, tmp_path)[2].stat().st_size > 1000
    with pytest.raises(ValueError, match="expected widths below 16"):
        evaluate.evaluate(folders[:2], toy, BRIEF, dims=(16, 32), store=store)


def test_evaluate_looks_at_some_sets_alone(
    evaluation: Evaluation, folders: list[Path], toy: Path, store: Path
) -> None:
    found = evaluate.evaluate(folders, toy, BRIEF, only=["hint3"], store=store)
    assert without_cost(found) == [line for line in without_cost(evaluation) if line.data == "hint3"]
    with pytest.raises(ValueError, match=r"only: found hint, expected some of .*banking77.*hint3"):
        evaluate.evaluate(folders, toy, BRIEF, only=["hint"], store=store)


def test_evaluate_missing_data_is_said_before_any_work(
    folders: list[Path], toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no folder .*nowhere.*pass it with --data"):
        evaluate.evaluate(folders, tmp_path / "nowhere", BRIEF, store=tmp_path)
    with pytest.raises(FileNotFoundError, match="mcid: found no folder"):
        evaluate.evaluate(folders, toy, Evaluate(suite="full"), store=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [0, 2], ids=["none", "twice"])
def test_evaluate_wants_different_folders(folders: list[Path], toy: Path, times: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected different folders"):
        evaluate.evaluate(folders[:1] * times, toy, BRIEF, store=tmp_path)


def test_evaluate_names_that_collide_take_their_parent(tmp_path: Path) -> None:
    assert evaluate._names([tmp_path / "a/export", tmp_path / "b/export", tmp_path / "c"]) == [
        *("a/export", "b/export", "c"),
    ]


def test_evaluate_held_out_sets_are_marked(folders: list[Path], toy: Path, store: Path) -> None:
    held = Evaluate(shots=(2,), seeds=2, held_out=("banking77",))
    found = evaluate.evaluate(folders[:1], toy, held, store=store)
    assert {line.data for line in found.lines if line.unseen} == {"banking77", "hint3"}


def test_evaluate_command_prints_one_json_object(
    folders: list[Path], toy: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "EXAMS", A_FEW)
    places = ["--data", str(toy), "--out", str(tmp_path), "--store", str(store)]
    arguments = ["vectorizer", "evaluate", str(folders[0]), *places]
    done = CliRunner().invoke(app, [*arguments, "--dims", "4", "--only", A_FEW[0].data, "--json"])
    assert done.exit_code == 0, done.output
    assert {line["data"] for line in json.loads(done.stdout)["lines"]} == {A_FEW[0].data}
    assert [column["width"] for column in json.loads(done.stdout)["columns"]] == [8, 4]
    assert (tmp_path / "evaluation.png").exists()
    refused = CliRunner().invoke(app, [*arguments, "--dims", "wide"])
    assert refused.exit_code == 2 and "expected widths" in refused.output
