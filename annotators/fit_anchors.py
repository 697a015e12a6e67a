"""Making heads of reference phrases: nothing is trained, but what a cosine means is learnt by leaving each anchor out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators import calibration, prior, thresholds
from annotators.anchors import AnchorsHead
from annotators.answers import Answers
from annotators.fit import About
from annotators.golden import GOLDEN
from annotators.head import Golden, Requires, Spec

FloatArray = NDArray[np.float32]

_SCALE, _THRESHOLD = 20.0, 0.5


def make_anchors(
    about: About,
    texts: Sequence[str],
    vectors: FloatArray,
    answers: Answers,
    *,
    outsiders: FloatArray | None = None,
    patterns: Mapping[str, Sequence[str]] | None = None,
    beta: float = 1.0,
) -> AnchorsHead:
    """Keep the phrases themselves as anchors; scale and threshold come from leaving each anchor out in turn.

    The threshold is one for all labels, because a label of few phrases has no evidence of its own. With one phrase a label
    there is nothing to leave out, and the defaults stand. `patterns` are regular expressions by label.
    """
    targets = answers.codes
    order = np.argsort(targets, kind="stable")
    anchors, owner = vectors[order], targets[order]
    raw, hits = _left_out(anchors, owner, outsiders)
    scale, shift = calibration.fit_platt(raw, hits) if hits.any() and not hits.all() else (0.0, 0.0)
    threshold = _THRESHOLD
    if scale > 0:
        chances = calibration.logistic(raw, scale, shift)
        threshold = min(_THRESHOLD, thresholds.best(chances, hits, float(len(owner)), beta))
    else:  # nothing to learn from, or only noise: a nearer anchor must never score lower
        scale, shift = _SCALE, -_SCALE / 2
    count = len(answers.names)
    params: dict[str, Any] = {}
    if patterns:
        params["patterns"] = {label: list(each) for label, each in patterns.items()}
    spec = Spec(
        name=about.name,
        kind="anchors",
        task=about.task,
        labels=answers.names,
        scale=(scale,) * count,
        shift=(shift,) * count,
        thresholds=(threshold,) * count,
        requires=Requires(vectorizer=about.fingerprint),
        params=params,
        golden=tuple(
            Golden(text=texts[i], label=answers.names[targets[i]])
            for i in order[:: max(1, len(order) // GOLDEN)][:GOLDEN]
        ),
        prior=_said(answers.names, anchors, owner, scale, shift, threshold) if hits.any() else None,
        made_by=about.made_by,
    )
    return AnchorsHead(spec, anchors, owner)


def _said(
    names: Sequence[str],
    anchors: FloatArray,
    owner: NDArray[np.int64],
    scale: float,
    shift: float,
    threshold: float,
) -> dict[str, float] | None:
    """Shares of what the head would say of each anchor, if that anchor were not among its own."""
    cosines = anchors @ anchors.T
    np.fill_diagonal(cosines, -1.0)
    scores = np.zeros((len(anchors), len(names)), np.float32)
    nearest = cosines.argmax(axis=1)
    rows = np.arange(len(anchors))
    scores[rows, owner[nearest]] = calibration.logistic(cosines[rows, nearest], scale, shift)
    return prior.of_scores(names, scores, (threshold,) * len(names), exclusive=True)


def _left_out(
    anchors: FloatArray, owner: NDArray[np.int64], outsiders: FloatArray | None
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The cosine of each anchor, and of each outsider, to its nearest other anchor, and whether that is its label's."""
    cosines = anchors @ anchors.T
    np.fill_diagonal(cosines, -1.0)
    raw, hits = cosines.max(axis=1), owner[cosines.argmax(axis=1)] == owner
    if outsiders is None or not len(outsiders):
        return raw, hits
    strangers = (outsiders @ anchors.T).max(axis=1)
    return np.concatenate([raw, strangers]), np.concatenate([hits, np.zeros(len(strangers), np.bool_)])
