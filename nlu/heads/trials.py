"""What a head would be with less: the learning curve, few phrases a label, cross-validation, and no context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators.answers import Answers, Rows
from annotators.context import ContextHead
from annotators.fit import Fitted, Plan, context_rows
from annotators.learners import Learner, LinearLearner
from nlu.heads.config import HeadConfig
from nlu.heads.material import Material, Materials
from nlu.heads.verdict import share

FloatArray = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_SHARES = (0.1, 0.25, 0.5)
_HELD_OUT = 5  # where there is no test split, one row in so many is kept for the learning curve


def run(config: HeadConfig, plan: Plan, made: Fitted[Any], materials: Materials, progress: Progress) -> dict[str, Any]:  # fmt: skip
    """The sections that the config asks for; labels that exclude each other only."""
    if config.multi:
        return {}
    trial = Trial(config, plan, made, materials)
    found: dict[str, Any] = {}
    if config.learning_curve and config.kind != "boosted":
        found["learning_curve"] = trial.learning_curve()
    if config.kind == "context":
        found["ablation"] = trial.ablation()
    if config.shots:
        found["few_shot"] = [trial.few_shot(shots, config.shot_seeds, progress) for shots in config.shots]
    if config.cross_validate:
        found["cross_validation"] = trial.cross_validation(config.cross_validate, progress)
    return found


class Trial:
    """Training and testing rows of one head, as features, and how it was fitted."""

    def __init__(self, config: HeadConfig, plan: Plan, made: Fitted[Any], materials: Materials) -> None:
        self._config, self._plan, self._strength = config, plan, made.learnt.strength
        self._turns = made.head.turns if isinstance(made.head, ContextHead) else 0
        self._train = materials.train
        self._rows = self._features(materials.train, self._turns)
        self._answers = replace(materials.train.answers(exclusive=True), weights=None)
        self._test = materials.test if len(materials.test) else None

    def learning_curve(self) -> list[dict[str, Any]]:
        """Accuracy with shares of the training rows, every label's thinned alike."""
        seen, rows, wanted = self._exam()
        order = np.random.default_rng(self._plan.seed).permutation(seen)
        found = []
        for part in _SHARES:
            chosen = self._thinned(order, part)
            found.append(
                {
                    "rows": len(chosen),
                    "accuracy": self._score(self._learner(), chosen, self._rows, rows, wanted),
                }
            )
        return found

    def ablation(self) -> list[dict[str, Any]]:
        """Accuracy without the turns before, and with more and more of them."""
        found = []
        for turns in range(self._turns + 1):
            features = self._features(self._train, turns)
            seen, rows, wanted = self._exam(turns)
            score = self._score(self._learner(), seen, features, rows, wanted)
            name = f"with {turns} turn{'s' * (turns > 1)} before" if turns else "text alone"
            found.append({"features": name, "accuracy": score})
        return found

    def few_shot(self, shots: int, seeds: int, progress: Progress) -> dict[str, Any]:
        """Mean accuracy with so many phrases a label, over draws."""
        seen, rows, wanted = self._exam()
        scores = []
        for seed in range(seeds):
            chosen = drawn(self._answers.codes, seen, shots, seed)
            learner = (
                LinearLearner((self._few_strength(),)) if not self._config.hidden else self._plan.learner
            )
            scores.append(self._score(learner, chosen, self._rows, rows, wanted)["value"])
            progress(f"{shots} phrases a label", seed + 1, seeds)
        low, high = np.percentile(scores, [2.5, 97.5])
        return {
            "shots": shots,
            "seeds": seeds,
            "accuracy": {"value": float(np.mean(scores)), "low": float(low), "high": float(high)},
        }

    def cross_validation(self, folds: int, progress: Progress) -> dict[str, Any]:
        """Accuracy of each fold by a head that was fitted, strength and all, on the others."""
        hits = 0
        deal = self._answers.folds(folds, self._plan.seed)
        for number, (seen, unseen) in enumerate(deal, 1):
            inner = next(iter(self._answers.take(seen).folds(self._plan.folds, self._plan.seed)))
            strength = self._best(seen[inner[0]], seen[inner[1]])
            model = next(
                iter(self._plan.learner.path(self._rows[seen], self._answers.take(seen), (strength,)))
            )
            hits += int((model.raw(self._rows[unseen]).argmax(axis=1) == self._answers.codes[unseen]).sum())
            progress("cross-validation", number, len(deal))
        return {"folds": len(deal), "accuracy": share(hits, len(self._answers))}

    def _best(self, seen: Rows, unseen: Rows) -> float:
        strengths = sorted(self._plan.learner.strengths)
        models = self._plan.learner.path(self._rows[seen], self._answers.take(seen), strengths, loosely=True)
        wanted = self._answers.codes[unseen]
        scores = [float((model.raw(self._rows[unseen]).argmax(axis=1) == wanted).mean()) for model in models]
        return strengths[int(np.argmax(scores))]

    def _learner(self) -> Learner:
        return self._plan.learner

    def _few_strength(self) -> float:
        """Few phrases carry less evidence a label, not more noise: the weights may be as large as with many."""
        strengths = self._plan.learner.strengths
        return float(max(self._strength, strengths[len(strengths) // 2]))

    def _features(self, material: Material, turns: int) -> FloatArray:
        return context_rows(material.encodings, material.contexts, turns) if turns else material.vectors

    def _exam(self, turns: int | None = None) -> tuple[Rows, FloatArray, NDArray[np.bool_]]:
        """Training rows, and the features and labels of those that are asked: the test split, or a part of training."""
        turns = self._turns if turns is None else turns
        everyone = np.arange(len(self._answers))
        if self._test is not None:
            return everyone, self._features(self._test, turns), self._test.wanted(self._answers.names)
        kept = everyone % _HELD_OUT == 0
        rows = self._features(self._train, turns)
        return everyone[~kept], rows[kept], self._answers.wanted[kept]

    def _thinned(self, order: Rows, part: float) -> Rows:
        """The first rows of each label in this order, at least one of each."""
        codes = self._answers.codes[order]
        chosen = []
        for label in range(len(self._answers.names)):
            mine = order[codes == label]
            chosen.append(mine[: max(1, round(part * len(mine)))])
        return np.sort(np.concatenate(chosen))

    def _score(self, learner: Learner, seen: Rows, features: FloatArray, rows: FloatArray, wanted: NDArray[np.bool_]) -> dict[str, float]:  # fmt: skip
        strengths = tuple(learner.strengths)
        strength = self._strength if self._strength in strengths else strengths[0]
        answers = _present(self._answers.take(seen))
        model = next(iter(learner.path(features[seen], answers[0], (strength,), loosely=True)))
        best = answers[1][model.raw(rows).argmax(axis=1)]
        return share(int(wanted[np.arange(len(wanted)), best].sum()), len(wanted))


def _present(answers: Answers) -> tuple[Answers, Rows]:
    """The answers with only the labels that some row has, and those labels' numbers."""
    there = np.flatnonzero(answers.wanted.any(axis=0))
    return replace(
        answers, names=tuple(answers.names[i] for i in there), wanted=answers.wanted[:, there]
    ), there


def drawn(codes: NDArray[np.int64], seen: Rows, shots: int, seed: int) -> Rows:
    """`shots` rows of each label among the seen ones, or all where there are fewer."""
    rng = np.random.default_rng(seed)
    mine = codes[seen]
    return np.sort(
        np.concatenate([rng.permutation(seen[mine == label])[:shots] for label in np.unique(mine)])
    )
