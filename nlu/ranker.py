"""Hits to candidates: a score over named features of each (nlu/features.py), then a choice that repeats nothing.

A `linear` ranker is a line a feature in ranker.json, which an editor can read and change. A ranker of `trees` is learnt from
dialogs by `nlu index train-ranker` and runs as ONNX beside its ranker.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from index.replies import Hit
from nlu.errors import EngineRefused
from nlu.features import Features, Said, Situation, repeats
from nlu.graphs import check_graph
from nlu.types import Candidate

FORMAT: Literal[1] = 1
FILE, MODEL_FILE = "ranker.json", "model.onnx"
INPUT, OUTPUT = "features", "scores"  # of the graph: [rows, features] to [rows, 1]
DEFAULT_WEIGHTS = {
    "similarity": 1.0,
    "same_mood": 0.15,  # the reply was written for the mood the user is in
    "other_mood": -0.20,  # ... or for another one
    "own_voice": 0.05,  # only this persona may say it, against what anyone may say
    "weight": 0.10,  # the editor's own preference, 1 = ordinary
    "repeated": -1.0,  # the assistant said it in the turns sent along
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Requires(_Strict):
    """What the ranker was made for."""

    vectorizer: str = Field(pattern=r"^[0-9a-f]{64}$")


class Spec(_Strict):
    """ranker.json. Features are named by `weights` where the ranker is linear, by `features` where it is trees."""

    format: Literal[1] = FORMAT
    kind: Literal["linear", "trees"] = "linear"
    features: tuple[str, ...] = ()
    weights: dict[str, float] = {}
    diversity: float = Field(default=0.0, ge=0.0, le=1.0)  # 0 = by score alone
    requires: Requires | None = None
    trained: dict[str, Any] = {}  # on what, and how
    metrics: dict[str, float] = {}

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "linear" and (not self.weights or self.features):
            raise ValueError("a linear ranker has weights, which name its features, and no list of features")
        if self.kind == "trees" and (not self.features or self.weights):
            raise ValueError("a ranker of trees has a list of features and no weights")
        if self.kind == "trees" and self.requires is None:
            raise ValueError("a ranker of trees requires the vectorizer it was trained on")
        return self


@dataclass(frozen=True)
class Ranker:
    """A score for each hit, higher is better. Immutable and thread-safe."""

    spec: Spec
    features: Features
    model: bytes = b""  # trees only
    session: Any = None  # onnxruntime.InferenceSession of the model, one thread

    @classmethod
    def linear(cls, weights: Mapping[str, float] = DEFAULT_WEIGHTS, *, diversity: float = 0.0) -> Ranker:
        """score = sum of weight * feature; raises ValueError for a feature that is none."""
        return cls(Spec(weights=dict(weights), diversity=diversity), Features.of([*weights]))

    @classmethod
    def trees(cls, spec: Spec, model: bytes) -> Ranker:
        """A ranker of a serialised graph; raises ValueError where the graph is not one for these features."""
        features = Features.of(spec.features)
        ranker = cls(spec, features, model, _session(model, len(features.names)))
        try:
            found = ranker.score(np.zeros((2, len(features.names)), np.float32))
        except Exception as error:  # onnxruntime raises its own errors, which share no base but this
            raise ValueError(
                f"{MODEL_FILE}: found a graph that does not run ({type(error).__name__}), expected one for any number of"
                f" float32 rows {len(features.names)} wide; train the ranker again"
            ) from error
        if found.shape != (2,) or not np.isfinite(found).all():
            raise ValueError(
                f"{MODEL_FILE}: found scores {found.tolist()}, expected one a row, and finite; train the ranker again"
            )
        return ranker

    @classmethod
    def load(cls, folder: Path) -> Ranker:
        """The ranker in a folder; raises EngineRefused."""
        try:
            spec = Spec.model_validate_json((folder / FILE).read_bytes())
            if spec.kind == "trees":
                return cls.trees(spec, (folder / MODEL_FILE).read_bytes())
            return cls(spec, Features.of([*spec.weights]))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or FILE
            raise _refused(f"{where}: {first['msg']}") from error
        except (OSError, ValueError) as error:
            raise _refused(str(error)) from error

    def save(self, folder: Path) -> None:
        """Write the folder; the same ranker gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        told = self.spec.model_dump(mode="json", exclude_defaults=True) | {"format": FORMAT}
        told["kind"] = self.spec.kind
        text = json.dumps(told, ensure_ascii=False, sort_keys=True, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        if self.session is not None:
            (folder / MODEL_FILE).write_bytes(self.model)

    def score(self, table: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        """[rows] of features [rows, features]."""
        if self.session is None:
            # Not by `@`, whose rounding may depend on a row's place: equal hits must have equal scores.
            total: NDArray[np.float64] = (table * np.array([*self.spec.weights.values()])).sum(axis=1)
            return total
        scores: NDArray[np.float32] = self.session.run([OUTPUT], {INPUT: table})[0]
        return scores[:, 0] if scores.shape[1:] == (1,) else scores

    def rank(
        self, hits: Sequence[Hit], situation: Situation, said: Said, *, k: int, explain: bool
    ) -> tuple[Candidate, ...]:
        """The best k of the hits. What the assistant said in the turns sent along comes after all else.

        Equals stay in the order of the hits. `said` is the retriever's, and is called only where it is needed.
        """
        if not hits:
            return ()
        table = self.features.table(situation, hits, said)
        scores = self.score(table).tolist()
        order = sorted(range(len(hits)), key=scores.__getitem__, reverse=True)
        repeated = repeats(situation, hits)
        fresh = [i for i in order if not repeated[i]]
        if self.spec.diversity and len(fresh) > 1:
            vectors = said([hits[i] for i in fresh])
            fresh = [fresh[i] for i in diverse([scores[i] for i in fresh], vectors, self.spec.diversity, k)]
        best = [*fresh, *(i for i in order if repeated[i])][:k]
        return tuple(
            Candidate(
                id=hits[i].item.id,
                text=hits[i].item.text,
                score=scores[i],
                similarity=hits[i].similarity,
                prompt=hits[i].item.prompt,
                features=dict(zip(self.features.names, table[i].tolist(), strict=True)) if explain else {},
            )
            for i in best
        )


def diverse(scores: Sequence[float], vectors: NDArray[np.float32], diversity: float, k: int) -> list[int]:
    """The first k of rows that come best first, each as good and as unlike the ones before it as can be.

    Maximal marginal relevance (Carbonell and Goldstein, 1998): the next one has the largest (1 - diversity) * relevance -
    diversity * (its largest cosine to one already taken). Relevance is the score, from 0 for the worst row to 1 for the
    best, since scores of trees have no scale of their own. The best row always stays first.
    """
    if not scores:
        return []
    spread = scores[0] - scores[-1] or 1.0
    relevance = (np.array(scores) - scores[-1]) / spread
    cosines = vectors @ vectors.T
    taken = [0]
    closest = cosines[0].astype(np.float64)
    while len(taken) < min(k, len(scores)):
        marginal = (1 - diversity) * relevance - diversity * closest
        marginal[taken] = -np.inf
        taken.append(int(marginal.argmax()))
        closest = np.maximum(closest, cosines[taken[-1]])
    return taken


def _session(model: bytes, width: int) -> Any:
    """The graph, from its bytes, so that nothing outside the verified folder can be pulled in; raises ValueError."""
    check_graph(model, MODEL_FILE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a graph that is refused is refused by us, in words
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own errors, which share no base but this
        raise ValueError(
            f"{MODEL_FILE}: found a graph that does not load ({type(error).__name__}), expected an ONNX model;"
            " train the ranker again"
        ) from error
    inputs = [(node.name, node.shape[1:]) for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    if inputs != [(INPUT, [width])] or OUTPUT not in outputs:
        raise ValueError(
            f"{MODEL_FILE}: found inputs {inputs} and outputs {outputs}, expected {INPUT} [rows, {width}], one column a"
            f" feature, and {OUTPUT}; train the ranker again"
        )
    return session


def _refused(found: str) -> EngineRefused:
    return EngineRefused("ranker", found=found, expected=f"a {FILE} of format {FORMAT}", remedy="rebuild it")
