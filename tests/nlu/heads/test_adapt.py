"""nlu.heads.adapt: the gradient, what is learnt where it can be, and what is refused where it would harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.adapter import Adapter, bound
from nlu.heads import adapt as training
from nlu.heads.adapt import AdapterRefused, Lesson, Wanted, adapt, exam, objective
from nlu.heads.questions import Question, new_questions, places
from tests.nlu.heads.toy_library import DIM, make_world

FINGERPRINT = "ab" * 32


def learnt(
    folder: Path, *, clash: bool = False, eps: float = 0.3, max_harm: float = 0.01, rank: int = 4
) -> Adapter:
    library, pairs = make_world(folder / "index", clash=clash)
    wanted = Wanted(rank=rank, eps=eps, max_harm=max_harm)
    return adapt(pairs, library, wanted, fingerprint=FINGERPRINT, progress=lambda what, done, total: None)


def lesson(rng: np.random.Generator, questions: int = 9, rows: int = 12, dim: int = 7) -> Lesson:
    """In float64: one or two right rows for each question, some rows hidden."""
    queries, stored = (
        drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        for drawn in (rng.standard_normal((questions, dim)), rng.standard_normal((rows, dim)))
    )
    right, visible = np.zeros((questions, rows)), np.ones((questions, rows))
    for i in range(questions):
        right[i, [i, (5 * i + 3) % rows]] = 1.0
        if i % 2:
            visible[i, (i + 1) % rows] = 0.0
    return Lesson(queries, stored, right * visible, visible, rng.uniform(0.5, 1.5, questions))


@pytest.mark.parametrize(("eps", "clipped"), [(0.01, 9), (0.4, None), (0.99, 0)], ids=["all", "some", "none"])
def test_adapt_gradient_is_that_of_the_loss(eps: float, clipped: int | None) -> None:
    rng = np.random.default_rng(5)
    given, rank = lesson(rng), 3
    size = rank * given.queries.shape[1]
    theta = 0.35 * rng.standard_normal(2 * size)
    inner = given.queries @ theta[:size].reshape(rank, -1).T
    lengths = np.linalg.norm(inner @ theta[size:].reshape(-1, rank).T, axis=1)
    found = int((lengths > eps).sum())
    assert found == clipped if clipped is not None else 0 < found < len(lengths)
    assert np.abs(lengths - eps).min() > 1e-3  # no question at the very edge, where there is no gradient

    def slope(i: int, at_eps: float) -> float:
        step = np.zeros_like(theta)
        step[i] = 1e-6
        return (
            objective(theta + step, given, rank, at_eps)[0] - objective(theta - step, given, rank, at_eps)[0]
        ) / 2e-6

    gradient = objective(theta, given, rank, eps)[1]
    numeric = np.array([slope(i, eps) for i in range(len(theta))])
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-6)
    other = np.array([slope(i, eps / 2) for i in range(len(theta))])  # the control: the check can tell
    assert np.abs(gradient - other).max() > 1e-2 or clipped == 0


def test_adapt_loss_is_the_cross_entropy_of_the_right_rows() -> None:
    given = lesson(np.random.default_rng(0))
    theta = np.zeros(2 * 2 * 7)  # moves nothing
    scores = np.where(given.visible > 0, given.queries @ given.rows.T / 0.05, -np.inf)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    right = (odds * given.right).sum(axis=1) / odds.sum(axis=1)
    assert objective(theta, given, 2, 0.3)[0] == pytest.approx(float(-given.weights @ np.log(right)))


def test_adapt_finds_new_phrases_it_did_not_learn_from(tmp_path: Path) -> None:
    spec = learnt(tmp_path).spec
    assert spec.new.questions == 48
    assert spec.new.recall_at_1.before < 0.5
    assert spec.new.recall_at_1.after > 0.8
    assert spec.new.recall_at_1.low > 0.2
    assert spec.old.harm <= 0.01
    assert (spec.rank, spec.eps, spec.factor, spec.dim, spec.rows) == (4, 0.3, 1.0, DIM, 106)
    assert spec.bound == pytest.approx(bound(0.3), abs=1e-6)
    assert spec.requires.vectorizer == FINGERPRINT


def test_adapt_is_judged_on_folds_and_not_on_what_it_learnt(tmp_path: Path) -> None:
    """The returned adapter answers the very phrases it learnt; the report must not be that number."""
    library, pairs = make_world(tmp_path / "index", clash=True)
    wanted = Wanted(rank=16, eps=0.9, max_harm=1.0)
    found = adapt(pairs, library, wanted, fingerprint=FINGERPRINT, progress=lambda what, done, total: None)
    on_learnt = (places(new_questions(pairs, library), library.rows, found.residual) <= 1).mean()
    assert found.spec.new.recall_at_1.after < on_learnt


def test_adapt_goes_less_far_where_it_would_harm(tmp_path: Path) -> None:
    free = learnt(tmp_path / "free", clash=True, eps=0.9, max_harm=1.0, rank=8).spec
    assert free.factor == 1.0
    assert free.old.harm > 0.1  # the control: unchecked, it harms
    held = learnt(tmp_path / "held", clash=True, eps=0.9, max_harm=0.05, rank=8)
    assert held.spec.factor < 1.0
    assert held.spec.old.harm <= 0.05
    assert held.spec.eps == held.residual.eps == pytest.approx(0.9 * held.spec.factor)
    assert held.spec.bound < free.bound


def test_adapt_refuses_what_harms_however_little_it_moves(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterRefused, match=r"found that even 0.2 .* expected a loss of at most 0.0; write more"
    ):
        learnt(tmp_path, clash=True, eps=0.9, max_harm=0.0, rank=8)


def test_adapt_twice_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        learnt(tmp_path / name).save(tmp_path / name / "adapter.main")
    files = [
        [
            (tmp_path / name / "adapter.main" / file).read_bytes()
            for file in ("adapter.json", "weights.safetensors")
        ]
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
    library, pairs = make_world(tmp_path / "index")
    wanted = Wanted(rank=4, seed=1)
    adapt(pairs, library, wanted, fingerprint=FINGERPRINT, progress=lambda what, done, total: None).save(
        tmp_path / "c"
    )
    assert (tmp_path / "c" / "weights.safetensors").read_bytes() != files[0][1]


def test_adapt_reports_every_fit(tmp_path: Path) -> None:
    library, pairs = make_world(tmp_path / "index")
    told: list[tuple[str, int, int]] = []
    adapt(pairs, library, Wanted(rank=2), fingerprint=FINGERPRINT, progress=lambda *step: told.append(step))
    assert told == [("learning", done, training.FOLDS + 1) for done in range(1, training.FOLDS + 2)]


def test_adapt_needs_some_phrases(tmp_path: Path) -> None:
    library, pairs = make_world(tmp_path / "index")
    few = dict(list(pairs.items())[:4])
    with pytest.raises(ValueError, match="pairs: found 4 phrases .* expected at least 5; write several"):
        adapt(few, library, Wanted(), fingerprint=FINGERPRINT, progress=lambda what, done, total: None)


def test_adapt_learns_from_the_nearest_rows_of_a_large_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_MOST_ROWS", 40)  # of 106
    spec = learnt(tmp_path).spec
    assert spec.new.recall_at_1.low > 0.2
    assert (spec.rows, spec.old.harm <= 0.01) == (106, True)


def asked(groups: list[str]) -> list[Question]:
    return [Question(np.ones(2, np.float32), np.array([0]), -1, group) for group in groups]


def test_exam_measures_places() -> None:
    before, after = (np.array(places, np.int64) for places in ([1, 2, 11, 20], [1, 1, 4, 50]))
    found = exam(asked(["a", "b", "c", "d"]), before, after, seed=0)
    assert (found.recall_at_1.before, found.recall_at_1.after) == (0.25, 0.5)
    assert (found.recall_at_10.before, found.recall_at_10.after) == (0.5, 0.75)
    assert found.mrr.before == pytest.approx((1 + 1 / 2 + 1 / 11 + 1 / 20) / 4, abs=1e-4)
    assert found.questions == 4


def test_exam_of_no_change_is_certain_of_it() -> None:
    same: NDArray[np.int64] = np.array([1, 3, 30], np.int64)
    found = exam(asked(["a", "b", "c"]), same, same, seed=0)
    assert (found.mrr.low, found.mrr.high, found.harm) == (0.0, 0.0, 0.0)


def test_exam_resamples_replies_and_not_phrases() -> None:
    """Ten gains in one reply are one accident; one gain in each of ten replies are ten."""
    groups = [f"reply {i // 10}" for i in range(100)]
    before = np.full(100, 2, np.int64)
    together, spread = before.copy(), before.copy()
    together[:10] = 1
    spread[::10] = 1
    one, ten = (exam(asked(groups), before, after, seed=0).recall_at_1 for after in (together, spread))
    assert one.after == ten.after == 0.1
    assert one.low == 0.0
    assert ten.low == ten.high == 0.1
