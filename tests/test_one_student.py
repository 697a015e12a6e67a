"""One student, from a teacher and two small files to a folder that the service loads. docs/training.md tells the same."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

from typer.testing import CliRunner

from nlu.__main__ import app
from nlu.training import config as configs
from nlu.training import distill, train
from nlu.training.config import Config, ConfigInvalid
from nlu.training.loop import Event, Interrupted, Trained
from nlu.vectorizer import Vectorizer, fingerprint
from tests.nlu.training.bert import make_bert

pytestmark = [
    pytest.mark.train,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),
]

CONFIG = Path(inspect.getfile(configs)).parent / "configs" / "tiny-student.toml"
STAGES = ["1-inside", "2-space", "3-int8"]

PHRASES = [
    " ".join(words)
    for words in itertools.product(
        ("open", "close", "paint", "wash"),
        ("my", "the", "our"),
        ("door", "box", "car", "cup", "gate"),
        ("now", "at noon", "later"),
    )
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a user's two files and a teacher that learnt from them."""
    folder = tmp_path_factory.mktemp("taught")
    make_bert(folder / "bert", layers=3)
    data = folder / "data"
    data.mkdir()
    (data / "intents.tsv").write_text("".join(f"{text}\t{text.split()[0]}\n" for text in PHRASES))
    (data / "paraphrases.tsv").write_text("".join(f"{text}\t{text} please\n" for text in PHRASES))
    with contextlib.chdir(folder):
        train.train(CONFIG.with_name("tiny.toml"))
    return folder


@pytest.fixture
def work(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(distill, "HELD", 32)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["evaluation"]["teacher/phrases"][1] for row in rows if "evaluation" in row]


def test_one_student(work: Path) -> None:
    done = CliRunner().invoke(app, ["vectorizer", "distill", str(CONFIG), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    folder = work / "runs" / "tiny-student"
    assert Path(found["vectorizer"]).resolve() == folder / "3-int8" / "vectorizer"
    assert [stage for stage in STAGES if f"{stage[2:]}, " in done.stderr] == STAGES

    # What is served is a whole vectorizer, of the config's name and dimensions, that says what it was made of.
    vectorizer = Vectorizer(folder / "3-int8" / "vectorizer")
    assert (vectorizer.dim, vectorizer.token_dim, vectorizer.spec.precision) == (16, 16, "int8")
    assert vectorizer.fingerprint == found["fingerprint"]
    assert vectorizer.spec.name == "tiny-student"
    assert vectorizer.spec.provenance["datasets"] == ["file:data/intents.tsv", "file:data/paraphrases.tsv"]
    assert np.isfinite(vectorizer.encode(["open the gate"])[0].sentence).all()

    # It came closer to its teacher, and every stage began where the one before it ended.
    before, after = measured(folder / STAGES[0])[0], measured(folder / STAGES[1])[-1]
    assert 1 - after < (1 - before) / 2, (before, after)
    assert measured(folder / STAGES[1])[0] == pytest.approx(measured(folder / STAGES[0])[-1], abs=1e-6)
    for stage in STAGES:
        assert (folder / stage / "run.md").exists() and (folder / stage / "plots" / "loss.png").exists()
        assert (folder / stage / "model").exists()
    assert not (folder / STAGES[0] / "vectorizer").exists()
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def test_one_student_told_to_stop_goes_on_to_the_same_end(work: Path, taught: Path) -> None:
    shutil.copytree(taught, work / "undisturbed")
    with contextlib.chdir(work / "undisturbed"):
        wanted = fingerprint(distill.distill(CONFIG).vectorizer)

    def stop(stage: str, config: Config) -> train.Watch:
        def watch(step: int, what: Event) -> None:
            if stage == "space" and step == 7 and isinstance(what, Trained):
                os.kill(os.getpid(), signal.SIGTERM)

        return watch

    with pytest.raises(Interrupted):
        distill.distill(CONFIG, begun=stop)
    folder = work / "runs" / "tiny-student"
    assert not (folder / "3-int8").exists()
    with pytest.raises(ValueError, match="found a student in it, expected none; go on with --resume"):
        distill.distill(CONFIG)
    (work / "other.toml").write_text(
        CONFIG.read_text().replace('precision = "int8"', 'precision = "int8"\nword_bits = 4')
    )
    with pytest.raises(ValueError, match="found another config export, expected what the run began with"):
        distill.distill(work / "other.toml", resume=True)
    assert fingerprint(distill.distill(CONFIG, resume=True).vectorizer) == wanted


@pytest.mark.parametrize("name", ["intents", "paraphrases"])
def test_one_student_learns_from_no_test_row(work: Path, name: str) -> None:
    """A phrase that a task or a set of raw phrases is tested on is no phrase of the teacher's either."""
    rows = (work / "data" / f"{name}.tsv").read_text().splitlines(keepends=True)
    folder = work / "data" / name
    folder.mkdir()
    (folder / "train.tsv").write_text("".join(rows))
    (folder / "test.tsv").write_text("".join(rows[::6]))
    config = configs.parse(CONFIG.read_text().replace(f"file:data/{name}.tsv", f"file:data/{name}"))
    assert config.distill is not None
    phrases, _ = distill.read_phrases(config, config.distill)
    assert not set(PHRASES[::6]) & set(phrases)
    assert set(PHRASES) - set(PHRASES[::6]) <= set(phrases)  # and all others are there


@pytest.mark.parametrize(
    ("scripts", "left"),
    [
        ((), {"open the door", "открой дверь", "café 24"}),
        (("latin",), {"open the door", "café 24"}),
        (("cyrillic",), {"открой дверь"}),
        (("latin", "cyrillic"), {"open the door", "открой дверь", "café 24"}),
    ],
)
def test_one_student_hears_the_scripts_it_is_for(scripts: tuple[str, ...], left: set[str]) -> None:
    phrases = ("open the door", "открой дверь", "café 24")
    assert {text for text in phrases if distill._written_in(text, scripts)} == left


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ("recompute = false", "recompute = true", "batch.recompute: found true, expected false"),
        ("outputs = 1.0\nsimilarities = 0.1", "outputs = 0.0", "it would learn nothing of the teacher"),
        ("layers = [1]", "layers = []", "distill.layers"),
        ('precision = "int8"', 'precision = "fp32"\nword_bits = 4', "word_bits: 4 bits are for int8"),
        ("layers = [1]", "layers = [1]\nlayer = [2]", "found an unknown key"),
        ("[[task]]", "[[mlm]]", "mlm"),
    ],
)
def test_one_student_of_a_wrong_config_is_refused(work: Path, found: str, wanted: str, message: str) -> None:
    text = CONFIG.read_text()
    assert found in text
    (work / "wrong.toml").write_text(text.replace(found, wanted))
    with pytest.raises(ConfigInvalid, match=message):
        distill.settings(work / "wrong.toml")
    done = CliRunner().invoke(app, ["vectorizer", "train", str(CONFIG)])
    assert done.exit_code != 0
