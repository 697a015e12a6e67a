"""A toy index whose geometry is known: where phrases stand is decided here, and what an adapter can mend is built in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.build import Entry, build
from nlu.heads.questions import Library, read_library

DIM = 24
Floats = NDArray[np.float32]


def make_library(
    folder: Path, prompts: Mapping[str, Sequence[str]], vectors: Mapping[str, Floats]
) -> Library:
    """An index of `prompts`, reply id to phrases, where every phrase has its vector; read back from its folder.

    A phrase without one, such as half of a prompt, stands where the first phrase with its words stands.
    """

    def vector(asked: str) -> Floats:
        words = set(asked.split())
        return vectors[
            asked if asked in vectors else next(each for each in vectors if words <= set(each.split()))
        ]

    entries = [
        Entry(id=reply, text=f"About {reply}.", prompt=each) for reply in prompts for each in prompts[reply]
    ]
    rows = np.stack([vectors[entry.prompt] for entry in entries])
    build(entries, rows, folder, personas=(), surfaces=(), shard_rows=64)
    return read_library(folder, lambda phrases: np.stack([vector(each) for each in phrases]), uncased=True)


def make_world(folder: Path, *, clash: bool = False, seed: int = 0) -> tuple[Library, dict[str, list[str]]]:
    """Twenty old replies of five prompts, six new ones of one, and eight phrases for each of those.

    All new phrases are off their rows in one direction, where an old reply stands; moving them back does nobody harm. With
    `clash` they are what people say for old replies, so that what helps them must harm.
    """
    rng = np.random.default_rng(seed)

    def near(centre: Floats, spread: float) -> Floats:
        noise = rng.standard_normal(DIM)
        return _unit(centre + spread * noise / np.linalg.norm(noise))

    old = {f"old{i}": _unit(rng.standard_normal(DIM)) for i in range(20)}
    new = {f"new{i}": _unit(rng.standard_normal(DIM)) for i in range(6)}
    vectors: dict[str, Floats] = {}
    prompts: dict[str, list[str]] = {}
    for reply, centre in (old | new).items():
        prompts[reply] = [f"{reply} prompt {i}" for i in range(5 if reply in old else 1)]
        vectors.update({phrase: near(centre, 1.4 if clash else 0.6) for phrase in prompts[reply]})
    pairs: dict[str, list[str]] = {}
    for k, (reply, centre) in enumerate(new.items()):
        for i in range(8):
            wanted = old[f"old{k}"] if clash else _unit(centre + old["old19"])
            vectors[f"{reply} phrase {i}"] = near(wanted, 0.5)
            pairs[f"{reply} phrase {i}"] = [reply]
    return make_library(folder, prompts, vectors), pairs


def _unit(vector: NDArray[np.floating]) -> Floats:
    unit: Floats = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit
