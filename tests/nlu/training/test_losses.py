"""Losses against loops anyone can read, ranks against one process, cached gradients against plain ones."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

pytest.importorskip("torch", reason="needs the train extra: pip install 'chorus-nlu[train]'")

import torch
from torch import Tensor, nn

from nlu.training import losses
from nlu.training.datasets import identity
from nlu.training.distributed import Alone, World
from nlu.training.losses import (
    RECIPES,
    Outcome,
    UncertaintyWeights,
    binary_cross_entropy,
    cached_backward,
    cross_entropy,
    full_batch_loss,
    make_loss,
    pair_groups,
    supervised_contrastive,
    text_ids,
)

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore"),  # what importing sentence-transformers warns of
]

ALONE = Alone()
SCALE = 7.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64, so that a loop and a matrix product agree to the last digits."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distinct(rows: int) -> Tensor:
    """Groups of one."""
    return torch.arange(rows)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def contrasted(vectors: Sequence[Tensor], groups: Tensor) -> Outcome:
    anchors, candidates = vectors
    return full_batch_loss(anchors, candidates, groups, world=ALONE)


def naive_full_batch(anchors: Tensor, candidates: Tensor, groups: Tensor) -> tuple[float, list[int]]:
    """The definition, one logit at a time."""
    total, negatives = 0.0, []
    for i, anchor in enumerate(anchors):
        own = SCALE * cosine(anchor, candidates[i])
        others = []
        for j, candidate in enumerate(candidates):
            ours, theirs = set(groups[i].tolist()), set(groups[j].tolist())
            if j != i and not {each for each in ours & theirs if each >= 0}:
                others.append(SCALE * cosine(anchor, candidate))
        total += math.log(math.exp(own) + sum(math.exp(other) for other in others)) - own
        negatives.append(len(others))
    return total / len(anchors), negatives


GROUPS = {
    "distinct": distinct(6)[:, None],
    "one-id": torch.tensor([[0], [1], [0], [2], [1], [0]]),
    "two-ids": torch.tensor([[0, 9], [1, 9], [2, 8], [3, 7], [0, 6], [4, 8]]),
    "unlabelled": torch.tensor([[0, -1], [1, -1], [2, -1], [0, 5], [3, 5], [4, -1]]),
    "all-one": torch.zeros(6, 1, dtype=torch.int64),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_losses_full_batch_is_the_loop(groups: Tensor) -> None:
    anchors, candidates = normal(6, 5), normal(6, 5, seed=1)
    expected, negatives = naive_full_batch(anchors, candidates, groups)
    outcome = full_batch_loss(anchors, candidates, groups, world=ALONE, scale=SCALE)
    assert outcome.loss.item() == pytest.approx(expected, abs=1e-12)
    assert outcome.negatives is not None
    assert outcome.negatives.tolist() == negatives


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_losses_symmetric_is_the_mean_of_both_directions(groups: Tensor) -> None:
    anchors, candidates = normal(6, 5), normal(6, 5, seed=1)
    there, _ = naive_full_batch(anchors, candidates, groups)
    back, _ = naive_full_batch(candidates, anchors, groups)
    outcome = full_batch_loss(anchors, candidates, groups, world=ALONE, scale=SCALE, symmetric=True)
    assert outcome.loss.item() == pytest.approx((there + back) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("anchors", "candidates", "groups", "negatives"),
    [
        (["a", "b", "c"], ["x", "y", "z"], None, [2, 2, 2]),
        (["a", "a", "c"], ["x", "y", "z"], None, [1, 1, 2]),  # one anchor, two right answers
        (["a", "b", "c"], ["x", "x", "z"], None, [1, 1, 2]),  # one candidate twice
        (["a", "b", "c"], ["x", "a", "z"], None, [1, 1, 2]),  # an anchor is another's candidate
        (["a", "b", "c"], ["x", "y", "z"], [7, 7, 8], [1, 1, 2]),
        (["a", "b", "c"], ["x", "y", "z"], [identity("c"), 7, 8], [1, 2, 1]),  # groups are named by texts
        (["a", "b", "c"], ["x", "y", "z"], [-1, -1, 7], [2, 2, 2]),
    ],
    ids=["distinct", "anchor", "candidate", "crosswise", "group", "group-of-text", "no-group"],
)
def test_losses_what_belongs_together_is_no_negative(
    anchors: list[str], candidates: list[str], groups: list[int] | None, negatives: list[int]
) -> None:
    outcome = full_batch_loss(
        normal(3, 4), normal(3, 4, seed=1), pair_groups(anchors, candidates, groups), world=ALONE
    )
    assert outcome.negatives is not None
    assert outcome.negatives.tolist() == negatives


def test_losses_a_masked_candidate_moves_nothing() -> None:
    anchors, candidates = normal(3, 4), normal(3, 4, seed=1).requires_grad_()
    groups = torch.tensor([0, 0, 1])
    first = full_batch_loss(anchors[:1], candidates[:1], groups[:1], world=ALONE)
    assert first.loss.item() == 0.0  # nothing to tell it from
    together = full_batch_loss(anchors, candidates, groups, world=ALONE)
    apart = full_batch_loss(anchors, candidates, distinct(3), world=ALONE)
    (masked,) = torch.autograd.grad(together.loss, candidates)
    (unmasked,) = torch.autograd.grad(apart.loss, candidates)
    assert not torch.allclose(masked, unmasked)


def test_losses_text_ids_are_of_the_text_alone() -> None:
    ids = text_ids(["привет", "hello", "привет", ""])
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3
    assert (ids >= 0).all()
    assert ids[1] == identity("hello")


def test_losses_full_batch_needs_a_group_for_each_pair() -> None:
    with pytest.raises(ValueError, match="found 3 anchors, 2 candidates and 3 groups"):
        full_batch_loss(normal(3, 4), normal(2, 4), distinct(3), world=ALONE)


def test_losses_sixteen_bit_vectors_are_compared_in_float32() -> None:
    anchors, candidates = normal(4, 8).bfloat16(), normal(4, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = full_batch_loss(anchors, candidates, distinct(4), world=ALONE)
    exact = full_batch_loss(anchors.double(), candidates.double(), distinct(4), world=ALONE)
    assert low.loss.dtype is torch.float32
    assert low.loss.item() == pytest.approx(exact.loss.item(), abs=1e-5)


def naive_supervised(vectors: Tensor, labels: list[int], texts: list[int]) -> tuple[float, list[int]]:
    """Khosla et al. 2020, equation 2, one pair at a time."""
    losses, negatives = [], []
    for i, anchor in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i and texts[j] != texts[i]]
        positives = [j for j in others if labels[j] == labels[i] >= 0]
        negatives.append(len(others) - len(positives))
        if not positives:
            continue
        whole = sum(math.exp(SCALE * cosine(anchor, vectors[j])) for j in others)
        terms = [math.log(whole) - SCALE * cosine(anchor, vectors[j]) for j in positives]
        losses.append(sum(terms) / len(terms))
    return sum(losses) / max(len(losses), 1), negatives


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]),
        ([0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]),  # one without a positive
        ([0, 0, -1, -1, 2, 2], [0, 1, 2, 3, 4, 5]),  # out of scope is no class
        ([0, 0, 0, 1, 1, 2], [0, 0, 2, 3, 3, 5]),  # said twice
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),  # nothing to learn
        ([0, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3]),  # nothing to compare
    ],
    ids=["pairs", "single", "unlabelled", "duplicates", "no-positive", "one-text"],
)
def test_losses_supervised_contrastive_is_the_loop(labels: list[int], texts: list[int]) -> None:
    vectors = normal(6, 5).requires_grad_()
    expected, negatives = naive_supervised(vectors.detach(), labels, texts)
    outcome = supervised_contrastive(
        vectors, torch.tensor(labels), torch.tensor(texts), world=ALONE, scale=SCALE
    )
    assert outcome.loss.item() == pytest.approx(expected, abs=1e-12)
    assert outcome.negatives is not None
    assert outcome.negatives.tolist() == negatives
    (gradient,) = torch.autograd.grad(outcome.loss, vectors)
    assert gradient.isfinite().all()


def test_losses_cross_entropy_is_the_loop() -> None:
    logits, targets = normal(3, 4, 5), torch.tensor([[1, 2, -100, -100], [0, -100, -100, -100], [4, 4, 3, 0]])
    terms = [
        -math.log(math.exp(row[target]) / sum(math.exp(each) for each in row))
        for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
        if target != -100
    ]
    outcome = cross_entropy(logits, targets, world=ALONE)
    assert outcome.loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    assert outcome.negatives is None


def test_losses_cross_entropy_of_nothing_is_nothing() -> None:
    logits = normal(2, 3).requires_grad_()
    outcome = cross_entropy(logits, torch.full((2,), -100), world=ALONE)
    (gradient,) = torch.autograd.grad(outcome.loss, logits)
    assert outcome.loss.item() == 0.0
    assert (gradient == 0).all()


def test_losses_binary_cross_entropy_is_the_loop() -> None:
    logits, targets = normal(2, 3), torch.tensor([[1.0, 0.0, -1.0], [0.5, -1.0, -1.0]], dtype=torch.float64)
    terms = [
        -target * math.log(1 / (1 + math.exp(-logit))) - (1 - target) * math.log(1 / (1 + math.exp(logit)))
        for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
        if target >= 0
    ]
    outcome = binary_cross_entropy(logits, targets, world=ALONE)
    assert outcome.loss.item() == pytest.approx(sum(terms) / 3, abs=1e-12)


# --- ranks ------------------------------------------------------------------------------------------------------------


@dataclass
class Meeting:
    """Where the threads that play ranks leave their tensors for each other."""

    size: int
    slots: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [torch.empty(0)] * self.size
        self.barrier = threading.Barrier(self.size, timeout=30)


class Thread(Alone):
    """A rank that is a thread: gathered tensors share one graph, so autograd itself gives the exact gradients."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "size", meeting.size)
        object.__setattr__(self, "meeting", meeting)

    meeting: Meeting

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        self.meeting.slots[self.rank] = tensor
        self.meeting.barrier.wait()
        gathered = torch.cat(self.meeting.slots)
        self.meeting.barrier.wait()
        return gathered

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.all_gather_with_grad(tensor).detach()


def on_ranks(size: int, loss: Callable[[int, World], Outcome]) -> list[Outcome]:
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: loss(rank, Thread(rank, meeting)), range(size)))


def fed(name: str) -> tuple[list[Tensor], Tensor]:
    """What a loss eats: eight rows of it."""
    recipe = RECIPES[name]
    columns = {
        "pairs": [normal(8, 5), normal(8, 5, seed=1)],
        "rows": [normal(8, 5)],
        "logits": [normal(8, 3, 4)] if name.startswith("token") else [normal(8, 4)],
    }[recipe.columns]
    targets = {
        "groups": torch.tensor([[0, -1], [1, 20], [2, 21], [3, -1], [0, -1], [5, 21], [6, 20], [7, -1]]),
        "labels": torch.tensor([0, 1, 2, 2, 0, 1, -1, 0]),
        "scores": torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]) if name == "contrastive" else normal(8).sigmoid(),
        "classes": torch.tensor([0, 1, 2, 3, 0, -100, -100, 1]),
        "probabilities": (normal(8, 4, seed=2).sign() / 2 + 0.5).index_fill(0, torch.tensor([5, 6]), -1.0),
    }[recipe.targets]
    if name.startswith("token"):
        targets = torch.tensor([[0, 1, 2], [3, -100, -100]] * 2 + [[-100, -100, 1]] * 4)
    return columns, targets


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_losses_ranks_average_to_one_process(name: str, size: int) -> None:
    loss = make_loss(name)
    columns, targets = fed(name)
    for column in columns:
        column.requires_grad_()
    whole = loss(columns, targets, world=ALONE)
    expected = torch.autograd.grad(whole.loss, columns)
    share = len(targets) // size

    def mine(rank: int, world: World) -> Outcome:
        rows = slice(rank * share, (rank + 1) * share)
        return loss([column[rows] for column in columns], targets[rows], world=world)

    parts = on_ranks(size, mine)
    mean = torch.stack([part.loss for part in parts]).mean()
    assert mean.item() == pytest.approx(whole.loss.item(), abs=1e-7)  # sentence-transformers drops to float32
    for gradient, ours in zip(torch.autograd.grad(mean, columns), expected, strict=True):
        torch.testing.assert_close(gradient, ours, atol=1e-7, rtol=0)
        assert gradient.abs().max() > 0
    if whole.negatives is not None:
        seen = torch.cat([part.negatives for part in parts if part.negatives is not None])
        assert seen.tolist() == whole.negatives.tolist()


def test_losses_ranks_without_gathered_gradients_do_not() -> None:
    anchors, candidates = normal(8, 5).requires_grad_(), normal(8, 5, seed=1).requires_grad_()
    whole = full_batch_loss(anchors, candidates, distinct(8), world=ALONE)

    class Deaf(Thread):
        def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
            everybody = list(super().all_gather_with_grad(tensor).detach().tensor_split(self.size))
            everybody[self.rank] = tensor
            return torch.cat(everybody)

    meeting = Meeting(2)

    def mine(rank: int) -> Outcome:
        rows = slice(4 * rank, 4 * rank + 4)
        return full_batch_loss(anchors[rows], candidates[rows], distinct(8)[rows], world=Deaf(rank, meeting))

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(mine, range(2)))
    mean = torch.stack([part.loss for part in parts]).mean()
    assert mean.item() == pytest.approx(whole.loss.item())  # the loss does not tell
    (gradient,) = torch.autograd.grad(mean, candidates)
    (expected,) = torch.autograd.grad(whole.loss, candidates)
    assert (gradient - expected).abs().max() > 1e-3


# --- caching ----------------------------------------------------------------------------------------------------------


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.Dropout(dropout),
        nn.Linear(16, 5),
    ).double()


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


CHUNKS = {
    "even": ([4, 4], [4, 4]),
    "uneven": ([3, 3, 2], [1, 7]),
    "whole": ([8], [8]),
    "single": ([1] * 8, [8]),
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("name", ["full_batch", "supervised_contrastive"])
def test_losses_cached_gradients_are_the_plain_ones(
    name: str, sizes: tuple[Sequence[int], ...], dropout: float
) -> None:
    loss = make_loss(name)
    _, targets = fed(name)
    columns = [
        torch.split(normal(8, 6, seed=seed), list(each))
        for seed, each in enumerate(sizes[: 2 if name == "full_batch" else 1])
    ]
    plain, cached = network(dropout), network(dropout)

    torch.manual_seed(1)
    expected = loss(
        [torch.cat([plain(chunk) for chunk in chunks]) for chunks in columns], targets, world=ALONE
    )
    after = torch.get_rng_state()
    expected.loss.backward()  # type: ignore[no-untyped-call]

    torch.manual_seed(1)
    outcome = cached_backward(cached, columns, lambda vectors: loss(vectors, targets, world=ALONE))

    assert outcome.loss.item() == expected.loss.item()
    assert not outcome.loss.requires_grad
    assert torch.equal(
        torch.get_rng_state(), after
    )  # what is drawn next does not know that there was a cache
    for ours, theirs in zip(gradients(cached), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_losses_cached_without_replay_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, groups = [torch.split(normal(8, 6, seed=seed), 4) for seed in range(2)], distinct(8)
    plain, cached = network(0.4), network(0.4)
    torch.manual_seed(1)
    vectors = [torch.cat([plain(chunk) for chunk in chunks]) for chunks in columns]
    contrasted(vectors, groups).loss.backward()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(losses._Replay, "__enter__", lambda self: None)
    monkeypatch.setattr(losses._Replay, "__exit__", lambda self, *raised: None)
    torch.manual_seed(1)
    cached_backward(cached, columns, lambda each: contrasted(each, groups))
    assert (gradients(cached)[0] - gradients(plain)[0]).abs().max() > 1e-3


def test_losses_cached_adds_to_gradients_and_reaches_task_weights() -> None:
    columns, groups = [torch.split(normal(8, 6, seed=seed), 3) for seed in range(2)], distinct(8)
    encoder, weights = network(), UncertaintyWeights(["chat", "intent"])

    def weighted(vectors: Sequence[Tensor]) -> Outcome:
        outcome = contrasted(vectors, groups)
        return Outcome(weights("intent", outcome.loss), outcome.negatives)

    cached_backward(encoder, columns, weighted)
    once = [gradient.clone() for gradient in gradients(encoder)]
    cached_backward(encoder, columns, weighted)
    for twice, first in zip(gradients(encoder), once, strict=True):
        torch.testing.assert_close(twice, 2 * first)
    untouched, touched = weights.log_variances
    assert untouched.grad is None
    assert touched.grad is not None


def test_losses_cached_keeps_one_chunk_of_activations() -> None:
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        """Counts the graphs that hold on to their inputs."""

        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor) -> Tensor:
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return rows @ weight

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *wanted: Tensor) -> tuple[None, Tensor]:
            nonlocal alive
            alive -= 1
            return None, torch.zeros(6, 5, dtype=torch.float64)

    weight = nn.Parameter(normal(6, 5))

    def encode(rows: Tensor) -> Tensor:
        nonlocal alive
        vectors: Tensor = Counted.apply(rows, weight)  # type: ignore[no-untyped-call]
        if not torch.is_grad_enabled():
            alive -= 1  # no graph is kept
        return vectors

    columns = [torch.split(normal(8, 6, seed=seed), 2) for seed in range(2)]
    cached_backward(encode, columns, lambda each: contrasted(each, distinct(8)))
    assert (alive, most) == (0, 1)


def test_losses_cached_leaves_a_frozen_encoder_alone() -> None:
    encoder = network().requires_grad_(False)
    columns = [torch.split(normal(8, 6, seed=seed), 4) for seed in range(2)]
    outcome = cached_backward(encoder, columns, lambda each: contrasted(each, distinct(8)))
    assert outcome.loss.item() > 0
    assert not gradients(encoder)


# --- by name, by weight -----------------------------------------------------------------------------------------------


def test_losses_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="found loss 'triplet', expected one of full_batch, "):
        make_loss("triplet")
    with pytest.raises(ValueError, match="temperature"):
        make_loss("full_batch", temperature=0.05)


def test_losses_options_reach_the_loss() -> None:
    columns, targets = fed("full_batch")
    sharp = make_loss("full_batch", scale=SCALE, symmetric=True)(columns, targets, world=ALONE)
    anchors, candidates = columns
    expected = full_batch_loss(anchors, candidates, targets, world=ALONE, scale=SCALE, symmetric=True)
    assert sharp.loss.item() == expected.loss.item()


def test_losses_hard_triplet_is_the_loop() -> None:
    (vectors,), labels = fed("batch_hard_triplet")
    terms = []
    for i, anchor in enumerate(vectors):
        others = [j for j in range(8) if j != i]
        positives = [1 - cosine(anchor, vectors[j]) for j in others if labels[j] == labels[i]]
        negatives = [1 - cosine(anchor, vectors[j]) for j in others if labels[j] != labels[i]]
        terms.append(max(max(positives, default=0.0) - min(negatives) + 0.3, 0.0))
    outcome = make_loss("batch_hard_triplet")([vectors], labels, world=ALONE)
    assert outcome.loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_losses_uncertainty_settles_where_kendall_says() -> None:
    weights = UncertaintyWeights(["chat", "intent"]).double()
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        weights("chat", torch.tensor(4.0, dtype=torch.float64)).backward()
        weights("intent", torch.tensor(0.25, dtype=torch.float64)).backward()
        optimizer.step()
    # exp(-s) L + s / 2 is least where exp(-s) = 1 / (2 L): the noisier task weighs less
    assert weights.weights() == {"chat": pytest.approx(1 / 8), "intent": pytest.approx(2.0)}
