"""`nlu index build | add | remove | block`: from files to a served reply, through a kill, and errors that are clear lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from index.replies import Replies
from nlu import loading, parts
from statics.bundle import Bundle, build
from tests.nlu.retrieval.kitchen import digests, many, toxicity, written
from tests.tiny import CREATED, Made

TEA: list[dict[str, Any]] = [
    {"reply": "Tea it is.", "prompt": ["make tea", "tea please"], "tags": "kitchen"},
    {"reply": "Чай готов.", "prompt": "где чай", "persona": "calm", "id": "tea.ready"},
    {"reply": "tea it is!", "prompt": "boil water"},
    {"reply": "Look at the screen.", "surface": "tv"},
    {"reply": "zzz zz", "prompt": "how are you", "id": "rude"},
]


@pytest.fixture(scope="module")
def bundle(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a head of toxicity."""
    from nlu import canaries
    from nlu.vectorizer import Vectorizer

    folder = Path(shutil.copytree(tiny.parts, tmp_path_factory.mktemp("bundle") / "parts"))
    vectorizer = Vectorizer(folder / "vectorizer.tiny")
    toxicity(vectorizer).save(folder / "head.toxicity")
    canaries.write(folder / "head.toxicity", vectorizer)
    return build(
        parts.collect(folder), folder.parent / "bundle", created=CREATED, requires_service=">=0.1.0.dev0,<1"
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nlu", "index", *map(str, arguments)]


def clean() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    return kept | {"COLUMNS": "200"}


def nlu(cwd: Path, *arguments: object, ok: bool = True) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, env=clean(), timeout=100
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if ok else " ".join(done.stderr.replace("│", " ").split())


def told(cwd: Path, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nlu(cwd, *arguments, "--json"))
    return found


def test_index_build_makes_a_part_that_a_bundle_serves(bundle: Bundle, tmp_path: Path) -> None:
    source = written(tmp_path / "tea.jsonl", *TEA)
    out = tmp_path / "parts" / "index.tea"
    banned = tmp_path / "banned.txt"
    banned.write_text("Look at the SCREEN.\nnobody says this\n")
    found = told(
        tmp_path,
        "build",
        source,
        "--out",
        out,
        "--bundle",
        bundle.path,
        "--banned",
        banned,
        "--quantile-report",
    )
    assert (found["rows"], found["replies"], found["entries"], found["merged"]) == (5, 4, 6, 1)
    assert found["blocked"] == {"toxic": 1, "banned": 1} and found["banned_in_vain"] == ["nobody says this"]
    assert (found["index"]["personas"], found["index"]["surfaces"]) == (["calm"], ["tv"])
    assert (
        found["index"]["bytes"]
        == found["bytes_to_pull"]
        == sum(path.stat().st_size for path in out.iterdir())
    )
    assert found["quantiles"]["rows"] == 6 and found["quantiles"]["other"]["0.5"] < 1
    assert (tmp_path / ".cache" / "vectors").is_dir() and (out.parent / "merges.jsonl").exists()

    others = [component for component in bundle.manifest.components if component.kind != "index"]
    grown = build(
        [*(parts.part(bundle.folder(component)) for component in others), parts.part(out)],
        tmp_path / "bundle", created=CREATED, requires_service=">=0.1.0.dev0,<1",
    )  # fmt: skip
    engine = loading.load(grown)
    assert engine.replies is not None and len(engine.replies) == 6

    again = told(tmp_path, "build", source, "--out", out, "--bundle", bundle.path, "--banned", banned)
    assert (again["encoded"], again["bytes_to_pull"], again["pull"]) == (0, 0, {})


def test_index_build_a_killed_build_goes_on_and_gives_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    source = written(tmp_path / "many.jsonl", *many(12_000))
    out, store = tmp_path / "index.x", tmp_path / "killed"
    arguments = ("build", source, "--out", out, "--bundle", bundle.path, "--store", store, "--kind", "exact")
    build = subprocess.Popen(
        command(*arguments, "--workers", 1), cwd=tmp_path, env=clean(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    while build.poll() is None and saved(store) < 2000:
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL and not out.exists()
    survived = saved(store)
    assert 2000 <= survived < 24_000 and len(list(tmp_path.glob(".*.building-*"))) == 3

    gone_on = told(tmp_path, *arguments, "--workers", 2)
    whole = told(
        tmp_path, "build", source, "--out", tmp_path / "index.y", "--bundle", bundle.path, "--kind", "exact"
    )
    assert gone_on["encoded"] == whole["encoded"] - survived
    assert digests(out) == digests(tmp_path / "index.y")
    assert not list(tmp_path.glob(".*building*"))


def saved(store: Path) -> int:
    """Encodings that a process which dies now leaves behind."""
    for path in store.glob("*.sqlite"):
        base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return int(base.execute("SELECT count(*) FROM encodings").fetchone()[0])
        except sqlite3.OperationalError:  # the table is just being made
            return 0
        finally:
            base.close()
    return 0


def test_index_add_remove_and_block_say_what_a_pull_fetches(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "index.x"
    first, more = (
        written(tmp_path / "a.jsonl", *many(300), *TEA),
        written(tmp_path / "b.jsonl", *many(330)[300:]),
    )
    nlu(tmp_path, "build", first, "--out", out, "--bundle", bundle.path, "--shard-rows", 64, "--kind", "hnsw")
    before = digests(out)

    grown = told(tmp_path, "add", out, more, "--bundle", bundle.path)
    assert (grown["replies"], grown["entries"], grown["index"]["entries"]) == (30, 30, 336)
    assert grown["pull"].keys() == {
        name for name, digest in digests(out).items() if digest not in before.values()
    }
    assert grown["bytes_to_pull"] == sum((out / name).stat().st_size for name in grown["pull"])
    assert not grown["pull"].keys() & {
        "shard-000.f16",
        "said-000.f16",
        "graph-links.i32",
        "canaries.safetensors",
    }
    assert grown["build_again"] is (grown["index"]["not_in_graph"] > 0.05 * grown["index"]["vectors"]) is True

    blocked = told(tmp_path, "block", out, "tea.ready", "--why", "out of tea")
    assert (blocked["blocked"], blocked["pull"].keys()) == (["tea.ready"], {"index.json", "items.arrow"})
    item = next(item for item in map(Replies.load(out).items.reply, range(336)) if item.id == "tea.ready")
    assert item.blocked == "out of tea"
    assert told(tmp_path, "block", out, "tea.ready", "--why", "")["allowed"] == ["tea.ready"]
    assert not any(
        item.id == "tea.ready" and item.blocked for item in map(Replies.load(out).items.reply, range(336))
    )

    ids = tmp_path / "ids.txt"
    ids.write_text("rude\n\nnowhere\n")
    removed = told(
        tmp_path, "remove", out, "tea.ready", "--from", ids, "--missing-ok", "--out", tmp_path / "index.y"
    )
    assert (removed["removed"], removed["missing"]) == (["tea.ready", "rude"], ["nowhere"])
    assert len(Replies.load(tmp_path / "index.y")) == 334 and len(Replies.load(out)) == 336
    assert removed["pull"].keys() == {"index.json", "items.arrow"}


def test_index_commands_show_pages(bundle: Bundle, tmp_path: Path) -> None:
    source = written(tmp_path / "tea.jsonl", *TEA)
    out = tmp_path / "index.tea"
    banned = tmp_path / "banned.txt"
    banned.write_text("nobody says this\n")
    page = nlu(
        tmp_path,
        "build",
        source,
        "--out",
        out,
        "--bundle",
        bundle.path,
        "--banned",
        banned,
        "--quantile-report",
    )
    for words in (
        "texts merged into others       1", "blocked as toxic               1", "25% blocked as toxic: the head may not",
        "banned, but no reply: nobody says this", "similarity at", "prompt to its reply", "a pull fetches", "items.arrow",
        f"{out}: exact, 6 rows on 6 vectors in 2 shards",
    ):  # fmt: skip
        assert words in page, page
    unjudged = nlu(
        tmp_path, "build", source, "--out", out, "--bundle", bundle.folder(bundle.of_kind("vectorizer")[0])
    )
    assert "no toxicity head in this bundle" in unjudged and "not judged" in unjudged
    more = written(tmp_path / "more.jsonl", {"reply": "Bread.", "prompt": "toast"})
    page = nlu(tmp_path, "add", out, more, "--bundle", bundle.path)
    assert "new replies                    1" in page and "scanned" not in page
    assert "1 replies removed; 6 rows" in nlu(tmp_path, "remove", out, "rude")
    assert "1 replies blocked, 1 were not there; 6 rows" in nlu(
        tmp_path, "block", out, "tea.ready", "x", "--why", "none left", "--missing-ok"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", "bad.tsv", "--out", "index.x"), ("bad.tsv:1: found column 'author'", "rename or drop it")),
        (("build", "tea.jsonl", "--out", "tea"), ("--out: found 'tea'", "index.NAME")),
        (("build", "empty.jsonl", "--out", "index.x"), ("found no replies", "--allow-empty")),
        (("build", "tea.jsonl", "--out", "index.x", "--personas", "grim"), ("tea.jsonl:2: persona: found 'calm', expected one of: grim",)),
        (("build", "tea.jsonl", "--out", "index.x", "--kind", "tree"), ("'tree' is not one of",)),
        (("build", "nowhere.tsv", "--out", "index.x"), ("nowhere.tsv", "does not exist")),
        (("remove", "index.old"), ("found no ids", "--from")),
        (("remove", "index.old", "rude", "x", "y"), ("'x', 'y'",)),
        (("block", "index.old", "x", "--why", "no"), ("'x'",)),
        (("block", "index.old", "rude"), ("Missing option", "--why")),
        (("add", "index.old", "bad.tsv"), ("bad.tsv:1: found column 'author'",)),
        (("add", "index.old", "tea.jsonl", "--out", "elsewhere"), ("--out: found 'elsewhere'",)),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_index_errors_are_clear_lines_and_nothing_changes(
    bundle: Bundle, old: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    shutil.copytree(old, tmp_path / "index.old")
    written(tmp_path / "tea.jsonl", *TEA)
    (tmp_path / "bad.tsv").write_text("prompt\treply\tauthor\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    before = {path.name for path in tmp_path.iterdir()}, digests(tmp_path / "index.old")
    asks = ("--bundle", bundle.path) if arguments[0] in ("build", "add") else ()
    said = nlu(tmp_path, *arguments, *asks, ok=False)
    assert all(word in said for word in words), said
    assert (
        {path.name for path in tmp_path.iterdir()} - {".cache"},
        digests(tmp_path / "index.old"),
    ) == before


@pytest.fixture(scope="module")
def old(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    source = written(folder / "tea.jsonl", *TEA)
    nlu(folder, "build", source, "--out", folder / "index.old", "--bundle", bundle.path)
    return folder / "index.old"
