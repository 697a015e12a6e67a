"""What a head says of the phrases it was trained for, as shares of its labels: what its live answers are held against.

Shares are those of the answers that folds gave to phrases they did not see, thresholds applied, so that a head which hears
in service what it was made for has the same shares there, abstentions included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation

NONE = "none"  # nothing was accepted and nothing marked; a label of this name counts with it

_DIGITS = 6


def said(annotation: Annotation) -> list[str]:
    """The labels an answer counts for: all that were accepted or marked, else NONE."""
    labels = [label.label for label in annotation.labels if label.accepted]
    labels += [span.label for span in annotation.spans]
    return labels or [NONE]


def shares(counts: Mapping[str, float]) -> dict[str, float] | None:
    """Shares of what was said, that sum to 1, by name; None where nothing was."""
    total = sum(counts.values())
    if total <= 0:
        return None
    return {name: round(count / total, _DIGITS) for name, count in sorted(counts.items()) if count > 0}


def of_scores(
    names: Sequence[str],
    scores: NDArray[np.float32],
    thresholds: Sequence[float],
    *,
    exclusive: bool,
    inside: NDArray[np.bool_] | None = None,
) -> dict[str, float] | None:
    """Shares of what calibrated scores [rows, labels] come to; `inside` [rows] says which phrases are not out of scope."""
    accepted = scores >= np.asarray(thresholds, np.float32)
    if exclusive:
        accepted &= np.arange(len(names)) == scores.argmax(axis=1)[:, None]
    if inside is not None:
        accepted &= inside[:, None]
    counts = dict(zip(names, accepted.sum(axis=0).tolist(), strict=True))
    counts[NONE] = counts.get(NONE, 0) + int((~accepted.any(axis=1)).sum())
    return shares(counts)
