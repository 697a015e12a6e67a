"""An adapter that turns every query far, as if it had been learnt and judged."""

from __future__ import annotations

import numpy as np

from index.adapter import Adapter, Change, Exam, Requires, Residual, Spec, bound

EPS = 0.9


def turning(dim: int) -> Adapter:
    """Of random weights, so long that every query is moved as far as may be."""
    rng = np.random.default_rng(0)
    learnt = Residual.of(4 * rng.standard_normal((2, dim)), rng.standard_normal((dim, 2)), EPS)
    change = Change(before=0.5, after=0.75, low=0.1, high=0.4)
    exam = Exam(questions=20, recall_at_1=change, recall_at_10=change, mrr=change)
    spec = Spec(
        dim=dim, rank=2, eps=EPS, bound=bound(EPS), factor=1.0, max_harm=0.01, new=exam, old=exam, rows=9,
        requires=Requires(vectorizer="ab" * 32),
    )  # fmt: skip
    return Adapter(spec, learnt)
