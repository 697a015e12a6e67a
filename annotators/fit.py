"""Training heads on frozen vectors, without torch.

Every kind goes the same way: choose the strength on folds, calibrate and set thresholds on the folds' held-out scores, fit
once more on everything, keep golden phrases. Nothing here ever sees a test split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from annotators import calibration, fit_outside, golden, prior, thresholds
from annotators.annotator import Encoding, HeardTurn
from annotators.answers import Answers, HeldOut, Rows
from annotators.boosted import BoostedHead
from annotators.context import ContextHead, features
from annotators.fit_outside import FittedOutside
from annotators.head import Golden, GoldenTurn, Requires, Spec
from annotators.learners import BoostedLearner, BoostedModel, HiddenModel, Learner, LinearLearner, Model
from annotators.linear import Linear
from annotators.sentence import SentenceHead, link, linked
from annotators.table import Head

FloatArray = NDArray[np.float32]
HeadT = TypeVar("HeadT", bound=Head)

FOLDS = 3
_ALONE = 0.02  # of the phrases without any turn before, from which a head in context answers such phrases
_FLAT = 1e-3  # scale of a label whose scores say nothing: next to none, and yet in their order
_ALL_FOLDS_CHOOSE = (
    5 * 10**7
)  # rows x features x labels, up to where every fold is asked which strength is best


@dataclass(frozen=True, slots=True)
class About:
    """What every head records of itself."""

    name: str
    task: str
    fingerprint: str
    made_by: str = "annotators.fit"


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Rows of another origin: trained on, but never measured on, and their texts are never kept."""

    vectors: FloatArray  # [rows, dim]
    labels: Sequence[str]


@dataclass(frozen=True, slots=True)
class Dev:
    """Rows nobody trains on, held against calibration and thresholds beside the folds' held-out rows."""

    rows: FloatArray  # [rows, features]
    answers: Answers  # with the training rows' names


@dataclass(frozen=True, slots=True)
class Plan:
    """How heads of classes are fitted."""

    learner: Learner = LinearLearner()
    folds: int = FOLDS
    balanced: bool = False  # rare labels count as much as frequent ones
    beta: float = thresholds.DEFAULT_BETA
    outside_share: float = fit_outside.SHARE  # of all phrases, that are expected to be out of scope
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Learnt:
    """A fitted model, what its scores mean, and what the folds said of it."""

    model: Model
    strength: float
    losses: dict[float, float]  # strength -> calibrated log-loss of held-out rows
    scale: tuple[float, ...]  # [labels]
    shift: tuple[float, ...]
    thresholds: tuple[float, ...]
    outside: FittedOutside | None
    raw: FloatArray  # [held-out rows, labels]
    scores: FloatArray  # [held-out rows, labels], calibrated
    answers: Answers  # of the held-out rows
    promised: NDArray[np.float64]  # [labels] recall to be expected
    prior: dict[str, float] | None  # shares of what it says of held-out rows

    @property
    def metrics(self) -> dict[str, float]:
        """What head.json keeps."""
        wanted = self.answers.wanted
        right = wanted[np.arange(len(wanted)), self.scores.argmax(axis=1)]
        shares = wanted.sum(axis=0) / max(1, wanted.sum())
        return {
            "folds_accuracy": float(right.mean()),
            "promised_recall": float(self.promised @ shares),
            "phrases": float(len(wanted)),
            "regularisation": self.strength,
        }


@dataclass(frozen=True, slots=True)
class Fitted(Generic[HeadT]):
    """A head, and what it was learnt with."""

    head: HeadT
    learnt: Learnt


def fit_sentence(
    about: About,
    texts: Sequence[str],
    vectors: FloatArray,
    answers: Answers,
    *,
    plan: Plan = Plan(),
    outsiders: FloatArray | None = None,
    outside: bool = False,
    borrowed: Borrowed | None = None,
    dev: Dev | None = None,
) -> Fitted[SentenceHead]:
    """A linear head, or one with a hidden layer, on vectors [phrases, dim].

    `outsiders` [phrases, dim] belong to no label: they are not trained on, only held against the thresholds; with
    `outside` they also make the score of being out of scope. `borrowed` rows are trained on in every fold; strength,
    calibration, thresholds, golden phrases and metrics are those of the phrases themselves. Raises ValueError where they
    carry a label that no phrase has.
    """
    learnt = learn(
        vectors,
        answers,
        plan,
        outsiders=outsiders,
        outside=outside,
        more=_borrowed(borrowed, answers, vectors.shape[1]),
        dev=dev,
    )
    metrics = learnt.metrics | (
        {} if borrowed is None or not len(borrowed.labels) else {"borrowed": float(len(borrowed.labels))}
    )
    spec = _spec(about, "sentence", learnt, answers, metrics=metrics)
    centroids = None
    if spec.outside is not None and spec.outside.needs_centroids:
        centroids = centroids_of(vectors, answers)
    match learnt.model:
        case Linear(weight, bias):
            head = SentenceHead(spec, weight, bias, centroids=centroids)
        case HiddenModel(hidden, labels):
            head = SentenceHead(spec, labels.weight, labels.bias, hidden=hidden, centroids=centroids)
        case other:
            raise ValueError(
                f"learner: found {type(other).__name__}, expected a linear one or one with a hidden layer"
            )
    kept = _golden(texts, linked(spec, head.raw(vectors))[1], answers)
    return Fitted(replace(head, spec=spec.model_copy(update={"golden": kept})), learnt)


def fit_context(
    about: About,
    texts: Sequence[str],
    encodings: Sequence[Encoding],
    contexts: Sequence[Sequence[HeardTurn]],
    golden_turns: Sequence[Sequence[GoldenTurn]],
    answers: Answers,
    *,
    turns: int = 2,
    plan: Plan = Plan(),
    dev: Dev | None = None,
) -> Fitted[ContextHead]:
    """Logistic regression over annotators.context.features; `dev` rows are such features."""
    rows = context_rows(encodings, contexts, turns)
    learnt = learn(rows, answers, plan, dev=dev)
    if not isinstance(learnt.model, Linear):
        raise ValueError(
            f"learner: found {type(learnt.model).__name__}, expected a linear one for heads in context"
        )
    params: dict[str, Any] = {"turns": turns}
    if sum(not context for context in contexts) >= _ALONE * len(contexts):
        params["alone"] = True
    spec = _spec(about, "context", learnt, answers, params=params, metrics=learnt.metrics)
    kept = _golden(texts, linked(spec, learnt.model.raw(rows))[1], answers, golden_turns)
    head = ContextHead(
        spec.model_copy(update={"golden": kept}), learnt.model.weight, learnt.model.bias, turns
    )
    return Fitted(head, learnt)


def context_rows(
    encodings: Sequence[Encoding], contexts: Sequence[Sequence[HeardTurn]], turns: int
) -> FloatArray:
    """[phrases, features] of phrases in their contexts."""
    return np.stack(
        [
            features(encoding.sentence, context, turns)
            for encoding, context in zip(encodings, contexts, strict=True)
        ]
    )


def fit_boosted(
    about: About,
    texts: Sequence[str],
    vectors: FloatArray,
    answers: Answers,
    *,
    plan: Plan | None = None,
    outsiders: FloatArray | None = None,
    dev: Dev | None = None,
) -> Fitted[BoostedHead]:
    """Gradient-boosted trees on vectors [phrases, dim], as ONNX; labels exclude each other."""
    from annotators.trees import to_onnx  # imports onnx, which only these heads need

    if not answers.exclusive:
        raise ValueError(
            "labels: found several a phrase, expected one for boosted trees; train kind sentence"
        )
    learnt = learn(vectors, answers, plan or Plan(learner=BoostedLearner()), outsiders=outsiders, dev=dev)
    if not isinstance(learnt.model, BoostedModel):
        raise ValueError(f"learner: found {type(learnt.model).__name__}, expected boosted trees")
    spec = _spec(about, "boosted", learnt, answers, metrics=learnt.metrics)
    head = BoostedHead.of(spec, to_onnx(learnt.model, vectors.shape[1]))
    kept = _golden(texts, linked(spec, head.raw(vectors))[1], answers)
    return Fitted(replace(head, spec=spec.model_copy(update={"golden": kept})), learnt)


def learn(
    rows: FloatArray,
    answers: Answers,
    plan: Plan,
    *,
    outsiders: FloatArray | None = None,
    outside: bool = False,
    more: tuple[FloatArray, Answers] | None = None,
    dev: Dev | None = None,
) -> Learnt:
    """Choose, calibrate and fit a model of rows [phrases, features]; what every kind of classes goes through.

    `more` rows are trained on in every fold and never measured on. Outsiders without `outside` only push thresholds up.
    """
    strangers = np.zeros((0, rows.shape[1]), np.float32) if outsiders is None else outsiders
    lesson = _Lesson(rows, answers, plan, more, answers.folds(plan.folds, plan.seed))
    losses, tried = lesson.losses()
    strength = min(losses, key=losses.__getitem__)
    of_folds = tried.get(strength, [])
    of_folds += [
        next(lesson.path(seen, (strength,), loosely=True)) for seen, _ in lesson.folds[len(of_folds) :]
    ]
    held_out = lesson.held_out(of_folds, strangers)
    model = next(lesson.path(np.arange(len(answers)), (strength,), near=of_folds))
    judged = answers
    if dev is not None:
        held_out = _with_dev(held_out, dev, model, centroids_of(rows, answers))
        judged = replace(answers, weights=None).joined(replace(dev.answers, weights=None))

    scale, shift = _calibrated(held_out.raw, judged)
    fitted = None
    if outside and len(strangers):
        fitted = fit_outside.fit(
            held_out, scale[0], centroids=isinstance(model, Linear | HiddenModel), share=plan.outside_share, seed=plan.seed
        )  # fmt: skip
    scores = link(held_out.raw, scale, shift, exclusive=judged.exclusive)[1]
    limits, promised = _limits(scores, held_out, judged, fitted, scale, shift, plan)
    inside = None if fitted is None else fitted.inside_scores < fitted.outside.threshold
    said = prior.of_scores(judged.names, scores, limits, exclusive=judged.exclusive, inside=inside)
    return Learnt(
        model, strength, losses, scale, shift, limits, fitted, held_out.raw, scores, judged, promised, said
    )


def centroids_of(rows: FloatArray, answers: Answers) -> FloatArray:
    """[labels, features], unit length: the mean direction of each label's rows."""
    sums = answers.wanted.T.astype(np.float32) @ rows
    lengths = np.linalg.norm(sums, axis=1, keepdims=True).astype(np.float32)
    centroids: FloatArray = sums / np.maximum(lengths, np.float32(1e-9))
    return centroids


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is learnt from, how, and in which folds."""

    rows: FloatArray  # [rows, features]
    answers: Answers  # [rows]
    plan: Plan
    more: tuple[FloatArray, Answers] | None  # seen in every fold
    folds: list[tuple[Rows, Rows]]  # (seen, unseen)

    def path(
        self, seen: Rows, strengths: Sequence[float], *, loosely: bool = False, near: Sequence[Model] = ()
    ) -> Iterator[Model]:
        """A model of the seen rows for each strength; see annotators.learners.Learner."""
        mine, wanted = self.rows[seen], self.answers.take(seen)
        if self.plan.balanced:
            wanted = wanted.balanced()
        if self.more is not None and len(self.more[1]):
            mine, wanted = np.concatenate([mine, self.more[0]]), wanted.joined(self.more[1])
        return self.plan.learner.path(mine, wanted, strengths, loosely=loosely, near=near)

    def losses(self) -> tuple[dict[float, float], dict[float, list[Model]]]:
        """Calibrated log-loss of held-out rows by strength, ascending until it rises, and the models of the folds that
        were asked: all of them, or of large sets the first alone."""
        strengths = sorted(self.plan.learner.strengths)
        if len(strengths) == 1:
            return {strengths[0]: 0.0}, {}
        small = self.rows.size * len(self.answers.names) <= _ALL_FOLDS_CHOOSE
        asked = self.folds if small else self.folds[:1]
        mine = self.answers.take(np.concatenate([unseen for _, unseen in asked]))
        paths = [self.path(seen, strengths, loosely=True) for seen, _ in asked]
        losses: dict[float, float] = {}
        tried: dict[float, list[Model]] = {}
        for strength in strengths:
            tried[strength] = [next(models) for models in paths]
            raw = [
                model.raw(self.rows[unseen])
                for model, (_, unseen) in zip(tried[strength], asked, strict=True)
            ]
            losses[strength] = _loss(np.concatenate(raw), mine)
            if losses[strength] > min(losses.values()):
                break
        return losses, tried

    def held_out(self, models: Sequence[Model], strangers: FloatArray) -> HeldOut:
        """Scores of every row, and of every stranger, by a fold's model that did not see it."""
        labels = len(self.answers.names)
        raw, cosines = (np.zeros((len(self.rows), labels), np.float32) for _ in range(2))
        strange, strange_cosines = (np.zeros((len(strangers), labels), np.float32) for _ in range(2))
        for fold, ((seen, unseen), model) in enumerate(zip(self.folds, models, strict=True)):
            centroids = centroids_of(self.rows[seen], self.answers.take(seen))
            mine = np.arange(len(strangers)) % len(self.folds) == fold
            raw[unseen], cosines[unseen] = model.raw(self.rows[unseen]), self.rows[unseen] @ centroids.T
            if mine.any():
                strange[mine], strange_cosines[mine] = (
                    model.raw(strangers[mine]),
                    strangers[mine] @ centroids.T,
                )
        return HeldOut(raw, strange, cosines, strange_cosines)


def _loss(raw: FloatArray, answers: Answers) -> float:
    """Log-loss after calibration, which is what a weak regularisation's too large scores go through anyway."""
    if answers.exclusive:
        scale = calibration.fit_temperature(raw, answers.codes)
        scores = calibration.softmax((scale * raw).astype(np.float32))
        return float(log_loss(answers.codes, scores, labels=range(len(answers.names))))
    chances = np.clip(link(raw, *_calibrated(raw, answers), exclusive=False)[1], 1e-7, 1 - 1e-7)
    return float(-np.where(answers.wanted, np.log(chances), np.log1p(-chances)).mean())


def _with_dev(held_out: HeldOut, dev: Dev, model: Model, centroids: FloatArray) -> HeldOut:
    return replace(
        held_out,
        raw=np.concatenate([held_out.raw, model.raw(dev.rows)]),
        cosines=np.concatenate([held_out.cosines, dev.rows @ centroids.T]),
    )


def _calibrated(raw: FloatArray, answers: Answers) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each label: one temperature, or Platt's pair a label where they do not exclude each other."""
    count = len(answers.names)
    if answers.exclusive:
        return (calibration.fit_temperature(raw, answers.codes),) * count, (0.0,) * count
    pairs = [_platt(raw[:, label], answers.wanted[:, label]) for label in range(count)]
    return tuple(scale for scale, _ in pairs), tuple(shift for _, shift in pairs)


def _platt(raw: FloatArray, wanted: NDArray[np.bool_]) -> tuple[float, float]:
    """Platt's pair of one label; where its raw scores say nothing, the share of rows that have it, whatever they are."""
    scale, shift = calibration.fit_platt(raw, wanted)
    if scale > 0:  # a likelier label must never score lower
        return scale, shift
    rate = (wanted.sum() + 1) / (len(wanted) + 2)
    return _FLAT, float(np.log(rate / (1 - rate)))


def _limits(
    scores: FloatArray,
    held_out: HeldOut,
    answers: Answers,
    outside: FittedOutside | None,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    plan: Plan,
) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """Thresholds, and the recall to be expected of them."""
    if not answers.exclusive:
        limits = thresholds.fit_independent(scores, answers.wanted, beta=plan.beta)
        return limits, thresholds.promised_independent(scores, answers.wanted, beta=plan.beta, seed=plan.seed)
    strange = link(held_out.strange, scale, shift, exclusive=True)[1]
    everyone = np.concatenate([scores, strange])
    belonging = np.concatenate([answers.codes, np.full(len(strange), -1, np.int64)])
    open_ = None
    if outside is not None:
        stranger = np.concatenate([outside.inside_scores, outside.outside_scores])
        open_ = stranger < outside.outside.threshold
    limits = thresholds.fit_exclusive(everyone, belonging, beta=plan.beta, open_=open_)
    promised = thresholds.promised_exclusive(everyone, belonging, beta=plan.beta, open_=open_, seed=plan.seed)
    return limits, promised


def _borrowed(borrowed: Borrowed | None, answers: Answers, width: int) -> tuple[FloatArray, Answers] | None:
    if borrowed is None or not len(borrowed.labels):
        return None
    if strangers := set(borrowed.labels) - set(answers.names):
        raise ValueError(
            f"borrowed rows: found labels {', '.join(sorted(strangers))}, expected some of {', '.join(answers.names)}; "
            "map or drop them"
        )
    wanted = np.array([[name == label for name in answers.names] for label in borrowed.labels])
    return borrowed.vectors, Answers(answers.names, wanted, answers.exclusive)


def _golden(
    texts: Sequence[str],
    scores: FloatArray,
    answers: Answers,
    turns: Sequence[Sequence[GoldenTurn]] | None = None,
) -> tuple[Golden, ...]:
    best = scores.argmax(axis=1)
    return tuple(
        Golden(text=texts[i], label=answers.names[best[i]], context=() if turns is None else tuple(turns[i]))
        for i in golden.rows(scores, answers.wanted)
    )


def _spec(
    about: About,
    kind: Any,
    learnt: Learnt,
    answers: Answers,
    *,
    metrics: dict[str, float],
    params: dict[str, Any] | None = None,
) -> Spec:
    return Spec(
        name=about.name,
        kind=kind,
        task=about.task,
        labels=answers.names,
        exclusive=answers.exclusive,
        scale=learnt.scale,
        shift=learnt.shift,
        thresholds=learnt.thresholds,
        outside=None if learnt.outside is None else learnt.outside.outside,
        requires=Requires(vectorizer=about.fingerprint),
        params=params or {},
        metrics=metrics,
        prior=learnt.prior,
        made_by=about.made_by,
    )
