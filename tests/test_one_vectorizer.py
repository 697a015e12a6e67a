"""One vectorizer, from a config and two small files to a folder that the service loads. docs/training.md tells the same."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
from typer.testing import CliRunner

from nlu.__main__ import app
from nlu.training import config as configs
from nlu.training import loop, network, train
from nlu.training.config import ConfigInvalid
from nlu.training.data import read_data
from nlu.training.loop import Event, Interrupted, Trained
from nlu.vectorizer import Vectorizer, fingerprint
from tests.nlu.training.bert import make_bert

pytestmark = [
    pytest.mark.train,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's and transformers' own deprecations
]

CONFIG = Path(inspect.getfile(configs)).parent / "configs" / "tiny.toml"

PLACES = "kitchen bedroom hall garden cellar attic garage office porch lounge nursery study".split()
SINGERS = "abba adele bowie cash dylan elvis madonna prince queen shakira sting zappa".split()
LIGHTS = [text for place in PLACES for text in (f"lights on in the {place}", f"make the {place} dark")]
MUSIC = [text for singer in SINGERS for text in (f"play something by {singer}", f"stop playing {singer}")]
NEW_LIGHTS = ["lights on in the tower", "make the barn dark", "dark in the cave", "lights in the shed"]
NEW_MUSIC = ["play something by oasis", "stop playing muse", "something by mozart", "playing drake"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an encoder that nobody trained and a user's two files."""
    make_bert(tmp_path / "bert")
    data = tmp_path / "data"
    data.mkdir()
    rows = [(text, "lights") for text in LIGHTS] + [(text, "music") for text in MUSIC]
    (data / "intents.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    pairs = [(text, text.replace("lights on in", "light up")) for text in LIGHTS[::2]]
    pairs += [(text, text.replace("play something by", "i want to hear")) for text in MUSIC[::2]]
    (data / "paraphrases.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def margin(vectors: NDArray[np.float32]) -> float:
    """How much closer phrases of one class are than phrases of both; NEW_LIGHTS first, then NEW_MUSIC. -2 to 2."""
    cosines = vectors @ vectors.T
    same = np.kron(np.eye(2, dtype=bool), np.ones((4, 4), bool))
    return float(cosines[same & ~np.eye(8, dtype=bool)].mean() - cosines[~same].mean())


def served(folder: Path, phrases: Sequence[str]) -> NDArray[np.float32]:
    return np.stack([encoding.sentence for encoding in Vectorizer(folder).encode(phrases)])


def test_one_vectorizer(work: Path) -> None:
    phrases = NEW_LIGHTS + NEW_MUSIC
    before = margin(network.load(work / "bert").encode(phrases).numpy())
    seen: list[tuple[int, Event]] = []
    finished = train.train(CONFIG, begun=lambda name, config: lambda step, what: seen.append((step, what)))

    # It learnt, and what is served is what was trained.
    after = margin(served(finished.vectorizer, phrases))
    assert after > before + 0.2
    trained = network.load(finished.folder / "model").encode(phrases).numpy()
    assert (served(finished.vectorizer, phrases) * trained).sum(axis=1).mean() > 0.98  # int8
    vectorizer = Vectorizer(finished.vectorizer)
    assert (vectorizer.dim, vectorizer.token_dim, vectorizer.spec.precision) == (32, 16, "int8")
    assert vectorizer.spec.name == "tiny"
    assert vectorizer.spec.provenance["datasets"] == ["file:data/intents.tsv", "file:data/paraphrases.tsv"]
    steps = [what for _, what in seen if isinstance(what, Trained)]
    assert {what.task for what in steps} == {"intents", "paraphrases"} and len(steps) == 30

    # The folder tells all of it.
    folder = work / "runs" / "tiny"
    assert finished.folder.resolve() == folder
    assert configs.load(folder / "config.toml") == configs.load(CONFIG)
    environment = json.loads((folder / "env.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"].partition("+")[0])
    assert {Path(name).name for name in environment["data"]} == {"intents.tsv", "paraphrases.tsv"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in rows if "evaluation" in row] == [0, 15, 30]
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "loss.png",
        "learning-rate.png",
        "evaluation.png",
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000020",
        "step-00000030",
    ]
    report = (folder / "run.md").read_text()
    for words in (
        "**status**: finished",
        "30 of 30",
        fingerprint(finished.vectorizer),
        "| intents |",
        "evaluation.png",
    ):
        assert words in report
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    if importlib.util.find_spec("mlflow"):
        lines = next((folder / "mlruns").rglob("metrics/loss.intents")).read_text().splitlines()
        logged = [row["step"] for row in rows if "intents" in row.get("loss", ())]
        assert [int(line.split()[2]) for line in lines] == logged


def test_one_vectorizer_told_to_stop_leaves_a_checkpoint_and_goes_on(work: Path) -> None:
    folder = work / "runs" / "tiny"

    def stop(step: int, what: Event) -> None:
        if step == 12 and isinstance(what, Trained):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after 13 steps"):
        train.train(CONFIG, begun=lambda name, config: stop)
    assert (folder / "checkpoints" / "step-00000013").exists()
    assert not (folder / "vectorizer").exists() and not (folder / "model").exists()
    assert "not finished: stopped after 13 steps" in (folder / "run.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with pytest.raises(ValueError, match="found a run in it, expected none; go on from there with --resume"):
        train.train(CONFIG)

    (folder / "metrics.jsonl").open("a").write('{"step": 99, "half a')  # what a kill leaves
    done = CliRunner().invoke(
        app, ["vectorizer", "train", str(CONFIG), "--resume", "--steps", "20", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 20
    assert found["fingerprint"] == fingerprint(folder / "vectorizer")
    assert "step 20/20: " in done.stderr and "phrases/s" in done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 13, 15, 20]
    assert (folder / "env-step-00000013.json").exists()
    assert tomllib.loads((folder / "config.toml").read_text())["schedule"]["steps"] == 20

    with pytest.raises(ValueError, match="found a checkpoint of 20 steps, expected at most 10"):
        train.train(CONFIG, resume=True, steps=10)
    intents = work / "data" / "intents.tsv"
    intents.write_text(intents.read_text() + "lights please\tlights\n")
    with pytest.raises(ValueError, match=r"found another data .*intents\.tsv"):
        train.train(CONFIG, resume=True)


def test_one_vectorizer_that_misses_the_gate_is_not_there(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nlu.errors import VectorizerRefused

    def refuse(*_: object, **__: object) -> None:
        raise VectorizerRefused("found mean cosine 0.5")

    monkeypatch.setattr(train, "export", refuse)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)  # a machine without MLflow trains too
    with pytest.raises(VectorizerRefused):
        train.train(CONFIG, steps=2)
    folder = work / "runs" / "tiny"
    assert (folder / "model").exists() and (folder / "checkpoints" / "step-00000002").exists()
    assert not (folder / "vectorizer").exists() and not (folder / "mlruns").exists()
    assert "not finished: found mean cosine 0.5" in (folder / "run.md").read_text()


def test_one_vectorizer_trains_on_no_test_row(work: Path) -> None:
    folder = work / "data" / "intents"
    folder.mkdir()
    rows = [f"{text}\t{label}\n" for label, texts in (("lights", LIGHTS), ("music", MUSIC)) for text in texts]
    (folder / "train.tsv").write_text("".join(rows))
    (folder / "test.tsv").write_text("".join(rows[::6]))
    (folder / "dev.tsv").write_text("".join(row.upper() for row in rows[1::6]))
    text = CONFIG.read_text().replace("file:data/intents.tsv", "file:data/intents")
    data = read_data(configs.parse(text))
    intents, paraphrases = data.tasks
    tested = {row.split("\t")[0] for row in rows[::6]}
    assert len(intents.examples) == len(rows) - len(tested)  # in upper case, the dev rows have other labels
    for each in (intents, paraphrases):  # also not by way of another set
        texts = {text for column in loop.texts_of(each.examples) for text in column}
        assert texts and not texts & tested
    assert data.dropped["intents/file:data/intents"] == len(tested)
    assert data.dropped["paraphrases/file:data/paraphrases.tsv"] > 0
    assert {Path(name).name for name in data.digests} == {
        "train.tsv",
        "dev.tsv",
        "test.tsv",
        "paraphrases.tsv",
    }
    assert paraphrases.held and not set(paraphrases.held) & set(paraphrases.examples)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('name = "tiny"', 'name = "tiny"\nautocast = "fp16"'), "run.autocast: found 'fp16'"),
        (("token_dim = 16", "token_dim = 0"), "export.token_dim: found 0"),
    ],
)
def test_one_vectorizer_refuses_what_it_does_not_do(
    change: tuple[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "changed.toml"
    path.write_text(CONFIG.read_text().replace(*change))
    with pytest.raises(ConfigInvalid, match=words):
        train.settings(path)
    with pytest.raises(ConfigInvalid, match="--steps: found 0"):
        train.settings(CONFIG, 0)
