"""The starter's recipe, on a slice of the shipped content and the tiny vectorizer: whole, loadable, measured."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from annotators.annotator import Heard
from nlu import content, loading, starter
from nlu.content import Content, Example
from statics.verify import verify
from tests.tiny import make_vectorizer


def few(examples: Sequence[Example], labels: int, each: int) -> tuple[Example, ...]:
    """The first phrases of the first labels."""
    names = list(dict.fromkeys(example.label for example in examples))[:labels]
    return tuple(e for name in names for e in [x for x in examples if x.label == name][:each])


@pytest.fixture(scope="module")
def slice_of_content() -> Content:
    """Enough of everything to fit something on it."""
    whole = content.load()
    talk = [example for example in whole.intents if example.group in ("smalltalk", "assistant")]
    persona = [reply for reply in whole.replies if reply.group == "persona"][:40]
    promotions = [reply for reply in whole.replies if reply.topic == "promotion"][:2]
    return Content(
        intents=few(whole.intents, 3, 24) + few(talk, 2, 24),
        out_of_scope=whole.out_of_scope[:30],
        emotions=few(whole.emotions, 9, 16),
        toxicity=few(whole.toxicity, 2, 24),
        contexts=few(whole.contexts, 3, 20),
        replies=(*persona, *promotions),
    )


def test_starter_builds_a_bundle_that_loads_and_says_how_good_it_is(
    slice_of_content: Content, tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    built = starter.build(
        slice_of_content, make_vectorizer(tmp_path / "vectorizer"), tmp_path / "bundle", scratch=tmp_path / "scratch",
        data=None, progress=lambda *step: steps.append(step),
    )  # fmt: skip
    engine = loading.load(verify(tmp_path / "bundle", service="0.1.0"))
    assert set(engine.fleet.names) == {
        "intent", "domain", "scope", "emotion", "toxicity", "followup", "slots", "about_me", "quick",
    }  # fmt: skip
    assert set(engine.fleet.heads["scope"].spec.labels) == {"chitchat", "command", "out_of_scope"}
    assert engine.replies is not None and engine.replies.personas == starter.PERSONAS
    assert engine.cold is not None and len(engine.cold) > 0
    assert {row.head for row in built.table} == set(engine.fleet.names) - {"quick"}
    assert all(row.metrics["phrases"] > 0 for row in built.table)
    assert ("fitting heads", 9, 9) in steps
    phrase = "louder"
    quick = engine.fleet.annotate(
        Heard.alone(phrase, engine.vectorizer.encode([phrase])[0]), wanted=frozenset({"quick"})
    )
    assert quick[0].labels[0].label == "louder"


def test_starter_keeps_held_out_phrases_out_of_training(slice_of_content: Content, tmp_path: Path) -> None:
    """What was held out appears in no anchor and no golden phrase of any head."""
    built = starter.build(
        slice_of_content, make_vectorizer(tmp_path / "vectorizer"), tmp_path / "bundle", scratch=tmp_path / "scratch",
        data=None, progress=lambda *step: None,
    )  # fmt: skip
    engine = loading.load(built.bundle)
    held_out = {example.text for example in slice_of_content.intents if example.held_out}
    golden = {golden.text for golden in engine.fleet.heads["intent"].spec.golden}
    assert held_out and golden
    assert not held_out & golden


def test_starter_with_public_data_trains_and_compares_both(slice_of_content: Content, tmp_path: Path) -> None:
    """On made-up files in the public sets' formats; no sentence of those sets is here."""
    _write_public(tmp_path / "data")
    built = starter.build(
        replace(slice_of_content), make_vectorizer(tmp_path / "vectorizer"), tmp_path / "bundle",
        scratch=tmp_path / "scratch", data=tmp_path / "data", progress=lambda *step: None,
    )  # fmt: skip
    rows = {(row.head, row.tested_on) for row in built.table}
    for head in ("emotion", "emotion_public"):
        assert {(head, "starter dev"), (head, "goemotions test")} <= rows
    assert ("slots_public", "snips test") in rows and ("entities_public", "wnut17 test") in rows
    assert {"emotion_public", "toxicity_public", "slots_public", "entities_public"} <= set(
        loading.load(built.bundle).fleet.names
    )


def _write_public(root: Path) -> None:
    moods = [
        ("what a grand day", "joy"),
        ("leave me be", "anger"),
        ("it rains", "neutral"),
        ("so gloomy", "sadness"),
    ]
    rude = [("you fool", "offensive"), ("off with you", "hate"), ("nice to see you", "neither")]
    for folder, rows in (("goemotions", moods), ("davidson_hate_offensive", rude)):
        for part in ("train", "test"):
            lines = [f"{text} {number}\t{label}" for text, label in rows for number in range(9)]
            _gzip(root / folder / f"{part}.tsv.gz", lines)
    for folder in ("snips", "wnut17"):
        tagged = [
            {"tokens": ["meet", name, "at", "noon"], "tags": ["O", "B-person", "O", "B-time"]}
            for name in ("anna", "boris", "clara", "dmitri", "elena", "frank")
        ]
        for part in ("train", "test"):
            _gzip(root / folder / f"{part}.jsonl.gz", [json.dumps(row) for row in tagged])


def _gzip(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
