"""Scores that mean what they say: temperature and Platt scaling, fitted on held-out raw scores, stored as scale and shift.

Temperature: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Platt 1999 for labels that do not exclude each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit

_TEMPERATURE_LOG_BOUNDS = (-4.0, 4.0)


def softmax(raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise softmax of [rows, labels]."""
    powers = np.exp(raw - raw.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return result


def fit_temperature(raw: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """The scale that minimises the negative log-likelihood of held-out raw scores [rows, labels]."""
    behind = raw - raw.max(axis=1, keepdims=True)  # no exponential can overflow
    right = behind[np.arange(len(targets)), targets].mean(dtype=np.float64)

    def loss(log_scale: float) -> float:
        scale = np.float32(np.exp(log_scale))
        return float(np.log(np.exp(behind * scale).sum(axis=1)).mean(dtype=np.float64) - scale * right)

    return float(np.exp(minimize_scalar(loss, bounds=_TEMPERATURE_LOG_BOUNDS, method="bounded").x))


def fit_platt(raw: NDArray[np.float32], targets: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and shift of one label, fitted to held-out raw scores [rows] with Platt's smoothed targets."""
    positive, negative = int(targets.sum()), int((~targets).sum())
    smooth = np.where(targets, (positive + 1) / (positive + 2), 1 / (negative + 2))

    values = raw.astype(np.float64)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = parameters[0] * values + parameters[1]
        slopes = expit(margin) - smooth
        value = np.mean(np.logaddexp(0.0, margin) - smooth * margin)
        return float(value), np.array([np.mean(slopes * values), np.mean(slopes)])

    scale, shift = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B").x
    return float(scale), float(shift)


def logistic(raw: NDArray[np.float32], scale: float, shift: float) -> NDArray[np.float32]:
    """Platt scaling of [rows]."""
    result: NDArray[np.float32] = expit(scale * raw.astype(np.float64) + shift).astype(np.float32)
    return result
