"""nlu.training.candidate: vectors whole and cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from annotators.annotator import Encoding
from nlu.training import candidate
from nlu.training.candidate import Candidate


def test_candidate_principal_axes_are_those_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((400, 3)) * [0.1, 5.0, 1.0] + [7.0, 0.0, 0.0]).astype(np.float32)
    axes = candidate.principal_axes(vectors)
    assert np.abs(axes).argmax(axis=0).tolist() == [1, 2, 0]
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-5)


def test_candidate_cut_keeps_what_varies_most() -> None:
    vectors = {"a": (0.6, 0.0, 0.8), "b": (-0.6, 0.0, 0.8), "c": (0.0, 0.28, 0.96)}

    def encode(phrases: Sequence[str], _tokens: bool) -> list[Encoding]:
        return [Encoding(np.array(vectors[phrase], np.float32)) for phrase in phrases]

    whole = Candidate("by hand", True, encode)
    (cut,) = candidate.truncated(whole, [1], ["a", "b"])
    assert (cut.name, cut.vectorizer) == ("by hand@1", "by hand")
    assert cut.axes is not None and np.abs(cut.axes).ravel().tolist() == [1.0, 0.0, 0.0]
    assert np.array_equal(np.abs(cut.vectors(["a", "b", "c"])), [[1.0], [1.0], [0.0]])
    assert cut.vectors(["a"]) == -cut.vectors(["b"])
    assert candidate.truncated(whole, [], []) == []
