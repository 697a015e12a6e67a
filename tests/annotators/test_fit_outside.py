"""Fitting the score of being out of scope: the best measure wins, and the score is a chance."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import fbeta_score, roc_auc_score

from annotators import fit_outside
from annotators.answers import HeldOut
from annotators.fit_outside import METHODS, FittedOutside
from annotators.outside import MEASURES, measured

SCALE = 2.0


def held_out(
    *, by_logit: float = 1.0, by_centroid: float = 1.0, rows: int = 300, strange: int = 120
) -> HeldOut:
    """Phrases whose best raw score, and whose best cosine, lie this many deviations above those of outsiders."""
    rng = np.random.default_rng(7)

    def table(count: int, lift: float, spread: float) -> NDArray[np.float32]:
        values = rng.normal(0, spread / 4, (count, 3))
        values[np.arange(count), rng.integers(0, 3, count)] += spread * (3 + lift + rng.normal(0, 1, count))
        return values.astype(np.float32)

    return HeldOut(
        table(rows, by_logit, 1.0), table(strange, 0.0, 1.0), table(rows, by_centroid, 0.1), table(strange, 0.0, 0.1)
    )  # fmt: skip


def rows_of(held: HeldOut, method: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The method's measures of all phrases, then of all outsiders, and which is which."""
    inside = measured(held.raw * np.float32(SCALE), held.cosines)
    strange = measured(held.strange * np.float32(SCALE), held.strange_cosines)
    columns = [MEASURES.index(name) for name in METHODS[method]]
    rows = np.concatenate([inside, strange])[:, columns].astype(np.float64)
    return rows, np.arange(len(rows)) >= len(inside)


@pytest.mark.parametrize(
    ("by_logit", "by_centroid", "methods"),
    [
        pytest.param(3.0, 0.0, {"max_logit", "energy"}, id="the logits tell"),
        pytest.param(0.0, 3.0, {"centroid"}, id="the centroids tell"),
        pytest.param(1.5, 1.5, {"blend"}, id="each tells half"),
    ],
)
def test_fit_outside_chooses_what_tells(by_logit: float, by_centroid: float, methods: set[str]) -> None:
    fitted = fit_outside.fit(held_out(by_logit=by_logit, by_centroid=by_centroid), SCALE, centroids=True)
    assert fitted.outside.method in methods
    assert set(fitted.aurocs) == set(METHODS)


def test_fit_outside_blend_that_is_a_hair_better_is_not_worth_its_centroids() -> None:
    fitted = fit_outside.fit(held_out(by_logit=3.0, by_centroid=0.5), SCALE, centroids=True)
    assert fitted.aurocs["blend"] == max(fitted.aurocs.values()) > fitted.aurocs["max_logit"]
    assert fitted.outside.method == "max_logit"
    assert not fitted.outside.needs_centroids


def test_fit_outside_without_centroids_none_are_needed() -> None:
    fitted = fit_outside.fit(held_out(by_logit=0.0, by_centroid=3.0), SCALE, centroids=False)
    assert set(fitted.aurocs) == {"max_logit", "energy"}
    assert not fitted.outside.needs_centroids


def test_fit_outside_aurocs_are_of_the_measures() -> None:
    """A logistic fit of one measure keeps its order within a fold; only between folds can pairs be exchanged."""
    held = held_out()
    fitted = fit_outside.fit(held, SCALE, centroids=True)
    for method in ("max_logit", "energy", "centroid"):
        rows, is_outside = rows_of(held, method)
        assert fitted.aurocs[method] == pytest.approx(roc_auc_score(is_outside, -rows[:, 0]), abs=0.01)


@pytest.mark.parametrize(
    ("by_logit", "by_centroid"), [(3.0, 0.0), (0.0, 3.0), (1.5, 1.5)], ids=["logits", "centroids", "blend"]
)
def test_fit_outside_score_is_the_margin_of_a_weighted_logistic_regression(
    by_logit: float, by_centroid: float
) -> None:
    """What is served, in float32 from coefficients in head.json, against scikit-learn's own answer."""
    held, share = held_out(by_logit=by_logit, by_centroid=by_centroid), 0.1
    outside = fit_outside.fit(held, SCALE, centroids=True, share=share).outside
    rows, is_outside = rows_of(held, outside.method)
    weights = np.where(is_outside, share / is_outside.sum(), (1 - share) / (~is_outside).sum()) * len(rows)
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    model = LogisticRegression(C=10.0).fit(standard, is_outside, sample_weight=weights)
    inside = measured(held.raw * np.float32(SCALE), held.cosines)
    strange = measured(held.strange * np.float32(SCALE), held.strange_cosines)
    found = outside.score(np.concatenate([inside, strange]))
    np.testing.assert_allclose(found, model.predict_proba(standard)[:, 1], atol=1e-4)


def test_fit_outside_scores_are_of_phrases_the_fit_did_not_see() -> None:
    """They come from folds, so they differ from the score that is served, but never far."""
    held = held_out()
    fitted = fit_outside.fit(held, SCALE, centroids=True)
    served = fitted.outside.score(measured(held.raw * np.float32(SCALE), held.cosines))
    assert not np.array_equal(fitted.inside_scores, served)
    np.testing.assert_allclose(fitted.inside_scores, served, atol=0.1)
    assert (len(fitted.inside_scores), len(fitted.outside_scores)) == (300, 120)
    assert fitted.outside_scores.mean() > fitted.inside_scores.mean()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_fit_outside_scores_are_chances_at_the_share_expected(share: float) -> None:
    """Whatever the number of outsiders: here there are more of them than phrases."""
    held = held_out(rows=200, strange=400)
    fitted = fit_outside.fit(held, SCALE, centroids=True, share=share)
    expected = (1 - share) * fitted.inside_scores.mean() + share * fitted.outside_scores.mean()
    assert expected == pytest.approx(share, rel=0.1)


def test_fit_outside_threshold_is_the_best_f1_of_all_cuts() -> None:
    held, share = held_out(), 0.3
    fitted = fit_outside.fit(held, SCALE, centroids=True, share=share)
    scores = np.concatenate([fitted.inside_scores, fitted.outside_scores])
    is_outside = np.arange(420) >= 300
    weights = np.where(is_outside, share / 120, (1 - share) / 300)

    def f1(cut: float) -> float:
        return float(fbeta_score(is_outside, scores >= cut, beta=1.0, sample_weight=weights, zero_division=0))

    assert f1(fitted.outside.threshold) == pytest.approx(max(f1(cut) for cut in scores), abs=1e-9)


def test_fit_outside_follows_the_seed() -> None:
    def scores(seed: int) -> bytes:
        fitted: FittedOutside = fit_outside.fit(held_out(), SCALE, centroids=True, seed=seed)
        return fitted.inside_scores.tobytes() + fitted.outside.model_dump_json().encode()

    assert scores(5) == scores(5) != scores(6)


@pytest.mark.parametrize("strange", [1, 2])
def test_fit_outside_of_hardly_any_outsiders_is_still_a_score(strange: int) -> None:
    fitted = fit_outside.fit(held_out(by_logit=6.0, strange=strange), SCALE, centroids=True)
    assert np.isfinite(fitted.inside_scores).all()
    unknown, known = fitted.outside.score(np.array([[0, 0, 0], [20, 20, 1]], np.float32))
    assert unknown > 0.5 > known
