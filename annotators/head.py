"""A head as a folder: head.json (this schema), weights.safetensors, and the canaries of its vectorizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from annotators.outside import Outside
from annotators.prior import NONE

FORMAT: Literal[1] = 1
SPEC_FILE = "head.json"
WEIGHTS_FILE = "weights.safetensors"

Kind = Literal["sentence", "context", "token", "anchors", "rules", "boosted"]


class HeadInvalid(ValueError):
    """A head folder that must not be served; says what was found, what was expected and what to do."""

    def __init__(self, head: str, *, found: str, expected: str, remedy: str = "train the head again") -> None:
        super().__init__(f"head {head}: found {found}, expected {expected}; {remedy}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GoldenTurn(_Strict):
    """An earlier turn of a golden phrase."""

    role: Literal["user", "assistant"]
    text: str


class Golden(_Strict):
    """A phrase this head must answer with this label (or, for token heads, these `label=text` spans) wherever it is loaded."""

    text: str
    label: str = ""
    spans: tuple[str, ...] = ()
    context: tuple[GoldenTurn, ...] = ()


class Requires(_Strict):
    """What the head was made for."""

    vectorizer: str = Field(pattern=r"^[0-9a-f]{64}$")


class Spec(_Strict):
    """head.json. `scale` and `shift` calibrate: score = link(scale * raw + shift), link being softmax or, where labels
    do not exclude each other, the logistic function."""

    format: Literal[1] = FORMAT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,56}$")
    kind: Kind
    task: str
    labels: tuple[str, ...] = Field(min_length=1)
    exclusive: bool = True
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    thresholds: tuple[float, ...]
    outside: Outside | None = None
    requires: Requires
    params: dict[str, Any] = {}
    golden: tuple[Golden, ...] = ()
    metrics: dict[str, float] = {}
    prior: dict[str, float] | None = None  # shares of what it says in training; see annotators.prior
    made_by: str = ""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        for field in ("scale", "shift", "thresholds"):
            if len(getattr(self, field)) != len(self.labels):
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} values for {len(self.labels)} labels"
                )
        if self.prior is not None:
            _check_shares(self.prior, {*self.labels, NONE})
        if self.outside is not None and not self.exclusive:
            raise ValueError(
                "outside is for labels that exclude each other; others reject by their thresholds"
            )
        return self


def _check_shares(prior: Mapping[str, float], known: set[str]) -> None:
    if strangers := sorted(prior.keys() - known):
        raise ValueError(f"prior has shares of {', '.join(map(repr, strangers))}, which are no labels")
    if min(prior.values(), default=0.0) < 0 or abs(sum(prior.values()) - 1) > 1e-2:
        raise ValueError("prior must be shares that sum to 1")


Tensors = dict[str, NDArray[np.float32]]


def read(folder: Path) -> tuple[Spec, Tensors, str]:
    """Read and check a head folder; returns the spec, its float32 tensors and the version (digest of both files)."""
    spec, raw = read_spec(folder)
    weights = read_bytes(folder / WEIGHTS_FILE, folder.name)
    try:
        stored = load_tensors(weights)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype numpy lacks, such as bfloat16
        raise HeadInvalid(
            spec.name, found=f"unreadable weights ({error})", expected="a safetensors file"
        ) from error
    tensors = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise HeadInvalid(
                spec.name, found=f"NaN or infinite values in tensor {name!r}", expected="finite weights"
            )
    return spec, tensors, version_of(raw, weights)


def read_spec(folder: Path) -> tuple[Spec, bytes]:
    """Read and check head.json alone; returns it with its bytes."""
    raw = read_bytes(folder / SPEC_FILE, folder.name)
    try:
        return Spec.model_validate_json(raw), raw
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or SPEC_FILE
        raise HeadInvalid(
            folder.name, found=f"{where}: {first['msg']}", expected=f"a head.json of format {FORMAT}"
        ) from error


def version_of(*files: bytes) -> str:
    """The version of a head: the digest of its files' digests."""
    return hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()


def write(folder: Path, spec: Spec, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a head folder; deterministic, so the same head has the same digest everywhere."""
    write_spec(folder, spec)
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    (folder / WEIGHTS_FILE).write_bytes(save_tensors(ordered))


def write_spec(folder: Path, spec: Spec) -> None:
    """Write head.json, without what is at its default of None."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        spec.model_dump(mode="json", exclude_none=True), ensure_ascii=False, sort_keys=True, indent=1
    )
    (folder / SPEC_FILE).write_text(text + "\n", encoding="utf-8")


def expect_shapes(spec: Spec, tensors: Tensors, expected: Mapping[str, tuple[int | None, ...]]) -> None:
    """Raise HeadInvalid unless exactly these tensors are there with these shapes (None = any size)."""
    if set(tensors) != set(expected):
        raise HeadInvalid(spec.name, found=f"tensors {_names(tensors)}", expected=_names(expected))
    for name, shape in expected.items():
        found = tensors[name].shape
        if len(found) != len(shape) or any(
            want not in (None, got) for want, got in zip(shape, found, strict=True)
        ):
            wanted = "x".join("any" if size is None else str(size) for size in shape)
            raise HeadInvalid(
                spec.name, found=f"tensor {name!r} of shape {'x'.join(map(str, found))}", expected=wanted
            )


def read_bytes(path: Path, head: str) -> bytes:
    """One of a head's files; raises HeadInvalid where it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise HeadInvalid(
            head,
            found=f"no {path.name}",
            expected=f"{SPEC_FILE} and {WEIGHTS_FILE if path.name == SPEC_FILE else path.name} in {path.parent}",
        ) from error


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
