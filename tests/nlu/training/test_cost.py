"""nlu.training.cost: turns on the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nlu.training.cost import time_each


def test_cost_is_timed_by_turns() -> None:
    now = 0.0
    order: list[str] = []

    def encoder(name: str, seconds: float) -> Callable[..., None]:
        def encode(phrases: list[str], *, tokens: bool) -> None:
            nonlocal now
            assert len(phrases) == 1 and not tokens
            order.append(name)
            now += seconds * (9 if len(order) <= 2 else 1)  # the machine was busy at first

        return encode

    phrases = [["a", "b", "c"], ["A", "B", "C"]]
    one, other = time_each([encoder("x", 0.001), encoder("y", 0.004)], phrases, clock=lambda: now)
    assert one.tolist() == pytest.approx([1.0] * 3) and other.tolist() == pytest.approx([4.0] * 3)
    assert all(set(order[i : i + 2]) == {"x", "y"} for i in range(0, len(order), 2))
    assert order[:4] == ["x", "y", "y", "x"]
