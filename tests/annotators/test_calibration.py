"""Scores that mean what they say: a known temperature is found again, and Platt scaling equals scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from annotators.calibration import fit_platt, fit_temperature, logistic, softmax
from annotators.report import expected_calibration_error

ROWS = 5000
LN_3 = float(np.log(3))


def drawn(scale: float, labels: int = 4, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Raw scores, and targets drawn from softmax(scale * raw): the scores are off by exactly that scale."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(0, 2 / scale, (ROWS, labels)).astype(np.float32)
    gumbel = rng.gumbel(size=raw.shape)
    return raw, (scale * raw + gumbel).argmax(axis=1)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0, 12.0])
def test_calibration_temperature_recovers_a_known_one(scale: float) -> None:
    assert fit_temperature(*drawn(scale)) == pytest.approx(scale, rel=0.06)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_calibration_temperature_lowers_the_calibration_error(scale: float) -> None:
    raw, targets = drawn(scale)
    half = ROWS // 2
    fitted = fit_temperature(raw[:half], targets[:half])
    right = raw[half:].argmax(axis=1) == targets[half:]
    before = expected_calibration_error(softmax(raw[half:]).max(axis=1).astype(np.float64), right)
    after = expected_calibration_error(
        softmax(np.float32(fitted) * raw[half:]).max(axis=1).astype(np.float64), right
    )
    assert before > 0.1
    assert after < 0.03


def test_calibration_temperature_is_the_lowest_loss_of_a_fine_grid() -> None:
    raw, targets = drawn(2.0, seed=3)
    grid = np.geomspace(0.5, 8.0, 401)
    losses = [-log_softmax(scale * raw, axis=1)[np.arange(ROWS), targets].mean() for scale in grid]
    assert fit_temperature(raw, targets) == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


def test_calibration_temperature_of_faultless_scores_stays_finite() -> None:
    """Nothing stops the likelihood from rising, so only the bound does."""
    scale = fit_temperature(np.eye(3, dtype=np.float32), np.arange(3))
    assert 10 < scale <= np.exp(4.0)


@pytest.mark.parametrize(
    ("scale", "shift", "rows"), [(3.0, -1.0, 400), (20.0, -10.0, 400), (-2.0, 0.5, 400), (5.0, 0.0, 12)]
)
def test_calibration_platt_equals_scikit_learn(scale: float, shift: float, rows: int) -> None:
    """Platt's smoothed targets are two weighted rows, one of each class, to a logistic regression without penalty."""
    rng = np.random.default_rng(1)
    raw = rng.uniform(-1, 1, rows).astype(np.float32)
    targets = rng.random(rows) < 1 / (1 + np.exp(-(scale * raw + shift)))
    positive, negative = int(targets.sum()), int((~targets).sum())
    smooth = np.where(targets, (positive + 1) / (positive + 2), 1 / (negative + 2))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(
        np.concatenate([raw, raw])[:, None],
        np.repeat([True, False], rows),
        sample_weight=np.concatenate([smooth, 1 - smooth]),
    )
    assert fit_platt(raw, targets) == pytest.approx(
        (model.coef_[0, 0], model.intercept_[0]), rel=2e-3, abs=2e-3
    )


def test_calibration_platt_of_separable_scores_stays_finite() -> None:
    """Smoothing alone keeps it so: the plain likelihood has no maximum here."""
    raw = np.array([-1, -1, -1, 1, 1, 1], np.float32)
    scale, shift = fit_platt(raw, raw > 0)
    assert logistic(raw, scale, shift) == pytest.approx([0.2] * 3 + [0.8] * 3, abs=1e-3)


@pytest.mark.parametrize(
    ("raw", "scale", "shift", "score"),
    [(0.0, 3.0, 0.0, 0.5), (1.0, 0.0, LN_3, 0.75), (0.5, 2 * LN_3, 0.0, 0.75), (-1.0, LN_3, 0.0, 0.25)],
)
def test_calibration_logistic_by_hand(raw: float, scale: float, shift: float, score: float) -> None:
    assert logistic(np.array([raw], np.float32), scale, shift)[0] == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(("raw", "score"), [(-1e4, 0.0), (1e4, 1.0)])
def test_calibration_logistic_far_out_overflows_nothing(raw: float, score: float) -> None:
    assert logistic(np.array([raw], np.float32), 50.0, 0.0)[0] == score


def test_calibration_softmax_by_hand() -> None:
    raw = np.log(np.array([[1, 2, 5], [6, 1, 1]], np.float32))
    found = softmax(raw)
    np.testing.assert_allclose(found, [[0.125, 0.25, 0.625], [0.75, 0.125, 0.125]], rtol=1e-6)
    assert found.dtype == np.float32


def test_calibration_softmax_far_out_overflows_nothing() -> None:
    assert softmax(np.array([[1e4, 0], [-1e4, 0]], np.float32)).tolist() == [[1, 0], [0, 1]]
