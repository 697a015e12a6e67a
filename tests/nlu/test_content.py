"""nlu.content: the parser says where a line is wrong, and the shipped content holds what is promised of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nlu import content
from nlu.content import Content, ContentInvalid, Example, ReplyLine, Slot, read_labelled
from nlu.normalizer import normalize
from nlu.types import Turn

REPLIES = """
[[group]]
topic = "hello"
emotion = ""
prompts = ["hi", "hello"]
any = ["Hello."]
lively = ["Hey!", "Hiya!"]

[[promotion]]
id = "films"
prompts = ["what is on"]
reply = "Films are free."
persona = "calm"
surface = "tv"
valid_from = 2026-06-01T00:00:00Z
valid_until = 2026-06-08T00:00:00Z
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small good content folder; every malformed one in these tests starts as this one."""
    (tmp_path / "intents").mkdir()
    (tmp_path / "replies").mkdir()
    (tmp_path / "intents" / "alarms.txt").write_text(
        "# comment\n\n## alarm_set\nwake me at [six](time)\n  up [early](time) [sunday](date) \n## alarm_stop\nstop\n"
    )
    (tmp_path / "intents" / "lights.txt").write_text("## lights_on\nlamp on\n")
    (tmp_path / "out_of_scope.txt").write_text("# near misses\npay my bill\nstop\n")
    (tmp_path / "emotions.txt").write_text("## joy\nyay\n## neutral\nhello\n")
    (tmp_path / "toxicity.txt").write_text("## toxic\nyou junk\n")
    (tmp_path / "contexts.tsv").write_text(
        "user: wake me at six\tmake it eight\talarm_set\nassistant: Tea?\tyes\torder\n"
    )
    (tmp_path / "replies" / "talk.toml").write_text(REPLIES)
    return tmp_path


def test_content_reads_labels_slots_and_groups(folder: Path) -> None:
    assert content.load(folder).intents == (
        Example("wake me at six", "alarm_set", "alarms", (Slot("time", 11, 14),)),
        Example("up early sunday", "alarm_set", "alarms", (Slot("time", 3, 8), Slot("date", 9, 15))),
        Example("stop", "alarm_stop", "alarms"),
        Example("lamp on", "lights_on", "lights"),
    )


def test_content_reads_out_of_scope_without_a_heading(folder: Path) -> None:
    assert [(e.text, e.label) for e in content.load(folder).out_of_scope] == [
        ("pay my bill", "out_of_scope"),
        ("stop", "out_of_scope"),
    ]


def test_content_reads_contexts(folder: Path) -> None:
    assert content.load(folder).contexts == (
        Example("make it eight", "alarm_set", context=(Turn("user", "wake me at six"),)),
        Example("yes", "order", context=(Turn("assistant", "Tea?"),)),
    )


def test_content_reads_replies_and_promotions(folder: Path) -> None:
    hello = ReplyLine("hello.1", "Hello.", ("hi", "hello"), topic="hello", group="talk")
    assert content.load(folder).replies == (
        hello,
        replace(hello, id="hello.2", text="Hey!", persona="lively"),
        replace(hello, id="hello.3", text="Hiya!", persona="lively"),
        ReplyLine(
            "films", "Films are free.", ("what is on",), persona="calm", surface="tv", topic="promotion", group="talk",
            valid_from=datetime(2026, 6, 1, tzinfo=UTC), valid_until=datetime(2026, 6, 8, tzinfo=UTC),
        ),
    )  # fmt: skip


def test_content_phrases_are_distinct_and_in_file_order(folder: Path) -> None:
    assert content.load(folder).phrases() == [
        "wake me at six", "up early sunday", "stop", "lamp on", "pay my bill", "yay", "hello", "you junk", "make it eight", "yes",
        "hi", "what is on",
    ]  # fmt: skip


def line(name: str, number: int, text: str) -> Callable[[Path], None]:
    """Replace one line of a file."""

    def harm(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        lines[number - 1] = text
        (folder / name).write_text("\n".join(lines) + "\n")

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(line("emotions.txt", 1, ""), "emotions.txt:2: a phrase before the first '## label' line", id="no-label"),
        pytest.param(line("emotions.txt", 3, "## "), "emotions.txt:3: expected '## label'", id="empty-label"),
        pytest.param(line("emotions.txt", 3, "##neutral"), "emotions.txt:3: expected '## label'", id="label-without-blank"),
        pytest.param(line("intents/alarms.txt", 4, "at [six]"), r"alarms.txt:4: brackets that do not form", id="no-slot-name"),
        pytest.param(line("intents/alarms.txt", 5, "at [six](Time)"), "alarms.txt:5: brackets that", id="slot-in-capitals"),
        pytest.param(line("intents/alarms.txt", 7, "at [](time)"), "alarms.txt:7: brackets that", id="empty-slot"),
        pytest.param(line("intents/alarms.txt", 7, "at [[six](time)](date)"), "alarms.txt:7: brackets that", id="nested-slots"),
        pytest.param(line("out_of_scope.txt", 2, "pay :) now"), "out_of_scope.txt:2: brackets that", id="smiley"),
        pytest.param(line("contexts.tsv", 1, "user: a\tb"), "contexts.tsv:1: expected 'role: previous", id="two-fields"),
        pytest.param(line("contexts.tsv", 2, "user: a\tb\tc\td"), "contexts.tsv:2: expected 'role: previous", id="four-fields"),
        pytest.param(line("contexts.tsv", 2, "robot: a\tb\tc"), "contexts.tsv:2: expected 'role: previous", id="unknown-role"),
        pytest.param(line("contexts.tsv", 2, "user: a\t\tc"), "contexts.tsv:2: expected 'role: previous", id="no-phrase"),
        pytest.param(line("contexts.tsv", 2, "user: a\tb\t"), "contexts.tsv:2: expected 'role: previous", id="no-context-label"),
        pytest.param(line("replies/talk.toml", 3, "topic = hello"), r"talk.toml: .*line 3", id="no-toml"),
        pytest.param(line("replies/talk.toml", 3, ""), "talk.toml: group 1: topic: missing", id="no-topic"),
        pytest.param(line("replies/talk.toml", 4, ""), "talk.toml: group 1: emotion: missing", id="no-emotion"),
        pytest.param(line("replies/talk.toml", 5, 'prompts = "hi"'), "talk.toml: group 1: prompts: .*wrong kind", id="prompts-text"),
        pytest.param(line("replies/talk.toml", 6, 'any = "Hello."'), "talk.toml: group 1: any: .*wrong kind", id="reply-text"),
        pytest.param(line("replies/talk.toml", 7, 'livly = ["Hey!"]'), "talk.toml: group 1: livly: .*unknown", id="misspelt-voice"),
        pytest.param(line("replies/talk.toml", 10, ""), "talk.toml: promotion 1: id: missing", id="no-id"),
        pytest.param(line("replies/talk.toml", 12, "reply = 1"), "talk.toml: promotion 1: reply: .*wrong kind", id="reply-number"),
        pytest.param(line("replies/talk.toml", 15, 'valid_from = "June"'), "promotion 1: valid_from: .*wrong kind", id="no-date"),
    ],
)  # fmt: skip
def test_content_says_where_it_is_wrong(folder: Path, harm: Callable[[Path], None], message: str) -> None:
    content.load(folder)  # the control: unharmed it loads
    harm(folder)
    with pytest.raises(ContentInvalid, match=message):
        content.load(folder)


def test_content_labelled_file_may_bring_its_first_label(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n## other\ntwo\n")
    assert [e.label for e in read_labelled(tmp_path / "x.txt", label="first")] == ["first", "other"]


@pytest.mark.parametrize(
    ("example", "held_out"),
    [
        (Example("hello", "greeting"), True),  # SHA-256 2c..., and below 34 is held out
        (Example("white", "color"), True),  # 01...
        (Example("stop", "stop"), False),  # 6c...
        (Example("ёлка", "x"), False),  # ad...
        (Example("yes", "order", context=(Turn("assistant", "Now?"),)), True),  # of "Now?\nyes": 16...
        (Example("yes", "order", context=(Turn("assistant", "Tea?"),)), False),  # 42...
        (Example("yes", "alarm_set", context=(Turn("user", "wake me"),)), False),  # 34...
    ],
)
def test_content_split_never_moves(example: Example, held_out: bool) -> None:
    """Pinned: a phrase that once was tested on is never trained on later."""
    assert example.held_out == held_out


def test_content_split_depends_on_what_is_said_alone() -> None:
    one, other = Example("stop", "a", "x"), Example("stop", "b", "y", (Slot("time", 0, 4),))
    assert one.held_out == other.held_out


# --- what ships ---


@pytest.fixture(scope="module")
def shipped() -> Content:
    return content.load()


def labels(examples: tuple[Example, ...]) -> Counter[str]:
    """Distinct phrases per label."""
    return Counter(label for label, _ in {(e.label, (e.context, normalize(e.text).text)) for e in examples})


def test_content_has_40_intents_of_25_phrases(shipped: Content) -> None:
    found = labels(shipped.intents)
    assert len(found) >= 40
    assert min(found.values()) >= 25


def test_content_has_8_domains(shipped: Content) -> None:
    assert len({example.group for example in shipped.intents}) >= 8


def test_content_has_300_phrases_out_of_scope(shipped: Content) -> None:
    assert labels(shipped.out_of_scope)["out_of_scope"] >= 300


def test_content_has_7_emotions_and_neutral_of_40_phrases(shipped: Content) -> None:
    found = labels(shipped.emotions)
    assert len(found.keys() - {"neutral"}) >= 7
    assert "neutral" in found
    assert min(found.values()) >= 40


def test_content_has_200_toxic_and_200_acceptable_phrases(shipped: Content) -> None:
    found = labels(shipped.toxicity)
    assert found.keys() == {"toxic", "acceptable"}
    assert min(found.values()) >= 200


def test_content_has_200_contexts(shipped: Content) -> None:
    assert labels(shipped.contexts).total() >= 200
    assert all(example.context for example in shipped.contexts)


def test_content_has_600_replies_with_an_id_each(shipped: Content) -> None:
    assert len({reply.id for reply in shipped.replies}) == len(shipped.replies) >= 600


def test_content_personas_answer_the_same_questions_differently(shipped: Content) -> None:
    said: dict[str, dict[str, set[str]]] = {"calm": defaultdict(set), "lively": defaultdict(set)}
    for reply in shipped.replies:
        for prompt in reply.prompts if reply.persona else ():
            said[reply.persona][prompt].add(reply.text)
    both = said["calm"].keys() & said["lively"].keys()
    assert len(both) >= 300
    assert not [prompt for prompt in both if said["calm"][prompt] & said["lively"][prompt]]


def test_content_has_10_promotions_with_an_end(shipped: Content) -> None:
    promotions = [reply for reply in shipped.replies if reply.topic == "promotion"]
    assert len(promotions) >= 10
    assert all(p.valid_from and p.valid_until and p.valid_from < p.valid_until for p in promotions)
    assert all(p.valid_from and p.valid_from.utcoffset() is not None for p in promotions)


def test_content_replies_name_known_personas_emotions_and_surfaces(shipped: Content) -> None:
    assert {reply.persona for reply in shipped.replies} == {"", "calm", "lively"}
    assert {reply.surface for reply in shipped.replies} <= {"", "speaker", "tv", "phone", "car"}
    assert {reply.emotion for reply in shipped.replies} <= {"", *labels(shipped.emotions)}


FAMILIES: dict[str, Callable[[Content], tuple[Example, ...]]] = {
    "intents-and-out-of-scope": lambda c: (*c.intents, *c.out_of_scope),
    "emotions": lambda c: c.emotions,
    "toxicity": lambda c: c.toxicity,
    "contexts": lambda c: c.contexts,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_content_no_phrase_has_two_labels(
    shipped: Content, family: Callable[[Content], tuple[Example, ...]]
) -> None:
    found: dict[object, set[str]] = defaultdict(set)
    for example in family(shipped):
        found[example.context, normalize(example.text).text].add(example.label)
    assert {said: names for said, names in found.items() if len(names) > 1} == {}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_content_no_phrase_stands_twice(
    shipped: Content, family: Callable[[Content], tuple[Example, ...]]
) -> None:
    found = Counter((example.context, normalize(example.text).text) for example in family(shipped))
    assert [said for said, count in found.items() if count > 1] == []


def test_content_no_prompt_has_two_topics(shipped: Content) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for reply in shipped.replies:
        for prompt in reply.prompts if reply.topic != "promotion" else ():
            found[normalize(prompt).text].add(reply.topic)
    assert {prompt: topics for prompt, topics in found.items() if len(topics) > 1} == {}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_content_holds_a_fifth_out(
    shipped: Content, family: Callable[[Content], tuple[Example, ...]]
) -> None:
    examples = family(shipped)
    assert sum(example.held_out for example in examples) / len(examples) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_content_every_label_is_in_both_splits(
    shipped: Content, family: Callable[[Content], tuple[Example, ...]]
) -> None:
    splits = Counter((example.label, example.held_out) for example in family(shipped))
    assert {label for label, _ in splits} == {label for label, held_out in splits if held_out}
    assert {label for label, _ in splits} == {label for label, held_out in splits if not held_out}


def test_content_every_phrase_is_one_the_service_accepts(shipped: Content) -> None:
    turns = [turn.text for example in shipped.contexts for turn in example.context]
    assert all(normalize(text).text for text in (*shipped.phrases(), *turns))


def test_content_slots_keep_their_place_in_normal_form(shipped: Content) -> None:
    """The slot head is trained on the phrase with the offsets of the text."""
    moved = [e.text for e in shipped.intents if e.slots and normalize(e.text).text != e.text.casefold()]
    assert moved == []
    assert all(len(e.text.casefold()) == len(e.text) for e in shipped.intents if e.slots)


def test_content_slots_hold_whole_words(shipped: Content) -> None:
    cut = [
        example.text
        for example in shipped.intents
        for slot in example.slots
        if example.text[slot.start : slot.end] != example.text[slot.start : slot.end].strip()
        or (slot.start and example.text[slot.start - 1].isalnum())
        or (slot.end < len(example.text) and example.text[slot.end].isalnum())
    ]
    assert cut == []
