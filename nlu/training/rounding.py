"""Training that knows it will be served in int8: layers compute with numbers rounded as the exported graph will round them.

What ONNX Runtime's dynamic quantization does is done here to floats: weights to 8 bits by output channel, embeddings by
one scale for the table, what enters a layer to 8 bits between its least and its greatest value (Jacob et al. 2018). Word
vectors may have 4 bits, by a scale for each 32 of their components.
Gradients pass as if nothing had been rounded (Bengio et al. 2013).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHT_STEPS = 127  # either side of zero
INPUT_STEPS = 255
WORD_STEPS = 7  # either side of zero, where word vectors have 4 bits
WORD_BLOCK = 32  # components that share a scale


@contextmanager
def rounded(network: nn.Module, *, on: bool = True, words: nn.Module | None = None) -> Iterator[None]:
    """Inside, every linear layer and embedding of a network computes in eight bits, the embedding `words` in four.

    Weights themselves stay as they are.
    """
    changed: list[nn.Module] = []
    for module in network.modules() if on else ():
        if isinstance(module, nn.Linear):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding) and module is words:
            module.forward = partial(_words, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_embedding, module)  # type: ignore[method-assign]
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # what the class does is visible again


def round_weights(weights: Tensor, *, by_row: bool) -> Tensor:
    """[rows, columns], each a multiple of its row's (or the table's) scale, at most 127 of them from zero."""
    with torch.no_grad():
        largest = weights.abs().amax(dim=1, keepdim=True) if by_row else weights.abs().amax()
        scale = (largest / WEIGHT_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        off = (weights / scale).round() * scale - weights
    return weights + off


def steps_of_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """Of word vectors [..., width] the steps [..., width] int8, and scales [..., width / WORD_BLOCK] float16."""
    blocks = words.reshape(*words.shape[:-1], -1, WORD_BLOCK)
    least = torch.finfo(torch.float16).smallest_normal
    scale = (blocks.abs().amax(dim=-1) / WORD_STEPS).clamp(min=least).to(torch.float16)
    steps = (blocks / scale[..., None].to(words.dtype)).round().clamp(-WORD_STEPS, WORD_STEPS)
    return steps.flatten(-2).to(torch.int8), scale


def round_inputs(inputs: Tensor) -> Tensor:
    """[batch, ..., width]: each phrase in 256 steps from its least value to its greatest, zero among them."""
    with torch.no_grad():
        exact = inputs.float()
        inner = tuple(range(1, inputs.ndim))
        least = exact.amin(dim=inner, keepdim=True).clamp(max=0.0)
        greatest = exact.amax(dim=inner, keepdim=True).clamp(min=0.0)
        scale = ((greatest - least) / INPUT_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-least / scale).round()
        steps = ((exact / scale).round() + zero).clamp(0, INPUT_STEPS)
        off = (steps - zero) * scale - exact
    return inputs + off.to(inputs.dtype)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return functional.linear(round_inputs(inputs), round_weights(layer.weight, by_row=True), layer.bias)


def _words(layer: nn.Embedding, ids: Tensor) -> Tensor:
    found = functional.embedding(ids, layer.weight, layer.padding_idx)
    with torch.no_grad():
        steps, scale = steps_of_words(found)
        exact = steps.to(found.dtype).reshape(*scale.shape, WORD_BLOCK) * scale[..., None].to(found.dtype)
        off = exact.flatten(-2) - found
    return found + off


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return functional.embedding(ids, round_weights(layer.weight, by_row=False), layer.padding_idx)
