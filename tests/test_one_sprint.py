"""The flow of a sprint: new labelled phrases, a head, the next bundle, kilobytes to a pod that serves on, its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")

from annotators.annotator import Heard
from nlu import loading
from nlu.engine import Engine
from nlu.errors import EngineRefused
from nlu.heads import config as configs
from nlu.heads import lifecycle
from nlu.heads.train import train
from nlu.normalizer import normalize
from nlu.vectorizer import Vectorizer
from statics import bundle as bundles
from statics.bundle import Bundle
from statics.errors import StaticsError
from statics.locate import open_store
from statics.publish import publish
from statics.pull import pull
from statics.version import service_version
from tests.nlu.test_main import nlu
from tests.tiny import INTENTS, Made

# Letters are all the tiny vectorizer knows, so a label is a letter.
DOORS = {
    "open": ("oo o", "o oo oo", "ooo", "o o", "oooo o", "oo oo oo", "o ooo"),
    "shut": ("xx x", "x xx xx", "xxx", "x x", "xxxx x", "xx xx xx", "x xxx"),
}


def spreadsheet(path: Path, labelled: Mapping[str, tuple[str, ...]]) -> Path:
    lines = [f"{text}\t{label}" for label, texts in labelled.items() for text in texts]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def sprint(made: Made, work: Path, name: str, labelled: Mapping[str, tuple[str, ...]]) -> Path:
    """A head trained on a spreadsheet, with the vectors of the bundle's vectorizer."""
    data = spreadsheet(work / f"{name}.tsv", labelled)
    config = configs.load(None, name=name, files={"train": [data]})
    component = made.bundle.of_kind("vectorizer")[0]
    vectorizer = Vectorizer(made.bundle.folder(component))
    out = work / f"head of {name}"
    train(config, vectorizer, work / "vectors", out, workers=1, progress=lambda *_: None)
    return out


def answered(engine: Engine, text: str, name: str) -> str:
    phrase = normalize(text, uncased=engine.vectorizer.spec.uncased).text
    heard = Heard.alone(phrase, engine.vectorizer.encode([phrase])[0])
    found = engine.fleet.annotate(heard, wanted=frozenset({name}))[0]
    return next((label.label for label in found.labels if label.accepted), "")


def pulled(published: Bundle, store: Path, root: Path) -> Bundle:
    publish(published, open_store(str(store)), channel=None)
    return pull(open_store(str(store)), root, channel=published.manifest.channel, service=service_version())


def test_sprint_reaches_a_pod_as_kilobytes(tiny: Made, tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "pod"
    store.mkdir()
    live = loading.load(pulled(tiny.bundle, store, root))

    head = sprint(tiny, tmp_path, "door", DOORS)
    following = lifecycle.add(tiny.bundle, head, tmp_path / "next")
    changes = bundles.diff(tiny.bundle.manifest, following.manifest)
    assert [(change.folder, change.what) for change in changes if change.what != "same"] == [
        ("head.door", "added")
    ]
    spoken = sum(
        file.stat().st_size for file in (head / "head.door").iterdir() if file.name != "canaries.safetensors"
    )
    assert (
        sum(change.bytes_to_pull for change in changes) == spoken
    )  # the canaries are those of the other parts

    swapped = loading.load(pulled(following, store, root), before=live)
    assert swapped.vectorizer is live.vectorizer
    assert all(swapped.fleet.heads[name] is kept for name, kept in live.fleet.heads.items())
    assert [answered(swapped, text, "door") for text in ("oo", "xxxx")] == ["open", "shut"]
    assert answered(swapped, "stop", "intent") == answered(live, "stop", "intent") == "stop"


def test_sprint_again_changes_that_head_alone(tiny: Made, tmp_path: Path) -> None:
    first = lifecycle.add(tiny.bundle, sprint(tiny, tmp_path, "door", DOORS), tmp_path / "first")
    more = {label: (*texts, texts[0] + "?") for label, texts in DOORS.items()}
    second = lifecycle.replace(first, sprint(tiny, tmp_path, "door", more), tmp_path / "second")
    changed = [
        change.folder for change in bundles.diff(first.manifest, second.manifest) if change.what != "same"
    ]
    assert changed == ["head.door"]
    assert second.manifest.seq == first.manifest.seq + 1


def test_sprint_head_of_another_vectorizer_is_refused_at_every_door(
    tiny: Made, stranger: Made, tmp_path: Path
) -> None:
    """Of the same width and shape, so that only what ties a head to its vectorizer can tell; the control is our own."""
    (tmp_path / "theirs").mkdir()
    ours, theirs = sprint(tiny, tmp_path, "door", DOORS), sprint(stranger, tmp_path / "theirs", "door", DOORS)
    fingerprint = stranger.bundle.of_kind("vectorizer")[0].provides["vectorizer"]

    with pytest.raises(StaticsError, match=f"made with vectorizer {fingerprint}, expected"):
        lifecycle.add(tiny.bundle, theirs, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    said = spreadsheet(tmp_path / "said.tsv", DOORS)
    compared = nlu(
        "heads", "compare", str(ours), str(theirs), "--data", str(said), "--bundle", str(tiny.bundle.path), cwd=tmp_path, ok=False
    )  # fmt: skip
    assert fingerprint[:12] in compared.stderr and "retrain" in compared.stderr

    smuggled = json.loads((theirs / "head.door" / "head.json").read_text(encoding="utf-8"))
    smuggled["requires"]["vectorizer"] = tiny.bundle.of_kind("vectorizer")[0].provides["vectorizer"]
    (theirs / "head.door" / "head.json").write_text(json.dumps(smuggled), encoding="utf-8")
    with pytest.raises((EngineRefused, StaticsError), match="canaries|made with vectorizer"):
        lifecycle.add(tiny.bundle, theirs, tmp_path / "refused")
    assert lifecycle.add(tiny.bundle, ours, tmp_path / "taken").of_kind("head")


def test_sprint_says_when_it_was_made(tiny: Made, tmp_path: Path) -> None:
    made = lifecycle.add(tiny.bundle, sprint(tiny, tmp_path, "door", DOORS), tmp_path / "next")
    assert made.manifest.created <= datetime.now(UTC)
    assert set(INTENTS) <= set(loading.load(made).fleet.heads["intent"].spec.labels)
