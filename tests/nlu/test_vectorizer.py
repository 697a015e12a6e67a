"""nlu.vectorizer: Encodings against a twin computed by hand, the fingerprint, and every folder that must not load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from annotators.annotator import Encoding
from nlu import vectorizer as module
from nlu.errors import VectorizerRefused
from nlu.normalizer import RULES_VERSION
from nlu.vectorizer import MODEL_FILE, SPEC_FILE, TOKENIZER_FILE, Vectorizer, fingerprint
from tests.tiny import make_vectorizer

PHRASES = (
    "stop",
    "turn the lights on",
    "it's ok",
    "поставь будильник на 7:30",
    "a",
    "what?! no...",
    "ok " * 30 + "ok",
    "漢 fine",
)
HALF = 2.0**-10  # one step of a float16 just below 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder; every malformed one in these tests starts as this one."""
    return make_vectorizer(tmp_path / "tiny")


def bits(encoding: Encoding) -> tuple[bytes, bytes, bytes]:
    assert encoding.tokens is not None
    assert encoding.offsets is not None
    return encoding.sentence.tobytes(), encoding.tokens.tobytes(), encoding.offsets.tobytes()


def pieces_of(folder: Path, phrase: str) -> list[tuple[tuple[int, int], list[int]]]:
    """The twin's tokenizer: words with their bounds, and the ids of their characters; an unknown character spoils its word."""
    vocabulary: dict[str, int] = json.loads((folder / TOKENIZER_FILE).read_bytes())["model"]["vocab"]
    words = []
    for match in re.finditer(r"[^\W_]+|[^\w\s]|_", phrase):
        names = [character if i == 0 else f"##{character}" for i, character in enumerate(match[0])]
        known = all(name in vocabulary for name in names)
        words.append((match.span(), [vocabulary[name] for name in names] if known else [vocabulary["[UNK]"]]))
    return words


def table_of(folder: Path) -> NDArray[np.float32]:
    graph = onnx.load(folder / MODEL_FILE).graph
    return np.asarray(
        next(numpy_helper.to_array(array) for array in graph.initializer if array.name == "table")
    )


def rounded(vector: NDArray[np.float64]) -> NDArray[np.float32]:
    return vector.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("phrase", PHRASES)
def test_vectorizer_tokens_are_means_over_the_pieces_of_a_word(folder: Path, phrase: str) -> None:
    words = pieces_of(folder, phrase)
    table = table_of(folder)[:, :4].astype(np.float64)
    encoding = Vectorizer(folder).encode([phrase])[0]
    assert encoding.tokens is not None
    twin = rounded(np.stack([table[ids].mean(axis=0) for _, ids in words]))
    np.testing.assert_allclose(encoding.tokens, twin, rtol=HALF, atol=1e-6)


@pytest.mark.parametrize("phrase", PHRASES)
def test_vectorizer_offsets_bound_the_words(folder: Path, phrase: str) -> None:
    encoding = Vectorizer(folder).encode([phrase])[0]
    assert encoding.offsets is not None
    assert encoding.offsets.tolist() == [list(bounds) for bounds, _ in pieces_of(folder, phrase)]


@pytest.mark.parametrize("phrase", PHRASES)
def test_vectorizer_sentence_is_the_unit_mean_over_all_pieces(folder: Path, phrase: str) -> None:
    ids = [2, *(piece for _, word in pieces_of(folder, phrase) for piece in word), 3]
    mean = table_of(folder)[ids].astype(np.float64).mean(axis=0)
    encoding = Vectorizer(folder).encode([phrase])[0]
    np.testing.assert_allclose(encoding.sentence, rounded(mean / np.linalg.norm(mean)), atol=HALF)


@pytest.mark.parametrize("phrase", PHRASES)
def test_vectorizer_encodes_alone_as_in_a_crowd(vectorizer: Vectorizer, phrase: str) -> None:
    alone = vectorizer.encode([phrase])[0]
    crowd = vectorizer.encode(["before", *PHRASES, "x" * 400, phrase])
    assert bits(crowd[-1]) == bits(crowd[1 + PHRASES.index(phrase)]) == bits(alone)


def test_vectorizer_encodes_from_many_threads_as_from_one(vectorizer: Vectorizer) -> None:
    expected = [bits(encoding) for encoding in vectorizer.encode(PHRASES)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: [bits(encoding) for encoding in vectorizer.encode(PHRASES)], range(20))
        )
    assert answers == [expected] * 20


def test_vectorizer_corpus_comes_in_order(vectorizer: Vectorizer) -> None:
    phrases = [f"phrase number {i}" for i in range(100)]
    corpus = [bits(encoding) for encoding in vectorizer.encode_corpus(phrases, workers=2)]
    assert corpus == [bits(encoding) for encoding in vectorizer.encode(phrases)]


@pytest.mark.parametrize("budget", [1, 40, 10_000], ids=["one-a-batch", "a-few", "all-at-once"])
def test_vectorizer_padded_batches_agree_with_alone(
    folder: Path, vectorizer: Vectorizer, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The GPU's path, run on the CPU: padding may move a float32's last bits, which float16 shows as one step at most."""
    padded = Vectorizer(folder)
    monkeypatch.setattr(padded, "_alone", False)
    monkeypatch.setattr(module, "_GPU_TOKEN_BUDGET", budget)
    for found, alone in zip(padded.encode(PHRASES), vectorizer.encode(PHRASES), strict=True):
        assert found.tokens is not None
        assert alone.tokens is not None
        assert found.offsets is not None
        np.testing.assert_allclose(found.sentence, alone.sentence, atol=HALF)
        np.testing.assert_allclose(found.tokens, alone.tokens, rtol=HALF, atol=1e-6)
        np.testing.assert_array_equal(found.offsets, alone.offsets)


class Shapes:
    """A session that remembers how many rows and pieces each run had."""

    def __init__(self, session: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        self._session = session

    def run(self, outputs: list[str], feed: dict[str, NDArray[np.int64]]) -> Any:
        self.seen.append(feed["input_ids"].shape)
        return self._session.run(outputs, feed)


@pytest.mark.parametrize(("budget", "runs"), [(1, 5), (12, 3), (20, 2), (10_000, 1)])
def test_vectorizer_padded_batches_stay_under_their_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int, runs: int
) -> None:
    padded = Vectorizer(folder)
    shapes = Shapes(padded._session)
    monkeypatch.setattr(padded, "_alone", False)
    monkeypatch.setattr(padded, "_session", shapes)
    monkeypatch.setattr(module, "_GPU_TOKEN_BUDGET", budget)
    padded.encode(
        ["a", "abcdefgh", "ab", "abc", "abcd"]
    )  # 3, 10, 4, 5 and 6 pieces with the two special ones
    assert all(rows * pieces <= budget or rows == 1 for rows, pieces in shapes.seen)
    assert sum(rows for rows, _ in shapes.seen) == 5
    assert len(shapes.seen) == runs


def test_vectorizer_gains_from_batches_only_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectorizer = Vectorizer(folder)
    assert vectorizer.max_batch == 1
    monkeypatch.setattr(vectorizer, "_alone", False)
    assert vectorizer.max_batch > 1


def test_vectorizer_gives_tokens_only_where_asked(vectorizer: Vectorizer) -> None:
    bare = vectorizer.encode(["turn the lights on"], tokens=False)[0]
    assert (bare.tokens, bare.offsets) == (None, None)
    assert bare.sentence.tobytes() == vectorizer.encode(["turn the lights on"])[0].sentence.tobytes()


@pytest.mark.parametrize("array", ["sentence", "tokens"])
def test_vectorizer_numbers_survive_float16(vectorizer: Vectorizer, array: str) -> None:
    numbers: NDArray[np.float32] = getattr(vectorizer.encode(["turn the lights on"])[0], array)
    assert numbers.dtype == np.float32
    assert numbers.astype(np.float16).astype(np.float32).tobytes() == numbers.tobytes()


def test_vectorizer_sentence_has_unit_length(vectorizer: Vectorizer) -> None:
    lengths = [float(np.linalg.norm(encoding.sentence)) for encoding in vectorizer.encode(PHRASES)]
    assert lengths == pytest.approx([1.0] * len(PHRASES), abs=2e-3)


def test_vectorizer_of_no_phrases_is_nothing(vectorizer: Vectorizer) -> None:
    assert vectorizer.encode([]) == []


def test_vectorizer_of_an_empty_phrase_has_no_tokens(vectorizer: Vectorizer) -> None:
    encoding = vectorizer.encode([""])[0]
    assert encoding.tokens is not None
    assert encoding.offsets is not None
    assert (encoding.tokens.shape, encoding.offsets.shape) == ((0, 4), (0, 2))


def test_vectorizer_cuts_at_max_tokens(folder: Path) -> None:
    respec(max_tokens=6)(folder)  # [CLS], four pieces, [SEP]
    short = Vectorizer(folder)
    encoding = short.encode(["ab cd ef gh"])[0]
    assert encoding.offsets is not None
    assert encoding.offsets.tolist() == [[0, 2], [3, 5]]
    assert bits(encoding) == bits(short.encode(["ab cd"])[0])


def respec(**changes: object) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        spec = json.loads((folder / SPEC_FILE).read_bytes())
        (folder / SPEC_FILE).write_text(json.dumps(spec | changes))

    return harm


def append_space(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")

    return harm


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(respec(dim=16), id="dim"),
        pytest.param(respec(token_dim=5), id="token_dim"),
        pytest.param(respec(pooling="cls"), id="pooling"),
        pytest.param(respec(max_tokens=64), id="max_tokens"),
        pytest.param(respec(precision="int8"), id="precision"),
        pytest.param(respec(uncased=False), id="uncased"),
        pytest.param(append_space(MODEL_FILE), id="model"),
        pytest.param(append_space(TOKENIZER_FILE), id="tokenizer"),
    ],
)
def test_vectorizer_fingerprint_changes_with(folder: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_vectorizer_fingerprint_changes_with_the_normalizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(folder)
    monkeypatch.setattr(module, "RULES_VERSION", RULES_VERSION + 1)
    respec(normalizer=RULES_VERSION + 1)(folder)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(respec(name="other"), id="name"),
        pytest.param(respec(provenance={"teacher": "x"}), id="provenance"),
        pytest.param(append_space(SPEC_FILE), id="layout-of-the-json"),
        pytest.param(lambda folder: (folder / "notes.txt").write_text("x"), id="another-file"),
    ],
)
def test_vectorizer_fingerprint_stays_with(folder: Path, change: Callable[[Path], object]) -> None:
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) == before


def test_vectorizer_fingerprint_needs_no_model_loaded(folder: Path) -> None:
    assert Vectorizer(folder).fingerprint == fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(folder))


def test_vectorizer_fingerprint_is_the_same_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(folder)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, value: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(value)


def regraph(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        model = onnx.load(folder / MODEL_FILE)
        change(model)
        onnx.save(model, str(folder / MODEL_FILE))

    return harm


def cut_model(folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:-100])


def lose_the_table(folder: Path) -> None:
    """The first node looks words up in a table that is not there."""
    model = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(model.replace(b"table", b"chair", 1))


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "pooled"
    next(node for node in model.graph.node if node.output[0] == "sentence").output[0] = "pooled"


def retable(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> Callable[[onnx.ModelProto], None]:
    def harm(model: onnx.ModelProto) -> None:
        array = next(array for array in model.graph.initializer if array.name == "table")
        array.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(array)), "table"))

    return harm


def no_unit_length(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LpNormalization")
    node.op_type = "Identity"
    del node.attribute[:]


def externalize(folder: Path) -> None:
    model = onnx.load(folder / MODEL_FILE)
    onnx.save(
        model, str(folder / MODEL_FILE), save_as_external_data=True, location="weights.bin", size_threshold=0
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(remove(MODEL_FILE), "no model.onnx; expected a folder made by `nlu vectorizer export`", id="no-model"),
        pytest.param(remove(TOKENIZER_FILE), "no tokenizer.json; expected a folder made by", id="no-tokenizer"),
        pytest.param(remove(SPEC_FILE), "no vectorizer.json; expected a folder made by", id="no-spec"),
        pytest.param(write(SPEC_FILE, b"{"), "vectorizer.json: Invalid JSON.*; export it again", id="spec-cut"),
        pytest.param(write(SPEC_FILE, b"\xff"), "vectorizer.json: Invalid JSON.*; export it again", id="spec-not-utf8"),
        pytest.param(respec(format=2), "vectorizer.json: Input should be 1; export it again", id="format"),
        pytest.param(respec(colour="blue"), "vectorizer.json: Extra inputs are not permitted", id="unknown-field"),
        pytest.param(respec(dim=0), "vectorizer.json: Input should be greater than 0", id="no-dim"),
        pytest.param(respec(token_dim=5000), "vectorizer.json: Input should be less than or equal to 4096", id="huge-token-dim"),
        pytest.param(respec(max_tokens=2), "vectorizer.json: Input should be greater than 2", id="max-tokens"),
        pytest.param(respec(pooling="max"), "vectorizer.json: Input should be 'mean' or 'cls'", id="pooling"),
        pytest.param(respec(precision="fp16"), "vectorizer.json: Input should be 'fp32' or 'int8'", id="precision"),
        pytest.param(respec(normalizer=99), f"made with normaliser rules 99, this code has {RULES_VERSION}", id="normalizer"),
        pytest.param(write(TOKENIZER_FILE, b"{}"), "tokenizer.json does not load .*; export it again", id="tokenizer-empty"),
        pytest.param(write(TOKENIZER_FILE, b"\xff"), "tokenizer.json does not load .*; export it again", id="tokenizer-noise"),
        pytest.param(write(MODEL_FILE, b""), "model.onnx: found 0 nodes", id="model-empty"),
        pytest.param(write(MODEL_FILE, b"\xff" * 99), "model.onnx: found bytes that are cut or garbage", id="model-noise"),
        pytest.param(cut_model, "model.onnx: found bytes that are cut or garbage", id="model-cut"),
        pytest.param(externalize, "model.onnx: found external_data in TensorProto", id="external-data"),
        pytest.param(lose_the_table, "model.onnx does not load .*; export it again", id="model-broken"),
        pytest.param(regraph(rename_output), r"found a graph with .* outputs \['pooled', 'tokens'\]", id="output-names"),
        pytest.param(regraph(retable(lambda table: table[:9])), r"the model does not run \(.*\); export it again", id="small-table"),
        pytest.param(respec(dim=9), "found vectors 8 and 4 wide, expected 9 and 4 as vectorizer.json says", id="other-dim"),
        pytest.param(respec(token_dim=5), "found vectors 8 and 4 wide, expected 8 and 5 as vectorizer.json says", id="other-token-dim"),
        pytest.param(regraph(no_unit_length), "found vectors that are not finite and of unit length", id="not-unit"),
        pytest.param(regraph(retable(lambda table: table * np.float32("nan"))), "found vectors that are not finite", id="nan"),
    ],
)  # fmt: skip
def test_vectorizer_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], object], message: str
) -> None:
    Vectorizer(folder)  # the control: unharmed it loads
    harm(folder)
    monkeypatch.chdir(folder)  # where external data would be found, were it looked for
    with pytest.raises(VectorizerRefused, match=f"(?s){re.escape(str(folder))}.*{message}"):
        Vectorizer(folder)


@pytest.mark.parametrize("name", [MODEL_FILE, TOKENIZER_FILE, SPEC_FILE])
def test_vectorizer_fingerprint_refuses_a_folder_without(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(VectorizerRefused, match=f"no {name}"):
        fingerprint(folder)
