"""The starter bundle's recipe: authored content and a vectorizer in, a complete bundle and its quality table out.

Read `build` from top to bottom; each step makes one part, on vectors of the one vectorizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators import fit, report
from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Span
from annotators.fit import About, TaggedEncoding
from annotators.fleet import Fleet
from annotators.head import GoldenTurn, Requires, Spec
from annotators.rules import RulesHead
from annotators.table import Head
from index.build import Entry
from index.build import build as build_index
from nlu import canaries, cold, parts, public_data, ranker
from nlu.content import Content, Example
from nlu.normalizer import normalize
from nlu.vectorizer import Vectorizer
from statics import version
from statics.bundle import Bundle
from statics.bundle import build as build_bundle

Progress = Callable[[str, int, int], None]

PERSONAS = ("calm", "lively")
SURFACES = ("speaker", "tv", "phone", "car")
_CHITCHAT_GROUPS = ("smalltalk", "assistant")
_COLD_GROUPS = (*_CHITCHAT_GROUPS, "control")

# GoEmotions' labels as the authored ones; the rest of its 28 have no counterpart and are left out.
_GOEMOTIONS = {
    "joy": "joy", "excitement": "joy", "amusement": "joy", "gratitude": "joy", "relief": "joy", "pride": "joy",
    "optimism": "joy", "admiration": "joy", "love": "affection", "caring": "affection", "surprise": "surprise",
    "sadness": "sadness", "grief": "sadness", "disappointment": "sadness", "remorse": "sadness", "anger": "anger",
    "annoyance": "anger", "fear": "fear", "nervousness": "fear", "disgust": "disgust", "neutral": "neutral",
}  # fmt: skip
_DAVIDSON = {"hate": "toxic", "offensive": "toxic", "neither": "acceptable"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the quality table."""

    head: str
    trained_on: str
    tested_on: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Starter:
    """What was built and how good it is on phrases held out of training."""

    bundle: Bundle
    table: tuple[Row, ...]


class Vectors:
    """Encodings of everything a recipe mentions, computed once. Keys are normalised phrases."""

    def __init__(self, vectorizer: Vectorizer, progress: Progress) -> None:
        self._vectorizer, self._progress = vectorizer, progress
        self._known: dict[str, Encoding] = {}

    def learn(self, what: str, phrases: Iterable[str]) -> None:
        """Encode what is not known yet, on all cores."""
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._known]
        encodings = self._vectorizer.encode_corpus(new, workers=os.cpu_count() or 1)
        for done, (phrase, encoding) in enumerate(zip(new, encodings, strict=True), 1):
            self._known[phrase] = encoding
            if done % 64 == 0 or done == len(new):
                self._progress(what, done, len(new))

    def __getitem__(self, phrase: str) -> Encoding:
        return self._known[phrase]

    def sentences(self, phrases: Iterable[str]) -> NDArray[np.float32]:
        """[phrases, dim]."""
        return np.stack([self._known[phrase].sentence for phrase in phrases])


def build(
    content: Content,
    vectorizer_folder: Path,
    out: Path,
    *,
    scratch: Path,
    data: Path | None,
    progress: Progress,
) -> Starter:
    """Make every part under `scratch` and the bundle at `out`. `data`, a folder of public datasets, adds heads trained on them."""
    vectorizer = Vectorizer(vectorizer_folder)
    vectors = Vectors(vectorizer, progress)
    vectors.learn("content", _all_phrases(content))
    shutil.rmtree(scratch, ignore_errors=True)

    heads, table = _authored_heads(content, vectors, vectorizer.fingerprint, progress)
    if data is not None:
        more, rows = _public_heads(content, vectors, vectorizer.fingerprint, data, heads)
        heads, table = [*heads, *more], [*table, *rows]

    shutil.copytree(vectorizer_folder, scratch / "vectorizer.sentence")
    for head in heads:
        head.save(scratch / f"head.{head.spec.name}")
    _make_index(content, vectors, scratch / "index.chitchat")
    _make_cold(content, vectors, vectorizer, scratch / "cold.phrases")
    for folder in scratch.iterdir():
        canaries.write(folder, vectorizer)
    (scratch / "vectorizer.sentence" / canaries.FILE).unlink()  # the vectorizer needs no proof of itself
    _make_ranker(scratch / "ranker.linear")

    bundle = build_bundle(
        parts.collect(scratch), out, channel="starter", seq=1, requires_service=_compatible_service()
    )
    return Starter(bundle, tuple(table))


def _all_phrases(content: Content) -> list[str]:
    """Everything to be encoded, normalised: what users say and what was said before."""
    examples = (
        *content.intents,
        *content.out_of_scope,
        *content.emotions,
        *content.toxicity,
        *content.contexts,
    )
    turns = [turn.text for example in examples for turn in example.context]
    return [normalize(text).text for text in (*content.phrases(), *turns)]


def _authored_heads(
    content: Content, vectors: Vectors, fingerprint: str, progress: Progress
) -> tuple[list[Head], list[Row]]:
    """Every authored head, fitted on the training split, and its row on the split held out."""

    def about(name: str, task: str) -> About:
        return About(name, task, fingerprint, made_by="starter content")

    moods = [example for example in content.emotions if example.label != "neutral"]
    scope = [
        *(_relabelled(e, "chitchat" if e.group in _CHITCHAT_GROUPS else "command") for e in content.intents),
        *(_relabelled(example, "chitchat") for example in moods),
        *content.out_of_scope,
    ]
    domains = [_relabelled(example, example.group) for example in content.intents]
    topics = _topics(content)
    # What no intent answers to: the thresholds of the intents are fitted against it.
    outsiders = vectors.sentences(_phrases(_training([*content.out_of_scope, *moods])))
    makers: list[Callable[[], Head]] = [
        lambda: _sentence(about("intent", "intent"), content.intents, vectors, outsiders=outsiders),
        lambda: _sentence(about("domain", "topic"), domains, vectors, outsiders=outsiders),
        lambda: _sentence(about("scope", "out-of-scope"), scope, vectors),
        lambda: _sentence(about("emotion", "emotion"), content.emotions, vectors),
        lambda: _sentence(about("toxicity", "toxicity"), content.toxicity, vectors),
        lambda: _context(about("followup", "intent in context"), content.contexts, vectors),
        lambda: fit.fit_token(about("slots", "slots"), _tagged(_training(content.intents), vectors)),
        lambda: _anchors(
            about("about_me", "what is asked about the assistant"), topics, vectors, outsiders=outsiders
        ),
        lambda: _quick_commands(about("quick", "exact commands and clock times")),
    ]
    heads: list[Head] = []
    for make in makers:
        heads.append(make())
        progress("fitting heads", len(heads), len(makers))
    fleet = Fleet(heads)
    tested: list[tuple[str, Sequence[Example]]] = [
        ("intent", content.intents),
        ("domain", domains),
        ("scope", scope),
        ("emotion", content.emotions),
        ("toxicity", content.toxicity),
        ("followup", content.contexts),
        ("about_me", topics),
    ]
    rows = [
        Row(name, "starter", "starter dev", _measure(fleet, name, _held_out(examples), vectors))
        for name, examples in tested
    ]
    rows.append(
        Row(
            "slots",
            "starter",
            "starter dev",
            _measure_spans(fleet, "slots", _tagged(_held_out(content.intents), vectors)),
        )
    )
    return heads, rows


def _public_heads(
    content: Content, vectors: Vectors, fingerprint: str, data: Path, authored: Sequence[Head]
) -> tuple[list[Head], list[Row]]:
    """Heads trained on public sets whose licences allow it, and both kinds of head on both kinds of test phrases."""
    heads: list[Head] = []
    rows: list[Row] = []
    for rival, folder, label_of, examples in (
        ("emotion", "goemotions", _GOEMOTIONS, content.emotions),
        ("toxicity", "davidson_hate_offensive", _DAVIDSON, content.toxicity),
    ):
        train, test = (_mapped(data / folder / f"{part}.tsv.gz", label_of) for part in ("train", "test"))
        vectors.learn(folder, [example.text for example in (*train, *test)])
        head = fit.fit_sentence(
            About(f"{rival}_public", rival, fingerprint, made_by=folder),
            _phrases(train),
            vectors.sentences(_phrases(train)),
            [example.label for example in train],
            regularisations=(4.0,),
        )
        heads.append(head)
        both = Fleet([*authored, head])
        for name, source in ((rival, "starter"), (head.spec.name, folder)):
            rows.append(Row(name, source, "starter dev", _measure(both, name, _held_out(examples), vectors)))
            rows.append(Row(name, source, f"{folder} test", _measure(both, name, test, vectors)))
    for name, task, folder in (("slots_public", "slots", "snips"), ("entities_public", "entities", "wnut17")):
        train_spans, test_spans = (
            list(public_data.tagged(data / folder / f"{part}.jsonl.gz")) for part in ("train", "test")
        )
        vectors.learn(folder, [row.phrase for row in (*train_spans, *test_spans)])
        tagged = [_tagged_row(row, vectors) for row in train_spans]
        token_head = fit.fit_token(About(name, task, fingerprint, made_by=folder), tagged)
        heads.append(token_head)
        measured = _measure_spans(
            Fleet([token_head]), name, [_tagged_row(row, vectors) for row in test_spans]
        )
        rows.append(Row(name, folder, f"{folder} test", measured))
    return heads, rows


def _sentence(
    about: About,
    examples: Sequence[Example],
    vectors: Vectors,
    *,
    outsiders: NDArray[np.float32] | None = None,
) -> Head:
    train = _training(examples)
    rows = vectors.sentences(_phrases(train))
    return fit.fit_sentence(about, _phrases(train), rows, [e.label for e in train], outsiders=outsiders)


def _context(about: About, examples: Sequence[Example], vectors: Vectors) -> Head:
    train = _training(examples)
    return fit.fit_context(
        about,
        _phrases(train),
        [vectors[phrase] for phrase in _phrases(train)],
        [_heard_turns(example, vectors) for example in train],
        [[GoldenTurn(role=turn.role, text=turn.text) for turn in example.context] for example in train],
        [example.label for example in train],
    )


def _anchors(
    about: About, examples: Sequence[Example], vectors: Vectors, *, outsiders: NDArray[np.float32]
) -> Head:
    train = _training(examples)
    rows = vectors.sentences(_phrases(train))
    # As many strangers as anchors: how often a stranger comes is not for the calibration to guess.
    outsiders = outsiders[:: max(1, len(outsiders) // len(rows))]
    return fit.make_anchors(about, _phrases(train), rows, [e.label for e in train], outsiders=outsiders)


def _quick_commands(about: About) -> Head:
    """What must work without a model: the bare commands, and clock times written in digits."""
    rules: list[dict[str, Any]] = [
        {
            "label": "stop",
            "phrases": ["stop", "stop it", "stop that", "enough", "quiet", "shut up", "be quiet"],
        },
        {"label": "yes", "phrases": ["yes", "yeah", "yep", "yup", "sure", "ok", "okay", "да", "ага"]},
        {"label": "no", "phrases": ["no", "nope", "nah", "no thanks", "no thank you", "нет", "не надо"]},
        {"label": "louder", "phrases": ["louder", "volume up", "turn it up", "громче"]},
        {"label": "quieter", "phrases": ["quieter", "volume down", "turn it down", "тише"]},
        {
            "label": "clock",
            "pattern": r"\b(?:[01]?\d|2[0-3])[:.][0-5]\d(?: ?[ap]\.?m\b)?|\b(?:1[0-2]|[1-9]) ?[ap]\.?m\b",
        },
    ]
    labels = tuple(str(rule["label"]) for rule in rules)
    ones = (1.0,) * len(labels)
    spec = Spec(
        name=about.name, kind="rules", task=about.task, labels=labels, scale=ones, shift=(0.0,) * len(labels), thresholds=ones,
        requires=Requires(vectorizer=about.fingerprint), params={"rules": rules}, made_by=about.made_by,
    )  # fmt: skip
    return RulesHead(spec)


def _make_index(content: Content, vectors: Vectors, folder: Path) -> None:
    entries, prompts = [], []
    for reply in content.replies:
        for prompt in reply.prompts:
            entries.append(
                Entry(
                    id=reply.id,
                    text=reply.text,
                    prompt=prompt,
                    personas=(reply.persona,) if reply.persona else (),
                    surfaces=(reply.surface,) if reply.surface else (),
                    valid_from=reply.valid_from,
                    valid_until=reply.valid_until,
                    emotion=reply.emotion,
                    tags=(reply.topic,),
                )
            )
            prompts.append(normalize(prompt).text)
    build_index(entries, vectors.sentences(prompts), folder, personas=PERSONAS, surfaces=SURFACES)


def _make_cold(content: Content, vectors: Vectors, vectorizer: Vectorizer, folder: Path) -> None:
    """The phrases every user says: small talk, control words, and what the replies are looked up by."""
    common = [example.text for example in content.intents if example.group in _COLD_GROUPS]
    prompts = [prompt for reply in content.replies for prompt in reply.prompts]
    phrases = dict.fromkeys(normalize(text).text for text in (*common, *prompts))
    cold.write(
        folder,
        ((phrase, vectors[phrase]) for phrase in phrases),
        fingerprint=vectorizer.fingerprint,
        dim=vectorizer.dim,
        token_dim=vectorizer.token_dim,
    )


def _make_ranker(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ranker.FILE).write_text(
        json.dumps({"weights": ranker.DEFAULT_WEIGHTS}, indent=1, sort_keys=True) + "\n"
    )


def _topics(content: Content) -> list[Example]:
    """What people ask the assistant about itself, by the prompts of the persona's replies."""
    asked = [reply for reply in content.replies if reply.group == "persona"]
    prompts = {(prompt, reply.topic): None for reply in asked for prompt in reply.prompts}
    return [Example(prompt, topic, "topic") for prompt, topic in prompts]


def _relabelled(example: Example, label: str) -> Example:
    return Example(example.text, label, example.group, example.slots, example.context)


def _training(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if not example.held_out]


def _held_out(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.held_out]


def _phrases(examples: Iterable[Example]) -> list[str]:
    return [normalize(example.text).text for example in examples]


def _mapped(path: Path, label_of: Mapping[str, str]) -> list[Example]:
    """Rows with one label that has a counterpart; a label twice removed is a guess, not data."""
    rows = (row for row in public_data.labelled(path) if len(row.labels) == 1 and row.labels[0] in label_of)
    return [Example(row.phrase, label_of[row.labels[0]]) for row in rows]


def _heard_turns(example: Example, vectors: Vectors) -> list[HeardTurn]:
    return [HeardTurn(turn.role, vectors[normalize(turn.text).text]) for turn in example.context]


def _tagged(examples: Iterable[Example], vectors: Vectors) -> list[TaggedEncoding]:
    """Authored phrases are already in normal form but for case; their slots keep their offsets."""
    return [
        TaggedEncoding(
            phrase, vectors[phrase], tuple(Span(s.label, s.start, s.end, 1.0) for s in example.slots)
        )
        for example in examples
        for phrase in (normalize(example.text).text,)
    ]


def _tagged_row(row: public_data.Tagged, vectors: Vectors) -> TaggedEncoding:
    return TaggedEncoding(row.phrase, vectors[row.phrase], tuple(Span(*span, 1.0) for span in row.spans))


def _measure(fleet: Fleet, name: str, examples: Sequence[Example], vectors: Vectors) -> Mapping[str, float]:
    answers: list[Annotation] = []
    for example, phrase in zip(examples, _phrases(examples), strict=True):
        heard = Heard.alone(phrase, vectors[phrase], _heard_turns(example, vectors))
        answers += fleet.annotate(heard, wanted=frozenset({name}))
    gold = [example.label for example in examples]
    measured = report.classification([answer.labels for answer in answers], gold)
    labels = sorted(set(gold))
    if len(labels) == 2 or "out_of_scope" in labels:
        told = (
            "out_of_scope" if "out_of_scope" in labels else labels[-1]
        )  # the label worth telling from the rest
        scores = [next(label.score for label in answer.labels if label.label == told) for answer in answers]
        measured["auroc"] = report.auroc(np.array(scores), np.array([label == told for label in gold]))
    return measured


def _measure_spans(fleet: Fleet, name: str, phrases: Sequence[TaggedEncoding]) -> Mapping[str, float]:
    found = [
        {
            (s.label, s.start, s.end)
            for s in fleet.annotate(Heard.alone(p.text, p.encoding), wanted=frozenset({name}))[0].spans
        }
        for p in phrases
    ]
    return report.spans(found, [{(s.label, s.start, s.end) for s in phrase.spans} for phrase in phrases])


def _compatible_service() -> str:
    major, minor = version.service_version().split(".")[:2]
    return f">={major}.{minor}.0.dev0,<{int(major) + 1}"
