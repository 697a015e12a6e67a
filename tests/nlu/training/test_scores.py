"""nlu.training.scores: intervals, and changes on the same rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from nlu.training.measures import mean_of
from nlu.training.scores import Outcome, compare


def hits_of(values: Iterable[float]) -> Outcome:
    hits = np.array(list(values))
    return Outcome("intents", "full", "accuracy", len(hits), mean_of(hits))


def test_scores_compare_finds_no_change_in_equals() -> None:
    one, same = compare([hits_of([1, 0, 1, 1] * 50)] * 2, 200)
    assert one.value == same.value == 0.75 and one.low == same.low
    assert one.low is not None and one.high is not None and one.low < 0.75 < one.high
    assert one.change is None and one.verdict == 0
    assert (same.change, same.change_low, same.change_high, same.verdict) == (0.0, 0.0, 0.0, 0)


def test_scores_compare_is_paired() -> None:
    base = [1.0] * 100 + [0.0] * 100
    better = [1.0] * 112 + [0.0] * 88
    one, other = compare([hits_of(base), hits_of(better)], 300)
    assert other.change == pytest.approx(0.06) and other.verdict == 1
    assert one.high is not None and other.low is not None
    assert other.low < one.high, "side by side the intervals overlap; only the paired change tells"
    assert compare([hits_of(better), hits_of(base)], 300)[1].verdict == -1
    # the same two numbers from unrelated rows prove nothing
    assert compare([hits_of(base), hits_of([0.0] * 88 + [1.0] * 112)], 300)[1].verdict == 0


def test_scores_compare_does_not_pair_other_rows() -> None:
    assert compare([hits_of([1, 0]), hits_of([1, 0, 1])], 20)[1].change is None
