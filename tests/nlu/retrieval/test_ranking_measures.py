"""nlu.retrieval.ranking_measures: candidate sets that are fair, places that do not flatter, intervals that know dialogs."""

from __future__ import annotations

import numpy as np
import pytest

from nlu.retrieval.dialogs import Exchange
from nlu.retrieval.ranking_measures import candidates, distinct_replies, interval, mrr, places, recall_at


def made(dialogs: int = 12, turns: int = 4) -> list[Exchange]:
    """Each dialog has replies of its own, and one that they all have."""
    return [
        Exchange(f"d{dialog}", ("so?",), reply, reply)
        for dialog in range(dialogs)
        for reply in [*(f"reply {dialog}.{turn}" for turn in range(turns)), "всем привет"]
    ]


def test_ranking_measures_candidates_are_the_true_reply_and_others_of_other_dialogs() -> None:
    exchanges = made()
    replies = distinct_replies(exchanges)
    sets = candidates(exchanges, 10, seed=3)
    assert sets.shape == (len(exchanges), 10)
    for exchange, row in zip(exchanges, sets, strict=True):
        texts = [replies[i] for i in row]
        own = {each.reply for each in exchanges if each.dialog == exchange.dialog}
        assert texts[0] == exchange.reply
        assert len(set(texts)) == 10
        assert not own & set(texts[1:])


def test_ranking_measures_candidates_follow_their_seed() -> None:
    exchanges = made()
    assert np.array_equal(candidates(exchanges, 10, seed=3), candidates(exchanges, 10, seed=3))
    assert not np.array_equal(candidates(exchanges, 10, seed=3), candidates(exchanges, 10, seed=4))


def test_ranking_measures_candidates_are_drawn_evenly() -> None:
    exchanges = made(dialogs=6)
    rows = np.concatenate(
        [candidates(exchanges[:1] + exchanges[5:], 6, seed=seed)[:1] for seed in range(2000)]
    )
    counts = np.bincount(rows[:, 1:].ravel())
    assert counts[0] == 0  # the true one
    counts = counts[1:]
    assert len(counts) == 21
    assert abs(counts / len(rows) - 5 / 21).max() < 0.05


def test_ranking_measures_too_few_replies_are_refused() -> None:
    exchanges = made(dialogs=3)  # 13 replies, 5 of them a dialog's own
    assert candidates(exchanges, 9, seed=0).shape == (15, 9)
    with pytest.raises(ValueError, match="found 8 replies outside the longest dialog, expected at least 9"):
        candidates(exchanges, 10, seed=0)
    with pytest.raises(ValueError, match="of: found 1, expected at least 2"):
        candidates(exchanges, 1, seed=0)


def test_ranking_measures_places_count_ties_against_the_true_reply() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [0.1, 0.3, 0.2]], np.float32)
    assert places(scores).tolist() == [1, 2, 3, 3]
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="scores: found NaN"):
        places(scores)


def test_ranking_measures_recall_and_mrr_are_those_of_hand() -> None:
    found = np.array([1, 2, 4, 10])
    assert [recall_at(found, k) for k in (1, 5, 10)] == [0.25, 0.75, 1.0]
    assert mrr(found) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 10) / 4)


def test_ranking_measures_interval_covers_the_mean_and_narrows_with_more_dialogs() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for dialogs in (50, 800):
        groups = [f"d{i}" for i in range(dialogs) for _ in range(4)]
        values = rng.random(len(groups))
        low, high = interval(values, groups, seed=1)
        assert low < values.mean() < high
        assert interval(values, groups, seed=1) == (low, high)
        widths.append(high - low)
    # Twice the standard error of a mean of independent numbers, four times as many per dialog.
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 200), rel=0.3)
    assert widths[1] < widths[0] / 2


def test_ranking_measures_interval_is_wider_where_a_dialog_speaks_with_one_voice() -> None:
    groups = [f"d{i}" for i in range(100) for _ in range(9)]
    alike = np.repeat(np.random.default_rng(0).random(100), 9)
    low, high = interval(alike, groups, seed=0)
    alone_low, alone_high = interval(
        alike, [f"e{i}" for i in range(900)], seed=0
    )  # dialogs unknown: overconfident
    assert high - low > 2 * (alone_high - alone_low)


def test_ranking_measures_interval_needs_two_dialogs() -> None:
    with pytest.raises(ValueError, match="found 1 dialogs, expected at least 2"):
        interval(np.ones(5), ["only"] * 5, seed=0)
