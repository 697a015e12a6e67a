"""The starter's recipe, on a slice of the shipped content and the tiny vectorizer: whole, loadable, measured."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from annotators.annotator import Heard
from annotators.fit import About
from annotators.restore import spoken
from index.replies import Hit, Replies
from nlu import content, loading, starter
from nlu.content import Content, Example
from nlu.normalizer import normalize
from nlu.starter import Starter
from nlu.vectorizer import Vectorizer
from statics.verify import verify
from tests.tiny import CREATED, make_vectorizer

ROUTES = """
[[route]]
name = "promotion"
to = "promotion"
when.reply.tag = ["promotion"]

[[route]]
name = "talk"
to = "chitchat"
when.head.scope.label = ["chitchat"]

[[route]]
name = "rest"
to = "skill"
"""


def few(examples: Sequence[Example], labels: int, each: int) -> tuple[Example, ...]:
    """The first phrases of the first labels."""
    names = list(dict.fromkeys(example.label for example in examples))[:labels]
    return tuple(e for name in names for e in [x for x in examples if x.label == name][:each])


@pytest.fixture(scope="module")
def slice_of_content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Enough of everything to fit something on it."""
    routes = tmp_path_factory.mktemp("content") / "routes.toml"
    routes.write_text(ROUTES, encoding="utf-8")
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
        routes=routes,
    )


Steps = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def plain(slice_of_content: Content, tmp_path_factory: pytest.TempPathFactory) -> tuple[Starter, Steps]:
    """Built from the authored content alone, and the progress that was told."""
    folder = tmp_path_factory.mktemp("plain")
    steps: Steps = []
    built = starter.build(
        slice_of_content, make_vectorizer(folder / "vectorizer"), folder / "bundle", data=None,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    return built, steps


@pytest.fixture(scope="module")
def public(slice_of_content: Content, tmp_path_factory: pytest.TempPathFactory) -> tuple[Starter, Path]:
    """Built with public sets too, and the folder in which the inputs lie."""
    folder = tmp_path_factory.mktemp("public")
    _write_public(folder / "data")
    make_vectorizer(folder / "vectorizer")
    return _with_public(slice_of_content, folder, "bundle", CREATED), folder


def test_starter_builds_a_bundle_that_loads_and_says_how_good_it_is(plain: tuple[Starter, Steps]) -> None:
    built, steps = plain
    engine = loading.load(verify(built.bundle.path, service="0.1.0"))
    assert set(engine.fleet.names) == {
        "intent", "domain", "scope", "emotion", "toxicity", "followup", "slots", "about_me", "quick",
    }  # fmt: skip
    assert set(engine.fleet.heads["scope"].spec.labels) == {"chitchat", "command", "out_of_scope"}
    assert engine.replies is not None and engine.replies.personas == starter.PERSONAS
    assert engine.cold is not None and len(engine.cold) > 0
    assert {row.head for row in built.table} == {*engine.fleet.names, "routes"} - {"quick"}
    assert all(row.metrics["phrases"] > 0 for row in built.table)
    assert ("fitting heads", 9, 9) in steps
    phrase = "louder"
    quick = engine.fleet.annotate(
        Heard.alone(phrase, engine.vectorizer.encode([phrase])[0]), wanted=frozenset({"quick"})
    )
    assert quick[0].labels[0].label == "louder"


def test_starter_replies_carry_vectors_of_their_texts_and_what_heads_say(
    plain: tuple[Starter, Steps],
) -> None:
    engine = loading.load(plain[0].bundle)
    assert isinstance(engine.replies, Replies)
    items = [engine.replies.items.reply(row) for row in range(0, len(engine.replies), 17)]
    said = engine.replies.said([Hit(item, 1.0, row * 17) for row, item in enumerate(items)])
    for item, vector in zip(items, said, strict=True):
        phrase = normalize(item.text).text
        own = engine.vectorizer.encode([phrase])[0]
        assert vector @ own.sentence > 0.999
        best = {
            answer.name: answer.labels[0]
            for answer in engine.fleet.annotate(Heard.alone(phrase, own))
            if answer.labels
        }
        for head in ("emotion", "toxicity"):
            stored = next(judged for judged in item.labels if judged.head == head)
            assert stored.score == pytest.approx(best[head].score, abs=1e-2)  # heads are stored in float16


def test_starter_measures_its_routes_on_what_is_held_out(
    slice_of_content: Content, plain: tuple[Starter, Steps]
) -> None:
    """Against a twin of this table, which goes by the scope alone."""
    engine = loading.load(plain[0].bundle)
    assert engine.routes is not None and [rule.to for rule in engine.routes.rules] == [
        "promotion",
        "chitchat",
        "skill",
    ]
    given = slice_of_content
    led = [
        (e.text, {"smalltalk": "chitchat", "assistant": "persona"}.get(e.group, "skill"), e)
        for e in given.intents
    ]
    led += [(e.text, "chitchat", e) for e in given.emotions if e.label != "neutral"]
    led += [(e.text, "out_of_scope", e) for e in given.out_of_scope]
    prompts = dict.fromkeys((p, r.topic) for r in given.replies if r.group == "persona" for p in r.prompts)
    led += [(prompt, "persona", Example(prompt, topic)) for prompt, topic in prompts]
    asked = [(text.lower(), to) for text, to, example in led if example.held_out]
    right = 0
    for (text, to), encoding in zip(
        asked, engine.vectorizer.encode([text for text, _ in asked]), strict=True
    ):
        scope = engine.fleet.annotate(Heard.alone(text, encoding), wanted=frozenset({"scope"}))[0].labels[0]
        right += to == ("chitchat" if scope.accepted and scope.label == "chitchat" else "skill")
    [row] = [row for row in plain[0].table if row.head == "routes"]
    assert row.metrics == {"accuracy": right / len(asked), "phrases": len(asked)}
    assert 0 < right < len(asked)


def test_starter_keeps_held_out_phrases_out_of_training(
    slice_of_content: Content, plain: tuple[Starter, Steps]
) -> None:
    """What was held out appears in no anchor and no golden phrase of any head."""
    engine = loading.load(plain[0].bundle)
    held_out = {example.text for example in slice_of_content.intents if example.held_out}
    golden = {golden.text for golden in engine.fleet.heads["intent"].spec.golden}
    assert held_out and golden
    assert not held_out & golden


def test_starter_learns_from_public_data_and_keeps_none_of_it(public: tuple[Starter, Path]) -> None:
    """On made-up files in the public sets' formats; no sentence of those sets is here."""
    built, folder = public
    rows = {(row.head, row.tested_on) for row in built.table}
    assert rows >= {
        ("emotion", "starter dev"), ("emotion", "goemotions/test"), ("emotion_reddit", "starter dev"),
        ("emotion_reddit", "goemotions/test"), ("toxicity", "davidson_hate_offensive/test"),
        ("dialog_act", "sgd/user_test"), ("slots_services", "snips/test"), ("slots_services", "sgd/user_test"),
        ("entities", "starter dev"), ("entities", "wnut17/test"), ("entities", "btc_ner/f"),
        ("punctuation", "self_dialogue/test"),
    }  # fmt: skip
    fleet = loading.load(built.bundle).fleet
    assert set(fleet.heads["dialog_act"].spec.labels) == {"want", "agree", "leave"}
    assert set(fleet.heads["slots_services"].spec.labels) == {"artist", "when"}
    assert set(fleet.heads["entities"].spec.labels) == {"person", "place", "organisation"}
    assert {"Aa", "?", "."} <= set(fleet.heads["punctuation"].spec.labels)
    for row in (row for row in built.table if row.head != "routes"):
        reported = fleet.heads[row.head].spec.metrics
        assert reported[f"{row.tested_on}: phrases"] == row.metrics["phrases"]
    held = [path.read_bytes() for path in built.bundle.path.rglob("*") if path.is_file()]
    texts = _write_public(folder / "data")
    assert not [text for text in texts if any(text.encode() in file for file in held)]
    ours = fleet.heads["intent"].spec.golden
    assert any(ours[0].text.encode() in file for file in held), "the control: golden phrases would be found"


def test_starter_repeats_itself_to_the_byte(slice_of_content: Content, public: tuple[Starter, Path]) -> None:
    built, folder = public
    later = _with_public(slice_of_content, folder, "later", CREATED + timedelta(days=1))
    assert later.bundle.manifest.components == built.bundle.manifest.components
    assert later.bundle.digest != built.bundle.digest, "the manifest tells when"
    assert later.table == built.table


def test_starter_borrows_rows_only_while_they_cost_nothing(slice_of_content: Content, tmp_path: Path) -> None:
    """Rows that repeat our own phrases cost nothing, rows that contradict them are not taken."""
    vectors = starter.Vectors(Vectorizer(make_vectorizer(tmp_path / "vectorizer")), lambda *step: None)
    ours = slice_of_content.toxicity
    vectors.learn("ours", [example.text for example in ours])
    flip = {"toxic": "acceptable", "acceptable": "toxic"}
    about = About("toxicity", "toxicity", "0" * 64, made_by="ours")
    train = [example for example in ours if not example.held_out]
    alone = starter._borrowing(about, ours, None, vectors)
    kind = starter._borrowing(about, ours, starter._Lent("kind", train, ()), vectors)
    contrary = [replace(example, label=flip[example.label]) for example in train]
    cruel = starter._borrowing(about, ours, starter._Lent("cruel", contrary, ()), vectors)
    assert "borrowed" in kind.spec.metrics and kind.spec.made_by == "ours, kind (400 a label)"
    assert cruel.spec == alone.spec and cruel.spec.made_by == "ours"


def _with_public(content: Content, folder: Path, name: str, created: datetime) -> Starter:
    return starter.build(
        content, folder / "vectorizer", folder / name, data=folder / "data", created=created, progress=lambda *step: None
    )  # fmt: skip


def _write_public(root: Path) -> list[str]:
    """Made-up sets; returns their texts in normal form."""
    moods = [
        ("what a grand day", "joy"),
        ("leave me be", "anger"),
        ("it rains", "neutral"),
        ("so gloomy", "sadness"),
    ]
    rude = [("you fool", "offensive"), ("off with you", "hate"), ("nice to see you", "neither")]
    texts = []
    for folder, rows in (("goemotions", moods), ("davidson_hate_offensive", rude)):
        for part in ("train", "test"):
            lines = [f"{text} {number}\t{label}" for text, label in rows for number in range(9)]
            texts += [line.split("\t")[0] for line in lines]
            _gzip(root / folder / f"{part}.tsv.gz", lines)
    names = ("anna", "boris", "clara", "dmitri", "elena", "frank")
    for file, who, what in (
        ("snips/train", "artist", "timeRange"), ("snips/test", "artist", "timeRange"),
        ("wnut17/train", "person", "group"), ("wnut17/test", "person", "group"),
        *((f"btc_ner/{section}", "PER", "ORG") for section in "abegf"),
    ):  # fmt: skip
        tagged = [
            {"tokens": ["meet", name, "at", "noon"], "tags": ["O", f"B-{who}", "O", f"B-{what}"]}
            for name in names
        ]
        _gzip(root / f"{file}.jsonl.gz", [json.dumps(row) for row in tagged])
    texts += [f"meet {name} at noon" for name in names]
    said = [
        ("i want a ride", ["INFORM", "INFORM_INTENT"]),
        ("sounds good", ["AFFIRM"]),
        ("so long", ["GOODBYE", "THANK_YOU"]),
    ]
    for part in ("train", "test"):
        turns = [
            {"text": f"{text} {n}", "acts": acts, "tokens": [*text.split(), str(n)], "tags": ["O"] * (len(text.split()) + 1)}
            for text, acts in said
            for n in range(9)
        ]  # fmt: skip
        turns.append(
            {"text": "yes which one", "acts": ["AFFIRM", "REQUEST"], "tokens": ["yes"], "tags": ["O"]}
        )
        _gzip(root / "sgd" / f"user_{part}.jsonl.gz", [json.dumps(turn) for turn in turns])
        texts += [str(turn["text"]) for turn in turns]
        talk = [f"Is {name.title()} in? I called {name.title()} twice." for name in names]
        dialogs = [{"id": str(n), "turns": [{"speaker": "A", "text": text}]} for n, text in enumerate(talk)]
        _gzip(root / "self_dialogue" / f"{part}.jsonl.gz", [json.dumps(dialog) for dialog in dialogs])
        texts += [spoken(text)[0] for text in talk]
    return texts


def _gzip(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
