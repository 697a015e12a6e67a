"""Eight bits as they will be served."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
from torch import nn

from nlu.training.rounding import round_inputs, round_weights, rounded, steps_of_words

pytestmark = pytest.mark.train


def test_rounding_weights_have_the_scale_of_their_row() -> None:
    weights = torch.tensor([[1.27, 0.004, -0.006], [0.0, 0.0, 0.0], [12.7, 0.04, -0.06]])
    by_row = round_weights(weights, by_row=True)
    # A row's step is its largest entry / 127: 0.01, nothing to tell apart, 0.1.
    assert torch.allclose(
        by_row, torch.tensor([[1.27, 0.0, -0.01], [0.0, 0.0, 0.0], [12.7, 0.0, -0.1]]), atol=1e-6
    )
    assert torch.allclose(round_weights(weights, by_row=False)[0], torch.tensor([1.3, 0.0, 0.0]), atol=1e-6)


def test_rounding_inputs_have_the_range_of_their_phrase() -> None:
    phrases = torch.tensor([[[0.0, 2.55]], [[-1.0, 1.55]], [[1.0, 0.0136]]])
    # 256 steps of 0.01, of 0.01 with zero at step 100, and of 1/255 from zero although nothing is below 0.0136.
    wanted = torch.tensor([[[0.0, 2.55]], [[-1.0, 1.55]], [[1.0, 3 / 255]]])
    assert torch.allclose(round_inputs(phrases), wanted, atol=1e-6)
    alone = round_inputs(phrases[2:])
    assert torch.equal(alone[0], round_inputs(phrases)[2])  # whoever else is in the batch


def test_rounding_words_have_a_scale_for_each_block() -> None:
    words = torch.zeros(2, 64)
    words[0, :3] = torch.tensor([7.0, 1.4, -0.6])  # steps of 1
    words[0, 32:35] = torch.tensor([0.7, 0.26, -0.64])  # steps of 0.1
    steps, scales = steps_of_words(words)
    assert scales.shape == (2, 2) and scales.dtype == torch.float16
    assert scales[0].tolist() == pytest.approx([1.0, 0.1], rel=1e-3)
    assert steps[0, :3].tolist() == [7, 1, -1] and steps[0, 32:35].tolist() == [7, 3, -6]
    assert not steps[1].any()
    embedding = nn.Embedding.from_pretrained(words)  # type: ignore[no-untyped-call]
    with rounded(nn.Sequential(embedding), words=embedding):
        found = embedding(torch.tensor([0]))[0]
    assert torch.allclose(found[32:35], torch.tensor([0.7, 0.3, -0.6]), atol=1e-3)


def test_rounding_lets_gradients_pass_as_they_are() -> None:
    weights = torch.randn(3, 5, requires_grad=True)
    direction = torch.randn(3, 5)
    (round_weights(weights, by_row=True) * direction).sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    assert torch.equal(weights.grad, direction)


def test_rounding_ends_with_its_context_and_leaves_the_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ids = torch.tensor([[1, 2, 3]])
    exact = network(ids)
    with rounded(network):
        inside = network(ids)
    assert not torch.equal(inside, exact) and torch.allclose(inside, exact, atol=0.05)
    assert torch.equal(network(ids), exact)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with rounded(network, on=False):
        assert torch.equal(network(ids), exact)
