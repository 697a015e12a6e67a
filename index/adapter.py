"""The adapter: a small learnt residual on the query, so that newly written replies are found without a new vectorizer.

    q' = unit(q + clip(up @ down @ q)),   down [rank, dim], up [dim, rank], clip: no longer than eps

A low-rank residual beside frozen weights as in LoRA (Hu et al., 2021), on the query alone: rows stay where they are.

**What it cannot do.** For unit q and r, |cos(q', r) - cos(q, r)| <= sqrt(2 - 2 sqrt(1 - eps**2)), just above eps.
Proof: q + delta with |delta| <= eps < 1 lies in the ball of radius eps around q, and the widest angle t between q and a
point of that ball is that of its tangent, sin t = eps. The difference is <q' - q, r> <= |q' - q| = sqrt(2 - 2 cos t).
Equality holds for that tangent and r along q' - q, so no smaller bound does. Float32 rounding comes on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from index.search import prepare

FORMAT: Literal[1] = 1
SPEC_FILE = "adapter.json"
WEIGHTS_FILE = "weights.safetensors"

FloatArray = NDArray[np.float32]


class AdapterInvalid(ValueError):
    """An adapter folder that must not be served; says what was found, what was expected and what to do."""

    def __init__(self, adapter: str, *, found: str, expected: str) -> None:
        super().__init__(
            f"{adapter}: found {found}, expected {expected}; make it again with `nlu index adapt`"
        )


def bound(eps: float) -> float:
    """How far any cosine can move: the least bound there is (proof in this module's docstring); 0 <= eps < 1."""
    return math.sqrt(2.0 - 2.0 * math.sqrt(1.0 - eps * eps))


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Requires(_Strict):
    """What the adapter was made for."""

    vectorizer: str = Field(pattern=r"^[0-9a-f]{64}$")


class Change(_Strict):
    """A measure without and with the adapter, and the 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float


class Exam(_Strict):
    """Questions kept out of training, asked without and with the adapter."""

    questions: int = Field(ge=1)
    recall_at_1: Change
    recall_at_10: Change
    mrr: Change

    @property
    def harm(self) -> float:
        """Recall lost, the worse of the two; below zero where both were won."""
        return max(change.before - change.after for change in (self.recall_at_1, self.recall_at_10))


class Spec(_Strict):
    """adapter.json. `factor` is what was left of the residual as it was learnt, for the sake of old content; `eps` and
    `bound` are what holds for it as it is."""

    format: Literal[1] = FORMAT
    dim: int = Field(ge=1, le=1 << 16)
    rank: int = Field(ge=1, le=1 << 16)
    eps: float = Field(gt=0.0, lt=1.0)
    bound: float
    factor: float = Field(gt=0.0, le=1.0)
    max_harm: float = Field(ge=0.0)
    new: Exam
    old: Exam
    rows: int = Field(ge=1)  # vectors of the index it was judged on
    requires: Requires
    made_by: str = ""

    @model_validator(mode="after")
    def _check_bound(self) -> Self:
        if not math.isclose(self.bound, bound(self.eps), abs_tol=1e-6):
            raise ValueError(f"bound {self.bound} does not follow from eps {self.eps}: {bound(self.eps):.6f}")
        return self


@dataclass(frozen=True, slots=True)
class Residual:
    """What is learnt. Immutable and thread-safe."""

    down: FloatArray  # [rank, dim]
    up: FloatArray  # [dim, rank]
    eps: float

    @classmethod
    def of(cls, down: NDArray[Any], up: NDArray[Any], eps: float) -> Residual:
        """Weights rounded as they are stored, so that what is judged is what will be served."""
        # Both products of a query run along memory: `up` lies column by column.
        return cls(_rounded(down), np.asfortranarray(_rounded(up)), eps)

    def scaled(self, factor: float) -> Residual:
        """The same direction, `factor` times as far for every query: clip(f v, f eps) = f clip(v, eps)."""
        return Residual.of(self.down, factor * self.up, factor * self.eps)

    def apply(self, vector: FloatArray) -> FloatArray:
        """One query `[dim]` moved, at unit length; `QueryInvalid` for what cannot be searched with."""
        query = prepare(vector, self.down.shape[1])
        delta = self.up.dot(self.down.dot(query))  # half the time of `@`
        square = float(np.vdot(delta, delta))
        if square > self.eps * self.eps:
            delta *= np.float32(self.eps / math.sqrt(square))
        return prepare(query + delta, len(query))


@dataclass(frozen=True, slots=True)
class Adapter:
    """A residual and what is known of it."""

    spec: Spec
    residual: Residual

    def apply(self, vector: FloatArray) -> FloatArray:
        """See `Residual.apply`."""
        return self.residual.apply(vector)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """The adapter in a folder, or `AdapterInvalid`."""
        spec = _read_spec(folder)
        shapes = {"down": (spec.rank, spec.dim), "up": (spec.dim, spec.rank)}
        tensors = _read_weights(folder, shapes)
        return cls(spec, Residual.of(tensors["down"], tensors["up"], spec.eps))

    def save(self, folder: Path) -> None:
        """Both files; the same adapter gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.spec.model_dump(mode="json"), ensure_ascii=False, sort_keys=True, indent=1)
        (folder / SPEC_FILE).write_text(text + "\n", encoding="utf-8")
        weights = {"down": self.residual.down, "up": self.residual.up}
        halves = {name: np.ascontiguousarray(tensor, np.float16) for name, tensor in weights.items()}
        (folder / WEIGHTS_FILE).write_bytes(save_tensors(halves))


def _read_spec(folder: Path) -> Spec:
    try:
        return Spec.model_validate_json(_bytes(folder / SPEC_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or SPEC_FILE
        raise AdapterInvalid(
            folder.name, found=f"{where}: {first['msg']}", expected=f"an {SPEC_FILE} of format {FORMAT}"
        ) from error


def _read_weights(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[np.float16]]:
    """Exactly these tensors, float16 and finite."""
    raw = _bytes(folder / WEIGHTS_FILE)
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype numpy lacks, such as bfloat16
        raise AdapterInvalid(
            folder.name, found=f"unreadable weights ({error})", expected="a safetensors file"
        ) from error
    found = {name: f"{tensor.dtype}{list(tensor.shape)}" for name, tensor in sorted(tensors.items())}
    expected = {name: f"float16{list(shape)}" for name, shape in sorted(shapes.items())}
    if found != expected:
        raise AdapterInvalid(folder.name, found=f"tensors {found}", expected=f"{expected}")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise AdapterInvalid(
                folder.name, found=f"NaN or infinite values in tensor {name!r}", expected="finite weights"
            )
    return tensors


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise AdapterInvalid(
            path.parent.name, found=f"no {path.name}", expected=f"{SPEC_FILE} and {WEIGHTS_FILE}"
        ) from error


def _rounded(weights: NDArray[Any]) -> FloatArray:
    return np.ascontiguousarray(weights.astype(np.float16), np.float32)
