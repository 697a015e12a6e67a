"""Dialogs made up: about a thing each, whose name is what tells a true reply."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def silent(*_: object) -> None: ...


def word(rng: np.random.Generator, letters: int) -> str:
    return "".join(rng.choice([*LETTERS], letters))


def write_dialogs(path: Path, count: int, *, turns: int = 5) -> Path:
    """Dialogs about a thing each: every reply names it, among so many other letters that vectors hardly show it."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        thing = word(rng, 8)
        texts = [f"{thing} {word(rng, 5)} {' '.join(word(rng, 4) for _ in range(6))}" for _ in range(turns)]
        speakers = [{"speaker": "AB"[i % 2], "text": text} for i, text in enumerate(texts)]
        lines.append(json.dumps({"id": f"d{number}", "turns": speakers}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
