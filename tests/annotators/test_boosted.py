"""Heads served as ONNX: the graph's chances become scores like any other head's, and other graphs are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.special import log_softmax, softmax

from annotators.annotator import Annotation, Status
from annotators.boosted import MODEL_FILE, BoostedHead
from annotators.fleet import Fleet
from annotators.head import SPEC_FILE, HeadInvalid, Spec, write_spec
from tests.annotators.toys import ENERGY, heard, make_spec, random_head, random_units

DIM, LABELS = 4, ("a", "b", "c")
WEIGHT = np.random.default_rng(0).standard_normal((DIM, 3)).astype(np.float32)


def graph(
    weight: NDArray[Any] = WEIGHT,
    *,
    inputs: Sequence[tuple[str, Sequence[int | str]]] = (("vector", ("rows", DIM)),),
    outputs: Sequence[str] = ("probabilities",),
) -> bytes:
    """softmax(vector @ weight), as a serialised model; outputs beyond the first are without the softmax."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    nodes = [
        helper.make_node("MatMul", [inputs[0][0], "weight"], ["product"]),
        helper.make_node("Softmax", ["product"], [outputs[0]]),
        *(helper.make_node("Identity", ["product"], [name]) for name in outputs[1:]),
    ]
    made = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialised: bytes = model.SerializeToString()
    return serialised


def boosted_spec(**fields: Any) -> Spec:
    return make_spec(LABELS, kind="boosted", **fields)


def test_boosted_raw_scores_are_the_logarithms_of_the_chances() -> None:
    said = random_units(5, DIM)
    head = BoostedHead.of(boosted_spec(), graph())
    assert head.dim == DIM
    expected = log_softmax(said.astype(np.float64) @ WEIGHT, axis=1)
    np.testing.assert_allclose(head.raw(said), expected, atol=1e-5)


def test_boosted_uncalibrated_scores_are_the_graphs_chances() -> None:
    said = random_units(1, DIM)
    annotation = BoostedHead.of(boosted_spec(), graph(), "v1").annotate(heard(said[0]))
    chances = softmax(said.astype(np.float64) @ WEIGHT, axis=1)[0]
    assert {label.label: label.score for label in annotation.labels} == pytest.approx(
        dict(zip(LABELS, chances.tolist(), strict=True)), abs=1e-5
    )
    assert annotation == Annotation("toy", "boosted", Status.OK, labels=annotation.labels, version="v1")


def test_boosted_hypotheses_are_mixed_after_calibration() -> None:
    said, weights = random_units(3, DIM), (0.5, 0.3, 0.2)
    scale, shift = (2.0, 2.0, 2.0), (0.0, 0.5, 0.0)
    head = BoostedHead.of(boosted_spec(scale=scale, shift=shift), graph())
    logits = log_softmax(said.astype(np.float64) @ WEIGHT, axis=1) * scale + shift
    found = Fleet([random_head("other", 3, dim=DIM), head]).annotate(heard(*said, weights=weights))[1]
    assert [label.score for label in found.labels] == pytest.approx(
        sorted(weights @ softmax(logits, axis=1), reverse=True), abs=1e-5
    )
    assert found.disagreement > 0


def test_boosted_chance_of_zero_has_a_finite_score() -> None:
    weight = np.zeros((DIM, 3), np.float32)
    weight[0] = (1000, 0, 0)
    raw = BoostedHead.of(boosted_spec(), graph(weight)).raw(np.eye(1, DIM, dtype=np.float32))
    np.testing.assert_allclose(raw, [[0, np.log(1e-7), np.log(1e-7)]], rtol=1e-5)


def test_boosted_head_may_know_strangers() -> None:
    head = BoostedHead.of(boosted_spec(outside=ENERGY), graph())
    (score,) = {head.annotate(heard(random_units(1, DIM, seed=seed)[0])).out_of_scope for seed in range(3)}
    assert score == pytest.approx(
        1 / (1 + np.exp(-1.0)), abs=1e-5
    )  # chances sum to one: their energy is always 0


def test_boosted_comes_back_as_saved(tmp_path: Path) -> None:
    BoostedHead.of(boosted_spec(), graph()).save(tmp_path)
    loaded = BoostedHead.load(tmp_path)
    loaded.save(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted([SPEC_FILE, MODEL_FILE])
    assert (loaded.spec, loaded.model) == (boosted_spec(), graph())
    assert BoostedHead.load(tmp_path / "again").version == loaded.version != ""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(b"garbage", "found a graph that does not load (", id="garbage"),
        pytest.param(b"", "found a graph that does not load (", id="empty"),
        pytest.param(graph()[:-20], "found a graph that does not load (", id="cut"),
        pytest.param(
            graph(inputs=[("input", ("rows", DIM))]),
            "found inputs [('input', ['rows', 4])], expected one, vector [rows, dim]", id="another input",
        ),
        pytest.param(
            graph(inputs=[("vector", ("rows", "dim"))]),
            "found inputs [('vector', ['rows', 'dim'])], expected one, vector [rows, dim]", id="no width",
        ),
        pytest.param(
            graph(inputs=[("vector", (DIM,))]), "found inputs [('vector', [4])], expected one, vector [rows, dim]", id="a lone vector"
        ),
        pytest.param(
            graph(inputs=[("vector", ("rows", DIM)), ("other", ("rows", 2))]),
            "found inputs [('vector', ['rows', 4]), ('other', ['rows', 2])], expected one, vector [rows, dim]", id="two inputs",
        ),
        pytest.param(graph(outputs=["scores"]), "found outputs ['scores'], expected probabilities", id="another output"),
        pytest.param(
            graph(WEIGHT[:, :2]), "found probabilities of shape (2, 2), expected (2, 3), one a label, and finite", id="two of three labels"
        ),
        pytest.param(
            graph(np.full((DIM, 3), np.nan, np.float32)), "found probabilities of shape (2, 3), expected (2, 3), one a label, and finite",
            id="NaN",
        ),
        pytest.param(graph(WEIGHT.astype(np.float64)), "found a graph that does not run (", id="of another type"),
        pytest.param(graph(inputs=[("vector", (1, DIM))]), "found a graph that does not run (", id="for one hypothesis alone"),
        pytest.param(graph(WEIGHT[:3]), "found a graph that does not ", id="of another width inside"),
    ],
)  # fmt: skip
def test_boosted_other_graphs_are_refused(tmp_path: Path, model: bytes, message: str) -> None:
    write_spec(tmp_path, boosted_spec())
    (tmp_path / MODEL_FILE).write_bytes(model)
    with pytest.raises(HeadInvalid, match=re.escape(message)):
        BoostedHead.load(tmp_path)


def test_boosted_graph_may_say_more_than_it_is_asked(tmp_path: Path) -> None:
    """Negative control of the refusals: LightGBM's own graphs give the label too."""
    head = BoostedHead.of(boosted_spec(), graph(outputs=["probabilities", "raw"]))
    assert head.raw(random_units(2, DIM)).shape == (2, 3)


def test_boosted_folder_without_its_graph_is_refused(tmp_path: Path) -> None:
    write_spec(tmp_path, boosted_spec())
    with pytest.raises(HeadInvalid, match=r"found no model.onnx, expected head.json and model.onnx in "):
        BoostedHead.load(tmp_path)


def test_boosted_labels_on_their_own_are_refused(tmp_path: Path) -> None:
    BoostedHead.of(boosted_spec(exclusive=False), graph()).save(tmp_path)
    with pytest.raises(
        HeadInvalid,
        match="found labels that do not exclude each other, expected exclusive labels; train kind",
    ):
        BoostedHead.load(tmp_path)
