"""What a head would be with less: the learning curve, few phrases a label, cross-validation, and no context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotators.answers import Answers, Rows
from annotators.context import ContextHead
from annotators.fit import Fitted, Plan, context_rows
from annotators.learners import Learner
from nlu.heads.config import HeadConfig
from nlu.heads.material import Material, Materials
from nlu.heads.verdict import share

FloatArray = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_SHARES = (0.1, 0.25, 0.5)
_HELD_OUT = 5  # where there is no test split, one row in so many is kept for the learning curve


def run(
    config: HeadConfig, plan: Plan, made: Fitted[Any], materials: Materials, progress: Progress
) -> dict[str, Any]:
    """The sections that the config asks for; labels that exclude each other only."""
    if config.multi:
        return {}
    trial = Trial(plan, made, materials)
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

    def __init__(self, plan: Plan, made: Fitted[Any], materials: Materials) -> None:
        self._plan, self._strength = plan, made.learnt.strength
        self._turns = made.head.turns if isinstance(made.head, ContextHead) else 0
        self._train = materials.train
        self._rows = self._features(materials.train, self._turns)
        self._answers = replace(materials.train.answers(exclusive=True), weights=None)
        self._test = materials.test if len(materials.test) else None

    def learning_curve(self) -> list[dict[str, Any]]:
        """Accuracy with shares of the training rows, every label's thinned alike."""
        exam = self._exam(self._turns)
        order = np.random.default_rng(self._plan.seed).permutation(exam.seen)
        parts = [self._thinned(order, part) for part in _SHARES]
        return [
            {"rows": len(part), "accuracy": exam.score(self._plan.learner, self._strength, part)}
            for part in parts
        ]

    def ablation(self) -> list[dict[str, Any]]:
        """Accuracy without the turns before, and with more and more of them."""
        found = []
        for turns in range(self._turns + 1):
            exam = self._exam(turns)
            name = f"with {turns} turn{'s' * (turns > 1)} before" if turns else "text alone"
            score = exam.score(self._plan.learner, self._strength, exam.seen)
            found.append({"features": name, "accuracy": score})
        return found

    def few_shot(self, shots: int, seeds: int, progress: Progress) -> dict[str, Any]:
        """Mean accuracy with so many phrases a label, over draws."""
        exam = self._exam(self._turns)
        scores = []
        for seed in range(seeds):
            chosen = drawn(self._answers.codes, exam.seen, shots, seed)
            scores.append(exam.score(self._plan.learner, self._few_strength(), chosen)["value"])
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
            exam = Exam(seen, self._rows, self._answers, self._rows[unseen], self._answers.wanted[unseen])
            hits += exam.hits(self._plan.learner, [self._best(seen)], seen, loosely=False)[0]
            progress("cross-validation", number, len(deal))
        return {"folds": len(deal), "accuracy": share(hits, len(self._answers))}

    def _best(self, rows: Rows) -> float:
        """The strength that is best on a part of these rows, with the others to learn from."""
        kept = np.random.default_rng(self._plan.seed).permutation(len(rows)) % self._plan.folds == 0
        asked = rows[kept]
        exam = Exam(rows[~kept], self._rows, self._answers, self._rows[asked], self._answers.wanted[asked])
        strengths = sorted(self._plan.learner.strengths)
        return strengths[int(np.argmax(exam.hits(self._plan.learner, strengths, exam.seen)))]

    def _few_strength(self) -> float:
        """Few phrases carry less evidence a label, not more noise: the weights may be as large as with many."""
        strengths = self._plan.learner.strengths
        return max(self._strength, strengths[len(strengths) // 2])

    def _features(self, material: Material, turns: int) -> FloatArray:
        return context_rows(material.encodings, material.contexts, turns) if turns else material.vectors

    def _exam(self, turns: int) -> Exam:
        """The test split is asked, or without one a part of the training rows."""
        everyone = np.arange(len(self._answers))
        rows = self._rows if turns == self._turns else self._features(self._train, turns)
        if self._test is not None:
            asked, wanted = self._features(self._test, turns), self._test.wanted(self._answers.names)
            return Exam(everyone, rows, self._answers, asked, wanted)
        kept = everyone % _HELD_OUT == 0
        return Exam(everyone[~kept], rows, self._answers, rows[kept], self._answers.wanted[kept])

    def _thinned(self, order: Rows, part: float) -> Rows:
        """The first rows of each label in this order, at least one of each."""
        codes = self._answers.codes[order]
        chosen = []
        for label in range(len(self._answers.names)):
            mine = order[codes == label]
            chosen.append(mine[: max(1, round(part * len(mine)))])
        return np.sort(np.concatenate(chosen))


@dataclass(frozen=True, slots=True)
class Exam:
    """Rows that may be learnt from, and what is asked then."""

    seen: Rows
    rows: FloatArray  # [rows, features] of all rows, of which some may be seen
    answers: Answers  # [rows]
    asked: FloatArray  # [asked, features]
    wanted: NDArray[np.bool_]  # [asked, labels]

    def score(self, learner: Learner, strength: float, chosen: Rows) -> dict[str, float]:
        """Accuracy after learning from some of the seen rows."""
        return share(self.hits(learner, [strength], chosen)[0], len(self.wanted))

    def hits(
        self, learner: Learner, strengths: Sequence[float], chosen: Rows, *, loosely: bool = True
    ) -> list[int]:
        """How many answers are right after learning from these rows, by strength, ascending.

        Labels that none of the rows has are not known then.
        """
        answers = self.answers.take(chosen)
        there = np.flatnonzero(answers.wanted.any(axis=0))
        if len(there) == 1:
            return [int(self.wanted[:, there].sum())] * len(strengths)
        names = tuple(answers.names[i] for i in there)
        answers = replace(answers, names=names, wanted=answers.wanted[:, there])
        models = learner.path(self.rows[chosen], answers, strengths, loosely=loosely)
        bests = [there[model.raw(self.asked).argmax(axis=1)] for model in models]
        return [int(self.wanted[np.arange(len(best)), best].sum()) for best in bests]


def drawn(codes: NDArray[np.int64], seen: Rows, shots: int, seed: int) -> Rows:
    """`shots` rows of each label among the seen ones, or all where there are fewer."""
    rng = np.random.default_rng(seed)
    mine = codes[seen]
    return np.sort(
        np.concatenate([rng.permutation(seen[mine == label])[:shots] for label in np.unique(mine)])
    )
