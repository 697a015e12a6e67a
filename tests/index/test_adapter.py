"""index.adapter: q' against the formula in float64, the promised bound and its sharpness, and folders that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from index.adapter import Adapter, AdapterInvalid, Change, Exam, Requires, Residual, Spec, bound
from index.search import QueryInvalid

DIM, RANK = 12, 3
ROUNDING = 2e-6  # of float32, in a cosine

Doubles = NDArray[np.float64]


def residual(seed: int = 0, *, eps: float = 0.3, scale: float = 1.0) -> Residual:
    rng = np.random.default_rng(seed)
    return Residual.of(
        scale * rng.standard_normal((RANK, DIM)), scale * rng.standard_normal((DIM, RANK)), eps
    )


def queries(count: int, seed: int = 1) -> NDArray[np.float32]:
    """[count, DIM] of unit length."""
    drawn = np.random.default_rng(seed).standard_normal((count, DIM))
    units: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return units


def adapter(learnt: Residual) -> Adapter:
    """A whole adapter around it, with an exam as if it had been judged."""
    change = Change(before=0.5, after=0.75, low=0.1, high=0.4)
    exam = Exam(questions=20, recall_at_1=change, recall_at_10=change, mrr=change)
    spec = Spec(
        dim=DIM, rank=RANK, eps=learnt.eps, bound=bound(learnt.eps), factor=1.0, max_harm=0.01, new=exam, old=exam, rows=9,
        requires=Requires(vectorizer="ab" * 32),
    )  # fmt: skip
    return Adapter(spec, learnt)


def clipped(learnt: Residual, query: NDArray[np.float32]) -> Doubles:
    """The residual of a unit query, by the formula."""
    delta: Doubles = learnt.up.astype(np.float64) @ (learnt.down.astype(np.float64) @ query)
    return delta * min(1.0, learnt.eps / float(np.linalg.norm(delta)))


@pytest.mark.parametrize("scale", [0.1, 1.0], ids=["free", "clipped"])
def test_adapter_moves_a_query_as_the_formula_says(scale: float) -> None:
    learnt = residual(scale=scale)
    for query in queries(20):
        moved = query + clipped(learnt, query)
        np.testing.assert_allclose(learnt.apply(query), moved / np.linalg.norm(moved), atol=ROUNDING)
        held = abs(np.linalg.norm(clipped(learnt, query)) - learnt.eps) < 1e-9
        assert held == (scale == 1.0)  # each case is what it is called


def test_adapter_answers_a_query_of_any_length_at_unit_length() -> None:
    learnt, query = residual(), queries(1)[0]
    np.testing.assert_allclose(learnt.apply(3 * query), learnt.apply(query), atol=ROUNDING)
    assert np.linalg.norm(learnt.apply(query)) == pytest.approx(1.0, abs=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    eps=st.floats(0.01, 0.97),
    scale=st.floats(0.001, 30.0),
)
def test_adapter_moves_no_cosine_beyond_its_bound(seed: int, eps: float, scale: float) -> None:
    learnt, query = residual(seed, eps=eps, scale=scale), queries(1, seed)[0]
    moved = learnt.apply(query)
    rows = [*queries(20, seed + 1), query, moved]
    towards = moved.astype(np.float64) - query
    if np.linalg.norm(towards) > 1e-3:
        rows += [towards / np.linalg.norm(towards), -towards / np.linalg.norm(towards)]  # the worst there are
    changes = [
        abs(float(row @ moved.astype(np.float64)) - float(row @ query.astype(np.float64))) for row in rows
    ]
    assert max(changes) <= bound(eps) + ROUNDING


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.9])
def test_adapter_bound_is_reached_by_a_tangent_and_broken_by_a_longer_residual(eps: float) -> None:
    cosine = np.sqrt(1 - eps * eps)
    down, up = np.zeros((1, DIM)), np.zeros((DIM, 1))
    down[0, 0], up[0, 0], up[1, 0] = 1.0, -8 * eps, 8 * cosine  # far too long: the clip has work to do
    query = np.eye(DIM, dtype=np.float32)[0]

    def largest(learnt: Residual) -> float:
        return float(
            np.linalg.norm(learnt.apply(query) - query)
        )  # the change for a row in just that direction

    assert largest(Residual.of(down, up, eps)) == pytest.approx(bound(eps), abs=1e-4)
    assert largest(Residual.of(down, up, min(0.99, 1.5 * eps))) > bound(eps) + 1e-3


def test_adapter_scaled_is_the_same_direction_less_far() -> None:
    for scale in (0.1, 1.0):
        learnt = residual(scale=scale)
        half = learnt.scaled(0.5)  # exact in float16
        for query in queries(10):
            np.testing.assert_allclose(clipped(half, query), 0.5 * clipped(learnt, query), atol=1e-9)
        assert half.eps == 0.5 * learnt.eps


@pytest.mark.parametrize(
    "vector",
    [np.zeros(DIM, np.float32), np.full(DIM, np.nan, np.float32), np.ones(DIM + 1, np.float32)],
    ids=["zero", "nan", "wide"],
)
def test_adapter_refuses_what_cannot_be_searched_with(vector: NDArray[np.float32]) -> None:
    with pytest.raises(QueryInvalid):
        residual().apply(vector)


def test_adapter_comes_back_from_its_folder_to_the_bit(tmp_path: Path) -> None:
    made = adapter(residual())
    made.save(tmp_path / "adapter.main")
    found = Adapter.load(tmp_path / "adapter.main")
    assert found.spec == made.spec
    for query in queries(10):
        assert np.array_equal(found.apply(query), made.apply(query))


def test_adapter_saved_twice_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        adapter(residual()).save(tmp_path / name)
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / n).iterdir()) for n in ("a", "b")]
    assert files[0] == files[1]
    assert [name for name, _ in files[0]] == ["adapter.json", "weights.safetensors"]
    adapter(residual(seed=1)).save(tmp_path / "c")
    assert (tmp_path / "c" / "weights.safetensors").read_bytes() != files[0][1][1]


def test_adapter_harm_is_the_worse_loss_of_recall() -> None:
    lost, won = (Change(before=0.5, after=after, low=-1.0, high=1.0) for after in (0.25, 0.75))
    assert Exam(questions=4, recall_at_1=won, recall_at_10=lost, mrr=won).harm == 0.25
    assert Exam(questions=4, recall_at_1=won, recall_at_10=won, mrr=lost).harm == -0.25


Harm = Callable[[Path], object]


def _spec(**changes: object) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))

    return harm


def _without(field: str) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "adapter.json"
        spec = json.loads(path.read_bytes())
        del spec[field]
        path.write_text(json.dumps(spec))

    return harm


def _weights(change: Callable[[dict[str, NDArray[np.float16]]], object]) -> Harm:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(
            {name: np.ascontiguousarray(tensors[name]) for name in tensors}, folder / "weights.safetensors"
        )

    return harm


def _set(name: str, value: NDArray[np.generic]) -> Harm:
    return _weights(lambda tensors: tensors.update({name: value}))  # type: ignore[dict-item]


REFUSED: dict[str, tuple[Harm, str]] = {
    "nan": (_set("up", np.full((DIM, RANK), np.nan, np.float16)), "NaN or infinite values in tensor 'up'"),
    "infinite": (_set("down", np.full((RANK, DIM), np.inf, np.float16)), "NaN or infinite .* 'down'"),
    "transposed": (_set("down", np.zeros((DIM, RANK), np.float16)), rf"float16\[{DIM}, {RANK}\]"),
    "float32": (_set("up", np.zeros((DIM, RANK), np.float32)), r"float32\["),
    "one tensor more": (_set("bias", np.zeros(DIM, np.float16)), "bias"),
    "one tensor less": (_weights(lambda tensors: tensors.pop("up")), r"found tensors \{'down'"),
    "another dim": (_spec(dim=DIM + 1), rf"expected .*float16\[{RANK}, {DIM + 1}\]"),
    "another rank": (_spec(rank=RANK + 1), rf"expected .*float16\[{RANK + 1}, {DIM}\]"),
    "unknown format": (_spec(format=2), "format"),
    "unknown field": (_spec(colour="red"), "colour"),
    "unmeasured harm": (_without("old"), "old"),
    "eps too large": (_spec(eps=1.0, bound=2**0.5), "eps"),
    "eps zero": (_spec(eps=0.0, bound=0.0), "eps"),
    "bound of another eps": (_spec(bound=0.1), "does not follow from eps"),
    "short fingerprint": (_spec(requires={"vectorizer": "ab"}), "requires.vectorizer"),
    "no json": (lambda folder: (folder / "adapter.json").write_text("{"), "adapter.json"),
    "no spec": (lambda folder: (folder / "adapter.json").unlink(), "no adapter.json"),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), "no weights.safetensors"),
    "cut weights": (lambda folder: (folder / "weights.safetensors").write_bytes(b"x" * 20), "unreadable weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_refuses_a_folder_with(name: str, tmp_path: Path) -> None:
    harm, words = REFUSED[name]
    folder = tmp_path / "adapter.main"
    adapter(residual()).save(folder)
    Adapter.load(folder)  # unharmed it is fine
    harm(folder)
    with pytest.raises(AdapterInvalid, match=words) as refused:
        Adapter.load(folder)
    assert all(
        word in str(refused.value) for word in ("adapter.main", "found", "expected", "nlu index adapt")
    )
