"""What a teacher has to say to a student: its vector of every phrase, once and for all, and how it looks at the words.

    vectors of all phrases -> [phrases, width] on disk -> rows of a batch -> outputs and similarities
    the teacher itself, in step with the student       -> attention and token states

The student may hear a phrase with noise; the vector it is to answer with is of the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nlu.training.config import Stage
from nlu.training.loop import Work
from nlu.training.losses import Outcome
from nlu.training.network import Network, Tokens

BLOCK = 4096  # phrases between two looks at the disk
CHUNK = 256


Vectors = NDArray[np.float16]
Encode = Callable[[Tokens], Tensor]


def write_vectors(
    teacher: Network,
    phrases: Sequence[str],
    path: Path,
    *,
    cast: Callable[[Encode], Encode] = lambda encode: encode,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write [phrases, teacher.dim] float16 of unit length; nothing where the file is there already.

    A call that was stopped is gone on from by the next one. The file belongs to these phrases in this order and to this
    teacher; it is the caller's to choose a path that says so. `cast` sets the numbers that are computed with.
    """
    if path.exists():
        return
    shape = (len(phrases), teacher.dim)
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".done")
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = progress.exists() and partial.exists() and partial.stat().st_size == shape[0] * shape[1] * 2
    vectors = np.memmap(partial, np.float16, "r+" if begun else "w+", shape=shape)
    encode = cast(teacher.sentences)
    teacher.eval()
    for first in range(int(progress.read_text()) if begun else 0, len(phrases), BLOCK):
        block = phrases[first : first + BLOCK]
        # Of like length together: padding costs as much as words.
        lengths = teacher.lengths(block)
        order = sorted(range(len(block)), key=lengths.__getitem__)
        for at in range(0, len(order), CHUNK):
            rows = order[at : at + CHUNK]
            with torch.no_grad():
                found = encode(teacher.tokenise([block[i] for i in rows]).to(teacher.device))
            vectors[[first + i for i in rows]] = found.float().cpu().numpy().astype(np.float16)
        vectors.flush()
        progress.write_text(str(first + len(block)))
        done(first + len(block), len(phrases))
    partial.rename(path)
    progress.unlink()


def read_vectors(path: Path, dim: int) -> Vectors:
    """[phrases, dim] as `write_vectors` left them, read as they are needed."""
    return np.memmap(path, np.float16, "r").reshape(-1, dim)


@dataclass(frozen=True, slots=True, eq=False)
class Teaching:
    """One stage's lesson over a pool of phrases; `vectors` and `components` are what the student's space is to be.

    `network` and `words` (teacher's word number by student's word number; None where both have the same) are needed for
    attention and token states alone.
    """

    stage: Stage
    vectors: Vectors  # [phrases, teacher.dim]
    components: Tensor | None  # [dim, teacher.dim]; None where the student keeps the width
    held: tuple[tuple[str, ...], Tensor]  # phrases of no pool and the teacher's vectors of them
    network: Network | None = None
    words: Tensor | None = None
    layers: tuple[int, ...] = ()  # which of the teacher's each of the student's began as
    _extra: list[Tensor] = field(default_factory=list, repr=False)

    def work(
        self, rows: Sequence[int], chunks: Sequence[Tokens], order: Sequence[int], network: Network
    ) -> Work:
        """The stage's losses, weighted; what is compared is spelt out in `Stage`."""
        device = network.device
        wanted = torch.from_numpy(np.asarray(self.vectors[[rows[i] for i in order]], np.float32)).to(device)
        self._extra.clear()
        inner = bool(self.stage.attention or self.stage.tokens)

        def loss(columns: Sequence[Tensor]) -> Outcome:
            found = columns[0].float()
            total = found.new_zeros(())
            if self.stage.outputs:
                total = total + self.stage.outputs * (found - self._compressed(wanted)).pow(2).sum(1).mean()
            if self.stage.similarities:
                total = total + self.stage.similarities * similarity_loss(found, wanted, self.stage.softness)
            if self._extra:
                total = total + torch.stack(self._extra).sum() / len(order)
            return Outcome(total)

        def encode(chunk: Tokens) -> Tensor:
            return self._followed(chunk, network) if inner else network.sentences(chunk)

        return Work((tuple(chunks),), encode, loss)

    def measure(self, network: Network, *, batch: int) -> tuple[str, float]:
        """Mean cosine to the teacher over the held phrases."""
        phrases, wanted = self.held
        found = network.encode(phrases, batch=batch)
        return "cosine", float((found * self._compressed(wanted)).sum(1).mean())

    def _compressed(self, vectors: Tensor) -> Tensor:
        """[rows, teacher.dim] to [rows, dim] of unit length."""
        if self.components is None:
            return vectors
        return functional.normalize(vectors @ self.components.to(vectors.device).T, dim=1)

    def _followed(self, chunk: Tokens, network: Network) -> Tensor:
        """[rows, dim] of the student; how far its attention and token states are from the teacher's is put aside."""
        if self.network is None:
            raise ValueError("attention and token states need the teacher's network; this is a bug")
        ids = chunk.ids if self.words is None else self.words.to(chunk.ids.device)[chunk.ids]
        ours = network.graph.encoder(
            input_ids=chunk.ids, attention_mask=chunk.mask, output_attentions=bool(self.stage.attention)
        )
        with torch.no_grad():
            theirs = self.network.graph.encoder(
                input_ids=ids, attention_mask=chunk.mask, output_attentions=bool(self.stage.attention)
            )
        real = chunk.mask.float()
        lengths = real.sum(1)
        if self.stage.attention:
            for layer, maps in enumerate(ours.attentions):
                off = (maps.float() - theirs.attentions[self._taught_by(layer)].float()).pow(2)
                # Summed over what is looked at, meant over who looks and over heads: padding neither looks nor counts.
                of_tokens = (off.sum(-1) * real[:, None]).sum(-1) / lengths[:, None]
                self._extra.append(self.stage.attention * of_tokens.mean(1).sum() / len(ours.attentions))
        if self.stage.tokens:
            off = (ours.last_hidden_state.float() - theirs.last_hidden_state.float()).pow(2).mean(-1)
            scale = theirs.last_hidden_state.float().pow(2).mean(-1).clamp(min=1e-6)
            self._extra.append(self.stage.tokens * ((off / scale * real).sum(1) / lengths).sum())
        return network.graph.pooled(ours.last_hidden_state, chunk.mask)

    def _taught_by(self, layer: int) -> int:
        """The teacher's layer a student's is to look like: the last one before the next that was kept."""
        following = self.layers[layer + 1] if layer + 1 < len(self.layers) else 0
        return following - 1  # -1: the last of all


def similarity_loss(found: Tensor, wanted: Tensor, softness: float) -> Tensor:
    """KL divergence between rows of the batch's similarity matrices, each without itself, at a temperature.

    Found [rows, dim] and wanted [rows, width], all of unit length (Passalis and Tefas 2018, with softmax for kernel).
    """
    apart = ~torch.eye(len(found), dtype=torch.bool, device=found.device)
    ours, theirs = (
        torch.log_softmax((vectors @ vectors.T)[apart].view(len(found), -1) / softness, dim=1)
        for vectors in (found, wanted)
    )
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
