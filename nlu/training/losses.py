"""Losses over vectors that are already there: the full-batch contrastive ones are ours, others are handed out.

A rank sees its own rows and, through `World.all_gather_with_grad`, everybody's. Every loss is scaled so that the mean
over ranks of the losses, and of the gradients, is that of one process with the whole batch.

    full_batch_loss          pairs: each anchor against all B*N candidates
    supervised_contrastive   labelled rows
    cached_backward          either, over more rows than memory holds activations for
    make_loss                any loss by the name a config gives it
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nlu.training.datasets import identity
from nlu.training.distributed import World

SCALE = 20.0  # the inverse temperature most sentence encoders are trained with
IGNORED = -100  # a target that counts for nothing

Chunk = TypeVar("Chunk")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A loss, and what it rests on.

    `negatives` is [batch]: for each anchor of this rank, how many rows of all ranks pushed it away. None for losses
    that do not contrast rows.
    """

    loss: Tensor
    negatives: Tensor | None = None


class Loss(Protocol):
    """Every loss as the training loop calls it."""

    def __call__(self, columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        """Columns of vectors [batch, dim], or one of logits, with targets as the loss's `Recipe` says."""


# --- who belongs together ---------------------------------------------------------------------------------------------


def text_ids(texts: Sequence[str]) -> Tensor:
    """[texts] int64 >= 0, equal where texts are equal, on any rank and in any run."""
    return torch.tensor([identity(text) for text in texts], dtype=torch.int64)


def pair_groups(
    anchors: Sequence[str], candidates: Sequence[str], groups: Sequence[int] | None = None
) -> Tensor:
    """[pairs, 2 or 3] for `full_batch_loss`: pairs with a text in common, on either side, or a group belong together.

    Groups are identities too, as `datasets.Pair.group` is; negative ones are nobody's.
    """
    columns = [text_ids(anchors), text_ids(candidates)]
    if groups is not None:
        columns.append(torch.tensor(groups, dtype=torch.int64))
    return torch.stack(columns, dim=1)


def _together(rows: Tensor, columns: Tensor) -> Tensor:
    """[rows, ids] and [columns, ids] to [rows, columns]: whether they share an id; negative ids are nobody's."""
    together = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for ours in rows.unbind(1):
        for theirs in columns.unbind(1):
            together |= (ours[:, None] == theirs[None, :]) & (ours >= 0)[:, None]
    return together


def _as_ids(groups: Tensor) -> Tensor:
    return groups[:, None] if groups.ndim == 1 else groups


def _own_columns(rows: int, world: World, device: torch.device) -> Tensor:
    """[rows]: where this rank's rows stand among everybody's."""
    return torch.arange(rows, device=device) + world.rank * rows


def _float(values: Tensor) -> Tensor:
    """In float32 at least: 16 bits cannot tell close candidates apart."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _unit(vectors: Tensor) -> Tensor:
    """[batch, dim] on the unit sphere."""
    return functional.normalize(_float(vectors), dim=-1)


def _without_autocast(vectors: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(vectors.device.type, enabled=False)


# --- contrastive ------------------------------------------------------------------------------------------------------


def full_batch_loss(
    anchors: Tensor,
    candidates: Tensor,
    groups: Tensor,
    *,
    world: World,
    scale: float = SCALE,
    symmetric: bool = False,
) -> Outcome:
    """InfoNCE (van den Oord et al. 2018) in which every anchor sees the candidates of all ranks.

    Anchors and candidates [batch, dim], row i of one belonging to row i of the other, equally many on every rank.
    Groups [batch] or [batch, ids] int64: two pairs that share an id (of a text, of a label) are never each other's
    negatives, nor are they positives: they are left out. Negative ids are shared with nobody. Symmetric also ranks
    all anchors for each candidate, and takes the mean of both.
    """
    if not len(anchors) == len(candidates) == len(groups):
        raise ValueError(
            f"found {len(anchors)} anchors, {len(candidates)} candidates and {len(groups)} groups, expected as many "
            "of each: one per pair"
        )
    ids = _as_ids(groups)
    own = _own_columns(len(anchors), world, anchors.device)
    masked = _together(ids, world.all_gather(ids))  # [batch, all]
    masked[torch.arange(len(anchors), device=anchors.device), own] = False
    with _without_autocast(anchors):
        anchors, candidates = _unit(anchors), _unit(candidates)
        loss = _info_nce(anchors, world.all_gather_with_grad(candidates), own, masked, scale)
        if symmetric:
            backwards = _info_nce(candidates, world.all_gather_with_grad(anchors), own, masked, scale)
            loss = (loss + backwards) / 2
    return Outcome(loss, masked.shape[1] - 1 - masked.sum(dim=1))


def _info_nce(rows: Tensor, columns: Tensor, own: Tensor, masked: Tensor, scale: float) -> Tensor:
    logits = (scale * rows @ columns.T).masked_fill(masked, -torch.inf)
    return functional.cross_entropy(logits, own)


def supervised_contrastive(
    vectors: Tensor, labels: Tensor, texts: Tensor | None = None, *, world: World, scale: float = SCALE
) -> Outcome:
    """Supervised contrastive loss over the rows of all ranks (Khosla et al. 2020, equation 2: the mean outside).

    Vectors [batch, dim], labels [batch] int64. A row with a negative label (out of scope, say) is a negative for
    all and a positive for nobody. Rows with the same text id as the anchor are left out: they teach nothing.
    Anchors without a positive do not count; the mean is over those of all ranks that have one.
    """
    everybody = world.all_gather(labels)
    own = _own_columns(len(vectors), world, vectors.device)
    dropped = torch.zeros(len(labels), len(everybody), dtype=torch.bool, device=vectors.device)
    if texts is not None:
        dropped = _together(texts[:, None], world.all_gather(texts)[:, None])
    dropped[torch.arange(len(labels), device=vectors.device), own] = True
    positive = _together(labels[:, None], everybody[:, None]) & ~dropped
    positives = positive.sum(dim=1)  # [batch]
    anchors = world.all_gather((positives > 0).sum().reshape(1)).sum().clamp(min=1)
    with _without_autocast(vectors):
        unit = _unit(vectors)
        logits = scale * unit @ world.all_gather_with_grad(unit).T
        # A row with nothing to compare with would be an empty sum, whose gradient is not a number; it does not count.
        alone = dropped.all(dim=1, keepdim=True)
        logits = logits.masked_fill(dropped & ~alone, -torch.inf)
        log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
        per_anchor = -torch.where(positive, log_probability, 0.0).sum(dim=1) / positives.clamp(min=1)
        loss = per_anchor.sum() * world.size / anchors
    return Outcome(loss, (~positive & ~dropped).sum(dim=1))


# --- more rows than memory holds --------------------------------------------------------------------------------------


def cached_backward(
    encode: Callable[[Chunk], Tensor],
    columns: Sequence[Sequence[Chunk]],
    loss: Callable[[Sequence[Tensor]], Outcome],
) -> Outcome:
    """Gradients of a loss over all rows with the activations of one chunk at a time (GradCache, Gao et al. 2021).

    Columns hold chunks of inputs (anchors, candidates, ...), `encode` makes [rows, dim] of a chunk, `loss` gets one
    [all rows, dim] per column. Three passes: vectors without a graph; the loss and its gradient for each vector;
    each chunk again, with its vectors' gradients fed in. The second forward replays torch's random state, so that
    dropout drops the same. Gradients are added to the parameters', as `backward` does; the loss comes back detached.
    Parameters that `loss` itself uses receive theirs in the second pass. Calls across ranks happen only there, so
    ranks may chunk differently.
    """
    replays: list[list[_Replay]] = []
    vectors: list[Tensor] = []
    for chunks in columns:
        replays.append([])
        parts = []
        for chunk in chunks:
            replays[-1].append(_Replay())
            with torch.no_grad():
                parts.append(encode(chunk))
        vectors.append(torch.cat(parts).requires_grad_())

    outcome = loss(vectors)
    outcome.loss.backward()  # type: ignore[no-untyped-call]

    for chunks, states, whole in zip(columns, replays, vectors, strict=True):
        wanted = torch.zeros_like(whole) if whole.grad is None else whole.grad
        start = 0
        for chunk, replay in zip(chunks, states, strict=True):
            with replay:
                part = encode(chunk)
            if part.requires_grad:  # a frozen encoder has nothing to learn
                part.backward(wanted[start : start + len(part)])  # type: ignore[no-untyped-call]
            start += len(part)
    return Outcome(outcome.loss.detach(), outcome.negatives)


class _Replay:
    """torch's random state when it was made, put back inside `with`, and what it was before restored after."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def __enter__(self) -> None:
        devices = [] if self._cuda is None else [torch.cuda.current_device()]
        self._fork = torch.random.fork_rng(devices=devices)
        self._fork.__enter__()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def __exit__(self, *raised: Any) -> None:
        self._fork.__exit__(*raised)


# --- heads ------------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    world: World,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Cross-entropy of [batch, classes] or [batch, tokens, classes] with [batch] or [batch, tokens].

    The mean is over the targets of all ranks that are not ignored: ranks hold equally many rows, but not tokens.
    """
    total = functional.cross_entropy(
        _float(logits).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    counted = world.all_gather((targets != ignore_index).sum().reshape(1)).sum().clamp(min=1)
    return Outcome(total * world.size / counted)


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, world: World) -> Outcome:
    """Cross-entropy of independent labels: [batch, labels] with as many probabilities.

    A negative target says nothing of that label; the mean is over the others, of all ranks.
    """
    known = targets >= 0
    each = functional.binary_cross_entropy_with_logits(
        _float(logits), targets.clamp(min=0).to(_float(logits).dtype), reduction="none"
    )
    counted = world.all_gather(known.sum().reshape(1)).sum().clamp(min=1)
    return Outcome((each * known).sum() * world.size / counted)


class UncertaintyWeights(nn.Module):
    """Task weights that are learnt: exp(-s) * loss + s / 2 with s = log variance (Kendall et al. 2018).

    One parameter per task rather than a vector of them, so that the optimizer leaves the tasks alone that a step does
    not train. Give them no weight decay, which would pull them to a weight of 1.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.log_variances = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in tasks)

    def forward(self, task: str, loss: Tensor) -> Tensor:
        """The weighted loss, a scalar like the given one."""
        log_variance: Tensor = self.log_variances[self.tasks.index(task)]
        return torch.exp(-log_variance) * loss + log_variance / 2

    def weights(self) -> dict[str, float]:
        """What each task's loss is multiplied by now."""
        return {
            task: torch.exp(-log_variance.detach()).item()
            for task, log_variance in zip(self.tasks, self.log_variances, strict=True)
        }


# --- by name ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named loss: what it is fed, and how it is made."""

    columns: Literal["pairs", "rows", "logits"]  # two of vectors, one of vectors, one of logits
    targets: Literal["groups", "labels", "scores", "classes", "probabilities"]
    make: Callable[..., Loss]


def make_loss(name: str, **options: Any) -> Loss:
    """A loss by its name in `RECIPES`. ValueError for an unknown one, or for options it does not have."""
    if name not in RECIPES:
        raise ValueError(f"found loss {name!r}, expected one of {', '.join(RECIPES)}")
    try:
        return RECIPES[name].make(**options)
    except TypeError as error:
        raise ValueError(f"loss {name!r} has other options: {error}") from error


def _full_batch(*, scale: float = SCALE, symmetric: bool = False) -> Loss:
    def loss(columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        anchors, candidates = columns
        return full_batch_loss(anchors, candidates, targets, world=world, scale=scale, symmetric=symmetric)

    return loss


def _supervised_contrastive(*, scale: float = SCALE) -> Loss:
    def loss(columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        (vectors,) = columns
        labels, *texts = _as_ids(targets).unbind(1)  # [batch] labels, or [batch, 2] labels and text ids
        return supervised_contrastive(vectors, labels, *texts, world=world, scale=scale)

    return loss


def _cross_entropy(*, ignore_index: int = IGNORED, label_smoothing: float = 0.0) -> Loss:
    def loss(columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        (logits,) = columns
        return cross_entropy(
            logits, targets, world=world, ignore_index=ignore_index, label_smoothing=label_smoothing
        )

    return loss


def _binary_cross_entropy() -> Loss:
    def loss(columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        (logits,) = columns
        return binary_cross_entropy(logits, targets, world=world)

    return loss


def _theirs(class_name: str, **options: Any) -> Loss:
    """A loss of sentence-transformers over the rows of all ranks: mined triplets and ranked pairs need them all.

    Each rank computes the whole loss; the gradients gathered for its rows are then `size` times the true ones, and
    averaging over ranks takes that back.
    """
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")  # takes seconds
    module = getattr(losses, class_name)(
        nn.Identity(), **options
    )  # vectors are given: its encoder is never called

    def loss(columns: Sequence[Tensor], targets: Tensor, *, world: World) -> Outcome:
        with _without_autocast(columns[0]):
            vectors = [world.all_gather_with_grad(_float(column)) for column in columns]
            value: Tensor = module.compute_loss_from_embeddings(vectors, world.all_gather(targets))
        return Outcome(value)

    return loss


def _cosent(*, scale: float = SCALE) -> Loss:
    return _theirs("CoSENTLoss", scale=scale)


def _cosine_similarity() -> Loss:
    return _theirs("CosineSimilarityLoss")


def _contrastive(*, margin: float = 0.5) -> Loss:
    return _theirs("ContrastiveLoss", margin=margin)


Distance = Literal["cosine", "euclidean"]


def _mined(class_name: str, distance: Distance, **options: Any) -> Loss:
    mining = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    metric = getattr(mining.BatchHardTripletLossDistanceFunction, f"{distance}_distance")
    return _theirs(class_name, distance_metric=metric, **options)


# Margins fit cosine distances, which end at 2; sentence-transformers' own default of 5 is for lengths of any size.
def _batch_all_triplet(*, distance: Distance = "cosine", margin: float = 0.3) -> Loss:
    return _mined("BatchAllTripletLoss", distance, margin=margin)


def _batch_hard_triplet(*, distance: Distance = "cosine", margin: float = 0.3) -> Loss:
    return _mined("BatchHardTripletLoss", distance, margin=margin)


def _batch_semi_hard_triplet(*, distance: Distance = "cosine", margin: float = 0.3) -> Loss:
    return _mined("BatchSemiHardTripletLoss", distance, margin=margin)


def _batch_hard_soft_margin_triplet(*, distance: Distance = "cosine") -> Loss:
    return _mined("BatchHardSoftMarginTripletLoss", distance)


RECIPES: Mapping[str, Recipe] = {
    "full_batch": Recipe("pairs", "groups", _full_batch),
    "supervised_contrastive": Recipe("rows", "labels", _supervised_contrastive),
    "cosent": Recipe("pairs", "scores", _cosent),
    "cosine_similarity": Recipe("pairs", "scores", _cosine_similarity),
    "contrastive": Recipe("pairs", "scores", _contrastive),
    "batch_all_triplet": Recipe("rows", "labels", _batch_all_triplet),
    "batch_hard_triplet": Recipe("rows", "labels", _batch_hard_triplet),
    "batch_semi_hard_triplet": Recipe("rows", "labels", _batch_semi_hard_triplet),
    "batch_hard_soft_margin_triplet": Recipe("rows", "labels", _batch_hard_soft_margin_triplet),
    "cross_entropy": Recipe("logits", "classes", _cross_entropy),
    "token_cross_entropy": Recipe("logits", "classes", _cross_entropy),
    "binary_cross_entropy": Recipe("logits", "probabilities", _binary_cross_entropy),
}
