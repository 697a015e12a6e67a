"""The solver: scikit-learn's answer, whatever the rows, the chunks, the threads and the strength before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

from annotators import linear
from annotators.linear import AnyOf, Linear, OneOf, averaged, fit, path, single_threaded
from tests.annotators.toys import random_units

LABELS = 4
EXACTLY = 1e-10  # of the objective; what is left is float32


def problem(
    rows: int = 300, width: int = 6, labels: int = LABELS, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows whose features' variances lie far apart, with a mean of their own, and the number of a label for each."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, width)) * np.geomspace(1, 0.01, width) + rng.standard_normal(width)
    raw = (vectors - vectors.mean(axis=0)) @ rng.standard_normal((width, labels)) * 3
    codes = (raw + rng.gumbel(size=raw.shape)).argmax(axis=1)
    codes[:labels] = np.arange(labels)  # every label is there
    return vectors.astype(np.float32), codes


def scikit_learns(c: float, vectors: NDArray[np.float32], wanted: NDArray[Any], weights: NDArray[Any] | None = None) -> Any:  # fmt: skip
    model = LogisticRegression(C=c, tol=1e-10, max_iter=20_000)
    return model.fit(vectors.astype(np.float64), wanted, sample_weight=weights)


def assert_same_chances(found: Linear, model: Any, vectors: NDArray[np.float32]) -> None:
    """A bias common to all labels that exclude each other changes nothing, so the chances are what must agree."""
    np.testing.assert_allclose(softmax(found.raw(vectors), axis=1), model.predict_proba(vectors), atol=1e-3)


def row_weights(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).choice([0.0, 0.5, 1.0, 4.0], rows).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal rows", "rows that weigh"])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_linear_labels_that_exclude_each_other_are_scikit_learns(c: float, weighted: bool) -> None:
    vectors, codes = problem()
    weights = row_weights(len(vectors)) if weighted else None
    found = fit(vectors, OneOf(codes, LABELS, weights), c, tolerance=EXACTLY)
    model = scikit_learns(c, vectors, codes, weights)
    assert_same_chances(found, model, vectors)
    np.testing.assert_allclose(found.weight, model.coef_, atol=0.02 * np.abs(model.coef_).max())
    bias = model.intercept_ - model.intercept_.mean()
    np.testing.assert_allclose(found.bias - found.bias.mean(), bias, atol=0.02 * np.abs(bias).max())


@pytest.mark.parametrize("weighted", [False, True], ids=["equal rows", "rows that weigh"])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_linear_labels_on_their_own_are_scikit_learns_one_by_one(c: float, weighted: bool) -> None:
    vectors, _ = problem()
    wanted = np.stack([problem(seed=seed)[1] % 3 == 0 for seed in range(3)], axis=1)
    weights = row_weights(len(vectors)) if weighted else None
    targets = AnyOf(wanted, None if weights is None else weights[:, None])
    found = fit(vectors, targets, c, tolerance=EXACTLY)
    for label in range(3):
        model = scikit_learns(c, vectors, wanted[:, label], weights)
        np.testing.assert_allclose(
            expit(found.raw(vectors)[:, label]), model.predict_proba(vectors)[:, 1], atol=1e-3
        )


def test_linear_answers_may_weigh_one_by_one() -> None:
    """A row of weight zero for one label says nothing of it, and all it knows of the others."""
    vectors, codes = problem()
    wanted = codes[:, None] == np.arange(2)
    known = np.random.default_rng(2).random(wanted.shape) < 0.5
    found = fit(vectors, AnyOf(wanted, known.astype(np.float32)), 4.0, tolerance=EXACTLY)
    for label in range(2):
        mine = known[:, label]
        model = scikit_learns(4.0, vectors[mine], wanted[mine, label])
        np.testing.assert_allclose(
            expit(found.raw(vectors)[:, label]), model.predict_proba(vectors)[:, 1], atol=1e-3
        )


def test_linear_rows_of_weight_zero_are_as_if_they_were_not_there() -> None:
    vectors, codes = problem()
    weights = (np.arange(len(codes)) % 3 > 0).astype(np.float32)
    weights[:LABELS] = 1
    kept = weights > 0
    weighed = fit(vectors, OneOf(codes, LABELS, weights), 4.0, tolerance=EXACTLY)
    alone = fit(vectors[kept], OneOf(codes[kept], LABELS), 4.0, tolerance=EXACTLY)
    np.testing.assert_allclose(
        softmax(weighed.raw(vectors), axis=1), softmax(alone.raw(vectors), axis=1), atol=1e-3
    )


def test_linear_usual_tolerance_is_within_a_hundredth_of_the_optimum() -> None:
    vectors, codes = problem()
    model = scikit_learns(8.0, vectors, codes)
    found = fit(vectors, OneOf(codes, LABELS), 8.0)
    np.testing.assert_allclose(softmax(found.raw(vectors), axis=1), model.predict_proba(vectors), atol=0.01)


@pytest.mark.parametrize("rows", [1, 2])
def test_linear_of_fewer_rows_than_features_is_finite(rows: int) -> None:
    vectors, _ = problem(rows + LABELS)
    found = fit(vectors[:rows], OneOf(np.zeros(rows, np.int64), 2), 1e6)
    assert np.isfinite(found.weight).all()
    assert (found.raw(vectors[:rows]).argmax(axis=1) == 0).all()


@pytest.mark.parametrize("rows", [10, 26, 27, 28])  # and three again: 13, 29, 30, 31
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_linear_of_fewer_rows_than_features_is_scikit_learns(rows: int, c: float) -> None:
    """Also of rows that repeat, so that they differ along fewer axes than there are rows."""
    distinct, codes = problem(rows, width=30, labels=3)
    vectors, labels = np.concatenate([distinct, distinct[:3]]), np.concatenate([codes, codes[:3]])
    found = fit(vectors, OneOf(labels, 3), c, tolerance=EXACTLY)
    model = scikit_learns(c, vectors, labels)
    unseen = vectors[::-1] + 0.1 * random_units(len(vectors), 30)
    assert_same_chances(found, model, vectors)
    assert_same_chances(found, model, unseen)


def test_linear_averaged_model_scores_as_its_parts_do_on_average() -> None:
    vectors, codes = problem()
    parts = [fit(vectors[i::3], OneOf(codes[i::3], LABELS), 4.0) for i in range(3)]
    expected = np.mean([part.raw(vectors) for part in parts], axis=0)
    np.testing.assert_allclose(averaged(parts).raw(vectors), expected, atol=1e-4)


@pytest.mark.parametrize("width", [6, 200])
def test_linear_start_changes_the_way_and_not_the_end(width: int) -> None:
    vectors, codes = problem(150, width)
    parts = [fit(vectors[i::3], OneOf(codes[i::3], LABELS), 4.0) for i in range(3)]
    targets = OneOf(codes, LABELS)
    (found,) = path(vectors, targets, (4.0,), tolerance=EXACTLY, start=averaged(parts))
    assert_same_chances(found, scikit_learns(4.0, vectors, codes), vectors)


def test_linear_start_at_the_end_is_nearly_there() -> None:
    """With so large a tolerance that a single step is taken; the negative control starts from nothing."""
    vectors, codes = problem()
    targets = OneOf(codes, LABELS)
    end = fit(vectors, targets, 4.0, tolerance=EXACTLY)
    (near,), (far,) = (path(vectors, targets, (4.0,), tolerance=1.0, start=start) for start in (end, None))
    np.testing.assert_allclose(near.raw(vectors), end.raw(vectors), atol=0.05)
    assert np.abs(far.raw(vectors) - end.raw(vectors)).max() > 1


def test_linear_label_that_no_row_has_is_all_but_impossible() -> None:
    vectors, codes = problem()
    found = fit(vectors, OneOf(codes, LABELS + 1), 4.0)
    assert softmax(found.raw(vectors), axis=1)[:, LABELS].max() < 0.01


def test_linear_feature_that_never_changes_is_left_alone() -> None:
    vectors, codes = problem()
    constant = np.column_stack([vectors, np.full(len(vectors), 3.0, np.float32)])
    found = fit(constant, OneOf(codes, LABELS), 4.0, tolerance=EXACTLY)
    np.testing.assert_allclose(found.weight[:, -1], 0, atol=1e-4)
    assert_same_chances(found, scikit_learns(4.0, constant, codes), constant)


CHUNK = 1024


@pytest.mark.parametrize("targets", ["one of", "any of"])
@pytest.mark.parametrize("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 8 * CHUNK, 8 * CHUNK + 1, 9 * CHUNK + 5])
def test_linear_every_row_counts_once_wherever_chunks_end(rows: int, targets: str) -> None:
    vectors, codes = problem(rows, width=2, labels=2)
    if targets == "one of":
        found = softmax(fit(vectors, OneOf(codes, 2), 0.1, tolerance=EXACTLY).raw(vectors), axis=1)[:, 1]
        c = 0.2  # two rows of weights, each half of scikit-learn's one, are penalised half as much
    else:
        wanted = codes[:, None] == 1
        found = expit(fit(vectors, AnyOf(wanted), 0.1, tolerance=EXACTLY).raw(vectors))[:, 0]
        c = 0.1
    chances = scikit_learns(c, vectors, codes).predict_proba(vectors)[:, 1]
    np.testing.assert_allclose(found, chances, atol=1e-3)


def test_linear_last_row_alone_in_its_chunk_is_not_forgotten() -> None:
    """It is the only one of its label. The negative control leaves it out."""
    vectors = problem(CHUNK, width=2)[0]
    odd = np.concatenate([vectors, [[9, 9]]]).astype(np.float32)
    codes = (np.arange(CHUNK + 1) == CHUNK).astype(np.int64)
    assert fit(odd, OneOf(codes, 2), 100.0).raw(odd)[-1].argmax() == 1
    assert fit(odd[:-1], OneOf(codes[:-1], 2), 100.0).raw(odd)[-1].argmax() == 0


def test_linear_path_ends_where_each_strength_alone_does() -> None:
    vectors, codes = problem()
    strengths = (0.1, 1.0, 10.0)
    for c, found in zip(strengths, path(vectors, OneOf(codes, LABELS), strengths, tolerance=EXACTLY), strict=True):  # fmt: skip
        assert_same_chances(found, scikit_learns(c, vectors, codes), vectors)


def test_linear_path_computes_what_is_asked_for() -> None:
    """A strength of which nobody asks costs nothing: this one would divide by zero."""
    models = path(*_two(), (1.0, 0.0))
    assert np.isfinite(next(models).weight).all()
    with pytest.raises(ZeroDivisionError):
        next(models)


def _two() -> tuple[NDArray[np.float32], OneOf]:
    vectors, codes = problem(50)
    return vectors, OneOf(codes, LABELS)


LARGE = (4500, 64, 40)  # rows, features, labels: enough for several chunks, and for threads
BROAD = (700, 600, 20)  # BLAS rounds products of this width by how many threads they are shared among
WIDE = (300, 600, 20)  # and of more features than rows


def bits(rows: int, width: int, labels: int) -> bytes:
    """Of a fit, and of one that starts there."""
    vectors, codes = problem(rows, width, labels)
    first = fit(vectors, OneOf(codes, labels), 0.01, tolerance=1e-2)
    (then,) = path(vectors, OneOf(codes, labels), (0.02,), tolerance=1e-2, start=first)
    return b"".join(array.tobytes() for found in (first, then) for array in (found.weight, found.bias))


@pytest.mark.parametrize("blas_threads", [1, 2])
@pytest.mark.parametrize(("size", "cores"), [(LARGE, 1), (LARGE, 3), (LARGE, 8), (BROAD, 2), (WIDE, 2)])
def test_linear_bits_do_not_depend_on_the_machines_cores(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], cores: int, blas_threads: int
) -> None:
    monkeypatch.setattr(linear, "_SMALL", 10**15)  # no threads at all
    expected = bits(*size)
    monkeypatch.undo()
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    with threadpool_limits(blas_threads):
        assert bits(*size) == expected


def test_linear_bits_do_depend_on_how_many_sums_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above: a number of sums that followed the cores would not do."""
    expected = bits(*LARGE)
    monkeypatch.setattr(linear, "_PARTS", 2)
    assert bits(*LARGE) != expected


@pytest.mark.parametrize("targets", ["one of", "any of"])
def test_linear_slope_is_that_of_the_loss(targets: str) -> None:
    """Against differences of the loss from the definition, in float64."""
    rng = np.random.default_rng(3)
    raw, codes = rng.normal(0, 2, (5, 3)), rng.integers(0, 3, 5)
    wanted = codes[:, None] == np.arange(3)
    weights = rng.uniform(0.5, 2, 5).astype(np.float32)

    def loss(raw: NDArray[np.float64]) -> float:
        if targets == "one of":
            return float(-(weights * np.log(softmax(raw, axis=1))[np.arange(5), codes]).sum())
        chances = expit(raw)
        return float(-(weights[:, None] * np.where(wanted, np.log(chances), np.log(1 - chances))).sum())

    slope = raw.astype(np.float32)
    of = OneOf(codes, 3, weights) if targets == "one of" else AnyOf(wanted, weights[:, None])
    assert of.slope(slope, slice(0, 5)) == pytest.approx(loss(raw), rel=1e-5)
    for i, j in np.ndindex(raw.shape):
        step = np.zeros_like(raw)
        step[i, j] = 1e-6
        assert slope[i, j] == pytest.approx((loss(raw + step) - loss(raw - step)) / 2e-6, abs=1e-4)


@pytest.mark.parametrize(
    "make", [lambda codes: OneOf(codes, 2), lambda codes: AnyOf(codes[:, None] == np.arange(2))]
)
def test_linear_slope_far_out_overflows_nothing(make: Any) -> None:
    raw = np.array([[1e4, -1e4], [1e4, -1e4]], np.float32)
    value = make(np.array([0, 1])).slope(raw, slice(0, 2))
    assert np.isfinite(value)
    assert raw.tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize(
    ("weights", "rates"), [(None, [0.75, 0.25]), ([1, 1, 1, 5], [0.375, 0.625]), ([0, 0, 0, 1], [0, 1])]
)
def test_linear_rates_are_shares_of_the_rows_weight(
    weights: Sequence[float] | None, rates: list[float]
) -> None:
    given = None if weights is None else np.array(weights, np.float32)
    assert OneOf(np.array([0, 0, 0, 1]), 2, given).rates.tolist() == rates


def test_linear_single_threaded_limits_blas_while_it_lasts() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2):
        with single_threaded(True):
            assert threads() == {1}
        assert threads() == {2}
        with single_threaded(False):
            assert threads() == {2}
