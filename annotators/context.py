"""Heads that read the turn together with the turns before it: who said what, and how far back.

Features are the sentence vector, one slot for every (distance, role), and the elementwise product of the sentence
with the turn just before it, which lets "yes" mean different things after different questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annotators.annotator import Annotation, Heard, HeardTurn, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write
from annotators.sentence import answered

ROLES = ("user", "assistant")


def features(sentence: NDArray[np.float32], context: Sequence[HeardTurn], turns: int) -> NDArray[np.float32]:
    """[(2 + 2 * turns) * dim]: sentence, then slots (1 back user, 1 back assistant, 2 back user, ...), then the product."""
    dim = len(sentence)
    blocks = np.zeros((2 + len(ROLES) * turns, dim), np.float32)
    blocks[0] = sentence
    for back, turn in enumerate(reversed(context[-turns:])):
        blocks[1 + len(ROLES) * back + ROLES.index(turn.role)] = turn.encoding.sentence
    if context:
        blocks[-1] = (
            sentence * context[-1].encoding.sentence * np.float32(dim**0.5)
        )  # back to about unit length
    return blocks.reshape(-1)


@dataclass(frozen=True)
class ContextHead:
    """A linear head over `features`; without any earlier turn it answers "skipped" rather than guess, unless params.alone
    says that it has learnt from such turns too."""

    spec: Spec
    weight: NDArray[np.float32]  # [labels, (2 + 2 * turns) * dim]
    bias: NDArray[np.float32]  # [labels]
    turns: int
    version: str = ""

    @classmethod
    def load(cls, folder: Path) -> ContextHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        turns = spec.params.get("turns")
        if not isinstance(turns, int) or turns < 1 or turns > 16:
            raise HeadInvalid(
                spec.name, found=f"params.turns = {turns!r}", expected="a whole number from 1 to 16"
            )
        expect_shapes(spec, tensors, {"weight": (len(spec.labels), None), "bias": (len(spec.labels),)})
        width, blocks = tensors["weight"].shape[1], 2 + len(ROLES) * turns
        if width % blocks:
            raise HeadInvalid(
                spec.name, found=f"weights {width} wide", expected=f"a multiple of {blocks} for {turns} turns"
            )
        return cls(spec, tensors["weight"], tensors["bias"], turns, version)

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        write(
            folder,
            self.spec,
            {"weight": self.weight.astype(np.float16), "bias": self.bias.astype(np.float32)},
        )

    @property
    def dim(self) -> int:
        """Width of the vectors this head reads."""
        return int(self.weight.shape[1]) // (2 + len(ROLES) * self.turns)

    def annotate(self, heard: Heard) -> Annotation:
        """Answer the best hypothesis in its context."""
        spec = self.spec
        if not heard.context and not spec.params.get("alone"):
            return Annotation(
                spec.name,
                spec.kind,
                Status.SKIPPED,
                version=self.version,
                note="needs an earlier turn; none was sent",
            )
        rows = features(heard.encodings[heard.best].sentence, heard.context, self.turns)[None]
        return answered(spec, self.version, rows @ self.weight.T + self.bias, (1.0,))
