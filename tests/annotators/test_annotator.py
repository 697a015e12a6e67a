"""What heads see: sizes counted from the arrays, and a lone phrase as a turn."""

from __future__ import annotations

import numpy as np
import pytest

from annotators.annotator import Encoding, Heard, HeardTurn
from tests.annotators.toys import encoded, tokenized


@pytest.mark.parametrize(
    ("encoding", "nbytes"),
    [
        pytest.param(encoded([1, 2, 3]), 12, id="sentence of three floats"),
        pytest.param(tokenized([[1, 2, 3]] * 5, [(0, 1)] * 5), 8 + 60 + 40, id="five tokens of three floats"),
        pytest.param(tokenized(np.zeros((0, 3)), []), 8, id="no tokens"),
    ],
)
def test_annotator_encoding_counts_its_bytes(encoding: Encoding, nbytes: int) -> None:
    assert encoding.nbytes == nbytes


def test_annotator_a_lone_phrase_is_one_hypothesis_of_full_weight() -> None:
    encoding, before = encoded([1, 0]), HeardTurn("assistant", encoded([0, 1]))
    turn = Heard.alone("hello", encoding, [before])
    assert turn == Heard(("hello",), (encoding,), (1.0,), 0, (before,))
