"""nlu.retrieval.survey: which rows are one reply."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from nlu.normalizer import normalize
from nlu.retrieval.read import Prompt, Row
from nlu.retrieval.survey import Merge, Survey, banned_by, identity


def row(text: str, **more: Any) -> Row:
    return Row(where="r.tsv:1", text=text, phrase=normalize(text).text, **more)


def numbers(merge: Merge, *rows: Row) -> list[int]:
    survey = Survey(merge)
    assert [survey.put(each) for each in rows] == [""] * len(rows)
    return [survey.number(each) for each in rows]


@pytest.mark.parametrize(
    ("merge", "expected"), [("same", [0, 0, 1, 0]), ("near", [0, 0, 1, 0]), ("off", [0, 1, 2, 0])]
)
def test_survey_rows_of_the_same_words_are_one_reply(merge: Merge, expected: list[int]) -> None:
    assert numbers(merge, row("Well, yes."), row("well yes"), row("Well, no."), row("WELL, yes.")) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"personas": ("calm",)}, {"surfaces": ("tv",)}, {"emotion": "joy"},
        {"valid_from": datetime(2026, 1, 1, tzinfo=UTC)}, {"valid_until": datetime(2026, 1, 1, tzinfo=UTC)},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_survey_other_personas_surfaces_times_or_moods_are_other_replies(other: dict[str, Any]) -> None:
    assert numbers("same", row("yes"), row("yes", **other), row("yes!", **other)) == [0, 1, 1]
    assert identity(row("yes")) != identity(row("yes", **other))


def test_survey_unites_weights_and_tags() -> None:
    survey = Survey("same")
    for text, weight, tags in (
        ("Yes.", 1.0, ("b",)),
        ("no", 5.0, ()),
        ("yes", 3.0, ("a", "b")),
        ("yes!", 2.0, ()),
    ):
        survey.put(row(text, weight=weight, tags=tags))
    assert (survey.weight(0), survey.tags(0), survey.weight(1), survey.tags(1)) == (3.0, ("a", "b"), 5.0, ())
    assert (survey.rows, len(survey), survey.shared) == (4, 2, {0})


def test_survey_counts_what_it_saw() -> None:
    survey = Survey("same")
    survey.put(
        row("yes", prompts=(Prompt("A?", "a?"), Prompt("b", "b")), personas=("calm",), surfaces=("tv",))
    )
    survey.put(row("no", personas=("calm", "lively")))
    assert (survey.prompts, survey.without_prompt) == (2, 1)
    assert (survey.personas, survey.surfaces) == ({"calm", "lively"}, {"tv"})


@pytest.mark.parametrize("merge", ["same", "off"])
def test_survey_an_id_belongs_to_one_reply(merge: Merge) -> None:
    survey = Survey(merge)
    assert survey.put(row("yes", id="a")) == ""
    assert survey.put(row("yes", id="a", prompts=(Prompt("really", "really"),))) == ""
    for other in (row("no", id="a"), row("yes", id="a", personas=("calm",))):
        assert survey.put(other).startswith("id: found 'a', which another reply has, expected one of its own")
        assert survey.number(other) == -1
    assert (len(survey), survey.rows) == (1, 2)
    assert survey.put(row("no", id="b")) == "" and survey.number(row("no", id="b")) == 1


def test_survey_ids_of_the_same_words_are_one_reply() -> None:
    assert numbers("same", row("Yes.", id="a"), row("yes", id="b"), row("yes!", id="a")) == [0, 0, 0]
    assert numbers("off", row("Yes.", id="a"), row("yes", id="b")) == [0, 1]


def test_survey_identity_is_stable() -> None:
    assert identity(row("Чай готов.")) == identity(row("чай  ГОТОВ.")) == "1cd0d9bdd64fd5da"
    assert identity(row("чай готов.", id="tea")) == "tea"
    assert identity(row("чай готов.", weight=2.0, tags=("a",))) == identity(row("чай готов."))


def test_survey_unite_makes_two_replies_one() -> None:
    survey = Survey("near")
    for text, weight, tags in (("a b", 1.0, ("x",)), ("a b c", 4.0, ("y",)), ("a b c d", 2.0, ())):
        survey.put(row(text, weight=weight, tags=tags))
    assert survey.unite(1, 0)
    assert not survey.unite(2, 1)  # it is gone
    assert not survey.unite(1, 0)
    assert [survey.kept(number) for number in range(3)] == [0, 0, 2]
    assert (survey.weight(0), survey.tags(0)) == (4.0, ("x", "y"))
    assert survey.unite(2, 0) and survey.shared == {0}


def test_survey_bans_by_id_and_by_text() -> None:
    bans = banned_by(["tea.1", "  Shut UP  ", "...", "", "nobody says this"], uncased=True)
    survey = Survey("near", bans)
    for each in (row("Tea?", id="tea.1"), row("shut up"), row("shut up now"), row("fine"), row("Shut up!")):
        survey.put(each)
    assert survey.banned == {0, 1} and survey.matched == {"tea.1", "Shut UP"}
    assert not survey.unite(2, 1)  # nobody banned that
    assert survey.unite(3, 2)


def test_survey_a_row_that_was_not_met_has_no_number() -> None:
    survey = Survey("same")
    survey.put(row("yes"))
    assert survey.number(row("no")) == -1
    assert survey.number(replace(row("yes"), personas=("calm",))) == -1
