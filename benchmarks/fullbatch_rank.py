"""What one rank of benchmarks.fullbatch computes; the reference in one process computes the same with the whole batch.

horovodrun --gloo -np N python -m benchmarks.fullbatch_rank OUT.pt
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlu.training.distributed import Compression, World, world
from nlu.training.losses import Outcome, cached_backward, make_loss

PAIRS = 24  # per rank
CHUNK = 7  # does not divide it
TOKENS, VOCABULARY, HIDDEN, DIM = 9, 300, 64, 32


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train, in one precision."""

    loss: str
    cached: bool
    dtype: torch.dtype
    gather: str = "with gradients"  # or, as a control: "without gradients", "with averaged gradients"
    symmetric: bool = False

    @property
    def name(self) -> str:
        """For people."""
        symmetric = " symmetric" if self.symmetric else ""
        cached = " cached" if self.cached else ""
        return f"{self.loss}{symmetric}{cached} {str(self.dtype).removeprefix('torch.')}"


def cases() -> Iterator[Case]:
    """What must agree with one process."""
    for dtype in (torch.float32, torch.float64):
        for cached in (False, True):
            yield Case("full_batch", cached, dtype)
            yield Case("full_batch", cached, dtype, symmetric=True)
            yield Case("supervised_contrastive", cached, dtype)


def controls() -> Iterator[Case]:
    """What must not."""
    yield Case("full_batch", False, torch.float32, gather="without gradients")
    yield Case("full_batch", False, torch.float32, gather="with averaged gradients")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a case gave: the loss, each parameter's gradient, each anchor's effective negatives."""

    loss: float
    gradients: dict[str, Tensor]
    negatives: Tensor  # [pairs of all ranks]


class Encoder(nn.Module):
    """A small transformer, mean pooling, a compressing layer: [rows, tokens] to [rows, dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.places = nn.Parameter(torch.randn(TOKENS, HIDDEN) / 10)
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 2 * HIDDEN, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.compress = nn.Linear(HIDDEN, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        """Not normalised: the losses do that."""
        hidden = self.layers(self.words(ids) + self.places)
        vectors: Tensor = self.compress(hidden.mean(dim=1))
        return vectors


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs of phrases that share words, some pairs sharing a group, most of those on different ranks."""

    anchors: Tensor  # [pairs, tokens]
    candidates: Tensor  # [pairs, tokens]
    groups: Tensor  # [pairs, 2]: a text's id and a label's

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the pairs."""
        return Batch(self.anchors[start:stop], self.candidates[start:stop], self.groups[start:stop])


def make_batch(pairs: int) -> Batch:
    """The same on every rank."""
    draw = torch.Generator().manual_seed(pairs)
    anchors = torch.randint(VOCABULARY, (pairs, TOKENS), generator=draw)
    candidates = torch.where(
        torch.rand(pairs, TOKENS, generator=draw) < 0.4,
        anchors,
        torch.randint(VOCABULARY, (pairs, TOKENS), generator=draw),
    )
    texts = torch.arange(pairs)
    texts[1::5] = texts[1::5].flip(0)  # every fifth pair shares a text with one far away
    texts = torch.minimum(texts, torch.arange(pairs))
    labels = 10_000 + torch.randint(pairs // 3, (pairs,), generator=draw)
    labels[::4] = -1
    return Batch(anchors, candidates, torch.stack([texts, labels], dim=1))


def answer(
    case: Case, batch: Batch, world: World, *, seed: int = 0, compression: Compression = "none"
) -> Answer:
    """One training step's gradients over this rank's share of the batch."""
    torch.manual_seed(seed)
    encoder = Encoder().to(case.dtype)
    world.broadcast_state(encoder)
    share = len(batch.groups) // world.size
    mine = batch.rows(world.rank * share, (world.rank + 1) * share)
    columns, targets = _columns(case, mine)
    loss = make_loss(case.loss, **({"symmetric": True} if case.symmetric else {}))
    hears = _Control(world, case.gather) if case.gather != "with gradients" else world

    def outcome(vectors: Any) -> Outcome:
        return loss(vectors, targets, world=hears)

    if case.cached:
        measured = cached_backward(encoder, [torch.split(column, CHUNK) for column in columns], outcome)
    else:
        measured = outcome([encoder(column) for column in columns])
        measured.loss.backward()  # type: ignore[no-untyped-call]
    world.average_gradients(encoder.parameters(), compression=compression)
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    negatives = torch.empty(0) if measured.negatives is None else measured.negatives
    return Answer(
        world.average({"loss": measured.loss.item()})["loss"],
        {name: gradient for name, gradient in gradients.items() if gradient is not None},
        world.all_gather(negatives),
    )


def _columns(case: Case, batch: Batch) -> tuple[list[Tensor], Tensor]:
    if case.loss == "full_batch":
        return [batch.anchors, batch.candidates], batch.groups
    return [batch.anchors], batch.groups[:, 1]


class _Control:
    """A world with a gather that others have got wrong."""

    def __init__(self, world: World, gather: str) -> None:
        self._world, self._gather = world, gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        if self._gather == "with averaged gradients":  # as hvd.allgather does
            everybodys = self._world.all_gather_with_grad(tensor)
            return torch.lerp(everybodys.detach(), everybodys, 1 / self._world.size)
        everybody = list(torch.split(self._world.all_gather(tensor), len(tensor)))
        everybody[self._world.rank] = tensor  # only one's own rows keep their graph
        return torch.cat(everybody)


def main() -> None:
    """Compute every case; rank 0 writes them down."""
    here = world()
    batch = make_batch(PAIRS * here.size)
    # Ranks start from different weights: what rank 0 broadcasts must reach them all.
    answers = [
        dataclasses.asdict(answer(case, batch, here, seed=here.rank)) for case in (*cases(), *controls())
    ]
    if here.rank == 0:
        torch.save(answers, sys.argv[1])
    here.barrier()


if __name__ == "__main__":
    main()
