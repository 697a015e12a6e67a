"""nlu.shadow: a candidate is compared with the live head and can do it no harm; what is kept of a turn is masked."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Label, Span, Status
from annotators.fleet import Answered, Fleet
from annotators.head import HeadInvalid
from annotators.sentence import SentenceHead
from annotators.table import Head
from nlu import loading, metrics, shadow
from nlu.engine import Engine
from nlu.errors import EngineRefused
from nlu.heads import lifecycle
from nlu.pipeline import Pipeline
from nlu.serve import health_names, pipeline_of
from nlu.settings import Settings
from nlu.shadow import Sample, Verdict, compare, redact
from nlu.types import Hypothesis, Utterance
from statics.bundle import Bundle
from tests.annotators.toys import biased, encoded, heard, random_head, random_units
from tests.nlu.heads.test_lifecycle import another, edited
from tests.tiny import DIM, TOKEN_DIM, Made


def said(
    *labels: tuple[str, float, bool], spans: Sequence[Span] = (), status: Status = Status.OK
) -> Annotation:
    """An annotation of these labels (label, score, accepted)."""
    return Annotation(
        "toy",
        "sentence",
        status,
        labels=tuple(Label(label, score, accepted, score, 0.5) for label, score, accepted in labels),
        spans=tuple(spans),
    )


NOTHING = said(("a", 0.4, False), ("b", 0.3, False))
TIME, PERSON = Span("time", 3, 6, 0.9), Span("person", 0, 2, 0.8)


@pytest.mark.parametrize(
    ("live", "candidate", "verdict", "pair"),
    [
        (said(("a", 0.9, True)), said(("a", 0.6, True)), Verdict.SAME, (None, None)),
        (said(("a", 0.9, True)), said(("b", 0.6, True)), Verdict.FLIP, (("a", 0.9), ("b", 0.6))),
        (said(("a", 0.9, True)), NOTHING, Verdict.ABSTAINS, (("a", 0.9), None)),
        (NOTHING, said(("b", 0.6, True)), Verdict.SPEAKS, (None, ("b", 0.6))),
        (NOTHING, said(("b", 0.4, False)), Verdict.SAME, (None, None)),
        (NOTHING, said(status=Status.SKIPPED), Verdict.SAME, (None, None)),
        (said(("a", 0.9, True)), said(status=Status.ERROR), Verdict.ERROR, (("a", 0.9), None)),
        (
            said(("a", 0.9, True), ("b", 0.8, True)),
            said(("c", 0.7, True), ("a", 0.6, True)),
            Verdict.FLIP,
            (("b", 0.8), ("c", 0.7)),
        ),
        (said(("a", 0.9, True), ("b", 0.8, True)), said(("a", 0.9, True)), Verdict.FLIP, (("b", 0.8), None)),
        (said(spans=[PERSON, TIME]), said(spans=[TIME, PERSON]), Verdict.SAME, (None, None)),
        (
            said(spans=[TIME]),
            said(spans=[TIME._replace(end=9)]),
            Verdict.FLIP,
            (("time", 0.9), ("time", 0.9)),
        ),
        (said(spans=[TIME]), said(spans=[PERSON, TIME]), Verdict.FLIP, (None, ("person", 0.8))),
        (said(), said(spans=[PERSON]), Verdict.SPEAKS, (None, ("person", 0.8))),
    ],
)
def test_shadow_compares_what_is_accepted(
    live: Annotation, candidate: Annotation, verdict: Verdict, pair: tuple[object, object]
) -> None:
    found = compare(live, candidate)
    assert (found.verdict, (found.live, found.candidate)) == (verdict, pair)


# A fleet with shadows


def plain(spec_of: SentenceHead, *, seed: int) -> SentenceHead:
    """A candidate for a head: the same name and labels, other weights."""
    other = random_head(spec_of.spec.name, len(spec_of.spec.labels), dim=spec_of.dim, seed=seed)
    return replace(other, spec=spec_of.spec)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=5),
    shadowed=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 70), st.booleans()), max_size=5),
    hypotheses=st.integers(1, 4),
    dim=st.sampled_from([8, 20, 384]),
)
def test_shadow_changes_no_bit_of_any_live_answer(
    sizes: list[tuple[int, bool]], shadowed: list[tuple[int, int, bool]], hypotheses: int, dim: int
) -> None:
    """Whatever the candidates are; tests/annotators/test_fleet.py shows that a plain product would change them."""
    live: list[Head] = [
        random_head(f"head{i}", labels, dim=dim, seed=i, exclusive=exclusive)
        for i, (labels, exclusive) in enumerate(sizes)
    ]
    candidates = {
        number % len(live): random_head(f"head{number % len(live)}", labels, dim=dim, seed=99 + labels, exclusive=exclusive)
        for number, labels, exclusive in shadowed
    }  # fmt: skip
    turn = heard(*random_units(hypotheses, dim, seed=7))
    answers = Fleet(live, candidates.values()).answer(turn)
    assert answers.live == Fleet(live).annotate(turn)
    assert answers.shadows() == tuple(
        annotation for candidate in candidates.values() for annotation in Fleet([candidate]).annotate(turn)
    )


def test_shadow_answers_for_the_heads_that_were_asked(engine: Engine) -> None:
    heads = list(engine.fleet.heads.values())
    fleet = Fleet(heads, heads)
    encoding = engine.vectorizer.encode(["stop it"])[0]
    turn = Heard.alone("stop it", encoding, [HeardTurn("user", encoding)])
    whole, some = fleet.answer(turn), fleet.answer(turn, wanted=frozenset({"slots", "intent"}))
    assert whole.shadows() == whole.live  # each head is its own candidate here
    assert [annotation.name for annotation in some.shadows()] == ["intent", "slots"]


def test_shadow_without_a_live_head_is_refused() -> None:
    with pytest.raises(HeadInvalid, match="a: found a shadow without a live head of its name"):
        Fleet([random_head("b", 2)], [random_head("a", 2)])


def test_shadow_reads_tokens_when_only_the_candidate_does(engine: Engine) -> None:
    slots = engine.fleet.heads["slots"]
    live = random_head("slots", 2, dim=DIM)
    assert not Fleet([live]).needs_tokens(frozenset({"slots"}))
    assert Fleet([live], [slots]).needs_tokens(frozenset({"slots"}))


def test_shadow_goes_with_its_head_from_fleet_to_fleet() -> None:
    fleet = Fleet([random_head("a", 2), random_head("b", 2)], [random_head("a", 3, seed=5)])
    assert set(fleet.with_head(random_head("a", 2, seed=9)).shadows) == {"a"}
    assert set(fleet.without("b").shadows) == {"a"}
    assert not fleet.without("a").shadows


# A bundle with a shadow


@pytest.fixture(scope="module")
def shadowed(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a shadow whose every intent is another label than the live head's."""
    folder = tmp_path_factory.mktemp("shadowed")
    return lifecycle.shadow(tiny.bundle, contrary(tiny, folder), folder / "bundle")


def contrary(made: Made, folder: Path) -> Path:
    """An intent head that turns every label into the next one, and never abstains."""
    head = another(made, folder)
    labels = json.loads((head / "head.json").read_bytes())["labels"]
    return edited(head, labels=[*labels[1:], labels[0]], thresholds=[0.0] * len(labels), golden=[])


def broken(engine: Engine, name: str) -> Engine:
    """An engine whose shadow raises whenever it is asked; its memory was damaged after it was loaded."""
    candidate = engine.fleet.shadows[name]
    damaged = candidate.spec.model_copy(update={"thresholds": ()})
    return replace(engine, fleet=Fleet(engine.fleet.heads.values(), [replace(candidate, spec=damaged)]))


def settings(**fields: object) -> Settings:
    return Settings(metrics=False, workers=1, **fields)  # type: ignore[arg-type]


async def understood(pipeline: Pipeline, text: str, *annotators: str) -> tuple[Annotation, ...]:
    """The annotations of a turn, after whatever was left to do after it."""
    utterance = Utterance((Hypothesis(text),), annotators=frozenset(annotators) or None)
    reply = await pipeline.understand(utterance, deadline=time.monotonic() + 30)
    await asyncio.sleep(0)
    return reply.annotations


def answers_counted() -> dict[str, float]:
    return {
        verdict.value: metrics.REGISTRY.get_sample_value(
            "nlu_shadow_answers_total", {"head": "intent", "verdict": verdict.value}
        )
        or 0.0
        for verdict in Verdict
    }


def counted_since(before: dict[str, float]) -> dict[str, float]:
    return {name: count - before[name] for name, count in answers_counted().items() if count != before[name]}


def flips(live: str, candidate: str) -> float:
    labels = {"head": "intent", "live": live, "candidate": candidate}
    return metrics.REGISTRY.get_sample_value("nlu_shadow_flips_total", labels) or 0.0


def test_shadow_is_loaded_with_the_checks_of_a_head(tiny: Made, tmp_path: Path) -> None:
    head = another(tiny, tmp_path)
    golden = json.loads((head / "head.json").read_bytes())["golden"]
    edited(head, golden=[golden[0] | {"label": "nobody says this"}])
    with pytest.raises(EngineRefused, match="head intent: found .* answered with"):
        lifecycle.shadow(tiny.bundle, head, tmp_path / "bundle")


def test_shadow_that_is_promoted_is_taken_over_as_it_is(shadowed: Bundle, tmp_path: Path) -> None:
    before = loading.load(shadowed)
    after = loading.load(lifecycle.promote(shadowed, "intent", tmp_path / "promoted"), before=before)
    assert after.fleet.heads["intent"] is before.fleet.shadows["intent"]
    assert after.fleet.shadows["intent"] is before.fleet.heads["intent"]


def test_shadow_is_described_and_has_its_health(shadowed: Bundle) -> None:
    engine = loading.load(shadowed)
    parts = {(part.kind, part.name) for part in engine.describe().components}
    assert {("head", "intent"), ("shadow", "intent")} <= parts
    assert [head.name for head in engine.describe().heads].count("intent") == 1
    assert "shadow/intent" in health_names(engine)


async def test_shadow_is_counted_after_the_reply_and_changes_none(engine: Engine, shadowed: Bundle) -> None:
    said_to = ("stop it", "play music", "lamp on", "you annoy me", "wake me at six")
    async with (
        pipeline_of(engine, settings()) as plain_one,
        pipeline_of(loading.load(shadowed), settings()) as pipeline,
    ):
        before = answers_counted()
        for text in said_to:
            assert await understood(pipeline, text) == await understood(plain_one, text)
        assert sum(counted_since(before).values()) == len(said_to)
        utterance = Utterance((Hypothesis("stop it"),))
        before = answers_counted()
        await pipeline.understand(utterance, deadline=time.monotonic() + 30)
        assert not counted_since(before)  # the reply is there and the shadow has yet to be asked
        await asyncio.sleep(0)
        assert counted_since(before) == {"flip": 1}


async def test_shadow_flips_are_counted_by_label(shadowed: Bundle) -> None:
    async with pipeline_of(loading.load(shadowed), settings()) as pipeline:
        before = flips("stop", "lights_on")
        annotations = await understood(pipeline, "stop it")
        assert [a.labels[0].label for a in annotations if a.name == "intent"] == ["stop"]
        assert flips("stop", "lights_on") == before + 1


async def test_shadow_of_a_head_nobody_asked_is_not_asked(shadowed: Bundle) -> None:
    async with pipeline_of(loading.load(shadowed), settings()) as pipeline:
        before = answers_counted()
        await understood(pipeline, "stop it", "emotion")
        assert not counted_since(before)


async def test_shadow_sees_repeated_questions_too(engine: Engine, shadowed: Bundle) -> None:
    async with pipeline_of(engine, settings()) as plain_one:
        assert plain_one.answers is not None
    async with pipeline_of(loading.load(shadowed), settings()) as pipeline:
        assert pipeline.answers is None


async def test_shadow_that_raises_is_counted_and_harms_nobody(
    engine: Engine, shadowed: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with (
            pipeline_of(engine, settings()) as plain_one,
            pipeline_of(broken(loading.load(shadowed), "intent"), settings()) as pipeline,
        ):
            before = answers_counted()
            assert await understood(pipeline, "stop it") == await understood(plain_one, "stop it")
    assert counted_since(before) == {"error": 1}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("name", ["followup", "slots", "topic"])
def test_shadow_of_any_kind_may_raise(engine: Engine, name: str) -> None:
    """Vectors of another width, which only damage could bring here: loading refuses them."""
    heads = engine.fleet.heads
    encoding = engine.vectorizer.encode(["stop it"])[0]
    turn = Heard.alone("stop it", encoding, [HeardTurn("user", encoding)])
    damaged = replace(heads[name], **narrowed(heads[name]))
    answers = Fleet(heads.values(), [damaged]).answer(turn)
    assert answers.live == engine.fleet.annotate(turn)
    (failed,) = answers.shadows()
    assert (failed.name, failed.status, failed.note) == (name, Status.ERROR, "ValueError in this head")


def narrowed(head: Head) -> dict[str, Any]:
    field = "anchors" if head.spec.kind == "anchors" else "weight"
    less = 3 if head.spec.kind == "token" else 1  # of each of the three tokens that it reads
    return {field: getattr(head, field)[:, :-less]}


def test_shadow_live_head_that_failed_is_nothing_to_compare_with() -> None:
    live = Annotation("intent", "sentence", Status.ERROR)
    fleet = Fleet([biased([1.0, 0.0], name="intent")])
    before = answers_counted()
    shadow.observe(fleet, Answered((live,), lambda: (live,)), "stop", None)
    assert not counted_since(before)


def test_shadow_observing_never_raises_and_never_says_what_was_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def harmful() -> tuple[Annotation, ...]:
        raise RuntimeError("a mistake of ours")

    shadow.observe(Fleet([biased([1.0], name="intent")]), Answered((), harmful), "my secret", None)
    assert [record.getMessage() for record in caplog.records] == ["comparing the shadows failed"]
    assert "my secret" not in caplog.text


# What is kept


@pytest.mark.parametrize(
    ("phrase", "spans", "redacted"),
    [
        ("wake me at six", [Span("time", 11, 14, 1.0)], "wake me at <time>"),
        ("call 8 800 555-35-35 at 6:30", [], "call # ### ###-##-## at #:##"),
        ("номер ٤٢ и 42", [], "номер ## и ##"),
        ("write to anna.k+1@mail.example.com now", [], "write to <email> now"),
        ("пиши на почта@пример.рф", [], "пиши на <email>"),
        ("open https://a.example/b?c=1 please", [], "open <url> please"),
        ("open www.example.com/путь", [], "open <url>"),
        ("зайди на пример.рф/карта сейчас", [], "зайди на <url> сейчас"),
        ("at 6 p.m. then stop. now", [], "at # p.m. then stop. now"),
        ("call anna smith", [Span("person", 5, 9, 1.0), Span("name", 5, 15, 1.0)], "call <name>"),
        ("half past six tomorrow", [Span("time", 0, 13, 1.0), Span("when", 5, 22, 1.0)], "<time>"),
        ("mail anna@example.com", [Span("person", 5, 9, 1.0)], "mail <email>"),
        ("stop", [], "stop"),
        ("42", [Span("slot1", 0, 2, 1.0)], "<slot1>"),
    ],
)
def test_shadow_redacts(phrase: str, spans: list[Span], redacted: str) -> None:
    assert redact(phrase, spans) == redacted


@given(st.text(max_size=40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4))
def test_shadow_redaction_leaves_no_digit_and_nothing_of_a_span(
    text: str, bounds: list[tuple[int, int]]
) -> None:
    """Of a text whose every code point is told from the others by where it stands."""
    spans = [Span("x", min(pair), max(pair), 1.0) for pair in bounds if min(pair) < max(pair) <= len(text)]
    assert not any(character.isdecimal() for character in redact(text, spans))
    told = "".join(chr(0x4E00 + i) for i in range(len(text)))
    hidden = {told[i] for span in spans for i in range(span.start, span.end)}
    assert set(redact(told, spans)) - set("<x>") == set(told) - hidden


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def test_shadow_sample_keeps_flips_redacted(
    shadowed: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "flips.jsonl"
    with caplog.at_level(logging.DEBUG):
        async with pipeline_of(loading.load(shadowed), settings(shadow_sample=file)) as pipeline:
            await understood(pipeline, "Stop it at 12 or anna@example.com")
            await understood(pipeline, "stop it", "intent", "emotion")  # no token head has read this one
            await understood(pipeline, "wake me at six")
    rows = rows_of(file)
    assert [set(row) for row in rows] == [
        {"head", "live", "live_score", "candidate", "candidate_score", "phrase"}
    ] * 2
    assert {row["head"] for row in rows} == {"intent"}
    assert all(row["live"] != row["candidate"] for row in rows)
    phrases = " ".join(str(row["phrase"]) for row in rows)
    assert "<time>" in phrases and "<email>" in phrases
    assert not {"12", "anna", "example", "six"} & set(phrases.replace("<", " ").replace(">", " ").split())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "stop it" not in caplog.text and "wake me" not in caplog.text


async def test_shadow_sample_masks_what_the_candidate_finds(engine: Engine, tmp_path: Path) -> None:
    """The live head misses a name; the candidate sees it, which is the very difference that is kept."""
    heads = dict(engine.fleet.heads)
    blind = replace(heads["slots"], spec=heads["slots"].spec.model_copy(update={"thresholds": (2.0, 2.0)}))
    fleet = Fleet((heads | {"slots": blind}).values(), [heads["slots"]])
    turn = Heard.alone("wake me at six", engine.vectorizer.encode(["wake me at six"])[0])
    sample = Sample(tmp_path / "flips.jsonl", 10)
    shadow.observe(fleet, fleet.answer(turn), "wake me at six", sample)
    await sample.close()
    (row,) = rows_of(tmp_path / "flips.jsonl")
    assert (row["live"], row["candidate"], row["phrase"]) == (None, "time", "wake me at <time>")


def encoding_without_tokens() -> Encoding:
    return encoded(random_units(1, DIM)[0])


async def test_shadow_sample_takes_no_phrase_a_token_head_has_skipped(
    shadowed: Bundle, tmp_path: Path
) -> None:
    fleet = loading.load(shadowed).fleet
    sample = Sample(tmp_path / "flips.jsonl", 10)
    without = Heard.alone("stop it", encoding_without_tokens())
    tokens = np.zeros((2, TOKEN_DIM), np.float32)
    offsets = np.array([[0, 4], [5, 7]], np.int32)
    whole = replace(without, encodings=(replace(without.encodings[0], tokens=tokens, offsets=offsets),))
    for turn in (without, whole):  # the second is the control
        shadow.observe(fleet, fleet.answer(turn), "stop it", sample)
    await sample.close()
    assert len(rows_of(tmp_path / "flips.jsonl")) == 1


def row(number: int) -> str:
    return compare(said(("a", number / 100, True)), said(("b", 0.5, True))).row(f"phrase {number}")


async def test_shadow_sample_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    file = tmp_path / "flips.jsonl"
    sample = Sample(file, 10)
    for number in range(25):
        sample.add(row(number))
        assert len(rows_of(file)) <= 10
    await sample.close()
    assert [found["phrase"] for found in rows_of(file)] == [f"phrase {number}" for number in range(15, 25)]


async def test_shadow_sample_goes_on_after_a_restart_and_does_not_grow(tmp_path: Path) -> None:
    file = tmp_path / "flips.jsonl"
    for start in (0, 7, 14):
        sample = Sample(file, 10)
        for number in range(start, start + 7):
            sample.add(row(number))
        await sample.close()
        assert [found["phrase"] for found in rows_of(file)] == [
            f"phrase {number}" for number in range(max(0, start - 3), start + 7)
        ]
    file.chmod(0o644)
    await Sample(file, 4).close()  # a smaller limit holds at once
    assert len(rows_of(file)) == 4
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


async def test_shadow_sample_is_written_behind_and_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of rows in one turn of the loop are one write, on another thread."""
    writes: list[int] = []
    real = shadow._replace

    def counting(path: Path, rows: Sequence[str]) -> None:
        writes.append(len([*rows]))
        real(path, rows)

    monkeypatch.setattr(shadow, "_replace", counting)
    sample = Sample(tmp_path / "flips.jsonl", 1000)
    for number in range(300):
        sample.add(row(number))
    assert writes == [0]  # the file as it was found, at the start
    await sample.close()
    assert writes == [0, 300]


async def test_shadow_sample_error_is_one_line_and_the_end_of_it(
    shadowed: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "folder" / "flips.jsonl"
    file.parent.mkdir()
    async with pipeline_of(loading.load(shadowed), settings(shadow_sample=file)) as pipeline:
        file.unlink()
        file.parent.rmdir()  # while it serves
        before = answers_counted()
        for text in ("stop it", "stop that", "stop now"):
            assert await understood(pipeline, text)
        assert pipeline.sample is not None
        await pipeline.sample.close()
        assert await understood(pipeline, "stop stop")
    assert sum(counted_since(before).values()) == 4
    assert [record.getMessage()[:30] for record in caplog.records if record.levelno >= logging.WARNING] == [
        "no more samples of shadows: [E"
    ]


async def test_shadow_sample_never_writes_over_a_file_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine, and nobody else's\n")
    sample = Sample(file, 10)
    sample.add(row(1))
    await sample.close()
    assert file.read_text() == "mine, and nobody else's\n"
    assert "found other content, expected a sample of shadows; name a file of its own" in caplog.text


async def test_shadow_sample_is_not_begun_where_nobody_asked(
    engine: Engine, shadowed: Bundle, tmp_path: Path
) -> None:
    async with pipeline_of(loading.load(shadowed), settings()) as pipeline:
        assert pipeline.sample is None
    async with pipeline_of(engine, settings(shadow_sample=tmp_path / "flips.jsonl")) as pipeline:
        assert pipeline.sample is None  # no shadow, no file
    assert not list(tmp_path.iterdir())
