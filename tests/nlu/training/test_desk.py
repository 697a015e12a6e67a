"""nlu.training.desk: which rows exams are set from."""

from __future__ import annotations

import numpy as np

from nlu.public_data import Labelled
from nlu.training.datasets import Pair
from nlu.training.desk import choose_pairs, draw_shots, some, without

LABELS = np.array(["a"] * 6 + ["b"] * 6 + ["c"])


def test_desk_shots_are_drawn_alike_each_time() -> None:
    rows = draw_shots(LABELS, 4, 1)
    assert rows.tolist() == draw_shots(LABELS, 4, 1).tolist()
    assert LABELS[rows].tolist() == ["a"] * 4 + ["b"] * 4 + ["c"], "a label with fewer gives what it has"
    assert len(set(rows.tolist())) == 9
    assert any(draw_shots(LABELS, 4, seed).tolist() != rows.tolist() for seed in (0, 2, 3))


def test_desk_fewer_shots_are_the_first_of_more_and_labels_do_not_disturb_each_other() -> None:
    more, fewer = draw_shots(LABELS, 5, 0), draw_shots(LABELS, 2, 0)
    assert set(fewer.tolist()) < set(more.tolist())
    assert draw_shots(LABELS[:6], 5, 0).tolist() == more[:5].tolist()


def test_desk_training_leaves_out_test_phrases() -> None:
    train = [Labelled("Hello there", ("a",)), Labelled("bye", ("b",))]
    assert without(train, [Labelled("hello there", ("a",))]) == train[1:]


def test_desk_some_keeps_order_and_draws_by_position() -> None:
    words = [f"w{i}" for i in range(50)]
    drawn = some(words, 10)
    assert len(drawn) == 10 and drawn == sorted(drawn, key=words.index)
    assert [word.upper() for word in drawn] == some([word.upper() for word in words], 10)
    assert some(words, 0) == some(words, 99) == words


def test_desk_pairs_have_one_right_answer() -> None:
    pairs = [Pair(f"a{i}", "yes" if i % 2 else f"b{i}", 0) for i in range(20)]
    chosen = choose_pairs(pairs, 8)
    assert len(chosen) == 8 and chosen == choose_pairs(pairs, 8)
    assert sum(pair.positive == "yes" for pair in choose_pairs(pairs, 20)) == 1
