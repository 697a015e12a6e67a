"""nlu.retrieval.lambdarank: trees that find what tells the true reply, and a graph that scores as they do."""

from __future__ import annotations

import numpy as np
import pytest

from nlu.ranker import Ranker
from nlu.retrieval import lambdarank


def test_lambdarank_graph_scores_as_its_trees() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((200, 8, 5)).astype(np.float32)
    table[:, 0, 2] += 1.5
    fitted = lambdarank.fit(table[:150], table[150:], seed=0)
    assert np.argmax(fitted.gains()) == 2
    assert fitted.gains().sum() == pytest.approx(1.0)
    spec = Ranker.linear({"weight": 1.0}).spec.model_copy(
        update={"kind": "trees", "weights": {}, "features": ("weight", "similarity", "reply_asks", "repeated", "own_voice")}
    )  # fmt: skip
    rows = table.reshape(-1, 5)
    served = Ranker.trees(spec, fitted.to_onnx()).score(rows)
    np.testing.assert_allclose(served, fitted.booster.predict(rows), atol=1e-5)


def test_lambdarank_ties_count_against_the_true_reply() -> None:
    """A table that tells nothing is worth no more than the last place; LightGBM breaks ties by the order of the rows."""
    table = np.zeros((100, 6, 2), np.float32)
    fitted = lambdarank.fit(table[:60], table[60:], seed=0)
    assert fitted.gains().sum() == 0.0
    assert fitted.ndcg == pytest.approx(1 / np.log2(1 + 6))  # first of ties it would be 1
