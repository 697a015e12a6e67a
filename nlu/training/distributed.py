"""The ranks of one training run: Horovod where horovodrun started it, else one process that answers the same calls.

The one module that imports Horovod. Everything else in `nlu.training` holds a `World` and cannot tell which it is:

    horovodrun --gloo -np 4 nlu vectorizer train CONFIG       four ranks
    nlu vectorizer train CONFIG                               one, `Alone`

Every method is a collective: all ranks call the same ones in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Compression = Literal[
    "none", "fp16", "bf16"
]  # what gradients travel as; they are kept and applied as they were

# Gradients are sent in pieces: large enough to use the wire well, small enough that copies never double the memory.
BUCKET_ELEMENTS = 16 * 1024 * 1024
CYCLE_MILLISECONDS = "25"  # on CPUs; HOROVOD_CYCLE_TIME says otherwise


class World(Protocol):
    """What a rank may ask of the others."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def size(self) -> int:
        """How many processes train together."""

    @property
    def local_rank(self) -> int:
        """This process on its machine: the number of its GPU."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[rows, ...] of every rank, in rank order: [rows * size, ...]. ValueError where ranks differ in rows."""

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """`all_gather` with exact gradients: a rank's rows receive the sum of what all ranks want of them."""

    def gather_strings(self, texts: Sequence[str]) -> list[str]:
        """The texts of every rank in rank order; ranks may hold different numbers of them."""

    def broadcast_state(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Rank 0's weights, buffers, optimizer state and hyperparameters on every rank, in place."""

    def average_gradients(
        self, parameters: Iterable[nn.Parameter], *, compression: Compression = "none"
    ) -> None:
        """Replace every gradient by its mean over ranks; one that no rank has stays None."""

    def wrap_optimizer(
        self, optimizer: Optimizer, compression: Compression = "none", *, max_norm: float | None = None
    ) -> Optimizer:
        """The same optimizer, whose step first averages gradients over ranks, then clips their common norm."""

    def average(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of each metric over ranks. ValueError where ranks measured different things."""

    def barrier(self) -> None:
        """Wait for all ranks."""


def world() -> World:
    """Horovod's where horovodrun started this process (it tells each rank its number), else `Alone`."""
    launched = "HOROVOD_RANK" in os.environ and "HOROVOD_SIZE" in os.environ
    return _horovod() if launched else Alone()


@functools.cache
def _horovod() -> HorovodWorld:
    return HorovodWorld()  # a process joins once


def write_once(world: World, write: Callable[[], None]) -> None:
    """Let rank 0 alone write files; no rank goes on before they are there.

    Should the write raise, rank 0 leaves, and horovodrun ends the ranks that wait for it.
    """
    if world.rank == 0:
        write()
    world.barrier()


@dataclass(frozen=True, slots=True)
class Alone:
    """The single-process twin: what a world of one rank answers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All rows there are."""
        return tensor.detach()

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """All rows there are, in their graph."""
        return tensor

    def gather_strings(self, texts: Sequence[str]) -> list[str]:
        """All texts there are."""
        return list(texts)

    def broadcast_state(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Nobody to tell."""

    def average_gradients(
        self, parameters: Iterable[nn.Parameter], *, compression: Compression = "none"
    ) -> None:
        """They are their own mean."""

    def wrap_optimizer(
        self, optimizer: Optimizer, compression: Compression = "none", *, max_norm: float | None = None
    ) -> Optimizer:
        """The optimizer, which clips before it steps."""
        return _before_step(optimizer, self, compression, max_norm)

    def average(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """They are their own mean."""
        return dict(metrics)

    def barrier(self) -> None:
        """Nobody to wait for."""


class HorovodWorld:
    """The ranks that horovodrun started.

    Raises RuntimeError where Horovod is missing or was built for another torch.
    """

    def __init__(self) -> None:
        hvd = _import_horovod()
        if not torch.cuda.is_available():
            # Horovod's own thread looks for work each millisecond, on the core that is to do the work.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_MILLISECONDS)
        hvd.init()
        self._hvd = hvd
        self._gathers = itertools.count()
        if "OMP_NUM_THREADS" not in os.environ:
            # torch takes every core in every process; ranks of one machine would fight over them.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(hvd.local_size())))
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return int(self._hvd.rank())

    @property
    def size(self) -> int:
        """How many processes train together."""
        return int(self._hvd.size())

    @property
    def local_rank(self) -> int:
        """This process on its machine."""
        return int(self._hvd.local_rank())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[rows, ...] of every rank: [rows * size, ...]."""
        gathered: Tensor = self._hvd.allgather(tensor.detach().contiguous(), name=self._next_name())
        expected = tensor.shape[0] * self.size
        if gathered.shape[0] != expected:
            raise ValueError(
                f"ranks hold batches of different sizes: found {gathered.shape[0]} rows in all, expected {expected} "
                f"({tensor.shape[0]} here, {self.size} ranks); give every rank equal batches, e.g. drop the last one"
            )
        return gathered

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """[rows, ...] of every rank with exact gradients.

        Horovod's own allgather would send the *mean* of the ranks' gradients back: 1/size of the true ones.
        """
        gathered: Tensor = _Gather.apply(tensor, self, self._next_name())  # type: ignore[no-untyped-call]
        return gathered

    def sum_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """The sum of [rows * size, ...] over ranks, of which each gets its own [rows, ...]: the gather's adjoint."""
        scattered: Tensor = self._hvd.reducescatter(tensor.contiguous(), name=name, op=self._hvd.Sum)
        return scattered

    def gather_strings(self, texts: Sequence[str]) -> list[str]:
        """The texts of every rank in rank order."""
        lists: list[list[str]] = self._hvd.allgather_object(list(texts), name="strings")
        return list(itertools.chain.from_iterable(lists))

    def broadcast_state(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Rank 0's weights, buffers, optimizer state and hyperparameters on every rank, in place."""
        self._broadcast(
            (f"module.{name}", value)
            for name, value in sorted(module.state_dict().items())
            if isinstance(value, Tensor)
        )
        if optimizer is not None:
            self._broadcast_optimizer(optimizer)

    def _broadcast(self, named: Iterable[tuple[str, Tensor]]) -> None:
        kept, handles = [], []
        for name, value in named:
            # Horovod knows no bfloat16 and wants contiguous memory; bits are bits.
            whole = value.detach().contiguous()
            bits = whole.view(torch.int16) if whole.dtype is torch.bfloat16 else whole
            handles.append(self._hvd.broadcast_async_(bits, 0, name=name))
            kept.append((value, whole))
        for handle in handles:
            self._hvd.synchronize(handle)
        with torch.no_grad():
            for value, whole in kept:
                if whole.data_ptr() != value.data_ptr():
                    value.copy_(whole)

    def _broadcast_optimizer(self, optimizer: Optimizer) -> None:
        # Not hvd.broadcast_optimizer_state: it steps a fresh optimizer to create its state, and that step already
        # applies weight decay. Shapes and scalars go first, then each tensor, none of them through pickle.
        state = optimizer.state_dict()
        outline = {
            "param_groups": state["param_groups"],
            "state": {
                index: {name: _Blank.of(value) for name, value in slots.items()}
                for index, slots in state["state"].items()
            },
        }
        outline = self._hvd.broadcast_object(outline, root_rank=0, name="optimizer")
        received: dict[int, dict[str, Any]] = {}
        tensors: list[tuple[str, Tensor]] = []
        for index, slots in outline["state"].items():
            received[index] = {}
            for name, value in slots.items():
                if isinstance(value, _Blank):
                    mine = state["state"][index][name].cpu() if self.rank == 0 else value.empty()
                    tensors.append((f"optimizer.{index}.{name}", mine))
                    received[index][name] = mine
                else:
                    received[index][name] = value
        self._broadcast(tensors)
        if self.rank > 0:
            optimizer.load_state_dict({"param_groups": outline["param_groups"], "state": received})

    def average_gradients(
        self, parameters: Iterable[nn.Parameter], *, compression: Compression = "none"
    ) -> None:
        """Replace every gradient by its mean over ranks.

        A parameter that no rank used keeps None, so that weight decay and momentum leave the other tasks' heads
        alone, as they would in one process; one that only some ranks used counts as zero on the rest.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        held = torch.tensor([[parameter.grad is not None for parameter in trained]], dtype=torch.uint8)
        anywhere = self._hvd.allgather(held, name="gradients.held").any(dim=0).tolist()
        gradients = []
        for parameter, used in zip(trained, anywhere, strict=True):
            if not used:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for number, bucket in enumerate(_buckets(gradients)):
            if compression == "bf16":
                self._average_through_bfloat16(bucket, f"gradients.{number}")
            else:
                self._average(bucket, compression, f"gradients.{number}")

    def _average(self, bucket: Sequence[Tensor], compression: Compression, name: str) -> None:
        wire = [_as_sent(gradient, compression) for gradient in bucket]
        self._hvd.grouped_allreduce_(wire, name=name, op=self._hvd.Average)
        for gradient, mean in zip(bucket, wire, strict=True):
            if mean.data_ptr() != gradient.data_ptr():  # else it was averaged in place
                gradient.copy_(mean)

    def _average_through_bfloat16(self, bucket: Sequence[Tensor], name: str) -> None:
        # Horovod cannot add bfloat16, so the two halves of an allreduce are done here: every rank gets one slice from
        # all, adds it in float32, and hands the mean to all. Two bytes an element each way, as for fp16.
        sizes = [gradient.numel() for gradient in bucket]
        slice_length = -(-sum(sizes) // self.size)
        padded = bucket[0].new_zeros(slice_length * self.size, dtype=torch.bfloat16)
        torch.cat([gradient.reshape(-1).bfloat16() for gradient in bucket], out=padded[: sum(sizes)])
        slices = self._hvd.alltoall(padded.view(torch.int16), name=f"{name}.scatter").view(torch.bfloat16)
        mean = slices.view(self.size, slice_length).float().mean(dim=0).bfloat16()
        whole = self._hvd.allgather(mean.view(torch.int16), name=f"{name}.gather").view(torch.bfloat16)
        parts = torch.split(whole[: sum(sizes)], sizes)
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wrap_optimizer(
        self, optimizer: Optimizer, compression: Compression = "none", *, max_norm: float | None = None
    ) -> Optimizer:
        """The same optimizer, whose step first averages gradients over ranks, then clips their common norm."""
        return _before_step(optimizer, self, compression, max_norm)

    def average(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of each metric over ranks."""
        names = sorted(metrics)
        digest = hashlib.blake2b("\0".join(names).encode(), digest_size=4).digest()
        row = [float(int.from_bytes(digest)), *(metrics[name] for name in names)]
        rows = self._hvd.allgather(
            torch.tensor(row, dtype=torch.float64), name="metrics"
        )  # [size * (1 + names)]
        if len(rows) != len(row) * self.size or (rows.view(self.size, -1)[:, 0] != row[0]).any():
            raise ValueError(
                f"ranks measured different things: found {names} on rank {self.rank}, expected the same on every "
                "rank; run the same task everywhere at each step"
            )
        means = rows.view(self.size, -1)[:, 1:].mean(dim=0).tolist()
        return dict(zip(names, means, strict=True))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._hvd.barrier()

    def _next_name(self) -> str:
        # Names match the ranks' tensors to each other, also when a backward pass runs its gathers in another order.
        # They come round again, far apart, so that Horovod recognises what it has already negotiated.
        return f"gather.{next(self._gathers) % 64}"


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: HorovodWorld, name: str) -> Tensor:
        ctx.world, ctx.name = world, name
        return world.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world.sum_scatter(gradients[0], f"{ctx.name}.gradient"), None, None


@dataclass(frozen=True, slots=True)
class _Blank:
    """The place of a tensor in an optimizer's state."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: object) -> object:
        return cls(value.shape, value.dtype) if isinstance(value, Tensor) else value

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def _before_step(
    optimizer: Optimizer, world: World, compression: Compression, max_norm: float | None
) -> Optimizer:
    """Average and clip as the step's first act.

    Not hvd.DistributedOptimizer: it reduces inside `backward`, once per step, which gradient caching's many backward
    passes break, and it gives parameters that no rank used a gradient of zero, which weight decay then acts on.
    """

    def average_and_clip(stepped: Optimizer, *_: object) -> None:
        parameters = [parameter for group in stepped.param_groups for parameter in group["params"]]
        world.average_gradients(parameters, compression=compression)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)

    optimizer.register_step_pre_hook(average_and_clip)
    return optimizer


def _as_sent(gradient: Tensor, compression: Compression) -> Tensor:
    """Contiguous and of a type that Horovod adds; the gradient itself where it is."""
    if compression == "fp16":
        return gradient.half().contiguous()
    return (gradient.float() if gradient.dtype is torch.bfloat16 else gradient).contiguous()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one type on one device, none longer than a bucket unless it is one large tensor."""
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        alike = not bucket or (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or elements + gradient.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket


def _import_horovod() -> Any:
    try:
        hvd = importlib.import_module("horovod.torch")
    except ImportError as error:
        raise RuntimeError(
            "horovodrun started this process, but found no horovod here; build it with deploy/horovod/build.sh and "
            "pip install --no-deps what it names"
        ) from error
    if not hasattr(hvd, "init"):  # it only prints when its extension does not load
        raise RuntimeError(
            f"found a horovod that does not load beside torch {torch.__version__}, expected one built for it; "
            "build it again with deploy/horovod/build.sh"
        )
    return hvd
