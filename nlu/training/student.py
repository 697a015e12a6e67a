"""A student cut out of its teacher: some of its layers, their busiest neurons, the words that occur, and fewer dimensions.

    teacher -> layers -> neurons -> vocabulary -> a compressing layer of the teacher's principal components

What is left computes nearly nothing like the teacher yet, but it starts from its weights and speaks its space.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nlu.training.network import Network, layers_of, principal_components

BATCH = 64


@torch.no_grad()
def cut(
    teacher: Network,
    phrases: Sequence[str],
    vectors: Tensor,
    *,
    layers: Sequence[int],
    neurons: int = 0,
    vocabulary: int = 0,
    dim: int = 0,
    max_tokens: int = 64,
) -> Network:
    """A smaller network out of a BERT-like teacher, which stays as it is.

    `layers` are the teacher's to keep, from 0; of each, the `neurons` of its feed-forward part that write most (0: all).
    `vocabulary` counts words and pieces (0: all), the most frequent in `phrases` beside every single character. `dim` is
    that of a compressing layer (0: none), set to the principal components of `vectors` [phrases, teacher.dim]. Raises
    ValueError for more of anything than the teacher has.
    """
    encoder = copy.deepcopy(teacher.graph.encoder)
    _keep_layers(encoder, layers)
    tokenizer = copy.deepcopy(teacher.tokenizer)
    if vocabulary:
        tokenizer = _keep_words(encoder, tokenizer, phrases, vocabulary)
    if neurons:
        _keep_neurons(encoder, tokenizer, phrases, neurons, max_tokens)
    dense = list(copy.deepcopy(teacher.graph.dense).children()) if teacher.graph.dense is not None else []
    if dim:
        linear = nn.Linear(teacher.dim, dim, bias=False)
        linear.weight.copy_(principal_components(vectors, dim)[0])
        dense += [linear, nn.Identity()]
    return Network(
        encoder,
        tokenizer,
        pooling=teacher.pooling,
        dense=nn.Sequential(*dense) if dense else None,
        max_tokens=max_tokens,
    )


# --- layers


def _keep_layers(encoder: Any, layers: Sequence[int]) -> None:
    found = layers_of(encoder)
    stack = getattr(getattr(encoder, "encoder", None), "layer", None)
    if stack is None:
        raise ValueError(
            f"distill.teacher: found a {type(encoder).__name__}, expected an encoder with encoder.layer as BERT has; "
            "take another teacher"
        )
    if not layers or sorted(set(layers)) != list(layers) or layers[-1] >= found:
        raise ValueError(
            f"distill.layers: found {list(layers)}, expected rising numbers from 0 to {found - 1}; choose among those"
        )
    encoder.encoder.layer = nn.ModuleList(stack[i] for i in layers)
    encoder.config.num_hidden_layers = len(layers)


# --- neurons


def _keep_neurons(encoder: Any, tokenizer: Any, phrases: Sequence[str], count: int, max_tokens: int) -> None:
    """Narrow every feed-forward part to the neurons whose mean output, times the length of what they write, is largest."""
    found = int(encoder.config.intermediate_size)
    if count > found:
        raise ValueError(
            f"distill.neurons: found {count}, but the teacher has {found} a layer; take at most that"
        )
    activity: list[Tensor] = [torch.zeros(found) for _ in encoder.encoder.layer]
    hooks = [
        # Of the whole part, not of its linear layer: what matters is behind the activation function.
        layer.intermediate.register_forward_hook(
            lambda _m, _i, out, i=i: activity[i].add_(out.abs().sum((0, 1)))
        )
        for i, layer in enumerate(encoder.encoder.layer)
    ]
    encoder.eval()
    for batch in _batches(phrases):
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    for hook in hooks:
        hook.remove()
    for layer, active in zip(encoder.encoder.layer, activity, strict=True):
        written = layer.output.dense.weight.norm(dim=0)  # [neurons]
        kept = (active * written).topk(count).indices.sort().values
        layer.intermediate.dense = _linear(
            layer.intermediate.dense.weight[kept], layer.intermediate.dense.bias[kept]
        )
        layer.output.dense = _linear(layer.output.dense.weight[:, kept], layer.output.dense.bias)
    encoder.config.intermediate_size = count


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


# --- words


def _keep_words(encoder: Any, tokenizer: Any, phrases: Sequence[str], count: int) -> Any:
    """A tokenizer of `count` words and pieces, and word vectors to match.

    Single characters are kept where any phrase has them, and all of ASCII: words whose own entry is gone are then spelt
    out of pieces, as WordPiece does with words it never had, and nothing that was readable becomes unknown.
    """
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    model = about["model"]
    if model.get("type") != "WordPiece":
        raise ValueError(
            f"distill.vocabulary: found a {model.get('type')} tokenizer, expected WordPiece; set it to 0 to keep all"
        )
    words: dict[str, int] = model["vocab"]
    if count > len(words):
        raise ValueError(
            f"distill.vocabulary: found {count}, but the teacher has {len(words)}; take at most that"
        )
    prefix: str = model["continuing_subword_prefix"]
    said = {character for phrase in phrases for character in phrase} | {chr(i) for i in range(33, 127)}
    special = {each["content"] for each in about["added_tokens"]}
    needed = [word for word in words if word in special or word.removeprefix(prefix) in said]
    counts: Counter[int] = Counter()
    for batch in _batches(phrases, 1000):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            counts.update(ids)
    by_count = sorted(words, key=lambda word: (-counts[words[word]], words[word]))
    kept = dict.fromkeys([*needed, *by_count])
    if len(needed) > count:
        raise ValueError(
            f"distill.vocabulary: found {count}, but single characters alone take {len(needed)}; raise it, or name the "
            "scripts of the phrases in distill.scripts"
        )
    names = sorted(list(kept)[:count], key=words.__getitem__)
    model["vocab"] = {word: i for i, word in enumerate(names)}
    for added in about["added_tokens"]:
        added["id"] = model["vocab"][added["content"]]
    processor = about.get("post_processor") or {}
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [model["vocab"][name] for name in token["tokens"]]
    rows = torch.tensor([words[word] for word in names])
    table = encoder.get_input_embeddings().weight[rows]
    padding = model["vocab"][tokenizer.pad_token]
    encoder.set_input_embeddings(
        nn.Embedding.from_pretrained(table, freeze=False, padding_idx=padding)  # type: ignore[no-untyped-call]
    )
    encoder.config.vocab_size = len(names)
    encoder.config.pad_token_id = padding
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(about))
    # Of no model's own class: those rebuild parts of the tokenizer from a vocabulary file when they are loaded.
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )


def _batches(phrases: Sequence[str], size: int = BATCH) -> Iterator[list[str]]:
    for start in range(0, len(phrases), size):
        yield list(phrases[start : start + size])
