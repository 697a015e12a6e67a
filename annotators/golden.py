"""Golden phrases: what a head answers right with room to spare, to be asked again wherever it is loaded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 24
_MARGIN = 0.15


def rows(scores: NDArray[np.float32], wanted: NDArray[np.bool_]) -> list[int]:
    """Rows of scores [rows, labels] whose best label is among the wanted ones and clear of the next, spread over labels."""
    best = scores.argmax(axis=1)
    ordered = np.sort(scores, axis=1)
    margin = ordered[:, -1] - (ordered[:, -2] if scores.shape[1] > 1 else 0)
    safe = wanted[np.arange(len(scores)), best] & (margin >= _MARGIN)
    best_of_label = [
        int(mine[margin[mine].argmax()])
        for label in range(scores.shape[1])
        for mine in (np.flatnonzero(safe & (best == label)),)
        if len(mine)
    ]
    if len(best_of_label) <= GOLDEN:
        return sorted(best_of_label)
    spread = np.linspace(0, len(best_of_label) - 1, GOLDEN).round().astype(int).tolist()
    return sorted(best_of_label[i] for i in spread)
