"""Heads of word lists and patterns: they answer exactly what they were told to, and refuse rules that make no sense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotators.annotator import Annotation, Heard, Label, Span, Status
from annotators.head import HeadInvalid, Spec, write
from annotators.rules import RulesHead
from tests.annotators.toys import encoded, make_spec

NOTHING = encoded([0, 0])
RULES = [
    {"label": "stop", "phrases": ["stop", "стоп", "that's enough!"]},
    {"label": "clock", "pattern": r"\d\d:\d\d"},
    {"label": "number", "pattern": r"\d+"},
]


def rules_spec(rules: Any) -> Spec:
    return make_spec(("stop", "clock", "number"), kind="rules", params={"rules": rules})


def answer(phrase: str, rules: Any = RULES) -> Annotation:
    return RulesHead(rules_spec(rules)).annotate(Heard.alone(phrase, NOTHING))


@pytest.mark.parametrize(
    "phrase", ["stop", "стоп", "stop!", "stop...", " stop ,", "that's enough", "that's enough!"]
)
def test_rules_whole_phrase_of_the_list_is_its_label(phrase: str) -> None:
    assert answer(phrase).labels == (Label("stop", 1.0, True, 1.0, 1.0),)


@pytest.mark.parametrize("phrase", ["stop it", "nonstop", "st.op", "sto", "Stop", "clock"])
def test_rules_other_phrases_are_no_label(phrase: str) -> None:
    annotation = answer(phrase)
    assert annotation == Annotation("toy", "rules", Status.OK)


def test_rules_patterns_mark_every_match_left_to_right() -> None:
    assert answer("from 5 to 10:30").spans == (
        Span("number", 5, 6, 1.0),
        Span("number", 10, 12, 1.0),
        Span("clock", 10, 15, 1.0),
        Span("number", 13, 15, 1.0),
    )


def test_rules_spans_count_code_points() -> None:
    assert answer("🐈 в 10:30", [RULES[1]]).spans == (Span("clock", 4, 9, 1.0),)


def test_rules_match_the_heaviest_hypothesis() -> None:
    turn = Heard(("go", "stop"), (NOTHING, NOTHING), (0.25, 0.75), 1)
    assert [label.label for label in RulesHead(rules_spec(RULES)).annotate(turn).labels] == ["stop"]


def test_rules_come_back_as_saved(tmp_path: Path) -> None:
    head = RulesHead(rules_spec(RULES))
    head.save(tmp_path)
    loaded = RulesHead.load(tmp_path)
    assert (loaded.spec, loaded.phrases, loaded.patterns) == (head.spec, head.phrases, head.patterns)
    assert loaded.annotate(Heard.alone("stop", NOTHING)).version == loaded.version != ""


def test_rules_without_rules_never_answer() -> None:
    assert answer("stop", []) == Annotation("toy", "rules", Status.OK)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        pytest.param(
            [{"label": "go", "phrases": ["go"]}],
            "found a rule for label 'go', expected one of the head's labels",
            id="unknown label",
        ),
        pytest.param([{"phrases": ["go"]}], "found a rule for label ''", id="no label"),
        pytest.param(
            [{"label": "stop", "phrases": ["halt"]}, {"label": "clock", "phrases": ["halt"]}],
            "found 'halt' under two labels, expected one label a phrase",
            id="one phrase, two labels",
        ),
        pytest.param(
            [{"label": "stop", "phrases": ["halt"]}, {"label": "clock", "phrases": ["halt!"]}],
            "found 'halt!' under two labels, expected one label a phrase",
            id="two labels, told apart by a mark nobody hears",
        ),
        pytest.param(
            [{"label": "clock", "pattern": "(:"}],
            r"found pattern '\(:': .*, expected a regular expression; mend it",
            id="no pattern",
        ),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(HeadInvalid, match=message):
        RulesHead(rules_spec(rules))


def with_tests(tests: Any) -> Spec:
    """The rules above, with tests of their own."""
    params = {"rules": RULES, "tests": tests}
    return make_spec(("stop", "clock", "number"), kind="rules", params=params)


PASSING = {
    "stop!": ["stop"],
    "стоп": ["stop"],
    "at 10:30": ["number=10", "clock=10:30", "number=30"],
    "nothing here": [],
}


def test_rules_that_pass_their_own_tests_load(tmp_path: Path) -> None:
    RulesHead(with_tests(PASSING)).save(tmp_path)
    assert RulesHead.load(tmp_path).spec.params["tests"] == PASSING


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        pytest.param({"stop": []}, "found 'stop' answered with ['stop'], expected []; mend the rule or its test", id="a label"),
        pytest.param({"halt": ["stop"]}, "found 'halt' answered with [], expected ['stop']; mend the rule or its test", id="no label"),
        pytest.param({"стоп": ["clock"]}, "found 'стоп' answered with ['stop'], expected ['clock']", id="another label"),
        pytest.param({"at 5": ["number=6"]}, "found 'at 5' answered with ['number=5'], expected ['number=6']", id="another span"),
        pytest.param({"at 5": ["number"]}, "found 'at 5' answered with ['number=5'], expected ['number']", id="a span is no label"),
        pytest.param({"5 or 6": ["number=6", "number=5"]}, "answered with ['number=5', 'number=6'], expected ['number=6', ", id="order"),
        pytest.param(["stop"], "found params.tests = ['stop'], expected lists of expectations by phrase", id="no phrases"),
        pytest.param({"stop": "stop"}, "found params.tests = {'stop': 'stop'}, expected lists of expectations", id="a word for a list"),
        pytest.param({"stop": 1}, "found params.tests = {'stop': 1}, expected lists of expectations by phrase", id="a number"),
    ],
)  # fmt: skip
def test_rules_that_fail_their_own_tests_do_not_load(tmp_path: Path, tests: Any, message: str) -> None:
    write(tmp_path, with_tests(tests), {})
    with pytest.raises(HeadInvalid, match=re.escape(message)):
        RulesHead.load(tmp_path)


def test_rules_may_repeat_a_phrase_of_one_label() -> None:
    assert answer("halt", [{"label": "stop", "phrases": ["halt", "halt!"]}]).labels[0].label == "stop"


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        pytest.param(
            [{"label": "stop", "phrases": "stop"}], "params.rules.0.phrases: ", id="a word for a list, heard as its letters"
        ),
        pytest.param([{"label": "stop", "phrase": ["stop"]}], "params.rules.0.phrase: ", id="a misspelt key, never heard"),
        pytest.param([RULES[0], {"label": "clock", "pattern": 7}], "params.rules.1.pattern: ", id="a number for a pattern"),
        pytest.param(["stop"], "params.rules.0: ", id="a word for a rule"),
        pytest.param(7, "params.rules: ", id="no list"),
    ],
)  # fmt: skip
def test_rules_of_another_shape_are_refused(rules: Any, where: str) -> None:
    with pytest.raises(
        HeadInvalid,
        match=f"found {where}.*, expected rules of a label with phrases or a pattern; mend the rule",
    ):
        RulesHead(rules_spec(rules))


def test_rules_with_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, rules_spec(RULES), {"weight": np.zeros(1, np.float32)})
    with pytest.raises(HeadInvalid, match="found tensors weight, expected none"):
        RulesHead.load(tmp_path)
