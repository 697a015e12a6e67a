"""nlu.training.exams: every judge on vectors given by hand, and what it may learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")

from annotators.annotator import Encoding
from nlu.training import datasets, exams
from nlu.training.candidate import Candidate
from nlu.training.config import Evaluate
from nlu.training.datasets import TRAIN
from nlu.training.desk import SIZES, Desk, draw_shots
from nlu.training.evaluate import sit
from nlu.training.exams import EXAMS, under_noise
from tests.nlu.training.toy import dialog, make_toy, tagged, write

SETTINGS = Evaluate(shots=(2, 3), seeds=3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_exams_shots_are_disjoint_from_test(toy: Path) -> None:
    desk = Desk(toy, SETTINGS, SIZES["quick"], uncased=True)
    part = exams._part(desk, "banking77", 1, dev=False)
    shots = {part.train[i] for seed in range(3) for i in draw_shots(part.labels, 3, seed)}
    assert shots and not shots & set(part.tests[""])
    assert "lost card" in {e.phrase for e in desk.labelled("banking77", TRAIN, 0)}, "the toy set does overlap"
    assert "lost card" not in part.train


def test_exams_noise_is_fixed_and_changes_phrases() -> None:
    said = [
        "turn on the lights in the kitchen",
        "what is the weather for tomorrow",
        "включи свет на кухне",
    ] * 2
    noises = under_noise(said, said, 0.3, uncased=True)
    assert set(noises) == {"typos", "misheard"}
    assert noises == under_noise(said, said, 0.3, uncased=True)
    for heard in noises.values():
        assert len(heard) == len(said) and heard[:3] == heard[3:]
        assert sum(a != b for a, b in zip(heard, said, strict=True)) >= 4
    assert noises["typos"] != noises["misheard"]
    assert under_noise(said, said, 0.0, uncased=True) == {"typos": tuple(said), "misheard": tuple(said)}


def by_hand(vector: Callable[[str], Sequence[float]]) -> Candidate:
    """A candidate whose sentence vector is a function of the phrase, and whose token vectors are that of each word."""

    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        found = []
        for phrase in phrases:
            sentence = np.array(vector(phrase), np.float32)
            words = phrase.split(" ")
            ends = np.cumsum([len(word) + 1 for word in words]) - 1
            offsets = np.stack([ends - [len(word) for word in words], ends], axis=1).astype(np.int32)
            pieces = np.array([vector(word) for word in words], np.float32)
            found.append(Encoding(sentence, pieces, offsets) if tokens else Encoding(sentence))
        return found

    return Candidate("by hand", True, encode)


def values_of(exam: str, data: Path, candidate: Candidate) -> dict[tuple[str, str, str], float]:
    chosen = next(each for each in EXAMS if each.data == exam)
    desks = {True: Desk(data, SETTINGS, SIZES["quick"], uncased=True)}
    lines = sit(chosen, [candidate], desks, 10)
    return {(line.task, line.condition, line.metric): line.scores[0].value for line in lines}


def test_exams_similarity_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "stsb/en_test.tsv.gz", ["x\tx0\t5", "x\tx30\t1", "x\tx60\t2.5"])

    def angle(phrase: str) -> tuple[float, float]:
        radians = np.deg2rad(float(phrase.removeprefix("x") or 0))
        return float(np.cos(radians)), float(np.sin(radians))

    # cosines 1, 0.87, 0.5 against scores 1st, 3rd, 2nd
    assert values_of("stsb.en", tmp_path, by_hand(angle)) == {
        ("similarity", "cosine", "Spearman"): pytest.approx(0.5)
    }


def test_exams_replies_by_hand(tmp_path: Path) -> None:
    turns = [["alpha", "beta"], ["gamma", "delta"], ["epsilon", "zeta"]]
    write(tmp_path / "self_dialogue/test.jsonl.gz", [dialog(*pair) for pair in turns])
    vectors = {
        **{"alpha": (1, 0, 0), "beta": (1, 0, 0), "gamma": (0, 1, 0), "delta": (0, 0.8, 0.6)},
        **{"epsilon": (0, 1, 0), "zeta": (0, 0, 1)},  # nearer to delta
    }
    found = values_of("self_dialogue", tmp_path, by_hand(lambda phrase: vectors[phrase]))
    assert found == {("replies", "1 of 100", "R@1"): pytest.approx(2 / 3)}


def test_exams_spans_by_hand(tmp_path: Path) -> None:
    train = [
        tagged("call anna", "OB", "who"),
        tagged("call me", "OO", "who"),
        tagged("anna please", "BO", "who"),
    ] * 4
    train += [
        tagged("anna", "O", "who")
    ] * 9  # a small sample keeps to rows with spans, so these mislead nobody
    test = [tagged("now call anna", "OOB", "who"), tagged("me", "B", "who"), tagged("anna anna", "BO", "who")]
    write(tmp_path / "wnut17/train.jsonl.gz", train)
    write(tmp_path / "wnut17/test.jsonl.gz", test)
    found = values_of("wnut17", tmp_path, by_hand(lambda text: (5.0 * (text == "anna"), 1.0)))
    # 2 right (the first anna of either), 3 found, 3 wanted
    assert found == {("entities", "full", "span F1"): pytest.approx(2 * 2 / 6)}


def test_exams_emotions_by_hand(tmp_path: Path) -> None:
    rows = [
        "ha\tjoy",
        "ho\tjoy",
        "grr\tanger",
        "argh\tanger",
        "ha grr\tjoy,anger",
        "hm\tneutral",
        "so\tneutral",
    ]
    write(
        tmp_path / "goemotions/train.tsv.gz", [row.replace("\t", f" {i}\t") for i in range(6) for row in rows]
    )
    write(tmp_path / "goemotions/dev.tsv.gz", rows)
    write(
        tmp_path / "goemotions/test.tsv.gz",
        ["ha x\tjoy", "grr x\tneutral", "so x\tneutral", "ha grr x\tjoy,anger"],
    )
    letters = {"joy": ("ha", "ho"), "anger": ("grr", "argh"), "neutral": ("hm", "so")}

    def vector(phrase: str) -> list[float]:
        return [float(any(word in phrase.split() for word in words)) for words in letters.values()]

    found = values_of("goemotions", tmp_path, by_hand(vector))
    # one label: joy right, neutral once of two, nobody is wrongly neutral
    assert found["emotion", "one label", "macro-F1"] == pytest.approx((1 + 2 / 3) / 2)
    # all labels: joy 2 of 2; anger found once and once too often; neutral 1 of 2
    assert found["emotion", "all labels", "macro-F1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_exams_intents_by_hand(toy: Path) -> None:
    strangers = {"qqq one", "qqq two"}

    def vector(phrase: str) -> tuple[float, ...]:
        if phrase in strangers:
            return (0.5, 0.5, 0.5, 0.5)
        last = "lights music stop".split()
        return tuple(float(word in phrase) for word in last) + (0.01 * len(phrase),)

    found = values_of("clinc150", toy, by_hand(vector))
    assert found["intents", "full", "accuracy"] == 1.0
    assert found["intents", "full", "F1.8"] == 1.0
    assert found["intents", "3-shot", "accuracy"] == 1.0
    assert found["out of scope", "max softmax", "AUROC"] == 1.0
    assert {condition for task, condition, _ in found if task == "intents"} == {
        *("full", "2-shot", "3-shot", "full, typos", "2-shot, typos", "3-shot, typos"),
        *("full, misheard", "2-shot, misheard", "3-shot, misheard"),
    }


def test_exams_are_of_sets_that_exist() -> None:
    for exam in EXAMS:
        for name, split in exam.needs:
            assert datasets.find(name).files(split)
            assert exam.language in datasets.find(name).languages
    assert {exam.language for exam in EXAMS} == {"en", "ru"}


@pytest.mark.parametrize(("cap", "condition", "rows"), [(0, "all labels", 32), (6, "all labels, 6 train", 6)])
def test_exams_of_capped_sets_say_so(toy: Path, cap: int, condition: str, rows: int) -> None:
    met: list[str] = []

    def vector(phrase: str) -> list[float]:
        met.append(phrase)
        return [float(word in phrase) for word in ("ha", "grr", "hm")]

    exam = exams.many_labels("dialog acts", "goemotions", "en", "goemotions", train=cap)
    desk = Desk(toy, SETTINGS, SIZES["full"], uncased=True)
    (found,) = exam.prepare(desk)(by_hand(vector))
    assert found.condition == condition and found.items == 12
    assert sum(" " in text for text in met) == rows + 12 + 12  # train, dev, test; the rest are single words
