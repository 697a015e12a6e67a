"""Hits to candidates: a transparent linear score over a few features of the reply, the user's mood and the last turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import mul
from pathlib import Path

from annotators.annotator import Annotation
from index.items import EVERYONE
from index.replies import Hit
from nlu.errors import EngineRefused
from nlu.types import Candidate

FILE = "ranker.json"
FEATURES = ("similarity", "same_mood", "other_mood", "own_voice", "weight", "repeated")
DEFAULT_WEIGHTS = {
    "similarity": 1.0,
    "same_mood": 0.15,  # the reply was written for the mood the user is in
    "other_mood": -0.20,  # ... or for another one
    "own_voice": 0.05,  # only this persona may say it, against what anyone may say
    "weight": 0.10,  # the editor's own preference, 1 = ordinary
    "repeated": -1.0,  # the assistant said it in the turns sent along
}


@dataclass(frozen=True)
class Ranker:
    """score = sum of weight * feature; higher is better."""

    weights: Mapping[str, float]
    mood_head: str = "emotion"

    @classmethod
    def load(cls, folder: Path) -> Ranker:
        """Read ranker.json; raises EngineRefused."""
        try:
            weights = json.loads((folder / FILE).read_bytes())["weights"]
            ordered = {name: float(weights[name]) for name in FEATURES}
            if not all(map(isfinite, ordered.values())):
                raise ValueError("a weight that is not finite")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineRefused(
                "ranker",
                found=f"an unreadable {FILE} ({error})",
                expected=f"weights for {', '.join(FEATURES)}",
                remedy="rebuild it",
            ) from error
        return cls(ordered)

    def rank(
        self,
        hits: Sequence[Hit],
        annotations: Sequence[Annotation],
        said: frozenset[str],
        *,
        k: int,
        explain: bool,
    ) -> tuple[Candidate, ...]:
        """The best k of the hits. `said` holds the assistant's recent turns, case-folded."""
        if not hits:
            return ()
        mood, strength = self._mood(annotations)
        weights = [self.weights[name] for name in FEATURES]
        rows = [_features(hit, mood, strength, said) for hit in hits]
        scores = [sum(map(mul, weights, row)) for row in rows]
        best = sorted(range(len(hits)), key=scores.__getitem__, reverse=True)[:k]
        return tuple(
            Candidate(
                id=hits[i].item.id,
                text=hits[i].item.text,
                score=scores[i],
                similarity=hits[i].similarity,
                prompt=hits[i].item.prompt,
                features=dict(zip(FEATURES, rows[i], strict=True)) if explain else {},
            )
            for i in best
        )

    def _mood(self, annotations: Sequence[Annotation]) -> tuple[str, float]:
        for annotation in annotations:
            if annotation.name == self.mood_head and annotation.labels and annotation.labels[0].accepted:
                return annotation.labels[0].label, annotation.labels[0].score
        return "", 0.0


def _features(hit: Hit, mood: str, strength: float, said: frozenset[str]) -> tuple[float, ...]:
    item = hit.item
    return (
        hit.similarity,
        strength if item.emotion and item.emotion == mood else 0.0,
        strength if item.emotion and item.emotion != mood else 0.0,
        0.0 if item.persona_mask == EVERYONE else 1.0,
        item.weight - 1.0,
        1.0 if said and item.text.casefold() in said else 0.0,
    )
