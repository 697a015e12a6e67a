"""Phrases to Encodings with ONNX Runtime and tokenizers: the one model every head, index and cache stands on.

A phrase's Encoding never depends on its neighbours. On a CPU every phrase is its own unpadded run of a single-threaded
session (dynamic int8 scales are per batch, so sharing one would couple phrases); parallelism comes from calling `encode`
from several threads. On a GPU phrases are padded into batches under a token budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Encoding as Tokens
from tokenizers import Tokenizer

from annotators.annotator import Encoding
from nlu.errors import VectorizerRefused
from nlu.graphs import GraphRefused, check_graph
from nlu.normalizer import RULES_VERSION

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
SPEC_FILE = "vectorizer.json"
FORMAT: Literal[1] = 1

_TYPES = {
    "input_ids": "tensor(int64)",
    "attention_mask": "tensor(int64)",
    "sentence": "tensor(float)",
    "tokens": "tensor(float)",
}
_GPU_TOKEN_BUDGET = 16_384
_GPU_MAX_BATCH = 512
_BULK_CHUNK = 32


class VectorizerSpec(BaseModel):
    """vectorizer.json. Everything but `name` and `provenance` changes vectors and is part of the fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    name: str
    dim: int = Field(gt=0, le=4096)
    token_dim: int = Field(gt=0, le=4096)
    pooling: Literal["mean", "cls"]
    max_tokens: int = Field(gt=2, le=512)
    precision: Literal["fp32", "int8"]
    uncased: bool
    normalizer: int
    provenance: dict[str, Any] = {}


class Vectorizer:
    """One loaded model. `encode` is thread-safe."""

    def __init__(
        self, folder: Path, *, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 1
    ) -> None:
        """Load a folder of model.onnx, tokenizer.json and vectorizer.json; raises VectorizerRefused."""
        model, tokenizer, self.spec = _read(folder)
        self.fingerprint = _fingerprint(model, tokenizer, self.spec)
        self.dim, self.token_dim = self.spec.dim, self.spec.token_dim
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer.decode())
        except Exception as error:  # tokenizers raises nothing narrower
            raise VectorizerRefused(
                f"{folder / TOKENIZER_FILE} does not load ({error}); export it again"
            ) from error
        self._tokenizer.enable_truncation(self.spec.max_tokens)
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            check_graph(model, str(folder / MODEL_FILE))
        except GraphRefused as error:
            raise VectorizerRefused(str(error)) from error
        # From bytes, so that nothing outside the verified folder can be pulled in as external data.
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=list(providers))
        except Exception as error:  # onnxruntime's errors share no other base
            raise VectorizerRefused(
                f"{folder / MODEL_FILE} does not load ({error}); export it again"
            ) from error
        self._alone = self._session.get_providers()[0] == "CPUExecutionProvider"
        self._check_graph(folder)

    @property
    def max_batch(self) -> int:
        """How many phrases one call of `encode` gains from; 1 on a CPU."""
        return 1 if self._alone else _GPU_MAX_BATCH

    def encode(self, phrases: Sequence[str], *, tokens: bool = True) -> list[Encoding]:
        """Encode phrases (already normalised), in order. Token vectors only where asked for."""
        if self._alone:
            return [self._encode_alone(phrase, tokens=tokens) for phrase in phrases]
        return self._encode_padded(phrases, tokens=tokens)

    def count(self, phrase: str) -> int:
        """How many tokens of a phrase (already normalised) the model reads, its own special ones included."""
        return len(self._tokenizer.encode(phrase).ids)

    def encode_corpus(
        self, phrases: Sequence[str], *, tokens: bool = True, workers: int
    ) -> Iterator[Encoding]:
        """Encode many phrases on `workers` threads, yielding in order; for building artifacts, not for serving."""
        chunks = [phrases[i : i + _BULK_CHUNK] for i in range(0, len(phrases), _BULK_CHUNK)]
        with ThreadPoolExecutor(workers) as pool:
            for encodings in pool.map(lambda chunk: self.encode(chunk, tokens=tokens), chunks):
                yield from encodings

    def _look_up(self, piece: int) -> None:
        """Raises what ONNX Runtime does where the tokenizer knows pieces that the model does not."""
        ids = np.array([[piece]], np.int64)
        self._session.run(["sentence"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})

    def _encode_alone(self, phrase: str, *, tokens: bool) -> Encoding:
        words = self._tokenizer.encode(phrase)
        ids = np.array([words.ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if not tokens:
            return Encoding(_rounded(self._session.run(["sentence"], feed)[0][0]))
        sentence, pieces = self._session.run(["sentence", "tokens"], feed)
        return Encoding(_rounded(sentence[0]), *_words(phrase, words, pieces[0]))

    def _encode_padded(self, phrases: Sequence[str], *, tokens: bool) -> list[Encoding]:
        tokenized = self._tokenizer.encode_batch(list(phrases))
        encodings: list[Encoding | None] = [None] * len(phrases)
        for batch in _budgeted([len(words.ids) for words in tokenized], _GPU_TOKEN_BUDGET):
            width = max(len(tokenized[i].ids) for i in batch)
            ids = np.zeros((len(batch), width), np.int64)
            mask = np.zeros((len(batch), width), np.int64)
            for row, i in enumerate(batch):
                ids[row, : len(tokenized[i].ids)] = tokenized[i].ids
                mask[row, : len(tokenized[i].ids)] = 1
            outputs = ["sentence", "tokens"] if tokens else ["sentence"]
            answers = self._session.run(outputs, {"input_ids": ids, "attention_mask": mask})
            for row, i in enumerate(batch):
                pieces = _words(phrases[i], tokenized[i], answers[1][row]) if tokens else (None, None)
                encodings[i] = Encoding(_rounded(answers[0][row]), *pieces)
        return [encoding for encoding in encodings if encoding is not None]

    def _check_graph(self, folder: Path) -> None:
        """One real run: names, widths and finiteness are checked before anybody trusts this model."""
        names = (
            {node.name for node in self._session.get_inputs()},
            {node.name for node in self._session.get_outputs()},
        )
        if names != ({"input_ids", "attention_mask"}, {"sentence", "tokens"}):
            raise VectorizerRefused(
                f"{folder}: found a graph with inputs {sorted(names[0])} and outputs {sorted(names[1])}, expected input_ids and "
                "attention_mask in, sentence and tokens out; export it with `nlu vectorizer export`"
            )
        types = {node.name: node.type for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        if types != _TYPES:
            raise VectorizerRefused(
                f"{folder}: found a graph of {types}, expected {_TYPES}; export it with `nlu vectorizer export`"
            )
        try:
            probe = self.encode(["are you there"])[0]
            self._look_up(max(self._tokenizer.get_vocab().values(), default=0))
        except Exception as error:
            raise VectorizerRefused(f"{folder}: the model does not run ({error}); export it again") from error
        found = probe.sentence.shape[-1], 0 if probe.tokens is None else probe.tokens.shape[-1]
        if found != (self.dim, self.token_dim):
            raise VectorizerRefused(
                f"{folder}: found vectors {found[0]} and {found[1]} wide, expected {self.dim} and {self.token_dim} as "
                f"{SPEC_FILE} says; export it again"
            )
        if not is_whole(probe):
            raise VectorizerRefused(
                f"{folder}: found vectors that are not finite and of unit length; export it again"
            )


def is_whole(encoding: Encoding) -> bool:
    """Whether every number is one, and the sentence vector of unit length."""
    length = float(np.linalg.norm(encoding.sentence))
    tokens_whole = encoding.tokens is None or bool(np.isfinite(encoding.tokens).all())
    return abs(length - 1) <= 1e-2 and tokens_whole


def fingerprint(folder: Path) -> str:
    """The identity of a vectorizer folder without loading the model; raises VectorizerRefused."""
    return _fingerprint(*_read(folder))


def _read(folder: Path) -> tuple[bytes, bytes, VectorizerSpec]:
    try:
        model = (folder / MODEL_FILE).read_bytes()
        tokenizer = (folder / TOKENIZER_FILE).read_bytes()
        spec = VectorizerSpec.model_validate_json((folder / SPEC_FILE).read_bytes())
    except FileNotFoundError as error:
        raise VectorizerRefused(
            f"{folder}: no {Path(str(error.filename)).name}; expected a folder made by `nlu vectorizer export`"
        ) from error
    except ValidationError as error:
        raise VectorizerRefused(
            f"{folder / SPEC_FILE}: {error.errors()[0]['msg']}; export it again"
        ) from error
    if spec.normalizer != RULES_VERSION:
        raise VectorizerRefused(
            f"{folder}: made with normaliser rules {spec.normalizer}, this code has {RULES_VERSION}; "
            "export it with this code or serve it with the code that made it"
        )
    return model, tokenizer, spec


def _fingerprint(model: bytes, tokenizer: bytes, spec: VectorizerSpec) -> str:
    identity = spec.model_dump(exclude={"name", "provenance"}) | {
        MODEL_FILE: hashlib.sha256(model).hexdigest(),
        TOKENIZER_FILE: hashlib.sha256(tokenizer).hexdigest(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _rounded(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector.astype(np.float16).astype(np.float32)


def _words(
    phrase: str, words: Tokens, pieces: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Mean the vectors of a word's pieces; special tokens belong to no word and drop out."""
    firsts: list[int] = []
    bounds: list[list[int]] = []
    previous: int | None = None
    stop = 0
    for i, (word, (start, end)) in enumerate(zip(words.word_ids, words.offsets, strict=True)):
        if word is None:
            continue
        stop = i + 1
        if word == previous:
            bounds[-1][1] = end
            continue
        previous = word
        while (
            start < end and phrase[start].isspace()
        ):  # some tokenizers count the space before a word as its own
            start += 1
        firsts.append(i)
        bounds.append([start, end])
    if not firsts:
        return np.zeros((0, pieces.shape[1]), np.float32), np.zeros((0, 2), np.int32)
    counts = np.diff([*firsts, stop])
    sums = np.add.reduceat(pieces[:stop], firsts, axis=0)
    means = (sums / counts[:, None]).astype(np.float32)
    return _rounded(means), np.array(bounds, np.int32)


def _budgeted(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group indices, longest first, so that rows times width of a group stays under the budget."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
