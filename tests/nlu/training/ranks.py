"""What a rank does in the tests of nlu.training.distributed, started by horovodrun.

horovodrun --gloo -np 2 python -m tests.nlu.training.ranks FOLDER          everything; rank-N.json tells
horovodrun --gloo -np 2 python -m tests.nlu.training.ranks FOLDER kill     rank 1 is killed; nothing is published
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlu.training.distributed import Compression, World, world, write_once
from nlu.training.losses import Outcome, cached_backward, full_batch_loss

PAIRS, STEPS = 8, 4  # of all ranks
SIZES = (3, 70, 1, 129)  # of gradients: not multiples of anything
COMPRESSIONS: tuple[Compression, ...] = ("none", "fp16", "bf16")


def gathered_gradient(here: World) -> Tensor:
    """Rank r weighs every gathered row by its number and by r + 1: row k must come to know 3 (k + 1) in all."""
    rows = torch.zeros(2, 3, requires_grad=True)
    everybody = here.all_gather_with_grad(rows + 10 * here.rank)
    weights = torch.arange(1.0, len(everybody) + 1)[:, None]
    (everybody * weights * (here.rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    return torch.cat([everybody.detach(), here.all_gather(rows.grad)])


class Mixed(nn.Module):
    """Weights in several types, and buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=draw).T)  # not contiguous
        self.brief = nn.Parameter(torch.randn(5, generator=draw).bfloat16())
        self.scalar = nn.Parameter(torch.randn((), generator=draw))
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(seed))


def broadcast(here: World) -> list[float]:
    """Weights, buffers, optimizer state and learning rate as they are here after rank 0 has told them."""
    module = Mixed(seed=here.rank)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 / (here.rank + 1), weight_decay=0.5)
    before = [parameter.detach().clone() for parameter in Mixed(seed=0).parameters()]
    here.broadcast_state(module, optimizer)  # no state yet: nothing may move
    assert all(map(torch.equal, module.parameters(), before))
    if here.rank == 0:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    here.broadcast_state(module, optimizer)
    values = [value.double().flatten() for value in module.state_dict().values()]
    for slots in optimizer.state_dict()["state"].values():
        values += [value.double().flatten() for value in slots.values()]
    return [*torch.cat(values).tolist(), optimizer.param_groups[0]["lr"]]


def own_gradients(rank: int) -> list[Tensor]:
    """What a rank has learnt before it asks the others."""
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=draw) for size in SIZES]


def averaged_gradients(here: World, compression: Compression) -> list[list[float] | None]:
    """The first is known to all, the second to rank 0 alone, the third to nobody."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    for number, (parameter, gradient) in enumerate(zip(parameters, own_gradients(here.rank), strict=True)):
        if number != 2 and (number != 1 or here.rank == 0):
            parameter.grad = gradient
    here.average_gradients(parameters, compression=compression)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def averaged_types(here: World, compression: Compression) -> bool:
    """Whether bfloat16, a scalar and strided memory are averaged too, each staying what it was."""
    parameters = list(Mixed(seed=0).parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, here.rank + 1.0)
    here.average_gradients(parameters, compression=compression)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return all(
        gradient.dtype is parameter.dtype and gradient.eq((1 + here.size) / 2).all()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    )


def trained(here: World) -> list[float]:
    """Weights after some steps of contrastive training with cached gradients, clipping and weight decay."""
    torch.manual_seed(here.rank)
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    unused = nn.Linear(2, 2).double()
    nn.init.ones_(unused.weight)
    parameters = [*encoder.parameters(), *unused.parameters()]
    optimizer = here.wrap_optimizer(torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1), max_norm=0.5)
    here.broadcast_state(encoder, optimizer)
    share = PAIRS // here.size
    rows = slice(here.rank * share, (here.rank + 1) * share)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        pairs = torch.randn(2, PAIRS, 6, generator=draw, dtype=torch.float64)
        groups = torch.arange(PAIRS)[rows] % 6

        def loss(vectors: Sequence[Tensor], groups: Tensor = groups) -> Outcome:
            anchors, candidates = vectors
            return full_batch_loss(anchors, candidates, groups, world=here)

        optimizer.zero_grad()
        cached_backward(encoder, [torch.split(column[rows], 3) for column in pairs], loss)
        optimizer.step()
    assert unused.weight.eq(1).all()  # what nobody trains does not decay
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()]).tolist()


def refusal(ask: Callable[[], object]) -> str:
    """What the ranks are told when they disagree."""
    try:
        ask()
    except ValueError as error:
        return str(error)
    return ""


def everything(here: World, folder: Path) -> dict[str, Any]:
    """All there is to tell, in the order all ranks do it."""
    answers: dict[str, Any] = {
        "rank": [here.rank, here.size, here.local_rank, torch.get_num_threads()],
        "gathered": gathered_gradient(here).tolist(),
        "strings": here.gather_strings([f"rank {here.rank}", "да"][: 2 - here.rank]),
        "broadcast": broadcast(here),
        "gradients": {each: averaged_gradients(here, each) for each in COMPRESSIONS},
        "types": [averaged_types(here, each) for each in COMPRESSIONS],
        "trained": trained(here),
        "average": here.average({"loss": here.rank + 1.0, "accuracy": 0.5}),
        "uneven": refusal(lambda: here.all_gather(torch.zeros(2 + here.rank))),
        "different": refusal(lambda: here.average({f"loss {here.rank}": 1.0})),
        "after": here.average({"loss": 1.0 - here.rank}),
    }
    write_once(here, lambda: (folder / f"written-by-{here.rank}").touch())
    answers["written"] = sorted(path.name for path in folder.glob("written-by-*"))
    return answers


def publish(here: World, folder: Path, *, kill_at: int | None) -> None:
    """Train; then, if all ranks are still there, publish."""
    for step in range(6):
        if step == kill_at and here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        here.average({"loss": float(step)})
        if here.rank == 0:
            (folder / f"step-{step}").touch()
    write_once(here, (folder / "published").touch)


def main() -> None:
    """As asked for."""
    folder = Path(sys.argv[1])
    here = world()
    if sys.argv[2:]:
        publish(here, folder, kill_at=3 if sys.argv[2] == "kill" else None)
    else:
        (folder / f"rank-{here.rank}.json").write_text(json.dumps(everything(here, folder)))


if __name__ == "__main__":
    main()
