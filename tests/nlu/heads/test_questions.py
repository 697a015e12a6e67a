"""nlu.heads.questions: pairs as written, questions that are fair, and places that agree with the exact index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from index.adapter import Residual
from index.exact import ExactIndex
from nlu.heads.questions import Library, Question, new_questions, old_questions, places, read_pairs
from tests.nlu.heads.toy_library import DIM, Floats, make_library, make_world

PROMPTS = {
    "tea": ["kettle on please", "a cup of tea", "чайник поставь"],
    "moon": ["what a round moon tonight", "луна над крышей"],
    "lone": ["the only prompt of this reply"],
    "two": ["a cup of tea"],  # shares a prompt, so a vector, with "tea"
}
LONE = PROMPTS["lone"][0]
SAID = ("put the kettle on", "налей чаю", "cup of something hot")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    phrases = dict.fromkeys([*(each for some in PROMPTS.values() for each in some), *SAID])
    drawn = np.random.default_rng(0).standard_normal((len(phrases), DIM)).astype(np.float32)
    vectors: dict[str, Floats] = dict(
        zip(phrases, drawn / np.linalg.norm(drawn, axis=1, keepdims=True), strict=True)
    )
    return make_library(tmp_path / "index", PROMPTS, vectors)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(text.encode())
    return path


def test_questions_pairs_are_normalised_and_merged(library: Library, tmp_path: Path) -> None:
    text = "\ufeffPut  the kettle on\ttea\r\n\r\nналей чаю\ttea\nput the kettle on\ttwo\nput the kettle on\ttea\n"
    pairs = read_pairs(written(tmp_path, text), library)
    assert pairs == {"put the kettle on": ["tea", "two"], "налей чаю": ["tea"]}


def test_questions_bad_lines_are_named_by_number(library: Library, tmp_path: Path) -> None:
    good = "налей чаю\ttea\n"
    assert read_pairs(written(tmp_path, good), library)  # the control
    text = f"{good}no tab at all\nhot\tcoffee\na\tb\tc\n{good}\u200b\ttea\n"
    with pytest.raises(ValueError) as refused:
        read_pairs(written(tmp_path, text), library)
    lines = str(refused.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"pairs.tsv:{n}" for n in (2, 3, 4, 6)]
    assert "found 1 fields, expected query<TAB>reply id" in lines[0]
    assert "found reply id 'coffee', expected one of the bundle's index; add the reply" in lines[1]
    assert all("found" in line and "expected" in line for line in lines)


def test_questions_many_bad_lines_are_counted(library: Library, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read_pairs(written(tmp_path, "bad\n" * 12), library)
    assert str(refused.value).splitlines()[-1] == "and 7 lines more"


def test_questions_pairs_that_are_not_utf8_are_refused(library: Library, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_bytes("чай\ttea\n".encode("cp1251"))
    with pytest.raises(ValueError, match=r"pairs.tsv: found .*expected UTF-8 text; save it as UTF-8"):
        read_pairs(tmp_path / "pairs.tsv", library)


def rows_of(library: Library, *prompts: str) -> list[int]:
    """Vectors by the prompts they were made from."""
    known = {library.prompt_of(vector): vector for vector in range(len(library.rows))}
    return sorted(known[prompt] for prompt in prompts)


def test_questions_of_new_phrases_know_every_right_row(library: Library) -> None:
    said = {"налей чаю": ["tea"], "cup of something hot": ["two", "moon"]}
    tea, both = sorted(new_questions(said, library), key=lambda question: question.group)
    assert (tea.group, tea.right.tolist(), tea.hidden) == ("tea", rows_of(library, *PROMPTS["tea"]), -1)
    assert both.right.tolist() == rows_of(library, "a cup of tea", *PROMPTS["moon"])
    assert both.group == "two"


def test_questions_that_are_prompts_already_are_asked_without_their_own_row(library: Library) -> None:
    (question,) = new_questions(
        {"луна над крышей": ["moon"], LONE: ["lone"]}, library
    )  # the lone one says nothing new
    assert question.right.tolist() == rows_of(library, "what a round moon tonight")
    assert question.hidden == rows_of(library, "луна над крышей")[0]


def test_questions_of_old_prompts_leave_the_prompt_itself_out(tmp_path: Path) -> None:
    library, pairs = make_world(tmp_path / "index")
    taught = {reply for replies in pairs.values() for reply in replies}
    kept, held = old_questions(library, taught=taught, most=1000)
    own = [question.hidden for question in (*kept, *held)]
    assert len(set(own)) == len(own) == 100  # each old prompt once, learnt from or held out, and no new one
    for question in (*kept, *held):
        assert np.array_equal(question.vector, library.rows[question.hidden])
        mates = library.vectors_of(library.replies_of(question.hidden))
        assert set(question.right.tolist()) == mates - {question.hidden}
        assert question.group not in taught
    assert min(len(kept), len(held)) > 30


def test_questions_held_out_stay_held_out_when_content_grows(tmp_path: Path) -> None:
    library, _ = make_world(tmp_path / "index")

    def held(taught: set[str]) -> set[int]:
        return {question.hidden for question in old_questions(library, taught=taught, most=1000)[1]}

    assert held({"old3"}) == held(set()) - library.vectors_of(["old3"])
    fewer = old_questions(library, taught=set(), most=5)
    assert [len(part) for part in fewer] == [5, 5]


def test_questions_of_a_lone_prompt_are_half_of_its_words(library: Library) -> None:
    (question,) = (
        question
        for part in old_questions(library, taught={"moon"}, most=10)
        for question in part
        if question.group == "lone"
    )
    assert question.hidden == -1
    assert question.right.tolist() == rows_of(library, LONE)


def test_questions_need_old_content(library: Library) -> None:
    with pytest.raises(ValueError, match="old content: found 0 prompts .* expected enough .* take a bundle"):
        old_questions(library, taught=set(PROMPTS), most=10)


@pytest.mark.parametrize("moved", [False, True], ids=["as-is", "moved"])
def test_questions_places_are_those_of_the_exact_index(tmp_path: Path, moved: bool) -> None:
    library, pairs = make_world(tmp_path / "index")
    rng = np.random.default_rng(3)
    residual = (
        Residual.of(rng.standard_normal((2, DIM)), rng.standard_normal((DIM, 2)), 0.4) if moved else None
    )
    questions: list[Question] = [
        *new_questions(pairs, library),
        *old_questions(library, taught={"new0"}, most=40)[1],
    ]
    twin = ExactIndex(library.rows)
    wanted = []
    for question in questions:
        visible = np.ones(len(twin), np.bool_)
        visible[question.hidden] = question.hidden < 0
        vector = question.vector if residual is None else residual.apply(question.vector)
        hits = twin.search(vector, len(twin), mask=np.packbits(visible, bitorder="little"))
        wanted.append(1 + int(np.flatnonzero(np.isin(hits.rows, question.right))[0]))
    found = places(questions, library.rows, residual)
    assert found.tolist() == wanted
    assert len(set(wanted)) > 5  # no accident
