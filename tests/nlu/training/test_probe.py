"""nlu.training.probe: heads against scikit-learn's, and how their regularisation is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")

from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from nlu.training import probe
from nlu.training.candidate import unit
from nlu.training.measures import FloatArray, accuracy
from nlu.training.probe import REGULARISATIONS

LABELS = np.array(["a"] * 6 + ["b"] * 6 + ["c"])


def clouds(labels: int, rows: int, dim: int) -> tuple[FloatArray, NDArray[np.str_]]:
    """Overlapping clouds around one far mean with variances decades apart, as sentence vectors have them."""
    rng = np.random.default_rng(0)
    widths = np.logspace(0, -2, dim)
    centres = rng.standard_normal((labels, dim)) * widths
    noise = rng.standard_normal((labels * rows, dim)) * widths
    vectors = unit((centres.repeat(rows, axis=0) + noise + 1.0).astype(np.float32))
    return vectors, np.repeat(np.arange(labels), rows).astype(str)


@pytest.mark.parametrize("c", [2.0, 128.0])
def test_probe_equals_scikit_learn(c: float) -> None:
    vectors, labels = clouds(5, 40, 16)
    twin = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(vectors.astype(np.float64), labels)
    found = probe.fit(vectors, labels, c)
    assert found.names.tolist() == twin.classes_.tolist()
    expected = twin.predict_proba(vectors)
    assert 0.3 < accuracy(labels, twin.predict(vectors)) < 0.99, "there is something to disagree about"
    assert np.abs(softmax(found.logits(vectors), axis=1) - expected).max() < 0.02
    assert np.abs(found.confidence(vectors) - expected.max(axis=1)).max() < 0.02
    assert accuracy(twin.predict(vectors), found.predict(vectors)) >= 0.99


def test_probe_of_each_label_equals_scikit_learn_label_by_label() -> None:
    vectors, labels = clouds(4, 40, 16)
    wanted = np.stack([labels == "0", np.isin(labels, ["0", "1"]), labels == "3"], axis=1)
    found, limits = probe.tune_each(vectors, wanted, vectors, wanted)
    assert limits.shape == (3,) and ((limits > 0) & (limits < 1)).all()
    c = REGULARISATIONS[-1]  # dev is training here, so it likes the weakest best
    for i in range(3):
        twin = LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
        expected = twin.fit(vectors.astype(np.float64), wanted[:, i]).predict_proba(vectors)[:, 1]
        assert np.abs(found.chances(vectors)[:, i] - expected).max() < 0.05
    # each threshold is the one of the best F1 over dev
    chances = found.chances(vectors)[:, 0]

    def f1_at(limit: float) -> float:
        return float(
            2 * (wanted[:, 0] & (chances >= limit)).sum() / (wanted[:, 0].sum() + (chances >= limit).sum())
        )

    assert f1_at(limits[0]) == pytest.approx(max(map(f1_at, chances)))


def test_probe_never_says_a_label_that_no_row_has() -> None:
    vectors, labels = clouds(2, 20, 4)
    wanted = np.stack([labels == "0", np.zeros(40, np.bool_)], axis=1)
    found, _ = probe.tune_each(vectors, wanted, vectors, wanted)
    assert found.chances(vectors)[:, 1].max() < 0.05


def test_probe_learns_many_labels() -> None:
    """With a loose tolerance scikit-learn takes no step at all over so many labels; the control shows it."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((120, 64))
    labels = np.repeat(np.arange(120), 6).astype(str)
    vectors = unit((centres.repeat(6, axis=0) + rng.standard_normal((720, 64))).astype(np.float32))
    assert accuracy(labels, probe.fit(vectors, labels, 8.0).predict(vectors)) > 0.99
    loose = LogisticRegression(C=8.0, tol=1e-2).fit(vectors, labels)
    assert accuracy(labels, loose.predict(vectors)) < 0.05


def test_probe_folds_deal_each_label_evenly() -> None:
    folds = probe.deal(LABELS, 3)
    for label, expected in (("a", [2, 2, 2]), ("b", [2, 2, 2]), ("c", [1, 0, 0])):
        assert np.bincount(folds[label == LABELS], minlength=3).tolist() == expected


SCORES = pytest.mark.parametrize(
    ("scores", "chosen"),
    [((0.1, 0.5, 0.5, 0.2, 0.2), 1), ((0.1, 0.2, 0.3, 0.4, 0.5), 4)],
    ids=["tie", "last"],
)


@SCORES
def test_probe_regularisation_is_what_dev_likes_best(scores: Sequence[float], chosen: int) -> None:
    answers = iter(scores)
    vectors, labels = clouds(2, 4, 4)
    found = probe.tune(vectors, labels, lambda _gold, _predicted: next(answers), (vectors[:2], labels[:2]))
    twin = probe.fit(vectors, labels, REGULARISATIONS[chosen])
    others = [probe.fit(vectors, labels, c) for i, c in enumerate(REGULARISATIONS) if i != chosen]
    assert np.abs(found.weight - twin.weight).max() < 0.01 * np.abs(twin.weight).max()
    for other in others:
        assert np.abs(found.weight - other.weight).max() > 0.1 * np.abs(other.weight).max()


@SCORES
def test_probe_regularisation_is_what_folds_like_best(scores: Sequence[float], chosen: int) -> None:
    answers = iter(scores)
    vectors, labels = clouds(2, 6, 4)
    c = probe.choose(vectors, labels, lambda _gold, _predicted: next(answers))
    assert c == REGULARISATIONS[chosen]
