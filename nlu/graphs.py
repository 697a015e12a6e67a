"""An ONNX file is looked through before ONNX Runtime sees it: only flat graphs of operators that our own exports are made of.

ONNX Runtime takes far more than a vectorizer, a ranker or a head needs: files beside the model (through a hard link even
from outside its folder), other formats, subgraphs and loops, operators that give gigabytes for a few bytes. So what may be
in a file is listed here, by the field numbers of onnx.proto, and whatever is not listed is refused. What no look at a file
can tell, such as a size that the graph computes, is for the trial (nlu/trial.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

SUFFIX = ".onnx"
MAX_NODES = 20_000  # 380 in the shipped vectorizer; an encoder of 24 layers has some 1,500
MAX_INPUTS = 2  # what a vectorizer takes; heads and rankers take one
MAX_RANK = 8  # attention has 4
MAX_BYTES = 64 * 2**20  # of what Expand or Range is told to make; for a phrase of 512 tokens a mask is 1 MiB

_REMEDY = "export or train the model again with this code"
_ORT_FORMAT = b"ORTM"  # at byte 4; ONNX Runtime then reads a flat buffer, whatever else the file may be
_ELEMENT = 8  # bytes of the widest element

# The operators of encoders, as torch exports them, and of their quantisation: none reads a file, holds a subgraph, draws at
# random, or makes more than its inputs are wide, but for Expand and Range, whose sizes are looked at below. Operators that
# fill (ConstantOfShape, Tile, Pad, Resize), loop (Loop, If, Scan) or count (OneHot, EyeLike) are not needed by any export.
_ONNX = frozenset(
    """
    Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Concat Constant Cos CumSum DequantizeLinear Div DynamicQuantizeLinear
    Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul
    MatMulInteger Max Mean Min Mod Mul Neg Not Or Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round Selu Shape Sigmoid
    Sign Sin Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh Transpose Trilu Unsqueeze Where Xor
    """.split()
)
OPERATORS: Mapping[str, frozenset[str]] = {
    "": _ONNX,
    "ai.onnx": _ONNX,
    "ai.onnx.ml": frozenset({"TreeEnsembleClassifier", "TreeEnsembleRegressor"}),  # boosted heads, rankers
    "com.microsoft": frozenset({"GatherBlockQuantized"}),  # word vectors in 4 bits
}

# A message as "field number, name, type"; [] for repeated. Text is read as bytes, for it may be none.
_SCHEMA = {
    "ModelProto": """
        1 ir_version int64, 2 producer_name bytes, 3 producer_version bytes, 4 domain bytes, 5 model_version int64,
        6 doc_string bytes, 7 graph GraphProto, 8 opset_import OperatorSetIdProto[], 14 metadata_props bytes[],
        20 training_info bytes[], 25 functions bytes[]""",
    "OperatorSetIdProto": "1 domain bytes, 2 version int64",
    "GraphProto": """
        1 node NodeProto[], 2 name bytes, 5 initializer TensorProto[], 10 doc_string bytes, 11 input ValueInfoProto[],
        12 output ValueInfoProto[], 13 value_info ValueInfoProto[], 14 quantization_annotation bytes[],
        15 sparse_initializer bytes[], 16 metadata_props bytes[]""",
    "ValueInfoProto": "1 name bytes, 2 type bytes, 3 doc_string bytes, 4 metadata_props bytes[]",
    "NodeProto": """
        1 input bytes[], 2 output bytes[], 3 name bytes, 4 op_type bytes, 5 attribute AttributeProto[], 6 doc_string bytes,
        7 domain bytes, 8 overload bytes, 9 metadata_props bytes[]""",
    "AttributeProto": """
        1 name bytes, 2 f float, 3 i int64, 4 s bytes, 5 t TensorProto, 6 g bytes, 7 floats float[], 8 ints int64[],
        9 strings bytes[], 10 tensors bytes[], 11 graphs bytes[], 13 doc_string bytes, 14 tp bytes, 15 type_protos bytes[],
        20 type int32, 21 ref_attr_name bytes, 22 sparse_tensor bytes, 23 sparse_tensors bytes[]""",
    "TensorProto": """
        1 dims int64[], 2 data_type int32, 3 segment bytes, 4 float_data float[], 5 int32_data int32[], 6 string_data bytes[],
        7 int64_data int64[], 8 name bytes, 9 raw_data bytes, 10 double_data double[], 11 uint64_data uint64[],
        12 doc_string bytes, 13 external_data bytes[], 14 data_location int32, 16 metadata_props bytes[]""",
}

# Fields that are known, and that none of our models has.
_REFUSED = frozenset(
    "training_info functions sparse_initializer overload g tensors graphs tp type_protos ref_attr_name sparse_tensor "
    "sparse_tensors segment string_data external_data data_location".split()
)
_INSIDE = 0  # data_location, where it says that the numbers are in the file

# TensorProto.data_type -> bits of an element, and the field that holds it where raw_data does not.
_TYPES = {
    1: (32, "float_data"), 2: (8, "int32_data"), 3: (8, "int32_data"), 4: (16, "int32_data"), 5: (16, "int32_data"),
    6: (32, "int32_data"), 7: (64, "int64_data"), 9: (8, "int32_data"), 10: (16, "int32_data"), 11: (64, "double_data"),
    12: (32, "uint64_data"), 13: (64, "uint64_data"), 16: (16, "int32_data"), 21: (4, "int32_data"), 22: (4, "int32_data"),
}  # fmt: skip
_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# Of those a shape or a limit may have: the field, and the letter of one number in raw_data.
_NUMBERS = {1: ("float_data", "f"), 6: ("int32_data", "i"), 7: ("int64_data", "q"), 11: ("double_data", "d")}


class GraphRefused(ValueError):
    """A model that ONNX Runtime is not to see; says what was found, what was expected and what to do."""

    def __init__(self, file: str, *, found: str, expected: str, remedy: str = _REMEDY) -> None:
        super().__init__(f"{file}: found {found}, expected {expected}; {remedy}")


def check_graphs(folder: Path) -> None:
    """Every model in a component's folder; raises GraphRefused at the first that is not to be loaded."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        check_graph(path.read_bytes(), path.name)


def check_graph(model: bytes, file: str) -> None:
    """One model, as the bytes that ONNX Runtime is given next; raises GraphRefused, and nothing else."""
    if model[4:8] == _ORT_FORMAT:
        raise GraphRefused(file, found="a model in the format of ONNX Runtime", expected="an ONNX model")
    try:
        parsed: Any = _MODEL.FromString(model)
    except DecodeError as error:
        raise GraphRefused(file, found="bytes that are cut or garbage", expected="an ONNX model") from error
    strange = next(_strange(parsed), None)
    if strange is not None:
        raise GraphRefused(file, found=strange, expected="one flat graph that holds all of its numbers")
    _check_graph(parsed.graph, file)


def _check_graph(graph: Any, file: str) -> None:
    if not 0 < len(graph.node) <= MAX_NODES:
        raise GraphRefused(file, found=f"{len(graph.node)} nodes", expected=f"1 to {MAX_NODES}")
    held = {tensor.name: tensor for tensor in graph.initializer}
    inputs = sum(each.name not in held for each in graph.input)
    if inputs > MAX_INPUTS:
        raise GraphRefused(file, found=f"{inputs} inputs", expected=f"at most {MAX_INPUTS}")
    for tensor in graph.initializer:
        _check_tensor(tensor, file)
    known = {name: _numbers(tensor) for name, tensor in held.items()}
    for node in graph.node:
        _check_operator(node, file)
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _check_tensor(attribute.t, file)
        if node.op_type == b"Constant":
            known |= dict.fromkeys(node.output, _constant(node))
        _check_made(node, [known.get(name, []) for name in node.input], file)


def _strange(message: Message) -> Iterator[str]:
    """The fields, of this message and all in it, that none of our models has."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        yield f"field {unknown[0].field_number} in {message.DESCRIPTOR.name}"
    for field, value in message.ListFields():
        if field.name in _REFUSED and value != _INSIDE:
            yield f"{field.name} in {message.DESCRIPTOR.name}"
        if field.message_type is not None:
            for each in [value] if isinstance(value, Message) else value:
                yield from _strange(each)


def _check_operator(node: Any, file: str) -> None:
    domain, name = _text(node.domain), _text(node.op_type)
    if name not in OPERATORS.get(domain, ()):
        raise GraphRefused(
            file,
            found=f"operator {domain and domain + '.'}{name}",
            expected="one that our exports are made of",
        )


def _check_tensor(tensor: Any, file: str) -> None:
    """As many bytes as its dimensions say, in the one field for its type."""
    name, dims = _text(tensor.name) or "a constant", [*tensor.dims]
    if tensor.data_type not in _TYPES or len(dims) > MAX_RANK or min(dims, default=0) < 0:
        raise GraphRefused(
            file, found=f"{name} of type {tensor.data_type} and shape {dims[: MAX_RANK + 1]}",
            expected=f"numbers in at most {MAX_RANK} dimensions",
        )  # fmt: skip
    bits, field = _TYPES[tensor.data_type]
    count = math.prod(dims)
    packed = math.ceil(count * bits / 8)
    written = {each: len(getattr(tensor, each)) for each in _DATA if getattr(tensor, each)}
    found = {"raw_data": len(tensor.raw_data)} | written if tensor.raw_data else written
    if found not in ({"raw_data": packed}, {field: packed if bits == 4 else count}) and (found or count):
        raise GraphRefused(
            file, found=f"{name} of shape {dims} in {found}", expected=f"{packed} bytes of raw_data"
        )


def _check_made(node: Any, given: Sequence[Sequence[float]], file: str) -> None:
    """What Expand and Range make where constants tell; a size that the graph computes is seen by the trial alone."""
    size = 0.0
    if node.op_type == b"Expand" and len(given) == 2:
        size = math.prod(max(1, side) for side in given[1])
    elif node.op_type == b"Range" and [len(number) for number in given] == [1, 1, 1]:
        (start,), (limit,), (step,) = given
        size = abs(limit - start) / abs(step) if step else math.inf
    if not size * _ELEMENT <= MAX_BYTES:
        raise GraphRefused(
            file,
            found=f"{_text(node.op_type)} to {size} elements",
            expected=f"at most {MAX_BYTES // _ELEMENT}",
        )


def _constant(node: Any) -> Sequence[float]:
    """What a Constant gives, where that may be a shape or a limit."""
    found = [[*each.ints, *each.floats] or _numbers(each.t) or [each.i or each.f] for each in node.attribute]
    return found[0] if found and len(found[0]) <= MAX_RANK else []


def _numbers(tensor: Any) -> Sequence[float]:
    """Of a tensor that may be a shape or a limit; of any other, none."""
    if tensor.data_type not in _NUMBERS or math.prod(tensor.dims) > MAX_RANK:
        return []
    field, kind = _NUMBERS[tensor.data_type]
    raw = tensor.raw_data
    return [*getattr(tensor, field), *struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)]


def _text(raw: bytes) -> str:
    """A name out of a file that nobody vouches for, fit for a log."""
    return ascii(raw[:64].decode("utf-8", "replace"))[1:-1]


def _declared(schema: Mapping[str, str]) -> Any:
    """The class of ModelProto messages, as the schema has them."""
    file = descriptor_pb2.FileDescriptorProto(name="graphs.proto", package="chorus", syntax="proto2")
    for message, fields in schema.items():
        declared = file.message_type.add(name=message)
        for number, name, kind in (field.split() for field in fields.split(",")):
            declared.field.append(_field(int(number), name, kind, schema))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("chorus.ModelProto"))


def _field(number: int, name: str, kind: str, messages: Iterable[str]) -> descriptor_pb2.FieldDescriptorProto:
    field = descriptor_pb2.FieldDescriptorProto(name=name, number=number)
    field.label = field.LABEL_REPEATED if kind.endswith("[]") else field.LABEL_OPTIONAL
    kind = kind.removesuffix("[]")
    if kind in messages:
        field.type, field.type_name = field.TYPE_MESSAGE, f".chorus.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
    return field


_MODEL = _declared(_SCHEMA)
