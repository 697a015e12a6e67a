"""nlu.canaries: the vectorizer an artifact was built on passes, every other one is refused, whatever the file claims."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from nlu import canaries
from nlu.errors import EngineRefused
from nlu.normalizer import normalize
from nlu.vectorizer import Vectorizer
from tests.tiny import make_vectorizer


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Vectorizer:
    """Another vectorizer of the same width."""
    return Vectorizer(make_vectorizer(tmp_path_factory.mktemp("other") / "tiny", seed=1))


@pytest.fixture
def folder(tmp_path: Path, vectorizer: Vectorizer) -> Path:
    """An artifact's folder with the canaries of `vectorizer`."""
    canaries.write(tmp_path, vectorizer)
    return tmp_path


def read(folder: Path) -> tuple[NDArray[np.float16], dict[str, str]]:
    with safe_open(folder / canaries.FILE, "numpy") as file:
        return file.get_tensor("vectors"), dict(file.metadata())


def rewrite(folder: Path, vectors: NDArray[np.generic], metadata: Mapping[str, str] | None) -> None:
    save_file(
        {"vectors": vectors}, folder / canaries.FILE, metadata=None if metadata is None else dict(metadata)
    )


def test_canaries_accept_the_vectorizer_they_were_made_with(folder: Path, vectorizer: Vectorizer) -> None:
    canaries.check("head intent", folder, vectorizer)


def test_canaries_refuse_another_vectorizer_of_the_same_width(folder: Path, other: Vectorizer) -> None:
    with pytest.raises(
        EngineRefused, match=r"head intent: found canaries that moved \(cosine -?0"
    ) as refused:
        canaries.check("head intent", folder, other)
    assert refused.value.part == "head intent"


def test_canaries_refuse_a_forged_fingerprint(
    folder: Path, vectorizer: Vectorizer, other: Vectorizer
) -> None:
    vectors, metadata = read(folder)
    rewrite(folder, vectors, metadata | {"vectorizer": other.fingerprint})
    assert canaries.made_for(folder) == other.fingerprint
    with pytest.raises(EngineRefused, match="canaries that moved"):
        canaries.check("head intent", folder, other)


def test_canaries_refuse_another_width(folder: Path, tmp_path: Path) -> None:
    wide = Vectorizer(make_vectorizer(tmp_path / "wide", dim=16))
    with pytest.raises(EngineRefused, match=r"canary vectors of shape \(64, 8\), expected \(64, 16\)"):
        canaries.check("head intent", folder, wide)


@pytest.mark.parametrize(("moved", "accepted"), [(0.04, True), (0.06, False)])
def test_canaries_allow_what_int8_kernels_differ_by(
    folder: Path, vectorizer: Vectorizer, moved: float, accepted: bool
) -> None:
    vectors, metadata = read(folder)
    vectors[7, 3] += np.float16(moved)
    rewrite(folder, vectors, metadata)
    if accepted:
        canaries.check("head intent", folder, vectorizer)
        return
    with pytest.raises(EngineRefused, match="canaries that moved"):
        canaries.check("head intent", folder, vectorizer)


def test_canaries_see_a_single_vector_that_turned(folder: Path, vectorizer: Vectorizer) -> None:
    vectors, metadata = read(folder)
    vectors[63] = -vectors[63]
    rewrite(folder, vectors, metadata)
    with pytest.raises(EngineRefused, match=r"canaries that moved \(cosine -1.0"):
        canaries.check("head intent", folder, vectorizer)


def metadata_of(**changes: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        vectors, metadata = read(folder)
        rewrite(folder, vectors, metadata | changes)

    return harm


def vectors_of(change: Callable[[NDArray[np.float16]], NDArray[np.generic]]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        vectors, metadata = read(folder)
        rewrite(folder, np.ascontiguousarray(change(vectors)), metadata)

    return harm


def content(value: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / canaries.FILE).write_bytes(value)


def cut(folder: Path) -> None:
    path = folder / canaries.FILE
    path.write_bytes(path.read_bytes()[:-2])


def without_metadata(folder: Path) -> None:
    rewrite(folder, read(folder)[0], None)


def other_tensor(folder: Path) -> None:
    vectors, metadata = read(folder)
    save_file({"weights": vectors}, folder / canaries.FILE, metadata=metadata)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        pytest.param(lambda folder: (folder / canaries.FILE).unlink(), "no readable", id="missing"),
        pytest.param(content(b""), "no readable", id="empty"),
        pytest.param(content(b"\xff" * 200), "no readable", id="noise"),
        pytest.param(cut, "no readable", id="cut"),
        pytest.param(without_metadata, "no readable", id="no-metadata"),
        pytest.param(other_tensor, "no readable", id="no-vectors"),
        pytest.param(metadata_of(phrases="["), "no readable", id="phrases-no-json"),
        pytest.param(metadata_of(phrases="64"), "no readable", id="phrases-a-number"),
        pytest.param(
            metadata_of(phrases=json.dumps([1] * 64)), "canaries that moved", id="phrases-of-numbers"
        ),
        pytest.param(metadata_of(phrases="[]"), "0 canary phrases, expected 64 to 1024", id="no-phrases"),
        pytest.param(metadata_of(phrases='["yes"]'), "1 canary phrases", id="one-phrase"),
        pytest.param(metadata_of(phrases=json.dumps(["yes"] * 63)), "63 canary phrases", id="fewer-phrases"),
        pytest.param(
            metadata_of(phrases=json.dumps(["yes"] * 65)),
            r"canary vectors of shape \(64, 8\)",
            id="more-phrases",
        ),
        pytest.param(metadata_of(phrases=json.dumps(["yes"] * 1025)), "1025 canary phrases", id="too-many"),
        pytest.param(metadata_of(phrases="[" * 100_000), "no readable", id="phrases-nested"),
        pytest.param(vectors_of(lambda v: v[:-1]), r"canary vectors of shape \(63, 8\)", id="fewer-vectors"),
        pytest.param(vectors_of(lambda v: v[:, 0]), r"canary vectors of shape \(64,\)", id="flat"),
        pytest.param(vectors_of(lambda v: v * np.float16("nan")), "canaries that moved", id="nan"),
        pytest.param(vectors_of(lambda v: v * np.float16(0)), "canaries that moved", id="zero"),
        pytest.param(
            vectors_of(lambda v: v * np.float16(0.96)), r"canaries that moved \(cosine 0.9", id="shrunk"
        ),
        pytest.param(vectors_of(lambda v: v[::-1]), "canaries that moved", id="shuffled"),
    ],
)
def test_canaries_refuse_a_file_that_is(
    folder: Path, vectorizer: Vectorizer, harm: Callable[[Path], object], found: str
) -> None:
    canaries.check("head intent", folder, vectorizer)  # the control: unharmed it passes
    harm(folder)
    with pytest.raises(EngineRefused, match=f"head intent: found {found}"):
        canaries.check("head intent", folder, vectorizer)


def test_canaries_of_no_phrases_and_no_vectors_prove_nothing(folder: Path, vectorizer: Vectorizer) -> None:
    rewrite(folder, np.zeros((0, 8), np.float16), {"phrases": "[]", "vectorizer": vectorizer.fingerprint})
    with pytest.raises(EngineRefused, match="0 canary phrases"):
        canaries.check("head intent", folder, vectorizer)


def test_canaries_of_one_vectorizer_are_one_file(tmp_path: Path, vectorizer: Vectorizer) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    canaries.write(tmp_path / "a", vectorizer)
    canaries.write(tmp_path / "b", vectorizer)
    assert (tmp_path / "a" / canaries.FILE).read_bytes() == (tmp_path / "b" / canaries.FILE).read_bytes()


def test_canaries_hold_the_vectors_of_their_phrases(folder: Path, vectorizer: Vectorizer) -> None:
    vectors, metadata = read(folder)
    twin = [encoding.sentence for encoding in vectorizer.encode(json.loads(metadata["phrases"]))]
    np.testing.assert_array_equal(vectors.astype(np.float32), np.stack(twin))


def test_canaries_are_64_different_phrases() -> None:
    assert len({normalize(phrase).text for phrase in canaries.PHRASES}) == len(canaries.PHRASES) == 64


def test_canaries_are_stored_in_normal_form(folder: Path) -> None:
    phrases = json.loads(read(folder)[1]["phrases"])
    assert phrases == [normalize(phrase).text for phrase in canaries.PHRASES]


def test_canaries_name_the_vectorizer_they_were_made_for(folder: Path, vectorizer: Vectorizer) -> None:
    assert canaries.made_for(folder) == vectorizer.fingerprint


def test_canaries_absent_mean_no_vectorizer(tmp_path: Path) -> None:
    assert canaries.made_for(tmp_path) is None


@pytest.mark.parametrize("harm", [content(b"{}"), cut, without_metadata], ids=["noise", "cut", "no-metadata"])
def test_canaries_unreadable_are_not_taken_for_absent(folder: Path, harm: Callable[[Path], object]) -> None:
    harm(folder)
    with pytest.raises(ValueError, match="unreadable .*; build the part again"):
        canaries.made_for(folder)
