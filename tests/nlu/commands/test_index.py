"""`nlu index adapt`: from a spreadsheet of phrases to a bundle that finds more, and errors that are one clear line each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from index.build import Entry
from index.build import build as build_index
from nlu import canaries, loading, parts
from nlu.vectorizer import Vectorizer
from statics.bundle import Bundle, build
from tests.tiny import CREATED, Made

OLD = {
    "tea": ("put the kettle on", "a cup of tea please", "tea with milk", "i could drink some tea", "поставь чайник"),
    "moon": ("what a round moon", "the moon is so bright", "is it full moon", "look at the moon", "какая луна"),
    "rain": ("it rains again", "i got wet on my way", "where is my umbrella", "clouds everywhere", "опять дождь"),
    "sleep": ("i am so tired", "time for bed", "my eyes are closing", "what a long day", "хочу спать"),
}  # fmt: skip
NEW = {"bread": "my bread is in the oven", "boat": "we took the boat out", "наш кот": "мой кот уснул"}
SAID = (
    ("the loaf smells wonderful", "bread"),
    ("flour all over the kitchen", "bread"),
    ("the dough did not rise", "bread"),
    ("i baked rolls this morning", "bread"),
    ("sailing across the lake", "boat"),
    ("the wind took our sail", "boat"),
    ("rowing made my arms ache", "boat"),
    ("we anchored in a small bay", "boat"),
    ("он спит на клавиатуре", "наш кот"),
    ("рыжий опять дремлет на окне", "наш кот"),
)


@pytest.fixture(scope="module")
def bundle(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny vectorizer with an index of its own."""
    folder = Path(shutil.copytree(tiny.parts, tmp_path_factory.mktemp("sprint") / "parts"))
    shutil.rmtree(folder / "index.chitchat")
    vectorizer = Vectorizer(folder / "vectorizer.tiny")
    prompts = [(reply, prompt) for reply in OLD for prompt in OLD[reply]] + list(NEW.items())
    entries = [Entry(id=reply, text=f"About {reply}.", prompt=prompt) for reply, prompt in prompts]
    rows = np.stack([each.sentence for each in vectorizer.encode([prompt for _, prompt in prompts])])
    build_index(entries, rows, folder / "index.replies", personas=(), surfaces=())
    canaries.write(folder / "index.replies", vectorizer)
    return build(
        parts.collect(folder), folder.parent / "bundle", created=CREATED, requires_service=">=0.1.0.dev0,<1"
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{query}\t{reply}\n" for query, reply in SAID), encoding="utf-8")
    return path


def adapt(*arguments: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    done = subprocess.run(
        [sys.executable, "-m", "nlu", "index", "adapt", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=clean, timeout=100,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_index_adapt_makes_a_part_that_a_bundle_takes(bundle: Bundle, pairs: Path, tmp_path: Path) -> None:
    options = ("--bundle", bundle.path, "--max-harm", 1, "--rank", 4, "--json")
    out = tmp_path / "parts" / "adapter.main"
    told = json.loads(adapt(pairs, "--out", out, *options, cwd=tmp_path).stdout)
    assert (told["folder"], told["rank"], told["new"]["questions"], told["rows"]) == (str(out), 4, 10, 23)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter.json", "canaries.safetensors", "weights.safetensors",
    ]  # fmt: skip
    assert (tmp_path / ".cache" / "vectors").is_dir()  # a second run need not encode

    again = tmp_path / "again" / "adapter.main"
    adapt(pairs, "--out", again, *options, cwd=tmp_path)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()

    grown = build(
        [*(parts.part(bundle.folder(component)) for component in bundle.manifest.components), parts.part(out)],
        tmp_path / "bundle", created=CREATED, requires_service=">=0.1.0.dev0,<1",
    )  # fmt: skip
    engine = loading.load(grown)
    assert engine.adapter is not None
    assert engine.adapter.spec.requires.vectorizer == engine.vectorizer.fingerprint
    assert engine.adapter.spec.rank == 4


def test_index_adapt_shows_a_page(bundle: Bundle, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.main"
    page = adapt(pairs, "--out", out, "--bundle", bundle.path, "--max-harm", 1, cwd=tmp_path).stdout
    assert all(word in page for word in ("new content", "old content", "recall@1", "recall@10", "MRR"))
    assert "no similarity moves by more than 0.304; judged on 23 rows" in page


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("no tab\n", (), ("pairs.tsv:1: found 1 fields", "expected query<TAB>reply id")),
        ("hot\ttea\ncold\tcoffee\n", (), ("pairs.tsv:2: found reply id 'coffee'", "add the reply")),
        ("hot\ttea\n", (), ("found 1 phrases", "expected at least 5")),
        ("hot\ttea\n", ("--eps", 1), ("--eps", "less than 1")),
        ("hot\ttea\n", ("--out", "main"), ("--out", "adapter.NAME")),
        ("hot\ttea\n", ("--bundle", "nowhere"), ("file-missing", "nowhere")),
    ],
    ids=["no-tab", "unknown-reply", "too-few", "eps", "out", "bundle"],
)  # fmt: skip
def test_index_adapt_errors_are_clear_lines(
    text: str,
    options: tuple[object, ...],
    words: tuple[str, ...],
    bundle: Bundle,
    pairs: Path,
    tmp_path: Path,
) -> None:
    pairs.write_text(text)
    done = adapt(pairs, "--out", "adapter.main", "--bundle", bundle.path, *options, cwd=tmp_path, ok=False)
    said = " ".join(done.stderr.replace("│", " ").split())
    assert all(word in said for word in words), said
    assert not (tmp_path / "adapter.main").exists()
