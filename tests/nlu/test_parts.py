"""nlu.parts: what a folder provides and requires is read off the folder, and a folder that is no part is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nlu import canaries, parts
from nlu.errors import VectorizerRefused
from nlu.vectorizer import fingerprint
from statics.bundle import Part
from tests.tiny import Made


@pytest.fixture
def folder(tmp_path: Path, tiny: Made) -> Path:
    """A copy of all parts; every wrong one in these tests starts as this one."""
    return Path(shutil.copytree(tiny.parts, tmp_path / "parts"))


def test_parts_collects_every_folder_kind_by_kind(folder: Path) -> None:
    (folder / "ranker.linear").mkdir()
    (folder / "notes.txt").write_text("a file is no part")
    assert [part.label for part in parts.collect(folder)] == [
        "vectorizer.tiny", "head.emotion", "head.followup", "head.intent", "head.quick", "head.slots", "head.topic",
        "index.chitchat", "cold.phrases", "ranker.linear",
    ]  # fmt: skip


def test_parts_vectorizer_provides_its_fingerprint(folder: Path) -> None:
    found = parts.part(folder / "vectorizer.tiny")
    mine = fingerprint(folder / "vectorizer.tiny")
    assert found == Part("vectorizer", "tiny", folder / "vectorizer.tiny", {}, {"vectorizer": mine})


@pytest.mark.parametrize("name", ["head.intent", "index.chitchat", "cold.phrases"])
def test_parts_require_the_vectorizer_of_their_canaries(folder: Path, name: str) -> None:
    mine = fingerprint(folder / "vectorizer.tiny")
    kind, own = name.split(".")
    assert parts.part(folder / name) == Part(kind, own, folder / name, {"vectorizer": mine}, {})


def test_parts_require_what_the_canaries_say_and_not_the_neighbour(folder: Path, stranger: Made) -> None:
    shutil.copy(stranger.parts / "head.intent" / canaries.FILE, folder / "head.intent")
    theirs = fingerprint(stranger.parts / "vectorizer.tiny")
    assert parts.part(folder / "head.intent").requires == {"vectorizer": theirs}


def test_parts_ranker_requires_nothing(folder: Path) -> None:
    (folder / "ranker.linear").mkdir()
    assert parts.part(folder / "ranker.linear") == Part("ranker", "linear", folder / "ranker.linear", {}, {})


def test_parts_name_may_hold_dots(folder: Path) -> None:
    found = parts.part((folder / "head.intent").rename(folder / "head.intent.v2"))
    assert (found.kind, found.name, found.label) == ("head", "intent.v2", "head.intent.v2")


@pytest.mark.parametrize(
    "name", ["intent", "head", "head.", ".intent", "Head.intent", "tail.intent", "scratch"]
)
def test_parts_refuse_a_folder_named(folder: Path, name: str) -> None:
    assert parts.collect(folder)  # the control
    (folder / "head.intent").rename(folder / name)
    with pytest.raises(
        ValueError, match=r"expected <kind>\.<name> with a kind of vectorizer, head, index, cold, ranker"
    ):
        parts.collect(folder)


@pytest.mark.parametrize("name", ["head.intent", "index.chitchat", "cold.phrases"])
def test_parts_refuse_a_part_without_canaries(folder: Path, name: str) -> None:
    (folder / name / canaries.FILE).unlink()
    with pytest.raises(ValueError, match=f"{name}: found no canaries.safetensors.*build the part again"):
        parts.part(folder / name)


def test_parts_refuse_unreadable_canaries(folder: Path) -> None:
    (folder / "head.intent" / canaries.FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match="canaries.safetensors: unreadable"):
        parts.part(folder / "head.intent")


def test_parts_refuse_a_vectorizer_without_its_model(folder: Path) -> None:
    (folder / "vectorizer.tiny" / "model.onnx").unlink()
    with pytest.raises(VectorizerRefused, match="no model.onnx"):
        parts.collect(folder)


def test_parts_refuse_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no parts"):
        parts.collect(tmp_path)
