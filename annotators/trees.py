"""LightGBM's trees as an ONNX graph that a boosted head serves."""

from __future__ import annotations

from typing import Any

from onnx import helper
from onnxmltools.convert import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from annotators.boosted import INPUT, OUTPUT
from annotators.learners import BoostedModel


def to_onnx(model: BoostedModel, dim: int) -> bytes:
    """The graph: INPUT [rows, dim] to OUTPUT [rows, labels]; deterministic."""
    found: Any = convert_lightgbm(
        model.booster, name="boosted", initial_types=[(INPUT, FloatTensorType([None, dim]))], zipmap=False
    )
    graph = found.graph
    kept = [node for node in graph.output if node.name == OUTPUT]
    del graph.output[:]
    graph.output.extend(kept)
    trimmed = helper.make_model(graph, opset_imports=found.opset_import, producer_name="chorus-nlu")
    trimmed.ir_version = found.ir_version
    serialised: bytes = trimmed.SerializeToString(deterministic=True)
    return serialised
