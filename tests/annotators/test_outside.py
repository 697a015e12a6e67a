"""Being out of scope as a score: three measures, each by its definition, and what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import expit, logsumexp

from annotators.outside import MEASURES, Outside, logistic, measured
from tests.annotators.toys import random_units


def test_outside_measures_are_the_largest_logit_the_energy_and_the_nearest_centroid() -> None:
    logits, cosines = 5 * random_units(20, 6, seed=1), random_units(20, 6, seed=2)
    found = dict(zip(MEASURES, measured(logits, cosines).T, strict=True))
    assert list(found) == ["max_logit", "energy", "centroid"]
    np.testing.assert_array_equal(found["max_logit"], logits.max(axis=1))
    np.testing.assert_allclose(found["energy"], logsumexp(logits.astype(np.float64), axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found["centroid"], cosines.max(axis=1))


def test_outside_without_centroids_their_measure_is_zero() -> None:
    assert measured(np.ones((2, 3), np.float32), None)[:, 2].tolist() == [0, 0]


def test_outside_energy_of_large_logits_overflows_nothing() -> None:
    assert measured(np.array([[1e4, 0], [-1e4, 0]], np.float32), None)[:, 1].tolist() == [1e4, 0]


def test_outside_score_is_lower_the_better_a_phrase_is_known() -> None:
    outside = Outside(method="blend", max_logit=0.5, energy=0.25, centroid=2.0, shift=3.0, threshold=0.5)
    measures = np.array([[1, 2, 0.5], [4, 5, 0.9]], np.float32)
    expected = expit([3 - (0.5 + 0.5 + 1.0), 3 - (2.0 + 1.25 + 1.8)])
    found = outside.score(measures)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] < found[0]
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("coefficients", "needed"),
    [
        ({"max_logit": 1.0}, False),
        ({"energy": 1.0}, False),
        ({"centroid": 0.1}, True),
        ({"centroid": -0.1}, True),
    ],
)
def test_outside_needs_centroids_only_where_it_goes_by_them(
    coefficients: dict[str, float], needed: bool
) -> None:
    assert Outside(method="m", shift=0.0, threshold=0.5, **coefficients).needs_centroids is needed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.5}, "less than or equal to 1"),
        ({"threshold": -0.1}, "greater than or equal to 0"),
        ({"shift": float("nan")}, "finite"),
        ({"centroid": float("inf")}, "finite"),
        ({"centroids": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_outside_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"method": "energy", "energy": 1.0, "shift": 0.0, "threshold": 0.5}
    assert Outside(**usual).threshold == 0.5
    with pytest.raises(ValidationError, match=message):
        Outside(**usual | fields)


def test_outside_logistic_far_out_overflows_nothing() -> None:
    margins = np.array([-1e4, -1, 0, 1, 1e4], np.float32)
    np.testing.assert_allclose(logistic(margins), expit(margins), rtol=1e-6)
    assert logistic(margins)[[0, -1]].tolist() == [0, 1]
