"""Canaries: 64 phrases with the vectors an artifact was built from, encoded again wherever it is loaded.

They catch what digests cannot: another runtime, another CPU's kernels, a forged fingerprint. Every artifact of one
vectorizer carries the same file, byte for byte, so a store keeps one blob and an engine checks it once.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nlu.errors import EngineRefused
from nlu.vectorizer import Vectorizer

FILE = "canaries.safetensors"
# int8 kernels of different CPU generations agree to about 0.999; another model of the same width is near 0.
MIN_COSINE = 0.99
MAX_DIFFERENCE = 0.05
MIN_PHRASES, MAX_PHRASES = 64, 1024  # fewer prove little; more only hold up a load

PHRASES = tuple(
    """
    wake me at six|what's on today|it's raining again|play something slow|stop|who was that on the phone
    turn the big lamp off|i'm home|call my sister back|how far is the airport|we need more flour|seven times eight
    what does serendipity mean|say that once more|good night then|nobody asked you|is the back door shut
    thirty minutes for the pasta|when does the match start|remind me about the bins|sing me something
    i don't feel well|that was brilliant|are you a real person|book a table for two|next one please
    louder|not so loud|the blue one|because i said so|tell anna i'm late|where did i leave off
    what should i wear to the wedding|my train is cancelled|how many grams in a pound|translate good luck into czech
    cheapest way to the station|show me the list|delete the second one|yes|no thank you|maybe later
    what year did the war end|find a pharmacy that is open now|make the bedroom warmer|start the vacuum downstairs
    i've had enough of this|happy birthday grandma|what time is it in lima|never mind|do i have any messages
    change the colour to green|skip the intro|five hundred yen in euros|is anyone there|the soup is too salty
    доброе утро|поставь будильник на семь|какая завтра погода|включи музыку потише|мне грустно|спасибо
    über die brücke und links|¿qué hora es
    """.strip()
    .replace("\n", "|")
    .split("|")
)
_NORMALIZED = tuple(" ".join(phrase.split()) for phrase in PHRASES)


def write(folder: Path, vectorizer: Vectorizer) -> None:
    """Put the canaries of this vectorizer into an artifact's folder."""
    vectors = np.stack([e.sentence for e in vectorizer.encode(_NORMALIZED, tokens=False)]).astype(np.float16)
    metadata = {"phrases": json.dumps(_NORMALIZED, ensure_ascii=False), "vectorizer": vectorizer.fingerprint}
    (folder / FILE).write_bytes(_stable(save({"vectors": vectors}, metadata=metadata)))


def made_for(folder: Path) -> str | None:
    """The fingerprint of the vectorizer an artifact was built on; None for a part that depends on none."""
    if not (folder / FILE).exists():
        return None
    try:
        with safe_open(folder / FILE, "numpy") as file:
            return str((file.metadata() or {})["vectorizer"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / FILE}: unreadable ({error}); build the part again") from error


def check(part: str, folder: Path, vectorizer: Vectorizer) -> None:
    """Raise EngineRefused unless this vectorizer still gives the vectors the artifact was built from."""
    remedy = "rebuild the part with the bundle's vectorizer, or serve it with the vectorizer it was built on"
    try:
        with safe_open(folder / FILE, "numpy") as file:
            stored = file.get_tensor("vectors").astype(np.float32)
            phrases = [*map(str, json.loads((file.metadata() or {})["phrases"]))]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise EngineRefused(
            part, found=f"no readable {FILE}", expected="the canaries of its vectorizer", remedy=remedy
        ) from error
    if not MIN_PHRASES <= len(phrases) <= MAX_PHRASES:
        expected = f"{MIN_PHRASES} to {MAX_PHRASES}"
        raise EngineRefused(part, found=f"{len(phrases)} canary phrases", expected=expected, remedy=remedy)
    if stored.shape != (len(phrases), vectorizer.dim):
        found = f"canary vectors of shape {stored.shape}"
        raise EngineRefused(part, found=found, expected=f"({len(phrases)}, {vectorizer.dim})", remedy=remedy)
    fresh = np.stack([encoding.sentence for encoding in vectorizer.encode(phrases, tokens=False)])
    cosine = float((fresh * stored).sum(axis=1).min())
    difference = float(np.abs(fresh - stored).max())
    if not (cosine >= MIN_COSINE and difference <= MAX_DIFFERENCE):
        raise EngineRefused(
            part,
            found=f"canaries that moved (cosine {cosine:.4f}, largest difference {difference:.4f})",
            expected=f"cosine >= {MIN_COSINE}, difference <= {MAX_DIFFERENCE}",
            remedy=remedy,
        )


def _stable(file: bytes) -> bytes:
    """The same file with its header in order: safetensors writes metadata in the random order of a hash map."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]
