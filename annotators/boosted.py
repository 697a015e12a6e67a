"""Heads of gradient-boosted trees on the sentence vector, kept as ONNX and run by ONNX Runtime.

The graph takes `vector` [rows, dim] and gives `probabilities` [rows, labels] (see annotators.fit_boosted, which makes it); raw
scores are their logarithms, so that calibration treats these heads as it does all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard
from annotators.head import HeadInvalid, Spec, read_bytes, read_spec, version_of, write_spec
from annotators.sentence import answered

MODEL_FILE = "model.onnx"
INPUT, OUTPUT = "vector", "probabilities"
_SMALLEST = 1e-7  # a tree may be certain; its logarithm must stay finite


@dataclass(frozen=True)
class BoostedHead:
    """score = softmax(scale * log(probabilities) + shift)."""

    spec: Spec
    model: bytes
    session: Any  # onnxruntime.InferenceSession of the model, one thread
    dim: int  # width of the vectors this head reads
    version: str = ""

    @classmethod
    def of(cls, spec: Spec, model: bytes, version: str = "") -> BoostedHead:
        """A head of a serialised graph; raises HeadInvalid where the graph is not such a head's."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # a graph that is refused is refused by us, in words
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own errors, which share no base but this
            raise HeadInvalid(
                spec.name,
                found=f"a graph that does not load ({type(error).__name__})",
                expected="an ONNX model",
            ) from error
        inputs, outputs = session.get_inputs(), [node.name for node in session.get_outputs()]
        shape = inputs[0].shape if len(inputs) == 1 else []
        if [node.name for node in inputs] != [INPUT] or len(shape) != 2 or not isinstance(shape[1], int):
            raise HeadInvalid(
                spec.name,
                found=f"inputs {[(node.name, node.shape) for node in inputs]}",
                expected=f"one, {INPUT} [rows, dim]",
            )
        if OUTPUT not in outputs:
            raise HeadInvalid(spec.name, found=f"outputs {outputs}", expected=OUTPUT)
        head = cls(spec, model, session, shape[1], version)
        try:
            found = head.raw(np.zeros((2, head.dim), np.float32))
        except Exception as error:  # as above
            raise HeadInvalid(
                spec.name,
                found=f"a graph that does not run ({type(error).__name__})",
                expected=f"one for any number of float32 rows {head.dim} wide",
            ) from error
        if found.shape != (2, len(spec.labels)) or not np.isfinite(found).all():
            raise HeadInvalid(
                spec.name,
                found=f"probabilities of shape {found.shape}",
                expected=f"(2, {len(spec.labels)}), one a label, and finite",
            )
        return head

    @classmethod
    def load(cls, folder: Path) -> BoostedHead:
        """Read a head folder; raises HeadInvalid."""
        spec, raw = read_spec(folder)
        if not spec.exclusive:
            raise HeadInvalid(
                spec.name, found="labels that do not exclude each other", expected="exclusive labels", remedy="train kind sentence"
            )  # fmt: skip
        model = read_bytes(folder / MODEL_FILE, folder.name)
        return cls.of(spec, model, version_of(raw, model))

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        write_spec(folder, self.spec)
        (folder / MODEL_FILE).write_bytes(self.model)

    def raw(self, sentences: NDArray[np.float32]) -> NDArray[np.float32]:
        """[rows, labels] of sentence vectors [rows, dim]."""
        found = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(sentences)})[0]
        raw: NDArray[np.float32] = np.log(np.maximum(found, np.float32(_SMALLEST)))
        return raw

    def annotate(self, heard: Heard) -> Annotation:
        """Answer one turn."""
        sentences = np.array([encoding.sentence for encoding in heard.encodings])
        return answered(self.spec, self.version, self.raw(sentences), heard.weights)
