"""Out of scope as a score of its own: how sure a head is that a phrase is none of what it knows.

Three measures, each of what the labels say already: the largest logit (Hendrycks et al. 2022), the energy, which is the
log of the summed exponentials (Liu et al. 2020), and the cosine to the nearest label's centroid. Which of them a head goes
by, or which blend, is chosen on held-out phrases when it is fitted; here they are only added up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

MEASURES = ("max_logit", "energy", "centroid")
CENTROIDS = "centroids"  # the tensor [labels, dim], unit length, of a head that goes by them

FloatArray = NDArray[np.float32]


class Outside(BaseModel):
    """score = logistic(shift - sum of coefficients * measures); from `threshold` on no label is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    max_logit: float = 0.0
    energy: float = 0.0
    centroid: float = 0.0
    shift: float
    threshold: float = Field(ge=0.0, le=1.0)

    @property
    def needs_centroids(self) -> bool:
        """Whether the head has to carry them."""
        return self.centroid != 0.0

    def score(self, measures: FloatArray) -> FloatArray:
        """[...] of measures [..., 3], in the order of MEASURES."""
        coefficients = np.array([self.max_logit, self.energy, self.centroid], np.float32)
        return logistic(np.float32(self.shift) - measures @ coefficients)


def measured(logits: FloatArray, cosines: FloatArray | None) -> FloatArray:
    """[rows, 3] of calibrated logits [rows, labels] and cosines to the centroids [rows, labels]; 0 where there are none."""
    peaks = logits.max(axis=1)
    energy = peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=1))
    nearest = np.zeros_like(peaks) if cosines is None else cosines.max(axis=1)
    return np.stack([peaks, energy, nearest], axis=1).astype(np.float32)


def logistic(margin: FloatArray) -> FloatArray:
    """1 / (1 + exp(-margin))."""
    with np.errstate(over="ignore"):  # far below zero the score is 0
        result = 1 / (1 + np.exp(-margin))
    return result.astype(np.float32, copy=False)
