"""nlu.training.evaluate: numbers by hand and against their twins, draws, the store, and a whole run on toy files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'chorus-nlu[train]'")

from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, fbeta_score, roc_auc_score
from typer.testing import CliRunner

from annotators.annotator import Encoding
from nlu.__main__ import app
from nlu.public_data import Labelled
from nlu.training import datasets, evaluate
from nlu.training.config import Evaluate
from nlu.training.datasets import TRAIN, Pair
from nlu.training.evaluate import (
    EXAMS,
    REGULARISATIONS,
    SIZES,
    Candidate,
    Desk,
    Evaluation,
    Outcome,
    Rows,
    compare,
    draw_shots,
    under_noise,
)
from nlu.vectorizer import SPEC_FILE, Vectorizer
from tests.tiny import make_vectorizer

SETTINGS = Evaluate(shots=(2, 3), seeds=3)
BRIEF = Evaluate(shots=(2,), seeds=3)  # of whole runs


# --- numbers


def all_of(items: int) -> Rows:
    return np.arange(items)


def test_evaluate_macro_f_by_hand() -> None:
    gold, predicted = np.array(["a", "a", "b", "c"]), np.array(["a", "b", "b", "x"])
    # a: 1 of 2 found, nothing else taken for it; b: found, and one a taken for it; c: not found; x: no label here
    assert evaluate.macro_f(gold, predicted, 1.0)(all_of(4)) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    beta = 1.8**2
    assert evaluate.macro_f(gold, predicted, 1.8)(all_of(4)) == pytest.approx(
        ((1 + beta) / (beta * 2 + 1) + (1 + beta) / (beta + 2)) / 3
    )
    assert evaluate.macro_f(gold, predicted, 1.0)(np.array([3])) == 0.0


def test_evaluate_numbers_equal_their_twins() -> None:
    rng = np.random.default_rng(0)
    gold, predicted = (rng.integers(5, size=200).astype(str) for _ in range(2))
    rows = rng.integers(200, size=200)
    present = sorted(set(gold[rows]))
    assert evaluate.macro_f(gold, predicted, 1.8)(rows) == pytest.approx(
        fbeta_score(gold[rows], predicted[rows], beta=1.8, average="macro", labels=present, zero_division=0)
    )
    scores, other = rng.integers(20, size=200) / 20, rng.integers(20, size=200) / 20
    positive = rng.random(200) < 0.3
    assert evaluate.auroc(scores, positive)(rows) == pytest.approx(
        roc_auc_score(positive[rows], scores[rows])
    )
    assert evaluate.spearman(scores, other)(rows) == pytest.approx(
        float(spearmanr(scores[rows], other[rows]).statistic)
    )
    wanted, found = rng.random((200, 4)) < 0.3, rng.random((200, 4)) < 0.4
    assert evaluate.macro_f_of_many(wanted, found)(rows) == pytest.approx(
        f1_score(wanted[rows], found[rows], average="macro")
    )


def test_evaluate_auroc_and_spearman_by_hand() -> None:
    auroc = evaluate.auroc(np.array([0.9, 0.8, 0.3]), np.array([True, False, True]))
    assert auroc(all_of(3)) == 0.5  # one of the two pairs is right
    assert auroc(np.array([0, 2])) == 0.5  # nothing to tell apart
    assert evaluate.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))(all_of(3)) == 0.5
    assert evaluate.spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0]))(all_of(2)) == 0.0


def test_evaluate_span_f1_by_hand() -> None:
    counts = np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert evaluate.span_f1(counts)(all_of(3)) == pytest.approx(2 * 2 / (3 + 4))
    assert evaluate.span_f1(counts)(np.array([2])) == 0.0


def test_evaluate_right_first_goes_round_by_round() -> None:
    anchors = np.eye(4, dtype=np.float32)
    positives = np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]  # the first two are swapped
    assert evaluate.right_first(anchors, positives, 4).tolist() == [0, 0, 1, 1]
    assert evaluate.right_first(anchors, positives, 3).tolist() == [0, 0, 1]  # the rest makes no round
    assert evaluate.right_first(anchors, positives, 100).tolist() == [0, 0, 1, 1]  # fewer than a round
    alone = evaluate.right_first(anchors, positives, 1).tolist()
    assert alone == [1, 1, 1, 1], "one candidate is always first"


def test_evaluate_nearest_in_pieces_is_nearest() -> None:
    rng = np.random.default_rng(0)
    vectors, known = rng.random((1100, 3), np.float32), rng.random((7, 3), np.float32)
    assert np.array_equal(evaluate.nearest(vectors, known), (vectors @ known.T).max(axis=1))


def test_evaluate_principal_axes_are_those_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((400, 3)) * [0.1, 5.0, 1.0] + [7.0, 0.0, 0.0]).astype(np.float32)
    axes = evaluate.principal_axes(vectors)
    assert np.abs(axes).argmax(axis=0).tolist() == [1, 2, 0]
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-5)


# --- comparing


def hits_of(values: Iterable[float]) -> Outcome:
    hits = np.array(list(values))
    return Outcome("intents", "full", "accuracy", len(hits), evaluate.mean_of(hits))


def test_evaluate_compare_finds_no_change_in_equals() -> None:
    one, same = compare([hits_of([1, 0, 1, 1] * 50)] * 2, 200)
    assert one.value == same.value == 0.75 and one.low == same.low
    assert one.low is not None and one.high is not None and one.low < 0.75 < one.high
    assert one.change is None and one.verdict == 0
    assert (same.change, same.change_low, same.change_high, same.verdict) == (0.0, 0.0, 0.0, 0)


def test_evaluate_compare_is_paired() -> None:
    base = [1.0] * 100 + [0.0] * 100
    better = [1.0] * 112 + [0.0] * 88
    one, other = compare([hits_of(base), hits_of(better)], 300)
    assert other.change == pytest.approx(0.06) and other.verdict == 1
    assert one.high is not None and other.low is not None
    assert other.low < one.high, "side by side the intervals overlap; only the paired change tells"
    assert compare([hits_of(better), hits_of(base)], 300)[1].verdict == -1
    # the same two numbers from unrelated rows prove nothing
    assert compare([hits_of(base), hits_of([0.0] * 88 + [1.0] * 112)], 300)[1].verdict == 0


def test_evaluate_compare_does_not_pair_other_rows() -> None:
    assert compare([hits_of([1, 0]), hits_of([1, 0, 1])], 20)[1].change is None


# --- draws


LABELS = np.array(["a"] * 6 + ["b"] * 6 + ["c"])


def test_evaluate_shots_are_drawn_alike_each_time() -> None:
    rows = draw_shots(LABELS, 4, 1)
    assert rows.tolist() == draw_shots(LABELS, 4, 1).tolist()
    assert LABELS[rows].tolist() == ["a"] * 4 + ["b"] * 4 + ["c"], "a label with fewer gives what it has"
    assert len(set(rows.tolist())) == 9
    assert any(draw_shots(LABELS, 4, seed).tolist() != rows.tolist() for seed in (0, 2, 3))


def test_evaluate_fewer_shots_are_the_first_of_more_and_labels_do_not_disturb_each_other() -> None:
    more, fewer = draw_shots(LABELS, 5, 0), draw_shots(LABELS, 2, 0)
    assert set(fewer.tolist()) < set(more.tolist())
    assert draw_shots(LABELS[:6], 5, 0).tolist() == more[:5].tolist()


def test_evaluate_training_leaves_out_test_phrases() -> None:
    train = [Labelled("Hello there", ("a",)), Labelled("bye", ("b",))]
    assert evaluate.without(train, [Labelled("hello there", ("a",))]) == train[1:]


def test_evaluate_shots_are_disjoint_from_test(toy: Path) -> None:
    desk = Desk(toy, SETTINGS, SIZES["quick"], uncased=True)
    part = evaluate._part(desk, "banking77", 1, dev=False)
    shots = {part.train[i] for seed in range(3) for i in draw_shots(part.labels, 3, seed)}
    assert shots and not shots & set(part.tests[""])
    assert "lost card" in {e.phrase for e in desk.labelled("banking77", TRAIN, 0)}, "the toy set does overlap"
    assert "lost card" not in part.train


def test_evaluate_some_keeps_order_and_draws_by_position() -> None:
    words = [f"w{i}" for i in range(50)]
    drawn = evaluate.some(words, 10)
    assert len(drawn) == 10 and drawn == sorted(drawn, key=words.index)
    assert [word.upper() for word in drawn] == evaluate.some([word.upper() for word in words], 10)
    assert evaluate.some(words, 0) == evaluate.some(words, 99) == words


def test_evaluate_noise_is_fixed_and_changes_phrases() -> None:
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


def test_evaluate_pairs_have_one_right_answer() -> None:
    pairs = [Pair(f"a{i}", "yes" if i % 2 else f"b{i}", 0) for i in range(20)]
    chosen = evaluate.choose_pairs(pairs, 8)
    assert len(chosen) == 8 and chosen == evaluate.choose_pairs(pairs, 8)
    assert sum(pair.positive == "yes" for pair in evaluate.choose_pairs(pairs, 20)) == 1


def test_evaluate_folds_deal_each_label_evenly() -> None:
    folds = evaluate.deal(LABELS, 3)
    for label, expected in (("a", [2, 2, 2]), ("b", [2, 2, 2]), ("c", [1, 0, 0])):
        assert np.bincount(folds[label == LABELS], minlength=3).tolist() == expected


@pytest.mark.parametrize(
    ("scores", "chosen"), [((0.1, 0.5, 0.5, 0.2), 1), ((0.1, 0.2, 0.3, 0.4), 3)], ids=["tie", "last"]
)
def test_evaluate_regularisation_is_what_dev_likes_best(scores: Sequence[float], chosen: int) -> None:
    answers = iter(scores)
    vectors, labels = np.eye(4, dtype=np.float32), np.array(["a", "b", "a", "b"])
    c = evaluate.choose(vectors, labels, lambda _gold, _predicted: next(answers), (vectors[:2], labels[:2]))
    assert c == REGULARISATIONS[chosen]


def test_evaluate_heads_learn_many_labels() -> None:
    """With a loose tolerance scikit-learn takes no step at all over so many labels; the control shows it."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((120, 64))
    labels = np.repeat(np.arange(120), 6).astype(str)
    vectors = evaluate.unit((centres.repeat(6, axis=0) + rng.standard_normal((720, 64))).astype(np.float32))
    assert evaluate.accuracy(labels, evaluate.fit_head(vectors, labels, 8.0).predict(vectors)) > 0.99
    loose = LogisticRegression(C=8.0, tol=1e-2).fit(vectors, labels)
    assert evaluate.accuracy(labels, loose.predict(vectors)) < 0.05


# --- judges, on vectors given by hand


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
    lines = evaluate.sit(chosen, [candidate], desks, 10)
    return {(line.task, line.condition, line.metric): line.scores[0].value for line in lines}


def test_evaluate_similarity_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "stsb/en_test.tsv.gz", ["x\tx0\t5", "x\tx30\t1", "x\tx60\t2.5"])

    def angle(phrase: str) -> tuple[float, float]:
        radians = np.deg2rad(float(phrase.removeprefix("x") or 0))
        return float(np.cos(radians)), float(np.sin(radians))

    # cosines 1, 0.87, 0.5 against scores 1st, 3rd, 2nd
    assert values_of("stsb.en", tmp_path, by_hand(angle)) == {
        ("similarity", "cosine", "Spearman"): pytest.approx(0.5)
    }


def test_evaluate_replies_by_hand(tmp_path: Path) -> None:
    turns = [["alpha", "beta"], ["gamma", "delta"], ["epsilon", "zeta"]]
    write(tmp_path / "self_dialogue/test.jsonl.gz", [dialog(*pair) for pair in turns])
    vectors = {
        **{"alpha": (1, 0, 0), "beta": (1, 0, 0), "gamma": (0, 1, 0), "delta": (0, 0.8, 0.6)},
        **{"epsilon": (0, 1, 0), "zeta": (0, 0, 1)},  # nearer to delta
    }
    found = values_of("self_dialogue", tmp_path, by_hand(lambda phrase: vectors[phrase]))
    assert found == {("replies", "1 of 100", "R@1"): pytest.approx(2 / 3)}


def test_evaluate_spans_by_hand(tmp_path: Path) -> None:
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


def test_evaluate_emotions_by_hand(tmp_path: Path) -> None:
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


def test_evaluate_intents_by_hand(toy: Path) -> None:
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


def test_evaluate_every_exam_is_of_sets_that_exist() -> None:
    for exam in EXAMS:
        for name, split in exam.needs:
            assert datasets.find(name).files(split)
            assert exam.language in datasets.find(name).languages
    assert {exam.language for exam in EXAMS} == {"en", "ru"}


# --- time


def test_evaluate_times_by_turns() -> None:
    now = 0.0
    order: list[str] = []

    def encoder(name: str, seconds: float) -> Callable[..., None]:
        def encode(phrases: list[str], *, tokens: bool) -> None:
            nonlocal now
            assert len(phrases) == 1 and not tokens
            order.append(name)
            now += seconds * (9 if len(order) <= 2 else 1)  # the machine was busy at first

        return encode

    phrases = [["a", "b", "c"], ["A", "B", "C"]]
    one, other = evaluate.time_each([encoder("x", 0.001), encoder("y", 0.004)], phrases, clock=lambda: now)
    assert one.tolist() == pytest.approx([1.0] * 3) and other.tolist() == pytest.approx([4.0] * 3)
    assert all(set(order[i : i + 2]) == {"x", "y"} for i in range(0, len(order), 2))
    assert order[:4] == ["x", "y", "y", "x"]
    assert evaluate.median_of(np.array([1.0, 5.0, 2.0]))(all_of(3)) == 2.0


# --- the whole run, on toy files


def write(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row}\n" for row in rows)


def dialog(*turns: str) -> str:
    return json.dumps(
        {"id": "0", "turns": [{"speaker": "AB"[i % 2], "text": t} for i, t in enumerate(turns)]}
    )


def tagged(text: str, tags: str, label: str) -> str:
    names = [f"{tag}-{label}" if tag != "O" else tag for tag in tags]
    return json.dumps({"text": text, "tokens": text.split(), "tags": names, "intent": ""})


INTENTS = {"lights": "lights", "music": "music", "stop": "stop"}
FRAMES = ["please {}", "the {} now", "{} again", "Do the {} thing", "my {} ok", "{} {}"]
RU_INTENTS = {"light": "свет", "music": "музыка"}


def rows_of(intents: dict[str, str], frames: Sequence[str]) -> list[str]:
    return [f"{frame.format(word, word)}\t{label}" for label, word in intents.items() for frame in frames]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each set of the quick suite, written for these tests."""
    root = tmp_path_factory.mktemp("toy")
    tests = ["any {} here", "well {}"]
    bots = [f"hint3/{bot}" for bot in ("curekart", "powerplay11", "sofmattress")]
    for prefix, intents in (
        *((f"{bot}_", INTENTS) for bot in bots),
        ("clinc150/", INTENTS),
        ("banking77/", INTENTS | {"card": "card"}),
    ):
        write(root / f"{prefix}train.tsv.gz", rows_of(intents, FRAMES))
        write(root / f"{prefix}test.tsv.gz", rows_of(intents, tests))
    write(root / "banking77/train.tsv.gz", [*rows_of(INTENTS | {"card": "card"}, FRAMES), "Lost card\tcard"])
    write(root / "banking77/test.tsv.gz", [*rows_of(INTENTS, tests), "lost card\tcard"])
    write(root / "clinc150/dev.tsv.gz", rows_of(INTENTS, ["some {} there"]))
    write(root / "clinc150/test.tsv.gz", [*rows_of(INTENTS, tests), "qqq one\toos", "qqq two\toos"])
    write(
        root / "home_assistant_intents/ru_generated.tsv.gz",
        rows_of(RU_INTENTS, ["включи {}", "{} да", "вот {}"]),
    )
    write(root / "home_assistant_intents/ru_written.tsv.gz", rows_of(RU_INTENTS, ["Мне {} сюда"]))
    moods = ["ha {}\tjoy", "grr {}\tanger", "hm {}\tneutral", "ha grr {}\tjoy,anger"]
    for i, split in enumerate(("train", "dev", "test")):
        numbers = range(10 * i, 10 * i + (8 if split == "train" else 3))
        write(root / f"goemotions/{split}.tsv.gz", [row.format(n) for n in numbers for row in moods])
        toxic = ["bad {}\toffensive", "vile {}\thate", "nice {}\tneither"]
        write(
            root / f"davidson_hate_offensive/{split}.tsv.gz",
            [row.format(n) for n in numbers for row in toxic],
        )
        spans = [
            *(tagged(f"call anna {n}", "OBO", "who") for n in numbers),
            *(tagged(f"call me {n}", "OOO", "who") for n in numbers),
        ]
        for name in ("snips", "wnut17"):
            write(root / f"{name}/{split}.jsonl.gz", spans)
    pairs = [("one two", "one two three", 5), ("one", "абв", 0), ("a dog", "a dogs", 4), ("hi", "bye", 1)]
    for language in ("en", "ru"):
        write(root / f"stsb/{language}_test.tsv.gz", [f"{a}\t{b}\t{score}" for a, b, score in pairs])
    write(
        root / "self_dialogue/test.jsonl.gz",
        [dialog(f"what {i} {'ab' * i}", f"that {'ab' * i}") for i in range(9)],
    )
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A vectorizer, a wider one, and the first again for cased text."""
    root = tmp_path_factory.mktemp("vectorizers")
    one, wide = make_vectorizer(root / "one"), make_vectorizer(root / "wide", seed=1, dim=16)
    cased = make_vectorizer(root / "cased")
    spec = json.loads((cased / SPEC_FILE).read_text()) | {"uncased": False}
    (cased / SPEC_FILE).write_text(json.dumps(spec))
    return [one, wide, cased]


A_FEW = tuple(exam for exam in EXAMS if exam.data in ("banking77", "stsb.en", "goemotions"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def evaluation(folders: list[Path], toy: Path, store: Path) -> Evaluation:
    return evaluate.evaluate(folders, toy, BRIEF, store=store)


def test_evaluate_whole_run_has_every_line(evaluation: Evaluation) -> None:
    assert [column.name for column in evaluation.columns] == ["one", "wide", "cased"]
    assert [column.dim for column in evaluation.columns] == [8, 16, 8]
    tasks = {(line.task, line.language) for line in evaluation.lines}
    assert tasks >= {
        ("intents", "en"),
        ("intents", "ru"),
        ("out of scope", "en"),
        ("emotion", "en"),
        ("slots", "en"),
    }
    assert tasks >= {
        ("toxicity", "en"),
        ("entities", "en"),
        ("similarity", "ru"),
        ("replies", "en"),
        ("cost", ""),
    }
    for line in evaluation.lines:
        assert len(line.scores) == 3
        assert all(np.isfinite(score.value) for score in line.scores)
    few = evaluation.line("intents", "clinc150", "2-shot", "accuracy")
    assert all(score.spread is not None for score in few.scores)
    assert evaluation.line("intents", "banking77", "full", "accuracy").items == 7
    assert evaluation.line("intents", "hint3", "full", "accuracy").unseen
    assert not few.unseen
    size = evaluation.line("cost", "", "on disk", "MB").scores[0].value
    assert size == pytest.approx(
        sum(f.stat().st_size for f in Path(evaluation.columns[0].folder).iterdir()) / 1e6
    )
    assert evaluation.line("cost", "clinc150", "one thread", "ms per phrase").scores[0].value > 0
    with pytest.raises(ValueError, match="found no line x, y, z, w"):
        evaluation.line("x", "y", "z", "w")


def test_evaluate_cased_and_uncased_meet_the_same_rows(evaluation: Evaluation) -> None:
    russian = evaluation.line("intents", "home_assistant.ru", "full", "accuracy")
    assert russian.items == 2 and russian.scores[2].change is not None
    similar = evaluation.line("similarity", "stsb.en", "cosine", "Spearman")
    assert similar.scores[2].change == 0.0, "nothing in these rows has case"


def without_cost(evaluation: Evaluation) -> list[evaluate.Line]:
    return [line for line in evaluation.lines if line.task != "cost"]


def test_evaluate_second_run_encodes_nothing_and_says_the_same(
    evaluation: Evaluation, folders: list[Path], toy: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> Any:
        raise AssertionError("a phrase was encoded again")

    monkeypatch.setattr(Vectorizer, "encode_corpus", encode)
    again = evaluate.evaluate(folders, toy, BRIEF, store=store)
    assert without_cost(again) == without_cost(evaluation)
    assert again.data == evaluation.data


def test_evaluate_without_the_store_would_encode(
    folders: list[Path], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vectorizer, "encode_corpus", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.evaluate(folders[:1], toy, BRIEF, store=tmp_path)


def test_evaluate_store_gives_the_bits_of_the_vectorizer(vectorizer: Vectorizer, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    stored = evaluate.Stored(tmp_path, vectorizer, 1, lambda done, total: steps.append((done, total)))
    phrases = ["hello", "включи свет", "hello"]
    for tokens in (
        False,
        True,
        True,
        False,
    ):  # the second time token vectors are missing, then they are there
        for found, fresh in zip(stored(phrases, tokens), vectorizer.encode(phrases), strict=True):
            assert np.array_equal(found.sentence, fresh.sentence)
            if tokens:
                assert found.tokens is not None and found.offsets is not None
                assert np.array_equal(found.tokens, fresh.tokens if fresh.tokens is not None else ())
                assert np.array_equal(found.offsets, fresh.offsets if fresh.offsets is not None else ())
    stored.close()
    assert steps == [(2, 2), (2, 2)]


def test_evaluate_broken_store_says_what_to_do(vectorizer: Vectorizer, tmp_path: Path) -> None:
    (tmp_path / f"{vectorizer.fingerprint}.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match="delete the file"):
        evaluate.Stored(tmp_path, vectorizer, 1, lambda _done, _total: None)


def test_evaluate_report_files(evaluation: Evaluation, tmp_path: Path) -> None:
    paths = evaluate.write(evaluation, tmp_path / "out")
    assert [path.name for path in paths] == list(evaluate.REPORT_FILES)
    found = json.loads(paths[0].read_text(encoding="utf-8"))
    assert set(found) == {"suite", "settings", "columns", "lines", "data", "seconds"}
    assert set(found["lines"][0]) == {
        *("task", "data", "language", "condition", "metric", "items", "unseen", "scores"),
    }
    assert set(found["lines"][0]["scores"][0]) == {
        *("value", "low", "high", "spread", "change", "change_low", "change_high"),
    }
    assert found["settings"]["f_beta"] == 1.8 and found["data"]["banking77/test.tsv.gz"]
    text = paths[1].read_text(encoding="utf-8")
    assert text.index("## English") < text.index("## Russian") < text.index("## Cost")
    assert "hint3 (unseen)" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert evaluate.table(evaluation).row_count == len(evaluation.lines) + 3


def test_evaluate_sweep_cuts_each_vectorizer(
    evaluation: Evaluation,
    folders: list[Path],
    toy: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "EXAMS", A_FEW)
    swept = evaluate.evaluate(folders[:2], toy, BRIEF, dims=(8, 4), store=store)
    assert [(column.name, column.width) for column in swept.columns] == [
        *(("one", 8), ("one@4", 4), ("wide", 16), ("wide@8", 8), ("wide@4", 4)),
    ]
    assert {line.task for line in swept.lines} == {"intents", "similarity"}
    for line in swept.lines:
        whole = evaluation.line(line.task, line.data, line.condition, line.metric)
        assert line.scores[0].value == whole.scores[0].value, "the first column stands uncut"
    assert evaluate.write(swept, tmp_path)[2].stat().st_size > 1000
    with pytest.raises(ValueError, match="expected widths below 16"):
        evaluate.evaluate(folders[:2], toy, BRIEF, dims=(16, 32), store=store)


def test_evaluate_missing_data_is_said_before_any_work(
    folders: list[Path], toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no folder .*nowhere.*pass it with --data"):
        evaluate.evaluate(folders, tmp_path / "nowhere", BRIEF, store=tmp_path)
    with pytest.raises(FileNotFoundError, match="ru_toxicity_detox|home_assistant_intents.en"):
        evaluate.evaluate(folders, toy, Evaluate(suite="full"), store=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [0, 2], ids=["none", "twice"])
def test_evaluate_wants_different_folders(folders: list[Path], toy: Path, times: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected different folders"):
        evaluate.evaluate(folders[:1] * times, toy, BRIEF, store=tmp_path)


def test_evaluate_names_that_collide_take_their_parent(tmp_path: Path) -> None:
    assert evaluate._names([tmp_path / "a/export", tmp_path / "b/export", tmp_path / "c"]) == [
        *("a/export", "b/export", "c"),
    ]


def test_evaluate_held_out_sets_are_marked(folders: list[Path], toy: Path, store: Path) -> None:
    held = Evaluate(shots=(2,), seeds=2, held_out=("banking77",))
    found = evaluate.evaluate(folders[:1], toy, held, store=store)
    assert {line.data for line in found.lines if line.unseen} == {"banking77", "hint3"}


def test_evaluate_command_prints_one_json_object(
    folders: list[Path], toy: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "EXAMS", A_FEW)
    places = ["--data", str(toy), "--out", str(tmp_path), "--store", str(store)]
    arguments = ["vectorizer", "evaluate", str(folders[0]), *places]
    done = CliRunner().invoke(app, [*arguments, "--dims", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert [column["width"] for column in json.loads(done.stdout)["columns"]] == [8, 4]
    assert (tmp_path / "evaluation.png").exists()
    refused = CliRunner().invoke(app, [*arguments, "--dims", "wide"])
    assert refused.exit_code == 2 and "expected widths" in refused.output
