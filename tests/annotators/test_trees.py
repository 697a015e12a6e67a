"""Trees as ONNX: what is served answers as LightGBM itself does, for any number of rows, from the same bytes each time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from annotators.answers import Answers
from annotators.boosted import BoostedHead
from annotators.learners import BoostedLearner, BoostedModel
from annotators.trees import to_onnx
from tests.annotators.clouds import DIM, cloud
from tests.annotators.toys import make_spec, random_units

LABELS = ("light", "music", "stop")


def model_of(labels: int, seed: int = 0) -> BoostedModel:
    said = cloud(0.4, per_label=25)
    names = [label if LABELS.index(label) < labels else "light" for label in said.firsts]
    return next(BoostedLearner(seed=seed).path(said.vectors, Answers.one(names), (20,)))


def served(model: BoostedModel) -> BoostedHead:
    return BoostedHead.of(make_spec(LABELS[: model.labels], kind="boosted"), to_onnx(model, DIM))


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(cloud(0.4, per_label=25).vectors, id="seen"),
        pytest.param(random_units(300, DIM, seed=5), id="unseen"),
        pytest.param(random_units(1, DIM, seed=6), id="one row"),
        pytest.param(np.zeros((2, DIM), np.float32), id="zeros"),
    ],
)
def test_trees_as_onnx_answer_as_lightgbm_does(labels: int, rows: NDArray[np.float32]) -> None:
    model = model_of(labels)
    chances = np.asarray(model.booster.predict(rows))
    expected = chances if labels == 3 else np.stack([1 - chances, chances], axis=1)
    np.testing.assert_allclose(np.exp(served(model).raw(rows)), expected, atol=1e-5)
    np.testing.assert_allclose(served(model).raw(rows), model.raw(rows), atol=1e-4)


def test_trees_as_onnx_have_one_input_and_one_output() -> None:
    graph = onnx.load_from_string(to_onnx(model_of(3), DIM)).graph
    assert ([node.name for node in graph.input], [node.name for node in graph.output]) == (
        ["vector"],
        ["probabilities"],
    )
    assert served(model_of(3)).dim == DIM


def test_trees_as_onnx_are_the_same_bytes_each_time() -> None:
    """Another seed, the negative control, grows other trees."""
    one, again, other = (to_onnx(model_of(3, seed), DIM) for seed in (1, 1, 2))
    assert one == again != other


def test_trees_as_onnx_carry_nothing_of_the_machine() -> None:
    model = onnx.load_from_string(to_onnx(model_of(2), DIM))
    assert (model.producer_name, model.producer_version, model.doc_string) == ("chorus-nlu", "", "")
