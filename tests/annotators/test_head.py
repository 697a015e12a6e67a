"""A head folder: read back as written, the same bytes from the same head, and nothing malformed is served."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save

from annotators.head import (
    SPEC_FILE,
    WEIGHTS_FILE,
    Golden,
    GoldenTurn,
    HeadInvalid,
    expect_shapes,
    read,
    read_spec,
    version_of,
    write,
    write_spec,
)
from tests.annotators.toys import BLEND, make_spec

GOLDEN = (
    Golden(text="да", label="a", context=(GoldenTurn(role="assistant", text="включить?"),)),
    Golden(text="wake me at six", spans=("time=six",)),
)
SPEC = make_spec(golden=GOLDEN, metrics={"accuracy": 0.5}, params={"turns": 2}, made_by="tests")


def tensors() -> dict[str, NDArray[Any]]:
    return {
        "weight": np.arange(6, dtype=np.float16).reshape(3, 2) / 4,
        "bias": np.array([-1, 0, 1.5], np.float32),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good head; every malformed one in these tests starts as this."""
    write(tmp_path / "head.toy", SPEC, tensors())
    return tmp_path / "head.toy"


def test_head_unharmed_comes_back_as_written(folder: Path) -> None:
    spec, found, _ = read(folder)
    assert spec == SPEC
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "weight": [[0.0, 0.25], [0.5, 0.75], [1.0, 1.25]],
        "bias": [-1.0, 0.0, 1.5],
    }
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float32)}


def test_head_same_head_gives_same_bytes(folder: Path, tmp_path: Path) -> None:
    turned = {
        name: np.asfortranarray(tensor) for name, tensor in reversed(tensors().items())
    }  # another order, other strides
    write(tmp_path / "again", SPEC.model_copy(), turned)
    assert [(folder / file).read_bytes() for file in (SPEC_FILE, WEIGHTS_FILE)] == [
        (tmp_path / "again" / file).read_bytes() for file in (SPEC_FILE, WEIGHTS_FILE)
    ]


def test_head_spec_file_is_text_for_people(folder: Path) -> None:
    text = (folder / SPEC_FILE).read_text(encoding="utf-8")
    assert "включить?" in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_head_spec_alone_comes_back_as_written(tmp_path: Path) -> None:
    write_spec(tmp_path, SPEC)
    spec, raw = read_spec(tmp_path)
    assert (spec, raw) == (SPEC, (tmp_path / SPEC_FILE).read_bytes())


def test_head_score_of_being_outside_is_kept_where_there_is_one(tmp_path: Path) -> None:
    write_spec(tmp_path / "with", make_spec(outside=BLEND))
    write_spec(tmp_path / "without", make_spec())
    assert read_spec(tmp_path / "with")[0].outside == BLEND
    assert read_spec(tmp_path / "without")[0].outside is None
    assert "outside" not in json.loads((tmp_path / "without" / SPEC_FILE).read_bytes())


def test_head_version_is_the_digest_of_both_digests(folder: Path) -> None:
    digests = [hashlib.sha256((folder / file).read_bytes()).digest() for file in (SPEC_FILE, WEIGHTS_FILE)]
    assert read(folder)[2] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert version_of(b"one", b"two") != version_of(b"onet", b"wo")


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        pytest.param(SPEC.model_copy(update={"made_by": "else"}), tensors(), id="spec"),
        pytest.param(SPEC, tensors() | {"bias": np.array([-1, 0, 1.75], np.float32)}, id="weights"),
    ],
)
def test_head_version_follows_either_file(
    folder: Path, tmp_path: Path, spec: Any, weights: dict[str, NDArray[Any]]
) -> None:
    write(tmp_path / "other", spec, weights)
    assert read(tmp_path / "other")[2] != read(folder)[2]


def change(**fields: Any) -> Callable[[Path], None]:
    """Rewrite fields of head.json; None drops the field."""

    def harm(folder: Path) -> None:
        document = json.loads((folder / SPEC_FILE).read_bytes()) | fields
        kept = {name: value for name, value in document.items() if value is not None}
        (folder / SPEC_FILE).write_text(json.dumps(kept))

    return harm


def rewrite(**replaced: NDArray[Any]) -> Callable[[Path], None]:
    """Replace tensors of the weights file."""

    def harm(folder: Path) -> None:
        (folder / WEIGHTS_FILE).write_bytes(save(tensors() | replaced))

    return harm


def shorten(file: str, size: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return harm


def drop(file: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / file).unlink()

    return harm


def test_head_rewritten_with_what_it_says_is_accepted(folder: Path) -> None:
    """The negative control of the next test: rewriting alone harms nothing."""
    change(name="toy", thresholds=[0.5, 0.5, 0.5])(folder)
    rewrite()(folder)
    assert read(folder)[0] == SPEC


OUTSIDE = {"method": "energy", "energy": 1.0, "shift": 0.0, "threshold": 0.5}


def test_head_unharmed_by_a_score_of_being_outside(folder: Path) -> None:
    change(outside=OUTSIDE)(folder)
    outside = read(folder)[0].outside
    assert outside is not None
    assert outside.energy == 1.0


@pytest.mark.parametrize(
    ("harm", "found", "expected"),
    [
        pytest.param(drop(SPEC_FILE), "no head.json", "head.json and weights.safetensors in ", id="no spec"),
        pytest.param(drop(WEIGHTS_FILE), "no weights.safetensors", "head.json and weights.safetensors in ", id="no weights"),
        pytest.param(shorten(WEIGHTS_FILE, 100), "unreadable weights (", "a safetensors file", id="weights cut in the header"),
        pytest.param(shorten(WEIGHTS_FILE, -1), "unreadable weights (", "a safetensors file", id="weights cut by one byte"),
        pytest.param(shorten(WEIGHTS_FILE, 0), "unreadable weights (", "a safetensors file", id="weights empty"),
        pytest.param(
            rewrite(bias=np.zeros(3, ml_dtypes.bfloat16)), "unreadable weights (", "a safetensors file", id="weights of a type numpy lacks"
        ),
        pytest.param(
            rewrite(weight=np.full((3, 2), np.nan, np.float16)), "NaN or infinite values in tensor 'weight'", "finite weights", id="NaN"
        ),
        pytest.param(
            rewrite(bias=np.array([0, -np.inf, 0], np.float32)), "NaN or infinite values in tensor 'bias'", "finite weights", id="infinite"
        ),
        pytest.param(shorten(SPEC_FILE, -3), "head.json: Invalid JSON", "a head.json of format 1", id="spec cut"),
        pytest.param(change(labels=["a", "b", "a"]), "head.json: Value error, labels must be distinct", "a head.json", id="twin labels"),
        pytest.param(change(labels=[], scale=[], shift=[], thresholds=[]), "labels: Tuple should have at least 1", "a head", id="no labels"),
        pytest.param(change(scale=[1.0]), "head.json: Value error, scale has 1 values for 3 labels", "a head.json", id="short scale"),
        pytest.param(change(shift=[0.0] * 4), "head.json: Value error, shift has 4 values for 3 labels", "a head.json", id="long shift"),
        pytest.param(change(thresholds=[0.5] * 2), "head.json: Value error, thresholds has 2 values for 3", "a head", id="short thresholds"),
        pytest.param(change(thresholds=[0.5, float("nan"), 0.5]), "thresholds.1: Input should be a finite", "a head", id="NaN threshold"),
        pytest.param(change(scale=[1.0, 1.0, float("inf")]), "scale.2: Input should be a finite number", "a head.json", id="infinite scale"),
        pytest.param(change(kind="tree"), "kind: Input should be 'sentence', 'context', 'token'", "a head.json", id="unknown kind"),
        pytest.param(
            change(outside={"method": "energy", "shift": 0.0, "threshold": 1.5}), "outside.threshold: Input should be less", "a head", id="threshold"
        ),
        pytest.param(change(outside={"method": "energy", "threshold": 0.5}), "outside.shift: Field required", "a head.json", id="no shift"),
        pytest.param(
            change(outside=OUTSIDE | {"cosine": 1.0}), "outside.cosine: Extra inputs are not permitted", "a head.json", id="unknown measure"
        ),
        pytest.param(change(outside=OUTSIDE | {"energy": float("nan")}), "outside.energy: Input should be a finite", "a head", id="NaN measure"),
        pytest.param(
            change(outside=OUTSIDE, exclusive=False), "head.json: Value error, outside is for labels that exclude each other", "a head",
            id="outside of independent labels",
        ),
        pytest.param(change(metrics={"accuracy": float("nan")}), "metrics.accuracy: Input should be a finite number", "a head", id="NaN metric"),
        pytest.param(change(prior={"a": 0.5, "d": 0.5}), "head.json: Value error, prior has shares of 'd'", "a head", id="stranger in prior"),
        pytest.param(change(prior={"a": 0.5, "b": 0.2}), "head.json: Value error, prior must be shares that sum", "a head", id="prior of 0.7"),
        pytest.param(change(prior={"a": 1.5, "b": -0.5}), "head.json: Value error, prior must be shares", "a head", id="share below 0"),
        pytest.param(change(prior={"a": float("nan")}), "prior.a: Input should be a finite number", "a head.json", id="NaN share"),
        pytest.param(change(treshold=[0.5]), "treshold: Extra inputs are not permitted", "a head.json of format 1", id="unknown field"),
        pytest.param(change(golden=[{"text": "x", "lable": "a"}]), "golden.0.lable: Extra inputs", "a head.json", id="unknown golden field"),
        pytest.param(change(format=2), "format: Input should be 1", "a head.json of format 1", id="another format"),
        pytest.param(change(name="Toy head"), "name: String should match pattern", "a head.json of format 1", id="name"),
        pytest.param(change(name="a" * 58), "name: String should match pattern", "a head.json of format 1", id="long name"),
        pytest.param(change(requires={"vectorizer": "main"}), "requires.vectorizer: String should match", "a head.json", id="no fingerprint"),
        pytest.param(change(requires=None), "requires: Field required", "a head.json of format 1", id="requires nothing"),
    ],
)  # fmt: skip
def test_head_malformed_is_refused(
    folder: Path, harm: Callable[[Path], None], found: str, expected: str
) -> None:
    harm(folder)
    with pytest.raises(HeadInvalid) as refusal:
        read(folder)
    message = str(refusal.value)
    assert message.startswith(("head toy: found ", "head head.toy: found "))
    assert f"found {found}" in message
    assert f"expected {expected}" in message
    assert message.endswith("; train the head again")


def test_head_spec_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SPEC.name = "other"  # type: ignore[misc]  # what this test is about


@pytest.mark.parametrize(
    "expected",
    [
        {"weight": (3, 2), "bias": (3,)},
        {"weight": (3, None), "bias": (None,)},
    ],
)
def test_head_fitting_shapes_are_accepted(expected: dict[str, tuple[int | None, ...]]) -> None:
    expect_shapes(SPEC, {"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(3, np.float32)}, expected)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"weight": (3, 3), "bias": (3,)}, "found tensor 'weight' of shape 3x2, expected 3x3"),
        ({"weight": (None, 3), "bias": (3,)}, "found tensor 'weight' of shape 3x2, expected anyx3"),
        ({"weight": (3, 2, None), "bias": (3,)}, "found tensor 'weight' of shape 3x2, expected 3x2xany"),
        ({"weight": (6,), "bias": (3,)}, "found tensor 'weight' of shape 3x2, expected 6"),
        ({"weight": (3, 2)}, "found tensors bias, weight, expected weight"),
        ({}, "found tensors bias, weight, expected none"),
    ],
)
def test_head_other_shapes_are_refused(expected: dict[str, tuple[int | None, ...]], message: str) -> None:
    found = {"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    with pytest.raises(HeadInvalid, match=f"^head toy: {message}; train the head again$"):
        expect_shapes(SPEC, found, expected)
