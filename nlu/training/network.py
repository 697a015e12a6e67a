"""The network that is trained: a Hugging Face encoder, pooled, perhaps compressed, of unit length, and a light head per pool.

The encoder's part is `export.EncoderGraph`, the very module that export turns into ONNX, so what is trained is what will be
served. `save` writes a sentence-transformers folder that `nlu vectorizer export` takes as it is, and the heads beside it.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional

from nlu.training.config import Full, LayerNorm, Lora, Model, Prompt
from nlu.training.export import PACKAGED, EncoderGraph

HEADS_FILE = "heads.json"
HEAD_WEIGHTS_FILE = "heads.safetensors"
FORMAT = 1
OUTSIDE = "O"  # of every entity
NO_WORD = -1

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class Head:
    """What one pool teaches beside the shared space; the labels name its outputs, in order."""

    name: str  # of the pool
    kind: Literal["classify", "tags", "tokens"]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Phrases as the encoder reads them, all padded to the longest."""

    ids: Tensor  # [batch, tokens] int64
    mask: Tensor  # [batch, tokens] int64, 1 where there is a token
    words: (
        Tensor  # [batch, tokens] int64: number of the word a token is a piece of, NO_WORD for special tokens
    )
    bounds: tuple[tuple[tuple[int, int], ...], ...]  # of each phrase's words, in code points

    def to(self, device: torch.device) -> Tokens:
        """The same, there."""
        return Tokens(self.ids.to(device), self.mask.to(device), self.words.to(device), self.bounds)


class Network(nn.Module):
    """Phrases to sentence vectors [batch, dim], token states [batch, tokens, hidden], and logits of heads over them."""

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        *,
        pooling: Pooling = "mean",
        dense: nn.Sequential | None = None,
        fresh: int = 0,
        heads: Sequence[Head] = (),
        max_tokens: int = 64,
    ) -> None:
        """`dense` alternates linear layers and activations; the last `fresh` of the linear ones are not yet trained."""
        super().__init__()
        self.graph = EncoderGraph(encoder, pooling=pooling, dense=dense)
        self.tokenizer, self.max_tokens, self.fresh = tokenizer, max_tokens, fresh
        self.about_heads = {head.name: head for head in heads}
        widths = {"classify": self.dim, "tags": self.dim, "tokens": self.hidden}
        self.heads = nn.ModuleList(nn.Linear(widths[head.kind], len(head.labels)) for head in heads)

    @property
    def hidden(self) -> int:
        """Width of token states."""
        return int(self.graph.encoder.config.hidden_size)

    @property
    def dim(self) -> int:
        """Width of sentence vectors."""
        layers = list(_layers(self.graph.dense))
        return layers[-1][0].out_features if layers else self.hidden

    @property
    def pooling(self) -> Pooling:
        """How token states become one."""
        return "cls" if self.graph.pooling == "cls" else "mean"

    def tokenise(self, phrases: Sequence[str]) -> Tokens:
        """Phrases (normalised) as the encoder reads them, cut at `max_tokens`; on the CPU."""
        found = self.tokenizer(
            list(phrases),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_offsets_mapping=True,
            return_tensors="np",
        )
        ids = torch.from_numpy(found["input_ids"].astype(np.int64))
        words = np.full(ids.shape, NO_WORD, np.int64)
        bounds = []
        for row, offsets in enumerate(found["offset_mapping"].tolist()):
            numbers, spans = _words(found.word_ids(row), offsets)
            words[row, : len(numbers)] = numbers
            bounds.append(spans)
        mask = torch.from_numpy(found["attention_mask"].astype(np.int64))
        return Tokens(ids, mask, torch.from_numpy(words), tuple(bounds))

    def lengths(self, phrases: Sequence[str]) -> list[int]:
        """How many tokens each has, which letters do not tell: what a vocabulary does not know is spelt out."""
        found = self.tokenizer(list(phrases), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [len(ids) for ids in found]

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Sentence vectors [batch, dim] of unit length, and token states [batch, tokens, hidden], in float32."""
        sentence, states = self.graph(tokens.ids, tokens.mask)
        return sentence.float(), states.float()

    def sentences(self, tokens: Tokens) -> Tensor:
        """[batch, dim] of unit length."""
        sentence: Tensor = self(tokens)[0]
        return sentence

    def words(self, tokens: Tokens) -> Tensor:
        """[words, hidden]: the state of each word's first piece, phrase after phrase."""
        states: Tensor = self(tokens)[1]
        return states[first_pieces(tokens.words)]

    def logits(self, name: str, inputs: Tensor) -> Tensor:
        """[rows, labels] of a head, of sentence vectors or of words' states, as its kind wants."""
        head = list(self.about_heads).index(name)
        if self.about_heads[name].kind != "tokens":
            # On the unit sphere a component is about 1/sqrt(dim); a head learns at the usual pace where it is about 1.
            inputs = inputs * inputs.shape[-1] ** 0.5
        logits: Tensor = self.heads[head](inputs)
        return logits

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(self, phrases: Sequence[str], *, batch: int = 64) -> Tensor:
        """[phrases, dim] on the CPU, without dropout."""
        training = self.training
        self.eval()
        parts = [
            self.sentences(self.tokenise(phrases[start : start + batch]).to(self.device)).cpu()
            for start in range(0, len(phrases), batch)
        ]
        self.train(training)
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers folder with the adaptation merged into the weights, and the heads."""
        folder.mkdir(parents=True, exist_ok=True)
        _merged(self.graph.encoder).save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        kinds = [("Transformer", "")]
        kinds.append(("Pooling", _write_json(folder / "1_Pooling" / "config.json", self._pooling_config())))
        for linear, activation in _layers(self.graph.dense):
            kinds.append(("Dense", _write_dense(folder / f"{len(kinds)}_Dense", linear, activation)))
        kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds)
        ]
        _write_json(folder / "modules.json", modules)
        _write_json(
            folder / "sentence_bert_config.json", {"max_seq_length": self.max_tokens, "do_lower_case": False}
        )
        _write_json(
            folder / HEADS_FILE,
            {"format": FORMAT, "heads": [asdict(head) for head in self.about_heads.values()]},
        )
        weights = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, head in zip(self.about_heads, self.heads, strict=True)
            for part, tensor in head.named_parameters()
        }
        save_file(weights, folder / HEAD_WEIGHTS_FILE)

    def _pooling_config(self) -> dict[str, Any]:
        # The older spelling, which every sentence-transformers reads.
        return {
            "word_embedding_dimension": self.hidden,
            "pooling_mode_cls_token": self.pooling == "cls",
            "pooling_mode_mean_tokens": self.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        }


# --- making one ---------------------------------------------------------------------------------------------------------


def make(model: Model, heads: Sequence[Head] = ()) -> Network:
    """A network to train, from the config's base, with fresh heads drawn from torch's random state.

    Raises ValueError where the base cannot be loaded or is not what the config says it is.
    """
    base = _load_base(model.base)
    if model.dropout is not None:
        _drop_out(base.encoder, model.dropout)
    if base.pooling is not None and base.pooling != model.pooling:
        raise ValueError(
            f"model.pooling: found {model.pooling!r}, but {model.base} was trained with {base.pooling!r}; "
            f"set model.pooling to {base.pooling!r}"
        )
    uncased = base.tokenizer("ABC")["input_ids"] == base.tokenizer("abc")["input_ids"]
    if uncased != model.uncased:
        raise ValueError(
            f"model.uncased: found {model.uncased}, but the tokenizer of {model.base} is "
            f"{'uncased' if uncased else 'cased'}; set model.uncased to {str(uncased).lower()}"
        )
    places = getattr(base.encoder.config, "max_position_embeddings", None)
    if places is not None and model.max_tokens > places:
        raise ValueError(
            f"model.max_tokens: found {model.max_tokens}, but {model.base} has places for {places}; lower it"
        )
    tokenizer = _adapt(base.encoder, base.tokenizer, model)
    layers = list(base.dense)
    hidden = int(base.encoder.config.hidden_size)
    width = layers[-1][0].out_features if layers else hidden
    fresh = int(bool(model.dim) and model.dim != width)
    if fresh:
        layers.append((nn.Linear(width, model.dim, bias=False), nn.Identity()))
    return Network(
        base.encoder,
        tokenizer,
        pooling=model.pooling,
        dense=_sequential(layers),
        fresh=fresh,
        heads=heads,
        max_tokens=model.max_tokens,
    )


def load(folder: Path) -> Network:
    """What `save` wrote; a folder without heads, or any sentence-transformers folder, loads too, without heads."""
    base = _load_base(str(folder))
    heads: list[Head] = []
    if (folder / HEADS_FILE).exists():
        described = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        if described.get("format") != FORMAT:
            raise ValueError(
                f"{folder / HEADS_FILE}: found format {described.get('format')}, expected {FORMAT}; train again"
            )
        heads = [Head(head["name"], head["kind"], tuple(head["labels"])) for head in described["heads"]]
    about = folder / "sentence_bert_config.json"
    said = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    network = Network(
        base.encoder,
        base.tokenizer,
        pooling=base.pooling or "mean",
        dense=_sequential(base.dense),
        heads=heads,
        max_tokens=int(said.get("max_seq_length") or 64),
    )
    if heads:
        weights = load_file(folder / HEAD_WEIGHTS_FILE)
        for head, layer in zip(heads, network.heads, strict=True):
            layer.load_state_dict({part: weights[f"{head.name}.{part}"] for part in ("weight", "bias")})
    return network.eval()


@torch.no_grad()
def mix(network: Network, base: Mapping[str, Tensor], share: float) -> None:
    """Set the encoder to `share` of a base's weights and the rest of its own (WiSE-FT, Wortsman et al. 2022)."""
    for name, weights in network.graph.encoder.state_dict().items():
        if weights.is_floating_point():
            weights.lerp_(base[name].to(weights), share)


@torch.no_grad()
def start_from_principal_components(network: Network, phrases: Sequence[str]) -> float:
    """Set the fresh compressing layer to the principal components of what comes before it, over some phrases.

    Components of unit vectors about the origin, not about their mean, because cosines are what should survive. Returns
    the share of the squared length that does. Raises ValueError for fewer phrases than dimensions.
    """
    if not network.fresh:
        raise ValueError(
            "found no fresh compressing layer, expected one; set model.dim below the base's width"
        )
    whole = network.graph.dense
    *before, (linear, _) = _layers(whole)
    if len(phrases) < linear.out_features:
        raise ValueError(
            f"model.compress: found {len(phrases)} phrases, expected at least {linear.out_features} for as many "
            "principal components; set model.compress = 'random' or give more data"
        )
    network.graph.dense = _sequential(before)
    vectors = network.encode(phrases)  # [phrases, width]
    network.graph.dense = whole
    components, kept = principal_components(vectors, linear.out_features)
    linear.weight.copy_(components)
    return kept


def principal_components(vectors: Tensor, dim: int) -> tuple[Tensor, float]:
    """[dim, width] of vectors [phrases, width] about the origin, and the share of the squared length that they keep.

    Raises ValueError for fewer phrases, or a narrower space, than dimensions.
    """
    if dim > min(vectors.shape):
        raise ValueError(
            f"model.dim: found {dim}, but {len(vectors)} phrases of width {vectors.shape[1]} have no more than "
            f"{min(vectors.shape)} principal components; lower it or give more data"
        )
    exact = vectors.double()
    values, components = torch.linalg.eigh(exact.T @ exact)  # ascending
    kept = components.flip(1)[:, :dim].T  # [dim, width]
    # A component's sign is arbitrary; fixed, so that every machine starts from the same weights.
    largest = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True))
    return (kept * largest.sign()).float(), float(values.flip(0)[:dim].sum() / values.sum())


# --- words --------------------------------------------------------------------------------------------------------------


def first_pieces(words: Tensor) -> Tensor:
    """[batch, tokens] word numbers to [batch, tokens] bool: where a word begins."""
    before = functional.pad(words, (1, 0), value=NO_WORD)[:, :-1]
    return (words != NO_WORD) & (words != before)


def token_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Span labels to what a head over words tells apart: outside, begin and inside."""
    return (OUTSIDE, *(f"{part}-{label}" for label in sorted(labels) for part in "BI"))


def word_tags(spans: Iterable[tuple[str, int, int]], bounds: Sequence[tuple[int, int]]) -> list[str]:
    """Spans (label, start, end) in code points to one tag a word; a word belongs to the first span it touches."""
    tags = [OUTSIDE] * len(bounds)
    for label, start, end in spans:
        part = "B"
        for i, (begin, stop) in enumerate(bounds):
            if begin < end and stop > start and tags[i] == OUTSIDE:
                tags[i] = f"{part}-{label}"
                part = "I"
    return tags


def _words(
    numbers: Sequence[int | None], offsets: Sequence[Sequence[int]]
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Word number of each token, NO_WORD for none, and the code points each word covers."""
    spans: dict[int, tuple[int, int]] = {}
    for number, (start, end) in zip(numbers, offsets, strict=True):
        if number is not None:
            spans[number] = (spans.get(number, (start, end))[0], end)
    return [NO_WORD if number is None else number for number in numbers], tuple(spans.values())


# --- the base ------------------------------------------------------------------------------------------------------------

Layers = Sequence[tuple[nn.Linear, nn.Module]]


@dataclass(frozen=True, slots=True)
class _Base:
    encoder: Any
    tokenizer: Any
    pooling: Pooling | None  # None where the base does not say
    dense: Layers


def _load_base(base: str) -> _Base:
    folder = Path(base)
    if base in PACKAGED:
        folder = Path(str(importlib.import_module(PACKAGED[base]).MODEL_DIR))
    name = str(folder) if folder.exists() else base
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours to show
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # The fused attention of CPUs is half as fast as the plain one on short phrases, and gives no maps to distill.
        attention = "sdpa" if torch.cuda.is_available() else "eager"
        encoder = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.base: found no loadable encoder in {base!r} ({str(error).splitlines()[0]}), expected a folder, one of "
            f"{', '.join(PACKAGED)}, or a Hugging Face name that is cached or can be reached; check the name"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.base: found a slow tokenizer in {base!r}, expected one with a tokenizer.json, which serving needs; "
            "convert it or take another base"
        )
    pooling, dense = _modules(folder)
    return _Base(encoder, tokenizer, pooling, dense)


def _modules(folder: Path) -> tuple[Pooling | None, Layers]:
    """Pooling and dense layers of a sentence-transformers folder."""
    listed = folder / "modules.json"
    if not listed.exists():
        return None, ()
    pooling: Pooling | None = None
    dense = []
    for module in json.loads(listed.read_text(encoding="utf-8"))[1:]:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder / module["path"] / "config.json")
        elif kind == "Dense":
            dense.append(_read_dense(folder / module["path"]))
        elif kind != "Normalize":
            raise ValueError(
                f"{listed}: found a {kind} module, expected Pooling, Dense and Normalize after the encoder; "
                "take another base"
            )
    return pooling, dense


def _pooling(path: Path) -> Pooling:
    about = json.loads(path.read_text(encoding="utf-8"))
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [name for name, value in about.items() if name.startswith("pooling_mode_") and value is True]
    found = about.get("pooling_mode", [modes.get(name, name) for name in on])
    match found:
        case "mean" | ["mean"]:
            return "mean"
        case "cls" | ["cls"]:
            return "cls"
    raise ValueError(f"{path}: found {found} pooling, expected mean or cls; take another base")


def _read_dense(folder: Path) -> tuple[nn.Linear, nn.Module]:
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    activation = getattr(nn, about["activation_function"].rpartition(".")[2], None)
    if about.get("use_residual") or not weights.exists() or activation is None:
        raise ValueError(
            f"{folder}: found {about['activation_function']}, {sorted(path.name for path in folder.iterdir())}, expected a "
            "dense layer with an activation of torch.nn, no residual, and weights in model.safetensors; save it so"
        )
    linear = nn.Linear(about["in_features"], about["out_features"], bias=about.get("bias", True))
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in load_file(weights).items()})
    return linear, activation()


def _write_dense(folder: Path, linear: nn.Linear, activation: nn.Module) -> str:
    about = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{type(activation).__module__}.{type(activation).__qualname__}",
    }
    path = _write_json(folder / "config.json", about)
    weights = {
        f"linear.{name}": tensor.detach().cpu().contiguous() for name, tensor in linear.named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    return path


def _write_json(path: Path, value: Any) -> str:
    """Write a file, and name the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path.parent.name


def _sequential(layers: Layers) -> nn.Sequential | None:
    return nn.Sequential(*(module for pair in layers for module in pair)) if layers else None


def _layers(dense: nn.Module | None) -> Iterator[tuple[nn.Linear, nn.Module]]:
    modules = list(dense.children()) if dense is not None else []
    for linear, activation in zip(modules[::2], modules[1::2], strict=True):
        if isinstance(linear, nn.Linear):
            yield linear, activation


def _drop_out(encoder: nn.Module, probability: float) -> None:
    """Attention reads its probability at each call; the layers have theirs in modules."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability  # type: ignore[assignment]


# --- what of it is trained -----------------------------------------------------------------------------------------------

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")


def layer_of(name: str, layers: int) -> int:
    """Depth of an encoder parameter: 0 for embeddings, 1 to `layers` for the layers, `layers` for what comes after."""
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if "embed" in name else layers


def layers_of(encoder: nn.Module) -> int:
    """How many layers an encoder has."""
    numbers = [int(found[1]) for name, _ in encoder.named_parameters() if (found := _LAYER.search(name))]
    return max(numbers, default=-1) + 1


def _adapt(encoder: Any, tokenizer: Any, model: Model) -> Any:
    """Freeze what the adaptation leaves alone, and add what it adds, in place; returns the tokenizer to use."""
    match model.adaptation:
        case Full(freeze=freeze):
            _freeze(encoder, freeze, model.base)
        case LayerNorm(biases=biases):
            _layer_norms_only(encoder, biases=biases, base=model.base)
        case Lora() as lora:
            _add_lora(encoder, lora, model.base)
        case Prompt() as prompt:
            return _add_prompt(encoder, tokenizer, prompt, model)
    return tokenizer


def _freeze(encoder: nn.Module, freeze: int, base: str) -> None:
    layers = layers_of(encoder)
    if freeze > layers:
        raise ValueError(
            f"model.adaptation.freeze: found {freeze}, but {base} has {layers} layers; take at most {layers}"
        )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not freeze or layer_of(name, layers + 1) > freeze)


def _layer_norms_only(encoder: nn.Module, *, biases: bool, base: str) -> None:
    norms = [
        name
        for name, module in encoder.named_modules()
        if re.search(r"(Layer|RMS)Norm$", type(module).__name__)
    ]
    if not norms:
        raise ValueError(f"model.adaptation: found no layer norms in {base}, expected some; take kind 'full'")
    for name, parameter in encoder.named_parameters():
        of_norm = name.rpartition(".")[0] in norms
        parameter.requires_grad_(of_norm or (biases and name.endswith(".bias")))


def _peft(kind: str) -> ModuleType:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"model.adaptation: found kind {kind!r} but no module peft, expected the 'train' extra; "
            "pip install 'chorus-nlu[train]', or take kind 'layernorm' or 'full'"
        ) from error


def _add_lora(encoder: nn.Module, lora: Lora, base: str) -> None:
    peft = _peft("lora")
    modules = [name.rpartition(".")[2] for name, _ in encoder.named_modules()]
    missing = [target for target in lora.targets if target not in modules]
    if missing:
        raise ValueError(
            f"model.adaptation.targets: found {', '.join(missing)}, which {base} does not have, expected some of "
            f"{', '.join(sorted({name for name in modules if name and not name.isdigit()}))}; change the targets"
        )
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    peft.inject_adapter_in_model(config, encoder)  # freezes the rest


class _Prompted(nn.Module):
    """Word embeddings in which the ids from `first` on are the prompt's: `prompt` makes them, and it alone is trained."""

    def __init__(self, words: nn.Embedding, prompt: nn.Module, *, first: int, tokens: int) -> None:
        super().__init__()
        self.words, self.prompt, self.first, self.tokens = words, prompt, first, tokens

    def rows(self) -> Tensor:
        """[tokens, hidden] of the prompt."""
        rows: Tensor = self.prompt(torch.arange(self.tokens, device=self.words.weight.device))
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, tokens] to [batch, tokens, hidden]."""
        ours = ids - self.first
        words = self.words(ids.clamp(max=self.first - 1))
        return torch.where((ours >= 0)[..., None], self.rows()[ours.clamp(min=0)].to(words.dtype), words)


def _add_prompt(encoder: Any, tokenizer: Any, prompt: Prompt, model: Model) -> Any:
    """Prompt vectors as words of their own that the tokenizer puts before every phrase.

    Virtual tokens that only peft knows could not be exported; words of the vocabulary are exported like any others.
    """
    peft = _peft("prompt")
    words = encoder.get_input_embeddings()
    options = {
        "num_virtual_tokens": prompt.tokens,
        "token_dim": words.embedding_dim,
        "num_transformer_submodules": 1,
    }
    if prompt.method == "p_tuning":
        made = peft.PromptEncoder(peft.PromptEncoderConfig(encoder_hidden_size=prompt.hidden, **options))
    else:
        made = peft.PromptEmbedding(peft.PromptTuningConfig(**options), words)
        # Its draw has a standard deviation of 1, far from any word's vector; start as words do.
        nn.init.normal_(made.embedding.weight, std=float(words.weight.std()))
    if model.max_tokens < prompt.tokens + 8:
        raise ValueError(
            f"model.max_tokens: found {model.max_tokens}, expected at least {prompt.tokens + 8}: the prompt takes "
            f"{prompt.tokens} and a phrase needs some too; raise it"
        )
    encoder.requires_grad_(False)
    first = tokenizer.backend_tokenizer.get_vocab_size()
    encoder.set_input_embeddings(_Prompted(words, made, first=first, tokens=prompt.tokens))
    return _with_prompt(tokenizer, prompt.tokens)


def _with_prompt(tokenizer: Any, tokens: int) -> Any:
    """A tokenizer that puts `tokens` new special tokens before every phrase."""
    backend = tokenizer.backend_tokenizer
    template = json.loads(backend.to_str())["post_processor"] or {}
    if template.get("type") != "TemplateProcessing":
        raise ValueError(
            f"model.adaptation: found a tokenizer with {template.get('type')}, expected TemplateProcessing; "
            "a prompt cannot be put before its phrases, take kind 'lora'"
        )
    there = sum(name.startswith("[PROMPT") for name in backend.get_vocab())  # of an earlier run
    names = [f"[PROMPT{there + i}]" for i in range(tokens)]
    backend.add_special_tokens(names)
    ids = [backend.token_to_id(name) for name in names]
    pieces = [piece for part in template["single"] for piece in part.values()]
    special = {name: about["ids"][0] for name, about in template["special_tokens"].items()}
    single = " ".join([*names, *("$A" if piece["id"] == "A" else piece["id"] for piece in pieces)])
    backend.post_processor = TemplateProcessing(
        single=single, special_tokens=[*special.items(), *zip(names, ids, strict=True)]
    )
    # Of no model's own class: those rebuild their template when they are loaded, and forget the prompt.
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )


def _merged(encoder: Any) -> Any:
    """An ordinary encoder that computes the same: low-rank updates added to weights, prompt rows to the vocabulary."""
    words = encoder.get_input_embeddings()
    layers = [module for module in encoder.modules() if hasattr(module, "get_base_layer")]
    if not layers and not isinstance(words, _Prompted):
        return encoder
    encoder = copy.deepcopy(encoder)
    words = encoder.get_input_embeddings()
    if isinstance(words, _Prompted):
        rows = torch.cat([words.words.weight[: words.first], words.rows()]).detach()
        plain = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=words.words.padding_idx)  # type: ignore[no-untyped-call]
        encoder.set_input_embeddings(plain)
        encoder.config.vocab_size = len(rows)
    for name, module in list(encoder.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, module.get_base_layer())
    return encoder
