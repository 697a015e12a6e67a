"""The starter bundle's recipe: authored content, public sets and a vectorizer in, a complete bundle and its quality table out.

Read `build` from top to bottom; each step makes one part, on vectors of the one vectorizer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from annotators import fit, report
from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Span
from annotators.answers import Answers
from annotators.fit import About, Borrowed
from annotators.fit_anchors import make_anchors
from annotators.fit_token import TaggedEncoding, by_token, fit_token
from annotators.fleet import Fleet
from annotators.head import Golden, GoldenTurn, Requires, Spec
from annotators.restore import spoken
from annotators.rules import RulesHead
from annotators.sentence import SentenceHead
from annotators.table import Head
from index.build import Entry
from index.build import build as build_index
from nlu import canaries, cold, parts, public_data
from nlu.content import Content, Example
from nlu.normalizer import normalize
from nlu.ranker import Ranker
from nlu.retrieval.judge import Judge
from nlu.routes import FILE as ROUTES_FILE
from nlu.routes import Facts, Routes
from nlu.vectorizer import Vectorizer
from statics import version
from statics.bundle import Bundle
from statics.bundle import build as build_bundle

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

PERSONAS = ("calm", "lively")
SURFACES = ("speaker", "tv", "phone", "car")
_CHITCHAT_GROUPS = ("smalltalk", "assistant")
_LEADS_TO = {"smalltalk": "chitchat", "assistant": "persona"}  # groups of intents; all others to a skill
_COLD_GROUPS = (*_CHITCHAT_GROUPS, "control")

# GoEmotions' labels as the authored ones; the rest of its 28 have no counterpart and are left out.
_GOEMOTIONS = {
    "joy": "joy", "excitement": "joy", "amusement": "joy", "gratitude": "joy", "relief": "joy", "pride": "joy",
    "optimism": "joy", "admiration": "joy", "love": "affection", "caring": "affection", "surprise": "surprise",
    "sadness": "sadness", "grief": "sadness", "disappointment": "sadness", "remorse": "sadness", "anger": "anger",
    "annoyance": "anger", "fear": "fear", "nervousness": "fear", "disgust": "disgust", "neutral": "neutral",
}  # fmt: skip
_DAVIDSON = {"hate": "toxic", "offensive": "toxic", "neither": "acceptable"}
# Authored heads that borrow rows: folder of the set, and its labels as the authored ones.
_LENDERS = {"toxicity": ("davidson_hate_offensive", _DAVIDSON)}
_SHARES = (25, 50, 100, 200, 400)  # borrowed rows a label
_TOLERANCE = 0.01  # of accuracy on our own phrases, for the sake of borrowed ones

# SGD's acts of a user's turn, as one label. Text alone cannot tell yes to an offer from yes to a question.
_ACTS = {
    "inform": "inform", "inform_intent": "want", "request": "ask", "request_alts": "ask_others", "select": "choose",
    "affirm": "agree", "affirm_intent": "agree", "negate": "refuse", "negate_intent": "refuse", "thank_you": "thank",
    "goodbye": "leave",
}  # fmt: skip
_ASIDE = ("inform", "thank")  # said in passing beside another act, which then is what the turn does

_PLACES = (
    "area city city_of_event country current_location destination destination_city from_location geographic_poi location "
    "origin origin_city pickup_city pickup_location poi state to_location where_to"
)
_TIMES = (
    "appointment_date appointment_time check_in_date check_out_date date departure_date departure_time dropoff_date event_date "
    "event_time inbound_departure_time leaving_date leaving_time outbound_departure_time pickup_date pickup_time return_date "
    "show_date time timerange visit_date"
)
_VENUES = "event_location hotel_name location_name restaurant_name theater_name"
_TITLES = "movie_name object_name title"
# SNIPS' and SGD's slots by what they hold; slots of neither a name nor a value, such as `object_type`, are left out.
_SERVICE_SLOTS = {
    **dict.fromkeys(_PLACES.split(), "place"), **dict.fromkeys(_TIMES.split(), "when"),
    **dict.fromkeys(_VENUES.split(), "venue"), **dict.fromkeys(_TITLES.split(), "title"),
    "album": "album", "artist": "artist", "track": "song", "song_name": "song", "playlist": "playlist", "genre": "genre",
    "cuisine": "cuisine", "served_dish": "dish", "event_name": "event", "party_size_number": "amount",
    "rating_value": "rating", "condition_description": "weather", "condition_temperature": "weather",
}  # fmt: skip
# WNUT-17's and the Broad Twitter Corpus' entities; products and works are too few to learn from.
_ENTITIES = {
    "person": "person", "location": "place", "corporation": "organisation", "group": "organisation",
    "per": "person", "loc": "place", "org": "organisation", "place": "place",
}  # fmt: skip
_NAMES = ("person", "place")  # authored slots that are entities too
_MOOD_ROWS = 800  # of GoEmotions a label
_TRAIN_ROWS, _TEST_ROWS = 6000, 2000  # of a public set, at most: the recipe is to take minutes

_TURNS, _LONGEST = 4, 160  # of each dialog, so that many speak; code points

_OURS = "starter content"
_SURE, _WITNESSES = 0.8, 3  # score of a golden answer; golden phrases a label


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

    def learn(self, what: str, phrases: Iterable[str], *, tokens: bool = True) -> None:
        """Encode what is not known yet, on all cores."""
        new = [phrase for phrase in dict.fromkeys(phrases) if not self._knows(phrase, tokens)]
        encodings = self._vectorizer.encode_corpus(new, tokens=tokens, workers=os.cpu_count() or 1)
        for done, (phrase, encoding) in enumerate(zip(new, encodings, strict=True), 1):
            self._known[phrase] = encoding
            if done % 64 == 0 or done == len(new):
                self._progress(what, done, len(new))

    def _knows(self, phrase: str, tokens: bool) -> bool:
        known = self._known.get(phrase)
        return known is not None and not (tokens and known.tokens is None)

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
    data: Path | None,
    created: datetime | None = None,
    progress: Progress,
) -> Starter:
    """Make every part, and of them the bundle at `out`. `data`, a folder of public datasets, adds what is learnt from them.

    With `created` given, the same inputs give the same bundle, bit for bit, on one machine.
    """
    vectorizer = Vectorizer(vectorizer_folder)
    vectors = Vectors(vectorizer, progress)
    vectors.learn("content", _all_phrases(content))

    lent = {} if data is None else _lent(data, vectors)
    heads, table = _authored_heads(content, lent, vectors, vectorizer.fingerprint, progress)
    if data is not None:
        more, rows = _public_heads(content, vectors, vectorizer.fingerprint, data, heads)
        heads, table = [*heads, *more], [*table, *rows]

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for head in heads:
            _reported(head, table).save(scratch / f"head.{head.spec.name}")
        judge = Judge(heads, vectorizer.fingerprint)
        _make_index(content, judge, vectors, scratch / "index.chitchat")
        _make_cold(content, vectors, vectorizer, scratch / "cold.phrases")
        for part in scratch.iterdir():
            canaries.write(part, vectorizer)
        Ranker.linear().save(scratch / "ranker.linear")
        if content.routes is not None:
            table.append(_make_routes(content, content.routes, heads, vectors, scratch / "routes.main"))
        shutil.copytree(vectorizer_folder, scratch / "vectorizer.sentence")
        bundle = build_bundle(
            parts.collect(scratch),
            out,
            channel="starter",
            seq=1,
            created=created,
            requires_service=_compatible_service(),
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


@dataclass(frozen=True, slots=True)
class _Lent:
    """Rows of a public set in the labels of an authored head."""

    source: str
    train: Sequence[Example]
    test: Sequence[Example]


def _lent(data: Path, vectors: Vectors) -> dict[str, _Lent]:
    """What public sets lend to authored heads, encoded."""
    lent = {}
    for name, (folder, label_of) in _LENDERS.items():
        train, test = (_mapped(data / folder / f"{part}.tsv.gz", label_of) for part in ("train", "test"))
        lent[name] = _Lent(folder, _at_most(_SHARES[-1], train), _few(test, _TEST_ROWS))
        used = (*lent[name].train, *lent[name].test)
        vectors.learn(folder, [example.text for example in used], tokens=False)
    return lent


def _authored_heads(
    content: Content, lent: Mapping[str, _Lent], vectors: Vectors, fingerprint: str, progress: Progress
) -> tuple[list[Head], list[Row]]:
    """Every authored head, fitted on the training split, and its row on the split held out."""

    def about(name: str, task: str) -> About:
        return About(name, task, fingerprint, made_by=_OURS)

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
        lambda: _sentence(
            about("intent", "intent"), content.intents, vectors, outsiders=outsiders, outside=True
        ),
        lambda: _sentence(about("domain", "topic"), domains, vectors, outsiders=outsiders),
        lambda: _sentence(about("scope", "out-of-scope"), scope, vectors),
        lambda: _sentence(about("emotion", "emotion"), content.emotions, vectors),
        lambda: _borrowing(about("toxicity", "toxicity"), content.toxicity, lent.get("toxicity"), vectors),
        lambda: _context(about("followup", "intent in context"), content.contexts, vectors),
        lambda: fit_token(about("slots", "slots"), _tagged(_training(content.intents), vectors)).head,
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
    rows = []
    for name, examples in tested:
        trained_on, source = heads[fleet.names.index(name)].spec.made_by, lent.get(name)
        rows.append(Row(name, trained_on, "starter dev", _measure(fleet, name, _held_out(examples), vectors)))
        if source is not None:
            test = f"{source.source}/test"
            rows.append(Row(name, trained_on, test, _measure(fleet, name, source.test, vectors)))
    rows.append(
        Row(
            "slots",
            _OURS,
            "starter dev",
            _measure_spans(fleet, "slots", _tagged(_held_out(content.intents), vectors)),
        )
    )
    return heads, rows


def _borrowing(about: About, examples: Sequence[Example], lent: _Lent | None, vectors: Vectors) -> Head:
    """An authored head that also learns from as many borrowed rows as cost it no accuracy on our own phrases.

    Judged on folds of the training split; what is held out for the table is not looked at.
    """
    alone = _sentence(about, examples, vectors)
    if lent is None:
        return alone
    best, floor = alone, alone.spec.metrics["folds_accuracy"] - _TOLERANCE
    for share in _SHARES:
        rows = _at_most(share, lent.train)
        borrowed = Borrowed(vectors.sentences(_phrases(rows)), [row.label for row in rows])
        joint = replace(about, made_by=f"{about.made_by}, {lent.source} ({share} a label)")
        head = _sentence(joint, examples, vectors, borrowed=borrowed)
        if head.spec.metrics["folds_accuracy"] < floor:
            break
        best = head
    return best


def _public_heads(
    content: Content, vectors: Vectors, fingerprint: str, data: Path, heads: Sequence[Head]
) -> tuple[list[Head], list[Row]]:
    """Heads of their own on public sets whose licences allow it; `heads` are the authored ones."""
    moods, mood_rows = _emotion_reddit(content, fingerprint, data / "goemotions", vectors, heads)
    acts, act_rows = _dialog_act(fingerprint, data / "sgd", vectors)
    services, service_rows = _span_head(
        About("slots_services", "slots of services", fingerprint, made_by="snips, sgd"),
        [*_spans(data, "snips/train"), *_spans(data, "sgd/user_train")],
        {name: _spans(data, name, _TEST_ROWS) for name in ("snips/test", "sgd/user_test")},
        _SERVICE_SLOTS,
        vectors,
    )
    tweets = [row for section in "abeg" for row in _spans(data, f"btc_ner/{section}")]
    entities, entity_rows = _span_head(
        About("entities", "entities", fingerprint, made_by=f"{_OURS}, wnut17, btc_ner"),
        [*_named(_training(content.intents)), *_spans(data, "wnut17/train"), *_few(tweets, _TRAIN_ROWS)],
        {"starter dev": _named(_held_out(content.intents))}
        | {name: _spans(data, name, _TEST_ROWS) for name in ("wnut17/test", "btc_ner/f")},
        _ENTITIES,
        vectors,
    )
    punctuation, punctuation_rows = _punctuation(fingerprint, data / "self_dialogue", vectors)
    authored = _phrases(_training(content.intents))
    felt = _phrases(_training(content.emotions))
    more = [
        _witnessed(moods, felt, vectors),
        *(_witnessed(head, authored, vectors) for head in (acts, services, entities, punctuation)),
    ]
    return more, [*mood_rows, *act_rows, *service_rows, *entity_rows, *punctuation_rows]


def _emotion_reddit(
    content: Content, fingerprint: str, folder: Path, vectors: Vectors, heads: Sequence[Head]
) -> tuple[Head, list[Row]]:
    """Emotion as it is written in comments, in the content's labels: even a few of these rows cost the authored head
    accuracy on what is said to an assistant, so it is a head apart; both are measured on both."""
    train, test = (_mapped(folder / f"{part}.tsv.gz", _GOEMOTIONS) for part in ("train", "test"))
    train, test = _at_most(_MOOD_ROWS, train), _few(test, _TEST_ROWS)
    vectors.learn(folder.name, [example.text for example in (*train, *test)], tokens=False)
    about = About("emotion_reddit", "emotion", fingerprint, made_by=folder.name)
    phrases = _phrases(train)
    answers = Answers.one([row.label for row in train])
    head = fit.fit_sentence(about, phrases, vectors.sentences(phrases), answers).head
    fleet = Fleet([*heads, head])
    dev, public = "starter dev", f"{folder.name}/test"
    rows = [
        Row("emotion", _OURS, public, _measure(fleet, "emotion", test, vectors)),
        Row(
            about.name, about.made_by, dev, _measure(fleet, about.name, _held_out(content.emotions), vectors)
        ),
        Row(about.name, about.made_by, public, _measure(fleet, about.name, test, vectors)),
    ]
    return head, rows


def _dialog_act(fingerprint: str, folder: Path, vectors: Vectors) -> tuple[Head, list[Row]]:
    train, test = (
        _few(_acts(folder / f"user_{part}.jsonl.gz"), most)
        for part, most in (("train", _TRAIN_ROWS), ("test", _TEST_ROWS))
    )
    vectors.learn("dialog_act", [turn.text for turn in (*train, *test)], tokens=False)
    about = About("dialog_act", "dialog act", fingerprint, made_by="sgd")
    phrases = [turn.text for turn in train]
    answers = Answers.one([turn.label for turn in train])
    head = fit.fit_sentence(about, phrases, vectors.sentences(phrases), answers).head
    return head, [
        Row(about.name, about.made_by, "sgd/user_test", _measure(Fleet([head]), about.name, test, vectors))
    ]


def _span_head(
    about: About,
    train: Sequence[public_data.Tagged],
    tests: Mapping[str, Sequence[public_data.Tagged]],
    label_of: Mapping[str, str],
    vectors: Vectors,
) -> tuple[Head, list[Row]]:
    """A token head on the spans whose labels have a counterpart, and its row on every test set."""
    vectors.learn(about.name, [row.phrase for part in (train, *tests.values()) for row in part])
    head = fit_token(about, [_tagged_row(row, label_of, vectors) for row in train]).head
    fleet = Fleet([head])
    rows = []
    for tested_on, test in tests.items():
        tagged = [_tagged_row(row, label_of, vectors) for row in test]
        rows.append(Row(about.name, about.made_by, tested_on, _measure_spans(fleet, about.name, tagged)))
    return head, rows


def _punctuation(fingerprint: str, folder: Path, vectors: Vectors) -> tuple[Head, list[Row]]:
    """Marks and case, learnt from what people wrote and asked of the same words as a recogniser writes them."""
    about = About("punctuation", "punctuation and case", fingerprint, made_by=folder.name)
    train = _few(_spoken(folder / "train.jsonl.gz"), 2 * _TRAIN_ROWS)
    test = _few(_spoken(folder / "test.jsonl.gz"), _TEST_ROWS)
    vectors.learn(about.name, [row.phrase for row in (*train, *test)])
    taught, asked = ([_whole(row, vectors) for row in part] for part in (train, test))
    # A wrong capital or mark is read as a mistake, a missing one is not.
    head = fit_token(about, taught, scheme="words", restores=True, beta=0.7).head
    words = [replace(phrase, spans=by_token(phrase)) for phrase in asked]
    tested_on = f"{folder.name}/test"
    return head, [Row(about.name, about.made_by, tested_on, _measure_spans(Fleet([head]), about.name, words))]


def _whole(row: public_data.Tagged, vectors: Vectors) -> TaggedEncoding:
    """The row with all its spans."""
    return TaggedEncoding(row.phrase, vectors[row.phrase], tuple(Span(*span, 1.0) for span in row.spans))


def _spoken(path: Path) -> Iterator[public_data.Tagged]:
    """Turns of dialogs as they would be said, with what was lost as labels of annotators.restore."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            for turn in json.loads(line)["turns"][:_TURNS]:
                phrase, spans = spoken(turn["text"])
                if phrase and len(phrase) <= _LONGEST and phrase == normalize(phrase).text:
                    yield public_data.Tagged(phrase, spans)


def _spans(data: Path, name: str, most: int = _TRAIN_ROWS) -> list[public_data.Tagged]:
    return _few(public_data.tagged(data / f"{name}.jsonl.gz"), most)


def _acts(path: Path) -> list[Example]:
    """User turns that do one thing, and the thing they do."""
    turns = []
    for row in public_data.acted(path):
        done = {_ACTS[act.lower()] for act in row.labels if act.lower() in _ACTS}
        if len(done) > 1:
            done -= set(_ASIDE)
        if len(done) == 1:
            turns.append(Example(row.phrase, done.pop()))
    return turns


def _named(examples: Iterable[Example]) -> list[public_data.Tagged]:
    """Authored phrases with their people and places, as spans of a public set."""
    return [
        public_data.Tagged(
            normalize(example.text).text,
            tuple((slot.label, slot.start, slot.end) for slot in example.slots if slot.label in _NAMES),
        )
        for example in examples
    ]


def _witnessed(head: Head, phrases: Sequence[str], vectors: Vectors) -> Head:
    """The head with golden phrases of our own, of those it answers without hesitation: a set's sentences stay in the set."""
    fleet = Fleet([head])
    golden: list[Golden] = []
    seen: Counter[str] = Counter()
    for phrase in dict.fromkeys(phrases):
        answer = fleet.annotate(Heard.alone(phrase, vectors[phrase]))[0]
        found = {label.label: label.score for label in answer.labels[:1]}
        found |= {span.label: min(span.score, found.get(span.label, 1.0)) for span in answer.spans}
        if found and min(found.values()) >= _SURE and any(seen[label] < _WITNESSES for label in found):
            seen.update(found.keys())
            spans = tuple(f"{span.label}={phrase[span.start : span.end]}" for span in answer.spans)
            golden.append(Golden(text=phrase, label="" if spans else next(iter(found)), spans=spans))
    return _with_spec(head, golden=tuple(golden))


def _reported(head: Head, table: Sequence[Row]) -> Head:
    """The head with its rows of the table among its metrics, e.g. `snips/test: span_f1`."""
    measured = {
        f"{row.tested_on}: {name}": round(value, 4)
        for row in table
        if row.head == head.spec.name
        for name, value in row.metrics.items()
    }
    return _with_spec(head, metrics={**head.spec.metrics, **measured}) if measured else head


def _with_spec(head: Head, **changes: Any) -> Head:
    return replace(head, spec=head.spec.model_copy(update=changes))


def _sentence(
    about: About,
    examples: Sequence[Example],
    vectors: Vectors,
    *,
    outsiders: NDArray[np.float32] | None = None,
    outside: bool = False,
    borrowed: Borrowed | None = None,
) -> SentenceHead:
    train = _training(examples)
    rows = vectors.sentences(_phrases(train))
    answers = Answers.one([example.label for example in train])
    fitted = fit.fit_sentence(
        about, _phrases(train), rows, answers, outsiders=outsiders, outside=outside, borrowed=borrowed
    )
    return fitted.head


def _context(about: About, examples: Sequence[Example], vectors: Vectors) -> Head:
    train = _training(examples)
    return fit.fit_context(
        about,
        _phrases(train),
        [vectors[phrase] for phrase in _phrases(train)],
        [_heard_turns(example, vectors) for example in train],
        [[GoldenTurn(role=turn.role, text=turn.text) for turn in example.context] for example in train],
        Answers.one([example.label for example in train]),
    ).head


def _anchors(
    about: About, examples: Sequence[Example], vectors: Vectors, *, outsiders: NDArray[np.float32]
) -> Head:
    train = _training(examples)
    rows = vectors.sentences(_phrases(train))
    # As many strangers as anchors: how often a stranger comes is not for the calibration to guess.
    outsiders = outsiders[:: max(1, len(outsiders) // len(rows))]
    answers = Answers.one([example.label for example in train], at_least=1)
    return make_anchors(about, _phrases(train), rows, answers, outsiders=outsiders)


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


def _make_index(content: Content, judge: Judge, vectors: Vectors, folder: Path) -> None:
    """What `nlu index build` would make of the authored replies; they are ours, so none is blocked."""
    texts = [normalize(reply.text).text for reply in content.replies]
    vectors.learn("replies", texts, tokens=False)
    opinions = judge(vectors.sentences(texts))
    entries, prompts, said = [], [], []
    for reply, text, opinion in zip(content.replies, texts, opinions, strict=True):
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
                    tags=(reply.topic, reply.group),
                    labels=opinion.labels,
                )
            )
            prompts.append(normalize(prompt).text)
            said.append(text)
    build_index(
        entries, vectors.sentences(prompts), folder, personas=PERSONAS, surfaces=SURFACES, said=vectors.sentences(said)
    )  # fmt: skip


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


def _make_routes(content: Content, table: Path, heads: Sequence[Head], vectors: Vectors, folder: Path) -> Row:
    """The authored table as a part, and how often it sends held-out phrases where they were written to go."""
    folder.mkdir()
    shutil.copyfile(table, folder / ROUTES_FILE)
    routes = Routes.load(folder)
    routes.check(
        {head.spec.name: head.spec for head in heads},
        personas=PERSONAS,
        surfaces=SURFACES,
    )
    fleet, examples = Fleet(heads), _held_out(_led(content))
    right = 0
    for example, phrase in zip(examples, _phrases(examples), strict=True):
        answers = {answer.name: answer for answer in fleet.annotate(Heard.alone(phrase, vectors[phrase]))}
        # Without replies: every prompt is in the index, so what is held out of training would be found there word for word.
        facts = Facts(answers, best=None, personas=PERSONAS, surface="", locale="")
        right += routes.take(facts).to == example.label
    measured = {"accuracy": right / len(examples), "phrases": float(len(examples))}
    return Row("routes", _OURS, "starter dev", measured)


def _led(content: Content) -> list[Example]:
    """Authored phrases by where they should lead."""
    moods = [example for example in content.emotions if example.label != "neutral"]
    return [
        *(_relabelled(e, _LEADS_TO.get(e.group, "skill")) for e in content.intents),
        *(_relabelled(e, "chitchat") for e in moods),
        *(_relabelled(e, "persona") for e in _topics(content)),
        *content.out_of_scope,
    ]


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


def _tagged_row(row: public_data.Tagged, label_of: Mapping[str, str], vectors: Vectors) -> TaggedEncoding:
    spans = tuple(
        Span(label_of[label.lower()], start, end, 1.0)
        for label, start, end in row.spans
        if label.lower() in label_of
    )
    return TaggedEncoding(row.phrase, vectors[row.phrase], spans)


def _few(rows: Iterable[T], most: int) -> list[T]:
    """At most so many, chosen by the hash of what they hold, so that the choice depends on nothing else."""
    return sorted(rows, key=lambda row: hashlib.sha256(repr(row).encode()).digest())[:most]


def _at_most(share: int, examples: Sequence[Example]) -> list[Example]:
    """At most so many of each label."""
    labels = dict.fromkeys(example.label for example in examples)
    return [e for label in labels for e in _few((x for x in examples if x.label == label), share)]


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
