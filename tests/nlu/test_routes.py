"""nlu.routes: every refusal, which rule is taken and why, a head that failed, and a table in a served bundle."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotators.annotator import Annotation, Heard, Label, Status
from annotators.head import read_spec
from annotators.rules import RulesHead
from index.items import EVERYONE
from nlu import content, loading, parts, show, starter
from nlu.engine import Engine
from nlu.errors import EngineRefused
from nlu.routes import FILE, MAX_BYTES, MAX_RULES, Facts, Routes
from nlu.v1 import nlu_pb2 as pb
from statics.bundle import Bundle, build
from statics.bundle import Part as PartOfBundle
from tests.test_one_utterance import serving, turn
from tests.tiny import CREATED, PERSONAS, SURFACES, Made

DEFAULT = '[[route]]\nname = "rest"\nto = "clarify"\n'
RULE = '[[route]]\nname = "first"\nto = "skill"\n'
TAGS = ("weather", "promotion")


def rule(name: str, *conditions: str, to: str = "skill") -> str:
    return "\n".join(
        [f'[[route]]\nname = "{name}"\nto = "{to}"', *(f"when.{line}" for line in conditions), ""]
    )


def routes(text: str, folder: Path) -> Routes:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(text, encoding="utf-8")
    return Routes.load(folder)


def said(name: str, label: str = "", score: float = 0.9, **fields: object) -> Annotation:
    labels = (Label(label, score, True, score, 0.2), Label("other", 1 - score, False, 0.0, 0.5))
    return Annotation(name, "sentence", Status.OK, labels if label else (labels[1],), **fields)  # type: ignore[arg-type]


def facts(*annotations: Annotation, surface: str = "", locale: str = "") -> Facts:
    heads = {annotation.name: annotation for annotation in annotations}
    return Facts(heads, None, PERSONAS, surface, locale)


def answered(engine: Engine, similarity: float, *, tags: tuple[str, ...] = (), mask: int = EVERYONE) -> Facts:
    """Facts about a real reply, under other circumstances."""
    replies = engine.replies
    assert replies is not None
    vector = engine.vectorizer.encode(["hello"])[0].sentence
    hit = replies.search(vector, 1, persona=None, surface=None, as_of=CREATED)[0]
    item = replace(hit.item, tags=tags, persona_mask=mask)
    return facts()._replace(best=hit._replace(item=item, similarity=similarity))


# What a file must not say, and words of its refusal.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("[[route", "unreadable text", id="not-toml"),
        pytest.param("route = " + "[" * 5000, "unreadable text", id="too-deep"),
        pytest.param("#" * (MAX_BYTES + 1), f"expected at most {MAX_BYTES} bytes", id="too-large"),
        pytest.param("", "Field required", id="empty"),
        pytest.param("route = []", "at least 1 item", id="no-rule"),
        pytest.param(DEFAULT * (MAX_RULES + 1), f"at most {MAX_RULES} items", id="too-many-rules"),
        pytest.param("more = 1\n" + DEFAULT, "Extra inputs", id="more-at-the-top"),
        pytest.param(RULE + "weight = 1\n" + DEFAULT, "rule 1 weight", id="more-in-a-rule"),
        pytest.param(DEFAULT.replace("clarify", "sell"), "rule 1 to: found 'sell'", id="unknown-destination"),
        pytest.param(DEFAULT.replace("rest", "The rest"), "rule 1 name", id="bad-name"),
        pytest.param(rule("a", "intent = ['x']") + DEFAULT, "rule 1 when.intent", id="unknown-condition"),
        pytest.param(rule("a", "head.intent = {}") + DEFAULT, "asks nothing of the head", id="asks-no-head"),
        pytest.param(rule("a", "reply = {}") + DEFAULT, "asks nothing of the reply", id="asks-no-reply"),
        pytest.param(rule("a", "head.intent.label = []") + DEFAULT, "at least 1 item", id="no-label"),
        pytest.param(rule("a", "head.intent.label = 'x'") + DEFAULT, "valid tuple", id="label-no-list"),
        pytest.param(rule("a", "head.intent.score = '0.5'") + DEFAULT, "valid number", id="score-in-words"),
        pytest.param(rule("a", "head.intent.score = 0.0") + DEFAULT, "greater than 0", id="score-always"),
        pytest.param(rule("a", "head.intent.score = 50") + DEFAULT, "less than or equal to 1", id="score-percent"),
        pytest.param(rule("a", "head.intent.score = nan") + DEFAULT, "finite", id="score-nan"),
        pytest.param(rule("a", "head.intent.abstains = false") + DEFAULT, "rule 1 when.head.intent.abstains", id="abstains-false"),
        pytest.param(
            rule("a", "head.intent = { abstains = true, score = 0.5 }") + DEFAULT, "never hold together", id="abstains-and-score"
        ),
        pytest.param(rule("a", "surface = ['tv']"), "rule 1 a: found conditions in the last rule", id="no-default"),
        pytest.param(DEFAULT + rule("b", "surface = ['tv']") + DEFAULT, "rule 2 b: found a rule that rule 1", id="after-default"),
        pytest.param(DEFAULT + DEFAULT, "rule 2 rest: found a rule that rule 1 rest leaves nothing to", id="two-defaults"),
        pytest.param(
            rule("a", "surface = ['tv', 'car']") + rule("b", "surface = ['car', 'tv']") + DEFAULT, "rule 2 b", id="identical"
        ),
        pytest.param(
            rule("a", "head.x.label = ['p', 'q']") + rule("b", "head.x = { label = ['q'], score = 0.5 }") + DEFAULT,
            "rule 2 b",
            id="contained",
        ),
        pytest.param(
            rule("a", "reply.similarity = 0.5") + rule("b", "reply.similarity = 0.6", "locale = ['ru']") + DEFAULT,
            "rule 2 b",
            id="contained-number",
        ),
    ],
)  # fmt: skip
def test_routes_refuse_a_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(EngineRefused) as refused:
        routes(text, tmp_path / "routes.main")
    assert f"routes.main/{FILE}" in str(refused.value)
    assert words in str(refused.value)
    assert "expected" in str(refused.value) and ";" in str(refused.value)


def test_routes_refuse_a_folder_without_the_file_and_text_that_is_no_utf8(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match="no readable file"):
        Routes.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"# \xff\n" + DEFAULT.encode())
    with pytest.raises(EngineRefused, match="UTF-8"):
        Routes.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(DEFAULT, id="default-alone"),
        pytest.param(DEFAULT + "when = {}\n", id="default-spelt-out"),
        pytest.param(rule("a", "head.x.label = ['p', 'q']") + rule("a", "head.x.label = ['q', 'r']") + DEFAULT, id="overlap"),
        pytest.param(rule("a", "head.x.score = 0.9") + rule("b", "head.x.score = 0.5") + DEFAULT, id="looser-after"),
        pytest.param(rule("a", "head.x.label = ['p']") + rule("b", "head.x.abstains = true") + DEFAULT, id="abstains-after"),
        pytest.param(rule("a", "head.x.score = 1") + DEFAULT, id="whole-number"),
    ],
)  # fmt: skip
def test_routes_accept_a_file_whose_rules_can_all_be_reached(tmp_path: Path, text: str) -> None:
    assert len(routes(text, tmp_path).rules) == text.count("[[route]]")


Drawn = Mapping[str, object]
LABELS, SCORES = ("p", "q"), (0.3, 0.6)
CONDITIONS: st.SearchStrategy[Drawn] = st.fixed_dictionaries(
    {},
    optional={
        "head.x.label": st.lists(st.sampled_from(LABELS), min_size=1, unique=True),
        "head.x.score": st.sampled_from(SCORES),
        "surface": st.lists(st.sampled_from(SURFACES), min_size=1, unique=True),
    },
)


@given(drawn=st.lists(CONDITIONS, min_size=1, max_size=4))
def test_routes_refuse_only_what_no_turn_reaches(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Drawn]
) -> None:
    """Against a twin that tries every turn there is."""
    rules = [
        rule(f"r{i}", *(f"{on} = {bound!r}" for on, bound in each.items())) for i, each in enumerate(drawn)
    ]
    folder = tmp_path_factory.mktemp("drawn")
    try:
        routes("".join(rules) + (DEFAULT if drawn[-1] else ""), folder)
        return
    except EngineRefused as error:
        refused = int(str(error).split(" rule ")[1].split()[0]) - 1
    scores, surfaces = (0.1, 0.3, 0.5, 0.6, 0.9), ("", *SURFACES)
    for label, score, surface in itertools.product((*LABELS, "r", ""), scores, surfaces):
        taken = [i for i, each in enumerate(drawn) if _would_take(each, label, score, surface)]
        assert refused == len(drawn) or taken[:1] != [refused]


def _would_take(each: Drawn, label: str, score: float, surface: str) -> bool:
    asked = {name: each.get(name) for name in ("head.x.label", "head.x.score", "surface")}
    return (
        (asked["head.x.label"] is None or label in asked["head.x.label"])  # type: ignore[operator]
        and (asked["head.x.score"] is None or (label != "" and score >= asked["head.x.score"]))  # type: ignore[operator]
        and (asked["surface"] is None or surface in asked["surface"])  # type: ignore[operator]
    )


# What a bundle must know.


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("head.mood.score = 0.5", "found head 'mood', expected some of emotion, followup, intent"),
        ("head.intent.label = ['stop', 'fly']", "found head.intent.label 'fly', expected some of lights_on"),
        ("head.slots.abstains = true", "head slots of kind token"),
        ("head.intent.out_of_scope = 0.5", "out_of_scope of head intent"),
        ("reply.persona = ['grumpy']", "found reply.persona 'grumpy', expected some of calm, lively"),
        ("surface = ['fridge']", "found surface 'fridge', expected some of speaker, tv"),
    ],
)
def test_routes_refuse_what_the_bundle_does_not_know(
    engine: Engine, tmp_path: Path, condition: str, words: str
) -> None:
    table = routes(rule("known", "surface = ['tv']") + rule("bad", condition) + DEFAULT, tmp_path)
    with pytest.raises(EngineRefused) as refused:
        _check(table, engine)
    assert "rule 2 bad" in str(refused.value)
    assert words in str(refused.value)


def _check(table: Routes, engine: Engine) -> None:
    heads = {name: head.spec for name, head in engine.fleet.heads.items()}
    table.check(heads, personas=PERSONAS, surfaces=SURFACES)


def test_routes_fit_a_bundle_that_knows_everything(engine: Engine, tmp_path: Path) -> None:
    known = (
        "head.intent = { label = ['stop'], score = 0.5 }", "head.quick.label = ['clock']", "head.topic.abstains = true",
        "reply = { tag = ['weather'], persona = ['calm'], similarity = 0.5 }", "surface = ['tv']", "locale = ['ru']",
    )  # fmt: skip
    _check(routes("".join(rule("a", condition) for condition in known) + DEFAULT, tmp_path), engine)


def test_routes_of_the_starter_fit_its_heads_and_replies() -> None:
    shipped = Path(str(files("statics") / "shipped"))
    heads = {spec.name: spec for spec in (read_spec(folder)[0] for folder in shipped.glob("head.*"))}
    table = Routes.load(Path(str(files("statics") / "starter")))
    topics = {reply.topic for reply in content.load().replies}
    table.check(heads, personas=starter.PERSONAS, surfaces=starter.SURFACES)
    assert list(table.idle(topics.__contains__)) == []
    assert {rule.to for rule in table.rules} == {
        "skill", "persona", "promotion", "chitchat", "clarify", "out_of_scope",
    }  # fmt: skip


# Which rule is taken.

TABLE = (
    rule("abuse", "head.toxicity = { label = ['toxic'], score = 0.8 }", to="chitchat")
    + rule("lights.tv", "head.intent.label = ['lights_on']", "surface = ['tv']")
    + rule("lights", "head.intent.label = ['lights_on', 'lights_off']")
    + rule("local", "locale = ['ru', 'pt_BR']", "head.intent.abstains = true")
    + rule("unknown", "head.intent.out_of_scope = 0.7", to="out_of_scope")
    + DEFAULT
)


@pytest.mark.parametrize(
    ("given_facts", "name"),
    [
        pytest.param(facts(said("toxicity", "toxic", 0.8), said("intent", "lights_on")), "abuse", id="first-match"),
        pytest.param(facts(said("toxicity", "toxic", 0.79), said("intent", "lights_on")), "lights", id="score-too-low"),
        pytest.param(facts(said("toxicity", "fine"), said("intent", "lights_on")), "lights", id="another-label"),
        pytest.param(facts(said("intent", "lights_on"), surface="tv"), "lights.tv", id="all-conditions"),
        pytest.param(facts(said("intent", "lights_on"), surface="car"), "lights", id="one-condition-fails"),
        pytest.param(facts(said("intent", "lights_off"), surface="tv"), "lights", id="other-condition-fails"),
        pytest.param(facts(said("intent"), locale="ru-RU"), "local", id="language-of-a-locale"),
        pytest.param(facts(said("intent"), locale="pt-BR"), "local", id="locale-as-some-write-it"),
        pytest.param(facts(said("intent"), locale="pt-PT"), "rest", id="another-region"),
        pytest.param(facts(said("intent"), locale="rup"), "rest", id="another-language"),
        pytest.param(facts(said("intent", "stop"), locale="ru"), "rest", id="does-not-abstain"),
        pytest.param(facts(said("intent", "stop", out_of_scope=0.7)), "unknown", id="out-of-scope"),
        pytest.param(facts(said("intent", "stop", out_of_scope=0.69)), "rest", id="in-scope"),
        pytest.param(facts(), "rest", id="nothing-known"),
    ],
)  # fmt: skip
def test_routes_take_the_first_rule_that_holds(tmp_path: Path, given_facts: Facts, name: str) -> None:
    assert routes(TABLE, tmp_path).take(given_facts).name == name


@pytest.mark.parametrize(
    ("condition", "similarity", "tags", "mask", "holds"),
    [
        ("similarity = 0.8", 0.8, (), EVERYONE, True),
        ("similarity = 0.8", 0.79, (), EVERYONE, False),
        ("tag = ['weather', 'sport']", 0.1, ("news", "weather"), EVERYONE, True),
        ("tag = ['weather']", 0.1, ("news",), EVERYONE, False),
        ("tag = ['weather']", 0.1, (), EVERYONE, False),
        ("persona = ['lively']", 0.1, (), 0b10, True),
        ("persona = ['lively']", 0.1, (), 0b11, True),
        ("persona = ['lively']", 0.1, (), 0b01, False),
        ("persona = ['lively']", 0.1, (), EVERYONE, False),
    ],
)
def test_routes_look_at_the_best_reply(
    engine: Engine,
    tmp_path: Path,
    condition: str,
    similarity: float,
    tags: tuple[str, ...],
    mask: int,
    holds: bool,
) -> None:
    table = routes(rule("a", f"reply.{condition}") + DEFAULT, tmp_path)
    assert (table.take(answered(engine, similarity, tags=tags, mask=mask)).name == "a") is holds
    nothing = table.take(facts(), explain=True)
    assert nothing.name == "rest"
    assert nothing.because[0].endswith("is unknown: there is no reply")


def test_routes_explain_every_rule_that_was_tried(tmp_path: Path) -> None:
    table = routes(TABLE, tmp_path)
    asked = facts(said("toxicity", "toxic", 0.5), said("intent", "stop", out_of_scope=0.75), locale="ru")
    route = table.take(asked, explain=True)
    assert (route.to, route.name) == ("out_of_scope", "unknown")
    assert route.because == (
        "abuse: toxicity.score is 0.50, not 0.80 or more",
        "lights.tv: surface is unknown: none was sent",
        "lights: intent.label is stop, not lights_off or lights_on",
        "local: intent.label is stop, not (abstains)",
        "unknown: intent.out_of_scope is 0.75",
    )
    assert table.take(asked).because == ()
    assert table.take(facts(), explain=True).because[-1] == "rest: takes what no other rule took"


@pytest.mark.parametrize("status", [Status.ERROR, Status.SKIPPED])
@pytest.mark.parametrize(
    "condition", ["label = ['toxic']", "score = 0.1", "out_of_scope = 0.1", "abstains = true"]
)
def test_routes_take_a_head_that_did_not_answer_for_nothing(
    tmp_path: Path, status: Status, condition: str
) -> None:
    """Not even "abstains" holds of it. The same condition holds of the head that answers."""
    table = routes(rule("a", f"head.toxicity.{condition}", to="chitchat") + DEFAULT, tmp_path)
    failed = Annotation("toxicity", "sentence", status, note="RuntimeError in this head")
    route = table.take(facts(failed), explain=True)
    assert route.name == "rest"
    assert "toxicity." in route.because[0]
    assert route.because[0].endswith(f"is unknown: {status.value}, RuntimeError in this head")
    well = said("toxicity", "" if "abstains" in condition else "toxic", out_of_scope=0.5)
    assert table.take(facts(well)).name == "a"
    unasked = table.take(facts(), explain=True)
    assert unasked.because[0].endswith("is unknown: the head was not asked")


# In a bundle.

SERVED = (
    rule("clock", "head.quick.label = ['clock']")
    + rule("stop", "head.quick.label = ['stop']")
    + rule("not.quick", "head.quick.abstains = true", "reply.similarity = 0.95", to="persona")
    + DEFAULT
)


def bundled(tiny: Made, folder: Path, *tables: str) -> Bundle:
    """The tiny bundle with these tables."""
    made = folder / "parts"
    shutil.copytree(tiny.parts, made)
    for number, text in enumerate(tables):
        part = made / f"routes.t{number}"
        part.mkdir()
        (part / FILE).write_text(text, encoding="utf-8")
    return build(
        parts.collect(made), folder / "bundle", channel="test", seq=1, created=CREATED, requires_service=">=0.1.0.dev0,<1"
    )  # fmt: skip


def test_routes_part_requires_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "routes.main"
    routes(DEFAULT, folder)
    assert parts.part(folder) == PartOfBundle("routes", "main", folder, {}, {})


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ((SERVED, DEFAULT), "found 2 parts of kind routes"),
        ((rule("a", "head.quick.label = ['go']") + DEFAULT,), "routes.t0/routes.toml rule 1 a: found head.quick.label 'go'"),
        ((rule("a", "surface = ['car']") + DEFAULT,), "routes.t0/routes.toml rule 1 a: found surface 'car'"),
        ((rule("a", "reply.persona = ['loud']") + DEFAULT,), "found reply.persona 'loud'"),
        ((rule("a", "surface = ['tv']"),), "conditions in the last rule"),
    ],
)  # fmt: skip
def test_routes_of_a_bundle_are_checked_when_it_is_loaded(
    tiny: Made, tmp_path: Path, tables: tuple[str, ...], words: str
) -> None:
    with pytest.raises(EngineRefused) as refused:
        loading.load(bundled(tiny, tmp_path, *tables))
    assert words in str(refused.value)


def test_routes_of_a_tag_that_no_reply_has_are_told_in_the_log(
    tiny: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Replies come and go: a table outlives the promotion it speaks of."""
    engine = loading.load(bundled(tiny, tmp_path, rule("a", "reply.tag = ['sport']") + DEFAULT))
    assert engine.routes is not None
    assert "rule 1 a: no reply of the index carries the tag 'sport'" in caplog.text


def test_routes_tell_only_of_tags_that_nobody_has(tmp_path: Path) -> None:
    table = routes(rule("a", "reply.tag = ['weather', 'sport']") + DEFAULT, tmp_path)
    assert [told.rpartition(" ")[2] for told in table.idle(TAGS.__contains__)] == ["'sport'"]


async def test_routes_are_told_over_the_wire(
    tiny: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RulesHead, heard: Heard) -> Annotation:
        raise RuntimeError("for once")

    async with serving(Made(bundled(tiny, tmp_path, SERVED), tiny.parts)) as stub:
        with monkeypatch.context() as harm:
            harm.setattr(RulesHead, "annotate", broken)
            failed = await stub.Understand(turn("stop", explain=True))
        stop = await stub.Understand(turn("stop", explain=True))
        again = await stub.Understand(turn("stop", explain=True))
        hello = await stub.Understand(turn("hello"))
        silent = await stub.Understand(turn("hello", retrieval=pb.Retrieval(top_k=0)))
        unasked = await stub.Understand(turn("stop", explain=True, annotators=["intent"]))
    assert (stop.route.to, stop.route.name) == ("skill", "stop")
    assert list(stop.route.because) == ["clock: quick.label is stop, not clock", "stop: quick.label is stop"]
    assert again.source == pb.SOURCE_ANSWER
    assert again.route == stop.route
    assert (hello.route.to, hello.route.name, list(hello.route.because)) == ("persona", "not.quick", [])
    assert silent.route.name == "rest"
    assert failed.route.name == "rest"
    assert failed.route.because[0] == "clock: quick.label is unknown: error, RuntimeError in this head"
    assert unasked.route.because[0] == "clock: quick.label is unknown: the head was not asked"


async def test_routes_are_absent_where_the_bundle_has_none(tiny: Made) -> None:
    async with serving(tiny) as stub:
        reply = await stub.Understand(turn("stop", explain=True))
    assert not reply.HasField("route")
    assert "route" not in show.reply_json(reply)


def test_routes_are_shown_with_their_reasons() -> None:
    route = pb.Route(to="skill", name="stop", because=["clock: no", "stop: yes"])
    shown = show.reply_json(pb.UnderstandReply(route=route))
    assert shown["route"] == {"to": "skill", "name": "stop", "because": ["clock: no", "stop: yes"]}
    assert show.reply_json(pb.UnderstandReply(route=pb.Route(to="skill", name="stop")))["route"] == {
        "to": "skill",
        "name": "stop",
    }
