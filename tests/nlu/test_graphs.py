"""nlu.graphs: hostile models are refused by their bytes alone; many of them ONNX Runtime would have taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from annotators.trees import to_onnx
from nlu.graphs import MAX_INPUTS, MAX_NODES, GraphRefused, check_graph, check_graphs
from nlu.settings import shipped_bundle
from tests.annotators.clouds import DIM
from tests.annotators.test_trees import model_of
from tests.tiny import make_vectorizer

Harm = Callable[[ModelProto, Path], None]
WEIGHTS = np.arange(2, dtype=np.float32)
OUTSIDE = "elsewhere.bin"  # a file beside the model's folder


def plain() -> ModelProto:
    """y = x + w: what every hostile model started as."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def external(location: str, name: str = "w", *, said: bool = True) -> TensorProto:
    """The numbers of a tensor, in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.external_data.add(key="location", value=location)
    if said:
        tensor.data_location = TensorProto.EXTERNAL
    return tensor


def constant(name: str, value: object) -> onnx.NodeProto:
    tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
    return helper.make_node("Constant", [], [name], value=tensor)


def body(*nodes: onnx.NodeProto, output: str, held: list[TensorProto] | None = None) -> GraphProto:
    """A graph inside a node."""
    told = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    return helper.make_graph(list(nodes), "inside", [], told, held or [])


def first(model: ModelProto, *nodes: onnx.NodeProto) -> None:
    """Nodes before all others."""
    after = [*model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *after])


def weights_in(location: str, *, said: bool = True) -> Harm:
    def harm(model: ModelProto, folder: Path) -> None:
        model.graph.initializer[0].CopyFrom(external(location, said=said))

    return harm


def linked(link: Callable[[Path, Path], None]) -> Harm:
    def harm(model: ModelProto, folder: Path) -> None:
        link(folder.parent / OUTSIDE, folder / "inside.bin")
        weights_in("inside.bin")(model, folder)

    return harm


def absolute(model: ModelProto, folder: Path) -> None:
    weights_in(str(folder.parent / OUTSIDE))(model, folder)


def in_a_constant(model: ModelProto, folder: Path) -> None:
    del model.graph.initializer[:]
    first(model, constant("w", external("beside.bin", "")))


def in_a_subgraph(model: ModelProto, folder: Path) -> None:
    branches = [
        body(helper.make_node("Identity", [f"w{side}"], [f"o{side}"]), output=f"o{side}", held=[external("beside.bin", f"w{side}")])
        for side in "ab"
    ]  # fmt: skip
    del model.graph.initializer[:]
    chosen = helper.make_node("If", ["always"], ["w"], then_branch=branches[0], else_branch=branches[1])
    first(model, constant("always", True), chosen)


def in_a_function(model: ModelProto, folder: Path) -> None:
    opsets = [helper.make_opsetid("", 18)]
    given = constant("out", external("beside.bin", ""))
    model.functions.append(helper.make_function("ours", "Weights", [], ["out"], [given], opsets))
    model.opset_import.append(helper.make_opsetid("ours", 1))
    del model.graph.initializer[:]
    first(model, helper.make_node("Weights", [], ["w"], domain="ours"))


def in_a_list(model: ModelProto, folder: Path) -> None:
    several = AttributeProto(name="several", type=AttributeProto.TENSORS, tensors=[external("beside.bin")])
    model.graph.node[0].attribute.append(several)


def sparse(values: TensorProto) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.array([0, 1]), "w_indices")
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[2])


def in_a_sparse_initializer(model: ModelProto, folder: Path) -> None:
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse(external("beside.bin")))


def in_a_sparse_constant(model: ModelProto, folder: Path) -> None:
    del model.graph.initializer[:]
    node = helper.make_node("Constant", [], ["w"])
    value = AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    value.sparse_tensor.CopyFrom(sparse(external("beside.bin")))
    node.attribute.append(value)
    first(model, node)


def in_training(model: ModelProto, folder: Path) -> None:
    training = onnx.TrainingInfoProto()
    training.algorithm.initializer.append(external("beside.bin"))
    model.training_info.append(training)


# What is harmed, what its refusal says, and whether ONNX Runtime takes it from a path.
EXTERNAL: dict[str, tuple[Harm, str, bool]] = {
    "beside": (weights_in("beside.bin"), "external_data in TensorProto", True),
    "beside, unsaid": (weights_in("beside.bin", said=False), "external_data in TensorProto", False),
    "hard link": (linked(lambda there, here: os.link(there, here)), "external_data in TensorProto", True),
    "symbolic link": (linked(lambda there, here: here.symlink_to(there)), "external_data in TensorProto", False),
    "parent folder": (weights_in(f"../{OUTSIDE}"), "external_data in TensorProto", False),
    "absolute": (absolute, "external_data in TensorProto", False),
    "constant": (in_a_constant, "external_data in TensorProto", True),
    "subgraph": (in_a_subgraph, "g in AttributeProto", True),
    "function": (in_a_function, "functions in ModelProto", True),
    "list of tensors": (in_a_list, "tensors in AttributeProto", False),
    "sparse initializer": (in_a_sparse_initializer, "sparse_initializer in GraphProto", True),
    "sparse constant": (in_a_sparse_constant, "sparse_tensor in AttributeProto", True),
    "training": (in_training, "training_info in ModelProto", True),
}  # fmt: skip


def node(*before: onnx.NodeProto, **initializers: object) -> Harm:
    """These nodes compute the weights."""

    def harm(model: ModelProto, folder: Path) -> None:
        del model.graph.initializer[:]
        held = (numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items())
        model.graph.initializer.extend(held)
        first(model, *before)

    return harm


def loop(model: ModelProto, folder: Path) -> None:
    inside = body(helper.make_node("Identity", ["on"], ["on_out"]), output="w_out")
    inside.node.append(helper.make_node("Identity", ["w_in"], ["w_out"]))
    one = [("i", TensorProto.INT64), ("on", TensorProto.BOOL), ("w_in", TensorProto.FLOAT)]
    inside.input.extend(helper.make_tensor_value_info(name, kind, []) for name, kind in one)
    inside.output.insert(0, helper.make_tensor_value_info("on_out", TensorProto.BOOL, []))
    made = helper.make_node("Loop", ["times", "go", "start"], ["w"], body=inside)
    node(made, times=np.int64(1 << 40), go=True, start=np.float32(1))(model, folder)


def foreign(name: str, domain: str) -> Harm:
    def harm(model: ModelProto, folder: Path) -> None:
        model.opset_import.append(helper.make_opsetid(domain, 1))
        model.graph.node[0].op_type, model.graph.node[0].domain = name, domain

    return harm


def weights(**fields: Any) -> Harm:
    def harm(model: ModelProto, folder: Path) -> None:
        model.graph.initializer[0].CopyFrom(TensorProto(name="w", **fields))

    return harm


def twin(model: ModelProto, folder: Path) -> None:
    """A second tensor of the same name, after one that is refused."""
    model.graph.initializer.insert(0, external("beside.bin"))


def many_nodes(model: ModelProto, folder: Path) -> None:
    model.graph.node.extend([model.graph.node[0]] * MAX_NODES)


def many_inputs(model: ModelProto, folder: Path) -> None:
    model.graph.input.extend(
        helper.make_tensor_value_info(f"more{i}", TensorProto.FLOAT, [1]) for i in range(MAX_INPUTS)
    )


def reference(model: ModelProto, folder: Path) -> None:
    model.graph.node[0].attribute.append(AttributeProto(name="a", ref_attr_name="b"))


def no_graph(model: ModelProto, folder: Path) -> None:
    model.ClearField("graph")


def ort_format(model: ModelProto, folder: Path) -> None:
    """A whole ONNX model whose producer is called so that ONNX Runtime takes the file for one of its own format."""
    model.producer_name = "ORTM"


FLOAT, FLOATS = TensorProto.FLOAT, WEIGHTS.tobytes()
HARMS: dict[str, tuple[Harm, str]] = {
    **{f"external data: {name}": harm[:2] for name, harm in EXTERNAL.items()},
    "a twin of a tensor": (twin, "external_data in TensorProto"),
    "ConstantOfShape": (node(helper.make_node("ConstantOfShape", ["n"], ["w"]), n=[1 << 30]), "operator ConstantOfShape"),
    "Tile": (node(helper.make_node("Tile", ["a", "n"], ["w"]), a=WEIGHTS, n=[1 << 29]), "operator Tile"),
    "Expand": (node(helper.make_node("Expand", ["a", "n"], ["w"]), a=WEIGHTS, n=[1 << 29, 2]), "Expand to 1073741824"),
    "Expand, int32": (node(helper.make_node("Expand", ["a", "n"], ["w"]), a=WEIGHTS, n=np.array([1 << 29, 2], np.int32)), "Expand to"),
    "Expand of a constant": (
        node(constant("n", [1 << 30]), helper.make_node("Expand", ["a", "n"], ["w"]), a=WEIGHTS), "Expand to",
    ),
    "Expand of numbers": (
        node(helper.make_node("Constant", [], ["n"], value_ints=[1 << 30]), helper.make_node("Expand", ["a", "n"], ["w"]), a=WEIGHTS),
        "Expand to",
    ),
    "Range": (node(helper.make_node("Range", ["a", "b", "c"], ["w"]), a=0, b=1 << 40, c=1), "Range to"),
    "Range backwards": (node(helper.make_node("Range", ["a", "b", "c"], ["w"]), a=1 << 40, b=0, c=-1), "Range to"),
    "Range of floats": (node(helper.make_node("Range", ["a", "b", "c"], ["w"]), a=0.0, b=1e30, c=0.5), "Range to"),
    "Range without an end": (node(helper.make_node("Range", ["a", "b", "c"], ["w"]), a=0.0, b=np.inf, c=1.0), "Range to inf"),
    "Range of nothing": (node(helper.make_node("Range", ["a", "b", "c"], ["w"]), a=0, b=1, c=0), "Range to inf"),
    "Loop": (loop, "g in AttributeProto"),
    "RandomNormal": (node(helper.make_node("RandomNormal", [], ["w"], shape=[1 << 30])), "operator RandomNormal"),
    "another domain": (foreign("Add", "elsewhere"), "operator elsewhere.Add"),
    "an operator of ONNX Runtime": (foreign("EPContext", "com.microsoft"), "operator com.microsoft.EPContext"),
    "a name that forges a line": (foreign("Add\nERROR", ""), r"operator Add\\nERROR"),
    "a name that is no text": (lambda model, folder: None, "operator"),
    "too many nodes": (many_nodes, f"{MAX_NODES + 1} nodes"),
    "too many inputs": (many_inputs, f"{MAX_INPUTS + 1} inputs"),
    "no graph": (no_graph, "0 nodes"),
    "a reference": (reference, "ref_attr_name in AttributeProto"),
    "a tensor with more dims than data": (weights(data_type=FLOAT, dims=[1 << 40], raw_data=FLOATS), "w of shape"),
    "a tensor with fewer dims than data": (weights(data_type=FLOAT, dims=[1], raw_data=FLOATS), "w of shape"),
    "a tensor without data": (weights(data_type=FLOAT, dims=[2]), "w of shape"),
    "a tensor with data twice": (weights(data_type=FLOAT, dims=[2], raw_data=FLOATS, float_data=[1, 2]), "w of shape"),
    "a tensor in another field": (weights(data_type=FLOAT, dims=[2], int64_data=[1, 2]), "w of shape"),
    "a tensor of nine dims": (weights(data_type=FLOAT, dims=[1] * 8 + [2], raw_data=FLOATS), "w of type 1 and shape"),
    "a tensor of negative size": (weights(data_type=FLOAT, dims=[-1, -2], raw_data=FLOATS), "w of type 1 and shape"),
    "a tensor of text": (weights(data_type=TensorProto.STRING, dims=[1], string_data=[b"a"]), "string_data in TensorProto"),
    "a tensor of no type": (weights(dims=[2], raw_data=FLOATS), "w of type 0"),
    "ONNX Runtime's own format": (ort_format, "format of ONNX Runtime"),
}  # fmt: skip


def bytes_of(name: str, model: ModelProto) -> bytes:
    serialised: bytes = model.SerializeToString()
    return serialised.replace(b"Add", b"\xff\xfe\xfd") if name == "a name that is no text" else serialised


def session(model: bytes | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with a file of weights in it and one outside."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "beside.bin").write_bytes(FLOATS)
    (tmp_path / OUTSIDE).write_bytes(FLOATS)
    return made


@pytest.mark.parametrize("name", HARMS)
def test_graphs_refuse(folder: Path, name: str) -> None:
    harm, found = HARMS[name]
    model = plain()
    check_graph(model.SerializeToString(), "model.onnx")  # the control: unharmed it passes
    harm(model, folder)
    with pytest.raises(GraphRefused, match=f"^model.onnx: found .*{found}.*, expected .*; ") as refused:
        check_graph(bytes_of(name, model), "model.onnx")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", EXTERNAL)
def test_graphs_refuse_what_onnxruntime_may_take(folder: Path, name: str) -> None:
    """The negative control: without the look, numbers come in from files that no digest covers."""
    harm, _, taken = EXTERNAL[name]
    model = plain()
    harm(model, folder)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    try:
        found = session(str(folder / "model.onnx")).run(["y"], {"x": np.zeros((1, 2), np.float32)})[0]
    except Exception:  # onnxruntime's errors share no other base
        assert not taken
    else:
        assert taken
        np.testing.assert_array_equal(found, [WEIGHTS])


def test_graphs_refuse_what_allocates_four_gigabytes() -> None:
    """The control: these few bytes are a model to ONNX Runtime, which would ask for the memory at the first run."""
    model = plain()
    node(helper.make_node("ConstantOfShape", ["n"], ["w"]), n=[1 << 29, 2])(model, Path())
    raw = model.SerializeToString()
    assert len(raw) < 200
    session(raw)
    with pytest.raises(GraphRefused):
        check_graph(raw, "model.onnx")


def test_graphs_refuse_a_file_of_two_formats() -> None:
    """The control: by one letter of a name, ONNX Runtime no longer reads what was checked."""
    model = plain()
    model.producer_name = "ORTN"
    raw = model.SerializeToString()
    check_graph(raw, "model.onnx")
    session(raw)
    with pytest.raises(Exception, match="ORT model verification failed"):
        session(raw.replace(b"ORTN", b"ORTM"))


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        pytest.param(b"", "0 nodes", id="empty"),
        pytest.param(b"\x00" * 99, "cut or garbage", id="zeros"),
        pytest.param(b"PK\x03\x04 a zip archive", "cut or garbage", id="zip"),
        pytest.param(plain().SerializeToString()[:-1], "cut or garbage", id="cut"),
        pytest.param(plain().SerializeToString() + b"\x00", "cut or garbage", id="trailing"),
        pytest.param(plain().SerializeToString() + b"\xf8\x01\x07", "field 31 in ModelProto", id="unknown-field"),
        pytest.param(b"\x0b" * 10_000, "cut or garbage", id="nested"),
    ],
)  # fmt: skip
def test_graphs_refuse_bytes(raw: bytes, found: str) -> None:
    with pytest.raises(GraphRefused, match=found):
        check_graph(raw, "model.onnx")


def test_graphs_know_no_deep_nesting() -> None:
    """What is inside a node is refused by its being there, and so never walked, however deep it goes."""
    inside = body(helper.make_node("Identity", ["w"], ["o"]), output="o")
    for _ in range(30):
        inside = body(helper.make_node("Deeper", [], ["o"], body=inside), output="o")
    model = plain()
    first(model, helper.make_node("Identity", ["w"], ["o"], body=inside))
    with pytest.raises(GraphRefused, match="g in AttributeProto"):
        check_graph(model.SerializeToString(), "model.onnx")


def test_graphs_look_at_every_model_of_a_folder(folder: Path) -> None:
    (folder / "a.onnx").write_bytes(plain().SerializeToString())
    check_graphs(folder)
    (folder / "b.onnx").write_bytes(b"?")
    with pytest.raises(GraphRefused, match="^b.onnx: "):
        check_graphs(folder)


def test_graphs_accept_what_is_shipped() -> None:
    models = sorted(shipped_bundle().glob("*/*.onnx"))
    assert models
    for model in models:
        check_graphs(model.parent)


@pytest.mark.parametrize("labels", [2, 3])
def test_graphs_accept_trees_of_boosted_heads(labels: int) -> None:
    check_graph(to_onnx(model_of(labels), DIM), "model.onnx")


def test_graphs_accept_the_tiny_vectorizer(tmp_path: Path) -> None:
    check_graphs(make_vectorizer(tmp_path / "tiny"))


RAW: bytes = plain().SerializeToString()


@given(st.lists(st.tuples(st.integers(0, len(RAW) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_graphs_survive_changed_bytes(changes: list[tuple[int, int]]) -> None:
    mutated = bytearray(RAW)
    for place, value in changes:
        mutated[place] = value
    _passes_or_is_refused(bytes(mutated))


@given(st.integers(0, len(RAW)), st.integers(0, len(RAW)), st.binary(max_size=40))
def test_graphs_survive_moved_bytes(start: int, stop: int, between: bytes) -> None:
    """Cut, repeated or with something between."""
    _passes_or_is_refused(RAW[:start] + between + RAW[stop:])


@given(st.binary(max_size=200))
def test_graphs_survive_any_bytes(raw: bytes) -> None:
    _passes_or_is_refused(raw)


def _passes_or_is_refused(raw: bytes) -> None:
    try:
        check_graph(raw, "model.onnx")
    except GraphRefused as refused:
        assert "found" in str(refused)
