"""Training heads on toy vectors: what can be learnt is learnt, strangers are kept out, and the same run gives the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from annotators import calibration, fit, table, thresholds
from annotators.annotator import Annotation, Encoding, Heard, HeardTurn, Span
from annotators.fit import About, Borrowed, TaggedEncoding
from annotators.fleet import Fleet
from annotators.head import SPEC_FILE, WEIGHTS_FILE, GoldenTurn
from annotators.table import Head
from tests.annotators.toys import FINGERPRINT, encoded, make_spec, random_units, tokenized

ABOUT = About("toy", "test", FINGERPRINT, made_by="tests")
LABELS = ("light", "music", "stop")
DIM = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On vectors this small the solver would spend its time waking threads."""
    with threadpool_limits(1):
        yield


def cloud(
    noise: float, *, per_label: int = 12, seed: int = 0
) -> tuple[list[str], NDArray[np.float32], list[str]]:
    """Phrases, vectors around one centre a label, and labels; the order of rows is shuffled."""
    rng = np.random.default_rng(seed)
    labels = [label for label in LABELS for _ in range(per_label)]
    rng.shuffle(labels)
    centres = random_units(len(LABELS), DIM, seed=100)
    vectors = centres[[LABELS.index(label) for label in labels]] + rng.normal(0, noise, (len(labels), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [f"phrase {i}" for i in range(len(labels))], vectors.astype(np.float32), labels


def answer(head: Head, vector: NDArray[np.float32], context: Sequence[HeardTurn] = ()) -> Annotation:
    return Fleet([head]).annotate(Heard.alone("", encoded(vector), context))[0]


def best(head: Head, vectors: NDArray[np.float32]) -> list[str]:
    return [answer(head, vector).labels[0].label for vector in vectors]


def accepted(head: Head, vectors: NDArray[np.float32]) -> list[bool]:
    return [answer(head, vector).labels[0].accepted for vector in vectors]


def reloaded(head: Head, folder: Path) -> Head:
    head.save(folder)
    return table.load(folder)


def test_fit_sentence_learns_what_is_separable() -> None:
    head = fit.fit_sentence(ABOUT, *cloud(0.15))
    _, unseen, labels = cloud(0.15, seed=1)
    assert best(head, unseen) == labels
    assert all(accepted(head, unseen))
    assert head.spec.metrics["folds_accuracy"] == 1.0


def test_fit_sentence_records_what_it_is() -> None:
    texts, vectors, labels = cloud(0.15)
    spec = fit.fit_sentence(ABOUT, texts, vectors, labels, regularisations=(4.0,)).spec
    assert (spec.name, spec.kind, spec.task, spec.made_by) == ("toy", "sentence", "test", "tests")
    assert spec.requires.vectorizer == FINGERPRINT
    assert (spec.labels, spec.exclusive) == (LABELS, True)
    assert (spec.metrics["phrases"], spec.metrics["regularisation"]) == (36.0, 4.0)


def test_fit_sentence_weights_are_scikit_learns() -> None:
    texts, vectors, labels = cloud(0.4)
    head = fit.fit_sentence(ABOUT, texts, vectors, labels, regularisations=(4.0,))
    model = LogisticRegression(C=4.0, max_iter=100, tol=1e-4).fit(vectors, labels)
    np.testing.assert_allclose(head.weight, model.coef_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.bias, model.intercept_, rtol=1e-5, atol=1e-6)


def test_fit_sentence_of_two_labels_scores_as_scikit_learn_does() -> None:
    """scikit-learn keeps one row of weights for two labels; the head has one for each."""
    texts, vectors, labels = cloud(0.4)
    two = ["stop" if label == "stop" else "go" for label in labels]
    head = fit.fit_sentence(ABOUT, texts, vectors, two, regularisations=(4.0,))
    model = LogisticRegression(C=4.0, max_iter=100, tol=1e-4).fit(vectors, two)
    assert head.spec.labels == tuple(model.classes_) == ("go", "stop")
    found = calibration.softmax(vectors @ head.weight.T + head.bias)
    np.testing.assert_allclose(found, model.predict_proba(vectors), rtol=1e-4)


@pytest.mark.parametrize("regularisations", [(1e-4, 4.0), (4.0, 1e-4)])
def test_fit_sentence_keeps_the_regularisation_with_the_lowest_held_out_loss(
    regularisations: tuple[float, float],
) -> None:
    head = fit.fit_sentence(ABOUT, *cloud(0.15), regularisations=regularisations)
    assert head.spec.metrics["regularisation"] == 4.0


def test_fit_sentence_calibrates_on_phrases_the_model_did_not_see() -> None:
    texts, vectors, labels = cloud(0.7)
    head = fit.fit_sentence(ABOUT, texts, vectors, labels, regularisations=(4.0,), seed=3)
    raw = cross_val_predict(
        LogisticRegression(C=4.0, max_iter=100, tol=1e-4), vectors, labels, method="decision_function",
        cv=StratifiedKFold(fit.FOLDS, shuffle=True, random_state=3),
    ).astype(np.float32)  # fmt: skip
    targets = np.array([LABELS.index(label) for label in labels])
    scale = calibration.fit_temperature(raw, targets)
    scores = calibration.softmax(np.float32(scale) * raw)
    assert head.spec.scale == pytest.approx((scale,) * 3, rel=1e-4)
    assert head.spec.thresholds == pytest.approx(thresholds.fit_exclusive(scores, targets), rel=1e-3)
    assert head.spec.metrics["folds_accuracy"] == pytest.approx((raw.argmax(axis=1) == targets).mean())


def strangers(seed: int = 2) -> NDArray[np.float32]:
    """Vectors with nothing of any label's centre in them."""
    basis = np.linalg.qr(random_units(len(LABELS), DIM, seed=100).T)[0]
    vectors = random_units(60, DIM, seed=seed)
    vectors -= vectors @ basis @ basis.T
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def test_fit_sentence_outsiders_raise_thresholds() -> None:
    closed = fit.fit_sentence(ABOUT, *cloud(0.15), regularisations=(4.0,))
    guarded = fit.fit_sentence(ABOUT, *cloud(0.15), outsiders=strangers(), regularisations=(4.0,))
    assert all(high > low for high, low in zip(guarded.spec.thresholds, closed.spec.thresholds, strict=True))


def test_fit_sentence_outsiders_keep_other_strangers_out() -> None:
    """The head that never met an outsider, the negative control, accepts nearly all of them."""
    others, (_, known, _) = strangers(seed=3), cloud(0.15, seed=1)
    closed = fit.fit_sentence(ABOUT, *cloud(0.15), regularisations=(4.0,))
    guarded = fit.fit_sentence(ABOUT, *cloud(0.15), outsiders=strangers(), regularisations=(4.0,))
    assert np.mean(accepted(closed, others)) > 0.8
    assert np.mean(accepted(guarded, others)) < 0.2
    assert np.mean(accepted(guarded, known)) > 0.9


def test_fit_sentence_outsiders_are_not_trained_on() -> None:
    closed = fit.fit_sentence(ABOUT, *cloud(0.15), regularisations=(4.0,))
    guarded = fit.fit_sentence(ABOUT, *cloud(0.15), outsiders=strangers(), regularisations=(4.0,))
    np.testing.assert_array_equal(guarded.weight, closed.weight)
    np.testing.assert_array_equal(guarded.bias, closed.bias)


def test_fit_sentence_borrowed_rows_are_trained_on_in_every_fold() -> None:
    texts, vectors, labels = cloud(0.15)
    elsewhere = -vectors[[label == "stop" for label in labels]]
    for label in ("music", "light"):
        borrowed = Borrowed(elsewhere, [label] * len(elsewhere))
        joint = fit.fit_sentence(ABOUT, texts, vectors, labels, borrowed=borrowed)
        assert best(joint, elsewhere) == [label] * len(elsewhere)
        assert best(joint, vectors) == labels
        assert joint.spec.metrics["phrases"] == len(texts)
        assert joint.spec.metrics["borrowed"] == len(elsewhere)


def test_fit_sentence_borrowed_rows_are_never_measured_on() -> None:
    """Contradicting labels of borrowed rows cost accuracy on our own phrases, and that is what the folds report."""
    texts, vectors, labels = cloud(0.15)
    wrong = [LABELS[(LABELS.index(label) + 1) % len(LABELS)] for label in labels] * 3
    alone = fit.fit_sentence(ABOUT, texts, vectors, labels)
    joint = fit.fit_sentence(
        ABOUT, texts, vectors, labels, borrowed=Borrowed(np.tile(vectors, (3, 1)), wrong)
    )
    assert alone.spec.metrics["folds_accuracy"] == 1
    assert joint.spec.metrics["folds_accuracy"] == 0
    assert joint.spec.golden == ()


def test_fit_sentence_without_borrowed_rows_is_the_same_head(tmp_path: Path) -> None:
    rows = cloud(0.4)
    none = Borrowed(np.zeros((0, DIM), np.float32), [])
    fit.fit_sentence(ABOUT, *rows).save(tmp_path / "alone")
    fit.fit_sentence(ABOUT, *rows, borrowed=none).save(tmp_path / "none")
    for name in (SPEC_FILE, WEIGHTS_FILE):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "none" / name).read_bytes()


def test_fit_sentence_borrowed_rows_of_no_label_of_ours_are_refused() -> None:
    with pytest.raises(ValueError, match="found labels window, expected some of light, music, stop"):
        fit.fit_sentence(ABOUT, *cloud(0.15), borrowed=Borrowed(random_units(1, DIM, seed=1), ["window"]))


@pytest.mark.parametrize("noise", [0.15, 0.7], ids=["separable", "noisy"])
def test_fit_sentence_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path, noise: float) -> None:
    texts, vectors, labels = cloud(noise)
    head = reloaded(fit.fit_sentence(ABOUT, texts, vectors, labels), tmp_path)
    golden = {texts.index(golden.text): golden.label for golden in head.spec.golden}
    assert best(head, vectors[list(golden)]) == list(golden.values())
    assert [labels[i] for i in golden] == list(golden.values())
    assert sorted(golden.values()) == list(LABELS)  # one each


def test_fit_sentence_phrases_answered_by_chance_are_not_golden() -> None:
    texts, vectors, labels = cloud(0.15)
    nothing_to_learn = np.ones_like(vectors)
    assert fit.fit_sentence(ABOUT, texts, nothing_to_learn, labels).spec.golden == ()


def test_fit_sentence_of_many_labels_keeps_golden_phrases_for_some() -> None:
    labels = [f"label {i:02}" for i in range(40) for _ in range(4)]
    vectors = np.repeat(np.eye(40, dtype=np.float32), 4, axis=0)
    head = fit.fit_sentence(ABOUT, labels, vectors, labels, regularisations=(64.0,))
    assert len({golden.label for golden in head.spec.golden}) == len(head.spec.golden) == fit.GOLDEN


def fit_noisy_sentence(seed: int) -> Head:
    return fit.fit_sentence(ABOUT, *cloud(0.7), outsiders=strangers(), regularisations=(4.0,), seed=seed)


def fit_noisy_context(seed: int) -> Head:
    texts, vectors, labels = cloud(0.7, per_label=5)
    before = [[HeardTurn("user", encoded(vector))] for vector in vectors[::-1]]
    golden = [[GoldenTurn(role="user", text=text)] for text in texts[::-1]]
    return fit.fit_context(
        ABOUT, texts, [encoded(vector) for vector in vectors], before, golden, labels, turns=1, seed=seed
    )


def fit_noisy_token(seed: int) -> Head:
    return fit.fit_token(ABOUT, tagged_phrases(noise=1.0)[::2], seed=seed)


@pytest.mark.parametrize("train", [fit_noisy_sentence, fit_noisy_context, fit_noisy_token])
def test_fit_same_seed_gives_same_bytes(tmp_path: Path, train: Callable[[int], Head]) -> None:
    """Another seed, the negative control, deals other folds."""
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        train(seed).save(tmp_path / name)
    one, again, other = (
        [(tmp_path / name / file).read_bytes() for file in (SPEC_FILE, WEIGHTS_FILE)]
        for name in ("one", "again", "other")
    )
    assert again == one
    assert other != one


LIGHT, MUSIC = np.eye(2, DIM, dtype=np.float32)


def questions() -> tuple[list[str], list[Encoding], list[list[HeardTurn]], list[list[GoldenTurn]], list[str]]:
    """The same "yes" after questions about the light and about music, with the assistant's turn before in other words each time."""
    rng = np.random.default_rng(4)
    labels = ["light", "music"] * 9
    asked = [
        (LIGHT if label == "light" else MUSIC) + rng.normal(0, 0.1, DIM).astype(np.float32)
        for label in labels
    ]
    return (
        [f"yes {i}" for i in range(18)],
        [encoded(np.full(DIM, DIM**-0.5))] * 18,
        [[HeardTurn("assistant", encoded(vector))] for vector in asked],
        [[GoldenTurn(role="assistant", text=f"shall i {i}")] for i in range(18)],
        labels,
    )


@pytest.mark.parametrize(("asked", "meant"), [(LIGHT, "light"), (MUSIC, "music")], ids=["light", "music"])
def test_fit_context_learns_that_yes_depends_on_the_question(asked: NDArray[np.float32], meant: str) -> None:
    head = fit.fit_context(ABOUT, *questions())
    first = answer(
        head, np.full(DIM, DIM**-0.5, np.float32), [HeardTurn("assistant", encoded(asked))]
    ).labels[0]
    assert (first.label, first.accepted) == (meant, True)


def test_fit_context_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    texts, encodings, contexts, golden_turns, labels = questions()
    fitted = fit.fit_context(ABOUT, texts, encodings, contexts, golden_turns, labels, turns=3)
    head = reloaded(fitted, tmp_path)
    assert head.spec.params == {"turns": 3}
    assert sorted(golden.label for golden in head.spec.golden) == ["light", "music"]
    for golden in head.spec.golden:
        i = texts.index(golden.text)
        assert golden.context == tuple(golden_turns[i])
        assert answer(head, encodings[i].sentence, contexts[i]).labels[0].label == golden.label == labels[i]


WHO, TIME = ("anna", "boris", "clara", "david"), ("six", "noon", "seven", "midnight")
WORDS = ("call", "wake", "me", "at", "please", "and", *WHO, *TIME)


def tagged(text: str, *, noise: float = 0.0) -> TaggedEncoding:
    """A phrase whose token vectors stand for its words, tagged by what the words are."""
    groups = np.concatenate([random_units(6, 6, seed=8), np.repeat(random_units(2, 6, seed=9), 4, axis=0)])
    rng = np.random.default_rng(len(text))
    offsets: list[tuple[int, int]] = []
    spans: list[Span] = []
    for word in text.split():
        start = offsets[-1][1] + 1 if offsets else 0
        offsets.append((start, start + len(word)))
        if word in WHO or word in TIME:
            spans.append(Span("who" if word in WHO else "time", *offsets[-1], 1.0))
    tokens = groups[[WORDS.index(word) for word in text.split()]]
    return TaggedEncoding(text, tokenized(tokens + rng.normal(0, noise, tokens.shape), offsets), tuple(spans))


def tagged_phrases(noise: float = 0.0) -> list[TaggedEncoding]:
    pairs = list(zip(WHO[:3], TIME[:3], strict=True))
    texts = [f"call {who} at {time}" for who, time in itertools.product(WHO[:3], TIME[:3])]
    texts += (
        [f"wake me at {time} please" for _, time in pairs]
        + [f"call {who}" for who, _ in pairs]
        + ["wake me please"]
    )
    return [tagged(text, noise=noise) for text in texts]


@pytest.mark.parametrize(
    "text", ["call david at midnight please", "please call david and anna", "at midnight", "please wake me"]
)
def test_fit_token_finds_words_it_has_not_seen_among_words_like_them(text: str) -> None:
    said = tagged(text)
    found = (
        Fleet([fit.fit_token(ABOUT, tagged_phrases())]).annotate(Heard.alone(text, said.encoding))[0].spans
    )
    assert [span[:3] for span in found] == [span[:3] for span in said.spans]


def test_fit_token_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    head = reloaded(fit.fit_token(ABOUT, tagged_phrases()), tmp_path)
    assert len(head.spec.golden) > 3
    for golden in head.spec.golden:
        said = tagged(golden.text)
        spans = Fleet([head]).annotate(Heard.alone(golden.text, said.encoding))[0].spans
        assert tuple(f"{s.label}={golden.text[s.start : s.end]}" for s in spans) == golden.spans
        assert len(spans) == len(said.spans) > 0


def test_fit_token_never_answers_a_tag_it_never_saw() -> None:
    """Every span of these phrases is one word long, so no I- tag was ever seen."""
    head = fit.fit_token(ABOUT, tagged_phrases())
    assert head.spec.labels == ("time", "who")
    assert head.bias[[2, 4]].tolist() == [-30.0, -30.0]
    assert not head.weight[[2, 4]].any()
    assert (head.bias[[0, 1, 3]] > -30).all()


def without_tokens() -> TaggedEncoding:
    return TaggedEncoding("six", encoded([1, 0]), (Span("time", 0, 3, 1.0),))


@pytest.mark.parametrize(
    "use",
    [lambda: fit.fit_token(ABOUT, [without_tokens()]), lambda: fit.bio(without_tokens(), ["time"])],
    ids=["fit", "bio"],
)
def test_fit_token_without_token_vectors_is_refused(use: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="token heads are fitted on Encodings with token vectors"):
        use()


@pytest.mark.parametrize(
    ("spans", "tags"),
    [
        pytest.param([], [0, 0, 0, 0], id="none"),
        pytest.param([("time", 8, 10)], [0, 0, 1, 0], id="one token"),
        pytest.param([("who", 5, 14)], [0, 3, 4, 4], id="three tokens"),
        pytest.param([("time", 0, 4), ("time", 5, 7)], [1, 1, 0, 0], id="two side by side"),
        pytest.param([("who", 0, 7), ("time", 8, 14)], [3, 4, 1, 2], id="two labels"),
        pytest.param([("time", 2, 6)], [1, 2, 0, 0], id="half a token counts"),
        pytest.param([("time", 4, 5)], [0, 0, 0, 0], id="between tokens"),
        pytest.param([("time", 7, 11)], [0, 0, 1, 0], id="touching is not overlapping"),
    ],
)
def test_fit_bio_by_hand(spans: list[tuple[str, int, int]], tags: list[int]) -> None:
    """Tags are O, B-time, I-time, B-who, I-who."""
    encoding = tokenized(np.zeros((4, 2)), [(0, 4), (5, 7), (8, 10), (11, 14)])
    phrase = TaggedEncoding("wake me at six", encoding, tuple(Span(*span, 1.0) for span in spans))
    assert fit.bio(phrase, ("time", "who")).tolist() == tags


def test_fit_anchors_are_the_phrases_by_label() -> None:
    texts, vectors, labels = cloud(0.15, per_label=2)
    head = fit.make_anchors(ABOUT, texts, vectors, labels)
    order = sorted(range(6), key=lambda i: labels[i])
    assert head.owner.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(head.anchors, vectors[order])
    assert head.spec == make_spec(
        LABELS,
        kind="anchors",
        made_by="tests",
        scale=head.spec.scale,
        shift=head.spec.shift,
        golden=head.spec.golden,
    )


def test_fit_anchors_answer_phrases_near_them() -> None:
    head = fit.make_anchors(ABOUT, *cloud(0.15, per_label=3))
    _, unseen, labels = cloud(0.15, seed=1)
    assert best(head, unseen) == labels


def test_fit_anchors_golden_phrases_are_answered_by_the_stored_head(tmp_path: Path) -> None:
    texts, vectors, labels = cloud(0.15)
    head = reloaded(fit.make_anchors(ABOUT, texts, vectors, labels), tmp_path)
    rows = [texts.index(golden.text) for golden in head.spec.golden]
    assert len(rows) == fit.GOLDEN
    assert (
        best(head, vectors[rows])
        == [golden.label for golden in head.spec.golden]
        == [labels[i] for i in rows]
    )


def test_fit_anchors_calibrate_by_leaving_each_out() -> None:
    """One phrase of the music lies among the others, so leaving it out it is taken for one of them."""
    angles = {"light": (0, 10, 20), "music": (90, 100, 12)}
    labels = [label for label, of_label in angles.items() for _ in of_label]
    radians = np.radians([angle for of_label in angles.values() for angle in of_label])
    vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    cosine = {2: np.cos(np.radians(2)), 8: np.cos(np.radians(8)), 10: np.cos(np.radians(10))}
    left_out = [
        (cosine[10], True),
        (cosine[2], False),
        (cosine[8], False),
        (cosine[10], True),
        (cosine[10], True),
        (cosine[2], False),
    ]
    raw, hits = np.array([c for c, _ in left_out], np.float32), np.array([hit for _, hit in left_out])
    outsiders = -vectors[:1].repeat(40, axis=0)  # far away, so that nearer is better after all
    far = np.full(40, (-vectors[:1] @ vectors.T).max(), np.float32)
    expected = calibration.fit_platt(
        np.concatenate([raw, far]), np.concatenate([hits, np.zeros(40, np.bool_)])
    )
    head = fit.make_anchors(ABOUT, list("abcdef"), vectors, labels, outsiders=outsiders)
    assert expected[0] > 0
    assert (head.spec.scale[0], head.spec.shift[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "angles"),
    [
        pytest.param("abc", (0, 90, 180), id="one phrase a label"),
        pytest.param("aabb", (0, 5, 90, 95), id="never wrong"),
        pytest.param("aabb", (0, 80, 2, 170), id="always wrong"),
        pytest.param("aabbcc", (0, -60, 1, 62, 170, 230), id="wrong where it is nearest"),
    ],
)
def test_fit_anchors_without_evidence_keep_the_defaults(labels: str, angles: tuple[float, ...]) -> None:
    radians = np.radians(angles)
    vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
    head = fit.make_anchors(ABOUT, list(labels), vectors, list(labels))
    assert set(head.spec.scale) == {20.0}
    assert set(head.spec.shift) == {-10.0}


@pytest.mark.parametrize("seed", range(6))
def test_fit_anchors_nearest_is_best_whatever_the_phrases(seed: int) -> None:
    """Fitted to noise, calibration would as soon rank the farthest label first (seeds 1, 2 and 4 do without the guard)."""
    vectors = np.random.default_rng(seed).standard_normal((6, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = list("aabbcc")
    head = fit.make_anchors(ABOUT, list("123456"), vectors, labels)
    assert best(head, vectors) == labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a", "a", "a"], "found 1 distinct, expected at least 2"),
        (["a", "a", "a", "b"], "label 'b': found 1 phrase, expected at least 2"),
    ],
)
def test_fit_says_what_is_too_little_to_learn_from(labels: list[str], message: str) -> None:
    vectors = np.eye(4, dtype=np.float32)
    about = About("toy", "toy", "0" * 64)
    with pytest.raises(ValueError, match=message):
        fit.fit_sentence(about, ["p"] * 4, vectors, labels)
